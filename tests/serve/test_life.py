"""Keys, limits, connections that misbehave, signals, TLS."""
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import httpx
import pytest

from serving import API, BINARY, ROOT, SLOW, data_uri, image, user

LONG = {"model": "qvl-tiny", "messages": user("Hello"), "max_tokens": 3500, "ignore_eos": True, "temperature": 0}


def raw(server, data, wait=5):
    """What the server says to these bytes until it closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(wait)
        s.sendall(data)
        got = b""
        try:
            while True:
                piece = s.recv(65536)
                if not piece:
                    break
                got += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return got


def post_bytes(body, more="", path="/v1/chat/completions", close=True):
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{'Connection: close' if close else 'Connection: keep-alive'}\r\n{more}\r\n").encode() + body


# ---- keys ----

def test_keys_guard_every_route(start, keys):
    alice, root = keys("alice"), keys("root", admin=True)
    s = start("--set", f"auth.keys={keys.path}")
    bearer = lambda k: {"Authorization": f"Bearer {k}"}
    open_to_all = {"/", "/docs", "/openapi.json", "/status", "/health", "/ready", "/ws"}
    for path, item in API.document["paths"].items():
        for method in item:
            concrete = path.replace("{model}", "qvl-tiny").replace("{id}", "x")
            r = s.client.request(method.upper(), concrete)
            assert (r.status_code == 401) == (path not in open_to_all), f"{method} {path}: {r.status_code}"
            if r.status_code == 401:
                assert r.headers["www-authenticate"] == "Bearer" and r.json()["error"]["code"] == "invalid_api_key"
    assert s.get("/v1/models", headers=bearer(alice)).status_code == 200
    for wrong in ("sk-wrong", alice[:-1], alice + "a", "x" * 500):
        assert s.get("/v1/models", headers=bearer(wrong)).status_code == 401
    assert s.get("/v1/models", headers={"Authorization": f"Basic {alice}"}).status_code == 401
    assert s.get("/admin/models", headers=bearer(alice)).status_code == 403
    assert s.get("/admin/models", headers=bearer(root)).json()["data"][0]["state"] == "ready"
    assert alice not in s.log_text() and root not in s.log_text()


def test_rates(start, keys):
    slow, single = keys("slow", "rate=60 burst=2"), keys("single", "concurrent=1")
    s = start("--set", f"auth.keys={keys.path}")
    ask = lambda k, **kw: s.post("/v1/chat/completions", {"model": "qvl-tiny", "messages": user("Hi"), "max_tokens": 1}, headers={"Authorization": f"Bearer {k}"}, **kw)
    assert [ask(slow).status_code for _ in range(3)] == [200, 200, 429]
    r = ask(slow)
    assert r.json()["error"]["type"] == "rate_limit_error" and int(r.headers["retry-after"]) >= 1
    with s.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}, headers={"Authorization": f"Bearer {single}"}) as running:
        lines = running.iter_lines()
        next(lines)
        assert ask(single).status_code == 429
    end = time.time() + 5 * SLOW
    while ask(single).status_code != 200:
        assert time.time() < end, "the key's place was not given back"


def test_admin_loads_and_unloads(start, keys):
    root = {"Authorization": f"Bearer {keys('root', admin=True)}"}
    s = start("--set", f"auth.keys={keys.path}")
    r = s.post("/admin/models", {"name": "second", "path": str(ROOT / "examples/models/qvl-tiny")}, headers=root)
    assert r.status_code == 202
    body = {"model": "second", "messages": user("What colour is the sky?"), "max_tokens": 20, "temperature": 0}
    answer = s.post("/v1/chat/completions", body, headers=root)  # waits while it is being loaded
    assert answer.status_code == 200 and answer.json()["model"] == "second"
    assert [m["id"] for m in s.get("/v1/models", headers=root).json()["data"]] == ["qvl-tiny", "second"]
    with s.client.stream("POST", "/v1/chat/completions", json={**LONG, "model": "second", "stream": True, "max_tokens": 800}, headers=root) as running:
        lines = running.iter_lines()
        next(lines)
        assert s.post("/admin/models", {"name": "second", "action": "unload"}, headers=root).status_code == 202
        refused = s.post("/v1/chat/completions", body, headers=root)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert any("[DONE]" in line for line in lines), "a running answer was lost"
    end = time.time() + 10 * SLOW
    while s.get("/v1/models/second", headers=root).json()["state"] != "unloaded":
        assert time.time() < end
        time.sleep(0.1)
    bad = s.post("/admin/models", {"name": "third", "path": "/nonexistent"}, headers=root)
    assert bad.status_code == 202
    answer = s.post("/v1/chat/completions", {**body, "model": "third"}, headers=root)
    assert answer.status_code == 503 and "/nonexistent" in answer.json()["error"]["message"]
    assert s.post("/admin/models", {"name": "fourth"}, headers=root).status_code == 400


def test_cors(start):
    s = start("--set", "auth.cors=https://good.example")
    good, bad = {"Origin": "https://good.example"}, {"Origin": "https://evil.example"}
    assert s.get("/v1/models", headers=good).headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-origin" not in s.get("/v1/models", headers=bad).headers
    r = s.client.options("/v1/chat/completions", headers={**good, "Access-Control-Request-Method": "POST"})
    assert r.status_code == 204 and "POST" in r.headers["access-control-allow-methods"] and "authorization" in r.headers["access-control-allow-headers"]


# ---- limits ----

def test_bodies_that_are_too_large(start):
    s = start("--set", "limits.max_body=64KiB")
    big = {"model": "qvl-tiny", "messages": user("x" * 100_000)}
    for _ in range(3):
        e = s.refused(big, 413)
        assert e["code"] == "body_too_large"
    huge = raw(s, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    assert huge.startswith(b"HTTP/1.1 413")
    assert s.chat(user("Hello"))
    chunked = raw(s, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert chunked.startswith(b"HTTP/1.1 411")


def test_images_beyond_their_limits(start):
    s = start("--set", "limits.max_images=2", "--set", "limits.max_image_pixels=1000", "--set", "limits.max_frames=3")
    assert "limits.max_images" in s.refused({"model": "qvl-tiny", "messages": user(*[image(data_uri())] * 3)})["message"]
    assert "1000" in s.refused({"model": "qvl-tiny", "messages": user(image(data_uri()))})["message"]
    assert "limits.max_frames" in s.refused({"model": "qvl-tiny", "messages": user({"type": "video", "video": [data_uri()] * 4, "fps": 1})})["message"]


def test_a_full_queue_says_when_to_come_back(start, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"models:\n  - name: qvl-tiny\n    path: {ROOT}/examples/models/qvl-tiny\n    options: {{max_requests: 2}}\nlimits:\n  max_queue: 3\n")
    s = start("-c", str(config), model=False)
    codes, waits = [], []

    def one():
        r = httpx.post(s.url + "/v1/chat/completions", json={**LONG, "max_tokens": 1500}, timeout=60 * SLOW)
        codes.append(r.status_code)
        if r.status_code == 429:
            waits.append(int(r.headers["retry-after"]))

    threads = [threading.Thread(target=one) for _ in range(20)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert codes.count(200) >= 5 and set(codes) == {200, 429} and all(w >= 1 for w in waits)
    assert s.metric("qvl_requests_refused_total", 'reason="queue_full"') == len(waits)


def test_deadline(start):
    s = start("--set", "limits.deadline_ms=150")
    r = s.chat(user("Hello"), max_tokens=3500, ignore_eos=True)
    assert r["choices"][0]["finish_reason"] == "length" and r["choices"][0]["stop_reason"] == "deadline" and r["usage"]["completion_tokens"] < 3500


# ---- connections ----

def test_leaving_cancels(server):
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", server.port)) as c:
            c.sendall(post_bytes(json.dumps({**LONG, "stream": stream}).encode()))
            if stream:
                c.recv(1000)
            else:
                time.sleep(0.1)
        assert server.idle(2), f"still running after its client has left (stream {stream})"


def test_a_reader_that_does_not_read(start):
    s = start("--set", "limits.send_buffer=64KiB")
    with socket.create_connection(("127.0.0.1", s.port)) as c:
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        c.sendall(post_bytes(json.dumps({**LONG, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 2000}).encode()))
        end = time.time() + 30 * SLOW
        while not s.logged("slow_reader"):
            assert time.time() < end, "a client that does not read was not cut off"
            time.sleep(0.1)
        assert s.idle()


def test_half_requests_do_not_stop_others(start):
    s = start("--set", "life.idle_s=2")
    open_ones = []
    for i in range(100):
        c = socket.create_connection(("127.0.0.1", s.port))
        c.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + (b"Content-Length: 100\r\n\r\n{" if i % 2 else b""))
        open_ones.append(c)
    assert s.chat(user("Hello"))
    time.sleep(4)
    closed = 0
    for c in open_ones:
        c.settimeout(0.5)
        try:
            while c.recv(1000):
                pass
            closed += 1
        except TimeoutError:
            pass
        except ConnectionResetError:
            closed += 1
        c.close()
    assert closed == 100, f"only {closed} of 100 idle connections were closed"


def test_keep_alive_and_pipelining(server):
    body = json.dumps({"model": "qvl-tiny", "messages": user("Hello"), "max_tokens": 3, "temperature": 0, "stream": True}).encode()
    got = raw(server, post_bytes(body, close=False) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 3)
    assert got.count(b"HTTP/1.1 200") == 3 and b"[DONE]" in got and b"0\r\n\r\nHTTP/1.1 200" in got


def test_silent_streams_are_kept_alive(start):
    s = start("--set", "life.keepalive_s=1")
    # sixteen long answers keep the engine busy; the one behind them is silent for a while
    busy = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(16)]
    for c in busy:
        c.sendall(post_bytes(json.dumps({**LONG, "max_tokens": 2500}).encode()))
    got = raw(s, post_bytes(json.dumps({**LONG, "max_tokens": 2, "stream": True}).encode()), 60)
    [c.close() for c in busy]
    assert b"[DONE]" in got
    # how long it waited depends on the machine; if it waited, it was told
    waited = re.search(rb'"queue_ms":([0-9.]+)', got)
    assert b": alive" in got or not waited or float(waited.group(1)) < 2500


@pytest.mark.parametrize("request_bytes,status", [
    (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"PUT /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (b"GET /v1/../v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    (b"GET /static/../openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    (b"GET /static/../../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (403, 404)),
    (b"GET /static/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (403, 404)),
    (b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
])
def test_odd_requests(server, request_bytes, status):
    got = raw(server, request_bytes, 2)
    assert int(got.split(b" ")[1]) in (status if isinstance(status, tuple) else (status,)), got[:100]


@pytest.mark.parametrize("garbage", [b"\x00" * 1000, b"GET", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00" * 50, b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n",
                                     b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"])
def test_garbage_on_the_wire(server, garbage):
    raw(server, garbage, 1)
    assert server.get("/health").status_code == 200


# ---- the page's parts ----

def test_assets(server):
    page = server.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and page.headers["x-content-type-options"] == "nosniff"
    packed = server.client.get("/static/katex.js")
    assert packed.headers["content-encoding"] == "gzip" and "katex" in packed.text
    plain = server.client.get("/static/katex.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.text == packed.text
    again = server.client.get("/static/katex.js", headers={"If-None-Match": packed.headers["etag"]})
    assert again.status_code == 304 and not again.content
    head = server.client.head("/static/katex.js")
    assert head.status_code == 200 and not head.content
    for path in set(re.findall(r'(?:src|href)="(/[^"]+)"', page.text)):
        assert server.get(path).status_code == 200, path


# ---- signals ----

def test_sigterm_lets_answers_end(start):
    s = start()
    with s.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as r:
        lines = r.iter_lines()
        next(lines)
        s.kill(signal.SIGTERM)
        time.sleep(0.3)
        refused = httpx.post(s.url + "/v1/chat/completions", json=LONG)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx.get(s.url + "/ready").status_code == 503 and httpx.get(s.url + "/health").status_code == 200
        text = "\n".join(lines)
    assert text.rstrip().endswith("[DONE]") and '"finish_reason":"length"' in text
    s.stop()


def test_sigterm_has_a_deadline(start):
    s = start("--set", "life.drain_ms=300")
    with s.client.stream("POST", "/v1/chat/completions", json={**LONG, "n": 16, "stream": True}) as r:
        lines = r.iter_lines()
        next(lines)
        began = time.time()
        s.kill(signal.SIGTERM)
        text = "\n".join(lines)
    s.process.wait(10 * SLOW)
    assert time.time() - began < 8 * SLOW
    assert '"finish_reason":"abort"' in text and text.rstrip().endswith("[DONE]")
    s.stop()


def test_sighup_reads_keys_again(start, keys, tmp_path):
    first = keys("first")
    config = tmp_path / "config.yaml"
    config.write_text(f"auth: {{keys: {keys.path}}}\n")
    s = start("-c", str(config))
    status = lambda k: s.get("/v1/models", headers={"Authorization": f"Bearer {k}"}).status_code

    def reload(event):
        n = len(s.logged(event))
        s.kill(signal.SIGHUP)
        end = time.time() + 5
        while len(s.logged(event)) == n:
            assert time.time() < end
            time.sleep(0.02)

    second = keys("second")
    assert status(second) == 401
    reload("reloaded")
    assert status(first) == 200 == status(second)
    good = keys.path.read_text()
    keys.path.write_text(good + "nonsense\n")
    reload("reload_failed")
    assert status(first) == 200
    keys.path.write_text("\n".join(line for line in good.splitlines() if not line.startswith("first")) + "\n")
    config.write_text(f"auth: {{keys: {keys.path}}}\nlimits: {{max_bodyy: 5}}\n")
    reload("reload_failed")
    assert "max_body" in s.logged("reload_failed")[-1]["reason"] and status(first) == 200
    config.write_text(f"auth: {{keys: {keys.path}}}\nlimits: {{max_body: 2KiB}}\n")
    reload("reloaded")
    assert status(first) == 401 and status(second) == 200
    assert s.client.post("/v1/chat/completions", content=b"x" * 5000, headers={"Authorization": f"Bearer {second}"}).status_code == 413


# ---- TLS ----

@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                        "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"], check=True, capture_output=True)
    return folder


def curl(*args):
    return subprocess.run(["curl", "-sk", "--max-time", "60", *args], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_tls(start, certificates, tmp_path, version):
    for kind in ("pem", "key"):
        shutil.copy(certificates / f"one.{kind}", tmp_path / f"now.{kind}")
    s = start("--set", f"listen.tls.certificate={tmp_path}/now.pem", "--set", f"listen.tls.key={tmp_path}/now.key")
    assert s.url.startswith("https://")
    assert curl(version, s.url + "/health", "-w", "%{http_version}").endswith("2" if version == "--http2" else "1.1")
    body = tmp_path / "body.json"
    ask = user("What do you see?", image(data_uri()))
    body.write_text(json.dumps({"model": "qvl-tiny", "messages": ask, "temperature": 0, "max_tokens": 40}))
    whole = json.loads(curl(version, s.url + "/v1/chat/completions", "-H", "content-type: application/json", "--data-binary", f"@{body}"))
    body.write_text(json.dumps({"model": "qvl-tiny", "messages": ask, "temperature": 0, "max_tokens": 40, "stream": True}))
    streamed = curl(version, "-N", s.url + "/v1/chat/completions", "-H", "content-type: application/json", "--data-binary", f"@{body}")
    pieces = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == whole["choices"][0]["message"]["content"]
    large = tmp_path / "large.json"
    large.write_text(json.dumps({"model": "qvl-tiny", "prompt": "x" * 3_000_000}))
    assert json.loads(curl(version, s.url + "/tokenize", "--data-binary", f"@{large}"))["count"] > 1000
    large.write_text(json.dumps({"model": "qvl-tiny", "prompt": "x" * 300_000}))
    for _ in range(20):  # more than a window of HTTP/2 at a time
        assert json.loads(curl(version, s.url + "/tokenize", "--data-binary", f"@{large}"))["count"] > 1000
    unsized = ["curl", "-sk", version, "--max-time", "20", "-X", "POST", "-T", "-", s.url + "/tokenize"]
    assert json.loads(subprocess.run(unsized, input=b"{}", capture_output=True).stdout)["error"]["code"] == "length_required"
    assert curl(version, s.url + "/static/katex.css", "--compressed").startswith("@font-face")
    assert curl(version, s.url + "/nothing", "-w", "%{http_code}").endswith("404")
    subject = lambda: subprocess.run(f"openssl s_client -connect 127.0.0.1:{s.port} </dev/null 2>/dev/null | openssl x509 -noout -subject", shell=True,
                                     capture_output=True, text=True).stdout
    assert "one" in subject()
    for kind in ("pem", "key"):
        shutil.copy(certificates / f"two.{kind}", tmp_path / f"now.{kind}")
    s.kill(signal.SIGHUP)
    end = time.time() + 5
    while "two" not in subject():
        assert time.time() < end, "the certificate was not read again"
        time.sleep(0.1)


# ---- starting ----

@pytest.mark.parametrize("args,word", [
    (["--port", "99999"], "listen.port"), (["--frobnicate"], "--frobnicate"), (["--set", "limits.max_boddy=5"], "limits.max_body"),
    (["--set", "limits.max_body=5 parsec"], "64MiB"), (["-c", "/nonexistent.yaml"], "/nonexistent.yaml"), (["--set", "listen.tls.key=x"], "certificate"),
    (["--model", "a=b", "--model", "a=c"], "twice"), (["--set", "log.level=loud"], "debug"), (["--port"], "value"),
])
def test_a_wrong_command_line(args, word):
    r = subprocess.run([BINARY, "--check-config", *args], capture_output=True, text=True)
    assert r.returncode == 2 and word in r.stderr


@pytest.mark.parametrize("text,line,word", [
    ("limits:\n  max_boddy: 5\n", 2, "did you mean limits.max_body"), ("limits: 5\n", 1, "mapping"), ("listen:\n  port: many\n", 2, "whole number"),
    ("models:\n  - name: a\n", 2, "path"), ("models:\n  - name: a\n    path: b\n    options: {max_requestss: 4}\n", 4, "max_requestss"),
    ("models:\n  - name: a\n    path: b\n    options: {max_requests: 0}\n", 4, "max_requests"), ("a: [b\n", None, "YAML"), ("log:\n  access: perhaps\n", 2, "true or false"),
    ("auth:\n  cors: 5\n", 2, "list"), ("models:\n  - name: a\n    path: b\n    colour: red\n", 4, "colour"), ("limits:\n  max_queue: -1\n", 2, "range"),
])
def test_a_wrong_file_says_line_and_key(tmp_path, text, line, word):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    r = subprocess.run([BINARY, "--check-config", "-c", path], capture_output=True, text=True)
    assert r.returncode == 2 and word in r.stderr, r.stderr
    assert line is None or f"config.yaml:{line}:" in r.stderr, r.stderr


def test_precedence_and_example(tmp_path):
    example = subprocess.run([BINARY, "--print-config"], capture_output=True, text=True, check=True).stdout
    assert example == (ROOT / "docs" / "config.example.yaml").read_text(), "docs/config.example.yaml is not what qvl-serve --print-config prints"
    assert "fine" in subprocess.run([BINARY, "--check-config", "-c", ROOT / "docs" / "config.example.yaml"], capture_output=True, text=True, check=True).stdout
    path = tmp_path / "config.yaml"
    path.write_text("limits:\n  max_queue: 1\n")
    bad = subprocess.run([BINARY, "--check-config", "-c", path], capture_output=True, text=True, env={"QVL_SERVE_LIMITS_MAX_QUEU": "3"})
    assert bad.returncode == 2 and "QVL_SERVE_LIMITS_MAX_QUEU" in bad.stderr
    bad = subprocess.run([BINARY, "--check-config", "-c", path], capture_output=True, text=True, env={"QVL_SERVE_LIMITS_MAX_QUEUE": "x"})
    assert bad.returncode == 2 and "limits.max_queue" in bad.stderr
    fine = subprocess.run([BINARY, "--check-config", "-c", path, "--set", "limits.max_queue=2"], capture_output=True, text=True, env={"QVL_SERVE_LIMITS_MAX_QUEUE": "3"})
    assert fine.returncode == 0


def test_a_port_that_is_taken(server):
    r = subprocess.run([BINARY, "--port", str(server.port)], capture_output=True, text=True, timeout=30)
    assert r.returncode == 1 and str(server.port) in r.stderr


def test_a_model_that_is_not_there():
    r = subprocess.run([BINARY, "--port", "0", "--model", "x=/nonexistent"], capture_output=True, text=True, timeout=30)
    assert r.returncode == 1 and "/nonexistent" in r.stderr
