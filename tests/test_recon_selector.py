"""recon_selector.py does what its equations say."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

import autoselect
import recon_selector as rs

SMALL = rs.Config(width=16, layers=1, rebuild_layers=2, image_layers=1, heads=2, patch=6, channels=4, grid=3)
GRID, SIZE = (3, 4), (18, 24)


def model(**changes):
    torch.manual_seed(0)
    return rs.ReconSelector(replace(SMALL, **changes)).double()


def inputs(b=3, patches=(), seed=1):
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(b, 12, *patches, 16, generator=g, dtype=torch.float64) * 2 + 1
    return v, torch.rand(b, 3, *SIZE, generator=g, dtype=torch.float64)


def batch(v, pixels, grid=GRID):
    """As forward() takes pictures that are all of one grid."""
    return v, torch.ones(v.shape[:2], dtype=torch.bool), list(pixels), [grid] * len(v)


# ---------------------------------------------------------------------------------------------------- equations

def test_hard_mask_is_hard_forwards_and_soft_backwards():
    logits, noise = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 2).double()
    mask = rs.hard_mask(logits, noise, .7)
    assert torch.equal(mask.detach(), ((logits + noise)[..., 1] > (logits + noise)[..., 0]).double())
    weight = torch.randn_like(mask)
    soft = ((logits + noise) / .7).softmax(-1)[..., 1]
    assert torch.allclose(*(torch.autograd.grad((x * weight).sum(), logits)[0] for x in (mask, soft)))


def test_gumbel_noise_draws_from_the_softmax():
    """What sets Eq. 5 apart from the straight-through softmax: a token is kept as often as its logits say."""
    net = model().train()
    logits = torch.tensor([.2, 1.4]).double()
    net.selector.forward = lambda x, valid: logits.expand(*x.shape[:2], 2)
    net.cfg = replace(net.cfg, regulariser="plain")
    g = torch.Generator().manual_seed(0)
    kept = [net(*batch(*inputs(8)), g)[1]["kept"] for _ in range(60)]
    share, expected = sum(kept) / 60, logits.softmax(0)[1].item()
    assert abs(share - expected) < 3 * (expected * (1 - expected) / (60 * 96)) ** .5
    net.cfg = replace(net.cfg, estimator="softmax")
    assert net(*batch(*inputs(8)), g)[1]["kept"] == 1


def test_the_dead_zone_is_flat_and_pulls_from_both_sides():
    share = torch.tensor([0., .05, .1, .3, .6, .8, 1.]).double().requires_grad_()
    value = rs.dead_zone(share, .6, .1, .1, .2)
    assert torch.allclose(value, torch.tensor([.06, .05, .04, .04, .04, .06, .08]).double())
    slope = torch.autograd.grad(value.sum(), share)[0]
    assert torch.allclose(slope[[0, 1, 3, 5, 6]], torch.tensor([-.2, -.2, 0, .1, .1]).double())
    inside = torch.tensor([.2, .9]).double().requires_grad_()
    assert gradcheck(lambda x: rs.dead_zone(x, .6, .1, .1, .2), inside)


def test_kept_share_leaves_padding_out():
    mask = torch.tensor([[1., 1, 0, 1], [1, 0, 1, 1]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert rs.kept_share(mask, valid) == pytest.approx((.75 + .5) / 2)


def test_put_masked_replaces_exactly_what_is_dropped():
    v, masked = torch.randn(2, 4, 3), torch.randn(3)
    mask = torch.tensor([[1., 0, 0, 1], [0, 1, 1, 1]])
    out = rs.put_masked(v, mask, masked)
    assert torch.equal(out[mask > 0], v[mask > 0]) and torch.equal(out[mask == 0], masked.expand(3, 3))


def test_dropped_content_does_not_leak():
    """Another content of a dropped token changes nothing downstream while the mask stays."""
    net, (v, _) = model().eval(), inputs()
    mask = (torch.arange(12) % 3 > 0).double().expand(3, 12)
    other = torch.where(mask[..., None] > 0, v, torch.randn_like(v) * 100)
    for a, b in zip(net.rebuild(v, mask, GRID, SIZE), net.rebuild(other, mask, GRID, SIZE)):
        assert torch.equal(a, b)
    kept = torch.where(mask[..., None] > 0, torch.randn_like(v), v)
    assert not torch.allclose(net.rebuild(v, mask, GRID, SIZE)[0], net.rebuild(kept, mask, GRID, SIZE)[0])


# ------------------------------------------------------------------------------------------------------ modules

@pytest.mark.parametrize("grid, size", [((12, 12), (144, 144)), ((9, 16), (108, 192)), ((3, 4), (31, 50)),
                                        ((1, 1), (5, 7))])
def test_the_picture_comes_back_in_its_own_size(grid, size):
    net, x = model(), torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    assert net.image(x, grid, size).shape == (2, 3, *size) and net.features(x, grid).shape == x.shape


@pytest.mark.parametrize("changes", [{}, dict(estimator="softmax"), dict(regulariser="plain"), dict(p=.3, q=.2)])
@pytest.mark.parametrize("patches", [(), (4,)])
def test_every_parameter_learns_through_the_hard_mask(changes, patches):
    net = model(**changes).train()
    loss, parts = net(*batch(*inputs(patches=patches)), torch.Generator().manual_seed(0))
    loss.backward()
    assert 0 < parts["kept"] < 1
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_the_loss_is_the_printed_sum():
    net, (v, pixels) = model(estimator="softmax").eval(), inputs()
    loss, parts = net(*batch(v, pixels))
    valid = torch.ones(3, 12, dtype=torch.bool)
    logits = net.logits(v, valid)
    mask = (logits[..., 1] > logits[..., 0]).double()
    x = net.standardised(v, valid)
    rebuilt, picture = net.rebuild(x, mask, GRID, SIZE)
    feature, image = (((a - b) ** 2).flatten(1).mean(1).sqrt().mean() for a, b in ((rebuilt, x), (picture, pixels)))
    share = mask.mean()
    expected = feature + image + .1 * max(share, .6) - .1 * min(share, .1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert parts == pytest.approx({"feature": feature.item(), "image": image.item(), "kept": share.item(),
                                   "pressure": .1 * max(share, .6) - .1 * min(share, .1)})


def test_pictures_of_different_shapes_are_rebuilt_each_on_its_own_grid():
    """A batch of mixed shapes has the mean of the errors that each picture has alone; padding counts for nothing."""
    net, g = model().eval(), torch.Generator().manual_seed(3)
    grids, sizes = [(3, 4), (2, 2), (3, 4), (4, 3)], [(18, 24), (12, 12), (18, 24), (24, 18)]
    x = torch.randn(4, 12, 16, generator=g).double()
    mask = torch.rand(4, 12, generator=g).round().double()
    pixels = [torch.rand(3, *size, generator=g).double() for size in sizes]
    alone = [net.errors(x[b:b + 1, :h * w], mask[b:b + 1, :h * w], [pixels[b]], [(h, w)])
             for b, (h, w) in enumerate(grids)]
    feature, image = net.errors(x, mask, pixels, grids)
    assert torch.allclose(feature, torch.cat([f for f, _ in alone]))
    assert torch.allclose(image, torch.cat([i for _, i in alone]))
    other = x.clone()
    other[1, 4:] = 99
    assert torch.equal(feature, net.errors(other, mask, pixels, grids)[0])
    assert not torch.equal(feature, net.errors(x.roll(1, 2), mask, pixels, grids)[0])


def test_the_rate_warms_up_and_is_three_cosines():
    rates = [rs.stage_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50) and max(rates[50:60]) > .98 and min(rates) >= 0
    for start, end in ((50, 600), (600, 800), (800, 1000)):
        stage = rates[start:end]
        assert stage == sorted(stage, reverse=True) and stage[-1] < 1e-3
    assert rates[600] == rates[800] == 1 and rates[300] == pytest.approx(.5, abs=.01)
    assert rs.stage_rate(0, 1) > 0


def test_select_orders_by_logits_and_the_hard_mask_is_where_they_are_positive():
    net, (v, _) = model().eval(), inputs()
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[2, 9:] = False
    scores = net.scores(v, valid)
    for k in (1, 5, 9):
        for b, keep in enumerate(net.select(v, valid, k)):
            assert len(keep) == k and (keep[1:] > keep[:-1]).all() and valid[b, keep].all()
            rest = torch.tensor([i for i in range(12) if valid[b, i] and i not in keep.tolist()], dtype=torch.int64)
            assert not len(rest) or scores[b, keep].min() >= scores[b, rest].max()
    for b, keep in enumerate(net.select(v, valid)):
        positive = [i for i in range(12) if valid[b, i] and scores[b, i] > 0]
        assert keep.tolist() == (positive or [int(scores[b].masked_fill(~valid[b], -9).argmax())])
    alone = net.select(v[2:, :9], valid[2:, :9], 4)[0]
    assert torch.equal(alone, net.select(v, valid, 4)[2])


def test_of_two_copies_one_is_dropped():
    """The method's point: a token that another one tells is not worth its place."""
    torch.manual_seed(0)
    net = rs.ReconSelector(replace(SMALL, width=16, grid=2, p=.5, q=.5, alpha1=1., alpha2=1., image_layers=1)).train()
    optim, g = torch.optim.Adam(net.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    place = torch.randn(4, 16, generator=g)            # as in an encoder's features: two copies stand apart
    for _ in range(250):
        a, b = (torch.randn(64, 1, 16, generator=g) for _ in range(2))
        v = torch.cat([a, a, b, b], 1) + place         # tokens 0 and 1 are copies, so are 2 and 3
        loss, _ = net(*batch(v, torch.zeros(64, 3, 4, 4), (2, 2)), g)
        optim.zero_grad()
        loss.backward()
        optim.step()
    net.eval()
    keep = net.select(v, torch.ones(64, 4, dtype=torch.bool), 2)
    assert sum(len({0, 1} & set(k.tolist())) == 1 for k in keep) >= 58


def test_twins_agree():
    """The baselines' idiom stands in autoselect.py too."""
    s = torch.randn(3, 10)
    net = model().eval()
    net.scores = lambda v, valid: s
    ours = net.select(torch.zeros(3, 10, 16), torch.ones(3, 10, dtype=torch.bool), 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, autoselect.hard_topk(s, 4)))


