/* boxes.js - boxes and points in an answer, drawn on its picture.
 * Job: find Qwen's JSON ({"bbox_2d": [x1, y1, x2, y2]}, {"point_2d": [x, y]}, thousandths of width and height) in a text; draw.
 * Input: the answer, the pictures of the conversation. Output: shapes in the picture's own pixels; an element.
 * Invariants: a text that is no such JSON gives nothing; numbers out of range are clamped to the picture. */
import { t } from "./i18n.js";
import { url } from "./store.js";

const numbers = (v, n) => Array.isArray(v) && v.length === n && v.every((x) => typeof x === "number" && Number.isFinite(x));
const field = (o, names) => names.map((n) => o[n]).find((v) => v !== undefined);

function collect(value, list) {
  if (Array.isArray(value)) {
    if (numbers(value, 4)) list.push({ box: value, label: "" });
    else for (const v of value) collect(v, list);
    return;
  }
  if (!value || typeof value !== "object") return;
  const box = field(value, ["bbox_2d", "bbox", "box_2d", "box"]), point = field(value, ["point_2d", "point"]);
  const label = String(field(value, ["label", "name", "text", "description", "text_content"]) ?? ""), picture = field(value, ["image_index", "picture", "image"]);
  const more = Number.isInteger(picture) ? { picture } : {};
  if (numbers(box, 4)) list.push({ box, label, ...more });
  else if (numbers(point, 2)) list.push({ point, label, ...more });
  else for (const v of Object.values(value)) collect(v, list);
}
/* Every whole JSON value of the text that begins with [ or {, fenced or not. */
export function parse(text) {
  const list = [];
  if (!/bbox|box_2d|point/.test(text)) return list;
  for (let i = 0; i < text.length; i++) {
    if (text[i] !== "[" && text[i] !== "{") continue;
    let depth = 0, inside = false, end = -1;
    for (let j = i; j < text.length; j++) {
      const c = text[j];
      if (inside) { if (c === "\\") j++; else if (c === '"') inside = false; continue; }
      if (c === '"') inside = true;
      else if (c === "[" || c === "{") depth++;
      else if ((c === "]" || c === "}") && --depth === 0) { end = j; break; }
    }
    if (end < 0) continue; // not whole yet: what is inside it may be
    try { collect(JSON.parse(text.slice(i, end + 1)), list); i = end; } catch { /* not JSON */ }
  }
  return list;
}
const clamp = (v) => Math.max(0, Math.min(1000, v));
/* In the picture's own pixels. */
export function toPixels(shape, width, height) {
  const x = (v) => Math.round(clamp(v) * width / 1000), y = (v) => Math.round(clamp(v) * height / 1000);
  if (shape.point) return { ...shape, px: [x(shape.point[0]), y(shape.point[1])] };
  const [a, b, c, d] = shape.box;
  return { ...shape, px: [x(Math.min(a, c)), y(Math.min(b, d)), x(Math.max(a, c)), y(Math.max(b, d))] };
}
const svg = (name, attributes) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  return e;
};

/* pictures: [{blobs: [key], width, height, name}]. Null when there is nothing to draw. */
export async function draw(text, pictures) {
  const shapes = parse(text);
  if (!shapes.length || !pictures.length) return null;
  const figure = document.createElement("figure");
  figure.className = "boxes";
  let chosen = pictures.length - 1;
  const show = async () => {
    const p = pictures[chosen], source = await url(p.blobs[0]);
    const mine = shapes.filter((s) => s.picture === undefined || s.picture === chosen || s.picture === chosen + 1 || pictures.length === 1).map((s) => toPixels(s, p.width, p.height));
    const frame = document.createElement("div"), image = new Image(), over = svg("svg", { viewBox: `0 0 ${p.width} ${p.height}`, role: "img", "aria-label": t("boxes", { n: mine.length }) });
    frame.className = "frame";
    image.src = source ?? "";
    image.alt = p.name ?? "";
    frame.append(image, over);
    const list = document.createElement("ol"), unit = Math.max(p.width, p.height) / 100;
    mine.forEach((s, i) => {
      const group = svg("g", { class: `hue${i % 8}` });
      if (s.point) group.append(svg("circle", { cx: s.px[0], cy: s.px[1], r: unit * 1.1 }));
      else group.append(svg("rect", { x: s.px[0], y: s.px[1], width: Math.max(1, s.px[2] - s.px[0]), height: Math.max(1, s.px[3] - s.px[1]), rx: unit / 2 }));
      const label = svg("text", { x: s.px[0] + unit / 2, y: s.px[1] });
      label.textContent = s.label || String(i + 1);
      group.append(label);
      over.append(group);
      const item = document.createElement("li"), code = document.createElement("code");
      item.className = `hue${i % 8}`;
      item.tabIndex = 0;
      code.textContent = s.point ? `(${s.px.join(", ")})` : `[${s.px.join(", ")}]`;
      item.append(Object.assign(document.createElement("span"), { textContent: s.label || `${i + 1}` }), " ", code);
      const mark = (on) => { group.classList.toggle("hot", on); item.classList.toggle("hot", on); };
      for (const e of [item, group]) { e.addEventListener("pointerenter", () => mark(true)); e.addEventListener("pointerleave", () => mark(false)); }
      item.addEventListener("focus", () => mark(true));
      item.addEventListener("blur", () => mark(false));
      list.append(item);
    });
    const letters = () => { // as large on the screen as other small text, whatever the picture's size
      const size = 13 * p.width / (image.clientWidth || p.width);
      for (const e of over.querySelectorAll("text")) {
        e.setAttribute("font-size", size);
        e.setAttribute("dy", Number(e.getAttribute("y")) > size * 1.4 ? -size * 0.4 : size * 1.1);
      }
    };
    new ResizeObserver(letters).observe(frame);
    const caption = document.createElement("figcaption");
    caption.append(`${t("boxes", { n: mine.length })} · ${p.width} × ${p.height} ${t("pixels")}`);
    if (pictures.length > 1) {
      const select = document.createElement("select");
      pictures.forEach((_, i) => select.add(new Option(t("onPicture", { i: i + 1 }), i, false, i === chosen)));
      select.setAttribute("aria-label", t("rPictures"));
      select.onchange = () => { chosen = Number(select.value); show(); };
      caption.append(" ", select);
    }
    const copy = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: t("copy") });
    copy.onclick = async () => {
      await navigator.clipboard.writeText(JSON.stringify(mine.map((s) => (s.point ? { point: s.px, label: s.label } : { box: s.px, label: s.label })), null, 1));
      copy.textContent = t("copied");
      setTimeout(() => { copy.textContent = t("copy"); }, 1500);
    };
    caption.append(" ", copy);
    figure.replaceChildren(frame, list, caption);
  };
  await show();
  return figure;
}
