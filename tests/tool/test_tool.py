"""test_tool.py - the command-line tool as users call it: describe, info, tokenize, help, exit codes."""
import json
import os
import signal
import subprocess
import time

import pytest
from conftest import HEART, IMAGES, QVL, ROOT, SHAPES, TINY, Terminal, environment, qvl

COMMANDS = ["describe", "chat", "info", "tokenize", "quantize", "bench"]


# ---- help and exit codes ----

def test_version():
    header = (ROOT / "include/qvl.h").read_text()
    for flag in ("--version", "-V", "version"):
        p = qvl(flag)
        assert p.returncode == 0 and p.stderr == ""
        assert f'#define QVL_VERSION "{p.stdout.split()[1]}"' in header


def test_overview_names_every_command():
    for args in (["help"], ["--help"], ["-h"]):
        p = qvl(*args)
        assert p.returncode == 0 and p.stderr == "" and all(f"\n  {c} " in p.stdout for c in COMMANDS)
    p = qvl()
    assert p.returncode == 2 and p.stdout == "" and "usage: qvl COMMAND" in p.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command(command):
    p = qvl(command, "--help")
    assert p.returncode == 0 and p.stderr == "" and p.stdout.startswith(f"usage: qvl {command} ")
    assert "-m, --model MODEL" in p.stdout
    assert qvl("help", command).stdout == p.stdout == qvl(command, "-h").stdout
    assert all(len(line) <= 130 for line in p.stdout.splitlines())


def library_options():
    """(name, scope, range, default) of every option, from docs/options.md."""
    scope, found = None, []
    for line in (ROOT / "docs/options.md").read_text().splitlines():
        if line.startswith("## "):
            scope = line.split("`")[1]
        if line.startswith("| `"):
            name, _, span, default, _ = (c.strip().strip("`") for c in line.replace("\\|", "\0").strip("|").split("|"))
            found.append((name, scope, span.replace("\0", "|"), default))
    assert len(found) > 30
    return found


def test_options_md_is_up_to_date():
    assert qvl("help", "options", "--markdown").stdout == (ROOT / "docs/options.md").read_text(), "run: make docs"


def test_help_lists_library_options():
    text = {c: qvl(c, "--help").stdout for c in COMMANDS}
    everything = qvl("help", "options").stdout
    for name, scope, span, default in library_options():
        flag = "--" + name.replace("_", "-")
        assert f"  {flag}" in everything
        silent = scope == "quantize" or name.startswith("video_") or name in ("max_requests", "return_logits", "n", "priority", "step_ms", "embedding_cache",
                                                        "prompt_logprobs")
        assert (f"{flag} " in text["describe"] or f"{flag}," in text["describe"]) != silent, name
        line = next((line for line in text["describe"].splitlines() if f"{flag} " in line), "")
        if line:
            assert (f"({span})" in line or not span) and (f"[{default}]" in line or not default)
        assert (f"{flag} " in text["info"] or f"{flag}," in text["info"]) == (scope in ("model", "engine"))
    assert "--temperature" not in text["bench"] and "--threads" not in text["tokenize"]


