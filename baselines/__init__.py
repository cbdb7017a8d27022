"""Training-free rivals, one file each, from the papers' formulas. Found by its name is a file with

    NAMES   name on the command line -> options of what follows: {"prumerge+": {"plus": True}}

and, if it chooses before the language model,

    needs(vlm)      what encoder.encode() must read for it: name -> (what, layer); ValueError, with
                    the reason, if this backbone cannot give it
    select(units, keep, *, seed=0, as_released=False, ...)
        -> B ascending int64 tensors of exactly `keep` unit indices
        -> (those, feats) if it merges tokens: feats (sum of K, C) for FrozenVLM.prune()
    MERGES          True if it does

or, if it chooses inside it,

    LAYERS          before which layers, counted from 0, of the paper's models
    stages(keep, tokens, depth, layers, ...) -> {layer: rule}, see inside.py
        tokens: visual tokens that enter, of all rows or of each; depth: layers there are

and, where way() below does not fit it,

    way(vlm, seed=0, ...) -> runs.Way

`keep` counts the tokens of a whole picture, that is of all pictures of a row. Methods that go crop
by crop share it out over the views (crops, tiles, frames, pictures of a row). Scores are float32,
of equals the first wins. as_released=True does what the released code does where that differs from
the paper: it may keep another number, and its feats stand in the released order.
"""

import importlib
import pkgutil

import torch
from torch import Tensor

from runs import Way

# ------------------------------------------------------------------------------------ by name


