"""What the kept tokens hold of the rest of a picture, and how still the mask stands.

    python -m measure.rebuild --run runs/recon_s0 runs/recon_s1 runs/recon_s2

For the reconstruction selector, on pictures of the tiny world. Writes

    rebuild.md     errors of features and pixels, rebuilt from the chosen tokens and from as many
                   random ones, at the shares of the paper's Table 1; no language model is asked
    stability.md   the paper's B.5: the masks of a picture and of the same one cropped by up to 5 %
                   of each side, or 0.8 to 1.2 times as bright; and what the VLM still answers,
                   for which alone the language model is loaded: --answers False leaves it out
    rebuilt.png    six pictures, what is kept of them, and what is rebuilt from it

Of several runs (seeds): mean and standard deviation, and the pictures of the first. Tokens are
chosen as in evaluation: K of a picture, in each of its crops by itself. Masks of several crops do
not lie over one another: where pictures have any, stability.md is left out.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import string_to_bool

import runs
from backbones.checkpoints import check_device
from baselines import random_tokens
from benchmarks import answering, tiny_world
from benchmarks.plots import draw_rebuilt
from benchmarks.scores import VANILLA
from benchmarks.tables import cell, markdown
from common import FrozenVLM, Units, kept_mask
from data.dialogues import SIZES

DISTORTIONS = ("none", "crop", "brightness")
SHARES = (0.5, 0.4, 0.222, 0.111, 0.056)              # of the tokens kept, the paper's Table 1
DRAWN = (0.5, 0.222, 0.056)


# ------------------------------------------------------------------------------------ rebuilding


def wanted(budget: int | float, units: Units) -> list[int]:
    """K of every picture, as in evaluation."""
    return [answering.wanted(budget, n) for n in units.pad(units.image_of)[1].sum(1).tolist()]


@torch.no_grad()
def crops_of(selector, vlm, images: list, choose: Callable
             ) -> tuple[Units, Tensor, Tensor, list[Tensor]]:
    """Every crop as a picture of its own: units, x (B, N, C), mask (B, N) and pixels; choose(units)
    -> keep says of the whole pictures which tokens are there."""
    pictures = vlm.pictures(images)
    units = vlm.encode(pictures)
    kept = kept_mask(units, choose(units))
    crops = selector.by_crop(replace(units, readings={"kept": kept.float()}))
    pixels = vlm.adapter.pixels(pictures)
    pixels = [pixels[crop] for crop in first_of(crops, "crop")]
    x = selector.standardised(*crops.pad())
    return crops, x, crops.pad(crops.readings["kept"])[0], pixels


def first_of(units: Units, name: str) -> list[int]:
    """The first unit's reading of this name, of every picture."""
    return units.pad(units.readings[name])[0][:, 0].tolist()


@torch.no_grad()
def rebuild_error(selector, vlm, images: list, choose: Callable, batch: int = 32
                  ) -> tuple[float, float]:
    """Mean over crops of |F_rec - F| and |I_rec - I|, where choose(units) -> keep says which tokens
    are there."""
    errors = []
    for start in range(0, len(images), batch):
        crops, x, mask, pixels = crops_of(selector, vlm, images[start:start + batch], choose)
        errors.append(torch.stack(selector.errors(x, mask, pixels, crops.grid)))
    feature, image = torch.cat(errors, 1).mean(1).tolist()
    return feature, image


def rebuild_table(selectors: list, vlm, images: list) -> str:
    """A row per share of tokens: errors from the chosen ones and from random ones."""
    first = vlm.encode(vlm.pictures(images[:1]))
    rows = []
    for share in tqdm(SHARES, "rebuild"):
        (k,) = wanted(share, first)
        chosen, blind = [], []
        for selector in selectors:
            def own(units, selector=selector, k=k):
                return selector.select(units, None, wanted(k, units))

            def random(units, k=k):
                return random_tokens.select(units, wanted(k, units))
            chosen.append(rebuild_error(selector, vlm, images, own))
            blind.append(rebuild_error(selector, vlm, images, random))
        cells = [cell(x, 1) for term in (0, 1)
                 for x in ([error[term] for error in chosen], [error[term] for error in blind])]
        rows.append([str(k), *cells])
    return markdown(["K", "features: chosen", "random", "picture: chosen", "random"], rows)


