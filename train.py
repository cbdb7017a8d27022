"""Teach a selector which visual tokens of a frozen VLM matter: `python train.py --method autoselect`.

One plain loop. With no other flag it trains on the tiny LLaVA that ships with the project, a few minutes on a
laptop, and ends with evaluate.py's table and pictures. Everything goes to runs/<method>; a killed run goes on
where it stopped when the same command is given again, and ends as if it had never been stopped.
`accelerate launch train.py ...` runs the same steps on several GPUs: the selector comes out the same.
"""

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm
from transformers import HfArgumentParser

import autoselect
import recon_selector
import stepprune
from benchmarks.batches import DATA, Batch, batches, cached, open_data
from benchmarks.sources import SOURCES
from common import IGNORE, FrozenVLM, Units

SELECTORS = {"autoselect": autoselect.AutoSelect, "stepprune": stepprune.StepPrune,
             "recon": recon_selector.ReconSelector}

# what each method trains with unless told otherwise: on a tiny encoder, then on a large one, at least 512 wide. The
# latter are the papers' where these say what, else ours and untried
METHODS = {
    "autoselect": dict(steps=(450, 5000), batch=(16, 32), lr=(2e-3, 1e-4), layers=(2, 5), tau_start=.1, tau_end=.02,
                       autocast=(False, True)),
    "stepprune": dict(steps=(600, 5000), batch=(8, 16), lr=(1e-3, 1e-4), layers=2, tau_start=1., tau_end=.2,
                      autocast=True),
    "recon": dict(steps=None, batch=(16, 32), lr=(1e-3, 1e-5), layers=4, tau_start=1., tau_end=1., autocast=True,
                  epochs=(3., 100.))}
# may change when a run goes on: the selector comes out the same
FREE = ("run", "micro", "checkpointing", "device", "workers", "save_every", "keep_checkpoints", "tensorboard",
        "evaluate", "push", "overwrite", "cache_features")


