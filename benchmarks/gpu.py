"""Memory and time of a real backbone's shape with random weights, on whatever device is there.

    python -m benchmarks.gpu llava-1.5-7b --device cuda
    python -m benchmarks.gpu llava-1.5-7b --shrink --device cpu       the same code, quickly: its figures mean nothing

train    peak memory and throughput of a training step of each method, beside the frozen model's forward and backward
         alone, which is the bound; in bfloat16 with checkpointing in the language model, the selector under autocast
first    time to the first new token: vision encoder, selection, and the rest, that is projector, prefill and output
         layer; beside the roofline of matrix product and bandwidth that this device reaches when it does nothing else
select   selection of 64 tokens as it is, compiled, and in CUDA graphs

Writes <out>.json and <out>.md, after every part, with hardware and command. Pictures are noise, texts repeat a word.
"""

import argparse
import copy
import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import autoselect
import recon_selector
from benchmarks import shapes
from benchmarks.flops import count
from benchmarks.speed import Clock
from common import FrozenVLM

BUDGETS, VARIANTS = (192, 128, 64), ("eager", "compiled", "CUDA graphs")


def markdown(lines: list[dict]) -> str:
    """A table of the first line's keys; floats with three digits."""
    out = ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
    for line in lines:
        cells = ("-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in line.values())
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def hardware(device: torch.device) -> dict:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    import transformers  # its version alone
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__}


