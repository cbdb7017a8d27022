"""Rows of a data set as training items, at random access or streamed from parquet files.

A row of use becomes (image, turns, skipped): a PIL image in RGB; turns [(question, answer), ...],
empty where only pictures are wanted; "where: cause" of each row of no use that was skipped to come
to it, and of what was cut off itself.
"""

import hashlib
import json
import math
import os
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_dataset
from PIL import Image

from data.epochs import shuffled
from data.pictures import open_picture

try:                                   # what huggingface_hub speaks through, by its version
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError

# rows that are shuffled among one another while streaming, and unusable rows on end that stop a run
BLOCK = 1000
# row groups at least that are shuffled together: neighbours may be of one class
GROUPS = 4
# shares of a stream that processes can read apart, a power of two
LANES = 8
MARK = "<image>"


@dataclass(frozen=True)
class Source:
    """A data set of the papers: where it lies and which of its columns are read.

    hubs: (id, pattern of its parquet files or None for what its card says, or its JSON file), in
        the order to try
    kind: "captions", "dialogues" or "images"
    same: rows that agree in those of these columns that are there show the same picture; only the
        first stays
    """
    hubs: tuple[tuple[str, str | None], ...]
    kind: str
    text: str | None = None
    image: str = "image"
    same: tuple[str, ...] = ()
    split: str = "train"


# ------------------------------------------------------------------------------------ one row


@dataclass
class Reader:
    """A row as a dict -> (image, turns, what was cut off or None). Raises ValueError with the cause
    where it is of no use.

    prompt: the question of every caption
    root: where relative paths of pictures start
    accept: may refuse a picture by a sentence that says why
    fit: (picture, turns) -> the turns that can be used, what became of the others or None; may
        raise ValueError with the cause
    """
    name: str
    source: Source
    prompt: str
    root: Path | None
    accept: Callable[[Image.Image], str | None] | None
    fit: Callable[[Image.Image, list], tuple[list, str | None]] | None = None

    def __call__(self, row: dict) -> tuple[Image.Image, list[tuple[str, str]], str | None]:
        if not isinstance(row, dict):
            raise ValueError(f"is a {type(row).__name__}: expected an image and a dialogue")
        content, path = self.locate(row)
        turns = self.turns(row)       # before the picture, which takes longer
        if content is None:
            if not isinstance(path, str) or self.root is None:
                raise ValueError(f"the picture is {path!r}: expected bytes, or a path and where "
                                 "it starts from")
            path = str(self.root / path)
        try:
            picture = open_picture(path, content)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{path}: ")) from error
        cause = self.accept(picture) if self.accept else None
        if cause:
            raise ValueError(cause)
        return picture, *(self.fit(picture, turns) if self.fit else (turns, None))

    def locate(self, row: dict) -> tuple[bytes | None, str | None]:
        """(content, path) of the row's picture; one of them may be missing."""
        image = row.get(self.source.image)
        if isinstance(image, list):
            if len(image) != 1:
                raise ValueError(f"{len(image)} pictures: expected one")
            image = image[0]
        content, path = None, image
        if isinstance(image, dict):
            content, path = image.get("bytes"), image.get("path")
        if content is None and not path:
            raise ValueError("text only" if self.source.kind == "dialogues" else "no picture")
        return content, path

    def turns(self, row: dict) -> list[tuple[str, str]]:
        """[(question, answer), ...] of the row, stripped; [] where only pictures are wanted."""
        if self.source.kind == "images":
            return []
        text = row.get(self.source.text)
        captions = self.source.kind == "captions"
        turns = [(self.prompt, text)] if captions else pairs(text)
        for question, answer in turns:
            if not isinstance(answer, str) or not question.strip() or not answer.strip():
                raise ValueError("empty caption" if captions else "empty question or answer")
            if MARK in question + answer:
                raise ValueError(f"{MARK} in the text, beyond the one that stands for the picture")
        return [(question.strip(), answer.strip()) for question, answer in turns]


