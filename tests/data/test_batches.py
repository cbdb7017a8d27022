"""Batches: what each kind of row holds, and that item i of a run follows from (seed, i) alone."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from common import IGNORE, FrozenVLM
from data import batches as room
from data.batches import Batch, batches, cached, collate, has_text, open_data
from data.dialogues import Dialogues
from data.sources import open_source
from tiny.scenes import CAPTION

ROWS = ["dialogue", "question", "picture", "question twice"]


@pytest.fixture(scope="module", params=["tiny/llava", "tiny/qwen2_5_vl"])
def tiny(request):
    return FrozenVLM.from_pretrained(request.param)


def config(**changes):
    """What the data room reads of a run's options."""
    options = dict(
        data="scenes",
        model="tiny",
        path=None,
        split=None,
        prompt="what is there ?",
        images=None,
        take=None,
        questions=3,
        n_pictures=6,
        epochs=0.0,
        steps=4,
        batch=4,
        micro=4,
        seed=0,
        dtype="bfloat16",
        workers=0,
        cache_features=None,
    )
    return SimpleNamespace(**{**options, **changes})


def read(vlm, options, rows, first_step=0, rank=0, processes=1, data=None, cache=None):
    data = data or open_data(options, vlm, rows)
    return [*batches(options, vlm, data, rows, first_step, rank, processes, cache)]


def build(vlm, rows, count=2, **changes) -> tuple[list, Batch]:
    """The first items of a run, and the batch of them."""
    data = open_data(config(**changes), vlm, rows)
    items = [data[i] for i in range(count)]
    return items, collate(vlm, rows)(items)


def same(batch, other) -> bool:
    def values(part):
        return {} if part is None else dict(part)

    return (
        batch.owner == other.owner
        and batch.skipped == other.skipped
        and all(
            values(mine).keys() == values(theirs).keys()
            and all(torch.equal(x, values(theirs)[name]) for name, x in values(mine).items())
            for mine, theirs in ((batch.pictures, other.pictures), (batch.rows, other.rows))
        )
    )


def hashes(vlm, found) -> list[int]:
    """A number per picture, of its pixels."""
    return [
        hash(picture.float().numpy().tobytes())
        for batch in found
        for picture in vlm.pixels(batch.pictures)
    ]


