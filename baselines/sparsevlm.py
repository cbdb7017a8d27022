"""SparseVLM (Zhang et al., ICML 2025, arXiv:2410.04417), code v1.5, and with plus=True SparseVLM+
(code v2.0).

After layers 2, 6 and 15, that is in front of 3, 7 and 16, visual tokens are ranked by the attention
that raters pay them in the layer before, mean over heads and raters. Raters are the tokens behind
the image whose softmax similarity to the visual tokens, in front of layer 0, is above average. Of
the p pruned, the best 0.3 p + 1 are recycled: clustered by DPC-KNN, each cluster's mean stays as
one token, at its centre's place and position.
plus: nothing is recycled; each weight is divided by what RoPE alone makes of a vector of ones
against itself; and only the 14 of 32 heads in which the raters look at the image most are averaged.

Budget: the mean over layers of the tokens that enter a layer is K, or less than one below it;
recycled ones count. count="last": K after the last stage. Released are four rows of numbers, for
576 tokens. Between them the stages run on straight lines, above and below them to all and to none,
scaled to N [ours]: each row is met at its own last number, and fewer tokens never cost more.
Paper and released code: the paper adapts the number to the rank of the attention, the code has the
fixed table, whose averages count what LEAVES a layer: by what enters, 192 / 128 / 64 are 206.5 /
145.4 / 82.3. It appends recycled tokens behind the others and numbers positions anew (as_released,
with positions="reindex"; "+" keeps them); its density has noise of 1e-6, which is left out here: of
equals the first wins.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from . import check_keep, mean_over_layers, top
from .inside import at_least_float32
from .pdrop import fill_up

NAMES = {"sparsevlm": {}, "sparsevlm_last": {"count": "last"}, "sparsevlm_plus": {"plus": True},
         "sparsevlm_plus_last": {"plus": True, "count": "last"}}
LAYERS = (3, 7, 16)                                    # [paper] behind 2, 6, 15
# [released] K -> visual tokens after each stage; v1.5, where recycled ones come on top, and v2.0
TABLE = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


# ------------------------------------------------------------------------------------ how many


def schedule(keep: int, tokens: int, depth: int = 32, layers: tuple = LAYERS,
             count: str = "average", plus: bool = False) -> list[int]:
    """Visual tokens after every stage, recycled ones included. Raises ValueError for a mean that
    cannot be had."""
    n = len(layers)
    rows = np.array([[0] * n, *released(n, plus), [576] * n]) * tokens / 576

    def where_last_is(last: float) -> list[int]:
        return [max(1, int(np.interp(last, rows[:, -1], stage) + 1e-9)) for stage in rows.T]
    if count == "last":
        return [*where_last_is(keep)[:-1], keep]
    least = mean_over_layers(where_last_is(0), tokens, depth, layers)
    if keep < least:
        raise ValueError(f"keep={keep} of {tokens} visual tokens, on average over {depth} layers: "
                         f"with layers={layers} the least is {least:.1f}; expected more, earlier "
                         "layers=, or count='last'")
    low, high = 0., float(tokens)
    for _ in range(60):
        middle = (low + high) / 2
        if mean_over_layers(where_last_is(middle), tokens, depth, layers) <= keep:
            low = middle
        else:
            high = middle
    return fill_up(where_last_is(low), keep, tokens, depth, layers)


def released(stages: int, plus: bool = False) -> list[list[int]]:
    """What is left of 576 after each of so many stages, recycled ones included; the least
    first."""
    rows = []
    for row in (PLUS if plus else TABLE).values():
        left = [576]
        for kept in row:
            left.append(kept if plus else kept + recycled(left[-1] - kept)[1])
        # of fewer stages than three the last is the last, and the first the first
        rows.append([left[3 - round((stages - i) * 2 / max(stages - 1, 1))]
                     for i in range(1, stages + 1)])
    return rows[::-1]


def recycled(pruned: int) -> tuple[int, int]:
    """Of so many pruned tokens how many are recycled, into how many clusters."""
    t = int(.3 * pruned) + 1
    return t, int(t / 10) + 1


def split(tokens: int, wanted: int) -> tuple[int, int]:
    """(kept, clusters) that make `wanted` tokens of so many, by the method's own proportion where
    it has one."""
    for kept in range(min(wanted, tokens), 0, -1):
        clusters = recycled(tokens - kept)[1] if kept < tokens else 0
        if kept + clusters == wanted:
            return kept, wanted - kept
    return 1, wanted - 1


# ------------------------------------------------------------------------------------ which


def raters(view) -> Tensor:
    """(B, T) bool, of the text behind the image; all of it where none stands out."""
    text = view.behind
    is_visual = view.start.is_visual
    x = at_least_float32(view.start.embeds)
    similarity = x @ x[:, -text.shape[1]:].mT          # (B, L, T)
    share = similarity.masked_fill(~text[:, None], -torch.inf).softmax(-1)
    share = (share * is_visual[..., None]).sum(1) / is_visual.sum(1, keepdim=True)
    average = share.sum(1, keepdim=True) / text.sum(1, keepdim=True)
    chosen = text & (share > average)
    return torch.where(chosen.any(1, keepdim=True), chosen, text)


def rating(view, plus: bool = False) -> Tensor:
    """(B, N) what the raters think of each visual token."""
    rater = raters(view).float()
    last = rater.shape[1]
    weights = view.attention(last=last)                # (B, H, T, N)
    if plus:
        weights = weights / rotary_bias(view, weights, last)[:, None]
    weights = torch.einsum("bhtn,bt->bhn", weights, rater.to(weights))
    weights = weights / rater.sum(1)[:, None, None]
    if plus:
        heads = weights.shape[1]
        best = weights.sum(-1).topk(max(1, round(heads * 14 / 32))).indices
        weights = weights.gather(1, best[..., None].expand(-1, -1, weights.shape[-1]))
    return weights.mean(1)


def rotary_bias(view, weights: Tensor, last: int) -> Tensor:
    """(B, T, N): the logits of queries and keys that are all ones, in the type of the weights."""
    width = view.blocks[0].self_attn.head_dim
    ones = weights.new_ones(*view.prompt.mask.shape, 1, width)
    ones = view.rotate(ones)[:, :, 0]
    bias = ones[:, -last:] @ view.pad(ones)[0].mT / width ** .5
    return bias.masked_fill(~view.valid[:, None], 1.)  # else 0 / 0 behind shorter rows


def dpc_knn(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """(t, D) -> centres (clusters,) int64, and of each of the t tokens its cluster's number."""
    distance = torch.cdist(x, x) / x.shape[1] ** .5
    nearest = distance.topk(clusters, largest=False).values
    density = (-nearest.square().mean(1)).exp()
    order = density.argsort(descending=True, stable=True).argsort()    # 0 for the densest
    denser = order[None] < order[:, None]
    to_denser = distance.masked_fill(~denser, distance.max()).min(1).values
    centres = top(density * to_denser, clusters)
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(clusters, device=x.device)
    return centres, cluster


