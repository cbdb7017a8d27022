"""StepPrune: a pointer picks one visual token a step, sees its picks, and decides when to stop.

"Stepwise Token Selection for Efficient Multimodal Large Language Models", arXiv:2606.16067.

    (2)  pi(S) = prod_t pi_t(a_t | a_<t, v, text), a_t: N tokens or stop    StepPrune.rollout
    (3)  [H; .] = Enc([v; g_text W_text E_text])                            Encoder, text_gate
    (4)  M = [H; h_stop]                                                    StepPrune.memory
    (5)  u_t = Dec(u_start, e_1 .. e_t-1; M)                                Decoder
    (6)  pi_t = softmax(logits_t / tau_p + m_t), the logits of the          pointer
         last layer's cross-attention
    (7)  a_t = argmax pi_t                                                  StepPrune.rollout
    (8)  m_t+1 = m_t, -inf at a_t; stop stays open                          close
         e_t = M[a_t], with the gradient of sum_j pi_t(j) M_j added         straight_through
    (9)  log pi(S) = sum_t log pi_t(a_t)                                    log_probability
    (10) alive_t = prod_r<t (1 - pi_r(stop))                                alive
    (11) s_i = sum_t gamma^(t-1) alive_t pi_t(i)                            aggregate
    (12) a = SoftTopK(s; K_bar, tau)                                        zscore, soft_topk
    (13) v~ = sqrt(a) v + sqrt(1 - a) e    (14) the denoiser                NoiseGate
    (15) loss = -log p(answer | text, v~) + lambda |S| / N                  StepPrune.loss

Shapes  as in autoselect.py, where Eqs. (12)-(14) are; a row is one question about one image
        T steps | E_text, text (B, L, D) word embeddings of the question
        M (B, N+1, C), stop last | pi (B, T, N+1) | picks (B, T) int64, N for stop
        on (B, T) True until the row has stopped, that step included
Read    downwards: the equations in the paper's order, then StepPrune, which strings them together.

An episode has at most max_steps picks, and at most as many as the picture has tokens.

What differs from the paper, or what it leaves open [ours]
- Section 4.1 states T_max, gamma, lambda, learning rates and batch, but their numbers are missing
  from the text at hand: "value not available", not "left open". Ours stand in their place.
- Eq. 12 cites the top-K by optimal transport of Xie et al., arXiv:2002.06504. With squared costs
  and two targets its plan is AutoSelect's sigmoid (a test runs Sinkhorn), tau half its epsilon;
  what is ours is the z-score in front, without which a tau would have to fit the scores' scale.
- k_rule="expected": K of Eq. 12 is each row's own expected count, so that the answer's loss tells
  the policy when to stop. K_bar carries no gradient.
- hops=1: through a chain of straight-through picks a gradient can grow exponentially, once the
  logits are large. The picks are made without a graph, then all steps are computed again at once,
  hops + 1 times: a gradient passes at most `hops` picks. -1 keeps the loop's own graph [paper].
- stop="encoded": h_stop goes through the encoder beside the tokens, where the question can hold it
  back. A constant h_stop [paper] knows of the question only what the picks tell.
- Stop is shut at the first step, in training too: one token is always kept.
- lambda rises to 3 and falls to 0.1. At a high price only what the question needs is worth keeping,
  so the policy has to read it; at a low one, counts get many tokens. Constant at 1 it learned to
  point, but to what stands out, whatever the question (one trial).
- align: W_text starts as the inverse of the frozen projector, so that words and tokens compare.
- g_text rises in the first 50 steps. Section 3.2 says early, 4.1 over the course of training.
- The paper does not say how it reaches a mean K. Here a stop bias does, found on other questions.
- The last decoder layer ends at its pointer logits: what follows there would feed nothing. Steps
  have no positions: causality tells the order. The number of layers is open.
- The text has LayerNorm before W_text and learned positions after it; memory has LayerNorm.
- Steps after a row has stopped count for nothing, or its neighbours would change its loss.
- Table 4's "last" is read literally: all picks are closed by then and score 0. Its causal mask is
  over [v; text] in this order: no image token sees the question.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.hf_argparser import HfArg

import autoselect
from autoselect import (
    NoiseGate,
    block,
    draw,
    hard_topk,
    sharpness,
    soft_topk,
    standardise,
    temperature,
    zscore,
)
from common import check_finite
from runs import Way, check_options

AGGREGATIONS = ("full", "last", "uniform", "alive", "discounted")
NEVER = -1e4                              # a stop bias with which stop never wins


@dataclass
class Sizes(autoselect.Sizes):
    """What follows from the frozen VLM."""
    text_width: int = 4096                # D, of the language model's word embeddings

    @classmethod
    def of(cls, vlm, **options):
        return super().of(vlm, text_width=vlm.dim, **options)


@dataclass
class Config(Sizes):
    """Every option of the method; TINY and LARGE say what is used unless told otherwise."""
    max_text: int = HfArg(default=128, help="positions of a question's words; those behind share "
                                            "the last [ours]")
    max_steps: int = HfArg(
        default=192, help="T_max, most picks in training; in evaluation twice as many [ours: a "
                          "third of LLaVA's tokens; the paper's value not available]")
    layers: int = HfArg(default=2, help="encoder blocks of Eq. 3 [paper]")
    decoder_layers: int = HfArg(default=2, help="of Eq. 5, the pointer is the last [ours]")
    heads: int = HfArg(default=16, help="attention heads of all blocks [ours]")
    tau_pointer: float = HfArg(default=1.0, help="tau_p of Eq. 6 [ours]")
    gamma: float = HfArg(
        default=0.98, help="discount of Eq. 11 [ours; the paper's value not available]")
    aggregation: Literal[AGGREGATIONS] = HfArg(
        default="full", help="Eq. 11 [paper]; the others are Table 4's ablations")
    causal: bool = HfArg(default=False, help="Table 4's causal encoder; False [paper]")
    k_rule: Literal["expected", "batch_mean"] = HfArg(
        default="expected", help="K of Eq. 12: each row's expected count [ours], or K_bar [paper]")
    momentum: float = HfArg(default=0.9, help="of K_bar, the running mean count [ours]")
    stop: Literal["encoded", "learned"] = HfArg(
        default="encoded", help="h_stop: through the encoder [ours], or a constant [paper]")
    hops: int = HfArg(default=1, help="picks that a gradient passes [ours; paper: all, -1]")
    gate: Literal["noise", "scale"] = HfArg(
        default="noise", help="Eq. 13 [paper]; scale: AutoSelect's ablation")
    denoiser: Literal["diagonal", "global", "none"] = HfArg(
        default="diagonal", help="Eq. 14 [paper]; global: AutoSelect's ablation; none [ours]")
    tau_start: float = HfArg(
        default=1.0, help="temperature of Eq. 12 at the first step [ours: scores are all but 0 and "
                          "1, and z-scored lie 3 apart]")
    tau_end: float = HfArg(default=0.2, help="... and at the last [ours]")
    price: Literal["scheduled", "constant", "told"] = HfArg(
        default="scheduled", help="lambda of Eq. 15: rises and falls [ours], stays [paper], or "
                                  "falls further for some rows, which the policy is told [ours]")
    length_weight: float = HfArg(
        default=3.0, help="lambda of Eq. 15 at its peak [ours; the paper's value not available]")
    length_weight_end: float = HfArg(default=0.1, help="... and at the end [ours; paper: constant]")
    align: bool = HfArg(default=True, help="start W_text as the inverse of the projector [ours]")
    text_steps: int = HfArg(default=50, help="steps in which g_text of Eq. 3 rises to 1 [ours]")

    def __post_init__(self):
        check_options(self, max_text=1, max_steps=1, layers=0, decoder_layers=1, tau_pointer=1e-6,
                      gamma=(0, 1), momentum=(0, 1), hops=-1, tau_start=1e-6, tau_end=1e-6,
                      length_weight=0, length_weight_end=0, text_steps=0)
        if self.price == "told" and self.k_rule == "batch_mean":
            raise ValueError("price='told', k_rule='batch_mean': rows of other prices have no mean "
                             "in common, expected k_rule='expected'")


#               steps, pictures a step, learning rate, products but the pointer's in bfloat16 [ours]
TINY = dict(steps=600, batch=8, lr=1e-3, autocast=False, layers=2, heads=4,
            tau_start=1.0, tau_end=0.2, max_steps=48)
LARGE = dict(steps=5000, batch=16, lr=1e-4, autocast=True, layers=2, heads=16,
             tau_start=1.0, tau_end=0.2, max_steps=192, max_text=512)
# Table 1, or Table 2 on Qwen2.5-VL: `python -m examples.headline stepprune`
HEADLINE = dict(
    model="llava-hf/llava-1.5-7b-hf", train=dict(data="llava-665k"),
    deviations=("T_max, gamma, lambda, learning rates, batch of Section 4.1: value not available; "
                "ours instead",
                "training data and number of steps are not told: LLaVA-665K, 5,000 [ours]",
                "questions that steer the stop bias to a mean K are not scored"))


# ------------------------------------------------------------------------------------ Eq. (3)


def text_gate(number: int, rise: int) -> float:
    """g_text: 0 at step 0, 1 from step `rise` on.                                         Eq. (3)

    In front of a pre-norm block only its first moments show: LayerNorm undoes any scale but 0.
    """
    return min(number / max(rise, 1), 1.0)


class Encoder(nn.Module):
    """H: the image tokens after blocks in which they saw one another and the question.   Eq. (3)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.text_norm = nn.LayerNorm(cfg.text_width)
        self.text = nn.Linear(cfg.text_width, cfg.width)                   # W_text
        self.position = nn.Parameter(torch.randn(cfg.max_text, cfg.width) * 0.02)
        self.blocks = nn.ModuleList(block(cfg.width, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.causal = cfg.causal

    @torch.no_grad()
    def align(self, v: Tensor, projected: Tensor) -> None:
        """Start where words and tokens compare. v (M, C) standardised tokens; projected (M, D),
        what the frozen projector makes of them.

        W_text becomes the linear map that undoes the projector best (ridge regression): a word
        lies where the tokens lie that the projector turns into it. Queries start equal to keys:
        tokens attend to what is like them.
        """
        x = F.pad(self.text_norm(projected.to(v)), (0, 1), value=1.0).double()   # 1: the bias
        ridge = 0.01 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        solution = torch.linalg.solve(x.mT @ x + ridge, x.mT @ v.double())
        self.text.weight.copy_(solution[:-1].mT)
        self.text.bias.copy_(solution[-1])
        for layer in self.blocks:
            query, key, _ = layer.self_attn.in_proj_weight.chunk(3)
            key.copy_(query)

    def forward(self, v: Tensor, valid: Tensor, text: Tensor, text_valid: Tensor,
                g_text: float) -> Tensor:
        """v (B, N, C) standardised, text (B, L, D), masks False at padding -> H (B, N, C)."""
        # behind the last position a question goes on as a set of words
        places = torch.arange(text.shape[1], device=text.device).clamp(max=len(self.position) - 1)
        words = self.text(self.text_norm(text)) + self.position[places]
        x = torch.cat([v, g_text * words], 1)
        is_padding = ~torch.cat([valid, text_valid], 1)
        causal = None
        if self.causal:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for layer in self.blocks:
            x = layer(x, src_mask=causal, src_key_padding_mask=is_padding)
        return self.norm(x[:, :v.shape[1]])


# ------------------------------------------------------------------------------------ Eq. (5)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made once and kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, heads, S, C / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, C) -> keys, values (B, heads, S, C / heads)."""
        k, v = self.kv(x).chunk(2, -1)
        return self.split(k), self.split(v)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        attended = F.scaled_dot_product_attention(self.split(self.q(x)), k, v, mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Causal self-attention over the picks, cross-attention to M, feed-forward; pre-norm.

    In the last layer the logits of cross-attention are the pointer: one head, and nothing after.
    """

    def __init__(self, width: int, heads: int, is_last: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        if is_last:
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
        else:
            self.cross = Attention(width, heads)
            self.forward_norm = nn.LayerNorm(width)
            self.feed_forward = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Cache:
    """Keys and values of the picks so far, of every layer."""

    def __init__(self):
        self.kept = {}

    def add(self, layer: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The newest picks' (B, heads, S, C / heads), of a layer -> those of all picks."""
        if layer in self.kept:
            new = tuple(torch.cat(pair, 2) for pair in zip(self.kept[layer], new))
        self.kept[layer] = new
        return new


class Decoder(nn.Module):
    """One step at a time from a cache, or all at once where the picks are known.   Eqs. (5), (6)"""

    def __init__(self, cfg: Config):
        super().__init__()
        last = cfg.decoder_layers - 1
        self.layers = nn.ModuleList(
            DecoderLayer(cfg.width, cfg.heads, i == last) for i in range(cfg.decoder_layers))

    def project(self, memory: Tensor) -> list:
        """Keys and values of M for every layer, made once an episode; of the last only keys."""
        return [layer.cross.keys(memory) for layer in self.layers[:-1]] + [
            full_precision(self.layers[-1].key(memory))]

    def forward(self, x: Tensor, cache: Cache, projected: list, is_open: Tensor,
                seen: Tensor | None = None) -> Tensor:
        """x (B, S, C), the newest S picks -> pointer logits (B, S, N+1), at least float32.

        cache: of the picks before; grown here. is_open (B, N+1): False at padding, which no
        cross-attention may read. seen (S, T): which picks of the cache each one sees, by default
        those up to itself.
        """
        if seen is None and x.shape[1] > 1:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for i, layer in enumerate(self.layers):
            k, v = cache.add(i, layer.own.keys(layer.norm(x)))
            x = x + layer.own(layer.norm(x), k, v, seen)
            if layer is not self.layers[-1]:
                x = x + layer.cross(layer.cross_norm(x), *projected[i], is_open[:, None, None])
                x = x + layer.feed_forward(layer.forward_norm(x))
        q = full_precision(layer.query(layer.cross_norm(x)))
        return q @ projected[-1].mT / q.shape[-1] ** 0.5


# ------------------------------------------------------------------------------------ Eqs. (6)-(9)


def full_precision(x: Tensor) -> Tensor:
    """At least float32: logits of half precision would be equal by the dozen."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pointer(logits: Tensor, m: Tensor, tau: float) -> Tensor:
    """pi_t (..., N+1) = softmax(logits / tau_p + m_t).                                   Eq. (6)"""
    return (logits / tau + m).softmax(-1)


def close(m: Tensor, pick: Tensor) -> Tensor:
    """m_t+1 (B, N+1): -inf at the picks (B,); stop, the last slot, stays open.           Eq. (8)"""
    is_picked = F.one_hot(pick, m.shape[1]).bool()
    is_picked[:, -1] = False
    return m.masked_fill(is_picked, -torch.inf)


def with_stop(valid: Tensor) -> Tensor:
    """(B, N) -> (B, N+1): stop is a slot like the others, and always there."""
    return F.pad(valid, (0, 1), value=True)


def slots(memory: Tensor, picks: Tensor) -> Tensor:
    """M[a] (B, T, C) of picks (B, T)."""
    return memory[torch.arange(len(picks), device=picks.device)[:, None], picks]


def straight_through(pi: Tensor, memory: Tensor, picks: Tensor) -> Tensor:
    """e_t (B, T, C) = M[a_t] + soft - stopgrad(soft), soft = sum_j pi_t(j) M_j.           Eq. (8)

    Its value is the hard pick, exactly; its gradient reaches pi_t as if all slots had been
    blended. M receives both: the pick's own and the blend's.
    """
    soft = pi.to(memory.dtype) @ memory
    return slots(memory, picks) + (soft - soft.detach())


def log_probability(pi: Tensor, picks: Tensor, on: Tensor) -> Tensor:
    """log pi(S) (B,) of the episodes.                                                    Eq. (9)"""
    of_pick = pi.gather(2, picks.unsqueeze(2)).squeeze(2)
    return of_pick.log().masked_fill(~on, 0).sum(1)


# ------------------------------------------------------------------------------------ picks alone

EVERY = 16                                # picks of a captured graph [ours]
MOST_GRAPHS = 4                           # shapes whose graphs a selector keeps [ours]


class Episode:
    """What StepPrune.rollout() picks, Eqs. (5)-(8) without gradient and blend, in tensors that are
    written over: no shape grows and nothing waits for the device.

    So `every` picks can be one captured CUDA graph, and a pick compiles whole. A row goes on behind
    its stop, which is read off afterwards. `most` is T, rounded up to whole graphs.
    """

    def __init__(self, decoder: Decoder, tau: float, memory: Tensor, start: Tensor, valid: Tensor,
                 stop_bias: float, least: int, most: int, every: int = 1):
        self.decoder, self.tau, self.every, self.graph = decoder, tau, every, None
        self.most, self.at = -(-most // every) * every, None   # at: t where it is known outside
        rows, n, width = memory.shape
        self.memory, self.projected = memory, decoder.project(memory)
        self.is_open = with_stop(valid)
        self.m = full_precision(memory.new_zeros(rows, n)).masked_fill(~self.is_open, -torch.inf)
        self.m[:, -1] = -torch.inf                             # one token at least
        self.bias = torch.zeros_like(self.m[0])
        self.bias[-1] = stop_bias
        self.x = start.repeat(rows, 1, 1)                      # e_t-1
        heads = decoder.layers[0].own.heads
        self.own = [[memory.new_zeros(rows, heads, self.most, width // heads) for _ in "kv"]
                    for _ in decoder.layers]
        self.turns = torch.arange(self.most, device=memory.device)
        self.t = torch.zeros_like(self.turns[:1])
        self.shut = self.m.new_zeros(self.most + 1)            # what is added to stop
        self.shut[:least] = -torch.inf
        self.rows = torch.arange(rows, device=memory.device)[:, None]
        self.picks = torch.zeros_like(self.turns).repeat(rows, 1)
        self.margin = self.m.new_zeros(rows, self.most)
        self.stopped = torch.zeros_like(valid[:, 0])

    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves(vars(self)) if isinstance(x, Tensor)]

    def put(self, kept: Tensor, dim: int, x: Tensor) -> None:
        """x into the place of this pick."""
        if self.at is None:
            kept.index_copy_(dim, self.t, x)
        else:
            kept.narrow(dim, self.at, 1).copy_(x)

    def add(self, layer: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cache.add() without growing."""
        for kept, x in zip(self.own[layer], new):
            self.put(kept, 2, x)
        made = self.most if self.at is None else self.at + 1
        return tuple(kept[:, :, :made] for kept in self.own[layer])

    def step(self) -> None:
        """A pick of every row."""
        seen = self.turns[None] <= self.t if self.at is None else None
        logits = self.decoder(self.x, self, self.projected, self.is_open, seen)[:, 0]
        pi = pointer(logits + self.bias, self.m, self.tau)
        pick = pi.argmax(-1, keepdim=True)                                 # Eq. (7)
        self.put(self.margin, 1,
                 (logits + self.m)[:, :-1].amax(1, keepdim=True) - logits[:, -1:])
        self.put(self.picks, 1, pick)
        self.stopped.logical_or_(pick[:, 0] == logits.shape[1] - 1)
        self.x.copy_(self.memory[self.rows, pick])
        self.m.scatter_(1, pick, -torch.inf)                               # Eq. (8)
        self.t.add_(1)
        self.m[:, -1] = self.shut[self.t if self.at is None else self.at + 1]

    def run(self, may_stop: bool) -> tuple[Tensor, Tensor]:
        """picks, margin (B, T'), until all rows have stopped, if they may."""
        for made in range(self.every, self.most + 1, self.every):
            if self.graph:
                self.graph.replay()
            else:
                for t in range(made - self.every, made):
                    self.at = t
                    self.step()
            if may_stop and self.stopped.all():
                break
        return self.picks[:, :made].clone(), self.margin[:, :made].clone()

    def capture(self) -> "Episode":
        """One of the same shapes whose picks are a CUDA graph."""
        other = copy(self)
        vars(other).update(tree_map_only(Tensor, torch.clone, vars(self)))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other.step()                                       # kernels and libraries are loaded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.every):
                other.step()
        other.graph = graph
        return other

    def restart(self, like: "Episode") -> "Episode":
        """Go on as another episode of the same shapes."""
        for mine, x in zip(self.tensors(), like.tensors()):
            mine.copy_(x)
        return self


GRAPHS = WeakKeyDictionary()              # of each StepPrune: its captured episodes by shape


# ------------------------------------------------------------------------------------ Eq. (10)


def alive(pi_stop: Tensor) -> Tensor:
    """alive_t (B, T) = prod_r<t (1 - pi_r(stop)), 1 at the first step.                  Eq. (10)"""
    return F.pad((1 - pi_stop).cumprod(1)[:, :-1], (1, 0), value=1.0)


def aggregate(pi: Tensor, on: Tensor, gamma: float, how: str = "full") -> Tensor:
    """s_i (B, N) = sum_t gamma^(t-1) alive_t pi_t(i), or what Table 4 replaces it by.    Eq. (11)

    last: pi of the row's last step. uniform: neither alive nor gamma. alive: alive alone.
    discounted: gamma alone, the other reading of "dropping the alive weight".
    """
    steps = torch.arange(pi.shape[1], device=pi.device).to(pi)             # t - 1
    if how == "last":
        weight = steps == on.sum(1, keepdim=True) - 1
    elif how == "uniform":
        weight = on
    else:
        weight = on if how == "discounted" else on * alive(pi[..., -1])
    if how in ("full", "discounted"):
        weight = weight * gamma ** steps
    return (weight.to(pi).unsqueeze(1) @ pi[..., :-1]).squeeze(1)


def expected_count(pi: Tensor, on: Tensor) -> Tensor:
    """(B,) sum_t alive_t (1 - pi_t(stop)) along the picks: |S| with a gradient.         Eq. (15)"""
    return (on * alive(pi[..., -1]) * (1 - pi[..., -1])).sum(1)


def fall(number: int, total: int) -> float:
    """How far lambda has fallen at a step: 0 until 45 % of all steps, 1 from 90 % on."""
    return min(max((number / max(total, 1) - 0.45) / 0.45, 0.0), 1.0)


def length_weight(number: int, total: int, peak: float, end: float, fallen):
    """lambda of Eq. (15) at a step: up to `peak` in the first 15 % of all steps, and from there by
    equal factors down to `end`, as far as fallen says, a number or (B,) from 0 to 1."""
    rise = min(number / max(total, 1) / 0.15, 1.0)
    return rise * peak * (end / peak if peak else 1.0) ** fallen


# ------------------------------------------------------------------------------------ the stop bias


def stops(margin: Tensor, bias: float) -> Tensor:
    """(B,) tokens picked before stop wins, when `bias` is added to stop's logit.

    margin (B, T) of episodes that did not stop. Stop is never fed back, so the bias changes where
    an episode ends, not what it picks.
    """
    is_stop = margin < bias
    is_stop[:, 0] = False
    return torch.where(is_stop.any(1), is_stop.int().argmax(1), margin.shape[1])


def calibrate(margin: Tensor, mean: float) -> float:
    """The stop bias with which these episodes (B, T) keep `mean` tokens on average, or fewer."""
    if not 1 <= mean <= margin.shape[1]:
        raise ValueError(f"a mean of {mean} tokens: expected 1 to {margin.shape[1]}, the steps of "
                         "these episodes")
    low, high = -1e4, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if stops(margin, middle).double().mean() > mean:
            low = middle
        else:
            high = middle
    return high


# ------------------------------------------------------------------------------------ the method


@dataclass
class Rollout:
    """One episode a row: pi, picks and on as in the file's docstring.

    margin (B, T): how far the best token's logit stood above stop's.
    """
    pi: Tensor
    picks: Tensor
    on: Tensor
    margin: Tensor

    @property
    def count(self) -> Tensor:
        """(B,) int64, |S|: tokens picked before stop."""
        return (self.on & (self.picks < self.pi.shape[-1] - 1)).sum(1)


class StepPrune(NoiseGate):
    """Policy, gate and denoiser around a frozen VLM."""
    rows = "question"
    reads_question = True
    adaptive = True
    further_ways = ("exactly",)

    def __init__(self, cfg: Config):
        super().__init__(cfg.width, cfg.heads, cfg.gate, cfg.denoiser, cfg.unlike_patches)
        self.cfg = cfg
        self.most_kept = 2 * cfg.max_steps                      # of an adaptive selection
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.start = nn.Parameter(torch.randn(cfg.width) * 0.02)             # u_start
        self.stop = nn.Parameter(torch.randn(cfg.width))        # h_stop, of the memory's scale
        if cfg.price == "told":
            self.told = nn.Sequential(nn.Linear(1, cfg.width), nn.GELU(),
                                      nn.Linear(cfg.width, cfg.width))
        self.register_buffer("k_bar", torch.zeros(()))          # 0: no step seen yet

    # -------------------------------------------------------------------------------- training

    def begin(self, vlm, first_batch) -> None:
        """align() on 64 pictures, if the configuration says so."""
        if self.cfg.align:
            units = vlm.encode(first_batch(64).pictures)
            self.align(units.feats, vlm.project(units.feats))

    @torch.no_grad()
    def align(self, v: Tensor, projected: Tensor) -> None:
        """Encoder.align() from tokens v (M, C) or (M, P, C), standardised by their own mean and
        std, and projected (M, D)."""
        x = v.reshape(-1, v.shape[-1]).float()
        x = standardise(v.float(), x.mean(0), x.std(0))
        self.encoder.align(x.mean(1) if x.dim() == 3 else x, projected)

    @torch.no_grad()
    def observe(self, vlm, parts: list, step) -> None:
        """Statistics of the tokens; and K_bar of Eq. (12), once a step, from the mean count of all
        rows of the step. Each part by itself would make the selector depend on how many there are.
        """
        super().observe(vlm, parts, step)
        if self.cfg.k_rule != "batch_mean":
            return
        g_text = text_gate(step.number, self.cfg.text_steps)
        counts = []
        for batch, units in parts:
            v, valid = units.pad()
            with step.autocast():                               # the very picks that loss() makes
                memory = self.memory(v, valid, *vlm.question(batch.rows), g_text)
            counts.append(self.rollout(memory.to(self.stop.dtype), valid).count)
        counts = torch.cat(counts).double()
        total = step.sum(torch.stack([counts.sum(), torch.ones_like(counts).sum()]))
        mean = (total[0] / total[1]).to(self.k_bar)
        self.k_bar = mean if self.k_bar == 0 else self.k_bar.lerp(mean, 1 - self.cfg.momentum)

    def loss(self, vlm, batch, units, step) -> tuple[Tensor, dict]:
        """Eq. (15): the frozen VLM's own loss on gated tokens, and a price on every pick."""
        v, valid = units.pad()                                             # (B, N, C), (B, N)
        tau = temperature(step.number, step.total, self.cfg)
        g_text = text_gate(step.number, self.cfg.text_steps)
        question = vlm.question(batch.rows)
        noise = step.generators(batch.owner)
        fallen = torch.full_like(self.stop[:1], fall(step.number, step.total)).expand(len(v))
        if self.cfg.price == "told":
            fallen = fallen * draw(torch.rand, fallen.shape, noise, v.device)
        with step.autocast():
            gated, a, episode, expected = self(v, valid, *question, tau, g_text, noise, fallen)

        # Every token is still there: only signal was lost, no places. The VLM's loss is a mean over
        # this part's answer tokens, hence its factor; the ratio is one of each row.
        prompt = vlm.embed(batch.rows, units, units.flat(gated))
        nll = vlm.loss(prompt)
        ratio = expected / valid.sum(1)                                    # |S| / N, (B,)
        peak, end = self.cfg.length_weight, self.cfg.length_weight_end
        weight = length_weight(step.number, step.total, peak, end, fallen)
        if self.cfg.price == "constant":
            weight = torch.full_like(weight, peak)
        loss = nll * batch.answers / step.answers + (weight * ratio).sum() / step.rows

        count = episode.count.float()
        return loss, {"nll": nll.item(), "K": count.mean().item(),
                      "K_sd": count.std(correction=0).item(), "K_soft": expected.mean().item(),
                      "lambda": weight.mean().item(), "tau": tau, "sharpness": sharpness(a, valid)}

    def forward(self, v: Tensor, valid: Tensor, text: Tensor, text_valid: Tensor, tau: float,
                g_text: float = 1.0, generator=None, fallen: Tensor | float = 0.0
                ) -> tuple[Tensor, Tensor, Rollout, Tensor]:
        """v -> (v~ after the denoiser, like v; a (B, N); Rollout; expected count (B,)).

        Eqs. (2)-(14). Raises ValueError for an empty question.
        """
        memory = self.memory(v, valid, text, text_valid, g_text, fallen).to(self.stop.dtype)
        # an argmax of rounded logits would be another pick
        with torch.autocast(v.device.type, enabled=False):
            if self.cfg.hops < 0:
                episode = self.rollout(memory, valid)
            else:
                with torch.no_grad():
                    episode = self.rollout(memory, valid)
                episode = replace(
                    episode, pi=self.replay(memory, valid, episode.picks, self.cfg.hops))
        expected = expected_count(episode.pi, episode.on)
        k = expected if self.cfg.k_rule == "expected" else self.k_bar
        s = aggregate(episode.pi, episode.on, self.cfg.gamma, self.cfg.aggregation)
        a = soft_topk(zscore(s, valid), k, tau, valid)                     # Eq. (12)
        return self.gated(v, a, valid, generator), a, episode, expected    # Eqs. (13), (14)

    def memory(self, v: Tensor, valid: Tensor, text: Tensor, text_valid: Tensor,
               g_text: float = 1.0, fallen: Tensor | float = 0.0) -> Tensor:
        """M (B, N+1, C). fallen: how far lambda has, see length_weight(); read where the price is
        told.                                                                             Eq. (4)"""
        has_text = text_valid.any(1)
        if not has_text.all():
            row = int(has_text.int().argmin())
            raise ValueError(f"row {row} has an empty question: expected some text")
        x = standardise(v, self.mean, self.std)
        x = x.mean(2) if x.dim() == 4 else x
        stop = self.stop.expand(len(x), 1, -1)
        if self.cfg.price == "told":
            stop = stop + self.told(x.new_zeros(len(x), 1, 1) + torch.as_tensor(fallen).to(x)
                                    .reshape(-1, 1, 1))
        text = text.to(x.dtype)
        if self.cfg.stop == "encoded":
            x = torch.cat([x, stop], 1)
            return self.encoder(x, with_stop(valid), text, text_valid, g_text)
        return torch.cat([self.encoder(x, valid, text, text_valid, g_text), stop], 1)

    def rollout(self, memory: Tensor, valid: Tensor, stop_bias: float = 0.0, least: int = 1,
                most: int | None = None) -> Rollout:
        """One episode a row of at least `least` picks, at most `most`, by default max_steps, and at
        most as many as there are tokens. It ends when all rows have stopped.       Eqs. (2), (7)"""
        most = self.length(valid, least, most)
        is_open = with_stop(valid)
        m = torch.zeros_like(memory[..., 0]).masked_fill(~is_open, -torch.inf)
        bias = torch.zeros_like(m)
        bias[:, -1] = stop_bias
        not_yet = torch.zeros_like(m)
        not_yet[:, -1] = -torch.inf

        projected = self.decoder.project(memory)
        cache = Cache()
        x = self.start.expand(len(m), 1, -1)
        has_stopped = torch.zeros_like(valid[:, 0])
        steps = []
        for t in range(most):
            logits = self.decoder(x, cache, projected, is_open)[:, 0]
            pi = pointer(logits + bias, m if t >= least else m + not_yet, self.cfg.tau_pointer)
            pick = pi.argmax(-1)                                           # Eq. (7)
            margin = (logits + m)[:, :-1].amax(1) - logits[:, -1]
            steps.append((pi, pick, ~has_stopped, margin.detach()))
            has_stopped = has_stopped | (pick == m.shape[1] - 1)
            if has_stopped.all():
                break
            x = straight_through(pi[:, None], memory, pick[:, None])
            m = close(m, pick)
        return Rollout(*(torch.stack(column, 1) for column in zip(*steps)))

    def length(self, valid: Tensor, least: int, most: int | None) -> int:
        """The most picks of an episode. Raises ValueError where there cannot be as few or as many.
        """
        fewest = int(valid.sum(1).min())
        most = min(self.cfg.max_steps if most is None else most, valid.shape[1])
        if not 1 <= least <= min(most, fewest):
            raise ValueError(f"least={least}, most={most}: expected 1 <= least <= most and least "
                             f"<= {fewest} tokens")
        return most

    def replay(self, memory: Tensor, valid: Tensor, picks: Tensor, hops: int = 0,
               least: int = 1) -> Tensor:
        """pi (B, T, N+1) along picks (B, T), all steps at once; a gradient passes at most `hops`
        picks."""
        before = picks[:, :-1]
        times_picked = F.one_hot(before, memory.shape[1]).cumsum(1)
        is_shut = F.pad(times_picked, (0, 0, 1, 0)) > 0                    # nothing at step 1
        is_shut[..., -1] = False
        is_shut[:, :least, -1] = True
        is_open = with_stop(valid)
        m = torch.zeros_like(is_shut, dtype=memory.dtype)
        m = m.masked_fill(is_shut | ~is_open[:, None], -torch.inf)

        projected = self.decoder.project(memory)
        start = self.start.expand(len(memory), 1, -1)
        fed = slots(memory, before)
        for _ in range(hops + 1):
            x = torch.cat([start, fed], 1)
            logits = self.decoder(x, Cache(), projected, is_open)
            pi = pointer(logits, m, self.cfg.tau_pointer)
            fed = straight_through(pi[:, :-1], memory, before)
        return pi

    # -------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def episode(self, memory: Tensor, valid: Tensor, stop_bias: float = 0.0, least: int = 1,
                most: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """picks and margin of rollout(), and how many picks of each row come before stop (B,);
        without pi, and fast, see Episode. On CUDA there may be columns behind the last stop."""
        most = self.length(valid, least, most)
        episode = Episode(self.decoder, self.cfg.tau_pointer, memory, self.start, valid, stop_bias,
                          least, most, EVERY if memory.is_cuda else 1)
        if memory.is_cuda:
            episode = self.captured(episode)
        picks, margin = episode.run(may_stop=stop_bias > NEVER or not memory.is_cuda)
        picks, margin = picks[:, :most], margin[:, :most]
        return picks, margin, ((picks == valid.shape[1]).cumsum(1) == 0).sum(1)

    def captured(self, episode: Episode) -> Episode:
        """The same as a CUDA graph, which stays for further ones of its shapes; as it was where
        that fails, which is said once."""
        kept = GRAPHS.setdefault(self, {})
        key = (*((x.shape, x.dtype) for x in episode.tensors()),
               *(p.data_ptr() for p in self.decoder.parameters()))
        if key not in kept:
            while len(kept) >= MOST_GRAPHS:
                kept.pop(next(iter(kept)))
            kept[key] = None
            try:
                kept[key] = episode.capture()
            except RuntimeError as error:                       # whatever a device cannot do
                print(f"StepPrune picks without a CUDA graph, more slowly: "
                      f"{str(error).splitlines()[0][:100]}")
        return kept[key].restart(episode) if kept[key] else episode

    @torch.no_grad()
    def picks(self, units, question, stop_bias: float = 0.0, least: int = 1,
              most: int | None = None, fallen: float = 0.0) -> list[Tensor]:
        """The picks of each row in the order in which they were made, B int64 tensors."""
        if not abs(stop_bias) < torch.inf:
            raise ValueError(f"stop_bias={stop_bias}: expected a finite number")
        memory, valid = self.memory_of(units, question, fallen)
        order, _, count = self.episode(memory, valid, stop_bias, least, most)
        return [row[:n] for row, n in zip(order, count.tolist())]

    def memory_of(self, units, question, fallen: float = 0.0) -> tuple[Tensor, Tensor]:
        """memory() and valid. Raises ValueError where it is not finite: all logits would be NaN,
        and one token be picked over and over."""
        v, valid = units.pad()
        memory = self.memory(v, valid, *question, fallen=fallen)
        check_finite(memory, "states of the tokens")
        return memory, valid

    def turns(self, units, question, most: int) -> Tensor:
        """(B, N) when each token is picked, from the end, by an episode that does not stop: 1 for
        the first, 0 for those that are left after `most` picks."""
        turns = torch.zeros_like(units.pad()[1], dtype=torch.float32)
        for row, order in zip(turns, self.picks(units, question, NEVER, most=most)):
            row[order] = torch.arange(len(order), 0, -1, device=row.device).to(row) / len(order)
        return turns

    def select(self, units, question, keep) -> list[Tensor]:
        """The first `keep` picks of an episode that does not stop."""
        most = keep if isinstance(keep, int) else int(max(keep))
        return hard_topk(self.turns(units, question, most), keep, units.pad()[1])

    def scores(self, units, question) -> Tensor:
        return units.flat(self.turns(units, question, self.most_kept))

    def ways(self, names, budgets, calibration) -> dict[str, Way]:
        """It stops by itself, steered to a mean of K; "exactly": K for each question."""
        exactly = super().ways(names, budgets, calibration)[""]
        # long enough for a question that needs twice the mean
        most = max([self.most_kept, *(2 * k for k in budgets if k >= 1)])
        steering = self.calibrated(budgets, calibration(), most) if budgets else {}

        def adaptive(asked, k):
            orders = self.picks(asked.units, asked.question, most=most, **steering[k])
            return [order.sort().values for order in orders]
        ways = {"": Way(adaptive, reads_question=True, adaptive=True)}
        if "exactly" in names:
            ways[" exactly"] = exactly
        return ways

    @torch.no_grad()
    def calibrated(self, budgets: list, batches, most: int) -> dict:
        """{K: what picks() is given} for a mean of K on these (units, question), below 1 of that
        share of their tokens. One episode each of at most `most` picks serves all budgets; where
        the price is told, one at each of nine prices, and the bias does what the nearest leaves."""
        falls = [i / 8 for i in range(9)] if self.cfg.price == "told" else [0.0]
        margins, tokens = {fallen: [] for fallen in falls}, []
        for units, question in batches:
            for fallen in falls:
                memory, valid = self.memory_of(units, question, fallen)
                margin = self.episode(memory, valid, NEVER, most=most)[1]
                rest = most - margin.shape[1]
                margins[fallen].append(F.pad(margin, (0, rest), value=-torch.inf))   # no token left
            tokens += valid.sum(1).tolist()
        margins = {fallen: torch.cat(each) for fallen, each in margins.items()}
        unsteered = {fallen: stops(margin, 0.0).double().mean().item()
                     for fallen, margin in margins.items()}
        steering = {}
        for k in budgets:
            mean = max(k * sum(tokens) / len(tokens), 1) if k < 1 else k
            fallen = min(falls, key=lambda each: abs(unsteered[each] - mean))
            steering[k] = {"stop_bias": calibrate(margins[fallen], mean), "fallen": fallen}
        print(f"unsteered, it keeps {' '.join(f'{n:.1f}' for n in unsteered.values())} tokens on "
              "average; stop bias " + ", ".join(f"{how['stop_bias']:.2f} for {k}"
                                                for k, how in steering.items()))
        return steering


Method = StepPrune
