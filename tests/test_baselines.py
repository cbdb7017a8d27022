"""The rivals that choose before the language model: their contract on every family, their rules by hand, and what they
see of the vision encoder against the stock model's own attention."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_common import QUESTIONS, SIZES, VIDEO, rows_for, stock_inputs
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel

import evaluate
from baselines import (
    cdpruner,
    cls_attention,
    divprune,
    hiprune,
    hired,
    holov,
    prumerge,
    prunesid,
    random,
    share_out,
    tome,
    visionzip,
)
from benchmarks import scenes
from common import FrozenVLM, Units

METHODS = evaluate.BASELINES
MERGING = ("visionzip", "prumerge", "prumerge+", "tome")
UNSERVED = {"cls_attention": ("qwen", "llava_onevision"),
            "tome": ("qwen", "llava_next", "internvl", "llava_next_video", "llava_onevision")}
EXACT = dict(rtol=0, atol=1e-9)
LLAVA = pytest.mark.parametrize("family", ["llava"], indirect=True)                    # where one family is enough

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def asked(vlm, images, family):
    return vlm.batch(rows_for(family, images), [[(question, None)] for question in QUESTIONS])


def seen(name, vlm, batch, family) -> Units:
    """The units as the method wants to see them; skips where the family is one that it is known not to serve."""
    if family in UNSERVED.get(name, ()):
        with pytest.raises(ValueError, match="no \\[CLS\\] token|merges inside the vision encoder, but"):
            METHODS[name].look(vlm)
        pytest.skip(f"{name} does not serve {family}")
    return vlm.encode(batch, METHODS[name].look(vlm))


def choose(name, vlm, batch, units, k, **how):
    """keep and feats, which are the units' own for a method that merges nothing."""
    if name == "cdpruner":
        how |= dict(question=vlm.question(batch))
    if name == "tome":
        how |= dict(tower=lambda rule: vlm.merged(batch, rule), blocks=vlm.adapter.deep + 1)
    found = METHODS[name].select(units, k, **how, **({"plus": True} if name == "prumerge+" else {}))
    assert isinstance(found, tuple) == (name in MERGING)
    if isinstance(found, tuple):
        return found
    starts = torch.tensor([0, *units.counts]).cumsum(0)
    return found, torch.cat([units.feats[i + start] for i, start in zip(found, starts)])


# ---------------------------------------------------------------------------------------------------- the contract

@pytest.mark.parametrize("name", METHODS)
def test_exactly_k_ascending_shown_units_and_the_same_again(name, vlm, asked, family):
    units = seen(name, vlm, asked, family)
    valid = units.pad()[1]
    for k in (9,) if name == "tome" else (1, 5, 9):
        keep, feats = choose(name, vlm, asked, units, k)
        assert all(i.dtype == torch.int64 and len(i) == k and (i[1:] > i[:-1]).all() for i in keep)
        assert all(row[i].all() for row, i in zip(valid, keep))
        assert feats.shape == (3 * k, *units.feats.shape[1:]) and feats.dtype == units.feats.dtype
        again, same = choose(name, vlm, asked, units, k, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(keep, again)) and torch.equal(feats, same)


@pytest.mark.parametrize("name", METHODS)
def test_of_a_permuted_batch_the_permuted_choice_and_of_a_row_alone_its_own(name, vlm, asked, images, family):
    if name == "random":                               # its generator goes on from row to row
        return
    units, k = seen(name, vlm, asked, family), 9
    keep, feats = choose(name, vlm, asked, units, k)
    for rows in ([2, 0, 1], [1]):
        batch = vlm.batch(rows_for(family, [images[b] for b in rows]), [[(QUESTIONS[b], None)] for b in rows])
        found, other = choose(name, vlm, batch, seen(name, vlm, batch, family), k)
        assert all(torch.equal(found[i], keep[b]) for i, b in enumerate(rows))
        expected = torch.cat([feats.split(k)[b] for b in rows])
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_is_the_stock_model(name, vlm, stock, images, family):
    for b in (0, 2):
        batch = vlm.batch(rows_for(family, [images[b]]), [[(QUESTIONS[b], None)]])
        units = seen(name, vlm, batch, family)
        keep, feats = choose(name, vlm, batch, units, int(units.pad()[1].sum()))
        assert torch.equal(keep[0], units.pad()[1][0].nonzero().flatten())
        with torch.no_grad():
            expected = stock(**stock_inputs(stock, batch)).logits
        found = vlm.logits(vlm.prune(batch, units, keep, feats if name in MERGING else None))
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", METHODS)
def test_several_pictures_in_a_row(name, vlm, images, family):
    if family in VIDEO or family in UNSERVED.get(name, ()):
        return
    batch = vlm.batch([images[:2], images[2:]], [[(question, None)] for question in QUESTIONS[:2]])
    units = vlm.encode(batch, METHODS[name].look(vlm))
    if name == "tome" or (name, family) == ("hired", "llava_next"):
        with pytest.raises(ValueError, match="several"):
            choose(name, vlm, batch, units, 9)
        return
    keep, feats = choose(name, vlm, batch, units, 9)
    assert [len(i) for i in keep] == [9, 9] and all((i[1:] > i[:-1]).all() for i in keep)
    vlm.prune(batch, units, keep, feats)
    alone = vlm.batch([images[2]], [[(QUESTIONS[1], None)]])
    if name != "random":
        assert torch.equal(choose(name, vlm, alone, vlm.encode(alone, METHODS[name].look(vlm)), 9)[0][0], keep[1])


