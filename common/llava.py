"""LLaVA-1.5 and LLaVA-NeXT: CLIP, whole pictures and crops."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from common.adapters import Adapter, Merge


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
