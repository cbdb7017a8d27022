"""Questions of a benchmark, put to the frozen VLM with all visual tokens or with those of a Way.

    run(vlm, questions, ways, files, ...)       all of them, into predictions files
    answer_batch(vlm, part, ways, ...)          one batch, in every way
    ask(vlm, questions, ...)                    one batch, encoded and ready to be selected from

K counts units of the picture in every way, newlines come on top: see baselines/newlines.py.

Shapes  Q questions of a batch, B different pictures among them, K kept units
"""

import hashlib
import multiprocessing
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from baselines.encoder import encode
from baselines.inside import Shown, generate_inside
from baselines.newlines import among_units
from benchmarks import plots
from benchmarks.costs import (
    Clock,
    is_large,
    peak_bytes,
    per_layer,
    prefill_flops,
    that_fit,
    timed,
    token_budget,
)
from benchmarks.predictions import Predictions, plain
from benchmarks.questions import Question
from common import Prompt, Units
from data.pictures import oblong
from runs import Way

# ------------------------------------------------------------------------------------ what is asked


@dataclass
class QuestionBatch:
    """All that a selection may read. A row is a question; or a picture, if one choice serves all
    questions about it.

    units     of every row's picture
    owner     for every row the number of its picture, 0 .. B - 1
    names     for every row a hash of its picture: the same for the same picture, in any batch
    question  embeddings (rows, L, D) and valid (rows, L); None where rows are pictures
    texts     what is asked in every row; None where rows are pictures
    evidence  for every row (n,) share of each unit that shows the answer; None where it is unknown
    pixels    the batch of B pictures that the vision encoder took; None for some rows of a batch
    pictures  the same with a row for each of the B pictures; None where rows are pictures
    inputs    {whether the question stands before the image too: the batch that the VLM answers},
              where rows are questions
    """
    vlm: object
    units: Units
    owner: list[int]
    names: list[str]
    pixels: object = None
    question: tuple[Tensor, Tensor] | None = None
    evidence: list[Tensor | None] | None = None
    pictures: "QuestionBatch | None" = None
    inputs: dict | None = None
    texts: list[str] | None = None

    @property
    def batch(self):
        """Tensors of the questions' prompts and pictures, a row per question."""
        return next(iter(self.inputs.values()))

    def only(self, rows: list[int]) -> "QuestionBatch":
        """Some of the rows; of a picture that has one, all of its rows or none."""
        owners = [self.owner[row] for row in rows]
        first = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
        question = None if self.question is None else tuple(x[rows] for x in self.question)
        evidence = None if self.evidence is None else [self.evidence[row] for row in rows]
        pictures = None if self.pictures is None else self.pictures.only(list(first))
        texts = None if self.texts is None else [self.texts[row] for row in rows]
        return QuestionBatch(self.vlm, self.units.rows(rows), [first[owner] for owner in owners],
                             [self.names[row] for row in rows], None, question, evidence, pictures,
                             None, texts)

    def tokens(self) -> list[int]:
        """How many units of each row have a token."""
        return self.units.pad(self.units.image_of)[1].sum(1).tolist()


class Answers(NamedTuple):
    """texts[q]
    keep[q]     (K,) the units that were kept to the end, or None for all
    entered[q]  visual tokens in front of the language model, newlines included
    later[q]    {layer: how many there are from it on}
    """
    texts: list[str]
    keep: list[Tensor] | None
    entered: list[int]
    later: list[dict]


class Impossible(ValueError):
    """A selection cannot keep K of such tokens, or serve such pictures at all."""


class TooLong(ValueError):
    """A question whose prompt is longer than the language model has positions.

    row: its place among those that were asked; tokens: of its prompt, those of its picture
    included; twice: only where the question stands before the image too
    """

    MESSAGE = re.compile(r"row (\d+) has (\d+) tokens, those of its image included")

    def __init__(self, error: str, row: int, tokens: int, twice: bool):
        super().__init__(error)
        self.row, self.tokens, self.twice = row, tokens, twice


class Read(NamedTuple):
    """What is read of some questions on the CPU, before a model sees them.

    hashes, owner   of every question's pictures, and the place of these among the B different ones
    pixels, inputs  as of a QuestionBatch
    """
    hashes: list[str]
    owner: list[int]
    pixels: object
    inputs: dict

    def to(self, device) -> "Read":
        inputs = {twice: batch.to(device) for twice, batch in self.inputs.items()}
        return self._replace(pixels=self.pixels.to(device), inputs=inputs)


