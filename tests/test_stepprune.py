"""stepprune.py does what its equations say: each checked against a loop in plain numbers, in float64."""

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import stepprune as sp
from autoselect import soft_topk, zscore

torch.set_num_threads(2)
SMALL = sp.Config(width=16, text_width=8, max_text=6, max_steps=9, heads=2, decoder_layers=2)


def model(**changes):
    torch.manual_seed(0)
    net = sp.StepPrune(replace(SMALL, **changes)).double()
    for p in net.parameters():                        # biases and norms too: nothing may hide behind a zero
        p.data += .3 * torch.randn_like(p)
    net.start.data.normal_()
    return net


def inputs(b=3, n=9, length=4, patches=(), seed=1):
    """Tokens and question of b rows; the last row has fewer of both where b > 1."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(b, n, *patches, 16, generator=g, dtype=torch.float64)
    text = torch.randn(b, length, 8, generator=g, dtype=torch.float64)
    valid, text_valid = torch.ones(b, n, dtype=torch.bool), torch.ones(b, length, dtype=torch.bool)
    if b > 1:
        valid[-1, n - 2:], text_valid[-1, length - 1:] = False, False
    return v, valid, text, text_valid


def distribution(b, t, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, n + 1, generator=g, dtype=torch.float64).mul(2).softmax(-1).requires_grad_()


def running(b, t):
    """Rows that stop at different steps."""
    return torch.arange(t) < torch.tensor([t, 2, 1, t - 1][:b])[:, None]


# ------------------------------------------------------------------------------------------ equations 6 to 12, 15

def test_pointer_and_close_by_hand():
    logits, m = torch.tensor([[0., math.log(3), 5, 0]]).double(), torch.zeros(1, 4).double()
    m = sp.close(m, torch.tensor([2]))
    pi = sp.pointer(logits, m, 1.)
    assert torch.allclose(pi, torch.tensor([[.2, .6, 0, .2]]).double()) and pi[0, 2] == 0
    assert torch.equal(sp.close(m, torch.tensor([3])), m)            # stop stays open
    assert torch.allclose(sp.pointer(logits, m, .5), torch.tensor([[1, 9, 0, 1]]).double() / 11)


def test_straight_through_is_hard_forwards_and_soft_backwards():
    pi, memory = distribution(2, 3, 4), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    pick, out = pi.argmax(-1), torch.randn(2, 3, 6, dtype=torch.float64)
    e = sp.straight_through(pi, memory, pick)
    assert all(torch.equal(e[b, t], memory[b, pick[b, t]]) for b in range(2) for t in range(3))
    soft = torch.autograd.grad((out * (pi @ memory)).sum(), pi, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad((out * e).sum(), pi)[0], soft)


def test_alive_by_hand():
    stop = torch.tensor([[.5, .2, 1., .3, .1]]).double()
    assert torch.allclose(sp.alive(stop), torch.tensor([[1, .5, .4, 0, 0]]).double())


@pytest.mark.parametrize("how", sp.AGGREGATIONS)
def test_aggregate_is_the_printed_sum(how):
    pi, on, gamma = distribution(3, 5, 6).detach(), running(3, 5), .7
    s = sp.aggregate(pi, on, gamma, how)
    for b, i in itertools.product(range(3), range(6)):
        still, total, last = 1., 0., int(on[b].sum()) - 1
        for t in range(last + 1):
            weight = {"full": gamma ** t * still, "alive": still, "uniform": 1., "last": float(t == last)}[how]
            total += weight * pi[b, t, i].item()
            still *= 1 - pi[b, t, 6].item()
        assert s[b, i].item() == pytest.approx(total, rel=1e-12)


def test_expected_count_is_the_mean_over_all_ends():
    pi, on = distribution(3, 5, 6).detach(), running(3, 5)
    for b, count in enumerate(sp.expected_count(pi, on).tolist()):
        stop, total, still = pi[b, :, 6], 0., 1.
        for t in range(int(on[b].sum())):             # the episode ends before step t + 1 with probability ...
            total, still = total + t * still * stop[t].item(), still * (1 - stop[t].item())
        assert count == pytest.approx(total + int(on[b].sum()) * still, rel=1e-12)


def test_gradients_of_aggregation_length_and_polarisation():
    pi, on = distribution(3, 5, 6), running(3, 5)
    for how in sp.AGGREGATIONS:
        assert gradcheck(lambda p, how=how: sp.aggregate(p, on, .9, how), pi)
    assert gradcheck(lambda p: sp.alive(p[..., -1]), pi) and gradcheck(lambda p: sp.expected_count(p, on), pi)
    assert gradcheck(lambda p: soft_topk(zscore(sp.aggregate(p, on, .9)), sp.expected_count(p, on), .3), pi, atol=1e-6)
    assert gradcheck(lambda p: sp.log_probability(p, p.argmax(-1), on), pi)


# --------------------------------------------------------------------------------------------------- the episode

def test_length_weight_rises_rests_and_falls():
    w = [sp.length_weight(step, 100, 3., .1) for step in range(101)]
    assert w[0] == 0 and w[5] == pytest.approx(1) and w[15:46] == [3.] * 31
    assert w[90:] == [pytest.approx(.1)] * 11 and w[67] / w[66] == pytest.approx(w[80] / w[79])
    assert {sp.length_weight(step, 100, 2., 2.) for step in range(15, 101)} == {2.}
    assert sp.length_weight(5, 9, 0., 0.) == 0


def test_the_policy_is_a_distribution_over_all_trajectories():
    """Eqs. (2), (9): pi of every ordered subset of 4 tokens, product by product; together they make 1."""
    net, (v, valid, text, text_valid) = model(max_steps=5), inputs(1, 4)
    memory, total = net.memory(v, valid, text, text_valid), 0.
    for r in range(1, 5):
        for order in itertools.permutations(range(4), r):
            picks = torch.tensor([[*order, 4]])
            pi, on = net.replay(memory, valid, picks), torch.ones(1, r + 1, dtype=torch.bool)
            by_hand = math.prod(pi[0, t, a].item() for t, a in enumerate(picks[0].tolist()))
            assert sp.log_probability(pi, picks, on).exp().item() == pytest.approx(by_hand, rel=1e-12)
            total += by_hand
    assert total == pytest.approx(1, abs=1e-10)


def reference(net, memory, valid, most, bias=0., least=1):
    """The loop as the paper prints it, one row, no cache: at every step all earlier picks go through all layers again,
    attention written out. Returns picks (stop included) and their pi."""
    d, (n, c), picks, out = net.decoder, memory.shape, [], []

    def heads(x, linear):
        return linear(x).unflatten(-1, (-1, c // net.cfg.heads)).transpose(0, 1)

    def attend(q, k, v, hidden):
        w = (q @ k.mT / q.shape[-1] ** .5).masked_fill(hidden, -torch.inf).softmax(-1)
        return (w @ v).transpose(0, 1).flatten(1)

    def split(attention, x):
        k, v = attention.kv(x).chunk(2, -1)
        return heads(k, lambda y: y), heads(v, lambda y: y)
    padding = ~F.pad(valid, (0, 1), value=True)
    for t in range(most):
        x = torch.stack([net.start, *(memory[p] for p in picks)])
        future = torch.ones(t + 1, t + 1, dtype=torch.bool).triu(1)
        for layer in d.layers:
            y = layer.norm(x)
            x = x + layer.own.out(attend(heads(y, layer.own.q), *split(layer.own, y), future))
            if layer is not d.layers[-1]:
                y = layer.cross_norm(x)
                x = x + layer.cross.out(attend(heads(y, layer.cross.q), *split(layer.cross, memory), padding))
                x = x + layer.feed_forward(layer.forward_norm(x))
        logits = layer.key(memory) @ layer.query(layer.cross_norm(x[-1])) / c ** .5
        logits[-1] += bias
        logits[padding] = -torch.inf
        logits[picks] = -torch.inf
        if t < least:
            logits[-1] = -torch.inf
        out.append((logits / net.cfg.tau_pointer).softmax(-1))
        if (pick := int(out[-1].argmax())) == n - 1:
            return picks + [pick], torch.stack(out)
        picks.append(pick)
    return picks, torch.stack(out)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [-1., 0., 1.])
def test_the_cached_loop_is_the_uncached_one(layers, bias):
    net, (v, valid, text, text_valid) = model(decoder_layers=layers, tau_pointer=.7), inputs(4)
    memory = net.memory(v, valid, text, text_valid)
    episode = net.rollout(memory, valid, bias, most=7)
    for b in range(4):
        picks, pi = reference(net, memory[b], valid[b], 7, bias)
        length = int(episode.on[b].sum())
        assert episode.picks[b, :length].tolist() == picks
        assert torch.allclose(episode.pi[b, :length], pi, atol=1e-12)


def test_the_uncached_loop_takes_longer_by_a_ratio_that_is_only_reported(capsys):
    net = sp.StepPrune(replace(SMALL, width=128, text_width=128, heads=4, max_steps=48)).eval()
    valid, memory, took = torch.ones(1, 576, dtype=torch.bool), torch.randn(1, 577, 128), []
    with torch.no_grad():
        for loop in (lambda: net.rollout(memory, valid, -1e4).picks[0].tolist(),
                     lambda: reference(net, memory[0], valid[0], 48, -1e4)[0]):
            start = time.perf_counter()
            picks = loop()
            took.append(time.perf_counter() - start)
    assert len(set(picks)) == 48 and picks == net.rollout(memory, valid, -1e4).picks[0].tolist()
    with capsys.disabled():
        print(f"\nuncached / cached loop, N = 576, C = 128, 48 picks: {took[1] / took[0]:.1f}x")


def test_replay_gives_the_loops_pi_and_with_all_hops_its_gradient():
    net, data = model(hops=-1), inputs()
    memory = net.memory(*data).detach().requires_grad_()
    episode = net.rollout(memory, data[1], most=6)
    weight = torch.randn_like(episode.pi)
    leaves = [memory, net.start, *net.decoder.parameters()]

    def gradient(pi):
        return torch.cat([g.flatten() for g in torch.autograd.grad((pi * weight).sum(), leaves, retain_graph=True)])
    full, off = gradient(episode.pi), {}
    for hops in (0, 1, 5):
        pi = net.replay(memory, data[1], episode.picks, hops)
        assert torch.allclose(pi, episode.pi, atol=1e-12)
        off[hops] = ((gradient(pi) - full).norm() / full.norm()).item()
    assert off[5] < 1e-10 and off[1] > 1e-4 and off[0] > 1e-4


def test_no_token_twice_and_never_a_padded_one():
    net, (v, valid, text, text_valid) = model(), inputs()
    for row, ok in zip(net.picks(v, valid, text, text_valid, stop_bias=-1e4), valid):
        assert len(row) == len(row.unique()) == ok.sum() and ok[row].all()


def test_a_row_in_a_batch_is_the_row_alone():
    net, (v, valid, text, text_valid) = model(budget="expected", max_steps=7), inputs(4)
    net.eval()
    _, a, episode, expected = net(v, valid, text, text_valid, .2)
    assert len(set(episode.count.tolist())) > 1                      # or the batch would show nothing
    for b in range(4):
        n, words = valid[b].sum(), text_valid[b].sum()
        alone = v[b:b + 1, :n], valid[b:b + 1, :n], text[b:b + 1, :words], text_valid[b:b + 1, :words]
        _, a1, episode1, expected1 = net(*alone, .2)
        assert episode1.count[0] == episode.count[b] and torch.allclose(expected1[0], expected[b], atol=1e-10)
        assert torch.allclose(a1[0], a[b, :n], atol=1e-8) and not a[b, n:].any()
        picks = net.picks(v, valid, text, text_valid)[b].tolist()
        assert picks == net.picks(*alone)[0].tolist() == episode.picks[b, :len(picks)].tolist()


def test_stop_at_once_never_and_in_between():
    net, data = model(), inputs(4)
    n = data[1].sum(1).tolist()
    assert [len(p) for p in net.picks(*data, stop_bias=1e4)] == [1] * 4
    assert [len(p) for p in net.picks(*data, stop_bias=-1e4)] == n
    assert [len(p) for p in net.picks(*data, stop_bias=-1e4, most=5)] == [5] * 4
    assert [len(p) for p in net.select(*data, least=3, most=3)] == [3] * 4
    assert [len(p) for p in net.picks(*data, stop_bias=1e4, least=2)] == [2] * 4
    for keep in net.select(*data, stop_bias=-1e4):
        assert (keep[1:] > keep[:-1]).all() and keep.dtype == torch.int64


def test_one_long_episode_tells_where_every_stop_bias_ends():
    """What evaluate.py calibrates with: the same picks and counts as a run with that bias."""
    net, data = model(), inputs(4, n=12)
    episode = net.rollout(net.memory(*data), data[1], -1e4, most=9)
    counts = set()
    for bias in torch.linspace(-3, 3, 25).tolist():
        n = sp.stops(episode.margin, bias)
        picks = net.picks(*data, stop_bias=bias, most=9)
        assert [row.tolist() for row in picks] == [row[:k].tolist() for row, k in zip(episode.picks, n.tolist())]
        counts.add(tuple(n.tolist()))
    assert len(counts) > 5
    for mean in (1, 2.5, 4, 9):
        n = sp.stops(episode.margin, sp.calibrate(episode.margin, mean)).double().mean()
        assert n <= mean and sp.stops(episode.margin, sp.calibrate(episode.margin, mean) - 1e-6).double().mean() >= n


def test_running_mean_of_the_count():
    net, data = model(budget="batch_mean", momentum=.75).train(), inputs(4)
    first = net(*data, .2)[2].count.double().mean()
    assert net.k_bar == first
    net.k_bar = torch.tensor(8.)
    count = net(*data, .2)[2].count.double().mean()
    assert net.k_bar.item() == pytest.approx(.75 * 8 + .25 * count.item(), rel=1e-6)
    before = net.k_bar.clone()
    net.eval()(*data, .2)
    assert net.k_bar == before


@pytest.mark.parametrize("budget", ["batch_mean", "expected"])
def test_the_gate_keeps_the_budget(budget):
    net, data = model(budget=budget).train(), inputs(4)
    out, a, episode, expected = net(*data, .2)
    assert out.shape == data[0].shape and out.dtype == data[0].dtype
    wanted = expected if budget == "expected" else net.k_bar.expand(4)
    assert torch.allclose(a.sum(1), wanted.to(a), atol=1e-6)


# --------------------------------------------------------------------------------------------------- the encoder

def test_the_question_reaches_the_pointer_and_the_gate_holds_it_back():
    net, (v, valid, text, text_valid) = model(), inputs()
    other = text.flip(1)                                              # the same words in another order
    assert not torch.allclose(net.memory(v, valid, text, text_valid), net.memory(v, valid, other, text_valid))
    assert torch.equal(net.memory(v, valid, text, text_valid, 0.), net.memory(v, valid, other, text_valid, 0.))
    loud = torch.where(text_valid[..., None], text, 1e3)
    assert torch.allclose(net.memory(v, valid, text, text_valid), net.memory(v, valid, loud, text_valid))
    assert [sp.text_gate(t, 4) for t in (0, 1, 4, 9)] == [0, .25, 1, 1]


def test_stop_reads_the_question_only_when_encoded():
    for stop in ("learned", "encoded"):
        net, (v, valid, text, text_valid) = model(stop=stop), inputs()
        slots = net.memory(v, valid, text, text_valid)[:, -1]
        moved = [not torch.allclose(slots, net.memory(*changed)[:, -1]) for changed in (
            (v, valid, text.flip(1), text_valid), (v.flip(1), valid, text, text_valid))]
        assert moved == [stop == "encoded"] * 2
        if stop == "learned":
            assert torch.equal(slots, net.stop.expand(3, -1))


def test_align_puts_a_word_where_the_projector_would_have_made_it_from():
    net, g = model(), torch.Generator().manual_seed(3)
    v = torch.randn(500, 16, generator=g, dtype=torch.float64) * 3 + 1
    linear = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64))[0][:8]
    net.encoder.text_norm = torch.nn.Identity()
    net.align(v, v @ linear.mT)
    x = (v - v.mean(0)) / v.std(0)
    kept = linear.mT @ linear                          # what 8 of 16 dimensions can tell about a token
    error = (net.encoder.text(v @ linear.mT) - x).square().mean().item()
    lost = (x - (x - x.mean(0)) @ kept).square().mean().item()
    assert error < 1.1 * lost and error < .7
    for layer in net.encoder.blocks:
        query, key, _ = layer.self_attn.in_proj_weight.chunk(3)
        assert torch.equal(query, key)


def test_causal_blocks_what_comes_later():
    (v, valid, text, text_valid), changed = inputs(1), inputs(1, seed=5)
    for causal in (False, True):
        net, moved = model(causal=causal), v.clone()
        moved[:, 5] = changed[0][:, 5]
        h, h1 = net.memory(v, valid, text, text_valid), net.memory(moved, valid, text, text_valid)
        differs = (h - h1).abs().amax(-1)[0, :-1] > 1e-12
        assert differs.tolist() == [i >= 5 if causal else True for i in range(9)]
        heard = (h - net.memory(v, valid, changed[2], text_valid)).abs().amax() > 1e-12
        assert heard == (not causal)


@pytest.mark.parametrize("patches", [(), (4,)])
def test_every_parameter_learns(patches):
    for changes in (dict(hops=0), dict(hops=1), dict(hops=-1), dict(budget="expected"), dict(decoder_layers=1)):
        net, data = model(**changes).train(), inputs(3, patches=patches)
        out, a, episode, expected = net(*data, .5)
        (out.square() * torch.randn_like(out)).sum().add(expected.sum()).backward()
        silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # a key's bias moves all logits alike; self-attention's value bias and norms are heard
        assert not [n for n in silent if "position" not in n], (changes, silent)
        assert net.encoder.position.grad[:4].abs().sum() > 0


# ---------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("bad", [dict(budget="all"), dict(aggregation="sum"), dict(max_steps=0), dict(max_text=0),
                                 dict(gate="hard"), dict(denoiser="big"), dict(stop="no")])
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError, match=str(*bad)):
        model(**bad)


def test_calls_that_cannot_work():
    net, (v, valid, text, text_valid) = model(), inputs()
    with pytest.raises(ValueError, match="question of 7 tokens: expected at most max_text=6"):
        net.picks(v, valid, torch.randn(3, 7, 8).double(), torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="row 1 has an empty question"):
        net.picks(v, valid, text, text_valid & torch.tensor([True, False, True])[:, None])
    for bias in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"stop_bias={bias}"):
            net.picks(v, valid, text, text_valid, stop_bias=bias)
    with pytest.raises(ValueError, match="max_steps=10: expected at most the 9 visual tokens"):
        model(max_steps=10)(v, valid, text, text_valid, .5)
    for how in (dict(least=0), dict(least=8), dict(least=3, most=2), dict(most=0)):
        with pytest.raises(ValueError, match="1 <= least <= most"):
            net.picks(v, valid, text, text_valid, **how)
    with pytest.raises(ValueError, match="a mean of 20 tokens: expected 1 to 5"):
        sp.calibrate(torch.zeros(2, 5), 20)