def pairs(conversation: list) -> list[tuple[str, str]]:
    """[(question, answer), ...] of LLaVA's [{"from": "human" | "gpt", "value": text}, ...].

    The first image mark of the first question is taken out: FrozenVLM.batch places it. A last
    question without answer is dropped: there is nothing to learn from it.
    """
    if not isinstance(conversation, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str)
            for turn in conversation):
        raise ValueError("expected a list of turns with from and value")
    speakers = [turn.get("from") for turn in conversation]
    if speakers != (["human", "gpt"] * len(speakers))[:len(speakers)]:
        raise ValueError(f"the speakers are {', '.join(map(str, speakers[:6]))}: expected human "
                         "and gpt in turn")
    if len(speakers) < 2:
        raise ValueError("no answer")
    texts = [turn["value"] for turn in conversation]
    texts[0] = texts[0].replace(MARK, "", 1)
    return list(zip(texts[::2], texts[1::2]))


def first_useful(reader: Reader, rows: Iterable[tuple[str, dict]],
                 where: str) -> tuple[Image.Image, list, list[str]]:
    """(image, turns, skipped) of the first of use among `rows`, pairs of a name and a dict.

    Raises ValueError with the count and the first causes if none is.
    """
    skipped = []
    for name, row in rows:
        try:
            image, turns, cut = reader(row)
        except ValueError as error:
            skipped.append(f"{name}: {error}")
        else:
            return image, turns, [*skipped, *([f"{name}: {cut}"] if cut else [])]
    raise ValueError(f"{reader.name}: none of {len(skipped)} rows in succession of {where} can be "
                     f"used; {'; '.join(skipped[:3])}")


# ------------------------------------------------------------------------------------ all rows


class Rows(torch.utils.data.Dataset):
    """Local rows at random access.

    Item i is that of row i, or of the next one of use (after the last comes the first).
    table: the rows
    index: which of them count, in order
    skipped: cause -> number of the others
    files: (name, its first row in the table)
    """

    def __init__(self, reader: Reader, table: Dataset, skipped: Counter, where: str,
                 files: list[tuple[str, int]] | None = None, index: np.ndarray | None = None):
        self.reader = reader
        self.table = table.with_format("arrow")       # arrow decodes no picture
        self.skipped = skipped
        self.where = where
        self.files = files or [(where, 0)]
        self.index = np.arange(len(table)) if index is None else index
        if not len(self.index):
            raise ValueError(f"{reader.name}: {where} has no row that can be used; skipped: "
                             f"{dict(skipped)}")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        n = len(self)
        first = range(n)[i]           # raises IndexError, without which a loop would never end
        rows = (self.row((first + k) % n) for k in range(min(n, BLOCK)))
        return first_useful(self.reader, rows, self.where)

    def row(self, i: int) -> tuple[str, dict]:
        """(name, content) of a row that counts."""
        number = int(self.index[i])
        row = self.table[number].to_pylist()[0]
        if "json" in row:
            number = row["number"]
            row = json.loads(row["json"])
        file, first = self.files[bisect([first for _, first in self.files], number) - 1]
        name = f"{file} row {number - first}"
        path = row.get(self.reader.source.image) if isinstance(row, dict) else None
        return f"{name} ({path})" if isinstance(path, str) else name, row


