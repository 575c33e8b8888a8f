"""test_device - where a model runs: choosing a device, and what must hold on one with memory of its own.

The first part runs everywhere: what libqvl says when there is no plug-in, a wrong one, no driver or no GPU. The second runs
with QVL_TEST_DEVICE=cuda, on a GPU or on the emulator (make check-emu).
"""
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import qvl
from support import CHECKPOINTS, DEVICE, ROOT, TINY, drain

ON_GPU = os.environ.get("QVL_TEST_DEVICE") == "cuda"
EMULATED = "emu" in os.environ.get("QVL_CUDA_PLUGIN", "")
gpu = pytest.mark.skipif(not ON_GPU, reason="QVL_TEST_DEVICE is not cuda")
slow = pytest.mark.slow  # half a minute or more under emulation, and of what a quicker one shows too
SHAPES = ROOT / "examples" / "images" / "shapes.png"
ASK = [{"role": "user", "content": [{"type": "image", "image": str(SHAPES)}, {"type": "text", "text": "What do you see?"}]}]


def opened(device, **env):
    """What loading the bundled model on a device says, in a process of its own."""
    code = (f"import qvl\ntry: print(qvl.Model({str(TINY)!r}, threads=1, device={device!r}).info['device'])\n"
            "except qvl.Error as e: print(e.code, e)")
    env = {**{k: v for k, v in os.environ.items() if not k.startswith(("QVL_CUDA", "QVL_EMU"))}, "PYTHONPATH": str(ROOT / "bindings" / "python"), **env}
    out = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A plug-in of another version."""
    at = tmp_path_factory.mktemp("plugin")
    (at / "p.c").write_text('#include <stddef.h>\nconst struct { const char *version; size_t size; void *open; } qvl_device_plugin = {"qvl-device-0", 1, 0};\n')
    subprocess.run(["cc", "-shared", "-fPIC", "-o", at / "p.so", at / "p.c"], check=True)
    return str(at / "p.so")


def test_wrong_plugins(stranger):
    for path, said in (("/nowhere/libqvl-cuda.so", "/nowhere/libqvl-cuda.so"), ("libm.so.6", "no symbol qvl_device_plugin"), (stranger, "another libqvl (qvl-device-0")):
        message = opened("cuda", QVL_CUDA_PLUGIN=path)
        assert message.startswith(f"-10 ") and said in message and "cuda" in message
        assert opened("auto", QVL_CUDA_PLUGIN=path) == "cpu"
    assert opened("cpu", QVL_CUDA_PLUGIN="/nowhere") == "cpu"


def test_no_gpu():
    """The real plug-in, where it was built and there is no GPU: a clear message, and auto is the CPU."""
    library = pathlib.Path(os.environ["QVL_LIBRARY"]).parent / "libqvl-cuda.so"
    if not library.exists():
        pytest.skip("the plug-in is not built (make cuda)")
    if pathlib.Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    assert "no NVIDIA driver is installed" in opened("cuda", QVL_CUDA_PLUGIN=str(library))
    assert opened("auto", QVL_CUDA_PLUGIN=str(library)) == "cpu"


@pytest.mark.skipif(not EMULATED, reason="QVL_CUDA_PLUGIN is not the emulator")
def test_emulated_absence():
    plugin = os.environ["QVL_CUDA_PLUGIN"]
    assert "no NVIDIA GPU is visible" in opened("cuda", QVL_CUDA_PLUGIN=plugin, QVL_EMU_NO_DEVICE="1")
    assert "no NVIDIA driver is installed" in opened("cuda", QVL_CUDA_PLUGIN=plugin, QVL_EMU_NO_DEVICE="driver")
    assert "knows CUDA 12.4, libqvl-cuda needs" in opened("cuda", QVL_CUDA_PLUGIN=plugin, QVL_EMU_NO_DEVICE="old")
    assert opened("auto", QVL_CUDA_PLUGIN=plugin, QVL_EMU_NO_DEVICE="1") == "cpu"
    assert "out of memory while its workspace was set up" in opened("cuda", QVL_CUDA_PLUGIN=plugin, QVL_EMU_MEMORY=str(64 << 20))


# ------------------------------------------------------------------------------------------------------------ on a GPU

def answers(model, prompts, **options):
    engine = qvl.Engine(model, max_context=512, **options)
    numbers = [engine.submit(p, temperature=0, max_tokens=12, ignore_eos=True) for p in prompts]
    done = drain(engine)
    return [done[n].tokens for n in numbers], engine.stats


@gpu
def test_info(load):
    info = load("qvl-tiny", dtype="f32").info
    assert info["device"] == "cuda" and info["isa"].startswith("sm_")


@gpu
def test_preemption(load):
    """Too few blocks for all: requests lose them and are computed again, with the same answers."""
    model = load("qvl-tiny", dtype="f32")
    prompts = [model.prompt([{"role": "user", "content": f"Count to {n}. " * 12}]) for n in range(3)]
    alone = [answers(model, [p])[0][0] for p in prompts]
    together, stats = answers(model, prompts, max_requests=3, kv_blocks=17)
    assert together == alone
    tight, stats = answers(model, prompts, max_requests=3, kv_blocks=max(-(-(len(p) + 12) // 32) for p in prompts) + 3)
    assert tight == alone


@gpu
def test_engines_one_after_another(load):
    """Buffers of an engine that is gone may come back at the same addresses with another division: no recorded step survives."""
    model, cpu = load("qvl-tiny", dtype="f32"), load("qvl-tiny", dtype="f32", device="cpu")
    text = [{"role": "user", "content": "Name three colours."}]
    want = answers(cpu, [cpu.prompt(text)])[0]
    for rows in (64, 61, 64, 58, 61):
        assert answers(model, [model.prompt(text)], max_batched_tokens=rows, max_requests=2, kv_blocks=8)[0] == want


@gpu
@pytest.mark.parametrize("dtype,kv_dtype", [("auto", "bf16"), ("auto", "int8"), ("auto", "f16"), ("int8", "bf16"), ("int4", "bf16")])
def test_deterministic(load, dtype, kv_dtype):
    """deterministic: a request's logits are the same bits alone, batched and in chunks of any size."""
    model = load("qvl-tiny", dtype=dtype, deterministic=True)
    prompts = [model.prompt(ASK), model.prompt([{"role": "user", "content": "Name three colours."}])]
    found = []
    for together, rows in ((False, 512), (True, 512), (True, 7)):
        out = {}
        for group in ([prompts] if together else [[p] for p in prompts]):
            engine = qvl.Engine(model, max_context=512, max_batched_tokens=rows, kv_dtype=kv_dtype, prefix_cache=False)
            numbers = [engine.submit(p, temperature=0, max_tokens=4, ignore_eos=True, return_logits=True) for p in group]
            done = drain(engine)
            out.update({len(p): done[n] for p, n in zip(group, numbers)})
        found.append(out)
    for other in found[1:]:
        for key, answer in other.items():
            assert answer.tokens == found[0][key].tokens
            assert np.array_equal(np.stack(answer.logits), np.stack(found[0][key].logits))


