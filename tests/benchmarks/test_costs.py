"""Memory: what is counted is what is held, and what is foretold is what a step takes."""

import copy
from dataclasses import replace

import pytest
import torch
from short_runs import flags, same, short_run, weights

import runs
import train
from benchmarks import answering, costs, tiny_world
from benchmarks.costs import peak_bytes, that_fit, training_bytes
from common import FrozenVLM
from data.batches import batches, open_data

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MIB = 2**20


def test_live_bytes_are_those_of_the_tensors_that_are_held():
    weight = torch.ones(MIB // 4)                                  # was there before: not counted

    def chain():
        doubled = weight * 2                                       # 1 MiB
        tripled = doubled + weight                                 # 2 MiB
        del doubled
        view = tripled.view(2, -1).t()                             # no memory of its own
        return (view + 0).sum()                                    # 2 MiB again, and a number
    assert peak_bytes(chain, CPU) == 2 * MIB + 4
    assert peak_bytes(lambda: weight.mul_(1), CPU) == 0


def test_live_bytes_count_what_the_backward_pass_needs():
    x = torch.zeros(MIB // 4, requires_grad=True)

    def deep(n):
        y = x
        for _ in range(n):
            y = y.exp()                                            # keeps its result
        y.sum().backward()
    five, nine = (peak_bytes(lambda n=n: deep(n), CPU) for n in (5, 9))
    assert nine - five == 4 * MIB
    assert x.grad is not None


def test_what_fits_leaves_some_memory_over(monkeypatch):
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1000)
    assert that_fit(100, CPU, 32) == 8 and that_fit(100, CPU, 5) == 5
    assert that_fit(100, CPU, 32, fixed=500) == 3 and that_fit(2000, CPU, 32) == 0
    monkeypatch.setattr(costs, "free_bytes", lambda device: None)
    assert that_fit(100, CPU, 32) == 32                            # nothing tells


def prepared(tmp_path, method, **changes):
    """What train() has in hand when it asks how many pictures fit."""
    config, options = train.parse(flags(tmp_path, method, batch=8, **changes))
    module = runs.load_method(config.method)
    vlm = FrozenVLM.from_pretrained(config.model, torch.float32)
    torch.manual_seed(0)
    selector = module.Method(module.Config.of(vlm, **vars(options))).train()
    config.steps = config.steps or 4
    return config, vlm, selector, open_data(config, vlm, selector.rows)


@pytest.mark.parametrize("method", runs.method_names())
def test_two_steps_foretell_what_one_of_many_pictures_takes(tmp_path, method):
    """The selector comes out as it went in."""
    config, vlm, selector, data = prepared(tmp_path, method)
    before = copy.deepcopy(selector.state_dict())
    accelerator = train.Accelerator(cpu=True)

    def step(n):
        few = replace(config, micro=n, batch=n, workers=0)
        batch = next(iter(batches(few, vlm, data, selector.rows, 0, 0, 1)))
        items = train.item_numbers(few, 0, accelerator)
        state = train.Step(0, config.steps, 0, items, accelerator, config.autocast)
        return lambda: train.train_step(selector, vlm, [batch], state)
    fixed, picture = training_bytes(selector, step, CPU)
    assert all(torch.equal(x, before[name]) for name, x in selector.state_dict().items())
    assert all(p.grad is None for p in selector.parameters())
    moments = 2 * sum(p.nbytes for p in selector.parameters())
    measured = moments + peak_bytes(step(6), CPU)
    assert .85 < (fixed + 6 * picture) / measured < 1.15


@pytest.mark.parametrize("method", [
    "autoselect", pytest.param("stepprune", marks=pytest.mark.slow)])
def test_micro_follows_from_free_memory_and_the_selector_is_the_same(
        tmp_path, monkeypatch, method):
    """As that of a run that is told the same --micro, bit for bit: to measure changes nothing."""
    told = short_run(tmp_path / "told", method, micro=1)
    monkeypatch.setattr(train, "is_large", lambda vlm: True)       # as if it mattered
    real = costs.that_fit
    for name, fits in (("whole", 2), ("parts", 1)):
        monkeypatch.setattr(costs, "that_fit", lambda *args, fits=fits: min(fits, real(*args)))
        config, options = train.parse(flags(tmp_path / name, method, checkpointing="off"))
        train.train(config, options)
        assert config.micro == fits
    assert same(weights(tmp_path / "parts"), weights(told))
    monkeypatch.setattr(costs, "that_fit", lambda *args: 0)
    with pytest.raises(ValueError, match="not even one picture at a time fits, .*, activations "
                                         "recomputed: expected "):
        train.main(flags(tmp_path / "none", method))


def test_activations_are_recomputed_where_they_would_not_fit(tmp_path, monkeypatch, capsys):
    """Half of a process's pictures at a time, without recomputing, is enough; the selector is the
    same, bit for bit."""
    told = short_run(tmp_path / "told", "autoselect", micro=1, checkpointing="off")
    monkeypatch.setattr(train, "is_large", lambda vlm: True)
    used, asked, kept = [], FrozenVLM.checkpointing, costs.that_fit

    def watched(vlm, on):
        used.append(on)
        asked(vlm, on)
    monkeypatch.setattr(FrozenVLM, "checkpointing", watched)
    for name, fits, ends_with in (("half", (1, 1), False), ("less", (0, 1), True)):
        # of twice one picture's bytes nothing is said here
        monkeypatch.setattr(costs, "that_fit",
                            lambda row, device, most, fixed=0, fits=fits: (
                                kept(row, device, most) if most == 1 and not fixed
                                else fits[used[-1]]))
        config, options = train.parse(flags(tmp_path / name, "autoselect"))
        train.train(config, options)
        assert used[-1] == ends_with and config.micro == 1
        assert ("activations recomputed: 1 at a time" in capsys.readouterr().out) == ends_with
        assert same(weights(tmp_path / name), weights(told))


def test_two_pictures_are_not_tried_where_one_takes_half_of_what_is_there(tmp_path, monkeypatch):
    config, vlm, selector, data = prepared(tmp_path, "autoselect")
    tried = []

    def step(n):
        tried.append(n)
        return lambda: torch.zeros(n * 2**18)                          # of 4 bytes
    moments = 2 * sum(p.nbytes for p in selector.parameters())
    monkeypatch.setattr(costs, "free_bytes", lambda device: 2.5 * 2**20)
    assert training_bytes(selector, step, CPU) == (moments, 2**20) and tried == [1, 2]
    monkeypatch.setattr(costs, "free_bytes", lambda device: 2.3 * 2**20)
    assert training_bytes(selector, step, CPU) == (moments, 2**20) and tried == [1, 2, 1]


def test_of_one_process_what_does_not_fit_at_all_fits_with_activations_recomputed(
        tmp_path, monkeypatch):
    config, vlm, selector, data = prepared(tmp_path, "autoselect")
    used = []
    monkeypatch.setattr(FrozenVLM, "checkpointing", lambda vlm, on: used.append(on))

    def step(n):
        def run():
            if not used[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            torch.zeros(n * 2**18)
        return run
    fit, said = costs.pictures_that_fit(vlm, selector, step, 4, [False, True])
    assert fit == 4 and used == [False, True] and "recomputed" in said
    fit, said = costs.pictures_that_fit(vlm, selector, step, 4, [False])
    assert fit == 0 and said == "more than there is, even for one picture"


def test_running_out_of_memory_names_the_flag_and_what_would_fit(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(RuntimeError, match="out of memory at step 0 with 6 pictures at a time: the "
                                           "same command with --micro 3"):
        train.main(flags(tmp_path / "run", batch=6))


def test_the_batch_of_questions_follows_from_free_memory(monkeypatch):
    vlm = FrozenVLM.from_pretrained("tiny/llava", torch.float32)
    questions = tiny_world.load(n=12)
    ways = {("vanilla", 0): None}
    assert answering.most_at_a_time(vlm, questions, ways, 32) == 32          # small, on a CPU
    monkeypatch.setattr(answering, "is_large", lambda model: True)

    def batch(n):
        part = list(enumerate(questions[:n]))
        return peak_bytes(lambda: answering.answer_batch(vlm, part, ways), CPU)
    monkeypatch.setattr(costs, "free_bytes", lambda device: int(batch(5) / .85))
    chosen = answering.most_at_a_time(vlm, questions, ways, 32)
    assert chosen == 4 and batch(chosen) <= batch(5)
    monkeypatch.setattr(costs, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="one question takes .* more than is free"):
        answering.most_at_a_time(vlm, questions, ways, 32)
