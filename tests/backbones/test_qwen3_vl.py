"""Qwen3-VL: what enters the language model at later layers is the stock model's, leaves with its
unit and drowns with it."""

import pytest
import torch
from full_prompt import (
    TOLERANCE,
    every,
    full_embeds,
    hidden_logits,
    stock_inputs,
    stock_positions,
    visible_tokens,
)
from PIL import Image
from test_exactness import decode, greedy_reference
from tiny_models import qwen3
from transformers import AutoModelForImageTextToText

from autoselect import AutoSelect, Config
from baselines.inside import visual_states
from common import FrozenVLM

SIZES = [(40, 24), (24, 32), (24, 24)]  # width, height: three grids
ASKED = [("what colour is the circle ?", None)]

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(size, seed=0):
    torch.manual_seed(seed)
    return Image.fromarray(torch.randint(0, 255, (*size[::-1], 3), dtype=torch.uint8).numpy())


def both(path):
    """Ours, and the stock model of the same checkpoint."""
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    return FrozenVLM.from_pretrained(path, torch.float64), stock


@pytest.fixture(scope="module")
def vlm_and_stock(tmp_path_factory):
    return both(qwen3(tmp_path_factory.mktemp("qwen3")))


def check_exact(vlm, stock, batch, keep):
    """All kept is the stock model, in logits and answers; some is the full sequence with the others
    hidden, answers included."""
    units, real = vlm.encode(batch), batch["attention_mask"].bool()
    with torch.no_grad():
        expected = stock(**stock_inputs(stock, batch), use_cache=False).logits
        whole = vlm.prune(batch, units, every(units))
        torch.testing.assert_close(vlm.logits(whole)[real], expected[real], **TOLERANCE)
        visible = visible_tokens(vlm, stock, batch, keep)
        prompt = vlm.prune(batch, units, keep)
        hidden = hidden_logits(
            stock, batch, full_embeds(stock, batch), stock_positions(stock, batch), visible
        )
        pruned = vlm.logits(prompt)[prompt.mask.bool()]
        torch.testing.assert_close(pruned, hidden[visible], **TOLERANCE)
    tokens = stock.generate(
        **stock_inputs(stock, batch), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert vlm.generate(whole, 5) == decode(vlm, stock, tokens[:, real.shape[1] :])
    assert vlm.generate(prompt, 5) == greedy_reference(vlm, stock, batch, keep, 5)


@pytest.mark.parametrize("blocks", [[0, 2], [2, 0], [1, 2, 3], [3], []])
@pytest.mark.parametrize("experts", [0, 4])
def test_whatever_blocks_are_read_it_is_the_stock_model(blocks, experts, tmp_path):
    """In whatever order the config names them; dense and a mixture of experts."""
    vlm, stock = both(qwen3(tmp_path, experts=experts, deepstack_visual_indexes=blocks))
    if experts:  # the usual kernel has no float64
        for model in (vlm.model, stock):
            model.set_experts_implementation("eager")
    batch = vlm.batch([noise(size) for size in SIZES], [ASKED] * 3)
    units = vlm.encode(batch)
    assert units.feats.shape[1:] == (4 * (1 + len(blocks)), 16)
    assert len(vlm.embed(batch, units).later) == len(blocks)
    check_exact(vlm, stock, batch, [torch.tensor(x) for x in ([0, 3, 7], [5], [2, 8])])


def test_text_may_stand_between_the_pictures(vlm_and_stock):
    vlm, stock = vlm_and_stock
    mark = vlm.image_start + vlm.image_token + "<|vision_end|>"
    one = f"<|im_start|>user\nleft {mark} one two three {mark} is the {mark} red ?<|im_end|>\n"
    two = f"<|im_start|>user\n{mark} how many ?<|im_end|>\n"
    batch = vlm._inputs(
        [[noise(size, 1) for size in SIZES], noise((24, 24), 2)],
        [one, two],
        padding=True,
        return_tensors="pt",
    )
    starts = torch.tensor([15, 15 + 12])  # of the second and the third picture
    keep = [torch.cat([torch.tensor([1, 14]), starts + 2]), torch.tensor([8])]
    check_exact(vlm, stock, batch, keep)


def test_what_enters_later_is_the_stock_models_and_stays_with_its_unit(vlm_and_stock):
    vlm, stock = vlm_and_stock
    batch = vlm.batch([noise(size) for size in SIZES], [ASKED] * 3)
    units = vlm.encode(batch)
    found = stock.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    full, expected = vlm.embed(batch, units), found.deepstack_features
    keep = [torch.tensor(x) for x in ([4, 9], [0], [1, 2, 3])]
    kept = torch.cat([keep[0], keep[1] + 15, keep[2] + 15 + 12])
    pruned = vlm.prune(batch, units, keep)
    for mine, left, theirs in zip(full.later, pruned.later, expected, strict=True):
        theirs = theirs if isinstance(theirs, torch.Tensor) else torch.cat(theirs)
        torch.testing.assert_close(mine[full.is_visual], theirs, **TOLERANCE)
        torch.testing.assert_close(left[pruned.is_visual], theirs[kept], **TOLERANCE)
        assert not mine[~full.is_visual].any() and not left[~pruned.is_visual].any()


# ------------------------------------------------------------------------------------ the gate


def gate(vlm, units):
    """AutoSelect, having seen these units; no denoiser."""
    net = AutoSelect(Config.of(vlm, layers=1, heads=2, denoiser="none")).double()

    class Step:
        def sum(self, x):
            return x

    net.observe(vlm, [(None, units)], Step())
    return net


def gated(vlm, net, picture, share):
    """The prompt and the states behind two layers of a picture whose units' shares of signal are
    (n,); always the same noise."""
    batch = vlm.batch([picture], [ASKED])
    units = vlm.encode(batch)
    noised = net.gated(units.pad()[0], share[None], None, torch.Generator().manual_seed(0))
    prompt = vlm.embed(batch, units, units.flat(noised))
    return prompt, visual_states(vlm, prompt, 2)


@torch.no_grad()
def test_a_drowned_unit_cannot_be_read_at_any_layer(vlm_and_stock):
    """Two pictures that are told apart at each layer they enter are the same once drowned. With
    the features of the earlier blocks as they are they would not be."""
    vlm, _ = vlm_and_stock
    one, two = noise((40, 24), 1), noise((40, 24), 2)
    net = gate(vlm, vlm.encode(vlm.pictures([noise((80, 80), 3)])))
    for share, same in ((torch.zeros(15), True), (torch.ones(15), False)):
        (a, states), (b, others) = (gated(vlm, net, x, share) for x in (one, two))
        pairs = [(a.embeds[a.is_visual], b.embeds[b.is_visual]), (states, others)]
        pairs += [(x[a.is_visual], y[b.is_visual]) for x, y in zip(a.later, b.later)]
        for x, y in pairs:
            gap = ((x - y).norm() / x.norm()).item()
            assert gap < 1e-2 if same else gap > .5
        # the answer's first logits
        gap = (vlm.logits(a)[:, -1] - vlm.logits(b)[:, -1]).abs().max()
        assert gap < .05 if same else gap > .5


@torch.no_grad()
def test_one_unit_drowns_at_every_layer_and_its_neighbours_do_not(vlm_and_stock):
    vlm, _ = vlm_and_stock
    net = gate(vlm, vlm.encode(vlm.pictures([noise((80, 80), 3)])))
    share = torch.ones(15)
    share[6] = 0
    batch = vlm.batch([noise((40, 24), 1)], [ASKED])
    own = vlm.embed(batch, vlm.encode(batch))
    prompt, _ = gated(vlm, net, noise((40, 24), 1), share)
    for mine, before in zip((prompt.embeds, *prompt.later), (own.embeds, *own.later)):
        moved = (mine - before)[own.is_visual].norm(dim=1) / before[own.is_visual].norm(dim=1)
        assert moved[6] > .3 and (moved[share > 0] < 1e-2).all()


@torch.no_grad()
def test_the_noise_has_the_power_of_the_block_it_drowns(vlm_and_stock):
    """Statistics of all blocks together would leave too much of one, and too little of another."""
    vlm, _ = vlm_and_stock
    units = vlm.encode(vlm.pictures([noise((80, 80), 3)]))
    net = gate(vlm, units)
    v = units.pad()[0]
    assert net.mean.shape == net.std.shape == (12, 16)
    torch.testing.assert_close(net.mean.double(), units.feats.mean(0), rtol=0, atol=1e-4)
    scale = v.std((0, 1, 3)).view(3, 4).mean(1)
    assert scale.max() > 1.5 * scale.min()
    drowned = net.gated(v, torch.zeros(v.shape[:2]), None, torch.Generator().manual_seed(0))
    after = drowned.std((0, 1, 3)).view(3, 4).mean(1)
    torch.testing.assert_close(after, scale, rtol=.1, atol=0)


# ------------------------------------------------------------------------------------ the hooks


def test_nothing_stays_behind_that_would_add_to_another_prompt(vlm_and_stock):
    vlm, _ = vlm_and_stock
    batch = vlm.batch([noise((40, 24))], [ASKED])
    prompt = vlm.embed(batch, vlm.encode(batch))

    def hooks():
        return [len(layer._forward_hooks) for layer in vlm.lm.layers]

    before = hooks()
    vlm.logits(prompt)
    vlm.generate(prompt, 2)
    with pytest.raises(RuntimeError), vlm.entering(prompt.later):
        vlm.lm(inputs_embeds=prompt.embeds[:, :5])  # of another length: refused, not left out
    assert hooks() == before
