"""test_long - long contexts: YaRN against transformers, and QVL_LONG_TOKENS tokens (8,192; "make check-long": 262,144) against a
direct computation, in the memory that was planned.
"""
import json
import os
import re
import shutil

import numpy as np
import pytest

import qvl
from reference import text_logits
from support import CHECKPOINTS, GOLDEN, drain, image_path, raw_safetensors, user, write_safetensors

LONG = int(os.environ.get("QVL_LONG_TOKENS", 8192))
YARN = {"rope_type": "yarn", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "factor": 4.0, "original_max_position_embeddings": 64}


def changed(tmp, change):
    """tiny-dense-tied with another config."""
    out = tmp / "model"
    shutil.copytree(CHECKPOINTS["tied"], out)
    config = json.loads((out / "config.json").read_text())
    change(config["text_config"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def with_yarn(text):
    text.pop("rope_scaling")
    text.update(rope_parameters={**YARN, "rope_theta": text.pop("rope_theta")}, max_position_embeddings=256)


def test_yarn_logits(tmp_path, say):
    """Rows inside and far beyond the length that the model was trained with; the other spelling of the config; the option."""
    path = changed(tmp_path, with_yarn)
    ids, want = np.random.default_rng(11).integers(100, 4000, 200), np.load(GOLDEN / "rope" / "yarn_logits.npy")
    model = qvl.Model(path, dtype="f32")
    assert model.info["text"]["yarn_factor"] == 4 and model.info["max_context"] == 256
    got = model.logits(ids.tolist())
    worst = np.abs(got[[60, 127, 128, 199]] - want).max()
    say(f"YaRN: max abs logit difference {worst:.1e} (std {want.std():.1f})")
    assert worst < 1e-3
    assert np.abs(text_logits(path, ids, rows=[60, 199]) - want[[0, 3]]).max() < 1e-3
    old = changed(tmp_path / "old", lambda t: t.update(rope_scaling=YARN, max_position_embeddings=256))
    assert (qvl.Model(old, dtype="f32").logits(ids.tolist()) == got).all()
    short = changed(tmp_path / "short", lambda t: t.update(max_position_embeddings=64))
    option = qvl.Model(short, dtype="f32", rope_yarn_factor=4)
    assert option.info["max_context"] == 256 and (option.logits(ids.tolist()) == got).all()
    assert np.abs(qvl.Model(CHECKPOINTS["tied"], dtype="f32").logits(ids.tolist())[199] - want[3]).max() > 0.1  # it does something
    with pytest.raises(qvl.Error, match="has YaRN already"):
        qvl.Model(path, rope_yarn_factor=2)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Two layers, one head of 32: 262,144 tokens take minutes."""
    source, out = CHECKPOINTS["tied"], tmp_path_factory.mktemp("narrow")
    for f in source.iterdir():
        if f.suffix != ".safetensors":
            shutil.copy(f, out)
    config, hidden, inter, d, rng = json.loads((source / "config.json").read_text()), 64, 96, 32, np.random.default_rng(7)
    config["text_config"].update(hidden_size=hidden, intermediate_size=inter, num_hidden_layers=2, num_attention_heads=1,
                                 num_key_value_heads=1, head_dim=d, max_position_embeddings=1 << 18)
    config["text_config"]["rope_scaling"]["mrope_section"] = [6, 5, 5]
    config["vision_config"].update(deepstack_visual_indexes=[1, 2], out_hidden_size=hidden)
    (out / "config.json").write_text(json.dumps(config))

    def bf16(*shape, scale=1.0, mean=0.0):
        x = (rng.standard_normal(shape) * scale + mean).astype(np.float32)
        return "BF16", shape, (x.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    tensors = {k: v for k, v in raw_safetensors(source / "model.safetensors").items()
               if "language_model" not in k and "deepstack_merger_list.2" not in k}
    for name in [n for n in tensors if re.search(r"merger.*linear_fc2", n)]:
        wide = tensors[name][1][1:]
        tensors[name] = bf16(hidden, *wide, scale=.1)
    t = "model.language_model."
    tensors[t + "embed_tokens.weight"] = bf16(config["text_config"]["vocab_size"], hidden)
    tensors[t + "norm.weight"] = bf16(hidden, scale=.1, mean=1)
    for i in range(2):
        p = f"{t}layers.{i}."
        for name, shape in (("self_attn.q_proj", (d, hidden)), ("self_attn.k_proj", (d, hidden)), ("self_attn.v_proj", (d, hidden)),
                            ("self_attn.o_proj", (hidden, d)), ("mlp.gate_proj", (inter, hidden)), ("mlp.up_proj", (inter, hidden)),
                            ("mlp.down_proj", (hidden, inter))):
            tensors[p + name + ".weight"] = bf16(*shape, scale=shape[1] ** -.5)
        for name, n in (("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("self_attn.q_norm", d), ("self_attn.k_norm", d)):
            tensors[p + name + ".weight"] = bf16(n, scale=.3, mean=2 if "_norm" in name[-6:] and n == d else 1)  # q, k: sharp attention
    write_safetensors(out / "model.safetensors", tensors)
    return out


def peak_bytes():
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+) kB", f.read()).group(1)) * 1024


def test_long_prompts(narrow, say):
    """A picture and up to LONG tokens of text, answers at several lengths; each longer prompt goes on from the cached one."""
    model = qvl.Model(narrow, dtype="f32")
    words = np.random.default_rng(1).choice("one two three red blue left right circle and the of is it not".split(), LONG).tolist()
    most = int(LONG * (LONG - 200) / len(model.encode_text(" ".join(words))) * .995)
    prompts = [model.prompt(user(image_path("photo_320x240.jpg"), " ".join(words[:most * k // 8]))) for k in (1, 3, 5, 8)]
    assert LONG * .97 < len(prompts[-1]) <= LONG - 4
    options = dict(max_requests=1, max_context=LONG, max_batched_tokens=1024, kv_dtype="f32", step_ms=0, max_image_tokens=128)
    plan = model.plan(**options)
    model.logits(prompts[0].tokens[-16:])  # the worker threads' own memory
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before, engine = peak_bytes(), qvl.Engine(model, **options)
    answers = [drain(engine, {engine.submit(p, max_tokens=3, temperature=0, ignore_eos=True, return_logits=True)}).popitem()[1] for p in prompts]
    used, planned = peak_bytes() - before, plan["total"] - plan["weights"]
    assert used < planned + (32 << 20), f"{used} bytes, planned {planned}"
    assert engine.stats["prompt_tokens"] < len(prompts[-1]) + 600  # the rest was shared

    embedding = model.encode_image(image_path("photo_320x240.jpg")).to_numpy()
    worst = 0
    for p, a in zip(prompts, answers):
        whole, n = p.tokens + a.tokens[:2], len(p)
        if LONG > 100_000 and p not in (prompts[0], prompts[-1]):
            continue  # minutes each
        delta = int(p.positions.max()) + 1 - n
        positions = np.concatenate([p.positions, np.tile(np.arange(n, n + 2) + delta, (3, 1))], 1)
        want = text_logits(narrow, whole, positions, embedding, rows=[n - 1, n, n + 1], dtype=np.float32 if LONG > 40_000 else np.float64)
        worst = max(worst, np.abs(a.logits - want).max() / want.std())
    say(f"{len(prompts[-1])} tokens: logits within {worst:.1e} of their std of a direct computation; {used >> 20} MiB at most, {planned >> 20} planned")
    assert worst < 2e-3
