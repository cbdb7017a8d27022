"""The reconstruction selector's claims: "Adaptive Vision Token Selection for Multi-Modal
Inference"."""

from benchmarks import tiny_world
from data.dialogues import SIZES
from measure.evidence import Claim, above, ahead, below
from measure.experiments import FEWER, Setting
from measure.question_reading import measure_reading, question_pairs
from measure.rebuild import DISTORTIONS, stability

PAPER = "Reconstruction selector"
SHORT = "--method recon --epochs 1"       # ablations, and what they are compared with


def stable(vlm, selector) -> dict:
    """How much further the mask of 48 tokens lies from itself than the picture moved, B.5: overlap
    of a mask that stays where it is less that of the new one, in percent."""
    images = [row.image for row in tiny_world.load_rows(700, "test", SIZES[vlm.family])[:100]]
    found = {}
    for how in DISTORTIONS:
        (after,), (still,) = stability(vlm, [selector], images, [48], how)[48]
        found[f"overlap, {how}"] = 100 * after
        found[f"overlap of a still mask, {how}"] = 100 * still
    return found


def kept(vlm, selector) -> dict:
    """Share of the tokens that its own mask keeps, in percent."""
    images = [row.image for row in tiny_world.load_rows(700, "test", SIZES[vlm.family])[:100]]
    units = vlm.encode(vlm.pictures(images))
    masks = selector.select(units, None, None)
    return {"kept": 100 * sum(map(len, masks)) / len(units.feats)}


def reads(vlm, selector) -> dict:
    """Of 16 tokens, percent that are kept for both of two questions about a picture, B.4."""
    same, own, other = measure_reading(vlm, selector, question_pairs(60, vlm.family), [16])[16]
    return {"kept for both": 100 * same, "evidence, own less other": 100 * (own - other)}


SETTINGS = {
    "recon": Setting("--method recon", {"llava": 5, "qwen2_5_vl": 3},
                     asked=("", " reindexed", " crowded"), measures=(stable, kept)),
    "epochs_1": Setting(SHORT, measures=(kept,), budgets=FEWER),
    "softmax": Setting(f"{SHORT} --estimator softmax", measures=(kept,), budgets=FEWER),
    "softmax_plain": Setting(f"{SHORT} --estimator softmax --regulariser plain",
                             measures=(kept,), budgets=FEWER),
    "plain": Setting(f"{SHORT} --regulariser plain", measures=(kept,), budgets=FEWER),
    "layers_1": Setting(f"{SHORT} --layers 1", budgets=FEWER),
    "layers_8": Setting(f"{SHORT} --layers 8", budgets=FEWER),
    "conditional": Setting(f"{SHORT} --select_after_layer 2", measures=(reads,)),
}

CLAIMS = [
    Claim("Abstract", "Half of the tokens cost nothing.", "99 to 100 % of the score",
          {"K = 72, to all tokens": lambda d: d("recon", 72) - 100}, above(-1)),
    Claim("Abstract", "... on Qwen2.5-VL too.", "InternVL3: a figure",
          {"K = 72, to all tokens": lambda d: d("recon", 72) - 100}, above(-1),
          table="qwen2_5_vl"),
    Claim("4.5", "It beats random tokens at all shares.", "a figure",
          ahead("recon", "random", (72, 48, 32, 16, 8)), above()),
    Claim("Table 1", "It is strongest on text: of signs it keeps more than others do.",
          "DocVQA, ChartQA, TextVQA: first at 11 to 50 %",
          {f"signs at K = {k}, to {other}":
           lambda d, k=k, other=other: d.family("recon", "text", k) - d.family(other, "text", k)
           for k in (48, 32, 16) for other in ("divprune", "visionzip")}, above(),
          unit="accuracy"),
    Claim("B.1", "Gumbel noise trains a better selector than a softmax without it.", "a figure",
          ahead("epochs_1", "softmax", (48, 32, 16)), above()),
    Claim("B.2", "Without the dead zone it collapses: nothing is kept.", "a figure",
          {"percent kept by the mask": lambda d: d.measured("plain", "kept")}, below(5),
          unit="percent", note="K is at least 1"),
    Claim("B.2", "... with it, it does not.", "a figure",
          {"percent kept by the mask": lambda d: d.measured("epochs_1", "kept")}, above(10),
          unit="percent"),
    Claim("B.2", "... and orders tokens better, where K is given.", "not looked at",
          ahead("epochs_1", "plain", (48, 32, 16)), above(),
          note="asked after the runs were seen; in its zone nothing presses on a token's score"),
    Claim("B.1", "A softmax without noise does not collapse without it either.", "not observed",
          {"percent kept by the mask": lambda d: d.measured("softmax_plain", "kept")}, above(10),
          unit="percent"),
    Claim("Figure 4", "Four layers are better than one.", "a figure",
          ahead("epochs_1", "layers_1", (48, 32, 16)), above()),
    Claim("Figure 4", "... and than eight.", "a figure",
          ahead("epochs_1", "layers_8", (48, 32, 16)), above()),
    Claim("Figure 5", "Longer training is better where few tokens are left.", "a figure",
          ahead("recon", "epochs_1", (48, 32, 16)), above(), note="three epochs to one"),
    Claim("B.4", "Selected inside the language model, half of the tokens cost nothing.",
          "82.3 to 83.1 on DocVQA and the like",
          {"K = 72, to all tokens": lambda d: d("conditional", 72) - d("conditional asked twice",
                                                                       "all")}, above(-1)),
    Claim("B.4", "... and what is kept depends on the question.", "pictures",
          {"evidence of 16 tokens, own question less another": lambda d: d.measured(
              "conditional", "evidence, own less other")}, above(5), unit="percent"),
    Claim("B.5", "The mask stands still under crops of up to 5 % and brightness of 0.8 to 1.2.",
          "a figure", {how: lambda d, how=how: (
              d.measured("recon", f"overlap, {how}")
              - d.measured("recon", f"overlap of a still mask, {how}"))
              for how in ("crop", "brightness")}, above(-5), unit="percent of overlap",
          note="48 of 144 tokens; to a mask that stays where it is while the picture moves"),
    Claim("A.2", "Most answers that turn wrong do so although what they need was kept.",
          "read off logs", {f"percent of them, K = {k}": lambda d, k=k: d.seen_though_lost(
              "recon", k) - 50 for k in (72, 48, 32)}, above(), unit="points above half"),
    Claim("3", "Tokens keep their positions: numbered anew, they would be worth less.",
          "not measured", ahead("recon", "recon reindexed", (72, 32)), above()),
    Claim("4.5", "Trained on few sets, it serves others: crowded scenes, to random tokens.",
          "COCO, DocVQA and ChartQA serve seven benchmarks",
          ahead("recon", "random", (72, 32)), above(), table="llava_crowded"),
]
