"""What a selector keeps, and what that costs: `python evaluate.py` on the latest run.

Answers the test questions of the tiny world with all visual tokens, and with K of them chosen by each method, on
the same rows. Prints accuracy per family, retention (the paper's Avg.: mean over families of pruned / unpruned),
evidence recall (share of the tokens that show the answer which were kept) and the time of each stage; saves them
as JSON and Markdown beside three pictures. `--image photo.png --question "..."` answers about any picture.
"""

import json
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import HfArgumentParser

import autoselect
from baselines import cls_attention, random
from benchmarks import scenes
from common import FrozenVLM, random_language_model
from train import load_run, option, write_whole

BASELINES = {"random": random.select, "cls_attention": cls_attention.select}
SIZES = {"llava": ((144, 144),), "qwen2_5_vl": ((144, 144), (192, 108), (108, 192), (96, 216))}


@dataclass
class EvalConfig:
    run: list[str] = field(default_factory=list, metadata={
        "help": "run folders [the latest in runs/]; several (seeds) give one line each, then mean and spread"})
    model: str | None = option(None, "the frozen VLM [the run's own]")
    methods: list[str] = field(default_factory=lambda: ["random", "cls_attention"], metadata={
        "help": "baselines beside the runs: random, cls_attention; evidence keeps what covers the asked things most"})
    gated: bool = option(False, "also answer through each run's noise gate instead of removing tokens (Figure 5)")
    budgets: list[int] = field(default_factory=lambda: [48, 32, 16], metadata={
        "help": "K, kept tokens [paper: 33.3, 22.2 and 11.1 %% of the tokens]"})
    n: int = option(1000, "questions, at least; the families share them")
    batch: int = option(32, "pictures encoded at a time")
    split: str = option("test", "scenes to ask about", choices=["test", "calibration"])
    out: str | None = option(None, "folder of table and pictures [the run folder]")
    pictures: bool = option(True, "draw the curve, the kept patches and the cosine matrix")
    dtype: str = option("bfloat16", "of the frozen VLM", choices=["bfloat16", "float32", "float16"])
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run")
    image: str | None = option(None, "answer about this picture instead")
    question: str | None = option(None, "... this question")
    speed: bool = option(False, "time selection and prefill on a LLaVA-shaped model with random weights instead")


class Clock:
    """Seconds per stage, summed over calls."""

    def __init__(self, device):
        self.seconds, self.device = {}, torch.device(device)

    @contextmanager
    def __call__(self, stage):
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def total(self, stage):
        return sum(self.seconds.get(stage, []))


# --------------------------------------------------------------------------------------------------- measuring

def evidence_of(rows, units) -> list[torch.Tensor]:
    """For every question of every row, (n_b,) share of each unit that shows its answer."""
    return [row.evidence(q, units.grid[b]) for b, row in enumerate(rows) for q in row.questions]


def oracle(evidence, keep: int) -> list[torch.Tensor]:
    """The upper bound: per question the `keep` units with most evidence; of equals the first wins."""
    return [e.argsort(descending=True, stable=True)[:keep].sort().values for e in evidence]


def recall(keep, evidence) -> list[float]:
    """Share of each question's evidence that was kept, 0..1; nan where nothing in the picture bears on the question."""
    return [(e[k.cpu()].sum() / e.sum()).item() for k, e in zip(keep, evidence)]


