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
        found.append(torch.stack(selector.errors(selector.standardised(v, valid), mask, vlm.pixels(pictures), units.grid)))
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
