"""Teach a selector which visual tokens of a frozen VLM matter: `python train.py --method autoselect`.

One plain loop. With no other flag it trains on the tiny LLaVA that ships with the project, a few minutes on a
laptop, and ends with evaluate.py's table and pictures. Everything goes to runs/<method>; a killed run goes on
where it stopped when the same command is given again, and ends as if it had never been stopped.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

import autoselect
import recon_selector
import stepprune
from benchmarks.folder import Epochs, FeatureCache, Pictures
from benchmarks.scenes import SIZES, Dialogues
from common import FrozenVLM, Units

METHODS = {                                            # what each method trains with unless told otherwise
    "autoselect": dict(steps=450, batch=16, lr=2e-3, layers=2, tau_start=.1, tau_end=.02, autocast=False),
    "stepprune": dict(steps=600, batch=8, lr=1e-3, layers=2, tau_start=1., tau_end=.2, autocast=True),
    "recon": dict(steps=None, batch=16, lr=1e-3, layers=4, tau_start=1., tau_end=1., autocast=True)}
SAME_RUN = ("method", "model", "seed", "steps", "batch", "keep", "lr", "layers", "heads", "gate", "denoiser", "scorer",
            "tau_start", "tau_end", "dtype", "turns", "length", "max_steps", "gamma", "hops", "budget", "aggregation",
            "causal", "text_steps", "length_end", "align", "autocast", "stop", "pictures", "images", "p", "q", "alpha1",
            "alpha2", "estimator", "regulariser", "condition")


def option(default, text, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class TrainConfig:
    method: str = option("autoselect", "which paper to train", choices=list(METHODS))
    model: str = option("tiny/llava", "checkpoint folder or hub id of the frozen VLM")
    run: str | None = option(None, "run folder [runs/<method>]")
    seed: int = option(0, "of weights, scenes and noise")
    steps: int | None = option(None, "optimiser steps [ours: autoselect 450, stepprune 600; recon: as --epochs say]")
    batch: int | None = option(None, "pictures a step [ours: 16; stepprune 8, each question a row; recon's paper: 32]")
    turns: int = option(7, "questions a picture; autoselect reads its caption before them [ours]")
    keep: list[int] = field(default_factory=lambda: [*[48] * 6, 32, 16], metadata={
        "help": "K in training; the steps take turns [ours: the paper's three budgets; most often the "
                "widest, whose order settles last]"})
    lr: float | None = option(None, "AdamW's learning rate after warm-up [ours: autoselect 2e-3, others 1e-3; "
                             "recon's paper: 1e-5 for CLIP-L, 5e-6 for InternViT]")
    layers: int | None = option(None, "blocks of scorer, encoder or selector [ours, tiny: autoselect 2; 5 give its "
                                      "size on CLIP-L; paper: stepprune 2, recon 4]")
    heads: int = option(4, "attention heads of the selector [ours, tiny; 16 on CLIP-L]")
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
    max_steps: int = option(48, "stepprune: T_max, most tokens picked in training [ours]")
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
    images: str | None = option(None, "recon: train on all pictures below this folder instead")
    epochs: float = option(3., "recon: in three stages, 60, 20 and 20 %% of them [ours, tiny; paper: 100]")
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
    dtype: str = option("bfloat16", "of the frozen VLM", choices=["bfloat16", "float32", "float16"])
    autocast: bool | None = option(None, "the selector's matrix products in bfloat16 too; StepPrune's pointer stays in "
                                         "float32 [ours: stepprune]")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run")
    workers: int = option(1, "processes that draw scenes and build batches")
    save_every: int = option(100, "steps between checkpoints")
    evaluate: bool = option(True, "make the table and the pictures at the end")
    overwrite: bool = option(False, "begin anew although the run folder holds a run")

    def __post_init__(self):
        self.run = self.run or f"runs/{self.method}"
        for name, value in METHODS.get(self.method, METHODS["autoselect"]).items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        if min(self.steps or 1, self.batch, self.save_every, self.pictures, *self.keep) < 1 or self.steps == 0:
            raise ValueError(f"steps={self.steps}, batch={self.batch}, save_every={self.save_every}, "
                             f"pictures={self.pictures}, keep={self.keep}: all must be at least 1")
        if self.condition and (self.images or self.cache_features):
            raise ValueError(f"condition={self.condition} reads questions: expected neither --images, which has none, "
                             "nor --cache_features, which holds what the vision encoder says")


def build_selector(cfg, vlm: FrozenVLM) -> torch.nn.Module:
    """The method's module, sized for the VLM. cfg: TrainConfig, or the same fields read from a run's config.json."""
    if cfg.method == "autoselect":
        return autoselect.AutoSelect(autoselect.Config(
            width=vlm.width, keep=cfg.keep[0], layers=cfg.layers, heads=cfg.heads, tau_start=cfg.tau_start,
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


def open_run(cfg: TrainConfig, vlm: FrozenVLM) -> Path:
    """Make the run folder, or check that the one there is the same run. Raises ValueError naming what differs."""
    run, mine = Path(cfg.run), {**{k: getattr(cfg, k) for k in SAME_RUN}, "fingerprint": vlm.fingerprint()}
    path = run / "config.json"
    if path.exists() and not cfg.overwrite:
        theirs = json.loads(path.read_text())
        differ = [f"{k}: {theirs.get(k)!r} there, {v!r} here" for k, v in mine.items() if theirs.get(k) != v]
        if differ:
            raise ValueError(f"{run} holds another run ({'; '.join(differ)}). Choose another folder with --run, "
                             "or begin anew there with --overwrite")
    else:
        for old in ("checkpoint.pt", "log.jsonl", "selector.safetensors"):
            (run / old).unlink(missing_ok=True)
        write_whole(path, lambda p: p.write_text(json.dumps(mine, indent=1)))
    return run


def load_run(run: str | Path, vlm: FrozenVLM):
    """(selector, config) of a finished run. Raises ValueError if it was trained for another backbone."""
    run = Path(run)
    if not (run / "selector.safetensors").exists():
        raise FileNotFoundError(f"{run} holds no finished run (selector.safetensors is missing): train it first, "
                                f"python train.py --run {run}, with the options it shall have")
    saved = json.loads((run / "config.json").read_text())
    ours, theirs = vlm.fingerprint(), saved.pop("fingerprint")
    if saved["method"] == "recon" and not saved["condition"]:          # any language model may stand behind the encoder
        ours = {k: v for k, v in ours.items() if k.startswith("vision_") or k == "feature_layer"}
    differ = [f"{k}: {theirs.get(k)!r} trained, {ours.get(k)!r} here" for k in ours if theirs.get(k) != ours[k]]
    if differ:
        raise ValueError(f"{run} was trained for another backbone ({'; '.join(differ)}): pass --model {saved['model']}")
    cfg = TrainConfig(**saved, run=str(run))
    selector = build_selector(cfg, vlm).to(vlm.device)
    selector.load_state_dict(load_file(run / "selector.safetensors"))
    return selector.eval(), cfg


def save_checkpoint(run: Path, step: int, selector, optim) -> None:
    """All that a resumed run needs: scenes, noise and learning rate follow from (seed, step)."""
    state = {"step": step, "selector": selector.state_dict(), "optim": optim.state_dict()}
    write_whole(run / "checkpoint.pt", lambda path: torch.save(state, path))


# -------------------------------------------------------------------------------------------------- the loop

@dataclass
class Batch:
    """Pictures, each encoded once, and the rows that ask about them: row r shows picture owner[r]."""
    pictures: dict
    rows: dict | None
    owner: list[int]
    lost: tuple = ()                                   # files that were of no use, with the reason
    units: Units | None = None                         # where a cache has them


def collate(vlm: FrozenVLM, each: bool):
    """Items of Dialogues -> Batch. each: one row a question, for a selection that reads it; else one a picture."""
    def build(items) -> Batch:
        images, turns = map(list, zip(*items))
        pictures = vlm.batch(images, turns, device="cpu")
        if not each:
            return Batch(pictures, pictures, list(range(len(items))))
        asked = [(b, turn) for b, dialogue in enumerate(turns) for turn in dialogue[1:]]
        rows = vlm.batch([images[b] for b, _ in asked], [[turn] for _, turn in asked], device="cpu")
        rows.pop("pixel_values")                       # the pictures have them
        return Batch(pictures, rows, [b for b, _ in asked])
    return build


class Shown(torch.utils.data.Dataset):
    """recon: item i is (i, picture, question or None, files that were of no use), from scenes or from --images."""

    def __init__(self, cfg, vlm: FrozenVLM):
        self.files = Pictures(cfg.images, oblong) if cfg.images else None
        self.scenes = None if cfg.images else Dialogues(0, cfg.pictures, cfg.seed, 1, SIZES[vlm.family][:3])

    def __len__(self):
        return len(self.files or self.scenes)

    def __getitem__(self, i):
        if self.files:
            image, lost = self.files[i]
            return i, image, None, lost
        image, turns = self.scenes[i]
        return i, image, turns[1][0], []


def oblong(image) -> str | None:
    """Why no processor can use a picture: Qwen's refuses it, CLIP's would blow its short side up."""
    w, h = image.size
    return f"{w}x{h} pixels: expected a side of at most 200 times the other" if max(w, h) > 200 * min(w, h) else None


def collate_shown(vlm: FrozenVLM, condition: int, cache=None):
    """Items of Shown -> Batch; rows, for a selection inside the language model, ask in front of the image too."""
    def build(items) -> Batch:
        numbers, images, asked, lost = zip(*items)
        rows = vlm.batch(images, [[(q, None)] for q in asked], "cpu", twice=True) if condition else None
        return Batch(rows or vlm.pictures(images, "cpu"), rows, list(range(len(items))),
                     tuple(name for each in lost for name in each), cache.units(numbers) if cache else None)
    return build


def recon_data(cfg, vlm: FrozenVLM):
    """(items in the order of the epochs, collate); sets cfg.steps. Makes the cache of features first, if wished."""
    data, cache = Shown(cfg, vlm), None
    if cfg.cache_features:
        key = {"fingerprint": vlm.fingerprint(), "dtype": cfg.dtype, "pictures": len(data),
               "source": cfg.images or f"scenes of seed {cfg.seed}"}
        cache = FeatureCache(cfg.cache_features, key, vlm.dtype)
        missing = torch.utils.data.Subset(data, range(len(cache), len(data)))
        loader = DataLoader(missing, cfg.batch, num_workers=cfg.workers, collate_fn=collate_shown(vlm, 0))
        cache.fill(len(data), loader, lambda batch: vlm.encode(batch.pictures.to(vlm.device)))
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(data) / cfg.batch)
    return data, collate_shown(vlm, cfg.condition, cache)


def train_step(selector, vlm, batch: Batch, cfg, step) -> tuple[torch.Tensor, dict]:
    """The loss and what to log of it. Noise and K depend on (seed, step) alone."""
    generator = torch.Generator(vlm.device).manual_seed(cfg.seed * 1_000_003 + step)
    pictures = batch.pictures.to(vlm.device)
    units = (batch.units or vlm.encode(pictures)).rows(batch.owner)
    autocast = torch.autocast(vlm.device.type, torch.bfloat16, enabled=cfg.autocast)
    if cfg.method == "recon":                          # Eq. (8) of its paper: no answer is read
        if cfg.condition:
            prompt = vlm.embed(batch.rows.to(vlm.device), units)
            units = replace(units, feats=vlm.visual_states(prompt, cfg.condition))
        views, pixels = units.views or [1] * len(units.grid), vlm.pixels(pictures)
        pixels = [view for picture, n in zip(pixels, views) for view in picture.chunk(n, 1)]
        units = units.apart()                          # a crop is a picture
        with autocast:
            loss, shown = selector(*units.pad(), pixels, units.grid, generator)
        return loss, {k: round(x, 4) for k, x in shown.items()}
    rows, (v, valid) = batch.rows.to(vlm.device), units.pad()
    tau = autoselect.temperature(step, cfg.steps, cfg)
    if cfg.method == "autoselect":                     # Eq. (1): the frozen VLM's own loss on gated tokens
        keep = cfg.keep[step % len(cfg.keep)]
        with autocast:
            gated, a = selector(v, valid, keep, tau, generator)
        loss = vlm.loss(vlm.embed(rows, units, units.flat(gated)))
        shown = {"keep": keep}
    else:                                              # Eq. (15)
        g_text = stepprune.text_gate(step, cfg.text_steps)
        with autocast:
            gated, a, episode, expected = selector(v, valid, *vlm.question(rows), tau, g_text, generator)
        nll, count = vlm.loss(vlm.embed(rows, units, units.flat(gated))), episode.count.float()
        weight = stepprune.length_weight(step, cfg.steps, cfg.length, cfg.length_end)
        loss = nll + weight * (expected / valid.sum(1)).mean()
        shown = {"nll": nll.item(), "K": count.mean().item(), "K_sd": count.std(correction=0).item(),
                 "K_soft": expected.mean().item(), "lambda": weight}
    shown |= {"tau": tau, "sharp": (2 * a - 1).abs()[valid].mean().item()}
    return loss, {k: round(x, 4) for k, x in shown.items()}


def learning_rate(step: int, cfg) -> float:
    """recon: its paper's three stages. The others: 50 steps of warm-up, then a cosine to 0."""
    if cfg.method == "recon":
        return cfg.lr * recon_selector.stage_rate(step, cfg.steps)
    return cfg.lr * min(1., (step + 1) / 50) * (.5 + .5 * math.cos(math.pi * step / cfg.steps))


