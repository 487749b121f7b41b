"""How cameras stand around what they see: directions, the point they look at, distances.

Cameras are nerfstudio's: camera to world, x right, y up, z backward, so that a camera looks along
its −z. Angles are in degrees, lengths in the data parser's unit. N counts cameras.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_utils import radial_and_tangential_undistort
from nerfstudio.cameras.cameras import Cameras, CameraType

Layout = Literal["inward", "forward", "outward"]
"""inward: cameras around a scene look at a common point. forward: all look the same way. outward:
they look in many directions and at no common point, as inside a room."""

_FORWARD_ANGLE = 45.0
"""Degrees from the mean direction within which cameras count as looking the same way."""
_MISS, _IN_FRONT = 0.35, 0.9
"""A point is looked at if axes miss it by less than this share of its distance (median), and it is
in front of this share of the cameras."""
_POLE = 80.0
"""Elevation in degrees beyond which a direction has no azimuth worth counting."""
_ALL_ROUND = [
    CameraType.EQUIRECTANGULAR.value,
    CameraType.OMNIDIRECTIONALSTEREO_L.value,
    CameraType.OMNIDIRECTIONALSTEREO_R.value,
]
_UPRIGHT = 30.0
"""Degrees within which the cameras' mean up is taken for the world's axis next to it."""


@dataclass(frozen=True)
class LookAt:
    """The point nearest to all optical axes, in the sense of least squares."""

    point: tuple[float, float, float]
    miss: float
    """Median distance at which an optical axis passes it."""
    distance: float
    """Median distance of the cameras from it, along their axes; negative behind them."""
    in_front: float
    """Fraction of the cameras that have it in front of them."""


@dataclass(frozen=True)
class Coverage:
    """What the poses of some cameras say of the scene."""

    layout: Layout
    up: tuple[float, float, float]
    """Unit vector: the cameras' mean up, or the axis of the world next to it."""
    widest_angle: float
    """Largest angle between two viewing directions."""
    nearest_angle: float | None
    """Median angle from a viewing direction to the next one; None for a single camera."""
    azimuth_span: float
    """Of 360°, what lies outside the largest gap between viewing directions about ``up``."""
    elevations: tuple[float, float]
    """Lowest and highest elevation that the scene is seen from: 90° looks straight down."""
    look_at: LookAt | None
    """None where the axes are all but parallel."""
    distances: tuple[float, float]
    """Nearest and farthest camera from the origin."""


def measure(cameras: Cameras) -> Coverage:
    """Coverage of at least one camera."""
    all_round = bool(torch.isin(cameras.camera_type, torch.tensor(_ALL_ROUND)).any())
    return measure_poses(cameras.camera_to_worlds.cpu().double().numpy(), all_round)


def measure_poses(poses: Float[np.ndarray, "N 3 4"], all_round: bool = False) -> Coverage:
    """Coverage of at least one camera.

    Args:
        poses: camera to world.
        all_round: cameras see in all directions, so that where their axes point means nothing.

    Raises:
        ValueError: if there is none.
    """
    if not len(poses):
        raise ValueError("poses: at least one camera is needed")
    poses = poses.astype(np.float64)
    backward = poses[:, :, 2] / np.linalg.norm(poses[:, :, 2], axis=1, keepdims=True)
    up, look_at = find_up(poses), find_look_at(poses)
    angles = np.degrees(np.arccos(np.clip(backward @ backward.T, -1, 1)))
    others = angles + np.where(np.eye(len(poses), dtype=bool), np.inf, 0)
    elevation = np.degrees(np.arcsin(np.clip(backward @ up, -1, 1)))
    distances = np.linalg.norm(poses[:, :, 3], axis=1)
    return Coverage(
        layout="outward" if all_round else _layout(backward, look_at),
        up=_triple(up),
        widest_angle=float(angles.max()),
        nearest_angle=float(np.median(others.min(axis=1))) if len(poses) > 1 else None,
        azimuth_span=_azimuth_span(backward[np.abs(elevation) <= _POLE], up),
        elevations=(float(elevation.min()), float(elevation.max())),
        look_at=look_at,
        distances=(float(distances.min()), float(distances.max())),
    )


def find_up(poses: Float[np.ndarray, "N 3 4"]) -> Float[np.ndarray, " 3"]:
    """Unit vector that is up: the mean of the cameras' y axes.

    Within 30° of an axis of the world it is that axis, for captures have the world's up nearly
    always there, and cameras' mean up is off by chance. Cameras that cancel out say nothing: z.
    """
    mean = poses[:, :, 1].mean(axis=0)
    length = np.linalg.norm(mean)
    if length < 1e-3:
        return np.array([0.0, 0.0, 1.0])
    mean = mean / length
    axis = int(np.abs(mean).argmax())
    if abs(mean[axis]) < np.cos(np.radians(_UPRIGHT)):
        return mean
    return np.sign(mean[axis]) * np.eye(3)[axis]


