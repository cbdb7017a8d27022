"""The site of page/: small ONNX files of the tiny VLM and of trained selectors, scenes, sources.

    python -m page.export --run results/autoselect_tiny/selector --methods random --out runs/page

What a browser runs, all in float32:

    see.onnx            pixels (1, 3, H, W) 0..255 -> feats (1, N, C), tokens (1, N, D), readings
    speak.onnx          embeds (1, S, D), pos (1, S) -> logits (1, V) of the next word
    <method>.onnx       feats [, words (1, L, D)] -> scores (1, N), of a method that ranks
    <method>_begin.onnx feats, words, fallen (1, 1) -> memory (1, N+1, C) and keys
    <method>_pick.onnx  x (1, 1, C), keys, cache -> logits (1, N+1), cache; of one that picks
    words.bin           (V, D) float32, the language model's own embeddings

Beside them world.json, all else that the page has to know, scenes as PNG, and the project's files
as pages, for links to a line. Methods and baselines are named on the command line, and what is
said of them stands in notes.json; there is no list of them here.
"""

import ast
import json
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.hf_argparser import HfArg

import baselines
import runs
from baselines.encoder import read, watch
from benchmarks import answering, tiny_world
from benchmarks.questions import Question
from common import FrozenVLM, Units
from runs import many
from tiny import scenes

HERE = Path(__file__).resolve().parent
RUNTIME = "onnxruntime-web@1.30.0"                    # of the npm registry
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GLYPH = 18                                            # side of a letter's picture in pixels


@dataclass
class ExportConfig:
    run: list[str] = many([], "selectors' folders, in the order of the page")
    methods: list[str] = many([], "baselines in front of them")
    model: str = HfArg(default="tiny/llava", help="the frozen VLM: it has to know the tiny world")
    scenes: int = HfArg(default=40, help="scenes of the test split")
    calibration: int = HfArg(default=600, help="questions that steer a method to a mean [ours]")
    runtime: bool = HfArg(default=True, help="fetch onnxruntime-web with npm, if it is not there")
    out: str = HfArg(default="runs/page", help="folder of the site")

    def __post_init__(self):
        runs.check_options(self, scenes=1, calibration=1)
        if unknown := sorted({*self.methods} - {*baselines.names()}):
            raise ValueError(f"methods={unknown}: known are {', '.join(baselines.names())}")


# ------------------------------------------------------------------------------------ the models


class See(nn.Module):
    """Pixels as the browser has them -> features, the tokens that the language model reads, and the
    named readings. needs: as in baselines/encoder.py, all of one number a token."""

    def __init__(self, vlm: FrozenVLM, needs: dict):
        super().__init__()
        self.vlm, self.needs = vlm, needs
        process = vlm.processor.image_processor
        self.mean = 255 * torch.tensor(process.image_mean)[:, None, None]
        self.std = 255 * torch.tensor(process.image_std)[:, None, None]

    def forward(self, pixels: Tensor):
        batch = {"pixel_values": (pixels - self.mean) / self.std}
        adapter = self.vlm.adapter
        with watch(adapter, {layer for _, layer in self.needs.values()}) as (inputs, _):
            feats, _ = adapter.encode(batch)
        readings = [read(adapter, what, layer, *inputs[layer], batch)[None]
                    for what, layer in self.needs.values()]
        return feats[None], self.vlm.project(feats)[None], *readings


class Speak(nn.Module):
    """Logits of the word behind a prompt, every token at its own position."""

    def __init__(self, vlm: FrozenVLM):
        super().__init__()
        self.vlm = vlm

    def forward(self, embeds: Tensor, pos: Tensor):
        n = embeds.shape[1]
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        states = self.vlm.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=pos,
                             use_cache=False).last_hidden_state
        return self.vlm.model.lm_head(states[:, -1])


