"""What the README promises: its commands exist as printed, its map names files that are there."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import llava
from transformers import AutoModelForImageTextToText

import common.frozen
import evaluate
from common import Adapter, FrozenVLM

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.split("#")[0].strip()]


def test_every_file_the_readme_links_is_there():
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if not x.startswith("http")]
    assert links and not [x for x in links if not (ROOT / x).exists()]


@pytest.mark.parametrize("page", ["README.md", "tiny/README.md", "results/README.md"])
def test_quoted_tables_are_the_files_that_commands_made(page, tmp_path):
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    for name, quoted in re.findall(r"<!-- table: (\S+) -->\n(.*?)\n?<!-- end -->", text, re.S):
        assert quoted == ((ROOT / page).parent / name).read_text().strip()
    (tmp_path / "made.md").write_text("| new |\n")
    (tmp_path / "page.md").write_text("a\n<!-- table: made.md -->\nold\n<!-- end -->\nb\n")
    evaluate.refresh(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "a\n<!-- table: made.md -->\n| new |\n<!-- end -->\nb\n"


@cache
def known(*script: str) -> str:
    command = [sys.executable, *script, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_every_python_command_has_flags_that_parse(command):
    """Each option of the printed command is one that the script's own --help knows."""
    words = command.removeprefix("python ").removeprefix("accelerate launch ").split()
    script = words[:2] if words[0] == "-m" else words[:1]
    unknown = [w for w in words[len(script):] if w.startswith("--") and w not in known(*script)]
    assert not unknown, f"{script} does not know {unknown}"


def test_the_readmes_adapter_serves_a_family_of_its_own(tmp_path, monkeypatch):
    """A LLaVA with a SigLIP tower, which the shipped adapter refuses: all kept is the stock model, exactly."""
    (code,) = re.findall(r"```python\n(class .*?)```", README, re.S)
    assert len(code.splitlines()) < 25
    siglip = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                  num_attention_heads=2, image_size=24, patch_size=4, vision_use_head=False)
    path = llava(tmp_path, vision_config=siglip, vision_feature_layer=-2, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="siglip_vision_model"):
        FrozenVLM.from_pretrained(path, torch.float64)
    exec(code, scope := {"Adapter": Adapter})
    monkeypatch.setitem(common.frozen.ADAPTERS, "llava", scope["SiglipLlavaAdapter"])
    vlm = FrozenVLM.from_pretrained(path, torch.float64)
    batch = vlm.batch([Image.effect_noise((40, 24), 90)] * 2, [[("what colour ?", None)], [("how many red ?", None)]])
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        whole = stock(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")},
                      position_ids=positions).logits
        ours = vlm.logits(vlm.embed(batch, vlm.encode(batch)))
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[mask], whole[mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(command):
    subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)


def test_what_is_said_of_the_rivals_is_backed_by_tests():
    page = (ROOT / "baselines/README.md").read_text()
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 15 and not [name for name in named if f"def {name}(" not in written]
    files = {path.name for path in (ROOT / "baselines").glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"^\| (\w+\.py) ", page, re.M))


def test_imports_only_point_down():
    """Floors: methods, baselines, common, tiny; benchmarks and stepprune; train, evaluate, answer."""
    ground = {"autoselect", "recon_selector", "baselines", "common", "tiny"}
    floors = {**dict.fromkeys(ground, 0), "stepprune": 1, "benchmarks": 1, "train": 2, "evaluate": 3, "answer": 4}
    folders = ("", "baselines/", "benchmarks/", "common/", "tiny/")
    for path in [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        text = re.sub(r"^    .*$", "", path.read_text(), flags=re.M)      # late imports inside functions are allowed
        for found in re.findall(r"^(?:from|import) (\w+)", text, re.M):
            if found in floors and found != own:
                assert floors[found] < floors[own], f"{path.name} imports {found}"
