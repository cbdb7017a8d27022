"""VisionZip (arXiv:2412.04467): dominant tokens, the most attended by [CLS], and contextual ones, the rest merged.

Of K, 5 / 32 are contextual (192 = 162 + 30): every step-th of the rest is a target, all others join the target of the
most similar key (mean over heads); a contextual token is the mean of those it took in, at its target's place. Crop by
crop. Without [CLS]: attention received. Units of several patches are merged patch by patch [ours], before the
projector.

Released code: (1) a contextual token is the target PLUS the mean of what joined it, about twice as long. (2) [CLS] is
one of the dominant tokens and goes to the language model; contextual tokens stand at the end.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top, unit_length, with_cls


def look(vlm) -> dict:
    adapter = vlm.adapter
    found = {"attention": ("cls" if adapter.has_cls else "received", adapter.deep), "keys": ("keys", adapter.deep)}
    return found | ({"cls state": ("cls state", 0)} if adapter.has_cls else {})


def select(units, keep: int, *, seed: int = 0, as_released: bool = False) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, ...), merged."""
    if as_released and "cls state" not in units.seen:
        raise ValueError("the released code of visionzip feeds [CLS] to the language model: this encoder has none")
    views, budgets = by_view(units, keep)
    rows, values = pictures(views, budgets, "attention", "keys"), pictures(views, budgets, "feats", exact=True)
    out = []
    for (here, k, a, keys), (_, _, x) in zip(rows, values):
        extra = round(k * 5 / 32)
        main = top(a, k - extra - as_released).sort().values if k else here[:0]
        target, feats = merge(x, keys, main, extra, plus=as_released)
        index, feats = torch.cat([main, target]), torch.cat([x[main], feats])
        if not as_released:
            index, order = index.sort()
            feats = feats[order]
        out.append((here, here[index], feats) if k else None)
    if as_released:
        return with_cls(units, views, out)
    return (units.together([here[:0] if row is None else row[1] for row in out]),
            torch.cat([row[2] for row in out if row]))


def merge(x: Tensor, keys: Tensor, main: Tensor, extra: int, plus: bool) -> tuple[Tensor, Tensor]:
    """target (extra,) and feats (extra, ...): tokens x (n, ...) that are not in main, merged by keys (n, d).

    plus: the target and the mean of the others are added up, instead of the mean of all.
    """
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, main, False).nonzero().flatten()
    if not extra:
        return rest[:0], x[:0]
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=x.device)
    is_target[::max(1, len(rest) // extra)][:extra] = True
    target, others, keys = rest[is_target], rest[~is_target], unit_length(keys)
    joined = torch.nn.functional.one_hot((keys[others] @ keys[target].T).argmax(1), extra).T.to(x)     # (extra, others)
    own, total = x[target].flatten(1), joined @ x[others].flatten(1)
    count = joined.sum(1, keepdim=True)
    feats = own + total / count.clamp(min=1) if plus else (own + total) / (1 + count)
    return target, feats.view(-1, *x.shape[1:])
