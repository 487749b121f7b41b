"""The sample scene: a toy lighthouse on an island, its paint and its light.

Texture (stripes, bricks, cobbles, shingles), fine structure (railing, lattice, fence), glossy
highlights (glass floats, buoys, water) and much empty space, within [-1.2, 1.2]³; z is up.

Letters: R rays, P points on surfaces. Colours are linear reflectances until they are encoded.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from masked_wavelet_nerf.datasets.primitives import (
    Array,
    Box,
    Frustum,
    Hull,
    Part,
    Rod,
    Sphere,
    bricks,
    enclosing_ball,
    helix,
    plain,
)

_SEA, _GROUND = -0.76, -0.62
_ISLAND = (0.06, 0.0)
_TOWER = (-0.15, 0.13)
LAMP = (*_TOWER, 0.67)
"""Where the lamp is: in the middle of the lantern, seen through its bars from all sides."""
_HOUSE_X, _HOUSE_Y, _EAVES, _PITCH = (0.14, 0.57), (-0.51, -0.16), -0.32, math.radians(38)

_WHITE, _RED = np.array([0.86, 0.84, 0.78]), np.array([0.66, 0.045, 0.04])
_IRON, _WOOD = plain(0.05, 0.06, 0.08), plain(0.32, 0.17, 0.08)
_GLASS, _GOLD, _CREAM = plain(0.03, 0.06, 0.1), plain(0.9, 0.55, 0.1), plain(0.84, 0.8, 0.7)
_BRICK = bricks(np.array([0.5, 0.17, 0.09]), np.array([0.66, 0.6, 0.52]), (0.11, 0.06))


def _waves(points: Array) -> Array:
    """The sea: rings that run outwards from the island."""
    distance = np.hypot(points[:, 0] - _ISLAND[0], points[:, 1] - _ISLAND[1])
    crest = (0.5 + 0.5 * np.sin(distance * 70))[:, None]
    return crest * np.array([0.10, 0.42, 0.55]) + (1 - crest) * np.array([0.02, 0.20, 0.36])


def _island(points: Array) -> Array:
    """Sand on the slope, mown stripes on top, a checker of cobbles around the tower."""
    lawn = np.floor((points[:, 0] + points[:, 1]) / 0.11) % 2
    colour = np.where(lawn[:, None] == 0, [0.16, 0.36, 0.07], [0.24, 0.47, 0.10])
    x, y = points[:, 0] - _TOWER[0], points[:, 1] - _TOWER[1]
    ring = np.floor(np.hypot(x, y) / 0.075)
    sector = np.floor(np.arctan2(y, x) / (2 * np.pi) * 28)
    cobbles = np.where(((ring + sector) % 2 == 0)[:, None], [0.62, 0.57, 0.48], [0.33, 0.31, 0.30])
    colour = np.where((ring < 7)[:, None], cobbles, colour)
    layer = (0.85 + 0.15 * np.sin(points[:, 2:] * 110)) * np.array([0.72, 0.55, 0.30])
    return np.where(points[:, 2:] < _GROUND - 1e-6, layer, colour)


def _shingles(points: Array) -> Array:
    """Courses of roof tiles along x, every other one shifted by half; shades differ."""
    course = np.floor(points[:, 2] / 0.036)
    along = points[:, 0] / 0.07 + 0.5 * (course % 2)
    shade = 0.75 + 0.25 * np.sin(12.9 * np.floor(along) + 4.1 * course)
    edge = np.where(points[:, 2] / 0.036 % 1 < 0.22, 0.55, 1.0)
    return (shade * edge)[:, None] * np.array([0.12, 0.19, 0.33])


def _hoops(one: Array, other: Array, width: float) -> Callable[[Array], Array]:
    """Level stripes."""
    return lambda points: np.where(np.floor(points[:, 2:] / width) % 2 == 0, one, other)


def _on_circle(
    centre: tuple[float, float], radius: float, turn: float, z: float
) -> tuple[float, float, float]:
    """The point at ``turn`` (1 = once around, from the x axis) of a level circle."""
    angle = 2 * math.pi * turn
    return centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle), z


def _lighthouse() -> Iterator[Part]:
    x, y = _TOWER
    tower = Frustum(_TOWER, -0.58, 0.42, 0.29, 0.185)
    yield Part(Frustum(_TOWER, _GROUND, -0.54, 0.35, 0.33), _CREAM)
    yield Part(tower, helix(_WHITE, _RED, 1.5, 2, _TOWER), 0.25)
    yield Part(Frustum(_TOWER, 0.36, 0.44, 0.19, 0.33), _CREAM)
    yield Part(Frustum(_TOWER, 0.44, 0.48, 0.35, 0.35), _IRON)
    yield Part(Frustum(_TOWER, 0.48, 0.55, 0.17, 0.17), plain(*_RED))
    yield Part(Sphere(LAMP, 0.09), plain(4.0, 2.2, 0.35))  # brighter than any light: it glows
    yield Part(Frustum(_TOWER, 0.79, 0.82, 0.22, 0.22), _IRON)
    yield Part(Frustum(_TOWER, 0.82, 1.02, 0.20, 0.02), _hoops(_RED, 0.55 * _RED, 0.04), 0.6)
    yield Part(Sphere((x, y, 1.04), 0.035), _GOLD, 1.0)
    yield Part(Rod((x, y, 1.04), (x, y, 1.17), 0.009), _IRON)
    # Door and windows are bars from the axis through the wall, on the sides of a compass.
    for paint, width, low, high, (east, north), gloss in (
        (_CREAM, 0.085, -0.54, -0.30, (0, -1), 0.0),
        (_WOOD, 0.06, -0.54, -0.33, (0, -1), 0.0),
        (_GLASS, 0.035, -0.10, 0.01, (0, -1), 0.5),
        (_GLASS, 0.035, 0.02, 0.13, (1, 0), 0.5),
        (_GLASS, 0.035, -0.05, 0.06, (0, 1), 0.5),
        (_GLASS, 0.035, 0.16, 0.27, (-1, 0), 0.5),
    ):
        wall = 0.29 - 0.105 * (low - tower.bottom)
        reach = wall + (0.006 if paint is _CREAM else 0.012)
        ends = np.array([[x, y], [x + reach * east, y + reach * north]])
        aside = width * np.array([abs(north), abs(east)])
        yield Part(Box((*(ends.min(0) - aside), low), (*(ends.max(0) + aside), high)), paint, gloss)
    posts = 14
    for post in range(posts):
        here, there = post / posts, (post + 1) / posts
        foot, head = _on_circle(_TOWER, 0.33, here, 0.48), _on_circle(_TOWER, 0.33, here, 0.64)
        yield Part(Rod(foot, head, 0.011), _IRON)
        yield Part(Rod(head, _on_circle(_TOWER, 0.33, there, 0.64), 0.011), _IRON)
        yield Part(Rod(foot, _on_circle(_TOWER, 0.33, there, 0.64), 0.006), _IRON)
    for bar in range(8):
        foot, head = (_on_circle(_TOWER, 0.155, bar / 8, z) for z in (0.55, 0.79))
        yield Part(Rod(foot, head, 0.010), _IRON)


def _house() -> Iterator[Part]:
    (x0, x1), (y0, y1) = _HOUSE_X, _HOUSE_Y
    middle, half = (y0 + y1) / 2, (y1 - y0) / 2
    slopes = []
    for side in (1, -1):
        normal = (0.0, side * math.sin(_PITCH), math.cos(_PITCH))
        offset = normal[1] * (middle + side * half) + normal[2] * _EAVES
        slopes.append((normal, offset))
        downhill = (0.0, side * math.cos(_PITCH), -math.sin(_PITCH))
        eaves = downhill[1] * (middle + side * half) + downhill[2] * _EAVES + 0.05
        slab = (
            (normal, offset + 0.03),
            ((0.0, -normal[1], -normal[2]), -offset),
            (downhill, eaves),
            ((0.0, -float(side), 0.0), -side * middle),
            ((1.0, 0.0, 0.0), x1 + 0.04),
            ((-1.0, 0.0, 0.0), -x0 + 0.04),
        )
        yield Part(Hull(slab), _shingles, 0.15)
    walls = (
        ((1.0, 0.0, 0.0), x1),
        ((-1.0, 0.0, 0.0), -x0),
        ((0.0, 1.0, 0.0), y1),
        ((0.0, -1.0, 0.0), -y0),
        ((0.0, 0.0, -1.0), -_GROUND),
    )
    yield Part(Hull((*walls, *slopes)), _BRICK)
    yield Part(Box((0.42, middle - 0.12, -0.3), (0.50, middle - 0.04, -0.03)), _BRICK)
    yield Part(Box((0.41, middle - 0.13, -0.03), (0.51, middle - 0.03, -0.005)), _CREAM)
    yield Part(Box((0.20, y0 - 0.012, _GROUND), (0.30, y0, -0.42)), plain(0.06, 0.25, 0.22), 0.3)
    for low, high in (
        ((0.37, y0 - 0.012, -0.52), (0.50, y0, -0.40)),
        ((0.28, y1, -0.52), (0.43, y1 + 0.012, -0.40)),
        ((x1, middle - 0.07, -0.52), (x1 + 0.012, middle + 0.07, -0.40)),
    ):
        yield Part(Box(low, high), _CREAM)
        thickness = np.array(high) - low
        thin = thickness.argmin()
        margin = np.where(np.arange(3) == thin, -0.004, 0.022)
        pane = Box(tuple(low + margin), tuple(high - margin))
        yield Part(pane, plain(0.04, 0.09, 0.15), 0.7)


def _tree(x: float, y: float, size: float) -> Iterator[Part]:
    yield Part(Frustum((x, y), _GROUND, _GROUND + 0.12 * size, 0.04 * size, 0.03 * size), _WOOD)
    needles = _hoops(np.array([0.03, 0.20, 0.09]), np.array([0.06, 0.30, 0.12]), 0.035)
    for bottom, top, radius in ((0.10, 0.34, 0.19), (0.25, 0.48, 0.15), (0.39, 0.62, 0.11)):
        cone = Frustum((x, y), _GROUND + bottom * size, _GROUND + top * size, radius * size, 0.0)
        yield Part(cone, needles)


def _shore() -> Iterator[Part]:
    yield Part(Frustum((0.0, 0.0), -0.86, -0.79, 1.0, 1.0), _hoops(*_GRAIN, 0.02), 0.3)
    yield Part(Frustum((0.0, 0.0), -0.79, _SEA, 0.96, 0.96), _waves, 0.6)
    yield Part(Frustum(_ISLAND, _SEA, _GROUND, 0.84, 0.78), _island)
    pickets = 26
    for picket in range(2, pickets - 2):  # the gap is where the pier is
        here, there = 0.5 + picket / pickets, 0.5 + (picket + 1) / pickets
        foot, head = (_on_circle(_ISLAND, 0.74, here, _GROUND + z) for z in (0, 0.16))
        yield Part(Rod(foot, head, 0.013), _CREAM)
        if picket < pickets - 3:
            for z in (0.06, 0.12):
                start, end = (
                    _on_circle(_ISLAND, 0.74, turn, _GROUND + z) for turn in (here, there)
                )
                yield Part(Rod(start, end, 0.008), _CREAM)
    for plank in range(6):
        x = -0.94 + 0.055 * plank
        yield Part(Box((x, -0.10, -0.645), (x + 0.042, 0.10, -0.615)), _WOOD)
    for x, y in itertools.product((-0.925, -0.80), (-0.1, 0.1)):
        yield Part(Rod((x, y, _SEA), (x, y, -0.55), 0.018), _WOOD)
    for turn, radius, paint in ((0.64, 0.88, _RED), (0.29, 0.88, np.array([0.9, 0.45, 0.02]))):
        x, y, z = _on_circle((0.0, 0.0), radius, turn, _SEA + 0.03)
        yield Part(Sphere((x, y, z), 0.07), _hoops(_WHITE, paint, 0.055), 0.9)
        yield Part(Rod((x, y, z), (x, y, z + 0.13), 0.01), _IRON)
    for x, y, radius, paint in (
        (0.38, 0.42, 0.16, (0.02, 0.13, 0.42)),
        (-0.20, -0.52, 0.11, (0.75, 0.16, 0.01)),
        (-0.02, -0.60, 0.07, (0.04, 0.34, 0.20)),
    ):
        yield Part(Sphere((x, y, _GROUND + 0.97 * radius), radius), plain(*paint), 1.0)


_GRAIN = np.array([0.30, 0.14, 0.06]), np.array([0.22, 0.09, 0.035])


@functools.cache
def _scene() -> tuple[tuple[Part, ...], Array, Array]:
    """The parts (N), and centres (N, 3) and radii (N,) of balls around them, a little too wide."""
    parts = (
        *_shore(),
        *_lighthouse(),
        *_house(),
        *_tree(0.59, 0.13, 0.9),
        *_tree(0.04, 0.57, 0.75),
    )
    balls = [enclosing_ball(part.solid) for part in parts]
    return parts, np.array([centre for centre, _ in balls]), np.array([r + 1e-3 for _, r in balls])


_SUN = np.array([0.62, -0.30, 0.72]) / np.linalg.norm([0.62, -0.30, 0.72])
_SUNLIGHT, _SKYLIGHT, _BOUNCE = (
    np.array([0.98, 0.90, 0.76]),
    np.array([0.38, 0.44, 0.54]),
    np.array([0.20, 0.17, 0.13]),
)
_OCCLUDERS = np.array(
    [(*_TOWER, z, radius) for z, radius in ((-0.5, 0.28), (-0.2, 0.25), (0.1, 0.22), (0.8, 0.2))]
    + [(0.25, -0.33, -0.46, 0.18), (0.46, -0.33, -0.46, 0.18), (0.36, -0.33, -0.3, 0.18)]
    + [(0.38, 0.42, -0.46, 0.16), (-0.2, -0.52, -0.51, 0.11), (-0.02, -0.6, -0.55, 0.07)]
    + [(0.59, 0.13, -0.43, 0.14), (0.04, 0.57, -0.48, 0.11), (*_ISLAND, -1.2, 0.7)]
)
"""Balls (x, y, z, radius) that keep light of the sky from what is near them."""


def _nearest(origins: Array, directions: Array) -> tuple[Array, Array]:
    """Distance (R,) to the nearest part, infinite for none, and its index (R,), -1 for none."""
    parts, centres, radii = _scene()
    distance, index = np.full(len(origins), np.inf), np.full(len(origins), -1)
    # A ray can only enter a part if it meets the ball around it: with t = (c - o)·d,
    # t² >= |c - o|² - r², and the ball is not behind (t > 0), unless it starts in the ball.
    # Both sides are products of (ray) and (ball) vectors; single precision is enough, as the
    # balls have been widened.
    ones = np.ones(len(origins))
    rays_t = np.array([*directions.T, -np.einsum("ri,ri->r", origins, directions)], np.float32)
    rays_gap = np.array([*origins.T, np.einsum("ri,ri->r", origins, origins), ones], np.float32)
    for number, part in enumerate(parts):
        centre, radius = centres[number], radii[number]
        t = np.array([*centre, 1], np.float32) @ rays_t
        gap = np.array([*(-2 * centre), 1, centre @ centre - radius**2], np.float32) @ rays_gap
        rays = np.flatnonzero((t * t >= gap) & ((t > 0) | (gap <= 0)))
        if len(rays):
            found = part.solid.enter(origins[rays], directions[rays])
            nearer = found < distance[rays]
            distance[rays[nearer]], index[rays[nearer]] = found[nearer], number
    return distance, index


def _sky(directions: Array) -> Array:
    """Smooth surroundings (R, 3), seen only in reflections: a gradient and two soft lights."""
    height = (directions[:, 2:] + 1) / 2
    colour = height * np.array([0.45, 0.65, 0.95]) + (1 - height) * np.array([0.30, 0.26, 0.22])
    for place, sharpness, light in (((-0.7, 0.4, 0.6), 12, 0.9), ((0.1, -0.9, 0.3), 20, 0.6)):
        cosine = directions @ (np.array(place) / np.linalg.norm(place))
        colour = colour + light * np.exp(sharpness * (cosine - 1))[:, None]
    return colour


def _openness(points: Array, normals: Array) -> Array:
    """Share of the sky (P,) that the occluders leave free.

    A ball of radius r at distance d and angle a from the normal takes cos a · (r / d)² of the
    light of a uniform sky (exact while it stands above the horizon of the point).
    """
    open_share = np.ones(len(points))
    for *centre, radius in _OCCLUDERS:
        offset = np.array(centre) - points
        distance2 = np.maximum(np.einsum("pi,pi->p", offset, offset), radius**2)
        cosine = np.einsum("pi,pi->p", offset, normals) / np.sqrt(distance2)
        open_share *= 1 - np.clip(cosine, 0, 1) * radius**2 / distance2
    return open_share


def shade(origins: Array, directions: Array) -> tuple[Array, Array]:
    """Colours (R, 3) as they are stored, [0, 1], and whether a ray hits anything (R,)."""
    distance, index = _nearest(origins, directions)
    is_hit = index >= 0
    points = origins[is_hit] + distance[is_hit, None] * directions[is_hit]
    views, owners = directions[is_hit], index[is_hit]
    base, normals, gloss = np.zeros_like(points), np.zeros_like(points), np.zeros(len(points))
    parts = _scene()[0]
    for number in np.unique(owners):
        own, part = owners == number, parts[number]
        base[own], normals[own] = part.colour(points[own]), part.solid.normals(points[own])
        gloss[own] = part.gloss
    # What faces away from the sun is dark without asking for a shadow.
    sun = np.clip(normals @ _SUN, 0, None)
    faces = np.flatnonzero(sun > 0)
    towards_sun = np.broadcast_to(_SUN, (len(faces), 3))
    sun[faces] *= _nearest(points[faces] + 1e-3 * normals[faces], towards_sun)[1] < 0
    up = (normals[:, 2:] + 1) / 2
    ambient = (up * _SKYLIGHT + (1 - up) * _BOUNCE) * _openness(points, normals)[:, None]
    facing = -np.einsum("pi,pi->p", views, normals)
    mirrored = views + 2 * facing[:, None] * normals
    highlight = np.clip(mirrored @ _SUN, 0, 1) ** 28 * (sun > 0)
    fresnel = 0.14 + 0.6 * (1 - np.clip(facing, 0, 1)) ** 5  # Schlick, held down at the rim
    reflection = fresnel[:, None] * _sky(mirrored) + 0.9 * highlight[:, None]
    colours = np.zeros_like(origins)
    linear = base * (ambient + sun[:, None] * _SUNLIGHT) + gloss[:, None] * reflection
    colours[is_hit] = np.clip(linear, 0, 1) ** (1 / 2.2)
    return colours, is_hit
