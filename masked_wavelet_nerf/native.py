"""Compiled loops for the CPU, optional: the plain torch code beside each caller is the reference.

They serve float32 tensors on the CPU where numba can be imported, and are compiled at first use
(some ten seconds, kept on disk afterwards). ``MASKED_WAVELET_NATIVE=0`` in the environment turns
them off. Work is split over as many threads as torch uses.

Planes and lines are fastest *channels-last*: logically (C, H, W), in memory (H, W, C). Other
layouts are copied first.

Letters: C channels, h, w band size, H, W plane size, n line length, N points, R rays, S places.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from masked_wavelet_nerf import threads
from masked_wavelet_nerf.masking import USUAL_PRICE

if TYPE_CHECKING:
    from types import ModuleType

_SWITCH = "MASKED_WAVELET_NATIVE"
_TAPS = 5
"""Taps that the banded product takes at once."""

_WORTH_A_THREAD = 1 << 17
"""Numbers to be computed, below which waking a thread takes longer than it saves."""
_SAMPLE = 8
"""How many numbers a sample of volume rendering, which takes an exponential, counts as there."""
_ROW = 8
"""Rows that go into matrix products are filled up to a multiple of this."""

_here = threading.local()


class Levels(NamedTuple):
    """All levels of a transform, coarse to fine, as rows of taps.

    A level has four banded matrices (rows low, high, columns low, high); output i of a matrix is
    Σ_t values[i, t] · input[columns[i, t]]. Along columns, the plane has its even entries first,
    then the odd ones: a row's taps are then those of the row before, moved on by one, but for the
    ends.
    """

    table: np.ndarray
    """(L, 4, 6): where a matrix starts in the next two arrays, its rows, columns, taps per row, and
    where its runs start and stop."""
    columns: np.ndarray
    values: np.ndarray
    runs: np.ndarray
    """(first, count) of rows that are each the row before, moved on by a column."""
    factors: np.ndarray
    """(L,): of the details."""


def is_switched_on() -> bool:
    """Whether anything but plain torch may be used: not within :func:`disabled`, nor by wish."""
    return not getattr(_here, "disabled", 0) and os.environ.get(_SWITCH, "1") != "0"


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from masked_wavelet_nerf import native_kernels
    except Exception:  # what numba raises where it does not fit numpy is its own affair
        return None
    return native_kernels


def status() -> str:
    """Whether compiled loops are in use, and if not, why and what to do: one line for people."""
    if not is_switched_on():
        return f"Compiled CPU loops are off ({_SWITCH}=0): plain torch is used."
    if _kernels() is None:
        return "Compiled CPU loops need numba (pip install numba): plain torch is used, slower."
    return "Compiled CPU loops (numba) are in use."


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Plain torch within, on this thread."""
    _here.disabled = getattr(_here, "disabled", 0) + 1
    try:
        yield
    finally:
        _here.disabled -= 1


def is_enabled() -> bool:
    """Whether CPU tensors are served by compiled loops."""
    return is_switched_on() and _kernels() is not None


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled loops take these tensors: float32, on the CPU."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and (
        is_enabled()
    )


def channels_last(values: Float[Tensor, "C *n"]) -> Float[Tensor, "C *n"]:
    """The same values with channels innermost in memory, where the compiled loops want that."""
    if not serves(values):
        return values.contiguous()
    return values.movedim(0, -1).contiguous().movedim(-1, 0)


# --- planes and lines at points -------------------------------------------------------------------


class _Factors(NamedTuple):
    """One plane with its line, as numpy sees them: flat, channels innermost."""

    plane: np.ndarray
    line: np.ndarray
    shape: tuple[int, int, int, int]
    axes: tuple[int, int, int]


def _factors(planes: Sequence[Tensor], lines: Sequence[Tensor], axes) -> list[_Factors]:
    return [
        _Factors(
            _innermost(plane),
            _innermost(line),
            (plane.shape[1], plane.shape[2], line.shape[1], plane.shape[0]),
            axis,
        )
        for plane, line, axis in zip(planes, lines, axes, strict=True)
    ]


