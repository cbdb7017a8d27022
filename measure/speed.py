"""Time of selection and prefill on a language model of LLaVA-1.5-7B's width, and a paper's FLOPs.

    python -m measure.speed

speed.md      prefill at 576 to 64 visual tokens, and the selection of as many by each method
selection.md  how the time of a selection grows with the tokens of a picture and those kept
flops.md      TFLOPs that the reconstruction paper prints in its Table 1, beside its
              formula and what is counted here

All weights are random and the language model has few layers: only ratios mean something. On a CPU
it takes about ten minutes.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import LlamaConfig, LlamaModel

import runs
from backbones.checkpoints import check_device
from benchmarks.costs import Clock
from common import Units
from measure import flops, shapes

BACKBONE = "llava-1.5-7b"
DEPTH = 32                                 # layers of the real language model
BUDGETS = (576, 192, 128, 64)              # visual tokens; the first is all of them
# visual tokens -> TFLOPs that the reconstruction paper prints for LLaVA-NeXT, Vicuna-7B (Table 1)
PRINTED = {2880: 21, 1440: 10, 1152: 8, 640: 4, 320: 2, 160: 1}


def random_language_model(layers: int, width: int = 4096, dtype=torch.bfloat16) -> nn.Module:
    """A decoder of LLaVA-1.5-7B's shape but `layers` deep, with random weights: for timing."""
    config = LlamaConfig(hidden_size=width, intermediate_size=width * 43 // 16,
                         num_hidden_layers=layers, num_attention_heads=width // 128,
                         vocab_size=32064)
    model = LlamaModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def random_units(rows: int, n: int, width: int, device) -> Units:
    """n units of each of `rows` pictures."""
    feats = torch.randn(rows * n, width, device=device, dtype=torch.bfloat16)
    image_of = torch.arange(rows, device=device).repeat_interleave(n)
    return Units(feats, image_of, [(1, n)] * rows)


def random_question(rows: int, text: int, dim: int, device) -> tuple:
    """Embeddings of `text` tokens a row, all of them valid."""
    words = torch.randn(rows, text, dim, device=device, dtype=torch.bfloat16)
    return words, torch.ones(rows, text, dtype=torch.bool, device=device)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


# ------------------------------------------------------------------ selection and prefill


