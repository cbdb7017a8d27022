"""What the README promises: its commands exist as printed, its map names files that are there."""

import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "backbones/README.md", "baselines/README.md", "examples/README.md",
         "exercises/README.md", "measure/README.md", "results/README.md", "tests/README.md",
         "tiny/README.md"]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of every bash block."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for inline in re.findall(r"`(python [^`]+)`", text):
            if not re.search(r"\b[A-Z]{3,}\b", inline):      # NAME stands for many
                found.append((page, " ".join(inline.split())))
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            lines = [line.split("#")[0].strip() for line in block.splitlines()]
            found += [(page, line) for line in lines if line]
    return list(dict.fromkeys(found))


COMMANDS = commands()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_is_there(page):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    links = [link for link in links if not link.startswith("http")]
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


@pytest.mark.parametrize("page", ["README.md", "tiny/README.md", "results/README.md"])
def test_quoted_tables_are_the_files_that_commands_made(page, tmp_path):
    text = (ROOT / page).read_text()
    quotes = re.findall(r"<!-- table: (\S+) -->\n(.*?)\n?<!-- end -->", text, re.S)
    assert quotes
    for name, quoted in quotes:
        assert quoted == ((ROOT / page).parent / name).read_text().strip()
    (tmp_path / "made.md").write_text("| new |\n")
    before, after = "a\n<!-- table: made.md -->\n", "<!-- end -->\nb\n"
    (tmp_path / "page.md").write_text(f"{before}old\n{after}")
    tables.refresh(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == f"{before}| new |\n{after}"


@cache
def help_of(*script: str) -> str:
    """What its --help prints; of our own scripts in this process, which has loaded torch."""
    path = f"{script[1].replace('.', '/')}.py" if script[0] == "-m" else script[0]
    if not (ROOT / path).exists():
        return subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [path, *script[1 + (script[0] == "-m"):], "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


PYTHON = [c for c in COMMANDS if c[1].startswith(("python ", "accelerate launch "))
          and not c[1].startswith("python -m venv")]


@pytest.mark.parametrize("page, command", PYTHON)
def test_every_python_command_has_flags_that_parse(page, command):
    """Each option of the printed command is one that the script's own --help knows, with the
    method that the command names."""
    words = command.removeprefix("python ").removeprefix("accelerate launch ").split()
    script = words[:2] if words[0] == "-m" else words[:1]
    given = words[len(script):]
    if "--method" in given:
        place = given.index("--method")
        script += given[place:place + 2]
    flags = [word for word in given if word.startswith("--")]
    if script[1:2] == ["measure.entered"]:
        flags = []                                     # they are another script's
    unknown = [flag for flag in flags if f"{flag} " not in help_of(*script).replace("\n", " ")]
    assert not unknown, f"{script} does not know {unknown}"


@pytest.mark.parametrize("page, command", [c for c in COMMANDS if c[1].startswith("make ")])
def test_every_make_target_exists(page, command):
    subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, check=True,
                   capture_output=True)


def test_what_is_said_of_the_rivals_is_backed_by_tests():
    page = (ROOT / "baselines/README.md").read_text()
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 15 and not [name for name in named if f"def {name}(" not in written]
    files = {path.name for path in (ROOT / "baselines").glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"^\| (\w+\.py) ", page, re.M))


def test_the_readme_names_every_test_it_rests_on():
    for page in PAGES:
        for name in re.findall(r"tests/[\w/]+\.py", (ROOT / page).read_text()):
            assert (ROOT / name).exists(), f"{page} names {name}"
