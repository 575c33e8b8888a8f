/* settings.js - what the user chose, kept in this browser.
 * Job: the settings form and its values. Input: localStorage. Output: sampling(): fields of a request; system(), key(). */
const fields = ["system", "temperature", "top_p", "top_k", "max_tokens", "presence_penalty", "seed", "max_pixels", "key"];
const input = (name) => document.getElementById(`set-${name}`);
let values = {};
export function start(changed) {
  try { values = JSON.parse(localStorage.getItem("qvl.settings")) || {}; } catch { values = {}; }
  for (const name of fields) {
    input(name).value = values[name] ?? "";
    input(name).addEventListener("input", () => {
      values[name] = input(name).value;
      try { localStorage.setItem("qvl.settings", JSON.stringify(values)); } catch { /* private mode */ }
      changed(name);
    });
  }
  document.getElementById("reset-settings").onclick = () => {
    for (const name of fields) if (name !== "key") { input(name).value = ""; input(name).dispatchEvent(new Event("input")); }
  };
}
export const system = () => values.system?.trim() || "";
export const key = () => values.key?.trim() || "";
export function sampling() {
  const out = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "presence_penalty", "seed", "max_pixels"])
    if (values[name] !== undefined && values[name] !== "" && Number.isFinite(Number(values[name]))) out[name] = Number(values[name]);
  return out;
}
