"""The folder that a run leaves: nothing is deleted that is not ours, nothing damaged is used."""

import json
import multiprocessing
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors.torch import load_file, save_file
from short_runs import flags, kill_at, same, short_run, weights, without_time
from small_hub import Handler

import runs
import train
from benchmarks import plots
from common import FrozenVLM

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "results/autoselect_tiny/selector"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vlm():
    return FrozenVLM.from_pretrained("tiny/llava", device="meta")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != runs.LOCK}


def selector_folder(folder):
    shutil.copytree(SHIPPED, folder)


def with_its_folder(folder):
    shutil.copytree(SHIPPED, folder / "selector")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/0000001.pt").write_text("someone's")


def model_folder(folder):
    shutil.copytree(ROOT / "tiny/llava", folder, ignore=shutil.ignore_patterns("stages"))


def notes(folder):
    folder.mkdir()
    (folder / "log.jsonl").write_text("my log\n")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [selector_folder, with_its_folder, model_folder, notes])
def test_a_folder_that_is_no_run_of_ours_is_left_as_it_is(tmp_path, make, overwrite):
    folder = tmp_path / "mine"
    make(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match="is no run: nothing in it is touched; choose an empty"):
        train.main(flags(folder, overwrite=overwrite))
    assert contents(folder) == before


def test_an_empty_folder_and_a_run_of_ours_are_taken(tmp_path):
    tmp_path.joinpath("run").mkdir()
    run = short_run(tmp_path / "run", steps=1)
    first = weights(run)
    again = short_run(tmp_path / "run", steps=1, seed=1, overwrite=True)
    assert not same(weights(again), first)


def hold(folder, begun):
    with runs.locked(folder):
        begun.set()
        time.sleep(60)


def test_a_folder_is_one_commands_and_a_kill_sets_it_free(tmp_path):
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    first = fork.Process(target=hold, args=(tmp_path / "run", begun), daemon=True)
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(OSError, match="another process writes into .*run at this moment"):
            train.main(flags(tmp_path / "run"))
    finally:
        first.kill()
        first.join()
    with runs.locked(tmp_path / "run"):
        pass                                              # a killed process holds nothing


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_as_the_unbroken_one(
        tmp_path, monkeypatch, capsys):
    whole = short_run(tmp_path / "whole", save_every=1)
    alive = kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path / "cut", save_every=1)
    alive()
    for number, keep in enumerate((.5, 0.)):
        folder = tmp_path / f"cut{number}"
        shutil.copytree(tmp_path / "cut", folder)
        newest = runs.checkpoints(folder)[-1]
        content = newest.read_bytes()
        newest.write_bytes(content[:int(keep * len(content))])
        cut = short_run(folder, save_every=1)
        assert f"{newest} cannot be read and is passed over" in capsys.readouterr().out
        assert same(weights(whole), weights(cut)) and without_time(whole) == without_time(cut)
    for path in runs.checkpoints(tmp_path / "cut"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints of .* can be read: begin anew"):
        short_run(tmp_path / "cut", save_every=1)


def test_what_cannot_be_written_leaves_no_part_and_the_old_one(tmp_path):
    path = tmp_path / "table.md"
    runs.write_text(path, "old")

    def full(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="table.md cannot be written .*No space left.* MiB are free"):
        runs.write_whole(path, full)
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]
    assert path.read_text() == "old"