def features(
    points: Float[Tensor, "N 3"],
    planes: Sequence[Float[Tensor, "C _ _"]],
    lines: Sequence[Float[Tensor, "C _"]],
    axes: Sequence[tuple[int, int, int]],
    summed: bool,
) -> Float[Tensor, "N *features"]:
    """plane · line at points, (N, planes · C); or summed over all of them, (N,).

    Args:
        points: in [-1, 1]³; outside, the border value holds.
        planes: see the module's docstring.
        lines: one for each plane.
        axes: for each plane, which coordinate runs along W, along H, and along its line.
        summed: whether to sum.
    """
    kernels = _kernels()
    assert kernels is not None
    found = _factors(planes, lines, axes)
    width = sum(factors.shape[-1] for factors in found)
    where = points.detach().contiguous().numpy()
    out = np.zeros(len(where), np.float32) if summed else np.empty((len(where), width), np.float32)

    def work(start: int, stop: int) -> None:
        offset = 0
        for factors in found:
            if summed:
                kernels.summed_features(where, *factors, out, start, stop)
            else:
                kernels.features(where, *factors, out.reshape(-1), width, offset, start, stop)
            offset += factors.shape[-1]

    _split_range(work, len(where), width)
    return torch.from_numpy(out)


def features_backward(
    points: Float[Tensor, "N 3"],
    planes: Sequence[Float[Tensor, "C _ _"]],
    lines: Sequence[Float[Tensor, "C _"]],
    axes: Sequence[tuple[int, int, int]],
    gradient: Float[Tensor, "N *features"],
) -> list[Tensor]:
    """Gradients of planes, then lines, of :func:`features`; channels-last."""
    kernels = _kernels()
    assert kernels is not None
    found = _factors(planes, lines, axes)
    where = points.detach().contiguous().numpy()
    g = _flat(gradient).reshape(len(where), -1 if len(where) else 1)
    outputs: list[list[tuple[Tensor, Tensor]]] = []
    tasks, offset = [], 0
    num_parts = _parts_of_planes(len(found), torch.get_num_threads())
    for factors, plane, line, parts in zip(found, planes, lines, num_parts, strict=True):
        outputs.append([])
        for part in _parts(len(where), parts):
            out = [torch.empty(t.shape[1:] + t.shape[:1]) for t in (plane, line)]
            arguments = g, offset, *map(_flat, out), *part
            tasks.append(functools.partial(kernels.features_backward, where, *factors, *arguments))
            outputs[-1].append((out[0], out[1]))
        offset += factors.shape[-1]
    # Not by channels: threads that write side by side wait for each other's cache lines.
    threads.run(tasks)
    for (of_plane, of_line), *others in outputs:
        for other_plane, other_line in others:
            of_plane += other_plane
            of_line += other_line
    return [outputs[i][0][kind].movedim(-1, 0) for kind in (0, 1) for i in range(len(outputs))]


