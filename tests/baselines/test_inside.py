"""Pruning inside the language model is hiding tokens from a layer on: in float64, on the real
classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from full_prompt import (
    QUESTIONS,
    full_embeds,
    stock_inputs,
    stock_logits,
    stock_positions,
    token_id,
)
from tiny_models import NATIVE, TEXT, internvl, llava_next
from transformers import AutoConfig, AutoModelForImageTextToText

from baselines.inside import Shown, check_layers, generate_inside, logits_inside, visual_states
from common import IGNORE, FrozenVLM, Prompt
from data.batches import Batch
from recon_selector import Config, ReconSelector

EXACT = dict(rtol=0, atol=1e-10)
CLOSE = dict(rtol=0, atol=1e-9)
TURNS = [[(question, None)] for question in QUESTIONS]
FIRST = [[0, 3, 7, 8], [1], [2, 4, 5, 6, 8]]
SECOND = [[1, 2], [0], [0, 3, 4]]  # of those that FIRST leaves
STAGES = [{1: FIRST}, {2: FIRST}, {1: FIRST, 2: SECOND}]

pytestmark = pytest.mark.usefixtures("one_thread")


def everything(view):
    return [torch.arange(n) for n in view.valid.sum(1)]


def fixed(stages, rows=slice(None)):
    """Rules that return what stages {layer: keep} says, of these rows."""
    def rule(keep):
        return lambda view: [torch.tensor(row) for row in keep[rows]]
    return {layer: rule(keep) for layer, keep in stages.items()}


def visible_by_layer(stock, batch, stages):
    """For every layer (B, L) bool: the tokens of the full prompt that it may still see, worked out
    row by row."""
    ids = batch["input_ids"]
    slots = [(row == token_id(stock)).nonzero().flatten() for row in ids]
    out = []
    for layer in range(len(stock.model.language_model.layers)):
        if layer in stages:
            slots = [row[keep] for row, keep in zip(slots, stages[layer])]
        visible = batch["attention_mask"].bool() & (ids != token_id(stock))
        for row, left in enumerate(slots):
            visible[row, left] = True
        out.append(visible)
    return out


def masked(stock, batch, embeds, positions, visible):
    """Logits of the full sequence and the input of every layer, each under its own 4-D mask. No
    cache."""
    length, states = embeds.shape[1], []
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    eye = torch.eye(length, dtype=torch.bool)

    def see_less(i):
        def hook(module, args, kwargs):
            states.append(args[0])
            return args, kwargs | dict(attention_mask=causal & visible[i][:, None, None] | eye)
        return hook

    layers = stock.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(see_less(i), with_kwargs=True)
             for i, layer in enumerate(layers)]
    with torch.no_grad():
        logits = stock_logits(stock, batch, embeds, visible[0].long(), positions)
    for hook in hooks:
        hook.remove()
    return logits, states


def masked_greedy(stock, batch, visible, steps):
    """Logits (B, steps, V) and their maxima (B, steps), every step from scratch."""
    embeds, positions, logits = full_embeds(stock, batch), stock_positions(stock, batch), []
    for _ in range(steps):
        logits.append(masked(stock, batch, embeds, positions, visible)[0][:, -1:])
        embeds = torch.cat([embeds, stock.get_input_embeddings()(logits[-1].argmax(-1))], 1)
        visible = [torch.cat([now, torch.ones_like(now[:, :1])], 1) for now in visible]
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    return torch.cat(logits, 1), torch.cat(logits, 1).argmax(-1)


@pytest.fixture
def heard(vlm):
    """The logits that the model has given, call by call."""
    calls = []
    hook = vlm.model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out))
    yield calls
    hook.remove()


# ---------------------------------------------------------------------- exactness

@pytest.mark.parametrize("stages", [{}, {1: everything, 2: everything}])
def test_without_pruning_it_is_the_stock_model(vlm, stock, asked, prompt, stages):
    real, positions = asked["attention_mask"].bool(), stock_positions(stock, asked)
    with torch.no_grad():
        inputs = stock_inputs(stock, asked) | dict(position_ids=positions)
        expected = stock(**inputs, use_cache=False).logits
        logits, left = logits_inside(vlm, prompt, stages)
    assert torch.equal(left.mask, prompt.mask) and torch.equal(left.is_visual, prompt.is_visual)
    torch.testing.assert_close(logits[real], expected[real], **EXACT)
    found = generate_inside(vlm, prompt, stages, 6)
    assert found == vlm.generate(prompt, 6) and max(len(text.split()) for text in found) >= 3


@pytest.mark.parametrize("stages", STAGES)
def test_pruned_within_is_hidden_from_that_layer_on(vlm, stock, asked, prompt, stages):
    visible, positions = visible_by_layer(stock, asked, stages), stock_positions(stock, asked)
    expected, _ = masked(stock, asked, full_embeds(stock, asked), positions, visible)
    with torch.no_grad():
        logits, left = logits_inside(vlm, prompt, fixed(stages))
    real = left.mask.bool()
    assert (left.mask.diff(dim=1) >= 0).all()  # left padded
    assert left.is_visual.sum(1).tolist() == [len(row) for row in stages[max(stages)]]
    torch.testing.assert_close(left.pos[..., real], positions[..., visible[-1]])
    torch.testing.assert_close(logits[real], expected[visible[-1]], **CLOSE)


@pytest.mark.parametrize("stages", STAGES)
def test_decoding_goes_on_under_the_same_masks(
        vlm, stock, asked, prompt, stages, heard, monkeypatch):
    # every row runs all steps
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", -1)
    found = generate_inside(vlm, prompt, fixed(stages), 7)
    logits, tokens = masked_greedy(stock, asked, visible_by_layer(stock, asked, stages), 7)
    assert found == [vlm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    torch.testing.assert_close(torch.cat(heard, 1), logits, **CLOSE)


def test_a_rule_sees_the_states_of_what_earlier_rules_left(vlm, stock, asked, prompt):
    stages, seen = {1: FIRST, 2: SECOND}, {}

    def spy(layer, rule):
        return lambda view: seen.setdefault(layer, (view.states, view.valid)) and rule(view)

    rules = {layer: spy(layer, rule) for layer, rule in fixed(stages).items()}
    generate_inside(vlm, prompt, rules, 3)
    _, states = masked(stock, asked, full_embeds(stock, asked), stock_positions(stock, asked),
                       visible_by_layer(stock, asked, stages))
    slots = [(row == vlm.image_id).nonzero().flatten() for row in asked["input_ids"]]
    for layer, left in ((1, slots), (2, [row[keep] for row, keep in zip(slots, FIRST)])):
        found, valid = seen[layer]
        assert valid.sum(1).tolist() == [len(row) for row in left] and not found[~valid].any()
        for row, columns in enumerate(left):
            expected = states[layer][row, columns]
            torch.testing.assert_close(found[row, :len(columns)], expected, **CLOSE)


@pytest.mark.parametrize("stages", STAGES[1:])
def test_a_row_in_a_batch_is_the_row_alone(vlm, pictures, prompt, stages):
    with torch.no_grad():
        logits, left = logits_inside(vlm, prompt, fixed(stages))
        texts = generate_inside(vlm, prompt, fixed(stages), 6)
        for row in range(len(pictures)):
            batch, only = vlm.batch(pictures[row:row + 1], TURNS[row:row + 1]), slice(row, row + 1)
            alone = vlm.embed(batch, vlm.encode(batch))
            expected, rest = logits_inside(vlm, alone, fixed(stages, only))
            assert rest.mask.all() and rest.mask.shape[1] == left.mask[row].sum()
            torch.testing.assert_close(logits[row, -expected.shape[1]:], expected[0], **EXACT)
            assert generate_inside(vlm, alone, fixed(stages, only), 6) == texts[only]


def test_a_row_without_visual_tokens_may_stay_without(vlm, asked, prompt):
    units, none = vlm.encode(asked), torch.tensor([], dtype=torch.int64)
    outside = vlm.prune(asked, units, [torch.tensor([0, 3, 7, 8]), none, torch.tensor([2])])
    last = int(outside.is_visual[2].sum())  # a newline may stand behind the unit
    keep = [torch.tensor([1, 3]), none, torch.arange(last)]
    logits, left = logits_inside(vlm, outside, {1: lambda view: keep})
    assert left.is_visual.sum(1).tolist() == [2, 0, last]
    for row, same in enumerate((False, True, True)):  # nothing is dropped from the last two
        assert torch.allclose(logits[row, -5:], vlm.logits(outside)[row, -5:], **EXACT) == same
    bare = vlm.prune(asked, units, [none] * 3)
    assert generate_inside(vlm, bare, {1: everything}, 4) == vlm.generate(bare, 4)


def test_labels_stay_with_their_tokens(vlm, pictures):
    batch = vlm.batch(pictures, [[(question, "red")] for question in QUESTIONS])
    prompt = vlm.embed(batch, vlm.encode(batch))
    _, left = logits_inside(vlm, prompt, fixed({1: FIRST}))
    assert ((left.labels != IGNORE).sum(1) == 2).all()  # the word and the end
    assert torch.equal(left.labels[:, -4:], prompt.labels[:, -4:])


def test_visual_states_are_what_enters_the_stock_layers(vlm, stock, asked, prompt):
    inputs = stock_inputs(stock, asked) | dict(position_ids=stock_positions(stock, asked))
    expected = []
    hooks = [block.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
             for block in stock.model.language_model.layers]
    with torch.no_grad():
        stock(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    ran, states = [], []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i))
             for i, block in enumerate(vlm.lm.layers)]
    for layer in range(3):
        states.append(visual_states(vlm, prompt, layer))
        visual = expected[layer][asked["input_ids"] == vlm.image_id]
        torch.testing.assert_close(states[-1], visual, **EXACT)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 0, 1]  # no layer, the first, the first two
    assert min((states[1] - states[i]).abs().max() for i in (0, 2)) > 0.1


def test_internvl_35_is_internvl_with_another_decoder(tmp_path, images):
    """Qwen3's, which normalises queries and keys: exact before the language model and inside."""
    old = AutoConfig.from_pretrained(internvl(tmp_path / "3")).text_config
    text = dict(TEXT, model_type="qwen3", head_dim=8, vocab_size=old.vocab_size,
                eos_token_id=old.eos_token_id)
    path = internvl(tmp_path / "3.5", text_config=text)
    vlm = FrozenVLM.from_pretrained(path, torch.float64)
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    batch = vlm.batch(images, TURNS)
    units, positions = vlm.encode(batch), stock_positions(stock, batch)
    real, embeds = batch["attention_mask"].bool(), full_embeds(stock, batch)
    keep = [torch.tensor(row) for row in FIRST]
    before = vlm.prune(batch, units, keep)
    with torch.no_grad():
        expected = stock(**stock_inputs(stock, batch), position_ids=positions,
                         use_cache=False).logits
        torch.testing.assert_close(vlm.logits(vlm.embed(batch, units))[real], expected[real],
                                   **EXACT)
        for stages, found in (({0: FIRST}, (vlm.logits(before), before)),
                              ({1: FIRST}, logits_inside(vlm, vlm.embed(batch, units),
                                                         fixed({1: FIRST})))):
            visible = visible_by_layer(stock, batch, stages)
            expected, _ = masked(stock, batch, embeds, positions, visible)
            logits, left = found
            torch.testing.assert_close(logits[left.mask.bool()], expected[visible[-1]], **CLOSE)


