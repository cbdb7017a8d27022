"""InfographicVQA (arXiv:2104.12756), validation: 2,801 questions about infographics; all else is as in DocVQA."""

from benchmarks import docvqa

NAME, MAIN, HUBS, CONFIG, SPLIT = "InfoVQA", docvqa.MAIN, docvqa.HUBS, "InfographicVQA", docvqa.SPLIT
prompt, score = docvqa.prompt, docvqa.score


def load(path=None, split: str | None = None, family: str = "llava") -> docvqa.Questions:
    """As docvqa.load()."""
    return docvqa.load(path, split, family, CONFIG)
