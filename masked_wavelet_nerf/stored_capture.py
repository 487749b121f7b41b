"""What a file knows of the capture that it was trained on, for nerfstudio: cameras, coordinates.

Decoded runs have it in place of a capture that is not there; and a capture that is there is brought
into its coordinates, so that a scene fits whatever photos are read beside it.

Letters: N cameras.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor

import masked_wavelet_codec as codec
from masked_wavelet_nerf.dataparsers.captures import TOLERANCE, CaptureError, MissingCaptureError
from masked_wavelet_nerf.loading import check_is_ours, stored_numbers, stored_projection
from masked_wavelet_nerf.ndc import ForwardFacing
from masked_wavelet_nerf.photos import PhotoDataset
from masked_wavelet_nerf.rendering import Space

_LONGEST_SIDE = 1 << 15
"""Pixels of a camera beyond which a file is taken for damaged."""
_GREY_HEIGHT, _GREY = 64, 96
"""Pixels of what stands for a photo, and their value."""
_VIEW = 256
"""Pixels a side of the camera of files that hold none."""
_NOTES = "psnr", "author", "licence"


@dataclass(frozen=True)
class StoredCapture:
    """A file's cameras, box and coordinates."""

    scene: codec.Scene
    """Without coefficients, see :func:`without_coefficients`; others are accepted."""

    @property
    def transform(self) -> Float[Tensor, "4 4"] | None:
        """The capture's own coordinates to the scene's; None where the exporter knew none."""
        parser = self.scene.meta.get("dataparser")
        if not isinstance(parser, dict) or "transform" not in parser:
            return None
        return _similarity(
            stored_numbers(parser, "transform", (3, 4)), _positive(parser.get("scale"))
        )

    def outputs(self, split: str) -> DataparserOutputs:
        """What a data parser would return for the capture, had it been here; no photos are.

        Files without cameras for evaluation have those for training in their place.

        Raises:
            CodecError: if what the file says of cameras cannot be.
        """
        parser = self.scene.meta.get("dataparser")
        parser = parser if isinstance(parser, dict) else {}
        transform = torch.eye(4)[:3]
        if "transform" in parser:
            transform = stored_numbers(parser, "transform", (3, 4))
        cameras = self._cameras(split)
        return DataparserOutputs(
            image_filenames=[Path(f"{split}_{index:05d}.png") for index in range(len(cameras))],
            cameras=cameras,
            scene_box=SceneBox(aabb=self._world_box()),
            dataparser_transform=transform,
            dataparser_scale=_positive(parser.get("scale")),
            metadata=self._metadata(),
        )

    def align(self, outputs: DataparserOutputs) -> DataparserOutputs:
        """A capture's cameras in the scene's coordinates.

        Data parsers orient, centre and scale a capture by all of its cameras: with more photos, or
        fewer, they would be elsewhere.

        Raises:
            CaptureError: if the two coordinate systems differ by more than turning, shifting and
                scaling.
        """
        metadata = {k: v for k, v in outputs.metadata.items() if k != "forward_facing"}
        outputs = dataclasses.replace(outputs, metadata={**metadata, **self._metadata()})
        wanted = self.transform
        found = _similarity(outputs.dataparser_transform, outputs.dataparser_scale)
        if wanted is None or torch.equal(wanted, found):
            return outputs
        moved = wanted @ torch.linalg.inv(found)
        volume = float(torch.linalg.det(moved[:3, :3]))
        scale = max(volume, 0.0) ** (1 / 3)
        rotation = moved[:3, :3] / scale  # nothing finite where they are mirrored
        error = (rotation.T @ rotation - torch.eye(3).double()).abs().max()
        if not error < TOLERANCE:
            raise CaptureError(
                "the capture's coordinates differ from those of the scene by more than turning, "
                "shifting and scaling; expected the capture that it was trained on, perhaps with "
                "more photos: check --data and the data parser"
            )
        cameras = copy.deepcopy(outputs.cameras)
        poses = cameras.camera_to_worlds.double()
        turned, shifted = rotation @ poses[..., :3], scale * rotation @ poses[..., 3:]
        cameras.camera_to_worlds = torch.cat((turned, shifted + moved[:3, 3:]), dim=-1).float()
        parser = self.scene.meta["dataparser"]
        return dataclasses.replace(
            outputs,
            cameras=cameras,
            dataparser_transform=stored_numbers(parser, "transform", (3, 4)),
            dataparser_scale=_positive(parser.get("scale")),
        )

    def notes(self) -> dict[str, Any]:
        """What the exporter wrote about the scene as it is: PSNR, author, licence."""
        return {name: self.scene.meta[name] for name in _NOTES if name in self.scene.meta}

    # --- parts of outputs -------------------------------------------------------------------------

    def _space(self) -> Space:
        meta = self.scene.meta
        return Space(
            stored_numbers(meta, "box", (2, 3)),
            bool(meta["model"].get("contract", False)),
            stored_projection(meta),
        )

    def _world_box(self) -> Float[Tensor, "2 3"]:
        """What planes resolve most, in the world."""
        space = self._space()
        if space.projection is not None:
            return torch.tensor([[-1.0] * 3, [1.0] * 3])
        centre, half = space.region()
        return torch.stack((centre - half, centre + half))

    def _metadata(self) -> dict[str, Any]:
        space = self._space()
        if space.projection is None:
            return {}
        return {"forward_facing": ForwardFacing(space.projection, space.box)}

    def _cameras(self, split: str) -> Cameras:
        stored = self.scene.cameras
        if stored is None or not len(stored.split):
            return _one_camera(self._world_box())
        chosen = stored.split == (0 if split == "train" else 1)
        if not chosen.any():
            chosen[:] = True
        numbers = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(stored, name)[chosen]))
            for name in (f.name for f in dataclasses.fields(stored) if f.name != "split")
        }
        _check_cameras(numbers)
        distortion = numbers["distortion"]
        columns = {name: values[:, None] for name, values in numbers.items()}
        return Cameras(
            camera_to_worlds=numbers["camera_to_worlds"],
            fx=columns["fx"],
            fy=columns["fy"],
            cx=columns["cx"],
            cy=columns["cy"],
            width=columns["width"].long(),
            height=columns["height"].long(),
            camera_type=columns["camera_type"].long(),
            distortion_params=distortion if bool(distortion.any()) else None,
        )


