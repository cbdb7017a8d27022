"""StepPrune: a pointer picks one visual token a step, sees what it has picked, and decides when to stop.

"Stepwise Token Selection for Efficient Multimodal Large Language Models", arXiv:2606.16067.
Letters and shapes as in autoselect.py.

    (2)  pi(S) = prod_t pi_t(a_t | a_<t, v, text),  a_t one of N tokens or stop        StepPrune.rollout
    (3)  [H; .] = Enc([v ; g_text W_text E_text])                                      Encoder, text_gate
    (4)  M = [H; h_stop]                                                               StepPrune.memory
    (5)  u_t = Dec(u_start, e_1 .. e_t-1; M)                                           Decoder
    (6)  pi_t = softmax(logits_t / tau_p + m_t), the logits of the last cross-attention    pointer
    (7)  a_t = argmax pi_t                                                             StepPrune.rollout
    (8)  m_t+1 = m_t, -inf at a_t; stop is never masked                                close
         e_t = M[a_t], with the gradient of sum_j pi_t(j) M_j added                    straight_through
    (9)  log pi(S) = sum_t log pi_t(a_t)                                               log_probability
    (10) alive_t = prod_r<t (1 - pi_r(stop))                                           alive
    (11) s_i = sum_t gamma^(t-1) alive_t pi_t(i)                                       aggregate
    (12) a = SoftTopK(s; K_bar, tau)                                                   zscore, soft_topk (autoselect)
    (13) v~ = sqrt(a) v + sqrt(1 - a) e        (14) the denoiser                       NoiseGate (autoselect)
    (15) loss = -log p(answer | text, v~) + lambda |S| / N                             expected_count

Shapes  T steps, E_text (B, L, D) word embeddings of the question, M (B, N+1, C) with stop last
        pi (B, T, N+1) | picks (B, T) int64, N for stop | on (B, T) True until the row has stopped, stop included
Read    downwards: the equations in the paper's order, then StepPrune, which strings them together.
Ours    - The last decoder layer ends at its pointer logits: its read-out and feed-forward would feed nothing.
        - The text has LayerNorm before W_text and learned positions after it; memory has LayerNorm.
        - W_text starts as the inverse of the frozen projector (align), so that words and tokens can be compared.
        - hops: through a chain of straight-through picks the gradient can grow exponentially, once the pointer's
          logits are large. The picks are made without a graph; then all steps are computed again at once, hops + 1
          times, so that a gradient passes at most `hops` picks. hops=-1 keeps the graph of the loop itself, the
          paper's plain rule.
        - Stop is shut at the first step, in training too: one token is always kept. stop_bias is ours.
        - The decoder has no step positions: order enters by causality and by which pick is the newest.
        - stop="encoded": h_stop goes through the encoder beside the tokens, so that "how many" can hold it back; a
          constant h_stop knows of the question only what the picks tell.
        - length_weight: lambda is high at first, so that only the tokens that a question needs are worth their price
          and the policy has to read it; then low, so that questions that need many tokens get them.
        - Aggregation "last" is read literally: at the last step all picks are masked and score 0.
        - Steps after a row has stopped count for nothing, or its neighbours in the batch would change its loss.
        - budget="expected": K of Eq. 12 is each row's own expected count, so the answer's loss tells it when to stop.
        - The causal ablation masks [v ; text] in this order: no image token sees the question.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from autoselect import NoiseGate, block, soft_topk, standardise, zscore

AGGREGATIONS = ("full", "last", "uniform", "alive")


@dataclass
class Config:
    width: int = 1024             # C, 1024 for CLIP ViT-L                                  [paper: LLaVA-1.5]
    text_width: int = 4096        # D, of the language model's word embeddings              [paper: LLaVA-1.5]
    max_text: int = 128           # L, longest question                                     [ours]
    max_steps: int = 256          # T_max                                                   [ours]
    encoder_layers: int = 2       # pre-norm ViT blocks                                     [paper]
    decoder_layers: int = 2       # the last one is the pointer                             [ours]
    heads: int = 16               # as the vision encoder itself                            [ours]
    tau_pointer: float = 1.0      # tau_p of Eq. 6                                          [ours]
    gamma: float = 0.98           # Eq. 11                                                  [ours]
    aggregation: str = "full"     # Eq. 11 | "last" | "uniform" | "alive" (Table 4)         [paper]
    causal: bool = False          # the encoder's ablation (Table 4)                        [paper]
    budget: str = "batch_mean"    # K of Eq. 12: "batch_mean" | "expected"                  [paper; "expected" ours]
    momentum: float = 0.9         # of the running mean K_bar                               [ours]
    stop: str = "encoded"         # "learned": h_stop as it is | "encoded" with v and text [paper; "encoded" ours]
    hops: int = 1                 # fed-back picks that a gradient passes; -1 for all       [ours; paper: all]
    gate: str = "noise"           # Eq. 13                                                  [paper]
    denoiser: str = "diagonal"    # Eq. 14                                                  [paper]

    def __post_init__(self):
        for name, known in (("aggregation", AGGREGATIONS), ("stop", ("learned", "encoded")),
                            ("budget", ("batch_mean", "expected")),
                            ("gate", ("noise", "scale")), ("denoiser", ("diagonal", "global", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        if self.max_steps < 1 or self.max_text < 1 or self.decoder_layers < 1:
            raise ValueError(f"max_steps={self.max_steps}, max_text={self.max_text}, decoder_layers="
                             f"{self.decoder_layers}: expected at least 1 of each")


@dataclass
class Rollout:
    """One episode a row; the letters are those of the file's docstring.

    margin (B, T): how far the best token's logit stood above stop's; stop_bias moves stop against it.
    """
    pi: Tensor
    picks: Tensor
    on: Tensor
    margin: Tensor

    @property
    def count(self) -> Tensor:
        """(B,) int64, |S|: tokens picked before stop."""
        return (self.on & (self.picks < self.pi.shape[-1] - 1)).sum(1)


def text_gate(step: int, steps: int) -> float:
    """g_text of Eq. (3): 0 at step 0, 1 from `steps` on.

    In front of a pre-norm block only its first moments show: LayerNorm undoes any scale but 0.
    """
    return min(step / max(steps, 1), 1.0)


class Encoder(nn.Module):
    """H: the image tokens after two blocks in which they saw one another and the question.               Eq. (3)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.text_norm, self.text = nn.LayerNorm(cfg.text_width), nn.Linear(cfg.text_width, cfg.width)
        self.position = nn.Parameter(torch.randn(cfg.max_text, cfg.width) * 0.02)
        self.blocks = nn.ModuleList(block(cfg.width, cfg.heads) for _ in range(cfg.encoder_layers))
        self.norm, self.causal = nn.LayerNorm(cfg.width), cfg.causal

    @torch.no_grad()
    def align(self, v: Tensor, projected: Tensor) -> None:
        """Start where words and tokens can be compared. v (M, C) standardised, projected (M, D): the same tokens after
        the frozen projector. W_text becomes the linear map that undoes the projector best (ridge), so that a word
        lies where the tokens lie that the projector turns into it; and queries start equal to keys, so that tokens
        attend to what is like them."""
        x = F.pad(self.text_norm(projected.to(v)), (0, 1), value=1.0).double()
        ridge = 0.01 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        solution = torch.linalg.solve(x.mT @ x + ridge, x.mT @ v.double())
        self.text.weight.copy_(solution[:-1].mT)
        self.text.bias.copy_(solution[-1])
        for layer in self.blocks:
            query, key, _ = layer.self_attn.in_proj_weight.chunk(3)
            key.copy_(query)

    def forward(self, v: Tensor, valid: Tensor, text: Tensor, text_valid: Tensor, g_text: float) -> Tensor:
        """v (B, N, C) standardised, text (B, L, D); the two masks are False at padding. -> H (B, N, C)"""
        words = self.text(self.text_norm(text)) + self.position[:text.shape[1]]
        x, hidden = torch.cat([v, g_text * words], 1), ~torch.cat([valid, text_valid], 1)
        causal = None
        if self.causal:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        for layer in self.blocks:
            x = layer(x, src_mask=causal, src_key_padding_mask=hidden)
        return self.norm(x[:, :v.shape[1]])


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made once and kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, C) -> keys, values (B, heads, S, C / heads)."""
        k, v = self.kv(x).chunk(2, -1)
        return tuple(y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (k, v))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Causal self-attention over the picks, cross-attention to the memory, feed-forward; pre-norm.      Eq. (5)

    In the last layer the logits of cross-attention are the pointer, one head, and nothing comes after them.
    """

    def __init__(self, width: int, heads: int, last: bool):
        super().__init__()
        self.norm, self.own = nn.LayerNorm(width), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        if last:
            self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.cross, self.forward_norm = Attention(width, heads), nn.LayerNorm(width)
            self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Decoder(nn.Module):
    """The pointer decoder: a step at a time from caches, or all at once where the picks are known.   Eqs. (5), (6)"""

    def __init__(self, cfg: Config):
        super().__init__()
        last = cfg.decoder_layers - 1
        self.layers = nn.ModuleList(DecoderLayer(cfg.width, cfg.heads, i == last) for i in range(last + 1))

    def project(self, memory: Tensor) -> list:
        """Keys and values of M for every layer, made once an episode; of the last layer the keys alone."""
        return [layer.cross.keys(memory) for layer in self.layers[:-1]] + [self.layers[-1].key(memory)]

    def forward(self, x: Tensor, cache: list, projected: list, open_: Tensor) -> Tensor:
        """x (B, S, C), the newest S picks -> pointer logits (B, S, N+1).

        cache: per layer the keys and values of the picks before, None for none, grown here by those of x. open_
        (B, N+1): False at padding, which no cross-attention may read.
        """
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for i, layer in enumerate(self.layers):
            new = layer.own.keys(layer.norm(x))
            cache[i] = new if cache[i] is None else tuple(torch.cat(pair, 2) for pair in zip(cache[i], new))
            x = x + layer.own(layer.norm(x), *cache[i], ahead if x.shape[1] > 1 else None)
            if i < len(self.layers) - 1:
                x = x + layer.cross(layer.cross_norm(x), *projected[i], open_[:, None, None])
                x = x + layer.feed_forward(layer.forward_norm(x))
        q = layer.query(layer.cross_norm(x))
        return q @ projected[-1].mT / q.shape[-1] ** 0.5


