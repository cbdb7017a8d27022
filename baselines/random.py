"""Random: K of an image's tokens, uniformly. The floor that every selector has to beat."""

import torch


def select(units, keep: int, seed: int = 0) -> list[torch.Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; the same for the same seed and shapes.

    units: common.Units. Raises ValueError where an image has fewer than `keep` units.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = units.image_of.bincount(minlength=len(units.grid)).tolist()
    if not 0 < keep <= min(sizes):
        raise ValueError(f"keep={keep} does not fit {min(sizes)} visual tokens")
    return [torch.randperm(n, generator=generator)[:keep].sort().values for n in sizes]
