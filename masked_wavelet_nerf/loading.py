"""A file as an object that renders: no nerfstudio, no run folder, no capture.

    from masked_wavelet_nerf import load_scene

    scene = load_scene("scene.mwnf")
    rgb, depth = scene.render(scene.cameras[0])

Letters: H, W image rows and columns, N points.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import masked_wavelet_codec as codec
from masked_wavelet_nerf import native, rendering, threads, unbounded
from masked_wavelet_nerf.field import SpatialField, WaveletPlaneField
from masked_wavelet_nerf.sampling import OccupancyGrid
from masked_wavelet_nerf.scene import config_from_json, load_scene_into
from masked_wavelet_nerf.settings import SceneSettings
from masked_wavelet_nerf.wavelet import make_transform

_RAYS_AT_ONCE = 4096, 32768
"""On a CPU, where what is at work has to fit into its caches, and elsewhere."""
_SMALLEST = 4, 4, 4
"""Voxels of planes that are about to be replaced."""
_LIMITS = {
    "num_samples": (1, 4096),
    "num_proposal_bins": (1, 4096),
    "proposal_resolution": (2, 512),
    "step_ratio": (0.01, 100),
    "distance_scale": (0, 1e6),
    "far_plane": (0, 1e9),
    "num_frequencies": (0, 16),
    "levels": (0, 6),
}
"""Settings beyond which rendering would ask for any amount of memory, or show nothing."""


@dataclass(frozen=True)
class Camera:
    """A pinhole: lens distortion is left out."""

    camera_to_world: Float[Tensor, "3 4"]
    """x right, y up, z backward: it looks along -z. World units are those of the run."""
    fx: float
    """Focal length in pixels, along rows."""
    fy: float
    """The same along columns."""
    cx: float
    """Where the optical axis meets the picture, in pixels from its left edge."""
    cy: float
    """The same from its upper edge."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""

    def scaled(self, factor: float) -> Camera:
        """The same view in so many times as many pixels a side, rounded to whole ones."""
        width, height = (max(1, round(side * factor)) for side in (self.width, self.height))
        x, y = width / self.width, height / self.height
        return replace(
            self,
            **{"fx": self.fx * x, "cx": self.cx * x, "width": width},
            **{"fy": self.fy * y, "cy": self.cy * y, "height": height},
        )


class _Rays(NamedTuple):
    origins: Tensor
    directions: Tensor
    nears: Tensor
    fars: Tensor


class _Planes(NamedTuple):
    """What rendering looks up."""

    spatial: SpatialField
    proposal: unbounded.Proposal | None
    """Of unbounded scenes."""
    is_compiled: bool
    """Made by compiled loops, for them; else for plain torch."""


