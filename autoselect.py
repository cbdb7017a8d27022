"""AutoSelect: a learned scorer decides which K of N visual tokens reach a frozen VLM's language model.

"The Model Knows Which Tokens Matter: Automatic Token Selection via Noise Gating", arXiv:2603.07135.

    (1)  train: least -log p(answer | text, v~) over scorer and denoiser    the host's own loss on v~
    (2)  test:  keep = the K best scores; no noise, no denoiser             hard_topk, AutoSelect.select
    (3)  s  = Linear(Blocks(v))                                             Scorer
    (4)  a  = sigmoid((z - theta) / tau),  z = zscore(s),  sum a = K        zscore, soft_topk, temperature
    (5)  v~ = sqrt(a) v + sqrt(1 - a) e,   e ~ N(0, I)                      vp_gate
         then one block in which a token sees only itself (Section 3.4)     Denoiser

Shapes  B images, N visual tokens, K kept, C width of a token between vision encoder and projector
        v (B, N, C) tokens | s, z (B, N) scores | a (B, N) share of signal, 0..1
        valid (B, N) False at padding, None without any | mean, std (C,) of the tokens
        v (B, N, P, C) where P patches are merged into one token later (Qwen2.5-VL, P = 4): they share one a
Read    downwards: the equations in the paper's order, then AutoSelect, which strings them together.
Ours    - The ends of tau's cosine, 1 and 0.05, which is close to the hard mask; train.py's are lower.
        - Depth: 5 scorer + 1 denoiser blocks of CLIP width are 75.6 M parameters, 6 + 1 are 88.2 M; the paper
          prints 84 M.
        - Eq. 5 keeps the variance only where it is 1, and Hugging Face's LLaVA reads a CLIP state that has no
          LayerNorm behind it: standardise per channel by running statistics, gate, scale back.
        - Scorer and denoiser read standardised tokens too: a few channels of the raw state dwarf all others.
        - No position embedding in the scorer: the encoder's features carry their position.
        - Of P patches the scorer sees the mean; gate and denoiser treat every patch on its own.
        - Denoiser: output layers start at zero, so it is the identity at step 0.
"""

import math
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn


@dataclass
class Config:
    width: int = 1024             # C, 1024 for CLIP ViT-L                        [paper: LLaVA-1.5]
    keep: int = 64                # K in training; the paper's tables: 64-192     [paper]
    layers: int = 5               # scorer blocks                                 [ours]
    heads: int = 16               # as the vision encoder itself                  [ours]
    tau_start: float = 1.0        # Eq. 4, first step                             [ours]
    tau_end: float = 0.05         # Eq. 4, last step                              [ours]
    gate: str = "noise"           # "noise" (Eq. 5) | "scale" (Table 5)           [paper]
    denoiser: str = "diagonal"    # "diagonal" | "global" (Table 5) | "none"      [paper; "none" ours]
    scorer: str = "learned"       # "learned" | "random" (Figure 5)               [paper]

    def __post_init__(self):
        for name, known in (("gate", ("noise", "scale")), ("denoiser", ("diagonal", "global", "none")),
                            ("scorer", ("learned", "random"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")


def hard_topk(s: Tensor, k, valid: Tensor | None = None) -> list[Tensor]:
    """Indices of the K best tokens of each image, in reading order; of equals the first wins.       Eq. (2)

    k is one number or one per image, hence a list of B ascending int64 tensors of length K.
    """
    ks = [k] * len(s) if isinstance(k, int) else [int(each) for each in k]
    if len(ks) != len(s):
        raise ValueError(f"{len(ks)} budgets for {len(s)} images")
    kept = []
    for b, k_b in enumerate(ks):
        tokens = torch.arange(s.shape[1], device=s.device) if valid is None else valid[b].nonzero().squeeze(1)
        if not 0 < k_b <= len(tokens):
            raise ValueError(f"keep={k_b} does not fit {len(tokens)} visual tokens")
        best = s[b, tokens].argsort(descending=True, stable=True)[:k_b]
        kept.append(tokens[best].sort().values)      # the language model's positions expect image order
    return kept


def block(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """The pre-norm Transformer block that scorer and denoiser are made of."""
    return nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                      batch_first=True, norm_first=True)


class Scorer(nn.Module):
    """s = Linear(Blocks(v)): all tokens look at one another, each gets one number.                 Eq. (3)"""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        # nn.TransformerEncoder would start every block as a copy of the first
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, v: Tensor, valid: Tensor | None = None) -> Tensor:
        for layer in self.blocks:
            v = layer(v, src_key_padding_mask=None if valid is None else ~valid)
        return self.head(self.norm(v)).squeeze(-1)               # (B, N)


def zscore(s: Tensor, valid: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """z = (s - mean) / std over the tokens of one image; 0 at padding.                              Eq. (4)

    So the scorer cannot undo tau by scaling its scores up. Half precision becomes float32.
    """
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    w = torch.ones_like(s) if valid is None else valid.to(s)
    n = w.sum(1, keepdim=True).clamp_min(1)
    d = (s - (s * w).sum(1, keepdim=True) / n) * w
    return d / (d.square().sum(1, keepdim=True) / n + eps).sqrt()


class _SoftTopK(torch.autograd.Function):
    """Eq. (4) with the gradient of the exact solution, not of the 60 steps that lead to it.

    Differentiate sum_i a_i = K: with g_i = a_i (1 - a_i),
        da_i/dz_j = g_i / tau (delta_ij - g_j / sum g)        da_i/dK = g_i / sum g.
    """

    @staticmethod
    def forward(ctx, z, k, tau, valid):
        x, n, k_ = z.double() / tau, valid.sum(1, keepdim=True).clamp_min(1), k.double().unsqueeze(1)
        # were all scores equal, theta would be x - logit(K / N): the true one lies between these two ends.
        # K = N and K = 0 put both at -inf or +inf, where every a is exactly 1 or 0.
        shift = torch.logit(k_ / n)
        low = x.masked_fill(~valid, math.inf).amin(1, keepdim=True) - shift
        high = x.masked_fill(~valid, -math.inf).amax(1, keepdim=True) - shift
        for _ in range(60):
            theta = (low + high) / 2
            too_many = torch.sigmoid(x - theta).masked_fill(~valid, 0).sum(1, keepdim=True) > k_
            low, high = torch.where(too_many, theta, low), torch.where(too_many, high, theta)
        a = torch.sigmoid(x - theta).masked_fill(~valid, 0)
        g = (a * torch.sigmoid(theta - x)).masked_fill(~valid, 0)          # 1 - a without cancellation
        ctx.save_for_backward(g)
        ctx.tau, ctx.dtypes = tau, (z.dtype, k.dtype)
        return a.to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (g,) = ctx.saved_tensors
        grad, total = grad.double(), g.sum(1, keepdim=True)
        mean = (g * grad).sum(1, keepdim=True) / total.clamp_min(1e-300)   # all saturated: 0, not 0/0
        dz, dk = g * (grad - mean) / ctx.tau, mean.squeeze(1)
        return dz.to(ctx.dtypes[0]), dk.to(ctx.dtypes[1]), None, None


def soft_topk(z: Tensor, k: float | Tensor, tau: float, valid: Tensor | None = None) -> Tensor:
    """a_i = sigmoid((z_i - theta) / tau), theta such that a sums to K over the image.               Eq. (4)

    tau -> 0 gives the 0/1 mask of the K largest. Differentiable in z and in K. One number K must fit every
    image; a tensor, () or (B,), is clamped to each image's token count. Half precision becomes float32.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if not isinstance(k, Tensor):
        fewest = z.shape[1] if valid is None else int(valid.sum(1).min())
        if not 0 < k <= fewest:
            raise ValueError(f"keep={k} does not fit {fewest} visual tokens")
    valid = torch.ones_like(z, dtype=torch.bool) if valid is None else valid.bool()
    k = torch.as_tensor(k, dtype=z.dtype, device=z.device).expand(len(z))
    return _SoftTopK.apply(z, torch.minimum(k.clamp_min(0), valid.sum(1).to(k)), float(tau), valid)


def temperature(step: int, steps: int, cfg: Config) -> float:
    """tau of Eq. (4) at a step: a cosine from tau_start at 0 to tau_end at `steps`, flat after."""
    done = min(step / max(steps, 1), 1.0)
    return cfg.tau_end + (cfg.tau_start - cfg.tau_end) * (1 + math.cos(math.pi * done)) / 2


def standardise(v: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """To mean 0 and variance 1 in each channel, the space in which N(0, I) is noise of equal power."""
    return (v - mean) / std.clamp_min(1e-6)


def destandardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return x * std.clamp_min(1e-6) + mean


def per_token(a: Tensor, v: Tensor) -> Tensor:
    """a (B, N) shaped to multiply v (B, N, C) or (B, N, P, C)."""
    return a.reshape(a.shape + (1,) * (v.dim() - a.dim()))


def vp_gate(v: Tensor, a: Tensor, noise: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """v~ = sqrt(a) v + sqrt(1 - a) e on standardised tokens: weak tokens drown, none disappears.    Eq. (5)

    a = 1 hands a token on, a = 0 leaves noise of the same mean and variance; both hold to 1e-4, for the 1e-8
    under the roots that keeps their slope finite. noise is a draw of N(0, I) in v's shape.
    """
    a = per_token(a, v)
    x = (a + 1e-8).sqrt() * standardise(v, mean, std) + (1 - a + 1e-8).sqrt() * noise
    return destandardise(x, mean, std)


def scale_gate(v: Tensor, a: Tensor) -> Tensor:
    """v~ = a v, the ablation of Table 5: a weak token gets shorter, yet its direction stays readable."""
    return per_token(a, v) * v


def draw(kind, shape, generator, device) -> Tensor:
    """torch.randn or torch.rand of this shape. generator: one or None; or a list, one per row, so that what a picture
    draws does not depend on those that share its batch."""
    if not isinstance(generator, list):
        return kind(shape, generator=generator, device=device)
    return torch.stack([kind(shape[1:], generator=g, device=device) for g in generator])


class Denoiser(nn.Module):
    """One block that maps noised tokens back to what the language model expects; training only.   Section 3.4

    diagonal: attention under an identity mask. That equals attention over sequences of length 1, so every
    token is made a sequence of its own: the same block, N times less attention, and nothing can leak.
    global: every token sees every other (Table 5) and may repair itself with what the gate took from it.
    """

    def __init__(self, width: int, heads: int, diagonal: bool = True):
        super().__init__()
        self.diagonal = diagonal
        self.block = block(width, heads)
        for layer in (self.block.self_attn.out_proj, self.block.linear2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C), both standardised."""
        if not self.diagonal:
            return self.block(x, src_key_padding_mask=None if valid is None else ~valid)
        alone = x.reshape(-1, 1, x.shape[-1])                              # (B N, 1, C)
        # attention kernels on GPUs take at most 65535 sequences at once
        return torch.cat([self.block(part) for part in alone.split(32768)]).reshape(x.shape)


class NoiseGate(nn.Module):
    """Eq. (5), the denoiser, and the statistics that both need. StepPrune has the same (its Eqs. 13 and 14).

    Parameters are float32; tokens come in any float type and leave in the same.
    alone: forward() in training takes in the statistics of its tokens by itself. A loop that works a step off in parts,
    or on several processes, sets it to False and calls observe() with those of the whole step.
    """
    alone = True

    def __init__(self, width: int, heads: int, gate: str = "noise", denoiser: str = "diagonal"):
        super().__init__()
        self.gate = gate
        self.denoiser = Denoiser(width, heads, denoiser == "diagonal") if denoiser != "none" else None
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # tokens seen by the two above

    @torch.no_grad()
    def observe(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Mean and std per channel of all tokens so far, from mean and var (C,), correction 0, of `count` new ones; the
        encoder is frozen, so nothing is forgotten."""
        # new tensors, not in place: a graph of an earlier forward may still need the old ones
        self.count = self.count + count
        w, shift = count / self.count, mean - self.mean
        self.std = ((1 - w) * self.std.square() + w * var + w * (1 - w) * shift.square()).sqrt()
        self.mean = self.mean + w * shift

    def tokens(self, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """(M, C), what the statistics are of: every patch of every token."""
        return (v if valid is None else v[valid]).reshape(-1, v.shape[-1]).float()

    def update_statistics(self, v: Tensor, valid: Tensor | None = None) -> None:
        """observe() of these tokens."""
        x = self.tokens(v, valid)
        var, mean = torch.var_mean(x, dim=0, correction=0)
        self.observe(torch.tensor(len(x), device=x.device), mean, var)

    def gated(self, v: Tensor, a: Tensor, valid: Tensor | None = None, generator=None) -> Tensor:
        """v~ after the denoiser, of v's shape and type. Padding comes back as noise: the caller drops it."""
        if self.gate == "noise":
            noise = draw(torch.randn, v.shape, generator, v.device)                # fresh for each patch
            out = vp_gate(v, a, noise, self.mean, self.std)
        else:
            out = scale_gate(v, a)
        if self.denoiser is not None:
            x = standardise(out, self.mean, self.std)
            seen = None if valid is None else valid.repeat_interleave(x.shape[2:-1].numel(), 1)
            x = self.denoiser(x.flatten(1, -2), seen).reshape(v.shape)
            out = destandardise(x, self.mean, self.std)
        return out.to(v.dtype)


class AutoSelect(NoiseGate, PyTorchModelHubMixin):
    """Scorer and denoiser around a frozen VLM: forward() while training, select() afterwards."""

    def __init__(self, cfg: Config):
        scorer = Scorer(cfg.width, cfg.layers, cfg.heads) if cfg.scorer == "learned" else None
        super().__init__(cfg.width, cfg.heads, cfg.gate, cfg.denoiser)
        self.cfg, self.scorer = cfg, scorer

    def scores(self, v: Tensor, valid: Tensor | None = None, generator=None) -> Tensor:
        """s (B, N), Eq. (3); with scorer="random" a fresh draw at each call."""
        if self.scorer is None:
            return draw(torch.rand, v.shape[:2], generator, v.device)
        x = standardise(v, self.mean, self.std)
        return self.scorer(x.mean(2) if x.dim() == 4 else x, valid)

    def forward(self, v: Tensor, valid: Tensor | None = None, keep: float | Tensor | None = None,
                tau: float | None = None, generator=None) -> tuple[Tensor, Tensor]:
        """v -> (v~ after the denoiser, same shape and type; a (B, N) float32). Eq. (1) is read on it.

        keep defaults to cfg.keep, tau to cfg.tau_end.
        """
        if self.training and self.alone:
            self.update_statistics(v, valid)
        z = zscore(self.scores(v, valid, generator), valid)
        keep = self.cfg.keep if keep is None else keep
        a = soft_topk(z, keep, self.cfg.tau_end if tau is None else tau, valid)
        return self.gated(v, a, valid, generator), a

    @torch.no_grad()
    def select(self, v: Tensor, valid: Tensor | None = None, keep=None, generator=None) -> list[Tensor]:
        """The tokens that reach the language model, one ascending int64 tensor an image.        Eq. (2)"""
        return hard_topk(self.scores(v, valid, generator), self.cfg.keep if keep is None else keep, valid)
