"""``llff-data``: forward-facing captures as LLFF and NeRF release them.

Folder: poses_bounds.npy and the photos, in images, images_4 or images_8, as in
https://github.com/Fyusion/LLFF (Mildenhall et al., Local Light Field Fusion, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_utils import auto_orient_and_center_poses
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import (
    DataParser,
    DataParserConfig,
    DataparserOutputs,
)
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from masked_wavelet_nerf.dataparsers.captures import (
    CaptureError,
    MissingCaptureError,
    check_folder,
    check_pose,
    check_positive,
    list_photos,
)
from masked_wavelet_nerf.ndc import find_forward_facing
from masked_wavelet_nerf.photos import read_header

_SUFFIXES = [".png", ".jpg", ".jpeg"]
_FOLDERS = ["images", "images_4", "images_8"]
_LONGEST_SIDE = 1000


@dataclass
class LLFFDataParserConfig(DataParserConfig):
    """Configuration of ``llff-data``."""

    _target: type = field(default_factory=lambda: LLFF)
    """Class to instantiate."""
    data: Path = Path("data/nerf_llff_data/fern")
    """Folder with poses_bounds.npy and the photos."""
    downscale_factor: int | None = None
    """Which photos: those in images_K, or in images for 1. None takes the largest of images,
    images_4 and images_8 whose longer side is at most 1000 pixels, else the smallest there is."""
    eval_interval: int = 8
    """Every so many views, from the first, one is for val and test; the others are for training."""
    near_distance: float = 1 / 0.75
    """Distance of the nearest depth bound after scaling; LLFF's loader calls its inverse
    bd_factor."""
    orientation_method: Literal["pca", "up", "vertical", "none"] = "up"
    """How nerfstudio orients the cameras."""
    center_method: Literal["poses", "focus", "none"] = "poses"
    """How nerfstudio centres the cameras."""


class LLFF(DataParser):
    """Reads an LLFF capture, oriented, centred and scaled, for methods that contract the scene.

    Poses are camera to world with columns down, right, backward, position, as LLFF stores them;
    the cameras returned are nerfstudio's, x right, y up, z backward. The unit of length is such
    that the nearest depth bound lies at ``near_distance``. The metadata hold the depth bounds of
    every view in that unit, as nears and fars, and where the cameras for training all look the same
    way the box of what they see, as forward_facing.

    Raises:
        CaptureError: if the capture is incomplete or malformed.
    """

    config: LLFFDataParserConfig

    def _generate_dataparser_outputs(
        self, split: str = "train", **kwargs: Any
    ) -> DataparserOutputs:
        config = self.config
        check_positive("near_distance", config.near_distance)
        check_positive("eval_interval", config.eval_interval)
        check_folder(config.data, "a capture with poses_bounds.npy and images")
        poses, sizes, bounds = read_poses_bounds(config.data / "poses_bounds.npy")
        photos = list_photos(_photo_folder(config.data, config.downscale_factor), _SUFFIXES)
        if len(photos) != len(poses):
            raise CaptureError(
                f"{photos[0].parent}: {len(photos)} photos, but {len(poses)} poses in "
                "poses_bounds.npy; expected as many, in the order of their names: remove what "
                "was not among the photos that the poses were estimated from"
            )

        homogeneous = torch.eye(4).repeat(len(poses), 1, 1)
        homogeneous[:, :3] = torch.from_numpy(poses)
        oriented, transform = auto_orient_and_center_poses(
            homogeneous, method=config.orientation_method, center_method=config.center_method
        )
        scale = config.near_distance / float(bounds[:, 0].min())
        oriented[:, :3, 3] *= scale

        is_test = np.arange(len(photos)) % config.eval_interval == 0
        views = np.flatnonzero(~is_test if split == "train" else is_test)
        if not len(views):
            raise CaptureError(
                f"{config.data}: none of {len(photos)} views is left for {split}; expected some "
                f"with eval_interval {config.eval_interval}: use a larger interval or more views"
            )
        chosen = [photos[view] for view in views]
        intrinsics = torch.from_numpy(_scale_intrinsics(chosen, sizes[views]))
        width, height, fx, fy = intrinsics.T[..., None]
        nears, fars = (torch.from_numpy(bounds[views]) * scale).float().T
        trained = torch.from_numpy(np.flatnonzero(~is_test))
        half_views = torch.from_numpy(sizes[:, [1, 0]] / (2 * sizes[:, 2:]))
        forward_facing = find_forward_facing(
            oriented[trained, :3],
            half_views[trained],
            torch.from_numpy(bounds[:, 0])[trained] * scale,
        )
        return DataparserOutputs(
            image_filenames=chosen,
            cameras=Cameras(
                camera_to_worlds=oriented[views, :3],
                fx=fx.float(),
                fy=fy.float(),
                cx=width.float() / 2,
                cy=height.float() / 2,
                width=width.long(),
                height=height.long(),
                camera_type=CameraType.PERSPECTIVE,
            ),
            scene_box=SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3])),
            dataparser_transform=transform,
            dataparser_scale=scale,
            metadata={"nears": nears, "fars": fars, "forward_facing": forward_facing},
        )


def read_poses_bounds(
    path: Path,
) -> tuple[Float[np.ndarray, "num 3 4"], Float[np.ndarray, "num 3"], Float[np.ndarray, "num 2"]]:
    """Reads LLFF's poses_bounds.npy.

    Returns:
        camera-to-world in nerfstudio's convention (x right, y up, z backward); height, width and
        focal length, in pixels of the photos that the poses were estimated from; near and far
        depth, in the unit of the positions.

    Raises:
        CaptureError: if the file is missing or not N × 17, or its numbers cannot be cameras.
    """
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingCaptureError(
            f"{path}: no such file; expected LLFF's poses: run its imgs2poses.py on the photos"
        ) from error
    except (ValueError, EOFError) as error:
        raise CaptureError(
            f"{path}: not an array: {error}; expected N × 17 numbers: unpack the capture again"
        ) from error
    if rows.ndim != 2 or rows.shape[1] != 17 or not len(rows) or rows.dtype.kind != "f":
        raise CaptureError(
            f"{path}: {rows.dtype} of shape {rows.shape}; expected N × 17 floats, a 3 × 5 matrix "
            "and two depths for each view: run LLFF's imgs2poses.py on the photos"
        )
    rows = rows.astype(np.float64)
    matrices, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    down, right, backward, position = np.moveaxis(matrices[:, :, :4], 2, 0)
    poses = np.stack([right, -down, backward, position], axis=2)
    sizes = matrices[:, :, 4]
    for view, pose in enumerate(poses):
        check_pose(pose, f"{path}, view {view}")
        if not (np.isfinite(sizes[view]).all() and (sizes[view] > 0).all()):
            raise CaptureError(
                f"{path}, view {view}: height, width and focal length {sizes[view].tolist()}; "
                "expected positive numbers of pixels: estimate the poses again"
            )
        near, far = bounds[view]
        if not (np.isfinite(far) and 0 < near < far):
            raise CaptureError(
                f"{path}, view {view}: depths from {near:g} to {far:g}; expected 0 < near < far: "
                "estimate the poses again"
            )
    return poses, sizes, bounds


def _photo_folder(folder: Path, downscale_factor: int | None) -> Path:
    if downscale_factor is not None:
        check_positive("downscale_factor", downscale_factor)
        chosen = folder / ("images" if downscale_factor == 1 else f"images_{downscale_factor}")
        if not chosen.is_dir():
            there = sorted(path.name for path in folder.glob("images*") if path.is_dir())
            raise MissingCaptureError(
                f"{chosen}: no such folder; expected the photos for downscale_factor "
                f"{downscale_factor}: use one of {there}"
            )
        return chosen
    found = [folder / name for name in _FOLDERS if (folder / name).is_dir()]
    if not found:
        raise MissingCaptureError(
            f"{folder}: no photos; expected one of the folders {', '.join(_FOLDERS)}: unpack the "
            "capture again, or give downscale_factor K for images_K"
        )
    for candidate in found:
        photo = read_header(list_photos(candidate, _SUFFIXES)[0])
        if max(photo.width, photo.height) <= _LONGEST_SIDE:
            return candidate
    return found[-1]


def _scale_intrinsics(
    photos: Sequence[Path], sizes: Float[np.ndarray, "num 3"]
) -> Float[np.ndarray, "num 4"]:
    """Width, height and focal lengths in x and y, in pixels of the photos."""
    scaled = []
    for photo, (height, width, focal) in zip(photos, sizes, strict=True):
        _, real_width, real_height, *_ = read_header(photo)
        x_scale, y_scale = real_width / width, real_height / height
        # A side that was rounded to whole pixels is off by less than one.
        if abs(x_scale - y_scale) > max(1 / width, 1 / height):
            raise CaptureError(
                f"{photo}: {real_width} × {real_height} pixels; expected the shape of {width:g} × "
                f"{height:g}, as in poses_bounds.npy: is the photo rotated or cropped?"
            )
        scaled.append((real_width, real_height, focal * x_scale, focal * y_scale))
    return np.array(scaled)


llff_data = DataParserSpecification(
    config=LLFFDataParserConfig(),
    description="Forward-facing captures of LLFF and NeRF.",
)
"""What nerfstudio lists as ``llff-data``."""
