"""What emu_count.cpp wrote, as a table for docs/cuda.md.

Usage: counts.py PLUGIN FILE
"""
import collections
import re
import subprocess
import sys

# Of test_counts: queries times the keys they see.
PREFILL, DECODE, VISION = 160 * 161 // 2, 161, 192 * 192


def flops(kernel, grid):
    """Of a launch, by the shapes of test_counts; None for norms and the like, which do a few for each number."""
    name, _, args = kernel.rstrip(">").partition("<")
    if name == "gemv":
        return 2 * 64 * 2560 * int(args.split(", ")[1])
    if name in ("gemm_mma", "gemm_exact"):
        return 2 * 64 * 128 * 512
    if name in ("moe_gemv", "moe_mma", "moe_exact"):  # two rows of 4 experts, or 64 of 3; gate and up are 128 of 512, down 512 of 64
        outputs = grid[0] * {"moe_gemv": 8, "moe_mma": 32 * int(args[-1:] or 0), "moe_exact": 64}[name]
        return 2 * (128 if grid[1] == 5 else 4) * outputs * (512 if outputs == 128 else 64)
    if (name, args) in (("flash", "4"), ("attend", "2")):
        return 4 * 2 * 64 * VISION
    if name in ("flash", "attend"):
        return 4 * 4 * grid[1] * 128 * (DECODE if grid[0] == 1 else PREFILL)
    return None


def ratio(a, b, form="{:.2f}"):
    return form.format(a / b) if b else ""


def main():
    names = {}
    for line in subprocess.check_output(["nm", "-C", sys.argv[1]], text=True).splitlines():
        m = re.match(r"([0-9a-f]+) [tTwW] (?:void )?(\w+(?:<[^>]*>)?)\(", line)
        if m:
            names[int(m[1], 16)] = m[2].replace("(int)", "")
    total = collections.defaultdict(lambda: [0] * 11)
    for line in open(sys.argv[2]):
        at, grid, *numbers = line.split("\t")
        total[names[int(at, 16)], grid] = [a + int(b) for a, b in zip(total[names[int(at, 16)], grid], numbers)]
    print("| kernel | grid | sectors of a load, times the fewest | of a store, times the fewest | shared memory: cycles, times the fewest | bytes of a launch | FLOPs | FLOPs for a byte |\n" + "|---" * 8 + "|")
    for (name, grid), (launches, size, loads, cost, least, stores, store_cost, store_least, _, shared, shared_least) in sorted(total.items()):
        work = flops(name, [int(x) for x in grid.split("x")])
        print(f"| `{name}` | {grid} | {ratio(cost, loads)}, {ratio(cost, least)} | {ratio(store_cost, stores)}, {ratio(store_cost, store_least)} | {ratio(shared, shared_least)} |"
              f" {size} | {work or ''} | {ratio(work, size, '{:.1f}') if work else ''} |")


if __name__ == "__main__":
    main()
