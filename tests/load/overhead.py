"""What qvl-serve costs beside a bare libwebsockets handler, and what idle connections weigh. Run: make check-load

wrk asks both servers in turn for the same number of bytes; the ratio of the medians of requests a second is the result.
"""
import argparse
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from serving import ROOT, Server  # noqa: E402


def wrk(url, body=None, seconds=3):
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as f:
        if body is not None:
            f.write(f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = {json.dumps(body)!r}\n")
        f.flush()
        out = subprocess.run(["wrk", "-t1", "-c16", f"-d{seconds}s", "-s", f.name, url], capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in out, out
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out).group(1))


def rss(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)) * 1024


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def compare(server, name, path, body, rounds):
    r = server.get(path) if body is None else server.post(path, body)
    size = len(r.content)
    port = free_port()
    bare = subprocess.Popen([ROOT / "build/release/tests/load/bare", str(port), str(size)], stdout=subprocess.PIPE, text=True)
    try:
        assert bare.stdout.readline(), "the bare handler did not start"
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(wrk(server.url + path, body))
            theirs.append(wrk(f"http://127.0.0.1:{port}{path}", body))
    finally:
        bare.kill()
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{name:34} qvl-serve {a:8.0f} requests/s, bare {b:8.0f}, {b / a:.2f}x ({size} bytes of answer)")
    return b / a


def idle_sockets(count):
    """Memory of so many idle WebSockets, and of as many connections that have asked for nothing yet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 500), hard))
    s = Server("--set", f"limits.max_connections={count + 100}", "--set", "life.idle_s=600", "--set", "log.access=false")
    before, held = rss(s.process.pid), []
    began = time.time()
    for _ in range(count):
        c = socket.create_connection(("127.0.0.1", s.port))
        c.sendall(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
        assert b"101" in c.recv(1024)
        held.append(c)
    after = rss(s.process.pid)
    open_ones = s.metric("qvl_connections", 'kind="ws"')
    print(f"{open_ones:.0f} idle WebSockets opened in {time.time() - began:.1f} s: {after / 1e6:.0f} MB in all, {(after - before) / count / 1e3:.1f} kB each")
    for c in held:
        c.close()
    s.stop()
    assert open_ones == count and after < 500e6


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--sockets", type=int, default=10000)
    p.add_argument("--most", type=float, default=1.3, help="the ratio that must hold")
    a = p.parse_args()
    idle_sockets(a.sockets)
    s = Server("--set", "log.access=false")
    ratios = [compare(s, "GET /health", "/health", None, a.rounds), compare(s, "GET /v1/models", "/v1/models", None, a.rounds),
              compare(s, "POST /tokenize, one word", "/tokenize", {"model": "qvl-tiny", "prompt": "Hello"}, a.rounds)]
    one = {"model": "qvl-tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    compare(s, "POST /v1/chat/completions, 1 token", "/v1/chat/completions", one, a.rounds)
    s.stop()
    return 0 if max(ratios) <= a.most else 1


if __name__ == "__main__":
    sys.exit(main())
