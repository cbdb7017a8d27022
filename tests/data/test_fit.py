"""A row that the model cannot read never ends a run: it is cut, or the next one stands in."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import FrozenVLM
from data.batches import batches, causes, open_data
from data.fit import Fit
from data.pictures import oblong
from data.sources import open_source
from measure import shapes

SIZES = [(1, 1), (3, 200), (200, 3), (60, 60), (10, 1500), (1500, 10), (1, 200), (300, 2)]
ROWS = ["dialogue", "question", "question twice"]
SHORT = ("what is red ?", "blue")


def words(n: int) -> str:
    """A text of n tokens."""
    return " ".join(["red"] * n)


@pytest.fixture(scope="module")
def vlm(path):
    """Of every family, with 512 positions, as a loader's worker has it."""
    return FrozenVLM.from_pretrained(path, torch.float32)


@pytest.fixture
def picture():
    return Image.new("RGB", (60, 40), "red")


def build(vlm, rows, image, turns):
    """What data.batches.collate makes of one picture."""
    if rows == "question":
        return vlm.batch([image] * len(turns), [[turn] for turn in turns], "cpu")
    if rows == "question twice":
        return vlm.batch([image], [[(turns[0][0], None)]], "cpu", ask_twice=True)
    return vlm.batch([image], [turns], "cpu")


