/* status.js - live charts from /metrics.
 * Job: read the metrics every two seconds, draw the last five minutes. Input: Prometheus text. Output: charts with numbers.
 * Invariants: rates and quantiles are those of the time between two readings; colours are never alone: lines differ in dashes. */
const zh = (localStorage.getItem("qvl.language") ?? "en") === "zh";
const say = (en, cn) => (zh ? cn : en);
const KEEP = 150, EVERY = 2000, points = [];
let before = null;

function parse(text) {
  const values = new Map();
  for (const line of text.split("\n")) {
    const m = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!m) continue;
    if (!values.has(m[1])) values.set(m[1], []);
    values.get(m[1]).push([m[2] ?? "", Number(m[3])]);
  }
  return values;
}
const sum = (v, name, label = "") => (v.get(name) ?? []).reduce((a, [l, x]) => a + (l.includes(label) ? x : 0), 0);
const max = (v, name) => (v.get(name) ?? []).reduce((a, [, x]) => Math.max(a, x), 0);
/* Quantile of what a histogram counted between two readings. */
function quantile(now, old, name, q) {
  const buckets = new Map();
  for (const [v, sign] of [[now, 1], [old, -1]]) for (const [l, x] of v?.get(`${name}_bucket`) ?? []) {
    const le = Number(/le="([^"]+)"/.exec(l)[1].replace("+Inf", "Infinity"));
    buckets.set(le, (buckets.get(le) ?? 0) + sign * x);
  }
  const list = [...buckets].sort((a, b) => a[0] - b[0]), all = list.at(-1)?.[1] ?? 0;
  if (!all) return NaN;
  let low = 0, under = 0;
  for (const [le, count] of list) {
    if (count >= q * all) return le === Infinity ? low : low + (le - low) * ((q * all - under) / Math.max(1, count - under));
    low = le;
    under = count;
  }
  return low;
}
const MiB = (x) => x / 1048576, one = (x) => (Number.isFinite(x) ? (x >= 100 ? Math.round(x) : Number(x.toFixed(x >= 10 ? 1 : 2))) : "–");
const cards = [
  { title: say("Requests", "请求"), unit: "", lines: [say("running", "运行"), say("waiting", "等待")], read: (n) => [sum(n, "qvl_num_requests_running"), sum(n, "qvl_num_requests_waiting")] },
  { title: say("Tokens a second", "每秒词元"), unit: "", lines: [say("generated", "生成"), say("prompt", "提示")],
    read: (n, o, s) => (o ? ["qvl_generation_tokens_total", "qvl_prompt_tokens_total"].map((m) => Math.max(0, sum(n, m) - sum(o, m)) / s) : [NaN, NaN]) },
  { title: say("Time to first token", "首词元时间"), unit: "s", lines: ["p50", "p95"], read: (n, o) => [0.5, 0.95].map((q) => quantile(n, o, "qvl_time_to_first_token_seconds", q)) },
  { title: say("Between tokens", "词元间隔"), unit: "ms", lines: ["p50", "p95"], read: (n, o) => [0.5, 0.95].map((q) => quantile(n, o, "qvl_inter_token_latency_seconds", q) * 1e3) },
  { title: say("KV cache", "KV 缓存"), unit: "%", lines: [say("in use", "使用中"), say("kept for prefixes", "保留前缀")], read: (n) => [max(n, "qvl_kv_cache_usage_perc") * 100, max(n, "qvl_kv_cache_kept_perc") * 100] },
  { title: say("Cache hits", "缓存命中"), unit: "%", lines: [say("prompt tokens", "提示词元"), say("pictures", "图片")],
    read: (n) => [["prefix", ""], ["mm", ""]].map(([c]) => { const q = sum(n, `qvl_${c}_cache_queries_total`); return q ? (100 * sum(n, `qvl_${c}_cache_hits_total`)) / q : NaN; }) },
  { title: say("Memory", "内存"), unit: "MiB", lines: [say("process", "进程"), say("weights", "权重"), "KV"],
    read: (n) => [MiB(sum(n, "process_resident_memory_bytes")), MiB(sum(n, "qvl_memory_bytes", 'kind="weights"')), MiB(sum(n, "qvl_memory_bytes", 'kind="kv"'))] },
  { title: say("HTTP requests a second", "每秒 HTTP 请求"), unit: "", lines: [say("answered", "已回答"), say("refused", "已拒绝")],
    read: (n, o, s) => (o ? ["http_requests_total", "qvl_requests_refused_total"].map((m) => Math.max(0, sum(n, m) - sum(o, m)) / s) : [NaN, NaN]) },
  { title: say("Connections", "连接"), unit: "", lines: [say("streams", "流"), "WebSocket"], read: (n) => [sum(n, "qvl_connections", 'kind="sse"'), sum(n, "qvl_connections", 'kind="ws"')] },
];
const make = (tag, text, className) => Object.assign(document.createElement(tag), { textContent: text ?? "", className: className ?? "" });
const svg = (tag, attributes) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); return e; };

