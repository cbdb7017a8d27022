"""measure/rebuild.py and measure/question_reading.py on short runs, and their parts by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import short_run
from tiny_models import MODELS

import recon_selector
from baselines import random_tokens
from benchmarks import answering, tiny_world
from common import FrozenVLM, kept_mask
from measure import question_reading, rebuild

SHORT = dict(steps=0, n_pictures=6, epochs=1)


def cells_of(path):
    lines = path.read_text().splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_rebuilding_and_stability_are_reported(tmp_path):
    folders = [str(short_run(tmp_path / f"s{seed}", "recon_selector", **SHORT, seed=seed))
               for seed in (0, 1)]
    out = tmp_path / "out"
    rebuild.main(["--run", *folders, "--n_pictures", "3", "--budgets", "16", "8", "--device", "cpu",
                  "--out", str(out)])
    rebuilt = cells_of(out / "rebuild.md")
    assert [row[0] for row in rebuilt] == ["72", "58", "32", "16", "8"] and "±" in rebuilt[0][1]
    still = cells_of(out / "stability.md")
    assert [row[:2] for row in still] == [[how, k] for how in rebuild.DISTORTIONS
                                          for k in ("16", "8")]
    assert still[0][2] == "100 ±0" and 0 < float(still[2][2].split()[0]) < 99
    assert Image.open(out / "rebuilt.png").size[0] > 300


@pytest.mark.parametrize("family", ["llava_next", "internvl", "llava_onevision"])
def test_crops_are_chosen_from_as_in_evaluation_and_no_language_model_is_asked(
        tmp_path, capsys, monkeypatch, family):
    """What is rebuilt and drawn is what evaluation would keep, in each crop by itself."""
    monkeypatch.setattr(rebuild, "SHARES", (0.5, 0.3))        # at least a token of every crop
    monkeypatch.setattr(rebuild, "DRAWN", (0.5, 0.3))
    model = MODELS[family](tmp_path / "vlm", tokens="bytes")
    run = short_run(tmp_path / "run", "recon_selector", **SHORT, model=model, dtype="float32")
    vlm, (selector,) = rebuild.load([str(run)], torch.float32, "cpu", language=False)
    assert vlm.lm is None
    scenes = tiny_world.load_rows(14)[:2]
    images = [scene.image for scene in scenes]
    masks, real = [], selector.rebuild

    def spied(x, mask, grid, size):
        masks.append(mask.flatten())
        return real(x, mask, grid, size)
    selector.rebuild = spied
    whole = FrozenVLM.from_pretrained(model, torch.float32)
    asked = answering.ask(whole, [tiny_world.question_of(scene, 0, scene.questions[0])
                                  for scene in scenes])
    way = selector.ways([], [8], None)[""]
    rebuild.rebuild_table([selector], vlm, images)
    table, masks[:] = masks[::2], []                   # the others are of random tokens
    drawn = rebuild.rebuilt_pictures(selector, vlm, images)
    crops = len(masks) // 2
    drawn_masks = [torch.cat(masks[:crops]), torch.cat(masks[crops:])]
    for share, one, other in zip((0.5, 0.3), table, drawn_masks):
        expected = kept_mask(asked.units, answering.choose(way, asked, share)[0]).float()
        assert torch.equal(one, expected) and torch.equal(other, expected)
    shapes = [picture.shape for picture in vlm.pixels(vlm.pictures(images))]
    assert all([x.shape for x in row] == shapes for row in drawn.values())

    rebuild.main(["--run", str(run), "--n_pictures", "4", "--budgets", "4", "--answers", "False",
                  "--dtype", "float32", "--device", "cpu"])
    assert len(cells_of(run / "rebuild.md")) == 2 and Image.open(run / "rebuilt.png")
    # one frame is one view
    if family == "llava_onevision":
        assert len(cells_of(run / "stability.md")[0]) == 4
    else:
        assert "no stability.md: a picture reaches the encoder" in capsys.readouterr().out
        assert not (run / "stability.md").exists()


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_how_far_the_question_is_read_where_newlines_stand_between_the_units(tmp_path, family):
    model = MODELS[family](tmp_path / "vlm", tokens="bytes")
    run = short_run(tmp_path / "run", "recon_selector", **SHORT, model=model, dtype="float32",
                    select_after_layer=1)
    question_reading.main(["--run", str(run), "--n_pictures", "6", "--budgets", "6", "999",
                           "--device", "cpu", "--dtype", "float32"])
    few, every = cells_of(run / "question_reading.md")
    assert 0 <= float(few[1]) <= 100 and every[1] == "100"
    assert every[2:] == (["nan"] * 2 if family == "llava_next" else ["100"] * 2)



def test_what_cannot_be_rebuilt_is_refused(tmp_path):
    other = short_run(tmp_path / "other", "autoselect", steps=1)
    inside = short_run(tmp_path / "inside", "recon_selector", **SHORT, select_after_layer=1)
    for run in (other, inside):
        with pytest.raises(ValueError, match="does not rebuild .*: expected runs of the method"):
            rebuild.main(["--run", str(run)])
    with pytest.raises(ValueError, match="selects without the question: expected runs with"):
        question_reading.main(["--run", str(other)])


def test_how_far_the_question_is_read(tmp_path):
    run = short_run(tmp_path / "run", "recon_selector", **SHORT, select_after_layer=2)
    question_reading.main(["--run", str(run), "--n_pictures", "10", "--budgets", "16", "144",
                           "--device", "cpu"])
    rows = cells_of(run / "question_reading.md")
    assert [row[0] for row in rows] == ["16", "144"]
    assert all(0 <= float(x) <= 100 for row in rows for x in row[1:])
    assert rows[1][1:] == ["100"] * 3
    assert rows[0][2:] != rows[1][2:]


def test_errors_are_of_the_chosen_tokens(tmp_path):
    """All of them kept is the reconstructors' own error; none of it depends on the batch's size."""
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    torch.manual_seed(0)
    sizes = recon_selector.Config.of(vlm, layers=1, heads=2)
    net = recon_selector.ReconSelector(sizes).eval()
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (144, 144, 3), np.uint8))
              for i in range(3)]
    pictures = vlm.pictures(images)
    units = vlm.encode(pictures)
    v, valid = units.pad()
    with torch.no_grad():
        whole = net.errors(net.standardised(v, valid), valid.float(), vlm.pixels(pictures),
                           units.grid)
    everything = rebuild.rebuild_error(net, vlm, images, lambda units: [torch.arange(144)] * len(
        units.grid), batch=2)
    assert everything == pytest.approx([x.mean().item() for x in whole], rel=1e-5)
    few = rebuild.rebuild_error(net, vlm, images, lambda units: random_tokens.select(units, 4))
    assert few != pytest.approx(everything, rel=1e-3)


def test_distortions_and_overlap_by_hand():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert rebuild.distort(image, "none", 3)[0].tobytes() == image.tobytes()
    bright, box = rebuild.distort(image, "brightness", 3)
    factor = np.asarray(bright, float).mean() / np.asarray(image, float).mean()
    assert box == (0, 0, 60, 40) and 0.75 < factor < 1.25 and abs(factor - 1) > 0.01
    for seed in range(20):
        cropped, (left, top, right, bottom) = rebuild.distort(image, "crop", seed)
        assert cropped.size == image.size
        assert 0 <= left <= 3 and 57 <= right <= 60 and 0 <= top <= 2 and bottom >= 38
    with pytest.raises(ValueError, match="'blur' is none of"):
        rebuild.distort(image, "blur", 0)
    keep, other = torch.tensor([0, 1]), torch.tensor([1, 2])
    whole = (0, 0, 8, 8)
    assert rebuild.overlap(keep, keep, (2, 2), (8, 8), whole) == 1
    assert rebuild.overlap(keep, other, (2, 2), (8, 8), whole) == pytest.approx(1 / 3)
    # the crop shows both
    every = torch.tensor([0, 1, 2, 3])
    assert rebuild.overlap(keep, every, (2, 2), (8, 8), (0, 0, 8, 4)) == 1
