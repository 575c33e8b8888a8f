"""test_moe - Qwen3-VL's mixture of experts against a direct computation in float64.

A dense golden checkpoint gets random experts in all layers but one (mlp_only_layers). The reference is written
from transformers' modeling_qwen3_vl_moe; the engine also gives transformers' own greedy tokens on a checkpoint of that
architecture, which is too large to keep here.
"""
import json
import shutil

import numpy as np
import pytest

import qvl
from reference import silu, softmax, text_logits
from support import CHECKPOINTS, DEVICE, drain, raw_safetensors, run, write_safetensors

EXPERTS, TOP_K, INTER, PLAIN_LAYER = 6, 2, 40, 1


def bf16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    source, out = CHECKPOINTS["untied"], tmp_path_factory.mktemp("moe")
    for f in source.iterdir():
        if f.suffix != ".safetensors" and f.name != "model.safetensors.index.json":
            shutil.copy(f, out)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    config.update(architectures=["Qwen3VLMoeForConditionalGeneration"], model_type="qwen3_vl_moe")
    text.update(model_type="qwen3_vl_moe_text", num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=INTER,
                decoder_sparse_step=1, mlp_only_layers=[PLAIN_LAYER], norm_topk_prob=True)
    config["vision_config"]["model_type"] = "qwen3_vl_moe"
    (out / "config.json").write_text(json.dumps(config))
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors.update(raw_safetensors(shard))
    rng, hidden = np.random.default_rng(5), text["hidden_size"]
    for i in range(text["num_hidden_layers"]):
        if i == PLAIN_LAYER:
            continue
        p = f"model.language_model.layers.{i}.mlp."
        for name in ("gate_proj", "up_proj", "down_proj"):
            del tensors[p + name + ".weight"]
        for name, shape, scale in (("gate.weight", (EXPERTS, hidden), .3), ("experts.gate_up_proj", (EXPERTS, hidden, 2 * INTER), .15),
                                   ("experts.down_proj", (EXPERTS, INTER, hidden), .15)):
            tensors[p + name] = ("BF16", shape, bf16(rng.standard_normal(shape) * scale).tobytes())
    write_safetensors(out / "model.safetensors", tensors)
    return out


def experts(i, h, lin, w):
    """transformers' Qwen3VLMoeTextSparseMoeBlock."""
    if i == PLAIN_LAYER:
        return None
    p, route, y = f"model.language_model.layers.{i}.mlp.experts.", softmax(lin("mlp.gate", h)), np.zeros_like(h)
    for r in range(len(h)):
        chosen = np.argsort(-route[r], kind="stable")[:TOP_K]
        for e in chosen:
            gate, up = np.split(h[r] @ w[p + "gate_up_proj"][e], 2)
            y[r] += route[r, e] / route[r, chosen].sum() * ((silu(gate) * up) @ w[p + "down_proj"][e])
    return y


def test_logits_equal_a_direct_computation(checkpoint, say):
    m = qvl.Model(checkpoint, **DEVICE, dtype="f32")
    ids = [int(t) for t in np.random.default_rng(1).integers(0, 4000, 50)]
    want = text_logits(checkpoint, ids, mlp=experts)
    worst = np.abs(m.logits(ids) - want).max()
    say(f"mixture of experts: max abs logit difference {worst:.1e} (std {want.std():.1f})")
    assert worst < 1e-3


def test_same_bits_in_chunks_and_batches(checkpoint):
    m = qvl.Model(checkpoint, **DEVICE, threads=2, deterministic=True)
    rng = np.random.default_rng(2)
    prompts = [m.prompt([{"role": "user", "content": "word " * int(rng.integers(1, 30))}]) for _ in range(5)]
    sampling = dict(max_tokens=6, temperature=0, ignore_eos=True, return_logits=True)
    alone = [run(m, p, **sampling) for p in prompts]
    e = qvl.Engine(m, max_requests=5, max_context=256, max_batched_tokens=7)
    asked = [e.submit(p, **sampling) for p in prompts]
    together = drain(e)
    for request, a in zip(asked, alone):
        assert together[request].tokens == a.tokens and (together[request].logits == a.logits).all()


def test_misshapen_experts_are_refused_by_name(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = raw_safetensors(broken / "model.safetensors")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    dtype, (e, i, o), raw = tensors[name]
    tensors[name] = (dtype, (e, o, i), raw)
    write_safetensors(broken / "model.safetensors", tensors)
    with pytest.raises(qvl.Error, match="gate_up_proj"):
        qvl.Model(broken)
