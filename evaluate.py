"""What a selector keeps, and what that costs: `python evaluate.py` on the latest run.

Answers the test questions of the tiny world with all visual tokens, and with K of them chosen by each method, on
the same rows. Prints accuracy per family, retention (the paper's Avg.: mean over families of pruned / unpruned),
evidence recall (share of the tokens that show the answer which were kept) and the time of each stage; saves them
as JSON and Markdown beside three pictures. answer.py answers about any picture.

With --benchmarks it asks the questions of the papers' benchmarks instead, from the hub or from local copies. Answers go
into predictions files: a run that was cut off goes on, `accelerate launch evaluate.py ...` shares one among GPUs, and
--rescore makes the tables anew from the files alone.
"""

import hashlib
import inspect
import json
import zlib
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import HfArgumentParser

import autoselect
import recon_selector
import stepprune
from baselines import (
    cdpruner,
    cls_attention,
    dart,
    divprune,
    fastv,
    hiprune,
    hired,
    holov,
    pact,
    pdrop,
    prumerge,
    prunesid,
    random,
    sparsevlm,
    tome,
    visionzip,
)
from benchmarks import (
    ai2d,
    chartqa,
    classify,
    docvqa,
    egoschema,
    gqa,
    infovqa,
    longvideobench,
    mmbench,
    mmbench_cn,
    mme,
    mmmu,
    nextqa,
    pope,
    predictions,
    rebuild,
    runner,
    scenes,
    scienceqa,
    scores,
    seed,
    seed_all,
    seed_video,
    textvqa,
    vizwiz,
    vqav2,
    world,
)
from benchmarks.asking import Asked, Selector, answered, for_all, per_picture, recall
from benchmarks.pictures import (
    draw_adaptive,
    draw_cosines,
    draw_curve,
    draw_kept,
    draw_rebuilt,
    draw_tokens,
    draw_training,
)
from benchmarks.questions import sample
from benchmarks.report import (
    PUBLISHED,
    Hit,
    ablation_table,
    adaptive,
    adaptive_table,
    cell,
    inside_table,
    refresh,
    spread,
    summarise,
    table,
)
from benchmarks.speed import Clock, flops_table, measure_pointer, measure_speed, speed_table, token_budget
from common import FrozenVLM, Units
from train import load_run, option, read_run, write_whole

BASELINES = {"random": random, "cls_attention": cls_attention, "hired": hired, "hiprune": hiprune, "divprune": divprune,
             "holov": holov, "prunesid": prunesid, "cdpruner": cdpruner, "visionzip": visionzip, "prumerge": prumerge,
             "prumerge+": prumerge, "tome": tome}
# name -> module and more of its stages(); those that drop in stages count K on average over layers, or after the last
INSIDE = {"fastv": (fastv, {}), "dart": (dart, {}), "pact": (pact, {}), "pdrop": (pdrop, {}),
          "pdrop_last": (pdrop, {"count": "last"}), "sparsevlm": (sparsevlm, {}),
          "sparsevlm_last": (sparsevlm, {"count": "last"}), "sparsevlm_plus": (sparsevlm, {"plus": True}),
          "sparsevlm_plus_last": (sparsevlm, {"plus": True, "count": "last"})}
# name -> module with NAME, MAIN, load() and score(); a local copy is the folder of this name
BENCHMARKS = {"scenes": world, "gqa": gqa, "mmbench": mmbench, "mmbench_cn": mmbench_cn, "mme": mme, "pope": pope,
              "scienceqa": scienceqa, "vqav2": vqav2, "textvqa": textvqa, "seed": seed, "seed_all": seed_all,
              "vizwiz": vizwiz, "docvqa": docvqa, "infovqa": infovqa, "chartqa": chartqa, "mmmu": mmmu, "ai2d": ai2d,
              "nextqa": nextqa, "egoschema": egoschema, "longvideobench": longvideobench, "seed_video": seed_video}
# LLaVA-1.5's own prompt; the template that comes with it on the hub lacks the first sentence
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. "
          "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
          "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}"
          "{% else %}{{ 'ASSISTANT: ' + m['content'][0]['text'] }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