def read(vlm, questions: list[Question], orders: list[bool]) -> Read:
    """Pictures decoded, every different one cut up once, and prompts in tokens.

    orders: whether the question stands before the image too, for each prompt that is needed.
    Raises ValueError naming questions that cannot be read, or whose picture the processor refuses,
    TooLong for one that is too long.
    """
    images = [read_images(question) for question in questions]
    hashes = [content_hash(several) for several in images]
    names = list(dict.fromkeys(hashes))
    owner = [names.index(name) for name in hashes]
    distinct = [images[owner.index(b)] for b in range(len(names))]
    distinct = [several if len(several) > 1 else several[0] for several in distinct]
    try:
        pixels = vlm.pictures(distinct, "cpu")
    except ValueError as error:                       # Qwen's processor names no picture
        for question, several in zip(questions, images):
            if cause := next(filter(None, map(oblong, several)), None):
                raise ValueError(f"a picture of question {question.id!r} is {cause}: crop or pad "
                                 "it in a copy of the data") from error
        raise
    turns = [[(question.prompt, None)] for question in questions]
    inputs = {}
    for twice in orders:
        try:
            inputs[twice] = vlm.batch([distinct[b] for b in owner], turns, "cpu", ask_twice=twice)
        except ValueError as error:
            ids = ", ".join(question.id for question in questions)
            said = f"{error}. The rows, from 0, are the questions {ids}"
            if too_long := TooLong.MESSAGE.match(str(error)):
                row, n = map(int, too_long.groups())
                raise TooLong(said, row, n, twice) from error
            raise ValueError(said) from error
    return Read(hashes, owner, pixels, inputs)


def orders_of(ways) -> list[bool]:
    """Whether the question stands before the image too, for each prompt that some ways need."""
    return sorted({bool(way and way.ask_twice) for way in ways}) or [False]


class Parts(Dataset):
    """Part n, read(); None where its questions cannot be read, which is met again, and said, where
    they are answered."""

    def __init__(self, vlm, parts: list[list[Question]], orders: list[bool]):
        self.vlm = vlm
        self.parts = parts
        self.orders = orders

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, n):
        try:
            return read(self.vlm, self.parts[n], self.orders)
        except (ValueError, OSError):
            return None


def reads_ahead(vlm) -> bool:
    """Not on a CPU: it would take the time of what is measured, and gain little where all cores
    work already. Forked, another process has the VLM as it is, and must not touch the GPU."""
    return vlm.device.type != "cpu" and "fork" in multiprocessing.get_all_start_methods()


def read_ahead(vlm, parts: list[list[Question]], *ways: Way | None) -> Iterable[Read | None]:
    """Each part, read by another process while the one before is answered; see reads_ahead()."""
    if not reads_ahead(vlm):
        return [None] * len(parts)
    return DataLoader(Parts(vlm, parts, orders_of(ways)), batch_size=None, num_workers=1,
                      collate_fn=lambda part: part, multiprocessing_context="fork")


def ask(vlm, questions: list[Question], *ways: Way | None, clock: Clock | None = None,
        ready: Read | None = None) -> QuestionBatch:
    """Some questions, every different picture encoded once, with all that the ways need.

    ready: what has been read of them ahead. Raises as read() does.
    """
    clock = clock or Clock(vlm.device)
    orders = orders_of(ways)
    hashes, owner, pixels, inputs = (ready or read(vlm, questions, orders)).to(vlm.device)
    names = list(dict.fromkeys(hashes))
    needs = {}
    for way in filter(None, ways):
        needs |= way.needs
    with clock("vision", len(names)):
        try:
            units = encode(vlm, pixels, needs)
        except ValueError as error:
            ids = ", ".join(questions[owner.index(b)].id for b in range(len(names)))
            raise ValueError(f"{error}. The rows, from 0, are the pictures of the questions {ids}"
                             ) from error
    pictures = QuestionBatch(vlm, units, list(range(len(names))), names, pixels)
    asked = QuestionBatch(vlm, units.rows(owner), owner, hashes, pixels,
                          vlm.question(inputs[orders[0]]), None, pictures, inputs,
                          [question.prompt for question in questions])
    asked.evidence = [evidence_of(question, asked.units, row)
                      for row, question in enumerate(questions)]
    return asked


