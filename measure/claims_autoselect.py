"""AutoSelect's claims: "The Model Knows Which Tokens Matter", arXiv:2603.07135."""

from pathlib import Path
from tempfile import TemporaryDirectory

import baselines
from measure.classify import Classifier, Scenes, classify
from measure.evidence import Claim, above, ahead, within
from measure.experiments import FEWER, Setting
from measure.likeness import measure_likeness

PAPER = "AutoSelect"
BUDGETS = (32, 16, 8)                     # of 144 tokens; above, all but everything is right


def likeness(vlm, selector) -> dict:
    """Mean cosines among the 64 best and worst tokens of Figure 4."""
    with TemporaryDirectory() as folder:
        found = measure_likeness(vlm, selector, 64, Path(folder, "cosines.png"))
    return {f"cosine of the {group}, {name}": x for name, groups in found.items()
            for group, x in groups.items()}


def classified(vlm, selector) -> dict:
    """Points of top-1 accuracy by which it is ahead of HoloV's patches, Section 4.3."""
    if vlm.family != "llava":
        return {}
    ways = {"own": selector.ways([], [], None)[""], "holov": baselines.way("holov", vlm)}
    lines = classify(vlm, Classifier.from_pretrained("tiny/vit"), ways, Scenes(1000), (32, 16, 4))
    top = {(line["method"], line["K"]): 100 * line["top1"] for line in lines}
    return {f"classified, K = {k}": top["own", k] - top["holov", k] for k in (32, 16, 4)}


SETTINGS = {
    "autoselect": Setting("--method autoselect", {"llava": 5, "qwen2_5_vl": 3}, "gated threshold",
                          asked=("", " reindexed", " crowded"), measures=(likeness, classified)),
    "random_scorer": Setting("--method autoselect --scorer random", ways="gated", budgets=FEWER),
    **{name: Setting(f"--method autoselect {option}", budgets=FEWER) for name, option in {
        "scale_gate": "--gate scale", "global_denoiser": "--denoiser global",
        "captions": "--questions 0", "at_48": "--keep 48", "at_16": "--keep 16"}.items()},
}

CLAIMS = [
    Claim("Table 1", "Learned scores choose better than random tokens.",
          "no random row", ahead("autoselect", "random", BUDGETS), above()),
    Claim("Table 1, of VisionZip", "Learned scores choose better than [CLS] attention.",
          "64 tokens: 96.5 to VisionZip's 92.7",
          ahead("autoselect", "cls_attention", BUDGETS), above()),
    Claim("4.2", "The advantage grows as the budget falls.",
          "to VisionZip: 0.3, 1.0, 3.8 at 192, 128, 64",
          {"K = 8 less K = 32": lambda d: (d("autoselect", 8) - d("cls_attention", 8)
                                           - d("autoselect", 32) + d("cls_attention", 32))},
          above()),
    Claim("Table 3", "It holds on Qwen2.5-VL, at native resolution.",
          "a ninth of the tokens: 93.1 to HoloV's 87.0, FastV's 84.3",
          {f"K = {k}, to {other}": lambda d, k=k, other=other: d("autoselect", k) - d(other, k)
           for k in BUDGETS for other in ("holov", "fastv")}, above(), table="qwen2_5_vl"),
    Claim("Table 5", "The noise gate trains a better scorer than the scale gate.",
          "+1.8, +2.5, +2.3 at 192, 128, 64", ahead("autoselect", "scale_gate", BUDGETS), above()),
    Claim("Table 5", "A diagonal denoiser trains a better scorer than a global one.",
          "+2.4, +2.3, +2.8 at 192, 128, 64",
          ahead("autoselect", "global_denoiser", BUDGETS), above()),
    Claim("Figure 5", "With a random scorer the noise gate costs what removal costs.",
          "all but the same curves", ahead("random_scorer gated", "random_scorer", BUDGETS),
          within(2), note="of its own training, so that the denoiser knows what it meets"),
    Claim("Figure 4", "The best tokens are less alike than the worst ones.",
          "a picture", {"cosine of the worst less that of the best": lambda d: (
              d.measured("autoselect", "cosine of the worst, plain")
              - d.measured("autoselect", "cosine of the best, plain"))}, above(), unit="cosine",
          note="plain cosine, as printed"),
    Claim("Figure 4", "... also without what all tokens share.", "not looked at",
          {"cosine of the worst less that of the best": lambda d: (
              d.measured("autoselect", "cosine of the worst, centred")
              - d.measured("autoselect", "cosine of the best, centred"))}, above(), unit="cosine",
          note="the mean of all tokens taken off first"),
    Claim("4.3", "A classifier without a language model sees more in its patches than in HoloV's.",
          "ahead at 6 to 64 patches, by 10 points of top-1 at 3 %",
          {f"K = {k}": lambda d, k=k: d.measured("autoselect", f"classified, K = {k}")
           for k in (32, 16, 4)}, above(), unit="top-1",
          note="1,000 pictures; the interval is over seeds alone"),
    Claim("4.1", "Trained on captions alone, it serves questions as well.",
          "ImageNet's captions, ten benchmarks of questions",
          ahead("captions", "autoselect", BUDGETS), above(-2)),
    Claim("3.2", "Tokens keep their positions: numbered anew, they would be worth less.",
          "not measured", ahead("autoselect", "autoselect reindexed", BUDGETS), above()),
    Claim("ours", "Trained for one K, it works at another.", "a selector a budget",
          {"for 48, asked at 16": lambda d: d("at_48", 16) - d("at_16", 16),
           "for 16, asked at 48": lambda d: d("at_16", 48) - d("at_48", 48)}, within(1)),
    Claim("ours", "What it learned on usual scenes serves crowded ones with smaller things.",
          "ImageNet's captions serve ten benchmarks",
          ahead("autoselect", "cls_attention", BUDGETS), above(), table="llava_crowded"),
]
