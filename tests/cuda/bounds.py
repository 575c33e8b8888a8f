"""Lower bounds on time, counted from bytes and floating-point operations at published peak rates. Not a measurement, and not an
estimate of speed: caches, latency, launches and everything else that takes time are left out. Prints Markdown for docs/cuda.md.

Usage: bounds.py
"""
# Shapes of the published config.json files: hidden, layers, intermediate, heads, KV heads, head_dim, vocabulary, tied.
MODELS = {"4B": (2560, 36, 9728, 32, 8, 128, 151936, True), "8B": (4096, 36, 12288, 32, 8, 128, 151936, False)}
# Bytes of a weight: 8 and 4 bits with a scale of 16 bits for 32 weights. The embedding and the head stay at 8 bits with int4.
BYTES = {"bf16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
# TB/s of memory and dense bf16 TFLOP/s, from NVIDIA's data sheets.
GPUS = {"H100 SXM": (3.35, 989), "A100 80GB": (2.04, 312), "L4": (0.30, 121), "RTX 4090": (1.01, 165)}
PROMPT, DEPTH, STREAMS = 2048, 2048, 16


def count(name, dtype):
    hidden, layers, inter, heads, kv, dim, vocab, _ = MODELS[name]
    layer = hidden * (heads + 2 * kv) * dim + heads * dim * hidden + 3 * hidden * inter
    head = vocab * hidden
    return layers * layer, head, layers * layer * BYTES[dtype] + head * BYTES["int8" if dtype == "int4" else dtype]


def main():
    print(f"| model, weights | {' | '.join(GPUS)} |\n|---|{'---|' * len(GPUS)}")
    for name, (hidden, layers, _, heads, kv, dim, *_rest) in MODELS.items():
        for dtype in BYTES:
            _, _, weight_bytes = count(name, dtype)
            cells = []
            for bandwidth, _ in GPUS.values():
                cache = layers * 2 * kv * dim * 2 * DEPTH
                cells.append(f"{weight_bytes / bandwidth / 1e9:.2f} / {(weight_bytes + STREAMS * cache) / bandwidth / 1e9:.2f} ms")
            print(f"| {name} {dtype}, a decoding step of 1 (empty) / {STREAMS} (each {DEPTH} tokens deep) | {' | '.join(cells)} |")
        weights, head, _ = count(name, "bf16")
        flops = 2 * PROMPT * weights + 2 * head + 2 * layers * heads * dim * PROMPT * PROMPT  # causal: half of 4 n^2 d
        print(f"| {name}, prefill of {PROMPT} tokens | {' | '.join(f'{flops / rate / 1e9:.1f} ms' for _, rate in GPUS.values())} |")


if __name__ == "__main__":
    main()
