"""CDPruner (NeurIPS 2025, arXiv:2506.10967): a determinantal point process over tokens, conditioned
on the question.

Kernel r_i cos(x_i, x_j) r_j of projected features x; r is relevance: the mean cosine to the
question, from 0 to 1 in each view. Greedy MAP, crop by crop, all crops of a batch step by step
together.

cdpruner        relevance of CLIP's embeddings, MINUS the cosine: of its patches and texts that is
                inverted, the authors say. LLaVA ships no text tower: text_tower.py finds it, or
                says why it cannot, and then there is no cdpruner
cdpruner_words  a variant for every backbone: projected tokens and the language model's embeddings
                of the question's words, a space where the sign is plus [ours: in the tiny LLaVA,
                minus keeps less evidence than chance]; the OpenVINO port of this variant has minus

Released code: scales r over the whole batch, so that pictures depend on one another; and does not
bound what is left of a token's volume: with a kernel of rank below K it goes negative, and the code
picks NaN and repeats itself.
"""

from dataclasses import replace

import torch
from torch import Tensor

from runs import Way

from . import by_view, pictures, text_tower, unit_length
from .greedy import Rows, in_parts

NAMES = {"cdpruner": {}, "cdpruner_words": {"words": True}}
# what the released code takes off a question before CLIP reads it
ENDING = "\nAnswer the question using a single word or phrase."


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
    relevance = []
    for own, words, real in zip(tokens.split(units.counts), *text):
        own, words = unit_length(own.float()), unit_length(words[real].float())
        relevance.append((own @ words.T).mean(1))
    relevance = torch.cat(relevance) * sign
    units = replace(units, readings=units.readings | {"relevance": relevance})
    span = (relevance.min(), relevance.max()) if as_released else None
    found = pictures(*by_view(units, keep), "projected", "relevance")
    keeps = []
    for here, budgets, x, r in in_parts(found):
        kernels = kernel(x, [scaled(own, span) for own in r])
        picked = spread(kernels, max(budgets), bounded=not as_released)
        keeps += [own[row[:k]].unique() for own, row, k in zip(here, picked, budgets)]
    return units.together(keeps)


def way(vlm, seed: int = 0, words: bool = False, tower: str | None = None) -> Way:
    """tower: a folder or a name on the hub, of the CLIP model whose text tower to read in place of
    the one in text_tower.TOWERS. Raises ValueError if there is none for this backbone."""
    if words:
        return Way(lambda asked, k: select(asked.units, k, question=asked.question),
                   reads_question=True, needs=needs(vlm))
    clip = text_tower.load(vlm, tower)
    print(f"cdpruner: the question is read by the text tower of {clip.name}")

    def chosen(asked, k) -> list[Tensor]:
        texts = [text.replace(ENDING, "") for text in asked.texts]
        return select(asked.units, k, clip=(clip.patches(asked.units.feats), *clip.read(texts)))
    return Way(chosen, reads_question=True, needs=needs(vlm))


def scaled(relevance: Tensor, span: tuple | None) -> Tensor:
    """(n,) from 0 to 1, over these tokens or from a given smallest to a largest."""
    low, high = span or (relevance.min(), relevance.max())
    return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)


def kernel(x: list[Tensor], relevance: list[Tensor]) -> Tensor:
    """B of (n, d) and of (n,) -> (B, N, N), r_i cos(x_i, x_j) r_j. The diagonal is -inf behind a
    picture's last token, all else there 0."""
    n = max(map(len, x))
    kernels = x[0].new_zeros(len(x), n, n)
    for whole, tokens, r in zip(kernels, x, relevance):
        tokens = unit_length(tokens)
        own = whole[:len(r), :len(r)]                  # one product each: padding costs nothing
        torch.mm(tokens, tokens.T, out=own)
        own.mul_(r[:, None]).mul_(r)
        whole.diagonal()[len(r):] = -torch.inf
    return kernels


def spread(kernels: Tensor, k: int, bounded: bool = True) -> Tensor:
    """(B, k) as chosen: greedy MAP of the processes with kernels (B, N, N) (Chen et al., 2018,
    Algorithm 1). Those behind a picture's last token mean nothing."""
    picture = torch.arange(len(kernels), device=kernels.device)
    rows = Rows(kernels)
    left = kernels.diagonal(dim1=1, dim2=2).clone()    # what each token would add, squared
    lowest = torch.full_like(left, 1e-10 if bounded else -torch.inf)
    basis = kernels.new_zeros(len(kernels), k, kernels.shape[1])
    picked = []
    for i in range(k):
        j = left.argmax(1)
        picked.append(j)
        own = rows(j)
        if i:
            known = basis[:, :i]
            own.sub_(torch.bmm(basis[picture, :i, j][:, None], known)[:, 0])
        j = j[:, None]
        own.div_(left.gather(1, j).sqrt_())
        basis[:, i] = own
        left.sub_(own.square_())
        left.scatter_(1, j, -torch.inf)
        if bounded:                                    # -inf where chosen, which is never again
            lowest.scatter_(1, j, -torch.inf)
            torch.maximum(left, lowest, out=left)
    return torch.stack(picked, 1) if picked else picture[:, None][:, :0]
