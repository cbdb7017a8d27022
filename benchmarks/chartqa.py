"""ChartQA (arXiv:2203.10244), test: 2,500 questions about charts, half by people, half by a
machine."""

from benchmarks.questions import most_tokens, table
from benchmarks.short_answers import SHORT, Questions, relaxed, report

NAME = "ChartQA"
MAIN = "relaxed"
HUBS = ("lmms-lab-encoder/ChartQA", "lmms-lab/ChartQA")
CONFIG = None
SPLIT = "test"
WORD = "\nAnswer the question with a single word."     # lmms-eval's


def prompt(row: dict, family: str = "llava") -> str:
    """Qwen's and InternVL's figures are from VLMEvalKit's ending, LLaVA's from lmms-eval's."""
    return row["question"] + (SHORT if family.startswith(("qwen", "internvl")) else WORD)


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; the set has no ids, they are the rows' numbers. Raises as
    table() does."""
    data = table(HUBS, path, CONFIG, split or SPLIT, ("type", "question", "answer", "image"))

    def ask(row):
        return prompt(row, family), {"answer": row["answer"], "type": row["type"]}
    return Questions(data, range(len(data)), ask, most_tokens(16, family))


def score(rows: list[dict]) -> dict:
    """relaxed accuracy in percent, and that of the questions by people (human) and by a machine
    (augmented). Raises as short_answers.report() does."""
    return report(rows, relaxed, MAIN, lambda gold: gold["type"].removesuffix("_test"))
