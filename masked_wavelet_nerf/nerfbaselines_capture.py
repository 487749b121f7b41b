"""A harness's cameras and photos as a capture that nerfstudio's own data parser reads.

Takes plain arrays, so nothing of nerfbaselines is needed. Letters: N views, H, W image rows and
columns, C channels (3, or 4 with transparency).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image


def to_opengl(poses: Float[np.ndarray, "*N 3 4"]) -> Float[np.ndarray, "*N 3 4"]:
    """Camera to world, from x right, y down, z forward (OpenCV) to x right, y up, z backward."""
    return poses * np.array([1, -1, -1, 1], poses.dtype)


def write_capture(
    folder: Path,
    *,
    poses: Float[np.ndarray, "N 3 4"],
    intrinsics: Float[np.ndarray, "N 4"],
    sizes: Int[np.ndarray, "N 2"],
    photos: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
) -> Path:
    """Writes ``transforms.json`` for nerfstudio-data, with photos and masks as PNG.

    All views are for training, for a harness keeps its test views to itself. nerfstudio wants some
    for evaluation, too: the first.

    Args:
        folder: made if it is not there.
        poses: camera to world in OpenCV's convention, any unit of length.
        intrinsics: fx, fy, cx, cy of pinholes, pixels.
        sizes: width and height, pixels.
        photos: (H, W, C) or, grey, (H, W): bytes, or floats in [0, 1]. What is beyond a view's
            size is padding.
        masks: (H, W), which pixels count; none masks nothing.

    Returns:
        ``folder``.
    """
    frames = []
    for index, (pose, (fx, fy, cx, cy), (width, height)) in enumerate(
        zip(to_opengl(poses).tolist(), intrinsics.tolist(), sizes.tolist(), strict=True)
    ):
        frame = {
            "file_path": f"images/{index:06d}.png",
            "transform_matrix": [*pose, [0.0, 0.0, 0.0, 1.0]],
            **{"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": width, "h": height},
        }
        _write_png(folder / frame["file_path"], photos[index][:height, :width])
        if masks is not None:
            frame["mask_path"] = f"masks/{index:06d}.png"
            counts = masks[index][:height, :width].astype(bool)
            _write_png(folder / frame["mask_path"], counts.astype(np.uint8) * 255)
        frames.append(frame)
    names = [frame["file_path"] for frame in frames]
    splits = {"train_filenames": names, "val_filenames": names[:1], "test_filenames": names[:1]}
    (folder / "transforms.json").write_text(json.dumps({**splits, "frames": frames}), "utf8")
    return folder


def _write_png(path: Path, picture: np.ndarray) -> None:
    if picture.dtype != np.uint8:
        picture = np.round(255 * picture.clip(0, 1)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, compress_level=1)  # read once, then thrown away
