"""SparseVLM (Zhang et al., ICML 2025, arXiv:2410.04417), code v1.5, and with plus=True SparseVLM+ (code v2.0).

After layers 2, 6 and 15, that is in front of 3, 7 and 16, visual tokens are ranked by the attention that raters pay
them in the layer before, mean over heads and raters. Raters are the tokens behind the image whose softmax similarity to
the visual tokens, in front of layer 0, is above average. Of the p pruned, the best 0.3 p + 1 are recycled: clustered by
DPC-KNN, each cluster's mean stays as one token, at its centre's place and position.
plus: nothing is recycled; each weight is divided by what RoPE alone makes of a vector of ones against itself; and only
the 14 of 32 heads in which the raters look at the image most are averaged.

Budget: the mean over layers of the tokens that enter a layer is K, or less than one below it; recycled ones count. The
stages keep the proportions of the released table's nearest row, scaled to N and K [ours]. count="last": K after all.
Paper and released code: the paper adapts the number to the rank of the attention, the code has the fixed table, whose
averages count what LEAVES a layer: by what enters, 192 / 128 / 64 are 206.5 / 145.4 / 82.3. It appends recycled tokens
behind the others and numbers positions anew (as_released, with positions="reindex"; "+" keeps them); its density has
noise of 1e-6, which is left out here: of equals the first wins.
"""

from functools import cache

import torch

LAYERS = (3, 7, 16)                                    # [paper] behind 2, 6, 15
TABLE = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}      # [released] v1.5
PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}       # [released] v2.0


def mean(counts, tokens: int, depth: int, layers: tuple) -> float:
    """Mean over layers of the visual tokens that enter a layer."""
    edges = [0, *layers, depth]
    return sum(n * (b - a) for n, a, b in zip([tokens, *counts], edges, edges[1:])) / depth


def schedule(keep: int, tokens: int, depth: int = 32, layers: tuple = LAYERS, count: str = "average",
             plus: bool = False) -> list[int]:
    """Visual tokens after every stage, recycled ones included. Raises ValueError for a mean that cannot be had."""
    table = PLUS if plus else TABLE
    shape = table[min(table, key=lambda k: abs(k - keep * 576 / tokens))]
    shape = [shape[round(i * 2 / max(len(layers) - 1, 1))] for i in range(len(layers))]

    def scaled(factor):
        return [max(1, min(tokens, int(factor * x + 1e-9))) for x in shape]
    if count == "last":
        return [*scaled(keep / shape[-1])[:-1], keep]
    if keep < (least := mean(scaled(0), tokens, depth, layers)):
        raise ValueError(f"keep={keep} of {tokens} visual tokens, on average over {depth} layers: with layers={layers} "
                         f"the least is {least:.1f}; expected more, earlier layers=, or count='last'")
    low, high = 0., float(tokens)
    for _ in range(60):
        middle = (low + high) / 2
        fits = mean(scaled(middle), tokens, depth, layers) <= keep
        low, high = (middle, high) if fits else (low, middle)
    counts = scaled(low)
    for i, (a, b) in enumerate(zip(layers, [*layers[1:], depth])):       # truncation left some over
        more = int((keep - mean(counts, tokens, depth, layers)) * depth + 1e-6) // (b - a)
        counts[i] += min(more, [tokens, *counts][i] - counts[i])
    return counts


def recycled(pruned: int) -> tuple[int, int]:
    """Of so many pruned tokens how many are recycled, into how many clusters."""
    t = int(.3 * pruned) + 1
    return t, int(t / 10) + 1


def split(tokens: int, wanted: int) -> tuple[int, int]:
    """(kept, clusters) that make `wanted` tokens of so many, by the method's own proportion where it has one."""
    for kept in range(min(wanted, tokens), 0, -1):
        if kept + (recycled(tokens - kept)[1] if kept < tokens else 0) == wanted:
            return kept, wanted - kept
    return 1, wanted - 1