@torch.no_grad()
def measure(vlm, selectors: dict, rows, budgets, batch: int = 32) -> tuple[dict, Clock]:
    """Answer all questions with all tokens and with each selector's K.

    selectors: name -> select(units, K) giving one keep per picture, or "oracle", or a selector module, whose gate then
    drowns tokens instead of removing them. Returns ({(name, K):
    list of (family, right, recall)}, clock); the unpruned model is ("vanilla", 0). A selection is made once per
    picture and serves all its questions.
    """
    results, clock = {}, Clock(vlm.device)
    for start in tqdm(range(0, len(rows), batch), "evaluate"):
        part = rows[start:start + batch]
        owner = [b for b, row in enumerate(part) for _ in row.questions]
        asked = [q for row in part for q in row.questions]
        pixels = vlm.batch([row.image for row in part], [[(row.questions[0].question, None)] for row in part])
        with clock("vision"):
            units = vlm.encode(pixels)
        evidence, shown = evidence_of(part, units), units.rows(owner)
        questions = vlm.batch([part[b].image for b in owner], [[(q.question, None)] for q in asked])
        for name, budget in [("vanilla", 0), *((name, k) for name in selectors for k in budgets)]:
            feats = keep = None
            with clock(f"select {name} {budget}"):
                if name == "vanilla":
                    pass
                elif isinstance(selectors[name], torch.nn.Module):           # Figure 5: drowned, not removed
                    v, valid = units.pad()
                    gated = units.flat(selectors[name](v, valid, budget)[0])
                    feats = replace(units, feats=gated).rows(owner).feats
                elif selectors[name] == "oracle":
                    keep = oracle(evidence, budget)
                else:
                    chosen = selectors[name](units, budget)
                    keep = [chosen[b] for b in owner]
            with clock(f"answer {name} {budget}"):
                prompt = vlm.embed(questions, shown, feats) if keep is None else vlm.prune(questions, shown, keep)
                answers = vlm.generate(prompt, max_new_tokens=4)
            if start < 4 * batch:                      # the share that prefill has, on the first batches
                with clock(f"prefill {name} {budget}"):
                    vlm.generate(prompt, max_new_tokens=1)
            found = recall(keep, evidence) if keep else [1.] * len(asked)
            results.setdefault((name, budget), []).extend(
                (q.family, scenes.score(a, q.answer), r) for q, a, r in zip(asked, answers, found))
    return results, clock


def summarise(results: dict, clock: Clock, questions: int) -> list[dict]:
    """One line per method and budget: accuracy per family, average, retention, recall, milliseconds, n."""
    lines, full = [], {}
    for (name, budget), hits in results.items():
        families = {f: [r for g, r, _ in hits if g == f] for f in scenes.FAMILIES}
        accuracy = {f: float(np.mean(r)) for f, r in families.items() if r}
        full = full or accuracy                        # the first entry is the unpruned model
        known = [f for f in accuracy if full[f] > 0]
        prefill = clock.seconds[f"prefill {name} {budget}"]
        lines.append({
            "method": name, "K": budget or "all", "n": len(hits), "families": accuracy,
            "average": float(np.mean(list(accuracy.values()))),
            "error": float(np.sqrt(sum(np.var(r) / len(r) for r in families.values() if r)) / len(accuracy)),
            "retention": float(np.mean([accuracy[f] / full[f] for f in known])),
            "recall": float(np.nanmean([r for _, _, r in hits])),
            "vision_ms": 1e3 * clock.total("vision") / questions["pictures"],
            "select_ms": 1e3 * clock.total(f"select {name} {budget}") / questions["pictures"],
            "prefill_ms": 1e3 * sum(prefill) / questions["timed"]})
    return lines


def spread(lines: list[dict], names: list[str], label: str) -> list[dict]:
    """Mean of the runs' lines per budget, with their standard deviation (n-1) as average_sd, recall_sd, ..."""
    merged = []
    for budget in dict.fromkeys(line["K"] for line in lines if line["method"] in names):
        group = [line for line in lines if line["method"] in names and line["K"] == budget]
        mean = {k: float(np.mean([g[k] for g in group])) for k, v in group[0].items() if isinstance(v, float)}
        sd = {f"{k}_sd": float(np.std([g[k] for g in group], ddof=1)) for k in ("average", "retention", "recall")}
        families = {f: float(np.mean([g["families"][f] for g in group])) for f in group[0]["families"]}
        merged.append({**group[0], **mean, **sd, "method": label, "runs": len(group), "families": families})
    return merged


