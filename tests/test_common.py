"""The pruned model is the full model with tokens hidden: checked in float64 on the real classes,
tiny and random."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import (
    CLIP,
    MODELS,
    NATIVE,
    VIDEO,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
)
from transformers import AutoModelForImageTextToText

from baselines import random_tokens
from baselines.encoder import deepest, encode
from baselines.inside import visual_states
from common import IGNORE, FrozenVLM, Units
from stepprune import Config as StepConfig
from stepprune import StepPrune

TOLERANCE = dict(rtol=0, atol=1e-10)
SIZES = [(24, 40), (32, 24), (24, 24)]  # height, width; three different grids for Qwen
QUESTIONS = ["what colour is the circle ?", "how many ?", "is the shape left of the red square ?"]
ANSWERED = [
    [("what colour is the circle ?", "red"), ("how many ?", "two circle")],
    [("is the square blue ?", "yes")],
    [("how many are there ?", "three"), ("what shape ?", "square"), ("yes ?", "no")],
]
GRIDS = {
    "llava": [(6, 6)] * 3,
    "qwen": [(3, 5), (4, 3), (3, 3)],
    "qwen3": [(3, 5), (4, 3), (3, 3)],
    "llava_next": [(3 * 4, 4), (4 * 4, 4), (3 * 4, 4)],
    "internvl": [(3 * 3, 3), (3 * 3, 3), (3, 3)],
    "llava_next_video": [(2 * 3, 3)] * 3,
    "llava_onevision": [(2 * 3, 3)] * 3,
}  # views stand one below another
SHOWN = {
    "llava_next": [16 + 4 * 6, 16 + 10 * 4 - 16, 16 + 4 * 4]
}  # the whole picture, the crops unpadded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


def rows_for(family, images):
    """What batch() takes: the images, or for a video family each with a second frame."""
    return [[image, image.rotate(180)] for image in images] if family in VIDEO else images


@pytest.fixture(scope="module")
def pictures(family, images):
    return rows_for(family, images)


@pytest.fixture(scope="module")
def asked(vlm, pictures):
    return vlm.batch(pictures, [[(question, None)] for question in QUESTIONS])


@pytest.fixture(scope="module")
def answered(vlm, pictures):
    return vlm.batch(pictures, ANSWERED)


@pytest.fixture(scope="module")
def keep(vlm, asked):
    """Of the first row five units, for LLaVA-NeXT one of a crop among them, of the second none,
    of the third one."""
    first, second, third = every(vlm.encode(asked))
    return [first[[0, 3, 7, 8, -2]], second[:0], third[2:3]]


def every(units):
    return [valid.nonzero().flatten() for valid in units.pad(units.image_of)[1]]


def token_id(stock):
    return (
        stock.config.video_token_id
        if stock.config.model_type in VIDEO
        else stock.config.image_token_id
    )


def stock_pixels(stock, batch):
    pixels = {
        name: batch[name]
        for name in ("pixel_values", "image_grid_thw", "image_sizes")
        if name in batch
    }
    return (
        {"pixel_values_videos": pixels["pixel_values"]}
        if stock.config.model_type in VIDEO
        else pixels
    )


def stock_inputs(stock, batch):
    text = {
        name: batch[name]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in batch
    }
    return text | stock_pixels(stock, batch)


def stock_features(stock, batch):
    """(S, D), what the stock model puts in place of the image tokens."""
    model = stock.model
    make = (
        model.get_video_features if stock.config.model_type in VIDEO else model.get_image_features
    )
    (_, pixels), *grid = stock_pixels(
        stock, batch
    ).items()  # some versions have another name for the first
    with torch.no_grad():
        rows = [x.flatten(0, -2) for x in make(pixels, **dict(grid)).pooler_output]
        if (
            stock.config.model_type == "llava_onevision" and len(rows[0]) % 9 == 0
        ):  # 3x3 units a frame: in 5.17,
            rows = [
                torch.cat([row, model.image_newline[None]]) for row in rows
            ]  # forward adds the newline
        return torch.cat(rows)


def has_mrope(stock):
    return stock.config.model_type.startswith("qwen")


def stock_positions(stock, batch):
    if not has_mrope(stock):
        return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ids = batch["input_ids"]
    return stock.model.get_rope_index(
        ids,
        (ids == stock.config.image_token_id).int(),
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]


def units_at(vlm, stock, batch):
    """For every row, the unit at each image token, -1 for a newline: told by the value of its
    stock feature."""
    units, features = vlm.encode(batch), stock_features(stock, batch)
    gap, unit = torch.cdist(
        features, vlm.project(units.feats), compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    for feature in features[gap > 1e-9]:
        torch.testing.assert_close(feature, stock.model.image_newline.data, **TOLERANCE)
    unit = torch.where(
        gap > 1e-9, -1, unit - torch.tensor([0, *units.counts]).cumsum(0)[units.image_of[unit]]
    )
    return unit.split((batch["input_ids"] == token_id(stock)).sum(1).tolist())


def whole_pictures(batch, row):
    """LLaVA-NeXT: which views of the row are whole pictures, not crops: the first one of every
    image."""
    counts = (
        batch["image_counts"].tolist() if "image_counts" in batch else [1] * len(batch["input_ids"])
    )
    sizes = batch["image_sizes"].tolist()[sum(counts[:row]) :][: counts[row]]
    # GRIDS has 3, 4 and 3 views
    views = [1 + {(24, 40): 2, (32, 24): 3, (24, 24): 2}[tuple(size)] for size in sizes]
    return [sum(views[:i]) for i in range(len(views))]


def visible_tokens(vlm, stock, batch, keep):
    """(B, L) bool: the tokens of the full prompt that pruning leaves, worked out row by row,
    token by token."""
    visible = batch["attention_mask"].bool().clone()
    for row, (kept, units) in enumerate(zip(keep, units_at(vlm, stock, batch))):
        whole = whole_pictures(batch, row) if stock.config.model_type == "llava_next" else []
        stays, line = torch.isin(units, kept), []
        for slot, unit in enumerate(units.tolist()):
            if unit < 0:  # a newline, for what came since the last
                stays[slot], line = stays[line].any(), []
            elif unit // 16 not in whole:  # of LLaVA-NeXT's views, whole pictures have no newlines
                line.append(slot)
        visible[row, batch["input_ids"][row] == token_id(stock)] = stays
    return visible


def full_embeds(stock, batch):
    """What the stock model feeds its language model."""
    slots = (batch["input_ids"] == token_id(stock))[..., None]
    with torch.no_grad():
        return stock.get_input_embeddings()(batch["input_ids"]).masked_scatter(
            slots, stock_features(stock, batch)
        )


def stock_logits(stock, batch, embeds, mask, positions):
    """Logits of what full_embeds() made of a batch, and of more text behind it. No cache. Where
    visual tokens enter at several layers, the stock language model adds all of them."""
    how = dict(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    )
    if not hasattr(stock.config.vision_config, "deepstack_visual_indexes"):
        return stock(**how).logits
    features = stock.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    visual = batch["input_ids"] == token_id(stock)
    states = stock.model.language_model(
        **how,
        visual_pos_masks=F.pad(visual, (0, embeds.shape[1] - visual.shape[1])),
        deepstack_visual_embeds=[  # of each picture in later versions
            x if isinstance(x, torch.Tensor) else torch.cat(x) for x in features.deepstack_features
        ],
    )
    return stock.lm_head(states.last_hidden_state)


def hidden_logits(stock, batch, embeds, positions, visible):
    """Logits of the full sequence, in which a 4-D mask hides what is not visible. No cache."""
    length = embeds.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & visible[:, None, None]
    mask = mask | torch.eye(length, dtype=torch.bool)  # a hidden token sees itself: no row of NaN
    mask = {"full_attention": mask} if stock.config.model_type == "qwen2_5_vl" else mask
    with torch.no_grad():
        return stock_logits(stock, batch, embeds, mask, positions)


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


# -------------------------------------------------------------------------------- exactness


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


def shown_units(vlm, batch):
    """Units that the prompt of each row shows, by its image tokens alone."""
    unit, _ = vlm._slots(batch)
    sizes = (batch["input_ids"] == vlm.image_id).sum(1).tolist()
    return [int((row >= 0).sum()) for row in unit.split(sizes)]


def test_units_describe_the_images(vlm, asked, family):
    units = vlm.encode(asked)
    assert units.grid == GRIDS[family]
    assert (
        [len(row) for row in every(units)]
        == shown_units(vlm, asked)
        == SHOWN.get(family, units.counts)
    )
    assert units.image_of.tolist() == [row for row, n in enumerate(units.counts) for _ in range(n)]
    patches = {"qwen": [4], "qwen3": [4 * 3], "internvl": [4], "llava_onevision": [4]}
    assert units.feats.shape == (sum(units.counts), *patches.get(family, []), vlm.width)
    assert not units.feats.requires_grad and vlm.embed(asked, units).embeds.shape[-1] == vlm.dim


@pytest.mark.parametrize("layer", [-1, -3, 1, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NATIVE])
def test_any_feature_layer_will_do(name, layer, tmp_path, images):
    path = MODELS[name](tmp_path, vision_feature_layer=layer)
    vlm = FrozenVLM.from_pretrained(path, dtype=torch.float64)
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    batch = vlm.batch(rows_for(name, images[:1]), [[("how many ?", None)]])
    prompt = vlm.embed(batch, vlm.encode(batch))
    torch.testing.assert_close(
        prompt.embeds[prompt.is_visual], stock_features(stock, batch), **TOLERANCE
    )


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


def test_a_selector_reads_the_questions_and_nothing_else(vlm, answered, asked):
    for batch in (answered, asked):
        embeds, valid = vlm.question(batch)
        assert (valid.long().diff(dim=1) <= 0).all()  # right padded
        for row, ids in enumerate(batch["question_ids"]):
            text = vlm.tokenizer.decode(ids[valid[row]])
            assert vlm.image_token not in text and text.strip()
            assert torch.equal(embeds[row], vlm.lm.get_input_embeddings().weight[ids])
    one = vlm.batch(
        [Image.new("RGB", (32, 32))], [[("what shape ?", "circle"), ("how many ?", None)]]
    )
    both = vlm.tokenizer("what shape ? how many ?", add_special_tokens=False)["input_ids"]
    assert one["question_ids"][0].tolist() == both


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


# --------------------------------------------------------------------------------------- several
# images, several turns


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


# ------------------------------------------------------------------------------------------ loss
# and gradients


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


# -------------------------------------------------------------------------------- text


@pytest.mark.parametrize("tokens", ["words", "bytes", "metaspace"])
@pytest.mark.parametrize("name", list(MODELS))
def test_labels_are_exactly_the_answers(name, tokens, tmp_path, images):
    vlm = FrozenVLM.from_pretrained(MODELS[name](tmp_path, tokens=tokens), dtype=torch.float64)
    turns = [
        [(question, f" {answer} ") for question, answer in row] for row in ANSWERED
    ]  # blanks do not matter
    batch = vlm.batch(rows_for(name, images), turns)
    labels = batch["labels"]
    mark = vlm.tokenizer.eos_token_id  # </s>, which LLaVA's template lacks; <|im_end|> with Qwen's
    for row, turns in enumerate(ANSWERED):
        marked = labels[row] != IGNORE
        assert torch.equal(labels[row][marked], batch["input_ids"][row][marked])
        runs = torch.tensor_split(labels[row], (marked.diff().nonzero().flatten() + 1).tolist())
        runs = [run for run in runs if (run != IGNORE).all()]
        assert [run[-1].item() for run in runs] == [mark] * len(turns)
        assert [vlm.tokenizer.decode(run[:-1]).strip() for run in runs] == [
            answer for _, answer in turns
        ]
    units = vlm.encode(batch)
    prompt = vlm.prune(batch, units, [kept[:row] for row, kept in enumerate(every(units))])
    torch.testing.assert_close(prompt.labels[prompt.labels != IGNORE], labels[labels != IGNORE])


def test_the_prompt_is_spelled_as_the_family_wants_it(vlm, pictures, family):
    """Where the stock processor is not used; the others spell it themselves."""
    spelled = {
        "internvl": f"<|im_start|> user <img> {'<IMG_CONTEXT> ' * 27}</img> how many ? <|im_end|> "
        "<|im_start|> assistant",
        "llava_next_video": f"user : {'<video> ' * 18}how many ? assistant :",
        "llava_onevision": f"<|im_start|> user {'<video> ' * 19}how many ? <|im_end|> "
        "<|im_start|> assistant",
    }
    batch = vlm.batch(pictures[:1], [[("how many ?", None)]])
    if family in spelled:
        assert vlm.tokenizer.decode(batch["input_ids"][0]) == spelled[family]


def test_an_open_question_has_no_label_and_ends_where_the_answer_starts(vlm, pictures, asked):
    assert (asked["labels"] == IGNORE).all()
    full = vlm.batch(pictures[:1], [[(QUESTIONS[0], "red")]])
    start = (full["labels"][0] != IGNORE).nonzero()[0].item()
    alone = vlm.batch(pictures[:1], [[(QUESTIONS[0], None)]])
    assert torch.equal(full["input_ids"][0, :start], alone["input_ids"][0])


def test_unknown_words_are_named(vlm, pictures):
    assert vlm.unknown_words("is the zebra left of the yurt ? zebra") == ["zebra", "yurt"]
    with pytest.raises(
        ValueError, match="'zebra'.*words it knows are: what colour is the"
    ) as error:
        vlm.batch(pictures[:1], [[("is the zebra red ?", None)]])
    assert "<" not in str(error.value)  # no special tokens among the words to choose from


def test_bytes_can_spell_anything(tmp_path):
    vlm = FrozenVLM.from_pretrained(MODELS["qwen"](tmp_path, tokens="bytes"), dtype=torch.float64)
    assert vlm.unknown_words("zebra ünïcode 象") == []


# ---------------------------------------------------------------------------------------- units,
# [CLS], identity


def test_pad_and_flat_are_inverse():
    units = Units(torch.arange(1.0, 6.0)[:, None], torch.tensor([0, 0, 1, 1, 1]), [(1, 2), (3, 1)])
    padded, valid = units.pad()
    assert padded[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert valid.tolist() == [[True, True, False], [True] * 3]
    assert torch.equal(units.flat(padded), units.feats)
    scores = torch.randn(5, requires_grad=True)
    units.flat(units.pad(scores)[0]).sum().backward()
    assert scores.grad.tolist() == [1] * 5
    with pytest.raises(ValueError, match="got 4 rows.*that is 5"):
        units.pad(torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(2, 4\): expected \(2, 3"):
        units.flat(torch.zeros(2, 4))


def test_apart_and_together_go_view_by_view():
    units = Units(
        torch.arange(10.0)[:, None],
        torch.tensor([0] * 6 + [1] * 4),
        [(6, 1), (2, 2)],
        views=[3, 1],
        has_token=torch.arange(10) != 3,
    )
    apart = units.apart()
    assert apart.grid == [(2, 1)] * 3 + [(2, 2)] and apart.image_of.tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
        3,
    ]
    assert apart.pad()[1].tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, False, False],
        [True] * 4,
    ]
    keep = units.together(
        [torch.tensor(row, dtype=torch.int64) for row in ([1], [], [0, 1], [0, 3])]
    )
    assert [row.tolist() for row in keep] == [[1, 4, 5], [0, 3]]
    with pytest.raises(ValueError, match="keep has 2 rows: expected one per view, that is 4"):
        units.together(keep)


def test_a_view_shows_in_its_own_units_and_pixels(vlm, asked, family):
    last = {
        "llava": 0,
        "llava_next": (0, 2),
        "internvl": 2,
        "llava_next_video": (0, 1),
        "llava_onevision": (0, 1),
    }
    if family not in last:  # native resolution: one view, and other pixels
        return
    other = dict(asked, pixel_values=asked["pixel_values"].clone())
    other["pixel_values"][last[family]] += 1
    before, after = (vlm.encode(batch) for batch in (asked, other))
    n = before.views[0] if before.views else 1
    moved = (before.feats - after.feats).flatten(1).abs().amax(1) > 1e-6
    assert torch.equal(moved, before.apart().image_of == n - 1)
    views = [vlm.pixels(batch)[0].chunk(n, 1) for batch in (asked, other)]
    assert [torch.equal(*pair) for pair in zip(*views)] == [True] * (n - 1) + [False]


def test_several_questions_share_one_encoded_image(vlm, pictures, asked):
    owner = [2, 0, 0]
    batch = vlm.batch([pictures[b] for b in owner], [[(question, None)] for question in QUESTIONS])
    needs = {"keys": ("keys", deepest(vlm.adapter))}
    shared, fresh = encode(vlm, asked, needs).rows(owner), encode(vlm, batch, needs)
    assert (shared.grid, shared.views) == (fresh.grid, fresh.views) and torch.equal(
        shared.image_of, fresh.image_of
    )
    assert (
        shared.has_token is None
        if fresh.has_token is None
        else torch.equal(shared.has_token, fresh.has_token)
    )
    torch.testing.assert_close(shared.feats, fresh.feats, **TOLERANCE)
    torch.testing.assert_close(shared.readings["keys"], fresh.readings["keys"], rtol=0, atol=1e-6)
    expected = vlm.logits(vlm.embed(batch, fresh))
    del batch["pixel_values"]  # only the encoder needs them
    torch.testing.assert_close(vlm.logits(vlm.embed(batch, shared)), expected, **TOLERANCE)


def test_llava_and_llava_next_share_the_vision_half_of_the_fingerprint(tmp_path):
    one, two = (
        FrozenVLM.from_pretrained(make(tmp_path / make.__name__, **how)).fingerprint()
        for make, how in ((llava, dict(vision_config=CLIP | dict(image_size=16))), (llava_next, {}))
    )
    assert {key for key in one if one[key] != two[key]} == {"model_type"}


def test_fingerprint_tells_backbones_apart(vlm, path, tmp_path):
    assert vlm.fingerprint() == FrozenVLM.from_pretrained(path).fingerprint()
    other = FrozenVLM.from_pretrained(llava(tmp_path, vision_feature_layer=-1))
    assert vlm.fingerprint() != other.fingerprint()
    assert all(isinstance(value, (str, int)) for value in vlm.fingerprint().values())


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "keep, message",
    [
        ([torch.tensor([0])], "keep has 1 rows: expected one per image, that is 3"),
        (
            [torch.tensor([0]), torch.tensor([99]), torch.tensor([0])],
            r"keep\[1\] spans 99 to 99: expected 0 to",
        ),
        (
            [torch.tensor([0]), torch.tensor([0]), torch.tensor([-1])],
            r"keep\[2\] spans -1 to -1: expected 0 to",
        ),
        (
            torch.tensor([[0, 1], [1, 0], [0, 1]]),
            r"keep\[1\] = \[1, 0\]: expected strictly ascending",
        ),
        (
            torch.tensor([[0, 1], [0, 1], [2, 2]]),
            r"keep\[2\] = \[2, 2\]: expected strictly ascending",
        ),
        (torch.ones(3, 2), r"keep\[0\] is torch.float32 \(2,\): expected int64"),
    ],
)
def test_keep_is_checked(vlm, asked, keep, message):
    with pytest.raises(ValueError, match=message):
        vlm.prune(asked, vlm.encode(asked), keep)


@pytest.mark.parametrize(
    "turns, message",
    [
        ([], "1 images and 0 dialogues"),
        ([[]], "row 0 has a (Image|list) and 0 turns"),
        ([[("  ", "red")]], r"turns\[0\]\[0\] has the empty question '  '"),
        ([[("how many ?", None), ("how many ?", "two")]], r"turns\[0\]\[0\] has the answer None"),
        ([[("how many ?", " ")]], r"turns\[0\]\[0\] has the answer ' '"),
    ],
)
def test_turns_are_checked(vlm, pictures, turns, message):
    with pytest.raises(ValueError, match=message):
        vlm.batch(pictures[:1], turns)


def test_batch_refuses_what_is_no_picture_or_places_it_twice(vlm):
    with pytest.raises(ValueError, match="row 0 has a str and 1 turns: expected a PIL image"):
        vlm.batch(["cat.png"], [[("how many ?", None)]])
    with pytest.raises(ValueError, match="leave it out"):
        vlm.batch([Image.new("RGB", (24, 24))], [[(f"how many {vlm.image_token} ?", None)]])


def test_units_must_be_of_the_batch(vlm, pictures, asked):
    units = vlm.encode(asked)
    with pytest.raises(ValueError, match="that of the kept units' own"):
        vlm.embed(asked, units, units.feats[:-1])
    with pytest.raises(ValueError, match="encode"):
        vlm.embed(vlm.batch(pictures[:1], [[("how many ?", None)]]), units)


def test_loss_needs_answers(vlm, asked, answered):
    with pytest.raises(ValueError, match=r"have \[0, 0, 0\] answer tokens"):
        vlm.loss(vlm.embed(asked, vlm.encode(asked)))
    prompt = vlm.embed(answered, vlm.encode(answered))
    with pytest.raises(ValueError, match="no labels"):
        vlm.loss(replace(prompt, labels=None))


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no checkpoint at '.*nowhere': expected a folder"):
        FrozenVLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "gpt99"}')
    with pytest.raises(ValueError, match="model_type 'gpt99', which transformers does not know"):
        FrozenVLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        ValueError, match="'gpt2' .*expected one of llava, .*one file in backbones/"
    ):
        FrozenVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make, strategy",
    [
        (llava, "full"),
        (llava_next, "full"),
        (internvl, "full"),
        (llava_next_video, "full"),
        (llava_onevision, "default"),
    ],
)
def test_a_tower_without_a_grid_of_units_is_refused(make, strategy, tmp_path):
    with pytest.raises(ValueError, match=f"strategy '{strategy}': expected"):
        FrozenVLM.from_pretrained(make(tmp_path, vision_feature_select_strategy=strategy))


def test_a_unit_that_llava_next_cuts_off_cannot_be_kept(tmp_path, images):
    vlm = FrozenVLM.from_pretrained(llava_next(tmp_path), dtype=torch.float64)
    batch = vlm.batch(images[1:], [[(question, None)] for question in QUESTIONS[1:]])
    units = vlm.encode(batch)
    lost = (~units.has_token & (units.image_of == 1)).nonzero()[0] - units.counts[0]
    with pytest.raises(ValueError, match=rf"keep\[1\] names {lost.item()}, a unit without a token"):
        vlm.prune(batch, units, [torch.tensor([0]), lost])
    most = min(len(row) for row in every(units))
    for mine, shown in zip(random_tokens.select(units, most), every(units)):
        assert len(mine) == most and torch.isin(mine, shown).all()


def test_frames_are_for_video_families_and_as_many_in_each_row(tmp_path, images):
    turns = [[("how many ?", None)]] * 2
    video = FrozenVLM.from_pretrained(llava_next_video(tmp_path / "video"), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"the rows have \[2, 1\] frames: expected as many in each"
    ):
        video.batch([images[:2], images[2]], turns)
    for wrong in ([], ["cat.png"]):
        with pytest.raises(
            ValueError,
            match="row 1 has a list and 1 turns: expected a PIL image, or a list of them",
        ):
            video.batch([images[:2], wrong], turns)
    stills = FrozenVLM.from_pretrained(
        llava(tmp_path / "still"), dtype=torch.float64, protocol="stock"
    )
    for wrong in ([], [images[0], None]):
        with pytest.raises(
            ValueError,
            match="row 0 has a list and 1 turns: expected a PIL image, or a list of them, ",
        ):
            stills.batch([wrong, images[0]], turns)
    still, single = (video.batch(x, turns[:1]) for x in (images[:1], [images[:1]]))
    assert torch.equal(still["pixel_values"], single["pixel_values"]) and shown_units(
        video, still
    ) == [9]
    assert torch.equal(still["pixel_values"][0], stills.pictures(images[:1])["pixel_values"])


def test_checkpointing_refuses_dropout(vlm):
    vlm.lm.layers[1].self_attn.attention_dropout = 0.1
    try:
        with pytest.raises(ValueError, match="layers.1.self_attn has dropout"):
            vlm.checkpointing(True)
    finally:
        vlm.lm.layers[1].self_attn.attention_dropout = 0.0
    assert not vlm.lm.training


# ------------------------------------------------------------------------- what a training
# without text needs


def test_pictures_are_the_pixels_of_a_batch_and_come_back_as_pictures(vlm, pictures):
    """encode(pictures(...)) == encode(batch(...)); pixels() undoes the processor's patch order."""
    batch, alone = (
        vlm.batch(pictures, [[("what colour ?", None)]] * len(pictures)),
        vlm.pictures(pictures),
    )
    assert torch.equal(vlm.encode(batch).feats, vlm.encode(alone).feats)
    for image, shown, (rows, columns) in zip(pictures, vlm.pixels(alone), vlm.encode(alone).grid):
        h, w = shown.shape[1:]
        assert h // rows == w // columns and shown.shape[0] == 3
        if isinstance(image, list) or image.size != (
            w,
            h,
        ):  # resized by the processor: not the same pixels
            continue
        plain = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).double()
        for mine, theirs in zip(shown.double(), plain):
            assert torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))[0, 1] > 0.999


