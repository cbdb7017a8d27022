"""Videos as folders of extracted frames, or as files, which PyAV decodes where it is installed."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from data.pictures import find, open_picture

FRAMES = 8                                             # [the compared papers' number for videos]
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def uniform(frames, count: int) -> list:
    """`count` of the frames, evenly from the first to the last; some of them twice where there are
    fewer. Of one the middle. Raises ValueError for no frames or count < 1."""
    if not len(frames) or count < 1:
        raise ValueError(f"{count} of {len(frames)} frames: expected at least one of each")
    if count == 1:
        return [frames[len(frames) // 2]]
    return [frames[int(i)] for i in np.linspace(0, len(frames) - 1, count)]


def clips(names, videos: str | Path | None, path: str | Path | None) -> dict[str, Path]:
    """{video's name: the folder of its frames, or its file, anywhere below}, of all the names.

    videos: the folder that holds them; by default `frames` beside the questions at `path`.
    Raises FileNotFoundError, which says how to extract frames, for a video that is not there, and
    ImportError for files without PyAV.
    """
    if videos is None and path is None:
        raise FileNotFoundError("the hub has the videos in parts of zip files, which are not read "
                                "here: unpack them into DIR, install PyAV by `pip install av` or "
                                f"extract frames, {how('DIR', 'NAME')}, and name DIR as videos")
    if videos:
        root = Path(videos)
    else:
        path = Path(path)
        root = (path if path.is_dir() else path.parent) / "frames"
    found = {name: root / name for name in dict.fromkeys(names)}
    others = [name for name, folder in found.items() if not folder.is_dir()]
    # unpacked, they often lie in folders of folders
    files = {file.stem: file for file in sorted(root.rglob("*"))
             if file.suffix.lower() in VIDEOS} if others else {}
    missing = [name for name in others if name not in files]
    if missing:
        raise FileNotFoundError(f"{root} has no folder of frames and no {VIDEOS[0]} for "
                                f"{len(missing)} of {len(found)} videos, such as {missing[0]}: "
                                f"extract them, {how(root, missing[0])}, or name another folder")
    if others and find_spec("av") is None:
        raise ImportError(f"{files[others[0]]} is a video, which PyAV decodes: pip install av; or "
                          f"extract frames, {how(root, others[0])}")
    return found | {name: files[name] for name in others}


def how(root, name: str) -> str:
    """The command that extracts a video's frames."""
    return (f"for each by `mkdir -p {root}/{name} && "
            f"ffmpeg -i {name}.mp4 -vf fps=1 {root}/{name}/%06d.jpg`")


def opened(place: Path, count: int) -> Callable:
    """() -> `count` frames, evenly in time, RGB: of a folder, by the numbers in their names, 2
    before 10; or of a video's file.

    It raises ValueError where there is no picture, or one that cannot be opened.
    """
    def by_number(name: str) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]

    def images():
        if not place.is_dir():
            return decoded(place, count)
        files = sorted(find(place), key=by_number)
        if not files:
            raise ValueError(f"{place} holds no frame: extract them, "
                             f"{how(place.parent, place.name)}")
        return [open_picture(place / file) for file in uniform(files, count)]
    return images


def decoded(file: Path, count: int) -> list[Image.Image]:
    """`count` of all frames of a video, evenly from the first to the last.

    Their times are read without decoding; then each is decoded from the key frame before it, so
    that an hour takes no longer than a minute. Raises ValueError for what is no video.
    """
    import av  # optional: clips() has said so

    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            packets = [(packet.pts, packet.dts, packet.is_keyframe)
                       for packet in container.demux(stream) if packet.pts is not None]
            keys = sorted((pts, pts if dts is None else dts) for pts, dts, is_key in packets
                          if is_key)
            return [frame_at(container, stream, keys, time)
                    for time in uniform(sorted(pts for pts, *_ in packets), count)]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{file}: cannot be decoded ({type(error).__name__}: {error}): expected a "
                         "video; fetch it anew, or extract frames by other means") from error


def frame_at(container, stream, keys: list[tuple[int, int]], time: int) -> Image.Image:
    """The frame that begins at a time, in the stream's units, or the next that can be decoded; at
    the end the last. keys: (time, that to seek it by) of the key frames, in order."""
    before = [start for pts, start in keys if pts <= time] or [0]
    last = None
    for start in reversed(before):
        container.seek(start, stream=stream)
        first = last = None
        for frame in container.decode(stream):
            first, last = first or frame, frame
            if frame.pts is not None and frame.pts >= time:
                break
        # some containers come out at a later key frame: then from the one before
        if last is not None and (last is not first or last.pts == time):
            break
    if last is None:
        raise ValueError(f"no frame at {float(time * stream.time_base):.2f} s")
    return last.to_image().convert("RGB")
