/* docs.js - draws openapi.json.
 *
 * Job:        one folding block per operation: what it is for, parameters, body, responses, a curl line.
 * Input:      openapi.json of the same server.
 * Output:     elements made one by one; no text is ever read as HTML.
 * Invariants: a schema that refers to itself unfolds only as far as the reader opens it.
 */
"use strict";

let api;

function make(tag, attributes, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) e.setAttribute(key, value);
  e.append(...children.filter((c) => c !== null && c !== undefined && c !== ""));
  return e;
}

function resolve(value) {
  while (value && value.$ref) value = value.$ref.slice(2).split("/").reduce((at, step) => at[step], api);
  return value;
}

const refName = (s) => (s.$ref ? s.$ref.split("/").pop() : "");

/* A schema in a few words: "string or null", "array of Message". */
function kindOf(schema) {
  if (schema.$ref) return refName(schema);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.oneOf && !schema.properties) return schema.oneOf.map(kindOf).join(" or ");
  if (schema.enum) return schema.enum.map((v) => JSON.stringify(v)).join(" | ");
  const types = [].concat(schema.type || "any");
  return types.map((t) => (t === "array" && schema.items ? `array of ${kindOf(schema.items)}` : t)).join(" or ");
}

function limits(schema) {
  const words = [];
  if ("default" in schema) words.push(`default ${JSON.stringify(schema.default)}`);
  if ("minimum" in schema) words.push(`at least ${schema.minimum}`);
  if ("exclusiveMinimum" in schema) words.push(`above ${schema.exclusiveMinimum}`);
  if ("maximum" in schema) words.push(`at most ${schema.maximum}`);
  if ("minItems" in schema) words.push(`at least ${schema.minItems} of them`);
  if ("maxItems" in schema) words.push(`at most ${schema.maxItems} of them`);
  return words.join(", ");
}

/* The schemas below this one that have fields of their own. */
function inner(schema) {
  const s = resolve(schema);
  if (s.properties) return [schema];
  if (s.items) return inner(s.items);
  return (s.oneOf || []).flatMap(inner);
}

function fields(schema) {
  const s = resolve(schema), list = make("ul", { class: "schema" });
  for (const [name, field] of Object.entries(s.properties)) {
    const full = resolve(field);
    const line = make("li", null, make("code", null, name), " ", make("span", { class: "quiet" }, kindOf(field)),
      (s.required || []).includes(name) ? make("span", { class: "must" }, " required") : "");
    const note = [full.description, limits(full)].filter(Boolean).join(" ");
    if (note) line.append(make("div", { class: "quiet" }, note));
    line.append(...inner(field).filter((i) => Object.keys(resolve(i).properties).length).map((i) => folded(refName(i) || "fields", i)));
    list.append(line);
  }
  return list;
}

/* Drawn when it is opened for the first time. */
function folded(title, schema) {
  const box = make("details", null, make("summary", null, title));
  box.addEventListener("toggle", () => { if (box.open && box.children.length === 1) box.append(fields(schema)); });
  return box;
}

function content(map) {
  return Object.entries(map || {}).map(([type, media]) => {
    if (!media.schema) return make("p", null, make("code", null, type)); // a stream of events: the response's description tells its form
    const about = resolve(media.schema).description;
    const parts = inner(media.schema).map((s, i, all) => (all.length > 1 ? folded(refName(s), s) : fields(s)));
    return make("div", null, make("p", null, make("code", null, type), " ", refName(media.schema)), about ? make("p", { class: "quiet" }, about) : "", ...parts);
  });
}

function curl(method, path, op) {
  const words = [`curl ${location.origin}${path}`];
  if (method !== "get") words[0] += ` -X ${method.toUpperCase()}`;
  if (!(op.security && !op.security.length)) words.push(`-H "Authorization: Bearer $QVL_API_KEY"`);
  const json = resolve(op.requestBody)?.content["application/json"];
  const example = json && resolve(json.schema).examples?.[0];
  if (example) words.push(`-H "Content-Type: application/json"`, `-d '${JSON.stringify(example).replaceAll("'", "'\\''")}'`);
  return words.join(" \\\n  ");
}

function operation(method, path, op) {
  const body = resolve(op.requestBody);
  const responses = Object.entries(op.responses).map(([code, r]) => {
    const full = resolve(r);
    return make("details", null, make("summary", null, make("code", null, code), " ", full.description), ...content(full.content));
  });
  const inside = make("div", null,
    op.description ? make("p", null, op.description) : "",
    op.security && !op.security.length ? make("p", { class: "quiet" }, "Needs no key.") : "",
    op.parameters ? make("h3", null, "Path") : "",
    op.parameters ? fields({ properties: Object.fromEntries(op.parameters.map((p) => [p.name, { ...p.schema, description: p.description }])),
      required: op.parameters.map((p) => p.name) }) : "",
    make("pre", null, curl(method, path, op)),
    ...(body ? [make("h3", null, "Body"), ...content(body.content)] : []),
    make("h3", null, "Responses"), ...responses);
  return make("details", { class: "operation", id: op.operationId },
    make("summary", null, make("span", { class: `method ${method}` }, method.toUpperCase()), make("code", null, path), " ",
      make("span", { class: "quiet" }, op.summary)), inside);
}

function draw() {
  const main = document.getElementById("operations"), nav = document.getElementById("contents");
  document.getElementById("summary").textContent = `${api.info.title} ${api.info.version}. ${api.info.summary} ${api.info.description}`;
  main.replaceChildren();
  for (const tag of api.tags) {
    const head = make("h2", null, tag.name);
    main.append(head);
    nav.append(make("strong", null, tag.name));
    for (const [path, item] of Object.entries(api.paths))
      for (const [method, op] of Object.entries(item)) {
        if (op.tags[0] !== tag.name) continue;
        const box = operation(method, path, op);
        const link = make("a", { href: `#${op.operationId}` }, make("span", { class: method }, method.toUpperCase()), ` ${path}`);
        link.addEventListener("click", () => { box.open = true; });
        box.dataset.words = `${method} ${path} ${op.summary} ${op.operationId}`.toLowerCase();
        link.dataset.words = box.dataset.words;
        main.append(box);
        nav.append(link);
      }
  }
  const wanted = location.hash && document.getElementById(location.hash.slice(1));
  if (wanted) {
    wanted.open = true;
    wanted.scrollIntoView();
  }
}

document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase();
  for (const e of document.querySelectorAll("[data-words]")) e.hidden = !e.dataset.words.includes(words);
});

fetch("/openapi.json").then((r) => {
  if (!r.ok) throw new Error(`status ${r.status}`);
  return r.json();
}).then((document_) => {
  api = document_;
  draw();
}).catch((e) => {
  document.getElementById("operations").replaceChildren(make("p", { role: "alert" }, `openapi.json cannot be read: ${e.message}`));
});
