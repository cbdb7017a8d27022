"""A classifier that sees the chosen patches alone: those, in their places, with right labels."""

import json
from collections import Counter

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AttentionInterface,
    BeitConfig,
    BeitForImageClassification,
    BitImageProcessorPil,
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from baselines import random_tokens
from common import FrozenVLM
from measure import classify
from measure.classify import ClassFolder, Classifier, Scenes, index_of, overlap, seen_by, to_grid
from runs import Way
from tiny import classifier as tiny
from tiny import scenes

RUN = "results/autoselect_tiny/selector"
KINDS = {"vit": (ViTConfig, ViTForImageClassification),
         "deit": (DeiTConfig, DeiTForImageClassification)}
HIDDEN = {}


def hiding(module, query, key, value, attention_mask, scaling=None, **_):
    """Full attention in which no token attends to those that HIDDEN names; (B, L) bool, False for
    hidden."""
    mask = HIDDEN["seen"][:, None, None].expand(-1, 1, query.shape[2], -1)
    mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return mixed.transpose(1, 2), None


AttentionInterface.register("hiding", hiding)


def random_vit(kind: str = "vit", size=(24, 16)):
    """Random weights that make every patch matter; 4-pixel patches, so 6 x 4 of them."""
    torch.manual_seed(0)
    config, build = KINDS[kind]
    model = build(config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                         intermediate_size=32, image_size=size, patch_size=4, num_labels=5))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=.4)
    return model.double()


def per_picture(select) -> Way:
    """select(units, K) of every picture."""
    return Way(lambda asked, k: select(asked.units, k))


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained("tiny/llava")


@pytest.fixture(scope="module")
def net():
    return Classifier.from_pretrained("tiny/vit")


@pytest.mark.parametrize("kind", list(KINDS))
def test_taken_out_is_as_good_as_hidden(kind):
    """Against the stock model under full attention with the other patches hidden; several K at
    once, 0 and all too."""
    stock, pixels = random_vit(kind), torch.randn(6, 3, 24, 16, dtype=torch.float64)
    net = Classifier(random_vit(kind), None)
    keep = [torch.randperm(24)[:k].sort().values for k in (7, 0, 24, 7, 1, 12)]
    prefix = {"vit": 1, "deit": 2}[kind]               # DeiT has a distillation token
    HIDDEN["seen"] = torch.ones(6, prefix + 24, dtype=torch.bool)
    for row, k in zip(HIDDEN["seen"], keep):
        row[prefix:] = torch.zeros(24).index_fill(0, k, 1).bool()
    stock.set_attn_implementation("hiding")
    expected = stock(pixels).logits
    assert (net.logits(pixels, keep) - expected).abs().max() < 1e-10
    assert expected.std(0).min() > .01 and (net.logits(pixels) - expected).abs().max() > .01
    HIDDEN["seen"][:] = True
    whole = net.logits(pixels)
    assert (whole - stock(pixels).logits).abs().max() < 1e-10, "and all are seen again afterwards"


@pytest.mark.parametrize("keep", [[torch.arange(3)], [torch.arange(3), torch.tensor([24])]])
def test_keep_that_does_not_fit_is_refused(keep):
    with pytest.raises(ValueError, match="beyond 23"):
        Classifier(random_vit(), None).logits(torch.randn(2, 3, 24, 16, dtype=torch.float64), keep)


def test_models_whose_patches_cannot_be_taken_out_are_refused():
    net = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8],
                                                    depths=[1, 1], num_labels=2))
    with pytest.raises(ValueError, match="expected a ViT"):
        Classifier(net, None)
    small = dict(image_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="expected a ViT"):
        beit = BeitConfig(use_relative_position_bias=True, **small)
        Classifier(BeitForImageClassification(beit), None)
    net = SwinForImageClassification(SwinConfig(image_size=32, embed_dim=8, depths=[1],
                                                num_heads=[1], window_size=2))
    with pytest.raises(ValueError, match="absolute positions"):
        Classifier(net, None).logits(torch.zeros(1, 3, 32, 32), [torch.arange(3)])


# ------------------------------------------------------------------ the grids

GRIDS = [((24, 24), (14, 14)), ((12, 12), (12, 12)), ((9, 15), (14, 14)), ((6, 6), (14, 14)),
         ((24, 24), (12, 12))]


@pytest.mark.parametrize("source, target", GRIDS)
@pytest.mark.parametrize("k", [1, 5, 30])
def test_masks_on_another_grid(source, target, k):
    """Nearest against Pillow's resize; area against cells cut so finely that both grids fit into
    them."""
    n = source[0] * source[1]
    keep = torch.randperm(n, generator=torch.Generator().manual_seed(k))[:k].sort().values
    mask = np.zeros(n, np.uint8)
    mask[keep] = 1
    mask = mask.reshape(source)
    resized = np.asarray(Image.fromarray(mask).resize(target[::-1], Image.NEAREST))
    assert to_grid(keep, source, target).tolist() == np.flatnonzero(resized).tolist()

    fine = np.kron(mask, np.ones(target)).reshape(target[0], source[0], target[1], source[1])
    fine = fine.mean((1, 3)).flatten()
    shown = to_grid(keep, source, target, "area")
    assert len(shown) == max(round(k * len(fine) / n), 1) and (shown.diff() > 0).all()
    assert fine[shown].min() >= np.delete(fine, shown).max() - 1e-12
    if source == target:
        assert shown.tolist() == keep.tolist()