def option(default, text, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class TrainConfig:
    method: str = option("autoselect", "which paper to train", choices=list(METHODS))
    model: str = option("tiny/llava", "checkpoint folder or hub id of the frozen VLM")
    run: str | None = option(None, "run folder [runs/<method>]")
    seed: int = option(0, "of weights, scenes and noise")
    steps: int | None = option(None, "optimiser steps [ours: autoselect 450, stepprune 600, on a large encoder 5000; "
                                     "recon: as --epochs say]")
    batch: int | None = option(None, "pictures a step, over all processes [ours: 16; stepprune 8, each question a row; "
                                     "on a large encoder twice as many, for recon the paper's 32]")
    micro: int | None = option(None, "pictures at a time on each process; gradients are summed until --batch is "
                                     "reached [all that fall to the process]")
    checkpointing: bool | None = option(None, "recompute the language model's activations in the backward pass: less "
                                              "memory, a third more time [ours: from a billion parameters on]")
    data: str = option("scenes", "what to train on: the tiny world's scenes, a folder of pictures (recon), or a data "
                                 "set by name", choices=list(DATA))
    path: str | None = option(None, "a local copy of the data set that --data names: its folder or file [streamed from "
                                    "the hub]")
    split: str | None = option(None, "of that data set [its training split]")
    prompt: str = option("Describe the image briefly.", "what is asked where a data set has captions alone [ours]")
    turns: int = option(7, "questions a picture, at most; of a scene, autoselect reads the caption before them [ours]")
    keep: list[float] = field(default_factory=lambda: [*[1 / 3] * 6, 2 / 9, 1 / 9], metadata={
        "help": "autoselect: K in training, or below 1 a share of each picture's tokens; the steps take turns [ours: "
                "the paper's three budgets; most often the widest, whose order settles last]"})
    lr: float | None = option(None, "AdamW's learning rate after warm-up [ours: autoselect 2e-3, others 1e-3, on a "
                             "large encoder 1e-4; recon's paper: 1e-5 for CLIP-L, 5e-6 for InternViT]")
    layers: int | None = option(None, "blocks of scorer, encoder or selector [ours: autoselect 2, on a large encoder "
                                      "5, which give the paper's size on CLIP-L; paper: stepprune 2, recon 4]")
    heads: int | None = option(None, "attention heads of the selector [ours: one per 64 channels, at least 4]")
    tau_start: float | None = option(None, "temperature of the soft top-K at the first step [ours: autoselect 0.1, for "
                                     "from 1 the tiny VLM reads half-drowned tokens and nothing presses the scorer; "
                                     "stepprune 1, for its scores are all but 0 and 1, and z-scored lie 3 apart]")
    tau_end: float | None = option(None, "... and at the last [ours: 0.02 and 0.2]")
    gate: str = option("noise", "noise: Eq. 5 [paper]; scale: Table 5's ablation", choices=["noise", "scale"])
    denoiser: str = option("diagonal", "diagonal [paper]; global: Table 5's ablation; none",
                           choices=["diagonal", "global", "none"])
    scorer: str = option("learned", "learned [paper]; random: Figure 5's ablation", choices=["learned", "random"])
    length: float = option(3.0, "stepprune: lambda of Eq. 15, weight of the share of tokens picked, at its peak; see "
                                "stepprune.length_weight [ours]")
    length_end: float = option(0.1, "... and at the end [ours; paper: constant]")
    align: bool = option(True, "stepprune: start W_text as the inverse of the projector [ours]")
    max_steps: int | None = option(None, "stepprune: T_max, most tokens picked in training [ours: a third of a square "
                                         "picture's tokens; 192 at native resolution]")
    gamma: float = option(0.98, "stepprune: discount of Eq. 11 [ours]")
    stop: str = option("encoded", "stepprune: h_stop of Eq. 4; learned [paper], encoded with image and question [ours]",
                       choices=["learned", "encoded"])
    hops: int = option(1, "stepprune: fed-back picks that a gradient passes [ours; paper: all, -1]")
    budget: str = option("expected", "stepprune: K of Eq. 12; batch_mean [paper], expected [ours]",
                         choices=["batch_mean", "expected"])
    aggregation: str = option("full", "stepprune: Eq. 11 [paper]; the others are Table 4's ablations",
                              choices=list(stepprune.AGGREGATIONS))
    causal: bool = option(False, "stepprune: Table 4's causal encoder")
    text_steps: int = option(50, "stepprune: steps in which g_text of Eq. 3 goes from 0 to 1 [ours]")
    pictures: int = option(2400, "recon: scenes to train on, each once an epoch [ours, tiny]")
    images: str | None = option(None, "recon: train on all pictures below this folder instead; with --data llava-665k: "
                                      "the folder where its paths begin")
    epochs: float | None = option(None, "recon: in three stages, 60, 20 and 20 %% of them [ours, tiny: 3; paper: 100]")
    cache_features: str | None = option(None, "recon: keep the encoder's features in this folder, made once")
    p: float = option(0.6, "recon: share of kept tokens above which Eq. 4 presses [paper]")
    q: float = option(0.1, "recon: ... and below which [paper]")
    alpha1: float = option(1., "recon: how hard above p [ours, tiny; paper 0.1, whose distances are of another scale]")
    alpha2: float = option(1., "recon: ... and below q")
    estimator: str = option("gumbel", "recon: hard Gumbel-softmax [paper]; softmax: B.1's straight-through estimator",
                            choices=["gumbel", "softmax"])
    regulariser: str = option("dead_zone", "recon: Eq. 4 [paper]; plain: alpha1 L_pr, which collapses (B.2)",
                              choices=["dead_zone", "plain"])
    condition: int = option(0, "recon: select after this layer of the language model, from its states, the question "
                               "before and behind the image (B.4); 0: after the vision encoder")
    dtype: str = option("bfloat16", "of the frozen VLM", choices=["bfloat16", "float32"])
    random_weights: bool = option(False, "build --model from its config alone, for smoke runs, memory and speed")
    autocast: bool | None = option(None, "the selector's matrix products in bfloat16 too; StepPrune's pointer stays in "
                                         "float32 [ours: stepprune]")
    device: str | None = option(None, "cpu, or cuda [the GPU that accelerate gives to the process, if there is one]")
    workers: int = option(1, "processes that read data and build batches")
    save_every: int = option(100, "steps between checkpoints")
    keep_checkpoints: int = option(2, "how many of the last are kept")
    tensorboard: bool = option(False, "write the log for TensorBoard too, which has to be installed")
    evaluate: bool = option(True, "make the table and the pictures at the end")
    push: str | None = option(None, "share the trained selector on the Hugging Face hub under this name, user/selector")
    overwrite: bool = option(False, "begin anew although the run folder holds a run")

    def __post_init__(self):
        self.run = self.run or f"runs/{self.method}"
        self.data = "folder" if self.images and self.data == "scenes" else self.data
        counts = {k: getattr(self, k) for k in ("steps", "batch", "micro", "save_every", "keep_checkpoints",
                                                "pictures")}
        if wrong := [f"{k}={v}" for k, v in counts.items() if v is not None and v < 1] + [
                f"keep={self.keep}"] * (min(self.keep, default=0) <= 0):
            raise ValueError(f"{', '.join(wrong)}: expected at least 1, and of keep more than 0")
        if self.data == "folder" and not self.images:
            raise ValueError("data='folder' needs --images, the folder")
        silent = self.data == "folder" or self.data in SOURCES and SOURCES[self.data].kind == "images"
        if silent and (self.method != "recon" or self.condition):
            raise ValueError(f"data={self.data!r} has pictures and no text: expected --method recon, no --condition")
        if self.condition and self.cache_features:
            raise ValueError(f"condition={self.condition} reads questions: expected no --cache_features, which holds "
                             "what the vision encoder says")


def tokens_of(vlm: FrozenVLM) -> int:
    """Of one view of a picture; at native resolution, of one as large as the others' views."""
    side = getattr(vlm.adapter, "pooled", vlm.adapter.side)
    return side ** 2 or (576 if vlm.width >= 512 else 144)


def settle(cfg: TrainConfig, vlm: FrozenVLM) -> None:
    """Fill in what was not said, by the size of the VLM."""
    large = vlm.width >= 512
    defaults = {name: value[large] if isinstance(value, tuple) else value
                for name, value in METHODS.get(cfg.method, {}).items()}
    width = vlm.dim if cfg.condition else vlm.width
    defaults = {"epochs": 0., **defaults, "heads": max(4, width // 64), "max_steps": tokens_of(vlm) // 3}
    for name, value in defaults.items():
        setattr(cfg, name, value if getattr(cfg, name) is None else getattr(cfg, name))


def build_selector(cfg: TrainConfig, vlm: FrozenVLM) -> torch.nn.Module:
    """The method's module, sized for the VLM."""
    settle(cfg, vlm)
    if cfg.method == "autoselect":
        keep = round(cfg.keep[0] if cfg.keep[0] >= 1 else max(cfg.keep[0] * tokens_of(vlm), 1))
        return autoselect.AutoSelect(autoselect.Config(
            width=vlm.width, keep=keep, layers=cfg.layers, heads=cfg.heads, tau_start=cfg.tau_start,
            tau_end=cfg.tau_end, gate=cfg.gate, denoiser=cfg.denoiser, scorer=cfg.scorer))
    if cfg.method == "stepprune":
        return stepprune.StepPrune(stepprune.Config(
            width=vlm.width, text_width=vlm.dim, max_steps=cfg.max_steps, encoder_layers=cfg.layers, heads=cfg.heads,
            gamma=cfg.gamma, aggregation=cfg.aggregation, causal=cfg.causal, budget=cfg.budget, hops=cfg.hops,
            stop=cfg.stop, gate=cfg.gate, denoiser=cfg.denoiser))
    if cfg.method == "recon":
        return recon_selector.ReconSelector(recon_selector.Config(
            width=vlm.dim if cfg.condition else vlm.width, layers=cfg.layers, heads=cfg.heads, patch=vlm.unit_side,
            channels=max(16, vlm.width // 16), grid=vlm.fingerprint()["vision_side"] or 24, p=cfg.p, q=cfg.q,
            alpha1=cfg.alpha1, alpha2=cfg.alpha2, estimator=cfg.estimator, regulariser=cfg.regulariser))
    raise ValueError(f"method={cfg.method!r} is none of {[*METHODS]}")


# ------------------------------------------------------------------------------------------------ run folder

def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then rename: a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def description(cfg: TrainConfig, vlm: FrozenVLM, selector) -> dict:
    """What config.json says of a run and of its selector: method, shape, backbone, how trained."""
    training = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in FREE}
    return {"method": cfg.method, "cfg": asdict(selector.cfg), "backbone": vlm.fingerprint(), "training": training}


def open_run(cfg: TrainConfig, mine: dict, main: bool = True) -> Path:
    """Make the run folder, or check that the one there is the same run: mine, as description() has it. Raises
    ValueError naming what differs."""
    run, path = Path(cfg.run), Path(cfg.run) / "config.json"
    if path.exists() and not (cfg.overwrite and main):
        theirs = json.loads(path.read_text())
        differ = [f"{k}: {theirs[part].get(k)!r} there, {v!r} here" for part in ("training", "backbone")
                  for k, v in mine[part].items() if theirs[part].get(k) != v]
        if differ:
            raise ValueError(f"{run} holds another run ({'; '.join(differ)}). Choose another folder with --run, "
                             "or begin anew there with --overwrite")
    elif main:
        for old in ("checkpoints", "selector"):
            shutil.rmtree(run / old, ignore_errors=True)
        (run / "log.jsonl").unlink(missing_ok=True)
        write_whole(path, lambda p: p.write_text(json.dumps(mine, indent=1)))
    return run


def checkpoints(run: Path) -> list[Path]:
    """Those of a run, the newest last."""
    return sorted((run / "checkpoints").glob("*.pt"))


def save_checkpoint(run: Path, step: int, selector, optim, keep: int = 2) -> None:
    """All that a resumed run needs: data, noise and learning rate follow from (seed, step). The last `keep` stay."""
    state = {"step": step, "selector": selector.state_dict(), "optim": optim.state_dict()}
    write_whole(run / f"checkpoints/{step:07d}.pt", lambda path: torch.save(state, path))
    for old in checkpoints(run)[:-keep]:
        old.unlink()


CARD = """---
library_name: pytorch
tags: [whichtokens, visual-token-pruning, {method}]
---
# {method} for {model}

Says which visual tokens of a frozen vision-language model reach its language model. Trained by WhichTokens, for
the backbone below and none of another shape:

    {backbone}

Trained with

    {training}

Use: `python evaluate.py --run FOLDER`, `python answer.py --run FOLDER --image photo.png --question "..."`, or
`{selector}.from_pretrained(FOLDER)`, where FOLDER may be the name of this repository on the hub.

## Figures
Of the tiny world, unless the table says otherwise: they show the mechanism, not the papers' numbers.

<!-- table: ../summary.md -->
not evaluated yet
<!-- end -->
"""


def save_selector(run: Path, selector, about: dict) -> None:
    """run/selector: weights, config.json and model card, what is shared; whole or not at all."""
    def lines(part):
        return "\n    ".join(f"{k}: {v}" for k, v in part.items())

    def write(folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "README.md").write_text(CARD.format(
            method=about["method"], model=about["training"]["model"], selector=type(selector).__name__,
            backbone=lines(about["backbone"]), training=lines(about["training"])))
        selector.save_pretrained(folder, config=about)
        shutil.rmtree(run / "selector", ignore_errors=True)
    write_whole(run / "selector", write)


def read_run(run: str | Path) -> tuple[Path, dict]:
    """(folder of the selector, its description) of a run, of a selector's folder, or of one on the hub."""
    here = Path(run)
    for folder in (here / "selector", here):
        if (folder / "model.safetensors").exists():
            return folder, json.loads((folder / "config.json").read_text())
    if here.exists():
        raise FileNotFoundError(f"{run} holds no finished run (selector/model.safetensors is missing): train it first, "
                                f"python train.py --run {run}, with the options it shall have")
    try:
        folder = Path(snapshot_download(str(run), allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{run} is no folder here, and the hub gave no such selector "
                                f"({type(error).__name__}): expected a run, or user/selector") from error
    return folder, json.loads((folder / "config.json").read_text())


def load_run(run: str | Path, vlm: FrozenVLM):
    """(selector, TrainConfig) of a finished run, here or on the hub. Raises ValueError naming what differs if it was
    trained for another backbone."""
    folder, saved = read_run(run)
    ours, theirs, training = vlm.fingerprint(), saved["backbone"], saved["training"]
    if saved["method"] == "recon" and not training["condition"]:       # any language model may stand behind the encoder
        ours = {k: v for k, v in ours.items() if k.startswith("vision_") or k == "feature_layer"}
    differ = [f"{k}: {theirs.get(k)!r} trained, {ours.get(k)!r} here" for k in ours if theirs.get(k) != ours[k]]
    if differ:
        raise ValueError(f"{run} was trained for another backbone ({'; '.join(differ)}): pass --model "
                         f"{training['model']}")
    selector = SELECTORS[saved["method"]].from_pretrained(folder, strict=True).to(vlm.device).eval()
    return selector, TrainConfig(**training, run=str(run))


# -------------------------------------------------------------------------------------------------- the loop

def generators(cfg, first: int, owner: list[int], device) -> list[torch.Generator]:
    """One per row: row r is of item first + owner[r] of the run, and draws the same in whatever batch it stands."""
    turn = [owner[:r].count(b) for r, b in enumerate(owner)]
    seeds = [np.random.SeedSequence([cfg.seed, first + b, t]).generate_state(1)[0] for b, t in zip(owner, turn)]
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


@torch.no_grad()
def encode(vlm, batch: Batch, cfg) -> Units:
    """What the selector reads of a batch: all that comes before it is frozen. A row each of what it chooses in."""
    units = (batch.units or vlm.encode(batch.pictures.to(vlm.device))).rows(batch.owner)
    if cfg.method == "recon" and cfg.condition:
        units = replace(units, feats=vlm.visual_states(vlm.embed(batch.rows.to(vlm.device), units), cfg.condition))
    return units.apart() if cfg.method == "recon" else units           # there, a crop is a picture


def step_totals(selector, parts: list[tuple[Batch, Units]], accelerator) -> dict:
    """Answer tokens and rows of the whole step, on all processes; the selector is told the statistics of its tokens."""
    sums = []
    for batch, units in parts:
        x = selector.tokens(*units.pad()).double()
        labels = (batch.rows or {}).get("labels")
        answers = 0 if labels is None else int((labels[:, 1:] != IGNORE).sum())
        sums.append(torch.cat([x.new_tensor([answers, len(units.grid), len(x)]), x.sum(0), x.square().sum(0)]))
    total = accelerator.reduce(torch.stack(sums).sum(0), "sum")
    mean, square = (total[3:] / total[2]).chunk(2)
    selector.observe(total[2].long(), mean.float(), (square - mean.square()).clamp(min=0).float())
    return {"answers": total[0], "rows": total[1]}


def part_loss(selector, vlm, batch: Batch, units: Units, cfg, step: int, first: int, total: dict, accelerator):
    """This part's share of the step's loss, and what to log of it. first: number of its first picture in the run."""
    (v, valid), rows = units.pad(), batch.rows.to(vlm.device) if batch.rows else None
    tau, autocast = autoselect.temperature(step, cfg.steps, cfg), torch.autocast(
        vlm.device.type, torch.bfloat16, enabled=cfg.autocast)

    def everyone(x):
        return accelerator.reduce(x, "mean")
    if cfg.method == "recon":                          # Eq. (8) of its paper: no answer is read
        pictures = batch.pictures.to(vlm.device)
        views = vlm.adapter.views(pictures) or [1] * len(batch.owner)
        pixels = [view for x, n in zip(vlm.pixels(pictures), views) for view in x.chunk(n, 1)]
        owner = [b for b, n in enumerate(views) for _ in range(n)]
        with autocast:
            loss, shown = selector(v, valid, pixels, units.grid, generators(cfg, first, owner, vlm.device),
                                   everyone)
        return loss * len(units.grid) / total["rows"], shown
    noise = generators(cfg, first, batch.owner, vlm.device)
    answers = (rows["labels"][:, 1:] != IGNORE).sum()
    if cfg.method == "autoselect":                     # Eq. (1): the frozen VLM's own loss on gated tokens
        keep = cfg.keep[step % len(cfg.keep)]
        keep = (keep * valid.sum(1)).round().clamp(min=1) if keep < 1 else keep
        with autocast:
            gated, a = selector(v, valid, keep, tau, noise)
        loss = vlm.loss(vlm.embed(rows, units, units.flat(gated))) * answers / total["answers"]
        shown = {"keep": float(torch.as_tensor(keep).float().mean())}
    else:                                              # Eq. (15)
        g_text = stepprune.text_gate(step, cfg.text_steps)
        with autocast:
            gated, a, episode, expected = selector(v, valid, *vlm.question(rows), tau, g_text, noise, everyone)
        nll, count = vlm.loss(vlm.embed(rows, units, units.flat(gated))), episode.count.float()
        weight = stepprune.length_weight(step, cfg.steps, cfg.length, cfg.length_end)
        loss = nll * answers / total["answers"] + weight * (expected / valid.sum(1)).sum() / total["rows"]
        shown = {"nll": nll.item(), "K": count.mean().item(), "K_sd": count.std(correction=0).item(),
                 "K_soft": expected.mean().item(), "lambda": weight}
    return loss, shown | {"tau": tau, "sharp": (2 * a - 1).abs()[valid].mean().item()}


def train_step(selector, vlm, work: list[Batch], cfg, step: int, accelerator) -> tuple[float, dict]:
    """Gradients of a whole step, its parts one after another, summed over all processes -> loss, what to log.

    Losses are divided by what the whole step holds, so that neither the parts nor the processes show in the result:
    a mean of means would weigh a part with short answers as one with long ones.
    """
    parts = [(batch, encode(vlm, batch, cfg)) for batch in work]
    total = step_totals(selector, parts, accelerator)
    first = step * cfg.batch + accelerator.process_index * (cfg.batch // accelerator.num_processes)
    losses, shown = [], []
    for i, (batch, units) in enumerate(parts):
        loss, more = part_loss(selector, vlm, batch, units, cfg, step, first + i * cfg.micro, total, accelerator)
        loss.backward()
        losses.append(loss.item())
        shown.append(list(more.values()))
    if accelerator.num_processes > 1:
        params = list(selector.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = accelerator.reduce(torch.cat([g.flatten() for g in grads]), "sum")
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)
    figures = torch.tensor([sum(losses), *np.mean(shown, 0)], dtype=torch.float64, device=vlm.device)
    loss, *means = accelerator.reduce(figures, "sum").tolist()
    return loss, {k: round(x / accelerator.num_processes, 4) for k, x in zip(more, means)}


def learning_rate(step: int, cfg) -> float:
    """recon: its paper's three stages. The others: 50 steps of warm-up, then a cosine to 0."""
    if cfg.method == "recon":
        return cfg.lr * recon_selector.stage_rate(step, cfg.steps)
    return cfg.lr * min(1., (step + 1) / 50) * (.5 + .5 * math.cos(math.pi * step / cfg.steps))


def status(shown: dict, loss: float, norm: float) -> dict:
    """What the progress bar shows: losses, how many tokens are kept and their spread, temperature, gradient norm."""
    kept = f"{shown['K']:.0f}±{shown['K_sd']:.0f}" if "K" in shown else (
        f"{shown['keep']:.0f}" if "keep" in shown else f"{shown.get('kept', 0):.0%}")
    return {"loss": f"{loss:.3f}", "K": kept, "grad": f"{norm:.2f}",
            **{k: shown[k] for k in ("tau", "feature", "image") if k in shown}}


def fit_batch(cfg: TrainConfig, processes: int) -> None:
    """Set cfg.micro. Raises ValueError where --batch does not part into equal shares."""
    cfg.micro = cfg.micro or max(cfg.batch // processes, 1)
    if cfg.batch % (processes * cfg.micro):
        raise ValueError(f"batch={cfg.batch} on {processes} processes, micro={cfg.micro}: expected a batch that is a "
                         f"multiple of {processes * cfg.micro}, so that all get as much")


def tensorboard():
    try:
        from torch.utils import tensorboard  # only here: it is not among what requirements.txt installs
    except ImportError as error:
        raise ImportError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return tensorboard


def train(cfg: TrainConfig) -> Path:
    """Train to the end, or on from the last checkpoint. Returns the run folder."""
    if cfg.tensorboard:
        tensorboard()
    accelerator = Accelerator(cpu=cfg.device == "cpu" or not torch.cuda.is_available())
    main = accelerator.is_main_process
    vlm = FrozenVLM.from_pretrained(cfg.model, getattr(torch, cfg.dtype), accelerator.device,
                                    random_weights=cfg.random_weights)
    frozen = sum(p.numel() for p in vlm.parameters())
    vlm.checkpointing(frozen > 1e9 if cfg.checkpointing is None else cfg.checkpointing)
    torch.manual_seed(cfg.seed)
    selector = build_selector(cfg, vlm).to(vlm.device).train()
    fit_batch(cfg, accelerator.num_processes)
    selector.alone = False
    data = open_data(cfg, vlm)
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(data) / cfg.batch)           # recon
    with accelerator.main_process_first():
        run = open_run(cfg, about := description(cfg, vlm, selector), main)
        cache = cached(cfg, vlm, data) if cfg.cache_features else None
    optim = torch.optim.AdamW(selector.parameters(), lr=cfg.lr, weight_decay=0. if cfg.method == "recon" else .01)
    count = sum(p.numel() for p in selector.parameters())
    accelerator.print(
        f"{cfg.method} on {cfg.model}: {count / 1e6:.2f} M trainable of {(count + frozen) / 1e6:.2f} M parameters, "
        f"{cfg.steps} steps of {cfg.batch} pictures = {accelerator.num_processes} processes x "
        f"{cfg.batch // accelerator.num_processes // cfg.micro} parts x {cfg.micro}, into {run}")
    first = 0
    if checkpoints(run):
        state = torch.load(checkpoints(run)[-1], weights_only=True, map_location=vlm.device)
        first = state["step"]
        selector.load_state_dict(state["selector"])
        optim.load_state_dict(state["optim"])
        accelerator.print(f"resumed at step {first}")
    elif cfg.method == "stepprune" and cfg.align:
        some = next(iter(batches(replace(cfg, micro=min(64, cfg.steps * cfg.batch), workers=0), vlm, data, 0, 0, 1)))
        units = vlm.encode(some.pictures.to(vlm.device))
        with torch.no_grad():
            selector.align(units.feats, vlm.project(units.feats))
    feed = batches(cfg, vlm, data, first, accelerator.process_index, accelerator.num_processes, cache)
    loop(cfg, vlm, selector, optim, feed, run, first, accelerator)
    if main:
        save_selector(run, selector, about)
    accelerator.wait_for_everyone()
    return run


def loop(cfg, vlm, selector, optim, feed, run: Path, first: int, accelerator) -> None:
    """The steps from `first` on, logged line by line in run/log.jsonl, with a checkpoint now and then."""
    log, main, board = run / "log.jsonl", accelerator.is_main_process, None
    lines = log.read_text().splitlines()[:first] if log.exists() else []
    accelerator.wait_for_everyone()
    if main:                                           # lines after the checkpoint will be made again
        write_whole(log, lambda p: p.write_text("".join(line + "\n" for line in lines)))
    if main and cfg.tensorboard:
        board = tensorboard().SummaryWriter(run / "tensorboard", purge_step=first)
    start, lost, feed = time.perf_counter(), set(), iter(feed)
    with open(log if main else os.devnull, "a", buffering=1) as out:
        for step in (bar := tqdm(range(first, cfg.steps), "train", initial=first, total=cfg.steps, disable=not main)):
            optim.param_groups[0]["lr"] = learning_rate(step, cfg)
            optim.zero_grad(set_to_none=True)
            work = [next(feed) for _ in range(cfg.batch // accelerator.num_processes // cfg.micro)]
            loss, shown = train_step(selector, vlm, work, cfg, step, accelerator)
            norm = torch.nn.utils.clip_grad_norm_(selector.parameters(), 1.0).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise RuntimeError(f"loss {loss}, gradient norm {norm} at step {step}, items {step * cfg.batch} to "
                                   f"{(step + 1) * cfg.batch - 1} of {cfg.data}: try a smaller --lr than {cfg.lr}; the "
                                   f"last checkpoint is in {run}")
            optim.step()
            line = {"step": step, "loss": round(loss, 5), "grad_norm": round(norm, 5),
                    "seconds": round(time.perf_counter() - start, 2), **shown}
            out.write(json.dumps(line) + "\n")
            bar.set_postfix(status(shown, loss, norm))
            for name, value in line.items() if board else ():
                board.add_scalar(name, value, step)
            for name in (name for batch in work for name in batch.lost):
                if name not in lost:
                    bar.write(f"left out, {name}")
                lost.add(name)
            if main and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps):
                save_checkpoint(run, step + 1, selector, optim, cfg.keep_checkpoints)
    accelerator.print(f"trained in {time.perf_counter() - start:.0f} s" + (f"; {len(lost)} left out" if lost else ""))


def main(args=None) -> None:
    (cfg,) = HfArgumentParser(TrainConfig, description=__doc__).parse_args_into_dataclasses(args)
    run = train(cfg)
    if not Accelerator().is_main_process:
        return
    if cfg.evaluate and not cfg.random_weights:
        import evaluate  # here, for it imports this file

        evaluate.main(["--run", str(run), "--model", cfg.model, *(["--device", cfg.device] if cfg.device else [])])
    if cfg.push:
        HfApi().create_repo(cfg.push, exist_ok=True)
        HfApi().upload_folder(repo_id=cfg.push, folder_path=run / "selector")
        print(f"shared: https://huggingface.co/{cfg.push}")


if __name__ == "__main__":
    main()
