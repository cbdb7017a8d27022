"""What a GPU is wanted for, in one run: training and answers at a real backbone's shape.

    python -m measure.gpu llava-1.5-7b                             one card, within ten minutes
    python -m measure.gpu llava-1.5-7b --shrink --device cpu       the same code: figures of nothing

picks    StepPrune's loop, see measure/speed.py
answers  vision encoder, selection, prefill, new tokens and memory, see measure/speed.py
select   selection of 64 tokens by each method, as it is, compiled, and in CUDA graphs
train    a training step of each method beside the frozen model's forward and backward alone, which
         is the bound, with checkpointing in the language model and without: time, peak memory
memory   of a training step: predicted from one and two pictures, as train.py does where --micro is
         0, and measured

Weights are random, in bfloat16; in training the selector runs under autocast. Every call is
synchronised and warmed up; figures are the least and the median of rounds in which all calls take
turns. What does not fit into the memory says so, and the rest goes on. Writes <out>.json and
<out>.md after every part, with hardware and command.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import runs
from benchmarks.costs import peak_bytes, training_bytes
from common import FrozenVLM
from data.batches import Batch
from measure import flops, shapes, speed
from measure.speed import SIDES, Report, by_turns, fabricate, markdown, middle, spread
from train import Step, train_step

VARIANTS = ("eager", "compiled", "CUDA graphs")
FROZEN = "frozen"                          # the line of the VLM without a selector

# ------------------------------------------------------------------ training


def training_batch(selector, vlm: FrozenVLM, options, rows: int = 0) -> Batch:
    """One of the kind that the selector is trained on; None stands for the VLM alone."""
    silent = selector is not None and selector.rows == "picture"
    rows = rows or (options.pictures_batch if silent else options.batch)
    batch = fabricate(vlm, rows, options.size, options.text, options.answer)
    return Batch(batch, None if silent else batch, list(range(rows)))


def step_of(vlm: FrozenVLM, number: int, rows: int) -> Step:
    """A training step on one process, with the selector under autocast."""
    accelerator = Accelerator(cpu=vlm.device.type == "cpu")
    return Step(number, 100, 0, [list(range(rows))], accelerator, in_bfloat16=True)


def one_step(selector, vlm: FrozenVLM, batch: Batch, step: Step) -> None:
    """The gradients of a training step; of the frozen model, those of its visual units."""
    if selector is not None:
        train_step(selector, vlm, [batch], step)
        return
    units = vlm.encode(batch.pictures)
    feats = units.feats.clone().requires_grad_()
    vlm.loss(vlm.embed(batch.rows, units, feats)).backward()


def measure_training(vlm: FrozenVLM, options) -> list[dict]:
    """A line for the frozen model and for every method, with checkpointing and without; a
    selector's share is what its step takes longer than the frozen model's. Where the language model
    is never called there is no bound, and no share. GiB of a step are beyond the weights, with the
    gradients, without AdamW's moments."""
    selectors = {FROZEN: None, **flops.build_methods(vlm, **options.chosen)}
    for selector in filter(None, selectors.values()):
        selector.to(vlm.device).train()
    lines = []
    for on in (True, False):
        vlm.checkpointing(on)
        lines += training_lines(vlm, selectors, options, on)
    vlm.checkpointing(False)
    return lines


def training_lines(vlm: FrozenVLM, selectors: dict, options, checkpointing: bool) -> list[dict]:
    calls, shapes_of, memory = {}, {}, {}
    for name, selector in selectors.items():
        batch = training_batch(selector, vlm, options)
        shapes_of[name] = batch.pictures["input_ids"].shape
        step = step_of(vlm, 60, len(batch.owner))
        optimiser = selector and torch.optim.AdamW(selector.parameters(), lr=1e-5)

        def run(selector=selector, batch=batch, step=step, optimiser=optimiser):
            one_step(selector, vlm, batch, step)
            if optimiser:
                optimiser.step()
                optimiser.zero_grad()
        calls[name] = run
    names = {call: name for name, call in calls.items()}

    def warm_up(call: Callable, device) -> None:
        memory[names[call]] = peak_bytes(call, torch.device(device))
    ms = by_turns(calls, vlm.device, options.repeats, warm_up)
    bound, lines = middle(ms[FROZEN]), []
    for name, selector in selectors.items():
        (rows, length), now = shapes_of[name], middle(ms[name])
        is_bounded = selector is not None and selector.rows != "picture" and bound and now
        lines.append({
            "method": name, "checkpointing": "yes" if checkpointing else "no", "batch": rows,
            "tokens a row": length, "ms a step": ms[name],
            "selector's share, %": 100 * (1 - bound / now) if is_bounded else None,
            "tokens a second": 1e3 * rows * length / now if now else None,
            "GiB": memory[name] / 2 ** 30 if name in memory else None,
            "trained, M": sum(p.numel() for p in selector.parameters()) / 1e6 if selector else 0})
    return lines


