"""Teach a selector which visual tokens of a frozen VLM matter: `python train.py --method NAME`.

One plain loop. With no other option it trains on the tiny LLaVA that ships with the project, a few
minutes on a laptop, and ends with evaluate.py's table and pictures. Everything goes to
runs/<method>. A killed run resumes exactly when the same command is given again.
`accelerate launch train.py ...` runs the same steps on several GPUs. A method's own options are
listed by `python train.py --method NAME --help`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import evaluate
import runs
from backbones.checkpoints import check_device, read_config
from benchmarks.costs import is_large, pictures_that_fit
from common import PROTOCOLS, FrozenVLM, find_adapter
from data.batches import batches, cached, causes, open_data
from data.sets import DATA, settle

# options that may change when a run is resumed: the selector comes out the same
FREE = ("run", "micro", "checkpointing", "device", "workers", "save_every", "evaluate", "push",
        "overwrite", "cache_features")


@dataclass
class TrainConfig:
    """Options of every method. Those of one method stand in its file."""
    method: str = HfArg(default="", help=f"{', '.join(runs.method_names())}; its own options are "
                                         "listed by --method NAME --help")
    model: str = HfArg(default="tiny/llava", help="folder or hub id of the frozen VLM")
    protocol: Literal[PROTOCOLS] = runs.protocol_option()
    run: str = HfArg(default="runs/METHOD", help="run folder")
    seed: int = HfArg(default=0, help="of weights, data and noise")
    steps: int = HfArg(default=0, help="optimiser steps; 0: from --epochs")
    epochs: float = HfArg(default=0.0, help="passes over the data, of scenes over --n_pictures of "
                                            "them; 0: every scene is new")
    batch: int = HfArg(default=16, help="pictures a step, over all processes and parts")
    micro: int = HfArg(default=0, help="pictures at a time on each process, whose gradients are "
                                       "summed; 0: as many as fit into the memory")
    lr: float = HfArg(default=1e-3, help="AdamW's learning rate at its peak")
    autocast: bool = HfArg(default=False, help="the selector's matrix products in bfloat16")
    checkpointing: Literal["auto", "on", "off"] = HfArg(
        default="auto", help="recompute the language model's activations in the backward pass: "
                             "less memory, a third more time; auto: of a billion parameters and "
                             "more, if without it half a process's pictures do not fit at a time")
    # of one data set, what stands here is its value and no list: see data/sets.py
    data: list[str] = runs.many(["scenes"], "the tiny world's scenes, a folder of pictures, or a "
                                "data set by name; several are mixed", choices=DATA)
    path: list[str] | None = HfArg(
        default=None, help="local copy of the data set that --data names, a folder or file; "
                           "without it: from the hub. Of several one each, - where there is none")
    split: list[str] | None = HfArg(
        default=None, help="of that data set; without it: its training split. Of several one each")
    images: list[str] | None = HfArg(
        default=None, help="the folder of pictures; with --data llava-665k the one where its paths "
                           "begin. Of several one each")
    take: list[float] | None = HfArg(
        default=None, help="0: all of a data set; below 1: that share of it; else so many of its "
                           "pictures, drawn by --seed. Of several one each")
    prompt: str = HfArg(default="Describe the image briefly.",
                        help="asked where a data set has captions alone [ours]")
    questions: int = HfArg(default=7, help="most questions a picture; 0: of scenes the caption "
                                            "alone [ours]")
    n_pictures: int = HfArg(default=2400, help="scenes to go through in epochs [ours]")
    cache_features: str | None = HfArg(default=None, help="keep the encoder's features in this "
                                                          "folder, made once")
    dtype: Literal["bfloat16", "float32"] = runs.dtype_option()
    random_weights: bool = HfArg(default=False, help="build --model from its config alone, for "
                                                     "smoke runs, memory and speed")
    device: str = runs.device_option()
    workers: int = HfArg(default=1, help="processes that read data and build batches")
    save_every: int = HfArg(default=100, help="steps between checkpoints")
    evaluate: bool = HfArg(default=True, help="make the table and the pictures at the end")
    push: str | None = HfArg(default=None, help="share the selector on the hub as user/name")
    overwrite: bool = HfArg(default=False, help="begin anew although --run holds a run")

    def __post_init__(self):
        runs.check_options(self, batch=1, save_every=1, n_pictures=1, questions=0, steps=0,
                           epochs=0, micro=0, lr=0, seed=0, workers=0, take=0)
        settle(self)
        if not self.steps and not self.epochs:
            raise ValueError("steps=0, epochs=0: expected one of them above 0")


def parse(args: list[str]) -> tuple[TrainConfig, object]:
    """Options of every method and of the chosen one, with the defaults that this model gets."""
    chosen, _ = runs.Parser(TrainConfig, add_help=False).parse_known_args(args)
    if not chosen.method:
        runs.Parser(TrainConfig, description=__doc__).parse_args(args)          # --help ends here
        raise ValueError(f"no method: expected --method {' or '.join(runs.method_names())}")
    module = runs.load_method(chosen.method)
    backbone = read_config(chosen.model)
    find_adapter(backbone)                      # refuses a model that no family serves
    width = backbone.vision_config.hidden_size
    parser = runs.Parser([TrainConfig, runs.options_class(module.Config)], description=__doc__)
    parser.set_defaults(run=f"runs/{chosen.method}", **runs.preset(module, width, TrainConfig))
    if chosen.epochs:
        parser.set_defaults(steps=0)            # which would win
    config, options = parser.parse_args_into_dataclasses(args)
    config.method = module.__name__
    return config, options


@dataclass
class Step:
    """What a method may know of a training step; runs.Selector.loss() is handed one."""
    number: int
    total: int
    seed: int
    items: list[list[int]]              # numbers, in the whole run, of each part's pictures
    accelerator: Accelerator
    in_bfloat16: bool = False
    part: int = 0
    answers: Tensor | float = 1.0       # answer tokens of the whole step, on all processes
    rows: Tensor | float = 1.0

    @property
    def shares(self) -> int:
        """Pieces that the step comes in: parts times processes."""
        return len(self.items) * self.accelerator.num_processes

    def of_part(self, part: int) -> "Step":
        return replace(self, part=part)

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes."""
        return self.accelerator.reduce(x, "sum")

    def autocast(self):
        """The selector's part of loss() runs in it; the frozen VLM has a type of its own."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16,
                              enabled=self.in_bfloat16)

    def generators(self, owner: list[int]) -> list[torch.Generator]:
        """One per row; row r is of picture owner[r]. What a row draws depends on the seed, its
        picture's number in the run and its turn, not on the batch in which it stands."""
        generators = []
        for row, picture in enumerate(owner):
            turn = owner[:row].count(picture)
            key = [self.seed, self.items[self.part][picture], turn]
            seed = np.random.SeedSequence(key).generate_state(1)[0]
            generators.append(torch.Generator(self.accelerator.device).manual_seed(int(seed)))
        return generators


