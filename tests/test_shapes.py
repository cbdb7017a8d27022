"""Real sizes without weights: shapes, random weights, memory estimates, FLOPs, and what loading refuses."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoConfig, DynamicCache

from benchmarks import flops, gpu, shapes
from common import FrozenVLM, blank_model, weight_bytes

# parameters of the published checkpoints, in G, and units of one 700x500 picture
REAL = {"llava-1.5-7b": (7.063, 576), "llava-next-vicuna-7b": (7.063, 2208), "qwen2.5-vl-7b": (8.292, 450),
        "internvl3-8b": (7.944, 13 * 256), "llava-onevision-7b": (8.031, 196)}
TURN = ("what is there ?", "a red circle")


@pytest.fixture(scope="module", params=list(REAL))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return shapes.write(name, tmp_path_factory.mktemp(name), shrink=True)


@pytest.fixture(scope="module")
def small(folder, one_thread):
    return FrozenVLM.from_pretrained(folder, random_weights=True)


@pytest.fixture
def llava(tmp_path):
    """A folder that a test may spoil."""
    return shapes.write("llava-1.5-7b", tmp_path / "llava", shrink=True)


def picture(width: int = 700, height: int = 500) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def edit(folder: str, **text) -> None:
    path = f"{folder}/config.json"
    config = json.load(open(path))
    config["text_config"] |= text
    json.dump(config, open(path, "w"))


# ------------------------------------------------------------------------------------- shapes, random weights

def test_the_sizes_are_those_of_the_published_checkpoints(name, tmp_path):
    billions, _ = REAL[name]
    shape = AutoConfig.from_pretrained(shapes.write(name, tmp_path))
    assert weight_bytes(shape) / 2e9 == pytest.approx(billions, rel=2e-4)
    assert weight_bytes(shape, torch.float32) == 2 * weight_bytes(shape)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jinja", *[".json"] * 4]       # and no weights
    vlm = FrozenVLM.from_pretrained(tmp_path, device="meta", random_weights=True)
    assert vlm.device.type == "meta" and vlm.dtype == torch.bfloat16 and vlm.lm.layers[0].mlp is not None


def test_random_weights_take_the_same_path_as_a_checkpoint(name, small):
    """Encode, prune, loss, answer: finite in bfloat16; a pruned prompt that keeps all is the full one."""
    batch = small.batch([picture()], [[TURN]])
    units = small.encode(batch)
    every = [here.nonzero().flatten() for here in units.pad()[1]]
    assert len(every[0]) == small.num_units(batch)[0] == REAL[name][1]
    full, kept = small.embed(batch, units), small.prune(batch, units, every)
    assert small.loss(full) == small.loss(kept) and 0 < small.loss(full) < 20
    pruned = small.prune(small.batch([picture()], [[(TURN[0], None)]]), units, [every[0][::9]])
    assert pruned.embeds.shape[1] < full.embeds.shape[1] / 4
    assert torch.isfinite(small.logits(pruned)).all() and isinstance(small.generate(pruned, 2)[0], str)


def test_random_weights_are_announced_and_always_the_same(llava, capsys):
    torch.manual_seed(5)
    one = FrozenVLM.from_pretrained(llava, torch.float32, random_weights=True)
    drawn = torch.rand(1)
    shouted = f"RANDOM WEIGHTS: OF {llava} ONLY THE SHAPES ARE REAL, ITS ANSWERS ARE MEANINGLESS"
    assert shouted in capsys.readouterr().out
    two = FrozenVLM.from_pretrained(llava, torch.float32, random_weights=True)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(5))      # the caller's numbers are untouched
    assert not any(p.requires_grad for p in one.parameters()) and one.dtype == torch.float32


def test_a_saved_model_with_random_weights_is_a_checkpoint_like_any_other(llava, tmp_path):
    drawn = FrozenVLM.from_pretrained(llava, torch.float32, random_weights=True)
    drawn.model.save_pretrained(tmp_path / "saved")
    drawn.processor.save_pretrained(tmp_path / "saved")
    loaded = FrozenVLM.from_pretrained(tmp_path / "saved", torch.float32)
    batch = drawn.batch([picture()], [[TURN]])
    assert torch.equal(*(vlm.logits(vlm.embed(batch, vlm.encode(batch))) for vlm in (drawn, loaded)))


# ---------------------------------------------------------------------------------------------------- memory

def test_the_cache_is_as_large_as_estimated(small):
    cache = DynamicCache()
    with torch.no_grad():
        small.lm(inputs_embeds=torch.zeros(2, 30, small.dim, dtype=torch.bfloat16), use_cache=True,
                 past_key_values=cache)
    need = shapes.memory(small.model.config, torch.bfloat16, rows=2, tokens=30)
    assert need["cache"] == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert need["weights"] == sum(p.nbytes for p in small.parameters())


def test_weights_that_do_not_fit_are_refused_before_loading(llava):
    edit(llava, intermediate_size=10**10)              # 3 matrices of 10**10 x 64, 2 bytes each, in each of 3 layers
    for how in (True, False):                          # without them it would be the missing weights that stop it
        with pytest.raises(MemoryError, match=r"need 10\d{3}.\d GiB in torch.bfloat16, cpu has .* GiB free: choose"):
            FrozenVLM.from_pretrained(llava, random_weights=how)


# ------------------------------------------------------------------------------------------ what loading refuses

class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for models that one may not, or cannot, have."""

    def do_HEAD(self):
        status, code = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    yield
    server.shutdown()