class Rank(nn.Module):
    """What a selector's select() goes by, of one picture and, if it reads it, one question."""

    def __init__(self, selector, grid: tuple[int, int]):
        super().__init__()
        self.selector, self.grid = selector, grid

    def forward(self, feats: Tensor, words: Tensor | None = None):
        units = Units(feats[0], torch.zeros(feats.shape[1], dtype=torch.int64), [self.grid])
        question = None if words is None else (words, torch.ones(words.shape[:2]).bool())
        return self.selector.scores(units, question)[None]


class Begin(nn.Module):
    """What an episode of picks reads at every step: made once."""

    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, feats: Tensor, words: Tensor, fallen: Tensor):
        here, there = (torch.ones(x.shape[:2]).bool() for x in (feats, words))
        memory = self.selector.memory(feats, here, words, there, fallen=fallen[0])
        *layers, key = self.selector.decoder.project(memory)
        return memory, *[x for pair in layers for x in pair], key


class Cache:
    """Keys and values of the picks so far, a pair of every layer, as the decoder grows them."""

    def __init__(self, pairs: list):
        self.pairs = pairs

    def add(self, layer: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.pairs[layer] = tuple(torch.cat(pair, 2) for pair in zip(self.pairs[layer], new))
        return self.pairs[layer]


class Pick(nn.Module):
    """One step: the newest pick, what Begin gave and the picks before -> logits, grown cache."""

    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, x: Tensor, keys: list[Tensor], cache: list[Tensor]):
        *layers, key = keys
        projected = [*zip(layers[::2], layers[1::2]), key]
        cache = Cache([*zip(cache[::2], cache[1::2])])
        is_open = torch.ones(key.shape[:2], dtype=torch.bool)
        logits = self.selector.decoder(x, cache, projected, is_open)
        return logits[:, 0], *[x for pair in cache.pairs for x in pair]


class NoPadding(TorchFunctionMode):
    """One picture has no padding: masks are full, what they take, or fill, is all there is. In an
    exported graph no size and no branch may depend on data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            return args[0].flatten(0, args[1].dim() - 1)
        if func is Tensor.masked_scatter:
            return args[2].reshape(args[0].shape)
        if func is Tensor.__bool__:                    # is there a word, a token, in every row?
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def plain_attention():
    """The fused kernel of a Transformer layer has no counterpart in ONNX."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@torch.no_grad()
def save(model: nn.Module, path: Path, given: dict, gives: list[str], grows: dict | None = None
         ) -> None:
    """given: name -> example, a tensor or a list of them; grows: name -> its axis of any length.

    Raises ImportError where the packages for it are missing.
    """
    if lacking := [name for name in ("onnx", "onnxscript") if not find_spec(name)]:
        raise ImportError(f"{' and '.join(lacking)} missing, which write the page's models: pip "
                          "install -r page/requirements.txt")
    def names(name, x):
        return [f"{name}_{i}" for i in range(len(x))] if isinstance(x, list) else [name]
    axes = {}
    for name, x in given.items():
        axis = {grows[name]: torch.export.Dim.DYNAMIC} if grows and name in grows else {}
        axes[name] = [axis] * len(x) if isinstance(x, list) else axis
    with plain_attention(), NoPadding():
        program = torch.onnx.export(
            model.eval(), kwargs=given, dynamo=True, verbose=False, dynamic_shapes=axes,
            input_names=[each for name, x in given.items() for each in names(name, x)],
            output_names=gives)
    program.save(path)


# ------------------------------------------------------------------------------------ the ways


@dataclass
class Entry:
    """One method of the page.

    kind    "all"; "draw", a permutation of its own for every picture; "reading", an output of
            see.onnx; "scores", a model of its own; "steps", a model that picks, adaptive
    source  its file; reads_question: whether every question has a choice of its own
    """
    name: str
    kind: str
    source: str = ""
    reads_question: bool = False
    steps: dict | None = None


def orders(way, asked, tokens: int) -> list[list[int]]:
    """In which order a baseline keeps the tokens of each picture; none where what it keeps of K is
    no part of what it keeps of K + 1."""
    kept = [[set()] for _ in asked.owner]
    for k in range(1, tokens + 1):
        for row, keep in zip(kept, way.select(asked, k)):
            row.append({*keep.tolist()})
    if any(len(more - less) != 1 for row in kept for less, more in zip(row, row[1:])):
        return []
    return [[(more - less).pop() for less, more in zip(row, row[1:])] for row in kept]