def find_look_at(poses: Float[np.ndarray, "N 3 4"]) -> LookAt | None:
    """The point p that minimises Σ ‖(I − d dᵀ)(p − o)‖² over axes from o in direction d.

    Returns:
        None where all axes are parallel within half a degree or so, as that of a single camera is:
        the point could be anywhere along them.
    """
    origins, forward = poses[:, :, 3], -poses[:, :, 2]
    forward = forward / np.linalg.norm(forward, axis=1, keepdims=True)
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    # The smallest eigenvalue is about the mean square of the angles between axes.
    if np.linalg.eigvalsh(across.mean(axis=0))[0] < np.radians(0.5) ** 2:
        return None
    point = np.linalg.solve(across.sum(axis=0), np.einsum("nij,nj->i", across, origins))
    depths = ((point - origins) * forward).sum(axis=1)
    misses = np.linalg.norm(point - origins - depths[:, None] * forward, axis=1)
    return LookAt(
        point=_triple(point),
        miss=float(np.median(misses)),
        distance=float(np.median(depths)),
        in_front=float((depths > 0).mean()),
    )


def distances_to_box(
    positions: Float[np.ndarray, "N 3"], box: Float[np.ndarray, "2 3"]
) -> tuple[float, float]:
    """Distance from which on, and up to which, any of the positions has some of the box.

    Args:
        positions: at least one.
        box: lowest and highest corner.

    Returns:
        The least distance from a position to the box, 0 inside it, and the largest to a corner.
    """
    outside = np.maximum(np.maximum(box[0] - positions, positions - box[1]), 0)
    reach = np.maximum(np.abs(positions - box[0]), np.abs(positions - box[1]))
    return (
        float(np.linalg.norm(outside, axis=1).min()),
        float(np.linalg.norm(reach, axis=1).max()),
    )


def plane_of(up: tuple[float, float, float]) -> Float[np.ndarray, "2 3"]:
    """Two unit vectors that make a right-handed frame with ``up``: right and depth of a top view.

    The first is the world's x axis turned as little as need be, or y where up is x.
    """
    vertical = np.array(up)
    first = np.eye(3)[0 if abs(vertical[0]) < 0.9 else 1]
    first = first - (first @ vertical) * vertical
    first = first / np.linalg.norm(first)
    return np.stack((first, np.cross(vertical, first)))


def _layout(backward: Float[np.ndarray, "N 3"], look_at: LookAt | None) -> Layout:
    mean = backward.mean(axis=0)
    length = np.linalg.norm(mean)
    if length > 0 and (backward @ mean >= length * np.cos(np.radians(_FORWARD_ANGLE))).all():
        return "forward"
    if (
        look_at is not None
        and look_at.in_front >= _IN_FRONT
        and look_at.miss <= _MISS * look_at.distance
    ):
        return "inward"
    return "outward"


def _azimuth_span(directions: Float[np.ndarray, "N 3"], up: Float[np.ndarray, " 3"]) -> float:
    if len(directions) < 2:
        return 0.0
    right, depth = plane_of(_triple(up))
    azimuths = np.sort(np.degrees(np.arctan2(directions @ depth, directions @ right)))
    gaps = np.diff(azimuths, append=azimuths[0] + 360)
    return float(360 - gaps.max())


def _triple(vector: Float[np.ndarray, " 3"]) -> tuple[float, float, float]:
    x, y, z = vector.tolist()
    return x, y, z


def camera_models(cameras: Cameras) -> list[str]:
    """nerfstudio's names of the camera models in use, in lower case."""
    return sorted({CameraType(int(value)).name.lower() for value in cameras.camera_type.unique()})


def half_view(cameras: Cameras) -> tuple[float, float]:
    """Width and height of the view at distance 1, halved; medians over the cameras."""
    x, y = cameras.width / (2 * cameras.fx), cameras.height / (2 * cameras.fy)
    return float(x.median()), float(y.median())


def corner_shift(cameras: Cameras) -> float | None:
    """Pixels by which lens distortion moves a photo's corner at most; None for other models.

    Fisheye lenses and the like are no perspective that something distorts.
    """
    if camera_models(cameras) != ["perspective"]:
        return None
    if cameras.distortion_params is None:
        return 0.0
    x = torch.cat((-cameras.cx, cameras.width - cameras.cx), dim=1) / cameras.fx
    y = torch.cat((-cameras.cy, cameras.height - cameras.cy), dim=1) / cameras.fy
    corners = torch.stack((x[:, [0, 0, 1, 1]], y[:, [0, 1, 0, 1]]), dim=-1)
    straight = radial_and_tangential_undistort(corners, cameras.distortion_params[:, None])
    focal = torch.cat((cameras.fx, cameras.fy), dim=1)[:, None]
    return float(((corners - straight) * focal).norm(dim=-1).max())
