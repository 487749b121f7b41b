"""The grids section: names, shapes, steps and counts of all bands, before any coefficient.

    bits (u8) · number of grids (varint) · for each grid:
        name · number of dimensions D (u8: 1 line, 2 plane, 3 voxels) · size (D varints)
        · C (varint) · number of bands (u8) · for each band, its level counting from 0:
            spatial size (D varints) · step (float32) · number of kept coefficients (varint)

B is 1 at level 0, else 2**D - 1. From this a reader knows every count that follows, and `describe`
everything but the coefficients themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from masked_wavelet_codec.binary import Reader, Writer, count_elements
from masked_wavelet_codec.scene import Grid
from masked_wavelet_codec.validation import check_step

__all__ = ["BandLayout", "GridLayout", "Layout", "encode_layout", "layout_version", "read_layout"]


@dataclass(frozen=True)
class BandLayout:
    """All of a band but its coefficients."""

    level: int
    shape: tuple[int, ...]
    """(C, B, *spatial)."""
    count: int
    """Number of coefficients: the product of ``shape``."""
    num_kept: int
    step: float


@dataclass(frozen=True)
class GridLayout:
    """All of a grid but its coefficients."""

    name: str
    size: tuple[int, ...]
    bands: tuple[BandLayout, ...]


@dataclass(frozen=True)
class Layout:
    """All of a scene's grids but their coefficients."""

    bits: int
    grids: tuple[GridLayout, ...]

    @property
    def num_levels(self) -> int:
        """Levels of the deepest grid, the approximation included."""
        return max((len(grid.bands) for grid in self.grids), default=0)

    def at_level(self, level: int) -> list[tuple[int, BandLayout]]:
        """Position of the grid, and band, of all grids that have this level."""
        return [
            (number, grid.bands[level])
            for number, grid in enumerate(self.grids)
            if level < len(grid.bands)
        ]


def layout_version(grids: Sequence[Grid]) -> tuple[int, int]:
    """The oldest format version that knows grids of these dimensions: voxels came with 1.2."""
    return (1, 2) if any(len(grid.size) == 3 for grid in grids) else (1, 0)


def encode_layout(bits: int, grids: Sequence[Grid]) -> bytes:
    """Payload of the section."""
    writer = Writer()
    writer.u8(bits)
    writer.varint(len(grids))
    for grid in grids:
        writer.text(grid.name)
        writer.u8(len(grid.size))
        for length in grid.size:
            writer.varint(length)
        writer.varint(grid.bands[0].values.shape[0] if grid.bands else 0)
        writer.u8(len(grid.bands))
        for band in grid.bands:
            for length in band.values.shape[2:]:
                writer.varint(length)
            writer.f32(band.step)
            writer.varint(int(np.count_nonzero(band.mask)))
    return writer.getvalue()


def read_layout(reader: Reader) -> Layout:
    """Parse and check the section; takes memory in proportion to its payload only.

    Raises:
        CodecError: if it is damaged.
    """
    bits = reader.u8()
    if not 2 <= bits <= 16:
        raise reader.error(f"{bits} quantiser bits, expected 2 to 16")
    grids, names = [], set()
    for _ in range(reader.varint()):
        grid = _read_grid(reader)
        if grid.name in names:
            raise reader.error(f"the name {grid.name!r} comes twice")
        names.add(grid.name)
        grids.append(grid)
    reader.finish()
    return Layout(bits, tuple(grids))


def _read_grid(reader: Reader) -> GridLayout:
    name, num_dims = reader.text(), reader.u8()
    if num_dims not in (1, 2, 3):
        raise reader.error(f"{name!r} has {num_dims} dimensions, expected 1 to 3")
    size, channels = reader.varints(num_dims), reader.varint()
    if max(size) >= 2**31:
        raise reader.error(f"{name!r} has the size {size}, expected less than 2**31")
    bands = []
    for level in range(reader.u8()):
        shape = (channels, 1 if level == 0 else 2**num_dims - 1, *reader.varints(num_dims))
        count = count_elements(shape, reader.where)
        step, num_kept = reader.f32(), reader.varint()
        check_step(step, f"{reader.where}: {name!r}, level {level}, step")
        if num_kept > count:
            raise reader.error(f"{name!r}, level {level}: {num_kept} kept of {count} coefficients")
        bands.append(BandLayout(level, shape, count, num_kept, step))
    return GridLayout(name, size, tuple(bands))
