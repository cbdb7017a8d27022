"""The pruned model is the full model with tokens hidden: checked in float64 on the real classes,
tiny and random."""

from dataclasses import replace

import pytest
import torch
from full_prompt import (
    ANSWERED,
    GRIDS,
    QUESTIONS,
    TOLERANCE,
    every,
    full_embeds,
    has_mrope,
    hidden_logits,
    stock_features,
    stock_inputs,
    stock_positions,
    units_at,
    visible_tokens,
)
from tiny_models import NATIVE, VIDEO, llava
from transformers import CLIPImageProcessor

from common import IGNORE, FrozenVLM
from stepprune import Config as StepConfig
from stepprune import StepPrune

pytestmark = pytest.mark.usefixtures("one_thread")


def greedy_reference(vlm, stock, batch, keep, steps):
    """Greedy words from the full, masked sequence, each step from scratch, at positions behind
    the full prompt."""
    embeds, positions = full_embeds(stock, batch), stock_positions(stock, batch)
    visible, tokens = visible_tokens(vlm, stock, batch, keep), []
    for _ in range(steps):
        tokens.append(hidden_logits(stock, batch, embeds, positions, visible)[:, -1:].argmax(-1))
        embeds = torch.cat([embeds, stock.get_input_embeddings()(tokens[-1])], 1)
        visible = torch.cat([visible, torch.ones_like(tokens[-1]).bool()], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    return decode(vlm, stock, torch.cat(tokens, 1))


def decode(vlm, stock, tokens):
    stop = stock.generation_config.eos_token_id
    rows = [row[: row.index(stop)] if stop in row else row for row in tokens.tolist()]
    return [vlm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def test_projected_units_are_the_stock_features(vlm, stock, asked, family):
    units, expected = vlm.encode(asked), stock_features(stock, asked)
    unit = torch.cat(
        [
            row + first
            for row, first in zip(
                units_at(vlm, stock, asked), torch.tensor([0, *units.counts]).cumsum(0)
            )
        ]
    )
    newline = torch.cat(units_at(vlm, stock, asked)) < 0
    assert newline.sum() == {"llava_next": 4 + 6 + 4, "llava_onevision": 3}.get(family, 0)
    with torch.no_grad():
        torch.testing.assert_close(
            vlm.project(units.feats)[unit[~newline]], expected[~newline], **TOLERANCE
        )
        prompt = vlm.embed(asked, units)
        torch.testing.assert_close(prompt.embeds[prompt.is_visual], expected, **TOLERANCE)


def test_keeping_every_unit_changes_nothing(vlm, stock, asked):
    units, real = vlm.encode(asked), asked["attention_mask"].bool()
    inputs = stock_inputs(stock, asked)
    if not has_mrope(stock):  # forward, unlike generate, would count the padding
        inputs["position_ids"] = stock_positions(stock, asked)
    with torch.no_grad():
        expected = stock(**inputs, use_cache=False).logits
        for prompt in (vlm.embed(asked, units), vlm.prune(asked, units, every(units))):
            torch.testing.assert_close(vlm.logits(prompt)[real], expected[real], **TOLERANCE)
    tokens = stock.generate(
        **stock_inputs(stock, asked), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert vlm.generate(vlm.prune(asked, units, every(units)), 6) == decode(
        vlm, stock, tokens[:, real.shape[1] :]
    )


def test_pruned_is_the_full_sequence_with_tokens_hidden(vlm, stock, answered, keep, family):
    units, visible = vlm.encode(answered), visible_tokens(vlm, stock, answered, keep)
    prompt = vlm.prune(answered, units, keep)
    real, positions = prompt.mask.bool(), stock_positions(stock, answered)
    expected = hidden_logits(stock, answered, full_embeds(stock, answered), positions, visible)
    assert prompt.mask.sum(1).tolist() == visible.sum(1).tolist()
    assert (prompt.mask.diff(dim=1) >= 0).all()  # left padded
    newlines = {"llava_next": [1, 0, 0], "llava_onevision": [1, 0, 1]}.get(family, [0] * 3)
    assert prompt.is_visual.sum(1).tolist() == [5 + newlines[0], 0, 1 + newlines[2]]
    torch.testing.assert_close(prompt.pos[..., real], positions[..., visible])
    with torch.no_grad():
        torch.testing.assert_close(vlm.logits(prompt)[real], expected[visible], **TOLERANCE)


def test_what_stepprune_keeps_is_pruned_exactly(vlm, stock, answered):
    torch.manual_seed(0)
    config = StepConfig(width=vlm.width, text_width=vlm.dim, max_steps=9, heads=2)
    policy = StepPrune(config).double()
    units = vlm.encode(answered)
    question = vlm.question(answered)
    keep = policy.select(units, question, 4)
    prompt = vlm.prune(answered, units, keep)
    visible, real = visible_tokens(vlm, stock, answered, keep), prompt.mask.bool()
    expected = hidden_logits(
        stock, answered, full_embeds(stock, answered), stock_positions(stock, answered), visible
    )
    with torch.no_grad():
        torch.testing.assert_close(vlm.logits(prompt)[real], expected[visible], **TOLERANCE)
    v, valid = units.pad()
    gated, _, _, count = policy(v, valid, *question, 0.5)
    loss = vlm.loss(vlm.embed(answered, units, units.flat(gated))) + count.sum()
    loss.backward()
    assert policy.stop.grad.abs().sum() > 0
    assert policy.encoder.text.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in vlm.parameters())


def test_reindexed_positions_would_be_noticed(vlm, answered, keep):
    prompt = vlm.prune(answered, vlm.encode(answered), keep)
    wrong = replace(prompt, pos=(prompt.mask.cumsum(-1) - 1).clamp(min=0).expand_as(prompt.pos))
    real = prompt.mask.bool()
    with torch.no_grad():
        assert (vlm.logits(prompt) - vlm.logits(wrong))[real].abs().max() > 0.1


def test_decoding_goes_on_behind_the_original_prompt(vlm, stock, asked, keep):
    seen = []
    hook = vlm.lm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][..., -1]), with_kwargs=True
    )
    found = vlm.generate(vlm.prune(asked, vlm.encode(asked), keep), 6)
    hook.remove()
    assert found == greedy_reference(vlm, stock, asked, keep, 6)
    assert max(len(text.split()) for text in found) >= 3  # else cached steps were hardly tested
    last = stock_positions(stock, asked)[..., -1]
    for step, positions in enumerate(seen):
        torch.testing.assert_close(positions, last + step)


