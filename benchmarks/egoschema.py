"""EgoSchema, the 500 questions whose answers are public: long videos as seen by whoever acts.
arXiv:2308.09126."""

import re

from benchmarks.frames import FRAMES, clips, opened
from benchmarks.multiple_choice import (
    ALPHABET,
    LETTER,
    accuracy,
    by_letter,
    by_text,
    letter_of,
    listed,
    read,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "EgoSchema"
MAIN = "accuracy"
HUBS = ("lmms-eval/egoschema", "lmms-lab/egoschema")
CONFIG = "Subset"
SPLIT = "test"
CAMERA = re.compile(r"\bC(?='s | [a-z])")               # C cooks: whoever wears the camera
COLUMNS = ("video_idx", "question", "option", "answer")


def load(path=None, split=None, family="llava", videos=None, frames=FRAMES) -> list[Question]:
    """The rows of test [paper]. videos: the folder of folders of frames, see clips(); frames: so
    many of each.

    Raises as table() and clips() do; ValueError for an answer that is none of the options.
    """
    rows = table(HUBS, path, CONFIG, split or SPLIT, COLUMNS)
    folders = clips(rows["video_idx"], videos, path)
    return [question(row, opened(folders[row["video_idx"]], frames), family) for row in rows]


def question(row, images, family) -> Question:
    # the set writes the letters into the options: "A. C cooks."
    options = [option.removeprefix(f"{letter}. ")
               for letter, option in zip(ALPHABET, row["option"])]
    answer = letter_of(row["answer"], options, f"{NAME} {row['video_idx']}")
    prompt = row["question"] + listed(options) + LETTER
    return Question(row["video_idx"], images, prompt, {"answer": answer, "options": options},
                    most_tokens(16, family))


def parse(answer: str, options) -> str | None:
    """A leading letter with its mark, as in 'B. C cooks'; else the one option whose text the answer
    contains, but for its last period; else read(), where a C that does something is no letter.

    C is what all options call whoever wears the camera. lmms-eval looks for letters alone, and has
    the first that is followed by a space or a period, so that 'C cooks' is C to it.
    """
    leading = re.match(r"\s*[(\[]?([A-E])[.,:)\]]", answer)
    if leading:
        return leading[1] if leading[1] in ALPHABET[:len(options)] else None
    texts = [option.strip().rstrip(".") for option in options]
    return by_text(answer, texts) or read(CAMERA.sub("", answer), options)


def score(rows) -> dict[str, float | int]:
    return accuracy(rows, by_letter(parse))
