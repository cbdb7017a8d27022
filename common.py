"""Frozen vision-language models with token pruning between the vision encoder and the projector.

Only this file knows `transformers`. A selector sees `Units` and answers with indices, never the model.

    vlm    = FrozenVLM.from_pretrained(path)
    batch  = vlm.batch(images, turns)           one image and one dialogue per row, left padded
    units  = vlm.encode(batch)                  frozen vision encoder, before the projector
    units  = vlm.encode(batch, look)            ... with what else a method wants to see of it, in units.seen
    prompt = vlm.embed(batch, units, feats)     training: every unit, gated by the selector, differentiable
    prompt = vlm.prune(batch, units, keep)      inference: the kept units alone, each at its ORIGINAL position
    prompt = vlm.prune(batch, units, keep, feats)        ... with other features: tokens that others were merged into
    vlm.loss(prompt), vlm.logits(prompt), vlm.generate(prompt)
    vlm.generate_within(prompt, {layer: rule})  inference: visual tokens leave inside the language model, too
    chat = Chat(vlm, image, units, keep)        inference: chat.ask(question) answers, and remembers

A unit is what the language model reads as one visual token: a CLIP patch in LLaVA, a 2x2 block of patches
in Qwen2.5-VL and InternVL. Pruning here is exact: the logits are those of the full sequence with the dropped tokens
hidden by the attention mask, because what stays keeps the rotary position it had there.

An image may reach the encoder as several views: crops in LLaVA-NeXT, tiles in InternVL, frames in the two video
families, where images[b] is a list of frames. In the others images[b] may be a list of images, which stand in front of
the first question, in order; these are views, too. All views of a row are one image to a selector, and what it may keep
is for the whole row; one that chooses in every view by itself asks Units.apart() and hands its answer to
Units.together().

Shapes  B rows (= images), M units of all images together, N most units of one image, C vision width,
        P patches per unit, L tokens of the prompt, D width of the language model, V vocabulary,
        T views of all images together, S image tokens of the batch.
Extend  a further family is one more subclass of Adapter, which says how, and one more line in ADAPTERS.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import errors as hub
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    Qwen2_5_VLProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.processing_utils import ProcessorMixin
from transformers.vision_utils import get_vision_window_index

IGNORE = -100                                         # label of a token that is no answer
PLAIN = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")          # decoders that are no more than layers and a norm


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
        shapes = None if self.shapes is None else sum((_split(self.shapes, self.views)[b] for b in owner), [])
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
        first = [sum(sizes[:i]) for sizes in _split(self.apart().counts, views) for i in range(len(sizes))]
        return [torch.cat(part) for part in _split([k + i for k, i in zip(keep, first)], views)]


def _split(items: list, sizes: list[int]) -> list[list]:
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


@dataclass
class Look:
    """What a rule sees in front of layer i. Attention, queries and keys are computed when they are asked for, from the
    layer's own projections, for the asked rows alone: whatever kernel the model runs with, it runs with that.

    prompt  all tokens in front of layer i | before: the same tokens in front of layer i - 1 | start: of layer 0
    blocks  layers i - 1 and i, whose number 0 or 1 is `own`: own=False reads layer i - 1, which has just run
    norm    the language model's last norm
    N most visual tokens of one row, T most text tokens behind the last visual one, H heads (of keys: fewer with
    grouped queries) of width d. Prompts are left padded: the last T columns hold the text behind the image.
    """
    prompt: Prompt
    before: Prompt
    start: Prompt
    blocks: tuple[nn.Module, nn.Module]
    rotary: tuple[Tensor, Tensor]
    norm: nn.Module

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, ...) -> (B, N, ...) of the visual tokens with zeros behind shorter rows, valid (B, N) bool."""
        visual = self.prompt.is_visual
        return Units(x[visual], visual.nonzero()[:, 0], [(1, n) for n in visual.sum(1).tolist()]).pad()

    @cached_property
    def states(self) -> Tensor:
        """(B, N, D) the visual tokens' hidden states."""
        return self.pad(self.prompt.embeds)[0]

    @cached_property
    def valid(self) -> Tensor:
        """(B, N) bool."""
        return self.pad(self.prompt.mask)[1]

    @cached_property
    def origin(self) -> Tensor:
        """(B, N) int64, of every visual token its index among those that entered the language model."""
        return self.pad(self.prompt.origin)[0]

    @cached_property
    def behind(self) -> Tensor:
        """(B, T) bool: which of the last T columns are text behind the image."""
        visual = self.prompt.is_visual
        behind = (visual.flip(1).cumsum(1).flip(1) == 0) & self.prompt.mask.bool()
        return behind[:, -max(int(behind.sum(1).max()), 1):]

    def rotate(self, x: Tensor) -> Tensor:
        """(B, Q, H, d) of the last Q columns, turned by their positions."""
        cos, sin = (part[:, -x.shape[1]:, None].to(x) for part in self.rotary)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def queries(self, last: int | None = None, own: bool = False, rope: bool = True) -> Tensor:
        """(B, Q, H, d) of the last Q columns, by default all L."""
        return self._project("q_proj", last, own, rope)

    def keys(self, own: bool = False, rope: bool = True) -> Tensor:
        """(B, L, H, d)."""
        return self._project("k_proj", None, own, rope)

    def _project(self, name: str, last: int | None, own: bool, rope: bool) -> Tensor:
        block, x = self.blocks[own], (self.prompt if own else self.before).embeds
        x = block.input_layernorm(x[:, -(last or x.shape[1]):])
        x = getattr(block.self_attn, name)(x).unflatten(-1, (-1, block.self_attn.head_dim))
        return self.rotate(x) if rope else x

    def attention(self, last: int = 1, own: bool = False) -> Tensor:
        """(B, H, Q, N) at least float32: what the last Q columns attend to each visual token, the softmax over all
        keys that the column sees. Columns of padding mean nothing."""
        q, k = self.queries(last, own), self.keys(own)
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.blocks[own].self_attn.scaling
        if self.prompt.log_size is not None:
            logits = logits + self.prompt.log_size[:, None, None].to(logits)
        column = torch.arange(k.shape[1], device=k.device)
        sees = (column <= column[-last:, None]) & self.prompt.mask.bool()[:, None]            # (B, Q, L)
        weights = logits.masked_fill(~sees[:, None], torch.finfo(logits.dtype).min).softmax(-1)
        return self.pad(weights.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1)


# Chooses the visual tokens that go on into a layer: keep, for each row ascending int64 indices (K,) into the visual
# tokens that it sees. Or keep and a dict of what to write over kept tokens, for each row as many values, under the name
# of the Prompt's field: {"embeds": [(K, D), ...], "log_size": [(K,), ...], "origin": [(K,), ...]}, any of these.
Rule = Callable[[Look], list[Tensor] | tuple[list[Tensor], dict[str, list[Tensor]]]]


@dataclass
class _Past:
    """What decoding needs to know of a stage. mask (B, K) int64: which keys are real, of those that the cache holds
    from its layer up to the next stage | log_size (B, K) of these keys, or None | shift: by how much positions fell"""
    mask: Tensor
    log_size: Tensor | None = None
    shift: Tensor | int = 0
