"""LLaVA-NeXT-Video and LLaVA-OneVision: frames, pooled."""

import torch
import torch.nn.functional as F
from transformers import BatchFeature

from common.adapters import Adapter, ImageOnlyProcessor
from common.llava import LlavaAdapter


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
