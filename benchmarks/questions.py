"""What all benchmarks share: the form of a question, and tables of them from the hub or from files.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, load_dataset
from datasets import Image as Picture
from datasets import config as offline
from PIL import Image
from torch import Tensor

from benchmarks import stored
from benchmarks.scores import group
from data.pictures import open_picture
from data.sources import download, hub, snapshots, split_files, unfetched

HELD_OUT = 0.1                                         # of a benchmark, to steer methods by [ours]
KINDS = (".parquet", ".json", ".jsonl")
PICTURES = re.compile(r"images?(_\d+)?")               # columns whose cells may be a picture's path
SHARE = .25                            # of a split's row groups: fewer are read alone [ours]
FEW = ContextVar("few", default=None)


@dataclass
class Question:
    """One question of a benchmark, ready to be asked.

    id        unique in its benchmark, str
    images    () -> list of PIL.Image, decoded when called (never before)
    prompt    the user's text, letter by letter, without image marks and without the chat template
    gold      JSON-able: all that score() needs besides the answer (answers, category, pair id, ...)
    limit     most new tokens
    evidence  (rows, columns) of units -> (rows * columns,) the share of each that shows the answer;
              None where the benchmark does not say
    """
    id: str
    images: Callable[[], list[Image.Image]]
    prompt: str
    gold: object
    limit: int
    evidence: Callable[[tuple[int, int]], Tensor] | None = None


def table(hubs, path: str | Path | None, config: str | None, split: str, columns) -> Dataset:
    """The rows of a split with these columns. Pictures are not decoded: their cells are
    {"bytes", "path"}, see picture().

    hubs: dataset ids of the Hugging Face hub in the order to try, where no path is given.
    path: a parquet, JSON (a list of rows) or JSONL file, or a folder of them, laid out as on the
        hub: an optional folder named like the config, in it anywhere <split>.jsonl,
        <split>-00000-of-00003.parquet, ... A cell of the columns image, images, image_1, ... may be
        the path of a picture, relative to the file's folder.
    Raises FileNotFoundError where there is nothing or no network, PermissionError for a repository
    whose terms have not been accepted, ValueError for a split or a column that is not there, or a
    file that cannot be read.
    """
    if not isinstance(split, str):
        raise ValueError(f"split={split!r}: expected its name, such as test")
    if path is None:
        found = hub(hubs[0], lambda repo, _: from_hub(repo, config, split),
                    [(repo, None) for repo in hubs])
    else:
        found = local_files(Path(path), config, split)
    if isinstance(found, Dataset):
        check(columns, found.column_names, f"{config or ''} {split}", hubs[0])
        return undecoded(found.select_columns(list(columns)), Path())
    return undecoded(read(found, columns, hubs[0]), Path(found[0]).parent)


@contextmanager
def few(n: int | None):
    """Within it, table() is asked for splits of which n rows are shown, None or 0 for all. Where
    these are much fewer than a split of the hub has row groups, their pictures are read over the
    network when they are shown, and the files are not fetched."""
    token = FEW.set(n or None)
    try:
        yield
    finally:
        FEW.reset(token)


def from_hub(repo: str, config: str | None, split: str) -> list | Dataset:
    """The parquet files of a split: fetched into the hub's cache, or hf:// addresses, see few().

    Other splits are not fetched; of a repository without parquet files `datasets` fetches all and
    writes them once more. Offline: what was fetched before, by whatever commit.
    """
    if offline.HF_HUB_OFFLINE:
        for folder in snapshots(repo):
            if not config or (folder / config).is_dir():   # else another's would be taken for it
                try:
                    files = local_files(folder, config, split)
                except (ValueError, FileNotFoundError):
                    continue
                if is_whole(files):
                    return files
    else:
        files = split_files(repo, config, split)
        what = " ".join(filter(None, (config, split)))
        if files and (n := FEW.get()) and (new := unfetched(files)):
            if n < SHARE * stored.row_groups(files):
                print(f"{what}: of {len(files)} files of {repo}, "
                      f"{sum(info.size for info in new) / 2**30:.2f} GiB, only the texts and the "
                      f"pictures of about {n} questions are read, anew in every run", flush=True)
                return files
        if files:
            return download(files, what)
    return load_dataset(repo, config, split=split)


def is_whole(files: list[Path]) -> bool:
    """Are all parts of a split there, as their names count them?"""
    of = re.search(r"-of-(\d{5})", files[0].name)
    return not of or len(files) == int(of[1])


def local_files(path: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split: the path itself, or those of a folder by their names. Raises as table()
    does."""
    if path.is_file() and path.suffix in KINDS:
        return [path]
    if not path.is_dir():
        cause = f"is none of {' '.join(KINDS)}" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {cause}")
    root = path / config if config and (path / config).is_dir() else path
    splits = {}
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.suffix in KINDS and not hidden:
            name = re.sub(r"-\d{5}-of-\d{5}.*$", "", file.stem)
            splits.setdefault(name, []).append(file)
    if not splits:
        raise FileNotFoundError(f"{root} holds no file that ends in {' '.join(KINDS)}")
    if split not in splits:
        raise ValueError(f"{root} has no file of the split {split!r}, such as {split}.jsonl or "
                         f"{split}-00000-of-00001.parquet: it has {', '.join(sorted(splits))}")
    if len({(file.parent, file.suffix) for file in splits[split]}) > 1:
        files = ", ".join(map(str, splits[split]))
        raise ValueError(f"{root} has the split {split!r} several times: {files}; name one file or "
                         "folder")
    return splits[split]


