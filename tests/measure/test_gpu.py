"""The program for a GPU, whole, on the CPU."""

import json

import pytest
import torch

import runs
from measure import flops, gpu, shapes, speed

SMALL = ["llava-1.5-7b", "--batch", "1", "--pictures_batch", "1", "--size", "64", "64",
         "--text", "4", "--answer", "2", "--device", "cpu", "--options", "max_steps=8"]


@pytest.mark.slow
def test_the_gpu_program_runs_whole_on_the_cpu(tmp_path, one_thread):
    result = gpu.main(["qwen2.5-vl-7b", "--shrink", "--device", "cpu", "--batch", "1",
                       "--pictures_batch", "2", "--size", "112", "112", "--batches", "1", "2",
                       "--budgets", "8", "--text", "8", "--answer", "4", "--repeats", "1",
                       "--tokens", "20", "--picks", "8", "--new_tokens", "2", "--pictures", "1",
                       "--options", "max_steps=8", "--out", str(tmp_path / "small")])
    saved = json.loads((tmp_path / "small.json").read_text())
    page = (tmp_path / "small.md").read_text()
    assert saved == json.loads(json.dumps(result))
    assert "--shrink --device cpu" in result["command"] and result["command"] in page
    assert [part for part in gpu.PARTS if part in result] == list(gpu.PARTS)

    names = [runs.load_method(name).Method.__name__ for name in runs.method_names()]
    trained = result["train"]
    assert [line["method"] for line in trained] == ["frozen", *names] * 2
    assert [line["checkpointing"] for line in trained] == ["yes"] * 4 + ["no"] * 4
    for lines in (trained[:4], trained[4:]):
        frozen, auto, recon, _ = lines
        share = 100 * (1 - frozen["ms a step"][0] / auto["ms a step"][0])
        assert auto["selector's share, %"] == pytest.approx(share)
        assert frozen["selector's share, %"] is recon["selector's share, %"] is None
        assert recon["batch"] == 2 and frozen["trained, M"] == 0 < auto["trained, M"]
        assert auto["GiB"] > frozen["GiB"] > 0
    assert trained[0]["GiB"] < trained[4]["GiB"]                    # what checkpointing is for

    assert [(line["batch"], line["visual tokens"]) for line in result["answers"]] == [
        (1, 16), (1, 8), (2, 16), (2, 8)]
    assert [line["method"] for line in result["select"]] == names * 2
    assert all(line["eager"][0] > 0 and "compiled" not in line for line in result["select"])
    assert [line["pictures"] for line in result["memory"]] == [1] * 3


@pytest.mark.slow
def test_a_part_that_does_not_fit_leaves_the_others(tmp_path, monkeypatch, one_thread):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
    monkeypatch.setattr(speed, "answer_lines", fail)
    monkeypatch.setitem(gpu.MEASURED, "select", fail)
    result = gpu.main([*SMALL, "--shrink", "--repeats", "1", "--batches", "1", "--parts", "answers",
                       "select", "train", "--out", str(tmp_path / "small")])
    assert result["answers"] == [{"batch": 1, "visual tokens": "out of memory"}]
    assert result["select"] == "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    assert len(result["train"]) == 8


def test_the_selectors_get_gradients_and_the_frozen_bound_reaches_the_units(one_thread):
    vlm = shapes.load("llava-1.5-7b", shrink=True)
    options = gpu.parse(SMALL)
    for name, selector in flops.build_methods(vlm, **options.chosen).items():
        batch = gpu.training_batch(selector, vlm, options)
        gpu.one_step(selector, vlm, batch, gpu.step_of(vlm, 0, 1))
        blocks = [block for block in selector.modules()
                  if isinstance(block, torch.nn.TransformerEncoderLayer)]
        grads = [p.grad for block in blocks for p in block.parameters()]
        assert grads and all(grad is not None and grad.isfinite().all() for grad in grads), name
    gpu.one_step(None, vlm, gpu.training_batch(None, vlm, options), None)
    assert not any(p.grad is not None for p in vlm.parameters())
    with pytest.raises(ValueError, match="options='layers': expected NAME=VALUE"):
        gpu.parse(["llava-1.5-7b", "--options", "layers"])


def test_the_frozen_bound_reaches_the_units(one_thread, monkeypatch):
    vlm = shapes.load("llava-1.5-7b", shrink=True)
    options = gpu.parse(SMALL)
    given = []
    embed = vlm.embed
    monkeypatch.setattr(vlm, "embed", lambda batch, units, feats: given.append(feats)
                        or embed(batch, units, feats))
    gpu.one_step(None, vlm, gpu.training_batch(None, vlm, options), None)
    assert given[0].grad is not None and given[0].grad.any()
