"""A step is the same step in parts, on two processes, and after a kill; what is shared loads again."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from test_train import config, same, weights, without_time

import autoselect
import recon_selector
import train
from benchmarks import scenes
from benchmarks.sources import open_source
from common import FrozenVLM

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"autoselect": {}, "stepprune": dict(max_steps=12, text_steps=2, budget="batch_mean"),
           "recon": dict(steps=None, pictures=8, epochs=1.5, alpha1=1., p=.3)}


def exact(folder, method, **changes):
    """A run in which parts and processes may show in the last digits only."""
    same = dict(method=method, steps=3, batch=4, dtype="float32", autocast=False)
    return config(folder, **{**same, **METHODS[method], **changes})


def flags(cfg) -> list[str]:
    """The command line of a run."""
    words = []
    for name, value in vars(cfg).items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def close(a, b, atol=2e-5):
    assert a.keys() == b.keys()
    for k in a.keys() - {"scorer.head.bias"}:          # z-scores take it out: its gradient is nought but rounding
        assert torch.allclose(a[k].double(), b[k].double(), rtol=1e-3, atol=atol), k


def same_curves(one, two):
    for a, b in zip(without_time(one), without_time(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "recon"])
def test_a_step_in_parts_is_the_step(tmp_path, method):
    changes = dict(budget="expected") if method == "stepprune" else {}         # the other one is a mean over a part
    whole = train.train(exact(tmp_path / "whole", method, **changes))
    parts = train.train(exact(tmp_path / "parts", method, micro=1, **changes))
    close(weights(whole), weights(parts))
    same_curves(whole, parts)


@pytest.mark.parametrize("method", list(METHODS))
def test_two_processes_train_the_same_selector_as_one(tmp_path, method):
    one = train.train(exact(tmp_path / "one", method))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `accelerate launch` calls where there are GPUs; without one, it starts no second process by itself
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "--",
              "train.py"]
    shown = subprocess.run([*launch, *flags(exact(tmp_path / "two", method))], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert shown.stdout.count("= 2 processes x 1 parts x 2") == 1
    close(weights(one), weights(tmp_path / "two"))
    same_curves(one, tmp_path / "two")


def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    """The process is shot while it works; the same command again ends as the run that nobody shot."""
    whole = train.train(config(tmp_path / "whole", steps=6, save_every=1, keep_checkpoints=2))
    cfg = config(tmp_path / "shot", steps=6, save_every=1, keep_checkpoints=2)
    command = [sys.executable, "train.py", *flags(cfg)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not len(train.checkpoints(tmp_path / "shot")) == 2 and job.poll() is None:
        time.sleep(.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = [int(p.stem) for p in train.checkpoints(tmp_path / "shot")]
    assert len(done) in (1, 2) and not (tmp_path / "shot/selector").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"resumed at step {done[-1]}" in again.stdout
    assert same(weights(whole), weights(tmp_path / "shot")) and without_time(whole) == without_time(tmp_path / "shot")
    assert [p.stem for p in train.checkpoints(tmp_path / "shot")] == ["0000005", "0000006"]


def test_what_a_picture_draws_depends_on_its_number_alone():
    cfg = config("unused", seed=3)
    together = train.generators(cfg, 10, [0, 0, 1, 2], "cpu")
    drawn = autoselect.draw(torch.randn, (4, 5, 2), together, "cpu")
    alone = autoselect.draw(torch.randn, (2, 7, 2), train.generators(cfg, 11, [0, 1], "cpu"), "cpu")
    assert torch.equal(drawn[2:], alone[:, :5])                        # more padding behind, the same in front
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 4
    other = autoselect.draw(torch.randn, (1, 5, 2), train.generators(replace(cfg, seed=4), 10, [0], "cpu"), "cpu")
    assert not torch.equal(drawn[:1], other)


def test_statistics_of_parts_are_those_of_the_whole():
    x = torch.randn(60, 16, dtype=torch.float64) * 3 + 5
    net = autoselect.AutoSelect(autoselect.Config(width=16, keep=4, layers=1, heads=2))
    net.update_statistics(x[None])
    for parts in ((60,), (20, 40)):
        both = [recon_selector.ReconSelector(recon_selector.Config(
            width=16, layers=1, rebuild_layers=1, image_layers=1, heads=2, patch=4, grid=4, channels=8)) for _ in "ab"]
        for part in x.float().split(parts):
            both[0].observe(torch.tensor(len(part)), part.mean(0), part.var(0, correction=0))
            both[1].train().standardised(part[None], torch.ones(1, len(part), dtype=torch.bool))
        for name in ("running_mean", "running_var", "num_batches_tracked"):            # as BatchNorm does by itself
            assert torch.allclose(getattr(both[0].norm, name), getattr(both[1].norm, name), rtol=1e-5)
    assert torch.allclose(net.std.double(), x.std(0, correction=0), rtol=1e-5)


@pytest.mark.parametrize("bad, message", [
    (dict(batch=4, micro=3), "batch=4 on 1 processes, micro=3: expected a batch that is a multiple of 3"),
    (dict(micro=0), "micro=0: expected at least 1"),
    (dict(data="folder"), "needs --images"),
    (dict(data="coco"), "pictures and no text: expected --method recon"),
    (dict(data="llava-665k", path="nowhere"), "nowhere does not exist")])
def test_settings_that_cannot_work_stop_before_the_first_step(tmp_path, bad, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config(tmp_path, **bad))


def test_a_loss_that_is_no_number_names_the_step_and_its_pictures(tmp_path, monkeypatch):
    real = FrozenVLM.loss
    monkeypatch.setattr(FrozenVLM, "loss", lambda self, prompt: real(self, prompt) * float("nan"))
    with pytest.raises(RuntimeError, match="loss nan, gradient norm nan at step 0, items 0 to 1 of scenes"):
        train.train(config(tmp_path))
    assert not train.checkpoints(tmp_path)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_selector_is_shared_with_its_card_and_loads_without_the_project(tmp_path, method):
    run = train.train(exact(tmp_path / "run", method))
    card = (run / "selector/README.md").read_text()
    for said in (method, "model: tiny/llava", "vision_width: 128", "data: scenes", "seed: 0", "not evaluated yet"):
        assert said in card
    assert sorted(p.name for p in (run / "selector").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = train.SELECTORS[method].from_pretrained(run / "selector", strict=True)
    assert same(loaded.state_dict(), weights(run))
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    (run / "selector").rename(tmp_path / "downloaded")
    selector, cfg = train.load_run(tmp_path / "downloaded", vlm)
    assert cfg.method == method and cfg.batch == 4 and same(selector.state_dict(), loaded.state_dict())
    loaded.save_pretrained(tmp_path / "anew")                          # as any model of the hub
    assert same(type(loaded).from_pretrained(tmp_path / "anew").state_dict(), loaded.state_dict())


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_to_be_so(monkeypatch):
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    for name in ("no-one/no-selector", "not a name !", "runs/never"):
        with pytest.raises(FileNotFoundError, match=f"{name} is no folder here, and the hub gave no such selector"):
            train.load_run(name, vlm)


@pytest.mark.parametrize("stream", [False, True])
def test_captions_by_name_train_and_resume(tmp_path, monkeypatch, stream):
    """A local copy of the layout of ImageNet-1K-VL-Enriched; `stream` reads it as it would the hub."""
    rows = scenes.load(60)[:8]
    features = datasets.Features({"image": datasets.Image(), "caption_enriched": datasets.Value("string")})
    captions = [scenes.scenes.caption(row.scene) for row in rows[:7]] + [""]
    (tmp_path / "copy").mkdir()
    datasets.Dataset.from_dict({"image": [row.image for row in rows], "caption_enriched": captions},
                               features=features).to_parquet(tmp_path / "copy/train-00000.parquet")
    if stream:
        monkeypatch.setattr("benchmarks.batches.open_source", lambda *a: open_source(*a, stream=True))
    changes = dict(data="imagenet-captions", path=str(tmp_path / "copy"), prompt="describe the scene .", batch=3,
                   steps=4)
    whole = train.train(config(tmp_path / "whole", **changes))
    assert len(without_time(whole)) == 4 and np.isfinite([line["loss"] for line in without_time(whole)]).all()
    real_step = train.train_step

    def dying(selector, vlm, work, cfg, step, accelerator):
        if step == 3:
            raise KeyboardInterrupt
        return real_step(selector, vlm, work, cfg, step, accelerator)
    monkeypatch.setattr(train, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(tmp_path / "killed", **changes))
    monkeypatch.setattr(train, "train_step", real_step)
    assert same(weights(whole), weights(train.train(config(tmp_path / "killed", **changes))))


def test_the_log_goes_to_tensorboard_or_says_what_is_missing(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install tensorboard"):
            train.train(config(tmp_path, tensorboard=True))
        assert not (tmp_path / "log.jsonl").exists()                   # said before any work was done
    else:
        assert list((train.train(config(tmp_path, tensorboard=True)) / "tensorboard").iterdir())


