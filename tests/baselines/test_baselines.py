"""The rivals that choose before the language model: their contract on every family, their rules by
hand, and how they answer."""

import pytest
import torch
import torch.nn.functional as F
from full_prompt import QUESTIONS, VIDEO, rows_for, stock_inputs
from tiny_models import NATIVE
from transformers import CLIPConfig, CLIPModel

import baselines
from baselines import (
    cdpruner,
    cls_attention,
    divprune,
    evidence,
    hiprune,
    hired,
    holov,
    prumerge,
    prunesid,
    random_tokens,
    share_out,
    tome,
    visionzip,
)
from baselines.encoder import deepest, encode
from benchmarks import answering, tiny_world
from common import FrozenVLM, Units
from runs import Way

# name -> module, and more of its select(); the bound by the ground truth has its own tests
METHODS = {name: module for name, (module, _) in baselines.modules().items()
           if hasattr(module, "select") and module is not evidence}
OPTIONS = {name: options for name, (_, options) in baselines.modules().items()}
MERGING = ("visionzip", "prumerge", "prumerge+", "tome", "downsample")
UNSERVED = {"cls_attention": (*NATIVE, "llava_onevision"),
            "tome": (*NATIVE, "llava_next", "internvl", "llava_next_video", "llava_onevision")}
EXACT = dict(rtol=0, atol=1e-9)
LLAVA = pytest.mark.parametrize("family", ["llava"], indirect=True)  # where one family is enough

pytestmark = pytest.mark.usefixtures("one_thread")


def units_for(name, vlm, batch, family) -> Units:
    """The units with what the method reads; skips a family that it is known not to serve."""
    if family in UNSERVED.get(name, ()):
        with pytest.raises(ValueError, match="no \\[CLS\\] token|merges inside the vision enc"):
            METHODS[name].needs(vlm)
        pytest.skip(f"{name} does not serve {family}")
    return encode(vlm, batch, METHODS[name].needs(vlm))


def choose(name, vlm, batch, units, k, **how):
    """keep and feats, which are the units' own for a method that merges nothing."""
    options = {} if name.startswith("cdpruner") else OPTIONS[name]
    if name.startswith("cdpruner"):
        words, valid = vlm.question(batch)
        patches = units.feats.flatten(1)[:, :8]  # in place of CLIP's own embeddings
        how |= ({"question": (words, valid)} if name == "cdpruner_words"
                else {"clip": (patches, words[..., :8], valid)})
    if name == "tome":
        how |= dict(tower=lambda rule: tome.merged(vlm, batch, rule),
                    blocks=deepest(vlm.adapter) + 1)
    found = METHODS[name].select(units, k, **how, **options)
    assert isinstance(found, tuple) == (name in MERGING)
    if isinstance(found, tuple):
        return found
    starts = torch.tensor([0, *units.counts]).cumsum(0)
    return found, torch.cat([units.feats[i + start] for i, start in zip(found, starts)])


# ---------------------------------------------------------------------- the contract

@pytest.mark.parametrize("name", METHODS)
def test_exactly_k_ascending_shown_units_and_the_same_again(name, vlm, asked, family):
    units = units_for(name, vlm, asked, family)
    valid = units.pad()[1]
    for k in (9,) if name == "tome" else (1, 5, 9):
        keep, feats = choose(name, vlm, asked, units, k)
        assert all(i.dtype == torch.int64 and len(i) == k and (i[1:] > i[:-1]).all() for i in keep)
        assert all(row[i].all() for row, i in zip(valid, keep))
        assert feats.shape == (3 * k, *units.feats.shape[1:]) and feats.dtype == units.feats.dtype
        again, same = choose(name, vlm, asked, units, k, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(keep, again)) and torch.equal(feats, same)


@pytest.mark.parametrize("name", METHODS)
def test_of_a_permuted_batch_the_permuted_choice_and_of_a_row_alone_its_own(
        name, vlm, asked, images, family):
    if name == "random":  # its generator goes on from row to row
        return
    units, k = units_for(name, vlm, asked, family), 9
    keep, feats = choose(name, vlm, asked, units, k)
    for rows in ([2, 0, 1], [1]):
        batch = vlm.batch(rows_for(family, [images[b] for b in rows]),
                          [[(QUESTIONS[b], None)] for b in rows])
        found, other = choose(name, vlm, batch, units_for(name, vlm, batch, family), k)
        assert all(torch.equal(found[i], keep[b]) for i, b in enumerate(rows))
        expected = torch.cat([feats.split(k)[b] for b in rows])
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_is_the_stock_model(name, vlm, stock, images, family):
    for b in (0, 2):
        batch = vlm.batch(rows_for(family, [images[b]]), [[(QUESTIONS[b], None)]])
        units = units_for(name, vlm, batch, family)
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
    units = encode(vlm, batch, METHODS[name].needs(vlm))
    if name == "tome" or (name, family) == ("hired", "llava_next"):
        with pytest.raises(ValueError, match="several"):
            choose(name, vlm, batch, units, 9)
        return
    keep, feats = choose(name, vlm, batch, units, 9)
    assert [len(i) for i in keep] == [9, 9] and all((i[1:] > i[:-1]).all() for i in keep)
    vlm.prune(batch, units, keep, feats)
    alone = vlm.batch([images[2]], [[(QUESTIONS[1], None)]])
    if name != "random":
        units = encode(vlm, alone, METHODS[name].needs(vlm))
        assert torch.equal(choose(name, vlm, alone, units, 9)[0][0], keep[1])