@gpu
@pytest.mark.parametrize("dtype", ["f32", "auto", "int8", "int4"])
def test_like_the_cpu(load, dtype):
    """The same weights on both devices: logits differ by rounding alone. int8 and int4: the CPU rounds activations to 8 bits,
    the GPU to bf16, so those are held against the CPU with exact activations on the same integers, within what bf16 costs."""
    here, there = load("qvl-tiny", dtype=dtype), load("qvl-tiny", dtype=dtype, device="cpu")
    assert here.info["weights_id"] != there.info["weights_id"]  # what one computed is no cached result of the other
    a, b = here.logits(here.prompt(ASK)), there.logits(there.prompt(ASK))
    error = np.sqrt(np.mean((a - b) ** 2)) / b.std()
    assert error <= {"f32": 2e-5, "auto": 0.02, "int8": 0.03, "int4": 0.03}[dtype], error
    x, y = here.encode_image(SHAPES).to_numpy(), there.encode_image(SHAPES).to_numpy()
    assert np.sqrt(np.mean((x - y) ** 2)) / y.std() <= {"f32": 2e-5, "auto": 0.02, "int8": 0.03, "int4": 0.03}[dtype]


@gpu
def test_packed(load, tmp_path):
    """A packed file gives what rounding while loading gives."""
    qvl.quantize(TINY, tmp_path / "packed", dtype="int4")
    here, there = qvl.Model(tmp_path / "packed", **DEVICE), load("qvl-tiny", dtype="int4")
    tokens = here.prompt(ASK)
    assert np.array_equal(here.logits(tokens), there.logits(there.prompt(ASK)))


