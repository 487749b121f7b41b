"""Times the inverse wavelet transform against other ways to compute it, as a Markdown table.

    python -m masked_wavelet_nerf.bench_transform --sizes 128 304 --channels 192 --threads 1 2

Every candidate inverts bior4.4 with 4 levels. Our own ones and their rivals in plain torch start
from scaled bands; peers from their own bands of the same plane, unscaled. Candidates take turns, so
that other load on the machine meets all alike; a figure is the fastest run, with the median in
brackets. The error, largest |plane - inverse|, shows that all compute the same.

Letters: C channels, h, w band size, n samples along an axis; m taps reach to either side.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import NamedTuple

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from masked_wavelet_nerf import native
from masked_wavelet_nerf.wavelet import Bands, WaveletTransform

WAVELET, NUM_LEVELS = "bior4.4", 4
CHANNELS_PER_CALL = 48
"""As the field calls it: one tensor per plane and kind of feature, at most 48 channels."""
ROUNDS = 15


class Candidate(NamedTuple):
    """One way to invert: the tensors to start from, made of a plane, and the inverse."""

    analyse: Callable[[Tensor], list[Tensor]]
    invert: Callable[[list[Tensor], int], Tensor]
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    """What all of it runs in."""


def ours(bands: list[Tensor], n: int) -> Tensor:
    """What ``wavelet.py`` does: compiled loops, or dense blocks around the bands; own gradient."""
    return WaveletTransform(WAVELET, NUM_LEVELS).inverse(Bands(bands[0], tuple(bands[1:])), (n, n))


def dense(bands: list[Tensor], n: int) -> Tensor:
    """S · X · Sᵀ per level, S the whole n × n synthesis matrix."""
    x, *details = bands
    for level, detail in enumerate(details, start=1):
        matrix = _synthesis(2 * x.shape[-1])
        horizontal, vertical, diagonal = (detail / (level + 1)).unbind(dim=1)
        left = torch.cat((x, horizontal), dim=-2)
        right = torch.cat((vertical, diagonal), dim=-2)
        x = (matrix @ torch.cat((left, right), dim=-1)) @ matrix.T
    return x


def convolution(bands: list[Tensor], n: int) -> Tensor:
    """One 4 → 4 convolution per level, from the bands to the phases; then a pixel shuffle."""
    taps, m = _taps()
    kernel = torch.einsum("pbj,qcl->pqcbjl", taps, taps)  # in: approximation, cH, cV, cD
    x, *details = bands
    for level, detail in enumerate(details, start=1):
        factors = torch.tensor([1.0, *[1 / (level + 1)] * 3]).view(1, 4, 1, 1)
        stacked = torch.cat((x[:, None], detail), dim=1)
        padded = F.pad(stacked, (m, m, m, m), mode="circular")
        phases = F.conv2d(padded, kernel.reshape(4, 4, 2 * m + 1, 2 * m + 1) * factors)
        x = F.pixel_shuffle(phases, 2)[:, 0]
    return x


def shifted_sums(bands: list[Tensor], n: int) -> Tensor:
    """Polyphase form: per axis and phase, the sum of shifted bands times taps."""
    taps, m = _taps()

    def merge(low: Tensor, high: Tensor, axis: int) -> Tensor:
        phases = []
        for phase in taps:
            total = torch.zeros_like(low)
            for band, band_taps in zip((low, high), phase.tolist(), strict=True):
                for shift, tap in zip(range(m, -m - 1, -1), band_taps, strict=True):
                    if tap:
                        total = torch.add(total, band.roll(shift, axis), alpha=tap)
            phases.append(total)
        return torch.stack(phases, dim=axis + 1).flatten(axis, axis + 1)

    x, *details = bands
    for level, detail in enumerate(details, start=1):
        horizontal, vertical, diagonal = (detail / (level + 1)).unbind(dim=1)
        x = merge(merge(x, horizontal, 1), merge(vertical, diagonal, 1), 2)
    return x


def candidates() -> dict[str, Candidate | None]:
    """Every way to invert by name; None where the package is not installed."""
    ways = {
        "compiled loops (ours)": ours,
        "dense matrices": dense,
        "convolution and pixel shuffle": convolution,
        "shifted sums": shifted_sums,
    }

    def analyse(plane: Tensor) -> list[Tensor]:
        bands = WaveletTransform(WAVELET, NUM_LEVELS).forward(plane)
        return [bands.approximation, *bands.details]

    found: dict[str, Candidate | None] = {
        name: Candidate(analyse, invert) for name, invert in ways.items()
    }
    found["blocks around the band (ours, plain torch)"] = Candidate(analyse, ours, native.disabled)
    found["pytorch_wavelets"] = _pytorch_wavelets()
    found["ptwt (periodic: more coefficients)"] = _ptwt()
    return found


def _pytorch_wavelets() -> Candidate | None:
    try:
        import pytorch_wavelets  # pyright: ignore[reportMissingImports]
    except ImportError:  # also where setuptools no longer brings its pkg_resources
        return None
    split = pytorch_wavelets.DWTForward(J=NUM_LEVELS, wave=WAVELET, mode="periodization")
    merge = pytorch_wavelets.DWTInverse(wave=WAVELET, mode="periodization")

    def analyse(plane: Tensor) -> list[Tensor]:
        low, high = split(plane[None])
        return [low, *high]

    return Candidate(analyse, lambda bands, n: merge((bands[0], bands[1:]))[0])


def _ptwt() -> Candidate | None:
    try:
        import ptwt  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def analyse(plane: Tensor) -> list[Tensor]:
        low, *high = ptwt.wavedec2(plane, WAVELET, mode="periodic", level=NUM_LEVELS)
        return [low, *(band for level in high for band in level)]

    def invert(bands: list[Tensor], n: int) -> Tensor:
        low, *high = bands
        levels = [tuple(high[i : i + 3]) for i in range(0, len(high), 3)]
        return ptwt.waverec2((low, *levels), WAVELET)

    return Candidate(analyse, invert)


@functools.cache
def _synthesis(n: int) -> Tensor:
    """(n, n): [low; high] bands of n/2 each to n samples."""
    unit, zero = np.eye(n // 2), np.zeros((n // 2, n // 2))
    pairs = ((unit, zero), (zero, unit))
    both = [pywt.idwt(*pair, WAVELET, mode="periodization", axis=0) for pair in pairs]
    return torch.from_numpy(np.concatenate(both, axis=1)).float()


@functools.cache
def _taps() -> tuple[Tensor, int]:
    """(2 phases, 2 bands, 2m + 1), m: sample 2k + phase is made of the bands at k - m … k + m."""
    half = 32
    k = half // 2
    rows = _synthesis(2 * half)[2 * k : 2 * k + 2].view(2, 2, half)
    m = int((rows.nonzero()[:, 2] - k).abs().max())
    return rows[..., k - m : k + m + 1], m


def _run(candidate: Candidate, bands: list[list[Tensor]], plane: Tensor) -> tuple[float, float]:
    """Seconds of the inverse of all groups of channels, and of its gradients."""
    n = plane.shape[-1]
    forward = backward = 0.0
    with candidate.context():
        for group, gradient in zip(bands, plane.split(CHANNELS_PER_CALL), strict=True):
            start = time.perf_counter()
            rendered = candidate.invert(group, n)
            middle = time.perf_counter()
            torch.autograd.grad(rendered, group, gradient)
            forward += middle - start
            backward += time.perf_counter() - middle
    return forward, backward


def measure(num_channels: int, n: int, num_threads: int) -> list[str]:
    """Rows of the table for one size and number of threads."""
    torch.set_num_threads(num_threads)
    plane = torch.rand(num_channels, n, n, generator=torch.Generator().manual_seed(0))
    groups = plane.split(CHANNELS_PER_CALL)
    found = candidates()
    starts, errors = {}, {}
    for name, candidate in found.items():
        if candidate is None:
            continue
        with candidate.context():
            bands = [[b.detach() for b in candidate.analyse(group)] for group in groups]
            errors[name] = max(
                float((candidate.invert(b, n) - group).abs().max())
                for b, group in zip(bands, groups, strict=True)
            )
        starts[name] = [[band.requires_grad_() for band in group] for group in bands]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
    for _ in range(ROUNDS):
        for name, bands in starts.items():
            candidate = found[name]
            assert candidate is not None
            times[name].append(_run(candidate, bands, plane))
    rows = []
    for name in found:
        if name not in times:
            rows.append(f"| {n}² | {num_threads} | {name} | not installed | | |")
            continue
        cells = (
            f"{min(t) * 1e3:.0f} ({median(t) * 1e3:.0f})" for t in zip(*times[name], strict=True)
        )
        rows.append(f"| {n}² | {num_threads} | {name} | {' | '.join(cells)} | {errors[name]:.0e} |")
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 304], help="multiples of 16")
    parser.add_argument("--channels", type=int, default=192)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print("| size | threads | inverse by | forward ms | backward ms | error |")
    print("|---|---|---|---|---|---|", flush=True)
    for n in arguments.sizes:
        for num_threads in arguments.threads:
            print("\n".join(measure(arguments.channels, n, num_threads)), flush=True)


if __name__ == "__main__":
    main()
