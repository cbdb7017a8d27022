"""examples/headline.py: the plan without a network and with one, a whole rehearsal that is killed
twice, and a check that fails."""

import json
import shutil
import sys

import huggingface_hub
import pytest
from short_runs import kill_at, without_time
from small_hub import Handler

from benchmarks.predictions import Predictions
from examples import headline
from measure import check, shapes
from tiny import benchmarks as copies
from tiny import scenes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Folders of the true sizes without a weight, which a plan does not read."""
    folder = tmp_path_factory.mktemp("layouts")
    return {name: shapes.write(shape, folder / name) for name, shape in (
        ("llava-1.5-7b-hf", "llava-1.5-7b"), ("llava-v1.6-mistral-7b-hf", "llava-next-vicuna-7b"),
        ("Qwen2.5-VL-7B-Instruct", "qwen2.5-vl-7b"))}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    copies.main([str(folder), "--n", "20"])
    return folder


def plan_of(capsys, *words) -> dict[str, list[str]]:
    """{first word of a line: [what stands behind it]}."""
    headline.main([*words, "--plan"])
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("- "):
            key, _, text = line[2:].partition(": ")
            lines.setdefault(key, []).append(text)
    return lines


@pytest.mark.parametrize("method, model, printed, train, kept", [
    ("autoselect", "llava-1.5-7b-hf", "AutoSelect paper, Table 1, on LLaVA-1.5-7B",
     "5,000 steps of 32 pictures of imagenet-captions = 160,000",
     "192, 128, 64 of autoselect, tome, fastv, sparsevlm, dart, hired, pdrop, divprune, visionzip"),
    ("stepprune", "llava-1.5-7b-hf", "StepPrune paper, Table 1, on LLaVA-1.5-7B",
     "5,000 steps of 16 pictures of llava-665k = 80,000",
     "192, 128, 64 of stepprune, fastv, sparsevlm, pdrop, visionzip"),
    ("recon", "llava-v1.6-mistral-7b-hf", "reconstruction paper, Table 2, on LLaVA-1.6-Mistral-7B",
     "425,897 steps of 32 pictures of coco, 9,000 of docvqa, 9,000 of chartqa = 13,628,704",
     "1296, 864 of recon_selector, pact"),
    ("autoselect", "Qwen2.5-VL-7B-Instruct", "AutoSelect paper, Table 3, on Qwen2.5-VL-7B",
     "5,000 steps", "0.333, 0.222, 0.111 of autoselect, fastv, holov")])
def test_a_plan_without_a_network(method, model, printed, train, kept, layouts, tmp_path, capsys,
                                  monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    lines = plan_of(capsys, method, "--model", layouts[model], "--out", str(tmp_path))
    assert lines["printed"] == [printed]
    assert lines["train"][0].startswith(train) and kept in lines["ask"][0]
    (unknown,) = lines["download"]
    assert "the hub cannot be reached: sizes unknown" in unknown and "(lmms-lab/MME)" in unknown
    assert lines["hours"] == ["unknown before the check, which comes first"]
    assert lines.get("by hand") == {
        "stepprune": ["the pictures of llava-665k, in --images None"],
        "recon": ["copies of coco, docvqa, chartqa, in --train '--path ...'"]}.get(method)
    if method == "stepprune":
        marked = dict(part.split("] ") for part in lines["settings"][0].split("; "))
        missing = [part.split("=")[0] for part in marked["[value not available"].split(", ")]
        assert missing == ["max_steps", "gamma", "length_weight"]
        assert "layers=2" in marked["[paper"] and "tau_end=0.2" in marked["[ours"]
    assert not [*tmp_path.iterdir()]


class Lister(Handler):
    """Lists files with their sizes, as the hub's API does; knows no lmms-lab-encoder."""
    FILES = {"visual-layer/imagenet-1k-vl-enriched": {"data/train-00000-of-00002.parquet": 6e9,
                                                      "data/validation-0-of-1.parquet": 1e9},
             "lmms-lab/GQA": {"testdev_balanced_images/testdev-0.parquet": 2e9,
                              "testdev_balanced_instructions/testdev-0.parquet": 1e9,
                              "train_all_images/train-0.parquet": 90e9},
             "lmms-lab/MMBench": {"en/dev-0.parquet": 5e8, "README.md": 1e9,
                                  "en/test-0.parquet": 1e9, "cn/dev-0.parquet": 4e8},
             "lmms-lab/SEED-Bench": {"data/test-0.parquet": 2e9, "data/train-0.parquet": 8e9},
             "detection-datasets/coco": {"data/train-0.parquet": 19e9, "data/val-0.parquet": 1e9},
             "HuggingFaceM4/ChartQA": {"data/train-0.parquet": 1e9},
             "owner/llava-1.5-7b": {"model-1.safetensors": 14e9, "pytorch_model.bin": 14e9}}

    def do_GET(self):
        files = self.FILES.get(self.path.split("?")[0].split("/", 3)[3])
        answer = {"id": "x", "siblings": [{"rfilename": name, "size": int(size)}
                                          for name, size in (files or {}).items()]}
        self.send_response(200 if files else 404)
        if not files:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