@gpu
def test_speculation_and_logprobs(load):
    """Several rows of a request in one step, and the host's sampler on logits of the device."""
    model = load("qvl-tiny", dtype="f32")
    text = [{"role": "user", "content": "red green blue red green blue red green blue"}]
    plain = model.chat(text, temperature=0, max_tokens=16, ignore_eos=True)
    fast = model.chat(text, temperature=0, max_tokens=16, ignore_eos=True, speculate=4, logprobs=2)
    assert fast.tokens == plain.tokens
    assert model.chat(text, temperature=1, seed=7, max_tokens=16, ignore_eos=True).tokens == model.chat(text, temperature=1, seed=7, max_tokens=16, ignore_eos=True).tokens


@gpu
def test_sampling(load):
    """The device takes the tokens that the CPU takes: every kind of option, beside one another, and beside requests whose logits the host wants."""
    model, cpu = load("qvl-tiny", dtype="f32"), load("qvl-tiny", dtype="f32", device="cpu")
    ways = [dict(temperature=1), dict(temperature=0.8, top_k=20, top_p=0.8), dict(temperature=1.5, min_p=0.02, frequency_penalty=0.5, presence_penalty=0.3),
            dict(temperature=0.7, repetition_penalty=1.2, logit_bias={"5": 4, "300": -100}, min_tokens=6), dict(temperature=1, top_p=0.9, logprobs=3),
            dict(temperature=1, return_logits=True), dict(temperature=1, top_k=50, speculate=3), dict(temperature=1, prompt_logprobs=1), dict(temperature=0, speculate=2, repetition_penalty=1.1)]
    found = []
    for m in (cpu, model):
        engine = qvl.Engine(m, max_context=512, max_requests=9)
        numbers = [engine.submit(m.prompt([{"role": "user", "content": "red green blue red green blue red"}]), seed=i, max_tokens=12, **way) for i, way in enumerate(ways)]
        done = drain(engine)
        found.append([done[n].tokens for n in numbers])
    assert found[0] == found[1]


@gpu
@pytest.mark.skipif(os.environ.get("QVL_TEST_GPUS", "1") != "1", reason="several GPUs have one stream each")
def test_decoding_beside_a_picture(load):
    """An answer goes on while the picture of another request is in the tower; both are what they are alone."""
    model = load("qvl-tiny", dtype="f32")
    colours = [{"role": "user", "content": "Name three colours."}]
    text, ask = model.prompt(colours), model.prompt(ASK)
    alone = [model.chat(m, temperature=0, max_tokens=n, ignore_eos=True).tokens for m, n in ((colours, 48), (ASK, 6))]
    engine = qvl.Engine(model, max_context=512)
    first = engine.submit(text, temperature=0, max_tokens=48, ignore_eos=True)
    events, second = [], None
    while engine.active:
        found = engine.step(timeout=60)
        assert not any(e.error for e in found)
        events += [(e, engine.stats["images_encoded"]) for e in found]
        if second is None and sum(e.type == "token" for e, _ in events) >= 2:
            second = engine.submit(ask, temperature=0, max_tokens=6, ignore_eos=True)
            submitted = len(events)
    assert sum(e.type == "token" and e.request == first and not encoded for e, encoded in events[submitted:]) >= 3
    assert [[e.token for e, _ in events if e.type == "token" and e.request == r] for r in (first, second)] == alone


