"""Coursework: the equations of a method, to be written by you.

    python -m exercises autoselect            writes coursework/autoselect.py: the method's file
                                              without the bodies of its equations
    python -m exercises check autoselect      runs the project's tests of them on yours

Each equation is checked by itself, all others being the project's; once every one passes, all
tests run on your file as it is. --only leaves open, or checks, those that it names.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

import runs
from exercises import chosen, equations, opened, source_of
from exercises.trials import TOGETHER, parsed, trials


@dataclass
class Options:
    only: list[str] = runs.many([], "names of equations; without it: all")
    file: str | None = HfArg(default=None, help="file of the exercises; without it: "
                                                "coursework/METHOD.py")
    overwrite: bool = HfArg(default=False, help="write anew what is there")
    limit: int = HfArg(default=120, help="seconds until a test that does not end is given up")

    def __post_init__(self):
        runs.check_options(self, limit=1)


def write(module, options: Options, file: Path) -> None:
    """Raises FileExistsError for one that is there."""
    of = chosen(equations(module), options.only)
    runs.check_unread(options, ["limit"], "writing")
    runs.writable_file(file)
    if file.exists() and not options.overwrite:
        raise FileExistsError(f"{file} is there: name another --file, or begin anew with "
                              "--overwrite, which loses what is written in it")
    runs.write_text(file, opened(source_of(module), of))
    print(f"written: {file}, to be completed: "
          + ", ".join(f"{equation.name} {equation.label}" for equation in of))


def check(module, options: Options, file: Path) -> None:
    """A line an equation. Raises RuntimeError where one does not pass."""
    of = chosen(equations(module), options.only)
    runs.check_unread(options, ["overwrite"], "check")
    parsed(file)
    failed, names = [], [equation.name for equation in of]
    for equation, found in zip(of, trials(module.__name__, file, names, options.limit)):
        line = f"{equation.label} {equation.name}: "
        if not found["failure"]:
            print(f"PASS {line}{found['passed']} tests", flush=True)
            continue
        failed.append(equation.name)
        line = f"OPEN {line}not written" if found["is_open"] else f"FAIL {line}{found['failure']}"
        print(f"{line}\n     hint: {equation.hint}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(of)} equations do not pass: "
                           f"{', '.join(failed)}")
    if not options.only:
        found, = trials(module.__name__, file, [TOGETHER], options.limit)
        if found["failure"]:
            raise RuntimeError(f"each equation passes, the file does not: {found['failure']}")
        print(f"PASS all together: {found['passed']} tests of tests/test_{module.__name__}.py")


def main(args: list[str]) -> None:
    parser = runs.Parser(Options, prog="python -m exercises", description=__doc__)
    parser.add_argument("check", nargs="?", choices=["check"], help="check yours")
    parser.add_argument("method", help="as in train.py")
    options, rest = parser.parse_args_into_dataclasses(args)
    module = runs.load_method(rest.method)
    file = Path(options.file or f"coursework/{module.__name__}.py")
    (check if rest.check else write)(module, options, file)


if __name__ == "__main__":
    runs.command(main)
