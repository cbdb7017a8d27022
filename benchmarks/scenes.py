"""The tiny world as data: dialogues to train on, questions to test on, with the evidence for each answer."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from tiny import scenes

FAMILIES = scenes.FAMILIES
# sizes of the pictures that a family is asked about: the tiny VLMs take them as they are, as 144 units each. Where the
# vision encoder's resolution is fixed they are square, for whatever else would be cut or padded; at native resolution
# there are other shapes too. The last of Qwen's the tiny VLM has not been trained on; it is in the test only.
SIZES = defaultdict(lambda: ((144, 144),), qwen2_5_vl=((144, 144), (192, 108), (108, 192), (96, 216)))


class Dialogues(torch.utils.data.Dataset):
    """Training: item i is (picture, turns) of scene `seed * 10**7 + i`; a caption, then a few questions.

    A function of (seed, i) alone, so a resumed run sees what an unbroken one would have seen. Scenes of a seed
    are never shown twice. Seeds leave the scenes alone that the tiny VLMs were trained on.
    """

    def __init__(self, start: int, stop: int, seed: int = 0, turns: int = 5, sizes=((144, 144),)):
        if not 0 <= seed < 99 or stop > 10**7:
            raise ValueError(f"seed={seed}, stop={stop}: expected a seed from 0 to 98 and at most 10**7 scenes; beyond "
                             "lie the scenes of other seeds and of the test")
        self.first, self.range, self.turns, self.sizes = (seed + 1) * 10**7, range(start, stop), turns, sizes

    def __len__(self):
        return len(self.range)

    def __getitem__(self, i):
        number = self.first + self.range[i]
        scene = scenes.make_scene(scenes.SPLITS["train"] + number, self.sizes[number % len(self.sizes)])
        asked = scenes.questions(scene, np.random.default_rng([number, 11]))[:self.turns]
        return scenes.render(scene), [(scenes.CAPTION, scenes.caption(scene)),
                                      *((q.question, q.answer) for q in asked)]


@dataclass
class Row:
    """One scene with its questions; evidence[q] is (rows*columns,) the share of each token that shows the answer."""
    id: int
    image: Image.Image
    questions: list[scenes.Question]
    scene: scenes.Scene

    def evidence(self, question: scenes.Question, grid: tuple[int, int]) -> torch.Tensor:
        cover = scenes.coverage(self.scene, *grid)[question.evidence]
        return torch.from_numpy(cover.max(0)) if len(cover) else torch.zeros(grid[0] * grid[1])


def load(n: int, split: str = "test", sizes=((144, 144),)) -> list[Row]:
    """The first scenes of a split, until they hold at least n questions (one of each family a scene can answer)."""
    rows, total, first = [], 0, scenes.SPLITS[split]
    while total < n:
        i = len(rows)
        scene = scenes.make_scene(first + i, sizes[i % len(sizes)])
        asked = scenes.questions(scene, np.random.default_rng([first + i, 13]))
        rows.append(Row(first + i, scenes.render(scene), asked, scene))
        total += len(asked)
    return rows


def score(answer: str, gold: str) -> float:
    """1 for the same words, else 0. Answers are one to three words of a closed vocabulary."""
    return float(answer.lower().split() == gold.lower().split())
