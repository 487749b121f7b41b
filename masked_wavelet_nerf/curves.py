"""Curves of bytes against quality, and Bjøntegaard's difference between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from masked_wavelet_nerf.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(NamedTuple):
    """A file: its size, and how good what it gives is."""

    num_bytes: float
    quality: float
    """PSNR in dB, or SSIM."""


def bjontegaard_rate(reference: Sequence[Point], other: Sequence[Point]) -> float:
    """Mean relative difference in bytes at the same PSNR, over what both curves reach.

    The logarithm of bytes as a function of PSNR is interpolated by piecewise cubics that do not
    overshoot, and averaged over PSNR: Bjøntegaard's difference (VCEG-M33) as JVET computes it now.

    Args:
        reference: at least two points.
        other: at least two points.

    Returns:
        -0.5 where ``other`` takes half of the bytes.

    Raises:
        UserError: if PSNR does not rise with bytes, or the curves share no PSNR.
    """
    one, two = ([(p.quality, math.log(p.num_bytes)) for p in c] for c in (reference, other))
    return math.exp(_mean_difference(one, two, "PSNR")) - 1


def bjontegaard_psnr(reference: Sequence[Point], other: Sequence[Point]) -> float:
    """Mean difference in PSNR (dB) at the same bytes, over what both curves reach.

    As :func:`bjontegaard_rate`, with the axes exchanged: the mean is over the logarithm of bytes.

    Raises:
        UserError: if PSNR does not rise with bytes, or the curves share no size.
    """
    one, two = ([(math.log(p.num_bytes), p.quality) for p in c] for c in (reference, other))
    return _mean_difference(one, two, "size")


def _mean_difference(
    reference: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], shared: str
) -> float:
    """Of y over the x that both reach, from (x, y)."""
    curves = [np.array(sorted(points)) for points in (reference, other)]
    low, high = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    if not low < high:
        raise UserError(f"the curves share no {shared}")
    means = []
    for curve in curves:
        if (np.diff(curve, axis=0) <= 0).any():
            raise UserError("PSNR does not rise with bytes")
        y = PchipInterpolator(*curve.T)
        means.append(float(y.integrate(low, high)) / (high - low))
    return means[1] - means[0]


def label(name: str) -> str:
    """A name for a figure's legend: dollars are not the start of a formula there."""
    return name.replace("$", r"\$")


def draw(axes: Axes, curves: Mapping[str, Sequence[Point]], quality: str = "PSNR, dB") -> None:
    """Draws the curves; bytes in a logarithmic scale, ``quality`` is what the other axis says."""
    from matplotlib import ticker

    for name, points in curves.items():
        axes.plot(
            [p.num_bytes / 1000 for p in points],
            [p.quality for p in points],
            marker="o",
            markersize=4,
            label=label(name.replace("_", " ")),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    low, high = axes.get_xlim()
    steps = (1, 2, 5)
    ticks = [step * 10**power for power in range(-1, 6) for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > 1:
        axes.set_xticks(shown)
    else:  # all within a step from one to the next
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.set_xlabel("kilobytes")
    axes.set_ylabel(quality)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
