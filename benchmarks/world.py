"""The tiny world as one more benchmark: its test questions, whose answers are one to three words."""

import numpy as np

from benchmarks import scenes
from benchmarks.questions import Question

NAME, MAIN = "tiny world", "average"


def load(path=None, split: str | None = None, family: str = "llava", n: int = 1000) -> list[Question]:
    """At least n questions about square scenes, 144 x 144 pixels, of the split "test" [default] or "calibration".
    Nothing is read: a path is refused. family: the prompt is the same for all."""
    if path is not None:
        raise ValueError(f"scenes={path}: the tiny world is drawn, not read; leave its folder away")
    return [Question(f"{row.id}-{i}", lambda row=row: [row.image], q.question,
                     {"family": q.family, "answer": q.answer}, 4)
            for row in scenes.load(n, split or "test") for i, q in enumerate(row.questions)]


def score(rows: list[dict]) -> dict:
    """Accuracy per family and their mean, 0..100. unmatched: answers with a word that no answer of the world has."""
    words = set(scenes.scenes.vocabulary())
    right = {f: [100 * scenes.score(row["answer"], row["gold"]["answer"]) for row in rows if row["gold"]["family"] == f]
             for f in scenes.FAMILIES}
    each = {f: float(np.mean(x)) for f, x in right.items() if x}
    return {"average": float(np.mean(list(each.values()))) if each else 0., **each, "n": len(rows),
            "unmatched": sum(not row["answer"] or not set(row["answer"].lower().split()) <= words for row in rows)}
