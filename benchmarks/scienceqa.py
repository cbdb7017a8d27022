"""ScienceQA-IMG: the 2,017 test questions that have a picture. Lu et al., arXiv:2209.09513; rules of LLaVA."""

import re

from benchmarks.letters import ALPHABET, LETTER, accuracy, by_letter, empty, letter_of, limit, listed, shown, texts
from benchmarks.questions import Question, table

NAME, MAIN = "ScienceQA-IMG", "accuracy"
HUBS, CONFIG = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA"), "ScienceQA-IMG"
COLUMNS = ("question", "choices", "answer", "hint", "image")


def load(path=None, split=None, family="llava") -> list[Question]:
    """The rows of test [paper]; their numbers are the ids, for the set has none. Raises as table() does."""
    data = table(HUBS, path, CONFIG, split or "test", COLUMNS)
    return [Question(str(i), shown(data, i, "image"), prompt(row), {
        "answer": letter_of(row["answer"], row["choices"], f"{NAME} row {i}"), "options": row["choices"]},
        limit(16, family)) for i, row in enumerate(texts(data, "image"))]


def prompt(row) -> str:
    context = "" if empty(row["hint"]) else f"Context: {row['hint']}\n"
    return context + row["question"] + listed(row["choices"]) + LETTER


def parse(answer: str, options) -> str | None:
    """A letter alone, or followed by '. ' at the start, or in the only 'The answer is X.': of A to E, and an option's.

    Behind X any character will do, as LLaVA's pattern has it, but not the end.
    """
    answer, found = answer.strip(), None
    if answer in tuple("ABCDE"):
        found = answer
    elif re.match(r"[A-E]\. ", answer):
        found = answer[0]
    elif len(named := re.findall(r"The answer is ([A-Z]).", answer)) == 1:
        found = named[0]
    return found if found and found in ALPHABET[:min(len(options), 5)] else None


def score(rows) -> dict[str, float | int]:
    return accuracy(rows, by_letter(parse))
