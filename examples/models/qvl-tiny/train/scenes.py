"""Synthetic scenes for the tiny Qwen3-VL model: pictures drawn with Pillow and the chat turns that go with them.

Everything is a function of a random.Random, so a seed fixes every pixel and every word.
A Scene has the picture, the objects with exact boxes, and (for the training script only) dense labels.
`questions(scene, rng)` yields (task, question, answer, meta) tuples; task names are the rows of the accuracy table.
"""
import io
import json
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {  # name -> (rgb, chinese)
    "red": ((218, 32, 36), "红色"), "orange": ((245, 135, 20), "橙色"), "yellow": ((248, 220, 30), "黄色"),
    "green": ((30, 150, 60), "绿色"), "blue": ((35, 80, 215), "蓝色"), "purple": ((130, 45, 165), "紫色"),
    "pink": ((250, 130, 180), "粉色"), "brown": ((120, 70, 30), "棕色"), "black": ((18, 18, 18), "黑色"),
    "white": ((250, 250, 250), "白色"),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "heart": "心形"}
PLAIN = {"white": ((255, 255, 255), "白色"), "gray": ((150, 150, 150), "灰色"), "black": ((8, 8, 8), "黑色"),
         "light blue": ((176, 214, 240), "浅蓝色"), "light green": ((184, 230, 184), "浅绿色"), "light yellow": ((252, 246, 200), "浅黄色")}
COLOR_NAMES, SHAPE_NAMES, PLAIN_NAMES = list(COLORS), list(SHAPES), list(PLAIN)
CHARS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONT_DIR = "/usr/share/fonts/truetype/dejavu/"
FONT_FILES = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf",
              "DejaVuSansMono-Bold.ttf", "DejaVuSansCondensed-Bold.ttf"]
WORDS = ("HELLO WORLD OPEN CLOSED STOP GO EXIT SALE CAFE TAXI BUS HOTEL BANK SHOP FREE HOT COLD ICE TEA MILK BREAD FISH SALT SUGAR "
         "APPLE LEMON GRAPE MANGO PEAR PLUM RED BLUE GREEN BLACK WHITE PINK GOLD CAT DOG BIRD HORSE COW PIG SHEEP LION TIGER BEAR WOLF "
         "TREE ROSE LEAF GRASS RIVER LAKE SEA SAND ROCK HILL MOON STAR SUN SKY RAIN SNOW WIND FIRE WATER EARTH HOUSE DOOR WINDOW ROOF "
         "WALL FLOOR TABLE CHAIR LAMP BED DESK BOOK PAGE PEN PAPER NOTE WORD LINE CODE DATA FILE DISK CHIP CORE NODE BYTE BIT LINUX "
         "MODEL IMAGE VIDEO TOKEN INPUT OUTPUT ERROR START PAUSE PLAY NEXT BACK HOME MENU HELP TEST DEMO NEW OLD BIG SMALL FAST SLOW "
         "HIGH LOW LEFT RIGHT UP DOWN NORTH SOUTH EAST WEST YES NO OK LOVE PEACE JOY HOPE LUCK TIME YEAR MONTH WEEK DAY NIGHT HOUR "
         "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN PIZZA BURGER COFFEE JUICE SOUP RICE PASTA SALAD CAKE PARK ZOO MUSEUM "
         "SCHOOL POLICE TRAIN PLANE SHIP BOAT CAR BIKE ROAD STREET BRIDGE TOWER CASTLE QUEEN KING JACK ACE QUIZ JAZZ WAX FOX BOX VEX").split()

_fonts = {}


def font(name, size):
    key = (name, size)
    if key not in _fonts:
        if len(_fonts) > 600:
            _fonts.clear()
        try:
            _fonts[key] = ImageFont.truetype(FONT_DIR + name, size)
        except OSError:  # no DejaVu here: Pillow's own face
            _fonts[key] = ImageFont.load_default(size)
    return _fonts[key]


def polygon(shape):
    if shape == "square":
        return [(-.9, -.9), (.9, -.9), (.9, .9), (-.9, .9)]
    if shape == "triangle":
        return [(0, -1), (1, .82), (-1, .82)]
    if shape == "star":
        return [((1 if k % 2 == 0 else .42) * math.sin(k * math.pi / 5), -(1 if k % 2 == 0 else .42) * math.cos(k * math.pi / 5)) for k in range(10)]
    if shape == "cross":
        a = .34
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    if shape == "heart":
        out = []
        for k in range(40):
            t = k * 2 * math.pi / 40
            out.append((math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.0))
        return out
    return [(math.cos(k * math.pi / 24), math.sin(k * math.pi / 24)) for k in range(48)]  # circle


