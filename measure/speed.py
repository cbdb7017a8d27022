"""What an answer costs with all visual tokens and with few, beside what this machine allows.

    python -m measure.speed                                          on a GPU: three backbones whole
    python -m measure.speed llava-1.5-7b --layers 4 --batches 1      on a CPU: few layers, ratios

answers  vision encoder, selection by the methods and by rivals, prefill, new tokens and memory, at
         every number of visual tokens
picks    StepPrune's loop before and after: rollout() and episode(), which on CUDA is a graph

All weights are random, pictures are noise, texts repeat a word. Calls are made by turns, after one
of each that is not timed; every figure is the least and the median of them. The limit of a stage is
its FLOPs at the speed of a large matrix product, or one reading of its weights at the speed of a
copy, whichever takes longer; both speeds are measured in the same run. Writes <out>/NAME.json and
.md after every part.
"""

import json
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import nn

import baselines
import runs
from backbones.checkpoints import check_device
from baselines.encoder import encode
from benchmarks.answering import QuestionBatch
from benchmarks.costs import peak_bytes, prefill_flops
from common import FrozenVLM
from measure import flops, shapes

# visual tokens beside all of them, and pixels (width, height) of a picture; LLaVA-NeXT cuts a
# square into four crops beside the whole [ours]
BUDGETS = {"llava-1.5-7b": (192, 128, 64), "llava-next-vicuna-7b": (640, 320, 160),
           "qwen2.5-vl-7b": (536, 178, 64)}
SIDES = {"llava-1.5-7b": (336, 336), "llava-next-vicuna-7b": (672, 672),
         "qwen2.5-vl-7b": (1288, 980)}
RIVALS = ["cls_attention", "divprune", "cdpruner_words", "visionzip"]


