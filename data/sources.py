"""Data sets by name: captions, dialogues, pictures; local files, or streamed from the hub."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, config, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, RepoFile, hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image

from data.parquet import BLOCK, MARK, Reader, Rows, Shards, Source, Stream, TransportError
from data.pictures import find

SOURCES = {
    "imagenet-captions": Source((("visual-layer/imagenet-1k-vl-enriched", None),),
                                "captions", "caption_enriched"),
    "llava-665k": Source((("liuhaotian/LLaVA-Instruct-150K", "llava_v1_5_mix665k.json"),),
                         "dialogues", "conversations"),
    # the pictures that show a labelled thing
    "coco": Source((("detection-datasets/coco", None),), "images"),
    "docvqa": Source((("lmms-lab-encoder/DocVQA", "DocVQA/{split}-*.parquet"),
                      ("lmms-lab/DocVQA", "DocVQA/{split}-*.parquet"),
                      ("HuggingFaceM4/DocumentVQA", None)),
                     "images", same=("docId", "ucsf_document_id", "ucsf_document_page_no")),
    "chartqa": Source((("HuggingFaceM4/ChartQA", None),), "images", same=("image",)),
}

# of a file on the hub: repository, commit, path
ADDRESS = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")


def open_source(name: str, path: str | Path | None = None, split: str | None = None,
                prompt: str = "Describe the image briefly.", images: str | Path | None = None,
                accept: Callable[[Image.Image], str | None] | None = None,
                fit: Callable[[Image.Image, list], tuple[list, str | None]] | None = None,
                stream: bool | None = None) -> Rows | Shards:
    """Rows (map-style) of local files, or Shards to be streamed: of the hub where no path is given.

    path: a parquet file, a folder of them, for dialogues a JSON file like LLaVA-665K's, for images
        a folder of pictures
    images: the folder that relative paths of pictures start from; that of the JSON file if not
        given. LLaVA-665K has its pictures elsewhere, so without `path` its JSON is downloaded
        whole, and `images` must be given.
    prompt: the question of every caption [ours]; the papers do not give theirs
    accept, fit: see Reader
    stream: local parquet files too; or `datasets` first writes all pictures to its cache once
        more, uncompressed
    Raises ValueError for an unknown name, split or column, FileNotFoundError for what is not there
    or cannot be reached, PermissionError for a repository whose terms have not been accepted.
    """
    if name not in SOURCES:
        raise ValueError(f"no data set is named {name!r}: expected one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    split = split or source.split
    if source.kind == "captions" and not prompt.strip():
        raise ValueError(f"prompt={prompt!r}: expected the question that every caption answers")
    path = Path(path) if path else None
    images = Path(images) if images else None
    for folder in (path, images):
        if folder and not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist")

    if path is None and source.kind == "dialogues":
        if not images:
            raise ValueError(f"{name} has its pictures elsewhere: name the folder that its "
                             "relative paths start from (it holds coco, gqa, ocr_vqa, textvqa, vg) "
                             "as images")
        path = Path(hub(name, lambda repo, file: hf_hub_download(repo, file, repo_type="dataset")))
    root = images
    if root is None and path is not None:
        root = path if path.is_dir() else path.parent
    reader = Reader(name, source, prompt, root, accept, fit)

    if path is None:
        shards = hub(name, lambda repo, pattern: Shards(reader, hub_files(repo, pattern, split)))
        return shards if stream is not False else shards.rows()
    if path.suffix == ".json" and source.kind == "dialogues":
        return Rows(reader, *from_json(path), path.name)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        files = find(path) if source.kind == "images" else []
        if not files:
            picture = " and no picture" if source.kind == "images" else ""
            raise FileNotFoundError(f"{path} holds no parquet file{picture}")
        return Rows(reader, Dataset(pa.table({source.image: files})), Counter(), str(path))
    shards = Shards(reader, local_files(path, split))
    return shards if stream else shards.rows()


def describe(data: Rows | Shards | Stream) -> str:
    """One line: name, rows of use as far as is known yet, files, rows that are skipped."""
    data = data.source if isinstance(data, Stream) else data
    if isinstance(data, Shards):
        how = f"streamed in blocks of {BLOCK} rows or more"
    else:
        how = "from local files"
    plural = "" if len(data.files) == 1 else "s"
    files = f"{len(data.files)} file{plural}"
    line = f"{data.reader.name}: {len(data)} rows of {data.where}, {files}, {how}"
    skipped = ", ".join(f"{n} {cause}" for cause, n in data.skipped.items())
    return f"{line}; skipped: {skipped}" if skipped else line


# ------------------------------------------------------------------------------------ where it lies


def hub(name: str, ask: Callable, hubs: tuple[tuple[str, str | None], ...] | None = None):
    """ask(id, file) of the first of the hubs, by default SOURCES[name]'s, that there is.

    Raises as open_source does.
    """
    failed = {}
    copy = "or give the path of a local copy"
    for repo, file in hubs or SOURCES[name].hubs:
        try:
            return ask(repo, file)
        except Exception as error:    # each library on the way has its own
            failed[repo] = error
            causes = causes_of(error)
            if config.HF_HUB_OFFLINE or has(causes, OfflineModeIsEnabled):
                continue              # the next may have been fetched before
            if has(causes, ConnectionError, LocalEntryNotFoundError, TransportError):
                raise FileNotFoundError(
                    f"{name}: the hub cannot be reached for {repo} ({causes[-1]}): is there a "
                    "network? Try again, set HF_HUB_OFFLINE=1 for what was fetched before, "
                    f"{copy}") from None
            if has(causes, GatedRepoError) or is_gated(repo):
                raise PermissionError(
                    f"{repo} is gated: accept its terms at https://huggingface.co/datasets/{repo}, "
                    f"then log in by `hf auth login` or set HF_TOKEN, {copy}") from None
    if config.HF_HUB_OFFLINE or has(causes, OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"{name} was not fetched before, neither as {' nor as '.join(failed)}, and nothing is "
            "fetched, for HF_HUB_OFFLINE (or HF_DATASETS_OFFLINE) is set: unset it, or where there "
            f"is a network `hf download {repo} --repo-type dataset`, {copy}")
    reasons = "; ".join(f"{repo}: {error}" for repo, error in failed.items())
    raise FileNotFoundError(f"{name} is not to be had from the hub ({reasons}): name "
                            f"another split, log in by `hf auth login` if it is private, {copy}")


def is_gated(repo: str) -> bool:
    """Does the hub refuse its files until its terms are accepted? `datasets` hides that cause."""
    try:
        HfApi().auth_check(repo, repo_type="dataset")
    except Exception as error:        # what else is wrong with it is known already
        return has(causes_of(error), GatedRepoError)
    return False


def causes_of(error: BaseException) -> list[BaseException]:
    """The error and what led to it, the first of all last."""
    causes = []
    cause = error
    while cause and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def has(causes: list[BaseException], *kinds: type) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)


def hub_files(repo: str, pattern: str | None, split: str) -> list[str]:
    """hf:// addresses of a split, with the commit they were found at."""
    wanted = pattern and {split: pattern.format(split=split)}
    try:
        files = load_dataset_builder(repo, data_files=wanted).config.data_files
    except FileNotFoundError as error:
        if not pattern or isinstance(error, DatasetNotFoundError):
            raise
        name = re.compile(re.escape(pattern).replace(r"\{split\}", "(.+)").replace(r"\*", ".*"))
        there = HfApi().list_repo_files(repo, repo_type="dataset")
        files = {match[1]: [match[0]] for match in map(name.fullmatch, there) if match}
    return of_split(files, split, repo)


