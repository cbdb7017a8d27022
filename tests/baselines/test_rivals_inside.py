"""The rivals inside the language model: their rules by hand, and the model under them equal to the
full sequence with every layer's own mask, sizes and positions."""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_prompt import QUESTIONS, full_embeds, stock_logits, stock_positions, token_id
from tiny_models import MODELS
from transformers import AutoModelForImageTextToText

import baselines
from baselines import at_depth, dart, fastv, mean_over_layers, pact, pdrop, sparsevlm
from baselines.inside import (
    attention_mask,
    generate_inside,
    logits_inside,
    no_past,
    run_layers,
    whole_rotary,
)
from benchmarks import answering, tiny_world
from benchmarks.answering import rows_of
from benchmarks.costs import token_budget
from common import FrozenVLM

EXACT = dict(rtol=0, atol=1e-10)
CLOSE = dict(rtol=0, atol=1e-9)
TURNS = [[(question, None)] for question in QUESTIONS]
LAST = dict(depth=3, layers=(1, 2), count="last")
# name -> stages for n visual tokens a row, on models of three layers
METHODS = {"fastv": lambda k, n: fastv.stages(k, n, layers=(2,)),
           "dart": lambda k, n: dart.stages(k, n, layers=(1,)),
           "pdrop": lambda k, n: pdrop.stages(k, n, **LAST),
           "sparsevlm": lambda k, n: sparsevlm.stages(k, n, **LAST),
           "sparsevlm_plus": lambda k, n: sparsevlm.stages(k, n, **LAST, plus=True),
           "pact": lambda k, n: pact.stages(k, n, layers=(1,))}
MODULES = {"fastv": fastv, "dart": dart, "pdrop": pdrop, "sparsevlm": sparsevlm, "pact": pact}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def heard(vlm, monkeypatch):
    """The logits that the model has given, call by call; no row ends before its time."""
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", -1)
    calls = []
    hook = vlm.model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out))
    yield calls
    hook.remove()


def visual(prompt):
    return prompt.is_visual.sum(1).tolist()


def spied(rules):
    """The same rules, and where their answers go: {layer: (keep, changes)}."""
    found = {}

    def spy(layer, rule):
        def look_at(view):
            answer = rule(view)
            found[layer] = answer if isinstance(answer, tuple) else (answer, {})
            return answer
        return look_at
    return {layer: spy(layer, rule) for layer, rule in rules.items()}, found


def plan(stock, batch, found, reindex):
    """For every layer of the full sequence: tokens that it sees (B, L), states to write over it
    [(row, columns, values)], additions to the logits of its keys (B, L), positions."""
    ids = batch["input_ids"]
    positions = stock_positions(stock, batch)
    size = torch.zeros_like(ids).double()
    slots, out = [(row == token_id(stock)).nonzero().flatten() for row in ids], []
    for layer in range(len(stock.model.language_model.layers)):
        writes = []
        if layer in found:
            keep, changes = found[layer]
            slots = [row[k] for row, k in zip(slots, keep)]
            for row, columns in enumerate(slots):
                if "embeds" in changes:
                    writes.append((row, columns, changes["embeds"][row]))
                if "log_size" in changes:
                    size[row, columns] = changes["log_size"][row].to(size)
        sees = batch["attention_mask"].bool() & (ids != token_id(stock))
        for row, left in enumerate(slots):
            sees[row, left] = True
        if layer in found and reindex:
            positions = (sees.cumsum(-1) - 1).clamp(min=0).expand_as(positions)
        out.append((sees, writes, size.clone(), positions))
    return out


def full_sequence(stock, batch, plans, steps):
    """Logits of the prompt (B, L, V), and of `steps` greedy tokens (B, steps, V), each step from
    scratch. No cache."""
    lm, embeds, answers, whole = stock.model.language_model, full_embeds(stock, batch), [], None

    def acting(i):
        def hook(module, args, kwargs):
            sees, writes, size, positions = plans[i]
            x, length = args[0].clone(), args[0].shape[1]
            for row, columns, values in writes:
                x[row, columns] = values
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            allowed = causal & sees[:, None] | torch.eye(length).bool()
            mask = torch.where(allowed, size[:, None].double(), -1e30)[:, None]
            rotary = lm.rotary_emb(x, positions)
            return (x, *args[1:]), kwargs | dict(attention_mask=mask, position_embeddings=rotary)
        return hook
    hooks = [layer.register_forward_pre_hook(acting(i), with_kwargs=True)
             for i, layer in enumerate(lm.layers)]
    with torch.no_grad():
        for _ in range(steps + 1):
            every = torch.ones_like(embeds[..., 0]).long()
            logits = stock_logits(stock, batch, embeds, every, plans[0][3])
            answers.append(logits[:, -1:])
            embeds = torch.cat([embeds, stock.get_input_embeddings()(answers[-1].argmax(-1))], 1)
            plans = [(F.pad(sees, (0, 1), value=True), writes, F.pad(size, (0, 1)),
                      torch.cat([positions, positions[..., -1:] + 1], -1))
                     for sees, writes, size, positions in plans]
            whole = logits if whole is None else whole
    for hook in hooks:
        hook.remove()
    return whole, torch.cat(answers[:steps], 1)


