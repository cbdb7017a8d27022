"""recon_selector.py does what its equations say."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import autoselect
import recon_selector as rs
from common import Units

SMALL = rs.Config(width=16, patch=6, channels=4, grid=3, layers=1, rebuild_layers=2, image_layers=1,
                  heads=2, alpha1=0.1, alpha2=0.1)
GRID = (3, 4)
SIZE = (18, 24)


def model(**changes):
    torch.manual_seed(0)
    return rs.ReconSelector(replace(SMALL, **changes)).double()


def inputs(b=3, patches=(), seed=1):
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(b, 12, *patches, 16, generator=g, dtype=torch.float64) * 2 + 1
    return v, torch.rand(b, 3, *SIZE, generator=g, dtype=torch.float64)


def units_of(v, grid=GRID, picture=None):
    """Tokens (B, N, ...) as the Units that read() gives; picture: of which one each row is."""
    image_of = torch.arange(len(v)).repeat_interleave(v.shape[1])
    picture = image_of if picture is None else torch.tensor(picture)[image_of]
    readings = {"picture": picture, "crop": image_of}
    return Units(v.flatten(0, 1), image_of, [grid] * len(v), readings=readings)


class Step:
    """Of train.Step what this method asks for. parts: numbers of each part's pictures."""

    def __init__(self, rows, parts=((0,),), part=0, seed=0):
        self.rows, self.parts, self.part, self.seed = rows, parts, part, seed
        self.shares = len(parts)

    def of_part(self, part):
        return Step(self.rows, self.parts, part, self.seed)

    def sum(self, x):
        return x

    def autocast(self):
        return nullcontext()

    def generators(self, owner):
        turns = [owner[:row].count(picture) for row, picture in enumerate(owner)]
        numbers = [self.parts[self.part][picture] for picture in owner]
        return [torch.Generator().manual_seed(1000 * self.seed + 10 * number + turn)
                for number, turn in zip(numbers, turns)]


def seeing(pixels):
    """A VLM of which loss() asks nothing but the pixels."""
    return SimpleNamespace(adapter=SimpleNamespace(pixels=lambda pictures: list(pixels)))


def objective(net, v, pixels, grid=GRID, seed=0):
    """loss() of a step in one part, as train.py calls it: (loss, what is logged)."""
    units = units_of(v, grid)
    step = Step(len(v), [range(len(v))], seed=seed)
    if net.training:
        net.observe(None, [(None, units)], step)
    return net.loss(seeing(pixels), SimpleNamespace(pictures=None), units, step)


def everywhere(v):
    return torch.ones(v.shape[:2], dtype=torch.bool)


# ------------------------------------------------------------------------------------ equations


def test_hard_mask_is_hard_forwards_and_soft_backwards():
    logits = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 5, 2).double()
    mask = rs.hard_mask(logits, noise, 0.7)
    noisy = logits + noise
    assert torch.equal(mask.detach(), (noisy[..., 1] > noisy[..., 0]).double())
    weight = torch.randn_like(mask)
    soft = (noisy / 0.7).softmax(-1)[..., 1]
    assert torch.allclose(*(torch.autograd.grad((x * weight).sum(), logits, retain_graph=True)[0]
                            for x in (mask, soft)))


def test_gumbel_noise_draws_from_the_softmax():
    """What sets Eq. 5 apart from the straight-through softmax: a token is kept as often as its
    logits say."""
    net = model().train()
    logits = torch.tensor([0.2, 1.4]).double()
    net.selector.forward = lambda x, valid: logits.expand(*x.shape[:2], 2)
    net.cfg = replace(net.cfg, regulariser="plain")
    kept = [objective(net, *inputs(8), seed=seed)[1]["kept"] for seed in range(60)]
    share = sum(kept) / 60
    expected = logits.softmax(0)[1].item()
    assert abs(share - expected) < 3 * (expected * (1 - expected) / (60 * 96)) ** 0.5
    net.cfg = replace(net.cfg, estimator="softmax")
    assert objective(net, *inputs(8))[1]["kept"] == 1


