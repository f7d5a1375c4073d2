"""Draws the example images: cats, dogs, elephants, lions and tigers, 128 x 128 pixels each.

Every image is built from plain shapes (smooth outlines, ovals and tapered strokes).  An image's
choices (pose, coat, background, light, expression) come from a generator seeded by --seed, the animal
and the image's number, so the same command always draws the same images.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

SIZE = 128  # side of a finished image
ZOOM = 4  # images are painted this much larger and then shrunk, which smooths the edges
INK, WHITE, IVORY = (38, 30, 34), (252, 250, 246), (255, 246, 224)
PINK, TONGUE = (232, 140, 150), (240, 118, 132)

# ---------------------------------------------------------------- shapes and colours


def mix(a, b, t):
    """The colour a share t of the way from a to b."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def dark(colour, t=0.5):
    return mix(colour, INK, t)


def pale(colour, t=0.5):
    return mix(colour, WHITE, t)


def points(data):
    """Points from "x y, x y" text or from a list of pairs."""
    return np.array(data.replace(",", " ").split() if isinstance(data, str) else data, float).reshape(-1, 2)


def smooth(data, closed=True, steps=8):
    """A smooth curve (Catmull-Rom) through the points."""
    p = points(data)
    p = np.vstack([p[-1:], p, p[:2]] if closed else [2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    curve = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.vstack(curve if closed else [*curve, p[-2:-1]])


def both(data, x=0.0):
    """A smooth outline from its right half, listed from top to bottom, moved by x."""
    right = points(data)
    left = right[::-1] * (-1, 1)
    return smooth(np.vstack([right, left[left[:, 0] < 0]])) + (x, 0)


def twin(polys, x=0.0):
    """The shapes and their mirror images, moved by x."""
    return [p * (k, 1) + (x, 0) for p in polys for k in (1, -1)]


def oval(x, y, rx, ry=None, turn=0.0):
    """An ellipse, turned by so many degrees."""
    a = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    px, py = rx * np.cos(a), (ry or rx) * np.sin(a)
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return np.stack([x + c * px - s * py, y + s * px + c * py], 1)


def stroke(data, *widths):
    """A curved stroke through the points whose width runs through the given widths; round ends."""
    line = smooth(data, closed=False)
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / (np.hypot(step[:, 0], step[:, 1])[:, None] + 1e-9)
    half = np.interp(np.linspace(0, 1, len(line)), np.linspace(0, 1, len(widths)), widths)[:, None] / 2
    ends = [oval(*line[i], half[i, 0]) for i in (0, -1) if half[i, 0] > 0]
    return [np.vstack([line + normal * half, (line - normal * half)[::-1]]), *ends]


def stripes(edge, step, width, count, rng):
    """Pointed bars that start on the curve `edge` and run along `step`."""
    line, bars = smooth(edge, closed=False), []
    for i in range(count):
        x, y = line[round((i + 0.6) / (count + 0.2) * (len(line) - 1))]
        dx, dy = np.multiply(step, (1.0 if i % 2 else 0.74) * rng.uniform(0.9, 1.1))
        bend = rng.uniform(-0.12, 0.12)
        middle = (x + dx * 0.5 - dy * bend, y + dy * 0.5 + dx * bend)
        bars += stroke([(x - dx * 0.12, y - dy * 0.12), middle, (x + dx, y + dy)], width, width * 0.9, 0)
    return bars


# ---------------------------------------------------------------- pen: collects shapes, paints them later


@dataclass
class Form:
    """One painted area: the union of some outlines, with marks that stay inside it."""

    polys: list
    colour: tuple
    marks: list
    edge: bool
    shade: float
    free: bool  # may run out of the frame
    alpha: float


@dataclass
class Pen:
    """Collects forms in its own coordinates (y runs down); `at` gives a pen placed within this one."""

    forms: list = field(default_factory=list)
    matrix: np.ndarray = field(default_factory=lambda: np.eye(3))
    bold: float = 1.0  # small heads use thicker lines

    def at(self, x=0.0, y=0.0, scale=1.0, turn=0.0, wide=1.0, bold=None):
        c, s = math.cos(math.radians(turn)) * scale, math.sin(math.radians(turn)) * scale
        inner = np.array([[c * wide, -s, x], [s * wide, c, y], [0, 0, 1]])
        return Pen(self.forms, self.matrix @ inner, bold or self.bold)

    def place(self, polys):
        return [np.asarray(p) @ self.matrix[:2, :2].T + self.matrix[:2, 2] for p in polys]

    def form(self, polys, colour, marks=(), edge=True, shade=1.0, free=False, alpha=1.0):
        marks = [(self.place(m), c) for m, c in marks]
        self.forms.append(Form(self.place(polys), colour, marks, edge, shade, free, alpha))

    def flat(self, polys, colour, **more):
        """A form without outline and shading."""
        self.form(polys, colour, edge=False, **{"shade": 0.0, **more})

    def pair(self, polys, colour, **more):
        """The form on the right side and its mirror image on the left."""
        for k in (1, -1):
            self.form([p * (k, 1) for p in polys], colour, **more)


def paint(image, forms, light, scale=1.0, shift=(0.0, 0.0)):
    """Paints the forms on the image; `light` points towards the light."""
    unit = image.width
    zoom = unit / SIZE
    for f in forms:
        polys = [(p * scale + shift) * unit for p in f.polys]
        every = np.vstack(polys)
        soft = float(np.clip((every.max(0) - every.min(0)).min() * 0.16, 0.5 * zoom, 6.5 * zoom))
        low = np.clip(np.floor(every.min(0) - 3 * soft - 12), -unit, 2 * unit).astype(int)
        high = np.clip(np.ceil(every.max(0) + 3 * soft + 12), -unit, 2 * unit).astype(int)
        box, corner = tuple((high - low).tolist()), tuple(low.tolist())
        mask, rim, layer = Image.new("L", box), Image.new("L", box), Image.new("RGB", box, f.colour)
        for p in polys:
            loop = [tuple(q) for q in (p - low).tolist()]
            ImageDraw.Draw(mask).polygon(loop, fill=255)
            if f.edge:
                ImageDraw.Draw(rim).line([*loop, *loop[:2]], fill=255, width=round(3.6 * zoom), joint="curve")
        for shapes, colour in f.marks:
            for p in shapes:
                loop = (p * scale + shift) * unit - low
                ImageDraw.Draw(layer).polygon([tuple(q) for q in loop.tolist()], fill=colour)
        if f.shade:
            layer = shaded(layer, mask, light, soft, f.shade)
        if f.edge:
            image.paste(dark(f.colour, 0.7), corner, rim)
        if f.alpha < 1:
            mask = mask.filter(ImageFilter.GaussianBlur(1.5 * zoom)).point(lambda v, a=f.alpha: round(v * a))
        image.paste(layer, corner, mask)


def shaded(layer, mask, light, soft, amount):
    """Darkens the area towards the side away from the light and brightens the lit side."""
    blur = mask.filter(ImageFilter.GaussianBlur(soft))
    dx, dy = round(light[0] * soft), round(light[1] * soft)
    lit = np.asarray(ImageChops.offset(blur, dx, dy), np.float32) / 255
    unlit = np.asarray(ImageChops.offset(blur, -dx, -dy), np.float32) / 255
    gain = 1 - 0.40 * amount * (1 - unlit) + 0.16 * amount * (1 - lit)
    lift = 22 * amount * np.clip(unlit - lit, 0, 1)
    pixels = np.asarray(layer, np.float32) * gain[..., None] + lift[..., None]
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- coats and markings

# base, light (muzzle, chest, paws), markings, eyes, nose, pattern; then ears (dogs) or mane (lions)
COATS = {
    "cat": """969ba5 e1e2e6 585c68 96c846 e88c96 tabby, ec9e54 fde8cd be6428 78af46 e88c96 tabby
        3e3c48 565462 24222a f5c83c 78555f plain, f8f4ee fffcf8 d7cdc8 5faad7 e88c96 plain
        b29270 eedec8 604632 8cb950 be6e64 tabby, ecdcc4 f6ecda 5c4642 50a0e1 463234 siamese
        3c3a44 f6f4f0 222026 96cd5a e88c96 tuxedo, 788294 98a2b2 586070 f0af3c 504655 plain
        f8f0e6 fffaf4 e28c42 78af50 e88c96 patched, f0cc9e fceed7 cf9450 c89632 e88c96 tabby""",
    "dog": """
        deaa62 f5daa8 b67e3e 6e4628 2c2428 plain floppy, 8a5a3a cea67e 5c3a26 6e4628 2c2428 plain floppy
        faf6f0 fffcf8 3e3a3e 6e4628 2c2428 spots floppy, 42404a b8895e 2a282e 82552d 221e22 plain floppy
        c47c42 fcf6ec 543a2e 6e4628 2c2428 blaze floppy, 8892a2 fafafa 586274 6eb9e6 2c2428 mask pricked
        faf4e8 fffcf6 d6b07c 6e4628 2c2428 plain folded, d88a46 fdf0dc b0642e 6e4628 2c2428 mask pricked
        ccaa7e e2c8a4 463834 6e4628 2c2428 muzzle folded
        faf6f0 fffcf8 965c36 6e4628 2c2428 patched floppy""",
    "elephant": """96a0b0 bec6d2 e2aaac 503c32 000000 plain, 80828a a8aab2 c49c9c 503c32 000000 plain
        a8a09a ccc4bc e4b8ac 503c32 000000 plain, 747e94 9ca6ba c696a4 503c32 000000 plain
        b4b8c0 d6d8de eebebe 503c32 000000 plain, 8c807a b2a69e cea094 503c32 000000 plain
        8a9caa b4c4d0 dca8a8 503c32 000000 plain""",
    "lion": """ecbe74 fce8c2 c48e4c f0bc46 603a34 lion b26228, e4b87a fae6c6 ba8850 e8b03c 543632 lion 6c3e28
        f4ce86 fff0ce ce9e56 e8b03c 6e4238 lion da8c2c, dcac6a f6deb8 b07c44 f0bc46 543632 lion 884a24
        f0c688 ffeccc c49254 dca83c 603a34 lion c05422, e2ba86 fae8cc b48654 e8b44a 543632 lion 52362c""",
    "tiger": """f08e32 fcfaf6 261e20 e1be3c de7878 tiger, e47a2a fcfaf6 261e20 bec850 de7878 tiger
        f7a446 fcfaf6 2a2022 e1be3c c86864 tiger, f4f0ec fcfaf6 343036 5aafe1 de7878 tiger
        ea823e fcfaf6 261e20 f0c85a c86864 tiger, f5982c fcfaf6 2c2022 96be5a de7878 tiger""",
}


@dataclass
class Coat:
    """Colours and markings of one animal."""

    base: tuple
    light: tuple
    dark: tuple
    eye: tuple
    nose: tuple
    pattern: str
    ears: str = ""
    mane: tuple = ()

    def foot(self):
        return {"siamese": self.dark, "plain": self.base, "lion": self.base}.get(self.pattern, self.light)


def coats(animal):
    """The coats of an animal, read from the table."""
    found = []
    for row in COATS[animal].strip().replace("\n", ",").split(","):
        *colours, pattern, extra = [*row.split(), ""][:7]
        colours = [ImageColor.getrgb(f"#{c}") for c in colours]
        mane = ImageColor.getrgb(f"#{extra}") if animal == "lion" else ()
        found.append(Coat(*colours, pattern, extra, mane))
    return found


def spots(coat, rng, low, high, size, count):
    """Scattered spots between two corners."""
    found = []
    for i in range(count):
        x = low[0] + (high[0] - low[0]) * (i + rng.uniform(0.2, 0.8)) / count
        y, rx, ry = rng.uniform(low[1], high[1]), rng.uniform(0.75, 1.2), rng.uniform(0.75, 1.1)
        found.append(oval(x, y, size * rx, size * ry))
    return [(found, coat.dark)]


def body_marks(a, edge, step, count):
    """Marks of the coat on a trunk with this outer edge; `step` leads across it."""
    if a.coat.pattern == "tiger":
        return [(stripes(edge, step, 0.16, count, a.rng), a.coat.dark)]
    if a.coat.pattern == "tabby":
        return [(stripes(edge, np.multiply(step, 0.6), 0.085, count, a.rng), a.coat.dark)]
    low, high = np.min(points(edge), 0), np.max(points(edge), 0) + np.abs(step)
    if a.coat.pattern == "spots":
        return spots(a.coat, a.rng, low + (0, 0.1), high, 0.11, 7)
    if a.coat.pattern in ("patched", "blaze"):
        return spots(a.coat, a.rng, low, (high[0], low[1] + 0.4), 0.34, 2)
    return []


def limb_marks(a, path, width):
    """Marks of the coat on a leg: bars across it, or a foot of another colour."""
    if a.coat.pattern in ("tiger", "tabby"):
        edge, bar = points(path) - (width * 0.52, 0), 0.11 if a.coat.pattern == "tiger" else 0.07
        return [(stripes(edge, (width * 0.95, 0.03), bar, 4, a.rng), a.coat.dark)]
    return [([oval(*path[-1], width * 1.6, math.dist(path[0], path[-1]) * 0.32)], a.coat.foot())]


# ---------------------------------------------------------------- faces


@dataclass
class Animal:
    """Everything that has been decided about one animal."""

    kind: str
    coat: Coat
    rng: random.Random
    mouth: str  # smile, open, calm
    gaze: float  # -1 looks left, 1 right
    lids: float  # how wide the eyes are open; 0 is shut and happy
    side: float  # how far the face is turned
    wears: str = "collar"  # of a dog, or one of ACCESSORIES
    cloth: tuple = ()  # the colour of what it wears


def eyes(pen, x, y, r, a, pupil):
    """A pair of eyes; the pupil's half width is 0 for plain dark eyes."""
    if a.wears != "collar" and not pupil:  # captions say the colour of all eyes
        pupil = 0.5
        r *= 1.25
    for k in (1, -1):
        eye = pen.at(k * x, y, r)
        if not a.lids:
            eye.flat(stroke("-1.1 .3, -.6 -.4, 0 -.6, .6 -.4, 1.1 .3", *[0.5] * 5), INK)
            continue
        if pupil:
            lens = smooth("-1.05 .3, -.75 -.45, -.1 -.95, .75 -.85, 1.2 -.15, .75 .65, -.2 .8") * (k, a.lids)
            iris = [([oval(a.gaze * 0.25, -0.1, pupil, 0.78 if pupil < 0.4 else pupil)], INK)]
            eye.flat([lens * 1.26], INK)
            eye.form([lens], a.coat.eye, iris, edge=False, shade=0.25)
        else:
            eye.flat([oval(0, 0, 1.05, 1.15 * a.lids)], INK)
            eye.flat([oval(a.gaze * 0.2, 0.15, 0.68, 0.74 * a.lids)], a.coat.eye)
            eye.flat([oval(a.gaze * 0.2, 0.1, 0.46, 0.52 * a.lids)], INK)
        eye.flat([oval(a.gaze * 0.2 - 0.3, -0.36 * a.lids, 0.3)], WHITE)


def snout(pen, a, y, w, n, talk=True):
    """Nose of half width n around height y, and the mouth below it, about 2w wide."""
    b, low = 0.075 * pen.bold, y + n * 0.6
    if a.mouth == "open" and talk:
        jaw = both([(0, low + 0.12), (w * 0.55, low + 0.16), (w * 0.44, low + 0.42), (0, low + 0.58)])
        pen.form([jaw], (120, 40, 50), [([oval(0, low + 0.52, w * 0.36, 0.19)], TONGUE)], shade=0)
    lift = 0.0 if a.mouth == "calm" else 0.12
    half = points([(0, 0.13), (w * 0.3, 0.24), (w * 0.62, 0.2 - lift * 0.5), (w * 0.78, 0.14 - lift)])
    pen.flat(twin(stroke(half + (0, low), b, b, b)), INK)
    pen.flat(stroke([(0, y), (0, low + 0.14)], b, b), INK)
    pen.form([both("0 -.55, .7 -.55, 1 -.2, .4 .45, 0 .62") * n + (0, y)], a.coat.nose, shade=0.5)
    pen.flat([oval(-n * 0.3, y - n * 0.25, n * 0.28, n * 0.14)], pale(a.coat.nose, 0.55))


def cat_head(pen, a):
    """A house cat's head: tall pointed ears, slit pupils, whiskers."""
    c, s = a.coat, a.side
    ear = c.dark if c.pattern == "siamese" else c.base
    pen.pair([smooth(".14 -.6, .44 -1, .78 -1.4, .86 -1.37, .98 -.8, .94 -.1, .4 -.2")], ear)
    pen.pair([smooth(".44 -.7, .58 -.96, .76 -1.17, .83 -.85, .8 -.5")], mix(PINK, ear, 0.2), edge=False)
    marks = []
    if c.pattern == "tabby":
        side = stroke(".3 -.92, .24 -.5", 0.14, 0.1, 0) + stroke("1.2 .02, .74 .12", 0.12, 0.1, 0)
        side += stroke("1.2 .32, .76 .34", 0.12, 0.1, 0)
        marks = [(stroke([(s, -0.95), (s, -0.4)], 0.14, 0.11, 0) + twin(side), c.dark)]
    elif c.pattern == "siamese":
        marks = [([oval(s, 0.2, 0.82)], mix(c.base, c.dark, 0.35))]
        marks += [([both("0 -.3, .4 -.22, .66 .1, .62 .55, .3 .95, 0 .98", s)], c.dark)]
    elif c.pattern == "tuxedo":
        marks = [([both("0 -.5, .1 -.3, .18 .05, .6 .4, .5 1, 0 1.1", s)], c.light)]
    elif c.pattern == "patched":
        marks = [([oval(0.72, -0.55, 0.62, 0.72, 20)], c.dark), ([oval(-0.8, -0.8, 0.5)], dark(c.dark, 0.7))]
    pen.form([both("0 -.8, .5 -.74, .92 -.36, 1.08 .2, .86 .62, .4 .82, 0 .86")], c.base, marks)
    face = pen.at(s)
    if c.pattern != "siamese":
        face.flat([*twin([oval(0.26, 0.47, 0.33, 0.25)]), oval(0, 0.64, 0.26, 0.18)], c.light)
    eyes(face, 0.45, -0.02, 0.25, a, 0.26)
    hair, b = (206, 200, 196) if sum(c.base) < 330 else dark(c.base, 0.6), 0.05 * pen.bold
    for k in (-1, 0, 1):
        line = [(0.5, 0.44 + k * 0.09), (0.88, 0.39 + k * 0.17), (1.28, 0.4 + k * 0.24)]
        face.flat(twin(stroke(line, b, b, b * 0.7)), hair)
    snout(face, a, 0.27, 0.4, 0.15, talk=False)


def tiger_head(pen, a):
    """A tiger's head: round ears, bold black stripes, white cheeks and brows."""
    c, s = a.coat, a.side
    pen.pair([oval(0.76, -0.72, 0.36)], c.dark)
    pen.pair([oval(0.76, -0.67, 0.24)], pale(c.base, 0.7), edge=False, shade=0)
    white = twin([oval(0.4, -0.32, 0.24, 0.18, 14)], s)
    white += twin([smooth("1.4 .2, .85 .12, .55 .35, .3 .8, .7 1.2")])
    brow = stroke(".62 -1, .42 -.76, .14 -.68", 0.17, 0.15, 0)
    brow += stroke(".5 -.6, .28 -.52, .06 -.48", 0, 0.14, 0.02)
    bars = twin(brow, s) + stroke([(s, -1), (s, -0.3)], 0.17, 0.15, 0)
    for x, y, w in ((0.64, -0.42, 0.16), (0.74, -0.02, 0.18), (0.74, 0.3, 0.16), (0.66, 0.66, 0.14)):
        bars += twin(stroke([(1.4, y - 0.1), (1, y + 0.02), (x, y + 0.1)], w, w, 0))
    skull = "0 -.9, .55 -.84, .98 -.4, 1.1 .05, 1.28 .3, 1.1 .42, 1.14 .66, .84 .72, .5 .94, 0 1"
    pen.form([both(skull)], c.base, [(white, WHITE), (bars, c.dark)])
    big_cat_face(pen.at(s), a, WHITE, 0.21)


def lion_head(pen, a):
    """A lion's head: a wide mane around a tan face with a broad nose."""
    c, s = a.coat, a.side
    for radius, tufts, colour in ((1.6, 15, dark(c.mane, 0.22)), (1.3, 13, pale(c.mane, 0.1))):
        turn, ring = a.rng.uniform(0, 360 / tufts), []
        for i in range(tufts * 2):
            angle, r = math.radians(turn + 180 * i / tufts), radius * (0.9 if i % 2 else 1.0)
            ring.append((r * 0.96 * math.sin(angle), 0.1 - r * math.cos(angle)))
        pen.form([smooth(ring)], colour, shade=0.8)
    pen.pair([oval(0.82, -0.78, 0.31)], c.base)
    pen.pair([oval(0.82, -0.74, 0.18)], mix(c.dark, PINK, 0.35), edge=False, shade=0)
    tuft = [([both("0 -1.4, .4 -1.3, .26 -.78, 0 -.56", s)], pale(c.mane, 0.1))]
    pen.form([both("0 -.86, .5 -.8, .9 -.4, .98 .1, .82 .58, .46 .92, 0 1")], c.base, tuft)
    face = pen.at(s)
    face.flat([both("0 -.45, .15 -.4, .24 .2, 0 .25")], pale(c.base, 0.4))
    face.flat(twin([oval(0.44, -0.34, 0.22, 0.12, 8)]), pale(c.base, 0.5))
    big_cat_face(face, a, c.light, 0.25)


def big_cat_face(face, a, white, nose):
    """Eyes and muzzle of a lion or tiger."""
    face.flat([*twin([oval(0.27, 0.5, 0.37, 0.29)]), oval(0, 0.72, 0.3, 0.22)], white, shade=0.6)
    eyes(face, 0.45, -0.05, 0.2, a, 0.48)
    snout(face, a, 0.26, 0.54, nose)


def dog_ear_colour(c):
    return c.dark if c.pattern in ("patched", "blaze", "spots", "muzzle") else mix(c.base, c.dark, 0.75)


def dog_head(pen, a):
    """A dog's head from the front: snout, big nose, hanging, folded or pricked ears."""
    c, s = a.coat, a.side
    if c.ears == "pricked":
        pen.pair([smooth(".2 -.6, .4 -1.05, .66 -1.4, .84 -1, .86 -.2")], c.base)
        inner = smooth(".42 -.66, .52 -.95, .65 -1.16, .72 -.9, .7 -.5")
        pen.pair([inner], mix(PINK, c.base, 0.4), edge=False)
    dots = [(-0.5, -0.64, 0.13), (0.2, -0.72, 0.1), (0.66, -0.4, 0.12), (-0.7, 0.24, 0.1)]
    marks = {
        "mask": ([both("0 -.1, .14 -.42, .46 -.5, .6 -.1, 1 .2, .8 .9, 0 1.2", s)], c.light),
        "patched": ([oval(0.52 + s, -0.22, 0.4, 0.5, -12), oval(-0.9, -0.5, 0.5, 0.6)], c.dark),
        "blaze": ([both("0 -1.2, .12 -.6, .2 -.1, .55 .4, .6 1.2, 0 1.3", s)], c.light),
        "spots": ([oval(*dot) for dot in dots], c.dark),
    }
    skull = both("0 -.92, .48 -.86, .84 -.44, .88 .1, .76 .5, .5 .9, 0 1.04")
    pen.form([skull], c.base, [marks[c.pattern]] if c.pattern in marks else [])
    face = pen.at(s)
    if a.mouth == "open":
        face.form([both("0 .7, .24 .74, .27 1.12, .16 1.32, 0 1.36")], TONGUE, shade=0.6)
    muzzle = mix(c.dark, c.base, 0.15) if c.pattern == "muzzle" else c.light
    face.form([both("0 0, .36 .1, .58 .46, .46 .78, .16 .84, 0 .8")], muzzle, shade=0.8)
    eyes(face, 0.44, -0.2, 0.18, a, 0)
    snout(face, a, 0.2, 0.5, 0.29, talk=False)
    flaps = {
        "floppy": ".5 -.8, .86 -.84, 1.16 -.4, 1.28 .2, 1.14 .62, .9 .6, .76 .1, .7 -.4",
        "folded": ".4 -.88, .7 -1.06, 1 -.9, 1.2 -.5, 1.12 -.24, .86 -.44, .62 -.62",
    }
    if c.ears in flaps:
        pen.pair([smooth(flaps[c.ears])], dog_ear_colour(c))


def elephant_head(pen, a):
    """An elephant's head from the front: fan ears, trunk and tusks."""
    c, b = a.coat, 0.06 * pen.bold
    fan = smooth(".45 -.7, .95 -1.1, 1.6 -1.04, 2 -.4, 1.84 .34, 1.4 .9, 1.04 .7, .6 .3")
    pen.pair([fan], mix(c.base, c.light, 0.4))
    inner = smooth(".7 -.5, 1.02 -.8, 1.52 -.8, 1.76 -.34, 1.6 .24, 1.34 .62, 1 .36, .7 .1")
    pen.pair([inner], mix(c.base, c.dark, 0.65), edge=False, shade=0.6)
    pen.form([both("0 -.96, .36 -1.02, .74 -.7, .82 -.1, .68 .4, .42 .74, 0 .84")], c.base)
    face = pen.at(a.side)
    face.pair(stroke(".42 .52, .58 .95, .84 1.24", 0.27, 0.23, 0.1), IVORY, shade=0.5)
    low = a.rng.choice(("-.04 1.2, .14 1.66, .56 1.72", ".06 1.2, .04 1.7, .1 1.9"))
    path = points("0 -.05, 0 .6, " + (".22 1.22, .74 1.36, 1 .96" if a.mouth == "open" else low))
    trunk = stroke(path * (1 if a.gaze > 0 else -1, 1), 0.66, 0.56, 0.46, 0.38, 0.32)
    face.form(trunk, pale(c.base, 0.06))
    face.flat([oval(0, 0, 0.44, 0.4)], c.base)
    for y, w in ((0.34, 0.2), (0.6, 0.18), (0.86, 0.16)):
        face.flat(stroke([(-w, y), (0, y + 0.05), (w, y)], b, b, b), dark(c.base, 0.35))
    eyes(face, 0.52, -0.14, 0.15, a, 0)
    face.flat(twin(stroke(".36 -.4, .52 -.46, .68 -.38", b, b, b)), dark(c.base, 0.4))


# ---------------------------------------------------------------- bodies


@dataclass
class Build:
    """Proportions of a four-legged body."""

    draw_head: object
    head: float  # size of the head
    limb: float  # thickness of a leg
    tail: float  # thickness of the tail


BUILDS = {
    "cat": Build(cat_head, 0.62, 0.24, 0.17),
    "dog": Build(dog_head, 0.62, 0.26, 0.2),
    "lion": Build(lion_head, 0.58, 0.34, 0.15),
    "tiger": Build(tiger_head, 0.66, 0.34, 0.21),
    "elephant": Build(elephant_head, 0.5, 0.42, 0.12),
}


def shadow(pen, x, w):
    pen.flat([oval(x, 0.02, w, 0.12)], INK, alpha=0.3)


def tail(pen, a, path):
    """A tail along the path, with rings, a light tip or a tuft."""
    c, w, line = a.coat, BUILDS[a.kind].tail, smooth(path, closed=False)
    marks = []
    if c.pattern in ("tiger", "tabby"):
        rings = [line[round(t * (len(line) - 3)):][:3] for t in (0.3, 0.55, 0.78)]
        marks = [([stroke(r, w * 1.4, w * 1.4)[0] for r in rings] + [oval(*line[-1], w * 0.75)], c.dark)]
    elif c.pattern in ("mask", "tuxedo", "blaze"):
        marks = [([oval(*line[-1], w * 1.5)], c.light)]
    colour = c.dark if c.pattern == "siamese" else c.base
    pen.form(stroke(path, w, w * 1.05, w * (0.5 if a.kind == "dog" else 0.9)), colour, marks)
    if a.kind == "lion":
        pen.form([oval(*line[-1], 0.2, 0.24)], c.mane)


def head(pen, a, x, y, size=1.0):
    """The head on a body, with what it wears."""
    build = BUILDS[a.kind]
    if a.kind == "dog" and a.wears == "collar":
        low = y + 0.98 * build.head * size
        collar(pen, a, [(x - 0.36, low - 0.14), (x, low + 0.04), (x + 0.34, low - 0.14)])
    turn, wide = a.rng.uniform(-7, 7), a.rng.uniform(0.94, 1.06)
    dressed_head(pen.at(x, y, build.head * size, turn, wide=wide, bold=1.5), a)


def dressed_head(pen, a):
    """The head and its accessory."""
    BUILDS[a.kind].draw_head(pen, a)
    if a.wears in ACCESSORIES:
        ACCESSORIES[a.wears](pen, a)


def collar(pen, a, path):
    """A dog's collar with a tag."""
    colour = a.rng.choice([(214, 60, 64), (52, 112, 190), (40, 150, 120), (240, 190, 50), (140, 80, 170)])
    pen.form(stroke(path, 0.17, 0.17, 0.17), colour, shade=0.4)
    pen.form([oval(path[1][0], path[1][1] + 0.14, 0.1)], (250, 214, 90), shade=0.3)


# ---------------------------------------------------------------- accessories, in the head's coordinates

NECK = {"cat": 1.0, "dog": 1.16, "elephant": 1.36, "lion": 1.36, "tiger": 1.12}
CROWN = {"cat": -0.72, "dog": -0.8, "elephant": -0.86, "lion": -1.2, "tiger": -0.8}
EYES = {"cat": (0.45, -0.02), "dog": (0.44, -0.2), "elephant": (0.52, -0.14)}


def scarf(pen, a):
    y = NECK[a.kind]
    wide = 1.1 if a.kind in ("lion", "elephant") else 0.8
    end = stroke([(0.42, y + 0.1), (0.56, y + 0.5), (0.5, y + 0.86)], 0.4, 0.42, 0.46)[:1]
    pen.form(end, a.cloth, free=True)
    pen.form(stroke([(-wide, y - 0.16), (0, y + 0.14), (wide, y - 0.16)], 0.36, 0.42, 0.36), a.cloth)


def bow_tie(pen, a):
    y = NECK[a.kind] + 0.14
    wing = smooth(".06 -.1, .62 -.36, .74 0, .62 .36, .06 .1") + (0, y)
    pen.pair([wing], a.cloth)
    pen.form([oval(0, y, 0.17, 0.19)], dark(a.cloth, 0.15))


def hat(pen, a):
    top = pen.at(a.side * 0.5, CROWN[a.kind])
    top.form([smooth("-.5 0, -.56 -.72, 0 -.84, .56 -.72, .5 0")], a.cloth)
    top.form(stroke("-.44 -.14, 0 -.1, .44 -.14", 0.18, 0.18, 0.18), dark(a.cloth, 0.5), edge=False)
    top.form(stroke("-.86 -.02, 0 .08, .86 -.02", 0.17, 0.2, 0.17), a.cloth)


def glasses(pen, a):
    x, y = EYES.get(a.kind, (0.45, -0.05))
    face = pen.at(a.side)
    ring = [oval(0, 0, 0.36), oval(0, 0, 0.24)]
    rim = np.vstack([ring[0], ring[0][:1], ring[1][::-1], ring[1][-1:]])
    face.flat(twin([rim + (x, y)]), a.cloth)
    face.flat(stroke([(-x + 0.3, y), (0, y - 0.05), (x - 0.3, y)], 0.1, 0.1, 0.1), a.cloth)


ACCESSORIES = {"scarf": scarf, "hat": hat, "glasses": glasses, "bow tie": bow_tie}

# ---------------------------------------------------------------- poses


def sitting(pen, a):
    """A body from the front, sitting."""
    b, c = BUILDS[a.kind], a.coat
    w = b.limb
    shadow(pen, 0, 1.1)
    k = a.rng.choice((1, -1))
    tail(pen, a, [(k * 0.6, -0.16), (k * 1.02, -0.2), (k * 1.2, -0.6), (k * 1.04, -1.0)])
    body = both("0 -1.5, .42 -1.3, .6 -.85, .8 -.4, .78 -.08, 0 0") * (0.85 + w * 0.6, 1)
    marks = []
    if c.pattern not in ("spots", "siamese"):
        chest = mix(c.light, c.base, 0.3 if c.pattern == "plain" else 0)
        marks.append(([both("0 -1.5, .32 -1.2, .34 -.7, 0 -.45")], chest))
    edge = points(".44 -1.25, .64 -.85, .88 -.4, .84 -.05")
    for k in (1, -1):
        marks += body_marks(a, edge * (k, 1), (-0.42 * k, 0.06), 4)
    pen.form([body], c.base, marks)
    hind = c.base if c.pattern in ("tiger", "tabby", "muzzle") else c.foot()
    pen.pair([oval(0.66, -0.1, 0.32, 0.16)], hind)
    for k in (1, -1):
        path = [(k * 0.24, -0.85), (k * 0.27, -0.5), (k * 0.27, -0.07)]
        paw = oval(k * 0.28, -0.09, w * 0.66, 0.14)
        pen.form([*stroke(path, w * 0.9, w, w), paw], c.base, limb_marks(a, path, w), shade=0.8)
    head(pen, a, 0, -1.6 if a.kind == "lion" else -1.72, 1.26)


def portrait(pen, a):
    """The head alone, with a bit of neck and shoulders below."""
    c, marks = a.coat, []
    if c.pattern in ("tuxedo", "mask", "tiger", "blaze"):
        marks = [([oval(0, 1.5, 0.5, 0.9)], c.light)]
    if c.pattern == "tiger":
        edge = points(".75 .9, 1 1.5, 1.2 2.4")
        marks += [(stripes(edge * (k, 1), (-0.55 * k, 0.1), 0.16, 4, a.rng), c.dark) for k in (1, -1)]
    wide = {"lion": 1.1, "elephant": 1.15}.get(a.kind, 0.8)
    trunk = both("0 .4, .55 .5, .8 1, 1.3 1.5, 1.5 3.4, 0 3.6") * (wide, 1)
    if a.kind == "elephant":
        trunk = both("0 -.3, .9 0, 1.35 .8, 1.5 2, 1.5 3.8, 0 4")
    pen.form([trunk], dark(c.base, 0.3) if a.kind == "elephant" else c.base, marks, free=True)
    if a.kind == "dog" and a.wears == "collar":
        collar(pen, a, [(-0.6, 0.98), (0, 1.25), (0.6, 0.98)])
    dressed_head(pen.at(turn=a.rng.uniform(-5, 5), wide=a.rng.uniform(0.95, 1.04)), a)


def elephant_front(pen, a):
    """An elephant from the front: big head above a round body and thick legs."""
    c = a.coat
    shadow(pen, 0, 1.1)
    pen.pair([smooth(".2 -.8, .86 -.8, .92 -.04, .3 -.04")], dark(c.base, 0.34))
    pen.form([oval(0, -1.05, 0.92, 0.8)], dark(c.base, 0.2))
    pen.pair([smooth(".14 -.8, .7 -.85, .72 -.06, .66 0, .18 0, .14 -.06")], dark(c.base, 0.12))
    pen.flat(twin([oval(x, -0.07, 0.085, 0.075) for x in (0.26, 0.43, 0.6)]), pale(c.light))
    elephant_head(pen.at(0, -1.7, 0.72, a.rng.uniform(-5, 5), bold=1.25), a)


# ---------------------------------------------------------------- backgrounds

# colours of the sky at the top, the sky at the horizon and the ground
SCENES = {
    "meadow": "88c4ee daeef8 96c66c", "savannah": "9cd0ec f6f0d6 cec47c", "sunset": "7a6ca8 fcc496 867478",
    "snow": "96bce0 d6e4f2 f0f5fa", "jungle": "96ceac ceecc8 62985c", "dusk": "3e4e7c 8892be 526a70",
    "blue room": "9cc0d8 b6d2e0 c4a07c", "rose room": "e8c4be f0d2ca 967a74",
    "green room": "b0d0b8 bedac6 d6b892", "plain blue": "78b2d6 aad4ea",
    "plain violet": "a89cce cec4e4", "plain mint": "80c4b0 b8e2d0",
    "plain cream": "f8e2b0 fcf0d2", "plain teal": "387684 60a0a8",
    "night": "1a2250 3a4890 26305e", "desert": "f6cf8e fae8bc e6b45a", "sea": "8cd0f4 d2f0fc 2876be",
}
HABITATS = {
    "cat": "blue room,meadow,plain cream,rose room,plain teal,green room,plain mint,dusk,snow,plain violet",
    "dog": "meadow,plain blue,green room,snow,plain mint,blue room,meadow,sunset,plain cream,plain teal,dusk",
    "elephant": "savannah,meadow,sunset,plain cream,jungle,savannah,plain mint,meadow,rose room",
    "lion": "savannah,plain blue,dusk,meadow,plain violet,jungle,savannah,plain teal,sunset",
    "tiger": "jungle,plain mint,snow,dusk,meadow,plain blue,jungle,plain teal,snow,plain cream",
}


def scene_colours(name):
    return [ImageColor.getrgb(f"#{c}") for c in SCENES[name].split()]


def background(name, rng, horizon, side):
    """A calm, slightly blurred background."""
    top, low, *ground = (mix(c, WHITE, rng.uniform(0, 0.12)) for c in scene_colours(name))
    fade = np.clip(np.linspace(0, 1 / horizon if ground else 1, side), 0, 1)[:, None, None]
    sky = np.asarray(top) * (1 - fade) + np.asarray(low) * fade + 0.5
    image = Image.fromarray(np.broadcast_to(sky, (side, side, 3)).astype(np.uint8))
    pen, x, k = Pen(), rng.choice((rng.uniform(0.1, 0.24), rng.uniform(0.76, 0.9))), rng.choice((1, -1))
    if not ground:
        pen.flat([oval(0.5 + 0.12 * k, rng.uniform(0.42, 0.56), rng.uniform(0.36, 0.48))], pale(low, 0.35))
    else:
        floor = [np.array([(0, horizon), (1, horizon), (1, 1), (0, 1)])]
        if "room" in name:
            pen.flat([points("-.13 .06, .13 .06, .13 .34, -.13 .34") + (x, 0)], pale(top))
            pen.flat(floor, ground[0])
            pen.flat(stroke([(-0.1, horizon), (1.1, horizon)], 0.03, 0.03), pale(low))
            rug = rng.choice([(200, 90, 90), (90, 130, 180), (240, 220, 180)])
            pen.flat([oval(0.5, 0.93, 0.55, 0.13)], mix(ground[0], rug, 0.5))
        else:
            landscape(pen, name, rng, horizon, low, ground[0], x, k)
            pen.flat(floor, ground[0])
    paint(image, pen.forms, (0, 0))
    return image.filter(ImageFilter.GaussianBlur(side / SIZE))


def landscape(pen, name, rng, horizon, low, ground, x, k):
    """Sun, hills and the plants of an outdoor background."""
    sun = {"sunset": (255, 226, 150), "dusk": (236, 238, 220)}.get(name, (255, 246, 200))
    pen.flat([oval(x, rng.uniform(0.1, 0.22), 0.09)], sun)
    hill = mix(ground, low, 0.45) if name != "snow" else (190, 208, 228)
    pen.flat([oval(0.5 - 0.4 * k, horizon + 0.06, 0.45, rng.uniform(0.1, 0.2))], hill)
    pen.flat([oval(0.5 + 0.45 * k, horizon + 0.05, 0.4, rng.uniform(0.08, 0.16))], mix(hill, ground, 0.3))
    tree, x = mix(low, (70, 130, 84), 0.6), 0.5 + 0.4 * k
    if name == "savannah":
        pen.flat(stroke([(x, horizon + 0.05), (x + 0.02, horizon - 0.2)], 0.03, 0.02), dark(tree, 0.3))
        pen.flat([oval(x, horizon - 0.22, 0.18, 0.05), oval(x + 0.04, horizon - 0.26, 0.11, 0.04)], tree)
    elif name == "snow":
        for dx, y in ((0, 0.34), (0.13, 0.24), (-0.76 * k, 0.26)):
            pen.flat([points([(-0.08, 0), (0, -y), (0.08, 0)]) + (x + dx, horizon)], mix(tree, low, 0.2))
    elif name == "jungle":
        for i, (x, y) in enumerate(points(".02 .3, .98 .24, .12 .08, .88 .06, .97 .5, .04 .54")):
            pen.flat([oval(x, y, 0.07, 0.24, 48 if x > 0.5 else -48)], mix(tree, low, 0.12 * (i % 3)))
    elif name == "night":
        pen.flat([oval(rng.random(), rng.uniform(0, horizon), 0.016) for _ in range(14)], (250, 244, 200))
    elif name == "desert":
        y = horizon - 0.04
        cactus = stroke([(x, y + 0.1), (x, y - 0.3)], 0.07, 0.07)
        cactus += stroke([(x, y - 0.04), (x + 0.11, y - 0.08), (x + 0.11, y - 0.2)], 0.05, 0.05, 0.05)
        pen.flat(cactus, (70, 140, 80))


def pick_scene(options, start, coat):
    """The first background, from `start` on, that the coat stands out from."""
    order = options[start:] + options[:start]
    colour = mix(coat.base, coat.mane, 0.5) if coat.mane else coat.base
    clear = [s for s in order if min(math.dist(colour, c) for c in scene_colours(s)) > 62]
    return (clear or order)[0]


# ---------------------------------------------------------------- images

POSES = ["head"] * 14 + ["sit"] * 6
ELEPHANT_POSES = ["head"] * 14 + ["front"] * 6
LIGHTS = [(1.0, 1.0, 1.0), (1.03, 0.99, 0.94), (0.97, 1.0, 1.03), (1.04, 0.97, 0.95)]
DRAW = {"head": portrait, "sit": sitting, "front": elephant_front}


def deal(name, options, index):
    """The index-th card from endlessly repeated, freshly shuffled decks of the options."""
    rng, cards = random.Random(name), []
    while len(cards) <= index:
        cards += rng.sample(options, len(options))
    return cards[index]


def tinted(image, rng):
    """Light of the day: neutral, warm or cool, a little brighter towards one side."""
    across = 1 + np.linspace(-1, 1, image.width, dtype=np.float32) * rng.choice((0.05, -0.05))
    pixels = np.asarray(image, np.float32) * np.float32(rng.choice(LIGHTS)) * across[None, :, None]
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def framed(pen, pose, scene, rng, side, shrink):
    """The finished image of a pen's forms in a scene: painted at `side` pixels, then shrunk."""
    corners = np.vstack([p for f in pen.forms if not f.free and f.alpha == 1 for p in f.polys])
    low, span = corners.min(0), corners.max(0) - corners.min(0)
    scale = rng.uniform(0.88, 0.94) / span.max()
    room = 1 - span * scale
    x, y = room[0] * rng.uniform(0.35, 0.65), room[1] * rng.uniform(0.35, 0.65)
    if pose != "head":
        y = min(room[1] * rng.uniform(0.7, 0.9), 0.96 - span[1] * scale)
    image = background(scene, rng, rng.uniform(0.54, 0.68), side)
    angle = math.radians(rng.uniform(35, 75))
    light = (math.cos(angle) * rng.choice((1, -1)), -math.sin(angle))
    paint(image, pen.forms, light, scale, np.array([x, y]) - low * scale)
    return tinted(image.resize((side // shrink,) * 2, Image.Resampling.LANCZOS), rng)


def draw_image(kind, seed, index):
    """Draws image number `index` of a kind of animal."""
    name, rng = f"{seed}/{kind}", random.Random(f"{seed}/{kind}/{index}")
    pose = deal(f"{name}/pose", ELEPHANT_POSES if kind == "elephant" else POSES, index)
    coat = deal(f"{name}/coat", coats(kind), index)
    options = HABITATS[kind].split(",")
    scene = pick_scene(options, deal(f"{name}/scene", range(len(options)), index), coat)
    coat = replace(coat, base=mix(coat.base, rng.choice((WHITE, INK, (200, 130, 70))), rng.uniform(0, 0.08)))
    mouth = deal(f"{name}/mouth", ["smile", "open", "calm", "open", "smile"], index)
    lids = deal(f"{name}/lids", [1.0, 0.9, 1.1, 1.0, 0.85, 1.05, 0.0], index)
    a = Animal(kind, coat, rng, mouth, rng.uniform(-1, 1), lids, rng.uniform(-0.16, 0.16))
    pen = Pen()
    DRAW[pose](pen.at(wide=deal(f"{name}/side", [1, -1], index)), a)
    return framed(pen, pose, scene, rng, SIZE * ZOOM, ZOOM)


# ---------------------------------------------------------------- captioned images

# coats: base, light, markings, mane
PAINTS = {
    "white": "f8f5f0 fffdfa 3c3640 d2c4b4", "black": "3a3844 7c7a88 96949e 5e5a68",
    "orange": "f08e32 fdebd2 281f22 b4541e", "blue": "6cace8 dceafa 22305e 2c5eb0",
    "pink": "f494bc fde2ee 74264e c84480",
}
CLOTHS = {"red": (220, 40, 44), "yellow": (252, 208, 40), "green": (40, 160, 70), "blue": (36, 84, 200)}
IRISES = {"green": (70, 190, 60), "blue": (40, 120, 240), "yellow": (252, 204, 40)}
PLACES = {"night": "at night", "meadow": "in a meadow", "snow": "in the snow", "desert": "in a desert",
          "sea": "by the sea"}
ATTRIBUTES = {
    "animal": tuple(COATS),
    "coat": tuple(PAINTS),
    "eyes": tuple(IRISES),
    "pose": ("portrait", "sitting"),
    "accessory": ("none", *ACCESSORIES),
    "colour": tuple(CLOTHS),
    "background": tuple(PLACES),
}

# combinations for `--without unseen`, which a model that composes can show all the same
UNSEEN = (
    "white tiger", "pink elephant", "blue lion", "black dog", "orange cat", "lion hat", "elephant glasses",
    "tiger scarf", "dog night", "cat desert",
)


def attribute_words():
    """What captions call the attributes: {words: attributes}."""
    words = {}
    for name in ("animal", "coat", "pose", "background"):
        words |= {value: {name: value} for value in ATTRIBUTES[name]}
    words |= {f"{colour} eyes": {"eyes": colour} for colour in IRISES}
    for accessory in ACCESSORIES:
        words[accessory] = {"accessory": accessory}
        words |= {f"{c} {accessory}": {"accessory": accessory, "colour": c} for c in CLOTHS}
    return words


def combination(text):
    """The attributes that a few words of captions name: "white tiger", "lion green hat"."""
    words = attribute_words()
    found = {}
    rest = f" {' '.join(text.lower().split())} "
    for name in sorted(words, key=len, reverse=True):
        if f" {name} " in rest:
            rest = rest.replace(f" {name} ", " ", 1)
            twice = words[name].keys() & found.keys()
            if twice:
                raise ValueError(f'"{text}" names two values of {min(twice)}, which no image has: give one')
            found |= words[name]
    if rest.strip() or not found:
        known = ", ".join(name for name in words if "colour" not in words[name])
        raise ValueError(f'"{text}" is no combination of attributes: give some of {known}, red hat, ...')
    return found


def combinations(texts):
    """The combinations that --without gives."""
    listed = []
    for text in texts:
        listed += UNSEEN if text == "unseen" else [text]
    return [combination(text) for text in listed]


def has(attributes, wanted):
    """Whether the attributes include all the wanted ones."""
    return wanted.items() <= attributes.items()


def choose(rng, without=()):
    """The attributes of an image, with none of the combinations in `without`."""
    for _ in range(10_000):
        shown = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
        if shown["accessory"] == "none":
            del shown["colour"]
        if not any(has(shown, wanted) for wanted in without):
            return shown
    raise ValueError("--without leaves nothing to draw: give fewer combinations")


def mention(shown, rng):
    """The attributes that a caption says: the animal, what it wears, and most of the others."""
    return {name: value for name, value in shown.items()
            if name in ("animal", "accessory") or rng.random() < 0.8}


def caption(said, rng):
    """A sentence that says these attributes, in one of three forms; at most 16 tokens."""
    place = f" {PLACES[said['background']]}" if "background" in said else ""
    worn = " ".join(said[name] for name in ("colour", "accessory") if said.get(name, "none") != "none")
    if worn and said["accessory"] != "glasses":
        worn = f"a {worn}"
    eyes = f"{said['eyes']} eyes" if "eyes" in said else ""
    portrait = said.get("pose") == "portrait"
    animal = " ".join(said[name] for name in ("coat", "animal") if name in said)
    if said.get("pose") == "sitting":
        animal = f"sitting {animal}"
    animal = f"an {animal}" if animal[0] in "aeiou" else f"a {animal}"

    form = rng.choice(("with", "wearing", "on"))
    if form == "on" and worn:
        return "portrait: " * portrait + f"{worn} on {animal}{place}" + f", {eyes}" * bool(eyes)
    animal = "portrait of " * portrait + animal
    if form == "wearing" and worn:
        start = f"{said['background']}: " if "background" in said else ""
        return f"{start}{animal} wearing {worn}" + f", {eyes}" * bool(eyes)
    details = " and ".join(detail for detail in (eyes, worn) if detail)
    return animal + f" with {details}" * bool(details) + place


def captioned(seed, index, without=()):
    """The attributes of image number `index`, those that its caption says, and the caption."""
    rng = random.Random(f"{seed}/caption/{index}")
    shown = choose(rng, without)
    said = mention(shown, rng)
    return shown, said, caption(said, rng)


def draw_captioned_image(shown, seed, index):
    """Draws image number `index` with these attributes, 64 x 64 pixels, painted three times as large."""
    rng = random.Random(f"{seed}/captioned/{index}")
    kind = shown["animal"]
    base, light, marks, mane = (ImageColor.getrgb(f"#{c}") for c in PAINTS[shown["coat"]].split())
    pattern = kind if kind in ("lion", "tiger") else "plain"
    nose = INK if kind == "dog" else PINK
    marks = mix(base, PINK, 0.8) if kind == "elephant" else marks  # inside its ears
    coat = Coat(base, light, marks, IRISES[shown["eyes"]], nose, pattern, "floppy", mane)
    mouth = rng.choice(("smile", "open"))
    gaze = rng.uniform(-1, 1)
    side = rng.uniform(-0.1, 0.1)
    cloth = CLOTHS.get(shown.get("colour"))
    a = Animal(kind, coat, rng, mouth, gaze, 1.0, side, shown["accessory"], cloth)
    pen = Pen()
    pose = "head" if shown["pose"] == "portrait" else "sit"
    DRAW[pose](pen, a)
    return framed(pen, pose, shown["background"], rng, 3 * 64, 3)


def is_own_caption(line, index):
    """Whether a line of a metadata.jsonl is what `draw_captioned` writes for the image `index`."""
    try:
        row = json.loads(line)
        return row["file_name"] == f"{index:05d}.png" and row["animal"] in COATS
    except Exception:  # of what is no JSON, or another kind of row
        return False


def draw_captioned(out, count, seed, without):
    """Writes `count` captioned images and their captions, metadata.jsonl, to the folder."""
    out.mkdir(parents=True, exist_ok=True)
    captions = out / "metadata.jsonl"
    earlier = captions.read_bytes().splitlines() if captions.exists() else []
    if all(is_own_caption(line, index) for index, line in enumerate(earlier)):
        for index in range(count, len(earlier)):  # images of an earlier, longer run
            (out / f"{index:05d}.png").unlink(missing_ok=True)
    else:
        kept = captions.with_name(f"{captions.name}.previous")
        if kept.exists():
            raise ValueError(f"{captions} and {kept} are no captions of this program: move one of them")
        captions.rename(kept)
        print(f"kept the captions that were there, as {kept}")
    lines = []
    for index in range(count):
        shown, _, text = captioned(seed, index, without)
        name = f"{index:05d}.png"
        draw_captioned_image(shown, seed, index).save(out / name)
        lines.append(json.dumps({"file_name": name, "text": text, **shown}) + "\n")
    captions.write_text("".join(lines))  # at the end: it is whole, or as it was


def draw_classes(out, count, seed):
    """Writes `count` images of each animal to a folder of its name."""
    for kind in COATS:
        (out / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            draw_image(kind, seed, index).save(out / kind / f"{kind}_{index:02d}.png")


def make_parser():
    parser = argparse.ArgumentParser(description="Draw the example images of five animals.")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="another seed draws other images (default 0)")
    add("--out", type=Path, help="folder to write to (default: this script's)")
    add("--count", type=int, default=20, help="images per animal, with --captions in all (default 20)")
    add("--captions", action="store_true", help="images of 64 x 64 pixels, described in metadata.jsonl")
    add("--without", nargs="+", default=[], metavar="WORDS",
        help='with --captions: attributes that never occur together, as in "white tiger" "lion hat"; '
             f"unseen stands for {', '.join(UNSEEN)}")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    if args.captions and not args.out:
        parser.error("--captions needs a folder: give --out FOLDER")
    if args.without and not args.captions:
        parser.error("--without needs --captions: other images have no attributes to keep apart")
    out = args.out or Path(__file__).resolve().parent
    total = args.count if args.captions else args.count * len(COATS)
    try:
        if args.captions:
            draw_captioned(out, args.count, args.seed, combinations(args.without))
        else:
            draw_classes(out, args.count, args.seed)
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"cannot write to {out}: {problem.strerror or problem}")
    print(f"wrote {total} images to {out}")


if __name__ == "__main__":
    main()
