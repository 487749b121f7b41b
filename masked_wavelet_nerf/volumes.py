"""Transforms of voxels: those of planes, along three axes.

A volume is (C, D, H, W). Its bands are an approximation and, per detail level, coarse to fine,
seven details in the order aad, ada, add, daa, dad, dda, ddd: a letter for each of D, H, W, d where
the band is fine along that axis (the keys of ``pywt.wavedecn``). Wavelets use periodization,
padding and level scaling as planes do.

What is stored is always in the units of voxels (texel units, see ``wavelet``): the orthonormal
transform divided by 2^(3/2) at each level. The approximation of four levels would be 64 times as
large otherwise.

Letters: C channels, D, H, W size of a volume, d, h, w of a band, n samples along an axis.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from masked_wavelet_nerf.wavelet import (
    DCTTransform,
    PlaneTransform,
    WaveletTransform,
    axis_matrices,
    dct_matrix,
)

NUM_DETAILS = 7

VolumeSize = tuple[int, int, int]


@dataclass(frozen=True)
class VolumeTransform:
    """Volumes to levels and back; holds no parameters."""

    of_planes: PlaneTransform
    """Says which transform, wavelet, and how many levels."""

    @property
    def num_levels(self) -> int:
        """Detail levels."""
        return self.of_planes.num_levels

    @property
    def is_local(self) -> bool:
        """See :class:`.wavelet.PlaneTransform`."""
        return self.of_planes.is_local

    def band_sizes(self, size: VolumeSize) -> tuple[VolumeSize, ...]:
        """(d, h, w) of the approximation, then of each detail level, coarse to fine."""
        depths = self.of_planes.band_sizes((size[0], size[0]))
        planes = self.of_planes.band_sizes((size[1], size[2]))
        return tuple((d, *plane) for (d, _), plane in zip(depths, planes, strict=True))

    def to_levels(self, volume: Float[Tensor, "C D H W"]) -> list[Float[Tensor, "C _ _ _ _"]]:
        """Analysis: the approximation (C, 1, d, h, w), then the details (C, 7, d, h, w)."""
        if isinstance(self.of_planes, DCTTransform):
            matrices = [dct_matrix(n, volume.dtype, volume.device) for n in volume.shape[1:]]
            return [_along_axes(matrices, volume)[:, None]]
        if not isinstance(self.of_planes, WaveletTransform):
            return [volume[:, None]]
        depth, height, width = volume.shape[1:]
        details, size = [], (depth, height, width)
        for level in range(self.num_levels, 0, -1):
            half = self.band_sizes(size)[level]
            matrices = self._matrices("analysis", level, size, volume)
            bands = _along_axes(matrices, volume)
            bands = bands.view(-1, *itertools.chain(*((2, n) for n in half)))
            bands = bands.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 8, *half)
            volume = bands[:, 0]
            details.append(self.of_planes.level_scale(level) * bands[:, 1:])
        return [volume[:, None], *reversed(details)]

    def from_levels(
        self, levels: Sequence[Float[Tensor, "C _ _ _ _"]], size: VolumeSize
    ) -> Float[Tensor, "C D H W"]:
        """Synthesis: the inverse of :meth:`to_levels`.

        Raises:
            ValueError: if the shapes are not those of bands of a volume of ``size``.
        """
        self._check(levels, size)
        volume = levels[0][:, 0]
        if isinstance(self.of_planes, DCTTransform):
            matrices = [dct_matrix(n, volume.dtype, volume.device).T for n in size]
            return _along_axes(matrices, volume)
        if not isinstance(self.of_planes, WaveletTransform):
            return volume
        for level, details in enumerate(levels[1:], start=1):
            half = details.shape[2:]
            bands = torch.cat((volume[:, None], details / self.of_planes.level_scale(level)), dim=1)
            bands = bands.view(-1, 2, 2, 2, *half).permute(0, 1, 4, 2, 5, 3, 6)
            bands = bands.reshape(-1, *(2 * n for n in half))
            volume = _along_axes(self._matrices("synthesis", level, size, volume), bands)
        return volume

    def _matrices(self, direction: str, level: int, size: VolumeSize, like: Tensor) -> list[Tensor]:
        """For each axis, low and high bands one after the other to samples, or the other way."""
        assert isinstance(self.of_planes, WaveletTransform)
        wavelet, is_finest = self.of_planes.wavelet, level == self.num_levels
        return [
            _matrix(
                wavelet, direction, 2 * half, n if is_finest else 2 * half, like.dtype, like.device
            )
            for n, half in zip(size, self.band_sizes(size)[level], strict=True)
        ]

    def _check(self, levels: Sequence[Tensor], size: VolumeSize) -> None:
        num_channels = levels[0].shape[0] if levels else 0
        expected = [
            (num_channels, NUM_DETAILS if level else 1, *band)
            for level, band in enumerate(self.band_sizes(size))
        ]
        found = [tuple(level.shape) for level in levels]
        if found != expected:
            raise ValueError(
                f"levels: expected shapes {expected} for a volume of {tuple(size)}, got {found}; "
                "use the size and transform that made them"
            )


def _along_axes(matrices: Sequence[Tensor], volume: Tensor) -> Tensor:
    """M_D, M_H, M_W times a volume (C, D, H, W), each along its axis."""
    of_depth, of_height, of_width = matrices
    with torch.autocast(volume.device.type, enabled=False):
        x = of_height @ (volume @ of_width.T)
        return (of_depth @ x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])


@functools.lru_cache(maxsize=128)
@torch.inference_mode(False)  # what inference caches must serve training too
def _matrix(
    wavelet: str, direction: str, n: int, samples: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Samples × n to merge (low, high) of n / 2 each, n × samples to split."""
    low, high = axis_matrices(wavelet, direction, n, samples)
    if direction == "synthesis":
        matrix = math.sqrt(2) * np.concatenate((low, high), axis=1)
    else:
        matrix = np.concatenate((low, high), axis=0) / math.sqrt(2)
    return torch.from_numpy(matrix).to(device, dtype)