def image_tokens(vlm, picture) -> int:
    return int((vlm.batch([picture], [[SHORT]])["input_ids"] == vlm.image_id).sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_picture_of_any_shape_is_served_with_a_long_question(vlm, rows, size):
    image = Image.new("RGB", size)
    assert oblong(image) is None
    long = (words(100 if rows == "question twice" else 330), "blue")
    turns, cut = Fit(vlm, rows, 7)(image, [long, SHORT])
    assert turns == [long, SHORT] and cut is None
    assert build(vlm, rows, image, turns)["attention_mask"].sum() > 100


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_the_processors_of_real_sizes_take_every_shape(tmp_path, name):
    vlm = FrozenVLM.from_pretrained(shapes.write(name, tmp_path, shrink=True), torch.float32,
                                    random_weights=True)
    for size in SIZES:
        tokens = image_tokens(vlm, Image.new("RGB", size))
        # what Fit relies on
        assert 0 < tokens <= 3 * vlm.limit // 4, size
    widest = [image_tokens(vlm, Image.new("RGB", size)) for size in ((1344, 1344), (1344, 336))]
    assert max(widest) <= 3 * vlm.limit // 4


def test_a_picture_takes_at_most_three_quarters_of_the_positions(vlm):
    for size in (*SIZES, (80, 80), (300, 100), (2000, 1500)):
        assert image_tokens(vlm, Image.new("RGB", size)) <= 3 * vlm.limit // 4


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_what_is_left_always_fits_and_is_as_much_as_fits(vlm, picture, rows, n):
    """Against batch() itself, at every length around the last that fits."""
    fit = Fit(vlm, rows, 7)
    least = vlm.limit - image_tokens(vlm, picture)
    together = n if rows == "dialogue" else 1 + (rows == "question twice")
    room = least // together
    seen = set()
    for length in (5, room - 40, room - 25, *range(room - 18, room - 1, 4), room, 2 * room):
        turns = [(words(length), "blue")] * n
        fits = []
        for k in range(n):
            try:
                build(vlm, rows, picture, turns[: k + 1] if rows == "dialogue" else [turns[k]])
                fits.append(True)
            except ValueError:
                fits.append(False)
        seen.add(sum(fits))
        if not any(fits):
            with pytest.raises(ValueError, match=r"does not fit: \d+ tokens, .*at most 512"):
                fit(picture, turns)
            continue
        left, cut = fit(picture, turns)
        assert left == turns[: sum(fits)]
        build(vlm, rows, picture, left)
        assert (cut is None) == all(fits)
        start = f"cut: {sum(fits)} of {n} turns are left, does not fit: "
        assert cut is None or cut.startswith(start)
    assert {0, n} <= seen if rows != "dialogue" or n == 1 else {n - 1, n} <= seen


@pytest.mark.parametrize("rows", ROWS)
def test_a_picture_of_three_quarters_leaves_room_for_what_is_written_around_turns(
    vlm, picture, monkeypatch, rows
):
    """Many short turns: the template's marks take more than the texts do."""
    monkeypatch.setattr(vlm, "limit", -(-4 * image_tokens(vlm, picture) // 3))
    fit = Fit(vlm, rows, 40)
    served = 0
    for n in (1, 2, 3, 4, 6, 9, 20, 40):
        try:
            left, _ = fit(picture, [("what", "red")] * n)
        except ValueError:
            continue
        build(vlm, rows, picture, left)
        served = max(served, len(left))
    if vlm.limit > 100 and rows == "dialogue":
        assert 1 <= served < 40


@pytest.mark.parametrize("rows", ROWS)
def test_turns_that_the_tokenizer_cannot_read_are_cut(vlm, picture, rows):
    bad, marked = ("what is the zebra ?", "blue"), (f"what {vlm.image_token} is", "red")
    fit = Fit(vlm, rows, 4)
    for wrong, cause in ((bad, "unknown words: zebra"), (marked, f"{vlm.image_token} in the text")):
        left, cut = fit(picture, [SHORT, wrong, SHORT])
        assert left == ([SHORT] if rows == "dialogue" else [SHORT, SHORT])
        assert cut == f"cut: {len(left)} of 3 turns are left, {cause}"
        with pytest.raises(ValueError, match=f"^{cause.replace('|', '.')}$"):
            fit(picture, [wrong])
        # behind the last turn that is looked at, nothing counts
        assert fit(picture, [SHORT] * 4 + [wrong]) == ([SHORT] * 4, None)
    assert Fit(vlm, "picture", 1)(picture, [bad, marked]) == ([bad, marked], None)


def test_what_an_answer_says_matters_only_where_it_is_read(vlm, picture):
    turns = [("what ?", "zebra")]
    assert Fit(vlm, "question twice", 1)(picture, turns) == (turns, None)
    with pytest.raises(ValueError, match="unknown words: zebra"):
        Fit(vlm, "dialogue", 1)(picture, turns)


def test_pictures_are_processed_for_long_texts_only(vlm, picture, monkeypatch):
    calls, real = [], FrozenVLM.batch
    monkeypatch.setattr(
        FrozenVLM, "batch", lambda self, *a, **k: calls.append(1) or real(self, *a, **k)
    )
    fit = Fit(vlm, "dialogue", 7)
    for _ in range(5):
        fit(picture, [SHORT] * 2)
    assert len(calls) == 1  # what the template writes around a turn
    fit(picture, [(words(150), "blue")])
    assert len(calls) == 2


def test_a_first_row_of_no_use_spoils_nothing(vlm, picture):
    fit = Fit(vlm, "dialogue", 7)
    with pytest.raises(ValueError, match="does not fit"):
        fit(picture, [(words(600), "blue")])
    assert fit(picture, [SHORT, (words(600), "red")])[0] == [SHORT]


# ------------------------------------------------------------ in a run


def conversation(*turns):
    return [{"from": who, "value": text} for turn in turns
            for who, text in zip(("human", "gpt"), turn)]


@pytest.fixture
def instruct(tmp_path):
    """LLaVA-665K's layout: long questions, odd pictures, rows that cannot serve."""
    (tmp_path / "images").mkdir()
    sizes = {"small": (60, 60), "dot": (1, 1), "thin": (3, 200), "long": (1, 500)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(tmp_path / f"images/{name}.png")
    table = [
        ("small.png", [(words(400), "blue")]),
        ("small.png", [(words(600), "blue")]),
        ("dot.png", [SHORT, (words(600), "red"), SHORT]),
        ("thin.png", [("what is the zebra ?", "blue")]),
        ("long.png", [SHORT]),
        ("thin.png", [SHORT, ("what is blue ?", "zebra")]),
    ]
    rows = [{"id": str(i), "image": image, "conversations": conversation(*turns)}
            for i, (image, turns) in enumerate(table)]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    return tmp_path


def options(folder, **changes):
    base = dict(data="llava-665k", path=folder / "mix.json", split=None, prompt="what ?",
                images=folder / "images", take=None, questions=3, epochs=1.0, steps=3, batch=4,
                micro=2, seed=0, workers=0, cache_features=None)
    return SimpleNamespace(**{**base, **changes})


CAUSES = {"dialogue": {"does not fit", "unknown words", "too oblong", "cut"},
          "question": {"does not fit", "unknown words", "too oblong", "cut"},
          "picture": {"too oblong"}}


@pytest.mark.parametrize("rows", CAUSES)
def test_a_run_goes_through_rows_that_cannot_serve(vlm, instruct, rows):
    def read(first_step=0, rank=0, processes=1, **changes):
        chosen = options(instruct, **changes)
        data = open_data(chosen, vlm, rows)
        return [*batches(chosen, vlm, data, rows, first_step, rank, processes)]

    def skipped(found):
        return [line for batch in found for line in batch.skipped]
    whole = read()
    assert len(whole) == 6
    assert causes(skipped(whole)).keys() == CAUSES[rows]
    for batch in whole:
        units = vlm.encode(batch.pictures)
        if rows != "picture":
            loss = vlm.loss(vlm.embed(batch.rows, units.rows(batch.owner)))
            assert torch.isfinite(loss) and batch.answers
    # item i follows from (seed, i) alone, also where another stands in
    resumed, ranks = read(1), [read(rank=rank, processes=2) for rank in range(2)]
    assert skipped(resumed) == skipped(whole[2:])
    merged = [batch for step in zip(*ranks) for batch in step]
    ahead = read(workers=1)
    for other in (merged, ahead, [*whole[:2], *resumed]):
        for mine, theirs in zip(whole, other, strict=True):
            assert mine.skipped == theirs.skipped
            assert all(torch.equal(x, theirs.pictures[name]) for name, x in mine.pictures.items())
            if rows != "picture":
                assert torch.equal(mine.rows["labels"], theirs.rows["labels"])


def test_a_model_that_can_read_nothing_is_told_so(instruct, picture):
    """Here the rows are fine and the model is wrong: no run goes on for ever."""
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    rows = [{"image": "small.png", "conversations": conversation(("where is Paris ?", "there"))}]
    (instruct / "mix.json").write_text(json.dumps(rows * 4))
    data = open_source("llava-665k", instruct / "mix.json", images=instruct / "images",
                       fit=Fit(vlm, "dialogue", 7))
    with pytest.raises(ValueError, match="none of 4 rows .* can be used; .*unknown words: Paris"):
        data[0]


def test_reasons_are_counted_by_cause():
    lines = ["a.json row 1 (x.png): does not fit: 700 tokens", "b row 2: does not fit: 900 tokens",
             "b row 3: no answer", "b row 4: cut: 1 of 3 turns are left, does not fit: 700 tokens",
             f"x.png: {oblong(Image.new('RGB', (1, 500)))}"]
    assert causes(lines) == {"does not fit": 2, "no answer": 1, "cut": 1, "too oblong": 1}
