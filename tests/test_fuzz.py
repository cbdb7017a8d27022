"""Bad input to every command, made from the command's own options: it ends in one line that the
project wrote, with exit code 2, or it works.

    python -m pytest tests/test_fuzz.py -s        prints what became of how many

Every command runs in this process as it does from a shell, up to where it would read weights, make
a model or draw a scene: what comes so far is accepted. Which values have to be refused follows from
an option's type, choices and name; ZERO and BELOW name the numbers that mean something there.
"""

import argparse
import io
import json
import runpy
import signal
import subprocess
import sys
import traceback
import types
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

import runs
from common import FrozenVLM
from measure import shapes
from measure.evidence import Table
from tiny import scenes

ROOT = Path(__file__).resolve().parents[1]
RUN = "results/autoselect_tiny/selector"
RECON = "results/recon_tiny/selector"
CPU = ["--device", "cpu"]
LONG = 60                             # seconds until a command that never ends is given up
# of each command, what is accepted; {...}: of the fixture `places`
BASES = {
    "train.py autoselect": ["--method", "autoselect", "--run", "{new}", "--steps", "2", *CPU],
    "train.py stepprune": ["--method", "stepprune", "--run", "{new}", "--steps", "2", *CPU],
    "train.py recon": ["--method", "recon", "--run", "{new}", "--images", "{pictures}", *CPU],
    "evaluate.py": ["--run", RUN, "--out", "{new}", *CPU],
    "evaluate.py rescore": ["--rescore", "{answers}", "--out", "{new}", "--draw", "False",
                            "--resamples", "10"],
    "examples/answer.py": ["--image", "{picture}", "--question", "what ?", "--run", RUN, "--out",
                           "{new}", *CPU],
    "examples/headline.py": ["autoselect", "--model", "tiny/llava", "--images", "{pictures}",
                             "--out", "{new}", *CPU],
    "examples/run_lmms_eval.py": ["--tasks", "pope", "--run", RUN],
    "exercises/__main__.py": ["autoselect", "--file", "{new}.py"],
    "exercises/__main__.py check": ["check", "autoselect", "--file", "autoselect.py"],
    "measure/claims.py": ["--results", "{results}"],
    "measure/check.py": ["tiny/llava", "--out", "{new}", *CPU],
    "measure/classify.py": ["tiny/vit", "--run", RUN, "--out", "{new}", *CPU],
    "measure/entered.py": ["{script}"],
    "measure/experiments.py": ["--only", "llava/half_s0"],
    "measure/flops.py": ["--out", "{new}/flops.md"],
    "measure/gpu.py": ["llava-1.5-7b", "--shrink", "--out", "{new}/gpu", *CPU],
    "measure/likeness.py": ["--run", RUN, "--out", "{new}/likeness.png", *CPU],
    "measure/question_reading.py": ["--run", "{conditional}", "--out", "{new}", *CPU],
    "measure/rebuild.py": ["--run", RECON, "--out", "{new}", *CPU],
    "measure/rivals_speed.py": ["--methods", "divprune", "--tokens", "9", "--batches", "1",
                                "--pairs", "1", "--out", "{new}/speed.md", *CPU],
    "measure/shapes.py": ["llava-1.5-7b", "{new}"],
    "measure/speed.py": ["--out", "{new}/speed", *CPU],
    "measure/spread.py": ["{answers}", "--out", "{new}"],
    "measure/training_curves.py": ["{logged}", "--out", "{new}/curves.png"],
    "page/export.py": ["--run", RUN, "--out", "{new}", "--runtime", "False"],
    "page/timing.py": ["--site", "{built}"],
    "tiny/benchmarks.py": ["{new}"],
    "tiny/classifier.py": ["--out", "{new}"],
    "tiny/pretrain.py": ["--model", "llava", "--out", "{new}"],
}
LONG_ONES = {"measure/gpu.py", "measure/speed.py"}
READ = {"run", "model", "image", "images", "path", "data_root", "rescore", "classifier", "labels",
        "results", "against", "script", "runs", "site", "measure/spread.py folder"}
WRITTEN = {"out", "cache_features", "dir", "file", "train.py run", "measure/shapes.py folder"}
# numbers for which 0 or -1 mean something, besides 0 as the default or as the help explains it
ZERO = {"workers", "lr", "text", "image_layers", "hops", "gamma", "momentum", "keep_low", "alpha1",
        "alpha2", "length_weight", "length_weight_end", "text_steps"}
