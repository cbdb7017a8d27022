"""stepprune.py does what its equations say: each checked against plain numbers, in float64."""

import contextlib
import itertools
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser

import runs
import stepprune as sp
from autoselect import soft_topk, zscore
from common import FrozenVLM, Units
from data.dialogues import Dialogues

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = sp.Config(width=16, text_width=8, max_text=6, max_steps=9, heads=2, decoder_layers=2,
                  k_rule="batch_mean")


def model(**changes):
    torch.manual_seed(0)
    net = sp.StepPrune(replace(SMALL, **changes)).double()
    for p in net.parameters():         # biases and norms too: nothing may hide behind a zero
        p.data += 0.3 * torch.randn_like(p)
    net.start.data.normal_()
    return net


def inputs(b=3, n=9, length=4, patches=(), seed=1):
    """Tokens and question of b rows; the last row has fewer of both where b > 1."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(b, n, *patches, 16, generator=g, dtype=torch.float64)
    text = torch.randn(b, length, 8, generator=g, dtype=torch.float64)
    valid = torch.ones(b, n, dtype=torch.bool)
    text_valid = torch.ones(b, length, dtype=torch.bool)
    if b > 1:
        valid[-1, n - 2:] = False
        text_valid[-1, length - 1:] = False
    return v, valid, text, text_valid


def asked(v, valid, text, text_valid):
    """The same as units and question."""
    counts = valid.sum(1)
    image_of = torch.arange(len(v)).repeat_interleave(counts)
    units = Units(v[valid], image_of, [(1, n) for n in counts.tolist()])
    return units, (text, text_valid)


def step_of(number=3, total=10, **numbers):
    """What train.py hands to a method, on one process."""
    return SimpleNamespace(number=number, total=total, sum=lambda x: x, mean=lambda x: x,
                           autocast=contextlib.nullcontext, **numbers)


def seen(net, *data, number=100):
    """net after it has observed a step of these rows in one part. At step 100, text is all in."""
    units, question = asked(*data)
    vlm = SimpleNamespace(question=lambda rows: question)
    net.observe(vlm, [(SimpleNamespace(rows=None), units)], step_of(number))
    return net


def distribution(b, t, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(b, t, n + 1, generator=g, dtype=torch.float64)
    return logits.softmax(-1).requires_grad_()


def running(b, t):
    """Rows that stop at different steps."""
    return torch.arange(t) < torch.tensor([t, 2, 1, t - 1][:b])[:, None]


# ---- equations 6 to 12, 15

def test_pointer_and_close_by_hand():
    logits = torch.tensor([[0.0, math.log(3), 5, 0]]).double()
    m = sp.close(torch.zeros(1, 4).double(), torch.tensor([2]))
    pi = sp.pointer(logits, m, 1.)
    assert torch.allclose(pi, torch.tensor([[.2, .6, 0, .2]]).double()) and pi[0, 2] == 0
    assert torch.equal(sp.close(m, torch.tensor([3])), m)            # stop stays open
    assert torch.allclose(sp.pointer(logits, m, .5), torch.tensor([[1, 9, 0, 1]]).double() / 11)


def test_straight_through_is_hard_forwards_and_soft_backwards():
    pi = distribution(2, 3, 4)
    memory = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    pick = pi.argmax(-1)
    out = torch.randn(2, 3, 6, dtype=torch.float64)
    e = sp.straight_through(pi, memory, pick)
    assert all(torch.equal(e[b, t], memory[b, pick[b, t]]) for b in range(2) for t in range(3))
    soft = torch.autograd.grad((out * (pi @ memory)).sum(), pi, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad((out * e).sum(), pi)[0], soft)


def test_alive_by_hand():
    stop = torch.tensor([[.5, .2, 1., .3, .1]]).double()
    assert torch.allclose(sp.alive(stop), torch.tensor([[1, .5, .4, 0, 0]]).double())


@pytest.mark.parametrize("how", sp.AGGREGATIONS)
def test_aggregate_is_the_printed_sum(how):
    pi, on, gamma = distribution(3, 5, 6).detach(), running(3, 5), 0.7
    s = sp.aggregate(pi, on, gamma, how)
    for b, i in itertools.product(range(3), range(6)):
        still, total, last = 1.0, 0.0, int(on[b].sum()) - 1
        for t in range(last + 1):
            weight = {"full": gamma ** t * still, "alive": still, "uniform": 1.0,
                      "discounted": gamma ** t, "last": float(t == last)}[how]
            total += weight * pi[b, t, i].item()
            still *= 1 - pi[b, t, 6].item()
        assert s[b, i].item() == pytest.approx(total, rel=1e-12)


def test_the_top_k_by_optimal_transport_is_the_sigmoid():
    """Xie et al., arXiv:2002.06504: scores go to the targets 0 and 1 at squared cost, K of them to
    1, with entropy epsilon. Sinkhorn's plan is Eq. 12's sigmoid with tau = epsilon / 2."""
    s, k, epsilon = torch.rand(3, 9).double(), torch.tensor([2., 4.5, 7.]), 0.3
    kernel = (-torch.stack([s ** 2, (s - 1) ** 2], 2) / epsilon).exp()     # (B, N, 2)
    wanted = torch.stack([9 - k, k], 1).double()
    v = torch.ones(3, 2).double()
    for _ in range(500):
        u = 1 / (kernel @ v[..., None]).squeeze(2)                         # each score is one
        v = wanted / (u[:, None] @ kernel).squeeze(1)
    plan = u[..., None] * kernel * v[:, None]
    assert (soft_topk(s, k, epsilon / 2) - plan[..., 1]).abs().max() < 1e-10


def test_expected_count_is_the_mean_over_all_ends():
    pi, on = distribution(3, 5, 6).detach(), running(3, 5)
    for b, count in enumerate(sp.expected_count(pi, on).tolist()):
        stop, total, still = pi[b, :, 6].tolist(), 0.0, 1.0
        for t in range(int(on[b].sum())):
            total += t * still * stop[t]               # the episode ends after t picks
            still *= 1 - stop[t]
        assert count == pytest.approx(total + int(on[b].sum()) * still, rel=1e-12)


def test_gradients_of_aggregation_length_and_polarisation():
    pi, on = distribution(3, 5, 6), running(3, 5)
    for how in sp.AGGREGATIONS:
        assert gradcheck(lambda p, how=how: sp.aggregate(p, on, .9, how), pi)
    assert gradcheck(lambda p: sp.alive(p[..., -1]), pi)
    assert gradcheck(lambda p: sp.expected_count(p, on), pi)
    assert gradcheck(lambda p: sp.log_probability(p, p.argmax(-1), on), pi)

    def polarised(p):
        return soft_topk(zscore(sp.aggregate(p, on, 0.9)), sp.expected_count(p, on), 0.3)
    assert gradcheck(polarised, pi, atol=1e-6)


@pytest.mark.parametrize("price", ["scheduled", "told"])
def test_a_price_is_read_only_where_it_is_told(price):
    net, data = model(price=price, k_rule="expected"), inputs()
    slots = [net.memory(*data, fallen=fallen)[:, -1] for fallen in (0., 1.)]
    assert torch.equal(*slots) == (price == "scheduled")
    each = net.memory(*data, fallen=torch.tensor([0., 1., 0.]))[:, -1]
    assert all(torch.allclose(each[row], slots[row == 1][row]) for row in range(3))


def noise_of(owner):
    """What step.generators() gives: one a row."""
    return [torch.Generator().manual_seed(row) for row in range(len(owner))]


def loss_of(tiny, **changes):
    """VLM, StepPrune, two pictures, their units, and loss() of step 67 of 100, of which they are a
    part."""
    vlm, items = tiny
    torch.manual_seed(0)
    net = sp.StepPrune(sp.Config.of(vlm, max_steps=12, heads=2, **changes)).double().train()
    batch = part_of(vlm, items[:2])
    units = net.read(vlm, batch)
    step = step_of(67, 100, answers=40.0, rows=10.0, generators=noise_of)
    net.observe(vlm, [(batch, units)], step)
    return vlm, net, batch, units, net.loss(vlm, batch, units, step)


@pytest.mark.parametrize("price", ["told", "constant"])
def test_every_row_pays_the_price_that_it_is_told(tiny, price):
    """Told: drawn anew from the row's own generator, between lambda's peak and where it has fallen
    to. Constant: from the first step to the last."""
    vlm, net, batch, units, (loss, log) = loss_of(tiny, price=price)
    drawn = noise_of(batch.owner)
    fallen = torch.stack([torch.rand((), generator=g) for g in drawn]) * (67 / 100 - .45) / .45
    weight = torch.full_like(fallen, 3.)
    if price == "told":
        weight = 3 * (.1 / 3) ** fallen
        assert .5 < weight.min() < weight.max() < 2.99
    else:
        fallen, drawn = fallen * 0, noise_of(batch.owner)
    gated, _, _, expected = net(*units.pad(), *vlm.question(batch.rows), log["tau"], 1.0, drawn,
                                fallen)
    nll = vlm.loss(vlm.embed(batch.rows, units, units.flat(gated)))
    price = (weight * expected / 144).sum() / 10
    assert loss.item() == pytest.approx((nll * batch.answers / 40 + price).item(), rel=1e-6)
    assert log["lambda"] == pytest.approx(weight.mean().item(), rel=1e-6)


def test_a_told_price_steers_first_and_the_bias_does_the_rest(capsys):
    net = model(price="told", k_rule="expected", max_steps=12)
    with torch.no_grad():                             # stop's logit falls with the price
        net.told[0].weight.fill_(1), net.told[0].bias.zero_()
        net.told[2].weight.mul_(3)
    batches = [asked(*inputs(4, n=12, seed=seed)) for seed in range(4)]
    steering = net.calibrated([2, 5, 8], batches, 12)
    assert len({how["fallen"] for how in steering.values()}) > 1
    shown = capsys.readouterr().out
    unsteered = [float(word) for word in shown.split(" tokens")[0].split()[3:]]
    assert len(unsteered) == 9 and max(unsteered) > min(unsteered) + .5
    for k, how in steering.items():
        nearest = min(range(9), key=lambda i: abs(unsteered[i] - k))
        assert abs(unsteered[int(8 * how["fallen"])] - k) <= abs(unsteered[nearest] - k) + .11
        kept = [len(row) for batch in batches for row in net.picks(*batch, most=12, **how)]
        assert k - 1.2 < sum(kept) / len(kept) <= k


# ---- the episode

def test_length_weight_rises_rests_and_falls():
    w = [sp.length_weight(step, 100, 3., .1, sp.fall(step, 100)) for step in range(101)]
    assert w[0] == 0 and w[5] == pytest.approx(1) and w[15:46] == [3.] * 31
    assert w[90:] == [pytest.approx(.1)] * 11 and w[67] / w[66] == pytest.approx(w[80] / w[79])
    assert {sp.length_weight(step, 100, 2., 2., 1) for step in range(15, 101)} == {2.}
    assert sp.length_weight(5, 9, 0., 0., 1) == 0


def test_the_policy_is_a_distribution_over_all_trajectories():
    """Eqs. (2), (9): pi of every ordered subset of 4 tokens, product by product; together 1."""
    net, data = model(max_steps=5), inputs(1, 4)
    valid = data[1]
    memory, total = net.memory(*data), 0.0
    for r in range(1, 5):
        for order in itertools.permutations(range(4), r):
            picks = torch.tensor([[*order, 4]])
            pi, on = net.replay(memory, valid, picks), torch.ones(1, r + 1, dtype=torch.bool)
            by_hand = math.prod(pi[0, t, a].item() for t, a in enumerate(picks[0].tolist()))
            found = sp.log_probability(pi, picks, on).exp().item()
            assert found == pytest.approx(by_hand, rel=1e-12)
            total += by_hand
    assert total == pytest.approx(1, abs=1e-10)


def test_what_comes_after_a_row_has_stopped_changes_no_probability():
    pi, on = distribution(3, 5, 6).detach(), running(3, 5)
    picks = pi.argmax(-1)
    wanted = [math.log(math.prod(pi[b, t, picks[b, t]].item() for t in range(int(on[b].sum()))))
              for b in range(3)]
    assert sp.log_probability(pi, picks, on).tolist() == pytest.approx(wanted, rel=1e-12)


def reference(net, memory, valid, most, bias=0., least=1):
    """The loop as the paper prints it, one row, no cache: at every step all earlier picks go
    through all layers again, attention written out. Returns picks (stop included) and their pi."""
    d, (n, c) = net.decoder, memory.shape
    picks, out = [], []

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
                keys = split(layer.cross, memory)
                x = x + layer.cross.out(attend(heads(y, layer.cross.q), *keys, padding))
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
    net, data = model(decoder_layers=layers, tau_pointer=0.7), inputs(4)
    memory, valid = net.memory(*data), data[1]
    episode = net.rollout(memory, valid, bias, most=7)
    for b in range(4):
        picks, pi = reference(net, memory[b], valid[b], 7, bias)
        length = int(episode.on[b].sum())
        assert episode.picks[b, :length].tolist() == picks
        assert torch.allclose(episode.pi[b, :length], pi, atol=1e-12)


def test_the_uncached_loop_takes_longer_by_a_ratio_that_is_only_reported(capsys):
    net = sp.StepPrune(replace(SMALL, width=128, text_width=128, heads=4, max_steps=48)).eval()
    valid = torch.ones(1, 576, dtype=torch.bool)
    memory, took = torch.randn(1, 577, 128), []
    with torch.no_grad():
        for loop in (lambda: net.rollout(memory, valid, -1e4).picks[0].tolist(),
                     lambda: reference(net, memory[0], valid[0], 48, -1e4)[0]):
            start = time.perf_counter()
            picks = loop()
            took.append(time.perf_counter() - start)
    assert len(set(picks)) == 48
    assert picks == net.rollout(memory, valid, -1e4).picks[0].tolist()
    with capsys.disabled():
        print(f"\nuncached / cached loop, N = 576, C = 128, 48 picks: {took[1] / took[0]:.1f}x")


# ---- the fast loop

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [sp.NEVER, -1., 0., 1.])
@pytest.mark.parametrize("layers, tau, least, most", [(1, 1., 1, 7), (2, .7, 3, 9), (3, 1., 2, 40)])
def test_the_fast_loop_picks_what_the_plain_one_picks(layers, tau, least, most, bias, dtype):
    """Rows of unlike length that stop at unlike steps, and margins, bit for bit, whatever the
    number of picks a graph would hold, and in tensors that another episode has used."""
    net = model(decoder_layers=layers, tau_pointer=tau).to(dtype)
    v, valid, text, text_valid = inputs(4)
    with torch.no_grad():
        memory = net.memory(v.to(dtype), valid, text.to(dtype), text_valid)
        plain = net.rollout(memory, valid, bias, least, most)
    picks, margin, count = net.episode(memory, valid, bias, least, most)
    assert torch.equal(picks, plain.picks) and torch.equal(margin, plain.margin)
    assert torch.equal(count, plain.count) and margin.dtype == max(
        dtype, torch.float32, key=lambda x: torch.finfo(x).bits)
    most = min(most, 9)
    used = sp.Episode(net.decoder, tau, memory.flip(0, 1), net.start, valid, 2., 1, most, every=4)
    with torch.no_grad():
        used.run(may_stop=False)
        used.restart(sp.Episode(net.decoder, tau, memory, net.start, valid, bias, least, most, 4))
        again, _ = used.run(may_stop=True)
    width = min(again.shape[1], picks.shape[1])
    assert torch.equal(again[:, :width], picks[:, :width]) and width >= plain.count.max()


class Operators(TorchDispatchMode):
    """Names of those that compute; views and the making of constants are none."""
    views = {"_unsafe_view", "scalar_tensor"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split("::")[1].split(".")[0]
        self.names += [] if operator.is_view or name in self.views else [name]
        return operator(*args, **(kwargs or {}))


def fresh(device="cpu", every=8, most=16):
    """An episode of three rows with 19 tokens in float32, as yet without a pick."""
    torch.manual_seed(0)
    net = sp.StepPrune(replace(SMALL, width=64)).to(device).requires_grad_(False)
    memory = torch.randn(3, 20, 64, device=device)
    valid = torch.ones(3, 19, dtype=torch.bool, device=device)
    return sp.Episode(net.decoder, 1., memory, net.start, valid, sp.NEVER, 1, most, every)


def test_an_episode_waits_for_no_device_and_a_pick_is_few_operators():
    """Tensors that hold no values would fail at the first look at one."""
    fresh("meta").step()
    assert [x.shape for x in fresh("meta").run(may_stop=False)] == [(3, 16)] * 2
    episode, operators = fresh(), Operators()
    with operators:
        episode.step()
    assert len(operators.names) <= 60, sorted(operators.names)


@torch.no_grad()
def test_a_pick_compiles_whole_and_once_for_all_episodes():
    torch._dynamo.reset()
    step = torch.compile(sp.Episode.step, fullgraph=True, backend="aot_eager")
    plain = fresh()
    first, second = fresh(), fresh()
    for _ in range(9):
        for run in (lambda: step(first), lambda: step(second), plain.step):
            run()
    assert torch.equal(first.picks, plain.picks) and torch.equal(second.picks, plain.picks)
    assert all(len(set(row)) == 9 for row in plain.picks[:, :9].tolist())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_pick_is_at_most_30_kernels(monkeypatch):
    """Fused ones, matrix products and attention together, in the program that is written for the
    CPU; it is not translated here, which takes minutes."""
    from torch._inductor.graph import GraphLowering  # slow to import

    written = []

    def stop_here(code):
        written.append(code)
        raise StopIteration
    monkeypatch.setattr(GraphLowering, "save_output_code", stop_here)
    torch._dynamo.reset()
    step = torch.compile(sp.Episode.step, fullgraph=True, options={"fx_graph_cache": False})
    with pytest.raises(Exception, match="StopIteration"):
        step(fresh())
    calls = [line for line in written[0].partition("def call(")[2].splitlines()
             if re.match(r"\s+(\w+ = )?(cpp_fused|extern_kernels|torch\.ops)", line)]
    assert 11 <= len(calls) <= 30, calls                        # eleven are linear maps


def test_replay_gives_the_loops_pi_and_with_all_hops_its_gradient():
    net, data = model(hops=-1), inputs()
    memory = net.memory(*data).detach().requires_grad_()
    episode = net.rollout(memory, data[1], most=6)
    weight = torch.randn_like(episode.pi)
    leaves = [memory, net.start, *net.decoder.parameters()]

    def gradient(pi):
        grads = torch.autograd.grad((pi * weight).sum(), leaves, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])
    full, off = gradient(episode.pi), {}
    for hops in (0, 1, 5):
        pi = net.replay(memory, data[1], episode.picks, hops)
        assert torch.allclose(pi, episode.pi, atol=1e-12)
        off[hops] = ((gradient(pi) - full).norm() / full.norm()).item()
    assert off[5] < 1e-10 and off[1] > 1e-4 and off[0] > 1e-4


def test_no_token_twice_and_never_a_padded_one():
    net, data = model(), inputs()
    for row, ok in zip(net.picks(*asked(*data), stop_bias=-1e4), data[1]):
        assert len(row) == len(row.unique()) == ok.sum() and ok[row].all()


@pytest.mark.parametrize("max_steps", [7, 40])
def test_a_row_in_a_batch_is_the_row_alone(max_steps):
    """Also where max_steps is more than the picture has tokens."""
    net, (v, valid, text, text_valid) = model(k_rule="expected", max_steps=max_steps), inputs(4)
    net.eval()
    _, a, episode, expected = net(v, valid, text, text_valid, 0.2)
    assert len(set(episode.count.tolist())) > 1        # or the batch would show nothing
    together = net.picks(*asked(v, valid, text, text_valid))
    for b in range(4):
        n, words = valid[b].sum(), text_valid[b].sum()
        alone = (v[b:b + 1, :n], valid[b:b + 1, :n],
                 text[b:b + 1, :words], text_valid[b:b + 1, :words])
        _, a1, episode1, expected1 = net(*alone, 0.2)
        assert episode1.count[0] == episode.count[b]
        assert torch.allclose(expected1[0], expected[b], atol=1e-10)
        assert torch.allclose(a1[0], a[b, :n], atol=1e-8) and not a[b, n:].any()
        picks = together[b].tolist()
        assert picks == net.picks(*asked(*alone))[0].tolist()
        assert picks == episode.picks[b, :len(picks)].tolist()


def test_an_episode_has_at_most_as_many_picks_as_the_picture_has_tokens():
    """max_steps above that is no error: pictures at native resolution differ."""
    net, data = model(max_steps=40, k_rule="expected"), inputs(4)
    memory = net.memory(*data)
    endless = net.rollout(memory, data[1], -1e4)
    assert endless.pi.shape[1] == 9 and endless.count.tolist() == data[1].sum(1).tolist()
    assert torch.allclose(net.replay(memory, data[1], endless.picks)[:, 1:, :-1].sum(-1) > 0,
                          endless.pi[:, 1:, :-1].sum(-1) > 0)
    out, a, episode, expected = net(*data, 0.2)
    assert out.isfinite().all() and (episode.count <= data[1].sum(1)).all()
    assert torch.allclose(a.sum(1), expected, atol=1e-6)
    expected.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_stop_at_once_never_and_in_between():
    net, data = model(), inputs(4)
    rows, n = asked(*data), data[1].sum(1).tolist()
    assert [len(p) for p in net.picks(*rows, stop_bias=1e4)] == [1] * 4
    assert [len(p) for p in net.picks(*rows, stop_bias=-1e4)] == n
    assert [len(p) for p in net.picks(*rows, stop_bias=-1e4, most=5)] == [5] * 4
    assert [len(p) for p in net.picks(*rows, stop_bias=1e4, least=2)] == [2] * 4


def test_select_keeps_exactly_the_first_k_picks_ascending():
    net, data = model(), inputs(4)
    rows, n = asked(*data), data[1].sum(1).tolist()
    orders = net.picks(*rows, stop_bias=-1e4)
    for keep in (1, 3, 7, n, [3, 1, 9, 7], torch.tensor([1, 2, 3, 4])):
        ks = [keep] * 4 if isinstance(keep, int) else [int(k) for k in keep]
        for row, order, k in zip(net.select(*rows, keep), orders, ks, strict=True):
            assert row.tolist() == sorted(order[:k].tolist()) and row.dtype == torch.int64
    for k in (1, 3, 7):                                # the same as an episode made to have k picks
        made = net.picks(*rows, least=k, most=k)
        assert [row.tolist() for row in made] == [row[:k].tolist() for row in orders]


def test_scores_are_the_turns_counted_from_the_end():
    net, data = model(max_steps=2), inputs(4)
    rows = asked(*data)
    scores = net.scores(*rows).split(data[1].sum(1).tolist())
    for row, order in zip(scores, net.picks(*rows, stop_bias=-1e4, most=4), strict=True):
        assert row[order].tolist() == [1, 0.75, 0.5, 0.25]          # 4: twice max_steps
        assert row.sum() == 2.5


def test_one_long_episode_tells_where_every_stop_bias_ends():
    """What ways() calibrates with: the same picks and counts as a run with that bias."""
    net, data = model(), inputs(4, n=12)
    episode = net.rollout(net.memory(*data), data[1], -1e4, most=9)
    counts = set()
    for bias in torch.linspace(-3, 3, 25).tolist():
        n = sp.stops(episode.margin, bias)
        picks = net.picks(*asked(*data), stop_bias=bias, most=9)
        long = [row[:k].tolist() for row, k in zip(episode.picks, n.tolist())]
        assert [row.tolist() for row in picks] == long
        counts.add(tuple(n.tolist()))
    assert len(counts) > 5
    for mean in (1, 2.5, 4, 9):
        bias = sp.calibrate(episode.margin, mean)
        n = sp.stops(episode.margin, bias).double().mean()
        assert n <= mean and sp.stops(episode.margin, bias - 1e-6).double().mean() >= n


def test_ways_steer_the_mean_and_keep_exactly_k(capsys):
    """K is a mean over the calibration questions, below 1 of their tokens; no question keeps more
    than twice max_steps, or twice the mean."""
    net = model(max_steps=5)
    batches = [asked(*inputs(4, n=12, seed=seed)) for seed in (1, 2, 3)]
    ways = net.ways(["exactly"], [2, 0.5], lambda: iter(batches))
    shown = capsys.readouterr().out
    assert shown.startswith("unsteered, it keeps ") and " for 2, " in shown and " for 0.5" in shown
    assert list(ways) == ["", " exactly"] and list(net.ways([], [2], lambda: batches)) == [""]
    assert all(way.reads_question for way in ways.values())
    assert ways[""].adaptive and not ways[" exactly"].adaptive
    means = {}
    for k in (2, 0.5):
        kept = [row for units, question in batches
                for row in ways[""].select(SimpleNamespace(units=units, question=question), k)]
        assert all((row.diff() > 0).all() and 1 <= len(row) <= 10 for row in kept)
        means[k] = sum(map(len, kept)) / len(kept)
    assert 1 < means[2] <= 2 < means[0.5] <= 6 and means[0.5] > 4
    question_batch = SimpleNamespace(units=batches[0][0], question=batches[0][1])
    assert [len(row) for row in ways[" exactly"].select(question_batch, 4)] == [4] * 4
    with pytest.raises(ValueError, match="ways=.*gated"):
        net.ways(["gated"], [2], lambda: batches)
    # the episodes are as long as K needs; a picture that has fewer tokens keeps them all
    ways = net.ways([], [11, 40], lambda: batches)
    kept = [row for units, question in batches
            for row in ways[""].select(SimpleNamespace(units=units, question=question), 11)]
    assert 10 < sum(map(len, kept)) / len(kept) <= 11
    tokens = question_batch.units.pad()[1].sum(1).tolist()
    assert [len(row) for row in ways[""].select(question_batch, 40)] == tokens


def test_running_mean_of_the_count():
    net, data = model(k_rule="batch_mean", momentum=0.75).train(), inputs(4)
    count = seen(net, *data) and net(*data, 0.2)[2].count.double().mean()
    assert net.k_bar == count
    net.k_bar = torch.tensor(8.0).double()
    seen(net, *data)
    count = net(*data, 0.2)[2].count.double().mean()
    assert net.k_bar.item() == pytest.approx(0.75 * 8 + 0.25 * count.item(), rel=1e-6)
    before = net.k_bar.clone()
    net.eval()(*data, 0.2)
    assert net.k_bar == before
    still = seen(model(k_rule="expected"), *data)
    assert still.k_bar == 0                            # nobody asks for it


@pytest.fixture(scope="module")
def tiny():
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float64)
    scenes = Dialogues(0, 4, questions=2)
    return vlm, [scenes[i] for i in range(4)]


def part_of(vlm, items):
    """A batch of pictures with a row for each question, as data/batches.py makes it."""
    owner = [b for b, (_, turns) in enumerate(items) for _ in turns[1:]]
    turns = [[turn] for _, dialogue in items for turn in dialogue[1:]]
    rows = vlm.batch([items[b][0] for b in owner], turns)
    return SimpleNamespace(pictures=vlm.pictures([image for image, _ in items]), rows=rows,
                           owner=owner, units=None, answers=int((rows["labels"] >= 0).sum()))


def trained_in_parts(tiny, count: int, k_rule: str):
    """StepPrune after two steps of gradient descent in so many parts, K_bar after each, and the
    parts' mean counts."""
    vlm, items = tiny
    size = len(items) // count
    batches = [part_of(vlm, items[i:i + size]) for i in range(0, len(items), size)]
    torch.manual_seed(0)
    cfg = sp.Config.of(vlm, max_steps=16, heads=2, k_rule=k_rule, text_steps=1)
    net, k_bars, counts = sp.StepPrune(cfg).double().train(), [], set()
    for number in (3, 4):
        step = step_of(number, 10, answers=sum(batch.answers for batch in batches),
                       rows=sum(len(batch.owner) for batch in batches))
        parts = [(batch, net.read(vlm, batch)) for batch in batches]
        net.observe(vlm, parts, step)
        k_bars.append(net.k_bar.item())
        for first, (batch, units) in zip(range(0, len(items), size), parts):
            step.generators = lambda owner, first=first: [
                torch.Generator().manual_seed(100 * (first + b) + owner[:row].count(b))
                for row, b in enumerate(owner)]
            loss, log = net.loss(vlm, batch, units, step)
            loss.backward()
            counts.add(log["K"])
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad
                p.grad = None
    return net, k_bars, counts


