"""A small ViT that names the colour of a scene's largest shape: `python tiny/classifier.py` makes
tiny/vit.

It judges a selection without a language model (measure/classify.py). Shown are what it learns from:
a random share of each picture's patches, as a masked autoencoder sees them, so that it knows no
picture but in part; and, for a head that is thrown away, the kind and the colour that stand in each
patch, without which it takes many times as long.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs  # noqa: E402  (run as a script, the project's root is not on the path yet)
from tiny import scenes  # noqa: E402

LABELS = list(scenes.COLOURS)
FIRST = 3_000_000_000  # its training scenes: those of no split, and of no selector
LEAD = 3  # pixels by which the largest shape is larger than the next
SIDE, N, BATCH, WARM = 144, 144, 64, 50  # pixels of a side; patches, 12 x 12


def label(scene: scenes.Scene) -> int | None:
    """Index into LABELS of the largest shape's colour; None where two are about as large."""
    *others, largest = sorted(scene.shapes, key=lambda t: t.box[2] - t.box[0])
    side, next_side = (t.box[2] - t.box[0] for t in (largest, others[-1] if others else largest))
    return None if others and side - next_side < LEAD else LABELS.index(largest.colour)


def labelled(first: int, n: int, size: tuple[int, int] = (144, 144)) -> list[scenes.Scene]:
    """The first n scenes from seed `first` on that have a label."""
    found = []
    while len(found) < n:
        scene = scenes.make_scene(first, size)
        first += 1
        if label(scene) is not None:
            found.append(scene)
    return found


def build() -> ViTForImageClassification:
    """Random weights, 0.36 M parameters: 4 layers of 96, patches of 12 pixels, as the tiny
    LLaVA's."""
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=192,
            image_size=144,
            patch_size=scenes.CELL,
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
    )


def train(model, steps: int, pool: int, lr: float = 3e-3) -> None:
    """Muon for the matrices, AdamW for the rest, cosine with warm-up, mirrored pictures in half
    of the batches."""
    from tiny.pretrain import (
        patch_labels,
    )  # here, for whoever wants the labels alone needs none of it

    picked = labelled(FIRST, pool)
    x = torch.from_numpy(
        np.stack([np.asarray(scenes.render(s)) for s in tqdm(picked, "pool")])
    ).permute(0, 3, 1, 2)
    y = torch.tensor([label(s) for s in picked])
    words = torch.from_numpy(np.stack([patch_labels(s)[0][:2] for s in picked])).view(
        pool, 2, 12, 12
    )
    head, shown = nn.Linear(model.config.hidden_size, 10 + 9), {}

    def take_out(module, args, tokens):
        return torch.cat(
            [tokens[:, :1], tokens[:, 1:].gather(1, shown["keep"][..., None].expand(-1, -1, 96))], 1
        )

    hooks = [
        model.vit.embeddings.register_forward_hook(take_out),
        model.vit.layernorm.register_forward_hook(
            lambda module, args, out: shown.update(states=out)
        ),
    ]
    params = {
        n: p
        for n, p in [*model.named_parameters(), *head.named_parameters(prefix="classifier.dense")]
    }
    matrix = [p for n, p in params.items() if p.ndim == 2 and "classifier" not in n]
    rest = [p for n, p in params.items() if p.ndim != 2 or "classifier" in n]
    optims = [
        torch.optim.Muon(matrix, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0),
    ]
    bar = tqdm(range(steps), "train", mininterval=5)
    for step in bar:
        rng = np.random.default_rng([step, 17])
        index, mirrored = (
            torch.from_numpy(rng.choice(pool, BATCH, replace=False)),
            rng.random() < 0.5,
        )
        keep = torch.from_numpy(
            rng.random((BATCH, N)).argsort(1)[:, : int(N * rng.uniform(0.1, 1))]
        )
        pixels, dense = x[index].float() / 127.5 - 1, words[index]
        if mirrored:
            pixels, dense = pixels.flip(3), dense.flip(3)
        shown["keep"] = keep
        loss = F.cross_entropy(model(pixel_values=pixels).logits, y[index])
        named = dense.flatten(2).gather(2, keep[:, None].expand(-1, 2, -1))
        for guess, gold in zip(head(shown["states"][:, 1:]).split([10, 9], -1), named.unbind(1)):
            loss = loss + F.cross_entropy(guess.flatten(0, 1), gold.flatten())
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = lr * (
                    min(1.0, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                    + 0.01
                )
            optim.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        for optim in optims:
            optim.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    for hook in hooks:
        hook.remove()


def main(words: list[str]) -> None:
    parser = runs.Parser([], description=__doc__)
    parser.add_argument("--steps", type=int, default=700, help=f"of {BATCH} pictures")
    parser.add_argument("--pool", type=int, default=12000, help="training scenes, rendered once")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("vit"),
                        help="where it goes")
    args = parser.parse_args(words)
    runs.check_options(args, steps=1, pool=BATCH)
    runs.writable(args.out)
    model = build()
    train(model, args.steps, args.pool)
    model.bfloat16().save_pretrained(args.out)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(args.out)
    print(
        f"saved to {args.out}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    )


if __name__ == "__main__":
    runs.command(main)
