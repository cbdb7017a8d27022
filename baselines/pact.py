"""PACT (Dhouib et al., CVPR 2025, arXiv:2504.08966): in front of layer 4, prune what matters
little, then merge.

EUTI: q and k of that layer without RoPE; the mean query's softmax over the keys, mean over heads,
times the norm of the hidden state. The best 0.55 N survive and are clustered by DBDPC: cosine
distance of their keys after RoPE; from the densest on, whoever is farther than d_c from all centres
so far is one; the others join the nearest. So do pruned tokens within 1.5 d_c of it; the rest
vanish. A cluster's mean stands at its centre's place and position, and log(size) is added to the
attention logits of its key in all later layers and in decoding.

Budget: exactly K clusters: the smallest d_c with at most K centres, then the survivors farthest
from all centres, until there are K [ours]; the mean over layers is (4 N + (layers - 4) K) / layers.
keep=None: as many as d_c = cutoff makes.
Paper and released code: EUTI is over visual tokens; the code takes all up to the last of them, the
system prompt too (as_released). It passes an additive mask and is_causal together, which attention
kernels do not define: not followed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check_keep, top
from .inside import at_least_float32

NAMES = {"pact": {}}
LAYERS = (4,)                                          # [paper]
# [paper] for LLaVA-OneVision; Qwen2-VL: .8 and .1
SHARE = .55                                            # of the tokens that survive
CUTOFF = .21                                           # d_c
RECOVER = 1.5                                          # times d_c: who still joins a cluster


def importance(q: Tensor, k: Tensor, norm: Tensor) -> Tensor:
    """EUTI of n tokens: q (n, H, d), k (n, H or fewer, d), norm (n,) -> (n,)."""
    q = at_least_float32(q.mean(0))
    k = at_least_float32(k)
    k = k.repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    logits = torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** .5
    return logits.softmax(-1).mean(0) * norm


def centres_within(distance: Tensor, order: Tensor, cutoff: float) -> Tensor:
    """(m,) bool: token by token from the densest, order (m,) 0 for it, a centre if farther than
    cutoff from all so far.

    In rounds instead of one by one: who has no denser undecided neighbour is a centre, who is near
    one is not.
    """
    near = (distance <= cutoff).fill_diagonal_(False)
    before = near & (order[None] < order[:, None])
    centre = torch.zeros_like(order, dtype=torch.bool)
    undecided = ~centre
    while undecided.any():
        new = undecided & ~(before & undecided).any(1)
        centre |= new
        undecided &= ~new & ~near[:, new].any(1)
    return centre


def cluster(distance: Tensor, keep: int | None, cutoff: float = CUTOFF) -> tuple[Tensor, float]:
    """DBDPC on distances (m, m) -> ascending centres, and the cutoff: the given one, or that of
    `keep` centres."""
    density = (-distance.div(2).square()).exp().sum(1)
    order = density.argsort(descending=True, stable=True).argsort()
    if keep is None:
        return centres_within(distance, order, cutoff).nonzero().flatten(), cutoff

    def few_enough(cutoff: float) -> bool:
        return int(centres_within(distance, order, cutoff).sum()) <= keep
    low, high = 0., 2.
    if few_enough(low):
        high = low
    for _ in range(20 if high else 0):
        middle = (low + high) / 2
        if few_enough(middle):
            high = middle
        else:
            low = middle
    centre = centres_within(distance, order, high)
    for _ in range(keep - int(centre.sum())):
        farthest = distance[:, centre].min(1).values.masked_fill(centre, -1.).argmax()
        centre[farthest] = True
    return centre.nonzero().flatten(), high


def merge(x: Tensor, keys: Tensor, score: Tensor, keep: int | None, share: float = SHARE,
          cutoff: float = CUTOFF) -> tuple[Tensor, Tensor, Tensor]:
    """One image: states x (n, D), keys (n, C), score (n,) -> ascending centres (K,), means (K, D),
    sizes (K,)."""
    survivors = top(score, max(int(share * len(x)), keep or 1)).sort().values
    keys = F.normalize(at_least_float32(keys), dim=-1)
    distance = (1 - keys @ keys.mT).clamp(min=0).fill_diagonal_(0.)
    centres, cutoff = cluster(distance[survivors][:, survivors], keep, cutoff)
    centres = survivors[centres]
    nearest, owner = distance[:, centres].min(1)       # no survivor is farther than the cutoff
    joins = nearest <= RECOVER * cutoff
    owner[centres] = torch.arange(len(centres), device=x.device)
    states = at_least_float32(x[joins])
    sums = states.new_zeros(len(centres), x.shape[1]).index_add(0, owner[joins], states)
    sizes = owner[joins].bincount(minlength=len(centres))
    return centres, (sums / sizes[:, None]).to(x), sizes


def stages(keep: int | None, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS,
           share: float = SHARE, cutoff: float = CUTOFF, as_released: bool = False) -> dict:
    """{layer: rule} for inside.generate_inside(): exactly `keep` visual tokens from that layer on.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model,
    not used here; keep None: as many as cutoff makes. Raises ValueError where a row has fewer than
    `keep` tokens.
    """
    if keep is not None:
        check_keep(keep, tokens)
    (layer,) = layers

    def rule(view):
        q = view.queries(own=True, rope=False)
        k = view.keys(own=True, rope=False)
        keys = view.pad(view.keys(own=True).flatten(2))[0]
        visual = view.prompt.is_visual
        wide = torch.promote_types(q.dtype, torch.float32)
        norm = view.prompt.embeds.norm(dim=-1, dtype=wide)
        rated = visual
        if as_released:                                # everything up to the last visual token
            rated = visual.flip(1).cumsum(1).flip(1).bool() & view.prompt.mask.bool()
        keeps, means, log_sizes = [], [], []
        for b, valid in enumerate(view.valid):
            score = importance(q[b, rated[b]], k[b, rated[b]], norm[b, rated[b]])
            score = score[visual[b, rated[b]]]
            centres, mean, size = merge(view.states[b, valid], keys[b, valid], score, keep, share,
                                        cutoff)
            keeps.append(centres)
            means.append(mean)
            log_sizes.append(size.to(norm).log())
        return keeps, {"embeds": means, "log_size": log_sizes}
    return {layer: rule}
