"""Random: K of an image's tokens, uniformly. The floor that every selector has to beat."""

import torch


def select(units, keep: int, seed: int = 0) -> list[torch.Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices; the same for the same seed and shapes.

    units: common.Units. Raises ValueError where an image shows fewer than `keep` units.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = [valid.nonzero().flatten().cpu() for valid in units.pad(units.image_of)[1]]
    fewest = min(len(row) for row in shown)
    if not 0 < keep <= fewest:
        raise ValueError(f"keep={keep} does not fit {fewest} visual tokens")
    return [row[torch.randperm(len(row), generator=generator)[:keep]].sort().values for row in shown]
