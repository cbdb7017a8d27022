"""The command that times rivals, against another checkout too."""

import shutil
import sys

import pytest

import baselines
import runs
from measure import rivals_speed

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--tokens", "40", "--batches", "1", "2", "--budgets", ".25", "--pairs", "2"]


def rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_both_checkouts_are_timed_and_compared(tmp_path, capsys):
    other = tmp_path / "other"
    for name in ("baselines", "backbones"):
        shutil.copytree(runs.ROOT / name, other / name)
    for name in ("common.py", "runs.py"):
        shutil.copy(runs.ROOT / name, other)
    file = other / "baselines/divprune.py"
    changed = file.read_text().replace("gap.argmax(1)", "gap.argmin(1)")
    assert changed != file.read_text()
    file.write_text(changed)
    out = tmp_path / "table.md"
    rivals_speed.main([*SMALL, "--against", str(other), "--out", str(out)])
    head, *table = rows(out.read_text())
    assert head[-3:] == ["ms before", "times as fast", "same tokens"]
    assert [(row[0], row[2], row[3], row[-1]) for row in table] == [
        (name, batch, "10", "NO" if name == "divprune" else "yes")
        for name in ("divprune", "cdpruner_words", "pact") for batch in "12"]
    assert "CPU, one thread" in out.read_text() and str(tmp_path) not in out.read_text()
    assert sys.modules["baselines"] is baselines and str(other) not in sys.path


def test_alone_and_what_cannot_be_timed(tmp_path, capsys):
    head, *table = rows(rivals_speed.main([*SMALL, "--methods", "divprune", "dart"]))
    assert head == ["method", "N", "batch", "K", "ms"] and len(table) == 4
    assert all(float(row[-1]) > 0 for row in table)
    for more, message in ((["--methods", "fast"], "methods='fast': expected some of cdpruner"),
                          (["--methods", "hired"], "'hired': expected rivals that read no more"),
                          (["--against", str(tmp_path)], "expected a checkout of this repository")):
        with pytest.raises(ValueError, match=message):
            rivals_speed.main([*SMALL, *more])
