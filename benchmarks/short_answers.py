"""What the benchmarks of short answers share: questions read when asked for, and the four ways to
compare answers.

normalise() and normalise_m4c() with accuracy() (VQAv2, TextVQA, VizWiz), anls() (DocVQA, InfoVQA),
relaxed() (ChartQA). All follow the published scorers to the letter, their slips included, so that
published answers get published scores.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from datasets import Dataset

from benchmarks.questions import Question, picture

SHORT = "\nAnswer the question using a single word or phrase."

PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(WORDS)}}
ARTICLES = ("a", "an", "the")
COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
# the official list: each of these with one apostrophe forgotten, and one entry that it has the
# wrong way round. Left out is what never changes anything: four entries with a capital I, for all
# is in lower case by then, let's and she's
CONTRACTIONS = {word[:mark.start()] + word[mark.end():]: word
                for word in WITH_APOSTROPHES.split() for mark in re.finditer("'", word)}
CONTRACTIONS |= {"somebody'd": "somebodyd"}


# ------------------------------------------------------------------------------------ questions


class Questions(Sequence):
    """Row i of a table as a Question, read when it is asked for: ids (list of str) are known, the
    rest is not.

    ask(row without its image) -> (prompt, gold)
    limit: most new tokens
    show(i) -> pictures of row i; that of its column image if not given
    Raises ValueError for an id that two rows have.
    """

    def __init__(self, data: Dataset, ids, ask: Callable, limit: int, show: Callable | None = None):
        self.data = data
        self.ids = unique(map(str, ids))
        self.ask = ask
        self.limit = limit
        self.show = show
        self.text = data.remove_columns([name for name in data.column_names if name == "image"])

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        prompt, gold = self.ask(self.text[i])
        images = partial(self.show or self._pictures, i)
        return Question(self.ids[i], images, prompt, gold, self.limit)

    def _pictures(self, i: int) -> list:
        return [picture_of(self.data, i)]


def picture_of(data: Dataset, i: int):
    """The picture of row i, a PIL.Image. Raises ValueError where there is none, or none that can be
    opened."""
    cell = data[i]["image"]
    if not cell:
        raise ValueError(f"row {i} has no picture in its column image")
    return picture(cell)


def column(data: Dataset, name: str) -> list:
    """All cells of a column, without a look at the others."""
    return data.select_columns(name)[:][name]


def unique(ids) -> list:
    """The ids as a list. Raises ValueError for one that comes twice."""
    ids = list(ids)
    repeated = [i for i, n in Counter(ids).items() if n > 1]
    if repeated:
        raise ValueError(f"the id {repeated[0]!r} comes {ids.count(repeated[0])} times among "
                         f"{len(ids)}, as do {len(repeated) - 1} others: expected one row each")
    return ids


# ------------------------------------------------------------------------------------ scoring


def report(rows: list[dict], compare: Callable, main: str, group: Callable | None = None) -> dict:
    """{main: mean of compare(answer, gold) in percent, ..., "n": rows, "unmatched": empty answers
    that scored nothing}.

    rows: {"id", "answer", "gold", ...}, the right answers as gold["answers"] or gold["answer"]
    group: gold -> name of the part that the row also counts in, None for none; parts follow main,
    sorted
    Raises ValueError as checked() does, and for a row that has nothing to compare with.
    """
    points = []
    parts = {}
    for row in checked(rows):
        gold = row["gold"]
        right = gold["answers"] if "answers" in gold else gold.get("answer")
        if right is None or right == []:
            raise ValueError(f"{row['id']!r} has no right answer to compare with: expected a split "
                             "with labels; the others are scored on a server, which submission() "
                             "writes the file for where there is one")
        points.append(compare(row["answer"], right))
        name = group(gold) if group else None
        if name is not None:
            parts.setdefault(name, []).append(points[-1])
    unmatched = sum(not row["answer"].strip() and not point for row, point in zip(rows, points))
    return {main: percent(points), **{name: percent(parts[name]) for name in sorted(parts)},
            "n": len(points), "unmatched": unmatched}


def checked(rows: list[dict]) -> list[dict]:
    """The rows. Raises ValueError where there are none, for one that is not whole, or an id that
    comes twice."""
    if not rows:
        raise ValueError("no rows: expected at least one answered question")
    for i, row in enumerate(rows):
        is_text = isinstance(row.get("answer"), str)
        if not is_text or not isinstance(row.get("gold"), dict) or "id" not in row:
            raise ValueError(f"row {i} is {str(row)[:100]}: expected an id, an answer that is a "
                             "text, and a gold")
    unique(row["id"] for row in rows)
    return rows


def percent(points: list[float]) -> float:
    return 100 * sum(points) / len(points)


@lru_cache(1 << 16)
def normalise(text: str) -> str:
    """An answer as the VQA evaluation compares it (VQAEval of GT-Vision-Lab/VQA), as a function of
    the text alone.

    A mark goes where it touches a space, or a comma stands between digits, anywhere in the text;
    else it is a space. The published pattern for periods has two slips: its look-behind does
    nothing, so that all go but those in front of a digit, and its re.UNICODE (32) stands where the
    count belongs, so that no more than 32 go.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_digits = COMMA.search(text)
    cleaned = text
    for mark in PUNCTUATION:
        goes = has_digits or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if goes else " ")
    cleaned = PERIOD.sub("", cleaned, count=32)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(1 << 16)
