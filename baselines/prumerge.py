"""LLaVA-PruMerge and PruMerge+ (arXiv:2403.15388): important tokens, each with what its 32 most
similar tokens carry.

a: attention of [CLS] in the encoder's last block (above the one that the features leave), heads not
split. A kept token is x_i + sum of a_j x_j over the 32 others of the most similar key; one more
token is the sum of a_j x_j over all that are not kept, at the place of the most attended of them
[ours]. Without [CLS]: mean over all queries. Crop by crop. PruMerge keeps the K - 1 most attended
and that one; + keeps K / 4, K - 1 filled up evenly in space [ours: the papers' tables have no fixed
K]. adaptive=True: as many as stand out, a > Q3 + 1.5 IQR, and about three times more in +.

Released code: Q3 and IQR are of the whole batch, so that a picture's K depends on the others. +
never takes the last token and divides by zero where nothing stands out. The kept are ordered by a:
as_released orders feats so.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top, unit_length

NAMES = {"prumerge": {}, "prumerge+": {"plus": True}}
MERGES = True


def needs(vlm) -> dict:
    last = vlm.adapter.whole[-1]
    what = "cls wide" if vlm.adapter.has_cls else "received wide"
    return {"attention wide": (what, last), "keys wide": ("keys wide", last)}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False, plus: bool = False,
           adaptive: bool = False) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, ...), merged.

    adaptive, as_released: keep is not used, K comes from the attention, the one more token
    included. Raises ValueError where nothing stands out in plus.
    """
    finds_k = adaptive or as_released
    views, budgets = (units.apart(), 1) if finds_k else by_view(units, keep)
    rows = list(pictures(views, budgets, "attention wide", "keys wide"))
    own_type = pictures(views, budgets, "feats", exact=True)
    everywhere = share(torch.cat([a for _, _, a, _ in rows]))
    indices, merged = [], []
    for (here, k, a, keys), (_, _, x) in zip(rows, own_type):
        if k == 0:
            indices.append(here[:0])
            merged.append(x[:0])
            continue
        if finds_k:
            kept = standing_out(a, everywhere if as_released else share(a), plus)
        elif plus:
            kept = top_and_even(a, k)
        else:
            kept = top(a, k - 1)
        if finds_k or k < len(a):
            index, feats = merge(x, a, keys, kept)
        else:
            index, feats = torch.arange(k, device=x.device), x
        order = index.argsort()
        indices.append(here[index[order]])
        merged.append(feats if as_released else feats[order])
    return units.together(indices), torch.cat(merged)


def top_and_even(a: Tensor, k: int) -> Tensor:
    """(k - 1,) of the tokens: the k // 4 most attended, the others evenly from the rest."""
    kept = top(a, k // 4)
    every = torch.arange(len(a), device=a.device)
    rest = every[~torch.isin(every, kept)]
    more = k - 1 - len(kept)
    step = torch.arange(more, device=a.device) * len(rest) // max(more, 1)
    return torch.cat([kept, rest[step]])


def share(a: Tensor) -> float:
    """Share of the values of a (n,) above Q3 + 1.5 IQR."""
    low = a.quantile(.25)
    high = a.quantile(.75)
    return float((a > high + 1.5 * (high - low)).double().mean())


def standing_out(a: Tensor, rho: float, plus: bool) -> Tensor:
    """(K - 1,) of the tokens: the int(n rho) most attended, then, in plus, every int(step / 3)-th,
    step = int(1 / rho)."""
    kept = top(a, min(int(len(a) * rho + 1e-9), len(a) - 1))
    if not plus:
        return kept
    if rho == 0:
        raise ValueError("no token's attention stands out: prumerge+ has nothing to set its "
                         "spacing by")
    step = max(int(int(1 / rho) / 3), 1)
    spaced = torch.arange(0, len(a) - 1, step, device=a.device)
    return torch.cat([kept, spaced[~torch.isin(spaced, kept)]])


def merge(x: Tensor, a: Tensor, keys: Tensor, kept: Tensor,
          near: int = 32) -> tuple[Tensor, Tensor]:
    """index (K,) and feats (K, ...): x (n, ...) with weights a (n,) and keys (n, d); the last is
    the one more token."""
    n = len(x)
    flat = x.flatten(1).float()
    keys = unit_length(keys)
    cosine = keys[kept] @ keys.T
    cosine[torch.arange(len(kept)), kept] = -torch.inf
    most_similar = cosine.topk(min(near, n - 1), dim=1).indices        # (K - 1, 32)
    weight = torch.zeros_like(cosine).scatter(1, most_similar, a[most_similar])
    rest = torch.ones(n, device=x.device).index_fill(0, kept, 0.)
    # the one more token's place; none if all are kept
    place = a.masked_fill(rest == 0, -1.).argmax()[None][:n - len(kept)]
    one_more = ((a * rest) @ flat)[None][:len(place)]
    feats = torch.cat([flat[kept] + weight @ flat, one_more])
    return torch.cat([kept, place]), feats.to(x).view(-1, *x.shape[1:])
