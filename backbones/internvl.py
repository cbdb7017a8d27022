"""InternVL3: tiles, and patches shuffled into units."""

from torch import Tensor

from backbones import ImageOnlyProcessor, repeat_image_tokens
from common import Adapter


class InternVLAdapter(Adapter):
    """InternViT on tiles and on the whole picture; a unit is the block of one pixel shuffle."""

    model_type, processor_class, has_cls = "internvl", ImageOnlyProcessor, True

    def __init__(self, model):
        super().__init__(model)
        config = self.config
        strategy = config.vision_feature_select_strategy
        self.layer = config.vision_feature_layer
        self.merge = round(1 / config.downsample_ratio)          # patches along a side of a unit
        if not isinstance(self.layer, int) or strategy != "default":
            raise ValueError(f"InternVL with vision_feature_layer={self.layer}, select strategy "
                             f"{strategy!r}: expected one layer, and 'default'")
        self.unit_side = self.patch * self.merge
        self.side = config.vision_config.image_size[0] // self.unit_side
        # hidden state 0 is the embedding: the last state is the output of the last block
        self.depth = self.layer if self.layer >= 0 else len(self.attentions) + 1 + self.layer

    def inputs(self, processor, images, text=None, **how):
        pixels = processor.image_processor(images=images, crop_to_patches=True,
                                           return_tensors="pt")
        counts = [n * self.side ** 2 for n in self.views(pixels)]
        return repeat_image_tokens(self, processor, pixels, counts, text, how)

    def written(self, tokenizer, token):
        return f"{tokenizer.start_image_token}{token}{tokenizer.end_image_token}"

    def views(self, batch):
        return batch["num_patches"].tolist()

    def encode(self, batch):
        output = self.model.vision_tower(self.tiles(batch), output_hidden_states=self.layer != -1)
        x = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        return self._blocks(x), [(self.side, self.side)] * len(x)

    def _blocks(self, x: Tensor) -> Tensor:
        """(T, 1 + n, d), [CLS] first -> (M, P, d)."""
        x = x[:, 1:].unflatten(1, (self.side, self.merge, self.side, self.merge)).transpose(2, 3)
        return x.reshape(-1, self.merge ** 2, x.shape[-1])

    def fold(self, x, batch):
        return self._blocks(x).mean(1)

    def project(self, feats, unit):
        return self.model.multi_modal_projector(feats.flatten(1))
