"""Reconstruction selector: keep the tokens from which the others, and the picture, can be rebuilt.

"Adaptive Vision Token Selection for Multi-Modal Inference" (anonymous, under review). No language model takes part in
training: features and pixels only.

    (1)  a subset is better if more can be rebuilt from it: dist(R(F1), F) < dist(R(F2), F)       distance
    (2)  min dist(R(S(F)), F) + L_pr                                                              ReconSelector
    (4)  L_pr -> max(L_pr, p) - min(L_pr, q): no pressure while q < L_pr < p                      dead_zone
    (5)  F_pr, M = S(F): four blocks, two logits, hard Gumbel-softmax; E_masked for what goes     FeatureSelector,
                                                                                                  hard_mask, put_masked
    (6)  F_rec = R_f(F_pr), I_rec = R_im(F_rec)                        FeatureReconstructor, ImageReconstructor
    (7)  L_pr = mean of M                                                                         kept_share
    (8)  |F_rec - F| + |I_rec - I| + alpha1 max(L_pr, p) - alpha2 min(L_pr, q)                    ReconSelector.forward

Shapes  B images, N visual tokens, C width of a token between vision encoder and projector
        v (B, N, C) tokens F | logits (B, N, 2), 1 for keep | mask (B, N) M, 1 for kept | pixels (B, 3, H, W) I
        v (B, N, P, C) where P patches are merged into one token later: the selector sees their mean
Read    downwards: the equations in the paper's order, then ReconSelector, which strings them together.
Ours    - |x|_2 is the root of the mean square of a picture's tokens or pixels, so that alpha means the same for every
          number of them. The paper's scale is not told: on the tiny world its alpha = 0.1 is too weak for ours, every
          token is kept after 50 steps, nothing is ever rebuilt, and there is no way back; train.py takes 1.
        - Tokens are standardised per channel by running statistics (BatchNorm without weights).
        - E_masked is told apart by a learned position of the grid, resized to any other grid, for two masked tokens
          would else be rebuilt alike. The selector gets none: the encoder's features carry it.
        - Upsampling doubles while it fits into a patch, then resizes to the picture exactly.
B.4     select(), scores() and forward() take any tokens. For the conditional selector v are the states of the visual
        tokens behind a middle layer of the language model, with the question in front of the image, and what is not
        kept is dropped there: common's generate_within().
Crops   A picture in crops (LLaVA-NeXT) is as many rows: each is selected, and rebuilt, alone.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn


@dataclass
class Config:
    width: int = 1024             # C, 1024 for CLIP ViT-L                              [paper: LLaVA]
    layers: int = 4               # selector blocks; 1 to 8 in Figure 4                 [paper]
    rebuild_layers: int = 4       # blocks of the feature reconstructor                 [paper]
    image_layers: int = 2         # blocks of the image reconstructor                   [paper]
    heads: int = 16               # as the vision encoder itself                        [ours]
    patch: int = 14               # pixels of a token's side                            [paper: CLIP ViT-L/14]
    channels: int = 64            # of the last upsampled picture                       [ours]
    grid: int = 24                # side of the learned positions                       [paper: 336 px]
    p: float = 0.6                # upper end of the dead zone                          [paper]
    q: float = 0.1                # lower end                                           [paper]
    alpha1: float = 0.1           # weight above p                                      [paper]
    alpha2: float = 0.1           # weight below q                                      [paper]
    tau: float = 1.0              # of the Gumbel-softmax                               [ours]
    estimator: str = "gumbel"     # "gumbel" (Eq. 5) | "softmax" (B.1)                  [paper]
    regulariser: str = "dead_zone"  # Eq. 4 | "plain": alpha1 L_pr (B.2)                [paper]

    def __post_init__(self):
        for name, known in (("estimator", ("gumbel", "softmax")), ("regulariser", ("dead_zone", "plain"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        if not 0 <= self.q <= self.p <= 1 or min(self.alpha1, self.alpha2) < 0:
            raise ValueError(f"q={self.q}, p={self.p}, alpha1={self.alpha1}, alpha2={self.alpha2}: expected "
                             "0 <= q <= p <= 1 and no negative alpha")


def distance(x: Tensor, y: Tensor) -> Tensor:
    """(B,) |x - y| of each picture, the root of the mean square.                                 Eqs. (1), (3)"""
    return (x - y).square().flatten(1).mean(1).add(1e-12).sqrt()


def kept_share(mask: Tensor, valid: Tensor) -> Tensor:
    """L_pr, the share of tokens that were kept, mean over images.                                     Eq. (7)"""
    return ((mask * valid).sum(1) / valid.sum(1)).mean()


def dead_zone(share: Tensor, p: float, q: float, alpha1: float, alpha2: float) -> Tensor:
    """alpha1 max(L_pr, p) - alpha2 min(L_pr, q): flat between q and p.                           Eqs. (4), (8)"""
    return alpha1 * share.clamp_min(p) - alpha2 * share.clamp_max(q)


def hard_mask(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """M (B, N): 0 or 1 forwards, softmax((logits + noise) / tau) backwards.                           Eq. (5)

    noise in logits' shape: -log(-log u) for Gumbel-softmax, zeros for the straight-through softmax of B.1.
    """
    soft = ((logits + noise) / tau).softmax(-1)[..., 1]
    hard = (logits + noise).argmax(-1).to(soft)
    return hard + (soft - soft.detach())


def put_masked(v: Tensor, mask: Tensor, masked: Tensor) -> Tensor:
    """F_pr (B, N, C): what is dropped is replaced by one learned embedding, masked (C,).              Eq. (5)"""
    mask = mask.unsqueeze(-1)
    return mask * v + (1 - mask) * masked


def blocks(width: int, heads: int, layers: int) -> nn.ModuleList:
    """Pre-norm Transformer blocks, each with its own start."""
    return nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                                    batch_first=True, norm_first=True) for _ in range(layers))


class FeatureSelector(nn.Module):
    """S: two logits a token, drop and keep.                                                           Eq. (5)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.blocks = blocks(cfg.width, cfg.heads, cfg.layers)
        self.norm, self.head = nn.LayerNorm(cfg.width), nn.Linear(cfg.width, 2)

    def forward(self, v: Tensor, valid: Tensor) -> Tensor:
        for layer in self.blocks:
            v = layer(v, src_key_padding_mask=~valid)
        return self.head(self.norm(v))


