"""The site of page/, made once, from the shipped selectors; skipped where its packages are not.

SITE=folder in the environment: one that is built, as `make page-test` has it.
"""

import os

import pytest
import torch
from built_page import METHODS, ROOT, selectors

from common import FrozenVLM


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site without the runtime, which only a browser needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is missing: see page/README.md")
    from page.export import ExportConfig, export
    if "SITE" in os.environ:
        return ROOT / os.environ["SITE"]
    threads = torch.get_num_threads()
    folder = export(ExportConfig(run=selectors(), methods=METHODS, runtime=False,
                                 out=str(tmp_path_factory.mktemp("site"))))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def vlm():
    return FrozenVLM.from_pretrained("tiny/llava", torch.float32)
