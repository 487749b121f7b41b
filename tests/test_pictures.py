"""Pictures for people: pixels land where they should."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from masked_wavelet_nerf import pictures
from masked_wavelet_nerf.pictures import CAPTION_HEIGHT, GAP, difference, side_by_side, to_bytes


def colours(height: int = 6, width: int = 40) -> list[np.ndarray]:
    """Four float images, each of one colour but for its upper left pixel."""
    images = []
    for red, green, blue in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0)):
        image = np.broadcast_to(np.array([red, green, blue], float), (height, width, 3)).copy()
        image[0, 0] = (0.2, 0.4, 0.6)
        images.append(image)
    return images


def turning(count: int = 5, height: int = 16, width: int = 24) -> list[np.ndarray]:
    """A white bar on black that moves to the right."""
    frames = [np.zeros((height, width, 3)) for _ in range(count)]
    for index, frame in enumerate(frames):
        frame[:, 4 * index : 4 * index + 4] = 1
    return frames


def test_to_bytes_rounds_and_clips():
    image = np.array([[[-1.0, 0.0, 0.5], [1.0, 2.0, 100.4 / 255]]])
    np.testing.assert_array_equal(to_bytes(image), [[[0, 0, 128], [255, 255, 100]]])
    whole = to_bytes(image)
    assert to_bytes(whole) is whole


def test_difference_is_absolute_times_gain_and_clipped():
    one, other = np.full((2, 3, 3), 0.5), np.full((2, 3, 3), 0.5)
    other[0, 0], other[1, 2] = (0.45, 0.55, 0.5), (1.0, 0.0, 0.3)
    seen = difference(one, other, gain=4.0)
    np.testing.assert_allclose(seen[0, 0], (0.2, 0.2, 0))
    np.testing.assert_allclose(seen[1, 2], (1, 1, 0.8))
    assert seen[0, 1:].sum() == seen[1, :2].sum() == 0
    np.testing.assert_array_equal(seen, difference(other, one, gain=4.0))


@pytest.mark.parametrize("scale", [1, 3])
def test_side_by_side_puts_every_pixel_in_its_place(tmp_path, scale):
    one, two, three, four = colours()
    path = side_by_side(
        [[one, two], [three, four]], ["left", "right"], tmp_path / "new" / "a.png", scale=scale
    )
    assert path == tmp_path / "new" / "a.png"
    seen = np.asarray(Image.open(path))
    height, width = 6 * scale, 40 * scale
    assert seen.shape == (CAPTION_HEIGHT + 2 * height + GAP, 2 * width + GAP, 3)
    for image, line, column in ((one, 0, 0), (two, 0, 1), (three, 1, 0), (four, 1, 1)):
        top, left = CAPTION_HEIGHT + line * (height + GAP), column * (width + GAP)
        expected = to_bytes(image).repeat(scale, 0).repeat(scale, 1)
        np.testing.assert_array_equal(seen[top : top + height, left : left + width], expected)
    assert (seen[:, width : width + GAP] == 255).all()
    assert (seen[CAPTION_HEIGHT + height : CAPTION_HEIGHT + height + GAP] == 255).all()


def test_captions_are_written_over_their_column_and_stay_there(tmp_path):
    image = colours()[0]
    for labels, inked in ((("", "x"), (False, True)), (("a very long caption", ""), (True, False))):
        side_by_side([[image, image]], labels, tmp_path / "a.png")
        seen = np.asarray(Image.open(tmp_path / "a.png"))[:CAPTION_HEIGHT]
        assert ((seen[:, :40] < 128).any(), (seen[:, 40:] < 128).any()) == inked


def test_captions_take_the_sign_for_times(tmp_path):
    side_by_side([[colours()[0]]], ["× 5"], tmp_path / "a.png")
    assert (np.asarray(Image.open(tmp_path / "a.png"))[:CAPTION_HEIGHT] < 128).any()


def test_bicubic_smooths_and_nearest_does_not(tmp_path):
    step = np.zeros((8, 40, 3))
    step[:, 20:] = 1
    values = {}
    for name in ("nearest", "bicubic"):
        side_by_side([[step]], [""], tmp_path / "a.png", scale=4, filter=name)
        values[name] = np.unique(np.asarray(Image.open(tmp_path / "a.png"))[CAPTION_HEIGHT:])
    assert values["nearest"].tolist() == [0, 255]
    assert len(values["bicubic"]) > 4


def test_side_by_side_names_what_does_not_fit(tmp_path):
    one, two, *_ = colours()
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"rows\[1\]: 1 images for 2 labels"):
        side_by_side([[one, two], [one]], ["a", "b"], path)
    with pytest.raises(ValueError, match=r"rows\[0\]\[1\]: shape \(6, 39, 3\)"):
        side_by_side([[one, two[:, 1:]]], ["a", "b"], path)
    for rows, labels in (([], ["a"]), ([[]], [])):
        with pytest.raises(ValueError, match="at least one row and one label"):
            side_by_side(rows, labels, path)
    assert not path.exists()


def test_gif_has_every_frame_in_order(tmp_path):
    path = pictures.write_turntable(iter(turning()), tmp_path / "new" / "a.gif", fps=10)
    gif = Image.open(path)
    assert gif.n_frames == 5
    assert gif.info["duration"] == 100
    assert gif.info["loop"] == 0
    for index, frame in enumerate(turning()):
        gif.seek(index)
        np.testing.assert_array_equal(np.asarray(gif.convert("RGB")), to_bytes(frame))


def test_strip_shows_frames_from_left_to_right(tmp_path):
    frames = [to_bytes(frame) for frame in turning()]
    path = pictures.write_turntable(frames, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.concatenate(frames, axis=1))


@pytest.mark.parametrize("failure", ["missing", "broken"])
def test_video_falls_back_to_gif(tmp_path, monkeypatch, failure):
    ffmpeg = tmp_path / "ffmpeg"
    if failure == "broken":
        ffmpeg.write_text("#!/bin/sh\necho 'Unknown encoder' >&2\nexit 1\n")
        ffmpeg.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    frames = turning(height=300, width=240)  # more than a pipe holds
    path = pictures.write_turntable(frames, tmp_path / "a.mp4")
    assert path == tmp_path / "a.gif"
    assert Image.open(path).n_frames == 5
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95)])
def test_video_shows_the_frames(tmp_path, height, width):
    import mediapy

    frames = [np.full((height, width, 3), grey) for grey in (0.1, 0.4, 0.7, 0.9)]
    path = pictures.write_turntable(frames, tmp_path / "a.mp4", fps=8)
    assert path == tmp_path / "a.mp4"
    seen = np.asarray(mediapy.read_video(str(path)))
    assert seen.shape == (4, 64, 96, 3)
    for image, frame in zip(seen, frames, strict=True):
        np.testing.assert_allclose(image[:height, :width], 255 * frame, atol=6)


def test_turntable_names_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="frames: at least one"):
        pictures.write_turntable([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"ends in '\.webm'; \.mp4, \.gif and \.png"):
        pictures.write_turntable(turning(), tmp_path / "a.webm")