def photos(folder, n=5):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        pixels = rng.integers(0, 256, (144, 144, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def captions(folder, n=6):
    features = {"image": datasets.Image(), "caption_enriched": datasets.Value("string")}
    images = [image for image, _ in Dialogues(0, n)]
    texts = ["there is a red circle"] * (n - 1) + [""]
    folder.mkdir()
    datasets.Dataset.from_dict(
        {"image": images, "caption_enriched": texts}, datasets.Features(features)
    ).to_parquet(folder / "train-0.parquet")
    return folder


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# ------------------------------------------------------------ one batch


def questions_of(vlm, rows) -> list[str]:
    """The question that every row reads, from its embeddings' tokens."""
    return [
        vlm.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(rows["question_ids"], rows["question_mask"])
    ]


def test_a_dialogue_is_a_row_with_its_caption_first(tiny):
    items, batch = build(tiny, "dialogue")
    assert batch.rows is batch.pictures and batch.owner == [0, 1] and batch.units is None
    assert all(turns[0][0] == CAPTION and len(turns) == 4 for _, _, turns, _ in items)
    assert questions_of(tiny, batch.rows) == [
        " ".join(question for question, _ in turns) for _, _, turns, _ in items
    ]


def test_each_question_is_a_row_and_each_picture_is_there_once(tiny):
    items, batch = build(tiny, "question")
    assert batch.owner == [0] * 3 + [1] * 3 and batch.rows["input_ids"].shape[0] == 6
    assert "pixel_values" in batch.pictures and "pixel_values" not in batch.rows
    text, valid = tiny.question(batch.rows)
    asked = [question for _, _, turns, _ in items for question, _ in turns]
    assert CAPTION not in asked
    for row, question in enumerate(asked):
        ids = tiny.tokenizer(question, add_special_tokens=False)["input_ids"]
        assert valid[row].sum() == len(ids)
        assert torch.equal(text[row][: len(ids)], tiny.lm.embed_tokens.weight[ids])


def test_rows_of_questions_go_through_the_model(tiny):
    items, batch = build(tiny, "question")
    units = tiny.encode(batch.pictures).rows(batch.owner)
    prompt = tiny.embed(batch.rows, units)
    others = torch.arange(len(batch.owner))[:, None] != 5
    loss = tiny.loss(replace(prompt, labels=prompt.labels.masked_fill(others, -100)))
    alone = tiny.batch([items[1][1]], [items[1][2][2:3]])
    expected = tiny.loss(tiny.embed(alone, tiny.encode(alone)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pictures_alone_have_no_rows(tiny):
    items, batch = build(tiny, "picture")
    assert batch.rows is None and batch.answers == 0 and batch.owner == [0, 1]
    assert same(batch, Batch(tiny.pictures([item[1] for item in items]), None, [0, 1]))


def test_a_question_stands_before_the_image_too_and_has_no_answer(tiny):
    items, batch = build(tiny, "question twice")
    assert batch.rows is batch.pictures and batch.answers == 0
    assert (batch.rows["labels"] == IGNORE).all()
    for ids, (_, _, turns, _) in zip(batch.rows["input_ids"], items):
        text = tiny.tokenizer.decode(ids)
        assert turns[0][0] != CAPTION and text.count(turns[0][0]) == 2
        assert text.index(turns[0][0]) < text.index(tiny.image_token)


@pytest.mark.parametrize("rows", ["dialogue", "question"])
def test_answer_tokens_are_those_that_the_loss_counts(tiny, rows):
    _, batch = build(tiny, rows, 4)
    assert batch.answers == (batch.rows["labels"][:, 1:] != IGNORE).sum()
    parts = read(tiny, config(steps=1, micro=1), rows)
    assert sum(part.answers for part in parts) == batch.answers > 8


def test_a_batch_moves_whole(tiny):
    _, batch = build(tiny, "dialogue")
    units = tiny.encode(batch.pictures)
    units.has_token = torch.ones(len(units.feats), dtype=torch.bool)
    units.readings = {"cls": units.feats[:, 0]}
    moved = replace(batch, units=units, skipped=("x",)).to("meta")
    assert moved.rows is moved.pictures and moved.owner == batch.owner and moved.skipped == ("x",)
    tensors = [*moved.pictures.values(), moved.units.feats, moved.units.image_of]
    tensors += [moved.units.has_token, moved.units.readings["cls"]]
    assert all(x.device.type == "meta" for x in tensors)
    assert moved.units.grid == units.grid
    _, silent = build(tiny, "picture")
    assert silent.to("cpu").rows is None and silent.to("cpu").units is None


# ------------------------------------------------------------ a run


@pytest.mark.parametrize("epochs", [0.0, 3.0])
@pytest.mark.parametrize("rows", ROWS)
def test_parts_workers_processes_and_a_kill_change_no_item(tiny, rows, epochs):
    options = config(epochs=epochs, seed=2)
    whole = read(tiny, options, rows)
    assert len(whole) == 4
    worker = read(tiny, config(epochs=epochs, seed=2, workers=1), rows)
    assert all(map(same, whole, worker)) and len(worker) == 4
    resumed = read(tiny, options, rows, first_step=3)
    assert len(resumed) == 1 and same(resumed[0], whole[3])
    numbers = hashes(tiny, whole)
    assert len(numbers) == 16
    parts = read(tiny, config(epochs=epochs, seed=2, micro=2), rows)
    assert len(parts) == 8 and hashes(tiny, parts) == numbers
    ranks = [
        read(tiny, config(epochs=epochs, seed=2, micro=2), rows, 0, rank, 2) for rank in range(2)
    ]
    merged = [batch for step in zip(*ranks) for batch in step]
    assert all(map(same, parts, merged)) and len(merged) == 8
    assert hashes(tiny, read(tiny, config(epochs=epochs, seed=3), rows)) != numbers


def test_scenes_are_fresh_or_gone_through_in_epochs(tiny):
    fresh = open_data(config(), tiny, "dialogue")
    assert len(fresh) == 16 and len(set(hashes(tiny, read(tiny, config(), "dialogue")))) == 16
    some = config(epochs=2.0, steps=3)
    assert len(open_data(some, tiny, "picture")) == 6
    numbers = hashes(tiny, read(tiny, some, "picture"))
    assert sorted(numbers[:6]) == sorted(numbers[6:]) and numbers[:6] != numbers[6:]
    assert all(len(item[2]) == 1 for item in open_data(some, tiny, "question"))


def test_no_more_questions_than_asked_for(tiny):
    for n in (1, 5):
        data = open_data(config(questions=n, steps=1), tiny, "question")
        assert all(len(turns) == n for _, _, turns, _ in data)


def test_a_folder_goes_on_past_what_is_broken_and_reports_it(tiny, tmp_path):
    folder = photos(tmp_path / "photos")
    (folder / "b.png").write_text("no picture")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    options = config(data="folder", images=folder, epochs=1.0, steps=2)
    found = read(tiny, options, "picture")
    skipped = {each.split(": ")[0]: each for batch in found for each in batch.skipped}
    assert skipped.keys() == {"b.png", "thin.png"}
    assert "cannot identify" in skipped["b.png"] and "1x5000 pixels" in skipped["thin.png"]
    assert len(hashes(tiny, found)) == 8 and len(set(hashes(tiny, found))) == 5


@pytest.mark.parametrize("rows", ["dialogue", "question", "question twice"])
@pytest.mark.parametrize("name", ["folder", "coco", "docvqa", "chartqa"])
def test_data_without_text_are_refused_where_text_is_read(rows, name):
    assert not has_text(name)
    with pytest.raises(ValueError, match=f"data='{name}' has pictures and no text: expected"):
        open_data(config(data=name, images="nowhere"), None, rows)


def test_data_with_text_have_it():
    assert all(map(has_text, ("scenes", "imagenet-captions", "llava-665k")))


@pytest.mark.parametrize("stream", [False, True])
def test_captions_by_name_in_order_and_resumed(
    tiny, tmp_path, monkeypatch, capsys, own_cache, stream
):
    monkeypatch.setattr(room, "open_source", lambda *a: open_source(*a, stream=stream))
    options = config(data="imagenet-captions", path=captions(tmp_path / "copy"))
    whole = read(tiny, options, "dialogue")
    assert "imagenet-captions: 6 rows of " in capsys.readouterr().out
    assert questions_of(tiny, whole[0].rows) == ["what is there ?"] * 4
    assert {each.split(": ")[1] for batch in whole for each in batch.skipped} == {"empty caption"}
    # several workers would each read all blocks of a stream, and are not started
    several = config(**{**vars(options), "workers": 2})
    data = open_data(several, tiny, "dialogue")
    ahead = batches(several, tiny, data, "dialogue", 0, 0, 1)
    assert ahead.num_workers == (1 if stream else 2) and all(map(same, whole, ahead))
    resumed = read(tiny, options, "dialogue", first_step=2)
    assert all(map(same, whole[2:], resumed)) and len(resumed) == 2


# ------------------------------------------------------------ features on disk


def test_cached_features_are_those_of_the_pictures(tiny, tmp_path):
    options = config(epochs=2.0, steps=3, cache_features=tmp_path / "cache")
    data = open_data(options, tiny, "picture")
    cache = cached(options, tiny, data, "picture")
    assert len(cache) == len(data) == 6
    for batch in read(tiny, options, "picture", data=data, cache=cache):
        units = tiny.encode(batch.pictures)
        assert batch.units.grid == units.grid
        torch.testing.assert_close(batch.units.feats, units.feats, rtol=0.05, atol=0.05)
    calls = []
    tiny.encode, real = lambda batch: calls.append(1) or real(batch), tiny.encode
    try:
        cached(options, tiny, data, "picture")
    finally:
        del tiny.encode
    assert not calls
    with pytest.raises(ValueError, match="scenes of seed 0' there, 'scenes of seed 1' here"):
        cached(config(**{**vars(options), "seed": 1}), tiny, data, "picture")


def test_a_stream_has_no_numbers_to_cache_by(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "open_source", lambda *a: open_source(*a, stream=True))
    options = config(
        data="imagenet-captions",
        path=captions(tmp_path / "copy"),
        cache_features=tmp_path / "cache",
    )
    data = open_data(options, tiny, "picture")
    with pytest.raises(ValueError, match="'imagenet-captions' is streamed: expected --path of a"):
        cached(options, tiny, data, "picture")


def test_features_of_other_pixels_or_other_stand_ins_are_refused(tiny, tmp_path, monkeypatch):
    """Pictures padded or not, and rows that other rows' pictures stand in for."""
    options = config(
        data="imagenet-captions",
        path=str(captions(tmp_path / "copy")),
        cache_features=tmp_path / "cache",
    )
    for rows in ("picture", "dialogue"):
        if rows == "dialogue":
            options.cache_features = tmp_path / "another"
        data = open_data(options, tiny, rows)
        assert len(cached(options, tiny, data, rows)) == 6
    with pytest.raises(ValueError, match="text: .'dialogue', 3, .* there, None here"):
        cached(options, tiny, data, "picture")
    with pytest.raises(ValueError, match="model: 'tiny' there, 'other' here"):
        cached(config(**{**vars(options), "model": "other"}), tiny, data, "dialogue")
    other = "stock" if tiny.protocol == "papers" else "papers"
    monkeypatch.setattr(tiny, "protocol", other)
    with pytest.raises(ValueError, match=f"protocol: .* there, '{other}' here"):
        cached(options, tiny, data, "dialogue")


def test_no_questions_leave_the_caption_alone(tiny):
    items = open_data(config(questions=0), tiny, "dialogue")
    assert [[question for question, _ in items[i][2]] for i in range(3)] == [[CAPTION]] * 3
    for rows in ("question", "question twice"):
        with pytest.raises(ValueError, match="questions=0 with data='scenes': expected at least 1"):
            open_data(config(questions=0), tiny, rows)
