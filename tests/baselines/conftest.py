"""What the tests of the rivals share: three rows of different lengths, asked of every family."""

import numpy as np
import pytest
from PIL import Image
from test_common import QUESTIONS, SIZES, rows_for

TURNS = [[(question, None)] for question in QUESTIONS]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture(scope="module")
def pictures(family, images):
    """What batch() takes: for a video family each image has a second frame."""
    return rows_for(family, images)


@pytest.fixture(scope="module")
def asked(vlm, pictures):
    return vlm.batch(pictures, TURNS)


@pytest.fixture(scope="module")
def prompt(vlm, asked):
    """The full prompt, in some families with different numbers of visual tokens."""
    return vlm.embed(asked, vlm.encode(asked))
