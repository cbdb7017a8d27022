"""ToMe (arXiv:2210.09461): tokens merge inside the vision encoder, some in every block, until K are
left.

Bipartite soft matching (Section 3) of the keys, mean over heads: tokens alternate between two sets,
each of the first has one partner in the second, the r most similar pairs merge. A merged token is
the mean of its patches; to attention it counts as many times as it has patches (Section 3.3). It
stands at the place of its member that was in the second set all along.

The paper names no r for a fixed K in a language model: N - K is spread evenly over the blocks
[ours]. Released code: the same matching; without [CLS] its tokens stay in order of similarity.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Adapter, LlavaAdapter
from runs import Way

from . import pictures
from .encoder import deepest

NAMES = {"tome": {}}
MERGES = True

# Says which tokens of the encoder's block i become one: i and its keys, mean over heads, (T, n, d)
# -> stays (T, n'), the tokens that go on, in their new order, and into (T, n), for every token its
# place in that order.
Merge = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def needs(vlm) -> dict:
    """Raises ValueError, with the reason, where tokens cannot be merged inside the encoder."""
    if reason := why_not(vlm.adapter):
        raise ValueError(f"tome merges inside the vision encoder, but {reason}")
    return {}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False, tower: Callable,
           blocks: int) -> tuple[list[Tensor], Tensor]:
    """keep, B ascending int64 tensors of exactly K unit indices, and feats (sum of K, C), merged.

    tower: lambda rule: merged(vlm, batch, rule), which runs the encoder once more. blocks: that the
    features go through. Raises ValueError if K is too small for so many blocks, on several pictures
    in a row.
    """
    if units.views is not None:
        raise ValueError("tome merges as many tokens in every picture: expected one picture a row, "
                         "not several")
    counts = {len(here) for here, _ in pictures(units, keep)}
    merges = schedule(max(counts) + 1, keep + 1, blocks)
    feats, anchor = tower(lambda i, keys: bipartite(keys, merges[i]))
    if not feats.isfinite().all():
        raise ValueError("the merged features have NaN or infinite values: expected finite ones; "
                         "try a wider dtype")
    return list(anchor), feats.flatten(0, 1)


def way(vlm, seed: int = 0) -> Way:
    """It encodes asked.pixels, the pictures of asked.units, once more for every K."""
    blocks = deepest(vlm.adapter) + 1

    def choose(asked, k):
        return select(asked.units, k, tower=lambda rule: merged(vlm, asked.pixels, rule),
                      blocks=blocks)
    return Way(choose, needs=needs(vlm))


def schedule(n: int, left: int, blocks: int) -> list[int]:
    """How many of n tokens, [CLS] among them, merge in each block so that `left` are left.

    Evenly if that can be, for at most (n - 1) // 2 can at a time; else as few at a time, from the
    first block on, as reach it.
    """
    edges = [(n - left) * i // blocks for i in range(blocks + 1)]
    even = [end - start for start, end in zip(edges, edges[1:])][::-1]
    for most in range(max(even), n):
        merges, now = [], n
        for r in even if most == max(even) else [most] * blocks:
            merges.append(min(r, (now - 1) // 2, now - left))
            now -= merges[-1]
        if now == left:
            return merges
    raise ValueError(f"keep={left - 1}: {blocks} blocks that halve their tokens at most leave "
                     f"{now - 1} of {n - 1}")


def bipartite(keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """keys (T, n, d) -> stays (T, n - r), into (T, n), as Merge has it. Token 0, [CLS], never
    merges."""
    n = keys.shape[1]
    keys = F.normalize(keys.float(), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(dim=1, descending=True, stable=True)
    gone = order[:, :r]                                # of the first set
    first = order[:, r:].sort(dim=1).values
    second = torch.arange(n // 2, device=keys.device).expand(len(keys), -1)
    into = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    into[:, 1::2] = first.shape[1] + second
    into.scatter_(1, 2 * first, torch.arange(first.shape[1], device=keys.device).expand_as(first))
    into.scatter_(1, 2 * gone, first.shape[1] + partner.gather(1, gone))
    return torch.cat([2 * first, 2 * second + 1], 1), into


# ------------------------------------------------------------------------------------ CLIP's tower


def why_not(adapter: Adapter) -> str:
    """Why tokens cannot be merged inside this encoder; "" if they can."""
    if adapter.unit_side != adapter.patch:
        return ("a visual token is made of several patches behind the vision encoder, which all "
                "have to arrive there")
    if getattr(adapter, "crops", False):
        return "the padding of the crops is cut off behind the vision encoder, patch by patch"
    if not isinstance(adapter, LlavaAdapter):
        return f"{type(adapter).__name__} is not of LLaVA's kind: expected the blocks of CLIP"
    return ""


@torch.no_grad()
def merged(vlm, batch, rule: Merge) -> tuple[Tensor, Tensor]:
    """feats (T, K, C) and the units (T, K) they stand at, ascending: what encode() does, with
    tokens merged by the rule in every block, between attention and feed-forward. Token 0 is [CLS].

    Raises ValueError, with the reason, where that cannot be done.
    """
    adapter = vlm.adapter
    if reason := why_not(adapter):
        raise ValueError(f"{vlm.family} cannot merge inside its vision encoder: {reason}")
    tower = adapter.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(adapter.tiles(batch)))
    size = x.new_ones(x.shape[:2])                     # patches of each token
    anchor = torch.arange(-1, x.shape[1] - 1, device=x.device).expand(len(x), -1)
    for i, block in enumerate(tower.encoder.layers[:adapter.depth]):
        attention = block.self_attn
        normed = block.layer_norm1(x)
        q, k, v = (proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                   for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None])
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        stays, into = rule(i, k.mean(1))
        # a product, not a scattered sum: a GPU adds that one up in another order every time
        share = F.one_hot(into, stays.shape[1]).transpose(1, 2).to(x) * size[:, None]
        size = share.sum(-1)
        anchor = anchor.gather(1, stays)
        x = share @ x / size[..., None]
        x = x + block.mlp(block.layer_norm2(x))
    anchor, order = anchor[:, 1:].sort(dim=1)
    return x[:, 1:].gather(1, order[..., None].expand(-1, -1, adapter.width)), anchor
