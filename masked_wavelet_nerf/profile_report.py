"""What ``mwnerf profile`` measures, as tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import rich.table
from rich import box

from masked_wavelet_nerf.floors import Machine


@dataclass(frozen=True)
class Part:
    """One part of a step or frame; times in seconds."""

    name: str
    seconds: float
    num_bytes: float
    operations: float
    floor: float
    """Least time that the machine could need; 0 where nothing has to be done."""


@dataclass(frozen=True)
class Timing:
    """A training step or a frame."""

    seconds: float
    """Median without the profiler; the parts add up to it."""
    profiled_seconds: float
    """Mean under the profiler."""
    parts: list[Part]
    rays: int
    density_samples: int
    coloured_samples: int


@dataclass(frozen=True)
class Variation:
    """A step's time with other rays or samples."""

    rays: int
    step_ratio: float
    density_samples: int
    seconds: float


@dataclass(frozen=True)
class Threading:
    """A step's time with so many CPU threads."""

    threads: int
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One grid size; times in seconds, memory in bytes."""

    resolution: tuple[int, int, int]
    step_ratio: float
    """Distance between samples, in voxels; of no meaning in unbounded scenes."""
    kept: float
    """Fraction of the coefficients."""
    step: Timing
    frame: Timing
    first_picture_seconds: float
    """A small picture after the planes were dropped …"""
    next_picture_seconds: float
    """… and one more."""
    library_bytes: int
    """Resident memory before anything is built; contained in the two peaks."""
    train_peak_bytes: int
    render_peak_bytes: int
    train_peak_device_bytes: int
    render_peak_device_bytes: int
    threadings: list[Threading]
    variations: list[Variation]


class Table(NamedTuple):
    """A table of text; the first column names its rows."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(
    machine: Machine, device: str, threads: int, measurements: Sequence[Measurement]
) -> list[Table]:
    """Everything that was measured: parts of step and frame per size, sizes, variations."""
    where = "CUDA" if device == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}"
    found = [
        Table(
            f"This machine at best ({where})",
            ("", ""),
            [
                ("memory, read and written", f"{machine.bandwidth / 1e9:.1f} GB/s"),
                ("float32 matrix product", f"{machine.peak / 1e9:.0f} GFLOP/s"),
            ],
        )
    ]
    for m in measurements:
        found.append(parts_table(f"{voxels(m)}: one training step", m.step))
        found.append(parts_table(f"{voxels(m)}: one frame", m.frame))
    found.append(_sizes_table(measurements))
    rows = [
        (voxels(m), f"{v.rays:,}", f"{v.step_ratio:g}", _per(v.density_samples, v.rays),
         _ms(v.seconds))
        for m in measurements for v in m.variations
    ]  # fmt: skip
    if rows:
        header = ("voxels", "rays", "step ratio", "samples per ray", "step, ms")
        found.append(Table("Rays and samples", header, rows))
    rows = [
        (voxels(m), f"{m.step.rays:,}", f"{t.threads}", _ms(t.seconds),
         f"{m.threadings[0].seconds / t.seconds:.2f}")
        for m in measurements for t in m.threadings
    ]  # fmt: skip
    if rows:
        header = ("voxels", "rays", "threads", "step, ms", "times as fast")
        found.append(Table("Threads, in turn", header, rows))
    return found


def parts_table(title: str, timing: Timing) -> Table:
    """Where the time goes, and what the machine would need at least; slowest part first."""
    rows = []
    for part in sorted(timing.parts, key=lambda part: -part.seconds):
        limits = ("", "", "", "")
        if part.floor > 0:
            limits = (
                f"{part.num_bytes / 1e6:,.1f}",
                f"{part.operations / 1e6:,.1f}",
                _ms(part.floor),
                f"{part.seconds / part.floor:.1f}",
            )
        share = part.seconds / timing.seconds
        rows.append((part.name, _ms(part.seconds), f"{share:.1%}", *limits))
    floor = sum(part.floor for part in timing.parts)
    ratio = f"{timing.seconds / floor:.1f}" if floor else ""
    rows.append(("all", _ms(timing.seconds), "100.0%", "", "", _ms(floor), ratio))
    title += (
        f" of {timing.rays:,} rays, {_per(timing.density_samples, timing.rays)} density samples and"
        f" {_per(timing.coloured_samples, timing.rays)} colours a ray (profiled:"
        f" {_ms(timing.profiled_seconds)} ms)"
    )
    return Table(title, ("part", "ms", "share", "MB", "MFLOP", "floor, ms", "times floor"), rows)


