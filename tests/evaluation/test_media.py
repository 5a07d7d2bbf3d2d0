"""Pictures and videos as tasks hand them over: files of many kinds, arrays, lists of frames."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="the extra vlmslim[eval] is not installed")

from vlmslim.evaluation.conversation import read_frames, read_picture, user_message

COLOURS = ["red", "green", "blue", "white", "black"]
FRAMES = [Image.new("RGB", (20, 12), colour) for colour in COLOURS]


def kinds(*visuals) -> list[str]:
    return [part["type"] for part in user_message("q", visuals)[0]["content"][:-1]]


def animated(path, **options):
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:], **options)
    return path


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
def test_an_animated_picture_is_a_video(tmp_path, name):
    path = animated(tmp_path / name, duration=100, **({"lossless": True} if name.endswith("webp") else {}))
    for source in (str(path), Image.open(path)):
        frames = read_frames(source, 9)
        assert frames.shape == (5, 12, 20, 3)
        wanted = [np.asarray(frame) for frame in FRAMES]
        assert all(np.array_equal(frame, want) for frame, want in zip(frames, wanted, strict=True))
        assert np.array_equal(read_frames(source, 3), np.stack([wanted[i] for i in (0, 2, 4)]))


@pytest.mark.parametrize("frames", [FRAMES, np.stack([np.asarray(x) for x in FRAMES])], ids=["list", "array"])
def test_frames_are_a_video(frames):
    assert kinds(frames) == ["video"]
    assert read_frames(frames, 9).shape == (5, 12, 20, 3)
    assert np.array_equal(read_frames(frames, 2)[1], np.asarray(FRAMES[4]))


def test_a_file_is_what_it_holds(tmp_path):
    odd, film = tmp_path / "picture.tiff.download", tmp_path / "film.bin"
    FRAMES[0].save(odd, "png")
    film.write_bytes(b"no picture")
    assert kinds(str(odd), odd, str(film), FRAMES[0]) == ["image", "image", "video", "image"]


@pytest.mark.parametrize(
    ("mode", "kind", "top"),
    [("I;16", np.uint16, 65535), ("I", np.int32, 65535), ("F", np.float32, 1), ("L", np.uint8, 255)],
)
def test_deep_pictures_are_scaled(tmp_path, mode, kind, top):
    ramp = (np.linspace(0, 1, 256) * top).astype(kind)
    source = Image.fromarray(np.tile(ramp, (4, 1)))
    assert source.mode == mode
    grey = np.asarray(read_picture(source))[0, :, 0].astype(int)
    assert abs(grey - np.arange(256)).max() <= 1


@pytest.mark.parametrize("source", [3, {"a": 1}, np.zeros((4, 4, 3)), np.zeros((2, 2, 2, 3), np.uint8)])
def test_what_is_no_picture_is_a_clear_error(source):
    with pytest.raises(TypeError, match="a picture came as"):
        read_picture(source)
    with pytest.raises(ValueError, match="without frames"):
        read_frames([], 3)