# ---------------------------------------------------------------------- units among them

def some(units, seed=0):
    """Of every row some units that have a token, of the second one alone."""
    draw = torch.Generator().manual_seed(seed)
    valid = units.pad(units.image_of)[1]
    return [here.nonzero().flatten()[torch.randperm(int(here.sum()), generator=draw)[:k]].sort()[0]
            for here, k in zip(valid, (5, 1, 7))]


def test_states_of_units_stand_in_the_units_order(vlm, asked, prompt):
    """In front of all layers they are the projected features; newlines are none of them."""
    units = vlm.encode(asked)
    found = Shown.of(vlm, asked, units).with_states(visual_states(vlm, prompt, 0))
    expected = vlm.project(units.feats)
    if units.has_token is not None:
        expected = expected * units.has_token[:, None]
    torch.testing.assert_close(found.feats, expected, **EXACT)
    assert (found.grid, found.views) == (units.grid, units.views)


@pytest.mark.parametrize("seed", range(4))
def test_a_newline_stays_while_a_unit_of_its_line_does(vlm, asked, prompt, seed):
    """The tokens that stay inside are those that FrozenVLM.prune() leaves before."""
    units = vlm.encode(asked)
    shown = Shown.of(vlm, asked, units)
    keep = some(units, seed)
    before = vlm.prune(asked, units, keep)
    for rows in ([0, 1, 2], [2, 0]):
        stay = shown.rows(rows).tokens([keep[b] for b in rows])
        for index, b in zip(stay, rows):
            expected = before.pos[..., b, before.is_visual[b]]
            assert torch.equal(prompt.pos[..., b, prompt.is_visual[b]][..., index], expected)
    for b, index in enumerate(shown.tokens(keep)):
        assert torch.equal(shown.units_of(b, index), keep[b])


