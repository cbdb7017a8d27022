"""Trains and evaluates all that results/claims.md stands on; the same command again goes on.

    python -m measure.experiments --plan          what there is to do, and how long it takes
    python -m measure.experiments --jobs 2        all of it, two trainings at a time

claims_<paper>.py beside this file say what is trained: another paper is one more file. Runs go to
runs/claims/<vlm>/<setting>_s<seed>, their answers to results/claims/<table>.json.gz, from which
`python -m measure.claims` makes the page. A run whose method has been edited since is not taken: it
is trained again, or, where the edit was to change nothing, --prove trains its first steps again
and takes the run where their losses are the same.
"""

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import runs
from benchmarks import scores
from common import FrozenVLM
from measure.evidence import Table

RUNS = Path("runs/claims")
RESULTS = Path("results/claims")
VLMS = ("llava", "qwen2_5_vl")            # in tiny/
BUDGETS = (72, 48, 32, 16, 8, 4)
FEWER = (48, 32, 16, 8)                   # of settings that differ from another one by an option
RIVALS = ("random", "downsample", "cls_attention", "cdpruner_words", "divprune", "visionzip",
          "holov", "fastv")
FIRST = 5                                 # steps whose losses tell whether two codes train alike


@dataclass
class Asked:
    """options: of evaluate.py | table: into which answers go, which has its own questions |
    left_out: of a setting's K | alone: without the rivals, and without further ways"""
    options: str
    table: str
    left_out: tuple = ()
    alone: bool = False


ASKED = {                                 # {behind the names: what is asked}
    "": Asked("--sample 1000", "{vlm}"),
    " reindexed": Asked("--sample 1000 --positions reindex", "{vlm}", (48, 4), alone=True),
    " crowded": Asked("--sample 1000 --options tiny_world.split=crowded", "{vlm}_crowded", (48, 4)),
}
TABLES = tuple(dict.fromkeys(asked.table.format(vlm=vlm) for vlm in VLMS
                             for asked in ASKED.values()))


@dataclass
class Setting:
    """train: options of train.py | seeds: {vlm: how many} | ways: further ones that are evaluated
    | budgets: K of all | asked: of ASKED | measures: functions of (vlm, selector) -> {what: number}
    """
    train: str
    seeds: dict = field(default_factory=lambda: {"llava": 3})
    ways: str = ""
    budgets: tuple = BUDGETS
    asked: tuple = ("",)
    measures: tuple[Callable, ...] = ()


@dataclass
class Job:
    """One training."""
    vlm: str
    name: str
    seed: int
    setting: Setting

    @property
    def run(self) -> Path:
        return RUNS / self.vlm / f"{self.name}_s{self.seed}"

    def command(self, run: Path) -> list[str]:
        return [sys.executable, "train.py", *shlex.split(self.setting.train), "--model",
                f"tiny/{self.vlm}", "--seed", str(self.seed), "--run", str(run), "--evaluate",
                "False"]

    def made(self) -> dict:
        """What the run was made by: command and code."""
        about = runs.read_json(self.run / "config.json")
        return {"train": self.setting.train, "code": about["code"],
                "minutes": round(self.seconds() / 60, 1)}

    def state(self) -> str:
        """done, begun, stale (made by other code) or new."""
        if not (self.run / "config.json").exists():
            return "new"
        about = runs.read_json(self.run / "config.json")
        if about.get("code") != runs.code_of(about["method"]):
            return "stale"
        return "done" if (self.run / "selector/config.json").exists() else "begun"

    def seconds(self) -> float:
        """That its steps took, as far as they are logged; of a resumed run those since then."""
        log = self.run / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return json.loads(lines[-1])["seconds"] if lines else 0.


def papers() -> dict:
    """{name: module claims_<name>}."""
    return {path.stem.removeprefix("claims_"): importlib.import_module(f"measure.{path.stem}")
            for path in sorted(Path(__file__).parent.glob("claims_*.py"))}


def settings() -> dict[str, Setting]:
    return {name: setting for module in papers().values()
            for name, setting in module.SETTINGS.items()}


