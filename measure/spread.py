"""How a method that decides for itself how many tokens it keeps spreads them over questions.

    python -m measure.spread runs/stepprune/predictions

From predictions files alone: K's deciles, its mean per family of questions, its correlation with
the number of things in the picture, and the score per log-spaced bucket of K (a paper's
Figure 4). Of benchmarks whose gold says how many things there are, as the tiny world's does, and of
methods whose K differs between questions. Writes spread.md, and spread.png of the first of them.
"""

from pathlib import Path

import benchmarks
import runs
from benchmarks import scores, tables
from benchmarks.plots import draw_spread


def measure_spread(folder: Path) -> list[dict]:
    """A line per method and K: {"method", "K", "spread": {benchmark: scores.spread()}}."""
    files, _ = scores.complete_files(folder)
    lines = {}
    for name, ways in files.items():
        module = benchmarks.load_module(name)
        for (method, k), rows in ways.items():
            spread = scores.spread(module, rows)
            if spread is not None:
                line = lines.setdefault((method, k), {"method": method, "K": k, "spread": {}})
                line["spread"][name] = spread
    if not lines:
        raise ValueError(f"{folder} has no method whose K differs between questions of a benchmark "
                         "that counts things: expected predictions of the tiny world, of a "
                         "method that decides how many it keeps")
    return sorted(lines.values(), key=lambda line: (
        line["method"], isinstance(line["K"], str) or -line["K"]))


def main(args: list[str]) -> list[dict]:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="predictions files, or a folder above them")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of table and picture")
    options = parser.parse_args(args)
    runs.writable(options.out)
    lines = measure_spread(options.folder)
    text = tables.spread_table(lines)
    print(text)
    runs.write_text(options.out / "spread.md", text + "\n")
    first = lines[0]["method"]
    benchmark = next(iter(lines[0]["spread"]))
    spreads = {(line["method"], line["K"]): line["spread"][benchmark] for line in lines
               if line["method"] == first and benchmark in line["spread"]}
    draw_spread(spreads, options.out / "spread.png")
    return lines


if __name__ == "__main__":
    runs.command(main)