def normalise_m4c(text: str) -> str:
    """normalise() behind what M4C's EvalAI processor does first; for LLaVA's submissions, TextVQA
    and VizWiz.

    Commas are gone before normalise() looks for them between digits, and `'s` is a word of its own.
    """
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def accuracy(answer: str, golds: list[str], clean: Callable[[str], str] = normalise) -> float:
    """VQA accuracy: min(1, agreeing / 3) of the people but one, averaged over whom to leave out.

    Of ten people, 0, 1, 2, 3, 4 agreeing give 0, .3, .6, .9, 1. All is cleaned always, as EvalAI
    and lmms-eval's TextVQA do; the VQA repository leaves the ten answers raw where they are all
    equal, so that `Yes` is wrong there.
    """
    answer = clean(answer)
    agree = [clean(gold) == answer for gold in golds]
    return sum(min(1, (sum(agree) - own) / 3) for own in agree) / len(agree)


def levenshtein(a: str, b: str) -> int:
    """Characters to insert, delete or replace on the way from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = min(above + 1, row[j - 1] + 1, corner + (x != y))
            corner = above
    return row[-1]


def anls(answer: str, golds: list[str], strict: bool = False) -> float:
    """ANLS of one question: 1 - the smallest normalised distance to a right answer, 0 below the
    threshold of .5.

    The distance is that of the stripped, lower-cased texts with single spaces, but it is divided by
    the length of the longer raw text, as lmms-eval and VLMEvalKit do; so is a similarity of exactly
    .5 kept. strict: not kept, as in the metric's paper (arXiv:1905.13648), which asks for a
    distance below .5.
    """
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    def distance(gold: str) -> float:
        longest = max(len(gold), len(answer))
        return levenshtein(plain(gold), plain(answer)) / longest if longest else 0.
    best = 1 - min(map(distance, golds))
    return best if best > .5 or (best == .5 and not strict) else 0.


def relaxed(answer: str, gold: str) -> bool:
    """ChartQA's relaxed accuracy (arXiv:2203.10244): 5 % off for numbers, equality but for case
    otherwise.

    A number is what Python reads as one: `5%` is .05, `1,000` is none. A right answer of 0 is
    compared as text.
    """
    answer = answer.strip()
    value, right = number(answer), number(gold)
    if value is not None and right:
        return abs(value - right) / abs(right) <= .05
    return answer.lower() == gold.lower()


def number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
