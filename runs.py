"""What a method is, and the folder that a run of it leaves.

A method is one file beside this one, found by its name or the beginning of it: `--method stepprune`
is stepprune.py, `--method recon` recon_selector.py. The file has

    Config         a dataclass with every option of the method, each marked [paper] or [ours];
                   sizes that follow from the frozen VLM are fields of its base class, with of(vlm)
    TINY, LARGE    what it trains with unless told otherwise, on a tiny and on a large encoder:
                   options of train.py and of Config
    Method         a Selector, built as Method(config)

A run folder has config.json, log.jsonl, checkpoints/ and, when it is finished, selector/, which is
what evaluate.py reads and what is shared: safetensors, config.json and a model card.
"""

import argparse
import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import shutil
import sys
import tempfile
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, get_args, get_origin

import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parent
LOCK = ".lock"                        # its file in a run folder
PARTS = ("Config", "TINY", "LARGE", "Method")
LARGE_WIDTH = 512                     # an encoder of this width or more trains with LARGE [ours]


# ------------------------------------------------------------------------------------ a method


@dataclass
class Way:
    """One way to answer questions with a selection, of a method or of a baseline.

    select(asked, K) -> keep, one row per question, or (keep, feats that stand in their place)
        asked has units and question: of every question, or of every picture if one choice serves
        all questions about it
    reads_question  whether every question has a choice of its own
    adaptive        K is a mean over questions; else it is at most a picture's tokens, and below 1
                    a share of them
    budgets         its own K in place of those asked for
    gate(asked, K) -> feats (M, ...) of all units, drowned instead of removed
    stages(K, tokens of each row) -> {layer: rule}, inside the language model (baselines/inside.py)
    ask_twice       the question stands before the image too
    needs           what baselines/encoder.py must read off the encoder for it
    """
    select: Callable | None = None
    reads_question: bool = False
    adaptive: bool = False
    budgets: tuple | None = None
    gate: Callable | None = None
    stages: Callable | None = None
    ask_twice: bool = False
    needs: dict = field(default_factory=dict)