def test_shares_of_a_line():
    assert overlap(4, 2).tolist() == [[.5, .5, 0, 0], [0, 0, .5, .5]]
    assert (overlap(24, 14).sum(1) - 1).abs().max() < 1e-12
    with pytest.raises(ValueError, match="nearest"):
        to_grid(torch.tensor([0]), (2, 2), (3, 3), "bicubic")


# ------------------------------------------------------------------ pictures and labels

def test_labels_of_the_tiny_world():
    """Against a second reading; no scene that anything else is trained or tested on is trained
    on."""
    seen = Counter()
    for scene in (scenes.make_scene(seed) for seed in range(300)):
        sides = [(t.box[2] - t.box[0], t.colour) for t in scene.things if t.kind != "sign"]
        sides.sort(reverse=True)
        clear = len(sides) == 1 or sides[0][0] >= sides[1][0] + 3
        assert tiny.label(scene) == (list(scenes.COLOURS).index(sides[0][1]) if clear else None)
        seen[tiny.label(scene)] += 1
    assert len(seen) == 9 and max(seen[i] for i in range(8)) < 60
    assert all(abs(tiny.FIRST - first) >= 10**9 for first in scenes.SPLITS.values())


def test_it_trains_and_leaves_nothing_behind():
    model = tiny.build()
    before = [p.clone() for p in model.parameters()]
    tiny.train(model, 2, 64)
    assert sum(not torch.equal(a, b) for a, b in zip(before, model.parameters())) > 60
    with torch.no_grad():                              # without its hooks: all patches
        assert model(torch.randn(2, 3, 144, 144)).logits.shape == (2, 8)
        assert model.vit.embeddings(torch.randn(2, 3, 144, 144)).shape == (2, 145, 96)


NAMES = {0: "tench, Tinca tinca", 1: "great_white-shark", 2: "crane", 3: "crane", 4: "red"}


@pytest.mark.parametrize("folder, mapped, index", [
    ("Tinca tinca", None, 0), ("tench, Tinca tinca", None, 0), ("Great white shark", None, 1),
    ("4", None, 4), ("n01", {"n01": 2}, 2), ("n01", {"n01": "3"}, 3), ("n01", {"n01": "tench"}, 0)])
def test_class_folders_lead_to_labels(folder, mapped, index):
    assert index_of(folder, NAMES, mapped) == index


@pytest.mark.parametrize("folder, mapped, count", [
    ("crane", None, 2), ("n01", None, 0), ("9", None, 0), ("red", {"n01": 2}, 0),
    ("n01", {"n01": "crane"}, 2)])
def test_class_folders_that_lead_nowhere_are_refused(folder, mapped, count):
    with pytest.raises(ValueError, match=f"{folder!r}.* leads to {count} of"):
        index_of(folder, NAMES, mapped)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The first scenes as files in class folders, one of them broken."""
    folder, items = tmp_path_factory.mktemp("photos"), Scenes(40)
    for i, (image, label) in enumerate(items):
        path = folder / tiny.LABELS[label] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    (folder / "red/broken.png").write_bytes(b"no picture")
    return folder, items


def test_a_folder_gives_what_the_scenes_gave(photos, net, vlm, capsys):
    folder, items = photos
    pictures = ClassFolder(folder, net.names)
    labels = Counter(label for _, label in pictures.items)
    assert len(pictures) == 41
    assert labels - Counter({0: 1}) == Counter(label for _, label in items)
    ways = {"all": per_picture(lambda units, k: [torch.arange(n) for n in units.counts])}
    one, other = (classify.classify(vlm, net, ways, x, [144]) for x in (pictures, items))
    assert [x["top1"] for x in one] == [x["top1"] for x in other] and one[0]["n"] == 40
    assert "broken.png" in capsys.readouterr().out
    some = ClassFolder(folder, net.names, n=9)
    assert len(some) == 9 and some.total == 41 and len({label for _, label in some.items}) > 2
    assert some.items == ClassFolder(folder, net.names, n=9).items


def test_folders_without_classes_are_refused(photos, tmp_path, net):
    for folder, says in ((tmp_path / "none", "is no folder"), (tmp_path, "no class folder"),
                         (photos[0] / "red", "no class folder")):
        with pytest.raises(ValueError, match=says):
            ClassFolder(folder, net.names)


# ------------------------------------------------------------------ measuring


def test_it_sees_what_the_vlm_sees(vlm, net):
    """At the same resolution nothing is resampled; a processor that crops must not, or the grids
    would not match."""
    images = [image for image, _ in Scenes(3)]
    seen = seen_by(vlm, vlm.pixels(vlm.pictures(images)))
    apart = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(images, seen)]
    assert max(apart) == 0
    given = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    assert (net.pixels(images) - given).abs().max() < 1e-5
    crops = Classifier(random_vit(), BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=20))
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 24).reshape(24, 24)
    ramp = Image.fromarray(ramp).convert("RGB")
    rows = crops.pixels([ramp])
    assert rows.shape == (1, 3, 24, 16)
    how = dict(image_mean=crops.processor.image_mean, image_std=crops.processor.image_std,
               resample=3)
    whole = Classifier(random_vit(), ViTImageProcessorPil(**how)).pixels([ramp])
    assert (rows - whole).abs().max() < 1e-6


def covered_by_largest(scene) -> np.ndarray:
    """(144,) share of each unit that the scene's largest shape covers."""
    sides = [0 if thing.text else thing.box[2] - thing.box[0] for thing in scene.things]
    return scenes.coverage(scene, 12, 12)[int(np.argmax(sides))]


