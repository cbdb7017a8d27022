"""K counts units, inside the language model as before it: newlines come on top.

LLaVA-NeXT ends every line of a picture by a token that shows nothing, LLaVA-OneVision every video.
In front of the language model they are not counted: one stays if and only if a unit of its line
does. The rivals' released code for the inside was written for LLaVA-1.5, which has none; let loose
on LLaVA-NeXT it ranks newlines among the rest. Here a rule sees and counts the units alone, so that
one K means the same for all methods [ours].
"""

from dataclasses import replace

import torch
from torch import Tensor

from .inside import LayerView, Rule, Shown


def among_units(rule: Rule) -> Rule:
    """The rule without newlines among what it sees and keeps; the same where there are none."""
    def with_newlines(view: LayerView):
        shown = view.shown
        if shown is None or all((unit >= 0).all() for unit in shown.unit):
            return rule(view)
        chosen = rule(without_newlines(view))
        keep, changes = chosen if isinstance(chosen, tuple) else (chosen, {})
        stays, is_unit = zip(*(stay(view, b, index) for b, index in enumerate(keep)))
        whole = {column: [written(view, column, b, stays[b], is_unit[b], value)
                          for b, value in enumerate(values)] for column, values in changes.items()}
        return list(stays), whole
    return with_newlines


def without_newlines(view: LayerView) -> LayerView:
    """The view as if no newline had ever entered."""
    shown = view.shown
    units = [unit >= 0 for unit in shown.unit]
    numbers = [is_unit.cumsum(0) - 1 for is_unit in units]

    def hidden(prompt):
        is_visual, origin = prompt.is_visual.clone(), prompt.origin.clone()
        for b, here in enumerate(prompt.is_visual):
            old = prompt.origin[b, here]
            is_unit = units[b].to(old.device)[old]
            is_visual[b, here] = is_unit
            origin[b, here] = numbers[b].to(old)[old].masked_fill(~is_unit, -1)
        return replace(prompt, is_visual=is_visual, origin=origin)
    own = [unit[is_unit] for unit, is_unit in zip(shown.unit, units)]
    few = replace(view, prompt=hidden(view.prompt), start=hidden(view.start),
                  shown=Shown(shown.units, own, [torch.full_like(x, -1) for x in own]))
    few.behind = view.behind                           # to the view a newline would be text
    return few


def stay(view: LayerView, b: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """index (K,) into the units that row b sees -> the visual tokens that stay, ascending, with the
    newlines of their lines; which of those are units."""
    origin = view.origin[b, view.valid[b]]
    unit, line = (x[b].to(origin.device)[origin] for x in (view.shown.unit, view.shown.line))
    kept = torch.zeros_like(unit, dtype=torch.bool)
    kept[(unit >= 0).nonzero().flatten()[index]] = True
    stays = (kept | (unit < 0) & torch.isin(line, line[kept])).nonzero().flatten()
    return stays, kept[stays]


def written(view: LayerView, column: str, b: int, stays: Tensor, is_unit: Tensor, value: Tensor
            ) -> Tensor:
    """What a rule writes over the units that it keeps, with newlines left as they are."""
    old = getattr(view.prompt, column)
    if old is None:                                    # sizes of merged tokens: all of size 1
        new = value.new_zeros(len(stays))
    else:
        new = view.pad(old)[0][b, stays].to(value)
    if column == "origin":                             # counted among the units
        value = (view.shown.unit[b] >= 0).nonzero().flatten().to(value)[value]
    new[is_unit] = value
    return new