def of_baseline(name: str, way, asked, folder_scenes: list[dict]) -> tuple[Entry, dict]:
    """Its entry, and what see.onnx has to read for it."""
    module, _ = baselines.modules()[name]
    source = str(Path(module.__file__).relative_to(runs.ROOT))
    if baselines.kind(name) != "before" or way.reads_question or len(way.needs) > 1:
        raise ValueError(f"methods={name!r}: the page shows baselines that choose by one reading "
                         "of the encoder, or by none")
    kept = orders(way, asked, asked.units.counts[0])
    if not kept:
        raise ValueError(f"methods={name!r} does not rank: what it keeps of K is no part of what "
                         "it keeps of K + 1, as the page takes it")
    if not way.needs:
        for scene, order in zip(folder_scenes, kept):
            scene.setdefault("drawn", {})[name] = order
        return Entry(name, "draw", source), {}
    ((reading, what),) = way.needs.items()
    if what[0] not in ("cls", "received"):
        raise ValueError(f"methods={name!r} reads {what[0]!r}: the page shows one number a token")
    scores, _ = asked.units.pad(asked.units.readings[reading])
    if kept != scores.argsort(dim=1, descending=True, stable=True).tolist():
        raise ValueError(f"methods={name!r} does not rank by what it reads")
    return Entry(name, "reading", source), {name: what}


