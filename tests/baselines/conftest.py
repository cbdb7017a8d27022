"""What the tests of the rivals share: the prompt of three rows of different lengths."""

import pytest


@pytest.fixture(scope="module")
def prompt(vlm, asked):
    """The full prompt, in some families with different numbers of visual tokens."""
    return vlm.embed(asked, vlm.encode(asked))
