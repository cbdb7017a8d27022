"""A chat answers as one prompt of the whole dialogue would: in float64, on tiny random models of
the real classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import VIDEO

from baselines.inside import generate_inside
from common import FrozenVLM
from examples.chat import Chat

QUESTIONS = ["what colour is the circle ?", "how many ?", "is the shape left of the red square ?"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def picture(family):
    """A row of batch(): an image, or for a video family two frames."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return [image, image.rotate(180)] if family in VIDEO else image


@pytest.fixture(scope="module")
def units(vlm, picture):
    return vlm.encode(vlm.pictures([picture]))


@pytest.fixture(scope="module")
def keep(units):
    """Four units, for LLaVA-NeXT one of a crop among them."""
    return [units.pad(units.image_of)[1][0].nonzero().flatten()[[0, 3, 7, -2]]]


def test_a_chat_is_the_one_prompt_of_its_dialogue(vlm, picture, units, keep, monkeypatch):
    """Logits of every turn, read behind the cache, against the whole prompt without one."""
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", None)
    heard, fed = [], []
    hooks = [
        vlm.model.lm_head.register_forward_hook(lambda module, args, out: heard.append(out)),
        vlm.lm.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True)]
    chat = Chat(vlm, picture, units, keep)
    steps = 5
    for turn, question in enumerate(QUESTIONS * 2):
        heard.clear()
        fed.clear()
        batch = vlm.batch([picture], [[*chat.turns, (question, None)]])
        answer = chat.ask(question, steps)
        cached = torch.cat(heard, 1)
        read = fed[0]
        prompt = vlm.prune(batch, units, keep)
        expected = vlm.logits(prompt)[:, -1]
        torch.testing.assert_close(cached[:, 0], expected, rtol=0, atol=1e-9)
        heard.clear()
        assert vlm.generate(prompt, steps) == [answer]
        generated = torch.cat(heard, 1)[:, :steps]
        torch.testing.assert_close(cached, generated, rtol=0, atol=1e-9)
        last = prompt.pos[..., -1] + steps - 1
        torch.testing.assert_close(chat.held.pos[..., -1], last)
        length = prompt.mask.shape[1]
        images = prompt.is_visual[0].nonzero().max() + 1
        # no image is read again
        assert read == length if turn == 0 else read <= length - images
    assert len(chat.turns) >= 3                        # the others were forgotten, see below
    for hook in hooks:
        hook.remove()
    logits = []                                        # the test has power: other positions differ
    for shift in (0, 1):
        chat = Chat(vlm, picture, units, keep)
        chat.ask(QUESTIONS[0], steps)
        unread = chat._unread([*chat.turns, (QUESTIONS[1], None)])
        logits.append(vlm.model.lm_head(chat._read(unread._replace(pos=unread.pos - shift))))
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_a_chat_goes_on_where_answers_are_spelled_anew_or_empty(vlm, picture, units):
    def expected(*turns):
        return vlm.generate(vlm.embed(vlm.batch([picture], [list(turns)]), units), 4)[0]
    first = (QUESTIONS[0], "red")
    chat = Chat(vlm, picture, units, turns=[first])
    assert chat.ask(QUESTIONS[1], 4) == expected(first, (QUESTIONS[1], None))
    second = (QUESTIONS[1], "two circle")              # not what the cache holds
    chat.turns = [first, second]
    assert chat.ask(QUESTIONS[2], 4) == expected(first, second, (QUESTIONS[2], None))
    silent = Chat(vlm, picture, units)
    assert silent.ask(QUESTIONS[0], 0) == ""
    assert silent.turns == []
    assert silent.ask(QUESTIONS[1], 4) == expected((QUESTIONS[1], None))
    with pytest.raises(ValueError, match="empty question"):
        silent.ask(" ")


@pytest.mark.parametrize("pruned", [True, False])
def test_features_may_stand_in_place_of_the_units_own(vlm, picture, units, keep, pruned):
    """As they do where tokens are merged, or drowned in noise."""
    keep = keep if pruned else None
    feats = -(units.feats[keep[0]] if pruned else units.feats)
    chat = Chat(vlm, picture, units, keep, feats=feats)
    turns = []
    for question in QUESTIONS:
        batch = vlm.batch([picture], [[*turns, (question, None)]])
        prompt = (vlm.prune(batch, units, keep, feats) if pruned
                  else vlm.embed(batch, units, feats))
        assert chat.ask(question, 4) == vlm.generate(prompt, 4)[0]
        turns = chat.turns


def test_streams_get_every_token_and_nothing_first(vlm, picture, units):
    class Heard:
        def __init__(self):
            self.calls = []
            self.ended = 0

        def put(self, value):
            self.calls.append(value.flatten().tolist())

        def end(self):
            self.ended += 1

    batch = vlm.batch([picture], [[(QUESTIONS[0], None)]])
    streams = [Heard() for _ in range(3)]
    texts = [vlm.generate(vlm.embed(batch, units), 5, streams[0])[0],
             generate_inside(vlm, vlm.embed(batch, units), {}, 5, streams[1])[0],
             Chat(vlm, picture, units).ask(QUESTIONS[0], 5, streams[2])]
    assert len({str(stream.calls) for stream in streams}) == len(set(texts)) == 1
    assert [stream.ended for stream in streams] == [1] * 3
    calls = streams[0].calls
    assert calls[0] == [] and all(len(call) == 1 for call in calls[1:])
    tokens = sum(calls, [])
    assert vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip() == texts[0]


def test_a_template_that_rewrites_earlier_turns_is_read_again():
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    image = Image.new("RGB", (300, 200), "white")
    chat = Chat(vlm, image, vlm.encode(vlm.pictures([image])))
    chat.ask("how many shapes are there ?", 4)
    template = vlm.processor.chat_template
    vlm.processor.chat_template = "{{ messages | length }}" + template
    answer = chat.ask("what colour is the circle ?", 4)
    batch = vlm.batch([image], [[*chat.turns[:1], ("what colour is the circle ?", None)]])
    prompt = vlm.embed(batch, vlm.encode(batch))
    assert vlm.generate(prompt, 4) == [answer]
