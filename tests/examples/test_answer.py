"""examples/answer.py as a user runs it: the shipped selectors on the tiny LLaVA, and every family
on tiny random weights."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import llava

import baselines
import runs
import train
from baselines.encoder import encode
from baselines.inside import generate_inside
from benchmarks import answering
from benchmarks.tiny_world import load_rows
from common import FrozenVLM
from examples import answer

RUNS = {method: f"results/{method}_tiny/selector"
        for method in ("autoselect", "stepprune", "recon")}
SMALL = {"autoselect": dict(layers=1, heads=2), "stepprune": dict(heads=2, max_steps=9),
         "recon": dict(layers=1, heads=2)}
TURNS = ["how many shapes are there ?", "what colour is the circle ?"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    load_rows(1)[0].image.resize((300, 200)).save(path)
    return str(path)


def command(photo, out, *more):
    return ["--image", photo, "--out", str(out), "--device", "cpu", *more]


def untrained(folder, vlm, method, **changes):
    """A run folder as train.py leaves it, with random weights."""
    module = runs.load_method(method)
    torch.manual_seed(0)
    selector = module.Method(module.Config.of(vlm, **SMALL[method], **changes))
    config = train.TrainConfig(method=method, model="tiny", run=str(folder), steps=1)
    runs.save_selector(Path(folder), selector, runs.describe(config, selector, vlm, ()))
    return str(folder)


def test_the_shipped_selectors_answer_and_chat(photo, tmp_path, capsys):
    selectors = list(RUNS.values())
    lines = answer.main(command(
        photo, tmp_path, "--run", *selectors, "--methods", "random", "cls_attention", "--question",
        *TURNS, "--budgets", "32", "16"))
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "answer.json").read_text())
    assert saved["answers"] == lines and saved["model"] == "tiny/llava"
    assert len(lines) == 2 * (1 + 2 * 5)
    names = [f"{name} {k}" for name in ("random", "cls_attention", *selectors) for k in (32, 16)]
    for number, question in enumerate(TURNS, 1):
        turn = [line for line in lines if line["turn"] == number]
        assert [line["way"] for line in turn] == ["all tokens", *names]
        assert {line["question"] for line in turn} == {question}
        for line in turn:
            way = line["way"]
            anew = "stepprune" in way
            selects = way != "all tokens" and (number == 1 or anew)
            assert (line["vision_ms"] > 0) == (number == 1), line         # encoded once
            assert (line["select_ms"] > 0) == selects, line
            if way == "all tokens":
                assert line["kept"] == 144
            else:
                assert anew or line["kept"] == int(way.split()[-1])
            first_ms = line["vision_ms"] + line["select_ms"] + line["prefill_ms"]
            assert line["first_ms"] == pytest.approx(first_ms)
            assert line["first_ratio"] == pytest.approx(turn[0]["first_ms"] / line["first_ms"])
            assert line["prefill_ms"] > 0
            assert f"{line['answer']}\n" in printed
            assert f"| {number} | {way} | {line['kept']} |" in printed
    image = Image.open(tmp_path / "answer.png")
    assert image.width > 1500                          # ten ways that leave tokens out


def test_every_family_and_method_answers_as_generate_does(vlm, path, family, tmp_path):
    """Two images, or two frames; later turns against the whole dialogue in one prompt."""
    rng = np.random.default_rng(0)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, size in zip(files, [(24, 40), (32, 24)]):
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    # views differ among the others
    methods = ["autoselect", "recon"] if family in ("llava", "qwen") else ["recon"]
    selectors = [untrained(tmp_path / method, vlm, method) for method in methods]
    turns = ["what colour is the circle ?", "how many ?", "is the square red ?"]
    asked = ["--image", *files, "--model", path, "--dtype", "float32", "--budgets", "9",
             "--question", *turns, "--out", str(tmp_path), "--device", "cpu",
             "--max_new_tokens", "5"]
    lines = answer.main([*asked, "--run", *selectors, "--methods", "random"])
    single = FrozenVLM.from_pretrained(path, torch.float32)
    images = [Image.open(file).convert("RGB") for file in files]
    pixels = single.pictures([images])
    units = single.encode(pixels)
    tokens = int(units.pad(units.image_of)[1].sum())
    assert len(units.grid) == 1 and units.views[0] >= 2 and tokens <= sum(units.counts)
    assert [line["kept"] for line in lines] == [tokens, *[9] * (1 + len(methods))] * 3
    picture = answering.QuestionBatch(single, units, [0], [answering.content_hash(images)], pixels)
    at_random = baselines.way("random", single).select(picture, 9)
    for name, keep in (("all tokens", None), ("random 9", at_random)):
        dialogue = []
        for question, line in zip(turns, [line for line in lines if line["way"] == name]):
            batch = single.batch([images], [[*dialogue, (question, None)]])
            prompt = (single.embed(batch, units) if keep is None
                      else single.prune(batch, units, keep))
            assert line["answer"] == single.generate(prompt, 5)[0]
            if line["answer"] and not single.unknown_words(line["answer"]):
                dialogue.append((question, line["answer"]))
    assert (tmp_path / "answer.png").exists()
    if len(methods) == 1:
        return
    stepwise = untrained(tmp_path / "stepprune", vlm, "stepprune")
    lines = answer.main([*asked, "--run", stepwise, "--ways", "exactly"])
    assert [line["kept"] for line in lines] == [tokens, 9] * 3
    assert lines[1]["way"] == f"{stepwise} exactly 9"


def test_what_merges_reads_the_question_or_selects_inside_answers_too(photo, tmp_path):
    """Merged tokens stay in the cache from turn to turn, a reader chooses anew, and inside the
    language model each question is asked by itself."""
    names = ["tome", "cdpruner_words", "fastv"]
    lines = answer.main(command(photo, tmp_path, "--model", "tiny/llava", "--methods", *names,
                                "--budgets", "24", "--dtype", "float32", "--question", *TURNS))
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    image = Image.open(photo).convert("RGB")
    ways = {name: baselines.way(name, vlm) for name in names}
    needs = {name: what for way in ways.values() for name, what in way.needs.items()}
    pixels = vlm.pictures([image])
    units = encode(vlm, pixels, needs)
    picture = answering.QuestionBatch(vlm, units, [0], ["photo"], pixels)
    keep, feats = ways["tome"].select(picture, 24)
    expected = {"tome": [], "cdpruner_words": [], "fastv": []}
    dialogues = {"tome": [], "cdpruner_words": []}
    for question in TURNS:
        alone = vlm.batch([image], [[(question, None)]])
        picture.question = vlm.question(alone)
        by_words = ways["cdpruner_words"].select(picture, 24)
        prompts = {"tome": (keep, feats), "cdpruner_words": (by_words, None)}
        for name, (kept, own) in prompts.items():
            batch = vlm.batch([image], [[*dialogues[name], (question, None)]])
            text = vlm.generate(vlm.prune(batch, units, kept, own), 64)[0]
            dialogues[name].append((question, text))
            expected[name].append(text)
        prompt = vlm.embed(alone, units)
        expected["fastv"] += generate_inside(vlm, prompt, ways["fastv"].stages(24, [144]), 64)
    for name in names:
        own = [line for line in lines if line["way"] == f"{name} 24"]
        assert [line["answer"] for line in own] == expected[name]
        # none, but for what is chosen once, in the second turn
        assert [line["select_ms"] > 0 for line in own] == [True, name != "tome"]
        assert all(line["kept"] < 144 for line in own)
    assert (tmp_path / "answer.png").exists()


def test_a_gate_drowns_units_and_removes_none(photo, tmp_path):
    lines = answer.main(command(photo, tmp_path, "--run", RUNS["autoselect"], "--ways", "gated",
                                "--budgets", "32", "--question", *TURNS))
    assert [line["kept"] for line in lines] == [144] * 4
    assert [line["select_ms"] > 0 for line in lines] == [False, True, False, False]
    assert not (tmp_path / "answer.png").exists()      # nobody left anything out


def test_a_chat_from_standard_input_goes_on_after_an_unfit_question(photo, tmp_path, monkeypatch,
                                                                    capsys):
    typed = [TURNS[0], "is there a elephant ?", TURNS[1], "", "no"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    asked = command(photo, tmp_path, "--run", RUNS["autoselect"])
    lines = answer.main([*asked, "--budgets", "16"])
    turns = [(line["turn"], line["question"]) for line in lines]
    assert turns == [(1, TURNS[0])] * 2 + [(2, TURNS[1])] * 2
    assert "cannot read 'elephant'" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="no question: give --question"):
        answer.main(asked)


@pytest.mark.parametrize("mode, size", [
    ("1", (9, 9)), ("L", (1, 1)), ("P", (30, 500)), ("RGBA", (64, 20)), ("CMYK", (33, 33)),
    ("I;16", (40, 40)), ("F", (20, 20)), ("LA", (1, 190))])
def test_pictures_of_any_mode_and_size_are_read(mode, size, tmp_path):
    name = tmp_path / ("x.tif" if mode in ("CMYK", "F") else "x.png")
    Image.new(mode, size).save(name)
    lines = answer.main(command(str(name), tmp_path, "--model", "tiny/llava", "--methods", "random",
                                "--budgets", "4", "--question", TURNS[0]))
    assert [line["kept"] for line in lines] == [144, 4]


def test_what_cannot_work_is_said_before_anything_is_answered(photo, tmp_path, monkeypatch):
    asked = command(photo, tmp_path, "--run", RUNS["autoselect"], "--question")
    thin = str(tmp_path / "thin.png")
    Image.new("RGB", (2001, 10)).save(thin)
    broken = str(tmp_path / "broken.png")
    Path(broken).write_text("no picture")
    other = llava(tmp_path / "other")
    monkeypatch.setattr(answer, "ask", lambda *_: pytest.fail("a question was asked"))
    for wrong, error, message in [
            ([*asked, TURNS[0], "is there a elephant ?"], ValueError, "cannot read 'elephant'"),
            ([*asked, " "], ValueError, "empty question"),
            ([*asked, "how many <image> ?"], ValueError, "contains '<image>': leave it out"),
            (asked[2:] + TURNS[:1], ValueError, r"image=\[\].*expected a picture file"),
            ([*asked, TURNS[0], "--image", broken], ValueError,
             "cannot read --image .*broken.png: UnidentifiedImage"),
            ([*asked, TURNS[0], "--image", photo, "nowhere.png"], ValueError,
             "cannot read --image nowhere.png"),
            ([*asked, TURNS[0], "--image", thin], ValueError,
             "cannot use --image .*thin.png: too oblong: 2001x10 pixels"),
            ([*asked, TURNS[0], "--budgets", "0"], ValueError, "budgets=0: expected at least 1"),
            ([*asked, TURNS[0], "--budgets", "16", "145"], ValueError,
             r"budgets=\[16, 145\]: expected at most the 144 visual tokens of .*png"),
            ([*asked, TURNS[0], "--methods", "best"], ValueError,
             r"methods=\['best'\]: known are"),
            ([*asked, TURNS[0], "--ways", "exactly"], ValueError,
             r"ways=\['exactly'\]: this method has gated"),
            ([*asked, TURNS[0], "--run", str(tmp_path)], FileNotFoundError,
             "holds no finished run"),
            ([*asked, "how many ?", "--model", other], ValueError,
             "was trained for another backbone")]:
        with pytest.raises(error, match=message):
            answer.main(wrong)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="cannot read --image .*DecompressionBomb"):
        answer.main([*asked, TURNS[0]])


@pytest.mark.parametrize("name, message", [("evidence", "nothing says which units do"),
                                           ("pdrop", "the least is 36.8")])
def test_what_cannot_be_selected_is_said_before_anything_is_printed(name, message, photo, tmp_path,
                                                                    capsys):
    with pytest.raises(ValueError, match=message):
        answer.main(command(photo, tmp_path, "--model", "tiny/llava", "--methods", name,
                            "--budgets", "16", "--question", TURNS[0]))
    assert "all tokens" not in capsys.readouterr().out


def test_as_a_command_it_explains_itself(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        answer.main(["--help"])
    printed = capsys.readouterr().out
    assert "turns of a dialogue" in printed and "behind the pruned cache" in printed