@torch.no_grad()
def calibration_batches(vlm, questions: list[Question], size: int) -> Iterator[tuple]:
    """(units, question) of all questions, `size` at a time: what select() reads. Those that are too
    long are left out."""
    parts = [questions[start:start + size] for start in range(0, len(questions), size)]
    for part, ready in zip(tqdm(parts, "calibrate"), read_ahead(vlm, parts)):
        _, asked = ask_what_fits(vlm, part, ready=ready)
        if asked:
            yield asked.units, asked.question


def ask_what_fits(vlm, questions: list[Question], *ways: Way | None, ready: Read | None = None
                  ) -> tuple[list[Question], QuestionBatch | None]:
    """The questions that are not too long, and ask() of them; None if there are none."""
    questions = list(questions)
    while questions:
        try:
            return questions, ask(vlm, questions, *ways, ready=ready)
        except TooLong as error:              # which nothing read ahead can be
            del questions[error.row]
    return [], None


def content(question: Question) -> str:
    """The same for questions about the same pictures."""
    return content_hash(question.images())


def read_images(question: Question) -> list:
    try:
        return [image.convert("RGB") for image in question.images()]
    except ValueError as error:
        raise ValueError(f"the pictures of question {question.id!r} cannot be read: {error}"
                         ) from error


def content_hash(images: list) -> str:
    content = hashlib.md5(usedforsecurity=False)
    for image in images:
        content.update(repr(image.size).encode() + image.tobytes())
    return content.hexdigest()


def evidence_of(question: Question, units: Units, row: int) -> Tensor | None:
    """The evidence of a question, None where it is unknown: the benchmark has none, or the picture
    reaches the encoder as several views, for which there is no ground truth."""
    if question.evidence is None or (units.views is not None and units.views[row] > 1):
        return None
    return question.evidence(units.grid[row])


def recall(keep: list[Tensor] | None, evidence: list[Tensor | None]) -> list[float | None]:
    """Share of each question's evidence that was kept, 0..1; None where it is unknown, or nothing
    in the picture bears on the question. keep: None for all."""
    shares = []
    for row, cover in enumerate(evidence):
        if cover is None or not cover.sum():
            shares.append(None)
        elif keep is None:
            shares.append(1.)
        else:
            shares.append((cover[keep[row].cpu()].sum() / cover.sum()).item())
    return shares


# ------------------------------------------------------------------------------ how many are kept


def wanted(budget, tokens: int):
    """K for one of so many visual tokens: no more than there are; below 1 that share of them, at
    least one. What is no number, as "mask", goes through as it is."""
    if isinstance(budget, str):
        return budget
    return max(1, round(budget * tokens)) if budget < 1 else min(budget, tokens)


def by_budget(budget, tokens: list[int]) -> dict:
    """{K: rows that want it}."""
    groups = {}
    for row, n in enumerate(tokens):
        groups.setdefault(wanted(budget, n), []).append(row)
    return groups


def choose(way: Way, asked: QuestionBatch, budget) -> tuple[list[Tensor], Tensor | None]:
    """keep of every question, and the features that stand in the kept units' place, or None.

    Rows that want the same K are selected from together.
    """
    rows = asked if way.reads_question else asked.pictures
    tokens = rows.tokens()
    groups = {budget: list(range(len(tokens)))} if way.adaptive else by_budget(budget, tokens)
    keep, feats = {}, {}
    for k, members in groups.items():
        chosen = way.select(rows if len(groups) == 1 else rows.only(members), k)
        if isinstance(chosen, tuple):
            chosen, merged = chosen
            feats |= zip(members, merged.split([len(row) for row in chosen]))
        keep |= zip(members, chosen)
    order = range(len(tokens)) if way.reads_question else asked.owner
    merged = torch.cat([feats[row] for row in order]) if feats else None
    return [keep[row] for row in order], merged


