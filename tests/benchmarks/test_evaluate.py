"""evaluate.py as a command: cut off and continued, and from the files alone."""

import json
import re
import shutil

import pytest
from prediction_rows import timeless

import benchmarks
import common
import evaluate
from benchmarks import answering, predictions, tables, tiny_world
from benchmarks.predictions import Predictions
from common import FrozenVLM
from tiny import benchmarks as tiny_copies

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(out, family, methods):
    text = "--budgets 48 0.5 --sample 9 --batch 3 --resamples 20 --dtype float32 --device cpu"
    what = ["--model", f"tiny/{family}", "--benchmarks", "tiny_world", "--methods", *methods]
    return [*what, *text.split(), "--out", str(out)]


def stored(out):
    return {
        path.name: timeless(predictions.read(path)[1])
        for path in sorted((out / "predictions/tiny_world").iterdir())
    }


@pytest.mark.parametrize(
    "family, methods",
    [
        ("llava", ["random", "tome"]),
        ("qwen2_5_vl", ["random", "pdrop_last"]),
        pytest.param("llava", ["all"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_the_unbroken_one(
    tmp_path, monkeypatch, capsys, family, methods
):
    whole = evaluate.main(arguments(tmp_path / "whole", family, methods))
    real, calls = Predictions.add, []

    def dying(self, rows):
        calls.append(self)
        if len(calls) % 5 == 0:  # in the middle of writing a batch
            real(self, rows[:2])
            with open(self.file, "a") as file:
                file.write(json.dumps(rows[2])[:30])
            raise KeyboardInterrupt
        real(self, rows)

    monkeypatch.setattr(Predictions, "add", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(arguments(tmp_path / "cut", family, methods))
    monkeypatch.setattr(Predictions, "add", real)
    lines = evaluate.main(arguments(tmp_path / "cut", family, methods))
    assert "half a row at its end, 30 bytes, is cut off" in capsys.readouterr().out
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")
    assert tables.intervals_table(lines) == tables.intervals_table(whole)
    assert {line["method"] for line in lines} > {"vanilla", "random"}

    def answered_again(*_):
        raise AssertionError("all is there: nothing is asked")

    monkeypatch.setattr(answering, "answer_batch", answered_again)
    assert evaluate.main(arguments(tmp_path / "cut", family, methods)) == lines


def test_scores_come_from_the_files_alone(tmp_path, monkeypatch, capsys):
    lines = evaluate.main(arguments(tmp_path / "out", "llava", ["random"]))

    def no_model(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(FrozenVLM, "from_pretrained", no_model)
    monkeypatch.setattr(tiny_world, "load", no_model)
    shutil.copytree(tmp_path / "out/predictions", tmp_path / "elsewhere")
    assert evaluate.main(["--rescore", str(tmp_path / "elsewhere"), "--resamples", "20"]) == lines
    assert capsys.readouterr().out.count(tables.headline(lines)) == 2
    for name in ("benchmarks.md", "benchmarks.json"):
        assert (tmp_path / "elsewhere" / name).read_text() == (tmp_path / "out" / name).read_text()
    assert (tmp_path / "elsewhere/curve.png").stat().st_size > 5000
    one = json.loads(
        (tmp_path / "out/predictions/tiny_world/random-48.jsonl").read_text().splitlines()[1]
    )
    assert set(one) == predictions.ROW | {"recall"}
    assert one["kept"] == 48 and one["seen"] == [48, 48, 48.0]


def test_options_go_to_the_load_that_has_them():
    def options(*texts):
        return benchmarks.load_options(["tiny_world"], texts)

    assert options("tiny_world.n=30", "tiny_world.split=calibration") == {
        "tiny_world": {"n": 30, "split": "calibration"}
    }
    for wrong in ("tiny_world.frames=1", "pope.split=test", "tiny_world"):
        with pytest.raises(ValueError, match="<benchmark>.<option>=<value> of tiny_world"):
            options(wrong)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--benchmarks", "nonsense"], "known are .*tiny_world"),
        (["--methods", "nonsense"], "known are .*random"),
        (["--budgets", "1.5"], "budgets=.*1.5"),
        (["--budgets", "-3"], "budgets=.*-3"),
        (["--backbone", "nonsense"], "backbone=.*known are LLaVA-1.5-7B"),
        (["--data_root", "tiny"], "data_root='tiny': expected .* holds tiny_world"),
        (["--device", "tpu"], "device='tpu': this machine has cpu"),
        (["--out", "README.md/below"], "nothing can be written into README.md/below"),
        (["--rescore", "tiny", "--budgets", "16"], "model=.*: --rescore does not read it"),
    ],
)
def test_a_wrong_command_is_refused_before_a_model_is_loaded(monkeypatch, more, words):
    monkeypatch.setattr(FrozenVLM, "from_pretrained", None)
    with pytest.raises((ValueError, OSError), match=words):
        evaluate.main(["--model", "tiny/llava", *more])


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A rehearsal copy of two benchmarks, and the tiny LLaVA that reads their prompts."""
    folder = tmp_path_factory.mktemp("copies")
    tiny_copies.main([str(folder), "--n", "60"])
    return folder


STEPPRUNE = "results/stepprune_tiny/selector"


def header(out, benchmark, method, k):
    path = out / "predictions" / benchmark / f"{predictions.file_name(method, k)}.jsonl"
    return predictions.read(path)


@pytest.mark.parametrize("sample", [0, 20])
def test_what_decides_how_many_is_steered_on_rows_of_the_benchmark_that_are_not_scored(
    tmp_path, copies, monkeypatch, sample
):
    steered = []
    real = answering.calibration_batches

    def watched(vlm, questions, size):
        steered.extend(question.id for question in questions)
        return real(vlm, questions, size)

    monkeypatch.setattr(answering, "calibration_batches", watched)
    lines = evaluate.main([
        "--run", STEPPRUNE, "--model", str(copies / "llava"), "--data_root", str(copies),
        "--benchmarks", "pope", "--methods", "random", "--budgets", "24", "--device", "cpu",
        "--out", str(tmp_path), "--resamples", "20", "--sample", str(sample), "--draw", "False",
    ])
    about, rows = header(tmp_path, "pope", STEPPRUNE, 24)
    plain, others = header(tmp_path, "pope", "random", 24)
    scored = {row["id"] for row in rows}
    assert scored == {row["id"] for row in others} and scored.isdisjoint(steered)
    assert len(steered) == (len(scored) // 9 if sample == 0 else len(steered)) > 0
    assert len(scored) == (sample or len(scored))
    assert about["steered on"] == f"{len(steered)} of its questions, which are not scored"
    assert "steered on" not in plain
    kept = {(line["method"], line["K"]): line["cost"]["kept"] for line in lines}
    assert 12 < kept[STEPPRUNE, 24] < 36 and kept["random", 24] == 24
    # K stands beside what was kept, wherever they differ
    assert f"(kept {kept[STEPPRUNE, 24]:.1f})" in tables.summary(lines)
    assert f"steered to K on {about['steered on']}" in (tmp_path / "benchmarks.md").read_text()


def test_without_a_method_that_decides_every_question_is_scored(tmp_path, copies):
    evaluate.main([
        "--model", str(copies / "llava"), "--data_root", str(copies), "--benchmarks", "pope",
        "--methods", "random", "--budgets", "24", "--device", "cpu", "--out", str(tmp_path),
        "--resamples", "20", "--draw", "False",
    ])
    about, rows = header(tmp_path, "pope", "random", 24)
    whole = benchmarks.load_module("pope").load(copies / "pope")
    assert len(rows) == about["questions"] == len(whole)


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path, copies, capsys):
    with pytest.raises(RuntimeError, match="the tables lack seed, see above; the same command"):
        evaluate.main([
            "--model", str(copies / "llava"), "--data_root", str(copies), "--sample", "8",
            "--benchmarks", "seed", "pope", "--options", "seed.split=nowhere", "--methods",
            "random", "--budgets", "24", "--device", "cpu", "--out", str(tmp_path),
            "--resamples", "20", "--draw", "False",
        ])
    printed = capsys.readouterr().out
    assert "seed: left out" in printed and "POPE" in (tmp_path / "benchmarks.md").read_text()
    with pytest.raises((ValueError, OSError)):                    # nothing is left
        evaluate.main([
            "--model", str(copies / "llava"), "--data_root", str(tmp_path / "nowhere"),
            "--benchmarks", "pope", "--methods", "random", "--out", str(tmp_path / "none"),
        ])


def test_a_selector_of_another_backbone_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="was trained for another backbone"):
        evaluate.main(["--model", "tiny/qwen2_5_vl", "--run", STEPPRUNE, "--out", str(tmp_path)])


@pytest.mark.parametrize("more, words", [
    (["--calibration", "7"], "calibration=7: a run that keeps .* does not read it"),
    (["--ways", "exactly"], r"ways=\['exactly'\]: this method has gated"),
])
def test_what_no_run_reads_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(common, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words):
        evaluate.main(["--run", "results/autoselect_tiny/selector", "--device", "cpu", "--out",
                       str(tmp_path), *more])


@pytest.mark.parametrize("others", [[], ["random", "sparsevlm"]])
def test_a_budget_that_a_rival_cannot_have_leaves_out_its_row_alone(tmp_path, capsys, others):
    lines = evaluate.main([
        "--model", "tiny/llava", "--methods", "pdrop", *others, "--budgets", "16", "--sample", "4",
        "--resamples", "20", "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    for name in ["pdrop", *others[1:]]:
        assert re.search(f"{name} 16: left out, keep=16 .* the least is 36.8", said)
    assert [line["method"] for line in lines] == ["vanilla", *others[:1]]


def test_answers_of_something_else_are_refused_before_a_method_is_steered(tmp_path, monkeypatch):
    evaluate.main(arguments(tmp_path, "llava", ["random"]))

    def steered(*_):
        raise AssertionError("what takes long was begun")
    monkeypatch.setattr(answering, "calibration_batches", steered)
    other = ["--seed", "1", "--run", "results/stepprune_tiny/selector"]
    with pytest.raises(ValueError, match=r"vanilla-0.jsonl holds answers of something else .seed"):
        evaluate.main([*arguments(tmp_path, "llava", ["random"]), *other])