def _sizes_table(measurements: Sequence[Measurement]) -> Table:
    on_device = any(m.train_peak_device_bytes for m in measurements)
    header = (
        "voxels", "kept", "step, ms", "steps/s", "rest of step, ms", "frame, ms", "rays/s",
        "first picture, ms", "next picture, ms", "libraries, MB", "training, MB", "rendering, MB",
        *(("training, GPU MB", "rendering, GPU MB") if on_device else ()),
    )  # fmt: skip
    rows = []
    for m in measurements:
        memory = [m.library_bytes, m.train_peak_bytes, m.render_peak_bytes]
        if on_device:
            memory += [m.train_peak_device_bytes, m.render_peak_device_bytes]
        rows.append(
            (
                voxels(m),
                f"{m.kept:.1%}",
                _ms(m.step.seconds),
                f"{1 / m.step.seconds:.2f}",
                _ms(m.step.parts[-1].seconds),
                _ms(m.frame.seconds),
                f"{m.frame.rays / m.frame.seconds:,.0f}",
                _ms(m.first_picture_seconds),
                _ms(m.next_picture_seconds),
                *(f"{value / 1e6:,.0f}" for value in memory),
            )
        )
    return Table("Sizes; peaks of memory contain the libraries", header, rows)


def voxels(measurement: Measurement) -> str:
    """128³, or 120 × 130 × 140."""
    x, y, z = measurement.resolution
    return f"{x}³" if x == y == z else f"{x} × {y} × {z}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:,.1f}"


def _per(count: int, rays: int) -> str:
    return f"{count / max(rays, 1):.1f}"


def markdown(table: Table) -> str:
    """The table in Markdown, under its title in bold."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---", *["---:"] * (len(table.header) - 1)]
    return "\n".join((f"**{table.title}**", "", *map(row, (table.header, rule, *table.rows))))


def rich_table(table: Table) -> rich.table.Table:
    """The table for a terminal."""
    shown = rich.table.Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    return shown


def draw(measurements: Sequence[Measurement], path: Path) -> None:
    """Cost against grid size, rays and samples per ray, side by side."""
    # Not pyplot: it would look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_size, by_rays, by_samples = figure.subplots(1, 3)
    sides = [sum(m.resolution) / 3 for m in measurements]
    lines = {
        "training step": [m.step.seconds for m in measurements],
        "its floor": [sum(p.floor for p in m.step.parts) for m in measurements],
        "frame": [m.frame.seconds for m in measurements],
        "first small picture": [m.first_picture_seconds for m in measurements],
    }
    for label, seconds in lines.items():
        style = {"linestyle": "--", "color": "tab:blue"} if label == "its floor" else {}
        by_size.plot(sides, [1e3 * s for s in seconds], "o-", label=label, **style)
    by_size.set(xlabel="voxels per side", ylabel="ms", title="Grid size")
    by_size.legend()
    for axes, vary_rays in ((by_rays, True), (by_samples, False)):
        for m in measurements:
            points = []
            for v in m.variations:
                is_usual = v.step_ratio == m.step_ratio if vary_rays else v.rays == m.step.rays
                if is_usual:
                    points.append((v.rays if vary_rays else v.density_samples / v.rays, v.seconds))
            points.sort()
            if points:
                x, seconds = zip(*points, strict=True)
                axes.plot(x, [1e3 * s for s in seconds], "o-", label=voxels(m))
                axes.legend()
    by_rays.set(xlabel="rays of a step", ylabel="ms", title="Rays")
    by_samples.set(xlabel="density samples per ray", ylabel="ms", title="Samples")
    for axes in (by_size, by_rays, by_samples):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)  # so that fixed costs show where a line starts
        axes.grid(alpha=0.3)
    figure.savefig(path)