def pointer(logits: Tensor, m: Tensor, tau: float) -> Tensor:
    """pi_t (..., N+1) = softmax(logits / tau_p + m_t).                                                  Eq. (6)"""
    return (logits / tau + m).softmax(-1)


def close(m: Tensor, pick: Tensor) -> Tensor:
    """m_t+1 (B, N+1): -inf at the picks (B,); stop, the last slot, stays open.                          Eq. (8)"""
    taken = F.one_hot(pick, m.shape[1]).bool()
    taken[:, -1] = False
    return m.masked_fill(taken, -torch.inf)


def straight_through(pi: Tensor, memory: Tensor, pick: Tensor) -> Tensor:
    """e_t (B, T, C) = M[a_t] + soft - stopgrad(soft), soft = sum_j pi_t(j) M_j.                         Eq. (8)

    Its value is the hard pick, exactly; its gradient reaches pi_t as if all slots had been blended. M receives both:
    the pick's own and the blend's.
    """
    soft = pi @ memory
    return memory[torch.arange(len(pick), device=pick.device)[:, None], pick] + (soft - soft.detach())


def log_probability(pi: Tensor, picks: Tensor, on: Tensor) -> Tensor:
    """log pi(S) (B,) of the episodes.                                                                   Eq. (9)"""
    return (pi.gather(2, picks.unsqueeze(2)).squeeze(2).log().masked_fill(~on, 0)).sum(1)


