"""AutoSelect, one sentence of the paper, or of our docstring, per test; equations as in
autoselect.py."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoselect import (
    AutoSelect,
    Config,
    Denoiser,
    Scorer,
    hard_topk,
    scale_gate,
    soft_topk,
    temperature,
    vp_gate,
    zscore,
)
from common import Units

TINY = {"width": 16, "layers": 1, "heads": 2}
ALONE = SimpleNamespace(sum=lambda x: x)  # of train.Step: one process


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def padding(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def units_of(v, valid=None):
    """Tokens (B, N, ...) as Units, for what takes these."""
    valid = torch.ones(v.shape[:2], dtype=torch.bool) if valid is None else valid
    return Units(v[valid], valid.nonzero()[:, 0], [(1, n) for n in valid.sum(1).tolist()])


def observe(model, v, valid=None):
    model.observe(None, [(None, units_of(v, valid))], ALONE)


def select(model, v, valid=None, keep=3):
    return model.select(units_of(v, valid), None, keep)


def shake(module):
    """Zero-initialised layers hide mistakes: give every parameter a value, as training would."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


# ---- Eq. (2): hard top-K


def test_hard_topk_by_hand():
    """The K largest scores are kept and stay in the order of the image."""
    s = torch.tensor([[0.1, 0.9, 0.3, 0.8], [4.0, 3.0, 2.0, 1.0]])
    assert [i.tolist() for i in hard_topk(s, 2)] == [[1, 3], [0, 1]]
    assert [i.tolist() for i in hard_topk(s, [1, 3])] == [[1], [0, 1, 2]]
    assert [i.tolist() for i in hard_topk(s, torch.tensor([4, 1]))] == [[0, 1, 2, 3], [0]]


def test_hard_topk_gives_exactly_k_distinct_ascending_tokens():
    s = torch.randn(5, 50).round(decimals=0)  # many ties
    for k, valid in itertools.product((1, 7, 20), (None, padding(50, 20, 30, 40, 33))):
        for b, kept in enumerate(hard_topk(s, k, valid)):
            assert kept.dtype == torch.int64 and len(kept) == k
            assert (kept.diff() > 0).all()
            usable = torch.ones(50, dtype=torch.bool) if valid is None else valid[b]
            assert usable[kept].all()
            rest = usable.clone()
            rest[kept] = False
            assert not rest.any() or s[b, kept].min() >= s[b, rest].max()


def test_hard_topk_of_equals_the_first_wins():
    assert hard_topk(torch.zeros(1, 600), 5)[0].tolist() == [0, 1, 2, 3, 4]
    assert hard_topk(torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]), 3)[0].tolist() == [0, 1, 3]


