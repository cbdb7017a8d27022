"""A benchmark in one file: is the picture square?"""

from PIL import Image

from benchmarks.questions import Question

NAME, MAIN = "Toy", "accuracy"


def load(path=None, split=None, family="llava"):
    picture = Image.new("RGB", (144, 144), "red")
    prompts = ["is there a square ?", "is there a circle ?", "is there a triangle ?"]
    return [Question(str(i), lambda: [picture], prompt, {"answer": "no"}, 4)
            for i, prompt in enumerate(prompts)]


def score(rows):
    right = [row["answer"] == row["gold"]["answer"] for row in rows]
    return {"accuracy": 100 * sum(right) / len(right), "n": len(rows), "unmatched": 0}
