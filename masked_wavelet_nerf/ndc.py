"""Normalised device coordinates: planes for cameras that all look the same way.

A camera amid the others sees the scene from its near plane to infinity as a box (NeRF, appendix C;
OpenGL's frustum with the far plane at infinity): texels are as fine as that camera's pixels at
every depth. Straight lines stay straight, so rays are mapped once and sampled as in a box.

Letters: N cameras, R rays. A ray in the box starts at the near plane, t' = 0, and ends at infinity,
t' = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_NEAR_SHARE = 0.9
"""Of the nearest depth bound: where the near plane lies."""
_WIDEST = 2.5
"""Half extent of the box, in half views, beyond which most of it would be seen by few cameras."""
_MARGIN = 1.05
"""Box to what training photos show: others see a little more."""
_LEAST_FORWARD = 1e-3
"""Rays that run forward by less have no place in the box."""


@dataclass(frozen=True)
class ForwardFacing:
    """What a data parser says of a forward-facing capture (metadata ``forward_facing``)."""

    projection: Float[Tensor, "4 4"]
    """World to clip coordinates: x, y, z, each to be divided by w, the depth."""
    box: Float[Tensor, "2 3"]
    """Lowest and highest corner of what photos show, in normalised device coordinates."""


class BoxRays(NamedTuple):
    """Rays in normalised device coordinates."""

    origins: Float[Tensor, "R 3"]
    """At the near plane."""
    directions: Float[Tensor, "R 3"]
    """To infinity. Zero for rays that do not run forward: they see nothing."""
    nears: Float[Tensor, "R 1"]
    """t' of the camera where it has passed the near plane, else 0."""
    fars: Float[Tensor, "R 1"]
    """1; 0 for rays that do not run forward."""


def find_forward_facing(
    poses: Float[Tensor, "N 3 4"],
    half_views: Float[Tensor, "N 2"],
    nears: Float[Tensor, " N"],
) -> ForwardFacing | None:
    """The box of cameras that look the same way.

    Args:
        poses: camera to world; x right, y up, z backward.
        half_views: half width and height of the view at distance 1.
        nears: depth from which on a camera sees anything.

    Returns:
        None where they do not all see the same way, or stand amid what they see.
    """
    poses, half_views, nears = poses.double(), half_views.double(), nears.double()
    backward = F.normalize(poses[:, :, 2].mean(dim=0), dim=0)
    right = torch.linalg.cross(poses[:, :, 1].mean(dim=0), backward)
    if not right.norm() > 0.1:
        return None
    right = F.normalize(right, dim=0)
    axes = torch.stack((right, torch.linalg.cross(backward, right), backward))
    centre = poses[:, :, 3].mean(dim=0)
    behind = (poses[:, :, 3] - centre) @ backward
    near = _NEAR_SHARE * float((nears - behind).min())
    if near <= 0:
        return None
    world_to_camera = torch.eye(4, dtype=torch.double)
    world_to_camera[:3] = torch.cat((axes, -(axes @ centre)[:, None]), dim=1)
    across, up = half_views.median(dim=0).values.tolist()
    frustum = torch.tensor(
        [[1 / across, 0, 0, 0], [0, 1 / up, 0, 0], [0, 0, -1, -2 * near], [0, 0, -1, 0]],
        dtype=torch.double,
    )
    projection = frustum @ world_to_camera
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).double()
    corners = F.pad(signs * half_views[:, None], (0, 1), value=-1.0)  # N, 4, 3 in camera axes
    directions = torch.einsum("nij,nkj->nki", poses[:, :, :3], corners).reshape(-1, 3)
    origins = poses[:, :, 3].repeat_interleave(4, dim=0)
    rays = to_box_rays(origins, directions, projection)
    ends = torch.cat((rays.origins, rays.origins + rays.directions))[:, :2].abs().amax(dim=0)
    if not bool((rays.fars == 1).all()) or float(ends.max()) > _WIDEST:
        return None
    half = F.pad(_MARGIN * ends, (0, 1), value=1.0)
    return ForwardFacing(projection.float(), torch.stack((-half, half)).float())


def project(
    positions: Float[Tensor, "*batch 3"], projection: Float[Tensor, "4 4"]
) -> Float[Tensor, "*batch 3"]:
    """World positions in front of the camera to normalised device coordinates."""
    clip = F.pad(positions, (0, 1), value=1.0) @ projection.T
    return clip[..., :3] / clip[..., 3:]


def to_box_rays(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    projection: Float[Tensor, "4 4"],
) -> BoxRays:
    """Rays from the near plane to infinity: origin + t' · direction is the point at t'."""
    near, start, direction, forward = _cut(origins, directions, projection)
    first = start[:, :3] / start[:, 3:]
    last = direction[:, :3] / direction[:, 3:]
    begin = (-near * direction[:, 3:] / start[:, 3:]).clamp(min=0)
    nears = torch.where(forward, begin / (begin + 1), 0)
    last = torch.where(forward, last - first, 0)
    return BoxRays(torch.where(forward, first, 0), last, nears, forward.to(nears))


def distance_at(
    places: Float[Tensor, "R 1"],
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    projection: Float[Tensor, "4 4"],
) -> Float[Tensor, "R 1"]:
    """World distances along rays of places t' < 1; 0 for rays that do not run forward."""
    near, start, direction, forward = _cut(origins, directions, projection)
    beyond = places / (1 - places).clamp(min=1e-6)
    return torch.where(forward, near + beyond * start[:, 3:] / direction[:, 3:], 0).clamp(min=0)


def _cut(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    projection: Float[Tensor, "4 4"],
) -> tuple[Float[Tensor, "R 1"], Float[Tensor, "R 4"], Float[Tensor, "R 4"], Tensor]:
    """Where rays cross the near plane: distance, point and direction in clip coordinates.

    With them comes which rays run forward; what the others have instead is finite.
    """
    clip = F.pad(origins, (0, 1), value=1.0) @ projection.T
    direction = directions @ projection[:, :3].T
    forward = direction[:, 3:] > _LEAST_FORWARD
    direction = torch.where(forward, direction, 1)
    # The near plane is where z = -w.
    near = -(clip[:, 2:3] + clip[:, 3:]) / (direction[:, 2:3] + direction[:, 3:])
    return near, clip + near * direction, direction, forward
