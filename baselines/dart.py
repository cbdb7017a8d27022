"""DART (Wen et al., EMNLP 2025, arXiv:2502.11494): in front of layer 2, drop what repeats a few
pivots.

Pivots are the 4 visual tokens and the 4 tokens of the text behind the image whose keys in layer 1,
after RoPE, have the largest L1 norm. Each pivot in turn takes the visual tokens that are least like
it, by cosine of the hidden states after the model's last norm, out of those still there. Text
pivots only probe. Positions stay.

Budget: K tokens survive, the visual pivots among them, so the mean over layers is
(2 N + (layers - 2) K) / layers.
Paper and released code: the code takes floor(K / 8) tokens for each of the 8 pivots and adds the 4
visual ones, 68 for K = 64, the pivots in the order of a Python set. Here K - 4 are shared out,
visual pivots by norm first [ours].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check_keep, top

NAMES = {"dart": {}}
LAYERS = (2,)                                          # [paper]
PIVOTS = 4                                             # [paper] of the image; as many of the text


def pick(x: Tensor, keys: Tensor, text: Tensor, text_keys: Tensor, keep: int,
         as_released: bool = False, first: int = 0) -> Tensor:
    """Ascending indices of the kept of n visual tokens: exactly `keep`, or 4 + 8 floor(keep / 8) as
    released.

    x (n, D) and text (t, D): hidden states after the last norm; keys (n, C) and text_keys (t, C):
    of the layer before. first: how many tokens stand before the image, which the order of the
    released code depends on.
    """
    n = len(x)
    pivots = top(keys.float().norm(p=1, dim=-1), min(PIVOTS, keep)).tolist()
    probes = (n + top(text_keys.float().norm(p=1, dim=-1), PIVOTS)).tolist()
    order = pivots + probes
    if as_released:
        order = [i - first for i in {i + first for i in order}]
        shares = [keep // (2 * PIVOTS)] * len(order)
    else:
        each, more = divmod(keep - len(pivots), len(order))
        shares = [each + (i < more) for i in range(len(order))]
    if sum(shares) > n - len(pivots):
        raise ValueError(f"{len(pivots) + sum(shares)} tokens as released do not fit {n} visual "
                         "tokens")
    x = F.normalize(torch.cat([x, text]).float(), dim=-1)
    free = torch.ones(n, dtype=torch.bool, device=x.device)
    free[pivots] = False
    kept = list(pivots)
    for pivot, share in zip(order, shares):
        likeness = (x[:n] @ x[pivot]).masked_fill(~free, torch.inf)
        taken = likeness.argsort(stable=True)[:share]
        free[taken] = False
        kept += taken.tolist()
    return torch.tensor(sorted(kept), device=x.device)


def stages(keep: int, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS,
           as_released: bool = False) -> dict:
    """{layer: rule} for inside.generate_inside(): exactly `keep` visual tokens from that layer on.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model,
    not used here. Raises ValueError where a row has fewer than `keep` tokens.
    """
    check_keep(keep, tokens)
    (layer,) = layers

    def rule(view):
        text = view.behind                             # (B, T), the last T columns
        keys = view.keys().flatten(2)
        states = view.norm(view.prompt.embeds)
        visual_keys = view.pad(keys)[0]
        visual_states = view.pad(states)[0]
        is_text = view.prompt.mask.bool() & ~view.prompt.is_visual
        before_image = is_text.sum(1) - text.sum(1)
        width = text.shape[1]
        return [pick(visual_states[b, valid], visual_keys[b, valid],
                     states[b, -width:][text[b]], keys[b, -width:][text[b]],
                     keep, as_released, int(before_image[b]))
                for b, valid in enumerate(view.valid)]
    return {layer: rule}