@LLAVA
@pytest.mark.parametrize("name", METHODS)
def test_bad_budgets_and_values_are_refused(name, vlm, asked, family):
    units = seen(name, vlm, asked, family)
    for k in (0, 37, -1):
        with pytest.raises(ValueError, match=f"keep={k} does not fit 36 visual tokens"):
            choose(name, vlm, asked, units, k)
    for wanted in METHODS[name].look(vlm):
        if wanted == "cls state":                      # only as released
            continue
        broken = Units(units.feats, units.image_of, units.grid, seen=dict(units.seen))
        broken.seen[wanted] = units.seen[wanted].clone()
        broken.seen[wanted].view(len(units.feats), -1)[40, 0] = torch.nan
        with pytest.raises(ValueError, match="has NaN or infinite values"):
            choose(name, vlm, asked, broken, 9)
        blind = Units(units.feats, units.image_of, units.grid)
        with pytest.raises(ValueError, match="the units show no .*look"):
            choose(name, vlm, asked, blind, 9)


def test_no_two_methods_mean_another_thing_by_one_name(vlm, family):
    """evaluate.py encodes once for all of them."""
    looks = [METHODS[name].look(vlm) for name in METHODS if family not in UNSERVED.get(name, ())]
    for name in {name for look in looks for name in look}:
        assert len({look[name] for look in looks if name in look}) == 1, name


@LLAVA
def test_seeds_of_random(vlm, asked):
    units = vlm.encode(asked)
    a, b = (torch.cat(random.select(units, 9, seed=seed)) for seed in (0, 1))
    assert not torch.equal(a, b)


# -------------------------------------------------------------------------------------------- what they see

@pytest.fixture(scope="module")
def eager(path, asked):
    """Of the stock model with eager attention, for every attention call of the encoder, in order: q, k (T, H, n, d),
    weights (T, H, n, n) and keys as projected; and the model."""
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").model
    tower = getattr(stock, "visual", None) or stock.vision_tower
    attentions = [part for part in tower.modules() if hasattr(part, "k_proj") or hasattr(part, "qkv")]
    calls, module = {i: [] for i in range(len(attentions))}, sys.modules[type(attentions[0]).__module__]
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
                pixels = torch.cat([x[:n] for x, n in zip(pixels, views_of(asked))]) if pixels.ndim == 5 else pixels
                tower(pixels, output_hidden_states=True)
    finally:
        module.eager_attention_forward = real
    return stock, calls, keys


def views_of(batch):
    """LLaVA-NeXT pads the crops of an image with black ones; frames are all real."""
    filled = batch["pixel_values"].flatten(2).abs().amax(2) > 0
    return filled.sum(1).tolist()


def to_units(x, family, stock, batch):
    """(T, n, d) of the encoder's tokens, or (n, d) of Qwen's, -> (M, d), worked out again from what a unit is."""
    if family == "qwen":
        found = stock.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        merged = stock.visual.merger(found.last_hidden_state)          # in window order; pooler_output is in raster
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
def test_what_is_seen_is_the_eager_attention(vlm, asked, eager, family):
    stock, calls, raw = eager
    layer = vlm.adapter.deep
    for layer in {vlm.adapter.whole[0], vlm.adapter.deep, vlm.adapter.whole[-1]}:
        wide = []
        for q, k, _ in calls[layer]:
            q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))
            wide.append((q @ k.mT * q.shape[-1] ** -.5).softmax(-1))
        rows = {"received": [w.double().mean((1, 2)) for _, _, w in calls[layer]], "received wide": [
            w.mean(1) for w in wide]}
        if vlm.adapter.has_cls:
            rows |= {"cls": [w.double().mean(1)[:, 0] for _, _, w in calls[layer]], "cls wide": [w[:, 0] for w in wide]}
        expected = {what: torch.cat(found, -1)[..., None] for what, found in rows.items()}
        keys = raw[layer] if family != "qwen" else raw[layer].chunk(3, -1)[1][None]
        expected |= {"keys": keys.unflatten(-1, (2, 8)).mean(-2), "keys wide": keys}
        found = vlm.encode(asked, {what: (what, layer) for what in expected}).seen
        for what, value in expected.items():
            value = to_units(value[0] if family == "qwen" else value, family, stock, asked).squeeze(-1)
            torch.testing.assert_close(found[what].double(), value, rtol=0, atol=2e-6, msg=f"{what} of {layer}")
            assert found[what].dtype == torch.float32 and found[what].std() > 1e-3


