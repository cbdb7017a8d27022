"""Rows of a data set as training items, at random access or streamed.

A row of use becomes (image, turns, lost): a PIL image in RGB, turns [(question, answer), ...], empty where only
pictures are wanted, and "where: cause" of each row of no use that was stepped over to come to it.
"""

import hashlib
import json
import os
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_dataset
from PIL import Image

from benchmarks.folder import open_picture

BLOCK = 1000    # rows that are shuffled among one another while streaming, and rows of no use in a row that stop a run
GROUPS = 4      # row groups at least that are shuffled together, for neighbours may be of one class
MARK = "<image>"


@dataclass(frozen=True)
class Source:
    """A data set of the papers: where it lies and which of its columns are read.

    hubs: (id, pattern of its parquet files or None for what its card says, or its JSON file), in the order to try
    same: rows that agree in those of these columns that are there show the same picture; only the first stays
    """
    hubs: tuple[tuple[str, str | None], ...]
    kind: str                                          # "captions", "dialogues" or "images"
    text: str | None = None
    image: str = "image"
    same: tuple[str, ...] = ()
    split: str = "train"


# -------------------------------------------------------------------------------------------------------- one row

@dataclass
class Reader:
    """A row as a dict -> (image, turns); raises ValueError with the cause where it is of no use."""
    name: str
    source: Source
    prompt: str
    root: Path | None
    accept: Callable | None

    def __call__(self, row: dict) -> tuple[Image.Image, list[tuple[str, str]]]:
        if not isinstance(row, dict):
            raise ValueError(f"is a {type(row).__name__}: expected an image and a dialogue")
        image = row.get(self.source.image)
        if isinstance(image, list):
            if len(image) != 1:
                raise ValueError(f"{len(image)} pictures: expected one")
            image = image[0]
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
        if data is None and not path:
            raise ValueError("text only" if self.source.kind == "dialogues" else "no picture")
        turns = self.turns(row)                        # before the picture, which takes longer
        if data is None:
            if not isinstance(path, str) or self.root is None:
                raise ValueError(f"the picture is {path!r}: expected bytes, or a path and where it starts from")
            path = str(self.root / path)
        try:
            picture = open_picture(path, data)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{path}: ")) from error
        if self.accept and (cause := self.accept(picture)):
            raise ValueError(cause)
        return picture, turns

    def turns(self, row) -> list[tuple[str, str]]:
        if self.source.kind == "images":
            return []
        text = row.get(self.source.text)
        turns = [(self.prompt, text)] if self.source.kind == "captions" else pairs(text)
        for question, answer in turns:
            if not isinstance(answer, str) or not question.strip() or not answer.strip():
                raise ValueError("empty caption" if self.source.kind == "captions" else "empty question or answer")
            if MARK in question + answer:
                raise ValueError(f"{MARK} in the text, beyond the one that stands for the picture")
        return [(question.strip(), answer.strip()) for question, answer in turns]


def pairs(conversation) -> list[tuple[str, str]]:
    """[(question, answer), ...] of LLaVA's [{"from": "human" | "gpt", "value": text}, ...].

    The first image mark of the first question is taken out, for FrozenVLM.batch places it. A last question without
    answer is dropped: there is nothing to learn from it.
    """
    if not isinstance(conversation, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in conversation):
        raise ValueError("expected a list of turns with from and value")
    speakers = [turn.get("from") for turn in conversation]
    if speakers != (["human", "gpt"] * len(speakers))[:len(speakers)]:
        raise ValueError(f"the speakers are {', '.join(map(str, speakers[:6]))}: expected human and gpt in turn")
    if len(speakers) < 2:
        raise ValueError("no answer")
    said = [turn["value"] for turn in conversation]
    said[0] = said[0].replace(MARK, "", 1)
    return list(zip(said[::2], said[1::2]))


def first_useful(read: Reader, rows, where: str) -> tuple[Image.Image, list, list[str]]:
    """(image, turns, lost) of the first of use among `rows`, pairs of a name and a dict.

    Raises ValueError with the count and the first causes if none is.
    """
    lost = []
    for name, row in rows:
        try:
            return *read(row), lost
        except ValueError as error:
            lost.append(f"{name}: {error}")
    raise ValueError(f"{read.name}: none of {len(lost)} rows in succession of {where} can be used; "
                     f"{'; '.join(lost[:3])}")


