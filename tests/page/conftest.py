"""The site of page/, made once, from the shipped selectors; skipped where its packages are not."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["random", "cls_attention"]


def selectors() -> list[str]:
    return sorted(str(path.parent) for path in ROOT.glob("results/*/selector/model.safetensors"))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site without the runtime, which only a browser needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is missing: see page/README.md")
    from page.export import ExportConfig, export
    threads = torch.get_num_threads()
    folder = export(ExportConfig(run=selectors(), methods=METHODS, runtime=False,
                                 out=str(tmp_path_factory.mktemp("site"))))
    torch.set_num_threads(threads)
    return folder
