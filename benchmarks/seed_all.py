"""SEED-Bench over pictures and videos together, which the papers' tables give."""

from functools import partial

from benchmarks import seed

NAME, MAIN, HUBS = "SEED", seed.MAIN, seed.HUBS
load, score = partial(seed.load, kind="all"), seed.score
