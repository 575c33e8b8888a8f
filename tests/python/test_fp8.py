"""FP8 checkpoints (E4M3, a scale for each block), against the same numbers stored as BF16 and F32.

Job:        turn a checkpoint of the goldens into an FP8 one as transformers' fine-grained FP8 lays it out; load both.
Input:      tests/golden.
Output:     logits of both, bit by bit.
Invariants: the decoder here is a table made from the format's definition, not the library's.
"""
import json
import os
import shutil

import numpy as np
import pytest

import qvl
from support import CHECKPOINTS, DEVICE, mixture, raw_safetensors, read_safetensors, write_safetensors

# All 256 numbers: sign, four exponent bits (bias 7), three mantissa bits; the last of each sign is NaN.
E4M3 = np.array([(-1.0) ** (b >> 7) * ((b & 7) / 8 * 2.0 ** -6 if b >> 3 & 15 == 0 else (1 + (b & 7) / 8) * 2.0 ** ((b >> 3 & 15) - 7)) for b in range(256)], np.float32)
E4M3[[0x7F, 0xFF]] = np.nan
BLOCK = (128, 32)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16(x):
    """Rounded to nearest even, as bits."""
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def to_fp8(w):
    """Codes and scales (as bits of BF16); rounding to the nearest."""
    rows, cols = w.shape
    high, wide = -(-rows // BLOCK[0]), -(-cols // BLOCK[1])
    full = np.zeros((high * BLOCK[0], wide * BLOCK[1]), np.float32)
    full[:rows, :cols] = w
    scale = bf16(np.abs(full.reshape(high, BLOCK[0], wide, BLOCK[1])).max((1, 3)) / 448 + 1e-12)
    by = np.repeat(np.repeat(widened(scale), BLOCK[0], 0), BLOCK[1], 1)[:rows, :cols]
    order = np.argsort(E4M3[:0x7F], kind="stable")
    values = E4M3[:0x7F][order]
    at = np.clip(np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(w / by)), 0, len(values) - 1)
    return (order[at] | (np.signbit(w) << 7)).astype(np.uint8), scale, by


