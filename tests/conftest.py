"""Tests run from the project's root: the shipped checkpoint is named by its path from there.

Here is also what the tests on tiny random models of every family share.
"""

import os
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from full_prompt import ANSWERED, QUESTIONS, SIZES, every, rows_for
from PIL import Image
from small_hub import running
from tiny_models import MODELS
from transformers import AutoModelForImageTextToText

from common import FrozenVLM

os.chdir(Path(__file__).resolve().parents[1])


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to gain from more
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub_answers(monkeypatch):
    """hub_answers(Handler): whom huggingface_hub asks in this process, a server on this machine."""
    with ExitStack() as until_the_end:
        def begin(handler):
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            until_the_end.enter_context(running(server))
            url = f"http://127.0.0.1:{server.server_port}"
            for name, value in {
                    "HF_HUB_OFFLINE": False, "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE":
                    url + "/{repo_id}/resolve/{revision}/{filename}"}.items():
                monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield begin


@pytest.fixture(scope="module", params=list(MODELS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, tmp_path_factory):
    return MODELS[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def vlm(path):
    return FrozenVLM.from_pretrained(path, dtype=torch.float64)


@pytest.fixture(scope="module")
def stock(path):
    """The same checkpoint, untouched by common.py."""
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float64, attn_implementation="sdpa"
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def pictures(family, images):
    return rows_for(family, images)


@pytest.fixture(scope="module")
def asked(vlm, pictures):
    return vlm.batch(pictures, [[(question, None)] for question in QUESTIONS])


@pytest.fixture(scope="module")
def answered(vlm, pictures):
    return vlm.batch(pictures, ANSWERED)


@pytest.fixture(scope="module")
def keep(vlm, asked):
    """Of the first row five units, for LLaVA-NeXT one of a crop among them, of the second none,
    of the third one."""
    first, second, third = every(vlm.encode(asked))
    return [first[[0, 3, 7, 8, -2]], second[:0], third[2:3]]
