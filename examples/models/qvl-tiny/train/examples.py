"""Draws the pictures of examples/images, inside what the tiny model was taught, at 4x and reduced.

    python examples.py OUT                                   # draw them
    python examples.py OUT --model release                   # draw them, ask the model about each, write OUT/README.md
    python examples.py OUT --model release --try 12          # the same for 12 variants of each, to choose from
"""
import argparse
import math
import os
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import scenes as S

SS = 4
# name, width, height, background (one colour, or two and an angle in degrees), text (string, colour, size, x, y), shapes (what, where, how wide)
# Places are shares of the width and height, sizes shares of the shorter side: above .41 is large, below .285 is small.
PICTURES = [
    ("shapes.png", 288, 224, ("light blue", "light yellow", 90), None,
     [("yellow", "triangle", .25, .5, .54, 0), ("red", "star", .74, .5, .54, 0)]),
    ("heart.jpg", 256, 256, ("light yellow",), None, [("red", "heart", .5, .5, .56, 0)]),
    ("three.webp", 320, 192, ("black",), None,
     [("yellow", "star", .18, .52, .5, 0), ("green", "square", .5, .5, .46, 0), ("orange", "triangle", .82, .5, .5, 0)]),
    ("cross.png", 256, 256, ("gray",), None, [("white", "cross", .29, .7, .34, 8), ("purple", "circle", .68, .32, .5, 0)]),
    ("four.jpg", 288, 224, ("white",), None,
     [("purple", "heart", .16, .3, .34, 0), ("green", "circle", .4, .7, .34, 0), ("red", "triangle", .63, .3, .34, 0), ("blue", "square", .85, .7, .34, 5)]),
    ("number.png", 288, 224, ("light green",), ("35", "black", 64, .26, .5), [("red", "heart", .72, .5, .5, 0)]),
]


def outline(shape):
    if shape == "circle":
        return [(math.cos(k * math.pi / 180), math.sin(k * math.pi / 180)) for k in range(360)]
    if shape == "heart":
        out = []
        for k in range(400):
            t = k * math.pi / 200
            out.append((math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.0))
        return out
    return S.polygon(shape)


def picture(w, h, bg, text, shapes, rng=None):
    """Returns a Scene; rng moves and resizes things a little."""
    u = (lambda a: rng.uniform(-a, a)) if rng else (lambda a: 0.0)
    s = S.Scene()
    s.w, s.h = w, h
    a = np.array(S.PLAIN[bg[0]][0], np.float32)
    if len(bg) == 1:
        s.bg, big = bg[0], Image.new("RGB", (w * SS, h * SS), S.PLAIN[bg[0]][0])
    else:
        s.bg, b, ang = "gradient", np.array(S.PLAIN[bg[1]][0], np.float32), math.radians(bg[2])
        yy, xx = np.mgrid[0:h * SS, 0:w * SS].astype(np.float32)
        t = (xx / (w * SS) - .5) * math.cos(ang) + (yy / (h * SS) - .5) * math.sin(ang)
        t = ((t - t.min()) / (t.max() - t.min()))[..., None]
        big = Image.fromarray((a * (1 - t) + b * t + .5).astype(np.uint8))
    d = ImageDraw.Draw(big)
    for color, shape, x, y, size, turn in shapes:
        x, y, f, th = x + u(.03), y + u(.03), size * (1 + u(.07)), math.radians(turn + (u(6) if shape != "circle" else 0))
        r = f * min(w, h) / 2
        pts = [(x * w + r * (px * math.cos(th) - py * math.sin(th)), y * h + r * (px * math.sin(th) + py * math.cos(th))) for px, py in outline(shape)]
        d.polygon([(px * SS, py * SS) for px, py in pts], fill=S.COLORS[color][0])
        xs, ys = [p[0] for p in pts], [p[1] for p in pts]
        s.objects.append(dict(shape=shape, color=color, frac=f, size="large" if f > .41 else "small" if f < .285 else "", box=(min(xs), min(ys), max(xs), max(ys)),
                              cx=(min(xs) + max(xs)) / 2, cy=(min(ys) + max(ys)) / 2))
    if text:
        t, color, size, x, y = text
        face = ImageFont.truetype(S.FONT_DIR + "DejaVuSans-Bold.ttf", int(size * (1 + u(.05)) * SS))
        d.text(((x + u(.03)) * w * SS, (y + u(.03)) * h * SS), t, font=face, fill=S.COLORS[color][0], anchor="mm")
        s.text = t
    s.objects.sort(key=lambda o: o["cx"])
    s.image = big.reduce(SS)
    return s


def save(im, path):
    im.save(path, **({"quality": 92} if path.endswith("jpg") else {"lossless": True} if path.endswith("webp") else {}))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("out")
    ap.add_argument("--model")
    ap.add_argument("--try", type=int, default=0, dest="tries")
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    ref = None
    if a.model:
        import evaluate as E
        ref = E.Reference(a.model, a.threads)

    def ask(path, q):
        return ref.answer(dict(messages=[{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": q}]}]), a.out)

    rows = []
    for name, w, h, bg, text, shapes in PICTURES:
        for k in range(max(1, a.tries)):
            s = picture(w, h, bg, text, shapes, random.Random(f"{name}/{k}") if k else None)
            file = name if not a.tries else f"{k:02d}-{name}"
            save(s.image, os.path.join(a.out, file))
            want = S.caption(s)
            if ref:
                g = ask(file, "Describe this image.")
                print("ok " if g["answer"] == want else "BAD", file, "|", want, "|", g["answer"], "| margin", g["margin"], flush=True)
                rows.append((file, f"{w}x{h}", want, g["answer"]))
            else:
                print(file, want)
    if ref and not a.tries:
        with open(os.path.join(a.out, "README.md"), "w", encoding="utf-8") as f:
            f.write("# Example pictures\n\nOur own, drawn by `../models/qvl-tiny/train/examples.py` inside what the bundled model was taught. The answers are greedy, to\n"
                    "\"Describe this image.\", from transformers in fp32.\n\n| file | size | shows | the model answers |\n|---|---|---|---|\n")
            for file, size, want, got in rows:
                f.write(f"| `{file}` | {size} | {want} | {got if got != want else 'the same words'} |\n")


if __name__ == "__main__":
    main()