def row_losses(vlm, prompt):
    """(B,) the loss of each row in its batch, where the others have nothing to predict."""
    rows = torch.arange(len(prompt.labels))[:, None]
    return torch.stack([
        vlm.loss(replace(prompt, labels=prompt.labels.masked_fill(rows != row, IGNORE)))
        for row in range(len(rows))
    ])


def test_a_row_in_a_batch_is_the_row_alone(vlm, pictures, answered, keep):
    together = vlm.prune(answered, vlm.encode(answered), keep)
    losses = row_losses(vlm, together)
    for row in range(len(pictures)):
        batch = vlm.batch(pictures[row : row + 1], ANSWERED[row : row + 1])
        alone = vlm.prune(batch, vlm.encode(batch), keep[row : row + 1])
        width = alone.mask.shape[1]
        assert alone.mask.all() and together.mask[row].sum() == width
        torch.testing.assert_close(together.pos[..., row, -width:], alone.pos[..., 0, :])
        torch.testing.assert_close(together.labels[row, -width:], alone.labels[0])
        torch.testing.assert_close(
            vlm.logits(together)[row, -width:], vlm.logits(alone)[0], **TOLERANCE
        )
        torch.testing.assert_close(losses[row], vlm.loss(alone), **TOLERANCE)


@pytest.fixture(scope="module")
def album(vlm, family, images):
    """Two images in the first row and in the last, in other orders; one in between. Of a video
    family, frames."""
    if family in VIDEO:
        pytest.skip("the images of a row are its frames")
    return vlm.batch(
        [images[:2], images[2], [images[2].rotate(90), images[0].rotate(180)]], ANSWERED
    )


