"""What the frozen vision encoder says of numbered pictures, kept on disk."""

import errno
import json
import math
import os
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import Units

GIB = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)       # a disk, a share of it, a file
PATIENCE = 1800                       # seconds without a new picture after which others are lost


class FeatureCache:
    """Features of numbered pictures on disk, made once; a killed run goes on with them.

    folder/key.json: what they are of
    folder/NAME.bin, NAME.jsonl: the units of some pictures, one behind another; a line for each
    places[number]: (file, first byte, last byte + 1, its line)
    Every process that makes features writes two files of its own, and no other touches them: so
    several make them at a time, later runs have as many processes as they like, and what a kill
    leaves half done is passed over.
    Raises ValueError if the folder holds the features of something else.
    """

    def __init__(self, folder: str | Path, key: dict, dtype: torch.dtype):
        self.folder = Path(folder)
        self.dtype = dtype
        self.places = {}
        self.read = {}                # index file -> bytes read of it, bytes of their features
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_key(key)
        self.refresh()

    def check_key(self, key: dict) -> None:
        """Write key.json, or raise ValueError naming what the one there says differently."""
        path = self.folder / "key.json"
        if not path.exists():
            whole = self.folder / f"{uuid.uuid4().hex}.tmp"       # others may be writing it too
            whole.write_text(json.dumps(key, indent=1))
            os.replace(whole, path)
        there = json.loads(path.read_text())
        differ = [f"{name}: {there.get(name)!r} there, {value!r} here"
                  for name, value in key.items() if there.get(name) != value]
        if differ:
            raise ValueError(f"{self.folder} holds features of something else "
                             f"({'; '.join(differ)}): name another folder")

    def refresh(self) -> None:
        """Read what has been added to the folder."""
        for index in sorted(self.folder.glob("*.jsonl")):
            features = index.with_suffix(".bin")
            at, end = self.read.get(index, (0, 0))
            size = features.stat().st_size
            with open(index, "rb") as lines:
                lines.seek(at)
                for line in lines:
                    if not line.endswith(b"\n"):      # a kill's, or being written
                        break
                    picture = json.loads(line)
                    units = math.prod(picture["grid"]) * math.prod(picture["unit"])
                    start, end = end, end + units * self.dtype.itemsize
                    if end > size:
                        break
                    at += len(line)
                    self.places[picture["number"]] = features, start, end, picture
                    self.read[index] = at, end

    def __len__(self):
        return len(self.places)

    def missing(self, n: int, rank: int = 0, processes: int = 1) -> list[int]:
        """Which of n pictures a process has to make: every so many-th, if it is not there."""
        return [i for i in range(rank, n, processes) if i not in self.places]

    def fill(self, n: int, batches, encode, rank: int = 0, processes: int = 1) -> None:
        """Make the features of missing(n, rank, processes), in this order: encode(batch) -> Units,
        of each batch. Then wait until other processes have made theirs.

        It is the folder that is looked at: in a collective, the others' time would run out.
        Prints beforehand what they will take on disk; raises OSError if that is not free, and
        TimeoutError if nothing comes from the others any more.
        """
        numbers = self.missing(n, rank, processes)
        if numbers:
            name = self.folder / uuid.uuid4().hex
            try:
                with (open(name.with_suffix(".bin"), "wb") as features,
                      open(name.with_suffix(".jsonl"), "w", buffering=1) as index):
                    rest = iter(numbers)
                    for number, batch in enumerate(tqdm(batches, "features", disable=rank > 0)):
                        units = encode(batch)
                        if number == 0:
                            self.check_space(units, len(numbers) * processes, rank)
                        self.append(rest, units, features, index)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise OSError(f"{name}.bin cannot be written ({error}): make room, and the same "
                              "command goes on with what is there, or name another folder"
                              ) from error
        self.refresh()
        self.wait(n, rank)

    def wait(self, n: int, rank: int) -> None:
        """Until the features of n pictures are there."""
        last, since = len(self), time.monotonic()
        if last < n and rank == 0:
            print(f"{self.folder}: waiting for other processes, {n - last} of {n} pictures missing")
        while len(self) < n:
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError(
                    f"{self.folder}: {n - last} of {n} pictures are missing, and none has come for "
                    f"{PATIENCE} s: expected a folder that all processes share, and all of them "
                    "at work")
            time.sleep(1)
            self.refresh()
            if len(self) > last:
                last, since = len(self), time.monotonic()

    def check_space(self, units: Units, missing: int, rank: int = 0) -> None:
        """Raises OSError if so many pictures like these do not fit on the disk."""
        size = units.feats.numel() * units.feats.element_size()
        need = size / len(units.grid) * missing
        free = shutil.disk_usage(self.folder).free
        if rank == 0:
            tqdm.write(f"features of {missing} pictures take about {need / GIB:.2f} GiB in "
                       f"{self.folder}; {free / GIB:.1f} GiB are free")
        if need > free:
            raise OSError(f"{need / GIB:.2f} GiB do not fit into {self.folder}: name another "
                          "folder, or leave the cache out")

    def append(self, numbers, units: Units, features, index) -> None:
        """Write the pictures of some units, of the next of `numbers`, to the two open files."""
        n = len(units.grid)
        has_token = [None] * n
        if units.has_token is not None:
            has_token = units.has_token.cpu().split(units.counts)
        views = units.views or [None] * n
        for b, feats in enumerate(units.feats.cpu().split(units.counts)):
            features.write(feats.contiguous().view(torch.uint8).numpy().tobytes())
            features.flush()          # never a line in the index without its features
            hidden = None
            if has_token[b] is not None:
                hidden = (~has_token[b]).nonzero().flatten().tolist()
            picture = {"number": next(numbers), "grid": units.grid[b],
                       "unit": list(feats.shape[1:]), "views": views[b], "hidden": hidden}
            index.write(json.dumps(picture) + "\n")

    def units(self, numbers: list[int]) -> Units:
        """The Units of some pictures, in this order, on the CPU, without readings."""
        places = [self.places[i] for i in numbers]
        whole = {file: np.memmap(file, np.uint8, "r") for file, *_ in places}
        chosen = [picture for *_, picture in places]
        feats, has_token = [], []
        for file, start, end, picture in places:
            raw = torch.from_numpy(whole[file][start:end].copy())
            part = raw.view(self.dtype).view(-1, *picture["unit"])
            with_token = torch.ones(len(part), dtype=torch.bool)
            with_token[picture["hidden"] or []] = False
            feats.append(part)
            has_token.append(with_token)
        sizes = torch.tensor([len(part) for part in feats])
        image_of = torch.arange(len(feats)).repeat_interleave(sizes)
        # of one VLM, either all pictures have several views, or padding, or none
        one_view = chosen[0]["views"] is None
        all_tokens = chosen[0]["hidden"] is None
        return Units(torch.cat(feats), image_of, [tuple(picture["grid"]) for picture in chosen],
                     views=None if one_view else [picture["views"] for picture in chosen],
                     has_token=None if all_tokens else torch.cat(has_token))