def split_files(repo: str, name: str | None, split: str) -> list[str] | None:
    """hf:// addresses of a split of the configuration `name`; None for a repository that has no
    parquet files. Raises ValueError naming the splits that there are."""
    files = load_dataset_builder(repo, name).config.data_files or {}
    if not any(str(file).endswith(".parquet") for part in files.values() for file in part):
        return None
    return of_split(files, split, repo)


def download(files: list[str], what: str) -> list[str]:
    """Local paths of hf:// addresses of one repository, in the hub's cache, where they stay.

    what: begins the line that says how much is fetched, before it is
    """
    repo, commit, _ = ADDRESS.fullmatch(files[0]).groups()
    if new := unfetched(files):
        there = next(path for path in kept(repo).parents if path.exists())
        print(f"{what}: {len(new)} of {len(files)} files of {repo}, "
              f"{sum(info.size for info in new) / 2**30:.2f} GiB, are fetched into {HF_HUB_CACHE}, "
              f"which has {shutil.disk_usage(there).free / 2**30:.0f} GiB free", flush=True)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda file: hf_hub_download(
            repo, ADDRESS.fullmatch(file)[3], repo_type="dataset", revision=commit), files))


def unfetched(files: list[str]) -> list[RepoFile]:
    """Those of the hf:// addresses of one repository that the hub's cache does not hold."""
    repo, commit, _ = ADDRESS.fullmatch(files[0]).groups()
    names = [ADDRESS.fullmatch(file)[3] for file in files]
    infos = HfApi().get_paths_info(repo, names, repo_type="dataset", revision=commit)
    blobs = kept(repo) / "blobs"      # one of the same content may be of an earlier commit
    return [info for info in infos
            if not (blobs / (info.lfs.sha256 if info.lfs else info.blob_id)).exists()]


