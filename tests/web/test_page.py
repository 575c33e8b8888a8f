"""The page in a real browser (Debian's chromium, driven by Playwright) against a real server. Run: make check-page

Every test fails on any console error, failed request or violation of the Content-Security-Policy.
Screenshots go to build/screenshots.
"""
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "screenshots"
IMAGES = ROOT / "examples" / "images"


@pytest.fixture(scope="module")
def url():
    if os.environ.get("QVL_TEST_URL"):
        yield os.environ["QVL_TEST_URL"]
        return
    p = subprocess.Popen([ROOT / "build/release/qvl-serve", "--port", "0", "--set", "log.level=error"], stdout=subprocess.PIPE, text=True)
    yield re.search(r"http://\S+", p.stdout.readline()).group(0)
    p.send_signal(signal.SIGTERM)
    assert p.wait(20) == 0


@pytest.fixture(scope="module")
def browser():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"])
        yield b
        b.close()


@pytest.fixture
def new_page(browser, url):
    """Opens pages that must stay without errors."""
    contexts, faults = [], []

    def make(allow=(), **kw):
        kw.setdefault("viewport", {"width": 1280, "height": 860})
        kw.setdefault("locale", "en-US")
        context = browser.new_context(base_url=url, permissions=["clipboard-read", "clipboard-write", "camera"], **kw)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script("window.violations = []; document.addEventListener('securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective + ' ' + e.blockedURI));")
        page.on("console", lambda m: m.type == "error" and not any(a in m.text for a in allow) and faults.append(m.text))
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("requestfailed", lambda r: "ERR_ABORTED" not in (r.failure or "") and faults.append(f"{r.url}: {r.failure}"))
        page.goto("/")
        expect(page.locator("#model-dot")).to_have_attribute("data-state", "ready")
        return page

    yield make
    for c in contexts:
        c.close()
    assert not faults, faults


def shot(page, name):
    page.screenshot(path=SHOTS / f"{name}.png")


def ask(page, text, *files, done=True):
    if files:
        page.set_input_files("#files", [IMAGES / f for f in files])
        expect(page.locator(".chip:not(.loading)")).to_have_count(len(files))
    page.fill("#draft", text)
    page.press("#draft", "Enter")
    if done:
        expect(page.locator("#send")).to_be_visible(timeout=30000)


