"""Pictures that people look at: comparisons side by side, differences, turntables.

Images are (H, W, 3) arrays: float in [0, 1], or uint8.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageDraw

GAP, CAPTION_HEIGHT = 4, 14
"""Pixels between images, and above them for the captions."""

Filter = Literal["nearest", "bicubic"]
"""How images are magnified: pixels stay visible squares, or are smoothed."""

_FILTERS: dict[Filter, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
}


def to_bytes(image: Shaped[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """uint8 of a float image in [0, 1], clipped to it; uint8 images are returned as they are."""
    if image.dtype == np.uint8:
        return image
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def difference(
    one: Float[np.ndarray, "H W 3"], other: Float[np.ndarray, "H W 3"], gain: float
) -> Float[np.ndarray, "H W 3"]:
    """min(1, gain · |one − other|): black where the images agree."""
    return np.clip(gain * np.abs(one - other), 0, 1)


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    path: Path,
    scale: int = 1,
    filter: Filter = "nearest",
) -> Path:
    """A PNG of rows of images of one size, with a caption over every column.

    Args:
        rows: images (H, W, 3), all of the same size; as many in a row as there are labels.
        labels: captions of the columns; what is wider than a column is cut off.
        path: the PNG; its folder is made if need be.
        scale: whole factor by which the images are magnified.
        filter: how they are magnified.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is no image, a row has not one image per label, or sizes differ.
    """
    if not rows or not labels:
        raise ValueError("rows, labels: at least one row and one label are needed")
    size = rows[0][0].shape if rows[0] else None
    for line, row in enumerate(rows):
        if len(row) != len(labels):
            raise ValueError(f"rows[{line}]: {len(row)} images for {len(labels)} labels")
        for column, image in enumerate(row):
            if image.shape != size:
                raise ValueError(
                    f"rows[{line}][{column}]: shape {image.shape}, but rows[0][0] has {size}; "
                    "all images must have the same size"
                )
    height, width = scale * rows[0][0].shape[0], scale * rows[0][0].shape[1]
    canvas = Image.new(
        "RGB",
        (
            len(labels) * (width + GAP) - GAP,
            CAPTION_HEIGHT + len(rows) * (height + GAP) - GAP,
        ),
        "white",
    )
    for column, label in enumerate(labels):
        caption = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
        ImageDraw.Draw(caption).text((2, 1), label, fill="black")
        canvas.paste(caption, (column * (width + GAP), 0))
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            picture = Image.fromarray(to_bytes(image)).resize((width, height), _FILTERS[filter])
            canvas.paste(picture, (column * (width + GAP), CAPTION_HEIGHT + line * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
    return path


def write_turntable(frames: Iterable[np.ndarray], path: Path, fps: int = 12) -> Path:
    """Frames as a video, an animated GIF or a strip of pictures, as the ending of ``path`` says.

    Args:
        frames: images (H, W, 3), all of the same size.
        path: .mp4 (an animated GIF instead where ffmpeg is missing or fails), .gif, or .png
            (all frames in a row from left to right); its folder is made if need be.
        fps: frames per second; GIFs round the duration of a frame to 1/100 s.

    Returns:
        The path that was written: ``path``, or the same with .gif.

    Raises:
        ValueError: if there are no frames, or ``path`` has another ending.
    """
    images = [to_bytes(frame) for frame in frames]
    if not images:
        raise ValueError("frames: at least one is needed")
    ending = path.suffix.lower()
    if ending not in (".mp4", ".gif", ".png"):
        raise ValueError(f"path: ends in {ending!r}; .mp4, .gif and .png can be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".png":
        Image.fromarray(np.concatenate(images, axis=1)).save(path)
        return path
    if ending == ".mp4":
        if _write_video(images, path, fps):
            return path
        path = path.with_suffix(".gif")
    first, *rest = (Image.fromarray(image) for image in images)
    first.save(path, save_all=True, append_images=rest, duration=1000 // fps, loop=0)
    return path


def _write_video(images: list[np.ndarray], path: Path, fps: int) -> bool:
    """Whether an .mp4 could be written: that takes ffmpeg, and one that knows H.264."""
    if shutil.which("ffmpeg") is None:
        return False
    import mediapy  # slow to import, and of no use without ffmpeg

    # Players expect colour at half resolution, which takes an even width and height.
    height, width = images[0].shape[:2]
    even = [np.pad(i, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") for i in images]
    try:
        mediapy.write_video(str(path), even, fps=fps)
    except (RuntimeError, OSError):  # ffmpeg fails: at the end, or while it is being fed
        path.unlink(missing_ok=True)
        return False
    return True
