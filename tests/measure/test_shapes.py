"""Real sizes without weights: shapes, random weights, memory, and what loading refuses."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from small_hub import Handler
from transformers import AutoConfig, DynamicCache

from backbones.checkpoints import weight_bytes
from common import FrozenVLM
from measure import shapes

# parameters of the published checkpoints, in G, and units of one 700x500 picture
REAL = {"llava-1.5-7b": (7.063, 576), "llava-next-vicuna-7b": (7.063, 2208),
        "qwen2.5-vl-7b": (8.292, 450), "qwen3-vl-8b": (8.767, 22 * 16),
        "internvl3-8b": (7.944, 13 * 256),
        "llava-onevision-7b": (8.031, 196), "llava-next-video-7b": (7.063, 144)}
# bytes of files as the hub lists them; some lack the line break at the end
LISTED = {
    "llava-1.5-7b": {"chat_template.json": 700, "preprocessor_config.json": 505},
    "llava-next-vicuna-7b": {"chat_template.json": 700, "preprocessor_config.json": 772},
    "qwen2.5-vl-7b": {"preprocessor_config.json": 350},
    "qwen3-vl-8b": {},
    "internvl3-8b": {"chat_template.jinja": 481, "processor_config.json": 72},
    "llava-onevision-7b": {"chat_template.json": 826, "processor_config.json": 178},
    "llava-next-video-7b": {"chat_template.json": 838, "preprocessor_config.json": 741,
                            "processor_config.json": 209}}
TURN = ("what is there ?", "a red circle")


@pytest.fixture(scope="module", params=list(REAL))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return shapes.write(name, tmp_path_factory.mktemp(name), shrink=True)


@pytest.fixture(scope="module")
def small(folder, one_thread):
    return FrozenVLM.from_pretrained(folder, torch.bfloat16, random_weights=True)


@pytest.fixture
def llava(tmp_path):
    """A folder that a test may spoil."""
    return shapes.write("llava-1.5-7b", tmp_path / "llava", shrink=True)


def picture(width: int = 700, height: int = 500) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edit(folder: str, **text) -> None:
    path = f"{folder}/config.json"
    config = json.load(open(path))
    config["text_config"] |= text
    json.dump(config, open(path, "w"))


# ------------------------------------------------------------------ shapes, random weights


def test_the_sizes_are_those_of_the_published_checkpoints(name, tmp_path):
    billions, _ = REAL[name]
    shape = AutoConfig.from_pretrained(shapes.write(name, tmp_path))
    assert weight_bytes(shape) / 2e9 == pytest.approx(billions, rel=2e-4)
    assert weight_bytes(shape, torch.float32) == 2 * weight_bytes(shape)
    assert not [*tmp_path.glob("*.safetensors")]
    vlm = FrozenVLM.from_pretrained(tmp_path, device="meta", random_weights=True)
    assert vlm.device.type == "meta" and vlm.dtype == torch.bfloat16
    assert vlm.lm.layers[0].mlp is not None


def test_files_are_as_long_as_the_hub_lists_them(name, folder):
    for file, size in LISTED[name].items():
        assert Path(folder, file).stat().st_size - size in (0, 1), file


def test_the_ends_of_an_answer_are_those_of_the_hub(name, small, tmp_path):
    """Qwen-VL alone names two; the ids are the small tokenizer's."""
    saved = json.loads(Path(shapes.write(name, tmp_path), "generation_config.json").read_text())
    two = ["<|im_end|>", "<|endoftext|>"]
    ends = {"qwen2.5-vl-7b": two, "qwen3-vl-8b": two, "internvl3-8b": "<|im_end|>",
            "llava-onevision-7b": "<|im_end|>"}.get(name, "</s>")
    assert small.tokenizer.convert_ids_to_tokens(saved["eos_token_id"]) == ends
    assert small.tokenizer.eos_token in ends
    begins = small.tokenizer("a").input_ids[0] == small.tokenizer.bos_token_id
    assert begins == (ends == "</s>"), "Vicuna's texts begin with <s>, Qwen's with nothing"


def test_a_linear_stretch_of_positions_is_read(tmp_path):
    """LLaVA-NeXT-Video's is for more than 27 frames of 144 units."""
    rope = AutoConfig.from_pretrained(
        shapes.write("llava-next-video-7b", tmp_path)).text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.5)


