"""What the papers' figures depend on besides the model: padding of pictures, frame of prompts."""

from collections.abc import Callable

from PIL import Image

# LLaVA-1.5's own prompt; the template that comes with it on the hub lacks the first sentence
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% else %}{{ 'ASSISTANT: ' + m['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
STYLES = ("checkpoint", "vicuna_v1")
PADS = ("square", "none")


def use_style(vlm, style: str) -> None:
    """Give the VLM the prompt's frame of this name: "checkpoint" is its own chat template,
    "vicuna_v1" LLaVA's with its first sentence. Raises ValueError for another family or name."""
    if style not in STYLES:
        raise ValueError(f"style={style!r}: expected one of {', '.join(STYLES)}")
    if style == "vicuna_v1":
        if vlm.family not in ("llava", "llava_next"):
            raise ValueError(f"style=vicuna_v1 is LLaVA's: expected checkpoint for the family "
                             f"{vlm.family}")
        vlm.processor.chat_template = VICUNA


def default_pad(vlm) -> str:
    """What the papers do: LLaVA-1.5 pads to a square, other families leave it to the processor."""
    return "square" if vlm.family == "llava" else "none"


def prepare(vlm, pad: str | None = None) -> Callable[[Image.Image], Image.Image]:
    """What is done to every picture: "square", "none" for what the processor does alone, None for
    the family's default."""
    pad = pad or default_pad(vlm)
    if pad not in PADS:
        raise ValueError(f"pad={pad!r}: expected one of {', '.join(PADS)}")
    if pad == "none":
        return lambda image: image
    colour = tuple(int(255 * x) for x in vlm.processor.image_processor.image_mean)
    return lambda image: square(image, colour)


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side: what LLaVA-1.5 was trained on and
    is tested with. The hub's processors cut the longer side off instead.

    colour: 0..255; LLaVA takes the mean of CLIP's pictures.
    """
    side = max(image.size)
    whole = Image.new("RGB", (side, side), colour)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole
