"""Questions about pictures, answered with all visual tokens and with few:

    python -m examples.answer --image photo.png --question "what colour is the circle ?"

Prints every answer as its tokens are made, then the time of each stage beside that of all tokens in
the same run. Writes answer.png, the pictures as the vision encoder sees them with the kept tokens,
and answer.json. Several questions, or without any the lines of standard input up to an empty one,
are the turns of one dialogue.

A selection that reads no question is made once; later turns are read behind the pruned cache. One
that reads the question is made anew in every turn, and the dialogue is read again. One inside the
language model is asked each question by itself. A method that decides how many tokens it keeps is
steered to K of them on the first question.
"""

import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.hf_argparser import HfArg

import baselines
import evaluate
import runs
from baselines.encoder import encode
from baselines.inside import Shown, generate_inside
from baselines.newlines import among_units
from benchmarks import answering, plots
from benchmarks.answering import QuestionBatch
from benchmarks.costs import Clock
from common import PROTOCOLS, FrozenVLM
from data.pictures import oblong, open_picture
from examples.chat import Chat
from runs import Selector, Way, many


@dataclass
class AnswerConfig:
    image: list[str] = many([], "picture files; several stand in front of the first question, in "
                                "order; for a video family, frames")
    question: list[str] = many([], "turns of a dialogue; without any: from standard input")
    run: list[str] = many([], "run folders, selectors' folders or hub ids; without --model: the "
                              "latest run")
    model: str | None = HfArg(default=None, help="the frozen VLM; without it: the first run's own")
    methods: list[str] = many([], "baselines beside the runs: " + ", ".join(baselines.names()))
    ways: list[str] = many([], "ways in which the runs' method is asked, in place of its own; its "
                               "file says which, such as exactly or gated")
    budgets: list[int] = many([48, 16], "K, kept tokens of all pictures together; where the method "
                                        "decides how many, those of the first question [ours]")
    max_new_tokens: int = HfArg(default=64, help="most tokens of an answer [ours]")
    protocol: Literal[PROTOCOLS] = runs.protocol_option()
    out: str = HfArg(default="runs/answer", help="folder of answer.png and answer.json")
    dtype: Literal["bfloat16", "float32", "float16"] = runs.dtype_option()
    device: str = runs.device_option()

    def __post_init__(self):
        runs.check_options(self, budgets=1, max_new_tokens=1)
        if unknown := sorted({*self.methods} - {*baselines.names()}):
            raise ValueError(f"methods={unknown}: known are {', '.join(baselines.names())}")


@dataclass
class Answerer:
    """One way to select at one K, or all tokens, through a dialogue.

    selector  whose way it is; None for a baseline and for all tokens
    chat      the dialogue so far; None before the first turn, and inside the language model
    asked     what the selection of the last turn read
    keep      (K,) ascending int64, the units that it kept; None where all stay
    """
    name: str
    way: Way = field(default_factory=Way)
    budget: int | str = 0
    selector: Selector | None = None
    chat: Chat | None = None
    asked: QuestionBatch | None = None
    keep: Tensor | None = None

    @property
    def chooses_anew(self) -> bool:
        """Whether every question has a selection of its own."""
        return self.way.reads_question or self.way.stages is not None

    def scores(self) -> Tensor | None:
        """(M,) what the selection of the last turn went by; None if there is no such number."""
        if self.selector is None or self.way.stages:
            return None
        return self.selector.scores(self.asked.units, self.asked.question)