@pytest.mark.parametrize("k_rule", ["batch_mean", "expected"])
def test_the_number_of_parts_changes_neither_k_bar_nor_the_selector(tiny, k_rule):
    """K_bar is updated once a step, not once a part."""
    whole, k_bars, _ = trained_in_parts(tiny, 1, k_rule)
    assert all(k_bars) == (k_rule == "batch_mean")
    for count in (2, 4):
        parts, same_k_bars, counts = trained_in_parts(tiny, count, k_rule)
        assert same_k_bars == k_bars
        assert len(counts) > 1                         # else any order of updates would do
        for name, value in whole.state_dict().items():
            assert torch.allclose(value.double(), parts.state_dict()[name].double(),
                                  rtol=1e-6, atol=1e-9), name


def test_the_loss_is_equation_15(tiny):
    """-log p of the answers through the gate, plus lambda times each row's expected share."""
    vlm, net, batch, units, (loss, log) = loss_of(tiny)
    gated, a, episode, expected = net(*units.pad(), *vlm.question(batch.rows), log["tau"], 1.0,
                                      noise_of(batch.owner))
    nll = vlm.loss(vlm.embed(batch.rows, units, units.flat(gated)))
    price = sp.length_weight(67, 100, 3.0, 0.1, sp.fall(67, 100)) * (expected / 144).sum() / 10
    assert loss.item() == pytest.approx((nll * batch.answers / 40 + price).item(), rel=1e-9)
    assert log["nll"] == pytest.approx(nll.item()) and 0.1 < log["lambda"] < 3
    assert log["K"] == episode.count.double().mean() and log["K_soft"] < 12
    loss.backward()
    assert net.stop.grad.abs().sum() > 0 and all(p.grad is None for p in vlm.parameters())


