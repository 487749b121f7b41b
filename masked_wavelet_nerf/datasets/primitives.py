"""Solids that a ray can hit, and their paint: what the sample scene is made of.

Letters: R rays, P points on surfaces. World units; z is up. Every solid answers two questions: at
what distance a ray enters it, and which way its surface faces there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Array = np.ndarray

_FAR = np.inf
_CLEAR = 1e-4
"""Hits nearer than this are the surface that the ray starts from."""


@runtime_checkable
class Solid(Protocol):
    """A convex solid."""

    def enter(self, origins: Array, directions: Array) -> Array:
        """Distance (R,) at which rays (R, 3) enter; infinite where they miss."""
        ...

    def normals(self, points: Array) -> Array:
        """Unit normals (P, 3), outwards, at points (P, 3) of the surface."""
        ...


@dataclass(frozen=True)
class Sphere:
    """A ball."""

    centre: tuple[float, float, float]
    radius: float

    def enter(self, origins: Array, directions: Array) -> Array:
        """See :class:`Solid`."""
        offset = origins - np.array(self.centre)
        b = (offset * directions).sum(-1)
        root = b * b - (offset * offset).sum(-1) + self.radius**2
        near = -b - np.sqrt(np.maximum(root, 0))
        return np.where((root > 0) & (near > _CLEAR), near, _FAR)

    def normals(self, points: Array) -> Array:
        """See :class:`Solid`."""
        return (points - np.array(self.centre)) / self.radius


@dataclass(frozen=True)
class Box:
    """An axis-aligned box."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def enter(self, origins: Array, directions: Array) -> Array:
        """See :class:`Solid`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            one = (np.array(self.low) - origins) / directions
            other = (np.array(self.high) - origins) / directions
        near = np.fmin(one, other).max(-1)
        far = np.fmax(one, other).min(-1)
        return np.where((near <= far) & (near > _CLEAR), near, _FAR)

    def normals(self, points: Array) -> Array:
        """See :class:`Solid`."""
        middle = (np.array(self.low) + np.array(self.high)) / 2
        half = (np.array(self.high) - np.array(self.low)) / 2
        relative = (points - middle) / half
        face = np.abs(relative).argmax(-1)
        normals = np.zeros_like(points)
        rows = np.arange(len(points))
        normals[rows, face] = np.sign(relative[rows, face])
        return normals


@dataclass(frozen=True)
class Frustum:
    """A truncated cone around a vertical axis: a cylinder, a cone, a disc."""

    centre: tuple[float, float]
    bottom: float
    top: float
    bottom_radius: float
    top_radius: float

    @property
    def _slope(self) -> float:
        return (self.top_radius - self.bottom_radius) / (self.top - self.bottom)

    def enter(self, origins: Array, directions: Array) -> Array:
        """See :class:`Solid`."""
        x, y = origins[:, 0] - self.centre[0], origins[:, 1] - self.centre[1]
        dx, dy, dz = directions.T
        radius = self.bottom_radius + (origins[:, 2] - self.bottom) * self._slope
        growth = dz * self._slope
        a = dx * dx + dy * dy - growth * growth
        b = x * dx + y * dy - radius * growth
        c = x * x + y * y - radius * radius
        root = b * b - a * c
        found = np.full(len(origins), _FAR)
        with np.errstate(divide="ignore", invalid="ignore"):
            for sign in (-1, 1):
                t = (-b + sign * np.sqrt(np.maximum(root, 0))) / a
                z = origins[:, 2] + t * dz
                hit = (root > 0) & (t > _CLEAR) & (z >= self.bottom) & (z <= self.top)
                found = np.where(hit & (t < found), t, found)
            for height, rim in ((self.bottom, self.bottom_radius), (self.top, self.top_radius)):
                t = (height - origins[:, 2]) / dz
                inside = (x + t * dx) ** 2 + (y + t * dy) ** 2 <= rim * rim
                found = np.where(inside & (t > _CLEAR) & (t < found), t, found)
        return found

    def normals(self, points: Array) -> Array:
        """See :class:`Solid`."""
        radial = points - np.array([*self.centre, 0.0])
        radial[:, 2] = 0
        length = np.linalg.norm(radial, axis=-1, keepdims=True)
        normals = radial / np.maximum(length, 1e-12)
        normals[:, 2] = -self._slope
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        side = self.bottom_radius + (points[:, 2] - self.bottom) * self._slope
        on_side = np.abs(length[:, 0] - side) < 1e-6
        normals[(np.abs(points[:, 2] - self.top) < 1e-6) & ~on_side] = (0, 0, 1)
        normals[(np.abs(points[:, 2] - self.bottom) < 1e-6) & ~on_side] = (0, 0, -1)
        return normals


@dataclass(frozen=True)
class Rod:
    """A round rod with round ends, between any two points."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float

    def enter(self, origins: Array, directions: Array) -> Array:
        """Distance (R,) at which rays (R, 3) enter; infinite where they miss."""
        axis = np.subtract(self.end, self.start)
        length2 = axis @ axis
        offset = origins - np.array(self.start)
        ray_axis, offset_axis = directions @ axis, offset @ axis
        a = length2 - ray_axis**2
        b = length2 * np.einsum("ri,ri->r", directions, offset) - offset_axis * ray_axis
        c = length2 * (np.einsum("ri,ri->r", offset, offset) - self.radius**2) - offset_axis**2
        root = b * b - a * c
        with np.errstate(divide="ignore", invalid="ignore"):
            side = (-b - np.sqrt(np.maximum(root, 0))) / a
            along = (offset_axis + side * ray_axis) / length2
        on_side = (root > 0) & (side > _CLEAR) & (along >= 0) & (along <= 1)
        found = np.where(on_side, side, np.inf)
        for end in (self.start, self.end):
            found = np.minimum(found, Sphere(end, self.radius).enter(origins, directions))
        return found

    def normals(self, points: Array) -> Array:
        """Unit normals (P, 3), outwards, at points (P, 3) of the surface."""
        axis = np.subtract(self.end, self.start)
        along = np.clip((points - np.array(self.start)) @ axis / (axis @ axis), 0, 1)
        return (points - np.array(self.start) - along[:, None] * axis) / self.radius


@dataclass(frozen=True)
class Hull:
    """A convex solid with flat faces: all points with normal · point <= offset at every face."""

    faces: tuple[tuple[tuple[float, float, float], float], ...]
    """Outward unit normals and offsets."""

    @functools.cached_property
    def _planes(self) -> tuple[Array, Array]:
        return np.array([n for n, _ in self.faces]), np.array([o for _, o in self.faces])

    def enter(self, origins: Array, directions: Array) -> Array:
        """Distance (R,) at which rays (R, 3) enter; infinite where they miss."""
        normals, offsets = self._planes
        approach = directions @ normals.T
        room = offsets - origins @ normals.T
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = room / approach
        near = np.where(approach < 0, crossing, -np.inf).max(-1)
        far = np.where(approach > 0, crossing, np.inf).min(-1)
        passes = ((approach != 0) | (room >= 0)).all(-1)
        return np.where(passes & (near <= far) & (near > _CLEAR), near, np.inf)

    def normals(self, points: Array) -> Array:
        """Unit normals (P, 3), outwards, at points (P, 3) of the surface."""
        normals, offsets = self._planes
        return normals[np.abs(points @ normals.T - offsets).argmin(-1)]

    @property
    def corners(self) -> Array:
        """(N, 3): where three faces meet."""
        normals, offsets = self._planes
        corners = []
        for trio in itertools.combinations(range(len(offsets)), 3):
            three = normals[list(trio)]
            if abs(np.linalg.det(three)) > 1e-9:
                corner = np.linalg.solve(three, offsets[list(trio)])
                if (normals @ corner <= offsets + 1e-9).all():
                    corners.append(corner)
        return np.array(corners)


def enclosing_ball(solid: Solid) -> tuple[Array, float]:
    """Centre (3,) and radius of a ball around a solid."""
    match solid:
        case Sphere(centre, radius):
            return np.array(centre), radius
        case Box(low, high):
            return np.add(low, high) / 2, float(np.linalg.norm(np.subtract(high, low)) / 2)
        case Frustum(centre, bottom, top, bottom_radius, top_radius):
            reach = math.hypot(max(bottom_radius, top_radius), (top - bottom) / 2)
            return np.array([*centre, (bottom + top) / 2]), reach
        case Rod(start, end, radius):
            length = float(np.linalg.norm(np.subtract(end, start)))
            return np.add(start, end) / 2, length / 2 + radius
        case Hull():
            corners = solid.corners
            middle = (corners.min(0) + corners.max(0)) / 2
            return middle, float(np.linalg.norm(corners - middle, axis=-1).max())
    raise TypeError(
        f"no ball is known around {type(solid).__name__}; add a case for it to enclosing_ball"
    )


@dataclass(frozen=True)
class Part:
    """A solid with its paint."""

    solid: Solid
    colour: Callable[[Array], Array]
    """Points (P, 3) to linear colours (P, 3)."""
    gloss: float = 0.0
    """Strength of highlight and reflection, 0 to 1."""


def plain(red: float, green: float, blue: float) -> Callable[[Array], Array]:
    """One colour all over."""
    return lambda points: np.broadcast_to(np.array([red, green, blue]), points.shape)


def helix(
    one: Array, other: Array, turns: float, starts: int, centre: tuple[float, float]
) -> Callable[[Array], Array]:
    """Stripes that wind around a vertical axis."""

    def colour(points: Array) -> Array:
        angle = np.arctan2(points[:, 1] - centre[1], points[:, 0] - centre[0]) / (2 * np.pi)
        stripe = np.floor(2 * (starts * angle + turns * points[:, 2])).astype(int) % 2
        return np.where(stripe[:, None] == 0, one, other)

    return colour


def bricks(brick: Array, mortar: Array, size: tuple[float, float]) -> Callable[[Array], Array]:
    """Courses of bricks on upright walls, every other one shifted by half; shades differ."""

    def colour(points: Array) -> Array:
        along = (points[:, 0] + points[:, 1]) / size[0]
        up = points[:, 2] / size[1]
        row = np.floor(up)
        along = along + 0.5 * (row % 2)
        joint = (along % 1 < 0.12) | (up % 1 < 0.2)
        shade = 0.8 + 0.2 * np.sin(12.9 * np.floor(along) + 78.2 * row)
        return np.where(joint[:, None], mortar, brick * shade[:, None])

    return colour
