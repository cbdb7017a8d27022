"""CDPruner with CLIP's text tower: of a tiny random CLIP on disk, whose encoder is a tiny
LLaVA's."""

import string

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import llava, qwen
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
)

import baselines
from baselines import cdpruner, text_tower
from baselines.encoder import encode
from benchmarks import answering
from benchmarks.answering import QuestionBatch
from benchmarks.questions import Question
from common import FrozenVLM

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 12  # of a segment
TURNS = ["what colour is the circle ?", "how many red square are there left of the blue circle ?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA, and a CLIP whose encoder and last norm are its own."""
    root = tmp_path_factory.mktemp("clip")
    path, folder = llava(root / "llava"), root / "clip"
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    symbols = [*string.printable[:95], *(f"{letter}</w>" for letter in string.printable[:95])]
    words = [*symbols, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[],
                              model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32,
                          num_hidden_layers=2, num_attention_heads=2, projection_dim=8,
                          max_position_embeddings=LENGTH, eos_token_id=2)
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), projection_dim=8,
                                vision_config=stock.config.vision_config.to_dict()))
    clip.vision_model.load_state_dict(stock.model.vision_tower.state_dict())
    for part in (clip.text_model, clip.text_projection, clip.visual_projection):
        for weight in part.parameters():
            weight.data.normal_(std=.3)
    clip.save_pretrained(folder)
    return path, folder


@pytest.fixture(scope="module")
def vlm(folders):
    return FrozenVLM.from_pretrained(folders[0], dtype=torch.float32)


@pytest.fixture(scope="module")
def asked(vlm):
    rng = np.random.default_rng(0)
    rows = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for _ in TURNS]
    pixels = vlm.pictures(rows)
    units = encode(vlm, pixels, cdpruner.needs(vlm))
    batch = QuestionBatch(vlm, units, [0, 1], ["a", "b"], pixels)
    batch.texts = [TURNS[0] + cdpruner.ENDING, TURNS[1]]
    return batch


def picked(vlm, asked, folder, k):
    """As the released code: what CLIP's own classes give, one picture at a time, and its loop."""
    clip, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    found = []
    for b, text in enumerate(TURNS):
        ids = tokenizer(text)["input_ids"]
        ids += [0] * (-len(ids) % LENGTH)
        mask = [int(i < len(tokenizer(text)["input_ids"])) for i in range(len(ids))]
        with torch.no_grad():
            seen = clip.vision_model(asked.pixels["pixel_values"][b:b + 1],
                                     output_hidden_states=True)
            patches = clip.vision_model.post_layernorm(seen.hidden_states[-2][:, 1:])
            patches = clip.visual_projection(patches)[0]
            read = clip.text_model(torch.tensor(ids).view(-1, LENGTH),
                                   attention_mask=torch.tensor(mask).view(-1, LENGTH))
            texts = clip.text_projection(read.pooler_output)
        assert len(texts) == len(ids) // LENGTH > 1
        relevance = -F.cosine_similarity(patches[:, None], texts[None], dim=-1).mean(1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        x = F.normalize(asked.units.readings["projected"][asked.units.image_of == b], dim=1)
        left = (relevance[:, None] * (x @ x.T) * relevance).double()
        chosen = []
        for _ in range(k):  # the volume that is left, from its definition
            j = int(left.diagonal().masked_fill(torch.isin(torch.arange(len(x)),
                                                           torch.tensor(chosen)), -1).argmax())
            chosen.append(j)
            left = left - left[:, j:j + 1] @ left[j:j + 1] / left[j, j]
        found.append(sorted(chosen))
    return found


def test_the_released_methods_tokens_by_clips_text_tower(vlm, asked, folders, capsys):
    way = cdpruner.way(vlm, tower=folders[1])
    assert capsys.readouterr().out == (
        f"cdpruner: the question is read by the text tower of {folders[1]}\n")
    assert way.reads_question
    for k in (1, 5, 12):
        assert [row.tolist() for row in way.select(asked, k)] == picked(vlm, asked, folders[1], k)
    asked.question = torch.randn(2, 4, vlm.dim), torch.ones(2, 4, dtype=torch.bool)
    words = baselines.way("cdpruner_words", vlm).select(asked, 12)
    assert [row.tolist() for row in words] != picked(vlm, asked, folders[1], 12)


def test_the_tower_of_a_known_encoder_is_taken_by_name(vlm, folders, monkeypatch):
    vision = vlm.model.config.vision_config
    sizes = vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size
    with pytest.raises(ValueError, match=f"no text tower is known to a CLIP of width {sizes[0]}, .*"
                                         "cdpruner_words does without"):
        baselines.way("cdpruner", vlm)
    monkeypatch.setitem(text_tower.TOWERS, sizes, str(folders[1]))
    assert baselines.way("cdpruner", vlm).reads_question


def test_no_other_tower_takes_its_place(vlm, folders, tmp_path):
    path, folder = folders
    with pytest.raises(ValueError, match="cannot be read: no checkpoint .*nowhere.*does without"):
        cdpruner.way(vlm, tower=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a 'llava': expected a CLIP model with both"):
        cdpruner.way(vlm, tower=path)
    for seed, name in ((1, "other"), (0, "half")):
        torch.manual_seed(seed)
        clip = CLIPModel(CLIPModel.from_pretrained(folder).config)
        part = clip if name == "other" else clip.vision_model
        clip.save_pretrained(tmp_path / name)
        CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
        if name == "half":
            state = {f"vision_model.{key}": x for key, x in part.state_dict().items()}
            clip.save_pretrained(tmp_path / name, state_dict=state)
    with pytest.raises(ValueError, match="other' is not the CLIP that this vision encoder comes "
                                         r"from: their first layers have a cosine of -?0\.\d+"):
        cdpruner.way(vlm, tower=tmp_path / "other")
    with pytest.raises(ValueError, match=r"half' lacks \d+ weights, such as "):
        cdpruner.way(vlm, tower=tmp_path / "half")
    blind = FrozenVLM.from_pretrained(qwen(tmp_path / "qwen"), dtype=torch.float32)
    with pytest.raises(ValueError, match="the vision encoder is a .*expected CLIP's"):
        cdpruner.way(blind, tower=folder)


def test_a_units_patches_are_averaged(vlm, folders):
    tower = text_tower.load(vlm, folders[1])
    feats = torch.randn(3, 4, vlm.width)
    alone = torch.stack([tower.patches(feats[:, i]) for i in range(4)]).mean(0)
    torch.testing.assert_close(tower.patches(feats), alone)


def test_questions_reach_the_tower_as_they_are_asked(vlm, folders, monkeypatch):
    """Through what evaluation runs, for two budgets of one picture."""
    heard, read = [], text_tower.TextTower.read
    monkeypatch.setattr(text_tower.TextTower, "read",
                        lambda self, texts: heard.append(texts) or read(self, texts))
    image = Image.effect_noise((24, 24), 90).convert("RGB")
    part = [(i, Question(str(i), lambda: [image], text, "yes", 4)) for i, text in enumerate(TURNS)]
    way = cdpruner.way(vlm, tower=folders[1])
    rows = answering.answer_batch(vlm, part, {("cdpruner", k): way for k in (5, 9)})
    assert heard == [TURNS, TURNS]
    assert [[row["kept"] for row in rows["cdpruner", k]] for k in (5, 9)] == [[5, 5], [9, 9]]
