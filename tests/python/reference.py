"""reference - Qwen3-VL's text model in numpy, as a direct computation to hold the engine against.

Job:        logits of chosen rows of one sequence, without paging, chunks or caches.
Input:      a checkpoint directory, token ids, M-RoPE positions, the embedding that stands in the place of picture tokens.
Output:     float logits.
Invariants: written from transformers' modeling_qwen3_vl; attention runs over slices of rows only to bound memory.
"""
import json

import numpy as np

from support import read_safetensors


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def inv_freq(config):
    """Frequencies and the factor of cos and sin; YaRN as transformers' _compute_yarn_parameters."""
    r = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    d, base = config["head_dim"], r.get("rope_theta") or config["rope_theta"]
    plain = 1 / base ** (np.arange(0, d, 2) / d)
    if r.get("rope_type", "default") == "default":
        return plain, 1.0

    def dim(turns):
        return d * np.log(r["original_max_position_embeddings"] / (turns * 2 * np.pi)) / (2 * np.log(base))
    low, high = max(np.floor(dim(32)), 0), min(np.ceil(dim(1)), d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    return plain / r["factor"] * ramp + plain * (1 - ramp), 0.1 * np.log(r["factor"]) + 1


def attention(q, k, v, rows, dtype):
    """Causal, of the given rows of q [n, heads, d] over all of k and v [n, kv, d]; [rows, heads * d]."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out, step = np.empty((len(rows), heads, q.shape[2]), dtype), max(64, (1 << 22) // len(k))
    for h in range(heads):
        keys, values = np.ascontiguousarray(k[:, h // group].T), np.ascontiguousarray(v[:, h // group])
        for a in range(0, len(rows), step):
            some = rows[a:a + step]
            n = some[-1] + 1
            s = (q[some, h] @ keys[:, :n]) * dtype(1 / np.sqrt(q.shape[2]))
            if some[0] + 1 < n:
                s[np.arange(n)[None] > np.asarray(some)[:, None]] = -np.inf
            s -= s.max(-1, keepdims=True)
            np.exp(s, out=s)
            out[a:a + len(some), h] = (s @ values[:n]) / s.sum(-1, keepdims=True)
    return out.reshape(len(rows), -1)


def text_logits(path, ids, positions=None, embedding=None, rows=None, dtype=np.float64, mlp=None):
    """Logits [rows, vocab] of a prompt; rows: all by default. embedding: [1 + deepstack, tokens, hidden] for the prompt's image
    pad tokens. mlp(i, h, lin, weights) replaces the plain MLP of layer i when it does not give None."""
    config = json.loads((path / "config.json").read_text())
    c = config["text_config"]
    w = {}
    for shard in sorted(path.glob("*.safetensors")):
        for name, value in read_safetensors(shard).items():
            w[name] = (value.astype(np.uint32) << 16).view(np.float32) if value.dtype == np.uint16 else value
            w[name] = w[name].astype(dtype)
    ids, n, d, heads, kv = np.asarray(ids), len(ids), c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    rows = np.arange(n) if rows is None else np.asarray(rows)
    positions = np.tile(np.arange(n), (3, 1)) if positions is None else positions
    axis = np.zeros(d // 2, int)  # interleaved M-RoPE: T H W T H W ...
    for a in (1, 2):
        axis[a:3 * (c.get("rope_scaling") or c["rope_parameters"])["mrope_section"][a]:3] = a
    frequency, scale = inv_freq(c)
    angle = positions[axis].T * frequency
    cos, sin = ((np.concatenate([f(angle)] * 2, -1) * scale)[:, None].astype(dtype) for f in (np.cos, np.sin))

    def rms(x, g):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + dtype(c["rms_norm_eps"])) * g

    def rope(x):
        return x * cos + np.concatenate([-x[..., d // 2:], x[..., :d // 2]], -1) * sin

    x = w["model.language_model.embed_tokens.weight"][ids]
    pads = np.flatnonzero(ids == config["image_token_id"])
    if embedding is not None:
        x[pads] = embedding[0]
    for i in range(c["num_hidden_layers"]):
        p, last = f"model.language_model.layers.{i}.", i == c["num_hidden_layers"] - 1

        def lin(name, v):
            return v @ w[p + name + ".weight"].T
        h = rms(x, w[p + "input_layernorm.weight"])
        q = rope(rms(lin("self_attn.q_proj", h).reshape(n, heads, d), w[p + "self_attn.q_norm.weight"]))
        k = rope(rms(lin("self_attn.k_proj", h).reshape(n, kv, d), w[p + "self_attn.k_norm.weight"]))
        v = lin("self_attn.v_proj", h).reshape(n, kv, d)
        some = rows if last else np.arange(n)  # behind the last attention only the wanted rows matter
        x = x[some] + lin("self_attn.o_proj", attention(q, k, v, some, dtype))
        h = rms(x, w[p + "post_attention_layernorm.weight"])
        y = mlp(i, h, lin, w) if mlp else None
        x = x + (lin("mlp.down_proj", silu(lin("mlp.gate_proj", h)) * lin("mlp.up_proj", h)) if y is None else y)
        if embedding is not None and i + 1 < len(embedding):
            where = np.searchsorted(pads, some)
            hit = (where < len(pads)) & (pads[np.minimum(where, len(pads) - 1)] == some)
            x[hit] += embedding[i + 1][where[hit]]
    head = w.get("lm_head.weight", w["model.language_model.embed_tokens.weight"])
    return rms(x, w["model.language_model.norm.weight"]) @ head.T