@torch.no_grad()
def rebuilt_pictures(selector, vlm, images: list, shares=None) -> dict[str, list[Tensor]]:
    """Title -> per picture (3, H, W) in [0, 1], crops one below another: what a share of the tokens
    shows, and what is rebuilt from it. shares: DRAWN if None."""
    processor = vlm.processor.image_processor
    mean = torch.tensor(processor.image_mean, device=vlm.device)[:, None, None]
    std = torch.tensor(processor.image_std, device=vlm.device)[:, None, None]
    rows = {}
    for share in shares or DRAWN:
        def own(units, share=share):
            return selector.select(units, None, wanted(share, units))
        crops, x, mask, pixels = crops_of(selector, vlm, images, own)
        kept, rebuilt = ([[] for _ in images] for _ in range(2))
        for b, picture in enumerate(first_of(crops, "picture")):
            grid, size = crops.grid[b], pixels[b].shape[1:]
            n = grid[0] * grid[1]
            covered = F.interpolate(mask[b, :n].view(1, 1, *grid), size)[0]
            seen = (pixels[b].float() * std + mean) * covered + 0.85 * (1 - covered)
            again = selector.rebuild(x[b:b + 1, :n], mask[b:b + 1, :n], grid, size)[1][0]
            kept[picture].append(seen)
            rebuilt[picture].append(again.float() * std + mean)
        for title, parts in ((f"{share:.1%} of the tokens", kept),
                             (f"rebuilt from {share:.1%}", rebuilt)):
            rows[title] = [torch.cat(part, 1) for part in parts]
    return rows


# ------------------------------------------------------------------------------------ stability


def distort(image: Image.Image, how: str, seed: int
            ) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """(picture of the same size, box of the original that it shows). Raises ValueError for another
    distortion.

    crop: up to 5 % off each side | brightness: times 0.8 to 1.2
    """
    rng = np.random.default_rng([seed, 17])
    w, h = image.size
    box = (0, 0, w, h)
    if how == "crop":
        left, right, top, bottom = rng.uniform(0, 0.05, 4)
        box = (round(left * w), round(top * h), w - round(right * w), h - round(bottom * h))
        image = image.resize((w, h), Image.BICUBIC, box)
    elif how == "brightness":
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.2))
    elif how != "none":
        raise ValueError(f"distortion {how!r} is none of {DISTORTIONS}")
    return image, box


def overlap(keep: Tensor, other: Tensor, grid: tuple[int, int], size: tuple[int, int], box
            ) -> float:
    """Intersection over union, in pixels, of what `keep` covers of a picture (width, height) inside
    `box`, and what `other`, chosen in the distorted picture that shows this box, covers of it."""
    maps = []
    for index in (keep, other):
        mask = torch.zeros(grid[0] * grid[1])
        mask[index.cpu()] = 1
        maps.append(F.interpolate(mask.view(1, 1, *grid), (size[1], size[0]))[0, 0])
    left, top, right, bottom = box
    inside = maps[0][None, None, top:bottom, left:right]
    inside = F.interpolate(inside, (size[1], size[0]))[0, 0]
    return ((inside * maps[1]).sum() / (inside + maps[1]).clamp(max=1).sum()).item()


@torch.no_grad()
def stability(vlm, selectors: list, images: list, budgets: list, how: str) -> dict:
    """K -> (per selector the mean overlap() of its masks of each picture and of its distorted
    version; and what it would be, had the mask stayed where it was while the picture moved)."""
    distorted, boxes = zip(*(distort(image, how, b) for b, image in enumerate(images)))
    plain = vlm.encode(vlm.pictures(images))
    moved = vlm.encode(vlm.pictures(list(distorted)))
    overlaps = {k: ([], []) for k in budgets}
    for selector in selectors:
        for k in budgets:
            before = selector.select(plain, None, wanted(k, plain))
            after = selector.select(moved, None, wanted(k, moved))
            for values, others in zip(overlaps[k], (after, before)):
                pairs = zip(before, others, plain.grid, images, boxes)
                values.append(float(np.mean([overlap(keep, other, grid, image.size, box)
                                             for keep, other, grid, image, box in pairs])))
    return overlaps


