"""FLOPs of the real backbones, stage by stage: no weights, no network, some minutes.

    python -m measure.flops

The models are built on the meta device from measure/shapes.py and called; PyTorch counts their
matrix products. The methods select with the options that they have on a large encoder. Two
conventions, in every table:

    in full       2 FLOPs per multiply-add, attention as n^2 products, as the kernels would do
                  without a causal mask
    causal half   the same, but half of the language model's attention, which looks back only.
                  Papers that print about 8.89 T for LLaVA-1.5-7B count so, with all layers of the
                  encoder, the projector on what is kept, the output layer on the last token, and
                  about 70 tokens of text; that is our reading, they do not tell.

Half of either is the number of multiply-adds (MACs), which others print as "FLOPs".
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import runs
from common import Units
from measure import shapes

# visual tokens -> TFLOPs that a paper's tables print for LLaVA-1.5-7B, arXiv:2603.07135
PRINTED = {576: 8.89, 64: 2.13}
# the same for LLaVA-NeXT, Vicuna-7B, of the reconstruction paper's Table 1
PRINTED_NEXT = {2880: 21, 1440: 10, 1152: 8, 640: 4, 320: 2, 160: 1}

# ------------------------------------------------------------------ the methods


def build_methods(vlm, **options) -> dict[str, torch.nn.Module]:
    """{class name: selector with random weights} of all methods beside the project's root, sized
    for the VLM, in training mode on the CPU. options: of their Configs, where they have them."""
    selectors = {}
    for name in runs.method_names():
        module = runs.load_method(name)
        known = {field.name for field in fields(module.Config)}
        chosen = runs.preset(module, vlm.width) | options
        config = module.Config.of(vlm, **{key: chosen[key] for key in chosen if key in known})
        selectors[module.Method.__name__] = module.Method(config).train()
    return selectors


def method_options(texts: list[str]) -> dict:
    """NAME=VALUE as keywords of the methods' Configs. Raises ValueError for one that no method has,
    or whose value its method does not take."""
    chosen = {}
    for text in texts:
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


# ------------------------------------------------------------------ counting


@torch.no_grad()
def count(run: Callable) -> tuple[int, int]:
    """FLOPs of run(), a multiply-add counted twice, and those of attention's two products."""
    # spelled out as products: of the fused kernels, some are not counted on the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        run()
    attention = flops.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    return flops.get_total_flops(), attention


