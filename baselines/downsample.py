"""Downsampling: the units of each view pooled to K cells, whatever they show. Many methods do not
reach it (VTC-Bench, arXiv:2510.07143).

Rows of cells are equally high, as many as make cells most nearly square; each row has
floor(K / rows) cells or one more, equally wide, so that K is met exactly [ours]. A cell is the mean
of the units that it covers, each by the share of it that is covered, as a box filter has it, and
stands at the unit nearest its centre, of equals the first. Crop by crop, tile by tile, frame by
frame; padding without a token is cut off before. Units of several patches are pooled patch by
patch, before the projector [ours].

The paper shrinks the picture in front of the encoder, which takes one of native resolution (Qwen)
and gives a number of tokens that goes with the picture. Here the encoder sees all of it, and K is K
in every family [ours].
"""

import math

import torch
from torch import Tensor

from . import by_view, pictures
from .inside import at_least_float32

NAMES = {"downsample": {}}
MERGES = True


def needs(vlm) -> dict:
    return {}


def select(units, keep: int, *, seed: int = 0,
           as_released: bool = False) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, C), or
    (sum of K, P, C), pooled.

    Neither seed nor as_released changes them. Raises ValueError on a view whose units with a token
    are no rectangle.
    """
    views, budgets = by_view(units, keep)
    kept, feats = [], []
    for (here, k, x), (_, columns) in zip(pictures(views, budgets, "feats", exact=True),
                                          views.grid):
        centre, weight = pooling(here.cpu(), columns, k)
        wide = at_least_float32(x).flatten(1)
        kept.append(here[centre.to(here.device)])
        feats.append((weight.to(wide) @ wide).view(k, *x.shape[1:]).to(x))
    return units.together(kept), torch.cat(feats)


def pooling(here: Tensor, columns: int, k: int) -> tuple[Tensor, Tensor]:
    """Units `here` (n,) of a view with so many columns -> of each cell its centre (k,) int64, an
    index into `here`, and the weight (k, n) float64 of every unit in its mean."""
    if not k:
        return here[:0], torch.zeros(0, len(here), dtype=torch.float64)
    y, x = here // columns, here % columns
    y, x = y - y.min(), x - x.min()
    height, width = int(y.max()) + 1, int(x.max()) + 1
    if len(here) != height * width:
        raise ValueError(f"{len(here)} units with a token in {height} x {width}: downsample "
                         "expected a rectangle of them in every view")
    rows = rows_of_cells(k, height, width)
    ends = torch.arange(rows + 1) * k // rows
    cells = ends.diff()                                # of each row
    row = torch.arange(rows).repeat_interleave(cells)
    column, in_row = torch.arange(k) - ends[row], cells[row]
    weight = covered(row, rows, height, y) * covered(column, in_row, width, x)
    # -1: a centre on the border of two units stands at the first of them
    middle_y = ((2 * row + 1) * height - 1) // (2 * rows)
    middle_x = ((2 * column + 1) * width - 1) // (2 * in_row)
    return middle_y * width + middle_x, weight / weight.sum(1, keepdim=True)


def rows_of_cells(k: int, height: int, width: int) -> int:
    """So many rows of cells make k cells of height x width units most nearly square."""
    possible = range(-(-k // width), min(k, height) + 1)
    return min(possible, key=lambda rows: abs(math.log(k * height / (width * rows ** 2))))


def covered(i: Tensor, parts: Tensor | int, length: int, unit: Tensor) -> Tensor:
    """(k, n) float64: how much of each unit (n,) lies in part i (k,) of so many equal parts of the
    length."""
    start, end = i.double() * length / parts, (i.double() + 1) * length / parts
    return (torch.minimum(end[:, None], unit + 1.)
            - torch.maximum(start[:, None], unit)).clamp(min=0)
