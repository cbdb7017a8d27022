"""MMBench: CircularEval over rotated copies of each question. Liu et al., arXiv:2307.06281.

The dev files hold the copies: question i stands again as i + 1e6, i + 2e6, ... with its options and
answer shifted. The prompt is LLaVA's. The papers' figures for LLaVA-1.5 are from the legacy file of
4,377 rows.
"""

from collections import Counter
from pathlib import Path

import pandas as pd

from benchmarks.multiple_choice import (
    LETTER,
    by_letter,
    is_empty,
    judged,
    listed,
    percent,
    pictures_of,
    read,
    without_pictures,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "MMBench"
MAIN = "circular"
HUBS = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")                        # 4,329 rows of dev
LEGACY = {"en": ("lmms-lab-encoder/MMBench_EN", "lmms-lab/MMBench_EN"),        # 4,377 rows of dev
          "cn": ("lmms-lab-encoder/MMBench_CN", "lmms-lab/MMBench_CN")}
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "category", "image")
ROUND = 1_000_000
CONFIG = "en"
SPLIT = "dev"
POST = {"en": LETTER, "cn": "\n请直接回答选项字母。"}


def load(path=None, split=None, family="llava", language="en", legacy=False) -> list[Question]:
    """The rows of dev [ours], or of test, whose answers only the server knows. language: en or cn.

    Raises as table() does; ValueError for another language.
    """
    if language not in POST:
        raise ValueError(f"language={language!r}: expected en or cn")
    split = split or SPLIT
    columns = COLUMNS + ("answer",) * (split != "test")
    hubs = LEGACY[language] if legacy else HUBS
    data = table(hubs, path, None if legacy else language, split, columns)
    rows = without_pictures(data, "image")
    copies = Counter(int(index) % ROUND for index in rows["index"])
    return [question(i, row, data, copies, language, family) for i, row in enumerate(rows)]


def question(i, row, data, copies, language, family) -> Question:
    cells = [row[letter] for letter in "ABCD"]
    options = cells[:next((k for k, cell in enumerate(cells) if is_empty(cell)), 4)]
    index = int(row["index"])
    answer = row.get("answer")
    gold = {"answer": None if is_empty(answer) else answer, "options": options,
            "question": row["question"], "category": row["category"], "index": index,
            "copies": copies[index % ROUND]}
    hint = "" if is_empty(row["hint"]) else f"{row['hint']}\n"
    prompt = f"{hint}{row['question']}{listed(options)}{POST[language]}"
    return Question(str(index), pictures_of(data, i, "image"), prompt, gold,
                    most_tokens(16, family))


def group(row) -> tuple[str, int]:
    """("", the number that a question's copies share): what is right or wrong as one, and drawn as
    one."""
    return "", row["gold"]["index"] % ROUND


def score(rows) -> dict[str, float | int]:
    """circular: % of the questions whose copies are all answered right. plain: % of the questions
    in their first order.

    A question that lacks a copy is no hit, and counted as incomplete. questions: how many; n: the
    rows.
    """
    hits = judged(rows, by_letter(read))
    groups = {}
    for row, hit in zip(rows, hits):
        groups.setdefault(group(row), []).append((row["gold"], bool(hit)))
    circular, plain = [], []
    incomplete = 0
    for copies in groups.values():
        is_whole = len(copies) == copies[0][0]["copies"]
        incomplete += not is_whole
        circular.append(is_whole and all(hit for _, hit in copies))
        plain += [hit for gold, hit in copies if gold["index"] < ROUND]
    return {"circular": percent(circular), "plain": percent(plain) if plain else 0.,
            "questions": len(groups), "incomplete": incomplete, "n": len(rows),
            "unmatched": hits.count(None)}


def submission(rows, path: str | Path) -> Path:
    """Write the answers of the test split for MMBench's server: .xlsx, which it takes (needs
    openpyxl), or .tsv.

    Columns: index, question, A .. D, prediction (the answer as it is). Raises ValueError for
    another ending.
    """
    path = Path(path)
    if path.suffix not in (".xlsx", ".tsv"):
        raise ValueError(f"{path}: expected a name that ends in .xlsx or .tsv")
    lines = []
    for row in rows:
        gold = row["gold"]
        options = dict(zip("ABCD", [*gold["options"], *4 * [None]]))
        lines.append({"index": gold["index"], "question": gold["question"], **options,
                      "prediction": row["answer"]})
    frame = pd.DataFrame(lines)
    if path.suffix == ".tsv":
        frame.to_csv(path, sep="\t", index=False)
    else:
        try:
            frame.to_excel(path, index=False, engine="openpyxl")
        except ModuleNotFoundError:
            raise ValueError(f"{path}: a table of Excel needs `pip install openpyxl`; or name a "
                             "file .tsv") from None
    return path
