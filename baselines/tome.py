"""ToMe (arXiv:2210.09461): tokens merge inside the vision encoder, some in every block, until K are left.

Bipartite soft matching (Section 3) of the keys, mean over heads: tokens alternate between two sets, each of the first
has one partner in the second, the r most similar pairs merge. What proportional attention adds is in common/, which
runs the encoder. A merged token stands at the place of its member that was in the second set all along.

The paper names no r for a fixed K in a language model: N - K is spread evenly over the blocks [ours].
Released code: the same matching; without [CLS] its tokens stay in order of similarity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import pictures


def look(vlm) -> dict:
    """Raises ValueError, with the reason, where tokens cannot be merged inside the vision encoder."""
    if vlm.adapter.unmergeable:
        raise ValueError(f"tome merges inside the vision encoder, but {vlm.adapter.unmergeable}")
    return {}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False, tower: Callable,
           blocks: int) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, C), merged.

    tower: lambda rule: vlm.merged(batch, rule), which runs the encoder once more | blocks: vlm.adapter.deep + 1, that
    the features go through. Raises ValueError if K is too small for so many blocks, on several pictures in a row.
    """
    if units.views is not None:
        raise ValueError("tome merges as many tokens in every picture: expected one picture a row, not several")
    counts = {len(here) for here, _ in pictures(units, keep)}
    merges = schedule(max(counts) + 1, keep + 1, blocks)
    feats, anchor = tower(lambda i, keys: bipartite(keys, merges[i]))
    if not feats.isfinite().all():
        raise ValueError("the merged features have NaN or infinite values: expected finite ones; try a wider dtype")
    return list(anchor), feats.flatten(0, 1)


def schedule(n: int, left: int, blocks: int) -> list[int]:
    """How many of n tokens, [CLS] among them, merge in each block so that `left` are left: evenly if that can be, for
    at most (n - 1) // 2 can at a time; else as few at a time, from the first block on, as reach it."""
    even = [(n - left) * (i + 1) // blocks - (n - left) * i // blocks for i in range(blocks)][::-1]
    for most in range(max(even), n):
        merges, now = [], n
        for r in even if most == max(even) else [most] * blocks:
            merges.append(min(r, (now - 1) // 2, now - left))
            now -= merges[-1]
        if now == left:
            return merges
    raise ValueError(f"keep={left - 1}: {blocks} blocks that halve their tokens at most leave {now - 1} of {n - 1}")


def bipartite(keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """keys (T, n, d) -> stays (T, n - r), into (T, n), as common.Merge has it. Token 0, [CLS], never merges."""
    n, keys = keys.shape[1], torch.nn.functional.normalize(keys.float(), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    gone, first = order[:, :r], order[:, r:].sort(dim=1).values
    second = torch.arange(n // 2, device=keys.device).expand(len(keys), -1)
    into = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    into[:, 1::2] = first.shape[1] + second
    into.scatter_(1, 2 * first, torch.arange(first.shape[1], device=keys.device).expand_as(first))
    into.scatter_(1, 2 * gone, first.shape[1] + partner.gather(1, gone))
    return torch.cat([2 * first, 2 * second + 1], 1), into