def test_where_a_prompt_alone_tells_it_says_the_same(vlm, family, asked, prompt):
    plain = Shown.plain(vlm, prompt)
    assert (plain is not None) == (family in ("llava", *NATIVE))
    if plain:
        shown = Shown.of(vlm, asked, vlm.encode(asked))
        for a, b in zip(plain.unit + plain.line, shown.unit + shown.line):
            assert torch.equal(a, b)


@pytest.mark.parametrize("k", [6, "mask"])
def test_a_selector_of_units_sees_in_evaluation_what_it_saw_in_training(
        vlm, stock, family, pictures, k):
    """The same states choose the same units, crop by crop: K of them, whatever newlines stay
    beside; and pruned is hidden."""
    torch.manual_seed(0)
    net = ReconSelector(Config.of(vlm, layers=1, heads=2, select_after_layer=2)).double().eval()
    batch = vlm.batch(pictures, TURNS, ask_twice=True)
    units = vlm.encode(batch)
    shown = Shown.of(vlm, batch, units)
    trained = net.look(vlm, Batch(batch, batch, [0, 1, 2]))
    expected = net.select(trained, None, None if k == "mask" else k)
    seen = []

    def spied(rule):
        return lambda view: seen.append(rule(view)) or seen[-1]
    way = net.ways([], [k], None)[" mask" if k == "mask" else ""]
    rules = {i: spied(rule) for i, rule in way.stages(k, shown.units.counts).items()}
    prompt = vlm.embed(batch, units)
    logits, left = logits_inside(vlm, prompt, rules, shown=shown)
    chosen = [shown.units_of(b, index) for b, index in enumerate(seen[0])]
    for found, own in zip(chosen, expected):
        assert torch.equal(found, own) and (k == "mask" or len(found) == k)
    newlines = [len(index) - len(own) for index, own in zip(seen[0], chosen)]
    assert (max(newlines) > 0) == (family in ("llava_next", "llava_onevision"))
    crops = units.apart().counts
    assert len(net.read(vlm, Batch(batch, batch, [0, 1, 2])).grid) == len(crops)

    visible = visible_by_layer(stock, batch, {2: [index.tolist() for index in seen[0]]})
    hidden, _ = masked(stock, batch, full_embeds(stock, batch), stock_positions(stock, batch),
                       visible)
    torch.testing.assert_close(logits[left.mask.bool()], hidden[visible[-1]], **CLOSE)
    # more units than there are: all stay, and all newlines
    _, left = logits_inside(vlm, prompt, net.ways([], [999], None)[""].stages(999, []), shown=shown)
    assert torch.equal(left.mask, prompt.mask)
    if family not in ("llava", *NATIVE):
        with pytest.raises(ValueError, match="newlines or crops: expected shown=Shown.of"):
            logits_inside(vlm, prompt, rules)