def test_sizes_are_those_that_the_hub_says(layouts, tmp_path, capsys, hub_answers):
    hub_answers(Lister)
    lines = plan_of(capsys, "autoselect", "--model", layouts["llava-1.5-7b-hf"], "--out",
                    str(tmp_path), "--evaluate",
                    "--benchmarks gqa mmbench mmbench_cn seed seed_all pope")
    mixed = plan_of(capsys, "recon", "--model", layouts["llava-v1.6-mistral-7b-hf"], "--out",
                    str(tmp_path), "--evaluate", "--benchmarks mmbench")
    # of a split, of a config; on the disk what two benchmarks ask for is counted once
    assert lines["download"] == [
        "training, 6.00 GB, visual-layer/imagenet-1k-vl-enriched, streamed: not kept, and anew in "
        "every pass", "gqa, 3.00 GB, lmms-lab/GQA", "mmbench, 0.50 GB, lmms-lab/MMBench",
        "mmbench_cn, 0.40 GB, lmms-lab/MMBench", "seed, 2.00 GB, lmms-lab/SEED-Bench",
        "seed_all, 2.00 GB, lmms-lab/SEED-Bench",
        "pope, size unknown, lmms-lab-encoder/POPE and lmms-lab/POPE not found"]
    assert lines["disk"][0].startswith("5.90 GB in the caches; free")
    # what is mixed has to lie here
    assert mixed["download"] == [
        "training, 19.00 GB, detection-datasets/coco", "training, size unknown, "
        "lmms-lab-encoder/DocVQA and lmms-lab/DocVQA and HuggingFaceM4/DocumentVQA not found",
        "training, 1.00 GB, HuggingFaceM4/ChartQA", "mmbench, 0.50 GB, lmms-lab/MMBench"]
    assert mixed["disk"][0].startswith("20.50 GB in the caches; free")


def test_data_given_by_hand_take_the_place_of_the_papers_mixture(layouts, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        scenes.render(scenes.make_scene(number)).save(tmp_path / f"photos/{number}.png")
    for words, said in (
            (f"--path {tmp_path}/photos x y", "coco, 9,000 of docvqa, 9,000 of chartqa = 18,003"),
            (f"--data folder --images {tmp_path}/photos --take 2", "of 2 of folder = 2,")):
        lines = plan_of(capsys, "recon", "--model", layouts["llava-v1.6-mistral-7b-hf"], "--out",
                        str(tmp_path / "out"), "--train", f"{words} --epochs 1 --batch 1")
        assert said in lines["train"][0] and "by hand" not in lines


def rehearse(root, out, *more) -> None:
    headline.main([
        "autoselect", "--model", str(root / "llava"), "--backbone", "LLaVA-1.5-7B", "--data_root",
        str(root), "--out", str(out), "--device", "cpu", "--steps", "6", "--sample", "8", "--train",
        "--data scenes --batch 2 --layers 1 --heads 2 --workers 0 --save_every 2", "--evaluate",
        "--benchmarks pope mme --methods fastv --budgets 64 16", *more])


@pytest.mark.slow
def test_a_rehearsal_killed_twice_goes_on_and_ends_with_the_table(root, tmp_path, capsys,
                                                                  monkeypatch):
    checks = []
    real = check.main
    monkeypatch.setattr(check, "main", lambda args: checks.append(args) or real(args))
    alive = kill_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        rehearse(root, tmp_path)
    alive()
    add = Predictions.add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def dying(predictions, rows):
            add(predictions, rows)
            raise KeyboardInterrupt
        patch.setattr(Predictions, "add", dying)
        rehearse(root, tmp_path)
    (first,) = [path for path in tmp_path.rglob("*.jsonl") if path.stat().st_size
                and path.parent.name == "pope" and len(path.read_text().splitlines()) > 1]
    answered = first.read_text()
    capsys.readouterr()
    rehearse(root, tmp_path)
    printed = capsys.readouterr().out

    assert len(checks) == 1
    assert first.read_text().startswith(answered)
    steps = [line["step"] for line in without_time(tmp_path / "autoselect")]
    assert steps == [*range(6)] and "resumed at step 6" in printed
    page = (tmp_path / "headline.md").read_text()
    for text in ("*printed: AutoSelect (Ours), AutoSelect paper, Table 1* | 64", "fastv",
                 "- pope: 8 of 9,000 questions", "- --steps 6: given by hand",
                 "- steps, batch, learning rate, K, tau, depth", "Eq. 5 keeps the variance"):
        assert text in page and text in printed, text
    assert "- hours: training" in page and "unknown before" not in page
    rehearse(root, tmp_path, "--plan")
    assert "- hours: training" in capsys.readouterr().out


@pytest.mark.slow
def test_a_check_that_fails_ends_it_unless_told_otherwise(root, tmp_path, capsys):
    """On the shrunk layout of a real backbone, whose random weights answer nothing."""
    model = tmp_path / "llava-1.5-7b"
    vlm = shapes.load("llava-1.5-7b", shrink=True)
    shapes.write("llava-1.5-7b", model, shrink=True)
    vlm.model.save_pretrained(model)
    for number in range(4):
        picture = scenes.render(scenes.make_scene(number))
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture.save(tmp_path / f"photos/{number}.png")
    words = ["recon", "--model", str(model), "--images", str(tmp_path / "photos"), "--data_root",
             str(root), "--out", str(tmp_path / "out"), "--device", "cpu", "--sample", "4",
             "--train", "--data folder --epochs 1 --batch 2 --layers 1 --workers 0", "--evaluate",
             "--benchmarks ai2d --methods random --budgets 64 --draw False"]
    with pytest.raises(RuntimeError, match="checks failed: scenes; --despite goes on"):
        headline.main(words)
    assert not (tmp_path / "out/recon_selector").exists()
    capsys.readouterr()
    headline.main([*words, "--despite"])
    printed = capsys.readouterr().out
    assert "- train: 2 steps of 2 pictures of folder = 4" in printed
    assert "Table 2: Table 1's checkpoint" in printed and (tmp_path / "out/headline.md").exists()


def test_a_method_without_a_headline_is_refused(tmp_path, monkeypatch):
    shutil.copy("tests/toys/toy_method.py", tmp_path / "toy_without.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="toy_without.py has no HEADLINE: expected model, train"):
        headline.main(["toy_without"])
    sys.modules.pop("toy_without")
