"""Videos as files, beside folders of frames, which test_multiple_choice.py has."""

from importlib.util import find_spec

import pytest
from PIL import Image

from benchmarks import frames, nextqa


def write_video(av, path, n=40, size=(64, 48), codec="mpeg4", gop=12):
    """n frames, each brighter than the one before, a key frame at least every `gop`, between them
    frames that look ahead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 10**6
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, 2
        for k in range(n):
            picture = Image.new("RGB", size, (6 * k,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def shown(images) -> list[int]:
    """The numbers of the frames, by their brightness."""
    assert all(image.mode == "RGB" for image in images)
    return [round(image.getpixel((20, 20))[0] / 6) for image in images]


@pytest.mark.parametrize("name, codec", [
    ("11.mp4", "mpeg4"), ("11.mp4", "libx264"), ("11.mkv", "libx264"), ("11.webm", "libvpx-vp9")])
@pytest.mark.parametrize("count", [1, 2, 8, 40, 50])
def test_a_videos_frames_are_those_that_its_folder_would_give(count, name, codec, tmp_path):
    av = pytest.importorskip("av")
    file = write_video(av, tmp_path / "deep/er" / name, codec=codec)
    (place,) = frames.clips(["11"], tmp_path, None).values()
    assert place == file
    assert shown(frames.opened(place, count)()) == frames.uniform(range(40), count)


def test_files_and_folders_stand_side_by_side_and_a_folder_comes_first(tmp_path):
    av = pytest.importorskip("av")
    write_video(av, tmp_path / "frames/a.mp4")
    write_video(av, tmp_path / "frames/b.mp4")
    (tmp_path / "frames/b").mkdir()
    Image.new("RGB", (8, 8), (60,) * 3).resize((64, 48)).save(tmp_path / "frames/b/1.png")
    found = frames.clips(["a", "b"], None, tmp_path)
    assert {name: shown(frames.opened(place, 1)()) for name, place in found.items()} == {
        "a": [20], "b": [10]}
    with pytest.raises(FileNotFoundError, match="no .mp4 for 1 of 2 videos, such as c"):
        frames.clips(["a", "c"], None, tmp_path)


def test_a_benchmark_asks_about_a_video(tmp_path):
    av = pytest.importorskip("av")
    write_video(av, tmp_path / "videos/NExTVideo/1164/11.mp4")
    options = ", ".join(f'"a{k}": "{k}"' for k in range(5))
    (tmp_path / "test.jsonl").write_text(
        '{"video": 11, "question": "why", "answer": 4, "qid": 3, "type": "CW", ' + options + "}")
    (question,) = nextqa.load(tmp_path, videos=tmp_path / "videos")
    assert shown(question.images()) == [0, 5, 11, 16, 22, 27, 33, 39]


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_is_no_video_is_named(content, tmp_path):
    av = pytest.importorskip("av")
    file = write_video(av, tmp_path / "a.mp4")
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match="a.mp4: cannot be decoded"):
        frames.opened(file, 2)()


@pytest.mark.skipif(find_spec("av") is not None, reason="PyAV is installed")
def test_without_pyav_one_line_says_what_to_install(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"a video")
    with pytest.raises(ImportError, match="a.mp4 is a video, .*: pip install av; or extract"):
        frames.clips(["a"], tmp_path, None)
