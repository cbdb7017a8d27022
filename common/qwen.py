"""Qwen2.5-VL: native resolution, windows of attention, positions on three axes."""

from torch import Tensor
from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.processing_utils import ProcessorMixin
from transformers.vision_utils import get_vision_window_index

from common.adapters import Adapter


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
