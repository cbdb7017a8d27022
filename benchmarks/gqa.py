"""GQA (arXiv:1902.09506), testdev_balanced: 12,578 questions about 398 pictures, exact match."""

import string

from benchmarks.questions import table
from benchmarks.vqa import SHORT, Questions, column, most_tokens, report, shown

NAME, MAIN = "GQA", "accuracy"
HUBS = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
QUESTIONS, PICTURES, SPLIT = "testdev_balanced_instructions", "testdev_balanced_images", "testdev"


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; path: a folder with one folder for the questions and one for the pictures,
    named as on the hub. Raises as table() does, ValueError for a picture that is missing or an id that comes twice."""
    data = table(HUBS, path, QUESTIONS, split or SPLIT, ("id", "imageId", "question", "answer"))
    pictures = table(HUBS, path, PICTURES, split or SPLIT, ("id", "image"))
    place = {name: i for i, name in enumerate(column(pictures, "id"))}
    asked = column(data, "imageId")                    # joined by name: datasets.map would encode each picture anew
    if missing := [name for name in dict.fromkeys(asked) if name not in place]:
        raise ValueError(f"{PICTURES} lacks {len(missing)} pictures that questions are about, such as "
                         f"{missing[0]!r}: expected both tables of the same split")
    return Questions(data, column(data, "id"), lambda row: (prompt(row), {"answer": row["answer"]}),
                     most_tokens(family, 16), lambda i: [shown(pictures, place[asked[i]])])


def score(rows: list[dict], lenient: bool = False) -> dict:
    """accuracy in percent: equal when stripped, without final periods, in lower case (LLaVA's converter, then GQA's own
    comparison). lenient: case and all punctuation of both sides do not count, as in lmms-eval. Raises as report()."""
    def loose(text):
        return text.lower().translate(str.maketrans("", "", string.punctuation))

    def same(answer, right):
        return loose(answer.strip()) == loose(right) if lenient else answer.strip().rstrip(".").lower() == right
    return report(rows, same, MAIN)
