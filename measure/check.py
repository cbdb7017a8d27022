"""Whether everything runs right on your checkpoint and device: PASS or FAIL a line, in a minute.

    python -m measure.check llava-hf/llava-1.5-7b-hf --device cuda
    python -m measure.check tiny/llava --run results/autoselect_tiny/selector

loaded, prompt  what it is, and the exact prompt of a question: facts, no verdict
inputs          token ids and pixels are those of the stock processor
all tokens      logits are those of the stock model's forward
greedy          so are tokens and those of its generate()
pruned          logits are those of the full sequence in which a mask hides the dropped tokens
selection       --run keeps as many units as it is asked for
gradients       a training step of every method reaches all that it trains, and nothing of the VLM
memory, times   of training on a picture, and the largest --micro that fits; of answering
scenes          ten drawn scenes with questions of a word: random weights fail here, and only here

Differences of logits are the largest, in standard deviations of the reference's logits. Writes
check.json, also with hardware and versions, and ends with an exit code if a check failed.
"""

import inspect
import json
import math
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

import runs
from backbones.checkpoints import check_device
from baselines import random_tokens
from benchmarks import costs
from benchmarks.short_answers import NUMBERS, SHORT
from common import IGNORE, PROTOCOLS, FrozenVLM, Units, kept_mask
from data.batches import collate
from measure.speed import hardware
from tiny import scenes
from train import Step, train_step

# most that logits may differ [ours]; in models of 3 and 4 layers it was 4e-6, 0.01 and 0.04, with
# positions numbered anew 0.4 to 3
TOLERANCE = {"float32": 1e-4, "float16": .02, "bfloat16": .1}
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
GREEDY, REPEATS = 20, 5               # tokens to compare; calls to time, after one that is slow
SCENES, ENOUGH = 10, .7               # questions, and the share of right answers that passes [ours]
KINDS = {"colour": [*scenes.COLOURS], "shape": scenes.SHAPES, "count": [*"0123456789"], "text": []}
PLAIN = ("circle", "square", "triangle", "star", "heart", "sign")     # to which all say the same
TURNS = 7                             # questions of a training picture, as many as train.py asks


@dataclass
class Line:
    """What came out of a check; passed is None for facts."""
    name: str
    passed: bool | None
    text: str
    numbers: dict = field(default_factory=dict)


@dataclass
class Row:
    """A drawn scene and a question; kind: of KINDS."""
    kind: str
    picture: Image.Image
    question: str
    answer: str | None


@dataclass
class Subject:
    """What is checked.

    processor, is_stock  the stock one, or what stands in for it
    drawn                rows of the scenes
    square, oblong, long a row each with a square and an oblong picture, and one that is answered
                         at length
    """
    options: Namespace
    vlm: FrozenVLM
    processor: ProcessorMixin
    is_stock: bool
    selector: runs.Selector | None
    drawn: list[Row]
    square: Row
    oblong: Row
    long: Row

    def ask(self, row: Row, answer: str | None = None) -> tuple:
        """batch, units, how many of them have a token, K of them."""
        batch = self.vlm.batch([row.picture], [[(row.question, answer)]])
        units = self.vlm.encode(batch)
        n = int(units.pad()[1].sum())
        return batch, units, n, min(self.options.keep or max(1, round(n / 9)), n)

    def choose(self, batch, units: Units, k: int, seed: int = 0) -> list[Tensor]:
        """By the selector, else at random."""
        if self.selector is None:
            return random_tokens.select(units, k, seed=seed)
        return self.selector.select(units, self.vlm.question(batch), k)


# ------------------------------------------------------------------------------------ what is asked


def enlarged(vlm: FrozenVLM, scene: scenes.Scene) -> Image.Image:
    """Of a size for a real model; the tiny ones were trained on scenes as they are drawn."""
    picture, times = scenes.render(scene), 3 if vlm.width >= runs.LARGE_WIDTH else 1
    return picture.resize([times * side for side in picture.size], Image.NEAREST)


