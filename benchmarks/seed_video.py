"""The questions of SEED-Bench about videos."""

from functools import partial

from benchmarks import seed

NAME, MAIN, HUBS = "SEED video", seed.MAIN, seed.HUBS
load, score = partial(seed.load, kind="video"), seed.score