def modules() -> dict:
    """{name: (module, options)} of all baselines, file after file."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for name, options in getattr(module, "NAMES", {}).items():
            found[name] = module, options
    return found


def names() -> list[str]:
    """Of all baselines, sorted by file."""
    return [*modules()]


def kind(name: str) -> str:
    """"before" or "inside" the language model, or "merging"."""
    module, _ = modules()[name]
    if hasattr(module, "stages"):
        return "inside"
    return "merging" if getattr(module, "MERGES", False) else "before"


def way(name: str, vlm, seed: int = 0) -> Way:
    """The baseline of this name on this backbone. seed: of those that draw.

    Raises ValueError if there is none, or, with the reason, if it cannot serve this backbone.
    """
    known = modules()
    if name not in known:
        raise ValueError(f"baseline {name!r}: expected one of {', '.join(known)}")
    module, options = known[name]
    if hasattr(module, "way"):
        return module.way(vlm, seed=seed, **options)
    if hasattr(module, "select"):
        return Way(lambda asked, k: module.select(asked.units, k, seed=seed, **options),
                   needs=module.needs(vlm))
    depth = len(vlm.lm.layers)
    layers = at_depth(module.LAYERS, depth)
    return Way(stages=lambda k, tokens: module.stages(k, tokens, depth, layers, **options))


def at_depth(layers: tuple, depth: int) -> tuple:
    """Layers that a paper names for models of 28 to 32, the same where there are as many; else
    scaled by depth / 32, each at least one above the one before it [ours]."""
    scaled = []
    for still_to_come, i in zip(range(len(layers), 0, -1), layers):
        i = i if depth >= 28 else round(i * depth / 32)
        lowest = scaled[-1] + 1 if scaled else 1
        scaled.append(min(max(i, lowest), depth - still_to_come))
    return tuple(scaled)


# ------------------------------------------------------------------------------------ inside


def check_keep(keep: int, tokens: int | list[int]) -> None:
    """Raises ValueError where K does not fit the visual tokens that enter, of all rows or each."""
    fewest = min(tokens) if isinstance(tokens, list) else tokens
    if not 0 < keep <= fewest:
        raise ValueError(f"keep={keep} does not fit {fewest} visual tokens")


def mean_over_layers(counts: list[int], tokens: int, depth: int, layers: tuple) -> float:
    """Of the visual tokens that enter a layer, where counts are left from each of `layers` on."""
    edges = [0, *layers, depth]
    entering = zip([tokens, *counts], edges, edges[1:])
    return sum(n * (end - start) for n, start, end in entering) / depth


# ------------------------------------------------------------------------------------ before


def pictures(units, keep, *names: str, exact: bool = False):
    """For each picture: here (n,), the units that may be kept; K; and every named reading (n, ...)
    in float32, or in its own type if exact. The reading "feats" is the features.

    keep: K, or one per picture. Raises ValueError on K that does not fit, on a reading that is
    missing, on NaN and inf.
    """
    budgets = [keep] * len(units.grid) if isinstance(keep, int) else keep
    readings = {"feats": units.feats, **units.readings}
    for name in names:
        if name not in readings:
            raise ValueError(f"the units show no {name!r}: encode the batch with the needs(vlm) of "
                             "this method")
        if not readings[name].isfinite().all():
            raise ValueError(f"{name!r} has NaN or infinite values: expected finite ones; try a "
                             "wider dtype")
    rows = [row.nonzero().flatten() for row in units.pad(units.image_of)[1]]
    starts = torch.tensor([0, *units.counts]).cumsum(0).tolist()
    for here, k in zip(rows, budgets):
        if not 0 <= k <= len(here) or isinstance(keep, int) and k == 0:
            raise ValueError(f"keep={k} does not fit {len(here)} visual tokens")
    for here, start, k in zip(rows, starts, budgets):
        values = [readings[name][here + start] for name in names]
        yield here, k, *(x if exact else x.float() for x in values)


def by_view(units, keep: int):
    """The units with every view a picture of its own, and K for each: its share of `keep`, in
    proportion to its tokens. Even, but for padding that is cut off and for pictures of different
    sizes in a row."""
    if units.views is None:
        return units, keep
    for _ in pictures(units, keep):                    # K must fit every picture
        pass
    apart = units.apart()
    room_by_picture = apart.pad(apart.image_of)[1].sum(1).cpu().split(units.views)
    return apart, torch.cat([share_out(keep, room, room) for room in room_by_picture]).tolist()


def share_out(total: int, weight: Tensor, room: Tensor) -> Tensor:
    """(n,) int64 that sum to total, in proportion to weight (n,), none above room (n,) int64.

    Rounded down, the rest goes by ones to the heaviest; what does not fit goes to the others in the
    same way.
    """
    share = torch.zeros_like(room)
    weight = weight.double().cpu()
    while left := total - int(share.sum()):
        free = share < room
        part = torch.where(free, weight, 0.)
        part = part if part.sum() > 0 else free.double()
        more = (left * part / part.sum()).floor().long()
        heaviest = part.masked_fill(~free, -1.).argsort(descending=True, stable=True)
        more[heaviest[:left - int(more.sum())]] += 1
        share = torch.minimum(share + more, room)
    return share


def top(score: Tensor, k: int) -> Tensor:
    """(k,) indices of the largest, the largest first; of equals the first."""
    return score.argsort(descending=True, stable=True)[:k]


def unit_length(x: Tensor) -> Tensor:
    """(n, ...) -> (n, d) of length 1: their products are cosines."""
    return torch.nn.functional.normalize(x.flatten(1), dim=-1)


def with_cls(units, views, rows) -> tuple[list[Tensor], Tensor]:
    """(keep, feats) where the states of [CLS] go first in every view, as some released code does.

    rows: for each view here (n,), index (K - 1,) and feats (K - 1, ...) as released, or None where
    K = 0. [CLS] takes the place of one more unit, the first that is free; the feats stand in the
    released order, which is right if positions are numbered anew.
    """
    keep, feats, start = [], [], 0
    for row, count in zip(rows, views.counts):
        if row is None:
            keep.append(units.image_of[:0])
        else:
            here, index, own = row
            free = here[~torch.isin(here, index)][:1]
            keep.append(torch.cat([index, free]).sort().values)
            state = units.readings["cls state"][start]
            feats += [state.expand(1, *units.feats.shape[1:]), own]
        start += count
    return units.together(keep), torch.cat(feats)
