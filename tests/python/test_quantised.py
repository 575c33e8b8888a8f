"""test_quantised - what weights of 8 and 4 bits cost in accuracy.

The bundled model: greedy answers of its evaluation set, scored as its card does (the expected answer to the letter), and the
divergence of the next token's distribution, KL(f32 || dtype), at every token as long as the answers agree. The random
checkpoints: the same divergence at every position of prompts with pictures. The random
checkpoints have no redundancy and logits with a standard deviation of 4 to 12, so the same rounding costs them far more than it
costs a trained model. The figures are in docs/performance.md.
"""
import collections

import numpy as np
import pytest

import qvl
from support import CHECKPOINTS, GOLDENS, drain, golden_prompt, manifest
from test_tiny import items, with_paths

# dtype: mean KL on the bundled model, how many points of accuracy may be lost, mean KL on the random checkpoints
BOUNDS = {"bf16": (1e-5, 0.01, 4e-3), "int8": (1e-4, 0.01, 0.08), "int4": (2e-3, 0.04, 4.0)}
# the same with a type for each matrix (qvl.quantize): of these small checkpoints' weights int4 takes 7.3 to 8.1 bits
BOUNDS |= {"bits 6": (1.2e-3, 0.03, 3.0), "bits 7": (7e-4, 0.02, 2.5)}


@pytest.fixture(scope="module")
def quantised(load, tmp_path_factory):
    """quantised(checkpoint, dtype or "bits N")"""
    known = {}

    def get(name, dtype):
        if not dtype.startswith("bits "):
            return load(name, dtype=dtype)
        if (name, dtype) not in known:
            out = tmp_path_factory.mktemp("mixed") / "model"
            qvl.quantize(CHECKPOINTS[name], out, bits=float(dtype[5:]))
            known[name, dtype] = qvl.Model(out)
        return known[name, dtype]

    return get


def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(exact, got):
    a, b = log_softmax(exact), log_softmax(got)
    return (np.exp(a) * (a - b)).sum(axis=-1)


@pytest.fixture(scope="module")
def answers(quantised):
    known, some = {}, items()

    def get(dtype):
        if dtype not in known:
            model = quantised("qvl-tiny", dtype)
            engine = qvl.Engine(model, max_requests=16, max_context=min(2048, model.info["max_context"]))
            sent = [engine.submit(model.prompt(with_paths(i["messages"]), video_layout="nested"), temperature=0, max_tokens=80,
                                  return_logits=True) for i in some]
            done = drain(engine)
            known[dtype] = [done[s] for s in sent]
        return known[dtype]

    return get


@pytest.mark.parametrize("dtype", BOUNDS)
def test_bundled_model(answers, dtype, say):
    kl, right, tasks = [], collections.Counter(), collections.Counter()
    for item, exact, got in zip(items(), answers("f32"), answers(dtype)):
        tasks[item["task"]] += 1
        for name, a in (("f32", exact), (dtype, got)):
            right[name, item["task"]] += a.text.strip() == item["expected"].strip()
        for a, b, x, y in zip(exact.logits, got.logits, exact.tokens, got.tokens):
            kl.append(divergence(a, b))
            if x != y:
                break
    total = {d: sum(right[d, t] for t in tasks) / sum(tasks.values()) for d in ("f32", dtype)}
    lost = {t: f"{right['f32', t]} -> {right[dtype, t]} of {n}" for t, n in tasks.items() if right["f32", t] != right[dtype, t]}
    say(f"{dtype}: KL {np.mean(kl):.2e} (mean of {len(kl)} tokens), right {total[dtype]:.1%} (f32 {total['f32']:.1%}); tasks that change: {lost}")
    bound, points, _ = BOUNDS[dtype]
    assert 0 < np.mean(kl) <= bound and total[dtype] >= total["f32"] - points


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", [n for n in GOLDENS if n != "moe"])
def test_random_checkpoints(quantised, name, dtype, say):
    exact, model, kl = quantised(name, "f32"), quantised(name, dtype), []
    for about in manifest(name)["cases"].values():
        kl.append(divergence(exact.logits(golden_prompt(exact, about)), model.logits(golden_prompt(model, about))))
    mean = float(np.mean(np.concatenate(kl)))
    say(f"{name}, {dtype}: KL {mean:.2e} (mean of {sum(map(len, kl))} positions)")
    assert 0 < mean <= BOUNDS[dtype][2]


def test_what_the_model_says_of_itself(load):
    sizes = {d: load("untied", dtype=d).info for d in ("bf16", "int8", "int4")}
    for d, info in sizes.items():
        assert info["dtype"] == d
    assert sizes["int4"]["weight_bytes"] < sizes["int8"]["weight_bytes"] < sizes["bf16"]["weight_bytes"] * 0.65
    assert len({load("untied", dtype=d).info["weights_id"] for d in sizes}) == 3
