#!/usr/bin/env python3
"""Writes jinja_cases.jsonl: the three chat templates rendered by jinja2, set up as transformers sets it up
(transformers/utils/chat_template_utils.py: sandboxed, trim_blocks, lstrip_blocks, its own tojson; null content is empty
text). Cases: those of cases.jsonl for qvl-tiny, and RANDOM random ones for all three. Needs jinja2 3.1; not part of the
tests. cases.jsonl itself is from transformers 5.23; this script checks that it comes out the same.

usage: tests/golden/templates/make.py      (from anywhere)
"""
import json
import os
import random

from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = os.path.dirname(os.path.abspath(__file__))
RANDOM = 220
R = random.Random(20260)
BITS = ["a", "b c", "\n", "\n\n", "<think>", "</think>", "<think>\n", "\n</think>\n\n", "<tool_response>", "</tool_response>",
        "é", "图", "<|im_end|>", " ", "<", "think>", "</", "\t", '"', "\\", "{", "}"]


def path(name):
    return os.path.join(HERE, name)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda v: json.dumps(v, ensure_ascii=False)
    return env


def templates():
    env = environment()
    tiny = json.load(open(path("../../../examples/models/qvl-tiny/chat_template.json"), encoding="utf-8"))["chat_template"]
    read = lambda name: open(path(name), encoding="utf-8").read()
    return {"instruct": env.from_string(read("chat_template_instruct.jinja")),
            "thinking": env.from_string(read("chat_template_thinking.jinja")), "qvl-tiny": env.from_string(tiny)}


def render(template, messages, tools, gen, vid):
    messages = [{**m, "content": ""} if m.get("content", "") is None else m for m in messages]
    return template.render(messages=messages, tools=tools, add_generation_prompt=gen, add_vision_id=vid)


def text(most=5):
    return "".join(R.choice(BITS) for _ in range(R.randrange(most)))


def value(depth=0):
    kinds = [lambda: None, lambda: R.random() < 0.5, lambda: R.randrange(-5, 10 ** R.randrange(1, 30)),
             lambda: R.uniform(-1, 1) * 10 ** R.randrange(-8, 20), text, text,
             lambda: {text(3): value(depth + 1) for _ in range(R.randrange(3))},
             lambda: [value(depth + 1) for _ in range(R.randrange(3))]]
    return R.choice(kinds[:6] if depth > 2 else kinds)()


def part():
    return R.choice([{"type": "text", "text": text()}, {"type": "text", "text": text()}, {"text": text()}, {"type": "image"},
                     {"type": "image", "image": "x"}, {"image": "x"}, {"type": "image_url", "image_url": {"url": "u"}},
                     {"type": "video"}, {"video": ["x"]}, {"type": "video", "text": text()}, {"type": "image", "text": text()},
                     {"type": "text", "text": text(), "image_url": None}])


def content():
    kind = R.randrange(10)
    return text(8) if kind < 5 else None if kind == 5 else [part() for _ in range(R.randrange(4))]


def call():
    f = {"name": text(3), "arguments": R.choice([text(3), value(), {"a": value()}])}
    return R.choice([{"type": "function", "function": f}, {"function": f, "id": "3"}, f, {**f, "function": None}, {**f, "function": {}}])


def message():
    m = {"role": R.choice(["user"] * 3 + ["assistant"] * 3 + ["tool"] * 2 + ["system", "developer"])}
    if R.random() < 0.95:
        m["content"] = content()
    if m["role"] == "user" and R.random() < 0.2:
        m["content"] = "<tool_response>" + text() + "</tool_response>"
    if m["role"] == "assistant" and R.random() < 0.5:
        m["tool_calls"] = R.choice([None, [], [call()], [call(), call()]])
    if m["role"] == "assistant" and R.random() < 0.5:
        m["reasoning_content"] = R.choice([None, "", text(), text()])
    return m


def main():
    all3 = templates()
    with open(path("jinja_cases.jsonl"), "w", encoding="utf-8") as out:
        def write(name, messages, tools, gen, vid, names):
            texts = {k: render(all3[k], messages, tools, gen, vid) for k in names}
            case = {"name": name, "messages": messages, "tools": tools, "add_generation_prompt": gen, "add_vision_id": vid, "text": texts}
            out.write(json.dumps(case, ensure_ascii=False) + "\n")
        for line in open(path("cases.jsonl"), encoding="utf-8"):
            c = json.loads(line)
            args = c["messages"], c["tools"], c["options"].get("add_generation_prompt", False), c["options"].get("add_vision_id", False)
            for k in ("instruct", "thinking"):
                assert render(all3[k], *args) == c[k]["text"], c["name"]
            write(c["name"], *args, ["qvl-tiny"])
        for i in range(RANDOM):
            messages = [message() for _ in range(R.randrange(1, 6))]
            if R.random() < 0.3:
                messages[0]["role"] = "system"
            tools = R.choice([None, None, [], [{"name": text(), "p": value()} for _ in range(R.randrange(3))]])
            write("random %d" % i, messages, tools, R.random() < 0.5, R.random() < 0.5, list(all3))


main()
