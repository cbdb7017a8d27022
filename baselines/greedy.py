"""Greedy picks of many pictures at once, which never wait for the device between two picks.

What is picked stays on the device as (B,) indices, so that a GPU is given all picks at once, and a
pick costs as many launches for eight pictures as for one.
"""

import torch
from torch import Tensor

LIMIT = 2 ** 27              # numbers in all that is read to pick from several pictures [ours]


def in_parts(found):
    """What baselines.pictures() gives, in lists of neighbouring pictures: as many as fit LIMIT with
    their matrices (B, N, N) and vectors (B, N, d), at least one. A list per value: here, K, ..."""
    part, widest = [], 0
    for item in found:
        n, width = item[2].shape
        widest = max(widest, n)
        if part and (len(part) + 1) * widest * (widest + width) > LIMIT:
            yield [list(values) for values in zip(*part)]
            part, widest = [], n
        part.append(item)
    if part:
        yield [list(values) for values in zip(*part)]


class Rows:
    """Rows of (B, N, N) matrices, one of each: rows(picked (B,)) -> a new (B, N)."""

    def __init__(self, matrices: Tensor):
        count, n = matrices.shape[:2]
        self.flat = matrices.flatten(0, 1)
        self.first = torch.arange(0, count * n, n, device=matrices.device)
        self.several = count > 1

    def __call__(self, picked: Tensor) -> Tensor:
        return self.flat.index_select(0, picked + self.first if self.several else picked)