@pytest.mark.parametrize("bad", [dict(p=.1, q=.6), dict(alpha1=-1.), dict(alpha2=-.1), dict(p=1.2), dict(q=-.1),
                                 dict(estimator="hard"), dict(regulariser="none")])
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + "="):
        model(**bad)


def test_budgets_that_cannot_work():
    net, (v, _) = model().eval(), inputs()
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"keep={k} does not fit 12"):
            net.select(v, torch.ones(3, 12, dtype=torch.bool), k)


def test_a_budget_is_spread_over_crops_by_their_tokens():
    assert rs.per_crop(160, [576] * 5) == [32] * 5
    assert rs.per_crop(7, [4, 4, 4]) == [3, 2, 2] and rs.per_crop(12, [4, 4, 4]) == [4, 4, 4]
    assert rs.per_crop(3, [100, 1, 1]) == [1, 1, 1] and rs.per_crop(50, [98, 1, 1]) == [48, 1, 1]
    for k in range(3, 30):
        share = rs.per_crop(k, [17, 3, 9])
        assert sum(share) == k and all(1 <= x <= n for x, n in zip(share, [17, 3, 9]))
    for k in (2, 30):
        with pytest.raises(ValueError, match=f"keep={k} of crops"):
            rs.per_crop(k, [17, 3, 9])
    net, (v, _) = model().eval(), inputs()
    valid = torch.ones(3, 12, dtype=torch.bool)
    for b, (keep, k) in enumerate(zip(net.select(v, valid, [2, 12, 5]), (2, 12, 5))):
        assert torch.equal(keep, net.select(v, valid, k)[b])
