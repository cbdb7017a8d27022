"""Tables of questions from local copies, samples of them, and the rehearsal on the tiny world."""

import io
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as Picture
from PIL import Image
from prediction_rows import question
from small_hub import ask_hub, serving

from benchmarks import answering, stored, tiny_world
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


# ------------------------------------------------------------------------------------ from the hub

ASK = """
from benchmarks.questions import few, picture, table
def ask(word, hubs, config, split, columns=("id", "image"), n=None, at=13):
    try:
        with few(n):
            data = table(hubs, None, config, split, columns)
        places = [] if at is None else [at]
        shown = [picture(data[i]["image"]).getpixel((0, 0))[0] for i in places]
        print(word, len(data), data[13]["id"], shown, data[14].get("image", "none"))
    except (OSError, ValueError) as error:
        print(word, type(error).__name__, " ".join(str(error).split()))
"""


def noise(k: int, size: int) -> bytes:
    """A picture that does not shrink, its first pixel k bright."""
    pixels = np.random.default_rng(k).integers(0, 255, (size, size, 3), np.uint8)
    pixels[0, 0] = k
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def put(folder, split: str, parts: int = 2, group: int = 2, size: int = 8, start: int = 0) -> None:
    """A split of 10 rows a file, as `datasets` writes them; row 14 has no picture."""
    for part in range(parts):
        rows = [*range(start + 10 * part, start + 10 * part + 10)]
        cells = [{"bytes": noise(k, size), "path": f"{k}.png"} if k - start != 14 else None
                 for k in rows]
        data = Dataset.from_dict({"id": rows, "image": cells}).cast_column("image", Picture())
        folder.mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / f"{split}-{part:05}-of-{parts:05}.parquet", batch_size=group)


@pytest.fixture(scope="module")
def small_hub(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("hub")) as server:
        put(server.folder / "second/VQA/data", "train")
        put(server.folder / "second/VQA/data", "validation")
        for language, start in (("cn", 100), ("en", 0)):
            put(server.folder / "second/Two" / language, "dev", start=start)
        (server.folder / "second/Two/README.md").write_text("---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: dev\n    path: {name}/dev-*\n"
            for name in ("cn", "en")) + "---\n")
        put(server.folder / "second/Large/data", "validation", group=1, size=200)
        shutil.copytree(server.folder / "second/Large", server.folder / "second/Whole")
        lines = [f'{{"id": {k}}}' for k in range(20)]
        (server.folder / "second/Lines").mkdir()
        (server.folder / "second/Lines/test.jsonl").write_text("\n".join(lines))
        for name in ("First", "Other"):
            put(server.folder / "gated" / name / "data", "validation")
        server.gated = {"gated/First": 401, "gated/Other": 403}
        yield server


STORED = """
ask("vqa", ("first/VQA", "second/VQA"), None, "validation")
ask("two", ("first/Two", "second/Two"), "en", "dev")
ask("again", ("first/VQA", "second/VQA"), None, "validation")
ask("gone", ("first/VQA", "second/VQA"), None, "test")
"""


@pytest.fixture(scope="module")
def online(small_hub, tmp_path_factory):
    """(HF_HOME, what is said): all that the tests below ask of the hub, in one process."""
    home = tmp_path_factory.mktemp("home")
    return home, ask_hub(small_hub, home, ASK + STORED + """
ask("few", ("second/Large",), None, "validation", n=4)
ask("more", ("second/Whole",), None, "validation", n=5)
ask("then", ("second/Whole",), None, "validation", n=5)
ask("lines", ("second/Lines",), None, "test", ("id",), at=None)
ask("first", ("gated/First", "second/VQA"), None, "validation")
ask("other", ("gated/Other",), None, "validation")
ask("lacks", ("second/VQA",), None, "validation", ("id", "hint"))
""")


def parquet_files(hub, repo: str) -> list[tuple[str, int]]:
    """(name, bytes) of each time that content of one was sent."""
    return [(name, size) for of, name, size in hub.fetched
            if of == repo and name.endswith(".parquet")]


