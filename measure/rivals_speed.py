"""Time of rivals' selections, on random features of CLIP-L's width, alone or against older code.

    python -m measure.rivals_speed --methods divprune cdpruner_words pact
    git worktree add /tmp/former HEAD~1
    python -m measure.rivals_speed --against /tmp/former --out results/rivals_speed/paired.md

With --against, both checkouts select in one run, by turns, from the same features; the table has
the ratio of the medians, and whether they chose the same. Of a rival inside the language model what
is timed is its rule in front of one random layer of that width. Only ratios mean something.
"""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import runs
from backbones.checkpoints import check_device
from measure.speed import markdown, seconds

WIDTH = 1024                               # of CLIP-L [ours]
HEADS = 16
TEXT = 20                                  # tokens of a question, and around the picture [ours]


@contextmanager
def checkout(root: Path):
    """While open, modules of the project are imported from another folder, all anew."""
    here = {name: module for name, module in sys.modules.items()
            if Path(getattr(module, "__file__", None) or "/").is_relative_to(runs.ROOT)
            and ".venv" not in module.__file__}
    for name in here:
        del sys.modules[name]
    before = {*sys.modules}
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in {*sys.modules} - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(root):
                del sys.modules[name]
        sys.modules.update(here)


class Code:
    """The rivals of one checkout, and the classes of what they are given."""

    def __init__(self):
        self.known = importlib.import_module("baselines").modules()
        self.inside = importlib.import_module("baselines.inside")
        self.common = importlib.import_module("common")

    def selection(self, name: str, rows: int, n: int, keep: int, device):
        """() -> the indices of each picture. Raises ValueError for a rival that this cannot time,
        or that is not there. Features are the same in every checkout."""
        known = self.known
        if name == "cdpruner_words" and name not in known:
            name = "cdpruner"                          # as it was called before
        if name not in known:
            raise ValueError(f"methods={name!r}: expected some of {', '.join(known)}")
        module, _ = known[name]
        generator = torch.Generator().manual_seed(n + rows)

        def draw(*shape) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)
        if hasattr(module, "stages"):
            rule = module.stages(keep, n, depth=2, layers=(1,))[1]
            view = self.view(draw(rows, n + 2 * TEXT, WIDTH), n)
            return lambda: rule(view)[0]
        question = draw(rows, TEXT, WIDTH), torch.ones(rows, TEXT, dtype=torch.bool, device=device)
        feats = draw(rows * n, WIDTH)
        try:
            needs = {*module.needs(None)}
        except (ValueError, AttributeError):
            needs = None
        if needs != {"projected"}:
            raise ValueError(f"methods={name!r}: expected rivals that read no more than projected "
                             "tokens and the question, or that stand inside the language model")
        units = self.common.Units(feats, torch.arange(rows, device=device).repeat_interleave(n),
                                  [(1, n)] * rows, readings={"projected": feats})
        how = {"question": question} if name.startswith("cdpruner") else {}
        return lambda: module.select(units, keep, **how)

    def view(self, embeds: Tensor, n: int):
        """What a rule sees: n visual tokens in each row between some text, one random layer."""
        rows, length, _ = embeds.shape
        config = LlamaConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
                             num_attention_heads=HEADS)
        config._attn_implementation = "sdpa"
        with torch.random.fork_rng(), embeds.device:
            torch.manual_seed(0)
            layer = LlamaDecoderLayer(config, 0).eval()
            rotary = LlamaRotaryEmbedding(config)
        pos = torch.arange(length, device=embeds.device).expand(rows, -1)
        is_visual = (pos >= TEXT) & (pos < TEXT + n)
        origin = torch.where(is_visual, pos - TEXT, -1)
        prompt = self.common.Prompt(embeds, torch.ones_like(pos), pos, None, is_visual, origin)
        return self.inside.LayerView(prompt, prompt, prompt, (layer, layer), rotary(embeds, pos),
                                     layer.input_layernorm)


@torch.no_grad()
def measure(options) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and its head."""
    codes = [Code()]
    if options.against:
        root = options.against.resolve()
        if not (root / "baselines/__init__.py").exists():
            raise ValueError(f"against={str(root)!r}: expected a checkout of this repository")
        with checkout(root):
            codes.append(Code())
    head = ["method", "N", "batch", "K", "ms"]
    head += ["ms before", "times as fast", "same tokens"] if options.against else []
    rows = []
    grid = [(name, n, batch, max(1, round(share * n))) for name in options.methods
            for n in options.tokens for batch in options.batches for share in options.budgets]
    for name in options.methods:
        codes[0].selection(name, 1, 2, 1, options.device)      # refused before anything is timed
    for name, n, batch, keep in tqdm(grid, "select"):
        calls = [code.selection(name, batch, n, keep, options.device) for code in codes]
        times = [[] for _ in calls]
        same = all(all(map(torch.equal, calls[0](), call())) for call in calls[1:])   # warms up
        for pair in range(options.pairs):
            for i in (range(len(calls)) if pair % 2 else reversed(range(len(calls)))):
                times[i].append(seconds(calls[i], options.device))
        ms = [1e3 * median(each) for each in times]
        row = [name, str(n), str(batch), str(keep), *(f"{x:.1f}" for x in ms)]
        rows.append(row + ([f"{ms[1] / ms[0]:.2f}", "yes" if same else "NO"]
                           if options.against else []))
    return rows, head


def main(args: list[str]) -> str:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=["divprune", "cdpruner_words", "pact"],
                        help="rivals that read projected tokens, or stand inside")
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880], help="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8],
                        help="pictures at a time")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 9, 1 / 3],
                        help="K as shares of N")
    parser.add_argument("--pairs", type=int, default=10, help="times that everything is timed")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="file for the table, beside the screen")
    options = parser.parse_args(args)
    runs.check_options(options, tokens=1, batches=1, budgets=(1e-6, 1), pairs=1, threads=(1, 1024))
    check_device(options.device, torch.float32)
    if options.out:
        runs.writable_file(options.out)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        rows, head = measure(options)
    finally:
        torch.set_num_threads(threads)
    on = (torch.cuda.get_device_name() if options.device != "cpu" else
          "CPU, one thread" if options.threads == 1 else f"CPU, {options.threads} threads")
    given = ["--methods", *options.methods, "--tokens", *options.tokens, "--pairs", options.pairs]
    given += ["--against", "FORMER"] if options.against else []
    text = (f"{markdown(head, rows)}\n\n{on}; random features of width {WIDTH}; medians of "
            f"{options.pairs} calls, by turns. Made by "
            f"`python -m measure.rivals_speed {' '.join(map(str, given))}`.\n")
    print(f"\n{text}")
    if options.out:
        runs.write_text(options.out, text)
    return text


if __name__ == "__main__":
    runs.command(main)