def test_looking_changes_nothing_and_runs_once(vlm, asked, family):
    calls = []
    hook = vlm.adapter.attentions[0].register_forward_hook(lambda *_: calls.append(1))
    units = vlm.encode(asked, {"a": ("received", vlm.adapter.whole[-1]), "b": ("projected", 0)})
    hook.remove()
    assert len(calls) == 1 and torch.equal(units.feats, vlm.encode(asked).feats)
    assert not vlm.adapter.attentions[vlm.adapter.whole[-1]]._forward_pre_hooks
    assert torch.equal(units.seen["b"], vlm.project(units.feats))
    assert torch.equal(units.rows([1, 1]).seen["a"][:units.counts[1]], units.seen["a"][units.image_of == 1])


def test_what_cannot_be_seen_is_named(vlm, asked, family):
    with pytest.raises(ValueError, match="look\\['x'\\] asks for 'hidden': expected one of cls, cls wide, received"):
        vlm.encode(asked, {"x": ("hidden", 0)})
    with pytest.raises(ValueError, match="block 99 of the vision encoder cannot be looked at"):
        vlm.encode(asked, {"x": ("received", 99)})
    if not vlm.adapter.has_cls:
        with pytest.raises(ValueError, match=f"the vision encoder of {vlm.family} has no 'cls'"):
            vlm.encode(asked, {"x": ("cls", vlm.adapter.deep)})
    if family == "qwen":
        with pytest.raises(ValueError, match="block 0 of the vision encoder.*\\[1\\], whose attention spans"):
            vlm.encode(asked, {"x": ("received", 0)})
    if family != "llava_next":
        with pytest.raises(ValueError, match="has no 'crop'"):
            vlm.encode(asked, {"x": ("crop", 0)})


def test_the_state_of_cls_is_the_stock_one(vlm, stock, asked, family):
    if not vlm.adapter.has_cls:
        return
    units = vlm.encode(asked, {"s": ("cls state", 0)})
    with torch.no_grad():
        states = stock.model.vision_tower(vlm.adapter.tiles(asked), output_hidden_states=True)
    state = states.last_hidden_state if family == "internvl" else states.hidden_states[-2]
    expected = state[:, 0].repeat_interleave(torch.tensor(units.apart().counts), 0)
    torch.testing.assert_close(units.seen["s"], expected, **EXACT)


def test_crop_of_looks_where_the_crops_are(vlm, asked, images, family):
    """A black picture with one white crop: the whole picture's units that point there are the white ones."""
    if family != "llava_next":
        return
    crop = vlm.encode(asked, {"crop": ("crop", 0)}).seen["crop"].split([48, 64, 48])
    assert [sorted(set(row.tolist())) for row in crop] == [[-1, 0, 1], [-1, 1, 2], [-1, 0, 1]]    # crop 0: padding
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:, 16:] = 255
    batch = vlm.batch([Image.fromarray(array)], [[(QUESTIONS[0], None)]])
    here, pixels = vlm.encode(batch, {"crop": ("crop", 0)}), vlm.pixels(batch)[0][0]
    whole, first, second = pixels.chunk(3)
    assert first.std() < 1e-6 and second.std() < 1e-6 and second.mean() > first.mean()
    bright = whole.unflatten(0, (4, 4)).unflatten(2, (4, 4)).mean((1, 3)).flatten() > pixels.mean()
    assert torch.equal(here.seen["crop"][:16] == 1, bright)


# --------------------------------------------------------------------------------------------- pruning with features

def test_prune_takes_other_features(vlm, asked, family):
    units, keep = vlm.encode(asked), [valid.nonzero().flatten()[[0, 4]] for valid in vlm.encode(asked).pad()[1]]
    own = torch.cat([units.feats[i + s] for i, s in zip(keep, torch.tensor([0, *units.counts]).cumsum(0))])
    plain, same = vlm.prune(asked, units, keep), vlm.prune(asked, units, keep, own)
    assert torch.equal(plain.embeds, same.embeds)
    moved = own.clone()
    moved[3] += torch.rand_like(moved[3])              # the second one of the second row
    other = vlm.prune(asked, units, keep, moved)
    changed = (other.embeds - plain.embeds).abs().amax(-1) > 1e-9
    assert changed.sum(1).tolist() == [0, 1, 0] and torch.equal(other.pos, plain.pos)
    assert plain.is_visual[changed].all()
    with pytest.raises(ValueError, match="feats has shape .*expected that of the kept units' own, \\(6, "):
        vlm.prune(asked, units, keep, own[:5])


