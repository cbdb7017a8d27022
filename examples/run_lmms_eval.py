"""A pruned VLM inside lmms-eval:

    python -m examples.run_lmms_eval --tasks pope --run runs/autoselect --budget 64

Needs `pip install lmms-eval`, no requirement of this project; its protocols are not the papers'.
Greedy, one question at a time.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import evaluate
import runs
from benchmarks import answering
from benchmarks.questions import Question
from common import FrozenVLM
from examples.answer import AnswerConfig, answerers_of
from runs import many

STEERING = 200                        # questions of a task [ours]


@dataclass
class HarnessConfig:
    tasks: list[str] = many([], "of lmms-eval, such as pope or gqa")
    run: list[str] = many([], "a trained selector; without --model: the latest run")
    model: str | None = HfArg(default=None, help="the frozen VLM, with all tokens if nothing "
                                                 "selects; without it: the run's own")
    methods: list[str] = many([], "a baseline, in place of a run")
    ways: list[str] = many([], "a way in which the run's method is asked, in place of its own, "
                               "such as exactly")
    budget: int = HfArg(default=64, help="K, kept tokens; where the method decides, their mean "
                                         f"over {STEERING} questions of the task [ours]")
    limit: int | None = HfArg(default=None, help="documents of each task; without it: all")

    def __post_init__(self):
        runs.check_options(self, budget=1, limit=1)
        if not self.tasks:
            raise ValueError("tasks=[]: expected some of lmms-eval, such as pope or gqa")
        for name in ("run", "methods", "ways"):
            if len(getattr(self, name)) > 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected one at a time")


class Pruned:
    """The model's side. choose(calibration) -> the Answerer of a task; calibration: see
    runs.Selector.ways(). task_dict: see question()."""

    def __init__(self, vlm: FrozenVLM, choose: Callable):
        super().__init__()
        self.vlm = vlm
        self.choose = choose
        self.task_dict = {}

    def question(self, request) -> Question:
        """A request's args are (context, gen_kwargs, doc_to_visual, doc_id, task, split), its
        document is task_dict[task][split][doc_id]. Raises ValueError where that has no pictures of
        PIL, and for sampling."""
        context, how, doc_to_visual, doc_id, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc_id])
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"{task} {split} {doc_id} has {images!r:.80}: expected PIL images, at "
                             "least one")
        if how.get("do_sample") or (how.get("num_beams") or 1) > 1:
            raise ValueError(f"{task} wants {how}: expected greedy decoding, do_sample=False and "
                             "num_beams=1")
        prompt = context.replace(self.vlm.image_token, " ").strip()
        return Question(f"{task} {doc_id}", lambda: images, prompt, None,
                        how.get("max_new_tokens", 128))

    def generate_until(self, requests) -> list[str]:
        """One answer a request, see question(). A method that decides how many tokens it keeps is
        steered to K on some of the task's own questions, of which no answer is read.

        Raises ValueError where K cannot be had, and for a prompt that cannot be read.
        """
        def calibration():
            some = [self.question(request) for request in requests[::step][:STEERING]]
            return answering.calibration_batches(self.vlm, some, 8)
        step = max(len(requests) // STEERING, 1)
        answerer = self.choose(calibration)
        key = answerer.name, answerer.budget
        answers = []
        for request in tqdm(requests, "generate_until"):
            part = [(0, self.question(request))]
            rows = answering.answer_batch(self.vlm, part, {key: answerer.way})[key]
            if isinstance(rows, answering.Impossible):
                raise rows
            answer = rows[0]["answer"]
            stops = request.args[1].get("until") or []
            for stop in filter(None, [stops] if isinstance(stops, str) else stops):
                answer = answer.split(stop)[0]         # greedy: the same as stopping there
            answers.append(answer)
        return answers


def adapter() -> type:
    """Pruned as a model class of lmms-eval. Raises ImportError where the toolkit is missing."""
    try:
        model = importlib.import_module("lmms_eval.api.model")
    except ImportError as error:
        raise ImportError("lmms-eval is missing: pip install lmms-eval, in an environment of its "
                          "own") from error

    class Adapter(Pruned, model.lmms):
        def loglikelihood(self, requests):
            raise ValueError("a pruned model gives answers, no likelihoods: choose a task of the "
                             "kind generate_until")
        generate_until_multi_round = loglikelihood
    return Adapter


def main(args: list[str] | None = None) -> None:
    (harness,) = runs.Parser(HarnessConfig, description=__doc__).parse_args_into_dataclasses(args)
    wrapped = adapter()
    config = AnswerConfig(run=harness.run, model=harness.model, methods=harness.methods,
                          ways=harness.ways, budgets=[harness.budget])
    evaluate.settle(config)
    if config.methods:
        config.run = []                                # it only said which model
    selectors = evaluate.load_selectors(config)
    vlm = FrozenVLM.from_pretrained(config.model, getattr(torch, config.dtype), config.device)
    model = wrapped(vlm, lambda steer: answerers_of(config, vlm, selectors, steer)[-1])
    evaluator, tasks, utils = (importlib.import_module(f"lmms_eval.{name}")
                               for name in ("evaluator", "tasks", "utils"))
    print(utils.make_table(evaluator.simple_evaluate(
        model=model, tasks=harness.tasks, batch_size=1, task_manager=tasks.TaskManager(),
        limit=harness.limit)))


if __name__ == "__main__":
    runs.command(main)
