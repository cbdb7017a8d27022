"""Tables of questions from local copies, samples of them, and the rehearsal on the tiny world."""

import pytest
import torch
from prediction_rows import question

from benchmarks import answering, tiny_world
from benchmarks.questions import Question, picture, sample, table
from common import FrozenVLM
from tiny import benchmarks as copies


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    copies.main([str(folder), "--n", "8"])
    return folder


def test_local_copies_have_the_hubs_layout_and_no_picture_is_decoded_early(local, tmp_path):
    data = table(("x/POPE",), local / "pope", None, "test", ("question_id", "category", "image"))
    assert len(data) == 8 and data.column_names == ["question_id", "category", "image"]
    assert set(data[0]["image"]) == {"bytes", "path"} and picture(data[0]["image"]).size == (
        144,
        144,
    )
    frames = table(("x/SEED",), local / "seed", None, "test", ("image",))
    assert [len(x["image"]) for x in frames] == [1, 1, 3, 1, 1, 3, 1, 1] and "bytes" in frames[2][
        "image"
    ][2]
    circular = table(
        ("x/MMB",), local / "mmbench", "en", "dev", ("index", "answer", "A", "B", "C", "D")
    )
    assert {x[x["answer"]] for x in circular if x["index"] % 10**6 == 0} == {
        circular[0][circular[0]["answer"]]
    }
    image = picture(data[0]["image"])
    image.save(tmp_path / "a.png")
    for name, text in (
        ("test.jsonl", '{"id": 1, "image": "a.png"}\n{"id": 2, "image": "gone.png"}\n'),
        ("dev.json", '[{"id": 1, "image": null, "images": ["a.png", "a.png"]}]'),
    ):
        (tmp_path / name).write_text(text)
    lines = table(("x/y",), tmp_path, None, "test", ("id", "image"))
    assert picture(lines[0]["image"]).size == (144, 144)
    with pytest.raises(ValueError, match="gone.png"):
        picture(lines[1]["image"])
    several = table(("x/y",), tmp_path / "dev.json", None, "whatever", ("id", "images"))
    assert [picture(x).size for x in several[0]["images"]] == [(144, 144)] * 2


@pytest.mark.parametrize(
    "path, config, split, columns, kind, words",
    [
        ("pope", None, "dev", ("image",), ValueError, "no file of the split 'dev'.* it has test"),
        ("pope", None, "test", ("image", "hint"), ValueError, "no column 'hint' among question_id"),
        ("nothing", None, "test", (), FileNotFoundError, "nothing does not exist"),
        (
            "llava/model.safetensors", None, "test", (), FileNotFoundError,
            "is none of .parquet .json .jsonl",
        ),
        ("gqa", None, "testdev", ("id",), ValueError, "several times"),
    ],
)
def test_what_is_wrong_with_a_local_copy_is_said(local, path, config, split, columns, kind, words):
    with pytest.raises(kind, match=words):
        table(("x/y",), local / path, config, split, columns)


def test_rows_that_cannot_be_read_are_refused(tmp_path):
    for name, text in (
        ("a.json", "[1"),
        ("b.jsonl", '{"id": 1}\n{"id": "x"}\n'),
        ("c.parquet", "none"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            table(("x/y",), tmp_path / name, None, "test", ("id",))


def test_what_is_scored_as_one_is_drawn_as_one():
    asked = [question(i) for i in range(12)]
    pairs = [
        [q.id for q in sample(asked, 5, seed, lambda row: int(row["id"]) // 2)] for seed in range(4)
    ]
    assert (
        all(len(ids) == 6 and sorted(ids, key=int) == ids for ids in pairs)
        and len(set(map(tuple, pairs))) > 1
    )
    assert all(str(int(i) ^ 1) in ids for ids in pairs for i in ids)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_tiny_vlm_of_the_rehearsal_reads_past_what_it_has_not_learnt(local, name):
    vlm, asked = FrozenVLM.from_pretrained(local / name, torch.float32), tiny_world.load(n=12)
    longer = [
        Question(
            q.id,
            q.images,
            q.prompt.capitalize() + "\nAnswer the question using a single word or phrase.",
            q.gold,
            q.limit,
        )
        for q in asked
    ]
    rows = answering.answer_batch(vlm, [*enumerate(longer)], {("vanilla", 0): None})["vanilla", 0]
    plain = answering.answer_batch(
        FrozenVLM.from_pretrained(f"tiny/{name}", torch.float32),
        [*enumerate(asked)],
        {("vanilla", 0): None},
    )["vanilla", 0]
    assert [x["answer"] for x in rows] == [x["answer"] for x in plain] and tiny_world.score(rows)[
        "average"
    ] > 80