# Says which tokens of the vision encoder's block i become one: i and its keys, mean over heads, (T, n, d) -> stays
# (T, n'), the tokens that go on, in their new order, and into (T, n), for every token its place in that order.
Merge = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class Adapter(ABC):
    """What is special to one family. To add a family: subclass this, give it encode(), fold() and project(), override
    what differs, add a line to ADAPTERS, and a tiny model to tests/tiny_models.py, on which the tests prove pruning
    exact.

    processor_class  whose from_pretrained() gives tokenizer, image processor and chat template
    kind             what the chat template calls a picture: "image" or "video"; rows of a video are lists of frames
    has_cls          whether the vision encoder has a [CLS] token
    whole, deep      numbers, from 0, of its blocks whose attention spans a view; the last of them that feats go through
    crops            whether crops of the first view follow it, so that one can look at "crop"
    unmergeable      why tokens cannot be merged inside the encoder; "" if they can
    side, unit_side  units along a side of a view, 0 at native resolution; pixels along a side of a unit
    """
    processor_class, kind, has_cls, crops, side = AutoProcessor, "image", False, False, 0
    unmergeable = "a visual token is made of several patches behind the vision encoder, which all have to arrive there"

    def __init__(self, model):
        self.model, self.config, vision = model.model, model.config, model.config.vision_config
        self.width, patch = vision.hidden_size, vision.patch_size
        self.unit_side = self.patch = patch if isinstance(patch, int) else patch[0]
        self.token_id = getattr(self.config, f"{self.kind}_token_id")
        tower = getattr(self.model, "visual", None) or self.model.vision_tower
        self.attentions = [part for part in tower.modules() if hasattr(part, "k_proj") or hasattr(part, "qkv")]
        self.depth = len(self.attentions)              # blocks that feats go through
        self.whole = list(range(self.depth))

    @property
    def deep(self) -> int:
        return max(i for i in self.whole if i < self.depth)

    def inputs(self, processor, images: list, text: list[str] | None = None, **how) -> BatchFeature:
        """The processor's tensors of pictures in RGB and, if there is text, of the prompts around them."""
        if text is None:
            return processor.image_processor(images=images, return_tensors="pt")
        return processor(images=images, text=text, **how)

    def _spelled(self, processor, pixels, counts, text, how) -> BatchFeature:
        """inputs() where the stock processor is of no use: the i-th image token of all is repeated counts[i] times."""
        if text is None:
            return pixels
        token, left = processor.tokenizer.convert_ids_to_tokens(self.token_id), iter(counts)
        text = [re.sub(re.escape(token), lambda found: found[0] * next(left), row) for row in text]
        tokens = processor.tokenizer(text, **how)
        return BatchFeature({name: tokens[name] for name in ("input_ids", "attention_mask")} | dict(pixels))

    def written(self, tokenizer, token: str) -> str:
        """What the prompt has where the chat template writes the image token."""
        return token

    def views(self, batch) -> list[int] | None:
        """Of every image, how many views it has; None if each has one. All views of an image are of one size."""
        return None

    def tiles(self, batch) -> Tensor:
        """(T, 3, H, W), what the encoder takes: all views, one after another."""
        return batch["pixel_values"]

    @abstractmethod
    def encode(self, batch, least: int = 0) -> tuple[Tensor, list[tuple[int, int]], Tensor | None]:
        """feats (M, C) or (M, P, C), (rows, columns) of units in every VIEW, states (T, C) of [CLS] or None.

        least: blocks that must run, even if feats do not go through them all.
        """

    @contextmanager
    def watch(self, layers: set[int]):
        """Gives a dict: layer -> (x, how), what the attention of these blocks is called with while this is open."""
        inputs = {}

        def keep(layer):
            def hook(module, args, how):
                how = dict(how)
                inputs[layer] = args[0] if args else how.pop("hidden_states"), how
            return hook
        hooks = [self.attentions[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
        try:
            yield inputs
        finally:
            for hook in hooks:
                hook.remove()

    def read(self, what: str, layer: int, x: Tensor, how: dict, batch) -> Tensor:
        """(M,) or, for keys, (M, d) float32: FrozenVLM.encode() lists them. From the block's input, for fused attention
        returns no weights; of [CLS], one row is computed, and never more than one head at a time."""
        what, _, wide = what.partition(" ")
        parts = []
        for q, k in self.queries_keys(self.attentions[layer], x, None if what == "keys" else how):
            if wide:
                q, k = (part.flatten(2)[:, :, None] for part in (q, k))
            q, k = q.float(), k.float()
            if what == "keys":
                parts.append(k.mean(2))
                continue
            q, k = (q[:, :1] if what == "cls" else q).transpose(1, 2) * q.shape[-1] ** -.5, k.permute(0, 2, 3, 1)
            rows = sum((q[:, h] @ k[:, h]).softmax(-1).mean(1) for h in range(k.shape[1])) / k.shape[1]
            parts.append(rows[..., None])
        found = self.fold(torch.cat(parts, 1), batch)
        return found if what == "keys" else found[:, 0]

    def queries_keys(self, attention, x: Tensor, how: dict | None) -> list[tuple[Tensor, Tensor]]:
        """q and k (T, n, H, d) of groups of views that see nothing of each other; how None: keys as projected."""
        q, k = (norm(proj(x)) for norm, proj in (
            (getattr(attention, "q_norm", nn.Identity()), attention.q_proj),
            (getattr(attention, "k_norm", nn.Identity()), attention.k_proj)))
        return [(q.unflatten(-1, (-1, attention.head_dim)), k.unflatten(-1, (-1, attention.head_dim)))]

    @abstractmethod
    def fold(self, x: Tensor, batch) -> Tensor:
        """(T, n, d), a value for every token of the encoder in its own order -> (M, d), the mean over each unit's."""

    def project(self, feats: Tensor, unit: Tensor) -> Tensor:
        """feats (K, C) or (K, P, C) of the units (K,) int64 of the batch -> (K, D)."""
        return self.model.multi_modal_projector(feats)

    def slots(self, batch) -> tuple[Tensor, Tensor] | None:
        """unit (S,), line (S,) int64 for every image token, row by row; None if the i-th shows unit i.

        unit: the one that it shows, -1 for a newline | line: the same number for a newline and for the units of the
        line that it ends, -1 for a unit without. A newline stays if and only if a unit of its line is kept.
        """
        return None

    def pixels(self, batch) -> list[Tensor]:
        """(3, H, W), a view each."""
        return list(self.tiles(batch))

    def positions(self, batch) -> Tensor:
        """(B, L), or (3, B, L) with M-RoPE, of the full prompt."""
        return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


class LlavaAdapter(Adapter):
    """LLaVA-1.5: CLIP, the layer that `vision_feature_layer` names, without [CLS]."""

    has_cls, unmergeable = True, ""

    def __init__(self, model):
        super().__init__(model)
        config, vision = model.config, model.config.vision_config
        layer, layers = config.vision_feature_layer, vision.num_hidden_layers
        strategy = config.vision_feature_select_strategy
        if (vision.model_type, strategy) != ("clip_vision_model", "default"):
            raise ValueError(f"LLaVA with vision tower {vision.model_type!r}, select strategy {strategy!r}: "
                             "expected 'clip_vision_model' and 'default', which drops [CLS]")
        if not isinstance(layer, int) or not 0 < abs(layer) <= layers:
            raise ValueError(f"vision_feature_layer={layer}: expected one of the {layers} layers, such as -2")
        # hidden state 0 is the embedding, so the last of all states is the output of layer number `layers`
        self.depth = layer if layer > 0 else layers + 1 + layer
        self.side = vision.image_size // vision.patch_size

    def encode(self, batch, least=0):
        """The layers above the feature layer do not run, unless one of them is looked at."""
        tower = self.model.vision_tower
        x = tower.pre_layrnorm(tower.embeddings(self.tiles(batch)))
        for i, block in enumerate(tower.encoder.layers[:max(self.depth, least)]):
            x = block(x, attention_mask=None)
            if i == self.deep:
                feats = x
        return feats[:, 1:].flatten(0, 1), [(self.side, self.side)] * len(feats), feats[:, 0]

    def fold(self, x, batch):
        return x[:, 1:].flatten(0, 1)

    def merged(self, batch, rule: Merge) -> tuple[Tensor, Tensor]:
        """feats (T, K, C) and the units (T, K) they stand at, ascending: encode() with tokens merged in every block,
        between attention and feed-forward. A merged token is the mean of its patches; to attention it counts as many
        times as it has patches (ToMe, arXiv:2210.09461, Sections 3 and 3.3). Token 0 is [CLS]."""
        tower = self.model.vision_tower
        x = tower.pre_layrnorm(tower.embeddings(self.tiles(batch)))
        size = x.new_ones(x.shape[:2])
        anchor = torch.arange(-1, x.shape[1] - 1, device=x.device).expand(len(x), -1)
        for i, block in enumerate(tower.encoder.layers[:self.depth]):
            attention, normed = block.self_attn, block.layer_norm1(x)
            q, k, v = (proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                       for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None])
            x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
            stays, into = rule(i, k.mean(1))
            # a product, not a scattered sum: on a GPU that one is added up in another order every time
            share = F.one_hot(into, stays.shape[1]).transpose(1, 2).to(x) * size[:, None]
            size, anchor = share.sum(-1), anchor.gather(1, stays)
            x = share @ x / size[..., None]
            x = x + block.mlp(block.layer_norm2(x))
        anchor, order = anchor[:, 1:].sort(dim=1)
        return x[:, 1:].gather(1, order[..., None].expand(-1, -1, self.width)), anchor


class LlavaNextAdapter(LlavaAdapter):
    """LLaVA-NeXT: LLaVA's tower on the whole picture and on crops; the crops' units stand in the prompt as the raster
    of one large picture, without its padding, with a newline behind every row."""

    crops = True
    unmergeable = "the padding of the crops is cut off behind the vision encoder, patch by patch"

    def crop_of(self, batch) -> Tensor:
        """(M,) int64: for a unit of a whole picture, the crop, from 0, that shows its middle; -1 for crops' units."""
        out, side, size = [], self.side, self.config.vision_config.image_size
        middle = (torch.arange(side) + .5) / side
        for (h, w), n in zip(batch["image_sizes"].tolist(), self.views(batch)):
            height, width = select_best_resolution((h, w), self.config.image_grid_pinpoints)
            scale = min(height / h, width / w)         # the picture fills the crops' canvas in one direction
            row, column = (((full - scale * x) / 2 + middle * scale * x) // size
                           for full, x in ((height, h), (width, w)))
            out += [(row[:, None] * (width // size) + column).flatten(), -torch.ones((n - 1) * side ** 2)]
        return torch.cat(out).long().to(batch["image_sizes"].device)

    def views(self, batch):
        size = self.config.vision_config.image_size
        best = [select_best_resolution(shape, self.config.image_grid_pinpoints)
                for shape in batch["image_sizes"].tolist()]
        return [1 + (h // size) * (w // size) for h, w in best]

    def tiles(self, batch):
        return torch.cat([x[:n] for x, n in zip(batch["pixel_values"], self.views(batch))])

    def slots(self, batch):
        views, size = self.views(batch), self.side ** 2
        # the stock packer, run on the units' numbers, tells where it puts each and which it leaves out
        numbers = torch.arange(sum(views) * size, device=batch["image_sizes"].device).view(-1, size, 1)
        unit = torch.cat(self.model.pack_image_features(
            numbers.split(views), batch["image_sizes"], "default", image_newline=-numbers.new_ones(1))[0]).flatten()
        whole = torch.tensor([0, *views[:-1]], device=unit.device).cumsum(0)          # the view that is no crop
        newline = unit < 0
        line = newline.cumsum(0) - newline.long()
        return unit, line.masked_fill(torch.isin(unit // size, whole), -1)


class ImageOnlyProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template, for families whose stock processor needs torchvision for videos."""

    # transformers reads the parts to load from this signature
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class InternVLAdapter(Adapter):
    """InternVL3: InternViT on tiles and on the whole picture; a unit is the block of patches of one pixel shuffle."""

    processor_class, has_cls = ImageOnlyProcessor, True

    def __init__(self, model):
        super().__init__(model)
        config, vision = model.config, model.config.vision_config
        self.layer, self.merge = config.vision_feature_layer, round(1 / config.downsample_ratio)
        if not isinstance(self.layer, int) or config.vision_feature_select_strategy != "default":
            raise ValueError(f"InternVL with vision_feature_layer={self.layer}, select strategy "
                             f"{config.vision_feature_select_strategy!r}: expected one layer, and 'default'")
        self.unit_side = self.patch * self.merge
        self.side = vision.image_size[0] // self.unit_side
        self.depth = self.layer if self.layer >= 0 else len(self.attentions) + 1 + self.layer

    def inputs(self, processor, images, text=None, **how):
        pixels = processor.image_processor(images=images, crop_to_patches=True, return_tensors="pt")
        return self._spelled(processor, pixels, [n * self.side ** 2 for n in self.views(pixels)], text, how)

    def written(self, tokenizer, token):
        return f"{tokenizer.start_image_token}{token}{tokenizer.end_image_token}"

    def views(self, batch):
        return batch["num_patches"].tolist()

    def encode(self, batch, least=0):
        found = self.model.vision_tower(self.tiles(batch), output_hidden_states=self.layer != -1)
        x = found.last_hidden_state if self.layer == -1 else found.hidden_states[self.layer]
        return self._blocks(x), [(self.side, self.side)] * len(x), x[:, 0]

    def _blocks(self, x: Tensor) -> Tensor:
        """(T, 1 + n, d) -> (M, P, d)."""
        x = x[:, 1:].unflatten(1, (self.side, self.merge, self.side, self.merge)).transpose(2, 3)
        return x.reshape(-1, self.merge ** 2, x.shape[-1])

    def fold(self, x, batch):
        return self._blocks(x).mean(1)

    def project(self, feats, unit):
        return self.model.multi_modal_projector(feats.flatten(1))


class LlavaNextVideoAdapter(LlavaAdapter):
    """LLaVA-NeXT-Video on frames: LLaVA's tower, whose patches are pooled, 2x2 to a unit. Still pictures are read as
    videos of one frame, not cropped."""

    processor_class, kind, newlines, unmergeable = ImageOnlyProcessor, "video", 0, Adapter.unmergeable

    def __init__(self, model):
        super().__init__(model)
        self.pooled = self.side // self.config.spatial_pool_stride
        self.unit_side = self.patch * self.config.spatial_pool_stride

    def inputs(self, processor, images, text=None, **how):
        """Raises ValueError unless all rows have the same number of frames."""
        from transformers import CLIPImageProcessor  # not above: without torchvision it warns as soon as it is named

        clips, given = [x if isinstance(x, list) else [x] for x in images], processor.image_processor
        if len({len(clip) for clip in clips}) > 1:
            raise ValueError(f"the rows have {[len(clip) for clip in clips]} frames: expected as many in each")
        # the stock image processor would cut frames into crops
        single = CLIPImageProcessor(
            size=dict(given.size), resample=given.resample, image_mean=given.image_mean, image_std=given.image_std,
            do_center_crop=bool(given.do_center_crop), crop_size=dict(given.crop_size or given.size))
        x = single(images=sum(clips, []), return_tensors="pt")["pixel_values"].unflatten(0, (len(clips), -1))
        count = x.shape[1] * self.pooled ** 2 + self.newlines
        return self._spelled(processor, BatchFeature({"pixel_values": x}), [count] * len(clips), text, how)

    def views(self, batch):
        return [batch["pixel_values"].shape[1]] * len(batch["pixel_values"])

    def tiles(self, batch):
        return batch["pixel_values"].flatten(0, 1)

    def encode(self, batch, least=0):
        feats, grid, cls = super().encode(batch, least)
        feats = self.model.vision_resampler(feats.view(len(grid), -1, self.width)).flatten(0, 1)
        return feats, [(self.pooled, self.pooled)] * len(grid), cls

    def fold(self, x, batch):
        x = x[:, 1:].transpose(1, 2).unflatten(-1, (self.side, self.side))
        return F.avg_pool2d(x, self.side // self.pooled).flatten(2).transpose(1, 2).flatten(0, 1)


class LlavaOnevisionAdapter(LlavaNextVideoAdapter):
    """LLaVA-OneVision (and LLaVA-Video) on frames: SigLIP. A token is a mixture of the 2x2 projected patches around
    it; a unit is these patches before the projector. One newline ends the video."""

    has_cls, newlines = False, 1

    def __init__(self, model):
        Adapter.__init__(self, model)
        config, vision = model.config, model.config.vision_config
        self.layer, self.side = config.vision_feature_layer, vision.image_size // self.patch
        if not isinstance(self.layer, int) or config.vision_feature_select_strategy != "full":
            raise ValueError(f"LLaVA-OneVision with vision_feature_layer={self.layer}, select strategy "
                             f"{config.vision_feature_select_strategy!r}: expected one layer, and 'full'")
        self.depth = self.layer if self.layer >= 0 else len(self.attentions) + 1 + self.layer
        self.pooled = -(-self.side // 2)
        self.unit_side = vision.image_size // self.pooled
        # interpolation is linear: of the unit vectors, it gives the weights of all patches in every mixture
        share = F.interpolate(torch.eye(self.side)[None].double(), self.pooled, mode="linear")[0].T
        weight, at = share.topk(2)                     # (pooled, 2)
        self.patches = (at[:, None, :, None] * self.side + at[None, :, None, :]).reshape(-1, 4)
        self.weight = (weight[:, None, :, None] * weight[None, :, None, :]).reshape(-1, 4)

    def encode(self, batch, least=0):
        x = self.model.vision_tower(self.tiles(batch), output_hidden_states=True).hidden_states[self.layer]
        return x[:, self.patches].flatten(0, 1), [(self.pooled, self.pooled)] * len(x), None

    def fold(self, x, batch):
        """The mean is weighted as the projected patches are."""
        return (x[:, self.patches] * self.weight.to(x)[..., None]).sum(2).flatten(0, 1)

    def project(self, feats, unit):
        weight = self.weight.to(feats)[unit % self.pooled ** 2]
        return (super().project(feats, unit) * weight[..., None]).sum(1)

    def slots(self, batch):
        if "input_ids" not in batch:                   # pictures alone: no token, but every unit will have one
            return None
        rows = len(batch["input_ids"])
        unit = torch.arange(int((batch["input_ids"] == self.token_id).sum()) - rows, device=batch["input_ids"].device)
        unit = F.pad(unit.view(rows, -1), (0, 1), value=-1)
        return unit.flatten(), torch.arange(rows, device=unit.device).repeat_interleave(unit.shape[1])


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """The stock processor without its video half, which cannot even be built where torchvision is missing."""

    # transformers reads the parts to load from this signature: no video_processor here, none is looked for
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token = self.video_token_id = self.video_processor = None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class QwenAdapter(Adapter):
    """Qwen2.5-VL: native resolution; a unit is a block of patches that the merger turns into one token."""

    processor_class = ImageOnlyQwenProcessor
    unmergeable = ("the windows of the vision encoder and its 2x2 merger need every patch; one merge behind them would "
                   "be another method")

    def __init__(self, model):
        super().__init__(model)
        vision = model.config.vision_config
        self.merge = vision.spatial_merge_size
        self.unit_side = vision.patch_size * self.merge
        self.window = dict(spatial_merge_size=self.merge, window_size=vision.window_size,
                           patch_size=vision.patch_size)
        self.whole = sorted(vision.fullatt_block_indexes)

    def encode(self, batch, least=0):
        grid = batch["image_grid_thw"]
        feats = self._raster(self.model.visual(batch["pixel_values"], grid_thw=grid).last_hidden_state, batch)
        return feats, [(h // self.merge, w // self.merge) for _, h, w in grid.tolist()], None

    def _raster(self, x: Tensor, batch) -> Tensor:
        """(n, d) of all patches -> (M, P, d). The encoder leaves its blocks in the order of its attention windows;
        selectors expect raster order."""
        window, _ = get_vision_window_index(batch["image_grid_thw"], **self.window)
        return x.view(-1, self.merge ** 2, x.shape[-1])[window.to(x.device).argsort()]

    def queries_keys(self, attention, x, how):
        q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        if how is None:
            return [(q[None], k[None])]
        q, k = apply_rotary_pos_emb_vision(q, k, *how["position_embeddings"])
        sizes = how["cu_seqlens"].diff().tolist()
        return [(q[None], k[None]) for q, k in zip(q.split(sizes), k.split(sizes))]

    def fold(self, x, batch):
        return self._raster(x[0], batch).mean(1)

    def pixels(self, batch):
        grid, side = batch["image_grid_thw"].tolist(), self.window["patch_size"]
        parts = batch["pixel_values"].split([h * w for _, h, w in grid])
        pictures = []
        for (_, h, w), x in zip(grid, parts):          # a still picture stands in each of its two frames
            x = x.view(h // self.merge, w // self.merge, self.merge, self.merge, 3, -1, side, side)[..., 0, :, :]
            pictures.append(x.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * side, w * side))
        return pictures

    def project(self, feats, unit):
        return self.model.visual.merger(feats.flatten(0, 1))

    def positions(self, batch):
        """(3, B, L), from the FULL prompt: on pruned ids all positions behind the image would be wrong."""
        ids = batch["input_ids"]
        visual = (ids == self.model.config.image_token_id).int()
        return self.model.get_rope_index(ids, visual, image_grid_thw=batch["image_grid_thw"],
                                         attention_mask=batch["attention_mask"])[0]


ADAPTERS = {"llava": LlavaAdapter, "llava_next": LlavaNextAdapter, "qwen2_5_vl": QwenAdapter,
            "internvl": InternVLAdapter, "llava_next_video": LlavaNextVideoAdapter,
            "llava_onevision": LlavaOnevisionAdapter}


@contextmanager
def _reading(name: str):
    """What goes wrong in it while the checkpoint `name` is read -> one sentence with the cause and what to do."""
    try:
        yield
    except OSError as error:
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)

        def found(*kinds) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)
        nowhere = f"no checkpoint at {name!r}: "
        if found(hub.GatedRepoError):
            raise PermissionError(f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, then log in "
                                  "with `hf auth login` or set HF_TOKEN to a token of that account") from error
        if found(hub.RepositoryNotFoundError):
            raise FileNotFoundError(f"{nowhere}neither a folder here nor a model on the Hugging Face hub; check the "
                                    "spelling, or log in with `hf auth login` if it is private") from error
        if found(hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) and not Path(name).is_dir():
            raise ConnectionError(f"{nowhere}neither a folder here nor in the hub's cache, and the hub cannot be "
                                  "reached; connect, unset HF_HUB_OFFLINE, or name a folder") from error
        raise FileNotFoundError(f"{nowhere}expected a folder with a config.json and weights, or a name on the Hugging "
                                f"Face hub; train or download it first ({error})") from error


def blank_model(config: PreTrainedConfig, dtype=torch.bfloat16, device="meta", attn: str = "sdpa") -> nn.Module:
    """The model of a config with random weights, always the same, made on the device and in dtype from the start: no
    other copy is ever made. On "meta" it has shapes alone, in no memory."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn)


def weight_bytes(config: PreTrainedConfig, dtype=torch.bfloat16) -> int:
    """What the weights of a config take in dtype, counted on its modules."""
    return sum(p.numel() * p.element_size() for p in blank_model(config, dtype).parameters())


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left for new tensors; None where nothing tells (other than CUDA and Linux)."""
    if device.type == "cuda":                          # what PyTorch holds without using it is free, too
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device)
    if device.type == "cpu" and (info := Path("/proc/meminfo")).exists():
        return 1024 * int(dict(line.split(":") for line in info.read_text().splitlines())["MemAvailable"].split()[0])
    return None


class FrozenVLM(nn.Module):
    """A VLM that is never trained, and whose visual tokens can be pruned. Build it with from_pretrained()."""

    def __init__(self, model: nn.Module, processor):
        super().__init__()
        self.model, self.lm = model.requires_grad_(False).eval(), model.model.language_model
        self.adapter = ADAPTERS[model.config.model_type](model)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_id = self.adapter.token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.written = self.adapter.written(self.tokenizer, self.image_token)
        start = getattr(model.config, "vision_start_token_id", None)
        self.mark = self.written if start is None else self.tokenizer.convert_ids_to_tokens(start)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        # Qwen's template ends an answer itself, LLaVA's does not, and a model must learn to stop
        ask, answer = self._message("user", "a"), self._message("assistant", "b")
        bare = self._template([ask, answer])[len(self._template([ask], generation=True)):].strip() == "b"
        self.end = self.tokenizer.eos_token if bare else ""

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=torch.bfloat16, device="cpu", attn="sdpa",
                        random_weights: bool = False) -> "FrozenVLM":
        """Load a checkpoint folder or hub name; attn is the attn_implementation of transformers.

        random_weights: read config, tokenizer and processor alone and draw the weights, always the same, on the device:
        memory and speed of a model without its download. Its answers mean nothing, and it says so.
        Raises before a weight is read: FileNotFoundError if there is no such checkpoint, PermissionError if it is
        gated, ConnectionError if the hub cannot be asked, ValueError if its family is not supported, MemoryError if the
        weights do not fit the device.
        """
        name, device = str(name_or_path), torch.device(device)
        with _reading(name):
            folder = Path(name).is_dir() or name.count("/") > 1 or name[:1] in "./~"    # the hub's are owner/model
            if folder and not Path(name, "config.json").exists():
                raise OSError("there is none")
            family = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if family not in ADAPTERS:
            raise ValueError(f"{name!r} has model_type {family!r}: expected one of {', '.join(ADAPTERS)}; "
                             "a further family needs a subclass of Adapter in common.py, which says how, and a line "
                             "in ADAPTERS there")
        with _reading(name):
            config, processor = AutoConfig.from_pretrained(name), ADAPTERS[family].processor_class.from_pretrained(name)
        need, free = weight_bytes(config, dtype), free_bytes(device)
        if free is not None and need > free:
            raise MemoryError(f"the weights of {name!r} need {need / 2**30:.1f} GiB in {dtype}, {device} has "
                              f"{free / 2**30:.1f} GiB free: choose a smaller dtype, such as bfloat16, or another "
                              "device, or end what else runs there")
        if random_weights:
            print(f"RANDOM WEIGHTS: OF {name} ONLY THE SHAPES ARE REAL, ITS ANSWERS ARE MEANINGLESS")
            return cls(blank_model(config, dtype, device, attn), processor)
        with _reading(name):
            # straight to the device: the CPU's memory may be smaller than the GPU's
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, attn_implementation=attn, device_map=None if device.type == "cpu" else {"": device})
        return cls(model, processor)

    def train(self, mode: bool = True) -> "FrozenVLM":
        """Does nothing: a frozen model has no training mode, whatever the selector around it is put into."""
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def family(self) -> str:
        """Its key in ADAPTERS."""
        return self.model.config.model_type

    @property
    def width(self) -> int:
        """C, width of a patch after the vision encoder."""
        return self.adapter.width

    @property
    def unit_side(self) -> int:
        """Pixels that a unit is high and wide."""
        return self.adapter.unit_side

    @property
    def dim(self) -> int:
        """D, width of the language model."""
        return self.model.config.text_config.hidden_size

    def fingerprint(self) -> dict[str, str | int]:
        """What a selector's weights depend on: one that was trained for another backbone must be refused. Those that
        never saw the language model depend on the entries vision_* and feature_layer alone. vision_side: of the square
        grid of a view, before a video's pooling; 0 for native resolution."""
        config, vision = self.model.config, self.model.config.vision_config
        return dict(model_type=config.model_type, vision_width=self.width, vision_patch=self.adapter.patch,
                    vision_side=self.adapter.side,
                    vision_layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
                    feature_layer=getattr(config, "vision_feature_layer", -1), dim=self.dim,
                    layers=config.text_config.num_hidden_layers, vocabulary=config.text_config.vocab_size)

    # --------------------------------------------------------------------------------------------------- text

    def _message(self, role: str, text: str, images: int = 0) -> dict:
        return {"role": role, "content": [{"type": self.adapter.kind}] * images + [{"type": "text", "text": text}]}

    def _template(self, messages, generation: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.processor.chat_template,
                                                  tokenize=False, add_generation_prompt=generation)

    def _dialogue(self, turns, twice: bool = False, images: int = 1) -> tuple[str, list[tuple[int, int]]]:
        """Text of a dialogue, and the [start, end) characters of its answers, end-of-turn marks included."""
        messages, heads, spans, text = [], [], [], ""

        def render(**how) -> str:
            text = self._template(messages, **how).replace(self.image_token, self.written)
            # many templates write the image first, wherever it is put
            return text.replace(self.mark, f"{turns[0][0]} {self.mark}", 1) if twice else text
        for question, answer in turns:
            messages.append(self._message("user", question, 0 if messages else images))
            heads.append(text := render(generation=True))
            if answer is not None:
                messages.append(self._message("assistant", answer.strip() + self.end))
                text = render()
                spans.append((len(heads[-1]), len(text.rstrip())))
        if not all(text.startswith(head) for head in heads):
            raise ValueError("this checkpoint's chat template rewrites earlier turns when one is added: the "
                             "answers cannot be located, pass one turn per row")
        return text, spans

    def unknown_words(self, text: str) -> list[str]:
        """The words, or pieces of words, that the tokenizer cannot spell; none if it falls back to bytes."""
        unknown = self.tokenizer.unk_token_id
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(dict.fromkeys(text[start:end] for i, (start, end) in
                                  zip(tokens["input_ids"], tokens["offset_mapping"]) if i == unknown))

    def _check_turns(self, images, turns) -> None:
        if not len(images) == len(turns) > 0:
            raise ValueError(f"batch() got {len(images)} images and {len(turns)} dialogues: expected one of "
                             "each per row, and at least one row")
        for row, (image, dialogue) in enumerate(zip(images, turns)):
            several = image if isinstance(image, list) else [image]
            if not several or not all(isinstance(x, Image.Image) for x in several) or not dialogue:
                frames = ", its frames" if self.adapter.kind == "video" else ""
                raise ValueError(f"row {row} has a {type(image).__name__} and {len(dialogue)} turns: expected a PIL "
                                 f"image, or a list of them{frames}, see Image.open(), and at least one (question, "
                                 "answer)")
            for k, (question, answer) in enumerate(dialogue):
                where = f"turns[{row}][{k}]"
                if not question.strip():
                    raise ValueError(f"{where} has the empty question {question!r}: expected some text")
                if k < len(dialogue) - 1 if answer is None else not answer.strip():
                    raise ValueError(f"{where} has the answer {answer!r}: expected some text; only the last "
                                     "answer of a row may be None, for the model to give")
                if self.image_token in question + (answer or ""):
                    raise ValueError(f"{where} contains {self.image_token!r}: leave it out, batch() places it")
                if unknown := self.unknown_words(f"{question} {answer or ''}"):
                    vocabulary = self.tokenizer.get_vocab()
                    words = [word for word in sorted(vocabulary, key=vocabulary.get) if word.isalpha()][:80]
                    raise ValueError(f"{where}: this checkpoint cannot read {', '.join(map(repr, unknown))}; "
                                     f"among the words it knows are: {' '.join(words)}")

    def _inputs(self, images: list, *text, **how) -> BatchFeature:
        """Adapter.inputs() of the rows; with image_counts (B,), the pictures of each row, if there are several."""
        rows = [[x.convert("RGB") for x in (row if isinstance(row, list) else [row])] for row in images]
        video = self.adapter.kind == "video"
        counts = [1 if video else len(row) for row in rows]
        batch = self.adapter.inputs(self.processor, rows if video else sum(rows, []), *text, **how)
        if max(counts) > 1:
            batch["image_counts"] = torch.tensor(counts)
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        return batch

    def pictures(self, images: list[Image.Image | list[Image.Image]], device=None):
        """The pixels of batch() alone: all that encode() and pixels() need."""
        return self._inputs(images).to(self.device if device is None else device)

    def batch(self, images: list[Image.Image | list[Image.Image]], turns: list[list[tuple[str, str | None]]],
              device=None, twice: bool = False):
        """The tensors that the other methods take as `batch`: one image, or a list of images or of frames, and one
        dialogue per row. The prompt has all images of a row in front of its first question, in order.

        device: the model's if None; a loader's worker process passes "cpu", for it must not touch the GPU.
        twice: the first question stands in front of the image too, so that visual tokens can attend to it.

        turns[b] is [(question, answer), ...]; a last answer of None ends the prompt where the model is to
        speak. Returns a dict with input_ids, attention_mask and labels (B, L), left padded, and the processor's
        pixels. labels is -100 but for the tokens of the answers and of the end-of-turn mark after each.
        Raises ValueError on rows that do not fit, empty texts, words that the tokenizer does not know, and rows longer
        than the language model has positions.
        """
        self._check_turns(images, turns)
        counts = [len(x) if isinstance(x, list) and self.adapter.kind == "image" else 1 for x in images]
        texts, spans = zip(*(self._dialogue(dialogue, twice, n) for dialogue, n in zip(turns, counts)))
        # a template may bring the BOS token along; a second one would shift every position
        special = not (self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token))
        batch = self._inputs(images, list(texts), padding=True, add_special_tokens=special, return_tensors="pt")
        batch["labels"] = self._labels(batch, texts, spans, special)
        asked = self.tokenizer([" ".join(question for question, _ in dialogue) for dialogue in turns],
                               add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        self._check_lengths(batch["attention_mask"])
        batch["question_ids"], batch["question_mask"] = asked["input_ids"], asked["attention_mask"]
        return batch.to(self.device if device is None else device)

    def _check_lengths(self, mask: Tensor) -> None:
        limit, lengths = self.model.config.text_config.max_position_embeddings, mask.sum(1).tolist()
        if long := [row for row, n in enumerate(lengths) if n > limit]:
            raise ValueError(f"row {long[0]} has {lengths[long[0]]} tokens, those of its image included: expected at "
                             f"most {limit}, the language model's max_position_embeddings; shorten its turns, or take "
                             "a smaller picture or fewer frames")

    def _labels(self, batch, texts, spans, special: bool) -> Tensor:
        """(B, L): token ids inside the answers' spans, else -100.

        The text is tokenised once more, for the character offsets. There an image mark is one token, in
        input_ids it is one per unit: but for these the two agree, and that is checked.
        """
        ids = batch["input_ids"]
        written, labels = batch["attention_mask"].bool() & (ids != self.image_id), torch.full_like(ids, IGNORE)
        tokens = self.tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True)
        for row, pairs in enumerate(map(zip, tokens["input_ids"], tokens["offset_mapping"])):
            column, text = written[row].nonzero().flatten(), [(i, at) for i, at in pairs if i != self.image_id]
            if ids[row, column].tolist() != [i for i, _ in text]:
                raise RuntimeError(f"row {row}: but for the image, the processor's tokens are not the "
                                   "tokenizer's: expected a stock processor, the answers cannot be located")
            inside = torch.tensor([any(y > a and x < b for a, b in spans[row]) for _, (x, y) in text])
            labels[row, column[inside]] = ids[row, column[inside]]
        return labels

    def question(self, batch) -> tuple[Tensor, Tensor]:
        """What a selector may read of the text: word embeddings (B, L, D) of each row's questions, right padded, and
        valid (B, L) bool. No template, no answers."""
        return self.lm.get_input_embeddings()(batch["question_ids"]).detach(), batch["question_mask"].bool()

    # ------------------------------------------------------------------------------------------------- vision

    def num_units(self, batch) -> list[int]:
        """Units that each row shows, read off the prompt: no encoder runs."""
        sizes = (batch["input_ids"] == self.image_id).sum(1).tolist()
        return [int((unit >= 0).sum()) for unit in self._slots(batch)[0].split(sizes)]

    def _slots(self, batch) -> tuple[Tensor, Tensor]:
        """Adapter.slots(), written out where unit i stands at the i-th image token."""
        n = int((batch["input_ids"] == self.image_id).sum())
        given = self.adapter.slots(batch) or (torch.arange(n), torch.full((n,), -1))
        return given[0].to(batch["input_ids"].device), given[1].to(batch["input_ids"].device)

    @torch.no_grad()
    def encode(self, batch, look: dict[str, tuple[str, int]] | None = None) -> Units:
        """Run the vision encoder once; the projector does not run unless it is looked at.

        look: name -> (what, layer), what Units.seen[name] is to hold of this very run, with any attention kernel.
        layer: a block of the encoder, from 0, one of adapter.whole. Of a unit's patches it is the mean. what, float32
        but for the last three:
          cls, received            (M,) attention that the unit gets of [CLS], or of all tokens of its view: mean over
                                   heads (and tokens), softmax over all tokens of the view
          keys                     (M, d) mean over heads, before any rotation
          cls wide, received wide, keys wide          the same where all heads are one of full width
          projected, cls state     (M, D) from the projector, (M, C) what [CLS] of the unit's view is beside feats
          crop                     (M,) int64, LLaVA-NeXT's crop_of(); for these three the layer is of no meaning
        Raises ValueError on one that this encoder does not have.
        """
        look, other = look or {}, ("projected", "cls state", "crop")
        layers = {layer for what, layer in look.values() if what not in other}
        self._check_look(look, layers)
        with self.adapter.watch(layers) as inputs:
            feats, grid, cls = self.adapter.encode(batch, max(layers, default=-1) + 1)
        units = self._units(batch, feats, grid)
        for name, (what, layer) in look.items():
            if what == "projected":
                units.seen[name] = self.project(feats)
            elif what == "cls state":
                units.seen[name] = cls[units.apart().image_of]
            elif what == "crop":
                units.seen[name] = self.adapter.crop_of(batch)
            else:
                units.seen[name] = self.adapter.read(what, layer, *inputs[layer], batch)
        return units

    def _check_look(self, look, layers: set[int]) -> None:
        known = [f"{what}{wide}" for what in ("cls", "received", "keys") for wide in ("", " wide")]
        known += ["projected", "cls state", "crop"]
        for name, (what, _) in look.items():
            if what not in known:
                raise ValueError(f"look[{name!r}] asks for {what!r}: expected one of {', '.join(known)}")
            if what.startswith("cls") and not self.adapter.has_cls or what == "crop" and not self.adapter.crops:
                raise ValueError(f"look[{name!r}]: the vision encoder of {self.family} has no {what!r}")
        if wrong := layers - set(self.adapter.whole):
            raise ValueError(f"block {min(wrong)} of the vision encoder cannot be looked at: expected one of "
                             f"{self.adapter.whole}, whose attention spans a whole view")

    @torch.no_grad()
    def merged(self, batch, rule: Merge) -> tuple[Tensor, Tensor]:
        """feats (B, K, C), anchor (B, K): the vision encoder run with tokens merged by the rule in every block; anchor
        is the unit where a merged token stands. Raises ValueError, with the reason, where that cannot be done."""
        if self.adapter.unmergeable:
            raise ValueError(f"{self.family} cannot merge inside its vision encoder: {self.adapter.unmergeable}")
        return self.adapter.merged(batch, rule)

    def _units(self, batch, feats: Tensor, grid) -> Units:
        """Units of what the adapter encoded."""
        views, slots, shown, shapes = self.adapter.views(batch), self.adapter.slots(batch), None, None
        if "image_counts" in batch:
            counts = batch["image_counts"].tolist()
            views = [sum(part) for part in _split(views or [1] * sum(counts), counts)]
        if views is not None:
            parts = _split(grid, views)
            shapes = None if all(len(set(part)) == 1 for part in parts) else grid
            grid = [(sum(r for r, _ in part), part[0][1]) if len({c for _, c in part}) == 1 else
                    (sum(r * c for r, c in part), 1) for part in parts]
        image_of = torch.arange(len(grid)).repeat_interleave(torch.tensor([r * c for r, c in grid]))
        if slots is not None:
            shown = torch.isin(torch.arange(len(feats), device=feats.device), slots[0].to(feats.device))
        return Units(feats, image_of.to(feats.device), grid, views, shown, shapes)

    def pixels(self, batch) -> list[Tensor]:
        """The pictures as the encoder sees them, (3, H, W) each: normalised, at the size that the units cover. Several
        views of an image stand one below another, as Units.grid has them; several images of a row come one by one."""
        pixels, views = self.adapter.pixels(batch), self.adapter.views(batch)
        return pixels if views is None else [torch.cat(part, 1) for part in _split(pixels, views)]

    def project(self, feats: Tensor, unit: Tensor | None = None) -> Tensor:
        """(K, C) or (K, P, C) of the units (K,) int64, by default all M -> (K, D), the VLM's own projector.
        Differentiable."""
        unit = torch.arange(len(feats), device=feats.device) if unit is None else unit
        return self.adapter.project(feats.to(self.dtype), unit)

    # ------------------------------------------------------------------------------------------------- prompt

    def embed(self, batch, units: Units, feats: Tensor | None = None) -> Prompt:
        """The full prompt; feats, of the same shape, replace units.feats. Differentiable in feats."""
        feats = units.feats if feats is None else feats
        if feats.shape != units.feats.shape:
            raise ValueError(f"feats has shape {tuple(feats.shape)}: expected that of units.feats, "
                             f"{tuple(units.feats.shape)}; Units.flat() undoes Units.pad()")
        kept = torch.ones(len(feats), dtype=torch.bool, device=feats.device)
        return self._prompt(batch, units, feats, kept)

    def prune(self, batch, units: Units, keep: Tensor | list[Tensor], feats: Tensor | None = None,
              positions: str = "original") -> Prompt:
        """The prompt with the kept units only. What stays keeps its original position; positions="reindex" numbers it
        anew from 0, with M-RoPE on every axis alike, as the released code of most methods does.
        feats (sum of K_b, C) or (sum of K_b, P, C), row after row, stand in place of the kept units' own.

        keep[b] holds ascending int64 indices into the units of image b: a (B, K) tensor, or a list of (K_b,)
        tensors; K = 0 leaves no visual token. A newline stays if and only if a unit of its line does. Raises
        ValueError when keep does not fit the units, or names one that is not shown.
        """
        kept = self._kept(units, keep)
        own = units.feats[kept]
        if feats is not None and feats.shape != own.shape:
            raise ValueError(f"feats has shape {tuple(feats.shape)}: expected that of the kept units' own, "
                             f"{tuple(own.shape)}")
        if positions not in ("original", "reindex"):
            raise ValueError(f"positions={positions!r}: expected 'original' or 'reindex'")
        prompt = self._prompt(batch, units, own if feats is None else feats, kept)
        anew = (prompt.mask.cumsum(-1) - 1).clamp(min=0).expand_as(prompt.pos)
        return replace(prompt, pos=anew) if positions == "reindex" else prompt

    @staticmethod
    def _kept(units: Units, keep, name: str = "keep") -> Tensor:
        """keep -> (M,) bool, after checking it; name is what errors call it."""
        if len(keep) != len(units.grid):
            raise ValueError(f"{name} has {len(keep)} rows: expected one per image, that is {len(units.grid)}")
        kept = []
        for row, (index, n) in enumerate(zip(keep, units.counts)):
            index = index.cpu()
            if index.dtype != torch.int64 or index.ndim != 1:
                raise ValueError(f"{name}[{row}] is {index.dtype} {tuple(index.shape)}: expected int64 (K,)")
            if len(index) and not 0 <= index.min() <= index.max() < n:
                raise ValueError(f"{name}[{row}] spans {index.min()} to {index.max()}: expected 0 to {n - 1}, the "
                                 f"units that row {row} has; indices start anew with every row")
            if not (index[1:] > index[:-1]).all():
                raise ValueError(f"{name}[{row}] = {index.tolist()}: expected strictly ascending indices; sort "
                                 "them and name each unit once")
            kept.append(torch.zeros(n, dtype=torch.bool).index_fill(0, index, True))
        kept = torch.cat(kept).to(units.feats.device)
        if units.shown is not None and (lost := (kept & ~units.shown).nonzero().flatten().tolist()):
            row = int(units.image_of[lost[0]])
            raise ValueError(f"{name}[{row}] names {lost[0] - sum(units.counts[:row])}, a unit without a token: "
                             "expected units that pad() calls valid")
        return kept

    def _prompt(self, batch, units: Units, feats: Tensor, kept: Tensor) -> Prompt:
        """The prompt without the units that kept (M,) bool drops; feats has one row per kept unit."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        visual, (unit, line) = ids == self.image_id, self._slots(batch)
        there = torch.ones_like(kept) if units.shown is None else units.shown
        if not torch.equal(unit[unit >= 0].sort().values, there.nonzero().flatten()):
            raise ValueError(f"{int(there.sum())} units for a batch with {int((unit >= 0).sum())}: expected those that "
                             "encode() gave for this very batch")
        shows = (unit >= 0) & kept[unit]
        stays = shows | (unit < 0) & torch.isin(line, line[shows])
        tokens = self.project(feats, kept.nonzero().flatten())[(kept.cumsum(0) - 1)[unit[shows]]]
        # detach: with activation checkpointing the embedding layer marks its output as wanting gradients
        embeds = self.lm.get_input_embeddings()(ids).detach()
        if (unit < 0).any():
            embeds = torch.where(visual[..., None], self.model.model.image_newline, embeds)
        embeds = embeds.masked_scatter(visual.masked_scatter(visual, shows)[..., None], tokens)
        left = visual.masked_scatter(visual, stays)
        return Prompt(embeds, mask.long(), self.adapter.positions(batch), batch.get("labels"), left).only(
            mask & (left | ~visual))

    # ----------------------------------------------------------------------------------------- language model

    def _hidden(self, prompt: Prompt) -> Tensor:
        """(B, L, D), after the last layer and its norm."""
        # always with a mask: without one, transformers takes each gap in the positions for the start of
        # another packed text, and silently lets nothing attend across it
        return self.lm(inputs_embeds=prompt.embeds, attention_mask=prompt.mask, position_ids=prompt.pos,
                       use_cache=False).last_hidden_state

    def logits(self, prompt: Prompt) -> Tensor:
        """(B, L, V); logits[:, i] predict token i + 1."""
        return self.model.lm_head(self._hidden(prompt))

    def loss(self, prompt: Prompt, reduction: str = "mean") -> Tensor:
        """Negative log likelihood of the labels, in nats per token and at least float32.

        "mean": over all answer tokens of the batch, a scalar. "row": over those of each row, (B,).
        Raises ValueError when there is nothing to predict, or on another reduction.
        """
        if reduction not in ("mean", "row"):
            raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'row'")
        if prompt.labels is None:
            raise ValueError("this prompt has no labels: build its batch with answers")
        target = prompt.labels[:, 1:]
        count = (target != IGNORE).sum(1)
        if not (count.sum() if reduction == "mean" else count.min()):
            raise ValueError(f"the rows have {count.tolist()} answer tokens: expected some in each")
        # the output layer is run at the answers only: its logits are the largest tensor of a training step
        row, column = (target != IGNORE).nonzero(as_tuple=True)
        logits = self.model.lm_head(self._hidden(prompt)[row, column])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, target[row, column], reduction="none")
        return nll.mean() if reduction == "mean" else nll.new_zeros(len(count)).index_add(0, row, nll) / count

    @torch.no_grad()
    def generate(self, prompt: Prompt, max_new_tokens: int = 32, streamer=None) -> list[str]:
        """Greedy continuation of every row, without special tokens and outer blanks.

        The first new token stands one behind the last ORIGINAL position, whatever has been pruned. Sampling
        and penalties that the checkpoint's generation config may ask for are off. streamer: of transformers, is put
        nothing when the prompt goes in, then the tokens of a single row as they are made.
        """
        with self._decoding():
            tokens = self.model.generate(
                inputs_embeds=prompt.embeds, attention_mask=prompt.mask, position_ids=prompt.pos,
                max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                repetition_penalty=1.0, num_beams=1, use_cache=True, pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer)
        return self._texts(tokens)

    @contextmanager
    def _decoding(self):
        """Evaluation mode: in training mode, checkpointing drops the cache."""
        training = self.lm.training
        self.lm.eval()
        try:
            yield
        finally:
            self.lm.train(training)

    def _ends(self) -> Tensor:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=torch.int64, device=self.device)

    def _texts(self, tokens: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def checkpointing(self, on: bool) -> None:
        """Recompute the language model's activations in the backward pass: less memory, the same gradients.

        Raises ValueError if the language model has dropout, which its training mode would then switch on.
        """
        drops = [name for name, module in self.lm.named_modules()
                 if getattr(module, "attention_dropout", 0) or isinstance(module, nn.Dropout) and module.p]
        if on and drops:
            raise ValueError(f"{drops[0]} has dropout, which checkpointing would switch on: expected none; set "
                             "it to 0 in the config.json of the checkpoint")
        switch = f"checkpointing_{'enable' if on else 'disable'}"          # renamed within transformers 5.x
        new, old = f"activation_{switch}", f"gradient_{switch}"
        getattr(self.lm, new if hasattr(self.lm, new) else old)()
        self.lm.train(on)                             # it acts in training mode only

    # ----------------------------------------------------------------------- pruning inside the language model

    @torch.no_grad()
    def visual_states(self, prompt: Prompt, layer: int) -> Tensor:
        """(M, D) hidden states of all visual tokens after `layer` layers, 0 for none; the layers above do not run.

        Row after row in the order of the prompt, with newlines: what a rule in front of that layer gets, unpadded.
        Raises ValueError unless 0 <= layer < layers.
        """
        self._check_layers([layer], 0)
        return self._layers(prompt, self._no_past(prompt, {}), {}, depth=layer).embeds[prompt.is_visual]

    def logits_within(self, prompt: Prompt, stages: dict[int, Rule], positions: str = "original"
                      ) -> tuple[Tensor, Prompt]:
        """Logits (B, L, V) of the tokens that are left at the end, and these: their embeds are the last hidden states.

        Before layer i, counted from 0, the rule stages[i] chooses among the visual tokens that are still there. What
        stays keeps its original position; positions="reindex" numbers what a stage leaves anew from 0, with M-RoPE on
        all three axes. Raises ValueError on a stage that is none of 1 .. layers - 1 (in front of them all there is
        prune()), on a keep that does not fit or takes the last visual token from a row, on NaN among the states.
        """
        self._check_layers(stages, 1)
        left = self._layers(prompt, self._no_past(prompt, stages), stages, positions=positions)
        left = replace(left, embeds=self.lm.norm(left.embeds))
        return self.model.lm_head(left.embeds), left

    @torch.no_grad()
    def generate_within(self, prompt: Prompt, stages: dict[int, Rule], max_new_tokens: int = 32,
                        streamer=None, positions: str = "original") -> list[str]:
        """generate() with the stages of logits_within(), which run once, before the first new token. What is decoded
        goes on in every layer from the last position there: with "reindex" a smaller one from stage to stage."""
        self._check_layers(stages, 1)
        past, cache = self._no_past(prompt, stages), DynamicCache()
        ends = self._ends()
        tokens, running = prompt.mask[:, :0], torch.ones_like(prompt.mask[:, -1:]).bool()
        with self._decoding(), _streaming(streamer, tokens) as put:
            state = self._layers(prompt, past, stages, cache, positions=positions)
            for step in range(1, max_new_tokens + 1):
                token = self.model.lm_head(self.lm.norm(state.embeds[:, -1:])).argmax(-1)
                token = token.masked_fill(~running, self.tokenizer.pad_token_id)
                put(token)
                tokens, running = torch.cat([tokens, token], 1), running & ~torch.isin(token, ends)
                if step == max_new_tokens or not running.any():
                    break
                state = Prompt(self.lm.get_input_embeddings()(token), torch.ones_like(token),
                               prompt.pos[..., -1:] + step, None, torch.zeros_like(running))
                state = self._layers(state, past, {}, cache)
        return self._texts(tokens)

    @staticmethod
    def _no_past(prompt: Prompt, stages) -> dict[int, _Past]:
        """For _layers(): layer 0 and every stage, nothing has gone through yet."""
        return {i: _Past(prompt.mask[:, :0]) for i in (0, *stages)}

    def _layers(self, prompt: Prompt, past: dict[int, _Past], stages: dict[int, Rule], cache=None,
                depth: int | None = None, positions: str = "original") -> Prompt:
        """What comes out of the first `depth` layers, all if None, without the last norm; embeds are the states.

        past, for layer 0 and every stage, grows by this prompt. stages is empty while decoding.
        """
        if positions not in ("original", "reindex"):
            raise ValueError(f"positions={positions!r}: expected 'original' or 'reindex'")
        prompt = replace(prompt, origin=(prompt.is_visual.cumsum(1) - 1).masked_fill(~prompt.is_visual, -1))
        start, before, rotary = prompt, prompt, None
        for i, layer in enumerate(self.lm.layers[:depth]):
            if i in stages:
                full = Look(prompt, before, start, (self.lm.layers[i - 1], layer), self._rotary(rotary), self.lm.norm)
                prompt = self._narrow(full, i, stages[i])
                if positions == "reindex":
                    prompt = replace(prompt, pos=(prompt.mask.cumsum(1) - 1).clamp(min=0).expand_as(prompt.pos))
                past[i].shift = full.prompt.pos[..., -1:] - prompt.pos[..., -1:]
            elif i in past:
                prompt = replace(prompt, pos=prompt.pos - past[i].shift)
            if i in past:
                mask = self._mask(prompt, past[i], cache, i)
                rotary = self.lm.rotary_emb(prompt.embeds, position_ids=prompt.pos)
            before = prompt
            states = layer(prompt.embeds, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
            prompt = replace(prompt, embeds=states)
        return prompt

    def _mask(self, prompt: Prompt, past: _Past, cache, i: int) -> Tensor | None:
        """What the attention of layer i takes as its mask; past grows by the prompt's keys."""
        past.mask = torch.cat([past.mask, prompt.mask], 1)
        if past.log_size is not None:                  # decoding: what is new has size one
            past.log_size = F.pad(past.log_size, (0, prompt.mask.shape[1]))
        elif prompt.log_size is not None:
            past.log_size = prompt.log_size
        if past.log_size is None:
            # layer_idx: the cache is shorter from stage to stage, and by default layer 0 sizes the mask
            return create_causal_mask(config=self.lm.config, inputs_embeds=prompt.embeds, attention_mask=past.mask,
                                      past_key_values=cache, layer_idx=i)
        kernel, dtype = self.lm.config._attn_implementation, prompt.embeds.dtype
        if kernel not in ("sdpa", "eager"):
            raise ValueError(f"attention {kernel!r} takes no sizes of merged tokens: expected the model loaded with "
                             "attn='sdpa' or 'eager'")
        # all in one additive mask, causality too: a kernel that is given one must not be told is_causal as well
        (new, total), low = (prompt.mask.shape[1], past.mask.shape[1]), torch.finfo(torch.float32).min
        sees = torch.ones(new, total, dtype=torch.bool, device=past.mask.device).tril(total - new)
        sees = sees & past.mask.bool()[:, None]
        return torch.where(sees, past.log_size[:, None].to(dtype), max(low, torch.finfo(dtype).min))[:, None]

    def _rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, L, d) cos and sin of the model's rotary embedding; older transformers leave the axes of M-RoPE apart."""
        if rotary[0].ndim == 3:
            return rotary
        sections = 2 * list(self.lm.config.rope_parameters["mrope_section"])
        cos, sin = (torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, -1))], -1) for x in rotary)
        return cos, sin

    def _narrow(self, look: Look, i: int, rule: Rule) -> Prompt:
        """The prompt without the visual tokens that the rule in front of layer i drops."""
        prompt, name = look.prompt, f"stages[{i}](...)"
        visual = prompt.is_visual
        row, counts = visual.nonzero()[:, 0], visual.sum(1).tolist()
        if prompt.embeds[visual].isnan().any():
            raise ValueError(f"NaN among the visual tokens in front of layer {i}: expected numbers; a model that "
                             "overflows in float16 runs in bfloat16 or float32")
        found = rule(look)
        keep, changes = found if isinstance(found, tuple) else (found, {})
        kept = self._kept(Units(prompt.embeds[visual], row, [(1, n) for n in counts]), keep, name)
        if empty := [b for b, n in enumerate(counts) if n and not len(keep[b])]:
            raise ValueError(f"{name}[{empty[0]}] is empty: expected at least one of {counts[empty[0]]} visual tokens")
        left = prompt.only(prompt.mask.bool().masked_scatter(visual, kept))
        for column, values in changes.items():
            if [len(x) for x in values] != [len(x) for x in keep]:
                raise ValueError(f"{name} has {column} for {[len(x) for x in values]} tokens: expected one for each "
                                 f"that it keeps, {[len(x) for x in keep]}")
            old, values = getattr(left, column), torch.cat(list(values))
            old = values.new_zeros(left.mask.shape) if old is None else old
            where = left.is_visual[..., None] if values.ndim > 1 else left.is_visual
            left = replace(left, **{column: old.masked_scatter(where, values.to(old))})
        return left

    def _check_layers(self, wanted, first: int) -> None:
        """Raises ValueError if a wanted layer is none of first .. layers - 1, or _layers() cannot run this model."""
        config, layers = self.lm.config, len(self.lm.layers)
        kinds = set(getattr(config, "layer_types", None) or
                    ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"])
        if config.model_type not in PLAIN or kinds != {"full_attention"}:
            raise ValueError(f"the language model is {config.model_type!r} with {', '.join(sorted(kinds))}: expected "
                             f"one of {', '.join(PLAIN)} with full_attention in every layer to prune inside")
        if wrong := [i for i in wanted if i not in range(first, layers)]:
            raise ValueError(f"layer {wrong[0]}: expected one of {first} to {layers - 1}")


@contextmanager
def _streaming(streamer, nothing: Tensor):
    """put(token) for a streamer of transformers, or none; as generate() does, it is put `nothing` (1, 0) first."""
    def put(token):
        if streamer is not None:
            streamer.put(token.cpu())
    put(nothing)
    try:
        yield put
    finally:
        if streamer is not None:
            streamer.end()


class Chat:
    """Turns about one row of images whose visual tokens were chosen once: a turn is read behind those before it, which
    the cache holds, at the positions that it has in the one full prompt of the whole dialogue.

    images: one row of batch() | units: of this row, as encode() gives them | keep: as for prune(), None for all
    turns: [(question, answer), ...] so far; what was said before may be handed in, and is read with the next question
    """

    def __init__(self, vlm: FrozenVLM, images, units: Units, keep=None, turns=()):
        self.vlm, self.images, self.units, self.keep, self.turns = vlm, images, units, keep, list(turns)
        self.cache, self.read = DynamicCache(), None   # read: embeds, positions and is_visual of what the cache holds

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 32, streamer=None) -> str:
        """The answer of generate() to the whole dialogue; streamer as there. A turn whose answer no prompt can spell,
        such as none, is forgotten. Raises ValueError as batch() does, also if the template rewrites earlier turns."""
        vlm, (embeds, pos, visual) = self.vlm, self._unread([*self.turns, (question, None)])
        ends, tokens, last = vlm._ends(), vlm._ends().new_zeros(1, 0), pos[..., -1:]
        with vlm._decoding(), _streaming(streamer, tokens) as put:
            for step in range(1, max_new_tokens + 1):
                token = vlm.model.lm_head(self._read(embeds, pos, visual)).argmax(-1)
                put(token)
                tokens = torch.cat([tokens, token], 1)
                if torch.isin(token, ends).item():
                    break
                embeds, pos = vlm.lm.get_input_embeddings()(token), last + step
                visual = torch.zeros_like(token).bool()
        answer = vlm._texts(tokens)[0]
        if answer and vlm.image_token not in answer and not vlm.unknown_words(answer):
            self.turns.append((question, answer))
        return answer

    def _read(self, *new: Tensor) -> Tensor:
        """embeds, positions and is_visual of tokens behind the cache -> (1, 1, D), the last one's final state."""
        held = zip(self.read, new) if self.read else zip(new)
        self.read = tuple(torch.cat(pair, dim) for pair, dim in zip(held, (1, -1, 1)))
        # always with a mask, see _hidden()
        return self.vlm.lm(inputs_embeds=new[0], attention_mask=torch.ones_like(self.read[2]).long(),
                           position_ids=new[1], past_key_values=self.cache, use_cache=True).last_hidden_state[:, -1:]

    def _unread(self, turns) -> tuple[Tensor, Tensor, Tensor]:
        """The end of the dialogue's prompt that the cache lacks, at least its last token.

        An answer may be spelled by other tokens than those that were generated, or none at all: what the cache holds is
        compared with the prompt, and dropped from the first difference on.
        """
        batch = self.vlm.batch([self.images], [turns])
        prompt = (self.vlm.embed(batch, self.units) if self.keep is None else
                  self.vlm.prune(batch, self.units, self.keep))
        parts, known = (prompt.embeds, prompt.pos, prompt.is_visual), 0
        if self.read:
            n = min(self.read[2].shape[1], prompt.mask.shape[1] - 1)
            (old, at, seen), (new, pos, visual) = self._cut(self.read, 0, n), self._cut(parts, 0, n)
            same = (old == new).all(-1)[0] | (seen & visual)[0]        # visual tokens are always the same
            known = int((same & (at == pos).reshape(-1, n).all(0)).long().cumprod(0).sum())
            if extra := self.read[2].shape[1] - known:
                self.cache.crop(-extra)
                self.read = self._cut(self.read, 0, known)
        return self._cut(parts, known, None)

    @staticmethod
    def _cut(parts, start: int, stop: int | None) -> tuple[Tensor, Tensor, Tensor]:
        embeds, pos, visual = parts
        return embeds[:, start:stop], pos[..., start:stop], visual[:, start:stop]


def random_language_model(layers: int, width: int = 4096, dtype=torch.bfloat16) -> nn.Module:
    """A decoder of LLaVA-1.5-7B's shape but `layers` deep, with random weights: for timing, it answers nothing."""
    config = LlamaConfig(hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
                         num_attention_heads=width // 128, vocab_size=32064)
    return LlamaModel._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
