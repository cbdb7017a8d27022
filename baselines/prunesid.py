"""PruneSID (ICLR 2026): tokens in groups by principal component, the like-looking suppressed within
each group.

1. Columns of sigmoid(features), one a token, have K / 4 principal directions; a token belongs to
the one with its largest loading. 2. In each group, by falling attention of [CLS], a token
suppresses those whose cosine to it exceeds tau = K / 32 times the mean cosine (18 K / N, the same
at 576 tokens). 3. K is shared out by numbers of survivors. Crop by crop. Without [CLS]: projected
features, and the loading in place of the attention.

Released code: (1) a randomised decomposition without a seed; here it is exact. (2) [CLS] is one of
the K tokens that the language model reads: components, threshold (K / 32 whatever N is) and bounds
go by K, K - 1 are shared out; the groups come one behind another, not sorted. (3) Its code for
Qwen, without [CLS], keeps at least 16, or all of fewer; its 18 K / N is at least 1, and its mean
cosine is over all N^2 entries of a triangle, zeros included, about half of what is meant.
as_released gives all of it, seeded; with [CLS] as feats, without in ascending order.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top, unit_length, with_cls
from .encoder import deepest

NAMES = {"prunesid": {}}


def needs(vlm) -> dict:
    if not vlm.adapter.has_cls:
        return {"projected": ("projected", 0)}
    return {"attention": ("cls", deepest(vlm.adapter)), "cls state": ("cls state", 0)}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False):
    """B ascending int64 tensors of exactly `keep` unit indices; as_released, where the encoder has
    [CLS], those and feats, [CLS] first, and where it has none at least 16 a view."""
    views, budgets = by_view(units, keep)
    seed = seed if as_released else None
    if "attention" not in units.readings:
        return units.together([here[choose(x, k, None, seed)].sort().values
                               for here, k, x in pictures(views, budgets, "projected")])
    rows = list(pictures(views, budgets, "feats", "attention"))
    if not as_released:
        return units.together([here[choose(x, k, attention)].sort().values
                               for here, k, x, attention in rows])
    picks = [choose(x, k, attention, seed) if k else None for _, k, x, attention in rows]
    own_type = pictures(views, budgets, "feats", exact=True)
    return with_cls(units, views, [None if index is None else (here, here[index], x[index])
                                   for index, (here, _, x) in zip(picks, own_type)])


def choose(x: Tensor, k: int, attention: Tensor | None, seed: int | None = None) -> Tensor:
    """(k,) group by group, from x (n, ...) and attention (n,), None to go by the loading.

    seed: as released, which is (k - 1,) beside [CLS], or without attention at least 16, see above.
    """
    n = len(x)
    as_released, has_cls = seed is not None, attention is not None
    if k and as_released and not has_cls:
        k = min(max(k, 16), n)
    wanted = k - (as_released and has_cls)
    if wanted in (0, n):
        return torch.arange(wanted, device=x.device)
    cosine = unit_length(x) @ unit_length(x).T
    directions = min(max(k // 4, 1), n)
    loading, group = components(x.flatten(1), directions, seed).abs().max(1)
    order = top(attention if has_cls else loading, n).cpu()
    is_like = cosine > threshold(cosine, k, has_cls, as_released)
    suppresses = (is_like & (group[:, None] == group)).cpu().numpy()
    group = group.cpu()
    alive = torch.ones(n, dtype=torch.bool).numpy()
    for i in order.tolist():
        if alive[i]:
            alive &= ~suppresses[i]
            alive[i] = True
    alive = torch.from_numpy(alive)
    order = torch.cat([order[alive[order]], order[~alive[order]]])     # survivors come first
    names, size = group.unique(return_counts=True)
    survivors = torch.stack([(group[alive] == name).sum() for name in names])
    share = allot(k, size, survivors, wanted)
    best = [order[group[order] == name][:count] for name, count in zip(names, share)]
    return torch.cat(best).to(x.device)


def threshold(cosine: Tensor, k: int, has_cls: bool = True, as_released: bool = False) -> Tensor:
    """The cosine (n, n) above which a token suppresses another."""
    n = len(cosine)
    mean = (cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1))
    if not as_released:
        return 18 * k / n * mean
    return k / 32 * mean if has_cls else max(18 * k / n, 1) * cosine.triu().mean()


def components(x: Tensor, q: int, seed: int | None) -> Tensor:
    """(n, q) loadings of the n columns of sigmoid(x).T on their first q principal directions, exact
    without a seed."""
    y = x.sigmoid().T
    if seed is None:
        y = (y - y.mean(0)).double()
        return torch.linalg.eigh(y.T @ y).eigenvectors[:, -q:].flip(1).to(x.dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.pca_lowrank(y, q=min(q, *y.shape))[2]


def allot(k: int, size: Tensor, survivors: Tensor, wanted: int | None = None) -> Tensor:
    """(G,) int64 that sum to `wanted`, by default k: at least one a group, at most 5 for each 64 of
    k, but more where k takes more."""
    wanted = k if wanted is None else wanted
    most = torch.minimum(torch.minimum(size, survivors), torch.tensor(5 * -(-k // 64)))
    while most.sum() < k:
        most = torch.minimum(most + 1, size)
    ends = ((survivors / survivors.sum()).cumsum(0) * (wanted - len(size))).round().long()
    steps = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    share = torch.minimum(1 + steps, most)
    for g in top(survivors, len(size)).tolist():
        share[g] += min(wanted - int(share.sum()), int(most[g] - share[g]))
    return share
