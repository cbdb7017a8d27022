"""Qwen3-VL: patches of several vision blocks, which enter the language model at several layers."""

import torch
from torch import Tensor

from common import QwenAdapter


class Qwen3Adapter(QwenAdapter):
    """Qwen3-VL, dense or a mixture of experts: native resolution, full attention in every block.

    deepstack: what some earlier blocks say of a unit is merged as the last block's patches are, and
    added to the unit's token behind the first layers of the language model. So a unit has feats
    (4 (1 + n), C): its four patches after the last block, then after each of n earlier ones, in the
    order in which they enter. What is done to a unit is done to all of them: they are kept, dropped
    and merged together, and a selector sees their mean.

    A gate gives all of a unit's patches the same share of signal, each noise of its own, by the
    statistics of its own block. So a drowned unit is noise wherever it enters. On a tiny random
    model, of the variance of the features that enter later, a linear map reads from the unit's
    states behind layer 2 (test pictures; 0.35 where all is signal):

        share of signal in Eq. (5)                                     0     0.1   0.5
        gated alike, which is what happens here                        0     0.02  0.16
        gated alike, by the statistics of all blocks together          0     0.02  0.14
        shrunk to the share's root, without noise                      0     0.07  0.24
        added as they are                                              0.32  0.32  0.33

    Statistics of all blocks together drown first what enters from the block of the least scale.
    """
    model_type = "qwen3_vl"

    @classmethod
    def matches(cls, config):
        return config.model_type in ("qwen3_vl", "qwen3_vl_moe")

    def __init__(self, model):
        super().__init__(model)
        visual, blocks = self.model.visual, self.config.vision_config.deepstack_visual_indexes
        # the language model reads them by block, whatever order the config names these in
        self.early = [visual.deepstack_merger_list[i] for i in sorted(
            range(len(blocks)), key=blocks.__getitem__)]
        self.unlike_patches = self.merge ** 2 * (1 + len(blocks))

    def encode(self, batch):
        states = []
        hooks = [merger.register_forward_pre_hook(lambda _, args: states.append(args[0]))
                 for merger in self.early]
        try:
            feats, grid = super().encode(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([feats, *(self._raster(x, batch) for x in states)], 1), grid

    def _raster(self, x: Tensor, batch) -> Tensor:
        """(n, d) -> (M, P, d): the processor has put the patches of a unit together."""
        return x.view(-1, self.merge ** 2, x.shape[-1])

    def project(self, feats, unit):
        return super().project(feats[:, :self.merge ** 2], unit)

    def later(self, feats, unit):
        parts = feats.split(self.merge ** 2, 1)[1:]
        return [merger(x.flatten(0, 1)) for merger, x in zip(self.early, parts)]