@pytest.mark.parametrize("asked, error, says", [
    ("lab/unknown-vlm", FileNotFoundError, "neither a folder here nor a model on the Hugging Face hub; check the"),
    ("lab/gated-vlm", PermissionError, "'lab/gated-vlm' is gated: accept its terms at https://huggingface.co/lab/gated")])
@pytest.mark.parametrize("random_weights", [False, True])
def test_what_the_hub_refuses_is_told_apart(asked, error, says, random_weights, hub):
    with pytest.raises(error, match=says):
        FrozenVLM.from_pretrained(asked, random_weights=random_weights)


def test_no_network_is_no_unknown_model(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'lab/some-vlm': neither .* nor in the hub's cache, and the hub cannot"):
        FrozenVLM.from_pretrained("lab/some-vlm")


def test_folders_that_are_no_checkpoints(llava, tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere", "runs/no/such", "./nothing"):
        with pytest.raises(FileNotFoundError, match="no checkpoint at .*: expected a folder with a config.json"):
            FrozenVLM.from_pretrained(wrong)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):             # a folder of shapes, no weights
        FrozenVLM.from_pretrained(llava)
    (tmp_path / "llava" / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="not a valid JSON"):
        FrozenVLM.from_pretrained(llava)


def test_prompts_that_are_too_long_are_refused_by_row(llava):
    edit(llava, max_position_embeddings=640)
    vlm = FrozenVLM.from_pretrained(llava, random_weights=True)
    assert vlm.batch([picture()], [[(" ".join(["red"] * 40), None)]])["input_ids"].shape[1] <= 640
    with pytest.raises(ValueError, match=r"row 1 has 7\d\d tokens, .*: expected at most 640, the language model's"):
        vlm.batch([picture()] * 2, [[TURN], [(" ".join(["red"] * 130), None)]])


def test_more_image_tokens_than_images_are_refused(small):
    for turns in ([(f"and this {small.image_token} ?", None)], [("what ?", f"this {small.image_token}")],
                  [TURN, (small.image_token, None)]):
        with pytest.raises(ValueError, match=r"turns\[0\]\[\d\] contains '.*': leave it out, batch\(\) places it"):
            small.batch([picture()], [turns])


# ----------------------------------------------------------------------------------------------------- FLOPs

def test_llava_reproduces_the_papers_flops(one_thread):
    """8.89 T for 576 tokens, 2.13 T for 64: all layers of the encoder, 70 tokens of text, causal attention half."""
    model = blank_model(shapes.config("llava-1.5-7b")).eval()
    encoder, project = flops.clip_stages(model, 1)
    for k, printed in flops.PRINTED.items():
        body, attention = flops.prefill(model, k + 70)
        assert (encoder + project(k) + body - attention / 2) / 1e12 == pytest.approx(printed, rel=5e-3)
        n, products = k + 70, 32 * (k + 70) * (4 * 4096**2 + 3 * 4096 * 11008)           # by hand, multiply-adds
        assert attention == pytest.approx(32 * 4 * n**2 * 4096, rel=1e-3)
        assert body - attention == 2 * (products + 4096 * 32064)
    assert encoder == pytest.approx(0.382e12, rel=2e-3) and project(576) == 576 * 2 * (1024 * 4096 + 4096**2)


def test_selectors_are_counted_as_they_select():
    nets, n, c = flops.selectors(64, 32, text=6), 30, 64

    def blocks(n):
        return 2 * n * 12 * c**2 + 4 * n**2 * c
    assert nets["AutoSelect"](1, n, 8) == 5 * blocks(n) + 2 * n * c
    assert nets["reconstruction"](3, n, 8) == 3 * (4 * blocks(n) + 2 * n * 2 * c)
    memory = 2 * blocks(n + 1 + 6) + 2 * 6 * 32 * c                          # units, stop and words
    keys = 2 * (n + 1) * (2 * c * c + c * c)
    assert nets["StepPrune"](1, n, 8) - nets["StepPrune"](1, n, 4) == pytest.approx(
        (nets["StepPrune"](1, n, 4) - memory - keys), rel=.05)              # each pick costs the same


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b"], scope="function")
def test_the_flops_table_of_a_small_model(name, one_thread):
    model = blank_model(shapes.config(name, shrink=True)).eval()
    stages = flops.clip_stages(model, 1) if name.startswith("llava") else flops.qwen_stages(model, 8, 12)
    lines = flops.table(model, stages, [24, 8], text=5).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    whole, pruned = (flops.prefill(model, k + 5) for k in (24, 8))
    assert whole[0] > 2 * pruned[0] and stages[1](24) == 3 * stages[1](8) > 0 and stages[0] > 0


# ------------------------------------------------------------------------------------------------ GPU program

def test_the_gpu_program_runs_whole_on_the_cpu(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(gpu, "BUDGETS", (8,))
    found = gpu.main(["qwen2.5-vl-7b", "--shrink", "--device", "cpu", "--batch", "1", "--recon-batch", "2", "--side",
                      "112", "--batches", "1", "2", "--text", "8", "--answer", "4", "--most", "8", "--repeats", "1",
                      "--out", str(tmp_path / "small")])
    saved, page = json.loads((tmp_path / "small.json").read_text()), (tmp_path / "small.md").read_text()
    assert saved == json.loads(json.dumps(found)) and found["weights"] == "random" and found["device"].startswith("cpu")
    assert "--shrink --device cpu" in found["command"] and found["command"] in page
    frozen, auto, step, recon = found["train"]
    assert auto["selector's share, %"] == pytest.approx(100 * (1 - frozen["s a step"] / auto["s a step"]))
    assert frozen["selector's share, %"] is recon["selector's share, %"] is None and frozen["peak, GiB"] is None
    assert frozen["trained, M"] == 0 < min(x["trained, M"] for x in (auto, step, recon))
    assert [(x["batch"], x["visual tokens"]) for x in found["first"]] == [(1, 16), (1, 8), (2, 16), (2, 8)]
    full, pruned = found["first"][2:]
    assert full["AutoSelect"] is None and full["first token, AutoSelect"] == full["vision"] + full["rest"]
    assert 0 < pruned["its bound "] <= full["its bound "] and pruned["AutoSelect"] > 0 < pruned["StepPrune"]
    assert [x["method"] for x in found["select"]] == ["autoselect", "stepprune", "recon"] * 2
    assert all(x["eager"] > 0 and x["compiled"] is None for x in found["select"])


def test_the_trained_selectors_get_gradients_and_the_frozen_bound_reaches_the_units(llava):
    vlm = FrozenVLM.from_pretrained(llava, random_weights=True)
    batch = gpu.fabricate(vlm, 1, 64, text=4, answer=2)
    for method in ("autoselect", "stepprune", "recon"):
        net = gpu.build(method, vlm, 4, 8).train()
        gpu.loss_of(method, vlm, net, batch).backward()
        inner = getattr(net, {"autoselect": "scorer", "stepprune": "encoder", "recon": "selector"}[method])
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in inner.blocks.parameters())
    assert gpu.loss_of("frozen", vlm, None, batch).requires_grad
    assert not any(p.grad is not None for p in vlm.parameters())


def test_a_shape_of_fewer_layers_is_as_wide(tmp_path):
    config, whole = (shapes.config("llava-1.5-7b", layers=layers).text_config for layers in (4, None))
    assert (config.num_hidden_layers, whole.num_hidden_layers) == (4, 32) and config.hidden_size == whole.hidden_size


def test_the_output_layer_gets_whole_states(tmp_path):
    """A slice would make torch copy its weight for every row, on a CPU."""
    vlm = FrozenVLM.from_pretrained(tiny_models.llava(tmp_path), torch.float32)
    seen = []
    vlm.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    batch = vlm.batch([Image.new("RGB", (24, 24))] * 2, [[("what colour ?", None)]] * 2)
    vlm.generate(vlm.embed(batch, vlm.encode(batch)), 2)
    assert seen and all(seen)
