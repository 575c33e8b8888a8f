/* render.js - a model's Markdown to safe HTML, cheaply while it streams.
 * Job: marked, then DOMPurify, then KaTeX and highlight.js on what is left.
 * Input: text that nobody trusts. Output: DOM inside the given element.
 * Invariants: nothing reaches the page but through DOMPurify: no styles, forms, scripts or pictures from elsewhere;
 *             while streaming only blocks whose text changed are made again. */
import { t } from "./i18n.js";

const math = (level, name, rule, display) => ({
  name, level,
  start(s) { // a block begins on its own line: marked cuts the paragraph before it
    const m = level === "block" ? /(^|\n)(?=\$\$|\\\[)/.exec(s) : /(?=\$|\\\(|\\\[)/.exec(s);
    return m ? m.index + m[0].length : undefined;
  },
  tokenizer(s) {
    const m = rule.exec(s);
    return m ? { type: name, raw: m[0], tex: (m[1] ?? m[2]).trim() } : undefined;
  },
  renderer: (token) => `<span class="math" data-display="${display ? 1 : 0}" data-tex="${escapeHtml(token.tex)}"></span>`,
});
const escapeHtml = (s) => s.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
let ready = false;
function setUp() {
  ready = true;
  /* Debian 12's DOMPurify (2.4.1 with its security patch) reads a variable that is declared nowhere, in a branch about removing
   * its own helper node. Without a value every call fails; with this one the branch is not taken, as in the version upstream. */
  globalThis.shadowNode ??= { __depth: 0 };
  /* Markup in an answer is shown as text, but for these bare tags: answers may talk about HTML, and none of it is for this page. */
  const html = (s) => (/^\s*<\/?(br|sub|sup|kbd|b|i|u|s|hr|mark|details|summary)\s*\/?>\s*$/i.test(s) ? s : escapeHtml(s));
  marked.use({ renderer: { html }, gfm: true, breaks: true, mangle: false, headerIds: false,
    extensions: [math("block", "mathBlock", /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])/, true),
      math("inline", "mathShown", /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])/, true),
      math("inline", "mathInline", /^(?:\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d)|\\\(([\s\S]+?)\\\))/, false)] });
  DOMPurify.addHook("afterSanitizeAttributes", (node) => {
    if (node.tagName === "A") { node.setAttribute("target", "_blank"); node.setAttribute("rel", "noopener noreferrer"); }
    if (node.tagName === "IMG" && !/^(data:image\/(png|jpeg|webp|gif);|blob:)/.test(node.getAttribute("src") || "")) node.removeAttribute("src");
    if (node.tagName === "INPUT") node.setAttribute("disabled", "");
  });
}
const options = { FORBID_TAGS: ["style", "form", "button", "textarea", "select", "svg", "math", "video", "audio", "iframe"], FORBID_ATTR: ["style", "srcset", "id", "name"],
  ADD_ATTR: ["data-tex", "data-display", "target"], ALLOW_DATA_ATTR: false, RETURN_DOM_FRAGMENT: true };

function fill(element, text) {
  if (!ready) setUp();
  element.replaceChildren(DOMPurify.sanitize(marked.parse(text), options));
  for (const e of element.querySelectorAll(".math")) katex.render(e.dataset.tex, e, { displayMode: e.dataset.display === "1", throwOnError: false, trust: false });
  for (const table of element.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table";
    frame.tabIndex = 0;
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of element.querySelectorAll("pre > code")) {
    const name = /language-(\S+)/.exec(code.className)?.[1];
    if (name && hljs.getLanguage(name)) code.innerHTML = hljs.highlight(name, code.textContent, true).value;
    code.classList.add("hljs");
    const bar = document.createElement("div"), copy = document.createElement("button");
    bar.className = "code-bar";
    bar.append(Object.assign(document.createElement("span"), { textContent: name ?? "" }), copy);
    copy.type = "button";
    copy.className = "quiet";
    copy.textContent = t("copy");
    copy.onclick = async () => { await navigator.clipboard.writeText(code.textContent); copy.textContent = t("copied"); setTimeout(() => { copy.textContent = t("copy"); }, 1500); };
    code.parentElement.prepend(bar);
    code.parentElement.tabIndex = 0;
  }
}

/* Where a text may be cut: empty lines outside of fences, lists and formulas. */
function blocks(text) {
  const list = [];
  let start = 0, fence = null, at = 0, shown = false;
  for (const line of text.split("\n")) {
    const mark = /^\s*(```+|~~~+)/.exec(line)?.[1][0];
    if (mark && !fence) fence = mark;
    else if (mark === fence && mark) fence = null;
    if ((line.match(/\$\$|\\\[|\\\]/g) || []).length % 2) shown = !shown;
    const next = text.slice(at + line.length + 1);
    if (!fence && !shown && line.trim() === "" && at > start && !/^(\s|[-*+] |\d+[.)] )/.test(next)) {
      list.push(text.slice(start, at));
      start = at + line.length + 1;
    }
    at += line.length + 1;
  }
  list.push(text.slice(start));
  return list.filter((b) => b.trim());
}

/* A view of a growing text: write(text) as often as one likes; the work is done once a frame. */
export function view(element) {
  let text = "", drawn = [], waiting = false;
  const draw = () => {
    waiting = false;
    const now = blocks(text);
    for (let i = 0; i < now.length; i++) {
      if (drawn[i] === now[i]) continue;
      while (element.children.length <= i) element.append(Object.assign(document.createElement("div"), { className: "block" }));
      fill(element.children[i], now[i]);
      drawn[i] = now[i];
    }
    drawn.length = now.length;
    while (element.children.length > now.length) element.lastElementChild.remove();
  };
  return {
    write(more) {
      text = more;
      if (!waiting) { waiting = true; requestAnimationFrame(draw); }
    },
    finish(all) { text = all; draw(); },
  };
}