# ------------------------------------------------------------------------------------------------------- all rows

class Rows(torch.utils.data.Dataset):
    """Local rows at random access; item i is that of row i, or of the next one of use (after the last comes the first).

    table: the rows; index: which of them count, in order; skipped: cause -> number of the others
    files: (name, its first row in the table)
    """

    def __init__(self, read: Reader, table: Dataset, skipped: Counter, where: str, files=None, index=None):
        self.read, self.table = read, table.with_format("arrow")               # arrow decodes no picture
        self.skipped, self.where, self.files = skipped, where, files or [(where, 0)]
        self.index = np.arange(len(table)) if index is None else index
        if not len(self.index):
            raise ValueError(f"{read.name}: {where} has no row that can be used; left out: {dict(skipped)}")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        n = len(self)
        first = range(n)[i]
        return first_useful(self.read, map(self.row, ((first + k) % n for k in range(min(n, BLOCK)))), self.where)

    def row(self, i: int) -> tuple[str, dict]:
        i = int(self.index[i])
        row = self.table[i].to_pylist()[0]
        if "json" in row:
            i, row = row["number"], json.loads(row["json"])
        path = row.get(self.read.source.image) if isinstance(row, dict) else None
        file, first = self.files[bisect([first for _, first in self.files], i) - 1]
        return f"{file} row {i - first}" + f" ({path})" * isinstance(path, str), row


class Shards:
    """Parquet files, local or of the hub; pieces[p] is (file, row group, its first row, those of its rows that count).

    Reads the footers only; beside them the columns that tell same pictures apart, once (ChartQA: the pictures).
    """

    def __init__(self, read: Reader, files: list[str]):
        self.read, self.files, source = read, files, read.source
        self.where, self.skipped = os.path.dirname(files[0]), Counter()
        with ThreadPoolExecutor(16) as pool:
            self.footers = list(pool.map(self.footer, files))
        wanted = [source.image, *([source.text] if source.text else [])]
        for file, footer in zip(files, self.footers):
            names = footer.schema.to_arrow_schema().names
            if missing := [column for column in wanted if column not in names]:
                raise ValueError(f"{file} lacks {', '.join(missing)}; its columns are {', '.join(names)}: is it "
                                 f"{read.name}?")
        self.columns, self.pieces, seen = wanted, [], set()
        for f, footer in enumerate(self.footers):
            first, same = 0, [c for c in source.same if c in footer.schema.to_arrow_schema().names]
            for group in range(footer.num_row_groups):
                n = footer.row_group(group).num_rows
                kept = new_ones(self.table(f, group, same), seen) if same else np.arange(n)
                self.skipped["shown before"] += n - len(kept)
                if len(kept):
                    self.pieces.append((f, group, first, kept))
                first += n
        self.skipped = +self.skipped
        self.total = sum(len(kept) for *_, kept in self.pieces)
        if not self.total:
            raise ValueError(f"{read.name}: the {len(files)} parquet files of {self.where} hold no row")

    def __len__(self):
        return self.total

    def opened(self, file: str, do):
        try:
            with fsspec.open(file, "rb") as opened:
                return do(opened)
        except (pa.ArrowException, OSError, httpx.TransportError) as error:
            raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}): try again if it is the "
                             "network's fault, else download it anew or take it away") from error

    def footer(self, file: str):
        return self.opened(file, pq.read_metadata)

    def table(self, f: int, group: int, columns: list[str] | None = None) -> pa.Table:
        """The row group, nothing decoded."""
        return self.opened(self.files[f], lambda opened: pq.ParquetFile(
            opened, metadata=self.footers[f], pre_buffer=True).read_row_group(group, columns or self.columns))

    def rows(self) -> Rows:
        """The same at random access, by way of the cache of `datasets`."""
        starts = np.cumsum([0, *(footer.num_rows for footer in self.footers)])
        try:
            table = load_dataset("parquet", data_files=self.files, columns=self.columns, split="train")
        except Exception as error:
            raise ValueError(f"{self.read.name}: the parquet files of {self.where} cannot be read "
                             f"({error.__cause__ or error})") from error
        index = np.concatenate([starts[f] + first + kept for f, _, first, kept in self.pieces])
        return Rows(self.read, table, self.skipped, self.where, list(zip(self.files, starts.tolist())), index)