def jobs(only: str = "") -> list[Job]:
    """All trainings, seed by seed, so that what is there after a while has every setting. only: a
    regular expression that vlm/setting_s0 has to match. Raises ValueError for what is none, or
    matches nothing."""
    listed = [Job(vlm, name, seed, setting) for name, setting in settings().items()
              for vlm, seeds in setting.seeds.items() for seed in range(seeds)]
    try:
        chosen = [job for job in listed if re.search(only, str(job.run.relative_to(RUNS)))]
    except re.error as error:
        raise ValueError(f"only={only!r} is no regular expression: {error}") from error
    if not chosen:
        names = dict.fromkeys(f"{job.vlm}/{job.name}" for job in listed)
        raise ValueError(f"only={only!r} matches none of {', '.join(names)}")
    return sorted(chosen, key=lambda job: job.seed)


# ------------------------------------------------------------------------------------ training


def plan(listed: list[Job]) -> str:
    """A line a setting: the states of its seeds and the minutes of a run; and what is left."""
    lines, left, unknown = [], 0., 0
    for vlm, name in dict.fromkeys((job.vlm, job.name) for job in listed):
        mine = [job for job in listed if (job.vlm, job.name) == (vlm, name)]
        states = [job.state() for job in mine]
        known = [job.seconds() / 60 for job, state in zip(mine, states) if state == "done"]
        open_ones = sum(state != "done" for state in states)
        if known:
            left += open_ones * max(known)
        else:
            unknown += open_ones
        lines.append(f"{vlm:11} {name:22} {', '.join(states):32}"
                     + (f"{max(known):5.0f} minutes a run" if known else ""))
    return "\n".join([*lines, f"left: {left / 60:.1f} hours on one core, and {unknown} runs of "
                              "which none has ended yet"])


