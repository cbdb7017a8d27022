"""The program for a GPU, whole, on the CPU."""

import json

import pytest
import torch

import runs
from measure import flops, gpu, shapes


def test_the_gpu_program_runs_whole_on_the_cpu(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(gpu, "BUDGETS", (8,))
    result = gpu.main(["qwen2.5-vl-7b", "--shrink", "--device", "cpu", "--batch", "1",
                       "--pictures_batch", "2", "--side", "112", "--batches", "1", "2",
                       "--text", "8", "--answer", "4", "--repeats", "1",
                       "--options", "max_steps=8", "--out", str(tmp_path / "small")])
    saved = json.loads((tmp_path / "small.json").read_text())
    page = (tmp_path / "small.md").read_text()
    assert saved == json.loads(json.dumps(result))
    assert result["weights"] == "random" and result["device"].startswith("cpu")
    assert "--shrink --device cpu" in result["command"] and result["command"] in page

    names = [runs.load_method(name).Method.__name__ for name in runs.method_names()]
    by_name = {line["method"]: line for line in result["train"]}
    assert [*by_name] == ["frozen", *names]
    frozen, auto, recon = by_name["frozen"], by_name["AutoSelect"], by_name["ReconSelector"]
    share = 100 * (1 - frozen["s a step"] / auto["s a step"])
    assert auto["selector's share, %"] == pytest.approx(share)
    assert frozen["selector's share, %"] is recon["selector's share, %"] is None
    assert frozen["peak, GiB"] is None and recon["batch"] == 2
    assert frozen["trained, M"] == 0 < min(by_name[name]["trained, M"] for name in names)

    first = result["first"]
    sizes = [(line["batch"], line["visual tokens"]) for line in first]
    assert sizes == [(1, 16), (1, 8), (2, 16), (2, 8)]
    full, pruned = first[2:]
    assert full["AutoSelect"] is None
    assert full["first token, AutoSelect"] == full["vision"] + full["rest"]
    assert 0 < pruned["its bound "] <= full["its bound "]
    assert all(pruned[name] > 0 for name in names)
    assert [line["method"] for line in result["select"]] == names * 2
    assert all(line["eager"] > 0 and line["compiled"] is None for line in result["select"])


def test_the_selectors_get_gradients_and_the_frozen_bound_reaches_the_units(one_thread):
    vlm = shapes.load("llava-1.5-7b", shrink=True)
    options = gpu.parse(["llava-1.5-7b", "--batch", "1", "--pictures_batch", "1", "--side", "64",
                         "--text", "4", "--answer", "2", "--options", "max_steps=8"])
    for name, selector in flops.build_methods(vlm, **gpu.method_options(options)).items():
        batch = gpu.training_batch(selector, vlm, options)
        gpu.one_step(selector, vlm, batch, gpu.step_of(vlm, 0, 1))
        blocks = [block for block in selector.modules()
                  if isinstance(block, torch.nn.TransformerEncoderLayer)]
        grads = [p.grad for block in blocks for p in block.parameters()]
        assert grads and all(grad is not None and grad.isfinite().all() for grad in grads), name
    gpu.one_step(None, vlm, gpu.training_batch(None, vlm, options), None)
    assert not any(p.grad is not None for p in vlm.parameters())
    with pytest.raises(ValueError, match="options='layers': expected NAME=VALUE"):
        gpu.method_options(gpu.parse(["llava-1.5-7b", "--options", "layers"]))


def test_the_frozen_bound_reaches_the_units(one_thread, monkeypatch):
    vlm = shapes.load("llava-1.5-7b", shrink=True)
    options = gpu.parse(["llava-1.5-7b", "--batch", "1", "--side", "64", "--text", "4",
                         "--answer", "2"])
    given = []
    embed = vlm.embed
    monkeypatch.setattr(vlm, "embed", lambda batch, units, feats: given.append(feats)
                        or embed(batch, units, feats))
    gpu.one_step(None, vlm, gpu.training_batch(None, vlm, options), None)
    assert given[0].grad is not None and given[0].grad.any()
