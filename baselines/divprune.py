"""DivPrune (arXiv:2503.02175): the K projected tokens whose smallest mutual distance, 1 - cosine,
is largest.

Greedy max-min: first the token that is furthest from its nearest neighbour, then always the one
furthest from all that are chosen. A running minimum makes a step O(N). All views of a picture
together, and all pictures of a batch step by step together.

Released code: computes in the model's type and does not exclude what is chosen: among near-equal
tokens rounding lets it choose one twice.
"""

import torch
from torch import Tensor

from . import pictures, unit_length
from .greedy import Rows, in_parts

NAMES = {"divprune": {}}


def needs(vlm) -> dict:
    return {"projected": ("projected", 0)}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices, as_released of at most so many."""
    keeps = []
    found = pictures(units, keep, "projected", exact=as_released)
    for here, budgets, x in in_parts(found):
        picked = farthest(*distances(x), max(budgets), repeats=as_released)
        keeps += [own[row[:k]].unique() for own, row, k in zip(here, picked, budgets)]
    return keeps


def distances(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """B of (n, d) -> (B, N, N), 1 - cosine, and where tokens are (B, N) bool. Elsewhere inf."""
    counts = torch.tensor([len(tokens) for tokens in x], device=x[0].device)
    n = max(map(len, x))
    real = torch.arange(n, device=x[0].device) < counts[:, None]
    apart = x[0].new_full((len(x), n, n), torch.inf)
    for own, tokens in zip(apart, x):                  # one product each: padding costs nothing
        tokens = unit_length(tokens)
        own = own[:len(tokens), :len(tokens)]
        torch.mm(tokens, tokens.T, out=own)
        own.neg_().add_(1)
    return apart, real


def loneliest(apart: Tensor, real: Tensor) -> Tensor:
    """(B,), the token furthest from its nearest neighbour, by what distances() gives; overwrites
    the diagonals: a token is not its own neighbour."""
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return apart.amin(1).masked_fill_(~real, -torch.inf).argmax(1)


def farthest(apart: Tensor, real: Tensor, k: int, repeats: bool = False) -> Tensor:
    """(B, k) indices as they are chosen, by what distances() gives; overwrites the diagonals.

    Those behind a picture's last token mean nothing. repeats: what is chosen may be chosen again.
    """
    diagonal = apart.diagonal(dim1=1, dim2=2)
    own = diagonal.clone()
    picked = [loneliest(apart, real)]
    # -inf: what is chosen is never the furthest again
    diagonal.copy_(own if repeats else torch.full_like(own, -torch.inf))
    rows = Rows(apart)
    gap = rows(picked[0]).masked_fill_(~real, -torch.inf)
    while len(picked) < k:
        picked.append(gap.argmax(1))
        torch.minimum(gap, rows(picked[-1]), out=gap)
    return torch.stack(picked, 1)
