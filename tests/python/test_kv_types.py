"""test_kv_types - what a smaller type of cached keys and values costs in accuracy, on the bundled model.

Greedy answers to pictures, with exact arithmetic everywhere else: logits are compared with those of an f32 cache as long as the
tokens agree. The bounds are what docs/engine.md states.
"""
import numpy as np
import pytest

import qvl
from support import drain
from test_tiny import items, with_paths

# kv_dtype: largest mean of rms(difference) / std(logits), smallest share of answers that stay the same to the last token
BOUNDS = {"f16": (0.0004, 0.99), "bf16": (0.004, 0.95), "int8": (0.008, 0.93)}


@pytest.fixture(scope="module")
def answers(tiny):
    known = {}
    some = items()[::4]

    def get(kv):
        if kv not in known:
            engine = qvl.Engine(tiny, max_requests=16, max_context=2048, kv_dtype=kv)
            assert engine.stats["kv"]["dtype"] == kv
            sent = [engine.submit(tiny.prompt(with_paths(i["messages"]), video_layout="nested"), temperature=0,
                                  max_tokens=len(i["answer_ids"]), return_logits=True) for i in some]
            done = drain(engine)
            known[kv] = [done[s] for s in sent]
        return known[kv]

    return get


@pytest.mark.parametrize("kv", BOUNDS)
def test_accuracy(answers, kv, say):
    errors, same = [], 0
    for exact, got in zip(answers("f32"), answers(kv)):
        same += exact.tokens == got.tokens
        for i, (a, b) in enumerate(zip(exact.logits, got.logits)):
            errors.append(np.sqrt(np.mean((a - b) ** 2)) / a.std())
            if exact.tokens[i] != got.tokens[i]:
                break
    mean, share = np.mean(errors), same / len(answers(kv))
    say(f"kv_dtype {kv}: rms error of the logits {mean:.5f} of their std (mean of {len(errors)} tokens), {share:.1%} of answers the same")
    assert 0 < mean <= BOUNDS[kv][0] and share >= BOUNDS[kv][1]


def test_memory(tiny):
    plans = {kv: tiny.plan(max_context=4096, kv_blocks=128, kv_dtype=kv) for kv in ("f32", "bf16", "f16", "int8")}
    bytes_of = {kv: p["kv"] for kv, p in plans.items()}
    assert bytes_of["bf16"] == bytes_of["f16"] == bytes_of["f32"] / 2
    assert bytes_of["bf16"] / 2 < bytes_of["int8"] < bytes_of["bf16"] * 0.6  # a scale for each token and head
    engine = qvl.Engine(tiny, max_context=4096, kv_blocks=128, kv_dtype="int8")
    memory = engine.stats["memory"]
    assert [memory[k] for k in ("weights", "kv", "workspace", "vision")] == [plans["int8"][k] for k in ("weights", "kv", "workspace", "vision")]
