"""Checkpoint folders of the real backbones' layout, without their weights.

    python -m measure.shapes llava-1.5-7b FOLDER

A folder holds the hub's files as transformers reads them: config.json with the true sizes, settings
of generation, image processor and processor, and the chat template, letter by letter.
FrozenVLM.from_pretrained(FOLDER, random_weights=True) makes a model of it that takes the time and
the memory of the downloaded one and answers nonsense; no network is needed. With --weights random
ones lie beside it, so that the folder is a checkpoint like any other.

Source: the repositories on the hub (NAMES), as their pages and the sizes of their files show them,
and the scripts of transformers that converted them. Not checked against the hub: what
LLaVA-OneVision and InternVL3 do to pixels (as in their scripts), LLaVA-OneVision's vocabulary (by
its script Qwen2's 152,064 rows and two, padded to a multiple of 64), and Qwen3-VL's files, which
are as others quote them; of its chat template what is about tools is left out.

What is not real: the tokenizer. It spells any text in bytes but knows as one token only what the
tiny world says, so other text is about four times as long as with the real vocabulary, and the ids
of the special tokens are its own. The embedding has the true number of rows all the same. Left
out: files that slow tokenizers read, and settings for videos where transformers knows them.
"""

import copy
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

import runs
from backbones.checkpoints import blank_model, weight_bytes
from common import FrozenVLM
from tiny import scenes

NAMES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
         "llava-next-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
         "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
         "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
         "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
         "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
         "llava-next-video-7b": "llava-hf/LLaVA-NeXT-Video-7B-hf"}

# ------------------------------------------------------------------------ config.json
# the name of a special token stands for its id

CLIP = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
            num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=336,
            projection_dim=768, vocab_size=32000)
INTERNVIT = dict(model_type="internvl_vision", hidden_size=1024, intermediate_size=4096,
                 num_hidden_layers=24, num_attention_heads=16, patch_size=[14, 14],
                 image_size=[448, 448], attention_bias=True, layer_scale_init_value=.1)
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
              num_hidden_layers=26, num_attention_heads=16, patch_size=14, image_size=384,
              vision_use_head=False)
QWEN_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3,
                   patch_size=14, window_size=112, spatial_merge_size=2, spatial_patch_size=14,
                   temporal_patch_size=2, tokens_per_second=2,
                   fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=3584)
QWEN3_VISION = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, in_channels=3,
                    hidden_act="gelu_pytorch_tanh", patch_size=16, spatial_merge_size=2,
                    temporal_patch_size=2, num_position_embeddings=2304, out_hidden_size=4096,
                    deepstack_visual_indexes=[8, 16, 24], model_type="qwen3_vl")
# what LlamaConfig takes for granted is not in the hub's files either, such as 32 layers
VICUNA = dict(model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5,
              torch_dtype="float16", vocab_size=32064)
QWEN = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
            rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False, torch_dtype="bfloat16",
            bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>")
QWEN3 = dict(model_type="qwen3_vl_text", hidden_size=4096, intermediate_size=12288,
             num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
             max_position_embeddings=262144, rms_norm_eps=1e-6, rope_theta=5e6, vocab_size=151936,
             rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20],
                               rope_type="default"),
             dtype="bfloat16", bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>")
