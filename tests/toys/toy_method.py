"""A method in one file: a linear score per token, shares by a sigmoid, the K best at test time."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.hf_argparser import HfArg

from runs import Selector


@dataclass
class Sizes:
    width: int = 1024

    @classmethod
    def of(cls, vlm, **options):
        return cls(width=vlm.width, **options)


@dataclass
class Config(Sizes):
    sparsity: float = HfArg(default=0.5, help="weight of the mean share [ours]")


TINY = dict(steps=20, batch=4, lr=1e-2, sparsity=0.1)
LARGE = dict(steps=100, batch=16, lr=1e-3)


class Toy(Selector):

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.score = nn.Linear(cfg.width, 1)

    def loss(self, vlm, batch, units, step):
        share = torch.sigmoid(self.score(units.feats.float()))
        prompt = vlm.embed(batch.rows, units, (units.feats * share).to(units.feats.dtype))
        nll = vlm.loss(prompt) * batch.answers / step.answers
        price = share.sum() / len(units.feats) * len(units.grid) / step.rows
        return nll + self.cfg.sparsity * price, {"share": share.mean().item()}

    @torch.no_grad()
    def select(self, units, question, keep):
        scores, valid = units.pad(self.scores(units, question))
        scores = scores.masked_fill(~valid, -torch.inf)
        return [row.topk(keep).indices.sort().values for row in scores]

    @torch.no_grad()
    def scores(self, units, question):
        return self.score(units.feats.float())[:, 0]


Method = Toy