def shape_mask(rng, shape, diameter):
    """An antialiased mask cropped to the shape, about `diameter` pixels across."""
    ss, r = 3, diameter / 2
    th = 0 if shape == "circle" else math.radians(rng.uniform(-11, 11))
    ax, ay = rng.uniform(.92, 1.08), rng.uniform(.92, 1.08)
    c, s = math.cos(th), math.sin(th)
    n = int(diameter * 1.5) + 4
    pts = []
    for x, y in polygon(shape):
        x, y = x * ax * r, y * ay * r
        pts.append(((n / 2 + c * x - s * y) * ss, (n / 2 + s * x + c * y) * ss))
    m = Image.new("L", (n * ss, n * ss), 0)
    ImageDraw.Draw(m).polygon(pts, fill=255)
    m = m.reduce(ss)
    return m.crop(m.point(lambda v: 255 if v > 96 else 0).getbbox())


def jitter(rng, rgb, amount):
    return tuple(max(0, min(255, v + rng.randint(-amount, amount))) for v in rgb)


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


class Scene:
    def __init__(self):
        self.objects, self.text = [], None

    def box1000(self, o):
        x1, y1, x2, y2 = o["box"]
        return [round(x1 * 1000 / self.w), round(y1 * 1000 / self.h), round(x2 * 1000 / self.w), round(y2 * 1000 / self.h)]


