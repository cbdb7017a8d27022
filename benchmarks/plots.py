"""The pictures that evaluate.py and the notebooks draw. Each function takes numbers and writes one
PNG."""

import itertools
import json
import textwrap
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import tables
from benchmarks.scores import mean_over_seeds
from common import kept_mask
from runs import write_whole

KINDS = {"before": "before the language model", "merging": "merging",
         "inside": "inside the language model"}
# of the runs, which are in colour: dark enough for a thin line on white, apart for the colour-blind
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a4fbf", "#8c6d00", "#00798c", "#a3203a")
# of the rivals, which are the background: from dark to light, no tone twice
GREYS = (.25, .62)
MARKERS = "os^Dv<>pPX*h"


def save(figure, path: Path, dpi: int = 130) -> None:
    kind = Path(path).suffix[1:] or "png"              # the temporary file has another ending
    write_whole(Path(path), partial(figure.savefig, dpi=dpi, format=kind))
    plt.close(figure)


# ---------------------------------------------------------------------------- score against tokens


def draw_budgets(lines: list[dict], kinds: dict[str, str], path: Path) -> None:
    """Score against visual tokens, mean over the language model's layers: a row of panels a
    benchmark, a column a kind of rival. The runs are in every panel.

    lines: of scores.summarise() | kinds: method -> "before", "merging" or "inside", by
    default the first
    Runs, which have a folder in their name, are in colour, their seeds a mean line and a band of
    one standard deviation, or of one seed the 95 % interval; rivals are grey. Each is named at its
    line's end, the runs in the first panel alone. The unpruned model is a dashed line.
    """
    titles = tables.titles_of(lines)
    curves = [line for line in mean_over_seeds(lines)
              if line["K"] != 0 and not isinstance(line["K"], str)]
    methods = list(dict.fromkeys(line["method"] for line in curves))
    runs = [method for method in methods if "/" in method]
    rivals = {kind: [method for method in methods
                     if method not in runs and kinds.get(method, "before") == kind]
              for kind in KINDS}
    shown = [kind for kind in KINDS if rivals[kind]] or ["before"]
    style = dict(zip(runs, zip(run_colours(len(runs)), itertools.cycle(MARKERS))))
    most = max(map(len, rivals.values()))
    for column, kind in enumerate(shown):
        for i, method in enumerate(rivals[kind]):
            share = (i + (column + .5) / len(shown)) / most           # another for every rival
            tone = GREYS[0] + share * (GREYS[1] - GREYS[0])
            style[method] = (str(tone), MARKERS[i % len(MARKERS)])
    figure, axes = plt.subplots(
        len(titles), len(shown), figsize=(1 + 4.6 * len(shown), .6 + 4.4 * len(titles)),
        layout="constrained", squeeze=False, sharey="row")
    for row, (name, title) in zip(axes, titles.items()):
        for axis, kind in zip(row, shown):
            draw_panel(axis, lines, curves, name, rivals[kind], runs, style, kind == shown[0])
            axis.set(xlabel="visual tokens, mean over layers", title=f"{title}: {KINDS[kind]}")
        row[0].set_ylabel("score")
    figure.supxlabel("band: one standard deviation over seeds; of one seed the 95 % interval over "
                     "questions", fontsize=8)
    # only now do the panels have the limits and the size that labels are placed by
    figure.draw_without_rendering()
    for axis in axes.flat:
        place_labels(axis)
    save(figure, path)


def run_colours(n: int) -> list:
    """n different colours."""
    return list(COLOURS[:n]) if n <= len(COLOURS) else list(plt.cm.turbo(np.linspace(.05, .95, n)))


