"""What is seen at the surfaces of a scene beside its colour: normals, and how much is kept there.

Torch alone.

Letters: N points, C channels, B bands, ``*n`` the axes of a plane or of voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from masked_wavelet_nerf.field import SpatialField, WaveletPlaneField
from masked_wavelet_nerf.masking import keep
from masked_wavelet_nerf.planes import PLANE_AXES, CoefficientGrid, sample
from masked_wavelet_nerf.rendering import Space
from masked_wavelet_nerf.voxels import sample_volume

_REACH = 1.0
"""Voxels to either side over which density is compared: less shows the noise of single texels."""
_SHARE = 1e-3
"""Of a position's distance from the middle: how far the world is followed to find its axes."""


def normals(
    field: WaveletPlaneField,
    spatial: SpatialField,
    positions: Float[Tensor, "N 3"],
    space: Space,
) -> Float[Tensor, "N 3"]:
    """Unit vectors in the world along which density falls fastest; zero where it is even.

    Args:
        field: density.
        spatial: its planes in the spatial domain.
        positions: in the world, such as where a ray ends.
        space: where the planes lie.
    """
    points = space.grid_points(positions)
    reach = 2 * _REACH / (torch.tensor(field.resolution, device=points.device) - 1)
    offsets = torch.cat((torch.diag(reach), -torch.diag(reach))).to(points)
    around = (points[:, None] + offsets).view(-1, 3)
    ahead, behind = field.density(spatial, around).view(-1, 2, 3).unbind(dim=1)
    # Densities grow by orders of magnitude within a voxel; their logarithms are what is even.
    slope = (torch.log1p(ahead) - torch.log1p(behind)) / reach
    return F.normalize(-torch.einsum("ni,nij->nj", slope, _jacobian(positions, space)), dim=-1)


def _jacobian(positions: Float[Tensor, "N 3"], space: Space) -> Float[Tensor, "N 3 3"]:
    """How grid points (i) move with positions (j)."""
    centre, half = space.region()
    scale = half.mean() if space.projection is None else 1.0
    step = _SHARE * (scale + (positions - centre).norm(dim=-1, keepdim=True))
    moved = torch.eye(3).to(positions) * step[:, None]
    there, back = (space.grid_points(positions[:, None] + way) for way in (moved, -moved))
    return ((there - back) / (2 * step[:, None])).mT


class KeptMaps(NamedTuple):
    """Which share of the coefficients is kept, place by place, level by level."""

    images: tuple[Float[Tensor, "levels *n"], ...]
    """XY, XZ and YZ at their texels, or the voxels (z, y, x), in [0, 1]: relative to the fullest
    place of the level."""

    def at(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N levels"]:
        """At points in [-1, 1]³; of three planes, their mean."""
        if len(self.images) == 1:
            return sample_volume(self.images[0], points).T
        found = [
            sample(plane[None], points[:, u : v + 1 : v - u])
            for plane, (u, v) in zip(self.images, PLANE_AXES, strict=True)
        ]
        return torch.stack(found).mean(dim=0).T


@torch.no_grad()
def kept_maps(
    field: WaveletPlaneField, num_levels: int | None = None, threshold: float = 0.0
) -> KeptMaps | None:
    """Of density and appearance together; None where coefficients have no place of their own (DCT).

    Args:
        field: planes, or voxels, and masks.
        num_levels: detail levels to count, coarse first; None for all. The rest count as dropped.
        threshold: logits below it are dropped.
    """
    images = []
    for grids in zip(field.density_grid.grids, field.appearance_grid.grids, strict=True):
        if len(grids[0].spatial_size) == 1:
            continue
        if not grids[0].transform.is_local:
            return None
        images.append(_kept_image(grids, num_levels, threshold))
    most = torch.stack([image.flatten(1).amax(dim=1) for image in images]).amax(dim=0)
    return KeptMaps(
        tuple((image.movedim(0, -1) / most.clamp(min=1e-6)).movedim(-1, 0) for image in images)
    )


def _kept_image(
    grids: Sequence[CoefficientGrid], num_levels: int | None, threshold: float
) -> Float[Tensor, "levels *n"]:
    size = grids[0].spatial_size
    levels = []
    for level in range(len(grids[0].coefficients)):
        if num_levels is not None and level > num_levels:
            levels.append(torch.zeros_like(levels[0]))
            continue
        kept = [_kept(grid, level, threshold).flatten(0, 1) for grid in grids]
        share = torch.cat(kept).float().mean(dim=0)
        # Entries lie side by side from the first texel on, as many texels wide each.
        texels = 2 ** (grids[0].transform.num_levels - max(level - 1, 0))
        for axis, length in enumerate(size):
            share = share.repeat_interleave(texels, dim=axis).narrow(axis, 0, length)
        levels.append(share)
    return torch.stack(levels)


def _kept(grid: CoefficientGrid, level: int, threshold: float) -> Bool[Tensor, "C B *n"]:
    values = grid.coefficients[level]
    return keep(grid.logits[level] if len(grid.logits) else None, values, threshold)
