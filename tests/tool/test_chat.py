"""test_chat.py - qvl chat, by pipe and on a terminal."""
import json
import signal
import subprocess

from conftest import HEART, IMAGES, QVL, ROOT, SHAPES, TINY, Terminal, environment, qvl

LONG = ["--ignore-eos", "--max-tokens", "3000"]


def chat(*lines, args=()):
    return qvl("chat", *args, stdin="".join(line + "\n" for line in lines))


def test_answers_only_on_stdout():
    p = chat(f"/image {IMAGES / 'shapes.png'}", "Describe this image.", "/quit", "never read")
    assert (p.returncode, p.stdout) == (0, SHAPES + "\n")
    assert p.stderr.startswith("picture 1: ") and "shapes.png, 288 x 224, 63 tokens" in p.stderr and "> " not in p.stderr


def test_picture_on_the_command_line_and_end_of_input():
    p = qvl("chat", IMAGES / "heart.jpg", stdin="Describe this image.")
    assert (p.returncode, p.stdout) == (0, HEART + "\n")
    assert qvl("chat", stdin="").returncode == 0


def test_history_counts():
    """The second answer is that of the whole conversation, and an embedding stands for the picture in it."""
    talk = ["Describe this image.", "How many shapes are there?"]
    p = chat(*talk, "/stats", args=[IMAGES / "shapes.png"])
    first, second = p.stdout.splitlines()
    assert first == SHAPES and second and second != first
    assert "in all: 2 answers" in p.stderr and "pictures: 1, each encoded once" in p.stderr and " of 4096 tokens" in p.stderr


def test_clear_forgets_and_system_stays(tmp_path):
    saved = tmp_path / "chat.json"
    p = chat("/system Be brief.", "Describe this image.", "/clear", "Hello", f"/save {saved}", args=[IMAGES / "shapes.png"])
    assert p.returncode == 0
    roles = [(m["role"], m["content"]) for m in json.loads(saved.read_text())]
    assert roles[0] == ("system", "Be brief.") and roles[1] == ("user", "Hello") and roles[2][0] == "assistant" and len(roles) == 3
    assert roles[2][1] == p.stdout.splitlines()[-1]


def test_save_holds_the_conversation(tmp_path):
    saved = tmp_path / "chat.json"
    chat(f"/image {IMAGES / 'shapes.png'}", f"/image {IMAGES / 'heart.jpg'}", "Describe this image.", "Hello", f"/save {saved}")
    m = json.loads(saved.read_text())
    assert [x["role"] for x in m] == ["user", "assistant", "user", "assistant"]
    assert [p.get("image", p.get("text")) for p in m[0]["content"]] == [str(IMAGES / "shapes.png"), str(IMAGES / "heart.jpg"), "Describe this image."]
    assert m[2]["content"] == "Hello"


def test_what_was_saved_goes_on_in_python(tmp_path):
    import qvl as binding
    saved = tmp_path / "chat.json"
    p = chat("Describe this image.", "How many shapes are there?", f"/save {saved}", args=[IMAGES / "shapes.png"])
    messages = json.loads(saved.read_text())
    answer = messages.pop()["content"]
    assert binding.Model(TINY).chat(messages).text == answer == p.stdout.splitlines()[1]


def test_slashes_and_long_messages(tmp_path):
    saved = tmp_path / "chat.json"
    chat("//image is text", "two \\", "lines", "x" * 3000, f"/save {saved}")
    said = [m["content"] for m in json.loads(saved.read_text()) if m["role"] == "user"]
    assert said == ["/image is text", "two \nlines", "x" * 3000]
    assert chat("/").returncode == 1


def test_failed_lines_leave_the_conversation(tmp_path):
    saved = tmp_path / "chat.json"
    p = chat("/image nope.png", "/frobnicate", "/image", "/save", "/save /nowhere/x.json", "Hello " * 5000, "Hello", f"/save {saved}")
    assert p.returncode == 1
    for part in ("nope.png", "unknown command \"/frobnicate\"", "/image needs a FILE", "/save needs a FILE", "/nowhere/x.json", "max_context"):
        assert part in p.stderr, part
    assert [m["role"] for m in json.loads(saved.read_text())] == ["user", "assistant"]
    assert qvl("chat", "nope.png").returncode == 1
    assert qvl("chat", "-m", "nowhere").returncode == 1