def draw_panel(axis, lines, curves, name, rivals, runs, style, name_runs: bool) -> None:
    """One benchmark and kind of rival; labels are left at axis.ends for place_labels()."""
    axis.ends = []
    names = tables.short_names([*rivals, *runs])
    for method in [*rivals, *runs]:                    # runs last, on top
        own = [line for line in curves if line["method"] == method and name in line["scores"]]
        own.sort(key=lambda line: line["costs"][name]["layer_mean"])
        if not own:
            continue
        colour, marker = style[method]
        is_run = method in runs
        x = np.array([line["costs"][name]["layer_mean"] for line in own])
        y = np.array([line["scores"][name]["value"] for line in own])
        axis.plot(x, y, color=colour, marker=marker, ms=5 if is_run else 3.5,
                  lw=2 if is_run else 1, zorder=3 if is_run else 2)
        if is_run:
            low, high = zip(*(band(line["scores"][name]) for line in own))
            axis.fill_between(x, low, high, color=colour, alpha=.18, lw=0)
        if name_runs or not is_run:
            axis.ends.append((x[-1], y[-1], names[method], colour, is_run))
    full = [line for line in lines if line["K"] == 0 and name in line["scores"]]
    for line in full[:1]:
        value, tokens = line["scores"][name]["value"], line["costs"][name]["layer_mean"]
        axis.axhline(value, color="black", ls="--", lw=1, zorder=1)
        axis.annotate(f"all {tokens:.0f} tokens", (0, value), xycoords=("axes fraction", "data"),
                      xytext=(4, 3), textcoords="offset points", fontsize=8, va="bottom")
    axis.spines[["top", "right"]].set_visible(False)
    tokens = [x for line in axis.get_lines() if line.get_marker() != "None"
              for x in line.get_xdata()] or [0, 1]
    left, right = min(tokens), max(tokens)
    width = max(right - left, 1)
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
    axis.set_xlim(left - .06 * width, right + .5 * width)            # room for the names


def band(result: dict) -> tuple[float, float]:
    """One standard deviation over seeds; of one seed its interval over questions."""
    if "interval" in result:
        return tuple(result["interval"])
    sd = result.get("value_sd", 0.)
    return result["value"] - sd, result["value"] + sd


def place_labels(axis, size: float = 8) -> None:
    """Each line's name to the right of all lines, moved up or down until no two overlap."""
    points = axis.transData.transform([(x, y) for x, y, *_ in axis.ends])
    if not len(points):
        return
    figure = axis.get_figure()
    height = 1.25 * size * figure.dpi / 72
    low, high = axis.get_window_extent().y0, axis.get_window_extent().y1
    order = np.argsort(points[:, 1])
    at = spaced(points[order, 1], height, low, high)
    column = points[:, 0].max() + .06 * axis.get_window_extent().width
    for place, i in zip(at, order):
        x, y, name, colour, is_run = axis.ends[i]
        target = axis.transData.inverted().transform((column, place))
        axis.annotate(name, (x, y), xytext=target, fontsize=size, color=colour, va="center",
                      weight="bold" if is_run else "normal", annotation_clip=False,
                      bbox=dict(facecolor="white", alpha=.8, lw=0, pad=.5),
                      arrowprops=dict(arrowstyle="-", color=colour, lw=.5, relpos=(0, .5),
                                      shrinkA=0, shrinkB=2))


def spaced(wanted, gap: float, low: float, high: float) -> np.ndarray:
    """Ascending places at least `gap` apart, as near to the ascending wanted ones as that allows,
    in low..high if there is room: neighbours that overlap move apart together."""
    groups = [[place, 1] for place in wanted]          # mean place and how many stand there
    i = 0
    while i < len(groups) - 1:
        (a, n), (b, m) = groups[i], groups[i + 1]
        if b - a < gap * (n + m) / 2:
            groups[i:i + 2] = [[(a * n + b * m) / (n + m), n + m]]
            i = max(i - 1, 0)
        else:
            i += 1
    places = np.concatenate([place + gap * (np.arange(n) - (n - 1) / 2) for place, n in groups])
    number = np.arange(len(places))
    places = np.maximum(places, low + gap * (number + .5))
    return np.minimum(places, high - gap * (len(places) - number - .5))


# ------------------------------------------------------------------------------------ what is kept


