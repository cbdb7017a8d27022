"""What the README promises: its commands exist as printed, its map names files that are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.split("#")[0].strip()]


def test_every_file_the_readme_links_is_there():
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if not x.startswith("http")]
    assert links and not [x for x in links if not (ROOT / x).exists()]


@pytest.mark.parametrize("page", ["README.md", "tiny/README.md"])
def test_quoted_tables_are_the_files_that_commands_made(page, tmp_path):
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    for name, quoted in re.findall(r"<!-- table: (\S+) -->\n(.*?)\n?<!-- end -->", text, re.S):
        assert quoted == ((ROOT / page).parent / name).read_text().strip()
    (tmp_path / "made.md").write_text("| new |\n")
    (tmp_path / "page.md").write_text("a\n<!-- table: made.md -->\nold\n<!-- end -->\nb\n")
    evaluate.refresh(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "a\n<!-- table: made.md -->\n| new |\n<!-- end -->\nb\n"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_every_python_command_has_flags_that_parse(command):
    """Each option of the printed command is one that the script's own --help knows."""
    script, *words = command.split()[1:]
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    unknown = [w for w in words if w.startswith("--") and w not in shown.stdout]
    assert not unknown, f"{script} does not know {unknown}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(command):
    subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)


def test_imports_only_point_down():
    """Floors: methods, baselines, common, pictures, tiny; benchmarks and stepprune; train, evaluate, answer."""
    ground = {"autoselect", "recon_selector", "baselines", "common", "pictures", "tiny"}
    floors = {**dict.fromkeys(ground, 0), "stepprune": 1, "benchmarks": 1, "train": 2, "evaluate": 3, "answer": 4}
    folders = ("", "baselines/", "benchmarks/", "common/", "tiny/")
    for path in [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        text = re.sub(r"^    .*$", "", path.read_text(), flags=re.M)      # late imports inside functions are allowed
        for found in re.findall(r"^(?:from|import) (\w+)", text, re.M):
            if found in floors and found != own:
                assert floors[found] < floors[own], f"{path.name} imports {found}"
