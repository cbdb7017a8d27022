"""Tiny random checkpoints of the real classes of every family, on disk, for
FrozenVLM.from_pretrained().

The weights are scaled up on purpose: at the usual initialisation a random model says the same
whatever it is given, so a wrong position or mask would hide below any tolerance. Here it moves a
logit by about 1.

Seeds other than 0: with 0 the model would say too much of the same for a test of where answers
stop.
"""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from backbones import ImageOnlyProcessor
from common import ImageOnlyQwenProcessor
from measure import shapes

WORDS = (
    "what colour is the shape how many are there red green blue one two three circle square "
    "left of ? yes no "
    "user assistant :"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# LLaVA-1.5's own template, but for case: it writes no end after an answer
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n"
    "{% endif %}{% endfor %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)
# Qwen's own template without its system prompt
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_MARKS = dict(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    vision_bos_token="<|vision_start|>",
    vision_eos_token="<|vision_end|>",
    turn_token="<|im_start|>",
    end_token="<|im_end|>",
)

# InternVL's: the image token alone, its processor puts <img> and </img> around it
INTERNVL_TEMPLATE = QWEN_TEMPLATE.replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"
)
CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    patch_size=4,
    projection_dim=16,
)


def _tokenizer(marks: dict[str, str], eos: str, kind: str) -> PreTrainedTokenizerFast:
    """kind: one token per word, or the subword scheme of Llama ("metaspace") or of Qwen
    ("bytes")."""
    special = SPECIAL + list(marks.values())
    if kind == "words":
        words = special + WORDS.split()
        core = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        )
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
        if kind == "metaspace":
            core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            letters = list(string.printable.strip())
        else:
            core.pre_tokenizer, core.decoder = (
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                decoders.ByteLevel(),
            )
            letters = pre_tokenizers.ByteLevel.alphabet()
        core.train_from_iterator(
            [WORDS],
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=special,
                initial_alphabet=letters,
                show_progress=False,
            ),
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        extra_special_tokens=marks,
    )


def _save(model, processor, folder, seed: int) -> str:
    """Random weights of a size that makes every token matter, then a checkpoint like any other."""
    shapes.scatter(model, seed)
    model.double().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def llava(folder, seed: int = 0, tokens: str = "words", **config) -> str:
    """24-pixel pictures, 4-pixel patches: 6x6 units of width 16. Keywords override the
    LlavaConfig."""
    tokenizer = _tokenizer(dict(image_token="<image>"), "</s>", tokens)
    config = LlavaConfig(
        **{
            **dict(
                vision_config=CLIP | dict(image_size=24),
                text_config=dict(TEXT, model_type="llama", vocab_size=len(tokenizer)),
                image_token_index=tokenizer.image_token_id,
                vision_feature_layer=-2,
            ),
            **config,
        }
    )
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(LlavaForConditionalGeneration(config), processor, folder, seed)


def _qwen_marks(tokenizer) -> dict:
    return dict(
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )


def _qwen_processor(tokenizer) -> ImageOnlyQwenProcessor:
    images = Qwen2VLImageProcessor(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 80 * 80},
    )
    return ImageOnlyQwenProcessor(images, tokenizer, chat_template=QWEN_TEMPLATE)


def qwen(folder, seed: int = 0, tokens: str = "words") -> str:
    """Native resolution, 4-pixel patches in 2x2 units of width (4, 16), windows of 2x2 units."""
    tokenizer = _tokenizer(QWEN_MARKS, "<|im_end|>", tokens)
    vision = dict(
        depth=3,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=16,
        fullatt_block_indexes=[1],
        out_hidden_size=32,
    )
    text = dict(
        TEXT,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]),
    )
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        **_qwen_marks(tokenizer),
    )
    processor = _qwen_processor(tokenizer)
    return _save(Qwen2_5_VLForConditionalGeneration(config), processor, folder, seed)


def qwen3(folder, seed: int = 0, tokens: str = "words", experts: int = 0, **vision) -> str:
    """Native resolution, 4-pixel patches in 2x2 units of width (4 * 3, 16): after the last of four
    blocks, the first and the third. experts: of a mixture, two for each token. Keywords override
    the vision config."""
    tokenizer = _tokenizer(QWEN_MARKS, "<|im_end|>", tokens)
    vision = dict(
        depth=4,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 2],
        out_hidden_size=32,
    ) | vision
    text = dict(
        TEXT,
        head_dim=8,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], mrope_interleaved=True
        ),
    )
    config_class, model_class = Qwen3VLConfig, Qwen3VLForConditionalGeneration
    if experts:
        config_class, model_class = Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
        text |= dict(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=16)
    config = config_class(
        vision_config=vision,
        text_config=text,
        **_qwen_marks(tokenizer),
    )
    processor = _qwen_processor(tokenizer)
    return _save(model_class(config), processor, folder, seed)


