"""Trains the tiny Qwen3-VL model from scratch on synthetic scenes. CPU, fp32, one process plus one that draws.

    python train.py --sight 1400 --steps 800 --decay 360 --run run    # train; --resume continues from run/last.pt
    python train.py --run run --export release                        # write the bf16 safetensors and the configuration files

The shipped weights were not made in one call; README.md tells which steps followed which recipe. --resume with a larger --steps raises
the rate again; a SIGTERM saves before it ends.

Every batch is a function of (seed, step), so a run can be repeated. The network below has the parameter names and the
arithmetic of Qwen3VLForConditionalGeneration; check.py compares the two.
Each row of a batch holds one picture and several independent questions about it: they share the picture's tokens as a
prefix, carry the positions they would have alone, and are masked from one another, so each is a true single question.
"""
import argparse
import contextlib
import fcntl
import json
import math
import multiprocessing as mp
import os
import queue
import random
import re
import signal
import time

import numpy as np

MERGES = 2500
BASE = 256 + MERGES
SP = {n: BASE + k for k, n in enumerate("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
                                        "vision_start vision_end vision_pad image_pad video_pad".split())}
VOCAB = 2816  # 2782 tokens, padded as the real checkpoint pads
CONFIG = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": SP["image_pad"], "model_type": "qwen3_vl",
    "text_config": {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": SP["endoftext"], "dtype": "bfloat16", "eos_token_id": SP["im_end"],
                    "head_dim": 64, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 384,
                    "max_position_embeddings": 4096, "model_type": "qwen3_vl_text", "num_attention_heads": 4, "num_hidden_layers": 4,
                    "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
                    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"},
                    "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": VOCAB},
    "tie_word_embeddings": True, "transformers_version": "4.57.0", "video_token_id": SP["video_pad"],
    "vision_config": {"deepstack_visual_indexes": [1, 2, 3], "depth": 5, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 128, "in_channels": 3,
                      "initializer_range": 0.02, "intermediate_size": 256, "model_type": "qwen3_vl", "num_heads": 4, "num_position_embeddings": 256,
                      "out_hidden_size": 128, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
    "vision_end_token_id": SP["vision_end"], "vision_start_token_id": SP["vision_start"],
}


@contextlib.contextmanager
def shared(path):
    """Holds a shared lock, so that whoever takes it exclusively pauses us."""
    if not path:
        yield
        return
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)


# ================================================================ data
GRIDS = [(h, w) for h in range(3, 13) for w in range(3, 13) if 9 <= h * w <= 64 and max(h, w) <= 2.4 * min(h, w)]  # in 32-pixel cells
GRID_W = [(h * w) ** -.75 * (1 if max(h, w) <= 8 else .35) for h, w in GRIDS]
_tok = None


def enc(text):
    """Token ids; text between \\x01 marks is spelled one character a token (what the model reads off a picture)."""
    out = []
    for k, part in enumerate(text.split("\x01")):
        out += [t for c in part for t in _tok.encode(c).ids] if k % 2 else _tok.encode(part, add_special_tokens=False).ids
    return out


def spell(answer, scene):
    return answer.replace(scene.text, f"\x01{scene.text}\x01", 1) if scene is not None and scene.text and (scene.text == answer or f'"{scene.text}"' in answer or f"“{scene.text}”" in answer) else answer


