"""CDPruner (NeurIPS 2025, arXiv:2506.10967): a determinantal point process over tokens, conditioned
on the question.

Kernel r_i cos(x_i, x_j) r_j of projected features x; r is relevance: the mean cosine to the
question, from 0 to 1 in each view. Greedy MAP, crop by crop. Relevance is of CLIP's embeddings,
MINUS the cosine: of its patches and texts that is inverted, the authors say. LLaVA ships no text
tower, so clip= takes them from outside. Without: projected tokens and the language model's
embeddings of the question's words, a space where the sign is plus [ours: in the tiny LLaVA, minus
keeps less evidence than chance]; the OpenVINO port of this variant has minus.

Released code: scales r over the whole batch, so that pictures depend on one another; and does not
bound what is left of a token's volume: with a kernel of rank below K it goes negative, and the code
picks NaN and repeats itself.
"""

from dataclasses import replace

import torch
from torch import Tensor

from runs import Way

from . import by_view, pictures, unit_length

NAMES = {"cdpruner": {}}


def needs(vlm) -> dict:
    return {"projected": ("projected", 0)}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False,
           question: tuple | None = None, clip: tuple | None = None,
           sign: int | None = None) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices, as_released of at most so many.

    question: embeddings (B, L, D) and valid (B, L), as FrozenVLM.question() gives them; or clip:
    embeddings of patches (M, d) and of texts (B, S, d), with valid (B, S), one text a segment of
    the question. Raises ValueError without. sign: of the cosine in the relevance [-1 for clip= and
    as_released, else 1].
    """
    if question is None and clip is None:
        raise ValueError("cdpruner reads the question: pass question=vlm.question(batch), or "
                         "clip=(patches, texts, valid) of CLIP embeddings, with units that have "
                         "one row per question")
    next(pictures(units, keep, "projected"))           # it must have been read
    tokens, *text = clip or (units.readings["projected"], *question)
    sign = sign or (-1 if clip or as_released else 1)
    parts = []
    for b, (words, real) in enumerate(zip(*text)):
        own = unit_length(tokens[units.image_of == b].float())
        parts.append((own @ unit_length(words[real].float()).T).mean(1))
    relevance = torch.cat(parts) * sign
    units = replace(units, readings=units.readings | {"relevance": relevance})
    span = (relevance.min(), relevance.max()) if as_released else None
    views, budgets = by_view(units, keep)
    keeps = []
    for here, k, x, r in pictures(views, budgets, "projected", "relevance"):
        chosen = spread(x, scaled(r, span), k, bounded=not as_released)
        keeps.append(here[chosen].unique())
    return units.together(keeps)


def way(vlm, seed: int = 0) -> Way:
    return Way(lambda asked, k: select(asked.units, k, question=asked.question),
               reads_question=True, needs=needs(vlm))


def scaled(relevance: Tensor, span: tuple | None) -> Tensor:
    """(n,) from 0 to 1, over these tokens or from a given smallest to a largest."""
    low, high = span or (relevance.min(), relevance.max())
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


def spread(x: Tensor, relevance: Tensor, k: int, bounded: bool = True) -> Tensor:
    """(k,) as chosen: greedy MAP of the process with kernel r_i cos(x_i, x_j) r_j (Chen et al.,
    2018, Algorithm 1)."""
    x = unit_length(x)
    kernel = relevance[:, None] * (x @ x.T) * relevance
    left = kernel.diagonal().clone()                   # what each token would add, squared
    chosen = []
    basis = x.new_zeros(k, len(x))
    for i in range(k):
        j = int(left.argmax())
        chosen.append(j)
        basis[i] = (kernel[j] - basis[:i, j] @ basis[:i]) / left[j].sqrt()
        left = left - basis[i] ** 2
        if bounded:
            left = left.clamp(min=1e-10)
            left[chosen] = -torch.inf
        else:
            left[j] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64, device=x.device)
