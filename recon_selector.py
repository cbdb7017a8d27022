"""Reconstruction selector: keep the tokens from which the others, and the picture, can be rebuilt.

"Adaptive Vision Token Selection for Multi-Modal Inference" (anonymous, under review). Training sees
features and pixels: no question, no answer, no language model.

    (1)  F1 beats F2 if dist(R(F1), F) < dist(R(F2), F)              distance
    (2)  min dist(R(S(F)), F) + L_pr                                 ReconSelector
    (3)  dist = dist(F_rec, F) + dist(I_rec, I)                      ReconSelector.errors
    (4)  L_pr -> max(L_pr, p) - min(L_pr, q): free for q < L_pr < p  dead_zone
    (5)  F_pr, M = S(F): two logits, hard Gumbel-softmax             FeatureSelector, hard_mask
         E_masked, learned, in place of what is dropped              put_masked
    (6)  F_rec = R_f(F_pr), I_rec = R_im(F_rec)                      Feature-, ImageReconstructor
    (7)  L_pr = mean of M                                            kept_share
    (8)  |F_rec - F| + |I_rec - I|
           + alpha1 max(L_pr, p) - alpha2 min(L_pr, q)               ReconSelector.loss

Shapes  B images, N visual tokens, C width of a token before the projector
        v (B, N, C) tokens; (B, N, P, C) where P patches become one later: S sees their mean
        x (B, N, C) F, the tokens standardised | valid (B, N) False at padding
        logits (B, N, 2), 1 for keep | mask (B, N) M, 1 for kept | pixels (B, 3, H, W) I
Read    downwards: the equations in the paper's order, then ReconSelector, which joins them.

What differs from the paper, or what it leaves open [ours]
- |x|_2 is the root of the mean square of a picture's tokens or pixels, so that alpha means the same
  for every number of them. The paper's scale is not told, and its alpha = 0.1 is too weak for this
  one: on the tiny world every token is kept after some fifty steps, nothing is ever rebuilt, and
  there is no way back (one trial). Hence alpha = 1.
- F is standardised per channel by running statistics, as BatchNorm without weights does.
- Two dropped tokens would be rebuilt alike: R_f adds a learned position of the grid, resized to any
  other grid. S gets none, for the encoder's features carry it.
- L_pr of Eq. 4 is that of the whole step, however many parts and processes share its pictures.
- R_im doubles the grid while it fits into a patch, then resizes to the picture exactly.
- The three stages of training are read as three cosines, in shares of any number of steps.
- A picture in crops (LLaVA-NeXT) is as many pictures: each is selected, and rebuilt, by itself;
  one that is padding from edge to edge is none.
- B.4, conditional selection: F are the units' states behind a middle layer of the language model,
  the question stands before and behind the image, and what is not kept leaves there. A newline
  between rows of units is no unit: it stays while one of its row does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from baselines import inside, random_tokens
from common import Units, check_finite, split_by
from runs import Selector, Way, check_options, check_ways


@dataclass
class Sizes:
    """What follows from the frozen VLM."""
    width: int = 1024                       # C, 1024 for CLIP ViT-L
    patch: int = 14                         # pixels of a token's side, 14 for CLIP ViT-L/14
    channels: int = 64                      # of the last upsampled picture [ours]
    grid: int = 24                          # side of the learned positions, 24 for 336 pixels

    @classmethod
    def of(cls, vlm, **options):
        reads_language = options.get("select_after_layer", 0) > 0
        return cls(width=vlm.dim if reads_language else vlm.width, patch=vlm.unit_side,
                   channels=max(16, vlm.width // 16), grid=vlm.fingerprint()["vision_side"] or 24,
                   **options)


@dataclass
class Config(Sizes):
    """Every option of the method; TINY and LARGE say what is used unless told otherwise."""
    layers: int = HfArg(default=4, help="blocks of S, Eq. 5 [paper; 1 to 8 in Figure 4]")
    rebuild_layers: int = HfArg(default=4, help="blocks of R_f, Eq. 6 [paper]")
    image_layers: int = HfArg(default=2, help="blocks of R_im, Eq. 6 [paper]")
    heads: int = HfArg(default=16, help="attention heads of all blocks [ours: as CLIP ViT-L]")
    keep_high: float = HfArg(
        default=0.6, help="p of Eq. 4: share of kept tokens above which it presses [paper]")
    keep_low: float = HfArg(default=0.1, help="q of Eq. 4: ... and below which [paper]")
    alpha1: float = HfArg(
        default=1.0, help="weight above p, Eq. 8 [ours; the paper's 0.1 is of another scale]")
    alpha2: float = HfArg(default=1.0, help="weight below q, Eq. 8 [ours; the paper's is 0.1]")
    tau: float = HfArg(default=1.0, help="temperature of the softmax in Eq. 5 [ours]")
    estimator: Literal["gumbel", "softmax"] = HfArg(
        default="gumbel", help="Eq. 5: hard Gumbel-softmax [paper]; softmax: B.1, no noise")
    regulariser: Literal["dead_zone", "plain"] = HfArg(
        default="dead_zone", help="Eq. 4 [paper]; plain: alpha1 L_pr, which collapses (B.2)")
    select_after_layer: int = HfArg(
        default=0, help="select behind this layer of the language model, from its states, the "
                        "question before and behind the image (B.4); 0: behind the encoder [paper]")

    def __post_init__(self):
        check_options(self, layers=1, rebuild_layers=1, image_layers=0, keep_low=(0, 1),
                      keep_high=(self.keep_low, 1), alpha1=0, alpha2=0, tau=1e-6,
                      select_after_layer=0)


# steps=0: as epochs say; batch: pictures a step; autocast: matrix products in bfloat16 [ours]
TINY = dict(steps=0, epochs=3.0, batch=16, lr=1e-3, autocast=False, layers=4, heads=4)       # ours
LARGE = dict(steps=0, epochs=100.0, batch=32, lr=1e-5, autocast=True, layers=4, heads=16)   # paper
# Table 2; Table 1 with Open-LLaVA-NeXT's weights: `python -m examples.headline recon`
HEADLINE = dict(
    model="llava-hf/llava-v1.6-mistral-7b-hf", pictures=118_287 + 2 * 9_000,
    train=dict(data=["coco", "docvqa", "chartqa"], take=[0, 9_000, 9_000]),
    deviations=("Table 2: Table 1's checkpoint is in LLaVA's own format, which has to be converted",
                "the 9,000 pages and 9,000 charts are drawn by --seed: not those of the paper"))


# ------------------------------------------------------------------------------------ Eqs. (1)-(4)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """(B,) |x - y| of each picture, the root of the mean square.                  Eqs. (1), (3)"""
    return (x - y).square().flatten(1).mean(1).add(1e-12).sqrt()


def dead_zone(share: Tensor, p: float, q: float, alpha1: float, alpha2: float) -> Tensor:
    """alpha1 max(L_pr, p) - alpha2 min(L_pr, q): flat between q and p.            Eqs. (4), (8)"""
    return alpha1 * share.clamp_min(p) - alpha2 * share.clamp_max(q)


# ------------------------------------------------------------------------------------ Eq. (5)


def blocks(width: int, heads: int, layers: int) -> nn.ModuleList:
    """Pre-norm Transformer blocks, each with weights of its own from the start."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                   batch_first=True, norm_first=True) for _ in range(layers))


