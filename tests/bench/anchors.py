"""llama.cpp beside qvl: the same shapes on the same machine, in turns, as one Markdown table.

Every test runs once in llama.cpp and once in qvl, then again, --rounds times; a cell is the median, with the range behind it.
Half precision is compared with the better of llama.cpp's F16 and BF16, int8 with Q8_0, int4 with the better of Q4_0 and
Q4_K_M (so is b5.5, the model of `qvl quantize --bits 5.5`, where --types asks for it), pictures with the better projector; of files that are
not there none is asked. tests/bench/README.md tells how to build llama.cpp and make the files.

    python3 tests/bench/anchors.py --llama BUILD/bin --gguf DIR --model CHECKPOINT --packed DIR [--rounds 3] [--only decode,image]
"""
import argparse
import json
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QVL = ROOT / "build" / "release" / "qvl"
RIVALS = {"bf16": ["f16", "bf16"], "int8": ["q8_0"], "int4": ["q4_0", "q4_k_m"]}  # those whose files are there
BITS = re.compile(r"b\d+(\.\d+)?$")  # b5.5: a model of qvl quantize --bits 5.5, whose rivals are those of int4
UNITS = {"prefill": "tokens/s", "decode": "tokens/s", "depth": "tokens/s", "streams": "tokens/s", "image": "s"}


def run(*command):
    """What it writes, and what it says beside."""
    p = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if p.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {p.returncode}\n{p.stderr[-2000:]}")
    return p.stdout, p.stderr


def say(text):
    print(text, file=sys.stderr, flush=True)


def noise(path, width, height):
    """A PNG of noise, which no encoder finds easy."""
    rows = b"".join(b"\0" + os.urandom(3 * width) for _ in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b""))


class Llama:
    def __init__(self, a, folder):
        self.bin, self.gguf, self.threads, self.folder = Path(a.llama), Path(a.gguf), a.threads, folder

    def bench(self, kind, *args):
        out = run(self.bin / "llama-bench", "-m", self.gguf / f"m-{kind}.gguf", "-t", self.threads, "-r", 1, "-o", "json", *args)[0]
        return json.loads(out[out.index("["):out.rindex("]") + 1])[0]["avg_ts"]

    def prefill(self, kind):
        return self.bench(kind, "-p", 512, "-n", 0)

    def decode(self, kind):
        return self.bench(kind, "-p", 0, "-n", 64)

    def depth(self, kind):
        return self.bench(kind, "-p", 0, "-n", 64, "-d", 2048)

    def streams(self, kind):
        out, _ = run(self.bin / "llama-batched-bench", "-m", self.gguf / f"m-{kind}.gguf", "-t", self.threads, "-c", 4096, "-npp", 16, "-ntg", 32, "-npl", 16)
        return float([line for line in out.splitlines() if re.match(r"\|\s+16 \|", line)][-1].split("|")[8])

    def image(self, kind, size):
        projector = self.gguf / f"mmproj-{kind}.gguf"
        out = "".join(run(self.bin / "llama-mtmd-cli", "-m", self.gguf / "m-q8_0.gguf", "--mmproj", projector, "--image", self.folder / f"{size}.png",
                  "-p", "What?", "-n", 1, "-t", self.threads, "-c", 4096, "--temp", 0, "-v"))
        times = re.findall(r"(?:encoding done|image slice encoded|image encoded).*? in (\d+) ms", out)
        if not times:
            sys.exit(f"llama-mtmd-cli said nothing about encoding:\n{out[-1500:]}")
        return int(times[0]) / 1e3