def of_selector(selector, about: dict, vlm, out: Path, calibration) -> Entry:
    """Its models, written, and its entry."""
    name = about["method"]
    tokens, grid = vlm.adapter.side ** 2, (vlm.adapter.side, vlm.adapter.side)
    feats, words = torch.zeros(1, tokens, vlm.width), torch.zeros(1, 6, vlm.dim)
    if selector.rows == "question twice":
        raise ValueError(f"run of {name}: selects inside the language model, which the page does "
                         "not show; expected a selection before it")
    entry = Entry(name, "scores", f"{name}.py", selector.reads_question)
    if not selector.adaptive:
        given = {"feats": feats} | ({"words": words} if selector.reads_question else {})
        save(Rank(selector, grid), out / f"{name}.onnx", given, ["scores"], {"words": 1})
        return entry
    begin = {"feats": feats, "words": words, "fallen": torch.zeros(1, 1)}
    _, *keys = Begin(selector)(*begin.values())
    names = [f"keys_{i}" for i in range(len(keys))]
    save(Begin(selector), out / f"{name}_begin.onnx", begin, ["memory", *names], {"words": 1})
    heads = selector.cfg.heads
    cache = [torch.zeros(1, heads, 3, vlm.width // heads)
             for _ in range(2 * len(selector.decoder.layers))]
    grown = [f"grown_{i}" for i in range(len(cache))]
    save(Pick(selector), out / f"{name}_pick.onnx",
         {"x": selector.start[None, None], "keys": keys, "cache": cache}, ["logits", *grown],
         {"cache": 2})
    most = min(selector.most_kept, tokens)
    steering = selector.calibrated(list(range(1, most // 2 + 1)), calibration, most)
    entry.kind = "steps"
    entry.steps = {"most": most, "tau": selector.cfg.tau_pointer, "steering": steering,
                   "start": selector.start.tolist(), "caches": len(cache), "keys": len(keys),
                   "empty": [1, heads, 0, vlm.width // heads]}
    return entry


# ------------------------------------------------------------------------------------ the world


def scene_of(row: tiny_world.Row) -> dict:
    """What the page has to know of a scene."""
    things = [asdict(thing) | {"fill": fill_of(thing, row.image)} for thing in row.scene.things]
    return {"name": str(row.id), "things": things,
            "questions": [asdict(question) for question in row.questions]}


def fill_of(thing: scenes.Thing, image: Image.Image) -> list[int]:
    """The colour that a thing has in the picture, which differs a little from its name's."""
    x0, y0, x1, y1 = thing.box
    pixels = np.asarray(image, np.float32)[y0:y1, x0:x1].reshape(-1, 3)
    near = abs(pixels - scenes.COLOURS[thing.colour]).max(1) < 40
    return np.median(pixels[near], 0).round().astype(int).tolist()


def glyphs() -> dict[str, list[int]]:
    """Every letter of a sign as Pillow draws it, (GLYPH * GLYPH) shares of ink 0..255, the middle
    of its cell in the middle."""
    drawn = {}
    for letter in scenes.LETTERS:
        picture = Image.new("L", (GLYPH, GLYPH))
        ImageDraw.Draw(picture).text((GLYPH / 2, GLYPH / 2), letter, font=scenes.FONT, fill=255,
                                     anchor="mm")
        drawn[letter] = np.asarray(picture).flatten().tolist()
    return drawn


def prompt_of(vlm: FrozenVLM, image: Image.Image) -> dict:
    """Token ids before the image, and around a question behind it."""
    asked = vlm.batch([image], [[("a", None)]])
    ids, (word,) = asked["input_ids"][0].tolist(), asked["question_ids"][0].tolist()
    first = ids.index(vlm.image_id)
    behind = ids[first + ids.count(vlm.image_id):]
    at = behind.index(word)
    return {"before": ids[:first], "between": behind[:at], "after": behind[at + 1:]}


def line_of(path: Path, name: str) -> int:
    """Where `name`, such as Class.function, is defined. Raises ValueError if it is not."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise ValueError(f"notes.json links {name} of {path.name}: there is no such thing")
        node, body = found[0], found[0].body
    return node.lineno


def notes(entries: list[Entry], out: Path) -> dict:
    """notes.json with a link of every note, to its line of the file's page in out/code."""
    said = json.loads((HERE / "notes.json").read_text(encoding="utf-8"))
    known = {entry.name for entry in entries}
    for entry in entries:                              # a method without a note has its first line
        if entry.name not in said["methods"]:
            text = ast.get_docstring(ast.parse((runs.ROOT / entry.source).read_text())) or ""
            said["methods"][entry.name] = {"label": entry.name, "says": text.split("\n\n")[0]}
    said["methods"] = {name: note for name, note in said["methods"].items() if name in known}
    files = set()
    for note in [*said["controls"].values(), *said["methods"].values()]:
        if "file" in note:
            files.add(note["file"])
            line = line_of(runs.ROOT / note["file"], note["name"])
            note["href"] = f"code/{note['file']}.html#L-{line}"
    for file in files:
        write_code(runs.ROOT / file, out / "code" / f"{file}.html")
    return {"controls": said["controls"], "notes": said["methods"]}


def write_code(path: Path, page: Path) -> None:
    """A file of the project as a page whose lines can be linked."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    page.parent.mkdir(parents=True, exist_ok=True)
    style = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
    body = highlight(path.read_text(encoding="utf-8"), PythonLexer(), style)
    up = "../" * len(path.relative_to(runs.ROOT).parts)
    runs.write_text(page, (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{path.name}</title>\n'
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f'<link rel="stylesheet" href="{up}code.css">\n<h1>{path.relative_to(runs.ROOT)}</h1>\n'
        f"{body}</html>\n"))


def runtime(folder: Path) -> None:
    """onnxruntime-web's files for plain wasm. Raises OSError where npm cannot fetch them."""
    if all((folder / name).exists() for name in RUNTIME_FILES):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        packed = subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=folder, check=True,
                                capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        cause = " ".join((getattr(error, "stderr", "") or str(error)).split())[:200]
        raise OSError(f"npm cannot fetch {RUNTIME} ({cause}): the page runs its models with it, "
                      "install node and npm, or allow the registry") from error
    for name in RUNTIME_FILES:
        subprocess.run(["tar", "-xzf", packed, "--strip-components=2", f"package/dist/{name}"],
                       cwd=folder, check=True)
    (folder / packed).unlink()


# ------------------------------------------------------------------------------------ the site


def to_question(row: tiny_world.Row) -> Question:
    return tiny_world.question_of(row, 0, row.questions[0])


@torch.no_grad()
def export(config: ExportConfig) -> Path:
    """Write the site. Returns its folder."""
    out = runs.writable(config.out)
    shapes = FrozenVLM.from_pretrained(config.model, device="meta")
    if shapes.family != "llava" or {*scenes.vocabulary()} - {*shapes.tokenizer.get_vocab()}:
        raise ValueError(f"model={config.model!r}: expected a LLaVA-1.5 that knows the words of "
                         "the tiny world, such as tiny/llava")
    selectors = [runs.load_selector(run, shapes, "cpu") for run in config.run]
    vlm = FrozenVLM.from_pretrained(config.model, torch.float32)
    for name in ("models", "scenes"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rows = [row for row in tiny_world.load_rows(20 * config.scenes)
            if len(row.questions) > 3][:config.scenes]
    shown = [scene_of(row) for row in rows]
    for row in rows:
        row.image.save(out / "scenes" / f"{row.id}.png", optimize=True)
        empty = scenes.render(scenes.Scene(row.id, row.scene.size))
        empty.save(out / "scenes" / f"{row.id}_empty.png", optimize=True)

    ways = {name: baselines.way(name, vlm) for name in config.methods}
    asked = answering.ask(vlm, [to_question(row) for row in rows], *ways.values())
    entries, needs = [Entry("all", "all")], {}
    for name, way in ways.items():
        entry, need = of_baseline(name, way, asked, shown)
        entries.append(entry)
        needs |= need
    steering = tiny_world.load(split="calibration", n=config.calibration)
    side = vlm.adapter.side * vlm.unit_side
    save(See(vlm, needs), out / "models/see.onnx", {"pixels": torch.zeros(1, 3, side, side)},
         ["feats", "tokens", *needs])
    save(Speak(vlm), out / "models/speak.onnx",
         {"embeds": torch.zeros(1, 30, vlm.dim), "pos": torch.arange(30)[None]}, ["logits"],
         {"embeds": 1, "pos": 1})
    for selector, about in selectors:
        batches = answering.calibration_batches(vlm, steering, 32)
        entries.append(of_selector(selector.float(), about, vlm, out / "models", batches))
    words = vlm.lm.get_input_embeddings().weight
    (out / "models/words.bin").write_bytes(words.float().numpy().tobytes())

    vocabulary = vlm.tokenizer.get_vocab()
    special = [*vlm.tokenizer.all_special_tokens]
    world = {
        "shapes": scenes.SHAPES, "colours": scenes.COLOURS, "letters": scenes.LETTERS,
        "cell": scenes.CELL, "most": scenes.MOST, "rows": scenes.ROWS, "columns": scenes.COLUMNS,
        "side": side, "grid": vlm.adapter.side, "caption": scenes.CAPTION,
        "glyph": GLYPH, "glyphs": glyphs(),
        "vocabulary": {word: i for word, i in vocabulary.items() if word not in special},
        "width": vlm.dim, "ends": vlm.ends().tolist(), "limit": tiny_world.LIMIT,
        "positions": vlm.limit, "prompt": prompt_of(vlm, rows[0].image), "scenes": shown,
        "methods": [asdict(entry) for entry in entries], **notes(entries, out)}
    if config.runtime:
        runtime(out / "runtime")
    shutil.copytree(HERE / "site", out, dirs_exist_ok=True)
    # last: with it the site is whole
    runs.write_text(out / "world.json", json.dumps(world, separators=(",", ":")))
    return out


def main(args: list[str]) -> None:
    parser = runs.Parser(ExportConfig, description=__doc__)
    (config,) = parser.parse_args_into_dataclasses(args)
    out = export(config)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; serve it with python -m http.server -d {out}")


if __name__ == "__main__":
    runs.command(main)
