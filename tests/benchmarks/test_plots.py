"""Pictures: what they show, without a look at them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from benchmarks import plots, tiny_world
from common import FrozenVLM


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, which stay open."""
    figures = []
    real = plots.save

    def save(figure, *how):
        monkeypatch.setattr(plt, "close", lambda _: None)
        figures.append(figure)
        real(figure, *how)

    monkeypatch.setattr(plots, "save", save)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def line(method, k, value, tokens):
    value = float(value)
    cost = {"kept": float(tokens), "layer_mean": float(tokens)}
    result = {"value": value, "interval": [value - 2, value + 2], "retention": value}
    return {
        "method": method,
        "K": k,
        "average": value,
        "benchmarks": 1,
        "scores": {"tiny_world": result},
        "costs": {"tiny_world": cost},
        "cost": cost,
        "recall": {},
        "spread": {},
    }


def curve(method, *values):
    return [line(method, k, value, k) for k, value in zip((16, 32, 48), values)]


RIVALS = {
    "random": "before", "divprune": "before", "hired": "before", "tome": "merging",
    "prumerge": "merging", "fastv": "inside", "pact": "inside",
}
LINES = [
    line("vanilla", 0, 98, 144),
    *(x for i, name in enumerate(RIVALS) for x in curve(name, 80 + i / 10, 85 + i / 10, 90)),
    *curve("runs/own_s0", 90, 95, 97),
    *curve("runs/own_s1", 92, 95, 97),
    *curve("runs/single", 88, 94, 96),
    line("runs/own_s0 mask", "mask", 90, 60),
]


def test_a_panel_a_kind_with_runs_in_colour_and_rivals_in_grey(drawn, tmp_path):
    plots.draw_budgets(LINES, RIVALS, tmp_path / "curve.png")
    [figure] = drawn
    axes = figure.axes
    assert [axis.get_title().split(": ")[1] for axis in axes] == list(plots.KINDS.values())
    names = [{text.get_text() for text in axis.texts} - {"all 144 tokens"} for axis in axes]
    assert names == [
        {"random", "divprune", "hired", "own", "single"}, {"tome", "prumerge"}, {"fastv", "pact"},
    ]
    for axis in axes:
        assert "all 144 tokens" in {text.get_text() for text in axis.texts}
    curves = [x for axis in axes for x in axis.get_lines() if len(x.get_xdata()) == 3]
    colours = {}
    for x in curves:
        colours.setdefault(to_rgb(x.get_color()), []).append(x)
    greys = [colour for colour in colours if len(set(colour)) == 1]
    assert len(greys) == len(RIVALS) and all(len(colours[grey]) == 1 for grey in greys)
    assert sorted(len(colours[c]) for c in colours if c not in greys) == [3, 3]  # in each panel
    [mean] = [x for x in axes[0].get_lines() if 91.0 in x.get_ydata()]
    assert mean.get_ydata().tolist() == [91, 95, 97]  # seeds are no methods


def test_names_do_not_overlap(drawn, tmp_path):
    plots.draw_budgets(LINES, RIVALS, tmp_path / "curve.png")
    for axis in drawn[0].axes:
        texts = [x for x in axis.texts if x.get_text() != "all 144 tokens"]
        # of an annotation that of the words alone, without its line
        boxes = sorted((Text.get_window_extent(x) for x in texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:]))


def test_more_runs_than_colours_are_still_told_apart():
    for n in (3, 8, 20):
        assert len({to_rgb(colour) for colour in plots.run_colours(n)}) == n


def test_places_are_apart_and_near():
    assert plots.spaced([1, 5, 9], 2, -100, 100).tolist() == [1, 5, 9]
    assert plots.spaced([4, 4, 4], 2, -100, 100).tolist() == [2, 4, 6]
    assert plots.spaced([1, 2, 10], 2, 0, 100).tolist() == [1, 3, 10]
    assert plots.spaced([9, 9.5, 9.9], 2, 0, 10).tolist() == [5, 7, 9]
    wanted = np.sort(np.random.default_rng(0).uniform(0, 100, 30))
    places = plots.spaced(wanted, 3, 0, 100)
    assert (np.diff(places) > 3 - 1e-9).all() and places[0] >= 0 and places[-1] <= 100


