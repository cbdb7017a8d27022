"""Random: K of an image's tokens, uniformly. The floor that every selector has to beat."""

import torch

from . import pictures


def look(vlm) -> dict:
    return {}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False) -> list[torch.Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; the same for the same seed and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [here.cpu()[torch.randperm(len(here), generator=generator)[:k]].sort().values
            for here, k in pictures(units, keep)]
