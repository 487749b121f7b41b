"""Rays to pixels: where a field is sampled, and what volume rendering makes of it. Torch alone.

World positions become grid points in [-1, 1]³ by a box (bounded scenes), by contraction (unbounded
ones) or by a box in normalised device coordinates (forward-facing ones).

Letters: R rays, N packed samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from masked_wavelet_nerf import ndc, unbounded
from masked_wavelet_nerf.field import SpatialField, WaveletPlaneField
from masked_wavelet_nerf.sampling import (
    OccupancyGrid,
    PackedSamples,
    SharedColours,
    composite,
    march,
)
from masked_wavelet_nerf.settings import SceneSettings


@runtime_checkable
class Rays(Protocol):
    """Rays, as nerfstudio's bundles are, too."""

    @property
    def origins(self) -> Float[Tensor, "R 3"]:
        """In the world."""
        ...

    @property
    def directions(self) -> Float[Tensor, "R 3"]:
        """Unit vectors."""
        ...

    @property
    def nears(self) -> Float[Tensor, "R 1"] | None:
        """Distance at which sampling starts."""
        ...

    @property
    def fars(self) -> Float[Tensor, "R 1"] | None:
        """Distance at which it ends."""
        ...


@dataclass(frozen=True)
class Space:
    """Where the planes lie in the world."""

    box: Float[Tensor, "2 3"]
    """Lowest and highest corner: in the world, or in normalised device coordinates. Of a contracted
    scene, twice what is not contracted."""
    is_unbounded: bool
    """Rather than in a box of the world."""
    projection: Float[Tensor, "4 4"] | None
    """World to clip coordinates of forward-facing scenes, which are unbounded, too."""

    @property
    def contracted(self) -> bool:
        """Unbounded, and not forward-facing."""
        return self.is_unbounded and self.projection is None

    def region(self) -> tuple[Float[Tensor, " 3"], Float[Tensor, " 3"]]:
        """Middle and half extent of what becomes [-1, 1]³, before contraction if there is one."""
        extent = self.box[1] - self.box[0]
        return self.box.mean(dim=0), extent / (4 if self.contracted else 2)

    def grid_points(self, positions: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """World positions to points in [-1, 1]³ of the planes."""
        if self.projection is not None:
            positions = ndc.project(positions, self.projection)
        centre, half = self.region()
        points = (positions - centre) / half
        return unbounded.contract(points) if self.contracted else points

    def steps(self, resolution: tuple[int, int, int], step_ratio: float) -> tuple[float, int]:
        """Bounded scenes: distance between samples, and the most that a ray can have.

        Args:
            resolution: voxels along x, y and z.
            step_ratio: distance in voxels.
        """
        extent = (self.box[1] - self.box[0]).tolist()
        voxels = [e / (n - 1) for e, n in zip(extent, resolution, strict=True)]
        step_size = step_ratio * sum(voxels) / 3
        return step_size, math.ceil(math.hypot(*extent) / step_size) + 1


@torch.no_grad()
def find_proposal(
    field: WaveletPlaneField, spatial: SpatialField, settings: SceneSettings
) -> unbounded.Proposal:
    """Where unbounded scenes have density, by a coarse level."""
    nodes = field.density_at_nodes(spatial, settings.proposal_resolution)
    return unbounded.proposal(nodes, settings.num_proposal_bins)


def sample_everywhere(
    rays: Rays,
    space: Space,
    proposal: unbounded.Proposal,
    settings: SceneSettings,
    jitter: Float[Tensor, "R 1"] | None,
) -> PackedSamples:
    """Samples of an unbounded scene; see :func:`.unbounded.propose`."""
    numbers = settings.distance_scale, proposal, settings.num_samples, jitter
    centre, half = space.region()
    if space.projection is not None:
        mapped = ndc.to_box_rays(rays.origins, rays.directions, space.projection)
        origins, directions = (mapped.origins - centre) / half, mapped.directions / half
        limits = mapped.nears, mapped.fars
        return unbounded.propose(origins, directions, *limits, *numbers, contracted=False)
    assert rays.nears is not None and rays.fars is not None
    origins, directions = (rays.origins - centre) / half, rays.directions / half
    return unbounded.propose(origins, directions, rays.nears, rays.fars, *numbers)


def sample_box(
    rays: Rays,
    fars: Float[Tensor, "R 1"],
    space: Space,
    step_size: float,
    num_steps: int,
    occupancy: OccupancyGrid,
    jitter: Float[Tensor, "R 1"] | None,
) -> PackedSamples:
    """Samples of a bounded scene; see :func:`.sampling.march`."""
    assert rays.nears is not None
    directions = rays.directions / space.region()[1]
    origins = space.grid_points(rays.origins)
    return march(origins, directions, rays.nears, fars, step_size, num_steps, occupancy, jitter)


def limits_in_box(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    box: Float[Tensor, "2 3"],
    nearest: float = 0.0,
) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """Distances, at least ``nearest``, at which rays enter and leave a box.

    They are equal where rays miss it.
    """
    inverse = 1 / (directions + 1e-6)  # as nerfstudio's collider, so that none is infinite
    planes = (box[:, None] - origins) * inverse
    nears = planes.amin(dim=0).amax(dim=-1, keepdim=True).clamp(min=nearest)
    return nears, torch.maximum(planes.amax(dim=0).amin(dim=-1, keepdim=True), nears)


class Rendered(NamedTuple):
    """What a ray shows."""

    rgb: Float[Tensor, "R 3"]
    """Σ weight · colour: nothing behind it yet."""
    accumulation: Float[Tensor, "R 1"]
    """Opacity."""
    depth: Float[Tensor, "R 1"]
    """Expected distance of what is seen, in the world."""
    distortion: Float[Tensor, "R 1"]
    """Of unbounded scenes, where asked for; else 0."""


def render(
    field: WaveletPlaneField,
    spatial: SpatialField,
    samples: PackedSamples,
    rays: Rays,
    space: Space,
    settings: SceneSettings,
    *,
    least_weight: float = 0.0,
    all_colours: bool = False,
    with_distortion: bool = False,
    offsets: Callable[[Int[Tensor, " M"]], Tensor] | None = None,
) -> Rendered:
    """Volume rendering.

    Args:
        field: density and colour.
        spatial: its planes in the spatial domain.
        samples: of the rays.
        rays: R of them.
        space: where the planes lie.
        settings: of the scene.
        least_weight: samples of no more get no colour, nor anything in its place.
        all_colours: take all others, too; else those alone that matter in their ray.
        with_distortion: as training on unbounded scenes wants.
        offsets: what is added to the first layer of colours, by the ray of each.
    """
    num_rays = len(rays.origins)
    density = field.density(spatial, samples.points)
    optical_depth = density * (samples.lengths * settings.distance_scale)
    spacings = _spacings(samples, space) if with_distortion else None
    accumulation, distance, distortion, shared = composite(
        samples, optical_depth, num_rays, least_weight, settings.colour_mass, spacings
    )
    if not all_colours:
        shared = _that_matter(shared, accumulation, settings.render_weight_threshold)
    ray, shares, points = shared
    directions, added = rays.directions[ray], None if offsets is None else offsets(ray)
    colours = field.colour(spatial, points, directions, added)
    rgb = colours.new_zeros(num_rays, 3).index_add(0, ray, shares[:, None] * colours)
    depth = distance / accumulation.clamp(min=1e-6)
    if space.projection is not None:
        depth = ndc.distance_at(depth, rays.origins, rays.directions, space.projection)
    return Rendered(rgb, accumulation, depth, distortion)


def _that_matter(
    shared: SharedColours, accumulation: Float[Tensor, "R 1"], least_share: float
) -> SharedColours:
    ray, shares, points = shared
    seen = shares > least_share * accumulation[ray, 0]
    ray, shares, points = ray[seen], shares[seen], points[seen]
    # What has no colour of its own counts as what the rest of its ray shows.
    coloured = torch.zeros_like(accumulation).index_add(0, ray, shares[:, None])
    return SharedColours(ray, shares * (accumulation / coloured.clamp(min=1e-6))[ray, 0], points)


def _spacings(
    samples: PackedSamples, space: Space
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    if space.contracted:
        return unbounded.spacings(samples)
    assert isinstance(samples.lengths, Tensor)
    return samples.middles, samples.lengths
