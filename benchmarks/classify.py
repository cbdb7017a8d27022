"""Selection judged without a language model (AutoSelect, Section 4.3): a classifier sees the chosen patches alone.

    keep = select(units, K)                   what a selector keeps on the VLM's grid
    patches = to_grid(keep, ...)              the same places on the classifier's grid
    logits = classifier.logits(x, patches)    [CLS] and those patches; the others' tokens are taken out

The classifier is any Hugging Face ViT, frozen, that adds its position embedding before its first layer, so that a
removed token is as good as one that no other may attend to (tests/test_classify.py). The pictures are the tiny world's
(`python evaluate.py --classify tiny/vit`) or of a folder of class folders, as ImageNet's are.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks.asking import Asked, Selector, chosen
from benchmarks.folder import find, open_picture
from common import FrozenVLM
from tiny import classifier as tiny
from tiny import scenes


class Classifier:
    """A frozen ViT classifier that can be shown a part of a picture's patches.

    model: of AutoModelForImageClassification | grid: (rows, columns) of patches | names: label of every index
    """

    def __init__(self, model: torch.nn.Module, processor):
        self.model, self.processor = model.requires_grad_(False).eval(), processor
        embeddings, size, patch = (getattr(found, name, None) for found, name in (
            (model.base_model, "embeddings"), (model.config, "image_size"), (model.config, "patch_size")))
        relative = any(getattr(model.config, f"use_{kind}relative_position_bias", False) for kind in ("", "shared_"))
        if embeddings is None or not size or not patch or relative:
            raise ValueError(f"{type(model).__name__} has no embeddings, image_size or patch_size, or has relative "
                             "positions: expected a ViT with absolute ones, such as google/vit-base-patch16-224")
        self.size, patch = ((x, x) if isinstance(x, int) else tuple(x) for x in (size, patch))
        self.grid, self.names = (self.size[0] // patch[0], self.size[1] // patch[1]), model.config.id2label
        self.shown = None                              # (B, K) patches of the next call, None for all
        embeddings.register_forward_hook(self._take_out)

    @classmethod
    def from_pretrained(cls, name: str, device="cpu") -> "Classifier":
        """A folder or hub id, in float32."""
        return cls(AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).to(device),
                   AutoImageProcessor.from_pretrained(name))

    def _take_out(self, module, args, tokens):
        """Of what the embeddings return, (B, prefix + patches, C), positions included: prefix and shown patches."""
        n = self.grid[0] * self.grid[1]
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] < n:
            raise ValueError(f"{type(self.model).__name__}'s embeddings give no (B, prefix + {n}, C) tokens: expected "
                             "a ViT with absolute positions, added before the first layer")
        if self.shown is None:
            return tokens
        prefix = tokens.shape[1] - n                   # [CLS], and whatever else is no patch
        index = self.shown.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], 1)

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """(B, 3, H, W): each picture whole, stretched to the classifier's square: a crop would shift the grid."""
        size = {"height": self.size[0], "width": self.size[1]}
        return self.processor(images=images, size=size, do_resize=True, do_center_crop=False,
                              return_tensors="pt")["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def logits(self, pixels: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
        """(B, labels); keep[b] (K_b,) int64 patches in raster order that picture b shows, None for all. Of K_b = 0 it
        sees [CLS] alone. Raises ValueError where keep does not fit pixels and grid."""
        if keep is None:
            return self.model(pixel_values=pixels).logits
        n = self.grid[0] * self.grid[1]
        if len(keep) != len(pixels) or any(len(k) and not 0 <= int(k.min()) <= int(k.max()) < n for k in keep):
            raise ValueError(f"keep has {len(keep)} rows for {len(pixels)} pictures, or a patch beyond {n - 1}: "
                             "expected one row per picture, indices into the classifier's grid")
        out = None
        for count in {len(k) for k in keep}:           # those of one length at once: nothing is padded
            rows = [b for b, k in enumerate(keep) if len(k) == count]
            self.shown = torch.stack([keep[b].long() for b in rows])
            try:
                found = self.model(pixel_values=pixels[rows]).logits
            finally:
                self.shown = None
            out = found.new_empty(len(keep), found.shape[1]) if out is None else out
            out[rows] = found
        return out


def overlap(source: int, target: int) -> Tensor:
    """(target, source) share of each of `target` equal parts of a line that each of `source` equal parts covers."""
    a, b = torch.arange(target + 1).double() / target, torch.arange(source + 1).double() / source
    return (torch.minimum(a[1:, None], b[1:]) - torch.maximum(a[:-1, None], b[:-1])).clamp(min=0) * target


def to_grid(keep: Tensor, source: tuple[int, int], target: tuple[int, int], rule: str = "nearest") -> Tensor:
    """keep (K,) int64 units of a (rows, columns) grid -> (K',) ascending patches of another grid over the same picture.

    On the same grid both rules change nothing. [ours; the paper says that the mask is resized]
    "nearest": a patch is shown if the unit under its centre was kept, as an image's nearest-neighbour resize has it. K'
    differs from mask to mask: of a finer grid than the classifier's some units lie under no centre.
    "area": the round(K * patches / units) patches, at least one, that kept units cover most; of equals the first.
    Raises ValueError for another rule.
    """
    if source == target:
        return keep
    mask = torch.zeros(source, dtype=torch.float64).flatten().index_fill(0, keep.cpu(), 1.).view(source)
    if rule == "nearest":
        rows, columns = ((2 * torch.arange(t) + 1) * s // (2 * t) for s, t in zip(source, target))
        return mask[rows][:, columns].flatten().nonzero().flatten()
    if rule == "area":
        share = (overlap(source[0], target[0]) @ mask @ overlap(source[1], target[1]).T).flatten()
        count = max(round(len(keep) * share.numel() / mask.numel()), 1)
        return share.argsort(descending=True, stable=True)[:count].sort().values
    raise ValueError(f"rule={rule!r} is none of ('nearest', 'area')")


# ------------------------------------------------------------------------------------------------ pictures and labels

class Scenes(Sequence):
    """n scenes of a split of the tiny world, the first that have a label: (picture, label) each."""

    def __init__(self, n: int, split: str = "test", size: tuple[int, int] = (144, 144)):
        self.scenes = tiny.labelled(scenes.SPLITS[split], n, size)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        return scenes.render(self.scenes[i]), tiny.label(self.scenes[i])


class ClassFolder(Sequence):
    """Pictures of a folder of class folders, (picture, label) each; n of them drawn with a seed, None for all.

    names: label of every index, as a classifier's config.id2label has it. A class folder bears such a label, or one of
    its synonyms between commas (case, "_" and "-" do not count), or an index; or `mapping`, a JSON file, says for every
    folder's name which index or label it is.
    Raises ValueError naming the first folder that leads to no label, or to two; from an item, an unreadable picture.
    """

    def __init__(self, folder: str | Path, names: dict[int, str], mapping: str | Path | None = None,
                 n: int | None = None, seed: int = 0):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder: expected one that holds a folder of pictures for every class")
        files = [name for name in find(self.folder) if "/" in name]
        if not files:
            raise ValueError(f"{folder} holds no class folder with pictures: expected {folder}/CLASS/picture.jpg")
        said = json.loads(Path(mapping).read_text()) if mapping else None
        index = {top: index_of(top, names, said) for top in dict.fromkeys(f.split("/")[0] for f in files)}
        self.items = [(name, index[name.split("/")[0]]) for name in files]
        self.total = len(self.items)
        if n is not None and n < self.total:           # the first n would be of the first classes alone
            self.items = sorted(random.Random(seed).sample(self.items, n))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name, label = self.items[i]
        return open_picture(self.folder / name), label


def plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def index_of(folder: str, names: dict[int, str], said: dict | None = None) -> int:
    """Index of a class folder's label. Raises ValueError where there is none, or more than one."""
    wanted = str(folder if said is None else said.get(folder, ""))
    if wanted.isdigit() and int(wanted) in names:
        return int(wanted)
    found = [i for i, name in names.items() if plain(wanted) in {plain(x) for x in [name, *name.split(",")]}]
    if len(found) != 1:
        where = "" if said is None else f", which the mapping gives as {wanted!r},"
        raise ValueError(f"class folder {folder!r}{where} leads to {len(found)} of the classifier's {len(names)} "
                         f"labels: expected a label such as {next(iter(names.values()))!r}, an index, or a JSON file "
                         '{"FOLDER": index, ...} given as --labels')
    return found[0]


# -------------------------------------------------------------------------------------------------------- measuring

def seen_by(vlm: FrozenVLM, pixels: list[Tensor]) -> list[Image.Image]:
    """The pictures as the VLM's encoder sees them, cropped and scaled as it has them, so that its grid covers them."""
    processor = vlm.processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    seen = [(255 * (x.float().cpu() * std + mean)).clamp(0, 255).round().byte() for x in pixels]
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in seen]


@torch.no_grad()
def measure(vlm: FrozenVLM, classifier: Classifier, selectors: dict[str, Selector], items: Sequence, budgets: Sequence,
            batch: int = 32, rule: str = "nearest") -> list[dict]:
    """One line with all patches, then one per selector and budget: method, K, kept (units on the VLM's grid, mean),
    patches (that the classifier sees, mean), top1 and top5 in 0..1, n.

    selectors: such as choose once a picture. Of those that merge tokens, the places where the merged ones stand count.
    items: (picture, label). An unreadable picture is left out and named. Raises ValueError for a VLM that sees a
    picture in several views, where no one grid covers it.
    """
    turns = [("all patches", None), *((name, k) for name, s in selectors.items() for k in s.budgets or budgets)]
    look = {name: what for s in selectors.values() for name, what in s.look.items()}
    ranks, kept, patches = ({turn: [] for turn in turns} for _ in range(3))
    for start in tqdm(range(0, len(items), batch), "classify"):
        part = []
        for i in range(start, min(start + batch, len(items))):
            try:
                part.append(items[i])
            except ValueError as error:
                print(f"left out: {error}")
        if not part:
            continue
        images, labels = [image for image, _ in part], torch.tensor([label for _, label in part])
        given = vlm.pictures(images)
        units = vlm.encode(given, look)
        if units.views is not None:
            raise ValueError(f"{vlm.family} sees a picture in several views: expected a VLM with one grid a picture, "
                             "such as LLaVA-1.5 or Qwen2.5-VL")
        asked = Asked(units, list(range(len(part))), units, (), None,
                      merged=lambda rule, given=given: vlm.merged(given, rule))
        pixels = classifier.pixels(seen_by(vlm, vlm.pixels(given)))
        for turn in turns:
            keep, shown = None, None
            if turn[1] is not None:
                keep, _ = chosen(selectors[turn[0]], asked, turn[1])
                shown = [to_grid(k.cpu(), grid, classifier.grid, rule) for k, grid in zip(keep, units.grid)]
            order = classifier.logits(pixels, shown).float().argsort(dim=-1, descending=True, stable=True).cpu()
            if labels.max() >= order.shape[1]:
                raise ValueError(f"label {labels.max()}: expected one of the classifier's {order.shape[1]}")
            ranks[turn] += (order == labels[:, None]).int().argmax(1).tolist()
            kept[turn] += [len(k) for k in keep] if keep else units.counts
            patches[turn] += [len(s) for s in shown] if shown else [classifier.grid[0] * classifier.grid[1]] * len(part)
    return [{"method": turn[0], "K": turn[1] or "all", "kept": float(np.mean(kept[turn])),
             "patches": float(np.mean(patches[turn])), "top1": float(np.mean(np.array(ranks[turn]) < 1)),
             "top5": float(np.mean(np.array(ranks[turn]) < 5)), "n": len(ranks[turn])} for turn in turns]


def table(lines: list[dict]) -> str:
    """measure()'s lines as Markdown, accuracy in percent."""
    out = ["| method | K | kept | patches seen | top-1 | top-5 |", "|" + "---|" * 6]
    return "\n".join(out + [f"| {x['method']} | {x['K']} | {x['kept']:.1f} | {x['patches']:.1f} | "
                            f"{100 * x['top1']:.1f} | {100 * x['top5']:.1f} |" for x in lines])
