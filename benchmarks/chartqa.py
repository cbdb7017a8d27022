"""ChartQA (arXiv:2203.10244), test: 2,500 questions about charts, half by people, half by a machine."""

from benchmarks.questions import table
from benchmarks.vqa import SHORT, Questions, most_tokens, relaxed, report

NAME, MAIN = "ChartQA", "relaxed"
HUBS = ("lmms-lab-encoder/ChartQA", "lmms-lab/ChartQA")
CONFIG, SPLIT = None, "test"
WORD = "\nAnswer the question with a single word."     # lmms-eval's


def prompt(row: dict, family: str = "llava") -> str:
    """Qwen's and InternVL's figures are from VLMEvalKit's ending, LLaVA's from lmms-eval's."""
    return row["question"] + (SHORT if family.startswith(("qwen", "internvl")) else WORD)


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; the set has no ids, they are the rows' numbers. Raises as table() does."""
    data = table(HUBS, path, CONFIG, split or SPLIT, ("type", "question", "answer", "image"))
    return Questions(data, range(len(data)),
                     lambda row: (prompt(row, family), {"answer": row["answer"], "type": row["type"]}),
                     most_tokens(family, 16))


def score(rows: list[dict]) -> dict:
    """relaxed accuracy in percent, and that of the questions by people (human) and by a machine (augmented).
    Raises as vqa.report() does."""
    return report(rows, relaxed, MAIN, lambda gold: gold["type"].removesuffix("_test"))