def fabricate(vlm: FrozenVLM, rows: int, side: int, text: int, answer: int | None) -> dict:
    """A batch of noise, side x side pixels, with questions of about `text` tokens and answers of `answer`, or none."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    turn = " ".join(["red"] * text), None if answer is None else " ".join(["red"] * answer)
    return vlm.batch([Image.fromarray(noise)] * rows, [[turn]] * rows)


def build(method: str, vlm: FrozenVLM, text: int, most: int) -> torch.nn.Module:
    """The method's module at its config's own depth, as wide and with as many heads as the vision encoder.

    most: StepPrune's longest episode.
    """
    import stepprune  # here, for it stands on the same floor as this file

    vision = vlm.model.config.vision_config
    size = dict(width=vlm.width, heads=getattr(vision, "num_heads", None) or vision.num_attention_heads)
    if method == "autoselect":
        net = autoselect.AutoSelect(autoselect.Config(**size))
    elif method == "stepprune":
        net = stepprune.StepPrune(stepprune.Config(**size, text_width=vlm.dim, max_text=2 * text, max_steps=most,
                                                   budget="expected"))
    else:
        net = recon_selector.ReconSelector(recon_selector.Config(
            **size, patch=vlm.unit_side, grid=vlm.adapter.side or 24))
    return net.to(vlm.device)


def loss_of(method: str, vlm: FrozenVLM, net, batch) -> torch.Tensor:
    """The loss of one training step; method "frozen": without a selector, differentiated down to the units."""
    units = vlm.encode(batch)
    if method == "frozen":
        return vlm.loss(vlm.embed(batch, units, units.feats.clone().requires_grad_()))
    with torch.autocast(vlm.device.type, torch.bfloat16):
        if method == "recon":
            pixels, views = vlm.pixels(batch), units.views or [1] * len(units.grid)
            pixels, units = [x for p, n in zip(pixels, views) for x in p.chunk(n, 1)], units.apart()
            return net(*units.pad(), pixels, units.grid)[0]
        v, valid = units.pad()
        if method == "autoselect":
            gated, price = net(v, valid, min(64, int(valid.sum(1).min())))[0], 0.
        else:
            gated, _, _, expected = net(v, valid, *vlm.question(batch), tau=.2)
            price = (expected / valid.sum(1)).mean()
    return vlm.loss(vlm.embed(batch, units, units.flat(gated))) + .1 * price


def measure_step(method: str, vlm: FrozenVLM, cfg) -> dict:
    """One method's training steps: seconds of one and the peak of memory, None on the CPU, which does not tell."""
    rows = cfg.recon_batch if method == "recon" else cfg.batch
    batch, cuda = fabricate(vlm, rows, cfg.side, cfg.text, cfg.answer), vlm.device.type == "cuda"
    net = None if method == "frozen" else build(method, vlm, cfg.text, cfg.most).train()
    optim = net and torch.optim.AdamW(net.parameters(), lr=1e-5)
    clock = Clock(vlm.device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(vlm.device)
    for repeat in range(cfg.repeats + 1):
        with clock("warm-up" if not repeat else "step", 1):         # the first one makes the optimiser's state
            loss_of(method, vlm, net, batch).backward()
            if optim:
                optim.step()
                optim.zero_grad()
    trained = sum(p.numel() for p in net.parameters()) if net else 0
    need = shapes.memory(vlm.model.config, vlm.dtype, rows, batch["input_ids"].shape[1])
    guess = need["weights"] + 16 * trained + (method != "recon") * need["training"]
    return {"method": method, "trained, M": trained / 1e6, "batch": rows, "tokens a row": batch["input_ids"].shape[1],
            "peak, GiB": torch.cuda.max_memory_allocated(vlm.device) / 2**30 if cuda else None,
            "estimate, GiB": guess / 2**30, "s a step": clock.ms("step") / 1e3,
            "rows a second": 1e3 * rows / clock.ms("step")}


def measure_training(vlm: FrozenVLM, cfg, peak=None) -> list[dict]:
    """(a), (b): of every method; the selector's share is what its step takes longer than the frozen model's. The
    reconstruction selector never calls the language model: no bound, no share."""
    lines = []
    vlm.checkpointing(True)
    for method in ("frozen", "autoselect", "stepprune", "recon"):
        try:
            lines.append(measure_step(method, vlm, cfg))
        except torch.OutOfMemoryError as error:        # that, too, is an answer; the other methods are still to come
            lines.append({key: None for key in lines[0]} | {"method": f"{method}: {str(error).splitlines()[0]}"}
                         if lines else {"method": f"{method}: {str(error).splitlines()[0]}"})
    vlm.checkpointing(False)
    bound = lines[0].get("s a step")
    for line in lines:
        known = bound and line.get("s a step") and line["method"] in ("autoselect", "stepprune")
        line["selector's share, %"] = 100 * (1 - bound / line["s a step"]) if known else None
    return lines


def roofline(device: torch.device) -> dict:
    """What the device reaches at best: FLOP/s of a bfloat16 product of square matrices, and byte/s of a copy."""
    side, clock = 8192 if device.type == "cuda" else 1024, Clock(device)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    big = torch.empty(side ** 2 * (8 if device.type == "cuda" else 32), device=device, dtype=torch.bfloat16)
    for repeat in range(11):
        for name, run in (("matmul", lambda: a @ a), ("copy", big.clone)):
            with clock("warm-up" if not repeat else name, 1):
                run()
    return {"flops": 2e3 * side ** 3 / clock.ms("matmul"), "bytes": 2e3 * big.nbytes / clock.ms("copy")}


@torch.no_grad()
def measure_first_token(vlm: FrozenVLM, cfg, peak: dict) -> list[dict]:
    """(c): milliseconds of a batch. The bound of the rest: its FLOPs, attention in full, at the matrix product's speed,
    or one reading of the language model's weights, whichever takes longer."""
    lines, weights = [], sum(p.nbytes for part in (vlm.lm.layers, vlm.model.lm_head) for p in part.parameters())
    for rows in cfg.batches:
        batch, clock = fabricate(vlm, rows, cfg.side, cfg.text, None), Clock(vlm.device)
        nets = {name: build(name, vlm, cfg.text, max(BUDGETS)).eval().to(vlm.dtype)
                for name in ("autoselect", "stepprune")}
        units = vlm.encode(batch)
        (v, valid), asked = units.pad(), vlm.question(batch)
        every = [here.nonzero().flatten() for here in valid]
        for k in [None, *BUDGETS]:
            if k and k >= min(map(len, every)):
                continue
            selects = {"autoselect": lambda: nets["autoselect"].select(v, valid, k),                      # noqa: B023
                       "stepprune": lambda: nets["stepprune"].select(v, valid, *asked, least=k, most=k)}  # noqa: B023
            keep = selects["autoselect"]() if k else every

            def rest():
                return vlm.generate(vlm.prune(batch, units, keep), max_new_tokens=1)           # noqa: B023
            stages = {"vision": lambda: vlm.encode(batch), **(selects if k else {}), "rest": rest}   # noqa: B023
            for repeat in range(cfg.repeats + 1):
                for name, run in stages.items():
                    with clock("warm-up" if not repeat else f"{name} {k}", 1):
                        run()
            ms = {name: clock.ms(f"{name} {k}") for name in stages}
            flops = {name: count(stages[name])[0] for name in ("vision", "rest")}
            bound = 1e3 * max(flops["rest"] / peak["flops"], weights / peak["bytes"])
            lines.append({"batch": rows, "visual tokens": k or max(map(len, every)), "vision": ms["vision"],
                          "its bound": 1e3 * flops["vision"] / peak["flops"], "AutoSelect": ms.get("autoselect"),
                          "StepPrune": ms.get("stepprune"), "rest": ms["rest"], "its bound ": bound,
                          "first token, AutoSelect": ms["vision"] + ms.get("autoselect", 0.) + ms["rest"],
                          "TFLOP/s of the rest": flops["rest"] / ms["rest"] / 1e9})
    return lines


@torch.no_grad()
def measure_selection(vlm: FrozenVLM, cfg, peak=None) -> list[dict]:
    """(d): milliseconds to select 64 tokens of a batch. Compiled are the scorer, StepPrune's encoder and decoder, and
    the reconstruction selector's blocks. Graphs have fixed shapes: of StepPrune only the encoder is put into one."""
    lines = []
    for rows in cfg.batches:
        batch = fabricate(vlm, rows, cfg.side, cfg.text, None)
        (v, valid), asked = vlm.encode(batch).pad(), vlm.question(batch)
        k = min(64, int(valid.sum(1).min()))
        for method in ("autoselect", "stepprune", "recon"):
            base, line = build(method, vlm, cfg.text, k).eval(), {"method": method, "batch": rows}
            for variant in VARIANTS:
                net, clock, line[variant] = copy.deepcopy(base).to(vlm.dtype), Clock(vlm.device), None
                if variant not in cfg.variants:
                    continue
                how = {"mode": "reduce-overhead"} if variant == "CUDA graphs" else {}
                inner = {"autoselect": "scorer", "stepprune": "encoder", "recon": "selector"}[method]
                if variant != "eager":
                    getattr(net, inner).compile(**how)
                    if method == "stepprune" and not how:
                        net.decoder.compile(dynamic=True)
                more = (*asked,) if method == "stepprune" else ()
                wanted = dict(least=k, most=k) if method == "stepprune" else dict(keep=k)
                try:
                    for repeat in range(cfg.repeats + 3):          # compiling takes the first calls
                        with clock("warm-up" if repeat < 3 else "select", 1):
                            net.select(v, valid, *more, **wanted)
                    line[variant] = clock.ms("select")
                except Exception as error:             # what a device cannot compile is a result, not a failure
                    line[variant] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            lines.append(line)
    return lines


def parse(args=None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(shapes.SHAPES), help="the backbone")
    parser.add_argument("--shrink", action="store_true", help="3 narrow layers: to see that all parts run")
    parser.add_argument("--parts", nargs="+", default=["train", "first", "select"],
                        choices=["train", "first", "select"])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--attn", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--batch", type=int, default=8, help="rows of a training step with the language model [ours]")
    parser.add_argument("--recon-batch", type=int, default=32, help="pictures of the third method's step [paper]")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows where answers are timed")
    parser.add_argument("--side", type=int, default=336, help="pixels of the square pictures")
    parser.add_argument("--text", type=int, default=60, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=60, help="tokens of an answer in training")
    parser.add_argument("--most", type=int, default=192, help="StepPrune's longest episode in training")
    parser.add_argument("--repeats", type=int, default=10, help="calls that are timed, after one that is not")
    parser.add_argument("--variants", nargs="+", default=VARIANTS if cuda else VARIANTS[:1], choices=VARIANTS)
    parser.add_argument("--out", type=Path, default=None, help="files without their ending [results/gpu/<name>]")
    return parser.parse_args(args)