# ---------------------------------------------------------------------- exactness

@pytest.mark.parametrize("positions", ["original", "reindex"])
@pytest.mark.parametrize("name", METHODS)
def test_the_pruned_model_is_the_full_sequence_layer_by_layer(
        vlm, stock, asked, prompt, name, positions, heard):
    rules, found = spied(METHODS[name](5, visual(prompt)))
    with torch.no_grad():
        logits, left = logits_inside(vlm, prompt, rules, positions)
    plans = plan(stock, asked, found, positions == "reindex")
    expected, steps = full_sequence(stock, asked, plans, 5)
    assert visual(left) == [5] * 3
    torch.testing.assert_close(logits[left.mask.bool()], expected[plans[-1][0]], **CLOSE)
    torch.testing.assert_close(left.pos[..., left.mask.bool()], plans[-1][3][..., plans[-1][0]])
    heard.clear()
    texts = generate_inside(vlm, prompt, rules, 5, positions=positions)
    torch.testing.assert_close(torch.cat(heard, 1), steps, **CLOSE)
    assert texts == [vlm.tokenizer.decode(row, skip_special_tokens=True).strip()
                     for row in steps.argmax(-1)]


@pytest.mark.parametrize("name", METHODS)
def test_a_row_in_a_batch_is_the_row_alone_wherever_it_stands(vlm, pictures, prompt, name):
    wanted, order = visual(prompt), [2, 0, 1]
    with torch.no_grad():
        logits, left = logits_inside(vlm, prompt, METHODS[name](5, wanted))
        batch = vlm.batch([pictures[b] for b in order], [TURNS[b] for b in order])
        moved, others = logits_inside(vlm, vlm.embed(batch, vlm.encode(batch)),
                                          METHODS[name](5, [wanted[b] for b in order]))
        expected = logits[order][left.mask[order].bool()]
        torch.testing.assert_close(moved[others.mask.bool()], expected, **CLOSE)
        for b in range(3):
            batch = vlm.batch(pictures[b:b + 1], TURNS[b:b + 1])
            alone, rest = logits_inside(vlm, vlm.embed(batch, vlm.encode(batch)),
                                        METHODS[name](5, wanted[b:b + 1]))
            torch.testing.assert_close(logits[b, -alone.shape[1]:], alone[0], **CLOSE)
            assert torch.equal(left.origin[b, -alone.shape[1]:], rest.origin[0])


@pytest.mark.parametrize("name", METHODS)
def test_all_of_them_is_the_stock_model(vlm, prompt, name):
    # the smallest row has all, so K is the number of its tokens
    row = prompt.only(prompt.mask.bool())
    least = min(visual(prompt))
    b = visual(prompt).index(least)
    row = rows_of(row, [b])
    logits, left = logits_inside(vlm, row, METHODS[name](least, least))
    real = row.mask.bool()
    torch.testing.assert_close(logits[left.mask.bool()], vlm.logits(row)[real], **EXACT)
    assert generate_inside(vlm, row, METHODS[name](least, least), 5) == vlm.generate(row, 5)


@pytest.mark.parametrize("name", METHODS)
def test_exactly_k_distinct_and_the_same_again(vlm, prompt, name):
    for k in (1, 2, 4, 7):
        (_, left), (_, again) = (logits_inside(vlm, prompt, METHODS[name](k, visual(prompt)))
                                 for _ in range(2))
        for b, n in enumerate(visual(prompt)):
            origin = left.origin[b, left.is_visual[b]]
            assert len(origin) == k and (origin.diff() > 0).all()
            assert 0 <= origin.min() <= origin.max() < n
        assert torch.equal(left.origin, again.origin)


def test_sizes_are_tokens_repeated(vlm, prompt):
    """In the last layer nothing is behind a merged token but the text: there, size 3 is three times
    the token."""
    row = rows_of(prompt, [0])
    n, depth = visual(row)[0], len(vlm.lm.layers) - 1
    size = torch.arange(n) % 3 + 1
    sizes = {"log_size": [size.double().log()]}
    found, _ = logits_inside(vlm, row, {depth: lambda view: ([torch.arange(n)], sizes)})
    states = run_layers(vlm, row, no_past(row, {}), {}, depth=depth).embeds
    repeats = row.mask[0].clone()
    repeats[row.is_visual[0]] = size
    x, pos = states.repeat_interleave(repeats, 1), row.pos.repeat_interleave(repeats, -1)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
    x = vlm.lm.layers[depth](x, attention_mask=causal,
                             position_embeddings=vlm.lm.rotary_emb(x, pos))
    text = int(row.mask.sum()) - int(row.is_visual[0].nonzero()[-1]) - 1
    expected = vlm.model.lm_head(vlm.lm.norm(x))
    torch.testing.assert_close(found[:, -text:], expected[:, -text:], **EXACT)
    assert (found - vlm.logits(row))[:, -1].abs().max() > 1e-3