def test_start_aligns_on_64_pictures_unless_told_otherwise(tiny):
    vlm, items = tiny
    asked_for = []

    def first_batch(n):
        asked_for.append(n)
        return part_of(vlm, items[:3])
    for align in (True, False):
        torch.manual_seed(0)
        net = sp.StepPrune(sp.Config.of(vlm, heads=4, align=align))
        before = net.encoder.text.weight.clone()
        net.begin(vlm, first_batch)
        assert torch.equal(before, net.encoder.text.weight) != align
    assert asked_for == [64]


@pytest.mark.parametrize("k_rule", ["batch_mean", "expected"])
def test_the_gate_keeps_the_budget(k_rule):
    data = inputs(4)
    net = seen(model(k_rule=k_rule).train(), *data)
    out, a, episode, expected = net(*data, 0.2)
    assert out.shape == data[0].shape and out.dtype == data[0].dtype
    wanted = expected if k_rule == "expected" else net.k_bar.expand(4)
    assert torch.allclose(a.sum(1), wanted.to(a), atol=1e-6)


# ---- the encoder

def test_the_question_reaches_the_pointer_and_the_gate_holds_it_back():
    net, (v, valid, text, text_valid) = model(), inputs()

    def memory(words, g_text=1.0):
        return net.memory(v, valid, words, text_valid, g_text)
    other = text.flip(1)                               # the same words in another order
    assert not torch.allclose(memory(text), memory(other))
    assert torch.equal(memory(text, 0.0), memory(other, 0.0))
    loud = torch.where(text_valid[..., None], text, 1e3)
    assert torch.allclose(memory(text), memory(loud))
    assert [sp.text_gate(t, 4) for t in (0, 1, 4, 9)] == [0, 0.25, 1, 1]


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
    kept = linear.mT @ linear          # what 8 of 16 dimensions can tell about a token
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
@pytest.mark.parametrize("changes", [dict(hops=0), dict(hops=1), dict(hops=-1),
                                     dict(k_rule="expected"), dict(decoder_layers=1)])
