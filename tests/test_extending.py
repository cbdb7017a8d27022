"""A method, a baseline and a benchmark are one file each: those in tests/toys, and no other edit.

The same for a backbone: tests/backbones/test_new_family.py.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch
from short_runs import kill_at, same, weights, without_time

import baselines
import benchmarks
import evaluate
import runs
import train
from common import FrozenVLM

TOYS = Path(__file__).parent / "toys"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """What lies in tests/toys lies where Python, or the room, finds it."""
    monkeypatch.syspath_prepend(str(TOYS))
    for room in (baselines, benchmarks):
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(TOYS)])


def toy_run(folder, **changes):
    words = ["--method", "toy_method", "--run", str(folder), "--batch", "2", "--steps", "4",
             "--workers", "0", "--save_every", "2", "--device", "cpu", "--dtype", "float32"]
    for name, value in changes.items():
        words += [f"--{name}", str(value)]
    return train.train(*train.parse(words))


def test_a_method_of_one_file_trains_resumes_is_evaluated_and_shared(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--method", "toy_method", "--help"])
    assert "weight of the mean share [ours] (default: 0.1)" in capsys.readouterr().out
    whole = toy_run(tmp_path / "whole")
    parts = toy_run(tmp_path / "parts", micro=1)
    for name, x in weights(whole).items():
        assert torch.allclose(weights(parts)[name], x, rtol=1e-3, atol=2e-5)
    revive = kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path / "killed")
    revive()
    killed = toy_run(tmp_path / "killed")
    assert same(weights(whole), weights(killed)) and without_time(whole) == without_time(killed)

    lines = evaluate.main(["--run", str(whole), "--methods", "random", "toy_first", "toy_last",
                           "--benchmarks", "tiny_world", "toy_benchmark", "--sample", "20",
                           "--budgets", "16", "--device", "cpu", "--resamples", "10"])
    methods = {line["method"] for line in lines}
    assert methods == {"vanilla", "random", "toy_first", "toy_last", str(whole)}
    assert all({"tiny_world", "toy_benchmark"} == line["scores"].keys() for line in lines)
    assert (whole / "kept.png").exists() and (whole / "curve.png").exists()

    vlm = FrozenVLM.from_pretrained("tiny/llava")
    (whole / "selector").rename(tmp_path / "shared")
    selector, about = runs.load_selector(tmp_path / "shared", vlm)
    assert about["method"] == "toy_method" and same(selector.state_dict(), weights(killed))
    assert "toy_method for tiny/llava" in (tmp_path / "shared/README.md").read_text()


def test_what_a_method_lacks_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_method.py").write_text(
        "from runs import Selector\nclass Config: pass\nTINY = {}\n"
        "class Method(Selector):\n    def loss(self): pass\n")
    with pytest.raises(ValueError, match=r"half_method.py is no method, it lacks LARGE, sel"):
        runs.load_method("half_method")
    monkeypatch.setitem(runs.load_method("toy_method").TINY, "sparsty", 1)
    with pytest.raises(ValueError, match="TINY or LARGE of toy_method.py names sparsty"):
        train.parse(["--method", "toy_method"])
    for other in ("nothing_here", "antigravity", "sys", "tiny.scenes"):
        with pytest.raises(ValueError, match=f"method='{other}': expected one of autoselect"):
            runs.load_method(other)
    assert "antigravity" not in sys.modules            # a downloaded config.json names no module
    assert runs.load_method("recon") is runs.load_method("recon_selector")


def test_no_method_is_named_outside_its_file():
    """Nor imported: not in train.py, evaluate.py, runs.py, nor in any room below them."""
    root = TOYS.parents[1]
    names = {*runs.method_names(), "recon"}
    assert names == {"autoselect", "recon_selector", "stepprune", "recon"}
    files = [root / f"{name}.py" for name in ("common", "runs", "train", "evaluate")]
    for room in ("backbones", "baselines", "benchmarks", "data"):
        files += root.glob(f"{room}/*.py")
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names_in = getattr(node, "names", [])
            imported = [alias.name for alias in names_in if hasattr(alias, "name")]
            imported.append(getattr(node, "module", None))
            text = node.value if isinstance(node, ast.Constant) else None
            assert not names & {text, *imported}, path
