"""From a list of trainings to a page of verdicts, and what is made again when code changes."""

import ast
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import runs
from measure import claims, experiments
from measure.evidence import Claim, Table, above, below
from measure.experiments import Asked, Job, Setting

ROOT = Path(__file__).resolve().parents[2]
METHODS = runs.method_names()


# ---- the fingerprint of a method's code

def changed(tmp_path, monkeypatch, name: str, old: str, new: str) -> bool:
    """Whether another text in a method's file gives StepPrune, which takes AutoSelect's parts,
    another fingerprint."""
    before = runs.code_of("stepprune")
    text = (ROOT / f"{name}.py").read_text()
    assert old in text
    (tmp_path / f"{name}.py").write_text(text.replace(old, new))
    find_spec = runs.importlib.util.find_spec
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda stem: (
        SimpleNamespace(origin=str(tmp_path / f"{name}.py")) if stem == name else find_spec(stem)))
    return runs.code_of("stepprune") != before


@pytest.mark.parametrize("name, old, new, is_other", [
    ("stepprune", "gamma ** steps", "gamma ** (steps + 1)", True),
    ("autoselect", "eps: float = 1e-6", "eps: float = 1e-5", True),
    ("recon_selector", "share.clamp_min(p)", "share.clamp_min(q)", False),
    ("stepprune", "# Eq. (12)", "# Equation 12", False),
    ("stepprune", "Policy, gate and denoiser", "Gate, policy and denoiser", False)])
def test_other_code_has_another_fingerprint_and_other_words_have_not(tmp_path, monkeypatch, name,
                                                                     old, new, is_other):
    assert changed(tmp_path, monkeypatch, name, old, new) == is_other


def test_a_fingerprint_leaves_the_code_as_it_is():
    assert len({runs.code_of(name) for name in METHODS}) == len(METHODS)
    assert all(len(runs.code_of(name)) == 12 for name in METHODS)


def test_a_fingerprint_is_of_code_not_of_words():
    def function(doc: str, body: str) -> str:
        return f'"""A file."""\n\n\ndef twice(x):\n    """{doc}"""\n    {body}\n'
    plain = runs.code_alone(function("Two x.", "return f'#{x}' * 2"))
    assert plain == "def twice(x):\n    return f'#{x}' * 2"
    assert runs.code_alone(function("2 x,\n\n    in words.", "return f'#{x}' * 2  # two")) == plain
    assert runs.code_alone(function("Two x.", "return f'#{x}' * 3")) != plain


# ---- what there is to do

SHORT = "--method autoselect --steps 6 --batch 2 --layers 1 --save_every 3"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """One setting of two seeds, twelve questions, the tiny LLaVA; folders of their own."""
    toy = SimpleNamespace(
        PAPER="Toy", SETTINGS={"toy": Setting(
            SHORT, {"llava": 2}, "threshold", (16, 8), ("", " reindexed"),
            (lambda vlm, selector: {"width": vlm.width},))},
        CLAIMS=[Claim("1", "It is as wide as the encoder.", "-",
                      {"width": lambda d: d.measured("toy", "width")}, above(127)),
                Claim("2", "A threshold keeps 16.", "-",
                      {"tokens": lambda d: d.tokens("toy threshold", 16)}, below(1000)),
                Claim("3", "It is better elsewhere.", "-",
                      {"K = 16": lambda d: d("toy", 16)}, above(), table="qwen2_5_vl"),
                Claim("4", "Its brother is better.", "-",
                      {"K = 16": lambda d: d("brother", 16)}, above())])
    for module in (experiments, claims):
        monkeypatch.setattr(module, "papers", lambda: {"toy": toy})
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results/claims")
        monkeypatch.setattr(module, "BUDGETS", (16,))
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "RIVALS", ("random",))
    monkeypatch.setattr(experiments, "ASKED", {
        "": Asked("--sample 12 --calibration 12", "{vlm}"),
        " reindexed": Asked("--sample 12 --positions reindex", "{vlm}", (8,), alone=True)})
    return toy


def test_the_plan_says_what_is_there(small, capsys):
    experiments.main(["--plan"])
    assert "toy                    new, new" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only='nobody' matches none of llava/toy"):
        experiments.main(["--plan", "--only", "nobody"])
    assert [job.seed for job in experiments.jobs("_s1")] == [1]


@pytest.mark.slow
def test_a_training_that_fails_is_named_and_the_others_go_on(small):
    small.SETTINGS = {"wrong": Setting("--method autoselect --heads 3", {"llava": 1}),
                      "wronger": Setting("--method nobody", {"llava": 1})}
    with pytest.raises(RuntimeError, match="llava/wrong_s0, .*llava/wronger_s0 failed: the .txt"):
        experiments.main(["--jobs", "2"])
    said = (experiments.RUNS / "llava/wrong_s0.txt").read_text()
    assert "heads=3: expected a number that parts the width" in said


