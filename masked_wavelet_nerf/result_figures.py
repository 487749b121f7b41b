"""Figures of results: rate-distortion curves, what is kept of each level, training."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from masked_wavelet_nerf.curves import Point, draw, label
from masked_wavelet_nerf.summary import Entry, curves_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LINES = 24
"""Of a figure that has a line for each entry."""


def rate_distortion(entries: Sequence[Entry]) -> Figure:
    """Bytes against PSNR, a line for each curve."""
    return _curves(curves_of(entries), "PSNR, dB")


def rate_perception(entries: Sequence[Entry]) -> Figure | None:
    """Bytes against SSIM, a line for each curve; None where rows do not say it."""
    curves = curves_of(entries, "ssim")
    return _curves(curves, "SSIM") if curves else None


def kept_levels(entries: Sequence[Entry]) -> Figure | None:
    """The share of coefficients that is kept, level by level; None where rows do not say it."""
    known = [entry for entry in entries if entry.rows[0].get("kept_by_level")][:_MOST_LINES]
    if not known:
        return None
    figure = _figure(8.0, 4.0)
    axes = figure.add_subplot()
    levels: list[str] = []
    for entry in known:
        levels += [level for level in entry.rows[0]["kept_by_level"] if level not in levels]
    levels.sort(key=lambda level: (level != "lines", level))
    for entry in known:
        kept = entry.rows[0]["kept_by_level"]
        named = [level for level in levels if level in kept]
        shares = [100 * kept[level] for level in named]
        axes.plot(
            [levels.index(level) for level in named], shares, marker="o", label=label(entry.name)
        )
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylabel("kept, %")
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    _legend(figure)
    return figure


def training(entries: Sequence[Entry]) -> Figure | None:
    """PSNR of training rays and the kept share against steps; None where rows do not say it."""
    known = [entry for entry in entries if entry.rows[0].get("training")][:_MOST_LINES]
    if not known:
        return None
    figure = _figure(8.0, 4.0)
    for place, (key, axis, factor) in enumerate(
        (("psnr", "PSNR of training rays, dB", 1), ("kept", "kept, %", 100)), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        for entry in known:
            points = entry.rows[0]["training"].get(key, [])
            axes.plot(
                [step for step, _ in points],
                [factor * value for _, value in points],
                label=label(entry.name) if place == 1 else None,
                linewidth=1,
            )
        axes.set_xlabel("steps")
        axes.set_ylabel(axis)
        axes.grid(visible=True, alpha=0.3)
    _legend(figure)
    return figure


def to_svg(figure: Figure) -> str:
    """As an element of a page; the same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "masked-wavelet-nerf"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _curves(curves: Mapping[str, Sequence[Point]], quality: str) -> Figure:
    figure = _figure(8.0, 4.8)
    draw(figure.add_subplot(), curves, quality)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside right upper", fontsize="x-small")
