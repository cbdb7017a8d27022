"""What a training step reads: pictures and dialogues of the tiny world, a folder or a data set by name, as batches."""

import multiprocessing
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.folder import Epochs, FeatureCache, Pictures
from benchmarks.rows import Shards, Stream
from benchmarks.scenes import SIZES, Dialogues
from benchmarks.sources import SOURCES, describe, open_source
from common import FrozenVLM, Units

DATA = ("scenes", "folder", *SOURCES)


@dataclass
class Batch:
    """Pictures, each encoded once, and the rows that ask about them: row r shows picture owner[r]."""
    pictures: dict
    rows: dict | None
    owner: list[int]
    lost: tuple = ()                                   # what was of no use, with the reason
    units: Units | None = None                         # where a cache has them


class Items(Dataset):
    """Item i is (i, picture, turns, what was of no use), made by `whole` of data[i]."""

    def __init__(self, data, whole):
        self.data, self.whole = data, whole

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return i, *self.whole(self.data[i])


def oblong(image) -> str | None:
    """Why no processor can use a picture: Qwen's refuses it, CLIP's would blow its short side up."""
    w, h = image.size
    return f"{w}x{h} pixels: expected a side of at most 200 times the other" if max(w, h) > 200 * min(w, h) else None


def open_data(cfg, vlm: FrozenVLM) -> Items:
    """What cfg.data names: one item after the other for the scenes of a run, else all that there is, to go through in
    epochs. cfg: train.TrainConfig. Raises ValueError or OSError where the data are not there or of no use."""
    if cfg.data == "folder":
        return Items(Pictures(cfg.images, oblong), lambda item: (item[0], [], item[1]))
    if cfg.data == "scenes":
        count, turns = (cfg.pictures, 1) if cfg.method == "recon" else (cfg.steps * cfg.batch, cfg.turns)
        # AutoSelect reads the caption too, the others' questions begin behind it
        scenes, first = Dialogues(0, count, cfg.seed, turns, SIZES[vlm.family][:3]), int(cfg.method != "autoselect")
        return Items(scenes, lambda item: (item[0], item[1][first:], []))
    rows = open_source(cfg.data, cfg.path, cfg.split, cfg.prompt, cfg.images, oblong)
    print(describe(rows))
    return Items(rows, lambda item: (item[0], item[1][:cfg.turns], item[2]))


def collate(vlm: FrozenVLM, cfg, cache: FeatureCache | None = None):
    """(number, picture, turns, lost) of some items -> Batch. StepPrune asks each question in a row of its own; a
    selection inside the language model (cfg.condition) asks in front of the image too."""
    def build(items) -> Batch:
        numbers, images, turns, lost = map(list, zip(*items))
        owner, rows = list(range(len(items))), None
        if cfg.method == "autoselect":
            pictures = rows = vlm.batch(images, turns, "cpu")
        elif cfg.method == "stepprune":
            owner = [b for b, dialogue in enumerate(turns) for _ in dialogue]
            rows = vlm.batch([images[b] for b in owner], [[turn] for dialogue in turns for turn in dialogue], "cpu")
            pictures = vlm.pictures(images, "cpu")
            rows.pop("pixel_values")                   # the pictures have them
        elif cfg.condition:
            pictures = rows = vlm.batch(images, [[(dialogue[0][0], None)] for dialogue in turns], "cpu", twice=True)
        else:
            pictures = vlm.pictures(images, "cpu")
        return Batch(pictures, rows, owner, tuple(name for each in lost for name in each),
                     cache.units(numbers) if cache else None)
    return build


def cached(cfg, vlm: FrozenVLM, data: Items) -> FeatureCache:
    """The features of all pictures in the folder cfg.cache_features, made where they are missing. Raises ValueError for
    what is streamed: its pictures have no numbers."""
    if isinstance(data.data, Shards):
        raise ValueError(f"data={cfg.data!r} is streamed: expected --path of a local copy beside --cache_features")
    key = {"fingerprint": vlm.fingerprint(), "dtype": cfg.dtype, "pictures": len(data),
           "source": f"scenes of seed {cfg.seed}" if cfg.data == "scenes" else cfg.images or cfg.path}
    cache = FeatureCache(cfg.cache_features, key, vlm.dtype)
    missing = torch.utils.data.Subset(data, range(len(cache), len(data)))
    cache.fill(len(data), loader(cfg, missing, collate(vlm, cfg), cfg.batch),
               lambda batch: vlm.encode(batch.pictures.to(vlm.device)))
    return cache


def share(cfg, first: int, rank: int, processes: int) -> list[int]:
    """The items of steps `first` and on that this process takes: of every step's a run of equal length."""
    mine = cfg.batch // processes
    return [i for step in range(first, cfg.steps)
            for i in range(step * cfg.batch + rank * mine, step * cfg.batch + (rank + 1) * mine)]


def batches(cfg, vlm: FrozenVLM, data, first: int, rank: int, processes: int, cache=None) -> DataLoader:
    """cfg.micro pictures at a time, from step `first` to the end; item i of the run follows from (seed, i) alone."""
    build = collate(vlm, cfg, cache)
    if isinstance(data.data, Shards):                  # which shuffle themselves
        data = Items(Stream(data.data, 0, cfg.steps * cfg.batch, cfg.seed), data.whole)
    elif cfg.method == "recon" or cfg.data != "scenes":
        data = Epochs(data, 0, cfg.steps * cfg.batch, cfg.seed)
    return loader(cfg, data, build, cfg.micro, share(cfg, first, rank, processes))


def loader(cfg, data, build, size: int, order=None) -> DataLoader:
    # a worker is forked: the VLM goes into it as it is. Of a stream, each would read every block
    workers = min(cfg.workers, 1) if isinstance(getattr(data, "data", None), Stream) else cfg.workers
    workers = workers if "fork" in multiprocessing.get_all_start_methods() else 0
    return DataLoader(data, size, sampler=order, num_workers=workers, collate_fn=build,
                      prefetch_factor=4 if workers else None, multiprocessing_context="fork" if workers else None)
