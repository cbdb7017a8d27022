"""What a checkpoint brings along, and what it may lack: protocol, chat template, weights, marks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import VIDEO, llava, llava_next

from backbones.checkpoints import most_positions
from common import FrozenVLM

# ------------------------------------------------------------------------- what the papers do


SENTENCE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
# LLaVA's on the hub: pictures first, a blank behind every text, no mark behind an answer
HUB_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def hub_llava(folder, make=llava, **how):
    """A tiny LLaVA with the template of the hub's."""
    path = make(folder, tokens="metaspace")
    Path(path, "chat_template.jinja").write_text(HUB_TEMPLATE)
    return FrozenVLM.from_pretrained(path, torch.float64, **how)


def test_the_papers_protocol_is_vicunas_frame_and_square_pictures(tmp_path):
    papers, stock = (
        hub_llava(tmp_path / name, protocol=name) for name in ("papers", "stock")
    )
    turns = [("what ?\nAnswer.", "red"), ("how many ?", None)]
    text, spans = papers._dialogue(turns, False, 1)
    assert text == (
        f"{SENTENCE}USER: <image>\nwhat ?\nAnswer. ASSISTANT: red</s>USER: how many ? ASSISTANT:"
    )
    assert [text[start:end] for start, end in spans] == [" red</s>"]
    # the mark is ours: the blank that the hub's template puts behind an answer is left out
    text, spans = stock._dialogue(turns, False, 1)
    assert text == "USER: <image>\nwhat ?\nAnswer. ASSISTANT: red</s>USER: how many ? ASSISTANT:"
    assert [text[start:end] for start, end in spans] == [" red</s>"]
    assert (papers.protocol, stock.protocol) == ("papers", "stock")

    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 24, 3), dtype=np.uint8))
    padded = Image.new("RGB", (24, 24), papers.colour)
    padded.paste(wide, (0, 6))
    asked = [[("what ?", None)]]
    for pixels in (papers.pictures([wide]), papers.batch([wide], asked)):
        assert torch.equal(pixels["pixel_values"], stock.pictures([padded])["pixel_values"])
    assert not torch.equal(pixels["pixel_values"], stock.pictures([wide])["pixel_values"])
    assert papers.colour == (122, 116, 104)


def test_where_the_papers_change_nothing_the_two_protocols_are_one(path, family):
    one, other = (FrozenVLM.from_pretrained(path, protocol=name) for name in ("papers", "stock"))
    assert other.protocol == "stock"
    assert one.protocol == ("papers" if family == "llava" else "stock")
    assert one.processor.chat_template == other.processor.chat_template
    assert (one.colour is not None) == (family == "llava")
    with pytest.raises(ValueError, match="protocol='vicuna': expected papers or stock"):
        FrozenVLM.from_pretrained(path, protocol="vicuna")


def test_llava_next_gets_the_frame_but_no_square(tmp_path):
    vlm = hub_llava(tmp_path, llava_next)
    assert vlm.protocol == "papers" and vlm.colour is None
    assert vlm._dialogue([("what ?", None)], False, 1)[0].startswith(f"{SENTENCE}USER: <image>\n")