def test_random_weights_take_the_same_path_as_a_checkpoint(name, small):
    """Encode, prune, loss, answer: finite in bfloat16; a pruned prompt that keeps all is the full
    one."""
    batch = small.batch([picture()], [[TURN]])
    units = small.encode(batch)
    every = [here.nonzero().flatten() for here in units.pad()[1]]
    full, kept = small.embed(batch, units), small.prune(batch, units, every)
    assert len(every[0]) == REAL[name][1]
    assert small.loss(full) == small.loss(kept) and 0 < small.loss(full) < 20
    asked = small.batch([picture()], [[(TURN[0], None)]])
    pruned = small.prune(asked, units, [every[0][::9]])
    assert 0 < pruned.is_visual.sum() < full.is_visual.sum() / 4
    assert torch.isfinite(small.logits(pruned)).all()
    assert isinstance(small.generate(pruned, 2)[0], str)


def test_random_weights_are_announced_and_always_the_same(llava, capsys):
    torch.manual_seed(5)
    one = FrozenVLM.from_pretrained(llava, torch.float32, random_weights=True)
    drawn = torch.rand(1)
    shouted = f"RANDOM WEIGHTS: OF {llava} ONLY THE SHAPES ARE REAL, ITS ANSWERS MEAN NOTHING"
    assert shouted in capsys.readouterr().out
    two = FrozenVLM.from_pretrained(llava, torch.float32, random_weights=True)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    expected = torch.rand(1, generator=torch.Generator().manual_seed(5))
    assert drawn == expected, "the caller's numbers are untouched"
    assert not any(p.requires_grad for p in one.parameters()) and one.dtype == torch.float32


def test_a_saved_model_with_random_weights_is_a_checkpoint_like_any_other(llava, tmp_path):
    drawn = FrozenVLM.from_pretrained(llava, torch.float32, random_weights=True)
    drawn.model.save_pretrained(tmp_path / "saved")
    drawn.processor.save_pretrained(tmp_path / "saved")
    loaded = FrozenVLM.from_pretrained(tmp_path / "saved", torch.float32)
    batch = drawn.batch([picture()], [[TURN]])
    assert torch.equal(*(vlm.logits(vlm.embed(batch, vlm.encode(batch)))
                         for vlm in (drawn, loaded)))


def test_weights_beside_the_folder_make_every_token_matter(name, tmp_path, one_thread):
    """One unit less, another picture, another word: each moves a logit."""
    path = shapes.write(name, tmp_path, shrink=True, weights=True)
    vlm = FrozenVLM.from_pretrained(path, torch.float64)

    def logits(image, question: str, drop: int = 0):
        batch = vlm.batch([image], [[(question, None)]])
        units = vlm.encode(batch)
        keep = units.pad()[1][0].nonzero().flatten()[drop:]
        return vlm.logits(vlm.prune(batch, units, [keep]))[0, -1]
    here = logits(picture(), "what is it ?")
    for other in (logits(picture().rotate(180), "what is it ?"), logits(picture(), "what is a ?"),
                  logits(picture(), "what is it ?", drop=1)):
        assert (here - other).abs().max() > 1e-4


def test_a_shape_of_fewer_layers_is_as_wide():
    config, whole = (shapes.config("llava-1.5-7b", layers=layers).text_config for layers in (4, 0))
    assert (config.num_hidden_layers, whole.num_hidden_layers) == (4, 32)
    assert config.hidden_size == whole.hidden_size


def test_the_command_writes_a_folder_that_loads(tmp_path, capsys):
    shapes.main(["llava-1.5-7b", str(tmp_path), "--shrink", "--layers", "2"])
    assert "the layout of llava-hf/llava-1.5-7b-hf without weights" in capsys.readouterr().out
    vlm = FrozenVLM.from_pretrained(tmp_path, random_weights=True)
    assert len(vlm.lm.layers) == 2
    shapes.main(["llava-1.5-7b", str(tmp_path), "--shrink", "--weights"])
    assert "llava-1.5-7b-hf with random weights" in capsys.readouterr().out
    assert len(FrozenVLM.from_pretrained(tmp_path).lm.layers) == 3
    with pytest.raises(ValueError, match="backbone 'llava': expected one of llava-1.5-7b, "):
        shapes.write("llava", tmp_path)


