"""ScienceQA-IMG: the 2,017 test questions that have a picture. Lu et al., arXiv:2209.09513; rules
of LLaVA."""

import re

from benchmarks.multiple_choice import (
    ALPHABET,
    LETTER,
    accuracy,
    by_letter,
    is_empty,
    letter_of,
    listed,
    pictures_of,
    without_pictures,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "ScienceQA-IMG"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA")
CONFIG = "ScienceQA-IMG"
SPLIT = "test"
COLUMNS = ("question", "choices", "answer", "hint", "image")


def load(path=None, split=None, family="llava") -> list[Question]:
    """The rows of test [paper]; their numbers are the ids, for the set has none. Raises as table()
    does."""
    data = table(HUBS, path, CONFIG, split or SPLIT, COLUMNS)
    return [question(i, row, data, family)
            for i, row in enumerate(without_pictures(data, "image"))]


def question(i, row, data, family) -> Question:
    options = row["choices"]
    gold = {"answer": letter_of(row["answer"], options, f"{NAME} row {i}"), "options": options}
    return Question(str(i), pictures_of(data, i, "image"), prompt(row), gold,
                    most_tokens(16, family))


def prompt(row) -> str:
    context = "" if is_empty(row["hint"]) else f"Context: {row['hint']}\n"
    return context + row["question"] + listed(row["choices"]) + LETTER


def parse(answer: str, options) -> str | None:
    """A letter alone, or followed by '. ' at the start, or in the only 'The answer is X.': of A to
    E, and an option's.

    Behind X any character will do, as LLaVA's pattern has it, but not the end.
    """
    answer = answer.strip()
    letter = None
    if answer in tuple("ABCDE"):
        letter = answer
    elif re.match(r"[A-E]\. ", answer):
        letter = answer[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", answer)
        letter = named[0] if len(named) == 1 else None
    return letter if letter and letter in ALPHABET[:min(len(options), 5)] else None


def score(rows) -> dict[str, float | int]:
    return accuracy(rows, by_letter(parse))
