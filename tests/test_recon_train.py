"""train.py --method recon: from scenes and from folders, with and without the cache, exact after a kill."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import config, kill_at, same, weights, without_time
from tiny_models import MODELS, llava

import train
from benchmarks.folder import FeatureCache
from common import FrozenVLM


def recon(folder, **changes):
    return config(folder, **{**dict(method="recon", steps=None, pictures=6, epochs=1.3, batch=2, layers=1), **changes})


def photos(folder, n=5, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, size in enumerate([(40, 24), (24, 40), (32, 32)] * n):
        if i < n:
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_epochs_make_the_steps_and_a_killed_run_ends_as_the_unbroken_one(tmp_path, monkeypatch):
    whole = train.train(recon(tmp_path / "whole", workers=1))
    lines = without_time(whole)
    assert len(lines) == 4 and {"feature", "image", "kept", "pressure", "grad_norm"} <= lines[0].keys()   # 1.3 * 6 / 2
    revive = kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train.train(recon(tmp_path / "killed"))
    revive()
    killed = train.train(recon(tmp_path / "killed"))
    assert same(weights(whole), weights(killed)) and lines == without_time(killed)
    assert not same(weights(whole), weights(train.train(recon(tmp_path / "other", seed=1))))


@pytest.mark.parametrize("family", list(MODELS))
def test_a_folder_of_pictures_trains_with_what_is_broken_named_and_counted(tmp_path, capsys, family):
    model, folder = MODELS[family](tmp_path / "vlm"), photos(tmp_path / "photos")
    (folder / "b.png").write_text("no picture")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    run = train.train(recon(tmp_path / "run", model=model, images=str(folder), epochs=2, dtype="float32"))
    shown = capsys.readouterr().out
    assert "b.png: " in shown and "thin.png: 1x5000 pixels: expected a side of at most 200" in shown
    assert "2 files left out" in shown and len(without_time(run)) == 7                       # 2 * 7 files / 2


@pytest.mark.parametrize("family", list(MODELS))
def test_cached_features_train_as_fresh_ones_and_a_killed_cache_goes_on(tmp_path, capsys, monkeypatch, family):
    model, folder = MODELS[family](tmp_path / "vlm"), photos(tmp_path / "photos")
    changes = dict(model=model, images=str(folder), epochs=1, dtype="float32")
    fresh = train.train(recon(tmp_path / "fresh", **changes))
    changes["cache_features"] = str(tmp_path / "cache")
    real, calls = FrozenVLM.encode, []

    def dying(self, batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)
    monkeypatch.setattr(FrozenVLM, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        train.train(recon(tmp_path / "run", **changes))
    assert "GiB are free" in capsys.readouterr().out
    lines = (tmp_path / "cache/index.jsonl").read_text().splitlines()
    assert len(lines) == 2
    with open(tmp_path / "cache/index.jsonl", "a") as file, open(tmp_path / "cache/features.bin", "ab") as features:
        file.write("[3, 4")                            # a kill in the middle of a line
        features.write(b"12345")
    monkeypatch.setattr(FrozenVLM, "encode", lambda self, batch: (calls.append(1), real(self, batch))[1])
    run = train.train(recon(tmp_path / "run", **changes))
    assert len(calls) == 2 + 2                         # the three pictures that were missing, none while training
    for (_, a), (_, b) in zip(sorted(weights(fresh).items()), sorted(weights(run).items())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)     # batches of other sizes round otherwise
    with pytest.raises(ValueError, match="holds features of something else .*pictures: 5 there, 6 here"):
        photos(tmp_path / "more", 6)
        train.train(recon(tmp_path / "other", **{**changes, "images": str(tmp_path / "more")}))


def test_a_cache_that_does_not_fit_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.folder.shutil.disk_usage", lambda folder: type("Free", (), {"free": 1000})())
    with pytest.raises(OSError, match="do not fit into"):
        train.train(recon(tmp_path / "run", cache_features=str(tmp_path / "cache")))


def test_an_empty_folder_or_one_without_a_picture_stops_at_once(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        train.train(recon(tmp_path / "run", images=str(tmp_path / "none")))
    (tmp_path / "words.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no picture"):
        train.train(recon(tmp_path / "run", images=str(tmp_path)))
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(ValueError, match="none of 1 pictures can be used"):
        train.train(recon(tmp_path / "run", images=str(tmp_path)))


def test_one_selector_serves_every_vlm_with_its_encoder_and_no_other(tmp_path):
    run = train.train(recon(tmp_path / "run", model=llava(tmp_path / "a"), epochs=1, dtype="float32"))
    text = dict(model_type="llama", vocab_size=43, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    other = FrozenVLM.from_pretrained(llava(tmp_path / "b", seed=5, text_config=text), torch.float32)
    assert other.dim == 48 and train.load_run(run, other)[0].cfg.width == 16
    saved = json.loads((run / "config.json").read_text())
    for name, value in (("vision_width", 1024), ("vision_side", 24), ("feature_layer", -1), ("vision_layers", 24)):
        (run / "config.json").write_text(json.dumps({**saved, "fingerprint": {**saved["fingerprint"], name: value}}))
        with pytest.raises(ValueError, match=f"another backbone.*{name}: {value} trained"):
            train.load_run(run, other)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_conditional_selector_reads_the_question(tmp_path, layer):
    run = train.train(recon(tmp_path, condition=layer, epochs=1))
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    selector, cfg = train.load_run(run, vlm)
    assert cfg.condition == layer and selector.cfg.width == vlm.dim
    image = train.Shown(cfg, vlm)[0][1]
    scores = []
    for question in ("how many shapes are there ?", "what colour is the square ?"):
        batch = vlm.batch([image], [[(question, None)]], twice=True)
        states = vlm.visual_states(vlm.embed(batch, vlm.encode(batch)), layer)
        scores.append(selector.scores(states[None], torch.ones(1, 144, dtype=torch.bool)))
    assert not torch.allclose(*scores, atol=1e-4)
    for bad in (dict(images="x"), dict(cache_features="x")):
        with pytest.raises(ValueError, match="reads questions"):
            recon(tmp_path, condition=layer, **bad)


def test_the_loss_goes_down(tmp_path):
    run = train.train(recon(tmp_path / "run", model=llava(tmp_path / "vlm"), pictures=32, epochs=10, batch=8, lr=3e-3))
    losses = [line["feature"] + line["image"] for line in without_time(run)]
    assert sum(losses[-8:]) < .9 * sum(losses[:8])


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    cache = FeatureCache(tmp_path, {}, torch.bfloat16)
    vlm = FrozenVLM.from_pretrained("tiny/llava")
    shown = [train.Shown(recon(tmp_path), vlm)[i][1] for i in range(3)]
    units = vlm.encode(vlm.pictures(shown))
    cache.fill(3, [None], lambda _: units)
    back = FeatureCache(tmp_path, {}, torch.bfloat16).units([2, 0])
    assert torch.equal(back.feats, torch.cat([units.feats[288:], units.feats[:144]])) and back.grid == [(12, 12)] * 2
    assert back.image_of.tolist() == [0] * 144 + [1] * 144