class NoProducts(TorchDispatchMode):
    """Matrix products give zeros at once, and a softmax what it is given, whose largest stays where
    it was: for programs that are counted, not used. Unlike on the meta device, they may look at
    their tensors."""
    aten = torch.ops.aten
    factors = {aten.mm.default: 0, aten.bmm.default: 0,
               aten.addmm.default: 1, aten.baddbmm.default: 1}        # where the two of them begin
    softmax = (aten._softmax.default, aten._safe_softmax.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.factors:
            a, b = args[self.factors[function]:][:2]
            return a.new_zeros(*a.shape[:-1], b.shape[-1])
        if function in self.softmax:
            return args[0]
        return function(*args, **(kwargs or {}))


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def selection(selector, views: int, n: int, keep: int, dim: int, text: int) -> int:
    """FLOPs of selecting `keep` of the units of one picture in so many views of n units each.

    dim: width of the language model, whose word embeddings a question of `text` tokens has.
    """
    patches = getattr(selector.cfg, "unlike_patches", 0)
    feats = torch.zeros(views * n, *[patches] * (patches > 0), selector.cfg.width)
    image_of = torch.zeros(views * n, dtype=torch.int64)
    units = Units(feats, image_of, [(views, n)], [views] if views > 1 else None)
    question = torch.zeros(1, text, dim), torch.ones(1, text, dtype=torch.bool)
    selector.requires_grad_(False)                    # the counter follows gradients, and trips
    fast = torch.backends.mha.get_fastpath_enabled()
    # else PyTorch may run a Transformer block as one fused operation, which is not counted
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with NoProducts():
            return count(lambda: selector.select(units, question, keep))[0]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def prefill(model, n: int) -> tuple[int, int]:
    """Of n tokens in the language model and the last one in its output layer: FLOPs, and those of
    attention."""
    width = model.config.text_config.hidden_size
    lm = model.model.language_model
    # with a cache: without one and a mask, transformers reads positions, which meta tensors lack
    body, attention = count(lambda: lm(inputs_embeds=empty(1, n, width), use_cache=True))
    output, _ = count(lambda: model.lm_head(empty(1, 1, width)))
    return body + output, attention


def clip_stages(model, views: int) -> tuple[int, Callable]:
    """(FLOPs of the vision encoder on so many views, those of the projector as a function of K)."""
    vision = model.config.vision_config
    pixels = empty(views, 3, vision.image_size, vision.image_size)

    def project(k: int) -> int:
        feats = empty(1, k, vision.hidden_size)
        return count(lambda: model.model.multi_modal_projector(feats))[0]
    return count(lambda: model.model.vision_tower(pixels))[0], project


def qwen_stages(model, rows: int, columns: int) -> tuple[int, Callable]:
    """clip_stages() of a picture of rows x columns patches; the encoder without its mergers, of
    which Qwen3-VL has several: they are the projector."""
    visual, vision = model.model.visual, model.config.vision_config
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", [])]
    n = rows * columns
    patches = empty(n, 3 * vision.temporal_patch_size * vision.patch_size ** 2)
    grid = torch.tensor([[1, rows, columns]])
    place = dict(position_ids=torch.empty(n, 2, dtype=torch.int64, device="meta"))
    if hasattr(visual, "pos_embed"):                   # learned, four of them mixed for each patch
        place |= dict(interp_indices=torch.empty(n, 4, dtype=torch.int64, device="meta"),
                      interp_weights=empty(n, 4))
    per_unit = vision.spatial_merge_size ** 2

    def merge(k: int) -> int:
        x = empty(k * per_unit, vision.hidden_size)
        return count(lambda: [merger(x) for merger in mergers])[0]
    whole, _ = count(lambda: visual(patches, grid_thw=grid, **place))
    return whole - merge(n // per_unit), merge


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


def paper_table(selectors: dict[str, torch.nn.Module], vlm, text: int = 20) -> str:
    """Table 1's TFLOPs beside three counts of ours, as Markdown. The last is one for each selector,
    whose selection from five crops it includes.

    vlm: LLaVA-NeXT on the meta device
    """
    head = ["visual tokens", "paper prints", "its formula, 2 n d m", "... with the gate, 3 n d m",
            *(f"counted, 2 per multiply-add, {name} included" for name in selectors)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    crops, n = 5, 576
    whole = crops * n
    for k, printed in PRINTED_NEXT.items():
        sampled = whole if k < whole else 0
        cells = [paper_flops(k, 2, sampled), paper_flops(k, 3, sampled)]
        language, _ = count(lambda k=k: vlm.lm(inputs_embeds=empty(1, k, vlm.dim), use_cache=True))
        for selector in selectors.values():
            own = selection(selector, crops, n, k, vlm.dim, text) if k < whole else 0
            cells.append(language + own)
        lines.append("| " + " | ".join([str(k), str(printed), *(f"{x / 1e12:.1f}" for x in cells)])
                     + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------ tables


def table(vlm, stages: tuple[int, Callable], budgets: list[int], text: int, views: int = 1,
          printed: dict | None = None) -> str:
    """TFLOPs at every number of visual tokens, the first of which is all of them, as Markdown.

    vlm: on the meta device | stages: of clip_stages() or qwen_stages()
    printed: {visual tokens: TFLOPs} of a paper
    """
    encoder, project = stages
    selectors = build_methods(vlm)
    head = ["visual tokens", "vision encoder", "projector", "language model", "of it attention",
            "total, in full", "total, causal half", *(["paper prints"] if printed else []),
            *(f"{name}, not in the totals" for name in selectors)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for k in budgets:
        language, attention = prefill(vlm.model, k + text)
        projector = project(k)
        total = encoder + projector + language
        parts = [encoder, projector, language, attention, total, total - attention / 2]
        cells = [str(k), *(f"{part / 1e12:.3f}" for part in parts)]
        if printed:
            cells.append(str(printed.get(k, "-")))
        for selector in selectors.values():
            if k == budgets[0]:
                cells.append("-")
                continue
            cost = selection(selector, views, budgets[0] // views, k, vlm.dim, text)
            cells.append(f"{cost / 1e12:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def backbones(text: int = 70, side: tuple[int, int] = (980, 1288)) -> str:
    """The tables of LLaVA-1.5-7B, LLaVA-NeXT with five views, and Qwen2.5-VL-7B and Qwen3-VL-8B at
    side (height, width) in pixels, rounded to whole units."""
    note = (f"TFLOPs of one prompt with {text} tokens of text up to its first new token, 2 per "
            "multiply-add, counted by `python -m measure.flops`. In full: attention as n² "
            "products. Causal half: half of the language model's attention, which looks back "
            "only. Multiply-adds are half of either. The vision encoder is counted with all its "
            "layers, as stock code runs them; in the two LLaVAs this project leaves the last one "
            "out. Attention includes the rotary angles, under 0.1 % of it.")
    vlm = shapes.load("llava-1.5-7b", device="meta")
    tables = [note, "llava-1.5-7b: 576 units.",
              table(vlm, clip_stages(vlm.model, 1), [576, 192, 128, 64], text, printed=PRINTED)]
    vlm = shapes.load("llava-next-vicuna-7b", device="meta")
    tables += ["llava-next-vicuna-7b: five views of 576 units, newlines not counted.",
               table(vlm, clip_stages(vlm.model, 5), [2880, 640, 320, 160], text, views=5),
               "The same, what the reconstruction paper prints in its Table 1 beside its formula "
               "and a count of the language model and the selection:",
               paper_table(build_methods(vlm), vlm)]
    for name in ("qwen2.5-vl-7b", "qwen3-vl-8b"):
        vlm = shapes.load(name, device="meta")
        rows, columns = (2 * round(pixels / vlm.unit_side) for pixels in side)
        units = rows * columns // 4
        later = len(getattr(vlm.adapter, "early", []))
        tables += [f"{name}: a picture of {columns * vlm.adapter.patch}x{rows * vlm.adapter.patch} "
                   f"pixels, {rows * columns} patches in {units} units."
                   + f" Of the projector, {later} of {later + 1} parts are deepstack's: they make "
                   "what is added in the language model; the additions are no products."
                   * (later > 0),
                   table(vlm, qwen_stages(vlm.model, rows, columns),
                         [units, units // 3, units // 9, 64], text)]
    return "\n\n".join(tables)


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--text", type=int, default=70, help="tokens of text in the prompt")
    parser.add_argument("--out", type=Path, default=Path("results/speed/backbones.md"),
                        help="file of the tables")
    options = parser.parse_args(args)
    runs.check_options(options, text=0)
    runs.writable_file(options.out)
    text = backbones(options.text)
    print(text)
    runs.write_text(options.out, text + "\n")


if __name__ == "__main__":
    runs.command(main)
