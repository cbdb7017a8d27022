"""What the frozen vision encoder says of numbered pictures, kept on disk."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import Units

GIB = 2**30


class FeatureCache:
    """Features of numbered pictures on disk, made once, in order; a killed run goes on with them.

    folder/key.json: what they are of
    folder/index.jsonl: a line per picture
    folder/features.bin: the units, picture by picture
    ends[i]: bytes in front of picture i in features.bin
    Raises ValueError if the folder holds the features of something else.
    """

    def __init__(self, folder: str | Path, key: dict, dtype: torch.dtype):
        self.folder = Path(folder)
        self.dtype = dtype
        self.features = self.folder / "features.bin"
        self.index = self.folder / "index.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_key(key)
        lines = []
        if self.index.exists():
            # a kill leaves half a line, which is dropped
            lines = [line for line in self.index.read_text().splitlines(keepends=True)
                     if line.endswith("\n")]
        self.pictures = [json.loads(line) for line in lines]
        sizes = [math.prod(picture["grid"]) * math.prod(picture["unit"]) * dtype.itemsize
                 for picture in self.pictures]
        self.ends = np.cumsum([0, *sizes]).tolist()
        truncate(self.features, self.ends[-1])
        truncate(self.index, sum(len(line.encode()) for line in lines))

    def check_key(self, key: dict) -> None:
        """Write key.json, or raise ValueError naming what the one there says differently."""
        path = self.folder / "key.json"
        there = json.loads(path.read_text()) if path.exists() else key
        differ = [f"{name}: {there.get(name)!r} there, {value!r} here"
                  for name, value in key.items() if there.get(name) != value]
        if differ:
            raise ValueError(f"{self.folder} holds features of something else "
                             f"({'; '.join(differ)}): name another folder")
        path.write_text(json.dumps(key, indent=1))

    def __len__(self):
        return len(self.pictures)

    def fill(self, n: int, batches, encode) -> None:
        """Append the features of pictures len(self) .. n-1: encode(batch) -> Units, of each batch.

        Prints beforehand what they will take on disk; raises OSError if that is not free.
        """
        missing = n - len(self)
        with open(self.features, "ab") as features, open(self.index, "a") as index:
            for number, batch in enumerate(tqdm(batches, "features", disable=not missing)):
                units = encode(batch)
                if number == 0:
                    self.check_space(units, missing)
                self.append(units, features, index)

    def check_space(self, units: Units, missing: int) -> None:
        """Raises OSError if so many pictures like these do not fit on the disk."""
        size = units.feats.numel() * units.feats.element_size()
        need = size / len(units.grid) * missing
        free = shutil.disk_usage(self.folder).free
        tqdm.write(f"features of {missing} pictures take about {need / GIB:.2f} GiB in "
                   f"{self.folder}; {free / GIB:.1f} GiB are free")
        if need > free:
            raise OSError(f"{need / GIB:.2f} GiB do not fit into {self.folder}: name another "
                          "folder, or leave the cache out")

    def append(self, units: Units, features, index) -> None:
        """Write the pictures of some units to the two open files."""
        n = len(units.grid)
        has_token = [None] * n
        if units.has_token is not None:
            has_token = units.has_token.cpu().split(units.counts)
        views = units.views or [None] * n
        for b, feats in enumerate(units.feats.cpu().split(units.counts)):
            raw = feats.contiguous().view(torch.uint8).numpy().tobytes()
            features.write(raw)
            features.flush()          # never a line in the index without its features
            hidden = None
            if has_token[b] is not None:
                hidden = (~has_token[b]).nonzero().flatten().tolist()
            picture = {"grid": units.grid[b], "unit": list(feats.shape[1:]), "views": views[b],
                       "hidden": hidden}
            index.write(json.dumps(picture) + "\n")
            self.pictures.append(picture)
            self.ends.append(self.ends[-1] + len(raw))

    def units(self, numbers: list[int]) -> Units:
        """The Units of some pictures, in this order, on the CPU, without readings."""
        whole = np.memmap(self.features, np.uint8, "r")
        chosen = [self.pictures[i] for i in numbers]
        feats, has_token = [], []
        for i, picture in zip(numbers, chosen):
            raw = torch.from_numpy(whole[self.ends[i]:self.ends[i + 1]].copy())
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


def truncate(path: Path, size: int) -> None:
    """Cut a file off behind `size` bytes; made where it is missing."""
    with open(path, "ab") as file:
        file.truncate(size)
