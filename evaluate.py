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
import json
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.hf_argparser import HfArg

import baselines
import benchmarks
import runs
from backbones.checkpoints import check_device
from benchmarks import answering, plots, scores, tables
from benchmarks.predictions import Predictions, file_name
from benchmarks.questions import draw_questions
from common import PROTOCOLS, FrozenVLM
from runs import many

MOST_AT_A_TIME = 32                     # questions, where memory is no matter [ours]


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
    calibration: int = HfArg(default=2000, help="most questions that steer an adaptive method to "
                             "K; they are not scored: what --sample leaves, else a tenth of all")
    batch: int = HfArg(default=0, help="questions at a time; 0: 32, or what fits into the memory")
    positions: Literal["original", "reindex"] = HfArg(
        default="original", help="of the kept tokens; reindex: numbered anew, as the released code "
                                 "of most rivals does")
    protocol: Literal[PROTOCOLS] = runs.protocol_option()
    backbone: str | None = HfArg(default=None, help="whose printed figures to show, see "
                                 "benchmarks/published.json; without it: by the model's name")
    rescore: str | None = HfArg(default=None, help="folder of predictions files: tables from these "
                                                   "alone, without a model")
    seed: int = HfArg(default=0, help="of samples, of random tokens and of the intervals")
    resamples: int = HfArg(default=1000, help="of the questions, for the intervals")
    out: str | None = HfArg(default=None, help="folder of tables and pictures; without it: that "
                                               "of the first run")
    draw: bool = HfArg(default=True, help="draw the curves and the kept patches")
    dtype: Literal["bfloat16", "float32", "float16"] = runs.dtype_option()
    device: str = runs.device_option()

    def __post_init__(self):
        runs.check_options(self, sample=0, calibration=1, batch=0, resamples=1, seed=0)
        wrong = [k for k in self.budgets if not 0 < k < 1e9 or (k >= 1 and k != int(k))]
        if wrong or not self.budgets:
            raise ValueError(f"budgets={wrong}: expected whole numbers of tokens, or shares "
                             "between 0 and 1")
        self.budgets = [int(k) if k >= 1 else k for k in self.budgets]
        if self.methods == ["all"]:
            self.methods = [name for name in baselines.names() if name != "evidence"]
        for name, given, known in (("methods", self.methods, baselines.names()),
                                   ("benchmarks", self.benchmarks, benchmarks.names()),
                                   ("backbone", [self.backbone], scores.published()["backbones"])):
            if unknown := sorted({*filter(None, given)} - {*known}):
                raise ValueError(f"{name}={unknown}: known are {', '.join(known)}")
        root = self.data_root
        if root and not any(Path(root, name).is_dir() for name in self.benchmarks):
            raise FileNotFoundError(f"data_root={root!r}: expected a folder of local copies that "
                                    f"holds {' or '.join(self.benchmarks)}")


# ---------------------------------------------------------------------------- what is asked


def settle(config: EvalConfig) -> None:
    """Fill in the runs, their model and the folder. Raises before a weight is read."""
    check_device(config.device, getattr(torch, config.dtype))
    if not config.run and not config.model:
        config.run = [runs.latest_run()]
    models = [runs.read_selector(run)[1]["training"]["model"] for run in config.run]
    config.model = config.model or models[0]
    first = Path(config.run[0] if config.run else config.model)
    run = first.parent if first.name == "selector" else first
    config.out = config.out or str(run if config.run and run.is_dir() else Path("runs", run.name))
    runs.writable(config.out)


def load_selectors(config) -> dict[str, runs.Selector]:
    """Those of config.run. Raises before a weight of the VLM is read."""
    shapes = FrozenVLM.from_pretrained(config.model, device="meta", protocol=config.protocol)
    selectors = {run: runs.load_selector(run, shapes, config.device)[0] for run in config.run}
    known = {name for selector in selectors.values() for name in selector.further_ways}
    runs.check_ways(config.ways, sorted(known))
    return selectors


def ways_of(config: EvalConfig, vlm, selectors: dict, calibration) -> tuple[dict, dict]:
    """{(name, K): Way, or None for all tokens}, {name: what its predictions depend on besides}.
    calibration: see runs.Selector.ways()."""
    named, weights = {}, {}
    for name in config.methods:
        try:
            named[name] = baselines.way(name, vlm, seed=config.seed)
        except ValueError as error:
            print(f"{name}: left out, {error}")
    for run, selector in selectors.items():
        known = [name for name in config.ways if name in selector.further_ways]
        for suffix, way in selector.ways(known, config.budgets, calibration).items():
            name = f"{run}{suffix}"
            named[name] = way
            content = (runs.read_selector(run)[0] / "model.safetensors").read_bytes()
            weights[name] = {"weights": hashlib.sha256(content).hexdigest()[:16]}
    turns = {scores.VANILLA: None}
    for name, way in named.items():
        for k in way.budgets or config.budgets:
            turns[name, k] = way
    return turns, weights