class FeatureSelector(nn.Module):
    """S: two logits a token, drop and keep.                                             Eq. (5)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.blocks = blocks(cfg.width, cfg.heads, cfg.layers)
        self.norm = nn.LayerNorm(cfg.width)
        self.head = nn.Linear(cfg.width, 2)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        padding = ~valid & valid.any(1, keepdim=True)            # to see nothing would make NaN
        for layer in self.blocks:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(self.norm(x))                           # (B, N, 2)


def gumbel_noise(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """-log(-log u) in logits' shape. One generator a row, so that what a picture draws does not
    depend on those that share its batch.                                                Eq. (5)"""
    u = torch.stack([torch.rand(logits.shape[1:], generator=g, device=logits.device)
                     for g in generators])
    u = u.clamp(1e-9, 1 - 1e-7)
    return -(-u.log()).log().to(logits)


def hard_mask(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """M (B, N): 0 or 1 forwards, softmax((logits + noise) / tau) backwards.                Eq. (5)

    noise in logits' shape: gumbel_noise(), or zeros for the straight-through softmax of B.1.
    """
    soft = ((logits + noise) / tau).softmax(-1)[..., 1]
    hard = (logits + noise).argmax(-1).to(soft)
    return hard + (soft - soft.detach())


def put_masked(x: Tensor, mask: Tensor, masked: Tensor) -> Tensor:
    """F_pr (B, N, C): one learned embedding, masked (C,), in place of what is dropped.  Eq. (5)"""
    mask = mask.unsqueeze(-1)
    return mask * x + (1 - mask) * masked


# ------------------------------------------------------------------------------------ Eq. (6)


class FeatureReconstructor(nn.Module):
    """R_f: all tokens again, from those that were kept.                                 Eq. (6)"""

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
        self.body = nn.Sequential(
            nn.GroupNorm(1, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(1, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ImageReconstructor(nn.Module):
    """R_im: the picture from the rebuilt tokens; upsampling and residual blocks in turn.Eq. (6)"""

    def __init__(self, cfg: Config):
        super().__init__()
        self.blocks = blocks(cfg.width, cfg.heads, cfg.image_layers)
        doublings = max(cfg.patch.bit_length() - 1, 1)           # 2^doublings <= patch
        width = cfg.width
        stages = []
        for i in range(1, doublings + 1):
            narrower = max(cfg.channels, cfg.width >> i)
            stages += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrower, 3, padding=1),
                       Residual(narrower)]
            width = narrower
        self.up = nn.Sequential(*stages)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """x (B, rows * columns, C) -> pixels (B, 3, *size)."""
        for layer in self.blocks:
            x = layer(x)
        picture = self.up(x.mT.unflatten(2, grid))
        return self.out(F.interpolate(picture, size, mode="bilinear"))


# ------------------------------------------------------------------------------------ Eq. (7)


def kept_share(mask: Tensor, valid: Tensor) -> Tensor:
    """L_pr, the share of tokens that were kept, mean over images.                       Eq. (7)"""
    return ((mask * valid).sum(1) / valid.sum(1)).mean()


def stage_rate(step: int, steps: int, stages=(0.6, 0.2, 0.2), warmup: float = 0.05) -> float:
    """Factor of the learning rate: a cosine from 1 to 0 in each stage, after a linear warm-up.

    stages: the paper's 60 + 20 + 20 epochs as shares of any number of steps.
    """
    done = min(step, steps - 1) / max(steps, 1)
    start = 0.0
    for share in stages:
        if done < start + share - 1e-9:
            break
        start += share
    warm = min((step + 1) / max(warmup * steps, 1), 1.0)
    return warm * (0.5 + 0.5 * math.cos(math.pi * (done - start) / share))


def per_crop(keep: int, counts: list[int]) -> list[int]:
    """`keep` tokens of a picture as so many of each of its crops, in proportion to the crops'
    tokens and at least one of each that has any: S was trained on one crop at a time."""
    least = [min(n, 1) for n in counts]
    if not sum(least) <= keep <= sum(counts):
        raise ValueError(f"keep={keep} of crops of {counts} tokens: expected {sum(least)} to "
                         f"{sum(counts)}")
    share = [max(keep * n // sum(counts), low) for n, low in zip(counts, least)]
    while sum(share) != keep:            # what rounding left goes to the crop furthest behind
        step = 1 if sum(share) < keep else -1
        behind = [step * (keep * n / sum(counts) - k) for n, k in zip(counts, share)]
        free = [b for b, n in enumerate(counts) if least[b] <= share[b] + step <= n]
        share[max(free, key=lambda b: (behind[b], -b))] += step
    return share


# ------------------------------------------------------------------------------------ the method


class ReconSelector(Selector):
    """S, R_f and R_im. Parameters are float32; tokens come in any float type."""

    weight_decay = 0.0

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.selector = FeatureSelector(cfg)
        self.features = FeatureReconstructor(cfg)
        self.image = ImageReconstructor(cfg)
        self.masked = nn.Parameter(torch.randn(cfg.width) * 0.02)                      # E_masked
        self.norm = nn.BatchNorm1d(cfg.width, affine=False)                  # holds the statistics
        self.share_of_step = None              # L_pr, where loss() sees only some of the pictures

    @property
    def rows(self) -> str:
        return "question twice" if self.reads_language else "picture"

    @property
    def reads_language(self) -> bool:
        return self.cfg.select_after_layer > 0

    @staticmethod
    def learning_rate(peak: float, number: int, total: int) -> float:
        return peak * stage_rate(number, total)

    # -------------------------------------------------------------------------------- training

    @torch.no_grad()
    def look(self, vlm, batch) -> Units:
        """What select() reads of every picture: the encoder's features, or the states behind a
        layer of the language model."""
        units = super().read(vlm, batch)
        if self.reads_language:
            prompt = vlm.embed(batch.rows, units)
            states = inside.visual_states(vlm, prompt, self.cfg.select_after_layer)
            units = inside.Shown.of(vlm, batch.rows, units).with_states(states)
        return units

    def read(self, vlm, batch) -> Units:
        """by_crop() of look()."""
        return self.by_crop(self.look(vlm, batch))

    @staticmethod
    def by_crop(units: Units) -> Units:
        """Every crop a picture of its own, but for those without a token. Further readings (M,):
        "picture", the number of the one that it is of, and "crop", its own among all."""
        crops = replace(units, readings={**units.readings, "picture": units.image_of}).apart()
        crops = replace(crops, readings={**crops.readings, "crop": crops.image_of})
        there = crops.pad(crops.image_of)[1].any(1)
        return crops if there.all() else crops.rows(there.nonzero().flatten().tolist())

    @torch.no_grad()
    def observe(self, vlm, parts: list, step) -> None:
        """Take in mean and variance per channel of all tokens of a step, on all processes; then
        foresee L_pr of them all, at which the dead zone bends."""
        sums = []
        for _, units in parts:
            tokens = self.tokens(*units.pad()).double()
            count = tokens.new_tensor([len(tokens)])
            sums.append(torch.cat([count, tokens.sum(0), tokens.square().sum(0)]))
        sums = step.sum(torch.stack(sums).sum(0))
        mean, square = (sums[1:] / sums[0]).chunk(2)
        variance = (square - mean.square()).clamp(min=0).float()
        count = sums[0].long()

        # the mean of all steps', with the unbiased variance, as BatchNorm keeps them; a step may be
        # one picture of one token
        self.norm.num_batches_tracked += 1
        weight = 1 / self.norm.num_batches_tracked
        self.norm.running_mean.lerp_(mean.float().to(self.masked), weight)
        variance = variance * count / (count - 1).clamp(min=1)
        self.norm.running_var.lerp_(variance.to(self.masked), weight)

        self.share_of_step = None
        if step.shares > 1 and self.cfg.regulariser == "dead_zone":     # the plain one is linear
            self.share_of_step = self.foresee_share(parts, step)

    def foresee_share(self, parts: list, step) -> Tensor:
        """L_pr of the whole step, with the noise that loss() will draw: each part alone would bend
        at its own, and --micro would change the selector."""
        sums = []
        for i, (_, units) in enumerate(parts):
            v, valid = units.pad()
            part = step.of_part(i)
            generators = part.generators(numbers(units, "picture"))
            with part.autocast():
                mask = self.mask(self.standardised(v, valid), valid, generators)
                share = kept_share(mask, valid)
            sums.append(torch.stack([share * len(valid), share.new_tensor(len(valid))]))
        total, pictures = step.sum(torch.stack(sums).double().sum(0))
        return total / pictures

    def loss(self, vlm, batch, units, step) -> tuple[Tensor, dict]:
        """Eq. (8), a mean over pictures. The language model is not called."""
        cfg = self.cfg
        v, valid = units.pad()
        pixels = vlm.adapter.pixels(batch.pictures)                      # of every crop
        pixels = [pixels[crop] for crop in numbers(units, "crop")]       # I
        generators = step.generators(numbers(units, "picture"))
        with step.autocast():
            mask, feature, image = self(v, valid, pixels, units.grid, generators)
            feature = feature.mean()                                     # |F_rec - F|
            image = image.mean()                                         # |I_rec - I|
            share = kept_share(mask, valid)                              # L_pr
            if self.share_of_step is not None:     # its value for all, its slope for these pictures
                share = share + (self.share_of_step.to(share) - share.detach())
            if cfg.regulariser == "dead_zone":
                pressure = dead_zone(share, cfg.keep_high, cfg.keep_low, cfg.alpha1, cfg.alpha2)
            else:
                pressure = cfg.alpha1 * share
            loss = feature + image + pressure
        # the mean is over the pictures of the whole step, of which these are a part
        return loss * len(valid) / step.rows, {"feature": feature.item(), "image": image.item(),
                                               "kept": share.item(), "pressure": pressure.item()}

    def forward(self, v: Tensor, valid: Tensor, pixels: list[Tensor], grids: list,
                generators: list | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """-> M (B, N), |F_rec - F| (B,), |I_rec - I| (B,).                           Eqs. (5), (6)

        pixels, grids as in errors(); generators: one a row, which estimator="softmax" needs not.
        """
        x = self.standardised(v, valid)
        mask = self.mask(x, valid, generators)
        return mask, *self.errors(x, mask, pixels, grids)

    def tokens(self, v: Tensor, valid: Tensor) -> Tensor:
        """(n, C), what the statistics are of: every token, of several patches their mean."""
        return (v.mean(2) if v.dim() == 4 else v).to(self.masked.dtype)[valid]

    def standardised(self, v: Tensor, valid: Tensor) -> Tensor:
        """v (B, N, C) or (B, N, P, C) -> x (B, N, C), mean 0 and variance 1 in each channel."""
        x = F.batch_norm(self.tokens(v, valid), self.norm.running_mean, self.norm.running_var)
        return x.new_zeros(*valid.shape, x.shape[-1]).masked_scatter(valid.unsqueeze(-1), x)

    def mask(self, x: Tensor, valid: Tensor, generators: list | None) -> Tensor:
        """M (B, N) with fresh noise; what is padding cannot be kept.                    Eq. (5)"""
        logits = self.selector(x, valid).to(x.dtype)
        noise = torch.zeros_like(logits)
        if self.cfg.estimator == "gumbel":
            noise = gumbel_noise(logits, generators)
        return hard_mask(logits, noise, self.cfg.tau) * valid

    def rebuild(self, x: Tensor, mask: Tensor, grid, size) -> tuple[Tensor, Tensor]:
        """F_rec and I_rec of pictures of one grid and size.                             Eq. (6)"""
        rebuilt = self.features(put_masked(x, mask, self.masked), grid)
        return rebuilt, self.image(rebuilt, grid, size)

    def errors(self, x: Tensor, mask: Tensor, pixels: list[Tensor],
               grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """|F_rec - F| and |I_rec - I|, (B,) each. Pictures of one shape go together.        Eq. (3)

        pixels[b] (3, H, W), grids[b] (rows, columns) of its units.
        """
        shapes = [(grid, picture.shape[1:]) for grid, picture in zip(grids, pixels)]
        order = []
        errors = []
        for grid, size in dict.fromkeys(shapes):
            alike = [b for b, shape in enumerate(shapes) if shape == (grid, size)]
            n = grid[0] * grid[1]
            tokens = x[alike, :n]
            rebuilt, picture = self.rebuild(tokens, mask[alike, :n], grid, size)
            original = torch.stack([pixels[b] for b in alike]).to(picture)
            errors.append(torch.stack([distance(rebuilt, tokens), distance(picture, original)]))
            order += alike
        feature, image = torch.cat(errors, 1)[:, torch.tensor(order).argsort()]
        return feature, image

    # -------------------------------------------------------------------------------- selection

    @torch.no_grad()
    def token_scores(self, v: Tensor, valid: Tensor) -> Tensor:
        """s (B, N): how far keep stands above drop; the hard mask without noise is s > 0."""
        logits = self.selector(self.standardised(v, valid), valid)
        return logits[..., 1] - logits[..., 0]

    @torch.no_grad()
    def best(self, v: Tensor, valid: Tensor, keep: int | list[int] | None = None) -> list[Tensor]:
        """One ascending int64 tensor a row: the keep, or keep[b], tokens with the largest scores;
        with None those of the hard mask, at least one if there is any.            Section 4.1.1"""
        chosen = []
        scores = self.token_scores(v, valid).masked_fill(~valid, -torch.inf)
        check_finite(scores.masked_fill(~valid, 0), "scores")
        for b, (s, here) in enumerate(zip(scores, valid)):
            n = int(here.sum())
            k = keep[b] if isinstance(keep, list) else keep
            if k is not None and not min(n, 1) <= k <= n:
                raise ValueError(f"keep={k} does not fit {n} visual tokens")
            if k is None:
                k = max(int((s > 0).sum()), min(n, 1))
            chosen.append(s.argsort(descending=True, stable=True)[:k].sort().values)
        return chosen

    @torch.no_grad()
    def select(self, units, question, keep) -> list[Tensor]:
        """best() of every picture, in each of its crops by itself. The question is not read.

        keep: a number, one per picture, or None for the selector's own mask.
        """
        v, valid = units.apart().pad()
        if keep is not None:
            crops = split_by(valid.sum(1).tolist(), units.views or [1] * len(units.grid))
            keep = [keep] * len(crops) if isinstance(keep, int) else keep
            keep = [share for k, counts in zip(keep, crops) for share in per_crop(k, counts)]
        return units.together(self.best(v, valid, keep))

    @torch.no_grad()
    def scores(self, units, question) -> Tensor:
        apart = units.apart()
        return apart.flat(self.token_scores(*apart.pad()))

    def ways(self, names, budgets, calibration) -> dict[str, Way]:
        """"mask": what the selector keeps by itself. Inside the language model also two controls:
        "asked twice", the same prompt with nothing removed, and "random inside"."""
        check_ways(names, self.further_ways)
        if not self.reads_language:
            own = Way(lambda asked, _: self.select(asked.units, None, None), budgets=("mask",))
            return {**super().ways([], budgets, calibration), " mask": own}

        def after_layer(choose: Callable, budgets: tuple | None = None) -> Way:
            def stages(keep, tokens):
                return {self.cfg.select_after_layer: lambda view: among_units(view, keep, choose)}
            return Way(stages=stages, ask_twice=True, budgets=budgets)
        return {
            "": after_layer(lambda units, keep: self.select(units, None, keep)),
            " mask": after_layer(lambda units, _: self.select(units, None, None), ("mask",)),
            " asked twice": Way(stages=lambda keep, tokens: {}, ask_twice=True, budgets=("all",)),
            " random inside": after_layer(random_tokens.select)}


def numbers(units: Units, name: str) -> list[int]:
    """Of every crop its reading of this name."""
    return units.pad(units.readings[name])[0][:, 0].tolist()


def among_units(view: inside.LayerView, keep, choose: Callable) -> list[Tensor]:
    """choose(units, K of every row) inside the language model, of the same units as in training:
    the visual tokens that stay. K counts units, and is at most what there are."""
    if view.shown is None:
        raise ValueError("a selection among units got a prompt with newlines or crops: expected "
                         "shown=Shown.of(vlm, batch, units), see baselines/inside.py")
    units = view.shown.with_states(view.prompt.embeds[view.prompt.is_visual])
    if isinstance(keep, int):
        keep = [min(keep, n) for n in units.pad(units.image_of)[1].sum(1).tolist()]
    return view.shown.tokens(choose(units, keep))


Method = ReconSelector
