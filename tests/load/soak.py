"""Many streams with pictures for a long time: nothing fails, every answer is the one the prompt gets alone, memory is flat.
Then clients that leave at random moments: nothing is left running. Run: make check-load (10 minutes)
"""
import argparse
import asyncio
import itertools
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from serving import Server, data_uri, image, user  # noqa: E402

QUESTIONS = ["What do you see?", "How many shapes are there?", "What colour is the background?", "What is the largest shape?", "图片里有什么？", "Describe the picture.",
             "Is there a star?", "Locate every shape, report the bbox coordinates in JSON format."]
PICTURES = ["shapes.png", "four.jpg", "three.webp", "heart.jpg", "cross.png"]


def body(question, picture, **kw):
    return {"model": "qvl-tiny", "messages": user(question, image(data_uri(picture))), "temperature": 0, "max_tokens": 48, **kw}


async def ask(client, request):
    text, done = "", False
    async with client.stream("POST", "/v1/chat/completions", json={**request, "stream": True}) as r:
        if r.status_code != 200:
            raise RuntimeError(f"status {r.status_code}: {(await r.aread())[:200]}")
        async for line in r.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                for c in json.loads(line[6:]).get("choices", ()):
                    text += c["delta"].get("content") or ""
    if not done:
        raise RuntimeError("the stream was cut off")
    return text


async def memory(client):
    text = (await client.get("/metrics")).text
    return int(float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.M).group(1)))


async def soak(url, streams, minutes, warm):
    limits = httpx.Limits(max_connections=streams + 10, max_keepalive_connections=streams + 10)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        prompts = [body(q, p) for q, p in itertools.product(QUESTIONS, PICTURES)]
        alone = [await ask(client, p) for p in prompts]
        end, answers, faults, samples = time.time() + minutes * 60, 0, [], []

        async def worker(number):
            nonlocal answers
            r = random.Random(number)
            while time.time() < end and len(faults) < 10:
                i = r.randrange(len(prompts))
                try:
                    got = await ask(client, prompts[i])
                    if got != alone[i]:
                        faults.append(f"{prompts[i]['messages'][0]['content'][0]['text']}: {got!r} is not {alone[i]!r}")
                except Exception as e:  # noqa: BLE001: every kind is a fault of the run
                    faults.append(repr(e))
                answers += 1

        async def watch():
            while time.time() < end:
                await asyncio.sleep(0.25)
                samples.append((time.time(), await memory(client)))

        began = time.time()
        await asyncio.gather(watch(), *(worker(i) for i in range(streams)))
        steady = [m for t, m in samples if t - began > warm]
        middle = statistics.median(steady)
        # A single reading holds whatever bodies are on their way; whether memory creeps shows in the medians of the minutes.
        minutes_of = [[m for t, m in samples if began + warm + 60 * i <= t < began + warm + 60 * (i + 1)] for i in range(max(1, int(minutes) - 1))]
        spread = max(abs(statistics.median(m) - middle) for m in minutes_of if m) / middle
        single = max(abs(m - middle) for m in steady) / middle
        print(f"{streams} streams, {minutes} min: {answers} answers ({answers / (time.time() - began):.0f}/s), {len(faults)} faults; "
              f"memory {middle / 2**20:.1f} MiB, minutes ±{spread:.1%}, single readings ±{single:.1%} after {warm} s")
        return faults, spread


async def leave(url, count):
    """Clients that connect, ask, and go at a random moment."""
    async def one(r):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        data = json.dumps(body(r.choice(QUESTIONS), r.choice(PICTURES), stream=True, max_tokens=2000, ignore_eos=True)).encode()
        writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[: r.randrange(len(data)) if r.random() < 0.2 else None])
        await asyncio.sleep(r.random() * 0.5)
        writer.transport.abort()
        del reader

    for _ in range(count // 50):
        await asyncio.gather(*(one(random.Random(time.time_ns())) for _ in range(50)))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--streams", type=int, default=200)
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--warm", type=float, default=60, help="seconds before memory is judged")
    p.add_argument("--leaving", type=int, default=1000)
    a = p.parse_args()
    s = Server("--set", "log.access=false", "--set", "log.level=warn")
    faults, spread = asyncio.run(soak(s.url, a.streams, a.minutes, a.warm))
    for f in faults:
        print("fault:", f)
    asyncio.run(leave(s.url, a.leaving))
    clean = s.idle(10)
    print(f"{a.leaving} clients left at random moments: {'nothing' if clean else 'SOMETHING'} is running")
    print("and it still answers:", s.text(user("What do you see?", image(data_uri()))))
    s.stop()
    return 0 if not faults and spread <= 0.02 and clean else 1


if __name__ == "__main__":
    sys.exit(main())