class Selector(nn.Module, PyTorchModelHubMixin, ABC):
    """What train.py and evaluate.py call. A method overrides loss() and select(), and what differs.

    rows            what a training row is: "dialogue", a picture with all its turns; "question",
                    a picture with one of them; "picture", no text; "question twice", which stands
                    before the image too
    reads_question  whether select() reads the question
    reads_language  whether its weights depend on the language model, not on the encoder alone;
                    if not, it trains without one
    adaptive        whether it decides how many tokens it keeps, steered to K on average
    further_ways    names that ways() knows beside its own, see there
    weight_decay    of AdamW
    """
    rows = "dialogue"
    reads_question = False
    reads_language = True
    adaptive = False
    further_ways: tuple[str, ...] = ()
    weight_decay = 0.01

    def begin(self, vlm, first_batch: Callable) -> None:
        """Called once, before the first step of a new run. first_batch(n) -> its first pictures."""

    @torch.no_grad()
    def read(self, vlm, batch):
        """The Units that loss() reads of a batch, a row per question. All before it is frozen."""
        return (batch.units or vlm.encode(batch.pictures)).rows(batch.owner)

    def observe(self, vlm, parts: list, step) -> None:
        """Sees all (batch, units) of a step on this process before the first loss: statistics."""

    @abstractmethod
    def loss(self, vlm, batch, units, step) -> tuple[Tensor, dict]:
        """This part's share of the step's loss, and numbers to log.

        step: number, total, answers and rows of the whole step over all processes,
        generators(owner), autocast(), sum(x) over processes; see train.Step.
        """

    @abstractmethod
    def select(self, units, question, keep) -> list[Tensor]:
        """B ascending int64 tensors of `keep` unit indices, a number or one per row.

        question: embeddings (B, L, D) and valid (B, L), or None where reads_question is False.
        """

    def scores(self, units, question) -> Tensor | None:
        """(M,) what select() goes by, to be drawn; None if there is no such number."""
        return None

    def ways(self, names: list[str], budgets: list, calibration: Callable) -> dict[str, Way]:
        """How it is evaluated: what stands behind its name in the table -> Way.

        names: of further_ways; calibration() -> (units, question) in batches, on which an adaptive
        method or way finds what keeps K on average. "threshold": what scores above one number for
        all pictures, K on average; of those methods whose further_ways have it [ours].
        """
        check_ways(names, self.further_ways)
        ways = {"": Way(lambda asked, k: self.select(asked.units, asked.question, k),
                        self.reads_question)}
        if "threshold" in names:
            cuts = self.cuts(budgets, calibration())
            ways[" threshold"] = Way(lambda asked, k: self.above(asked, cuts[k]),
                                     self.reads_question, adaptive=True)
        return ways

    def is_steered(self, names: list[str]) -> bool:
        """Whether one of ways(names) needs the calibration."""
        return self.adaptive or "threshold" in names and "threshold" in self.further_ways

    def cuts(self, budgets: list, batches) -> dict:
        """{K: the score that K tokens of these (units, question) reach on average}; below 1 that
        share of the tokens."""
        scores, rows = [], 0
        for units, question in batches:
            s, valid = units.pad(self.scores(units, question))
            scores.append(s[valid])
            rows += len(s)
        scores = torch.cat(scores).sort(descending=True).values
        reach = {k: round(k * (rows if k >= 1 else len(scores))) for k in budgets}
        return {k: scores[min(max(n, 1), len(scores)) - 1] for k, n in reach.items()}

    def above(self, asked, cut: Tensor) -> list[Tensor]:
        """The tokens of each row that score `cut` or more; its best one if none does."""
        s, valid = asked.units.pad(self.scores(asked.units, asked.question))
        s = s.masked_fill(~valid, -math.inf)
        return [(row >= min(cut, row.max())).nonzero().squeeze(1) for row in s]

    @staticmethod
    def learning_rate(peak: float, number: int, total: int) -> float:
        """At a step: 50 steps of warm-up, then a cosine to 0 [ours]."""
        return peak * min(1.0, (number + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * number / total))


def check_ways(names: list[str], known) -> None:
    if unknown := sorted({*names} - {*known}):
        raise ValueError(f"ways={unknown}: this method has "
                         f"{', '.join(known) or 'none beside its own'}")


def method_names() -> list[str]:
    """The methods that lie beside this file."""
    return [path.stem for path in sorted(ROOT.glob("*.py"))
            if "\nclass Config" in path.read_text(encoding="utf-8")
            and "\nMethod = " in path.read_text(encoding="utf-8")]


def load_method(name: str):
    """The module of a method. Raises ValueError naming what a file lacks, or what there is."""
    known = [stem for stem in method_names() if stem.startswith(name)]
    stem = known[0] if name not in known and len(known) == 1 else name
    spec = importlib.util.find_spec(stem) if stem.isidentifier() else None
    # looked at before it is imported: the name may come from a selector that was downloaded
    is_file = spec is not None and str(spec.origin).endswith(".py")
    if not is_file or "class Config" not in Path(spec.origin).read_text(encoding="utf-8"):
        raise ValueError(f"method={name!r}: expected one of {', '.join(method_names())}, or a file "
                         f"{name}.py where Python finds it")
    module = importlib.import_module(stem)
    lacking = [part for part in PARTS if not hasattr(module, part)]
    lacking += [f"{part}()" for part in sorted(getattr(
        getattr(module, "Method", None), "__abstractmethods__", ()))]
    if lacking:
        raise ValueError(f"{stem}.py is no method, it lacks {', '.join(lacking)}: expected "
                         f"{', '.join(PARTS)}, and loss() and select() of its Method; see runs.py")
    return module


