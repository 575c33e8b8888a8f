"""A whole answer, from the start of the program to its end: a 1024x768 picture of noise, a question of about 30 tokens, 100 tokens of
answer, beside llama.cpp (--llama: llama-mtmd-cli) and transformers in float (--transformers). One Markdown table, medians of --rounds
in turns; files are in the page cache after the first, unmeasured, round.

    python3 tests/bench/whole.py [--llama BUILD/bin --gguf DIR] --model CHECKPOINT --packed DIR [--rounds 2] [--transformers VENV/bin/python]
"""
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from anchors import QVL, noise, parser

QUESTION = "Describe this picture in as much detail as you can: what is there, where, in which colours, and what may have happened just before it was taken?"
TOKENS = 100
TRANSFORMERS = """
import json, sys, time, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(int(sys.argv[4]))
processor, model = AutoProcessor.from_pretrained(sys.argv[1]), AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
text = f"<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>{sys.argv[3]}<|im_end|>\\n<|im_start|>assistant\\n"
inputs = processor(text=[text], images=[Image.open(sys.argv[2])], return_tensors="pt")
began = time.time()
first = []
class Watch:
    def put(self, x): first.append(time.time() - began)
    def end(self): pass
with torch.no_grad():
    model.generate(**inputs, max_new_tokens=int(sys.argv[5]), min_new_tokens=int(sys.argv[5]), do_sample=False, streamer=Watch())
print(json.dumps({"first": first[1]}))
"""


# In a process of its own, so that RUSAGE_CHILDREN is of this program alone.
CHILD = """
import json, resource, subprocess, sys, time
began = time.monotonic()
p = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
print(json.dumps([time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, p.returncode, p.stdout, p.stderr[-2000:]]))
"""


def run(*command):
    """Seconds, GB at most, what it wrote."""
    seconds, memory, rc, out, err = json.loads(subprocess.check_output([sys.executable, "-c", CHILD, *map(str, command)]))
    if rc:
        sys.exit(f"{' '.join(map(str, command))}: exit code {rc}\n{err}")
    return seconds, memory, out


def main():
    p = parser(__doc__, alone=True)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--types", default="int4,int8,bf16", help="of int4,int8,bf16, and others that are in --packed")
    p.add_argument("--transformers", help="a Python that has transformers, torch, torchvision and pillow: run once")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "noise.png"
        noise(picture, 1024, 768)
        runs = {}
        for kind in a.types.split(","):
            where = ("-m", Path(a.packed) / kind) if kind != "bf16" else ("-m", a.model, "--dtype", "bf16")
            runs[f"qvl {kind}"] = [QVL, "describe", picture, "-p", QUESTION, *where, "-t", a.threads, "--max-tokens", TOKENS, "--ignore-eos", "--temperature", 0,
                                  "--chat-template", "instruct", "--json"]
        rivals = {"int4": "q4_0", "int8": "q8_0", "bf16": "f16"} if a.llama else {}
        for kind in (rivals[k] for k in a.types.split(",") if k in rivals):
            projector = Path(a.gguf) / f"mmproj-{'f16' if kind == 'f16' else 'q8_0'}.gguf"
            runs[f"llama.cpp {kind.upper()}"] = [Path(a.llama) / "llama-mtmd-cli", "-m", Path(a.gguf) / f"m-{kind}.gguf", "--mmproj", projector, "--image", picture, "-p", QUESTION,
                                                 "-n", TOKENS, "-t", a.threads, "-c", 4096, "--temp", 0, "--ignore-eos"]
        found = {name: [] for name in runs}
        for turn in range(a.rounds + 1):
            for name, command in runs.items():
                seconds, memory, out = run(*command)
                times = json.loads(out)["timings"] if name.startswith("qvl") else {}
                if turn:
                    found[name].append((seconds, memory, times.get("ttft_ms", 0) / 1e3))
                print(f"round {turn}, {name}: {seconds:.1f} s, {memory:.2f} GB", file=sys.stderr, flush=True)
        if a.transformers:
            seconds, memory, out = run(a.transformers, "-c", TRANSFORMERS, a.model, picture, QUESTION, a.threads, TOKENS)
            found["transformers float"] = [(seconds, memory, json.loads(out.splitlines()[-1])["first"])]
    print("| | whole, s | first token, s after loading | peak memory, GB |\n|---|---|---|---|")
    for name, values in found.items():
        seconds, memory, first = (statistics.median(x) for x in zip(*values))
        print(f"| {name} | {seconds:.1f} | {f'{first:.1f}' if first else ''} | {memory:.2f} |")


if __name__ == "__main__":
    main()
