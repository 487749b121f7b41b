"""``mwnerf curve``: bytes against PSNR of several methods, and Bjøntegaard's difference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich import box
from rich.table import Table
from scipy.interpolate import PchipInterpolator

from masked_wavelet_nerf.errors import UserError


class Point(NamedTuple):
    """A file: its size, and the PSNR of what it gives."""

    num_bytes: float
    psnr: float
    """dB."""


@dataclass
class Curve:
    """Compare rate-distortion curves: a table, Bjøntegaard's difference, a picture.

    A curve is a file of rows that ``mwnerf bench --json`` printed, as one JSON list; its name is
    the file's. Rows of the same preset (other seeds) are one point: their mean.
    """

    rows: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files, one for each curve; the first is what the others are compared with."""
    figure: Path | None = None
    """Draw the curves here."""

    def main(self) -> None:
        """Print, and draw."""
        if not self.rows:
            raise UserError("curve: expected at least one JSON file of rows")
        curves = {path.stem: read_points(path) for path in self.rows}
        table = Table(box=box.MARKDOWN)
        for column in ("curve", "bytes", "PSNR"):
            table.add_column(column, justify="left" if column == "curve" else "right")
        for name, points in curves.items():
            for point in points:
                table.add_row(name, f"{point.num_bytes:,.0f}", f"{point.psnr:.2f}")
        CONSOLE.print(table)
        reference, *others = curves
        for name in others:
            rate = bjontegaard_rate(curves[reference], curves[name])
            low, high = shared_range(curves[reference], curves[name])
            CONSOLE.print(
                f"{name} against {reference}: {rate:+.1%} bytes at the same PSNR "
                f"({low:.2f} to {high:.2f} dB)",
                highlight=False,
            )
        if self.figure is not None:
            draw(curves, self.figure)
            CONSOLE.print(f"Drew {self.figure}")


def read_points(path: Path) -> list[Point]:
    """The points of a file of rows, by size.

    Raises:
        UserError: if it is no such file.
    """
    try:
        rows = json.loads(path.read_text("utf8"))
        by_preset: dict[str, list[Point]] = {}
        if not isinstance(rows, list) or not rows:
            raise TypeError("no rows")
        for row in rows:
            point = Point(float(row["bytes"]), float(row["psnr_after"]))
            by_preset.setdefault(row["preset"], []).append(point)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a JSON list of rows of mwnerf bench --json "
            f"({type(error).__name__}: {error})"
        ) from error
    means = [np.mean(points, axis=0) for points in by_preset.values()]
    return sorted(Point(float(num_bytes), float(psnr)) for num_bytes, psnr in means)


def shared_range(a: Sequence[Point], b: Sequence[Point]) -> tuple[float, float]:
    """PSNR from which and up to which both curves reach, dB."""
    low = max(min(point.psnr for point in curve) for curve in (a, b))
    high = min(max(point.psnr for point in curve) for curve in (a, b))
    return low, high


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
    low, high = shared_range(reference, other)
    if not low < high:
        raise UserError(
            "Bjøntegaard's difference needs a range of PSNR that both curves reach: one ends at "
            f"{high:.2f} dB, where the other has not begun"
        )
    means = []
    for curve in (reference, other):
        points = sorted(curve)
        psnr = np.array([point.psnr for point in points])
        if (np.diff(psnr) <= 0).any():
            raise UserError(
                "Bjøntegaard's difference needs PSNR that rises with bytes, got "
                + ", ".join(f"{p.psnr:.2f} dB in {p.num_bytes:,.0f}" for p in points)
            )
        log_bytes = PchipInterpolator(psnr, np.log([point.num_bytes for point in points]))
        means.append(float(log_bytes.integrate(low, high)) / (high - low))
    return float(np.exp(means[1] - means[0])) - 1


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """A picture of the curves; bytes in a logarithmic scale."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(
            [p.num_bytes / 1000 for p in points],
            [p.psnr for p in points],
            marker="o",
            label=name.replace("_", " "),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in (20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= t <= high])
    axes.set_xlabel("kilobytes")
    axes.set_ylabel("PSNR, dB")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
