"""Data sets by name, from files of the hub's layout: unusable rows are named, resuming is exact."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from small_hub import ask_hub, serving
from torch.utils.data import DataLoader

from data import parquet, sources
from data.batches import items_of
from data.epochs import Epochs
from data.parquet import Rows, Shards, Stream
from data.sources import SOURCES, describe, open_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    """A cache of its own, no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def encoded(image, form="PNG", **how) -> bytes:
    image.save(data := io.BytesIO(), form, **how)
    return data.getvalue()


def picture(i: int) -> bytes:
    """Number i, as a picture's colour."""
    return encoded(Image.new("RGB", (9, 8), (i % 256, i // 256, 7)))


def number(image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def shard(path, group=4, **columns):
    """A parquet file as `datasets` writes them: pictures as bytes and path, small row groups."""
    table = datasets.Dataset.from_dict(columns)
    if not isinstance(columns["image"][0], str):
        table = table.cast_column("image", datasets.Image(decode=False))
        table = table.cast(Features({**table.features, "image": datasets.Image()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path, batch_size=group)
    return path


def struct(data, name="x.png"):
    return {"bytes": data, "path": name}


def captioned(folder, n=30, shards=3, bad=(), empty=()):
    """A folder like ImageNet-1K-VL-Enriched's, in shards: some pictures cut, captions empty."""
    each = np.array_split(np.arange(n), shards)
    for s, numbers in enumerate(each):
        shard(
            folder / f"data/train-{s:05}-of-{shards:05}.parquet",
            image_id=[f"n{i}" for i in numbers],
            image=[struct(picture(i)[: -30 if i in bad else None]) for i in numbers],
            label=[0] * len(numbers),
            caption_enriched=["" if i in empty else f"a picture {i}" for i in numbers],
        )
    return folder


def said(*texts, first="human"):
    people = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": people[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = said("<image>\nwhat is it ?", "a ball", "what colour ?", "red")


# ------------------------------------------------------------ the five, locally

LAYOUTS = {
    "imagenet-captions": dict(caption_enriched=["a ball", "two balls", "no ball"], label=[1, 2, 3]),
    "llava-665k": dict(
        id=["a", "b", "c"], conversations=[GOOD, GOOD[:2], said("what is <image> it ?", "a dog")]
    ),
    "coco": dict(image_id=[7, 8, 9], width=[9, 9, 9]),
    "docvqa": dict(docId=[1, 2, 3], questionId=["1", "2", "3"], answers=[["x"], ["y"], ["z"]]),
    "chartqa": dict(query=["how many ?"] * 3, label=[["3"]] * 3, human_or_machine=[0, 1, 0]),
}
TURNS = {
    "imagenet-captions": [[("say !", "a ball")], [("say !", "two balls")], [("say !", "no ball")]],
    "llava-665k": [
        [("what is it ?", "a ball"), ("what colour ?", "red")],
        [("what is it ?", "a ball")],
        [("what is  it ?", "a dog")],
    ],
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_each_layout_is_read_at_random_access_and_as_a_stream(tmp_path, name, stream):
    shard(
        tmp_path / "data/train-00000-of-00001.parquet",
        2,
        image=[struct(picture(i)) for i in range(3)],
        **LAYOUTS[name],
    )
    shard(
        tmp_path / "data/validation-00000-of-00001.parquet",
        image=[struct(picture(9))] * 3,
        **LAYOUTS[name],
    )
    data = open_source(name, tmp_path, prompt="say !", stream=stream)
    assert isinstance(data, Shards if stream else Rows) and len(data) == 3
    items = sorted(Stream(data, 0, 3) if stream else data, key=lambda item: number(item[0]))
    assert [(number(image), image.mode, image.size) for image, *_ in items] == [
        (i, "RGB", (9, 8)) for i in range(3)
    ]
    assert [turns for _, turns, _ in items] == TURNS.get(name, [[], [], []])
    assert [skipped for *_, skipped in items] == [[], [], []]
    assert describe(data).startswith(f"{name}: 3 rows of {tmp_path}/data, 1 file, ")


def test_a_single_file_another_split_and_pictures_by_path(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/sub/a.png").write_bytes(picture(5))
    file = shard(
        tmp_path / "data/validation-0.parquet", image=["sub/a.png", "sub/b.png"], query=["x", "y"]
    )
    one = open_source("coco", file, images=tmp_path / "images")
    assert [number(image) for image, *_ in one] == [5, 5] and len(one) == 2
    assert one[1][2] == [
        f"{file} row 1 (sub/b.png): FileNotFoundError: neither a file nor a link to one"
    ]
    folder = open_source(
        "coco", tmp_path / "data", split="validation", images=tmp_path / "images", stream=True
    )
    assert [number(image) for image, *_ in Stream(folder, 0, 2)] == [5, 5]


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("a.png", "sub/b.png", "c.png")):
        (tmp_path / name).write_bytes(picture(i))
    (tmp_path / "b.jpg").write_bytes(picture(0)[:-30])
    data = open_source("coco", tmp_path)
    assert [number(image) for image, *_ in data] == [0, 2, 2, 1] and all(
        turns == [] for _, turns, _ in data
    )
    assert (
        data[1][2] == [f"{tmp_path} row 1 (b.jpg): " + data[1][2][0].split(": ", 1)[1]]
        and data[0][2] == []
    )


@pytest.mark.parametrize("stream", [False, True])
def test_same_pictures_are_shown_once(tmp_path, stream):
    for s in range(2):  # the second shard repeats half of the first
        pages = [1, 1, 2, 2, 2, 3] if s == 0 else [2, 3, 4, 4, 5, 5]
        shard(
            tmp_path / f"charts/train-{s}.parquet",
            image=[struct(picture(i), f"{s}{k}.png") for k, i in enumerate(pages)],
            query=["?"] * 6,
        )
        shard(
            tmp_path / f"pages/train-{s}.parquet",
            image=[struct(picture(i)) for i in pages],
            docId=[0] * 6,
            ucsf_document_page_no=list(map(str, pages)),
        )
        shard(tmp_path / f"bare/train-{s}.parquet", image=[struct(picture(i)) for i in pages])
    for name, folder, n in (
        ("chartqa", "charts", 5),
        ("docvqa", "pages", 5),
        ("docvqa", "bare", 12),
        ("coco", "pages", 12),
    ):
        data = open_source(name, tmp_path / folder, stream=stream)
        seen = [number(image) for image, *_ in (Stream(data, 0, len(data)) if stream else data)]
        assert len(data) == n and sorted(set(seen)) == [1, 2, 3, 4, 5] and len(seen) == n
        assert data.skipped == ({"shown before": 7} if n == 5 else {})
        assert ("skipped: 7 shown before" in describe(data)) == (n == 5)


def test_rows_work_with_epochs(tmp_path):
    data = open_source("imagenet-captions", captioned(tmp_path, 10))
    unbroken = [number(image) for image, *_ in Epochs(data, 0, 25, seed=3)]
    assert (
        sorted(unbroken[:10]) == sorted(unbroken[10:20]) == list(range(10))
        and unbroken[:10] != unbroken[10:20]
    )
    assert [number(image) for image, *_ in Epochs(data, 13, 25, seed=3)] == unbroken[13:]


# ------------------------------------------------------------ rows that are of no use


def test_pictures_of_every_kind_and_those_of_no_use(tmp_path, monkeypatch):
    deep = Image.fromarray(np.full((8, 9), 200 * 257, np.uint16))
    palette = Image.new("P", (9, 8), 1)
    palette.putpalette([0, 0, 0, 1, 2, 3])
    kinds = [
        encoded(Image.new("L", (9, 8), 50)),
        encoded(Image.new("CMYK", (9, 8), (0, 255, 255, 0)), "TIFF"),
        encoded(palette),
        encoded(deep),
        encoded(Image.new("RGBA", (9, 8), (255, 0, 0, 51))),
    ]
    bad = [picture(1)[:-30], b"", b"no picture", encoded(Image.new("RGB", (200, 100)))]
    file = shard(
        tmp_path / "x.parquet", image=[struct(x) for x in kinds + bad] + [struct(None, None)]
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    data = open_source("coco", file)
    colours = [image.getpixel((4, 4)) for image, *_ in data]
    assert (
        colours
        == [(50,) * 3, (255, 0, 0), (1, 2, 3), (200,) * 3, (255, 204, 204)] + [(50,) * 3] * 5
    )
    assert [len(skipped) for *_, skipped in data] == [0] * 5 + [5, 4, 3, 2, 1]
    causes = ("runcated", "cannot identify", "cannot identify", "DecompressionBomb", "no picture")
    for line, i, cause in zip(data[5][2], range(5, 10), causes):
        assert line.startswith(f"{file} row {i}: ") and cause in line
        assert len(line) < 300  # the bytes are not in it


def test_what_accept_refuses_and_captions_without_words_are_named(tmp_path):
    captioned(tmp_path, 6, 1, empty=[1])
    data = open_source(
        "imagenet-captions", tmp_path, accept=lambda x: "too dark" if number(x) == 2 else None
    )
    assert [number(image) for image, *_ in data] == [0, 3, 3, 3, 4, 5]
    file = tmp_path / "data/train-00000-of-00001.parquet"
    assert data[1][2] == [f"{file} row 1: empty caption", f"{file} row 2: too dark"]
    assert data[1][1] == [("Describe the image briefly.", "a picture 3")]


DIALOGUES = [  # (conversation, turns or the cause)
    (GOOD, [("what is it ?", "a ball"), ("what colour ?", "red")]),
    (said("what is it ?\n<image>", " a ball\n"), [("what is it ?", "a ball")]),
    (said("<image>\nwhat is it ?", "a ball", "and now ?"), [("what is it ?", "a ball")]),
    (said("<image>\nwhat is it ?"), "no answer"),
    ([], "no answer"),
    (
        said("a ball", "what ?", first="gpt"),
        "the speakers are gpt, human: expected human and gpt in turn",
    ),
    (GOOD[:2] + GOOD[1:2], "the speakers are human, gpt, gpt"),
    ([{"from": "system", "value": "be good"}, *GOOD], "the speakers are system, human"),
    (said("<image>\nwhat is it ?", "an <image> of it"), "<image> in the text"),
    (said("<image>\nwhat is it ?", "a ball", "<image> and this ?", "no"), "<image> in the text"),
    (said("<image>\n", "a ball"), "empty question or answer"),
    (said("<image>\nwhat is it ?", "  "), "empty question or answer"),
    ([{"from": "human", "value": None}, GOOD[1]], "expected a list of turns"),
    (None, "expected a list of turns"),
    ("hello", "expected a list of turns"),
]


@pytest.fixture
def instruct(tmp_path):
    """llava_v1_5_mix665k.json in small, with its folder of pictures."""
    for name in ("coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/cut.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "images/coco/train2017/1.jpg").write_bytes(picture(1))
    (tmp_path / "images/gqa/images/2.jpg").write_bytes(picture(2))
    (tmp_path / "images/ocr_vqa/images/cut.jpg").write_bytes(picture(3)[:-30])
    image = "coco/train2017/1.jpg"
    table = [
        {"id": "1", "image": image, "conversations": GOOD},
        {"id": 2, "conversations": said("hello", "you")},  # ids are strings and numbers there
        {"id": "3", "image": "gqa/images/missing.jpg", "conversations": GOOD},
        {"id": "4", "image": "ocr_vqa/images/cut.jpg", "conversations": GOOD},
        {"id": "5", "conversations": GOOD},  # speaks of a picture that is not there
        7,
        {"id": "6", "image": [image, image], "conversations": GOOD},
        {"id": "7", "image": None, "conversations": said("hello", "you")},
        {"id": "8", "image": "gqa/images/2.jpg", "conversations": GOOD[:2]},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(table))
    return tmp_path


def test_llava_665k_from_json_and_folders(instruct):
    data = open_source("llava-665k", instruct / "mix.json", images=instruct / "images")
    assert len(data) == 7 and data.skipped == {"text only": 2}
    assert (
        describe(data)
        == "llava-665k: 7 rows of mix.json, 1 file, from local files; skipped: 2 text only"
    )
    image, turns, skipped = data[0]
    assert number(image) == 1 and turns == DIALOGUES[0][1] and skipped == []
    image, turns, skipped = data[1]
    assert number(image) == 2 and turns == [("what is it ?", "a ball")] and len(skipped) == 5
    assert [line.split(": ")[0] for line in skipped] == [
        "mix.json row 2 (gqa/images/missing.jpg)",
        "mix.json row 3 (ocr_vqa/images/cut.jpg)",
        "mix.json row 4",
        "mix.json row 5",
        "mix.json row 6",
    ]
    for line, cause in zip(
        skipped, ("neither a file", "runcated", "text only", "is a int", "2 pictures: expected one")
    ):
        assert cause in line
    assert pickle.loads(pickle.dumps(data))[6][1] == turns  # for workers that are not forked


@pytest.mark.parametrize("conversation, wanted", DIALOGUES)
def test_dialogues_become_turns_or_a_cause(tmp_path, conversation, wanted):
    (tmp_path / "1.png").write_bytes(picture(1))
    table = [
        {"image": "1.png", "conversations": conversation},
        {"image": "1.png", "conversations": GOOD},
    ]
    (tmp_path / "x.json").write_text(json.dumps(table))
    _, turns, skipped = open_source("llava-665k", tmp_path / "x.json")[0]
    if isinstance(wanted, list):
        assert turns == wanted and skipped == []
    else:
        assert (
            turns == DIALOGUES[0][1]
            and skipped[0].startswith(f"x.json row 0 (1.png): {wanted}")
            and len(skipped) == 1
        )


def test_nothing_of_use_stops_with_the_count_and_the_first_causes(tmp_path, instruct, monkeypatch):
    captioned(tmp_path / "c", 30, empty=range(30))
    with pytest.raises(
        ValueError,
        match="imagenet-captions: none of 30 rows .*row 0: empty caption; .*row 1: empty",
    ):
        open_source("imagenet-captions", tmp_path / "c")[0]
    with pytest.raises(
        ValueError, match="imagenet-captions: none of 30 rows .*: empty caption; .*: empty caption"
    ):
        next(iter(Stream(open_source("imagenet-captions", tmp_path / "c", stream=True), 0, 30)))
    monkeypatch.setattr(parquet, "BLOCK", 8)  # and does not go through a million first
    with pytest.raises(ValueError, match="none of 8 rows"):
        open_source("imagenet-captions", tmp_path / "c")[0]
    with pytest.raises(ValueError, match=r"none of 1\d rows"):
        next(iter(Stream(open_source("imagenet-captions", tmp_path / "c", stream=True), 0, 30)))
    (instruct / "text.json").write_text(json.dumps([{"conversations": said("hello", "you")}] * 3))
    with pytest.raises(
        ValueError, match="text.json has no row that can be used; skipped: {'text only': 3}"
    ):
        open_source("llava-665k", instruct / "text.json")


# ------------------------------------------------------------ streams


def seen(stream):
    return [(number(image), skipped) for image, _, skipped in stream]


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """30 rows in 3 shards, 9 row groups, in blocks of 2 groups and 8 rows or more; 4 unusable."""
    monkeypatch.setattr(parquet, "BLOCK", 8)
    monkeypatch.setattr(parquet, "GROUPS", 2)
    return open_source(
        "imagenet-captions", captioned(tmp_path, 30, bad=[3, 17], empty=[4, 29]), stream=True
    )


def test_a_resumed_stream_sees_what_the_unbroken_one_would_have_seen(streamed):
    unbroken = seen(Stream(streamed, 0, 75, seed=5))
    assert len(unbroken) == 75
    for start in range(0, 76, 5):  # across two ends of an epoch, at any place in a block
        assert seen(Stream(streamed, start, 75, seed=5)) == unbroken[start:]
    items = Stream(streamed, 0, 75, seed=5)
    assert [seen([items[g]])[0] for g in (70, 2, 31, 2, 29)] == [
        unbroken[g] for g in (70, 2, 31, 2, 29)
    ]
    assert seen(Stream(streamed, 0, 75, seed=6)) != unbroken


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(streamed):
    stream = Stream(streamed, 0, 90, seed=1)
    own = []
    for epoch in range(3):
        lines = seen(stream[i] for i in range(30 * epoch, 30 * epoch + 30))
        whole = [n for n, skipped in lines if not skipped]
        assert sorted(whole) == [i for i in range(30) if i not in (3, 4, 17, 29)]
        named = {line for _, skipped in lines for line in skipped}
        places = sorted(line.split("/")[-1].split(": ")[0] for line in named)
        assert places == [
            "train-00000-of-00003.parquet row 3",
            "train-00000-of-00003.parquet row 4",
            "train-00001-of-00003.parquet row 7",
            "train-00002-of-00003.parquet row 9",
        ]
        assert (
            sum("empty caption" in line for line in named)
            == sum("runcated" in line for line in named)
            == 2
        )
        own.append(whole)
        assert max(np.diff(whole)) > 4 and whole[:4] != sorted(whole[:4])
    assert own[0] != own[1] != own[2] != own[0]


def test_a_short_last_block_joins_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BLOCK", 8)
    captioned(tmp_path, 9, 1, empty=[8])  # row 8 is a row group of its own
    data = open_source("imagenet-captions", tmp_path, stream=True)
    for seed in range(6):
        assert sorted(n for n, skipped in seen(Stream(data, 0, 9, seed)) if not skipped) == list(
            range(8)
        )


# ------------------------------------------------------------ a stream on several processes


@pytest.fixture
def in_lanes(tmp_path, monkeypatch):
    """101 rows in 5 shards, 30 row groups, small blocks; 8 lanes of 12 rows for a batch of 16."""
    monkeypatch.setattr(parquet, "BLOCK", 10)
    monkeypatch.setattr(parquet, "GROUPS", 2)
    return open_source(
        "imagenet-captions", captioned(tmp_path, 101, 5, bad=[3, 17], empty=[4]), stream=True
    )


def shares(steps, batch, processes, first_step=0):
    """The items that each process takes, as train.py deals them out."""
    config = SimpleNamespace(batch=batch, steps=steps)
    return [items_of(config, first_step, rank, processes) for rank in range(processes)]


@pytest.fixture
def groups_read(monkeypatch):
    """Every row group that is read from now on."""
    read, table = [], Shards.table
    monkeypatch.setattr(Shards, "table", lambda self, *a: read.append(a[:2]) or table(self, *a))
    return read


def test_lanes_are_equal_shares_of_a_step_and_hold_a_block_each(in_lanes):
    wanted = {1: 1, 3: 1, 4: 4, 6: 2, 8: 8, 12: 4, 16: 8, 24: 8, 64: 8}
    assert {batch: Stream(in_lanes, 0, 0, 0, batch).lanes for batch in wanted} == wanted
    assert parquet.lanes_of(in_lanes, 64) * parquet.BLOCK <= len(in_lanes)
    in_lanes.total = 79  # rows for 7 blocks
    assert parquet.lanes_of(in_lanes, 16) == 4
    in_lanes.pieces = in_lanes.pieces[:7]
    assert parquet.lanes_of(in_lanes, 16) == 2


@pytest.mark.parametrize("batch", [8, 12, 16])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_row_groups_of_their_own_and_give_what_one_gives(
    in_lanes, groups_read, batch, processes
):
    steps = 96 // batch  # an epoch of 8 lanes of 12 rows; nearly one of 4 lanes of 25
    stream = Stream(in_lanes, 0, steps * batch, 3, batch)
    whole = seen(stream)
    alone = set(groups_read)
    ranks, read = {}, []
    for items in shares(steps, batch, processes):
        groups_read.clear()
        own = Stream(in_lanes, 0, steps * batch, 3, batch)
        ranks |= {i: seen([own[i]])[0] for i in items}
        assert len(own.held) == stream.lanes // processes
        read.append(set(groups_read))
        # no block is read twice: only where two blocks, or two lanes, meet is a row group
        parts = [part for lane in own.held for block in own.plans[lane][0] for part in block]
        assert len(groups_read) <= len(parts)
    assert [ranks[i] for i in range(steps * batch)] == whole
    assert set.union(*read) == alone
    # neighbours meet in one row group at most
    for one in range(processes):
        for other in range(one):
            assert len(read[one] & read[other]) <= (one - other == 1)
    assert max(map(len, read)) < len(alone) / processes + 4


@pytest.mark.parametrize("batch", [1, 4, 6, 16])
def test_an_epoch_has_every_row_once_but_for_fewer_than_there_are_lanes(in_lanes, batch):
    stream = Stream(in_lanes, 0, 0, 5, batch)
    left_out = []
    for epoch in range(3):
        rows = [
            (p, row)
            for blocks, _ in stream.plan(epoch)
            for block in blocks
            for p, first, last in block
            for row in in_lanes.pieces[p][3][first:last]
        ]
        assert len(rows) == len(set(rows)) == 101 - 101 % stream.lanes
        everything = {(p, row) for p, piece in enumerate(in_lanes.pieces) for row in piece[3]}
        left_out.append(everything - set(rows))
    assert stream.lanes == 1 or left_out[0] != left_out[1] or left_out[1] != left_out[2]
    # and what is planned is what is given, in whole steps of whole epochs
    n = 101 - 101 % stream.lanes
    if n % batch == 0:
        given = [caption for caption, skipped in seen(Stream(in_lanes, 0, n, 5, batch))]
        assert len(set(given)) >= n - 3


@pytest.mark.parametrize("batch", [3, 8, 16])
def test_a_resumed_stream_in_lanes_goes_on_and_reads_one_block_a_lane(
    in_lanes, groups_read, batch
):
    total = 15 * batch
    unbroken = seen(Stream(in_lanes, 0, total, 2, batch))
    for start in range(0, total, batch):  # across ends of epochs, at any place in a block
        resumed = Stream(in_lanes, start, total, 2, batch)
        assert seen(resumed) == unbroken[start:]
        groups_read.clear()
        again = Stream(in_lanes, start, start + batch, 2, batch)
        seen(again)
        # a step may touch the end of one block and the beginning of the next
        most = 2 * max(len(block) for blocks, _ in again.plans for block in blocks)
        assert len(groups_read) <= most * again.lanes
    for i in (total - 1, 2, batch + 1, 2):  # in any order
        assert seen([Stream(in_lanes, 0, total, 2, batch)[i]])[0] == unbroken[i]


def test_one_block_of_a_lane_is_in_memory_and_pictures_are_decoded_when_given_out(
    in_lanes, monkeypatch
):
    decoded, open_picture = [], parquet.open_picture
    monkeypatch.setattr(parquet, "open_picture", lambda *a: decoded.append(1) or open_picture(*a))
    stream = Stream(in_lanes, 0, 160, 2, 16)
    for i in range(160):
        stream[i]
        assert len(stream.held) <= stream.lanes == 8
        assert all(len(rows) < 10 for _, rows in stream.held.values())
    assert 160 <= len(decoded) < 170


def test_one_worker_process_gives_the_same(in_lanes):
    stream = Stream(in_lanes, 0, 48, 3, 8)
    alone, worker = (
        [*DataLoader(stream, 8, num_workers=n, collate_fn=seen)] for n in (0, 1)
    )
    assert alone == worker and len(alone) == 6
    assert seen(pickle.loads(pickle.dumps(stream))) == sum(alone, [])


def test_the_order_of_rows_is_that_of_datasets_own_stream(streamed):
    """The same files, the same rows: nothing is lost or made on the way through the row groups."""
    theirs = datasets.load_dataset(
        "parquet", data_files=streamed.files, streaming=True, split="train"
    )
    theirs = [
        row["caption_enriched"] for row in theirs.cast_column("image", datasets.Image(decode=False))
    ]
    ours = [
        row["caption_enriched"]
        for f, group, *_ in streamed.pieces
        for row in streamed.table(f, group).to_pylist()
    ]
    assert ours == theirs and len(ours) == 30


@pytest.mark.parametrize(
    "wrong", [dict(start=-1), dict(start=5, stop=4), dict(seed=-1), dict(batch=0)]
)
def test_a_range_that_is_none_is_refused(streamed, wrong):
    with pytest.raises(ValueError, match="expected 0 <= start <= stop"):
        Stream(streamed, **{"start": 0, "stop": 9, "seed": 0, **wrong})


# ------------------------------------------------------------ clear errors


def test_what_is_wrong_is_said_at_once(tmp_path):
    captioned(tmp_path / "c")
    shard(tmp_path / "few.parquet", image=[struct(picture(1))])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('[{"image": ')
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text('[{"a": 1}]')
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "few.parquet").read_bytes()[:-9])
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for error, match, *args in (
        (
            ValueError,
            "no data set is named 'coko': expected one of imagenet-captions, llava-665k, coco",
            "coko",
        ),
        (FileNotFoundError, "nowhere does not exist", "coco", tmp_path / "nowhere"),
        (
            FileNotFoundError,
            "empty holds no parquet file and no picture",
            "coco",
            tmp_path / "empty",
        ),
        (
            FileNotFoundError,
            "empty holds no parquet file$",
            "imagenet-captions",
            tmp_path / "empty",
        ),
        (ValueError, "split 'test': it has train", "imagenet-captions", tmp_path / "c", "test"),
        (
            ValueError,
            "few.parquet lacks caption_enriched; its columns are image",
            "imagenet-captions",
            tmp_path / "few.parquet",
        ),
        (
            ValueError,
            "prompt=' ': expected the question",
            "imagenet-captions",
            tmp_path / "c",
            None,
            " ",
        ),
        (ValueError, "bad.json is not a JSON list", "llava-665k", tmp_path / "bad.json"),
        (
            ValueError,
            "other.json is not a JSON list .it begins with",
            "llava-665k",
            tmp_path / "other.json",
        ),
        (ValueError, "list.json: expected a list of rows", "llava-665k", tmp_path / "list.json"),
        (ValueError, "cut.parquet cannot be read", "coco", tmp_path / "cut.parquet"),
        (ValueError, "hold no row", "coco", tmp_path / "none.parquet"),
        (ValueError, "pictures elsewhere: name the folder", "llava-665k"),
    ):
        with pytest.raises(error, match=match):
            open_source(*args)


def test_a_row_group_that_went_bad_is_named(tmp_path):
    file = captioned(tmp_path, 30, 1) / "data/train-00000-of-00001.parquet"
    data = open_source("imagenet-captions", tmp_path, stream=True)
    start = data.footers[0].row_group(2).column(1).data_page_offset
    raw = bytearray(file.read_bytes())
    raw[start : start + 40] = b"\xff" * 40
    file.write_bytes(raw)
    for read in (
        lambda: [*Stream(data, 0, 30)],
        lambda: open_source("imagenet-captions", tmp_path),
    ):
        with pytest.raises(ValueError, match="cannot be read"):
            read()


def test_offline_is_one_clear_error(tmp_path):
    """The real path through `datasets` and huggingface_hub."""
    code = (
        f"from data.sources import SOURCES, open_source\n"
        "for name in SOURCES:\n"
        f"    try: open_source(name, images={str(tmp_path)!r}, stream=True)\n"
        "    except FileNotFoundError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    lines = out.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*SOURCES], out.stderr
    assert all(
        "for HF_HUB_OFFLINE" in line and "give the path of a local copy" in line for line in lines
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_set_says_so_and_no_other_id_stands_in(tmp_path, status):
    """As the hub refuses it: without a login by 401, by 403 where the terms are not accepted."""
    with serving(tmp_path / "hub") as server:
        for repo in ("detection-datasets/coco", "lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA"):
            captioned(server.folder / repo)
        server.gated = {"detection-datasets/coco": status, "lmms-lab-encoder/DocVQA": status}
        said = ask_hub(server, tmp_path, """
from data.sources import open_source
for name in ("coco", "docvqa", "chartqa"):
    try: open_source(name, stream=True)
    except OSError as error: print(name, type(error).__name__, error)
""")
    for name, repo in (("coco", "detection-datasets/coco"), ("docvqa", "lmms-lab-encoder/DocVQA")):
        assert said[name].startswith(
            f"PermissionError {repo} is gated: accept its terms at https://huggingface.co/datasets/"
            f"{repo}, then log in by `hf auth login`")
    assert said["chartqa"].startswith(
        "FileNotFoundError chartqa is not to be had from the hub (HuggingFaceM4/ChartQA: ")


@pytest.mark.parametrize(
    "kind, error, match",
    [
        (
            ConnectionError,
            FileNotFoundError,
            "docvqa: the hub cannot be reached for lmms-lab-encoder/DocVQA .*no route",
        ),
        (
            RepositoryNotFoundError,
            FileNotFoundError,
            "lmms-lab-encoder/DocVQA: .*; lmms-lab/DocVQA: .*M4/DocumentVQA: ",
        ),
    ],
)
def test_answers_of_the_hub_are_told_apart(monkeypatch, kind, error, match):
    import httpx

    def refuse(*args, **kwargs):
        answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
        cause = kind("no route") if kind is ConnectionError else kind("no", response=answer)
        raise datasets.exceptions.DatasetNotFoundError("not to be had") from cause

    monkeypatch.setattr(sources, "load_dataset_builder", refuse)
    with pytest.raises(error, match=match):
        open_source("docvqa")


def test_the_next_id_is_tried_where_one_is_gone(tmp_path, monkeypatch):
    """From ids to files a folder stands in for the hub; from there on the path is the hub's."""
    shard(
        tmp_path / "DocVQA/train-0.parquet",
        image=[struct(picture(i)) for i in (1, 2, 2)],
        docId=[1, 2, 2],
    )
    asked, builder = [], sources.load_dataset_builder

    def stand_in(repo, data_files):
        asked.append((repo, data_files))
        if repo.startswith("lmms-lab-encoder"):
            raise datasets.exceptions.DatasetNotFoundError("gone")
        return builder(
            "parquet", data_files={k: f"file://{tmp_path}/{v}" for k, v in data_files.items()}
        )

    monkeypatch.setattr(sources, "load_dataset_builder", stand_in)
    data = open_source("docvqa")
    assert isinstance(data, Shards) and len(data) == 2
    assert asked == [
        (f"{org}/DocVQA", {"train": "DocVQA/train-*.parquet"})
        for org in ("lmms-lab-encoder", "lmms-lab")
    ]
    assert sorted(number(image) for image, *_ in Stream(data, 0, 2)) == [1, 2]


# ------------------------------------------------------------ to the model


def test_items_go_through_the_model(tmp_path, vlm):
    (tmp_path / "1.png").write_bytes(picture(1))
    words = said("<image>\nwhat colour is the circle ?", "red", "how many are there ?", "one two")
    (tmp_path / "x.json").write_text(json.dumps([{"image": "1.png", "conversations": words}]))
    shard(
        tmp_path / "c.parquet",
        image=[struct(picture(i)) for i in range(2)],
        caption_enriched=["the red circle"] * 2,
    )
    captions = open_source(
        "imagenet-captions", tmp_path / "c.parquet", prompt="what is there ?", stream=True
    )
    items = [open_source("llava-665k", tmp_path / "x.json")[0], *Stream(captions, 0, 2)]
    images, turns, _ = map(list, zip(*items))
    batch = vlm.batch(images, turns)
    loss = vlm.loss(vlm.embed(batch, vlm.encode(batch)))
    assert torch.isfinite(loss) and (batch["labels"] != -100).sum(1).tolist()[1] > 2


def test_a_split_that_the_hub_lacks_is_refused_with_those_it_has(tmp_path):
    cell = {"bytes": b"x", "path": "a.png"}
    for path in ("lmms-lab-encoder/DocVQA/DocVQA/validation-00000-of-00001.parquet",
                 "HuggingFaceM4/ChartQA/data/train-00000-of-00001.parquet"):
        file = tmp_path / "hub" / path
        file.parent.mkdir(parents=True)
        pq.write_table(pa.table({"image": [cell]}), file)
    with serving(tmp_path / "hub") as server:
        said = ask_hub(server, tmp_path, """
from data.sources import open_source
for name in ("docvqa", "chartqa"):
    try:
        open_source(name, split="nosuch")
    except OSError as error:
        print(name, " ".join(str(error).split()))
""")
    assert "no parquet files of the split 'nosuch': it has validation" in said["docvqa"]
    assert "no parquet files of the split 'nosuch': it has train" in said["chartqa"]
