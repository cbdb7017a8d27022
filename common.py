"""A frozen vision-language model (VLM) whose visual tokens are pruned behind its vision encoder.

    vlm    = FrozenVLM.from_pretrained(path)
    batch  = vlm.batch(images, turns)            one image and one dialogue per row, left padded
    units  = vlm.encode(batch)                   frozen vision encoder, before the projector
    prompt = vlm.embed(batch, units, feats)      training: every unit, gated, differentiable
    prompt = vlm.prune(batch, units, keep)       inference: the kept units alone
    vlm.loss(prompt), vlm.logits(prompt), vlm.generate(prompt)

A unit is what the language model reads as one visual token: a CLIP patch in LLaVA, a 2x2 block of
patches in Qwen2.5-VL. Pruning is exact: the logits are those of the full sequence in which the
attention mask hides the dropped tokens, because what stays keeps the position it had there.

An image may reach the encoder as several views: crops, tiles, frames, or several images of a row.
To a selector these are one image; one that selects in each by itself uses apart() and together().

Shapes  B rows, M units of all images together, N most units of one image, C vision width,
        P patches per unit, L tokens of the prompt, D width of the language model, V vocabulary,
        T views of all images together, S image tokens of the batch
Here    LLaVA-1.5 and Qwen2.5-VL. More families, one file each: backbones/. Pruning inside the
        language model, and attention maps for rivals: baselines/.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from os.path import commonprefix

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, BatchFeature
from transformers.vision_utils import get_vision_window_index

from backbones.checkpoints import (
    BY_LENGTH,
    ImageOnlyQwenProcessor,
    blank_model,
    check_device,
    check_room,
    each_once,
    most_positions,
    read_config,
    read_processor,
    read_weights,
)

IGNORE = -100                         # label of a token that is not part of an answer
PROTOCOLS = ("papers", "stock")       # what the papers do to pictures and prompts; the hub's own
# LLaVA's own frame; the chat template that comes with it on the hub lacks the first sentence
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in m['content'] %}{{ c['text'] + ' ' if c['type'] == 'text' else 'IMAGE\n' }}"
    "{% endfor %}{% else %}{{ 'ASSISTANT: ' + m['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


# ---------------------------------------------------------------------------- what a selector sees


@dataclass
class Units:
    """The visual units of a batch: everything that a selector sees. No gradient.

    feats      (M, C), or (M, P, C) where a unit has P patches; raster order, image after image
    image_of   (M,) int64, the row of the batch that the unit belongs to, ascending
    grid       (rows, columns) of units of every image; several views stand one below another,
               or, where they differ in width, as one column
    views      how many views every image has; None if each has one
    has_token  (M,) bool, False for padding that LLaVA-NeXT cuts off; None if all have one
    shapes     (rows, columns) of all views; None if those of one image are alike
    readings   name -> (M, ...), further values per unit, such as those of baselines/encoder.py
    """
    feats: Tensor
    image_of: Tensor
    grid: list[tuple[int, int]]
    views: list[int] | None = None
    has_token: Tensor | None = None
    shapes: list[tuple[int, int]] | None = None
    readings: dict[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Units of each image."""
        return [rows * columns for rows, columns in self.grid]

    def _column(self) -> Tensor:
        """(M,) index of every unit inside its own image."""
        return torch.cat([torch.arange(n, device=self.image_of.device) for n in self.counts])

    def pad(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(M, ...), by default feats -> (B, N, ...) with zeros behind shorter images, and valid.

        valid (B, N) bool: the units that may be kept. False behind a shorter image and where a
        unit has no token.
        """
        x = self.feats if x is None else x
        if len(x) != len(self.image_of):
            raise ValueError(f"pad() got {len(x)} rows: expected one per unit, that is "
                             f"{len(self.image_of)}")
        column = self._column()
        padded = x.new_zeros(len(self.grid), max(self.counts), *x.shape[1:])
        valid = torch.zeros(padded.shape[:2], dtype=torch.bool, device=x.device)
        padded[self.image_of, column] = x
        valid[self.image_of, column] = True if self.has_token is None else self.has_token
        return padded, valid

    def flat(self, padded: Tensor) -> Tensor:
        """(B, N, ...) -> (M, ...), the inverse of pad()."""
        if padded.shape[:2] != (len(self.grid), max(self.counts)):
            raise ValueError(f"flat() got shape {tuple(padded.shape)}: expected ({len(self.grid)}, "
                             f"{max(self.counts)}, ...), as pad() gives it")
        return padded[self.image_of, self._column()]

    def rows(self, owner: list[int]) -> "Units":
        """Units of a batch whose row b shows image owner[b]: several questions about one image."""
        parts = [(self.image_of == b).nonzero().flatten() for b in owner]
        index = torch.cat(parts)
        image_of = torch.cat([torch.full_like(part, b) for b, part in enumerate(parts)])
        views = self.views and [self.views[b] for b in owner]
        by_image = self.shapes and split_by(self.shapes, self.views)
        shapes = by_image and [shape for b in owner for shape in by_image[b]]
        has_token = None if self.has_token is None else self.has_token[index]
        readings = {name: x[index] for name, x in self.readings.items()}
        return Units(self.feats[index], image_of, [self.grid[b] for b in owner], views, has_token,
                     shapes, readings)

    def apart(self) -> "Units":
        """The same units with every view an image of its own."""
        if self.views is None:
            return self
        grid = self.shapes or [(rows // n, columns) for (rows, columns), n in
                               zip(self.grid, self.views) for _ in range(n)]
        sizes = torch.tensor([rows * columns for rows, columns in grid])
        image_of = torch.arange(len(grid)).repeat_interleave(sizes).to(self.image_of.device)
        return replace(self, image_of=image_of, grid=grid, views=None, shapes=None)

    def together(self, keep) -> list[Tensor]:
        """What was kept of each view of apart(), (K_t,) indices -> the same of these units."""
        views, keep = self.views or [1] * len(self.grid), list(keep)
        if len(keep) != sum(views):
            raise ValueError(f"keep has {len(keep)} rows: expected one per view, that is "
                             f"{sum(views)}")
        first = [sum(sizes[:i]) for sizes in split_by(self.apart().counts, views)
                 for i in range(len(sizes))]
        moved = [index + offset for index, offset in zip(keep, first)]
        return [torch.cat(part) for part in split_by(moved, views)]


def split_by(items: list, sizes: list[int]) -> list[list]:
    """The first sizes[0] items, the next sizes[1], and so on."""
    rest = iter(items)
    return [[next(rest) for _ in range(n)] for n in sizes]


def check_finite(x: Tensor, what: str, row_of: Tensor | None = None) -> None:
    """Raises ValueError naming the first row of x (n, ...) that has NaN or inf; row_of (n,): the
    rows' numbers, by default 0 to n - 1. It waits for the device, once."""
    broken = (~x.isfinite()).flatten(1).any(1).nonzero().flatten()
    if len(broken):
        row = int(broken[0] if row_of is None else row_of[broken[0]])
        raise ValueError(f"row {row} has {what} that are no finite numbers: choose a dtype of more "
                         "range, bfloat16 or float32, or leave its picture out")


def kept_mask(units: Units, keep, name: str = "keep") -> Tensor:
    """keep of FrozenVLM.prune() -> (M,) bool. Raises ValueError, which calls it `name`."""
    if len(keep) != len(units.grid):
        raise ValueError(f"{name} has {len(keep)} rows: expected one per image, "
                         f"that is {len(units.grid)}")
    rows = []
    for row, (index, n) in enumerate(zip(keep, units.counts)):
        index = index.cpu()
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"{name}[{row}] is {index.dtype} {tuple(index.shape)}: "
                             "expected int64 (K,)")
        if len(index) and not 0 <= index.min() <= index.max() < n:
            raise ValueError(f"{name}[{row}] spans {index.min()} to {index.max()}: expected 0 to "
                             f"{n - 1}, the units of row {row}; indices start anew in every row")
        if not (index[1:] > index[:-1]).all():
            raise ValueError(f"{name}[{row}] = {index.tolist()}: expected strictly ascending "
                             "indices; sort them and name each unit once")
        rows.append(torch.zeros(n, dtype=torch.bool).index_fill(0, index, True))
    kept = torch.cat(rows).to(units.feats.device)
    if units.has_token is not None:
        if missing := (kept & ~units.has_token).nonzero().flatten().tolist():
            row = int(units.image_of[missing[0]])
            unit = missing[0] - sum(units.counts[:row])
            raise ValueError(f"{name}[{row}] names {unit}, a unit without a token: expected units "
                             "that pad() calls valid")
    return kept