class Stamped(TextStreamer):
    """Prints text as it is made; at: when the prompt went in, then when each token came."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.at = []

    def put(self, value):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())
        super().put(value)


# ------------------------------------------------------------------------------------ who answers


def answerers_of(config: AnswerConfig, vlm: FrozenVLM, selectors: dict, calibration
                 ) -> list[Answerer]:
    """All tokens, then every baseline and run at every budget. selectors: of load_selectors();
    calibration: see runs.Selector.ways().

    Raises ValueError where one cannot serve this VLM, or a method has no such way.
    """
    named = {name: (baselines.way(name, vlm), None) for name in config.methods}
    for run, selector in selectors.items():
        # no budgets, no calibration: only a method's own way is steered to them
        own = selector.ways(config.ways, [] if config.ways else config.budgets, calibration)
        for suffix in [f" {name}" for name in config.ways] or [""]:
            named[f"{run}{suffix}"] = own[suffix], selector
    return [Answerer("all tokens")] + [Answerer(f"{name} {k}", way, k, selector)
                                       for name, (way, selector) in named.items()
                                       for k in way.budgets or config.budgets]


# ------------------------------------------------------------------------------------ one answer


def ask(config: AnswerConfig, vlm: FrozenVLM, answerer: Answerer, images: list,
        picture: QuestionBatch, question: str, vision_ms: float) -> dict:
    """One question, one answerer: the answer, and the milliseconds of each stage.

    picture: of all images together, with one row and no question
    """
    clock = Clock(vlm.device)
    stream = Stamped(vlm.tokenizer)
    way = answerer.way
    batch = vlm.batch([images], [[(question, None)]], ask_twice=way.ask_twice)
    tokens = picture.tokens()[0]
    begins = way.stages is None and (answerer.chat is None or way.reads_question)
    if begins or way.stages:
        answerer.asked = replace(picture, question=vlm.question(batch), evidence=[None],
                                 pictures=picture, texts=[question])
    if begins:
        begin_chat(vlm, answerer, images, clock)
    kept = f", {len(answerer.keep)} of {tokens}" if begins and answerer.keep is not None else ""
    anew = ", chosen for this question" if answerer.chooses_anew else ""
    print(f"{answerer.name}{kept}{anew}", end=": ", flush=True)
    if way.stages:
        answer = answer_inside(vlm, answerer, batch, clock, stream, config.max_new_tokens)
    else:
        answer = answerer.chat.ask(question, config.max_new_tokens, stream)

    start, first_token, *more = stream.at
    select_ms = 1e3 * clock.seconds.get("select", 0.)
    prefill_ms = 1e3 * (first_token - start)
    if way.stages:
        prefill_ms -= select_ms                        # it ran on the way through the prompt
    decode_ms = 1e3 * (more[-1] - first_token) / len(more) if more else None
    return {"way": answerer.name, "question": question, "answer": answer,
            "kept": tokens if answerer.keep is None else len(answerer.keep),
            "vision_ms": vision_ms, "select_ms": select_ms, "prefill_ms": prefill_ms,
            "decode_ms": decode_ms, "first_ms": vision_ms + select_ms + prefill_ms}


def begin_chat(vlm: FrozenVLM, answerer: Answerer, images: list, clock: Clock) -> None:
    """Select, and open a dialogue about what is left, with the turns so far."""
    way = answerer.way
    feats = None
    if way.gate:
        with clock("select", 1):
            feats = answering.drown(way, answerer.asked, answerer.budget)
    elif way.select:
        with clock("select", 1):
            kept, feats = answering.choose(way, answerer.asked, answerer.budget)
        answerer.keep = kept[0]
    keep = None if answerer.keep is None else [answerer.keep]
    turns = answerer.chat.turns if answerer.chat else ()
    answerer.chat = Chat(vlm, images, answerer.asked.units, keep, turns, feats)


def answer_inside(vlm: FrozenVLM, answerer: Answerer, batch, clock: Clock, stream,
                  max_new_tokens: int) -> str:
    """The answer where the selection happens inside the language model."""
    prompt = vlm.embed(batch, answerer.asked.units)
    units = answerer.asked.tokens()
    shown = Shown.of(vlm, batch, answerer.asked.units)

    def watched(rule):
        def watch(view):
            with clock("select", 1):
                chosen = rule(view)
            keep, changes = chosen if isinstance(chosen, tuple) else (chosen, {})
            origin = changes.get("origin") or [view.origin[0][keep[0]]]
            answerer.keep = shown.units_of(0, origin[0])       # those of the last stage remain
            return chosen
        return watch
    rules = answerer.way.stages(answering.wanted(answerer.budget, units[0]), units)
    rules = {layer: watched(among_units(rule)) for layer, rule in rules.items()}
    return generate_inside(vlm, prompt, rules, max_new_tokens, stream, shown=shown)[0]


# ------------------------------------------------------------------------------------ the dialogue


def open_images(config: AnswerConfig) -> list:
    """The pictures. Raises ValueError for what is wrong before anything is loaded."""
    if not config.image or not config.budgets:
        raise ValueError(f"image={config.image}, budgets={config.budgets}: expected a picture "
                         "file, and numbers of tokens")
    try:
        images = [open_picture(path) for path in config.image]
    except ValueError as error:
        raise ValueError(f"cannot read --image {error}. Expected a picture, PNG or JPEG") from error
    for path, image in zip(config.image, images):
        if cause := oblong(image):
            raise ValueError(f"cannot use --image {path}: {cause}")
    return images


def check_budgets(config: AnswerConfig, images: list) -> None:
    """Raises ValueError for more tokens than the pictures have, before a weight is read."""
    shapes = FrozenVLM.from_pretrained(config.model, device="meta", protocol=config.protocol)
    prompt = shapes.batch([images], [[("?", None)]], "cpu")
    tokens = int((prompt["input_ids"] == shapes.image_id).sum())
    if max(config.budgets) > tokens:
        raise ValueError(f"budgets={config.budgets}: expected at most the {tokens} visual tokens "
                         f"of {', '.join(config.image)}")


def questions(config: AnswerConfig, vlm: FrozenVLM, images: list) -> Iterator[str]:
    """Those of --question, once all are known to be fit; else line by line from standard input,
    saying of each unfit one what is wrong."""
    def check(question: str) -> None:
        vlm.batch([images], [[(question, None)]])
    for question in config.question:
        check(question)
    yield from config.question
    while not config.question:
        print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        try:
            check(line)
        except ValueError as error:
            print(error)
        else:
            yield line


@torch.no_grad()
def main(args: list[str] | None = None) -> list[dict]:
    parser = runs.Parser(AnswerConfig, description=__doc__)
    (config,) = parser.parse_args_into_dataclasses(args)
    images = open_images(config)
    evaluate.settle(config)
    selectors = evaluate.load_selectors(config)
    check_budgets(config, images)
    vlm = FrozenVLM.from_pretrained(config.model, getattr(torch, config.dtype), config.device,
                                    protocol=config.protocol)
    pixels = vlm.pictures([images])
    clock = Clock(vlm.device)
    lines = []
    for number, question in enumerate(questions(config, vlm, images), 1):
        if number == 1:
            first = vlm.question(vlm.batch([images], [[(question, None)]]))
            steering = [(vlm.encode(pixels), first)]
            answerers = answerers_of(config, vlm, selectors, steering.copy)
            needs = {name: what for each in answerers for name, what in each.way.needs.items()}
            warm_up(config, vlm, answerers, images, pixels, needs, question)
            with clock("vision", 1):
                units = encode(vlm, pixels, needs)
            picture = picture_of(vlm, images, pixels, units)
        vision_ms = clock.ms("vision") if number == 1 else 0.
        turn = [{"turn": number,
                 **ask(config, vlm, answerer, images, picture, question, vision_ms)}
                for answerer in answerers]
        for line in turn:                              # beside all tokens, which come first
            line["prefill_ratio"] = turn[0]["prefill_ms"] / line["prefill_ms"]
            line["first_ratio"] = turn[0]["first_ms"] / line["first_ms"]
        lines += turn
    if not lines:
        raise ValueError("no question: give --question, or one a line on standard input")
    print(f"\n{table(lines)}\n")
    out = Path(config.out)
    drawn = [each for each in answerers if each.keep is not None]
    if drawn:
        out.mkdir(parents=True, exist_ok=True)
        draw(vlm, drawn, images, picture, out / "answer.png")
    report = {"model": config.model, "device": str(vlm.device), "dtype": config.dtype,
              "images": config.image, "answers": lines}
    runs.write_text(out / "answer.json", json.dumps(report, indent=1))
    print(f"written: {', '.join(str(path) for path in sorted(out.glob('answer.*')))}")
    return lines


def picture_of(vlm: FrozenVLM, images: list, pixels, units) -> QuestionBatch:
    """What a selection may read of the images, which make one row."""
    return QuestionBatch(vlm, units, [0], [answering.content_hash(images)], pixels)


def warm_up(config, vlm, answerers: list[Answerer], images, pixels, needs, question: str) -> None:
    """Everything once, in silence: whatever runs first is slow."""
    picture = picture_of(vlm, images, pixels, encode(vlm, pixels, needs))
    with redirect_stdout(io.StringIO()):
        for answerer in answerers:
            ask(config, vlm, answerer, images, picture, question, 0.)
            answerer.chat = None


# ------------------------------------------------------------------------------------ what is shown


def table(lines: list[dict]) -> str:
    """The stages of every answer as Markdown; "x": how much faster than all tokens in the turn."""
    head = ["turn", "tokens", "kept", "vision ms", "selection ms", "prefill ms",
            "decode ms a token", "first token ms"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        decode = "-" if line["decode_ms"] is None else f"{line['decode_ms']:.1f}"
        rows.append([line["turn"], line["way"], line["kept"], f"{line['vision_ms']:.1f}",
                     f"{line['select_ms']:.1f}",
                     f"{line['prefill_ms']:.1f}, {line['prefill_ratio']:.2f}x", decode,
                     f"{line['first_ms']:.1f}, {line['first_ratio']:.2f}x"])
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def draw(vlm: FrozenVLM, drawn: list[Answerer], images: list, picture: QuestionBatch,
         path: Path) -> None:
    """What each of them kept in the last turn, over what it went by. Numbers say in which order
    they stand that were chosen for the question."""
    heats, orders = [], []
    for each in drawn:
        scores = each.scores()
        order = each.keep[:0]
        if scores is None:                             # 1 for what was kept
            scores = torch.zeros(len(picture.units.feats)).index_fill(0, each.keep.cpu(), 1.)
        elif each.way.reads_question:
            order = each.keep[scores[each.keep].argsort(descending=True)]
        heats.append(scores.float().cpu())
        orders.append(order)
    plots.draw_units(vlm, vlm.pictures([images] * len(drawn)), picture.units.rows([0] * len(drawn)),
                     torch.cat(heats), [each.keep for each in drawn],
                     [each.name for each in drawn], path, orders)


if __name__ == "__main__":
    runs.command(main)
