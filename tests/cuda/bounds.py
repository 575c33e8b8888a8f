"""Lower bounds on time, counted from bytes and floating-point operations at published peak rates. Not a measurement, and not an
estimate of speed: caches, latency, launches and everything else that takes time are left out. Prints Markdown for docs/cuda.md.

Usage: bounds.py
"""
# Shapes of the published config.json files. Text: hidden, layers, intermediate, heads, KV heads, head_dim, vocabulary. Vision: hidden,
# depth, intermediate, mergers (the main one and deepstack).
MODELS = {"4B": ((2560, 36, 9728, 32, 8, 128, 151936), (1024, 24, 4096, 4)), "8B": ((4096, 36, 12288, 32, 8, 128, 151936), (1152, 27, 4304, 4))}
# Bytes of a weight: 8 and 4 bits with a scale of 16 bits for 32 weights. The embedding and the head stay at 8 bits with int4.
BYTES = {"bf16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
# TB/s of memory, dense bf16 TFLOP/s, and GB/s in one direction between two GPUs (NVLink; PCIe 4.0 x16), from NVIDIA's data sheets.
GPUS = {"H100 SXM": (3.35, 989, 450), "A100 80GB": (2.04, 312, 300), "RTX 4090": (1.01, 165, 32)}
PROMPT, PATCHES = 4096, 64 * 48  # a 1024x768 image
KV_BYTES = 2


def text(name):
    """Weights of the layers, and of the head."""
    hidden, layers, inter, heads, kv, dim, vocab = MODELS[name][0]
    return layers * (hidden * (heads + 2 * kv) * dim + heads * dim * hidden + 3 * hidden * inter), vocab * hidden


def sums(name, rows, gpus):
    """Bytes that a GPU sends for the sums over GPUs of a step: two in a layer, in bf16 from 64 rows on, and the embedding; of a
    decoding step the parts of the logits."""
    hidden, layers, *_, vocab = MODELS[name][0]
    return (gpus - 1) / gpus * (2 * (2 * layers * (2 if rows >= 64 else 4) + 4) * rows * hidden + min(rows, 64) * vocab * 4)


def decode(name, dtype, streams, depth, gpus, card):
    (hidden, layers, _, heads, kv, dim, _), (tb, tflops, link) = MODELS[name][0], GPUS[card]
    weights, head = text(name)
    read = weights * BYTES[dtype] + head * BYTES["int8" if dtype == "int4" else dtype] + streams * depth * layers * 2 * kv * dim * KV_BYTES
    flops = streams * (2 * (weights + head) + 4 * layers * heads * dim * depth)
    return max(read / gpus / tb / 1e12, flops / gpus / tflops / 1e12) + sums(name, streams, gpus) / link / 1e9


def prefill(name, gpus, card):
    (hidden, layers, _, heads, _, dim, _), (_, tflops, link) = MODELS[name][0], GPUS[card]
    weights, head = text(name)
    flops = 2 * PROMPT * weights + 2 * head + 2 * layers * heads * dim * PROMPT**2  # causal: half of 4 n^2 d
    return flops / gpus / tflops / 1e12 + sums(name, PROMPT, gpus) / link / 1e9


def vision(name, gpus, card):
    (out, *_), (hidden, depth, inter, mergers), (_, tflops, link) = MODELS[name][0], MODELS[name][1], GPUS[card]
    flops = PATCHES * (2 * 1536 * hidden + depth * (2 * (4 * hidden**2 + 2 * hidden * inter) + 4 * PATCHES * hidden))
    flops += PATCHES // 4 * mergers * 2 * (16 * hidden**2 + 4 * hidden * out)
    sent = (gpus - 1) / gpus * 2 * 2 * (2 * depth * PATCHES * hidden + PATCHES // 4 * mergers * out)
    return flops / gpus / tflops / 1e12 + sent / link / 1e9


def launches(layers, dtype, rows, longest, gpus):
    """Of a decoding step, behind its copies; tests/python/test_device.py counts them. Products round their rows first; cuBLASLt (BF16, more
    rows than gemv takes) leaves SwiGLU to a kernel; attention over more than one piece of 128 keys is joined."""
    product, attention = 2, 1 + (longest > 128)
    own = dtype != "bf16" or rows <= 8
    whole = 1 + layers * (2 + 1 + attention + 4 * product + (not own)) + 2 + product
    if gpus == 1:
        return whole
    return whole + 1 + layers * 2 * (3 if rows >= 64 else 1) + 2  # the embedding; o and down, rounded; the parts of the logits


def row(what, of):
    print(f"| {what} | {' | '.join(' / '.join(f'{1e3 * of(gpus, card):.3g}' for gpus in (1, 2)) + ' ms' for card in GPUS)} |")


def main():
    print(f"| one / two GPUs | {' | '.join(GPUS)} |\n|---|{'---|' * len(GPUS)}")
    for name in MODELS:
        for dtype in BYTES:
            for streams, depth in ((1, 4096), (16, 4096), (64, 4096), (1, 32768), (16, 32768), (64, 32768)):
                row(f"{name} {dtype}, a decoding step of {streams}, each {depth >> 10}K deep", lambda gpus, card: decode(name, dtype, streams, depth, gpus, card))
        row(f"{name}, prefill of {PROMPT} tokens", lambda gpus, card: prefill(name, gpus, card))
        row(f"{name}, an image of 1024x768", lambda gpus, card: vision(name, gpus, card))
    print("\n| launches of a decoding step, one / two GPUs | 1 | 16 | 64 |\n|---|---|---|---|")
    for name in MODELS:
        for dtype in BYTES:
            print(f"| {name} {dtype} | {' | '.join(' / '.join(str(launches(MODELS[name][0][1], dtype, rows, 4096, gpus)) for gpus in (1, 2)) for rows in (1, 16, 64))} |")


if __name__ == "__main__":
    main()
