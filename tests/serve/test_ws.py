"""/ws: many requests over one WebSocket."""
import asyncio
import json

import pytest
import websockets

from serving import IMAGES, data_uri, image, user


def run(server, talk, **kw):
    async def main():
        async with websockets.connect(server.url.replace("http", "ws", 1) + "/ws", max_size=None, **kw) as ws:
            return await asyncio.wait_for(talk(ws), 60)

    return asyncio.run(main())


def ask(id, messages, **kw):
    return json.dumps({"type": "chat", "id": id, "request": {"model": "qvl-tiny", "messages": messages, "temperature": 0, "max_tokens": 64, **kw}})


async def collect(ws, ids):
    """All messages of these ids until each is done or has failed."""
    got, open_ = {i: [] for i in ids}, set(ids)
    while open_:
        m = json.loads(await ws.recv())
        got[m["id"]].append(m)
        if m["type"] in ("done", "error") and (m["type"] == "done" or not any(x["type"] == "chunk" for x in got[m["id"]])):
            open_.discard(m["id"])
    return got


def text_of(messages):
    return "".join(c["delta"].get("content") or "" for m in messages if m["type"] == "chunk" for c in m["chunk"]["choices"])


def test_several_at_once(server):
    questions = {"a": user("Hello"), 7: user("What do you see?", image(data_uri())), "c": user("What colour is the sky?")}

    async def talk(ws):
        for id, messages in questions.items():
            await ws.send(ask(id, messages))
        return await collect(ws, list(questions))

    got = run(server, talk)
    for id, messages in questions.items():
        assert text_of(got[id]) == server.text(messages)
        assert got[id][-1] == {"type": "done", "id": id}
        assert got[id][-2]["chunk"]["usage"]["completion_tokens"] > 0


def test_cancel(server):
    async def talk(ws):
        await ws.send(ask("long", user("Hello"), max_tokens=3000, ignore_eos=True))
        await ws.recv()
        await ws.send(json.dumps({"type": "cancel", "id": "long"}))
        return await collect(ws, ["long"])

    got = run(server, talk)["long"]
    reasons = [c["finish_reason"] for m in got if m["type"] == "chunk" for c in m["chunk"]["choices"] if c["finish_reason"]]
    assert reasons == ["abort"] and server.idle()


def test_an_image_frame_becomes_a_handle(server):
    async def talk(ws):
        await ws.send((IMAGES / "shapes.png").read_bytes())
        m = json.loads(await ws.recv())
        assert m["type"] == "image"
        await ws.send(ask(1, user("What do you see?", image(m["image"]["id"]))))
        return await collect(ws, [1])

    assert text_of(run(server, talk)[1]) == server.text(user("What do you see?", image(data_uri())))


@pytest.mark.parametrize("frame,word", [
    ("{", "JSON"), ("[]", "object"), ("{}", "type"), ('{"type":"dance"}', "dance"), ('{"type":"chat","request":{}}', "id"),
    ('{"type":"chat","id":[1],"request":{}}', "id"), ('{"type":"chat","id":1}', "request"), ('{"type":"cancel","id":9}', "running"),
    ('{"type":"chat","id":1,"request":{"messages":5}}', "messages"), (b"not an image", "image"),
])
def test_a_bad_frame_is_answered_and_the_connection_lives(server, frame, word):
    async def talk(ws):
        await ws.send(frame)
        error = json.loads(await ws.recv())
        await ws.send('{"type":"ping","id":"p"}')
        return error, json.loads(await ws.recv())

    error, pong = run(server, talk)
    assert error["type"] == "error" and word in error["error"]["message"]
    assert pong == {"type": "pong", "id": "p"}


def test_the_same_id_twice(server):
    async def talk(ws):
        await ws.send(ask("x", user("Hello"), max_tokens=2000, ignore_eos=True))
        await ws.send(ask("x", user("Hello")))
        while True:
            m = json.loads(await ws.recv())
            if m["type"] == "error":
                return m

    assert run(server, talk)["error"]["code"] == "request_exists"
    assert server.idle()


def test_leaving_cancels(server):
    async def talk(ws):
        for i in range(5):
            await ws.send(ask(i, user("Hello"), max_tokens=3000, ignore_eos=True))
        await ws.recv()

    run(server, talk)
    assert server.idle()


def test_only_its_own_pages_may_connect(server):
    async def talk(ws):
        return True

    assert run(server, talk, origin=server.url)
    with pytest.raises(websockets.InvalidHandshake):
        run(server, talk, origin="https://evil.example")


def test_keys(start, keys):
    good = keys("alice")
    s = start("--set", f"auth.keys={keys.path}")

    async def with_message(ws):
        await ws.send(json.dumps({"type": "auth", "key": good}))
        assert json.loads(await ws.recv())["type"] == "ready"
        await ws.send(ask(1, user("Hello")))
        return await collect(ws, [1])

    async def just_ask(ws):
        await ws.send(ask(1, user("Hello")))
        return await collect(ws, [1])

    async def wrong(ws):
        await ws.send(json.dumps({"type": "auth", "key": "sk-wrong"}))
        await ws.recv()

    assert text_of(run(s, with_message)[1])
    assert text_of(run(s, just_ask, extra_headers={"Authorization": f"Bearer {good}"})[1])
    for talk in (just_ask, wrong):
        with pytest.raises(websockets.ConnectionClosed) as e:
            run(s, talk)
        assert e.value.code == 1008
