"""A folder as it comes: odd pictures are read as one sees them, bad ones are skipped and named."""

import io
import os
import signal
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from torch.utils.data import DataLoader

from data import pictures
from data.epochs import Epochs
from data.pictures import Pictures, oblong, open_picture

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def deadline():
    """What hangs fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("20 s are over"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(path, colour=RED, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def cut(path):
    """A JPEG that lacks its second half."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(data := io.BytesIO(), "JPEG")
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])


def pixels(path):
    """(h, w, 3) of the opened picture, as int."""
    image = open_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.fixture
def mixed(tmp_path):
    """Six files: 0, 2 and 3 are pictures of width 10, 12 and 13; 1, 4 and 5 cannot be read."""
    for i in (0, 2, 3):
        write(tmp_path / f"{i}.png", size=(10 + i, 4))
    (tmp_path / "1.png").write_text("I am no picture")
    (tmp_path / "4.png").touch()
    cut(tmp_path / "5.jpg")
    return tmp_path


# ------------------------------------------------------------ open_picture


@pytest.mark.parametrize(
    "name, orientation, shape, corner",
    [  # where the stored top left corner is to be seen
        ("a.jpg", 1, (16, 32), (0, 0)),
        ("a.jpg", 2, (16, 32), (0, -1)),
        ("a.jpg", 3, (16, 32), (-1, -1)),
        ("a.jpg", 6, (32, 16), (0, -1)),
        ("a.jpg", 8, (32, 16), (-1, 0)),
        ("a.png", 6, (32, 16), (0, -1)),
        ("a.webp", 6, (32, 16), (0, -1)),
        ("a.tif", 6, (32, 16), (0, -1)),
    ],
)
def test_a_turned_picture_is_put_upright(tmp_path, name, orientation, shape, corner):
    image = Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / name, exif=exif, quality=100)
    seen = pixels(tmp_path / name)
    assert seen.shape == (*shape, 3)
    for row in (0, -1):
        for column in (0, -1):
            assert abs(seen[row, column] - (RED if (row, column) == corner else BLUE)).max() < 12