BELOW = {"hops"}
# combinations that cannot be
TOGETHER = {
    "train.py autoselect": [
        "--path {pictures}", "--split train", "--prompt why", "--n_pictures 5",
        "--data coco --path {nowhere}", "--data folder", "--images {pictures}", "--heads 3",
        "--batch 6 --micro 4", "--push nobody", "--push a/b/c", "--push user/new", "--steps 0",
        "--epochs 1 --questions 3", "--data llava-665k --n_pictures 5", "--images x",
        "--data coco docvqa --path {pictures}", "--data scenes coco --path - {nowhere}",
        "--data scenes docvqa --epochs 1 --take 1.5 0", "--images {pictures} x --split a -",
        "--method nothing", "--run {damaged}", "--run {results}", "--model {pictures}"],
    "train.py stepprune": ["--prompt why", "--heads 5"],
    "train.py recon": ["--prompt why", "--questions 3", "--n_pictures 5", "--keep_low .9",
                       "--select_after_layer 2", "--select_after_layer 99", "--split x"],
    "evaluate.py": [
        "--budgets 0.5 1.5", "--budgets nan", "--ways nothing", "--ways exactly", "--backbone x",
        "--options pope.split", "--options tiny_world.x=1", "--calibration 7",
        "--data_root {pictures}", "--model tiny/qwen2_5_vl", "--methods all random"],
    "evaluate.py rescore": ["--methods random", "--budgets 16", "--run x", "--model tiny/llava",
                            "--rescore {pictures}"],
    "examples/headline.py": [
        "--train=--colour", "--train=--steps", "--evaluate=--budget", "--train='",
        "--train=--steps=-2", "--evaluate=--budgets=0", "--sample 5 --steps -2"],
    "examples/run_lmms_eval.py": ["--run a b", "--methods random fastv", "--ways nothing"],
    "exercises/__main__.py": ["--only softmax", "--limit 5", "--file {script}"],
    "exercises/__main__.py check": ["--only softmax", "--overwrite", "--file {damaged}/log.jsonl"],
    "measure/experiments.py": ["--only nobody", "--only (", "--jobs 0"],
    "measure/gpu.py": ["--options layers", "--options x=0", "--options layers=0",
                       "--options gate=wide"],
    "measure/classify.py": ["--images {pictures}", "--labels {damaged}/config.json"],
    "measure/question_reading.py": ["--run " + RUN],
    "measure/rebuild.py": ["--run " + RUN],
    "measure/rivals_speed.py": ["--methods fastv pope", "--methods cls_attention"],
    "measure/likeness.py": ["--run {conditional}"],
    "measure/speed.py": ["--picks 99 --tokens 50", "qwen3-vl-8b", "nothing", "--options x=0"],
    "tiny/pretrain.py": ["--batch 3", "--language_batch 7", "--pool 65"],
}


shapes_of = cache(FrozenVLM.from_pretrained)       # on the meta device: hundreds of cases read them


class Accepted(BaseException):
    """The command has come to where the work begins."""


class Captured(BaseException):
    """Carries a command's parser."""


