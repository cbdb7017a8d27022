"""The examples' own logic, on the tiny LLaVA; what they need beyond this project is not installed here."""

import importlib.util
import sys
from abc import ABC, abstractmethod
from types import SimpleNamespace

import pytest
import torch

import evaluate
from answer import AnswerConfig, ways_of
from benchmarks import scenes
from common import FrozenVLM
from examples import run_lmms_eval

RUN = "results/autoselect_tiny/selector"


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained("tiny/llava", torch.float32)


@pytest.fixture(scope="module")
def rows():
    return scenes.load(24)


def ask(vlm, way, rows, look=None, **how):
    """generate_until() as lmms-eval calls it: a request a question, documents reached through task_dict."""
    pruned = run_lmms_eval.Pruned(vlm, way, look)
    docs = [dict(image=row.image, question=q.question) for row in rows for q in row.questions]
    pruned.task_dict = {"world": {"test": docs}}
    return pruned.generate_until([
        SimpleNamespace(args=(f"{vlm.image_token}\n{doc['question']}", {"max_new_tokens": 4, **how},
                              lambda doc: [doc["image"]], i, "world", "test")) for i, doc in enumerate(docs)])


def ways(vlm, methods=(), runs=()):
    return ways_of(AnswerConfig(methods=list(methods), budgets=[16], exact=True), vlm, list(runs))


@pytest.mark.parametrize("methods, runs", [((), ()), (("random",), ()), (("holov",), ()), ((), (RUN,))])
def test_answers_are_those_of_the_evaluator(vlm, rows, methods, runs):
    """With all tokens, a baseline's, and a trained selector's; batch 1, as random tokens depend on the batch."""
    look = evaluate.BASELINES[methods[0]].look(vlm) if methods else None
    answers, expected = ask(vlm, ways(vlm, methods, runs)[-1], rows, look), []
    for row in rows:
        asked, batch = evaluate.ask(vlm, [row], look=look)
        if methods:
            keep = [evaluate.BASELINES[methods[0]].select(asked.pictures, 16)[0]] * len(asked.owner)
        elif runs:
            keep = [evaluate.load_run(RUN, vlm)[0].select(*asked.pictures.pad(), 16)[0]] * len(asked.owner)
        prompt = vlm.prune(batch, asked.units, keep) if methods or runs else vlm.embed(batch, asked.units)
        expected += vlm.generate(prompt, 4)
    assert answers == expected
    gold = [q.answer for row in rows for q in row.questions]
    right = sum(scenes.score(a, g) for a, g in zip(answers, gold)) / len(gold)
    assert right > .85 or methods                      # of 16 random tokens most is not to be known


def test_a_selection_inside_the_language_model_answers_too(vlm, rows):
    way = ways(vlm)[0]
    way.layer, way.select = 1, lambda states, valid: [torch.arange(16)] * len(states)
    answers = ask(vlm, way, rows[:2])
    batch = evaluate.prompts(vlm, rows[:2], twice=True)
    units = vlm.encode(vlm.pictures([row.image for row in rows[:2] for _ in row.questions]))
    assert answers == vlm.generate_within(vlm.embed(batch, units), {
        1: lambda look: [torch.arange(16)] * len(look.states)}, 4)


@pytest.mark.parametrize("until", [" ", [" "], ["", " "]])
def test_answers_end_at_a_stop_string(vlm, rows, until):
    whole, cut = (ask(vlm, ways(vlm)[0], rows[:3], **how) for how in ({}, {"until": until}))
    assert cut == [answer.split(" ")[0] for answer in whole] != whole


@pytest.mark.parametrize("images, how, said", [([], {}, "at least one"), (["clip.mp4"], {}, "clip.mp4"),
                                               (None, {"do_sample": True}, "greedy"),
                                               (None, {"num_beams": 3}, "greedy")])
def test_what_it_cannot_do_is_refused(vlm, rows, images, how, said):
    pruned = run_lmms_eval.Pruned(vlm, ways(vlm)[0])
    pruned.task_dict = {"world": {"test": [[rows[0].image] if images is None else images]}}
    with pytest.raises(ValueError, match=said):
        pruned.generate_until([SimpleNamespace(args=("what ?", how, lambda doc: doc, 0, "world", "test"))])


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_it_says_what_to_install():
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        run_lmms_eval.main(["--tasks", "pope", "--model", "tiny/llava"])


def test_the_adapter_is_a_model_of_lmms_eval(vlm, rows, monkeypatch):
    """Against the interface's three abstract methods; with lmms-eval installed against the real class."""
    if importlib.util.find_spec("lmms_eval") is None:
        class Lmms(ABC):
            def __init__(self):
                self._rank, self.task_dict = 0, {"not": "ours"}

            @abstractmethod
            def generate_until(self, requests): ...
            loglikelihood = generate_until_multi_round = generate_until
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(lmms=Lmms))
    model = run_lmms_eval.adapter()(vlm, ways(vlm)[0])
    assert model._rank == 0 and model.task_dict == {}
    model.task_dict["world"] = {"test": [dict(image=rows[0].image)]}
    request = SimpleNamespace(args=(rows[0].questions[0].question, {}, lambda doc: [doc["image"]], 0, "world", "test"))
    assert model.generate_until([request]) == ask(vlm, ways(vlm)[0], rows[:1], max_new_tokens=128)[:1]
    with pytest.raises(ValueError, match="answers, no likelihoods: choose a task of the kind generate_until"):
        model.loglikelihood([])
