"""How fast a machine could be: the least time of every part of a training step or frame.

A part's floor is max(bytes / bandwidth, operations / peak), with what has to move at least once,
and the operations of the plain formulas: additions, multiplications, comparisons and functions
count one each. Parts share no memory traffic: fusing some could go lower.

    part                        bytes                                    operations
    masks & transform, forward  8 K + 4 T: reads v, m, writes planes     6 K + Σ levels 4 t C h w
                      backward  16 K + 4 T: reads v, m, writes ∂v, ∂m    12 K + Σ levels 4 t C h w
    marching                    32 R + P + 24 N                          12 P
    look-ups, forward           4 min(T, V G N) + 12 N + 4 O             12, 8, 15 G N
                      backward  4 min(T, V G N) + 4 T + 12 N + 4 O       26, 14, 16 G N
    networks, forward           4 (W + M (F + 3 + 3))                    2 W M
                      backward  4 (2 W + M (2 F + 3 + 3))                4 W M
    volume rendering, forward   20 N + 20 M + 24 R + 4 T (L1) + 4 K      10 N + 8 M + 2 T + K
                      backward  16 N + 16 M + 24 R + 4 T (L1)            10 N + 8 M + T
    optimiser                   28 per parameter (Adam)                  14 per parameter
    data manager & rays         80 R                                     30 R
    others                      none                                     none

Of look-ups the operations are those of VM, tri-planes and voxels; V = 6, 6, 8 values are read.
K coefficients, T spatial values of planes and lines, or voxels (for look-ups those of the density
or of the appearance, for L1 those of the density), C·h·w values that a level makes, t taps per
value of both filters together (a row and a column pass: 2 · 2 · t), R rays, P places along them
within the box, N density samples, M coloured ones (in look-ups of appearance, N is M), G components
times planes, O values that look-ups give (N sums, or M times F), F appearance features, W weights
of networks. In rendering only the forward half counts, without losses; planes are made once, not
for each frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pywt
import torch
from torch import nn

from masked_wavelet_nerf import tracing
from masked_wavelet_nerf.clock import now
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.planes import FactorisedGrid, PlanesName
from masked_wavelet_nerf.volumes import VolumeTransform
from masked_wavelet_nerf.voxels import VoxelGrid
from masked_wavelet_nerf.wavelet import DCTTransform, PlaneTransform, WaveletTransform


@dataclass(frozen=True)
class Machine:
    """What the machine can do at best."""

    bandwidth: float
    """Bytes per second, read and written, of a large array: copied, or changed in place."""
    peak: float
    """Floating-point operations per second of a float32 matrix product."""


class Work(NamedTuple):
    """What a part has to do at least."""

    num_bytes: float
    operations: float

    def floor(self, machine: Machine) -> float:
        """Least time in seconds."""
        return max(self.num_bytes / machine.bandwidth, self.operations / machine.peak)


class LookUp(NamedTuple):
    """Of one component at one point."""

    values: int
    """Read."""
    forward: int
    """Operations."""
    backward: int
    """Operations of the gradient."""


LOOK_UPS: dict[PlanesName, LookUp] = {
    "vm": LookUp(6, 12, 26),
    "triplane": LookUp(6, 8, 14),
    "voxels": LookUp(8, 15, 16),
}


@dataclass(frozen=True)
class Counts:
    """What one training step or one frame works on; letters as in the module's docstring."""

    rays: int
    places: int
    density_samples: int
    coloured_samples: int
    coefficients: int
    transform_operations: int
    """Of all planes, one way."""
    density_values: int
    """T of the density's planes and lines."""
    appearance_values: int
    density_components: int
    """G: components times planes, or of the voxels."""
    appearance_components: int
    appearance_features: int
    look_up: LookUp
    weights: int
    parameters: int


def counts_of(
    model: MaskedWaveletModel, rays: int, places: int, density_samples: int, coloured_samples: int
) -> Counts:
    """Counts of ``model`` as it is now, with those of a step or frame."""
    field = model.field
    grids = field.grids().values()
    layers = [field.appearance_map, *field.colour_network]
    return Counts(
        rays=rays,
        places=places,
        density_samples=density_samples,
        coloured_samples=coloured_samples,
        coefficients=sum(map(sum, field.num_coefficients())),
        transform_operations=sum(
            transform_operations(grid.transform, grid.coefficients[0].shape[0], grid.spatial_size)
            for grid in grids
        ),
        density_values=_num_values(field.density_grid),
        appearance_values=_num_values(field.appearance_grid),
        density_components=_num_components(field.density_grid),
        appearance_components=_num_components(field.appearance_grid),
        appearance_features=field.appearance_grid.num_features,
        look_up=LOOK_UPS[field.config.planes],
        weights=sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear)),
        parameters=sum(p.numel() for p in field.parameters()),
    )


