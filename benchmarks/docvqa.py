"""DocVQA (arXiv:2007.00398), validation: 5,349 questions about scanned pages, ANLS."""

from benchmarks.questions import table
from benchmarks.vqa import SHORT, Questions, anls, column, report

NAME, MAIN = "DocVQA", "anls"
HUBS = ("lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA")
CONFIG, SPLIT, LIMIT = "DocVQA", "validation", 32


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava", config: str = CONFIG) -> Questions:
    """The questions in the file's order; test has no answers. Raises as table() does, ValueError for an id that comes
    twice."""
    labels = ("answers",) if (split or SPLIT) != "test" else ()
    data = table(HUBS, path, config, split or SPLIT, ("questionId", "question", "image", *labels))
    return Questions(data, column(data, "questionId"),
                     lambda row: (prompt(row), {"answers": row.get("answers")}), LIMIT)


def score(rows: list[dict]) -> dict:
    """anls in percent, see vqa.anls(). Raises as vqa.report() does."""
    return report(rows, anls, MAIN)