def retentions(vlm, selectors: list, scenes: list, budgets: list, batch: int = 32) -> dict:
    """{(number of the selector, K): score with the kept tokens, relative to that with all of them}
    on all questions about the scenes."""
    questions = [tiny_world.question_of(scene, number, question) for scene in scenes
                 for number, question in enumerate(scene.questions)]
    ways = {VANILLA: None}
    for number, selector in enumerate(selectors):
        way = selector.ways([], budgets, None)[""]
        ways |= {(number, k): way for k in budgets}
    rows = {key: [] for key in ways}
    for part in tqdm(answering.batches(questions, batch), "answer"):
        for key, answers in answering.answer_batch(vlm, part, ways).items():
            if isinstance(answers, answering.Impossible):
                raise answers
            rows[key] += answers
    scores = {key: tiny_world.score(answers)[tiny_world.MAIN] for key, answers in rows.items()}
    full = scores.pop(VANILLA)
    return {key: score / full for key, score in scores.items()}


def stability_table(vlm, selectors: list, scenes: list, budgets: list, answers: bool) -> str:
    """A row per distortion and K; answers: with a column for what the VLM still answers."""
    rows = []
    images = [scene.image for scene in scenes]
    for how in DISTORTIONS:
        overlaps = stability(vlm, selectors, images, budgets, how)
        if answers:
            moved = [replace(scene, image=distort(scene.image, how, b)[0])
                     for b, scene in enumerate(scenes)]
            retained = retentions(vlm, selectors, moved, budgets)
        for k in budgets:
            columns = [*overlaps[k]]
            if answers:
                columns.append([retained[number, k] for number in range(len(selectors))])
            rows.append([how, str(k), *map(cell, columns)])
    head = ["distortion", "K", "overlap of the masks", "of a mask that does not move"]
    return markdown([*head, "retention"] if answers else head, rows)


# ------------------------------------------------------------------------------------ the command


def load(folders: list[str], dtype: torch.dtype, device: str, language: bool
         ) -> tuple[FrozenVLM, list]:
    """The runs' VLM and selectors. Raises ValueError for what does not rebuild a picture."""
    training = runs.read_selector(folders[0])[1]["training"]
    protocol = training.get("protocol", "papers")
    shapes = FrozenVLM.from_pretrained(training["model"], device="meta", protocol=protocol)
    selectors = []
    for folder in folders:
        selector = runs.load_selector(folder, shapes, device)[0]
        if not hasattr(selector, "rebuild") or selector.reads_language:
            raise ValueError(f"{folder} does not rebuild what the vision encoder says: expected "
                             "runs of the method recon without --select_after_layer")
        selectors.append(selector)
    return FrozenVLM.from_pretrained(training["model"], dtype, device, language=language,
                                     protocol=protocol), selectors


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", nargs="+", required=True,
                        help="run folders, selectors' folders or hub ids")
    parser.add_argument("--n_pictures", type=int, default=100, help="pictures of the test split")
    parser.add_argument("--budgets", type=int, nargs="+", default=[48, 32, 16],
                        help="K of stability.md, kept tokens")
    parser.add_argument("--answers", type=string_to_bool, default=True,
                        help="a column of stability.md for what the VLM still answers; False: no "
                             "language model is loaded")
    parser.add_argument("--dtype", default=runs.DTYPE, choices=["bfloat16", "float16", "float32"],
                        help="of the frozen VLM")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=None,
                        help="folder of tables and picture; without it: that of the first run")
    options = parser.parse_args(args)
    runs.check_options(options, n_pictures=1, budgets=1)
    check_device(options.device, getattr(torch, options.dtype))
    out = options.out or Path(options.run[0])
    runs.writable(out)
    vlm, selectors = load(options.run, getattr(torch, options.dtype), options.device,
                          options.answers)
    # a scene has at least one question
    scenes = tiny_world.load_rows(7 * options.n_pictures, "test", SIZES[vlm.family])
    scenes = scenes[:options.n_pictures]
    images = [scene.image for scene in scenes]
    texts = {"rebuild": rebuild_table(selectors, vlm, images)}
    views = {n for image in images for n in vlm.adapter.views(vlm.pictures([image])) or [1]}
    if max(views) == 1:
        texts["stability"] = stability_table(vlm, selectors, scenes, options.budgets,
                                             options.answers)
    else:
        print(f"no stability.md: a picture reaches the encoder of {vlm.family} as up to "
              f"{max(views)} crops, whose masks do not lie over one another")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        print(f"\n{text}")
        runs.write_text(out / f"{name}.md", text + "\n")
    draw_rebuilt(images[:6], rebuilt_pictures(selectors[0], vlm, images[:6]), out / "rebuilt.png")


if __name__ == "__main__":
    runs.command(main)
