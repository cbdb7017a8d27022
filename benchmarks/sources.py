"""Training data by name: captions, dialogues, pictures; from local files, or streamed from the Hugging Face hub."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow as pa
from datasets import Dataset, config, load_dataset_builder
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image

from benchmarks.folder import find
from benchmarks.rows import BLOCK, MARK, Reader, Rows, Shards, Source, Stream

SOURCES = {
    "imagenet-captions": Source((("visual-layer/imagenet-1k-vl-enriched", None),), "captions", "caption_enriched"),
    "llava-665k": Source((("liuhaotian/LLaVA-Instruct-150K", "llava_v1_5_mix665k.json"),), "dialogues",
                         "conversations"),
    "coco": Source((("detection-datasets/coco", None),), "images"),            # the pictures that show a labelled thing
    "docvqa": Source((("lmms-lab-encoder/DocVQA", "DocVQA/{split}-*.parquet"),
                      ("lmms-lab/DocVQA", "DocVQA/{split}-*.parquet"), ("HuggingFaceM4/DocumentVQA", None)), "images",
                     same=("docId", "ucsf_document_id", "ucsf_document_page_no")),
    "chartqa": Source((("HuggingFaceM4/ChartQA", None),), "images", same=("image",)),
}


def open_source(name: str, path: str | Path | None = None, split: str | None = None,
                prompt: str = "Describe the image briefly.", images: str | Path | None = None,
                accept: Callable[[Image.Image], str | None] | None = None, stream: bool | None = None):
    """Rows (map-style) of local files, or Shards to be streamed: of the hub where no path is given.

    path: a parquet file, a folder of them, for dialogues a JSON file like LLaVA-665K's, for images a folder of pictures
    images: the folder that relative paths of pictures start from; that of the JSON file if not given. LLaVA-665K has
        its pictures elsewhere, so without `path` its JSON is downloaded whole, and `images` must be given.
    prompt: the question of every caption [ours]; the papers do not give theirs
    accept: may refuse a picture by a sentence that says why
    stream: local parquet files too; or `datasets` first writes all pictures to its cache once more, uncompressed
    Raises ValueError for an unknown name, split or column, FileNotFoundError for what is not there or cannot be
    reached, PermissionError for a repository whose terms have not been accepted.
    """
    if name not in SOURCES:
        raise ValueError(f"no data set is named {name!r}: expected one of {', '.join(SOURCES)}")
    source, local = SOURCES[name], path is not None
    split = split or source.split
    if source.kind == "captions" and not prompt.strip():
        raise ValueError(f"prompt={prompt!r}: expected the question that every caption answers")
    path, images = path and Path(path), images and Path(images)
    for folder in filter(None, (path, images)):
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist")
    if path is None and source.kind == "dialogues":
        if not images:
            raise ValueError(f"{name} has its pictures elsewhere: name the folder that its relative paths start from "
                             "(it holds coco, gqa, ocr_vqa, textvqa, vg) as images")
        path = Path(hub(name, lambda repo, file: hf_hub_download(repo, file, repo_type="dataset")))
    root = images or (path if path is None or path.is_dir() else path.parent)
    read = Reader(name, source, prompt, root, accept)
    if path and path.suffix == ".json" and source.kind == "dialogues":
        return Rows(read, *from_json(path), path.name)
    if local and path.is_dir() and not any(path.rglob("*.parquet")):
        if source.kind != "images" or not (files := find(path)):
            raise FileNotFoundError(f"{path} holds no parquet file" + " and no picture" * (source.kind == "images"))
        return Rows(read, Dataset(pa.table({source.image: files})), Counter(), str(path))
    if local:
        shards = Shards(read, local_files(path, split))
    else:
        shards = hub(name, lambda repo, pattern: Shards(read, hub_files(repo, pattern, split)))
    return shards if stream or (stream is None and not local) else shards.rows()


def describe(data) -> str:
    """One line on the Rows, Shards or Stream: name, rows of use as far as is known yet, files, rows left out."""
    data = data.source if isinstance(data, Stream) else data
    left = ", ".join(f"{n} {cause}" for cause, n in data.skipped.items())
    how = f"streamed in blocks of {BLOCK} rows or more" if isinstance(data, Shards) else "from local files"
    files = f"{len(data.files)} file{'s' * (len(data.files) != 1)}"
    return f"{data.read.name}: {len(data)} rows of {data.where}, {files}, {how}" + f"; left out: {left}" * bool(left)


# --------------------------------------------------------------------------------------------------- where it lies

def hub(name: str, ask, hubs=None):
    """What ask(id, file) says of the first of the hubs, SOURCES[name]'s if None, that there is. Raises as open_source
    does."""
    failed, copy = [], "or give the path of a local copy"
    for repo, file in hubs or SOURCES[name].hubs:
        try:
            return ask(repo, file)
        except Exception as error:                     # each library on the way has its own
            causes, cause = [], error
            while cause and cause not in causes:
                causes.append(cause)
                cause = cause.__cause__ or cause.__context__
            if any(isinstance(cause, GatedRepoError) for cause in causes):
                raise PermissionError(f"{repo} is gated: accept its terms at https://huggingface.co/datasets/{repo}, "
                                      f"log in by `hf auth login` or set HF_TOKEN, {copy}") from None
            if config.HF_HUB_OFFLINE or any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
                raise FileNotFoundError(f"{name} is not read from {repo}, for HF_HUB_OFFLINE (or HF_DATASETS_OFFLINE) "
                                        f"is set: unset it, {copy}") from None
            if any(isinstance(cause, (ConnectionError, LocalEntryNotFoundError, httpx.TransportError))
                   for cause in causes):
                raise FileNotFoundError(f"{name}: the hub cannot be reached for {repo} ({causes[-1]}): is there a "
                                        f"network? Try again, {copy}") from None
            failed.append(f"{repo}: {error}")
    raise FileNotFoundError(f"{name} is not to be had from the hub ({'; '.join(failed)}): name another split, log in "
                            f"by `hf auth login` if it is private, {copy}")


def hub_files(repo: str, pattern: str | None, split: str) -> list[str]:
    """hf:// addresses of a split, with the commit they were found at."""
    wanted = pattern and {split: pattern.format(split=split)}
    return of_split(load_dataset_builder(repo, data_files=wanted).config.data_files, split, repo)


