"""Several data sets in one run: of each what is taken, every item a function of (seed, i); one
alone as it has always been."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import datasets
import numpy as np
import pytest
from PIL import Image
from short_runs import kill_at, same, short_run, weights, without_time

import runs
from common import FrozenVLM
from data.batches import Items, batches, cached, mixed, open_data
from data.epochs import Epochs
from data.sets import Chosen, chosen
from train import TrainConfig


@pytest.fixture(scope="module")
def tiny():
    return FrozenVLM.from_pretrained("tiny/llava")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def coloured(family: int, number: int) -> Image.Image:
    """A picture that says which set it is of, and which of it."""
    return Image.new("RGB", (144, 144), (60 * family, 10 * number, 99))


def pictures(folder, family: int, n: int) -> str:
    folder.mkdir()
    for number in range(n):
        coloured(family, number).save(folder / f"{number:02}.png")
    return str(folder)


def charts(folder, family: int, n: int) -> str:
    """Like ChartQA, two questions about each chart, with captions too."""
    images = [coloured(family, number) for number in range(n) for _ in range(2)]
    table = {"image": images, "query": ["why ?"] * 2 * n,
             "caption_enriched": ["there is a red circle"] * 2 * n}
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image()} | dict.fromkeys([*table][1:], text))
    folder.mkdir()
    datasets.Dataset.from_dict(table, features).to_parquet(folder / "train-0.parquet")
    return str(folder)


@pytest.fixture
def three(tmp_path):
    """The options of 8 pictures of COCO, 4 of a folder's 6, half of 12 charts: 18 pictures."""
    return dict(data=["coco", "folder", "chartqa"], take=[0.0, 4.0, 0.5],
                path=[pictures(tmp_path / "coco", 0, 8), "-", charts(tmp_path / "charts", 2, 12)],
                images=["-", pictures(tmp_path / "photos", 1, 6), "-"])


def config(**options) -> TrainConfig:
    base = dict(data=["folder"], epochs=1.0, steps=6, batch=6, micro=3, workers=0, seed=2)
    return TrainConfig(**base | options)


def names(vlm, feed) -> list[tuple[int, int]]:
    """(set, number in it) of every picture of some batches, read off its colour."""
    families = {pixels(vlm, coloured(*name)): name for name in np.ndindex(4, 20)}
    return [families[key(each)] for batch in feed for each in vlm.pixels(batch.pictures)]


def key(x) -> tuple:
    return tuple(round(value, 2) for value in x.float().flatten(1).mean(1).tolist())


def pixels(vlm, image) -> tuple:
    return key(vlm.pixels(vlm.pictures([image]))[0])


def read(vlm, options, first_step=0, rank=0, processes=1, cache=None, rows="picture"):
    data = open_data(options, vlm, rows)
    return [*batches(options, vlm, data, rows, first_step, rank, processes, cache)]


# ------------------------------------------------------------ what a pass is made of


def test_a_pass_has_all_of_one_set_and_what_is_taken_of_others(tiny, three, capsys):
    """And the next pass the same pictures in another order."""
    data = open_data(config(**three), tiny, "picture")
    *sets, line = capsys.readouterr().out.splitlines()
    assert len(data) == 18 and [data[i][0] for i in range(18)] == [*range(18)]
    assert [each.split(" of /")[0] for each in sets] == ["coco: 8 rows", "chartqa: 12 rows"]
    assert line == ("a pass over 18 pictures: coco 8, 44.4 %; folder 4 of 6, 22.2 %; "
                    "chartqa 6 of 12, 33.3 %")
    found = names(tiny, read(tiny, config(**three)))
    first, second = found[:18], found[18:]
    assert Counter(family for family, _ in first) == {0: 8, 1: 4, 2: 6}
    assert len({*first}) == 18 and sorted(first) == sorted(second) and first != second
    assert {number for family, number in first if family == 0} == {*range(8)}
    # shuffled together: not one set behind the other, in one order or another
    changes = sum(a[0] != b[0] for a, b in pairwise(first))
    assert changes > 6