def without_coefficients(scene: codec.Scene) -> codec.Scene:
    """The scene's cameras and meta, which take some kilobytes."""
    return dataclasses.replace(scene, grids=(), networks={}, occupancy=None)


def read_stored_capture(path: Path) -> StoredCapture:
    """Reads what a .mwnf file knows of its capture, fast: without detail levels.

    Raises:
        CodecError: if it is damaged or no scene of ours.
        MissingCaptureError: if there is none.
    """
    if not path.is_file():
        raise MissingCaptureError(
            f"{path}: no such file; expected the .mwnf file that this run starts from, or its own: "
            "copy it there"
        )
    stored = StoredCapture(without_coefficients(codec.read(path, levels=0)))
    check_is_ours(stored.scene.meta)
    return stored


class CamerasOnlyDataset(PhotoDataset):
    """Cameras of photos that are not here; small grey pictures stand for them."""

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "h w 3"]:
        """Grey, of the shape of the camera's pictures."""
        width, height = self._size(image_idx)
        h = min(height, _GREY_HEIGHT)
        w = max(1, min(round(h * width / height), 16 * h))
        return np.full((h, w, 3), _GREY, np.uint8)


def _similarity(transform: Float[Tensor, "3 4"], scale: float) -> Float[Tensor, "4 4"]:
    """A data parser's transform, which comes first, and scale, as one matrix."""
    whole = torch.eye(4, dtype=torch.double)
    whole[:3] = scale * transform.double()
    return whole


def _positive(scale: Any) -> float:
    """A scale; 1 where there is none."""
    if scale is None:
        return 1.0
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise codec.CodecError(
            f"meta: dataparser scale {scale!r}; expected a positive number: the file is damaged, "
            "ask for it again"
        )
    return float(scale)


def _check_cameras(numbers: dict[str, Tensor]) -> None:
    kinds = torch.tensor([kind.value for kind in CameraType])
    sizes = torch.stack((numbers["width"], numbers["height"]))
    focal = torch.stack((numbers["fx"], numbers["fy"]))
    floats = [values for values in numbers.values() if values.is_floating_point()]
    for is_right, what in (
        (torch.isin(numbers["camera_type"], kinds), "of a kind that nerfstudio has not"),
        ((sizes >= 1) & (sizes <= _LONGEST_SIDE), f"of other than 1 to {_LONGEST_SIDE} pixels"),
        (focal > 0, "without a focal length"),
        (torch.cat([values.flatten() for values in floats]).isfinite(), "not finite"),
    ):
        if not bool(is_right.all()):
            raise codec.CodecError(f"cameras: one is {what}; the file is damaged, ask for it again")


def _one_camera(box: Float[Tensor, "2 3"]) -> Cameras:
    """Looks along y at the middle of a box, from where all of it is seen."""
    # From where a sphere around the box is seen as wide as the picture.
    middle, reach = box.mean(dim=0), math.sqrt(5) / 2 * float((box[1] - box[0]).norm())
    pose = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, -reach], [0.0, 1.0, 0.0, 0.0]])
    pose[:, 3] += middle
    return Cameras(
        camera_to_worlds=pose[None],
        fx=float(_VIEW),
        fy=float(_VIEW),
        cx=_VIEW / 2,
        cy=_VIEW / 2,
        width=_VIEW,
        height=_VIEW,
    )
