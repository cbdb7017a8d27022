"""InfographicVQA (arXiv:2104.12756), validation: 2,801 questions about infographics; all else is as
in DocVQA."""

from benchmarks import docvqa

NAME = "InfoVQA"
MAIN = docvqa.MAIN
HUBS = docvqa.HUBS
CONFIG = "InfographicVQA"
SPLIT = docvqa.SPLIT
prompt = docvqa.prompt
score = docvqa.score


def load(path=None, split: str | None = None, family: str = "llava") -> docvqa.Questions:
    """As docvqa.load()."""
    return docvqa.load(path, split, family, CONFIG)