def _parts_of_planes(num_planes: int, num_threads: int) -> list[int]:
    """In how many parts each plane's points are dealt with, so that threads are done together."""
    num_whole = num_planes // num_threads * num_threads
    num_split = num_planes - num_whole
    return [1] * num_whole + [-(-num_threads // max(num_split, 1))] * num_split


# --- transform, masks and quantiser ---------------------------------------------------------------


def levels(
    matrices: Sequence[Sequence[np.ndarray]], factors: Sequence[float], merges: bool
) -> Levels:
    """The levels of a transform from their dense matrices, four for each level.

    Args:
        matrices: see :class:`Levels`.
        factors: of the details.
        merges: whether a level makes a plane, not takes one apart.
    """
    table = np.zeros((len(matrices), 4, 6), np.int64)
    columns, values, offset = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], 0
    runs, num_runs = [np.zeros((0, 2), np.int64)], 0
    for level, four in enumerate(matrices):
        for which, dense in enumerate(four):
            matrix = _phases_apart(dense, 0 if merges else 1) if which >= 2 else dense
            some_columns, some_values = _taps(matrix)
            some_runs = _runs(some_columns, some_values)
            ends = num_runs, num_runs + len(some_runs)
            table[level, which] = offset, *matrix.shape, some_values.shape[1], *ends
            columns.append(some_columns.reshape(-1))
            values.append(some_values.reshape(-1))
            runs.append(some_runs)
            offset += some_values.size
            num_runs += len(some_runs)
    joined = np.concatenate(columns), np.concatenate(values), np.concatenate(runs)
    return Levels(table, *joined, np.array(factors, np.float32))


def _phases_apart(matrix: np.ndarray, axis: int) -> np.ndarray:
    """The same with that axis in the order 0, 2, 4, …, 1, 3, 5, …"""
    n = matrix.shape[axis]
    return matrix.take([*range(0, n, 2), *range(1, n, 2)], axis=axis)


def _runs(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rows of taps as runs (first, count), in each of which a row is the one before, moved on."""
    same = (np.diff(columns, axis=0) == 1) & (np.diff(values, axis=0) == 0)
    starts = np.flatnonzero(np.concatenate(([True], ~same.all(axis=1))))
    return np.stack((starts, np.diff(starts, append=len(columns))), axis=1)


def _taps(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of the nonzero entries, row by row; rows are filled up with zeros."""
    used = matrix != 0
    most = max(1, int(used.sum(axis=1).max()))
    width = -(-most // _TAPS) * _TAPS
    columns = np.zeros((len(matrix), width), np.int64)
    values = np.zeros((len(matrix), width), np.float32)
    for i, row in enumerate(used):
        found = np.flatnonzero(row)
        columns[i, : len(found)] = found
        columns[i, len(found) :] = found[-1] if len(found) else 0
        values[i, : len(found)] = matrix[i, found]
    return columns, values


def merge(
    levels: Levels,
    approximation: Float[Tensor, "C _ _"],
    details: Sequence[Float[Tensor, "C 3 _ _"]],
) -> Float[Tensor, "C H W"]:
    """Merges all levels, see :mod:`masked_wavelet_nerf.wavelet`; channels-last."""
    kernels = _kernels()
    assert kernels is not None
    channels = approximation.shape[0]
    bands = [_innermost(t) for t in (approximation, *details)]
    plane = kernels.merge_levels(np.concatenate(bands), levels, channels)
    H, W = levels.table[-1, (0, 2), 1]
    return torch.from_numpy(plane).view(int(H), int(W), channels).movedim(-1, 0)


def split(
    levels: Levels, plane: Float[Tensor, "C H W"]
) -> tuple[Float[Tensor, "C _ _"], list[Float[Tensor, "C 3 _ _"]]]:
    """Splits all levels, see :mod:`masked_wavelet_nerf.wavelet`; channels-last."""
    kernels = _kernels()
    assert kernels is not None
    channels = plane.shape[0]
    bands = torch.from_numpy(kernels.split_levels(_innermost(plane), levels, channels))
    sizes = [(int(h), int(w), channels) for h, w in levels.table[:, (0, 2), 1]]
    parts = bands.split([math.prod(sizes[0]), *(3 * math.prod(size) for size in sizes)])
    details = [part.view(3, *size) for part, size in zip(parts[1:], sizes, strict=True)]
    return parts[0].view(sizes[0]).movedim(-1, 0), [t.movedim(-1, 0) for t in details]


class Bands(NamedTuple):
    """One plane or line: coefficients and logits, level by level, and its inverse transform."""

    values: Sequence[Tensor]
    logits: Sequence[Tensor]
    prices: Sequence[Tensor]
    """Of logits in their sum, see ``masking``, uint8; or empty: all weigh one."""
    largest: np.ndarray
    """Q of each level, float32."""
    synthesis: Levels
    adjoint: Levels
    size: tuple[int, ...]
    """Of the plane, (H, W), or line, (n,)."""

    def arrays(self) -> list[tuple[np.ndarray, ...]]:
        """Values, logits and prices, flat, channels innermost."""
        nothing = [np.zeros(0, np.uint8)] * len(self.values)
        kinds = self.values, self.logits, self.prices
        return [tuple(map(_innermost, kind)) or tuple(nothing) for kind in kinds]


def masked_spatial(
    grids: Sequence[Bands], threshold: float
) -> tuple[list[Float[Tensor, "_ *_"]], list[np.ndarray], list[np.ndarray], float]:
    """Quantise → mask → inverse transform of every grid.

    Returns:
        Planes and lines, channels-last; how many coefficients of each level were kept; steps Δ;
        and the sum of all logits, times their prices.
    """
    kernels = _kernels()
    assert kernels is not None

    def work(grid: Bands) -> tuple[Tensor, np.ndarray, np.ndarray, float]:
        channels = grid.values[0].shape[0]
        steps = np.empty(len(grid.values), np.float32)
        counts = np.empty(len(grid.values), np.int64)
        spatial, logit_sum = kernels.masked_spatial(
            *grid.arrays(),
            np.float32(1 / USUAL_PRICE),
            np.float32(threshold),
            grid.largest,
            grid.synthesis,
            channels,
            steps,
            counts,
        )
        shaped = torch.from_numpy(spatial).view(*grid.size, channels)
        return shaped.movedim(-1, 0), counts, steps, logit_sum

    done = threads.run(
        [functools.partial(work, grid) for grid in grids], list(map(_num_values, grids))
    )
    spatial, counts, steps, logit_sums = zip(*done, strict=True)
    return list(spatial), list(counts), list(steps), sum(logit_sums)


def masked_spatial_backward(
    grids: Sequence[Bands],
    gradients: Sequence[Float[Tensor, "_ *_"]],
    steps: Sequence[np.ndarray],
    threshold: float,
    of_logit_sum: float,
) -> list[Tensor]:
    """Gradients of values and logits of :func:`masked_spatial`: grid by grid, values first.

    ``gradients`` are those of planes and lines, ``of_logit_sum`` that of the sum of all logits.
    """
    kernels = _kernels()
    assert kernels is not None

    def work(grid: Bands, gradient: Tensor, steps: np.ndarray) -> list[Tensor]:
        found = torch.empty(2, _num_values(grid))
        kernels.masked_spatial_backward(
            _innermost(gradient),
            *grid.arrays(),
            np.float32(1 / USUAL_PRICE),
            np.float32(threshold),
            grid.largest,
            grid.adjoint,
            gradient.shape[0],
            steps,
            np.float32(of_logit_sum),
            *(row.numpy() for row in found),
        )
        starts = [0, *itertools.accumulate(t.numel() for t in grid.values)]
        return [
            found.as_strided(t.shape, _strides(t.shape), at + kind * starts[-1])
            for kind in (0, 1)
            for t, at in zip(grid.values, starts, strict=False)
        ]

    tasks = [functools.partial(work, *some) for some in zip(grids, gradients, steps, strict=True)]
    return list(itertools.chain.from_iterable(threads.run(tasks, list(map(_num_values, grids)))))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """In memory, of a tensor with channels, its first axis, innermost."""
    return 1, *(math.prod((*shape[i:], shape[0])) for i in range(2, len(shape) + 1))


def _num_values(grid: Bands) -> int:
    return sum(t.numel() for t in grid.values)


# --- marching -------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """Which nodes of [-1, 1]³ are occupied; fewer than 2³¹ of them."""

    bits: np.ndarray
    """Eight nodes in a byte: 304³ of them are in the cache then."""
    shape: tuple[int, ...]
    """(X, Y, Z)."""


def packed_cells(cells: Bool[Tensor, "X Y Z"]) -> Cells:
    """As :func:`occupied_samples` takes them."""
    bits = np.packbits(_flat(cells), bitorder="little")
    # A loop that asks for many nodes at once looks at the first where it is outside.
    return Cells(bits if bits.size else np.zeros(1, np.uint8), tuple(cells.shape))


def occupied_samples(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    first: Float[Tensor, "R 1"],
    fars: Float[Tensor, "R 1"],
    step_size: float,
    num_steps: int,
    cells: Cells,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, "N 3"]]:
    """Ray, distance and point of places first + s · step < far in occupied cells of [-1, 1]³."""
    kernels = _kernels()
    assert kernels is not None
    num_rays = len(origins)
    rays = [t.detach().contiguous().numpy() for t in (origins, directions)]
    start, stop, step = _flat(first), _flat(fars), np.float32(step_size)
    places, counts = np.empty((num_rays, num_steps), np.int32), np.empty(num_rays, np.int64)
    arguments = *rays, start, stop, step, *cells, places, counts
    _split_range(functools.partial(kernels.occupied_places, *arguments), num_rays, num_steps)
    offsets = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))
    count = int(offsets[-1])
    ray, middles = torch.empty(count, dtype=torch.int64), torch.empty(count)
    points = torch.empty(count, 3)
    outputs = ray.numpy(), middles.numpy(), points.numpy()
    arguments = *rays, start, step, places, offsets, *outputs
    _split_range(functools.partial(kernels.pack_places, *arguments), num_rays, num_steps)
    return ray, middles, points


