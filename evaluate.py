"""What a selection keeps, and what that costs: `python evaluate.py` on the latest run.

    questions of benchmarks         the tiny world's, unless told otherwise
    -> answers                      with all visual tokens, and with K that each method chooses
    -> predictions files            one a method and K: a killed run goes on where it was, and
                                    `accelerate launch evaluate.py ...` shares one among GPUs
    -> scores, intervals, costs     from the predictions alone: --rescore makes the tables again
    -> tables and pictures          in --out

Retention is the score in percent of the score with all tokens on the same questions; over several
benchmarks it is the mean, which is the papers' Avg.
"""

import hashlib
import inspect
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers.hf_argparser import HfArg

import baselines
import benchmarks
import runs
from benchmarks import answering, plots, protocol, scores, tables
from benchmarks.predictions import Predictions, file_name
from benchmarks.questions import sample
from common import FrozenVLM

CALIBRATION = "tiny_world"              # whose calibration split adaptive methods are steered on


def many(default: list, text: str):
    return field(default_factory=lambda: list(default), metadata={"help": text})


@dataclass
class EvalConfig:
    run: list[str] = many([], "run folders, selectors' folders or hub ids; names that differ in a "
                              "last _s0, _s1 are seeds of one; without --model: the latest run")
    model: str | None = HfArg(default=None, help="the frozen VLM; without it: the first run's own")
    methods: list[str] = many(["random", "cls_attention"], "baselines beside the runs; all: each "
                              "but evidence: " + ", ".join(baselines.names()))
    ways: list[str] = many([], "further ways to evaluate the runs' methods, such as exactly or "
                               "gated; a method's file says which")
    budgets: list[float] = many([48, 32, 16], "K, kept tokens, or below 1 a share of each "
                                "picture's; their mean where the method decides how many")
    benchmarks: list[str] = many(["tiny_world"], ", ".join(benchmarks.names()))
    sample: int = HfArg(default=0, help="questions of each benchmark, drawn at random, "
                               "of the tiny world the first; 0: all, of the tiny world 1000")
    data_root: str | None = HfArg(default=None, help="folder with a local copy of each benchmark, "
                                                     "under its name; without it: from the hub")
    options: list[str] = many([], "of a benchmark's load(), such as pope.split=random")
    calibration: int = HfArg(default=2000, help="questions that steer an adaptive method to K")
    batch: int = HfArg(default=32, help="questions at a time")
    positions: Literal["original", "reindex"] = HfArg(
        default="original", help="of the kept tokens; reindex: numbered anew, as the released code "
                                 "of most rivals does")
    pad: Literal["auto", "square", "none"] = HfArg(
        default="auto", help="pictures to a square, as LLaVA-1.5 does; auto: for its family alone")
    style: Literal["checkpoint", "vicuna_v1"] = HfArg(
        default="checkpoint", help="the checkpoint's chat template, or LLaVA-1.5's own with its "
                                   "first sentence [paper: vicuna_v1]")
    backbone: str | None = HfArg(default=None, help="whose printed figures to show, see "
                                 "benchmarks/published.json; without it: by the model's name")
    rescore: str | None = HfArg(default=None, help="folder of predictions files: tables from these "
                                                   "alone, without a model")
    seed: int = HfArg(default=0, help="of samples, of random tokens and of the intervals")
    resamples: int = HfArg(default=1000, help="of the questions, for the intervals")
    out: str | None = HfArg(default=None, help="folder of tables and pictures; without it: that "
                                               "of the first run")
    draw: bool = HfArg(default=True, help="draw the curves and the kept patches")
    dtype: Literal["bfloat16", "float32", "float16"] = HfArg(default="bfloat16",
                                                             help="of the frozen VLM")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")

    def __post_init__(self):
        wrong = [k for k in self.budgets if not k > 0 or (k >= 1 and k != int(k))]
        if wrong or not self.budgets:
            raise ValueError(f"budgets={wrong}: expected whole numbers of tokens, or shares "
                             "between 0 and 1")
        self.budgets = [int(k) if k >= 1 else k for k in self.budgets]
        if self.methods == ["all"]:
            self.methods = [name for name in baselines.names() if name != "evidence"]
        for name, given, known in (("methods", self.methods, baselines.names()),
                                   ("benchmarks", self.benchmarks, benchmarks.names())):
            if unknown := sorted({*given} - {*known}):
                raise ValueError(f"{name}={unknown}: known are {', '.join(known)}")


# ---------------------------------------------------------------------------- what is asked


def settle(config: EvalConfig) -> None:
    """Fill in the runs, their model and the folder. Raises before anything is loaded."""
    if not config.run and not config.model:
        config.run = [runs.latest_run()]
    models = [runs.read_selector(run)[1]["training"]["model"] for run in config.run]
    config.model = config.model or models[0]
    default = config.run[0] if config.run and Path(config.run[0]).is_dir() else None
    config.out = config.out or default or f"runs/{Path(config.model).name}"


def load_questions(config: EvalConfig, name: str, family: str, options: dict) -> list:
    """The questions of a benchmark, or a sample of them."""
    module = benchmarks.load_module(name)
    n = config.sample or None
    if "n" in inspect.signature(module.load).parameters:        # it draws as many as are wanted
        return list(module.load(None, family=family, **{"n": n or 1000, **options}))
    path = Path(config.data_root, name) if config.data_root else None
    return sample(module.load(path, family=family, **options), n, config.seed, scores.group)


