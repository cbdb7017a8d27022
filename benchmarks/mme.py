"""MME (arXiv:2306.13394): two yes-or-no questions a picture, 14 categories, acc + acc+ of each,
2800 at most."""

from collections import Counter

from benchmarks.questions import most_tokens, table
from benchmarks.short_answers import SHORT, Questions, checked, column

NAME = "MME"
MAIN = "total"
HUBS = ("lmms-lab-encoder/MME", "lmms-lab/MME")
CONFIG = None
SPLIT = "test"
ENDING = " Please answer yes or no."
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def prompt(row: dict, family: str = "llava") -> str:
    """The question with LLaVA's ending in the place of its own; InternVL's has a space where others
    have a new line.

    Seven questions have two spaces before their own ending. LLaVA's file, of which the printed
    figures are, has none left of them; lmms-eval leaves one.
    """
    ending = " " + SHORT.strip() if family == "internvl" else SHORT
    return row["question"].replace(ENDING, "").strip() + ending


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order. The two of a picture share their question_id: ids are
    category/picture#0 and #1. Raises as table() does, ValueError for a picture with three questions
    of a category."""
    data = table(HUBS, path, CONFIG, split or SPLIT,
                 ("question_id", "question", "answer", "category", "image"))
    counts = Counter()
    ids = []
    for pair in zip(column(data, "category"), column(data, "question_id")):
        category, name = pair
        ids.append(f"{category}/{name.removeprefix(category + '/')}#{counts[pair]}")
        counts[pair] += 1
    many = [pair for pair, n in counts.items() if n > 2]
    if many:
        raise ValueError(f"{' '.join(many[0])} has {counts[many[0]]} questions: expected two of "
                         "each picture")

    def ask(row):
        gold = {"answer": row["answer"], "category": row["category"], "pair": row["question_id"]}
        return prompt(row, family), gold
    return Questions(data, ids, ask, most_tokens(16, family))


def read(answer: str) -> str | None:
    """yes or no: the answer itself, or what stands in its first four characters, yes before no;
    None for neither."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def right(row: dict) -> bool:
    """Is this one question answered right?"""
    return read(row["answer"]) == row["gold"]["answer"].strip().lower()


def score(rows: list[dict]) -> dict:
    """total = perception + cognition, each the sum of its categories' scores, and these; the papers
    print the total.

    A category scores 100 (acc + acc+): right answers / questions, and pictures with both right /
    pictures. A picture of which `rows` has one question only has not both right; half_pairs counts
    such.
    Raises ValueError as short_answers.checked() does, for an unknown category, and for a third
    question about a picture.
    """
    categories = {}
    unmatched = 0
    for row in checked(rows):
        gold = row["gold"]
        if gold["category"] not in PERCEPTION + COGNITION:
            raise ValueError(f"{row['id']!r} is of the category {gold['category']!r}: expected one "
                             f"of {', '.join(PERCEPTION + COGNITION)}")
        unmatched += read(row["answer"]) is None
        pair = categories.setdefault(gold["category"], {}).setdefault(gold["pair"], [])
        pair.append(right(row))
        if len(pair) > 2:
            raise ValueError(f"{gold['pair']!r} of {gold['category']} has three rows: expected two "
                             "of each picture")
    scores = {name: category_score([*categories[name].values()])
              for name in PERCEPTION + COGNITION if name in categories}
    perception = sum(scores.get(name, 0.) for name in PERCEPTION)
    cognition = sum(scores.get(name, 0.) for name in COGNITION)
    halves = sum(len(pair) == 1 for pairs in categories.values() for pair in pairs.values())
    return {"total": perception + cognition, "perception": perception, "cognition": cognition,
            **scores, "n": len(rows), "unmatched": unmatched, "half_pairs": halves}


def category_score(pairs: list[list[bool]]) -> float:
    """100 (acc + acc+) of the pictures' answers, right or wrong."""
    right, asked = sum(map(sum, pairs)), sum(map(len, pairs))
    return 100 * (right / asked + sum(sum(pair) == 2 for pair in pairs) / len(pairs))
