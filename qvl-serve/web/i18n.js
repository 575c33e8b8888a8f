/* i18n.js - the page's words in English and Chinese.
 * Job: t(key, values); apply() writes all marked elements. Input: localStorage "qvl.language", the browser's languages.
 * Invariants: both languages have the same keys (a test compares). */
export const words = {
  en: {
    skip: "Skip to the message box", conversations: "Conversations", hideSidebar: "Hide the sidebar", showSidebar: "Show the sidebar", newChat: "New chat",
    search: "Search", history: "History", export: "Export", import: "Import", status: "Status", api: "API", model: "Model", asCode: "This chat as code",
    language: "Language", theme: "Theme", settings: "Settings", hello: "Drop a picture, ask about it", helloMore: "Everything stays between this page and the server that runs it.",
    messages: "Messages", attached: "Attached", ask: "Ask about a picture…", message: "Message", attachFiles: "Attach pictures or a video", camera: "Take a picture",
    send: "Send", stop: "Stop", dropHere: "Drop pictures or a video here", close: "Close", system: "System prompt", temperature: "Temperature", modelsOwn: "default",
    maxTokens: "Most tokens", context: "what fits", presence: "Presence penalty", seed: "Seed", random: "random", maxPixels: "Most pixels of a picture", key: "API key",
    keyNote: "Kept in this browser only.", reset: "Reset", done: "Done", cancel: "Cancel", takePicture: "Take picture", copy: "Copy", copied: "Copied", remove: "Remove {name}",
    you: "You", assistant: "Answer", thinking: "Thinking…", thought: "Thought for {s} s", edit: "Edit", regenerate: "Regenerate", previous: "Previous version", next: "Next version",
    version: "{i} of {n}", save: "Send again", delete: "Delete conversation", deleteSure: "Delete “{title}”?", today: "Today", week: "Last 7 days", older: "Older", untitled: "New chat",
    nothingFound: "Nothing found", tokens: "{n} tokens", promptTokens: "{n} tokens with the conversation", ofContext: "{n} of {most} tokens", tooLong: "too long: {n} of {most} tokens",
    firstToken: "{s} s to first token", speed: "{n} tokens/s", details: "Receipt", rPrompt: "Prompt", rCached: "of these cached", rImages: "Image tokens", rPictures: "Pictures",
    rPicturesCached: "{a} of {n} cached", rAnswer: "Answer", rReasoning: "of these reasoning", rQueue: "Queue", rVision: "Vision", rPrefill: "Prefill", rDecode: "Decode", rTotal: "Total",
    rGuessed: "Guessed right", rSeconds: "{s} s", stopped: "Stopped", cutShort: "Cut off: most tokens reached", failed: "The answer failed", retry: "Try again",
    needKey: "This server asks for an API key.", loading: "loading {p} %", unloaded: "not loaded", draining: "unloading", ready: "ready", offline: "server not reachable",
    boxes: "Boxes and points: {n}", onPicture: "on picture {i}", pixels: "pixels of the picture", answered: "The answer is complete.", cameraDenied: "The camera cannot be used: {why}",
    videoFrames: "{n} frames, {fps} a second", notPicture: "{name} is neither a picture nor a video that this browser can read.", readVideo: "Reading {name}…",
    imported: "{n} conversations imported", notImport: "This file is not an export of this page: {why}", noSpace: "The browser has no room to keep this chat: {why}", tool: "Calls {name}",
    e1: "What is in this picture?", e2: "How many shapes are there?", e3: "Locate every shape, report the bbox coordinates in JSON format.", e4: "What number is written in the picture?",
  },
  zh: {
    skip: "跳到输入框", conversations: "对话", hideSidebar: "隐藏侧栏", showSidebar: "显示侧栏", newChat: "新对话",
    search: "搜索", history: "历史", export: "导出", import: "导入", status: "状态", api: "接口", model: "模型", asCode: "以代码形式查看",
    language: "语言", theme: "主题", settings: "设置", hello: "拖入图片，开始提问", helloMore: "所有内容只在此页面与运行它的服务器之间传递。",
    messages: "消息", attached: "附件", ask: "就图片提问……", message: "消息", attachFiles: "添加图片或视频", camera: "拍照",
    send: "发送", stop: "停止", dropHere: "将图片或视频拖到这里", close: "关闭", system: "系统提示词", temperature: "温度", modelsOwn: "默认",
    maxTokens: "最多词元", context: "上下文允许", presence: "存在惩罚", seed: "随机种子", random: "随机", maxPixels: "图片最多像素", key: "API 密钥",
    keyNote: "仅保存在此浏览器中。", reset: "重置", done: "完成", cancel: "取消", takePicture: "拍摄", copy: "复制", copied: "已复制", remove: "移除 {name}",
    you: "你", assistant: "回答", thinking: "思考中……", thought: "思考了 {s} 秒", edit: "编辑", regenerate: "重新生成", previous: "上一版本", next: "下一版本",
    version: "第 {i} / {n} 版", save: "重新发送", delete: "删除对话", deleteSure: "删除“{title}”？", today: "今天", week: "最近 7 天", older: "更早", untitled: "新对话",
    nothingFound: "没有找到", tokens: "{n} 词元", promptTokens: "连同对话共 {n} 词元", ofContext: "{n} / {most} 词元", tooLong: "过长：{n} / {most} 词元",
    firstToken: "首词元 {s} 秒", speed: "{n} 词元/秒", details: "明细", rPrompt: "提示", rCached: "其中已缓存", rImages: "图像词元", rPictures: "图片",
    rPicturesCached: "{n} 张中 {a} 张已缓存", rAnswer: "回答", rReasoning: "其中思考", rQueue: "排队", rVision: "视觉编码", rPrefill: "预填充", rDecode: "解码", rTotal: "总计",
    rGuessed: "猜中", rSeconds: "{s} 秒", stopped: "已停止", cutShort: "已截断：达到最多词元", failed: "回答失败", retry: "重试",
    needKey: "此服务器需要 API 密钥。", loading: "加载中 {p} %", unloaded: "未加载", draining: "卸载中", ready: "就绪", offline: "无法连接服务器",
    boxes: "框与点：{n}", onPicture: "在第 {i} 张图上", pixels: "图片像素坐标", answered: "回答完毕。", cameraDenied: "无法使用摄像头：{why}",
    videoFrames: "{n} 帧，每秒 {fps} 帧", notPicture: "{name} 不是此浏览器可读取的图片或视频。", readVideo: "正在读取 {name}……",
    imported: "已导入 {n} 个对话", notImport: "此文件不是本页面的导出：{why}", noSpace: "浏览器没有空间保存此对话：{why}", tool: "调用 {name}",
    e1: "图片里有什么？", e2: "图片里有几个图形？", e3: "定位每个图形，以 JSON 格式给出 bbox 坐标。", e4: "读出图片中的数字。",
  },
};
let language = "en";
export const current = () => language;
export function t(key, values = {}) {
  const text = words[language][key] ?? words.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}
export function apply() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const e of document.querySelectorAll("[data-t]")) e.textContent = t(e.dataset.t);
  for (const e of document.querySelectorAll("[data-t-label]")) { e.setAttribute("aria-label", t(e.dataset.tLabel)); if (e.matches("button")) e.title = t(e.dataset.tLabel); }
  for (const e of document.querySelectorAll("[data-t-placeholder]")) e.placeholder = t(e.dataset.tPlaceholder);
}
export function choose(name) {
  language = words[name] ? name : "en";
  try { localStorage.setItem("qvl.language", language); } catch { /* private mode */ }
  apply();
}
export function start() {
  let stored = null;
  try { stored = localStorage.getItem("qvl.language"); } catch { /* private mode */ }
  language = words[stored] ? stored : navigator.languages?.some((l) => l.toLowerCase().startsWith("zh")) && !navigator.language.startsWith("en") ? "zh" : "en";
  apply();
}