def status(shown: dict, loss: float, norm: float) -> dict:
    """What the progress bar shows: losses, how many tokens are kept and their spread, temperature, gradient norm."""
    kept = f"{shown['K']:.0f}±{shown['K_sd']:.0f}" if "K" in shown else shown.get("keep", f"{shown.get('kept', 0):.0%}")
    return {"loss": f"{loss:.3f}", "K": kept, "grad": f"{norm:.2f}",
            **{k: shown[k] for k in ("tau", "feature", "image") if k in shown}}


def train(cfg: TrainConfig) -> Path:
    """Train to the end, or on from the last checkpoint. Returns the run folder."""
    vlm = FrozenVLM.from_pretrained(cfg.model, getattr(torch, cfg.dtype), cfg.device)
    torch.manual_seed(cfg.seed)
    selector = build_selector(cfg, vlm).to(cfg.device).train()
    if cfg.method == "recon":
        shown, build = recon_data(cfg, vlm)
    run = open_run(cfg, vlm)
    optim = torch.optim.AdamW(selector.parameters(), lr=cfg.lr, weight_decay=0. if cfg.method == "recon" else .01)
    count = sum(p.numel() for p in selector.parameters())
    frozen = sum(p.numel() for p in vlm.parameters())
    print(f"{cfg.method} on {cfg.model}: {count / 1e6:.2f} M trainable beside {frozen / 1e6:.2f} M frozen, "
          f"{cfg.steps} steps of {cfg.batch} pictures, into {run}")
    first = 0
    if (run / "checkpoint.pt").exists():
        state = torch.load(run / "checkpoint.pt", weights_only=True, map_location=cfg.device)
        first = state["step"]
        selector.load_state_dict(state["selector"])
        optim.load_state_dict(state["optim"])
        print(f"resumed at step {first}")
    if cfg.method == "recon":
        data = Epochs(shown, first * cfg.batch, cfg.steps * cfg.batch, cfg.seed)
    else:
        data = Dialogues(first * cfg.batch, cfg.steps * cfg.batch, cfg.seed, cfg.turns, SIZES[vlm.family][:3])
        build = collate(vlm, each=cfg.method == "stepprune")
    if not first and cfg.method == "stepprune" and cfg.align:
        units = vlm.encode(vlm.batch(*map(list, zip(*(data[i] for i in range(min(64, len(data))))))))
        with torch.no_grad():
            selector.align(units.feats, vlm.project(units.feats))
    loop(cfg, vlm, selector, optim, DataLoader(data, cfg.batch, num_workers=cfg.workers, collate_fn=build,
                                               prefetch_factor=4 if cfg.workers else None), run, first)
    write_whole(run / "selector.safetensors", lambda p: save_file(selector.state_dict(), p))
    return run


