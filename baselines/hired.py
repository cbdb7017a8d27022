"""HiRED (arXiv:2408.10945): attention of [CLS] in the last layer says which tokens, that of the
first layer says how many from each crop of LLaVA-NeXT. One view: the K most attended, the same as
FasterVLM's.

Crops: the whole picture keeps alpha K tokens; the others go to the crops by the first layer's
attention of the WHOLE picture inside each crop. Encoders without [CLS] [ours]: attention received.
Other views (tiles, frames): by their size.

Released code: (1) a crop's part of the picture is a run of the flattened map, so a stripe; its
share is how many of the int(N (1 - alpha)) most attended lie there. (2) Every crop's share is
rounded down: fewer than K in all.
"""

import torch
from torch import Tensor

from . import by_view, pictures, share_out, top
from .encoder import deepest

NAMES = {"hired": {}}


def needs(vlm) -> dict:
    adapter = vlm.adapter
    what = "cls" if adapter.has_cls else "received"
    readings = {"attention": (what, deepest(adapter))}
    if getattr(adapter, "crops", False):
        readings |= {"cls first": ("cls", 0), "crop": ("crop", 0)}
    return readings


def select(units, keep: int, *, seed: int = 0, as_released: bool = False,
           alpha: float = .5) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices, as_released of at most so many.

    alpha: share of the whole picture [released scripts; its code's default is 1, which leaves the
    crops none]. Raises ValueError on rows of several pictures with crops.
    """
    views, budgets = by_view(units, keep)
    if "crop" in units.readings:
        budgets = [k for row in split(units, keep, alpha, as_released) for k in row]
    return units.together([here[top(attention, k)].sort().values
                           for here, k, attention in pictures(views, budgets, "attention")])


def split(units, keep: int, alpha: float, as_released: bool):
    """How many tokens each view of each picture keeps, the whole picture's first."""
    room_by_picture = units.apart().pad(units.image_of)[1].sum(1).cpu().split(units.views)
    rows = pictures(units, keep, "cls first", "crop")
    for (_, k, first, crop), room in zip(rows, room_by_picture):
        of_whole = int((crop >= 0).sum())              # units of the whole picture
        if of_whole != room[0]:
            raise ValueError("hired shares out K over the crops of one picture a row: this row has "
                             "several pictures")
        crops = len(room) - 1
        whole = min(int(k * alpha), int(room[0]))
        first = first[:of_whole].cpu()
        crop = crop[crop >= 0].long().cpu()
        if as_released:
            best = top(first, int(len(first) * (1 - alpha)))
            stripe = torch.arange(len(first)) * crops // len(first)
            mass = torch.bincount(stripe[best], minlength=crops)
            share = (k - whole) * mass // max(int(mass.sum()), 1)
            yield [whole, *torch.minimum(share, room[1:]).tolist()]
        else:
            mass = torch.zeros(crops).index_add(0, crop, first)
            whole = max(whole, k - int(room[1:].sum()))
            yield [whole, *share_out(k - whole, mass, room[1:]).tolist()]
