"""What every option is unless told otherwise, and the least that it may be."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import baselines
import evaluate
import runs
import train

ROOT = Path(__file__).resolve().parents[1]
METHODS = runs.method_names()
# of each method the least of its options, and the most where there is one
LEAST = {
    "autoselect": dict(layers=1, tau_start=1e-6, tau_end=1e-6),
    "stepprune": dict(max_text=1, max_steps=1, layers=0, decoder_layers=1, tau_pointer=1e-6,
                      gamma=0, momentum=0, hops=-1, tau_start=1e-6, tau_end=1e-6, length_weight=0,
                      length_weight_end=0, text_steps=0),
    "recon_selector": dict(layers=1, rebuild_layers=1, image_layers=0, keep_low=0, alpha1=0,
                           alpha2=0, tau=1e-6, select_after_layer=0)}
MOST = {"stepprune": dict(gamma=1, momentum=1), "recon_selector": dict(keep_high=1)}
# what a large encoder trains with: nobody has run it here, so nothing else would tell
LARGE = {
    "autoselect": dict(steps=5000, batch=32, lr=1e-4, autocast=True, layers=5, heads=16),
    "stepprune": dict(steps=5000, batch=16, lr=1e-4, autocast=True, layers=2, heads=16,
                      tau_start=1.0, tau_end=0.2, max_steps=192, max_text=512),
    "recon_selector": dict(steps=0, epochs=100.0, batch=32, lr=1e-5, autocast=True, layers=4,
                           heads=16)}


def beside(value, step):
    return value + step * (1 if isinstance(value, int) and value != 0 else 1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_the_least_and_the_most_of_an_option_are_taken_and_what_is_beyond_is_not(name):
    config = runs.load_method(name).Config
    for bounds, beyond in ((LEAST[name], -1), (MOST.get(name, {}), 1)):
        for option, value in bounds.items():
            assert getattr(config(**{option: value}), option) == value
            with pytest.raises(ValueError, match=f"^{option}=.*: expected "):
                config(**{option: beside(value, beyond)})


@pytest.mark.parametrize("config, least", [
    (train.TrainConfig, dict(batch=1, save_every=1, questions=0, micro=0, lr=0, seed=0,
                             workers=0)),
    (evaluate.EvalConfig, dict(sample=0, calibration=1, batch=0, resamples=1, seed=0))])
def test_the_least_of_what_training_and_evaluation_take(config, least):
    steps = dict(steps=1) if config is train.TrainConfig else {}
    for option, value in least.items():
        assert getattr(config(**steps, **{option: value}), option) == value
        with pytest.raises(ValueError, match=f"^{option}=.*: expected at least {value}"):
            config(**steps, **{option: value - 1})


def test_what_budgets_and_methods_may_be():
    config = evaluate.EvalConfig(budgets=[1.0, 0.5, 64.0], methods=["all"])
    assert config.budgets == [1, 0.5, 64] and list(map(type, config.budgets)) == [int, float, int]
    assert {*baselines.names()} - {*config.methods} == {"evidence"}
    assert evaluate.EvalConfig(methods=["evidence", "fastv"]).methods == ["evidence", "fastv"]
    for budgets in ([], [1.5], [64, 0], [-1], [float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="^budgets=.*: expected "):
            evaluate.EvalConfig(budgets=budgets)
    for keep in ([], [0], [16, -1], [float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="^keep=.*: expected "):
            runs.load_method("autoselect").Config(keep=keep)
    for steps in (dict(steps=0, epochs=0.5), dict(steps=2, epochs=0)):
        train.TrainConfig(**steps)
    with pytest.raises(ValueError, match="steps=0, epochs=0: expected one of them above 0"):
        train.TrainConfig()


def test_where_an_evaluation_goes_unless_told_otherwise(tmp_path):
    run = tmp_path / "run"
    (run / "selector").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (run / "selector" / name).write_bytes(
            (ROOT / "results/autoselect_tiny/selector" / name).read_bytes())
    for given, out, model in ((dict(run=[str(run)]), run, "tiny/llava"),
                              (dict(run=[str(run / "selector")]), run, "tiny/llava"),
                              (dict(model="tiny/vlm"), Path("runs/vlm"), "tiny/vlm"),
                              (dict(model="m", run=[str(run)], out="o"), Path("o"), "m")):
        config = evaluate.EvalConfig(**given, device="cpu")
        evaluate.settle(config)
        assert (Path(config.out), config.model) == (out, model)


def test_a_way_and_a_step_are_plain_unless_told_otherwise():
    way = runs.Way()
    assert not (way.reads_question or way.adaptive or way.ask_twice or way.needs)
    assert way.select is way.budgets is way.gate is way.stages is None
    step = train.Step(0, 1, 0, [[0]], Accelerator(cpu=True))
    assert not step.in_bfloat16 and step.part == 0 and step.answers == step.rows == 1


def test_the_two_newest_checkpoints_stay(tmp_path):
    net = torch.nn.Linear(1, 1)
    for step in (2, 10, 9, 11):
        runs.save_checkpoint(tmp_path, step, net, torch.optim.SGD(net.parameters(), 1.0))
    assert [path.stem for path in runs.checkpoints(tmp_path)] == ["0000010", "0000011"]


def test_the_rate_warms_up_in_50_steps_and_is_a_cosine():
    rate = runs.Selector.learning_rate
    assert [rate(2.0, number, 200) for number in (0, 24)] == pytest.approx([0.04, 0.9648], rel=1e-3)
    assert [rate(2.0, number, 200) for number in (100, 200)] == pytest.approx([1.0, 0])


@pytest.mark.parametrize("config", [
    train.TrainConfig, evaluate.EvalConfig,
    *(runs.options_class(runs.load_method(name).Config) for name in METHODS)])
def test_every_option_says_what_it_is(config):
    assert all(option.metadata["help"] for option in dataclasses.fields(config))


def test_a_value_that_is_empty_is_said_to_be_missing(capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse(["--method", "autoselect", "--run", ""])
    assert ended.value.code == 2
    assert "nothing stands behind --run: expected a value" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_the_shipped_selectors_were_trained_with_the_defaults(name):
    """So that whoever types the command of the README gets what results/ shows."""
    run = name.removesuffix("_selector")
    about = json.loads((ROOT / f"results/{run}_tiny/selector/config.json").read_text())
    config, options = train.parse(["--method", name])
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu")
    steps = about["training"].pop("steps")
    assert (config.steps or config.epochs * config.n_pictures / config.batch) == steps
    assert {key: getattr(config, key) for key in about["training"]} == about["training"]
    assert vars(options) == {key: about["cfg"][key] for key in vars(options)}


@pytest.mark.parametrize("name", METHODS)
def test_a_large_encoder_trains_with_other_defaults(name):
    module = runs.load_method(name)
    assert module.LARGE == LARGE[name]
    assert runs.preset(module, 512) is module.LARGE and runs.preset(module, 511) is module.TINY


@pytest.mark.parametrize("name", METHODS)
def test_sizes_that_nobody_gives_are_those_of_llava(name):
    """336 pixels in patches of 14, CLIP's width, the width of Vicuna."""
    config = runs.load_method(name).Config
    vlm = SimpleNamespace(width=1024, dim=4096, unit_side=14,
                          adapter=SimpleNamespace(unlike_patches=0),
                          fingerprint=lambda: {"vision_side": 24})
    assert dataclasses.asdict(config.of(vlm)) == dataclasses.asdict(config())


@pytest.mark.parametrize("name", METHODS)
def test_a_papers_table_says_on_what_and_where_it_differs(name):
    headline = runs.load_method(name).HEADLINE
    assert headline["model"] and headline["train"]["data"] and all(headline["deviations"])
    assert isinstance(headline["deviations"], tuple)