# ---------------------------------------------------------------------------- answers


def ask(config: EvalConfig) -> list[dict]:
    """Ask what has no answer yet, then report(). One benchmark's failure does not stop others."""
    settle(config)
    options = benchmarks.load_options(config.benchmarks, config.options)
    state = PartialState(cpu=not config.device.startswith("cuda"))
    device = state.device if state.num_processes > 1 else config.device
    selectors = load_selectors(replace(config, device=str(device)))
    if not any(selector.is_steered(config.ways) for selector in selectors.values()):
        runs.check_unread(config, ["calibration"], "a run that keeps as many as it is told")
    vlm = FrozenVLM.from_pretrained(config.model, getattr(torch, config.dtype), device,
                                    protocol=config.protocol)
    failed, asked = {}, []
    for name in config.benchmarks:
        try:
            asked.append(ask_benchmark(config, vlm, selectors, name, options[name], state))
        except (ValueError, OSError) as error:
            failed[name] = error
            print(f"{name}: left out, {error}")
    if len(failed) == len(config.benchmarks):
        raise next(iter(failed.values()))
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    out = Path(config.out)
    lines = report(config, out / "predictions", out)
    if config.draw and selectors:
        run, selector = next(iter(selectors.items()))
        ways, questions = asked[0]
        k = min(k for name, k in ways if name == run)
        answering.draw_kept(vlm, selector, ways[run, k], k, questions, out / "kept.png")
    print(f"\nintervals, parts, costs: {out}/benchmarks.md; pictures: "
          + ", ".join(sorted(path.name for path in out.glob("*.png"))))
    if failed:
        raise RuntimeError(f"the tables lack {', '.join(failed)}, see above; the same command "
                           "asks what is missing")
    return lines


def ask_benchmark(config: EvalConfig, vlm, selectors: dict, name: str, options: dict, state
                  ) -> tuple[dict, list]:
    """Answers to one benchmark, into its predictions files -> the ways, and the questions."""
    adaptive = any(selector.is_steered(config.ways) for selector in selectors.values())
    path = config.data_root and Path(config.data_root, name)
    asked, steering, where = draw_questions(
        benchmarks.load_module(name), path, vlm.family, options, config.sample,
        config.calibration if adaptive else 0, config.seed)

    def calibration():
        return answering.calibration_batches(vlm, steering, config.batch or MOST_AT_A_TIME)

    def file_of(method: str, k, way, weights: dict) -> Predictions:
        steered = {"steered on": where} if way and way.adaptive else {}
        header = {
            "benchmark": name, "model": config.model, "fingerprint": vlm.fingerprint(),
            "method": method, "budget": k, "protocol": vlm.protocol, "options": options,
            "positions": config.positions, "sample": config.sample, "seed": config.seed,
            "dtype": config.dtype, "questions": len(asked), **weights.get(method, {}), **steered,
            "versions": {package: version(package) for package in ("torch", "transformers")}}
        path = Path(config.out) / "predictions" / name / f"{file_name(method, k)}.jsonl"
        return Predictions(path, header, asked, state.process_index, state.num_processes)
    file_of(*scores.VANILLA, None, {})       # answers of something else? said before the steering
    ways, weights = ways_of(config, vlm, selectors, calibration)
    files = {(method, k): file_of(method, k, way, weights) for (method, k), way in ways.items()}
    batch = config.batch or answering.most_at_a_time(vlm, asked, ways, MOST_AT_A_TIME)
    batch = min(gather_object([batch]))
    try:
        answering.run(vlm, asked, ways, files, batch, config.seed, state.process_index,
                      state.num_processes, name, config.positions)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"out of memory with {batch} questions at a time: --batch "
                           f"{max(batch // 2, 1)} in the same folder goes on where it was"
                           ) from error
    return ways, asked


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


def main(args: list[str]) -> list[dict]:
    parser = runs.Parser(EvalConfig, description=__doc__)
    (config,) = parser.parse_args_into_dataclasses(args)
    if config.rescore:
        read = {"rescore", "out", "seed", "resamples", "backbone", "draw"}
        runs.check_unread(config, {option.name for option in fields(config)} - read, "--rescore")
        return report(config, Path(config.rescore), runs.writable(config.out or config.rescore))
    return ask(config)


if __name__ == "__main__":
    runs.command(main)
