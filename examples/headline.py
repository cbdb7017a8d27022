"""A paper's main table by one command: `python -m examples.headline METHOD --images ...`.

    plan      what is trained and asked, downloads, disk, hours; with --plan it ends here
    check     measure.check on this model and device, a minute; its times make the hours
    train     train.py with the paper's settings, into OUT/METHOD
    evaluate  evaluate.py on the table's benchmarks and budgets, with the rivals that it prints
    table     ours with the printed rows below, and all that differs from the paper: OUT/headline.md

Killed, the same command goes on where it was. Data and deviations stand in the method's HEADLINE;
benchmarks, budgets and rivals are those of its printed table, benchmarks/published.json, for this
backbone. A rehearsal is the same command on a small model, with --steps and --sample.
"""

import json
import math
import re
import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

import baselines
import benchmarks
import evaluate
import runs
import train
from backbones.checkpoints import check_device, read_config
from benchmarks import scores
from data.pictures import find
from data.sets import chosen, to_copy
from examples.downloads import sizes
from measure import check

# questions of the splits that are asked, as their benchmarks document them
QUESTIONS = dict(ai2d=3088, chartqa=2500, docvqa=5349, gqa=12578, infovqa=2801, mmbench=4329,
                 mmbench_cn=4329, mme=2374, mmmu=900, pope=9000, scienceqa=2017, seed_all=17990,
                 textvqa=5000, vizwiz=4319, vqav2=214354)


@dataclass
class HeadlineConfig:
    model: str | None = HfArg(default=None, help="the frozen VLM; without it: the paper's")
    backbone: str | None = HfArg(default=None, help="whose printed table, as published.json names "
                                 "it; without it: by the model's name, else the paper's first")
    images: str | None = HfArg(default=None, help="folder of training pictures, see train.py")
    data_root: str | None = HfArg(default=None, help="folder with a local copy of each benchmark; "
                                                     "without it: from the hub")
    out: str | None = HfArg(default=None, help="folder; without it: runs/headline/METHOD")
    steps: int = HfArg(default=0, help="of training; 0: as many as the method's settings say")
    sample: int = HfArg(default=20_000, help="most questions of a benchmark, drawn at random; in "
                                             "the papers' tables only VQAv2 has more")
    device: str = HfArg(default=evaluate.EvalConfig.device, help="cpu, cuda or cuda:1")
    train: str = HfArg(default="", help='more options of train.py, in quotes: "--path coco"')
    evaluate: str = HfArg(default="", help='more options of evaluate.py: "--budgets 64"')
    plan: bool = HfArg(default=False, help="say what would be done, and end")
    despite: bool = HfArg(default=False, help="go on although a check failed: random weights")

    def __post_init__(self):
        runs.check_options(self, steps=0, sample=1)
        check_device(self.device, torch.float32)
        if self.backbone and self.backbone not in scores.published()["backbones"]:
            raise ValueError(f"backbone={self.backbone!r}: known are "
                             f"{', '.join(scores.published()['backbones'])}")
        if self.images and not (Path(self.images).is_dir() and find(Path(self.images))):
            raise FileNotFoundError(f"images={self.images!r}: expected a folder with pictures")
        for name in ("train", "evaluate"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}={getattr(self, name)!r}: {error}") from error


def printed_table(module, backbone: str | None) -> dict:
    """The paper's table of this backbone, else of its own model: published.json's, and "own", the
    method's rows. Raises ValueError where there is none."""
    for wanted in (backbone, scores.backbone(module.HEADLINE["model"])):
        for table in scores.published()["tables"]:
            own = [row for row in table["rows"] if isinstance(row["budget"], (int, float))
                   and scores.is_method(f"runs/{module.__name__}", row["ours"])]
            if own and wanted in table["backbones"]:
                return {**table, "own": own}
    raise ValueError(f"{scores.PRINTED.name} has no table of {module.__name__}: expected one for "
                     f"{module.HEADLINE['model']}, with rows that name it as 'ours'")


