"""The tiny world as one more benchmark: made-up scenes whose answers are one to three words.

It shows the mechanism, in minutes on a laptop. Its figures are not the papers' ones.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from benchmarks.questions import Question
from data.dialogues import SIZES
from tiny import scenes

NAME = "tiny world"
MAIN = "average"
NOTE = "The tiny world shows the mechanism; these are not the papers' numbers."
LIMIT = 4                             # new tokens; the longest answers have three words


@dataclass
class Row:
    """One scene with its picture and questions."""
    id: int
    image: Image.Image
    questions: list[scenes.Question]
    scene: scenes.Scene

    def evidence(self, question: scenes.Question, grid: tuple[int, int]) -> torch.Tensor:
        """(rows * columns,) share of each unit of the grid that shows the question's answer, 0..1;
        0 everywhere where nothing in the scene bears on it."""
        cover = scenes.coverage(self.scene, *grid)[question.evidence]
        return torch.from_numpy(cover.max(0)) if len(cover) else torch.zeros(grid[0] * grid[1])


def load_rows(n: int, split: str = "test", sizes=((144, 144),)) -> list[Row]:
    """The first scenes of a split, until they hold at least n questions: one of each family that a
    scene can answer. sizes: (width, height) of the pictures, in turn."""
    rows = []
    total = 0
    while total < n:
        number = scenes.SPLITS[split] + len(rows)
        scene = scenes.make_scene(number, sizes[len(rows) % len(sizes)])
        # 13 tells these questions from those of the training, which are drawn of [number, 11]
        questions = scenes.questions(scene, np.random.default_rng([number, 13]))
        rows.append(Row(number, scenes.render(scene), questions, scene))
        total += len(questions)
    return rows


def load(path=None, split: str | None = None, family: str = "llava", n: int = 1000
         ) -> list[Question]:
    """At least n questions about the scenes of the split "test" [default] or "calibration".

    family: pictures have the shapes that its VLM can take, see data/dialogues.py.
    Nothing is read: raises ValueError for a path.
    """
    if path is not None:
        raise ValueError(f"tiny_world={path}: the tiny world is drawn, not read; leave its folder "
                         "away")
    return [question_of(row, number, question)
            for row in load_rows(n, split or "test", SIZES[family])
            for number, question in enumerate(row.questions)]


def question_of(row: Row, number: int, question: scenes.Question) -> Question:
    gold = {"family": question.family, "answer": question.answer, "things": len(row.scene.things)}
    return Question(f"{row.id}-{number}", lambda: [row.image], question.question, gold, LIMIT,
                    partial(row.evidence, question))


def is_right(answer: str, gold: str) -> float:
    """1 for the same words, else 0."""
    return float(answer.lower().split() == gold.lower().split())


def score(rows: list[dict]) -> dict:
    """Accuracy per family of questions and their mean, 0..100. unmatched: answers with a word that
    no answer of the world has."""
    words = set(scenes.vocabulary())
    unmatched = sum(not row["answer"] or not set(row["answer"].lower().split()) <= words
                    for row in rows)
    counts = Counter(cell(row) for row in rows)
    return {**from_counts(counts), "n": len(rows), "unmatched": unmatched}


def cell(row: dict) -> tuple[str, bool]:
    """(family, is the answer right)."""
    return row["gold"]["family"], bool(is_right(row["answer"], row["gold"]["answer"]))


def from_counts(counts: Counter) -> dict:
    """The score of so many rows of each cell()."""
    families = {}
    for family in scenes.FAMILIES:
        n = counts[family, True] + counts[family, False]
        if n:
            families[family] = 100 * counts[family, True] / n
    return {"average": float(np.mean(list(families.values()))) if families else 0., **families}
