"""Units, questions, labels and positions of a batch, and what is refused of each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from full_prompt import ANSWERED, GRIDS, QUESTIONS, SHOWN, TOLERANCE, every, rows_for, shown_units
from PIL import Image
from tiny_models import MODELS, llava, llava_next, llava_next_video

from baselines import random_tokens
from baselines.encoder import deepest, encode
from baselines.inside import visual_states
from common import IGNORE, FrozenVLM, Units

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_prompt_may_have_as_many_tokens_as_the_model_has_positions(vlm, pictures, monkeypatch):
    turns = [[(question, None)] for question in QUESTIONS]
    n = int(vlm.batch(pictures, turns)["attention_mask"].sum(1).max())
    monkeypatch.setattr(vlm, "limit", n)
    vlm.batch(pictures, turns)
    monkeypatch.setattr(vlm, "limit", n - 1)
    with pytest.raises(ValueError, match=f"row . has {n} tokens.*expected at most {n - 1}"):
        vlm.batch(pictures, turns)
