"""A small world of scenes: the images, questions and answers that WhichTokens trains and tests on
by default.

A scene is a pure function of its seed: a textured, cluttered background, one to seven shapes (8
kinds x 8 colours, none overlapping) and up to two signs that carry three letters. Because the world
is ours, we know for every question which pixels are its evidence, hence which visual tokens a
selector ought to keep.

    scene = make_scene(seed)                  objects and their boxes, no pixels yet
    image = render(scene)                     a PIL picture; same seed, same bytes
    for q in questions(scene, rng): ...       family, question, answer, objects of the evidence
    coverage(scene, rows, columns)            (objects, rows*columns) share of each cell covered

Splits are disjoint ranges of seeds, see SPLITS. Letters of a sign stand on the 12-pixel lattice
(one letter per visual token, give or take a pixel): a 144-pixel picture holds little text, and
reading it must be learnable.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ["circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart"]
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 25),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
LETTERS = "BCDEFHJKLMNPRTUVWXYZ"  # no A, G, I, O, Q, S: confusable, or an article
ROWS, COLUMNS = ["top", "middle", "bottom"], ["left", "centre", "right"]
FAMILIES = ["exist", "colour", "shape", "count", "where", "relation", "text"]
SPLITS = {
    "train": 0,
    "calibration": 1_000_000_000,
    "test": 2_000_000_000,
    "crowded": 4_000_000_000,
}  # first seed of each split; crowded: two signs, and small shapes while there is room
CELL = 12  # pixels of a visual token
MOST = 7  # shapes of a scene
CAPTION = "describe the scene ."
FONT = ImageFont.load_default(size=14)  # the font that ships with Pillow: same bytes everywhere


@dataclass
class Thing:
    """A shape or a sign. box is (left, top, right, bottom) in pixels; text is set for signs
    only."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]
    text: str = ""

    @property
    def centre(self):
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self):
        return f"{self.colour} {self.kind}"


@dataclass
class Scene:
    seed: int
    size: tuple[int, int]  # width, height in pixels
    things: list[Thing] = field(default_factory=list)

    @property
    def shapes(self):
        return [t for t in self.things if not t.text]

    @property
    def signs(self):
        return [t for t in self.things if t.text]

    def cell(self, thing):
        """The thing's cell in the 3x3 grid, in words: row, column."""
        (x, y), (w, h) = thing.centre, self.size
        return f"{ROWS[min(int(3 * y / h), 2)]} {COLUMNS[min(int(3 * x / w), 2)]}"


@dataclass
class Question:
    family: str
    question: str
    answer: str
    evidence: list[int]  # indices into scene.things


# -----------------------------------------------------------------------------------------------
# the scene