def dpc_knn(x: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, D) -> centres (clusters,) int64, and of each of the t tokens the number of its cluster."""
    distance = torch.cdist(x, x) / x.shape[1] ** .5
    density = (-distance.topk(clusters, largest=False).values.square().mean(1)).exp()
    order = density.argsort(descending=True, stable=True).argsort()      # 0 for the densest
    denser = order[None] < order[:, None]
    lonely = distance.masked_fill(~denser, distance.max()).min(1).values
    centres = (density * lonely).argsort(descending=True, stable=True)[:clusters]
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(clusters, device=x.device)
    return centres, cluster


def raters(look) -> torch.Tensor:
    """(B, T) bool, of the text behind the image; all of it where none stands out."""
    text = look.behind
    x = look.start.embeds.to(torch.promote_types(look.start.embeds.dtype, torch.float32))
    share = (x @ x[:, -text.shape[1]:].mT).masked_fill(~text[:, None], -torch.inf).softmax(-1)         # (B, L, T)
    share = (share * look.start.is_visual[..., None]).sum(1) / look.start.is_visual.sum(1, keepdim=True)
    chosen = text & (share > share.sum(1, keepdim=True) / text.sum(1, keepdim=True))
    return torch.where(chosen.any(1, keepdim=True), chosen, text)


def rating(look, plus: bool = False) -> torch.Tensor:
    """(B, N) what the raters think of each visual token."""
    rater = raters(look).float()
    weights = look.attention(last=rater.shape[1])                                     # (B, H, T, N)
    if plus:
        heads, width = weights.shape[1], look.blocks[0].self_attn.head_dim
        ones = look.rotate(weights.new_ones(*look.prompt.mask.shape, 1, width))[:, :, 0]
        bias = ones[:, -rater.shape[1]:] @ look.pad(ones)[0].mT / width ** .5
        weights = weights / bias.masked_fill(~look.valid[:, None], 1.)[:, None]       # 0 / 0 behind shorter rows
    weights = torch.einsum("bhtn,bt->bhn", weights, rater.to(weights)) / rater.sum(1)[:, None, None]
    if plus:
        best = weights.sum(-1).topk(max(1, round(heads * 14 / 32))).indices
        weights = weights.gather(1, best[..., None].expand(-1, -1, weights.shape[-1]))
    return weights.mean(1)


def recycle(x: torch.Tensor, score: torch.Tensor, kept: int, clusters: int) -> tuple:
    """States x (n, D), score (n,) of one row -> best (kept,) by rank, centres (clusters,), means (clusters, D)."""
    order = score.argsort(descending=True, stable=True)
    if not clusters:
        return order[:kept], order[:0], x[:0]
    t = max(recycled(len(x) - kept)[0], clusters)
    again = order[kept:kept + t].sort().values
    states = x[again].to(torch.promote_types(x.dtype, torch.float32))
    centres, cluster = dpc_knn(states, clusters)
    sums = states.new_zeros(clusters, x.shape[1]).index_add(0, cluster, states)
    return order[:kept], again[centres], (sums / cluster.bincount(minlength=clusters)[:, None]).to(x)


def stages(keep: int, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS, count: str = "average",
           plus: bool = False, as_released: bool = False) -> dict:
    """{layer: rule} for common.FrozenVLM.generate_within(). as_released: the table's row for keep, whatever N is.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model; count: what keep
    counts, see above. Raises ValueError where a row has fewer than `keep` tokens or its schedule is impossible, and
    as_released for a keep without a row.
    """
    rows, table = tokens if isinstance(tokens, list) else [tokens], PLUS if plus else TABLE
    if not 0 < keep <= min(rows):
        raise ValueError(f"keep={keep} does not fit {min(rows)} visual tokens")
    if as_released and (keep not in table or len(layers) != len(table[keep])):
        raise ValueError(f"keep={keep} with layers={layers}: released are {[*table]}, each with three stages")

    @cache
    def counts(n):
        return table[keep] if as_released else schedule(keep, n, depth, layers, count, plus)
    for n in rows:                                     # an impossible one is refused now
        counts(n)

    def at(stage):
        def rule(look):
            keeps, embeds, origins = [], [], []
            for x, s, v, origin, n in zip(look.states, rating(look, plus), look.valid, look.origin,
                                          look.start.is_visual.sum(1).tolist()):
                x, s, origin, wanted, there = x[v], s[v], origin[v], counts(n)[stage], int(v.sum())
                if plus:
                    kept, clusters = min(wanted, there), 0
                elif as_released:
                    kept = min(wanted, there - 1)
                    clusters = recycled(there - kept)[1]
                else:
                    kept, clusters = split(there, min(wanted, there))
                best, centres, means = recycle(x, s, kept, clusters)
                best = best.sort().values
                source, written = torch.cat([best, centres]), torch.cat([x[best], means])
                # released, merged tokens stand behind the others; else where their centres stood
                place = torch.arange(len(source), device=x.device) if as_released and not plus else source.argsort()
                keeps.append(source.sort().values)
                embeds.append(written[place])
                origins.append(origin[source][place])
            return keeps, {"embeds": embeds, "origin": origins}
        return rule
    return {layer: at(stage) for stage, layer in enumerate(layers)}
