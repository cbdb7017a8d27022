"""Questions asked in batches: the same answers as one by one, whatever is cut off or left out."""


import os
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from prediction_rows import files_for, question, timeless
from tiny_models import llava_next_video

import baselines
from backbones.checkpoints import blank_model
from baselines import dart, fastv, pact, pdrop, sparsevlm
from baselines.inside import Shown
from benchmarks import answering, predictions, tiny_world
from benchmarks.answering import Impossible, by_budget
from benchmarks.costs import Clock, per_layer, prefill_flops
from benchmarks.questions import Question, picture, sample
from common import FrozenVLM
from measure import flops
from runs import Way

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    return FrozenVLM.from_pretrained("tiny/llava", torch.float32)


def test_two_processes_share_a_run_and_one_continues_it(tiny, tmp_path):
    questions, turns = (
        sample(tiny_world.load(n=20), 18),
        {("vanilla", 0): None, ("random", 48): baselines.way("random", tiny)},
    )
    alone = files_for(tmp_path / "one", questions, turns)
    answering.run(tiny, questions, turns, alone, batch=4)
    for process in (0, 1):
        part = files_for(tmp_path / "two", questions, turns, process=process, processes=2)
        answering.run(tiny, questions, turns, part, 4, process=process, processes=2)
    first = files_for(tmp_path / "cut", questions, turns, process=0, processes=2)
    answering.run(tiny, questions, turns, first, 4, process=0, processes=2)
    rest = files_for(tmp_path / "cut", questions, turns)  # the second process never came
    assert len(rest["random", 48].done) == 4 + 4 + 2
    answering.run(tiny, questions, turns, rest, 4)
    for turn in turns:
        header, rows = predictions.read(alone[turn].path)
        assert len(rows) == 18 and [x["number"] for x in rows] == [*range(18)]
        for folder, parts in (("two", 2), ("cut", 2)):
            path = tmp_path / folder / alone[turn].path.name
            assert len(predictions.parts(path)) == parts
            assert predictions.read(path)[0] == header and timeless(
                predictions.read(path)[1]
            ) == timeless(rows)


def test_features_that_are_no_numbers_name_the_questions(tiny, monkeypatch):
    def broken(batch):
        feats, grid = real(batch)
        feats[144] = torch.nan                             # of the second picture
        return feats, grid
    real = tiny.adapter.encode
    monkeypatch.setattr(tiny.adapter, "encode", broken)
    questions = tiny_world.load(n=20)
    first, other = questions[0], next(q for q in questions if q.id[:-2] != questions[0].id[:-2])
    with pytest.raises(ValueError, match=f"row 1 has .*of the questions {first.id}, {other.id}$"):
        answering.ask(tiny, [first, first, other])


