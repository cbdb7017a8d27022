"""Short trainings on the shipped tiny LLaVA, for every test that needs a run."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import train

MODEL = "tiny/llava"
SHORT = dict(model=MODEL, steps=4, batch=2, lr=2e-3, layers=1, heads=2, workers=0, save_every=2,
             evaluate=False, device="cpu")
OWN = {"autoselect": dict(keep=[16]), "stepprune": dict(max_steps=12, text_steps=2),
       "recon_selector": {}}


def flags(folder, method="autoselect", **changes) -> list[str]:
    """The command line of a short run."""
    words = []
    options = {**SHORT, **OWN.get(method, {}), **changes}
    if method[:5] != "recon" and not {"data", "images", "epochs"} & {*changes}:
        options.setdefault("questions", 2)                     # of a scene
    for name, value in {"method": method, "run": folder, **options}.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def short_run(folder, method="autoselect", **changes) -> Path:
    """Train it. Returns the run folder."""
    return train.train(*train.parse(flags(folder, method, **changes)))


def weights(run) -> dict:
    return load_file(Path(run) / "selector/model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(run) -> list[dict]:
    """The lines of a run's log."""
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in lines]


def kill_at(monkeypatch, number: int):
    """The next run raises in the middle of step `number`, as a kill would end it."""
    real = train.train_step

    def dying(selector, vlm, parts, step):
        if step.number == number:
            raise KeyboardInterrupt
        return real(selector, vlm, parts, step)
    monkeypatch.setattr(train, "train_step", dying)
    return lambda: monkeypatch.setattr(train, "train_step", real)
