"""Checkpoint folders of the real backbones' sizes, without weights.

    python -m measure.shapes llava-1.5-7b FOLDER

A folder holds a config.json with the true sizes, and a tokenizer, chat template and image processor
of the true layout. FrozenVLM.from_pretrained(FOLDER, random_weights=True) makes a model of it that
takes the time and the memory of the downloaded one and answers nonsense; no network is needed.

What is not real: the tokenizer. It spells any text in bytes but knows as one token only what the
tiny world says, so other text is about four times as long as with the real vocabulary, and the ids
of the special tokens are its own. The embedding has the true number of rows all the same.
"""

import copy
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
)

import runs
from backbones import ImageOnlyProcessor
from common import FrozenVLM, ImageOnlyQwenProcessor, weight_bytes
from tiny import scenes

CLIP = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
            num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=336,
            projection_dim=768)
INTERNVIT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, patch_size=[14, 14], image_size=[448, 448],
                 attention_bias=True, layer_scale_init_value=.1)
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
              num_hidden_layers=26, num_attention_heads=16, patch_size=14, image_size=384,
              vision_use_head=False)
QWEN_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
                   window_size=112, spatial_merge_size=2, temporal_patch_size=2,
                   fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=3584)
VICUNA = dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
              vocab_size=32064, num_attention_heads=32, num_key_value_heads=32,
              max_position_embeddings=4096, rms_norm_eps=1e-5)
QWEN = dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
            tie_word_embeddings=False)
ROPE = dict(rope_type="default", rope_theta=1e6)

VICUNA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>\n{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'KIND' %}"
    "IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHAT = dict(turn_token="<|im_start|>", end_token="<|im_end|>")
# the special tokens that each family's processor asks for
MARKS = {
    "llava": dict(image_token="<image>"),
    "llava_next": dict(image_token="<image>"),
    "qwen2_5_vl": dict(image_token="<|image_pad|>", video_token="<|video_pad|>",
                       vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>",
                       **CHAT),
    "internvl": dict(start_image_token="<img>", end_image_token="</img>",
                     context_image_token="<IMG_CONTEXT>", video_token="<video>", **CHAT),
    "llava_onevision": dict(image_token="<image>", video_token="<video>", **CHAT)}

# name -> config class, vision, text, and the rest of it; read off the published config.json
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
QWEN_TEXT = QWEN | dict(model_type="qwen2_5_vl_text", vocab_size=152064,
                        max_position_embeddings=128000,
                        rope_parameters=ROPE | dict(mrope_section=[16, 24, 24]))
SHAPES = {
    "llava-1.5-7b": (LlavaConfig, CLIP, VICUNA, {}),
    "llava-next-vicuna-7b": (LlavaNextConfig, CLIP, VICUNA,
                             dict(image_grid_pinpoints=NEXT_GRIDS)),
    "qwen2.5-vl-7b": (Qwen2_5_VLConfig, QWEN_VISION, QWEN_TEXT, {}),
    "internvl3-8b": (InternVLConfig, INTERNVIT,
                     QWEN | dict(vocab_size=151674, rope_parameters=ROPE), {}),
    "llava-onevision-7b": (LlavaOnevisionConfig, SIGLIP,
                           QWEN | dict(vocab_size=152000, rope_parameters=ROPE), {})}

SMALL_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=1024)
SMALL_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=2)


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Bytes, merged to the words of the tiny world; see the top of this file."""
    marks = MARKS[family]
    end = "<|im_end|>" if "end_token" in marks else "</s>"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = [[word, f" {word}"] for word in scenes.vocabulary()]
    special = ["<pad>", "<s>", "</s>", *marks.values()]
    core.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>",
                                   eos_token=end, extra_special_tokens=marks)


def config(name: str, shrink: bool = False, layers: int = 0) -> PreTrainedConfig:
    """The backbone's config. Raises ValueError for a name that is not in SHAPES.

    shrink: 3 narrow layers and a small vocabulary, but pictures, patches and tokens as many as in
    the real one. layers: of the language model, its widths as they are; 0: all.
    """
    if name not in SHAPES:
        raise ValueError(f"backbone {name!r}: expected one of {', '.join(SHAPES)}")
    # transformers writes into what it is given
    kind, vision, text, more = copy.deepcopy(SHAPES[name])
    tok = tokenizer(kind.model_type)
    text = text | dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
                       pad_token_id=tok.pad_token_id)
    if shrink:
        text, vision = text | SMALL_TEXT, vision | SMALL_VISION
    if shrink and kind is Qwen2_5_VLConfig:
        text["rope_parameters"] = text["rope_parameters"] | dict(mrope_section=[2, 3, 3])
        vision |= dict(depth=3, num_heads=2, fullatt_block_indexes=[1], out_hidden_size=64)
    if layers:
        text["num_hidden_layers"] = layers
    more = more | special_ids(kind, tok)
    return kind(vision_config=vision, text_config=text, tie_word_embeddings=False, **more)


def special_ids(kind: type, tok: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of the family's special tokens, as its config names them."""
    ids = {key: tok.convert_tokens_to_ids(token) for key, token in MARKS[kind.model_type].items()}
    if kind is InternVLConfig:
        return dict(image_token_id=ids["context_image_token"])
    if kind is Qwen2_5_VLConfig:
        return dict(image_token_id=ids["image_token"], video_token_id=ids["video_token"],
                    vision_start_token_id=ids["vision_bos_token"],
                    vision_end_token_id=ids["vision_eos_token"])
    return {key.replace("token", "token_index"): ids[key]
            for key in ("image_token", "video_token") if key in ids}