def test_the_papers_counts_come_out_exactly(capsys):
    sizes = [118_287, 10_194, 18_317]
    parts = [Chosen("coco"), Chosen("docvqa", take=9000.0), Chosen("chartqa", take=9000.0)]
    sets = [Items(range(n), lambda i, family=family: ((family, i), [], []))
            for family, n in enumerate(sizes)]
    data = mixed(parts, sets, 0)
    assert "coco 118,287, 86.8 %; docvqa 9,000 of 10,194, 6.6 %" in capsys.readouterr().out
    order = Epochs(data, 0, len(data))
    epoch = [order[i][1] for i in range(len(data))]
    assert len({*epoch}) == len(epoch) == 136_287
    assert Counter(family for family, _ in epoch) == {0: 118_287, 1: 9000, 2: 9000}
    # each tenth of a pass is a fair draw, to five deviations of chance
    for part in np.array_split([family for family, _ in epoch], 10):
        assert abs((part == 2).sum() - 900) < 150


def test_what_is_taken_follows_from_the_seed_and_more_has_less_in_it():
    def drawn(take, seed=0):
        return Chosen("coco", take=take).drawn(40, seed, 1, 1).tolist()
    assert drawn(9.0) == drawn(9.0) == sorted(drawn(9.0)) != drawn(9.0, 1)
    assert {*drawn(9.0)} < {*drawn(20.0)} and drawn(20.0) == drawn(.5)
    assert [len(drawn(take)) for take in (None, 1.0, .26, .001, 40.0)] == [40, 1, 10, 1, 40]


def test_of_one_set_alone_a_part_may_be_taken(tiny, tmp_path):
    folder = pictures(tmp_path / "photos", 1, 6)
    found = names(tiny, read(tiny, config(images=[folder], take=[.5], steps=1)))
    assert len({*found}) == 3 and sorted(found[:3]) == sorted(found[3:])
    assert config(data=["scenes"], epochs=0.0, take=[0.0]).take is None       # all of them
    scenes = config(data=["scenes"], n_pictures=9, take=[4.0])
    data = open_data(scenes, tiny, "dialogue")
    assert len(data) == 4 and all(len(turns) == 2 for _, _, turns, _ in data)


def test_scenes_and_several_folders_are_mixed_too(tiny, tmp_path):
    folders = [pictures(tmp_path / name, family, 3) for family, name in enumerate("ab")]
    one = config(images=folders)
    assert one.data == ["folder", "folder"]
    assert sorted(names(tiny, read(tiny, one))[:6]) == sorted(np.ndindex(2, 3))
    both = config(data=["scenes", "folder"], images=["-", folders[1]], n_pictures=5, epochs=0.0)
    assert len(open_data(both, tiny, "picture")) == 8
    texts = config(data=["scenes"] * 2, n_pictures=5, take=[2.0, 0])
    assert [len(turns) for _, _, turns, _ in open_data(texts, tiny, "question")] == [1] * 7


def test_processes_workers_parts_and_a_kill_change_no_item(tiny, three):
    whole = names(tiny, read(tiny, config(**three)))
    assert len(whole) == 36
    assert whole == names(tiny, read(tiny, config(**three, workers=2)))
    assert whole == names(tiny, read(tiny, config(**three, micro=6)))
    assert whole[24:] == names(tiny, read(tiny, config(**three), first_step=4))
    ranks = [read(tiny, config(**three), 0, rank, 2) for rank in range(2)]
    assert whole == names(tiny, [batch for step in zip(*ranks) for batch in step])
    other = names(tiny, read(tiny, config(**three, seed=3)))
    assert sorted(other[:18]) != sorted(whole[:18])                # others are drawn


# ------------------------------------------------------------ one set, as before there were several


def test_one_set_gives_the_items_that_it_gave_before_there_were_several(tiny, tmp_path):
    """The numbers are those of the code without mixtures."""
    folder = pictures(tmp_path / "photos", 0, 7)
    few = dict(epochs=2.0, steps=3, batch=4, micro=2)
    for where in (dict(images=folder), dict(images=[folder]), dict(data="coco", path=folder)):
        found = names(tiny, read(tiny, config(**few, **where)))
        assert [number for _, number in found] == [5, 3, 4, 1, 2, 0, 6, 5, 2, 6, 4, 1]
    found = names(tiny, read(tiny, config(**few, images=folder, seed=3), 1, 1, 2))
    assert [number for _, number in found] == [3, 3, 2, 4]
    asked = ("where is the red ring ?", "middle left")
    for epochs, n, questions in ((0.0, 12, 3), (2.0, 6, 1)):
        own = dict(n_pictures=6) if epochs else dict(questions=3)
        data = open_data(config(**few | dict(epochs=epochs), data="scenes", **own), tiny,
                         "question")
        assert len(data) == n and len(data[3][2]) == questions and data[3][2][0] == asked


def test_one_set_is_written_as_before_and_its_runs_and_features_go_on(tiny, tmp_path, monkeypatch):
    photos = pictures(tmp_path / "photos", 0, 6)
    few = dict(images=photos, steps=0, epochs=2, batch=3, layers=1, cache_features=tmp_path / "c")
    whole = short_run(tmp_path / "whole", "recon", **few)
    about = json.loads((whole / "config.json").read_text())
    one = about["training"]
    assert (one["data"], one["images"], one["path"], one["take"]) == ("folder", photos, None, None)
    revive = kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "killed", "recon", **few)
    revive()
    for file, options in ((tmp_path / "killed/config.json", "training"),
                          (tmp_path / "c/key.json", None)):
        there = json.loads(file.read_text())
        (there[options] if options else there).pop("take")         # no such option then
        file.write_text(json.dumps(there))
    files = sorted((tmp_path / "c").iterdir())
    killed = short_run(tmp_path / "killed", "recon", **few, take=0)
    assert same(weights(whole), weights(killed)) and without_time(whole) == without_time(killed)
    assert sorted((tmp_path / "c").iterdir()) == files


# ------------------------------------------------------------ features on disk


def test_features_of_a_mixture_are_those_of_its_pictures(tiny, three, tmp_path):
    options = config(**three, cache_features=str(tmp_path / "features"))
    cache = cached(options, tiny, open_data(options, tiny, "picture"), "picture")
    assert len(cache) == 18
    found = read(tiny, options, cache=cache)
    assert names(tiny, found) == names(tiny, read(tiny, config(**three)))
    for batch in found[:6]:
        feats = tiny.encode(batch.pictures).feats
        assert (batch.units.feats - feats).abs().max() < .05
    longer = replace(options, images=["-", pictures(tmp_path / "more", 1, 6), "-"])
    for change, what in ((replace(options, seed=3), "take: "), (longer, "source: "),
                         (replace(options, take=[1.0, 3.0, .5]), "pictures: .*take: ")):
        with pytest.raises(ValueError, match=f"features of something else .*{what}"):
            cached(change, tiny, open_data(change, tiny, "picture"), "picture")


def test_features_of_other_counts_or_other_stand_ins_are_refused(tiny, tmp_path):
    def make(rows, **options):
        options = config(cache_features=str(tmp_path / rows), **options)
        return cached(options, tiny, open_data(options, tiny, rows), rows)
    folders = [pictures(tmp_path / name, family, 3) for family, name in enumerate("ab")]
    assert len(make("picture", images=folders)) == 6
    (tmp_path / "a/02.png").rename(tmp_path / "b/03.png")
    with pytest.raises(ValueError, match=r"pictures: \[3, 3\] there, \[2, 4\] here"):
        make("picture", images=folders)
    # of one of the sets, the text decides which picture stands in
    texts = dict(data=["scenes", "imagenet-captions"], n_pictures=2,
                 path=["-", charts(tmp_path / "captions", 2, 2)])
    make("dialogue", prompt="what is there ?", **texts)
    with pytest.raises(ValueError, match="text: .*'what is there .'. there, .*'where is it .'. he"):
        make("dialogue", prompt="where is it ?", **texts)


def test_a_picture_of_a_mixture_that_is_of_no_use_is_named(tiny, tmp_path):
    folders = [pictures(tmp_path / name, family, 3) for family, name in enumerate("ab")]
    (tmp_path / "b/01.png").write_text("no picture")
    found = read(tiny, config(images=folders, steps=1, micro=6))
    (line,) = found[0].skipped
    assert line.startswith("01.png: ") and names(tiny, found).count((1, 2)) == 2


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("bad, message", [
    (dict(path="a"), "path='a': expected 2 values, one for each of coco, folder, '-' where it has"),
    (dict(take=[1, 2, 3.0]), r"take=\[1, 2, 3.0\]: expected 2 values"),
    (dict(take=[0, 2.5]), "take=2.5: expected a share below 1, or whole pictures"),
    (dict(take=[0, -1.0]), "take=-1.0: expected at least 0"),
    (dict(take=[0, float("nan")]), "take=nan: expected at least 0"),
    (dict(path=["a", "b"]), "path='b': data='folder', of the kind 'folder', does not read it"),
    (dict(images=["a", "-"]), "data='folder' needs --images"),
    (dict(prompt="why ?"), r"prompt='why \?': data=\['coco', 'folder'\], of the kind 'images' and "
                           "'folder', does not read it"),
    (dict(n_pictures=5), "n_pictures=5: .* does not read it"),
    (dict(data=["scenes", "coco"], path=["-", "p"], images=None, questions=3),
     "questions=3: .*'scenes in epochs' and 'images'"),
    (dict(data="scenes", images=None, epochs=0.0, take=[5.0]),
     "take=5.0: data='scenes', of the kind 'scenes without epochs', does not read it")])