def table(lines: list[dict]) -> str:
    """The lines as Markdown; percent, and milliseconds a picture (vision, selection) or a question (prefill)."""
    head = ["method", "K", *scenes.FAMILIES, "average", "retention", "evidence recall", "select ms", "prefill ms"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        def percent(key, line=line):
            return f"{100 * line[key]:.1f}" + (f" ±{100 * line[key + '_sd']:.1f}" if key + "_sd" in line else "")
        cells = [line["method"], str(line["K"]), *(f"{100 * line['families'].get(f, float('nan')):.1f}"
                                                   for f in scenes.FAMILIES),
                 percent("average"), percent("retention"), percent("recall"),
                 f"{line['select_ms']:.2f}", f"{line['prefill_ms']:.2f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


@torch.no_grad()
def measure_speed(device: str, layers: int = 4, text: int = 60, repeats: int = 5) -> list[dict]:
    """Prefill at 576, 192, 128 and 64 visual tokens and `text` text tokens, and AutoSelect's selection of them, on a
    language model of LLaVA-1.5-7B's width but `layers` layers, with random weights: only the ratios mean something.

    Times are medians of `repeats`; FLOPs are counted (2 per multiply-add, attention in full).
    """
    clock, lm = Clock(device), random_language_model(layers).to(device)
    scorer = autoselect.AutoSelect(autoselect.Config()).to(device, torch.bfloat16).eval()
    v, lines = torch.randn(1, 576, 1024, device=device, dtype=torch.bfloat16), []
    for k in tqdm([576, 192, 128, 64], "speed"):
        x = torch.randn(1, k + text, 4096, device=device, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as flops:
            lm(inputs_embeds=x)
        for _ in range(repeats):
            with clock(f"prefill {k}"):
                lm(inputs_embeds=x)
            with clock(f"select {k}"):
                scorer.select(v, keep=k)
        prefill, select = (float(np.median(clock.seconds[f"{stage} {k}"])) for stage in ("prefill", "select"))
        lines.append({"K": k, "prefill_ms": 1e3 * prefill, "select_ms": 1e3 * select, "flops": flops.get_total_flops()})
    return lines


def speed_table(lines: list[dict], layers: int) -> str:
    """Ratios to the unpruned prompt of the same run; selection's share is scaled to the real model's 32 layers."""
    out = ["| K | prefill ms | speed-up | FLOPs ratio | selection ms | selection / unpruned prefill of 32 layers |",
           "|" + "---|" * 6]
    for line in lines:
        full = lines[0]
        out.append(f"| {line['K']} | {line['prefill_ms']:.0f} | {full['prefill_ms'] / line['prefill_ms']:.2f}x | "
                   f"{full['flops'] / line['flops']:.2f}x | {line['select_ms']:.1f} | "
                   f"{100 * line['select_ms'] / (full['prefill_ms'] * 32 / layers):.1f} % |")
    return "\n".join(out)


def refresh(page: Path) -> None:
    """Put the tables that a page quotes between <!-- table: FILE --> and <!-- end --> in again from their files."""
    def quote(found):
        return f"{found[1]}\n{(page.parent / found[2]).read_text().strip()}\n<!-- end -->"
    page.write_text(re.sub(r"(<!-- table: (\S+) -->)\n.*?<!-- end -->", quote, page.read_text(), flags=re.S))


# ---------------------------------------------------------------------------------------------------- pictures

def draw_curve(lines: list[dict], tokens: int, path: Path) -> None:
    """Average accuracy against kept tokens, one curve a method, the unpruned model as a line."""
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axis.axhline(100 * lines[0]["average"], color="grey", ls="--", label=f"all {tokens} tokens")
    for name in dict.fromkeys(line["method"] for line in lines[1:]):
        points = sorted((line["K"], 100 * line["average"], 100 * line.get("average_sd", line["error"]))
                        for line in lines if line["method"] == name)
        axis.errorbar(*zip(*points), marker="o", capsize=3, label=name)
    axis.set(xlabel="kept tokens K", ylabel="accuracy, mean over families (%)",
             xticks=sorted({line["K"] for line in lines[1:]}))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_kept(images, grids, scores, keeps, titles, path: Path) -> None:
    """Per picture: itself, the heat map of its scores, and the kept patches with the rest greyed out."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, len(images), figsize=(2 * len(images), 6.4), layout="constrained", squeeze=False)
    for b, (image, (rows, columns), s, keep) in enumerate(zip(images, grids, scores, keeps)):
        pixels = np.asarray(image.convert("RGB"))
        mask = np.zeros(rows * columns)
        mask[keep.cpu().numpy()] = 1
        near = Image.fromarray((255 * mask.reshape(rows, columns)).astype(np.uint8)).resize(image.size, Image.NEAREST)
        kept = np.where(np.asarray(near)[..., None] > 0, pixels, (pixels * .2 + 180).astype(np.uint8))
        heat = np.ma.masked_invalid(s.float().cpu().numpy().reshape(rows, columns))
        shown = [(pixels, {}), (heat, {"cmap": "magma", "extent": (0, image.width, image.height, 0)}), (kept, {})]
        for axis, (picture, style), title in zip(axes[:, b], shown, ["", "score", f"{len(keep)} kept"]):
            axis.imshow(picture, **style)
            axis.set_title(title or titles[b], fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_cosines(feats: torch.Tensor, s: torch.Tensor, path: Path, most: int = 16) -> dict:
    """The paper's Figure 4: cosines among the `most` best and the `most` worst tokens, best first.

    feats (B, N, C), s (B, N). Returns the mean cosine inside each of the two groups, own pairs left out.
    """
    import matplotlib.pyplot as plt
    order = s.argsort(1, descending=True)
    index = torch.cat([order[:, :most], order[:, -most:]], 1)
    x = (feats - feats.mean((0, 1))).float()           # what all tokens share says nothing about any
    x = torch.nn.functional.normalize(x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), dim=-1)
    cosine = (x @ x.mT).mean(0).cpu()
    figure, axis = plt.subplots(figsize=(4.4, 3.6), layout="constrained")
    picture = axis.imshow(cosine, cmap="coolwarm", vmin=-1, vmax=1)
    axis.set_title(f"cosine of the {most} best (top left) and {most} worst tokens\nmean of {len(feats)} pictures",
                   fontsize=8)
    figure.colorbar(picture)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    off = ~torch.eye(most, dtype=torch.bool)
    return {"best": cosine[:most, :most][off].mean().item(), "worst": cosine[most:, most:][off].mean().item()}


# -------------------------------------------------------------------------------------------------------- main

def latest_run() -> str:
    """The run in runs/ that finished last. Raises FileNotFoundError when there is none."""
    done = sorted(Path("runs").glob("**/selector.safetensors"), key=lambda p: p.stat().st_mtime)
    if not done:
        raise FileNotFoundError("runs/ holds no finished run: python train.py --method autoselect makes one")
    return str(done[-1].parent)


def answer_one(cfg: EvalConfig, vlm, selector, out: Path) -> None:
    """--image, --question: the answer with all tokens and with each budget, and a picture of the kept patches."""
    try:
        image = Image.open(cfg.image).convert("RGB")
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read --image {cfg.image}: {error}. Expected a picture, PNG or JPEG") from error
    batch = vlm.batch([image], [[(cfg.question or "", None)]])
    units = vlm.encode(batch)
    v, valid = units.pad()
    scores = selector.scores(v, valid).detach()
    print(f"all {sum(units.counts)} tokens: {vlm.generate(vlm.embed(batch, units))[0]}")
    keeps = [selector.select(v, valid, k)[0] for k in cfg.budgets]
    for k, keep in zip(cfg.budgets, keeps):
        print(f"{k} tokens: {vlm.generate(vlm.prune(batch, units, [keep]))[0]}")
    path = out / "answer.png"
    draw_kept([image] * len(keeps), units.grid * len(keeps), [scores[0]] * len(keeps), keeps,
              [cfg.question] * len(keeps), path)
    print(f"drawn: {path}")


def main(args=None) -> list[dict]:
    (cfg,) = HfArgumentParser(EvalConfig, description=__doc__).parse_args_into_dataclasses(args)
    unknown = set(cfg.methods) - {*BASELINES, "evidence"}
    if unknown:
        raise ValueError(f"methods={sorted(unknown)}: known are {[*BASELINES, 'evidence']}")
    if cfg.speed:
        lines = measure_speed(cfg.device)
        text = speed_table(lines, 4)
        print(f"\n{text}\n\nrandom weights, 4 layers, {cfg.device}, {torch.get_num_threads()} threads")
        write_whole(Path(cfg.out or "runs") / "speed.json", lambda p: p.write_text(json.dumps(lines, indent=1)))
        write_whole(Path(cfg.out or "runs") / "speed.md", lambda p: p.write_text(text + "\n"))
        return lines
    runs = cfg.run or ([] if cfg.model else [latest_run()])
    if not all((Path(run) / "config.json").exists() for run in runs):
        raise FileNotFoundError(f"{runs}: not all of these hold a run (config.json is missing)")
    model = cfg.model or json.loads((Path(runs[0]) / "config.json").read_text())["model"]
    vlm = FrozenVLM.from_pretrained(model, getattr(torch, cfg.dtype), cfg.device)
    out = Path(cfg.out or (runs[0] if runs else f"runs/{Path(model).name}"))
    out.mkdir(parents=True, exist_ok=True)
    trained = {str(run): load_run(run, vlm)[0] for run in runs}
    if cfg.image or cfg.question:
        if not (cfg.image and trained):
            raise ValueError("--question needs --image, a picture file, and a trained run")
        return answer_one(cfg, vlm, next(iter(trained.values())), out)

    def learned(selector):
        return lambda units, k: selector.select(*units.pad(), k)
    selectors = {name: "oracle" if name == "evidence" else BASELINES[name] for name in cfg.methods
                 if name != "cls_attention" or hasattr(vlm.model.config, "vision_feature_layer")}
    for name in set(cfg.methods) - set(selectors):
        print(f"{name}: left out, this vision encoder has no [CLS] token")
    selectors |= {name: learned(selector) for name, selector in trained.items()}
    if cfg.gated:
        selectors |= {f"{name} gated": selector for name, selector in trained.items()}
    rows = scenes.load(cfg.n, cfg.split, SIZES[vlm.model.config.model_type])
    results, clock = measure(vlm, selectors, rows, cfg.budgets, cfg.batch)
    timed = sum(len(row.questions) for row in rows[:4 * cfg.batch])
    lines = summarise(results, clock, {"pictures": len(rows), "timed": timed})
    if len(trained) > 1:
        for kind in ("", " gated") if cfg.gated else ("",):
            lines += spread(lines, [name + kind for name in trained], f"mean of {len(trained)} runs{kind}")
    text = table(lines)
    print(f"\n{text}\n\n{lines[0]['n']} questions about {len(rows)} {cfg.split} scenes of the tiny world, model "
          f"{model}, {cfg.device}. It shows the mechanism; these are not the papers' numbers.")
    write_whole(out / "evaluation.json", lambda p: p.write_text(json.dumps(lines, indent=1)))
    write_whole(out / "evaluation.md", lambda p: p.write_text(text + "\n"))
    if cfg.pictures:
        single = {name + kind for name in trained for kind in ("", " gated")} if len(trained) > 1 else ()
        draw_curve([line for line in lines if line["method"] not in single],
                   rows[0].image.width * rows[0].image.height // 144, out / "curve.png")
        if trained:
            draw_run(vlm, next(iter(trained.values())), rows[:64], cfg.budgets, out)
        print(f"pictures: {', '.join(str(p) for p in sorted(out.glob('*.png')))}")
    return lines


@torch.no_grad()
def draw_run(vlm, selector, rows, budgets, out: Path) -> None:
    """Heat maps with kept patches of six scenes, and Figure 4's matrix over the square ones."""
    rows = [row for row in rows if row.image.size == rows[0].image.size]
    units = vlm.encode(vlm.batch([r.image for r in rows], [[(r.questions[0].question, None)] for r in rows]))
    v, valid = units.pad()
    scores, keeps = selector.scores(v, valid), selector.select(v, valid, budgets[-1])
    draw_kept([r.image for r in rows[:6]], units.grid[:6], scores[:6], keeps[:6],
              [f"scene {r.id - scenes.scenes.SPLITS['test']}" for r in rows[:6]], out / "kept.png")
    draw_cosines(v.flatten(2), scores, out / "cosines.png")


if __name__ == "__main__":
    main()
