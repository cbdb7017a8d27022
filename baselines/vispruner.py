"""VisPruner (Zhang et al., ICCV 2025, arXiv:2412.01818, FasterVLM's successor): half of K are
important, half are unlike one another.

The important ones have most attention of [CLS], mean over heads, in the layer the tokens come from.
The rest, by falling attention, is thinned in rounds: of two sets, every other token each, the 8 of
the first that are most like any of the second go, by cosine of the features; what stays of the
first, the most alike in front, and then the second are the rest of the next round. Crop by crop.
Without [CLS] [ours]: attention received.

Released code: the same, int(K / 2) important ones, for an even rest alone; here the first set may
be one longer [ours]. It numbers positions anew.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top, unit_length
from .encoder import deepest

NAMES = {"vispruner": {}}
AT_A_TIME = 8                                          # [released] that a round removes


def needs(vlm) -> dict:
    adapter = vlm.adapter
    return {"attention": ("cls" if adapter.has_cls else "received", deepest(adapter))}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False,
           ratio: float = .5) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; neither seed nor as_released
    changes them.

    ratio: of the important ones [released].
    """
    views, budgets = by_view(units, keep)
    return units.together([here[choose(x, attention, k, int(k * ratio))].sort().values
                           for here, k, x, attention in pictures(views, budgets, "feats",
                                                                 "attention")])


def choose(x: Tensor, attention: Tensor, k: int, important: int) -> Tensor:
    """(k,) from x (n, ...) and attention (n,): the important ones by rank, then the others."""
    order = top(attention, len(x))
    rest = order[important:]
    diverse = k - important
    cosine = unit_length(x) @ unit_length(x).T
    while diverse and len(rest) > diverse:
        first, second = rest[::2], rest[1::2]
        likeness = cosine[first[:, None], second].amax(1)
        gone = min(AT_A_TIME, len(rest) - diverse, len(first))
        rest = torch.cat([first[top(likeness, len(first))[gone:]], second])
    return torch.cat([order[:important], rest[:diverse]])