@dataclass
class Prompt:
    """What enters the language model.

    embeds (B, L, D) | mask (B, L) int64, 0 on the left padding | pos (B, L), (3, B, L) with M-RoPE
    labels (B, L) int64, -100 on all but the answers | is_visual (B, L) bool: units and newlines
    Inside the language model also (baselines/inside.py)
    origin (B, L) int64: a visual token's index among those that entered, -1 for text
    log_size (B, L): added to the attention logits of a token as a key; None for nothing
    later n times (B, L, D): what is added to the states behind layers 0 to n - 1
    """
    embeds: Tensor
    mask: Tensor
    pos: Tensor
    labels: Tensor | None
    is_visual: Tensor
    origin: Tensor | None = None
    log_size: Tensor | None = None
    later: tuple[Tensor, ...] = ()

    def only(self, stays: Tensor) -> "Prompt":
        """The tokens in stays (B, L) bool, left padded anew; each keeps its position and label."""
        count = stays.sum(1)
        width = int(count.max())
        # a stable sort by "stays" moves what stays to the right end in its old order: left padding
        index = stays.int().argsort(dim=1, stable=True)[:, -width:]
        mask = torch.arange(width, device=index.device) >= width - count[:, None]
        at = torch.arange(len(index), device=index.device)[:, None], index

        def gather(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[at]
        labels = gather(self.labels)
        return Prompt(self.embeds[at], mask.long(), self.pos[..., *at].masked_fill(~mask, 0),
                      None if labels is None else labels.masked_fill(~mask, IGNORE),
                      gather(self.is_visual) & mask, gather(self.origin), gather(self.log_size),
                      tuple(x[at] for x in self.later))


# ---------------------------------------------------------------------------- families of VLMs


class Adapter(ABC):
    """What is special to one family. A further family is one file in backbones/ with a subclass.

    model_type       of the checkpoint's config.json; matches() may look closer
    processor_class  its from_pretrained() gives tokenizer, image processor and chat template
    kind             what the chat template calls a picture: "image", or "video" of frames
    side, unit_side  units along a side of a view, 0 at native resolution; pixels of a unit's side
    square           whether the papers pad pictures to a square: the processor would cut them off
    unlike_patches   P where a unit's patches come of several blocks, each of its own scale; else 0
    For rivals that read the encoder's attention (baselines/encoder.py)
    has_cls, depth   whether the encoder has a [CLS] token; blocks that feats go through
    whole            numbers, from 0, of its blocks whose attention spans a view
    fold(x, batch)   (T, n, d) of the encoder's tokens -> (M, d), the mean over each unit's
    """
    model_type = ""
    processor_class, kind, side, unlike_patches = AutoProcessor, "image", 0, 0
    square, has_cls = False, False
    known: list[type["Adapter"]] = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Adapter.known.append(cls)

    @classmethod
    def matches(cls, config) -> bool:
        """Does this family serve a checkpoint with this config?"""
        return config.model_type == cls.model_type

    def __init__(self, model: nn.Module):
        self.model, self.config = model.model, model.config
        vision = model.config.vision_config
        patch = vision.patch_size
        self.patch = patch if isinstance(patch, int) else patch[0]
        self.width, self.unit_side = vision.hidden_size, self.patch
        self.token_id = getattr(self.config, f"{self.kind}_token_id")
        tower = getattr(self.model, "visual", None) or self.model.vision_tower
        self.attentions = [part for part in tower.modules()
                           if hasattr(part, "k_proj") or hasattr(part, "qkv")]
        self.depth = len(self.attentions)
        self.whole = list(range(self.depth))

    def inputs(self, processor, images: list, text: list[str] | None = None, **how) -> BatchFeature:
        """The processor's tensors of RGB pictures and, if there is text, of the prompts."""
        if text is None:
            return processor.image_processor(images=images, return_tensors="pt")
        return processor(images=images, text=text, **how)

    def written(self, tokenizer, token: str) -> str:
        """What the prompt has where the chat template writes the image token."""
        return token

    def views(self, batch) -> list[int] | None:
        """How many views every image has; None if each has one."""
        return None

    def tiles(self, batch) -> Tensor:
        """(T, 3, H, W), what the encoder takes: all views, one after another."""
        return batch["pixel_values"]

    @abstractmethod
    def encode(self, batch) -> tuple[Tensor, list[tuple[int, int]]]:
        """feats (M, C) or (M, P, C), and (rows, columns) of units in every VIEW."""

    def project(self, feats: Tensor, unit: Tensor) -> Tensor:
        """feats (K, C) or (K, P, C) of the units (K,) int64 of the batch -> (K, D)."""
        return self.model.multi_modal_projector(feats)

    def later(self, feats: Tensor, unit: Tensor) -> list[Tensor]:
        """n times (K, D), of the same: what enters behind layers 0 to n - 1 of the language model,
        added to the units' tokens there."""
        return []

    def slots(self, batch) -> tuple[Tensor, Tensor] | None:
        """unit (S,), line (S,) int64 of every image token; None if the i-th shows unit i.

        unit: the one that it shows, -1 for a newline. line: the same number for a newline and for
        the units of the line that it ends, -1 for a unit without. A newline stays if and only if a
        unit of its line is kept.
        """
        return None

    def pixels(self, batch) -> list[Tensor]:
        """(3, H, W) of each view, normalised as the encoder sees it."""
        return list(self.tiles(batch))

    def positions(self, batch) -> Tensor:
        """(B, L), or (3, B, L) with M-RoPE, of the full prompt."""
        return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


class LlavaAdapter(Adapter):
    """LLaVA-1.5: CLIP, the layer that `vision_feature_layer` names, without [CLS]."""

    model_type, has_cls, square = "llava", True, True

    @classmethod
    def matches(cls, config):
        """Another tower, such as SigLIP, is another family."""
        return (config.model_type == cls.model_type
                and config.vision_config.model_type == "clip_vision_model")

    def __init__(self, model):
        super().__init__(model)
        config, vision = self.config, self.config.vision_config
        layer, layers = config.vision_feature_layer, vision.num_hidden_layers
        if config.vision_feature_select_strategy != "default":
            raise ValueError(f"select strategy {config.vision_feature_select_strategy!r}: expected "
                             "'default', which drops [CLS]")
        if not isinstance(layer, int) or not 0 < abs(layer) <= layers:
            raise ValueError(f"vision_feature_layer={layer}: expected one of the {layers} layers, "
                             "such as -2")
        # hidden state 0 is the embedding: the last state is the output of layer number `layers`
        self.depth = layer if layer > 0 else layers + 1 + layer
        self.side = vision.image_size // vision.patch_size

    def encode(self, batch):
        """The layers above the feature layer do not run."""
        tower = self.model.vision_tower
        x = tower.pre_layrnorm(tower.embeddings(self.tiles(batch)))
        for block in tower.encoder.layers[:self.depth]:
            x = block(x, attention_mask=None)
        return x[:, 1:].flatten(0, 1), [(self.side, self.side)] * len(x)

    def fold(self, x, batch):
        return x[:, 1:].flatten(0, 1)


class QwenAdapter(Adapter):
    """Qwen2.5-VL: native resolution; the merger turns a block of patches into one token."""

    model_type, processor_class = "qwen2_5_vl", ImageOnlyQwenProcessor

    def __init__(self, model):
        super().__init__(model)
        vision = self.config.vision_config
        self.merge = vision.spatial_merge_size
        self.unit_side = self.patch * self.merge
        self.whole = sorted(getattr(vision, "fullatt_block_indexes", self.whole))
        if (kernels := self.attentions[0].config)._attn_implementation == "sdpa":
            kernels._attn_implementation = BY_LENGTH           # of the encoder alone

    def encode(self, batch):
        grid = batch["image_grid_thw"]
        x = self.model.visual(batch["pixel_values"], grid_thw=grid).last_hidden_state
        return self._raster(x, batch), [(h // self.merge, w // self.merge)
                                        for _, h, w in grid.tolist()]

    def _raster(self, x: Tensor, batch) -> Tensor:
        """(n, d) of all patches -> (M, P, d). The encoder leaves its blocks in the order of its
        attention windows; selectors expect raster order."""
        window, _ = get_vision_window_index(batch["image_grid_thw"], self.merge,
                                            self.config.vision_config.window_size, self.patch)
        return x.view(-1, self.merge ** 2, x.shape[-1])[window.to(x.device).argsort()]

    def pixels(self, batch):
        grid, side = batch["image_grid_thw"].tolist(), self.patch
        parts = batch["pixel_values"].split([h * w for _, h, w in grid])
        pictures = []
        for (_, h, w), x in zip(grid, parts):
            x = x.view(h // self.merge, w // self.merge, self.merge, self.merge, 3, -1, side, side)
            # a still picture stands in both of its two frames
            x = x[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6)
            pictures.append(x.reshape(3, h * side, w * side))
        return pictures

    def project(self, feats, unit):
        return self.model.visual.merger(feats.flatten(0, 1))

    def positions(self, batch):
        """(3, B, L), of the FULL prompt: on pruned ids all positions behind the image are wrong."""
        ids = batch["input_ids"]
        visual = (ids == self.config.image_token_id).int()
        return self.model.get_rope_index(ids, visual, image_grid_thw=batch["image_grid_thw"],
                                         attention_mask=batch["attention_mask"])[0]

    def fold(self, x, batch):
        return self._raster(x[0], batch).mean(1)


def find_adapter(config) -> type[Adapter]:
    """The family that serves a checkpoint: one of the two here, else exactly one of backbones/.
    Raises ValueError if none does, or several."""
    for family in (LlavaAdapter, QwenAdapter):
        if family.matches(config):
            return family
    rooms = importlib.import_module("backbones")
    for room in pkgutil.iter_modules(rooms.__path__):
        importlib.import_module(f"backbones.{room.name}")
    serving = [family for family in Adapter.known if family.matches(config)]
    if len(serving) != 1:
        tower = getattr(getattr(config, "vision_config", None), "model_type", None)
        names = " and ".join(family.__name__ for family in serving) or "none of the families"
        types = ", ".join(dict.fromkeys(x.model_type for x in Adapter.known if x.model_type))
        raise ValueError(f"model_type {config.model_type!r} with the vision tower {tower!r} is "
                         f"served by {names}: expected one of {types}, with their own towers; a "
                         "further family is one file in backbones/, see backbones/README.md")
    return serving[0]


# ---------------------------------------------------------------------------- the frozen model


class FrozenVLM(nn.Module):
    """A VLM that is never trained and whose visual tokens can be pruned: from_pretrained()."""

    def __init__(self, model: nn.Module, processor, protocol: str = "papers"):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.lm = model.model.language_model
        # generate() hands the output layer a slice of the states; on a CPU torch would then copy
        # its whole weight once per row
        self.model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.adapter = find_adapter(model.config)(model)
        self.family = model.config.model_type
        self.width = self.adapter.width                       # C, of a patch after the encoder
        self.dim = model.config.text_config.hidden_size       # D, of the language model
        self.limit = most_positions(model.config.text_config)
        self.unit_side = self.adapter.unit_side               # pixels that a unit is high and wide
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_id = self.adapter.token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.written = self.adapter.written(self.tokenizer, self.image_token)
        start = getattr(model.config, "vision_start_token_id", None)
        self.image_start = (self.written if start is None
                            else self.tokenizer.convert_ids_to_tokens(start))
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self._use(protocol)
        # Qwen's template ends an answer itself, LLaVA's does not, and a model must learn to stop
        ask, answer = self._message("user", "a"), self._message("assistant", "\ue000")
        mark = self._template([ask, answer]).partition("\ue000")[2].strip()
        self.end = "" if mark else self.tokenizer.eos_token
        # without generation settings, or with another model's, an answer would never end
        settings = model.generation_config
        ends = settings.eos_token_id
        ends = {*([ends] if isinstance(ends, int) else ends or []),
                self.tokenizer.convert_tokens_to_ids(mark or self.end)}
        ends -= {None, self.tokenizer.unk_token_id}
        settings.eos_token_id = sorted(ends) or [self.tokenizer.eos_token_id]

    def _use(self, protocol: str) -> None:
        """Square pictures and Vicuna's frame where the VLM is LLaVA's; else the two are one."""
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r}: expected {' or '.join(PROTOCOLS)}")
        turn = self._template([self._message("user", "a", 1)], generation=True)
        is_vicuna = turn.strip() == f"USER: {self.image_token}\na ASSISTANT:"
        of_papers = protocol == "papers" and (self.adapter.square or is_vicuna)
        self.protocol = "papers" if of_papers else "stock"
        self.colour = None                                     # of what pads a picture
        if of_papers and self.adapter.square:
            self.colour = tuple(int(255 * x) for x in self.processor.image_processor.image_mean)
        if of_papers and is_vicuna:
            self.processor.chat_template = VICUNA.replace("IMAGE", self.image_token)

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=None, device="cpu", attn="sdpa",
                        random_weights: bool = False, protocol: str = "papers",
                        language: bool = True) -> "FrozenVLM":
        """Load a checkpoint folder or hub name; attn: attn_implementation of transformers.

        dtype: without it bfloat16, but float32 on a CPU: most emulate bfloat16, and are slow at it
        device: "meta" gives shapes alone, at once and in no memory: to check all the rest
        random_weights: the model of the config alone, always the same weights, for memory and
        speed without a download. Its answers are meaningless; a warning is printed.
        protocol: what the papers do to pictures and prompts, or "stock", what the hub's files say
        language=False: without the language model, for what reads pictures alone
        Raises before a weight is read: FileNotFoundError if there is no such checkpoint,
        PermissionError if it is gated, ConnectionError if the hub cannot be asked, ValueError if
        no family serves it, MemoryError if the weights do not fit the device. Raises ValueError
        for a checkpoint that lacks some of them.
        """
        dtype = dtype or (torch.float32 if "cpu" in str(device) else torch.bfloat16)
        name, device = str(name_or_path), check_device(device, dtype)
        config = read_config(name)
        processor = read_processor(name, find_adapter(config).processor_class)
        text = config.text_config
        layers = text.num_hidden_layers
        if not language:
            text.num_hidden_layers = 0
            text.layer_types = getattr(text, "layer_types", None) and []
        check_room(name, config, dtype, device)
        if random_weights and device.type != "meta":
            print(f"RANDOM WEIGHTS: OF {name} ONLY THE SHAPES ARE REAL, ITS ANSWERS MEAN NOTHING")
        if random_weights or device.type == "meta":
            model = blank_model(config, dtype, device, attn)
        else:
            model = read_weights(name, config, dtype, device, attn)
        model.config.text_config.num_hidden_layers = layers    # as fingerprint() tells
        vlm = cls(model, processor, protocol)
        if not language:
            vlm.lm = model.model.language_model = model.lm_head = None
        return vlm

    def train(self, mode: bool = True) -> "FrozenVLM":
        """Does nothing: a frozen model has no training mode."""
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def fingerprint(self) -> dict[str, str | int]:
        """What a selector's weights depend on. One that never saw the language model depends on
        vision_* and feature_layer alone. vision_side: 0 for native resolution."""
        config = self.adapter.config
        vision, text = config.vision_config, config.text_config
        return dict(
            model_type=config.model_type, vision_width=self.width, vision_patch=self.adapter.patch,
            vision_side=self.adapter.side,
            vision_layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
            feature_layer=getattr(config, "vision_feature_layer", -1), dim=text.hidden_size,
            layers=text.num_hidden_layers, vocabulary=text.vocab_size)

    def _message(self, role: str, text: str, images: int = 0) -> dict:
        pictures = [{"type": self.adapter.kind}] * images
        return {"role": role, "content": pictures + [{"type": "text", "text": text}]}

    def _template(self, messages, generation: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.processor.chat_template, tokenize=False,
            add_generation_prompt=generation)

    def _dialogue(self, turns, ask_twice: bool, images: int) -> tuple[str, list[tuple[int, int]]]:
        """Text of a dialogue, and [start, end) of its answers with their end-of-turn marks.

        Templates may write an earlier turn in another way than the last one. So signs that no text
        holds stand for the answers at first, and tell where these belong.
        """
        signs = [chr(0xE000 + k) for k in range(len(turns))]           # Unicode's private use
        messages, heads, tails = [], [], []

        def render(**how) -> str:
            text = self._template(messages, **how).replace(self.image_token, self.written)
            if ask_twice:
                # many templates write the image first, wherever it is put
                first = f"{turns[0][0]} {self.image_start}"
                text = text.replace(self.image_start, first, 1)
            for sign in signs if self.end else ():       # behind our own mark there is no blank
                text = text.replace(f"{sign}{self.end} ", f"{sign}{self.end}")
            return text
        for sign, (question, answer) in zip(signs, turns):
            messages.append(self._message("user", question, 0 if messages else images))
            heads.append(rest := render(generation=True))
            if answer is not None:
                messages.append(self._message("assistant", sign + self.end))
                rest = render()
                tails.append(rest.partition(sign)[2])
        if not rest.startswith(heads[-1]):         # the last answer stands where it is asked for
            rest = heads[-1] + signs[-1] + tails[-1]
        text, spans = "", []
        for k, tail in enumerate(tails):
            before, found, rest = rest.partition(signs[k])
            if not found or not tail:
                raise ValueError("this checkpoint's chat template leaves out an answer, or what "
                                 "ends it: expected one that writes every turn")
            # what the generation prompt leaves open, such as a blank, is for the model to say
            opening = heads[k].rpartition(signs[k - 1])[2]
            start = len(text) + len(opening if before.startswith(opening) else before)
            text += before + turns[k][1].strip()
            spans.append((start, len(text) + len(commonprefix([tail.rstrip(), rest]))))
        return text + rest, spans

    def unknown_words(self, text: str) -> list[str]:
        """Words, or pieces of words, that the tokenizer cannot spell."""
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(tokens["input_ids"], tokens["offset_mapping"])
        unknown = [text[start:end] for token, (start, end) in pairs
                   if token == self.tokenizer.unk_token_id]
        return list(dict.fromkeys(unknown))

    def _check_rows(self, images, turns) -> None:
        """Raises ValueError for rows that no prompt can be made of."""
        if not len(images) == len(turns) > 0:
            raise ValueError(f"batch() got {len(images)} images and {len(turns)} dialogues: "
                             "expected one of each per row, and at least one row")
        frames = ", its frames" if self.adapter.kind == "video" else ""
        for row, (image, dialogue) in enumerate(zip(images, turns)):
            several = image if isinstance(image, list) else [image]
            if not several or not dialogue or not all(isinstance(x, Image.Image) for x in several):
                raise ValueError(
                    f"row {row} has a {type(image).__name__} and {len(dialogue)} turns: expected a "
                    f"PIL image, or a list of them{frames}, see Image.open(), and at least one "
                    "(question, answer)")
            for k, turn in enumerate(dialogue):
                self._check_turn(f"turns[{row}][{k}]", *turn, is_last=k == len(dialogue) - 1)

    def _check_turn(self, where: str, question: str, answer: str | None, is_last: bool) -> None:
        if not question.strip():
            raise ValueError(f"{where} has the empty question {question!r}: expected some text")
        if not is_last if answer is None else not answer.strip():
            raise ValueError(f"{where} has the answer {answer!r}: expected some text; only the "
                             "last answer of a row may be None, for the model to give")
        if self.image_token in question + (answer or ""):
            raise ValueError(f"{where} contains {self.image_token!r}: leave it out, batch() "
                             "places it")
        if unknown := self.unknown_words(f"{question} {answer or ''}"):
            vocabulary = self.tokenizer.get_vocab()
            words = sorted(filter(str.isalpha, vocabulary), key=vocabulary.get)[:80]
            raise ValueError(f"{where}: this checkpoint cannot read "
                             f"{', '.join(map(repr, unknown))}; among the words it knows are: "
                             f"{' '.join(words)}")

    def _inputs(self, images: list, *text, **how) -> BatchFeature:
        """Adapter.inputs() of rows, a picture cut up once; image_counts (B,) if one has several."""
        rows = [row if isinstance(row, list) else [row] for row in images]
        given = {id(picture): picture for row in rows for picture in row}
        ready = {key: square(each.convert("RGB"), self.colour) for key, each in given.items()}
        rows = [[ready[id(picture)] for picture in row] for row in rows]
        counts = [1 if self.adapter.kind == "video" else len(row) for row in rows]
        pictures = rows if self.adapter.kind == "video" else sum(rows, [])
        batch = self.adapter.inputs(each_once(self.processor), pictures, *text, **how)
        if max(counts) > 1:
            batch["image_counts"] = torch.tensor(counts)
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        return batch

    def pictures(self, images: list, device=None) -> BatchFeature:
        """The pixels of batch() alone: all that encode() and pixels() need."""
        return self._inputs(images).to(self.device if device is None else device)

    def batch(self, images: list, turns: list[list[tuple[str, str | None]]], device=None,
              ask_twice: bool = False) -> BatchFeature:
        """The tensors that the other methods take as `batch`: a picture and a dialogue per row.

        images[b]: a PIL image, or a list of images or frames, before the first question
        turns[b]: [(question, answer), ...]; a last answer of None is for the model to give
        device: the model's if None; a loader's worker passes "cpu", it must not touch the GPU
        ask_twice: the first question stands before the image too, so that visual tokens see it

        Returns input_ids, attention_mask and labels (B, L), left padded, and the pixels. labels is
        -100 but for the answers and the end-of-turn mark after each. Raises ValueError on rows that
        do not fit, empty texts, unknown words, and rows longer than the model has positions.
        """
        self._check_rows(images, turns)
        is_video = self.adapter.kind == "video"
        counts = [len(x) if isinstance(x, list) and not is_video else 1 for x in images]
        dialogues = [self._dialogue(dialogue, ask_twice, n) for dialogue, n in zip(turns, counts)]
        texts, spans = zip(*dialogues)
        # a template may bring the BOS token along; a second one would shift every position
        bos = self.tokenizer.bos_token
        special = not (bos and texts[0].startswith(bos))
        batch = self._inputs(images, list(texts), padding=True, add_special_tokens=special,
                             return_tensors="pt")
        batch["labels"] = self._labels(batch, texts, spans, special)
        for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
            if n > self.limit:
                raise ValueError(
                    f"row {row} has {n} tokens, those of its image included: expected at most "
                    f"{self.limit}, the language model's positions or window of attention; "
                    "shorten its turns, or take a smaller picture or fewer frames")
        questions = [" ".join(question for question, _ in dialogue) for dialogue in turns]
        asked = self.tokenizer(questions, add_special_tokens=False, padding=True,
                               padding_side="right", return_tensors="pt")
        batch["question_ids"], batch["question_mask"] = asked["input_ids"], asked["attention_mask"]
        return batch.to(self.device if device is None else device)

    def _labels(self, batch, texts, spans, special: bool) -> Tensor:
        """(B, L): token ids inside the answers' spans, else -100.

        The text is tokenised once more, for the character offsets. There an image mark is one
        token, in input_ids it is one per unit: but for these the two agree, which is checked.
        """
        ids = batch["input_ids"]
        is_text = batch["attention_mask"].bool() & (ids != self.image_id)
        labels = torch.full_like(ids, IGNORE)
        tokens = self.tokenizer(list(texts), add_special_tokens=special,
                                return_offsets_mapping=True)
        for row, row_spans in enumerate(spans):
            pairs = [pair for pair in zip(tokens["input_ids"][row], tokens["offset_mapping"][row])
                     if pair[0] != self.image_id]
            column = is_text[row].nonzero().flatten()
            if ids[row, column].tolist() != [token for token, _ in pairs]:
                raise RuntimeError(f"row {row}: but for the image, the processor's tokens are not "
                                   "the tokenizer's: expected a stock processor, the answers "
                                   "cannot be located")
            is_answer = torch.tensor([any(end > first and start < last for first, last in row_spans)
                                      for _, (start, end) in pairs])
            labels[row, column[is_answer]] = ids[row, column[is_answer]]
        return labels

    def question(self, batch) -> tuple[Tensor, Tensor]:
        """What a selector may read of the text: word embeddings (B, L, D) of each row's questions,
        right padded, and valid (B, L) bool. No template, no answers."""
        words = self.lm.get_input_embeddings()(batch["question_ids"])
        return words.detach(), batch["question_mask"].bool()

    @torch.no_grad()
    def encode(self, batch) -> Units:
        """Run the vision encoder once, no projector. Raises ValueError for a row not finite."""
        feats, grid = self.adapter.encode(batch)
        views, slots = self.adapter.views(batch), self.adapter.slots(batch)
        if "image_counts" in batch:
            counts = batch["image_counts"].tolist()
            views = [sum(part) for part in split_by(views or [1] * sum(counts), counts)]
        shapes, has_token = None, None
        if views is not None:
            by_image = split_by(grid, views)
            shapes = None if all(len(set(part)) == 1 for part in by_image) else grid
            grid = [stacked(part) for part in by_image]
        sizes = torch.tensor([rows * columns for rows, columns in grid])
        image_of = torch.arange(len(grid)).repeat_interleave(sizes).to(feats.device)
        check_finite(feats, "features of the vision encoder", image_of)
        if slots is not None:
            has_token = torch.isin(torch.arange(len(feats)), slots[0].cpu()).to(feats.device)
        return Units(feats, image_of, grid, views, has_token, shapes)

    def _slots(self, batch) -> tuple[Tensor, Tensor]:
        """Adapter.slots(), written out where unit i stands at the i-th image token."""
        n = int((batch["input_ids"] == self.image_id).sum())
        unit, line = self.adapter.slots(batch) or (torch.arange(n), torch.full((n,), -1))
        device = batch["input_ids"].device
        return unit.to(device), line.to(device)

    def pixels(self, batch) -> list[Tensor]:
        """(3, H, W) of each image as the encoder sees it: normalised, at the size that its units
        cover. Several views stand one below another; several images of a row come one by one."""
        pixels, views = self.adapter.pixels(batch), self.adapter.views(batch)
        return pixels if views is None else [torch.cat(x, 1) for x in split_by(pixels, views)]

    def project(self, feats: Tensor, unit: Tensor | None = None) -> Tensor:
        """(K, C) or (K, P, C) of the units (K,) int64, by default all M -> (K, D), the VLM's own
        projector. Differentiable."""
        unit = torch.arange(len(feats), device=feats.device) if unit is None else unit
        return self.adapter.project(feats.to(self.dtype), unit)

    def embed(self, batch, units: Units, feats: Tensor | None = None) -> Prompt:
        """The full prompt; feats, of the same shape, replace units.feats. Differentiable."""
        return self._prompt(batch, units, feats, torch.ones_like(units.image_of).bool())

    def prune(self, batch, units: Units, keep: Tensor | list[Tensor], feats: Tensor | None = None,
              positions: str = "original") -> Prompt:
        """The prompt with the kept units only, each at its original position.

        keep[b]: ascending int64 indices (K_b,) into the units of image b. A newline stays if and
        only if a unit of its line does.
        feats (sum of K_b, C) or (sum of K_b, P, C): stand in place of the kept units' own
        positions="reindex" numbers what stays anew from 0, with M-RoPE on every axis alike, as the
        released code of most methods does.
        Raises ValueError when keep does not fit the units, or names one without a token.
        """
        kept = kept_mask(units, keep)
        if positions not in ("original", "reindex"):
            raise ValueError(f"positions={positions!r}: expected 'original' or 'reindex'")
        prompt = self._prompt(batch, units, feats, kept)
        anew = (prompt.mask.cumsum(-1) - 1).clamp(min=0).expand_as(prompt.pos)
        return replace(prompt, pos=anew) if positions == "reindex" else prompt

    def _prompt(self, batch, units: Units, feats: Tensor | None, kept: Tensor) -> Prompt:
        """The prompt without the units that kept (M,) bool drops; feats: a row per kept unit."""
        feats = units.feats[kept] if feats is None else feats
        if feats.shape != (shape := (int(kept.sum()), *units.feats.shape[1:])):
            raise ValueError(f"feats has shape {tuple(feats.shape)}: expected {shape}, that of the "
                             "kept units' own; Units.flat() undoes Units.pad()")
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        is_visual = ids == self.image_id
        unit, line = self._slots(batch)                       # (S,) of every image token
        is_newline = unit < 0
        has_token = torch.ones_like(kept) if units.has_token is None else units.has_token
        if not torch.equal(unit[~is_newline].sort().values, has_token.nonzero().flatten()):
            raise ValueError(f"{int(has_token.sum())} units for a batch with "
                             f"{int((~is_newline).sum())}: expected those that encode() gave for "
                             "this very batch")
        shows_kept = ~is_newline & kept[unit]
        stays = shows_kept | is_newline & torch.isin(line, line[shows_kept])

        # feats hold the kept units in their own order, the prompt shows them in that of its slots
        place = (kept.cumsum(0) - 1)[unit[shows_kept]]
        which = kept.nonzero().flatten()
        tokens = self.project(feats, which)[place]
        # detach: with activation checkpointing the embedding's output would want a gradient
        embeds = self.lm.get_input_embeddings()(ids).detach()
        if is_newline.any():
            embeds = torch.where(is_visual[..., None], self.model.model.image_newline, embeds)
        at_kept = is_visual.masked_scatter(is_visual, shows_kept)
        embeds = embeds.masked_scatter(at_kept[..., None], tokens)
        later = tuple(torch.zeros_like(embeds).masked_scatter(at_kept[..., None], x[place])
                      for x in self.adapter.later(feats.to(self.dtype), which))

        # positions are those of the full prompt; Prompt.only() takes each along with its token
        visual_left = is_visual.masked_scatter(is_visual, stays)
        full = Prompt(embeds, mask.long(), self.adapter.positions(batch), batch.get("labels"),
                      visual_left, later=later)
        return full.only(mask & (visual_left | ~is_visual))

    def _states(self, prompt: Prompt) -> Tensor:
        """(B, L, D), after the last layer and its norm."""
        # Always with a mask: without one, transformers takes each gap in the positions for the
        # start of another packed text, and silently lets nothing attend across it.
        with self.entering(prompt.later):
            return self.lm(inputs_embeds=prompt.embeds, attention_mask=prompt.mask,
                           position_ids=prompt.pos, use_cache=False).last_hidden_state

    @contextmanager
    def entering(self, later: tuple[Tensor, ...]):
        """While open, a pass of the language model adds later[i] to the states behind layer i."""
        with ExitStack() as hooks:
            for layer, x in zip(self.lm.layers, later):
                # to what is decoded next, a token at a time, there is nothing to add
                hooks.enter_context(layer.register_forward_hook(
                    lambda _, args, states, x=x: states + x if states.shape[1] > 1 else states))
            yield

    def logits(self, prompt: Prompt) -> Tensor:
        """(B, L, V); logits[:, i] predict token i + 1."""
        return self.model.lm_head(self._states(prompt))

    def loss(self, prompt: Prompt) -> Tensor:
        """Negative log likelihood of the labels, in nats per token and at least float32, mean over
        all answer tokens of the batch. Raises ValueError when there is nothing to predict."""
        if prompt.labels is None:
            raise ValueError("this prompt has no labels: build its batch with answers")
        target = prompt.labels[:, 1:]
        is_answer = target != IGNORE
        if not is_answer.any():
            raise ValueError(f"rows have {is_answer.sum(1).tolist()} answer tokens: expected some")
        # the output layer runs at the answers only: its logits are a step's largest tensor
        logits = self.model.lm_head(self._states(prompt)[is_answer.nonzero(as_tuple=True)])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, target[is_answer], reduction="none").mean()

    @torch.no_grad()
    def generate(self, prompt: Prompt, max_new_tokens: int = 32, streamer=None) -> list[str]:
        """Greedy continuation of every row, without special tokens and outer blanks.

        The first new token stands one behind the last ORIGINAL position, whatever was pruned.
        Sampling and penalties of the checkpoint's generation config are off. streamer: of
        transformers; it gets nothing for the prompt, then the tokens of a single row.
        """
        with self.decoding(), self.entering(prompt.later):
            tokens = self.model.generate(
                inputs_embeds=prompt.embeds, attention_mask=prompt.mask, position_ids=prompt.pos,
                max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None,
                top_k=None, repetition_penalty=1.0, num_beams=1, use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id, streamer=streamer)
        return self.texts(tokens)

    @contextmanager
    def decoding(self):
        """Evaluation mode: in training mode, checkpointing drops the cache."""
        training = self.lm.training
        self.lm.eval()
        try:
            yield
        finally:
            self.lm.train(training)

    def ends(self) -> Tensor:
        """The tokens that end an answer, (n,) int64."""
        ends = self.model.generation_config.eos_token_id or []
        return torch.tensor(ends, dtype=torch.int64, device=self.device)

    def texts(self, tokens: Tensor) -> list[str]:
        """(B, n) new tokens -> B texts."""
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]

    def checkpointing(self, on: bool) -> None:
        """Recompute the language model's activations in the backward pass: less memory, the same
        gradients. Raises ValueError for dropout, which its training mode would switch on."""
        drops = [name for name, module in self.lm.named_modules()
                 if getattr(module, "attention_dropout", 0)
                 or isinstance(module, nn.Dropout) and module.p]
        if on and drops:
            raise ValueError(f"{drops[0]} has dropout, which checkpointing would switch on: "
                             "expected none; set it to 0 in the checkpoint's config.json")
        switch = f"checkpointing_{'enable' if on else 'disable'}"     # renamed within 5.x
        new, old = f"activation_{switch}", f"gradient_{switch}"
        getattr(self.lm, new if hasattr(self.lm, new) else old)()
        self.lm.train(on)                                     # it acts in training mode only


def square(image: Image.Image, colour: tuple[int, ...] | None) -> Image.Image:
    """The picture in the middle of a square of its longer side: what LLaVA-1.5 was trained on and
    is tested with. colour: 0..255, LLaVA takes the mean of CLIP's pictures; None: as it is."""
    side = max(image.size)
    if not colour or image.size == (side, side):
        return image
    whole = Image.new("RGB", (side, side), colour)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole


def stacked(shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """(rows, columns) of views one below another; one column where their widths differ."""
    widths = {columns for _, columns in shapes}
    if len(widths) == 1:
        return sum(rows for rows, _ in shapes), shapes[0][1]
    return sum(rows * columns for rows, columns in shapes), 1
