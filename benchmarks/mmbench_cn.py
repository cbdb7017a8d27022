"""MMBench-CN: the same questions in Chinese."""

from functools import partial

from benchmarks import mmbench

NAME, MAIN, HUBS = "MMBench-CN", mmbench.MAIN, mmbench.HUBS
load = partial(mmbench.load, language="cn")
group, score, submission = mmbench.group, mmbench.score, mmbench.submission