def canned(page, events, delay=False):
    """The server's next answers: these deltas as a stream."""
    chunks = [{"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in events]
    chunks.append({**chunks[0], "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({**chunks[0], "choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": len(events), "total_tokens": 10 + len(events)}})
    body = "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body))


def last(page):
    return page.locator("article.assistant").last


def test_a_picture_and_a_question(new_page):
    page = new_page()
    shot(page, "welcome")
    ask(page, "What do you see?", "shapes.png")
    expect(last(page).locator(".text").last).to_contain_text("triangle")
    receipt = last(page).locator(".receipt")
    expect(receipt).to_contain_text("tokens/s")
    receipt.locator("summary").click()
    expect(receipt.locator("table")).to_contain_text("Image tokens")
    shot(page, "answer")
    # the second turn finds the first one in the cache
    receipt.locator("summary").click()
    ask(page, "How many shapes are there?")
    last(page).locator(".receipt summary").click()
    cached = last(page).locator(".receipt tr").filter(has_text="of these cached").locator("td")
    assert int(cached.inner_text()) > 0


def test_several_pictures_paste_and_drop(new_page):
    page = new_page()
    page.set_input_files("#files", [IMAGES / "shapes.png", IMAGES / "three.webp"])
    expect(page.locator(".chip")).to_have_count(2)
    data = (IMAGES / "heart.jpg").read_bytes()
    page.evaluate("""async bytes => {
        const file = new File([new Uint8Array(bytes)], "pasted.jpg", {type: "image/jpeg"}), d = new DataTransfer(); d.items.add(file);
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: d}));
        for (const kind of ["dragenter", "dragover", "drop"]) document.dispatchEvent(new DragEvent(kind, {dataTransfer: d, cancelable: true, bubbles: true}));
    }""", list(data))
    expect(page.locator(".chip:not(.loading)")).to_have_count(4)
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#count")).to_contain_text("tokens")
    page.locator(".chip button").first.click()
    expect(page.locator(".chip")).to_have_count(3)
    ask(page, "What is in these?")
    expect(page.locator("article.user .media img")).to_have_count(3)


def test_what_is_no_picture_is_said(new_page):
    page = new_page()
    page.set_input_files("#files", {"name": "notes.png", "mimeType": "image/png", "buffer": b"not a picture"})
    expect(page.locator(".toast")).to_contain_text("notes.png")
    expect(page.locator(".chip")).to_have_count(0)


def test_stop_regenerate_edit_and_branches(new_page):
    page = new_page()
    page.evaluate("localStorage.setItem('qvl.settings', JSON.stringify({max_tokens: '3000', temperature: '40', top_k: '0', top_p: '1'}))")
    page.reload()
    expect(page.locator("#model-dot")).to_have_attribute("data-state", "ready")
    held = []
    page.route("**/v1/chat/completions", lambda r: held.append(r))  # never answered
    ask(page, "Tell me a story", done=False)
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(last(page)).to_contain_text("Stopped")
    page.unroute("**/v1/chat/completions")
    page.click("#open-settings")
    page.click("#reset-settings")
    page.fill("#set-temperature", "0")
    shot(page, "settings")
    page.click("text=Done")
    last(page).locator("button[aria-label=Regenerate]").click()
    expect(page.locator("#send")).to_be_visible(timeout=30000)
    expect(last(page).locator(".versions")).to_contain_text("2 of 2")
    last(page).locator("button[aria-label='Previous version']").click()
    expect(last(page)).to_contain_text("Stopped")
    user = page.locator("article.user").first
    user.hover()
    user.locator("button[aria-label=Edit]").click()
    page.fill("article.user textarea", "What colour is the sky?")
    page.press("article.user textarea", "Enter")
    expect(page.locator("#send")).to_be_visible(timeout=30000)
    expect(page.locator("article.user").first.locator(".versions")).to_contain_text("2 of 2")
    expect(last(page)).not_to_contain_text("Stopped")


def test_thinking_is_folded_away(new_page):
    page = new_page()
    canned(page, [{"role": "assistant", "content": ""}, {"reasoning": "First I look. ", "reasoning_content": "First I look. "}, {"reasoning": "Then I **count**."},
                  {"content": "There are "}, {"content": "three."}])
    ask(page, "How many?")
    thought = last(page).locator(".thought")
    expect(thought.locator("summary")).to_contain_text("Thought for")
    assert not thought.evaluate("e => e.open")
    thought.locator("summary").click()
    expect(thought).to_contain_text("Then I count.")
    expect(last(page).locator(".text").last).to_have_text("There are three.")
    shot(page, "thinking")


def test_boxes_and_points_on_the_picture(new_page):
    page = new_page()
    text = 'Here they are:\n```json\n[{"bbox_2d": [100, 200, 500, 800], "label": "star"}, {"point_2d": [750, 500], "label": "tip"}]\n```\n'
    canned(page, [{"role": "assistant", "content": ""}] + [{"content": text[i:i + 7]} for i in range(0, len(text), 7)])
    ask(page, "Where is the star?", "shapes.png")
    size = page.evaluate("async () => { const i = document.querySelector('.frame img'); await i.decode(); return [i.naturalWidth, i.naturalHeight]; }")
    rect = page.locator(".frame rect")
    assert [float(rect.get_attribute(a)) for a in ("x", "y", "width", "height")] == [round(.1 * size[0]), round(.2 * size[1]), round(.5 * size[0]) - round(.1 * size[0]), round(.8 * size[1]) - round(.2 * size[1])]
    expect(page.locator(".frame circle")).to_have_count(1)
    expect(page.locator(".boxes li").first).to_contain_text(f"[{round(.1 * size[0])}, {round(.2 * size[1])}")
    page.locator(".boxes li").first.hover()
    expect(page.locator(".frame g.hot")).to_have_count(1)
    shot(page, "boxes")


def test_real_boxes_of_the_bundled_model(new_page):
    page = new_page()
    page.evaluate("localStorage.setItem('qvl.settings', JSON.stringify({temperature: '0'}))")
    page.reload()
    expect(page.locator("#model-dot")).to_have_attribute("data-state", "ready")
    ask(page, "Locate the red heart, output its bbox coordinates using JSON format.", "heart.jpg")
    expect(page.locator(".frame rect")).to_have_count(1)
    shot(page, "real_boxes")


def test_markdown_is_drawn_and_harmless(new_page):
    page = new_page()
    text = ("# Title\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('hi')\n```\n\nInline $e^{i\\pi}+1=0$ and\n\n$$\\int_0^1 x^2\\,dx = \\frac13$$\n\n1. one\n2. two\n\n"
            "It costs $5 and $6.\n\n<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\"><a href=\"javascript:document.title='evil'\">link</a>"
            "<form action=/admin><button>x</button></form><p style=\"position:fixed;inset:0\">styled</p><img src=\"https://evil.example/track.png\">\n\n"
            "[link](javascript:alert(1)) ![far](https://evil.example/track.png) x<sub>2</sub><br>y\n")
    canned(page, [{"content": text[i:i + 11]} for i in range(0, len(text), 11)])
    ask(page, "Show me")
    body = last(page).locator(".text").last
    expect(body.locator("h1")).to_have_text("Title")
    expect(body.locator("td")).to_have_count(2)
    expect(body.locator("pre .hljs-string, pre .hljs-built_in, pre .hljs-keyword").first).to_be_visible()
    expect(body.locator(".katex")).to_have_count(2)
    expect(body).to_contain_text("It costs $5 and $6.")
    assert body.locator("script, form, button:not(.code-bar button), [style]:not(.katex *)").count() == 0
    assert body.locator("a[href^=javascript]").count() == 0 and body.locator("img[src]").count() == 0
    expect(body).to_contain_text("<script>document.title='evil'</script>")  # shown, not run
    assert body.locator("sub").count() == 1
    assert "evil" not in page.title()
    shot(page, "markdown")


def test_history_search_export_import(new_page):
    page = new_page()
    ask(page, "What colour is the sky?", "heart.jpg")
    page.click("#new-chat")
    expect(page.locator("article")).to_have_count(0)
    ask(page, "Say hello")
    page.reload()
    expect(page.locator("#history .chat")).to_have_count(2)
    page.keyboard.press("Control+k")
    page.keyboard.type("colour")
    expect(page.locator("#history .chat")).to_have_count(1)
    page.locator("#history .chat").click()
    expect(page.locator("article.user .media img")).to_have_js_property("complete", True)
    expect(page.locator("article.user")).to_contain_text("What colour is the sky?")
    page.fill("#search", "")
    with page.expect_download() as d:
        page.click("#export")
    path = d.value.path()
    data = json.loads(Path(path).read_text())
    assert len(data["chats"]) == 2 and len(data["blobs"]) == 1
    page.set_input_files("#import-file", path)
    expect(page.locator("#history .chat")).to_have_count(4)
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b'{"format": "other"}'})
    expect(page.locator(".toast").last).to_contain_text("not an export")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#history li").first.hover()
    page.locator("#history li button[aria-label='Delete conversation']").first.click()
    expect(page.locator("#history .chat")).to_have_count(3)
    shot(page, "history")


def test_dark(new_page):
    page = new_page(color_scheme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "What do you see?", "shapes.png")
    shot(page, "dark")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.click("#theme")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_phone(new_page):
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, device_scale_factor=2)
    shot(page, "phone_welcome")
    ask(page, "What do you see?", "shapes.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shot(page, "phone")
    page.click("#show-sidebar")
    expect(page.locator("#history .chat")).to_be_visible()
    page.wait_for_timeout(300)
    shot(page, "phone_sidebar")


def test_chinese(new_page):
    page = new_page(locale="zh-CN")
    expect(page.locator("#new-chat")).to_contain_text("新对话")
    ask(page, "图片里有什么？", "shapes.png")
    shot(page, "chinese")
    page.click("#language")
    expect(page.locator("#new-chat")).to_contain_text("New chat")
    keys = page.evaluate("async () => { const m = await import('/static/i18n.js'); return [Object.keys(m.words.en), Object.keys(m.words.zh)]; }")
    assert keys[0] == keys[1]


def test_camera(new_page):
    page = new_page()
    page.click("#camera")
    expect(page.locator("#camera-box")).to_be_visible()
    page.click("#camera-take")
    expect(page.locator(".chip:not(.loading)")).to_have_count(1)


def test_video_becomes_frames(new_page):
    page = new_page()
    page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 160, height: 120}), c = canvas.getContext("2d"), parts = [];
        const recorder = new MediaRecorder(canvas.captureStream(10), {mimeType: "video/webm"});
        recorder.ondataavailable = e => parts.push(e.data);
        recorder.start();
        for (let i = 0; i < 15; i++) { c.fillStyle = "white"; c.fillRect(0, 0, 160, 120); c.fillStyle = "red"; c.fillRect(i * 8, 40, 40, 40); await new Promise(r => setTimeout(r, 100)); }
        await new Promise(r => { recorder.onstop = r; recorder.stop(); });
        const d = new DataTransfer();
        d.items.add(new File(parts, "clip.webm", {type: "video/webm"}));
        document.dispatchEvent(new DragEvent("drop", {dataTransfer: d, cancelable: true}));
    }""")
    expect(page.locator(".chip:not(.loading)")).to_have_count(1, timeout=20000)
    expect(page.locator(".chip")).to_contain_text("frame")
    ask(page, "What happens?")
    expect(last(page).locator(".text").last).not_to_be_empty()
    expect(last(page)).not_to_contain_text("failed")


def test_code(new_page):
    page = new_page()
    ask(page, "What costs $5?", "shapes.png")
    page.click("#snippet")
    expect(page.locator("#code-text")).to_contain_text("base64 -w0 'shapes.png'")
    text = page.locator("#code-text").inner_text()
    out = subprocess.run(["bash", "-c", text], cwd=IMAGES, capture_output=True, text=True, timeout=60)
    assert "[DONE]" in out.stdout, out.stdout + out.stderr
    page.click("#tab-python")
    expect(page.locator("#code-text")).to_contain_text("OpenAI(base_url=")
    compile(page.locator("#code-text").inner_text(), "snippet", "exec")
    shot(page, "code")


def test_keyboard_and_names(new_page):
    page = new_page()
    ask(page, "Hello", "heart.jpg")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, a, input, select, textarea, img")].filter(e => e.checkVisibility() &&
        !(e.getAttribute("aria-label") || e.textContent.trim() || e.title || e.labels?.length || e.hasAttribute("alt"))).map(e => e.outerHTML.slice(0, 80))""")
    assert nameless == []
    page.locator("#draft").blur()
    page.keyboard.press("/")
    expect(page.locator("#draft")).to_be_focused()
    for theme in ("light", "dark"):
        page.evaluate("t => { document.documentElement.dataset.theme = t; }", theme)
        low = page.evaluate("""() => {
            const rgb = s => s.match(/[\\d.]+/g).map(Number), lum = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
            const under = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
            return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility({opacityProperty: true}) && !e.closest(".skip") && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
                const a = lum(rgb(getComputedStyle(e).color).slice(0, 3)), b = lum(under(e)); return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.slice(0, 30)]; }).filter(x => x[0] < 4.5);
        }""")
        assert low == [], f"{theme}: contrast below 4.5: {low}"


