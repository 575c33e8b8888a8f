/* snippet.js - the chat as a program.
 * Job: curl and Python text of a request. Input: its body and the names of its pictures. Output: text.
 * Invariants: pictures are read from files by name: the text stays short and works when they are beside it. */
function shorten(body, names) {
  let i = 0;
  const uri = (u) => (u.startsWith("data:") ? { file: names[i++] ?? `picture${i}.png`, type: /^data:([^;]+)/.exec(u)[1] } : u);
  return JSON.parse(JSON.stringify(body), (key, value) => (typeof value === "string" && value.startsWith("data:image/") ? uri(value) : value));
}
const isFile = (v) => v && typeof v === "object" && v.file && v.type;

export function curl(body, names, origin, withKey) {
  const files = [];
  let text = JSON.stringify(shorten(body, names), (k, v) => { if (!isFile(v)) return v; files.push(v); return `\u0000${files.length - 1}\u0000`; }, 1);
  text = text.replace(/[\\$`]/g, "\\$&");
  text = text.replace(/\\\\u0000(\d+)\\\\u0000/g, (_, i) => `data:${files[i].type};base64,$(base64 -w0 '${files[i].file.replace(/'/g, "'\\''")}')`);
  return `curl -N ${origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n${withKey ? '  -H "Authorization: Bearer $QVL_API_KEY" \\\n' : ""}  -d @- <<EOF\n${text}\nEOF\n`;
}
export function python(body, names, origin, withKey) {
  const literal = (v, pad) => {
    const inner = pad + "    ";
    if (v === null) return "None";
    if (typeof v === "boolean") return v ? "True" : "False";
    if (isFile(v)) return `data_uri(${JSON.stringify(v.file)}, ${JSON.stringify(v.type)})`;
    if (Array.isArray(v)) return v.length ? `[\n${v.map((x) => inner + literal(x, inner)).join(",\n")},\n${pad}]` : "[]";
    if (typeof v === "object") return `{${Object.entries(v).map(([k, x]) => `${JSON.stringify(k)}: ${literal(x, inner)}`).join(", ")}}`;
    return JSON.stringify(v);
  };
  const b = shorten(body, names), known = ["model", "messages", "temperature", "top_p", "max_tokens", "seed", "presence_penalty"];
  const extra = Object.fromEntries(Object.entries(b).filter(([k]) => !known.includes(k) && k !== "stream"));
  const lines = Object.entries(b).filter(([k]) => known.includes(k)).map(([k, v]) => `    ${k}=${literal(v, "    ")},\n`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${literal(extra, "    ")},\n`);
  return `import base64\n\nfrom openai import OpenAI\n\n\ndef data_uri(path, kind):\n    with open(path, "rb") as f:\n        return f"data:{kind};base64," + base64.b64encode(f.read()).decode()\n\n\n`
    + `client = OpenAI(base_url="${origin}/v1", api_key=${withKey ? '"..."' : '"none"'})\nfor chunk in client.chat.completions.create(\n${lines.join("")}    stream=True,\n):\n`
    + `    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)\nprint()\n`;
}