@dataclass
class EvalConfig:
    run: list[str] = field(default_factory=list, metadata={
        "help": "run folders [the latest in runs/]; several (seeds) give one line each, then mean and spread"})
    model: str | None = option(None, "the frozen VLM [the run's own]")
    methods: list[str] = field(default_factory=lambda: ["random", "cls_attention"], metadata={
        "help": f"baselines beside the runs: {', '.join([*BASELINES, *INSIDE])}; K of ..._last is the number after the "
                "last stage, not the mean over layers; evidence keeps what covers the asked things most; all: each"})
    positions: str = option("original", "of the tokens that are kept; reindex: numbered anew, as the released code of "
                                        "most rivals does", choices=["original", "reindex"])
    curves: str | None = option(None, "draw the training curves of --run into this file and do nothing else")
    gated: bool = option(False, "also answer through each run's noise gate instead of removing tokens (Figure 5)")
    budgets: list[float] = field(default_factory=lambda: [48, 32, 16], metadata={
        "help": "K, kept tokens; the mean of them where the selector decides [paper: 33.3, 22.2 and 11.1 %%]; with "
                "--benchmarks also below 1, as a share of each picture's tokens"})
    exact: bool = option(False, "stepprune: also keep exactly K")
    max_keep: int | None = option(None, "stepprune: most tokens it may keep [twice the T_max it was trained with]")
    calibration: int = option(2000, "stepprune: questions, at least, that find the stop bias for a mean of K")
    n: int = option(1000, "questions, at least; the families share them")
    batch: int = option(32, "pictures encoded at a time; with --benchmarks, questions")
    benchmarks: list[str] = field(default_factory=list, metadata={"help": f"ask these: {' '.join(BENCHMARKS)}"})
    data_root: str | None = option(None, "folder with a local copy of each benchmark, under its name [the hub]")
    options: list[str] = field(default_factory=list, metadata={
        "help": "of a benchmark's load(), such as pope.split=random seed_all.frames=1 mmbench.legacy=true"})
    rescore: str | None = option(None, "folder of predictions files: tables from these alone, without a model")
    sample: int | None = option(None, "questions of each benchmark, drawn at random [all]")
    seed: int = option(0, "of that draw, of the random baseline and of the intervals")
    resamples: int = option(1000, "of the questions, for the intervals")
    partial: bool = option(False, "average also where benchmarks are missing, though such averages do not compare")
    pad: str | None = option(None, "pictures to a square first, as LLaVA-1.5 does, or left to the processor [square "
                             "for the family llava, none for others]", choices=["square", "none"])
    style: str = option("checkpoint", "the prompt's frame: the checkpoint's chat template, or LLaVA-1.5's own with its "
                        "first sentence [paper: vicuna_v1]", choices=["checkpoint", "vicuna_v1"])
    backbone: str | None = option(None, "whose printed figures to show [by the model's name; see "
                                  "benchmarks/published.json]")
    ratio: int = option(0, "also time so many questions of each benchmark in batches and one by one")
    split: str = option("test", "scenes to ask about", choices=["test", "calibration"])
    out: str | None = option(None, "folder of table and pictures [the run folder]")
    pictures: bool = option(True, "draw the curve, the kept patches and the cosine matrix")
    random_weights: bool = option(False, "build --model from its config alone: to time it, for it answers nothing")
    dtype: str = option("bfloat16", "of the frozen VLM", choices=["bfloat16", "float32", "float16"])
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run")
    ablations: str | None = option(None, "write results/ablations/<method>.md, the variants beside the paper's",
                                   choices=[*PUBLISHED])
    classify: str | None = option(None, "a ViT classifier, tiny/vit, a folder or hub id, that sees the chosen patches "
                                        "of --n pictures alone, instead of the VLM's answers (AutoSelect 4.3)")
    images: str | None = option(None, "with --classify: a folder of class folders [the tiny world's scenes]")
    labels: str | None = option(None, "with --classify --images: JSON of each class folder's name -> index or label "
                                      "[its name is the label]")
    rule: str = option("nearest", "with --classify: how a mask reaches another grid", choices=["nearest", "area"])
    speed: bool = option(False, "time selection and prefill on a LLaVA-shaped model with random weights instead")

    def __post_init__(self):
        """Raises ValueError for a budget that is neither a number of tokens nor a share."""
        if wrong := [k for k in self.budgets if k <= 0 or (k >= 1 and k != int(k))]:
            raise ValueError(f"budgets={wrong}: expected whole numbers of tokens, or shares between 0 and 1")
        self.budgets = [int(k) if k >= 1 else k for k in self.budgets]
        if min(self.budgets) < 1 and not self.benchmarks:
            raise ValueError(f"budgets={self.budgets}: expected whole numbers; shares go with --benchmarks")
        if self.methods == ["all"]:
            self.methods = [*BASELINES, *INSIDE] + ["evidence"] * (not self.benchmarks)


# --------------------------------------------------------------------------------------------------- measuring

def rival(name: str, vlm) -> Selector:
    """A baseline of BASELINES. Raises ValueError, with the reason, if it cannot serve this backbone."""
    module = BASELINES[name]
    look = module.look(vlm)
    if name == "cdpruner":
        return Selector(lambda asked, k: cdpruner.select(asked.units, k, question=asked.question), look=look)
    if name == "tome":
        blocks = vlm.adapter.deep + 1
        return Selector(lambda asked, k: for_all(asked.owner, tome.select(
            asked.pictures, k, tower=asked.merged, blocks=blocks)), each=False, look=look)
    if name == "prumerge+":
        return per_picture(lambda units, k: prumerge.select(units, k, plus=True), look)
    return per_picture(module.select, look)


def evidence_of(rows, units) -> list[torch.Tensor]:
    """For every question of every row, (n_b,) share of each unit that shows its answer; 0 everywhere where the picture
    reaches the encoder as several views, for which no ground truth is at hand: recall is nan there."""
    known = [n == 1 for n in units.views or [1] * len(rows)]
    return [row.evidence(q, units.grid[b]) if known[b] else torch.zeros(units.counts[b])
            for b, row in enumerate(rows) for q in row.questions]


def oracle(evidence, keep: int) -> list[torch.Tensor]:
    """The upper bound: per question the `keep` units with most evidence; of equals the first wins."""
    return [e.argsort(descending=True, stable=True)[:keep].sort().values for e in evidence]


