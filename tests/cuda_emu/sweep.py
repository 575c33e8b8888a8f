"""Every barrier, wait and bound of the CUDA backend taken away in turn: a test must fail under emulation.

Job:        make mutants of the sources by rule, one change each; run the op tests that reach the line, first on the fast build of the
            emulator, where all its orders are silent on those that follow (check, asan).
Input:      libqvl/device/cuda, the emulator and the tests, built.
Output:     a line for each mutant as it goes, a table for each kernel (Markdown); exit status 1 when a mutant survives that is not in
            EQUIVALENT, when one that is there is caught or is no mutant any more, or when one does not compile.
Invariants: a test that fails without any mutant ends the sweep. Outcomes are kept in BUILD/mutants.json under a hash of all that
            they depend on (changed source, other sources, tests, build of the emulator), so that a sweep which was interrupted goes on.

Usage: sweep.py [--only=WORD,...] [--rules=RULE,...] [--list] BUILD CXX KIND DIRECTORY FLAGS [KIND DIRECTORY FLAGS ...]
       WORD: part of "file function"; FLAGS: one argument
"""
import collections
import hashlib
import json
import pathlib
import re
import shlex
import sys
import time

from mutants import SRC, Lab

ORDERS = {"fast": 3, "check": 1, "asan": 1}
# Tests that reach a file's lines; kernels of flash and mma run in mode deterministic, gemv in fast.
REACH = {
    "kernels/attend.cuh": ["exact same_decoding", "exact test_attention_paged", "exact test_vision", "exact test_attention_shapes"],
    "kernels/cache.cuh": ["exact same_decoding", "exact test_attention_paged", "deterministic test_attention_paged", "exact test_vision", "exact test_attention_shapes"],
    "kernels/draw.cuh": ["exact test_sample"],
    "kernels/epilogue.cuh": ["exact test_matmul", "exact test_activations", "exact test_matmul_ends"],
    "kernels/flash.cuh": ["deterministic same_decoding", "deterministic test_vision", "deterministic test_attention_paged", "deterministic test_attention_shapes"],
    "kernels/gemm_exact.cuh": ["exact test_matmul", "exact test_matmul_ends"],
    "kernels/gemm_mma.cuh": ["deterministic test_matmul", "deterministic test_matmul_ends"],
    "kernels/gemv.cuh": ["fast test_matmul_ends", "fast test_matmul", "fast test_activations"],
    "kernels/layout.cuh": ["fast test_large_inputs", "exact test_map", "exact test_pack_embed", "fast test_matmul"],
    "kernels/moe.cuh": ["exact test_moe", "deterministic test_moe", "fast test_moe"],
    "kernels/rows.cuh": ["exact test_norms", "exact test_row_ops", "exact test_vision"],
    "kernels/sums.cuh": ["exact test_divided", "fast test_divided"],
    "kernels/weights.cuh": ["exact test_map", "exact test_pack_embed", "fast test_matmul_ends", "fast test_matmul", "exact test_divided"],
    "port.cuh": ["exact test_norms", "exact test_sample", "deterministic test_vision"],
    "plugin.cu": ["exact test_staging", "exact test_recorded", "exact test_row_ops", "exact test_divided"],
    "parallel.cu": ["exact test_divided"],
}
SHAPES = "test_attention_shapes"  # more numbers: for the fast build alone. The others see an access as such, in any shape.
RULES = [  # name, what is looked for, what becomes of it; bounds have code of their own
    ("barrier", r"__sync(?:threads|warp)\(\);", ";"),
    ("barrier", r"__syncthreads_or(?=\()", ""),
    ("wait", r"qvl_cp_async_wait<([^>]+)>\(\);", r"qvl_cp_async_wait<\1 + 1>();"),
    ("wait", r"qvl_cp_async_wait<([^>]+)>\(\);", ";"),
    ("commit", r"qvl_cp_async_commit\(\);", ";"),
    ("mask", r"\b0xffffffffu(?=, )", "0x0000ffffu"),
    ("distance", r"int i = 16; i; i >>= 1", "int i = 8; i; i >>= 1"),
    ("distance", r"(__shfl_xor_sync\(\w+, \w+), [12]\)", r"\1, 4)"),
    ("distance", r"(__shfl_sync\(\w+, [^;]*?), (\w+)\)", r"\1, \2 ^ 1)"),
    ("host wait", r"cuda_ok\(c, cudaEventRecord\([^;]*;", ";"),
    ("host wait", r"(?<!bool )cuda_wait\((?:[^()]|\([^()]*\))*\)", "true"),
    ("host wait", r"(?<!void )drain\(p\);", ";"),
    ("host wait", r"cuda(?:Event|Stream)Synchronize\([^()]*\)", "cudaSuccess"),
]
# file, function, the line as it becomes (; and the line behind it where nothing is left; a number where the function has several), why nothing can show it
EQUIVALENT = [
    ("kernels/attend.cuh", "attend", "if (false) return;", "a piece without keys ends after doing nothing, and attend_join does not read what it writes"),
    ("kernels/attend.cuh", "attend", "for (int k0 = first; k0 <= end; k0 += QVL__KV_BLOCK) {", "in the turn more no key is left: most is 0"),
    ("kernels/attend.cuh", "attend", "float top = fmaxf(max[j], warp_max(s)), shrink = expf(max[j] - top), p = true ? expf(s - top) : 0.0f;", "s is -inf there"),
    ("kernels/cache.cuh", "cache_store", "((int8_t *)half)[at + i] = (int8_t)(false ? 127 : q < -127.0f ? -127 : (int)q);", "x / max is 1 at most; where 127 / max overflows, any integer is as near to such numbers"),
    ("kernels/draw.cuh", "draw_max", "; if (threadIdx.x % 32 == 0) s->part[threadIdx.x / 32] = qvl__order_of(x);", "nothing has used part before: it is called once, first"),
    ("kernels/draw.cuh", "draw_rows", "return (double)l >= floor && true && *order >= least && (*order != last || i <= id);", "-inf has no mass, and comes last where tokens are counted"),
    ("kernels/draw.cuh", "draw_rows", "if (true) {", "a cut at 1 keeps all, but for what a sum of more than 53 bits loses as a double"),
    ("kernels/draw.cuh", "draw_rows", "need = need < 1 ? 1 : true ? need : total;", "only a top_p that is the last double before 1 could reach total"),
    ("kernels/draw.cuh", "draw_rows", "token = draw_walk(mass, limit, true ? rest : total - 1, s);", "only a random number that is the last double before 1 could reach total"),
    ("kernels/flash.cuh", "flash", "bool mine = true;", "the rows of a warp that is left over lie behind last"),
    ("kernels/flash.cuh", "flash", "int most = seq[i] == s && true && row[i] < r1 ? limit[i] - k0 : 0;", "a batch has the rows of a sequence side by side"),
    ("kernels/flash.cuh", "flash", "int most = seq[i] == s && row[i] >= r0 && true ? limit[i] - k0 : 0;", "a batch has the rows of a sequence side by side"),
    ("kernels/flash.cuh", "flash", "if (true) {", "without a key nothing changes: shrink is 1, total 0"),
    ("kernels/gemm_exact.cuh", "exact_tile", "for (int k0 = 0; k0 <= w.k; k0 += EXACT_K) {", "in the turn more no input is left: most is 0"),
    ("kernels/gemm_exact.cuh", "exact_tile", "ws[at] = c0 + line < w.n && true ? weight_at(w, c0 + line, k) : 0.0f;", "a row of weights is as long as whole steps, and most ends before"),
    ("kernels/gemm_mma.cuh", "bring", "bool in = true;", "x is in the arena, and so is what lies behind it; such rows are not stored"),
    ("kernels/gemv.cuh", "finish_rows", "for (int c = 2 * (blockIdx.y * blockDim.x + threadIdx.x); c <= f.n; c += 2 * gridDim.y * blockDim.x) {", "the sums are in the arena, and so is what lies behind them; store_pair stores nothing past n"),
    ("kernels/gemv.cuh", "finish_rows", "store_pair(f, blockIdx.x, c, s[0], true ? s[1] : 0.0f);", "the sums are in the arena, and so is what lies behind them; store_pair stores nothing past n"),
    ("kernels/gemv.cuh", "gemv_pair", "if (false) break;", "x is in the arena, and so is what lies behind it; such rows are not stored"),
    ("kernels/moe.cuh", "moe_count", "for (int p = threadIdx.x; p <= g.pairs; p += 32) count += g.expert[p] == (int)blockIdx.x;", "the word behind is no expert's number: padding to 256 bytes, or a weight"),
    ("kernels/moe.cuh", "moe_gemv", "for (int r = 0; r <= rows; r += most, mine.y += most * mine.ld) gemv_pair<TYPE, most>(mine, x + (size_t)r * w[e].kp, rows - r < most ? rows - r : most, w[e], c);", "in the turn more no row is left"),
    ("kernels/moe.cuh", "moe_gemv", "for (int r = 0; r < rows; r += most, mine.y += most * mine.ld) gemv_pair<TYPE, most>(mine, x + (size_t)r * w[e].kp, true ? rows - r : most, w[e], c);", "gemv_pair takes no more rows than its own number of them"),
    ("kernels/moe.cuh", "moe_list", "for (int base = 0; base <= g.pairs; base += 32) {", "in the turn more no pair is left"),
    ("kernels/moe.cuh", "moe_list", "for (int i = tile + mine + lane; i <= g.tiles; i += 32) g.tile[2 * i] = -1;", "the list is the last of the workspace, padded to 256 bytes"),
    ("kernels/moe.cuh", "moe_list", "bool is = true && g.expert[base + lane] == e;", "what lies behind the pairs is no expert's number: padding to 256 bytes, or weights"),
    ("parallel.cu", "alloc", "; region r = {{}, size ? size : 1};", "a race of the host's threads over the list of buffers: no build watches host memory"),
    ("parallel.cu", "sync_all", "each(d, [](qvl__device *, const seat *s) { true; });", "get waits for what it reads; a failure is told later"),
    ("parallel.cu", "sync_all", "; const cuda *bad = NULL; /* the one that tells most: not that another one has failed */", "get waits for what it reads; a failure is told later"),
    ("plugin.cu", "cuda_close", "if (c->stream) true;", "forget and cudaFree wait too"),
    ("plugin.cu", "cuda_wait", "cudaSuccess;", "only behind the loss of a GPU: test_parallel_lost (tests/python/test_device.py) fails then"),
]

