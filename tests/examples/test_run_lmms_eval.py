"""The harness' own logic, on the tiny LLaVA; lmms-eval itself is not installed here."""

import importlib.util
import sys
from abc import ABC, abstractmethod
from types import SimpleNamespace

import pytest
import torch

import baselines
import runs
from baselines.inside import generate_inside
from benchmarks import answering
from benchmarks.questions import Question
from benchmarks.tiny_world import is_right, load_rows
from common import FrozenVLM
from examples import run_lmms_eval
from examples.answer import AnswerConfig, Answerer, answerers_of
from runs import Way

RUN = "results/autoselect_tiny/selector"


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained("tiny/llava", torch.float32)


@pytest.fixture(scope="module")
def rows():
    return load_rows(24)


def ask(vlm, answerer, rows, **how):
    """generate_until() as lmms-eval calls it: a request a question, documents reached through
    task_dict."""
    pruned = run_lmms_eval.Pruned(vlm, lambda calibration: answerer)
    docs = [dict(image=row.image, question=question.question)
            for row in rows for question in row.questions]
    pruned.task_dict = {"world": {"test": docs}}
    return pruned.generate_until([
        SimpleNamespace(args=(f"{vlm.image_token}\n{doc['question']}", {"max_new_tokens": 4, **how},
                              lambda doc: [doc["image"]], i, "world", "test"))
        for i, doc in enumerate(docs)])


def answerer(vlm, methods=(), selectors=()):
    config = AnswerConfig(methods=list(methods), budgets=[16], run=list(selectors))
    trained = {run: runs.load_selector(run, vlm)[0] for run in selectors}
    return answerers_of(config, vlm, trained, None)[-1]


def prompts(vlm, rows, **how):
    """A batch with a row for every question of some rows."""
    pairs = [(row.image, question.question) for row in rows for question in row.questions]
    return vlm.batch([image for image, _ in pairs], [[(text, None)] for _, text in pairs], **how)


@pytest.mark.parametrize("methods, selectors", [
    ((), ()), (("random",), ()), (("holov",), ()), ((), (RUN,))])
def test_answers_are_those_of_the_evaluator(vlm, rows, methods, selectors):
    """With all tokens, a baseline's, and a trained selector's: all questions of a picture in one
    batch, selected for once."""
    answers = ask(vlm, answerer(vlm, methods, selectors), rows)
    way = baselines.way(methods[0], vlm) if methods else None
    expected = []
    for row in rows:
        questions = [Question(str(i), lambda row=row: [row.image], question.question, None, 4)
                     for i, question in enumerate(row.questions)]
        asked = answering.ask(vlm, questions, way)
        batch = prompts(vlm, [row])
        keep = None
        if methods:
            keep = way.select(asked.pictures, 16)
        elif selectors:
            keep = runs.load_selector(RUN, vlm)[0].select(asked.pictures.units, None, 16)
        prompt = (vlm.embed(batch, asked.units) if keep is None
                  else vlm.prune(batch, asked.units, keep * len(questions)))
        expected += vlm.generate(prompt, 4)
    assert answers == expected
    gold = [question.answer for row in rows for question in row.questions]
    right = sum(is_right(a, g) for a, g in zip(answers, gold)) / len(gold)
    assert right > .85 or methods                      # of 16 random tokens most is not to be known


def test_a_selection_inside_the_language_model_answers_too(vlm, rows):
    def rule(view):
        return [torch.arange(16)] * len(view.states)
    way = Way(stages=lambda k, tokens: {1: rule}, ask_twice=True)
    answers = ask(vlm, Answerer("inside 16", way, 16), rows[:2])
    batch = prompts(vlm, rows[:2], ask_twice=True)
    units = vlm.encode(vlm.pictures([row.image for row in rows[:2] for _ in row.questions]))
    assert answers == generate_inside(vlm, vlm.embed(batch, units), {1: rule}, 4)


@pytest.mark.parametrize("until", [" ", [" "], ["", " "]])
def test_answers_end_at_a_stop_string(vlm, rows, until):
    whole = ask(vlm, answerer(vlm), rows[:3])
    cut = ask(vlm, answerer(vlm), rows[:3], until=until)
    assert cut == [answer.split(" ")[0] for answer in whole] != whole


@pytest.mark.parametrize("images, how, message", [
    ([], {}, "at least one"), (["clip.mp4"], {}, "clip.mp4"),
    (None, {"do_sample": True}, "greedy"), (None, {"num_beams": 3}, "greedy")])
