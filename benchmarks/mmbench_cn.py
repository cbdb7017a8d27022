"""MMBench-CN: the same questions in Chinese."""

from functools import partial

from benchmarks import mmbench

NAME = "MMBench-CN"
MAIN = mmbench.MAIN
HUBS = mmbench.HUBS
CONFIG = "cn"
SPLIT = mmbench.SPLIT
load = partial(mmbench.load, language="cn")
group = mmbench.group
score = mmbench.score
submission = mmbench.submission