def llava_next(folder, seed: int = 3, tokens: str = "words", **config) -> str:
    """Whole picture and 2 or 3 crops of 16 pixels, 4x4 units each; Mistral's decoder. Keywords
    override the config."""
    tokenizer, grids = _tokenizer(dict(image_token="<image>"), "</s>", tokens), [[16, 32], [48, 16]]
    text = dict(TEXT, model_type="mistral", vocab_size=len(tokenizer), sliding_window=None)
    config = LlavaNextConfig(
        **{
            **dict(
                vision_config=CLIP | dict(image_size=16),
                text_config=text,
                image_token_index=tokenizer.image_token_id,
                image_grid_pinpoints=grids,
            ),
            **config,
        }
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=grids,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(LlavaNextForConditionalGeneration(config), processor, folder, seed)


def internvl(folder, seed: int = 0, tokens: str = "words", **config) -> str:
    """Up to 4 tiles of 24 pixels and the whole picture, 3x3 units of 2x2 patches each; Qwen2's
    decoder."""
    marks = dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
        turn_token="<|im_start|>",
        end_token="<|im_end|>",
    )
    tokenizer = _tokenizer(marks, "<|im_end|>", tokens)
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=[4, 4],
        image_size=[24, 24],
        layer_scale_init_value=1.0,
    )
    text = dict(
        TEXT, model_type="qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    config = InternVLConfig(
        **{
            **dict(
                vision_config=vision,
                text_config=text,
                image_token_id=tokenizer.context_image_token_id,
                image_seq_length=9,
                tie_word_embeddings=False,
            ),
            **config,
        }
    )
    images = GotOcr2ImageProcessor(size={"height": 24, "width": 24}, max_patches=4)
    processor = ImageOnlyProcessor(images, tokenizer, chat_template=INTERNVL_TEMPLATE)
    return _save(InternVLForConditionalGeneration(config), processor, folder, seed)


def llava_next_video(folder, seed: int = 0, tokens: str = "words", **config) -> str:
    """Frames of 24 pixels, 6x6 patches pooled to 3x3 units of width 16; Llama's decoder."""
    tokenizer = _tokenizer(dict(image_token="<image>", video_token="<video>"), "</s>", tokens)
    text = dict(TEXT, model_type="llama", vocab_size=len(tokenizer))
    config = LlavaNextVideoConfig(
        **{
            **dict(
                vision_config=CLIP | dict(image_size=24),
                text_config=text,
                image_token_index=tokenizer.image_token_id,
                video_token_index=tokenizer.video_token_id,
            ),
            **config,
        }
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    template = LLAVA_TEMPLATE.replace("'image'", "'video'").replace("<image>", "<video>")
    processor = ImageOnlyProcessor(images, tokenizer, chat_template=template)
    return _save(LlavaNextVideoForConditionalGeneration(config), processor, folder, seed)


def llava_onevision(folder, seed: int = 2, tokens: str = "words", **config) -> str:
    """Frames of 20 pixels, 5x5 patches mixed to 3x3 units; SigLIP, Qwen2's decoder."""
    marks = dict(
        image_token="<image>",
        video_token="<video>",
        turn_token="<|im_start|>",
        end_token="<|im_end|>",
    )
    tokenizer = _tokenizer(marks, "<|im_end|>", tokens)
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=4,
        image_size=20,
        vision_use_head=False,
    )
    text = dict(
        TEXT, model_type="qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    config = LlavaOnevisionConfig(
        **{
            **dict(
                vision_config=vision,
                text_config=text,
                image_token_index=tokenizer.image_token_id,
                video_token_index=tokenizer.video_token_id,
            ),
            **config,
        }
    )
    images = LlavaOnevisionImageProcessor(size={"height": 20, "width": 20})
    # its own: an earlier answer opens with a blank and a line break, the last one with a break
    template = shapes.ONEVISION_TEMPLATE
    processor = ImageOnlyProcessor(images, tokenizer, chat_template=template)
    return _save(LlavaOnevisionForConditionalGeneration(config), processor, folder, seed)


MODELS = {
    "llava": llava,
    "qwen": qwen,
    "qwen3": qwen3,
    "llava_next": llava_next,
    "internvl": internvl,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
}
VIDEO = ("llava_next_video", "llava_onevision")  # a row of these is a list of frames
NATIVE = ("qwen", "qwen3")  # pictures of any shape, positions along three axes
