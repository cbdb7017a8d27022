"""What a browser will run, in onnxruntime: the same picks and answers as PyTorch's."""

import json

import numpy as np
import pytest
import torch

import baselines
import runs
from benchmarks import answering, tiny_world
from common import FrozenVLM
from page.export import NoPadding, line_of, notes

from .conftest import METHODS, ROOT, selectors

pytestmark = pytest.mark.slow
N, BUDGETS = 200, (48, 16)


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


@pytest.fixture(scope="module")
def built(site):
    return Site(site)


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained("tiny/llava", torch.float32)


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


def test_picks_and_answers_of_200_questions_are_those_of_pytorch(built, vlm):
    questions = tiny_world.load(n=N)[:N]
    expected = of_pytorch(vlm, built.world, questions)
    methods = {each["name"]: each for each in built.world["methods"]}
    wrong = []
    for i, question in enumerate(questions):
        seen = built.see(question.images()[0])
        for (name, k), rows in expected.items():
            keep, answer = rows[i]
            here = keep if name == "all" else built.kept(methods[name], seen, question.prompt, k)
            if here is not None and here != keep:
                wrong.append((question.id, name, k, sorted({*here} ^ {*keep})))
            if built.answer(seen, question.prompt, keep) != answer:
                wrong.append((question.id, name, k, answer))
    assert len(questions) == N and len(expected) == 1 + len(BUDGETS) * (len(methods) - 1)
    assert not wrong


def test_features_scores_and_logits_are_near(built, vlm):
    """In float32, each relative to its own largest value."""
    questions = tiny_world.load(n=20)
    asked = answering.ask(vlm, questions)
    seen = [built.see(question.images()[0]) for question in questions]
    feats, _ = asked.units.pad()
    pairs = [(feats, np.concatenate([each["feats"] for each in seen]))]
    for run in selectors():
        selector, about = runs.load_selector(run, vlm)
        if about["method"] in built.models:
            scores, _ = asked.units.pad(selector.scores(asked.units, asked.question))
            pairs.append((scores, np.concatenate(
                [built.run(about["method"], feats=each["feats"])["scores"] for each in seen])))
    assert len(pairs) > 2
    for theirs, ours in pairs:
        theirs = theirs.detach().numpy()
        assert abs(theirs - ours).max() < 1e-4 * abs(theirs).max()


def test_the_world_of_the_page_is_the_scenes_own(built):
    world = built.world
    assert len(world["scenes"]) == 40 and len({scene["name"] for scene in world["scenes"]}) == 40
    rows = {str(row.id): row for row in tiny_world.load_rows(2000)}
    for scene in world["scenes"]:
        row = rows[scene["name"]]
        assert [(t["kind"], tuple(t["box"])) for t in scene["things"]] == [
            (t.kind, t.box) for t in row.scene.things]
        assert [q["question"] for q in scene["questions"]] == [q.question for q in row.questions]
        for order in scene["drawn"].values():
            assert sorted(order) == [*range(144)]


def test_a_full_mask_takes_all_and_other_indices_are_left_alone():
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    expected = x[mask], x.masked_scatter(mask[..., None], x[mask] + 1), x[:, [2, 0]]
    with NoPadding():
        found = x[mask], x.masked_scatter(mask[..., None], x[mask] + 1), x[:, [2, 0]]
    assert all(torch.equal(*pair) for pair in zip(expected, found))


def test_every_note_links_the_line_of_its_function(tmp_path):
    said = notes([], tmp_path)
    every = json.loads((ROOT / "page/notes.json").read_text())
    for note in [*said["controls"].values(), *every["methods"].values()]:
        line = line_of(ROOT / note["file"], note["name"])
        assert note["name"].split(".")[-1] in (ROOT / note["file"]).read_text().splitlines()[line - 1]
    with pytest.raises(ValueError, match="there is no such thing"):
        line_of(ROOT / "common.py", "FrozenVLM.see")
