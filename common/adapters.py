"""What every family of vision-language models must say of itself, so that FrozenVLM can prune its tokens."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

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


class ImageOnlyProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template, for families whose stock processor needs torchvision for videos."""

    # transformers reads the parts to load from this signature
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
