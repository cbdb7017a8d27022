"""PyramidDrop, PDrop (Xing et al., CVPR 2025, arXiv:2410.17247): in front of layers 8, 16 and 24
the visual tokens are ranked by the attention of the last prompt token in that very layer, mean over
heads, and the best stay.

Budget: the mean over layers of the tokens that enter a layer is K, or less than one below it. The
stages keep lambda, lambda^2, lambda^3 of N, lambda solved for. count="last": K after the last
stage, lambda = (K / N)^(1/3).
Paper and released code: tables name averages of 192, 128 and 64 of 576, yet at 8/16/24 of 32 none
under 144 exists. Released are 1/2, 1/4, 1/8 (270 on average), truncated, and positions numbered
anew at every stage: as_released, with positions="reindex" for generate_inside(), decoding included.
"""

from functools import cache

from . import check_keep, mean_over_layers, top

NAMES = {"pdrop": {}, "pdrop_last": {"count": "last"}}
LAYERS = (8, 16, 24)                                   # [paper]


def shrink(tokens: int, ratio: float, stages: int) -> list[int]:
    """ratio, ratio^2, ... of the tokens, truncated, at least one."""
    return [max(1, int(tokens * ratio ** (i + 1) + 1e-9)) for i in range(stages)]


def schedule(keep: int, tokens: int, depth: int = 32, layers: tuple = LAYERS,
             count: str = "average") -> list[int]:
    """Visual tokens after every stage. Raises ValueError for a mean over layers that cannot be
    had."""
    n = len(layers)
    if count == "last":
        return [*shrink(tokens, (keep / tokens) ** (1 / n), n)[:-1], keep]
    least = mean_over_layers([1] * n, tokens, depth, layers)
    if keep < least:
        raise ValueError(f"keep={keep} of {tokens} visual tokens, on average over {depth} layers: "
                         f"with layers={layers} the least is {least:.1f}; "
                         f"{advice(keep, tokens, depth, layers)}")
    low, high = 0., 1.
    for _ in range(50):
        middle = (low + high) / 2
        if mean_over_layers(shrink(tokens, middle, n), tokens, depth, layers) <= keep:
            low = middle
        else:
            high = middle
    counts = shrink(tokens, 1. if keep == tokens else low, n)
    return fill_up(counts, keep, tokens, depth, layers)


def advice(keep: int, tokens: int, depth: int, layers: tuple) -> str:
    """Earlier layers that would make a mean of `keep` possible."""
    for halvings in range(1, 9):
        early = tuple(max(i + 1, layer // 2 ** halvings) for i, layer in enumerate(layers))
        if keep >= mean_over_layers([1] * len(layers), tokens, depth, early):
            return f"layers={early} would do"
    return "no stages would do, count='last' counts otherwise"


def fill_up(counts: list[int], keep: int, tokens: int, depth: int, layers: tuple) -> list[int]:
    """The counts, raised by what truncation left over, so that their mean comes closest to keep."""
    counts = list(counts)
    for i, (start, end) in enumerate(zip(layers, [*layers[1:], depth])):
        missing = keep - mean_over_layers(counts, tokens, depth, layers)
        more = int(missing * depth + 1e-6) // (end - start)
        counts[i] += min(more, [tokens, *counts][i] - counts[i])
    return counts


def stages(keep: int | None, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS,
           count: str = "average", as_released: bool = False) -> dict:
    """{layer: rule} for inside.generate_inside(). as_released: 1/2, 1/4, 1/8, whatever keep is.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model;
    count: what keep counts, see above. Raises ValueError where a row has fewer than `keep` tokens
    or its schedule is impossible.
    """
    if not as_released:
        check_keep(keep, tokens)

    @cache
    def counts(n):
        if as_released:
            return shrink(n, .5, len(layers))
        return schedule(keep, n, depth, layers, count)
    for n in tokens if isinstance(tokens, list) else [tokens]:
        counts(n)                                      # an impossible one is refused now

    def at(stage):
        def rule(view):
            scores = view.attention(own=True).mean(1)[:, 0]            # (B, N)
            return [top(score[valid], counts(n)[stage]).sort().values
                    for score, valid, n in zip(scores, view.valid, view.entered)]
        return rule
    return {layer: at(stage) for stage, layer in enumerate(layers)}
