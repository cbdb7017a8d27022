"""HoloV (NeurIPS 2025, arXiv:2510.02912): K is shared out over stripes of the picture, each keeps
its most attended.

Stripes are P equal runs of the raster, P = 1024 / K for 576 tokens; the weight of one is its mean
attention of [CLS] (attention received where the encoder has no [CLS]). What does not fit into a
stripe goes to the others.

Released code: (1) adds to the attention a term of the tokens' cosines, scaled so that it cancels
out of the weights. (2) P = 16 whatever K is; what does not fit a stripe is filled up with zero
vectors: here it keeps fewer tokens.
"""

import torch
from torch import Tensor

from . import pictures, share_out, top
from .encoder import deepest

NAMES = {"holov": {}}


def needs(vlm) -> dict:
    what = "cls" if vlm.adapter.has_cls else "received"
    return {"attention": (what, deepest(vlm.adapter))}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False,
           stripes: int | None = None) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices, as_released of at most so many.

    stripes: P [1024 / 576 N / K; as_released 16]. All views of a picture are one raster.
    """
    kept = []
    for here, k, attention in pictures(units, keep, "attention"):
        papers = max(1, 16 * len(attention) // (9 * k))
        count = stripes or (16 if as_released else papers)
        kept.append(here[choose(attention, k, count, as_released)])
    return kept


def choose(attention: Tensor, k: int, stripes: int, overflows: bool) -> Tensor:
    """(k,) ascending, from attention (n,); overflows: what does not fit a stripe is lost."""
    parts = attention.tensor_split(min(stripes, len(attention)))  # the first are longer by one
    size = torch.tensor([len(part) for part in parts])
    weight = torch.stack([part.mean() for part in parts]).cpu()
    room = torch.full_like(size, k) if overflows else size
    share = share_out(k, weight, room).tolist()
    starts = [0, *size.cumsum(0).tolist()]
    return torch.cat([start + top(part, n).sort().values
                      for part, n, start in zip(parts, share, starts)])