def local_files(path: Path, split: str) -> list[str]:
    """Parquet files of a split; of a folder those that `datasets` takes for it by their names."""
    if path.is_file():
        return [str(path)]
    return of_split(load_dataset_builder("parquet", data_dir=str(path)).config.data_files, split, path)


def of_split(there, split, where) -> list[str]:
    there = {name: [file for file in map(str, files) if file.endswith(".parquet")]
             for name, files in (there or {}).items()}
    if not there.get(split):
        raise ValueError(f"{where} has no parquet files of the split {split!r}: "
                         f"it has {', '.join(k for k, files in there.items() if files) or 'none at all'}")
    return there[split]


def from_json(path: Path) -> tuple[Dataset, Counter]:
    """The rows of a JSON list that have a picture, as text, for worker processes to share; what was skipped.

    A row at a time: parsed at once, LLaVA-665K would take several times the room of its file.
    """
    tables, part, skipped, useful = [], [], Counter(), False
    try:
        for i, (row, text) in enumerate(each(path.read_bytes().decode())):
            useful = useful or isinstance(row, dict) and "conversations" in row
            if isinstance(row, dict) and not row.get("image") and MARK not in text:
                skipped["text only"] += 1
                continue
            part.append({"number": i, "json": text})
            if len(part) == 10_000:
                tables.append(pa.Table.from_pylist(part))
                part = []
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON list ({error}): download it anew") from None
    if not useful:
        raise ValueError(f"{path}: expected a list of rows with the keys image and conversations")
    schema = pa.schema({"number": pa.int64(), "json": pa.string()})
    table = pa.concat_tables([*tables, pa.Table.from_pylist(part, schema)])
    return Dataset(table, fingerprint="json"), skipped                         # else `datasets` hashes a copy of it


def each(text: str):
    """(row, its text) of a JSON list."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    if not (start := re.compile(r"\s*\[").match(text)):
        raise ValueError(f"it begins with {text[:20]!r}")
    begin = between.match(text, start.end()).end()
    while text[begin:begin + 1] != "]":
        row, end = decoder.raw_decode(text, begin)     # raises at the end of what was cut short
        yield row, text[begin:end]
        begin = between.match(text, end).end()
