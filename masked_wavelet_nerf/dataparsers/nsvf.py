"""``nsvf-data``: NSVF-Synthetic, and Tanks & Temples as released with NSVF.

Folder: rgb/*.png, pose/*.txt, intrinsics.txt and bbox.txt, as in
https://github.com/facebookresearch/NSVF (Liu et al., Neural Sparse Voxel Fields, 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import (
    DataParser,
    DataParserConfig,
    DataparserOutputs,
)
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.colors import get_color

from masked_wavelet_nerf.dataparsers.captures import (
    TOLERANCE,
    CaptureError,
    MissingCaptureError,
    check_folder,
    check_pose,
    check_positive,
    list_photos,
)
from masked_wavelet_nerf.photos import read_header

# Tanks & Temples has no 2_: its 1_ are the test views.
_PREFIXES = {"train": ("0_",), "val": ("1_", "2_"), "test": ("2_", "1_")}


@dataclass
class NSVFDataParserConfig(DataParserConfig):
    """Configuration of ``nsvf-data``."""

    _target: type = field(default_factory=lambda: NSVF)
    """Class to instantiate."""
    data: Path = Path("data/nsvf/Synthetic_NSVF/Wineholder")
    """Folder with rgb/, pose/, intrinsics.txt and bbox.txt."""
    scale_factor: float = 1.0
    """Factor of the world: of camera positions and scene box alike."""
    alpha_color: str | None = "white"
    """Background to blend photos with alpha onto; None leaves them RGBA."""


class NSVF(DataParser):
    """Reads an NSVF capture; the scene box is its bbox.

    Splits go by the start of the name: 0_ train, 1_ val, 2_ test, and where there are no 1_ or no
    2_, val and test share the other. Poses are camera to world, x right, y down, z forward
    (OpenCV); the cameras returned are nerfstudio's, x right, y up, z backward. Lengths are in the
    capture's unit times ``scale_factor``.

    Raises:
        CaptureError: if the capture is incomplete or malformed.
    """

    config: NSVFDataParserConfig

    def _generate_dataparser_outputs(
        self, split: str = "train", **kwargs: Any
    ) -> DataparserOutputs:
        folder, scale = self.config.data, self.config.scale_factor
        check_positive("scale_factor", scale)
        photos = _find_photos(folder, split)
        poses = np.stack([read_pose(folder / "pose" / f"{photo.stem}.txt") for photo in photos])
        poses[:, :, 3] *= scale
        width, height = _common_size(photos)
        fx, fy, cx, cy = read_intrinsics(folder / "intrinsics.txt")
        if not (0 < cx < width and 0 < cy < height):
            raise CaptureError(
                f"{folder / 'intrinsics.txt'}: principal point ({cx:g}, {cy:g}) outside the photos "
                f"of {width} × {height} pixels; expected intrinsics in pixels of rgb/: rescale "
                "one of the two"
            )
        colour = self.config.alpha_color
        return DataparserOutputs(
            image_filenames=photos,
            cameras=Cameras(
                camera_to_worlds=torch.from_numpy(poses).float(),
                fx=fx,
                fy=fy,
                cx=cx,
                cy=cy,
                width=width,
                height=height,
                camera_type=CameraType.PERSPECTIVE,
            ),
            alpha_color=None if colour is None else get_color(colour),
            scene_box=SceneBox(
                aabb=torch.from_numpy(read_box(folder / "bbox.txt") * scale).float()
            ),
            dataparser_scale=scale,
        )


def read_pose(path: Path) -> Float[np.ndarray, "3 4"]:
    """Reads camera-to-world in OpenCV's convention; returns it in nerfstudio's (OpenGL's).

    Raises:
        CaptureError: if it is not a 4 × 4 matrix of a rotation and a position.
    """
    rows = _read_numbers(path)
    if [len(row) for row in rows] != [4] * 4:
        raise CaptureError(
            f"{path}: {_shape(rows)}; expected 4 lines of 4 numbers, camera to world: "
            "restore the file"
        )
    pose = np.array(rows)
    check_pose(pose[:3], str(path))
    if not np.allclose(pose[3], [0, 0, 0, 1], atol=TOLERANCE):
        raise CaptureError(
            f"{path}: last line {pose[3].tolist()}; expected 0 0 0 1: is the matrix transposed?"
        )
    return pose[:3] * [1, -1, -1, 1]


def read_intrinsics(path: Path) -> tuple[float, float, float, float]:
    """Reads fx, fy, cx and cy, in pixels.

    The file holds a 4 × 4 matrix (Tanks & Temples), or ``focal cx cy 0.`` in its first line
    (NSVF-Synthetic).

    Raises:
        CaptureError: if it holds neither.
    """
    rows = _read_numbers(path)
    if [len(row) for row in rows] == [4] * 4:
        (fx, _, cx, _), (_, fy, cy, _) = rows[:2]
    elif rows and len(rows[0]) == 4:
        fx, cx, cy, _ = rows[0]
        fy = fx
    else:
        raise CaptureError(
            f"{path}: {_shape(rows)}; expected a 4 × 4 matrix, or 'focal cx cy 0.' in the first "
            "line: restore the file"
        )
    if not (np.isfinite([fx, fy, cx, cy]).all() and fx > 0 and fy > 0):
        raise CaptureError(
            f"{path}: fx {fx:g}, fy {fy:g}, cx {cx:g}, cy {cy:g}; expected finite numbers of "
            "pixels and positive focal lengths: restore the file"
        )
    return fx, fy, cx, cy


def read_box(path: Path) -> Float[np.ndarray, "2 3"]:
    """Reads the lowest and the highest corner of the scene, in the capture's unit.

    Raises:
        CaptureError: if there are not 6 numbers (7 with a voxel size), or the box is empty.
    """
    numbers = [number for row in _read_numbers(path) for number in row]
    if len(numbers) not in (6, 7):
        raise CaptureError(
            f"{path}: {len(numbers)} numbers; expected x_min y_min z_min x_max y_max z_max and "
            "perhaps a voxel size: restore the file"
        )
    box = np.array(numbers[:6]).reshape(2, 3)
    if not (np.isfinite(box).all() and (box[0] < box[1]).all()):
        raise CaptureError(
            f"{path}: box from {box[0].tolist()} to {box[1].tolist()}; expected finite corners, "
            "the lower first: restore the file"
        )
    return box


def _find_photos(folder: Path, split: str) -> list[Path]:
    check_folder(folder, "a capture with rgb/, pose/, intrinsics.txt and bbox.txt")
    check_folder(folder / "rgb", "the photos, *.png")
    check_folder(folder / "pose", "the poses, *.txt")
    photos = list_photos(folder / "rgb", [".png"])
    poses = [path for path in folder.glob("pose/*.txt") if not path.name.startswith(".")]
    unpaired = {path.stem for path in photos} ^ {path.stem for path in poses}
    if unpaired:
        raise CaptureError(
            f"{folder}: {len(photos)} photos in rgb/ and {len(poses)} poses in pose/, "
            f"{len(unpaired)} without the other, as {min(unpaired)}; expected a pose of the same "
            "name for every photo: restore or remove those files"
        )
    prefixes = _PREFIXES[split]
    for prefix in prefixes:
        chosen = [path for path in photos if path.name.startswith(prefix)]
        if chosen:
            return chosen
    raise CaptureError(
        f"{folder / 'rgb'}: no views to use for {split}; expected photos whose names start with "
        f"{' or '.join(prefixes)}: rename photos and poses"
    )


def _common_size(photos: Sequence[Path]) -> tuple[int, int]:
    first = read_header(photos[0])
    for photo in map(read_header, photos):
        if (photo.width, photo.height) != (first.width, first.height):
            raise CaptureError(
                f"{photo.path}: {photo.width} × {photo.height} pixels; expected {first.width} × "
                f"{first.height} as {photos[0].name} has, for they share intrinsics.txt: resize it"
            )
    return first.width, first.height


def _read_numbers(path: Path) -> list[list[float]]:
    """The numbers of every line that has any."""
    try:
        lines = path.read_text("utf8").splitlines()
        return [[float(word) for word in line.split()] for line in lines if line.strip()]
    except FileNotFoundError as error:
        raise MissingCaptureError(
            f"{path}: no such file; expected a text file of numbers: unpack the capture again"
        ) from error
    except ValueError as error:
        raise CaptureError(
            f"{path}: not numbers: {error}; expected a text file of numbers: restore the file"
        ) from error


def _shape(rows: Sequence[Sequence[float]]) -> str:
    return f"{len(rows)} lines of {[len(row) for row in rows]} numbers"


nsvf_data = DataParserSpecification(
    config=NSVFDataParserConfig(),
    description="NSVF-Synthetic, and Tanks & Temples as released with NSVF.",
)
"""What nerfstudio lists as ``nsvf-data``."""