def commands(config: HeadlineConfig, module, table: dict) -> tuple[list[str], list[str]]:
    """The arguments of train.py and of evaluate.py."""
    def flags(options: dict) -> list[str]:
        return [str(word) for name, value in options.items() if value
                for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]
    both = dict(run=f"{config.out}/{module.__name__}", model=config.model, device=config.device)
    names = [row["ours"] or row["method"].split()[0].lower() for row in table["rows"]]
    asked = [name for row in table["own"] for name in row["scores"]]
    given = shlex.split(config.train)
    trained = dict(method=module.__name__, evaluate="False", images=config.images,
                   steps=config.steps)
    if not any(word.startswith("--data") for word in given):     # then --take is of other data
        trained |= module.HEADLINE["train"]
    evaluated = dict(
        methods=[name for name in dict.fromkeys(names) if name in baselines.names()],
        benchmarks=[name for name in dict.fromkeys(asked) if name in benchmarks.names()],
        budgets=sorted({row["budget"] for row in table["own"]}, reverse=True),
        sample=config.sample, out=config.out, data_root=config.data_root, backbone=config.backbone)
    return (flags(both | trained) + given,
            flags(both | evaluated) + shlex.split(config.evaluate))


# ------------------------------------------------------------------------------------ the plan


def settings(module, options, preset: dict) -> str:
    """The method's options and their values, by whose they are, as their help says."""
    groups = {}
    for option in fields(options):
        default = option.default_factory() if option.default is MISSING else option.default
        value, text = getattr(options, option.name), option.metadata["help"]
        whose = "value not available" if "value not available" in text else re.search(
            r"(?<=\[)(paper|ours)|$", text)[0]
        if value != preset.get(option.name, default):
            whose = "given here"
        shown = [round(x, 3) for x in value] if isinstance(value, list) else value
        groups.setdefault(whose, []).append(f"{option.name}={shown}")
    return "; ".join(f"[{whose}] {', '.join(names)}" for whose, names in groups.items())


def in_folder(part) -> int:
    """Pictures in the folder of a data set of train.py, 0 where it has none."""
    folder = part.path or part.data == "folder" and part.images
    return len(find(Path(folder))) if folder and Path(folder).is_dir() else 0


def plan(config: HeadlineConfig, module, table: dict, words: tuple) -> tuple[list[str], dict]:
    """What will be done, as lines, and numbers of it."""
    trained, options = train.parse(words[0])
    (asked,) = runs.Parser(evaluate.EvalConfig).parse_args_into_dataclasses(words[1])
    preset = runs.preset(module, read_config(config.model).vision_config.hidden_size)
    parts = chosen(trained)
    counts = [part.count(in_folder(part)) for part in parts]
    rows = sum(counts) if all(counts) else module.HEADLINE.get("pictures", 0)
    names = [f"{part.take:,g} of {part.data}" if part.take else part.data for part in parts]
    steps = trained.steps or math.ceil(trained.epochs * rows / trained.batch)
    most = {name: min(asked.sample or math.inf, QUESTIONS.get(name, asked.sample))
            for name in asked.benchmarks}
    backbone = asked.backbone or scores.backbone(config.model)
    lines = [
        f"- printed: {table['source']}, on {' and '.join(table['backbones'])}" + (
            f"; of {config.model} there is none, --backbone says which it is"
            if backbone not in table["backbones"] else ""),
        f"- train: {steps:,} steps of {trained.batch} pictures of {', '.join(names)} = "
        f"{steps * trained.batch:,}, learning rate {trained.lr:g}, into {trained.run}",
        f"- settings: {settings(module, options, preset)}",
        f"- ask: {', '.join(f'{name} {n:,}' for name, n in most.items())} questions, with all "
        f"tokens and with {', '.join(map(str, asked.budgets))} of {module.__name__}, "
        f"{', '.join(asked.methods)}",
        *sizes(trained, asked)]
    lines += [f"- by hand: the pictures of {part.data}, in --images {part.images}"
              for part in parts if part.kind(True) == "dialogues"]
    if copied := to_copy(parts):
        lines.append(f"- by hand: copies of {', '.join(copied)}, in --train '--path ...'")
    return lines, {"pictures": steps * trained.batch, "asked": most, "budgets": asked.budgets,
                   "ways": len(asked.methods) + 1}


