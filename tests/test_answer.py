"""answer.py as a user runs it: the shipped selectors on the tiny LLaVA, and every family on tiny random weights."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import MODELS, llava

import answer
import evaluate
import train
from benchmarks import scenes
from common import Chat, FrozenVLM

RUNS = {method: f"results/{method}_tiny/selector" for method in ("autoselect", "stepprune", "recon")}
TURNS = ["how many shapes are there ?", "what colour is the circle ?"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    scenes.load(1)[0].image.resize((300, 200)).save(path)
    return str(path)


def command(photo, out, *more):
    return ["--image", photo, "--out", str(out), "--device", "cpu", *more]


def untrained(folder, vlm, method, **changes):
    """A run folder as train.py leaves it, with random weights."""
    cfg = train.TrainConfig(method=method, model="tiny", run=str(folder), layers=1, heads=2, max_steps=9, **changes)
    torch.manual_seed(0)
    selector = train.build_selector(cfg, vlm)
    train.save_selector(folder, selector, train.description(cfg, vlm, selector))
    return str(folder)


def test_the_shipped_selectors_answer_and_chat(photo, tmp_path, capsys):
    runs = list(RUNS.values())
    lines = answer.main(command(photo, tmp_path, "--run", *runs, "--methods", "random", "cls_attention", "--question",
                                *TURNS, "--budgets", "32", "16", "--calibration", "150"))
    shown, saved = capsys.readouterr().out, json.loads((tmp_path / "answer.json").read_text())
    assert saved["answers"] == lines and saved["model"] == "tiny/llava" and len(lines) == 2 * (1 + 2 * 5)
    ways = ["all tokens", *(f"{name} {k}" for name in ("random", "cls_attention", *runs) for k in (32, 16))]
    for number, question in enumerate(TURNS, 1):
        turn = [x for x in lines if x["turn"] == number]
        assert [x["way"] for x in turn] == ways and {x["question"] for x in turn} == {question}
        for x in turn:
            anew = "stepprune" in x["way"]
            assert (x["vision_ms"] > 0) == (number == 1), x          # encoded once
            assert (x["select_ms"] > 0) == (x["way"] != "all tokens" and (number == 1 or anew)), x
            assert x["kept"] == 144 if x["way"] == "all tokens" else anew or x["kept"] == int(x["way"].split()[-1])
            assert x["first_ms"] == pytest.approx(x["vision_ms"] + x["select_ms"] + x["prefill_ms"])
            assert x["first_ratio"] == pytest.approx(turn[0]["first_ms"] / x["first_ms"]) and x["prefill_ms"] > 0
            assert f"{x['answer']}\n" in shown and f"| {number} | {x['way']} | {x['kept']} |" in shown
    image = Image.open(tmp_path / "answer.png")
    assert image.width > 1500                          # ten ways that leave tokens out


def test_every_family_and_method_answers_as_generate_does(vlm, path, family, tmp_path):
    """Two images, or two frames; the second turn is compared with the whole dialogue in one prompt."""
    rng, files = np.random.default_rng(0), [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, size in zip(files, [(24, 40), (32, 24)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(file)
    methods = ["autoselect", "stepprune", "recon"] if family in ("llava", "qwen") else ["recon"]      # views differ
    runs = [untrained(tmp_path / method, vlm, method) for method in methods]
    turns = ["what colour is the circle ?", "how many ?", "is the square red ?"]
    lines = answer.main(["--image", *files, "--model", path, "--dtype", "float32", "--run", *runs, "--budgets", "9",
                         "--exact", "True", "--question", *turns, "--out", str(tmp_path), "--device", "cpu",
                         "--methods", "random", "--max_new_tokens", "5"])
    single = FrozenVLM.from_pretrained(path, torch.float32)
    images = [Image.open(file).convert("RGB") for file in files]
    units = single.encode(single.pictures([images]))
    tokens = int(units.pad(units.image_of)[1].sum())
    assert len(units.grid) == 1 and units.views[0] >= 2 and tokens <= sum(units.counts)
    assert [x["kept"] for x in lines] == [tokens, *[9] * (1 + len(methods))] * 3
    for name, keep in (("all tokens", None), ("random 9", answer.BASELINES["random"].select(units, 9))):
        said = []
        for question, x in zip(turns, [x for x in lines if x["way"] == name]):
            batch = single.batch([images], [[*said, (question, None)]])
            prompt = single.embed(batch, units) if keep is None else single.prune(batch, units, keep)
            assert x["answer"] == single.generate(prompt, 5)[0]
            if x["answer"] and not single.unknown_words(x["answer"]):
                said.append((question, x["answer"]))
    assert (tmp_path / "answer.png").exists()


def test_a_chat_from_standard_input_goes_on_after_an_unfit_question(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([TURNS[0], "is there a elephant ?", TURNS[1], "", "no"])))
    lines = answer.main(command(photo, tmp_path, "--run", RUNS["autoselect"], "--budgets", "16"))
    assert [(x["turn"], x["question"]) for x in lines] == [(1, TURNS[0])] * 2 + [(2, TURNS[1])] * 2
    assert "cannot read 'elephant'" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="no question: give --question"):
        answer.main(command(photo, tmp_path, "--run", RUNS["autoselect"]))


def test_a_template_that_rewrites_earlier_turns_is_refused(photo):
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    image = Image.open(photo)
    chat = Chat(vlm, image, vlm.encode(vlm.pictures([image])))
    chat.ask(TURNS[0], 4)
    vlm.processor.chat_template = "{{ messages | length }}" + vlm.processor.chat_template
    with pytest.raises(ValueError, match="template rewrites earlier turns"):
        chat.ask(TURNS[1], 4)


@pytest.mark.parametrize("mode, size", [("1", (9, 9)), ("L", (1, 1)), ("P", (30, 500)), ("RGBA", (64, 20)),
                                        ("CMYK", (33, 33)), ("I;16", (40, 40)), ("F", (20, 20)), ("LA", (1, 190))])
def test_pictures_of_any_mode_and_size_are_read(mode, size, tmp_path):
    name = tmp_path / ("x.tif" if mode in ("CMYK", "F") else "x.png")
    Image.new(mode, size).save(name)
    asked = command(str(name), tmp_path, "--model", "tiny/llava", "--methods", "random", "--budgets", "4")
    assert [x["kept"] for x in answer.main([*asked, "--question", TURNS[0]])] == [144, 4]


def test_what_cannot_work_is_said_before_anything_is_answered(photo, tmp_path, monkeypatch):
    asked = command(photo, tmp_path, "--run", RUNS["autoselect"], "--question")
    thin, broken = str(tmp_path / "thin.png"), str(tmp_path / "broken.png")
    Image.new("RGB", (2001, 10)).save(thin)
    Path(broken).write_text("no picture")
    other = llava(tmp_path / "other")
    monkeypatch.setattr(answer, "ask", lambda *_: pytest.fail("a question was asked"))
    for wrong, error, message in [
            ([*asked, TURNS[0], "is there a elephant ?"], ValueError, "cannot read 'elephant'"),
            ([*asked, " "], ValueError, "empty question"),
            ([*asked, "how many <image> ?"], ValueError, "contains '<image>': leave it out"),
            (asked[2:] + TURNS[:1], ValueError, r"image=\[\].*expected a picture file"),
            ([*asked, TURNS[0], "--image", broken], ValueError, "cannot read --image .*broken.png: UnidentifiedImage"),
            ([*asked, TURNS[0], "--image", photo, "nowhere.png"], ValueError, "cannot read --image nowhere.png"),
            ([*asked, TURNS[0], "--image", thin], ValueError, "cannot use --image .*thin.png: 2001x10 pixels"),
            ([*asked, TURNS[0], "--budgets", "0"], ValueError, "numbers from 1"),
            ([*asked, TURNS[0], "--methods", "evidence"], ValueError, r"methods of \['random', 'cls_attention'"),
            ([*asked, TURNS[0], "--methods", "tome"], ValueError, r"methods of \['random', 'cls_attention'"),
            ([*asked, TURNS[0], "--methods", "fastv"], ValueError, r"methods of \['random', 'cls_attention'"),
            ([*asked, TURNS[0], "--methods", "best"], ValueError, r"methods=\['best'\]: known are"),
            ([*asked, TURNS[0], "--run", str(tmp_path)], FileNotFoundError, "holds no finished run"),
            ([*asked, "how many ?", "--model", other], ValueError, "was trained for another backbone")]:
        with pytest.raises(error, match=message):
            answer.main(wrong)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="cannot read --image .*DecompressionBomb"):
        answer.main([*asked, TURNS[0]])


def test_as_a_command_it_explains_itself_and_fails_in_words(photo, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        answer.main(["--help"])
    shown = capsys.readouterr().out
    assert "turns of a dialogue" in shown and "behind the pruned cache" in shown
    failed = subprocess.run([sys.executable, "answer.py", *command(photo, tmp_path, "--run", RUNS["autoselect"])],
                            capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert failed.returncode and "ValueError: no question: give --question" in failed.stderr


# ------------------------------------------------------------------------------- scenes for families without a size

def test_every_family_is_trained_and_evaluated_on_scenes(family, tmp_path):
    path = MODELS[family](tmp_path / "vlm", tokens="bytes")
    cfg = train.TrainConfig(method="autoselect", model=path, run=str(tmp_path / "run"), steps=1, batch=2, layers=1,
                            heads=2, keep=[8], workers=0, device="cpu", evaluate=False, turns=2)
    train.train(cfg)
    drawn = family in ("llava_next", "llava_onevision")
    lines = evaluate.main(["--run", cfg.run, "--n", "10", "--budgets", "8", "--methods", "random", "--device", "cpu",
                           "--pictures", str(drawn)])
    assert [x["kept"] for x in lines[1:]] == [8, 8] and {x["method"] for x in lines[1:]} == {"random", cfg.run}
    assert (tmp_path / "run/kept.png").exists() == (tmp_path / "run/cosines.png").exists() == drawn
    unknown = family in ("llava_next", "internvl")     # they see a picture in crops: no ground truth there
    assert all(np.isnan(x["recall"]) == unknown for x in lines[1:])