def test_eager_attention_changes_nothing(vlm, path, prompt):
    eager = FrozenVLM.from_pretrained(path, dtype=torch.float32, attn="eager")
    later = tuple(x.float() for x in prompt.later)
    single = replace(prompt, embeds=prompt.embeds.float(), later=later)
    for name in ("pact", "sparsevlm"):
        expected, left = logits_inside(vlm, prompt, METHODS[name](5, visual(prompt)))
        found, same = logits_inside(eager, single, METHODS[name](5, visual(prompt)))
        assert torch.equal(left.origin, same.origin)
        real = left.mask.bool()
        torch.testing.assert_close(found[real].double(), expected[real], rtol=0, atol=2e-4)


# ---------------------------------------------------------------------- what a rule can read

@pytest.fixture
def attended(path, stock, monkeypatch):
    """Run a batch through the stock model in eager mode -> its attention (B, H, L, L), layer by
    layer, in float64."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64,
                                                        attn_implementation="eager")
    seen, q_and_k = [], []

    def eager(module, q, k, v, attention_mask, scaling, **kwargs):
        groups = q.shape[1] // k.shape[1]
        logits = q @ k.repeat_interleave(groups, 1).mT * scaling
        if attention_mask is None:                     # a vision encoder of the same file
            return (logits.softmax(-1) @ v).transpose(1, 2), None
        weights = (logits + attention_mask).softmax(-1)
        seen.append(weights)
        q_and_k.append((q.transpose(1, 2), k.transpose(1, 2)))
        return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights
    attention = model.model.language_model.layers[0].self_attn
    monkeypatch.setattr(sys.modules[type(attention).__module__], "eager_attention_forward", eager)

    def run(batch):
        with torch.no_grad():
            stock_logits(model, batch, full_embeds(stock, batch), batch["attention_mask"],
                         stock_positions(stock, batch))
        return seen, q_and_k
    return run


def test_attention_queries_and_keys_are_the_stock_models(vlm, stock, asked, prompt, attended):
    views = {}

    def note(i):
        return lambda view: views.setdefault(i, view) and [torch.arange(n) for n in visual(prompt)]
    logits_inside(vlm, prompt, {i: note(i) for i in (1, 2)})
    seen, q_and_k = attended(asked)
    assert len(seen) == 3
    for i, view in views.items():
        for own in (False, True):
            layer = i if own else i - 1
            for name, expected in zip(("queries", "keys"), q_and_k[layer]):
                found = getattr(view, name)(own=own)
                real = prompt.mask.bool()
                torch.testing.assert_close(found[real], expected[real], **EXACT)
            for last in (1, view.behind.shape[1]):
                found = view.attention(last, own)
                for b, n in enumerate(visual(prompt)):
                    rows = view.behind[b, -last:]
                    expected = seen[layer][b][:, -last:][:, rows][..., prompt.is_visual[b]]
                    torch.testing.assert_close(found[b][:, rows, :n], expected, **EXACT)
                    assert not found[b, ..., n:].any()
        for behind, v in zip(view.behind, prompt.is_visual):
            text = len(v) - 1 - int(v.nonzero()[-1])
            assert behind[-text:].all() and behind.sum() == text
        bare = view.rotate(view.keys(own=True, rope=False))
        torch.testing.assert_close(bare, view.keys(own=True), **EXACT)
        turned_by = view.keys(own=True) - view.keys(own=True, rope=False)
        assert turned_by[prompt.mask.bool()].abs().max() > .1


def test_a_second_stage_reads_the_shortened_sequence(vlm, prompt):
    """Attention in front of layer 2 after a stage at 1: over what is left, sizes counted."""
    views, first = {}, [torch.tensor([0, 2, 5])] * 3
    size = [torch.tensor([0., 1., 2.]).double()] * 3

    def second(view):
        views[2] = view
        return [torch.arange(3)] * 3
    logits_inside(vlm, prompt, {1: lambda view: (first, {"log_size": size}), 2: second})
    view = views[2]
    assert torch.equal(view.origin, torch.tensor([[0, 2, 5]] * 3)) and view.states.shape[1] == 3
    q, k = view.queries(1), view.keys()
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k)[:, :, 0] * q.shape[-1] ** -.5
    logits[:, :, :] += view.prompt.log_size[:, None]
    for b in range(3):
        real = view.prompt.mask[b].bool()
        weights = logits[b, :, real].softmax(-1)[:, view.prompt.is_visual[b, real]]
        torch.testing.assert_close(view.attention()[b, :, 0], weights, **EXACT)
        assert sorted(view.prompt.log_size[b, view.prompt.is_visual[b]].tolist()) == [0, 1, 2]


def test_m_rope_axes_are_put_together_as_older_versions_leave_them(tmp_path):
    vlm = FrozenVLM.from_pretrained(MODELS["qwen"](tmp_path), dtype=torch.float64)
    pos, x = torch.randint(0, 50, (3, 2, 7)), torch.zeros(2, 7, 32).double()
    whole = vlm.lm.rotary_emb(x, pos)
    apart = [vlm.lm.rotary_emb(x, axis.expand(3, -1, -1)) for axis in pos]
    stacked = tuple(torch.stack(part) for part in zip(*apart))
    for found, expected in zip(whole_rotary(vlm, stacked), whole):
        assert torch.equal(found, expected)


# ---------------------------------------------------------------------- by hand

def test_fastv_by_hand():
    attention = torch.tensor([[1, 3, 0, 1, 4, 2], [3, 1, 6, 1, 4, 2]])[None, :, None] / 8
    view = SimpleNamespace(attention=lambda: attention, valid=torch.ones(1, 6).bool())
    # 2 2 3 1 4 2: the first of equals
    assert [k.tolist() for k in fastv.stages(3, 6)[2](view)] == [[0, 2, 4]]


def test_pdrop_by_hand():
    attention = torch.tensor([.1, .3, .2, .5, .0, .4])[None, None, None].expand(1, 2, 1, 6)
    view = SimpleNamespace(attention=lambda own: attention if own else None,
                           valid=torch.ones(1, 6).bool(), entered=[6])
    rules = pdrop.stages(None, 6, as_released=True)
    assert list(rules) == [8, 16, 24]
    assert [rules[i](view)[0].tolist() for i in rules] == [[1, 3, 5], [3], [3]]
    assert pdrop.shrink(576, .5, 3) == [288, 144, 72]
    assert pdrop.shrink(7, .5, 2) == [3, 1]            # truncated
    assert token_budget(576, {8: 288, 16: 144, 24: 72}, 32) == (576, 72, 270)


def test_dart_by_hand():
    """Keys make 0, 3, 4, 5 pivots, in the order 3, 5, 0, 4; then the text's one; the rest, 1 and 2,
    go to who asks."""
    angle = torch.tensor([0., 90, 170, 60, 100, 200]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    keys = torch.tensor([[3., 0], [1, 0], [0, 1], [9, 0], [0, 2], [4, 4]])
    text, text_keys = torch.tensor([[1., 0]]), torch.tensor([[1., 1]])
    assert dart.pick(x, keys, text, text_keys, 4).tolist() == [0, 3, 4, 5]
    # 3 at 60 degrees: 170 is farthest
    assert dart.pick(x, keys, text, text_keys, 5).tolist() == [0, 2, 3, 4, 5]
    assert dart.pick(x, keys, text, text_keys, 2).tolist() == [3, 5]
    more = torch.cat([x, x.flip(1), -x])  # 18 tokens; the four new keys are short
    long = torch.cat([keys, .1 * keys, .1 * keys])
    for k in range(1, 19):
        assert len(dart.pick(more, long, text, text_keys, k).unique()) == k
    # two identical tokens far from all pivots are both kept
    twins = torch.tensor([[1., 0], [1, 0], [1, 0], [1, 0], [-1, 0], [-1, 0]])
    twin_keys = torch.tensor([[5., 0], [5, 0], [5, 0], [5, 0], [1, 0], [1, 0]])
    assert dart.pick(twins, twin_keys, text[:0], text_keys[:0], 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_dart_as_released_keeps_four_more():
    torch.manual_seed(0)
    x, keys, text, text_keys = (torch.randn(n, 8) for n in (576, 576, 20, 20))
    for k, kept in ((64, 68), (128, 132), (192, 196)):
        released = dart.pick(x, keys, text, text_keys, k, as_released=True, first=35)
        assert len(released.unique()) == kept
        assert len(dart.pick(x, keys, text, text_keys, k).unique()) == k
    with pytest.raises(ValueError, match="580 tokens as released do not fit 576 visual tokens"):
        dart.pick(x, keys, text, text_keys, 576, as_released=True)


def test_raters_by_hand():
    """Two visual tokens, four of text behind them: the second and the fourth are above the average
    similarity."""
    e = torch.eye(3)
    embeds = torch.stack([e[2], e[0], e[1], e[2], 2 * e[0], e[2], 2 * e[1]])[None]
    visual = torch.tensor([[False, True, True, False, False, False, False]])
    view = SimpleNamespace(start=SimpleNamespace(embeds=embeds, is_visual=visual),
                           behind=torch.tensor([[True, True, True, True]]))
    assert sparsevlm.raters(view).tolist() == [[False, True, False, True]]
    view.start.embeds = embeds * 0  # nothing stands out: all rate
    assert sparsevlm.raters(view).all()
    weights = torch.arange(16.).view(1, 2, 4, 2)
    view = SimpleNamespace(start=SimpleNamespace(embeds=embeds, is_visual=visual),
                           behind=view.behind, attention=lambda last: weights)
    expected = torch.tensor([[(2 + 6 + 10 + 14) / 4, (3 + 7 + 11 + 15) / 4]])
    assert torch.allclose(sparsevlm.rating(view), expected)


def test_dpc_knn_by_hand():
    """Squared distance to the nearest other: 1 1 4 | 2.25 2.25 6.25, so the order of density is
    0 1 3 4 2 5 (of equals the first), the distance to a denser one 14 1 2 9 1.5 2.5: density times
    that is largest at 0, then at 3."""
    centres, cluster = sparsevlm.dpc_knn(torch.tensor([[0.], [1], [3], [10], [11.5], [14]]), 2)
    assert centres.tolist() == [0, 3] and cluster.tolist() == [0, 0, 0, 1, 1, 1]
    x = torch.tensor([[0.], [1], [3], [10], [11.5], [14]])
    centres, cluster = sparsevlm.dpc_knn(x[:1], 1)
    assert centres.tolist() == cluster.tolist() == [0]
    same = torch.ones(4, 2)  # of equals the first wins, a centre owns itself
    centres, cluster = sparsevlm.dpc_knn(same, 2)
    assert centres[0] == 0 and cluster[centres].tolist() == [0, 1]


def test_recycling_by_hand():
    """Best two stay; of four pruned int(.3 * 4) + 1 = 2 are merged into one, at the place of the
    first."""
    x, score = torch.arange(12.).view(6, 2), torch.tensor([.1, .9, .3, .2, .8, .0])
    best, centres, means = sparsevlm.recycle(x, score, 2, 1)
    assert best.tolist() == [1, 4] and centres.tolist() == [2]
    assert torch.equal(means, x[2:4].mean(0, keepdim=True))
    assert [sparsevlm.split(6, wanted) for wanted in (3, 6, 1)] == [(2, 1), (6, 0), (1, 0)]
    for n in (3, 40, 576):
        for wanted in range(1, n + 1, max(1, n // 19)):
            kept, clusters = sparsevlm.split(n, wanted)
            assert kept + clusters == wanted and kept >= 1
    # the released table's
    assert sparsevlm.split(576, 309) == (300, 9) and sparsevlm.split(312, 117) == (110, 7)


def test_euti_by_hand():
    """One head, two tokens: the mean query is (1, 0), logits 2 and 0 over sqrt(2), norms 1 and
    5."""
    q, k = torch.tensor([[[2., 0]], [[0., 0]]]), torch.tensor([[[2., 1]], [[0., 3]]])
    share = torch.tensor([2 / 2 ** .5, 0]).softmax(0)
    norm = torch.tensor([1., 5])
    torch.testing.assert_close(pact.importance(q, k, norm), share * norm)
    two = pact.importance(torch.cat([q, q], 1), k, torch.ones(2))  # grouped queries
    torch.testing.assert_close(two, share)


def test_dbdpc_by_hand():
    """Angles 0 10 20 | 90 100 | 180 at a cutoff of 1 - cos 15. What lies in the middle of all is
    densest: 90, which takes 100; 20, which takes 10; 0 and 180 are left."""
    angle = torch.tensor([0., 10, 20, 90, 100, 180]).double().deg2rad()
    keys = torch.stack([angle.cos(), angle.sin()], 1)
    distance = (1 - keys @ keys.mT).clamp(min=0).fill_diagonal_(0.)
    density = [sum(np.exp(-(1 - np.cos(a - b)) ** 2 / 4) for b in angle.tolist())
               for a in angle.tolist()]
    assert np.argsort(density).tolist()[::-1] == [3, 4, 2, 1, 0, 5]
    assert pact.cluster(distance, None, 1 - np.cos(np.deg2rad(15)))[0].tolist() == [0, 2, 3, 5]
    for k in range(1, 7):
        assert len(pact.cluster(distance, k)[0].unique()) == k
    x, score = torch.arange(12.).view(6, 2).double(), torch.tensor([5., 4, 3, 2, 1, 0])
    kept, means, sizes = pact.merge([x], [keys], [score], 2, share=.5)[0]  # survivors 0, 1, 2
    assert len(kept) == 2 and set(kept.tolist()) < {0, 1, 2} and sizes.tolist() in ([1, 2], [2, 1])
    merged = int(sizes.argmax())
    assert means[1 - merged].equal(x[kept[1 - merged]])
    assert means[merged].tolist() != x[kept[merged]].tolist()


def test_pruned_tokens_join_within_one_and_a_half_cutoffs():
    angle = torch.tensor([0., 5, 17, 60]).double().deg2rad()
    keys = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.tensor([[0.], [1], [2], [3]]).double()
    cutoff = 1 - float(torch.tensor(15.).deg2rad().cos())  # 1.5 of it is 18.4 degrees
    score = torch.tensor([9., 8, 1, 1])
    kept, means, sizes = pact.merge([x], [keys], [score], None, share=.5, cutoff=cutoff)[0]
    assert kept.tolist() == [0] and sizes.tolist() == [3] and means.tolist() == [[1.]]
    same = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(6, 64)
    # rounding loses none
    whole = pact.merge([torch.ones(6, 1)], [same], [torch.arange(6.)], 2, share=1.)[0]
    assert whole[2].sum() == 6


def test_density_order_in_rounds_is_one_by_one():
    torch.manual_seed(1)
    for _ in range(20):
        keys = F.normalize(torch.randn(40, 3).double(), dim=1)
        distance, order = (1 - keys @ keys.mT).clamp(min=0).fill_diagonal_(0.), torch.randperm(40)
        for cutoff in (.01, .1, .5):
            greedy = []
            for i in order.argsort().tolist():
                if all(distance[i, j] > cutoff for j in greedy):
                    greedy.append(i)
            centre = pact.centres_within(distance, order, cutoff)
            assert centre.nonzero().flatten().tolist() == sorted(greedy)


# ---------------------------------------------------------------------- budgets, quirks

@pytest.mark.parametrize("layers, k, expected", [
    ((8, 16, 24), 192, [145, 36, 9]), ((2, 6, 15), 192, [334, 193, 112]),
    ((2, 6, 15), 128, [257, 115, 51]), ((2, 6, 15), 64, [129, 29, 6]),
    ((2, 8, 16), 192, [322, 180, 100]), ((2, 8, 16), 64, [110, 21, 4])])
def test_pdrops_schedule_has_the_average(layers, k, expected):
    counts = pdrop.schedule(k, 576, 32, layers)
    mean = token_budget(576, dict(zip(layers, counts)), 32)[2]
    assert k - 1 < mean <= k and max(abs(a - b) for a, b in zip(counts, expected)) <= 3
    assert mean_over_layers(counts, 576, 32, layers) == mean
    assert sorted(counts, reverse=True) == counts


def test_schedules_of_every_budget():
    for schedule in (pdrop.schedule, sparsevlm.schedule):
        for n, depth, layers in ((576, 32, (3, 7, 16)), (300, 28, (3, 7, 16)), (144, 4, (1, 2, 3))):
            for k in range(n // 9, n + 1, n // 9):
                if k < mean_over_layers([1] * 3, n, depth, layers):
                    continue
                counts = schedule(k, n, depth, layers)
                assert k - 1 < token_budget(n, dict(zip(layers, counts)), depth)[2] <= k
                assert all(n >= a >= b >= 1 for a, b in zip(counts, counts[1:]))
                last = schedule(k, n, depth, layers, "last")
                assert last[-1] == k and all(n >= a >= b >= 1 for a, b in zip(last, last[1:]))
            assert schedule(n, n, depth, layers) == [n] * 3


@pytest.mark.parametrize("count", ["average", "last"])
@pytest.mark.parametrize("schedule", [pdrop.schedule, sparsevlm.schedule,
                                      partial(sparsevlm.schedule, plus=True)],
                         ids=["pdrop", "sparsevlm", "plus"])
def test_fewer_tokens_never_cost_more(schedule, count):
    """Over every K, at real depths, tiny ones and any number of stages."""
    for n, depth, layers in ((576, 32, (3, 7, 16)), (576, 40, (3, 7, 16)), (391, 28, (3, 7, 16)),
                             (144, 4, (1, 2, 3)), (37, 6, (1, 3)), (64, 8, (2,))):
        before = 0.
        for k in range(1, n + 1):
            if count == "average" and k < mean_over_layers([1] * len(layers), n, depth, layers):
                continue
            counts = schedule(k, n, depth, layers, count)
            mean = mean_over_layers(counts, n, depth, layers)
            assert mean >= before, (n, depth, k)
            assert k - 1 < mean <= k if count == "average" else counts[-1] == k
            assert all(a >= b for a, b in zip([n, *counts], [*counts, 1]))
            before = mean


def test_sparsevlm_meets_the_released_rows():
    """Each at its own last number, split as released: the same kept, the same recycled."""
    left = [(309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18)]
    for row, kept in zip(left, sparsevlm.TABLE.values()):
        assert sparsevlm.schedule(row[-1], 576, count="last") == [*row]
        assert sparsevlm.schedule(2 * row[-1], 1152, count="last") == [2 * x for x in row]
        assert [sparsevlm.split(n, x)[0] for n, x in zip((576, *row), row)] == [*kept]
    for row in sparsevlm.PLUS.values():
        assert sparsevlm.schedule(row[-1], 576, count="last", plus=True) == [*row]
    # the first two have means of 206.5 and 145.4 by what enters
    for k, row in zip((207, 146), left):
        assert max(abs(a - b) for a, b in zip(sparsevlm.schedule(k, 576), row)) <= 5


def test_impossible_averages_are_refused():
    with pytest.raises(ValueError, match=r"keep=64 of 576 .* layers=\(8, 16, 24\) the least is "
                                         r"144.8; layers=\(2, 4, 6\) would do"):
        pdrop.stages(64, 576)
    with pytest.raises(ValueError, match="layers=\\(4, 8, 12\\) would do"):
        pdrop.stages(128, [600, 576])
    assert pdrop.stages(64, 576, layers=(2, 4, 6)) and pdrop.stages(64, 576, count="last")
    with pytest.raises(ValueError, match="the least is 36.8; no stages would do, count='last'"):
        pdrop.stages(16, 144, 4, (1, 2, 3))
    with pytest.raises(ValueError, match="the least is 36.8; expected more, earlier layers="):
        sparsevlm.stages(16, 144, 4, (1, 2, 3))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("keep", [0, -1, 577])
def test_budgets_that_do_not_fit_are_refused(name, keep):
    with pytest.raises(ValueError, match=f"keep={keep} does not fit 576 visual tokens"):
        MODULES[name].stages(keep, [576, 600])


def test_the_papers_own_accounting():
    """FastV at 2 of 32; SparseVLM's released tables, whose names count what leaves a layer."""
    assert [token_budget(576, {2: k}, 32)[2] for k in (192, 128, 64)] == [216, 156, 96]
    tables = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}
    for k, after in tables.items():
        left = 576
        for kept, expected in zip(sparsevlm.TABLE[k], after):
            left = min(kept, left - 1) + sparsevlm.recycled(left - kept)[1]
            assert left == expected
        enters = token_budget(576, dict(zip((3, 7, 16), after)), 32)[2]
        leaves = token_budget(576, dict(zip((2, 6, 15), after)), 32)[2]
        assert abs(leaves - k) < 1.1 and 14 < enters - leaves < 18
    assert token_budget(576, {}, 32) == (576, 576, 576)