@pytest.mark.slow
def test_from_a_list_to_a_page(small, capsys, monkeypatch):
    experiments.main(["--jobs", "2"])
    first = experiments.jobs()[0]
    assert [job.state() for job in experiments.jobs()] == ["done", "done"]
    table = Table.load(experiments.RESULTS / "llava.json.gz")
    assert table.right["toy", 16].shape == (2, len(table.families))
    assert len(table.measured["toy", "width"]) == 2             # a run counts once, however asked
    assert ("toy", 8) in table.right and ("toy reindexed", 8) not in table.right
    assert {name for name, _ in table.right} == {
        "vanilla", "toy", "toy threshold", "toy reindexed", "random", "random reindexed"}
    text = claims.main(["--results", str(experiments.RESULTS)])
    verdicts = [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| ")]
    assert verdicts == ["verdict", "**holds**", "**holds**", "*runs are missing*",
                        "*runs are missing: brother*"]
    assert "+128.0 (+128.0 to +128.0)" in text and "[2 seeds](claims/llava.md)" in text
    assert SHORT in (experiments.RESULTS / "llava.md").read_text()

    # what is answered is not asked again, nor steered: of several runs those that are new
    real, asked = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **how: asked.append(command) or real(
        command, **how))
    experiments.main([])
    assert not asked
    path = experiments.RUNS / "llava/answers_threshold_16_8/predictions/answered.json"
    known = runs.read_json(path)
    del known["weights"][str(first.run)]
    path.write_text(json.dumps(known))
    experiments.main([])
    assert [command[command.index("--run") + 1:] for command in asked] == [[str(first.run)]]
    assert Table.load(experiments.RESULTS / "llava.json.gz").right.keys() == table.right.keys()

    # made by other code: said, proved by its first losses, or made again
    about = runs.read_json(first.run / "config.json")
    (first.run / "config.json").write_text(json.dumps(about | {"code": "old"}))
    assert first.state() == "stale"
    table.made["toy"]["code"] = "old"
    table.save(experiments.RESULTS / "llava.json.gz")
    text = claims.main(["--results", str(experiments.RESULTS)])
    assert text.count("*made by other code: toy*") == 2

    # what one seed says is marked
    table.made["toy"]["code"] = about["code"]
    for key in [key for key in table.right if key[0].startswith("toy")]:
        table.right[key] = table.right[key][:1]
    assert "**holds, one seed**" in claims.page({"llava": table})
    assert experiments.prove(first) and first.state() == "done"
    (first.run / "config.json").write_text(json.dumps(about | {"code": "old"}))
    log = first.run / "log.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1'))
    assert not experiments.prove(first) and first.state() == "stale"

    # a killed training goes on
    shutil.rmtree(first.run / "selector")
    (first.run / "config.json").write_text(json.dumps(about))
    assert first.state() == "begun"
    experiments.train([first], 1)
    assert first.state() == "done" and isinstance(first, Job)


# ---- the page that is in results/

def test_every_claim_asks_for_what_is_trained_and_answered():
    """By the texts of the files: names in effects are settings, their ways, or rivals."""
    known = {*experiments.RIVALS, "vanilla"}
    for name, setting in experiments.settings().items():
        for suffix in setting.asked:
            suffix = "" if suffix == " crowded" else suffix
            known |= {f"{name}{way}{suffix}" for way in
                      ["", *(f" {way}" for way in setting.ways.split() * (not suffix)), " mask",
                       " asked twice"]}

    class Noted:
        """In place of Draws: notes what a claim asks for."""
        def __init__(self):
            self.names = []

        def __call__(self, name, *_):
            self.names.append(name)
            return 0.

        def __getattr__(self, _):
            return self
    for module in experiments.papers().values():
        assert module.PAPER and module.CLAIMS and ast.parse(Path(module.__file__).read_text())
        for claim in module.CLAIMS:
            assert claim.table in experiments.TABLES
            for effect in claim.effects.values():
                effect(asked := Noted())
                assert asked.names and {*asked.names} <= known, (claim.place, asked.names)


def tables() -> dict:
    folder = ROOT / "results/claims"
    return {path.name.removesuffix(".json.gz"): Table.load(path)
            for path in folder.glob("*.json.gz")}


@pytest.mark.parametrize("name", tables())
def test_no_answer_is_older_than_the_code_that_makes_it(name):
    """A method's file was edited, or a setting: python -m measure.experiments --prove."""
    table = tables()[name]
    known = experiments.settings()
    stale = [setting for setting, made in table.made.items()
             if setting not in known or claims.is_stale(made, known[setting])]
    assert not stale
    vlm = name.removesuffix("_crowded")
    for setting in table.made:
        assert 1 <= len(table.right[setting, 16]) <= known[setting].seeds[vlm]


@pytest.mark.slow
@pytest.mark.skipif(not tables(), reason="the experiments are not done: make claims")
def test_the_page_is_that_of_the_answers():
    assert claims.page(tables()).strip() == (ROOT / "results/claims.md").read_text().strip()


@pytest.mark.parametrize("name", METHODS)
def test_shipped_selectors_were_made_by_this_code(name):
    run = name.removesuffix("_selector")
    about = runs.read_json(ROOT / f"results/{run}_tiny/selector/config.json")
    assert about["code"] == runs.code_of(name)