def kept(repo: str) -> Path:
    """The folder of the hub's cache for what was fetched of a repository."""
    return Path(HF_HUB_CACHE, f"datasets--{repo.replace('/', '--')}")


def snapshots(repo: str) -> list[Path]:
    """Folders laid out as the repository is, of what was fetched of it; the latest commit first."""
    folders = sorted(kept(repo).glob("snapshots/*"), key=lambda path: -path.stat().st_mtime)
    main = kept(repo) / "refs/main"
    latest = main.read_text().strip() if main.exists() else None
    return sorted(folders, key=lambda path: path.name != latest)


def local_files(path: Path, split: str) -> list[str]:
    """Parquet files of a split; of a folder those that `datasets` takes for it by their names."""
    if path.is_file():
        return [str(path)]
    builder = load_dataset_builder("parquet", data_dir=str(path))
    return of_split(builder.config.data_files, split, path)


def of_split(data_files: dict | None, split: str, where: str | Path) -> list[str]:
    """The parquet files of one split. Raises ValueError naming the splits that have some."""
    by_split = {name: [file for file in map(str, files) if file.endswith(".parquet")]
                for name, files in (data_files or {}).items()}
    if not by_split.get(split):
        names = [name for name, files in by_split.items() if files]
        raise ValueError(f"{where} has no parquet files of the split {split!r}: it has "
                         f"{', '.join(names) or 'none at all'}")
    return by_split[split]


# ------------------------------------------------------------------------------------ from JSON


def from_json(path: Path) -> tuple[Dataset, Counter]:
    """The rows of a JSON list that have a picture, as text for worker processes to share; skipped.

    A row at a time: parsed at once, LLaVA-665K would take several times the room of its file.
    Raises ValueError where it is no JSON list of rows with conversations.
    """
    tables, part = [], []
    skipped = Counter()
    has_dialogue = False
    try:
        for number, (row, text) in enumerate(each(path.read_bytes().decode())):
            has_dialogue = has_dialogue or isinstance(row, dict) and "conversations" in row
            if isinstance(row, dict) and not row.get("image") and MARK not in text:
                skipped["text only"] += 1
                continue
            part.append({"number": number, "json": text})
            if len(part) == 10_000:
                tables.append(pa.Table.from_pylist(part))
                part = []
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON list ({error}): download it anew") from None
    if not has_dialogue:
        raise ValueError(f"{path}: expected a list of rows with the keys image and conversations")
    schema = pa.schema({"number": pa.int64(), "json": pa.string()})
    table = pa.concat_tables([*tables, pa.Table.from_pylist(part, schema)])
    # without a fingerprint `datasets` would hash a copy of it
    return Dataset(table, fingerprint="json"), skipped


def each(text: str) -> Iterator[tuple[object, str]]:
    """(row, its text) of a JSON list."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    start = re.compile(r"\s*\[").match(text)
    if not start:
        raise ValueError(f"it begins with {text[:20]!r}")
    begin = between.match(text, start.end()).end()
    while text[begin:begin + 1] != "]":
        row, end = decoder.raw_decode(text, begin)    # raises at the end of what was cut short
        yield row, text[begin:end]
        begin = between.match(text, end).end()
