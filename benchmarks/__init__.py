"""The benchmarks, one file each, and what asks and scores them.

A benchmark is a module of this folder with

    NAME        its title in tables
    MAIN        the key of score() that papers print
    load(path=None, split=None, family="llava", ...) -> sequence of questions.Question
        path    a local copy, None for the Hugging Face hub
        family  of the VLM, for prompts and answer lengths that differ between families
    score(rows) -> {MAIN: ..., further parts, "n": rows,
                    "unmatched": answers that could not be read}
        rows    of a predictions file, see predictions.py

and, if it wants to, NOTE, a sentence below its tables; cell(row) and from_counts(counts), by which
score() follows from how many rows are of each kind, for faster intervals.

The modules without MAIN are shared by all benchmarks. Nothing has to be listed elsewhere.
"""

import importlib
import inspect
import json
import re
from pathlib import Path

HAS_MAIN = re.compile(r"^(\w+, )*MAIN\b.*=", re.MULTILINE)


def names() -> list[str]:
    """The benchmarks of this folder, sorted. None of them is imported."""
    files = [file for folder in __path__ for file in sorted(Path(folder).glob("*.py"))]
    return [path.stem for path in files
            if path.stem != "__init__" and HAS_MAIN.search(path.read_text(encoding="utf-8"))]


def load_module(name: str):
    """The module of a benchmark. Raises ValueError, naming those that there are."""
    if name not in names():
        raise ValueError(f"benchmarks={name!r}: known are {', '.join(names())}")
    return importlib.import_module(f"benchmarks.{name}")


def load_options(benchmarks: list[str], texts: list[str]) -> dict[str, dict]:
    """{benchmark: {option of its load(): value}} of texts like pope.split=random. Raises ValueError
    for an option that it does not have."""
    chosen = {name: {} for name in benchmarks}
    for text in texts:
        key, _, value = text.partition("=")
        name, _, option = key.partition(".")
        known = [*inspect.signature(load_module(name).load).parameters] if name in chosen else []
        if option not in {*known} - {"path", "family"}:
            raise ValueError(f"options={text!r}: expected <benchmark>.<option>=<value> of "
                             f"{', '.join(chosen)}, with an option of its load(): "
                             f"{', '.join(known)}")
        try:
            chosen[name][option] = json.loads(value)
        except ValueError:
            chosen[name][option] = value                        # a word
    return chosen
