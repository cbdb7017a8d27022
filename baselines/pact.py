"""PACT (Dhouib et al., CVPR 2025, arXiv:2504.08966): in front of layer 4, prune what matters little, then merge.

EUTI: q and k of that layer without RoPE; the mean query's softmax over the keys, mean over heads, times the norm of the
hidden state. The best 0.55 N survive and are clustered by DBDPC: cosine distance of their keys after RoPE; from the
densest on, whoever is farther than d_c from all centres so far is one; the others join the nearest. So do pruned
tokens within 1.5 d_c of it; the rest vanish. A cluster's mean stands at its centre's place and position, and log(size)
is added to the attention logits of its key in all later layers and in decoding.

Budget: exactly K clusters: the smallest d_c with at most K centres, then the survivors farthest from all centres, until
there are K [ours]; the mean over layers is (4 N + (layers - 4) K) / layers. keep=None: as many as d_c = cutoff makes.
Paper and released code: EUTI is over visual tokens; the code takes all up to the last of them, the system prompt too
(as_released). It passes an additive mask and is_causal together, which attention kernels do not define: not followed.
"""

import torch
import torch.nn.functional as F

from baselines import check_keep

LAYERS = (4,)                                          # [paper]
SHARE, CUTOFF, RECOVER = .55, .21, 1.5                 # [paper] LLaVA-OneVision; Qwen2-VL: .8 and .1


def importance(q: torch.Tensor, k: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """EUTI of n tokens: q (n, H, d), k (n, H or fewer, d), norm (n,) -> (n,)."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q.mean(0), k))
    k = k.repeat_interleave(q.shape[0] // k.shape[1], dim=1)
    return (torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** .5).softmax(-1).mean(0) * norm


def centres_within(distance: torch.Tensor, order: torch.Tensor, cutoff: float) -> torch.Tensor:
    """(m,) bool: token by token from the densest, order (m,) 0 for it, a centre if farther than cutoff from all so far.

    In rounds instead of one by one: who has no denser undecided neighbour is a centre, who is near one is not.
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


def cluster(distance: torch.Tensor, keep: int | None, cutoff: float = CUTOFF) -> tuple[torch.Tensor, float]:
    """DBDPC on distances (m, m) -> ascending centres, and the cutoff: the given one, or that of `keep` centres."""
    order = (-distance.div(2).square()).exp().sum(1).argsort(descending=True, stable=True).argsort()
    if keep is None:
        return centres_within(distance, order, cutoff).nonzero().flatten(), cutoff
    low, high = 0., 2.
    if int(centres_within(distance, order, low).sum()) <= keep:
        high = low
    for _ in range(20 if high else 0):
        middle = (low + high) / 2
        few = int(centres_within(distance, order, middle).sum()) <= keep
        low, high = (low, middle) if few else (middle, high)
    centre = centres_within(distance, order, high)
    for _ in range(keep - int(centre.sum())):
        centre[distance[:, centre].min(1).values.masked_fill(centre, -1.).argmax()] = True
    return centre.nonzero().flatten(), high


def merge(x: torch.Tensor, keys: torch.Tensor, score: torch.Tensor, keep: int | None, share: float = SHARE,
          cutoff: float = CUTOFF) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image: states x (n, D), keys (n, C), score (n,) -> ascending centres (K,), means (K, D), sizes (K,)."""
    wide, n = torch.promote_types(x.dtype, torch.float32), len(x)
    survivors = score.argsort(descending=True, stable=True)[:max(int(share * n), keep or 1)].sort().values
    keys = F.normalize(keys.to(wide), dim=-1)
    distance = (1 - keys @ keys.mT).clamp(min=0).fill_diagonal_(0.)
    centres, cutoff = cluster(distance[survivors][:, survivors], keep, cutoff)
    centres = survivors[centres]
    nearest, owner = distance[:, centres].min(1)       # no survivor is farther than the cutoff
    joins, owner[centres] = nearest <= RECOVER * cutoff, torch.arange(len(centres), device=x.device)
    sums = x.new_zeros(len(centres), x.shape[1], dtype=wide).index_add(0, owner[joins], x[joins].to(wide))
    sizes = owner[joins].bincount(minlength=len(centres))
    return centres, (sums / sizes[:, None]).to(x), sizes


def stages(keep: int | None, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS, share: float = SHARE,
           cutoff: float = CUTOFF, as_released: bool = False) -> dict:
    """{layer: rule} for common.FrozenVLM.generate_within(): exactly `keep` visual tokens from that layer on.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model, not used here; keep
    None: as many as cutoff makes. Raises ValueError where a row has fewer than `keep` tokens.
    """
    if keep is not None:
        check_keep(keep, tokens)
    (layer,) = layers

    def rule(look):
        q, k, prompt = look.queries(own=True, rope=False), look.keys(own=True, rope=False), look.prompt
        visual, norm = prompt.is_visual, prompt.embeds.norm(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        # the code's "not text": everything up to the last visual token
        ahead = visual.flip(1).cumsum(1).flip(1).bool() & prompt.mask.bool() if as_released else visual
        keys, found = look.pad(look.keys(own=True).flatten(2))[0], []
        for b, v in enumerate(look.valid):
            score = importance(q[b, ahead[b]], k[b, ahead[b]], norm[b, ahead[b]])[visual[b, ahead[b]]]
            found.append(merge(look.states[b, v], keys[b, v], score, keep, share, cutoff))
        keeps, means, sizes = zip(*found)
        return list(keeps), {"embeds": means, "log_size": [size.to(norm).log() for size in sizes]}
    return {layer: rule}
