"""Answers of many runs to the same questions, drawn again and again: what measure.claims goes by.

A Table holds, of one frozen VLM and one set of questions, which of them each method answered right
at each K, seed by seed, and how many tokens it kept. Draws takes questions and seeds of it with
replacement, the same ones for every method, so that any difference is paired over both. The score
is the tiny world's, the mean over families of questions; retention is percent of the score with all
tokens.

Shapes  Q questions, S seeds of a setting, R draws, of which the first is all questions and seeds
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import runs
from benchmarks import tiny_world

SEED = re.compile(r"_s(\d+)\b")           # at the end of a run's name
DRAWS = 2000                              # of questions and seeds [ours]
HOLDS, OPEN, FAILS = VERDICTS = ("holds", "within noise", "does not hold")


# ------------------------------------------------------------------------------------ answers


@dataclass
class Table:
    """families, things (Q,) of the questions and of the things in their pictures
    right, seen   [name, K] (S, Q) bool: is the answer right; were all tokens kept that show it
    kept          [name, K] (S, Q) int
    measured      [name, what] (S,) numbers that are no answers
    made          [name] what the runs were made by, see experiments.Job.made()
    """
    families: np.ndarray
    things: np.ndarray
    right: dict = field(default_factory=dict)
    seen: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)
    measured: dict = field(default_factory=dict)
    made: dict = field(default_factory=dict)

    def add(self, ways: dict, suffix: str = "") -> None:
        """Answers to its questions: {(method, K): rows}, see scores.complete_files(). A run's
        method is its folder, whose name ends in _s0, _s1 for the seeds of one setting; suffix:
        stands behind the names, but that of all tokens."""
        seeds = {}
        for (method, k), rows in ways.items():
            name = method.split("/")[-1]
            number = int(found[1]) if (found := SEED.search(name)) else 0
            own = SEED.sub("", name) + (suffix if k else "")
            seeds.setdefault((own, k), {})[number] = rows
        for key, of_seed in seeds.items():
            several = [of_seed[number] for number in sorted(of_seed)]
            self.right[key] = np.array([[
                bool(tiny_world.is_right(row["answer"], row["gold"]["answer"])) for row in rows]
                for rows in several])
            # None: nothing in the picture bears on the question
            self.seen[key] = np.array([[row["recall"] is None or row["recall"] > .99
                                        for row in rows] for rows in several])
            self.kept[key] = np.array([[row["kept"] for row in rows] for rows in several])

    @classmethod
    def of(cls, ways: dict) -> "Table":
        rows = next(iter(ways.values()))
        table = cls(np.array([row["gold"]["family"] for row in rows]),
                    np.array([row["gold"]["things"] for row in rows]))
        table.add(ways)
        return table

    def save(self, path: Path) -> None:
        """As JSON, gzipped: the same bytes for the same answers."""
        def bits(x):
            return ["".join(map(str, row)) for row in x.astype(int).tolist()]

        def counts(x):
            return x.tolist() if x.std(1).any() else x[:, :1].tolist()
        answers = [[*key, bits(x), bits(self.seen[key]), counts(self.kept[key])]
                   for key, x in self.right.items()]
        content = {"families": self.families.tolist(), "things": self.things.tolist(),
                   "made": self.made, "answers": answers,
                   "measured": [[*key, list(map(float, x))] for key, x in self.measured.items()]}
        data = gzip.compress(json.dumps(content).encode(), mtime=0)
        runs.write_whole(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path) -> "Table":
        """Raises ValueError naming a file that is damaged."""
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
        except (ValueError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): python -m measure.experiments makes "
                             "it again") from error
        table = cls(np.array(content["families"]), np.array(content["things"]),
                    made=content["made"])

        def bits(rows):
            return np.array([[c == "1" for c in row] for row in rows])
        for name, k, right, seen, kept in content["answers"]:
            table.right[name, k], table.seen[name, k] = bits(right), bits(seen)
            table.kept[name, k] = np.broadcast_to(np.array(kept), table.right[name, k].shape)
        table.measured = {(name, what): np.array(x) for name, what, x in content["measured"]}
        return table


# ------------------------------------------------------------------------------------ draws


class Draws:
    """Each measure is an array (R,). K = 0 stands for all tokens."""

    def __init__(self, table: Table, seed: int = 0, draws: int = DRAWS):
        self.table = table
        rng = np.random.default_rng(seed)
        n = len(table.families)
        drawn = rng.multinomial(n, np.full(n, 1 / n), draws)
        self.counts = np.concatenate([np.ones((1, n)), drawn])             # (R, Q)
        self.places = rng.random((draws, 16))             # where in a list of seeds, most of them
        self.used = set()                                 # names that were asked for

    def over_seeds(self, values: np.ndarray) -> np.ndarray:
        """(R, S) or (S,) -> (R,) the mean over the seeds of each draw; the same seeds are drawn of
        all settings with as many."""
        n = np.shape(values)[-1]
        drawn = ((self.places[:, :n] * n).astype(int)[:, :, None] == np.arange(n)).sum(1)
        weights = np.concatenate([np.ones((1, n)), drawn])                 # (R, S)
        return (weights * np.asarray(values)).sum(1) / n

    def share(self, of: np.ndarray, among: np.ndarray) -> np.ndarray:
        """(R,) percent of the questions `among` (S or 1, Q) that are `of` (S, Q), over seeds."""
        among = np.broadcast_to(among, of.shape)
        return self.over_seeds(100 * (self.counts @ (of & among).T)
                               / np.maximum(self.counts @ among.T, 1))

    def family(self, name: str, family: str, k=0) -> np.ndarray:
        """Percent right of one family's questions."""
        self.used.add(name)
        return self.share(self.table.right[name, k], self.table.families == family)

    def score(self, name: str, k=0) -> np.ndarray:
        """Mean over families of the percent that is right."""
        return np.mean([self.family(name, family, k) for family in
                        np.unique(self.table.families)], 0)

    def __call__(self, name: str, k=0) -> np.ndarray:
        """Retention: percent of the score with all tokens."""
        return 100 * self.score(name, k) / self.score("vanilla", 0)

    def hard(self, name: str, k, easy: str = "downsample") -> np.ndarray:
        """Percent right of the questions that need more than `easy` has at the same K, and are
        right with all tokens."""
        self.used.add(name)
        among = self.table.right["vanilla", 0] & ~self.table.right[easy, k]
        return self.share(self.table.right[name, k], among)

    def seen_though_lost(self, name: str, k) -> np.ndarray:
        """Of the questions that turn wrong, percent whose evidence was kept whole."""
        self.used.add(name)
        lost = self.table.right["vanilla", 0] & ~self.table.right[name, k]
        return self.share(self.table.seen[name, k], lost)

    def tokens(self, name: str, k) -> np.ndarray:
        """Mean number of tokens kept."""
        self.used.add(name)
        counts = self.counts / self.counts.sum(1, keepdims=True)
        return self.over_seeds(counts @ self.table.kept[name, k].T)

    def at_limit(self, name: str, k) -> np.ndarray:
        """Percent of the questions that keep as many tokens as any of the same seed."""
        kept = self.table.kept[name, k]
        self.used.add(name)
        return self.share(kept == kept.max(1, keepdims=True), np.ones((1, 1), bool))

    def follows_things(self, name: str, k) -> np.ndarray:
        """Correlation of the tokens kept with the number of things in the picture."""
        self.used.add(name)
        counts = self.counts / self.counts.sum(1, keepdims=True)
        kept, things = self.table.kept[name, k].T.astype(float), self.table.things[:, None]
        both = counts @ (kept * things) - (counts @ kept) * (counts @ things)
        spread = ((counts @ kept ** 2 - (counts @ kept) ** 2)
                  * (counts @ things ** 2 - (counts @ things) ** 2))
        return self.over_seeds(both / np.sqrt(np.maximum(spread, 1e-12)))

    def low_to_high(self, name: str, k) -> np.ndarray:
        """Percent right where fewest tokens are kept, less that where most are: thirds of the
        questions, by the tokens kept."""
        self.used.add(name)
        right, kept = self.table.right[name, k], self.table.kept[name, k]
        low, high = np.quantile(kept, [1 / 3, 2 / 3], axis=1, keepdims=True)
        return self.share(right, kept <= low) - self.share(right, kept >= high)

    def measured(self, name: str, what: str) -> np.ndarray:
        """A number that is measured once a seed, see Table."""
        self.used.add(name)
        return self.over_seeds(self.table.measured[name, what])


