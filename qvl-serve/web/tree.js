/* tree.js - a conversation as a tree: editing and regenerating make branches, nothing is overwritten.
 * Job: nodes, the path that is shown, messages for the server. Input: user actions. Output: plain objects that store.js keeps.
 * Invariants: node.active is the index of the child that is shown; root has no text. */
import { blob, dataUri, id } from "./store.js";

export function newChat() {
  return { id: id(), title: "", created: Date.now(), updated: Date.now(), nodes: { root: { id: "root", parent: null, role: "root", children: [], active: 0 } } };
}
export function add(chat, parent, node) {
  const made = { id: id(), parent, children: [], active: 0, time: Date.now(), ...node };
  chat.nodes[made.id] = made;
  const above = chat.nodes[parent];
  above.children.push(made.id);
  above.active = above.children.length - 1;
  chat.updated = Date.now();
  return made;
}
export function path(chat) {
  const list = [];
  for (let n = chat.nodes.root; n.children.length;) list.push(n = chat.nodes[n.children[Math.min(n.active, n.children.length - 1)]]);
  return list;
}
export function turn(chat, node, by) {
  const above = chat.nodes[node.parent];
  above.active = Math.max(0, Math.min(above.children.length - 1, above.active + by));
}
export const leaf = (chat) => path(chat).at(-1) ?? chat.nodes.root;

async function parts(node) {
  const list = [];
  for (const m of node.media ?? []) {
    const uris = [];
    for (const key of m.blobs) { const b = await blob(key); if (b) uris.push(await dataUri(b)); }
    if (m.kind === "video") list.push({ type: "video", video: uris, fps: m.fps, do_sample_frames: false });
    else for (const u of uris) list.push({ type: "image_url", image_url: { url: u } });
  }
  if (node.text) list.push({ type: "text", text: node.text });
  return list;
}
/* Messages of everything above and with node. */
export async function messages(chat, node, system) {
  const chain = [];
  for (let n = node; n && n.role !== "root"; n = chat.nodes[n.parent]) chain.unshift(n);
  const list = system ? [{ role: "system", content: system }] : [];
  for (const n of chain) {
    if (n.role === "user") list.push({ role: "user", content: n.media?.length ? await parts(n) : n.text });
    else list.push({ role: "assistant", content: n.text ?? "" });
  }
  return list;
}
/* All media above and with node, pictures one by one: what "picture 2" counts. */
export function pictures(chat, node) {
  const chain = [];
  for (let n = node; n && n.role !== "root"; n = chat.nodes[n.parent]) chain.unshift(n);
  return chain.flatMap((n) => (n.media ?? []).filter((m) => m.kind === "image"));
}
