"""test_bench.py - qvl bench: the form of its results is a contract (docs/tool.md)."""
import json
import signal
import subprocess
import time

import pytest
from conftest import QVL, TINY, environment, qvl


def bench(*args):
    p = qvl("bench", "--json", *args)
    assert p.returncode == 0 and p.stderr == "", p.stderr
    out = json.loads(p.stdout)
    assert isinstance(out, list) and out[-1]["test"] == "memory" and len(out) > 1
    assert out[-1]["peak_rss_bytes"] > out[-1]["weight_bytes"] > 0
    for r in out[:-1]:
        assert r["test"] in ("prefill", "decode", "image", "load")
        assert r["unit"] == ("tokens/s" if r["test"] in ("prefill", "decode") else "ms")
        assert all(isinstance(r[k], int) for k in ("n", "depth", "streams"))
        assert all(v > 0 for v in r["values"])
    return {r["test"]: r for r in out}


def test_standard_set():
    out = bench("-m", TINY, "--repeat", "2")
    assert set(out) == {"prefill", "decode", "image", "load", "memory"}
    assert (out["prefill"]["n"], out["decode"]["n"], out["image"]["size"]) == (512, 64, "448x448")
    assert all(len(out[t]["values"]) == 2 and out[t]["depth"] == 0 and out[t]["streams"] == 1 for t in out if t != "memory")
    assert out["prefill"]["values"][0] > out["decode"]["values"][0]


@pytest.mark.parametrize("args, tests", [
    (["--prefill", "33"], {"prefill"}),
    (["--decode", "5"], {"decode"}),
    (["--image", "100x60"], {"image"}),
    (["--load"], {"load"}),
    (["--prefill", "16", "--decode", "4"], {"prefill", "decode"}),
])
def test_only_what_was_asked_for(args, tests):
    out = bench(*args, "--repeat", "1")
    assert set(out) == tests | {"memory"}
    assert all(len(out[t]["values"]) == 1 for t in tests)


@pytest.mark.parametrize("depth, streams", [(0, 3), (64, 1), (700, 1), (513, 3), (40, 20)])
def test_depth_and_streams(depth, streams):
    out = bench("--prefill", "48", "--decode", "6", "--depth", depth, "--streams", streams, "--repeat", "1")
    for t in ("prefill", "decode"):
        assert (out[t]["depth"], out[t]["streams"]) == (depth, streams)


def test_context_grows_with_the_test_and_has_the_models_limit():
    assert bench("--prefill", "3000", "--repeat", "1")["prefill"]["n"] == 3000
    p = qvl("bench", "--prefill", "5000", "--repeat", "1")
    assert p.returncode == 1 and "4096" in p.stderr  # max_position_embeddings of qvl-tiny: nothing is clamped


def test_options_reach_the_model():
    out = bench("--decode", "2", "--repeat", "1", "--dtype", "f32", "-t", "1")["decode"]
    assert (out["kv_dtype"], out["bf16_math"], out["threads"]) == ("f32", False, 1)
    small, large = (bench("--image", "448x448", "--max-pixels", n, "--repeat", "1")["image"]["n"] for n in ("16384", "65536"))
    assert small < large


def test_table():
    p = qvl("bench", "--prefill", "32", "--decode", "4", "--image", "64x64", "--repeat", "3")
    assert p.returncode == 0 and p.stderr == ""
    rows = [line.split() for line in p.stdout.splitlines()]
    assert [r[0] for r in rows[2:5]] == ["image", "prefill", "decode"] and "peak memory" in p.stdout
    for r in rows[2:5]:
        median, low, high = map(float, r[4:7])
        assert low <= median <= high


def test_kernels():
    p = qvl("bench", "--kernels", "--json", "-t", "1")
    assert p.returncode == 0 and p.stderr == "", p.stderr
    out = json.loads(p.stdout)
    limits = out["limits"]
    assert set(limits) == {"read_gb_s", "f32_gop_s", "bf16_gop_s", "int8_gop_s", "int4_gop_s"} and all(v > 0 for v in limits.values())
    assert out["device"] == "cpu" and out["threads"] == 1
    kernels = {(k["kernel"], k["type"], k["rows"]): k for k in out["kernels"]}
    assert len(kernels) == len(out["kernels"]) == 25
    assert {k for k, _, _ in kernels} == {"matmul", "attention_paged", "attention_full", "rms_norm", "layer_norm", "quantize_rows", "pack_weights"}
    for k in kernels.values():  # the limit that binds is the one that needs longer, and caches help only what streams
        memory, arithmetic = k["gb_s"] / limits["read_gb_s"], k["gop_s"] / limits["f32_gop_s"]
        assert k["ms"] > 0 and 0 < k["percent"] < 1000 and k["bound"] in ("memory", "arithmetic"), k
        if k["type"] == "f32":
            assert k["bound"] == ("memory" if memory >= arithmetic else "arithmetic")
            assert k["percent"] == pytest.approx(100 * max(memory, arithmetic), rel=0.02)
    assert kernels["matmul", "int4", 1]["bound"] == "memory" and kernels["matmul", "f32", 512]["bound"] == "arithmetic"
    assert qvl("bench", "--kernels", "--prefill", "5").returncode == 2


