"""Does a selector inside the language model read the question (the paper's B.4)?

    python -m measure.question_reading --run runs/conditional_s0 runs/conditional_s1

Two questions about one picture of the tiny world, each in front of and behind it. Writes
question_reading.md: which share of the tokens is kept for both, and how much of a question's
evidence, the tokens that show its answer, is kept for it and for the other. A selector that reads
keeps others for another question, and more evidence for its own; nan where pictures come in crops,
of which nothing tells what they show. Of several runs (seeds): mean and standard deviation.
"""

from pathlib import Path

import numpy as np
import torch

import runs
from backbones.checkpoints import check_device
from benchmarks import answering, tiny_world
from benchmarks.tables import cell, markdown
from common import FrozenVLM
from data.batches import Batch
from data.dialogues import SIZES


def question_pairs(n: int, family: str) -> list:
    """The first and the last question about each of the first n scenes that has several."""
    # a scene has at least one question
    scenes = tiny_world.load_rows(7 * n, "test", SIZES[family])[:n]
    questions = []
    for scene in scenes:
        last = len(scene.questions) - 1
        if last > 0:
            questions += [tiny_world.question_of(scene, number, scene.questions[number])
                          for number in (0, last)]
    return questions


def mean_recall(keep: list, evidence: list) -> float:
    """NaN where nothing tells which tokens show an answer: those of crops."""
    shares = [share for share in answering.recall(keep, evidence) if share is not None]
    return float(np.mean(shares)) if shares else float("nan")


@torch.no_grad()
def measure_reading(vlm, selector, questions: list, budgets: list[int]) -> dict[int, list[float]]:
    """K -> [share kept for both of two questions, evidence kept for its own one, for the other].

    questions: of question_pairs(), each beside the other one about its picture
    """
    asked = answering.ask(vlm, questions, selector.ways([], budgets, None)[""])
    batch = Batch(asked.pixels, asked.batch, asked.owner, units=asked.pictures.units)
    units = selector.look(vlm, batch)                  # crops of a picture together
    measured = {}
    for k in budgets:
        keep = selector.select(units, None, [answering.wanted(k, n) for n in asked.tokens()])
        swapped = [keep[question ^ 1] for question in range(len(keep))]
        same = [len(set(own.tolist()) & set(other.tolist())) / len(own)
                for own, other in zip(keep, swapped)]
        measured[k] = [float(np.mean(same)), mean_recall(keep, asked.evidence),
                       mean_recall(swapped, asked.evidence)]
    return measured


def main(args: list[str]) -> dict[int, list[list[float]]]:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", nargs="+", required=True,
                        help="run folders, selectors' folders or hub ids")
    parser.add_argument("--n_pictures", type=int, default=60, help="pictures of the test split")
    parser.add_argument("--budgets", type=int, nargs="+", default=[48, 32, 16],
                        help="K, kept tokens")
    parser.add_argument("--dtype", default=runs.DTYPE, choices=["bfloat16", "float16", "float32"],
                        help="of the frozen VLM")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=None,
                        help="folder of the table; without it: that of the first run")
    options = parser.parse_args(args)
    runs.check_options(options, n_pictures=1, budgets=1)
    check_device(options.device, getattr(torch, options.dtype))
    out = options.out or Path(options.run[0])
    runs.writable(out)
    training = runs.read_selector(options.run[0])[1]["training"]
    protocol = training.get("protocol", "papers")
    shapes = FrozenVLM.from_pretrained(training["model"], device="meta", protocol=protocol)
    selectors = [runs.load_selector(folder, shapes, options.device)[0] for folder in options.run]
    for folder, selector in zip(options.run, selectors):
        if selector.rows != "question twice":
            raise ValueError(f"{folder} selects without the question: expected runs with "
                             "--select_after_layer")
    vlm = FrozenVLM.from_pretrained(training["model"], getattr(torch, options.dtype),
                                    options.device, protocol=protocol)
    questions = question_pairs(options.n_pictures, vlm.family)
    measured = {k: [] for k in options.budgets}
    for selector in selectors:
        for k, shares in measure_reading(vlm, selector, questions, options.budgets).items():
            measured[k].append(shares)
    text = markdown(["K", "kept for both of two questions", "evidence for its own question",
                     "for the other"],
                    [[str(k), *(cell(x) for x in zip(*measured[k]))] for k in options.budgets])
    print(text)
    runs.write_text(out / "question_reading.md", text + "\n")
    return measured


if __name__ == "__main__":
    runs.command(main)
