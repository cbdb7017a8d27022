"""The questions of SEED-Bench about videos."""

from functools import partial

from benchmarks import seed

NAME = "SEED video"
MAIN = seed.MAIN
HUBS = seed.HUBS
SPLIT = seed.SPLIT
load = partial(seed.load, kind="video")
score = seed.score
