"""The tiny world as training data: scenes with a caption and questions that a few things answer."""

from collections import defaultdict

import numpy as np
from torch.utils.data import Dataset

from tiny import scenes

SEED_SPAN = 10**7                     # scenes of one seed

# Sizes of the pictures that a family is asked about: the tiny VLMs take them as they are, as 144
# units each. Where the vision encoder's resolution is fixed they are square, for whatever else
# would be cut or padded; at native resolution there are other shapes too. The last of Qwen's the
# tiny VLM has not been trained on; it is in the test only.
SIZES = defaultdict(lambda: ((144, 144),),
                    qwen2_5_vl=((144, 144), (192, 108), (108, 192), (96, 216)))


def training_sizes(family: str) -> tuple[tuple[int, int], ...]:
    """The sizes (width, height) that a selector of this family trains on."""
    return SIZES[family][:3]


class Dialogues(Dataset):
    """Item i is (picture, turns) of scene (seed + 1) * 10**7 + i.

    turns: [(question, answer), ...], the caption, then at most `questions`.
    A function of (seed, i) alone, so a resumed run sees what an unbroken one would have seen.
    Scenes of a seed are never shown twice, and none of them is among those that the tiny VLMs were
    trained on.
    Raises ValueError for a seed, or a number of scenes, that reaches into the scenes of others.
    """

    def __init__(self, start: int, stop: int, seed: int = 0, questions: int = 5,
                 sizes=((144, 144),)):
        if not 0 <= seed < 99 or stop > SEED_SPAN:
            raise ValueError(f"seed={seed}, stop={stop}: expected a seed from 0 to 98 and at most "
                             "10**7 scenes; beyond lie the scenes of other seeds and of the test")
        self.first = (seed + 1) * SEED_SPAN
        self.range = range(start, stop)
        self.questions = questions
        self.sizes = sizes

    def __len__(self):
        return len(self.range)

    def __getitem__(self, i):
        number = self.first + self.range[i]
        size = self.sizes[number % len(self.sizes)]
        scene = scenes.make_scene(scenes.SPLITS["train"] + number, size)
        # 11 tells these questions from those of the test, which are drawn of [number, 13]
        asked = scenes.questions(scene, np.random.default_rng([number, 11]))[:self.questions]
        turns = [(question.question, question.answer) for question in asked]
        return scenes.render(scene), [(scenes.CAPTION, scenes.caption(scene)), *turns]