def test_hard_topk_error_names_both_numbers():
    s = torch.randn(2, 6)
    for k in (0, -1, 7):
        with pytest.raises(ValueError, match=f"keep={k} .* 6 "):
            hard_topk(s, k)
    with pytest.raises(ValueError, match="keep=5 .* 4 "):
        hard_topk(s, 5, padding(6, 4))
    with pytest.raises(ValueError, match="3 budgets for 2 images"):
        hard_topk(s, [1, 2, 3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_row(bad):
    s, valid = torch.randn(3, 6), padding(6, 4, 6)
    s[1, 5] = bad                                    # padding: nobody looks at it
    kept = [i.tolist() for i in hard_topk(s, 2, valid)]
    s[1, 5] = 0
    assert [i.tolist() for i in hard_topk(s, 2, valid)] == kept
    s[2, 0] = bad
    with pytest.raises(ValueError, match="^row 2 has scores that are no finite numbers"):
        hard_topk(s, 2, valid)
    with pytest.raises(ValueError, match="^row 0 has scores"):
        hard_topk(s[2:], 2)


def test_features_that_are_not_finite_are_refused_and_change_no_other_row():
    model = shake(AutoSelect(Config(**TINY))).eval()
    v, valid = torch.randn(3, 9, 16), padding(9, 5, 9)
    before = select(model, v, valid)
    v[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="^row 1 has scores that are no finite numbers"):
        select(model, v, valid)
    for row in (0, 2):
        alone, here = v[row:row + 1], valid[row:row + 1]
        assert torch.equal(select(model, alone, here)[0], before[row])


# ---- Eq. (3): scorer


def test_scorer_size_is_that_of_the_paper_within_a_block():
    """AutoSelect adds 84M trainable parameters: 75.6 M at 5 + 1 blocks, 88.2 M at 6 + 1."""
    with torch.device("meta"):
        for layers, millions in ((5, 75.6), (6, 88.2)):
            n = sum(p.numel() for p in AutoSelect(Config(layers=layers)).parameters())
            assert round(n / 1e6, 1) == millions


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scorer_does_not_read_padding(mode):
    """A score depends on the visual tokens of its own image only."""
    scorer = getattr(shake(Scorer(16, 2, 2)), mode)()
    v = torch.randn(2, 9, 16)
    with torch.set_grad_enabled(mode == "train"):
        padded = scorer(v, padding(9, 5))
        other = v.clone()
        other[1, 5:] = 100 * torch.randn(16)
        assert torch.allclose(padded[1, :5], scorer(other, padding(9, 5))[1, :5], atol=1e-4)
        assert torch.allclose(padded[1, :5], scorer(v[1:, :5])[0], atol=1e-4)
        assert not torch.allclose(
            padded[1, :5], scorer(v)[1, :5], atol=1e-2
        )  # without mask it would


def test_scorer_blocks_start_different():
    first, second = Scorer(16, 2, 2).blocks
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


# ---- Eq. (4): z-score and soft top-K


def test_zscore_normalises_each_image():
    """Raw scores are z-score normalised per image; padding stays out of it."""
    s, valid = torch.randn(3, 40) * 7 + 5, padding(40, 11, 25)
    z = zscore(s, valid)
    for b in range(3):
        own = z[b, valid[b]]
        assert own.mean().abs() < 1e-5
        assert abs(own.std(correction=0) - 1) < 1e-4
        assert torch.allclose(own, zscore(s[b : b + 1, valid[b]])[0], atol=1e-5)
        assert (z[b, ~valid[b]] == 0).all()
    assert torch.allclose(zscore(s), zscore(1000 * s - 3), atol=1e-3)


def test_zscore_of_equal_scores_is_zero_with_finite_gradient():
    s = torch.full((1, 6), 3.0, requires_grad=True)
    z = zscore(s)
    z[0, 0].backward()
    assert (z == 0).all() and s.grad.isfinite().all()


@pytest.mark.parametrize("tau", [5.0, 1.0, 0.05, 1e-3])
@pytest.mark.parametrize("k", [1e-3, 0.5, 1, 64, 191.5, 575, 576])
def test_soft_topk_sums_to_k(k, tau):
    """The budget is fixed: the a_i of an image sum to K at every temperature."""
    a = soft_topk(torch.randn(4, 576, dtype=torch.float64), k, tau)
    assert torch.allclose(
        a.sum(1), torch.full((4,), float(k), dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    assert ((0 <= a) & (a <= 1)).all()


@pytest.mark.parametrize("valid", [None, padding(7, 5, 6)])
def test_soft_topk_gradcheck(valid):
    """The gradient is exact in z and in K."""
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([2.0, 1.3, 4.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, k: soft_topk(z, k, 0.7, valid), (z, k))


def test_soft_topk_gradient_is_the_implicit_formula():
    """da_i/dz_j = g_i/tau (delta_ij - g_j / sum g) and da_i/dK = g_i / sum g, written out as
    matrices."""
    z, k, tau = (
        torch.randn(1, 9, dtype=torch.float64),
        torch.tensor([3.0], dtype=torch.float64),
        0.3,
    )
    jz, jk = torch.autograd.functional.jacobian(lambda z, k: soft_topk(z, k, tau), (z, k))
    a = soft_topk(z, k, tau)[0]
    g = a * (1 - a)
    assert torch.allclose(jz[0, :, 0], (torch.diag(g) - g.outer(g) / g.sum()) / tau, atol=1e-10)
    assert torch.allclose(jk[0, :, 0], g / g.sum(), atol=1e-10)


def test_soft_topk_tends_to_hard_topk():
    """As tau falls the scores collapse to the binary mask of inference; at large tau they are
    diffuse."""
    z = torch.randn(4, 100)
    hard = torch.stack([torch.zeros(100).index_fill(0, i, 1) for i in hard_topk(z, 20)])
    gap = [(soft_topk(z, 20, tau) - hard).abs().max().item() for tau in (100, 1, 0.1, 1e-2, 1e-6)]
    assert gap == sorted(gap, reverse=True)
    assert gap[0] > 0.75 and gap[-1] < 1e-3


def test_soft_topk_shares_among_ties():
    z = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    assert torch.allclose(
        soft_topk(z, 2, 1e-3), torch.tensor([[2 / 3, 2 / 3, 2 / 3, 0]]), atol=1e-5
    )
    assert torch.allclose(soft_topk(torch.zeros(1, 8), 2, 0.05), torch.full((1, 8), 0.25))


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e30])
@pytest.mark.parametrize("k", [1e-6, 2, 5])
def test_soft_topk_saturates_without_nan(k, scale):
    """K = N, K near 0 and huge z / tau give finite values and finite gradients."""
    z = (torch.randn(2, 5) * scale).requires_grad_()
    k = torch.full((2,), float(k), requires_grad=True)
    a = soft_topk(z, k, 1e-3)
    (a * torch.randn(2, 5)).sum().backward()
    assert a.isfinite().all() and z.grad.isfinite().all() and k.grad.isfinite().all()
    if k[0] == 5:
        assert (a == 1).all() and (z.grad == 0).all() and (k.grad == 0).all()
    if scale > 1:
        assert (z.grad.abs() < 1e-9).all()


def test_soft_topk_takes_half_precision():
    """bf16 scores are solved and returned in float32; their gradient comes back as bf16."""
    z = torch.randn(2, 576).bfloat16().requires_grad_()
    a = soft_topk(z, 64, 0.05)
    assert a.dtype == torch.float32 and torch.allclose(
        a.sum(1), torch.tensor([64.0, 64.0]), atol=1e-3
    )
    a[:, 0].sum().backward()
    assert z.grad.dtype == torch.bfloat16 and z.grad.isfinite().all()


def test_soft_topk_ignores_padding():
    """A padded batch gives each image what it gets alone; padding has a = 0 and no gradient."""
    z, valid = torch.randn(3, 30, dtype=torch.float64, requires_grad=True), padding(30, 12, 20)
    k = torch.tensor([4.0, 7.0, 20.0], dtype=torch.float64)
    a = soft_topk(z, k, 0.2, valid)
    for b in range(3):
        assert torch.allclose(
            a[b, valid[b]], soft_topk(z[b : b + 1, valid[b]], k[b : b + 1], 0.2)[0], atol=1e-12
        )
    (a * torch.randn_like(a)).sum().backward()
    assert (
        (a[~valid] == 0).all()
        and (z.grad[~valid] == 0).all()
        and (z.grad[:2][valid[:2]] != 0).all()
    )


def test_soft_topk_budget_that_does_not_fit():
    """A number raises and names both numbers; a tensor is clamped to each image's count."""
    z = torch.randn(2, 6)
    for k in (0, -2.5, 7):
        with pytest.raises(ValueError, match=f"keep={k} .* 6 "):
            soft_topk(z, k, 1.0)
    with pytest.raises(ValueError, match="keep=5 .* 4 "):
        soft_topk(z, 5, 1.0, padding(6, 4))
    with pytest.raises(ValueError, match="tau=0"):
        soft_topk(z, 2, 0)
    clamped = soft_topk(z, torch.tensor(5.0), 1.0, padding(6, 4))
    assert torch.allclose(clamped.sum(1), torch.tensor([5.0, 4.0]))
    assert (soft_topk(z, torch.zeros(2), 1.0) == 0).all()


def test_temperature_is_a_falling_cosine():
    """We anneal tau on a cosine schedule."""
    cfg = Config(tau_start=2.0, tau_end=0.1)
    taus = [temperature(t, 100, cfg) for t in range(121)]
    assert (
        taus[0] == 2.0 and math.isclose(taus[50], 1.05) and taus[100:] == [pytest.approx(0.1)] * 21
    )
    assert all(x > y for x, y in itertools.pairwise(taus[:101]))
    assert taus[0] - taus[10] < taus[10] - taus[20]  # flat at first: a cosine, not a line


# ---- Eq. (5): noise gate


def uneven(n=20000, c=8):
    """Tokens whose channels differ in mean and power, as those of a residual stream do."""
    std, mean = torch.logspace(-1.5, 1.5, c), torch.linspace(-20, 20, c)
    return torch.randn(1, n, c) * std + mean, mean, std


def drift(before, after):
    """Worst relative change of a channel's variance."""
    return (after.var((0, 1)) / before.var((0, 1)) - 1).abs().max().item()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_gate_preserves_variance(share):
    """The coefficients keep the feature scale stable, on features of unit and of uneven
    variance."""
    unit = torch.randn(1, 20000, 8)
    for v, mean, std in ((unit, torch.zeros(8), torch.ones(8)), uneven()):
        a = torch.full(v.shape[:2], share)
        out = vp_gate(v, a, torch.randn_like(v), mean, std)
        assert drift(v, out) < 0.08
        assert ((out.mean((0, 1)) - mean).abs() < 0.05 * std).all()


def test_gate_without_standardising_drifts():
    """Plain N(0, I) noise, the letter of Eq. 5, breaks the bound of the test above on uneven
    features."""
    v = uneven()[0]
    for share in (0.0, 0.25, 0.5):
        a = torch.full(v.shape[:2], share)
        assert drift(v, vp_gate(v, a, torch.randn_like(v), torch.zeros(8), torch.ones(8))) > 0.4
        assert drift(v, scale_gate(v, a)) > 0.4


def test_gate_ends():
    """At a = 1 the token is preserved, at a = 0 it is replaced by noise."""
    v, mean, std = uneven(n=100)
    e = torch.randn_like(v)
    kept, lost = (
        vp_gate(v, torch.ones(1, 100), e, mean, std),
        vp_gate(v, torch.zeros(1, 100), e, mean, std),
    )
    assert ((kept - v).abs() / std).max() < 1e-3
    assert ((lost - (e * std + mean)).abs() / std).max() < 1e-3
    half = vp_gate(v, torch.full((1, 100), 0.5), e, mean, std)
    assert torch.allclose((half - mean) / std, ((v - mean) / std + e) / 2**0.5, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gate_gradient_is_finite_at_the_ends(share):
    """The square root has an infinite slope at 0; ours stays finite, where the plain one is not."""
    v, e = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    a = torch.full((1, 3), share, requires_grad=True)
    vp_gate(v, a, e, torch.zeros(4), torch.ones(4)).sum().backward()
    assert a.grad.isfinite().all() and (a.grad != 0).all()
    b = a.detach().unsqueeze(-1).requires_grad_()
    (b.sqrt() * v + (1 - b).sqrt() * e).sum().backward()
    assert not b.grad.isfinite().all()


def test_scale_gate():
    """The natural alternative is direct scale gating, v~ = a v: shorter tokens of the same
    direction."""
    v, a = torch.randn(2, 5, 8), torch.rand(2, 5)
    out = scale_gate(v, a)
    assert torch.allclose(out.norm(dim=-1), a * v.norm(dim=-1))
    assert torch.allclose(torch.cosine_similarity(out, v, dim=-1), torch.ones(2, 5))
    model = AutoSelect(Config(**TINY, gate="scale", denoiser="none")).eval()
    got, a = model(v.repeat(1, 1, 2), None, 3, 0.02)
    assert torch.allclose(got, a.unsqueeze(-1) * v.repeat(1, 1, 2))


# ---- Section 3.4: denoiser


def touched(denoiser, j=2):
    """Which outputs change when token j does."""
    x = torch.randn(2, 6, 16)
    other = x.clone()
    other[:, j] += torch.randn(16)  # a constant would vanish in the LayerNorm
    with torch.no_grad():
        return (denoiser(x) - denoiser(other)).abs().amax((0, 2)) > 1e-6


def test_diagonal_denoiser_does_not_leak_and_global_does():
    """An identity attention mask restricts each token to attend only to itself."""
    assert touched(shake(Denoiser(16, 2, diagonal=True))).nonzero().tolist() == [[2]]
    assert touched(shake(Denoiser(16, 2, diagonal=False))).all()


def test_sequences_of_one_equal_the_identity_mask():
    """The short cut computes what the very same block computes under an identity mask, gradients
    included."""
    denoiser = shake(Denoiser(16, 2))
    x = torch.randn(2, 6, 16)
    masked = denoiser.block(x, src_mask=~torch.eye(6, dtype=torch.bool))
    assert torch.allclose(denoiser(x), masked, atol=1e-5)
    weights = list(denoiser.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(denoiser(x).square().mean(), weights),
        torch.autograd.grad(masked.square().mean(), weights),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_denoiser_starts_as_the_identity():
    x = torch.randn(2, 6, 16)
    for diagonal in (True, False):
        denoiser = Denoiser(16, 2, diagonal)
        assert torch.equal(denoiser(x), x)
        denoiser(x).square().sum().backward()
        assert denoiser.block.linear2.weight.grad.abs().max() > 0  # and can leave it


# ---- the whole: AutoSelect


def test_every_token_gets_a_gradient_where_hard_topk_gives_none():
    """Noise keeps all tokens in the graph: gradients reach the score of each, removal reaches
    none."""
    model, seen = AutoSelect(Config(**TINY)), []
    model.scorer.register_forward_hook(lambda module, args, s: (s.retain_grad(), seen.append(s))[0])
    v = torch.randn(2, 12, 16)
    out = model(v, None, 3, tau=0.5)[0]
    (out - v).square().mean().backward()
    assert seen[0].grad.shape == (2, 12) and (seen[0].grad.abs() > 1e-9).all()

    s = model.token_scores(v)
    kept = torch.stack([v[b, i] for b, i in enumerate(hard_topk(s, 3))])
    assert s.requires_grad and not kept.requires_grad


def test_another_scale_changes_no_share():
    """The scorer cannot undo tau by scaling its scores up."""
    model, v = AutoSelect(Config(**TINY, denoiser="none")), torch.randn(2, 12, 16)
    shares = model(v, None, 3, tau=0.3)[1]
    with torch.no_grad():
        model.scorer.head.weight.mul_(100)
    assert torch.allclose(model(v, None, 3, tau=0.3)[1], shares, atol=1e-3)


def test_select_is_the_hard_topk_of_the_scores():
    """At inference only the scorer and a hard top-K remain: no noise, no denoiser, the same
    answer twice."""
    model = shake(AutoSelect(Config(**TINY))).eval()
    v, valid = torch.randn(2, 9, 16), padding(9, 5)
    kept = select(model, v, valid)
    assert [len(i) for i in kept] == [3, 3]
    assert [len(i) for i in select(model, v, valid, [9, 2])] == [9, 2]
    wanted = hard_topk(model.token_scores(v, valid), 3, valid)
    for first, again, want in zip(kept, select(model, v, valid), wanted, strict=True):
        assert first.tolist() == again.tolist() == want.tolist()
    model.denoiser = None
    assert [i.tolist() for i in select(model, v, valid)] == [i.tolist() for i in kept]
    flat = model.scores(units_of(v, valid), None)
    torch.testing.assert_close(flat, model.token_scores(v, valid)[valid].detach())


def test_forward_is_reproducible_and_keeps_type():
    model = AutoSelect(Config(**TINY))
    v = torch.randn(2, 9, 16)
    runs = [model.eval()(v, None, 3, 0.02, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    out, a = model.train()(v.bfloat16(), None, torch.tensor([2.5, 9.0]), 0.3)
    assert out.dtype == torch.bfloat16 and a.dtype == torch.float32
    assert torch.allclose(a.sum(1), torch.tensor([2.5, 9.0]), atol=1e-5)
    assert torch.allclose(out[1].float(), v[1].bfloat16().float(), atol=0.05)  # K = N: all arrive


def test_statistics_are_those_of_all_tokens_seen():
    """Three uneven padded batches, one of them a step of two parts, give the mean and std of their
    tokens put together; a forward pass adds nothing."""
    model, seen = AutoSelect(Config(**TINY)), []
    outs = []
    for n, scale in ((9, 1.0), (5, 30.0), (7, 0.1)):
        v, valid = torch.randn(2, n, 16) * scale + scale, padding(n, 4)
        parts = [(None, units_of(v, valid))]
        if n == 5:
            parts = [(None, units_of(v[:1], valid[:1])), (None, units_of(v[1:], valid[1:]))]
        model.observe(None, parts, ALONE)
        outs.append(model(v, valid, 3, 0.02)[0])
        seen.append(v[valid])
    seen = torch.cat(seen)
    assert model.count == len(seen) == 33
    assert torch.allclose(model.mean, seen.mean(0), rtol=1e-4)
    assert torch.allclose(model.std, seen.std(0, correction=0), rtol=1e-4)
    sum(o.square().mean() for o in outs).backward()  # all three graphs are still whole
    model(v, None, 3, 0.02)
    assert model.count == 33
    again = AutoSelect(Config(**TINY))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.std, model.std) and again.count == 33


def test_patches_of_a_unit_share_one_a():
    """(B, N, P, C): one score and one a per unit, fresh noise per patch."""
    model = AutoSelect(Config(**TINY, denoiser="none"))
    v, valid = torch.randn(2, 9, 4, 16), padding(9, 6)
    observe(model, v, valid)
    assert model.count == 60
    model.eval()
    g = torch.Generator().manual_seed(3)
    out, a = model(v, valid, 3, 1.0, g)
    assert out.shape == v.shape and a.shape == (2, 9) and len(select(model, v, valid)[1]) == 3
    noise = torch.randn(v.shape, generator=g.manual_seed(3))
    for p in range(4):
        assert torch.allclose(
            out[:, :, p], vp_gate(v[:, :, p], a, noise[:, :, p], model.mean, model.std)
        )
    scores = model.token_scores(v)
    assert torch.allclose(scores, model.token_scores(v[:, :, [2, 0, 3, 1]]), atol=1e-5)
    assert torch.allclose(scores, model.token_scores(v.mean(2)), atol=1e-5)


@pytest.mark.parametrize("kind", ["diagonal", "global"])
def test_denoiser_works_per_patch(kind):
    """Diagonal: no patch sees another, not even of its own unit. Global: all of the image, not
    padding."""
    model = shake(AutoSelect(Config(**TINY, denoiser=kind, scorer="random"))).eval()
    v, valid = torch.randn(2, 5, 4, 16), padding(5, 4)

    def run(v):
        with torch.no_grad():
            return model(v, valid, 3, 0.02, torch.Generator().manual_seed(0))[0]

    def changed(b, n, p):
        other = v.clone()
        other[b, n, p] += torch.arange(16.0)
        return (run(other) - run(v)).abs().amax(-1) > 1e-6

    expected = torch.zeros(2, 5, 4, dtype=torch.bool)
    if kind == "diagonal":
        expected[0, 1, 2] = True
    else:
        expected[0] = True  # image 0 has no padding
    assert (changed(0, 1, 2) == expected).all()
    assert not changed(1, 4, 0)[1, :4].any()  # padding reaches no token


def test_random_scorer_has_nothing_to_learn():
    """Using a random scorer isolates the gate: fresh scores at each call, still exactly K."""
    model = AutoSelect(Config(**TINY, scorer="random"))
    v = torch.randn(2, 30, 16)
    assert all(name.startswith("denoiser.") for name, _ in model.named_parameters())
    assert not torch.equal(model.token_scores(v), model.token_scores(v))
    assert [i.tolist() for i in select(model, v)] != [i.tolist() for i in select(model, v)]
    a = model(v, None, 3, 0.02)[1]
    assert torch.allclose(a.sum(1), torch.tensor([3.0, 3.0]), atol=1e-5) and not a.requires_grad
    assert [len(i) for i in select(model, v)] == [3, 3]
    assert not list(AutoSelect(Config(**TINY, scorer="random", denoiser="none")).parameters())


def test_unknown_flags_are_refused():
    for flag in ("gate", "denoiser", "scorer"):
        with pytest.raises(ValueError, match=f"{flag}='typo' is none of"):
            Config(**{flag: "typo"})


def scenes(n):
    """16 channels, 12 tokens, one of which carries 4 bits and a mark; the rest is clutter."""
    v = torch.randn(n, 12, 16)
    bits, where = torch.randint(0, 2, (n, 4)).float(), torch.randint(12, (n,))
    v[:, :, 1:5] = 0
    v[:, :, 0] = 0
    v[torch.arange(n), where, 1:5] = bits * 2 - 1
    v[torch.arange(n), where, 0] = 1
    return v * 3, bits, where


def test_training_finds_the_informative_token():
    """The model learns which token matters from the task's loss alone: the frozen reader sums all
    tokens."""
    model, steps = AutoSelect(Config(**TINY, tau_start=1.0, tau_end=0.1)), 200
    optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
    v, _, where = scenes(400)

    def hits():
        model.eval()
        return (torch.cat(select(model, v, keep=1)) == where).float().mean().item()

    before = hits()
    for step in range(steps):
        batch, bits, _ = scenes(32)
        observe(model, batch)
        out, _ = model.train()(batch, None, 1, temperature(step, steps, model.cfg))
        loss = nn.functional.binary_cross_entropy_with_logits(out[..., 1:5].sum(1), bits)
        optim.zero_grad()
        loss.backward()
        optim.step()
    assert before < 0.4 and hits() > 0.95


def test_tokens_are_counted_in_whole_numbers():
    """In float32 one more than 2^24 of them would be none more."""
    model = AutoSelect(Config(**TINY))
    model.count.fill_(2 ** 24)
    units = Units(torch.randn(1, 16), torch.zeros(1, dtype=torch.int64), [(1, 1)])
    model.observe(None, [(None, units)], SimpleNamespace(sum=lambda x: x))
    assert int(model.count) == 2 ** 24 + 1


def test_the_gated_way_is_there_when_it_is_asked_for():
    model = AutoSelect(Config(**TINY))
    assert [list(model.ways(names, [4], None)) for names in ([], ["gated"])] == [
        [""], ["", " gated"]]


@pytest.mark.parametrize("k, total", [(5, 60), (1 / 5, 20), (1, 12), (10 ** 6, 100)])
def test_a_threshold_keeps_the_best_of_all_pictures_together(k, total):
    """K a picture on average, of 12 pictures with 100 tokens: the control of an adaptive method,
    without a loop."""
    model = shake(AutoSelect(Config(**TINY))).eval()
    lengths = [9, 4, 12] * 4
    units = units_of(torch.randn(12, 12, 16), padding(*lengths))
    parts = [(units.rows(rows), None) for rows in (range(5), range(5, 12))]
    way = model.ways(["threshold"], [k], lambda: iter(parts))[" threshold"]
    keep = way.select(SimpleNamespace(units=units, question=None), k)

    scores = model.scores(units, None)
    cut = scores.sort(descending=True).values[total - 1]
    for row, s in zip(keep, scores.split(lengths)):
        assert row.tolist() == ((s >= cut).nonzero()[:, 0].tolist() or [int(s.argmax())])
    assert way.adaptive and len({len(row) for row in keep}) > 1
    assert model.is_steered(["threshold"]) and not model.is_steered(["gated"])
