"""The real backbones' layouts, small and with random weights, through all that a user runs.

The strings here were written out by hand from the hub's chat templates; the pictures are as odd as
LLaVA-665K's, and one question is long.
"""

import importlib
import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import evaluate
import train
from common import IGNORE, FrozenVLM
from examples import answer
from examples.chat import Chat
from measure import shapes

pytestmark = pytest.mark.usefixtures("one_thread")

VIDEO = ("llava-onevision-7b", "llava-next-video-7b")
VICUNA = ("llava-1.5-7b", "llava-next-vicuna-7b", "llava-next-video-7b")
TURNS = [("What is this?", "A dog."), ("Where is it?", "On the left.")]
# pictures as (width, height), and the image tokens that they become
SIZES = {"small": (60, 60), "photo": (400, 300), "wide": (400, 200)}
TOKENS = {"llava-1.5-7b": dict(small=576, photo=576, wide=576),
          # whole, crops without their padding, a newline a row
          "llava-next-vicuna-7b": dict(small=576 + 24 * 25, photo=576 + 24 * 33,
                                       wide=576 + 24 * 49),
          "qwen2.5-vl-7b": dict(small=2 * 2, photo=14 * 11, wide=14 * 7),
          "qwen3-vl-8b": dict(small=8 * 8, photo=12 * 9, wide=12 * 6),
          "internvl3-8b": dict(small=256, photo=13 * 256, wide=3 * 256),
          "llava-onevision-7b": dict(small=197, photo=197, wide=197),
          "llava-next-video-7b": dict(small=144, photo=144, wide=144)}

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
# the hub's template itself: two answered turns; then one question, for the model to answer
WRITTEN = {
    "llava-1.5-7b": (
        "USER: <image>\nWhat is this? ASSISTANT: A dog. USER: Where is it? ASSISTANT: On the left. "
        "", "USER: <image>\nWhat is this? ASSISTANT:"),
    "llava-next-vicuna-7b": (
        "USER: <image>\nWhat is this? ASSISTANT: A dog. USER: Where is it? ASSISTANT: On the left. "
        "", "USER: <image>\nWhat is this? ASSISTANT:"),
    "llava-next-video-7b": (
        "USER: <video>\nWhat is this? ASSISTANT: A dog. USER: Where is it? ASSISTANT: On the left. "
        "", "USER: <video>\nWhat is this? ASSISTANT:"),
    "qwen2.5-vl-7b": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn the left.<|im_end|>\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n"),
    "qwen3-vl-8b": (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn the left.<|im_end|>\n",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\n"),
    "internvl3-8b": (
        "<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn the left.<|im_end|>\n",
        "<|im_start|>user\n<IMG_CONTEXT>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"),
    "llava-onevision-7b": (
        "<|im_start|>user <video>\nWhat is this?<|im_end|><|im_start|>assistant \nA dog.<|im_end|>"
        "<|im_start|>user \nWhere is it?<|im_end|><|im_start|>assistant \nOn the left.<|im_end|>",
        "<|im_start|>user <video>\nWhat is this?<|im_end|><|im_start|>assistant\n")}
