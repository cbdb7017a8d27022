"""DocVQA (arXiv:2007.00398), validation: 5,349 questions about scanned pages, ANLS."""

from benchmarks.questions import table
from benchmarks.short_answers import SHORT, Questions, anls, column, report

NAME = "DocVQA"
MAIN = "anls"
HUBS = ("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA")
CONFIG = "DocVQA"
SPLIT = "validation"
LIMIT = 32


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava", config: str = CONFIG
         ) -> Questions:
    """The questions in the file's order; test has no answers. Raises as table() does, ValueError
    for an id that comes twice."""
    split = split or SPLIT
    labels = ("answers",) if split != "test" else ()
    data = table(HUBS, path, config, split, ("questionId", "question", "image", *labels))
    return Questions(data, column(data, "questionId"),
                     lambda row: (prompt(row), {"answers": row.get("answers")}), LIMIT)


def score(rows: list[dict]) -> dict:
    """anls in percent, see short_answers.anls(). Raises as short_answers.report() does."""
    return report(rows, anls, MAIN)