def drown(way: Way, asked: QuestionBatch, budget) -> Tensor:
    """(M, ...) features of every question's units, drowned in noise instead of removed."""
    rows = asked if way.reads_question else asked.pictures
    tokens = rows.tokens()
    parts = {}
    for k, members in by_budget(budget, tokens).items():
        chosen = rows if len(members) == len(tokens) else rows.only(members)
        parts |= zip(members, way.gate(chosen, k).split(chosen.units.counts))
    order = range(len(tokens)) if way.reads_question else asked.owner
    return torch.cat([parts[row] for row in order])


# ------------------------------------------------------------------------------------ one batch


@torch.no_grad()
def answer_batch(vlm, part: list[tuple[int, Question]], ways: dict, seed: int = 0,
                 positions: str = "original", ready: Read | None = None) -> dict:
    """{(name, K): rows of a predictions file} of one batch, or an Impossible where K cannot be had.

    part: [(number, question), ...] with the same limit of new tokens
    ways: {(name, K): Way, or None for all tokens} | ready: what has been read of them ahead
    A question that is too long for the model gets the row of unanswered().
    """
    if not part:
        return {key: [] for key in ways}
    clock = Clock(vlm.device)
    try:
        questions = [question for _, question in part]
        asked = ask(vlm, questions, *ways.values(), clock=clock, ready=ready)
    except TooLong as error:
        return answer_around(vlm, part, ways, error, seed, positions)
    tokens = asked.tokens()
    texts = {twice: text_tokens(vlm, batch) for twice, batch in asked.inputs.items()}
    limit = part[0][1].limit
    rows = {}
    for key, way in ways.items():
        twice = bool(way and way.ask_twice)
        torch.manual_seed(seed + part[0][0])          # of a random scorer
        try:
            answers = answer_in(vlm, way, asked, key, clock, limit, positions)
        except Impossible as error:
            rows[key] = error
            continue
        rows[key] = [make_row(vlm, clock, key, part[q], q, answers, asked, tokens[q],
                              texts[twice][q]) for q in range(len(part))]
    return rows


def answer_around(vlm, part: list, ways: dict, error: TooLong, seed: int, positions: str) -> dict:
    """answer_batch() of a part with a question that is too long, be it only in the ways that put it
    before the image too."""
    number, question = part[error.row]
    rest = [*part[:error.row], *part[error.row + 1:]]
    stuck = {key: way for key, way in ways.items() if not error.twice or way and way.ask_twice}
    others = {key: way for key, way in ways.items() if key not in stuck}
    rows = answer_batch(vlm, rest, stuck, seed, positions)
    for key in stuck:
        if not isinstance(rows[key], Impossible):
            rows[key].insert(error.row, unanswered(number, question, error.tokens))
    if others:
        rows |= answer_batch(vlm, part, others, seed, positions)
    return {key: rows[key] for key in ways}


def unanswered(number: int, question: Question, tokens: int) -> dict:
    """The row of a question that the model has no positions for: nothing is answered, which is
    scored like any answer, and nothing was spent. LLaVA's own code cuts the end of such a prompt
    off, that is its question."""
    row = {"number": number, "id": question.id, "prompt": question.prompt, "answer": "",
           "gold": plain(question.gold), "kept": 0, "seen": [0, 0, 0.], "flops": 0,
           "ms": dict.fromkeys(("vision", "select", "prefill", "decode"), 0.), "too long": tokens}
    return row if question.evidence is None else row | {"recall": None}


def text_tokens(vlm, batch) -> list[int]:
    """Tokens of each row's prompt that are no image tokens."""
    is_text = (batch["attention_mask"] != 0) & (batch["input_ids"] != vlm.image_id)
    return is_text.sum(1).tolist()


def answer_in(vlm, way: Way | None, asked: QuestionBatch, key, clock: Clock, limit: int,
              positions: str = "original") -> Answers:
    """The questions of a batch, answered in one way; with all tokens if it is None.

    key: (name, K), under which the clock counts "select" per choice, "prefill" and "decode" per
    question. Raises Impossible.
    """
    batch = asked.inputs[bool(way and way.ask_twice)]
    if way and way.stages:
        return answer_inside(vlm, way, asked, batch, key, clock, limit, positions)
    keep, feats = None, None
    own = way is not None and way.reads_question
    with clock(("select", key), len(asked.owner if own else asked.pictures.owner)):
        try:
            if way and way.gate:
                feats = drown(way, asked, key[1])
            elif way and way.select:
                keep, feats = choose(way, asked, key[1])
        except ValueError as error:
            raise Impossible(str(error)) from error
    if keep is None:
        prompt = vlm.embed(batch, asked.units, feats)
    else:
        prompt = vlm.prune(batch, asked.units, keep, feats, positions)
    texts = timed(clock, key, len(asked.owner),
                  lambda streamer: vlm.generate(prompt, limit, streamer))
    return Answers(texts, keep, prompt.is_visual.sum(1).tolist(), [{}] * len(texts))