# what the language model reads: one answered turn, two; what stands behind a generation prompt is
# what the model itself would say
READ = {
    ("llava-1.5-7b", "stock"): (
        "<s>USER: <image>\nWhat is this? ASSISTANT: A dog.</s>",
        "<s>USER: <image>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Where is it? ASSISTANT: On the left.</s>"),
    ("llava-1.5-7b", "papers"): (
        "<s>" + SYSTEM + "USER: <image>\nWhat is this? ASSISTANT: A dog.</s>",
        "<s>" + SYSTEM + "USER: <image>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Where is it? ASSISTANT: On the left.</s>"),
    ("llava-next-vicuna-7b", "stock"): (
        "<s>USER: <image>\nWhat is this? ASSISTANT: A dog.</s>",
        "<s>USER: <image>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Where is it? ASSISTANT: On the left.</s>"),
    ("llava-next-vicuna-7b", "papers"): (
        "<s>" + SYSTEM + "USER: <image>\nWhat is this? ASSISTANT: A dog.</s>",
        "<s>" + SYSTEM + "USER: <image>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Where is it? ASSISTANT: On the left.</s>"),
    ("llava-next-video-7b", "stock"): (
        "<s>USER: <video>\nWhat is this? ASSISTANT: A dog.</s>",
        "<s>USER: <video>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Where is it? ASSISTANT: On the left.</s>"),
    ("llava-next-video-7b", "papers"): (
        "<s>" + SYSTEM + "USER: <video>\nWhat is this? ASSISTANT: A dog.</s>",
        "<s>" + SYSTEM + "USER: <video>\nWhat is this? ASSISTANT: A dog.</s>"
        "USER: Where is it? ASSISTANT: On the left.</s>"),
    ("qwen2.5-vl-7b", "stock"): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn the left.<|im_end|>\n"),
    ("qwen3-vl-8b", "stock"): (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn the left.<|im_end|>\n"),
    ("internvl3-8b", "stock"): (
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n",
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn the left.<|im_end|>\n"),
    # the earlier answer has the opening of history, the last one that of a question
    ("llava-onevision-7b", "stock"): (
        "<|im_start|>user <video>\nWhat is this?<|im_end|><|im_start|>assistant\nA dog.<|im_end|>",
        "<|im_start|>user <video>\nWhat is this?<|im_end|><|im_start|>assistant \nA dog.<|im_end|>"
        "<|im_start|>user \nWhere is it?<|im_end|><|im_start|>assistant\nOn the left.<|im_end|>")}


@pytest.fixture(scope="module", params=list(WRITTEN))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return shapes.write(name, tmp_path_factory.mktemp("layout") / name, shrink=True, weights=True)


@pytest.fixture(scope="module", params=["stock", "papers"])
def vlm(folder, request):
    return FrozenVLM.from_pretrained(folder, torch.float32, protocol=request.param)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def message(kind: str, role: str, text: str, shows: bool = False) -> dict:
    return {"role": role, "content": [{"type": kind}] * shows + [{"type": "text", "text": text}]}


def read(vlm, batch, row: int = 0) -> tuple[str, int]:
    """What the language model reads, its image tokens as one; how many these are."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    count = int((ids == vlm.image_id).sum())
    mark = re.escape(vlm.image_token)
    return re.sub(f"(?:{mark})+", vlm.image_token, vlm.tokenizer.decode(ids)), count


def learned(vlm, batch, row: int = 0) -> list[str]:
    """The stretches of tokens that have a label."""
    labels = batch["labels"][row].tolist()
    stretches = [[]]
    for label in labels:
        if label != IGNORE:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [vlm.tokenizer.decode(stretch) for stretch in stretches if stretch]


# ------------------------------------------------------------------ prompts


def test_the_template_is_the_hubs(name, folder):
    kind = "video" if name in VIDEO else "image"
    dialogue = [message(kind, "user", TURNS[0][0], shows=True),
                message(kind, "assistant", TURNS[0][1]),
                message(kind, "user", TURNS[1][0]), message(kind, "assistant", TURNS[1][1])]
    vlm = FrozenVLM.from_pretrained(folder, protocol="stock")
    for messages, expected, opens in ((dialogue, WRITTEN[name][0], False),
                                      (dialogue[:1], WRITTEN[name][1], True)):
        assert vlm.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opens) == expected


def test_prompts_letter_by_letter(name, vlm):
    """One turn and two, in one batch; the answers with their end are all that has a label."""
    protocol = vlm.protocol if name in VICUNA else "stock"
    batch = vlm.batch([picture(SIZES["photo"])] * 2, [TURNS[:1], TURNS])
    one, two = READ[name, protocol]
    assert [read(vlm, batch, row)[0] for row in range(2)] == [one, two]
    if name in VICUNA:
        assert learned(vlm, batch, 1) == [" A dog.</s>", " On the left.</s>"]
    else:
        assert learned(vlm, batch, 1) == ["A dog.<|im_end|>", "On the left.<|im_end|>"]
    assert learned(vlm, batch, 0) == learned(vlm, batch, 1)[:1]
    labels = batch["labels"]
    assert labels[labels != IGNORE][-1] in vlm.ends(), "what it learns to end with does end it"


def test_a_question_ends_where_the_model_is_to_speak(name, vlm):
    batch = vlm.batch([picture(SIZES["photo"])], [[*TURNS[:1], ("Where is it?", None)]])
    two = READ[name, vlm.protocol if name in VICUNA else "stock"][1]
    text = read(vlm, batch)[0]
    said = two.removeprefix(text)
    assert said != two and re.sub(r"</s>|<\|im_end\|>\s?", "", said).strip() == "On the left."
    assert not learned(vlm, batch)[1:]


def test_pictures_of_odd_sizes_become_as_many_tokens(name, folder):
    vlm = FrozenVLM.from_pretrained(folder, torch.float32, protocol="stock")
    for what, size in SIZES.items():
        batch = vlm.batch([picture(size)], [TURNS[:1]])
        assert read(vlm, batch)[1] == TOKENS[name][what], what
        units = vlm.encode(batch)
        assert torch.isfinite(vlm.loss(vlm.embed(batch, units)))


def test_the_papers_pad_pictures_for_llava_15_alone(name, folder):
    """A wide picture comes with bars of the mean colour, which is 0 once normalised."""
    wide = picture(SIZES["wide"])
    pixels = {}
    for protocol in ("stock", "papers"):
        vlm = FrozenVLM.from_pretrained(folder, torch.float32, protocol=protocol)
        pixels[protocol] = vlm.batch([wide], [TURNS[:1]])["pixel_values"]
        assert torch.equal(pixels[protocol], vlm.pictures([wide])["pixel_values"])
    if name == "llava-1.5-7b":
        assert pixels["papers"][0, :, :80].abs().max() < .02
        assert pixels["stock"][0, :, :80].abs().max() > 1
    else:
        assert torch.equal(pixels["papers"], pixels["stock"])


def test_ids_and_pixels_are_the_stock_processors(name, folder):
    if name not in ("llava-1.5-7b", "llava-next-vicuna-7b"):
        pytest.importorskip("torchvision")
    stock = AutoProcessor.from_pretrained(folder)
    vlm = FrozenVLM.from_pretrained(folder, torch.float32, protocol="stock")
    for size in SIZES.values():
        image = picture(size)
        batch = vlm.batch([image], [[(TURNS[0][0], None)]])
        shown = {"videos": [[image]]} if name in VIDEO else {"images": [image]}
        expected = stock(text=[WRITTEN[name][1]], return_tensors="pt", **shown)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        if name not in VIDEO:                      # frames are prepared as still pictures are
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])


# ------------------------------------------------------------------ all that a user runs


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A JSON file like LLaVA-665K's, with its pictures: odd sizes, a long question, a row without
    a picture."""
    here = tmp_path_factory.mktemp("rows")
    long = "Reference OCR tokens: " + ", ".join(f"word{i}" for i in range(80))
    asked = {"small": ["What is this?"], "photo": [f"What does it say?\n{long}", "Where is it?"],
             "wide": ["Is there a dog?\nAnswer the question using a single word or phrase."]}
    table = []
    for number, (what, questions) in enumerate(asked.items()):
        picture(SIZES[what], number).save(here / f"{what}.jpg")
        turns = []
        for k, question in enumerate(questions):
            turns += [{"from": "human", "value": "<image>\n" * (k == 0) + question},
                      {"from": "gpt", "value": f"It is {what}."}]
        table.append({"id": what, "image": f"{what}.jpg", "conversations": turns})
    table.append({"id": "text", "conversations": [{"from": "human", "value": "Hello."},
                                                  {"from": "gpt", "value": "Good day."}]})
    (here / "rows.json").write_text(json.dumps(table * 2))
    return here


@pytest.fixture(scope="module")
def trained(name, folder, rows, tmp_path_factory) -> dict[str, str]:
    """A run folder of every method."""
    own = {"autoselect": ["--layers", "1", "--heads", "2", "--keep", "16"],
           "stepprune": ["--heads", "2", "--max_steps", "12", "--text_steps", "2"],
           "recon_selector": ["--layers", "1", "--heads", "2"]}
    runs = {}
    if name == "internvl3-8b":                     # a 4:3 picture is 3,328 tokens
        own = {method: [*options, "--micro", "1"] for method, options in own.items()}
    for method, options in own.items():
        runs[method] = str(tmp_path_factory.mktemp("runs") / method)
        train.main(["--method", method, "--model", folder, "--run", runs[method], "--data",
                    "llava-665k", "--path", str(rows / "rows.json"), "--images", str(rows),
                    "--steps", "2", "--batch", "3", "--workers", "0", "--device", "cpu",
                    "--evaluate", "False", "--save_every", "1", *options])
    return runs


@pytest.mark.slow
def test_a_question_of_400_tokens_is_among_the_rows(folder, rows):
    vlm = FrozenVLM.from_pretrained(folder)
    table = json.loads((rows / "rows.json").read_text())
    lengths = [len(vlm.tokenizer(turn["value"]).input_ids) for row in table
               for turn in row["conversations"]]
    assert max(lengths) >= 400


@pytest.mark.slow
def test_every_method_trains(trained):
    for run in trained.values():
        log = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
        assert len(log) == 2 and all(np.isfinite(line["loss"]) for line in log)
        assert (Path(run) / "selector/model.safetensors").exists()


@pytest.mark.slow
def test_every_method_is_evaluated(folder, trained, tmp_path):
    lines = evaluate.main(["--run", *trained.values(), "--model", folder, "--methods", "random",
                           "--budgets", "8", "--sample", "4", "--calibration", "4", "--batch", "2",
                           "--device", "cpu", "--out", str(tmp_path)])
    assert {line["method"].removesuffix(" mask") for line in lines[1:]} == {
        "random", *trained.values()}
    assert (tmp_path / "summary.md").exists()


@pytest.mark.slow
def test_two_questions_about_a_picture_are_answered(folder, rows, trained, tmp_path):
    lines = answer.main(["--model", folder, "--run", *trained.values(), "--image",
                         str(rows / "photo.jpg"), "--question", "What is this?", "Where is it?",
                         "--budgets", "16", "--max_new_tokens", "4", "--device", "cpu", "--out",
                         str(tmp_path)])
    assert len(lines) == 2 * (1 + len(trained))
    assert all(isinstance(line["answer"], str) for line in lines)
    assert (tmp_path / "answer.json").exists()


@pytest.mark.slow
def test_a_chat_says_what_one_prompt_would(name, vlm):
    """Two turns: also where an earlier answer has another opening than the one that was given."""
    image = picture(SIZES["photo"])
    units = vlm.encode(vlm.pictures([image]))
    keep = [units.pad(units.image_of)[1][0].nonzero().flatten()[::7]]
    chat = Chat(vlm, image, units, keep, turns=TURNS[:1])
    asked = vlm.batch([image], [[*TURNS[:1], ("Where is it?", None)]])
    expected = vlm.generate(vlm.prune(asked, units, keep), 6)
    assert [chat.ask("Where is it?", 6)] == expected
    chat.turns = list(TURNS)
    again = vlm.batch([image], [[*TURNS, ("Who?", None)]])
    assert [chat.ask("Who?", 6)] == vlm.generate(vlm.prune(again, units, keep), 6)


@pytest.mark.slow
def test_the_check_passes(folder, trained, tmp_path):
    """All but the scenes, which random weights cannot answer."""
    check = importlib.import_module("measure.check")
    with suppress(RuntimeError):                   # a failed check ends in one
        check.main([folder, "--run", trained["autoselect"], "--device", "cpu", "--out",
                    str(tmp_path)])
    lines = json.loads((tmp_path / "check.json").read_text())["lines"]
    assert {line["name"] for line in lines if line["passed"] is False} <= {"scenes"}, lines
    assert sum(line["passed"] is True for line in lines) > 4
