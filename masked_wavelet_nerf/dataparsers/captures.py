"""What data parsers of captures check alike: folders, photos, poses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from masked_wavelet_nerf.errors import UserError

TOLERANCE = 1e-3
"""Of the numbers in a rotation."""


class CaptureError(UserError):
    """A capture cannot be used."""


class MissingCaptureError(CaptureError, FileNotFoundError):
    """A capture, or a file of it, is not there; an OSError, as nerfstudio's own parsers raise."""


def check_pose(pose: Float[np.ndarray, "3 4"], source: str) -> None:
    """Checks that a pose is a rotation and a position.

    Raises:
        CaptureError: if it holds NaN or infinity, is scaled or sheared (RᵀR is off the identity by
            more than 1e-3), or mirrors; it starts with ``source``.
    """
    if not np.isfinite(pose).all():
        raise CaptureError(
            f"{source}: the pose is not finite; expected numbers: leave this view out or "
            "estimate the poses again"
        )
    rotation = pose[:, :3]
    error = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if error > TOLERANCE or np.linalg.det(rotation) < 0:
        raise CaptureError(
            f"{source}: not a rotation: RᵀR is off the identity by {error:.2g} and the "
            f"determinant is {np.linalg.det(rotation):.2g}; expected at most {TOLERANCE:g}, and "
            "1: remove scale, shear and mirroring from the poses"
        )


def check_positive(name: str, value: float | int) -> None:
    """Checks a setting.

    Raises:
        CaptureError: if it is not positive and finite.
    """
    if not (np.isfinite(value) and value > 0):
        raise CaptureError(f"{name} {value:g}: expected a positive number")


def check_folder(folder: Path, expected: str) -> None:
    """Checks that a folder is there.

    Raises:
        MissingCaptureError: if it is not.
    """
    if not folder.is_dir():
        raise MissingCaptureError(
            f"{folder}: no such folder; expected {expected}: check the path given as --data"
        )


def list_photos(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Photos of a folder, by name; suffixes in lower case.

    Raises:
        MissingCaptureError: if there are none.
    """
    # Files with a dot in front are what macOS leaves in archives.
    photos = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    if not photos:
        raise MissingCaptureError(
            f"{folder}: no photos; expected files named *{' or *'.join(suffixes)}: "
            "unpack the capture again"
        )
    return photos
