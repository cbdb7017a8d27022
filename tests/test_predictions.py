"""Benchmarks: tables, questions asked in batches, predictions files that outlive a kill, scores from these alone."""

import json
import math
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import llava

import evaluate
from baselines import fastv
from benchmarks import flops, predictions, runner, scenes, scores, world
from benchmarks.asking import Impossible, Selector, by_budget, per_picture
from benchmarks.predictions import Predictions
from benchmarks.questions import Question, picture, sample, table
from benchmarks.speed import per_layer, prefill_flops
from common import FrozenVLM, blank_model
from tiny import benchmarks as copies

pytestmark = pytest.mark.usefixtures("one_thread")
HEADER = {"benchmark": "scenes", "model": "m", "method": "random", "budget": 8, "questions": 3, "style": "checkpoint"}


@pytest.fixture(scope="module")
def tiny():
    return FrozenVLM.from_pretrained("tiny/llava", torch.float32)


def question(i, prompt="what ?", gold="a"):
    return Question(str(i), lambda: [Image.new("RGB", (24, 24))], prompt, gold, 4)


def row(i, answer="a", gold="a", prompt="what ?", number=None, **more):
    return {"number": i if number is None else number, "id": str(i), "prompt": prompt, "answer": answer, "gold": gold,
            "kept": 8, "seen": [8, 8, 8.], "flops": 10**9, "ms": {"vision": 1., "select": 1.}} | more


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "ms"} for row in rows]


def files_for(folder, questions, turns, **how):
    return {turn: Predictions(folder / f"{predictions.name(*turn)}.jsonl",
                              HEADER | {"method": turn[0], "budget": turn[1], "questions": len(questions)},
                              questions, **how) for turn in turns}


# --------------------------------------------------------------------------------------------- a run is cut off

def arguments(out, family, methods):
    return ["--model", f"tiny/{family}", "--benchmarks", "scenes", "--methods", *methods, "--budgets", "48", "0.5",
            "--sample", "9", "--batch", "3", "--resamples", "20", "--dtype", "float32", "--device", "cpu", "--out",
            str(out)]


def stored(out):
    return {path.name: timeless(predictions.read(path)[1]) for path in sorted((out / "predictions/scenes").iterdir())}


@pytest.mark.parametrize("family, methods", [("llava", ["all"]), ("qwen2_5_vl", ["random", "pdrop_last"])])
def test_a_killed_run_goes_on_and_ends_as_the_unbroken_one(tmp_path, monkeypatch, capsys, family, methods):
    whole = evaluate.main(arguments(tmp_path / "whole", family, methods))
    real, calls = Predictions.add, []

    def dying(self, rows):
        calls.append(self)
        if len(calls) % 5 == 0:                        # in the middle of writing a batch
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
    names = {"scenes": "tiny world"}
    assert scores.table(lines, names) == scores.table(whole, names)
    assert {line["method"] for line in lines} > {"vanilla", "random"}

    def answered_again(*_):
        raise AssertionError("all is there: nothing is asked")
    monkeypatch.setattr(runner, "answer", answered_again)
    assert evaluate.main(arguments(tmp_path / "cut", family, methods)) == lines


def test_scores_come_from_the_files_alone(tmp_path, monkeypatch):
    lines = evaluate.main(arguments(tmp_path / "out", "llava", ["random"]))

    def no_model(*_, **__):
        raise AssertionError("a model is loaded")
    monkeypatch.setattr(FrozenVLM, "from_pretrained", no_model)
    monkeypatch.setattr(scenes, "load", no_model)
    shutil.copytree(tmp_path / "out/predictions", tmp_path / "elsewhere")
    assert evaluate.main(["--rescore", str(tmp_path / "elsewhere"), "--resamples", "20"]) == lines
    for name in ("benchmarks.md", "benchmarks.json"):
        assert (tmp_path / "elsewhere" / name).read_text() == (tmp_path / "out" / name).read_text()
    assert (tmp_path / "elsewhere/benchmarks.png").stat().st_size > 5000
    one = json.loads((tmp_path / "out/predictions/scenes/random-48.jsonl").read_text().splitlines()[1])
    assert set(one) == predictions.ROW and one["kept"] == 48 and one["seen"] == [48, 48, 48.]


