"""AutoSelect: a learned scorer decides which K of N visual tokens reach a frozen language model.

"The Model Knows Which Tokens Matter: Automatic Token Selection via Noise Gating", arXiv:2603.07135.

    (1)  train: least -log p(answer | text, v~)          AutoSelect.loss: the frozen VLM's own loss
    (2)  test:  keep = the K best scores                 hard_topk, AutoSelect.select
    (3)  s  = Linear(Blocks(v))                          Scorer
    (4)  a  = sigmoid((z - theta) / tau), sum a = K      zscore, soft_topk, temperature
    (5)  v~ = sqrt(a) v + sqrt(1 - a) e, e ~ N(0, I)     vp_gate
         then a block in which a token sees only itself  Denoiser (Section 3.4)

Shapes  B images, N visual tokens, K kept, C width of a token before the projector
        v (B, N, C) tokens | s, z (B, N) scores | a (B, N) share of signal, 0..1
        valid (B, N) False at padding, None without any | mean, std (C,) of the tokens
        v (B, N, P, C) where P patches become one token later (Qwen2.5-VL, P = 4): they share one a
        mean, std (P, C) where these come of several blocks of the encoder (Qwen3-VL)

What differs from the paper, or what it leaves open [ours]
- Eq. 5 keeps the variance only where it is 1, and Hugging Face's LLaVA reads a CLIP state without
  LayerNorm: tokens are standardised per channel by running statistics, gated, and scaled back.
- Scorer and denoiser read standardised tokens too: a few channels of the raw state dwarf the rest.
- Depth: 5 scorer + 1 denoiser blocks of CLIP width are 75.6 M parameters, 6 + 1 are 88.2 M; the
  paper prints 84 M. Its depth, rates, batch and tau stand in a supplement: value not available.
- tau goes from 0.1 to 0.02. From 1, every token keeps a share of about K/N, which the tiny VLM
  reads through the noise, so that nothing presses the scorer to choose (one trial).
- One selector serves every budget: the steps take turns, six at the widest to one at each other.
  Trained at 16 of 144 alone it orders nothing beyond the first sixteen tokens (one trial).
- No position embedding in the scorer: the encoder's features carry their position.
- Of P patches the scorer sees the mean; gate and denoiser treat every patch on its own.
- Denoiser: its output layers start at zero, so it is the identity at step 0.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from common import check_finite
from runs import Selector, Way, check_options


@dataclass
class Sizes:
    """What follows from the frozen VLM."""
    width: int = 1024                       # C, 1024 for CLIP ViT-L
    unlike_patches: int = 0                 # P, where each has statistics of its own; 0: all alike

    @classmethod
    def of(cls, vlm, **options):
        return cls(width=vlm.width, unlike_patches=vlm.adapter.unlike_patches, **options)


@dataclass
class Config(Sizes):
    """Every option of the method; TINY and LARGE say what is used unless told otherwise."""
    keep: list[float] = field(
        default_factory=lambda: [*[1 / 3] * 6, 2 / 9, 1 / 9],
        metadata={"help": "K of Eq. 4: tokens, or below 1 a share of each picture's; steps take "
                 "turns [ours; the paper's three budgets]"})
    layers: int = HfArg(default=5, help="scorer blocks of Eq. 3 [ours]")
    heads: int = HfArg(default=16, help="attention heads of all blocks [ours]")
    tau_start: float = HfArg(default=0.1, help="temperature of Eq. 4 at the first step [ours]")
    tau_end: float = HfArg(default=0.02, help="... and at the last [ours]")
    gate: Literal["noise", "scale"] = HfArg(
        default="noise", help="Eq. 5 [paper]; scale: Table 5's ablation")
    denoiser: Literal["diagonal", "global", "none"] = HfArg(
        default="diagonal", help="Section 3.4 [paper]; global: Table 5's ablation; none [ours]")
    scorer: Literal["learned", "random"] = HfArg(
        default="learned", help="Eq. 3 [paper]; random: Figure 5's ablation")

    def __post_init__(self):
        check_options(self, layers=1, tau_start=1e-6, tau_end=1e-6)
        if not (self.keep and all(0 < k < math.inf for k in self.keep)):
            raise ValueError(f"keep={self.keep}: expected numbers of tokens, or shares above 0")


# steps, pictures a step, learning rate and autocast are options of train.py [all ours]
TINY = dict(steps=450, batch=16, lr=2e-3, autocast=False, layers=2, heads=4)
LARGE = dict(steps=5000, batch=32, lr=1e-4, autocast=True, layers=5, heads=16)
# Table 1, or the paper's table of another backbone: `python -m examples.headline autoselect`
HEADLINE = dict(
    model="llava-hf/llava-1.5-7b-hf", train=dict(data="imagenet-captions"),
    deviations=("steps, batch, learning rate, K, tau, depth, prompt of the captions: value not "
                "available, for they stand in a supplement that is not at hand; ours instead",))


def hard_topk(s: Tensor, k, valid: Tensor | None = None) -> list[Tensor]:
    """Indices of the K best tokens of each image, in reading order; of equals the first.  Eq. (2)

    k: one number, or one per image -> B ascending int64 tensors (K,). Scores have to be finite.
    """
    ks = [k] * len(s) if isinstance(k, int) else [int(each) for each in k]
    if len(ks) != len(s):
        raise ValueError(f"{len(ks)} budgets for {len(s)} images")
    valid = torch.ones_like(s, dtype=torch.bool) if valid is None else valid
    check_finite(s.masked_fill(~valid, 0), "scores")
    for k_b, tokens in zip(ks, valid.sum(1).tolist()):
        if not 0 < k_b <= tokens:
            raise ValueError(f"keep={k_b} does not fit {tokens} visual tokens")
    order = s.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return [best[:k_b].sort().values for best, k_b in zip(order, ks)]    # in the image's order


def block(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """The pre-norm Transformer block of scorer and denoiser."""
    return nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                      batch_first=True, norm_first=True)


class Scorer(nn.Module):
    """s = Linear(Blocks(v)): all tokens attend to one another, each gets a number.    Eq. (3)"""

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
    """z = (s - mean) / std over the tokens of one image; 0 at padding.                     Eq. (4)

    So the scorer cannot undo tau by scaling its scores up. Half precision becomes float32.
    """
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    w = torch.ones_like(s) if valid is None else valid.to(s)
    n = w.sum(1, keepdim=True).clamp_min(1)
    mean = (s * w).sum(1, keepdim=True) / n
    d = (s - mean) * w
    variance = d.square().sum(1, keepdim=True) / n
    return d / (variance + eps).sqrt()


class _SoftTopK(torch.autograd.Function):
    """a, with the gradient of the exact solution, not of the 60 steps that lead to it.    Eq. (4)

    Differentiate sum_i a_i = K: with g_i = a_i (1 - a_i),
        da_i/dz_j = g_i / tau (delta_ij - g_j / sum g)        da_i/dK = g_i / sum g.
    """

    @staticmethod
    def forward(ctx, z, k, tau, valid):
        x = z.double() / tau
        n = valid.sum(1, keepdim=True).clamp_min(1)
        k_ = k.double().unsqueeze(1)
        # Were all scores equal, theta would be x - logit(K / N): the true one lies between these
        # two ends. K = N and K = 0 put both at -inf or +inf, where every a is exactly 1 or 0.
        shift = torch.logit(k_ / n)
        low = x.masked_fill(~valid, math.inf).amin(1, keepdim=True) - shift
        high = x.masked_fill(~valid, -math.inf).amax(1, keepdim=True) - shift
        for _ in range(60):
            theta = (low + high) / 2
            total = torch.sigmoid(x - theta).masked_fill(~valid, 0).sum(1, keepdim=True)
            too_many = total > k_
            low = torch.where(too_many, theta, low)
            high = torch.where(too_many, high, theta)
        a = torch.sigmoid(x - theta).masked_fill(~valid, 0)
        rest = torch.sigmoid(theta - x)                          # 1 - a without cancellation
        ctx.save_for_backward((a * rest).masked_fill(~valid, 0))
        ctx.tau = tau
        ctx.dtypes = (z.dtype, k.dtype)
        return a.to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (g,) = ctx.saved_tensors
        grad = grad.double()
        total = g.sum(1, keepdim=True)
        mean = (g * grad).sum(1, keepdim=True) / total.clamp_min(1e-300)   # saturated: 0, not 0/0
        dz = g * (grad - mean) / ctx.tau
        dk = mean.squeeze(1)
        return dz.to(ctx.dtypes[0]), dk.to(ctx.dtypes[1]), None, None


def soft_topk(z: Tensor, k: float | Tensor, tau: float, valid: Tensor | None = None) -> Tensor:
    """Eq. (4): a_i = sigmoid((z_i - theta) / tau), theta such that a sums to K over the image.

    tau -> 0 gives the 0/1 mask of the K largest. Differentiable in z and in K. One number K must
    fit every image; a tensor, () or (B,), is clamped to each image's token count.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    valid = torch.ones_like(z, dtype=torch.bool) if valid is None else valid.bool()
    fewest = valid.sum(1).min()
    if not isinstance(k, Tensor) and not 0 < k <= fewest:
        raise ValueError(f"keep={k} does not fit {fewest} visual tokens")
    k = torch.as_tensor(k, dtype=z.dtype, device=z.device).expand(len(z))
    k = torch.minimum(k.clamp_min(0), valid.sum(1).to(k))
    return _SoftTopK.apply(z, k, float(tau), valid)


