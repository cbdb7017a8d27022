"""LLaVA-NeXT: LLaVA's tower on the whole picture and on crops."""

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from common import LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """The crops' units stand in the prompt as the raster of one large picture, without its padding
    and with a newline behind every row.

    crops  the first view of a picture shows it whole, the others are crops of it: see crop_of()
    """
    model_type, crops, square = "llava_next", True, False

    def crop_of(self, batch) -> Tensor:
        """(M,) int64: for a unit of a whole picture, the crop, from 0, that shows its middle; -1
        for the crops' units."""
        side, size = self.side, self.config.vision_config.image_size
        middle = (torch.arange(side) + .5) / side

        def crop_along(full: int, length: int, scale: float) -> Tensor:
            """The row (or column) of crops at each unit's middle; the picture stands centred."""
            return ((full - scale * length) / 2 + middle * scale * length) // size
        parts = []
        for (h, w), n in zip(batch["image_sizes"].tolist(), self.views(batch)):
            height, width = select_best_resolution((h, w), self.config.image_grid_pinpoints)
            scale = min(height / h, width / w)    # it fills the crops' canvas in one direction
            row = crop_along(height, h, scale)
            column = crop_along(width, w, scale)
            parts.append((row[:, None] * (width // size) + column).flatten())
            parts.append(-torch.ones((n - 1) * side ** 2))
        return torch.cat(parts).long().to(batch["image_sizes"].device)

    def views(self, batch):
        size = self.config.vision_config.image_size
        best = [select_best_resolution(shape, self.config.image_grid_pinpoints)
                for shape in batch["image_sizes"].tolist()]
        return [1 + (h // size) * (w // size) for h, w in best]

    def tiles(self, batch):
        # the processor pads every picture to the most crops of the batch
        return torch.cat([x[:n] for x, n in zip(batch["pixel_values"], self.views(batch))])

    def slots(self, batch):
        views, size = self.views(batch), self.side ** 2
        device = batch["image_sizes"].device
        # the stock packer, run on the units' numbers, tells where it puts each, and which it drops
        numbers = torch.arange(sum(views) * size, device=device).view(-1, size, 1)
        packed, _ = self.model.pack_image_features(
            numbers.split(views), batch["image_sizes"], "default",
            image_newline=-numbers.new_ones(1))
        lines, seen = [], 0
        for unit in packed:
            is_newline = unit.flatten() < 0
            line = seen + is_newline.cumsum(0) - is_newline.long()
            line[:size] = -1
            seen += len(unit)
            # of a very thin picture the crops have no column left: its newlines end the whole one
            lines.append(torch.where(is_newline[size:].all(), seen - 1, line))
        return torch.cat(packed).flatten(), torch.cat(lines)
