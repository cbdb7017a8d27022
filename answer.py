"""Questions about pictures, answered with all visual tokens and with few: `python answer.py --image photo.png`.

Prints every answer as its tokens are made, then the time of each stage beside that of all tokens in the same run.
Writes answer.png, the pictures as the vision encoder sees them with the kept tokens, and answer.json. Several
questions, or without any the lines of standard input up to an empty one, are the turns of one dialogue.

A selector that reads no question (AutoSelect, the reconstruction selector, baselines) chooses once; later turns are
read behind the pruned cache. StepPrune reads the question: it chooses anew in every turn, and the dialogue is read
again. So does a reconstruction selector inside the language model, which is asked each question by itself.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, TextStreamer

from benchmarks.batches import oblong
from benchmarks.folder import open_picture
from benchmarks.speed import Clock
from common import Chat, FrozenVLM, Units
from evaluate import BASELINES, INSIDE, bias_of, check, crop_by_crop, draw_views, longest
from stepprune import StepPrune
from train import load_run, option, write_whole

# those that choose before the language model, once for all questions, and merge nothing into what they keep
PLAIN = [name for name in BASELINES if name not in ("cdpruner", "visionzip", "prumerge", "prumerge+", "tome")]


@dataclass
class AnswerConfig:
    image: list[str] = field(default_factory=list, metadata={
        "help": "picture files; several stand in front of the first question, in order; for a video family, frames"})
    question: list[str] = field(default_factory=list, metadata={"help": "turns of a dialogue [from standard input]"})
    run: list[str] = field(default_factory=list, metadata={
        "help": "folders of trained selectors [the latest in runs/; none if --model is given]"})
    model: str | None = option(None, "the frozen VLM [the run's own]")
    methods: list[str] = field(default_factory=list, metadata={"help": f"baselines beside the runs: {PLAIN}"})
    budgets: list[int] = field(default_factory=lambda: [48, 16], metadata={
        "help": "K, kept tokens of all pictures together; the mean of them where the selector decides [ours]"})
    max_new_tokens: int = option(64, "most tokens of an answer [ours]")
    exact: bool = option(False, "stepprune: keep exactly K, which needs no calibration")
    max_keep: int | None = option(None, "stepprune: most tokens it may keep [twice the T_max it was trained with]")
    calibration: int = option(2000, "stepprune: questions, of the tiny world, that find the stop bias for a mean of K")
    out: str = option("runs/answer", "folder of answer.png and answer.json")
    dtype: str = option("bfloat16", "of the frozen VLM", choices=["bfloat16", "float32", "float16"])
    random_weights: bool = option(False, "build --model from its config alone: to time it, for it answers nothing")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run")


@dataclass
class Way:
    """One way to answer: select(units, question) -> [(K,)], what is kept, in the order of picking; None keeps all. With
    `layer` it is select(states, valid) in front of this layer. scores(the same) -> what it goes by, one a unit.

    anew: it reads the question. chat, seen, order: of the last turn; what select() was given, and returned.
    """
    name: str
    select: Callable | None = None
    scores: Callable | None = None
    anew: bool = False
    layer: int = 0
    chat: Chat | None = None
    seen: tuple = ()
    order: torch.Tensor | None = None

    def heat(self, size: int) -> torch.Tensor:
        """(size,) scores or, where there are none, 1 for what was kept."""
        return (self.scores(*self.seen).flatten().float().cpu() if self.scores else
                torch.zeros(size).index_fill(0, self.order.cpu(), 1.))


class Stamped(TextStreamer):
    """Prints text as it is made; at: when the prompt went in, then when each token came."""

    def put(self, value):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at = [*getattr(self, "at", ()), time.perf_counter()]
        super().put(value)


def ways_of(cfg: AnswerConfig, vlm: FrozenVLM, runs: list[str]) -> list[Way]:
    """All tokens, then every baseline and run at every budget."""
    ways = [Way("all tokens")] + [Way(f"{name} {k}", lambda units, _, name=name, k=k: BASELINES[name].select(units, k))
                                  for name in cfg.methods for k in cfg.budgets]
    for run in runs:
        selector, config = load_run(run, vlm)
        biases = None if cfg.exact else bias_of(cfg, vlm, selector)
        ways += [Way(f"{run} {k}", *trained_way(cfg, selector, config, k, biases)) for k in cfg.budgets]
    return ways


def trained_way(cfg: AnswerConfig, net, config, k: int, biases: dict | None) -> tuple:
    """select, scores, anew, layer of a Way."""
    if isinstance(net, StepPrune):
        how = dict(least=k, most=k) if cfg.exact else dict(stop_bias=biases[k], most=longest(cfg, net))
        return lambda units, question: net.picks(*units.pad(), *question, **how), None, True
    if getattr(config, "condition", 0):
        return lambda states, valid: net.select(states, valid, k), net.scores, True, config.condition
    if config.method == "recon":                       # view by view, as it was trained
        return (lambda units, _: crop_by_crop(net, units, k),
                lambda units, _: units.apart().flat(net.scores(*units.apart().pad())))
    return lambda units, _: net.select(*units.pad(), k), lambda units, _: units.flat(net.scores(*units.pad()))


def ask(cfg: AnswerConfig, vlm: FrozenVLM, way: Way, images, units: Units, question: str, vision_ms: float) -> dict:
    """One question, one way: the answer, and the milliseconds of each stage."""
    clock, stream = Clock(vlm.device), Stamped(vlm.tokenizer, skip_special_tokens=True)
    size = int(units.pad(units.image_of)[1].sum())     # units that have a token

    def select(*seen):
        with clock("select", 1):
            orders = way.select(*seen)
        way.seen, way.order = seen, orders[0]
        return orders
    fresh, alone = way.anew or way.chat is None, [[(question, None)]]
    if way.select and fresh and not way.layer:
        select(units, vlm.question(vlm.batch([images], alone)))
    print(way.name + (f", {len(way.order)} of {size}" if way.select and not way.layer else "") +
          ", chosen for this question" * way.anew, end=": ", flush=True)
    if way.layer:
        prompt = vlm.embed(vlm.batch([images], alone, twice=True), units)
        rule = {way.layer: lambda look: select(look.states, look.valid)}
        answer = vlm.generate_within(prompt, rule, cfg.max_new_tokens, stream)[0]
    else:
        if fresh:
            keep, said = [way.order.sort().values] if way.select else None, way.chat.turns if way.chat else ()
            way.chat = Chat(vlm, images, units, keep, said)
        answer = way.chat.ask(question, cfg.max_new_tokens, stream)
    select_ms, (start, first, *more) = clock.ms("select") if "select" in clock.items else 0., stream.at
    prefill_ms = 1e3 * (first - start) - select_ms * (way.layer > 0)
    return {"way": way.name, "question": question, "answer": answer, "kept": len(way.order) if way.select else size,
            "vision_ms": vision_ms, "select_ms": select_ms, "prefill_ms": prefill_ms,
            "decode_ms": 1e3 * (more[-1] - first) / len(more) if more else None,
            "first_ms": vision_ms + select_ms + prefill_ms}


def table(lines: list[dict]) -> str:
    """The stages of every answer as Markdown; "x": how much faster than all tokens in the same turn."""
    out = ["| turn | tokens | kept | vision ms | selection ms | prefill ms | decode ms a token | first token ms |",
           "|" + "---|" * 8]
    for x in lines:
        decode = "-" if x["decode_ms"] is None else f"{x['decode_ms']:.1f}"
        out.append("| {turn} | {way} | {kept} | {vision_ms:.1f} | {select_ms:.1f} | {prefill_ms:.1f}, "
                   "{prefill_ratio:.2f}x | {decode} | {first_ms:.1f}, {first_ratio:.2f}x |".format(**x, decode=decode))
    return "\n".join(out)


def opened(cfg: AnswerConfig) -> list:
    """The pictures. Raises ValueError for what can be seen to be wrong before anything is loaded."""
    if not cfg.image or not cfg.budgets or min(*cfg.budgets, cfg.max_new_tokens) < 1 or {
            *cfg.methods} & ({*BASELINES, *INSIDE, "evidence"} - {*PLAIN}):
        raise ValueError(f"image={cfg.image}, budgets={cfg.budgets}, max_new_tokens={cfg.max_new_tokens}, methods="
                         f"{cfg.methods}: expected a picture file, numbers from 1, and methods of {PLAIN}")
    try:
        images = [open_picture(path) for path in cfg.image]
    except ValueError as error:
        raise ValueError(f"cannot read --image {error}. Expected a picture, PNG or JPEG") from error
    for path, why in zip(cfg.image, map(oblong, images)):
        if why:
            raise ValueError(f"cannot use --image {path}: {why}")
    return images


def questions(cfg: AnswerConfig, vlm: FrozenVLM, images) -> Iterator[str]:
    """Those of --question, once all are known to be fit; else line by line, saying of each unfit one what is wrong."""
    def fit(question):
        vlm.batch([images], [[(question, None)]])
        return question
    yield from [fit(question) for question in cfg.question]
    while not cfg.question:
        print("> ", end="", flush=True)
        if not (line := sys.stdin.readline().strip()):
            return
        try:
            yield fit(line)
        except ValueError as error:
            print(error)


@torch.no_grad()
def main(args=None) -> list[dict]:
    (cfg,) = HfArgumentParser(AnswerConfig, description=__doc__).parse_args_into_dataclasses(args)
    images, (runs, model) = opened(cfg), check(cfg)
    vlm = FrozenVLM.from_pretrained(model, getattr(torch, cfg.dtype), cfg.device, random_weights=cfg.random_weights)
    asked, pictures, clock, lines = questions(cfg, vlm, images), vlm.pictures([images]), Clock(vlm.device), []
    ways, look = [], {name: what for each in cfg.methods for name, what in BASELINES[each].look(vlm).items()}
    for number, question in enumerate(asked, 1):
        if number == 1:                                # all once in silence, for whatever runs first is slow
            ways = ways_of(cfg, vlm, runs)
            units = vlm.encode(pictures, look)
            with redirect_stdout(io.StringIO()):
                for way in ways:
                    ask(cfg, vlm, way, images, units, question, 0.)
                    way.chat = None
            with clock("vision", 1):
                units = vlm.encode(pictures, look)
        ms = clock.ms("vision") if number == 1 else 0.
        found = [{"turn": number, **ask(cfg, vlm, way, images, units, question, ms)} for way in ways]
        for x in found:
            x |= {f"{stage}_ratio": found[0][f"{stage}_ms"] / x[f"{stage}_ms"] for stage in ("prefill", "first")}
        lines += found
    if not lines:
        raise ValueError("no question: give --question, or one a line on standard input")
    print(f"\n{table(lines)}\n")
    out, size = Path(cfg.out), len(units.feats)
    out.mkdir(parents=True, exist_ok=True)
    # not drawn: where newlines stood among what was chosen from
    drawn = [(way, heat) for way in ways if way.select and len(heat := way.heat(size)) == size]
    if drawn:
        draw_views(vlm, vlm.adapter.pixels(pictures) * len(drawn), units.rows([0] * len(drawn)),
                   torch.cat([heat for _, heat in drawn]), [way.order.sort().values for way, _ in drawn],
                   [way.name for way, _ in drawn], out / "answer.png",
                   [way.order if way.anew and not way.layer else way.order[:0] for way, _ in drawn])
    found = {"model": model, "device": str(vlm.device), "dtype": cfg.dtype, "images": cfg.image, "answers": lines}
    write_whole(out / "answer.json", lambda p: p.write_text(json.dumps(found, indent=1)))
    print(f"written: {', '.join(str(p) for p in sorted(out.glob('answer.*')))}")
    return lines


if __name__ == "__main__":
    main()