def draw_kept(images, grids, scores, keeps, titles, path: Path, orders=None) -> None:
    """Per picture: itself, the heat map of its scores, unless they are None, and the kept patches
    with the rest greyed out, numbered in the order orders[b] in which they were picked."""
    rows = 2 if scores is None else 3
    figure, axes = plt.subplots(rows, len(images), figsize=(2 * len(images), .4 + 2 * rows),
                                layout="constrained", squeeze=False)
    for b, (image, grid, keep) in enumerate(zip(images, grids, keeps)):
        pixels = np.asarray(image.convert("RGB"))
        axes[0, b].imshow(pixels)
        axes[0, b].set_title(textwrap.fill(titles[b], 26), fontsize=8)
        if scores is not None:
            heat = np.ma.masked_invalid(scores[b].float().cpu().numpy().reshape(grid))
            axes[1, b].imshow(heat, cmap="magma", extent=(0, image.width, image.height, 0))
            axes[1, b].set_title("score", fontsize=8)
        axes[-1, b].imshow(greyed_out(pixels, keep, grid))
        axes[-1, b].set_title(f"{len(keep)} kept", fontsize=8)
        for axis in axes[:, b]:
            axis.axis("off")
        for number, i in enumerate(orders[b].tolist() if orders else (), 1):
            x = (i % grid[1] + .5) * image.width / grid[1]
            y = (i // grid[1] + .5) * image.height / grid[0]
            axes[-1, b].text(x, y, number, fontsize=5.5, ha="center", va="center", color="white",
                             bbox=dict(facecolor="black", alpha=.75, lw=0, pad=.6))
    save(figure, path, 110)


def draw_units(vlm, batch, units, scores, keeps, titles, path: Path, orders=None) -> None:
    """draw_kept() of the pictures as the vision encoder sees them, with a column for every view.

    batch: what FrozenVLM.encode() gave the units for, or the same pictures with prompts
    scores (M,) or None, keeps[b] (K,); orders[b], as in draw_kept(), is drawn where no row has
    several views.
    """
    apart = units.apart()
    views = units.views or [1] * len(keeps)
    processor = vlm.processor.image_processor
    mean, std = (torch.tensor(x)[:, None, None]
                 for x in (processor.image_mean, processor.image_std))
    images = []
    for pixels in vlm.adapter.pixels(batch):
        pixels = 255 * (pixels.float().cpu() * std + mean).clamp(0, 1)
        images.append(Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy()))
    kept = [part.nonzero().flatten() for part in kept_mask(units, keeps).split(apart.counts)]
    by_view = None if scores is None else scores.split(apart.counts)
    names = [title for title, n in zip(titles, views) for _ in range(n)]
    draw_kept(images, apart.grid, by_view, kept, names, path, orders if max(views) == 1 else None)


def by_score(units, scores, keeps) -> list[torch.Tensor] | None:
    """Each row's kept units by falling score, (M,) scores; None without scores."""
    if scores is None:
        return None
    rows = scores.split(units.counts)
    return [keep[row[keep].argsort(descending=True)] for row, keep in zip(rows, keeps)]


def greyed_out(pixels: np.ndarray, keep, grid: tuple[int, int]) -> np.ndarray:
    """The picture (H, W, 3) with all units of the grid but the kept ones pale."""
    mask = np.zeros(grid[0] * grid[1])
    mask[keep.cpu().numpy()] = 1
    mask = Image.fromarray((255 * mask.reshape(grid)).astype(np.uint8))
    near = mask.resize(pixels.shape[1::-1], Image.NEAREST)
    pale = (pixels * .2 + 180).astype(np.uint8)
    return np.where(np.asarray(near)[..., None] > 0, pixels, pale)


def draw_spread(spreads: dict, path: Path) -> None:
    """StepPrune's Figure 4, left: histogram of K and score per log-spaced bucket of K, a panel per
    wished mean K. spreads: {(method, K): scores.spread()}"""
    figure, axes = plt.subplots(1, len(spreads), figsize=(3.4 * len(spreads), 3),
                                layout="constrained", squeeze=False)
    for axis, ((_, budget), spread) in zip(axes[0], spreads.items()):
        filled = [bucket for bucket in spread["buckets"] if bucket["n"]]
        left = np.array([bucket["from"] - .5 for bucket in filled])
        right = np.array([bucket["to"] + .5 for bucket in filled])
        axis.bar(left, [bucket["n"] for bucket in filled], right - left, align="edge",
                 color="lightsteelblue", ec="w")
        axis.set(xlabel=f"kept tokens (mean {spread['mean']:.1f})", ylabel="questions (bars)",
                 title=f"wished mean K = {tables.budget(budget)}")
        line = axis.twinx()
        line.plot((left + right) / 2, [bucket["score"] for bucket in filled], "o-",
                  color="firebrick")
        line.set(ylim=(0, 105))
        line.set_ylabel("score (line)", color="firebrick")
    save(figure, path)


def draw_kept_counts(counts: dict, path: Path) -> None:
    """Histograms of how many tokens were kept, one above the other: a row a method, a column a
    wished mean. counts: {(title, K): (questions,) kept}"""
    titles, budgets = (list(dict.fromkeys(key[i] for key in counts)) for i in range(2))
    figure, axes = plt.subplots(len(titles), len(budgets), layout="constrained", squeeze=False,
                                sharex="col", figsize=(3.4 * len(budgets), 1.5 * len(titles)))
    for line, title in zip(axes, titles):
        for axis, k in zip(line, budgets):
            own = [kept for (_, budget), kept in counts.items() if budget == k]
            edges = np.linspace(0, max(kept.max() for kept in own) + 1, 33)
            kept = counts[title, k]
            axis.hist(kept, edges, color="lightsteelblue", ec="w")
            axis.axvline(kept.mean(), color="firebrick", lw=1)
            axis.set_title(f"{title}, mean {kept.mean():.1f}", fontsize=8, loc="left")
            axis.set_yticks([])
    for axis, k in zip(axes[-1], budgets):
        axis.set_xlabel(f"kept tokens, {tables.budget(k)} wished on average")
    save(figure, path)


