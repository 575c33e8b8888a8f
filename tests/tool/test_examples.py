"""test_examples.py - the example programs do what their first lines say."""
import os
import subprocess
import sys

from conftest import BUILD, HEART, IMAGES, ROOT, SHAPES, environment


def run(*args, stdin="", **env):
    return subprocess.run(list(map(str, args)), input=stdin, capture_output=True, text=True, cwd=ROOT, env=environment(**env), timeout=120, check=False)


def test_caption():
    p = run(BUILD / "examples/caption")
    assert (p.returncode, p.stdout, p.stderr) == (0, SHAPES + "\n", "")
    assert run(BUILD / "examples/caption", IMAGES / "heart.jpg").stdout == HEART + "\n"
    p = run(BUILD / "examples/caption", "nope.png")
    assert p.returncode == 1 and p.stderr.startswith("QVL_EIO: ") and "nope.png" in p.stderr


def test_chat():
    p = run(BUILD / "examples/chat", IMAGES / "shapes.png", stdin='Describe this image.\nHow many "shapes"\\ are there?\n')
    first, second = p.stdout.splitlines()
    assert p.returncode == 0 and p.stderr == "" and first == SHAPES and second
    assert run(BUILD / "examples/chat").returncode == 2
    assert run(BUILD / "examples/chat", "nope.png").returncode == 1


def test_batch():
    files = ["examples/images/shapes.png", "examples/images/heart.jpg", "examples/images/cross.png"]
    p = run(BUILD / "examples/batch", *files)
    pieces, answers = p.stdout.split("\n\n")
    assert p.returncode == 0 and p.stderr == ""
    answers = dict(line.split(" (stop): ") for line in answers.splitlines())
    assert list(answers) == files and answers[files[0]] == SHAPES and answers[files[1]] == HEART
    order = [line.split("]")[0][1:] for line in pieces.splitlines()]
    assert sum(a != b for a, b in zip(order, order[1:])) > 10, "answers are made together"


def test_chat_py():
    python = {"PYTHONPATH": str(ROOT / "bindings/python"), "QVL_LIBRARY": os.environ.get("QVL_LIBRARY", str(BUILD / "libqvl.so"))}
    p = run(sys.executable, "examples/chat.py", IMAGES / "shapes.png", **python,
            stdin=f"Describe this image.\n/image nope.png\n/image {IMAGES / 'heart.jpg'}\nWhat colour is the heart?\n/quit\n")
    assert p.returncode == 0 and p.stdout.splitlines()[0] == SHAPES and len(p.stdout.splitlines()) == 2
    assert "nope.png" in p.stderr
