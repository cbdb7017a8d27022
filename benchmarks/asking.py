"""A batch of questions put to the frozen VLM, with all visual tokens or with those that a selector leaves."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.speed import Clock
from common import Prompt, Units


class Asked(NamedTuple):
    """Q questions about B pictures: all that a selection may read, and the evidence it is judged by.

    pictures: units of each picture | units: of every question's picture, owner[q] | question: embeddings (Q, L, D) and
    valid (Q, L) | evidence[q]: (n,) share of each unit that shows the answer, None where it is not known
    names[b]: what is the same for the same picture alone | merged: FrozenVLM.merged() of pictures
    """
    pictures: Units
    owner: list[int]
    units: Units
    question: tuple
    evidence: list | None
    names: list[str] | None = None
    merged: Callable | None = None

    def only(self, pictures: list[int]) -> "Asked":
        """The questions about these pictures."""
        mine = [q for q, b in enumerate(self.owner) if b in pictures]
        evidence, names = self.evidence and [self.evidence[q] for q in mine], self.names
        return Asked(self.pictures.rows(pictures), [pictures.index(self.owner[q]) for q in mine], self.units.rows(mine),
                     tuple(x[mine] for x in self.question), evidence, names and [names[b] for b in pictures])


class Selector(NamedTuple):
    """select(asked, K) -> one keep a question, or (these, features in place of the kept units' own). each: a selection
    per question, not one per picture. adaptive: K is a mean over questions; else it is at most every picture's tokens,
    and below 1 a share of them. look: what encode() has to show it.

    layer: select(states, valid, K) chooses in front of this layer of the language model, from its states, and the
    question stands before the image too; 0 for a question so placed and nothing removed. budgets: its own.
    stages: stages(K, visual tokens of each row) -> {layer: rule} of a rival inside; it asks behind the image alone.
    """
    select: Callable | None
    each: bool = True
    layer: int | None = None
    budgets: tuple | None = None
    stages: Callable | None = None
    adaptive: bool = False
    look: dict = {}


class Answers(NamedTuple):
    """texts[q] | keep[q]: (K,) indices of what was kept to the end, or None for all | entered[q]: visual tokens in
    front of the language model, newlines included | later[q]: {layer: how many there are from it on}"""
    texts: list[str]
    keep: list | None
    entered: list[int]
    later: list[dict]


class Impossible(ValueError):
    """A selection cannot keep K of such tokens, or serve such pictures at all."""


class Stamps:
    """A streamer of transformers that notes when the prompt went in, when each token came, and the end."""

    def __init__(self):
        self.at = []

    def put(self, _):
        self.at.append(time.perf_counter())

    def end(self):
        self.put(None)


def for_all(owner: list[int], found):
    """What was chosen for each picture -> the same for each question."""
    if isinstance(found, tuple):
        keep, feats = found
        parts = feats.split([len(k) for k in keep])
        return [keep[b] for b in owner], torch.cat([parts[b] for b in owner])
    return [found[b] for b in owner]


def per_picture(select, look: dict | None = None) -> Selector:
    """A selection that knows no question serves all of a picture's. select(units, K) -> one keep a picture."""
    return Selector(lambda asked, k: for_all(asked.owner, select(asked.pictures, k)), each=False, look=look or {})


def wanted(budget, tokens: int):
    """K for one of so many visual tokens: no more than there are; below 1 that share of them, at least one. What is no
    number ("mask") goes through as it is."""
    if isinstance(budget, str):
        return budget
    return max(1, round(budget * tokens)) if budget < 1 else min(budget, tokens)


def by_budget(budget, tokens: list[int]) -> dict:
    """{K: rows that want it}."""
    groups = {}
    for row, n in enumerate(tokens):
        groups.setdefault(wanted(budget, n), []).append(row)
    return groups


def chosen(selector: Selector, asked: Asked, budget) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """keep of every question, and the features in place of the kept units' own, or None; pictures that want the same K
    are selected from together."""
    groups = {budget: None} if selector.adaptive else by_budget(
        budget, asked.pictures.pad(asked.pictures.image_of)[1].sum(1).tolist())
    if len(groups) == 1:
        found = selector.select(asked, next(iter(groups)))
        return found if isinstance(found, tuple) else (found, None)
    keep, feats = {}, {}
    for k, pictures in groups.items():
        found, mine = selector.select(asked.only(pictures), k), [q for q, b in enumerate(asked.owner) if b in pictures]
        if isinstance(found, tuple):
            found, merged = found
            feats |= zip(mine, merged.split([len(row) for row in found]))
        keep |= zip(mine, found)
    order = range(len(asked.owner))
    return [keep[q] for q in order], torch.cat([feats[q] for q in order]) if feats else None


def recall(keep, evidence) -> list[float]:
    """Share of each question's evidence that was kept, 0..1; nan where nothing in the picture bears on the question."""
    return [(e[k.cpu()].sum() / e.sum()).item() for k, e in zip(keep, evidence)]


def timed(clock: Clock, stage: str, items: int, generate) -> list[str]:
    """generate(streamer), its time split in two: up to the first new token, and after it."""
    stamps = Stamps()
    clock.wait()
    texts = generate(stamps)
    clock.wait()
    clock.add(f"prefill {stage}", stamps.at[1] - stamps.at[0], items)
    clock.add(f"decode {stage}", stamps.at[-1] - stamps.at[1], items)
    return texts


@torch.no_grad()
def answered(vlm, selector, asked: Asked, batch, stage: str, budget, clock: Clock, limit: int,
             positions: str = "original") -> Answers:
    """The questions of a batch, answered as a Selector wants it, with all tokens if it is None, or through the gate of
    an AutoSelect module. The batch asks before the image too where the selector's layer is not None. stage: what the
    clock calls it: "select <stage>" counts selections, "prefill" and "decode" questions. limit: most new tokens."""
    if getattr(selector, "stages", None) or getattr(selector, "layer", None) is not None:
        return within(vlm, batch, asked.units, selector, stage, budget, clock, limit, positions)
    feats, keep = None, None
    with clock(f"select {stage}", len(asked.owner if getattr(selector, "each", False) else asked.pictures.grid)):
        if isinstance(selector, torch.nn.Module):                            # Figure 5: drowned, not removed
            v, valid = asked.pictures.pad()
            gated = asked.pictures.flat(selector(v, valid, budget)[0])
            feats = replace(asked.pictures, feats=gated).rows(asked.owner).feats
        elif selector:
            try:
                keep, feats = chosen(selector, asked, budget)
            except ValueError as error:
                raise Impossible(str(error)) from error
    prompt = (vlm.prune(batch, asked.units, keep, feats, positions) if keep else
              vlm.embed(batch, asked.units, feats))
    texts = timed(clock, stage, len(asked.owner), lambda stream: vlm.generate(prompt, limit, stream))
    return Answers(texts, keep, prompt.is_visual.sum(1).tolist(), [{}] * len(texts))


def within(vlm, batch, units: Units, selector: Selector, stage: str, budget, clock: Clock, limit: int,
           positions: str = "original") -> Answers:
    """answered() for a selection inside the language model: rows that want the same K go through it together."""
    prompt = vlm.embed(batch, units)
    entered = prompt.is_visual.sum(1).tolist()
    groups, found = by_budget(budget, entered), {}
    for k, rows in groups.items():
        part = prompt if len(groups) == 1 else rows_of(prompt, rows)
        found |= zip(rows, staged(vlm, part, [entered[b] for b in rows], selector, k, stage, clock, limit, positions))
    texts, keep, later = zip(*(found[b] for b in range(len(entered))))
    return Answers(list(texts), None if keep[0] is None else list(keep), entered, list(later))


def rows_of(prompt: Prompt, rows: list[int]) -> Prompt:
    """Some rows of a prompt, padded no further than they need."""
    labels = None if prompt.labels is None else prompt.labels[rows]
    part = Prompt(prompt.embeds[rows], prompt.mask[rows], prompt.pos[..., rows, :], labels, prompt.is_visual[rows])
    return part.only(part.mask.bool())


def staged(vlm, prompt: Prompt, entered: list[int], selector: Selector, k, stage: str, clock: Clock, limit: int,
           positions: str = "original"):
    """Of every row: its answer, the indices of what was kept to the end, or None for all, {layer: tokens left}."""
    kept = {}
    if selector.stages:
        try:
            rules = selector.stages(k, entered)
        except ValueError as error:
            raise Impossible(str(error)) from error
    else:
        rules = {selector.layer: lambda look: selector.select(look.states, look.valid, k)} if selector.layer else {}

    def watched(layer, rule):
        def watch(look):
            with clock(f"select {stage}", len(entered) if layer == min(rules) else 0):
                found = rule(look)
            keep, changes = found if isinstance(found, tuple) else (found, {})
            kept[layer] = changes.get("origin") or [origin[k] for origin, k in zip(look.origin, keep)]
            return found
        return watch
    stages = {layer: watched(layer, rule) for layer, rule in rules.items()}
    texts = timed(clock, stage, len(entered),
                  lambda stream: vlm.generate_within(prompt, stages, limit, stream, positions))
    if not stages:
        clock.add(f"select {stage}", 0., len(entered))                       # nothing is selected, in no time
    last = kept[max(kept)] if kept else [None] * len(entered)
    return zip(texts, last, [{i: len(keep[b]) for i, keep in kept.items()} for b in range(len(entered))])
