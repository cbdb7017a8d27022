"""EgoSchema, the 500 questions whose answers are public: long videos as seen by whoever acts.
arXiv:2308.09126."""

from benchmarks.frames import FRAMES, clips, opened
from benchmarks.multiple_choice import (
    ALPHABET,
    LETTER,
    accuracy,
    by_letter,
    letter_of,
    listed,
    read,
)
from benchmarks.questions import Question, most_tokens, table

NAME = "EgoSchema"
MAIN = "accuracy"
HUBS = ("lmms-eval/egoschema", "lmms-lab/egoschema")
CONFIG = "Subset"
COLUMNS = ("video_idx", "question", "option", "answer")


def load(path=None, split=None, family="llava", videos=None, frames=FRAMES) -> list[Question]:
    """The rows of test [paper]. videos: the folder of folders of frames, see clips(); frames: so
    many of each.

    Raises as table() and clips() do; ValueError for an answer that is none of the options.
    """
    rows = table(HUBS, path, CONFIG, split or "test", COLUMNS)
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


def score(rows) -> dict[str, float | int]:
    return accuracy(rows, by_letter(read))