class Shards:
    """Parquet files, local or of the hub.

    pieces[p]: (file, row group, its first row in the file, those of its rows that count)
    skipped: cause -> number of the rows that do not
    Reads the footers only; beside them the columns that tell same pictures apart, once (ChartQA:
    the pictures).
    Raises ValueError for files that cannot be read, lack a column or hold no row.
    """

    def __init__(self, reader: Reader, files: list[str]):
        self.reader = reader
        self.files = files
        self.where = os.path.dirname(files[0])
        with ThreadPoolExecutor(16) as pool:
            self.footers = list(pool.map(self.footer, files))
        source = reader.source
        self.columns = [source.image, *([source.text] if source.text else [])]
        self.check_columns()
        self.skipped = Counter()
        self.pieces = []
        self.find_pieces()
        self.total = sum(len(kept) for *_, kept in self.pieces)
        if not self.total:
            raise ValueError(f"{reader.name}: the {len(files)} parquet files of {self.where} hold "
                             "no row")

    def __len__(self):
        return self.total

    def names(self, footer) -> list[str]:
        """The columns of a file."""
        return footer.schema.to_arrow_schema().names

    def check_columns(self) -> None:
        for file, footer in zip(self.files, self.footers):
            names = self.names(footer)
            missing = [column for column in self.columns if column not in names]
            if missing:
                raise ValueError(f"{file} lacks {', '.join(missing)}; its columns are "
                                 f"{', '.join(names)}: is it {self.reader.name}?")

    def find_pieces(self) -> None:
        """The rows of every row group that count: of those that show one picture, the first."""
        seen = set()
        for f, footer in enumerate(self.footers):
            same = [column for column in self.reader.source.same if column in self.names(footer)]
            first = 0
            for group in range(footer.num_row_groups):
                n = footer.row_group(group).num_rows
                kept = new_ones(self.table(f, group, same), seen) if same else np.arange(n)
                if len(kept) < n:
                    self.skipped["shown before"] += n - len(kept)
                if len(kept):
                    self.pieces.append((f, group, first, kept))
                first += n

    def opened(self, file: str, read: Callable):
        """read(the open file). Raises ValueError naming the file where that fails."""
        try:
            with fsspec.open(file, "rb") as stream:
                return read(stream)
        except (pa.ArrowException, OSError, TransportError) as error:
            raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}): try again "
                             "if it is the network's fault, else download it anew or take it "
                             "away") from error

    def footer(self, file: str):
        return self.opened(file, pq.read_metadata)

    def table(self, f: int, group: int, columns: list[str] | None = None) -> pa.Table:
        """A row group of file number f, nothing decoded."""
        def read(stream):
            file = pq.ParquetFile(stream, metadata=self.footers[f], pre_buffer=True)
            return file.read_row_group(group, columns or self.columns)
        return self.opened(self.files[f], read)

    def rows(self) -> Rows:
        """The same rows at random access. `datasets` writes them to its cache once more."""
        counts = [footer.num_rows for footer in self.footers]
        starts = np.cumsum([0, *counts])
        try:
            table = load_dataset("parquet", data_files=self.files, columns=self.columns,
                                 split="train")
        except Exception as error:
            raise ValueError(f"{self.reader.name}: the parquet files of {self.where} cannot be "
                             f"read ({error.__cause__ or error})") from error
        index = np.concatenate([starts[f] + first + kept for f, _, first, kept in self.pieces])
        files = list(zip(self.files, starts.tolist()))
        return Rows(self.reader, table, self.skipped, self.where, files, index)


def new_ones(table: pa.Table, seen: set[bytes]) -> np.ndarray:
    """Numbers of the rows whose values are not in `seen`, and puts them there."""
    kept = []
    for i, row in enumerate(table.to_pylist()):
        values = [value["bytes"] or value["path"] if isinstance(value, dict) else value
                  for value in row.values()]
        hashed = hashlib.blake2b(digest_size=16)
        for value in values:
            hashed.update(value if isinstance(value, bytes) else repr(value).encode())
        key = hashed.digest()
        tells_nothing = all(value is None for value in values)
        if tells_nothing or key not in seen:
            kept.append(i)
        seen.add(key)
    return np.array(kept, int)


# ------------------------------------------------------------------------------------ a stream


def lanes_of(source: Shards, batch: int) -> int:
    """In how many lanes a stream comes: at most LANES, of equal shares of a step, and not so many
    that a lane would have less than a block of rows to shuffle."""
    lanes = math.gcd(batch, LANES)
    while lanes > 1 and (len(source) < lanes * BLOCK or len(source.pieces) < lanes * GROUPS):
        lanes //= 2
    return lanes