def train(listed: list[Job], at_once: int) -> None:
    """Those that are not done, a thread each where that fills the machine; of a stale one
    everything goes. Raises RuntimeError naming those that failed, after the others."""
    todo = [job for job in listed if job.state() != "done"]
    threads = str(max((os.cpu_count() or 1) // at_once, 1))
    running, failed = {}, []
    while todo or running:
        while todo and len(running) < at_once:
            job = todo.pop(0)
            if job.state() == "stale":
                shutil.rmtree(job.run)
            job.run.parent.mkdir(parents=True, exist_ok=True)
            with open(job.run.with_suffix(".txt"), "a") as said:
                process = subprocess.Popen(job.command(job.run), stdout=said, stderr=said,
                                           env={**os.environ, "OMP_NUM_THREADS": threads})
            running[process] = job
            print(f"{time.strftime('%H:%M')} begun: {job.run}, {len(todo)} to come", flush=True)
        time.sleep(1)
        for process in [process for process in running if process.poll() is not None]:
            job = running.pop(process)
            print(f"{time.strftime('%H:%M')} ended: {job.run}", flush=True)
            if process.returncode:
                failed.append(str(job.run))
    if failed:
        raise RuntimeError(f"{', '.join(sorted(failed))} failed: the .txt beside each says why; "
                           "the same command goes on")


def first_losses(run: Path) -> list[float]:
    lines = (run / "log.jsonl").read_text().splitlines()[:FIRST]
    return [json.loads(line)["loss"] for line in lines]


def prove(job: Job) -> bool:
    """Train the first steps of a finished run again, with the code as it is: where their losses are
    those of the run, to what another number of threads changes, it is taken for one of this code.
    """
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder, "run")
        process = subprocess.Popen(job.command(again), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
                (again / "log.jsonl").exists() and len(first_losses(again)) == FIRST):
            time.sleep(.2)
        process.kill()
        process.wait()
        pairs = list(zip(first_losses(job.run), first_losses(again), strict=True))
        about = runs.read_json(again / "config.json")
    is_same = all(abs(a - b) <= 1e-3 * abs(a) for a, b in pairs)
    print(f"{job.run}: losses of {FIRST} steps {'are' if is_same else 'are not'} those of this "
          f"code: {', '.join(f'{a:.4f} {b:.4f}' for a, b in pairs)}", flush=True)
    if is_same:
        for path in (job.run / "config.json", job.run / "selector/config.json"):
            there = runs.read_json(path) | {"code": about["code"]}
            runs.write_text(path, json.dumps(there, indent=1))
    return is_same


# ------------------------------------------------------------------------------------ answers


def measure(done: list[Job]) -> None:
    """What the settings' measures find, into measured.json of each run that has none."""
    for job in done:
        path = job.run / "measured.json"
        if job.setting.measures and not path.exists():
            vlm = FrozenVLM.from_pretrained(f"tiny/{job.vlm}", torch.float32)
            selector, _ = runs.load_selector(job.run, vlm)
            numbers = {}
            for measure in job.setting.measures:
                numbers |= measure(vlm, selector)
            runs.write_text(path, json.dumps(numbers, indent=1))


def ask(command: list[str], out: Path, asked: list[Path]) -> None:
    """The answers of those runs that this command has not answered in this folder yet: to steer a
    run again takes a minute, though no answer of it is missing."""
    path = out / "predictions/answered.json"
    there = runs.read_json(path) if path.exists() else {}
    known = there["weights"] if there.get("command") == command else {}
    weights = {str(run): hashlib.sha256(
        (run / "selector/model.safetensors").read_bytes()).hexdigest()[:16] for run in asked}
    new = [run for run in weights if known.get(run) != weights[run]]
    if new:
        subprocess.run([sys.executable, *command, "--out", str(out), "--run", *new], check=True)
        runs.write_text(path, json.dumps({"command": command, "weights": known | weights}))


def evaluate(done: list[Job]) -> None:
    """Answers of all runs that are done and of the rivals, into RESULTS."""
    tables = {}
    for vlm in dict.fromkeys(job.vlm for job in done):
        mine = [job for job in done if job.vlm == vlm]
        for suffix, how in ASKED.items():
            rivals = RIVALS[:1] if how.alone else RIVALS
            alike = {}                                     # runs that one command evaluates
            for job in mine:
                if suffix in job.setting.asked:
                    ways = "" if how.alone else job.setting.ways
                    alike.setdefault((job.setting.budgets, ways), []).append(job)
            for (budgets, ways), asked in alike.items():
                budgets = [str(k) for k in budgets if k not in how.left_out]
                out = RUNS / vlm / "_".join(["answers", *suffix.split(), *ways.split(), *budgets])
                command = ["evaluate.py", "--model", f"tiny/{vlm}", "--draw", "False", "--methods",
                           *rivals, "--budgets", *budgets, *shlex.split(how.options)]
                command += ["--ways", *ways.split()] * bool(ways)
                ask(command, out, [job.run for job in asked])
                rivals = RIVALS[:1]                        # the others have been asked
                files, _ = scores.complete_files(out / "predictions")
                known = {job.run.name for job in asked}
                files = {key: rows for key, rows in files["tiny_world"].items()
                         if "/" not in key[0] or key[0].split("/")[-1].split()[0] in known}
                tables.setdefault(how.table.format(vlm=vlm), []).append((suffix, files, asked))
    for name, parts in tables.items():
        (_, files, _), *_ = parts
        table = Table.of({key: rows for key, rows in files.items() if "/" not in key[0]})
        for suffix, files, _ in parts:
            table.add(files, "" if suffix == " crowded" else suffix)
        for job in {job.run: job for _, _, asked in parts for job in asked}.values():
            table.made[job.name] = job.made()
            numbers = job.run / "measured.json"
            for what, x in runs.read_json(numbers).items() if numbers.exists() else ():
                table.measured.setdefault((job.name, what), []).append(x)
        table.save(RESULTS / f"{name}.json.gz")


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and end")
    parser.add_argument("--prove", action="store_true", help="see above, of all stale runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--only", default="", help="a regular expression of runs, as vlm/name_s0")
    options = parser.parse_args(args)
    runs.check_options(options, jobs=1)
    listed = jobs(options.only)
    if options.prove:
        for job in listed:
            if job.state() == "stale" and (job.run / "selector/config.json").exists():
                prove(job)
    if not options.plan:
        train(listed, options.jobs)
        done = [job for job in jobs() if job.state() == "done"]
        measure(done)
        evaluate(done)
    print(plan(listed))


if __name__ == "__main__":
    runs.command(main)
