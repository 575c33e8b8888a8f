/* receipt.js - what an answer took.
 * Job: one line and a table of usage and timings. Input: the server's usage and timings. Output: an element. */
import { t } from "./i18n.js";

const seconds = (ms) => (ms < 995 ? (ms / 1000).toFixed(2) : (ms / 1000).toFixed(1));
export function receipt(usage, timings) {
  const box = document.createElement("details"), line = document.createElement("summary"), table = document.createElement("table");
  box.className = "receipt";
  const head = [t("tokens", { n: usage.completion_tokens })];
  if (timings) {
    head.push(t("firstToken", { s: seconds(timings.ttft_ms) }));
    if (timings.tokens_per_second > 0) head.push(t("speed", { n: timings.tokens_per_second < 100 ? timings.tokens_per_second.toFixed(1) : Math.round(timings.tokens_per_second) }));
  }
  line.textContent = head.join(" · ");
  line.setAttribute("aria-label", `${t("details")}: ${line.textContent}`);
  const row = (name, value, inner) => {
    const tr = table.insertRow();
    tr.append(Object.assign(document.createElement("th"), { textContent: name, scope: "row", className: inner ? "inner" : "" }));
    tr.insertCell().textContent = value;
  };
  const d = usage.prompt_tokens_details ?? {};
  row(t("rPrompt"), usage.prompt_tokens);
  row(t("rCached"), d.cached_tokens ?? 0, true);
  if (d.image_tokens) row(t("rImages"), d.image_tokens, true);
  if (timings?.images) row(t("rPictures"), t("rPicturesCached", { a: timings.images_cached, n: timings.images }), true);
  row(t("rAnswer"), usage.completion_tokens);
  if (usage.completion_tokens_details?.reasoning_tokens) row(t("rReasoning"), usage.completion_tokens_details.reasoning_tokens, true);
  if (timings?.speculated_tokens) row(t("rGuessed"), timings.speculated_tokens, true);
  if (timings) for (const [name, key] of [["rQueue", "queue_ms"], ["rVision", "vision_ms"], ["rPrefill", "prefill_ms"], ["rDecode", "decode_ms"], ["rTotal", "total_ms"]])
    row(t(name), t("rSeconds", { s: seconds(timings[key] ?? 0) }));
  box.append(line, table);
  return box;
}