def preset(module, encoder_width: int, shared: type | None = None) -> dict:
    """What a method trains with by default. shared: the dataclass of every method's options, where
    they are at hand; then ValueError is raised for a name that is no option."""
    values = module.LARGE if encoder_width >= LARGE_WIDTH else module.TINY
    owners = [shared, module.Config] if shared else []
    known = {option.name for owner in owners for option in fields(owner)}
    if shared and (unknown := {*values} - known):
        raise ValueError(f"TINY or LARGE of {module.__name__}.py names {', '.join(unknown)}: "
                         "expected options of train.py or of its Config")
    return values


MOST = 1e9                            # what no number of an option exceeds, such as layers


def check_options(config, **bounds) -> None:
    """Raises ValueError for a value that is none of its option's Literal, and for a number, or one
    of a list, that is not within its bounds: the least, or (least, most), if given. Heads have to
    part the width. config: a dataclass, or what argparse gives."""
    for option in fields(config) if is_dataclass(config) else ():
        known = get_args(option.type)
        if get_origin(option.type) is Literal and getattr(config, option.name) not in known:
            raise ValueError(f"{option.name}={getattr(config, option.name)!r} is none of {known}")
    for name, given in vars(config).items():
        bound = bounds.get(name, -MOST)
        least, most = bound if isinstance(bound, tuple) else (bound, MOST)
        for value in given if isinstance(given, list) else [given]:
            is_number = isinstance(value, (int, float))
            if is_number and not least <= value <= most:                 # NaN is in no bounds
                wanted = "a number" if name not in bounds else f"at least {least:g}"
                if value > MOST:
                    wanted = f"at most {MOST:g}"
                elif most < MOST:
                    wanted = f"{least:g} to {most:g}"
                raise ValueError(f"{name}={value}: expected {wanted}")
    heads, width = getattr(config, "heads", 1), getattr(config, "width", 0)
    if heads < 1 or width % heads:
        raise ValueError(f"heads={heads}: expected a number that parts the width {width} evenly")


def check_unread(config, names, why: str) -> None:
    """Raises ValueError for an option of these names that is not at its default: nothing reads it,
    for the reason given."""
    for option in fields(config):
        default = option.default_factory() if option.default is MISSING else option.default
        value = getattr(config, option.name)
        if option.name in names and value != default:
            raise ValueError(f"{option.name}={value!r}: {why} does not read it, leave it out")


def options_class(config_class: type) -> type:
    """A dataclass of the method's own options, without the sizes that its base class holds."""
    own = inspect.get_annotations(config_class)
    return make_dataclass("Options", [
        (f.name, f.type, field(default=f.default, default_factory=f.default_factory,
                               metadata=f.metadata))
        for f in fields(config_class) if f.name in own])


# ------------------------------------------------------------------------------------ commands


def many(default: list, text: str, **how):
    """An option of several values. how: choices, and what else add_argument() takes."""
    return field(default_factory=lambda: list(default), metadata={"help": text, **how})


# most CPUs have to emulate products in bfloat16, three to six times as slow as in float32
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"


def dtype_option():
    return HfArg(default=DTYPE, help="of the frozen VLM [ours: bfloat16 on a GPU, where there is "
                                     "one, else float32]")


def device_option():
    return HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")


def protocol_option():
    return HfArg(default="papers", help="LLaVA-1.5's pictures padded to a square, Vicuna's own "
                 "frame of prompts [paper]; stock: as the hub's processor and template do")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the default of every option."""


class Parser(HfArgumentParser):
    """Says in one line what is wrong, without the whole usage."""

    def __init__(self, dataclasses, **how):
        # an abbreviated --method would choose the options of another one
        how.setdefault("allow_abbrev", False)
        super().__init__(dataclasses, formatter_class=HelpFormatter, **how)

    def parse_known_args(self, args=None, namespace=None):
        if "" in (args or ()):
            self.error(f"nothing stands behind {args[args.index('') - 1]}: expected a value")
        return super().parse_known_args(args, namespace)

    def parse_args_into_dataclasses(self, args=None):
        *parsed, unknown = super().parse_args_into_dataclasses(args, return_remaining_strings=True)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(parsed)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def command(main: Callable) -> None:
    """main(args) as a command: an error prints one line and exits with 2; with --traceback it
    prints the whole traceback."""
    args = [arg for arg in sys.argv[1:] if arg != "--traceback"]
    try:
        main(args)
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if len(args) < len(sys.argv) - 1:
            raise
        line = " ".join(str(error).split())
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name
        print(f"{name}: {line} (--traceback shows where)", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------ files


def writable(folder: str | Path) -> Path:
    """The folder, which is not made yet. Raises OSError where it cannot be made or written into:
    before the work whose result goes there."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"nothing can be written into {folder} ({error.strerror}: {there}): name "
                      "another folder") from error
    return Path(folder)