def test_tags_of_the_wrong_type_do_not_cost_a_turned_picture(tmp_path):
    tags = (
        struct.pack("<HHIHH", 0x112, 3, 1, 6, 0),
        struct.pack("<HHIf", 0x10E, 11, 1, 0.5),
    )  # a number for a text
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (16, 32)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_an_animation_the_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 6), colour) for colour in (BLUE, RED, WHITE)]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert Image.open(tmp_path / name).n_frames == 3
    assert (pixels(tmp_path / name) == BLUE).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, name):
    deep = np.linspace(0, 65535, 64 * 32).round().astype(np.uint16).reshape(32, 64)
    deep[:16] //= 2  # mean is not that of its own range
    if name == "big_endian.tif":
        image = Image.frombytes("I;16B", (64, 32), deep.astype(">u2").tobytes())
    else:
        image = Image.fromarray(deep)
    image.save(tmp_path / name)
    seen = pixels(tmp_path / name)
    assert abs(seen.mean() - deep.mean() / 257) < 0.1
    assert abs(seen - (deep / 257)[..., None]).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "values",
    [
        np.float32([[-3, 0], [1, 5]]),
        np.float32([[-3e38, -1.5e38], [0, 3e38]]),
        np.int32([[-3, 0], [1, 5]]),
        np.int32([[-(2**31), -(2**30)], [0, 2**31 - 1]]),
    ],
)
def test_32_bit_greys_fill_their_own_range(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    wide = values.astype(float)
    wanted = (wide - wide.min()) / (wide.max() - wide.min()) * 255
    assert abs(pixels(tmp_path / "a.tif") - wanted[..., None]).max() <= 0.51


def test_greys_without_a_range(tmp_path):
    Image.fromarray(np.full((2, 3), 7, np.float32)).save(tmp_path / "even.tif")
    Image.fromarray(np.float32([[np.nan, -np.inf, 0], [4, 8, np.inf]])).save(tmp_path / "holes.tif")
    Image.fromarray(np.full((2, 3), np.nan, np.float32)).save(tmp_path / "empty.tif")
    with warnings.catch_warnings(action="error"):
        assert (pixels(tmp_path / "even.tif") == 0).all()
        assert pixels(tmp_path / "holes.tif")[..., 0].tolist() == [[0, 0, 0], [128, 255, 255]]
        with pytest.raises(ValueError, match="empty.tif: .*no pixel is a finite number"):
            open_picture(tmp_path / "empty.tif")


@pytest.mark.parametrize(
    "mode, colour, name, seen",
    [
        ("1", 1, "a.png", WHITE),
        ("1", 0, "a.png", (0, 0, 0)),
        ("L", 100, "a.bmp", (100, 100, 100)),
        ("CMYK", (0, 255, 255, 0), "a.tif", RED),
        ("CMYK", (255, 255, 0, 0), "a.jpg", BLUE),
        ("LA", (100, 255), "a.png", (100, 100, 100)),
        ("LA", (100, 51), "a.png", (224, 224, 224)),
        ("RGBA", (255, 0, 0, 51), "a.png", (255, 204, 204)),
        ("RGBA", (0, 0, 0, 0), "a.png", WHITE),
        ("RGB", (1, 2, 3), "a.bmp", (1, 2, 3)),
    ],
)
def test_every_mode_is_seen_as_rgb_on_white(tmp_path, mode, colour, name, seen):
    Image.new(mode, (8, 6), colour).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    assert abs(pixels(tmp_path / name) - seen).max() <= (3 if name == "a.jpg" else 0)


@pytest.mark.parametrize(
    "name, transparency", [("a.png", 1), ("a.gif", 1), ("a.png", b"\xff\x33\xff")]
)
def test_a_palette_with_transparency_is_laid_on_white(tmp_path, name, transparency):
    image = Image.new("P", (3, 2))
    image.putpalette([*BLUE, *RED, 0, 255, 0])
    image.putdata([0, 1, 2] * 2)
    image.save(tmp_path / name, transparency=transparency)
    assert Image.open(tmp_path / name).mode == "P"
    clear = WHITE if transparency == 1 else (255, 204, 204)
    assert pixels(tmp_path / name).tolist() == [[[*BLUE], [*clear], [0, 255, 0]]] * 2


@pytest.mark.parametrize("mode, key", [("L", 9), ("RGB", (9, 9, 9))])
def test_a_colour_declared_transparent_is_white(tmp_path, mode, key):
    Image.new(mode, (3, 2), key).save(tmp_path / "a.png", transparency=key)
    assert (pixels(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_sizes_open(tmp_path, size):
    write(tmp_path / "a.png", BLUE, size)
    assert open_picture(str(tmp_path / "a.png")).size == size
    assert (pixels(tmp_path / "a.png") == BLUE).all()


def test_what_cannot_be_read_is_named_with_its_cause(tmp_path):
    cut(tmp_path / "cut.jpg")
    (tmp_path / "text.png").write_text("I am no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, cause in {
        "cut.jpg": "truncated",
        "text.png": "cannot identify",
        "empty.png": "cannot identify",
        "nowhere.png": "neither a file",
        "pipe.png": "neither a file",
    }.items():
        with pytest.raises(ValueError, match=cause) as caught:
            open_picture(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_whatever_a_decoder_raises_becomes_a_named_valueerror(tmp_path, monkeypatch):
    def fail(self, *args):
        raise SyntaxError("broken chunk")

    write(tmp_path / "a.tif")
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", fail)
    with pytest.raises(ValueError, match="a.tif: SyntaxError: broken chunk"):
        open_picture(tmp_path / "a.tif")


def test_a_bomb_is_refused_even_where_pillow_only_warns(tmp_path, monkeypatch):
    write(tmp_path / "below.png", size=(10, 10))
    write(tmp_path / "warned.png", size=(10, 11))
    write(tmp_path / "refused.png", size=(10, 21))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(action="ignore"):
        assert open_picture(tmp_path / "below.png").size == (10, 10)
        for name in ("warned", "refused"):
            with pytest.raises(ValueError, match=f"{name}.png: DecompressionBomb"):
                open_picture(tmp_path / f"{name}.png")
        Image.open(tmp_path / "warned.png").close()  # elsewhere warnings are as they were


def test_a_picture_outlives_its_file_and_leaves_none_open(tmp_path):
    write(tmp_path / "a.png", BLUE)
    with warnings.catch_warnings(action="error"):
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        image = open_picture(tmp_path / "a.png")
        (tmp_path / "a.png").unlink()
        assert image.getpixel((7, 5)) == BLUE
        assert not before or len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------ Pictures


def test_every_ending_at_any_depth_in_the_order_of_paths(tmp_path):
    wanted = [
        "B.PNG",
        "a-b/x.Jpg",
        "a.jpeg",
        "a/deep/er/y.webp",
        "a/z.gif",
        "b.bmp",
        "c.TIF",
        "d.tiff",
    ]
    for name in reversed(wanted):
        write(tmp_path / name)
    for name in (
        ".hidden.png",
        "a/._z.png",
        ".cache/x.png",
        "a/.thumbs/deep/x.png",
        "e.txt",
        "png",
        "f.png.part",
    ):
        write(tmp_path / "picture.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "picture.png").rename(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    data = Pictures(tmp_path)
    assert data.files == wanted and len(data) == 8
    assert all(skipped == [] for _, skipped in data)


def test_the_order_is_not_that_of_the_disk(tmp_path, monkeypatch):
    for name in ("a.png", "b/a.png", "b/c.png", "c/a.png"):
        write(tmp_path / name)
    walk, wanted = os.walk, Pictures(tmp_path).files

    def backwards(top, **kwargs):
        for path, folders, files in walk(top, **kwargs):
            folders.sort(reverse=True)
            yield path, folders, sorted(files, reverse=True)

    monkeypatch.setattr(pictures.os, "walk", backwards)
    assert Pictures(tmp_path).files == wanted == ["a.png", "b/a.png", "b/c.png", "c/a.png"]


def test_a_hidden_folder_may_be_asked_for(tmp_path):
    write(tmp_path / ".cache/a.png")
    assert Pictures(tmp_path / ".cache").files == ["a.png"]


def test_links_to_files_count_and_loops_do_not_hang(tmp_path):
    write(tmp_path / "in/a.png")
    (tmp_path / "in/loop").symlink_to("..")
    (tmp_path / "in/b.png").symlink_to("a.png")
    (tmp_path / "in/c.png").symlink_to("c.png")
    data = Pictures(tmp_path / "in")
    assert data.files == ["a.png", "b.png", "c.png"]
    assert data[1][1] == [] and len(data[2][1]) == 1 and data[2][1][0].startswith("c.png: ")
    (tmp_path / "link").symlink_to("in")
    assert Pictures(tmp_path / "link").files == data.files  # the folder itself may be a link


def test_no_folder_or_no_picture_is_said_at_once(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").touch()
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a.png is not a folder"):
        Pictures(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match="empty holds no picture.*.png .jpg .jpeg .webp .bmp .gif .tif .tiff"
    ):
        Pictures(tmp_path / "empty")


def test_a_closed_subfolder_is_not_left_out_in_silence(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    write(tmp_path / "closed/b.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="closed"):
        Pictures(tmp_path)


def test_the_next_readable_one_stands_in_and_the_lost_are_named(mixed):
    data = Pictures(str(mixed))
    assert len(data) == 6
    widths, skipped = zip(
        *((image.width, skipped) for image, skipped in data)
    )  # ends, though stand-ins never run out
    assert widths == (10, 12, 12, 13, 10, 10)
    assert [[line.split(": ")[0] for line in lines] for lines in skipped] == [
        [],
        ["1.png"],
        [],
        [],
        ["4.png", "5.jpg"],
        ["5.jpg"],
    ]
    assert "cannot identify" in skipped[1][0] and "truncated" in skipped[5][0]
    assert not any(line.count(str(mixed)) > 1 for line in sum(skipped, []))


def test_the_lost_are_named_each_time_and_by_their_relative_path(mixed):
    (mixed / "sub").mkdir()
    (mixed / "sub/x.png").touch()
    data = Pictures(mixed)
    first, again = (
        [(np.asarray(image).tobytes(), skipped) for image, skipped in d] for d in (data, data)
    )
    assert (
        first
        == again
        == [(np.asarray(image).tobytes(), skipped) for image, skipped in Pictures(mixed)]
    )
    assert data[6][0].width == 10 and data[6][1][0].startswith("sub/x.png: ")
    assert data[-1][1] == data[6][1]
    with pytest.raises(IndexError):
        data[7]


def test_accept_refuses_with_a_sentence(mixed):
    def accept(image):
        assert image.mode == "RGB"
        return f"{image.width} is too wide" if image.width > 12 else None

    image, skipped = Pictures(mixed, accept)[3]
    assert image.width == 10
    assert skipped[0] == "3.png: 13 is too wide" and [line[:5] for line in skipped[1:]] == [
        "4.png",
        "5.jpg",
    ]
    assert Pictures(mixed, accept)[2][1] == []


def test_nothing_of_use_stops_with_the_first_cause(mixed):
    with pytest.raises(
        ValueError, match=f"{mixed}: none of 6 pictures can be used; 0.png: not today"
    ):
        Pictures(mixed, lambda image: "not today")[0]
    for i in (0, 2, 3):
        (mixed / f"{i}.png").unlink()
    with pytest.raises(
        ValueError, match=f"{mixed}: none of 3 pictures can be used; 4.png: .*cannot identify"
    ):
        Pictures(mixed)[1]


def test_a_loader_gives_full_batches_and_brings_the_lost_along(mixed):
    data = Epochs(Pictures(mixed), 4, 16, seed=2)
    batches = list(
        DataLoader(
            data,
            4,
            num_workers=1,
            collate_fn=lambda batch: (
                [image.width for image, _ in batch],
                sum((skipped for _, skipped in batch), []),
            ),
        )
    )
    assert [len(widths) for widths, _ in batches] == [4, 4, 4]
    assert [w for widths, _ in batches for w in widths] == [image.width for image, _ in data]
    assert (
        [line for _, skipped in batches for line in skipped]
        == [line for _, skipped in data for line in skipped]
        != []
    )


@pytest.mark.parametrize("size", [(200, 1), (1, 200), (144, 96)])
def test_pictures_that_processors_take_are_not_oblong(size):
    assert oblong(Image.new("RGB", size)) is None


@pytest.mark.parametrize("size", [(201, 1), (2, 5000)])
def test_a_picture_too_oblong_is_refused_with_its_size(size):
    pixels = f"{size[0]}x{size[1]} pixels"
    cause = f"too oblong: {pixels}, expected a side of at most 200 times the other"
    assert oblong(Image.new("RGB", size)) == cause