def patches(im, gh, gw):
    """uint8 [gh*gw*4, 3*16*16] in the processor's order (2x2 merge blocks)."""
    a = np.asarray(im, np.uint8).reshape(gh, 2, 16, gw, 2, 16, 3)
    return np.ascontiguousarray(a.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(gh * gw * 4, 768)


def dense(s, gh, gw):
    """Dense labels for the auxiliary loss: per cell shape, colour, box and an 8x8 figure mask; per 16-pixel patch the character centred there."""
    import scenes as S
    from PIL import Image
    m = np.asarray(s.idmap.resize((gw * 32, gh * 32), Image.NEAREST)).reshape(gh, 32, gw, 32).transpose(0, 2, 1, 3).reshape(gh * gw, 1024)
    shape, color, box, best = np.zeros(gh * gw, np.int64), np.zeros(gh * gw, np.int64), np.zeros((gh * gw, 4), np.float32), np.full(gh * gw, 50)
    for o in s.objects:
        n = (m == o["id"]).sum(1)
        hit = n > best
        best = np.where(hit, n, best)
        shape[hit], color[hit] = 1 + S.SHAPE_NAMES.index(o["shape"]), 1 + S.COLOR_NAMES.index(o["color"])
        x1, y1, x2, y2 = o["box"]
        box[hit] = (x1 / s.w, y1 / s.h, x2 / s.w, y2 / s.h)
    ch = np.zeros((gh * 2, gw * 2), np.int64)
    if s.text is not None:
        for x, y, c in s.chars:
            ch[min(gh * 2 - 1, int(y / s.h * gh * 2)), min(gw * 2 - 1, int(x / s.w * gw * 2))] = 1 + S.CHARS.index(c)
    ch = ch.reshape(gh, 2, gw, 2).transpose(0, 2, 1, 3).reshape(gh * gw, 4)
    fig = np.asarray(s.idmap.point(lambda v: 255 * (v > 0)).resize((gw * 8, gh * 8), Image.BOX)).reshape(gh, 8, gw, 8).transpose(0, 2, 1, 3).reshape(gh * gw, 64)
    return shape, color, box, ch, (fig > 127).astype(np.float32)


def fit(im, gh, gw):
    from PIL import Image
    return im if im.size == (gw * 32, gh * 32) else im.resize((gw * 32, gh * 32), Image.BICUBIC)


def draw(rng, gh, gw, **kw):
    import scenes as S
    import io
    from PIL import Image
    w, h = rng.randint(gw * 32 - 15, gw * 32 + 15), rng.randint(gh * 32 - 15, gh * 32 + 15)
    s = S.make_scene(rng, w, h, **kw)
    im = s.image
    if rng.random() < .5:
        b = io.BytesIO()
        im.save(b, "JPEG", quality=rng.randint(65, 95), subsampling=rng.choice((0, 2)))
        im = Image.open(b).convert("RGB")
    return s, patches(fit(im, gh, gw), gh, gw)


class Row:
    """One row of a batch: a prefix and branches. Positions follow Qwen3-VL's M-RoPE."""

    def __init__(self):
        self.ids, self.pos, self.seg, self.lab, self.br, self.wt, self.at, self.tasks = [], [], [], [], [], [], 0, []

    def text(self, ids, seg=0, learn=None):
        for k, t in enumerate(ids):
            self.ids.append(t)
            self.pos.append((self.at,) * 3)
            self.seg.append(seg)
            self.lab.append(-100)
            self.br.append(-1)
            self.wt.append(1.0)
            self.at += 1

    def image(self, gh, gw, pad):
        self.text([SP["vision_start"]])
        for y in range(gh):
            for x in range(gw):
                self.ids.append(pad)
                self.pos.append((self.at, self.at + y, self.at + x))
                self.seg.append(0)
                self.lab.append(-100)
                self.br.append(-1)
                self.wt.append(1.0)
        self.at += max(gh, gw)
        self.text([SP["vision_end"]])

    def answer(self, ids, seg, task):
        """Answer tokens: each is the label of the position before it."""
        n = len(self.ids)
        self.text(ids, seg)
        w = digit_weights(ids) if task[0].startswith("locate") else [1.0] * len(ids)
        for k, t in enumerate(ids):
            self.lab[n + k - 1] = t
            self.br[n + k - 1] = len(self.tasks)
            self.wt[n + k - 1] = w[k]
        self.tasks.append(task)


NL = None
DIGITS = None


def digit_weights(ids):
    """Weights of a box answer's tokens: a coordinate's first digit tells most, its last is mostly noise."""
    w, k = [1.0] * len(ids), 0
    while k < len(ids):
        n = 0
        while k + n < len(ids) and ids[k + n] in DIGITS:
            n += 1
        if n >= 2:
            w[k:k + n] = [2.0, .4] if n == 2 else [2.0, 1.2, .3, .3][:n]
        k += max(1, n)
    return w


def turn(row, seg, task, q, a, s, first):
    if not first:
        row.text(NL + [SP["im_start"]] + enc("user\n"), seg)
    row.text(enc(q) + [SP["im_end"]] + NL + [SP["im_start"]] + enc("assistant\n"), seg)
    ids = enc(spell(a, s)) + [SP["im_end"]]
    if task == "locate" and len(row.ids) % 5 < 3:  # most box answers stop after the box: the rest is words the model knows
        ids = ids[:1 + next((k for k, t in enumerate(ids) if t == CLOSE), len(ids))]
    row.answer(ids, seg, (task, a))


def build(seed, step, micro=0, rows=8, force=None):
    import scenes as S
    rng = random.Random(f"{seed}/{step}/{micro}")
    stage = 1 if step < 60 else 2 if step < 150 else 3 if step < 260 else 4
    kind = force or ("image" if step < 150 else rng.choices(("image", "textfirst", "pair", "video", "text"), (.74, .08, .07, .06, .05) if step < 800 else (.86, .03, .03, .03, .05))[0])
    level = min(1.0, .3 + step / 500)
    system = enc("") if rng.random() < .88 else [SP["im_start"]] + enc("system\n") + enc("You are a helpful assistant.") + [SP["im_end"]] + NL
    head = system + [SP["im_start"]] + enc("user\n")
    out = dict(kind=kind, px=[], grids=[], aux=[])
    R = []
    if kind == "dense":  # pictures and dense labels only
        gh, gw = rng.choices(GRIDS, GRID_W)[0]
        d = [draw(rng, gh, gw, max_shapes=rng.randint(1, 4), level=min(1.0, .2 + step / 500)) for _ in range(rows)]
        return dict(kind=kind, px=[np.stack([p for _, p in d])], grids=[(gh, gw)], aux=[[np.stack(x) for x in zip(*(dense(s, gh, gw) for s, _ in d))]])
    if kind in ("image", "textfirst"):
        gh, gw = rng.choices(GRIDS, GRID_W)[0]
        while step < 150 and gh * gw > 20:  # small pictures first, they are quick
            gh, gw = rng.choices(GRIDS, GRID_W)[0]
        px, aux = [], []
        n = rows if kind == "image" else rows * 2
        budget = 150
        for _ in range(n):
            # easy scenes keep coming: they are also what a newcomer tries first
            ms = rng.choice((1, 2, 3, 4, 4, 4) if step < 800 else (1, 1, 2, 3, 4, 4)) if stage == 4 else stage
            s, p = draw(rng, gh, gw, max_shapes=ms, min_shapes=ms if rng.random() < .5 else 1, level=level)
            px.append(p)
            aux.append(dense(s, gh, gw))
            qs = S.questions(s, rng)
            r = Row()
            if kind == "textfirst":
                t, q, a, m = next(qs)
                r.text(head + enc(q))
                r.image(gh, gw, SP["image_pad"])
                r.text([SP["im_end"]] + NL + [SP["im_start"]] + enc("assistant\n"))
                r.answer(enc(spell(a, s)) + [SP["im_end"]], 0, (t, a))
            else:
                r.text(head)
                r.image(gh, gw, SP["image_pad"])
                at0, n0, seg = r.at, len(r.ids), 1
                tries = 0
                asked = set()
                while len(r.ids) - n0 < budget - 12 and tries < 12:
                    tries += 1
                    t, q, a, m = next(qs)
                    if q in asked or (t in asked and t in ("read", "caption", "count", "background")):
                        continue
                    if seg > 1 and len(r.ids) - n0 + len(enc(q)) + len(enc(a)) + 6 > budget + 8:
                        continue
                    asked |= {q, t}
                    r.at = at0
                    turn(r, seg, t, q, a, s, True)
                    if rng.random() < .12 and len(r.ids) - n0 < budget - 30:
                        t, q, a, m = next(qs)
                        while len(a) > 40:
                            t, q, a, m = next(qs)
                        turn(r, seg, "turn2", q, a, s, False)
                    seg += 1
            R.append(r)
        out["px"].append(np.stack(px))
        out["grids"].append((gh, gw))
        out["aux"].append([np.stack(x) for x in zip(*aux)])
    elif kind == "pair":
        small = [g for g in GRIDS if g[0] * g[1] <= 36]
        gs = [rng.choice(small), rng.choice(small)]
        pxs, auxs = ([], []), ([], [])
        for _ in range(rows * 2 // 3):
            ss = []
            r = Row()
            r.text(head)
            for k, (gh, gw) in enumerate(gs):
                s, p = draw(rng, gh, gw, kind="shapes", max_shapes=min(stage, 4), level=level)
                pxs[k].append(p)
                auxs[k].append(dense(s, gh, gw))
                r.image(gh, gw, SP["image_pad"])
                ss.append(s)
            at0, seg = r.at, 1
            asked = set()
            qs = S.pair_questions(*ss, rng)
            for _ in range(9):
                t, q, a, m = next(qs)
                if q in asked or seg > 5:
                    continue
                asked.add(q)
                r.at = at0
                turn(r, seg, t, q, a, None, True)
                seg += 1
            R.append(r)
        for k in range(2):
            out["px"].append(np.stack(pxs[k]))
            out["grids"].append(gs[k])
            out["aux"].append([np.stack(x) for x in zip(*auxs[k])])
    elif kind == "video":
        gh, gw = rng.choice([g for g in GRIDS if g[0] * g[1] <= 20])
        frames = rng.choice((4, 6, 8))
        fps = rng.choice((1, 2, 2, 2, 4, 24))
        nested = rng.random() < .5  # both spellings of a video prompt exist
        px = []
        for _ in range(rows * 2 // 3):
            ims, o, move, s = S.make_video(rng, gw * 32, gh * 32, frames)
            f = [patches(x, gh, gw).reshape(-1, 3, 1, 256) for x in ims]
            px.append(np.concatenate([np.concatenate((f[2 * k], f[2 * k + 1]), 2) for k in range(frames // 2)]).reshape(-1, 1536))
            r = Row()
            r.text(head + ([SP["vision_start"]] if nested else []))
            for k in range(frames // 2):
                r.text(enc(f"<{(4 * k + 1) / 2 / fps:.1f} seconds>"))
                r.image(gh, gw, SP["video_pad"])
            if nested:
                r.text([SP["vision_end"]])
            at0, seg, asked = r.at, 1, set()
            qs = S.video_questions(o, move, s, rng)
            for _ in range(6):
                t, q, a, m = next(qs)
                if q in asked or seg > 4:
                    continue
                asked.add(q)
                r.at = at0
                turn(r, seg, t, q, a, None, True)
                seg += 1
            R.append(r)
        out["px"].append(np.stack(px))
        out["grids"].append((gh, gw))
        out["frames"] = frames // 2
    else:
        for _ in range(rows):
            r = Row()
            r.text(head)
            at0 = r.at
            for seg in range(1, 9):
                r.at = at0
                t, q, a, m = S.chat_question(rng)
                turn(r, seg, t, q, a, None, True)
            R.append(r)
    n = max(len(r.ids) for r in R)
    out["ids"] = np.full((len(R), n), SP["endoftext"], np.int64)
    out["pos"] = np.zeros((len(R), n, 3), np.int64)
    out["seg"] = np.full((len(R), n), -1, np.int64)
    out["lab"] = np.full((len(R), n), -100, np.int64)
    out["br"] = np.full((len(R), n), -1, np.int64)
    out["wt"] = np.ones((len(R), n), np.float32)
    out["tasks"] = []
    for k, r in enumerate(R):
        m = len(r.ids)
        out["ids"][k, :m], out["pos"][k, :m], out["seg"][k, :m], out["lab"][k, :m] = r.ids, r.pos, r.seg, r.lab
        out["wt"][k, :m] = r.wt
        b = np.array(r.br)
        out["br"][k, :m] = np.where(b >= 0, b + len(out["tasks"]), -1)
        out["tasks"] += r.tasks
    return out


def start(tokenizer):
    global _tok, NL, DIGITS, CLOSE
    from tokenizers import Tokenizer
    _tok = Tokenizer.from_file(tokenizer)
    NL = enc("\n")
    DIGITS = {enc(c)[0] for c in "0123456789"}
    CLOSE = enc('9], "')[1]


def drawer(tokenizer, seed, first, micros, rows, lock, force, q):
    os.nice(max(0, 19 - os.nice(0)))
    os.environ["OMP_NUM_THREADS"] = "1"
    start(tokenizer)
    step = first
    while True:
        for k in range(micros):
            with shared(lock):
                b = build(seed, step, k, rows, force)
            q.put(b)
        step += 1


# ================================================================ model
import torch  # noqa: E402  (the drawing process forks before torch has threads)
from torch import nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


def mlp(a, b, c, bias=True):
    m = nn.Module()
    m.linear_fc1, m.linear_fc2 = nn.Linear(a, b, bias=bias), nn.Linear(b, c, bias=bias)
    return m


class RMS(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


def rotate(x, cos, sin):
    h = x.shape[-1] // 2
    a, b = x[..., :h], x[..., h:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Merger(nn.Module):
    def __init__(self, d, out, post):
        super().__init__()
        self.post = post
        self.norm = nn.LayerNorm(4 * d if post else d, eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(4 * d, 4 * d), nn.Linear(4 * d, out)

    def forward(self, x):
        B, N, D = x.shape
        x = self.norm(x.reshape(B, N // 4, 4 * D)) if self.post else self.norm(x).reshape(B, N // 4, 4 * D)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class Vision(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = self.d = c["hidden_size"]
        self.heads, self.side, self.deep = c["num_heads"], int(c["num_position_embeddings"] ** .5), c["deepstack_visual_indexes"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, d, (2, 16, 16), (2, 16, 16))
        self.pos_embed = nn.Embedding(c["num_position_embeddings"], d)
        self.blocks = nn.ModuleList()
        for _ in range(c["depth"]):
            b = nn.Module()
            b.norm1, b.norm2, b.attn = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6), nn.Module()
            b.attn.qkv, b.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
            b.mlp = mlp(d, c["intermediate_size"], d)
            self.blocks.append(b)
        self.merger = Merger(d, c["out_hidden_size"], False)
        self.deepstack_merger_list = nn.ModuleList(Merger(d, c["out_hidden_size"], True) for _ in self.deep)

    def tables(self, gh, gw):
        """Resampled position embeddings and rotary tables of a gh x gw grid of 2x2 blocks, in merge order."""
        h, w = gh * 2, gw * 2
        e = self.pos_embed.weight.view(self.side, self.side, self.d)

        def axis(n):
            t = torch.linspace(0, self.side - 1, n)
            lo = t.floor().long()
            return lo, (lo + 1).clamp(max=self.side - 1), (t - lo)
        y0, y1, fy = axis(h)
        x0, x1, fx = axis(w)
        r = e[y0] * (1 - fy)[:, None, None] + e[y1] * fy[:, None, None]
        p = r[:, x0] * (1 - fx)[None, :, None] + r[:, x1] * fx[None, :, None]
        p = p.view(gh, 2, gw, 2, self.d).transpose(1, 2).reshape(h * w, self.d)
        yy = torch.arange(h)[:, None].expand(h, w).reshape(gh, 2, gw, 2).transpose(1, 2).reshape(-1)
        xx = torch.arange(w)[None, :].expand(h, w).reshape(gh, 2, gw, 2).transpose(1, 2).reshape(-1)
        n = self.d // self.heads // 2
        inv = 1.0 / (10000.0 ** (torch.arange(0, n, 2).float() / n))
        f = torch.cat((yy[:, None] * inv, xx[:, None] * inv), -1)
        return p, f.cos(), f.sin()

    def forward(self, px, gh, gw):
        """px: float [B, gh*gw*4, 768 or 1536] in -1..1"""
        w = self.patch_embed.proj.weight
        w = (w.sum(2) if px.shape[-1] == 768 else w).reshape(self.d, -1)
        p, cos, sin = self.tables(gh, gw)
        x = F.linear(px, w, self.patch_embed.proj.bias) + p
        B, N, D = x.shape
        deep = []
        for k, b in enumerate(self.blocks):
            q, kk, v = b.attn.qkv(b.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(kk, cos, sin), v)
            x = x + b.attn.proj(o.transpose(1, 2).reshape(B, N, D))
            x = x + b.mlp.linear_fc2(F.gelu(b.mlp.linear_fc1(b.norm2(x)), approximate="tanh"))
            if k in self.deep:
                deep.append(self.deepstack_merger_list[self.deep.index(k)](x))
        return self.merger(x), deep


class Text(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, hd = c["hidden_size"], c["head_dim"]
        self.hd, self.nh, self.nk, self.theta, self.section = hd, c["num_attention_heads"], c["num_key_value_heads"], c["rope_theta"], c["rope_scaling"]["mrope_section"]
        self.embed_tokens = nn.Embedding(c["vocab_size"], d)
        self.layers = nn.ModuleList()
        for _ in range(c["num_hidden_layers"]):
            l = nn.Module()
            l.self_attn, l.mlp = nn.Module(), nn.Module()
            a = l.self_attn
            a.q_proj, a.k_proj, a.v_proj = nn.Linear(d, self.nh * hd, bias=False), nn.Linear(d, self.nk * hd, bias=False), nn.Linear(d, self.nk * hd, bias=False)
            a.o_proj, a.q_norm, a.k_norm = nn.Linear(self.nh * hd, d, bias=False), RMS(hd), RMS(hd)
            f = c["intermediate_size"]
            l.mlp.gate_proj, l.mlp.up_proj, l.mlp.down_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)
            l.input_layernorm, l.post_attention_layernorm = RMS(d), RMS(d)
            self.layers.append(l)
        self.norm = RMS(d)

    def rope(self, pos):
        inv = 1.0 / (self.theta ** (torch.arange(0, self.hd, 2).float() / self.hd))
        pos = pos.float()
        f = pos[..., 0:1] * inv
        for dim in (1, 2):
            idx = slice(dim, self.section[dim] * 3, 3)
            f[..., idx] = pos[..., dim:dim + 1] * inv[idx]
        return f.cos()[:, None], f.sin()[:, None]

    def forward(self, x, pos, mask, vis, deep):
        B, S, D = x.shape
        cos, sin = self.rope(pos)
        for k, l in enumerate(self.layers):
            a, h = l.self_attn, l.input_layernorm(x)
            q = rotate(a.q_norm(a.q_proj(h).view(B, S, self.nh, -1)).transpose(1, 2), cos, sin)
            kk = rotate(a.k_norm(a.k_proj(h).view(B, S, self.nk, -1)).transpose(1, 2), cos, sin)
            v = a.v_proj(h).view(B, S, self.nk, -1).transpose(1, 2)
            g = self.nh // self.nk
            o = F.scaled_dot_product_attention(q, kk.repeat_interleave(g, 1), v.repeat_interleave(g, 1), attn_mask=mask)
            x = x + a.o_proj(o.transpose(1, 2).reshape(B, S, -1))
            h = l.post_attention_layernorm(x)
            x = x + l.mlp.down_proj(F.silu(l.mlp.gate_proj(h)) * l.mlp.up_proj(h))
            if k < len(deep):
                x = x.reshape(B * S, D).index_add(0, vis, deep[k]).view(B, S, D)
        return self.norm(x)


class Net(nn.Module):
    def __init__(self, config=CONFIG, aux=True):
        super().__init__()
        self.model = nn.Module()
        self.model.visual, self.model.language_model = Vision(config["vision_config"]), Text(config["text_config"])
        d = config["text_config"]["hidden_size"]
        self.aux = nn.Linear(d, 8 + 11 + 4 + 4 * 37 + 64)  # training only
        self.bins = nn.Linear(d, 4 * 50)  # training only: box edges as classes, a form the text layers read digits from more easily than from a line
        L = config["text_config"]["num_hidden_layers"]
        for n, p in self.named_parameters():
            if n.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in n:
                pass
            elif "embed" in n and p.ndim == 2:
                nn.init.normal_(p, std=.02)
            else:
                fan = p[0].numel()
                std = .7 / math.sqrt(fan)
                if n.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")):
                    std /= math.sqrt(2 * L)
                nn.init.normal_(p, std=std)
        self.smooth_start()

    @torch.no_grad()
    def smooth_start(self):
        """Patch filters start as the lowest cosine waves of each colour channel, positions as sines of row and column."""
        v = self.model.visual
        k = torch.arange(16).float()
        c = torch.cos(math.pi * (k[None, :] + .5) * k[:, None] / 16) / 4 * math.sqrt(.5)
        c[1:] *= math.sqrt(2)
        waves = sorted(((y, x) for y in range(16) for x in range(16)), key=lambda t: (t[0] ** 2 + t[1] ** 2, t))
        w = v.patch_embed.proj.weight
        for n in range(w.shape[0]):
            y, x = waves[n // 3]
            w[n] = 0
            w[n, n % 3] = torch.outer(c[y], c[x]) / 2 * (1 / 16 if x == y == 0 else 1 / 8)
        side, d = v.side, v.d
        t = torch.linspace(0, 1, side)
        f = torch.arange(1, d // 4 + 1).float() ** 1.0 * math.pi / 4
        e = torch.cat((torch.sin(t[:, None] * f), torch.cos(t[:, None] * f)), 1) * .15
        v.pos_embed.weight.copy_(torch.cat((e[:, None].expand(side, side, d // 2), e[None].expand(side, side, d // 2)), 2).reshape(side * side, d))

    def forward(self, b):
        """Returns (features at the label positions, labels, branch numbers, aux features per slot)."""
        ids = torch.from_numpy(b["ids"])
        seg, pos = torch.from_numpy(b["seg"]), torch.from_numpy(b["pos"])
        B, S = ids.shape
        x = self.model.language_model.embed_tokens(ids)
        vis, deep, feats = None, [], []
        if b["px"]:
            outs = []
            for p, (gh, gw) in zip(b["px"], b["grids"]):
                px = torch.from_numpy(p).float().mul_(2 / 255).sub_(1)
                t = b.get("frames", 1)
                m, dd = self.model.visual(px.view(B * t, -1, px.shape[-1]), gh, gw)
                feats.append(m)
                outs.append([y.reshape(B, -1, y.shape[-1]) for y in [m] + dd])
            y = [torch.cat(z, 1).reshape(-1, x.shape[-1]) for z in zip(*outs)]
            vis = ((ids == SP["image_pad"]) | (ids == SP["video_pad"])).view(-1).nonzero().view(-1)
            x = x.view(B * S, -1).index_copy(0, vis, y[0]).view(B, S, -1)
            deep = y[1:]
        causal = torch.ones(S, S, dtype=torch.bool).tril_()
        ok = causal & ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])) | torch.eye(S, dtype=torch.bool)
        mask = torch.zeros(B, 1, S, S).masked_fill_(~ok[:, None], float("-inf"))
        h = self.model.language_model(x, pos, mask, vis, deep).view(B * S, -1)
        lab = torch.from_numpy(b["lab"]).view(-1)
        at = (lab >= 0).nonzero().view(-1)
        return h[at], lab[at], torch.from_numpy(b["br"]).view(-1)[at], feats

    @torch.no_grad()
    def sees(self, batches):
        """Shares of cells whose shape, colour, character the auxiliary head names; mean error of its boxes."""
        out = np.zeros((5, 2))
        for b in batches:
            (gh, gw), p = b["grids"][0], b["px"][0]
            y = self.aux(F.rms_norm(self.model.visual(torch.from_numpy(p).float().mul_(2 / 255).sub_(1), gh, gw)[0], (self.aux.in_features,)))
            sh, co, bx, ch, fig = (torch.from_numpy(z) for z in b["aux"][0])
            fg, tx = sh > 0, ch > 0
            out[:, 1] += fg.sum(), fg.sum(), fg.sum(), tx.sum(), fg.sum() * 64
            out[:, 0] += ((y[..., :8].argmax(-1) == sh) & fg).sum(), ((y[..., 8:19].argmax(-1) == co) & fg).sum(), (y[..., 19:23] * .1 + .5 - bx).abs().mean(-1)[fg].sum(), \
                ((y[..., 23:171].reshape(*ch.shape, 37).argmax(-1) == ch) & tx).sum(), (((y[..., 171:] > 0) == (fig > 0)).sum(-1) * fg).sum()
        return "shape %.3f colour %.3f box %.4f char %.3f mask %.3f" % tuple(out[:, 0] / out[:, 1].clip(1))

    def look(self, b):
        """Vision tower only: the auxiliary loss of a batch of pictures."""
        (gh, gw), p = b["grids"][0], b["px"][0]
        return self.extra([self.model.visual(torch.from_numpy(p).float().mul_(2 / 255).sub_(1), gh, gw)[0]], b)

    def loss(self, b):
        h, lab, br, feats = self(b)
        logits = F.linear(h, self.model.language_model.embed_tokens.weight)
        w = torch.from_numpy(b["wt"]).view(-1)[torch.from_numpy(b["lab"]).view(-1) >= 0]
        return (F.cross_entropy(logits, lab, reduction="none") * w).sum() / w.sum(), self.extra(feats, b), logits, lab, br

    def extra(self, feats, b):
        extra = torch.zeros(())
        for f, a in zip(feats, b["aux"]):
            y = self.aux(F.rms_norm(f, (f.shape[-1],)))
            sh, co, bx, ch, fig = (torch.from_numpy(z) for z in a)
            fg = sh.view(-1) > 0
            y = y.view(-1, y.shape[-1])
            w = torch.where(fg, 1.0, .25)
            extra = extra + (F.cross_entropy(y[:, :8], sh.view(-1), reduction="none") * w).sum() / w.sum()
            extra = extra + (F.cross_entropy(y[:, 8:19], co.view(-1), reduction="none") * w).sum() / w.sum()
            if fg.any():
                edge = (bx.view(-1, 4)[fg] * 50).long().clamp(0, 49).view(-1)
                extra = extra + .6 * F.cross_entropy(self.bins(F.rms_norm(f, (f.shape[-1],)).view(-1, f.shape[-1])[fg]).view(-1, 50), edge)
                extra = extra + 12 * F.smooth_l1_loss(y[fg, 19:23] * .1 + .5, bx.view(-1, 4)[fg], beta=.05)
            c = ch.view(-1)
            w = torch.where(c > 0, 1.0, .1)
            extra = extra + 1.5 * (F.cross_entropy(y[:, 23:171].reshape(-1, 37), c, reduction="none") * w).sum() / w.sum()
            extra = extra + 4 * F.binary_cross_entropy_with_logits(y[:, 171:], fig.view(-1, 64))
        return extra


# ================================================================ optimiser
def orthogonal(g):
    """Newton-Schulz iteration of Muon on a stack of matrices."""
    t = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if t else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(-1, -2) if t else x


class Muon:
    def __init__(self, params, lr, vision, momentum=.95, wd=.01):
        self.lr, self.mu, self.wd = lr, momentum, wd
        self.groups, self.rate = {}, {}
        for n, p in params:
            k = 3 if n.endswith("qkv.weight") else 1
            self.groups.setdefault((p.shape[0] // k, p.shape[1]), []).append((p, k))
            self.rate[p] = vision if "visual." in n and "deepstack" not in n else 1.0
        self.buf = {s: torch.zeros(sum(k for _, k in g), *s) for s, g in self.groups.items()}

    @torch.no_grad()
    def step(self, mult):
        for s, g in self.groups.items():
            grad = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).view(k, *s) for p, k in g])
            self.buf[s].lerp_(grad, 1 - self.mu)
            u = orthogonal(grad.lerp(self.buf[s], self.mu)) * max(1, s[0] / s[1]) ** .5
            at = 0
            for p, k in g:
                lr = self.lr * mult * self.rate[p]
                p.mul_(1 - lr * self.wd).add_(u[at:at + k].reshape(p.shape), alpha=-lr)
                at += k

    def state(self):
        return {str(k): v for k, v in self.buf.items()}

    def load(self, s):
        for k in self.buf:
            self.buf[k].copy_(s[str(k)])


class Both:
    """Muon for hidden matrices, AdamW for the rest."""

    def __init__(self, named, muon, adam, vision):
        """vision: the vision tower learns at this fraction of the rate (small batches give it noisy gradients)"""
        m, fast, slow, fc, bins = [], [], [], [], []
        for n, p in named:
            if p.ndim == 2 and ("layers." in n or "blocks." in n or "linear_fc2" in n):
                m.append((n, p))
            else:
                (bins if n.startswith("bins") else slow if "patch_embed.proj.weight" in n else fc if "visual." in n and p.ndim == 1 or "linear_fc1.weight" in n or n.startswith("aux") or "pos_embed" in n else fast).append(p)
        self.muon = Muon(m, muon, vision)
        self.adam = torch.optim.AdamW([{"params": fast, "lr": adam}, {"params": slow, "lr": adam / 15}, {"params": fc, "lr": adam / 4}, {"params": bins, "lr": adam}], betas=(.9, .98), weight_decay=0.0)
        self.base = [g["lr"] for g in self.adam.param_groups]

    def step(self, mult):
        self.muon.step(mult)
        for g, lr in zip(self.adam.param_groups, self.base):
            g["lr"] = lr * mult
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for g in self.muon.groups.values():
            for p, _ in g:
                p.grad = None

    def state(self):
        return {"muon": self.muon.state(), "adam": self.adam.state_dict()}

    def load(self, s):
        self.muon.load(s["muon"])
        mine = self.adam.state_dict()["param_groups"]
        s["adam"]["param_groups"] += mine[len(s["adam"]["param_groups"]):]  # a state from before the bins
        self.adam.load_state_dict(s["adam"])


# ================================================================ checks on held-out batches
def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    i = max(0, w) * max(0, h)
    return i / max(1e-9, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - i)


@torch.no_grad()
def probe(net, batches):
    """Share of answers whose every token is the model's first choice (what greedy decoding would give)."""
    got, total, loss = {}, {}, []
    for b in batches:
        main, _, logits, lab, br = net.loss(b)
        loss.append(float(main))
        pred = logits.argmax(-1)
        for k, (task, a) in enumerate(b["tasks"]):
            m = br == k
            if task in ("locate", "locate_all"):
                boxes = [[int(v) for v in x] for x in re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", _tok.decode(pred[m].tolist(), skip_special_tokens=False))]
                want = [json.loads(x) for x in re.findall(r"\[\d[^\]]*\]", a)]
                ok = len(boxes) == len(want) and all(iou(x, y) >= .5 for x, y in zip(boxes, want))
            else:
                ok = bool((pred[m] == lab[m]).all())
            got[task], total[task] = got.get(task, 0) + ok, total.get(task, 0) + 1
    return sum(loss) / len(loss), {t: round(got[t] / total[t], 3) for t in sorted(total)}


# ================================================================ workers
def work(k, a, shared_net, out, free, ready, version, weight, turnstile):
    """Draws micro-batches and hands their gradients over: one thread a worker, so no core waits for another inside a step (on a busy machine
    that costs more than anything else). A gradient may be made from weights one step old."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    net = Net()
    mine, theirs = list(net.parameters()), list(shared_net.parameters())
    while True:
        with turnstile.get_lock():
            at = turnstile.value
            turnstile.value += 1
        t = time.process_time()
        b = build(a.seed, at // a.micros, at % a.micros, a.rows)
        made = version.value
        with torch.no_grad():
            for p, q in zip(mine, theirs):
                p.copy_(q)
                p.grad = None
        main_loss, extra, *_ = net.loss(b)
        (main_loss + weight.value * extra).backward()
        cpu = time.process_time() - t
        free.acquire()
        torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in mine], out=out)
        ready.put((k, made, b["kind"], main_loss.item(), extra.item(), cpu))


# ================================================================ main
def export(net, out):
    from safetensors.torch import save_file
    os.makedirs(out, exist_ok=True)
    sd = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in net.state_dict().items() if n.startswith("model.")}
    save_file(sd, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    size = {"longest_edge": 65536, "shortest_edge": 9216}
    common = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [.5] * 3, "image_std": [.5] * 3}
    for name, obj in (
            ("config.json", CONFIG),
            ("generation_config.json", {"bos_token_id": SP["endoftext"], "do_sample": False, "eos_token_id": [SP["im_end"], SP["endoftext"]],
                                        "pad_token_id": SP["endoftext"], "transformers_version": "4.57.0"}),
            ("preprocessor_config.json", {"size": size, **common, "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}),
            ("video_preprocessor_config.json", {"size": {"longest_edge": 8 * 65536, "shortest_edge": 4 * 9216}, **common, "min_frames": 4, "max_frames": 8,
                                                "processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"})):
        with open(os.path.join(out, name), "w") as f:
            json.dump(obj, f, indent=2)
            f.write("\n")
    print("parameters", sum(x.numel() for x in sd.values()), "bytes", os.path.getsize(os.path.join(out, "model.safetensors")))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--steps", type=int, default=3000)
    ap.add_argument("--decay", type=int, default=1000, help="steps of linear decay at the end")
    ap.add_argument("--sight", type=int, default=600, help="steps of the vision tower alone, before")
    ap.add_argument("--until", type=int, help="stop the first phase here (its schedule still follows --sight)")
    ap.add_argument("--rows", type=int, default=8, help="rows of a micro-batch: few, so that it stays in the cache")
    ap.add_argument("--micros", type=int, default=2, help="micro-batches of a step")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--muon", type=float, default=.012)
    ap.add_argument("--adam", type=float, default=2e-3)
    ap.add_argument("--vision", type=float, default=.35, help="the vision tower's share of --muon in the second phase")
    ap.add_argument("--threads", type=int, default=2, help="worker processes of the second phase, threads of the first")
    ap.add_argument("--end", type=float, default=0, help="stop by the clock: seconds since 1970, with a linear decay over the last --cool seconds")
    ap.add_argument("--cool", type=float, default=1800)
    ap.add_argument("--tokenizer", default="release/tokenizer.json")
    ap.add_argument("--run", default="run")
    ap.add_argument("--resume", action="store_true")
    ap.add_argument("--lock", default="", help="file to hold a shared lock on during each step")
    ap.add_argument("--every", type=int, default=100, help="steps between lines of the log")
    ap.add_argument("--export")
    a = ap.parse_args()
    start(a.tokenizer)
    last = os.path.join(a.run, "last.pt")
    if a.export:
        net = Net()
        net.load_state_dict(torch.load(last)["net"], strict=False)
        export(net, a.export)
        return
    os.nice(max(0, 19 - os.nice(0)))
    os.makedirs(a.run, exist_ok=True)
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    net = Net()
    log = open(os.path.join(a.run, "log.txt"), "a")

    def say(*x):
        print(*x, flush=True)
        print(*x, file=log, flush=True)

    def source(first, micros, rows, force=None):
        q = mp.Queue(12)
        w = mp.Process(target=drawer, args=(a.tokenizer, a.seed, first, micros, rows, a.lock, force, q), daemon=True)
        w.start()
        return q, w

    step, spent = 0, 0.0
    c = torch.load(last) if a.resume and os.path.exists(last) else None
    sight = os.path.join(a.run, "sight.pt")
    if c:
        net.load_state_dict(c["net"], strict=False)
    elif a.sight:  # first the vision tower alone, on dense labels: pictures are cheap while there is no text to run
        opt = Both([(n, p) for n, p in net.named_parameters() if n.startswith(("aux", "bins")) or "visual" in n and "deepstack" not in n], a.muon, a.adam, .6)
        k0 = 0
        if a.resume and os.path.exists(sight):
            d = torch.load(sight)
            net.load_state_dict(d["net"], strict=False)
            opt.load(d["opt"])
            k0, spent = d["step"], d["spent"]
        q, worker = source(k0, 1, 24, "dense")
        began = saved = time.time()
        avg = None
        for k in range(k0, min(a.sight, a.until or a.sight)):
            b = q.get()
            with shared(a.lock):
                t = time.time()
                l = net.look(b)
                l.backward()
                opt.step(min(1.0, (k + 1) / 40, max(.05, 1.6 * (a.sight - k) / a.sight)))
                spent += time.time() - t
            time.sleep(.01)
            avg = l.item() if avg is None else .96 * avg + .04 * l.item()
            if (k + 1) % a.every == 0:
                torch.save({"net": net.state_dict(), "opt": opt.state(), "step": k + 1, "spent": spent}, sight)
                say(f"sight {k + 1} loss {avg:.3f} spent {spent:.0f}s wall {time.time() - began:.0f}s queue {q.qsize()}", net.sees([build(a.seed + 10 ** 6, 0, j, 16, "dense") for j in range(3)]))
        worker.terminate()
        if a.until and a.until < a.sight:
            return
    opt = Both(list(net.named_parameters()), a.muon, a.adam, a.vision)
    if c:
        opt.load(c["opt"])
        step, spent = c["step"], c["spent"]
    held = [build(a.seed + 10 ** 6, 10 ** 6, k, 8, f) for k, f in enumerate(("image",) * 16 + ("pair", "video", "text"))]

    def save():
        torch.save({"net": net.state_dict(), "opt": opt.state(), "step": step, "spent": spent, "args": vars(a)}, last + ".tmp")
        os.replace(last + ".tmp", last)

    net.share_memory()
    ready, version, weight, turnstile = mp.Queue(), mp.Value("q", step), mp.Value("d", .5), mp.Value("q", step * a.micros)
    grads = [torch.zeros(sum(p.numel() for p in net.parameters())).share_memory_() for _ in range(a.threads)]
    free = [mp.Semaphore(1) for _ in range(a.threads)]
    workers = [mp.Process(target=work, args=(k, a, net, grads[k], free[k], ready, version, weight, turnstile), daemon=True) for k in range(a.threads)]
    for w in workers:
        w.start()
    torch.set_num_threads(1)
    say("parameters", sum(p.numel() for n, p in net.named_parameters() if n.startswith("model.")), "steps", step, "to", a.steps, "decay", a.decay, "end", a.end, "cool", a.cool)
    saved, began = time.time(), time.time()
    avg = aavg = None
    late = 0
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))  # kill saves before it ends
    while step < a.steps and not stop:
        mult = min(1.0, (step + 1) / 60, max(.01, (a.steps - step) / a.decay))
        if a.end:
            left = a.end - time.time()
            mult = min(mult, max(.01, left / a.cool))
            if left <= 0:
                break
        weight.value = .5 * max(.4, mult)
        n = 0
        while n < a.micros and not stop:
            try:
                k, made, kind, main_loss, extra, cpu = ready.get(timeout=1)
            except queue.Empty:
                continue
            spent += cpu / a.threads
            if step - made <= 3:
                at = 0
                for p in net.parameters():
                    g = grads[k][at:at + p.numel()].view_as(p)
                    at += p.numel()
                    if n == 0:
                        p.grad = g / a.micros
                    else:
                        p.grad.add_(g, alpha=1 / a.micros)
                n += 1
            late += step > made
            free[k].release()
            if kind == "image":
                avg = main_loss if avg is None else .97 * avg + .03 * main_loss
                aavg = extra if aavg is None else .97 * aavg + .03 * extra
        if stop:
            break
        t = time.process_time()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step(mult)
        spent += (time.process_time() - t) / a.threads
        step += 1
        version.value = step
        if step % a.every == 0:
            say(f"step {step} loss {avg:.4f} aux {aavg:.3f} lr x{mult:.2f} spent {spent:.0f}s wall {time.time() - began:.0f}s late {late}")
        if step % (a.every * 6) == 0:
            l, acc = probe(net, held)
            say(f"  held-out loss {l:.4f}", json.dumps(acc))
        if time.time() - saved > 120:
            save()
            saved = time.time()
    save()
    for w in workers:
        w.terminate()


if __name__ == "__main__":
    main()
