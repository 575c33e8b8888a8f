"""test_packed - qvl.quantize: what it writes, that loading it changes no bit, and that damage is told.

The formats are those of docs/quantize.md. Fuzzed headers: tests/fuzz (the reader is that of all safetensors files).
"""
import json
import shutil
import struct

import numpy as np
import pytest

import qvl
from support import CHECKPOINTS, GOLDENS, TINY, golden_prompt, manifest, raw_safetensors, user, write_safetensors
from test_moe import checkpoint as moe  # noqa: F401: a fixture

FILE = "qvl.safetensors"
SHAPES = TINY.parents[1] / "images" / "shapes.png"
METADATA = {"format": "qvl-packed-1", "weights": "int4"}


def header(path):
    data = path.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    return size, json.loads(data[8:8 + size])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """packed(name or directory, dtype) -> (directory, report), made once."""
    known = {}

    def get(source, dtype):
        if (source, dtype) not in known:
            out = tmp_path_factory.mktemp("packed") / "model"
            known[source, dtype] = out, qvl.quantize(CHECKPOINTS.get(source, source), out, dtype)
        return known[source, dtype]

    return get


@pytest.mark.parametrize("dtype", ["int4", "int8", "bf16", "f32", "auto"])
@pytest.mark.parametrize("name", [n for n in GOLDENS if n != "moe"])
def test_same_bits_as_rounded_while_loading(packed, load, name, dtype):
    out, report = packed(name, dtype)
    plain, mine = load(name, dtype=dtype), qvl.Model(out)
    same = {k: v for k, v in plain.info.items() if k not in ("weights_id", "dtype", "kv_dtype", "bf16_math")}
    assert {k: mine.info[k] for k in same} == same and mine.info["weight_dtype"] == report["dtype"]
    if dtype == "f32":  # the option also asks for float keys and values, which the file does not
        mine = qvl.Model(out, dtype="f32")
    for about in manifest(name)["cases"].values():
        assert np.array_equal(plain.logits(golden_prompt(plain, about)), mine.logits(golden_prompt(mine, about)))


@pytest.mark.parametrize("dtype", ["int4", "bf16"])
def test_mixture(packed, moe, dtype):  # noqa: F811
    out, report = packed(moe, dtype)
    plain, mine = qvl.Model(moe, dtype=dtype), qvl.Model(out)
    assert any(".experts.3.down_proj." in m["name"] for m in report["matrices"])
    ids = list(range(5, 60))
    assert np.array_equal(plain.logits(ids), mine.logits(ids))


def test_same_file_on_any_number_of_threads(packed, tmp_path):
    out, _ = packed("qvl-tiny", "int4")
    qvl.quantize(TINY, tmp_path, "int4", threads=1)
    assert (tmp_path / FILE).read_bytes() == (out / FILE).read_bytes()


def test_file_is_as_documented(packed):
    out, report = packed("qvl-tiny", "int4")
    size, h = header(out / FILE)
    assert (size + 8) % 4096 == 0 and h["__metadata__"] == METADATA
    kinds = {n.rsplit(".", 1)[1] for n, t in h.items() if n != "__metadata__" and t["dtype"] == "U8"}
    assert kinds == {"int4", "int8"} and h["text.norm"]["dtype"] == "F32"
    assert h["text.0.gate_up.int4"] and h["text.embed.int8"] and h["vision.0.fc1.int8"]
    for m in report["matrices"]:
        assert h[m["name"]]["shape"] == [m["bytes"]]
        assert (0.02 < m["error"] < 0.12) if m["name"].endswith("int4") else (0.001 < m["error"] < 0.01), m
    assert sum(m["bytes"] for m in report["matrices"]) <= report["bytes"] < (out / FILE).stat().st_size
    assert all(m["error"] == 0 for m in packed("qvl-tiny", "auto")[1]["matrices"])


def mixed_types(report):
    return {m["name"].rsplit(".", 1)[1] for m in report["matrices"]}


def test_mixed(tmp_path):
    reports = {}
    for bits in (4.6, 6, 8, 16):
        reports[bits] = r = qvl.quantize(TINY, tmp_path / str(bits), bits=bits, threads=2)
        mean = 8 * sum(m["bytes"] for m in r["matrices"]) / sum(m["weights"] for m in r["matrices"])
        assert bits - 0.15 < mean <= bits and r["bits"] == pytest.approx(mean, rel=1e-3)
        model = qvl.Model(tmp_path / str(bits))
        assert model.info["weight_dtype"] == r["dtype"] and "red star" in model.chat(user("What do you see?", SHAPES), temperature=0).text
    assert mixed_types(reports[6]) >= {"int4", "int8"} and mixed_types(reports[16]) == {"bf16"}
    assert reports[4.6]["dtype"] == "int4" and reports[16]["dtype"] == "bf16"
    qvl.quantize(TINY, tmp_path / "one", bits=6, threads=1)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "6" / FILE).read_bytes()


def test_mixed_by_conversations(tmp_path, moe):  # noqa: F811
    talk = [[{"role": "user", "content": "What do you see?"}], [{"role": "user", "content": [{"type": "text", "text": "two"}]}]]
    r = qvl.quantize(TINY, tmp_path / "a", bits=6, calibration=talk)
    assert mixed_types(r) >= {"int4", "int8"} and r["bits"] <= 6
    r = qvl.quantize(moe, tmp_path / "b", bits=7, calibration=talk)
    experts = {m["name"].rsplit(".", 1)[1] for m in r["matrices"] if ".experts." in m["name"]}
    assert len(experts) > 1
    ids = list(range(5, 60))
    assert np.isfinite(qvl.Model(tmp_path / "b").logits(ids)).all()