@torch.no_grad()
def test_positions_anew_are_those_of_a_text_of_this_length(vlm, images, family):
    batch = vlm.batch(rows_for(family, images[:1]), [[(QUESTIONS[0], None)]])
    units = vlm.encode(batch)
    keep = [units.pad()[1][0].nonzero().flatten()[[1, 4, 7]]]
    old, new = (vlm.prune(batch, units, keep, positions=how) for how in ("original", "reindex"))
    states = vlm.lm(inputs_embeds=new.embeds, use_cache=False).last_hidden_state
    torch.testing.assert_close(vlm.logits(new), vlm.model.lm_head(states), **EXACT)
    assert torch.equal(old.embeds, new.embeds) and (vlm.logits(new) - vlm.logits(old)).abs().max() > 1e-3
    embeds, tokens = new.embeds, []                    # and what follows is numbered on
    while len(tokens) < 6 and not torch.isin(torch.tensor(tokens[-1:]), vlm._ends()).any():
        states = vlm.lm(inputs_embeds=embeds, use_cache=False).last_hidden_state
        tokens.append(int(vlm.model.lm_head(states[0, -1]).argmax()))
        embeds = torch.cat([embeds, vlm.lm.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
    assert vlm.generate(new, 6) == [vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()]
    with pytest.raises(ValueError, match="positions='new': expected 'original' or 'reindex'"):
        vlm.prune(batch, units, keep, positions="new")


# ------------------------------------------------------------------------------------------ planted, twins, by hand

def made(n=6, grid=None, feats=None, **shown):
    """Units of one picture with what a method is to see."""
    feats = torch.eye(n) if feats is None else feats
    return Units(feats, torch.zeros(n, dtype=torch.int64), [grid or (1, n)],
                 seen={name.replace("_", " "): torch.as_tensor(x) for name, x in shown.items()})


@pytest.mark.parametrize("at", [0, 8, 19, 35])
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("random", "divprune", "cdpruner", "tome")])
def test_a_planted_salient_token_is_kept(name, at):
    generator = torch.Generator().manual_seed(at)
    feats, attention = torch.randn(36, 8, generator=generator), torch.rand(36, generator=generator) / 40
    attention[at] = .5
    units = made(36, (6, 6), feats, cls=attention, attention=attention, received=attention,
                 received_middle=attention.flip(0), attention_wide=attention, keys=feats, keys_wide=feats)
    for k in (1, 4, 12) if name != "prumerge+" else (8, 12):           # + has none but uniform ones up to K = 3
        found = METHODS[name].select(units, k, **({"plus": True} if name == "prumerge+" else {}))
        keep = found[0] if isinstance(found, tuple) else found
        assert at in keep[0].tolist()


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_of_two_twins_one_is_kept(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 16, generator=generator)
    x[7] = x[2]
    question = torch.randn(1, 3, 16, generator=generator), torch.ones(1, 3, dtype=torch.bool)
    how = dict(question=question) if name == "cdpruner" else {}
    for k in (6, 9, 10):
        keep = METHODS[name].select(made(12, feats=x, projected=x), k, **how)[0].tolist()
        assert len({2, 7} & set(keep)) <= 1, keep
    assert len({2, 7} & set(keep)) == 1


def kept(select, units, k, **how):
    found = select(units, k, **how)
    return (found[0] if isinstance(found, tuple) else found)[0].tolist()


def test_cls_attention_by_hand():
    assert kept(cls_attention.select, made(cls=[.1, .5, .2, .9, .5, 0.]), 2) == [1, 3]           # of equals the first


def crops(first, attention):
    """A whole picture of 2x2 units and two crops of as many, the left and the right half."""
    units = made(12, (6, 2), attention=attention, cls_first=[*first, *[0.] * 8],
                 crop=[0, 1, 0, 1, *[-1] * 8])
    units.views = [3]
    return units