def main(args=None) -> dict:
    cfg, given = parse(args), sys.argv[1:] if args is None else args
    label = cfg.name + "-shrunk" * cfg.shrink
    out = cfg.out or Path("results/gpu") / label
    with tempfile.TemporaryDirectory() as folder:
        vlm = FrozenVLM.from_pretrained(shapes.write(cfg.name, folder, cfg.shrink), getattr(torch, cfg.dtype),
                                        cfg.device, cfg.attn, random_weights=True)
    found = {"command": f"python -m benchmarks.gpu {' '.join(map(str, given))}", "weights": "random",
             "model": label, "dtype": cfg.dtype, "attention": cfg.attn, **hardware(vlm.device)}
    peak = roofline(vlm.device)
    found |= {"matrix product, TFLOP/s": round(peak["flops"] / 1e12, 3), "copy, GB/s": round(peak["bytes"] / 1e9, 1)}
    parts = {"train": (measure_training, "Training"), "first": (measure_first_token, "Time to the first token, ms"),
             "select": (measure_selection, "Selection of 64 tokens, ms")}
    text = "\n".join(f"{key}: {value}  " for key, value in found.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in cfg.parts:
        run, title = parts[part]
        found[part] = run(vlm, cfg, peak)
        text += f"\n\n{title}\n\n{markdown(found[part])}"
        out.with_name(out.name + ".json").write_text(json.dumps(found, indent=1) + "\n")
        out.with_name(out.name + ".md").write_text(text + "\n")
    print(text)
    return found


if __name__ == "__main__":
    main()
