"""[CLS] attention, which is FasterVLM (arXiv:2412.01818): the K tokens that the vision encoder's
[CLS] attends to most, mean over heads, in the layer the tokens come from (block 22 of CLIP-L in
LLaVA). Crop by crop.

Released code: the same; it renumbers the positions. Needs an encoder with a [CLS] token.
"""

from torch import Tensor

from . import by_view, pictures, top
from .encoder import deepest

NAMES = {"cls_attention": {}}


def needs(vlm) -> dict:
    """Raises ValueError for an encoder without [CLS]."""
    if not vlm.adapter.has_cls:
        raise ValueError("this vision encoder has no [CLS] token, whose attention is all that "
                         "cls_attention goes by")
    return {"cls": ("cls", deepest(vlm.adapter))}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; neither seed nor as_released
    changes them."""
    views, budgets = by_view(units, keep)
    return units.together([here[top(attention, k)].sort().values
                           for here, k, attention in pictures(views, budgets, "cls")])
