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
from .greedy import Rows, in_parts
from .inside import at_least_float32

NAMES = {"pact": {}}
LAYERS = (4,)                                          # [paper]
# [paper] for LLaVA-OneVision; Qwen2-VL: .8 and .1
SHARE = .55                                            # of the tokens that survive
CUTOFF = .21                                           # d_c
RECOVER = 1.5                                          # times d_c: who still joins a cluster
STEPS = 20                                             # halvings of d_c for exactly K [ours]
AT_ONCE = {"cpu": 2, "cuda": 4}                        # of these, tried side by side [ours]


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
    if keep is None:
        return centres_within(distance, density_order(distance), cutoff).nonzero().flatten(), cutoff
    centres, cutoffs = exactly([distance], keep)
    return centres[0], cutoffs[0]


def density_order(distance: Tensor) -> Tensor:
    """(m,) int64, 0 for the densest of m tokens at distances (m, m)."""
    density = (-distance.div(2).square()).exp().sum(1)
    return density.argsort(descending=True, stable=True).argsort()


@torch.inference_mode()                                # a tenth faster than no_grad()
def exactly(distances: list[Tensor], keep: int) -> tuple[Tensor, Tensor]:
    """DBDPC of B pictures of m tokens each, at distances (m, m) -> ascending centres (B, keep), and
    cutoffs (B,).

    Token by token instead of in rounds: of a cutoff it need be known only whether `keep` centres
    leave nobody farther from them all, and a round does not end before somebody looks.
    """
    m = max(map(len, distances))
    apart = distances[0].new_zeros(len(distances), m, m)
    sorted_ = torch.zeros_like(apart)                  # the same, densest first
    turn = apart.new_zeros(len(distances), m)          # the next centre has the largest
    for own, densest_first, rank, distance in zip(apart, sorted_, turn, distances):
        n = len(distance)
        order = density_order(distance)
        own[:n, :n] = distance
        rank[:n] = n - order
        densest = order.argsort()
        densest_first[:n, :n] = distance.index_select(0, densest).index_select(1, densest)
    cutoffs = smallest(sorted_, turn > 0, keep)
    return centres_and_farthest(apart, turn, cutoffs, keep).sort(1).values, cutoffs


def few_enough(apart: Tensor, real: Tensor, cutoffs: Tensor, keep: int) -> Tensor:
    """(B, c) bool: do `keep` centres leave nobody beyond the cutoffs (B, c)?

    apart (B, m, m): distances of the tokens, densest first | real (B, m) bool: where there are any
    """
    count, c = cutoffs.shape
    # as bytes, of which argmax() finds the first that is not 0
    beyond = (apart[:, None] > cutoffs[..., None, None]).view(torch.uint8).flatten(0, 2)
    left = real.view(torch.uint8).repeat_interleave(c, 0)
    first = torch.arange(0, len(beyond), left.shape[1], device=apart.device)
    j, row = torch.empty_like(first), torch.empty_like(left)
    for _ in range(keep):
        torch.argmax(left, 1, out=j)
        torch.index_select(beyond, 0, j.add_(first), out=row)
        left.bitwise_and_(row)
    return (left == 0).all(1).view(count, c)


def smallest(apart: Tensor, real: Tensor, keep: int) -> Tensor:
    """(B,) the smallest cutoff with at most `keep` centres, found by halving [0, 2] STEPS times.

    AT_ONCE halvings together: all the cutoffs that they may come to are tried side by side.
    apart, real: of few_enough().
    """
    together = AT_ONCE.get(apart.device.type, AT_ONCE["cuda"])
    low, width = apart.new_zeros(len(apart), 1), 2.
    for step in range(0, STEPS, together):
        halvings = min(together, STEPS - step)
        width /= 2 ** halvings
        index = torch.arange(2 ** halvings, device=apart.device)
        few = few_enough(apart, real, low + width * (index[1:] if step else index), keep)
        if not step:
            none_needed, few = few[:, 0], few[:, 1:]
        below = index.new_zeros(len(apart), 1)
        for half in (2 ** i for i in reversed(range(halvings))):
            below += half * ~few.gather(1, below + half - 1)
        low = low + width * below
    return torch.where(none_needed, 0., low[:, 0] + width)


def centres_and_farthest(apart: Tensor, turn: Tensor, cutoffs: Tensor, keep: int) -> Tensor:
    """(B, keep): the centres within the cutoffs (B,), then always who is farthest from all.

    Whom no centre has yet stands above all distances, by turns; then nearer than any cutoff.
    """
    near = apart.masked_fill(apart > cutoffs[:, None, None], torch.inf)
    near.diagonal(dim1=1, dim2=2).fill_(-1.)           # a centre never again
    rows = Rows(near)
    nearest = torch.where(turn > 0, turn + 3, -1.)     # 3: a distance is about 2 at most
    picked = []
    for _ in range(keep):
        picked.append(nearest.argmax(1))
        torch.minimum(nearest, rows(picked[-1]), out=nearest)
    return torch.stack(picked, 1)


def merge(x: list[Tensor], keys: list[Tensor], score: list[Tensor], keep: int | None,
          share: float = SHARE, cutoff: float = CUTOFF) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every image: states x (n, D), keys (n, C), score (n,) -> ascending centres (K,), means
    (K, D), sizes (K,)."""
    merged = []
    for part in in_parts(zip(x, score, keys)):
        merged += merge_together(*part, keep, share, cutoff)
    return merged


def merge_together(x: list, score: list, keys: list, keep: int | None, share: float,
                   cutoff: float) -> list[tuple]:
    """merge() of as many images as fit the memory."""
    stay, distances, between = [], [], []
    for own, rated in zip(keys, score):
        own = F.normalize(at_least_float32(own), dim=-1)
        distances.append((own @ own.mT).neg_().add_(1).clamp_(min=0).fill_diagonal_(0.))
        stay.append(top(rated, max(int(share * len(own)), keep or 1)).sort().values)
        between.append(distances[-1].index_select(0, stay[-1]).index_select(1, stay[-1]))
    if keep is None:
        found = [cluster(distance, None, cutoff) for distance in between]
    else:
        found = zip(*exactly(between, keep))
    return [means(*each) for each in zip(x, distances, stay, found)]


def means(x: Tensor, distance: Tensor, stay: Tensor, found: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """merge() of one image, whose centres and cutoff are found among those that stay."""
    centres, cutoff = stay[found[0]], found[1]
    nearest, owner = distance.index_select(1, centres).min(1)
    joins = nearest <= RECOVER * cutoff                # of those that stay nobody is left out
    owner[centres] = torch.arange(len(centres), device=x.device)
    states = torch.where(joins[:, None], at_least_float32(x), 0.)
    sums = states.new_zeros(len(centres), x.shape[1]).index_add_(0, owner, states)
    sizes = owner.new_zeros(len(centres)).index_add_(0, owner, joins.long())
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
        scores = []
        for b, seen in enumerate(rated):
            score = importance(q[b, seen], k[b, seen], norm[b, seen])
            scores.append(score[visual[b, seen]])
        states = [row[valid] for row, valid in zip(view.states, view.valid)]
        keys = [row[valid] for row, valid in zip(keys, view.valid)]
        keeps, embeds, sizes = zip(*merge(states, keys, scores, keep, share, cutoff))
        return list(keeps), {"embeds": list(embeds),
                             "log_size": [size.to(norm).log() for size in sizes]}
    return {layer: rule}
