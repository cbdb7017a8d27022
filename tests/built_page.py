"""The built files of page/ in onnxruntime, used as page/site/worker.js does; what PyTorch says."""

import json
from pathlib import Path

import numpy as np
import torch

import baselines
import runs
from benchmarks import answering

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["random", "cls_attention"]
BUDGETS = (48, 16)


def selectors() -> list[str]:
    """Folders of the shipped ones."""
    return sorted(str(path.parent) for path in ROOT.glob("results/*/selector/model.safetensors"))


class Site:
    """The built files, used as page/site/worker.js does."""

    def __init__(self, folder):
        import onnxruntime
        one = onnxruntime.SessionOptions()
        one.intra_op_num_threads = 1
        self.models = {path.stem: onnxruntime.InferenceSession(path, one)
                       for path in (folder / "models").glob("*.onnx")}
        self.world = json.loads((folder / "world.json").read_text())
        self.words = np.frombuffer((folder / "models/words.bin").read_bytes(), np.float32
                                   ).reshape(-1, self.world["width"])

    def run(self, name: str, **given) -> dict:
        model = self.models[name]
        known = {each.name for each in model.get_inputs()}
        out = model.run(None, {key: x for key, x in given.items() if key in known})
        return dict(zip([each.name for each in model.get_outputs()], out))

    def ids(self, question: str) -> list[int]:
        return [self.world["vocabulary"][word] for word in question.split()]

    def see(self, image) -> dict:
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
        return self.run("see", pixels=pixels)

    def episode(self, method: dict, seen: dict, question: str, fallen: float
                ) -> tuple[list[int], list[float]]:
        """Picks of an episode that does not stop, and how far each stood above stop."""
        name, steps = method["name"], method["steps"]
        words = self.words[self.ids(question)][None]
        begun = self.run(f"{name}_begin", feats=seen["feats"], words=words,
                         fallen=np.full((1, 1), fallen, np.float32))
        memory = begun.pop("memory")
        x = np.array(steps["start"], np.float32)[None, None]
        cache = {f"cache_{i}": np.zeros(steps["empty"], np.float32)
                 for i in range(steps["caches"])}
        picks, margins = [], []
        for _ in range(steps["most"]):
            out = self.run(f"{name}_pick", x=x, **begun, **cache)
            cache = {f"cache_{i}": out[f"grown_{i}"] for i in range(steps["caches"])}
            logits = out["logits"][0]
            stop, logits = logits[-1], logits[:-1]
            logits[picks] = -np.inf
            picks.append(int(logits.argmax()))
            margins.append(float(logits[picks[-1]] - stop))
            x = memory[:, picks[-1:]]
        return picks, margins

    def answer(self, seen: dict, question: str, keep: list[int]) -> str:
        before, between, after = self.world["prompt"].values()
        text = [*between, *self.ids(question), *after]
        first = len(before) + seen["tokens"].shape[1]
        embeds = [self.words[before], seen["tokens"][0][keep], self.words[text]]
        pos = [*range(len(before)), *(len(before) + i for i in keep),
               *range(first, first + len(text))]
        said = []
        while len(said) < self.world["limit"]:
            out = self.run("speak", embeds=np.concatenate(embeds)[None], pos=np.array([pos]))
            word = int(out["logits"].argmax())
            if word in self.world["ends"]:
                break
            said.append(word)
            embeds.append(self.words[[word]])
            pos.append(pos[-1] + 1)
        known = {i: word for word, i in self.world["vocabulary"].items()}
        return " ".join(known[word] for word in said)

    def kept(self, method: dict, seen: dict, question: str, k: int) -> list[int] | None:
        """Ascending; None for a draw, which the page takes from scenes or makes itself."""
        if method["kind"] == "draw":
            return None
        if method["kind"] == "steps":
            how = method["steps"]["steering"][str(k)]
            picks, margins = self.episode(method, seen, question, how["fallen"])
            stop = next((t for t in range(1, len(picks)) if margins[t] < how["stop_bias"]),
                        len(picks))
            return sorted(picks[:stop])
        scores = seen[method["name"]] if method["kind"] == "reading" else self.run(
            method["name"], feats=seen["feats"], words=self.words[self.ids(question)][None]
        )["scores"]
        return sorted(np.argsort(-scores[0], kind="stable")[:k].tolist())


@torch.no_grad()
def of_pytorch(vlm, world: dict, questions: list) -> dict:
    """{(method, K): (keep, answer) of every question}, steered as the page is."""
    ways = {name: baselines.way(name, vlm) for name in METHODS}
    for run in selectors():
        selector, about = runs.load_selector(run, vlm)
        way = selector.ways([], [], list)[""]
        entry = next(each for each in world["methods"] if each["name"] == about["method"])
        if entry["steps"]:
            steering, most = entry["steps"]["steering"], entry["steps"]["most"]

            def steered(asked, k, selector=selector, steering=steering, most=most):
                picks = selector.picks(asked.units, asked.question, most=most, **steering[str(k)])
                return [order.sort().values for order in picks]
            way.select = steered
        ways[about["method"]] = way
    asked = answering.ask(vlm, questions, *ways.values())
    found = {}
    every = [torch.arange(n) for n in asked.tokens()]
    for name, way, k in [("all", None, 0), *((*each, k) for each in ways.items() for k in BUDGETS)]:
        keep = every if way is None else answering.choose(way, asked, k)[0]
        prompt = vlm.prune(asked.batch, asked.units, keep)
        found[name, k] = [*zip([row.tolist() for row in keep],
                               vlm.generate(prompt, world["limit"]))]
    return found