def mixed(n=6):
    """Questions about pictures of several sizes, two to one picture, for a model that takes them as
    they are."""
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8))
        for i, size in enumerate([(24, 24), (24, 48), (40, 24)])
    ]
    prompts = ["what colour is the shape ?", "how many are there ?"]
    return [
        Question(str(i), lambda i=i: [images[i // 2 % 3]], prompts[i % 2], {}, 5) for i in range(n)
    ]


def ways_of(vlm):
    def first(states, valid, k):
        return [v.nonzero().flatten()[:k] for v in valid.cpu()]

    random = baselines.way("random", vlm, seed=3)
    return {
        ("vanilla", 0): None,
        ("random", 0.4): random,
        ("random", 15): random,
        ("first", 0.4): Way(lambda asked, k: [torch.arange(k)] * len(asked.units.grid)),
        ("own first", 0.4): Way(lambda asked, k: [torch.arange(k)] * len(asked.units.grid), True),
        ("drowned", 0.4): Way(gate=lambda asked, k: asked.units.feats * k),
        ("fastv", 0.3): Way(stages=lambda k, tokens: fastv.stages(k, tokens, 3, (1,))),
        ("inside", 0.3): Way(
            ask_twice=True,
            stages=lambda k, tokens: {1: lambda view: first(view.states, view.valid, k)},
        ),
        ("asked twice", "all"): Way(ask_twice=True, stages=lambda k, tokens: {}),
        ("twice before", 0.4): Way(
            lambda asked, k: [torch.arange(k)] * len(asked.units.grid), ask_twice=True
        ),
    }


def test_batched_answers_are_those_of_one_by_one(vlm, family):
    questions, turns = mixed(), ways_of(vlm)
    together = answering.answer_batch(vlm, [*enumerate(questions)], turns)
    alone = [
        answering.answer_batch(vlm, [(i, question)], turns) for i, question in enumerate(questions)
    ]
    for turn, rows in together.items():
        own = [x for each in alone for x in timeless(each[turn])]
        assert timeless(rows) == own, turn
    if family == "qwen":
        assert len({x["kept"] for x in together["random", 0.4]}) > 1  # different K in one batch
    # what serves all questions of a picture serves each, and what asks twice asks otherwise
    kept, own = (timeless(together[name, 0.4]) for name in ("first", "own first"))
    assert kept == own
    assert [x["flops"] for x in together["twice before", 0.4]] > [x["flops"] for x in kept]


def test_a_picture_is_encoded_once_for_all_its_questions(tiny):
    clock = Clock("cpu")
    asked = answering.ask(tiny, tiny_world.load(n=12)[:9], clock=clock)
    pictures = asked.pictures
    assert len(pictures.units.grid) == clock.items["vision"] == len(set(asked.names)) < 9
    assert len(asked.owner) == len(asked.names) == len(asked.units.grid) == 9
    assert [asked.names[q] for q in range(9)] == [pictures.names[b] for b in asked.owner]
    assert list(asked.inputs) == [False] and len(asked.batch["input_ids"]) == 9
    assert pictures.question is None and len(asked.question[0]) == 9
    prompts = [question.prompt for question in tiny_world.load(n=12)[:9]]
    assert asked.texts == prompts and pictures.texts is None
    assert asked.only([7, 2]).texts == [prompts[7], prompts[2]]


def test_random_tokens_depend_on_picture_and_seed(tiny):
    asked = answering.ask(tiny, tiny_world.load(n=12))
    kept = set()
    for seed in (0, 1):
        keep, _ = answering.choose(baselines.way("random", tiny, seed=seed), asked, 16)
        kept |= {(b, seed, tuple(index.tolist())) for b, index in zip(asked.owner, keep)}
    assert len({index for *_, index in kept}) == len(kept) == 2 * len(asked.pictures.names) > 2


def test_k_is_a_share_at_most_all_or_left_alone():
    assert by_budget(0.5, [9, 10, 10]) == {4: [0], 5: [1, 2]} and by_budget(0.01, [9]) == {1: [0]}
    assert by_budget(16, [9, 20]) == {9: [0], 16: [1]}
    assert by_budget("mask", [9, 20]) == {"mask": [0, 1]}


def test_an_impossible_budget_leaves_its_turn_out_and_the_others_in(tiny, tmp_path, capsys):
    def refusing(asked, k):
        raise ValueError("no such pictures")

    questions = sample(tiny_world.load(n=8), 6)
    turns = {
        ("pdrop", 4): baselines.way("pdrop", tiny),
        ("random", 4): baselines.way("random", tiny),
        ("refusing", 4): Way(refusing),
    }
    files = files_for(tmp_path, questions, turns)
    answering.run(tiny, questions, turns, files, 3)
    printed = capsys.readouterr().out
    assert "pdrop 4: left out, keep=4" in printed
    assert printed.count("refusing 4: left out, no such pictures") == 1
    assert not files["pdrop", 4].done and len(files["random", 4].done) == 6
    assert isinstance(
        answering.answer_batch(tiny, [(0, questions[0])], turns)["pdrop", 4], Impossible
    )


def test_rows_say_how_much_of_the_evidence_was_kept(tiny):
    questions = tiny_world.load(n=12)
    ways = {
        ("vanilla", 0): None,
        ("evidence", 48): baselines.way("evidence", tiny),
        ("first", 48): Way(lambda asked, k: [torch.arange(k)] * len(asked.units.grid)),
        ("fastv", 48): baselines.way("fastv", tiny),
    }
    rows = answering.answer_batch(tiny, [*enumerate(questions)], ways)
    cover = [question.evidence((12, 12)) for question in questions]
    for q, share in enumerate(cover):
        if share.sum():
            assert rows["vanilla", 0][q]["recall"] == 1
            assert rows["evidence", 48][q]["recall"] == pytest.approx(1, abs=1e-6)
            wanted = (share[:48].sum() / share.sum()).item()
            assert rows["first", 48][q]["recall"] == wanted
            assert 0 <= rows["fastv", 48][q]["recall"] <= 1
        else:
            assert all(each[q]["recall"] is None for each in rows.values())
    assert sum(share.sum() > 0 for share in cover) > 8
    # a benchmark that does not say where the answer stands has no such entry
    without = [Question(q.id, q.images, q.prompt, q.gold, q.limit) for q in questions[:1]]
    assert (
        "recall"
        not in answering.answer_batch(tiny, [*enumerate(without)], {("vanilla", 0): None})[
            "vanilla", 0
        ][0]
    )


def test_several_views_have_no_evidence(vlm, family):
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue", "green")]
    asked = answering.ask(
        vlm,
        [
            Question(
                "1",
                lambda: frames,
                "what colour ?",
                {},
                4,
                lambda grid: torch.ones(grid[0] * grid[1]),
            )
        ],
    )
    assert asked.evidence == [None] and answering.recall(None, asked.evidence) == [None]


def test_calibration_goes_through_all_questions(tiny):
    questions = tiny_world.load(split="calibration", n=10)
    batches = [*answering.calibration_batches(tiny, questions, 4)]
    assert [len(units.grid) for units, _ in batches] == [4] * (len(questions) // 4) + [
        len(questions) % 4
    ] * (len(questions) % 4 > 0)
    assert all(len(question[0]) == len(units.grid) for units, question in batches)
    same = [answering.content(question) for question in questions[:2]]
    assert same[0] == same[1] == answering.ask(tiny, questions[:1]).names[0]


def test_questions_that_do_not_fit_are_named(tiny):
    with pytest.raises(ValueError, match="rows, from 0, are the questions 5"):
        answering.answer_batch(tiny, [(0, question(5, "what is this thingummy ?"))], {})
    broken = Question("9", lambda: [picture({"bytes": b"none", "path": "x.png"})], "what ?", {}, 4)
    with pytest.raises(ValueError, match="pictures of question '9' cannot be read: x.png"):
        answering.answer_batch(tiny, [(0, broken)], {})


def test_a_picture_that_qwens_processor_refuses_is_named(tiny):
    sizes = {"a": [(56, 28)], "b": [(56, 28), (6, 1206)]}
    questions = [Question(name, lambda two=two: [Image.new("RGB", size) for size in two],
                          "what colour ?", {}, 1) for name, two in sizes.items()]
    line = (r"^a picture of question 'b' is too oblong: 6x1206 pixels, expected a side of at most "
            "200 times the other: crop or pad it in a copy of the data$")
    with pytest.raises(ValueError, match=line):
        answering.ask(FrozenVLM.from_pretrained("tiny/qwen2_5_vl", torch.float32), questions)
    # LLaVA's pads it to a square, as the papers do
    assert len(answering.ask(tiny, questions).units.grid) == 2


def test_what_else_is_wrong_with_pictures_is_said_as_it_is(tmp_path):
    video = FrozenVLM.from_pretrained(llava_next_video(tmp_path), torch.float32)
    questions = [Question(str(n), lambda n=n: [Image.new("RGB", (9, 9), (n, 0, 0))] * n, "a", {}, 1)
                 for n in (1, 2)]
    with pytest.raises(ValueError, match=r"^the rows have \[1, 2\] frames: expected as many"):
        answering.ask(video, questions)


def long_and_short():
    """Three questions about one picture, the second of them three times as long."""
    image = Image.new("RGB", (24, 24), "red")
    prompts = ["what colour is the shape ?"] * 3
    prompts[1] = " ".join([prompts[1]] * 3)
    return [Question(str(i), lambda: [image], prompt, {}, 4) for i, prompt in enumerate(prompts)]


def prompt_length(vlm, question, twice=False):
    batch = vlm.batch([question.images()[0]], [[(question.prompt, None)]], ask_twice=twice)
    return int(batch["attention_mask"].sum())


def test_a_question_that_is_too_long_stays_unanswered_and_is_not_asked_again(
    tiny, tmp_path, monkeypatch, capsys
):
    questions = long_and_short()
    ways = {("vanilla", 0): None, ("random", 48): baselines.way("random", tiny)}
    length = prompt_length(tiny, questions[1])
    part = [*enumerate(questions)]
    apart = answering.answer_batch(tiny, [part[0], part[2]], ways)
    monkeypatch.setattr(tiny, "limit", length - 1)
    files = files_for(tmp_path, questions, ways)
    answering.run(tiny, questions, ways, files, 3, title="pope")
    printed = capsys.readouterr().out
    assert printed.count(f"pope 1: {length} tokens are more than the model has positions for") == 1
    for key, file in files.items():
        first, none, last = predictions.read(file.path)[1]
        assert timeless([first, last]) == timeless(apart[key])
        assert none["answer"] == "" and none["too long"] == length and none["number"] == 1
        assert "too long" not in first
    monkeypatch.setattr(answering, "ask", None)                    # nothing is asked again
    answering.run(tiny, questions, ways, files_for(tmp_path, questions, ways), 3)


def test_what_is_too_long_twice_is_asked_once(tiny, monkeypatch):
    questions = long_and_short()
    once, twice = (prompt_length(tiny, questions[1], twice) for twice in (False, True))
    ways = {("twice", "all"): Way(ask_twice=True, stages=lambda k, tokens: {}),
            ("vanilla", 0): None}
    part = [*enumerate(questions)]
    whole = answering.answer_batch(tiny, part, ways)
    monkeypatch.setattr(tiny, "limit", once)
    assert once < twice
    rows = answering.answer_batch(tiny, part, ways)
    assert [*rows] == [*ways]
    assert timeless(rows["vanilla", 0]) == timeless(whole["vanilla", 0])
    assert [x.get("too long") for x in rows["twice", "all"]] == [None, twice, None]
    assert [x["answer"] for x in rows["twice", "all"]][::2] == [
        x["answer"] for x in whole["twice", "all"]
    ][::2]
    units = [units for units, _ in answering.calibration_batches(tiny, questions, 2)]
    assert sum(len(x.grid) for x in units) == 3                    # it is asked once there
    monkeypatch.setattr(tiny, "limit", once - 1)
    units = [units for units, _ in answering.calibration_batches(tiny, questions[1:], 1)]
    assert len(units) == 1
    only = answering.answer_batch(tiny, part[1:2], ways)
    assert all(x["too long"] for (x,) in only.values())


def test_what_is_read_ahead_is_answered_as_ever(tiny, tmp_path, monkeypatch):
    """By another process, with a question that is too long, once or twice, among the others."""
    questions = sample(tiny_world.load(n=20), 9) + long_and_short()
    questions = [replace(each, id=str(n), limit=4) for n, each in enumerate(questions)]
    monkeypatch.setattr(tiny, "limit", prompt_length(tiny, questions[10]))
    ways = {("vanilla", 0): None, ("random", 48): baselines.way("random", tiny),
            ("twice", "all"): Way(ask_twice=True, stages=lambda k, tokens: {})}
    plain = files_for(tmp_path / "plain", questions, ways)
    answering.run(tiny, questions, ways, plain, 4)
    steered = [*answering.calibration_batches(tiny, questions, 4)]

    def watched(n, images):
        def read():
            (tmp_path / f"{n} {os.getpid()}").touch()
            return images()
        return read
    watched = [replace(each, images=watched(n, each.images)) for n, each in enumerate(questions)]
    ahead = files_for(tmp_path / "ahead", questions, ways)
    monkeypatch.setattr(answering, "reads_ahead", lambda vlm: True)
    answering.run(tiny, watched, ways, ahead, 4)
    for way in ways:
        rows = predictions.read(ahead[way].path)[1]
        assert timeless(rows) == timeless(predictions.read(plain[way].path)[1])
    assert ["too long" in row for row in rows] == [n == 10 for n in range(12)]
    here = {path.name.split()[0] for path in tmp_path.glob(f"* {os.getpid()}")}
    assert here == {"8", "9", "10", "11"}          # the batch of the one that was refused there
    assert len([*tmp_path.glob("* *")]) == 12 + 4
    for (units, words), (same, as_well) in zip(
        steered, answering.calibration_batches(tiny, questions, 4), strict=True
    ):
        assert torch.equal(units.feats, same.feats) and torch.equal(words[0], as_well[0])


def test_k_counts_units_before_and_inside_the_language_model(vlm, family):
    """Newlines, which some families have, come on top, and stay with their lines."""
    rivals = {"fastv": (fastv, (1,), {}), "dart": (dart, (1,), {}), "pact": (pact, (2,), {}),
              "pdrop": (pdrop, (1, 2), {"count": "last"}),
              "sparsevlm": (sparsevlm, (1, 2), {"count": "last"}),
              "plus": (sparsevlm, (1, 2), {"count": "last", "plus": True})}
    questions = mixed(2)
    asked = answering.ask(vlm, questions)
    (units,) = set(asked.tokens())
    shown = Shown.of(vlm, asked.batch, asked.units)
    newlines = [int((unit < 0).sum()) for unit in shown.unit]
    k = units // 2
    ways = {("vanilla", 0): None, ("random", k): baselines.way("random", vlm)}
    for name, (module, layers, how) in rivals.items():
        way = Way(stages=partial(lambda k, tokens, module, layers, how: module.stages(
            k, tokens, 3, layers, **how), module=module, layers=layers, how=how))
        ways |= {(name, k): way, (name, 0.5): way}
    answers = answering.answer_batch(vlm, [*enumerate(questions)], ways)
    assert [x["kept"] for x in answers["vanilla", 0]] == [units, units]
    for key, rows in answers.items():
        for x, more in zip(rows, newlines):
            if key[0] == "vanilla":
                continue
            assert x["kept"] == (wanted := k if key[1] == k else round(0.5 * units)), key
            assert wanted <= x["seen"][1] <= wanted + more, key
            assert not more or x["seen"][1] > wanted, key           # some line has a unit left


def test_a_rule_inside_does_not_see_newlines(vlm, family):
    """Only units, the text as it is, and what it writes goes to the units."""
    questions = mixed(4)[:3]
    asked = answering.ask(vlm, questions)
    units = asked.tokens()
    shown = Shown.of(vlm, asked.batch, asked.units)
    seen = []

    def rule(view):
        seen.append(view)
        assert view.valid.sum(1).tolist() == view.entered
        assert [int(o[v].max()) + 1 for o, v in zip(view.origin, view.valid)] == view.entered
        assert all(len(own) == n for own, n in zip(view.shown.unit, view.entered))
        keep = [torch.tensor([0, n // 2, n - 1]) for n in view.entered]
        return keep, {"embeds": [torch.full_like(x[:3], 7.) for x in view.states],
                      "log_size": [x.new_tensor([1., 2., 3.]) for x in view.states],
                      "origin": [o[index] for o, index in zip(view.origin, keep)]}

    def look(view):
        seen.append(view)
        return [valid.nonzero().flatten() for valid in view.valid]

    ways = {("three", 3): Way(stages=lambda k, tokens: {1: rule, 2: look})}
    rows = answering.answer_batch(vlm, [*enumerate(questions)], ways)["three", 3]
    assert not isinstance(rows, Impossible), rows
    assert [x["kept"] for x in rows] == [3, 3, 3]
    first, second = seen
    assert first.entered == units
    for b, n in enumerate(units):
        # the rule counts in the order of the prompt, in which crops lie side by side
        kept = shown.unit[b][shown.unit[b] >= 0][[0, n // 2, n - 1]]
        lines = shown.line[b][torch.isin(shown.unit[b], kept)]
        newlines = int(((shown.unit[b] < 0) & torch.isin(shown.line[b], lines)).sum())
        assert rows[b]["seen"][1] == 3 + newlines
        assert second.origin[b, second.valid[b]].tolist() == [0, n // 2, n - 1]
        # what was written is at the units when layer 1 runs
        assert (second.pad(second.before.embeds)[0][b] == 7).all()
        assert second.pad(second.prompt.log_size)[0][b].tolist() == [1, 2, 3]
        # the text behind the image begins behind the last newline
        is_image = asked.batch["input_ids"][b] == vlm.image_id
        behind = len(is_image) - 1 - int(is_image.nonzero().max())
        assert first.behind[b].sum() == second.behind[b].sum() == behind


def test_the_time_to_select_inside_is_counted_once(tiny):
    questions = mixed(2)[:1]

    def slow(view):
        time.sleep(.3)
        return [valid.nonzero().flatten()[:4] for valid in view.valid]
    ways = {("slow", 4): Way(stages=lambda k, tokens: {1: slow, 2: slow})}
    start = time.perf_counter()
    (x,) = answering.answer_batch(tiny, [*enumerate(questions)], ways)["slow", 4]
    whole = 1e3 * (time.perf_counter() - start)
    assert x["ms"]["select"] >= 600 and 0 <= x["ms"]["prefill"] < 300
    assert sum(x["ms"].values()) <= whole


def test_flops_are_those_that_pytorch_counts():
    vlm = FrozenVLM.from_pretrained("tiny/qwen2_5_vl")
    config = vlm.model.config
    counted, _ = flops.prefill(blank_model(config).eval(), 50)
    # PyTorch counts the rotary angles too
    assert prefill_flops(config.text_config, [50] * len(vlm.lm.layers)) == pytest.approx(
        counted, 0.01
    )
    assert per_layer(9, {2: 4}, 4) == [9, 9, 4, 4]
