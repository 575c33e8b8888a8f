"""Planted faults: each of these changes to the CUDA backend must make a test fail under emulation.

Job:        change one line, build the backend for the emulator, run one test of cuda_ops in several orders.
Input:      libqvl/device/cuda, the emulator and the tests, as "make check-emu" builds them.
Output:     a table (Markdown); exit status 1 when a fault was not caught or a line to change is not there any more.
Invariants: the sources are changed in copies below build/; a fault counts as caught when any order of threads shows it,
            never when it does not compile. These faults were thought of; sweep.py makes them by rule.

Usage: mutants.py BUILD_DIRECTORY EMULATOR_DIRECTORY CXX FLAGS...
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys

SRC = pathlib.Path("libqvl/device/cuda")
ORDERS = 4
# fault, file, line, what becomes of it, mode and test that must fail
MUTANTS = [
    ("no barrier between writing and reading shared sums", "kernels/rows.cuh", "    __syncthreads();\n    float sum = 0;", "    float sum = 0;", "exact test_norms"),
    ("no barrier after loading a tile", "kernels/gemm_exact.cuh", "        __syncthreads();\n        int most", "        int most", "exact test_matmul"),
    ("no barrier before a tile is overwritten", "kernels/gemm_exact.cuh", "        __syncthreads();\n    }\n", "    }\n", "exact test_matmul"),
    ("no barrier before reading keys", "kernels/attend.cuh", "        __syncthreads();\n        for (int j = 0; j < 2; j++) {", "        for (int j = 0; j < 2; j++) {", "exact same_decoding"),
    ("an asynchronous copy is read before its wait (product)", "kernels/gemm_mma.cuh", "wait<MMA_STAGES - 2>", "wait<MMA_STAGES - 1>", "deterministic test_matmul"),
    ("no barrier behind the wait (product)", "kernels/gemm_mma.cuh", "        __syncthreads(); /* step s", "        /* step s", "deterministic test_matmul"),
    ("an asynchronous copy is read before its wait (attention)", "kernels/flash.cuh", "qvl_cp_async_wait<1>", "qvl_cp_async_wait<2>", "deterministic test_vision"),
    ("no barrier before keys are overwritten", "kernels/flash.cuh", "if (k0) __syncthreads();", "", "deterministic test_vision"),
    ("shuffle mask leaves lanes out", "port.cuh", "x += __shfl_xor_sync(0xffffffffu, x, i)", "x += __shfl_xor_sync(0x0000ffffu, x, i)", "exact test_norms"),
    ("lanes read what others wrote without __syncwarp", "kernels/cache.cuh", "        __syncwarp();\n", "", "exact test_attention_paged"),
    ("block table off by one", "kernels/attend.cuh", "keys_at(c, seq, k0, kv_head)", "keys_at(c, seq, k0 + (k0 ? QVL__KV_BLOCK : 0), kv_head)", "exact same_decoding"),
    ("a key too few", "kernels/attend.cuh", "return a.pos ? a.pos[r] + 1 : a.span;", "return a.pos ? a.pos[r] + (a.pos[r] == 0) : a.span;", "exact test_attention_paged"),
    ("rows of another sequence are not masked", "kernels/flash.cuh", "seq[i] == s && row[i] >= r0 && row[i] < r1 ? limit[i] - k0 : 0", "limit[i] - k0", "deterministic same_decoding"),
    ("two blocks add to the same row", "kernels/rows.cuh", "    if (__syncthreads_or(earlier)) return;\n", "", "exact test_row_ops"),
    ("results are read without waiting for the stream", "plugin.cu", 'if (cuda_wait(c, NULL)) memcpy', "memcpy", "exact test_row_ops"),
    ("staging memory is reused before its copy has run", "plugin.cu", "        cuda_wait(c, c->staged[c->stage]);\n", "", "exact test_staging"),
    ("an expert's rows begin one too far", "kernels/moe.cuh", "    f.y += (size_t)g.first[e] * f.ld;", "    f.y += (size_t)(g.first[e] + (e > 0)) * f.ld;", "exact test_moe"),
    ("experts are added as they were chosen", "kernels/moe.cuh", "if (expert[j] > last && (k < 0 || expert[j] < expert[k])) k = j;", "if (j == n) k = j;", "exact test_moe"),
    ("a tile too few", "kernels/moe.cuh", "    int mine = (g.count[e] + MOE_TILE - 1) / MOE_TILE;", "    int mine = g.count[e] / MOE_TILE;", "exact test_moe"),
    ("no barrier before bins are added up", "kernels/draw.cuh", "        __syncthreads();\n        if (threadIdx.x < 32) {", "        if (threadIdx.x < 32) {", "exact test_sample"),
    ("a token too many behind a cut", "kernels/draw.cuh", "if (before < left && left <= up_to) {", "if (before <= left && left < up_to) {", "exact test_sample"),
    ("a tie at the cut keeps all", "kernels/draw.cuh", "equals - 1, s);", "each ? (uint64_t)0 : equals - 1, s);", "exact test_sample"),
    ("bias and penalty at the same time", "kernels/draw.cuh", "    __syncthreads();\n    c += d.bias;", "    c += d.bias;", "exact test_sample"),
    ("parts of a sum are not added up", "gemm.cu", "    if (division == QVL__BY_INPUT) cuda_sum(c, y, (size_t)rows * (size_t)m->n);\n", "", "exact test_divided"),
    ("every GPU adds the bias", "gemm.cu", "        if (c->rank) f.bias = NULL; /* it is added once */\n", "", "exact test_divided"),
    ("the bias of GPU 0's heads for all", "gemm.cu", "bias ? bias + p.out[0].from : NULL", "bias", "exact test_divided"),
    ("keys of a shared head are another GPU's", "divide.h", "run{(int)((int64_t)heads * rank / ranks), 1}", "run{0, 1}", "exact test_divided"),
    ("columns of the last GPU's part of a table", "kernels/sums.cuh", "* each + i % each", "* each + (i + 1) % each", "exact test_divided"),
    ("the host reads before the threads of the GPUs have", "parallel.cu", "        if (s->rank == 0) g->get(g, host, s->here((const char *)src), size);\n    });\n    drain(p);", "        if (s->rank == 0) g->get(g, host, s->here((const char *)src), size);\n    });", "exact test_divided"),
]


def reached(path):
    """A source and every file of the backend that it includes, over any number of steps."""
    found, todo = set(), [path]
    while todo:
        at = todo.pop()
        if at not in found and at.exists():
            found.add(at)
            todo += [at.parent / name if (at.parent / name).exists() else SRC / name for name in re.findall(r'#include "(?:\.\./)?([\w./]+)"', at.read_text())]
    return found


class Lab:
    """Builds the backend with one file changed, and runs tests on it."""

    def __init__(self, build, emulator, cxx, flags):
        self.build, self.cxx, self.flags = build, cxx, flags
        self.objects = [str(o) for o in sorted(emulator.rglob("*.o"))]
        self.copy, self.so = build / "mutant" / "libqvl", build / "mutant" / "libqvl-cuda.so"
        self.asan = [f for f in flags if f.startswith("-fsanitize=address")]

    def make(self, file, text):
        """False when it does not compile."""
        shutil.rmtree(self.copy, ignore_errors=True)
        for part in ("device", "base"):
            shutil.copytree(f"libqvl/{part}", self.copy / part)
        shutil.copytree("include", self.build / "mutant" / "include", dirs_exist_ok=True)
        (self.copy / "device" / "cuda" / file).write_text(text)
        mine = []
        for unit in sorted(SRC.glob("*.cu")):
            o = self.build / "mutant" / f"{unit.name}.o"
            if SRC / file in reached(unit):
                if subprocess.run([self.cxx, "-x", "c++", *self.flags, "-O1", "-c", str(self.copy / "device" / "cuda" / unit.name), "-o", str(o)], stderr=subprocess.PIPE).returncode:
                    return False
                mine.append(str(o))
            else:
                mine += [x for x in self.objects if x.endswith(f"/{unit.name}.o")]
        subprocess.run([self.cxx, "-shared", "-pthread", *self.asan, "-o", str(self.so), *mine, *[x for x in self.objects if x.endswith(".cpp.o")]], check=True)
        return True

    def shows(self, test, seed, seconds):
        """How a test shows that something is wrong with what was made, "" when it does not."""
        env = dict(os.environ, QVL_CUDA_PLUGIN=str(self.so), QVL_EMU_MEMORY=str(1 << 32), QVL_EMU_DEVICES="4", QVL_EMU_SEED=str(seed), QVL_EMU_ASYNC="lazy" if seed % 2 else "random")
        if self.asan:
            env.update(ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD=subprocess.check_output([self.cxx, "-print-file-name=libasan.so"], text=True).strip())
        try:
            out = subprocess.run([str(self.build / "tests/ops/cuda_ops"), *test.split()], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"does not end, order {seed}"
        if "Running 1 test(s)" not in out.stdout:
            sys.exit(f"{test}: ran no test\n{out.stdout}")
        if out.returncode == 0:
            return ""
        said = out.stdout.splitlines()
        how = "named by the emulator" if any(x.startswith("qvl-emu: ") for x in said) else "named by ASan" if any("AddressSanitizer" in x for x in said) else "wrong numbers"
        return f"{how}, order {seed}"


def main():
    lab = Lab(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    bad = 0
    print("| planted fault | where | caught by | how |\n|---|---|---|---|")
    for fault, file, line, becomes, test in MUTANTS:
        text = (SRC / file).read_text()
        if text.count(line) != 1:
            print(f"{file}: {text.count(line)} places for {fault!r}, one is needed", file=sys.stderr)
            bad += 1
            continue
        if not lab.make(file, text.replace(line, becomes)):
            sys.exit(f"{file}: does not compile with {fault!r}")
        how = next(filter(None, (lab.shows(test, seed, 900) for seed in range(1, ORDERS + 1))), "")
        bad += not how
        print(f"| {fault} | `{file}` | `{test}` | {how or '**not caught**'} |", flush=True)
    print(f"\n{len(MUTANTS)} planted faults, {bad} not caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
