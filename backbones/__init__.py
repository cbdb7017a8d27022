"""Further families of VLMs, one file each; common.py finds them by Adapter.matches(config)."""

import re

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class ImageOnlyProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template, where the stock one needs torchvision."""

    # transformers reads the parts to load from this signature
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def repeat_image_tokens(adapter, processor, pixels, counts: list[int], text: list[str] | None,
                        how: dict) -> BatchFeature:
    """Adapter.inputs() where the stock processor cannot write the prompt: it needs torchvision.

    counts: how many image tokens the i-th one of all texts becomes. how: of the tokenizer.
    """
    if text is None:
        return pixels
    token = processor.tokenizer.convert_ids_to_tokens(adapter.token_id)
    rest = iter(counts)
    text = [re.sub(re.escape(token), lambda match: match[0] * next(rest), row) for row in text]
    tokens = processor.tokenizer(text, **how)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return BatchFeature(inputs | dict(pixels))