def spelled(vlm: FrozenVLM, asked: scenes.Question | None) -> tuple[str, str] | None:
    """Question and answer, written for this VLM; None if it lacks words."""
    if asked is None or vlm.unknown_words(f"{asked.question} {asked.answer}"):
        return None
    question = asked.question
    if not vlm.unknown_words(SHORT):
        question = question[0].upper() + question[1:].replace(" ?", "?") + SHORT
    return question, asked.answer


def draw(vlm: FrozenVLM, kind: str) -> list[Row]:
    """At most SCENES. Signs have colour and shape too: they stand where they are asked for."""
    found = []
    first = scenes.SPLITS["test"] + 1000 * [*KINDS].index(kind)
    for seed in range(first, first + 400):
        scene = scenes.make_scene(seed)
        if len(scene.signs) != (kind == "text"):
            continue
        asked = scenes.ASK[kind](scene, np.random.default_rng([seed, 17]))
        is_plain = asked and all(scene.things[i].kind in PLAIN for i in asked.evidence)
        if is_plain and (kind != "count" or 1 < len(asked.evidence) < 5):
            if text := spelled(vlm, asked):
                found.append(Row(kind, enlarged(vlm, scene), *text))
        if len(found) == SCENES:
            break
    return found


def draw_rows(vlm: FrozenVLM) -> dict[str, list[Row] | Row]:
    """Rows of a Subject, the kinds in turn. Raises ValueError if there are no words for any."""
    pools = [draw(vlm, kind) for kind in KINDS]
    drawn = [pool[i] for i in range(SCENES) for pool in pools if i < len(pool)][:SCENES]
    if not drawn:
        raise ValueError("this checkpoint's vocabulary spells no question about drawn scenes, such "
                         "as 'what colour is the circle ?': expected an English tokenizer")
    wide = enlarged(vlm, scenes.make_scene(scenes.SPLITS["test"], (192, 108)))
    oblong = replace(drawn[0], picture=wide)
    asked = ("Describe the image briefly.", scenes.CAPTION, oblong.question)
    question = next(text for text in asked if not vlm.unknown_words(text))
    return dict(drawn=drawn, square=drawn[0], oblong=oblong,
                long=replace(oblong, question=question, answer=None))


def training_item(vlm: FrozenVLM, number: int) -> tuple:
    """What collate() takes: (number, picture, turns, skipped), a scene of the training's."""
    for seed in range(1000 * number, 1000 * (number + 1)):
        scene = scenes.make_scene(seed)
        asked = scenes.questions(scene, np.random.default_rng([seed, 11]))
        if turns := [*filter(None, (spelled(vlm, each) for each in asked[:TURNS]))]:
            return number, enlarged(vlm, scene), turns, []
    raise ValueError("this checkpoint's vocabulary spells no question with its answer")


# ------------------------------------------------------------------------------------ what is right


def stock_processor(vlm: FrozenVLM, name: str) -> tuple[ProcessorMixin, bool]:
    """The checkpoint's own, read anew, and whether it is the stock one."""
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (ImportError, ValueError, OSError):
        processor = None
    if hasattr(processor, "image_processor"):          # else it is a mere tokenizer
        return processor, True
    return vlm.adapter.processor_class.from_pretrained(name), False