for (const c of cards) {
  const section = make("section"), scale = make("div", "", "scale");
  c.now = make("div", "", "now");
  c.chart = svg("svg", { viewBox: `0 0 ${KEEP - 1} 100`, preserveAspectRatio: "none", role: "img", "aria-label": c.title });
  c.top = make("span");
  scale.append(make("span", say("5 minutes ago", "5 分钟前")), c.top, make("span", say("now", "现在")));
  section.append(make("h2", c.title), c.now, c.chart, scale);
  document.getElementById("cards").append(section);
}
function draw() {
  cards.forEach((c, k) => {
    const series = c.lines.map((_, i) => points.map((p) => p[k][i])), top = Math.max(1e-9, ...series.flat().filter(Number.isFinite));
    c.now.replaceChildren(...c.lines.map((name, i) => { const e = make("span", `${one(series[i].at(-1))} ${c.unit}`, `line${i}`); e.append(make("small", name)); return e; }));
    c.top.textContent = `${say("most", "最高")} ${one(top)} ${c.unit}`;
    c.chart.replaceChildren(svg("line", { x1: 0, x2: KEEP - 1, y1: 100, y2: 100, class: "axis" }), ...series.map((s, i) => svg("polyline", { class: `line${i}`,
      points: s.map((v, j) => (Number.isFinite(v) ? `${KEEP - points.length + j},${100 - (96 * v) / top}` : null)).filter(Boolean).join(" ") })));
  });
}
async function read() {
  const health = document.getElementById("health");
  try {
    let key = "";
    try { key = JSON.parse(localStorage.getItem("qvl.settings"))?.key?.trim() || ""; } catch { /* none */ }
    const alive = await (await fetch("/health")).json();
    const response = await fetch("/metrics", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    if (!response.ok) throw new Error(response.status === 401 ? say("an API key is needed: set it in the chat page's settings", "需要 API 密钥：请在聊天页面的设置中填写") : `HTTP ${response.status}`);
    const now = { at: performance.now(), values: parse(await response.text()) };
    points.push(cards.map((c) => c.read(now.values, before?.values, before ? (now.at - before.at) / 1000 : 1)));
    if (points.length > KEEP) points.shift();
    before = now;
    health.textContent = alive.status === "ok" ? say("healthy", "正常") : say(`stuck: ${alive.model}`, `停滞：${alive.model}`);
    health.classList.toggle("bad", alive.status !== "ok");
    const up = (Date.now() / 1000 - sum(now.values, "process_start_time_seconds")) / 3600;
    const version = /version="([^"]+)"/.exec(now.values.get("qvl_build_info")?.[0]?.[0] ?? "")?.[1] ?? "";
    document.getElementById("note").textContent = say(`qvl-serve ${version}, up ${one(up)} h`, `qvl-serve ${version}，已运行 ${one(up)} 小时`);
    draw();
  } catch (e) {
    health.textContent = e.message || say("not reachable", "无法连接");
    health.classList.add("bad");
  }
  setTimeout(read, EVERY);
}
document.documentElement.lang = zh ? "zh-CN" : "en";
document.getElementById("title").textContent = say("Status", "状态");
read();
