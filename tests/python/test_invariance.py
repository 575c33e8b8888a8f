"""test_invariance - a request gets the same tokens and the same logits, bit for bit, whatever surrounds it.

Eight requests (texts, pictures, videos, greedy and sampled with a seed) run alone; then together, in chunks of 7 tokens, with
1, 2 and 3 threads, arriving one after the other, beside cancelled neighbours, on prefixes that the engine still has from earlier
requests, with embeddings in the place of pictures.
"""
import numpy as np
import pytest

import qvl
from support import GOLDENS, auto_kv, drain, frames, image_path, run, user

TOKENS = 10
SEEDED = dict(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.2,
              frequency_penalty=0.1)
VIDEO = {"type": "video", "video": frames("v1"), "fps": 2.0, "do_sample_frames": False}
SHORT = {"type": "video", "video": frames("v3"), "fps": 25.0}

# name: (messages, sampling options)
REQUESTS = {
    "text, greedy": (user("What is written in the picture?"), dict(temperature=0)),
    "text, seeded": (user("List three colours. " * 20), dict(SEEDED, seed=7)),
    "short, seeded": (user("Hi"), dict(SEEDED, seed=-3)),
    "picture, greedy": (user(image_path("photo_320x240.jpg"), "Describe this image."), dict(temperature=0)),
    "picture, seeded": (user("Look:", image_path("rgba_160x120.png"), "and?"), dict(SEEDED, seed=2**40)),
    "two pictures": (user(image_path("tiny_10x10.png"), image_path("photo_320x240.jpg"), "Compare."), dict(temperature=0)),
    "video, greedy": (user(VIDEO, "What happens?"), dict(temperature=0)),
    "video, seeded": (user(SHORT, image_path("tiny_10x10.png"), "And now?"), dict(SEEDED, seed=1)),
}
KINDS = [("f32", "f32"), ("f32", "bf16"), ("auto", "bf16"), ("auto", "f32"), ("auto", "int8"), ("f32", "f16"), ("int8", "bf16"), ("int4", "int8")]
ALL = [(name, dtype, kv) for name in GOLDENS for dtype, kv in KINDS]


def sampling(request):
    return dict(REQUESTS[request][1], max_tokens=TOKENS, ignore_eos=True, return_logits=True)


@pytest.fixture(scope="module")
def alone(load):
    """The answers of one model, dtype and kv_dtype, each from an engine of its own; two threads."""
    known = {}

    def get(name, dtype, kv):
        if (name, dtype, kv) not in known:
            model = load(name, dtype=dtype, threads=2)
            known[name, dtype, kv] = {r: run(model, model.prompt(m), {"kv_dtype": kv}, **sampling(r))
                                      for r, (m, _) in REQUESTS.items()}
        return known[name, dtype, kv]

    return get


def assert_same(got, want, what):
    assert got.tokens == want.tokens, what
    assert got.text == want.text, what
    assert got.logits.shape == want.logits.shape == (TOKENS, got.logits.shape[1]), what
    assert got.logits.tobytes() == want.logits.tobytes(), what


def together(model, kv, order, **options):
    engine = qvl.Engine(model, max_context=1024, kv_dtype=kv, **{"max_requests": 8, **options})
    numbers = {engine.submit(model.prompt(REQUESTS[r][0]), **sampling(r)): r for r in order}
    return {numbers[n]: a for n, a in drain(engine).items()}


@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_answers_differ_from_each_other(alone, name, dtype, kv):
    """Or the comparisons below would say nothing."""
    answers = alone(name, dtype, kv)
    assert len({tuple(a.tokens) for a in answers.values()}) == len(REQUESTS)


@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_batch_of_eight(load, alone, name, dtype, kv):
    want = alone(name, dtype, kv)
    for r, got in together(load(name, dtype=dtype, threads=2), kv, list(REQUESTS)).items():
        assert_same(got, want[r], r)