def stepwise(selector, biases: dict, most: int, exact: bool = False) -> Selector:
    """StepPrune at the stop bias calibrated for K, or made to keep exactly K."""
    def chosen(asked, k):
        how = dict(least=k, most=k) if exact else dict(stop_bias=biases[k], most=most)
        return selector.select(*asked.units.pad(), *asked.question, **how)
    return Selector(chosen, adaptive=not exact)


def prompts(vlm, part, twice: bool = False):
    """A batch with one row a question, asked behind the image; twice: before it too."""
    asked = [(row.image, q.question) for row in part for q in row.questions]
    return vlm.batch([image for image, _ in asked], [[(question, None)] for _, question in asked], twice=twice)


@torch.no_grad()
def ask(vlm, part, clock=None, twice=False, look=None) -> tuple[Asked, dict]:
    """The questions of some rows as Asked, and as the batch that the VLM answers; twice: before the image too."""
    owner = [b for b, row in enumerate(part) for _ in row.questions]
    pixels, batch = vlm.pictures([row.image for row in part]), prompts(vlm, part, twice)
    with (clock or Clock(vlm.device))("vision", len(part)):
        units = vlm.encode(pixels, look)
    return Asked(units, owner, units.rows(owner), vlm.question(batch), evidence_of(part, units),
                 merged=lambda rule: vlm.merged(pixels, rule)), batch


@torch.no_grad()
def measure(vlm, selectors: dict, rows, budgets, batch: int = 32, positions: str = "original") -> tuple[dict, Clock]:
    """Answer all questions with all tokens and with each selector's K -> ({(name, K): list of Hit}, clock).

    selectors: name -> Selector, or an AutoSelect module, whose gate then drowns tokens instead of removing them. The
    unpruned model is ("vanilla", 0).
    """
    results, clock = {}, Clock(vlm.device)
    torch.manual_seed(0)                               # of a random scorer and of the noise in a gate
    look = {name: what for s in selectors.values() for name, what in getattr(s, "look", {}).items()}
    turns = [("vanilla", 0), *((name, k) for name, s in selectors.items()
                               for k in getattr(s, "budgets", None) or budgets)]
    for start in tqdm(range(0, len(rows), batch), "evaluate"):
        part = rows[start:start + batch]
        asked, questions = ask(vlm, part, clock, look=look)
        inside = any(getattr(s, "layer", None) is not None for s in selectors.values())
        doubled = prompts(vlm, part, twice=True) if inside else None
        gold = [(q, len(row.scene.things)) for row in part for q in row.questions]
        for name, budget in turns:
            selector = selectors.get(name)
            twice = getattr(selector, "layer", None) is not None
            said = answered(vlm, selector, asked, doubled if twice else questions, f"{name} {budget}", budget, clock, 4,
                            positions)
            found = recall(said.keep, asked.evidence) if said.keep else [1.] * len(gold)
            kept = [len(k) for k in said.keep] if said.keep else [len(e) for e in asked.evidence]
            seen = [token_budget(n, left, len(vlm.lm.layers)) if getattr(selector, "stages", None) else None
                    for n, left in zip(said.entered, said.later)]
            results.setdefault((name, budget), []).extend(
                Hit(q.family, scenes.score(a, q.answer), r, k, things, s)
                for (q, things), a, r, k, s in zip(gold, said.texts, found, kept, seen))
    return results, clock


@torch.no_grad()
def calibrate(vlm, selector, budgets, most: int, n: int, batch: int = 32) -> dict[int, float]:
    """Stop bias per wished mean K, from questions of the calibration scenes: one long episode each serves them all."""
    rows = scenes.load(n, "calibration", scenes.SIZES[vlm.family])
    margins = []
    for start in tqdm(range(0, len(rows), batch), "calibrate"):
        asked, _ = ask(vlm, rows[start:start + batch])
        v, valid = asked.units.pad()
        margin = selector.rollout(selector.memory(v, valid, *asked.question), valid, -1e4, most=most).margin
        margins.append(F.pad(margin, (0, most - margin.shape[1]), value=-torch.inf))     # no token left: stop wins
    margin = torch.cat(margins)
    tokens = vlm.encode(vlm.pictures([rows[0].image])).counts[0] if min(budgets) < 1 else 1
    biases = {k: stepprune.calibrate(margin, k * tokens if k < 1 else k) for k in budgets}
    print(f"unsteered, it keeps {stepprune.stops(margin, 0.).double().mean():.1f} tokens on average; stop bias "
          + ", ".join(f"{b:.2f} for {k}" for k, b in biases.items()))
    return biases


# -------------------------------------------------------------------------------------------------------- main

def latest_run() -> str:
    """The run in runs/ that finished last. Raises FileNotFoundError when there is none."""
    done = sorted(Path("runs").glob("**/selector/model.safetensors"), key=lambda p: p.stat().st_mtime)
    if not done:
        raise FileNotFoundError("runs/ holds no finished run: python train.py --method autoselect makes one")
    return str(done[-1].parent.parent)


def states_of(vlm, batch, units: Units, layer: int) -> Units:
    """What a selector reads: the vision encoder's features, or the states behind a layer of the language model."""
    return replace(units, feats=vlm.visual_states(vlm.embed(batch, units), layer)) if layer else units


