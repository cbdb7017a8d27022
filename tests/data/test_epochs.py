"""Epochs: each whole, in an order of its own, and the same whenever a run is resumed."""

import pytest
import torch

from data.epochs import Epochs


def test_each_epoch_is_a_permutation_of_its_own():
    data = [f"item {i}" for i in range(20)]
    seen = list(Epochs(data, 0, 60, seed=3))
    assert len(seen) == 60
    epochs = [seen[:20], seen[20:40], seen[40:]]
    assert all(sorted(epoch) == sorted(data) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [data, *epochs]}) == 4


def test_a_resumed_run_sees_what_the_unbroken_one_would_have_seen():
    data = range(7)
    torch.manual_seed(0)
    unbroken = list(Epochs(data, 0, 40, seed=1))
    for start in (0, 3, 7, 20, 39, 40):
        torch.manual_seed(start + 1)
        assert list(Epochs(data, start, 40, seed=1)) == unbroken[start:]
    items = Epochs(data, 10, 40, seed=1)
    assert [items[i] for i in (29, 0, 15, 1, -1)] == [unbroken[g] for g in (39, 10, 25, 11, 39)]
    with pytest.raises(IndexError):
        items[30]


def test_no_epoch_of_a_seed_is_one_of_another():
    orders = {
        tuple(Epochs(range(20), 20 * e, 20 * e + 20, seed=seed))
        for seed in range(5)
        for e in range(5)
    }
    assert len(orders) == 25


def test_an_epoch_is_drawn_once_and_leaves_the_global_generator_alone(monkeypatch):
    draws, randperm = [], torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda n, **kwargs: draws.append(n) or randperm(n, **kwargs)
    )
    state = torch.get_rng_state()
    list(Epochs(range(10), 5, 30))
    assert draws == [10, 10, 10]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "data, start, stop, seed",
    [([], 0, 0, 0), ([], 0, 5, 0), ([1], 3, 2, 0), ([1], -1, 2, 0), ([1], 0, 2, -1)],
)
def test_epochs_of_nothing_are_refused(data, start, stop, seed):
    with pytest.raises(
        ValueError, match=f"{len(data)} items, start={start}, stop={stop}, seed={seed}"
    ):
        Epochs(data, start, stop, seed)
