"""AI2D: diagrams from school books, labels masked by letters. Kembhavi et al., arXiv:1603.07396;
lmms-eval's rules."""

import re
import string

from benchmarks.multiple_choice import (
    ALPHABET,
    LETTER,
    accuracy,
    by_letter,
    letter_of,
    listed,
    pictures_of,
    without_pictures,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "AI2D"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/ai2d", "lmms-lab/ai2d")
SPLIT = "test"
COLUMNS = ("question", "options", "answer", "image")


def load(path=None, split=None, family="llava") -> list[Question]:
    """The rows of test [paper]; their numbers are the ids, for the set has none. Raises as table()
    does."""
    data = table(HUBS, path, None, split or SPLIT, COLUMNS)
    return [question(i, row, data, family)
            for i, row in enumerate(without_pictures(data, "image"))]


def question(i, row, data, family) -> Question:
    options = row["options"]
    gold = {"answer": letter_of(row["answer"], options, f"{NAME} row {i}"), "options": options}
    prompt = row["question"] + listed(options) + LETTER
    return Question(str(i), pictures_of(data, i, "image"), prompt, gold, most_tokens(16, family))


def parse(answer: str, options) -> str | None:
    """The capital at the start that a period follows, else all of the answer but its punctuation,
    in either case."""
    start = re.match(r"\s*([A-Z])\.", answer)
    if start:
        letter = start[1]
    else:
        letter = answer.translate(dict.fromkeys(map(ord, string.punctuation))).strip().upper()
    return letter if letter in tuple(ALPHABET[:len(options)]) else None


def score(rows) -> dict[str, float | int]:
    return accuracy(rows, by_letter(parse))