def temperature(number: int, total: int, cfg) -> float:
    """tau of Eq. (4) at a step: a cosine from cfg.tau_start at 0 to cfg.tau_end at `total`."""
    done = min(number / max(total, 1), 1.0)
    return cfg.tau_end + (cfg.tau_start - cfg.tau_end) * (1 + math.cos(math.pi * done)) / 2


def standardise(v: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """To mean 0 and variance 1 in each channel, where N(0, I) is noise of equal power."""
    return (v - mean) / std.clamp_min(1e-6)


def destandardise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return x * std.clamp_min(1e-6) + mean


def per_token(a: Tensor, v: Tensor) -> Tensor:
    """a (B, N) shaped to multiply v (B, N, C) or (B, N, P, C)."""
    return a.reshape(a.shape + (1,) * (v.dim() - a.dim()))


def vp_gate(v: Tensor, a: Tensor, noise: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """v~ = sqrt(a) v + sqrt(1 - a) e: weak tokens drown, none disappears.                  Eq. (5)

    a = 1 hands a token on, a = 0 leaves noise of the same mean and variance; both hold to 1e-4,
    for the 1e-8 under the roots keeps their slope finite. noise: N(0, I) in v's shape.
    """
    a = per_token(a, v)
    signal = (a + 1e-8).sqrt() * standardise(v, mean, std)
    return destandardise(signal + (1 - a + 1e-8).sqrt() * noise, mean, std)


def scale_gate(v: Tensor, a: Tensor) -> Tensor:
    """v~ = a v (Table 5): a weak token gets shorter, yet its direction stays readable."""
    return per_token(a, v) * v


def draw(kind, shape, generator, device) -> Tensor:
    """torch.randn or torch.rand of this shape. generator: one or None; or a list, one per row, so
    that what a picture draws does not depend on those that share its batch."""
    if not isinstance(generator, list):
        return kind(shape, generator=generator, device=device)
    return torch.stack([kind(shape[1:], generator=g, device=device) for g in generator])


class Denoiser(nn.Module):
    """A block that maps noised tokens back to what the language model expects; training only.

    diagonal: attention under an identity mask. That equals attention over sequences of length 1,
    so every token is made a sequence of its own: the same block, N times less attention.
    global: every token sees every other (Table 5) and may repair what the gate took from it.
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
        single = x.reshape(-1, 1, x.shape[-1])                             # (B N, 1, C)
        # attention kernels on GPUs take at most 65535 sequences at once
        return torch.cat([self.block(part) for part in single.split(32768)]).reshape(x.shape)


class NoiseGate(Selector):
    """Eq. (5), the denoiser, and the statistics of tokens that both need. StepPrune has the same.

    Parameters are float32; tokens come in any float type and leave in the same.
    """

    def __init__(self, width: int, heads: int, gate: str = "noise", denoiser: str = "diagonal",
                 patches: int = 0):
        super().__init__()
        shape = (patches, width) if patches else (width,)
        self.gate = gate
        is_diagonal = denoiser == "diagonal"
        self.denoiser = None if denoiser == "none" else Denoiser(width, heads, is_diagonal)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # tokens seen so far

    @torch.no_grad()
    def observe(self, vlm, parts: list, step) -> None:
        """Take in mean and std per channel of all tokens of a step, on all processes. The encoder
        is frozen, so all steps weigh alike."""
        sums = []
        for _, units in parts:
            v, valid = units.pad()
            x = v[valid].reshape(-1, self.mean.numel()).float().double()
            sums.append(torch.cat([x.new_tensor([len(x)]), x.sum(0), x.square().sum(0)]))
        sums = step.sum(torch.stack(sums).sum(0))
        mean, square = (sums[1:] / sums[0]).view(2, *self.mean.shape)
        variance = (square - mean.square()).clamp(min=0).float()

        # new tensors, not in place: a graph of an earlier forward may still need the old ones
        self.count = self.count + sums[0].long()
        w = sums[0].long() / self.count
        shift = mean.float() - self.mean
        spread = w * (1 - w) * shift.square()
        self.std = ((1 - w) * self.std.square() + w * variance + spread).sqrt()
        self.mean = self.mean + w * shift

    def gated(self, v: Tensor, a: Tensor, valid: Tensor | None = None, generator=None) -> Tensor:
        """v~ after the denoiser, of v's shape and type. Padding comes back as noise."""
        if self.gate == "noise":
            noise = draw(torch.randn, v.shape, generator, v.device)        # fresh for each patch
            noised = vp_gate(v, a, noise, self.mean, self.std)
        else:
            noised = scale_gate(v, a)
        if self.denoiser is None:
            return noised.to(v.dtype)
        x = standardise(noised, self.mean, self.std)
        patches = x.shape[2:-1].numel()
        here = None if valid is None else valid.repeat_interleave(patches, 1)
        x = self.denoiser(x.flatten(1, -2), here).reshape(v.shape)
        return destandardise(x, self.mean, self.std).to(v.dtype)


class AutoSelect(NoiseGate):
    """Scorer, noise gate and denoiser around a frozen VLM."""

    further_ways = ("gated", "threshold")

    def __init__(self, cfg: Config):
        # the scorer draws its weights first
        learned = cfg.scorer == "learned"
        scorer = Scorer(cfg.width, cfg.layers, cfg.heads) if learned else None
        super().__init__(cfg.width, cfg.heads, cfg.gate, cfg.denoiser, cfg.unlike_patches)
        self.cfg = cfg
        self.scorer = scorer

    def loss(self, vlm, batch, units, step) -> tuple[Tensor, dict]:
        """Eq. (1): the frozen VLM's own loss on gated tokens."""
        v, valid = units.pad()                                             # (B, N, C), (B, N)
        tau = temperature(step.number, step.total, self.cfg)
        keep = self.cfg.keep[step.number % len(self.cfg.keep)]
        tokens = valid.sum(1)                                              # (B,)
        # a picture of fewer than K tokens keeps all that it has
        keep = (keep * tokens).round().clamp(min=1) if keep < 1 else tokens.clamp(max=int(keep))
        with step.autocast():
            gated, a = self(v, valid, keep, tau, step.generators(batch.owner))

        # The gate removes signal, not positions: the language model runs at full length. Its loss
        # is a mean over this part's answer tokens, hence the factor.
        prompt = vlm.embed(batch.rows, units, units.flat(gated))
        loss = vlm.loss(prompt) * batch.answers / step.answers
        return loss, {"keep": keep.float().mean().item(), "tau": tau,
                      "sharpness": sharpness(a, valid)}

    def forward(self, v: Tensor, valid: Tensor | None, keep: float | Tensor, tau: float,
                generator=None) -> tuple[Tensor, Tensor]:
        """v -> (v~ after the denoiser, same shape and type; a (B, N) float32).    Eqs. (3)-(5)"""
        a = soft_topk(zscore(self.token_scores(v, valid, generator), valid), keep, tau, valid)
        return self.gated(v, a, valid, generator), a

    def token_scores(self, v: Tensor, valid: Tensor | None = None, generator=None) -> Tensor:
        """s (B, N), Eq. (3); with scorer="random" a fresh draw at each call."""
        if self.scorer is None:
            return draw(torch.rand, v.shape[:2], generator, v.device)
        x = standardise(v, self.mean, self.std)
        return self.scorer(x.mean(2) if x.dim() == 4 else x, valid)

    @torch.no_grad()
    def select(self, units, question, keep) -> list[Tensor]:
        """Eq. (2): the K best scores; no noise, no denoiser. The question is not read."""
        v, valid = units.pad()
        return hard_topk(self.token_scores(v, valid), keep, valid)

    @torch.no_grad()
    def scores(self, units, question) -> Tensor:
        return units.flat(self.token_scores(*units.pad()))

    def ways(self, names, budgets, calibration) -> dict[str, Way]:
        """"gated": answer through the noise gate instead of removing tokens (Figure 5)."""
        ways = super().ways(names, budgets, calibration)
        if "gated" in names:
            ways[" gated"] = Way(gate=self._gate)
        return ways

    @torch.no_grad()
    def _gate(self, asked, keep: int) -> Tensor:
        return asked.units.flat(self(*asked.units.pad(), keep, self.cfg.tau_end)[0])


def sharpness(a: Tensor, valid: Tensor) -> float:
    """0 where every token keeps half its signal, 1 where each is kept or drowned."""
    return (2 * a - 1).abs()[valid].mean().item()


Method = AutoSelect
