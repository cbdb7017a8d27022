"""A step is the same step in parts and on two processes; what is shared loads again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from short_runs import flags, kill_at, same, short_run, weights, without_time

import autoselect
import evaluate
import runs
import train
from common import FrozenVLM, LlavaAdapter
from data.sources import open_source
from tiny import scenes

ROOT = Path(__file__).resolve().parents[1]
# with what is a mean over a step: K_bar, and the share at which the dead zone bends
METHODS = {"autoselect": {}, "stepprune": dict(k_rule="batch_mean"),
           "recon_selector": dict(steps=0, n_pictures=8, epochs=1.5, keep_high=.3)}


def exact(method, **changes) -> dict:
    """A run in which parts and processes may show in the last digits only."""
    base = dict(method=method, steps=3, batch=4, dtype="float32", autocast=False)
    return {**base, **METHODS[method], **changes}


def close(a, b, atol=2e-5):
    assert a.keys() == b.keys()
    # z-scores take the scorer's last bias out: its gradient is nought but rounding
    for name in a.keys() - {"scorer.head.bias"}:
        x, y = a[name].double(), b[name].double()
        is_off = (x - y).abs() > atol + 1e-3 * y.abs()
        # Adam divides a gradient by itself, also one that is nought but rounding: of a thousand
        # weights of the rebuilding convolutions one may be off, and by no more than this
        outliers = 1e-3 * is_off.numel() if name.startswith("image.") else 0
        assert is_off.sum() <= outliers and (x - y).abs().max() < 2e-4, name


def same_curves(one, two):
    for a, b in zip(without_time(one), without_time(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for name in a.keys() - {"nll", "K_sd"}:         # means of what each part has by itself
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_parts_is_the_step(tmp_path, method):
    whole = short_run(tmp_path / "whole", **exact(method))
    for micro in (1, 2):
        parts = short_run(tmp_path / f"parts{micro}", **exact(method, micro=micro))
        close(weights(whole), weights(parts))
        same_curves(whole, parts)


ALL = """
import json, sys, evaluate, train
for words in json.loads(sys.argv[1]):
    train.main(words)