def test_hired_by_hand():
    assert kept(hired.select, made(attention=[.1, .5, .2, .9, .5, 0.]), 2) == [1, 3]
    units = crops([.5, .1, .3, .1], [.4, .3, .2, .1] * 3)
    # 8: 4 of the whole picture, the crops share 4 as 8 : 2, that is 3.2 and 0.8, what is left goes to the heavier
    assert kept(hired.select, units, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept(hired.select, units, 6, alpha=.2) == [0, 4, 5, 6, 7, 8]       # 1, and 5 as 4 : 1


def test_hired_as_released_counts_in_stripes_and_loses_what_rounding_leaves():
    units = crops([.5, .1, .3, .1], [.4, .3, .2, .1] * 3)
    # the two most attended, 0 and 2, lie in the left half, but one in each of the stripes 0 1 and 2 3
    assert kept(hired.select, units, 8, as_released=True) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert kept(hired.select, units, 6, as_released=True) == [0, 1, 2, 4, 8]


def test_hiprune_by_hand():
    units = made(6, (2, 3), received_middle=[0., 0, 1, 0, 0, 0], received=[.1, .2, .3, .4, .5, .6])
    # alpha = 1: one anchor, 2, its neighbours 1 and 5, then the most attended of 0, 3, 4
    assert kept(hiprune.select, units, 5, alpha=1.) == [1, 2, 3, 4, 5]
    assert kept(hiprune.select, units, 4) == [2, 3, 4, 5]                     # round(0.08) anchors: registers alone


def test_hiprune_as_released_wraps_around():
    units = made(6, (2, 3), received_middle=[0., 0, 1, 0, 0, 0], received=[.1, .2, .3, .4, .5, .6])
    # of 2, one to the right is 3, the start of the next row; one row up is -1, clamped to 0
    assert kept(hiprune.select, units, 5, alpha=1., as_released=True) == [0, 1, 2, 3, 5]


def test_divprune_by_hand():
    angle = torch.tensor([0., 12, 95, 100, 185, 278]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    # 185 is 85 degrees from its nearest, more than any; 0 is furthest from it; 95 is 90 away from both
    assert divprune.farthest(divprune.distances(x), 3).tolist() == [4, 0, 2]
    assert kept(divprune.select, made(projected=x), 3) == [0, 2, 4]


def test_divprune_chooses_as_the_naive_loop():
    for seed in range(5):
        x = torch.randn(200, 24, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(*(loop(divprune.distances(x), 40) for loop in (divprune.farthest, divprune.naive)))


def test_divprune_as_released_chooses_near_equal_tokens_again():
    x = (torch.ones(64, 32) + 1e-3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    units = made(64, projected=x)
    assert len(divprune.select(units, 20, as_released=True)[0]) < 20
    assert len(divprune.select(units, 20)[0]) == 20


def test_holov_by_hand():
    units = made(attention=[.9, .8, .1, .1, .2, .1])
    # stripes 0 1 2 and 3 4 5 weigh .6 and .13; K = 2: 1.6 and .4, the one that is left goes to the heavier
    assert kept(holov.select, units, 2, stripes=2) == [0, 1]
    # K = 4: 3.3 and .7, so 4 for the first, which has 3: one goes over
    assert kept(holov.select, units, 4, stripes=2) == [0, 1, 2, 4]
    assert kept(holov.select, units, 3, stripes=6) == [0, 1, 4]


def test_holov_as_released_loses_what_does_not_fit_a_stripe():
    units = made(attention=[.9, .8, .1, .1, .2, .1])
    assert kept(holov.select, units, 4, stripes=2, as_released=True) == [0, 1, 2]
    many = made(576, attention=torch.arange(576.))                     # 16 stripes of 36: all alike, whatever K is
    assert all(len(part) <= 36 for part in torch.tensor(kept(holov.select, many, 64, as_released=True)).split(36))


@pytest.mark.parametrize("alpha", [0., .09, 5.])
def test_holov_as_released_has_a_variance_term_that_cancels(alpha):
    """Its score of a stripe, as published, gives the shares that the mean attention gives."""
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(64, 16, generator=generator), torch.rand(64, generator=generator)
    scores = []
    for part, weight in zip(x.chunk(4), a.chunk(4)):
        cosine = F.normalize(part, dim=1) @ F.normalize(part, dim=1).T
        cosine.fill_diagonal_(0.)
        mean = cosine.sum(1, keepdim=True) / (len(part) - 1)
        spread = ((cosine - mean) ** 2).sum(1) / (len(part) - 1)
        scale = (1000 * weight).mean() / (spread.mean() + 1e-6)
        scores.append((1000 * weight + alpha * scale * spread).mean())
    scores, plain = torch.stack(scores), torch.stack([part.mean() for part in a.chunk(4)])
    torch.testing.assert_close(scores / scores.sum(), plain / plain.sum(), rtol=1e-4, atol=0)


def test_prunesid_by_hand():
    x = torch.eye(6)[[0, 0, 1, 2, 3, 4]]                               # 0 and 1 are the same, all others orthogonal
    units = made(feats=x, attention=[.9, .8, .3, .2, .1, .05])
    assert kept(prunesid.select, units, 2) == [0, 2]                   # tau = 18 * 2 / 6 / 15 = .4
    assert kept(prunesid.select, units, 6) == [0, 1, 2, 3, 4, 5]
    assert prunesid.allot(4, torch.tensor([3, 3]), torch.tensor([1, 3])).tolist() == [1, 3]
    assert prunesid.allot(5, torch.tensor([3, 3]), torch.tensor([1, 3])).tolist() == [2, 3]
    assert prunesid.allot(10, torch.tensor([9, 9]), torch.tensor([9, 1])).tolist() == [7, 3]


def test_prunesid_groups_tokens_by_their_component():
    """Two bundles along two directions: each is a group of its own, with at least one token kept."""
    generator = torch.Generator().manual_seed(0)
    centre = 6 * torch.randn(2, 32, generator=generator)
    x = centre[[0] * 12 + [1] * 6] + .1 * torch.randn(18, 32, generator=generator)
    group = prunesid.components(x, 2, None).abs().argmax(1)
    assert len(set(group[:12].tolist())) == len(set(group[12:].tolist())) == 1 and group[0] != group[-1]
    again = prunesid.components(x, 2, 3).abs().argmax(1)               # the randomised one agrees where it is clear
    assert torch.equal(again == again[0], group == group[0])
    noise = torch.randn(40, 32, generator=generator)                   # ... and is its own with every seed where not
    found = [prunesid.components(noise, 8, seed).abs().argmax(1) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    units = made(18, feats=x, attention=[1.] * 12 + [.01] * 6)
    assert kept(prunesid.select, units, 8)[-1] >= 12


def test_prunesid_as_released_feeds_cls(vlm, asked, family):
    if not vlm.adapter.has_cls:
        with pytest.raises(ValueError, match="prunesid feeds \\[CLS\\]"):
            prunesid.select(vlm.encode(asked, prunesid.look(vlm)), 4, as_released=True)
        return
    released(prunesid, vlm, asked, 9)


def released(module, vlm, batch, k):
    """keep of K, and feats of which each view's first is the state of [CLS]; in the released order."""
    units = vlm.encode(batch, module.look(vlm))
    keep, feats = module.select(units, k, as_released=True, seed=3)
    assert [len(i) for i in keep] == [k] * 3 and feats.shape == (3 * k, *units.feats.shape[1:])
    again, same = module.select(units, k, as_released=True, seed=3)
    assert torch.equal(feats, same)
    for b in range(3):
        first = units.seen["cls state"][units.image_of == b][0]
        torch.testing.assert_close(feats[b * k], first.expand_as(feats[b * k]), **EXACT)
    vlm.prune(batch, units, keep, feats)                               # and it is a prompt


def test_cdpruner_by_hand():
    x, r = torch.eye(6)[[0, 0, 1, 1, 2, 2]], torch.tensor([1., .9, .8, .7, .6, .5])
    assert cdpruner.spread(x, r, 3).tolist() == [0, 2, 4]              # diverse first ...
    assert cdpruner.spread(x, torch.tensor([1., .9, .1, .1, .1, .1]), 2).tolist() == [0, 2]
    near = F.normalize(torch.tensor([[1., 0], [.6, .8], [0, 1], [0, 1], [0, 1], [0, 1]]), dim=1)
    # ... but relevance counts: what 0 leaves of 1 is .9^2 * .64, of 2 it is .5^2
    assert cdpruner.spread(near, torch.tensor([1., .9, .5, .5, .5, .5]), 2).tolist() == [0, 1]
    question = torch.tensor([[[2., 1, 0, 0, 0, 0], [9.] * 6]]), torch.tensor([[True, False]])
    units = made(projected=x)
    assert kept(cdpruner.select, units, 1, question=question) == [0]
    assert kept(cdpruner.select, units, 1, question=question, sign=-1) == [4]                  # the least alike
    with pytest.raises(ValueError, match="cdpruner reads the question"):
        cdpruner.select(units, 1)


def test_cdpruner_with_word_embeddings_wants_what_is_like_the_question():
    """On the shipped tiny LLaVA: with the code's minus, which is meant for CLIP's space, it is worse than random."""
    vlm, rows = FrozenVLM.from_pretrained("tiny/llava"), scenes.load(200)
    signs = {f"sign {sign}": evaluate.Selector(lambda asked, k, sign=sign: cdpruner.select(
        asked.units, k, question=asked.question, sign=sign), look=cdpruner.look(vlm)) for sign in (1, -1)}
    lines = evaluate.summarise(*evaluate.measure(vlm, {"random": evaluate.rival("random", vlm), **signs}, rows, [16]))
    _, blind, plus, minus = (line["average"] for line in lines)
    assert plus > blind + .2 and minus < blind


def test_cdpruner_as_released_couples_pictures_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    question = torch.randn(1, 2, 6, generator=generator), torch.ones(1, 2, dtype=torch.bool)
    low_rank = made(40, projected=x)
    assert len(cdpruner.select(low_rank, 20, question=question)[0]) == 20
    assert len(cdpruner.select(low_rank, 20, question=question, as_released=True)[0]) < 20
    # its relevance runs from 0 to 1 over the batch, so one picture's depends on the other's
    alone, twice = cdpruner.scaled(x[:20, 0], None), cdpruner.scaled(x[:20, 0], (x[:, 0].min() - 1, x[:, 0].max()))
    assert alone.min() < 1e-5 < twice.min()


def test_cdpruner_with_clip():
    """CLIP's own embeddings: of the patches before the last layer, and of the question in two segments."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    clip = CLIPModel(CLIPConfig(projection_dim=12, vision_config=small | dict(image_size=12, patch_size=4),
                                text_config=small | dict(vocab_size=50, eos_token_id=49, bos_token_id=48))).eval()
    with torch.no_grad():
        vision = clip.vision_model
        states = vision(torch.randn(1, 3, 12, 12), output_hidden_states=True).hidden_states[-2][0, 1:]
        patches = clip.visual_projection(vision.post_layernorm(states))                          # (9, 12)
        texts = clip.text_projection(clip.text_model(torch.tensor([[48, 5, 6, 49], [48, 7, 8, 49]])).pooler_output)
    assert patches.shape == (9, 12) and texts.shape == (2, 12)
    units = made(9, (3, 3), feats=states, projected=torch.randn(9, 20))
    found = kept(cdpruner.select, units, 1, clip=(patches, texts[None], torch.ones(1, 2, dtype=torch.bool)))
    cosine = F.cosine_similarity(patches[:, None], texts[None], dim=-1).mean(1)
    assert found == [int(cosine.argmin())]


def test_visionzip_by_hand():
    x = torch.tensor([[1.], [2], [3], [4], [5], [9]])
    units = made(feats=x, attention=[.1, .9, .2, .8, .3, .7], keys=torch.eye(6))
    keep, feats = visionzip.select(units, 4)                           # round(4 * 5 / 32) = 1 contextual one
    assert keep[0].tolist() == [0, 1, 3, 5] and feats.flatten().tolist() == [3, 2, 4, 9]     # (1 + 3 + 5) / 3 at 0
    keys = torch.tensor([[1., 0], [0, 0], [.9, .1], [0, 1.], [.1, .9], [.8, .3]])
    target, feats = visionzip.merge(x, keys, torch.tensor([1]), 2, plus=False)
    # of 0 2 3 4 5 every second is a target, two in all: 0 takes 2 and 5 in, 3 takes 4
    assert target.tolist() == [0, 3] and feats.flatten().tolist() == pytest.approx([13 / 3, 4.5])


def test_visionzip_as_released_adds_up(vlm, asked, family):
    x, keys = torch.tensor([[1.], [2], [3], [4], [5], [9]]), torch.eye(6)
    target, feats = visionzip.merge(x, keys, torch.tensor([1, 3, 5]), 1, plus=True)
    assert (target.tolist(), feats.flatten().tolist()) == ([0], [1 + (3 + 5) / 2])
    units = made(feats=x, attention=[.1, .9, .2, .8, .3, .7], keys=keys, cls_state=torch.full((6, 1), 7.))
    keep, feats = visionzip.select(units, 4, as_released=True)         # [CLS], two dominant, one contextual at the end
    assert feats.flatten().tolist() == pytest.approx([7, 2, 4, 1 + (3 + 5 + 9) / 3])
    assert keep[0].tolist() == [0, 1, 2, 3]                            # [CLS] has the first free place, 2
    if vlm.adapter.has_cls:
        released(visionzip, vlm, asked, 9)
    else:
        with pytest.raises(ValueError, match="visionzip feeds \\[CLS\\]"):
            visionzip.select(vlm.encode(asked, visionzip.look(vlm)), 4, as_released=True)


def test_prumerge_by_hand():
    x, a = torch.tensor([[1.], [2], [3], [4], [5], [6]]), torch.tensor([.1, .5, .05, .4, .2, .15])
    keys = torch.tensor([[1., 0], [.9, .1], [.8, .2], [0, 1], [.1, .9], [.2, .8]])
    index, feats = prumerge.merge(x, a, keys, torch.tensor([1, 3]), near=2)
    # 1 is nearest to 0 and 2, 3 to 4 and 5; the one more is of 0 2 4 5 and stands at 4
    assert index.tolist() == [1, 3, 4]
    assert feats.flatten().tolist() == pytest.approx([2 + .1 + .15, 4 + 1 + .9, .1 + .15 + 1 + .9])
    units = made(feats=x, attention_wide=a, keys_wide=keys)
    assert kept(prumerge.select, units, 3) == [1, 3, 4]
    # +: one of four is the most attended, 1; two fill up from 0 2 3 4 5, evenly: 0 and 3; then the one more, at 4
    assert kept(prumerge.select, units, 4, plus=True) == [0, 1, 3, 4]
    many = torch.full((16,), .01)
    many[5] = 1.
    units = made(16, feats=torch.eye(16), attention_wide=many, keys_wide=torch.eye(16))
    assert kept(prumerge.select, units, 9, adaptive=True) == [0, 5]    # one stands out; the one more is at 0
    # +: step 16, so every fifth up to 14, and 1 is the first that is free
    assert kept(prumerge.select, units, 9, adaptive=True, plus=True) == [0, 1, 5, 10]
    with pytest.raises(ValueError, match="no token's attention stands out"):
        prumerge.select(made(attention_wide=[.1] * 6, keys_wide=keys), 3, adaptive=True, plus=True)


def test_prumerge_as_released_lets_pictures_decide_for_one_another():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(64, generator=generator)
    a[:32], a[5], a[40] = a[:32] / 100, .5, 5.
    x = torch.randn(64, 8, generator=generator)
    both = Units(x, torch.tensor([0] * 32 + [1] * 32), [(4, 8)] * 2, seen={"attention wide": a, "keys wide": x})
    alone = Units(x[:32], torch.zeros(32, dtype=torch.int64), [(4, 8)], seen={"attention wide": a[:32],
                                                                              "keys wide": x[:32]})
    assert [len(i) for i in prumerge.select(both, 9, adaptive=True)[0]] == [2, 2]
    assert [len(i) for i in prumerge.select(alone, 9, as_released=True)[0]] == [2]
    assert [len(i) for i in prumerge.select(both, 9, as_released=True)[0]] == [1, 1]       # 32 / 64 of one token
    keep, feats = prumerge.select(both, 9, as_released=True, plus=True)
    assert all(31 not in i.tolist()[:-1] for i in keep) and len(keep[0]) == len(keep[1])


def test_tome_by_hand():
    # [CLS] 1 2 3 4 5 6: the first set is [CLS] 2 4 6, the second 1 3 5
    keys = torch.tensor([[[1., 0], [1, 0], [1, .1], [0, 1], [.3, 1], [-1, 0], [-1, .8]]])
    stays, into = tome.bipartite(keys, 2)              # 2 is nearest to 1, 4 to 3; 6 to 5, but less so
    assert stays.tolist() == [[0, 6, 1, 3, 5]] and into.tolist() == [[0, 2, 2, 3, 3, 4, 1]]
    stays, into = tome.bipartite(keys, 3)
    assert stays.tolist() == [[0, 1, 3, 5]] and into.tolist() == [[0, 1, 1, 2, 2, 3, 3]]


def test_tome_spreads_its_merges():
    assert sorted(tome.schedule(577, 193, 23)) == [16] * 7 + [17] * 16
    for n, left, blocks in ((577, 65, 23), (145, 17, 5), (37, 37, 2), (37, 10, 2)):
        merges, now = tome.schedule(n, left, blocks), n
        assert len(merges) == blocks and sum(merges) == n - left
        for r in merges:
            assert 0 <= r <= (now - 1) // 2
            now -= r
    with pytest.raises(ValueError, match="keep=5: 2 blocks that halve their tokens at most leave 9 of 36"):
        tome.schedule(37, 6, 2)


@LLAVA
@torch.no_grad()
def test_merging_in_the_tower_is_a_weighted_mean_between_attention_and_feed_forward(vlm, asked):
    """Worked out again token by token, with the softmax written out."""
    plans = [{3: 4, 9: 4}, {2: 3, 5: 6}]               # token -> the token it joins, in the numbers of that block

    def rule(i, keys):
        n = keys.shape[1]
        stays = [t for t in range(n) if t not in plans[i]]
        into = [stays.index(plans[i].get(t, t)) for t in range(n)]
        return (torch.tensor([row]).expand(3, -1) for row in (stays, into))
    feats, anchor = vlm.merged(asked, rule)
    tower, heads = vlm.model.model.vision_tower, (2, 8)
    for b in range(3):
        x = tower.pre_layrnorm(tower.embeddings(asked["pixel_values"][b:b + 1]))[0]
        size, place = torch.ones(37, dtype=torch.float64), list(range(-1, 36))
        for block, plan in zip(tower.encoder.layers, plans):
            own = block.self_attn
            q, k, v = (p(block.layer_norm1(x)).unflatten(-1, heads) for p in (own.q_proj, own.k_proj, own.v_proj))
            weights = (torch.einsum("qhd,khd->hqk", q, k) * 8 ** -.5).exp() * size              # softmax(. + log s)
            weights = weights / weights.sum(-1, keepdim=True)
            x = x + own.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            members = {t: [t] + [s for s in plan if plan[s] == t] for t in range(len(x)) if t not in plan}
            x = torch.stack([(size[m, None] * x[m]).sum(0) / size[m].sum() for m in members.values()])
            size, place = torch.stack([size[m].sum() for m in members.values()]), [place[t] for t in members]
            x = x + block.mlp(block.layer_norm2(x))
        assert anchor[b].tolist() == place[1:]
        torch.testing.assert_close(feats[b], x[1:], **EXACT)


def test_what_cannot_merge_says_why(vlm, asked, family):
    if family == "llava":
        return
    with pytest.raises(ValueError, match=f"{vlm.family} cannot merge inside its vision encoder: .*(patch|windows)"):
        vlm.merged(asked, lambda i, keys: None)


def test_share_out():
    assert share_out(5, torch.tensor([1., 1, 1]), torch.tensor([9, 9, 9])).tolist() == [2, 2, 1]
    assert share_out(6, torch.tensor([9., 1, 0]), torch.tensor([2, 3, 9])).tolist() == [2, 3, 1]
    assert share_out(0, torch.ones(2), torch.tensor([3, 3])).tolist() == [0, 0]
    assert share_out(4, torch.zeros(2), torch.tensor([3, 3])).tolist() == [2, 2]


# ------------------------------------------------------------------------------------------------------ evaluate.py

def test_every_method_answers_as_the_unpruned_model_when_it_keeps_all():
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    selectors = {name: evaluate.rival(name, vlm) for name in METHODS}
    results, _ = evaluate.measure(vlm, selectors, scenes.load(6), [144])
    for name in METHODS:
        assert [hit[:2] for hit in results[name, 144]] == [hit[:2] for hit in results["vanilla", 0]], name
        assert {hit.kept for hit in results[name, 144]} == {144}


def test_methods_that_cannot_serve_are_left_out_with_the_reason(capsys):
    vlm = FrozenVLM.from_pretrained("tiny/qwen2_5_vl", torch.float32)
    selectors, _ = evaluate.selectors_of(evaluate.EvalConfig(methods=[*METHODS, "evidence"]), vlm, {}, {})
    assert [*selectors] == [name for name in [*METHODS, "evidence"] if name not in UNSERVED]
    said = capsys.readouterr().out
    assert "cls_attention: left out, this vision encoder has no [CLS]" in said and "tome: left out" in said