def ways_of(config: EvalConfig, vlm) -> tuple[dict, dict, dict]:
    """{(name, K): Way, or None for all tokens}, {name: what its predictions depend on besides},
    {run: (selector, its Way)}."""
    named, weights, trained = {}, {}, {}
    unknown_ways = {*config.ways}
    for name in config.methods:
        try:
            named[name] = baselines.way(name, vlm, seed=config.seed)
        except ValueError as error:
            print(f"{name}: left out, {error}")

    def calibration():
        """(units, question) in batches, of questions that are not scored."""
        questions = benchmarks.load_module(CALIBRATION).load(
            split="calibration", family=vlm.family, n=config.calibration)
        return answering.calibration_batches(vlm, questions, config.batch)
    for run in config.run:
        selector, about = runs.load_selector(run, vlm)
        known = [name for name in config.ways if name in selector.further_ways]
        own = selector.ways(known, config.budgets, calibration)
        unknown_ways -= {*known}
        trained[run] = (selector, own[""])
        for suffix, way in own.items():
            name = f"{run}{suffix}"
            named[name] = way
            content = (runs.read_selector(run)[0] / "model.safetensors").read_bytes()
            weights[name] = {"weights": hashlib.sha256(content).hexdigest()[:16],
                             "calibration": config.calibration if way.adaptive else None}
    if unknown_ways:
        raise ValueError(f"ways={sorted(unknown_ways)}: none of the runs has such a way")
    turns = {scores.VANILLA: None}
    for name, way in named.items():
        for k in way.budgets or config.budgets:
            turns[name, k] = way
    return turns, weights, trained


# ---------------------------------------------------------------------------- answers


def ask(config: EvalConfig) -> list[dict]:
    """Ask what has no answer yet, then report()."""
    settle(config)
    options = benchmarks.load_options(config.benchmarks, config.options)
    state = PartialState(cpu=not config.device.startswith("cuda"))
    device = state.device if state.num_processes > 1 else config.device
    vlm = FrozenVLM.from_pretrained(config.model, getattr(torch, config.dtype), device)
    protocol.use_style(vlm, config.style)
    config.pad = protocol.default_pad(vlm) if config.pad == "auto" else config.pad
    prepare = protocol.prepare(vlm, config.pad)

    # load every benchmark first, so that a missing one fails at once
    questions = {name: load_questions(config, name, vlm.family, options[name])
                 for name in config.benchmarks}
    turns, weights, trained = ways_of(config, vlm)
    out = Path(config.out)
    for name, asked in questions.items():
        files = {}
        for method, k in turns:
            header = {
                "benchmark": name, "model": config.model, "fingerprint": vlm.fingerprint(),
                "method": method, "budget": k, "style": config.style, "pad": config.pad,
                "options": options[name], "positions": config.positions,
                "sample": config.sample, "seed": config.seed, "dtype": config.dtype,
                "questions": len(asked), **weights.get(method, {}),
                "versions": {package: version(package) for package in ("torch", "transformers")}}
            path = out / "predictions" / name / f"{file_name(method, k)}.jsonl"
            files[method, k] = Predictions(path, header, asked, state.process_index,
                                           state.num_processes)
        answering.run(vlm, asked, turns, files, batch=config.batch, prepare=prepare,
                      seed=config.seed, process=state.process_index,
                      processes=state.num_processes, title=name, positions=config.positions)
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    lines = report(config, out / "predictions", out)
    if config.draw and trained:
        first = next(iter(questions.values()))
        draw_kept(config, vlm, prepare, *next(iter(trained.values())), first, out / "kept.png")
    print(f"\nintervals, parts, costs: {out}/benchmarks.md; pictures: "
          + ", ".join(sorted(path.name for path in out.glob("*.png"))))
    return lines


# ---------------------------------------------------------------------------- tables, pictures


def report(config: EvalConfig, folder: Path, out: Path) -> list[dict]:
    """Tables and curves of the complete predictions files in a folder, into `out`."""
    files, header = scores.complete_files(folder)
    lines = scores.summarise(files, config.seed, config.resamples)
    quoted = scores.printed(lines, config.backbone or scores.backbone(header["model"]))
    print(f"\n{tables.opening(lines, quoted)}")
    numbers = {"header": header, "lines": lines, "printed": quoted}
    runs.write_text(out / "benchmarks.json", json.dumps(numbers, indent=1))
    for name, text in (("benchmarks", tables.report(lines, quoted, header)),
                       ("table", tables.headline(lines)), ("summary", tables.summary(lines))):
        runs.write_text(out / f"{name}.md", text + "\n")
    card = out / "selector/README.md"
    if card.exists():
        tables.refresh(card)
    if config.draw:
        kinds = {name: baselines.kind(name) for name in baselines.names()}
        plots.draw_budgets(lines, kinds, out / "curve.png")
    return lines


@torch.no_grad()
def draw_kept(config, vlm, prepare, selector, way, questions, path: Path) -> None:
    """Six pictures with their scores and kept patches, at the smallest budget."""
    if way.select is None or way.stages is not None:
        return                                  # it selects inside the language model
    few = list({answering.content(question): question for question in questions[:60]}.values())[:6]
    asked = answering.ask(vlm, few, prepare, way)
    k = min(way.budgets or config.budgets)
    keep = answering.choose(way, asked, k)[0]
    heat = selector.scores(asked.units, asked.question)
    orders = plots.by_score(asked.units, heat, keep) if way.reads_question else None
    titles = [question.prompt for question in few]
    plots.draw_units(vlm, asked.batch, asked.units, heat, keep, titles, path, orders)


def main(args: list[str]) -> list[dict]:
    parser = runs.Parser(EvalConfig, description=__doc__)
    (config,) = parser.parse_args_into_dataclasses(args)
    if config.rescore:
        return report(config, Path(config.rescore), Path(config.out or config.rescore))
    return ask(config)


if __name__ == "__main__":
    runs.command(main)