def read(files: list, columns, like: str) -> Dataset:
    """These columns of parquet files, whose pictures stay there, see stored.py, or of JSON files.
    Raises ValueError naming what cannot be read, or a column that is not there, as in `like`."""
    if str(files[0]).endswith(".parquet"):
        for file in map(str, files):
            check(columns, stored.column_names(file), file, like)
        return stored.rows([*map(str, files)], columns)
    try:
        rows = [row for file in files for row in json_rows(file)]
        # a key may be missing in the first row
        names = dict.fromkeys(name for row in rows for name in row)
        data = Dataset(pa.table({name: [row.get(name) for row in rows] for name in names}))
    except Exception as error:                         # rows of any form raise any type
        raise ValueError(f"{', '.join(map(str, files))}: cannot be read ({error}): expected rows "
                         "of the same columns, as a JSON list or JSON lines") from error
    check(columns, data.column_names, files[0], like)
    return data.select_columns(list(columns))


def check(columns, names: list[str], where, like: str) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(map(repr, missing))} among "
                         f"{', '.join(names)}; expected the columns of {like}")


def json_rows(file: Path) -> list[dict]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def undecoded(data: Dataset, root) -> Dataset:
    """The same rows with every picture as {"bytes", "path"}, whatever it was: nothing is decoded
    before it is asked."""
    features = Features({name: undecoded_feature(feature)
                         for name, feature in data.features.items()})
    # not data.cast(), which writes all of them once more
    data = Dataset(data.data, DatasetInfo(features=features))

    def whole(cell):
        if isinstance(cell, list):
            return [whole(x) for x in cell]
        return cell and {"bytes": None, "path": str(root / cell)}
    for name in filter(PICTURES.fullmatch, data.column_names):
        inner = getattr(features[name], "feature", features[name])
        if getattr(inner, "dtype", None) in ("string", "large_string"):
            cells = [whole(cell) for cell in data[name]]
            data = data.remove_columns(name).add_column(name, cells)
    return data


def undecoded_feature(feature):
    if isinstance(feature, Picture):
        return Picture(decode=False)
    if isinstance(getattr(feature, "feature", None), Picture):
        return List(Picture(decode=False))
    return feature


def picture(cell: dict) -> Image.Image:
    """The picture of a cell, RGB. Raises ValueError where it is none, see open_picture(), or its
    file cannot be read, see stored.py."""
    name = cell["path"] or "picture without a name"
    if name.startswith(stored.PLACE):
        cell = stored.stored(name)
        name = cell["path"] or name
    return open_picture(name, cell["bytes"])


def most_tokens(n: int, family: str) -> int:
    """n new tokens; Qwen answers in sentences more often and gets 32 at least [ours]."""
    return max(n, 32) if family.startswith("qwen") else n


def numbered(ids) -> list[str]:
    """The ids, made unique: what comes a second time in the official rows becomes "id (2)"."""
    ids = [str(i) for i in ids]
    known = set(ids)
    seen = Counter()
    unique = []
    for name in ids:
        seen[name] += 1
        new = name
        while seen[name] > 1 and (new := f"{name} ({seen[name]})") in known:
            seen[name] += 1
        known.add(new)
        unique.append(new)
    return unique


def draw_questions(module, path: Path | None, family: str, options: dict, n: int,
                   calibration: int, seed: int) -> tuple[list[Question], list[Question], str]:
    """Of a benchmark n questions, 0 for all; at most `calibration` others that steer adaptive
    methods to K, and are not scored; what these are.

    They come from what is not drawn, or a tenth is left out. The tiny world, which makes as many as
    are wanted, has a split for them. family, options: of its load().
    """
    if "n" in inspect.signature(module.load).parameters:
        asked = module.load(None, family=family, **{"n": n or 1000, **options})
        steering = module.load(None, family=family, n=calibration, split="calibration")
        return list(asked), list(steering), "its split for calibration"
    with few(n and n + calibration):                   # of a large split the rest stays on the hub
        whole = list(module.load(path, family=family, **options))
    held_out = min(calibration, max(1, int(HELD_OUT * len(whole))))
    asked = sample(whole, min(n or len(whole), len(whole) - held_out), seed, group)
    chosen = {question.id for question in asked}
    rest = [question for question in whole if question.id not in chosen]
    steering = sample(rest, calibration, seed, group)
    return asked, steering, f"{len(steering)} of its questions, which are not scored"


def sample(questions, n: int | None, seed: int = 0, group=lambda row: row["id"]
           ) -> list[Question]:
    """n of the questions, or a few more, drawn at random, in their order; all where there are no
    more, or n is None. Those of which group({"id", "gold"}) says the same are drawn together, for
    they are scored as one.

    Raises ValueError for an id that two of them have.
    """
    counts = Counter(question.id for question in questions)
    repeated = [i for i, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"the ids {', '.join(repeated[:3])} stand {counts[repeated[0]]} times "
                         f"among {len(counts)}: expected one question each")
    if n is None or n >= len(questions):
        return list(questions)
    groups = {}
    for i, question in enumerate(questions):
        key = group({"id": question.id, "gold": question.gold})
        groups.setdefault(key, []).append(i)
    groups = list(groups.values())
    drawn = []
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if len(drawn) >= n:
            break
        drawn += groups[number]
    return [questions[i] for i in sorted(drawn)]