# ---------------------------------------------------------------------- power

def test_reindexed_positions_would_be_noticed(vlm, prompt, monkeypatch):
    right, left = logits_inside(vlm, prompt, fixed({1: FIRST}))
    only = Prompt.only

    def reindexed(self, stays):
        found = only(self, stays)
        return replace(found, pos=(found.mask.cumsum(-1) - 1).clamp(min=0).expand_as(found.pos))

    monkeypatch.setattr(Prompt, "only", reindexed)
    wrong, _ = logits_inside(vlm, prompt, fixed({1: FIRST}))
    assert (right - wrong)[left.mask.bool()].abs().max() > 0.1


def test_the_layer_of_a_stage_matters(vlm, asked, prompt):
    keep = [torch.tensor(row) for row in FIRST]
    before = vlm.logits(vlm.prune(asked, vlm.encode(asked), keep))
    one, two = (logits_inside(vlm, prompt, fixed({layer: FIRST}))[0] for layer in (1, 2))
    before, one, two = (logits[:, -1] for logits in (before, one, two))
    assert (before - one).abs().max() > 0.1 and (one - two).abs().max() > 0.1


# ---------------------------------------------------------------------- stop, settings

def test_it_stops_where_generate_stops(vlm, prompt, heard, monkeypatch):
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", -1)
    generate_inside(vlm, prompt, {}, 7)
    free = torch.cat(heard, 1).argmax(-1).tolist()  # token by token, as if there were no end
    for ends in (free[0][2], [free[0][2], free[1][1], free[2][3]]):
        monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", ends)
        expected = vlm.generate(prompt, 7)
        heard.clear()
        assert generate_inside(vlm, prompt, {}, 7) == expected
        stops = [next((i for i, token in enumerate(row) if token in np.ravel(ends)), 6)
                 for row in free]
        assert len(heard) == max(stops) + 1
    # both a stop before the end, and one row before another
    assert len(heard) < 7 and len(set(stops)) > 1