def test_what_it_cannot_do_is_refused(vlm, rows, images, how, message):
    pruned = run_lmms_eval.Pruned(vlm, lambda calibration: answerer(vlm))
    pruned.task_dict = {"world": {"test": [[rows[0].image] if images is None else images]}}
    request = SimpleNamespace(args=("what ?", how, lambda doc: doc, 0, "world", "test"))
    with pytest.raises(ValueError, match=message):
        pruned.generate_until([request])


def test_what_decides_how_many_is_steered_on_the_tasks_own_questions(vlm, rows, monkeypatch):
    """To a mean of K over them, and the answers are those of the evaluator."""
    selector = runs.load_selector("results/stepprune_tiny/selector", vlm)[0]
    config = AnswerConfig(budgets=[16])
    asked = []

    def choose(calibration):
        asked.extend(calibration())
        return answerers_of(config, vlm, {"stepprune": selector}, lambda: asked)[-1]
    kept = []
    real = answering.answer_batch

    def watched(*args):
        answered = real(*args)
        kept.extend(row["kept"] for rows in answered.values() for row in rows)
        return answered
    monkeypatch.setattr(answering, "answer_batch", watched)
    monkeypatch.setattr(run_lmms_eval, "STEERING", 20)
    pruned = run_lmms_eval.Pruned(vlm, choose)
    docs = [dict(image=row.image, question=q.question) for row in rows for q in row.questions]
    pruned.task_dict = {"world": {"test": docs}}
    pruned.generate_until([
        SimpleNamespace(args=(doc["question"], {"max_new_tokens": 4}, lambda doc: [doc["image"]],
                              i, "world", "test")) for i, doc in enumerate(docs)])
    assert sum(len(units.grid) for units, _ in asked) == 20 < len(kept) == len(docs)
    assert 10 < sum(kept) / len(kept) < 22 and len({*kept}) > 5


def test_a_budget_that_cannot_be_had_is_refused(vlm, rows):
    with pytest.raises(ValueError, match="the least is 36.8"):
        ask(vlm, answerer(vlm, ["pdrop"]), rows[:1])


@pytest.mark.parametrize("args, message", [
    ([], r"tasks=\[\]: expected some"),
    (["--tasks", "pope", "--methods", "random", "holov"], "expected one at a time"),
    (["--tasks", "pope", "--run", "a", "b"], "expected one at a time")])
def test_options_that_do_not_fit_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        run_lmms_eval.main(args)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None,
                    reason="lmms-eval is installed")
def test_without_lmms_eval_it_says_what_to_install():
    with pytest.raises(ImportError, match="pip install lmms-eval"):
        run_lmms_eval.main(["--tasks", "pope", "--model", "tiny/llava"])


@pytest.fixture
def harness(monkeypatch):
    """lmms-eval's base class, or one with its three abstract methods. evaluator.simple_evaluate()
    hands back what it was called with."""
    called = {}
    if importlib.util.find_spec("lmms_eval") is None:
        class Lmms(ABC):
            def __init__(self):
                self._rank = 0
                self.task_dict = {"not": "ours"}

            @abstractmethod
            def generate_until(self, requests): ...
            loglikelihood = generate_until_multi_round = generate_until
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(lmms=Lmms))
    fakes = {"evaluator": SimpleNamespace(simple_evaluate=lambda **how: called.update(how)),
             "tasks": SimpleNamespace(TaskManager=lambda: None),
             "utils": SimpleNamespace(make_table=lambda results: "the table")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", fake)
    return called


def test_the_adapter_is_a_model_of_lmms_eval(vlm, rows, harness):
    model = run_lmms_eval.adapter()(vlm, lambda calibration: answerer(vlm))
    assert model._rank == 0 and model.task_dict == {}
    model.task_dict["world"] = {"test": [dict(image=rows[0].image)]}
    request = SimpleNamespace(args=(rows[0].questions[0].question, {}, lambda doc: [doc["image"]],
                                    0, "world", "test"))
    expected = ask(vlm, answerer(vlm), rows[:1], max_new_tokens=128)[:1]
    assert model.generate_until([request]) == expected
    with pytest.raises(ValueError, match="answers, no likelihoods: choose a task of the kind "
                                         "generate_until"):
        model.loglikelihood([])


@pytest.mark.parametrize("args, name", [
    (["--model", "tiny/llava"], "all tokens"),
    (["--model", "tiny/llava", "--methods", "holov", "--budget", "16"], "holov 16"),
    (["--run", RUN, "--methods", "holov"], "holov 64"), (["--run", RUN], f"{RUN} 64")])
def test_the_command_hands_one_selection_to_the_toolkit(args, name, harness, capsys):
    run_lmms_eval.main(["--tasks", "pope", "--limit", "3", *args])
    assert harness["model"].choose(None).name == name
    assert harness["tasks"] == ["pope"] and harness["limit"] == 3
    assert "the table" in capsys.readouterr().out
