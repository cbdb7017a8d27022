"""NExT-QA, multiple choice: why and when in short videos. Xiao et al., arXiv:2105.08276;
lmms-eval's rules."""

from functools import partial

from benchmarks.frames import FRAMES, clips, opened
from benchmarks.multiple_choice import (
    accuracy,
    by_letter,
    letter_of,
    listed,
    read_mmmu,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "NExT-QA"
MAIN = "accuracy"
HUBS = ("lmms-eval/NExTQA", "lmms-lab/NExTQA")
CONFIG = "MC"
SPLIT = "test"
COLUMNS = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")
KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def load(path=None, split=None, family="llava", videos=None, frames=FRAMES) -> list[Question]:
    """The rows of test [paper]. videos: the folder of folders of frames, see clips(); frames: so
    many of each.

    Raises as table() and clips() do; ValueError for an answer that is none of the options.
    """
    rows = table(HUBS, path, CONFIG, split or SPLIT, COLUMNS)
    folders = clips(map(str, rows["video"]), videos, path)
    return [question(row, opened(folders[str(row["video"])], frames), family) for row in rows]


def question(row, images, family) -> Question:
    name = f"{row['video']}_{row['qid']}"
    options = [row[f"a{k}"].strip() for k in range(5)]
    gold = {"answer": letter_of(row["answer"], options, f"{NAME} {name}"), "options": options,
            "kind": KINDS.get(row["type"][:1], row["type"])}
    # lmms-eval asks for no letter; nor does it limit the answer, which may be a sentence [ours]
    prompt = row["question"].strip() + listed(options)
    return Question(name, images, prompt, gold, most_tokens(32, family))


def score(rows) -> dict[str, float | int]:
    """accuracy, and that of causal, temporal and descriptive questions."""
    return accuracy(rows, by_letter(partial(read_mmmu, loose=True)), "kind")
