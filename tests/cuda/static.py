"""What the compiler made of the CUDA kernels: registers, stack, occupancy, and the instructions that must be there.

Job:        hold every kernel on every architecture against tests/cuda/budgets.json.
Input:      objects of "make cuda"; cuobjdump, from the toolkit, the PATH or PyPI (into build/venv).
Output:     a table; exit status 1 with the kernels that are over their budget, 2 when something is missing.
Invariants: nothing is run on a GPU; occupancy is counted from published limits of a multiprocessor and is not a speed.

Usage: static.py [--update] [--table] OBJECT...
"""
import argparse
import collections
import json
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUDGETS = pathlib.Path(__file__).with_name("budgets.json")
# Threads, registers, shared memory (KiB), blocks of a multiprocessor: CUDA C++ programming guide, "compute capabilities".
LIMITS = {80: (2048, 65536, 164, 32), 86: (1536, 65536, 100, 16), 89: (1536, 65536, 100, 24), 90: (2048, 65536, 228, 32), 100: (2048, 65536, 228, 32), 120: (1536, 65536, 100, 24)}
# Threads and dynamic shared memory (bytes) of a block, as the launches give them (head_dim 128 where it matters).
LAUNCHES = {"gemm_mma": (256, None), "gemm_exact": (256, 16896), "gemv": (128, 0), "flash": (256, None), "attend": (128, 37120)}
# Tensor cores, matrix loads from shared memory, asynchronous copies.
NEEDED = {"gemm_mma": ["HMMA", "LDSM", "LDGSTS"], "flash": ["HMMA", "LDSM", "LDGSTS"]}
REGISTER_ROOM = 8  # a new compiler may take so many more


def tool():
    found = shutil.which("cuobjdump", path="/usr/local/cuda/bin") or shutil.which("cuobjdump")
    if found:
        return found
    venv = ROOT / "build" / "venv"
    if not venv.exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"], check=True)
    for path in venv.glob("lib/python*/site-packages/nvidia/*/bin/cuobjdump"):
        path.chmod(0o755)
        return str(path)
    sys.exit("static.py: no cuobjdump: install NVIDIA's cuda-cuobjdump package")


def lines(*command):
    """cuobjdump finds nvdisasm by the PATH: its own folder comes first."""
    path = f"{pathlib.Path(command[0]).parent}:/usr/bin:/bin"
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PATH": path})
    if out.returncode:
        print(out.stderr, file=sys.stderr)
        sys.exit(2)
    return out.stdout.splitlines()


def plain(names):
    """Mangled to short names: flash<8>, gemv<1, 4>."""
    full = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")
    return {n: re.sub(r"^void ", "", f.split("(")[0]) for n, f in zip(names, full)}


def measure(dump, objects):
    """{(kernel, arch): {"registers", "stack", "opcodes"}}"""
    found = {}
    for o in objects:
        for arch in LIMITS:
            name, raw = None, {}
            for line in lines(dump, "-res-usage", "-arch", f"sm_{arch}", o):
                if m := re.match(r"\s*Function (\S+):", line):
                    name = m[1]
                elif name and (m := re.search(r"REG:(\d+) STACK:(\d+)", line)):
                    raw[name] = {"registers": int(m[1]), "stack": int(m[2]), "opcodes": collections.Counter()}
                    name = None
            for line in lines(dump, "-sass", "-arch", f"sm_{arch}", o):
                if m := re.match(r"\s*Function : (\S+)", line):
                    name = m[1]
                elif name in raw and (m := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line)):
                    raw[name]["opcodes"][m[1]] += 1
            short = plain(list(raw))
            found.update({(short[n], arch): v for n, v in raw.items()})
    return found


def occupancy(kernel, arch, registers):
    """Part of a multiprocessor's threads that can be there at a time."""
    threads, file, shared, blocks = LIMITS[arch]
    mine, bytes_ = LAUNCHES.get(kernel.split("<")[0], (256, 0))
    if bytes_ is None:
        last = int(re.search(r"(\d+)>", kernel)[1])
        bytes_ = 3 * (64 + 32 * last) * 80 if kernel.startswith("gemm_mma") else 2 * 2 * 32 * (last * 32 + 16)
    fit = min(threads // mine, file // (-(-registers // 8) * 8 * mine), blocks, shared * 1024 // (bytes_ + 1024))
    return fit * mine / threads


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("objects", nargs="+")
    a.add_argument("--update", action="store_true", help="write budgets.json from what is there")
    a.add_argument("--table", action="store_true", help="Markdown for docs/cuda.md")
    args = a.parse_args()
    found = measure(tool(), args.objects)
    kernels = sorted({k for k, _ in found})
    if args.update:
        BUDGETS.write_text(json.dumps({k: {"registers": max(v["registers"] for (n, _), v in found.items() if n == k),
                                           "stack": max(v["stack"] for (n, _), v in found.items() if n == k)} for k in kernels}, indent=1) + "\n")
    budgets, bad = json.loads(BUDGETS.read_text()), []
    for (kernel, arch), v in sorted(found.items()):
        budget = budgets.get(kernel)
        if not budget:
            bad.append(f"{kernel}: no budget; run static.py --update and look at what it says")
            continue
        if v["registers"] > budget["registers"] + REGISTER_ROOM:
            bad.append(f"{kernel} on sm_{arch}: {v['registers']} registers, budget {budget['registers']} + {REGISTER_ROOM}")
        if v["stack"] > budget["stack"]:
            bad.append(f"{kernel} on sm_{arch}: {v['stack']} bytes of stack, budget {budget['stack']}")
        for op in NEEDED.get(kernel.split("<")[0], []):
            if not v["opcodes"][op]:
                bad.append(f"{kernel} on sm_{arch}: no {op} among its instructions")
    bad += [f"{k}: in budgets.json but not among the objects" for k in budgets if k not in kernels]
    if args.table:
        print("| kernel | registers sm_80 / sm_90 / sm_120 | stack | threads of a multiprocessor sm_80 / sm_90 / sm_120 |\n|---|---|---|---|")
        for k in kernels:
            r = [found[k, arch]["registers"] for arch in (80, 90, 120)]
            print(f"| `{k}` | {' / '.join(map(str, r))} | {max(found[k, x]['stack'] for x in LIMITS)} | "
                  f"{' / '.join(f'{occupancy(k, x, n):.0%}' for x, n in zip((80, 90, 120), r))} |")
    print(f"{len(kernels)} kernels on {len(LIMITS)} architectures: {len(bad)} over budget")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
