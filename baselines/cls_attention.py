"""[CLS] attention: the K tokens that the vision encoder's [CLS] attends to most, in the layer the tokens come from.

The score behind FasterVLM (arXiv:2412.01818) and many others. Needs an encoder with a [CLS] token.
"""

import torch


def select(units, keep: int, seed: int = 0) -> list[torch.Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; of equals the first wins; seed is not used.

    units: common.Units, whose cls (M,) is the mean attention over heads. Raises ValueError for an encoder without
    [CLS] (Qwen2.5-VL) and where an image has fewer than `keep` units.
    """
    if units.cls is None:
        raise ValueError("this vision encoder has no [CLS] token (Qwen2.5-VL): cls_attention cannot serve it")
    scores, valid = units.pad(units.cls.float())
    if not 0 < keep <= int(valid.sum(1).min()):
        raise ValueError(f"keep={keep} does not fit {int(valid.sum(1).min())} visual tokens")
    order = scores.masked_fill(~valid, -1.).argsort(dim=1, descending=True, stable=True)
    return list(order[:, :keep].sort(dim=1).values)