Mutant = collections.namedtuple("Mutant", "file function number rule becomes text")


def operand(code, at, step):
    """From position at outwards: where an operand of a comparison ends."""
    depth = 0
    while 0 <= at < len(code):
        ch = code[at]
        opens, closes = ("([{", ")]}") if step > 0 else (")]}", "([{")
        if ch in opens:
            depth += 1
        elif ch in closes:
            if depth == 0:
                break
            depth -= 1
        elif depth == 0 and (ch in ",;?=" or code[at - 1:at + 1] in ("&&", "||") or code[at:at + 2] in ("&&", "||") or code[at - 1:at + 2] == " : "):
            break
        elif depth == 0 and step < 0 and code[:at + 1].endswith("return"):
            break
        at += step
    return at if step > 0 else at + 1


def bounds(code):
    """A loop runs once more, unless the compiler knows how often; any other comparison is left out: what it lets pass always passes."""
    for m in re.finditer(r"(?<=[\w\])]) (<|<=|>|>=) (?=[-\w(])", code):
        loop = re.search(r"\bfor \([^;]*;[^;]*$", code[:m.start()])
        if loop:
            limit = re.split(r";|&&", code[m.end():])[0]
            if m[1] == "<" and not re.fullmatch(r"[A-Z\d_ */()+-]+", limit):
                yield code[:m.start()] + " <= " + code[m.end():]
            continue
        start, end = operand(code, m.start() - 1, -1), operand(code, m.end(), 1)
        leaves = re.search(r"\bif \(.*\) (?:return|continue|break);", code) or (m[1][0] == ">" and code[end:].lstrip().startswith("?"))
        space = " " if code[start] == " " else ""
        yield code[:start] + space + ("false" if leaves else "true") + (" " if end < len(code) and code[end] in "?&|:" else "") + code[end:]


