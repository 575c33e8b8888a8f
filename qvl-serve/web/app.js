/* app.js - the chat page: puts the modules together.
 * Job: the sidebar, the messages, the composer, running answers. Input: the user. Output: the page.
 * Invariants: one answer runs at a time for each conversation; what is on the screen is what store.js has, but for the running
 *             answer, which is saved when it ends, also when it is stopped or fails. */
import * as api from "./api.js";
import * as attach from "./attach.js";
import * as boxes from "./boxes.js";
import { current as language, choose as chooseLanguage, start as startWords, t } from "./i18n.js";
import { receipt } from "./receipt.js";
import { view } from "./render.js";
import * as settings from "./settings.js";
import { curl, python } from "./snippet.js";
import * as store from "./store.js";
import * as tree from "./tree.js";

const $ = (name) => document.getElementById(name);
const make = (tag, properties = {}, ...children) => {
  const e = Object.assign(document.createElement(tag), properties);
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
};
const icon = (name) => {
  const s = document.createElementNS("http://www.w3.org/2000/svg", "svg"), u = document.createElementNS("http://www.w3.org/2000/svg", "use");
  u.setAttribute("href", `/static/icons.svg#${name}`);
  s.setAttribute("aria-hidden", "true");
  s.append(u);
  return s;
};
const button = (name, label, act) => {
  const b = make("button", { type: "button", className: "icon", title: label, onclick: act }, icon(name));
  b.setAttribute("aria-label", label);
  return b;
};

let chats = [], chat = tree.newChat(), models = [], pending = [], running = null; // running: {chat, node, abort, draw}

/* ---- small things ---- */
function announce(text) { $("announce").textContent = text; }
function toast(text) {
  const e = make("div", { className: "toast", textContent: text });
  e.setAttribute("role", "alert");
  document.body.append(e);
  setTimeout(() => e.remove(), 6000);
}
async function keep(c) {
  try { await store.save(c); } catch (e) { toast(t("noSpace", { why: e.message })); }
}
const atBottom = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;
function toBottom() { $("scroll").scrollTop = $("scroll").scrollHeight; }

/* ---- models ---- */
async function loadModels() {
  try {
    models = await api.models();
  } catch (e) {
    $("model-dot").dataset.state = "gone";
    $("model-dot").parentElement.title = e.status === 401 ? t("needKey") : t("offline");
    if (e.status === 401 && !$("settings").open) { toast(t("needKey")); $("settings").showModal(); $("set-key").focus(); }
    setTimeout(loadModels, 5000);
    return;
  }
  const chosen = $("model").value || localStorage.getItem("qvl.model");
  $("model").replaceChildren(...models.map((m) => new Option(m.state === "ready" ? m.id : `${m.id} (${stateOf(m)})`, m.id, false, m.id === chosen)));
  showModel();
  setTimeout(loadModels, models.every((m) => m.state === "ready") ? 15000 : 1000);
}
const stateOf = (m) => (m.state === "loading" ? t("loading", { p: m.progress ?? 0 }) : t(m.state));
const model = () => models.find((m) => m.id === $("model").value) ?? models[0];
function showModel() {
  $("model-dot").dataset.state = model()?.state ?? "gone";
  $("model-dot").parentElement.title = model() ? stateOf(model()) : t("offline");
}

/* ---- sidebar ---- */
const plainText = (c) => `${c.title} ${Object.values(c.nodes).map((n) => n.text ?? "").join(" ")}`.toLowerCase();
function drawHistory() {
  const wanted = $("search").value.trim().toLowerCase(), now = Date.now(), day = 86400000;
  const shown = chats.filter((c) => !wanted || plainText(c).includes(wanted)).sort((a, b) => b.updated - a.updated);
  const groups = [["today", (c) => now - c.updated < day], ["week", (c) => now - c.updated >= day && now - c.updated < 7 * day], ["older", (c) => now - c.updated >= 7 * day]];
  const list = [];
  for (const [name, belongs] of groups) {
    const some = shown.filter(belongs);
    if (!some.length) continue;
    list.push(make("h2", { textContent: t(name) }), make("ul", {}, ...some.map((c) => {
      const link = make("button", { type: "button", className: "chat", textContent: c.title || t("untitled"), onclick: () => openChat(c) });
      if (c.id === chat.id) link.setAttribute("aria-current", "true");
      return make("li", {}, link, button("trash", t("delete"), () => removeChat(c)));
    })));
  }
  if (!list.length && wanted) list.push(make("p", { className: "quiet", textContent: t("nothingFound") }));
  $("history").replaceChildren(...list);
}
function openChat(c) {
  chat = c;
  drawHistory();
  drawMessages();
  toBottom();
  narrow(false);
  $("draft").focus();
}
async function removeChat(c) {
  if (!confirm(t("deleteSure", { title: c.title || t("untitled") }))) return;
  if (running?.chat === c) running.abort.abort();
  chats = chats.filter((x) => x !== c);
  await store.remove(c);
  if (chat === c) openChat(tree.newChat());
  drawHistory();
}
function narrow(open) {
  document.body.classList.toggle("side", open);
  $("veil").hidden = !open;
}

