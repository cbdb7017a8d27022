"""Which data sets a training reads, and how much of each.

    --data coco docvqa chartqa --path coco/train2017 DocVQA ChartQA --take 0 9000 9000

--data names one or several. Of several, --path, --split, --images and --take have a value for each,
"-" where it has none, or are left out. A pass goes once over what is taken of all, shuffled
together, so that a batch holds of each what chance gives it of its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

import runs
from data.epochs import shuffled
from data.sources import SOURCES

DATA = ("scenes", "folder", *SOURCES)
# the kinds of data that read an option
KINDS = ("captions", "dialogues", "images")
READ_BY = dict(path=KINDS, split=KINDS, images=(*KINDS, "folder"), prompt=KINDS[:1],
               questions=("dialogues", "scenes without epochs"), n_pictures=("scenes in epochs",),
               take=(*KINDS, "folder", "scenes in epochs"))


@dataclass
class Chosen:
    """A data set of DATA, and the options that each has for itself; see train.TrainConfig."""
    data: str = "scenes"
    path: str | None = None
    split: str | None = None
    images: str | None = None
    take: float | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether it comes from the hub, in an order of its own."""
        return self.data in SOURCES and not self.path and SOURCES[self.data].kind != "dialogues"

    def kind(self, in_epochs: bool) -> str:
        if self.data == "scenes":
            return f"scenes {'in epochs' if in_epochs else 'without epochs'}"
        return SOURCES[self.data].kind if self.data in SOURCES else self.data

    def count(self, n: int) -> int:
        """How many of its n pictures are taken; of a share at least one."""
        if not self.take:
            return n
        return int(self.take) if self.take >= 1 else max(round(self.take * n), min(n, 1))

    def drawn(self, n: int, *key: int) -> np.ndarray:
        """Which of its n pictures are taken, ascending: a function of the key. Raises ValueError
        where it has not as many."""
        count = self.count(n)
        if count > n:
            where = self.path or self.images
            raise ValueError(f"take={count}: {self.data} has {n} pictures"
                             + f" in {where}" * bool(where) + f": expected at most {n}, or 0, all")
        return np.sort(shuffled(n, *key)[:count])


def chosen(config) -> list[Chosen]:
    """The data sets of a run, each with what is its own.

    config: train.TrainConfig
    Raises ValueError for an option that has not one value for each.
    """
    names = config.data if isinstance(config.data, list) else [config.data]
    columns = []
    for option in fields(Chosen):
        given = getattr(config, option.name)
        values = given if isinstance(given, list) else [given]
        values = [None] * len(names) if given is None else values
        if len(values) != len(names):
            raise ValueError(f"{option.name}={given!r}: expected {len(names)} values, one for each "
                             f"of {', '.join(names)}, '-' where it has none")
        columns.append([None if value in ("-", 0) else value for value in values])
    return [Chosen(*row) for row in zip(*columns)]


def one_or_all(values: list):
    """The value itself where it is alone: what a single data set has always been written as."""
    return values[0] if len(values) == 1 else values


def to_copy(parts: list[Chosen]) -> list[str]:
    """Names of those that are streamed, where that cannot be: what is mixed, or taken in part,
    needs numbers."""
    by_number = len(parts) > 1 or any(part.take for part in parts)
    return [part.data for part in parts if by_number and part.is_streamed]


def settle(config) -> None:
    """Write what is given of a single data set without its list, and check all that is given.

    config: train.TrainConfig
    Raises ValueError for options that do not fit the data sets, or that none of them reads.
    """
    for option in fields(Chosen):
        if isinstance(value := getattr(config, option.name), list):
            setattr(config, option.name, one_or_all(value))
    if config.images and config.data in ("scenes", "folder"):
        several = isinstance(config.images, list)
        config.data = ["folder"] * len(config.images) if several else "folder"
    parts = chosen(config)
    if not any(part.take for part in parts):
        config.take = None
    kinds = [part.kind(config.epochs > 0 or len(parts) > 1) for part in parts]
    for part, kind in zip(parts, kinds):
        unread = [name for name, known in READ_BY.items() if kind not in known]
        runs.check_unread(part, unread, f"data={part.data!r}, of the kind {kind!r},")
        if part.data == "folder" and not part.images:
            raise ValueError("data='folder' needs --images, the folder")
        if part.take and part.take > 1 and part.take % 1:
            raise ValueError(f"take={part.take}: expected a share below 1, or whole pictures")
    unread = [name for name, known in READ_BY.items() if not {*known} & {*kinds}]
    runs.check_unread(config, unread, f"data={config.data!r}, of the kind "
                                      f"{' and '.join(map(repr, dict.fromkeys(kinds)))},")


def shares(parts: list[Chosen], sizes: Sequence[int], counts: Sequence[int]) -> str:
    """One line: what a pass is made of. sizes: pictures that each has; counts: that are taken."""
    total = sum(counts)
    each = [f"{part.data} {count:,}" + f" of {size:,}" * (count < size)
            + f", {100 * count / total:.1f} %" for part, size, count in zip(parts, sizes, counts)]
    return f"a pass over {total:,} pictures: {'; '.join(each)}"