@LLAVA
@pytest.mark.parametrize("name", METHODS)
def test_bad_budgets_and_values_are_refused(name, vlm, asked, family):
    units = units_for(name, vlm, asked, family)
    for k in (0, 37, -1):
        with pytest.raises(ValueError, match=f"keep={k} does not fit 36 visual tokens"):
            choose(name, vlm, asked, units, k)
    for wanted in METHODS[name].needs(vlm):
        if wanted == "cls state":  # only as released
            continue
        broken = Units(units.feats, units.image_of, units.grid, readings=dict(units.readings))
        broken.readings[wanted] = units.readings[wanted].clone()
        broken.readings[wanted].view(len(units.feats), -1)[40, 0] = torch.nan
        with pytest.raises(ValueError, match="has NaN or infinite values"):
            choose(name, vlm, asked, broken, 9)
        blind = Units(units.feats, units.image_of, units.grid)
        with pytest.raises(ValueError, match="the units show no .*needs"):
            choose(name, vlm, asked, blind, 9)


def test_no_two_methods_mean_another_thing_by_one_name(vlm, family):
    """A batch is encoded once for all of them."""
    needs = [METHODS[name].needs(vlm) for name in METHODS if family not in UNSERVED.get(name, ())]
    for name in {name for each in needs for name in each}:
        assert len({each[name] for each in needs if name in each}) == 1, name


@LLAVA
def test_seeds_of_random(vlm, asked):
    units = vlm.encode(asked)
    a, b = (torch.cat(random_tokens.select(units, 9, seed=seed)) for seed in (0, 1))
    assert not torch.equal(a, b)


# ---------------------------------------------------------------------- pruning with features

def test_prune_takes_other_features(vlm, asked, family):
    units = vlm.encode(asked)
    keep = [valid.nonzero().flatten()[[0, 4]] for valid in units.pad()[1]]
    starts = torch.tensor([0, *units.counts]).cumsum(0)
    own = torch.cat([units.feats[index + start] for index, start in zip(keep, starts)])
    plain, same = vlm.prune(asked, units, keep), vlm.prune(asked, units, keep, own)
    assert torch.equal(plain.embeds, same.embeds)
    moved = own.clone()
    moved[3] += torch.rand_like(moved[3])  # the second one of the second row
    other = vlm.prune(asked, units, keep, moved)
    changed = (other.embeds - plain.embeds).abs().amax(-1) > 1e-9
    assert changed.sum(1).tolist() == [0, 1, 0] and torch.equal(other.pos, plain.pos)
    assert plain.is_visual[changed].all()
    with pytest.raises(ValueError, match=r"feats has shape .*expected \(6, .*that of the kept "
                                         "units' own"):
        vlm.prune(asked, units, keep, own[:5])