def test_several_images_kept_whole_are_the_stock_model(vlm, stock, album, family):
    units, real, inputs = (
        vlm.encode(album),
        album["attention_mask"].bool(),
        stock_inputs(stock, album),
    )
    counts, first = [2, 1, 2], [0, 1, 2, 2, 0]  # which of the images
    assert units.views is None or len(units.views) == 3
    one = [GRIDS[family][i] for i in first]
    parts = [one[:2], one[2:3], one[3:]]
    assert units.counts == [sum(r * c for r, c in part) for part in parts]
    assert [(album["input_ids"][row] == vlm.image_id).sum().item() for row in range(3)] == [
        len(x) for x in units_at(vlm, stock, album)
    ]
    if not has_mrope(stock):
        inputs["position_ids"] = stock_positions(stock, album)
    with torch.no_grad():
        expected = stock(**inputs, use_cache=False).logits
        found = vlm.logits(vlm.prune(album, units, every(units)))
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE)
    assert len(units.apart().grid) == (sum(units.views) if units.views else sum(counts))


def test_several_images_are_generated_about_as_the_stock_model_does(vlm, stock, images, family):
    if family in VIDEO:
        pytest.skip("the images of a row are its frames")
    batch = vlm.batch(
        [images[:2], [images[2], *images[:2]]], [[(question, None)] for question in QUESTIONS[:2]]
    )
    tokens = stock.generate(
        **stock_inputs(stock, batch), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    units = vlm.encode(batch)
    assert vlm.generate(vlm.embed(batch, units), 6) == decode(
        vlm, stock, tokens[:, batch["input_ids"].shape[1] :]
    )


def test_several_images_pruned_are_hidden_tokens(vlm, stock, album):
    """Of the first row some units of either image, of the second none, of the third the last
    image's alone."""
    units, apart = vlm.encode(album), vlm.encode(album).apart()
    first, second, third = every(units)
    keep = [first[[0, 2, -4, -1]], second[:0], third[-3:]]
    visible, prompt = visible_tokens(vlm, stock, album, keep), vlm.prune(album, units, keep)
    real, positions = prompt.mask.bool(), stock_positions(stock, album)
    expected = hidden_logits(stock, album, full_embeds(stock, album), positions, visible)
    torch.testing.assert_close(prompt.pos[..., real], positions[..., visible])
    with torch.no_grad():
        torch.testing.assert_close(vlm.logits(prompt)[real], expected[visible], **TOLERANCE)
    by_view = torch.zeros(len(units.image_of)).index_fill(
        0, torch.cat([keep[0], keep[2] + sum(units.counts[:2])]), 1
    )
    again = units.together([part.nonzero().flatten() for part in by_view.split(apart.counts)])
    assert [row.tolist() for row in again] == [row.tolist() for row in keep]


def test_images_of_one_row_know_nothing_of_each_other_in_the_encoder(vlm, images, album, family):
    """And rows() takes a row with all its images."""
    units, turned = vlm.encode(album), [images[2].rotate(90), images[0].rotate(180)]
    alone = [vlm.encode(vlm.pictures([image])).feats for image in [*images, *turned]]
    torch.testing.assert_close(units.feats, torch.cat(alone), **TOLERANCE)
    shared = units.rows([2, 2, 0])
    fresh = vlm.encode(vlm.pictures([turned] * 2 + [images[:2]]))
    assert (shared.grid, shared.views, shared.shapes) == (fresh.grid, fresh.views, fresh.shapes)
    assert shared.apart().grid == fresh.apart().grid
    torch.testing.assert_close(shared.feats, fresh.feats, **TOLERANCE)
    if family in NATIVE:
        assert units.grid == [(15 + 12, 1), (3, 3), (9 + 15, 1)] and units.views == [2, 1, 2]
        assert units.apart().grid == [(3, 5), (4, 3), (3, 3), (3, 3), (3, 5)]


def test_loss_is_the_masked_reference(vlm, stock, answered, keep):
    visible = visible_tokens(vlm, stock, answered, keep)
    labels, positions = answered["labels"], stock_positions(stock, answered)
    logits = hidden_logits(stock, answered, full_embeds(stock, answered), positions, visible)
    rows = []
    for row in range(len(keep)):
        # the token to the left predicts; in the full sequence that is a text token here, never a
        # dropped one
        at = (labels[row] != IGNORE).nonzero().flatten()
        rows.append(-logits[row, at - 1].log_softmax(-1)[torch.arange(len(at)), labels[row, at]])
    prompt = vlm.prune(answered, vlm.encode(answered), keep)
    torch.testing.assert_close(vlm.loss(prompt), torch.cat(rows).mean(), **TOLERANCE)
    torch.testing.assert_close(
        row_losses(vlm, prompt), torch.stack([row.mean() for row in rows]), **TOLERANCE
    )
    assert len({len(row) for row in rows}) > 1  # else the two means could not differ


def test_why_the_mask_is_always_explicit(tmp_path, images):
    """Without a mask, gaps in LLaVA's positions read as borders between packed texts: wrong, and
    no warning."""
    vlm = FrozenVLM.from_pretrained(llava(tmp_path), dtype=torch.float64)
    batch = vlm.batch(images[:1], [[(QUESTIONS[0], "red")]])
    prompt = vlm.prune(batch, vlm.encode(batch), [torch.tensor([1, 5, 20])])
    without = vlm.lm(
        inputs_embeds=prompt.embeds, position_ids=prompt.pos, use_cache=False
    ).last_hidden_state
    assert (vlm.model.lm_head(without) - vlm.logits(prompt)).abs().max() > 0.1


def test_every_unit_gets_a_gradient_and_no_weight_does(vlm, answered):
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    units = vlm.encode(answered)
    feats = units.feats.clone().requires_grad_()
    vlm.train()  # what a trainer does to everything it holds
    loss = vlm.loss(vlm.embed(answered, units, feats))
    loss.backward()
    assert not vlm.model.training
    moved = feats.grad.flatten(1).norm(dim=1) > 0
    assert torch.equal(
        moved, torch.ones_like(moved) if units.has_token is None else units.has_token
    )
    assert all(p.grad is None and not p.requires_grad for p in vlm.parameters())
    assert all(torch.equal(before[name], value) for name, value in vlm.state_dict().items())


def test_gated_features_reach_the_model(vlm, answered):
    units = vlm.encode(answered)
    assert vlm.loss(vlm.embed(answered, units, units.feats)) == vlm.loss(vlm.embed(answered, units))
    assert vlm.loss(vlm.embed(answered, units, units.feats.roll(1, 0))) != vlm.loss(
        vlm.embed(answered, units)
    )


def test_checkpointing_recomputes_and_changes_nothing(vlm, asked, answered):
    def step():
        units = vlm.encode(answered)
        feats = units.feats.clone().requires_grad_()
        loss = vlm.loss(vlm.embed(answered, units, feats))
        loss.backward()
        return loss.detach(), feats.grad

    plain, words, calls = step(), vlm.generate(vlm.embed(asked, vlm.encode(asked)), 4), []
    hook = vlm.lm.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    vlm.checkpointing(True)
    try:
        for mine, expected in zip(step(), plain):
            torch.testing.assert_close(mine, expected, **TOLERANCE)
        assert len(calls) == 2  # once forward, once more in the backward pass
        assert vlm.generate(vlm.embed(asked, vlm.encode(asked)), 4) == words
        assert all(p.grad is None for p in vlm.parameters())
    finally:
        vlm.checkpointing(False)
        hook.remove()
    assert not vlm.lm.training


def test_a_picture_is_cut_up_once_however_many_rows_ask(vlm, pictures, monkeypatch):
    """The tensors are those of rows with pictures of their own."""
    order = [0, 1, 0, 2, 1, 0]
    turns = [[(QUESTIONS[b], None)] for b in order]
    rows = [pictures[b] for b in order]
    own = [[x.copy() for x in row] if isinstance(row, list) else row.copy() for row in rows]
    expected, seen = vlm.batch(own, turns), []
    kind = CLIPImageProcessor if vlm.adapter.kind == "video" else type(
        vlm.processor.image_processor
    )
    process = kind.preprocess

    def watched(self, images, *args, **how):
        seen.append(len(images))
        return process(self, images, *args, **how)

    monkeypatch.setattr(kind, "preprocess", watched)
    once = vlm.batch(rows, turns)
    assert once.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(once[name], x), name
    vlm.batch(own, turns)
    assert 2 * seen[0] == seen[1]  # three pictures, and six
    if vlm.adapter.kind == "image":
        a, b = pictures[:2]
        rows, turns = [[a, b], [b, a], [a, a]], [[(question, None)] for question in QUESTIONS]
        own = [[x.copy() for x in row] for row in rows]
        expected = vlm.batch(own, turns)
        assert all(torch.equal(x, expected[name]) for name, x in vlm.batch(rows, turns).items())
