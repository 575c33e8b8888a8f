"""make_rope - the goldens of rotary embeddings and YaRN, computed by transformers.

    python tests/golden/make_rope.py        # needs torch and transformers; writes tests/golden/rope/

rope.json: for several text configs the inverse frequencies, the factor of cos and sin, and cos and sin at some M-RoPE
positions up to a million, from Qwen3VLTextRotaryEmbedding. yarn_logits.npy: float32[4, vocab], the logits of rows 60, 127, 128
and 199 of tiny-dense-tied over the token ids that test_long.py draws, with YARN below in its config.
"""
import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.qwen3_vl import modeling_qwen3_vl as q
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

HERE = pathlib.Path(__file__).parent
PUBLISHED = {"rope_type": "yarn", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5000000.0}
YARN = {**PUBLISHED, "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "default": {**PUBLISHED, "rope_type": "default"},
    "published, factor 3": {**PUBLISHED, "factor": 3.0, "original_max_position_embeddings": 262144},
    "factor 2": {**PUBLISHED, "factor": 2.0, "original_max_position_embeddings": 262144},
    "short original": YARN,
    "betas": {**PUBLISHED, "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "mscale": {**PUBLISHED, "factor": 8.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.5},
    "attention factor": {**PUBLISHED, "factor": 2.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25},
}
POSITIONS = [[0, 0, 0], [1, 2, 3], [77, 80, 91], [8191, 8000, 8100], [262143, 262000, 262143], [999999, 999998, 700001]]


def rope(parameters):
    c = Qwen3VLTextConfig(hidden_size=128, num_attention_heads=1, num_key_value_heads=1, head_dim=128, max_position_embeddings=262144,
                          rope_parameters=dict(parameters))
    r = q.Qwen3VLTextRotaryEmbedding(c)
    cos, sin = r(torch.zeros(1), torch.tensor(POSITIONS).T[:, None, :])
    numbers = lambda t: [float(x) for x in t.double().flatten()]
    return {"rope_parameters": parameters, "inv_freq": numbers(r.inv_freq), "scale": float(r.attention_scaling), "positions": POSITIONS,
            "cos": [numbers(row[:64]) for row in cos[0]], "sin": [numbers(row[:64]) for row in sin[0]]}


def logits():
    path = HERE / "checkpoints" / "tiny-dense-tied"
    config = transformers.AutoConfig.from_pretrained(path)
    config.text_config.rope_parameters = dict(YARN)
    config.text_config.max_position_embeddings = 256
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(path, config=config, dtype=torch.float32)
    ids = np.random.default_rng(11).integers(100, 4000, 200)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids)[None]).logits[0]
    return out[[60, 127, 128, 199]].numpy().astype(np.float32)


if __name__ == "__main__":
    (HERE / "rope").mkdir(exist_ok=True)
    (HERE / "rope" / "rope.json").write_text(json.dumps({name: rope(p) for name, p in CASES.items()}) + "\n")
    np.save(HERE / "rope" / "yarn_logits.npy", logits())
    print("transformers", transformers.__version__, "torch", torch.__version__)
