"""What a scene must satisfy before it is written, so that reading it back gives the same scene."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from masked_wavelet_codec.binary import count_elements
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.scene import Band, Cameras, Grid, QuantisedArray, Scene

__all__ = ["CAMERA_FIELDS", "MAX_DIMS", "check_meta", "check_scene", "check_step", "largest_value"]

CAMERA_FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "camera_to_worlds": ("<f4", (3, 4)),
    "fx": ("<f4", ()),
    "fy": ("<f4", ()),
    "cx": ("<f4", ()),
    "cy": ("<f4", ()),
    "width": ("<i4", ()),
    "height": ("<i4", ()),
    "distortion": ("<f4", (6,)),
    "camera_type": ("<i4", ()),
    "split": ("u1", ()),
}
"""Fields of ``Cameras`` in file order: dtype and shape for one camera."""

_MAX_META_DEPTH = 32
MAX_DIMS = 32
"""Of an array: numpy 1's limit."""
LARGEST_INT16 = 2**15 - 1
_MAX_BANDS = 255  # their number is one byte


def largest_value(bits: int) -> int:
    """Q = 2**(bits - 1) - 1, the largest integer of the symmetric quantiser."""
    return 2 ** (bits - 1) - 1


def check_scene(scene: Scene) -> None:
    """Check every field.

    Raises:
        CodecError: naming the field, what was expected, what came, and the remedy.
    """
    _expect_type(scene, Scene, "scene")
    _expect_type(scene.meta, dict, "meta")
    check_meta(scene.meta, "meta")
    _expect_type(scene.bits, int, "bits")
    if not 2 <= scene.bits <= 16:
        raise CodecError(f"bits: expected 2 to 16, got {scene.bits}; quantise to int16 at most")
    _expect_type(scene.grids, tuple, "grids")
    for number, grid in enumerate(scene.grids):
        _check_grid(grid, scene.bits, f"grids[{number}]")
    _expect_unique((grid.name for grid in scene.grids), "grids")
    _expect_type(scene.networks, dict, "networks")
    for name, array in scene.networks.items():
        _expect_text(name, "networks")
        if isinstance(array, QuantisedArray):
            _expect_array(array.values, np.int16, f"networks[{name!r}].values")
            if array.values.size and int(array.values.min()) < -LARGEST_INT16:
                raise CodecError(f"networks[{name!r}].values: expected ±{LARGEST_INT16}; clip them")
            check_step(array.step, f"networks[{name!r}].step")
        else:
            _expect_array(array, np.float32, f"networks[{name!r}]")
    if scene.occupancy is not None:
        _expect_array(scene.occupancy, np.bool_, "occupancy", num_dims=3)
    if scene.cameras is not None:
        _check_cameras(scene.cameras)


def check_meta(value: object, where: str, depth: int = 1) -> None:
    """Check that a value is JSON that comes back as the same Python objects.

    Raises:
        CodecError: naming the path within ``where``.
    """
    if depth > _MAX_META_DEPTH:
        raise CodecError(f"{where}: nested deeper than {_MAX_META_DEPTH}; flatten it")
    if type(value) is dict:
        for key, item in value.items():
            _expect_text(key, f"{where}: a key")
            check_meta(item, f"{where}.{key}", depth + 1)
    elif type(value) is list:
        for number, item in enumerate(value):
            check_meta(item, f"{where}[{number}]", depth + 1)
    elif type(value) is str:
        _expect_text(value, where)
    elif type(value) is float:
        if not math.isfinite(value):
            raise CodecError(f"{where}: expected a finite float, got {value}; leave it out")
    elif type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise CodecError(f"{where}: expected an integer of 64 bits; write it as a string")
    elif value is not None and type(value) is not bool:
        raise CodecError(
            f"{where}: expected str, int, float, bool, None, list or dict, got "
            f"{type(value).__name__}; convert it (tuples to lists, numpy scalars by .item())"
        )


def check_step(step: float, where: str) -> None:
    """Check that a quantiser step is finite, not negative (-0.0 included) and exact in float32.

    Raises:
        CodecError: naming ``where``.
    """
    _expect_type(step, float, where)
    if not math.isfinite(step) or math.copysign(1.0, step) < 0:
        raise CodecError(f"{where}: expected a finite step of at least 0, got {step}")
    with np.errstate(over="ignore"):
        is_exact = float(np.float32(step)) == step
    if not is_exact:
        raise CodecError(f"{where}: {step!r} is not exact in float32; pass float(np.float32(step))")