@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_chunks_of_seven(load, alone, name, dtype, kv):
    want = alone(name, dtype, kv)
    for r, got in together(load(name, dtype=dtype, threads=2), kv, list(REQUESTS)[::-1], max_batched_tokens=7).items():
        assert_same(got, want[r], r)


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_threads(load, alone, name, dtype, kv, threads):
    model, want = load(name, dtype=dtype, threads=threads), alone(name, dtype, kv)
    assert model.info["threads"] == threads
    for r, got in together(model, kv, list(REQUESTS)).items():
        assert_same(got, want[r], r)


@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_arrivals(load, alone, name, dtype, kv):
    """Three slots for eight requests that come one step after the other, each twice, some of them cancelled."""
    model, want = load(name, dtype=dtype, threads=2), alone(name, dtype, kv)
    engine = qvl.Engine(model, max_context=1024, max_requests=3, kv_dtype=kv, max_batched_tokens=64)
    numbers, cancelled, events = {}, set(), {}

    def step():
        for e in engine.step(timeout=0):
            assert e.error is None
            events.setdefault(e.request, []).append(e)

    for i, r in enumerate(list(REQUESTS) * 2):
        number = engine.submit(model.prompt(REQUESTS[r][0]), **sampling(r))
        numbers[number] = r
        step()
        if i % 5 == 4 and engine.cancel(number):
            cancelled.add(number)
    while engine.active:
        step()
    assert cancelled
    for number, r in numbers.items():
        tokens = [e.token for e in events[number] if e.token is not None]
        logits = np.stack([e.logits for e in events[number] if e.logits is not None]) if tokens else None
        reason = events[number][-1].finish_reason
        assert (reason == "cancelled") == (number in cancelled)
        assert tokens == want[r].tokens[:len(tokens)] and (len(tokens) == TOKENS or number in cancelled), r
        if tokens:
            assert logits.tobytes() == want[r].logits[:len(tokens)].tobytes(), r
    stats = engine.stats
    assert stats["kv"]["blocks_used"] == 0 and stats["requests"]["cancelled"] == len(cancelled)


@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_kept_prefixes(load, alone, name, dtype, kv):
    """One engine, one request after the other, twice: the second round finds its prompts in the cache."""
    model, want = load(name, dtype=dtype, threads=2), alone(name, dtype, kv)
    engine = qvl.Engine(model, max_context=1024, max_requests=2, kv_dtype=kv)
    for order in (list(REQUESTS), list(REQUESTS)[::-1]):
        for r in order:
            number = engine.submit(model.prompt(REQUESTS[r][0]), **sampling(r))
            assert_same(drain(engine)[number], want[r], r)
    assert engine.stats["prefix_tokens"] > 0


