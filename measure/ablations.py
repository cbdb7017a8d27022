"""A method's ablations in one table, beside what its paper prints.

    python -m measure.ablations stepprune

Reads results/ablations/<method>/<variant>/benchmarks.json, as evaluate.py writes it for runs that
are named like the variant, and results/<method>_tiny/benchmarks.json of the method itself. Writes
results/ablations/<method>.md: retention, mean over seeds, and what each variant loses. The papers'
figures are of another model and other questions: compare directions only.
"""

from pathlib import Path

import runs
from benchmarks import tables


def main(args: list[str]) -> str:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("method", help="as its results are named")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results")
    options = parser.parse_args(args)
    folder = options.results / "ablations" / options.method
    variants = sorted(path for path in folder.glob("*") if path.is_dir())
    if not variants:
        raise FileNotFoundError(f"method={options.method!r}: {folder} holds no variants; expected "
                                "a folder for each, with the benchmarks.json of evaluate.py")
    for path in (options.results / f"{options.method}_tiny", *variants):
        if not (path / "benchmarks.json").exists():
            raise FileNotFoundError(f"{path} has no benchmarks.json: evaluate its runs with "
                                    f"python evaluate.py --out {path} --run ...")
        name = options.method if path not in variants else path.name
        runs.read_json(path / "benchmarks.json")
        if "" not in tables.retentions(path / "benchmarks.json", name):
            raise ValueError(f"{path}/benchmarks.json has no run that is named like {name}_s0")
    text = tables.ablations(options.method, options.results)
    print(text)
    runs.write_text(folder.with_suffix(".md"), text + "\n")
    return text


if __name__ == "__main__":
    runs.command(main)
