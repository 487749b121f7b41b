"""What a file holds: the quantised grids of a trained model and all else that rendering needs.

Letters: C channels, B bands, H and W plane size, D, H and W of voxels, N line length (or number of
cameras), L levels.
Levels are numbered coarse to fine: 0 is the approximation, 1 the coarsest details, L the finest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

BYTES_PER_COEFFICIENT = 3
"""Of a decoded band: an int16 and a bool."""

__all__ = ["Band", "Cameras", "Grid", "QuantisedArray", "Scene", "equal"]


@dataclass(frozen=True)
class Band:
    """The coefficients of one grid at one level: ``values * step`` where kept, zero elsewhere."""

    level: int
    """0 = approximation, or the samples themselves where a grid is untransformed."""
    values: np.ndarray
    """int16 (C, B, *spatial). B = 1 at level 0; at details 7 for voxels, 3 for a plane, 1 for
    a line.
    Zero where dropped."""
    mask: np.ndarray
    """bool, shape of ``values``. True = kept; a kept coefficient may be zero."""
    step: float
    """Quantiser step: finite, not negative, and exact in float32."""


@dataclass(frozen=True)
class Grid:
    """One plane, one line or one block of voxels of the field."""

    name: str
    """Unique within the scene, e.g. ``density_planes.0``."""
    size: tuple[int, ...]
    """Spatial size before padding and transform: (D, H, W) of voxels, (H, W) of a plane, (N,) of
    a line."""
    bands: tuple[Band, ...]
    """Levels 0, 1, … L in this order, all with the same C."""


@dataclass(frozen=True)
class Cameras:
    """The cameras of training and evaluation, N of them."""

    camera_to_worlds: np.ndarray
    """float32 (N, 3, 4)."""
    fx: np.ndarray
    """float32 (N,), pixels; likewise ``fy``, ``cx``, ``cy``."""
    fy: np.ndarray
    cx: np.ndarray
    cy: np.ndarray
    width: np.ndarray
    """int32 (N,), pixels; likewise ``height``."""
    height: np.ndarray
    distortion: np.ndarray
    """float32 (N, 6): k1, k2, k3, k4, p1, p2."""
    camera_type: np.ndarray
    """int32 (N,), nerfstudio's ``CameraType`` value."""
    split: np.ndarray
    """uint8 (N,): 0 = training, 1 = evaluation."""


@dataclass(frozen=True)
class QuantisedArray:
    """A network's array as integers: ``values * step``."""

    values: np.ndarray
    """int16 of any shape, within ±32767."""
    step: float
    """Finite, not negative, and exact in float32."""

    def to_floats(self) -> np.ndarray:
        """The array, float32."""
        return self.values.astype(np.float32) * np.float32(self.step)


@dataclass(frozen=True)
class Scene:
    """A trained model as integers and plain arrays."""

    meta: dict
    """Strictly JSON: str keys, lists (no tuples), finite floats, integers of at most 64 bits."""
    bits: int
    """Quantiser bits, 2 to 16: every |value| is at most 2**(bits - 1) - 1."""
    grids: tuple[Grid, ...]
    networks: dict[str, np.ndarray | QuantisedArray]
    """float32 arrays of any shape, 0-d included, or, for the profile ``range``, integers; the order
    of names carries no meaning."""
    occupancy: np.ndarray | None
    """bool (X, Y, Z)."""
    cameras: Cameras | None


def equal(a: Scene, b: Scene) -> bool:
    """Whether two scenes are the same in every field, dtype, shape and bit (NaN payloads too)."""
    return _is_same(a, b)


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False  # 1, 1.0 and True are three things in JSON
    if isinstance(a, (Scene, Grid, Band, Cameras, QuantisedArray)):
        return all(_is_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return a.hex() == b.hex()  # tells 0.0 from -0.0
    return a == b