class Qvl:
    def __init__(self, a):
        self.threads, self.models = a.threads, {"bf16": Path(a.model)}
        for kind in a.types.split(","):
            if kind == "bf16":
                continue
            self.models[kind] = Path(a.packed) / kind
            if not (self.models[kind] / "qvl.safetensors").exists():
                say(f"packing {kind}")
                self.models[kind].parent.mkdir(parents=True, exist_ok=True)
                run(QVL, "quantize", "-m", a.model, *(("--bits", kind[1:], "--chat-template", "instruct") if BITS.match(kind) else ("--dtype", kind)), self.models[kind])

    def bench(self, kind, *args):
        dtype = ("--dtype", "bf16") if kind == "bf16" else ()
        tests = json.loads(run(QVL, "bench", "-m", self.models[kind], "-t", self.threads, "--repeat", 1, "--json", *dtype, *args)[0])
        self.isa = tests[0]["isa"]
        return tests[0]["values"][0]

    def prefill(self, kind):
        return self.bench(kind, "--prefill", 512)

    def decode(self, kind):
        return self.bench(kind, "--decode", 64)

    def depth(self, kind):
        return self.bench(kind, "--decode", 64, "--depth", 2048)

    def streams(self, kind):
        return self.bench(kind, "--decode", 32, "--streams", 16)

    def image(self, kind, size):
        return self.bench(kind, "--image", size) / 1e3


def cell(values):
    text = f"{statistics.median(values):.3g}"
    return text if len(values) == 1 else f"{text} ({min(values):.3g}–{max(values):.3g})"


def parser(text, alone=False):
    """What every comparison has to be told; alone: some may go without llama.cpp."""
    p = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama", required=not alone, help="the folder with llama.cpp's programs")
    p.add_argument("--gguf", required=not alone, help="m-{f32,f16,bf16,q8_0,q4_0,q4_k_m}.gguf, mmproj-{f16,q8_0}.gguf, those that are compared")
    p.add_argument("--model", required=True, help="the Hugging Face directory that they were made from")
    p.add_argument("--packed", required=True, help="where the packed models int8 and int4 are (or go, with anchors.py)")
    p.add_argument("--threads", type=int, default=2)
    return p


def main():
    p = parser(__doc__)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", default=",".join(UNITS), help="of " + ",".join(UNITS))
    p.add_argument("--types", default="bf16,int8,int4", help="of " + ",".join(RIVALS) + ", b5.5 and the like: qvl quantize --bits 5.5")
    p.add_argument("--sizes", default="448x448,1024x768", help="of pictures")
    a = p.parse_args()
    tests, types = a.only.split(","), a.types.split(",")
    with tempfile.TemporaryDirectory() as folder:
        llama, ours = Llama(a, Path(folder)), Qvl(a)
        rows = [(t, None) for t in tests if t != "image"]
        for size in a.sizes.split(",") if "image" in tests else ():
            noise(Path(folder) / f"{size}.png", *map(int, size.split("x")))
            rows.append(("image", size))
        print(f"{platform.machine()}, {a.threads} threads, {a.rounds} rounds, medians (range)\n\n"
              "| test | type | qvl | llama.cpp | best of theirs | ratio |\n|---|---|---|---|---|---|", flush=True)
        for test, size in rows:
            extra = (size,) if size else ()
            for kind in types:
                if size and kind not in ("bf16", "int8"):
                    continue  # their vision towers are that of int8
                mine, theirs = [], {}
                pattern = "mmproj-{}.gguf" if size else "m-{}.gguf"
                rivals = [r for r in (["f16", "q8_0"] if size else RIVALS["int4" if BITS.match(kind) else kind]) if (llama.gguf / pattern.format(r)).exists()]
                if not rivals:
                    sys.exit(f"{a.gguf}: no file to compare {kind} with")
                for _ in range(a.rounds):
                    for r in rivals:
                        theirs.setdefault(r, []).append(getattr(llama, test)(r, *extra))
                    mine.append(getattr(ours, test)(kind, *extra))
                    say(f"{test} {size or ''} {kind}: {mine[-1]:.3g}, llama.cpp {({r: round(v[-1], 2) for r, v in theirs.items()})}")
                best = (min if size else max)(theirs, key=lambda r: statistics.median(theirs[r]))
                m, t = statistics.median(mine), statistics.median(theirs[best])
                print(f"| {test} {size or ''} ({UNITS[test]}) | {kind} | {cell(mine)} | {cell(theirs[best])} | {best} | {t / m if size else m / t:.2f}x |", flush=True)
        print(f"\nqvl ran its {ours.isa} kernels.")


if __name__ == "__main__":
    main()
