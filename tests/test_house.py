"""The house: imports point down, the core fits into an afternoon, pages into a sitting."""

import ast
import io
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parents[1]
# each may import those before it, and what its own room holds; methods stand on one floor, but that
# StepPrune has AutoSelect's gate
FLOORS = ["checkpoints", "common", "runs", "backbones", "baselines", "autoselect", "stepprune",
          "recon_selector", "tiny", "data", "benchmarks", "evaluate", "train", "measure",
          "examples", "exercises"]
ALONE = {"autoselect": {"common", "runs"}, "recon_selector": {"common", "runs", "baselines"},
         "stepprune": {"common", "runs", "autoselect"}, "runs": set(),
         "tiny": {"common", "runs"}}
CHECKPOINTS = "backbones.checkpoints"      # files and devices: below all, though in an upper room
CORE = ("common.py", "autoselect.py", "train.py", "evaluate.py")


def files():
    return [path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
            if path.parent.name not in ("tests", "notebooks", "coursework")]


def room_of(path: Path) -> str:
    if path == ROOT / "backbones/checkpoints.py":
        return "checkpoints"
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First names of all that a file imports, at any place in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add("checkpoints" if node.module == CHECKPOINTS else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor: say in FLOORS where it stands"
    below = ALONE.get(room, {*FLOORS[:FLOORS.index(room)]})
    above = (imported(path) & {*FLOORS}) - below - {room}
    assert not above, f"{path.name} imports {', '.join(sorted(above))} from above"


def test_no_method_is_imported_by_name():
    """Methods are found by their names: only one another's parts and notebooks import them."""
    methods = {"autoselect", "stepprune", "recon_selector"}
    by = {path.name: imported(path) & methods for path in files()}
    assert {name: names for name, names in by.items() if names} == {"stepprune.py": {"autoselect"}}


def test_the_core_fits_into_an_afternoon():
    lines = [line for name in CORE for line in (ROOT / name).read_text().splitlines()]
    assert len(lines) <= 1950
    code = [line for name in CORE for line in code_lines((ROOT / name).read_text())]
    assert sum(map(len, code)) / len(code) <= 60
    assert sum(len(line) > 100 for line in lines) <= .05 * len(lines)


def code_lines(text: str) -> list[str]:
    """Without blank lines, comments and docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout and not token.string.startswith(('"""', 'r"""')):
            numbers |= {*range(token.start[0], token.end[0] + 1)}
    return [line for number, line in enumerate(text.splitlines(), 1) if number in numbers]


@pytest.mark.parametrize("name", runs.method_names())
def test_every_option_of_a_method_says_whose_its_default_is(name):
    own = runs.options_class(runs.load_method(name).Config)
    for option in fields(own):
        text = option.metadata["help"]
        assert "[paper" in text or "[ours" in text or text.startswith("..."), option.name


def test_pages_are_short_and_the_first_says_what_it_is():
    """What, how big, the result and the command by line 15."""
    page = (ROOT / "README.md").read_text().splitlines()
    assert len(page) <= 120
    top = "\n".join(page[:15])
    assert "vision-language model" in top and "lines" in top and "make train" in top
    assert "Retention" in top
    assert len((ROOT / "results/README.md").read_text().splitlines()) <= 150


def test_every_room_and_file_has_its_place_in_the_readme():
    page = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *(p for p in ROOT.iterdir() if (p / "__init__.py").exists())]:
        assert f"({path.name}" in page, f"README.md does not name {path.name}"
