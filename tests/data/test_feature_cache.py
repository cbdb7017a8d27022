"""Features on disk: the encoder's own, whole after a kill, never of something else."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.feature_cache import FeatureCache

KEY = {"fingerprint": {"vision_width": 16}, "pictures": 5}


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    sizes = [(40, 24), (24, 40), (32, 32), (64, 24), (24, 24)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def equal(units, other):
    for name in ("feats", "image_of", "has_token"):
        mine, theirs = getattr(units, name), getattr(other, name)
        assert mine is theirs is None or torch.equal(mine, theirs), name
    for name in ("grid", "views", "shapes"):
        assert getattr(units, name) == getattr(other, name), name


def test_a_cache_gives_back_what_it_was_given(tmp_path, vlm, pictures):
    parts = [vlm.encode(vlm.pictures(pictures[:2])), vlm.encode(vlm.pictures(pictures[2:]))]
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    cache.fill(5, [0, 1], lambda part: parts[part])
    for read in (cache, FeatureCache(tmp_path, KEY, vlm.dtype)):
        assert len(read) == 5
        equal(read.units([1, 0]), parts[0].rows([1, 0]))
        equal(read.units([4, 2]), parts[1].rows([2, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_bit_comes_back_in_the_dtype_of_the_vlm(tmp_path, vlm, pictures, dtype):
    units = vlm.encode(vlm.pictures(pictures))
    units.feats = units.feats.to(dtype)
    cache = FeatureCache(tmp_path, KEY, dtype)
    cache.fill(5, [0], lambda _: units)
    assert cache.units([0, 1, 2, 3, 4]).feats.dtype == dtype
    equal(cache.units([0, 1, 2, 3, 4]), units)


def test_a_killed_run_goes_on_behind_its_last_whole_picture(tmp_path, vlm, pictures):
    units = vlm.encode(vlm.pictures(pictures))
    FeatureCache(tmp_path, KEY, vlm.dtype).fill(2, [0], lambda _: units.rows([0, 1]))
    with open(tmp_path / "index.jsonl", "a") as index:
        index.write('{"grid": [3, ')
    with open(tmp_path / "features.bin", "ab") as features:
        features.write(b"12345")
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    assert len(cache) == 2
    cache.fill(5, [0], lambda _: units.rows([2, 3, 4]))
    equal(FeatureCache(tmp_path, KEY, vlm.dtype).units([0, 1, 2, 3, 4]), units)


def test_what_does_not_fit_is_said_before_it_is_written(tmp_path, vlm, pictures, monkeypatch):
    free = type("Free", (), {"free": 1000})()
    monkeypatch.setattr("data.feature_cache.shutil.disk_usage", lambda folder: free)
    units = vlm.encode(vlm.pictures(pictures))
    with pytest.raises(OSError, match="do not fit into .*: name another folder, or leave the"):
        FeatureCache(tmp_path, KEY, vlm.dtype).fill(5, [0], lambda _: units)
    assert len(FeatureCache(tmp_path, KEY, vlm.dtype)) == 0


def test_features_of_something_else_are_refused_and_named(tmp_path):
    FeatureCache(tmp_path, KEY, torch.float32)
    with pytest.raises(ValueError, match="something else .pictures: 5 there, 6 here.: name"):
        FeatureCache(tmp_path, {**KEY, "pictures": 6}, torch.float32)