LLAVA = dict(projector_hidden_act="gelu", vision_feature_layer=-2,
             vision_feature_select_strategy="default", image_token_index="<image>",
             tie_word_embeddings=False)
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_GRIDS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SHAPES = {
    "llava-1.5-7b": LLAVA | dict(
        model_type="llava", architectures=["LlavaForConditionalGeneration"],
        pad_token_id="<pad>", torch_dtype="float16", vision_config=CLIP, text_config=VICUNA),
    "llava-next-vicuna-7b": LLAVA | dict(
        model_type="llava_next", architectures=["LlavaNextForConditionalGeneration"],
        image_grid_pinpoints=NEXT_GRIDS, use_image_newline_parameter=True, torch_dtype="float16",
        vision_config=CLIP, text_config=VICUNA | dict(pad_token_id="<unk>")),
    "qwen2.5-vl-7b": QWEN | dict(                          # as on the hub, text beside the rest
        model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"],
        max_position_embeddings=128000, vocab_size=152064, tie_word_embeddings=False,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), vision_config=QWEN_VISION,
        image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    "qwen3-vl-8b": dict(
        model_type="qwen3_vl", architectures=["Qwen3VLForConditionalGeneration"],
        tie_word_embeddings=False, vision_config=QWEN3_VISION, text_config=QWEN3,
        image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
    "internvl3-8b": dict(
        model_type="internvl", architectures=["InternVLForConditionalGeneration"],
        downsample_ratio=.5, image_seq_length=256, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_token_id="<IMG_CONTEXT>", torch_dtype="bfloat16", tie_word_embeddings=False,
        vision_config=INTERNVIT,
        text_config=QWEN | dict(model_type="qwen2", vocab_size=151674,
                                rope_scaling=dict(type="dynamic", rope_type="dynamic", factor=2.))),
    "llava-onevision-7b": LLAVA | dict(
        model_type="llava_onevision", architectures=["LlavaOnevisionForConditionalGeneration"],
        image_grid_pinpoints=ONEVISION_GRIDS, use_image_newline_parameter=True,
        vision_aspect_ratio="anyres_max_9", vision_feature_layer=-1,
        vision_feature_select_strategy="full", video_token_index="<video>",
        torch_dtype="float16", vision_config=SIGLIP,
        text_config=QWEN | dict(model_type="qwen2", vocab_size=152128)),
    "llava-next-video-7b": LLAVA | dict(
        model_type="llava_next_video", architectures=["LlavaNextVideoForConditionalGeneration"],
        image_grid_pinpoints=NEXT_GRIDS, use_image_newline_parameter=True,
        spatial_pool_mode="average", spatial_pool_stride=2, video_token_index="<video>",
        torch_dtype="bfloat16", vision_config=CLIP,
        # 2.5 on the hub, where the code it was trained with says 2
        text_config=VICUNA | dict(pad_token_id="<unk>",
                                  rope_scaling=dict(type="linear", factor=2.5)))}
SMALL_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=1024)
SMALL_VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                    num_attention_heads=2)
SMALL_QWEN_VISION = dict(hidden_size=32, intermediate_size=64, depth=3, num_heads=2,
                         fullatt_block_indexes=[1], out_hidden_size=64)
SMALL_QWEN3_VISION = dict(hidden_size=32, intermediate_size=64, depth=3, num_heads=2,
                          deepstack_visual_indexes=[0, 1], out_hidden_size=64)

# ------------------------------------------------------------------------ the other settings

VICUNA_ENDS = dict(_from_model_config=True, bos_token_id="<s>", eos_token_id="</s>",
                   pad_token_id="<unk>")