@pytest.mark.parametrize("args, words", [
    (["frobnicate"], ["frobnicate", "qvl help"]),
    (["help", "frobnicate"], ["frobnicate"]),
    (["help", "info", "more"], ["usage"]),
    (["describe"], ["no picture given"]),
    (["describe", "--frob", "x.png"], ["--frob", "qvl describe --help"]),
    (["describe", "-z", "x.png"], ["-z"]),
    (["describe", "x.png", "-p"], ["-p", "needs a value"]),
    (["describe", "x.png", "--temperature"], ["needs a value"]),
    (["describe", "x.png", "--temperature", "101"], ["temperature", "0..100"]),
    (["describe", "x.png", "--temperature", "warm"], ["temperature", "warm"]),
    (["describe", "x.png", "--dtype", "f64"], ["dtype", "auto|f32|bf16"]),
    (["describe", "x.png", "--max-tokens=0"], ["max_tokens", "1..1048576"]),
    (["describe", "x.png", "--json=yes"], ["--json", "no value"]),
    (["describe", "x.png", "--max-requests", "3"], ["--max-requests"]),
    (["describe", "-", "-"], ["standard input"]),
    (["describe", "x.png", "--logprobs", "3"], ["--json"]),
    (["chat", "-"], ["standard input"]),
    (["info", "extra"], ["extra"]),
    (["tokenize", "a", "b"], ["\"b\""]),
    (["tokenize", "--decode", "1 x"], ["\"x\""]),
    (["tokenize", "--threads", "1", "a"], ["--threads"]),
    (["bench", "--prefill", "0"], ["--prefill", "1..1048576"]),
    (["bench", "--repeat", "x"], ["--repeat"]),
    (["bench", "--image", "448"], ["--image", "448x448"]),
    (["bench", "--image", "0x10"], ["--image"]),
    (["bench", "word"], ["word"]),
])
def test_wrong_calls(args, words):
    p = qvl(*args)
    assert p.returncode == 2 and p.stdout == ""
    assert all(w in p.stderr for w in words), p.stderr


# ---- describe ----

def test_describe_answers_on_stdout_and_nothing_else():
    p = qvl("describe", IMAGES / "shapes.png")
    assert (p.returncode, p.stdout, p.stderr) == (0, SHAPES + "\n", "")


def test_describe_reads_every_format_and_stdin():
    assert qvl("describe", IMAGES / "heart.jpg").stdout.strip() == HEART
    assert "star" in qvl("describe", IMAGES / "three.webp").stdout
    assert qvl("describe", "-", stdin=(IMAGES / "heart.jpg").read_bytes()).stdout.strip() == HEART


def test_describe_several_pictures_and_prompt():
    one = qvl("describe", IMAGES / "heart.jpg", "-p", "How many shapes are there?").stdout
    assert one != HEART + "\n" and one.strip()
    p = qvl("describe", "--json", IMAGES / "heart.jpg", IMAGES / "shapes.png", "--prompt=How many shapes are there?")
    both = json.loads(p.stdout)
    alone = [json.loads(qvl("describe", "--json", IMAGES / f).stdout)["usage"]["image_tokens"] for f in ("heart.jpg", "shapes.png")]
    assert both["usage"]["image_tokens"] == sum(alone)


def test_describe_json():
    p = qvl("describe", IMAGES / "shapes.png", "--json")
    out = json.loads(p.stdout)
    assert p.returncode == 0 and p.stderr == ""
    assert out["text"] == SHAPES and out["finish_reason"] == "stop" and "reasoning" not in out and "tokens" not in out
    usage, timings = out["usage"], out["timings"]
    assert usage["prompt_tokens"] > usage["image_tokens"] > 0 and usage["completion_tokens"] > 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert timings["total_ms"] >= timings["ttft_ms"] >= timings["vision_ms"] > 0 and timings["load_ms"] > 0
    assert timings["tokens_per_second"] > 0


def test_describe_system_message_is_part_of_the_prompt():
    def tokens(*more):
        return json.loads(qvl("describe", IMAGES / "shapes.png", "--json", *more).stdout)["usage"]["prompt_tokens"]
    assert tokens("--system", "You are terse.") > tokens()


