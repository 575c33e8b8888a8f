"""test_engine - what an engine promises beyond one answer: choices, priorities, deadlines, limits, shared pictures, guesses.

That none of it changes an answer is test_invariance's and tests/engine/test_engine.c's business.
"""
import time

import numpy as np
import pytest

import qvl
from support import GOLDENS, drain, image_path, run, user

LOOK = user(image_path("photo_320x240.jpg"), "Describe this image.")


@pytest.fixture(scope="module")
def model(load):
    return load("tied", dtype="f32", threads=2)


def ends(engine):
    """(request, choice, finish reason) in the order of their ends, and all events by (request, choice)."""
    order, events = [], {}
    while engine.active:
        for e in engine.step(timeout=60):
            assert e.error is None, e
            events.setdefault((e.request, e.choice), []).append(e)
            if e.type == "finished":
                order.append((e.request, e.choice, e.finish_reason))
    return order, events


def tokens(events):
    return [e.token for e in events if e.type == "token"]


def test_choices(model):
    """Choice i is what seed + i alone gives; the prompt is computed and the picture encoded once."""
    engine, prompt = qvl.Engine(model, max_requests=8, max_context=512), model.prompt(LOOK)
    options = dict(temperature=1.0, max_tokens=12, ignore_eos=True)
    request = engine.submit(prompt, n=4, seed=100, **options)
    _, events = ends(engine)
    assert sorted(events) == [(request, i) for i in range(4)]
    answers = [tokens(events[request, i]) for i in range(4)]
    assert answers == [run(model, prompt, seed=100 + i, **options).tokens for i in range(4)]
    assert len({tuple(a) for a in answers}) == 4
    assert engine.stats["images_encoded"] == 1
    assert engine.stats["prompt_tokens"] == len(prompt) + 3  # the others: their last token, for its logits
    assert [events[request, i][-1].usage["cached_tokens"] for i in range(4)] == [0] + 3 * [len(prompt) - 1]
    with pytest.raises(qvl.Error, match="option n"):
        model.chat(LOOK, n=2)


def test_cancel_ends_all_choices(model):
    engine = qvl.Engine(model, max_requests=2, max_context=512)
    request = engine.submit(model.prompt(user("Hi")), n=5, max_tokens=100, ignore_eos=True)
    engine.step(timeout=0)
    assert engine.cancel(request) and not engine.cancel(request)
    order, _ = ends(engine)
    assert sorted(order) == [(request, i, "cancelled") for i in range(5)]
    assert engine.stats["kv"]["blocks_used"] == 0


