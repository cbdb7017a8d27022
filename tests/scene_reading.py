"""A second reading of the tiny world's ground truth, which shares no code with the world."""

import re

from tiny.scenes import COLOURS, SHAPES


def third(twice_centre, side):
    """0, 1, 2: the third of the side that the centre lies in."""
    return (3 * twice_centre >= 2 * side) + (3 * twice_centre >= 4 * side)


def cell_words(scene, thing):
    x0, y0, x1, y1 = thing.box
    return (
        f"{['top', 'middle', 'bottom'][third(y0 + y1, scene.size[1])]} "
        f"{['left', 'centre', 'right'][third(x0 + x1, scene.size[0])]}"
    )


def read(scene, text):
    """(family, answer, evidence) of a question's words, from kind, colour, box and text of the
    things alone."""
    shapes = {i: t for i, t in enumerate(scene.things) if t.kind != "sign"}

    def find(colour=None, kind=None):
        return [
            i for i, t in shapes.items() if colour in (None, t.colour) and kind in (None, t.kind)
        ]

    def one(**what):
        found = find(**what)
        assert len(found) == 1, f"{text!r} has {len(found)} referents in scene {scene.seed}"
        return found[0]

    if m := re.fullmatch(r"is there a (\w+) (\w+) \?", text):
        found = find(*m.groups())
        return (
            "exist",
            "yes" if found else "no",
            found or sorted({*find(colour=m[1]), *find(kind=m[2])}),
        )
    if m := re.fullmatch(r"what colour is the (\w+) \?", text):
        return "colour", scene.things[one(kind=m[1])].colour, [one(kind=m[1])]
    if m := re.fullmatch(r"what shape is the (\w+) thing \?", text):
        return "shape", scene.things[one(colour=m[1])].kind, [one(colour=m[1])]
    if m := re.fullmatch(r"how many (?:(\w+) )?shapes are there \?", text):
        assert m[1] is None or (m[1] in COLOURS) != (m[1] in SHAPES)
        found = find(**{} if m[1] is None else {"colour" if m[1] in COLOURS else "kind": m[1]})
        return "count", "0123456789"[len(found)], found
    if m := re.fullmatch(r"where is the (\w+) (\w+) \?", text):
        i = one(colour=m[1], kind=m[2])
        return "where", cell_words(scene, scene.things[i]), [i]
    if m := re.fullmatch(r"is the (\w+) (\w+) (left of|above) the (\w+) (\w+) \?", text):
        a, b = one(colour=m[1], kind=m[2]), one(colour=m[4], kind=m[5])
        axis = 0 if m[3] == "left of" else 1
        apart = sum(scene.things[b].box[axis::2]) - sum(scene.things[a].box[axis::2])
        assert a != b and abs(apart) >= 2 * 18, "too close to call"
        return "relation", "yes" if apart > 0 else "no", sorted([a, b])
    if m := re.fullmatch(r"what does the (\w+) sign say \?", text):
        [i] = [i for i, t in enumerate(scene.things) if t.kind == "sign" and t.colour == m[1]]
        return "text", " ".join(scene.things[i].text).lower(), [i]
    raise AssertionError(f"no such question: {text!r}")
