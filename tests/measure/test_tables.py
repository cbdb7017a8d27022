"""Commands that make tables and pictures of what runs and predictions left."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import tiny_world
from common import FrozenVLM
from measure import likeness, spread, training_curves

RUN = "results/autoselect_tiny/selector"


def predictions(folder, method: str, k: int, rows: list[tuple]) -> None:
    """A predictions file of the tiny world; rows: (family, is right, kept, things)."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {"benchmark": "tiny_world", "model": "tiny/llava", "method": method, "budget": k,
              "questions": len(rows)}
    lines = [header]
    for number, (family, right, kept, things) in enumerate(rows):
        gold = {"family": family, "answer": "yes", "things": things}
        lines.append({"number": number, "id": str(number), "prompt": "?", "gold": gold,
                      "answer": "yes" if right else "no", "kept": kept, "seen": [kept] * 3,
                      "flops": 1, "ms": {"vision": 1., "select": 1., "prefill": 1., "decode": 1.}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{method.replace('/', '_')}-{k}.jsonl").write_text(text)


def test_the_spread_of_an_adaptive_method_by_hand(tmp_path, capsys):
    asked = [("exist", 1, 1, 1), ("exist", 0, 2, 2), ("count", 1, 63, 7)]
    predictions(tmp_path, "runs/one", 22, asked)
    predictions(tmp_path, "random", 22, [(family, 1, 22, things) for family, _, _, things in asked])
    (line,) = spread.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert (line["method"], line["K"]) == ("runs/one", 22), "the other keeps as many everywhere"
    found = line["spread"]["tiny_world"]
    assert found["mean"] == 22 and found["families"] == {"exist": 1.5, "count": 63}
    assert [found["deciles"][i] for i in (0, 5, -1)] == [1, 2, 63]
    buckets = [(b["from"], b["to"], b["n"], b["score"]) for b in found["buckets"]]
    assert buckets == [(1, 1, 1, 100), (2, 3, 1, 0), (4, 7, 0, None), (8, 15, 0, None),
                       (16, 31, 0, None), (32, 63, 1, 100)]
    assert found["things"] == pytest.approx(226 / (2522 * 62 / 3) ** .5)
    page = (tmp_path / "out/spread.md").read_text()
    assert "correlation with number of things" in page and page.strip() in capsys.readouterr().out
    assert Image.open(tmp_path / "out/spread.png").size[0] > 300


def test_predictions_that_do_not_spread_are_an_error(tmp_path):
    predictions(tmp_path, "random", 4, [("exist", 1, 4, 2), ("exist", 0, 4, 2)])
    with pytest.raises(ValueError, match="no method whose K differs"):
        spread.main([str(tmp_path), "--out", str(tmp_path)])


def test_training_curves_are_drawn(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "loss": 1. / (i + 1), "grad_norm": 1.} for i in range(30)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    training_curves.main([*runs, "--out", str(tmp_path / "drawn/curves.png")])
    assert Image.open(tmp_path / "drawn/curves.png").size[0] > 600
    with pytest.raises(FileNotFoundError, match="has no log.jsonl"):
        training_curves.main([str(tmp_path), "--out", str(tmp_path / "curves.png")])


def test_likeness_is_of_the_selectors_own_scores(tmp_path, capsys):
    means = likeness.main(["--run", RUN, "--n", "6", "--out", str(tmp_path / "likeness.png")])
    assert all(-1 <= groups[name] <= 1 for groups in means.values() for name in ("best", "worst"))
    assert Image.open(tmp_path / "likeness.png").size[0] > 300
    assert "among the best tokens" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_likeness_reads_pictures_of_one_size(family):
    questions = likeness.first_questions(family, 9)
    scenes = {question.id.split("-")[0] for question in questions}
    assert len(questions) == len(scenes) == 9
    assert {question.images()[0].size for question in questions} == {(144, 144)}
    every = tiny_world.load(family=family, n=300)
    assert questions[0].id == every[0].id


def test_likeness_of_what_has_no_scores_is_refused(tmp_path):
    class Silent(torch.nn.Module):
        rows = "dialogue"

        def scores(self, units, question):
            return None
    vlm = FrozenVLM.from_pretrained("tiny/llava")
    with pytest.raises(ValueError, match="Silent has no scores"):
        likeness.measure_likeness(vlm, Silent(), 2, tmp_path / "none.png")