def longest(cfg: EvalConfig, selector) -> int:
    """Most tokens that StepPrune may keep at test time."""
    return cfg.max_keep or 2 * selector.cfg.max_steps


def bias_of(cfg: EvalConfig, vlm, selector) -> dict | None:
    """Stop bias per budget of a selector that decides for itself; None for one that does not."""
    if not isinstance(selector, stepprune.StepPrune):
        return None
    return calibrate(vlm, selector, cfg.budgets, longest(cfg, selector), cfg.calibration)


@torch.no_grad()
def look(selector, units, question, k: int, biases: dict | None, most: int | None = None):
    """What to draw: scores (B, N), keep, the order of the picks or None. A pick's score is its turn, from the end."""
    v, valid = units.pad()
    if biases is None:
        return selector.scores(v, valid), selector.select(v, valid, k), None
    orders = selector.picks(v, valid, *question, stop_bias=biases[k], most=most or 2 * selector.cfg.max_steps)
    scores = torch.zeros(valid.shape, device=v.device)
    for row, order in zip(scores, orders):
        row[order] = torch.arange(len(order), 0, -1, device=v.device).to(row) / len(order)
    return scores, [order.sort().values for order in orders], orders


def check(cfg: EvalConfig) -> tuple[list[str], str]:
    """The runs to evaluate and their model. Raises before anything is loaded."""
    known = [*BASELINES, *INSIDE, "evidence"]
    cfg.methods = known if cfg.methods == ["all"] else cfg.methods
    if unknown := set(cfg.methods) - {*known}:
        raise ValueError(f"methods={sorted(unknown)}: known are {known}, and all")
    runs = cfg.run or ([] if cfg.model else [latest_run()])
    models = [read_run(run)[1]["training"]["model"] for run in runs]
    return runs, cfg.model or models[0]


def beside_condition(layer: int) -> dict:
    """What a selection inside the language model is compared with: nothing removed, and as many at random."""
    def at_random(states, valid, k):
        counts = valid.sum(1)
        image_of = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        return random.select(Units(states[valid], image_of, [(1, n) for n in counts.tolist()]), k)
    return {"asked twice": Selector(None, layer=0, budgets=("all",)), "random inside": Selector(at_random, layer=layer)}


def at_depth(layers: tuple, depth: int) -> tuple:
    """Layers that a paper names for models of 28 to 32, the same where there are as many; else scaled by depth / 32,
    each at least one above the one before it [ours]."""
    found = []
    for left, i in zip(range(len(layers), 0, -1), layers):
        i = i if depth >= 28 else round(i * depth / 32)
        found.append(min(max(i, found[-1] + 1 if found else 1), depth - left))
    return tuple(found)


