"""Features on disk: the encoder's own, whole after a kill, never of something else."""

import multiprocessing
import os
import resource
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from data import feature_cache
from data.batches import cached, open_data
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
    (index,) = tmp_path.glob("*.jsonl")
    with open(index, "a") as lines:
        lines.write('{"grid": [3, ')
    with open(index.with_suffix(".bin"), "ab") as features:
        features.write(b"12345")
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    assert len(cache) == 2 and cache.missing(5) == [2, 3, 4]
    cache.fill(5, [0], lambda _: units.rows([2, 3, 4]))
    equal(FeatureCache(tmp_path, KEY, vlm.dtype).units([0, 1, 2, 3, 4]), units)


def test_every_picture_is_on_disk_before_the_next_one_is_made(tmp_path, vlm, pictures):
    def encode(number):
        assert len(FeatureCache(tmp_path, KEY, vlm.dtype)) == number
        return vlm.encode(vlm.pictures([pictures[number]]))

    FeatureCache(tmp_path, KEY, vlm.dtype).fill(5, range(5), encode)


def test_a_line_without_its_features_does_not_count(tmp_path, vlm, pictures):
    units = vlm.encode(vlm.pictures(pictures))
    FeatureCache(tmp_path, KEY, vlm.dtype).fill(5, [0], lambda _: units)
    (features,) = tmp_path.glob("*.bin")
    os.truncate(features, features.stat().st_size - 1)
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    assert cache.missing(5) == [4]
    cache.fill(5, [0], lambda _: units.rows([4]))
    equal(FeatureCache(tmp_path, KEY, vlm.dtype).units([0, 1, 2, 3, 4]), units)


# ------------------------------------------------------------ several processes


@pytest.mark.parametrize("before, after", [(1, 2), (2, 3), (3, 1)])
def test_shares_of_any_number_of_processes_make_one_cache(tmp_path, vlm, pictures, before, after):
    """A run of `before` processes ends early, one of `after` goes on."""
    units = vlm.encode(vlm.pictures(pictures))

    def make(rank, processes, most):
        cache = FeatureCache(tmp_path, KEY, vlm.dtype)
        mine = cache.missing(5, rank, processes)[:most]
        cache.wait = lambda n, rank: None  # the processes come one after another here
        cache.fill(5, [[i] for i in mine], units.rows, rank, processes)
        return mine

    made = [make(rank, before, 1) for rank in range(before)]
    made += [make(rank, after, 5) for rank in range(after)]
    assert sorted(sum(made, [])) == [0, 1, 2, 3, 4]
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    cache.fill(5, [], None)  # nothing is missing, nothing is written
    equal(cache.units([3, 0, 4, 1, 2]), units.rows([3, 0, 4, 1, 2]))
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir()} and len(files) > 4


def test_who_waits_in_vain_is_told_so(tmp_path, vlm, pictures, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "PATIENCE", 0.5)
    units = vlm.encode(vlm.pictures(pictures))
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    with pytest.raises(TimeoutError, match="2 of 5 pictures are missing, and none has come for"):
        cache.fill(5, [0], lambda _: units.rows([0, 2, 4]), 0, 2)
    assert "waiting for other processes, 2 of 5 pictures missing" in capsys.readouterr().out


def share(vlm, folder, rank, processes, pause, made):
    """What train.py does on a process, which takes its time."""
    torch.set_num_threads(1)  # as a loader's workers do: threads do not outlive a fork
    # tqdm's own lock spans processes: one that is killed would keep it, and all others would wait
    tqdm.set_lock(threading.RLock())
    config = SimpleNamespace(
        data="scenes",
        model="tiny",
        images=None,
        take=None,
        path=None,
        split=None,
        questions=1,
        n_pictures=9,
        epochs=1.0,
        batch=1,
        seed=0,
        dtype="float64",
        workers=0,
        cache_features=folder,
    )
    encode = vlm.encode

    def slow(batch):
        time.sleep(pause)
        made.put(rank)
        return encode(batch)

    vlm.encode = slow
    cache = cached(config, vlm, open_data(config, vlm, "picture"), "picture", rank, processes)
    # only who has seen all features may say so
    made.put(cache.units(list(range(9))).feats.sum().item())


def test_two_real_processes_share_the_work_and_a_kill_loses_nothing_whole(tmp_path, vlm):
    """Killed with -9 on two processes, ended on two others, read by one."""
    fork = multiprocessing.get_context("fork")

    def start(folder, processes, pause=0.0):
        made = fork.SimpleQueue()
        args = [(vlm, folder, rank, processes, pause, made) for rank in range(processes)]
        jobs = [fork.Process(target=share, args=arg) for arg in args]
        for job in jobs:
            job.start()
        return jobs, made

    def there():
        return sum(path.read_text().count("\n") for path in (tmp_path / "killed").glob("*.jsonl"))

    def end(folder, processes):
        jobs, queue = start(folder, processes, 0.02)
        for job in jobs:
            job.join(60)
            assert job.exitcode == 0
        found = []
        while not queue.empty():
            found.append(queue.get())
        ranks = [x for x in found if isinstance(x, int)]
        return ranks, {round(x, 9) for x in found if isinstance(x, float)}

    jobs, _ = start(tmp_path / "killed", 2, 0.3)
    while there() < 3 and all(job.is_alive() for job in jobs):
        time.sleep(0.02)
    for job in jobs:
        job.kill()
        job.join()
    done = there()
    assert 3 <= done < 9
    ranks, sums = end(tmp_path / "killed", 2)
    assert len(ranks) == 9 - done and {*ranks} == {0, 1} and len(sums) == 1
    assert end(tmp_path / "whole", 1) == ([0] * 9, sums)
    assert end(tmp_path / "killed", 1) == ([], sums)


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


def test_a_full_disk_is_said_and_what_is_whole_stays(tmp_path, vlm, pictures):
    units = [vlm.encode(vlm.pictures([picture])) for picture in pictures]
    size = units[0].feats.numel() * units[0].feats.element_size()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))         # room for one and a bit
    try:
        with pytest.raises(OSError, match=r"\.bin cannot be written .*make room"):
            FeatureCache(tmp_path, KEY, vlm.dtype).fill(5, range(5), lambda number: units[number])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cache = FeatureCache(tmp_path, KEY, vlm.dtype)
    assert len(cache) == 1
    missing = iter(cache.missing(5))
    cache.fill(5, range(4), lambda _: units[next(missing)])
    for number, whole in enumerate(units):
        equal(cache.units([number]), whole)
