"""LongVideoBench: videos of up to an hour, without their subtitles. Wu et al., arXiv:2407.15754;
lmms-eval's rules."""

import re
from itertools import takewhile
from pathlib import Path

from benchmarks.frames import FRAMES, clips, opened
from benchmarks.multiple_choice import (
    ALPHABET,
    LETTER,
    accuracy,
    by_letter,
    letter_of,
    listed,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "LongVideoBench"
MAIN = "accuracy"
HUBS = ("longvideobench/LongVideoBench",)
SPLIT = "validation"
COLUMNS = ("id", "video_path", "question", "option0", "option1", "option2", "option3", "option4",
           "correct_choice", "duration_group")


def load(path=None, split=None, family="llava", videos=None, frames=FRAMES) -> list[Question]:
    """The rows of validation [paper]. videos: the folder of folders of frames, named like the
    videos without .mp4, see clips(); frames: so many of each.

    Raises as table() and clips() do; ValueError for an answer that is none of the options.
    """
    rows = table(HUBS, path, None, split or SPLIT, COLUMNS)
    folders = clips((Path(name).stem for name in rows["video_path"]), videos, path)
    return [question(row, opened(folders[Path(row["video_path"]).stem], frames), family)
            for row in rows]


def question(row, images, family) -> Question:
    cells = (row[f"option{k}"] for k in range(5))
    options = list(takewhile(lambda cell: cell not in (None, "N/A"), cells))
    answer = letter_of(row["correct_choice"], options, f"{NAME} {row['id']}")
    gold = {"answer": answer, "options": options, "length": f"{row['duration_group']} s"}
    prompt = row["question"] + listed(options) + LETTER + "\n"         # the last line's too
    return Question(row["id"], images, prompt, gold, most_tokens(32, family))


def parse(answer: str, options) -> str | None:
    """The first capital of A to E, which must be an option's; not the B of 'Best answer:'."""
    first = re.search("[A-E]", re.sub("Best (answer|option):", "", answer))
    return first[0] if first and first[0] in ALPHABET[:len(options)] else None


def score(rows) -> dict[str, float | int]:
    """accuracy, and that of the videos of about 15, 60, 600 and 3600 s."""
    return accuracy(rows, by_letter(parse), "length")