def test_a_server_with_keys_asks_for_one(new_page, browser):
    key_file = SHOTS.parent / "page.keys"
    out = subprocess.run([ROOT / "build/release/qvl-serve", "--new-key", "page"], capture_output=True, text=True, check=True).stdout.splitlines()
    key_file.write_text(out[-1] + "\n")
    p = subprocess.Popen([ROOT / "build/release/qvl-serve", "--port", "0", "--set", "log.level=error", "--set", f"auth.keys={key_file}"], stdout=subprocess.PIPE, text=True)
    try:
        page = browser.new_page(base_url=re.search(r"http://\S+", p.stdout.readline()).group(0), locale="en-US")
        page.goto("/")
        expect(page.locator("#set-key")).to_be_focused()
        page.fill("#set-key", out[0])
        expect(page.locator("#model-dot")).to_have_attribute("data-state", "ready", timeout=15000)
        page.click("text=Done")
        ask(page, "Hello")
        expect(last(page).locator(".text").last).not_to_be_empty()
        page.close()
    finally:
        p.send_signal(signal.SIGTERM)
        assert p.wait(20) == 0


def test_status_and_docs(new_page, url):
    page = new_page()
    ask(page, "What do you see?", "shapes.png")
    page.goto("/status")
    expect(page.locator("#health")).to_have_text("healthy")
    page.wait_for_timeout(4500)
    expect(page.locator("section")).to_have_count(9)
    assert page.locator("polyline").count() >= 15
    shot(page, "status")
    page.goto("/docs")
    expect(page.locator("details.operation").first).to_be_visible()
    page.locator("details.operation summary").first.click()
    shot(page, "docs")