def alive(pi_stop: Tensor) -> Tensor:
    """alive_t (B, T) = prod_r<t (1 - pi_r(stop)), 1 at the first step.                                  Eq. (10)"""
    return F.pad((1 - pi_stop).cumprod(1)[:, :-1], (1, 0), value=1.0)


def aggregate(pi: Tensor, on: Tensor, gamma: float, how: str = "full") -> Tensor:
    """s_i (B, N) = sum_t gamma^(t-1) alive_t pi_t(i), or what Table 4 puts in its place.                Eq. (11)

    last: pi of the row's last step. uniform: neither alive nor gamma. alive: alive alone.
    """
    steps = torch.arange(pi.shape[1], device=pi.device).to(pi)
    if how == "last":
        weight = (steps == on.sum(1, keepdim=True) - 1).to(pi)
    else:
        weight = on * (1 if how == "uniform" else alive(pi[..., -1]))
        weight = weight * gamma ** steps if how == "full" else weight
    return (weight.to(pi).unsqueeze(1) @ pi[..., :-1]).squeeze(1)


def expected_count(pi: Tensor, on: Tensor) -> Tensor:
    """(B,) sum_t alive_t (1 - pi_t(stop)) along the greedy picks: |S| of Eq. (15) with a gradient through alive."""
    return (on * alive(pi[..., -1]) * (1 - pi[..., -1])).sum(1)


