"""Teach a selector which visual tokens of a frozen VLM matter: `python train.py --method autoselect`.

One plain loop. With no other flag it trains on the tiny LLaVA that ships with the project, a few minutes on a
laptop, and ends with evaluate.py's table and pictures. Everything goes to runs/<method>; a killed run goes on
where it stopped when the same command is given again, and ends as if it had never been stopped.
"""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

import autoselect
import stepprune
from benchmarks.scenes import SIZES, Dialogues
from common import FrozenVLM

METHODS = {                                            # what each method trains with unless told otherwise
    "autoselect": dict(steps=450, batch=16, lr=2e-3, tau_start=.1, tau_end=.02, autocast=False),
    "stepprune": dict(steps=600, batch=8, lr=1e-3, tau_start=1., tau_end=.2, autocast=True)}
SAME_RUN = ("method", "model", "seed", "steps", "batch", "keep", "lr", "layers", "heads", "gate", "denoiser", "scorer",
            "tau_start", "tau_end", "dtype", "turns", "length", "max_steps", "gamma", "hops", "budget", "aggregation",
            "causal", "text_steps", "length_end", "align",
            "autocast", "stop")


def option(default, text, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class TrainConfig:
    method: str = option("autoselect", "which paper to train", choices=list(METHODS))
    model: str = option("tiny/llava", "checkpoint folder or hub id of the frozen VLM")
    run: str | None = option(None, "run folder [runs/<method>]")
    seed: int = option(0, "of weights, scenes and noise")
    steps: int | None = option(None, "optimiser steps [ours: autoselect 450, stepprune 600]")
    batch: int | None = option(None, "pictures a step [ours: autoselect 16; stepprune 8, each question a row]")
    turns: int = option(7, "questions a picture; autoselect reads its caption before them [ours]")
    keep: list[int] = field(default_factory=lambda: [*[48] * 6, 32, 16], metadata={
        "help": "K in training; the steps take turns [ours: the paper's three budgets; most often the "
                "widest, whose order settles last]"})
    lr: float | None = option(None, "AdamW's learning rate after warm-up [ours: autoselect 2e-3, stepprune 1e-3]")
    layers: int = option(2, "blocks of scorer or encoder [ours, tiny; 5 give AutoSelect's size on CLIP-L; stepprune: "
                            "paper]")
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
        if min(self.steps, self.batch, self.save_every, *self.keep) < 1:
            raise ValueError(f"steps={self.steps}, batch={self.batch}, save_every={self.save_every}, "
                             f"keep={self.keep}: all must be at least 1")


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
    rows: dict
    owner: list[int]


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


def train_step(selector, vlm, batch: Batch, cfg, step) -> tuple[torch.Tensor, dict]:
    """The frozen VLM's own loss on gated tokens. Noise and K depend on (seed, step) alone."""
    generator = torch.Generator(vlm.device).manual_seed(cfg.seed * 1_000_003 + step)
    rows = batch.rows.to(vlm.device)
    units = vlm.encode(batch.pictures.to(vlm.device)).rows(batch.owner)
    v, valid = units.pad()
    tau = autoselect.temperature(step, cfg.steps, cfg)
    if cfg.method == "autoselect":                     # Eq. (1)
        keep = cfg.keep[step % len(cfg.keep)]
        with torch.autocast(vlm.device.type, torch.bfloat16, enabled=cfg.autocast):
            gated, a = selector(v, valid, keep, tau, generator)
        loss = vlm.loss(vlm.embed(rows, units, units.flat(gated)))
        shown = {"keep": keep}
    else:                                              # Eq. (15)
        g_text = stepprune.text_gate(step, cfg.text_steps)
        with torch.autocast(vlm.device.type, torch.bfloat16, enabled=cfg.autocast):
            gated, a, episode, expected = selector(v, valid, *vlm.question(rows), tau, g_text, generator)
        nll, count = vlm.loss(vlm.embed(rows, units, units.flat(gated))), episode.count.float()
        weight = stepprune.length_weight(step, cfg.steps, cfg.length, cfg.length_end)
        loss = nll + weight * (expected / valid.sum(1)).mean()
        shown = {"nll": nll.item(), "K": count.mean().item(), "K_sd": count.std(correction=0).item(),
                 "K_soft": expected.mean().item(), "lambda": weight}
    shown |= {"tau": tau, "sharp": (2 * a - 1).abs()[valid].mean().item()}
    return loss, {k: round(x, 4) for k, x in shown.items()}


def train(cfg: TrainConfig) -> Path:
    """Train to the end, or on from the last checkpoint. Returns the run folder."""
    vlm = FrozenVLM.from_pretrained(cfg.model, getattr(torch, cfg.dtype), cfg.device)
    run = open_run(cfg, vlm)
    torch.manual_seed(cfg.seed)
    selector = build_selector(cfg, vlm).to(cfg.device).train()
    optim = torch.optim.AdamW(selector.parameters(), lr=cfg.lr, weight_decay=0.01)
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
    data = Dialogues(first * cfg.batch, cfg.steps * cfg.batch, cfg.seed, cfg.turns,
                     SIZES[vlm.family][:3])
    if not first and cfg.method == "stepprune" and cfg.align:
        units = vlm.encode(vlm.batch(*map(list, zip(*(data[i] for i in range(min(64, len(data))))))))
        with torch.no_grad():
            selector.align(units.feats, vlm.project(units.feats))
    log = run / "log.jsonl"                            # lines after the checkpoint will be made again
    lines = log.read_text().splitlines()[:first] if log.exists() else []
    write_whole(log, lambda p: p.write_text("".join(line + "\n" for line in lines)))
    loader = DataLoader(data, cfg.batch, num_workers=cfg.workers, prefetch_factor=4 if cfg.workers else None,
                        collate_fn=collate(vlm, each=cfg.method == "stepprune"))
    start = time.perf_counter()
    with open(log, "a", buffering=1) as out:
        for step, batch in enumerate(bar := tqdm(loader, "train", initial=first, total=cfg.steps), first):
            rate = min(1., (step + 1) / 50) * (.5 + .5 * math.cos(math.pi * step / cfg.steps))
            optim.param_groups[0]["lr"] = cfg.lr * rate
            loss, shown = train_step(selector, vlm, batch, cfg, step)
            if not torch.isfinite(loss):
                raise RuntimeError(f"loss is {loss.item()} at step {step} (scenes {step * cfg.batch} and on): "
                                   f"try a smaller --lr than {cfg.lr}; the last checkpoint is in {run}")
            optim.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(selector.parameters(), 1.0).item()
            optim.step()
            out.write(json.dumps({"step": step, "loss": round(loss.item(), 5), "grad_norm": round(norm, 5),
                                  "seconds": round(time.perf_counter() - start, 2), **shown}) + "\n")
            kept = f"{shown['K']:.0f}±{shown['K_sd']:.0f}" if "K" in shown else shown["keep"]
            bar.set_postfix(loss=f"{loss.item():.3f}", K=kept, tau=shown["tau"], grad=f"{norm:.2f}")
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                save_checkpoint(run, step + 1, selector, optim)
    write_whole(run / "selector.safetensors", lambda p: save_file(selector.state_dict(), p))
    print(f"trained in {time.perf_counter() - start:.0f} s")
    return run


def main(args=None) -> None:
    (cfg,) = HfArgumentParser(TrainConfig, description=__doc__).parse_args_into_dataclasses(args)
    run = train(cfg)
    if cfg.evaluate:
        import evaluate  # here, for it imports this file

        evaluate.main(["--run", str(run), "--model", cfg.model, "--device", cfg.device])


if __name__ == "__main__":
    main()
