"""What a picture's kept tokens hold of the rest of it, and how still the mask stands. No language model is asked.

For selectors that rebuild (recon_selector.py): error() of features and pixels from the tokens a selection keeps;
distorted() pictures and overlap() of the masks of two versions of one picture (the paper's appendix B.5).
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

DISTORTIONS = ("none", "crop", "brightness")
SHARES = (0.5, 0.4, 0.222, 0.111, 0.056)              # of the tokens kept, the paper's Table 1


@torch.no_grad()
def error(selector, vlm, images, select, batch: int = 32) -> tuple[float, float]:
    """Mean over pictures of |F_rec - F| and |I_rec - I| where select(units) -> keep says which tokens are there."""
    found = []
    for start in range(0, len(images), batch):
        pictures = vlm.pictures(images[start:start + batch])
        units = vlm.encode(pictures)
        v, valid = units.pad()
        mask = torch.zeros(valid.shape, device=v.device)
        for row, keep in zip(mask, select(units)):
            row[keep] = 1
        x = selector.standardised(v, valid)
        found.append(torch.stack(selector.errors(x, mask, vlm.pixels(pictures), units.grid)))
    feature, image = torch.cat(found, 1).mean(1).tolist()
    return feature, image


def distorted(image: Image.Image, how: str, seed: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """(picture of the same size, box of the original that it shows). crop: up to 5 % off each side; brightness: times
    0.8 to 1.2. Raises ValueError for another distortion."""
    rng, (w, h) = np.random.default_rng([seed, 17]), image.size
    box = (0, 0, w, h)
    if how == "crop":
        left, right, top, bottom = rng.uniform(0, .05, 4)
        box = (round(left * w), round(top * h), w - round(right * w), h - round(bottom * h))
        image = image.resize((w, h), Image.BICUBIC, box)
    elif how == "brightness":
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(.8, 1.2))
    elif how != "none":
        raise ValueError(f"distortion {how!r} is none of {DISTORTIONS}")
    return image, box


def overlap(keep, other, grid: tuple[int, int], size: tuple[int, int], box) -> float:
    """Intersection over union, in pixels, of what `keep` covers of a picture (width, height) inside `box`, and what
    `other`, chosen in the distorted picture that shows this box, covers of it."""
    maps = []
    for index in (keep, other):
        mask = torch.zeros(grid[0] * grid[1])
        mask[index.cpu()] = 1
        maps.append(F.interpolate(mask.view(1, 1, *grid), (size[1], size[0]))[0, 0])
    left, top, right, bottom = box
    part = F.interpolate(maps[0][None, None, top:bottom, left:right], (size[1], size[0]))[0, 0]
    return ((part * maps[1]).sum() / (part + maps[1]).clamp(max=1).sum()).item()


@torch.no_grad()
def stability(vlm, trained: dict, images, budgets, how: str) -> dict:
    """K -> (per selector the mean overlap() of its masks of each picture and of its distorted version; and what it
    would be, had the mask stayed where it was while the picture moved)."""
    moved, boxes = zip(*(distorted(image, how, b) for b, image in enumerate(images)))
    plain, other = (vlm.encode(vlm.pictures(list(pictures))) for pictures in (images, moved))
    found = {k: ([], []) for k in budgets}
    for net in trained.values():
        for k in budgets:
            masks = list(zip(net.select(*plain.pad(), k), net.select(*other.pad(), k)))
            for each, pairs in zip(found[k], (masks, [(a, a) for a, _ in masks])):
                each.append(float(np.mean([overlap(*pair, grid, image.size, box) for pair, grid, image, box in
                                           zip(pairs, plain.grid, images, boxes)])))
    return found


@torch.no_grad()
def shown(selector, vlm, images, shares=(0.5, 0.222, 0.056)) -> dict:
    """Title -> per picture (3, H, W) in [0, 1]: what a share of the tokens shows, and what is rebuilt from it."""
    batch = vlm.pictures(images)
    units, pixels = vlm.encode(batch), vlm.pixels(batch)
    v, valid = units.pad()
    x, processor, rows = selector.standardised(v, valid), vlm.processor.image_processor, {}
    mean, std = (torch.tensor(y, device=v.device)[:, None, None] for y in (processor.image_mean, processor.image_std))
    for share in shares:
        kept, rebuilt = [], []
        for b, (grid, picture) in enumerate(zip(units.grid, pixels)):
            n = grid[0] * grid[1]
            mask = torch.zeros(1, n, device=v.device)
            mask[0, selector.select(v[b:b + 1, :n], valid[b:b + 1, :n], round(share * n))[0]] = 1
            near = F.interpolate(mask.view(1, 1, *grid), picture.shape[1:])[0]
            again = selector.rebuild(x[b:b + 1, :n], mask, grid, picture.shape[1:])[1][0]
            kept.append((picture.float() * std + mean) * near + .85 * (1 - near))
            rebuilt.append(again.float() * std + mean)
        rows |= {f"{share:.1%} of the tokens": kept, f"rebuilt from {share:.1%}": rebuilt}
    return rows