def answer_inside(vlm, way: Way, asked: QuestionBatch, batch, key, clock: Clock, limit: int,
                  positions: str = "original") -> Answers:
    """answer_in() for a selection inside the language model: rows that want the same K go through
    it together."""
    prompt = vlm.embed(batch, asked.units)
    entered = prompt.is_visual.sum(1).tolist()
    tokens = asked.tokens()
    shown = Shown.of(vlm, batch, asked.units)
    groups = by_budget(key[1], tokens)
    rows = {}
    for k, members in groups.items():
        part = prompt if len(groups) == 1 else rows_of(prompt, members)
        counts = [tokens[b] for b in members]
        rows |= zip(members, generate_staged(vlm, way, part, shown.rows(members), counts, k, key,
                                             clock, limit, positions))
    texts, keep, later = zip(*(rows[b] for b in range(len(entered))))
    return Answers(list(texts), None if keep[0] is None else list(keep), entered, list(later))


def rows_of(prompt: Prompt, rows: list[int]) -> Prompt:
    """Some rows of a prompt, padded no further than they need."""
    part = Prompt(prompt.embeds[rows], prompt.mask[rows], prompt.pos[..., rows, :],
                  None if prompt.labels is None else prompt.labels[rows], prompt.is_visual[rows],
                  later=tuple(x[rows] for x in prompt.later))
    return part.only(part.mask.bool())


def generate_staged(vlm, way: Way, prompt: Prompt, shown: Shown, units: list[int], k, key,
                    clock: Clock, limit: int, positions: str):
    """Of every row: its answer, the units that were kept to the end, or None for all, {layer:
    visual tokens from it on, newlines included}. units: how many each has."""
    try:
        rules = {layer: among_units(rule) for layer, rule in way.stages(k, units).items()}
    except ValueError as error:
        raise Impossible(str(error)) from error
    kept = {}

    def watched(layer, rule):
        def watch(view):
            # the choices of all stages together are one selection
            with clock(("select", key), len(units) if layer == min(rules) else 0):
                try:
                    chosen = rule(view)
                except ValueError as error:            # such as fewer tokens than crops
                    raise Impossible(str(error)) from error
            keep, changes = chosen if isinstance(chosen, tuple) else (chosen, {})
            origins = [origin[index] for origin, index in zip(view.origin, keep)]
            kept[layer] = changes.get("origin") or origins
            return chosen
        return watch
    stages = {layer: watched(layer, rule) for layer, rule in rules.items()}
    before = clock.seconds.get(("select", key), 0.)
    texts = timed(clock, key, len(units), lambda streamer: generate_inside(
        vlm, prompt, stages, limit, streamer, positions, shown))
    if not stages:
        clock.add(("select", key), 0., len(units))     # nothing is selected, in no time
    # the prompt waited for the selection, whose time is counted already
    clock.add(("prefill", key), before - clock.seconds[("select", key)], 0)
    last = [None] * len(units)
    if kept:
        last = [shown.units_of(b, tokens) for b, tokens in enumerate(kept[max(kept)])]
    later = [{layer: len(keep[b]) for layer, keep in kept.items()} for b in range(len(units))]
    return zip(texts, last, later)


def make_row(vlm, clock: Clock, key, numbered: tuple[int, Question], q: int, answers: Answers,
             asked: QuestionBatch, tokens: int, text: int) -> dict:
    """One row of a predictions file; tokens: of its picture, text: tokens of its prompt's text."""
    number, question = numbered
    depth = len(vlm.lm.layers)
    entered, later = answers.entered[q], answers.later[q]
    layers = [text + visual for visual in per_layer(entered, later, depth)]
    ms = {"vision": clock.ms("vision"),
          **{stage: clock.ms((stage, key)) for stage in ("select", "prefill", "decode")}}
    row = {"number": number, "id": question.id, "prompt": question.prompt,
           "answer": answers.texts[q], "gold": plain(question.gold),
           "kept": len(answers.keep[q]) if answers.keep else tokens,
           "seen": list(token_budget(entered, later, depth)),
           "flops": prefill_flops(vlm.model.config.text_config, layers),
           "ms": {stage: round(time, 3) for stage, time in ms.items()}}
    if question.evidence is not None:
        keep = answers.keep and [answers.keep[q]]
        row["recall"] = recall(keep, [asked.evidence[q]])[0]
    return row


