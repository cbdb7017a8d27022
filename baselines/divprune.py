"""DivPrune (arXiv:2503.02175): the K projected tokens whose smallest mutual distance, 1 - cosine, is largest.

Greedy max-min: first the token that is furthest from its nearest neighbour, then always the one furthest from all that
are chosen. A running minimum makes a step O(N). All views of a picture together.

Released code: computes in the model's type and does not exclude what is chosen: among near-equal tokens rounding lets
it choose one twice. `python -m baselines.divprune` times this loop against the naive one, which asks all chosen anew.
"""

import time

import torch
from torch import Tensor

from . import pictures, unit_length


def look(vlm) -> dict:
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
    """The token furthest from its nearest neighbour. Writes inf into the diagonal: a token is not its own neighbour."""
    return int(apart.fill_diagonal_(torch.inf).amin(0).argmax())


def farthest(apart: Tensor, k: int, repeats: bool = False) -> Tensor:
    """(k,) indices as they are chosen, by distances apart (n, n), whose diagonal it overwrites; repeats: what is chosen
    may be chosen again."""
    own = apart.diagonal().clone()
    chosen = [loneliest(apart)]
    apart.diagonal().copy_(own if repeats else torch.full_like(own, -torch.inf))      # -inf: never the furthest again
    gap = apart[chosen[0]].clone()
    while len(chosen) < k:
        chosen.append(int(gap.argmax()))
        torch.minimum(gap, apart[chosen[-1]], out=gap)
    return torch.tensor(chosen, device=apart.device)


def naive(apart: Tensor, k: int) -> Tensor:
    """The same choice, but every step takes the minimum over all that are chosen."""
    chosen = [loneliest(apart)]
    while len(chosen) < k:
        gap = apart.index_select(0, torch.tensor(chosen, device=apart.device)).amin(0)
        gap[chosen] = -torch.inf
        chosen.append(int(gap.argmax()))
    return torch.tensor(chosen, device=apart.device)


def benchmark(n: int = 2880, k: int = 320, d: int = 4096, repeats: int = 5) -> None:
    """Prints the best times of both loops, and of the distances that both need, on the CPU."""
    x, spent = torch.randn(n, d, generator=torch.Generator().manual_seed(0)), {}
    apart = distances(x)
    assert torch.equal(farthest(apart, k), naive(apart, k))
    for name, run in (("distances", lambda: distances(x)), ("first token", lambda: loneliest(apart)),
                      ("running minimum", lambda: farthest(apart, k)), ("naive loop", lambda: naive(apart, k))):
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            spent[name] = min(spent.get(name, torch.inf), time.perf_counter() - start)
    for name in ("running minimum", "naive loop"):
        spent[name] -= spent["first token"]
    print(f"N={n}, K={k}, D={d}: " + ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in spent.items())
          + f": {spent['naive loop'] / spent['running minimum']:.0f} times faster")


if __name__ == "__main__":
    benchmark()
