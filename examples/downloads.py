"""What a training and an evaluation fetch from the hub, and how much of it, before they do."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

import benchmarks
from data.sets import chosen, to_copy
from data.sources import SOURCES


def downloads(trained, asked) -> list[tuple[str, tuple, str, list[str]]]:
    """[(what, hub ids in the order to try, kind of repository, patterns of files)]."""
    wanted = []
    if not Path(trained.model).is_dir():
        wanted.append(("weights", (trained.model,), "model", ["*.safetensors"]))
    for part in chosen(trained):
        if part.data not in SOURCES or part.path:
            continue
        source = SOURCES[part.data]
        ids, files = zip(*source.hubs)
        split = part.split or source.split
        patterns = [(file or "*{split}*.parquet").format(split=split) for file in files]
        wanted.append(("training", ids, "dataset", patterns))
    for name in [] if asked.data_root else asked.benchmarks:
        module = benchmarks.load_module(name)
        parts = [getattr(module, part, None) for part in ("CONFIG", "QUESTIONS", "PICTURES")]
        folders = [f"{part}/*" for part in parts if isinstance(part, str)] or ["*"]
        if hasattr(module, "HUBS"):
            split = getattr(module, "SPLIT", "*")
            patterns = [f"{folder}{split}-*.parquet" for folder in folders]
            wanted.append((name, module.HUBS, "dataset", patterns))
    return wanted


def repository(ids: tuple, kind: str) -> tuple[str, list]:
    """(id, files with sizes) of the first that there is; RepositoryNotFoundError if none is."""
    try:
        files = HfApi().repo_info(ids[0], repo_type=kind, files_metadata=True).siblings
        return ids[0], files
    except RepositoryNotFoundError:
        if not ids[1:]:
            raise
    return repository(ids[1:], kind)


def sizes(trained, asked) -> list[str]:
    """What is downloaded and how large it is, as the hub says before any of it is fetched."""
    lines, kept, wanted, parts = [], {}, downloads(trained, asked), chosen(trained)
    is_streamed = any(part.is_streamed for part in parts) and not to_copy(parts)
    for what, ids, kind, patterns in wanted:
        try:
            repo, files = repository(ids, kind)
        except RepositoryNotFoundError:
            lines.append(f"- download: {what}, size unknown, {' and '.join(ids)} not found")
            continue
        except Exception as error:                     # each library on the way has its own
            return [f"- download: {', '.join(f'{what} ({ids[-1]})' for what, ids, *_ in wanted)}; "
                    f"the hub cannot be reached: sizes unknown ({error})"]
        found = {f"{repo}/{file.rfilename}": file.size or 0 for file in files
                 if any(fnmatch(file.rfilename, pattern) for pattern in patterns)}
        streamed = what == "training" and is_streamed
        lines.append(f"- download: {what}, {sum(found.values()) / 1e9:.2f} GB, {repo}"
                     + ", streamed: not kept, and anew in every pass" * streamed)
        kept |= {} if streamed else found              # of one file that two ask for, once
    for name in asked.benchmarks if asked.data_root else []:
        kept |= {path: path.stat().st_size for path in Path(asked.data_root, name).rglob("*.*")}
    free = shutil.disk_usage(Path.home()).free
    return [*lines, f"- disk: {sum(kept.values()) / 1e9:.2f} GB in the caches; free in "
            f"your home: {free / 1e9:.0f} GB"]