@torch.no_grad()
def draw_kept(vlm, selector, way: Way, k, questions, path) -> None:
    """Six pictures with a trained selector's scores and what its way keeps of them."""
    if way.select is None or way.stages is not None:
        return                                  # it selects inside the language model
    few = list({content(question): question for question in questions[:60]}.values())[:6]
    few, asked = ask_what_fits(vlm, few, way)
    if not few:
        return
    keep = choose(way, asked, k)[0]
    heat = selector.scores(asked.units, asked.question)
    orders = plots.by_score(asked.units, heat, keep) if way.reads_question else None
    titles = [question.prompt for question in few]
    plots.draw_units(vlm, asked.batch, asked.units, heat, keep, titles, path, orders)


# ------------------------------------------------------------------------------------ all batches


def batches(questions, size: int) -> list[list[tuple[int, Question]]]:
    """[(number, question), ...] in parts of at most `size` neighbours that may be answered at the
    same length."""
    parts = []
    for number, question in enumerate(questions):
        full = not parts or len(parts[-1]) == size
        if full or parts[-1][0][1].limit != question.limit:
            parts.append([])
        parts[-1].append((number, question))
    return parts


def most_at_a_time(vlm, questions: list[Question], ways: dict, most: int) -> int:
    """How many questions fit into the memory at once, a power of two; `most` on a CPU that holds a
    small model. Four of them, with one new token, are measured in all ways."""
    if vlm.device.type == "cpu" and not is_large(vlm):
        return most
    few = [replace(question, limit=1) for question in questions[::max(len(questions) // 4, 1)]]

    def peak(question: Question) -> int:
        return peak_bytes(lambda: answer_batch(vlm, [(0, question)], ways), vlm.device)
    row = max(map(peak, few[:4]))
    fit = that_fit(row, vlm.device, most)
    if not fit:
        raise ValueError(f"one question takes {row / 2**30:.1f} GiB, more than is free: expected "
                         "a smaller --dtype, or fewer --methods at a time")
    return 2 ** (fit.bit_length() - 1)


def run(vlm, questions, ways: dict, files: dict[tuple, Predictions], batch: int = 8, seed: int = 0,
        process: int = 0, processes: int = 1, title: str = "", positions: str = "original"
        ) -> None:
    """Answer what the files lack, each in its way, see answer_batch(); of several processes each
    answers its share of the batches.

    A batch that was cut off is answered again as a whole, with the same neighbours, and completed:
    the files come out as if nothing had happened. Where K cannot be had the way is left out, which
    is printed; so is a question that is too long for the model, which is not asked again.
    """
    ways = dict(ways)

    def lacking(part: list) -> dict:
        return {key: way for key, way in ways.items()
                if any(question.id not in files[key].done for _, question in part)}
    parts = batches(questions, batch)[process::processes]
    todo = [part for part in parts if lacking(part)]
    bar = tqdm(todo, title, initial=len(parts) - len(todo), total=len(parts), disable=process > 0)
    questions_of = [[question for _, question in part] for part in todo]
    for part, ready in zip(bar, read_ahead(vlm, questions_of, *ways.values())):
        unread, turns = {}, lacking(part)
        if not turns:                                          # ways were left out meanwhile
            continue
        for key, rows in answer_batch(vlm, part, turns, seed, positions, ready).items():
            if isinstance(rows, Impossible):
                print(f"{key[0]} {key[1]}: left out, {rows}")
                del ways[key]
            else:
                files[key].add(rows)
                unread |= {row["id"]: row["too long"] for row in rows if "too long" in row}
        for name, tokens in unread.items():
            print(f"{title} {name}: {tokens} tokens are more than the model has positions for: "
                  "the answer is left empty")
