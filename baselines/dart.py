"""DART (Wen et al., EMNLP 2025, arXiv:2502.11494): in front of layer 2, drop what repeats a few pivots.

Pivots are the 4 visual tokens and the 4 tokens of the text behind the image whose keys in layer 1, after RoPE, have the
largest L1 norm. Each pivot in turn takes the visual tokens that are least like it, by cosine of the hidden states after
the model's last norm, out of those still there. Text pivots only probe. Positions stay.

Budget: K tokens survive, the visual pivots among them, so the mean over layers is (2 N + (layers - 2) K) / layers.
Paper and released code: the code takes floor(K / 8) tokens for each of the 8 pivots and adds the 4 visual ones, 68 for
K = 64, the pivots in the order of a Python set. Here K - 4 are shared out, visual pivots by norm first [ours].
"""

import torch
import torch.nn.functional as F

from baselines import check_keep

LAYERS = (2,)                                          # [paper]
PIVOTS = 4                                             # [paper] of the image, and as many of the text


def pick(x: torch.Tensor, keys: torch.Tensor, text: torch.Tensor, text_keys: torch.Tensor, keep: int,
         as_released: bool = False, first: int = 0) -> torch.Tensor:
    """Ascending indices of the kept of n visual tokens: exactly `keep`, or 4 + 8 floor(keep / 8) as released.

    x (n, D) and text (t, D): hidden states after the last norm, keys (n, C) and text_keys (t, C): of the layer before.
    first: how many tokens stand before the image, which the order of the released code depends on.
    """
    n = len(x)
    norms, text_norms = keys.float().norm(p=1, dim=-1), text_keys.float().norm(p=1, dim=-1)
    pivots = norms.argsort(descending=True, stable=True)[:min(PIVOTS, keep)].tolist()
    probes = (n + text_norms.argsort(descending=True, stable=True)[:PIVOTS]).tolist()
    order = pivots + probes
    if as_released:
        order = [i - first for i in {i + first for i in order}]
        shares = [keep // (2 * PIVOTS)] * len(order)
    else:
        each, more = divmod(keep - len(pivots), len(order))
        shares = [each + (i < more) for i in range(len(order))]
    x = F.normalize(torch.cat([x, text]).float(), dim=-1)
    free = torch.ones(n, dtype=torch.bool, device=x.device)
    free[pivots] = False
    if sum(shares) > n - len(pivots):
        raise ValueError(f"{len(pivots) + sum(shares)} tokens as released do not fit {n} visual tokens")
    kept = list(pivots)
    for pivot, share in zip(order, shares):
        like = (x[:n] @ x[pivot]).masked_fill(~free, torch.inf)
        taken = like.argsort(stable=True)[:share]
        free[taken] = False
        kept += taken.tolist()
    return torch.tensor(sorted(kept), device=x.device)


def stages(keep: int, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS,
           as_released: bool = False) -> dict:
    """{layer: rule} for common.FrozenVLM.generate_within(): exactly `keep` visual tokens from that layer on.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model, not used here.
    Raises ValueError where a row has fewer than `keep` tokens.
    """
    check_keep(keep, tokens)
    (layer,) = layers

    def rule(look):
        text, prompt, keys = look.behind, look.prompt, look.keys().flatten(2)
        states, inner = look.norm(prompt.embeds), look.pad(keys)[0]
        mine, ahead = look.pad(states)[0], (prompt.mask.bool() & ~prompt.is_visual).sum(1) - text.sum(1)
        last = slice(-text.shape[1], None)
        return [pick(mine[b, v], inner[b, v], states[b, last][text[b]], keys[b, last][text[b]], keep, as_released,
                     int(ahead[b])) for b, v in enumerate(look.valid)]
    return {layer: rule}
