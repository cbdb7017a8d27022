"""Changes one place of a core file at a time, and says which changes no test notices.

    git clone . ../mutants; python tests/mutate.py ../mutants --files common.py --each 20 --seed 0

Files of the copy are written into, and put back. A mutant meets the tests of its file that call the
function that it is in, then all of them, up to the first that fails; in a fork of this process,
which has loaded the libraries. A killed run goes on where it was; --again repeats what survived.
What else is given goes to pytest. Not changed: texts, types, decorators, the words of errors.
"""

import argparse
import ast
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

# loaded here, once for all
import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import pytest
from transformers import (  # noqa: F401
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

TESTS = {"common.py": ["test_common.py", "backbones", "test_checkpoints.py", "data/test_fit.py"],
         "autoselect.py": ["test_autoselect.py"], "stepprune.py": ["test_stepprune.py"],
         "recon_selector.py": ["test_recon_selector.py", "test_recon_train.py"],
         "runs.py": ["test_runs.py", "test_train.py"],
         "train.py": ["test_runs.py", "test_train.py", "data/test_epochs.py"],
         "evaluate.py": ["benchmarks/test_evaluate.py"],
         "benchmarks/scores.py": ["benchmarks/test_scores.py"]}
PAIRS = ("Lt LtE", "Gt GtE", "Eq NotEq", "In NotIn", "Is IsNot", "Add Sub", "Mult Div", "And Or",
         "BitAnd BitOr")
SWAPS = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
SWAPS |= dict(FloorDiv="Mult", Mod="Mult", Pow="Mult")
KEPT = ("help", "default", "device", "encoding")     # keywords: texts, and what a CPU does not tell


def parts(node, function: int = 0):
    """(node, first line of the function that it is in) of all below a node."""
    if isinstance(node, ast.FunctionDef):
        function = min([node.lineno, *(x.lineno for x in node.decorator_list)])
    yield node, function
    for name, value in ast.iter_fields(node):
        left_out = (name in ("annotation", "returns", "decorator_list")
                    or isinstance(node, ast.Raise | ast.JoinedStr))
        for child in [] if left_out else value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from parts(child, function)


def changes(node) -> list:
    """Of one node: (what is done, an object, what of it is set, to which value)."""
    found = []
    ops = getattr(node, "ops", [node.op] if hasattr(node, "op") else [])
    for i, op in enumerate(ops):
        if other := SWAPS.get(type(op).__name__):
            new = [*ops[:i], getattr(ast, other)(), *ops[i + 1:]]
            what = f"{type(op).__name__} to {other}"
            found.append((what, "ops", new) if hasattr(node, "ops") else (what, "op", new[0]))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        found.append(("without not", "operand", ast.UnaryOp(node.op, node.operand)))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        x = node.value
        other = not x if isinstance(x, bool) else x + 1 if isinstance(x, int) else 1.5 * x or 1.0
        found.append((f"{x} to {other}", "value", other))
    if isinstance(node, ast.If | ast.IfExp):
        found.append(("not the condition", "test", ast.UnaryOp(ast.Not(), node.test)))
    for word in node.keywords if isinstance(node, ast.Call) else []:
        if word.arg not in KEPT:
            found.append((f"without {word.arg}=", "keywords",
                          [other for other in node.keywords if other is not word]))
    for name in ("body", "orelse"):
        block = getattr(node, name, None)
        for i, line in enumerate(block if isinstance(block, list) else []):
            if (isinstance(line, ast.Raise | ast.Break | ast.Continue)
                    or isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)):
                found.append((f"without {ast.unparse(line)[:50]}", name,
                              [*block[:i], ast.Pass(), *block[i + 1:]]))
    return found


def mutants(tree) -> list[tuple]:
    """(node, first line of its function, what is done, what of it is set, to which value)."""
    return [(node, function, *change) for node, function in parts(tree) for change in changes(node)]


class Calls:
    """Notes which functions of a file each test calls."""

    def __init__(self, path: Path):
        self.path, self.tests = str(path), {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        lines = self.tests[item.nodeid] = set()

        def note(frame, event, _):
            if event == "call" and frame.f_code.co_filename == self.path:
                lines.add(frame.f_code.co_firstlineno)
        sys.setprofile(note)
        yield
        sys.setprofile(None)


def passes(copy: Path, tests: list[str], limit: float, log: Path, plugin=None) -> str:
    """"" where all tests pass, else what came first: the one that fails, or the limit, in s."""
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(copy)
        sys.path[0] = str(copy)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = 1
        try:
            code = int(pytest.main(["-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-m",
                                    "not slow", "--tb=line", *tests], [plugin] if plugin else []))
            if plugin:
                calls = {test: sorted(lines) for test, lines in plugin.tests.items()}
                log.with_suffix(".json").write_text(json.dumps(calls))
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.M)
            return (failed or ["a crash"])[0] if status else ""
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "the time limit"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("copy", type=Path, help="a clone of the project")
    parser.add_argument("--files", nargs="+", choices=TESTS, default=[*TESTS])
    parser.add_argument("--each", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", action="store_true", help="repeat those that survived")
    config, more = parser.parse_known_args()
    copy = config.copy.resolve()
    kept, log = copy / "mutants.jsonl", copy / "mutants.log"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["file"], row["number"]): row for row in rows}             # the newest wins
    for name in config.files:
        path, source = copy / name, (copy / name).read_text()
        tests = [*(f"tests/{test}" for test in TESTS[name]), *more]
        count = len(mutants(ast.parse(source)))
        drawn = random.Random(f"{config.seed} {name}").sample(range(count), config.each)
        left = [number for number in drawn if (name, number) not in done
                or config.again and not done[name, number]["killed by"]]
        start = time.monotonic()
        if left and (failed := passes(copy, tests, 3600, log, Calls(path))):
            sys.exit(f"without a mutant, {failed} fails the tests of {name}: see {log}")
        limit = 3 * (time.monotonic() - start) + 60
        calls = json.loads(log.with_suffix(".json").read_text()) if left else {}
        for number in left:
            tree = ast.parse(source)
            node, function, what, attribute, value = mutants(tree)[number]
            line = getattr(node, "lineno", 0)
            setattr(node, attribute, value)
            path.write_text(ast.unparse(ast.fix_missing_locations(tree)))    # without its comments
            near = [test for test, lines in calls.items() if function in lines]
            try:
                killer = near and passes(copy, [*near, *more], limit, log)
                killer = killer or passes(copy, tests, limit, log)
            finally:
                path.write_text(source)
            row = {"file": name, "number": number, "line": line, "what": what, "killed by": killer}
            done[name, number] = row
            with open(kept, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}:{line} {what}: {killer or 'survived'}", flush=True)
        lived = sum(not done[name, number]["killed by"] for number in drawn)
        print(f"{name}: {count} mutants, {len(drawn)} drawn, {lived} survived", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