def writable_file(path: Path) -> None:
    """The same of a file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file")
    writable(path.parent)


def write_whole(path: Path, write: Callable) -> None:
    """write(temporary path) of a file or folder, flush it to the disk, then rename: a kill leaves
    the old one or the new one. Raises OSError where it cannot be written, and leaves no part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():
                with open(file, "rb") as content:
                    os.fsync(content.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:     # torch.save() raises the latter on a full disk
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OSError:
    there = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free / 2**20
    return OSError(f"{path} cannot be written ({error}), {free:,.0f} MiB are free there: make "
                   "room, or name another folder")


def append(path: Path, text: str, sync: bool = True) -> None:
    """Add lines to a file, in one piece; with `sync` see them on the disk. Raises OSError where
    they cannot be written, and leaves no part."""
    data = text.encode()
    # without a buffer: closing the file would try to write the rest of it once more
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data):]
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def describe(config, selector, vlm, free: tuple) -> dict:
    """config.json of a run and of its selector. free: options that do not change the result."""
    training = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in free}
    training["protocol"] = vlm.protocol              # "stock" where the papers' is no other
    return {"method": config.method, "cfg": asdict(selector.cfg), "backbone": vlm.fingerprint(),
            "training": training, "code": code_of(config.method)}


def code_alone(source: str) -> str:
    """Without comments, docstrings and blank lines; not through ast.unparse(), which writes the
    same code in another way in every other version of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node, clean=False) is not None):
            doc = node.body[0]
            lines[doc.lineno - 1:doc.end_lineno] = [""] * (doc.end_lineno - doc.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def code_of(name: str) -> str:
    """A fingerprint of a method's file and of those whose parts it takes, comments and docstrings
    apart: what was made by other code has another one."""
    text, found, known = "", [load_method(name).__name__], method_names()
    for stem in found:                                # which grows
        source = Path(importlib.util.find_spec(stem).origin).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            names = [getattr(node, "module", None), *(n.name for n in getattr(node, "names", ())
                                                      if isinstance(n, ast.alias))]
            found += [n for n in names if n in known and n not in found]
        text += code_alone(source)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(there: dict, here: dict) -> str:
    """As text, the keys of `here` whose values differ."""
    return "; ".join(f"{key}: {there.get(key)!r} there, {value!r} here"
                     for key, value in here.items() if there.get(key) != value)


def is_first() -> bool:
    """Whether this is the only process, or the first that `accelerate launch` began."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def locked(folder: Path):
    """Holds a folder for this command, on the first of its processes. Raises OSError where another
    one has it. A kill sets it free."""
    if not is_first():
        yield
        return
    writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another process writes into {folder} at this moment: wait for it, end it, "
                      "or name another folder") from None
    with lock:
        lock.release()                                # of the two times that it is held
        yield