def markdown(head: list[str], rows: list[list]) -> str:
    """A table; floats with three digits, None as a dash."""
    def shown(x) -> str:
        if x is None:
            return "-"
        return f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = ["| " + " | ".join(map(shown, cells)) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def hardware(device: torch.device) -> dict:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": version("transformers")}


# ------------------------------------------------------------------ timing


def seconds(call: Callable, device) -> float:
    """Of one call, the device's work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def by_turns(calls: dict, device, repeats: int, warm_up: Callable = seconds) -> dict:
    """{name: milliseconds of each of its `repeats` calls}, all calls in one round after another,
    every other one backwards. warm_up(call, device) makes the first, which does not count. A call
    that runs out of memory has no times."""
    times = {name: [] for name in calls}
    calls = dict(calls)
    for number in range(-1, repeats):
        for name in list(calls) if number % 2 else reversed(list(calls)):
            try:
                if number < 0:
                    warm_up(calls[name], device)
                else:
                    times[name].append(1e3 * seconds(calls[name], device))
                continue
            except torch.OutOfMemoryError:
                pass                          # its tensors go with it
            del calls[name]
            times[name] = []
            torch.cuda.empty_cache()
    return times


def spread(ms: list[float]) -> str:
    """Least / median."""
    return f"{min(ms):.3g} / {median(ms):.3g}" if ms else "out of memory"


def middle(ms: list[float]) -> float | None:
    return median(ms) if ms else None


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}x" if a and b else "-"


def roofline(device: torch.device, dtype: torch.dtype) -> dict:
    """What the device reaches at best: FLOP/s of a product of square matrices, and byte/s of a
    copy, read and written."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    big = torch.empty(2 ** (31 if device.type == "cuda" else 28), device=device, dtype=torch.uint8)
    ms = by_turns({"matmul": lambda: a @ a, "copy": big.clone}, device, 10)
    return {"flops": 2e3 * side ** 3 / min(ms["matmul"]),
            "bytes": 2e3 * big.nbytes / min(ms["copy"])}


# ------------------------------------------------------------------ answers


def fabricate(vlm: FrozenVLM, rows: int, size: tuple[int, int], text: int, answer: int = 0):
    """A batch of noise of a size, (width, height) in pixels, with questions of about `text` tokens
    and answers of `answer`; 0 for none."""
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    question = " ".join(["red"] * text)
    turn = (question, " ".join(["red"] * answer) if answer else None)
    return vlm.batch([Image.fromarray(noise)] * rows, [[turn]] * rows)


def choosers(vlm: FrozenVLM, rivals: list[str], selectors: dict[str, nn.Module]) -> dict:
    """{name: Way} of the methods and of the rivals that this backbone has all for."""
    ways = {name: runs.Way(lambda asked, k, selector=selector: selector.select(
        asked.units, asked.question, k)) for name, selector in selectors.items()}
    for name in rivals:
        try:
            ways[name] = baselines.way(name, vlm)
        except ValueError as error:
            print(f"{name}: left out, {error}")
    return ways


def bytes_of(*parts: nn.Module) -> int:
    return sum(p.nbytes for part in parts for p in part.parameters())


@torch.no_grad()
def answer_lines(vlm: FrozenVLM, ways: dict, rows: int, size, budgets, options, peak: dict
                 ) -> list[dict]:
    """A line for every number of visual tokens, all of them first."""
    batch = fabricate(vlm, rows, size, options.text)
    units = encode(vlm, batch, {name: need for way in ways.values()
                                for name, need in way.needs.items()})
    valid = [here.nonzero().flatten() for here in units.pad()[1]]
    asked = QuestionBatch(vlm, units, list(range(rows)), [str(row) for row in range(rows)], batch,
                          vlm.question(batch))
    every = len(valid[0])
    sizes = [every, *(k for k in budgets if k < every)]
    memory = {}

    def generate(k: int, tokens: int) -> list[str]:
        return vlm.generate(vlm.prune(batch, units, [at[:k] for at in valid]), tokens)
    calls = {("vision", 0): lambda: vlm.encode(batch)}
    for k in sizes:
        calls["prefill", k] = partial(generate, k, 1)
        calls["tokens", k] = partial(generate, k, options.new_tokens)
        if k < every:
            calls |= {(name, k): partial(way.select, asked, k) for name, way in ways.items()}
    names = {call: name for name, call in calls.items()}

    def warm_up(call: Callable, device) -> None:
        memory[names[call]] = peak_bytes(call, torch.device(device))
    ms = by_turns(calls, vlm.device, options.repeats, warm_up)

    text = batch["input_ids"].shape[1] - every
    config = vlm.model.config.text_config
    one = fabricate(vlm, 1, size, options.text)
    work = {"vision": rows * flops.count(lambda: vlm.encode(one))[0]}
    tower = getattr(vlm.adapter.model, "visual", None) or vlm.adapter.model.vision_tower
    weights = {"vision": bytes_of(tower), "prefill": bytes_of(vlm.lm.layers, vlm.model.lm_head)}
    lines = []
    for k in sizes:
        work["prefill"] = rows * prefill_flops(config, [k + text] * config.num_hidden_layers)
        limit = {stage: 1e3 * max(work[stage] / peak["flops"], weights[stage] / peak["bytes"])
                 for stage in work}
        lines.append({"batch": rows, "visual tokens": k, "text tokens": text,
                      "vision": ms["vision", 0], "prefill": ms["prefill", k],
                      "tokens": ms["tokens", k], "memory": memory.get(("prefill", k)),
                      "FLOPs": work["prefill"], "limits": limit,
                      "selection": {name: ms[name, k] for name in ways} if k < every else {}})
    return lines


def measure_answers(vlm: FrozenVLM, options, peak: dict) -> list[dict]:
    """Lines of one backbone, batch after batch; a batch that does not fit at all has one line."""
    selectors = flops.build_methods(vlm, **options.chosen)
    for selector in selectors.values():
        selector.to(vlm.device, vlm.dtype).eval().requires_grad_(False)
    ways = choosers(vlm, options.rivals, selectors)
    lines = []
    for rows in options.batches:
        try:
            lines += answer_lines(vlm, ways, rows, options.size or SIDES[options.name],
                                  options.budgets or BUDGETS[options.name], options, peak)
        except torch.OutOfMemoryError:
            lines.append({"batch": rows, "visual tokens": "out of memory"})
        torch.cuda.empty_cache()
    return lines


def answer_tables(lines: list[dict], new_tokens: int = 32) -> str:
    """Two tables: the stages, and the selections with what they leave of the time to the first
    token. Ratios are of medians, to the line with all tokens of the same batch."""
    stages, chosen, full = [], [], {}
    names = list(max((line.get("selection", {}) for line in lines), key=len))
    for line in lines:
        if "prefill" not in line:
            stages.append([line["batch"], line["visual tokens"], *[None] * 8])
            continue
        full = line if not line["selection"] else full
        now, before = middle(line["prefill"]), middle(full["prefill"])
        vision = middle(line["vision"])
        limit = line["limits"]["prefill"]
        share = f"{100 * limit / now:.0f} %" if now else None
        stages.append([
            line["batch"], line["visual tokens"], spread(line["vision"]), spread(line["prefill"]),
            share, spread(line["tokens"]), (line["memory"] or 0) / 2 ** 30, ratio(before, now),
            ratio(full["FLOPs"], line["FLOPs"]), ratio(full["limits"]["prefill"], limit)])
        if line["selection"]:
            cells = []
            for name in names:
                ms = middle(line["selection"][name])
                first = ms and now and vision and vision + ms + now
                cells += [spread(line["selection"][name]),
                          ratio(before and vision and vision + before, first)]
            chosen.append([line["batch"], line["visual tokens"], *cells])
    head = ["batch", "visual tokens", "vision ms", "prefill ms", "of its limit",
            f"{new_tokens} tokens ms", "memory GiB", "prefill, times as fast", "FLOPs",
            "limit allows"]
    titles = [title for name in names for title in (f"{name} ms", "first token")]
    return "\n\n".join([markdown(head, stages)] + (
        [markdown(["batch", "visual tokens", *titles], chosen)] if chosen else []))


# ------------------------------------------------------------------ StepPrune's loop


@torch.no_grad()
def measure_picks(options) -> list[dict]:
    """A line for every number of tokens, batch and type: the loop before and after, picks of 64
    tokens. Weights in half precision leave the logits in float32; `differ` is the share of picks
    that then are not those of float32."""
    (net,) = [selector for selector in flops.build_methods(
        shapes.load("llava-1.5-7b", device="meta"), **options.chosen).values()
        if hasattr(selector, "episode")]
    net.to(options.device).eval().requires_grad_(False)
    lines, device = [], torch.device(options.device)
    width, k = net.cfg.width, options.picks
    for n in options.tokens:
        for rows in options.batches:
            generator = torch.Generator().manual_seed(n)
            v = torch.randn(rows, n, width, generator=generator).to(device)
            words = torch.randn(rows, 20, net.cfg.text_width, generator=generator).to(device)
            valid, said = (torch.ones(x.shape[:2], dtype=torch.bool, device=device)
                           for x in (v, words))
            memory = net.memory(v, valid, words, said)
            right = net.rollout(memory, valid, least=k, most=k).picks
            for dtype in dict.fromkeys([torch.float32, options.half]):
                loop = net if dtype == torch.float32 else half_of(net, dtype)
                m = memory.to(dtype)

                calls = {"before": partial(loop.rollout, m, valid, least=k, most=k),
                         "after": partial(loop.episode, m, valid, least=k, most=k)}
                before, after = calls["before"]().picks, calls["after"]()[0]
                lines.append({
                    "N": n, "batch": rows, "weights": str(dtype).removeprefix("torch."),
                    **by_turns(calls, device, options.repeats),
                    "same": torch.equal(before, after),
                    "differ": (after != right).double().mean().item(),
                    "sets differ": set_difference(after, right)})
    return lines


def half_of(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with weights of this type."""
    other = type(net)(net.cfg)
    other.load_state_dict(net.state_dict())
    return other.to(net.stop.device, dtype).eval().requires_grad_(False)


def set_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of the picks (B, K) that the other has not, in whatever order."""
    return (a[:, :, None] != b[:, None]).all(2).double().mean().item()


def picks_table(lines: list[dict], picks: int) -> str:
    head = ["N", "batch", "weights", "before ms", "after ms", "times as fast", "same picks",
            "differ from float32", "as a set"]
    rows = [[line["N"], line["batch"], line["weights"], spread(line["before"]),
             spread(line["after"]), ratio(middle(line["before"]), middle(line["after"])),
             "yes" if line["same"] else "NO", f"{100 * line['differ']:.1f} %",
             f"{100 * line['sets differ']:.1f} %"] for line in lines]
    return f"Loop of {picks} picks\n\n{markdown(head, rows)}"


# ------------------------------------------------------------------ the command


def add_options(parser) -> None:
    """What measure.gpu takes too."""
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--layers", type=int, default=0 if cuda else 4, help="of the language model; 0: all")
    add("--shrink", action="store_true", help="3 narrow layers: to see that all parts run")
    add("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--dtype", default=runs.DTYPE, choices=["bfloat16", "float16", "float32"],
        help="of model and selectors")
    add("--attn", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"],
        help="attn_implementation of transformers")
    add("--batches", type=int, nargs="+", default=[1, 8], help="rows where answers are timed")
    add("--budgets", type=int, nargs="+", default=[],
        help="visual tokens beside all of them; without: those of the backbone")
    add("--size", type=int, nargs=2, default=[], metavar=("WIDTH", "HEIGHT"),
        help="pixels of the pictures; without: those of the backbone")
    add("--text", type=int, default=60, help="tokens of a question")
    add("--new_tokens", type=int, default=32, help="of an answer")
    add("--rivals", nargs="+", default=RIVALS, choices=baselines.names(),
        help="whose selection is timed too")
    add("--tokens", type=int, nargs="+", default=[576, 2880], help="N of the loop")
    add("--picks", type=int, default=64, help="of the loop")
    add("--options", nargs="+", default=[], metavar="NAME=VALUE",
        help="of the methods' Configs, where they have them, such as layers=2")
    add("--repeats", type=int, default=5, help="rounds that are timed, after one that is not")


def check(options) -> None:
    """Fill in what follows from the options. Raises ValueError for what cannot be."""
    runs.check_options(options, layers=0, batches=1, budgets=1, size=1, text=0, new_tokens=1,
                       tokens=1, picks=1, repeats=1)
    if options.picks > min(options.tokens):
        raise ValueError(f"picks={options.picks}, tokens={options.tokens}: expected no more picks "
                         "than tokens")
    check_device(options.device, getattr(torch, options.dtype))
    options.half = torch.float16 if options.dtype == "float16" else torch.bfloat16
    options.name = getattr(options, "name", None)
    options.chosen = flops.method_options(options.options)


class Report:
    """Two files, which hold what has been measured so far."""

    def __init__(self, stem: Path, module: str, args: list[str], options):
        device = torch.device(options.device)
        self.stem, self.peak = stem, roofline(device, getattr(torch, options.dtype))
        self.numbers = {
            "command": " ".join([f"python -m measure.{module}", *map(str, args)]),
            "weights": "random", "dtype": options.dtype, "attention": options.attn,
            "layers of the language model": options.layers or "all", **hardware(device),
            "matrix product, TFLOP/s": round(self.peak["flops"] / 1e12, 3),
            "copy, GB/s": round(self.peak["bytes"] / 1e9, 1)}
        self.text = "\n".join(f"{key}: {value}  " for key, value in self.numbers.items())

    def add(self, part: str, title: str, lines, text: str) -> None:
        self.numbers[part] = lines
        self.text += f"\n\n## {title}\n\n{text}"
        print(f"\n{title}\n\n{text}", flush=True)
        runs.write_text(self.stem.with_name(self.stem.name + ".json"),
                        json.dumps(self.numbers, indent=1) + "\n")
        runs.write_text(self.stem.with_name(self.stem.name + ".md"), self.text + "\n")


def load(name: str, options) -> FrozenVLM:
    vlm = shapes.load(name, options.shrink, options.layers, dtype=getattr(torch, options.dtype),
                      device=options.device, attn=options.attn)
    vlm.model.generation_config.eos_token_id = None             # an answer of nonsense may not end
    return vlm


def main(args: list[str]) -> dict:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", default=[*BUDGETS], metavar="backbone",
                        help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--parts", nargs="+", default=["answers", "picks"],
                        choices=["answers", "picks"], help="what is measured")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("results/speed/speed"),
                        help="the two files, without their ending")
    options = parser.parse_args(args)
    check(options)
    for name in options.names:
        shapes.config(name, True)                               # one that there is
        if not (name in BUDGETS or options.budgets and options.size):
            raise ValueError(f"{name}: expected --budgets and --size, it has none of its own")
    runs.writable(options.out.parent)
    report = Report(options.out, "speed", args, options)
    for name in options.names if "answers" in options.parts else []:
        options.name = name
        vlm = load(name, options)
        lines = measure_answers(vlm, options, report.peak)
        report.add(name, name, lines, answer_tables(lines, options.new_tokens))
        del vlm
        torch.cuda.empty_cache()
    if "picks" in options.parts:
        lines = measure_picks(options)
        report.add("picks", "StepPrune's loop", lines, picks_table(lines, options.picks))
    return report.numbers


if __name__ == "__main__":
    runs.command(main)