def length_weight(step: int, steps: int, peak: float, end: float) -> float:
    """lambda of Eq. (15): up to `peak` in the first 15 % of the steps, there until 45 %, by equal factors down to `end`
    at 90 %. The paper's is constant; `peak` = `end` is all but that."""
    done = step / max(steps, 1)
    fall = min(max((done - 0.45) / 0.45, 0.0), 1.0)
    return min(done / 0.15, 1.0) * peak * (end / peak if peak else 1.0) ** fall


def stops(margin: Tensor, bias: float, least: int = 1) -> Tensor:
    """(B,) tokens picked before stop wins, when `bias` is added to stop's logit. margin (B, T) of episodes that did not
    stop; the order of the picks does not depend on the bias, for stop is never fed back."""
    stop = margin < bias
    stop[:, :least] = False
    return torch.where(stop.any(1), stop.int().argmax(1), margin.shape[1])


def calibrate(margin: Tensor, mean: float, least: int = 1) -> float:
    """The stop bias with which these episodes (B, T), run without stopping, keep `mean` tokens on average."""
    if not least <= mean <= margin.shape[1]:
        raise ValueError(f"a mean of {mean} tokens: expected {least} to {margin.shape[1]}, the steps of these episodes")
    low, high = -1e4, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stops(margin, middle, least).double().mean() > mean else (low, middle)
    return high


