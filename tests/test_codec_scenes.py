"""Scenes that the codec's tests share, made by formula, and the laws that those scenes obey."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import masked_wavelet_codec as codec
from masked_wavelet_codec import poses

PROFILES = ("paper", "range")


def largest(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def make_band(level, shape, bits=8, step=0.25, residue=3, modulus=11) -> codec.Band:
    """Integers by formula: i² mod 11 < 3 is kept, with values spread over the whole range."""
    index = np.arange(np.prod(shape, dtype=np.int64))
    mask = (index * index) % modulus < residue
    values = (index * 7919 + 13) % (2 * largest(bits) + 1) - largest(bits)
    values[index % 5 == 2] = 0  # some are kept although zero
    values[~mask] = 0
    return codec.Band(level, values.astype(np.int16).reshape(shape), mask.reshape(shape), step)


def make_plane(name, size, channels, levels, bits=8, **kwargs) -> codec.Grid:
    """A plane, or voxels, padded to a multiple of 2**levels, as the transform does it."""
    padded = [-(-length // 2**levels) * 2**levels for length in size]
    bands = []
    for level in range(levels + 1):
        halvings = levels if level == 0 else levels + 1 - level
        spatial = [length >> halvings for length in padded]
        shape = (channels, 1 if level == 0 else 2 ** len(size) - 1, *spatial)
        bands.append(
            make_band(level, shape, bits, step=2.0**-level / 3 // 2**-20 * 2**-20, **kwargs)
        )
    return codec.Grid(name, tuple(size), tuple(bands))


def make_line(name, length, channels, bits=8, **kwargs) -> codec.Grid:
    return codec.Grid(name, (length,), (make_band(0, (channels, 1, length), bits, **kwargs),))


def make_cameras(count: int) -> codec.Cameras:
    index = np.arange(count)
    constant = np.ones(count, np.float32)
    return codec.Cameras(
        camera_to_worlds=(np.arange(12 * count) % 97 / 16).astype(np.float32).reshape(-1, 3, 4),
        fx=138.75 * constant,
        fy=138.5 * constant,
        cx=50 * constant,
        cy=49.5 * constant,
        width=np.full(count, 100, np.int32),
        height=(90 + index % 3).astype(np.int32),
        distortion=(np.arange(6 * count) % 7 / -64).astype(np.float32).reshape(-1, 6),
        camera_type=np.ones(count, np.int32),
        split=(index % 4 == 0).astype(np.uint8),
    )


def make_posed_cameras(count: int, exponent: int = 2) -> codec.Cameras:
    """With poses on the lattice: turns and places over all of their ranges."""
    k = np.arange(3 * count).reshape(-1, 3)
    turns = k * 100_003 % 600_001 - 300_000
    places = np.clip(k * 70_001 % 2**19 - 2**18, -(2**18), 2**18)
    placed = poses.matrices(poses.Poses(exponent, turns, places))
    return dataclasses.replace(make_cameras(count), camera_to_worlds=placed)


def make_scene(bits: int = 8, **changes) -> codec.Scene:
    """All kinds of field, small: odd sizes, lines, levels 2 and 0, 0-d and empty arrays."""
    x, y, z = np.meshgrid(*map(np.arange, (9, 10, 11)), indexing="ij")
    scene = codec.Scene(
        meta={
            "method": "masked-wavelet",
            "box": [[-1.5, -1.5, -1.0], [1.5, 1.5, 1.0]],
            "nested": {"none": None, "true": True, "int": -3, "name": "Zoë 景", "list": []},
            "psnr": 32.17,
        },
        bits=bits,
        grids=(
            make_plane("density_planes.0", (13, 9), 3, levels=2, bits=bits),
            make_line("density_lines.0", 11, 3, bits=bits, step=0.125),
            make_plane("appearance_planes.0", (6, 8), 5, levels=1, bits=bits, residue=1),
        ),
        networks={
            "mlp.0.weight": (np.arange(35) % 17 / 16 - 0.5).astype(np.float32).reshape(5, 7),
            "mlp.0.bias": np.zeros((0, 3), np.float32),
            "background": np.array(0.75, np.float32),
        },
        occupancy=(x - 4) ** 2 + (y - 5) ** 2 + (z - 5) ** 2 < 20,
        cameras=make_cameras(6),
    )
    return dataclasses.replace(scene, **changes)


def with_integers(scene: codec.Scene, step: float = 0.0625) -> codec.Scene:
    """The scene with its largest network as the integers that its floats are sixteenths of."""
    networks = dict(scene.networks)
    values = (16 * networks["mlp.0.weight"]).astype(np.int16)
    networks["mlp.0.weight"] = codec.QuantisedArray(values, step)
    return dataclasses.replace(scene, networks=networks)


def replace_band(scene: codec.Scene, grid: int, band: int, **changes) -> codec.Scene:
    """The scene with fields of one band changed."""
    bands = list(scene.grids[grid].bands)
    bands[band] = dataclasses.replace(bands[band], **changes)
    return replace_grid(scene, grid, bands=tuple(bands))


def replace_grid(scene: codec.Scene, grid: int, **changes) -> codec.Scene:
    """The scene with fields of one grid changed."""
    grids = list(scene.grids)
    grids[grid] = dataclasses.replace(grids[grid], **changes)
    return dataclasses.replace(scene, grids=tuple(grids))


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_formula_reaches_the_limits_of_the_range(bits):
    scene = make_scene(bits, grids=(make_line("a", 40000, 5, bits, residue=11),))
    values = scene.grids[0].bands[0].values
    assert values.min() == -largest(bits) and values.max() == largest(bits)


def test_scene_has_kept_zeros_and_bit_counts_that_are_no_multiple_of_8():
    scene = make_scene()
    bands = [band for grid in scene.grids for band in grid.bands]
    assert any((band.mask & (band.values == 0)).any() for band in bands)
    assert sum(grid.bands[0].mask.size for grid in scene.grids) % 8
    assert sum(grid.bands[1].mask.size for grid in scene.grids if len(grid.bands) > 1) % 8 == 0


def test_equal_tells_every_field_apart():
    scene = make_scene()
    assert codec.equal(scene, make_scene())
    values = scene.grids[0].bands[1].values.copy()
    values[tuple(np.argwhere(scene.grids[0].bands[1].mask)[0])] += 1
    moved = dataclasses.replace(scene.cameras, fx=scene.cameras.fx + 1)
    others = [
        make_scene(bits=9),
        make_scene(meta={**scene.meta, "psnr": 32.18}),
        make_scene(meta={**scene.meta, "psnr": 32}),
        make_scene(networks={**scene.networks, "background": np.array(-0.75, np.float32)}),
        make_scene(networks={**scene.networks, "background": np.array([0.75], np.float32)}),
        with_integers(scene),
        with_integers(scene, step=0.25),
        make_scene(occupancy=~scene.occupancy),
        make_scene(occupancy=None),
        make_scene(cameras=moved),
        make_scene(cameras=None),
        make_scene(grids=scene.grids[::-1]),
        replace_grid(scene, 0, name="other"),
        replace_band(scene, 0, 1, step=0.5),
        replace_band(scene, 0, 1, values=values),
        replace_band(scene, 0, 1, values=scene.grids[0].bands[1].values.astype(np.int32)),
    ]
    for number, other in enumerate(others):
        assert not codec.equal(scene, other), number
    assert codec.equal(with_integers(scene), with_integers(make_scene()))
    assert not codec.equal(with_integers(scene), with_integers(scene, step=0.25))
    floats = with_integers(scene).networks["mlp.0.weight"].to_floats()
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, scene.networks["mlp.0.weight"])


def test_equal_tells_zero_from_minus_zero_and_true_from_one():
    assert not codec.equal(make_scene(meta={"a": 0.0}), make_scene(meta={"a": -0.0}))
    assert not codec.equal(make_scene(meta={"a": 1}), make_scene(meta={"a": True}))
