"""Any folder of pictures as training data, for a selector that needs nothing but images."""

import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import Units

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_picture(path: str | Path, data: bytes | None = None) -> Image.Image:
    """The picture as one sees it, RGB of 8 bits: upright, on white, of an animation the first frame.

    data: the file's content, where it is at hand; `path` is then its name only.
    Raises ValueError naming path and cause where it is no file, unreadable, cut short, or so large that Pillow warns
    of a decompression bomb.
    """
    try:
        if data is None and not Path(path).is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError("neither a file nor a link to one")
        with (warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
              Image.open(path if data is None else io.BytesIO(data)) as image):
            image.load()
            image.getexif()                            # is kept; its source goes, or exif_transpose would write it
            for key in ("exif", "Raw profile type exif"):          # anew, and fail at tags of the wrong type
                image.info.pop(key, None)
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:                         # from a broken file, Pillow's decoders raise any type
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits from any mode. Deep greys are scaled, for Pillow would clip them to white."""
    if image.mode.startswith("I;16"):
        return grey(np.asarray(image) / 257)
    if image.mode in ("I", "F"):                       # of no known range: darkest to black, brightest to white
        values = np.asarray(image, np.float64)
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("no pixel is a finite number")
        low, high = finite.min(), finite.max()
        return grey(np.nan_to_num((values - low) * (255 / ((high - low) or 1)), nan=0, posinf=255, neginf=0))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


class Pictures(torch.utils.data.Dataset):
    """Item i is (picture i, []), by relative path; the same on every machine.

    Where file i is of no use, the next one that is stands in (after the last comes the first), and the list holds
    "relative/path: cause" of each file stepped over. `accept` may refuse a picture by a sentence that says why.
    Hidden files and folders are left out, and links to folders are not followed: they may form a loop.
    Raises ValueError if there is no such folder, or no picture in it, or, from an item, none that is of use.
    """

    def __init__(self, folder: str | Path, accept: Callable[[Image.Image], str | None] | None = None):
        self.folder, self.accept = Path(folder), accept
        if not self.folder.is_dir():
            raise ValueError(f"{folder} {'is not a folder' if self.folder.exists() else 'does not exist'}")
        self.files = find(self.folder)
        if not self.files:
            raise ValueError(f"{folder} holds no picture, that is no file that ends in {' '.join(ENDINGS)}; "
                             "hidden files and links to folders do not count")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        n, lost = len(self), []
        first = range(n)[i]
        for k in range(n):
            name = self.files[(first + k) % n]
            path = self.folder / name
            try:
                image = open_picture(path)
            except ValueError as error:
                cause = str(error).removeprefix(f"{path}: ")
            else:
                cause = self.accept(image) if self.accept else None
                if not cause:
                    return image, lost
            lost.append(f"{name}: {cause}")
        raise ValueError(f"{self.folder}: none of {n} pictures can be used; {lost[0]}")


def find(folder: Path) -> list[str]:
    """Paths of the picture files below `folder`, relative to it, sorted. Raises OSError for a closed folder."""
    def fail(error):                                   # os.walk would leave the folder out without a word
        raise error

    found = []
    for top, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [(Path(top) / f).relative_to(folder).as_posix() for f in files
                  if f.lower().endswith(ENDINGS) and not f.startswith(".")]
    return sorted(found)


class Epochs(torch.utils.data.Dataset):
    """Items start to stop-1 of epochs without end over `data`, each in an order of its own.

    Item g is a function of (seed, g) alone, so a run resumed at `start` sees what an unbroken one would have seen.
    Raises ValueError for data of no items, a range that is none, or a negative seed.
    """

    def __init__(self, data, start: int, stop: int, seed: int = 0):
        if len(data) == 0 or not 0 <= start <= stop or seed < 0:
            raise ValueError(f"{len(data)} items, start={start}, stop={stop}, seed={seed}: expected at least 1 item, "
                             "0 <= start <= stop and seed >= 0")
        self.data, self.range, self.seed = data, range(start, stop), seed
        self.epoch, self.order = -1, None              # drawn last; each worker has its own

    def __len__(self):
        return len(self.range)

    def __getitem__(self, i):
        epoch, place = divmod(self.range[i], len(self.data))
        if epoch != self.epoch:
            # mixed, since seed + epoch would give one seed's second epoch to the next seed as its first
            mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]
            self.order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(int(mixed)))
            self.epoch = epoch
        return self.data[int(self.order[place])]


class FeatureCache:
    """Features of numbered pictures on disk, made once, in order; a killed run goes on where it stopped.

    folder/key.json: what they are of | index.jsonl: a line a picture | features.bin: the units, picture by picture
    ends[i]: bytes in front of picture i in features.bin
    Raises ValueError if the folder holds the features of something else.
    """

    def __init__(self, folder: str | Path, key: dict, dtype: torch.dtype):
        self.folder, self.dtype = Path(folder), dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bin, self.index = self.folder / "features.bin", self.folder / "index.jsonl"
        there = json.loads((self.folder / "key.json").read_text()) if (self.folder / "key.json").exists() else key
        differ = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in key.items() if there.get(k) != v]
        if differ:
            raise ValueError(f"{folder} holds features of something else ({'; '.join(differ)}): name another folder")
        (self.folder / "key.json").write_text(json.dumps(key, indent=1))
        lines = self.index.read_text().splitlines(keepends=True) if self.index.exists() else []
        lines = [line for line in lines if line.endswith("\n")]                # a kill leaves half a line
        self.pictures = [json.loads(line) for line in lines]
        sizes = [math.prod(p["grid"]) * math.prod(p["unit"]) * dtype.itemsize for p in self.pictures]
        self.ends = np.cumsum([0, *sizes]).tolist()
        for path, size in ((self.bin, self.ends[-1]), (self.index, sum(len(line.encode()) for line in lines))):
            with open(path, "ab") as file:
                file.truncate(size)

    def __len__(self):
        return len(self.pictures)

    def fill(self, n: int, batches, encode) -> None:
        """Append the features of pictures len(self) .. n-1, as encode(batch) -> Units gives them for the batches.

        Prints beforehand what they will take on disk; raises OSError if that is not free.
        """
        missing = n - len(self)
        with open(self.bin, "ab") as features, open(self.index, "a") as index:
            for number, batch in enumerate(tqdm(batches, "features", disable=not missing)):
                units = encode(batch)
                if not number:
                    need = units.feats.numel() * units.feats.element_size() / len(units.grid) * missing
                    free = shutil.disk_usage(self.folder).free
                    tqdm.write(f"features of {missing} pictures take about {need / 2**30:.2f} GiB in {self.folder}; "
                               f"{free / 2**30:.1f} GiB are free")
                    if need > free:
                        raise OSError(f"{need / 2**30:.2f} GiB do not fit into {self.folder}: name another folder, or "
                                      "leave the cache out")
                shown = [None] * len(units.grid) if units.shown is None else units.shown.cpu().split(units.counts)
                views = units.views or [None] * len(units.grid)
                for b, feats in enumerate(units.feats.cpu().split(units.counts)):
                    features.write(raw := feats.contiguous().view(torch.uint8).numpy().tobytes())
                    self.ends.append(self.ends[-1] + len(raw))
                    features.flush()                   # never a line in the index without its features
                    hidden = None if shown[b] is None else (~shown[b]).nonzero().flatten().tolist()
                    self.pictures.append({"grid": units.grid[b], "unit": list(feats.shape[1:]), "views": views[b],
                                          "hidden": hidden})
                    index.write(json.dumps(self.pictures[-1]) + "\n")

    def units(self, numbers) -> Units:
        """The Units of some pictures, in this order; nothing else was seen."""
        whole, feats, shown = np.memmap(self.bin, np.uint8, "r"), [], []
        chosen = [self.pictures[i] for i in numbers]
        for i, picture in zip(numbers, chosen):
            part = torch.from_numpy(whole[self.ends[i]:self.ends[i + 1]].copy()).view(self.dtype)
            feats.append(part.view(-1, *picture["unit"]))
            shown.append(torch.ones(len(feats[-1]), dtype=torch.bool))
            shown[-1][picture["hidden"] or []] = False
        image_of = torch.arange(len(feats)).repeat_interleave(torch.tensor([len(part) for part in feats]))
        return Units(torch.cat(feats), image_of, [tuple(picture["grid"]) for picture in chosen],
                     views=None if chosen[0]["views"] is None else [picture["views"] for picture in chosen],
                     shown=None if chosen[0]["hidden"] is None else torch.cat(shown))