class LoadedScene:
    """A decoded scene on a device; planes are transformed once, when it is loaded.

    On a CPU, plain torch renders the first rays. A thread then loads the compiled loops, which
    takes a second, ten where they have to be compiled; they take over when they are there.

    Args:
        scene: what the codec read.
        device: where to render.

    Raises:
        CodecError: if the scene is not one of ours.
    """

    def __init__(self, scene: codec.Scene, device: torch.device | str = "cpu") -> None:
        self.settings = stored_settings(scene)
        with native.disabled():
            self.field = WaveletPlaneField(self.settings.field_config(), _SMALLEST)
        self.occupancy = OccupancyGrid()
        self.aabb = stored_numbers(scene.meta, "box", (2, 3))
        self.projection = stored_projection(scene.meta)
        with native.disabled():
            load_scene_into(self, scene)
        self.field.to(device).eval()
        self.occupancy.to(device)
        self.device = torch.device(device)
        projection = None if self.projection is None else self.projection.to(device)
        self.space = rendering.Space(self.aabb.to(device), self.settings.contract, projection)
        self.cameras = _cameras_of(scene)
        """Of the capture, if the file has them."""
        self._steps = 0.0, 0
        if not self.space.is_unbounded:
            self._steps = self.space.steps(self.field.resolution, self.settings.step_ratio)
        with native.disabled():
            self._planes = self._transform()
        self._shall_compile = self.device.type == "cpu" and native.is_switched_on()
        threads.flush_denormals()

    @torch.no_grad()
    def _transform(self) -> _Planes:
        spatial, proposal = self.field.to_spatial(), None
        if self.space.is_unbounded:
            proposal = rendering.find_proposal(self.field, spatial, self.settings)
        return _Planes(spatial, proposal, native.is_switched_on())

    @torch.no_grad()
    def _compile(self) -> None:
        torch.set_flush_denormal(False)  # on this thread alone: numba complains of it
        planes = self._transform()
        somewhere = torch.full((1, 3), 1e-3)
        self._render_rays(planes, somewhere, F.normalize(somewhere, dim=-1))
        self._planes = planes

    @torch.no_grad()
    def render(self, camera: Camera) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "H W 1"]]:
        """Colours in [0, 1] and expected distances along rays, in world units."""
        origins, directions = self._rays_through_pixels(camera)
        chunk = _RAYS_AT_ONCE[self.device.type != "cpu"]
        parts = [
            self.render_rays(o, d)
            for o, d in zip(origins.split(chunk), directions.split(chunk), strict=True)
        ]
        rgb, depth = (torch.cat(part) for part in zip(*parts, strict=True))
        size = camera.height, camera.width
        return rgb.view(*size, 3), depth.view(*size, 1)

    @torch.no_grad()
    def render_rays(
        self, origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"]
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 1"]]:
        """Colours and distances as of :meth:`render`, along any rays.

        Args:
            origins: in the world.
            directions: unit vectors.
        """
        planes = self._planes
        if planes.is_compiled:
            return self._render_rays(planes, origins, directions)
        with native.disabled():
            found = self._render_rays(planes, origins, directions)
        if self._shall_compile:  # not before: the two would hinder each other
            self._shall_compile = False
            threading.Thread(target=self._compile, name="compiled loops", daemon=True).start()
        return found

    def _render_rays(
        self,
        planes: _Planes,
        origins: Float[Tensor, "R 3"],
        directions: Float[Tensor, "R 3"],
    ) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 1"]]:
        settings = self.settings
        if planes.proposal is not None:
            nears = torch.zeros_like(origins[:, :1])
            rays = _Rays(origins, directions, nears, torch.full_like(nears, settings.far_plane))
            samples = rendering.sample_everywhere(rays, self.space, planes.proposal, settings, None)
        else:
            limits = rendering.limits_in_box(origins, directions, self.space.box)
            rays = _Rays(origins, directions, *limits)
            samples = rendering.sample_box(
                rays, rays.fars, self.space, *self._steps, self.occupancy, None
            )
        found = rendering.render(self.field, planes.spatial, samples, rays, self.space, settings)
        background = float(settings.background_color == "white")
        rgb = found.rgb + background * (1 - found.accumulation)
        return rgb.clamp(0, 1), found.depth

    @torch.no_grad()
    def density(self, positions: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Density at world positions; optical depth is density · distance · ``distance_scale``.

        Of bounded scenes, outside the box: that at its nearest point.
        """
        return self.field.density(self._planes.spatial, self.space.grid_points(positions))

    @torch.no_grad()
    def colour(
        self, positions: Float[Tensor, "N 3"], directions: Float[Tensor, "N 3"]
    ) -> Float[Tensor, "N 3"]:
        """Colour in [0, 1] at world positions, seen along unit vectors."""
        return self.field.colour(
            self._planes.spatial, self.space.grid_points(positions), directions
        )

    def _rays_through_pixels(self, camera: Camera) -> tuple[Tensor, Tensor]:
        x = (torch.arange(camera.width, device=self.device) + 0.5 - camera.cx) / camera.fx
        y = (torch.arange(camera.height, device=self.device) + 0.5 - camera.cy) / camera.fy
        y, x = torch.meshgrid(y, x, indexing="ij")
        local = torch.stack((x, -y, -torch.ones_like(x)), dim=-1).view(-1, 3)
        pose = camera.camera_to_world.to(local)
        directions = F.normalize(local @ pose[:, :3].T, dim=-1)
        return pose[:, 3].expand_as(directions), directions


def load_scene(path: Path | str, device: torch.device | str = "cpu") -> LoadedScene:
    """Reads a file that ``ns-export masked-wavelet`` wrote, ready to render.

    Args:
        path: the file.
        device: where to render.

    Raises:
        CodecError: if it is damaged, or no such scene.
        FileNotFoundError: if there is none.
    """
    return LoadedScene(codec.read(Path(path)), device)


# --- what a file's meta says ----------------------------------------------------------------------


def check_is_ours(meta: Mapping[str, Any]) -> None:
    """Checks that a file says what its planes are and where they lie.

    Raises:
        CodecError: if it does not.
    """
    if not isinstance(meta.get("model"), dict) or "box" not in meta:
        raise codec.CodecError("meta: no model configuration; not a masked-wavelet scene")


def stored_settings(scene: codec.Scene) -> SceneSettings:
    """Of the field and its rendering.

    Raises:
        CodecError: if there are none, they do not fit the rest of the scene, or nothing could be
            rendered with them.
    """
    check_is_ours(scene.meta)
    _check_choices(scene.meta["model"])
    settings = replace(config_from_json(SceneSettings(), scene.meta["model"]), bits=scene.bits)
    for name, (least, most) in _LIMITS.items():
        _expect(name, getattr(settings, name), least, most)
    # A model of these sizes is built before its parameters are compared with what the file has.
    for grid in scene.grids:
        part = grid.name.split("_")[0]
        if part in ("density", "appearance"):
            num_channels = grid.bands[0].values.shape[0]
            name = f"num_{part}_components"
            _expect(name, getattr(settings, name), num_channels, num_channels)
    for name, of_network in (
        ("appearance_dim", "appearance_map.weight"),
        ("hidden_dim", "colour_network.0.weight"),
    ):
        stored = scene.networks.get(of_network)
        weights = stored.values if isinstance(stored, codec.QuantisedArray) else stored
        size = 0 if weights is None else len(weights)
        _expect(name, getattr(settings, name), size, size)
    return settings


def _check_choices(stored: Mapping[str, Any]) -> None:
    for name, hint in get_type_hints(SceneSettings).items():
        choices = get_args(hint)
        if get_origin(hint) is Literal and stored.get(name, choices[0]) not in choices:
            raise codec.CodecError(
                f"meta: {name} {stored[name]!r}; expected one of {', '.join(choices)}: the file is "
                "damaged, or newer than this program"
            )
    wavelet = stored.get("wavelet", SceneSettings.wavelet)
    try:
        make_transform("wavelet", wavelet=wavelet)
    except (TypeError, ValueError) as error:
        raise codec.CodecError(
            f"meta: wavelet {wavelet!r}; expected a discrete one by its PyWavelets name: "
            "the file is damaged, ask for it again"
        ) from error


def _expect(name: str, value: Any, least: float | int, most: float | int) -> None:
    if not (isinstance(value, (int, float)) and least <= value <= most):
        between = f"{least}" if least == most else f"{least} to {most}"
        raise codec.CodecError(
            f"meta: {name} {value}; expected {between}: the file is damaged, ask for it again"
        )


def stored_projection(meta: Mapping[str, Any]) -> Float[Tensor, "4 4"] | None:
    """World to clip coordinates of a forward-facing scene.

    Raises:
        CodecError: if it is not 4 × 4 numbers.
    """
    return stored_numbers(meta, "projection", (4, 4)) if "projection" in meta else None


def stored_numbers(meta: Mapping[str, Any], name: str, shape: tuple[int, int]) -> Tensor:
    """A matrix of finite numbers.

    Raises:
        CodecError: if it is none, or of another shape.
    """
    try:
        found = torch.tensor(meta[name], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.shape != shape or not bool(found.isfinite().all()):
        raise codec.CodecError(
            f"meta: {name} {meta[name]!r:.80}; expected {shape[0]} × {shape[1]} numbers: the file "
            "is damaged, ask for it again"
        )
    return found


def _cameras_of(scene: codec.Scene) -> tuple[Camera, ...]:
    stored = scene.cameras
    if stored is None:
        return ()
    numbers = zip(
        torch.from_numpy(np.ascontiguousarray(stored.camera_to_worlds)),
        *(getattr(stored, name).tolist() for name in ("fx", "fy", "cx", "cy", "width", "height")),
        strict=True,
    )
    return tuple(Camera(*numbers_of_one) for numbers_of_one in numbers)
