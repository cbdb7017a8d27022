"""What a selector sees, and what enters the language model."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORE = -100                                         # label of a token that is no answer


@dataclass
class Units:
    """The visual units of a batch: everything that a selector sees. No gradient.

    feats     (M, C), or (M, P, C) where a unit has P patches: raster order, all images one after another
    image_of  (M,) int64, row of the batch that the unit belongs to, ascending
    grid      (rows, columns) of units, for every image; of one with several views, as if these stood one below another,
              or, where they are not equally wide, as one column
    views     of every image, how many views it has; None if each has one
    shapes    (rows, columns) of all views, one image's after another's; None if those of one image are alike
    shown     (M,) bool, False for a unit without a token: padding that LLaVA-NeXT cuts off; None if each has one
    seen      name -> (M, ...), what encode(look=...) was asked to show besides
    """
    feats: Tensor
    image_of: Tensor
    grid: list[tuple[int, int]]
    views: list[int] | None = None
    shown: Tensor | None = None
    shapes: list[tuple[int, int]] | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Units of each image."""
        return [rows * columns for rows, columns in self.grid]

    def _column(self) -> Tensor:
        """(M,) index of every unit inside its own image."""
        return torch.cat([torch.arange(n, device=self.image_of.device) for n in self.counts])

    def pad(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(M, ...), by default feats -> (B, N, ...) with zeros behind shorter images, valid (B, N) bool: the units
        that may be kept, that is not what stands behind a shorter image, nor a unit that is not shown."""
        x = self.feats if x is None else x
        if len(x) != len(self.image_of):
            raise ValueError(f"pad() got {len(x)} rows: expected one per unit, that is {len(self.image_of)}")
        column = self._column()
        out = x.new_zeros(len(self.grid), max(self.counts), *x.shape[1:])
        valid = torch.zeros(out.shape[:2], dtype=torch.bool, device=x.device)
        out[self.image_of, column] = x
        valid[self.image_of, column] = True if self.shown is None else self.shown
        return out, valid

    def flat(self, padded: Tensor) -> Tensor:
        """(B, N, ...) -> (M, ...), the inverse of pad()."""
        if padded.shape[:2] != (len(self.grid), max(self.counts)):
            raise ValueError(f"flat() got shape {tuple(padded.shape)}: expected ({len(self.grid)}, "
                             f"{max(self.counts)}, ...), as pad() gives it")
        return padded[self.image_of, self._column()]

    def rows(self, owner: list[int]) -> "Units":
        """Units for a batch whose row b shows image owner[b]: several questions about one encoded image."""
        parts = [(self.image_of == b).nonzero().flatten() for b in owner]
        index, sizes = torch.cat(parts), torch.tensor([len(part) for part in parts])
        image_of = torch.arange(len(owner)).repeat_interleave(sizes).to(index.device)
        shown = None if self.shown is None else self.shown[index]
        views = None if self.views is None else [self.views[b] for b in owner]
        shapes = None if self.shapes is None else sum((split_by(self.shapes, self.views)[b] for b in owner), [])
        seen = {name: x[index] for name, x in self.seen.items()}
        return Units(self.feats[index], image_of, [self.grid[b] for b in owner], views, shown, shapes, seen)

    def apart(self) -> "Units":
        """The same units with every view an image of its own: for a selector that chooses in each by itself."""
        if self.views is None:
            return self
        grid = self.shapes or [(rows // n, columns) for (rows, columns), n in zip(self.grid, self.views)
                               for _ in range(n)]
        sizes = torch.tensor([rows * columns for rows, columns in grid])
        image_of = torch.arange(len(grid)).repeat_interleave(sizes).to(self.image_of.device)
        return replace(self, image_of=image_of, grid=grid, views=None, shapes=None)

    def together(self, keep) -> list[Tensor]:
        """What was kept of each view of apart(), one (K_t,) of indices a view -> the same as keep of these units."""
        views, keep = self.views or [1] * len(self.grid), list(keep)
        if len(keep) != sum(views):
            raise ValueError(f"keep has {len(keep)} rows: expected one per view, that is {sum(views)}")
        first = [sum(sizes[:i]) for sizes in split_by(self.apart().counts, views) for i in range(len(sizes))]
        return [torch.cat(part) for part in split_by([k + i for k, i in zip(keep, first)], views)]


def split_by(items: list, sizes: list[int]) -> list[list]:
    """The first sizes[0] items, the next sizes[1], and so on."""
    rest = iter(items)
    return [[next(rest) for _ in range(n)] for n in sizes]


@dataclass
class Prompt:
    """What enters the language model.

    embeds (B, L, D) | mask (B, L) int64, 0 on the left padding | pos (B, L), or (3, B, L) with M-RoPE
    labels (B, L) int64, -100 on all but the answers | is_visual (B, L) bool: units, and newlines between them
    Inside the language model also  origin (B, L) int64: a visual token's index among those that entered, -1 for text
    log_size (B, L): what is added to the attention logits of a token as a key; None for nothing
    """
    embeds: Tensor
    mask: Tensor
    pos: Tensor
    labels: Tensor | None
    is_visual: Tensor
    origin: Tensor | None = None
    log_size: Tensor | None = None

    def only(self, stays: Tensor) -> "Prompt":
        """The tokens in stays (B, L) bool, left padded anew: each keeps its position and its label."""
        count = stays.sum(1)
        width = int(count.max())
        # a stable sort by "stays" brings what stays to the right end in its old order, that is left padding
        index = stays.int().argsort(dim=1, stable=True)[:, -width:]
        mask = torch.arange(width, device=index.device) >= width - count[:, None]
        pos = self.pos.gather(-1, index.expand(*self.pos.shape[:-1], -1)).masked_fill(~mask, 0)
        labels = None if self.labels is None else self.labels.gather(1, index).masked_fill(~mask, IGNORE)
        embeds = self.embeds.gather(1, index[..., None].expand(-1, -1, self.embeds.shape[-1]))
        origin, log_size = (None if x is None else x.gather(1, index) for x in (self.origin, self.log_size))
        return Prompt(embeds, mask.long(), pos, labels, self.is_visual.gather(1, index) & mask, origin, log_size)