COUNT = """
import sys
import qvl
from support import TINY
dtype, gpus, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model = qvl.Model(TINY, device="cuda", dtype=dtype, tensor_parallel_size=gpus)
engine = qvl.Engine(model, max_context=512, max_requests=rows, max_batched_tokens=rows * length, step_ms=0, prefix_cache=False)
for _ in range(rows):
    engine.submit([5] * length, temperature=0, max_tokens=4, ignore_eos=True)
while engine.active:
    assert not any(e.error for e in engine.step())
print(model.info["text"]["layers"])
"""


@pytest.mark.skipif(not EMULATED, reason="QVL_CUDA_PLUGIN is not the emulator")
@pytest.mark.parametrize("dtype,gpus,rows,length", [("auto", 1, 1, 8), ("auto", 1, 1, 200), ("auto", 1, 12, 8), ("int4", 1, 12, 8), ("auto", 2, 3, 8), ("int8", 2, 64, 8)])
def test_launches(dtype, gpus, rows, length):
    """A recorded step has as many kernels as docs/cuda.md counts (tests/cuda/bounds.py)."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda"))
    import bounds
    env = {**os.environ, "QVL_EMU_GRAPHS": "1", "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "tests" / "python")])}
    done = subprocess.run([sys.executable, "-c", COUNT, dtype, str(gpus), str(rows), str(length)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counted = {int(line.split()[4]) for line in done.stderr.splitlines() if "a graph of" in line}
    assert counted == {bounds.launches(int(done.stdout), dtype.replace("auto", "bf16"), rows, length, gpus)}


@gpu
def test_too_much(load):
    """A context that the GPU has no room for is refused with the numbers."""
    with pytest.raises(qvl.Error, match="MiB"):
        qvl.Engine(load("qvl-tiny", dtype="f32"), kv_blocks=16777216)


# ------------------------------------------------------------------------------------------------- several share a model


def sharing(gpus, **options):
    """qvl-tiny on so many GPUs; skips where there are fewer."""
    try:
        return qvl.Model(TINY, **{"device": "cuda", **options, "tensor_parallel_size": gpus})
    except qvl.Error as e:
        if "visible" in str(e):
            pytest.skip(str(e))
        raise


@gpu
@pytest.mark.parametrize("gpus,dtype", [(2, "f32"), pytest.param(4, "f32", marks=slow), (2, "auto"), (4, "auto"), (2, "int8"), (2, "int4")])
def test_parallel(gpus, dtype, load):
    """Two or four GPUs (keys of two heads, so that four have some twice) against one CPU: image, prompt, recorded steps."""
    many, cpu = sharing(gpus, dtype=dtype), load("qvl-tiny", dtype=dtype, device="cpu")
    assert many.info["isa"].endswith(f" x {gpus}")
    x, y = many.encode_image(SHAPES).to_numpy(), cpu.encode_image(SHAPES).to_numpy()
    assert np.sqrt(np.mean((x - y) ** 2)) / y.std() <= {"f32": 2e-5, "auto": 0.02, "int8": 0.03}.get(dtype, 0.03)
    a, b = many.logits(many.prompt(ASK)), cpu.logits(cpu.prompt(ASK))
    assert np.sqrt(np.mean((a - b) ** 2)) / b.std() <= {"f32": 2e-5, "auto": 0.02, "int8": 0.03}.get(dtype, 0.05)
    if dtype == "f32":
        assert answers(many, [many.prompt(ASK)])[0] == answers(cpu, [cpu.prompt(ASK)])[0]


@gpu
@pytest.mark.parametrize("gpus,dtype", [(2, "auto"), *(pytest.param(*c, marks=slow) for c in ((2, "f32"), (4, "f32"), (4, "auto")))])
def test_parallel_bits(gpus, dtype):
    """In modes that promise the same bits in every batch, several GPUs keep the promise."""
    model = sharing(gpus, dtype=dtype, deterministic=True)
    prompts = [model.prompt(ASK), model.prompt([{"role": "user", "content": "Name three colours."}])]
    found = []
    for together, rows in ((False, 512), (True, 512), (True, 7)):
        out = []
        for group in ([prompts] if together else [[p] for p in prompts]):
            engine = qvl.Engine(model, max_context=256, max_batched_tokens=rows, prefix_cache=False)
            numbers = [engine.submit(p, temperature=0, max_tokens=5, ignore_eos=True, return_logits=True) for p in group]
            done = drain(engine)
            out += [np.stack(done[n].logits) for n in numbers]
        found.append(out)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert np.array_equal(a, b)


@gpu
@pytest.mark.parametrize("dtype", ["int4", pytest.param("f32", marks=slow)])
def test_parallel_packed(dtype, tmp_path):
    """Parts of a packed file are the parts that rounding while loading gives."""
    qvl.quantize(TINY, tmp_path / dtype, dtype=dtype)
    here, there = sharing(2, dtype=dtype), qvl.Model(tmp_path / dtype, device="cuda", dtype=dtype, tensor_parallel_size=2)
    assert np.array_equal(here.encode_image(SHAPES).to_numpy(), there.encode_image(SHAPES).to_numpy())
    assert np.array_equal(here.logits(here.prompt(ASK)), there.logits(there.prompt(ASK)))


@gpu
def test_parallel_refusals():
    sharing(4)
    with pytest.raises(qvl.Error, match="cannot be divided among 3 GPUs"):
        sharing(3)
    with pytest.raises(qvl.Error, match=r"tensor_parallel_size is 8, but \d+ NVIDIA GPUs are visible"):
        qvl.Model(TINY, device="cuda", tensor_parallel_size=8)
    with pytest.raises(qvl.Error, match="only GPUs can share a model"):
        qvl.Model(TINY, device="cpu", tensor_parallel_size=2)


LOSE = """
import sys
import qvl
from support import TINY
gpus, picture = int(sys.argv[1]), sys.argv[2]
model = qvl.Model(TINY, device="cuda", dtype="f32", tensor_parallel_size=gpus)
print("loaded")
engine = qvl.Engine(model, max_context=256)
engine.submit(model.prompt([{"role": "user", "content": "Name three colours."}]), temperature=0, max_tokens=64, ignore_eos=True)
if picture:
    engine.submit(model.prompt([{"role": "user", "content": [{"type": "image", "image": picture}]}]), temperature=0, max_tokens=64, ignore_eos=True)