evaluate.main(json.loads(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_train_the_same_selectors_as_one_and_make_the_same_table(tmp_path):
    """Each process runs all methods and an evaluation: to import torch takes longer than these."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def asked(out):
        return ["--model", "tiny/llava", "--benchmarks", "tiny_world", "--methods", "random",
                "--budgets", "48", "0.5", "--sample", "9", "--batch", "3", "--resamples", "20",
                "--dtype", "float32", "--device", "cpu", "--draw", "False", "--out", str(out)]
    # what `accelerate launch` calls where there are GPUs; without one, it starts no second process
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--master_port", str(port), "--no-python", sys.executable, "-c", ALL]
    trained = [flags(tmp_path / "two" / method, **exact(method)) for method in METHODS]
    ended = subprocess.run([*launch, json.dumps(trained), json.dumps(asked(tmp_path / "two/out"))],
                           cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("= 2 processes x 1 parts x 2") == len(METHODS)
    for method in METHODS:
        one = short_run(tmp_path / "one" / method, **exact(method))
        close(weights(one), weights(tmp_path / "two" / method))
        same_curves(one, tmp_path / "two" / method)
    # the tables of one process
    assert ended.stdout.count("| vanilla | all |") == 1
    whole = evaluate.main(asked(tmp_path / "one/out"))
    two = json.loads((tmp_path / "two/out/benchmarks.json").read_text())["lines"]
    assert len([*(tmp_path / "two/out").rglob("*-of-00002.jsonl")]) == 6
    assert [line["scores"] for line in two] == [line["scores"] for line in whole]


def test_kill_9_at_any_moment_loses_nothing(tmp_path, capsys):
    """The process is killed while it works; the same command again ends as the unbroken run."""
    words = dict(steps=6, save_every=1)
    whole = short_run(tmp_path / "whole", **words)
    killed = tmp_path / "killed"
    job = subprocess.Popen([sys.executable, "train.py", *flags(killed, **words)], cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not len(runs.checkpoints(killed)) == 2 and job.poll() is None:
        time.sleep(.02)
    os.kill(job.pid, signal.SIGSTOP)
    with pytest.raises(OSError, match="another process writes into .*killed at this moment"):
        train.main(flags(killed, **words))
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = [int(path.stem) for path in runs.checkpoints(killed)]
    assert len(done) in (1, 2) and not (killed / "selector").exists()
    capsys.readouterr()
    train.main(flags(killed, **words))
    assert f"resumed at step {done[-1]}" in capsys.readouterr().out
    assert same(weights(whole), weights(killed)) and without_time(whole) == without_time(killed)
    assert [path.stem for path in runs.checkpoints(killed)] == ["0000005", "0000006"]


def step_of(seed: int, items: list) -> train.Step:
    return train.Step(0, 1, seed, [items], Accelerator(cpu=True))


def test_what_a_picture_draws_depends_on_its_number_alone():
    together = step_of(3, [10, 11, 12]).generators([0, 0, 1, 2])
    drawn = autoselect.draw(torch.randn, (4, 5, 2), together, "cpu")
    later = step_of(3, [11, 12]).generators([0, 1])
    single = autoselect.draw(torch.randn, (2, 7, 2), later, "cpu")
    assert torch.equal(drawn[2:], single[:, :5])       # more padding behind, the same in front
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 4
    other = autoselect.draw(torch.randn, (1, 5, 2), step_of(4, [10]).generators([0]), "cpu")
    assert not torch.equal(drawn[:1], other)


@pytest.mark.parametrize("bad, message", [
    (dict(data="coco"), "pictures and no text"),
    (dict(data="llava-665k", path="nowhere"), "nowhere does not exist")])
def test_settings_that_cannot_work_stop_before_the_first_step(tmp_path, bad, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        short_run(tmp_path, **bad)


def test_a_loss_that_is_no_number_names_the_step_and_its_pictures(tmp_path, monkeypatch):
    real = FrozenVLM.loss
    monkeypatch.setattr(FrozenVLM, "loss", lambda self, prompt: real(self, prompt) * float("nan"))
    with pytest.raises(RuntimeError, match="loss nan, gradient norm nan at step 0, items from 0 on "
                                           "of scenes"):
        short_run(tmp_path)
    assert not runs.checkpoints(tmp_path)


def test_features_that_are_no_numbers_name_the_step_and_its_pictures(tmp_path, monkeypatch):
    def broken(self, batch):
        feats, grid = real(self, batch)
        return feats * torch.inf, grid
    real = LlavaAdapter.encode
    monkeypatch.setattr(LlavaAdapter, "encode", broken)
    with pytest.raises(ValueError, match="^step 0, items from 0 on of scenes: row 0 has features"):
        short_run(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_selector_is_shared_with_its_card_and_loads_without_the_project(tmp_path, method):
    run = short_run(tmp_path / "run", **exact(method))
    card = (run / "selector/README.md").read_text()
    for text in (method, "model: tiny/llava", "vision_width: 128", "data: scenes", "seed: 0",
                 "heads: 2", "not evaluated yet"):
        assert text in card
    files = sorted(path.name for path in (run / "selector").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    loaded = runs.load_method(method).Method.from_pretrained(run / "selector", strict=True)
    assert same(loaded.state_dict(), weights(run))
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    (run / "selector").rename(tmp_path / "downloaded")
    selector, about = runs.load_selector(tmp_path / "downloaded", vlm)
    assert about["method"] == method and about["training"]["batch"] == 4
    assert same(selector.state_dict(), loaded.state_dict()) and selector.cfg == loaded.cfg
    loaded.save_pretrained(tmp_path / "anew")          # as any model of the hub
    again = type(loaded).from_pretrained(tmp_path / "anew")
    assert same(again.state_dict(), loaded.state_dict())


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_to_be_so():
    for name in ("no-one/no-selector", "not a name !", "runs/never"):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(name)} is no folder here, and the "
                                                    "hub gave no such selector"):
            runs.read_selector(name)


@pytest.mark.parametrize("stream", [False, True])
def test_captions_by_name_train_and_resume(tmp_path, monkeypatch, stream):
    """A local copy of the layout of ImageNet-1K-VL-Enriched; `stream` reads it as the hub's."""
    pictures = [scenes.make_scene(scenes.SPLITS["test"] + i) for i in range(8)]
    features = datasets.Features({"image": datasets.Image(),
                                  "caption_enriched": datasets.Value("string")})
    captions = [scenes.caption(scene) for scene in pictures[:7]] + [""]
    (tmp_path / "copy").mkdir()
    table = {"image": [scenes.render(scene) for scene in pictures], "caption_enriched": captions}
    rows = datasets.Dataset.from_dict(table, features=features)
    rows.to_parquet(tmp_path / "copy/train-00000.parquet")
    if stream:
        monkeypatch.setattr("data.batches.open_source", lambda *a: open_source(*a, stream=True))
    changes = dict(data="imagenet-captions", path=str(tmp_path / "copy"),
                   prompt="describe the scene .", batch=3, steps=4)
    whole = short_run(tmp_path / "whole", **changes)
    assert len(without_time(whole)) == 4
    assert np.isfinite([line["loss"] for line in without_time(whole)]).all()
    revive = kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "killed", **changes)
    revive()
    assert same(weights(whole), weights(short_run(tmp_path / "killed", **changes)))