QWEN_ENDS = dict(_from_model_config=True, bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>")
GENERATION = {
    "llava-1.5-7b": VICUNA_ENDS | dict(pad_token_id="<pad>"),
    "llava-next-vicuna-7b": VICUNA_ENDS,
    "qwen2.5-vl-7b": dict(bos_token_id="<|endoftext|>", pad_token_id="<|endoftext|>",
                          do_sample=True, eos_token_id=["<|im_end|>", "<|endoftext|>"],
                          repetition_penalty=1.05, temperature=1e-6),
    "qwen3-vl-8b": dict(bos_token_id="<|endoftext|>", pad_token_id="<|endoftext|>",
                        do_sample=True, eos_token_id=["<|im_end|>", "<|endoftext|>"],
                        repetition_penalty=1.0, temperature=.7, top_k=20, top_p=.8),
    "internvl3-8b": QWEN_ENDS,
    "llava-onevision-7b": QWEN_ENDS,
    "llava-next-video-7b": VICUNA_ENDS}

OPENAI = dict(image_mean=[.48145466, .4578275, .40821073],
              image_std=[.26862954, .26130258, .27577711])
RESIZED = dict(do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True, resample=3,
               rescale_factor=1 / 255)
CLIP_IMAGES = RESIZED | OPENAI | dict(do_center_crop=True, size=dict(shortest_edge=336),
                                      crop_size=dict(height=336, width=336))
NEXT_IMAGES = CLIP_IMAGES | dict(do_pad=True, image_grid_pinpoints=NEXT_GRIDS,
                                 image_processor_type="LlavaNextImageProcessor")
IMAGES = {
    "llava-1.5-7b": CLIP_IMAGES | dict(image_processor_type="CLIPImageProcessor",
                                       processor_class="LlavaProcessor"),
    "llava-next-vicuna-7b": NEXT_IMAGES | dict(aspect_ratio_setting="anyres",
                                               processor_class="LlavaNextProcessor"),
    "qwen2.5-vl-7b": OPENAI | dict(min_pixels=3136, max_pixels=12845056, patch_size=14,
                                   temporal_patch_size=2, merge_size=2,
                                   image_processor_type="Qwen2VLImageProcessor",
                                   processor_class="Qwen2_5_VLProcessor"),
    "qwen3-vl-8b": dict(size=dict(longest_edge=16777216, shortest_edge=65536), patch_size=16,
                        temporal_patch_size=2, merge_size=2, image_mean=[.5] * 3,
                        image_std=[.5] * 3, processor_class="Qwen3VLProcessor",
                        image_processor_type="Qwen2VLImageProcessorFast"),
    "internvl3-8b": RESIZED | dict(image_mean=[.485, .456, .406], image_std=[.229, .224, .225],
                                   size=dict(height=448, width=448), crop_to_patches=False,
                                   min_patches=1, max_patches=12,
                                   image_processor_type="GotOcr2ImageProcessorFast",
                                   processor_class="InternVLProcessor"),
    "llava-onevision-7b": RESIZED | dict(image_mean=[.5] * 3, image_std=[.5] * 3, do_pad=True,
                                         size=dict(height=384, width=384),
                                         image_grid_pinpoints=ONEVISION_GRIDS,
                                         image_processor_type="LlavaOnevisionImageProcessor",
                                         processor_class="LlavaOnevisionProcessor"),
    "llava-next-video-7b": NEXT_IMAGES | dict(processor_class="LlavaNextVideoProcessor")}

PATCHES = dict(image_token="<image>", num_additional_image_tokens=1, patch_size=14,
               vision_feature_select_strategy="default")
PROCESSORS = {                                             # Qwen has no such file
    "llava-1.5-7b": PATCHES | dict(processor_class="LlavaProcessor"),
    "llava-next-vicuna-7b": PATCHES | dict(processor_class="LlavaNextProcessor"),
    "internvl3-8b": dict(image_seq_length=256, processor_class="InternVLProcessor"),
    "llava-onevision-7b": dict(image_token="<image>", video_token="<video>", num_image_tokens=729,
                               vision_feature_select_strategy="full",
                               processor_class="LlavaOnevisionProcessor"),
    "llava-next-video-7b": PATCHES | dict(video_token="<video>",
                                          processor_class="LlavaNextVideoProcessor")}

# ------------------------------------------------------------------------ chat templates


def each(kind: str, what: str) -> str:
    """The loop of a chat template over a message's contents of one kind."""
    return ("{% for content in message['content'] | selectattr('type', 'equalto', '" + kind
            + "') %}" + what + "{% endfor %}")


def texts(what: str) -> str:
    """The part of llava-hf's templates that writes the texts; it marks what the model says."""
    return ("{# Render all text next #}{% if message['role'] != 'assistant' %}"
            + each("text", what) + "{% else %}"
            + each("text", "{% generation %}" + what + "{% endgeneration %}") + "{% endif %}")


def vicuna_template(pictures: str) -> str:
    return ("{% for message in messages %}{% if message['role'] != 'system' %}"
            "{{ message['role'].upper() + ': '}}{% endif %}" + pictures
            + texts("{{ content['text'] + ' '}}")
            + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


FIRST = "{# Render all images first #}"
VICUNA_IMAGES = FIRST + each("image", "{{ '<image>\n' }}")
QWEN_SYSTEM = ("{% if loop.first and message['role'] != 'system' %}"
               "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}")
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}" + QWEN_SYSTEM
    + "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN3_TEMPLATE = QWEN_TEMPLATE.replace(QWEN_SYSTEM, "")    # of the hub's, what is not about tools
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}")
# the blank behind a role is not in the generation prompt: earlier answers have another opening
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    + FIRST + each("image", "{{ '<image>' }}")
    + "{# Render all video then #}" + each("video", "{{ '<video>' }}")
    + texts("{{ '\n' + content['text'] }}") + "{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEMPLATES = {
    "llava-1.5-7b": vicuna_template(VICUNA_IMAGES),
    "llava-next-vicuna-7b": vicuna_template(VICUNA_IMAGES),
    "qwen2.5-vl-7b": QWEN_TEMPLATE,
    "qwen3-vl-8b": QWEN3_TEMPLATE,
    "internvl3-8b": INTERNVL_TEMPLATE,
    "llava-onevision-7b": ONEVISION_TEMPLATE,
    "llava-next-video-7b": vicuna_template(
        VICUNA_IMAGES + FIRST + each("video", "{{ '<video>\n' }}"))}

