"""test_moe - Qwen3-VL's mixture of experts against a direct computation in float64.

The reference is written from transformers' modeling_qwen3_vl_moe; the engine also gives transformers' own greedy tokens on a checkpoint of that
architecture, which is too large to keep here.
"""
import shutil

import numpy as np
import pytest

import qvl
from reference import silu, softmax, text_logits
from support import CHECKPOINTS, DEVICE, MIXTURE, drain, mixture, raw_safetensors, run, write_safetensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("moe"))


def experts(i, h, lin, w):
    """transformers' Qwen3VLMoeTextSparseMoeBlock."""
    if i == MIXTURE.plain_layer:
        return None
    p, route, y = f"model.language_model.layers.{i}.mlp.experts.", softmax(lin("mlp.gate", h)), np.zeros_like(h)
    for r in range(len(h)):
        chosen = np.argsort(-route[r], kind="stable")[:MIXTURE.top_k]
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
