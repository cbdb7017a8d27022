"""Draw the training curves of runs side by side.

    python -m measure.training_curves runs/autoselect_s0 runs/autoselect_s1 --out curves.png

Loss and its parts, gradient norm and, where the selector decides, kept tokens, from each run's
log.jsonl; means of 10 steps.
"""

import json
from pathlib import Path

import runs
from benchmarks.plots import draw_training


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("training_curves.png"), help="the picture")
    options = parser.parse_args(args)
    for run in options.runs:
        if not Path(run, "log.jsonl").exists():
            raise FileNotFoundError(f"{run} has no log.jsonl: expected the folder of a run; a "
                                    "shared selector has no log")
        try:
            lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
        except ValueError as error:
            raise ValueError(f"{run}/log.jsonl is damaged ({error})") from error
        if not lines:
            raise ValueError(f"{run}/log.jsonl has no step yet")
    runs.writable_file(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw_training(options.runs, options.out)
    print(f"drawn: {options.out}")


if __name__ == "__main__":
    runs.command(main)
