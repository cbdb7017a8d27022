"""Are the best tokens like one another? AutoSelect's Figure 4, for any run.

    python -m measure.likeness --run runs/autoselect

Cosines among the tokens with the best and with the worst scores, mean over pictures of the tiny
world, as a picture; printed is the mean in each of the two groups, own pairs left out.
"""

from pathlib import Path

import torch

import runs
from backbones.checkpoints import check_device
from benchmarks import answering, tiny_world
from benchmarks.plots import draw_cosines
from common import FrozenVLM


def first_questions(family: str, n: int) -> list:
    """The first question about each of the first n pictures that have the first one's size."""
    questions = tiny_world.load(family=family, n=30 * n)
    by_scene = {}
    for question in questions:
        by_scene.setdefault(question.id.split("-")[0], question)
    size = questions[0].images()[0].size
    alike = [question for question in by_scene.values() if question.images()[0].size == size]
    return alike[:n]


@torch.no_grad()
def measure_likeness(vlm: FrozenVLM, selector, n: int, path: Path) -> dict:
    """What draw_cosines() gives. Raises ValueError where a selector has no scores."""
    asked = answering.ask(vlm, first_questions(vlm.family, n))
    scores = selector.scores(asked.units, asked.question)
    if scores is None:
        raise ValueError(f"{type(selector).__name__} has no scores: expected a method whose "
                         "scores() gives a number per token")
    feats, _ = asked.units.pad()
    return draw_cosines(feats.flatten(2), asked.units.pad(scores)[0], path)


def main(args: list[str]) -> dict:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="run folder, selector's folder or hub id")
    parser.add_argument("--n", type=int, default=64, help="pictures")
    parser.add_argument("--dtype", default=runs.DTYPE, choices=["bfloat16", "float16", "float32"],
                        help="of the frozen VLM")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("likeness.png"), help="the picture")
    options = parser.parse_args(args)
    runs.check_options(options, n=1)
    check_device(options.device, getattr(torch, options.dtype))
    runs.writable_file(options.out)
    model = runs.read_selector(options.run)[1]["training"]["model"]
    shapes = FrozenVLM.from_pretrained(model, device="meta")
    selector, _ = runs.load_selector(options.run, shapes, options.device)
    if selector.rows == "question twice":
        raise ValueError("this selector scores states inside the language model: expected one that "
                         "scores the vision encoder's tokens")
    vlm = FrozenVLM.from_pretrained(model, getattr(torch, options.dtype), options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    means = measure_likeness(vlm, selector, options.n, options.out)
    for name, groups in means.items():
        print(f"{name}: mean cosine {groups['best']:.3f} among the best tokens, "
              f"{groups['worst']:.3f} among the worst")
    print(f"drawn: {options.out}")
    return means


if __name__ == "__main__":
    runs.command(main)
