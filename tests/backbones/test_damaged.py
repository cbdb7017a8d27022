"""A checkpoint that was copied or downloaded in part: one line names the file and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS

from common import FrozenVLM
from measure import shapes

pytestmark = pytest.mark.usefixtures("one_thread")

DAMAGES = {
    "cut short": lambda content: content[:len(content) // 2],
    "of zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "a page": lambda content: b"<html>404</html>",
    "a pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
}


def refused(path) -> str:
    """What is said, in one line; nothing but these would be printed without a traceback."""
    with pytest.raises((ValueError, OSError)) as caught:
        FrozenVLM.from_pretrained(path, torch.float32)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.fixture(scope="module", params=list(shapes.SHAPES))
def layout(request, tmp_path_factory):
    """The files of the hub's checkpoints, every family's."""
    folder = tmp_path_factory.mktemp("hub") / request.param
    return Path(shapes.write(request.param, folder, shrink=True, weights=True))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(layout, tmp_path, damage):
    for file in layout.iterdir():
        copy = tmp_path / layout.name
        shutil.copytree(layout, copy)
        broken = copy / file.name
        broken.write_bytes(DAMAGES[damage](file.read_bytes()))
        said = refused(copy)
        if file.suffix == ".jinja":                     # any text may be one
            assert str(copy) in said and ("cannot be read" in said or "chat template" in said)
        else:
            assert f"{broken} is damaged (" in said and "download or copy it again" in said
        shutil.rmtree(copy)


@pytest.mark.parametrize("name, said", [
    ("config", "has no config.json"), ("tokenizer", "cannot be read"),
    ("tokenizer_config", "lacks .*tokenizer_config.json"), ("chat_template", "chat template"),
    ("preprocessor_config", "preprocessor_config.json"), ("model", "model.safetensors")])
def test_a_missing_file_is_named(layout, tmp_path, name, said):
    copy = tmp_path / layout.name
    shutil.copytree(layout, copy)
    for file in copy.glob(f"{name}.*"):
        file.unlink()
    with pytest.raises((ValueError, OSError), match=said) as caught:
        FrozenVLM.from_pretrained(copy, torch.float32)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["config", "preprocessor_config", "tokenizer", "tokenizer_config"])
def test_settings_that_hold_nothing_are_refused(layout, tmp_path, name):
    copy = tmp_path / layout.name
    shutil.copytree(layout, copy)
    (copy / f"{name}.json").write_text("{}")
    assert f"{name}.json is damaged (" in refused(copy)


def test_llava_without_its_processors_settings_is_refused(layout, tmp_path):
    copy = tmp_path / layout.name
    shutil.copytree(layout, copy)
    (copy / "processor_config.json").unlink(missing_ok=True)
    if layout.name in ("llava-1.5-7b", "llava-next-vicuna-7b"):
        assert "lacks a patch_size (processor_config.json)" in refused(copy)
    else:
        FrozenVLM.from_pretrained(copy, torch.float32)


def test_weights_in_shards_are_all_there_and_of_the_configs_shapes(path, family, tmp_path):
    copy = tmp_path / family
    shutil.copytree(path, copy)
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, copy / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f for f, part in parts.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = FrozenVLM.from_pretrained(copy, torch.float64)
    expected = FrozenVLM.from_pretrained(path, torch.float64)
    for mine, its in zip(whole.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, its)

    second = copy / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    assert f"{second} is damaged (" in refused(copy)
    second.unlink()
    assert f"{second} is missing, and model.safetensors.index.json names it" in refused(copy)
    second.write_bytes(content)

    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    if "layer_types" in config["text_config"]:
        config["text_config"]["layer_types"] += config["text_config"]["layer_types"][:1]
    (copy / "config.json").write_text(json.dumps(config))
    said = refused(copy)
    assert "of its weights, such as" in said and "layers.3" in said
    config["text_config"]["intermediate_size"] *= 2
    (copy / "config.json").write_text(json.dumps(config))
    assert f"{str(copy)!r} cannot be read" in refused(copy)


def test_a_template_that_says_nothing_is_refused(tmp_path):
    path = Path(MODELS["qwen"](tmp_path))
    (path / "chat_template.jinja").write_text("not found")
    assert "lacks a chat template that writes what is said" in refused(path)