def test_eager_attention_and_checkpointing_change_nothing(vlm, path, prompt):
    stages = fixed({1: FIRST, 2: SECOND})
    expected, words = logits_inside(vlm, prompt, stages)[0], generate_inside(vlm, prompt, stages, 6)
    # in float64, the stock eager attention turns padding into NaN: its softmax is in float32
    eager = FrozenVLM.from_pretrained(path, dtype=torch.float32, attn="eager")
    later = tuple(x.float() for x in prompt.later)
    single = replace(prompt, embeds=prompt.embeds.float(), later=later)
    found, left = logits_inside(eager, single, stages)
    real = left.mask.bool()
    torch.testing.assert_close(found[real].double(), expected[real], rtol=0, atol=1e-4)
    assert generate_inside(eager, single, stages, 6) == words
    vlm.checkpointing(True)
    try:
        assert generate_inside(vlm, prompt, stages, 6) == words and vlm.lm.training
    finally:
        vlm.checkpointing(False)


# ---------------------------------------------------------------------- errors

@pytest.mark.parametrize("keep, message", [
    ([[0]], r"stages\[2\]\(...\) has 1 rows: expected one per image, that is 3"),
    ([[0], [99], [0]], r"stages\[2\]\(...\)\[1\] spans 99 to 99: expected 0 to"),
    ([[0], [0], [-1]], r"stages\[2\]\(...\)\[2\] spans -1 to -1: expected 0 to"),
    ([[0], [1, 0], [0]], r"stages\[2\]\(...\)\[1\] = \[1, 0\]: expected strictly ascending"),
    ([[0], [0], [2, 2]], r"stages\[2\]\(...\)\[2\] = \[2, 2\]: expected strictly ascending"),
    ([[0.], [0.], [0.]], r"stages\[2\]\(...\)\[0\] is torch.float32 \(1,\): expected int64"),
])
def test_keep_is_checked(vlm, prompt, keep, message):
    with pytest.raises(ValueError, match=message):
        generate_inside(vlm, prompt, fixed({2: keep}))


def test_indices_count_what_is_left(vlm, prompt):
    with pytest.raises(ValueError, match=r"stages\[2\]\(...\)\[1\] spans 1 to 1: expected 0 to 0"):
        logits_inside(vlm, prompt, fixed({1: FIRST, 2: [[0], [1], [0]]}))


def test_a_row_may_not_lose_its_last_visual_token(vlm, prompt):
    none = torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"stages\[1\]\(...\)\[1\] is empty: expected at least "
                                         r"one of \d+ visual"):
        logits_inside(vlm, prompt, {1: lambda view: [torch.tensor([0]), none, torch.tensor([0])]})


@pytest.mark.parametrize("layer", [0, -1, 3, 1.5])
def test_stages_stand_between_layers(vlm, prompt, layer):
    for run in (logits_inside, generate_inside):
        with pytest.raises(ValueError, match=f"layer {layer}: expected one of 1 to 2"):
            run(vlm, prompt, {1: everything, layer: everything})
    if layer != 0:
        with pytest.raises(ValueError, match=f"layer {layer}: expected one of 0 to 2"):
            visual_states(vlm, prompt, layer)


@pytest.mark.parametrize("name, value, message", [
    ("layer_types", ["full_attention", "sliding_attention", "full_attention"],
     "full_attention, sliding_attention"),
    ("model_type", "gemma3_text",
     "'gemma3_text' with full_attention: expected one of llama, mistral, qwen2, "),
])
def test_other_decoders_are_refused(vlm, prompt, name, value, message, monkeypatch):
    monkeypatch.setattr(vlm.lm.config, name, value, raising=False)
    with pytest.raises(ValueError, match=message):
        generate_inside(vlm, prompt, {1: everything})
    with pytest.raises(ValueError, match=message):
        visual_states(vlm, prompt, 1)


def test_a_sliding_window_is_refused(tmp_path, monkeypatch):
    """Mistral's is in no list of layers."""
    vlm = FrozenVLM.from_pretrained(llava_next(tmp_path))
    check_layers(vlm, [1], 1)
    monkeypatch.setattr(vlm.lm.config, "sliding_window", 8)
    with pytest.raises(ValueError, match="'mistral' with sliding_attention: expected one of"):
        check_layers(vlm, [1], 1)
