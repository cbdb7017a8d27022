"""VizWiz (arXiv:1802.08218): pictures and questions of blind people. Validation has labels, test
has a server."""

import json
from functools import partial
from pathlib import Path

from benchmarks.questions import table
from benchmarks.short_answers import (
    SHORT,
    Questions,
    accuracy,
    checked,
    column,
    normalise_m4c,
    report,
)

NAME = "VizWiz"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/VizWiz-VQA", "lmms-lab/VizWiz-VQA")
CONFIG = None
SPLIT = "val"                         # 4,319 questions, test 8,000, with other scores
LIMIT = 32
HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def prompt(row: dict) -> str:
    return row["question"].capitalize() + HINT + SHORT


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order. Raises as table() does, ValueError for an id that comes
    twice."""
    split = split or SPLIT
    labels = ("answers",) if split != "test" else ()
    data = table(HUBS, path, CONFIG, split, ("question_id", "question", "image", *labels))
    return Questions(data, column(data, "question_id"),
                     lambda row: (prompt(row), {"answers": row.get("answers")}), LIMIT)


def score(rows: list[dict]) -> dict:
    """accuracy in percent, all answers cleaned by M4C's processor; `unanswerable` is an answer like
    any other. Raises as short_answers.report() does."""
    return report(rows, partial(accuracy, clean=normalise_m4c), MAIN)


def submission(rows: list[dict], path) -> None:
    """Writes answers to test for EvalAI's challenge 2185: [{"image", "answer"}]. It wants all
    8,000. Raises ValueError as short_answers.checked() does."""
    answers = [{"image": row["id"].removesuffix(".jpg") + ".jpg",
                "answer": normalise_m4c(row["answer"])} for row in checked(rows)]
    Path(path).write_text(json.dumps(answers))
