"""What the benchmarks answered by a letter share: options listed, a letter read from an answer,
right ones counted."""

import re
from collections.abc import Callable

from datasets import Dataset

from benchmarks.questions import picture

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = "\nAnswer with the option's letter from the given choices directly."


# ------------------------------------------------------------------------------------ asking


def listed(options) -> str:
    """'\\nA. first\\nB. second'..., to stand behind the question."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(ALPHABET, options))


def is_empty(cell) -> bool:
    """Does the cell hold nothing, as LLaVA sees it: None, nan, and the words nan and none in any
    case; or ''."""
    return str(cell).strip().lower() in ("", "nan", "none")


def letter_of(index, options, where: str) -> str:
    """The letter of option `index`, an int or its digits. Raises ValueError naming `where` if there
    is none."""
    if not re.fullmatch(r"[0-9]+", str(index)) or int(index) >= len(options):
        raise ValueError(f"{where}: the answer is {index!r}: expected the place, from 0, of one of "
                         f"its {len(options)} options")
    return ALPHABET[int(index)]


def without_pictures(data: Dataset, *columns: str) -> Dataset:
    """The rows without their columns of pictures, which would be read from disk with every row."""
    return data.remove_columns(list(columns))


def pictures_of(data: Dataset, i: int, *columns: str) -> Callable:
    """() -> the pictures of row i in these columns, decoded then; of a list of pictures the first.

    It raises ValueError for a cell that holds none, or one that cannot be opened.
    """
    def images():
        row = data[i]
        cells = {}
        for name in columns:
            cell = row[name]
            cells[name] = cell[0] if isinstance(cell, list) and cell else cell
        missing = [name for name, cell in cells.items() if not cell]
        if missing:
            raise ValueError(f"row {i}: no picture in the column {', '.join(missing)}")
        return [picture(cell) for cell in cells.values()]
    return images


# ------------------------------------------------------------------------------------ reading


def read(answer: str, options) -> str | None:
    """The letter that an answer names, None if it names none or several: MMBench's rules, without
    its judge model.

    First, one option's letter as a word: B, B. B) (B) B: [B] or The answer is B. As in VLMEvalKit
    the article of 'A dog' counts as a letter. Else the one option whose text the answer contains,
    in any case.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter, _ in zip(ALPHABET, options) if letter in words]
    return named[0] if len(named) == 1 else by_text(answer, options)


def by_text(answer: str, options) -> str | None:
    """The letter of the one option whose text the answer contains, in any case."""
    named = [letter for letter, option in zip(ALPHABET, options)
             if str(option).lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def read_mmmu(answer: str, options, loose: bool = False) -> str | None:
    """The letter by the rules of MMMU's own evaluation, without the random letter where they find
    none.

    (B) anywhere, else a B between spaces, else, in more than five words, an option's text; of
    several the last. loose: lmms-eval's form for NExT-QA, where 'B ' and then 'B.' are enough.
    """
    # one after the other, as there: of "A,." only the period goes
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = ALPHABET[:len(options)]
    for form in ("({})", "{} ", "{}.") if loose else ("({})", " {} "):
        named = [letter for letter in letters if form.format(letter) in answer]
        if named:
            # of the loose forms, too, it looks for the last of ' B ' alone
            last = form if form == "({})" else " {} "
            return max(named, key=lambda letter: answer.rfind(last.format(letter)))
    if len(answer.split()) <= 5:
        return None
    answer = answer.lower()
    texts = {letter: str(option).lower() for letter, option in zip(letters, options)}
    named = [letter for letter in letters if texts[letter] in answer]
    return max(named, key=lambda letter: answer.rfind(texts[letter])) if named else None


# ------------------------------------------------------------------------------------ counting


def by_letter(reader: Callable) -> Callable:
    """right(answer, gold) for accuracy(): does reader(answer, options) give gold's letter; None if
    it gives none."""
    def right(answer, gold):
        letter = reader(answer, gold["options"])
        return letter and letter == gold["answer"]
    return right


def judged(rows, right: Callable) -> list[bool | None]:
    """right(answer, gold) of every row, None where no answer could be read.

    Raises ValueError for no rows, one that is not whole, an id twice, or a gold whose answer is not
    known.
    """
    if not rows:
        raise ValueError("no rows to score: expected those of a predictions file")
    ids = set()
    for i, row in enumerate(rows):
        is_text = isinstance(row.get("answer"), str)
        if "id" not in row or not is_text or not isinstance(row.get("gold"), dict):
            raise ValueError(f"row {i} is {str(row)[:100]}: expected an id, an answer that is a "
                             "text, and a gold")
        if row["id"] in ids:
            raise ValueError(f"the id {row['id']!r} stands twice among the {len(rows)} rows: "
                             "expected one answer each")
        ids.add(row["id"])
        if row["gold"]["answer"] is None:
            raise ValueError(f"{row['id']!r} has no known answer, as in a test split: score a "
                             "split that has them, or write a submission for the benchmark's "
                             "server")
    return [right(row["answer"], row["gold"]) for row in rows]


def percent(hits) -> float:
    return 100 * sum(map(bool, hits)) / len(hits)


def accuracy(rows, right: Callable, by: str | None = None) -> dict[str, float | int]:
    """{"accuracy": 0..100, "n", "unmatched"}, and the accuracy of the rows of each gold[by] under
    that name.

    An answer that could not be read is wrong, and counted as unmatched.
    """
    hits = judged(rows, right)
    parts = {}
    if by:
        for row, hit in zip(rows, hits):
            parts.setdefault(str(row["gold"][by]), []).append(hit)
    by_part = {name: percent(part) for name, part in sorted(parts.items())}
    return {"accuracy": percent(hits), **by_part, "n": len(rows), "unmatched": hits.count(None)}