@contextmanager
def room_for(n: int):
    """No file of this process may get longer than n bytes, as on a full disk; no longer than it
    has to, or what the tests print may not get longer either."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("sync", [True, False])
def test_half_a_line_onto_a_full_disk_is_taken_back(tmp_path, sync):
    path = tmp_path / "log.jsonl"
    runs.append(path, "whole\n", sync)
    with (room_for(10),
          pytest.raises(OSError, match=r"log\.jsonl cannot be written .*make room")):
        runs.append(path, "does not fit\n", sync)
    assert path.read_text() == "whole\n"
    runs.append(path, "fits\n", sync)
    assert path.read_text() == "whole\nfits\n"


def test_the_log_and_pictures_say_that_the_disk_is_full(tmp_path):
    log = runs.open_log(tmp_path / "log.jsonl", 0, is_main=True)
    log({"step": 0})
    plots.save(plt.figure(figsize=(1, 1)), tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()
    with room_for(30), pytest.raises(OSError, match=r"log\.jsonl cannot be written"):
        log({"step": 1, "loss": 0.123456789})
    with room_for(30), pytest.raises(OSError, match=r"old\.png cannot be written"):
        plots.save(plt.figure(figsize=(2, 2)), tmp_path / "old.png")
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0}\n'
    assert (tmp_path / "old.png").read_bytes() == before and len([*tmp_path.iterdir()]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_checkpoint_onto_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="x.pt cannot be written"):
        runs.write_whole(tmp_path / "x.pt", lambda _: torch.save([1] * 10, "/dev/full"))


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name, change, message", [
    ("model.safetensors", lambda x: x[:len(x) // 2], "model.safetensors does not give a selector"),
    ("model.safetensors", lambda x: b"", "model.safetensors does not give a selector"),
    ("config.json", lambda x: x[:50], "config.json is damaged"),
    ("config.json", lambda x: x.replace(b'"layers": 2', b'"layers": 3'),
     "does not give a selector of autoselect"),
    ("config.json", lambda x: x.replace(b'"gate":', b'"door": 1, "gate":'),
     "has the options door, which autoselect.py does not know: was it saved by a later version")])
def test_a_damaged_selector_is_refused_by_name(tmp_path, vlm, name, change, message):
    shutil.copytree(SHIPPED, tmp_path / "selector")
    damage(tmp_path / "selector", name, change)
    with pytest.raises(ValueError, match=message):
        runs.load_selector(tmp_path, vlm, "cpu")


@pytest.mark.parametrize("name, reads_language", [("recon", False), ("autoselect", True)])
def test_a_selector_minds_the_language_model_only_if_it_reads_it(tmp_path, vlm, name,
                                                                 reads_language):
    folder = tmp_path / "selector"
    shutil.copytree(ROOT / f"results/{name}_tiny/selector", folder)
    about = json.loads((folder / "config.json").read_text())
    about["backbone"]["layers"] += 1
    (folder / "config.json").write_text(json.dumps(about))
    if not reads_language:
        assert runs.load_selector(tmp_path, vlm)[0].reads_language is False
        about["backbone"]["vision_layers"] += 1
        (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="was trained for another backbone .*layers: . there"):
        runs.load_selector(tmp_path, vlm)


def test_an_older_selector_without_a_later_option_loads_with_its_default(tmp_path, vlm):
    shutil.copytree(SHIPPED, tmp_path / "selector")
    about = json.loads((SHIPPED / "config.json").read_text())
    del about["cfg"]["scorer"]
    (tmp_path / "selector/config.json").write_text(json.dumps(about))
    old, new = (runs.load_selector(folder, vlm, "cpu")[0] for folder in (tmp_path, SHIPPED))
    assert old.cfg == new.cfg and same(old.state_dict(), new.state_dict())


def test_a_selector_of_nan_is_refused(tmp_path, vlm):
    shutil.copytree(SHIPPED, tmp_path / "selector")
    file = tmp_path / "selector/model.safetensors"
    tensors = load_file(file)
    tensors["scorer.head.weight"][:] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match="scorer.head.weight and 0 more weights are not finite"):
        runs.load_selector(tmp_path, vlm, "cpu")


def test_a_folder_that_can_be_written_is_not_made(tmp_path):
    assert runs.writable(tmp_path / "a/b") == tmp_path / "a/b"
    runs.writable_file(tmp_path / "a/table.md")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(OSError, match=f"nothing can be written into .*{folder} .*: name anoth"):
            runs.writable(tmp_path / folder)
    with pytest.raises(OSError, match="is a folder: expected the name of a file"):
        runs.writable_file(tmp_path)


class Maker(Handler):
    """Makes the repositories of user, of nobody else."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        made = asked.get("organization") == "user"
        body = json.dumps({"url": f"https://huggingface.co/user/{asked['name']}"} if made else
                          {"error": "no right to it"}).encode()
        self.send_response(200 if made else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_push_that_is_refused_is_refused_before_the_training(tmp_path, hub_answers, monkeypatch):
    hub_answers(Maker)
    runs.open_repository("user/new")
    for name in ("nobody", "a/b/c", "user/-x", "user/a b"):
        with pytest.raises(ValueError, match=f"push='{name}': expected user/name"):
            runs.open_repository(name)
    with pytest.raises(OSError, match="push='other/new': the hub makes no such .*no right to it"):
        train.main(flags(tmp_path / "run", push="other/new"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "1")                       # the first process has said it
    runs.open_repository("other/new")
