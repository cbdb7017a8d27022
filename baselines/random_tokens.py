"""Random: K of an image's tokens, uniformly. The floor that every selector has to beat."""

import zlib

import torch

from runs import Way

from . import pictures

NAMES = {"random": {}}


def needs(vlm) -> dict:
    return {}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False) -> list[torch.Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; the same for the same seed and
    shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [here.cpu()[torch.randperm(len(here), generator=generator)[:k]].sort().values
            for here, k in pictures(units, keep)]


def way(vlm, seed: int = 0) -> Way:
    """Every picture has its own draw, from the seed and its name, whatever batch it comes in."""
    def choose(asked, k):
        keep = []
        for b, name in enumerate(asked.names):
            own = zlib.crc32(f"{seed} {name}".encode())
            keep.append(select(asked.units.rows([b]), k, seed=own)[0])
        return keep
    return Way(choose, needs=needs(vlm))
