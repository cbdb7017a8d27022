"""train.py --method recon: from scenes and from folders, with and without the cache, exact after a
kill, the same in parts; then evaluate.py on what came out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import kill_at, same, short_run, weights, without_time
from tiny_models import MODELS, llava

import evaluate
import runs
from benchmarks import answering, scores, tiny_world
from benchmarks.predictions import file_name
from common import FrozenVLM
from data.batches import Batch
from data.feature_cache import FeatureCache
from examples import answer
from measure import training_curves
from recon_selector import random_tokens
from runs import Way

# every family's features are cached in tests/data too, and test_every_family.py trains on all
FAMILIES = [name if name in ("qwen", "llava_next") else
            pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
TINY_PICTURES = dict(steps=0, n_pictures=6, epochs=1.3, batch=2, layers=1)


def recon(folder, **changes):
    options = {**TINY_PICTURES, **changes}
    if "images" in options:
        del options["n_pictures"]                          # of scenes alone
    return short_run(folder, "recon_selector", **options)


def photos(folder, n=5, seed=0, sizes=((40, 24), (24, 40), (32, 32))):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, size in enumerate([*sizes] * n):
        if i < n:
            pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def close(one, other, outliers=0.0):
    """Equal to 1e-3, but for a share of outliers: where a gradient is nought but rounding, Adam
    makes steps of full length of it."""
    assert one.keys() == other.keys()
    off = total = 0
    for name, a in one.items():
        b = other[name]
        apart = (a - b).abs() > 2e-5 + 1e-3 * b.abs()
        if name.endswith("in_proj_bias"):
            apart.chunk(3)[1].fill_(False)         # a bias of all keys changes no attention
        assert outliers or not apart.any(), name
        off += int(apart.sum())
        total += apart.numel()
    assert off <= outliers * total


def test_epochs_make_the_steps_and_a_killed_run_ends_as_the_unbroken_one(tmp_path, monkeypatch):
    whole = recon(tmp_path / "whole", workers=1)
    lines = without_time(whole)
    assert len(lines) == 4                                                       # 1.3 * 6 / 2
    assert {"feature", "image", "kept", "pressure", "grad_norm"} <= lines[0].keys()
    revive = kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        recon(tmp_path / "killed")
    revive()
    killed = recon(tmp_path / "killed")
    assert same(weights(whole), weights(killed)) and lines == without_time(killed)
    assert not same(weights(whole), weights(recon(tmp_path / "other", seed=1)))


@pytest.mark.parametrize("changes", [
    dict(keep_high=0.45), pytest.param(dict(regulariser="plain"), marks=pytest.mark.slow),
    pytest.param(dict(model="tiny/qwen2_5_vl", keep_high=0.45), marks=pytest.mark.slow)])
def test_one_two_and_four_parts_train_the_same_selector(tmp_path, changes):
    """Eq. 4 bends at the share of the whole step, whatever --micro is."""
    exact = dict(n_pictures=12, epochs=2, batch=4, dtype="float32", autocast=False, alpha1=3.0)
    whole = recon(tmp_path / "whole", **exact, **changes)
    shares = [line["kept"] for line in without_time(whole)]
    assert len(shares) == 6 and max(shares) > 0.3
    for micro in (2, 1):
        parts = recon(tmp_path / f"micro{micro}", micro=micro, **exact, **changes)
        for one, other in zip(without_time(whole), without_time(parts)):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
            assert other["kept"] == pytest.approx(one["kept"], rel=1e-3)
        # rounding differs with the mix of shapes: 5 of 1.7 million; 36,000 bent at parts' shares
        close(weights(parts), weights(whole), 1e-5 if "model" in changes else 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_pictures_trains_with_what_is_broken_named_and_counted(
        tmp_path, capsys, family):
    model, folder = MODELS[family](tmp_path / "vlm"), photos(tmp_path / "photos")
    (folder / "b.png").write_text("no picture")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    run = recon(tmp_path / "run", model=model, images=folder, epochs=2, dtype="float32")
    printed = capsys.readouterr().out
    assert "b.png: " in printed
    assert "thin.png: too oblong: 1x5000 pixels, expected a side of at most 200" in printed
    assert "2 samples skipped or cut" in printed
    assert len(without_time(run)) == 7                                     # 2 * 7 files / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_train_as_fresh_ones_and_a_killed_cache_goes_on(
        tmp_path, capsys, monkeypatch, family):
    model, folder = MODELS[family](tmp_path / "vlm"), photos(tmp_path / "photos")
    changes = dict(model=model, images=folder, epochs=1, dtype="float32", autocast=False)
    fresh = recon(tmp_path / "fresh", **changes)
    changes["cache_features"] = tmp_path / "cache"
    real, calls = FrozenVLM.encode, []

    def dying(self, batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch)
    monkeypatch.setattr(FrozenVLM, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        recon(tmp_path / "run", **changes)
    assert "GiB are free" in capsys.readouterr().out
    (index,) = (tmp_path / "cache").glob("*.jsonl")
    assert len(index.read_text().splitlines()) == 2
    with open(index, "a") as file:
        file.write("[3, 4")                                  # a kill in the middle of a line
    with open(index.with_suffix(".bin"), "ab") as features:
        features.write(b"12345")

    def counting(self, batch):
        calls.append(1)
        return real(self, batch)
    monkeypatch.setattr(FrozenVLM, "encode", counting)
    run = recon(tmp_path / "run", **changes)
    # the three pictures that were missing, none while training
    assert len(calls) == 2 + 2
    # batches of other pictures round otherwise, and Adam's first steps make much of the least
    # gradient
    for a, b in zip(without_time(fresh), without_time(run)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    other = photos(tmp_path / "more", 6)
    with pytest.raises(ValueError, match="features of something else .*pictures: 5 there, 6 here"):
        recon(tmp_path / "other", **{**changes, "images": other})


def test_crops_are_selected_apart(tmp_path):
    """LLaVA-NeXT: exactly K of a picture, spread over its crops, none of what unpadding cut off."""
    run = recon(tmp_path / "run", model=MODELS["llava_next"](tmp_path / "vlm"), epochs=1,
                dtype="float32", images=photos(tmp_path / "photos"))
    vlm = FrozenVLM.from_pretrained(tmp_path / "vlm", torch.float32)
    selector, _ = runs.load_selector(run, vlm)
    pictures = [Image.open(tmp_path / f"photos/{i}.png") for i in range(3)]
    units = vlm.encode(vlm.pictures(pictures))
    assert max(units.views) > 1 and not units.has_token.all()
    _, valid = units.pad()
    for keep, here, n in zip(selector.select(units, None, 12), valid, units.views):
        assert len(keep) == 12 and here[keep].all() and (keep[1:] > keep[:-1]).all()
        assert len({int(i) // (len(here) // max(units.views)) for i in keep}) == n
    for keep, n in zip(selector.select(units, None, None), units.views):
        assert len(keep) >= n
    assert len(selector.scores(units, None)) == len(units.feats)


@pytest.mark.parametrize("batch", [1, 2])
def test_pictures_of_one_token_and_of_four_train_and_are_selected_from(tmp_path, batch):
    sizes = [(8, 8), (16, 16), (8, 24)]
    folder = photos(tmp_path / "photos", 3, sizes=sizes)
    run = recon(tmp_path / "run", model=MODELS["qwen"](tmp_path / "vlm"), epochs=2, batch=batch,
                dtype="float32", images=folder)
    assert all(np.isfinite(line["loss"]) for line in without_time(run))
    vlm = FrozenVLM.from_pretrained(tmp_path / "vlm", torch.float32)
    selector, _ = runs.load_selector(run, vlm)
    units = vlm.encode(vlm.pictures([Image.open(folder / f"{i}.png") for i in range(3)]))
    assert units.counts == [1, 4, 3]
    assert all(x.isfinite().all() for x in selector.state_dict().values())
    for keep in ([1, 4, 3], [1, 2, 1], None):
        chosen = [len(kept) for kept in selector.select(units, None, keep)]
        assert chosen == keep or keep is None and 1 <= min(chosen)
        assert chosen[0] == 1


def test_thin_pictures_whose_crops_are_padding_train_and_are_selected_from(tmp_path):
    """LLaVA-NeXT cuts all of the crops off, or some."""
    folder = photos(tmp_path / "photos", 3, sizes=[(4, 40), (44, 40), (24, 40)])
    run = recon(tmp_path / "run", model=MODELS["llava_next"](tmp_path / "vlm"), epochs=2, batch=1,
                dtype="float32", images=folder, protocol="stock")
    assert all(np.isfinite(line["loss"]) for line in without_time(run))
    vlm = FrozenVLM.from_pretrained(tmp_path / "vlm", torch.float32, protocol="stock")
    selector, _ = runs.load_selector(run, vlm)
    units = vlm.encode(vlm.pictures([Image.open(folder / f"{i}.png") for i in range(3)]))
    rooms = units.apart().pad()[1].sum(1).tolist()
    assert [min(rooms[:3]), min(rooms[3:7]), min(rooms[7:])] == [0, 0, 12]
    for keep in (4, None):
        chosen = selector.select(units, None, keep)
        assert all(here[kept].all() for kept, here in zip(chosen, units.pad()[1]))
        assert keep is None or [len(kept) for kept in chosen] == [4] * 3


def test_crops_of_a_batch_in_parts_are_those_of_the_whole(tmp_path):
    """What a crop draws, and where the dead zone bends, follow from the step and not its parts."""
    model, folder = MODELS["llava_next"](tmp_path / "vlm"), photos(tmp_path / "photos", 4)
    changes = dict(model=model, images=folder, epochs=2, batch=4, dtype="float32", autocast=False,
                   keep_high=0.45)
    whole, parts = (recon(tmp_path / f"micro{micro}", micro=micro, **changes) for micro in (4, 1))
    close(weights(parts), weights(whole))


def test_a_cache_that_does_not_fit_is_refused_beforehand(tmp_path, monkeypatch):
    free = type("Free", (), {"free": 1000})()
    monkeypatch.setattr("data.feature_cache.shutil.disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="do not fit into"):
        recon(tmp_path / "run", cache_features=tmp_path / "cache")


def test_an_empty_folder_or_one_without_a_picture_stops_at_once(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        recon(tmp_path / "run", images=tmp_path / "none")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "words.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no picture"):
        recon(tmp_path / "run", images=folder)
    (folder / "a.png").write_text("hello")
    with pytest.raises(ValueError, match="none of 1 pictures can be used"):
        recon(tmp_path / "run", images=folder)


def test_one_selector_serves_every_vlm_with_its_encoder_and_no_other(tmp_path):
    run = recon(tmp_path / "run", model=llava(tmp_path / "a"), epochs=1, dtype="float32")
    text = dict(model_type="llama", vocab_size=43, hidden_size=48, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=512)
    other = FrozenVLM.from_pretrained(llava(tmp_path / "b", seed=5, text_config=text),
                                      torch.float32)
    assert other.dim == 48 and runs.load_selector(run, other)[0].cfg.width == 16
    config_file = run / "selector/config.json"
    saved = json.loads(config_file.read_text())
    for name, value in (("vision_width", 1024), ("vision_side", 24), ("feature_layer", -1),
                        ("vision_layers", 24)):
        changed = {**saved, "backbone": {**saved["backbone"], name: value}}
        config_file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"another backbone.*{name}: {value} there"):
            runs.load_selector(run, other)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_conditional_selector_reads_the_question(tmp_path, layer):
    run = recon(tmp_path, select_after_layer=layer, epochs=1)
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    selector, _ = runs.load_selector(run, vlm)
    assert selector.cfg.select_after_layer == layer and selector.cfg.width == vlm.dim
    image = tiny_world.load_rows(1)[0].image
    scores = []
    for question in ("how many shapes are there ?", "what colour is the square ?"):
        batch = vlm.batch([image], [[(question, None)]], ask_twice=True)
        units = selector.read(vlm, Batch(batch, batch, [0]))
        scores.append(selector.scores(units, None))
    assert not torch.allclose(*scores, atol=1e-4)
    for bad, message in ((dict(images=photos(tmp_path / "photos")), "pictures and no text"),
                         (dict(cache_features=tmp_path / "cache"), "language model's states")):
        with pytest.raises(ValueError, match=message):
            recon(tmp_path / "other", select_after_layer=layer, **bad)


def test_the_loss_goes_down(tmp_path):
    run = recon(tmp_path / "run", model=llava(tmp_path / "vlm"), n_pictures=32, epochs=10, batch=8,
                lr=3e-3)
    losses = [line["feature"] + line["image"] for line in without_time(run)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    cache = FeatureCache(tmp_path, {}, torch.bfloat16)
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.bfloat16)
    pictures = [row.image for row in tiny_world.load_rows(21)[:3]]
    units = vlm.encode(vlm.pictures(pictures))
    cache.fill(3, [None], lambda _: units)
    back = FeatureCache(tmp_path, {}, torch.bfloat16).units([2, 0])
    assert torch.equal(back.feats, torch.cat([units.feats[288:], units.feats[:144]]))
    assert back.grid == [(12, 12)] * 2
    assert back.image_of.tolist() == [0] * 144 + [1] * 144


# ------------------------------------------------------------------------------------ evaluate.py


def by_name(lines):
    return {(line["method"], line["K"]): line for line in lines}


def test_evaluate_keeps_k_and_what_the_mask_keeps(tmp_path):
    folders = [str(recon(tmp_path / f"run_s{seed}", epochs=1, seed=seed)) for seed in (0, 1)]
    out = tmp_path / "out"
    lines = evaluate.main(["--run", *folders, "--sample", "40", "--budgets", "16", "8", "--device",
                           "cpu", "--out", str(out), "--methods", "random", "--resamples", "20"])
    kept = {key: line["cost"]["kept"] for key, line in by_name(lines).items()}
    assert kept[folders[0], 16] == 16 and 1 <= kept[f"{folders[0]} mask", "mask"] <= 144
    mean = by_name(scores.mean_over_seeds(lines))[f"{tmp_path / 'run'} mask", "mask"]
    assert mean["runs"] == 2 and mean["cost"]["kept"] > 1
    for name in ("curve.png", "kept.png"):
        assert Image.open(out / name).size[0] > 300
    training_curves.main([*folders, "--out", str(tmp_path / "curves.png")])
    assert Image.open(tmp_path / "curves.png").size[0] > 900


def test_evaluate_prunes_inside_the_language_model(tmp_path):
    run = str(recon(tmp_path / "run", select_after_layer=2, epochs=1))
    asked = ["--run", run, "--budgets", "16", "--device", "cpu"]
    lines = by_name(evaluate.main([*asked, "--sample", "40", "--methods", "random",
                                   "--resamples", "20"]))
    assert lines[f"{run} asked twice", "all"]["cost"]["kept"] == 144
    assert lines[f"{run} random inside", 16]["cost"]["kept"] == 16
    assert lines[run, 16]["cost"]["kept"] == 16
    assert 1 <= lines[f"{run} mask", "mask"]["cost"]["kept"] <= 144
    recall = {key: line["recall"]["tiny_world"] for key, line in lines.items()}
    assert recall[run, 16] < 100 == recall[f"{run} asked twice", "all"]
    tiny_world.load_rows(1)[0].image.save(tmp_path / "photo.png")
    lines = answer.main([*asked, "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path),
                         "--question", "how many shapes are there ?",
                         "what colour is the circle ?"])
    assert [line["kept"] for line in lines] == [144, 16] * 2
    assert (tmp_path / "answer.png").exists()
    assert all(line["select_ms"] > 0 for line in lines[1::2])      # it is asked anew in every turn


@pytest.mark.parametrize("family, tokens", [("llava_next", 48), ("llava_onevision", 9)])
def test_inside_where_newlines_stand_between_the_units(tmp_path, family, tokens):
    """K counts units; newlines stay beside them, and some leave."""
    run = recon(tmp_path / "run", model=MODELS[family](tmp_path / "vlm", tokens="bytes"),
                select_after_layer=1, epochs=1, dtype="float32")
    assert len(without_time(run)) == 3
    asked = ["--run", str(run), "--budgets", "6", "999", "--device", "cpu", "--sample", "10"]
    lines = by_name(evaluate.main([*asked, "--methods", "fastv", "--resamples", "20"]))
    for way in ("", " random inside"):
        assert lines[f"{run}{way}", 6]["cost"]["kept"] == 6
        rows = run / f"predictions/tiny_world/{file_name(f'{run}{way}', 6)}.jsonl"
        seen = [json.loads(line)["seen"] for line in rows.read_text().splitlines()[1:]]
        assert all(6 <= last < entered for entered, last, _ in seen)
        assert any(last > 6 for _, last, _ in seen)
    every = lines[f"{run} asked twice", "all"]["cost"]["kept"]
    assert every == lines[str(run), 999]["cost"]["kept"] <= tokens
    assert 1 <= lines[f"{run} mask", "mask"]["cost"]["kept"] <= every
    # fewer than crops: it is left out, and the others are answered
    lines = by_name(evaluate.main([*asked[:2], "--budgets", "1", *asked[5:], "--methods", "random",
                                   "--resamples", "20", "--out", str(tmp_path / "out")]))
    assert ((str(run), 1) in lines) == (family == "llava_onevision")
    assert lines["random", 1]["cost"]["kept"] == 1


def test_all_of_them_inside_is_the_question_twice_and_random_ones_answer_less(tmp_path):
    """Inside the language model: nothing dropped changes no answer, and chance drops what is asked
    about."""
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    selector, _ = runs.load_selector(recon(tmp_path, select_after_layer=2, epochs=1), vlm)
    ways = selector.ways([], [24], None)

    def everything(keep, tokens):
        return {2: lambda view: [torch.arange(144)] * len(view.states)}
    asked = {("asked twice", "all"): ways[" asked twice"],
             ("random inside", 24): ways[" random inside"],
             ("everything", 24): Way(stages=everything, ask_twice=True)}
    questions = tiny_world.load(n=60)
    rows = answering.answer_batch(vlm, list(enumerate(questions)), asked)
    answers = {name: [row["answer"] for row in found] for (name, _), found in rows.items()}
    assert answers["asked twice"] == answers["everything"]
    right = {name: sum(tiny_world.is_right(text, question.gold["answer"])
                       for text, question in zip(texts, questions))
             for name, texts in answers.items()}
    assert right["asked twice"] > right["random inside"] + 5


def test_random_tokens_inside_are_those_of_the_baseline(tmp_path):
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    selector, _ = runs.load_selector(recon(tmp_path, select_after_layer=2, epochs=1), vlm)
    part = list(enumerate(tiny_world.load(n=8)))[:4]
    seen = []
    way = selector.ways([], [24], None)[" random inside"]

    def spied(keep, tokens):
        (layer, rule), = way.stages(keep, tokens).items()

        def spy(view):
            seen.append(rule(view))
            return seen[-1]
        return {layer: spy}
    answering.answer_batch(vlm, part, {("x", 24): Way(stages=spied, ask_twice=True)})
    asked = answering.ask(vlm, [question for _, question in part])
    for keep, other in zip(seen[0], random_tokens.select(asked.units, 24)):
        assert torch.equal(keep, other)
