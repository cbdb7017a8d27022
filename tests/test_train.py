"""The loop and the evaluator on the shipped tiny LLaVA: the same run after a kill, nothing lost, nothing mixed up."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import stepprune
import train
from baselines import random
from benchmarks import batches, scenes, speed
from common import FrozenVLM

MODEL = "tiny/llava"
ORACLE = evaluate.Selector(lambda asked, k: evaluate.oracle(asked.evidence, k))


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained(MODEL, torch.float32)


def config(folder, **changes):
    return train.TrainConfig(**{**dict(model=MODEL, run=str(folder), steps=4, batch=2, turns=2, layers=1, heads=2,
                                       keep=[16], workers=0, save_every=2, evaluate=False, device="cpu"), **changes})


def weights(run):
    return load_file(Path(run) / "selector/model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_time(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def kill_at(monkeypatch, step):
    """The next run raises in the middle of `step`, as a kill would end it."""
    real = train.train_step

    def dying(selector, vlm, work, cfg, now, accelerator):
        if now == step:
            raise KeyboardInterrupt
        return real(selector, vlm, work, cfg, now, accelerator)
    monkeypatch.setattr(train, "train_step", dying)
    return lambda: monkeypatch.setattr(train, "train_step", real)


def test_a_killed_run_ends_as_the_unbroken_one_and_a_seed_is_a_run(tmp_path, monkeypatch):
    whole = train.train(config(tmp_path / "whole", workers=1))
    again = train.train(config(tmp_path / "again"))
    other = train.train(config(tmp_path / "other", seed=1))
    assert same(weights(whole), weights(again)) and not same(weights(whole), weights(other))
    revive = kill_at(monkeypatch, 3)                   # step 2 is done and logged, but not in a checkpoint
    with pytest.raises(KeyboardInterrupt):
        train.train(config(tmp_path / "killed"))
    assert not (tmp_path / "killed/selector").exists()
    revive()
    killed = train.train(config(tmp_path / "killed"))
    assert same(weights(whole), weights(killed))
    assert without_time(whole) == without_time(killed) and len(without_time(whole)) == 4


def test_the_loss_goes_down_and_the_vlm_stays_as_it_was(tmp_path):
    before = {k: v.clone() for k, v in load_file(f"{MODEL}/model.safetensors").items()}
    run = train.train(config(tmp_path, steps=40, batch=8, lr=3e-3, save_every=40))
    losses = [line["loss"] for line in without_time(run)]
    assert sum(losses[-8:]) < .85 * sum(losses[:8])
    assert same(before, load_file(f"{MODEL}/model.safetensors"))


def test_stepprune_resumes_exactly_and_every_question_is_a_row(tmp_path, monkeypatch, vlm):
    changes = dict(method="stepprune", max_steps=12, steps=3, text_steps=2)
    whole = train.train(config(tmp_path / "whole", **changes))
    revive = kill_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(tmp_path / "killed", **changes))
    revive()
    killed = train.train(config(tmp_path / "killed", **changes))
    assert same(weights(whole), weights(killed)) and without_time(whole) == without_time(killed)
    assert {"nll", "K", "K_sd", "K_soft", "grad_norm"} <= without_time(whole)[0].keys()
    cfg = config("unused", turns=3, **changes)
    items = [batches.open_data(cfg, vlm)[i] for i in range(2)]
    batch = batches.collate(vlm, cfg)(items)
    assert batch.owner == [0] * 3 + [1] * 3 and batch.rows["input_ids"].shape[0] == 6
    text, valid = vlm.question(batch.rows)
    for row, question in enumerate(q for _, _, turns, _ in items for q, _ in turns):
        ids = vlm.tokenizer(question, add_special_tokens=False)["input_ids"]
        assert valid[row].sum() == len(ids) and torch.equal(text[row][:len(ids)], vlm.lm.embed_tokens.weight[ids])


@pytest.mark.parametrize("method", list(train.METHODS))
def test_every_method_goes_through_the_same_code_on_qwen(tmp_path, method):
    """Pictures of three shapes, units of four patches: trained, loaded again, and pruned to its own choice."""
    run = train.train(config(tmp_path, method=method, model="tiny/qwen2_5_vl", steps=2, batch=3, max_steps=12))
    qwen = FrozenVLM.from_pretrained("tiny/qwen2_5_vl")
    selector, cfg = train.load_run(run, qwen)
    rows = scenes.load(12, sizes=scenes.SIZES["qwen2_5_vl"])
    asked, batch = evaluate.ask(qwen, rows)
    kinds = evaluate.kinds_of(evaluate.EvalConfig(), selector, cfg, {6: 0.})
    keep = kinds[""].select(asked, 6)
    assert len(keep) == len(asked.owner) and {tuple(asked.units.grid[b]) for b in range(len(keep))} > {(12, 12)}
    assert all(1 <= len(k) and (method == "stepprune" or len(k) == 6) for k in keep)
    assert len(qwen.generate(qwen.prune(batch, asked.units, keep), 2)) == len(keep)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text("old")

    def die(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train.write_whole(path, die)
    assert path.read_text() == "old"


def test_another_run_in_the_folder_is_named_not_overwritten(tmp_path, vlm):
    def begin(**changes):
        cfg = config(tmp_path, **changes)
        train.open_run(cfg, train.description(cfg, vlm, train.build_selector(cfg, vlm)))
    begin()
    begin(workers=3, micro=1)                          # the selector comes out the same
    with pytest.raises(ValueError, match="lr: 0.002 there, 0.5 here.*--overwrite"):
        begin(lr=.5)
    begin(lr=.5, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["lr"] == .5


def test_a_run_of_another_backbone_or_a_half_finished_one_is_refused(tmp_path, vlm):
    run = train.train(config(tmp_path / "run", steps=1))
    saved = json.loads((run / "selector/config.json").read_text())
    saved["backbone"]["vision_width"] = 1024
    (run / "selector/config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="another backbone.*vision_width: 1024 trained, 128 here"):
        train.load_run(run, vlm)
    (run / "selector/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        train.load_run(run, vlm)


@pytest.mark.parametrize("bad", [dict(steps=0), dict(batch=0), dict(keep=[0]), dict(save_every=-1)])
def test_settings_that_cannot_work_are_refused_at_once(bad):
    with pytest.raises(ValueError, match="at least 1"):
        train.TrainConfig(**bad)


def test_unknown_method_and_too_large_a_budget_stop_before_training(tmp_path, vlm):
    with pytest.raises(ValueError, match="method='best' is none of"):
        train.build_selector(config(tmp_path, method="best"), vlm)
    with pytest.raises(ValueError, match="keep=145 does not fit 144"):
        train.train(config(tmp_path, keep=[145]))


# ------------------------------------------------------------------------------------------------- evaluate.py

def test_keeping_every_token_answers_as_the_unpruned_model_and_the_oracle_beats_random(vlm):
    rows = scenes.load(60)
    blind = train.build_selector(config("unused", scorer="random", denoiser="none"), vlm).eval()
    everything = {"all of them": evaluate.per_picture(lambda units, k: [torch.arange(n) for n in units.counts]),
                  "random": evaluate.per_picture(random.select), "evidence": ORACLE, "gated": blind}
    results, clock = evaluate.measure(vlm, everything, rows, [16], 8)
    assert [r[:2] for r in results["all of them", 16]] == [r[:2] for r in results["vanilla", 0]]
    lines = {x["method"]: x for x in evaluate.summarise(results, clock)}
    assert lines["all of them"]["retention"] == 1 and lines["all of them"]["recall"] == pytest.approx(1, abs=1e-5)
    assert lines["evidence"]["average"] > lines["random"]["average"] + .1
    assert lines["evidence"]["recall"] > lines["random"]["recall"] + .3
    assert lines["gated"]["average"] < lines["vanilla"]["average"] - .1           # Figure 5: drowned at random
    assert lines["vanilla"]["n"] == sum(len(r.questions) for r in rows)


def hits(*each):
    return [evaluate.Hit(family, right, found, kept, things) for family, right, found, kept, things in each]


def test_summary_by_hand():
    found = {("vanilla", 0): hits(*(("exist", 1, 1., 9, 2), ) * 2, ("text", 1, 1., 9, 2), ("text", 0, 1., 9, 2)),
             ("mine", 4): hits(*(("exist", r, .5, 4, 2) for r in (1, 0)), *(("text", 0, 0., k, 2) for k in (5, 3)))}
    clock = speed.Clock("cpu")
    clock.seconds = {"vision": .2, "prefill vanilla 0": .4, "prefill mine 4": .1, "select mine 4": .02,
                     "select vanilla 0": 0.}
    clock.items = {stage: 2 if stage == "select mine 4" else 4 for stage in clock.seconds}
    full, mine = evaluate.summarise(found, clock)
    assert full["kept"] == 9 and mine["kept"] == 4
    assert full["average"] == .75 and full["retention"] == 1
    assert mine["average"] == .25 and mine["retention"] == .25 and mine["recall"] == .25       # (.5/1 + 0/.5) / 2
    assert mine["prefill_ms"] == pytest.approx(25) and mine["select_ms"] == pytest.approx(10)
    two = evaluate.spread([mine, {**mine, "average": .35, "method": "b"}], ["mine", "b"], "mean")[0]
    assert two["average"] == pytest.approx(.3) and two["average_sd"] == pytest.approx(.0707, abs=1e-4)
    assert "30.0 ±7.1" in evaluate.table([two])


def test_evaluate_writes_table_and_pictures(tmp_path):
    run = train.train(config(tmp_path / "run", steps=1))
    evaluate.main(["--run", str(run), "--n", "40", "--budgets", "16", "--device", "cpu"])
    assert len(json.loads((run / "evaluation.json").read_text())) == 4
    for name in ("curve.png", "kept.png", "cosines.png"):
        assert Image.open(run / name).size[0] > 300


def test_an_adaptive_selector_is_calibrated_and_its_spread_reported(tmp_path):
    run = train.train(config(tmp_path / "run", method="stepprune", max_steps=12, steps=2))
    asked = ["--run", str(run), "--budgets", "8", "4", "--device", "cpu", "--calibration", "150"]
    lines = evaluate.main([*asked, "--n", "60", "--exact", "True", "--methods", "random"])
    kept = {(line["method"], line["K"]): line["kept"] for line in lines}
    assert kept[f"{run} exactly", 8] == 8 and kept[f"{run} exactly", 4] == 4 == kept["random", 4]
    assert 2 < kept[str(run), 4] < kept[str(run), 8] < 16            # calibrated on other scenes
    assert "correlation with number of things" in (run / "adaptive.md").read_text()
    for name in ("curve.png", "kept.png", "adaptive.png", "training.png"):
        assert Image.open(run / name).size[0] > 300
    with pytest.raises(ValueError, match="a mean of 48 tokens: expected 1 to 24"):
        evaluate.main([*asked[:2], "--budgets", "48", "--device", "cpu", "--calibration", "20"])


def test_speed_tables():
    lines = [{"K": 576, "flops": 10, "prefill_ms": 100., "AutoSelect_ms": 0., "StepPrune_ms": 0.},
             {"K": 64, "flops": 2, "prefill_ms": 20., "AutoSelect_ms": 32., "StepPrune_ms": 64.}]
    assert speed.speed_table(lines, 4).splitlines()[-1] == (
        "| 64 | 20 | 5.00x | 5.00x | 32.0 | 5.0 % | 64.0 | 10.0 % |")            # 80 ms saved by 4 layers, 640 by 32
    net = stepprune.StepPrune(stepprune.Config(width=32, text_width=16, heads=4)).bfloat16().eval()
    text = speed.measure_pointer(net, "cpu", (20, 30), (1, 2), (2, 4), repeats=1).splitlines()
    assert len(text) == 2 + 4 and text[2].startswith("| 20 | 1 | ")


def test_the_spread_of_an_adaptive_selector_by_hand():
    found = evaluate.adaptive(hits(("exist", 1, 1., 1, 1), ("exist", 0, 1., 2, 2), ("count", 1, 1., 63, 7)))
    assert found["mean"] == 22 and found["families"] == {"exist": 1.5, "count": 63}
    assert found["deciles"][0] == 1 and found["deciles"][5] == 2 and found["deciles"][-1] == 63
    assert [(b["from"], b["to"], b["n"], b["accuracy"]) for b in found["buckets"]] == [
        (1, 1, 1, 1), (2, 3, 1, 0), (4, 7, 0, None), (8, 15, 0, None), (16, 31, 0, None), (32, 63, 1, 1)]
    assert found["things"] == pytest.approx(226 / (2522 * 62 / 3) ** .5)


# --------------------------------------------------------------------------------- the shipped checkpoint

@pytest.mark.parametrize("model", ["tiny/llava", "tiny/qwen2_5_vl"])
def test_the_shipped_checkpoints_know_their_world_and_pruning_hurts(model):
    vlm = FrozenVLM.from_pretrained(model)             # in bfloat16, as everything is measured
    rows = scenes.load(420, sizes=scenes.SIZES[vlm.family])
    both = {"random": evaluate.per_picture(random.select), "evidence": ORACLE}
    full, floor, best = evaluate.summarise(*evaluate.measure(vlm, both, rows, [16]))
    for family, bar in dict(exist=.9, colour=.9, shape=.9, where=.88, relation=.8, count=.8, text=.7).items():
        assert full["families"][family] >= bar, family             # a sample: the model card has 2,000 questions
    loss = full["average"] - floor["average"]
    assert loss >= .22 and full["average"] - best["average"] < loss / 3