def recycle(x: Tensor, score: Tensor, kept: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """States x (n, D), score (n,) of one row -> best (kept,) by rank, centres (clusters,), means
    (clusters, D)."""
    order = score.argsort(descending=True, stable=True)
    if not clusters:
        return order[:kept], order[:0], x[:0]
    t = max(recycled(len(x) - kept)[0], clusters)
    again = order[kept:kept + t].sort().values
    states = at_least_float32(x[again])
    centres, cluster = dpc_knn(states, clusters)
    sums = states.new_zeros(clusters, x.shape[1]).index_add(0, cluster, states)
    means = sums / cluster.bincount(minlength=clusters)[:, None]
    return order[:kept], again[centres], means.to(x)


def stages(keep: int, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS,
           count: str = "average", plus: bool = False, as_released: bool = False) -> dict:
    """{layer: rule} for inside.generate_inside(). as_released: the table's row for keep, whatever N
    is.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model;
    count: what keep counts, see above. Raises ValueError where a row has fewer than `keep` tokens
    or its schedule is impossible, and as_released for a keep without a row.
    """
    table = PLUS if plus else TABLE
    check_keep(keep, tokens)
    if as_released and (keep not in table or len(layers) != len(table[keep])):
        raise ValueError(f"keep={keep} with layers={layers}: released are {[*table]}, each with "
                         "three stages")
    appends = as_released and not plus

    @cache
    def counts(n):
        if as_released:
            return table[keep]
        return schedule(keep, n, depth, layers, count, plus)
    for n in tokens if isinstance(tokens, list) else [tokens]:
        counts(n)                                      # an impossible one is refused now

    def kept_and_clusters(n: int, wanted: int) -> tuple[int, int]:
        if plus:
            return min(wanted, n), 0
        if as_released:
            kept = min(wanted, n - 1)
            return kept, recycled(n - kept)[1]
        return split(n, min(wanted, n))

    def at(stage):
        def rule(view):
            keeps, embeds, origins = [], [], []
            scores = rating(view, plus)
            for b, valid in enumerate(view.valid):
                x = view.states[b, valid]
                origin = view.origin[b, valid]
                kept, clusters = kept_and_clusters(len(x), counts(view.entered[b])[stage])
                best, centres, means = recycle(x, scores[b, valid], kept, clusters)
                best = best.sort().values
                source = torch.cat([best, centres])
                written = torch.cat([x[best], means])
                # released, merged tokens stand behind the others; else where their centres stood
                place = torch.arange(len(source), device=x.device) if appends else source.argsort()
                keeps.append(source.sort().values)
                embeds.append(written[place])
                origins.append(origin[source][place])
            return keeps, {"embeds": embeds, "origin": origins}
        return rule
    return {layer: at(stage) for stage, layer in enumerate(layers)}
