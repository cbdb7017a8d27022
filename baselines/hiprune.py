"""HiPrune (arXiv:2508.00553): goes by the attention that a token receives from all tokens of its
view.

Anchors: the round(alpha K / 5) most attended in a middle layer (block 8 of CLIP-L, 15 of
Qwen2.5-VL's encoder); buffers: their four neighbours; registers: the most attended of the rest in
the layer the tokens come from. Crop by crop.

Released code: neighbours are +-1 and +-columns in the flattened map, clamped to it, so left and
right wrap into the next row. Its flash variant forgets the mask of windowed blocks; here only
blocks with full attention are read.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top
from .encoder import deepest

NAMES = {"hiprune": {}}


def needs(vlm) -> dict:
    whole = vlm.adapter.whole
    middle = whole[len(whole) // 3]                    # 8 of 24 blocks; 15 of 7, 15, 23, 31
    return {"received middle": ("received", middle),
            "received": ("received", deepest(vlm.adapter))}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False,
           alpha: float = .1) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices. alpha [paper]."""
    views, budgets = by_view(units, keep)
    rows = pictures(views, budgets, "received middle", "received")
    return units.together([choose(here, k, middle, deep, grid, alpha, as_released)
                           for (here, k, middle, deep), grid in zip(rows, views.grid)])


def choose(here: Tensor, k: int, middle: Tensor, deep: Tensor, grid: tuple, alpha: float,
           wrap: bool) -> Tensor:
    """(k,) of here, the (n,) units of a view of rows x columns; middle and deep (n,): attention
    received."""
    rows, columns = grid
    anchor = here[top(middle, min(round(k * alpha / 5), k // 5))]
    near = torch.stack([anchor, anchor - 1, anchor + 1, anchor - columns, anchor + columns])
    if wrap:
        near = near.clamp(0, rows * columns - 1).flatten()
    else:
        is_there = torch.stack([
            anchor >= 0, anchor % columns > 0, anchor % columns < columns - 1,
            anchor >= columns, anchor < (rows - 1) * columns])
        near = near[is_there]
    first = torch.isin(here, near)                     # padding among the neighbours is not kept
    more = top(deep.masked_fill(first, -1.), k - int(first.sum()))
    return torch.cat([here[first], here[more]]).sort().values