def test_every_parameter_learns(patches, changes):
    data = inputs(3, patches=patches)
    net = seen(model(**changes).train(), *data)
    out, a, episode, expected = net(*data, 0.5)
    (out.square() * torch.randn_like(out)).sum().add(expected.sum()).backward()
    silent = [name for name, p in net.named_parameters()
              if p.grad is None or not p.grad.abs().sum() > 0]
    # a key's bias moves all logits alike; self-attention's value bias and norms are heard
    assert not [name for name in silent if "position" not in name]
    assert net.encoder.position.grad[:4].abs().sum() > 0


# ---- options

def test_what_trains_on_a_tiny_and_on_a_large_encoder():
    """Every option says what it is, and TINY and LARGE have options that there are."""
    method = runs.load_method("step")
    assert method is sp and method.Method is sp.StepPrune
    parser = HfArgumentParser(runs.options_class(sp.Config))
    assert parser.parse_args_into_dataclasses([])[0].k_rule == "expected"
    helps = {action.dest: action.help for action in parser._actions if action.dest != "help"}
    assert not {"width", "text_width"} & {*helps}
    for name, text in helps.items():
        assert "[ours" in text or "[paper]" in text or "Table 4" in text or "..." in text or (
            name.startswith("no_")), name
    for preset in (sp.TINY, sp.LARGE):
        cfg = sp.Config(**{k: v for k, v in preset.items() if k in helps})
        assert cfg.tau_start == 1 and cfg.max_steps == (48 if preset is sp.TINY else 192)


