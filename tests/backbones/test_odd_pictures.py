"""Very thin, tiny and odd pictures: with all units kept, every family is the stock model."""

import numpy as np
import pytest
import torch
from full_prompt import (
    TOLERANCE,
    every,
    full_embeds,
    has_mrope,
    hidden_logits,
    rows_for,
    stock_inputs,
    stock_positions,
)
from PIL import Image
from tiny_models import NATIVE, VIDEO

from backbones.checkpoints import BY_LENGTH

pytestmark = pytest.mark.usefixtures("one_thread")

RATIOS = [*range(1, 20), 23, 24, 25, 31, 32, 33, 47, 48, 49, 64, 71, 72, 73, 96, 127, 150, 199, 200]
ASKED = [("what colour ?", None)]


def noise(width, height):
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def check(vlm, stock, pictures):
    batch = vlm.batch(rows_for(stock.config.model_type, pictures), [ASKED] * len(pictures))
    units, real = vlm.encode(batch), batch["attention_mask"].bool()
    inputs = stock_inputs(stock, batch)
    if not has_mrope(stock):
        inputs["position_ids"] = stock_positions(stock, batch)
    with torch.no_grad():
        expected = stock(**inputs, use_cache=False).logits
        for prompt in (vlm.embed(batch, units), vlm.prune(batch, units, every(units))):
            torch.testing.assert_close(vlm.logits(prompt)[prompt.mask.bool()], expected[real],
                                       **TOLERANCE)


@pytest.mark.parametrize("short", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_any_ratio_kept_whole_is_the_stock_model(vlm, stock, short):
    for ratio in RATIOS:
        check(vlm, stock, [noise(short, short * ratio), noise(short * ratio, short)])


def test_thin_and_odd_pictures_in_one_batch_are_the_stock_model(vlm, stock):
    modes = ["L", "RGBA", "P", "LA", "1", "CMYK", "I;16"]
    check(vlm, stock, [noise(24, 40), noise(1, 72), noise(1, 1), noise(72, 1), noise(1, 150),
                       noise(24, 24), noise(3, 3)])
    check(vlm, stock, [noise(1, 100), noise(1, 101), noise(24, 40)])
    check(vlm, stock, [noise(24, 40).convert("L").convert(mode) for mode in modes])
    if stock.config.model_type not in VIDEO:              # several pictures of one row
        check(vlm, stock, [[noise(24, 40), noise(1, 72)], noise(1, 100), [noise(1, 72)] * 2])


def test_of_a_thin_picture_the_newlines_stay_with_what_is_kept_of_it(vlm, stock, family):
    """LLaVA-NeXT cuts off all columns of its crops: 4, and 4 or 12 newlines, are left of a row."""
    if family != "llava_next":
        pytest.skip("no crops")
    rows = [[noise(24, 24), noise(1, 72)], noise(1, 30), noise(24, 24)]
    batch = vlm.batch(rows, [ASKED] * 3)
    units = vlm.encode(batch)
    whole = torch.tensor([3, 7])                           # units of a whole picture
    for first, newlines in ((torch.tensor([0]), [0, 12, 0]), (3 * 16 + whole, [4, 12, 0])):
        prompt = vlm.prune(batch, units, [first, whole, whole])
        stays = prompt.is_visual.sum(1) - torch.tensor([len(first), 2, 2])
        assert stays.tolist() == newlines
        # the very tokens: the full sequence in which the others are hidden
        unit, _ = vlm._slots(batch)
        visible = batch["attention_mask"].bool()
        starts = torch.tensor([0, *units.counts]).cumsum(0)
        kept = torch.cat([first, starts[1] + whole, starts[2] + whole])
        shown = torch.isin(unit, kept)
        widths = (batch["input_ids"] == vlm.image_id).sum(1).tolist()
        for row, (own, here) in enumerate(zip(unit.split(widths), shown.split(widths))):
            if newlines[row]:
                here[-newlines[row]:] = True               # the thin picture is its row's last
                assert (own[-newlines[row]:] < 0).all()
        visible[batch["input_ids"] == vlm.image_id] = shown
        positions = stock_positions(stock, batch)
        expected = hidden_logits(stock, batch, full_embeds(stock, batch), positions, visible)
        with torch.no_grad():
            torch.testing.assert_close(vlm.logits(prompt)[prompt.mask.bool()], expected[visible],
                                       **TOLERANCE)


def test_windows_of_one_length_are_one_call_and_the_features_are_the_same(vlm, monkeypatch):
    """Bit for bit those of transformers' own sdpa, which is called once a window."""
    config = getattr(vlm.adapter.attentions[0], "config", None)
    if getattr(config, "_attn_implementation", None) != BY_LENGTH:
        pytest.skip("its encoder has no windows, nor several pictures in one sequence")
    batch = vlm.batch([noise(72, 40), noise(72, 40), noise(24, 40)], [ASKED] * 3)
    attend, feats, calls = torch.nn.functional.scaled_dot_product_attention, {}, {}
    for how in (BY_LENGTH, "sdpa"):
        lengths = []
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                            lambda *args, lengths=lengths, **more: lengths.append(
                                args[0].shape[-2]) or attend(*args, **more))
        monkeypatch.setattr(config, "_attn_implementation", how)
        feats[how], calls[how] = vlm.encode(batch).feats, lengths
    assert torch.equal(feats[BY_LENGTH], feats["sdpa"])
    assert len(calls[BY_LENGTH]) < len(calls["sdpa"]) and {*calls[BY_LENGTH]} == {*calls["sdpa"]}


def test_what_is_too_oblong_for_a_processor_is_refused_in_one_line(vlm, family):
    for size in ((1, 201), (402, 2)):
        rows = rows_for(vlm.family, [noise(*size)])
        if family in NATIVE:
            with pytest.raises(ValueError, match="aspect ratio must be smaller than 200, got 201"):
                vlm.batch(rows, [ASKED])
        else:
            assert vlm.encode(vlm.batch(rows, [ASKED])).feats.isfinite().all()
