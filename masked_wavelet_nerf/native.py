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
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

_SWITCH = "MASKED_WAVELET_NATIVE"
_TAPS = 5
"""Taps that the banded product takes at once."""

_WORTH_A_THREAD = 1 << 17

_disabled = 0


class Taps(NamedTuple):
    """A banded matrix, row by row: output i = Σ_t values[i, t] · input[columns[i, t]]."""

    columns: np.ndarray
    values: np.ndarray


def is_switched_on() -> bool:
    """Whether anything but plain torch may be used: not within :func:`disabled`, nor by wish."""
    return not _disabled and os.environ.get(_SWITCH, "1") != "0"


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
    """Plain torch within: for comparisons."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


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
            _flat(plane.movedim(0, -1)),
            _flat(line.T),
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
    g = _flat(gradient)
    width = 0 if gradient.ndim == 1 else gradient.shape[1]

    def task(i: int, offset: int, start: int, stop: int) -> list[Tensor]:
        plane = torch.zeros(planes[i].movedim(0, -1).shape, dtype=torch.float32)
        line = torch.zeros(lines[i].T.shape, dtype=torch.float32)
        arguments = g, width, offset, _flat(plane), _flat(line), start, stop
        kernels.features_backward(where, *found[i], *arguments)
        return [plane, line]

    # Threads share neither planes nor, where there are several, points: each adds up its own.
    num_parts = 1 if torch.get_num_threads() == 1 else 2
    offsets = np.cumsum([0, *(factors.shape[-1] for factors in found)])
    tasks = [
        functools.partial(task, i, int(offsets[i]), start, stop)
        for i in range(len(found))
        for start, stop in _parts(len(where), num_parts)
    ]
    done = iter(_run(tasks))
    sums = [
        [functools.reduce(Tensor.add_, parts) for parts in zip(*group, strict=True)]
        for group in zip(*[done] * num_parts, strict=True)
    ]
    return [t.movedim(-1, 0) for kind in zip(*sums, strict=True) for t in kind]


# --- banded products ------------------------------------------------------------------------------


def taps(matrix: np.ndarray) -> Taps:
    """The nonzero entries of a matrix, row by row; rows are filled up with zeros."""
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
    return Taps(columns, values)


def merge(
    rows: tuple[Taps, Taps],
    columns: tuple[Taps, Taps],
    factor: float,
    approximation: Float[Tensor, "h w C"],
    detail: Float[Tensor, "3 h w C"],
) -> Float[Tensor, "H W C"]:
    """Merges one level, see :mod:`masked_wavelet_nerf.wavelet`; ``factor`` is the details'."""
    kernels = _kernels()
    assert kernels is not None
    (h, w, C), H, W = approximation.shape, len(rows[0].values), len(columns[0].values)
    low, high, plane = (approximation.new_empty(H, n, C) for n in (w, w, W))
    arrays = [_flat(t) for t in (approximation, detail, low, high, plane)]
    matrices = (tuple(rows[0]), tuple(rows[1]))
    arguments = *arrays[:2], (h, H, w * C), matrices, np.float32(factor), *arrays[2:4]
    _split_range(functools.partial(kernels.merge_rows, *arguments), H, 2 * w * C)
    matrices = (tuple(columns[0]), tuple(columns[1]))
    arguments = *arrays[2:4], (w, W, C), matrices, arrays[4]
    _split_range(functools.partial(kernels.merge_columns, *arguments), H, W * C)
    return plane


def split(
    rows: tuple[Taps, Taps],
    columns: tuple[Taps, Taps],
    factor: float,
    plane: Float[Tensor, "H W C"],
) -> tuple[Float[Tensor, "h w C"], Float[Tensor, "3 h w C"]]:
    """Splits one level, see :mod:`masked_wavelet_nerf.wavelet`; ``factor`` is the details'."""
    kernels = _kernels()
    assert kernels is not None
    (H, W, C), h, w = plane.shape, len(rows[0].values), len(columns[0].values)
    low, high = plane.new_empty(H, w, C), plane.new_empty(H, w, C)
    approximation, detail = plane.new_empty(h, w, C), plane.new_empty(3, h, w, C)
    arrays = [_flat(t) for t in (plane, low, high, approximation, detail)]
    matrices = (tuple(columns[0]), tuple(columns[1]))
    arguments = arrays[0], (W, w, C), matrices, *arrays[1:3]
    _split_range(functools.partial(kernels.split_columns, *arguments), H, 2 * w * C)
    matrices = (tuple(rows[0]), tuple(rows[1]))
    arguments = *arrays[1:3], (H, h, w * C), matrices, np.float32(factor), *arrays[3:]
    _split_range(functools.partial(kernels.split_rows, *arguments), h, 4 * w * C)
    return approximation, detail