def test_asked_twice_the_question_stands_before_and_behind_the_image(vlm, pictures):
    """Only then do the visual tokens' states inside the language model depend on it."""
    states = {}
    for twice in (False, True):
        for question in ("what colour is the circle ?", "how many ?"):
            batch = vlm.batch(pictures[:1], [[(question, "red")]], ask_twice=twice)
            ids = batch["input_ids"][0].tolist()
            first = ids.index(vlm.image_id)
            before, behind = (vlm.tokenizer.decode(part) for part in (ids[:first], ids[first:]))
            assert (question in before) == twice and question in behind
            assert vlm.tokenizer.decode(batch["labels"][batch["labels"] >= 0]).startswith("red")
            states[twice, question] = visual_states(vlm, vlm.embed(batch, vlm.encode(batch)), 2)
    once, asked = (
        [states[twice, q] for q in ("what colour is the circle ?", "how many ?")]
        for twice in (False, True)
    )
    assert torch.allclose(*once, atol=1e-9) and not torch.allclose(*asked, atol=1e-3)


# --------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_picture_whose_features_are_not_finite_is_named(vlm, pictures, broken):
    """Such as half precision makes them where it overflows."""
    batch = vlm.pictures(pictures)
    before = vlm.encode(batch)
    encode = vlm.adapter.encode
    for row in range(len(pictures)):
        at = (before.image_of == row).nonzero()[-1]

        def overflow(batch, at=at):
            feats, grid = encode(batch)
            feats[at, ..., -1] = broken
            return feats, grid

        vlm.adapter.encode = overflow
        try:
            with pytest.raises(ValueError, match=f"^row {row} has features of the vision encoder"):
                vlm.encode(batch)
        finally:
            vlm.adapter.encode = encode
    assert torch.equal(vlm.encode(batch).feats, before.feats)


