"""VisionZip (arXiv:2412.04467): dominant tokens, the most attended by [CLS], and contextual ones,
the rest merged.

Of K, 5 / 32 are contextual (192 = 162 + 30): every step-th of the rest is a target, all others join
the target of the most similar key (mean over heads); a contextual token is the mean of those it
took in, at its target's place. Crop by crop. Without [CLS]: attention received. Units of several
patches are merged patch by patch [ours], before the projector.

Released code: (1) a contextual token is the target PLUS the mean of what joined it, about twice as
long. (2) [CLS] is one of the dominant tokens and goes to the language model; contextual tokens
stand at the end.
"""

import torch
from torch import Tensor

from . import by_view, pictures, top, unit_length, with_cls
from .encoder import deepest

NAMES = {"visionzip": {}}
MERGES = True


def needs(vlm) -> dict:
    adapter = vlm.adapter
    deep = deepest(adapter)
    if not adapter.has_cls:
        return {"attention": ("received", deep), "keys": ("keys", deep)}
    return {"attention": ("cls", deep), "keys": ("keys", deep), "cls state": ("cls state", 0)}


def select(units, keep: int, *, seed: int = 0,
           as_released: bool = False) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, C),
    merged."""
    if as_released and "cls state" not in units.readings:
        raise ValueError("the released code of visionzip feeds [CLS] to the language model: this "
                         "encoder has none")
    views, budgets = by_view(units, keep)
    rows = pictures(views, budgets, "attention", "keys")
    own_type = pictures(views, budgets, "feats", exact=True)
    chosen = []
    for (here, k, attention, keys), (_, _, x) in zip(rows, own_type):
        contextual = round(k * 5 / 32)
        dominant = k - contextual - as_released        # [CLS] is one of them
        main = top(attention, dominant).sort().values if k else here[:0]
        target, feats = merge(x, keys, main, contextual, plus=as_released)
        index = torch.cat([main, target])
        feats = torch.cat([x[main], feats])
        if not as_released:
            index, order = index.sort()
            feats = feats[order]
        chosen.append((here, here[index], feats) if k else None)
    if as_released:
        return with_cls(units, views, chosen)
    none = units.image_of[:0]
    return (units.together([none if row is None else row[1] for row in chosen]),
            torch.cat([row[2] for row in chosen if row]))


def merge(x: Tensor, keys: Tensor, main: Tensor, extra: int, plus: bool) -> tuple[Tensor, Tensor]:
    """target (extra,) and feats (extra, ...): tokens x (n, ...) that are not in main, merged by
    keys (n, d).

    plus: the target and the mean of the others are added up, instead of the mean of all.
    """
    is_rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, main, False)
    rest = is_rest.nonzero().flatten()
    if not extra:
        return rest[:0], x[:0]
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=x.device)
    is_target[::max(1, len(rest) // extra)][:extra] = True
    target = rest[is_target]
    others = rest[~is_target]
    keys = unit_length(keys)
    nearest = (keys[others] @ keys[target].T).argmax(1)
    joined = torch.nn.functional.one_hot(nearest, extra).T.to(x)       # (extra, others)
    own = x[target].flatten(1)
    total = joined @ x[others].flatten(1)
    count = joined.sum(1, keepdim=True)
    feats = own + total / count.clamp(min=1) if plus else (own + total) / (1 + count)
    return target, feats.view(-1, *x.shape[1:])