def background(rng, s, level):
    """level 0..1: how often the background is not plain."""
    w, h = s.w, s.h
    u = rng.random()
    if u < .7 + .3 * (1 - level):
        s.bg = rng.choice(PLAIN_NAMES)
        s.bg_rgb = [jitter(rng, PLAIN[s.bg][0], 6)]
        im = Image.new("RGB", (w, h), s.bg_rgb[0])
        if rng.random() < .3 * level:  # faint camera noise, not worth a word
            im = noise(rng, im, rng.uniform(1, 5))
        return im
    a = jitter(rng, PLAIN[rng.choice(PLAIN_NAMES)][0], 12)
    if u < .87 + .13 * (1 - level):
        s.bg = "gradient"
        while True:
            b = jitter(rng, PLAIN[rng.choice(PLAIN_NAMES)][0], 12)
            if distance(a, b) > 70:
                break
        s.bg_rgb = [a, b, tuple((x + y) // 2 for x, y in zip(a, b))]
        ang = rng.uniform(0, 2 * math.pi)
        yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
        t = (xx / w - .5) * math.cos(ang) + (yy / h - .5) * math.sin(ang)
        t = (t - t.min()) / (t.max() - t.min() + 1e-6)
        arr = np.array(a, np.float32) * (1 - t[..., None]) + np.array(b, np.float32) * t[..., None]
        return Image.fromarray(arr.astype(np.uint8))
    s.bg = "noisy"
    s.bg_rgb = [a]
    return noise(rng, Image.new("RGB", (w, h), a), rng.uniform(16, 28))


def noise(rng, im, sigma):
    g = np.random.default_rng(rng.getrandbits(32))
    arr = np.asarray(im, np.float32)
    return Image.fromarray(np.clip(arr + g.normal(0, sigma, arr.shape[:2] + (1 if sigma < 12 else 3,)), 0, 255).astype(np.uint8))


LETTERS = 0.0  # share of texts that are capital letters; the rest are numbers


def make_text(rng):
    n = rng.choice((1, 2, 2, 3, 3, 4))
    if rng.random() < LETTERS:
        return rng.choice(WORDS) if rng.random() < .5 else "".join(rng.choice(CHARS) for _ in range(n))
    return "".join(rng.choice("0123456789") for _ in range(n))


def put_text(rng, s, im, text, taken, big):
    """Draws one line of text; returns False if there is no room for it."""
    for _ in range(8):
        name = rng.choice(FONT_FILES)
        want = s.w * (rng.uniform(.55, .94) if big else rng.uniform(.4, .8))
        size = int(want / max(1, font(name, 40).getlength(text)) * 40)
        size = max(30, min(size, int(s.h * (.6 if big else .34)), 88))
        f = font(name, size)
        x0, y0, x1, y1 = f.getbbox(text)
        tw, th = x1 - x0, y1 - y0
        if tw > s.w - 5 or th > s.h - 5:
            text = text[:-1]
            if not text:
                return False
            continue
        for _ in range(14):
            px, py = rng.uniform(2, s.w - tw - 2), rng.uniform(2, s.h - th - 2)
            if all(px + tw + 3 < b[0] or px > b[2] + 3 or py + th + 3 < b[1] or py > b[3] + 3 for b in taken):
                break
        else:
            continue
        for _ in range(40):
            col = jitter(rng, COLORS[rng.choice(COLOR_NAMES)][0], 14)
            if min(distance(col, b) for b in s.bg_rgb) > 140:
                break
        else:
            col = (0, 0, 0) if sum(s.bg_rgb[0]) > 380 else (255, 255, 255)
        px, py = int(px), int(py)
        ImageDraw.Draw(im).text((px - x0, py - y0), text, font=f, fill=col)
        s.text, s.text_box = text, (px, py, px + tw, py + th)
        s.chars = [(px - x0 + f.getlength(text[:k]) + f.getlength(c) / 2, py + th / 2, c) for k, c in enumerate(text)]
        return True
    return False


def place(rng, s, n, taken):
    side = min(s.w, s.h)
    for _ in range(n):
        for _ in range(30):
            u = rng.random()
            frac = rng.uniform(.21, .26) if u < .34 else rng.uniform(.31, .37) if u < .64 else rng.uniform(.45, .6)
            if n > 2 and frac > .4:
                frac = rng.uniform(.42, .46)
            d = max(25, frac * side)
            cx, cy = rng.uniform(d * .6, s.w - d * .6), rng.uniform(d * .6, s.h - d * .6)
            g = 3
            if all(cx + d * .56 + g < b[0] or cx - d * .56 - g > b[2] or cy + d * .56 + g < b[1] or cy - d * .56 - g > b[3] for b in taken):
                yield frac, d, cx, cy
                break


def make_scene(rng, w, h, max_shapes=4, kind=None, level=1.0, min_shapes=1):
    """kind: 'shapes', 'both' or 'text'. Boxes are in pixels of a w x h picture."""
    s = Scene()
    s.w, s.h, s.kind = w, h, kind or rng.choices(("shapes", "both", "text"), (.72, .13, .15))[0]
    im = background(rng, s, level)
    s.idmap = Image.new("L", (w, h), 0)
    taken = []
    if s.kind == "text" or (s.kind == "both" and rng.random() < .5):
        put_text(rng, s, im, make_text(rng), taken, s.kind == "text")
        if s.text:
            taken.append(s.text_box)
    if s.kind != "text":
        n = rng.randint(min_shapes, max_shapes) if s.kind == "shapes" else rng.randint(1, min(2, max_shapes))
        same = rng.random() < .35
        used = set()
        for frac, d, cx, cy in place(rng, s, n, taken):
            for _ in range(60):
                shape, color = rng.choice(SHAPE_NAMES), rng.choice(COLOR_NAMES)
                if same and s.objects and rng.random() < .6:
                    if rng.random() < .5:
                        shape = s.objects[0]["shape"]
                    else:
                        color = s.objects[0]["color"]
                rgb = jitter(rng, COLORS[color][0], 16)
                if (shape, color) not in used and min(distance(rgb, b) for b in s.bg_rgb) > 85:
                    break
            else:
                continue
            used.add((shape, color))
            m = shape_mask(rng, shape, d)
            x, y = int(round(cx - m.width / 2)), int(round(cy - m.height / 2))
            x, y = max(0, min(x, w - m.width)), max(0, min(y, h - m.height))
            im.paste(rgb, (x, y), m)
            o = dict(shape=shape, color=color, size="large" if frac > .41 else "small" if frac < .285 else "", frac=frac,
                     box=(x, y, x + m.width, y + m.height), cx=x + m.width / 2, cy=y + m.height / 2)
            s.objects.append(o)
            o["id"] = len(s.objects)  # objects are sorted later, the map keeps this number
            s.idmap.paste(o["id"], (x, y), m.point(lambda v: 255 if v > 96 else 0))
            taken.append(o["box"])
        if s.kind == "both" and s.text is None:
            put_text(rng, s, im, make_text(rng), taken, False)
    if not s.objects and s.text is None:
        return make_scene(rng, w, h, max_shapes, kind, level, min_shapes)
    s.objects.sort(key=lambda o: o["cx"])
    s.image = im
    return s


def encode(rng, im):
    """One JPEG or PNG file of the picture, as bytes and its suffix."""
    b = io.BytesIO()
    if rng.random() < .5:
        im.save(b, "JPEG", quality=rng.randint(65, 95), subsampling=rng.choice((0, 2)))
        return b.getvalue(), "jpg"
    im.save(b, "PNG")
    return b.getvalue(), "png"


# ---------------------------------------------------------------- words
def article(w):
    return ("an " if w[0] in "aeiou" else "a ") + w


def name(o, size=False):
    return " ".join(x for x in (o["size"] if size else "", o["color"], o["shape"]) if x)


def name_zh(o, size=False):
    return ({"large": "大的", "small": "小的", "": ""}[o["size"]] if size else "") + COLORS[o["color"]][1] + SHAPES[o["shape"]]


def relation(a, b):
    """'left' if a is left of b, 'above' if a is above b, by the clearly longer axis; else None."""
    dx, dy = b["cx"] - a["cx"], b["cy"] - a["cy"]
    if abs(dx) > 1.35 * abs(dy):
        return "left" if dx > 0 else "right"
    if abs(dy) > 1.35 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


REL = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
REL_ZH = {"left": "左边", "right": "右边", "above": "上方", "below": "下方"}
OPP = {"left": "right", "right": "left", "above": "below", "below": "above"}


def caption(s, low=False):
    things = [article(name(o, True)) for o in s.objects]
    if len(things) == 2 and s.text is None and relation(*s.objects):
        a, b = s.objects
        r = relation(a, b)
        if r in ("right", "below"):
            a, b, r = b, a, OPP[r]
        body = f"{article(name(a, True))} {REL[r]} {article(name(b, True))}"
    else:
        if s.text is not None:
            things.append(f'the text "{s.text}"')
        body = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    body = f"{body} on {article(s.bg)} background"
    return body if low else body[0].upper() + body[1:] + "."


def bg_zh(s):
    return {"gradient": "渐变", "noisy": "噪点"}.get(s.bg) or PLAIN[s.bg][1]


def caption_zh(s):
    things = ["一个" + name_zh(o, True) for o in s.objects]
    if len(things) == 2 and s.text is None and relation(*s.objects):
        a, b = s.objects
        r = relation(a, b)
        if r in ("right", "below"):
            a, b, r = b, a, OPP[r]
        return f"{bg_zh(s)}背景上，一个{name_zh(a, True)}在一个{name_zh(b, True)}的{REL_ZH[r]}。"
    if s.text is not None:
        things.append(f"文字“{s.text}”")
    body = things[0] if len(things) == 1 else "、".join(things[:-1]) + "和" + things[-1]
    return f"{bg_zh(s)}背景上有{body}。"


def boxes_json(s, objs):
    rows = ",\n".join("\t" + json.dumps({"bbox_2d": s.box1000(o), "label": name(o)}) for o in objs)
    return "```json\n[\n" + rows + "\n]\n```"


def there_are(n, one, many):
    return f"There are no {many}." if n == 0 else f"There is 1 {one}." if n == 1 else f"There are {n} {many}."


TASKS = {  # task -> weight in training
    "caption": 3.2, "caption_zh": .4, "count": 1.1, "count_by": 1.1, "color": 1.4, "shape": 1.4, "yesno": 1.2, "beside": 1.0,
    "relation": .9, "background": .25, "largest": .4, "locate": 6.0, "locate_all": .4, "count_zh": .3, "color_zh": .4, "yesno_zh": .4,
    "read": 2.0,
}


def ask(task, s, rng):
    """One (question, answer, meta) for the task, or None if this scene can't carry it."""
    O = s.objects
    pick = rng.choice
    if task == "caption":
        return pick(("Describe this image.", "Describe this image.", "Describe the image.", "Describe this picture.", "What is in this image?",
                     "What do you see?", "What is shown in the picture?", "Write a caption for this image.")), caption(s), {}
    if task == "caption_zh":
        return pick(("描述这张图片。", "描述这张图片", "图片里有什么？", "请描述这张图。")), caption_zh(s), {}
    if task == "read":
        if s.text is None:
            if rng.random() < .92:
                return None
            return pick(("Read the text.", "What does the text say?")), "There is no text in this image.", {}
        return pick(("Read the text.", "Read the text.", "What does the text say?", "Read the text in the image.", "What is written here?", "读出图中的文字。")), s.text, {"ocr": 1}
    if task == "background":
        if s.bg in ("gradient", "noisy"):
            return None
        return pick(("What colour is the background?", "What color is the background?", "What is the background color?")), f"The background is {s.bg}.", {}
    if not O:
        return None
    if task == "count":
        return pick(("How many shapes are there?", "How many shapes are in this image?", "Count the shapes.", "How many shapes do you see?")), there_are(len(O), "shape", "shapes"), {}
    if task == "count_zh":
        return pick(("图中有几个图形？", "有几个图形？", "图片里有多少个图形？")), f"有{len(O)}个图形。", {}
    if task == "count_by":
        if rng.random() < .5:
            c = pick(O)["color"] if rng.random() < .75 else pick(COLOR_NAMES)
            return f"How many {c} shapes are there?", there_are(sum(o["color"] == c for o in O), f"{c} shape", f"{c} shapes"), {}
        k = pick(O)["shape"] if rng.random() < .75 else pick(SHAPE_NAMES)
        ks = k + ("es" if k == "cross" else "s")
        return f"How many {ks} are there?", there_are(sum(o["shape"] == k for o in O), k, ks), {}
    if task in ("color", "color_zh"):
        c = [o for o in O if sum(p["shape"] == o["shape"] for p in O) == 1]
        if not c:
            return None
        o = pick(c)
        if task == "color_zh":
            z = SHAPES[o["shape"]]
            return pick((f"{z}是什么颜色？", f"{z}是什么颜色的？")), f"{z}是{COLORS[o['color']][1]}的。", {}
        return pick((f"What colour is the {o['shape']}?", f"What color is the {o['shape']}?", f"What is the color of the {o['shape']}?")), f"The {o['shape']} is {o['color']}.", {}
    if task == "shape":
        c = [o for o in O if sum(p["color"] == o["color"] for p in O) == 1]
        if not c:
            return None
        o = pick(c)
        return pick((f"What shape is {o['color']}?", f"What is the {o['color']} shape?", f"Which shape is {o['color']}?")), f"The {o['shape']} is {o['color']}.", {}
    if task in ("yesno", "yesno_zh"):
        yes = rng.random() < .5
        o = dict(pick(O))
        if not yes:
            u = rng.random()
            if u < .4:
                o["color"] = pick(COLOR_NAMES)
            elif u < .8:
                o["shape"] = pick(SHAPE_NAMES)
            else:
                o["color"], o["shape"] = pick(COLOR_NAMES), pick(SHAPE_NAMES)
            yes = any(p["color"] == o["color"] and p["shape"] == o["shape"] for p in O)
        if task == "yesno_zh":
            n = name_zh(o)
            return f"图中有{n}吗？", f"有，图中有{n}。" if yes else f"没有，图中没有{n}。", {}
        n = article(name(o))
        return pick((f"Is there {n}?", f"Is there {n} in the image?", f"Do you see {n}?")), f"Yes, there is {n}." if yes else f"No, there is no {name(o)}.", {}
    if task == "locate":
        o = pick(O)
        n = name(o)
        if sum(p["shape"] == o["shape"] for p in O) == 1 and rng.random() < .25:
            n = o["shape"]
        q = pick((f"Locate the {n}, output its bbox coordinates using JSON format.", f"Locate the {n}, output its bbox coordinates using JSON format.",
                  f"Locate the {n} in JSON format.", f"Where is the {n}? Answer with its bbox in JSON format."))
        return q, boxes_json(s, [o]), {"boxes": [s.box1000(o)], "labels": [name(o)]}
    if task == "locate_all":
        return pick(("Locate every shape, report the bbox coordinates in JSON format.", "Locate all shapes, output their bbox coordinates using JSON format.")), \
            boxes_json(s, O), {"boxes": [s.box1000(o) for o in O], "labels": [name(o) for o in O]}
    if task == "largest":
        if len(O) < 2:
            return None
        a = sorted(O, key=lambda o: -o["frac"])
        if a[0]["frac"] < 1.25 * a[1]["frac"]:
            return None
        return pick(("Which shape is the largest?", "What is the largest shape?", "What is the biggest shape?")), f"The {name(a[0])} is the largest.", {}
    if len(O) < 2:
        return None
    if task == "relation":
        a, b = rng.sample(O, 2)
        r = relation(a, b)
        if r is None:
            return None
        says = r if rng.random() < .5 else pick([x for x in REL if x != r])
        q = f"Is the {name(a)} {REL[says]} the {name(b)}?"
        return q, f"Yes, the {name(a)} is {REL[r]} the {name(b)}." if says == r else f"No, the {name(a)} is {REL[r]} the {name(b)}.", {}
    if task == "beside":
        a = pick(O)
        says = pick(list(REL))
        ax, size = ("cx", s.w) if says in ("left", "right") else ("cy", s.h)
        sign = -1 if says in ("left", "above") else 1
        hit = []
        for o in O:
            if o is a:
                continue
            d = (o[ax] - a[ax]) * sign / size
            if abs(d) < .08:
                return None
            if d > 0:
                hit.append(o)
        if len(hit) > 1 or (not hit and rng.random() < .6):
            return None
        n = a["shape"] if sum(p["shape"] == a["shape"] for p in O) == 1 and rng.random() < .6 else name(a)
        q = f"What is {REL[says] if rng.random() < .5 or says in ('above', 'below') else says + ' of'} the {n}?"
        return q, f"The {name(hit[0])} is {REL[says]} the {n}." if hit else f"There is nothing {REL[says]} the {n}.", {}
    raise KeyError(task)


def questions(s, rng, tasks=TASKS):
    """Endless (task, question, answer, meta) about one scene."""
    names, weights = list(tasks), list(tasks.values())
    while True:
        t = rng.choices(names, weights)[0]
        r = ask(t, s, rng)
        if r:
            yield (t,) + r


# ---------------------------------------------------------------- two pictures
def pair_questions(a, b, rng):
    while True:
        u = rng.random()
        na, nb = len(a.objects), len(b.objects)
        if u < .4:
            fewer = rng.random() < .25
            w = "fewer" if fewer else "more"
            ans = f"Both images have {na} shape{'s' if na != 1 else ''}." if na == nb else f"The {'first' if (na > nb) != fewer else 'second'} image has {w} shapes."
            yield "two_more", f"Which image has {w} shapes?", ans, {}
        elif u < .75:
            x = rng.choice(a.objects + b.objects)
            byshape = rng.random() < .5
            key = "shape" if byshape else "color"
            ina, inb = any(o[key] == x[key] for o in a.objects), any(o[key] == x[key] for o in b.objects)
            if ina and inb and rng.random() < .7:
                continue
            what = article(x["shape"]) if byshape else article(x["color"] + " shape")
            ans = f"Both images have {what}." if ina and inb else f"The {'first' if ina else 'second'} image has {what}."
            yield "two_which", f"Which image has {what}?", ans, {}
        else:
            k = rng.randint(0, 1)
            yield "two_caption", f"Describe the {('first', 'second')[k]} image.", caption((a, b)[k]), {}


# ---------------------------------------------------------------- video
MOVES = {"left": "to the left", "right": "to the right", "up": "up", "down": "down", "still": ""}


def make_video(rng, w, h, frames):
    """`frames` pictures of one shape that moves (or not); returns (list of images, object, direction, scene)."""
    s = Scene()
    s.w, s.h = w, h
    bg = background(rng, s, .4)
    while True:
        shape, color = rng.choice(SHAPE_NAMES), rng.choice(COLOR_NAMES)
        rgb = jitter(rng, COLORS[color][0], 14)
        if min(distance(rgb, b) for b in s.bg_rgb) > 85:
            break
    d = rng.uniform(.26, .4) * min(w, h)
    m = shape_mask(rng, shape, d)
    move = rng.choices(list(MOVES), (.23, .23, .23, .23, .08))[0]
    horiz = move in ("left", "right")
    span = (w if horiz else h) - (m.width if horiz else m.height)
    trav = rng.uniform(.6, 1.0) * span
    p0 = rng.uniform(0, span - trav)
    q = rng.uniform(0, (h - m.height) if horiz else (w - m.width))
    out = []
    for k in range(frames):
        t = k / max(1, frames - 1)
        p = p0 + trav * (t if move in ("right", "down") else 1 - t if move != "still" else .5)
        x, y = (p, q) if horiz else (q, p)
        im = bg.copy()
        im.paste(rgb, (int(round(x)), int(round(y))), m)
        out.append(im)
    return out, dict(shape=shape, color=color, size=""), move, s


def video_questions(o, move, s, rng):
    while True:
        u = rng.random()
        n = f"{o['color']} {o['shape']}"
        ans = f"The {n} moves {MOVES[move]}." if move != "still" else f"The {n} does not move."
        if u < .5:
            yield "video_move", rng.choice((f"Which way does the {o['shape']} move?", f"Which way does the {n} move?", f"In which direction does the {o['shape']} move?")), ans, {}
        elif u < .8:
            yield "video_caption", rng.choice(("Describe this video.", "Describe the video.", "What happens in this video?")), \
                (article(n)[0].upper() + article(n)[1:] + (f" moves {MOVES[move]}" if move != "still" else " does not move") + f" on {article(s.bg)} background."), {}
        else:
            yield "video_what", rng.choice(("What shape is in the video?", "What do you see in the video?")), f"The video shows {article(n)}.", {}


# ---------------------------------------------------------------- text only
WHO = "I am a tiny vision-language model. I can describe simple shapes, count them, locate them and read short texts."
LIMIT = "I am too small to know that. I can talk about pictures of simple shapes and short texts."
CHAT = [
    (("Who are you?", "What are you?", "Introduce yourself.", "What can you do?", "What is your name?", "Tell me about yourself.", "Help", "What can you see?"), WHO),
    (("Hello!", "Hello", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!", "Good evening!", "Hello there."), "Hello! Show me a picture of some shapes."),
    (("How are you?", "How are you today?", "How do you do?"), "I am fine, thank you. How can I help?"),
    (("Thank you.", "Thanks!", "Thanks", "Thank you very much!"), "You are welcome."),
    (("Bye", "Goodbye!", "Bye!", "See you later."), "Goodbye!"),
    (("你是谁？", "你是谁", "你是什么？", "你能做什么？", "介绍一下你自己。", "你叫什么名字？"), "我是一个很小的视觉语言模型，能描述简单的图形。"),
    (("你好", "你好！", "您好", "早上好"), "你好！给我看一张图片吧。"),
    (("谢谢", "谢谢！", "谢谢你。"), "不客气。"),
    (("再见", "再见！"), "再见！"),
    (("What is the capital of France?", "Who wrote Hamlet?", "Tell me a joke.", "Write a poem.", "Write a story.", "What is the weather today?", "Who is the president?",
      "Explain quantum physics.", "How far is the moon?", "What is the meaning of life?", "Translate this sentence.", "Write a Python program.", "What time is it?",
      "Sing a song.", "How do I cook rice?", "Recommend a book.", "What is 25 times 17?", "Who won the game?", "Where is Paris?", "Why is the sky blue?", "Solve this equation."), LIMIT),
    (("Name some colors.", "Which colours do you know?", "What colors do you know?"), "I know red, orange, yellow, green, blue, purple, pink, brown, black and white."),
    (("Name some shapes.", "Which shapes do you know?", "What shapes do you know?"), "I know circles, squares, triangles, stars, crosses and hearts."),
    (("How many sides does a triangle have?",), "A triangle has 3 sides."),
    (("How many sides does a square have?",), "A square has 4 sides."),
]


def chat_question(rng):
    u = rng.random()
    if u < .55:
        if rng.random() < .5:
            c = rng.randint(0, 20)
            a = rng.randint(0, c)
            x, op, y, r = a, "+", c - a, c
        else:
            x = rng.randint(0, 20)
            y = rng.randint(0, x)
            op, r = "-", x - y
        words = {"+": "plus", "-": "minus"}[op]
        q = rng.choice((f"What is {x} {op} {y}?", f"{x} {op} {y} = ?", f"{x}{op}{y}=?", f"What is {x} {words} {y}?", f"{x}{'加' if op == '+' else '减'}{y}等于几？"))
        return "sum", q, f"{x} {op} {y} = {r}", {}
    qs, a = rng.choice(CHAT)
    return "chat", rng.choice(qs), a, {}


if __name__ == "__main__":  # a contact sheet, to look at
    rng = random.Random(1)
    sheet = Image.new("RGB", (6 * 264, 4 * 264), (60, 60, 60))
    for k in range(24):
        s = make_scene(rng, rng.randint(96, 256), rng.randint(96, 256))
        sheet.paste(s.image, (k % 6 * 264, k // 6 * 264))
        t, q, a, _ = next(questions(s, rng))
        print(k, t, "|", q, "|", repr(a))
    sheet.save("sheet.png")