def test_the_shapes_patches_tell_and_the_background_does_not(vlm, net):
    """Of the largest shape's own units the label can be read, of as many others it cannot."""
    items = Scenes(160)
    covers = [covered_by_largest(scene) for scene in items.scenes]
    turn = {"on": 0, "off": 0}

    def select(name, sign):
        def chosen(units, k):
            first = turn[name]
            turn[name] += len(units.grid)
            return [torch.from_numpy(np.argsort(-sign * c, kind="stable")[:k]).sort().values
                    for c in covers[first:turn[name]]]
        return per_picture(chosen)
    ways = {"on": select("on", 1), "off": select("off", -1),
            "random": per_picture(random_tokens.select)}
    lines = classify.classify(vlm, net, ways, items, [12], batch=50)
    top1 = {x["method"]: x["top1"] for x in lines}
    assert top1["all patches"] > .75 and top1["on"] > top1["random"] + .2 > top1["off"] + .2
    sizes = [(x["kept"], x["patches"], x["n"]) for x in lines]
    assert sizes == [(144, 144, 160)] + [(12, 12, 160)] * 3


def test_a_classifier_of_another_grid(vlm):
    """12 x 12 units reach its 6 x 4 patches; labels that it does not have are no hits."""
    net = Classifier(random_vit(), ViTImageProcessorPil())
    ways = {"random": per_picture(random_tokens.select)}
    items = [(image, 4) for image, _ in Scenes(4)]
    near, area = (classify.classify(vlm, net, ways, items, [48], rule=rule)[1]
                  for rule in ("nearest", "area"))
    assert near["kept"] == 48 and 0 < near["patches"] < 24 and area["patches"] == 8
    with pytest.raises(ValueError, match="label 5"):
        classify.classify(vlm, net, ways, [(items[0][0], 5)], [48])


def test_several_views_are_refused(net, tmp_path):
    vlm = FrozenVLM.from_pretrained(tiny_models.llava_next(tmp_path), torch.float32)
    with pytest.raises(ValueError, match="several views"):
        classify.classify(vlm, net, {}, Scenes(2), [4])


def test_the_command(tmp_path, photos, capsys):
    """Selector and baselines, on scenes and on a folder whose names a file maps; what asks a
    question is left out."""
    (tmp_path / "labels.json").write_text(
        json.dumps({name: i for i, name in enumerate(tiny.LABELS)}))
    common = ["tiny/vit", "--budgets", "16", "--n", "32", "--out", str(tmp_path)]
    lines = classify.main([*common, "--run", RUN, "--methods", "random", "holov", "tome",
                           "evidence", "fastv"])
    assert [(x["method"], x["patches"]) for x in lines] == [
        ("all patches", 144), ("random", 16), ("holov", 16), ("tome", 16), (RUN, 16)]
    assert all(x["n"] == 32 and 0 <= x["top1"] <= x["top5"] <= 1 for x in lines)
    printed = capsys.readouterr().out
    assert "evidence: left out" in printed and "fastv: left out" in printed
    assert json.loads((tmp_path / "classify.json").read_text()) == lines
    assert (tmp_path / "classify.md").read_text().strip() in printed
    lines = classify.main([*common, "--model", "tiny/llava", "--methods", "random",
                           "--images", str(photos[0]), "--labels", str(tmp_path / "labels.json"),
                           "--rule", "area"])
    assert len(lines) == 2 and 31 <= lines[0]["n"] <= 32 and lines[0]["top1"] > .5


def test_options_that_cannot_work_are_refused_at_once():
    with pytest.raises(ValueError, match="neither --run nor --model"):
        classify.main(["tiny/vit"])
    with pytest.raises(ValueError, match="methods=.'oracle'.: known are"):
        classify.main(["tiny/vit", "--model", "tiny/llava", "--methods", "oracle"])
