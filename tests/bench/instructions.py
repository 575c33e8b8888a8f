"""Instructions that fixed jobs take, held against tests/bench/instructions.json: a gate that no noise of a machine can move.

valgrind counts them with QVL_CPU=avx2 and one thread; the same binary gives the same count to five digits. Every job loads
the bundled model; "load" tells what that is. A count may grow by 2 %; what shrank by more is said, so that --update keeps the
gain. Counts belong to a compiler and a C library: the file has Debian 12's.

    make check-instructions            python3 tests/bench/instructions.py --update
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KNOWN = Path(__file__).with_name("instructions.json")
TOLERANCE = 0.02
JOBS = {
    "load": "info",
    "tokenize": "tokenize --json",
    "prefill bf16": "bench --prefill 256 --repeat 1",
    "prefill int8": "bench --dtype int8 --prefill 256 --repeat 1",
    "prefill int4": "bench --dtype int4 --prefill 256 --repeat 1",
    "decode bf16": "bench --decode 64 --repeat 1",
    "decode int4": "bench --dtype int4 --decode 64 --repeat 1",
    "decode at depth": "bench --decode 16 --depth 512 --repeat 1",
    "image": "bench --image 224x224 --repeat 1",
}


def count(arguments):
    words = arguments.split()
    text = (ROOT / "LICENSE").read_bytes()  # for tokenize: a file that stays
    threads = [] if words[0] == "tokenize" else ["-t", "1"]
    p = subprocess.run(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", ROOT / "build/release/qvl", *words, *threads], input=text,
                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "QVL_CPU": "avx2", "QVL_CUDA_PLUGIN": "none"})  # looking for a GPU is not what is counted
    found = re.search(rb"Collected : (\d+)", p.stderr)
    if p.returncode or not found:
        sys.exit(f"qvl {arguments}: exit code {p.returncode}\n{p.stderr.decode()[-1500:]}")
    return int(found[1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--update", action="store_true", help="write the counts as the new ones")
    a = p.parse_args()
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    counts, grown = {}, []
    print(f"{'job':18} {'million':>10} {'known':>10} {'change':>8}")
    for name, arguments in JOBS.items():
        n = count(arguments)
        counts[name] = n
        was = known.get(name)
        change = n / was - 1 if was else float("nan")
        grown += [name] if not change <= TOLERANCE else []
        note = "  grew" if not change <= TOLERANCE else "  shrank: run with --update" if change < -TOLERANCE else ""
        print(f"{name:18} {n / 1e6:10.1f} {was / 1e6 if was else float('nan'):10.1f} {change:8.2%}{note}", flush=True)
    if a.update:
        KNOWN.write_text(json.dumps(counts, indent=1) + "\n")
        return 0
    if grown:
        print(f"{', '.join(grown)}: more than {TOLERANCE:.0%} over {KNOWN.relative_to(ROOT)}; find out why, or run this with --update", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
