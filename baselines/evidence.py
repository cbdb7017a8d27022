"""Evidence: the K tokens that cover most of what the question asks about. No method: a bound.

It needs the ground truth, which a benchmark of real pictures does not have; the tiny world has it.
"""

from torch import Tensor

from runs import Way

from . import pictures, top

NAMES = {"evidence": {}}


def needs(vlm) -> dict:
    return {}


def select(units, keep: int, *, seed: int = 0, as_released: bool = False,
           evidence: list[Tensor | None] | None) -> list[Tensor]:
    """B ascending int64 tensors of exactly `keep` unit indices.

    evidence: for each picture (n,), the share of each unit that shows the answer. Raises ValueError
    where it is None, for then it is not known.
    """
    if evidence is None or any(share is None for share in evidence):
        raise ValueError("evidence keeps what covers the asked things most, and here nothing says "
                         "which units do: expected a benchmark that knows, such as the tiny world, "
                         "and one view a picture")
    return [here[top(share.to(here.device)[here], k)].sort().values
            for (here, k), share in zip(pictures(units, keep), evidence)]


def way(vlm, seed: int = 0) -> Way:
    return Way(lambda asked, k: select(asked.units, k, evidence=asked.evidence),
               reads_question=True, needs=needs(vlm))