while engine.active:
    for event in engine.step():
        if event.error:
            print("failed:", event.error)
try:
    model.logits(model.prompt([{"role": "user", "content": "Again."}]))
except qvl.Error as e:
    print("refused:", e)
"""


def lose(lost, gpus, picture=""):
    """What happens when a GPU fails in the middle of answers, as the first words of lines that all name it."""
    env = {**os.environ, "QVL_EMU_LOST": lost, "QVL_EMU_DEVICES": str(gpus), "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "tests" / "python")])}
    done = subprocess.run([sys.executable, "-c", LOSE, str(gpus), str(picture)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(f"on GPU {lost[0]}: " in line for line in lines[1:]), done.stdout
    return [line.split()[0] for line in lines]


@pytest.mark.skipif(not EMULATED, reason="QVL_CUDA_PLUGIN is not the emulator")
@pytest.mark.parametrize("lost", ["0:480", "1:480", "0:777", "1:1000"])
def test_parallel_lost(lost):
    """One of two GPUs fails in the middle of an answer: the other one does not wait for it for ever, and the error says which."""
    assert lose(lost, 2) == ["loaded", "failed:", "refused:"]


@pytest.mark.skipif(not EMULATED, reason="QVL_CUDA_PLUGIN is not the emulator")
@pytest.mark.parametrize("lost", ["0:450", "0:600", "0:800"])
def test_lost_beside_a_picture(lost):
    """The GPU fails while a picture is encoded beside an answer: both requests are told."""
    assert lose(lost, 1, SHAPES) == ["loaded", "failed:", "failed:", "refused:"]