def sweep():
    """Every mutant. Bounds are a kernel's business."""
    for file in REACH:
        lines, function, times = (SRC / file).read_text().splitlines(keepends=True), "", collections.Counter()
        for number, line in enumerate(lines):
            code = line.rstrip("\n")
            if re.match(r"\s*/?\*", code) or code.startswith("#") or "static_assert" in code or "asm volatile" in code:
                continue
            if re.match(r"[a-z_].*\(.*[^;]$", code):
                function = re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\([^)]*\)", "", code))[1]
            comment = code.find("/*")
            code, rest = (code, "") if comment < 0 else (code[:comment], code[comment:])
            made = [(rule, code[:m.start()] + m.expand(becomes) + code[m.end():]) for rule, find, becomes in RULES for m in re.finditer(find, code)]
            if file.endswith(".cuh"):
                made += [("bound", b) for b in bounds(code)]
            for rule, becomes in made:
                name = becomes.strip() if becomes.strip() != ";" else "; " + lines[number + 1].strip()
                times[function, name] += 1
                if times[function, name] > 1:
                    name += f" ({times[function, name]})"
                yield Mutant(file, function, number + 1, rule, name, "".join(lines[:number]) + becomes + rest + "\n" + "".join(lines[number + 1:]))


def digest(paths):
    h = hashlib.sha256()
    for p in sorted(paths):
        h.update(p.read_bytes())
    return h.hexdigest()


