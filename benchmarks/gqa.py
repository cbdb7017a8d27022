"""GQA (arXiv:1902.09506), testdev_balanced: 12,578 questions about 398 pictures, exact match."""

import string

from benchmarks.questions import most_tokens, table
from benchmarks.short_answers import SHORT, Questions, column, picture_of, report

NAME = "GQA"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
QUESTIONS = "testdev_balanced_instructions"
PICTURES = "testdev_balanced_images"
SPLIT = "testdev"


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; path: a folder with one folder for the questions and one
    for the pictures, named as on the hub. Raises as table() does, ValueError for a picture that is
    missing or an id that comes twice."""
    split = split or SPLIT
    data = table(HUBS, path, QUESTIONS, split, ("id", "imageId", "question", "answer"))
    pictures = table(HUBS, path, PICTURES, split, ("id", "image"))
    # joined by name: datasets.map would encode each picture anew
    place = {name: i for i, name in enumerate(column(pictures, "id"))}
    wanted = column(data, "imageId")
    missing = [name for name in dict.fromkeys(wanted) if name not in place]
    if missing:
        raise ValueError(f"{PICTURES} lacks {len(missing)} pictures that questions are about, such "
                         f"as {missing[0]!r}: expected both tables of the same split")
    return Questions(data, column(data, "id"),
                     lambda row: (prompt(row), {"answer": row["answer"]}), most_tokens(16, family),
                     lambda i: [picture_of(pictures, place[wanted[i]])])


def score(rows: list[dict], lenient: bool = False) -> dict:
    """accuracy in percent: equal when stripped, without final periods, in lower case (LLaVA's
    converter, then GQA's own comparison). lenient: case and all punctuation of both sides do not
    count, as in lmms-eval. Raises as report()."""
    def loose(text):
        return text.lower().translate(str.maketrans("", "", string.punctuation))

    def is_same(answer, right):
        if lenient:
            return loose(answer.strip()) == loose(right)
        return answer.strip().rstrip(".").lower() == right
    return report(rows, is_same, MAIN)
