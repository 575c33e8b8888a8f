"""test_moe - Qwen3-VL's mixture of experts against a direct computation in float64.

A dense golden checkpoint gets random experts in all layers but one (mlp_only_layers). The reference below is written
from transformers' modeling_qwen3_vl_moe; the engine also gives transformers' own greedy tokens on a checkpoint of that
architecture, which is too large to keep here.
"""
import json
import shutil

import numpy as np
import pytest

import qvl
from support import CHECKPOINTS, drain, raw_safetensors, read_safetensors, run, write_safetensors

EXPERTS, TOP_K, INTER, PLAIN_LAYER = 6, 2, 40, 1


def bf16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


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


def reference(path, ids):
    """Logits [n, vocab] of a text-only prompt."""
    c = json.loads((path / "config.json").read_text())["text_config"]
    w = {k: wide(v) for k, v in read_safetensors(path / "model.safetensors").items()}
    n, d, heads, kv = len(ids), c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]

    def rms(x, g):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * g

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def silu(x):
        return x / (1 + np.exp(-x))

    angle = np.arange(n)[:, None] / c["rope_theta"] ** (np.arange(0, d, 2) / d)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rope(x):
        return x * cos + np.concatenate([-x[..., d // 2:], x[..., :d // 2]], -1) * sin

    x = w["model.language_model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = f"model.language_model.layers.{i}."

        def lin(name, v):
            return v @ w[p + name + ".weight"].T
        h = rms(x, w[p + "input_layernorm.weight"])
        q = rope(rms(lin("self_attn.q_proj", h).reshape(n, heads, d), w[p + "self_attn.q_norm.weight"]))
        k = rope(rms(lin("self_attn.k_proj", h).reshape(n, kv, d), w[p + "self_attn.k_norm.weight"]))
        k, v = (np.repeat(t, heads // kv, 1) for t in (k, lin("self_attn.v_proj", h).reshape(n, kv, d)))
        s = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d) + np.triu(np.full((n, n), -np.inf), 1)
        x = x + lin("self_attn.o_proj", np.einsum("hqk,khd->qhd", softmax(s), v).reshape(n, -1))
        h = rms(x, w[p + "post_attention_layernorm.weight"])
        if i == PLAIN_LAYER:
            x = x + lin("mlp.down_proj", silu(lin("mlp.gate_proj", h)) * lin("mlp.up_proj", h))
            continue
        route = softmax(lin("mlp.gate", h))
        for r in range(n):
            chosen = np.argsort(-route[r], kind="stable")[:TOP_K]
            for e in chosen:
                gate, up = np.split(h[r] @ w[p + "mlp.experts.gate_up_proj"][e], 2)
                x[r] += route[r, e] / route[r, chosen].sum() * ((silu(gate) * up) @ w[p + "mlp.experts.down_proj"][e])
    return rms(x, w["model.language_model.norm.weight"]) @ w["lm_head.weight"].T


def test_logits_equal_a_direct_computation(checkpoint, say):
    m = qvl.Model(checkpoint, dtype="f32")
    ids = [int(t) for t in np.random.default_rng(1).integers(0, 4000, 50)]
    want = reference(checkpoint, ids)
    worst = np.abs(m.logits(ids) - want).max()
    say(f"mixture of experts: max abs logit difference {worst:.1e} (std {want.std():.1f})")
    assert worst < 1e-3


def test_same_bits_in_chunks_and_batches(checkpoint):
    m = qvl.Model(checkpoint, threads=2)
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
