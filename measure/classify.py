"""Selection judged without a language model (AutoSelect, Section 4.3): a classifier sees the chosen
patches alone.

    python -m measure.classify tiny/vit --run runs/autoselect --methods random cls_attention

    keep = select(units, K)                   what a selector keeps on the VLM's grid
    patches = to_grid(keep, ...)              the same places on the classifier's grid
    logits = classifier.logits(x, patches)    [CLS] and those patches; the others are taken out

The classifier is any Hugging Face ViT, frozen, that adds its position embedding before its first
layer, so that a removed token is as good as one that no other may attend to. The pictures are the
tiny world's, or of a folder of class folders, as ImageNet's are. Ways to select that need a
question or the language model are left out. Writes classify.md and classify.json.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

import baselines
import runs
from backbones.checkpoints import check_device, read_config
from baselines.encoder import encode
from benchmarks.answering import QuestionBatch, choose, content_hash
from common import FrozenVLM
from data.pictures import find, open_picture
from runs import Way
from tiny import classifier as tiny
from tiny import scenes

RULES = ("nearest", "area")

# ------------------------------------------------------------------ the classifier


class Classifier:
    """A frozen ViT classifier that can be shown a part of a picture's patches.

    model  of AutoModelForImageClassification
    size   (height, width) of its pictures | grid: (rows, columns) of their patches
    names  label of every index
    """

    def __init__(self, model: torch.nn.Module, processor):
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        config = model.config
        embeddings = getattr(model.base_model, "embeddings", None)
        size = getattr(config, "image_size", None)
        patch = getattr(config, "patch_size", None)
        relative = any(getattr(config, f"use_{kind}relative_position_bias", False)
                       for kind in ("", "shared_"))
        if embeddings is None or not size or not patch or relative:
            raise ValueError(f"{type(model).__name__} has no embeddings, image_size or patch_size, "
                             "or has relative positions: expected a ViT with absolute ones, such "
                             "as google/vit-base-patch16-224")
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self.grid = self.size[0] // patch[0], self.size[1] // patch[1]
        self.names = config.id2label
        self.visible = None                # (B, K) patches that the next call sees, None for all
        embeddings.register_forward_hook(self._take_out)

    @classmethod
    def from_pretrained(cls, name: str, device="cpu") -> "Classifier":
        """A folder or hub id, in float32."""
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
        return cls(model.to(device), AutoImageProcessor.from_pretrained(name))

    def _take_out(self, module, args, tokens):
        """Of what the embeddings return, (B, prefix + patches, C), positions included: the prefix
        and the visible patches."""
        n = self.grid[0] * self.grid[1]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < n:
            raise ValueError(f"{type(self.model).__name__}'s embeddings give no (B, prefix + {n}, "
                             "C) tokens: expected a ViT with absolute positions, added before the "
                             "first layer")
        if self.visible is None:
            return tokens
        prefix = tokens.shape[1] - n       # [CLS], and whatever else is no patch
        index = self.visible.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], 1)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """(B, 3, H, W): each picture whole, stretched to the classifier's square: a crop would
        shift the grid."""
        size = {"height": self.size[0], "width": self.size[1]}
        batch = self.processor(images=images, size=size, do_resize=True, do_center_crop=False,
                               return_tensors="pt")
        return batch["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def logits(self, pixels: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
        """(B, labels).

        keep[b]: (K_b,) int64 patches in raster order that picture b shows, None for all. Of K_b = 0
        it sees [CLS] alone. Raises ValueError where keep does not fit pixels and grid.
        """
        if keep is None:
            return self.model(pixel_values=pixels).logits
        n = self.grid[0] * self.grid[1]
        beyond = any(len(k) and not 0 <= int(k.min()) <= int(k.max()) < n for k in keep)
        if len(keep) != len(pixels) or beyond:
            raise ValueError(f"keep has {len(keep)} rows for {len(pixels)} pictures, or a patch "
                             f"beyond {n - 1}: expected one row per picture, indices into the "
                             "classifier's grid")
        rows = [None] * len(keep)
        for count in {len(k) for k in keep}:           # those of one length at once: no padding
            alike = [b for b, k in enumerate(keep) if len(k) == count]
            self.visible = torch.stack([keep[b].long() for b in alike])
            try:
                logits = self.model(pixel_values=pixels[alike]).logits
            finally:
                self.visible = None
            for b, row in zip(alike, logits):
                rows[b] = row
        return torch.stack(rows)


# ------------------------------------------------------------------ the grids


def overlap(source: int, target: int) -> Tensor:
    """(target, source) share of each of `target` equal parts of a line that each of `source` equal
    parts covers."""
    a = torch.arange(target + 1).double() / target
    b = torch.arange(source + 1).double() / source
    covered = torch.minimum(a[1:, None], b[1:]) - torch.maximum(a[:-1, None], b[:-1])
    return covered.clamp(min=0) * target


def to_grid(keep: Tensor, source: tuple[int, int], target: tuple[int, int],
            rule: str = "nearest") -> Tensor:
    """keep (K,) int64 units of a (rows, columns) grid -> (K',) ascending patches of another grid
    over the same picture.

    On the same grid both rules change nothing. [ours; the paper says that the mask is resized]
    "nearest": a patch is visible if the unit under its centre was kept, as an image's
    nearest-neighbour resize has it. K' differs from mask to mask: of a finer grid than the
    classifier's some units lie under no centre.
    "area": the round(K * patches / units) patches, at least one, that kept units cover most; of
    equals the first.
    Raises ValueError for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is none of {RULES}")
    if source == target:
        return keep
    mask = torch.zeros(source[0] * source[1], dtype=torch.float64)
    mask = mask.index_fill(0, keep.cpu(), 1.).view(source)
    if rule == "nearest":
        rows, columns = ((2 * torch.arange(t) + 1) * s // (2 * t) for s, t in zip(source, target))
        return mask[rows][:, columns].flatten().nonzero().flatten()
    covered = overlap(source[0], target[0]) @ mask @ overlap(source[1], target[1]).T
    covered = covered.flatten()
    count = max(round(len(keep) * covered.numel() / mask.numel()), 1)
    return covered.argsort(descending=True, stable=True)[:count].sort().values


# ------------------------------------------------------------------ pictures and labels


class Scenes(Sequence):
    """n scenes of a split of the tiny world, the first that have a label: (picture, label) each."""

    def __init__(self, n: int, split: str = "test", size: tuple[int, int] = (144, 144)):
        self.scenes = tiny.labelled(scenes.SPLITS[split], n, size)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return scenes.render(self.scenes[i]), tiny.label(self.scenes[i])


class ClassFolder(Sequence):
    """Pictures of a folder of class folders, (picture, label) each; n of them drawn with a seed,
    None for all.

    names: label of every index, as a classifier's config.id2label has it. A class folder bears such
    a label, or one of its synonyms between commas (case, "_" and "-" do not count), or an index; or
    `mapping`, a JSON file, says for every folder's name which index or label it is.
    Raises ValueError naming the first folder that leads to no label, or to two; from an item, an
    unreadable picture.
    """

    def __init__(self, folder: str | Path, names: dict[int, str],
                 mapping: str | Path | None = None, n: int | None = None, seed: int = 0):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder: expected one that holds a folder of pictures "
                             "for every class")
        files = [name for name in find(self.folder) if "/" in name]
        if not files:
            raise ValueError(f"{folder} holds no class folder with pictures: expected "
                             f"{folder}/CLASS/picture.jpg")
        mapped = runs.read_json(Path(mapping)) if mapping else None
        classes = dict.fromkeys(name.split("/")[0] for name in files)
        index = {name: index_of(name, names, mapped) for name in classes}
        self.items = [(name, index[name.split("/")[0]]) for name in files]
        self.total = len(self.items)
        if n is not None and n < self.total:       # the first n would be of the first classes alone
            self.items = sorted(random.Random(seed).sample(self.items, n))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name, label = self.items[i]
        return open_picture(self.folder / name), label


def plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def index_of(folder: str, names: dict[int, str], mapped: dict | None = None) -> int:
    """Index of a class folder's label. Raises ValueError where there is none, or more than one."""
    wanted = str(folder if mapped is None else mapped.get(folder, ""))
    if wanted.isdigit() and int(wanted) in names:
        return int(wanted)
    matches = [i for i, name in names.items()
               if plain(wanted) in {plain(x) for x in [name, *name.split(",")]}]
    if len(matches) != 1:
        where = "" if mapped is None else f", which the mapping gives as {wanted!r},"
        raise ValueError(f"class folder {folder!r}{where} leads to {len(matches)} of the "
                         f"classifier's {len(names)} labels: expected a label such as "
                         f"{next(iter(names.values()))!r}, an index, or a JSON file "
                         '{"FOLDER": index, ...} given as --labels')
    return matches[0]


# ------------------------------------------------------------------ measuring


def seen_by(vlm: FrozenVLM, pixels: list[Tensor]) -> list[Image.Image]:
    """The pictures as the VLM's encoder sees them, cropped and scaled as it has them, so that its
    grid covers them."""
    processor = vlm.processor.image_processor
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    colours = [255 * (x.float().cpu() * std + mean) for x in pixels]
    return [Image.fromarray(x.clamp(0, 255).round().byte().permute(1, 2, 0).numpy())
            for x in colours]


def read_items(items: Sequence, numbers) -> tuple[list[Image.Image], list[int]]:
    """Pictures and labels of these items; an unreadable one is left out and named."""
    images = []
    labels = []
    for number in numbers:
        try:
            image, label = items[number]
        except ValueError as error:
            print(f"left out: {error}")
            continue
        images.append(image)
        labels.append(label)
    return images, labels


def look_at(vlm: FrozenVLM, images: list[Image.Image], needs: dict) -> QuestionBatch:
    """The pictures, encoded, with all that is read of them and no question. Raises ValueError for a
    VLM that sees a picture in several views, where no one grid covers it."""
    pixels = vlm.pictures(images)
    units = encode(vlm, pixels, needs)
    if units.views is not None:
        raise ValueError(f"{vlm.family} sees a picture in several views: expected a VLM with one "
                         "grid a picture, such as LLaVA-1.5 or Qwen2.5-VL")
    names = [content_hash([image]) for image in images]
    rows = QuestionBatch(vlm, units, list(range(len(images))), names, pixels)
    return replace(rows, pictures=rows)


@torch.no_grad()
def classify(vlm: FrozenVLM, classifier: Classifier, ways: dict[str, Way], items: Sequence,
             budgets: Sequence, batch: int = 32, rule: str = "nearest") -> list[dict]:
    """One line with all patches, then one per way and budget: method, K, kept (units on the VLM's
    grid, mean), patches (that the classifier sees, mean), top1 and top5 in 0..1, n.

    ways: those that choose once a picture. Of those that merge tokens, the places where the merged
    ones stand count.
    items: (picture, label). An unreadable picture is left out and named.
    """
    turns = [("all patches", None)]
    turns += [(name, k) for name, way in ways.items() for k in way.budgets or budgets]
    needs = {name: what for way in ways.values() for name, what in way.needs.items()}
    ranks, kept, patches = ({turn: [] for turn in turns} for _ in range(3))
    for start in tqdm(range(0, len(items), batch), "classify"):
        numbers = range(start, min(start + batch, len(items)))
        images, labels = read_items(items, numbers)
        if not images:
            continue
        asked = look_at(vlm, images, needs)
        grids = asked.units.grid
        pixels = classifier.pixels(seen_by(vlm, vlm.pixels(asked.pixels)))
        labels = torch.tensor(labels)
        for turn in turns:
            name, k = turn
            visible = None
            counts = asked.units.counts
            if k is not None:
                keep, _ = choose(ways[name], asked, k)
                counts = [len(index) for index in keep]
                visible = [to_grid(index.cpu(), grid, classifier.grid, rule)
                           for index, grid in zip(keep, grids)]
            logits = classifier.logits(pixels, visible).float()
            order = logits.argsort(dim=-1, descending=True, stable=True).cpu()
            if labels.max() >= order.shape[1]:
                raise ValueError(f"label {labels.max()}: expected one of the classifier's "
                                 f"{order.shape[1]}")
            ranks[turn] += (order == labels[:, None]).int().argmax(1).tolist()
            kept[turn] += counts
            whole = classifier.grid[0] * classifier.grid[1]
            patches[turn] += [len(x) for x in visible] if visible else [whole] * len(images)
    return [{"method": name, "K": k or "all", "kept": float(np.mean(kept[name, k])),
             "patches": float(np.mean(patches[name, k])),
             "top1": float(np.mean(np.array(ranks[name, k]) < 1)),
             "top5": float(np.mean(np.array(ranks[name, k]) < 5)), "n": len(ranks[name, k])}
            for name, k in turns]


def table(lines: list[dict]) -> str:
    """classify()'s lines as Markdown, accuracy in percent."""
    head = "| method | K | kept | patches seen | top-1 | top-5 |"
    rows = [f"| {line['method']} | {line['K']} | {line['kept']:.1f} | {line['patches']:.1f} | "
            f"{100 * line['top1']:.1f} | {100 * line['top5']:.1f} |" for line in lines]
    return "\n".join([head, "|" + "---|" * 6, *rows])


# ------------------------------------------------------------------ the command


def ways_of(vlm: FrozenVLM, options) -> dict[str, Way]:
    """Baselines and runs that choose once a picture, before the language model; others are
    named."""
    ways = {}
    for name in options.methods:
        try:
            ways[name] = baselines.way(name, vlm, seed=options.seed)
        except ValueError as error:
            print(f"{name}: left out, {error}")
    for run in options.run:
        selector, _ = runs.load_selector(run, vlm)
        if selector.reads_question:                # to calibrate it would be in vain
            ways[run] = Way(reads_question=True)
        else:
            own = selector.ways([], options.budgets, calibration=None)
            ways |= {f"{run}{suffix}": way for suffix, way in own.items()}
    blind = {name: way for name, way in ways.items()
             if way.select is not None and not way.reads_question}
    for name in ways:
        if name not in blind:
            print(f"{name}: left out, it needs a question or the language model")
    return blind


def parse(args: list[str]):
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("classifier", help="a ViT: folder or hub id")
    add("--run", nargs="+", default=[], help="runs, selectors' folders or hub ids")
    add("--model", default="", help="the frozen VLM; without it: the first run's own")
    add("--methods", nargs="+", default=["random", "cls_attention"],
        help=f"baselines beside the runs: {', '.join(baselines.names())}")
    add("--budgets", type=int, nargs="+", default=[48, 32, 16], help="K, kept tokens")
    add("--n", type=int, default=1000, help="pictures")
    add("--split", default="test", choices=["test", "calibration"], help="of the tiny world")
    add("--images", default="", help="a folder of class folders; without it: the tiny world")
    add("--labels", default="", help="with --images: JSON of each class folder's name -> index or "
                                     "label; without it the folder's name is the label")
    add("--rule", default="nearest", choices=RULES, help="how a mask reaches another grid")
    add("--batch", type=int, default=32, help="pictures at a time")
    add("--seed", type=int, default=0, help="of random tokens and of the pictures drawn")
    add("--dtype", default=runs.DTYPE, choices=["bfloat16", "float16", "float32"],
        help="of the frozen VLM")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", type=Path, default=Path("runs/classify"), help="folder of the table")
    options = parser.parse_args(args)
    runs.check_options(options, budgets=1, n=1, batch=1, seed=0)
    check_device(options.device, getattr(torch, options.dtype))
    runs.writable(options.out)
    if options.labels and not options.images:
        raise ValueError(f"labels={options.labels!r} are of --images, a folder of class folders")
    if not options.model and not options.run:
        raise ValueError("neither --run nor --model: expected one of them")
    if unknown := sorted({*options.methods} - {*baselines.names()}):
        raise ValueError(f"methods={unknown}: known are {', '.join(baselines.names())}")
    return options


def main(args: list[str]) -> list[dict]:
    options = parse(args)
    models = [runs.read_selector(run)[1]["training"]["model"] for run in options.run]
    model = options.model or models[0]
    shapes = FrozenVLM.from_pretrained(model, device="meta")
    for run in options.run:                            # refused before a weight is read
        runs.load_selector(run, shapes, "cpu")
    names = read_config(options.classifier).id2label
    if options.images:
        items = ClassFolder(options.images, names, options.labels or None, options.n, options.seed)
    vlm = FrozenVLM.from_pretrained(model, getattr(torch, options.dtype), options.device)
    classifier = Classifier.from_pretrained(options.classifier, options.device)
    if not options.images:
        items = Scenes(options.n, options.split)
    lines = classify(vlm, classifier, ways_of(vlm, options), items, options.budgets, options.batch,
                     options.rule)
    rows, columns = classifier.grid
    source = options.images or "the tiny world"
    print(f"\n{table(lines)}\n\n{lines[0]['n']} pictures of {source}, classifier "
          f"{options.classifier}, {vlm.family}'s masks on its {rows} x {columns} patches")
    runs.write_text(options.out / "classify.json", json.dumps(lines, indent=1))
    runs.write_text(options.out / "classify.md", table(lines) + "\n")
    return lines


if __name__ == "__main__":
    runs.command(main)