/* ---- messages ---- */
function mediaOf(node) {
  if (!node.media?.length) return null;
  const row = make("div", { className: "media" });
  for (const m of node.media) {
    const image = make("img", { alt: m.name, loading: "lazy" });
    store.url(m.blobs[0]).then((u) => { if (u) image.src = u; });
    if (m.kind === "video") row.append(make("div", { className: "video" }, image, make("span", {}, icon("film"), t("videoFrames", { n: m.blobs.length, fps: m.fps }))));
    else {
      const large = make("button", { type: "button", className: "picture", onclick: () => enlarge(m) }, image);
      large.setAttribute("aria-label", m.name);
      row.append(large);
    }
  }
  return row;
}
async function enlarge(m) {
  const box = make("dialog", { className: "large", onclick: () => box.close(), onclose: () => box.remove() }, make("img", { src: await store.url(m.blobs[0]), alt: m.name }));
  document.body.append(box);
  box.showModal();
}
function versions(node) {
  const above = chat.nodes[node.parent], n = above.children.length;
  if (n < 2) return null;
  const i = above.children.indexOf(node.id), go = (by) => () => { tree.turn(chat, node, by); keep(chat); drawMessages(); };
  const left = button("left", t("previous"), go(-1)), right = button("right", t("next"), go(1));
  left.disabled = i === 0;
  right.disabled = i === n - 1;
  return make("span", { className: "versions" }, left, make("span", { textContent: t("version", { i: i + 1, n }) }), right);
}
function userMessage(node) {
  const text = make("div", { className: "bubble" });
  if (node.text) text.append(make("p", { textContent: node.text }));
  const tools = make("div", { className: "actions" }, versions(node),
    button("copy", t("copy"), () => navigator.clipboard.writeText(node.text ?? "")), button("edit", t("edit"), () => editMessage(node, article)));
  const article = make("article", { className: "user" }, make("h3", { className: "hidden", textContent: t("you") }), mediaOf(node), node.text ? text : null, tools);
  return article;
}
function editMessage(node, article) {
  const area = make("textarea", { value: node.text ?? "", rows: Math.min(12, (node.text ?? "").split("\n").length + 1) });
  area.setAttribute("aria-label", t("edit"));
  const form = make("form", { className: "edit" }, area, make("menu", {},
    make("button", { type: "button", className: "quiet", textContent: t("cancel"), onclick: drawMessages }), make("button", { className: "accent", textContent: t("save") })));
  form.onsubmit = (e) => {
    e.preventDefault();
    if (running || (!area.value.trim() && !node.media?.length)) return;
    answer(tree.add(chat, node.parent, { role: "user", text: area.value.trim(), media: node.media }));
  };
  area.onkeydown = (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); form.requestSubmit(); }
    if (e.key === "Escape") { e.stopPropagation(); drawMessages(); }
  };
  article.replaceChildren(...[mediaOf(node), form].filter(Boolean));
  area.focus();
}
function assistantMessage(node) {
  const thought = make("details", { className: "thought", hidden: !node.reasoning }), thoughtText = make("div", { className: "text" }), thoughtHead = make("summary");
  thought.append(thoughtHead, thoughtText);
  const body = make("div", { className: "text" }), extra = make("div"), foot = make("div", { className: "actions" });
  const article = make("article", { className: "assistant" }, make("h3", { className: "hidden", textContent: t("assistant") }), thought, body, extra, foot);
  const thoughtView = view(thoughtText), bodyView = view(body);
  let boxed = 0;
  const head = () => { thoughtHead.textContent = node.text || node.finish ? t("thought", { s: ((node.thoughtMs ?? 0) / 1000).toFixed(1) }) : t("thinking"); };
  const drawBoxes = async () => {
    const found = boxes.parse(node.text ?? "").length;
    if (found === boxed) return;
    boxed = found;
    const figure = await boxes.draw(node.text, tree.pictures(chat, node));
    extra.querySelector(".boxes")?.remove();
    if (figure) extra.prepend(figure);
  };
  const draw = () => {
    thought.hidden = !node.reasoning;
    if (node.reasoning) { head(); thoughtView.write(node.reasoning); }
    bodyView.write(node.text ?? "");
    article.classList.toggle("waiting", !node.text && !node.reasoning && !node.finish);
    if (/[\]}]\s*(```)?\s*$/.test(node.text ?? "")) drawBoxes();
  };
  const finish = () => {
    article.classList.remove("waiting");
    thought.hidden = !node.reasoning;
    if (node.reasoning) { head(); thoughtView.finish(node.reasoning); }
    bodyView.finish(node.text ?? "");
    drawBoxes();
    for (const c of node.calls ?? []) extra.append(make("pre", { className: "call" }, make("strong", { textContent: t("tool", { name: c.name }) }), "\n", c.arguments));
    if (node.error) {
      const note = make("p", { className: "error" }, `${t("failed")}: ${node.error} `, make("button", { type: "button", className: "quiet", textContent: t("retry"), onclick: () => again(node) }));
      note.setAttribute("role", "alert");
      extra.append(note);
    } else if (node.finish === "stopped") extra.append(make("p", { className: "quiet", textContent: t("stopped") }));
    else if (node.finish === "length") extra.append(make("p", { className: "quiet", textContent: t("cutShort") }));
    foot.replaceChildren(...[versions(node), button("copy", t("copy"), () => navigator.clipboard.writeText(node.text ?? "")), button("again", t("regenerate"), () => again(node)),
      node.usage ? receipt(node.usage, node.timings) : null].filter(Boolean));
  };
  if (running?.node === node) { running.draw = draw; draw(); } else finish();
  article.finish = finish;
  return article;
}
function drawMessages() {
  const list = tree.path(chat);
  $("welcome").hidden = list.length > 0;
  $("messages").replaceChildren(...list.map((n) => (n.role === "user" ? userMessage(n) : assistantMessage(n))));
  document.title = chat.title ? `${chat.title} · qvl` : "qvl";
}

/* ---- answers ---- */
async function body(node) {
  return { model: model()?.id, messages: await tree.messages(chat, node, settings.system()), ...settings.sampling() };
}
function again(node) {
  if (!running) answer(chat.nodes[node.parent]);
}
async function answer(user) {
  const mine = chat, node = tree.add(mine, user.id, { role: "assistant", text: "", model: model()?.id });
  if (!chats.includes(mine)) chats.push(mine);
  if (!mine.title) mine.title = (user.text || user.media?.[0]?.name || t("untitled")).slice(0, 60);
  const abort = new AbortController();
  running = { chat: mine, node, abort, draw: () => {} };
  drawHistory();
  drawMessages();
  toBottom();
  working(true);
  keep(mine);
  const began = performance.now();
  try {
    const request = await body(user);
    await api.stream(request, abort.signal, (chunk) => {
      if (chunk.usage) { node.usage = chunk.usage; node.timings = chunk.timings; }
      for (const c of chunk.choices) {
        if (c.delta.reasoning) node.reasoning = (node.reasoning ?? "") + c.delta.reasoning;
        if (c.delta.content) {
          if (!node.text && node.reasoning) node.thoughtMs = performance.now() - began;
          node.text += c.delta.content;
        }
        for (const call of c.delta.tool_calls ?? []) {
          node.calls ??= [];
          node.calls[call.index] ??= { name: "", arguments: "" };
          node.calls[call.index].name += call.function?.name ?? "";
          node.calls[call.index].arguments += call.function?.arguments ?? "";
        }
        if (c.finish_reason) node.finish = c.finish_reason;
      }
      const follow = atBottom();
      running?.draw();
      if (follow) requestAnimationFrame(toBottom);
    });
  } catch (e) {
    if (abort.signal.aborted) node.finish = "stopped";
    else node.error = e.message;
    if (e.status === 401) { $("settings").showModal(); $("set-key").focus(); }
  }
  if (node.reasoning && !node.thoughtMs) node.thoughtMs = performance.now() - began;
  node.finish ??= "stop";
  running = null;
  working(false);
  mine.updated = Date.now();
  keep(mine);
  if (chat === mine) {
    const follow = atBottom();
    $("messages").lastElementChild?.finish?.();
    if (follow) requestAnimationFrame(toBottom);
  }
  drawHistory();
  announce(node.error ? `${t("failed")}: ${node.error}` : t("answered"));
  count();
}
function working(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("messages").setAttribute("aria-busy", on);
}

/* ---- composer ---- */
function grow() {
  $("draft").style.height = "auto";
  $("draft").style.height = `${Math.min(240, $("draft").scrollHeight)}px`;
}
function drawPending() {
  $("attached").replaceChildren(...pending.map((m) => {
    if (m.loading) return make("div", { className: "chip loading", textContent: t("readVideo", { name: m.name }) });
    const image = make("img", { alt: m.name });
    store.url(m.blobs[0]).then((u) => { image.src = u; });
    return make("div", { className: "chip" }, image, make("span", { textContent: m.kind === "video" ? t("videoFrames", { n: m.blobs.length, fps: m.fps }) : `${m.width} × ${m.height}` }),
      button("x", t("remove", { name: m.name }), () => { pending = pending.filter((x) => x !== m); drawPending(); count(); }));
  }));
}
async function take(files) {
  for (const file of files) {
    const place = { loading: true, name: file.name };
    pending.push(place);
    drawPending();
    try {
      pending[pending.indexOf(place)] = await attach.read(file);
    } catch {
      pending = pending.filter((x) => x !== place);
      toast(t("notPicture", { name: file.name }));
    }
    drawPending();
  }
  count();
  $("draft").focus();
}
function send() {
  const text = $("draft").value.trim(), media = pending.filter((m) => !m.loading);
  if (running || pending.some((m) => m.loading) || (!text && !media.length)) return;
  const user = tree.add(chat, tree.leaf(chat).id, { role: "user", text, media });
  $("draft").value = "";
  pending = [];
  drawPending();
  grow();
  answer(user);
}
let counting = null, counter = 0;
function count() {
  clearTimeout(counter);
  counter = setTimeout(async () => {
    counting?.abort();
    counting = new AbortController();
    const text = $("draft").value.trim(), media = pending.filter((m) => !m.loading);
    if ((!text && !media.length) || running || model()?.state !== "ready") { $("count").textContent = ""; return; }
    try {
      const mine = { nodes: { ...chat.nodes } }, last = tree.leaf(chat), draft = { id: "draft", parent: last.id, role: "user", text, media };
      const request = { model: model()?.id, messages: await tree.messages(mine, draft, settings.system()), ...settings.sampling() };
      const plan = await api.plan(request, counting.signal);
      $("count").textContent = t("ofContext", { n: plan.prompt_tokens, most: model().max_model_len });
      $("count").classList.toggle("bad", !plan.fits);
    } catch (e) {
      if (e.name === "AbortError") return;
      $("count").textContent = e.code === "context_length_exceeded" ? e.message : "";
      $("count").classList.toggle("bad", e.code === "context_length_exceeded");
    }
  }, 400);
}
async function showCode(kind) {
  const last = tree.path(chat).findLast((n) => n.role === "user"), names = [];
  for (let n = last; n && n.role !== "root"; n = chat.nodes[n.parent])
    for (const m of [...(n.media ?? [])].reverse()) names.unshift(...m.blobs.map((_, i) => (m.kind === "video" ? `${m.name}.${i}.jpg` : m.name)));
  const request = last ? await body(last) : { model: model()?.id, messages: [{ role: "user", content: t("e1") }], ...settings.sampling() };
  $("code-text").textContent = (kind === "curl" ? curl : python)(kind === "curl" ? { ...request, stream: true } : request, names, location.origin, !!settings.key());
  $("tab-curl").setAttribute("aria-selected", kind === "curl");
  $("tab-python").setAttribute("aria-selected", kind === "python");
}

/* ---- wiring ---- */
function drawTheme(chosen) {
  $("theme").firstElementChild.firstElementChild.setAttribute("href", `/static/icons.svg#${{ auto: "auto", light: "sun", dark: "moon" }[chosen]}`);
}
function words() {
  $("language").textContent = language() === "zh" ? "中" : "EN";
  $("examples").replaceChildren(...["e1", "e2", "e3", "e4"].map((key) => make("button", { type: "button", textContent: t(key), onclick: () => { $("draft").value = t(key); grow(); count(); $("draft").focus(); } })));
  drawHistory();
  drawMessages();
  drawPending();
}
function wire() {
  $("composer").onsubmit = (e) => { e.preventDefault(); send(); };
  $("draft").oninput = () => { grow(); count(); };
  $("draft").onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } };
  $("stop").onclick = () => running?.abort.abort();
  $("attach").onclick = () => $("files").click();
  $("files").onchange = () => { take([...$("files").files]); $("files").value = ""; };
  $("camera").onclick = async () => {
    try {
      const m = await attach.camera($("camera-box"), $("camera-view"), $("camera-take"), $("camera-close"));
      if (m) { pending.push(m); drawPending(); count(); }
    } catch (e) { toast(t("cameraDenied", { why: e.message })); }
  };
  $("new-chat").onclick = () => openChat(tree.newChat());
  $("search").oninput = drawHistory;
  $("model").onchange = () => { localStorage.setItem("qvl.model", $("model").value); showModel(); count(); };
  $("show-sidebar").onclick = () => (matchMedia("(max-width: 800px)").matches ? narrow(true) : document.body.classList.remove("no-side"));
  $("hide-sidebar").onclick = () => (matchMedia("(max-width: 800px)").matches ? narrow(false) : document.body.classList.add("no-side"));
  $("veil").onclick = () => narrow(false);
  $("open-settings").onclick = () => $("settings").showModal();
  $("theme").onclick = () => window.qvlTheme.next();
  document.addEventListener("theme", (e) => drawTheme(e.detail));
  $("language").onclick = () => { chooseLanguage(language() === "en" ? "zh" : "en"); words(); };
  $("snippet").onclick = async () => { await showCode("curl"); $("code-box").showModal(); };
  $("tab-curl").onclick = () => showCode("curl");
  $("tab-python").onclick = () => showCode("python");
  $("code-close").onclick = () => $("code-box").close();
  $("code-copy").onclick = async () => { await navigator.clipboard.writeText($("code-text").textContent); $("code-copy").textContent = t("copied"); setTimeout(() => { $("code-copy").textContent = t("copy"); }, 1500); };
  $("export").onclick = async () => {
    const blob = new Blob([JSON.stringify(await store.exportAll())], { type: "application/json" }), link = make("a", { href: URL.createObjectURL(blob), download: `qvl-chats-${new Date().toISOString().slice(0, 10)}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = async () => {
    const file = $("import-file").files[0];
    $("import-file").value = "";
    if (!file) return;
    try {
      toast(t("imported", { n: await store.importAll(JSON.parse(await file.text())) }));
      chats = await store.all();
      drawHistory();
    } catch (e) { toast(t("notImport", { why: e.message })); }
  };
  document.addEventListener("paste", (e) => {
    const files = [...(e.clipboardData?.files ?? [])];
    if (files.length) { e.preventDefault(); take(files); }
  });
  let depth = 0;
  const carries = (e) => [...(e.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (e) => { if (carries(e)) { depth++; $("drop").hidden = false; } });
  document.addEventListener("dragleave", (e) => { if (carries(e) && --depth <= 0) { depth = 0; $("drop").hidden = true; } });
  document.addEventListener("dragover", (e) => { if (carries(e)) e.preventDefault(); });
  document.addEventListener("drop", (e) => {
    if (!carries(e)) return;
    e.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    take([...e.dataTransfer.files]);
  });
  document.addEventListener("keydown", (e) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName);
    if ((e.ctrlKey || e.metaKey) && e.key.toLowerCase() === "k") { e.preventDefault(); if (matchMedia("(max-width: 800px)").matches) narrow(true); document.body.classList.remove("no-side"); $("search").focus(); }
    else if ((e.ctrlKey || e.metaKey) && e.shiftKey && e.key.toLowerCase() === "o") { e.preventDefault(); openChat(tree.newChat()); }
    else if (e.key === "/" && !typing) { e.preventDefault(); $("draft").focus(); }
    else if (e.key === "Escape" && !document.querySelector("dialog[open]")) { if (running) running.abort.abort(); else narrow(false); }
  });
}

startWords();
settings.start((name) => { if (name === "key") { api.setKey(settings.key()); loadModels(); } else count(); });
api.setKey(settings.key());
wire();
drawTheme(window.qvlTheme.get());
words();
loadModels();
try { chats = await store.all(); } catch (e) { toast(t("noSpace", { why: e.message })); }
drawHistory();
$("draft").focus();