def read_json(path: Path) -> dict:
    """Raises ValueError naming the file where it is none of JSON's."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or train into another folder"
                         ) from error


def check_ours(run: Path) -> None:
    """Raises ValueError for a folder that holds something, but no run of ours."""
    others = [file.name for file in run.glob("*") if file.name != LOCK]
    about = read_json(run / "config.json") if "config.json" in others else {}
    if others and ("training" not in about or "model.safetensors" in others):
        raise ValueError(f"{run} holds {', '.join(sorted(others)[:3])} and is no run: nothing in "
                         "it is touched; choose an empty folder, or a new one, with --run")


def open_run(run: Path, about: dict, overwrite: bool, is_main: bool = True) -> None:
    """Make the run folder, or check that the one there is of the same run. Raises ValueError
    naming what differs, and for a folder that holds anything else."""
    path = run / "config.json"
    check_ours(run)
    if path.exists() and not (overwrite and is_main):
        there = read_json(path)
        found = [differences(there.get(part, {}), about[part])
                 for part in ("training", "cfg", "backbone")]
        if differ := "; ".join(filter(None, found)):
            raise ValueError(f"{run} holds another run ({differ}): choose another folder with "
                             "--run, or begin anew there with --overwrite True")
    elif is_main:
        for old in ("checkpoints", "selector", "predictions"):
            shutil.rmtree(run / old, ignore_errors=True)
        (run / "log.jsonl").unlink(missing_ok=True)
        write_text(path, json.dumps(about, indent=1))


def open_log(path: Path, first_step: int, is_main: bool) -> Callable[[dict], None]:
    """log(line), appended to path on the main process alone."""
    if not is_main:
        return lambda line: None
    lines = path.read_text().splitlines()[:first_step] if path.exists() else []
    # lines after the checkpoint will be made again
    write_text(path, "".join(line + "\n" for line in lines))
    return lambda line: append(path, json.dumps(line) + "\n", sync=False)


def checkpoints(run: Path) -> list[Path]:
    """Those of a run, the newest last."""
    return sorted((run / "checkpoints").glob("*.pt"))


def save_checkpoint(run: Path, step: int, selector, optimiser, keep: int = 2) -> None:
    """All that a resumed run needs: data, noise and rate follow from (seed, step)."""
    state = {"step": step, "selector": selector.state_dict(), "optim": optimiser.state_dict()}
    write_whole(run / f"checkpoints/{step:07d}.pt", lambda path: torch.save(state, path))
    for old in checkpoints(run)[:-keep]:
        old.unlink()


def resume(run: Path, selector, optimiser, device) -> int:
    """Load the newest checkpoint that can be read -> steps that are done, 0 without one. Raises
    ValueError where there are some and none can be read."""
    for path in reversed(checkpoints(run)):
        try:
            state = torch.load(path, weights_only=True, map_location=device)
            selector.load_state_dict(state["selector"])
            optimiser.load_state_dict(state["optim"])
            return state["step"]
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, UnpicklingError) as error:
            cause = " ".join(str(error).split())[:200]
            print(f"{path} cannot be read and is passed over ({cause})")
    if checkpoints(run):
        raise ValueError(f"none of the checkpoints of {run} can be read: begin anew there with "
                         "--overwrite True, or restore them")
    return 0


# ------------------------------------------------------------------------------------ selectors

CARD = """---
library_name: pytorch
tags: [whichtokens, visual-token-pruning, {method}]
---
# {method} for {model}

Says which visual tokens of a frozen vision-language model reach its language model. Trained by
WhichTokens, for the backbone below and none of another shape:

    {backbone}

Trained with

    {training}

Use: `python evaluate.py --run FOLDER`, or `{selector}.from_pretrained(FOLDER)`, where FOLDER may be
the name of this repository on the hub.

## Figures
Of the tiny world, unless the table says otherwise: the mechanism, not the papers' numbers.