def test_describe_request_options():
    def out(*more):
        p = qvl("describe", IMAGES / "shapes.png", "--json", *more)
        assert p.returncode == 0, p.stderr
        return json.loads(p.stdout)
    for form in (["--max-tokens", "3"], ["--max_tokens", "3"], ["--max-tokens=3"], ["--max-tokens", "7", "--max-tokens", "3"]):
        o = out(*form)
        assert o["usage"]["completion_tokens"] == 3 and o["finish_reason"] == "length" and SHAPES.startswith(o["text"])
    assert out("--stop", " of a")["text"] == out("--stop", '[" of a", "never"]')["text"] == "A large yellow triangle to the left"
    assert out("--ignore-eos", "--max-tokens", "40")["usage"]["completion_tokens"] == 40
    assert out("--ignore-eos", "true", "--max-tokens", "40")["usage"]["completion_tokens"] == 40
    assert out("--ignore-eos", "--no-ignore-eos", "--max-tokens", "40")["finish_reason"] == "stop"
    assert out("-t", "1")["text"] == out("-t2")["text"] == out("--threads=3")["text"] == SHAPES
    a, b, c = (out("--temperature", "5", "--seed", s, "--max-tokens", "20")["text"] for s in ("1", "1", "2"))
    assert a == b != c
    small, large = (out("--min-pixels", str(n), "--max-pixels", str(n))["usage"]["image_tokens"] for n in (9216, 65536))
    assert small < large


def test_describe_logprobs():
    o = json.loads(qvl("describe", IMAGES / "heart.jpg", "--json", "--logprobs", "3", "--max-tokens", "4").stdout)
    assert len(o["tokens"]) == 4
    for t in o["tokens"]:
        assert len(t["top"]) == 3 and t["top"][0] == [t["id"], t["logprob"]] and t["logprob"] <= 0
        assert t["top"][0][1] >= t["top"][1][1] >= t["top"][2][1]


def think_ids():
    opening, closing = qvl("tokenize", "--special", "<think></think>").stdout.split()
    return opening, closing


def test_reasoning_is_kept_apart():
    """The bundled model does not think: a bias makes it write the tags that a thinking model writes."""
    opening, closing = think_ids()
    thinking = ["describe", IMAGES / "shapes.png", "--chat-template", "thinking", "--max-tokens", "6"]
    o = json.loads(qvl(*thinking, "--json").stdout)
    assert o["text"] == "" and o["reasoning"].startswith("A large")
    p = qvl(*thinking)
    assert (p.returncode, p.stdout) == (0, ""), "reasoning is no answer"
    o = json.loads(qvl(*thinking, "--json", "--logit-bias", '{"%s": 100}' % closing).stdout)
    assert "reasoning" not in o and o["text"] == "</think>" * 5
    o = json.loads(qvl("describe", IMAGES / "shapes.png", "--json", "--max-tokens", "3", "--logit-bias", '{"%s": 100}' % opening).stdout)
    assert o["text"] == "" and o["reasoning"] == "<think>" * 2
    with Terminal(*thinking) as t:
        assert t.end() == 0
        assert "\x1b[2mA\x1b[0m" in t.seen.replace(" large", "")