def test_only_the_asked_split_is_fetched_and_found_again_offline(small_hub, online):
    """From the second id, for the first is not there; nothing is written a second time."""
    home, said = online
    assert said["vqa"] == said["two"] == said["again"] == "20 13 [13] None"
    assert said["gone"].startswith("FileNotFoundError first/VQA is not to be had from the hub")
    assert "second/VQA has no parquet files of the split 'test': it has " in said["gone"]
    assert "2 of 2 files of second/VQA, 0.00 GiB, are fetched into" in said["validation:"]
    assert said["en"].startswith("dev: 2 of 2 files of second/Two, 0.00 GiB, are fetched into")
    for repo, part in (("second/VQA", "data/validation"), ("second/Two", "en/dev")):
        names = [name for name, _ in parquet_files(small_hub, repo)]
        assert sorted(names) == [f"{part}-{k:05}-of-00002.parquet" for k in range(2)]
    # but for the set that is not of parquet files
    assert not [path for path in home.rglob("*.arrow") if "second___lines" not in path.parts]

    asked = len(small_hub.fetched)
    alone = ask_hub(small_hub, home, ASK + STORED + f"""
ask("cn", ("first/Two", "second/Two"), "cn", "dev")
ask("train", ("first/VQA", "second/VQA"), None, "train")
from pathlib import Path
(part,) = Path({str(home)!r}).glob("**/*VQA/**/validation-00001-of-00002.parquet")
part.unlink()
ask("part", ("first/VQA", "second/VQA"), None, "validation")
ask("beside", ("first/Two", "second/Two"), "en", "dev")
""", offline=True)
    assert alone["vqa"] == alone["two"] == alone["beside"] == "20 13 [13] None"
    assert len(small_hub.fetched) == asked
    for word in ("cn", "train", "gone"):               # another language is none of these
        assert alone[word].startswith("FileNotFoundError first/")
        assert "neither as first/" in alone[word] and "for HF_HUB_OFFLINE" in alone[word]
    # a split of which a part is missing is not taken for the whole
    assert alone["part"].startswith("FileNotFoundError")


def test_of_a_small_sample_only_its_pictures_are_read(small_hub, online):
    home, said = online
    assert said["few"] == said["more"] == said["then"] == "20 13 [13] None"
    assert "of 2 files of second/Large, 0.00 GiB, only the texts" in said["validation:"]
    whole = sum(file.stat().st_size for file in small_hub.folder.glob("second/Large/data/*"))
    read = sum(size for _, size in parquet_files(small_hub, "second/Large"))
    assert 120_000 < read < whole / 5                  # one of 19 pictures
    assert not [*home.glob("**/*Large/**/validation-*")]
    # of many questions nearly all row groups would be read: whole files, which are kept
    assert "of second/Whole, 0.00 GiB, are fetched into" in said["validation:"]
    whole_files = [size for _, size in parquet_files(small_hub, "second/Whole") if size > 10**6]
    assert sum(whole_files) == whole
    assert len([*home.glob("**/*Whole/**/validation-*")]) == 2


def test_other_layouts_and_gated_sets(online):
    _, said = online
    assert said["lines"] == "20 13 [] none"
    for word, repo in (("first", "gated/First"), ("other", "gated/Other")):
        assert said[word].startswith(
            f"PermissionError {repo} is gated: accept its terms at https://huggingface.co/datasets/"
            f"{repo}, then log in by `hf auth login`")
    assert "no column 'hint' among id, image; expected the columns of second/VQA" in said["lacks"]


def test_places_keep_lists_nulls_and_what_is_read_last_is_kept(tmp_path, monkeypatch):
    cells = [[{"bytes": noise(10 * k + j, 8), "path": None} for j in range(k)] for k in range(6)]
    cells[3] = None
    data = Dataset.from_dict({"images": cells, "text": [*"abcdef"]})
    data = data.cast_column("images", [Picture()])
    data.to_parquet(tmp_path / "test.parquet", batch_size=2)
    rows = table(("x/y",), tmp_path, None, "test", ("text", "images"))
    assert rows["text"] == [*"abcdef"] and rows.column_names == ["text", "images"]
    assert [cell and len(cell) for cell in rows["images"]] == [[], 1, 2, None, 4, 5]
    monkeypatch.setattr(stored, "ROOM", 1)
    stored.groups.clear()
    for i in (5, 1, 4, 2):
        assert [picture(x).getpixel((0, 0))[0] for x in rows[i]["images"]] == [
            10 * i + j for j in range(i)]
        assert [group for _, group, _ in stored.groups] == [i // 2]
    (tmp_path / "test.parquet").write_bytes(b"no longer")
    with pytest.raises(ValueError, match="test.parquet: cannot be read"):
        picture(rows[5]["images"][0])


@pytest.mark.parametrize("split", [7, None, ["test"]])
def test_a_split_that_is_no_name_is_refused(tmp_path, split):
    with pytest.raises(ValueError, match="^split=.*expected its name, such as test"):
        table(("x/y",), tmp_path, None, split, ("image",))
