"""What all benchmarks share: the form of a question, and tables of them from the hub or from local files."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, load_dataset
from datasets import Image as Picture
from PIL import Image

from benchmarks.folder import open_picture
from benchmarks.sources import hub

KINDS = (".parquet", ".json", ".jsonl")
PICTURES = re.compile(r"images?(_\d+)?")               # the columns whose cells may be the path of a picture


@dataclass
class Question:
    """One question of a benchmark, ready to be asked.

    id      unique in its benchmark, str
    images  () -> list of PIL.Image, decoded when called (never before)
    prompt  the user's text, letter by letter, without image marks and without the chat template
    gold    JSON-able: all that score() needs besides the answer (answers, category, split, options, pair id, ...)
    limit   most new tokens
    """
    id: str
    images: Callable[[], list[Image.Image]]
    prompt: str
    gold: object
    limit: int


def table(hubs, path: str | Path | None, config: str | None, split: str, columns) -> Dataset:
    """The rows of a split with these columns; pictures undecoded: cells are {"bytes", "path"}, see picture().

    hubs: dataset ids of the Hugging Face hub in the order to try, where no path is given.
    path: a parquet, JSON (a list of rows) or JSONL file, or a folder of them, laid out as on the hub: an optional
        folder named like the config, in it anywhere <split>.jsonl, <split>-00000-of-00003.parquet, ... A cell of the
        columns image, images, image_1, ... may be the path of a picture, relative to the file's folder.
    Raises FileNotFoundError where there is nothing or no network, PermissionError for a repository whose terms have
    not been accepted, ValueError for a split or a column that is not there, or a file that cannot be read.
    """
    if path is None:
        where = ", ".join(hubs)
        data = hub(hubs[0], lambda repo, _: load_dataset(repo, config, split=split), [(repo, None) for repo in hubs])
    else:
        files = local_files(Path(path), config, split)
        data, where = read(files), files[0].parent
    if missing := [column for column in columns if column not in data.column_names]:
        raise ValueError(f"{where} {config or ''} {split}: no column {', '.join(map(repr, missing))} among "
                         f"{', '.join(data.column_names)}; expected the columns of {hubs[0]}")
    return undecoded(data.select_columns(list(columns)), where)


def local_files(path: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split: the path itself, or those of a folder by their names. Raises as table() does."""
    if path.is_file() and path.suffix in KINDS:
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} " + (f"is none of {' '.join(KINDS)}" if path.exists() else "does not exist"))
    root = path / config if config and (path / config).is_dir() else path
    there = {}
    for file in sorted(root.rglob("*")):
        if file.suffix in KINDS and not any(part.startswith(".") for part in file.relative_to(root).parts):
            there.setdefault(re.sub(r"-\d{5}-of-\d{5}.*$", "", file.stem), []).append(file)
    if not there:
        raise FileNotFoundError(f"{root} holds no file that ends in {' '.join(KINDS)}")
    if split not in there:
        raise ValueError(f"{root} has no file of the split {split!r}, such as {split}.jsonl or "
                         f"{split}-00000-of-00001.parquet: it has {', '.join(sorted(there))}")
    if len({(file.parent, file.suffix) for file in there[split]}) > 1:
        raise ValueError(f"{root} has the split {split!r} several times: {', '.join(map(str, there[split]))}; name one "
                         "file or folder")
    return there[split]


def read(files: list[Path]) -> Dataset:
    """The rows of parquet files, or of JSON files. Raises ValueError naming what cannot be read."""
    try:
        if files[0].suffix == ".parquet":
            return load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        rows = []
        for file in files:
            text = file.read_text(encoding="utf-8")
            rows += json.loads(text) if file.suffix == ".json" else [
                json.loads(line) for line in text.split("\n") if line.strip()]
        names = dict.fromkeys(name for row in rows for name in row)            # a key may be missing in the first row
        return Dataset(pa.table({name: [row.get(name) for row in rows] for name in names}))
    except Exception as error:                         # each library on the way has its own
        raise ValueError(f"{', '.join(map(str, files))}: cannot be read ({error}): expected rows of the same columns, "
                         "as parquet, a JSON list or JSON lines") from error


def undecoded(data: Dataset, root) -> Dataset:
    """The same rows with every picture as {"bytes", "path"}, whatever it was: nothing is decoded before it is asked."""
    features = Features({name: Picture(decode=False) if isinstance(feature, Picture) else
                         List(Picture(decode=False)) if isinstance(getattr(feature, "feature", None), Picture) else
                         feature for name, feature in data.features.items()})
    # not data.cast(), which writes all of them once more
    data = Dataset(data.data, DatasetInfo(features=features))

    def whole(cell):
        if isinstance(cell, list):
            return [whole(x) for x in cell]
        return cell and {"bytes": None, "path": str(root / cell)}
    for name in filter(PICTURES.fullmatch, data.column_names):
        if getattr(getattr(features[name], "feature", features[name]), "dtype", None) in ("string", "large_string"):
            cells = [whole(cell) for cell in data[name]]
            data = data.remove_columns(name).add_column(name, cells)
    return data


def picture(cell: dict) -> Image.Image:
    """The picture of a cell, RGB. Raises ValueError where it is none, see open_picture()."""
    return open_picture(cell["path"] or "picture without a name", cell["bytes"])


def sample(questions, n: int | None, seed: int = 0, group=lambda row: row["id"]) -> list[Question]:
    """n of the questions, or a few more, drawn at random, in their order; all where there are no more, or n is None.
    Those of which group({"id", "gold"}) says the same are drawn together, for they are scored as one.

    Raises ValueError for an id that two of them have.
    """
    counts = {}
    for question in questions:
        counts[question.id] = counts.get(question.id, 0) + 1
    if twice := [i for i, count in counts.items() if count > 1]:
        raise ValueError(f"the ids {', '.join(twice[:3])} stand {counts[twice[0]]} times among {len(counts)}: expected "
                         "one question each")
    if n is None or n >= len(questions):
        return list(questions)
    groups, chosen = {}, []
    for i, question in enumerate(questions):
        groups.setdefault(group({"id": question.id, "gold": question.gold}), []).append(i)
    groups = list(groups.values())
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) >= n:
            break
        chosen += groups[number]
    return [questions[i] for i in sorted(chosen)]