def test_the_dead_zone_is_flat_and_pulls_from_both_sides():
    share = torch.tensor([0.0, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0]).double().requires_grad_()
    value = rs.dead_zone(share, 0.6, 0.1, 0.1, 0.2)
    by_hand = torch.tensor([0.06, 0.05, 0.04, 0.04, 0.04, 0.06, 0.08]).double()
    assert torch.allclose(value, by_hand)
    slope = torch.autograd.grad(value.sum(), share)[0]
    by_hand = torch.tensor([-0.2, -0.2, 0, 0.1, 0.1]).double()
    assert torch.allclose(slope[[0, 1, 3, 5, 6]], by_hand)
    away_from_the_corners = torch.tensor([0.2, 0.9]).double().requires_grad_()
    assert gradcheck(lambda x: rs.dead_zone(x, 0.6, 0.1, 0.1, 0.2), away_from_the_corners)


def test_kept_share_leaves_padding_out():
    mask = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 1]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert rs.kept_share(mask, valid) == pytest.approx((0.75 + 0.5) / 2)


def test_put_masked_replaces_exactly_what_is_dropped():
    v, masked = torch.randn(2, 4, 3), torch.randn(3)
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 1]])
    out = rs.put_masked(v, mask, masked)
    assert torch.equal(out[mask > 0], v[mask > 0])
    assert torch.equal(out[mask == 0], masked.expand(3, 3))


def test_dropped_content_does_not_leak():
    """Another content of a dropped token changes nothing downstream while the mask stays."""
    net = model().eval()
    v, _ = inputs()
    mask = (torch.arange(12) % 3 > 0).double().expand(3, 12)
    other = torch.where(mask[..., None] > 0, v, torch.randn_like(v) * 100)
    for a, b in zip(net.rebuild(v, mask, GRID, SIZE), net.rebuild(other, mask, GRID, SIZE)):
        assert torch.equal(a, b)
    kept = torch.where(mask[..., None] > 0, torch.randn_like(v), v)
    features = net.rebuild(v, mask, GRID, SIZE)[0]
    assert not torch.allclose(features, net.rebuild(kept, mask, GRID, SIZE)[0])


# ------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("grid, size", [((12, 12), (144, 144)), ((9, 16), (108, 192)),
                                        ((3, 4), (31, 50)), ((1, 1), (5, 7))])
def test_the_picture_comes_back_in_its_own_size(grid, size):
    net = model()
    x = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    assert net.image(x, grid, size).shape == (2, 3, *size)
    assert net.features(x, grid).shape == x.shape


@pytest.mark.parametrize("changes", [{}, dict(estimator="softmax"), dict(regulariser="plain"),
                                     dict(keep_high=0.3, keep_low=0.2)])