# --- masks and quantiser --------------------------------------------------------------------------


def masked_quantise(
    values: Float[Tensor, "C B *n"],
    logits: Float[Tensor, "C B *n"],
    threshold: float,
    largest: int,
) -> tuple[Float[Tensor, "C B *n"], Bool[Tensor, "C B *n"], float]:
    """Quantised values (0 where dropped), which are kept, and the step Δ."""
    kernels = _kernels()
    assert kernels is not None
    v, m, limit = _flat(values.movedim(0, -1)), _flat(logits.movedim(0, -1)), np.float32(threshold)
    maxima = _split_range(functools.partial(kernels.largest_kept, v, m, limit), len(v))
    step = np.float32(max(maxima)) / np.float32(largest)
    step = step if step > 0 else np.float32(1)
    shape = values.movedim(0, -1).shape
    shown = torch.empty(shape, dtype=torch.float32)
    kept = torch.empty(shape, dtype=torch.bool)
    arguments = v, m, limit, step, np.float32(largest), _flat(shown), _flat(kept)
    _split_range(functools.partial(kernels.masked_quantise, *arguments), len(v))
    return shown.movedim(-1, 0), kept.movedim(-1, 0), float(step)


def masked_quantise_backward(
    gradient: Float[Tensor, "C B *n"],
    values: Float[Tensor, "C B *n"],
    kept: Bool[Tensor, "C B *n"],
    logits: Float[Tensor, "C B *n"],
    step: float,
    largest: int,
) -> tuple[Float[Tensor, "C B *n"], Float[Tensor, "C B *n"]]:
    """Straight-through gradients of values and logits."""
    kernels = _kernels()
    assert kernels is not None
    of_logits = torch.sigmoid(logits.movedim(0, -1)).contiguous()
    of_values = torch.empty_like(of_logits)
    arguments = [_flat(t.movedim(0, -1)) for t in (gradient, values, kept)]
    scalars = np.float32(step), np.float32(largest)
    work = functools.partial(
        kernels.masked_quantise_backward, *arguments, *scalars, _flat(of_logits), _flat(of_values)
    )
    _split_range(work, of_logits.numel())
    return of_values.movedim(-1, 0), of_logits.movedim(-1, 0)


# --- marching -------------------------------------------------------------------------------------


def occupied_places(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    first: Float[Tensor, "R 1"],
    fars: Float[Tensor, "R 1"],
    step_size: float,
    num_steps: int,
    cells: Bool[Tensor, "X Y Z"],
) -> Bool[Tensor, "R S"]:
    """Which places first + s · step, nearer than far, lie in occupied cells of [-1, 1]³."""
    kernels = _kernels()
    assert kernels is not None
    valid = torch.zeros(len(origins), num_steps, dtype=torch.bool)
    arguments = [
        *(t.detach().contiguous().numpy() for t in (origins, directions)),
        *(_flat(t) for t in (first, fars)),
        np.float32(step_size),
        cells.contiguous().numpy(),
        valid.numpy(),
    ]
    _split_range(functools.partial(kernels.occupied_places, *arguments), len(origins), num_steps)
    return valid


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


@functools.cache
def _pool(num_threads: int, process: int) -> ThreadPoolExecutor:
    # A forked process inherits the pool, but not its threads: each has a pool of its own.
    # Denormal numbers are as slow here as in the training loop, which flushes them too.
    return ThreadPoolExecutor(
        num_threads, "native", initializer=torch.set_flush_denormal, initargs=(True,)
    )


def _run(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(tasks) == 1:
        return [task() for task in tasks]
    pool = _pool(num_threads, os.getpid())
    return [future.result() for future in [pool.submit(task) for task in tasks]]


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
    return _run([functools.partial(work, *part) for part in _parts(size, num_parts)])
