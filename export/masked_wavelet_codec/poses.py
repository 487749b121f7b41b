"""Poses of cameras as integers that fit a lattice, and back: a third of the bytes of floats.

A rotation by the angle t about the unit axis a is p = a tan(t / 4), its modified Rodrigues
parameters: at most 1 long, and the rotation is a quotient of polynomials of them, so that the same
integers are the same floats on every machine. The steps are 2**-19 of p, at most 7.6e-6 radians
(0.01 pixels of a photo 1,300 pixels wide and as far away), and of positions 2**-18 of the power of
two that none of their coordinates exceeds.

    turn    3 integers, |k| <= 2**19: p = k / 2**19
    place   3 integers, |k| <= 2**18: position = k * 2**(exponent - 18)
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from masked_wavelet_codec.scene import Cameras

__all__ = ["EXPONENTS", "PLACE_BITS", "TURN_BITS", "Poses", "matrices", "on_lattice", "round_poses"]

TURN_BITS = 19
PLACE_BITS = 18
EXPONENTS = range(-128, 128)
_UNIT = float(2**TURN_BITS)
_MOST_BENT = 1e-4
"""How far a matrix may be from a rotation, in any element of its product with its transpose."""


class Poses(NamedTuple):
    """Poses of N cameras."""

    exponent: int
    """In ``EXPONENTS``; of positions."""
    turns: np.ndarray
    """int64 (N, 3)."""
    places: np.ndarray
    """int64 (N, 3)."""


def round_poses(cameras: Cameras) -> Cameras:
    """The cameras with the nearest poses that take a third of the bytes.

    As they are where they lie on the lattice already, or where one is no pose: a matrix with scale
    or reflection, or what is not finite.
    """
    poses = _nearest(cameras.camera_to_worlds)
    if poses is None or _exact(poses, cameras.camera_to_worlds) is not None:
        return cameras
    return dataclasses.replace(cameras, camera_to_worlds=matrices(poses))


def on_lattice(camera_to_worlds: np.ndarray) -> Poses | None:
    """The integers whose ``matrices`` are these, bit for bit; None if there are none, or no poses.

    Args:
        camera_to_worlds: float32 (N, 3, 4).
    """
    poses = _nearest(camera_to_worlds)
    return None if poses is None else _exact(poses, camera_to_worlds)


def matrices(poses: Poses) -> np.ndarray:
    """float32 (N, 3, 4): camera to world."""
    p = poses.turns.astype(np.float64) / _UNIT
    squares = p[:, 0] * p[:, 0] + p[:, 1] * p[:, 1] + p[:, 2] * p[:, 2]
    w, (x, y, z) = 1 - squares, (2 * p).T
    rotations = np.array(
        [
            [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
        ]
    )
    # Zero added: no zero has a sign.
    turned = (rotations / ((1 + squares) * (1 + squares)) + 0.0).transpose(2, 0, 1)
    moved = poses.places.astype(np.float64) * 2.0 ** (poses.exponent - PLACE_BITS)
    return np.concatenate((turned, moved[:, :, None]), axis=2).astype(np.float32)


def _exact(poses: Poses, camera_to_worlds: np.ndarray) -> Poses | None:
    """The poses, or None where their matrices are not these bit for bit."""
    wanted = np.ascontiguousarray(camera_to_worlds).view(np.uint32)
    # Half a turn about an axis is one about its opposite: noise decides which is found.
    other = poses._replace(turns=-poses.turns)
    is_same, is_other = (
        (matrices(tried).view(np.uint32) == wanted).all(axis=(1, 2)) for tried in (poses, other)
    )
    if not (is_same | is_other).all():
        return None
    return poses._replace(turns=np.where(is_same[:, None], poses.turns, other.turns))


def _nearest(camera_to_worlds: np.ndarray) -> Poses | None:
    if not len(camera_to_worlds):
        return None
    given = camera_to_worlds.astype(np.float64)
    rotations, positions = given[:, :, :3], given[:, :, 3]
    if not np.isfinite(given).all():
        return None
    bent = rotations @ rotations.transpose(0, 2, 1) - np.eye(3)
    if np.abs(bent).max() > _MOST_BENT or (np.linalg.det(rotations) < 0).any():
        return None
    mantissa, exponent = np.frexp(np.abs(positions).max())
    # Positions below the least exponent's are some of its steps, or none.
    exponent = max(int(exponent) - int(mantissa == 0.5), EXPONENTS[0])
    if exponent not in EXPONENTS:
        return None
    places = np.rint(positions * 2.0 ** (PLACE_BITS - exponent)).astype(np.int64)
    quaternions = _quaternions(rotations)
    p = quaternions[:, 1:] / (1 + quaternions[:, :1]) * _UNIT
    turns = np.rint(p)
    # Never longer than 1, where another p is the same rotation.
    is_long = (turns * turns).sum(axis=1, keepdims=True) > _UNIT * _UNIT
    turns = np.where(is_long, np.trunc(p), turns).astype(np.int64)
    return Poses(exponent, turns, places)


def _quaternions(rotations: np.ndarray) -> np.ndarray:
    """w, x, y, z of unit length, w not negative, from the largest of the four (Shepperd 1978).

    scipy has this; the codec does without it.
    """
    r = rotations.transpose(1, 2, 0)
    xx, yy, zz = r[0, 0], r[1, 1], r[2, 2]
    wx, wy, wz = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]
    xy, xz, yz = r[1, 0] + r[0, 1], r[0, 2] + r[2, 0], r[2, 1] + r[1, 2]
    products = np.array(
        [
            [1 + xx + yy + zz, wx, wy, wz],
            [wx, 1 + xx - yy - zz, xy, xz],
            [wy, xy, 1 - xx + yy - zz, yz],
            [wz, xz, yz, 1 - xx - yy + zz],
        ]
    )
    largest = products.diagonal().argmax(axis=1)
    rows = products.transpose(2, 0, 1)[np.arange(len(rotations)), largest]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.where(rows[:, :1] < 0, -1.0, 1.0)
