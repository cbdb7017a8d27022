"""PyramidDrop, PDrop (Xing et al., CVPR 2025, arXiv:2410.17247): in front of layers 8, 16 and 24 the visual tokens are
ranked by the attention of the last prompt token in that very layer, mean over heads, and the best stay.

Budget: the mean over layers of the tokens that enter a layer is K, or less than one below it. The stages keep lambda,
lambda^2, lambda^3 of N, lambda solved for. count="last": K after the last stage, lambda = (K / N)^(1/3).
Paper and released code: tables name averages of 192, 128 and 64 of 576, yet at 8/16/24 of 32 none under 144 exists.
Released are 1/2, 1/4, 1/8 (270 on average), truncated, and positions numbered anew at every stage: as_released, with
positions="reindex" for generate_within(), decoding included.
"""

from functools import cache

LAYERS = (8, 16, 24)                                   # [paper]


def mean(counts: list[int], tokens: int, depth: int, layers: tuple) -> float:
    """Mean over layers of the visual tokens that enter a layer."""
    edges = [0, *layers, depth]
    return sum(n * (b - a) for n, a, b in zip([tokens, *counts], edges, edges[1:])) / depth


def shrink(tokens: int, ratio: float, stages: int) -> list[int]:
    """ratio, ratio^2, ... of the tokens, truncated, at least one."""
    return [max(1, int(tokens * ratio ** (i + 1) + 1e-9)) for i in range(stages)]


def schedule(keep: int, tokens: int, depth: int = 32, layers: tuple = LAYERS, count: str = "average") -> list[int]:
    """Visual tokens after every stage. Raises ValueError for a mean over layers that cannot be had."""
    n = len(layers)
    if count == "last":
        return [*shrink(tokens, (keep / tokens) ** (1 / n), n)[:-1], keep]
    least = mean([1] * n, tokens, depth, layers)
    if keep < least:
        early = next((x for x in (tuple(max(i + 1, m // 2 ** s) for i, m in enumerate(layers)) for s in range(1, 9))
                      if keep >= mean([1] * n, tokens, depth, x)), None)
        raise ValueError(f"keep={keep} of {tokens} visual tokens, on average over {depth} layers: with layers={layers} "
                         f"the least is {least:.1f}; " + (f"layers={early} would do" if early else
                                                          "no stages would do, count='last' counts otherwise"))
    low, high = 0., 1.
    for _ in range(50):
        middle = (low + high) / 2
        fits = mean(shrink(tokens, middle, n), tokens, depth, layers) <= keep
        low, high = (middle, high) if fits else (low, middle)
    counts = shrink(tokens, 1. if keep == tokens else low, n)
    for i, (a, b) in enumerate(zip(layers, [*layers[1:], depth])):       # truncation left some over
        more = int((keep - mean(counts, tokens, depth, layers)) * depth + 1e-6) // (b - a)
        counts[i] += min(more, [tokens, *counts][i] - counts[i])
    return counts


def stages(keep: int | None, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS, count: str = "average",
           as_released: bool = False) -> dict:
    """{layer: rule} for common.FrozenVLM.generate_within(). as_released: 1/2, 1/4, 1/8, whatever keep is.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model; count: what keep
    counts, see above. Raises ValueError where a row has fewer than `keep` tokens or its schedule is impossible.
    """
    rows = tokens if isinstance(tokens, list) else [tokens]
    if not as_released and not 0 < keep <= min(rows):
        raise ValueError(f"keep={keep} does not fit {min(rows)} visual tokens")

    @cache
    def counts(n):
        return shrink(n, .5, len(layers)) if as_released else schedule(keep, n, depth, layers, count)
    for n in rows:                                     # an impossible one is refused now
        counts(n)

    def at(stage):
        def rule(look):
            scores = look.attention(own=True).mean(1)[:, 0]                           # (B, N)
            entered = look.start.is_visual.sum(1).tolist()
            return [s[v].argsort(descending=True, stable=True)[:counts(n)[stage]].sort().values
                    for s, v, n in zip(scores, look.valid, entered)]
        return rule
    return {layer: at(stage) for stage, layer in enumerate(layers)}
