"""Memory and time of a real backbone's shape with random weights, on whatever device is there.

    python -m measure.gpu llava-1.5-7b --device cuda
    python -m measure.gpu llava-1.5-7b --shrink --device cpu       the same code: figures of nothing

memory   of a training step: predicted from one and two pictures, as train.py does where --micro is
         0, and measured
train    peak memory and throughput of a training step of each method, beside the frozen model's
         forward and backward alone, which is the bound; in bfloat16 with checkpointing in the
         language model, the selector under autocast
first    time to the first new token: vision encoder, selection, and the rest, that is projector,
         prefill and output layer; beside the roofline of matrix product and bandwidth that this
         device reaches when it does nothing else
select   selection of 64 tokens as it is, compiled, and in CUDA graphs

Writes <out>.json and <out>.md, after every part, with hardware and command. Pictures are noise,
texts repeat a word.
"""

import copy
import json
import platform
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import runs
from backbones.checkpoints import check_device
from benchmarks.costs import Clock, peak_bytes, training_bytes
from common import FrozenVLM
from data.batches import Batch
from measure import flops, shapes
from train import Step, train_step

BUDGETS = (192, 128, 64)
VARIANTS = ("eager", "compiled", "CUDA graphs")
FROZEN = "frozen"                          # the line of the VLM without a selector


def markdown(lines: list[dict]) -> str:
    """A table of the first line's keys; floats with three digits."""
    def shown(x) -> str:
        if x is None:
            return "-"
        return f"{x:.3g}" if isinstance(x, float) else str(x)
    table = ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
    table += ["| " + " | ".join(shown(line[key]) for key in lines[0]) + " |" for line in lines]
    return "\n".join(table)


def hardware(device: torch.device) -> dict:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": version("transformers")}


def fabricate(vlm: FrozenVLM, rows: int, side: int, text: int, answer: int = 0):
    """A batch of noise, side x side pixels, with questions of about `text` tokens and answers of
    `answer`; 0 for none."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    question = " ".join(["red"] * text)
    turn = (question, " ".join(["red"] * answer) if answer else None)
    return vlm.batch([Image.fromarray(noise)] * rows, [[turn]] * rows)


def method_options(options) -> dict:
    """--options as keywords of the methods' Configs. Raises ValueError for one that no method has,
    or whose value its method does not take."""
    chosen = {}
    for text in options.options:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"options={text!r}: expected NAME=VALUE")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value                              # a word
    known = set()
    for config in (runs.load_method(name).Config for name in runs.method_names()):
        names = {option.name for option in fields(runs.options_class(config))}
        config(**{name: value for name, value in chosen.items() if name in names})
        known |= names
    if unknown := sorted({*chosen} - known):
        raise ValueError(f"options={unknown}: no method has such an option")
    return chosen


# ------------------------------------------------------------------ training


def training_batch(selector, vlm: FrozenVLM, options, rows: int = 0) -> Batch:
    """One of the kind that the selector is trained on; None stands for the VLM alone."""
    silent = selector is not None and selector.rows == "picture"
    rows = rows or (options.pictures_batch if silent else options.batch)
    batch = fabricate(vlm, rows, options.side, options.text, options.answer)
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


def measure_step(name: str, selector, vlm: FrozenVLM, options) -> dict:
    """Training steps of one method: seconds of one and the peak of memory, None on the CPU, which
    does not tell."""
    cuda = vlm.device.type == "cuda"
    batch = training_batch(selector, vlm, options)
    rows, length = batch.pictures["input_ids"].shape
    optimiser = None
    trained = 0
    if selector is not None:
        selector.to(vlm.device).train()
        optimiser = torch.optim.AdamW(selector.parameters(), lr=1e-5)
        trained = sum(p.numel() for p in selector.parameters())
    clock = Clock(vlm.device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(vlm.device)
    for repeat in range(options.repeats + 1):
        # the first one makes the optimiser's state
        with clock("step" if repeat else "warm-up", 1):
            one_step(selector, vlm, batch, step_of(vlm, repeat, rows))
            if optimiser:
                optimiser.step()
                optimiser.zero_grad()
    need = shapes.memory(vlm.model.config, vlm.dtype, rows, length)
    estimate = need["weights"] + 16 * trained
    if batch.rows is not None:
        estimate += need["training"]
    peak = torch.cuda.max_memory_allocated(vlm.device) / 2**30 if cuda else None
    return {"method": name, "trained, M": trained / 1e6, "batch": rows, "tokens a row": length,
            "peak, GiB": peak, "estimate, GiB": estimate / 2**30,
            "s a step": clock.ms("step") / 1e3, "rows a second": 1e3 * rows / clock.ms("step")}


def measure_memory(vlm: FrozenVLM, options, peak=None) -> list[dict]:
    """A line for every method and number of pictures: MiB of a training step beyond the weights of
    the models, with gradients and AdamW's two moments. A picture has one question."""
    lines = []
    vlm.checkpointing(True)
    for name, selector in flops.build_methods(vlm, **method_options(options)).items():
        selector.to(vlm.device).train()
        weights = sum(p.nbytes for p in selector.parameters())

        def step(rows: int, selector=selector) -> Callable:
            batch = training_batch(selector, vlm, options, rows)
            return lambda: one_step(selector, vlm, batch, step_of(vlm, 0, rows))
        fixed, picture = training_bytes(selector, step, vlm.device)
        for rows in options.pictures:
            measured = 2 * weights + peak_bytes(step(rows), vlm.device)      # and AdamW's moments
            selector.zero_grad()
            predicted = fixed + rows * picture
            lines.append({"method": name, "pictures": rows, "predicted, MiB": predicted / 2**20,
                          "measured, MiB": measured / 2**20, "ratio": predicted / measured})
        selector.cpu()
    vlm.checkpointing(False)
    return lines


