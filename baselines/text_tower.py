"""CLIP's text tower, to the pictures of a VLM whose vision encoder is that CLIP's.

    tower = load(vlm)                          from the hub, its cache, or a folder
    tower.patches(units.feats)                 (M, d), in the space of ...
    tower.read(["is it red ?", ...])           (B, S, d), valid (B, S)

As CDPruner's code does: patches of the layer that the VLM reads, through the last norm and the
projection of CLIP's [CLS]; a text longer than CLIP's 77 tokens is cut into segments, of which each
is embedded by itself.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from backbones.checkpoints import read_config, reading

# (width, layers, patch, side) of a CLIP encoder -> the checkpoint on the hub that it comes from.
# LLaVA-1.5's and both LLaVA-NeXTs' [paper]
TOWERS = {(1024, 24, 14, 336): "openai/clip-vit-large-patch14-336"}
ALIKE = .9          # least cosine of two encoders of one origin, of which one was trained on [ours]


class TextTower:
    """name: of the CLIP model, whose text_model, text_projection and visual_projection it has, in
    float32 on the VLM's device; norm: the last one of the VLM's own encoder."""

    def __init__(self, name: str, model: CLIPModel, tokenizer, norm):
        self.name, self.model, self.tokenizer, self.norm = name, model, tokenizer, norm

    @torch.no_grad()
    def patches(self, feats: Tensor) -> Tensor:
        """(M, C) or (M, P, C), in which a unit is the mean of its patches -> (M, d) float32."""
        norm = self.norm
        x = F.layer_norm(feats.float(), norm.normalized_shape, norm.weight.float(),
                         norm.bias.float(), norm.eps)
        x = self.model.visual_projection(x)
        return x if x.ndim == 2 else x.mean(1)

    @torch.no_grad()
    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, S, d) float32, S the most segments of a text, and valid (B, S) bool."""
        length = self.model.config.text_config.max_position_embeddings
        ids = [torch.tensor(row) for row in self.tokenizer(texts, verbose=False)["input_ids"]]
        segments = [row.split(length) for row in ids]
        rows = [F.pad(part, (0, length - len(part))) for row in segments for part in row]
        real = [F.pad(torch.ones_like(part), (0, length - len(part)))
                for row in segments for part in row]
        device = self.model.device
        states = self.model.text_model(torch.stack(rows).to(device), torch.stack(real).to(device))
        embeds = self.model.text_projection(states.pooler_output)
        counts = [len(row) for row in segments]
        found = torch.nn.utils.rnn.pad_sequence(embeds.split(counts), batch_first=True)
        column = torch.arange(max(counts), device=device)
        return found, column < torch.tensor(counts, device=device)[:, None]


def load(vlm, name: str | None = None) -> TextTower:
    """The text tower to this VLM's pictures; name: a folder or a name on the hub, in place of the
    one in TOWERS.

    Raises ValueError, with the reason, if the vision encoder is no CLIP, none is known for it, it
    cannot be read, or it belongs to another encoder.
    """
    vision = vlm.adapter.config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"the vision encoder is a {vision.model_type!r}, to whose pictures there "
                         "is no text tower: expected CLIP's; cdpruner_words does without")
    sizes = vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size
    name = str(name or TOWERS.get(sizes, ""))
    if not name:
        raise ValueError("no text tower is known to a CLIP of width {}, {} layers, patches of {} "
                         "and pictures of {}: expected one of text_tower.TOWERS, or a tower= of "
                         "cdpruner.way(); cdpruner_words does without".format(*sizes))
    try:
        model, tokenizer, first = read_clip(name)
    except OSError as error:
        raise ValueError(f"the text tower cannot be read: {error}; cdpruner_words does without"
                         ) from error
    own = vlm.adapter.model.vision_tower
    check_origin(name, own.embeddings.patch_embedding.weight, first)
    return TextTower(name, model.to(vlm.device), tokenizer, own.post_layernorm)


@cache
def read_clip(name: str) -> tuple[CLIPModel, AutoTokenizer, Tensor]:
    """The model without its vision tower, its tokenizer, and the weight of that tower's first
    layer. Raises OSError as reading() does, ValueError if it is no CLIP or lacks weights."""
    config = read_config(name)
    if config.model_type != "clip":
        raise ValueError(f"{name!r} is a {config.model_type!r}: expected a CLIP model with both of "
                         "its towers")
    with reading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = CLIPModel.from_pretrained(name, dtype=torch.float32,
                                                 output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name!r} lacks {len(missing)} weights, such as {missing[0]}: expected a "
                         "CLIP model with both of its towers")
    first = model.vision_model.embeddings.patch_embedding.weight
    model.vision_model = None                          # the VLM has its own
    return model.eval().requires_grad_(False), tokenizer, first.detach()


def check_origin(name: str, own: Tensor, theirs: Tensor) -> None:
    """Raises ValueError if the weights of two encoders' first layers are not of one origin."""
    alike = 0.
    if own.shape == theirs.shape:
        theirs = theirs.to(own.device).flatten().double()
        alike = F.cosine_similarity(own.flatten().double(), theirs, dim=0).item()
    if alike < ALIKE:
        raise ValueError(f"{name!r} is not the CLIP that this vision encoder comes from: their "
                         f"first layers have a cosine of {alike:.2f}, expected {ALIKE} at least")