# ------------------------------------------------------------------------------------ verdicts


@dataclass
class Rule:
    """How the middle 95 % of an effect's draws decide: it holds where they lie between the bounds,
    does not where they lie outside, and is within noise where they cross one."""
    low: float = -np.inf
    high: float = np.inf

    def verdict(self, interval) -> str:
        low, high = interval
        if self.low < low and high < self.high:
            return HOLDS
        return FAILS if high < self.low or low > self.high else OPEN


def above(least: float = 0) -> Rule:
    return Rule(low=least)


def below(most: float = 0) -> Rule:
    return Rule(high=most)


def within(margin: float) -> Rule:
    """As much, give or take so many points."""
    return Rule(-margin, margin)


@dataclass
class Claim:
    """A sentence of a paper.

    place    in it | says: the sentence | printed: its figures
    effects  {what is measured, such as "K = 16": function of Draws}
    rule     for each of them | unit: of the effects
    table    whose questions, see experiments.TABLES
    note     what a reader must know besides, and where a claim fails where we looked for our fault
    """
    place: str
    says: str
    printed: str
    effects: dict[str, Callable]
    rule: Rule
    table: str = "llava"
    unit: str = ""
    note: str = ""


def judge(claim: Claim, draws: Draws) -> tuple[dict, str]:
    """({effect: (value, (low, high), verdict)}, verdict of the claim): it holds where all effects
    do, and does not where one does not."""
    found = {}
    for what, effect in claim.effects.items():
        values = effect(draws)
        interval = tuple(np.percentile(values[1:], [2.5, 97.5]))
        found[what] = float(values[0]), interval, claim.rule.verdict(interval)
    return found, max((verdict for *_, verdict in found.values()), key=VERDICTS.index)


# ------------------------------------------------------------------------------------ effects


def ahead(name: str, other: str, budgets: Iterable) -> dict[str, Callable]:
    """Points of retention by which one is ahead of the other, K by K."""
    return {f"K = {k}": lambda d, k=k: d(name, k) - d(other, k) for k in budgets}