def measure_training(vlm: FrozenVLM, options, peak=None) -> list[dict]:
    """A line for the frozen model, one for every method; a selector's share is what its step takes
    longer than the frozen model's. Where the language model is never called there is no bound, and
    no share."""
    selectors = {FROZEN: None, **flops.build_methods(vlm, **method_options(options))}
    lines = []
    vlm.checkpointing(True)
    for name, selector in selectors.items():
        try:
            line = measure_step(name, selector, vlm, options)
        except torch.OutOfMemoryError as error:   # that, too, is an answer; the others still come
            line = {"method": f"{name}: {str(error).splitlines()[0]}"}
        line["bounded"] = selector is not None and selector.rows != "picture"
        lines.append(line)
        if selector is not None:
            selector.cpu()
    vlm.checkpointing(False)
    bound = lines[0].get("s a step")
    for line in lines:
        known = line.pop("bounded") and bound and line.get("s a step")
        line["selector's share, %"] = 100 * (1 - bound / line["s a step"]) if known else None
    keys = max(lines, key=len)
    return [{key: line.get(key) for key in keys} for line in lines]


# ------------------------------------------------------------------ the first token


def roofline(device: torch.device) -> dict:
    """What the device reaches at best: FLOP/s of a bfloat16 product of square matrices, and byte/s
    of a copy."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    clock = Clock(device)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    big = torch.empty(side ** 2 * (8 if cuda else 32), device=device, dtype=torch.bfloat16)
    for repeat in range(11):
        for name, run in (("matmul", lambda: a @ a), ("copy", big.clone)):
            with clock(name if repeat else "warm-up", 1):
                run()
    return {"flops": 2e3 * side ** 3 / clock.ms("matmul"),
            "bytes": 2e3 * big.nbytes / clock.ms("copy")}


def first_token(vlm: FrozenVLM, selectors: dict, batch, units, k: int, options, peak: dict) -> dict:
    """Milliseconds of a batch, stage by stage, with k of its visual tokens; 0 for all of them.

    The bound of the rest: its FLOPs, attention in full, at the matrix product's speed, or one
    reading of the language model's weights, whichever takes longer.
    """
    valid = units.pad()[1]
    keep = [here.nonzero().flatten() for here in valid]
    stages = {"vision": lambda: vlm.encode(batch)}
    if k:
        question = vlm.question(batch)
        keep = [index[:k] for index in keep]
        for name, selector in selectors.items():
            def select(selector=selector):
                return selector.select(units, question, k)
            stages[name] = select
    stages["rest"] = lambda: vlm.generate(vlm.prune(batch, units, keep), max_new_tokens=1)

    clock = Clock(vlm.device)
    for repeat in range(options.repeats + 1):
        for name, run in stages.items():
            with clock(name if repeat else "warm-up", 1):
                run()
    ms = {name: clock.ms(name) for name in stages}
    vision, rest = (flops.count(stages[name])[0] for name in ("vision", "rest"))
    weights = sum(p.nbytes for part in (vlm.lm.layers, vlm.model.lm_head)
                  for p in part.parameters())
    line = {"batch": len(valid), "visual tokens": k or max(map(len, keep)),
            "vision": ms["vision"], "its bound": 1e3 * vision / peak["flops"],
            **{name: ms.get(name) for name in selectors}, "rest": ms["rest"],
            "its bound ": 1e3 * max(rest / peak["flops"], weights / peak["bytes"])}
    for name in selectors:
        line[f"first token, {name}"] = ms["vision"] + ms.get(name, 0.) + ms["rest"]
    return line | {"TFLOP/s of the rest": rest / ms["rest"] / 1e9}


@torch.no_grad()
def measure_first_token(vlm: FrozenVLM, options, peak: dict) -> list[dict]:
    """A line per batch size and number of visual tokens, all of them first."""
    selectors = flops.build_methods(vlm, **method_options(options))
    for selector in selectors.values():
        selector.to(vlm.device, vlm.dtype).eval()
    lines = []
    for rows in options.batches:
        batch = fabricate(vlm, rows, options.side, options.text)
        units = vlm.encode(batch)
        fewest = int(units.pad()[1].sum(1).min())
        lines += [first_token(vlm, selectors, batch, units, k, options, peak)
                  for k in (0, *BUDGETS) if k < fewest]
    return lines


# ------------------------------------------------------------------ selection


def compile_parts(selector: nn.Module, variant: str) -> None:
    """Compile the selector's parts. CUDA graphs have fixed shapes: into one goes only what has
    Transformer blocks over all tokens, not what is called once for every pick."""
    if variant == "eager":
        return
    for part in selector.children():
        whole = any(isinstance(x, nn.TransformerEncoderLayer) for x in part.modules())
        if whole:
            part.compile(**({"mode": "reduce-overhead"} if variant == "CUDA graphs" else {}))
        elif variant == "compiled" and any(True for _ in part.parameters()):
            part.compile(dynamic=True)


@torch.no_grad()
def measure_selection(vlm: FrozenVLM, options, peak=None) -> list[dict]:
    """A line per batch size and method: milliseconds to select 64 tokens of a batch, in all
    variants."""
    selectors = flops.build_methods(vlm, **method_options(options))
    lines = []
    for rows in options.batches:
        batch = fabricate(vlm, rows, options.side, options.text)
        units, question = vlm.encode(batch), vlm.question(batch)
        k = min(64, int(units.pad()[1].sum(1).min()))
        for name, selector in selectors.items():
            line = {"method": name, "batch": rows}
            for variant in VARIANTS:
                line[variant] = None
                if variant not in options.variants:
                    continue
                own = copy.deepcopy(selector).to(vlm.device, vlm.dtype).eval()
                clock = Clock(vlm.device)
                compile_parts(own, variant)
                try:
                    for repeat in range(options.repeats + 3):       # compiling takes the first
                        with clock("warm-up" if repeat < 3 else "select", 1):
                            own.select(units, question, k)
                    line[variant] = clock.ms("select")
                except Exception as error:    # what a device cannot compile is a result
                    line[variant] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            lines.append(line)
    return lines


# ------------------------------------------------------------------ the command

PARTS = {"memory": (measure_memory, "Memory of a training step"),
         "train": (measure_training, "Training"),
         "first": (measure_first_token, "Time to the first token, ms"),
         "select": (measure_selection, "Selection of 64 tokens, ms")}


def parse(args: list[str]):
    cuda = torch.cuda.is_available()
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("name", choices=list(shapes.SHAPES), help="the backbone")
    add("--shrink", action="store_true", help="3 narrow layers: to see that all parts run")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what is measured")
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"],
        help="of the frozen VLM")
    add("--attn", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"],
        help="attn_implementation of transformers")
    add("--batch", type=int, default=8,
        help="rows of a training step with the language model [ours]")
    add("--pictures_batch", type=int, default=32,
        help="pictures of a training step that reads no text [paper]")
    add("--batches", type=int, nargs="+", default=[1, 8], help="rows where answers are timed")
    add("--pictures", type=int, nargs="+", default=[1, 2, 4, 8],
        help="of the training steps whose memory is measured")
    add("--side", type=int, default=336, help="pixels of the square pictures")
    add("--text", type=int, default=60, help="tokens of a question")
    add("--answer", type=int, default=60, help="tokens of an answer in training")
    add("--options", nargs="+", default=[], metavar="NAME=VALUE",
        help="of the methods' Configs, where they have them, such as layers=2")
    add("--repeats", type=int, default=10, help="calls that are timed, after one that is not")
    add("--variants", nargs="+", default=list(VARIANTS if cuda else VARIANTS[:1]), choices=VARIANTS,
        help="how a selection runs")
    add("--out", default="results/gpu/NAME", help="the two files, without their ending")
    options = parser.parse_args(args)
    runs.check_options(options, batch=1, pictures_batch=1, batches=1, pictures=1, side=1, text=0,
                       answer=1, repeats=1)
    check_device(options.device, getattr(torch, options.dtype))
    runs.writable(Path(options.out).parent)
    method_options(options)
    return options


def main(args: list[str]) -> dict:
    options = parse(args)
    label = options.name + "-shrunk" * options.shrink
    out = Path(options.out.replace("NAME", label))
    vlm = shapes.load(options.name, options.shrink, dtype=getattr(torch, options.dtype),
                      device=options.device, attn=options.attn)
    command = " ".join(["python -m measure.gpu", *map(str, args)])
    result = {"command": command, "weights": "random", "model": label, "dtype": options.dtype,
              "attention": options.attn, **hardware(vlm.device)}
    peak = roofline(vlm.device)
    result["matrix product, TFLOP/s"] = round(peak["flops"] / 1e12, 3)
    result["copy, GB/s"] = round(peak["bytes"] / 1e9, 1)
    text = "\n".join(f"{key}: {value}  " for key, value in result.items())
    for part in options.parts:
        run, title = PARTS[part]
        result[part] = run(vlm, options, peak)
        text += f"\n\n{title}\n\n{markdown(result[part])}"
        runs.write_text(out.with_name(out.name + ".json"), json.dumps(result, indent=1) + "\n")
        runs.write_text(out.with_name(out.name + ".md"), text + "\n")
    print(text)
    return result


if __name__ == "__main__":
    runs.command(main)