# ------------------------------------------------------------------------ special tokens

VICUNA_TOKENS = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
                     extra_special_tokens=dict(image_token="<image>"))
QWEN_TOKENS = dict(pad_token="<|endoftext|>", eos_token="<|im_end|>")
CHAT = ["<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TOKENS = {
    "llava-1.5-7b": VICUNA_TOKENS | dict(pad_token="<pad>"),
    "llava-next-vicuna-7b": VICUNA_TOKENS,
    # without names, as on the hub
    "qwen2.5-vl-7b": QWEN_TOKENS | dict(extra_special_tokens=CHAT + VISION),
    "qwen3-vl-8b": QWEN_TOKENS | dict(extra_special_tokens=CHAT + VISION),
    "internvl3-8b": QWEN_TOKENS | dict(extra_special_tokens=dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>")),
    "llava-onevision-7b": QWEN_TOKENS | dict(extra_special_tokens=dict(
        image_token="<image>", video_token="<video>")),
    "llava-next-video-7b": VICUNA_TOKENS | dict(extra_special_tokens=dict(
        video_token="<video>", image_token="<image>"))}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes, merged to the words of the tiny world; see the top of this file."""
    special = TOKENS[name]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = [[word, f" {word}"] for word in scenes.vocabulary()]
    first = ["<unk>", "<s>", "</s>"] if "bos_token" in special else []
    core.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=900, special_tokens=first, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if first:                                              # Llama's begins every text
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    else:
        core.add_special_tokens(["<|endoftext|>", *CHAT])
    return PreTrainedTokenizerFast(tokenizer_object=core, **copy.deepcopy(special))


def with_ids(settings, tok: PreTrainedTokenizerFast):
    """A copy of some settings with ids in place of the special tokens' names."""
    if isinstance(settings, dict):
        return {key: with_ids(value, tok) for key, value in settings.items()}
    if isinstance(settings, list):
        return [with_ids(value, tok) for value in settings]
    return tok.convert_tokens_to_ids(settings) if settings in tok.all_special_tokens else settings


def hub_config(name: str, shrink: bool = False, layers: int = 0) -> dict:
    """What config.json holds; see config()."""
    if name not in SHAPES:
        raise ValueError(f"backbone {name!r}: expected one of {', '.join(SHAPES)}")
    values = with_ids(SHAPES[name], tokenizer(name))
    text, vision = values.get("text_config", values), values["vision_config"]
    if shrink:
        text.update(SMALL_TEXT)
        text.update({key: 16 for key in text if key == "head_dim"})
        small = SMALL_QWEN_VISION if "depth" in vision else SMALL_VISION
        vision.update(SMALL_QWEN3_VISION if "deepstack_visual_indexes" in vision else small)
        if "mrope_section" in text.get("rope_scaling", {}):
            text["rope_scaling"]["mrope_section"] = [2, 3, 3]
    if layers:
        text["num_hidden_layers"] = layers
    return values


def config(name: str, shrink: bool = False, layers: int = 0) -> PreTrainedConfig:
    """The backbone's config. Raises ValueError for a name that is not in SHAPES.

    shrink: 3 narrow layers and a small vocabulary, but pictures, patches and tokens as many as in
    the real one. layers: of the language model, its widths as they are; 0: all.
    """
    values = hub_config(name, shrink, layers)
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def scatter(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a size that makes every token matter: at the usual initialisation a random
    model says the same whatever it is given."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan = 1 if "embedding" in name or "embed_tokens" in name else weight[0].numel()
            if weight.ndim > 1 or "class_embedding" in name or "newline" in name:
                # norms and biases stay
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * fan ** -.5)


def write(name: str, folder, shrink: bool = False, layers: int = 0, weights: bool = False) -> str:
    """The checkpoint folder of a backbone; returns its path. weights: random ones beside it."""
    folder, values, tok = Path(folder), hub_config(name, shrink, layers), tokenizer(name)
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        shape = config(name, shrink, layers)
        model = blank_model(shape, shape.dtype, "cpu")
        scatter(model)
        model.save_pretrained(folder)                      # its settings are overwritten below
    tok.save_pretrained(folder)
    files = {"config": values, "generation_config": with_ids(GENERATION[name], tok),
             "preprocessor_config": IMAGES[name], "processor_config": PROCESSORS.get(name),
             "chat_template": {"chat_template": TEMPLATES[name]}}
    if name == "llava-next-video-7b":                      # its own processor, which we do without
        files["video_preprocessor_config"] = IMAGES[name] | dict(
            video_processor_type="LlavaNextVideoVideoProcessor")
    if name == "internvl3-8b":                             # the later form of this file
        runs.write_text(folder / "chat_template.jinja", files.pop("chat_template")["chat_template"])
    for file, content in files.items():
        if content:
            runs.write_text(folder / f"{file}.json", json.dumps(content, indent=2) + "\n")
    return str(folder)


def load(name: str, shrink: bool = False, layers: int = 0, **how) -> FrozenVLM:
    """The backbone with random weights; shrink, layers: as in config(); how: dtype, device and attn
    of FrozenVLM.from_pretrained(). On the device "meta" it has shapes alone, in no memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(name, Path(folder) / name, shrink, layers)
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
    parser.add_argument("--weights", action="store_true", help="random ones beside it")
    options = parser.parse_args(args)
    runs.check_options(options, layers=0)
    runs.writable(options.folder)
    write(options.name, options.folder, options.shrink, options.layers, options.weights)
    need = memory(config(options.name, options.shrink, options.layers))
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in need.items())
    with_or_without = "with random weights" if options.weights else "without weights"
    how = "as it is" if options.weights else "with random_weights=True"
    print(f"{options.folder}: the layout of {NAMES[options.name]} {with_or_without}, "
          f"{need['weights'] / 2e6:,.2f} M parameters; GiB in bfloat16, for one row of 640 tokens: "
          f"{parts}\nLoad it {how}: its answers are meaningless.")


if __name__ == "__main__":
    runs.command(main)
