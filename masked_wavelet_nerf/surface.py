"""What is seen at the surfaces of a scene beside its colour: normals, and how much is kept there.

Torch alone.

Letters: N points, C channels, B bands, H and W texels of a plane, h and w entries of a band.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from masked_wavelet_nerf.field import SpatialField, WaveletPlaneField
from masked_wavelet_nerf.masking import keep
from masked_wavelet_nerf.planes import PLANE_AXES, CoefficientGrid, sample
from masked_wavelet_nerf.rendering import Space
from masked_wavelet_nerf.wavelet import DCTTransform

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

    planes: tuple[Float[Tensor, "levels H W"], ...]
    """XY, XZ and YZ at their texels, in [0, 1]: relative to the fullest place of the level."""

    def at(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N levels"]:
        """Mean of the three planes at points in [-1, 1]³."""
        found = [
            sample(plane[None], points[:, u : v + 1 : v - u])
            for plane, (u, v) in zip(self.planes, PLANE_AXES, strict=True)
        ]
        return torch.stack(found).mean(dim=0).T


@torch.no_grad()
def kept_maps(
    field: WaveletPlaneField, num_levels: int | None = None, threshold: float = 0.0
) -> KeptMaps | None:
    """Of density and appearance together; None where coefficients have no place of their own (DCT).

    Args:
        field: planes and masks.
        num_levels: detail levels to count, coarse first; None for all. The rest count as dropped.
        threshold: logits below it are dropped.
    """
    pairs = zip(field.density_grid.planes, field.appearance_grid.planes, strict=True)
    images = []
    for pair in pairs:
        grids = [grid for grid in pair if isinstance(grid, CoefficientGrid)]
        if isinstance(grids[0].transform, DCTTransform):
            return None
        images.append(_kept_image(grids, num_levels, threshold))
    most = torch.stack([image.amax(dim=(1, 2)) for image in images]).amax(dim=0)
    return KeptMaps(tuple(image / most.clamp(min=1e-6)[:, None, None] for image in images))


def _kept_image(
    grids: list[CoefficientGrid], num_levels: int | None, threshold: float
) -> Float[Tensor, "levels H W"]:
    height, width = grids[0].spatial_size
    levels = []
    for level in range(len(grids[0].coefficients)):
        if num_levels is not None and level > num_levels:
            levels.append(torch.zeros_like(levels[0]))
            continue
        kept = [_kept(grid, level, threshold).flatten(0, 1) for grid in grids]
        share = torch.cat(kept).float().mean(dim=0)
        # Entries lie side by side from the first texel on, as many texels wide each.
        texels = 2 ** (grids[0].transform.num_levels - max(level - 1, 0))
        spread = share.repeat_interleave(texels, dim=0).repeat_interleave(texels, dim=1)
        levels.append(spread[:height, :width])
    return torch.stack(levels)


def _kept(grid: CoefficientGrid, level: int, threshold: float) -> Bool[Tensor, "C B h w"]:
    values = grid.coefficients[level]
    return keep(grid.logits[level] if len(grid.logits) else None, values, threshold)
