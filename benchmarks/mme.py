"""MME (arXiv:2306.13394): two yes-or-no questions a picture, 14 categories, acc + acc+ of each, 2800 at most."""

from collections import Counter

from benchmarks.questions import table
from benchmarks.vqa import SHORT, Questions, checked, column, most_tokens

NAME, MAIN = "MME", "total"
HUBS = ("lmms-lab-encoder/MME", "lmms-lab/MME")
CONFIG, SPLIT = None, "test"
ENDING = " Please answer yes or no."
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def prompt(row: dict, family: str = "llava") -> str:
    """The question with LLaVA's ending in the place of its own; InternVL's has a space where others have a new line."""
    return row["question"].strip().replace(ENDING, "") + (" " + SHORT.strip() if family == "internvl" else SHORT)


def load(path=None, split: str | None = None, family: str = "llava") -> Questions:
    """The questions in the file's order. The two of a picture share their question_id: ids are
    category/picture#0 and #1. Raises as table() does, ValueError for a picture with three questions of a category."""
    data = table(HUBS, path, CONFIG, split or SPLIT, ("question_id", "question", "answer", "category", "image"))
    seen, ids = Counter(), []
    for pair in zip(column(data, "category"), column(data, "question_id")):
        ids.append(f"{pair[0]}/{pair[1].removeprefix(pair[0] + '/')}#{seen[pair]}")
        seen[pair] += 1
    if many := [pair for pair, n in seen.items() if n > 2]:
        raise ValueError(f"{' '.join(many[0])} has {seen[many[0]]} questions: expected two of each picture")

    def ask(row):
        return prompt(row, family), {"answer": row["answer"], "category": row["category"], "pair": row["question_id"]}
    return Questions(data, ids, ask, most_tokens(family, 16))


def read(answer: str) -> str | None:
    """yes or no: the answer itself, or what stands in its first four characters, yes before no; None for neither."""
    start = answer.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def score(rows: list[dict]) -> dict:
    """total = perception + cognition, each the sum of its categories' scores, and these; the papers print the total.

    A category scores 100 (acc + acc+): right answers / questions, and pictures with both right / pictures. A picture of
    which `rows` has one question only has not both right; half_pairs counts such.
    Raises ValueError as vqa.checked() does, for an unknown category, and for a third question about a picture.
    """
    pairs, unmatched = {}, 0
    for row in checked(rows):
        gold, said = row["gold"], read(row["answer"])
        if gold["category"] not in PERCEPTION + COGNITION:
            raise ValueError(f"{row['id']!r} is of the category {gold['category']!r}: expected one of "
                             f"{', '.join(PERCEPTION + COGNITION)}")
        unmatched += said is None
        pair = pairs.setdefault(gold["category"], {}).setdefault(gold["pair"], [])
        pair.append(said == gold["answer"].strip().lower())
        if len(pair) > 2:
            raise ValueError(f"{gold['pair']!r} of {gold['category']} has three rows: expected two of each picture")
    scores = {}
    for category in filter(pairs.get, PERCEPTION + COGNITION):
        both = list(pairs[category].values())
        right, asked = sum(map(sum, both)), sum(map(len, both))
        scores[category] = 100 * (right / asked + sum(sum(pair) == 2 for pair in both) / len(both))
    parts = [sum(scores.get(name, 0.) for name in names) for names in (PERCEPTION, COGNITION)]
    return {"total": sum(parts), "perception": parts[0], "cognition": parts[1], **scores, "n": len(rows),
            "unmatched": unmatched, "half_pairs": sum(len(x) == 1 for both in pairs.values() for x in both.values())}