def draw_rebuilt(images, rows: dict, path: Path) -> None:
    """A column a picture: itself, then per title in `rows` one (3, H, W) in [0, 1] or an image
    each."""
    figure, axes = plt.subplots(1 + len(rows), len(images), layout="constrained", squeeze=False,
                                figsize=(1.8 * len(images), 2 * (1 + len(rows))))
    for line, (title, pictures) in zip(axes, {"": images, **rows}.items()):
        for axis, picture in zip(line, pictures):
            if torch.is_tensor(picture):
                picture = picture.permute(1, 2, 0).float().cpu().clamp(0, 1)
            axis.imshow(np.asarray(picture))
            axis.axis("off")
        line[0].set_title(title, fontsize=8, loc="left")
    save(figure, path, 110)


# ---------------------------------------------------------------------------- training and tokens


def draw_training(runs: list[str], path: Path) -> None:
    """Loss and its parts, gradient norm and, where the selector decides, kept tokens at every step
    of the runs; means of 10 steps."""
    logs = {run: [json.loads(line)
                  for line in (Path(run) / "log.jsonl").read_text().splitlines()] for run in runs}
    known = ("loss", "nll", "K", "feature", "image", "kept", "grad_norm")
    keys = [key for key in known if all(key in log[0] for log in logs.values())]
    figure, axes = plt.subplots(1, len(keys), figsize=(3.2 * len(keys), 2.8),
                                layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys):
        for run, log in logs.items():
            values = np.array([line[key] for line in log])
            if len(values) > 20:
                smooth = np.convolve(values, np.ones(10) / 10, "valid")
            else:
                smooth = values
            steps = np.arange(len(values) - len(smooth), len(values))
            axis.plot(steps, smooth, lw=1, label=Path(run).name)
        axis.set(xlabel="step", title=key, yscale="linear" if key in ("K", "kept") else "log")
    axes[0, 0].legend(fontsize=6)
    save(figure, path)


def draw_cosines(feats: torch.Tensor, s: torch.Tensor, path: Path, most: int = 64) -> dict:
    """AutoSelect's Figure 4: cosines among the `most` best and the `most` worst tokens, best first;
    beside it the same of features without their mean, for what all tokens share says nothing about
    any.

    feats (B, N, C), s (B, N). Returns {"plain": {"best", "worst"}, "centred": ...}, the mean cosine
    inside each of the two groups, own pairs left out.
    """
    most = min(most, s.shape[1] // 2)
    order = s.argsort(1, descending=True)
    index = torch.cat([order[:, :most], order[:, -most:]], 1)
    own = ~torch.eye(most, dtype=torch.bool)
    variants = {"plain": ("as in the paper", feats.float()),
                "centred": ("the tokens' mean taken off",
                            (feats - feats.mean((0, 1))).float())}
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.1), layout="constrained")
    inside = {}
    for axis, (name, (title, x)) in zip(axes, variants.items()):
        x = F.normalize(x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), dim=-1)
        cosine = (x @ x.mT).mean(0).cpu()
        best, worst = cosine[:most, :most], cosine[most:, most:]
        inside[name] = {"best": best[own].mean().item(), "worst": worst[own].mean().item()}
        picture = axis.imshow(cosine.numpy(), cmap="coolwarm", vmin=-1, vmax=1)
        axis.axhline(most - .5, color="black", lw=.6)
        axis.axvline(most - .5, color="black", lw=.6)
        axis.set_title(f"{title}:\n{inside[name]['best']:.2f} among the best, "
                       f"{inside[name]['worst']:.2f} among the worst", fontsize=9)
        axis.set_xticks([most / 2, 1.5 * most], [f"{most} best", f"{most} worst"])
        axis.set_yticks([most / 2, 1.5 * most], [f"{most} best", f"{most} worst"], rotation=90,
                        va="center")
        axis.tick_params(length=0)
    figure.suptitle(f"cosine of tokens by their score, mean of {len(feats)} pictures", fontsize=10)
    figure.colorbar(picture, ax=axes, shrink=.9, label="cosine")
    save(figure, path)
    return inside
