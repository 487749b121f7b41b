"""Where rays are sampled: marching, occupancy, packing, and the weights of volume rendering.

Samples are *packed*: of the R × S places along R rays only those that are occupied are kept, ray by
ray. One plain torch path serves CPU and CUDA; compiled loops serve the CPU where they can.

Letters: R rays, S places per ray, N packed samples, X, Y, Z occupancy nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from masked_wavelet_nerf import accelerators, native

_CHUNK = 1 << 18
"""Points whose density is computed at once when the occupancy is updated."""


_PLACES = 1 << 22
"""Places along rays that are looked at at once, some 100 bytes each."""
_OPAQUE = 1e4
"""Optical depth beyond which a sample lets nothing through: e^-10000 is 0."""


class PackedSamples(NamedTuple):
    """Samples of all rays in one row, ray by ray and front to back."""

    ray: Int[Tensor, " N"]
    """Ray of each sample, ascending."""
    middles: Float[Tensor, " N"]
    """Distance from the ray's origin."""
    lengths: Float[Tensor, " N"] | float
    """World length."""
    points: Float[Tensor, "N 3"]
    """Middles as points of [-1, 1]³."""


def march(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    nears: Float[Tensor, "R 1"],
    fars: Float[Tensor, "R 1"],
    step_size: float,
    num_steps: int,
    occupancy: OccupancyGrid,
    jitter: Float[Tensor, "R 1"] | None,
) -> PackedSamples:
    """Occupied samples at a fixed step: near + (i + jitter) · step < far, jitter 0.5 if None.

    The number of samples shapes what follows, so on CUDA this waits for the device, once for every
    four million places.

    Args:
        origins: of the rays, in the coordinates of the grids, where [-1, 1]³ is the box.
        directions: so that origin + t · direction is the point at distance t.
        nears: distance at which sampling starts.
        fars: distance at which it ends.
        step_size: distance between samples.
        num_steps: most samples of a ray.
        occupancy: where to sample.
        jitter: shift of a ray's samples in [0, 1), in steps.
    """
    first = nears + (0.5 if jitter is None else jitter) * step_size
    if accelerators.marches(origins, occupancy.cells):
        ray, middles = accelerators.occupied_samples(
            origins, directions, first, fars, step_size, occupancy.cells
        )
        points = torch.addcmul(origins[ray], directions[ray], middles[:, None])
        return PackedSamples(ray, middles, step_size, points)
    has_gradients = any(t.requires_grad for t in (origins, directions, first))
    if native.serves(origins, directions, first, fars) and not has_gradients:
        ray, middles, points = native.occupied_samples(
            origins, directions, first, fars, step_size, num_steps, occupancy.packed()
        )
        return PackedSamples(ray, middles, step_size, points)
    index = torch.arange(num_steps, device=nears.device, dtype=nears.dtype)
    rays_at_once = max(1, _PLACES // max(1, num_steps))
    found = []
    for start in range(0, max(1, len(origins)), rays_at_once):
        rays = slice(start, start + rays_at_once)
        places = first[rays] + index * step_size
        valid = places < fars[rays]
        valid &= occupancy(origins[rays, None] + directions[rays, None] * places[..., None])
        found.append(valid.flatten().nonzero()[:, 0] + start * num_steps)
    flat = torch.cat(found)
    ray = flat // num_steps
    middles = first[ray, 0] + (flat - ray * num_steps) * step_size
    points = torch.addcmul(origins[ray], directions[ray], middles[:, None])
    return PackedSamples(ray, middles, step_size, points)


def render_weights(
    optical_depth: Float[Tensor, " N"], ray: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """w_i = exp(-Σ_{j<i} x_j) · (1 - exp(-x_i)) with x = density · length (Max 1995, eq. 3).

    The sum runs over the earlier samples of the same ray.

    Args:
        optical_depth: x of packed samples.
        ray: ray of each, ascending.
    """
    if not len(ray):
        return optical_depth
    # A NaN stays with its own sample.
    depth = optical_depth.nan_to_num(nan=0.0, posinf=_OPAQUE).clamp(max=_OPAQUE)
    return torch.exp(-_earlier(depth, ray)) * -torch.expm1(-optical_depth)


def _earlier(values: Float[Tensor, " N"], ray: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Sum over the earlier samples of the same ray."""
    # One running sum over all rays; doubles, as what lies before a ray is taken off again.
    before_sample = F.pad(values.double().cumsum(dim=0)[:-1], (1, 0))
    first = torch.searchsorted(ray, ray)  # which, unlike counting, does not wait for the device
    return (before_sample - before_sample[first]).to(values.dtype)


class SharedColours(NamedTuple):
    """Where colours are asked for, ray by ray and front to back."""

    ray: Int[Tensor, " M"]
    """Ray of each, ascending."""
    shares: Float[Tensor, " M"]
    """Weight in the ray's colour."""
    points: Float[Tensor, "M 3"]
    """In [-1, 1]³."""


def share_colours(
    samples: PackedSamples,
    weights: Float[Tensor, " N"],
    least: float,
    most: float,
) -> SharedColours:
    """Lets neighbouring samples of a ray share a colour, taken at their centre of mass.

    Colour hardly changes from one sample to the next, and its error at the centre of mass is of
    second order; the network that gives it is most of the cost of a ray. The weight of a ray up to
    the middle of each sample, divided by ``most`` and rounded down, says which share; samples that
    are not neighbours never do. Gradients reach the weights as if each sample had the shared
    colour.

    The number of colours shapes what follows, so on CUDA this waits for the device, once.

    Args:
        samples: packed samples.
        weights: of volume rendering.
        least: weight up to which a sample has no colour at all.
        most: weight for which samples share a colour; 0 gives each its own.
    """
    ray, alive = samples.ray, weights.detach() > least
    held = torch.where(alive, weights.detach(), 0)  # what is no number must not spread
    starts = alive
    if most > 0 and len(ray):
        bins = ((_earlier(held, ray) + held / 2) / most).floor()
        same = (bins[1:] == bins[:-1]) & (ray[1:] == ray[:-1]) & alive[:-1]
        lengths = samples.lengths
        lengths = lengths[1:] if isinstance(lengths, Tensor) else lengths
        same &= samples.middles.diff() < 1.5 * lengths
        starts = alive & ~F.pad(same, (1, 0))
    first = starts.nonzero()[:, 0]
    if len(first) in (0, len(ray)):
        return SharedColours(ray[first], weights[first], samples.points[first])
    group = (starts.cumsum(dim=0) - 1).clamp(min=0)
    shares = weights.new_zeros(len(first)).index_add(0, group, torch.where(alive, weights, 0))
    masses = (held / shares.detach()[group])[:, None]
    points = samples.points.new_zeros(len(first), 3).index_add(0, group, masses * samples.points)
    return SharedColours(ray[first], shares, points)


class Composite(NamedTuple):
    """What volume rendering makes of the samples of rays."""

    accumulation: Float[Tensor, "R 1"]
    """Σ weight: the opacity of a ray."""
    distance: Float[Tensor, "R 1"]
    """Σ weight · distance."""
    distortion: Float[Tensor, "R 1"]
    """Σ_ij weight_i weight_j |place_i - place_j| + Σ weight² · width / 3; 0 without places."""
    colours: SharedColours


def composite(
    samples: PackedSamples,
    optical_depth: Float[Tensor, " N"],
    num_rays: int,
    least: float,
    most: float,
    spacings: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
) -> Composite:
    """Weights (:func:`render_weights`), their sums, and who shares a colour.

    Args:
        samples: packed samples.
        optical_depth: density · length of each.
        num_rays: R.
        least: see :func:`share_colours`.
        most: see :func:`share_colours`.
        spacings: places and widths of samples for the distortion (mip-NeRF 360, eq. 15).
    """
    ray, middles, lengths, points = samples
    numbers = [middles, points, *([lengths] if isinstance(lengths, Tensor) else [])]
    has_gradients = any(t.requires_grad for t in numbers)
    if native.serves(optical_depth, *numbers) and not has_gradients:
        shares, *sums, of_colour, centres = _Composite.apply(
            optical_depth, ray, middles, lengths, points, spacings, num_rays, least, most
        )
        colours = SharedColours(of_colour, shares, centres)
        accumulation, distance, distortion = (of_ray[:, None] for of_ray in sums)
        return Composite(accumulation, distance, distortion, colours)
    weights = render_weights(optical_depth, ray)
    terms = [weights, weights * middles, torch.zeros_like(weights)]
    if spacings is not None:
        places, widths = spacings
        lever = places * _earlier(weights, ray) - _earlier(weights * places, ray)
        terms[2] = weights * (2 * lever + weights * widths / 3)
    sums = weights.new_zeros(num_rays, 3).index_add(0, ray, torch.stack(terms, dim=-1))
    accumulation, distance, distortion = sums.split(1, dim=1)
    colours = share_colours(samples, weights, least, most)
    return Composite(accumulation, distance, distortion, colours)


class _Composite(torch.autograd.Function):
    """:func:`composite` in compiled loops, with the gradient of the optical depth."""

    @staticmethod
    def forward(ctx, optical_depth, *others):
        found = native.composite(optical_depth, *others)
        ctx.kept = found.kept
        ctx.mark_non_differentiable(found.ray, found.centres)
        return found[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_shares, of_accumulation, of_distance, of_distortion, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        sums = of_accumulation, of_distance, of_distortion
        return native.composite_backward(ctx.kept, of_shares, *sums), *(None,) * 8


class OccupancyGrid(nn.Module):
    """Which nodes of a regular grid over [-1, 1]³ are worth sampling.

    Starts as a single occupied node: everything is occupied. A buffer, so it is saved with the
    model; checkpoints of any resolution load.
    """

    cells: Bool[Tensor, "X Y Z"]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cells", torch.ones(1, 1, 1, dtype=torch.bool))
        self._packed: tuple[Tensor, int, native.Cells] | None = None

    @property
    def is_known(self) -> bool:
        """Whether the grid has been updated, so that it can skip anything at all."""
        return self.cells.numel() > 1

    def packed(self) -> native.Cells:
        """The cells as compiled loops take them, kept until they change."""
        cells = self.cells
        version = 0 if cells.is_inference() else cells._version
        if self._packed is None or self._packed[0] is not cells or self._packed[1] != version:
            self._packed = cells, version, native.packed_cells(cells)
        return self._packed[2]

    def forward(self, points: Float[Tensor, "*batch 3"]) -> Bool[Tensor, "*batch"]:
        """Whether the node nearest to each point of [-1, 1]³ is occupied; outside, nothing is."""
        size = torch.tensor(self.cells.shape).to(points.device, non_blocking=True)
        nearest = ((points + 1) * ((size - 1) / 2)).round_().long()
        inside = ((nearest >= 0) & (nearest < size)).all(dim=-1)
        flat = (nearest[..., 0] * size[1] + nearest[..., 1]) * size[2] + nearest[..., 2]
        return self.cells.flatten()[flat.clamp_(0, self.cells.numel() - 1)] & inside

    @torch.no_grad()
    def update(
        self,
        opacity: Callable[[Float[Tensor, "N 3"]], Float[Tensor, " N"]],
        resolution: tuple[int, int, int],
        threshold: float,
    ) -> None:
        """Marks nodes whose opacity, or that of one of their 26 neighbours, reaches ``threshold``.

        Where it was empty, opacity counts as zero: nothing has been trained there, so its density
        means nothing. Such a node comes back only beside a neighbour that is opaque.

        Args:
            opacity: α of one sample's length at points in [-1, 1]³.
            resolution: nodes along x, y and z.
            threshold: least α worth sampling.
        """
        device = self.cells.device
        axes = [torch.linspace(-1, 1, n, device=device) for n in resolution]
        values = []
        rows = max(1, _CHUNK // (resolution[1] * resolution[2]))
        for x in axes[0].split(rows):
            points = torch.stack(torch.meshgrid(x, axes[1], axes[2], indexing="ij"), dim=-1)
            alive = self(points)
            slab = torch.zeros(points.shape[:3], device=device)
            slab[alive] = opacity(points[alive])
            values.append(slab)
        widest = F.max_pool3d(torch.cat(values)[None, None], 3, stride=1, padding=1)[0, 0]
        self.cells = widest >= threshold

    def occupied_range(self) -> list[tuple[int, int]] | None:
        """First and last occupied node along x, y and z, or None if nothing is occupied."""
        found = []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            occupied = self.cells.any(dim=others[1]).any(dim=others[0]).nonzero()[:, 0].tolist()
            if not occupied:
                return None
            found.append((occupied[0], occupied[-1]))
        return found

    def coarsened(self, factor: int = 2) -> OccupancyGrid:
        """A grid ``factor`` times coarser that is occupied wherever this one is."""
        coarse = OccupancyGrid().to(self.cells.device)
        if not self.is_known:
            return coarse
        # Nodes of the two grids do not coincide: one more coarse node on each side is certain.
        pooled = F.max_pool3d(self.cells[None, None].float(), factor, ceil_mode=True)
        coarse.cells = F.max_pool3d(pooled, 3, stride=1, padding=1)[0, 0] > 0
        return coarse

    def halved(self) -> OccupancyGrid:
        """A grid half as fine, occupied where occupied nodes of this one are nearest to.

        Unlike :meth:`coarsened` it may miss the rim of this one, by half of its voxels.
        """
        size = [(n + 1) // 2 for n in self.cells.shape]
        scale = [(m - 1) / max(n - 1, 1) for m, n in zip(size, self.cells.shape, strict=True)]
        where = self.cells.nonzero()
        nearest = (where * torch.tensor(scale, device=where.device)).round().long()
        half = OccupancyGrid()
        half.cells = self.cells.new_zeros(size)
        half.cells[nearest.unbind(dim=-1)] = True
        return half

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        saved = state_dict.get(prefix + "cells")
        if saved is not None and saved.shape != self.cells.shape:
            self.cells = self.cells.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
