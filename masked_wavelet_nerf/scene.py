"""Trained model ⇄ codec scene: integers, masks, networks, occupancy and box.

The integers are those of the quantiser that training used, so a decoded model renders what the
evaluated one did. Knows neither nerfstudio nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from masked_wavelet_codec import Band, Cameras, Grid, QuantisedArray, Scene
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.field import WaveletPlaneField
from masked_wavelet_nerf.masking import QuantisedBand, round_to_integers
from masked_wavelet_nerf.planes import CoefficientGrid
from masked_wavelet_nerf.sampling import OccupancyGrid


@runtime_checkable
class _Model(Protocol):
    """The parts of a model that a scene holds."""

    field: WaveletPlaneField
    occupancy: OccupancyGrid
    aabb: Tensor
    projection: Tensor | None


_FEW_CELLS = 2**16
"""Of an occupancy grid: up to here, it takes less than a kilobyte."""


class SceneMismatchError(UserError):
    """A scene does not fit the model it is loaded into."""


def _array(tensor: Tensor) -> np.ndarray:
    # A copy: training may go on while the scene is being written.
    return np.array(tensor.detach().cpu().numpy(), order="C")


def scene_from_model(
    model: _Model,
    bits: int,
    meta: Mapping[str, Any],
    cameras: Cameras | None,
) -> Scene:
    """The scene that the codec writes.

    Args:
        model: trained model.
        bits: quantiser width 2–16: the model's own, or, if it trained without one, any.
        meta: what else the file says, JSON only. ``box`` (aabb) is added, and ``projection`` where
            the scene has one.
        cameras: cameras of the capture, if known.
    """
    placed: dict[str, Any] = {"box": model.aabb.tolist()}
    if model.projection is not None:
        placed["projection"] = model.projection.tolist()
    return Scene(
        meta={**meta, **placed},
        bits=bits,
        grids=stored_grids(model.field, bits),
        networks=stored_networks(model.field),
        occupancy=stored_occupancy(condensed(model.occupancy, model.field.resolution)),
        cameras=cameras,
    )


def stored_grids(field: WaveletPlaneField, bits: int) -> tuple[Grid, ...]:
    """The integers of all planes and lines, as the codec takes them.

    Args:
        field: trained field.
        bits: quantiser width, where it trained without one.
    """
    grids = []
    for name, grid in field.grids().items():
        bands = [
            Band(level, _array(band.values), _array(band.mask), float(band.step))
            for level, band in enumerate(grid.integers(bits))
        ]
        grids.append(Grid(name, grid.spatial_size, tuple(bands)))
    return tuple(grids)


def stored_networks(field: WaveletPlaneField) -> dict[str, np.ndarray | QuantisedArray]:
    """Appearance map and colour network, as the codec takes them."""
    bits = field.config.network_bits
    return {name: _stored(value, bits) for name, value in field.networks().items()}


def stored_occupancy(occupancy: OccupancyGrid) -> np.ndarray | None:
    """Its cells, as the codec takes them; None while nothing is known."""
    return _array(occupancy.cells) if occupancy.is_known else None


def condensed(occupancy: OccupancyGrid, resolution: tuple[int, int, int]) -> OccupancyGrid:
    """What a file holds of the occupancy: half as fine as the planes, unless cells are few.

    It takes a quarter of the bytes then, a tenth of a small file, for 0.01 dB; and there are
    hardly more samples, as a margin of a voxel lies around what is opaque already.

    Args:
        occupancy: as the model has it; a decoded one is half as fine already, and stays.
        resolution: voxels of the planes along x, y and z.
    """
    cells = occupancy.cells
    is_fine = any(n > (m + 1) // 2 for n, m in zip(cells.shape, resolution, strict=True))
    return occupancy.halved() if is_fine and cells.numel() > _FEW_CELLS else occupancy


def _stored(weights: Tensor, bits: int | None) -> np.ndarray | QuantisedArray:
    """Weights as the integers that the model computes with, or as they are."""
    if bits is None:
        return _array(weights)
    integers, step = round_to_integers(weights, bits)
    return QuantisedArray(_array(integers.to(torch.int16)), float(step))


@torch.no_grad()
def load_scene_into(model: _Model, scene: Scene) -> None:
    """Gives ``model`` the scene's coefficients, masks, networks, occupancy and box.

    Raises:
        SceneMismatchError: naming the part that the model has not, or has in another shape.
    """
    grids = model.field.grids()
    if set(grids) != {grid.name for grid in scene.grids}:
        raise SceneMismatchError(
            f"grids: the model has {sorted(grids)}, the scene {sorted(g.name for g in scene.grids)}"
        )
    for stored in scene.grids:
        _load_grid(grids[stored.name], stored)
    networks = model.field.networks()
    if set(networks) != set(scene.networks):
        raise SceneMismatchError(
            f"networks: the model has {sorted(networks)}, the scene {sorted(scene.networks)}"
        )
    for name, parameter in networks.items():
        stored = scene.networks[name]
        if isinstance(stored, QuantisedArray):
            stored = stored.to_floats()
        if tuple(stored.shape) != tuple(parameter.shape):
            raise SceneMismatchError(
                f"networks {name}: expected shape {tuple(parameter.shape)}, got {stored.shape}"
            )
        parameter.copy_(torch.from_numpy(stored))
    if scene.occupancy is not None:
        model.occupancy.cells = torch.from_numpy(scene.occupancy.copy()).to(model.aabb.device)
    model.aabb.copy_(torch.tensor(scene.meta["box"]))


def _load_grid(grid: CoefficientGrid, stored: Grid) -> None:
    bands = [
        QuantisedBand(
            torch.from_numpy(band.values.astype(np.int16)),
            torch.from_numpy(band.mask.copy()),
            torch.tensor(band.step, dtype=torch.float32),
        )
        for band in stored.bands
    ]
    expected = [p.shape[:2] for p in grid.coefficients]
    found = [band.values.shape[:2] for band in bands]
    if expected != found or len(stored.size) != len(grid.spatial_size):
        raise SceneMismatchError(
            f"grid {stored.name}: expected (channels, bands) {[tuple(s) for s in expected]} for "
            f"its levels, got {[tuple(s) for s in found]}"
        )
    grid.load_integers(bands, stored.size)


def config_to_json(config: Any) -> dict[str, Any]:
    """The plain fields of a configuration: numbers, strings, booleans, None and tuples of them.

    Paths, classes and nested objects are left out: nothing of the exporter's machine gets through.
    """
    plain = (bool, int, float, str, type(None))
    found = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, plain):
            found[entry.name] = value
        elif isinstance(value, tuple) and all(isinstance(item, plain) for item in value):
            found[entry.name] = list(value)
    return found


def config_from_json(default: Any, stored: Mapping[str, Any]) -> Any:
    """``default`` with the stored fields that it knows; those of other versions are ignored.

    Raises:
        SceneMismatchError: if a field has another type than the default's.
    """
    assert is_dataclass(default)
    known = {}
    for entry in fields(default):
        if entry.name.startswith("_") or entry.name not in stored:
            continue
        value, current = stored[entry.name], getattr(default, entry.name)
        if isinstance(value, list):
            value = tuple(value)
        number = isinstance(value, (int, float)) and isinstance(current, (int, float))
        if None not in (value, current) and not number and not isinstance(value, type(current)):
            raise SceneMismatchError(
                f"{type(default).__name__}.{entry.name}: expected {type(current).__name__}, "
                f"got {value!r}"
            )
        known[entry.name] = value
    return replace(default, **known)  # pyright: ignore[reportArgumentType]