def test_prompt_logprobs(model):
    """The log-softmax of the teacher-forced logits, for a picture's tokens too; whatever was cached before."""
    prompt = model.prompt(LOOK)
    logits = model.logits(prompt).astype(np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    engine = qvl.Engine(model, max_requests=2, max_context=512)
    drain(engine, {engine.submit(prompt, max_tokens=1)})
    for batched in (512, 7):
        engine.configure(max_batched_tokens=batched)
        request = engine.submit(prompt, max_tokens=2, prompt_logprobs=3, temperature=0, n=2)
        _, events = ends(engine)
        first, second = events[request, 0], events[request, 1]
        seen = [e for e in first if e.type == "prompt"]
        assert [e.token for e in seen] == prompt.tokens
        assert seen[0].logprob is None and first.index(seen[-1]) == len(prompt) - 1  # all before the answer
        assert not any(e.type == "prompt" for e in second)
        for i, e in enumerate(seen[1:]):
            assert abs(e.logprob - logp[i, e.token]) < 1e-3
            best = np.argsort(-logp[i, :], kind="stable")[:3]
            assert np.allclose([p for _, p in e.top_logprobs], logp[i, best], atol=1e-3)
            assert e.top_logprobs[0][0] == best[0] or abs(logp[i, best[0]] - logp[i, best[1]]) < 1e-4
    one = model.chat(LOOK, max_tokens=1, prompt_logprobs=0)
    assert one.prompt_logprobs[0] is None and len(one.prompt_logprobs) == len(prompt)


def test_priority(model):
    """Lower goes first, and takes the place of what is higher; arrival decides among equals."""
    engine = qvl.Engine(model, max_requests=1, max_context=256)
    options = dict(max_tokens=20, ignore_eos=True, temperature=0)
    alone = run(model, model.prompt(user("low")), **options).tokens
    low = engine.submit(model.prompt(user("low")), priority=5, **options)
    for _ in range(3):
        engine.step(timeout=0)
    middle = [engine.submit(model.prompt(user(f"middle {i}")), **options) for i in range(2)]
    high = engine.submit(model.prompt(user("high")), priority=-1, **options)
    order, events = ends(engine)
    assert [o[0] for o in order] == [high, *middle, low]
    assert engine.stats["preempted"] == 1
    assert tokens(events[low, 0]) == alone[3:] or tokens(events[low, 0]) == alone[2:]  # the first ones came before


def test_deadline(model):
    engine = qvl.Engine(model, max_requests=1, max_context=4096, kv_blocks=128)
    slow = engine.submit(model.prompt(user("Hi")), max_tokens=3000, ignore_eos=True, deadline_ms=150)
    never = engine.submit(model.prompt(user("Ho")), max_tokens=5, deadline_ms=1)
    start = time.monotonic()
    order, events = ends(engine)
    assert time.monotonic() - start < 5
    assert sorted(order) == [(slow, 0, "deadline"), (never, 0, "deadline")]
    assert 0 < len(tokens(events[slow, 0])) < 3000 and not tokens(events[never, 0])
    assert engine.stats["kv"]["blocks_used"] == 0


def test_configure(model):
    engine = qvl.Engine(model, max_requests=4, max_context=256, max_batched_tokens=64)
    for _ in range(4):
        engine.submit(model.prompt(user("Hello there")), max_tokens=30, ignore_eos=True)
    engine.configure(max_requests=2)
    engine.step(timeout=0)
    assert engine.stats["requests"]["running"] == 2 and engine.stats["max_requests"] == 2
    engine.configure(max_requests=4, max_batched_tokens=3, step_ms=0)
    engine.step(timeout=0)
    before = engine.stats
    engine.step(timeout=0)
    assert engine.stats["rows"] - before["rows"] <= 3 and engine.stats["requests"]["running"] == 4
    for wrong, why in (({"max_requests": 5}, "memory for"), ({"max_batched_tokens": 65}, "memory for"), ({"max_context": 10}, "cannot change"),
                       ({"kv_blocks": 10}, "cannot change"), ({"kv_dtype": "f32"}, "cannot change")):
        with pytest.raises(qvl.Error, match=why):
            engine.configure(**wrong)
    drain(engine)


def test_one_picture_for_sixteen(model):
    """Submitted at once and encoded once; kept afterwards, within embedding_cache."""
    engine = qvl.Engine(model, max_requests=16, max_context=512, prefix_cache=False)
    prompts = [model.prompt(user(image_path("photo_320x240.jpg"), f"Question {i}?")) for i in range(16)]
    for p in prompts:
        engine.submit(p, max_tokens=2, ignore_eos=True)
    drain(engine)
    assert engine.stats["images_encoded"] == 1
    assert engine.stats["embeddings"]["bytes_used"] == 0 < engine.stats["embeddings"]["bytes_kept"]
    again = engine.submit(prompts[0], max_tokens=1)
    assert drain(engine)[again].usage["images_cached"] == 1 and engine.stats["images_encoded"] == 1
    engine.configure(embedding_cache=0)
    drain(engine, {engine.submit(prompts[0], max_tokens=1)})
    assert engine.stats["embeddings"] == {"count": 0, "bytes_used": 0, "bytes_kept": 0, "bytes_limit": 0}
    drain(engine, {engine.submit(prompts[0], max_tokens=1)})
    assert engine.stats["images_encoded"] == 2


def test_picture_too_large(model):
    engine = qvl.Engine(model, max_requests=1, max_context=512, max_image_tokens=79)
    with pytest.raises(qvl.Error, match=r"80 tokens.*at most 79.*max_image_tokens"):
        engine.submit(model.prompt(LOOK))
    embedding = model.encode_image(image_path("photo_320x240.jpg"))  # brought along, it needs no room in the tower
    assert len(drain(engine, {engine.submit(model.prompt(user(embedding, "?")), max_tokens=1)})) == 1


def test_nobody_waits_for_a_picture(model):
    """While pictures are encoded slice by slice, a running answer gets a token in every step."""
    engine = qvl.Engine(model, max_requests=8, max_context=2048, kv_blocks=300, step_ms=1)
    first = engine.submit(model.prompt(user("Hi")), max_tokens=60, ignore_eos=True)
    while not any(e.type == "token" for e in engine.step(timeout=0)):
        pass
    rng, system = np.random.default_rng(5), [{"role": "system", "content": "You are one of those who look at pictures and tell what they see."}]
    for _ in range(4):
        engine.submit(model.prompt(system + user(rng.integers(0, 255, (448, 448, 3), np.uint8), "?")), max_tokens=1)
    # one that begins like them, as far as the picture, does not wait for it either
    text = engine.submit(model.prompt(system + user("Nothing to look at?")), max_tokens=1)
    steps, answered = 0, None
    while engine.stats["images_encoded"] < 4 and steps < 50:
        events = engine.step(timeout=0)
        assert [e.type for e in events if e.request == first][:1] == ["token"], "a step without a token for the running answer"
        steps += 1
        if answered is None and any(e.request == text for e in events):
            answered = engine.stats["images_encoded"]
    assert steps >= 5 and answered == 0  # there were slices
    drain(engine)


def test_guesses(model):
    """An answer that repeats itself takes fewer steps with guesses, and is the same."""
    prompt = model.prompt(user("one two three one two three one two three"))
    options = dict(max_tokens=60, temperature=0, ignore_eos=True, logit_bias={"300": 60, "301": 60})
    steps, answers = [], []
    for speculate in (0, 8):
        engine = qvl.Engine(model, max_requests=1, max_context=512)
        request = engine.submit(prompt, speculate=speculate, **options)
        answer = drain(engine)[request]
        assert (answer.usage["speculated_tokens"] > 0) == (speculate > 0)
        steps.append(engine.stats["steps"])
        answers.append(answer.tokens)
    assert answers[0] == answers[1] and steps[1] < 0.6 * steps[0]


def test_plan(model):
    plan = model.plan(max_requests=4, max_context=1024, kv_blocks=100)
    assert plan["total"] == plan["weights"] + plan["kv"] + plan["workspace"] + plan["vision"]
    assert plan["kv"] == 100 * plan["kv_block_bytes"] and plan["kv_block_tokens"] == 32 and plan["max_context"] == 1024
    with pytest.raises(qvl.Error, match="max_position_embeddings"):
        model.plan(max_context=1 << 20)


@pytest.mark.parametrize("name", GOLDENS)
def test_second_turn_computes_only_what_is_new(load, name):
    """A chat whose first turn has a thousand tokens: the second prefills its own, and at most one block of old ones."""
    model = load(name, dtype="auto", threads=2)
    engine = qvl.Engine(model, max_requests=1, max_context=2048)
    rng = np.random.default_rng(3)
    first = rng.integers(100, 2000, 1000).tolist()
    answer = drain(engine, {engine.submit(first, max_tokens=20, ignore_eos=True, temperature=0)})
    turn = first + next(iter(answer.values())).tokens + rng.integers(100, 2000, 30).tolist()
    request = engine.submit(turn, max_tokens=1)
    before = engine.stats["prompt_tokens"]
    cached = drain(engine, {request})[request].usage["cached_tokens"]
    assert cached == (1000 + 19) // 32 * 32
    assert engine.stats["prompt_tokens"] - before == len(turn) - cached