def new_ones(table: pa.Table, seen: set) -> np.ndarray:
    """Numbers of the rows whose values are not in `seen`, and puts them there."""
    kept = []
    for i, row in enumerate(table.to_pylist()):
        values = [value["bytes"] or value["path"] if isinstance(value, dict) else value for value in row.values()]
        hashed = hashlib.blake2b(digest_size=16)
        for value in values:
            hashed.update(value if isinstance(value, bytes) else repr(value).encode())
        key = hashed.digest()
        if key not in seen or all(value is None for value in values):          # which tells nothing
            kept.append(i)
        seen.add(key)
    return np.array(kept, int)


def every(g: int) -> bool:
    return True


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of n that depends on the key alone."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


class Stream(torch.utils.data.IterableDataset):
    """Items start to stop-1 of epochs without end over Shards, those g that are `mine(g)`.

    Item g is a function of (seed, g) alone, whatever was read before: an epoch shuffles the row groups of all files,
    takes GROUPS or more of them to a block of at least BLOCK rows, and shuffles each block. So a resumed run reads one
    block to go on; a shuffle buffer would have to be filled anew by all that came before. Where a row is of no use the
    next in its block stands in; a block of nothing else stops the run. Pictures are decoded when they are given out.
    Raises ValueError for a range that is none, a negative seed, or in more than one worker process.
    """

    def __init__(self, source: Shards, start: int, stop: int, seed: int = 0, mine: Callable[[int], bool] = every):
        if not 0 <= start <= stop or seed < 0:
            raise ValueError(f"start={start}, stop={stop}, seed={seed}: expected 0 <= start <= stop and seed >= 0")
        self.source, self.range, self.seed, self.mine = source, range(start, stop), seed, mine
        self.epoch, self.at = None, None               # what order and rows are of

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        if worker and worker.num_workers > 1:
            raise ValueError(f"{worker.num_workers} worker processes would each read all blocks: a stream takes 0 or 1")
        for g in self.range:
            if self.mine(g):
                yield self[g]

    def __getitem__(self, g: int) -> tuple[Image.Image, list, list[str]]:
        epoch, place = divmod(g, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.at = epoch, None
            self.blocks = self.plan(epoch)
            self.starts = np.cumsum([0, *(sum(len(self.source.pieces[p][3]) for p in b) for b in self.blocks)])
        block = int(np.searchsorted(self.starts, place, "right")) - 1
        if block != self.at:
            self.rows = None                           # not two at a time in memory
            self.rows, self.at = self.read(block), block
        n, first = len(self.rows), place - int(self.starts[block])
        return first_useful(self.source.read, map(self.row, ((first + k) % n for k in range(n))), self.source.where)

    def plan(self, epoch: int) -> list[list[int]]:
        """The pieces of each block."""
        blocks, rows = [[]], 0
        for p in shuffled(len(self.source.pieces), self.seed, epoch):
            if rows >= BLOCK and len(blocks[-1]) >= GROUPS:
                blocks.append([])
                rows = 0
            blocks[-1].append(int(p))
            rows += len(self.source.pieces[p][3])
        if rows < BLOCK and len(blocks) > 1:           # few rows may happen to be all of no use
            blocks[-2:] = [blocks[-2] + blocks[-1]]
        return blocks

    def read(self, block: int) -> list[tuple[int, pa.Table, int]]:
        """(piece, its table, row in it) in the order of the items."""
        pieces = self.blocks[block]
        with ThreadPoolExecutor(8) as pool:            # to wait for the network once
            tables = list(pool.map(lambda p: self.source.table(*self.source.pieces[p][:2]), pieces))
        rows = [(p, table, int(r)) for p, table in zip(pieces, tables) for r in self.source.pieces[p][3]]
        return [rows[i] for i in shuffled(len(rows), self.seed, self.epoch, block + 1)]     # 0 would be no key

    def row(self, i: int) -> tuple[str, dict]:
        p, table, r = self.rows[i]
        file, _, first, _ = self.source.pieces[p]
        return f"{self.source.files[file]} row {first + r}", table.slice(r, 1).to_pylist()[0]
