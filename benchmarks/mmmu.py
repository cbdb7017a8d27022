"""MMMU: college questions with one to seven pictures, some open. Yue et al., arXiv:2311.16502; its
own rules."""

import ast
import re

from benchmarks.multiple_choice import (
    ALPHABET,
    LETTER,
    accuracy,
    by_letter,
    listed,
    pictures_of,
    read_mmmu,
    without_pictures,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "MMMU"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/MMMU", "lmms-lab/MMMU")
SPLIT = "validation"
PICTURES = tuple(f"image_{k}" for k in range(1, 8))
COLUMNS = ("id", "question", "options", "answer", "question_type", *PICTURES)
SHORT = "\nAnswer the question using a single word or phrase."
# where the answer begins in a sentence
SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# the ways to write a number: thousands by commas, 1e-5, and plainly
NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
           r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def load(path=None, split=None, family="llava") -> list[Question]:
    """The 900 rows of validation [paper]. A question's pictures are those that its text or options
    name as <image k>, in the order of k; the marks stay in the text.

    Raises as table() does; ValueError for options that are no list, or an answer that is none of
    them.
    """
    data = table(HUBS, path, None, split or SPLIT, COLUMNS)
    has_picture = zip(*(data.data.column(name).is_valid().to_pylist() for name in PICTURES))
    return [question(i, row, [name for name, is_there in zip(PICTURES, has) if is_there], data,
                     family)
            for i, (row, has) in enumerate(zip(without_pictures(data, *PICTURES), has_picture))]


def question(i, row, present, data, family) -> Question:
    where = f"{NAME} {row['id']}"
    is_closed = row["question_type"] == "multiple-choice"
    options = literal(row["options"], where) if is_closed else []
    answer = row["answer"]
    if is_closed and answer not in tuple(ALPHABET[:len(options)]):
        raise ValueError(f"{where}: the answer is {answer!r}: expected the letter of one of "
                         f"{len(options)} options")
    if not is_closed and answer.startswith("["):
        # several right ones, but [0, 1] is an interval
        several = literal(answer, where)
        answer = several if all(isinstance(x, str) for x in several) else answer
    text = row["question"] + listed(options)
    named = [name for name in PICTURES if f"<{name.replace('_', ' ')}>" in text] or present
    if missing := [name for name in named if name not in present]:
        raise ValueError(f"{where}: its text names {', '.join(missing)}, which the row does not "
                         "have")
    gold = {"answer": answer, "options": options, "kind": row["question_type"]}
    return Question(row["id"], pictures_of(data, i, *named),
                    text + "\n" + (LETTER if is_closed else SHORT), gold, most_tokens(128, family))


def literal(text, where: str) -> list:
    """The list that a text writes in Python. Raises ValueError."""
    try:
        value = ast.literal_eval(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{where}: {text!r} is not a list as Python writes it")
    return value


def phrases(answer: str) -> list[str]:
    """The shortest end of every line behind one of the SIGNS (in the last also behind =); all of
    the answer if none.

    MMMU also means to split sentences, at a period before a capital, but has put all in small
    letters before.
    """
    lines = answer.strip().strip(".").lower().split("\n")
    ends = []
    for i, line in enumerate(lines):
        shortest = ""
        for sign in SIGNS + ("=",) * (i == len(lines) - 1):
            end = line.split(sign)[-1].strip()
            if sign in line and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest and shortest not in tuple(":,.!?;'"):
            ends.append(shortest)
    return ends or ["\n".join(lines)]


def normal(text: str) -> list:
    """[number rounded to 2 decimals], or [text in small letters]; one letter alone with a space
    before, and behind."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def right_open(answer: str, gold) -> bool | None:
    """Does a phrase of the answer contain a right text, or is one of its numbers right; None if it
    is empty."""
    if not answer.strip():
        return None
    golds = [x for one in (gold if isinstance(gold, list) else [gold]) for x in normal(one)]
    texts = [x for x in golds if isinstance(x, str)]
    parts = phrases(answer)
    numbers = [n for part in parts for form in NUMBERS for n in re.findall(form, part)]
    for part in parts + numbers:
        for x in normal(part):
            if x in golds if isinstance(x, float) else any(text in x for text in texts):
                return True
    return False


def right(answer: str, gold: dict) -> bool | None:
    if gold["kind"] == "open":
        return right_open(answer, gold["answer"])
    return by_letter(read_mmmu)(answer, gold)


def score(rows) -> dict[str, float | int]:
    """accuracy over all questions alike, and of multiple-choice and open ones apart."""
    return accuracy(rows, right, "kind")