def processor(family: str):
    """Tokenizer, image processor at the backbone's resolution and chat template."""
    tok = tokenizer(family)
    clip = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    patches = dict(patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1)
    if family == "llava":
        images = CLIPImageProcessorPil(**clip)
        return LlavaProcessor(images, tok, chat_template=VICUNA_TEMPLATE, **patches)
    if family == "llava_next":
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=NEXT_GRIDS, **clip)
        return LlavaNextProcessor(images, tok, chat_template=VICUNA_TEMPLATE, **patches)
    if family == "qwen2_5_vl":
        images = Qwen2VLImageProcessorPil(
            patch_size=14, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28})
        template = qwen_template("image", "<|vision_start|><|image_pad|><|vision_end|>")
        return ImageOnlyQwenProcessor(images, tok, chat_template=template)
    if family == "internvl":
        images = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, max_patches=12)
        template = qwen_template("image", "<IMG_CONTEXT>\n")
    else:
        images = LlavaOnevisionImageProcessorPil(size={"height": 384, "width": 384})
        template = qwen_template("video", "<video>\n")
    return ImageOnlyProcessor(images, tok, chat_template=template)


def qwen_template(kind: str, mark: str) -> str:
    """Qwen's chat template, with what it writes for an image or a video."""
    return QWEN_TEMPLATE.replace("KIND", kind).replace("IMAGE", mark)


def write(name: str, folder, shrink: bool = False, layers: int = 0) -> str:
    """The checkpoint folder of a backbone, without weights; returns its path."""
    shape = config(name, shrink, layers)
    family = type(shape).__name__.removesuffix("Config")
    shape.architectures = [f"{family}ForConditionalGeneration"]
    shape.save_pretrained(folder)
    processor(shape.model_type).save_pretrained(folder)
    return str(folder)


def load(name: str, shrink: bool = False, **how) -> FrozenVLM:
    """The backbone with random weights; how: dtype, device and attn of FrozenVLM.from_pretrained().
    On the device "meta" it has shapes alone, in no memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(name, Path(folder) / name, shrink)
        return FrozenVLM.from_pretrained(path, random_weights=True, **how)


def memory(config: PreTrainedConfig, dtype=torch.bfloat16, rows: int = 1,
           tokens: int = 640) -> dict[str, int]:
    """Bytes that a model needs for `rows` prompts of `tokens` tokens.

    weights: counted exactly. cache: keys and values of every layer. training: what backward needs
    beside the weights with checkpointing, roughly: the input of every layer, and within the one
    that is recomputed its queries, keys, values, attention output, three states and, of the gated
    feed-forward, four of its width; then float32 logits and their gradient for 64 answer tokens a
    row. Not in it: the vision encoder's own working memory, the selector.
    """
    text = config.text_config
    size = torch.finfo(dtype).bits // 8
    layers, width, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or width // heads
    keys = 2 * text.num_key_value_heads * head_width
    recomputed = 5 * width + keys + 4 * text.intermediate_size
    logits = 64 * text.vocab_size * 2 * 4
    return {"weights": weight_bytes(config, dtype),
            "cache": rows * tokens * layers * keys * size,
            "training": rows * (tokens * (layers * width + recomputed) * size + logits)}


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=list(SHAPES), help="the backbone")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--shrink", action="store_true",
                        help="3 narrow layers instead of the true sizes: a smoke test")
    parser.add_argument("--layers", type=int, default=0,
                        help="of the language model, to time it on a small machine; 0: all")
    options = parser.parse_args(args)
    write(options.name, options.folder, options.shrink, options.layers)
    need = memory(config(options.name, options.shrink, options.layers))
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in need.items())
    print(f"{options.folder}: {options.name} without weights, {need['weights'] / 2e6:,.2f} M "
          f"parameters; GiB in bfloat16, for one row of 640 tokens: {parts}\n"
          "Load it with random_weights=True: its answers are meaningless.")


if __name__ == "__main__":
    runs.command(main)
