"""POPE (arXiv:2305.10355): is there such a thing in the picture? Three ways to ask for things that are not there."""

from collections import Counter

from benchmarks.questions import table
from benchmarks.vqa import SHORT, Questions, checked, column, most_tokens

NAME, MAIN = "POPE", "f1"
HUBS = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
CONFIG, SPLIT = None, "test"                           # the config Full has the three categories as splits
CATEGORIES = ("random", "popular", "adversarial")


def prompt(row: dict) -> str:
    return row["question"] + SHORT


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order; split: test, or one of CATEGORIES alone. question_id starts anew in each
    category, so ids are category/question_id. Raises as table() does, ValueError for an id that comes twice."""
    data = table(HUBS, path, "Full" if split in CATEGORIES else CONFIG, split or SPLIT,
                 ("question_id", "question", "answer", "category", "image"))
    ids = map("{}/{}".format, column(data, "category"), column(data, "question_id"))
    return Questions(data, ids, lambda row: (prompt(row), {"answer": row["answer"], "category": row["category"]}),
                     most_tokens(family, 16))


def says_no(answer: str) -> bool:
    """The official reading of an answer: in front of the first period and without commas, is one of the words between
    spaces No, no or not? All else is a yes, so NO, Nope, unknown, cannot and nothing at all."""
    return not {"No", "no", "not"}.isdisjoint(answer.strip().split(".")[0].replace(",", "").split(" "))


def score(rows: list[dict]) -> dict:
    """f1, accuracy, precision, recall and yes_ratio in percent, a yes being positive: means over the categories, then
    of each. f1, the mean of three, is what the papers print.

    unmatched is 0, for every answer is read as one of the two; without_yes_or_no counts those read as a yes for want of
    a no, with no "yes" in them. Raises ValueError as vqa.checked() does, and for a label that is neither.
    """
    tables, neither = {}, 0
    for row in checked(rows):
        no, label = says_no(row["answer"]), row["gold"]["answer"].strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{row['id']!r} has the label {label!r}: expected yes or no")
        tables.setdefault(row["gold"]["category"], Counter())[label == "yes", not no] += 1
        neither += not no and "yes" not in row["answer"].lower()
    each = {name: measures(counts) for name, counts in sorted(tables.items())}
    means = {key: sum(x[key] for x in each.values()) / len(each) for key in next(iter(each.values()))}
    return {**means, **{f"{name}_{key}": value for name, x in each.items() for key, value in x.items()},
            "n": len(rows), "unmatched": 0, "without_yes_or_no": neither}


def measures(counts: Counter) -> dict:
    """Of counts[is yes, said yes]; where nothing was said to be there, or nothing is, what is divided by 0 is 0."""
    hit, wrong, missed = counts[True, True], counts[False, True], counts[True, False]
    n = counts.total()
    precision, recall = (hit / x if x else 0. for x in (hit + wrong, hit + missed))
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.
    parts = {"f1": f1, "accuracy": (n - wrong - missed) / n, "precision": precision, "recall": recall,
             "yes_ratio": (hit + wrong) / n}
    return {key: 100 * value for key, value in parts.items()}
