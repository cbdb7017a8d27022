"""The pictures that evaluate.py and the notebooks draw. Each function takes numbers and writes one PNG."""

import json
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def draw_curve(lines: list[dict], tokens: int, path: Path) -> None:
    """Average accuracy against kept tokens, one curve a method, the unpruned model as a line."""
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axis.axhline(100 * lines[0]["average"], color="grey", ls="--", label=f"all {tokens} tokens")
    lines = [lines[0], *(line for line in lines[1:] if isinstance(line["K"], int))]            # not an own mask's
    for name in dict.fromkeys(line["method"] for line in lines[1:]):
        points = sorted((line["kept"], 100 * line["average"], 100 * line.get("average_sd", line["error"]))
                        for line in lines if line["method"] == name)
        axis.errorbar(*zip(*points), marker="o", capsize=3, label=name)
    axis.set(xlabel="kept tokens, mean", ylabel="accuracy, mean over families (%)",
             xticks=sorted({line["K"] for line in lines[1:]}))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_tokens(lines: list[dict], names: dict, path: Path) -> None:
    """A panel a benchmark: score with its interval against visual tokens, mean over layers, a curve a method, the
    unpruned model as a line. lines: of benchmarks/scores.py; names: benchmark -> title."""
    columns = min(4, len(names))
    lanes = -(-len(names) // columns)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    height = max(3.6 * lanes, .19 * len(methods))
    figure, axes = plt.subplots(lanes, columns, figsize=(2.2 + 4.2 * columns * max(1, height / (3.6 * lanes)), height),
                                layout="constrained", squeeze=False)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, (name, title) in zip(axes.flat, names.items()):
        there = [line for line in lines if name in line["scores"]]
        for number, method in enumerate(methods):
            points = sorted((line["costs"][name]["layer_mean"], line["scores"][name]["value"],
                             *line["scores"][name]["interval"]) for line in there if line["method"] == method)
            if not points:
                continue
            x, y, low, high = np.array(points).T
            if method == "vanilla":
                axis.axhline(y[0], color="grey", ls="--", label=f"all {x[0]:.0f} tokens")
                continue
            axis.errorbar(x, y, np.maximum(0, [y - low, high - y]), capsize=2, lw=1, ms=4, label=Path(method).name,
                          color=plt.cm.tab10(number % 10), marker="os^Dv"[number // 10 % 5])
        axis.set(xlabel="visual tokens, mean over layers", ylabel="score", title=title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_kept(images, grids, scores, keeps, titles, path: Path, orders=None) -> None:
    """Per picture: itself, the heat map of its scores, and the kept patches with the rest greyed out, numbered in the
    order orders[b] in which they were picked."""
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
            axis.set_title(title or textwrap.fill(titles[b], 26), fontsize=8)
            axis.axis("off")
        for number, i in enumerate(orders[b].tolist() if orders else (), 1):
            x, y = (i % columns + .5) * image.width / columns, (i // columns + .5) * image.height / rows
            axes[2, b].text(x, y, number, fontsize=5.5, ha="center", va="center", color="white",
                            bbox=dict(facecolor="black", alpha=.75, lw=0, pad=.6))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_adaptive(found: dict, path: Path) -> None:
    """The paper's Figure 4, left: histogram of K and accuracy per log-spaced bucket of K, a panel per mean K."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3), layout="constrained", squeeze=False)
    for axis, ((_, budget), x) in zip(axes[0], found.items()):
        filled = [b for b in x["buckets"] if b["n"]]
        left, right = [b["from"] - .5 for b in filled], [b["to"] + .5 for b in filled]
        axis.bar(left, [b["n"] for b in filled], np.subtract(right, left), align="edge", color="lightsteelblue", ec="w")
        axis.set(xlabel=f"kept tokens (mean {x['mean']:.1f})", ylabel="questions", title=f"wished mean K = {budget}")
        line = axis.twinx()
        line.plot(np.add(left, right) / 2, [100 * b["accuracy"] for b in filled], "o-", color="firebrick")
        line.set(ylim=(0, 105), ylabel="accuracy (%)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_training(runs: list[str], path: Path) -> None:
    """Loss and its parts, gradient norm and, where the selector decides, kept tokens at every step of the runs; means
    of 10 steps."""
    logs = {run: [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()] for run in runs}
    known = ("loss", "nll", "K", "feature", "image", "kept", "grad_norm")
    keys = [key for key in known if all(key in log[0] for log in logs.values())]
    figure, axes = plt.subplots(1, len(keys), figsize=(3.2 * len(keys), 2.8), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys):
        for run, log in logs.items():
            values = np.array([line[key] for line in log])
            smooth = np.convolve(values, np.ones(10) / 10, "valid") if len(values) > 20 else values
            axis.plot(np.arange(len(values) - len(smooth), len(values)), smooth, lw=1, label=Path(run).name)
        axis.set(xlabel="step", title=key, yscale="linear" if key in ("K", "kept") else "log")
    axes[0, 0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_cosines(feats: torch.Tensor, s: torch.Tensor, path: Path, most: int = 16) -> dict:
    """The paper's Figure 4: cosines among the `most` best and the `most` worst tokens, best first.

    feats (B, N, C), s (B, N). Returns the mean cosine inside each of the two groups, own pairs left out.
    """
    order, most = s.argsort(1, descending=True), min(most, s.shape[1] // 2)
    index = torch.cat([order[:, :most], order[:, -most:]], 1)
    x = (feats - feats.mean((0, 1))).float()           # what all tokens share says nothing about any
    x = F.normalize(x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), dim=-1)
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


def draw_rebuilt(images, rows: dict, path: Path) -> None:
    """A column a picture: itself, then per title in `rows` one (3, H, W) in [0, 1] or an image each."""
    figure, axes = plt.subplots(1 + len(rows), len(images), figsize=(1.8 * len(images), 2 * (1 + len(rows))),
                                layout="constrained", squeeze=False)
    for line, (title, shown) in enumerate({"": images, **rows}.items()):
        for axis, picture in zip(axes[line], shown):
            axis.imshow(picture.permute(1, 2, 0).float().cpu().clamp(0, 1) if torch.is_tensor(picture) else picture)
            axis.axis("off")
        axes[line, 0].set_title(title, fontsize=8, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
