"""Changes one place of a core file at a time, and says which changes no test of that file notices.

    git clone . ../mutants; python tests/mutate.py ../mutants --files common.py --each 20 --seed 0

The copy is written into, and put back. Each mutant is a fork of this process, which has loaded the
libraries, up to the first test that fails. mutants.jsonl there says what became of it: a killed run
goes on; take a line out to repeat it. Left alone: texts, types, decorators, words of errors.
"""

import argparse
import ast
import json
import os
import random
import re
import signal
import sys
from pathlib import Path

OPTIONS = ["test_options.py", "test_house.py"]
TESTS = {"common.py": ["test_exactness.py", "test_prompts.py", "test_loading.py",
                       "test_checkpoints.py", "backbones/test_new_family.py",
                       "baselines/test_baselines.py"],
         "autoselect.py": ["test_autoselect.py", *OPTIONS],
         "stepprune.py": ["test_stepprune.py", *OPTIONS],
         "recon_selector.py": ["test_recon_selector.py", *OPTIONS, "test_recon_train.py"],
         "runs.py": ["test_runs.py", *OPTIONS, "test_train.py", "test_extending.py"],
         "train.py": [*OPTIONS, "test_runs.py", "test_train.py", "data/test_epochs.py",
                      "benchmarks/test_costs.py", "test_processes.py"],
         "evaluate.py": [*OPTIONS, "benchmarks/test_evaluate.py"],
         "benchmarks/scores.py": ["benchmarks/test_scores.py"]}
PAIRS = ("Lt LtE", "Gt GtE", "Eq NotEq", "In NotIn", "Is IsNot", "Add Sub", "Mult Div", "And Or",
         "BitAnd BitOr")
SWAPS = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
SWAPS |= dict(FloorDiv="Mult", Mod="Mult", Pow="Mult")
KEPT = ("help", "default", "device", "encoding")     # keywords: texts, and what a CPU does not tell
LIMIT = 1800                                         # seconds


def mutants(node):
    """Of all below a node: (node, what is done, which attribute is set, to which value)."""
    for change in changes(node):
        yield node, *change
    for name, value in ast.iter_fields(node):
        if not (isinstance(node, ast.Raise | ast.JoinedStr)
                or name in ("annotation", "returns", "decorator_list")):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from mutants(child)


def changes(node):
    for i, op in enumerate(ops := getattr(node, "ops", [getattr(node, "op", None)])):
        if other := SWAPS.get(type(op).__name__):
            new = [*ops[:i], getattr(ast, other)(), *ops[i + 1:]]
            is_chain = hasattr(node, "ops")
            yield f"{type(op).__name__} to {other}", *(("ops", new) if is_chain else ("op", new[0]))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield "without not", "operand", ast.UnaryOp(node.op, node.operand)
    if isinstance(node, ast.Constant) and isinstance(x := node.value, bool | int | float):
        other = not x if isinstance(x, bool) else x + 1 if isinstance(x, int) else 1.5 * x or 1.0
        yield f"{x} to {other}", "value", other
    if isinstance(node, ast.If | ast.IfExp):
        yield "not the condition", "test", ast.UnaryOp(ast.Not(), node.test)
    for word in node.keywords if isinstance(node, ast.Call) else []:
        if word.arg not in KEPT:
            yield f"without {word.arg}=", "keywords", [w for w in node.keywords if w is not word]
    for name in ("body", "orelse"):
        block = getattr(node, name, None)
        for i, line in enumerate(block if isinstance(block, list) else []):
            if (isinstance(line, ast.Raise | ast.Break | ast.Continue)
                    or isinstance(line, ast.Expr) and isinstance(line.value, ast.Call)):
                rest = [*block[:i], ast.Pass(), *block[i + 1:]]
                yield f"without {ast.unparse(line)[:50]}", name, rest


def killer(copy: Path, name: str) -> str:
    """The first of a file's tests that fails in the copy, or "" where all pass."""
    import pytest
    log = copy / "mutants.log"
    if not (child := os.fork()):
        code = 1
        try:
            signal.alarm(LIMIT)
            os.chdir(copy)
            sys.path[0] = str(copy)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            code = int(pytest.main(["-x", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=line",
                                    "-m", "not slow", *(f"tests/{test}" for test in TESTS[name])]))
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] == 0:
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.M)
    return failed[0] if failed else "a crash, or the time"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("copy", type=Path, help="a clone of the project")
    parser.add_argument("--files", nargs="+", choices=TESTS, default=[*TESTS])
    parser.add_argument("--each", type=int, default=20, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    config = parser.parse_args()
    import datasets  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        LlavaForConditionalGeneration,
        Qwen2_5_VLForConditionalGeneration,
    )
    torch.set_num_threads(1)
    copy = config.copy.resolve()
    (kept := copy / "mutants.jsonl").touch()
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    for name in config.files:
        path, source = copy / name, (copy / name).read_text()
        count = len([*mutants(ast.parse(source))])
        drawn = random.Random(f"{config.seed} {name}").sample(range(count), count)[:config.each]
        done = {row["number"]: row["killed by"] for row in rows if row["file"] == name}
        left = [number for number in drawn if number not in done]
        if left and (failed := killer(copy, name)):
            sys.exit(f"without a mutant, {failed} fails: see {copy}/mutants.log")
        for number in left:
            tree = ast.parse(source)
            node, what, attribute, value = [*mutants(tree)][number]
            setattr(node, attribute, value)
            path.write_text(ast.unparse(ast.fix_missing_locations(tree)))    # without its comments
            try:
                done[number] = killer(copy, name)
            finally:
                path.write_text(source)
            row = {"file": name, "number": number, "line": getattr(node, "lineno", 0),
                   "what": what, "killed by": done[number]}
            with open(kept, "a") as file:
                print(json.dumps(row), file=file)
            print(*row.values(), flush=True)
        lived = sum(not done[number] for number in drawn)
        print(f"{name}: {count} mutants, {len(drawn)} drawn, {lived} survived", flush=True)


if __name__ == "__main__":
    main()
