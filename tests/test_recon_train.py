"""train.py --method recon: from scenes and from folders, with and without the cache, exact after a kill."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import config, kill_at, same, weights, without_time
from tiny_models import MODELS, llava

import answer
import evaluate
import train
from benchmarks import batches, rebuild, scenes, speed
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
    assert "2 left out" in shown and len(without_time(run)) == 7                       # 2 * 7 files / 2


@pytest.mark.parametrize("family", list(MODELS))
def test_cached_features_train_as_fresh_ones_and_a_killed_cache_goes_on(tmp_path, capsys, monkeypatch, family):
    model, folder = MODELS[family](tmp_path / "vlm"), photos(tmp_path / "photos")
    changes = dict(model=model, images=str(folder), epochs=1, dtype="float32", autocast=False)
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
    for a, b in zip(without_time(fresh), without_time(run)):       # batches of other pictures round otherwise, and
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)     # Adam's first steps make much of the least gradient
    with pytest.raises(ValueError, match="holds features of something else .*pictures: 5 there, 6 here"):
        photos(tmp_path / "more", 6)
        train.train(recon(tmp_path / "other", **{**changes, "images": str(tmp_path / "more")}))


def test_crops_are_selected_apart(tmp_path):
    """LLaVA-NeXT: exactly K of a picture, spread over its crops, none of what unpadding cut off."""
    run = train.train(recon(tmp_path / "run", model=MODELS["llava_next"](tmp_path / "vlm"), epochs=1, dtype="float32",
                            images=str(photos(tmp_path / "photos"))))
    vlm = FrozenVLM.from_pretrained(tmp_path / "vlm", torch.float32)
    selector, _ = train.load_run(run, vlm)
    units = vlm.encode(vlm.pictures([Image.open(tmp_path / f"photos/{i}.png") for i in range(3)]))
    assert max(units.views) > 1 and not units.shown.all()
    _, valid = units.pad()
    for keep, here, n in zip(evaluate.crop_by_crop(selector, units, 12), valid, units.views):
        assert len(keep) == 12 and here[keep].all() and (keep[1:] > keep[:-1]).all()
        assert len({int(i) // (len(here) // max(units.views)) for i in keep}) == n
    assert all(len(keep) >= n for keep, n in zip(evaluate.crop_by_crop(selector, units, None), units.views))


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
    config_file = run / "selector/config.json"
    saved = json.loads(config_file.read_text())
    for name, value in (("vision_width", 1024), ("vision_side", 24), ("feature_layer", -1), ("vision_layers", 24)):
        config_file.write_text(json.dumps({**saved, "backbone": {**saved["backbone"], name: value}}))
        with pytest.raises(ValueError, match=f"another backbone.*{name}: {value} trained"):
            train.load_run(run, other)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_conditional_selector_reads_the_question(tmp_path, layer):
    run = train.train(recon(tmp_path, condition=layer, epochs=1))
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    selector, cfg = train.load_run(run, vlm)
    assert cfg.condition == layer and selector.cfg.width == vlm.dim
    image = batches.open_data(cfg, vlm)[0][1]
    scores = []
    for question in ("how many shapes are there ?", "what colour is the square ?"):
        batch = vlm.batch([image], [[(question, None)]], twice=True)
        states = vlm.visual_states(vlm.embed(batch, vlm.encode(batch)), layer)
        scores.append(selector.scores(states[None], torch.ones(1, 144, dtype=torch.bool)))
    assert not torch.allclose(*scores, atol=1e-4)
    for bad, message in ((dict(images="x"), "pictures and no text"), (dict(cache_features="x"), "reads questions")):
        with pytest.raises(ValueError, match=message):
            recon(tmp_path, condition=layer, **bad)


def test_the_loss_goes_down(tmp_path):
    run = train.train(recon(tmp_path / "run", model=llava(tmp_path / "vlm"), pictures=32, epochs=10, batch=8, lr=3e-3))
    losses = [line["feature"] + line["image"] for line in without_time(run)]
    assert sum(losses[-8:]) < .9 * sum(losses[:8])


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    cache = FeatureCache(tmp_path, {}, torch.bfloat16)
    vlm = FrozenVLM.from_pretrained("tiny/llava")
    shown = [batches.open_data(recon(tmp_path), vlm)[i][1] for i in range(3)]
    units = vlm.encode(vlm.pictures(shown))
    cache.fill(3, [None], lambda _: units)
    back = FeatureCache(tmp_path, {}, torch.bfloat16).units([2, 0])
    assert torch.equal(back.feats, torch.cat([units.feats[288:], units.feats[:144]])) and back.grid == [(12, 12)] * 2
    assert back.image_of.tolist() == [0] * 144 + [1] * 144


# ------------------------------------------------------------------------------------------------- evaluate.py

def test_evaluate_reports_rebuilding_and_stability(tmp_path, capsys):
    runs = [str(train.train(recon(tmp_path / f"s{seed}", epochs=1, seed=seed))) for seed in (0, 1)]
    lines = evaluate.main(["--run", *runs, "--n", "40", "--budgets", "16", "8", "--device", "cpu", "--out",
                           str(tmp_path / "out"), "--methods", "random"])
    kept = {(line["method"], line["K"]): line["kept"] for line in lines}
    assert kept[runs[0], 16] == 16 and 1 <= kept[f"{runs[0]} mask", "mask"] <= 144
    assert kept["recon mask, mean of 2", "mask"] > 1
    rebuilt = (tmp_path / "out/rebuild.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rebuilt[2:]] == ["72", "58", "32", "16", "8"] and "±" in rebuilt[2]
    still = (tmp_path / "out/stability.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in still[2:]]
    assert [row[:2] for row in cells] == [[how, k] for how in rebuild.DISTORTIONS for k in ("16", "8")]
    assert cells[0][2] == "100 ±0" and 0 < float(cells[2][2].split()[0]) < 99
    for name in ("curve.png", "kept.png", "cosines.png", "training.png", "rebuilt.png", "adaptive.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 300
    evaluate.main(["--run", *runs, "--curves", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").size[0] > 900


def test_evaluate_prunes_inside_the_language_model(tmp_path):
    run = str(train.train(recon(tmp_path / "run", condition=2, epochs=1)))
    asked = ["--run", run, "--budgets", "16", "--device", "cpu"]
    lines = {(x["method"], x["K"]): x for x in evaluate.main([*asked, "--n", "40", "--methods", "random"])}
    assert lines["asked twice", "all"]["kept"] == 144 and lines["random inside", 16]["kept"] == 16
    assert lines[run, 16]["kept"] == 16 and lines[run, 16]["recall"] < 1 == lines["asked twice", "all"]["recall"]
    row = (tmp_path / "run/condition.md").read_text().splitlines()[2].split("|")
    assert row[1].strip() == "16" and all(0 <= float(x) <= 100 for x in row[2:-1]), row
    assert (tmp_path / "run/kept.png").exists() and not (tmp_path / "run/cosines.png").exists()
    scenes.load(1)[0].image.save(tmp_path / "photo.png")
    lines = answer.main([*asked, "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path), "--question",
                         "how many shapes are there ?", "what colour is the circle ?"])
    assert [x["kept"] for x in lines] == [144, 16] * 2 and (tmp_path / "answer.png").exists()
    assert all(x["select_ms"] > 0 for x in lines[1::2])             # it is asked anew in every turn


def test_all_of_them_inside_is_the_question_twice_and_the_oracle_beats_random_there():
    """The evaluator's loop inside the language model: nothing dropped changes no answer, evidence beats chance."""
    vlm, rows = FrozenVLM.from_pretrained("tiny/llava", torch.float32), scenes.load(60)
    selectors = evaluate.beside_condition(2)
    selectors["everything"] = evaluate.Selector(lambda s, valid, k: [torch.arange(144)] * len(s), layer=2)
    results, _ = evaluate.measure(vlm, selectors, rows, [24])
    twice, everything = (results[key] for key in (("asked twice", "all"), ("everything", 24)))
    assert [h.right for h in twice] == [h.right for h in everything]
    right = [sum(h.right for h in results[key]) for key in (("asked twice", "all"), ("random inside", 24))]
    assert right[0] > right[1] + 5