def train_step(selector, vlm, parts: list, step: Step) -> tuple[float, dict]:
    """Gradients of a whole step, its parts one after another -> loss, what to log."""
    # the vision encoder is frozen: what the selector reads needs no gradient
    parts = [(batch, selector.read(vlm, batch)) for batch in parts]

    # Losses are divided by what the whole step holds on all processes. A mean of means would weigh
    # a part with short answers as much as one with long ones.
    counts = [[batch.answers, len(units.grid)] for batch, units in parts]
    counts = torch.tensor(counts, dtype=torch.float64, device=vlm.device).sum(0)
    step.answers, step.rows = step.sum(counts)
    selector.observe(vlm, parts, step)

    losses, logs = [], []
    for number, (batch, units) in enumerate(parts):
        loss, log = selector.loss(vlm, batch, units, step.of_part(number))
        loss.backward()
        losses.append(loss.item())
        logs.append(list(log.values()))
    sum_gradients(selector, step)

    numbers = torch.tensor([sum(losses), *np.mean(logs, 0)], dtype=torch.float64,
                           device=vlm.device)
    loss, *means = step.sum(numbers).tolist()
    processes = step.accelerator.num_processes
    return loss, {name: round(x / processes, 4) for name, x in zip(log, means)}


def sum_gradients(selector, step: Step) -> None:
    """Add up the gradients of all processes, in one message."""
    if step.accelerator.num_processes == 1:
        return
    params = list(selector.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    total = step.sum(torch.cat([grad.flatten() for grad in grads]))
    for p, grad in zip(params, total.split([p.numel() for p in params])):
        p.grad = grad.view_as(p)


def item_numbers(config: TrainConfig, number: int, accelerator) -> list[list[int]]:
    """Numbers of the pictures of a step that this process takes, a list per part."""
    mine = config.batch // accelerator.num_processes
    first = number * config.batch + accelerator.process_index * mine
    return [list(range(start, start + config.micro))
            for start in range(first, first + mine, config.micro)]


def train(config: TrainConfig, options) -> Path:
    """Train to the end, or on from the last checkpoint. options: the method's own, as parse()
    gives them. Returns the run folder."""
    module, run = runs.load_method(config.method), Path(config.run)
    dtype = getattr(torch, config.dtype)
    check_device(config.device, dtype)
    if ":" in config.device:
        torch.cuda.set_device(config.device)                  # which accelerate then takes
    accelerator = Accelerator(cpu=config.device == "cpu")
    # selector and data come first: what is wrong with them is said before a weight is read
    shapes = FrozenVLM.from_pretrained(config.model, dtype, "meta", protocol=config.protocol)
    torch.manual_seed(config.seed)
    selector = module.Method(module.Config.of(shapes, **vars(options)))
    check_fit(config, selector, accelerator.num_processes)
    data = open_data(config, shapes, selector.rows)
    config.steps = config.steps or math.ceil(config.epochs * len(data) / config.batch)

    about = runs.describe(config, selector, shapes, FREE)
    with accelerator.main_process_first():
        runs.open_run(run, about, config.overwrite, accelerator.is_main_process)
    vlm = FrozenVLM.from_pretrained(config.model, dtype, accelerator.device,
                                    random_weights=config.random_weights,
                                    protocol=config.protocol, language=selector.reads_language)
    selector.to(vlm.device).train()
    if selector.reads_language:
        vlm.checkpointing({"auto": is_large(vlm), "on": True, "off": False}[config.checkpointing])
    cache = cached(config, vlm, data, selector.rows, accelerator.process_index,
                   accelerator.num_processes) if config.cache_features else None
    optimiser = torch.optim.AdamW(selector.parameters(), lr=config.lr,
                                  weight_decay=selector.weight_decay)
    first_step = runs.resume(run, selector, optimiser, vlm.device)
    if not first_step:
        def first_batch(n: int):
            few = replace(config, micro=min(n, config.steps * config.batch), workers=0)
            return next(iter(batches(few, vlm, data, selector.rows, 0, 0, 1))).to(vlm.device)
        selector.begin(vlm, first_batch)
    config.micro = config.micro or fit_micro(config, vlm, selector, data, first_step, accelerator)
    frozen, trainable = (sum(p.numel() for p in part.parameters()) for part in (vlm, selector))
    parts = config.batch // accelerator.num_processes // config.micro
    accelerator.print(
        f"{config.method} on {config.model}: {trainable / 1e6:.2f} M trainable of "
        f"{(trainable + frozen) / 1e6:.2f} M parameters, {config.steps} steps of {config.batch} "
        f"pictures = {accelerator.num_processes} processes x {parts} parts x {config.micro}, into "
        f"{run}" + (f"; resumed at step {first_step}" if first_step else ""))

    feed = batches(config, vlm, data, selector.rows, first_step, accelerator.process_index,
                   accelerator.num_processes, cache)
    loop(config, vlm, selector, optimiser, iter(feed), first_step, accelerator)
    if accelerator.is_main_process:
        runs.save_selector(run, selector, about)
    accelerator.wait_for_everyone()
    return run


def fit_micro(config, vlm, selector, data, first_step: int, accelerator) -> int:
    """Pictures at a time, by what the largest of the next eight takes; all of a process's share on
    a CPU that holds a small model."""
    share = config.batch // accelerator.num_processes
    if vlm.device.type == "cpu" and not is_large(vlm):
        return share

    def step(n: int) -> Callable:
        few = replace(config, micro=n, batch=n * accelerator.num_processes, workers=0)
        feed = batches(few, vlm, data, selector.rows, first_step, accelerator.process_index,
                       accelerator.num_processes)
        largest = max(islice(feed, 8 // n), key=lambda batch: batch.size).to(vlm.device)
        items = item_numbers(few, first_step, accelerator)
        state = Step(first_step, config.steps, config.seed, items, accelerator, config.autocast)
        return lambda: train_step(selector, vlm, [largest], state)
    ways = {"auto": [False, True] if is_large(vlm) else [False], "on": [True], "off": [False]}
    fit, said = pictures_that_fit(vlm, selector, step, share, ways[config.checkpointing])
    accelerator.print(f"training takes {said}: {fit} at a time fit")
    if not fit:
        raise ValueError(f"not even one picture at a time fits, training takes {said}: expected "
                         "--checkpointing on, fewer --questions, or a larger device")
    return divisor(share, fit)


def divisor(share: int, most: int) -> int:
    """The largest number up to `most` that parts a share of the batch evenly."""
    return max(n for n in range(1, max(most, 1) + 1) if share % n == 0)


def loop(config, vlm, selector, optimiser, feed, first_step: int, accelerator) -> None:
    """The steps from first_step on."""
    run, is_main = Path(config.run), accelerator.is_main_process
    log = runs.open_log(run / "log.jsonl", first_step, is_main)
    start, skipped, shown = time.perf_counter(), set(), Counter()
    bar = tqdm(range(first_step, config.steps), "train", initial=first_step, total=config.steps,
               disable=not is_main)
    for number in bar:
        here = f"step {number}, items from {number * config.batch} on of {config.data}"
        items = item_numbers(config, number, accelerator)
        parts = [next(feed).to(vlm.device) for _ in items]
        step = Step(number, config.steps, config.seed, items, accelerator, config.autocast)

        optimiser.param_groups[0]["lr"] = selector.learning_rate(config.lr, number, config.steps)
        optimiser.zero_grad(set_to_none=True)
        try:
            loss, numbers_to_log = train_step(selector, vlm, parts, step)
        except torch.OutOfMemoryError as error:
            less = divisor(len(sum(items, [])), config.micro - 1)
            raise RuntimeError(
                f"out of memory at step {number} with {config.micro} pictures at a time: the same "
                f"command with --micro {less}, or --checkpointing on, goes on from the last "
                "checkpoint") from error
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from error
        # one step on an odd picture must not undo many good ones
        norm = torch.nn.utils.clip_grad_norm_(selector.parameters(), 1.0).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RuntimeError(
                f"loss {loss}, gradient norm {norm} at {here}: try a smaller --lr than "
                f"{config.lr}; the last checkpoint is in {run}")
        optimiser.step()

        log({"step": number, "loss": round(loss, 5), "grad_norm": round(norm, 5),
             "seconds": round(time.perf_counter() - start, 2), **numbers_to_log})
        bar.set_postfix({"loss": f"{loss:.3f}", "grad": f"{norm:.2f}",
                         **{name: f"{x:.3g}" for name, x in numbers_to_log.items()}})
        for reason in sorted({each for batch in parts for each in batch.skipped} - skipped):
            skipped.add(reason)
            shown.update(kind := causes([reason]))
            if shown[next(iter(kind))] <= 3:                  # a missing folder is many pictures
                bar.write(f"skipped: {reason}")
        if is_main and ((number + 1) % config.save_every == 0 or number + 1 == config.steps):
            runs.save_checkpoint(run, number + 1, selector, optimiser)
    found = {*gather_object(sorted(skipped))}
    by_cause = ", ".join(f"{n} {cause}" for cause, n in causes(found).most_common())
    accelerator.print(f"trained in {time.perf_counter() - start:.0f} s"
                      + (f"; {len(found)} samples skipped or cut: {by_cause}" if found else ""))


def check_fit(config: TrainConfig, selector, processes: int) -> None:
    """Raises ValueError for a batch that does not part into equal shares, or a cache that the
    method cannot read."""
    micro = config.micro or 1
    if config.batch % (processes * micro):
        raise ValueError(f"batch={config.batch} on {processes} processes, micro={micro}: expected "
                         f"a multiple of {processes * micro}, for parts of equal size")
    if config.cache_features:
        runs.writable(config.cache_features)
    if config.cache_features and selector.rows == "question twice":
        raise ValueError(f"cache_features={config.cache_features!r} holds vision features, but "
                         "this method reads the language model's states: leave it out")


def main(args: list[str]) -> None:
    config, options = parse(args)
    if config.push:
        runs.open_repository(config.push)             # may be refused: before hours of training
    with runs.locked(Path(config.run)):
        run = train(config, options)
    if config.evaluate and not config.random_weights:         # every process answers its share
        evaluate.main(["--run", str(run), "--model", config.model, "--device", config.device,
                       "--dtype", config.dtype, "--protocol", config.protocol])
    if config.push:
        runs.share(run, config.push)


if __name__ == "__main__":
    runs.command(main)