def measure_memory(vlm: FrozenVLM, options) -> list[dict]:
    """A line for every method and number of pictures: MiB of a training step beyond the weights of
    the models, with gradients and AdamW's two moments. A picture has one question."""
    lines = []
    vlm.checkpointing(True)
    for name, selector in flops.build_methods(vlm, **options.chosen).items():
        selector.to(vlm.device).train()
        weights = sum(p.nbytes for p in selector.parameters())

        def step(rows: int, selector=selector) -> Callable:
            batch = training_batch(selector, vlm, options, rows)
            return lambda: one_step(selector, vlm, batch, step_of(vlm, 0, rows))
        fixed, picture = training_bytes(selector, step, vlm.device)
        for rows in options.pictures:
            line = {"method": name, "pictures": rows,
                    "predicted, MiB": (fixed + rows * picture) / 2 ** 20}
            try:                                                     # and AdamW's moments
                measured = (2 * weights + peak_bytes(step(rows), vlm.device)) / 2 ** 20
            except torch.OutOfMemoryError:
                measured = None
            ratio = measured and line["predicted, MiB"] / measured
            lines.append(line | {"measured, MiB": measured, "ratio": ratio})
            selector.zero_grad()
        selector.cpu()
    vlm.checkpointing(False)
    return lines


# ------------------------------------------------------------------ selection


def compile_parts(selector: nn.Module, variant: str) -> None:
    """Compile the selector's parts. CUDA graphs have fixed shapes: into one goes only what has
    Transformer blocks over all tokens, not what is called once for every pick, which StepPrune puts
    into a graph itself."""
    if variant == "eager":
        return
    for part in selector.children():
        if any(isinstance(x, nn.TransformerEncoderLayer) for x in part.modules()):
            part.compile(**({"mode": "reduce-overhead"} if variant == "CUDA graphs" else {}))


@torch.no_grad()
def measure_selection(vlm: FrozenVLM, options) -> list[dict]:
    """A line per batch size and method: milliseconds to select 64 tokens of a batch, in all
    variants."""
    selectors = flops.build_methods(vlm, **options.chosen)
    lines = []
    for rows in options.batches:
        batch = fabricate(vlm, rows, options.size, options.text)
        units, question = vlm.encode(batch), vlm.question(batch)
        k = min(64, int(units.pad()[1].sum(1).min()))
        for name, selector in selectors.items():
            line, calls = {"method": name, "batch": rows}, {}
            for variant in options.selection:
                own = copy.deepcopy(selector).to(vlm.device, vlm.dtype).eval()
                compile_parts(own, variant)
                calls[variant] = partial(own.select, units, question, k)
                try:
                    for _ in range(3):                              # compiling takes the first
                        calls[variant]()
                except Exception as error:    # what a device cannot compile is a result
                    line[variant] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                    del calls[variant]
            lines.append(line | by_turns(calls, vlm.device, 2 * options.repeats))
    return lines


# ------------------------------------------------------------------ the command


def table(lines: list[dict]) -> str:
    """Lists of milliseconds as their least and median."""
    def shown(x):
        return spread(x) if isinstance(x, list) else x
    keys = max(lines, key=len)
    return markdown([*keys], [[shown(line.get(key)) for key in keys] for line in lines])


PARTS = {"picks": "StepPrune's loop", "answers": "Answers", "select": "Selection of 64 tokens, ms",
         "train": "Training", "memory": "Memory of a training step"}
MEASURED = {"select": measure_selection, "train": measure_training, "memory": measure_memory}


def parse(args: list[str]):
    cuda = torch.cuda.is_available()
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("name", choices=list(shapes.SHAPES), help="the backbone")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what is measured")
    speed.add_options(parser)
    parser.set_defaults(layers=0, dtype="bfloat16")
    add("--batch", type=int, default=8,
        help="rows of a training step with the language model [ours]")
    add("--pictures_batch", type=int, default=32,
        help="pictures of a training step that reads no text [paper]")
    add("--pictures", type=int, nargs="+", default=[1, 2, 4, 8],
        help="of the training steps whose memory is measured")
    add("--answer", type=int, default=60, help="tokens of an answer in training")
    add("--selection", nargs="+", default=list(VARIANTS if cuda else VARIANTS[:1]),
        choices=VARIANTS, help="how a selection runs")
    add("--out", default="results/gpu/NAME", help="the two files, without their ending")
    options = parser.parse_args(args)
    speed.check(options)
    runs.check_options(options, batch=1, pictures_batch=1, pictures=1, answer=1)
    options.size = options.size or SIDES.get(options.name, (336, 336))
    options.budgets = options.budgets or speed.BUDGETS.get(options.name, (192, 128, 64))
    runs.writable(Path(options.out).parent)
    return options


def main(args: list[str]) -> dict:
    options = parse(args)
    label = options.name + "-shrunk" * options.shrink
    report = Report(Path(options.out.replace("NAME", label)), "gpu", args, options)
    report.numbers["model"] = label
    vlm = None
    for part in options.parts:
        try:
            if part == "picks":
                lines = speed.measure_picks(options)
                text = speed.picks_table(lines, options.picks)
            else:
                vlm = vlm or speed.load(options.name, options)
                lines = (speed.measure_answers(vlm, options, report.peak) if part == "answers"
                         else MEASURED[part](vlm, options))
                text = (speed.answer_tables(lines, options.new_tokens) if part == "answers"
                        else table(lines))
        except torch.OutOfMemoryError as error:      # that, too, is an answer; others still come
            lines = text = f"out of memory: {str(error).splitlines()[0]}"
        report.add(part, PARTS[part], lines, text)
        if torch.device(options.device).type == "cuda":
            torch.cuda.empty_cache()
    return report.numbers


if __name__ == "__main__":
    runs.command(main)