def stock_inputs(subject: Subject, row: Row) -> dict[str, Tensor]:
    """What the stock model's forward takes for a question: the stock processor's own call. Where
    the papers have them, on a padded picture and behind LLaVA's first sentence."""
    vlm, processor, picture = subject.vlm, subject.processor, row.picture
    kind, is_papers = vlm.adapter.kind, subject.options.protocol == "papers"
    if is_papers and vlm.family == "llava":
        side, (width, height) = max(picture.size), picture.size
        mean = tuple(int(255 * x) for x in processor.image_processor.image_mean)
        picture = Image.new("RGB", (side, side), mean)
        picture.paste(row.picture, ((side - width) // 2, (side - height) // 2))
    content = [{"type": kind}, {"type": "text", "text": row.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}],
                                         add_generation_prompt=True, tokenize=False)
    if is_papers and text.startswith("USER: "):
        text = SYSTEM + text.strip()
    bos = vlm.tokenizer.bos_token
    how = dict(add_special_tokens=not (bos and text.startswith(bos)), return_tensors="pt")
    if subject.is_stock:
        pictures = [[picture]] if kind == "video" else [picture]
        inputs = processor(text=[text], **{f"{kind}s": pictures}, **how)
    else:
        text = text.replace(vlm.image_token, vlm.written)
        inputs = vlm.adapter.inputs(processor, [picture], [text], **how)
        inputs["pixel_values_videos" if kind == "video" else "pixel_values"] = inputs.pop(
            "pixel_values")
    taken = inspect.signature(vlm.model.forward).parameters
    return {name: x.to(vlm.device, vlm.dtype if x.is_floating_point() else None)
            for name, x in inputs.items() if name in taken}


def gap(logits: Tensor, expected: Tensor) -> float:
    return ((logits.float() - expected.float()).abs().max() / expected.float().std()).item()


def reference(run: Callable, dtype: str) -> tuple[Tensor, float, float]:
    """run() -> logits, what another attention kernel makes of them, the gap that is allowed.

    How far sums in another order are off grows with a model's depth: hence not a constant alone.
    """
    expected = run()
    with sdpa_kernel(SDPBackend.MATH):
        kernel = gap(run(), expected)
    return expected, kernel, max(TOLERANCE[dtype], 4 * kernel)


def visible(vlm: FrozenVLM, batch, units: Units, kept: Tensor) -> Tensor:
    """(L,) bool of the only row: what pruning leaves. The tokens of a dropped unit are told by
    what is no number in it."""
    dropped = ~kept.view(-1, *[1] * (units.feats.ndim - 1))
    marked = vlm.embed(batch, units, units.feats.masked_fill(dropped, torch.nan))
    stays = ~marked.embeds[0].isnan().any(-1)
    at = batch["input_ids"][0] == vlm.image_id
    unit, line = vlm._slots(batch)
    shown, is_newline = stays[at], unit < 0
    shown[is_newline] = torch.isin(line[is_newline], line[~is_newline & shown])
    return stays.masked_scatter(at, shown)


# ------------------------------------------------------------------------------------ the checks


def check_loaded(subject: Subject) -> Line:
    vlm, config = subject.vlm, subject.vlm.model.config.text_config
    *_, n, k = subject.ask(subject.square)
    facts = {"family": vlm.family, "units": n, "of a picture": list(subject.square.picture.size),
             "K": k, "dtype": subject.options.dtype,
             "bytes of weights": sum(p.nbytes for p in vlm.parameters()),
             "vocabulary": config.vocab_size, "layers": config.num_hidden_layers,
             "positions": vlm.limit, "protocol": vlm.protocol}
    return Line("loaded", None, ", ".join(f"{key} {x}" for key, x in facts.items()), facts)


def check_prompt(subject: Subject) -> Line:
    token = subject.vlm.image_token
    text = subject.vlm.tokenizer.decode(subject.ask(subject.square)[0]["input_ids"][0])
    text = re.sub(rf"{re.escape(token)}(\s*{re.escape(token)})*",
                  lambda run: f"{token} x {run[0].count(token)}", text)
    return Line("prompt", None, repr(text), {"prompt": text})


def check_inputs(subject: Subject) -> Line:
    ids, differ, furthest = 0, [], 0.
    for row in (subject.square, subject.oblong):
        batch = subject.ask(row)[0]
        for name, x in stock_inputs(subject, row).items():
            own = batch[name.removesuffix("_videos")]
            ids += x.numel() if name == "input_ids" else 0
            if own.shape != x.shape or (not x.is_floating_point() and not own.equal(x)):
                differ.append(name)
            elif x.is_floating_point():
                furthest = max(furthest, (own.double() - x.double()).abs().max().item())
    who = type(subject.processor).__name__ + ("" if subject.is_stock else " (the stock processor "
                                              "cannot be built, mostly for want of torchvision)")
    return Line("inputs", not differ and not furthest,
                f"of {ids} ids of a square and an oblong picture {', '.join(differ) or 'none'} "
                f"differ, pixels by {furthest:.2g}, allowed 0; beside {who}",
                {"ids": ids, "differ": differ, "pixels": furthest, "tolerance": 0})


def check_all_tokens(subject: Subject) -> Line:
    vlm, gaps, equal = subject.vlm, [], []
    for row in (subject.square, subject.oblong):
        batch, units, *_ = subject.ask(row, row.answer)
        inputs = stock_inputs(subject, row)
        texts = [name for name in inputs if name.endswith(("ids", "mask"))]
        inputs |= {name: batch[name] for name in texts}            # with the answer

        def stock(inputs=inputs) -> Tensor:
            return vlm.model(**inputs, use_cache=False).logits[0]
        expected, _, allowed = reference(stock, subject.options.dtype)
        every = [valid.nonzero().flatten() for valid in units.pad()[1]]
        logits = vlm.logits(vlm.prune(batch, units, every))[0]
        gaps.append((gap(logits, expected), allowed))
        at = (batch["labels"][0, 1:] != IGNORE).nonzero().flatten()
        best = expected[at].float().topk(2).values / expected.float().std()
        is_clear = best[:, 0] - best[:, 1] > allowed
        equal += (logits[at].argmax(-1) == expected[at].argmax(-1))[is_clear].tolist()
    worst, allowed = max(gaps, key=lambda pair: pair[0] / pair[1])
    return Line("all tokens", worst <= allowed and all(equal),
                f"logits differ from the stock forward's by {worst:.2g}, allowed {allowed:.2g}; "
                f"the best is the same at {sum(equal)} of {len(equal)} answer tokens with a clear "
                "best", {"gap": worst, "tolerance": allowed, "equal": equal})


class Tokens:
    """A streamer of transformers that keeps the tokens of a row."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


def check_greedy(subject: Subject) -> Line:
    vlm, own = subject.vlm, Tokens()
    batch, units, *_ = subject.ask(subject.long)
    vlm.generate(vlm.embed(batch, units), GREEDY, own)
    inputs = stock_inputs(subject, subject.long)
    output = vlm.model.generate(
        **inputs, max_new_tokens=GREEDY, do_sample=False, temperature=None, top_p=None, top_k=None,
        repetition_penalty=1., num_beams=1, pad_token_id=vlm.tokenizer.pad_token_id,
        return_dict_in_generate=True, output_logits=True)
    tokens = output.sequences[0, inputs["input_ids"].shape[1]:].tolist()
    unequal = [i for i, pair in enumerate(zip(tokens, own.ids)) if pair[0] != pair[1]]
    same = unequal[0] if unequal else min(len(tokens), len(own.ids))
    near = False
    if unequal:                            # behind a near tie the two are about different texts
        logits = torch.cat(output.logits).float() / torch.cat(output.logits).float().std()
        near = bool(logits[same].max() - logits[same, own.ids[same]]
                    <= TOLERANCE[subject.options.dtype])
    text = vlm.tokenizer.decode(own.ids, skip_special_tokens=True)
    return Line("greedy", near or tokens == own.ids,
                f"{same} of {len(tokens)} tokens are those of the stock generate()"
                + ", then two are too near for the dtype" * near + f": {text.strip()!r}",
                {"tokens": tokens, "own": own.ids, "near tie": near})


def check_pruned(subject: Subject) -> Line:
    vlm = subject.vlm
    batch, units, n, k = subject.ask(subject.oblong, subject.oblong.answer)
    keep = random_tokens.select(units, k)
    stays, full = visible(vlm, batch, units, kept_mask(units, keep)), vlm.embed(batch, units)
    mask = torch.ones(len(stays), len(stays), dtype=torch.bool, device=vlm.device).tril() & stays
    mask = (mask | torch.eye(len(stays), dtype=torch.bool, device=vlm.device))[None, None]
    mask = {"full_attention": mask} if vlm.family == "qwen2_5_vl" else mask

    def masked() -> Tensor:
        with vlm.entering(full.later):
            return vlm.model(inputs_embeds=full.embeds, attention_mask=mask,
                             position_ids=full.pos, use_cache=False).logits[0, stays]
    expected, kernel, allowed = reference(masked, subject.options.dtype)
    own, anew = [gap(vlm.logits(prompt)[0], expected) for prompt in (
        vlm.prune(batch, units, keep), vlm.prune(batch, units, keep, positions="reindex"))]
    blind = anew <= allowed
    return Line("pruned", own <= allowed,
                f"{k} of {n} units: logits differ from those of the full sequence under a mask by "
                f"{own:.2g}, allowed {allowed:.2g}; another kernel gives {kernel:.2g}, positions "
                f"numbered anew {anew:.2g}" + ", too little to tell: try --dtype float32" * blind,
                {"gap": own, "tolerance": allowed, "kernel": kernel, "positions anew": anew})


def check_selection(subject: Subject) -> Line:
    if subject.selector is None:
        return Line("selection", None, "without --run random tokens stand in for a selector's")
    kept = []
    for row in (subject.square, subject.oblong):
        batch, units, _, k = subject.ask(row)
        keep = subject.choose(batch, units, k)
        kept_mask(units, keep)                         # raises unless ascending, and in range
        kept.append([len(keep[0]), k])
    return Line("selection", all(n == k for n, k in kept), "ascending, in range, "
                + " and ".join(f"{n} of {k} asked for" for n, k in kept), {"kept, K": kept})


def methods(vlm: FrozenVLM) -> Iterator[tuple]:
    """(name, selector with random weights, what it trains with) of all methods beside runs.py."""
    for name in runs.method_names():
        module = runs.load_method(name)
        values = runs.preset(module, vlm.width)
        own = {option.name for option in fields(module.Config)} & {*values}
        torch.manual_seed(0)
        with vlm.device:
            selector = module.Method(module.Config.of(vlm, **{key: values[key] for key in own}))
        yield name, selector.to(vlm.device), values
        selector.zero_grad(set_to_none=True)


@torch.enable_grad()
def train_on(vlm: FrozenVLM, selector, values: dict, parts: list) -> None:
    """The gradients of a first step; a large model's activations are made again, which train.py
    does where they do not fit."""
    accelerator = Accelerator(cpu=vlm.device.type == "cpu")
    items = [list(range(len(part.owner))) for part in parts]
    vlm.checkpointing(costs.is_large(vlm))
    try:
        train_step(selector.train(), vlm, parts,
                   Step(0, 100, 0, items, accelerator, values["autocast"]))
    finally:
        vlm.checkpointing(False)


def check_gradients(subject: Subject) -> Line:
    vlm, lacking, counts = subject.vlm, {}, {}
    if subject.options.dtype == "float16":
        return Line("gradients", None, "train.py takes bfloat16 and float32, not float16")
    vlm.zero_grad(set_to_none=True)
    for name, selector, values in methods(vlm):
        build = collate(vlm, selector.rows)
        parts = [build([training_item(vlm, i)]).to(vlm.device) for i in range(2)]
        train_on(vlm, selector, values, parts)
        counts[name] = len([*selector.parameters()])
        lacking[name] = [key for key, p in selector.named_parameters() if p.grad is None]
    touched = [key for key, p in vlm.named_parameters() if p.requires_grad or p.grad is not None]
    reached = [f"{name} {counts[name] - len(lacking[name])} of {counts[name]} parameters"
               + f" (not {', '.join(lacking[name])})" * bool(lacking[name]) for name in counts]
    return Line("gradients", not touched and not any(lacking.values()),
                f"a step reaches {', '.join(reached)}; of the VLM {', '.join(touched) or 'none'}",
                {"parameters": counts, "without": lacking, "of the VLM": touched})


def check_memory(subject: Subject) -> Line:
    """Of one picture and of two that are alike."""
    vlm, texts, numbers = subject.vlm, ["of training"], {}
    if subject.options.dtype == "float16":
        return Line("memory", None, "train.py takes bfloat16 and float32, not float16")
    item = training_item(vlm, 0)
    language = sum(p.nbytes for part in (vlm.lm, vlm.model.lm_head) for p in part.parameters())
    for name, selector, values in methods(vlm):
        tried = []

        def step(n: int, selector=selector, values=values, tried=tried) -> Callable:
            tried.append(n)
            batch = collate(vlm, selector.rows)([item] * n).to(vlm.device)
            return lambda: train_on(vlm, selector, values, [batch])
        try:
            fixed, each = costs.training_bytes(selector, step, vlm.device)
            clock, two = costs.Clock(vlm.device), step(2)
            with clock("step", 2):                             # what runs first has run
                two()
        except (torch.OutOfMemoryError, MemoryError):
            texts.append(f"{name}: out of memory at {tried[-1]}")
            numbers[name] = {"micro": tried[-1] - 1}
            continue
        unread = 0 if selector.reads_language else language        # train.py does not load it
        micro = costs.that_fit(each, vlm.device, values["batch"], fixed - unread)
        seconds = clock.ms("step") / 1e3
        texts.append(f"{name}: {fixed / 2**30:.3f} GiB and {each / 2**30:.3f} a picture of "
                     f"{len(item[2])} questions: --micro {micro} of {values['batch']} fits; "
                     f"{seconds:.2f} s a picture")
        numbers[name] = {"fixed bytes": fixed, "bytes a picture": each, "micro": micro,
                         "seconds_per_picture": seconds}
    return Line("memory", None, "\n".join(texts), numbers)


def check_times(subject: Subject) -> Line:
    vlm, clock, texts = subject.vlm, costs.Clock(subject.vlm.device), []
    batch, units, n, k = subject.ask(replace(subject.long, picture=subject.square.picture))
    prompts = {n: vlm.embed(batch, units),
               k: vlm.prune(batch, units, random_tokens.select(units, k))}
    for repeat in range(REPEATS + 1):
        clock = costs.Clock(vlm.device) if repeat == 1 else clock
        with clock("vision", 1):
            vlm.encode(batch)
        for tokens, prompt in prompts.items():
            stamps = costs.Stamps()
            vlm.generate(prompt, GREEDY, stamps)
            start, first, *more = stamps.at[:-1]       # the prompt's, then one a token
            clock.add(f"prefill of {tokens}", first - start, 1)
            if more:
                clock.add(f"a token behind {tokens}", more[-1] - first, len(more))
    own = [(subject.options.run, subject.selector, {})] if subject.selector else methods(vlm)
    for name, selector, _ in own:
        try:
            for repeat in range(REPEATS + 1):
                with clock(f"selection by {name}" if repeat else "warm-up", 1):
                    selector.eval().select(units, vlm.question(batch), k)
        except ValueError as error:
            texts.append(f"{name} cannot keep {k}: {error}")
    clock.items.pop("warm-up", None)
    ms = {stage: round(clock.ms(stage), 3) for stage in clock.items}
    texts = [f"{stage} {time:.3g}" for stage, time in ms.items()] + texts
    return Line("times", None, f"ms, K = {k}: " + ", ".join(texts), {"K": k, "units": n, **ms})


def is_right(answer: str, row: Row) -> bool:
    """Whether it names the truth and nothing else of its kind. A sign's letters may stand apart."""
    words = [NUMBERS.get(word, word) for word in re.findall("[a-z0-9]+", answer.lower())]
    if row.kind == "text":
        return row.answer.replace(" ", "") == "".join(words)
    return {word for word in words if word in KINDS[row.kind]} == {row.answer}


def check_scenes(subject: Subject) -> Line:
    vlm, answers = subject.vlm, []
    for seed, row in enumerate(subject.drawn):
        batch, units, _, k = subject.ask(row)
        pruned = vlm.prune(batch, units, subject.choose(batch, units, k, seed))
        whole, few = [vlm.generate(prompt, 10)[0] for prompt in (vlm.embed(batch, units), pruned)]
        answers.append({"question": row.question.removesuffix(SHORT), "truth": row.answer, "K": k,
                        "all": whole, "few": few, "right": is_right(whole, row),
                        "right with few": is_right(few, row)})
    right, right_few = [sum(each[key] for each in answers) for key in ("right", "right with few")]
    least, rule = math.ceil(ENOUGH * len(answers)), subject.options.run or "random tokens"
    texts = [f"{each['question']} {each['truth']}: {each['all']!r}, with {each['K']} "
             f"{each['few']!r}" for each in answers]
    head = (f"{right} of {len(answers)} right with all tokens, expected {least}; {right_few} with "
            f"{rule}. Random weights fail this, and only this")
    return Line("scenes", right >= least, "\n".join([head, *texts]),
                {"right": right, "right with few": right_few, "expected": least, "rule": rule,
                 "answers": answers})


CHECKS = (check_loaded, check_prompt, check_inputs, check_all_tokens, check_greedy, check_pruned,
          check_selection, check_gradients, check_memory, check_times, check_scenes)


# ------------------------------------------------------------------------------------ the command


def parse(args: list[str]) -> Namespace:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", help="folder or hub id of the frozen VLM")
    add("--run", help="a selector: its run, its folder or hub id")
    add("--keep", type=int, default=0, help="K, kept tokens; 0: a ninth, the papers' fewest")
    add("--protocol", default="papers", choices=PROTOCOLS, help="of pictures and prompts")
    add("--dtype", default=runs.DTYPE, choices=TOLERANCE, help="of the frozen VLM")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:1")
    add("--random_weights", action="store_true", help="build the model from its config alone")
    add("--out", default="runs/check", help="folder of check.json and check.md")
    options = parser.parse_args(args)
    runs.check_options(options, keep=0)
    runs.writable(options.out)
    return options


def load(options: Namespace) -> Subject:
    """Raises before a weight is read where device, checkpoint or selector are of no use."""
    dtype, selector = getattr(torch, options.dtype), None
    check_device(options.device, dtype)
    if ":" in options.device:
        torch.cuda.set_device(options.device)          # which accelerate then takes
    shapes = FrozenVLM.from_pretrained(options.model, dtype, "meta", protocol=options.protocol)
    if options.run:
        selector, _ = runs.load_selector(options.run, shapes, options.device)
        if selector.rows == "question twice":
            raise ValueError(f"run={options.run!r} selects inside the language model: expected a "
                             "selector in front of it")
    rows = draw_rows(shapes)
    vlm = FrozenVLM.from_pretrained(options.model, dtype, options.device, protocol=options.protocol,
                                    random_weights=options.random_weights)
    return Subject(options, vlm, *stock_processor(vlm, options.model), selector, **rows)


@torch.no_grad()
def examine(subject: Subject) -> Iterator[Line]:
    """The line of every check; one that raises has failed, and the others still come."""
    for check in CHECKS:
        try:
            yield check(subject)
        except (ValueError, RuntimeError, LookupError) as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            yield Line(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def main(args: list[str]) -> list[dict]:
    start, options = time.perf_counter(), parse(args)
    subject, lines, verdicts = load(options), [], []
    for line in examine(subject):
        verdict = {True: "PASS", False: "FAIL", None: "    "}[line.passed]
        print(f"{verdict} {line.name}: " + line.text.replace("\n", "\n         "), flush=True)
        lines.append(asdict(line))
        if line.passed is not None:
            verdicts.append(f"{verdict} {line.name}: {line.text.splitlines()[0]}")
    seconds, path = round(time.perf_counter() - start, 1), Path(options.out) / "check.json"
    report = {"command": " ".join(["python -m measure.check", *args]), "seconds": seconds,
              **hardware(subject.vlm.device), "lines": lines}
    runs.write_text(path, json.dumps(report, indent=1) + "\n")
    runs.write_text(path.with_suffix(".md"), "\n".join(["```", *verdicts, "```"]) + "\n")
    print(f"written: {path}, and its verdicts as check.md, after {seconds} s")
    if failed := [line["name"] for line in lines if line["passed"] is False]:
        raise RuntimeError(f"{len(failed)} of {len(lines)} checks failed: {', '.join(failed)}")
    return lines


if __name__ == "__main__":
    runs.command(main)
