"""support - golden data, and running requests to their end.

Job:        read safetensors and the golden manifests; fill golden messages with real paths; drive an engine.
Input:      tests/golden, examples/models/qvl-tiny.
Output:     plain dicts and numpy arrays.
Invariants: nothing but numpy is needed: the references were computed by transformers beforehand.
"""
import copy
import functools
import json
import os
import pathlib
import shutil
import struct
from typing import NamedTuple

import numpy as np

import qvl

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "examples" / "models" / "qvl-tiny"
# Short names of the random checkpoints. The mixture of experts is large and optional: it is tested where its files are.
GOLDENS = {"tied": "tiny-dense-tied", "untied": "tiny-dense-untied", "moe": "tiny-moe"}
if not ((GOLDEN / "checkpoints" / "tiny-moe").exists() and (GOLDEN / "model" / "tiny-moe" / "goldens.safetensors").exists()):
    del GOLDENS["moe"]
CHECKPOINTS = {"qvl-tiny": TINY, **{name: GOLDEN / "checkpoints" / folder for name, folder in GOLDENS.items()}}

# QVL_TEST_DEVICE=cuda runs the same tests on a GPU, or under emulation (make check-emu, make check-gpu); QVL_TEST_GPUS=2 on
# several that share the model.
DEVICE = {"device": os.environ["QVL_TEST_DEVICE"]} if "QVL_TEST_DEVICE" in os.environ else {}
if "QVL_TEST_GPUS" in os.environ:
    DEVICE["tensor_parallel_size"] = int(os.environ["QVL_TEST_GPUS"])

_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "BF16": np.uint16, "F16": np.float16}


def read_safetensors(path):
    """Name to array; BF16 as its bits in uint16."""
    data = pathlib.Path(path).read_bytes()
    size, = struct.unpack("<Q", data[:8])
    out = {}
    for name, t in json.loads(data[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            out[name] = np.frombuffer(data[8 + size + begin:8 + size + end], _DTYPES[t["dtype"]]).reshape(t["shape"])
    return out


def write_safetensors(path, tensors):
    """tensors: name to (dtype, shape, bytes)."""
    header, blob = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + blob)


def raw_safetensors(path):
    """The form that write_safetensors takes."""
    data = pathlib.Path(path).read_bytes()
    size, = struct.unpack("<Q", data[:8])
    return {name: (t["dtype"], t["shape"], data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]])
            for name, t in json.loads(data[8:8 + size]).items() if name != "__metadata__"}


class MIXTURE:
    """Sizes of the checkpoint that mixture() makes."""
    experts, top_k, inter, plain_layer = 6, 2, 40, 1


def mixture(out):
    """A mixture of experts: the golden checkpoint "untied" with random experts in all layers but one (mlp_only_layers)."""
    source = CHECKPOINTS["untied"]
    for f in source.iterdir():
        if f.suffix != ".safetensors" and f.name != "model.safetensors.index.json":
            shutil.copy(f, out)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    config.update(architectures=["Qwen3VLMoeForConditionalGeneration"], model_type="qwen3_vl_moe")
    text.update(model_type="qwen3_vl_moe_text", num_experts=MIXTURE.experts, num_experts_per_tok=MIXTURE.top_k, moe_intermediate_size=MIXTURE.inter,
                decoder_sparse_step=1, mlp_only_layers=[MIXTURE.plain_layer], norm_topk_prob=True)
    config["vision_config"]["model_type"] = "qwen3_vl_moe"
    (out / "config.json").write_text(json.dumps(config))
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors.update(raw_safetensors(shard))
    rng, hidden = np.random.default_rng(5), text["hidden_size"]
    for i in range(text["num_hidden_layers"]):
        if i == MIXTURE.plain_layer:
            continue
        p = f"model.language_model.layers.{i}.mlp."
        for name in ("gate_proj", "up_proj", "down_proj"):
            del tensors[p + name + ".weight"]
        for name, shape, scale in (("gate.weight", (MIXTURE.experts, hidden), .3), ("experts.gate_up_proj", (MIXTURE.experts, hidden, 2 * MIXTURE.inter), .15),
                                   ("experts.down_proj", (MIXTURE.experts, MIXTURE.inter, hidden), .15)):
            cut = (np.ascontiguousarray(rng.standard_normal(shape) * scale, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            tensors[p + name] = ("BF16", shape, cut.tobytes())
    write_safetensors(out / "model.safetensors", tensors)
    return out


@functools.lru_cache(maxsize=None)
def manifest(name):
    return json.loads((GOLDEN / "model" / GOLDENS[name] / "manifest.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=None)
def tensors(name):
    return read_safetensors(GOLDEN / "model" / GOLDENS[name] / "goldens.safetensors")


@functools.lru_cache(maxsize=None)
def videos():
    return json.loads((GOLDEN / "videos" / "manifest.json").read_text())["videos"]


def auto_kv(model):
    """What kv_dtype auto is beside bf16 weights."""
    return "bf16" if model.info["device"] == "cuda" or model.info["isa"] == "amx" else "f16"


def image_path(name):
    return GOLDEN / "images" / name


def frames(video):
    return [GOLDEN / "videos" / video / f"frame_{i:03d}.png" for i in range(videos()[video]["frames"])]


def with_paths(messages):
    """Golden messages name pictures and videos; here they become paths and frames."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                part["image"] = image_path(part["image"])
            if part["type"] == "video":
                name = part["video"]
                part.update(video=frames(name), fps=videos()[name]["fps"], do_sample_frames=False)
    return messages


def golden_prompt(model, case):
    return model.prompt(with_paths(case["messages"]), video_layout="nested" if case["v5_video_layout"] else "published")


def user(*parts):
    """One user message; a str is text, anything else a picture."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else
                                         p if isinstance(p, dict) else {"type": "image", "image": p} for p in parts]}]


class Answer(NamedTuple):
    tokens: list
    text: str
    logits: np.ndarray     # [tokens, vocab] with return_logits, else empty
    reason: str
    usage: dict
    events: list


def drain(engine, wanted=None):
    """Steps until the wanted (default: all) requests have ended; request number to Answer."""
    events, ended = {}, set()
    while engine.active if wanted is None else not ended.issuperset(wanted):
        for e in engine.step(timeout=60):
            assert e.error is None, e
            events.setdefault(e.request, []).append(e)
            if e.type == "finished":
                ended.add(e.request)
    return {r: as_answer(es) for r, es in events.items()}


def as_answer(events):
    logits = [e.logits for e in events if e.logits is not None]
    return Answer([e.token for e in events if e.token is not None], "".join(e.text for e in events),
                  np.stack(logits) if logits else np.empty((0, 0), np.float32), events[-1].finish_reason, events[-1].usage,
                  events)


def run(model, prompt, engine_options=None, **sampling):
    """One request alone in an engine of its own."""
    options = {"max_requests": 1, "max_context": min(1024, model.info["max_context"]), **(engine_options or {})}
    engine = qvl.Engine(model, **options)
    request = engine.submit(prompt, **sampling)
    return drain(engine)[request]


def rel(got, want):
    """Largest difference over the largest golden value."""
    return float(np.abs(got - want).max() / np.abs(want).max())