def test_describe_failures(tmp_path):
    def fails(*args, **more):
        p = qvl(*args, **more)
        assert p.returncode == 1 and p.stdout == "" and p.stderr.startswith("qvl: ") and p.stderr.count("\n") == 1, p.stderr
        return p.stderr
    assert "nope.png" in fails("describe", "nope.png")
    assert "nope.png" in fails("describe", IMAGES / "shapes.png", "nope.png")
    (tmp_path / "text.png").write_text("hello")
    assert "text.png" in fails("describe", tmp_path / "text.png")
    assert "standard input" in fails("describe", "-", stdin=b"hello")
    assert "1000" in fails("describe", "-", "--max-image-bytes", "1000", stdin=b"x" * 5000)
    assert "nowhere" in fails("describe", IMAGES / "shapes.png", "-m", "nowhere")
    assert "max_context" in fails("describe", IMAGES / "shapes.png", "--max-context", "20")
    assert "bytes" in fails("describe", IMAGES / "shapes.png", "--max-image-bytes", "100")
    assert "stop" in fails("describe", IMAGES / "shapes.png", "--stop", "[1]")
    with open("/dev/full", "wb") as full:
        p = subprocess.run([QVL, "describe", IMAGES / "shapes.png"], stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert p.returncode == 1 and b"standard output" in p.stderr


def test_a_prompt_that_is_not_utf8():
    p = subprocess.run([QVL, "describe", IMAGES / "shapes.png", "-p", b"\xff\xfe"], capture_output=True, env=environment(), check=False)
    assert p.returncode == 1 and b"UTF-8" in p.stderr and p.stdout == b""


def test_model_is_found_from_anywhere(tmp_path):
    assert qvl("describe", IMAGES / "heart.jpg", cwd="/").stdout.strip() == HEART
    assert qvl("info", "--json", env={"QVL_MODEL": "nowhere"}).returncode == 1
    assert qvl("info", "--json", "-m", TINY, env={"QVL_MODEL": "nowhere"}, cwd=tmp_path).returncode == 0
    prefix = tmp_path / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "share/qvl/models").mkdir(parents=True)
    (prefix / "bin/qvl").write_bytes(QVL.read_bytes())
    (prefix / "bin/qvl").chmod(0o755)
    p = qvl("info", program=prefix / "bin/qvl", cwd=tmp_path)
    if not os.path.exists("/usr/local/share/qvl/models/qvl-tiny"):
        assert p.returncode == 2 and "-m MODEL" in p.stderr and "QVL_MODEL" in p.stderr
    (prefix / "share/qvl/models/qvl-tiny").symlink_to(TINY)
    p = qvl("info", "--json", program=prefix / "bin/qvl", cwd=tmp_path)
    assert p.returncode == 0 and json.loads(p.stdout)["path"].startswith(str(prefix))


LONG = ["describe", IMAGES / "shapes.png", "--ignore-eos", "--max-tokens", "3500", "--max-context", "4096"]