@pytest.mark.parametrize("patches", [(), (4,)])
def test_every_parameter_learns_through_the_hard_mask(changes, patches):
    net = model(**changes).train()
    loss, parts = objective(net, *inputs(patches=patches))
    loss.backward()
    assert 0 < parts["kept"] < 1
    idle = [name for name, p in net.named_parameters()
            if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def test_the_loss_is_the_printed_sum():
    net = model(estimator="softmax").eval()
    v, pixels = inputs()
    loss, parts = objective(net, v, pixels)
    x = net.standardised(v, everywhere(v))
    logits = net.selector(x, everywhere(v))
    mask = (logits[..., 1] > logits[..., 0]).double()
    rebuilt, picture = net.rebuild(x, mask, GRID, SIZE)
    feature = ((rebuilt - x) ** 2).flatten(1).mean(1).sqrt().mean()
    image = ((picture - pixels) ** 2).flatten(1).mean(1).sqrt().mean()
    share = mask.mean()
    pressure = 0.1 * max(share, 0.6) - 0.1 * min(share, 0.1)
    assert loss.item() == pytest.approx((feature + image + pressure).item(), rel=1e-9)
    assert parts == pytest.approx({"feature": feature.item(), "image": image.item(),
                                   "kept": share.item(), "pressure": pressure})


def test_pictures_of_different_shapes_are_rebuilt_each_on_its_own_grid():
    """A batch of mixed shapes has the mean of the errors that each picture has alone; padding
    counts for nothing."""
    net = model().eval()
    g = torch.Generator().manual_seed(3)
    grids = [(3, 4), (2, 2), (3, 4), (4, 3)]
    sizes = [(18, 24), (12, 12), (18, 24), (24, 18)]
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
    assert rates[0] == pytest.approx(1 / 50) and max(rates[50:60]) > 0.98 and min(rates) >= 0
    for start, end in ((50, 600), (600, 800), (800, 1000)):
        stage = rates[start:end]
        assert stage == sorted(stage, reverse=True) and stage[-1] < 1e-3
    assert rates[600] == rates[800] == 1 and rates[300] == pytest.approx(0.5, abs=0.01)
    assert rs.stage_rate(0, 1) > 0
    assert rs.ReconSelector.learning_rate(3e-4, 300, 1000) == 3e-4 * rates[300]


# ------------------------------------------------------------------------------------ a step


def test_statistics_of_parts_are_those_of_the_whole_as_batchnorm_keeps_them():
    x = torch.randn(60, 16) * 3 + 5
    norm = nn.BatchNorm1d(16, affine=False, momentum=None).train()
    nets = [rs.ReconSelector(SMALL) for _ in "ab"]
    for scale in (1, 2):
        norm(scale * x)
        for net, sizes in zip(nets, ((60,), (20, 40))):
            parts = [(None, units_of(scale * part[None], (1, len(part)), [0]))
                     for part in x.split(sizes)]
            net.observe(None, parts, Step(len(parts), [[0]] * len(parts)))
    for net in nets:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.allclose(getattr(net.norm, name), getattr(norm, name), rtol=1e-5)
    nets[0].norm.load_state_dict(norm.state_dict())
    own = nets[0].standardised(x[None], everywhere(x[None]))
    assert torch.equal(own[0], norm.eval()(x))


def gradients(net, v, pixels, sizes):
    """Of a step whose pictures come in parts of these sizes; and what the loss adds up to."""
    net = net.train()
    rows = torch.arange(len(v)).split(sizes)
    step = Step(len(v), [part.tolist() for part in rows])
    parts = [(SimpleNamespace(pictures=part), units_of(v[part])) for part in rows]
    vlm = SimpleNamespace(adapter=SimpleNamespace(pixels=lambda part: list(pixels[part])))
    net.observe(vlm, parts, step)
    total = 0.0
    for number, (batch, units) in enumerate(parts):
        loss, log = net.loss(vlm, batch, units, step.of_part(number))
        loss.backward()
        total += loss.item()
    return total, log, torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("changes", [
    {}, dict(keep_high=0.5, keep_low=0.5), dict(regulariser="plain"), dict(estimator="softmax")])
def test_the_dead_zone_bends_at_the_share_of_the_whole_step(changes):
    """Parts see other shares than the step. Its gradient is that of the step in one part."""
    strong = dict(keep_high=0.45, keep_low=0.1, alpha1=1.0, alpha2=1.0)
    v, pixels = inputs(8, seed=4)
    whole = gradients(model(**{**strong, **changes}), v, pixels, 8)
    for sizes in (4, 2, [5, 2, 1]):
        parts = gradients(model(**{**strong, **changes}), v, pixels, sizes)
        assert parts[0] == pytest.approx(whole[0], rel=1e-9)
        assert torch.allclose(parts[2], whole[2], rtol=1e-7, atol=1e-10)
        if changes.get("regulariser") != "plain":
            assert parts[1]["kept"] == pytest.approx(whole[1]["kept"])


def test_the_share_of_a_part_alone_would_give_another_gradient():
    """What the test above would miss, were all parts on one side of the bend."""
    v, pixels = inputs(8, seed=4)
    net = model(keep_high=0.45, alpha1=1.0, alpha2=1.0)
    net.foresee_share = lambda parts, step: None
    apart = gradients(net, v, pixels, 2)[2]
    whole = gradients(model(keep_high=0.45, alpha1=1.0, alpha2=1.0), v, pixels, 8)[2]
    assert not torch.allclose(apart, whole, rtol=1e-3, atol=1e-5)


def test_crops_draw_noise_of_their_own():
    """Two crops of a picture with the same content, and the same picture alone."""
    net = model().eval()
    v, pixels = inputs(1)
    pair = units_of(v.expand(2, -1, -1), picture=[0, 0])
    step = Step(2, [[7]])
    noise = step.generators(rs.numbers(pair, "picture"))
    masks = net(*pair.pad(), [pixels[0]] * 2, pair.grid, noise)[0]
    assert not torch.equal(masks[0], masks[1])
    alone = units_of(v, picture=[0])
    noise = step.generators(rs.numbers(alone, "picture"))
    mask = net(*alone.pad(), [pixels[0]], alone.grid, noise)[0]
    assert torch.equal(mask[0], masks[0])


def test_a_crop_that_is_padding_from_edge_to_edge_counts_for_nothing():
    """Two pictures, the second crop of the first without a token: none of it is trained on, and
    none of it chosen."""
    net = model().train()
    v, pixels = inputs(4)
    whole = units_of(v)
    there = torch.ones(48, dtype=torch.bool)
    there[12:24] = False
    pictures = replace(whole, image_of=whole.image_of // 2, grid=[(6, 4)] * 2, views=[2, 2],
                       has_token=there, readings={})
    crops = net.by_crop(pictures)
    assert rs.numbers(crops, "picture") == [0, 1, 1] and rs.numbers(crops, "crop") == [0, 2, 3]
    step = Step(3, [[0, 1]])
    net.observe(None, [(None, crops)], step)
    loss, parts = net.loss(seeing(pixels), SimpleNamespace(pictures=None), crops, step)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(crops.feats, v[[0, 2, 3]].flatten(0, 1))
    alone = net.eval()(*crops.pad(), list(pixels[[0, 2, 3]]), crops.grid,
                       step.generators([0, 1, 1]))
    assert parts["image"] == pytest.approx(alone[2].mean().item())
    assert net.scores(pictures, None).isfinite().all()
    for keep in (5, None):
        first, second = net.select(pictures, None, keep)
        assert len(first) and first.max() < 12 <= second.max()
        assert keep is None or len(first) == len(second) == keep


def test_one_token_is_enough_to_train_on_and_to_choose():
    net = model().train()
    v, pixels = inputs(1)
    loss, _ = objective(net, v[:, :1], pixels[:, :, :6, :6], (1, 1))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    assert net.norm.running_var.eq(0).all()                    # of one token, not NaN
    units = units_of(v[:, :1], (1, 1))
    for keep in (1, None):
        assert [k.tolist() for k in net.eval().select(units, None, keep)] == [[0]]
    loss, _ = objective(net, v, pixels)                        # and a larger picture after it
    assert loss.isfinite()


# ------------------------------------------------------------------------------------ selection


def test_select_orders_by_logits_and_the_hard_mask_is_where_they_are_positive():
    net = model().eval()
    v, _ = inputs()
    valid = everywhere(v)
    valid[2, 9:] = False
    scores = net.token_scores(v, valid)
    for k in (1, 5, 9):
        for b, keep in enumerate(net.best(v, valid, k)):
            assert len(keep) == k and (keep[1:] > keep[:-1]).all() and valid[b, keep].all()
            rest = [i for i in range(12) if valid[b, i] and i not in keep.tolist()]
            assert not rest or scores[b, keep].min() >= scores[b, rest].max()
    for b, keep in enumerate(net.best(v, valid)):
        positive = [i for i in range(12) if valid[b, i] and scores[b, i] > 0]
        best = int(scores[b].masked_fill(~valid[b], -9).argmax())
        assert keep.tolist() == (positive or [best])
    alone = net.best(v[2:, :9], valid[2:, :9], 4)[0]
    assert torch.equal(alone, net.best(v, valid, 4)[2])


def test_select_and_scores_of_units():
    net = model().eval()
    v, _ = inputs()
    units = units_of(v)
    assert torch.equal(net.scores(units, None), net.token_scores(v, everywhere(v)).flatten())
    for keep in (5, [2, 12, 5], None):
        for a, b in zip(net.select(units, None, keep), net.best(v, everywhere(v), keep)):
            assert torch.equal(a, b)


def test_of_two_copies_one_is_dropped():
    """The method's point: a token that another one tells is not worth its place."""
    torch.manual_seed(0)
    net = rs.ReconSelector(replace(SMALL, grid=2, keep_high=0.5, keep_low=0.5, alpha1=1.0,
                                   alpha2=1.0)).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    place = torch.randn(4, 16, generator=g)    # as in an encoder's features: two copies stand apart
    for step in range(250):
        a, b = (torch.randn(64, 1, 16, generator=g) for _ in range(2))
        v = torch.cat([a, a, b, b], 1) + place          # tokens 0 and 1 are copies, so are 2 and 3
        loss, _ = objective(net, v, torch.zeros(64, 3, 4, 4), (2, 2), seed=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    keep = net.best(v, everywhere(v), 2)
    assert sum(len({0, 1} & set(k.tolist())) == 1 for k in keep) >= 58


def test_twins_agree():
    """The idiom of choosing the K best stands in autoselect.py too."""
    s = torch.randn(3, 10)
    net = model().eval()
    net.token_scores = lambda v, valid: s
    ours = net.best(torch.zeros(3, 10, 16), torch.ones(3, 10, dtype=torch.bool), 4)
    assert all(torch.equal(a, b) for a, b in zip(ours, autoselect.hard_topk(s, 4)))


@pytest.mark.parametrize("bad", [
    dict(keep_high=0.1, keep_low=0.6), dict(alpha1=-1.0), dict(alpha2=-0.1), dict(keep_high=1.2),
    dict(keep_low=-0.1), dict(estimator="hard"), dict(regulariser="none"),
    dict(select_after_layer=-1)])
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) + "="):
        model(**bad)


