"""Plane transforms: multi-level wavelet, DCT and identity, as pure differentiable functions.

A plane is (C, H, W); its bands are an approximation and, per detail level, coarse to fine, the
horizontal, vertical and diagonal details (PyWavelets' cH, cV, cD). Wavelets use periodization: a
level halves both sides exactly. Planes whose sides are no multiple of 2^levels are padded at their
ends by repeating the last texel, and cropped after the inverse.

Level scaling: stored details are the true ones times 2 at the coarsest level … levels + 1 at the
finest, so that a step of the optimiser changes fine details less.

Letters: C channels, H, W plane size, h, w band size, L levels.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TransformName = Literal["wavelet", "dct", "identity"]
"""What a plane is stored as."""

Size = tuple[int, int]

MAX_LEVELS = 6


class Bands(NamedTuple):
    """A transformed plane."""

    approximation: Float[Tensor, "C h w"]
    details: tuple[Float[Tensor, "C 3 h w"], ...]
    """Coarse to fine; the second axis is horizontal, vertical, diagonal."""


class PlaneTransform(ABC):
    """A plane to bands and back; holds no parameters."""

    num_levels: int

    @abstractmethod
    def band_sizes(self, size: Size) -> tuple[Size, ...]:
        """(h, w) of the approximation, then of each detail level, coarse to fine."""

    @abstractmethod
    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """Analysis: plane to bands."""

    @abstractmethod
    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """Synthesis: bands to the plane of ``size`` = (H, W).

        Raises:
            ValueError: if the bands are not those of a plane of that size.
        """

    def _check(self, bands: Bands, size: Size) -> None:
        found = [tuple(b.shape[-2:]) for b in (bands.approximation, *bands.details)]
        expected = list(self.band_sizes(size))
        if found != expected:
            raise ValueError(
                f"bands: expected sizes {expected} for a plane of {size} "
                f"({self.num_levels} levels), got {found}"
            )


@dataclass(frozen=True)
class IdentityTransform(PlaneTransform):
    """The plane itself as its approximation."""

    num_levels: int = 0

    def band_sizes(self, size: Size) -> tuple[Size, ...]:
        """One band, of the plane's size."""
        return (tuple(size),)

    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """Returns ``plane`` as approximation."""
        return Bands(plane, ())

    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """Returns the approximation."""
        self._check(bands, size)
        return bands.approximation


@dataclass(frozen=True)
class DCTTransform(PlaneTransform):
    """Orthonormal 2-D DCT-II of the whole plane; all coefficients in ``approximation``."""

    num_levels: int = 0

    def band_sizes(self, size: Size) -> tuple[Size, ...]:
        """One band, of the plane's size."""
        return (tuple(size),)

    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """D_H · X · D_Wᵀ."""
        rows, columns = (_dct_matrix(n, plane.dtype, plane.device) for n in plane.shape[-2:])
        return Bands(rows @ plane @ columns.T, ())

    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """D_Hᵀ · X · D_W."""
        self._check(bands, size)
        x = bands.approximation
        rows, columns = (_dct_matrix(n, x.dtype, x.device) for n in size)
        return rows.T @ x @ columns


