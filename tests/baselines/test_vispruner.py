"""VisPruner by hand, and against its rounds told token by token."""

import pytest
import torch

from baselines import vispruner
from common import Units

pytestmark = pytest.mark.usefixtures("one_thread")


def made(x, attention):
    n = len(x)
    return Units(x, torch.zeros(n, dtype=torch.int64), [(1, n)],
                 readings={"attention": torch.as_tensor(attention)})


def directions(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def told(x, attention, k, important, at_a_time=8):
    """Plain Python: sets, sums and sorts of one token after another."""
    def cosine(i, j):
        return float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))
    order = sorted(range(len(x)), key=lambda i: -float(attention[i]))
    chosen, rest = order[:important], order[important:]
    if important == k:
        return chosen
    while len(rest) > k - important:
        first, second = rest[0::2], rest[1::2]
        first.sort(key=lambda i: -max(cosine(i, j) for j in second))
        for _ in range(at_a_time):
            if first and len(first) + len(second) > k - important:
                first.pop(0)
        rest = first + second
    return chosen + rest


def test_vispruner_by_hand(monkeypatch):
    monkeypatch.setattr(vispruner, "AT_A_TIME", 1)
    # 5 is important; then 0 1 2 3 4 by attention. Round 1: from 0, 2 and 4 the nearest of 1 and 3
    # are 50, 5 and 30 degrees away: 2 goes, 4 and 0 stay in this order, 1 and 3 behind them.
    # Round 2, of 4 1 and 0 3: 4 is 80 from 0 and 70 from 3, 1 is 50 from 0: 1 goes
    x = directions(0, 50, 55, 150, 80, 200)
    attention = [.5, .4, .3, .2, .1, .9]
    assert vispruner.choose(x, torch.tensor(attention), 4, 1).tolist() == [5, 4, 0, 3]
    assert vispruner.select(made(x, attention), 5, ratio=.2)[0].tolist() == [0, 1, 3, 4, 5]
    assert vispruner.select(made(x, attention), 4, ratio=.25)[0].tolist() == [0, 3, 4, 5]


def test_vispruner_drops_eight_a_round_of_any_number():
    """The released rounds, but also where the rest is odd or its half has fewer than eight."""
    for seed, n, k in ((0, 64, 16), (1, 63, 16), (2, 40, 9), (3, 41, 7), (4, 17, 2), (5, 9, 1),
                       (6, 30, 29), (7, 30, 30), (8, 12, 1)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        attention = torch.rand(n, generator=generator, dtype=torch.float64)
        for ratio in (0., .25, .5, 1.):
            found = vispruner.choose(x, attention, k, int(k * ratio)).tolist()
            assert found == told(x, attention, k, int(k * ratio)), (n, k, ratio)
            assert len({*found}) == k


def test_the_important_half_is_the_most_attended_and_of_two_twins_one_goes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 24, generator=generator)
    x[21] = x[20]                                      # the first of the two is in the second set
    keep = vispruner.select(made(x, torch.arange(32, 0, -1.)), 30)[0].tolist()
    assert keep[:15] == list(range(15)) and 20 in keep and 21 not in keep
    x[1] = x[0]                                        # what is important may be there twice
    assert vispruner.select(made(x, torch.arange(32, 0, -1.)), 30)[0].tolist()[:2] == [0, 1]


def test_equal_attention_and_features_keep_the_first_important():
    keep = vispruner.select(made(torch.ones(12, 3), torch.ones(12)), 4)[0].tolist()
    assert keep[:2] == [0, 1] and len(keep) == 4
