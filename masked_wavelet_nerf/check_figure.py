"""The picture of ``mwnerf check``: cameras and box from above and from the side, some photos.

N, M count cameras.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from masked_wavelet_nerf.coverage import Coverage, plane_of
from masked_wavelet_nerf.files import replace_file
from masked_wavelet_nerf.survey import Thumbnail

TRAIN, HELD_OUT, BOX, LOOK_AT = "#2a6fbb", "#e07b1a", "#3a9a5b", "#c2273d"
"""Colours of cameras to train on and to evaluate with, of the scene box, of what is looked at."""
_INK, _FRAME = "#333333", "#bbbbbb"
_CAMERA_SHARE = 0.06
"""Length of a camera's pyramid, as a share of the picture's extent."""


class _Group(NamedTuple):
    """Cameras that are drawn alike."""

    label: str
    colour: str
    poses: Float[np.ndarray, "N 3 4"]


def draw(
    path: Path,
    *,
    title: str,
    train: Float[np.ndarray, "N 3 4"],
    held_out: Float[np.ndarray, "M 3 4"],
    half_view: tuple[float, float],
    coverage: Coverage,
    box: Float[np.ndarray, "2 3"],
    photos: Sequence[Thumbnail],
) -> None:
    """Writes the picture as PNG, all or nothing; the folder is made if need be.

    Args:
        path: the file; an older one is replaced by a complete new one only.
        title: written above.
        train: cameras to train on, camera to world; at least one.
        held_out: cameras to evaluate with; may be none.
        half_view: width and height of the view at distance 1, halved.
        coverage: says what is up and what the cameras look at.
        box: lowest and highest corner of the scene box.
        photos: all are shown in a row below; may be none.

    Raises:
        OSError: if it cannot be written; an older file stays as it was.
    """
    groups = [_Group("training camera", TRAIN, train)]
    if len(held_out):
        groups.append(_Group("evaluation camera", HELD_OUT, held_out))
    is_looked_at = coverage.look_at is not None and coverage.layout != "outward"
    look_at = np.array([coverage.look_at.point] if coverage.look_at and is_looked_at else [])
    look_at = look_at.reshape(-1, 3)

    heights = [6.1, 1.5] if photos else [6.1]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=_INK)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    views = figure.add_subfigure(grid[0])
    positions = np.concatenate([group.poses[:, :, 3] for group in groups])
    points = np.concatenate((positions, box, look_at))
    pyramid = _pyramid(half_view, _CAMERA_SHARE * float(np.ptp(points, axis=0).max()))
    (right, depth), up = plane_of(coverage.up), np.array(coverage.up)
    # From the side that shows more: forward-facing cameras not from behind.
    seen = np.concatenate((positions, look_at))
    side = max(right, depth, key=lambda axis: np.ptp(seen @ axis))
    planes = {"from above": np.stack((right, depth)), "from the side": np.stack((side, up))}
    half = 0.56 * max(np.ptp(points @ plane.T, axis=0).max() for plane in planes.values())
    for axes, (name, plane) in zip(views.subplots(1, 2), planes.items(), strict=True):
        _draw_view(axes, plane, groups, pyramid, box, look_at)
        ends = np.stack([(points @ plane.T).min(axis=0), (points @ plane.T).max(axis=0)])
        x, y = ends.mean(axis=0)
        axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal")
        axes.set_title(name, fontsize=10, color=_INK)
        axes.set_xlabel(_axis_name(plane[0]))
        axes.set_ylabel(_axis_name(plane[1]), rotation=0)
    _add_legend(views, groups, is_looked_at)
    if photos:
        _draw_photos(figure.add_subfigure(grid[1]), photos)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    _write(path, encoded.getvalue())


def _draw_view(
    axes: Axes,
    plane: Float[np.ndarray, "2 3"],
    groups: Sequence[_Group],
    pyramid: Float[np.ndarray, "4 3"],
    box: Float[np.ndarray, "2 3"],
    look_at: Float[np.ndarray, "K 3"],
) -> None:
    """Projects everything onto two unit vectors, right and upward in the picture."""
    axes.add_collection(LineCollection(list(_box_edges(box) @ plane.T), colors=BOX, linewidths=1.3))
    for group in groups:
        lines = _frusta(group.poses, pyramid) @ plane.T
        axes.add_collection(
            LineCollection(list(lines), colors=group.colour, linewidths=0.7, alpha=0.75)
        )
        axes.plot(*(group.poses[:, :, 3] @ plane.T).T, ".", color=group.colour, markersize=4)
    axes.plot(*(look_at @ plane.T).T, "*", color=LOOK_AT, markersize=14, zorder=3)
    axes.grid(visible=True, alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[:].set_color(_FRAME)


def _draw_photos(strip: SubFigure, photos: Sequence[Thumbnail]) -> None:
    for axes, photo in zip(strip.subplots(1, len(photos), squeeze=False)[0], photos, strict=True):
        axes.imshow(photo.pixels)
        axes.set_title(photo.name, fontsize=7, color=_INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(_FRAME)


def _pyramid(half_view: tuple[float, float], length: float) -> Float[np.ndarray, "4 3"]:
    """Corners of a camera's image plane, in its own frame."""
    x, y = half_view
    shrink = length / max(1.0, x, y)  # wide cameras would hide each other
    return shrink * np.array([[-x, -y, -1.0], [x, -y, -1], [x, y, -1], [-x, y, -1]])


def _frusta(
    poses: Float[np.ndarray, "N 3 4"], pyramid: Float[np.ndarray, "4 3"]
) -> Float[np.ndarray, "L 2 3"]:
    """Eight edges for each camera: from its position to the corners, and around them."""
    positions = poses[:, None, :, 3]
    corners = positions + np.einsum("nij,kj->nki", poses[:, :, :3], pyramid)
    spokes = np.stack((np.broadcast_to(positions, corners.shape), corners), axis=2)
    rim = np.stack((corners, np.roll(corners, -1, axis=1)), axis=2)
    return np.concatenate((spokes, rim), axis=1).reshape(-1, 2, 3)


def _box_edges(box: Float[np.ndarray, "2 3"]) -> Float[np.ndarray, "12 2 3"]:
    corners = np.array(
        [[box[i, 0], box[j, 1], box[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    )
    # Neighbours differ in one coordinate: in one bit of their number.
    edges = [(n, n | bit) for n in range(8) for bit in (1, 2, 4) if not n & bit]
    return corners[np.array(edges)]


def _axis_name(direction: Float[np.ndarray, " 3"]) -> str:
    """x, −z and so on; nothing for a direction that is no axis of the world."""
    axis = int(np.abs(direction).argmax())
    if abs(direction[axis]) < 1 - 1e-6:
        return ""
    return ("" if direction[axis] > 0 else "−") + "xyz"[axis]


def _add_legend(views: SubFigure, groups: Sequence[_Group], is_looked_at: bool) -> None:
    handles = [
        Line2D(
            [], [], color=colour, marker=".", label=f"{len(poses)} {label}{'s' * (len(poses) > 1)}"
        )
        for label, colour, poses in groups
    ]
    handles.append(Line2D([], [], color=BOX, label="scene box"))
    if is_looked_at:
        star = {"marker": "*", "markersize": 11, "linestyle": ""}
        handles.append(Line2D([], [], color=LOOK_AT, label="what they look at", **star))
    views.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.realpath(path))
    replace_file(target, lambda temporary: temporary.write_bytes(data))
