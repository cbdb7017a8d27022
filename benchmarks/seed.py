"""SEED-Bench: pictures, videos, or both (lmms-eval's seed_all, the papers' column). Li et al.,
arXiv:2307.16125."""

from benchmarks.frames import FRAMES, uniform
from benchmarks.multiple_choice import (
    LETTER,
    accuracy,
    by_letter,
    listed,
    pictures_of,
    without_pictures,
)
from benchmarks.questions import Question, most_tokens, numbered, picture, table

NAME = "SEED-I"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/SEED-Bench", "lmms-lab/SEED-Bench")
SPLIT = "test"
COLUMNS = ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer",
           "data_type", "image")
KINDS = {"image": ("image",), "video": ("video",), "all": ("image", "video")}


def load(path=None, split=None, family="llava", kind="image", frames=FRAMES) -> list[Question]:
    """The questions of test about pictures [ours], videos, or all [paper].

    frames: so many of a video, evenly; 1 is its middle frame, as in LLaVA. An id that the official
    rows have twice, as 49914, gets a number.
    Raises as table() does; ValueError for another kind, or an answer that is none of A to D.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    data = table(HUBS, path, None, split or SPLIT, COLUMNS)
    rows = without_pictures(data, "image")
    # of all rows: a question has the same id whatever kinds are asked
    return [question(i, name, row, data, family, frames)
            for i, (name, row) in enumerate(zip(numbered(rows["question_id"]), rows))
            if row["data_type"] in KINDS[kind]]


def question(i, name, row, data, family, frames) -> Question:
    if row["answer"] not in tuple("ABCD"):
        raise ValueError(f"{NAME} row {i}: the answer is {row['answer']!r}: expected one of A, B, "
                         "C, D")
    options = [row[f"choice_{x}"] for x in "abcd"]
    images = pictures_of(data, i, "image")
    if row["data_type"] == "video":
        def images():
            return [picture(cell) for cell in uniform(data[i]["image"], frames)]
    gold = {"answer": row["answer"], "options": options, "kind": row["data_type"]}
    return Question(name, images, row["question"] + listed(options) + LETTER, gold,
                    most_tokens(8, family))


def parse(answer: str, options) -> str | None:
    """The first character, in either case."""
    first = answer.strip()[:1].upper()
    return first if first in tuple("ABCD") else None


def score(rows) -> dict[str, float | int]:
    """accuracy over all the rows; image and video: those apart."""
    return accuracy(rows, by_letter(parse), "kind")
