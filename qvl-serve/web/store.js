/* store.js - history in IndexedDB.
 * Job: conversations and the blobs they show. Input: objects of tree.js, Blobs. Output: the same again.
 * Invariants: an export holds everything (pictures as data URIs); an import is checked before anything is written. */
const open = new Promise((resolve, reject) => {
  const request = indexedDB.open("qvl", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("chats", { keyPath: "id" });
    request.result.createObjectStore("blobs", { keyPath: "id" });
  };
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
async function run(store, mode, act) {
  const db = await open;
  return new Promise((resolve, reject) => {
    const tx = db.transaction(store, mode), request = act(tx.objectStore(store));
    tx.oncomplete = () => resolve(request?.result);
    tx.onerror = tx.onabort = () => reject(tx.error || new Error("aborted"));
  });
}
export const id = () => crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
export const all = () => run("chats", "readonly", (s) => s.getAll());
export const save = (chat) => run("chats", "readwrite", (s) => s.put(structuredClone(chat)));
const cache = new Map();
export async function keepBlob(blob) {
  const key = id();
  cache.set(key, blob);
  await run("blobs", "readwrite", (s) => s.put({ id: key, type: blob.type, data: blob }));
  return key;
}
export async function blob(key) {
  if (!cache.has(key)) {
    const found = await run("blobs", "readonly", (s) => s.get(key));
    if (!found) return null;
    cache.set(key, found.data);
  }
  return cache.get(key);
}
const urls = new Map();
export async function url(key) {
  if (!urls.has(key)) {
    const b = await blob(key);
    if (!b) return null;
    urls.set(key, URL.createObjectURL(b));
  }
  return urls.get(key);
}
export const dataUri = (b) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(b);
});
const blobsOf = (chat) => Object.values(chat.nodes).flatMap((n) => n.media ?? []).flatMap((m) => m.blobs);
export async function remove(chat) {
  await run("chats", "readwrite", (s) => s.delete(chat.id));
  for (const key of blobsOf(chat)) { cache.delete(key); await run("blobs", "readwrite", (s) => s.delete(key)); }
}
export async function exportAll() {
  const chats = await all(), blobs = {};
  for (const key of chats.flatMap(blobsOf)) { const b = await blob(key); if (b) blobs[key] = await dataUri(b); }
  return { format: "qvl-chats", version: 1, exported: new Date().toISOString(), chats, blobs };
}
/* How many were imported; ids are new, so importing twice makes copies and overwrites nothing. */
export async function importAll(data) {
  if (data?.format !== "qvl-chats" || data.version !== 1 || !Array.isArray(data.chats) || typeof data.blobs !== "object" || !data.blobs) throw new Error("format");
  for (const c of data.chats) {
    if (typeof c.title !== "string" || typeof c.nodes !== "object" || !c.nodes || !c.nodes.root) throw new Error("chats");
    for (const [key, n] of Object.entries(c.nodes)) {
      const fine = n && n.id === key && Array.isArray(n.children) && n.children.every((k) => typeof k === "string" && c.nodes[k]) && ["root", "user", "assistant"].includes(n.role)
        && (n.text === undefined || typeof n.text === "string") && (n.media ?? []).every((m) => Array.isArray(m.blobs));
      if (!fine) throw new Error(`nodes.${key}`);
    }
  }
  const names = new Map();
  for (const [key, uri] of Object.entries(data.blobs)) {
    const match = /^data:(image\/(?:png|jpeg|webp));base64,([A-Za-z0-9+/=]*)$/.exec(uri);
    if (!match) throw new Error(`blobs.${key}`);
    names.set(key, await keepBlob(new Blob([Uint8Array.from(atob(match[2]), (c) => c.charCodeAt(0))], { type: match[1] })));
  }
  for (const c of data.chats) {
    const copy = structuredClone(c);
    copy.id = id();
    for (const n of Object.values(copy.nodes)) for (const m of n.media ?? []) m.blobs = m.blobs.map((k) => names.get(k)).filter(Boolean);
    await save(copy);
  }
  return data.chats.length;
}
