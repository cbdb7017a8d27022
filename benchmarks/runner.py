"""Answers of a benchmark's questions into predictions files: batches with different pictures, and K, in every row."""

import hashlib
import time
from collections.abc import Callable

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.asking import Answers, Asked, Impossible, answered
from benchmarks.predictions import Predictions, plain
from benchmarks.speed import Clock, per_layer, prefill_flops, token_budget


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side: what LLaVA-1.5 was trained on and is tested with.

    The hub's processors cut the longer side off instead. colour: 0..255; LLaVA takes the mean of CLIP's pictures.
    """
    side = max(image.size)
    whole = Image.new("RGB", (side, side), colour)
    whole.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return whole


def padding(vlm, pad: str) -> Callable:
    """What is done to every picture: pad is "square", or "none" for what the processor does alone."""
    colour = tuple(int(255 * x) for x in vlm.processor.image_processor.image_mean)
    return (lambda image: square(image, colour)) if pad == "square" else lambda image: image


def batches(questions, size: int) -> list[list[tuple[int, object]]]:
    """[(number, question), ...] in parts of at most `size` neighbours that may be answered at the same length."""
    parts = []
    for number, question in enumerate(questions):
        if not parts or len(parts[-1]) == size or parts[-1][0][1].limit != question.limit:
            parts.append([])
        parts[-1].append((number, question))
    return parts


def ask(vlm, part, clock: Clock, prepare=lambda image: image, twice: bool = False,
        look: dict | None = None) -> tuple[Asked, dict, dict | None]:
    """The questions as Asked, every different picture encoded once, to show what FrozenVLM.encode() knows by look; as
    the batch that the VLM answers; and, if twice, as one that asks before the image too. Raises ValueError naming
    questions that cannot be read, or are too long."""
    rows, first, owner = [], {}, []
    for _, question in part:
        try:
            rows.append([prepare(image.convert("RGB")) for image in question.images()])
        except ValueError as error:
            raise ValueError(f"the pictures of question {question.id!r} cannot be read: {error}") from error
        content = hashlib.md5(usedforsecurity=False)
        for image in rows[-1]:
            content.update(repr(image.size).encode() + image.tobytes())
        owner.append(first.setdefault(content.hexdigest(), len(first)))
    images = [images if len(images) > 1 else images[0] for images in rows]
    pixels = vlm.pictures([images[owner.index(b)] for b in range(len(first))])
    turns = [[(question.prompt, None)] for _, question in part]
    try:
        batch, doubled = vlm.batch(images, turns), vlm.batch(images, turns, twice=True) if twice else None
    except ValueError as error:
        names = ", ".join(question.id for _, question in part)
        raise ValueError(f"{error}. The rows, from 0, are the questions {names}") from error
    with clock("vision", len(first)):
        units = vlm.encode(pixels, look)
    return Asked(units, owner, units.rows(owner), vlm.question(batch), None, list(first),
                 lambda rule: vlm.merged(pixels, rule)), batch, doubled


@torch.no_grad()
def answer(vlm, part, turns: dict, prepare=lambda image: image, seed: int = 0, positions: str = "original") -> dict:
    """{turn: the rows of a predictions file} of one batch, or an Impossible where K cannot be had.

    part: [(number, question), ...] of the same limit | turns: {(method, budget): Selector, or None for all tokens}
    """
    clock, found = Clock(vlm.device), {}
    inside = [getattr(selector, "layer", None) is not None for selector in turns.values()]
    look = {name: what for selector in turns.values() for name, what in getattr(selector, "look", {}).items()}
    asked, batch, doubled = ask(vlm, part, clock, prepare, any(inside), look)
    shown = asked.units.pad(asked.units.image_of)[1].sum(1).tolist()
    texts = ((batch["attention_mask"] != 0) & (batch["input_ids"] != vlm.image_id)).sum(1).tolist()
    twice = doubled and ((doubled["attention_mask"] != 0) & (doubled["input_ids"] != vlm.image_id)).sum(1).tolist()
    for (turn, selector), before in zip(turns.items(), inside):
        torch.manual_seed(seed + part[0][0])           # of a random scorer
        try:
            said = answered(vlm, selector, asked, doubled if before else batch, turn, turn[1], clock, part[0][1].limit,
                            positions)
        except Impossible as error:
            found[turn] = error
            continue
        found[turn] = [row(vlm, clock, turn, numbered, q, said, shown[q], (twice if before else texts)[q])
                       for q, numbered in enumerate(part)]
    return found


def row(vlm, clock: Clock, turn, numbered, q: int, said: Answers, shown: int, text: int) -> dict:
    """One row of a predictions file; shown: units of its picture, text: tokens of its text."""
    (number, question), depth = numbered, len(vlm.lm.layers)
    layers = [text + n for n in per_layer(said.entered[q], said.later[q], depth)]
    stages = {"vision": "vision", **{stage: f"{stage} {turn}" for stage in ("select", "prefill", "decode")}}
    return {"number": number, "id": question.id, "prompt": question.prompt, "answer": said.texts[q],
            "gold": plain(question.gold), "kept": len(said.keep[q]) if said.keep else shown,
            "seen": list(token_budget(said.entered[q], said.later[q], depth)),
            "flops": prefill_flops(vlm.model.config.text_config, layers),
            "ms": {stage: round(clock.ms(key), 3) for stage, key in stages.items()}}


def run(vlm, questions, turns: dict, files: dict[tuple, Predictions], batch: int = 8, pad: str = "none", seed: int = 0,
        process: int = 0, processes: int = 1, title: str = "", positions: str = "original") -> None:
    """Answer what the files lack, each with its turn of `turns`, see answer(); every process its share of the batches.

    A batch that was cut off is answered again as a whole, with the same neighbours, and completed: the files come out
    as if nothing had happened. Where no budget K can be had the turn is left out, which is said.
    """
    turns, prepare = dict(turns), padding(vlm, pad)
    mine = batches(questions, batch)[process::processes]
    for part in tqdm(mine, title, disable=process > 0):
        lacking = {turn: selector for turn, selector in turns.items()
                   if any(question.id not in files[turn].done for _, question in part)}
        if not lacking:
            continue
        for turn, rows in answer(vlm, part, lacking, prepare, seed, positions).items():
            if isinstance(rows, Impossible):
                print(f"{turn[0]} {turn[1]}: left out, {rows}")
                del turns[turn]
            else:
                files[turn].add(rows)


def compare(vlm, questions, turns: dict, batch: int = 8, pad: str = "none") -> str:
    """How much faster `batch` questions at a time are than one by one, per turn, and how many answers are the same;
    without turns whose K cannot be had."""
    times, answers, prepare = {}, {}, padding(vlm, pad)
    first = answer(vlm, batches(questions, 1)[0], turns, prepare)
    turns = {turn: selector for turn, selector in turns.items() if not isinstance(first[turn], Impossible)}
    for size in (batch, 1):
        for turn, selector in turns.items():
            answer(vlm, batches(questions[:size], size)[0], {turn: selector}, prepare)     # whatever is first is slow
            start = time.perf_counter()
            rows = [row for part in batches(questions, size)
                    for row in answer(vlm, part, {turn: selector}, prepare)[turn]]
            times[turn, size], answers[turn, size] = time.perf_counter() - start, [row["answer"] for row in rows]
    lines = [f"| method | K | one by one, ms a question | {batch} at a time | ratio | same answers |", "|" + "---|" * 6]
    for turn in turns:
        one, many = (1e3 * times[turn, size] / len(questions) for size in (1, batch))
        same = sum(a == b for a, b in zip(answers[turn, 1], answers[turn, batch]))
        lines.append(f"| {turn[0]} | {turn[1]} | {one:.1f} | {many:.1f} | {one / many:.2f}x | {same} of "
                     f"{len(questions)} |")
    return "\n".join(lines)
