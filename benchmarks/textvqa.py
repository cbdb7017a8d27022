"""TextVQA (arXiv:1904.08920), validation: 5,000 questions; LLaVA's tables hand the words of an OCR
to the model."""

from functools import partial

from benchmarks.questions import table
from benchmarks.short_answers import SHORT, Questions, accuracy, column, normalise_m4c, report

NAME = "TextVQA"
MAIN = "accuracy"
HUBS = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
CONFIG = None
SPLIT = "validation"
LIMIT = 32
WITH_OCR = ("llava", "llava_next")                     # the families whose tables are with the line


def prompt(row: dict, ocr: bool) -> str:
    """LLaVA's: first letter up, the rest lower; the line of the OCR stays where it found
    nothing."""
    line = f"\nReference OCR token: {', '.join(row['ocr_tokens'] or [])}" if ocr else ""
    return row["question"].capitalize() + line + SHORT


def load(path=None, split: str | None = None, family: str = "llava", ocr: bool | None = None
         ) -> Questions:
    """The questions in the file's order. ocr: with the line of OCR tokens [as the family's tables
    are]; LLaVA-1.5-7B has 58.2 with it and about 46 without. Raises as table() does, ValueError for
    an id that comes twice."""
    ocr = family in WITH_OCR if ocr is None else ocr
    split = split or SPLIT
    labels = ("answers",) if split != "test" else ()
    data = table(HUBS, path, CONFIG, split,
                 ("question_id", "question", "image", *labels, *("ocr_tokens",) * ocr))

    def ask(row):
        return prompt(row, ocr), {"answers": row.get("answers"), "ocr": ocr}
    return Questions(data, column(data, "question_id"), ask, LIMIT)


def score(rows: list[dict]) -> dict:
    """accuracy in percent, all answers cleaned by M4C's processor. Raises as short_answers.report()
    does."""
    return report(rows, partial(accuracy, clean=normalise_m4c), MAIN)