def test_two_processes_share_a_run_and_one_continues_it(tiny, tmp_path):
    questions, turns = sample(world.load(n=20), 18), {("vanilla", 0): None, ("random", 48): evaluate.by_name(0)}
    alone = files_for(tmp_path / "one", questions, turns)
    runner.run(tiny, questions, turns, alone, batch=4)
    for process in (0, 1):
        part = files_for(tmp_path / "two", questions, turns, process=process, processes=2)
        runner.run(tiny, questions, turns, part, 4, process=process, processes=2)
    first = files_for(tmp_path / "cut", questions, turns, process=0, processes=2)
    runner.run(tiny, questions, turns, first, 4, process=0, processes=2)
    rest = files_for(tmp_path / "cut", questions, turns)                       # the second process never came
    assert len(rest["random", 48].done) == 4 + 4 + 2
    runner.run(tiny, questions, turns, rest, 4)
    for turn in turns:
        header, rows = predictions.read(alone[turn].path)
        assert len(rows) == 18 and [x["number"] for x in rows] == [*range(18)]
        for folder, parts in (("two", 2), ("cut", 2)):
            path = tmp_path / folder / alone[turn].path.name
            assert len(predictions.parts(path)) == parts
            assert predictions.read(path)[0] == header and timeless(predictions.read(path)[1]) == timeless(rows)


def test_launched_in_two_processes_it_makes_the_same_table(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `accelerate launch` calls where there are GPUs
    shown = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                            str(port), "--", "evaluate.py", *arguments(tmp_path / "two", "llava", ["random"])],
                           capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert shown.stdout.count("model tiny/llava, prompt checkpoint") == 1     # the tables of one process
    whole = evaluate.main(arguments(tmp_path / "one", "llava", ["random"]))
    two = json.loads((tmp_path / "two/benchmarks.json").read_text())["lines"]
    assert len([*(tmp_path / "two").rglob("*-of-00002.jsonl")]) == 6
    assert [line["scores"] for line in two] == [line["scores"] for line in whole]


# ------------------------------------------------------------------------------------------- the file as it is

def test_half_rows_are_cut_off_and_nothing_else(tmp_path, capsys):
    path, questions = tmp_path / "a.jsonl", [question(i) for i in range(3)]
    Predictions(path, HEADER, questions).add([row(0, answer="né\u2028e"), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])                       # a kill in the last row
    assert [x["id"] for x in predictions.read(path)[1]] == ["0"] and path.read_bytes() == whole[:-7]
    file = Predictions(path, HEADER, questions)
    assert file.done == {"0"} and "cut off" in capsys.readouterr().out
    file.add([row(0, answer="another"), row(1)])       # what is there stays
    assert path.read_bytes() == whole
    path.write_bytes(whole[:20])                       # in the header
    Predictions(path, HEADER, questions).add([row(0, answer="né\u2028e"), row(1)])
    assert path.read_bytes() == whole
    assert predictions.read(tmp_path / "none.jsonl") == (None, [])


@pytest.mark.parametrize("line", ["{}", "nonsense", "[1]", json.dumps({"id": "1"})])
def test_a_broken_row_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0)]).add([row(0)])
    path.write_text(path.read_text() + line + "\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is no row"):
        predictions.read(path)


def test_an_id_has_one_row_and_one_question(tmp_path):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0)]).add([row(0)])
    shutil.copy(path, tmp_path / "a-00002-of-00002.jsonl")
    with pytest.raises(ValueError, match="'0' has a row in .*a-00002-of-00002.jsonl and another"):
        predictions.read(path)
    with pytest.raises(ValueError, match="ids 7 stand 2 times"):
        sample([question(7), question(8), question(7)], None)


@pytest.mark.parametrize("header, questions, words", [
    (HEADER | {"model": "n"}, [question(0)], "model: 'm' there, 'n' here"),
    (HEADER | {"style": "vicuna_v1"}, [question(0)], "style: 'checkpoint' there"),
    (HEADER, [question(0, "who ?")], "prompt of '0' differs: 'what \\?' there, 'who \\?' here"),
    (HEADER, [question(0, gold=["b"])], "gold of '0' differs"),
    (HEADER, [question(5)], "'0', which is none of these")])