class Endless(BaseException):
    """The command has not come to an end, nor to its work."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders that commands are given, good and bad."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("empty", "damaged", "pictures", "answers", "logged", "built"):
        (root / name).mkdir()
    for name in ("config.json", "model.safetensors", "benchmarks.json", "log.jsonl"):
        (root / "damaged" / name).write_text("{")
    (root / "built/world.json").write_text("{}")
    (root / "file").write_text("{")
    (root / "script.py").write_text("def f():\n    return 1\nf()\n")
    (root / "logged/log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    picture = root / "pictures/picture.png"
    Image.new("RGB", (144, 144)).save(picture)
    table = Table(np.array(["exist"]), np.array([1]), {("vanilla", 0): np.array([[True]])},
                  {("vanilla", 0): np.array([[True]])}, {("vanilla", 0): np.array([[144]])})
    table.save(root / "results/llava.json.gz")
    for method, k, kept in (("vanilla", 0, (144, 144)), ("runs/one", 22, (1, 63))):
        header = {"benchmark": "tiny_world", "model": "tiny/llava", "method": method, "budget": k,
                  "questions": 2, "positions": "original", "protocol": "papers"}
        rows = [{"number": i, "id": str(i), "prompt": "?", "answer": "yes", "kept": n,
                 "gold": {"family": "exist", "answer": "yes", "things": i}, "seen": [n] * 3,
                 "flops": 1, "ms": dict.fromkeys(("vision", "select", "prefill", "decode"), 1.)}
                for i, n in enumerate(kept)]
        text = "".join(json.dumps(line) + "\n" for line in (header, *rows))
        (root / f"answers/{method.replace('/', ' ')}.jsonl").write_text(text)
    shape = FrozenVLM.from_pretrained("tiny/llava", device="meta")
    recon = runs.load_method("recon")
    selector = recon.Method(recon.Config.of(shape, layers=1, heads=2, select_after_layer=2))
    about = {"method": "recon_selector", "cfg": vars(selector.cfg), "backbone": shape.fingerprint(),
             "training": {"model": "tiny/llava"}}
    runs.save_selector(root / "conditional", selector, about)
    folders = {path.name: path for path in root.iterdir() if path.is_dir()}
    return folders | dict(nowhere=root / "nowhere", file=root / "file", picture=picture,
                          script=root / "script.py", root=root)


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Without a network, and up to where the work begins. What is no requirement stands here alone:
    lmms-eval's model class, the page's packages."""
    def stop(*_, **__):
        raise Accepted

    def unless_shapes(real):
        def checked(*args, **how):
            on_meta = torch.get_default_device().type == "meta" or "meta" in (
                *args, how.get("device"))
            return real(*args, **how) if on_meta else stop()
        return checked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(FrozenVLM, "from_pretrained", unless_shapes(shapes_of))
    monkeypatch.setattr(PreTrainedModel, "__init__", unless_shapes(PreTrainedModel.__init__))
    monkeypatch.setattr(shapes, "load", stop)
    monkeypatch.setattr(subprocess, "Popen", stop)
    monkeypatch.setattr(scenes, "make_scene", stop)
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = object
    for name in ("onnx", "onnxscript", "playwright", "playwright.sync_api"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["playwright.sync_api"].sync_playwright = stop
    monkeypatch.setenv("COLUMNS", "200")


# ---------------------------------------------------------------------------- one command


def start(command: str, words: list[str]) -> None:
    """What `python FILE words` does, in this process."""
    script = str(ROOT / command.split()[0])
    before = sys.argv
    sys.argv = [script, *words]
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before


def outcome(command: str, words: list[str]) -> tuple[str, str]:
    """("works", "") or ("one line", it) or a fault, and what was printed."""
    def give_up(*_):
        raise Endless
    errors = io.StringIO()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LONG)
    try:
        with redirect_stderr(errors):
            start(command, words)
    except Accepted:
        return "works", ""
    except Endless:
        return "no end", ""
    except SystemExit as end:
        lines = [line for line in errors.getvalue().splitlines() if line.strip()]
        said = " | ".join(lines)[:300]
        if not end.code:
            return "works", ""
        if end.code != 2 or not lines:
            return "another exit code", f"{end.code} {said}"
        cause = end.__context__
        if isinstance(cause, Exception) and not isinstance(cause, argparse.ArgumentError):
            raised = traceback.extract_tb(cause.__traceback__)[-1].filename
            if not Path(raised).is_relative_to(ROOT) or ".venv" in raised:
                return "a library's error", said
        return ("one line", said) if len(lines) == 1 else ("several lines", said)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.alarm(0)
    return "works", ""


def options_of(command: str, words: list[str], monkeypatch) -> list:
    """The options of the parser that the command makes of these words."""
    real = argparse.ArgumentParser.parse_known_args

    def capture(parser, *args, **how):
        if not parser.add_help:                                # it looks for some options alone
            return real(parser, *args, **how)
        raise Captured(parser)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        patch.setattr(runs.Parser, "parse_known_args", capture)
        try:
            start(command, words)
        except Captured as found:
            return [option for option in found.args[0]._actions if option.dest != "help"]
    raise AssertionError(f"{command} makes no parser")


# ---------------------------------------------------------------------------- bad values


