"""SEED-Bench over pictures and videos together, which the papers' tables give."""

from functools import partial

from benchmarks import seed

NAME = "SEED"
MAIN = seed.MAIN
HUBS = seed.HUBS
SPLIT = seed.SPLIT
load = partial(seed.load, kind="all")
score = seed.score