@pytest.mark.parametrize("options, message", [
    ({"bits": 6, "dtype": "int4"}, "leave out dtype"), ({"bits": 4}, "less than int4 takes"), ({"bits": 17}, "out of range"),
    ({"bits": 6, "calibration": []}, "not an array of conversations"), ({"bits": 6, "calibration": [[], 5]}, "conversation 0"),
])
def test_mixed_refusals(tmp_path, options, message):
    with pytest.raises(qvl.Error, match=message):
        qvl.quantize(TINY, tmp_path, **options)
    assert not list(tmp_path.glob("qvl.safetensors*"))


def test_it_answers(packed):
    answer = qvl.Model(packed("qvl-tiny", "int4")[0]).chat(user("What do you see?", SHAPES), temperature=0)
    assert "red star" in answer.text


def test_refusals(packed, tmp_path):
    out, _ = packed("qvl-tiny", "int4")
    with pytest.raises(qvl.Error, match="is packed as int4.*cannot be loaded as bf16"):
        qvl.Model(out, dtype="bf16")
    with pytest.raises(qvl.Error, match="packed already"):
        qvl.quantize(out, tmp_path / "again")
    assert not (tmp_path / "again" / FILE).exists() and not list((tmp_path / "again").glob("*.part"))
    with pytest.raises(qvl.Error, match="exists; remove it"):
        qvl.quantize(TINY, out)
    with pytest.raises(qvl.Error, match="a directory of its own"):
        qvl.quantize(TINY, TINY)
    with pytest.raises(qvl.Error, match="cannot create"):
        qvl.quantize(TINY, tmp_path / "not" / "there")
    with pytest.raises(qvl.Error, match="config.json"):
        qvl.quantize(tmp_path, tmp_path / "x")
    with pytest.raises(qvl.Error, match="dtype"):
        qvl.quantize(TINY, tmp_path / "x", "int3")


def test_stopped_or_full_leaves_no_packed_file(tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total):
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        qvl.quantize(TINY, tmp_path, progress=stop)
    assert not list(tmp_path.glob("qvl.safetensors*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / (FILE + ".part")).symlink_to("/dev/full")
    with pytest.raises(qvl.Error, match="cannot write: No space left"):
        qvl.quantize(TINY, tmp_path / "full")
    assert not list((tmp_path / "full").glob("qvl.safetensors*"))


@pytest.fixture
def damaged(packed, tmp_path):
    """damaged(edit): loading after edit(tensors) on the form that write_safetensors takes."""
    def get(edit, **metadata):
        source = packed("qvl-tiny", "int4")[0]
        out = tmp_path / "damaged"
        shutil.copytree(source, out)
        t = raw_safetensors(source / FILE)
        edit(t)
        write_safetensors(out / FILE, t)
        data = (out / FILE).read_bytes()
        size, = struct.unpack("<Q", data[:8])
        text = json.dumps({"__metadata__": {**METADATA, **metadata}, **json.loads(data[8:8 + size])}).encode()
        text += b" " * (-(len(text) + 8) % 64)
        (out / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])
        return qvl.Model(out)
    return get


def put(t, name, dtype, shape, raw):
    t[name] = dtype, shape, raw


def put_first(t, *tensor):
    rest = dict(t)
    t.clear()
    put(t, *tensor)
    t.update(rest)


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("text.1.qkv.int4"), r"weight text\.1\.qkv is missing"),
    (lambda t: t.pop("text.norm"), r"tensor text\.norm is missing"),
    (lambda t: put(t, "text.1.qkv.int4", "U8", [64], bytes(64)), r"text\.1\.qkv\.int4: 64 bytes stored, \d+ outputs of \d+ inputs need"),
    (lambda t: put(t, "text.1.qkv.int8", *t.pop("text.1.qkv.int4")), r"text\.1\.qkv\.int8: \d+ bytes stored"),
    (lambda t: put(t, "text.1.qkv.int4", *t["text.1.o.int4"]), r"text\.1\.qkv\.int4: \d+ bytes stored"),
    (lambda t: put(t, "text.embed.int4", *t["text.embed.int8"]), r"text\.embed\.int4 is not part"),
    (lambda t: put(t, "more", "U8", [8], bytes(8)), r"tensor more is not part"),
    (lambda t: put(t, "text.norm", "F32", [4], bytes(16)), r"text\.norm has shape 4"),
    (lambda t: put_first(t, "odd", "U8", [1], b"x"), r"text\.embed\.int8: does not begin at a whole number of words"),
])
def test_damage(damaged, edit, message):
    with pytest.raises(qvl.Error, match=message):
        damaged(edit)


def test_versions(damaged):
    with pytest.raises(qvl.Error, match="qvl-packed-2 is not known"):
        damaged(lambda t: None, format="qvl-packed-2")


def test_kinds(damaged):
    with pytest.raises(qvl.Error, match="unknown kind: int3"):
        damaged(lambda t: None, weights="int3")


def test_rewritten_by_others_it_still_loads(damaged):
    assert damaged(lambda t: None).info["weight_dtype"] == "int4"


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_cut_off(packed, tmp_path, keep):
    source = packed("qvl-tiny", "int4")[0]
    out = tmp_path / "cut"
    shutil.copytree(source, out)
    (out / FILE).write_bytes((source / FILE).read_bytes()[:keep])
    with pytest.raises(qvl.Error, match=FILE):
        qvl.Model(out)