def test_a_failed_turn_keeps_its_pictures(tmp_path):
    p = chat("Hello " * 5000, "Describe this image.", args=[IMAGES / "shapes.png"])
    assert p.returncode == 1 and p.stdout == SHAPES + "\n"


def test_invalid_utf8_is_refused():
    p = qvl("chat", stdin=b"\xff\xfe\nHello\n")
    assert p.returncode == 1 and "UTF-8" in p.stderr and p.stdout.count("\n") == 1


def test_length_is_told():
    p = chat("Describe this image.", args=[IMAGES / "shapes.png", "--max-tokens", "3"])
    assert SHAPES.startswith(p.stdout.strip()) and "cut at 3 tokens" in p.stderr


def test_help_names_every_command():
    p = chat("/help")
    assert p.returncode == 0 and p.stdout == ""
    for c in ("/image", "/clear", "/system", "/save", "/stats", "/help", "/quit"):
        assert f"{c} " in p.stderr


def test_same_answer_as_describe_with_the_system_message():
    ask = "What colour is the heart?"
    a = qvl("chat", IMAGES / "heart.jpg", "--system", "You are terse.", stdin=ask).stdout
    assert a == qvl("describe", IMAGES / "heart.jpg", "--system", "You are terse.", "-p", ask).stdout


# ---- terminal ----

def test_prompt_and_streaming_on_a_terminal():
    with Terminal("chat") as t:
        at = t.until("/help lists the rest")
        at = t.until("> ", at)
        t.type(f"/image {IMAGES / 'shapes.png'}\n")
        at = t.until("63 tokens", at)
        at = t.until("> ", at)
        t.type("Describe this image.\n")
        at = t.until(SHAPES, at)
        at = t.until("> ", at)
        t.type("one \\\n")
        at = t.until(". ", at)
        t.type("two\n")
        at = t.until("> ", t.until("\n", at))
        t.type("/frobnicate\n")
        t.until("> ", t.until("unknown command", at))
        t.type("\x04")  # Ctrl-D
        assert t.end() == 0  # failed lines matter to scripts only


def test_interrupt_stops_the_answer_not_the_program():
    with Terminal("chat", IMAGES / "shapes.png", *LONG) as t:
        at = t.until("> ")
        t.type("Describe this image.\n")
        at = t.until("triangle", at)
        t.interrupt()
        at = t.until("(stopped)", at)
        at = t.until("> ", at)
        t.type("/stats\n")
        at = t.until("1 answers", at)
        t.type("/quit\n")
        assert t.end() == 0


def test_interrupt_after_a_stopped_answer_ends():
    with Terminal("chat", IMAGES / "shapes.png", *LONG) as t:
        t.until("> ")
        t.type("Describe this image.\n")
        at = t.until("triangle")
        t.interrupt()
        t.until("> ", t.until("(stopped)", at))
        t.interrupt()
        assert t.end() == 130


def test_two_interrupts_at_the_prompt_end():
    with Terminal("chat") as t:
        at = t.until("> ")
        t.type("half a line")
        t.interrupt()
        at = t.until("> ", t.until("once more", at))
        t.type("Hello\n")  # a message in between starts the count again
        at = t.until("> ", t.until("\n", t.until("Hello", at)))
        t.interrupt()
        at = t.until("> ", t.until("once more", at))
        t.interrupt()
        assert t.end() == 130


def test_interrupt_while_input_is_a_pipe():
    p = subprocess.Popen([str(QVL), "chat", "-m", str(TINY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=ROOT)
    p.stdin.write(b"Hello\n")
    p.stdin.flush()
    assert p.stdout.readline()
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=30) == 130
    p.stdin.close(), p.stdout.close(), p.stderr.close()