def test_interrupt_ends_with_130():
    p = subprocess.Popen([str(a) for a in [QVL, *LONG]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    first = p.stdout.read(10)
    p.send_signal(signal.SIGINT)
    start = time.monotonic()
    rest, err = p.communicate(timeout=60)
    assert p.returncode == 130 and SHAPES.encode().startswith(first) and err == b""
    assert len(rest) < 10000 and rest.endswith(b"\n") and time.monotonic() - start < 10


def test_broken_pipe_ends_it():
    p = subprocess.Popen([str(a) for a in [QVL, *LONG]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    p.stdout.read(10)
    p.stdout.close()
    assert p.wait(timeout=30) == -signal.SIGPIPE


# ---- quantize ----

def test_quantize(tmp_path):
    out = tmp_path / "int4"
    p = qvl("quantize", str(out))
    lines = p.stdout.splitlines()
    assert p.returncode == 0 and p.stderr == "" and lines[0].split() == ["layer", "M", "weights", "MB", "bits", "error"]
    assert any(line.startswith("text.0 ") for line in lines) and lines[-1].startswith(f"{out}: int4, ")
    assert qvl("describe", "-m", str(out), SHAPES).stdout == qvl("describe", "--dtype", "int4", SHAPES).stdout
    again = qvl("quantize", str(out))
    assert again.returncode == 1 and again.stdout == "" and "exists" in again.stderr
    report = json.loads(qvl("quantize", "--json", "--dtype", "int8", str(tmp_path / "int8")).stdout)
    assert report["dtype"] == "int8" and {"name", "weights", "bytes", "error"} == set(report["matrices"][0])
    mixed = json.loads(qvl("quantize", "--json", "--bits", "6", str(tmp_path / "mixed")).stdout)
    assert 5.8 < mixed["bits"] <= 6
    assert qvl("quantize").returncode == 2 and qvl("quantize", "a", "b").returncode == 2


# ---- info ----

def test_info():
    p = qvl("info", "--json")
    info = json.loads(p.stdout)
    assert p.returncode == 0 and p.stderr == ""
    config = json.loads((TINY / "config.json").read_text())
    assert info["family"] == config["model_type"] and info["vocab_size"] == config["text_config"]["vocab_size"]
    assert info["path"] == str(TINY) and info["threads"] >= 1 and len(info["weights_id"]) == 64
    assert json.loads(qvl("info", "--json", "--dtype", "f32", "-t", "1").stdout)["kv_dtype"] == "f32"
    plan = json.loads(qvl("info", "--json", "--max-context", "1024", "--kv-blocks", "64", "--kv-dtype", "int8").stdout)["engine"]
    assert (plan["max_context"], plan["kv_blocks"], plan["kv_dtype"], plan["kv"]) == (1024, 64, "int8", 64 * plan["kv_block_bytes"])
    assert qvl("info", "--max-context", "100000").returncode == 1
    table = qvl("info").stdout
    for key in info:
        assert any(line.split()[0] == key for line in table.splitlines()), key
    assert all(line == line.rstrip() for line in table.splitlines())
    assert "  layers               4" in table


# ---- tokenize ----

@pytest.mark.parametrize("text", ["Hello, world", "", " two  spaces ", "中文 and 🙂\n", "<|im_end|>", "-", "--", "\x1b[31m\x00 zero"])
def test_tokenize_round_trip(text):
    p = qvl("tokenize", stdin=text)
    assert p.returncode == 0 and p.stderr == ""
    ids = [int(i) for i in p.stdout.split()]
    if "\0" not in text and text != "-":
        assert qvl("tokenize", "--", text).stdout == p.stdout
    back = qvl("tokenize", "--decode", stdin=" ".join(map(str, ids)))
    assert back.stdout == text + "\n"
    exact = json.loads(qvl("tokenize", "--decode", "--json", stdin=json.dumps(ids)).stdout)
    assert exact == {"ids": ids, "text": text}
    out = json.loads(qvl("tokenize", "--json", stdin=text).stdout)
    assert out["ids"] == ids and len(out["pieces"]) == len(ids)
    if "\N{REPLACEMENT CHARACTER}" not in "".join(out["pieces"]):
        assert "".join(out["pieces"]) == text


def test_tokenize_special():
    plain, special = (qvl("tokenize", *flags, "<|im_end|>").stdout.split() for flags in ([], ["--special"]))
    assert len(plain) > 1 and len(special) == 1
    assert qvl("tokenize", "--decode", special[0]).stdout == "<|im_end|>\n"


def test_tokenize_failures():
    p = qvl("tokenize", "--decode", "999999999")
    assert p.returncode == 1 and "999999999" in p.stderr and p.stdout == ""
    assert qvl("tokenize", "--decode", "-5").returncode == 2  # an option, it seems
    assert qvl("tokenize", "--decode", "--", "-5").returncode == 1
    assert qvl("tokenize", "--decode", "99999999999999999999").returncode == 2
    assert qvl("tokenize", "-m", "nowhere", "x").returncode == 1


# ---- terminal ----

def test_progress_bar_on_a_terminal_only():
    with Terminal("describe", IMAGES / "shapes.png") as t:
        assert t.end() == 0
    assert "loading [" in t.seen and " MB " in t.seen and "100%" in t.seen
    shown = t.seen.rsplit("\x1b[K", 1)[1]  # the last thing the bar does is to go away
    assert shown.strip() == SHAPES
    with Terminal("info", "--json", columns=20) as t:  # no room for a bar
        assert t.end() == 0
    assert "%" in t.seen and "[#" not in t.seen
    assert "loading" not in qvl("info").stderr


def test_control_characters_cannot_act_on_a_terminal():
    escape = qvl("tokenize", stdin="\x1b[31m red").stdout.split()
    with Terminal("tokenize", "--decode", *[" ".join(escape)]) as t:
        assert t.end() == 0
    assert "\x1b" not in t.seen and "\N{REPLACEMENT CHARACTER}[31m red" in t.seen


def test_interrupt_on_a_terminal():
    with Terminal(*LONG) as t:
        t.until("triangle")
        t.interrupt()
        assert t.end() == 130
