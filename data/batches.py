"""What a training step reads: pictures and dialogues, from whatever --data names, as batches."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import BatchFeature

from common import IGNORE, FrozenVLM, Units
from data.dialogues import Dialogues, training_sizes
from data.epochs import Epochs
from data.feature_cache import FeatureCache
from data.fit import Fit
from data.parquet import Shards, Stream
from data.pictures import Pictures, oblong
from data.sets import Chosen, chosen, one_or_all, shares, to_copy
from data.sources import SOURCES, describe, open_source


@dataclass
class Batch:
    """Pictures, each encoded once, and the rows that ask about them.

    pictures  what FrozenVLM.encode() takes
    rows      what embed(), question() and loss() take: row r shows picture owner[r]; None where
              no text is read
    skipped   "where: cause" of every sample that was unreadable, of no use, or cut
    units     the pictures' Units, where a FeatureCache has them
    """
    pictures: BatchFeature
    rows: BatchFeature | None
    owner: list[int]
    skipped: tuple[str, ...] = ()
    units: Units | None = None

    def to(self, device) -> "Batch":
        """The same on a device. Loader workers build batches on the CPU."""
        pictures = self.pictures.to(device)
        rows = None
        if self.rows is not None:
            rows = pictures if self.rows is self.pictures else self.rows.to(device)
        units = self.units
        if units is not None:
            has_token = None if units.has_token is None else units.has_token.to(device)
            readings = {name: x.to(device) for name, x in units.readings.items()}
            units = replace(units, feats=units.feats.to(device), has_token=has_token,
                            image_of=units.image_of.to(device), readings=readings)
        return replace(self, pictures=pictures, rows=rows, units=units)

    @property
    def size(self) -> int:
        """What its memory grows with: tokens, or pixels where no text is read."""
        return (self.pictures["pixel_values"] if self.rows is None
                else self.rows["input_ids"]).numel()

    @property
    def answers(self) -> int:
        """Answer tokens that the language model has to predict; 0 without rows."""
        if self.rows is None:
            return 0
        # nothing predicts a row's first token
        return int((self.rows["labels"][:, 1:] != IGNORE).sum())


def causes(skipped: Iterable[str]) -> Counter:
    """How many of some "where: cause" have which cause; what is special to one stands behind a
    second colon, and does not count."""
    return Counter(line.partition(": ")[2].partition(": ")[0] for line in skipped)


class Items(Dataset):
    """Item i is (i, picture, turns, skipped), which to_item() makes of data[i]."""

    def __init__(self, data, to_item: Callable):
        self.data = data
        self.to_item = to_item

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return i, *self.to_item(self.data[i])


def has_text(name: str) -> bool:
    """Whether a data set of DATA has questions and answers, or captions, beside its pictures."""
    return name != "folder" and not (name in SOURCES and SOURCES[name].kind == "images")


def open_data(config, vlm: FrozenVLM, rows: str) -> Items:
    """What config.data names, of several sets one behind another, and of each what is taken.

    Of the scenes alone without epochs, the items of a run one after the other; else all that is
    taken, to go through in epochs.
    config: train.TrainConfig
    rows: runs.Selector.rows
    Raises ValueError or OSError where the data are not there, of no use, too few, or without the
    text that the rows need.
    """
    parts = chosen(config)
    for part in parts:
        if rows != "picture" and not has_text(part.data):
            raise ValueError(f"data={part.data!r} has pictures and no text: expected data with "
                             "questions, or a method that reads pictures alone")
        if rows != "picture" and not config.questions and (rows, part.data) != ("dialogue",
                                                                                "scenes"):
            raise ValueError(f"questions=0 with data={part.data!r}: expected at least 1; of scenes "
                             "alone there are captions, for methods that read no question")
    if streamed := to_copy(parts):
        raise ValueError(f"data={config.data!r}: {', '.join(streamed)} would be streamed, and what "
                         "is mixed or taken in part must lie here: expected --path of local copies")
    in_epochs = config.epochs > 0 or len(parts) > 1
    sets = [open_set(config, part, vlm, rows, in_epochs) for part in parts]
    if len(sets) == 1 and not parts[0].take:
        return sets[0]
    return mixed(parts, sets, config.seed)


def mixed(parts: list[Chosen], sets: list[Items], seed: int) -> Items:
    """One set behind another, of each what is taken; item i has this number, not its own set's."""
    # three numbers: no epoch is shuffled by such a key
    drawn = [part.drawn(len(data), seed, place, 1)
             for place, (part, data) in enumerate(zip(parts, sets))]
    print(shares(parts, [*map(len, sets)], [*map(len, drawn)]))
    return Items(ConcatDataset(map(Subset, sets, drawn)), lambda item: item[1:])


def open_set(config, part: Chosen, vlm: FrozenVLM, rows: str, in_epochs: bool) -> Items:
    """All of one data set, as open_data() does."""
    if part.data == "folder":
        return Items(Pictures(part.images, oblong), lambda item: (item[0], [], item[1]))
    if part.data == "scenes":
        count = config.n_pictures if in_epochs else config.steps * config.batch
        questions = 1 if in_epochs else config.questions
        scenes = Dialogues(0, count, config.seed, questions, training_sizes(vlm.family))
        # the caption comes first: a text to learn from, but nobody's question
        first = 0 if rows == "dialogue" else 1
        return Items(scenes, lambda item: (item[0], item[1][first:], []))
    fit = Fit(vlm, rows, config.questions)
    data = open_source(part.data, part.path, part.split, config.prompt, part.images, oblong, fit)
    print(describe(data))
    return Items(data, lambda item: item)