def proposed_samples(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    start: Float[Tensor, "R 1"],
    stop: Float[Tensor, "R 1"],
    jitter: Float[Tensor, "R 1"],
    density: Float[Tensor, "X X X"],
    density_scale: float,
    even_share: float,
    num_bins: int,
    num_samples: int,
    contracted: bool,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, "N 3"]]:
    """Ray, distance, length and point of the samples of ``unbounded.propose``."""
    kernels = _kernels()
    assert kernels is not None
    num_rays = len(origins)
    rays = [t.detach().contiguous().numpy() for t in (origins, directions)]
    spacings = [_flat(t) for t in (start, stop, jitter)]
    nodes = density.detach().contiguous().numpy()
    middles, lengths = torch.empty(num_rays * num_samples), torch.empty(num_rays * num_samples)
    points = torch.empty(num_rays * num_samples, 3)
    shares = np.float32(density_scale), np.float32(even_share / num_bins)
    numbers = *shares, num_bins, num_samples, contracted
    outputs = middles.numpy(), lengths.numpy(), points.numpy()
    arguments = *rays, *spacings, nodes, *numbers, *outputs
    work = functools.partial(kernels.proposed_places, *arguments)
    _split_range(work, num_rays, num_bins + num_samples)
    return torch.arange(num_rays).repeat_interleave(num_samples), middles, lengths, points


