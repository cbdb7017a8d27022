"""FLOPs of the real backbones, stage by stage: `python -m benchmarks.flops`. No weights, no network; under two minutes.

The models are built on the meta device from benchmarks/shapes.py, the selectors at their configs' defaults, and called;
PyTorch counts their matrix products. Two conventions, in every table:

    in full       2 FLOPs per multiply-add, attention as n^2 products, as the kernels would do without a causal mask
    causal half   the same, but half of the language model's attention, which looks back only. Papers that print about
                  8.89 T for LLaVA-1.5-7B count so, with all layers of the encoder, the projector on what is kept, the
                  output layer on the last token, and about 70 tokens of text; that is our reading, they do not tell.

Half of either is the number of multiply-adds (MACs), which others print as "FLOPs".
"""

import argparse
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import autoselect
import recon_selector
from benchmarks import shapes
from common import blank_model

PRINTED = {576: 8.89, 64: 2.13}                        # TFLOPs in AutoSelect's tables, LLaVA-1.5-7B


@torch.no_grad()
def count(run) -> tuple[int, int]:
    """FLOPs of run(), a multiply-add counted twice, and those of them that attention's two products take."""
    # spelled out as products: of the fused kernels, some are not counted on the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops(), flops.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def prefill(model, n: int) -> tuple[int, int]:
    """Of n tokens in the language model and the last one in its output layer: FLOPs, and those of attention."""
    width, lm = model.config.text_config.hidden_size, model.model.language_model
    # with a cache: without one and a mask, transformers reads positions, which meta tensors have not
    body, attention = count(lambda: lm(inputs_embeds=empty(1, n, width), use_cache=True))
    return body + count(lambda: model.lm_head(empty(1, 1, width)))[0], attention


def clip_stages(model, views: int):
    """(FLOPs of the vision encoder on so many views, FLOPs of the projector on K units as a function of K)."""
    vision, core = model.config.vision_config, model.model
    pixels = empty(views, 3, vision.image_size, vision.image_size)
    return (count(lambda: core.vision_tower(pixels))[0],
            lambda k: count(lambda: core.multi_modal_projector(empty(1, k, vision.hidden_size)))[0])


def qwen_stages(model, rows: int, columns: int):
    """clip_stages() of a picture of rows x columns patches; the encoder without its merger, which is the projector."""
    visual, vision, n = model.model.visual, model.config.vision_config, rows * columns
    patches = empty(n, 3 * vision.temporal_patch_size * vision.patch_size ** 2)
    place = torch.empty(n, 2, dtype=torch.int64, device="meta")

    def merge(k):
        return count(lambda: visual.merger(empty(k * vision.spatial_merge_size ** 2, vision.hidden_size)))[0]
    whole = count(lambda: visual(patches, grid_thw=torch.tensor([[1, rows, columns]]), position_ids=place))[0]
    return whole - merge(n // vision.spatial_merge_size ** 2), merge


def selectors(width: int, dim: int, text: int) -> dict:
    """name -> FLOPs of a selection as a function of (views, units of a view, K). AutoSelect and StepPrune look at all
    units at once, the reconstruction selector at one view at a time. All at the size that their configs default to."""
    import stepprune  # here, for it stands on the same floor as this file

    cfg = stepprune.Config(width=width, text_width=dim, max_text=text)
    with torch.device("meta"):
        scorer = autoselect.AutoSelect(autoselect.Config(width=width))
        encoder = stepprune.Encoder(cfg)
        blocks = recon_selector.FeatureSelector(recon_selector.Config(width=width))
    pointer = stepprune.StepPrune(cfg)
    for net in (scorer, encoder, blocks, pointer):
        # train(): in evaluation mode PyTorch runs a block as one fused operation, which is not counted
        net.requires_grad_(False).train()

    def there(*shape, device="meta"):
        return torch.ones(shape, dtype=torch.bool, device=device)

    def stepped(n, k):                                 # the loop reads what it picks, which meta tensors have not
        loop = count(lambda: pointer.rollout(torch.randn(1, n + 1, width), there(1, n, device="cpu"), least=k, most=k))
        return loop[0] + count(lambda: encoder(empty(1, n + 1, width).float(), there(1, n + 1),
                                               empty(1, text, dim).float(), there(1, text), 1.))[0]
    return {
        "AutoSelect": lambda views, n, k: count(lambda: scorer.scores(empty(1, views * n, width).float()))[0],
        "StepPrune": lambda views, n, k: stepped(views * n, k),
        "reconstruction": lambda views, n, k: count(
            lambda: blocks(empty(views, n, width).float(), there(views, n)))[0]}


def table(model, stages, budgets: list[int], text: int, views: int = 1, printed=None) -> str:
    """TFLOPs at every number of visual tokens, the first of which is all of them, as Markdown."""
    encoder, project = stages
    nets = selectors(model.config.vision_config.hidden_size, model.config.text_config.hidden_size, text)
    head = ["visual tokens", "vision encoder", "projector", "language model", "of it attention",
            "total, in full", "total, causal half", *(["paper prints"] if printed else []),
            *(f"{name}, not in the totals" for name in nets)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for k in budgets:
        language, attention = prefill(model, k + text)
        parts = [encoder, project(k), language, attention]
        total = sum(parts[:3])
        cells = [f"{x / 1e12:.3f}" for x in (*parts, total, total - attention / 2)]
        cells += [str(printed.get(k, "-"))] if printed else []
        cells += ["-" if k == budgets[0] else f"{run(views, budgets[0] // views, k) / 1e12:.3f}"
                  for run in nets.values()]
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def backbones(text: int = 70, side: tuple[int, int] = (980, 1288)) -> str:
    """The tables of LLaVA-1.5-7B, LLaVA-NeXT with five views, and Qwen2.5-VL-7B at side (height, width) in pixels."""
    out = [f"TFLOPs of one prompt with {text} tokens of text up to its first new token, 2 per multiply-add, counted by "
           "`python -m benchmarks.flops`. In full: attention as n² products. Causal half: half of the language model's "
           "attention, which looks back only. Multiply-adds are half of either. The vision encoder is counted with all "
           "its layers, as stock code runs them; in the two LLaVAs this project leaves the last one out. Attention "
           "includes the rotary angles, under 0.1 % of it."]
    for name, note, budgets, views in (
            ("llava-1.5-7b", "576 units", [576, 192, 128, 64], 1),
            ("llava-next-vicuna-7b", "five views of 576 units, newlines not counted", [2880, 640, 320, 160], 5)):
        model = blank_model(shapes.config(name)).eval()
        shown = PRINTED if name == "llava-1.5-7b" else None
        out += [f"{name}: {note}.", table(model, clip_stages(model, views), budgets, text, views, printed=shown)]
    model = blank_model(shapes.config("qwen2.5-vl-7b")).eval()
    rows, columns = (x // model.config.vision_config.patch_size for x in side)
    units = rows * columns // 4
    out += [f"qwen2.5-vl-7b: a picture of {side[1]}x{side[0]} pixels, {rows * columns} patches in {units} units.",
            table(model, qwen_stages(model, rows, columns), [units, units // 3, units // 9, 64], text)]
    return "\n\n".join(out)


def main(args=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=int, default=70, help="tokens of text in the prompt [70, see above]")
    parser.add_argument("--out", type=Path, default=Path("results/speed/backbones.md"), help="the table's file")
    cfg = parser.parse_args(args)
    text = backbones(cfg.text)
    print(text)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    cfg.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