def rival_inside(name: str, vlm, budgets, known: bool = True) -> Selector:
    """A rival inside the language model, at the budgets that its schedule can have; the others are printed. known: the
    pictures are the tiny world's; else each is tried when it comes."""
    (module, how), depth, possible = INSIDE[name], len(vlm.lm.layers), []
    layers, sizes = at_depth(module.LAYERS, depth), scenes.SIZES[vlm.family] if known else ()
    for k in budgets:
        try:
            if known:
                module.stages(k, [w * h // vlm.unit_side ** 2 for w, h in sizes], depth, layers, **how)
            possible.append(k)
        except ValueError as error:
            print(f"{name} {k}: left out, {error}")
    return Selector(None, budgets=tuple(possible), stages=lambda k, n: module.stages(k, n, depth, layers, **how))


def crop_by_crop(selector, units: Units, k: int | None) -> list:
    """keep of a ReconSelector, which chooses in each crop of a picture by itself; k of the whole picture."""
    v, valid = units.apart().pad()
    counts, first, wanted = valid.sum(1).tolist(), 0, None if k is None else []
    for n in units.views or [1] * len(units.grid) if k is not None else ():
        wanted += recon_selector.per_crop(k, counts[first:first + n])
        first += n
    return units.together(selector.select(v, valid, wanted))


def kinds_of(cfg: EvalConfig, selector, config, biases: dict | None) -> dict:
    """The ways in which a trained selector is asked: suffix of its name -> Selector, or AutoSelect's module, gated."""
    if config.method == "stepprune":
        kinds = {"": stepwise(selector, biases, longest(cfg, selector))}
        if cfg.exact:
            kinds[" exactly"] = stepwise(selector, biases, longest(cfg, selector), exact=True)
        return kinds
    if getattr(config, "condition", 0):
        best = Selector(selector.select, layer=config.condition)
        own = Selector(lambda states, valid, _: selector.select(states, valid), layer=config.condition)
    elif config.method == "recon":
        best = per_picture(lambda units, k: crop_by_crop(selector, units, k))
        own = per_picture(lambda units, _: crop_by_crop(selector, units, None))
    else:
        best = per_picture(lambda units, k: selector.select(*units.pad(), k))
    if config.method == "recon":
        return {"": best, " mask": own._replace(budgets=("mask",))}
    return {"": best, " gated": selector} if cfg.gated else {"": best}


def selectors_of(cfg: EvalConfig, vlm, trained: dict, biases: dict) -> tuple[dict, dict]:
    """name -> Selector for baselines and runs, and label -> names of the runs that differ in their seed alone."""
    selectors = {}
    for name in cfg.methods:
        try:
            selectors[name] = (Selector(lambda asked, k: oracle(asked.evidence, k)) if name == "evidence" else
                               rival_inside(name, vlm, cfg.budgets, not cfg.benchmarks) if name in INSIDE else
                               rival(name, vlm))
        except ValueError as error:
            print(f"{name}: left out, {error}")
    groups = {}
    for name, (selector, config) in trained.items():
        more = kinds_of(cfg, selector, config, biases[name])
        if getattr(config, "condition", 0):
            selectors |= beside_condition(config.condition)
        same = str({k: v for k, v in vars(config).items() if k not in ("seed", "run")})
        for kind, each in more.items():
            selectors[name + kind] = each
            groups.setdefault(config.method + kind + same, (config.method + kind, []))[1].append(name + kind)
    return selectors, {f"{label}, mean of {len(names)}": names for label, names in groups.values() if len(names) > 1}


def main(args=None) -> list[dict]:
    (cfg,) = HfArgumentParser(EvalConfig, description=__doc__).parse_args_into_dataclasses(args)
    if cfg.speed:
        return speed(cfg)
    if cfg.ablations:
        text = ablation_table(cfg.ablations)
        print(text)
        return write_whole(Path(f"results/ablations/{cfg.ablations}.md"), lambda p: p.write_text(text + "\n"))
    if cfg.curves:
        return draw_training(cfg.run, Path(cfg.curves))
    if cfg.rescore:
        return report_benchmarks(cfg, Path(cfg.rescore), Path(cfg.out or cfg.rescore))
    runs, model = check(cfg)
    if cfg.benchmarks:
        return ask_benchmarks(cfg, runs, model)
    vlm = FrozenVLM.from_pretrained(model, getattr(torch, cfg.dtype), cfg.device)
    out = Path(cfg.out or (runs[0] if runs else f"runs/{Path(model).name}"))
    out.mkdir(parents=True, exist_ok=True)
    trained = {str(run): load_run(run, vlm) for run in runs}
    biases = {name: None if cfg.classify else bias_of(cfg, vlm, selector) for name, (selector, _) in trained.items()}
    selectors, groups = selectors_of(cfg, vlm, trained, biases)
    if cfg.classify:
        return report_classify(cfg, vlm, selectors, out)
    return ask_world(cfg, vlm, trained, biases, selectors, groups, out)


def ask_world(cfg: EvalConfig, vlm, trained: dict, biases: dict, selectors: dict, groups: dict, out: Path) -> list:
    """The tiny world's test questions: tables and pictures of the selectors into `out`."""
    rows = scenes.load(cfg.n, cfg.split, scenes.SIZES[vlm.family])
    results, clock = measure(vlm, selectors, rows, cfg.budgets, cfg.batch, cfg.positions)
    lines = summarise(results, clock)
    for label, names in groups.items():
        lines += spread(lines, names, label)
    text = table(lines)
    print(f"\n{text}\n\n{lines[0]['n']} questions about {len(rows)} {cfg.split} scenes of the tiny world, "
          f"{vlm.family}, {cfg.device}. It shows the mechanism; these are not the papers' numbers.")
    write_whole(out / "evaluation.json", lambda p: p.write_text(json.dumps(lines, indent=1)))
    write_whole(out / "evaluation.md", lambda p: p.write_text(text + "\n"))
    single = {name for names in groups.values() for name in names}
    short = table([line for line in lines if line["method"] not in single])
    write_whole(out / "summary.md", lambda p: p.write_text(short + "\n"))
    if (card := out / "selector/README.md").exists():
        refresh(card)
    if text := inside_table(lines):
        print(f"\n{text}")
        write_whole(out / "inside.md", lambda p, text=text: p.write_text(text + "\n"))
    found = {key: adaptive(hits) for key, hits in results.items() if len({h.kept for h in hits}) > 1}
    if found:
        text = adaptive_table(found)
        print(f"\n{text}")
        write_whole(out / "adaptive.md", lambda p: p.write_text(text + "\n"))
    rebuilders = {name: selector for name, (selector, config) in trained.items()
                  if config.method == "recon" and not config.condition}
    if rebuilders:
        report_rebuilding(cfg, vlm, rebuilders, rows, out)
    readers = {name: each for name, each in trained.items() if getattr(each[1], "condition", 0)}
    if readers:
        report_condition(cfg, vlm, readers, rows, out)
    if cfg.pictures:
        draw_curve([line for line in lines if line["method"] not in single],
                   rows[0].image.width * rows[0].image.height // 144, out / "curve.png")
        if found:
            name = next(iter(found))[0]
            draw_adaptive({key: x for key, x in found.items() if key[0] == name}, out / "adaptive.png")
        if trained:
            first = next(iter(trained))
            logged = [run for run, (_, config) in trained.items() if (Path(run) / "log.jsonl").exists()
                      and config.method == trained[first][1].method]           # a shared selector has no log
            if logged:
                draw_training(logged, out / "training.png")
            draw_run(cfg, vlm, *trained[first], rows[:64], biases[first], out)
        print(f"pictures: {', '.join(str(p) for p in sorted(out.glob('*.png')))}")
    return lines


def by_name(seed: int) -> Selector:
    """Random tokens that depend on the picture and the seed alone, whatever batch it comes in."""
    def chosen(asked, k):
        keep = [random.select(asked.pictures.rows([b]), k, seed=zlib.crc32(f"{seed} {name}".encode()))[0]
                for b, name in enumerate(asked.names)]
        return [keep[b] for b in asked.owner]
    return Selector(chosen, each=False)


def turns_of(cfg: EvalConfig, vlm, runs: list[str]) -> tuple[dict, dict]:
    """{(method, K): Selector, or None for all tokens}, and {method: what its predictions depend on besides}."""
    trained = {str(run): load_run(run, vlm) for run in runs}
    biases = {name: bias_of(cfg, vlm, selector) for name, (selector, _) in trained.items()}
    selectors, _ = selectors_of(cfg, vlm, trained, biases)
    if "random" in selectors:
        selectors["random"] = by_name(cfg.seed)
    turns = {scores.VANILLA: None, **{(name, k): selector for name, selector in selectors.items()
                                      for k in selector.budgets or cfg.budgets}}
    of = {name: next((run for run in trained if name in (run, f"{run} mask", f"{run} exactly")), None)
          for name in selectors}
    weights = {name: {"weights": hashlib.sha256(Path(run, "selector/model.safetensors").read_bytes()).hexdigest()[:16],
                      "max_keep": cfg.max_keep, "calibration": cfg.calibration if biases[run] else None}
               for name, run in of.items() if run}
    return turns, weights


def options_of(cfg: EvalConfig) -> dict[str, dict]:
    """{benchmark: {option: value}} of --options. Raises ValueError for one that its load() does not have."""
    found = {name: {} for name in cfg.benchmarks}
    for text in cfg.options:
        (name, _, key), value = text.split("=")[0].partition("."), text.partition("=")[2]
        known = [*inspect.signature(BENCHMARKS[name].load).parameters] if name in found else []
        if key not in {*known} - {"path", "family"}:
            raise ValueError(f"options={text!r}: expected <benchmark>.<option>=<value> of {', '.join(found)}, with an "
                             f"option of its load(): {', '.join(known)}")
        try:
            found[name][key] = json.loads(value)
        except ValueError:
            found[name][key] = value                   # a word
    return found


def ask_benchmarks(cfg: EvalConfig, runs: list[str], model: str) -> list[dict]:
    """--benchmarks: ask what has no answer yet, then report_benchmarks()."""
    if unknown := set(cfg.benchmarks) - {*BENCHMARKS}:
        raise ValueError(f"benchmarks={sorted(unknown)}: known are {[*BENCHMARKS]}")
    if cfg.gated or "evidence" in cfg.methods:
        raise ValueError("gated and the method evidence are for the tiny world, without --benchmarks")
    state = PartialState(cpu=not cfg.device.startswith("cuda"))
    vlm = FrozenVLM.from_pretrained(model, getattr(torch, cfg.dtype),
                                    state.device if state.num_processes > 1 else cfg.device,
                                    random_weights=cfg.random_weights)
    if cfg.style == "vicuna_v1":
        if vlm.family not in ("llava", "llava_next"):
            raise ValueError(f"style=vicuna_v1 is LLaVA's: expected checkpoint for the family {vlm.family}")
        vlm.processor.chat_template = VICUNA
    pad, out = cfg.pad or ("square" if vlm.family == "llava" else "none"), Path(cfg.out or f"runs/{Path(model).name}")
    asked, options = {}, options_of(cfg)
    for name in cfg.benchmarks:                        # all, before the first is asked
        path = Path(cfg.data_root, name) if cfg.data_root and name != "scenes" else None
        asked[name] = sample(BENCHMARKS[name].load(path, family=vlm.family, **options[name]), cfg.sample, cfg.seed,
                             scores.group)
    turns, weights = turns_of(cfg, vlm, runs)
    for name, questions in asked.items():
        files = {}
        for method, k in turns:
            header = {"benchmark": name, "model": model, "fingerprint": vlm.fingerprint(), "method": method,
                      "budget": k, "style": cfg.style, "pad": pad, "options": options[name],
                      "positions": cfg.positions, "sample": cfg.sample,
                      "seed": cfg.seed, "dtype": cfg.dtype, "questions": len(questions), **weights.get(method, {}),
                      "versions": {package: version(package) for package in ("torch", "transformers")}}
            files[method, k] = predictions.Predictions(
                out / "predictions" / name / f"{predictions.name(method, k)}.jsonl", header, questions,
                state.process_index, state.num_processes)
        runner.run(vlm, questions, turns, files, cfg.batch, pad, cfg.seed, state.process_index, state.num_processes,
                   name, cfg.positions)
        if cfg.ratio and state.is_main_process:
            print(f"\n{name}\n{runner.compare(vlm, questions[:cfg.ratio], turns, cfg.batch, pad)}\n")
    state.wait_for_everyone()
    return report_benchmarks(cfg, out / "predictions", out) if state.is_main_process else []


def report_benchmarks(cfg: EvalConfig, folder: Path, out: Path) -> list[dict]:
    """Tables of the complete predictions files in a folder, beside what the papers print, into `out`: benchmarks.*"""
    files, header = scores.found(folder, BENCHMARKS)
    lines = scores.summarise(files, BENCHMARKS, cfg.seed, cfg.resamples)
    names = {name: BENCHMARKS[name].NAME for name in files}
    quoted = scores.printed(lines, cfg.backbone or scores.backbone(header["model"]))
    parts = [scores.parts_table(lines, name, BENCHMARKS[name].MAIN) for name in names]
    text = "\n\n".join(filter(None, [
        scores.table(lines, names, quoted, cfg.partial), *scores.notes(quoted, names), scores.seeds_table(lines, names),
        *(f"{names[name]}, part by part:\n\n{part}" for name, part in zip(names, parts) if part),
        scores.cost_table(lines), scores.kept_table(lines, names)]))
    whole = scores.comparable(lines)
    if (few := [f"{x['method']} {x['K']}" for x in lines if x["benchmarks"] < len(whole)]) and not cfg.partial:
        text += (f"\n\nNo average of {', '.join(few)}: they lack some of {', '.join(whole)}, and averages over "
                 "different benchmarks do not compare; --partial shows them all the same.")
    print(f"\n{text}\n\nmodel {header['model']}, prompt {header['style']}, pictures padded: {header['pad']}")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "benchmarks.json", lambda p: p.write_text(json.dumps(
        {"header": header, "lines": lines, "printed": quoted}, indent=1)))
    write_whole(out / "benchmarks.md", lambda p: p.write_text(text + "\n"))
    for name, part in (("summary", scores.matrix(lines)), ("costs", scores.cost_table(lines))):
        write_whole(out / f"{name}.md", lambda p, part=part: p.write_text(part + "\n"))
    if cfg.pictures:
        draw_tokens(lines, names, out / "benchmarks.png")
    return lines


def report_classify(cfg: EvalConfig, vlm, selectors: dict, out: Path) -> list[dict]:
    """--classify: the table of benchmarks/classify.py, printed and saved: classify.md, classify.json."""
    net = classify.Classifier.from_pretrained(cfg.classify, cfg.device)
    items = classify.ClassFolder(cfg.images, net.names, cfg.labels, cfg.n) if cfg.images else \
        classify.Scenes(cfg.n, cfg.split)
    blind = {name: s for name, s in selectors.items() if isinstance(s, Selector) and not s.each}
    for name in [name for name in selectors if name not in blind]:
        print(f"{name}: left out, it needs a question or the language model")
    lines = classify.measure(vlm, net, blind, items, cfg.budgets, cfg.batch, cfg.rule)
    print(f"\n{classify.table(lines)}\n\n{lines[0]['n']} pictures of {cfg.images or 'the tiny world'}, classifier "
          f"{cfg.classify}, {vlm.family}'s masks on its {net.grid[0]} x {net.grid[1]} patches")
    write_whole(out / "classify.json", lambda p: p.write_text(json.dumps(lines, indent=1)))
    write_whole(out / "classify.md", lambda p: p.write_text(classify.table(lines) + "\n"))
    return lines


def speed(cfg: EvalConfig) -> list[dict]:
    """--speed: the tables of benchmarks/speed.py, printed and saved."""
    auto, step = (net.to(cfg.device, torch.bfloat16).eval() for net in (
        autoselect.AutoSelect(autoselect.Config()), stepprune.StepPrune(stepprune.Config())))

    def pointed(v, question, k):
        here, asked = (torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) for x in (v, question))
        return step.select(v, here, question, asked, least=k, most=k)

    def real_selector():
        net = recon_selector.FeatureSelector(recon_selector.Config()).bfloat16()
        return lambda v: net(v, torch.ones(v.shape[:2], dtype=torch.bool))
    lines, out = measure_speed({"AutoSelect": lambda v, _, k: auto.select(v, keep=k), "StepPrune": pointed},
                               cfg.device), Path(cfg.out or "runs")
    for name, text in (("speed", speed_table(lines, 4)), ("pointer", measure_pointer(step, cfg.device)),
                       ("flops", flops_table(real_selector))):
        print(f"\n{text}\n")
        write_whole(out / f"{name}.md", lambda p, text=text: p.write_text(text + "\n"))
    print(f"random weights, 4 layers of language model, {cfg.device}, {torch.get_num_threads()} threads")
    write_whole(out / "speed.json", lambda p: p.write_text(json.dumps(lines, indent=1)))
    return lines


@torch.no_grad()
def draw_run(cfg: EvalConfig, vlm, selector, config, rows, biases: dict | None, out: Path) -> None:
    """Heat maps with kept patches of six scenes, and Figure 4's matrix over the square ones."""
    rows = [replace(row, questions=row.questions[b % len(row.questions):][:1]) for b, row in enumerate(rows)
            if row.image.size == rows[0].image.size]
    layer, reads = getattr(config, "condition", 0), bool(biases or getattr(config, "condition", 0))
    asked, batch = ask(vlm, rows, twice=bool(layer))
    units = states_of(vlm, batch, asked.units, layer)
    scores, keeps, orders = look(selector, units, asked.question, cfg.budgets[-1], biases, cfg.max_keep)
    titles = [r.questions[0].question if reads else f"scene {r.id - scenes.scenes.SPLITS['test']}" for r in rows[:6]]
    views = units.views or [1] * len(rows)
    most = min(max(6 // max(views), 1), len(rows))     # six columns, or the views of one scene
    first = units.rows(range(most))
    draw_views(vlm, vlm.adapter.pixels(batch)[:sum(views[:most])], first, first.flat(scores[:most, :max(first.counts)]),
               keeps[:most], titles, out / "kept.png", orders[:most] if biases else None)
    if not reads:
        draw_cosines(asked.units.pad()[0].flatten(2), scores, out / "cosines.png")


def draw_views(vlm, pixels: list, units: Units, scores, keeps, titles, path: Path, orders=None) -> None:
    """draw_kept() with a column for every view, as the vision encoder sees it: pixels, of Adapter.pixels().

    scores (M,), keeps[b] (K,); orders[b], as in draw_kept(), is drawn where no row has several views.
    """
    apart, views, processor = units.apart(), units.views or [1] * len(keeps), vlm.processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    seen = [255 * (x.float().cpu() * std + mean).clamp(0, 1) for x in pixels]
    kept = FrozenVLM._kept(units, keeps).split(apart.counts)
    draw_kept([Image.fromarray(x.round().byte().permute(1, 2, 0).numpy()) for x in seen], apart.grid,
              scores.split(apart.counts), [x.nonzero().flatten() for x in kept],
              [title for title, n in zip(titles, views) for _ in range(n)], path, orders if max(views) == 1 else None)


@torch.no_grad()
def report_condition(cfg: EvalConfig, vlm, trained: dict, rows, out: Path, pictures: int = 60) -> None:
    """Does a conditional selector read the question? condition.md: how far its choices for two questions about one
    picture are the same, and how much evidence they hold for their own question and for the other one."""
    rows = [replace(row, questions=[row.questions[0], row.questions[-1]]) for row in rows[:pictures]
            if len(row.questions) > 1]
    found = {k: [] for k in cfg.budgets}
    for selector, config in trained.values():
        asked, batch = ask(vlm, rows, twice=True)
        v, valid = states_of(vlm, batch, asked.units, config.condition).pad()
        for k in cfg.budgets:
            keep = selector.select(v, valid, k)
            swapped = [keep[q ^ 1] for q in range(len(keep))]
            same = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(keep, swapped)]
            found[k].append([np.mean(same) / k, *(np.nanmean(recall(x, asked.evidence)) for x in (keep, swapped))])
    head = ["K", "kept for both of two questions", "evidence for its own question", "for the other"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 4]
    lines += [f"| {k} | " + " | ".join(cell(x) for x in zip(*found[k])) + " |" for k in cfg.budgets]
    print("\n" + "\n".join(lines))
    write_whole(out / "condition.md", lambda p: p.write_text("\n".join(lines) + "\n"))


@torch.no_grad()
def report_rebuilding(cfg: EvalConfig, vlm, trained: dict, rows, out: Path, pictures: int = 100) -> None:
    """How well the kept tokens rebuild the rest beside as many random ones, and how still the mask stands when the
    picture is cropped or its brightness changed: rebuild.md, stability.md, rebuilt.png."""
    rows = rows[:pictures]
    images, tokens = [row.image for row in rows], sum(vlm.encode(vlm.pictures([rows[0].image])).counts)
    lines = ["| K | features: chosen | random | picture: chosen | random |", "|" + "---|" * 5]
    for k in tqdm([round(share * tokens) for share in rebuild.SHARES], "rebuild"):
        own, blind = ([rebuild.error(net, vlm, images, select) for net, select in choices] for choices in (
            [(net, lambda units, net=net: net.select(*units.pad(), k)) for net in trained.values()],  # noqa: B023
            [(net, lambda units: random.select(units, k)) for net in trained.values()]))              # noqa: B023
        lines.append(f"| {k} | " + " | ".join(cell(x, 1) for i in (0, 1) for x in (
            [e[i] for e in own], [e[i] for e in blind])) + " |")
    still = ["| distortion | K | overlap of the masks | of a mask that does not move | retention |", "|" + "---|" * 5]
    selectors = {name: per_picture(lambda units, k, net=net: net.select(*units.pad(), k))
                 for name, net in trained.items()}
    for how in rebuild.DISTORTIONS:
        iou = rebuild.stability(vlm, trained, images, cfg.budgets, how)
        moved = [replace(row, image=rebuild.distorted(row.image, how, b)[0]) for b, row in enumerate(rows)]
        kept = {(x["method"], x["K"]): x["retention"] for x in summarise(*measure(vlm, selectors, moved, cfg.budgets))}
        for k in cfg.budgets:
            columns = *iou[k], [kept[name, k] for name in trained]
            still.append(f"| {how} | {k} | " + " | ".join(cell(x) for x in columns) + " |")
    for name, text in (("rebuild", "\n".join(lines)), ("stability", "\n".join(still))):
        print(f"\n{text}")
        write_whole(out / f"{name}.md", lambda p, text=text: p.write_text(text + "\n"))
    draw_rebuilt(images[:6], rebuild.shown(next(iter(trained.values())), vlm, images[:6]), out / "rebuilt.png")


if __name__ == "__main__":
    main()
