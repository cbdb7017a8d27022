"""LLaVA-NeXT-Video and LLaVA-OneVision: frames, pooled."""

import torch
import torch.nn.functional as F
from transformers import BatchFeature

from backbones import ImageOnlyProcessor, repeat_image_tokens
from backbones.checkpoints import each_once
from common import Adapter, LlavaAdapter


class LlavaNextVideoAdapter(LlavaAdapter):
    """LLaVA-NeXT-Video on frames: LLaVA's tower, whose patches are pooled, 2x2 to a unit. Still
    pictures are read as videos of one frame, not cropped.

    newlines  tokens behind a video that show no unit
    pooled    units along a side of a frame
    """
    model_type, processor_class, kind = "llava_next_video", ImageOnlyProcessor, "video"
    newlines, square = 0, False

    def __init__(self, model):
        super().__init__(model)
        self.pooled = self.side // self.config.spatial_pool_stride
        self.unit_side = self.patch * self.config.spatial_pool_stride

    def inputs(self, processor, images, text=None, **how):
        """Raises ValueError unless all rows have the same number of frames."""
        # not above: without torchvision it warns as soon as it is named
        from transformers import CLIPImageProcessor

        clips = [x if isinstance(x, list) else [x] for x in images]
        if len({len(clip) for clip in clips}) > 1:
            raise ValueError(f"the rows have {[len(clip) for clip in clips]} frames: expected as "
                             "many in each")
        # the stock image processor would cut frames into crops
        given = processor.image_processor
        single = CLIPImageProcessor(
            size=dict(given.size), resample=given.resample, image_mean=given.image_mean,
            image_std=given.image_std, do_center_crop=bool(given.do_center_crop),
            crop_size=dict(given.crop_size or given.size))
        x = each_once(single)(images=sum(clips, []), return_tensors="pt")["pixel_values"]
        x = x.unflatten(0, (len(clips), -1))                     # (B, frames, 3, H, W)
        count = x.shape[1] * self.pooled ** 2 + self.newlines
        return repeat_image_tokens(self, processor, BatchFeature({"pixel_values": x}),
                                   [count] * len(clips), text, how)

    def views(self, batch):
        return [batch["pixel_values"].shape[1]] * len(batch["pixel_values"])

    def tiles(self, batch):
        return batch["pixel_values"].flatten(0, 1)

    def encode(self, batch):
        feats, grid = super().encode(batch)
        frames = feats.view(len(grid), -1, self.width)
        feats = self.model.vision_resampler(frames).flatten(0, 1)
        return feats, [(self.pooled, self.pooled)] * len(grid)

    def fold(self, x, batch):
        x = x[:, 1:].transpose(1, 2).unflatten(-1, (self.side, self.side))
        return F.avg_pool2d(x, self.side // self.pooled).flatten(2).transpose(1, 2).flatten(0, 1)


class LlavaOnevisionAdapter(LlavaNextVideoAdapter):
    """LLaVA-OneVision (and LLaVA-Video) on frames: SigLIP. A token is a mixture of the 2x2
    projected patches around it; a unit is these patches before the projector. One newline ends
    the video."""

    model_type, has_cls, newlines = "llava_onevision", False, 1

    @classmethod
    def matches(cls, config):
        """Unlike the families above it does not ask for CLIP's tower."""
        return config.model_type == cls.model_type

    def __init__(self, model):
        Adapter.__init__(self, model)
        config, vision = self.config, self.config.vision_config
        strategy = config.vision_feature_select_strategy
        self.layer = config.vision_feature_layer
        if not isinstance(self.layer, int) or strategy != "full":
            raise ValueError(f"LLaVA-OneVision with vision_feature_layer={self.layer}, select "
                             f"strategy {strategy!r}: expected one layer, and 'full'")
        self.depth = self.layer if self.layer >= 0 else len(self.attentions) + 1 + self.layer
        self.side = vision.image_size // self.patch
        self.pooled = -(-self.side // 2)
        self.unit_side = vision.image_size // self.pooled
        # interpolation is linear: that of the unit vectors gives every patch's weight in a mixture
        unit_vectors = torch.eye(self.side)[None].double()
        share = F.interpolate(unit_vectors, self.pooled, mode="linear")[0].T
        weight, patch = share.topk(2)                            # (pooled, 2) along one side
        patches = patch[:, None, :, None] * self.side + patch[None, :, None, :]
        self.patches = patches.reshape(-1, 4)                    # (units of a frame, 4)
        self.weight = (weight[:, None, :, None] * weight[None, :, None, :]).reshape(-1, 4)

    def encode(self, batch):
        output = self.model.vision_tower(self.tiles(batch), output_hidden_states=True)
        x = output.hidden_states[self.layer]
        return x[:, self.patches].flatten(0, 1), [(self.pooled, self.pooled)] * len(x)

    def fold(self, x, batch):
        """The mean is weighted as the projected patches are."""
        return (x[:, self.patches] * self.weight.to(x)[..., None]).sum(2).flatten(0, 1)

    def project(self, feats, unit):
        weight = self.weight.to(feats)[unit % self.pooled ** 2]
        return (super().project(feats, unit) * weight[..., None]).sum(1)

    def slots(self, batch):
        if "input_ids" not in batch:       # pictures alone: no token yet, but every unit gets one
            return None
        ids = batch["input_ids"]
        n = int((ids == self.token_id).sum()) - len(ids)
        unit = torch.arange(n, device=ids.device).view(len(ids), -1)
        unit = F.pad(unit, (0, 1), value=-1)                     # the newline that ends a video
        line = torch.arange(len(ids), device=ids.device).repeat_interleave(unit.shape[1])
        return unit.flatten(), line
