"""Plane transforms: multi-level wavelet, DCT and identity, as pure differentiable functions.

A plane is (C, H, W); its bands are an approximation and, per detail level, coarse to fine, the
horizontal, vertical and diagonal details (PyWavelets' cH, cV, cD). Wavelets use periodization: a
level halves both sides exactly. Planes whose sides are no multiple of 2^L are padded at their ends
by repeating the last texel, and cropped after the inverse.

Level scaling: stored details are the true ones times 2 at the coarsest level … L + 1 at the finest,
so that finer ones are learnt more slowly; the approximation's factor is 1.

Texel units: all bands of a level are divided by 2, so that a coefficient counts as much as a texel
at any level. Else the approximation of L levels is 2^L as large as the plane, and as slow to learn:
every step of Adam is as long as every other.

One level, per axis, is a pair of matrices (low, high): n × n/2 to merge two half-size bands into n
samples, n/2 × n to split them. With R for the rows, K for the columns and s for the level's factor,

    merge    X    = Σ_ij  R_i · X_ij · K_jᵀ        i, j ∈ {low, high}; details times s or 1 / s
    split    X_ij =       R_i · X · K_jᵀ

and the adjoint of either is the other one with Rᵀ, Kᵀ. So the inverse transform merges with the
synthesis matrices and its gradient splits with their transposes; the forward transform splits with
the analysis matrices. Padding and crop are rows and columns of the finest level's matrices.
In float32 on the CPU compiled loops over the taps do all of it (``native``). Else, on the CPU, a
matrix is kept as dense blocks around its band (``bench_transform`` compares), on other devices,
where calls cost more than zeros, as one block.

Letters: C channels, H, W plane size, h, w band size, n samples along an axis, L levels.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pywt
import torch
from jaxtyping import Float
from torch import Tensor

from masked_wavelet_nerf import native

TransformName = Literal["wavelet", "dct", "identity"]
"""What a plane is stored as: wavelet coefficients, DCT coefficients, or the spatial values."""

Size = tuple[int, int]

MAX_LEVELS = 6
_NO_LEVELS = native.levels([], [], merges=True)


class Bands(NamedTuple):
    """A transformed plane."""

    approximation: Float[Tensor, "C h w"]
    details: tuple[Float[Tensor, "C 3 h w"], ...]
    """Coarse to fine, each with its own h, w; the 3 are horizontal, vertical, diagonal."""


class PlaneTransform(ABC):
    """A plane to bands and back; holds no parameters, hashes by its settings.

    Both directions raise ``TypeError`` for other than float32 or float64, and ``ValueError`` for
    shapes that are not those of a plane, or of its bands.
    """

    num_levels: int = 0
    is_local: ClassVar[bool] = True
    """Whether coefficients have a place of their own."""

    def band_sizes(self, size: Size) -> tuple[Size, ...]:
        """(h, w) of the approximation, then of each detail level, coarse to fine."""
        return ((size[0], size[1]),)

    def taps(self, size: tuple[int, ...]) -> tuple[native.Levels, native.Levels] | None:
        """Inverse transform and its adjoint as the compiled loops take them, where they can."""
        return None

    def to_levels(self, plane: Float[Tensor, "C H W"]) -> list[Float[Tensor, "C _ _ _"]]:
        """:meth:`forward` as (C, 1, h, w), then (C, 3, h, w) for each detail level."""
        bands = self.forward(plane)
        return [bands.approximation[:, None], *bands.details]

    def from_levels(
        self, levels: Sequence[Float[Tensor, "C _ _ _"]], size: Size
    ) -> Float[Tensor, "C H W"]:
        """Inverse of :meth:`to_levels`."""
        return self.inverse(Bands(levels[0].squeeze(1), tuple(levels[1:])), size)

    @abstractmethod
    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """Analysis: plane to bands."""

    @abstractmethod
    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """Synthesis: bands to the plane of ``size`` = (H, W)."""

    def _check_plane(self, plane: Tensor) -> Size:
        _check_dtype("plane", plane)
        if plane.ndim != 3 or 0 in plane.shape[1:]:
            raise ValueError(
                f"plane: expected (C, H, W) with H, W >= 1, got {tuple(plane.shape)}; "
                "add or merge leading axes first"
            )
        return plane.shape[1], plane.shape[2]

    def _check_bands(self, bands: Bands, size: Size) -> None:
        num_channels = bands.approximation.shape[0]
        approximation, *details = self.band_sizes(size)
        expected = [(num_channels, *approximation), *((num_channels, 3, *s) for s in details)]
        found = [tuple(band.shape) for band in (bands.approximation, *bands.details)]
        if found != expected:
            raise ValueError(
                f"bands: expected shapes {expected} for a plane of {tuple(size)} with "
                f"{self.num_levels} levels, got {found}; use the size and transform that made them"
            )
        for band in (bands.approximation, *bands.details):
            _check_dtype("bands", band)


@dataclass(frozen=True)
class IdentityTransform(PlaneTransform):
    """The plane itself as its approximation."""

    def taps(self, size: tuple[int, ...]) -> tuple[native.Levels, native.Levels]:
        """No levels at all."""
        return _NO_LEVELS, _NO_LEVELS

    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """Returns ``plane`` as approximation."""
        self._check_plane(plane)
        return Bands(plane, ())

    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """Returns the approximation."""
        self._check_bands(bands, size)
        return bands.approximation


@dataclass(frozen=True)
class DCTTransform(PlaneTransform):
    """Orthonormal 2-D DCT-II of the whole plane; all coefficients in ``approximation``."""

    is_local: ClassVar[bool] = False

    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """D_H · X · D_Wᵀ."""
        size = self._check_plane(plane)
        rows, columns = (dct_matrix(n, plane.dtype, plane.device) for n in size)
        with torch.autocast(plane.device.type, enabled=False):
            return Bands(rows @ plane @ columns.T, ())

    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """D_Hᵀ · X · D_W."""
        self._check_bands(bands, size)
        x = bands.approximation
        rows, columns = (dct_matrix(n, x.dtype, x.device) for n in size)
        with torch.autocast(x.device.type, enabled=False):
            return rows.T @ x @ columns


@dataclass(frozen=True)
class WaveletTransform(PlaneTransform):
    """Multi-level separable wavelet transform with periodization."""

    wavelet: str = "bior4.4"
    """Name of a discrete PyWavelets wavelet."""
    num_levels: int = 4
    level_scaling: bool = True
    texel_units: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.num_levels <= MAX_LEVELS:
            raise ValueError(f"num_levels: expected 0 to {MAX_LEVELS}, got {self.num_levels}")
        if self.wavelet not in pywt.wavelist(kind="discrete"):  # pyright: ignore[reportAttributeAccessIssue]
            kind = "a continuous one" if self.wavelet in pywt.wavelist() else "no wavelet"  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                f"wavelet: expected the name of a discrete wavelet, got {self.wavelet!r} ({kind} of"
                " PyWavelets); use one of pywt.wavelist(kind='discrete'): haar, db2, bior4.4, …"
            )

    def band_sizes(self, size: Size) -> tuple[Size, ...]:
        """Halved level by level from the padded size."""
        unit = 2**self.num_levels
        height, width = (-(-n // unit) * unit for n in size)
        shifts = [self.num_levels, *range(self.num_levels, 0, -1)]
        return tuple((height >> shift, width >> shift) for shift in shifts)

    def level_scale(self, level: int) -> float:
        """What stored details of a level, 1 the coarsest, are multiplied by."""
        return float(level + 1) if self.level_scaling else 1.0

    def taps(self, size: tuple[int, ...]) -> tuple[native.Levels, native.Levels]:
        """Synthesis and its adjoint."""
        if self.num_levels == 0:
            return _NO_LEVELS, _NO_LEVELS
        synthesis, adjoint = _levels(
            self, (size[0], size[1]), "synthesis", torch.float32, torch.device("cpu")
        )
        return synthesis.taps, adjoint.taps

    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """Analysis, as ``pywt.wavedec2(mode='periodization')`` but for scaling and units."""
        size = self._check_plane(plane)
        if self.num_levels == 0:
            return Bands(plane, ())
        levels = _levels(self, size, "analysis", plane.dtype, plane.device)
        approximation, *details = _Split.apply(*levels, plane)
        return Bands(approximation, tuple(details))

    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """Synthesis, as ``pywt.waverec2(mode='periodization')`` but for scaling and units."""
        self._check_bands(bands, size)
        x = bands.approximation
        if self.num_levels == 0:
            return x
        levels = _levels(self, (size[0], size[1]), "synthesis", x.dtype, x.device)
        return _Merge.apply(*levels, x, *bands.details)


def make_transform(
    name: TransformName = "wavelet",
    *,
    wavelet: str = "bior4.4",
    num_levels: int = 4,
    level_scaling: bool = True,
    texel_units: bool = False,
) -> PlaneTransform:
    """The transform of that name; the other arguments matter to ``wavelet`` only.

    Raises:
        ValueError: for an unknown name, an unknown wavelet, or levels outside 0–6.
    """
    if name == "identity":
        return IdentityTransform()
    if name == "dct":
        return DCTTransform()
    if name == "wavelet":
        return WaveletTransform(wavelet, num_levels, level_scaling, texel_units)
    raise ValueError(f"transform: expected 'wavelet', 'dct' or 'identity', got {name!r}")


def _check_dtype(argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{argument}: expected float32 or float64, got {tensor.dtype}; convert with .float()"
        )


class _Matrix:
    """A banded matrix as dense blocks; writes its products into views of larger tensors.

    A block is (rows, columns, values, whether it is the first of its rows: later ones add to it).
    Autocast leaves ``out=`` forms alone: half precision would be coarser than the quantiser.
    """

    def __init__(self, dense: np.ndarray, dtype: torch.dtype, device: torch.device) -> None:
        self.dense = dense
        self.blocks: list[tuple[slice, slice, Tensor, bool]] = []
        self.num_rows, num_columns = dense.shape
        # Measured: 64 to 76 samples per block, on either side; fewer are slow, more are zeros.
        height = 72 if self.num_rows > num_columns else 32
        num_blocks = max(1, self.num_rows // height) if device.type == "cpu" else 1
        edges = [self.num_rows * i // num_blocks for i in range(num_blocks + 1)]
        for start, stop in itertools.pairwise(edges):
            for i, columns in enumerate(_runs(dense[start:stop].any(axis=0))):
                part = torch.tensor(dense[start:stop, columns]).to(device, dtype)
                self.blocks.append((slice(start, stop), columns, part, i == 0))

    def times(self, x: Tensor, out: Tensor, *, factor: float = 1.0, add: bool = False) -> None:
        """out = factor · M · x for 2-D x, added to what is there if ``add``."""
        for rows, columns, values, is_first in self.blocks:
            beta = float(add or not is_first)
            torch.addmm(out[rows], values, x[columns], beta=beta, alpha=factor, out=out[rows])

    def after(self, x: Tensor, out: Tensor, *, add: bool = False) -> None:
        """out = x · Mᵀ for 2-D x, added to what is there if ``add``."""
        for rows, columns, values, is_first in self.blocks:
            part = out[:, rows]
            beta = float(add or not is_first)
            torch.addmm(part, x[:, columns], values.T, beta=beta, out=part)


class _Level(NamedTuple):
    """One level of a transform or of its adjoint: (low, high) per axis, factor of the details."""

    rows: tuple[_Matrix, _Matrix]
    columns: tuple[_Matrix, _Matrix]
    factor: float


@dataclass(frozen=True)
class _Levels:
    """All levels of one direction, coarse to fine."""

    levels: tuple[_Level, ...]
    merges: bool
    """Whether they take bands to a plane, not a plane to bands."""

    @functools.cached_property
    def taps(self) -> native.Levels:
        """As the compiled loops take them."""
        matrices = [[matrix.dense for matrix in (*l.rows, *l.columns)] for l in self.levels]  # noqa: E741
        return native.levels(matrices, [level.factor for level in self.levels], self.merges)


class _Merge(torch.autograd.Function):
    """Bands to a plane by ``levels``, with the levels of the adjoint beside."""

    @staticmethod
    def forward(ctx, levels, adjoint, approximation, *details):
        ctx.levels = adjoint, levels
        if native.serves(approximation):
            return native.merge(levels.taps, approximation, details)
        x = approximation.movedim(0, 1).contiguous()
        for level, detail in zip(levels.levels, details, strict=True):
            x = _merge(level, x, detail.permute(2, 1, 0, 3).contiguous())
        return x.movedim(0, 1).contiguous()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, *_Split.apply(*ctx.levels, gradient)


class _Split(torch.autograd.Function):
    """A plane to (approximation, *details) by ``levels``."""

    @staticmethod
    def forward(ctx, levels, adjoint, plane):
        ctx.levels = adjoint, levels
        if native.serves(plane):
            approximation, details = native.split(levels.taps, plane)
            return approximation, *details
        x, details = plane.movedim(0, 1).contiguous(), []
        for level in reversed(levels.levels):
            x, detail = _split(level, x)
            details.append(detail.permute(2, 1, 0, 3).contiguous())
        return x.movedim(0, 1).contiguous(), *reversed(details)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, _Merge.apply(*ctx.levels, *gradients)


# One level works on (h, C, w) and (h, 3, C, w): both axes are then products of 2-D matrices, with
# no loop over channels (which is what batched products into views come down to on CPU).


def _merge(level: _Level, approximation: Tensor, detail: Tensor) -> Tensor:
    (row_low, row_high), (column_low, column_high), factor = level
    _, num_channels, w = approximation.shape
    low = approximation.new_empty(row_low.num_rows, num_channels, w)
    high = torch.empty_like(low)
    row_low.times(approximation.flatten(1), low.flatten(1))
    row_high.times(detail[:, 0].flatten(1), low.flatten(1), factor=factor, add=True)
    row_low.times(detail[:, 1].flatten(1), high.flatten(1), factor=factor)
    row_high.times(detail[:, 2].flatten(1), high.flatten(1), factor=factor, add=True)
    plane = low.new_empty(*low.shape[:2], column_low.num_rows)
    column_low.after(low.flatten(0, 1), plane.flatten(0, 1))
    column_high.after(high.flatten(0, 1), plane.flatten(0, 1), add=True)
    return plane


def _split(level: _Level, plane: Tensor) -> tuple[Tensor, Tensor]:
    (row_low, row_high), (column_low, column_high), factor = level
    height, num_channels, _ = plane.shape
    low = plane.new_empty(height, num_channels, column_low.num_rows)
    high = torch.empty_like(low)
    column_low.after(plane.flatten(0, 1), low.flatten(0, 1))
    column_high.after(plane.flatten(0, 1), high.flatten(0, 1))
    approximation = low.new_empty(row_low.num_rows, num_channels, low.shape[2])
    detail = low.new_empty(row_low.num_rows, 3, num_channels, low.shape[2])
    row_low.times(low.flatten(1), approximation.flatten(1))
    row_high.times(low.flatten(1), detail[:, 0].flatten(1), factor=factor)
    row_low.times(high.flatten(1), detail[:, 1].flatten(1), factor=factor)
    row_high.times(high.flatten(1), detail[:, 2].flatten(1), factor=factor)
    return approximation, detail


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what inference caches must serve training too
def _levels(
    transform: WaveletTransform,
    size: Size,
    direction: Literal["synthesis", "analysis"],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[_Levels, _Levels]:
    """The levels of one direction for planes of ``size``, and those of its adjoint."""
    levels: list[_Level] = []
    adjoint: list[_Level] = []
    unit = 1.0
    if transform.texel_units:  # half of a level's 2 along each axis
        unit = math.sqrt(2) if direction == "synthesis" else 1 / math.sqrt(2)
    for level, half_size in enumerate(transform.band_sizes(size)[1:], start=1):
        is_finest = level == transform.num_levels
        scale = transform.level_scale(level)
        factor = 1 / scale if direction == "synthesis" else scale
        axes = []
        for half, length in zip(half_size, size, strict=True):
            samples = length if is_finest else 2 * half
            low, high = axis_matrices(transform.wavelet, direction, 2 * half, samples)
            axes.append((unit * low, unit * high))
        for side, pairs in ((levels, axes), (adjoint, [(low.T, high.T) for low, high in axes])):
            rows, columns = (
                (_Matrix(low, dtype, device), _Matrix(high, dtype, device)) for low, high in pairs
            )
            side.append(_Level(rows, columns, factor))
    merges = direction == "synthesis"
    return _Levels(tuple(levels), merges), _Levels(tuple(adjoint), not merges)


def axis_matrices(
    wavelet: str, direction: str, n: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of one axis of n samples, cropped to or padded from ``samples`` of them."""
    if direction == "analysis":
        padded = np.eye(samples)[np.minimum(np.arange(n), samples - 1)]
        return pywt.dwt(padded, wavelet, mode="periodization", axis=0)
    unit, zero = np.eye(n // 2), np.zeros((n // 2, n // 2))
    low = pywt.idwt(unit, zero, wavelet, mode="periodization", axis=0)
    high = pywt.idwt(zero, unit, wavelet, mode="periodization", axis=0)
    return low[:samples], high[:samples]


def _runs(used: np.ndarray) -> list[slice]:
    """Stretches of True; short gaps are bridged, as a product costs more than a few zeros."""
    indices = np.flatnonzero(used)
    parts = np.split(indices, np.flatnonzero(np.diff(indices) > 8) + 1)
    # A block of zeros still has to be written: one column does.
    return [slice(int(p[0]), int(p[-1]) + 1) for p in parts if len(p)] or [slice(0, 1)]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """D[k, i] = sqrt((1 + [k > 0]) / n) · cos(π (2i + 1) k / 2n)."""
    k, i = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.sqrt(2 / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
    matrix[0] /= np.sqrt(2)
    return torch.from_numpy(matrix).to(device, dtype)