def test_options_that_do_not_fit_the_sets_are_refused(bad, message):
    good = dict(data=["coco", "folder"], path=["a", "-"], images=["-", "b"])
    config(**good)
    with pytest.raises(ValueError, match=message):
        config(**good | ({} if "data" not in bad or "path" in bad else dict(path=None)) | bad)


def test_a_mixture_reads_an_option_that_one_of_its_sets_reads():
    options = config(data=["scenes", "imagenet-captions", "llava-665k"], path=["-", "a", "b"],
                     prompt="why ?", n_pictures=5, questions=3, split=["-", "validation", "-"])
    assert chosen(options) == [Chosen("scenes"), Chosen("imagenet-captions", "a", "validation"),
                               Chosen("llava-665k", "b")]
    # rows of a JSON file have numbers, whether it has to be fetched or not
    assert not Chosen("llava-665k", images="b").is_streamed and Chosen("coco").is_streamed


def test_too_few_pictures_are_refused_by_both_numbers(tiny, three):
    three["take"] = [0, 7.0, 0]
    with pytest.raises(ValueError, match="take=7: folder has 6 pictures in .*/photos: expected at "
                                         "most 6, or 0, all"):
        open_data(config(**three), tiny, "picture")
    with pytest.raises(ValueError, match="take=13: chartqa has 12 pictures in .*/charts: "):
        open_data(config(**three | dict(take=[0, 0, 13.0])), tiny, "picture")


def test_what_would_be_streamed_is_refused_before_the_hub_is_asked(tiny, three, monkeypatch):
    monkeypatch.setattr("data.batches.open_source", lambda *_: pytest.fail("it was asked"))
    for options in (dict(data=["coco", "docvqa"], path=[three["path"][0], "-"]),
                    dict(data="docvqa", take=[9.0])):
        with pytest.raises(ValueError, match=r": docvqa would be streamed, and what is mixed or "
                                             "taken in part must lie here: expected --path"):
            open_data(config(**options), tiny, "picture")


@pytest.mark.parametrize("rows", ["dialogue", "question", "question twice"])
def test_the_set_without_text_is_named_where_text_is_read(rows):
    options = config(data=["scenes", "docvqa"], path=["-", "p"])
    with pytest.raises(ValueError, match="data='docvqa' has pictures and no text: expected data"):
        open_data(options, None, rows)


# ------------------------------------------------------------ a training


@pytest.mark.usefixtures("one_thread")
def test_two_sets_train_a_selector_and_a_killed_run_ends_as_the_unbroken_one(
        tmp_path, monkeypatch, capsys):
    sets = dict(data=["coco", "chartqa"], take=[0, 2], steps=0, epochs=2, batch=2, layers=1,
                path=[pictures(tmp_path / "coco", 0, 4), charts(tmp_path / "charts", 2, 5)])
    whole = short_run(tmp_path / "whole", "recon", **sets)
    assert "a pass over 6 pictures: coco 4, 66.7 %; chartqa 2 of 5" in capsys.readouterr().out
    assert len(without_time(whole)) == 6                                           # 2 * 6 / 2
    about = json.loads((whole / "selector/config.json").read_text())["training"]
    assert (about["data"], about["take"]) == (["coco", "chartqa"], [0, 2])
    assert "data: ['coco', 'chartqa']" in (whole / "selector/README.md").read_text()
    revive = kill_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "killed", "recon", **sets)
    revive()
    killed = short_run(tmp_path / "killed", "recon", **sets, workers=1)
    assert same(weights(whole), weights(killed)) and without_time(whole) == without_time(killed)
    with pytest.raises(ValueError, match=r"take: \[0.0, 2.0\] there, \[0.0, 3.0\] here"):
        short_run(tmp_path / "killed", "recon", **sets | dict(take=[0, 3]))
    cache = short_run(tmp_path / "cached", "recon", **sets, cache_features=tmp_path / "features")
    assert len(without_time(cache)) == 6 and runs.read_selector(cache)[1]["training"] == about