def test_cosines_plain_and_centred_by_hand(tmp_path):
    feats = torch.tensor([[[1.0, 1], [1, 1], [1, -1], [1, -1]]])
    means = plots.draw_cosines(feats, torch.tensor([[4.0, 3, 2, 1]]), tmp_path / "a.png")
    assert means["plain"] == pytest.approx({"best": 1, "worst": 1})
    # (1, 0) is what they share
    assert means["centred"] == pytest.approx({"best": 1, "worst": 1})
    feats = torch.tensor([[[1.0, 1], [1, 1], [3, 1], [1, 3]]])
    means = plots.draw_cosines(feats, torch.tensor([[4.0, 3, 2, 1]]), tmp_path / "a.png", most=99)
    assert means["plain"] == pytest.approx({"best": 1, "worst": 0.6})
    assert means["centred"]["worst"] < 0  # off their mean (1.5, 1.5) they point apart
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_kept_patches_with_and_without_scores(drawn, tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    keep = torch.tensor([0, 3])
    how = ([image] * 2, [(2, 2)] * 2, torch.arange(8.0).split(4), [keep, keep[:1]], ["a", "b"])
    plots.draw_kept(*how, tmp_path / "a.png", orders=[keep.flip(0), keep[:1]])
    plots.draw_kept(*how[:2], None, *how[3:], tmp_path / "b.png")
    with_scores, without = drawn
    assert len(with_scores.axes) == 6 and len(without.axes) == 4
    pale = np.asarray(without.axes[2].get_images()[0].get_array())
    assert (pale[0, 0] == (255, 0, 0)).all() and (pale[0, 3] != (255, 0, 0)).any()
    assert [text.get_text() for text in with_scores.axes[4].texts] == ["1", "2"]


def test_units_are_drawn_as_the_encoder_sees_them(drawn, tmp_path):
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    row = tiny_world.load_rows(1)[0]
    pixels = vlm.pictures([row.image])
    units = vlm.encode(pixels)
    keep = [torch.arange(30)]
    plots.draw_units(vlm, pixels, units, torch.arange(144.0), keep, ["scene"], tmp_path / "a.png")
    shown = np.asarray(drawn[0].axes[0].get_images()[0].get_array()).astype(int)
    assert np.abs(shown - np.asarray(row.image)).max() <= 1
    assert drawn[0].axes[0].get_title() == "scene" and drawn[0].axes[2].get_title() == "30 kept"


def test_spread_and_rebuilt_are_written(tmp_path):
    buckets = [
        {"from": 1, "to": 8, "n": 3, "score": 50.0},
        {"from": 9, "to": 20, "n": 0, "score": None},
    ]
    spread = {"mean": 4.0, "buckets": buckets}
    plots.draw_spread({("own", 8): spread, ("own", 0.25): spread}, tmp_path / "spread.png")
    image = Image.new("RGB", (4, 4))
    plots.draw_rebuilt([image] * 2, {"kept": [torch.rand(3, 4, 4)] * 2}, tmp_path / "rebuilt.png")
    for name in ("spread", "rebuilt"):
        assert (tmp_path / f"{name}.png").stat().st_size > 2000


def test_training_curves_of_several_runs(tmp_path, drawn):
    for run, n in (("a", 5), ("b", 40)):
        (tmp_path / run).mkdir()
        text = "\n".join(f'{{"loss": {i + 1}, "kept": 3, "nll": 2}}' for i in range(n))
        (tmp_path / run / "log.jsonl").write_text(text)
    plots.draw_training([tmp_path / "a", tmp_path / "b"], tmp_path / "a.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["loss", "nll", "kept"]
    short, long = drawn[0].axes[0].get_lines()
    assert short.get_ydata().tolist() == [1, 2, 3, 4, 5]
    assert long.get_ydata()[0] == pytest.approx(5.5)
    assert long.get_xdata()[[0, -1]].tolist() == [9, 39]


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a", "PNG")])
def test_a_picture_is_what_its_name_says(tmp_path, name, kind):
    plots.save(plt.figure(figsize=(1, 1)), tmp_path / name)
    assert Image.open(tmp_path / name).format == kind


def test_how_many_each_way_keeps_stands_side_by_side(tmp_path, drawn):
    counts = {(title, k): np.random.default_rng(k).integers(1, 2 * k, 50)
              for title in ("one way", "another") for k in (48, 16)}
    plots.draw_kept_counts(counts, tmp_path / "counts.png")
    (figure,) = drawn
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [f"{title}, mean {counts[title, k].mean():.1f}"
                      for title in ("one way", "another") for k in (48, 16)]
    assert all(sum(bar.get_height() for bar in axis.patches) == 50 for axis in figure.axes)
