"""What each type of weights costs in accuracy, llama.cpp's beside ours: KL divergence of the next token's distribution from that of
the same program with float weights, over the same text of the same checkpoint, as one Markdown table.

llama.cpp: llama-perplexity --kl-divergence against m-f32.gguf (convert_hf_to_gguf.py --outtype f32), which scores the second half of
every chunk; qvl: the same tokens of the same chunks against dtype f32.

    python3 tests/bench/divergence.py [--llama BUILD/bin --gguf DIR] --model CHECKPOINT --packed DIR [--also b6.2] [--text README.md] [--chunks 2]
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from anchors import ROOT, parser

sys.path.insert(0, str(ROOT / "bindings" / "python"))
import qvl  # noqa: E402

CONTEXT = 512


def theirs(a, kinds):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        common = ["-f", a.text, "-c", CONTEXT, "--chunks", a.chunks, "-t", a.threads, "--kl-divergence-base", base]
        perplexity(a, "f32", *common)
        return {kind: float(re.search(r"Mean\s+KLD:\s+([-\d.]+)", perplexity(a, kind, *common, "--kl-divergence"))[1]) for kind in kinds}


def perplexity(a, kind, *args):
    p = subprocess.run([str(x) for x in (Path(a.llama) / "llama-perplexity", "-m", Path(a.gguf) / f"m-{kind}.gguf", *args)], capture_output=True, text=True)
    if p.returncode:
        sys.exit(f"llama-perplexity, {kind}: exit code {p.returncode}\n{p.stderr[-2000:]}")
    return p.stdout + p.stderr


def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def ours(a, kinds):
    """One model after the other: the float one alone takes 8.5 GB with 2B weights, and a chunk's distributions 0.15 GB."""
    found = {kind: [] for kind in kinds}
    exact = qvl.Model(a.model, dtype="f32", threads=a.threads)
    tokens = exact.encode_text(Path(a.text).read_text())
    chunks = [tokens[i * CONTEXT:(i + 1) * CONTEXT] for i in range(a.chunks)]
    if len(chunks[-1]) < CONTEXT:
        sys.exit(f"{a.text} has {len(tokens)} tokens, {a.chunks * CONTEXT} are needed")
    scored = slice(CONTEXT // 2, CONTEXT - 1)
    want = [log_softmax(exact.logits(c)[scored]).astype(np.float32) for c in chunks]
    del exact
    for kind in kinds:
        packed = Path(a.packed) / kind
        model = qvl.Model(packed, threads=a.threads) if packed.exists() else qvl.Model(a.model, dtype=kind, threads=a.threads)
        for c, p in zip(chunks, want):
            found[kind].append((np.exp(p.astype(np.float64)) * (p - log_softmax(model.logits(c)[scored]))).sum(axis=-1).mean())
        del model
    return {kind: float(np.mean(x)) for kind, x in found.items()}


def main():
    p = parser(__doc__, alone=True)
    p.add_argument("--text", default=str(ROOT / "README.md"))
    p.add_argument("--chunks", type=int, default=2, help=f"of {CONTEXT} tokens")
    p.add_argument("--also", default="", help="more directories in that of --packed, by name, with commas: qvl quantize --bits")
    a = p.parse_args()
    more = [name for name in a.also.split(",") if name]
    mine, other = ours(a, ["bf16", "int8", "int4", *more]), theirs(a, ["f16", "bf16", "q8_0", "q4_0", "q4_k_m"]) if a.llama else {}
    print("| type | qvl | llama.cpp |\n|---|---|---|")
    for kind, rivals in (("bf16", ["f16", "bf16"]), ("int8", ["q8_0"]), ("int4", ["q4_0", "q4_k_m"])):
        print(f"| {kind} | {mine[kind]:.3g} | {', '.join(f'{r.upper()} {other[r]:.3g}' for r in rivals if r in other)} |")
    for kind in more:
        print(f"| {kind} | {mine[kind]:.3g} | |")


if __name__ == "__main__":
    main()