def make_scene(seed: int, size: tuple[int, int] = (144, 144)) -> Scene:
    """Place the things of scene `seed`. size: (width, height), multiples of 12 of at least 96
    pixels.

    A colour-and-kind pair appears once in most scenes; repeats are drawn on purpose, so that
    counting is needed. Raises ValueError for a size that the letters' lattice does not fit.
    """
    if any(side % CELL or side < 96 for side in size):
        raise ValueError(
            f"size={size}: both sides must be multiples of {CELL} of at least 96 pixels"
        )
    rng = np.random.default_rng([seed, *size])
    scene, (w, h) = Scene(seed, size), size
    is_crowded = seed >= SPLITS["crowded"]
    sign_colours = rng.permutation(list(COLOURS))
    for i in range(2 if is_crowded else rng.choice(3, p=[0.3, 0.4, 0.3])):
        left = CELL * int(rng.integers(0, w // CELL - 4)) + CELL // 2
        top = CELL * int(rng.integers(0, h // CELL - 1)) + int(rng.integers(-1, 2))
        box = (left, top - 3, left + 4 * CELL, top + CELL + 3)
        if _free(box, scene):
            text = "".join(rng.choice(list(LETTERS), 3, replace=True))
            scene.things.append(Thing("sign", str(sign_colours[i]), box, text))
    few_kinds, few_colours = (
        rng.choice(SHAPES, 2, replace=False),
        rng.choice(list(COLOURS), 2, replace=False),
    )
    repetitive = rng.random() < 0.5  # half of the scenes draw from few kinds and colours
    for _ in range(MOST if is_crowded else rng.integers(1, MOST + 1)):
        kind = rng.choice(few_kinds if repetitive and rng.random() < 0.6 else SHAPES)
        colour = rng.choice(few_colours if repetitive and rng.random() < 0.6 else list(COLOURS))
        sides = rng.integers([34, 26, 20, 18], [46, 36, 28, 21])  # smaller if there is no room
        for side in sides[3:] if is_crowded else sides:
            x, y = rng.integers(1, w - side), rng.integers(1, h - side)
            box = (int(x), int(y), int(x + side), int(y + side))
            if _free(box, scene):
                scene.things.append(Thing(str(kind), str(colour), box))
                break
    if not scene.shapes:  # two signs rarely leave no room: then drop the signs
        side = int(rng.integers(18, 40))
        x, y = int(rng.integers(1, w - side)), int(rng.integers(1, h - side))
        scene.things = [Thing(str(kind), str(colour), (x, y, x + side, y + side))]
    scene.things.sort(
        key=lambda t: (t.centre[1] // (h / 3), t.centre[0])
    )  # reading order, as captions go
    return scene


def _free(box, scene, gap=3):
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= scene.size[0] and box[3] <= scene.size[1]
    return inside and all(
        box[2] + gap <= t.box[0]
        or t.box[2] + gap <= box[0]
        or box[3] + gap <= t.box[1]
        or t.box[3] + gap <= box[1]
        for t in scene.things
    )


# ----------------------------------------------------------------------------------------------
# the pixels


def render(scene: Scene) -> Image.Image:
    """Draw the scene: background and clutter, then the things at twice the size, scaled down for
    smooth edges."""
    rng = np.random.default_rng([scene.seed, *scene.size, 1])
    (w, h), s = scene.size, 2
    base = rng.uniform(80, 180) + rng.normal(0, 16, 3)  # greyish, so that colours stay nameable
    coarse = base + rng.normal(0, 20, (int(rng.integers(3, 13)), int(rng.integers(3, 13)), 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(
        (w * s, h * s), Image.BICUBIC
    )
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 16)):  # clutter: thin lines and specks in muted colours
        tint = tuple(int(c) for c in rng.uniform(60, 200, 3))
        x, y = rng.integers(0, w * s), rng.integers(0, h * s)
        if rng.random() < 0.5:
            dx, dy = rng.integers(-60, 61, 2)
            draw.line((x, y, x + dx, y + dy), fill=tint, width=int(rng.integers(1, 4)))
        else:
            r = int(rng.integers(1, 5))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=tint)
    for thing in scene.shapes:
        _draw_shape(draw, thing, s, _jitter(COLOURS[thing.colour], rng))
    image = image.resize((w, h), Image.BOX)
    draw = ImageDraw.Draw(image)
    for sign in scene.signs:
        fill = _jitter(COLOURS[sign.colour], rng)
        ink = (0, 0, 0) if sum(fill) > 330 else (255, 255, 255)
        draw.rectangle(
            (sign.box[0], sign.box[1], sign.box[2] - 1, sign.box[3] - 1), fill=fill, outline=ink
        )
        for i in range(3):
            x0, y0, x1, y1 = letter_box(sign, i)
            draw.text(
                ((x0 + x1) / 2, (y0 + y1) / 2), sign.text[i], font=FONT, fill=ink, anchor="mm"
            )
    pixels = np.asarray(image, np.float32) + rng.normal(0, 4, (h, w, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def letter_box(sign: Thing, i: int) -> tuple[int, int, int, int]:
    """The pixels of the i-th letter of a sign: one cell of the lattice, up to one pixel off
    vertically."""
    left, top = sign.box[0] + CELL // 2 + CELL * i, sign.box[1] + 3
    return left, top, left + CELL, top + CELL


def _jitter(colour, rng):
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.normal(0, 9, 3), 0, 255))


def _draw_shape(draw, thing, s, fill):
    x0, y0, x1, y1 = (s * c for c in thing.box)
    side, cx, cy = x1 - x0, (x0 + x1) / 2, (y0 + y1) / 2
    r = side / 2
    box, at = (x0, y0, x1 - 1, y1 - 1), lambda *p: [(x0 + side * u, y0 + side * v) for u, v in p]
    match thing.kind:
        case "circle":
            draw.ellipse(box, fill=fill)
        case "square":
            draw.rectangle(box, fill=fill)
        case "ring":
            draw.ellipse(box, outline=fill, width=max(int(side * 0.22), 3))
        case "triangle":
            draw.polygon(at((0.5, 0), (1, 1), (0, 1)), fill=fill)
        case "diamond":
            draw.polygon(at((0.5, 0), (0.95, 0.5), (0.5, 1), (0.05, 0.5)), fill=fill)
        case "cross":
            draw.polygon(
                at(
                    (0.33, 0),
                    (0.67, 0),
                    (0.67, 0.33),
                    (1, 0.33),
                    (1, 0.67),
                    (0.67, 0.67),
                    (0.67, 1),
                    (0.33, 1),
                    (0.33, 0.67),
                    (0, 0.67),
                    (0, 0.33),
                    (0.33, 0.33),
                ),
                fill=fill,
            )
        case "star":
            spokes = [(r if i % 2 == 0 else 0.42 * r, math.pi * (i / 5 - 0.5)) for i in range(10)]
            draw.polygon(
                [(cx + q * math.cos(t), cy + q * math.sin(t)) for q, t in spokes], fill=fill
            )
        case "heart":
            draw.ellipse((x0, y0, cx + side * 0.04, y0 + side * 0.56), fill=fill)
            draw.ellipse((cx - side * 0.04, y0, x1, y0 + side * 0.56), fill=fill)
            draw.polygon(at((0.035, 0.4), (0.965, 0.4), (0.5, 1)), fill=fill)


# ------------------------------------------------------------------------------------- questions
# and answers


def caption(scene: Scene) -> str:
    """Everything in the scene, in reading order: "a red circle top left , a blue sign bottom
    right k t x ."."""
    parts = [
        f"a {t.name} {scene.cell(t)}" + (" " + " ".join(t.text.lower()) if t.text else "")
        for t in scene.things
    ]
    return " , ".join(parts) + " ."


def questions(
    scene: Scene, rng: np.random.Generator, families=FAMILIES, each: int = 1
) -> list[Question]:
    """Up to `each` questions of every family that this scene can answer, in a random order."""
    made = [ASK[f](scene, rng) for f in families for _ in range(each)]
    unique = {q.question: q for q in made if q}
    return [list(unique.values())[i] for i in rng.permutation(len(unique))]


def _pick(rng, items):
    return items[int(rng.integers(len(items)))] if items else None


def _index(scene, test):
    return [i for i, t in enumerate(scene.things) if not t.text and test(t)]


def _unique_names(scene):
    names = [t.name for t in scene.shapes]
    return [t for t in scene.shapes if names.count(t.name) == 1]


def ask_exist(scene, rng):
    """Half yes; three of four noes are hard: kind and colour both stand in the scene, but never
    together."""
    if rng.random() < 0.5:
        name = _pick(rng, scene.shapes).name
    else:
        names, kinds, colours = {t.name for t in scene.shapes}, SHAPES, list(COLOURS)
        if rng.random() < 0.75:
            kinds, colours = (
                sorted({t.kind for t in scene.shapes}),
                sorted({t.colour for t in scene.shapes}),
            )
        name = _pick(rng, [f"{c} {k}" for c in colours for k in kinds if f"{c} {k}" not in names])
        if name is None:  # no hard negative here: any name that is not there
            name = _pick(
                rng, [f"{c} {k}" for c in COLOURS for k in SHAPES if f"{c} {k}" not in names]
            )
    found = _index(scene, lambda t: t.name == name)
    colour, kind = name.split()
    near = _index(
        scene, lambda t: t.kind == kind or t.colour == colour
    )  # what a no has to be checked against
    return Question("exist", f"is there a {name} ?", "yes" if found else "no", found or near)


def ask_colour(scene, rng):
    kinds = [t.kind for t in scene.shapes]
    thing = _pick(rng, [t for t in scene.shapes if kinds.count(t.kind) == 1])
    return thing and Question(
        "colour", f"what colour is the {thing.kind} ?", thing.colour, [scene.things.index(thing)]
    )


def ask_shape(scene, rng):
    colours = [t.colour for t in scene.shapes]
    thing = _pick(rng, [t for t in scene.shapes if colours.count(t.colour) == 1])
    return thing and Question(
        "shape",
        f"what shape is the {thing.colour} thing ?",
        thing.kind,
        [scene.things.index(thing)],
    )


def ask_count(scene, rng):
    """How many things there are, how many of a kind, how many of a colour; never zero."""
    mode, thing = rng.integers(3), _pick(rng, scene.shapes)
    what, test = [
        ("shapes", lambda t: True),
        (f"{thing.kind} shapes", lambda t: t.kind == thing.kind),
        (f"{thing.colour} shapes", lambda t: t.colour == thing.colour),
    ][mode]
    found = _index(scene, test)
    return Question("count", f"how many {what} are there ?", str(len(found)), found)


def ask_where(scene, rng):
    thing = _pick(rng, _unique_names(scene))
    return thing and Question(
        "where", f"where is the {thing.name} ?", scene.cell(thing), [scene.things.index(thing)]
    )


def ask_relation(scene, rng):
    """Only of pairs that stand at least 18 pixels apart along the asked axis."""
    things, axis = _unique_names(scene), int(rng.integers(2))
    pairs = [(a, b) for a in things for b in things if abs(a.centre[axis] - b.centre[axis]) >= 18]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    answer = "yes" if a.centre[axis] < b.centre[axis] else "no"
    return Question(
        "relation",
        f"is the {a.name} {['left of', 'above'][axis]} the {b.name} ?",
        answer,
        sorted([scene.things.index(a), scene.things.index(b)]),
    )


def ask_text(scene, rng):
    sign = _pick(rng, scene.signs)
    return sign and Question(
        "text",
        f"what does the {sign.colour} sign say ?",
        " ".join(sign.text.lower()),
        [scene.things.index(sign)],
    )


ASK = {
    "exist": ask_exist,
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "where": ask_where,
    "relation": ask_relation,
    "text": ask_text,
}


# ------------------------------------------------------------------------------------------------
# evidence


def coverage(scene: Scene, rows: int, columns: int) -> np.ndarray:
    """Share of each cell of a (rows, columns) grid that each thing's box covers: (things,
    rows*columns), 0..1.

    A sign counts with its letters alone: its rim says nothing that is ever asked.
    """
    (w, h), out = scene.size, np.zeros((len(scene.things), rows, columns), np.float32)
    ys, xs = np.arange(rows + 1) * h / rows, np.arange(columns + 1) * w / columns
    for i, thing in enumerate(scene.things):
        boxes = [letter_box(thing, j) for j in range(3)] if thing.text else [thing.box]
        for x0, y0, x1, y1 in boxes:
            dx = (np.minimum(xs[1:], x1) - np.maximum(xs[:-1], x0)).clip(0) * columns / w
            dy = (np.minimum(ys[1:], y1) - np.maximum(ys[:-1], y0)).clip(0) * rows / h
            out[i] += dy[:, None] * dx[None]
    return out.reshape(len(scene.things), -1)


def vocabulary() -> list[str]:
    """Every word that questions, answers and captions use, in a fixed order."""
    words = (
        "yes no is there a what colour shape the thing how many shapes are "
        "where left of above does sign say "
        "describe scene top middle bottom centre right , . ?"
    ).split()
    return [*dict.fromkeys([*words, *SHAPES, *COLOURS, *"0123456789", *LETTERS.lower()])]
