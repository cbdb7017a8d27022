"""What a browser will run, in onnxruntime: the same picks and answers as PyTorch's."""

import json

import numpy as np
import pytest
import torch
from built_page import BUDGETS, ROOT, Site, of_pytorch, selectors

import runs
from benchmarks import answering, tiny_world
from page.export import Begin, NoPadding, line_of, main, notes, save

N = 200


@pytest.fixture(scope="module")
def built(site):
    return Site(site)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        path = ROOT / note["file"]
        line = path.read_text().splitlines()[line_of(path, note["name"]) - 1]
        assert note["name"].split(".")[-1] in line
    with pytest.raises(ValueError, match="there is no such thing"):
        line_of(ROOT / "common.py", "FrozenVLM.see")


@pytest.mark.parametrize("args, message", [
    (["--methods", "magic"], "known are"),
    (["--methods", "fastv"], "one reading of the encoder, or by none"),
    (["--methods", "divprune"], "reads 'projected': the page shows one number a token"),
    (["--methods", "downsample"], "one reading of the encoder, or by none"),
    (["--methods", "evidence"], "one reading of the encoder, or by none"),
    (["--methods", "vispruner"], "'vispruner' does not rank"),
    (["--model", "tiny/qwen2_5_vl"], "expected a LLaVA-1.5 that knows the words"),
    (["--scenes", "0"], "at least 1"),
    (["--run", "tests"], "tests holds no finished run"),
])
def test_what_the_page_cannot_show_is_said(args, message, tmp_path):
    """Before a package is wanted that only the page needs."""
    with pytest.raises((ValueError, OSError), match=message):
        main([*args, "--out", str(tmp_path), *([] if "--scenes" in args else ["--scenes", "2"])])


@pytest.mark.slow
def test_a_price_that_is_told_reaches_the_memory(vlm, tmp_path):
    """Of a selector of another configuration than the shipped one: it has one more input."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="see page/README.md")
    found = [runs.load_selector(run, vlm) for run in selectors()]
    about = next(about for selector, about in found if selector.adaptive)
    module = runs.load_method(about["method"])
    selector = module.Method(module.Config(**{**about["cfg"], "price": "told"})).eval()
    given = {"feats": torch.randn(1, 144, vlm.width), "words": torch.randn(1, 7, vlm.dim),
             "fallen": torch.tensor([[.7]])}
    save(Begin(selector), tmp_path / "begin.onnx", given, ["memory", "a", "b", "c"], {"words": 1})
    model = onnxruntime.InferenceSession(tmp_path / "begin.onnx")
    for fallen in (.7, .1):
        given["fallen"] = torch.tensor([[fallen]])
        memory = model.run(None, {name: x.numpy() for name, x in given.items()})[0]
        here, there = (torch.ones(x.shape[:2]).bool() for x in (given["feats"], given["words"]))
        with torch.no_grad():
            expected = selector.memory(given["feats"], here, given["words"], there, fallen=fallen)
        assert abs(expected.numpy() - memory).max() < 1e-4
