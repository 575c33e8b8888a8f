"""test_tiny - the bundled model answers its evaluation set with exactly the tokens that transformers gives (fp32, greedy).

The set may be rewritten with the weights: nothing about its content is assumed. Where the two best logits are closer than
2e-4 (by which a float64 run of the same model differs from transformers' fp32) a differing token is a coin toss, counted and
printed; anywhere else it is a failure.
"""
import copy
import json

import qvl
from support import TINY, drain

TOSS = 2e-4


def items():
    with open(TINY / "eval" / "items.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def with_paths(messages):
    messages = copy.deepcopy(messages)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = TINY / "eval" / part["image"]
            if part["type"] == "video":  # the set's frames are all to be used
                part.update(video=[TINY / "eval" / f for f in part["video"]], do_sample_frames=False)
    return messages


def test_eval_set(tiny, say):
    wanted, engine = {}, qvl.Engine(tiny, max_requests=16, max_context=min(2048, tiny.info["max_context"]))
    for item in items():
        prompt = tiny.prompt(with_paths(item["messages"]), video_layout="nested")
        assert prompt.tokens == item["prompt_ids"], item["id"]
        wanted[engine.submit(prompt, temperature=0, max_tokens=len(item["answer_ids"]), logprobs=2)] = item
    answers = drain(engine)
    assert len(answers) == len(wanted) > 0
    tosses, wrong = [], []
    for request, item in wanted.items():
        got, want = answers[request], item["answer_ids"]
        at = next((i for i, (a, b) in enumerate(zip(got.tokens, want)) if a != b), None)
        if at is None:
            if len(got.tokens) != len(want):
                wrong.append((item["id"], "length", got.tokens, want))
            continue
        (_, best), (_, second) = got.events[at].top_logprobs
        (tosses if best - second < TOSS else wrong).append((item["id"], at, best - second))
    small = sum(item["margin"] < TOSS for item in wanted.values())
    say(f"{len(wanted)} items, {sum(len(i['answer_ids']) for i in wanted.values())} tokens: {len(wrong)} wrong, "
        f"{len(tosses)} differ at a margin below {TOSS} ({small} items have one)")
    assert not wrong
    assert len(tosses) <= small, tosses


def test_text_of_answers(tiny):
    """The text is the tokens' text, and the set's stored answer."""
    for item in items()[::40]:
        got = tiny.chat(with_paths(item["messages"]), temperature=0, max_tokens=300, video_layout="nested")
        if got.tokens == item["answer_ids"]:
            assert got.text == item["answer"] == tiny.decode_tokens(got.tokens, skip_special=True)
            assert got.finish_reason == "stop" and got.reasoning is None