def test_budgets_that_cannot_work():
    net = model().eval()
    v, _ = inputs()
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"keep={k} does not fit 12"):
            net.best(v, everywhere(v), k)
        with pytest.raises(ValueError, match=f"keep={k} .*12"):
            net.select(units_of(v), None, k)


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
    assert rs.per_crop(7, [16, 0, 4]) == [6, 0, 1] and rs.per_crop(2, [0, 9, 1]) == [0, 1, 1]
    with pytest.raises(ValueError, match="keep=1 of crops .* expected 2 to 10"):
        rs.per_crop(1, [0, 9, 1])
    net = model().eval()
    v, _ = inputs()
    for b, (keep, k) in enumerate(zip(net.best(v, everywhere(v), [2, 12, 5]), (2, 12, 5))):
        assert torch.equal(keep, net.best(v, everywhere(v), k)[b])


# ------------------------------------------------------------------------------------ contract


def test_what_it_trains_on_and_depends_on_follows_from_where_it_selects():
    before, inside = model(), model(select_after_layer=2)
    assert before.rows == "picture" and not before.reads_language
    assert inside.rows == "question twice" and inside.reads_language
    assert list(before.ways([], [4], None)) == ["", " mask"]
    ways = inside.ways([], [4], None)
    assert list(ways) == ["", " mask", " asked twice", " random inside"]
    assert all(way.ask_twice and way.stages for way in ways.values())
    assert [list(way.stages(4, [12])) for way in ways.values()] == [[2], [2], [], [2]]
    assert [way.budgets for way in ways.values()] == [None, ("mask",), ("all",), None]
    for net in (before, inside):
        with pytest.raises(ValueError, match="gated"):
            net.ways(["gated"], [4], None)