def measured(config: HeadlineConfig, run: bool) -> list[dict]:
    """The lines of measure.check on this model and device; [] if it has not run and is not to."""
    path = Path(config.out, "check.json")
    words = [config.model, "--device", config.device, "--out", config.out]
    report = json.loads(path.read_text()) if path.exists() else {"command": "", "lines": []}
    good = config.despite or all(line["passed"] is not False for line in report["lines"])
    if report["command"].endswith(" ".join(words)) and good:
        return report["lines"]
    if not run:
        return []
    try:
        return check.main(words)
    except RuntimeError as error:
        if not (config.despite and path.exists()):
            raise RuntimeError(f"{error}; --despite goes on all the same") from error
    return json.loads(path.read_text())["lines"]


def hours(lines: list[dict], method: str, counts: dict) -> str:
    """Of training and of answering, from measure.check's times of one picture and one question."""
    numbers = {line["name"]: line["numbers"] for line in lines}
    times = numbers.get("times")
    if not times:
        return "- hours: unknown before the check, which comes first"
    step = numbers["memory"].get(method, {}).get("seconds_per_picture")
    low, high = times["K"], times["units"]
    few, many = [times[f"prefill of {n}"] + 3 * times.get(f"a token behind {n}", 0)
                 for n in (low, high)]                 # and three tokens of an answer
    spent = times["vision"] + many
    for k in counts["budgets"]:                        # between the two that were measured
        k = min(k * high if k < 1 else k, high)
        spent += counts["ways"] * (few + (many - few) * (k - low) / max(high - low, 1))
    train = f"{counts['pictures'] * step / 3600:.3g}" if step else "unknown, no step was timed"
    asked = sum(counts["asked"].values()) * spent / 3.6e6
    return f"- hours: training {train}; answering {asked:.3g}, less as questions go in batches"


def deviations(config: HeadlineConfig, module, counts: dict) -> list[str]:
    """All that differs from the paper: data and settings, what is asked, what a printed figure is
    of, and the end of the method's docstring."""
    lines = [*module.HEADLINE["deviations"]]
    lines += [f"--{name} {value}: given by hand" for name in ("steps", "train", "evaluate")
              if (value := getattr(config, name))]
    lines += [f"{name}: {n:,} of {QUESTIONS[name]:,} questions, drawn at random"
              for name, n in counts["asked"].items() if n < QUESTIONS.get(name, 0)]
    lines.append("one seed; the rivals are ours, from their papers' formulas (baselines/README.md)")
    lines += [flag["text"] for flag in scores.published()["flags"].values()
              if {*flag["columns"]} & {*counts["asked"]}]
    _, _, own = module.__doc__.partition("What differs from the paper")
    lines += re.findall(r"^- (.*(?:\n  .*)*)", own, re.M)
    return [f"- {' '.join(line.split())}" for line in lines]


def main(args: list[str]) -> None:
    parser = runs.Parser(HeadlineConfig, description=__doc__)
    parser.add_argument("method", help="as in train.py, of those whose file has a HEADLINE")
    config, rest = parser.parse_args_into_dataclasses(args)
    module = runs.load_method(rest.method)
    name = module.__name__
    if not hasattr(module, "HEADLINE"):
        raise ValueError(f"{name}.py has no HEADLINE: expected model, train and deviations behind "
                         "LARGE, as in the methods of this project")
    config.model = config.model or module.HEADLINE["model"]
    config.out = config.out or f"runs/headline/{name}"
    runs.writable(config.out)
    table = printed_table(module, config.backbone or scores.backbone(config.model))
    words = commands(config, module, table)
    lines, counts = plan(config, module, table, words)
    before = hours(measured(config, run=False), name, counts)
    lines = [f"# {name} on {config.model}", "", *lines, before]
    print("\n".join(lines), flush=True)
    if config.plan:
        return

    lines[-1] = hours(measured(config, run=True), name, counts)
    print(lines[-1], flush=True)
    train.main(words[0])
    evaluate.main(words[1])

    differs = ["## What differs from the paper", "", *deviations(config, module, counts)]
    pages = [Path(config.out, "benchmarks.md").read_text(encoding="utf-8"), "\n".join(differs)]
    runs.write_text(Path(config.out, "headline.md"), "\n\n".join(["\n".join(lines), *pages]) + "\n")
    print("\n".join(["", *differs, "", f"all of this: {config.out}/headline.md; "
                                      f"the selector: {config.out}/{name}/selector"]))


if __name__ == "__main__":
    runs.command(main)