def _num_components(grid: FactorisedGrid | VoxelGrid) -> int:
    return grid.num_components * (1 if isinstance(grid, VoxelGrid) else 3)


def _num_values(grid: FactorisedGrid | VoxelGrid) -> int:
    sizes = [torch.Size(member.spatial_size).numel() for member in grid.grids]
    return grid.num_components * sum(sizes)


def transform_operations(
    transform: PlaneTransform | VolumeTransform, channels: int, size: tuple[int, ...]
) -> int:
    """Operations of the inverse of a volume (D, H, W), a plane (H, W), or a line: none."""
    if len(size) == 1:
        return 0
    if isinstance(transform, VolumeTransform):
        # A third axis adds half as much again to what every slice takes.
        of_slice = transform_operations(transform.of_planes, channels, size[1:])
        return 3 * size[0] * of_slice // 2
    height, width = size
    if isinstance(transform, DCTTransform):
        return 2 * channels * height * width * (height + width)
    if not isinstance(transform, WaveletTransform):
        return 0
    wavelet = pywt.Wavelet(transform.wavelet)  # pyright: ignore[reportAttributeAccessIssue]
    # A filter's taps are shared by even and odd samples, and zeros at its ends pad it.
    taps = sum(tap != 0 for taps in (wavelet.rec_lo, wavelet.rec_hi) for tap in taps) / 2
    made = sum(4 * h * w for h, w in transform.band_sizes((height, width))[1:])
    return round(4 * taps * channels * made)


def work(counts: Counts, *, training: bool) -> dict[str, Work]:
    """The least work of every part that has any, as in the module's docstring."""
    c = counts
    lookups = {
        tracing.DENSITY: (c.density_values, c.density_components, c.density_samples, 1),
        tracing.APPEARANCE: (
            c.appearance_values,
            c.appearance_components,
            c.coloured_samples,
            c.appearance_features,
        ),
    }
    found = {
        tracing.MARCHING: Work(32 * c.rays + c.places + 24 * c.density_samples, 12 * c.places),
        tracing.DATA: Work(80 * c.rays, 30 * c.rays),
    }
    for part, (values, components, samples, outputs) in lookups.items():
        read = (
            4 * min(values, c.look_up.values * components * samples)
            + 12 * samples
            + 4 * outputs * samples
        )
        operations = c.look_up.forward * components * samples
        if training:
            read += read + 4 * values
            operations += c.look_up.backward * components * samples
        found[part] = Work(read, operations)
    n, m, features = c.density_samples, c.coloured_samples, c.appearance_features
    if not training:
        found[tracing.NETWORKS] = Work(4 * (c.weights + m * (features + 6)), 2 * c.weights * m)
        found[tracing.RENDERING] = Work(20 * (n + m) + 24 * c.rays, 10 * n + 8 * m)
        return found
    found[tracing.NETWORKS] = Work(4 * (3 * c.weights + m * (3 * features + 12)), 6 * c.weights * m)
    found[tracing.RENDERING] = Work(
        36 * (n + m) + 48 * c.rays + 8 * c.density_values + 4 * c.coefficients,
        20 * n + 16 * m + 3 * c.density_values + c.coefficients,
    )
    values = c.density_values + c.appearance_values
    found[tracing.TRANSFORM] = Work(
        24 * c.coefficients + 8 * values, 18 * c.coefficients + 2 * c.transform_operations
    )
    found[tracing.OPTIMISER] = Work(28 * c.parameters, 14 * c.parameters)
    return found


def measure_machine(device: torch.device, repeats: int = 7) -> Machine:
    """Bandwidth and peak with as many threads as torch has now: the best of several tries."""
    on_device = device.type == "cuda"
    source = torch.rand((1 << 28) if on_device else (1 << 25), device=device)
    target = torch.empty_like(source)
    # A copy also has to fetch what it overwrites, on most CPUs; what changes in place does not.
    moving = min(
        _best(lambda: target.copy_(source), device, repeats),
        _best(lambda: target.neg_(), device, repeats),
    )
    num_bytes = 2 * source.numel() * source.element_size()
    del source, target
    side = 4096 if on_device else 768
    left, right = torch.rand(2, side, side, device=device)
    product = torch.empty_like(left)
    multiplying = _best(lambda: torch.mm(left, right, out=product), device, repeats)
    return Machine(bandwidth=num_bytes / moving, peak=2 * side**3 / multiplying)


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = now(device)
        run()
        seconds.append(now(device) - start)
    return min(seconds[1:])