@torch.no_grad()
def test_positions_anew_are_those_of_a_text_of_this_length(vlm, images, family):
    batch = vlm.batch(rows_for(family, images[:1]), [[(QUESTIONS[0], None)]])
    units = vlm.encode(batch)
    keep = [units.pad()[1][0].nonzero().flatten()[[1, 4, 7]]]
    old, new = (vlm.prune(batch, units, keep, positions=how) for how in ("original", "reindex"))

    def states(embeds):
        more = embeds.shape[1] - new.embeds.shape[1]  # decoded tokens, which add nothing
        with vlm.entering([F.pad(x, (0, 0, 0, more)) for x in new.later]):
            return vlm.lm(inputs_embeds=embeds, use_cache=False).last_hidden_state

    expected = vlm.model.lm_head(states(new.embeds))
    torch.testing.assert_close(vlm.logits(new), expected, **EXACT)
    assert torch.equal(old.embeds, new.embeds)
    assert (vlm.logits(new) - vlm.logits(old)).abs().max() > 1e-3
    embeds, tokens = new.embeds, []  # and what follows is numbered on
    while len(tokens) < 6 and not torch.isin(torch.tensor(tokens[-1:]), vlm.ends()).any():
        tokens.append(int(vlm.model.lm_head(states(embeds)[0, -1]).argmax()))
        embeds = torch.cat([embeds, vlm.lm.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
    assert vlm.generate(new, 6) == [vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()]
    with pytest.raises(ValueError, match="positions='new': expected 'original' or 'reindex'"):
        vlm.prune(batch, units, keep, positions="new")


# ---------------------------------------------------------------------- planted, twins, by hand

def made(n=6, grid=None, feats=None, **shown):
    """Units of one picture with what a method is to see."""
    feats = torch.eye(n) if feats is None else feats
    return Units(feats, torch.zeros(n, dtype=torch.int64), [grid or (1, n)],
                 readings={name.replace("_", " "): torch.as_tensor(x) for name, x in shown.items()})


@pytest.mark.parametrize("at", [0, 8, 19, 35])
@pytest.mark.parametrize("name", sorted(
    {*METHODS} - {"random", "divprune", "cdpruner", "cdpruner_words", "tome", "downsample"}))
def test_a_planted_salient_token_is_kept(name, at):
    generator = torch.Generator().manual_seed(at)
    feats = torch.randn(36, 8, generator=generator)
    attention = torch.rand(36, generator=generator) / 40
    attention[at] = .5
    units = made(36, (6, 6), feats, cls=attention, attention=attention, received=attention,
                 received_middle=attention.flip(0), attention_wide=attention, keys=feats,
                 keys_wide=feats)
    # + has none but uniform ones up to K = 3; of one, half is none
    for k in {"prumerge+": (8, 12), "vispruner": (2, 4, 12)}.get(name, (1, 4, 12)):
        found = METHODS[name].select(units, k, **OPTIONS[name])
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
    # of equals the first
    assert kept(cls_attention.select, made(cls=[.1, .5, .2, .9, .5, 0.]), 2) == [1, 3]


def crops(first, attention):
    """A whole picture of 2x2 units and two crops of as many, the left and the right half."""
    units = made(12, (6, 2), attention=attention, cls_first=[*first, *[0.] * 8],
                 crop=[0, 1, 0, 1, *[-1] * 8])
    units.views = [3]
    return units


def test_hired_by_hand():
    assert kept(hired.select, made(attention=[.1, .5, .2, .9, .5, 0.]), 2) == [1, 3]
    units = crops([.5, .1, .3, .1], [.4, .3, .2, .1] * 3)
    # 8: 4 of the whole picture, the crops share 4 as 8 : 2, that is 3.2 and 0.8, what is left goes
    # to the heavier
    assert kept(hired.select, units, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept(hired.select, units, 6, alpha=.2) == [0, 4, 5, 6, 7, 8]  # 1, and 5 as 4 : 1


def test_hired_as_released_counts_in_stripes_and_loses_what_rounding_leaves():
    units = crops([.5, .1, .3, .1], [.4, .3, .2, .1] * 3)
    # the two most attended, 0 and 2, lie in the left half, but one in each of the stripes 0 1, 2 3
    assert kept(hired.select, units, 8, as_released=True) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert kept(hired.select, units, 6, as_released=True) == [0, 1, 2, 4, 8]


def test_hiprune_by_hand():
    units = made(6, (2, 3), received_middle=[0., 0, 1, 0, 0, 0], received=[.1, .2, .3, .4, .5, .6])
    # alpha = 1: one anchor, 2, its neighbours 1 and 5, then the most attended of 0, 3, 4
    assert kept(hiprune.select, units, 5, alpha=1.) == [1, 2, 3, 4, 5]
    assert kept(hiprune.select, units, 4) == [2, 3, 4, 5]  # round(0.08) anchors: registers alone


def test_hiprune_as_released_wraps_around():
    units = made(6, (2, 3), received_middle=[0., 0, 1, 0, 0, 0], received=[.1, .2, .3, .4, .5, .6])
    # of 2, one to the right is 3, the start of the next row; one row up is -1, clamped to 0
    assert kept(hiprune.select, units, 5, alpha=1., as_released=True) == [0, 1, 2, 3, 5]


def test_divprune_by_hand():
    angle = torch.tensor([0., 12, 95, 100, 185, 278]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    # 185 is 85 degrees from its nearest, more than any; 0 is furthest from it; 95 is 90 from both
    assert divprune.farthest(*divprune.distances([x]), 3).tolist() == [[4, 0, 2]]
    assert kept(divprune.select, made(projected=x), 3) == [0, 2, 4]


def test_divprune_chooses_as_the_naive_loop():
    """Every step anew takes the minimum over all that are chosen."""
    for seed in range(5):
        x = torch.randn(200, 24, generator=torch.Generator().manual_seed(seed))
        apart = 1 - F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
        chosen = [int(apart.fill_diagonal_(torch.inf).amin(0).argmax())]
        while len(chosen) < 40:
            gap = apart[chosen].amin(0)
            gap[chosen] = -torch.inf
            chosen.append(int(gap.argmax()))
        assert divprune.farthest(*divprune.distances([x]), 40).tolist() == [chosen]


def test_divprune_as_released_chooses_near_equal_tokens_again():
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x = (torch.ones(64, 32) + 1e-3 * noise).bfloat16()
    units = made(64, projected=x)
    assert len(divprune.select(units, 20, as_released=True)[0]) < 20
    assert len(divprune.select(units, 20)[0]) == 20


def test_holov_by_hand():
    units = made(attention=[.9, .8, .1, .1, .2, .1])
    # stripes 0 1 2 and 3 4 5 weigh .6 and .13; K = 2: 1.6 and .4, the one left goes to the heavier
    assert kept(holov.select, units, 2, stripes=2) == [0, 1]
    # K = 4: 3.3 and .7, so 4 for the first, which has 3: one goes over
    assert kept(holov.select, units, 4, stripes=2) == [0, 1, 2, 4]
    assert kept(holov.select, units, 3, stripes=6) == [0, 1, 4]


def test_holov_as_released_loses_what_does_not_fit_a_stripe():
    units = made(attention=[.9, .8, .1, .1, .2, .1])
    assert kept(holov.select, units, 4, stripes=2, as_released=True) == [0, 1, 2]
    many = made(576, attention=torch.arange(576.))  # 16 stripes of 36: all alike, whatever K is
    released = torch.tensor(kept(holov.select, many, 64, as_released=True))
    assert all(len(part) <= 36 for part in released.split(36))


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
    x = torch.eye(6)[[0, 0, 1, 2, 3, 4]]  # 0 and 1 are the same, all others orthogonal
    units = made(feats=x, attention=[.9, .8, .3, .2, .1, .05])
    assert kept(prunesid.select, units, 2) == [0, 2]  # tau = 18 * 2 / 6 / 15 = .4
    assert kept(prunesid.select, units, 6) == [0, 1, 2, 3, 4, 5]
    assert prunesid.allot(4, torch.tensor([3, 3]), torch.tensor([1, 3])).tolist() == [1, 3]
    assert prunesid.allot(5, torch.tensor([3, 3]), torch.tensor([1, 3])).tolist() == [2, 3]
    assert prunesid.allot(10, torch.tensor([9, 9]), torch.tensor([9, 1])).tolist() == [7, 3]


def test_prunesid_groups_tokens_by_their_component():
    """Two bundles along two directions: each is a group of its own, with at least one token
    kept."""
    generator = torch.Generator().manual_seed(0)
    centre = 6 * torch.randn(2, 32, generator=generator)
    x = centre[[0] * 12 + [1] * 6] + .1 * torch.randn(18, 32, generator=generator)
    group = prunesid.components(x, 2, None).abs().argmax(1)
    assert (group[:12] == group[0]).all() and (group[12:] == group[-1]).all()
    assert group[0] != group[-1]
    # the randomised one agrees where it is clear
    again = prunesid.components(x, 2, 3).abs().argmax(1)
    assert torch.equal(again == again[0], group == group[0])
    noise = torch.randn(40, 32, generator=generator)  # ... and is its own with every seed where not
    found = [prunesid.components(noise, 8, seed).abs().argmax(1) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    units = made(18, feats=x, attention=[1.] * 12 + [.01] * 6)
    assert kept(prunesid.select, units, 8)[-1] >= 12


def test_prunesid_as_released_feeds_cls(vlm, asked, family):
    if vlm.adapter.has_cls:
        released(prunesid, vlm, asked, 9)
        return
    units = encode(vlm, asked, prunesid.needs(vlm))
    keep = prunesid.select(units, 4, as_released=True)
    assert all(len(i) > 4 for i in keep)  # 16 a view, or all of fewer
    vlm.prune(asked, units, keep)


def test_prunesid_as_released_goes_by_k_and_shares_out_one_less(monkeypatch):
    """Components, threshold and bounds of K, though [CLS] is one of the K."""
    generator = torch.Generator().manual_seed(0)
    centre = 6 * torch.randn(2, 32, generator=generator)
    x = centre[[0] * 12 + [1] * 6] + .1 * torch.randn(18, 32, generator=generator)
    attention = torch.tensor([1.] * 12 + [.01] * 6)
    asked, components = [], prunesid.components
    monkeypatch.setattr(prunesid, "components",
                        lambda x, q, seed: asked.append(q) or components(x, q, seed))
    for seed in (0, 1):
        found = prunesid.choose(x, 8, attention, seed).tolist()
        assert len({*found}) == 7 and max(found) >= 12
    assert asked == [2, 2]  # 8 / 4, not 7 / 4
    cosine = torch.tensor([[1., .2, .4], [.2, 1, .6], [.4, .6, 1]])
    assert prunesid.threshold(cosine, 2).item() == pytest.approx(18 * 2 / 3 * .4)
    assert prunesid.threshold(cosine, 2, True, True).item() == pytest.approx(2 / 32 * .4)
    size, survivors = torch.full((16,), 10), torch.tensor([10] + [4] * 15)
    # of 65 at most 10 a group, of 64 at most 5: the first has 1 + round(48 * 10 / 70)
    share = prunesid.allot(65, size, survivors, 64)
    assert share.sum() == 64 and share[0] == 8
    assert prunesid.allot(64, size, survivors)[0] == 5
    assert len(prunesid.choose(x, 18, attention, 0)) == 17
    assert prunesid.choose(x, 1, attention, 0).tolist() == []


def test_prunesid_as_released_for_qwen_has_floors_and_half_a_mean():
    cosine = torch.tensor([[1., .2, .4], [.2, 1, .6], [.4, .6, 1]])
    # three ones and three cosines, by all nine entries; 18 K / N is 12
    assert prunesid.threshold(cosine, 2, False, True).item() == pytest.approx(12 * 4.2 / 9)
    even = torch.full((36, 36), .5).fill_diagonal_(1.)
    mean = (36 + 36 * 35 / 2 * .5) / 36 ** 2
    assert prunesid.threshold(even, 1, False, True).item() == pytest.approx(mean)  # not .5 of it
    assert prunesid.threshold(even, 1).item() == pytest.approx(18 / 36 * .5)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    for k, left in ((3, 16), (16, 16), (20, 20), (40, 40)):
        found = kept(prunesid.select, made(40, feats=x, projected=x), k, as_released=True)
        assert len(found) == left and found == sorted({*found})
        assert len(kept(prunesid.select, made(40, feats=x, projected=x), k)) == k
    few = made(9, feats=x[:9], projected=x[:9])
    assert kept(prunesid.select, few, 3, as_released=True) == list(range(9))


def released(module, vlm, batch, k):
    """keep of K, and feats of which each view's first is the state of [CLS]; in the released
    order."""
    units = encode(vlm, batch, module.needs(vlm))
    keep, feats = module.select(units, k, as_released=True, seed=3)
    assert [len(i) for i in keep] == [k] * 3 and feats.shape == (3 * k, *units.feats.shape[1:])
    again, same = module.select(units, k, as_released=True, seed=3)
    assert torch.equal(feats, same)
    for b in range(3):
        first = units.readings["cls state"][units.image_of == b][0]
        torch.testing.assert_close(feats[b * k], first.expand_as(feats[b * k]), **EXACT)
    vlm.prune(batch, units, keep, feats)  # and it is a prompt


def test_cdpruner_by_hand():
    def spread(x, relevance, k):
        return cdpruner.spread(cdpruner.kernel([x], [torch.tensor(relevance)]), k)[0].tolist()
    x = torch.eye(6)[[0, 0, 1, 1, 2, 2]]
    assert spread(x, [1., .9, .8, .7, .6, .5], 3) == [0, 2, 4]  # diverse first ...
    assert spread(x, [1., .9, .1, .1, .1, .1], 2) == [0, 2]
    near = F.normalize(torch.tensor([[1., 0], [.6, .8], [0, 1], [0, 1], [0, 1], [0, 1]]), dim=1)
    # ... but relevance counts: what 0 leaves of 1 is .9^2 * .64, of 2 it is .5^2
    assert spread(near, [1., .9, .5, .5, .5, .5], 2) == [0, 1]
    question = torch.tensor([[[2., 1, 0, 0, 0, 0], [9.] * 6]]), torch.tensor([[True, False]])
    units = made(projected=x)
    assert kept(cdpruner.select, units, 1, question=question) == [0]
    assert kept(cdpruner.select, units, 1, question=question, sign=-1) == [4]  # the least alike
    with pytest.raises(ValueError, match="cdpruner reads the question"):
        cdpruner.select(units, 1)


def test_cdpruner_with_word_embeddings_wants_what_is_like_the_question():
    """On the shipped tiny LLaVA: with the code's minus, which is meant for CLIP's space, it is
    worse than random."""
    vlm = FrozenVLM.from_pretrained("tiny/llava")

    def signed(sign):
        return Way(lambda asked, k: cdpruner.select(asked.units, k, question=asked.question,
                                                    sign=sign),
                   reads_question=True, needs=cdpruner.needs(vlm))
    ways = {("random", 16): baselines.way("random", vlm), ("plus", 16): signed(1),
            ("minus", 16): signed(-1)}
    answers = answer_all(vlm, ways, 60)
    blind, plus, minus = (tiny_world.score(answers[key])["average"] for key in ways)
    assert plus > blind + 20 and minus < blind


def test_cdpruner_as_released_couples_pictures_and_repeats_itself():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    question = torch.randn(1, 2, 6, generator=generator), torch.ones(1, 2, dtype=torch.bool)
    low_rank = made(40, projected=x)
    assert len(cdpruner.select(low_rank, 20, question=question)[0]) == 20
    assert len(cdpruner.select(low_rank, 20, question=question, as_released=True)[0]) < 20
    # its relevance runs from 0 to 1 over the batch, so one picture's depends on the other's
    alone = cdpruner.scaled(x[:20, 0], None)
    twice = cdpruner.scaled(x[:20, 0], (x[:, 0].min() - 1, x[:, 0].max()))
    assert alone.min() < 1e-5 < twice.min()


def test_cdpruner_with_clip():
    """CLIP's own embeddings: of the patches before the last layer, and of the question in two
    segments."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = small | dict(vocab_size=50, eos_token_id=49, bos_token_id=48)
    clip = CLIPModel(CLIPConfig(projection_dim=12, text_config=text,
                                vision_config=small | dict(image_size=12, patch_size=4))).eval()
    with torch.no_grad():
        vision = clip.vision_model
        seen = vision(torch.randn(1, 3, 12, 12), output_hidden_states=True)
        states = seen.hidden_states[-2][0, 1:]
        patches = clip.visual_projection(vision.post_layernorm(states))  # (9, 12)
        read = clip.text_model(torch.tensor([[48, 5, 6, 49], [48, 7, 8, 49]]))
        texts = clip.text_projection(read.pooler_output)
    assert patches.shape == (9, 12) and texts.shape == (2, 12)
    units = made(9, (3, 3), feats=states, projected=torch.randn(9, 20))
    embeddings = (patches, texts[None], torch.ones(1, 2, dtype=torch.bool))
    found = kept(cdpruner.select, units, 1, clip=embeddings)
    cosine = F.cosine_similarity(patches[:, None], texts[None], dim=-1).mean(1)
    assert found == [int(cosine.argmin())]


def test_visionzip_by_hand():
    x = torch.tensor([[1.], [2], [3], [4], [5], [9]])
    units = made(feats=x, attention=[.1, .9, .2, .8, .3, .7], keys=torch.eye(6))
    keep, feats = visionzip.select(units, 4)  # round(4 * 5 / 32) = 1 contextual one
    assert keep[0].tolist() == [0, 1, 3, 5]
    assert feats.flatten().tolist() == [3, 2, 4, 9]    # (1 + 3 + 5) / 3 at 0
    keys = torch.tensor([[1., 0], [0, 0], [.9, .1], [0, 1.], [.1, .9], [.8, .3]])
    target, feats = visionzip.merge(x, keys, torch.tensor([1]), 2, plus=False)
    # of 0 2 3 4 5 every second is a target, two in all: 0 takes 2 and 5 in, 3 takes 4
    assert target.tolist() == [0, 3] and feats.flatten().tolist() == pytest.approx([13 / 3, 4.5])


def test_visionzip_as_released_adds_up(vlm, asked, family):
    x, keys = torch.tensor([[1.], [2], [3], [4], [5], [9]]), torch.eye(6)
    target, feats = visionzip.merge(x, keys, torch.tensor([1, 3, 5]), 1, plus=True)
    assert (target.tolist(), feats.flatten().tolist()) == ([0], [1 + (3 + 5) / 2])
    units = made(feats=x, attention=[.1, .9, .2, .8, .3, .7], keys=keys,
                 cls_state=torch.full((6, 1), 7.))
    # [CLS], two dominant, one contextual at the end
    keep, feats = visionzip.select(units, 4, as_released=True)
    assert feats.flatten().tolist() == pytest.approx([7, 2, 4, 1 + (3 + 5 + 9) / 3])
    assert keep[0].tolist() == [0, 1, 2, 3]  # [CLS] has the first free place, 2
    if vlm.adapter.has_cls:
        released(visionzip, vlm, asked, 9)
    else:
        with pytest.raises(ValueError, match="visionzip feeds \\[CLS\\]"):
            visionzip.select(encode(vlm, asked, visionzip.needs(vlm)), 4, as_released=True)


def test_prumerge_by_hand():
    x, a = torch.tensor([[1.], [2], [3], [4], [5], [6]]), torch.tensor([.1, .5, .05, .4, .2, .15])
    keys = torch.tensor([[1., 0], [.9, .1], [.8, .2], [0, 1], [.1, .9], [.2, .8]])
    index, feats = prumerge.merge(x, a, keys, torch.tensor([1, 3]), near=2)
    # 1 is nearest to 0 and 2, 3 to 4 and 5; the one more is of 0 2 4 5 and stands at 4
    assert index.tolist() == [1, 3, 4]
    assert feats.flatten().tolist() == pytest.approx([2 + .1 + .15, 4 + 1 + .9, .1 + .15 + 1 + .9])
    units = made(feats=x, attention_wide=a, keys_wide=keys)
    assert kept(prumerge.select, units, 3) == [1, 3, 4]
    # +: one of four is the most attended, 1; two fill up from 0 2 3 4 5, evenly: 0 and 3; then the
    # one more, at 4
    assert kept(prumerge.select, units, 4, plus=True) == [0, 1, 3, 4]
    many = torch.full((16,), .01)
    many[5] = 1.
    units = made(16, feats=torch.eye(16), attention_wide=many, keys_wide=torch.eye(16))
    # one stands out; the one more is at 0
    assert kept(prumerge.select, units, 9, adaptive=True) == [0, 5]
    # +: step 16, so every fifth up to 14, and 1 is the first that is free
    assert kept(prumerge.select, units, 9, adaptive=True, plus=True) == [0, 1, 5, 10]
    with pytest.raises(ValueError, match="no token's attention stands out"):
        prumerge.select(made(attention_wide=[.1] * 6, keys_wide=keys), 3, adaptive=True, plus=True)


def test_prumerge_as_released_lets_pictures_decide_for_one_another():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(64, generator=generator)
    a[:32], a[5], a[40] = a[:32] / 100, .5, 5.
    x = torch.randn(64, 8, generator=generator)
    both = Units(x, torch.tensor([0] * 32 + [1] * 32), [(4, 8)] * 2,
                 readings={"attention wide": a, "keys wide": x})
    alone = Units(x[:32], torch.zeros(32, dtype=torch.int64), [(4, 8)],
                  readings={"attention wide": a[:32], "keys wide": x[:32]})
    assert [len(i) for i in prumerge.select(both, 9, adaptive=True)[0]] == [2, 2]
    assert [len(i) for i in prumerge.select(alone, 9, as_released=True)[0]] == [2]
    # 32 / 64 of one token
    assert [len(i) for i in prumerge.select(both, 9, as_released=True)[0]] == [1, 1]
    keep, feats = prumerge.select(both, 9, as_released=True, plus=True)
    assert all(31 not in i.tolist()[:-1] for i in keep) and len(keep[0]) == len(keep[1])


def test_tome_by_hand():
    # [CLS] 1 2 3 4 5 6: the first set is [CLS] 2 4 6, the second 1 3 5
    keys = torch.tensor([[[1., 0], [1, 0], [1, .1], [0, 1], [.3, 1], [-1, 0], [-1, .8]]])
    stays, into = tome.bipartite(keys, 2)  # 2 is nearest to 1, 4 to 3; 6 to 5, but less so
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
    reason = "keep=5: 2 blocks that halve their tokens at most leave 9 of 36"
    with pytest.raises(ValueError, match=reason):
        tome.schedule(37, 6, 2)


@LLAVA
@torch.no_grad()
def test_merging_in_the_tower_is_a_weighted_mean_between_attention_and_feed_forward(vlm, asked):
    """Worked out again token by token, with the softmax written out."""
    # token -> the token it joins, in the numbers of that block
    plans = [{3: 4, 9: 4}, {2: 3, 5: 6}]

    def rule(i, keys):
        n = keys.shape[1]
        stays = [t for t in range(n) if t not in plans[i]]
        into = [stays.index(plans[i].get(t, t)) for t in range(n)]
        return (torch.tensor([row]).expand(3, -1) for row in (stays, into))
    feats, anchor = tome.merged(vlm, asked, rule)
    tower, heads = vlm.model.model.vision_tower, (2, 8)
    for b in range(3):
        x = tower.pre_layrnorm(tower.embeddings(asked["pixel_values"][b:b + 1]))[0]
        size, place = torch.ones(37, dtype=torch.float64), list(range(-1, 36))
        for block, plan in zip(tower.encoder.layers, plans):
            own = block.self_attn
            q, k, v = (part(block.layer_norm1(x)).unflatten(-1, heads)
                       for part in (own.q_proj, own.k_proj, own.v_proj))
            # softmax(. + log s)
            weights = (torch.einsum("qhd,khd->hqk", q, k) * 8 ** -.5).exp() * size
            weights = weights / weights.sum(-1, keepdim=True)
            x = x + own.out_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            members = {t: [t] + [s for s in plan if plan[s] == t]
                       for t in range(len(x)) if t not in plan}
            x = torch.stack([(size[m, None] * x[m]).sum(0) / size[m].sum()
                             for m in members.values()])
            size = torch.stack([size[m].sum() for m in members.values()])
            place = [place[t] for t in members]
            x = x + block.mlp(block.layer_norm2(x))
        assert anchor[b].tolist() == place[1:]
        torch.testing.assert_close(feats[b], x[1:], **EXACT)


def test_what_cannot_merge_says_why(vlm, asked, family):
    if family == "llava":
        return
    reason = f"{vlm.family} cannot merge inside its vision encoder: .*patch"
    with pytest.raises(ValueError, match=reason):
        tome.merged(vlm, asked, lambda i, keys: None)


def test_share_out():
    assert share_out(5, torch.tensor([1., 1, 1]), torch.tensor([9, 9, 9])).tolist() == [2, 2, 1]
    assert share_out(6, torch.tensor([9., 1, 0]), torch.tensor([2, 3, 9])).tolist() == [2, 3, 1]
    assert share_out(0, torch.ones(2), torch.tensor([3, 3])).tolist() == [0, 0]
    assert share_out(4, torch.zeros(2), torch.tensor([3, 3])).tolist() == [2, 2]


# ---------------------------------------------------------------------- by name, and answering

def answer_all(vlm, ways, n) -> dict:
    """{(name, K): predictions} of at least n questions about the tiny world."""
    answers = {key: [] for key in ways}
    questions = tiny_world.load(family=vlm.family, n=n)
    for part in answering.batches(questions, 64):
        for key, rows in answering.answer_batch(vlm, part, ways).items():
            answers[key] += rows
    return answers


def test_every_file_with_names_is_a_baseline():
    known = baselines.names()
    assert len(known) == len({*known}) == 25
    assert [n for n in known if n.startswith(("pdrop", "prumerge"))] == [
        "pdrop", "pdrop_last", "prumerge", "prumerge+"]
    assert not {"inside", "encoder"} & {*known}
    with pytest.raises(ValueError, match="baseline 'fast': expected one of cdpruner, cdpruner_wo"):
        baselines.way("fast", None)


def test_every_method_answers_as_the_unpruned_model_when_it_keeps_all():
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    names = [name for name in [*METHODS, "evidence"] if name != "cdpruner"]  # it has no text tower
    ways = {(name, 144): baselines.way(name, vlm) for name in names}
    answers = answer_all(vlm, {("vanilla", 0): None} | ways, 6)
    for key in ways:
        assert [row["answer"] for row in answers[key]] == [
            row["answer"] for row in answers["vanilla", 0]], key
        assert {row["kept"] for row in answers[key]} == {144}


def test_methods_that_cannot_serve_say_why():
    vlm = FrozenVLM.from_pretrained("tiny/qwen2_5_vl", torch.float32)
    reasons = {"cls_attention": "this vision encoder has no .CLS. token",
               "cdpruner": "the vision encoder is a 'qwen2_5_vl_vision', to whose pictures",
               "tome": "tome merges inside the vision encoder, but a visual token is made of"}
    for name in baselines.names():
        if name in reasons:
            with pytest.raises(ValueError, match=reasons[name]):
                baselines.way(name, vlm)
        else:
            assert isinstance(baselines.way(name, vlm), Way)
    assert {*reasons} == {*UNSERVED, "cdpruner"}


def test_evidence_keeps_what_covers_the_asked_things_most():
    units = made(6)
    shares = torch.tensor([0., .5, 1., 0, .5, 0])
    assert kept(evidence.select, units, 2, evidence=[shares]) == [1, 2]
    assert kept(evidence.select, units, 3, evidence=[torch.zeros(6)]) == [0, 1, 2]  # the first
    with pytest.raises(ValueError, match="keep=7 does not fit 6 visual tokens"):
        evidence.select(units, 7, evidence=[torch.zeros(6)])
    for unknown in (None, [None]):
        with pytest.raises(ValueError, match="nothing says which units do: expected a benchmark"):
            evidence.select(units, 2, evidence=unknown)


def test_random_draws_for_every_picture_by_its_name():
    """Whatever batch it comes in, and whatever else is in there."""
    units = Units(torch.eye(12), torch.tensor([0] * 6 + [1] * 6), [(2, 3)] * 2)
    both = answering.QuestionBatch(None, units, [0, 1], ["a", "b"])
    alone = answering.QuestionBatch(None, units.rows([1]), [0], ["b"])
    for seed in (0, 1):
        way = baselines.way("random", None, seed=seed)
        assert torch.equal(way.select(both, 3)[1], way.select(alone, 3)[0])
    draws = {tuple(baselines.way("random", None, seed=seed).select(alone, 3)[0].tolist())
             for seed in range(8)}
    assert len(draws) > 1


def test_hireds_whole_picture_takes_its_share_what_it_has_and_what_the_crops_have_no_room_for():
    units = crops([.5, .1, .3, .1], [.4, .3, .2, .1] * 3)
    for alpha, k, of_whole in ((.5, 7, 3), (.25, 8, 2), (.9, 8, 4), (.2, 11, 3), (0., 9, 1),
                               (1., 3, 3)):
        keep = kept(hired.select, units, k, alpha=alpha)
        assert len(keep) == k and sum(unit < 4 for unit in keep) == of_whole, (alpha, k)
