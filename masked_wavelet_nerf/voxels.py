"""A grid of voxels of masked coefficients, and the features it gives at points.

The third choice beside planes with lines and tri-planes: one volume (C, D, H, W), with x along W,
y along H and z along D, sampled trilinearly where planes are sampled bilinearly; coordinates are
those of ``planes``. Masks, quantiser, rate and bitstream are the same.

Letters: C components, N points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from masked_wavelet_nerf.planes import CoefficientGrid, SpatialGrid
from masked_wavelet_nerf.volumes import VolumeTransform


class VoxelGrid(nn.Module):
    """One volume of ``num_components``.

    Args:
        num_components: C, which are the features at a point.
        resolution: voxels along x, y and z.
        transform: see :class:`.planes.CoefficientGrid`.
        bits: likewise.
        masked: likewise.
    """

    def __init__(
        self,
        num_components: int,
        resolution: tuple[int, int, int],
        transform: VolumeTransform,
        *,
        bits: int | None = 8,
        masked: bool = True,
    ) -> None:
        super().__init__()
        if min(resolution) < 2:
            raise ValueError(f"resolution: expected at least 2 voxels per axis, got {resolution}")
        self.num_components = num_components
        spatial = 0.1 * torch.randn(num_components, *reversed(resolution))
        self.voxels = CoefficientGrid(spatial, transform, bits, masked)

    @property
    def num_features(self) -> int:
        """Features at a point: C."""
        return self.num_components

    @property
    def resolution(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        nz, ny, nx = self.voxels.spatial_size
        return nx, ny, nz

    @property
    def grids(self) -> list[CoefficientGrid]:
        """The volume alone."""
        return [self.voxels]

    def named(self) -> dict[str, CoefficientGrid]:
        """The volume by what the bitstream calls it."""
        return {"voxels.0": self.voxels}

    def assemble(self, spatial: Sequence[Tensor]) -> SpatialGrid:
        """See :class:`.planes.PartGrid`."""
        return SpatialGrid(volumes=tuple(spatial))

    def features(
        self, spatial: SpatialGrid, points: Float[Tensor, "N 3"]
    ) -> Float[Tensor, "N features"]:
        """Features at points in [-1, 1]³; outside, the border value holds."""
        return sample_volume(spatial.volumes[0], points).T

    def summed_features(
        self, spatial: SpatialGrid, points: Float[Tensor, "N 3"]
    ) -> Float[Tensor, " N"]:
        """Sum of the features at points in [-1, 1]³."""
        # Summed before they are sampled: one channel in place of C.
        return sample_volume(spatial.volumes[0].sum(dim=0, keepdim=True), points)[0]

    def sums_at_nodes(self, spatial: SpatialGrid, size: int) -> Float[Tensor, "size size size"]:
        """Sum of the features at the nodes (x, y, z) of a regular grid over [-1, 1]³.

        The mean over what is nearest to a node: it is a coarse level.
        """
        summed = spatial.volumes[0].sum(dim=0, keepdim=True)
        return F.interpolate(summed[None], (size,) * 3, mode="area")[0, 0].permute(2, 1, 0)

    def upsample(self, resolution: tuple[int, int, int]) -> None:
        """Resizes the volume to ``resolution`` (voxels along x, y, z)."""
        self.voxels.upsample(tuple(reversed(resolution)))

    def crop(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> None:
        """Keeps voxels ``start … stop - 1`` of each axis (x, y, z)."""
        self.voxels.crop(tuple(reversed(start)), tuple(reversed(stop)))


def sample_volume(
    volume: Float[Tensor, "C D H W"], points: Float[Tensor, "N 3"]
) -> Float[Tensor, "C N"]:
    """A volume at points (x, y, z) in [-1, 1]³, trilinearly; outside, the border value holds."""
    places = points[None, None, None]
    sampled = F.grid_sample(volume[None], places, padding_mode="border", align_corners=True)
    return sampled.view(volume.shape[0], len(points))