def test_sparsevlm_as_released_appends_and_takes_the_table(vlm, prompt, monkeypatch):
    monkeypatch.setattr(sparsevlm, "TABLE", {5: (8, 5)})
    views = {}
    rules, found = spied(sparsevlm.stages(5, visual(prompt), 3, (1, 2), as_released=True))
    rules = {i: lambda view, i=i, rule=rule: views.setdefault(i, view) and rule(view)
             for i, rule in rules.items()}
    _, left = logits_inside(vlm, prompt, rules, "reindex")
    for b, n in enumerate(visual(prompt)):
        there = n
        for layer, wanted in ((1, 8), (2, 5)):
            kept, (keep, changes) = min(wanted, there - 1), found[layer]
            clusters, states = sparsevlm.recycled(there - kept)[1], views[layer].states[b, :there]
            assert len(keep[b]) == kept + clusters
            origin = changes["origin"][b]  # in spatial order, then the merged
            ascends = (origin[:kept].diff() > 0).all()
            assert layer == 2 or ascends and len(origin.unique()) == len(origin)
            first = changes["embeds"][b][:kept]
            assert all((states == x).all(1).any() for x in first)
            there = kept + clusters
        assert visual(left)[b] == there
        real = left.mask[b].bool()
        pos = left.pos[..., b, real]
        assert torch.equal(pos, torch.arange(int(real.sum())).expand_as(pos))
    with pytest.raises(ValueError, match=r"keep=6 with layers=\(3, 7, 16\): released are \[5\]"):
        sparsevlm.stages(6, 576, as_released=True)


