"""Frozen vision-language models with token pruning between the vision encoder and the projector.

Only this folder knows `transformers`. A selector sees `Units` and answers with indices, never the model.

    vlm    = FrozenVLM.from_pretrained(path)
    batch  = vlm.batch(images, turns)           one image and one dialogue per row, left padded
    units  = vlm.encode(batch)                  frozen vision encoder, before the projector
    units  = vlm.encode(batch, look)            ... with what else a method wants to see of it, in units.seen
    prompt = vlm.embed(batch, units, feats)     training: every unit, gated by the selector, differentiable
    prompt = vlm.prune(batch, units, keep)      inference: the kept units alone, each at its ORIGINAL position
    prompt = vlm.prune(batch, units, keep, feats)        ... with other features: tokens that others were merged into
    vlm.loss(prompt), vlm.logits(prompt), vlm.generate(prompt)
    vlm.generate_within(prompt, {layer: rule})  inference: visual tokens leave inside the language model, too
    chat = Chat(vlm, image, units, keep)        inference: chat.ask(question) answers, and remembers

A unit is what the language model reads as one visual token: a CLIP patch in LLaVA, a 2x2 block of patches
in Qwen2.5-VL and InternVL. Pruning here is exact: the logits are those of the full sequence with the dropped tokens
hidden by the attention mask, because what stays keeps the rotary position it had there.

An image may reach the encoder as several views: crops in LLaVA-NeXT, tiles in InternVL, frames in the two video
families, where images[b] is a list of frames. In the others images[b] may be a list of images, which stand in front of
the first question, in order; these are views, too. All views of a row are one image to a selector, and what it may keep
is for the whole row; one that chooses in every view by itself asks Units.apart() and hands its answer to
Units.together().

Shapes  B rows (= images), M units of all images together, N most units of one image, C vision width,
        P patches per unit, L tokens of the prompt, D width of the language model, V vocabulary,
        T views of all images together, S image tokens of the batch.
Files   units.py: Units and Prompt | adapters.py: what a family says of itself; llava.py, qwen.py, internvl.py, video.py
        frozen.py: FrozenVLM | inside.py: rules in front of a layer, and the loop that obeys them | chat.py | loading.py
Extend  a further family is one more subclass of Adapter, which says how, and one more line in ADAPTERS.
"""

from common.adapters import Adapter, ImageOnlyProcessor, Merge
from common.chat import Chat
from common.frozen import ADAPTERS, FrozenVLM
from common.inside import PLAIN, Look, Rule
from common.loading import blank_model, free_bytes, random_language_model, weight_bytes
from common.qwen import ImageOnlyQwenProcessor
from common.units import IGNORE, Prompt, Units

__all__ = ["ADAPTERS", "Adapter", "Chat", "FrozenVLM", "IGNORE", "ImageOnlyProcessor", "ImageOnlyQwenProcessor",
           "Look", "Merge", "PLAIN", "Prompt", "Rule", "Units", "blank_model", "free_bytes",
           "random_language_model", "weight_bytes"]