def test_interrupt():
    p = subprocess.Popen([str(QVL), "bench", "--decode", "3500", "--repeat", "1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    time.sleep(1)  # loaded or loading: both must end
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and err == b"" and b"decode" not in out


# ---- serving mode ----

def serve(*args):
    p = qvl("bench", "--serve", "--json", *args)
    assert p.returncode == 0 and p.stderr == "", p.stderr
    out, memory = json.loads(p.stdout)
    assert out["test"] == "serve" and memory["test"] == "memory" and memory["peak_rss_bytes"] > 0
    for key in ("ttft_ms", "tpot_ms", "gap_ms", "e2e_ms", "queue_ms"):
        s = out[key]
        assert s["p50"] <= s["p90"] <= s["p95"] <= s["p99"] <= s["max"] and 0 <= s["mean"] <= s["max"]
    assert out["finished"] + out["failed"] == out["requests"] and out["gap_ms"]["samples"] == out["generated_tokens"] - out["finished"]
    assert all(out["memory"][k] > 0 for k in ("weights", "kv", "workspace", "vision"))
    return out


def test_serve_counts():
    out = serve("--requests", 12, "--prompt-tokens", "20-90", "--answer-tokens", 7)
    assert (out["finished"], out["generated_tokens"], out["ttft_ms"]["samples"], out["images"]) == (12, 84, 12, 0)
    assert 12 * 20 <= out["prompt_tokens"] <= 12 * 90
    again = serve("--requests", 12, "--prompt-tokens", "20-90", "--answer-tokens", 7)
    assert again["prompt_tokens"] == out["prompt_tokens"]  # the same seed, the same requests
    assert serve("--requests", 12, "--prompt-tokens", "20-90", "--answer-tokens", 7, "--load-seed", 2)["prompt_tokens"] != out["prompt_tokens"]


def test_serve_rate_and_concurrency():
    start = time.monotonic()
    out = serve("--requests", 40, "--rate", 40, "--answer-tokens", 2, "--prompt-tokens", 8)
    assert 0.4 < out["seconds"] < 3 and time.monotonic() - start < 20
    one = serve("--requests", 6, "--concurrency", 1, "--answer-tokens", 8)
    assert one["rows"] >= 6 * 127 and one["steps"] >= 6 * 8  # never two in a step


def test_serve_caches():
    shared = serve("--requests", 10, "--prompt-tokens", 100, "--shared-prefix", 80, "--answer-tokens", 2)
    assert shared["cached_tokens"] >= 9 * 64
    turns = serve("--requests", 8, "--turns", 4, "--prompt-tokens", 50, "--answer-tokens", 20)
    assert turns["finished"] == 8 and turns["prompt_tokens"] == 2 * (50 + 120 + 190 + 260) and turns["cached_tokens"] > turns["prompt_tokens"] / 2
    pictures = serve("--requests", 6, "--images", 1, "--image", "160x160", "--image-pool", 1, "--prompt-tokens", 10, "--answer-tokens", 2)
    assert (pictures["images"], pictures["images_encoded"]) == (6, 1)
    assert serve("--requests", 4, "--images", 1, "--image", "64x64", "--answer-tokens", 2, "--prompt-tokens", 5)["images_encoded"] == 4


def test_serve_probe_and_refusals():
    out = serve("--requests", 4, "--probe", "--answer-tokens", 4, "--images", 1, "--image", "448x448", "--prompt-tokens", 5)
    assert out["probe_gap_ms"]["samples"] >= 4
    some = serve("--requests", 9, "--prompt-tokens", "10-400", "--answer-tokens", 4, "--max-context", 200)
    assert some["failed"] > 0 and some["finished"] > 0 and "max_context" in some["first_failure"]
    none = qvl("bench", "--serve", "--requests", "2", "--prompt-tokens", "400", "--max-context", "200")
    assert none.returncode == 1 and "max_context" in none.stderr


@pytest.mark.parametrize("args, why", [
    (["--images", "2"], "--images"), (["--rate", "-1"], "--rate"), (["--prompt-tokens", "9-3"], "--prompt-tokens"),
    (["--answer-tokens", "x"], "--answer-tokens"), (["--image", "5"], "--image"), (["--images", "1", "--turns", "2"], "--turns"),
    (["--prefill", "5"], "prefill"),
])
def test_serve_called_wrongly(args, why):
    p = qvl("bench", "--serve", *args)
    assert p.returncode == 2 and why in p.stderr