def test_sparsevlm_plus_reads_through_the_rotary_bias(vlm, prompt):
    """The last row step by step: weights over q = k = 1 turned by both positions, then the two best
    of four heads."""
    views = {}
    everything = [torch.arange(n) for n in visual(prompt)]
    logits_inside(vlm, prompt, {1: lambda view: views.setdefault(1, view) and everything})
    view, b = views[1], 2
    rater = sparsevlm.raters(view)[b].nonzero().flatten()
    columns = prompt.is_visual[b].nonzero().flatten()
    cos, sin = (x[b] for x in view.rotary)
    turned = cos + torch.cat([-sin[:, :sin.shape[1] // 2], sin[:, sin.shape[1] // 2:]], 1)
    text = prompt.embeds.shape[1] - view.behind.shape[1] + rater
    bias = turned[text] @ turned[columns].T / cos.shape[1] ** .5
    weights = (view.attention(view.behind.shape[1])[b][:, rater, :len(columns)] / bias).mean(1)
    best = weights.sum(1).argsort(descending=True)[:2]
    found = sparsevlm.rating(view, plus=True)[b, :len(columns)]
    torch.testing.assert_close(found, weights[best].mean(0), **CLOSE)
    assert (sparsevlm.rating(view)[b] - sparsevlm.rating(view, plus=True)[b]).abs().max() > 1e-4


def test_pact_as_released_counts_the_system_prompt_too(vlm, prompt, monkeypatch):
    seen, importance = [], pact.importance
    monkeypatch.setattr(pact, "importance",
                        lambda q, k, norm: seen.append(len(q)) or importance(q, k, norm))
    for released in (False, True):
        rules = pact.stages(5, visual(prompt), layers=(1,), as_released=released)
        logits_inside(vlm, prompt, rules)
    ahead = [int(m[:int(v.nonzero()[-1]) + 1].sum()) for v, m in zip(prompt.is_visual, prompt.mask)]
    assert seen == visual(prompt) + ahead and seen[:3] != seen[3:]


def test_pact_without_a_budget_keeps_what_its_cutoff_makes(vlm, prompt):
    def left(cutoff):
        rules = pact.stages(None, visual(prompt), layers=(1,), cutoff=cutoff)
        return logits_inside(vlm, prompt, rules)[1]
    few, many = left(1.5), left(1e-9)
    assert visual(many) == [int(.55 * n) for n in visual(prompt)]
    assert max(visual(few)) < min(visual(many))
    assert few.log_size.exp()[few.is_visual].max() > 1 and not few.log_size[~few.is_visual].any()


# ---------------------------------------------------------------------- salience, errors, main

@pytest.mark.parametrize("name", ["fastv", "pdrop", "sparsevlm"])
def test_a_planted_salient_token_is_kept(vlm, prompt, name):
    """One token of each row is moved to where the last token's first queries view."""
    everything = [torch.arange(n) for n in visual(prompt)]
    column = [int(row.nonzero()[4]) for row in prompt.is_visual]
    planted, rows, views = prompt.embeds.clone(), torch.arange(3), []

    def read(view):
        if name == "sparsevlm":
            return sparsevlm.rating(view)
        return view.attention(own=name == "pdrop").mean(1)[:, 0]
    module, how = MODULES[name], {} if name == "fastv" else dict(depth=3, count="last")
    rules = module.stages(3, visual(prompt), layers=(1,), **how)
    for _ in range(10):  # up the gradient of its logarithm
        with torch.enable_grad():
            x = planted.clone().requires_grad_()
            rule = {1: lambda view: views.append(view) or everything}
            logits_inside(vlm, replace(prompt, embeds=x), rule)
            read(views[-1])[:, 4].log().sum().backward()
        step = F.normalize(x.grad[rows, column], dim=1)
        planted[rows, column] = 4 * F.normalize(planted[rows, column] + step, dim=1)
    _, before = logits_inside(vlm, prompt, rules)
    _, left = logits_inside(vlm, replace(prompt, embeds=planted), rules)
    kept = [[4 in x.origin[b, x.is_visual[b]].tolist() for b in range(3)] for x in (before, left)]
    assert all(kept[1]) and not all(kept[0]), kept


def test_nan_and_wrong_answers_of_a_rule_are_refused(vlm, prompt):
    bad = prompt.embeds.clone()
    bad[1, int(prompt.is_visual[1].nonzero()[0])] = torch.nan
    for name, method in METHODS.items():
        with pytest.raises(ValueError, match="NaN among the visual tokens in front of layer"):
            generate_inside(vlm, replace(prompt, embeds=bad), method(3, visual(prompt))), name
    keep = [torch.arange(2)] * 3
    with pytest.raises(ValueError, match=r"stages\[1\]\(...\) has log_size for \[1, 2, 2\] "
                                         "tokens: expected one for"):
        sizes = {"log_size": [torch.zeros(n) for n in (1, 2, 2)]}
        logits_inside(vlm, prompt, {1: lambda view: (keep, sizes)})
    with pytest.raises(ValueError, match="positions='new': expected 'original' or 'reindex'"):
        generate_inside(vlm, prompt, {}, positions="new")


def test_sizes_need_a_kernel_that_takes_them(vlm, prompt, monkeypatch):
    sized = replace(prompt, log_size=prompt.mask.double())
    monkeypatch.setattr(vlm.lm.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="attention 'flash_attention_2' takes no sizes of "
                                         "merged tokens"):
        attention_mask(vlm, sized, no_past(prompt, {})[0], None, 0)


def test_layers_of_shallow_models():
    assert [at_depth(x.LAYERS, 4) for x in (fastv, dart, pact, pdrop, sparsevlm)] == [
        (1,), (1,), (1,), (1, 2, 3), (1, 2, 3)]
    assert at_depth((8, 16, 24), 28) == (8, 16, 24) and at_depth((8, 16, 24), 16) == (4, 8, 12)


@pytest.mark.parametrize("model, methods", [
    ("tiny/llava", ["fastv", "pact", "pdrop", "sparsevlm_last", "random"]),
    ("tiny/qwen2_5_vl", ["fastv", "dart", "pdrop", "random"])])
def test_the_rivals_inside_answer(model, methods):
    vlm = FrozenVLM.from_pretrained(model, torch.float32)
    ways = {(name, k): baselines.way(name, vlm) for name in methods for k in (40, 16)}
    answers = {key: [] for key in ways}
    for part in answering.batches(tiny_world.load(family=vlm.family, n=28), 32):
        for key, rows in answering.answer_batch(vlm, part, ways).items():
            if key == ("pdrop", 16):  # no stages make so small a mean
                assert isinstance(rows, answering.Impossible)
                assert "keep=16 of 144 visual tokens" in str(rows)
            else:
                answers[key] += rows

    def mean(key, name):
        return np.mean([row[name] for row in answers[key] if row[name] is not None])

    def layer_mean(key):
        return np.mean([row["seen"][2] for row in answers[key]])
    assert 39 < layer_mean(("pdrop", 40)) <= 40
    for name in {*methods} - {"random", "pdrop"}:
        rows = answers[name, 16]
        assert {row["kept"] for row in rows} == {row["seen"][1] for row in rows} == {16}
        assert {row["seen"][0] for row in rows} == {144} and 16 < layer_mean((name, 16)) < 144
    assert layer_mean(("fastv", 16)) == (144 + 3 * 16) / 4
    for name in {"fastv", "sparsevlm_last"} & {*methods}:
        assert mean((name, 16), "recall") > mean(("random", 16), "recall") + .2
    accuracy = {key: tiny_world.score(rows)["average"] for key, rows in answers.items() if rows}
    assert accuracy["fastv", 16] > accuracy["random", 16]