@pytest.mark.parametrize("name,dtype", [(n, d) for n in GOLDENS for d in ("f32", "auto")])
def test_prefixes_of_other_requests(load, name, dtype):
    """Prompts that begin alike, other pictures of the same size in the same place, in an engine with little room."""
    model, pixels = load(name, dtype=dtype, threads=2), qvl.Image(image_path("photo_320x240.jpg")).to_numpy()
    long = "List three colours. " * 20
    prompts = [model.prompt(m) for m in (
        user(long), user(long + "More."), user(long[:200]), user(pixels, long), user(pixels[::-1], long),
        user(pixels[:, ::-1], long), user(pixels, long + "More."), user(pixels, pixels[::-1], "x"),
        user(pixels[::-1], pixels, "x"), user(VIDEO, "x"), user({**VIDEO, "video": VIDEO["video"][::-1]}, "x"),
        user({**VIDEO, "fps": 4.0}, "x"))]
    options = dict(temperature=0, max_tokens=4, ignore_eos=True, return_logits=True)
    want = [run(model, p, **options) for p in prompts]
    assert len({w.logits.tobytes() for w in want}) == len(want)
    largest = max(len(p) for p in prompts)
    engine = qvl.Engine(model, max_requests=2, max_context=512, kv_blocks=2 * (largest // 32 + 1), max_batched_tokens=100)
    order = np.random.default_rng(2).permutation(4 * len(prompts)) % len(prompts)
    numbers = {engine.submit(prompts[i], **options): i for i in order}
    for number, got in drain(engine).items():
        assert got.tokens == want[numbers[number]].tokens and got.logits.tobytes() == want[numbers[number]].logits.tobytes()
    assert engine.stats["kv"]["blocks_used"] == 0


@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_preempted(load, alone, name, dtype, kv):
    """Blocks for less than all: the youngest give way and are computed again later, and no bit tells."""
    model, want, longer = load(name, dtype=dtype, threads=2), alone(name, dtype, kv), 70

    def options(r):
        return dict(sampling(r), max_tokens=longer)
    first = {r: run(model, model.prompt(REQUESTS[r][0]), {"kv_dtype": kv}, **options(r)) for r in list(REQUESTS)[::3]}
    blocks = max((len(model.prompt(m)) + longer) // 32 + 1 for m, _ in REQUESTS.values()) + 3
    engine = qvl.Engine(model, max_context=1024, max_requests=8, kv_dtype=kv, kv_blocks=blocks)
    numbers = {engine.submit(model.prompt(REQUESTS[r][0]), **options(r)): r for r in REQUESTS}
    for number, got in drain(engine).items():
        r = numbers[number]
        assert got.tokens[:TOKENS] == want[r].tokens and got.logits[:TOKENS].tobytes() == want[r].logits.tobytes(), r
        if r in first:
            assert got.tokens == first[r].tokens and got.text == first[r].text, r
            assert got.logits.tobytes() == first[r].logits.tobytes(), r
    assert engine.stats["preempted"] > 0 and engine.stats["kv"]["blocks_used"] == 0


def embedded(model, messages, through_bytes):
    """The same messages with embeddings in the place of pictures."""
    def of(part):
        if part["type"] != "image":
            return part
        e = model.encode_image(part["image"])
        return {"type": "image", "image": qvl.Embedding.from_bytes(model, e.to_bytes()) if through_bytes else e}
    return [{"role": m["role"], "content": [of(p) for p in m["content"]]} for m in messages]


@pytest.mark.parametrize("through_bytes", (False, True), ids=("handle", "bytes"))
@pytest.mark.parametrize("name,dtype,kv", ALL)
def test_embeddings(load, alone, name, dtype, kv, through_bytes):
    model, want = load(name, dtype=dtype, threads=2), alone(name, dtype, kv)
    for r, (messages, _) in REQUESTS.items():
        if any(p["type"] == "image" for p in messages[0]["content"]):
            plain, prompt = model.prompt(messages), model.prompt(embedded(model, messages, through_bytes))
            assert prompt.tokens == plain.tokens and np.array_equal(prompt.positions, plain.positions)
            assert_same(run(model, prompt, {"kv_dtype": kv}, **sampling(r)), want[r], r)


@pytest.mark.parametrize("name,dtype", [(n, d) for n in GOLDENS for d in ("f32", "auto")])
def test_embedding_is_a_function_of_pixels(load, name, dtype):
    """Path, bytes, array, resaved pixels, one thread or three: the same bytes."""
    path = image_path("photo_320x240.jpg")
    pixels = qvl.Image(path).to_numpy()
    want = load(name, dtype=dtype, threads=2).encode_image(path)
    for threads in (1, 2, 3):
        model = load(name, dtype=dtype, threads=threads)
        for source in (path, str(path), path.read_bytes(), pixels, np.asfortranarray(pixels), qvl.Image(pixels)):
            assert model.encode_image(source).to_bytes() == want.to_bytes()


@pytest.mark.parametrize("name,dtype", [(n, d) for n in GOLDENS for d in ("f32", "auto")])
def test_logits_match_the_engine(load, alone, name, dtype):
    """Teacher-forced logits have the bits of the engine's, prompt pictures included."""
    model = load(name, dtype=dtype, threads=2)
    kv = model.info["kv_dtype"]
    assert kv == ("f32" if dtype == "f32" else auto_kv(model))
    for r, (messages, _) in REQUESTS.items():
        prompt, want = model.prompt(messages), alone(name, dtype, kv)[r]
        assert model.logits(prompt)[-1].tobytes() == want.logits[0].tobytes(), r
        if prompt.text.find("<|vision_start|>") < 0:
            rows = model.logits(prompt.tokens + want.tokens[:-1])[len(prompt) - 1:]
            assert rows.tobytes() == want.logits.tobytes(), r