<!-- table: ../summary.md -->
not evaluated yet
<!-- end -->
"""


def save_selector(run: Path, selector, about: dict) -> None:
    """run/selector: weights, config.json and model card; whole or not at all."""
    def listed(part: dict) -> str:
        return "\n    ".join(f"{key}: {value}" for key, value in part.items())

    def write(folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "README.md").write_text(CARD.format(
            method=about["method"], model=about["training"]["model"],
            selector=type(selector).__name__, backbone=listed(about["backbone"]),
            training=listed(about["training"] | about["cfg"])))
        selector.save_pretrained(folder, config=about)
        shutil.rmtree(run / "selector", ignore_errors=True)
    write_whole(run / "selector", write)


def open_repository(name: str) -> None:
    """Make a selector's place on the hub, on the first of the processes. Raises ValueError for a
    name that it cannot have, OSError where the hub does not let us."""
    if not is_first():
        return
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("the user is missing")
        HfApi().create_repo(name, exist_ok=True)
    except HFValidationError as error:
        raise ValueError(f"push={name!r}: expected user/name, of letters, digits, '-', '_' and '.' "
                         f"({error})") from error
    except Exception as error:                        # each library on the way has its own
        cause = " ".join(str(error).split())[:200]
        raise OSError(f"push={name!r}: the hub makes no such repository ({type(error).__name__}: "
                      f"{cause}): log in as its owner with `hf auth login`, or set HF_TOKEN"
                      ) from error


def share(run: Path, name: str) -> None:
    """Put a run's selector into its place on the hub."""
    if is_first():
        HfApi().upload_folder(repo_id=name, folder_path=run / "selector")
        print(f"shared: https://huggingface.co/{name}")


def latest_run() -> str:
    """The run in runs/ that finished last. Raises FileNotFoundError when there is none."""
    finished = [*Path("runs").glob("**/selector/model.safetensors")]
    if not finished:
        raise FileNotFoundError("runs/ holds no finished run: python train.py makes one")
    return str(max(finished, key=lambda path: path.stat().st_mtime).parent.parent)


def read_selector(run: str | Path) -> tuple[Path, dict]:
    """(folder, config.json) of a run's selector, a selector's folder, or one on the hub."""
    for folder in (Path(run) / "selector", Path(run)):
        if (folder / "model.safetensors").exists():
            return folder, read_json(folder / "config.json")
    if Path(run).exists():
        raise FileNotFoundError(f"{run} holds no finished run (selector/model.safetensors is "
                                f"missing): train it first, python train.py --run {run}")
    try:
        wanted = ["config.json", "model.safetensors"]
        folder = Path(snapshot_download(str(run), allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{run} is no folder here, and the hub gave no such selector "
                                f"({type(error).__name__}): expected a run, or user/selector"
                                ) from error
    return folder, read_json(folder / "config.json")


def build_selector(folder: Path, about: dict) -> Selector:
    """Raises ValueError for weights or options that do not make a selector of this version."""
    module = load_method(about["method"])
    unknown = {*about["cfg"]} - {option.name for option in fields(module.Config)}
    if unknown:
        raise ValueError(f"{folder} has the options {', '.join(sorted(unknown))}, which "
                         f"{about['method']}.py does not know: was it saved by a later version? "
                         "Update the project")
    try:
        selector = module.Method.from_pretrained(folder, strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}/model.safetensors does not give a selector of "
                         f"{about['method']} ({cause}): copy or train it again") from error
    broken = [name for name, x in selector.state_dict().items() if not x.isfinite().all()]
    if broken:
        raise ValueError(f"{folder}: {broken[0]} and {len(broken) - 1} more weights are not "
                         "finite: its training failed, train it again")
    return selector


def load_selector(run: str | Path, vlm, device=None) -> tuple[Selector, dict]:
    """A trained selector in evaluation mode, on the VLM's device unless told otherwise, and its
    config.json. If it was trained with another protocol than the VLM has, that is printed.

    Raises ValueError naming what differs if it was trained for another backbone.
    """
    folder, about = read_selector(run)
    selector = build_selector(folder, about)
    here = vlm.fingerprint()
    if not selector.reads_language:
        here = {key: value for key, value in here.items()
                if key.startswith("vision_") or key == "feature_layer"}
    if differ := differences(about["backbone"], here):
        raise ValueError(f"{run} was trained for another backbone ({differ}): pass --model "
                         f"{about['training']['model']}")
    trained = about["training"].get("protocol", vlm.protocol)
    if trained != vlm.protocol:
        print(f"{run} was trained with --protocol {trained}, and now meets the pictures and "
              f"prompts of --protocol {vlm.protocol}")
    return selector.to(device or vlm.device).eval(), about
