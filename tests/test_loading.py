"""What is loaded, told apart by its fingerprint, and refused."""

import pytest
import torch
from full_prompt import TOLERANCE, rows_for, stock_features
from PIL import Image
from tiny_models import (
    CLIP,
    MODELS,
    NATIVE,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
)
from transformers import AutoModelForImageTextToText

from common import FrozenVLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layer", [-1, -3, 1, 3])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in NATIVE])
def test_any_feature_layer_will_do(name, layer, tmp_path, images):
    path = MODELS[name](tmp_path, vision_feature_layer=layer)
    vlm = FrozenVLM.from_pretrained(path, dtype=torch.float64)
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    batch = vlm.batch(rows_for(name, images[:1]), [[("how many ?", None)]])
    prompt = vlm.embed(batch, vlm.encode(batch))
    torch.testing.assert_close(
        prompt.embeds[prompt.is_visual], stock_features(stock, batch), **TOLERANCE
    )


def test_a_cpu_gets_float32_unless_told_otherwise():
    assert FrozenVLM.from_pretrained("tiny/llava").dtype == torch.float32
    assert FrozenVLM.from_pretrained("tiny/llava", device="meta").dtype == torch.bfloat16
    assert FrozenVLM.from_pretrained("tiny/llava", torch.bfloat16).dtype == torch.bfloat16


def test_llava_and_llava_next_share_the_vision_half_of_the_fingerprint(tmp_path):
    one, two = (
        FrozenVLM.from_pretrained(make(tmp_path / make.__name__, **how)).fingerprint()
        for make, how in ((llava, dict(vision_config=CLIP | dict(image_size=16))), (llava_next, {}))
    )
    assert {key for key in one if one[key] != two[key]} == {"model_type"}


def test_fingerprint_tells_backbones_apart(vlm, path, tmp_path):
    assert vlm.fingerprint() == FrozenVLM.from_pretrained(path).fingerprint()
    other = FrozenVLM.from_pretrained(llava(tmp_path, vision_feature_layer=-1))
    assert vlm.fingerprint() != other.fingerprint()
    assert all(isinstance(value, (str, int)) for value in vlm.fingerprint().values())


def test_a_missing_or_foreign_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no checkpoint at '.*nowhere': expected a folder"):
        FrozenVLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "gpt99"}')
    with pytest.raises(ValueError, match="model_type 'gpt99', which transformers does not know"):
        FrozenVLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        ValueError, match="'gpt2' .*expected one of llava, .*one file in backbones/"
    ):
        FrozenVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make, strategy",
    [
        (llava, "full"),
        (llava_next, "full"),
        (internvl, "full"),
        (llava_next_video, "full"),
        (llava_onevision, "default"),
    ],
)
def test_a_tower_without_a_grid_of_units_is_refused(make, strategy, tmp_path):
    with pytest.raises(ValueError, match=f"strategy '{strategy}': expected"):
        FrozenVLM.from_pretrained(make(tmp_path, vision_feature_select_strategy=strategy))


def test_checkpointing_refuses_dropout(vlm):
    vlm.lm.layers[1].self_attn.attention_dropout = 0.1
    try:
        with pytest.raises(ValueError, match="layers.1.self_attn has dropout"):
            vlm.checkpointing(True)
    finally:
        vlm.lm.layers[1].self_attn.attention_dropout = 0.0
    assert not vlm.lm.training


def test_the_features_of_half_precision_overflow_in_no_silence(tmp_path):
    """A real one: a layer norm that scales up to what float16 has no number for."""
    path = llava(tmp_path)
    vlm = FrozenVLM.from_pretrained(path, torch.float16)
    vlm.adapter.model.vision_tower.encoder.layers[1].layer_norm2.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match="row 0 .*: choose a dtype of more range, bfloat16"):
        vlm.encode(vlm.pictures([Image.effect_noise((24, 24), 90)]))


@pytest.mark.parametrize("family", ["llava", "qwen"], indirect=True)
@pytest.mark.parametrize("name, value", [("repetition_penalty", 0.01), ("repetition_penalty", 9.0),
                                         ("num_beams", 4), ("do_sample", True)])
def test_generation_settings_of_the_checkpoint_change_no_answer(vlm, asked, name, value):
    """Penalties, beams and sampling stand in many a generation_config.json: answers are greedy."""
    prompt, settings = vlm.embed(asked, vlm.encode(asked)), vlm.model.generation_config
    answers, before = vlm.generate(prompt, 8), getattr(settings, name)
    setattr(settings, name, value)
    try:
        assert vlm.generate(prompt, 8) == answers
    finally:
        setattr(settings, name, before)
