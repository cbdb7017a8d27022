"""Questions and rows of predictions files that tests make up."""

from PIL import Image

from benchmarks import predictions
from benchmarks.predictions import Predictions
from benchmarks.questions import Question

HEADER = {"benchmark": "tiny_world", "model": "m", "method": "random", "budget": 8, "questions": 3,
          "protocol": "stock"}


def question(i, prompt="what ?", gold="a"):
    return Question(str(i), lambda: [Image.new("RGB", (24, 24))], prompt, gold, 4)


def row(i, answer="a", gold="a", prompt="what ?", number=None, **more):
    return {"number": i if number is None else number, "id": str(i), "prompt": prompt,
            "answer": answer, "gold": gold, "kept": 8, "seen": [8, 8, 8.], "flops": 10**9,
            "ms": {"vision": 1., "select": 1., "prefill": 2., "decode": 1.}} | more


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "ms"} for row in rows]


def files_for(folder, questions, ways, **how):
    """A predictions file for every way."""
    return {key: Predictions(folder / f"{predictions.file_name(*key)}.jsonl",
                             HEADER | {"method": key[0], "budget": key[1],
                                       "questions": len(questions)}, questions, **how)
            for key in ways}
