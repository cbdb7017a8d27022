"""Training-free rivals, one file each, from the papers' formulas. Those that choose before the language model:

    look(vlm)                         what encode(batch, look) must show the method; ValueError if this encoder cannot
    select(units, keep, *, seed=0, as_released=False, ...)
        -> B ascending int64 tensors of exactly `keep` unit indices
        -> (those, feats) from methods that merge tokens: feats (sum of K, C) for FrozenVLM.prune()

`keep` counts the tokens of a whole picture, that is of all pictures of a row. Methods that go crop by crop share it out
over the views (crops, tiles, frames, pictures of a row). Scores are float32, of equals the first wins.
as_released=True does what the released code does where that differs from the paper: it may keep another number, and
its feats stand in the released order.
"""

import torch
from torch import Tensor


def check_keep(keep: int, tokens: int | list[int]) -> None:
    """Raises ValueError where K does not fit the visual tokens that enter, of all rows or of each."""
    fewest = min(tokens) if isinstance(tokens, list) else tokens
    if not 0 < keep <= fewest:
        raise ValueError(f"keep={keep} does not fit {fewest} visual tokens")


def pictures(units, keep, *names: str, exact: bool = False):
    """For each picture: here (n,) the units that may be kept, K, and of every named thing seen (n, ...) in float32,
    or in its own type if exact; "feats" are the features.

    keep: K, or one per picture. Raises ValueError on K that does not fit, on what was not looked at, on NaN and inf.
    """
    budgets = [keep] * len(units.grid) if isinstance(keep, int) else keep
    seen = {"feats": units.feats, **units.seen}
    if missing := [name for name in names if name not in seen]:
        raise ValueError(f"the units show no {missing[0]!r}: encode the batch with the look(vlm) of this method")
    for name in names:
        if not seen[name].isfinite().all():
            raise ValueError(f"{name!r} has NaN or infinite values: expected finite ones; try a wider dtype")
    here = [row.nonzero().flatten() for row in units.pad(units.image_of)[1]]
    starts = torch.tensor([0, *units.counts]).cumsum(0).tolist()
    for row, k in zip(here, budgets):
        if not 0 <= k <= len(row) or isinstance(keep, int) and k == 0:
            raise ValueError(f"keep={k} does not fit {len(row)} visual tokens")
    for row, start, k in zip(here, starts, budgets):
        found = [seen[name][row + start] for name in names]
        yield row, k, *(x if exact else x.float() for x in found)


def by_view(units, keep: int):
    """The units with every view a picture of its own, and K for each: its share of `keep`, in proportion to its tokens;
    even, but for padding that is cut off and for pictures of different sizes in a row."""
    if units.views is None:
        return units, keep
    for _ in pictures(units, keep):                    # K must fit every picture
        pass
    apart = units.apart()
    rooms = apart.pad(apart.image_of)[1].sum(1).cpu().split(units.views)
    return apart, torch.cat([share_out(keep, room, room) for room in rooms]).tolist()


def share_out(total: int, weight: Tensor, room: Tensor) -> Tensor:
    """(n,) int64 that sum to total, in proportion to weight (n,), none above room (n,) int64: rounded down, the rest
    goes by ones to the heaviest; what does not fit goes to the others in the same way."""
    got, weight = torch.zeros_like(room), weight.double().cpu()
    while left := total - int(got.sum()):
        free = got < room
        share = torch.where(free, weight, 0.)
        share = share if share.sum() > 0 else free.double()
        more = (left * share / share.sum()).floor().long()
        more[share.masked_fill(~free, -1.).argsort(descending=True, stable=True)[:left - int(more.sum())]] += 1
        got = torch.minimum(got + more, room)
    return got


def top(score: Tensor, k: int) -> Tensor:
    """(k,) indices of the largest, the largest first; of equals the first."""
    return score.argsort(descending=True, stable=True)[:k]


def with_cls(units, views, rows) -> tuple[list[Tensor], Tensor]:
    """(keep, feats) where the states of [CLS] go first in every view. rows: for each view here (n,), index (K - 1,) and
    feats (K - 1, ...) as released, or None where K = 0. [CLS] takes the place of one more unit, the first that is
    free; the feats stand in the released order, which is right if positions are numbered anew.
    """
    keep, feats, start = [], [], 0
    for row, count in zip(rows, views.counts):
        if row is None:
            keep.append(units.image_of[:0])
        else:
            here, index, own = row
            free = here[~torch.isin(here, index)][:1]
            keep.append(torch.cat([index, free]).sort().values)
            state = units.seen["cls state"][start]
            feats += [state.expand(1, *units.feats.shape[1:]), own]
        start += count
    return units.together(keep), torch.cat(feats)


def unit_length(x: Tensor) -> Tensor:
    """(n, ...) -> (n, d) of length 1: their products are cosines."""
    return torch.nn.functional.normalize(x.flatten(1), dim=-1)