class StepPrune(NoiseGate, PyTorchModelHubMixin):
    """Policy, gate and denoiser around a frozen VLM: forward() while training, select() afterwards."""

    def __init__(self, cfg: Config):
        super().__init__(cfg.width, cfg.heads, cfg.gate, cfg.denoiser)
        self.cfg, self.encoder, self.decoder = cfg, Encoder(cfg), Decoder(cfg)
        self.start = nn.Parameter(torch.randn(cfg.width) * 0.02)              # u_start
        self.stop = nn.Parameter(torch.randn(cfg.width))                      # h_stop, of the memory's scale
        self.register_buffer("k_bar", torch.zeros(()))                        # 0: no batch seen yet

    def align(self, v: Tensor, projected: Tensor) -> None:
        """Before the first step: Encoder.align from tokens v (M, C) or (M, P, C), standardised by their own mean and
        std, and the (M, D) that the frozen projector makes of them."""
        x = v.reshape(-1, v.shape[-1]).float()
        x = standardise(v.float(), x.mean(0), x.std(0))
        self.encoder.align(x.mean(1) if x.dim() == 3 else x, projected)

    def memory(self, v, valid, text, text_valid, g_text: float = 1.0) -> Tensor:
        """M (B, N+1, C).                                                                                Eq. (4)"""
        if text.shape[1] > self.cfg.max_text:
            raise ValueError(f"a question of {text.shape[1]} tokens: expected at most max_text={self.cfg.max_text}")
        if not text_valid.any(1).all():
            raise ValueError(f"row {int(text_valid.any(1).int().argmin())} has an empty question: expected some text")
        x = standardise(v, self.mean, self.std)
        x, stop = x.mean(2) if x.dim() == 4 else x, self.stop.expand(len(x), 1, -1)
        if self.cfg.stop == "encoded":
            x, valid = torch.cat([x, stop], 1), F.pad(valid, (0, 1), value=True)
        hidden = self.encoder(x, valid, text.to(x.dtype), text_valid, g_text)
        return hidden if self.cfg.stop == "encoded" else torch.cat([hidden, stop], 1)

    def rollout(self, memory: Tensor, valid: Tensor, stop_bias: float = 0.0, least: int = 1,
                most: int | None = None) -> Rollout:
        """One episode a row: at least `least` tokens, at most `most` [max_steps]; ends when all rows have stopped."""
        fewest, most = int(valid.sum(1).min()), min(self.cfg.max_steps if most is None else most, valid.shape[1])
        if not 1 <= least <= min(most, fewest):
            raise ValueError(f"least={least}, most={most}: expected 1 <= least <= most and least <= {fewest} tokens")
        open_ = F.pad(valid, (0, 1), value=True)
        m = torch.zeros_like(memory[..., 0]).masked_fill(~open_, -torch.inf)
        bias, not_yet = torch.zeros_like(m), torch.zeros_like(m)
        bias[:, -1], not_yet[:, -1] = stop_bias, -torch.inf
        projected, cache = self.decoder.project(memory), [None] * len(self.decoder.layers)
        x, stopped, steps = self.start.expand(len(m), 1, -1), torch.zeros_like(valid[:, 0]), []
        for t in range(most):
            logits = self.decoder(x, cache, projected, open_)[:, 0]
            pi = pointer(logits + bias, m if t >= least else m + not_yet, self.cfg.tau_pointer)
            pick = pi.argmax(-1)
            steps.append((pi, pick, ~stopped, ((logits + m)[:, :-1].amax(1) - logits[:, -1]).detach()))
            stopped = stopped | (pick == m.shape[1] - 1)
            if stopped.all():
                break
            x, m = straight_through(pi[:, None], memory, pick[:, None]), close(m, pick)
        return Rollout(*(torch.stack(column, 1) for column in zip(*steps)))

    def replay(self, memory: Tensor, valid: Tensor, picks: Tensor, hops: int = 0, least: int = 1) -> Tensor:
        """pi (B, T, N+1) along given picks (B, T), all steps at once; a gradient passes at most `hops` picks."""
        before = picks[:, :-1]
        shut = F.pad(F.one_hot(before, memory.shape[1]).cumsum(1), (0, 0, 1, 0)) > 0           # earlier picks ...
        shut[..., -1] = False
        shut[:, :least, -1] = True
        open_ = F.pad(valid, (0, 1), value=True)
        m = torch.zeros_like(shut, dtype=memory.dtype).masked_fill(shut | ~open_[:, None], -torch.inf)
        projected, start = self.decoder.project(memory), self.start.expand(len(memory), 1, -1)
        fed = memory[torch.arange(len(memory), device=memory.device)[:, None], before]
        for _ in range(hops + 1):
            x, cache = torch.cat([start, fed], 1), [None] * len(self.decoder.layers)
            pi = pointer(self.decoder(x, cache, projected, open_), m, self.cfg.tau_pointer)
            fed = straight_through(pi[:, :-1], memory, before)
        return pi

    def forward(self, v, valid, text, text_valid, tau: float, g_text: float = 1.0, generator=None,
                everyone=lambda x: x):
        """v (B, N, C) or (B, N, P, C) -> (v~ after the denoiser, a (B, N), Rollout, expected count (B,)).

        generator: one, or a list with one per row. everyone: what makes of a number of these rows its mean over all
        processes, for K_bar.
        Raises ValueError for an empty or too long question, and for max_steps above N.
        """
        if self.training and self.alone:
            self.update_statistics(v, valid)
        if self.cfg.max_steps > v.shape[1]:
            raise ValueError(f"max_steps={self.cfg.max_steps}: expected at most the {v.shape[1]} visual tokens")
        memory = self.memory(v, valid, text, text_valid, g_text).to(self.stop.dtype)
        with torch.autocast(v.device.type, enabled=False):         # an argmax of rounded logits would be another pick
            with torch.set_grad_enabled(self.cfg.hops < 0 and torch.is_grad_enabled()):
                episode = self.rollout(memory, valid)
            if self.cfg.hops >= 0:
                episode = replace(episode, pi=self.replay(memory, valid, episode.picks, self.cfg.hops))
        expected, mean = expected_count(episode.pi, episode.on), everyone(episode.count.float().mean())
        if self.training and self.cfg.budget == "batch_mean":
            self.k_bar = mean if self.k_bar == 0 else self.k_bar.lerp(mean, 1 - self.cfg.momentum)
        s = aggregate(episode.pi, episode.on, self.cfg.gamma, self.cfg.aggregation)
        a = soft_topk(zscore(s, valid), expected if self.cfg.budget == "expected" else self.k_bar, tau, valid)
        return self.gated(v, a, valid, generator), a, episode, expected

    @torch.no_grad()
    def picks(self, v, valid, text, text_valid, stop_bias: float = 0.0, least: int = 1, most: int | None = None):
        """The picks of each row in the order in which they were made, a list of B int64 tensors."""
        if not abs(stop_bias) < torch.inf:
            raise ValueError(f"stop_bias={stop_bias}: expected a finite number")
        episode = self.rollout(self.memory(v, valid, text, text_valid), valid, stop_bias, least, most)
        return [row[:n] for row, n in zip(episode.picks, episode.count.tolist())]

    def select(self, v, valid, text, text_valid, **how) -> list[Tensor]:
        """The tokens that reach the language model, ascending; exactly K with least = most = K."""
        return [row.sort().values for row in self.picks(v, valid, text, text_valid, **how)]
