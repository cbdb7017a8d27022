"""Videos as folders of extracted frames: nothing here decodes a video."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.pictures import find, open_picture

FRAMES = 8                                             # [the compared papers' number for videos]


def uniform(frames, count: int) -> list:
    """`count` of the frames, evenly from the first to the last; some of them twice where there are
    fewer. Of one the middle. Raises ValueError for no frames or count < 1."""
    if not len(frames) or count < 1:
        raise ValueError(f"{count} of {len(frames)} frames: expected at least one of each")
    if count == 1:
        return [frames[len(frames) // 2]]
    return [frames[int(i)] for i in np.linspace(0, len(frames) - 1, count)]


def clips(names, videos: str | Path | None, path: str | Path | None) -> dict[str, Path]:
    """{video's name: the folder of its frames}, of all the names.

    videos: the folder that holds them; by default `frames` beside the questions at `path`.
    Raises FileNotFoundError, which says how to extract the frames, for a folder that is not there.
    """
    if videos is None and path is None:
        raise FileNotFoundError("the hub has the videos in parts of zip files, which are not read "
                                f"here: unpack them, extract frames, {how('DIR', 'NAME')}, and "
                                "name DIR as videos")
    if videos:
        root = Path(videos)
    else:
        path = Path(path)
        root = (path if path.is_dir() else path.parent) / "frames"
    folders = {name: root / name for name in dict.fromkeys(names)}
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(f"{root} has no folder of frames for {len(missing)} of "
                                f"{len(folders)} videos, such as {missing[0]}: extract them, "
                                f"{how(root, missing[0])}, or name another folder")
    return folders


def how(root, name: str) -> str:
    """The command that extracts a video's frames."""
    return (f"for each by `mkdir -p {root}/{name} && "
            f"ffmpeg -i {name}.mp4 -vf fps=1 {root}/{name}/%06d.jpg`")


def opened(folder: Path, count: int) -> Callable:
    """() -> `count` frames of the folder, evenly in time: by the numbers in their names, 2 before
    10.

    It raises ValueError where the folder holds no picture, or one that cannot be opened.
    """
    def by_number(name: str) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]

    def images():
        files = sorted(find(folder), key=by_number)
        if not files:
            raise ValueError(f"{folder} holds no frame: extract them, "
                             f"{how(folder.parent, folder.name)}")
        return [open_picture(folder / file) for file in uniform(files, count)]
    return images
