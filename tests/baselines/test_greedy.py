"""Picks of many pictures at once: those of one picture after another, as a plain loop makes them,
and nothing between two picks that waits for the device."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import cdpruner, divprune, greedy, pact
from common import Units

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = range(30)
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select,
         aten.unique_dim, aten._unique2, aten.equal, aten._to_copy}


class NoWaiting(TorchDispatchMode):
    """Raises on what would make a GPU's host wait for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in WAITS, function
        if function.overloadpacket in (aten.index, aten.index_put_):   # by bools: a nonzero inside
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype != torch.bool for i in indices), function
        return function(*args, **kwargs or {})


def pictures(seed, d=24):
    """Of three pictures of different lengths x (n, d); every third time with twins."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(12, 40, (3,), generator=generator).tolist()
    x = [torch.randn(n, d, generator=generator) for n in sizes]
    if seed % 3 == 0:
        for own in x:
            own[5] = own[9] = own[2]
    return x, generator


def units_of(x):
    image_of = torch.arange(len(x)).repeat_interleave(torch.tensor([len(own) for own in x]))
    return Units(torch.cat(x), image_of, [(1, len(own)) for own in x],
                 readings={"projected": torch.cat(x)})


# ---------------------------------------------------------------------- one after another

def plain_divprune(x, k, repeats=False):
    x = F.normalize(x, dim=-1)
    apart = 1 - x @ x.T
    chosen = [int(apart.clone().fill_diagonal_(torch.inf).amin(0).argmax())]
    while len(chosen) < k:
        gap = apart[chosen].amin(0)
        if not repeats:
            gap[chosen] = -torch.inf
        chosen.append(int(gap.argmax()))
    return sorted({*chosen})


def plain_cdpruner(x, relevance, k):
    """As Chen et al. write it, token by token."""
    x = F.normalize(x, dim=-1)
    kernel = relevance[:, None] * (x @ x.T) * relevance
    left, chosen, rows = kernel.diagonal().clone(), [], []
    for _ in range(k):
        j = int(left.argmax())
        row = kernel[j].clone()
        if rows:
            row -= torch.stack([own[j] for own in rows]) @ torch.stack(rows)
        rows.append(row / left[j].sqrt())
        chosen.append(j)
        left = (left - rows[-1] ** 2).clamp(min=1e-10)
        left[chosen] = -torch.inf
    return sorted(chosen)


def plain_pact(distance, k):
    """Halving with the rule of centres in rounds, then the farthest, one by one."""
    order = pact.density_order(distance)

    def count(cutoff):
        return int(pact.centres_within(distance, order, cutoff).sum())
    low, high = 0., 2.
    if count(low) <= k:
        high = low
    for _ in range(20 if high else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if count(middle) <= k else (middle, high)
    centre = pact.centres_within(distance, order, high)
    while int(centre.sum()) < k:
        nearest = distance[:, centre].min(1).values.masked_fill(centre, -1.)
        centre[nearest.argmax()] = True
    return centre.nonzero().flatten().tolist(), high


def between(x):
    x = F.normalize(x, dim=-1)
    return (1 - x @ x.T).clamp(min=0).fill_diagonal_(0.)


@pytest.mark.parametrize("limit", [greedy.LIMIT, 3000])  # all together, and apart
def test_divprune_picks_as_one_picture_after_another(limit, monkeypatch):
    monkeypatch.setattr(greedy, "LIMIT", limit)
    for seed in SEEDS:
        x, _ = pictures(seed)
        for k in (1, 5, 12):
            expected = [plain_divprune(own, k) for own in x]
            assert [i.tolist() for i in divprune.select(units_of(x), k)] == expected
        near = [(torch.ones_like(own) + 1e-3 * own).bfloat16() for own in x]
        expected = [plain_divprune(own, 12, repeats=True) for own in near]
        assert [i.tolist() for i in divprune.select(units_of(near), 12, as_released=True)
                ] == expected


@pytest.mark.parametrize("limit", [greedy.LIMIT, 3000])
def test_cdpruner_picks_as_one_picture_after_another(limit, monkeypatch):
    monkeypatch.setattr(greedy, "LIMIT", limit)
    for seed in SEEDS:
        x, generator = pictures(seed)
        words = torch.randn(3, 4, x[0].shape[1], generator=generator)
        valid = torch.ones(3, 4, dtype=torch.bool)
        for k in (1, 5, 12):
            expected = []
            for own, question in zip(x, words):
                cosine = F.normalize(own, dim=-1) @ F.normalize(question, dim=-1).T
                expected.append(plain_cdpruner(own, cdpruner.scaled(cosine.mean(1), None), k))
            found = cdpruner.select(units_of(x), k, question=(words, valid))
            assert [i.tolist() for i in found] == expected


def test_cdpruner_takes_the_first_of_equals_and_shares_k_over_views():
    """Orthogonal tokens of equal relevance; more are wanted than there are directions."""
    x = [torch.eye(12)[:6].repeat(2, 1), torch.eye(12)[:3].repeat(3, 1)]
    kernels = cdpruner.kernel(x, [torch.ones(len(own)) for own in x])
    first, second = cdpruner.spread(kernels, 9).tolist()
    assert first == [*range(9)] and second == [*range(9)]
    units = units_of([torch.cat(x), x[1]])
    units.views, units.shapes, units.grid = [2, 1], [(1, 12), (1, 9), (1, 9)], [(21, 1), (1, 9)]
    words = torch.ones(2, 1, 12), torch.ones(2, 1, dtype=torch.bool)
    for k in (1, 7, 9):                                # of views with 12, 9 and 9 tokens
        found = cdpruner.select(units, k, question=words)
        assert [len(i.unique()) for i in found] == [k, k]


def test_pacts_clusters_are_those_of_halving_in_rounds():
    for seed in SEEDS:
        x, _ = pictures(seed, d=3 + seed % 5)
        if seed % 4 == 0:
            x[1][3:9] = x[1][2]                        # many at distance 0
        distances = [between(own.double() if seed % 2 else own) for own in x]
        for k in (1, 2, 6, 12):
            centres, cutoffs = pact.exactly(distances, k)
            for own, row, cutoff in zip(distances, centres, cutoffs):
                assert (row.tolist(), cutoff.item()) == plain_pact(own, k)


def test_how_many_halvings_at_once_changes_nothing(monkeypatch):
    x, _ = pictures(1, d=4)
    distances = [between(own) for own in x]
    expected = pact.exactly(distances, 7)
    for together in (1, 3, 4, 20 // 3):
        monkeypatch.setattr(pact, "AT_ONCE", {"cuda": together})
        assert all(map(torch.equal, pact.exactly(distances, 7), expected))


def test_merging_together_is_merging_alone(monkeypatch):
    for seed in range(20):
        x, generator = pictures(seed)
        scores = [torch.rand(len(own), generator=generator) for own in x]
        keys = [own.flip(1) for own in x]
        together = pact.merge(x, keys, scores, 8)
        monkeypatch.setattr(greedy, "LIMIT", 1)
        for b, own in enumerate(pact.merge(x, keys, scores, 8)):
            assert all(map(torch.equal, own, together[b]))
        monkeypatch.undo()


# ---------------------------------------------------------------------- nothing waits

def test_no_pick_waits_for_the_device():
    x, generator = pictures(0)
    apart, real = divprune.distances(x)
    kernels = cdpruner.kernel(x, [torch.rand(len(own), generator=generator) for own in x])
    distances = [between(own) for own in x]
    with NoWaiting():
        divprune.farthest(apart, real, 9)
        for bounded in (True, False):
            cdpruner.spread(kernels, 9, bounded)
        pact.exactly(distances, 9)
    for waiting in (lambda: int(apart.argmax()), lambda: kernels[kernels > 0], lambda: plain_pact(
            distances[0], 9)):
        with pytest.raises(AssertionError), NoWaiting():
            waiting()


def test_pictures_are_picked_from_in_parts_that_fit(monkeypatch):
    monkeypatch.setattr(greedy, "LIMIT", 2 * 10 * (10 + 4))
    found = [(b, 5, torch.zeros(n, 4)) for b, n in enumerate([10, 8, 3, 30, 10, 10])]
    assert [part[0] for part in greedy.in_parts(found)] == [[0, 1], [2], [3], [4, 5]]
    assert [*greedy.in_parts([])] == []