# ------------------------------------------------------------------------------------ batches


def collate(vlm: FrozenVLM, rows: str, cache: FeatureCache | None = None) -> Callable:
    """A function: items -> Batch, on the CPU.

    "dialogue": a row per picture, with all its turns. "question": a row per question. "picture": no
    rows. "question twice": a row per picture with its first question, unanswered, which stands
    before the image too.
    """
    def build(items) -> Batch:
        numbers, images, turns, skipped = map(list, zip(*items))
        owner = list(range(len(items)))
        batch = None
        if rows == "dialogue":
            pictures = batch = vlm.batch(images, turns, "cpu")
        elif rows == "question":
            owner = [b for b, dialogue in enumerate(turns) for _ in dialogue]
            questions = [[turn] for dialogue in turns for turn in dialogue]
            batch = vlm.batch([images[b] for b in owner], questions, "cpu")
            pictures = vlm.pictures(images, "cpu")
            batch.pop("pixel_values")                 # one copy per picture, not per question
        elif rows == "question twice":
            questions = [[(dialogue[0][0], None)] for dialogue in turns]
            pictures = batch = vlm.batch(images, questions, "cpu", ask_twice=True)
        else:
            pictures = vlm.pictures(images, "cpu")
        names = tuple(name for each in skipped for name in each)
        return Batch(pictures, batch, owner, names, cache.units(numbers) if cache else None)
    return build


def batches(config, vlm: FrozenVLM, data: Items, rows: str, first_step: int, rank: int,
            processes: int, cache: FeatureCache | None = None) -> DataLoader:
    """The batches of a process from step `first_step` to the end, of config.micro pictures each.

    Item i of a run follows from (seed, i) alone: a resumed run sees what an unbroken one would
    have seen, and so do several processes together.
    """
    total = config.steps * config.batch
    if isinstance(data.data, Shards):
        # a stream shuffles itself, block by block
        data = Items(Stream(data.data, 0, total, config.seed, config.batch), data.to_item)
    elif config.data != "scenes" or config.epochs:
        data = Epochs(data, 0, total, config.seed)
    order = items_of(config, first_step, rank, processes)
    return loader(config, data, collate(vlm, rows, cache), config.micro, order)


def items_of(config, first_step: int, rank: int, processes: int) -> list[int]:
    """The items of the remaining steps that a process takes: of each step an equal share, in one
    piece."""
    share = config.batch // processes
    return [step * config.batch + rank * share + i
            for step in range(first_step, config.steps) for i in range(share)]


def loader(config, data: Dataset, build: Callable, size: int,
           order: list[int] | None = None) -> DataLoader:
    """build(items) of `size` items each, in order, made ahead in config.workers processes."""
    workers = config.workers
    if isinstance(data, Items) and isinstance(data.data, Stream):
        workers = min(workers, 1)                     # each would read every block
    # a worker is forked: the VLM goes into it as it is, which other ways to start one cannot do
    if "fork" not in multiprocessing.get_all_start_methods():
        workers = 0
    return DataLoader(data, size, sampler=order, num_workers=workers, collate_fn=build,
                      prefetch_factor=4 if workers else None,
                      multiprocessing_context="fork" if workers else None)


def cached(config, vlm: FrozenVLM, data: Items, rows: str, rank: int = 0,
           processes: int = 1) -> FeatureCache:
    """The features of all pictures, in the folder config.cache_features; missing ones are made.

    Called on every process, each of which makes its share; returns when all are there.
    rows: runs.Selector.rows
    Raises ValueError for what is streamed: its pictures have no numbers.
    """
    if isinstance(data.data, Shards):
        raise ValueError(f"data={config.data!r} is streamed: expected --path of a local copy "
                         "beside --cache_features")
    parts = chosen(config)
    sources = [f"scenes of seed {config.seed}" if part.data == "scenes"
               else part.images or part.path for part in parts]
    counts = [len(part) for part in getattr(data.data, "datasets", [data])]
    # where a row's text does not fit, the next row's picture stands in
    reads_text = any(has_text(part.data) and part.data != "scenes" for part in parts)
    text = [rows, config.questions, config.prompt] if reads_text and rows != "picture" else None
    key = {"model": config.model, "fingerprint": vlm.fingerprint(), "protocol": vlm.protocol,
           "dtype": config.dtype, "pictures": one_or_all(counts), "data": config.data,
           "split": config.split, "source": one_or_all(sources), "text": text,
           "take": config.take and [config.take, config.seed]}
    cache = FeatureCache(config.cache_features, key, vlm.dtype)
    missing = Subset(data, cache.missing(len(data), rank, processes))
    cache.fill(len(data), loader(config, missing, collate(vlm, "picture"), config.batch),
               lambda batch: vlm.encode(batch.to(vlm.device).pictures), rank, processes)
    return cache
