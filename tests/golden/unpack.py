#!/usr/bin/env python3
"""Unpacks tests/golden/**/*.xz below build/golden, where they are missing or older than what they come from.

Large golden inputs are kept compressed in the repository; tests that need one run this first (from the repository's root).
Several tests may run it at once: a file appears under its name only when it is whole.
"""
import lzma
import os
import pathlib
import tempfile

SOURCE, TARGET = pathlib.Path("tests/golden"), pathlib.Path("build/golden")

for packed in sorted(SOURCE.rglob("*.xz")):
    out = TARGET / packed.relative_to(SOURCE).with_suffix("")
    if out.exists() and out.stat().st_mtime >= packed.stat().st_mtime:
        continue
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=out.parent, delete=False) as part:
        part.write(lzma.decompress(packed.read_bytes()))
    os.chmod(part.name, 0o644)
    os.replace(part.name, out)
