"""InternVL3: tiles, and patches shuffled into units."""

from torch import Tensor

from common.adapters import Adapter, ImageOnlyProcessor


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
