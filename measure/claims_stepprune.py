"""StepPrune's claims: "Stepwise Token Selection for Efficient Multimodal Large Language Models",
arXiv:2606.16067."""

from measure.evidence import Claim, above, ahead, within
from measure.experiments import FEWER, Setting

PAPER = "StepPrune"
BUDGETS = (32, 16, 8)                     # means, of 144 tokens
HALF = "--method stepprune --steps 300"   # ablations, and what they are compared with
# what the paper says where ours differs; its lambda is not at hand
OWN_RULES = {"paper_hops": "--hops -1", "paper_k": "--k_rule batch_mean",
             "paper_stop": "--stop learned", "paper_start": "--align False",
             "paper_lambda": "--price constant --length_weight 1"}

SETTINGS = {
    "stepprune": Setting("--method stepprune", {"llava": 5, "qwen2_5_vl": 3}, "exactly",
                         asked=("", " reindexed", " crowded")),
    **{name: Setting(" ".join([HALF, *options]), budgets=FEWER) for name, options in {
        "half": (),
        **{name: (f"--aggregation {name}",)
           for name in ("last", "uniform", "alive", "discounted")},
        "causal": ("--causal True",),
        **{name: (options,) for name, options in OWN_RULES.items()},
        "paper_rules": OWN_RULES.values(),
        "lambda_0.01": ("--length_weight_end 0.01",),
        "lambda_1": ("--length_weight_end 1",),
        "told": ("--price told", "--length_weight_end 0.01", "--max_steps 96"),
    }.items()},
}
# ways to reach a mean K, whose histograms stand side by side in operating_points.png
OPERATING_POINTS = {"half": "bias on stop", "lambda_0.01": "bias, trained at a low price",
                    "lambda_1": "bias, trained at a high price", "told": "told its price"}


def to_fixed(other: str) -> dict:
    """Points of retention at the mean that it really keeps, less another's at K."""
    return {f"mean of {k}": lambda d, k=k: d("stepprune", k) - d(other, k) for k in BUDGETS}


CLAIMS = [
    Claim("4.2", "At the same K, picks that see the question and one another beat independent "
          "scores.", "not measured apart", ahead("stepprune exactly", "autoselect", BUDGETS),
          above(), note="to AutoSelect, which reads no question"),
    Claim("4.2", "... also independent scores that read the question.", "not measured",
          ahead("stepprune exactly", "cdpruner_words", BUDGETS), above(),
          note="to CDPruner by words, which is not trained"),
    Claim("Table 1", "A learned stop beats the same K for each question.",
          "94.6 to VisionZip's 92.0 at a mean of 64", to_fixed("stepprune exactly"), above()),
    Claim("Table 1", "... as an adaptive K alone, without a loop, does not.", "not measured",
          to_fixed("autoselect threshold"), above(),
          note="to AutoSelect's scores under one threshold for all pictures, K on average"),
    Claim("Table 1", "It is ahead of methods of a fixed budget.",
          "to VisionZip +0.1, +0.3, +2.6 at 192, 128, 64", to_fixed("visionzip"), above()),
    Claim("Table 2", "... on Qwen2.5-VL too.", "91.9 to HoloV's 87.0 at a ninth",
          to_fixed("holov"), above(), table="qwen2_5_vl"),
    Claim("Figure 4", "K follows how much there is to see.", "a picture",
          {f"correlation with the number of things, mean of {k}":
           lambda d, k=k: d.follows_things("stepprune", k) for k in (32, 16, 8)}, above(.1),
          unit="correlation"),
    Claim("Figure 4", "Accuracy is flat over K: where few tokens are kept it is no worse.",
          "six buckets within a narrow band",
          {f"third with the fewest less that with the most, mean of {k}":
           lambda d, k=k: d.low_to_high("stepprune", k) for k in (32, 16, 8)}, within(5),
          unit="accuracy"),
    Claim("Table 4a", "An encoder that sees both ways beats a causal one.", "+2.2",
          ahead("half", "causal", BUDGETS), above()),
    Claim("Table 4b", "The last step's pointer alone teaches less.", "+4.4",
          ahead("half", "last", BUDGETS), above()),
    Claim("Table 4b", "Without alive and discount it learns less.", "+10.8",
          ahead("half", "uniform", BUDGETS), above()),
    Claim("Table 4b", "Without the discount it learns less.", "+5.2",
          ahead("half", "alive", BUDGETS), above()),
    Claim("4.6", "Without alive, the discount left, it learns less.", "not printed apart",
          ahead("half", "discounted", BUDGETS), above(),
          note="what dropping the alive weight says to the letter"),
    Claim("3", "All of the paper's own rules together do as well as ours.", "they are its method",
          ahead("paper_rules", "half", BUDGETS), above(-1),
          note="gradients through all picks, K of the batch's mean, a constant stop state, W_text "
               "from chance, lambda constant at 1 (its value is not at hand)"),
    *(Claim("3", f"One of them alone does as well as ours: {what}.", "it is its method",
            ahead(name, "half", BUDGETS), above(-1))
      for name, what in {"paper_hops": "gradients through all picks",
                         "paper_k": "K of Eq. 12 is the batch's running mean",
                         "paper_stop": "a constant stop state",
                         "paper_start": "W_text starts from chance",
                         "paper_lambda": "a constant lambda"}.items()),
    Claim("ours", "One training a price, a low one for many tokens and a high one for few, is "
          "better than one for all that is steered by a bias.", "how it reaches its means is not "
          "told",
          ahead("lambda_0.01", "half", (48, 32)) | ahead("lambda_1", "half", (16, 8)), above(),
          note="asked after the runs were seen"),
    Claim("ours", "A selector that is told its price does as well at every mean as one that is "
          "steered by a bias alone.", "how it reaches its means is not told",
          ahead("told", "half", (48, 32, 16, 8)), above(-1)),
    Claim("ours", "... and fewer of its questions stand at the limit of K.", "not measured",
          {f"share at the limit, mean of {k}": lambda d, k=k: (
              d.at_limit("half", k) - d.at_limit("told", k)) for k in (48, 32)},
          above(), unit="percent", note="asked after the runs were seen"),
    Claim("ours", "... and its K follows the picture more.", "not measured",
          {f"difference of correlations, mean of {k}": lambda d, k=k: (
              d.follows_things("told", k) - d.follows_things("half", k)) for k in (48, 32, 16)},
          above(), unit="correlation"),
    Claim("3.1", "Tokens keep their positions: numbered anew, they would be worth less.",
          "not measured", ahead("stepprune", "stepprune reindexed", BUDGETS), above()),
    Claim("ours", "What it learned on usual scenes serves crowded ones with smaller things.",
          "not measured", ahead("stepprune exactly", "cls_attention", BUDGETS), above(),
          table="llava_crowded"),
]
