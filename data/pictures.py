"""Pictures as they come, single or in folders. What cannot be read is skipped and named."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_ASPECT = 200                      # Qwen2.5-VL's processor refuses what is more oblong


# ------------------------------------------------------------------------------------ one picture


def open_picture(path: str | Path, data: bytes | None = None) -> Image.Image:
    """The picture as one sees it, RGB of 8 bits: upright, on white, an animation's first frame.

    data: the file's content, where it is at hand; `path` is then its name only.
    Raises ValueError naming path and cause where it is no file, unreadable, cut short, or so large
    that Pillow warns of a decompression bomb.
    """
    try:
        # opening a pipe would wait for ever
        if data is None and not Path(path).is_file():
            raise FileNotFoundError("neither a file nor a link to one")
        file = path if data is None else io.BytesIO(data)
        with (warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
              Image.open(file) as image):
            image.load()
            # Once read, the tags stay with the image. Their source has to go: exif_transpose()
            # would write it anew, and fail at tags of the wrong type.
            image.getexif()
            for key in ("exif", "Raw profile type exif"):
                image.info.pop(key, None)
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:        # at a broken file, Pillow's decoders raise any type
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits from any mode. Deep greys are scaled: Pillow would clip them to white.

    Raises ValueError for floats of which none is finite.
    """
    if image.mode.startswith("I;16"):
        return grey(np.asarray(image) / 257)
    if image.mode in ("I", "F"):
        # of no known range: the darkest becomes black, the brightest white
        values = np.asarray(image, np.float64)
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("no pixel is a finite number")
        low = finite.min()
        scale = 255 / ((finite.max() - low) or 1)
        return grey(np.nan_to_num((values - low) * scale, nan=0, posinf=255, neginf=0))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def grey(values: np.ndarray) -> Image.Image:
    """RGB from greys (h, w) between 0 and 255."""
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def oblong(image: Image.Image) -> str | None:
    """Why no processor can use a picture; None for one that is not too oblong.

    Qwen's processor refuses it, CLIP's would enlarge it until its short side fills the view.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        return (f"too oblong: {width}x{height} pixels, expected a side of at most {MAX_ASPECT} "
                "times the other")
    return None


# ------------------------------------------------------------------------------------ a folder


def find(folder: Path) -> list[str]:
    """Paths of the picture files below `folder`, relative to it, sorted.

    Hidden files and folders do not count, and links to folders are not followed.
    Raises OSError for a closed folder.
    """
    def fail(error):                  # os.walk() would leave the folder out without a word
        raise error

    names = []
    for top, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(top) / name).relative_to(folder).as_posix() for name in files
                  if name.lower().endswith(ENDINGS) and not name.startswith(".")]
    return sorted(names)


class Pictures(Dataset):
    """Item i is (picture i, skipped), by relative path; the same on every machine.

    skipped: [] in general. Where file i is of no use, the next one that is stands in (after the
    last comes the first), and `skipped` has "relative/path: cause" of each file stepped over.
    accept may refuse a picture by a sentence that says why.
    Hidden files and folders are left out. Links to folders are not followed: they may form a loop.
    Raises ValueError if there is no such folder, or no picture in it; an item raises it if none of
    them is of use.
    """

    def __init__(self, folder: str | Path,
                 accept: Callable[[Image.Image], str | None] | None = None):
        self.folder = Path(folder)
        self.accept = accept
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise ValueError(f"{folder} {problem}")
        self.files = find(self.folder)
        if not self.files:
            raise ValueError(f"{folder} holds no picture, that is no file that ends in "
                             f"{' '.join(ENDINGS)}; hidden files and links to folders do not count")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        n = len(self)
        first = range(n)[i]           # raises IndexError, without which a loop would never end
        skipped = []
        for k in range(n):
            name = self.files[(first + k) % n]
            image, cause = self.read(name)
            if cause is None:
                return image, skipped
            skipped.append(f"{name}: {cause}")
        raise ValueError(f"{self.folder}: none of {n} pictures can be used; {skipped[0]}")

    def read(self, name: str) -> tuple[Image.Image | None, str | None]:
        """(picture, None), or (None, why it is of no use)."""
        path = self.folder / name
        try:
            image = open_picture(path)
        except ValueError as error:
            return None, str(error).removeprefix(f"{path}: ")
        cause = self.accept(image) if self.accept else None
        return (None, cause) if cause else (image, None)
