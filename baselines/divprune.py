"""DivPrune (arXiv:2503.02175): the K projected tokens whose smallest mutual distance, 1 - cosine,
is largest.

Greedy max-min: first the token that is furthest from its nearest neighbour, then always the one
furthest from all that are chosen. A running minimum makes a step O(N). All views of a picture
together.

Released code: computes in the model's type and does not exclude what is chosen: among near-equal
tokens rounding lets it choose one twice.
"""

import torch
from torch import Tensor

from . import pictures, unit_length

NAMES = {"divprune": {}}


def needs(vlm) -> dict:
    return {"projected": ("projected", 0)}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices, as_released of at most so many."""
    return [here[farthest(distances(x), k, repeats=as_released)].unique()
            for here, k, x in pictures(units, keep, "projected", exact=as_released)]


def distances(x: Tensor) -> Tensor:
    """(n, d) -> (n, n), 1 - cosine."""
    x = unit_length(x)
    return 1 - x @ x.T


def loneliest(apart: Tensor) -> int:
    """The token furthest from its nearest neighbour, by distances apart (n, n), whose diagonal it
    overwrites: a token is not its own neighbour."""
    return int(apart.fill_diagonal_(torch.inf).amin(0).argmax())


def farthest(apart: Tensor, k: int, repeats: bool = False) -> Tensor:
    """(k,) indices as they are chosen, by distances apart (n, n), whose diagonal it overwrites.

    repeats: what is chosen may be chosen again.
    """
    own = apart.diagonal().clone()
    chosen = [loneliest(apart)]
    # -inf: what is chosen is never the furthest again
    apart.diagonal().copy_(own if repeats else torch.full_like(own, -torch.inf))
    gap = apart[chosen[0]].clone()
    while len(chosen) < k:
        chosen.append(int(gap.argmax()))
        torch.minimum(gap, apart[chosen[-1]], out=gap)
    return torch.tensor(chosen, device=apart.device)
