"""Every notebook runs from top to bottom, and stays short enough to read and to keep in git."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
QUICK = "4_rivals.ipynb"                                      # the quickest of them


def code(path) -> list[str]:
    """The source of its code cells."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_the_kernel_is_this_python():
    """Else the notebooks would run with whatever packages another Python has."""
    assert Path(KernelManager(kernel_name="python3").format_kernel_cmd()[0]) == Path(sys.executable)


@each_notebook
def test_what_it_imports_is_there(path):
    lines = [line for cell in code(path) for line in cell.splitlines() if not line.startswith("%")]
    found = [node for node in ast.walk(ast.parse("\n".join(lines)))
             if isinstance(node, ast.Import | ast.ImportFrom)]
    assert found
    for node in found:
        exec(ast.unparse(node), {})


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[pytest.mark.slow] * (path.name != QUICK), id=path.name)
    for path in NOTEBOOKS])
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()


@each_notebook
def test_cells_are_short(path):
    cells = code(path)
    assert cells
    for number, cell in enumerate(cells):
        lines = cell.splitlines()
        assert len(lines) <= 15, (
            f"{path.name}, code cell {number} has {len(lines)} lines: {lines[0]}"
        )


@each_notebook
def test_file_is_small(path):
    assert path.stat().st_size <= 600 * 1024
