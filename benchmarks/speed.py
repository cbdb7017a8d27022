"""Time and FLOPs of selection and prefill, on a language model of real shape with random weights."""

import time
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import random_language_model


class Clock:
    """Milliseconds per item and stage, the mean over all calls."""

    def __init__(self, device):
        self.seconds, self.items, self.device = {}, {}, torch.device(device)

    @contextmanager
    def __call__(self, stage, items: int):
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.add(stage, time.perf_counter() - start, items)

    def add(self, stage, seconds: float, items: int):
        self.seconds[stage] = self.seconds.get(stage, 0.) + seconds
        self.items[stage] = self.items.get(stage, 0) + items

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ms(self, stage) -> float:
        return 1e3 * self.seconds[stage] / self.items[stage]


@torch.no_grad()
def measure_speed(selectors: dict, device: str, layers: int = 4, text: int = 60, repeats: int = 5) -> list[dict]:
    """Prefill at 576, 192, 128 and 64 visual tokens and `text` text tokens, on a language model of LLaVA-1.5-7B's width
    but `layers` layers, with random weights, and the selection of as many tokens: only the ratios mean something.

    selectors: name -> select(v (1, 576, 1024), question (1, text, 4096), K). Times are means of `repeats`; FLOPs are
    counted (2 per multiply-add, attention in full).
    """
    clock, lm = Clock(device), random_language_model(layers).to(device)
    v, lines = torch.randn(1, 576, 1024, device=device, dtype=torch.bfloat16), []
    question = torch.randn(1, text, 4096, device=device, dtype=torch.bfloat16)
    for k in tqdm([576, 192, 128, 64], "speed"):
        x = torch.randn(1, k + text, 4096, device=device, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as flops:
            lm(inputs_embeds=x)
        for _ in range(repeats):
            with clock(f"prefill {k}", 1):
                lm(inputs_embeds=x)
            for name, select in selectors.items() if k < 576 else ():
                with clock(f"{name} {k}", 1):
                    select(v, question, k)
        lines.append({"K": k, "flops": flops.get_total_flops(), "prefill_ms": clock.ms(f"prefill {k}"), **{
            f"{name}_ms": clock.ms(f"{name} {k}") if k < 576 else 0. for name in selectors}})
    return lines


def token_budget(tokens: int, counts: dict[int, int], layers: int) -> tuple[int, int, float]:
    """Visual tokens that enter the language model, that its last layer sees, and their mean over its layers.

    counts: {layer: visual tokens from this layer on}, empty for a method that prunes in front of the language model.
    """
    seen = per_layer(tokens, counts, layers)
    return tokens, seen[-1], sum(seen) / layers


def per_layer(tokens: int, counts: dict[int, int], layers: int) -> list[int]:
    """The visual tokens that each layer sees, see token_budget()."""
    seen = [tokens]
    for i in range(layers):
        seen.append(counts.get(i, seen[-1]))
    return seen[1:]


def prefill_flops(config, counts: list[int]) -> int:
    """FLOPs of a prompt up to its first new token in a Llama-like language model, 2 per multiply-add, attention as n^2
    products: what benchmarks/flops.py counts "in full". The vision encoder and the selection are not in it.

    config: of the language model; counts[i]: tokens, of image and text, that layer i sees.
    """
    width, inner = config.hidden_size, config.intermediate_size
    side = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * side, config.num_key_value_heads * side
    weights = 2 * width * queries + 2 * width * keys + 3 * width * inner
    return sum(2 * n * weights + 4 * n ** 2 * queries for n in counts) + 2 * width * config.vocab_size


def speed_table(lines: list[dict], layers: int) -> str:
    """Ratios to the unpruned prompt of the same run; the saved prefill is scaled to the real model's 32 layers."""
    names = [key.removesuffix("_ms") for key in lines[0] if key.endswith("_ms") and key != "prefill_ms"]
    head = ["K", "prefill ms", "speed-up", "FLOPs ratio",
            *(x for name in names for x in (f"{name} ms", "of the prefill that 32 layers save"))]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    full = lines[0]
    for line in lines:
        saved = (full["prefill_ms"] - line["prefill_ms"]) * 32 / layers
        shares = (f"{line[f'{name}_ms']:.1f} | {100 * line[f'{name}_ms'] / saved:.1f} %" if saved else "- | -"
                  for name in names)
        out.append(f"| {line['K']} | {line['prefill_ms']:.0f} | {full['prefill_ms'] / line['prefill_ms']:.2f}x | "
                   f"{full['flops'] / line['flops']:.2f}x | {' | '.join(shares)} |")
    return "\n".join(out)


@torch.no_grad()
def measure_pointer(net, device: str, tokens=(576, 2880), batches=(1, 8), budgets=(16, 32, 48, 64),
                    repeats: int = 3) -> str:
    """The time per image of net, a StepPrune, as Markdown: the memory, made once, and the loop for K picks from it."""
    clock, width, text_width = Clock(device), net.cfg.width, net.cfg.text_width
    head = ["N", "batch", "memory ms", *(f"loop ms, K = {k}" for k in budgets), "ms per pick at the last K"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for n, b in tqdm([(n, b) for n in tokens for b in batches], "pointer"):
        v, text = (torch.randn(b, *shape, device=device, dtype=torch.bfloat16)
                   for shape in ((n, width), (20, text_width)))
        here, asked = (torch.ones(x.shape[:2], dtype=torch.bool, device=device) for x in (v, text))
        for _ in range(repeats):
            with clock(f"memory {n} {b}", b):
                memory = net.memory(v, here, text, asked)
            for k in budgets:
                with clock(f"loop {n} {b} {k}", b):
                    net.rollout(memory, here, least=k, most=k)
        loops = [clock.ms(f"loop {n} {b} {k}") for k in budgets]
        out.append("| " + " | ".join([str(n), str(b), f"{clock.ms(f'memory {n} {b}'):.1f}",
                                      *(f"{x:.1f}" for x in loops), f"{loops[-1] / budgets[-1]:.2f}"]) + " |")
    return "\n".join(out)


# visual tokens -> TFLOPs that the reconstruction paper prints for LLaVA-NeXT with Vicuna-7B (Table 1)
PRINTED = {2880: 21, 1440: 10, 1152: 8, 640: 4, 320: 2, 160: 1}


def paper_flops(visual: int, matrices: int = 2, sampled: int = 0) -> float:
    """The reconstruction paper's count for the visual tokens alone (Section 5.3), a multiply-add counted once.

    matrices: of the language model's feed-forward; 2 in the printed formula, 3 with the gate it really has. sampled:
    visual tokens, in crops of 576, that the selector's four blocks of CLIP-L's width read.
    """
    def layer(n, d, m, matrices):
        return 4 * n * d ** 2 + 2 * n ** 2 * d + matrices * n * d * m
    return 32 * layer(visual, 4096, 11008, matrices) + sampled / 576 * 4 * layer(576, 1024, 4096, 2)


@torch.no_grad()
def counted_flops(build, *shape: int) -> int:
    """FLOPs of build()(input of this shape) on the meta device, a multiply-add counted twice, attention in full."""
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        build()(torch.empty(shape, dtype=torch.bfloat16))
    return flops.get_total_flops()


def flops_table(selector) -> str:
    """Table 1's TFLOPs beside three counts of ours, as Markdown. selector: builds blocks (1, 576, 1024) -> logits."""
    head = ["visual tokens", "paper prints", "its formula, 2 n d m", "... with the gate, 3 n d m",
            "counted, 2 per multiply-add, selector included"]
    def language():
        lm = random_language_model(32)
        return lambda x: lm(inputs_embeds=x)
    out, blocks = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)], 5 * counted_flops(selector, 1, 576, 1024)
    for n, printed in PRINTED.items():
        pruned = 2880 * (n < 2880)
        counted = counted_flops(language, 1, n, 4096)
        cells = [paper_flops(n, 2, pruned), paper_flops(n, 3, pruned), counted + blocks * (n < 2880)]
        out.append(f"| {n} | {printed} | " + " | ".join(f"{x / 1e12:.1f}" for x in cells) + " |")
    return "\n".join(out)