def test_the_sizes_are_the_vlms():
    vlm = SimpleNamespace(width=12, dim=34, adapter=SimpleNamespace(unlike_patches=0))
    cfg = sp.Config.of(vlm, gamma=0.5, heads=2)
    assert (cfg.width, cfg.text_width, cfg.gamma) == (12, 34, 0.5)


def test_names_in_checkpoints_are_those_of_earlier_releases():
    names = {name.split(".")[0] for name in sp.StepPrune(SMALL).state_dict()}
    assert names == {"start", "stop", "k_bar", "mean", "std", "count", "encoder", "decoder",
                     "denoiser"}
    net = sp.StepPrune(SMALL)
    net.load_state_dict({**net.state_dict(), "start": torch.full((16,), 2.0)})
    assert (net.start == 2).all()


# ---- bad input

@pytest.mark.parametrize("bad", [
    dict(k_rule="all"), dict(aggregation="sum"), dict(max_steps=0), dict(max_text=0),
    dict(decoder_layers=0), dict(gate="hard"), dict(denoiser="big"), dict(stop="no")])
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError, match=str(*bad)):
        model(**bad)


def test_calls_that_cannot_work():
    net, (v, valid, text, text_valid) = model(), inputs()
    units, question = asked(v, valid, text, text_valid)
    long = torch.randn(3, 7, 8).double(), torch.ones(3, 7, dtype=torch.bool)
    assert len(net.picks(units, long)) == 3             # max_text is 6: no limit
    empty = text, text_valid & torch.tensor([True, False, True])[:, None]
    with pytest.raises(ValueError, match="row 1 has an empty question"):
        net.picks(units, empty)
    for bias in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"stop_bias={bias}"):
            net.picks(units, question, stop_bias=bias)
    for how in (dict(least=0), dict(least=8), dict(least=3, most=2), dict(most=0)):
        with pytest.raises(ValueError, match="1 <= least <= most"):
            net.picks(units, question, **how)
    for keep, tokens in ((8, 7), ([9, 10, 7], 9), ([0, 1, 1], 9)):
        with pytest.raises(ValueError, match=f"keep=.* does not fit {tokens} visual tokens"):
            net.select(units, question, keep)
    with pytest.raises(ValueError, match="2 budgets for 3 images"):
        net.select(units, question, [1, 2])
    with pytest.raises(ValueError, match="a mean of 20 tokens: expected 1 to 5"):
        sp.calibrate(torch.zeros(2, 5), 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_by_row(bad):
    """Else all logits are NaN, and an argmax takes one token over and over."""
    net = model()
    v, valid, *question = inputs()
    before = net.picks(*asked(v, valid, *question), sp.NEVER, most=4)
    v[1, 3, 5] = bad
    units, text = asked(v, valid, *question)
    for use in (lambda: net.picks(units, text), lambda: net.select(units, text, 4),
                lambda: net.scores(units, text), lambda: net.calibrated([4], [(units, text)], 4)):
        with pytest.raises(ValueError, match="^row 1 has states of the tokens that are no finite"):
            use()
    for row in (0, 2):
        alone = asked(*(x[row:row + 1] for x in (v, valid, *question)))
        assert torch.equal(net.picks(*alone, sp.NEVER, most=4)[0], before[row])


# ---- at the edges

def test_calibrate_keeps_the_mean_itself_where_it_can_be_had():
    margin = torch.tensor([[9.0, 4, 3, 2, 1], [9, 8, 7, 6, 5]]).double()
    for mean in (1, 2.5, 3, 3.5, 4, 4.5, 5):
        bias = sp.calibrate(margin, mean)
        assert sp.stops(margin, bias).double().mean() == mean


def test_a_gradient_passes_as_many_picks_as_hops_says():
    """Through the last of T picks go T - 1 picks before it: with T - 1 hops the gradient is the
    loop's, with one fewer it is not."""
    net, data = model(hops=-1), inputs(1)
    memory = net.memory(*data).detach().requires_grad_()
    for steps in (2, 3, 4):
        episode = net.rollout(memory, data[1], least=steps, most=steps)
        weight = torch.randn_like(episode.pi[:, -1])

        def gradient(pi, weight=weight):
            return torch.autograd.grad((pi[:, -1] * weight).sum(), memory, retain_graph=True)[0]
        full = gradient(episode.pi)
        off = [(gradient(net.replay(memory, data[1], episode.picks, hops, steps)) - full).norm()
               / full.norm() for hops in range(steps + 1)]
        assert max(off[steps - 1:]) < 1e-9 and min(off[:steps - 1]) > 1e-6


def test_what_is_learned_as_a_vector_starts_small():
    torch.manual_seed(0)
    net = sp.StepPrune(replace(SMALL, width=64, max_text=64))
    assert net.encoder.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.start.std().item() == pytest.approx(0.02, rel=0.4)
    assert net.stop.std().item() == pytest.approx(1, rel=0.4)
