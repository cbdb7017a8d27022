"""POPE (arXiv:2305.10355): is there such a thing in the picture? Three ways to ask for things that
are not there."""

from collections import Counter

from benchmarks.questions import most_tokens, table
from benchmarks.short_answers import SHORT, Questions, checked, column

NAME = "POPE"
MAIN = "f1"
HUBS = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
CONFIG = None                         # the config Full has the three categories as splits
SPLIT = "test"
CATEGORIES = ("random", "popular", "adversarial")


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; split: test, or one of CATEGORIES alone. question_id
    starts anew in each category, so ids are category/question_id. Raises as table() does,
    ValueError for an id that comes twice."""
    data = table(HUBS, path, "Full" if split in CATEGORIES else CONFIG, split or SPLIT,
                 ("question_id", "question", "answer", "category", "image"))
    ids = map("{}/{}".format, column(data, "category"), column(data, "question_id"))

    def ask(row):
        return prompt(row), {"answer": row["answer"], "category": row["category"]}
    return Questions(data, ids, ask, most_tokens(16, family))


def says_no(answer: str) -> bool:
    """The official reading of an answer: in front of the first period and without commas, is one of
    the words between spaces No, no or not? All else is a yes, so NO, Nope, unknown, cannot and
    nothing at all."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def score(rows: list[dict]) -> dict:
    """f1, accuracy, precision, recall and yes_ratio in percent, a yes being positive: means over
    the categories, then of each. f1, the mean of three, is what the papers print.

    unmatched is 0, for every answer is read as one of the two; without_yes_or_no counts those read
    as a yes for want of a no, with no "yes" in them. Raises ValueError as short_answers.checked()
    does, and for a label that is neither.
    """
    counts = Counter(cell(row) for row in checked(rows))
    neither = sum(not says_no(row["answer"]) and "yes" not in row["answer"].lower()
                  for row in rows)
    return {**from_counts(counts), "n": len(rows), "unmatched": 0, "without_yes_or_no": neither}


def cell(row: dict) -> tuple[str, bool, bool]:
    """(category, is yes right, was yes said). Raises ValueError for a label that is neither."""
    label = row["gold"]["answer"].strip().lower()
    if label not in ("yes", "no"):
        raise ValueError(f"{row['id']!r} has the label {label!r}: expected yes or no")
    # nothing reads as a yes, but a question that was never asked is wrong
    said = label == "no" if "too long" in row else not says_no(row["answer"])
    return row["gold"]["category"], label == "yes", said


def right(row: dict) -> bool:
    """Is this one question answered right?"""
    _, there, said = cell(row)
    return there == said


def from_counts(counts: Counter) -> dict:
    """The score of so many rows of each cell(): means over the categories, then of each."""
    tables = {}
    for (category, *kind), n in counts.items():
        tables.setdefault(category, Counter())[tuple(kind)] = n
    each = {name: measures(table) for name, table in sorted(tables.items())}
    means = {key: sum(x[key] for x in each.values()) / len(each)
             for key in next(iter(each.values()))}
    parts = {f"{name}_{key}": value for name, x in each.items() for key, value in x.items()}
    return {**means, **parts}


def measures(counts: Counter) -> dict:
    """Of counts[is yes right, was yes said]; where nothing was said to be there, or nothing is,
    what is divided by 0 is 0."""
    hit, wrong, missed = counts[True, True], counts[False, True], counts[True, False]
    n = counts.total()
    precision = hit / (hit + wrong) if hit + wrong else 0.
    recall = hit / (hit + missed) if hit + missed else 0.
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.
    parts = {"f1": f1, "accuracy": (n - wrong - missed) / n, "precision": precision,
             "recall": recall, "yes_ratio": (hit + wrong) / n}
    return {key: 100 * value for key, value in parts.items()}