def test_distortions_and_overlap_by_hand():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    assert rebuild.distorted(image, "none", 3)[0].tobytes() == image.tobytes()
    bright, box = rebuild.distorted(image, "brightness", 3)
    factor = np.asarray(bright, float).mean() / np.asarray(image, float).mean()
    assert box == (0, 0, 60, 40) and .75 < factor < 1.25 and abs(factor - 1) > .01
    for seed in range(20):
        cropped, (left, top, right, bottom) = rebuild.distorted(image, "crop", seed)
        assert cropped.size == image.size and 0 <= left <= 3 and 57 <= right <= 60 and 0 <= top <= 2 and bottom >= 38
    with pytest.raises(ValueError, match="'blur' is none of"):
        rebuild.distorted(image, "blur", 0)
    keep, other = torch.tensor([0, 1]), torch.tensor([1, 2])
    assert rebuild.overlap(keep, keep, (2, 2), (8, 8), (0, 0, 8, 8)) == 1
    assert rebuild.overlap(keep, other, (2, 2), (8, 8), (0, 0, 8, 8)) == pytest.approx(1 / 3)
    assert rebuild.overlap(keep, torch.tensor([0, 1, 2, 3]), (2, 2), (8, 8), (0, 0, 8, 4)) == 1   # the crop shows both


def test_flops_by_the_papers_convention_and_counted():
    table = evaluate.flops_table(lambda: lambda v: v @ v.mT).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    for _, printed, _, gated, counted in cells:
        assert abs(float(gated) - float(printed)) < .5 and 1.75 < float(counted) / float(gated) < 2.1
    by_hand = 32 * (4 * 2880 * 4096**2 + 2 * 2880**2 * 4096 + 2 * 2880 * 4096 * 11008)
    assert speed.paper_flops(2880) == by_hand and speed.paper_flops(2880, 2, 576) - by_hand == 4 * (
        4 * 576 * 1024**2 + 2 * 576**2 * 1024 + 2 * 576 * 1024 * 4096)