@torch.no_grad()
def measure_speed(selectors: dict[str, nn.Module], dim: int, device, layers: int = 4,
                  text: int = 60, repeats: int = 5) -> list[dict]:
    """One line per K of BUDGETS: milliseconds of the prefill of K visual and `text` text tokens,
    its FLOPs (2 per multiply-add, attention in full), and milliseconds of each selection of K.

    selectors: name -> selector in bfloat16 on the device | dim: width of the language model
    """
    clock = Clock(device)
    lm = random_language_model(layers, dim).to(device)
    width = next(iter(selectors.values())).cfg.width
    units = random_units(1, BUDGETS[0], width, device)
    question = random_question(1, text, dim, device)
    lines = []
    for k in tqdm(BUDGETS, "speed"):
        x = torch.randn(1, k + text, dim, device=device, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:      # the first call, which is not timed
            lm(inputs_embeds=x)
        chosen = selectors if k < BUDGETS[0] else {}
        for _ in range(repeats):
            with clock(("prefill", k), 1):
                lm(inputs_embeds=x)
            for name, selector in chosen.items():
                with clock((name, k), 1):
                    selector.select(units, question, k)
        times = {f"{name}_ms": clock.ms((name, k)) if name in chosen else 0. for name in selectors}
        lines.append({"K": k, "flops": counter.get_total_flops(),
                      "prefill_ms": clock.ms(("prefill", k)), **times})
    return lines


def speed_table(lines: list[dict], layers: int) -> str:
    """Ratios to the unpruned prompt of the same run, as Markdown; the saved prefill is scaled to
    the real model's 32 layers."""
    names = [key.removesuffix("_ms") for key in lines[0]
             if key.endswith("_ms") and key != "prefill_ms"]
    head = ["K", "prefill ms", "speed-up", "FLOPs ratio"]
    for name in names:
        head += [f"{name} ms", f"of the prefill that {DEPTH} layers save"]
    full = lines[0]
    rows = []
    for line in lines:
        saved = (full["prefill_ms"] - line["prefill_ms"]) * DEPTH / layers
        row = [str(line["K"]), f"{line['prefill_ms']:.0f}",
               f"{full['prefill_ms'] / line['prefill_ms']:.2f}x",
               f"{full['flops'] / line['flops']:.2f}x"]
        for name in names:
            ms = line[f"{name}_ms"]
            row += [f"{ms:.1f}", f"{100 * ms / saved:.1f} %"] if saved else ["-", "-"]
        rows.append(row)
    return markdown(head, rows)


@torch.no_grad()
def measure_selection(selectors: dict[str, nn.Module], dim: int, device, tokens=(576, 2880),
                      batches=(1, 8), budgets=(16, 64), text: int = 20, repeats: int = 3) -> str:
    """Milliseconds a picture to select K of N tokens, and of them each further token between the
    smallest and the largest K: what a method that picks one after the other takes longer."""
    clock = Clock(device)
    low, high = min(budgets), max(budgets)
    rows = []
    for name, selector in selectors.items():
        for n, batch in tqdm([(n, batch) for n in tokens for batch in batches], name):
            units = random_units(batch, n, selector.cfg.width, device)
            question = random_question(batch, text, dim, device)
            for _ in range(repeats):
                for k in budgets:
                    with clock((name, n, batch, k), batch):
                        selector.select(units, question, k)
            ms = {k: clock.ms((name, n, batch, k)) for k in budgets}
            further = (ms[high] - ms[low]) / (high - low)
            rows.append([name, str(n), str(batch), *(f"{ms[k]:.1f}" for k in budgets),
                         f"{further:.2f}"])
    head = ["method", "N", "batch", *(f"ms, K = {k}" for k in budgets), "ms per further token"]
    return markdown(head, rows)


# ------------------------------------------------------------------ a paper's FLOPs


def paper_flops(visual: int, matrices: int = 2, sampled: int = 0) -> float:
    """The reconstruction paper's count for the visual tokens alone (Section 5.3), a multiply-add
    counted once.

    matrices: of the language model's feed-forward; 2 in the printed formula, 3 with the gate it
    really has. sampled: visual tokens, in crops of 576, that the selector's four blocks of CLIP-L's
    width read.
    """
    def layer(n, d, m, matrices):
        return 4 * n * d ** 2 + 2 * n ** 2 * d + matrices * n * d * m
    selector = sampled / 576 * 4 * layer(576, 1024, 4096, 2)
    return 32 * layer(visual, 4096, 11008, matrices) + selector


def counted_flops(n: int) -> int:
    """FLOPs of n tokens in the whole language model, a multiply-add counted twice, attention in
    full."""
    with torch.device("meta"):
        lm = random_language_model(DEPTH)
    return flops.count(lambda: lm(inputs_embeds=flops.empty(1, n, 4096), use_cache=True))[0]


def flops_table(selectors: dict[str, nn.Module], dim: int = 4096, text: int = 20) -> str:
    """Table 1's TFLOPs beside three counts of ours, as Markdown. The last is one for each selector,
    whose selection from five crops it includes."""
    head = ["visual tokens", "paper prints", "its formula, 2 n d m", "... with the gate, 3 n d m",
            *(f"counted, 2 per multiply-add, {name} included" for name in selectors)]
    crops, n = 5, 576
    whole = crops * n
    rows = []
    for k, printed in PRINTED.items():
        sampled = whole if k < whole else 0
        cells = [paper_flops(k, 2, sampled), paper_flops(k, 3, sampled)]
        language = counted_flops(k)
        for selector in selectors.values():
            own = flops.selection(selector, crops, n, k, dim, text) if k < whole else 0
            cells.append(language + own)
        rows.append([str(k), str(printed), *(f"{x / 1e12:.1f}" for x in cells)])
    return markdown(head, rows)


def main(args: list[str]) -> list[dict]:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    cuda = torch.cuda.is_available()
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880],
                        help="N of selection.md")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8],
                        help="pictures at a time in selection.md")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 64],
                        help="K of selection.md")
    parser.add_argument("--repeats", type=int, default=3, help="times that everything is timed")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("results/speed"),
                        help="folder of the tables")
    options = parser.parse_args(args)
    runs.check_options(options, layers=1, tokens=1, batches=1, budgets=1, repeats=1)
    if len({*options.budgets}) < 2 or max(options.budgets) > min(options.tokens):
        raise ValueError(f"budgets={options.budgets}, tokens={options.tokens}: expected two K or "
                         "more, none above N")
    check_device(options.device, torch.bfloat16)
    runs.writable(options.out)
    vlm = shapes.load(BACKBONE, device="meta")
    selectors = flops.build_methods(vlm)
    counted = flops_table(selectors, vlm.dim)
    for selector in selectors.values():
        selector.to(options.device, torch.bfloat16).eval()
    lines = measure_speed(selectors, vlm.dim, options.device, options.layers,
                          repeats=options.repeats)
    grown = measure_selection(selectors, vlm.dim, options.device, options.tokens, options.batches,
                              options.budgets, repeats=options.repeats)
    for name, text in (("speed", speed_table(lines, options.layers)), ("selection", grown),
                       ("flops", counted)):
        print(f"\n{text}\n")
        runs.write_text(options.out / f"{name}.md", text + "\n")
    print(f"random weights, {options.layers} layers of language model, {options.device}, "
          f"{torch.get_num_threads()} threads")
    runs.write_text(options.out / "speed.json", json.dumps(lines, indent=1))
    return lines


if __name__ == "__main__":
    runs.command(main)
