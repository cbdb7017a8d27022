"""What backbones/README.md promises: a family is one file, and serves no checkpoint of another."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import MODELS, llava
from transformers import AutoModelForImageTextToText

import backbones
import baselines
from baselines.encoder import encode
from common import Adapter, FrozenVLM, LlavaAdapter, find_adapter

README = Path(backbones.__file__).with_name("README.md")
EXACT = dict(rtol=0, atol=1e-10)
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=32,
              num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4,
              vision_use_head=False)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return llava(tmp_path_factory.mktemp("siglip"), vision_config=SIGLIP, vision_feature_layer=-2,
                 vision_feature_select_strategy="full")


@pytest.fixture
def written_down(tmp_path, monkeypatch):
    """The README's code as one more file of backbones/: nothing else is changed."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(code.splitlines()) < 25
    (tmp_path / "siglip_llava.py").write_text(code)
    known = list(Adapter.known)
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    Adapter.known[:] = known
    sys.modules.pop("backbones.siglip_llava", None)
    vars(backbones).pop("siglip_llava", None)


def check_exact(path) -> FrozenVLM:
    """All kept is the stock model; pruned is the full prompt in which the mask hides the rest."""
    vlm = FrozenVLM.from_pretrained(path, torch.float64)
    pictures = [Image.effect_noise((40, 24), 90)] * 2
    batch = vlm.batch(pictures, [[("what colour ?", None)], [("how many red ?", None)]])
    units = vlm.encode(batch)
    mask = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    visual = batch["input_ids"] == vlm.image_id
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        expected = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                         pixel_values=batch["pixel_values"], position_ids=positions).logits
        ours = vlm.logits(vlm.embed(batch, units))
    torch.testing.assert_close(ours[mask], expected[mask], **EXACT)

    keep = [torch.tensor([0, 3, 17, 35]), torch.tensor([8])]
    kept = torch.zeros(2, 36, dtype=torch.bool)
    for row, index in zip(kept, keep):
        row[index] = True
    sees = mask.masked_scatter(visual, kept.flatten())
    with torch.no_grad():
        hidden = stock(input_ids=batch["input_ids"], attention_mask=sees.long(),
                       pixel_values=batch["pixel_values"], position_ids=positions).logits
        prompt = vlm.prune(batch, units, keep)
        pruned = vlm.logits(prompt)
    torch.testing.assert_close(pruned[prompt.mask.bool()], hidden[sees], **EXACT)
    assert (hidden - expected)[sees].abs().max() > 1e-3
    return vlm


def test_without_the_file_no_family_serves_it(siglip):
    with pytest.raises(ValueError, match="the vision tower 'siglip_vision_model' is served by none "
                                         "of the families: expected one of llava, qwen2_5_vl"):
        FrozenVLM.from_pretrained(siglip, torch.float64)


def test_the_readmes_file_serves_its_family_and_leaves_the_others(siglip, written_down, tmp_path):
    vlm = check_exact(siglip)
    assert type(vlm.adapter).__name__ == "SiglipLlavaAdapter"
    assert type(vlm.adapter).__module__ == "backbones.siglip_llava"
    assert type(check_exact(llava(tmp_path / "clip")).adapter) is LlavaAdapter


def test_rivals_serve_the_new_family_or_say_why_not(siglip, written_down):
    """It has fold(), so that what its encoder attends to can be read; no [CLS], and not CLIP."""
    vlm = FrozenVLM.from_pretrained(siglip, torch.float64)
    batch = vlm.pictures([Image.effect_noise((40, 24), 90)])
    refused = {}
    for name in baselines.names():
        try:
            way = baselines.way(name, vlm)
        except ValueError as error:
            refused[name] = str(error)
            continue
        units = encode(vlm, batch, way.needs)
        assert {*units.readings} == {*way.needs}
    assert refused == {
        "cdpruner": "the vision encoder is a 'siglip_vision_model', to whose pictures there is no "
                    "text tower: expected CLIP's; cdpruner_words does without",
        "cls_attention": "this vision encoder has no [CLS] token, whose attention is all that "
                         "cls_attention goes by",
        "tome": "tome merges inside the vision encoder, but SiglipLlavaAdapter is not of LLaVA's "
                "kind: expected the blocks of CLIP"}


def test_two_files_for_one_checkpoint_are_refused(siglip, written_down):
    config = AutoModelForImageTextToText.from_pretrained(siglip).config
    first = find_adapter(config)

    class Second(first):
        pass
    with pytest.raises(ValueError, match="served by SiglipLlavaAdapter and Second: expected"):
        find_adapter(config)


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_has_one_family(name, tmp_path):
    path = MODELS[name](tmp_path)
    vlm = FrozenVLM.from_pretrained(path)
    serving = [family for family in Adapter.known if family.matches(vlm.model.config)]
    assert serving == [type(vlm.adapter)]


@pytest.mark.parametrize("name, change, message", [
    ("llava", dict(vision_feature_layer=9), "vision_feature_layer=9: expected one of the 3 layers"),
    ("llava_next", dict(vision_feature_select_strategy="full"), "'full': expected 'default'"),
    ("llava_next_video", dict(vision_feature_layer=[-2, -1]), "expected one of the 3 layers"),
    ("internvl", dict(vision_feature_layer=[1, 2]), "InternVL with vision_feature_layer=.1, 2., "),
    ("internvl", dict(vision_feature_select_strategy="full"), "'full': expected one layer, and 'd"),
    ("llava_onevision", dict(vision_feature_layer=[1]), "OneVision with vision_feature_layer=.1."),
    ("llava_onevision", dict(vision_feature_select_strategy="default"), "expected one layer, and"),
])
def test_checkpoints_that_would_be_served_wrongly_are_refused(name, change, message, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(MODELS[name](tmp_path))
    family = find_adapter(model.config)
    family(model)
    for option, value in change.items():
        setattr(model.config, option, value)
    with pytest.raises(ValueError, match=message):
        family(model)


def test_rows_of_a_video_batch_have_as_many_frames(tmp_path):
    vlm = FrozenVLM.from_pretrained(MODELS["llava_next_video"](tmp_path))
    frame = Image.new("RGB", (24, 24))
    with pytest.raises(ValueError, match=r"the rows have \[1, 2\] frames: expected as many "
                                         "in each"):
        vlm.pictures([[frame], [frame, frame]])