def values(command: str, option, places: dict) -> list[tuple[list, bool]]:
    """[(words in the place of an option's value, whether they must be refused)]."""
    name, kind, text = option.dest, getattr(option.type, "__name__", None), str(option.help)
    names = {name, f"{command.split()[0]} {name}"}
    if option.nargs == 0:                                        # a switch
        return [(["x"], True)]
    if option.nargs == argparse.REMAINDER:
        return []
    must, may = [[""]], []
    if option.nargs in ("+", "*") and option.option_strings:
        must.append([])
    if option.choices or kind == "string_to_bool":
        must.append(["nothing"])
    elif kind in ("int", "float"):
        must += [["x"], ["1.5"], ["9" * 30]] if kind == "int" else [
            ["x"], ["nan"], ["inf"], ["-inf"], ["1e30"]]
        (may if name in BELOW else must).append(["-1"])
        is_zero_good = name in ZERO or "0:" in text or option.default == 0
        (may if is_zero_good else must).append(["0"])
    elif names & WRITTEN:
        must += [[f"{places['file']}/below"], ["/dev/null/below"]]
        if text.startswith(("file", "the picture")):
            must.append([str(places["empty"])])
        elif "ending" not in text:
            must.append([str(places["file"])])
            may.append([str(places["empty"])])
    elif names & READ:
        must += [[str(places[place])] for place in ("nowhere", "empty", "damaged", "file")]
        must += [["no/such/place"], [f"{places['file']}/below"]]
    elif name == "device":
        must += [["tpu"], ["cuda:99"], ["cpu:7"]] + [["cuda"]] * (not torch.cuda.is_available())
    elif name in ("methods", "benchmarks", "ways", "options", "backbone", "method", "attn"):
        must.append(["nothing"])
    return [(x, True) for x in must] + [(x, False) for x in may]


def cases(command: str, places: dict, monkeypatch) -> list[tuple[list[str], bool]]:
    """[(the words of a command, whether they must be refused)]; the first are good."""
    base = [word.format(**places) for word in BASES[command]]
    own = options_of(command, base, monkeypatch)
    if command in ("train.py stepprune", "train.py recon", "evaluate.py rescore"):
        others = next(name for name in BASES if name.split()[0] == command.split()[0])
        known = {option.dest for option in options_of(
            others, [word.format(**places) for word in BASES[others]], monkeypatch)}
        own = [option for option in own if option.dest not in known]
    takes_all = any(option.nargs == argparse.REMAINDER for option in own)
    found = [(base, False)] + [([*base, "--colour", "red"], True)] * (not takes_all)
    for option in own:
        for words, must in values(command, option, places):
            if option.option_strings:
                found.append(([*base, option.option_strings[0], *words], must))
            else:
                place = [other for other in own if not other.option_strings].index(option)
                found.append(([*base[:place], *words, *base[place + 1:]], must))
    named = [option.option_strings[0] for option in own if option.option_strings]
    found += [([*base, name[:-1], "1"], True) for name in named[:1]]          # cut short
    for text in TOGETHER.get(command, []):
        first, *more = text.format(**places).split(" ")
        found.append(([*base, first, *more], True))
    return found


def commands() -> set[str]:
    """Every file that is one."""
    files = [*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py"),
             *(ROOT / "exercises").glob("*.py"), *(ROOT / "measure").glob("*.py"),
             *(ROOT / "page").glob("*.py"), *(ROOT / "tiny").glob("*.py")]
    return {str(path.relative_to(ROOT)) for path in files
            if "__name__ == \"__main__\"" in path.read_text(encoding="utf-8")}


def test_every_command_is_here():
    assert commands() == {command.split()[0] for command in BASES}


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=[pytest.mark.slow] * (command in LONG_ONES)) for command in BASES])
def test_bad_input_ends_in_one_line_or_works(command, places, monkeypatch, tmp_path):
    counts, faults = Counter(), []
    for number, (words, must) in enumerate(cases(command, {**places, "new": "{new}"},
                                                 monkeypatch)):
        words = [word.replace("{new}", str(tmp_path / str(number))) for word in words]
        what, said = outcome(command, words)
        if what == "works" and must:
            what = "silently accepted"
        counts[what] += 1
        if what not in ("works", "one line")[:2 if number else 1]:
            faults.append(f"{what}: {command} {' '.join(words)}\n    {said}")
    print(f"\n{command}: {sum(counts.values())} cases, "
          + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    assert not faults, "\n".join(faults)