@pytest.mark.parametrize("layer, width", [(0, 128), (2, 96)])
def test_sizes_follow_from_the_vlm(layer, width):
    vlm = SimpleNamespace(width=128, dim=96, unit_side=28, fingerprint=lambda: {"vision_side": 0})
    cfg = rs.Config.of(vlm, select_after_layer=layer, heads=4)
    assert (cfg.width, cfg.patch, cfg.channels, cfg.grid) == (width, 28, 16, 24)
    vlm.width, vlm.fingerprint = 1024, lambda: {"vision_side": 12}
    assert (rs.Config.of(vlm).channels, rs.Config.of(vlm).grid) == (64, 12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("keep", [4, None])
def test_features_that_are_not_finite_are_refused_by_row(bad, keep):
    net = model()
    v, _ = inputs()
    before = net.select(units_of(v), None, keep)
    v[1, 3, 5] = bad
    with pytest.raises(ValueError, match="^row 1 has scores that are no finite numbers"):
        net.select(units_of(v), None, keep)
    for row in (0, 2):
        assert torch.equal(net.select(units_of(v[row:row + 1]), None, keep)[0], before[row])


def test_a_mask_that_keeps_nothing_keeps_the_best_one():
    net = model().eval()
    v, _ = inputs()
    valid = everywhere(v)
    valid[2] = False
    with torch.no_grad():
        net.selector.head.bias += torch.tensor([50.0, 0.0]).double()       # drop, whatever it is
    best = net.token_scores(v, valid).argmax(1).tolist()
    assert (net.token_scores(v, valid) < 0).all()
    assert [keep.tolist() for keep in net.best(v, valid)] == [[best[0]], [best[1]], []]


def test_what_is_learned_as_a_vector_starts_small():
    net = model(width=64, grid=8)
    assert net.features.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.masked.std().item() == pytest.approx(0.02, rel=0.4)


def test_positions_are_resized_between_their_neighbours():
    net = model()
    net.features.blocks, net.features.out = nn.ModuleList(), nn.Identity()
    ramp = torch.arange(3.0).double().expand(1, 16, 3, 3)
    net.features.position = nn.Parameter(ramp)
    found = net.features(torch.zeros(1, 12, 16).double(), (2, 6))[0, :, 0]
    assert torch.allclose(found, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2] * 2).double())