@dataclass(frozen=True)
class WaveletTransform(PlaneTransform):
    """Multi-level separable wavelet transform with periodization.

    Attributes:
        wavelet: name of a discrete PyWavelets wavelet.
        num_levels: L, 0 to 6.
        level_scaling: see the module's docstring.
    """

    wavelet: str = "bior4.4"
    num_levels: int = 4
    level_scaling: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.num_levels <= MAX_LEVELS:
            raise ValueError(f"num_levels: expected 0 to {MAX_LEVELS}, got {self.num_levels}")
        if self.wavelet not in pywt.wavelist(kind="discrete"):
            raise ValueError(
                f"wavelet: expected a discrete wavelet of PyWavelets (pywt.wavelist"
                f"(kind='discrete'): haar, db2, bior4.4, …), got {self.wavelet!r}"
            )

    def scale(self, level: int) -> float:
        """Stored detail over true detail, at ``level`` 1 (coarsest) to L (finest)."""
        return float(level + 1) if self.level_scaling else 1.0

    def _padded(self, size: Size) -> Size:
        unit = 2**self.num_levels
        return -(-size[0] // unit) * unit, -(-size[1] // unit) * unit

    def band_sizes(self, size: Size) -> tuple[Size, ...]:
        """Halved level by level from the padded size."""
        height, width = self._padded(size)
        shifts = [self.num_levels, *range(self.num_levels, 0, -1)]
        return tuple((height >> shift, width >> shift) for shift in shifts)

    def forward(self, plane: Float[Tensor, "C H W"]) -> Bands:
        """Analysis, as ``pywt.wavedec2(mode='periodization')`` but for level scaling."""
        height, width = self._padded((plane.shape[-2], plane.shape[-1]))
        pad = (0, width - plane.shape[-1], 0, height - plane.shape[-2])
        approximation = F.pad(plane[None], pad, mode="replicate")[0]
        details = []
        for level in range(self.num_levels, 0, -1):
            h, w = approximation.shape[-2] // 2, approximation.shape[-1] // 2
            rows = _analysis(self.wavelet, 2 * h, plane.dtype, plane.device)
            columns = _analysis(self.wavelet, 2 * w, plane.dtype, plane.device)
            both = rows @ approximation @ columns.T
            detail = torch.stack((both[:, h:, :w], both[:, :h, w:], both[:, h:, w:]), dim=1)
            details.append(detail * self.scale(level))
            approximation = both[:, :h, :w]
        return Bands(approximation.contiguous(), tuple(reversed(details)))

    def inverse(self, bands: Bands, size: Size) -> Float[Tensor, "C H W"]:
        """Synthesis: per level Σ S_i · X_ij · S_jᵀ over low and high pass i, j, then the crop."""
        self._check(bands, size)
        x = bands.approximation
        for level, detail in enumerate(bands.details, start=1):
            rows = _synthesis(self.wavelet, 2 * x.shape[-2], x.dtype, x.device)
            columns = _synthesis(self.wavelet, 2 * x.shape[-1], x.dtype, x.device)
            horizontal, vertical, diagonal = (detail * (1 / self.scale(level))).unbind(dim=1)
            low = torch.cat((x, horizontal), dim=-2)
            high = torch.cat((vertical, diagonal), dim=-2)
            x = (rows @ torch.cat((low, high), dim=-1)) @ columns.T
        return x[..., : size[0], : size[1]]


def make_transform(
    name: TransformName = "wavelet",
    *,
    wavelet: str = "bior4.4",
    num_levels: int = 4,
    level_scaling: bool = True,
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
        return WaveletTransform(wavelet, num_levels, level_scaling)
    raise ValueError(f"transform: expected 'wavelet', 'dct' or 'identity', got {name!r}")


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def _synthesis(wavelet: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, n) matrix that takes [low pass; high pass] of n/2 each to n samples."""
    unit, zero = np.eye(n // 2), np.zeros(n // 2)
    low = [pywt.idwt(row, zero, wavelet, mode="periodization") for row in unit]
    high = [pywt.idwt(zero, row, wavelet, mode="periodization") for row in unit]
    return torch.from_numpy(np.stack(low + high, axis=1)).to(device, dtype)


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def _analysis(wavelet: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, n) matrix that takes n samples to [low pass; high pass]."""
    columns = [np.concatenate(pywt.dwt(row, wavelet, mode="periodization")) for row in np.eye(n)]
    return torch.from_numpy(np.stack(columns, axis=1)).to(device, dtype)


@functools.lru_cache(maxsize=64)
@torch.no_grad()
def _dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """D[k, i] = sqrt((1 + [k > 0]) / n) · cos(π (2i + 1) k / 2n)."""
    k, i = np.arange(n)[:, None], np.arange(n)[None]
    matrix = np.sqrt(2 / n) * np.cos(np.pi * (2 * i + 1) * k / (2 * n))
    matrix[0] /= np.sqrt(2)
    return torch.from_numpy(matrix).to(device, dtype)
