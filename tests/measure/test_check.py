"""The check passes where all is right, and every line of it can fail."""

import json
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import runs
from benchmarks import costs
from common import kept_mask
from measure import check, shapes
from tiny import scenes

VERDICTS = ["inputs", "all tokens", "greedy", "pruned", "gradients", "scenes"]
NAMES = ["loaded", "prompt", *VERDICTS[:4], "selection", "gradients", "memory", "times", "scenes"]

pytestmark = pytest.mark.usefixtures("one_thread")


def subject_of(model: str = "tiny/llava", *args: str) -> check.Subject:
    return check.load(check.parse([str(model), "--dtype", "float32", *args]))


def verdicts(lines: list[dict]) -> dict[str, bool]:
    return {line["name"]: line["passed"] for line in lines if line["passed"] is not None}


@torch.no_grad()
def passes(subject: check.Subject, *checks) -> list[bool]:
    return [one(subject).passed for one in checks]


# ------------------------------------------------------------------ where all is right


def test_every_line_passes_on_the_shipped_llava(tmp_path, capsys):
    lines = check.main(["tiny/llava", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert [line["name"] for line in lines] == NAMES
    assert verdicts(lines) == dict.fromkeys(VERDICTS, True)
    assert shown.count("PASS ") == len(VERDICTS) and "FAIL" not in shown
    saved = json.loads((tmp_path / "check.json").read_text())
    assert saved["lines"] == lines and saved["device"].startswith("cpu") and saved["torch"]
    numbers = {line["name"]: line["numbers"] for line in lines}
    assert numbers["loaded"]["units"] == 144 and numbers["loaded"]["K"] == 16
    assert "<image> x 144 what colour" in numbers["prompt"]["prompt"]
    assert numbers["pruned"]["gap"] <= numbers["pruned"]["tolerance"] < .5
    assert numbers["pruned"]["positions anew"] > 2 * numbers["pruned"]["tolerance"]
    assert numbers["greedy"]["tokens"] == numbers["greedy"]["own"]
    assert len(numbers["greedy"]["own"]) == check.GREEDY
    for name in runs.method_names():
        memory = numbers["memory"][name]
        assert memory["bytes a picture"] > 1e6 and memory["micro"] >= 1
        assert numbers["times"][f"selection by {name}"] > 0
        assert numbers["gradients"]["parameters"][name] > 10
    assert numbers["times"]["prefill of 144"] > 0 < numbers["times"]["a token behind 16"]
    answers = numbers["scenes"]["answers"]
    assert len(answers) == 10 and numbers["scenes"]["right"] >= 9
    assert sum(each["right"] for each in answers) == numbers["scenes"]["right"]
    assert {each["K"] for each in answers} == {16}


@pytest.mark.slow
def test_random_weights_of_every_family_fail_at_the_scenes_alone(path, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "REPEATS", 1)
    with pytest.raises(RuntimeError, match="^1 of 11 checks failed: scenes$"):
        check.main([path, "--dtype", "float32", "--out", str(tmp_path)])
    lines = json.loads((tmp_path / "check.json").read_text())["lines"]
    assert [line["name"] for line in lines] == NAMES
    assert verdicts(lines) == dict.fromkeys(VERDICTS, True) | {"scenes": False}


def test_the_papers_prompt_is_asked_for_in_full(tmp_path):
    folder = shapes.write("llava-1.5-7b", tmp_path / "layout", shrink=True, weights=True)
    subject = subject_of(folder)
    assert check.check_prompt(subject).numbers["prompt"] == (
        f"<s>{check.SYSTEM}USER: <image> x 576\nWhat colour is the triangle?\n"
        "Answer the question using a single word or phrase. ASSISTANT:")
    stock = subject_of(folder, "--protocol", "stock")
    prompt = check.check_prompt(stock).numbers["prompt"]
    assert prompt.startswith("<s>USER: <image> x 576\nWhat colour")
    for each in (subject, stock):
        assert all(passes(each, check.check_inputs, check.check_all_tokens))
    subject.options.protocol = "stock"                 # asked for one, got the other
    assert passes(subject, check.check_inputs) == [False]


def test_a_trained_selector_is_checked_timed_and_asked(tmp_path):
    run = "results/autoselect_tiny/selector"
    subject = subject_of("tiny/llava", "--run", run, "--keep", "24")
    with torch.no_grad():
        selection, times, asked = [one(subject) for one in (
            check.check_selection, check.check_times, check.check_scenes)]
    assert selection.passed and selection.numbers["kept, K"] == [[24, 24], [24, 24]]
    assert times.numbers[f"selection by {run}"] > 0
    assert not any(f"selection by {name}" in times.numbers for name in runs.method_names())
    assert asked.numbers["rule"] == run and run in asked.text
    assert asked.numbers["right with few"] >= 8, "random tokens have 3 or 4"


# ------------------------------------------------------------------ what must fail


def renumber(vlm, patch):
    patch.setattr(vlm, "prune", partial(vlm.prune, positions="reindex"))


def unfreeze(vlm, patch):
    weight = vlm.lm.layers[1].self_attn.q_proj.weight
    patch.setattr(weight, "requires_grad", True)


def shift_mean(vlm, patch):
    patch.setattr(vlm.processor.image_processor, "image_mean", [.3, .45, .41])


def shorten_template(vlm, patch):
    template = vlm.processor.chat_template.replace("'USER: '", "''")
    assert template != vlm.processor.chat_template
    patch.setattr(vlm.processor, "chat_template", template)


def mix_up_units(vlm, patch):
    """The encoder's units in another order than the language model gets them from the stock."""
    encode = vlm.encode

    def encoded(batch):
        units = encode(batch)
        return replace(units, feats=units.feats.flip(0))
    patch.setattr(vlm, "encode", encoded)


def say_other_things(vlm, patch):
    patch.setattr(vlm, "texts", lambda tokens: ["green"] * len(tokens))


@pytest.fixture(scope="module")
def subject():
    return subject_of()


@pytest.mark.parametrize("mutate, failing, passing", [
    (renumber, [check.check_pruned], [check.check_inputs, check.check_greedy]),
    (unfreeze, [check.check_gradients], [check.check_inputs, check.check_all_tokens]),
    (shift_mean, [check.check_inputs, check.check_all_tokens], [check.check_pruned]),
    (shorten_template, [check.check_inputs], [check.check_pruned]),
    (mix_up_units, [check.check_all_tokens, check.check_greedy], [check.check_inputs]),
    (say_other_things, [check.check_scenes], [check.check_greedy])])
def test_a_fault_fails_at_its_line(subject, mutate, failing, passing, monkeypatch):
    name = runs.method_names()[0]
    monkeypatch.setattr(runs, "method_names", lambda: [name])
    assert all(passes(subject, *failing, *passing))
    mutate(subject.vlm, monkeypatch)
    assert not any(passes(subject, *failing)) and all(passes(subject, *passing))


def test_a_selector_that_keeps_too_few_or_out_of_order_fails(monkeypatch):
    subject = subject_of("tiny/llava", "--run", "results/autoselect_tiny/selector")
    select = subject.selector.select
    subject.selector.select = lambda units, question, k: select(units, question, k - 1)
    assert passes(subject, check.check_selection) == [False]
    subject.selector.select = lambda *asked: [row.flip(0) for row in select(*asked)]
    monkeypatch.setattr(check, "CHECKS", (check.check_selection, check.check_pruned))
    selection, pruned = check.examine(subject)
    assert selection.passed is False and "ValueError" in selection.text
    assert "ascending" in selection.text
    assert pruned.passed, "the other lines come all the same"


def test_a_parameter_without_a_gradient_is_named(subject, monkeypatch):
    name = runs.method_names()[0]
    module = runs.load_method(name)

    class Lazy(module.Method):
        def __init__(self, config):
            super().__init__(config)
            self.unused = torch.nn.Parameter(torch.zeros(2))
    monkeypatch.setattr(runs, "method_names", lambda: [name])
    monkeypatch.setattr(module, "Method", Lazy)
    line = check.check_gradients(subject)
    assert line.passed is False and "(not unused)" in line.text
    assert line.numbers["without"][name] == ["unused"] and not line.numbers["of the VLM"]


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("fit", [0, 1])
def test_out_of_memory_is_an_answer(subject, monkeypatch, fit):
    """At the first picture, and at the second."""
    calls = []

    def peak_bytes(run, device):
        calls.append(device)
        if (len(calls) - 1) % (fit + 1) == fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1
    monkeypatch.setattr(costs, "peak_bytes", peak_bytes)
    line = check.check_memory(subject)
    for name in runs.method_names():
        assert f"{name}: out of memory at {fit + 1}" in line.text
        assert line.numbers[name] == {"micro": fit}


def test_pictures_at_a_time_follow_from_what_one_takes(subject, monkeypatch):
    """Two numbers for peaks: what is not one picture's is there once, and so is AdamW's state."""
    name, free = runs.method_names()[0], 30 * 2**20
    monkeypatch.setattr(runs, "method_names", lambda: [name])
    monkeypatch.setattr(costs, "free_bytes", lambda device: free)
    whole = check.check_memory(subject).numbers[name]
    peaks = iter([5 * 2**20, 7 * 2**20])
    monkeypatch.setattr(costs, "peak_bytes", lambda run, device: next(peaks))
    line = check.check_memory(subject)
    _, selector, values = next(check.methods(subject.vlm))
    state = 2 * sum(p.nbytes for p in selector.parameters())
    fixed = 3 * 2**20 + state
    assert line.numbers[name]["fixed bytes"] == fixed
    assert line.numbers[name]["bytes a picture"] == 2 * 2**20
    micro = line.numbers[name]["micro"]
    assert 0 < micro == int((free * (1 - costs.SPARE) - fixed) // 2**21) < values["batch"]
    assert f"--micro {micro} of {values['batch']} fits" in line.text
    assert whole["fixed bytes"] >= state and whole["micro"] < values["batch"]


# ------------------------------------------------------------------ questions and answers


def test_scenes_are_asked_about_what_everybody_would_name(subject):
    kinds = [row.kind for row in subject.drawn]
    assert kinds == ["colour", "shape", "count", "text"] * 2 + ["colour", "shape"]
    answers = {kind: {row.answer for row in subject.drawn if row.kind == kind} for kind in kinds}
    assert answers["colour"] <= {*scenes.COLOURS} and answers["shape"] <= {*check.PLAIN}
    assert answers["count"] <= {*"234"}
    assert all(re.fullmatch("[a-z] [a-z] [a-z]", letters) for letters in answers["text"])
    assert len({row.picture.tobytes() for row in subject.drawn}) == len(kinds)
    assert subject.oblong.picture.size == (192, 108) and subject.oblong.question
    again = check.draw_rows(subject.vlm)["drawn"]
    assert [row.question for row in again] == [row.question for row in subject.drawn]


@pytest.mark.parametrize("kind, truth, answer, right", [
    ("colour", "red", "Red.", True), ("colour", "red", "The circle is red", True),
    ("colour", "red", "red and blue", False), ("colour", "red", "", False),
    ("shape", "star", "a star", True), ("shape", "star", "circle", False),
    ("count", "3", "three", True), ("count", "3", "There are 3 shapes.", True),
    ("count", "3", "2 or 3", False), ("text", "h p v", "HPV", True),
    ("text", "h p v", "h p v", True), ("text", "h p v", "h p", False)])
def test_what_counts_as_right(kind, truth, answer, right):
    assert check.is_right(answer, check.Row(kind, None, "", truth)) is right


def test_a_dropped_unit_is_told_by_what_is_no_number(family, path):
    """The mask hides as many tokens as units were dropped, and newlines whose line is gone."""
    subject = subject_of(path)
    vlm = subject.vlm
    batch, units, n, _ = subject.ask(subject.oblong)
    every = units.pad()[1][0].nonzero().flatten()
    length = batch["input_ids"].shape[1]
    newlines = int((batch["input_ids"] == vlm.image_id).sum()) - n
    assert (newlines > 0) is (family in ("llava_next", "llava_onevision"))
    for keep, left in ((every, length), (every[:0], length - n - newlines)):
        stays = check.visible(vlm, batch, units, kept_mask(units, [keep]))
        assert int(stays.sum()) == left


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("args, message", [
    (["./nowhere"], "no checkpoint at './nowhere'"), (["tiny/vit"], "served by none of the famil"),
    (["tiny/llava", "--device", "cuda:77"], "device='cuda:77'"),
    (["tiny/llava", "--device", "tpu"], "tpu"), (["tiny/llava", "--keep", "-1"], "keep=-1"),
    (["tiny/llava", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["tiny/llava", "--protocol", "mine"], "invalid choice: 'mine'"),
    (["tiny/llava", "--run", "./nothing"], "./nothing is no folder"),
    (["tiny/qwen2_5_vl", "--run", "results/autoselect_tiny/selector"], "another backbone")])
def test_a_mistake_ends_in_one_line_before_weights_are_read(args, message, monkeypatch, capsys):
    def read(*args):
        raise AssertionError("weights were read")
    monkeypatch.setattr("common.read_weights", read)
    monkeypatch.setattr(sys, "argv", ["check.py", *args])
    with pytest.raises(SystemExit) as end:
        runs.command(check.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("check.py:")]
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_float16_is_answered_with_though_not_trained_in():
    subject = check.load(check.parse(["tiny/llava", "--dtype", "float16"]))
    lines = [check.check_gradients(subject), check.check_memory(subject)]
    assert all(line.passed is None and "train.py takes bfloat16" in line.text for line in lines)
    assert all(passes(subject, check.check_all_tokens, check.check_pruned))