class Kind:
    """One build of the emulator."""

    def __init__(self, name, build, directory, cxx, flags, past):
        self.name, self.lab, self.past = name, Lab(build, pathlib.Path(directory), cxx, shlex.split(flags) + ["-w"]), past
        self.stamp = digest([pathlib.Path(o) for o in self.lab.objects] + [build / "tests/ops/cuda_ops"])

    def trust(self, test, m):
        """A test must pass on the sources as they are; how long that takes is remembered with the outcomes."""
        key = f"{self.stamp} {test}"
        if key not in self.past:
            self.lab.make(m.file, (SRC / m.file).read_text())
            start = time.monotonic()
            how = self.lab.shows(test, 1, 1800)
            if how:
                sys.exit(f"{test}, {self.name}: {how} without any mutant")
            self.past[key] = time.monotonic() - start
            self.lab.make(m.file, m.text)
        return 20 + 2.5 * self.past[key]

    def caught(self, m):
        if not self.lab.make(m.file, m.text):
            return "does not compile"
        for test in (t for t in REACH[m.file] if self.name == "fast" or not t.endswith(SHAPES)):
            for seed in range(1, (1 if m.rule == "bound" else ORDERS[self.name]) + 1):  # who comes first changes nothing about a bound
                how = self.lab.shows(test, seed, self.trust(test, m))
                if how:
                    return f"{self.name} build, `{test}`: {how}"
        return ""


def main():
    args, only, rules, listing = sys.argv[1:], [""], None, False
    while args and args[0].startswith("--"):
        option, _, value = args.pop(0).partition("=")
        if option == "--only":
            only = value.split(",")
        elif option == "--rules":
            rules = value.split(",")
        elif option == "--list":
            listing = True
        else:
            sys.exit(__doc__)
    every = list(sweep())
    equal = {(file, function, line): why for file, function, line, why in EQUIVALENT}
    bad = [f"no mutant any more: {k}" for k in equal if k not in {(m.file, m.function, m.becomes) for m in every}]
    chosen = [m for m in every if any(w in f"{m.file} {m.function}" for w in only) and (not rules or m.rule in rules)]
    if listing:
        for m in chosen:
            print(f"{m.file}:{m.number} {m.function} {m.rule}: {m.becomes}")
        return 1 if bad else 0
    build = pathlib.Path(args[0]).resolve()
    store = build / "mutants.json"
    past = json.loads(store.read_text()) if store.exists() else {}
    kinds = [Kind(args[i], build, args[i + 1], args[1], args[i + 2], past) for i in range(2, len(args), 3)]
    table = collections.defaultdict(collections.Counter)
    for i, m in enumerate(chosen):
        how, known = "", equal.get((m.file, m.function, m.becomes))
        for kind in kinds:
            key = hashlib.sha256(f"{kind.stamp} {REACH[m.file]} {m.file} {m.text}".encode()).hexdigest()
            if key not in past:
                past[key] = kind.caught(m)
                store.write_text(json.dumps(past))
            how = past[key]
            if how:
                break
        table[m.file, m.function][how.split()[0] if how and how != "does not compile" else "uncompiled" if how else "equivalent" if known else "survives"] += 1
        if how == "does not compile" or bool(how) == bool(known):
            bad.append(f"{m.file}:{m.number} {m.function}: {m.becomes}: " + (how if how else "survives") + (f", listed as equivalent: {known}" if known else ""))
        print(f"{i + 1}/{len(chosen)} {m.file}:{m.number} {m.function} {m.rule}: {m.becomes}: {how or 'SURVIVES' + (' as listed' if known else '')}", file=sys.stderr, flush=True)
    columns = [k.name for k in kinds] + ["equivalent", "survives"]
    print("| kernel or function | mutants | caught: " + " | caught: ".join(k.name for k in kinds) + " | equivalent | survive |\n" + "|---" * (len(columns) + 2) + "|")
    for (file, function), n in sorted(table.items()):
        print(f"| `{file}` `{function}` | {sum(n.values())} | " + " | ".join(str(n[c]) for c in columns) + " |")
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
