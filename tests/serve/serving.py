"""A real qvl-serve for the tests.

Job:        start servers, judge all their traffic by openapi.json, stop them, and say what their log said.
Input:      build/$CONFIG/qvl-serve (or QVL_TEST_SERVE).
Output:     Server objects: .url, .client (httpx), .get/.post, .chat, .stream, .metrics, .restart-free.
Invariants: a server that dies, or whose log holds a sanitizer's report, fails the test that used it.
"""
import base64
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import pytest

import contract

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("QVL_TEST_SERVE") or ROOT / "build" / os.environ.get("CONFIG", "release") / "qvl-serve")
IMAGES = ROOT / "examples" / "images"
SLOW = 10 if "asan" in str(BINARY) or "tsan" in str(BINARY) else 1
API = contract.Contract()


def data_uri(name="shapes.png"):
    kind = {"png": "png", "jpg": "jpeg", "webp": "webp"}[name.rsplit(".", 1)[1]]
    return f"data:image/{kind};base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


class Server:
    def __init__(self, *args, env=None, model=True, ready=True):
        self.log = tempfile.NamedTemporaryFile(prefix="qvl-serve-", suffix=".log", delete=False)
        command = [str(BINARY), "--port", "0", "--host", "127.0.0.1"]
        command += ["--model", f"qvl-tiny={ROOT / 'examples/models/qvl-tiny'}"] if model else []
        self.process = subprocess.Popen(command + list(args), stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **(env or {})}, text=True)
        line = self.process.stdout.readline() if ready else ""
        match = re.search(r"https?://\S+", line)
        if ready and not match:
            self.process.wait(10)
            raise AssertionError(f"qvl-serve did not start: {line!r}\n{self.log_text()[-2000:]}")
        self.url = match.group(0) if match else None
        self.port = int(self.url.rsplit(":", 1)[1]) if match else None
        if match:
            self.client = httpx.Client(base_url=self.url, timeout=60 * SLOW, verify=False, event_hooks={"response": [self.judge]})

    def judge(self, r):
        path = r.request.url.path
        if path.startswith("/static/") or path == "/status" or r.request.method in ("HEAD", "OPTIONS") or r.status_code in (304, 405):
            return
        if r.status_code == 404 and json.loads(r.read())["error"]["code"] == "route_not_found":
            return
        if not r.headers.get("content-type", "").startswith("text/event-stream"):
            API.check_response(r.request.method, path, r.status_code, r.headers.get("content-type"), r.read())

    def get(self, path, **kw):
        return self.client.get(path, **kw)

    def post(self, path, body, **kw):
        return self.client.post(path, json=body, **kw)

    def chat(self, messages, **kw):
        body = {"model": "qvl-tiny", "messages": messages, "temperature": 0, "max_tokens": 64, **kw}
        API.check_request("POST", "/v1/chat/completions", body)
        r = self.post("/v1/chat/completions", body)
        assert r.status_code == 200, r.text
        return r.json()

    def text(self, messages, **kw):
        return self.chat(messages, **kw)["choices"][0]["message"]["content"]

    def stream(self, messages, route="/v1/chat/completions", **kw):
        """All chunks of a stream, after it was judged."""
        body = {"model": "qvl-tiny", "messages": messages, "temperature": 0, "max_tokens": 64, "stream": True, **kw}
        return self.events(route, body)

    def events(self, route, body):
        r = self.post(route, body)
        assert r.status_code == 200, r.text
        assert r.headers["content-type"].startswith("text/event-stream")
        API.check_response("POST", route, 200, r.headers["content-type"], r.content)
        return [json.loads(line[6:]) for line in r.text.splitlines() if line.startswith("data: {")]

    def refused(self, body, status=400, route="/v1/chat/completions", **kw):
        r = self.post(route, body, **kw)
        assert r.status_code == status, r.text
        return r.json()["error"]

    def metric(self, name, labels=""):
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + "{" if "{" not in name else name) or line.startswith(name + " "):
                if labels in line:
                    return float(line.rsplit(" ", 1)[1])
        return None

    def idle(self, seconds=5):
        """Waits until no request runs or waits."""
        end = time.time() + seconds * SLOW
        while time.time() < end:
            if self.metric("qvl_num_requests_running") == 0 and self.metric("qvl_num_requests_waiting") == 0:
                return True
            time.sleep(0.05)
        return False

    def log_text(self):
        return Path(self.log.name).read_text(errors="replace")

    def logged(self, event):
        return [e for e in (json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")) if e["event"] == event]

    def kill(self, number):
        self.process.send_signal(number)

    def stop(self, number=signal.SIGTERM, seconds=20):
        if self.process.poll() is None:
            self.kill(number)
        try:
            code = self.process.wait(seconds * SLOW)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("qvl-serve did not end\n" + self.log_text()[-2000:])
        text = self.log_text()
        os.unlink(self.log.name)
        assert code == 0, f"qvl-serve ended with {code}\n{text[-3000:]}"
        assert "ERROR: " not in text and "WARNING: ThreadSanitizer" not in text and "runtime error" not in text, text[-5000:]


@pytest.fixture(scope="session")
def server():
    s = Server()
    yield s
    s.stop()


@pytest.fixture
def start():
    """A function that starts further servers; all of them end with the test."""
    servers = []

    def make(*args, **kw):
        servers.append(Server(*args, **kw))
        return servers[-1]

    yield make
    for s in servers:
        if s.process.returncode is None:
            s.stop()


@pytest.fixture
def keys(tmp_path):
    """A key file and a function that makes keys into it: make("alice", "rate=60") -> the client's key."""
    path = tmp_path / "keys"
    path.write_text("# keys of the tests\n")

    def make(name, more="", admin=False):
        out = subprocess.run([str(BINARY), "--new-admin-key" if admin else "--new-key", name], capture_output=True, text=True, check=True).stdout.splitlines()
        with path.open("a") as f:
            f.write(out[-1] + (" " + more if more else "") + "\n")
        return out[0]

    make.path = path
    return make
