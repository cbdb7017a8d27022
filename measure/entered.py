"""How many lines of the project a command really enters: what a reader of it has to read.

    python -m measure.entered train.py --method autoselect --steps 2 --run runs/counted --workers 0

The script runs in this process, with its own arguments, until it ends. Then follow, file by file,
the lines of all functions that were entered at least once, from the decorators to the end: as they
are printed, with blank lines, comments and docstrings, and of these the lines of code alone. Code
of modules and of classes, such as imports and the fields of a dataclass, is not counted. What runs
in other processes is not seen: give a script that starts some --workers 0.
"""

import argparse
import ast
import io
import runpy
import sys
import threading
import tokenize
from pathlib import Path
from types import FrameType

import runs

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, *FUNCTION)


class Watch:
    """Notes the functions of a project that are entered while it is open: starts[file] are the
    lines where they begin. root: its folder; hidden folders, and this file, are not counted."""

    def __init__(self, root: Path):
        self.prefix = f"{root}/"
        self.others = (f"{root}/.", __file__)
        self.starts = {}

    def __enter__(self) -> "Watch":
        threading.settrace(self._note)
        sys.settrace(self._note)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)
        threading.settrace(None)

    def _note(self, frame: FrameType, event: str, _):
        file = frame.f_code.co_filename
        if file.startswith(self.prefix) and not file.startswith(self.others):
            self.starts.setdefault(file, set()).add(frame.f_code.co_firstlineno)
        return None                                   # to be told of calls alone, not of lines


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: no blank line, no comment, no docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def count(text: str, starts: set[int]) -> tuple[int, int]:
    """(lines, of them code) of the functions that begin at these lines; each line once."""
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, FUNCTION):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if start in starts:
            lines.update(range(start, node.end_lineno + 1))
    return len(lines), len(lines & code_lines(text))


def run(script: Path, arguments: list[str]) -> dict[str, tuple[int, int]]:
    """Run a script to its end -> {file: (lines, of them code)} of the functions entered in the
    folder of the script and below."""
    script = script.resolve()
    argv, path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        with Watch(script.parent) as watch:
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.path[:] = argv, path
    counts = {}
    for file, starts in sorted(watch.starts.items()):
        lines, code = count(Path(file).read_text(encoding="utf-8"), starts)
        if lines:
            counts[file.removeprefix(watch.prefix)] = (lines, code)
    return counts


def table(counts: dict[str, tuple[int, int]]) -> str:
    """The lines of each file, and their sums, as Markdown."""
    rows = [f"| {file} | {lines} | {code} |" for file, (lines, code) in counts.items()]
    lines, code = (sum(column) for column in zip(*counts.values()))
    head = "| file | lines of functions entered | of them code |"
    total = f"| sum of {len(counts)} files | {lines} | {code} |"
    return "\n".join([head, "|---|---|---|", *rows, total])


def main(args: list[str]) -> dict[str, tuple[int, int]]:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("script", type=Path, help="to be run, such as train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own: all that follow")
    options = parser.parse_args(args)
    if not options.script.is_file():
        raise FileNotFoundError(f"script={options.script}: expected a Python file, such as "
                                "train.py")
    try:
        compile(options.script.read_bytes(), options.script, "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"script={options.script} is no Python: {error}") from error
    counts = run(options.script, options.arguments)
    print(f"\n{table(counts)}")
    return counts


if __name__ == "__main__":
    runs.command(main)
