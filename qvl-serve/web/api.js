/* api.js - the server's routes.
 * Job: requests with the key, errors as Error with status and message, the events of a stream.
 * Input: settings.key. Output: promises; stream() calls back for every chunk.
 * Invariants: aborting the signal closes the connection, which cancels the request on the server. */
export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message || `HTTP ${status}`);
    this.status = status;
    this.code = body?.error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}
let key = "";
export const setKey = (value) => { key = value || ""; };
const headers = (more) => ({ ...(key ? { Authorization: `Bearer ${key}` } : {}), ...more });

async function check(response) {
  if (response.ok) return response;
  let body = null;
  try { body = await response.json(); } catch { /* not ours: a proxy's page */ }
  throw new ApiError(response.status, body, Number(response.headers.get("retry-after")) || 0);
}
export async function get(path) {
  return check(await fetch(path, { headers: headers() }));
}
export async function post(path, body, signal) {
  return check(await fetch(path, { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal }));
}
export const models = async () => (await (await get("/v1/models")).json()).data;
export const plan = async (body, signal) => (await post("/v1/chat/completions/plan", body, signal)).json();

/* Calls each(chunk) for every chunk of an answer. */
export async function stream(body, signal, each) {
  const response = await post("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, { error: { message: "the connection was lost before the answer ended" } });
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection alive
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk);
      each(chunk);
    }
  }
}
