"""Every family is trained and evaluated on the tiny world, though its VLM has never seen it."""

import json

import pytest
from tiny_models import MODELS

import evaluate
import train
from benchmarks.predictions import file_name

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_family_is_trained_and_evaluated_on_scenes(family, tmp_path):
    path = MODELS[family](tmp_path / "vlm", tokens="bytes")
    run = tmp_path / "run"
    train.main(["--method", "autoselect", "--model", path, "--run", str(run), "--steps", "1",
                "--batch", "2", "--layers", "1", "--heads", "2", "--keep", "8", "--workers", "0",
                "--device", "cpu", "--evaluate", "False", "--questions", "2"])
    drawn = family in ("llava_next", "llava_onevision")
    lines = evaluate.main(["--run", str(run), "--sample", "10", "--budgets", "8", "--methods",
                           "random", "--device", "cpu", "--draw", str(drawn)])
    assert {line["method"] for line in lines[1:]} == {"random", str(run)}
    assert (run / "kept.png").exists() == drawn
    unknown = family in ("llava_next", "internvl")     # crops: there is no ground truth
    for name in ("random", str(run)):
        file = run / "predictions/tiny_world" / f"{file_name(name, 8)}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
        assert len(rows) >= 10 and {row["kept"] for row in rows} == {8}
        assert all(row["recall"] is None for row in rows) == unknown