def loop(cfg, vlm, selector, optim, loader, run: Path, first: int) -> None:
    """The steps from `first` on, logged line by line in run/log.jsonl, with a checkpoint now and then."""
    log = run / "log.jsonl"                            # lines after the checkpoint will be made again
    lines = log.read_text().splitlines()[:first] if log.exists() else []
    write_whole(log, lambda p: p.write_text("".join(line + "\n" for line in lines)))
    start, lost = time.perf_counter(), set()
    with open(log, "a", buffering=1) as out:
        for step, batch in enumerate(bar := tqdm(loader, "train", initial=first, total=cfg.steps), first):
            optim.param_groups[0]["lr"] = learning_rate(step, cfg)
            loss, shown = train_step(selector, vlm, batch, cfg, step)
            if not torch.isfinite(loss):
                raise RuntimeError(f"loss is {loss.item()} at step {step} (pictures {step * cfg.batch} and on): "
                                   f"try a smaller --lr than {cfg.lr}; the last checkpoint is in {run}")
            optim.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(selector.parameters(), 1.0).item()
            optim.step()
            out.write(json.dumps({"step": step, "loss": round(loss.item(), 5), "grad_norm": round(norm, 5),
                                  "seconds": round(time.perf_counter() - start, 2), **shown}) + "\n")
            bar.set_postfix(status(shown, loss.item(), norm))
            for name in batch.lost:
                if name not in lost:
                    bar.write(f"left out, {name}")
                lost.add(name)
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                save_checkpoint(run, step + 1, selector, optim)
    print(f"trained in {time.perf_counter() - start:.0f} s" + (f"; {len(lost)} files left out" if lost else ""))


def main(args=None) -> None:
    (cfg,) = HfArgumentParser(TrainConfig, description=__doc__).parse_args_into_dataclasses(args)
    run = train(cfg)
    if cfg.evaluate:
        import evaluate  # here, for it imports this file

        evaluate.main(["--run", str(run), "--model", cfg.model, "--device", cfg.device])


if __name__ == "__main__":
    main()
