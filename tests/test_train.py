"""The loop on the shipped tiny LLaVA: the same run after a kill, nothing lost, nothing mixed up."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from short_runs import MODEL, flags, kill_at, same, short_run, weights, without_time

import common
import runs
import train
from benchmarks import answering, tiny_world
from common import FrozenVLM


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained(MODEL, torch.float32)


def test_a_killed_run_ends_as_the_unbroken_one_and_a_seed_is_a_run(tmp_path, monkeypatch):
    whole = short_run(tmp_path / "whole", workers=1)
    other = short_run(tmp_path / "other", seed=1)
    assert not same(weights(whole), weights(other))
    revive = kill_at(monkeypatch, 3)          # step 2 is done and logged, but in no checkpoint
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "killed")
    assert not (tmp_path / "killed/selector").exists()
    revive()
    killed = short_run(tmp_path / "killed")
    assert same(weights(whole), weights(killed))
    assert without_time(whole) == without_time(killed) and len(without_time(whole)) == 4


def test_the_loss_goes_down_and_the_vlm_stays_as_it_was(tmp_path, capsys):
    before = {name: x.clone() for name, x in load_file(f"{MODEL}/model.safetensors").items()}
    run = short_run(tmp_path, steps=24, batch=8, lr=3e-3, save_every=24)
    losses = [line["loss"] for line in without_time(run)]
    assert sum(losses[-8:]) < .85 * sum(losses[:8])
    shown = re.findall(r"loss=([\d.]+)", capsys.readouterr().err)         # beside the bar
    assert float(shown[-1]) == pytest.approx(losses[-1], abs=1e-3)
    assert same(before, load_file(f"{MODEL}/model.safetensors"))


@pytest.mark.parametrize("method", runs.method_names())
def test_every_method_resumes_exactly(tmp_path, monkeypatch, method):
    whole = short_run(tmp_path / "whole", method, steps=3)
    revive = kill_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "killed", method, steps=3)
    revive()
    killed = short_run(tmp_path / "killed", method, steps=3)
    assert same(weights(whole), weights(killed))
    assert without_time(whole) == without_time(killed)


@pytest.mark.parametrize("method", runs.method_names())
def test_every_method_goes_through_the_same_code_on_qwen(tmp_path, method):
    """Pictures of three shapes, units of four patches: trained, loaded again, and pruned."""
    run = short_run(tmp_path, method, model="tiny/qwen2_5_vl", steps=2, batch=3)
    qwen = FrozenVLM.from_pretrained("tiny/qwen2_5_vl")
    selector, _ = runs.load_selector(run, qwen)
    asked = answering.ask(qwen, tiny_world.load(n=24, family=qwen.family))
    keep = selector.select(asked.units, asked.question, 6)
    assert set(asked.units.grid) > {(12, 12)} and all(len(index) == 6 for index in keep)
    prompt = qwen.prune(asked.batch, asked.units, keep)
    assert len(qwen.generate(prompt, 2)) == len(keep) == len(asked.owner)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text("old")

    def die(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        runs.write_whole(path, die)
    assert path.read_text() == "old"


def test_another_run_in_the_folder_is_named_not_overwritten(tmp_path, vlm):
    def begin(**changes):
        config, options = train.parse(flags(tmp_path, **changes))
        module = runs.load_method(config.method)
        selector = module.Method(module.Config.of(vlm, **vars(options)))
        about = runs.describe(config, selector, vlm, train.FREE)
        runs.open_run(tmp_path, about, config.overwrite)
    begin()
    begin(workers=3, micro=1)                 # the selector comes out the same
    with pytest.raises(ValueError, match="lr: 0.002 there, 0.5 here.*--overwrite"):
        begin(lr=.5)
    with pytest.raises(ValueError, match="tau_end: 0.02 there, 0.5 here.*--overwrite"):
        begin(tau_end=.5)
    begin(lr=.5, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["lr"] == .5


def test_a_run_of_another_backbone_or_a_half_finished_one_is_refused(tmp_path, vlm):
    run = short_run(tmp_path / "run", steps=1)
    about = json.loads((run / "selector/config.json").read_text())
    about["backbone"]["vision_width"] = 1024
    (run / "selector/config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="another backbone.*vision_width: 1024 there, 128 here"):
        runs.load_selector(run, vlm)
    (run / "selector/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        runs.load_selector(run, vlm)


@pytest.mark.parametrize("bad, message", [
    (dict(steps=0), "steps=0, epochs=0: expected one of them above 0"),
    (dict(steps=-1), "steps=-1: expected at least 0"), (dict(batch=0), "batch=0: expected"),
    (dict(keep=[0]), r"keep=\[0.0\]: expected"), (dict(save_every=-1), "save_every=-1: expected"),
    (dict(model="./nowhere"), "no checkpoint at './nowhere'"),
    (dict(device="tpu"), "device='tpu': this machine has cpu"),
    (dict(device="cuda:7"), "device='cuda:7': this machine has cpu"),
    (dict(meth="stepprune"), "unrecognized|not used"),
    (dict(method="best"), "method='best': expected one of autoselect, recon_selector, stepprune"),
    (dict(data="folder"), "needs --images"), (dict(gate="typo"), "invalid choice: 'typo'"),
    (dict(heads=3), "heads=3: expected a number that parts the width 128 evenly"),
    (dict(layers=0), "layers=0: expected at least 1"),
    (dict(lr="nan"), "lr=nan: expected at least 0"),
    (dict(lr="inf"), "lr=inf: expected at most 1e"),
    (dict(seed=-1), "seed=-1: expected at least 0"),
    (dict(tau_end=0), "tau_end=0.0: expected at least 1e-06"),
    (dict(keep=["nan"]), "keep=nan: expected a number"),
    (dict(method="stepprune", hops=-2), "hops=-2: expected at least -1"),
    (dict(method="stepprune", gamma=5), "gamma=5.0: expected 0 to 1"),
    (dict(path="there"), "path='there': data='scenes', of the kind .*, does not read it"),
    (dict(n_pictures=5), "n_pictures=5: .* 'scenes without epochs', does not read it"),
    (dict(prompt="why ?"), "prompt='why [?]': .* does not read it"),
    (dict(epochs=1, questions=3), "questions=3: .* 'scenes in epochs', does not read it"),
    (dict(data="coco", prompt="why ?"), "prompt='why [?]': data='coco', of the kind 'images'"),
    (dict(layers=10**30), "layers=1000000000000000000000000000000: expected at most 1e"),
    (dict(seed=10**30), "seed=1000000000000000000000000000000: expected at most 1e"),
    (dict(epochs="-inf"), "argument --epochs: expected one argument"),
    (dict(model=""), "nothing stands behind --model: expected a value"),
    (dict(push="nobody"), "push='nobody': expected user/name"),
    (dict(push="a/b/c"), "push='a/b/c': expected user/name"),
    (dict(run="README.md/below"), "nothing can be written into README.md/below"),
    (dict(cache_features="README.md"), "nothing can be written into README.md"),
    (dict(batch=4, micro=3), "batch=4 on 1 processes, micro=3: expected a multiple of 3")])
def test_a_mistake_ends_in_one_line(tmp_path, bad, message, monkeypatch, capsys):
    """Exit code 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(tmp_path, **bad)])
    with pytest.raises(SystemExit) as end:
        runs.command(train.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert end.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines


def test_the_command_itself_shows_a_traceback_only_where_it_is_asked_for(tmp_path, monkeypatch):
    command = ["train.py", *flags(tmp_path, batch=3, micro=2)]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().endswith("for parts of equal size (--traceback shows where)")
    monkeypatch.setattr(sys, "argv", [*command, "--traceback"])
    with pytest.raises(ValueError, match="for parts of equal size$"):     # Python shows where
        runs.command(train.main)


def test_help_shows_what_is_really_used(capsys):
    """The options of the chosen method, and the values that the chosen model gets."""
    def shown(*args):
        with pytest.raises(SystemExit):
            train.parse([*args, "--help"])
        return " ".join(capsys.readouterr().out.split())
    auto, step = shown("--method", "autoselect"), shown("--method", "stepprune")
    assert "--method" in shown() and "--hops" not in shown()
    assert "--tau_start" in auto and "--hops" not in auto and "--hops" in step
    assert "runs/stepprune" in step and "(default: None)" not in step.replace("copy", "")[-2000:]
    config, options = train.parse(["--method", "autoselect"])
    assert (options.layers, options.heads, config.steps, config.batch) == (2, 4, 450, 16)
    assert "optimiser steps; 0: from --epochs (default: 450)" in auto


def test_a_selector_remembers_its_protocol_and_another_is_said(tmp_path, capsys):
    run = short_run(tmp_path / "run", protocol="stock")
    assert runs.read_selector(run)[1]["training"]["protocol"] == "stock"
    for protocol, said in (("stock", False), ("papers", True)):
        vlm = FrozenVLM.from_pretrained(MODEL, device="meta", protocol=protocol)
        capsys.readouterr()
        runs.load_selector(run, vlm, "cpu")
        printed = capsys.readouterr().out
        assert ("was trained with --protocol stock, and now meets" in printed) == said


def test_what_is_wrong_is_said_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "read_weights", lambda *_: pytest.fail("weights were read"))
    for changes in (dict(data="llava-665k", path="nowhere"), dict(batch=4, micro=3),
                    dict(data="folder", images=str(tmp_path))):
        with pytest.raises((ValueError, OSError)):
            short_run(tmp_path / "run", **changes)
