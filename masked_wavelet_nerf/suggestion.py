"""Which method and which flags a capture asks for: none that every capture wants."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from masked_wavelet_nerf.coverage import Coverage, distances_to_box

Background = Literal["transparent", "white", "black"]
"""What is behind an object that has nothing around it."""

BOUNDED_PLANES = 2.0, 6.0
"""Near and far plane of masked-wavelet-bounded, whose module takes too long to import."""
_BOXED = ("blender-data", "nsvf-data")
"""Data parsers whose box holds the scene."""
_LONGEST_SIDE = 1600
"""Pixels beyond which nerfstudio-data, too, takes smaller photos where there are any."""
_RAYS_WITHOUT_GPU = 1024
_NEAREST_SHARE = 0.1
"""Of the distance to what cameras look at: near plane of cameras that stand in the box."""


class Suggestion(NamedTuple):
    """How to train on a capture."""

    arguments: tuple[str, ...]
    """``ns-train`` and what follows."""
    reasons: tuple[str, ...]
    """One for the method, then one for every flag, in order."""


def suggest(
    capture: Path,
    dataparser: str,
    train: DataparserOutputs,
    coverage: Coverage,
    background: Background | None,
    *,
    has_gpu: bool,
) -> Suggestion:
    """Method and flags for a capture.

    Args:
        capture: what the data parser takes as its data.
        dataparser: nerfstudio's name of the data parser.
        train: at least one photo to train on.
        coverage: of its cameras.
        background: of its photos; None where surroundings were photographed.
        has_gpu: whether there is one to train with.
    """
    is_object = dataparser in _BOXED or (background is not None and coverage.layout == "inward")
    method = "masked-wavelet-bounded" if is_object else "masked-wavelet"
    if dataparser in _BOXED:
        why = f"{dataparser} gives a box that holds the scene"
    elif is_object:
        why = f"cameras around an object on a {background} background"
    else:
        why = "surroundings were photographed, and they reach beyond any box"
    flags: list[str] = []
    reasons = [f"{method}: {why}"]

    def add(flag: str, value: object, reason: str) -> None:
        flags.extend((f"--{flag}", str(value)))
        reasons.append(f"{flag}: {reason}")

    if is_object:
        planes = _near_and_far(train, coverage)
        if planes is not None:
            reach = "the defaults, made for Blender's scenes, would cut the scene off"
            add("pipeline.model.near-plane", planes[0], reach)
            add("pipeline.model.far-plane", planes[1], "so far is the box's last corner")
        if background == "black":
            add("pipeline.model.background-color", "black", "that is behind the object")
    longest = int(max(train.cameras.width.max(), train.cameras.height.max()))
    if longest > _LONGEST_SIDE:
        factor = 0.5 ** math.ceil(math.log2(longest / _LONGEST_SIDE))
        reason = (
            f"{longest} pixels a side; above {_LONGEST_SIDE} nerfstudio itself takes halved photos "
            "where it finds them"
        )
        add("pipeline.datamanager.camera-res-scale-factor", factor, reason)
    if not has_gpu:
        reason = "no GPU here; with a quarter of the rays a step takes about a quarter of the time"
        add("pipeline.datamanager.train-num-rays-per-batch", _RAYS_WITHOUT_GPU, reason)
    arguments = ("ns-train", method, *flags, "--data", str(capture), dataparser)
    return Suggestion(arguments, tuple(reasons))


def _near_and_far(train: DataparserOutputs, coverage: Coverage) -> tuple[float, float] | None:
    """Planes that hold the box; None where the defaults hold the largest ball in it.

    Corners are empty as a rule: the paper's planes, 2 and 6, cut those of Blender's box off.
    """
    box = train.scene_box.aabb.double().numpy()
    positions: Float[np.ndarray, "N 3"] = train.cameras.camera_to_worlds[:, :, 3].double().numpy()
    distances = np.linalg.norm(positions - box.mean(axis=0), axis=1)
    radius = float((box[1] - box[0]).min()) / 2
    near_plane, far_plane = BOUNDED_PLANES
    if near_plane <= distances.min() - radius and distances.max() + radius <= far_plane:
        return None
    near, far = distances_to_box(positions, box)
    if near == 0 and coverage.look_at is not None:
        near = _NEAREST_SHARE * coverage.look_at.distance
    return _two_digits(max(near, 0.01 * far), math.floor), _two_digits(far, math.ceil)


def _two_digits(value: float, to_whole: Callable[[float], int]) -> float:
    """A positive number of two significant digits at or below (``math.floor``) or above it."""
    exponent = math.floor(math.log10(value)) - 1
    whole = to_whole(value / 10.0**exponent)
    return float(f"{whole}e{exponent}")