class FeatureReconstructor(nn.Module):
    """R_f: all tokens again, from those that were kept.                                               Eq. (6)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, cfg.width, cfg.grid, cfg.grid) * 0.02)
        self.blocks = blocks(cfg.width, cfg.heads, cfg.rebuild_layers)
        self.out = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, cfg.width))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, rows * columns, C) -> the same shape."""
        x = x + F.interpolate(self.position, grid, mode="bilinear").flatten(2).mT
        for layer in self.blocks:
            x = layer(x)
        return self.out(x)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(1, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1),
                                  nn.GroupNorm(1, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ImageReconstructor(nn.Module):
    """R_im: the picture from the rebuilt tokens; two blocks, then upsampling and residual blocks in turn.   Eq. (6)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.blocks = blocks(cfg.width, cfg.heads, cfg.image_layers)
        stages, doublings = [], max(cfg.patch.bit_length() - 1, 1)          # 2^doublings <= patch
        widths = [cfg.width, *(max(cfg.channels, cfg.width >> i) for i in range(1, doublings + 1))]
        for before, after in zip(widths, widths[1:]):
            stages += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), Residual(after)]
        self.up, self.out = nn.Sequential(*stages), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """x (B, rows * columns, C) -> pixels (B, 3, *size)."""
        for layer in self.blocks:
            x = layer(x)
        x = self.up(x.mT.unflatten(2, grid))
        return self.out(F.interpolate(x, size, mode="bilinear"))


def stage_rate(step: int, steps: int, stages=(0.6, 0.2, 0.2), warmup: float = 0.05) -> float:
    """Factor of the learning rate: a cosine from 1 to 0 in each stage, after a linear warm-up.        Section 4.6

    The paper's 60 + 20 + 20 epochs as shares of any number of steps; that each stage is a cosine is our reading.
    """
    done, start = min(step, steps - 1) / max(steps, 1), 0.0
    for share in stages:
        if done < start + share - 1e-9:
            break
        start += share
    return min((step + 1) / max(warmup * steps, 1), 1.0) * (0.5 + 0.5 * math.cos(math.pi * (done - start) / share))


class ReconSelector(nn.Module, PyTorchModelHubMixin):
    """Selector and both reconstructors: forward() while training, select() afterwards. Parameters are float32.

    alone: forward() in training standardises tokens by their own statistics, and takes these in. A loop that works a
    step off in parts, or on several processes, sets it to False and calls observe() with those of the whole step.
    """
    alone = True

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.selector = cfg, FeatureSelector(cfg)
        self.features, self.image = FeatureReconstructor(cfg), ImageReconstructor(cfg)
        self.masked = nn.Parameter(torch.randn(cfg.width) * 0.02)                       # E_masked
        self.norm = nn.BatchNorm1d(cfg.width, affine=False, momentum=None)              # running statistics

    @torch.no_grad()
    def observe(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """The running statistics, from mean and var (C,), correction 0, of `count` new tokens: as BatchNorm's own."""
        self.norm.num_batches_tracked += 1
        weight = 1 / self.norm.num_batches_tracked
        self.norm.running_mean.lerp_(mean.to(self.masked), weight)
        self.norm.running_var.lerp_((var * count / (count - 1)).to(self.masked), weight)

    def tokens(self, v: Tensor, valid: Tensor) -> Tensor:
        """(M, C), what the statistics are of: every token, of several patches their mean."""
        return (v.mean(2) if v.dim() == 4 else v).to(self.masked.dtype)[valid]

    def standardised(self, v: Tensor, valid: Tensor) -> Tensor:
        """v (B, N, C) or (B, N, P, C) -> (B, N, C), mean 0 and variance 1 in each channel."""
        self.norm.train(self.training and self.alone)
        x = self.norm(self.tokens(v, valid))
        return x.new_zeros(*valid.shape, x.shape[-1]).masked_scatter(valid.unsqueeze(-1), x)

    def logits(self, v: Tensor, valid: Tensor) -> Tensor:
        """(B, N, 2)."""
        return self.selector(self.standardised(v, valid), valid)

    def rebuild(self, x: Tensor, mask: Tensor, grid, size) -> tuple[Tensor, Tensor]:
        """F_rec and I_rec of pictures of one grid and size, from standardised tokens x and a mask.   Eq. (6)"""
        rebuilt = self.features(put_masked(x, mask, self.masked), grid)
        return rebuilt, self.image(rebuilt, grid, size)

    def errors(self, x: Tensor, mask: Tensor, pixels: list[Tensor], grids: list) -> tuple[Tensor, Tensor]:
        """|F_rec - F| and |I_rec - I|, (B,) each. Pictures of one shape are rebuilt together.

        x (B, N, C) standardised, mask (B, N), pixels[b] (3, H, W), grids[b] (rows, columns) of its units.
        """
        shapes = [(grid, picture.shape[1:]) for grid, picture in zip(grids, pixels)]
        order, found = [], []
        for grid, size in dict.fromkeys(shapes):
            rows, n = [b for b, shape in enumerate(shapes) if shape == (grid, size)], grid[0] * grid[1]
            rebuilt, picture = self.rebuild(x[rows, :n], mask[rows, :n], grid, size)
            wanted = torch.stack([pixels[b] for b in rows]).to(picture)
            found.append(torch.stack([distance(rebuilt, x[rows, :n]), distance(picture, wanted)]))
            order += rows
        feature, image = torch.cat(found, 1)[:, torch.tensor(order).argsort()]
        return feature, image

    def forward(self, v: Tensor, valid: Tensor, pixels: list[Tensor], grids: list, generator=None,
                everyone=lambda x: x) -> tuple[Tensor, dict]:
        """v (B, N, C) or (B, N, P, C), valid (B, N); pixels, grids as in errors() -> loss, parts.   Eq. (8)

        generator: one, or a list with one per row. everyone: what makes of a number of these pictures its mean over
        all processes, for Eq. (4) bends at the share of the whole batch.
        """
        cfg, x = self.cfg, self.standardised(v, valid)
        logits = self.selector(x, valid).to(x.dtype)
        noise = torch.zeros_like(logits)
        if cfg.estimator == "gumbel":
            if isinstance(generator, list):                # one per row: no picture's noise depends on its batch
                u = torch.stack([torch.rand(logits.shape[1:], generator=g, device=v.device) for g in generator])
            else:
                u = torch.rand(logits.shape, generator=generator, device=v.device)
            u = u.clamp(1e-9, 1 - 1e-7)
            noise = -(-u.log()).log().to(logits)
        mask = hard_mask(logits, noise, cfg.tau) * valid                      # what is not there cannot be kept
        feature, image = (error.mean() for error in self.errors(x, mask, pixels, grids))
        share = kept_share(mask, valid)
        share = share + (everyone(share.detach()) - share.detach())
        pressure = (dead_zone(share, cfg.p, cfg.q, cfg.alpha1, cfg.alpha2) if cfg.regulariser == "dead_zone"
                    else cfg.alpha1 * share)
        return feature + image + pressure, {"feature": feature.item(), "image": image.item(), "kept": share.item(),
                                            "pressure": pressure.item()}

    @torch.no_grad()
    def scores(self, v: Tensor, valid: Tensor) -> Tensor:
        """s (B, N): how far keep stands above drop; the hard mask is s > 0."""
        logits = self.logits(v, valid)
        return logits[..., 1] - logits[..., 0]

    @torch.no_grad()
    def select(self, v: Tensor, valid: Tensor, keep: int | list[int] | None = None) -> list[Tensor]:
        """The tokens that reach the language model, one ascending int64 tensor a row: the `keep`, or keep[b], with the
        largest logits, or with None those of the hard mask, at least one.                         Section 4.1.1"""
        chosen = []
        for b, (s, here) in enumerate(zip(self.scores(v, valid), valid)):
            n, k = int(here.sum()), keep[b] if isinstance(keep, list) else keep
            if k is not None and not 0 < k <= n:
                raise ValueError(f"keep={k} does not fit {n} visual tokens")
            s = s.masked_fill(~here, -torch.inf)
            k = k or max(int((s > 0).sum()), 1)
            chosen.append(s.argsort(descending=True, stable=True)[:k].sort().values)
        return chosen


def per_crop(keep: int, counts: list[int]) -> list[int]:
    """`keep` tokens of a picture as so many of each of its crops, in proportion to their tokens, at least one of each:
    crops are selected apart, for the selector was trained on one at a time.                       Section 5.3"""
    if not len(counts) <= keep <= sum(counts):
        raise ValueError(f"keep={keep} of crops of {counts} tokens: expected {len(counts)} to {sum(counts)}")
    share = [max(keep * n // sum(counts), 1) for n in counts]
    while sum(share) != keep:                           # what rounding left goes to the crop that is furthest behind
        step = 1 if sum(share) < keep else -1
        behind = [step * (keep * n / sum(counts) - k) for n, k in zip(counts, share)]
        best = max((x, -b) for b, x in enumerate(behind) if 1 <= share[b] + step <= counts[b])
        share[-best[1]] += step
    return share