# --- volume rendering -----------------------------------------------------------------------------


class Composited(NamedTuple):
    """What :func:`composite` gives; arrays that its gradient needs, too."""

    shares: Float[Tensor, " M"]
    accumulation: Float[Tensor, " R"]
    distance: Float[Tensor, " R"]
    distortion: Float[Tensor, " R"]
    ray: Int[Tensor, " M"]
    centres: Float[Tensor, "M 3"]
    kept: tuple[np.ndarray, ...]
    """Middles, places, widths, light, weights, groups, and where the samples of a ray start."""


def composite(
    optical_depth: Float[Tensor, " N"],
    ray: Int[Tensor, " N"],
    middles: Float[Tensor, " N"],
    lengths: Float[Tensor, " N"] | float,
    points: Float[Tensor, "N 3"],
    spacings: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None,
    num_rays: int,
    least: float,
    most: float,
) -> Composited:
    """Weights of volume rendering, their sums, and shared colours: see ``sampling.composite``."""
    kernels = _kernels()
    assert kernels is not None
    depths, where = _flat(optical_depth), _flat(middles)
    sizes = _flat(lengths) if isinstance(lengths, Tensor) else np.full(1, lengths, np.float32)
    bounds = np.searchsorted(_flat(ray), np.arange(num_rays + 1))
    light, weights = (np.empty(len(depths), np.float32) for _ in range(2))
    groups, counts = np.empty(len(depths), np.int64), np.empty(num_rays, np.int64)
    nowhere = np.empty(0, np.float32)
    places, widths = (nowhere, nowhere) if spacings is None else map(_flat, spacings)
    sums = torch.empty(3, num_rays)
    limits = np.float32(least), np.float32(most)
    given = depths, where, sizes, places, widths, bounds, *limits
    filled = light, weights, groups, counts, *sums.numpy()
    work = functools.partial(kernels.composite, *given, *filled)
    width = _SAMPLE * len(depths) // max(num_rays, 1)
    _split_range(work, num_rays, width)

    offsets = np.concatenate((np.zeros(1, np.int64), counts.cumsum()))
    num_groups = int(offsets[-1])
    shares, centres = torch.zeros(num_groups), torch.zeros(num_groups, 3)
    of_ray = torch.empty(num_groups, dtype=torch.int64)
    filled = shares.numpy(), centres.numpy(), of_ray.numpy()
    positions = points.detach().contiguous().numpy()
    work = functools.partial(kernels.share, weights, positions, groups, bounds, offsets, *filled)
    _split_range(work, num_rays, width)
    kept = where, places, widths, light, weights, groups, bounds
    accumulation, distance, distortion = sums
    return Composited(shares, accumulation, distance, distortion, of_ray, centres, kept)