def test_answers_of_something_else_are_refused(tmp_path, header, questions, words):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0)]).add([row(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        Predictions(path, header, questions)
    assert path.read_bytes() == before
    Predictions(path, HEADER | {"versions": {"torch": "9"}}, [question(0)])                  # is said, not refused


# ------------------------------------------------------------------------------------------------------ batches

def mixed(vlm, n=6):
    """Questions about pictures of several sizes, two to one picture, for a model that takes them as they are."""
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8))
              for i, size in enumerate([(24, 24), (24, 48), (40, 24)])]
    prompts = ["what colour is the shape ?", "how many are there ?"]
    return [Question(str(i), lambda i=i: [images[i // 2 % 3]], prompts[i % 2], {}, 5) for i in range(n)]


def ways(vlm):
    def first(states, valid, k):
        return [v.nonzero().flatten()[:k] for v in valid.cpu()]
    return {("vanilla", 0): None, ("random", .4): evaluate.by_name(3), ("random", 15): evaluate.by_name(3),
            ("first", .4): per_picture(lambda units, k: [torch.arange(k)] * len(units.grid)),
            ("fastv", .3): Selector(None, stages=lambda k, n: fastv.stages(k, n, 3, (1,))),
            ("inside", .3): Selector(first, layer=1), ("asked twice", "all"): Selector(None, layer=0)}


def test_batched_answers_are_those_of_one_by_one(vlm, family):
    questions, turns = mixed(vlm), ways(vlm)
    together = runner.answer(vlm, [*enumerate(questions)], turns)
    alone = [runner.answer(vlm, [(i, question)], turns) for i, question in enumerate(questions)]
    for turn, rows in together.items():
        assert timeless(rows) == [x for each in alone for x in timeless(each[turn])], turn
    if family == "qwen":
        assert len({x["kept"] for x in together["random", .4]}) > 1            # different K in one batch
    table = runner.compare(vlm, questions[:4], {turn: turns[turn] for turn in [("vanilla", 0), ("random", .4)]}, 4)
    assert table.count("4 of 4") == 2


def test_a_picture_is_encoded_once_for_all_its_questions(tiny):
    clock = runner.Clock("cpu")
    asked, batch, doubled = runner.ask(tiny, [*enumerate(world.load(n=12)[:9])], clock)
    assert len(asked.pictures.grid) == clock.items["vision"] == len(asked.names) < 9 == len(asked.owner)
    assert doubled is None and len(batch["input_ids"]) == 9


def test_random_tokens_depend_on_picture_and_seed(tiny):
    asked, *_ = runner.ask(tiny, [*enumerate(world.load(n=12))], runner.Clock("cpu"))
    kept = {(b, seed): tuple(keep.tolist()) for seed in (0, 1)
            for b, keep in zip(asked.owner, evaluate.by_name(seed).select(asked, 16))}
    assert len(set(kept.values())) == 2 * len(asked.names) > 2


def test_k_is_a_share_at_most_all_or_left_alone():
    assert by_budget(.5, [9, 10, 10]) == {4: [0], 5: [1, 2]} and by_budget(.01, [9]) == {1: [0]}
    assert by_budget(16, [9, 20]) == {9: [0], 16: [1]} and by_budget("mask", [9, 20]) == {"mask": [0, 1]}
    with pytest.raises(ValueError, match="budgets=.*1.5"):
        evaluate.EvalConfig(budgets=[1.5], benchmarks=["scenes"])
    with pytest.raises(ValueError, match="shares go with --benchmarks"):
        evaluate.EvalConfig(budgets=[.5])
    assert evaluate.EvalConfig(budgets=[8., .5], benchmarks=["scenes"]).budgets == [8, .5]


def test_an_impossible_budget_leaves_its_turn_out_and_the_others_in(tiny, tmp_path, capsys):
    questions = sample(world.load(n=8), 6)
    def refusing(units, k):
        raise ValueError("no such pictures")
    turns = {("pdrop", 4): evaluate.rival_inside("pdrop", tiny, [4], known=False), ("random", 4): evaluate.by_name(0),
             ("refusing", 4): per_picture(refusing)}
    files = files_for(tmp_path, questions, turns)
    runner.run(tiny, questions, turns, files, 3)
    said = capsys.readouterr().out
    assert "pdrop 4: left out, keep=4" in said and said.count("refusing 4: left out, no such pictures") == 1
    assert not files["pdrop", 4].done and len(files["random", 4].done) == 6
    assert isinstance(runner.answer(tiny, [(0, questions[0])], turns)["pdrop", 4], Impossible)


def test_square_puts_the_picture_in_the_middle_of_clips_mean(tiny):
    image = Image.new("RGB", (3, 1), "red")
    padded = np.asarray(runner.square(image, (1, 2, 3)))
    assert padded.shape == (3, 3, 3) and (padded[1] == (255, 0, 0)).all() and (padded[[0, 2]] == (1, 2, 3)).all()
    assert np.asarray(runner.square(Image.new("RGB", (1, 4)), (9, 9, 9)))[:, :, 0].tolist() == [[9, 0, 9, 9]] * 4
    mean = SimpleNamespace(processor=SimpleNamespace(image_processor=SimpleNamespace(
        image_mean=[0.48145466, 0.4578275, 0.40821073])))
    assert runner.padding(mean, "square")(image).getpixel((0, 0)) == (122, 116, 104)
    assert runner.padding(mean, "none")(image) is image


def test_llavas_own_prompt_letter_by_letter(tmp_path):
    vlm = FrozenVLM.from_pretrained(llava(tmp_path, tokens="metaspace"))
    vlm.processor.chat_template = evaluate.VICUNA
    assert vlm._dialogue([("what ?\nAnswer.", None)])[0] == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nwhat ?\nAnswer. ASSISTANT:")
    assert vlm.batch([Image.new("RGB", (24, 24))], [[("what ?", None)]])["input_ids"].shape[0] == 1


def test_questions_that_do_not_fit_are_named(tiny):
    with pytest.raises(ValueError, match="rows, from 0, are the questions 5"):
        runner.answer(tiny, [(0, question(5, "what is this thingummy ?"))], {})
    broken = Question("9", lambda: [picture({"bytes": b"none", "path": "x.png"})], "what ?", {}, 4)
    with pytest.raises(ValueError, match="pictures of question '9' cannot be read: x.png"):
        runner.answer(tiny, [(0, broken)], {})


def test_flops_are_those_that_pytorch_counts():
    vlm = FrozenVLM.from_pretrained("tiny/qwen2_5_vl")
    config = vlm.model.config
    counted, _ = flops.prefill(blank_model(config).eval(), 50)
    # PyTorch counts the rotary angles too
    assert math.isclose(prefill_flops(config.text_config, [50] * len(vlm.lm.layers)), counted, rel_tol=.01)
    assert per_layer(9, {2: 4}, 4) == [9, 9, 4, 4]


# ------------------------------------------------------------------------------------------------------- scores

def share(rows):
    right = sum(x["answer"] == x["gold"] for x in rows)
    return {"right": 100 * right / len(rows), "n": len(rows), "unmatched": 0}


def f1(rows):
    hit, said, there = (sum(f(x) for x in rows) for f in (
        lambda x: x["answer"] == x["gold"] == "yes", lambda x: x["answer"] == "yes", lambda x: x["gold"] == "yes"))
    assert len({x["id"] for x in rows}) == len(rows)
    return {"f1": 200 * hit / (said + there) if said + there else 0., "n": len(rows), "unmatched": 0}


def summed(rows):
    """As MME: of each category the share of right answers and of pictures with both right."""
    total = 0.
    for category in {x["gold"]["category"] for x in rows}:
        pairs = {}
        for x in rows:
            if x["gold"]["category"] == category:
                pairs.setdefault(x["gold"]["pair"], []).append(x["answer"] == x["gold"]["answer"])
        total += 100 * (np.mean(sum(pairs.values(), [])) + np.mean([all(p) for p in pairs.values()]))
    return {"total": total, "n": len(rows), "unmatched": 0}


SHARE, F1, SUM = (SimpleNamespace(NAME=f.__name__, MAIN=key, score=f) for f, key in (
    (share, "right"), (f1, "f1"), (summed, "total")))


def test_the_bootstrap_by_hand():
    rows = [row(i, answer="yes" if i % 3 else "no", gold="yes" if i % 2 else "no") for i in range(12)]
    right = np.array([100. * (x["answer"] == x["gold"]) for x in rows])
    rng = np.random.default_rng([5, 0])
    drawn = [rng.integers(0, 12, 12) for _ in range(30)]
    assert np.allclose(scores.bootstrap(SHARE, rows, 5, 30), [right[i].mean() for i in drawn])
    again = [f1([{**rows[q], "id": n} for n, q in enumerate(i)])["f1"] for i in drawn]
    assert np.allclose(scores.bootstrap(F1, rows, 5, 30), again) and scores.values_of(F1, rows) is None
    many = scores.bootstrap(SHARE, [row(i, answer="a" if i % 4 else "b") for i in range(400)], 0, 1000)
    assert abs(many.mean() - 75) < .3 and abs(many.std() - 100 * (.75 * .25 / 400) ** .5) < .1
    assert np.allclose(scores.interval(many), 75 + 1.96 * np.array([-1, 1]) * many.std(), atol=.6)


def test_what_is_scored_together_is_drawn_together():
    rows = [row(i, "yes", {"answer": "yes" if i % 7 else "no", "category": "ab"[i // 8], "pair": i // 2})
            for i in range(16)]
    a, b = scores.values_of(SUM, rows)
    assert len(a) == len(b) == 4 and math.isclose(a.mean() + b.mean(), summed(rows)["total"])
    draws = scores.bootstrap(SUM, rows, 0, 300)
    assert abs(draws.mean() - summed(rows)["total"]) < 15 and draws.max() <= 400
    copied = {"gold": {"copies": 4, "index": 3_000_017}, "id": "x"}
    assert scores.group(copied) == ("", 17) and scores.group({"gold": "a", "id": "x"}) == ("", "x")


def written(folder, name, method, k, answers, header=None):
    rows = [row(i, answer) for i, answer in enumerate(answers)]
    head = HEADER | {"benchmark": name, "method": method, "budget": k, "questions": len(rows)} | (header or {})
    questions = [question(i) for i in range(len(rows))]
    Predictions(folder / name / f"{predictions.name(method, k)}.jsonl", head, questions).add(rows)


def test_averages_over_different_benchmarks_stand_not_side_by_side(tmp_path, capsys):
    modules = {"one": SHARE, "two": SHARE, "zero": SHARE}
    for name, vanilla, pruned in (("one", "aaaa", "aaab"), ("two", "aabb", "abbb"), ("zero", "bbbb", "bbbb")):
        written(tmp_path, name, "vanilla", 0, vanilla)
        written(tmp_path, name, "random", 8, pruned)
    written(tmp_path, "one", "fastv", 8, "aaaa")
    written(tmp_path, "two", "fastv", 8, "aa", {"questions": 9})                   # incomplete
    files, header = scores.found(tmp_path, modules)
    assert "2 of 9 questions are answered; left out" in capsys.readouterr().out and header["model"] == "m"
    lines = scores.summarise(files, modules, resamples=10)
    by = {line["method"]: line for line in lines}
    assert [line["method"] for line in lines][0] == "vanilla" and by["vanilla"]["average"] == 100
    # of zero there is no retention, of no row: it stands in no average
    assert by["random"]["average"] == (75 + 50) / 2 and by["random"]["benchmarks"] == 2
    assert by["fastv"]["average"] == 100 and by["fastv"]["benchmarks"] == 1
    names = {name: name for name in modules}
    cells = {line.split(" | ")[0]: line for line in scores.table(lines, names).splitlines()}
    assert cells["| random"].endswith("| 62.5 | 2 of 3 |") and cells["| fastv"].endswith("| - | 1 of 3 |")
    partial = scores.table(lines, names, partial=True)
    assert "| 100.0 | 1 of 3 |" in partial
    assert by["random"]["scores"]["one"]["retention"] == 75 and scores.kept_table(lines, names) == ""
    by["random"]["costs"]["two"]["kept"] = 4.
    assert scores.kept_table(lines, names).splitlines()[2:] == ["| random | 8 | 8.0 | 4.0 | 8.0 |"]
    assert by["random"]["cost"] == {"kept": 8, "entering": 8, "last_layer": 8, "layer_mean": 8, "gflops": 1,
                                    "vision_ms": 1, "select_ms": 1}


def test_runs_that_differ_in_the_seed_are_one_row_with_their_spread():
    def line(method, k, retention, layers=8., parts=(50., 70.)):
        return {"method": method, "K": k, "average": retention, "cost": {"kept": 8., "layer_mean": layers}, "scores": {
            "one": {"value": 60., "interval": [50., 70.], "retention": retention, "n": 9, "unmatched": 0,
                    "average": 60., "cat": parts[0], "dog": parts[1]}}}
    lines = [line("vanilla", 0, 100.), line("runs/a_s0", .5, 90.), line("runs/a_s1", .5, 94.), line("b", .5, 80., 20.),
             line("runs/a_s0", .25, 60.), line("b", .25, 70.)]
    assert scores.matrix(lines).splitlines() == [
        "| method | 50.0 % | 25.0 % |", "|---|---|---|", "| b | 80.0 (20) | 70.0 |", "| runs/a | 92.0 ±2.8 | 60.0 |"]
    assert scores.seeds_table(lines, {"one": "One"}).splitlines()[2:] == ["| runs/a | 2 | 50.0 % | 8.0 | 92.0 ±2.8 |"]
    assert scores.seeds_table(lines[:2], {"one": "One"}) == ""
    parts = scores.parts_table(lines, "one", "average").splitlines()
    assert parts[0] == "| method | K | cat | dog | n | retention % |"
    assert parts[2].endswith("| 50.0 | 70.0 | 9 | 100.0 |")


def test_what_is_scored_as_one_is_drawn_as_one():
    asked = [question(i) for i in range(12)]
    pairs = [[q.id for q in sample(asked, 5, seed, lambda row: int(row["id"]) // 2)] for seed in range(4)]
    assert all(len(ids) == 6 and sorted(ids, key=int) == ids for ids in pairs) and len(set(map(tuple, pairs))) > 1
    assert all(str(int(i) ^ 1) in ids for ids in pairs for i in ids)


@pytest.mark.parametrize("change, words", [
    ({"model": "n"}, "has the model 'm', another file 'n'"), ({"benchmark": "three"}, "is of the benchmark 'three'"),
    ({"method": "vanilla", "budget": 0}, "is a second file of one, vanilla, 0"), ({}, "answers other questions")])
def test_files_that_do_not_go_together_are_refused(tmp_path, change, words):
    written(tmp_path, "one", "vanilla", 0, "aaaa")
    written(tmp_path, "one", "random", 8, "aaaa" if change else "aaa", change)
    with pytest.raises(ValueError, match=words):
        scores.found(tmp_path, {"one": SHARE})
    with pytest.raises(FileNotFoundError, match="no complete predictions file"):
        scores.found(tmp_path / "nothing", {"one": SHARE})


def test_printed_figures_stand_beside_ours_with_their_flags():
    lines = [{"method": m, "K": k, "scores": {"pope": {"value": 80., "interval": [79, 81], "retention": 95.}},
              "average": 95., "benchmarks": 1} for m, k in (("vanilla", 0), ("fastv", 64), ("runs/autoselect", 64),
                                                            ("random", 64), ("fastv", 65))]
    quoted = scores.printed(lines, scores.backbone("llava-hf/llava-1.5-7b-hf"))
    found = {(x["of"], x["K"], x["source"]): x["scores"]["pope"] for x in quoted}
    auto, step = "AutoSelect paper, Table 1", "StepPrune paper, Table 1"
    assert found == {("vanilla", 0, auto): 85.9, ("vanilla", 0, step): 85.9, ("fastv", 64, auto): 48.,
                     ("fastv", 64, step): 48., ("runs/autoselect", 64, auto): 83.4}
    text = scores.table(lines, {"pope": "POPE"}, quoted)
    assert "*printed: FastV (ECCV'24), AutoSelect paper, Table 1* | 64 | *48, 55.9* [c] | 55.9 | 1 of 1 |" in text
    assert scores.notes(quoted, {"pope"}) == [x for x in scores.notes(quoted, {"pope"}) if "mean of the three F1" in x]
    assert scores.backbone("tiny/llava") is None and scores.printed(lines, None) == []
    share = scores.printed([{"method": "fastv", "K": .333}, {"method": "fastv", "K": .3}], "Qwen2.5-VL-7B")
    assert {x["K"] for x in share} == {.333}


def test_every_printed_average_is_that_of_its_row_or_said_not_to_be():
    for part in json.loads(scores.PRINTED.read_text())["tables"]:
        base = next(x["scores"] for x in part["rows"] if x["budget"] is None)
        for x in part["rows"]:
            value, n = scores.retention(x["scores"], base)
            assert n == len(x["scores"]) and (x["average"] is None or abs(value - x["average_recomputed"]) < .02)


# ------------------------------------------------------------------------------------------------------- tables

@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    copies.main([str(folder), "--n", "8"])
    return folder


def test_local_copies_have_the_hubs_layout_and_no_picture_is_decoded_early(local, tmp_path):
    data = table(("x/POPE",), local / "pope", None, "test", ("question_id", "category", "image"))
    assert len(data) == 8 and data.column_names == ["question_id", "category", "image"]
    assert set(data[0]["image"]) == {"bytes", "path"} and picture(data[0]["image"]).size == (144, 144)
    frames = table(("x/SEED",), local / "seed", None, "test", ("image",))
    assert [len(x["image"]) for x in frames] == [1, 1, 3, 1, 1, 3, 1, 1] and "bytes" in frames[2]["image"][2]
    circular = table(("x/MMB",), local / "mmbench", "en", "dev", ("index", "answer", "A", "B", "C", "D"))
    assert {x[x["answer"]] for x in circular if x["index"] % 10**6 == 0} == {circular[0][circular[0]["answer"]]}
    image = picture(data[0]["image"])
    image.save(tmp_path / "a.png")
    for name, text in (("test.jsonl", '{"id": 1, "image": "a.png"}\n{"id": 2, "image": "gone.png"}\n'),
                       ("dev.json", '[{"id": 1, "image": null, "images": ["a.png", "a.png"]}]')):
        (tmp_path / name).write_text(text)
    lines = table(("x/y",), tmp_path, None, "test", ("id", "image"))
    assert picture(lines[0]["image"]).size == (144, 144)
    with pytest.raises(ValueError, match="gone.png"):
        picture(lines[1]["image"])
    several = table(("x/y",), tmp_path / "dev.json", None, "whatever", ("id", "images"))
    assert [picture(x).size for x in several[0]["images"]] == [(144, 144)] * 2


@pytest.mark.parametrize("path, config, split, columns, kind, words", [
    ("pope", None, "dev", ("image",), ValueError, "no file of the split 'dev'.* it has test"),
    ("pope", None, "test", ("image", "hint"), ValueError, "no column 'hint' among question_id"),
    ("nothing", None, "test", (), FileNotFoundError, "nothing does not exist"),
    ("llava/model.safetensors", None, "test", (), FileNotFoundError, "is none of .parquet .json .jsonl"),
    ("gqa", None, "testdev", ("id",), ValueError, "several times")])
def test_what_is_wrong_with_a_local_copy_is_said(local, path, config, split, columns, kind, words):
    with pytest.raises(kind, match=words):
        table(("x/y",), local / path, config, split, columns)


def test_rows_that_cannot_be_read_are_refused(tmp_path):
    for name, text in (("a.json", "[1"), ("b.jsonl", '{"id": 1}\n{"id": "x"}\n'), ("c.parquet", "none")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            table(("x/y",), tmp_path / name, None, "test", ("id",))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_tiny_vlm_of_the_rehearsal_reads_past_what_it_has_not_learnt(local, name):
    vlm, asked = FrozenVLM.from_pretrained(local / name, torch.float32), world.load(n=12)
    longer = [Question(q.id, q.images, q.prompt.capitalize() + "\nAnswer the question using a single word or phrase.",
                       q.gold, q.limit) for q in asked]
    rows = runner.answer(vlm, [*enumerate(longer)], {("vanilla", 0): None})["vanilla", 0]
    plain = runner.answer(FrozenVLM.from_pretrained(f"tiny/{name}", torch.float32), [*enumerate(asked)],
                          {("vanilla", 0): None})["vanilla", 0]
    assert [x["answer"] for x in rows] == [x["answer"] for x in plain] and world.score(rows)["average"] > 80


def test_options_go_to_the_load_that_has_them():
    cfg = SimpleNamespace(benchmarks=["scenes"], options=["scenes.n=30", "scenes.split=calibration"])
    assert evaluate.options_of(cfg) == {"scenes": {"n": 30, "split": "calibration"}}
    for wrong in ("scenes.frames=1", "pope.split=test", "scenes"):
        with pytest.raises(ValueError, match="expected <benchmark>.<option>=<value> of scenes"):
            evaluate.options_of(SimpleNamespace(benchmarks=["scenes"], options=[wrong]))


@pytest.mark.parametrize("more, words", [
    (["--benchmarks", "nonsense"], "known are .*scenes"), (["--benchmarks", "scenes", "--gated"], "tiny world"),
    (["--benchmarks", "scenes", "--methods", "evidence"], "tiny world"),
    (["--benchmarks", "scenes", "--methods", "nonsense"], "known are")])
def test_a_wrong_command_is_refused_before_a_model_is_loaded(monkeypatch, more, words):
    monkeypatch.setattr(FrozenVLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=words):
        evaluate.main(["--model", "tiny/llava", *more])
