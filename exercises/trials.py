"""The project's tests on a student's file, in a process of their own: what a file may do to it,
never to end among it, ends there."""

import ast
import faulthandler
import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import runs
from exercises import equations, functions, source_of, with_ours

TOGETHER = "together"                 # no equation: the whole file as it is, all of its tests
HERE = "from exercises import trials; trials.answer()"


class Watcher:
    """Of a run of tests: how many passed, and what became of the first that did not.

    words: of which the names of the tests to run have one; None: all tests. limit: seconds until a
    test that does not end takes the process down.
    """

    def __init__(self, words: list[str] | None, limit: int):
        self.words, self.limit = words, limit
        self.passed, self.failure, self.is_open = 0, "", False

    def wait(self):
        faulthandler.dump_traceback_later(self.limit, exit=True, file=sys.__stderr__)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.words is None
                    or any(word in item.originalname for word in self.words)]

    def pytest_runtest_logstart(self):
        self.wait()

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo:
            error, last = call.excinfo.value, call.excinfo.traceback[-1]
            self.is_open = isinstance(error, NotImplementedError)
            sentence = " ".join((item.function.__doc__ or "").split("\n\n")[0].split())
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            if isinstance(error, AssertionError):
                said = " ".join(str(last.statement).split()) + said.removeprefix(
                    "AssertionError").replace(": assert", ", where", 1).replace(", where False", "")
            self.failure = item.name + (f" ({sentence})" if sentence else "") + f": {said}"
        elif call.when == "call":
            self.passed += 1


def failed(how: str) -> dict:
    return {"passed": 0, "failure": how, "is_open": False}


def trial(module, theirs: str, file: str, name: str, limit: int) -> dict:
    """{"passed", "failure", "is_open"} of one equation, all others being the project's;
    or of all of them together, being theirs."""
    every, stem = equations(module), module.__name__
    own = [equation for equation in every if equation.name == name]
    others = [equation for equation in every if own and equation.name != name]
    watcher = Watcher(own[0].tests if own else None, limit)
    there = functions(ast.parse(theirs))
    if missing := [part for equation in own for part in equation.functions if part not in there]:
        return failed(f"the file has no {missing[0]}")
    sys.modules.pop(f"test_{stem}", None)              # it has taken an earlier trial's functions
    sys.modules[stem] = importlib.util.module_from_spec(module.__spec__)
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        try:
            watcher.wait()
            tree = with_ours(theirs, source_of(module), others)
            exec(compile(tree, file, "exec"), vars(sys.modules[stem]))
            faulthandler.cancel_dump_traceback_later()
        except Exception as error:
            watcher.failure = f"the file does not run: {type(error).__name__}: {error}"
        else:
            code = pytest.main([
                f"{runs.ROOT}/tests/test_{stem}.py", "-c", f"{runs.ROOT}/pyproject.toml", "-xs",
                "-o", "addopts=", "-m", "not slow", "-p", "no:xdist", "-p", "no:cacheprovider",
                "-p", "no:faulthandler"], plugins=[watcher])
            if code and not watcher.failure:
                errors = re.findall(r"^E +(.*)", said.getvalue(), re.M)
                watcher.failure = f"tests/test_{stem}.py does not run on it {errors[-1:]}"
    return {"passed": watcher.passed, "failure": watcher.failure, "is_open": watcher.is_open}


def answer() -> None:
    """In the other process: a line of JSON for each trial that it was asked for."""
    stem, file, limit, *names = sys.argv[1:]
    module, theirs, out = runs.load_method(stem), parsed(Path(file)), sys.stdout
    for name in names:
        print(json.dumps(trial(module, theirs, file, name, int(limit))), file=out, flush=True)
    faulthandler.cancel_dump_traceback_later()


def trials(stem: str, file: Path, names: list[str], limit: int) -> Iterator[dict]:
    """trial() of each, in another process. Where one takes it down, the next begins anew."""
    left = list(names)
    while left:
        command = [sys.executable, "-c", HERE, stem, str(file.absolute()), str(limit), *left]
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True,
                                  stderr=errors) as process:
                for line in process.stdout:
                    left.pop(0)
                    yield json.loads(line)
            errors.seek(0)
            said = errors.read().strip()
        if left:
            left.pop(0)
            yield failed(end_of(said, process.returncode, file, limit))


def end_of(said: str, code: int, file: Path, limit: int) -> str:
    """What became of a process that did not answer."""
    if "Timeout (" not in said:
        return f"Python ended with exit code {code}"
    place = re.search(re.escape(f'File "{file.absolute()}", line ') + r"(\d+)", said)
    return (f"after {limit} s a test had not ended" + (f", in line {place[1]}" if place else "")
            + ": does every loop end?")


def parsed(file: Path) -> str:
    """The text of a student's file. Raises FileNotFoundError, or ValueError where it is no
    Python."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: `python -m exercises METHOD` writes it")
    try:
        ast.parse(text := file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no Python file: {error}") from error
    return text