def test_the_features_of_half_precision_overflow_in_no_silence(tmp_path):
    """A real one: a layer norm that scales up to what float16 has no number for."""
    path = llava(tmp_path)
    vlm = FrozenVLM.from_pretrained(path, torch.float16)
    vlm.adapter.model.vision_tower.encoder.layers[1].layer_norm2.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="row 0 .*: choose a dtype of more range, bfloat16"):
        vlm.encode(vlm.pictures([Image.effect_noise((24, 24), 90)]))


@pytest.mark.parametrize("family", ["llava", "qwen"], indirect=True)
@pytest.mark.parametrize("name, value", [("repetition_penalty", 0.01), ("repetition_penalty", 9.0),
                                         ("num_beams", 4), ("do_sample", True)])
def test_generation_settings_of_the_checkpoint_change_no_answer(vlm, asked, name, value):
    """Penalties, beams and sampling stand in many a generation_config.json: answers are greedy."""
    prompt, settings = vlm.embed(asked, vlm.encode(asked)), vlm.model.generation_config
    answers, before = vlm.generate(prompt, 8), getattr(settings, name)
    setattr(settings, name, value)
    try:
        assert vlm.generate(prompt, 8) == answers
    finally:
        setattr(settings, name, before)


def test_a_prompt_may_have_as_many_tokens_as_the_model_has_positions(vlm, pictures, monkeypatch):
    turns = [[(question, None)] for question in QUESTIONS]
    n = int(vlm.batch(pictures, turns)["attention_mask"].sum(1).max())
    monkeypatch.setattr(vlm, "limit", n)
    vlm.batch(pictures, turns)
    monkeypatch.setattr(vlm, "limit", n - 1)
    with pytest.raises(ValueError, match=f"row . has {n} tokens.*expected at most {n - 1}"):
        vlm.batch(pictures, turns)
