"""VQAv2 (arXiv:1612.00837). Papers print test-dev, which has no labels here: validation is the
local stand-in."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.questions import most_tokens, table
from benchmarks.short_answers import (
    SHORT,
    Questions,
    accuracy,
    checked,
    column,
    normalise_m4c,
    report,
    unique,
)

NAME = "VQAv2"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2")
CONFIG = None
SPLIT = "validation"                  # 214,354 questions; testdev 107,394 of test's 447,793


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; validation, or testdev or test, which can only be
    submitted. Raises as table() does, ValueError for an id that comes twice."""
    labels = ("answers", "answer_type") if split not in ("testdev", "test") else ()
    data = table(HUBS, path, CONFIG, split or SPLIT,
                 ("question_id", "question", "image", *labels))

    def ask(row):
        answers = [x["answer"] for x in row["answers"]] if labels else None
        return prompt(row), {"answers": answers, "type": row.get("answer_type")}
    return Questions(data, column(data, "question_id"), ask, most_tokens(16, family))


def score(rows: list[dict]) -> dict:
    """accuracy in percent, and that of each type of answer (number, other, yes/no). Raises as
    short_answers.report() does."""
    return report(rows, accuracy, MAIN, lambda gold: gold.get("type"))


def submission(rows: list[dict], path, every: Iterable | None = None) -> None:
    """Writes answers to testdev for EvalAI's challenge 830, cleaned as LLaVA's are.

    every: the ids of all 447,793 questions of test, such as load(split="test").ids: the server
    takes no file that lacks one, so those without a row get an empty answer. Not given, only the
    rows are written.
    Raises ValueError as short_answers.checked() does, and for a row whose id is none of `every`.
    """
    answers = {str(row["id"]): normalise_m4c(row["answer"]) for row in checked(rows)}
    every = list(answers) if every is None else unique(map(str, every))
    strange = answers.keys() - set(every)
    if strange:
        raise ValueError(f"{len(strange)} rows are of no question of the test split, such as "
                         f"{min(strange)!r}: expected a predictions file of testdev or test")
    lines = [{"question_id": int(i), "answer": answers.get(i, "")} for i in every]
    Path(path).write_text(json.dumps(lines))
