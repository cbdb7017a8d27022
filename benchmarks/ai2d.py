"""AI2D: diagrams from school books, labels masked by letters. Kembhavi et al., arXiv:1603.07396; lmms-eval's rules."""

import re
import string

from benchmarks.letters import ALPHABET, LETTER, accuracy, by_letter, letter_of, limit, listed, shown, texts
from benchmarks.questions import Question, table

NAME, MAIN = "AI2D", "accuracy"
HUBS = ("lmms-lab-encoder/ai2d", "lmms-lab/ai2d")
COLUMNS = ("question", "options", "answer", "image")


def load(path=None, split=None, family="llava") -> list[Question]:
    """The rows of test [paper]; their numbers are the ids, for the set has none. Raises as table() does."""
    data = table(HUBS, path, None, split or "test", COLUMNS)
    return [Question(str(i), shown(data, i, "image"), row["question"] + listed(row["options"]) + LETTER, {
        "answer": letter_of(row["answer"], row["options"], f"{NAME} row {i}"), "options": row["options"]},
        limit(16, family)) for i, row in enumerate(texts(data, "image"))]


def parse(answer: str, options) -> str | None:
    """The capital at the start that a period follows, else all of the answer but its punctuation, in either case."""
    start = re.match(r"\s*([A-Z])\.", answer)
    found = start[1] if start else answer.translate(dict.fromkeys(map(ord, string.punctuation))).strip().upper()
    return found if found in tuple(ALPHABET[:len(options)]) else None


def score(rows) -> dict[str, float | int]:
    return accuracy(rows, by_letter(parse))