def _check_grid(grid: Grid, bits: int, where: str) -> None:
    _expect_type(grid, Grid, where)
    _expect_text(grid.name, f"{where}.name")
    where = f"grid {grid.name!r}"
    _expect_type(grid.size, tuple, f"{where}.size")
    if len(grid.size) not in (1, 2, 3):
        raise CodecError(f"{where}.size: expected (N,), (H, W) or (D, H, W), got {grid.size}")
    for length in grid.size:
        _expect_type(length, int, f"{where}.size")
        if not 0 <= length < 2**31:
            raise CodecError(f"{where}.size: expected lengths of 0 to 2**31 - 1, got {grid.size}")
    _expect_type(grid.bands, tuple, f"{where}.bands")
    if len(grid.bands) > _MAX_BANDS:
        raise CodecError(f"{where}.bands: expected {_MAX_BANDS} at most, got {len(grid.bands)}")
    for level, band in enumerate(grid.bands):
        _check_band(band, level, len(grid.size), bits, f"{where}.bands[{level}]")
    channels = {band.values.shape[0] for band in grid.bands}
    if len(channels) > 1:
        raise CodecError(f"{where}.bands: expected one channel count, got {sorted(channels)}")


def _check_band(band: Band, level: int, num_dims: int, bits: int, where: str) -> None:
    _expect_type(band, Band, where)
    _expect_type(band.level, int, f"{where}.level")
    if band.level != level:
        raise CodecError(
            f"{where}.level: expected {level}, got {band.level}; give levels 0, 1, … in order"
        )
    _expect_array(band.values, np.int16, f"{where}.values", num_dims=num_dims + 2)
    _expect_array(band.mask, np.bool_, f"{where}.mask", num_dims=num_dims + 2)
    num_bands = 1 if level == 0 else 2**num_dims - 1
    if band.values.shape[1] != num_bands:
        raise CodecError(
            f"{where}.values: expected (C, {num_bands}, *spatial) at level {level}, got "
            f"{band.values.shape}"
        )
    if band.mask.shape != band.values.shape:
        raise CodecError(
            f"{where}.mask: expected the shape of values, {band.values.shape}, got "
            f"{band.mask.shape}"
        )
    check_step(band.step, f"{where}.step")
    if band.values.size == 0:
        return
    smallest, largest, limit = int(band.values.min()), int(band.values.max()), largest_value(bits)
    if smallest < -limit or largest > limit:
        raise CodecError(
            f"{where}.values: expected -{limit} to {limit} for {bits} bits, got {smallest} to "
            f"{largest}; clip them or raise bits"
        )
    if band.values[~band.mask].any():
        raise CodecError(f"{where}.values: expected 0 where the mask drops; multiply by the mask")


def _check_cameras(cameras: Cameras) -> None:
    _expect_type(cameras, Cameras, "cameras")
    num_cameras = None
    for name, (dtype, shape) in CAMERA_FIELDS.items():
        where, array = f"cameras.{name}", getattr(cameras, name)
        _expect_array(array, np.dtype(dtype).newbyteorder("="), where, num_dims=1 + len(shape))
        num_cameras = len(array) if num_cameras is None else num_cameras
        if array.shape != (num_cameras, *shape):
            raise CodecError(f"{where}: expected {(num_cameras, *shape)}, got {array.shape}")
    if (cameras.split > 1).any():
        raise CodecError("cameras.split: expected 0 (training) or 1 (evaluation)")


def _expect_type(value: Any, kind: type, where: str) -> None:
    # The exact type: a subclass (bool for int, np.float64 for float) would not come back as itself.
    if type(value) is not kind:
        raise CodecError(
            f"{where}: expected {kind.__name__}, got {type(value).__name__}; convert it with "
            f"{kind.__name__}(…)"
        )


def _expect_text(value: Any, where: str) -> None:
    _expect_type(value, str, where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CodecError(f"{where}: {value!r} has lone surrogates, which UTF-8 lacks") from None


def _expect_array(
    array: Any, dtype: np.dtype | type, where: str, num_dims: int | None = None
) -> None:
    _expect_type(array, np.ndarray, where)
    if array.dtype != dtype:
        raise CodecError(
            f"{where}: expected {np.dtype(dtype)}, got {array.dtype}; convert it with "
            f".astype(np.{np.dtype(dtype)})"
        )
    if num_dims is not None and array.ndim != num_dims:
        raise CodecError(f"{where}: expected {num_dims} dimensions, got shape {array.shape}")
    if array.ndim > MAX_DIMS:
        raise CodecError(f"{where}: expected {MAX_DIMS} dimensions at most, got {array.ndim}")
    count_elements(array.shape, where)


def _expect_unique(names: Iterable[str], where: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise CodecError(f"{where}: the name {name!r} comes twice; rename one")
        seen.add(name)