# ------------------------------------------------------------------ memory


def test_the_cache_is_as_large_as_estimated(small):
    cache = DynamicCache()
    with torch.no_grad():
        small.lm(inputs_embeds=torch.zeros(2, 30, small.dim, dtype=torch.bfloat16), use_cache=True,
                 past_key_values=cache)
    need = shapes.memory(small.model.config, torch.bfloat16, rows=2, tokens=30)
    assert need["cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert need["weights"] == sum(p.nbytes for p in small.parameters())


def test_weights_that_do_not_fit_are_refused_before_loading(llava):
    # 3 matrices of 10**10 x 64, 4 bytes each, in each of 3 layers
    edit(llava, intermediate_size=10**10)
    says = r"need 21\d{3}.\d GiB in torch.float32, cpu has .* GiB free: choose"
    for how in (True, False):              # else it would be the missing weights that stop it
        with pytest.raises(MemoryError, match=says):
            FrozenVLM.from_pretrained(llava, random_weights=how)


# ------------------------------------------------------------------ what loading refuses


class Refuser(Handler):
    """Answers as the hub does for models that one may not, or cannot, have."""

    def do_HEAD(self):
        status, code = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    do_GET = do_HEAD


@pytest.mark.parametrize("asked, error, says", [
    ("lab/unknown-vlm", FileNotFoundError,
     "neither a folder here nor a model on the Hugging Face hub; check the"),
    ("lab/gated-vlm", PermissionError,
     "'lab/gated-vlm' is gated: accept its terms at https://huggingface.co/lab/gated")])
@pytest.mark.parametrize("random_weights", [False, True])
def test_what_the_hub_refuses_is_told_apart(asked, error, says, random_weights, hub_answers):
    hub_answers(Refuser)
    with pytest.raises(error, match=says):
        FrozenVLM.from_pretrained(asked, random_weights=random_weights)


def test_no_network_is_no_unknown_model(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says = "'lab/some-vlm': neither .* nor in the hub's cache, and the hub cannot"
    with pytest.raises(ConnectionError, match=says):
        FrozenVLM.from_pretrained("lab/some-vlm")


def test_folders_that_are_no_checkpoints(llava, tmp_path):
    says = "no checkpoint at .*: expected a folder with a config.json"
    for wrong in (tmp_path, tmp_path / "nowhere", "runs/no/such", "./nothing"):
        with pytest.raises(FileNotFoundError, match=says):
            FrozenVLM.from_pretrained(wrong)
    # a folder of shapes has no weights
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        FrozenVLM.from_pretrained(llava)
    (tmp_path / "llava" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"llava/config\.json is damaged .*: download or copy"):
        FrozenVLM.from_pretrained(llava)


def test_prompts_that_are_too_long_are_refused_by_row(llava):
    edit(llava, max_position_embeddings=640)
    vlm = FrozenVLM.from_pretrained(llava, random_weights=True, protocol="stock")
    fits = vlm.batch([picture()], [[(" ".join(["red"] * 40), None)]])
    assert fits["input_ids"].shape[1] <= 640
    says = r"row 1 has 7\d\d tokens, .*: expected at most 640, the language"
    with pytest.raises(ValueError, match=says):
        vlm.batch([picture()] * 2, [[TURN], [(" ".join(["red"] * 130), None)]])


def test_more_image_tokens_than_images_are_refused(small):
    mark = small.image_token
    says = r"turns\[0\]\[\d\] contains '.*': leave it out, batch\(\) places it"
    for turns in ([(f"and this {mark} ?", None)], [("what ?", f"this {mark}")],
                  [TURN, (mark, None)]):
        with pytest.raises(ValueError, match=says):
            small.batch([picture()], [turns])


def test_the_output_layer_gets_whole_states(tmp_path):
    """A slice would make torch copy its weight for every row, on a CPU."""
    vlm = FrozenVLM.from_pretrained(tiny_models.llava(tmp_path), torch.float32)
    contiguous = []
    vlm.model.lm_head.register_forward_pre_hook(
        lambda _, args: contiguous.append(args[0].is_contiguous()))
    batch = vlm.batch([Image.new("RGB", (24, 24))] * 2, [[("what colour ?", None)]] * 2)
    vlm.generate(vlm.embed(batch, vlm.encode(batch)), 2)
    assert contiguous and all(contiguous)
