"""conftest.py - the program under test, and a terminal to run it in.

Input:      environment variable QVL_BUILD: the directory with the built qvl (default build/release).
Invariants: the environment variables that change the tool's behaviour are removed, so that the caller's do not matter.
"""
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("QVL_BUILD", ROOT / "build/release")).resolve()
QVL = BUILD / "qvl"
IMAGES = ROOT / "examples/images"
TINY = ROOT / "examples/models/qvl-tiny"

SHAPES = "A large yellow triangle to the left of a large red star on a gradient background."
HEART = "A large red heart on a light yellow background."


def environment(**more):
    env = {k: v for k, v in os.environ.items() if k not in ("QVL_MODEL", "NO_COLOR")}
    env.update(TERM="xterm", **more)
    return env


def qvl(*args, stdin=b"", env=None, cwd=ROOT, program=QVL, timeout=120):
    """Runs the tool without a terminal: CompletedProcess with stdout and stderr as text."""
    if isinstance(stdin, str):
        stdin = stdin.encode()
    p = subprocess.run([str(program), *map(str, args)], input=stdin, capture_output=True, env=environment(**(env or {})), cwd=cwd,
                       timeout=timeout, check=False)
    p.stdout, p.stderr = p.stdout.decode(), p.stderr.decode()
    assert p.returncode >= 0, f"killed by signal {-p.returncode}: {p.stderr}"
    return p


class Terminal:
    """The tool on a terminal of its own: stdin, stdout and stderr, with Ctrl-C."""

    def __init__(self, *args, columns=100, env=None):
        try:
            self.master, slave = pty.openpty()
        except OSError as e:  # a chroot without /dev/pts
            pytest.skip(f"no terminal to be had: {e}")
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
        self.process = subprocess.Popen([str(QVL), *map(str, args)], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
                                        env=environment(**(env or {})), preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)

    def _read(self, seconds):
        """More output; False at the end of it or when none came."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux: EIO when the other side is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def until(self, text, after=0, seconds=60):
        """Reads until text appears behind position after; returns the position behind it."""
        end = time.monotonic() + seconds
        while (at := self.seen.find(text, after)) < 0:
            if not self._read(max(0, end - time.monotonic())):
                raise AssertionError(f"{text!r} did not appear in {self.seen[after:]!r}")
        return at + len(text)

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt(self):
        self.type("\x03")

    def end(self, seconds=60):
        """Reads to the end; returns the exit code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._read(0.2 if self.process.poll() is None else 0.05) or self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.seen!r}"
        return self.process.wait()