TURNS = [("what ?", "red"), ("how many ?", "two circle"), ("where ?", "red")]
TEMPLATES = {
    # what a generation prompt says another way than an earlier turn, as LLaVA-OneVision's
    "opens earlier turns otherwise": (
        "{% for m in messages %}<|im_start|>{{ m['role'] + ' ' }}\n{{ m['content'][-1]['text'] }}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["red<|im_end|>", "two circle<|im_end|>", "red<|im_end|>"],
    ),
    # what thinks aloud, in the last turn alone; the generation prompt leaves that to the model
    "adds to the last turn": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'][-1]['text'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["red<|im_end|>", "two circle<|im_end|>", "<think></think>red<|im_end|>"],
    ),
    # Vicuna's: the model itself says the blank in front of an answer
    "leaves a blank open": (
        "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
        "{{ m['content'][-1]['text'] + ('</s>' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        [" red</s>", " two circle</s>", " red</s>"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_found_in_any_sane_template(tmp_path, name):
    template, expected = TEMPLATES[name]
    path = llava(tmp_path, tokens="metaspace")
    Path(path, "chat_template.jinja").write_text(template)
    vlm = FrozenVLM.from_pretrained(path, protocol="stock")
    text, spans = vlm._dialogue(TURNS, False, 1)
    assert [text[start:end] for start, end in spans] == expected
    for n in range(1, 4):
        # the last answer stands right behind the prompt that asks for it
        asked, _ = vlm._dialogue([*TURNS[: n - 1], (TURNS[n - 1][0], None)], False, 1)
        told, spans = vlm._dialogue(TURNS[:n], False, 1)
        assert told.startswith(asked) and len(spans) == n
        assert told[len(asked) :].rstrip() == told[slice(*spans[-1])]


def test_a_template_that_leaves_an_answer_out_is_refused(tmp_path):
    path = llava(tmp_path)
    Path(path, "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}user : {{ m['content'][-1]['text'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
    )
    with pytest.raises(ValueError, match="leaves out an answer"):
        FrozenVLM.from_pretrained(path)._dialogue(TURNS, False, 1)


# ------------------------------------------------------------------------- what a checkpoint lacks


def without(path, prefix):
    """Take the weights of these names out of a checkpoint."""
    file = Path(path, "model.safetensors")
    kept = {name: x for name, x in load_file(file).items() if prefix not in name}
    save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["vision_tower", "layers.1.mlp", "projector"])
def test_a_checkpoint_without_some_weights_is_refused(tmp_path, prefix):
    path = llava(tmp_path)
    without(path, prefix)
    with pytest.raises(ValueError, match=f"lacks [0-9]+ of its weights, such as .*{prefix}"):
        FrozenVLM.from_pretrained(path)


def test_an_answer_ends_without_generation_settings_too(path, family):
    """With the mark that the chat template, or we, put behind an answer."""
    mended = FrozenVLM.from_pretrained(path, torch.float64)
    before = mended.ends().tolist()
    copied = Path(path).parent / f"{family}-unsettled"
    shutil.copytree(path, copied)
    Path(copied, "generation_config.json").unlink()
    config = json.loads(Path(copied, "config.json").read_text())
    config["text_config"]["eos_token_id"] = None
    Path(copied, "config.json").write_text(json.dumps(config))
    mended = FrozenVLM.from_pretrained(copied, torch.float64)
    assert mended.ends().tolist() == before == [mended.tokenizer.eos_token_id]


def test_pictures_need_no_language_model(path, vlm, family):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    pictures = [[image, image]] if family in VIDEO else [image]
    blind = FrozenVLM.from_pretrained(path, torch.float64, language=False)
    assert blind.lm is None and blind.fingerprint() == vlm.fingerprint()
    read = vlm.encode(vlm.pictures(pictures))
    assert torch.equal(blind.encode(blind.pictures(pictures)).feats, read.feats)
    assert not any("language" in name or "lm_head" in name for name, _ in blind.named_parameters())
    shapes = FrozenVLM.from_pretrained(path, device="meta")
    assert shapes.fingerprint() == vlm.fingerprint()


@pytest.mark.parametrize(
    "rope, limit",
    [
        (None, 512),
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_a_scaled_rotary_embedding_has_more_positions(rope, limit):
    config = SimpleNamespace(max_position_embeddings=512, rope_parameters=rope)
    assert most_positions(config) == limit


def test_where_attention_slides_no_prompt_is_longer_than_its_window(tmp_path):
    """Behind it a pruned prompt would see what the whole one no longer does."""
    kinds = [(None, None, 512), (64, None, 64), (64, ["full_attention"] * 2, 512),
             (64, ["full_attention", "sliding_attention"], 64), (4096, None, 512)]
    for window, layers, limit in kinds:
        config = SimpleNamespace(max_position_embeddings=512, sliding_window=window,
                                 layer_types=layers)
        assert most_positions(config) == limit
    path = llava_next(tmp_path)
    config = json.loads(Path(path, "config.json").read_text())
    config["text_config"]["sliding_window"] = 24
    Path(path, "config.json").write_text(json.dumps(config))
    vlm = FrozenVLM.from_pretrained(path)
    with pytest.raises(ValueError, match="expected at most 24, the language model's positions or"):
        vlm.batch([Image.new("RGB", (24, 24))], [[("what ?", None)]])
