"""LLaVA-PruMerge and PruMerge+ (arXiv:2403.15388): important tokens, each with what its 32 most similar tokens carry.

a: attention of [CLS] in the encoder's last block (above the one that the features leave), heads not split. A kept token
is x_i + sum of a_j x_j over the 32 others of the most similar key; one more token is the sum of a_j x_j over all that
are not kept, at the place of the most attended of them [ours]. Without [CLS]: mean over all queries. Crop by crop.
PruMerge keeps the K - 1 most attended and that one; + keeps K / 4, K - 1 filled up evenly in space [ours: the papers'
tables have no fixed K]. adaptive=True: as many as stand out, a > Q3 + 1.5 IQR, and about three times more in +.

Released code: Q3 and IQR are of the whole batch, so that a picture's K depends on the others. + never takes the last
token and divides by zero where nothing stands out. The kept are ordered by a: as_released orders feats so.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top, unit_length


def look(vlm) -> dict:
    last = vlm.adapter.whole[-1]
    return {"attention wide": ("cls wide" if vlm.adapter.has_cls else "received wide", last),
            "keys wide": ("keys wide", last)}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False, plus: bool = False,
           adaptive: bool = False) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, ...), merged.

    adaptive, as_released: keep is not used, K comes from the attention, the one more token included. Raises ValueError
    where nothing stands out in plus.
    """
    free = adaptive or as_released
    views, budgets = (units.apart(), 1) if free else by_view(units, keep)
    rows = list(pictures(views, budgets, "attention wide", "keys wide"))
    values, out = pictures(views, budgets, "feats", exact=True), []
    everywhere = share(torch.cat([a for _, _, a, _ in rows]))
    for (here, k, a, keys), (_, _, x) in zip(rows, values):
        if k == 0:
            out.append((here[:0], x[:0]))
            continue
        if free:
            kept = standing_out(a, everywhere if as_released else share(a), plus)
        elif plus:
            kept = top(a, k // 4)
            rest = torch.arange(len(a), device=a.device)[~torch.isin(torch.arange(len(a), device=a.device), kept)]
            more = k - 1 - len(kept)
            kept = torch.cat([kept, rest[torch.arange(more, device=a.device) * len(rest) // max(more, 1)]])
        else:
            kept = top(a, k - 1)
        index, feats = merge(x, a, keys, kept) if free or k < len(a) else (torch.arange(k, device=x.device), x)
        order = index.argsort()
        out.append((here[index[order]], feats if as_released else feats[order]))
    return units.together([index for index, _ in out]), torch.cat([feats for _, feats in out])


def share(a: Tensor) -> float:
    """Share of the values of a (n,) above Q3 + 1.5 IQR."""
    low, high = a.quantile(.25), a.quantile(.75)
    return float((a > high + 1.5 * (high - low)).double().mean())


def standing_out(a: Tensor, rho: float, plus: bool) -> Tensor:
    """(K - 1,) of the tokens: the int(n rho) most attended, then, in plus, every int(step / 3)-th, step = int(1 / rho).
    """
    kept = top(a, min(int(len(a) * rho + 1e-9), len(a) - 1))
    if not plus:
        return kept
    if rho == 0:
        raise ValueError("no token's attention stands out: prumerge+ has nothing to set its spacing by")
    spaced = torch.arange(0, len(a) - 1, max(int(int(1 / rho) / 3), 1), device=a.device)
    return torch.cat([kept, spaced[~torch.isin(spaced, kept)]])


def merge(x: Tensor, a: Tensor, keys: Tensor, kept: Tensor, near: int = 32) -> tuple[Tensor, Tensor]:
    """index (K,) and feats (K, ...): x (n, ...) with weights a (n,) and keys (n, d); the last is the one more token."""
    n, flat, keys = len(x), x.flatten(1).float(), unit_length(keys)
    cosine = keys[kept] @ keys.T
    cosine[torch.arange(len(kept)), kept] = -torch.inf
    most = cosine.topk(min(near, n - 1), dim=1).indices                                  # (K - 1, 32)
    weight = torch.zeros_like(cosine).scatter(1, most, a[most])
    rest = torch.ones(n, device=x.device).index_fill(0, kept, 0.)
    place = a.masked_fill(rest == 0, -1.).argmax()[None][:n - len(kept)]           # none if all are kept
    feats = torch.cat([flat[kept] + weight @ flat, ((a * rest) @ flat)[None][:len(place)]])
    return torch.cat([kept, place]), feats.to(x).view(-1, *x.shape[1:])