def checkpoints(source, at, experts=False):
    """FP8 and, of the same numbers, F32 and BF16 directories."""
    tensors = raw_safetensors(source / "model.safetensors")
    arrays = read_safetensors(source / "model.safetensors")
    out = {"fp8": {}, "f32": {}, "bf16": {}}
    for name, (dtype, shape, raw) in tensors.items():
        parts = {name: widened(arrays[name])} if ".layers." in name and "language_model" in name and len(shape) == 2 and not name.endswith("mlp.gate.weight") else {}
        if experts and ".mlp.experts." in name:
            for e, w in enumerate(widened(arrays[name])):
                base, inter = f"{name.rsplit('.', 1)[0]}.{e}", w.shape[1] // 2
                halves = {"gate_proj": w[:, :inter], "up_proj": w[:, inter:]} if name.endswith("gate_up_proj") else {"down_proj": w}
                parts.update({f"{base}.{kind}.weight": np.ascontiguousarray(x.T) for kind, x in halves.items()})
        if not parts:
            for tensors_of in out.values():
                tensors_of[name] = (dtype, shape, raw)
        for part, w in parts.items():
            codes, scale, by = to_fp8(w)
            value = E4M3[codes] * by
            out["fp8"][part] = ("F8_E4M3", w.shape, codes.tobytes())
            out["fp8"][part + "_scale_inv"] = ("BF16", scale.shape, scale.tobytes())
            out["f32"][part] = ("F32", w.shape, value.tobytes())
            out["bf16"][part] = ("BF16", w.shape, bf16(value).tobytes())
    for kind, of in out.items():
        shutil.copytree(source, at / kind)
        write_safetensors(at / kind / "model.safetensors", of)
        if kind == "fp8":
            config = json.loads((at / kind / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
            (at / kind / "config.json").write_text(json.dumps(config))
    return at


@pytest.fixture(scope="module", params=["tied", "mixture"])
def made(request, tmp_path_factory):
    at = tmp_path_factory.mktemp(request.param)
    if request.param == "tied":
        return checkpoints(CHECKPOINTS["tied"], at)
    return checkpoints(mixture(tmp_path_factory.mktemp("plain")), at, experts=True)


def logits(path, dtype):
    try:
        model = qvl.Model(path, **DEVICE, dtype=dtype)
    except qvl.Error as e:
        if "GPUs in groups of 32" in str(e):
            pytest.skip(str(e))  # int8 and int4: this checkpoint's widths do not divide
        raise
    return model.logits(model.prompt([{"role": "user", "content": "Name three colours."}])), model


@pytest.mark.parametrize("dtype,same", [("auto", "bf16"), ("bf16", "bf16"), ("f32", "f32"), ("int8", "f32"), ("int4", "f32")])
def test_same_numbers(made, dtype, same):
    """auto and bf16 round the numbers to bf16, f32 keeps them, integers are made from what they are."""
    a, model = logits(made / "fp8", dtype)
    b, _ = logits(made / same, dtype)
    if dtype == "auto" and model.info["device"] == "cuda":  # the GPU keeps FP8: the product of number and scale is not rounded
        b, _ = logits(made / "f32", "f32")
        assert np.sqrt(np.mean((a - b) ** 2)) / b.std() <= 0.03
        assert "fp8" in model.info["dtype"]
        return
    assert np.array_equal(a, b)
    assert model.info["dtype"] == {"auto": "bf16"}.get(dtype, model.info["dtype"])


@pytest.mark.skipif(DEVICE.get("device") != "cuda" or os.environ.get("QVL_TEST_GPUS", "1") != "1", reason="only a GPU has FP8; several have parts")
def test_memory(made):
    """On a GPU the matrices that are stored as FP8 stay so: a byte and a sixteenth for each number, in rows of whole groups."""
    sizes = {kind: logits(made / "fp8", kind)[1].info["weight_bytes"] for kind in ("auto", "bf16")}
    stored = [shape for dtype, shape, _ in raw_safetensors(made / "fp8" / "model.safetensors").values() if dtype == "F8_E4M3"]
    saved = sum(rows * -(-cols // 32) * 32 for rows, cols in stored) * 15 / 16
    assert abs(sizes["bf16"] - sizes["auto"] - saved) <= 16 * len(stored)  # a matrix begins on 16 bytes


def test_kv(made):
    """A cache of FP8 is the GPU's; elsewhere it is refused with the way out."""
    model = qvl.Model(made / "bf16", **DEVICE)
    ask = [{"role": "user", "content": "Name three colours."}]
    if DEVICE.get("device") == "cuda":
        assert len(model.chat(ask, max_tokens=4, temperature=0, ignore_eos=True, kv_dtype="fp8").tokens) == 4
        return
    with pytest.raises(qvl.Error, match="kv_dtype fp8 needs a GPU; int8"):
        model.chat(ask, max_tokens=4, kv_dtype="fp8")


def test_packed(made, tmp_path):
    """A packed file made of it."""
    qvl.quantize(made / "fp8", tmp_path / "packed", dtype="int8")
    assert np.array_equal(logits(tmp_path / "packed", "auto")[0], logits(made / "fp8", "int8")[0])


def test_refused(made, tmp_path):
    name = next(n for n in raw_safetensors(made / "fp8" / "model.safetensors") if n.endswith("_scale_inv"))

    def broken(change):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(made / "fp8", tmp_path / "broken")
        tensors = raw_safetensors(tmp_path / "broken" / "model.safetensors")
        config = json.loads((tmp_path / "broken" / "config.json").read_text())
        change(tensors, config)
        write_safetensors(tmp_path / "broken" / "model.safetensors", tensors)
        (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
        with pytest.raises(qvl.Error) as e:
            qvl.Model(tmp_path / "broken")
        return str(e.value)

    assert f"tensor {name} is missing" in broken(lambda t, c: t.pop(name))
    assert "no quantization_config" in broken(lambda t, c: c.pop("quantization_config"))
    assert "weight_block_size is not two sizes" in broken(lambda t, c: c["quantization_config"].update(weight_block_size=[0, 128]))
    assert "quant_method awq is not supported" in broken(lambda t, c: c["quantization_config"].update(quant_method="awq"))
    dtype, shape, raw = raw_safetensors(made / "fp8" / "model.safetensors")[name]
    assert f"tensor {name} has shape" in broken(lambda t, c: t.update({name: (dtype, [shape[0] + 1, shape[1]], raw + raw[: 2 * shape[1]])}))