class Stream(torch.utils.data.Dataset):
    """Items start to stop-1 of epochs without end over Shards, in steps of `batch` items.

    An epoch shuffles the row groups of all files and deals their rows out in lanes of equal length,
    lane after lane. Each lane gives the same share of every step: the item at place p of a step is
    of lane p * lanes // batch. So processes that each take an equal piece of every step each read
    lanes of their own, a part of the data; but for a row group that two lanes meet in, no two
    processes read the same in an epoch. What is left over, fewer rows than lanes, an epoch does
    without; the others it has once each.

    A lane comes in blocks, which are shuffled. Those of all lanes together have GROUPS row groups
    and BLOCK rows or more, and one per lane is held in memory.

    Item g is a function of (seed, batch, g) alone, whatever was read before and by how many
    processes. So a resumed run reads one block a lane to go on; a shuffle buffer would have to be
    filled anew by all that came before. Where a row is of no use the next in its block stands in; a
    block of nothing else stops the run. Pictures are decoded when they are given out.
    Raises ValueError for a range that is none, a negative seed, or an empty batch.
    """

    def __init__(self, source: Shards, start: int, stop: int, seed: int = 0, batch: int = 1):
        if not 0 <= start <= stop or seed < 0 or batch < 1:
            raise ValueError(f"start={start}, stop={stop}, seed={seed}, batch={batch}: expected "
                             "0 <= start <= stop, seed >= 0 and batch >= 1")
        self.source = source
        self.range = range(start, stop)
        self.seed = seed
        self.batch = batch
        self.lanes = lanes_of(source, batch)
        self.share = batch // self.lanes              # items of a step that a lane gives
        self.length = len(source) // self.lanes       # rows of a lane in an epoch
        self.epoch = None                             # that `plans` are of
        self.held = {}                                # lane -> its (epoch, block), the rows of it

    def __len__(self):
        return len(self.range)

    def __getitem__(self, i: int) -> tuple[Image.Image, list, list[str]]:
        step, place = divmod(self.range[i], self.batch)
        lane, place = divmod(place, self.share)
        epoch, place = divmod(step * self.share + place, self.length)
        if epoch != self.epoch:
            self.plans = self.plan(epoch)
            self.epoch = epoch
        starts = self.plans[lane][1]
        block = int(np.searchsorted(starts, place, "right")) - 1
        if self.held.get(lane, [None])[0] != (epoch, block):
            self.held.pop(lane, None)                 # not two blocks at a time in memory
            self.held[lane] = (epoch, block), self.read(lane, block)
        rows = self.held[lane][1]
        n = len(rows)
        first = place - int(starts[block])
        named = (self.row(*rows[(first + k) % n]) for k in range(n))
        return first_useful(self.source.reader, named, self.source.where)

    def plan(self, epoch: int) -> list[tuple[list[list[tuple[int, int, int]]], np.ndarray]]:
        """Of every lane the blocks, and at which of its places each starts.

        A block is a list of (piece, first, last): rows first to last-1 of a piece's.
        """
        lanes = [[] for _ in range(self.lanes)]
        end = 0
        for p in shuffled(len(self.source.pieces), self.seed, epoch).tolist():
            start, end = end, end + len(self.source.pieces[p][3])
            for lane in range(start // self.length, min(-(-end // self.length), self.lanes)):
                low, high = lane * self.length, (lane + 1) * self.length
                lanes[lane].append((p, max(start, low) - start, min(end, high) - start))
        plans = []
        for blocks in map(self.in_blocks, lanes):
            sizes = [sum(last - first for _, first, last in block) for block in blocks]
            plans.append((blocks, np.cumsum([0, *sizes])))
        return plans

    def in_blocks(self, parts: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
        """The parts of a lane, in blocks."""
        least, groups = BLOCK / self.lanes, GROUPS / self.lanes
        blocks, rows = [[]], 0
        for part in parts:
            if rows >= least and len(blocks[-1]) >= groups:
                blocks.append([])
                rows = 0
            blocks[-1].append(part)
            rows += part[2] - part[1]
        # few rows may happen to be all of no use
        if rows < least and len(blocks) > 1:
            short = blocks.pop()
            blocks[-1] = blocks[-1] + short
        return blocks

    def read(self, lane: int, block: int) -> list[tuple[int, pa.Table, int]]:
        """(piece, its table, row in it) in the order of the items."""
        parts = self.plans[lane][0][block]
        with ThreadPoolExecutor(8) as pool:           # to wait for the network once
            tables = list(pool.map(lambda part: self.source.table(*self.source.pieces[part[0]][:2]),
                                   parts))
        rows = [(p, table, int(row)) for (p, first, last), table in zip(parts, tables)
                for row in self.source.pieces[p][3][first:last]]
        # block + 1: a last 0 adds nothing to a key, which would be another's
        order = shuffled(len(rows), self.seed, self.epoch, lane, block + 1)
        return [rows[i] for i in order]

    def row(self, p: int, table: pa.Table, row: int) -> tuple[str, dict]:
        """(name, content) of a row of a piece."""
        file, _, first, _ = self.source.pieces[p]
        name = f"{self.source.files[file]} row {first + row}"
        return name, table.slice(row, 1).to_pylist()[0]