def composite_backward(
    kept: tuple[np.ndarray, ...],
    of_shares: Float[Tensor, " M"],
    of_accumulation: Float[Tensor, " R"],
    of_distance: Float[Tensor, " R"],
    of_distortion: Float[Tensor, " R"],
) -> Float[Tensor, " N"]:
    """Gradient of the optical depths of :func:`composite`."""
    kernels = _kernels()
    assert kernels is not None
    out = torch.empty(len(kept[0]))
    sums = torch.stack((of_accumulation, of_distance, of_distortion)).numpy()
    num_rays = sums.shape[1]
    work = functools.partial(kernels.composite_backward, *kept, sums, _flat(of_shares), out.numpy())
    _split_range(work, num_rays, _SAMPLE * len(out) // max(num_rays, 1))
    return out


# --- inputs of the colour network -----------------------------------------------------------------


def encode(
    appearance: Float[Tensor, "N A"], directions: Float[Tensor, "N D"], num_frequencies: int
) -> Float[Tensor, "N _"]:
    """(a, d, γ(a), γ(d)), see :mod:`masked_wavelet_nerf.field`, and zeros up to a multiple of 8.

    Matrix products are up to twice as fast on such rows.
    """
    kernels = _kernels()
    assert kernels is not None
    inputs = [t.detach().contiguous().numpy() for t in (appearance, directions)]
    num_rows = len(appearance)
    used = sum(t.shape[1] for t in inputs) * (1 + 2 * num_frequencies)
    width = -(-used // _ROW) * _ROW
    out = torch.empty(num_rows, width)
    work = functools.partial(kernels.encode, *inputs, num_frequencies, width, _flat(out))
    _split_range(work, num_rows, width)
    return out


def encode_backward(
    gradient: Float[Tensor, "N F"],
    encoded: Float[Tensor, "N F"],
    num_appearance: int,
    num_directions: int,
    num_frequencies: int,
) -> Float[Tensor, "N A"]:
    """Gradient of :func:`encode` with respect to ``appearance``; ``encoded`` is what it gave."""
    kernels = _kernels()
    assert kernels is not None
    arrays = [t.detach().contiguous().numpy() for t in (gradient, encoded)]
    out = torch.empty(len(gradient), num_appearance)
    sizes = num_appearance, num_directions, num_frequencies
    work = functools.partial(kernels.encode_backward, *arrays, *sizes, _flat(out))
    _split_range(work, *gradient.shape)
    return out


# --- memory and threads ---------------------------------------------------------------------------

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # mallopt's names for them


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next allocation instead of returning it.

    A training step frees and asks again for some hundred megabytes; getting fresh pages for them
    takes a tenth of the step. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in (
            (_TRIM_THRESHOLD, 2**31 - 1),
            (_TOP_PAD, 64 << 20),
            (_MMAP_THRESHOLD, 32 << 20),  # the most that glibc allows
        ):
            libc.mallopt(option, value)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).numpy()


def _innermost(tensor: Tensor) -> np.ndarray:
    """Flat, with the first axis, channels, innermost."""
    # In numpy, which makes a view in a third of the time: a step makes hundreds of these.
    array = tensor.detach().numpy()
    return array.transpose(*range(1, array.ndim), 0).reshape(-1)


def _parts(size: int, num_parts: int) -> list[tuple[int, int]]:
    """``range(size)`` in equal parts, as (start, stop)."""
    bounds = [size * i // num_parts for i in range(num_parts + 1)]
    return list(itertools.pairwise(bounds))


def _split_range(work: Callable[[int, int], Any], size: int, width: int = 1) -> list[Any]:
    """Calls ``work(start, stop)`` on as many parts of ``range(size)`` as there are threads.

    Less than some hundred thousand numbers, ``width`` for each of ``size``, are not worth waking
    threads for.
    """
    if torch.get_num_threads() == 1 or size * width < _WORTH_A_THREAD:
        return [work(0, size)]
    num_parts = max(1, min(torch.get_num_threads(), size))
    return threads.run([functools.partial(work, *part) for part in _parts(size, num_parts)])
