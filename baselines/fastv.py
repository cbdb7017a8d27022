"""FastV (Chen et al., ECCV 2024, arXiv:2403.06764): in front of layer 2, the K visual tokens that
the last prompt token attended to most in layer 1, mean over heads. Layers 0 and 1 see all tokens;
positions stay. R = 1 - K / N.

Budget: K tokens survive, so the mean over layers is (2 N + (layers - 2) K) / layers.
Paper and released code: the text speaks of the attention received from all later tokens, the code
reads the row of the last token, as here. The paper's version chooses anew for every new token; its
version with a cache once, as here.
"""

from . import check_keep, top

NAMES = {"fastv": {}}
LAYERS = (2,)                                          # [paper]; its demo has 3


def stages(keep: int, tokens: int | list[int], depth: int = 32, layers: tuple = LAYERS) -> dict:
    """{layer: rule} for inside.generate_inside(): exactly `keep` visual tokens from that layer on.

    tokens: visual tokens that enter, of all rows or of each; depth: layers of the language model,
    not used here. Raises ValueError where a row has fewer than `keep` tokens.
    """
    check_keep(keep, tokens)
    (layer,) = layers

    def rule(view):
        scores = view.attention().mean(1)[:, 0]        # (B, N)
        return [top(score[valid], keep).sort().values for score, valid in zip(scores, view.valid)]
    return {layer: rule}
