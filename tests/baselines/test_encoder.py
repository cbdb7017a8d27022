"""What rivals read off the vision encoder, against the stock model's own attention."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from full_prompt import QUESTIONS
from PIL import Image
from tiny_models import MODELS, NATIVE
from transformers import AutoModelForImageTextToText

from baselines.encoder import deepest, encode
from common import FrozenVLM

EXACT = dict(rtol=0, atol=1e-9)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def eager(path, asked):
    """Of the stock model with eager attention, for every attention call of the encoder, in order:
    q, k (T, H, n, d), weights (T, H, n, n) and keys as projected; and the model."""
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64,
                                                        attn_implementation="eager").model
    tower = getattr(stock, "visual", None) or stock.vision_tower
    attentions = [part for part in tower.modules()
                  if hasattr(part, "k_proj") or hasattr(part, "qkv")]
    calls = {i: [] for i in range(len(attentions))}
    module = sys.modules[type(attentions[0]).__module__]
    real, keys = module.eager_attention_forward, {}

    def spy(attention, q, k, *rest, **how):
        out, weights = real(attention, q, k, *rest, **how)
        calls[attentions.index(attention)].append((q, k, weights))
        return out, weights
    for i, attention in enumerate(attentions):
        part = attention.k_proj if hasattr(attention, "k_proj") else attention.qkv
        part.register_forward_hook(lambda module, args, out, i=i: keys.__setitem__(i, out))
    module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            if hasattr(stock, "visual"):
                tower(asked["pixel_values"], grid_thw=asked["image_grid_thw"])
            else:
                pixels = asked["pixel_values"]
                if pixels.ndim == 5:
                    pixels = torch.cat([x[:n] for x, n in zip(pixels, views_of(asked))])
                tower(pixels, output_hidden_states=True)
    finally:
        module.eager_attention_forward = real
    return stock, calls, keys


def views_of(batch):
    """LLaVA-NeXT pads the crops of an image with black ones; frames are all real."""
    filled = batch["pixel_values"].flatten(2).abs().amax(2) > 0
    return filled.sum(1).tolist()


def to_units(x, family, stock, batch):
    """(T, n, d) of the encoder's tokens, or (n, d) of Qwen's, -> (M, d), worked out again from what
    a unit is."""
    if family == "qwen3":
        return x.view(-1, 4, x.shape[-1]).mean(1)
    if family == "qwen":
        found = stock.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        # in window order; pooler_output is in raster
        merged = stock.visual.merger(found.last_hidden_state)
        order = torch.cdist(found.pooler_output, merged).argmin(1)
        return x.view(-1, 4, x.shape[-1]).mean(1)[order]
    if family != "llava_onevision":
        x = x[:, 1:]
    side = int(x.shape[1] ** .5)
    raster = x.transpose(1, 2).unflatten(-1, (side, side))
    if family in ("internvl", "llava_next_video"):
        raster = F.avg_pool2d(raster, 2)
    if family == "llava_onevision":
        raster = F.interpolate(raster, size=(3, 3), mode="bilinear")
    return raster.flatten(2).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def test_what_is_read_is_the_eager_attention(vlm, asked, eager, family):
    stock, calls, raw = eager
    for layer in {vlm.adapter.whole[0], deepest(vlm.adapter), vlm.adapter.whole[-1]}:
        wide = []
        for q, k, _ in calls[layer]:
            q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))
            wide.append((q @ k.mT * q.shape[-1] ** -.5).softmax(-1))
        rows = {"received": [w.double().mean((1, 2)) for _, _, w in calls[layer]],
                "received wide": [w.mean(1) for w in wide]}
        if vlm.adapter.has_cls:
            rows |= {"cls": [w.double().mean(1)[:, 0] for _, _, w in calls[layer]],
                     "cls wide": [w[:, 0] for w in wide]}
        expected = {what: torch.cat(found, -1)[..., None] for what, found in rows.items()}
        keys = raw[layer] if family not in NATIVE else raw[layer].chunk(3, -1)[1][None]
        expected |= {"keys": keys.unflatten(-1, (2, 8)).mean(-2), "keys wide": keys}
        found = encode(vlm, asked, {what: (what, layer) for what in expected}).readings
        for what, value in expected.items():
            value = value[0] if family in NATIVE else value
            value = to_units(value, family, stock, asked).squeeze(-1)
            torch.testing.assert_close(found[what].double(), value, rtol=0, atol=2e-6,
                                       msg=f"{what} of {layer}")
            assert found[what].dtype == torch.float32 and found[what].std() > 1e-3


def test_reading_changes_nothing_and_runs_once(vlm, asked, family):
    """Not even where the block that is read is above the features."""
    adapter = vlm.adapter
    feats = vlm.encode(asked).feats

    def hooked():
        return [(len(part._forward_pre_hooks), len(part._forward_hooks))
                for part in adapter.model.modules()]
    before = hooked()                                  # transformers has its own
    calls = [0] * len(adapter.attentions)

    def count(i):
        def hook(*_):
            calls[i] += 1
        return hook
    hooks = [part.register_forward_hook(count(i)) for i, part in enumerate(adapter.attentions)]
    units = encode(vlm, asked, {"a": ("received", adapter.whole[-1]), "b": ("projected", 0)})
    for hook in hooks:
        hook.remove()
    assert calls[adapter.whole[-1]] == 1 and max(calls) == 1
    assert torch.equal(units.feats, feats) and hooked() == before
    assert torch.equal(units.readings["b"], vlm.project(units.feats))
    again = units.rows([1, 1]).readings["a"][:units.counts[1]]
    assert torch.equal(again, units.readings["a"][units.image_of == 1])


def test_what_cannot_be_read_is_named(vlm, asked, family):
    with pytest.raises(ValueError, match="needs\\['x'\\] asks for 'hidden': expected one of "
                                         "cls, cls wide, received"):
        encode(vlm, asked, {"x": ("hidden", 0)})
    with pytest.raises(ValueError, match="block 99 of the vision encoder cannot be read"):
        encode(vlm, asked, {"x": ("received", 99)})
    if not vlm.adapter.has_cls:
        with pytest.raises(ValueError, match=f"the vision encoder of {vlm.family} has no 'cls'"):
            encode(vlm, asked, {"x": ("cls", deepest(vlm.adapter))})
    if family == "qwen":
        with pytest.raises(ValueError, match="block 0 of the vision encoder.*\\[1\\], whose "
                                             "attention spans"):
            encode(vlm, asked, {"x": ("received", 0)})
    if family != "llava_next":
        with pytest.raises(ValueError, match="has no 'crop'"):
            encode(vlm, asked, {"x": ("crop", 0)})


def test_the_state_of_cls_is_the_stock_one(vlm, stock, asked, family):
    if not vlm.adapter.has_cls:
        return
    units = encode(vlm, asked, {"s": ("cls state", 0)})
    with torch.no_grad():
        states = stock.model.vision_tower(vlm.adapter.tiles(asked), output_hidden_states=True)
    state = states.last_hidden_state if family == "internvl" else states.hidden_states[-2]
    expected = state[:, 0].repeat_interleave(torch.tensor(units.apart().counts), 0)
    torch.testing.assert_close(units.readings["s"], expected, **EXACT)


def test_crop_of_looks_where_the_crops_are(vlm, asked, images, family):
    """A black picture with one white crop: the whole picture's units that point there are the white
    ones."""
    if family != "llava_next":
        return
    crop = encode(vlm, asked, {"crop": ("crop", 0)}).readings["crop"].split([48, 64, 48])
    # crop 0: padding
    assert [sorted(set(row.tolist())) for row in crop] == [[-1, 0, 1], [-1, 1, 2], [-1, 0, 1]]
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:, 16:] = 255
    batch = vlm.batch([Image.fromarray(array)], [[(QUESTIONS[0], None)]])
    here, pixels = encode(vlm, batch, {"crop": ("crop", 0)}), vlm.pixels(batch)[0][0]
    whole, first, second = pixels.chunk(3)
    assert first.std() < 1e-6 and second.std() < 1e-6 and second.mean() > first.mean()
    bright = whole.unflatten(0, (4, 4)).unflatten(2, (4, 4)).mean((1, 3)).flatten() > pixels.mean()
    assert torch.equal(here.readings["crop"][:16] == 1, bright)


@torch.no_grad()
def test_queries_and_keys_are_normalised_where_the_encoder_does(tmp_path):
    """InternVL's larger encoders have q_norm and k_norm in front of their attention."""
    path = MODELS["internvl"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["use_qk_norm"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64,
                                                        attn_implementation="eager")
    attentions = [part for part in model.model.vision_tower.modules() if hasattr(part, "q_norm")]
    for attention in attentions:                       # unlike one another, and unlike 1
        attention.q_norm.weight.copy_(torch.rand(16) + .5)
        attention.k_norm.weight.copy_(torch.rand(16) + 2)
    model.save_pretrained(path)
    vlm = FrozenVLM.from_pretrained(path, torch.float64)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))
    batch = vlm.batch([picture], [[(QUESTIONS[0], None)]])
    layer = deepest(vlm.adapter)
    read = encode(vlm, batch, {"a": ("received", layer), "k": ("keys", layer)}).readings
    seen = []
    attentions[layer].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    attentions[layer].k_norm.register_forward_hook(lambda module, args, keys: seen.append(keys))
    model.model.vision_tower(vlm.adapter.tiles(batch))
    keys, weights = seen
    received = to_units(weights.mean((1, 2))[..., None], "internvl", model, batch)[:, 0]
    torch.testing.assert_close(read["a"].double(), received, rtol=0, atol=2e-6)
    of_units = to_units(keys.unflatten(-1, (2, 8)).mean(-2), "internvl", model, batch)
    torch.testing.assert_close(read["k"].double(), of_units, rtol=0, atol=1e-5)
