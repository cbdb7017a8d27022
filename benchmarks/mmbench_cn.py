"""MMBench-CN: the same questions in Chinese."""

from functools import partial

from benchmarks import mmbench

NAME, MAIN, HUBS = "MMBench-CN", mmbench.MAIN, mmbench.HUBS
load, score, submission = partial(mmbench.load, language="cn"), mmbench.score, mmbench.submission
