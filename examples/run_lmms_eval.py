"""A pruned VLM inside lmms-eval: `python examples/run_lmms_eval.py --tasks pope --run runs/autoselect --budget 64`.

Needs `pip install lmms-eval`, no requirement of this project; its protocols are not the papers'. Greedy, one by one."""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script, the root is not on the path yet
from answer import PLAIN, AnswerConfig, Way, ways_of  # noqa: E402
from common import FrozenVLM  # noqa: E402
from evaluate import BASELINES, check  # noqa: E402


class Pruned:
    """The model's side. way: see answer.Way. look: what encode() has to show it. task_dict: see generate_until()."""

    def __init__(self, vlm: FrozenVLM, way: Way, look: dict | None = None):
        super().__init__()
        self.vlm, self.way, self.look, self.task_dict = vlm, way, look, {}

    @torch.no_grad()
    def answer(self, images: list[Image.Image], question: str, max_new_tokens: int) -> str:
        vlm, way = self.vlm, self.way
        batch = vlm.batch([images], [[(question.replace(vlm.image_token, " ").strip(), None)]], twice=way.layer > 0)
        units = vlm.encode(batch, self.look)
        if way.layer:
            rule = {way.layer: lambda look: way.select(look.states, look.valid)}
            return vlm.generate_within(vlm.embed(batch, units), rule, max_new_tokens)[0]
        keep = [k.sort().values for k in way.select(units, vlm.question(batch))] if way.select else None
        return vlm.generate(vlm.prune(batch, units, keep) if keep else vlm.embed(batch, units), max_new_tokens)[0]

    def generate_until(self, requests) -> list[str]:
        """One answer a request; its args are (context, gen_kwargs, doc_to_visual, doc_id, task, split), its document is
        task_dict[task][split][doc_id]. Raises ValueError where that has no pictures of PIL, and for sampling."""
        answers = []
        for context, how, doc_to_visual, doc_id, task, split in tqdm([r.args for r in requests], "generate_until"):
            images = doc_to_visual(self.task_dict[task][split][doc_id])
            if not images or not all(isinstance(image, Image.Image) for image in images):
                raise ValueError(f"{task} {split} {doc_id} has {images!r:.80}: expected PIL images, at least one")
            if how.get("do_sample") or (how.get("num_beams") or 1) > 1:
                raise ValueError(f"{task} wants {how}: expected greedy decoding, do_sample=False and num_beams=1")
            said = self.answer(images, context, how.get("max_new_tokens", 128))
            stops = how.get("until") or []
            for stop in filter(None, [stops] if isinstance(stops, str) else stops):
                said = said.split(stop)[0]             # decoding is greedy: the same as stopping there
            answers.append(said)
        return answers


def adapter() -> type:
    """Pruned as a model class of lmms-eval. Raises ImportError where the toolkit is missing."""
    try:
        from lmms_eval.api.model import lmms
    except ImportError as error:
        raise ImportError("lmms-eval is missing: pip install lmms-eval, in an environment of its own") from error

    class Adapter(Pruned, lmms):
        def loglikelihood(self, requests):
            raise ValueError("a pruned model gives answers, no likelihoods: choose a task of the kind generate_until")
        generate_until_multi_round = loglikelihood
    return Adapter


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", required=True, help="of lmms-eval, such as pope or gqa")
    parser.add_argument("--run", nargs=1, default=[], help="trained selector [the latest; none if --model is given]")
    parser.add_argument("--model", help="the frozen VLM, with all tokens if nothing selects [the run's own]")
    parser.add_argument("--methods", nargs=1, default=[], choices=PLAIN, help="a baseline")
    parser.add_argument("--budget", type=int, default=64, help="K [%(default)s]")
    parser.add_argument("--limit", type=int, help="documents of each task [all]")
    args, wrapped = parser.parse_args(args), adapter()
    cfg = AnswerConfig(run=args.run, model=args.model, methods=args.methods, budgets=[args.budget], exact=True)
    runs, name = check(cfg)
    vlm = FrozenVLM.from_pretrained(name, device=cfg.device)
    look = {key: what for each in args.methods for key, what in BASELINES[each].look(vlm).items()}
    model = wrapped(vlm, ways_of(cfg, vlm, [] if args.methods else runs)[-1], look)
    from lmms_eval import evaluator, tasks, utils
    print(utils.make_table(evaluator.simple_evaluate(
        model=model, tasks=args.tasks, batch_size=1, task_manager=tasks.TaskManager(), limit=args.limit)))


if __name__ == "__main__":
    main()
