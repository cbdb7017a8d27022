"""What an answer costs, on the CPU: a small model, few rounds."""

import json

import pytest
import torch

from measure import shapes, speed

SMALL = ["--shrink", "--device", "cpu", "--batches", "1", "2", "--size", "112", "112", "--budgets",
         "8", "99", "--text", "8", "--new_tokens", "2", "--repeats", "1", "--tokens", "20", "30",
         "--picks", "9", "--options", "max_steps=9"]


@pytest.mark.slow
def test_answers_and_picks_are_measured_whole(tmp_path, one_thread):
    result = speed.main(["qwen2.5-vl-7b", *SMALL, "--rivals", "divprune", "cls_attention",
                         "--out", str(tmp_path / "small")])
    page = (tmp_path / "small.md").read_text()
    assert json.loads((tmp_path / "small.json").read_text()) == json.loads(json.dumps(result))
    assert "--shrink --device cpu" in result["command"] and result["command"] in page
    assert result["weights"] == "random" and result["device"].startswith("cpu")

    lines = result["qwen2.5-vl-7b"]
    assert [(line["batch"], line["visual tokens"]) for line in lines] == [
        (1, 16), (1, 8), (2, 16), (2, 8)]
    for full, pruned in (lines[:2], lines[2:]):
        assert not full["selection"] and full["FLOPs"] > pruned["FLOPs"]
        # the tiny one has no [CLS] to attend to anything
        assert [*pruned["selection"]] == ["AutoSelect", "ReconSelector", "StepPrune", "divprune"]
        assert all(len(ms) == 1 and ms[0] > 0 for ms in pruned["selection"].values())
        assert all(line[stage][0] > 0 for line in (full, pruned) for stage in (
            "vision", "prefill", "tokens"))
        assert full["limits"]["prefill"] >= pruned["limits"]["prefill"] > 0
        assert full["memory"] > pruned["memory"] > 0
    assert lines[2]["FLOPs"] == 2 * lines[0]["FLOPs"]

    picks = result["picks"]
    assert [(line["N"], line["batch"], line["weights"]) for line in picks] == [
        (n, rows, weights) for n in (20, 30) for rows in (1, 2)
        for weights in ("float32", "bfloat16")]
    assert all(line["same"] for line in picks)
    assert all(line["differ"] == 0 for line in picks if line["weights"] == "float32")
    assert all(line["differ"] >= line["sets differ"] >= 0 for line in picks)
    assert page.count("| AutoSelect ms |") == 1 and page.count("| yes |") == len(picks)


def test_the_tables_compare_medians_to_all_tokens_of_the_same_batch():
    def line(k, prefill, flops, limit, **selection):
        return {"batch": 1, "visual tokens": k, "vision": [10., 20., 90.], "prefill": prefill,
                "tokens": [], "memory": 2 ** 30, "FLOPs": flops,
                "limits": {"vision": 5., "prefill": limit}, "selection": selection}
    lines = [line(576, [100., 120., 80.], 10, 50.),
             line(64, [20., 25., 30.], 2, 20., One=[3., 5., 9.], Two=[])]
    stages, chosen = speed.answer_tables(lines).split("\n\n")
    assert stages.splitlines()[2:] == [
        "| 1 | 576 | 10 / 20 | 80 / 100 | 50 % | out of memory | 1 | 1.00x | 1.00x | 1.00x |",
        "| 1 | 64 | 10 / 20 | 20 / 25 | 80 % | out of memory | 1 | 4.00x | 5.00x | 2.50x |"]
    # (20 + 100) / (20 + 5 + 25)
    assert chosen.splitlines()[2:] == ["| 1 | 64 | 3 / 5 | 2.40x | out of memory | - |"]


def test_what_runs_out_of_memory_has_no_times_and_the_rest_goes_on():
    made = []

    def fail():
        made.append("fail")
        if len(made) > 4:
            raise torch.OutOfMemoryError
    calls = {"first": lambda: made.append("first"), "fails": fail, "last": lambda: None}
    ms = speed.by_turns(calls, "cpu", 3)
    assert [*ms] == ["first", "fails", "last"] and ms["fails"] == []
    assert len(ms["first"]) == len(ms["last"]) == 3 and made.count("first") == 4
    assert made[:4] == ["first", "fail", "fail", "first"]          # every other round backwards


def test_sets_of_picks_are_compared_without_their_order():
    a, b = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[4, 3, 2, 1], [5, 6, 7, 9]])
    assert speed.set_difference(a, a) == speed.set_difference(a[:1], b[:1]) == 0
    assert speed.set_difference(a, b) == pytest.approx(1 / 8)


def test_few_layers_are_those_of_the_language_model_alone():
    whole, few = (shapes.load("llava-1.5-7b", layers=n, device="meta") for n in (0, 4))
    assert (len(whole.lm.layers), len(few.lm.layers)) == (32, 4)
    assert len(whole.adapter.attentions) == len(few.adapter.attentions)
