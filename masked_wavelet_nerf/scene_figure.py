"""The picture of ``mwnerf info``: planes as wavelet bands, masks, channels, bits by level, size.

Needs numpy and matplotlib, neither torch nor nerfstudio. What is drawn is computed by functions of
its own: :func:`mosaic` and its neighbours for the planes, :func:`bars_of` for the charts.

Levels: 0 is the approximation (coarsest), 1 … L the details, coarse to fine.
Letters: C channels, B bands of a level, h, w size of a band, H, W size of a mosaic.
"""

from __future__ import annotations

import io
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

import masked_wavelet_codec as codec
from masked_wavelet_nerf import report
from masked_wavelet_nerf.files import replace_file

_INK, _FRAME = "#333333", "#bbbbbb"
_PARTS = ("#2a6fbb", "#e07b1a", "#3a9a5b", "#8a5bb5", "#c2273d")
"""Colours of density, appearance and whatever else there is, in turn."""
_SIZES = {
    "container": "#777777",
    "meta": "#b0a07a",
    "mask": "#5d9ad1",
    "values": "#1f5a96",
    "coefficients": "#2a6fbb",
    "networks": "#e07b1a",
    "occupancy": "#3a9a5b",
    "cameras": "#8a5bb5",
}
"""Colours of what ``Description.parts`` tells apart."""
_MAGNITUDES = colormaps["viridis"].with_extremes(bad="black", under="black")
_MASKS = colormaps["inferno"]
_PLANES = ("XY", "XZ", "YZ")
_MOST_PLANES = 12
"""That are drawn: twice what a scene of ours has, and few enough for one picture."""
_WIDTH, _DPI = 16.0, 100
"""Of the picture: inches, and pixels an inch."""
_DECADES = 4
"""Of magnitudes that can be told apart, at most."""


class Bar(NamedTuple):
    """What a part of the scene holds and costs at one level."""

    group: str
    """``level 2``, ``lines``; ``level 0 and lines`` where the file has them in one section."""
    part: str
    """``density``, ``appearance``; ``all`` where the file has them in one section."""
    num_coefficients: int
    num_kept: int
    bits: float
    """Of masks and values."""

    @property
    def kept_fraction(self) -> float:
        """0 where there are no coefficients."""
        return self.num_kept / max(self.num_coefficients, 1)

    @property
    def bits_per_kept(self) -> float:
        """0 where none is kept."""
        return self.bits / self.num_kept if self.num_kept else 0.0


def draw(path: Path, scene: codec.Scene, description: codec.Description) -> Path:
    """Writes the picture, see :func:`figure_of`, as PNG, all or nothing.

    Args:
        path: the file; an older one is replaced by a complete new one only. Its folder is made if
            need be.
        scene: all that the file holds.
        description: of the same file.

    Returns:
        ``path``.

    Raises:
        OSError: if it cannot be written; an older file stays as it was.
    """
    encoded = io.BytesIO()
    figure_of(scene, description).savefig(encoded, format="png", dpi=_DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.realpath(path))
    replace_file(target, lambda temporary: temporary.write_bytes(encoded.getvalue()))
    return path


def figure_of(scene: codec.Scene, description: codec.Description) -> Figure:
    """Planes, channels, charts of the levels, and the file's size by part, 1600 pixels wide.

    Of each plane the bands in nested layout, x to the right and y downward in XY: the coefficients'
    rms over channels, and the fraction of channels that the masks keep; below them what each
    channel keeps at each level, the fullest channels of a plane first. Planes beyond the first
    twelve, and such that are not :func:`drawable`, are in the charts alone.

    Args:
        scene: all that the file holds.
        description: of the same file.
    """
    columns = _by_part(drawable(scene)[:_MOST_PLANES])
    shown = {plane.name for planes in columns.values() for plane in planes}
    whole = _by_part(
        grid for grid in scene.grids if any(plane.name in shown for plane in _planes_of(grid))
    )
    # Four columns at least, so that pictures of a single part do not fill the width.
    panel = _WIDTH / max(4, 2 * len(columns))
    shapes = [_row_shape(row) for row in itertools.zip_longest(*columns.values())]
    most_rows = max((sum(len(grid.bands) for grid in grids) for grids in whole.values()), default=0)
    heights = [sum(panel * shape + 0.35 for shape in shapes) + 0.7] if columns else []
    heights += [0.9 + 0.16 * most_rows] if columns else []
    heights += [3.6, 1.75]

    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.4), layout="constrained", facecolor="white")
    figure.suptitle(headline(scene, description), fontsize=14, color=_INK)
    *pictures, charts, size = (
        figure.add_subfigure(cell)
        for cell in figure.add_gridspec(len(heights), 1, height_ratios=heights)
    )
    if pictures:
        planes, channels = pictures
        _draw_planes(planes, columns, shapes)
        _draw_channels(channels, whole)
    _draw_charts(charts, bars_of(scene, description))
    _draw_size(size, description)
    return figure


def headline(scene: codec.Scene, description: codec.Description) -> str:
    """Bytes, profile, PSNR where the file says it, and what is dropped."""
    psnr = scene.meta.get("psnr")
    facts = [f"{description.num_bytes:,} bytes", f"profile {description.profile}"]
    if isinstance(psnr, (int, float)):
        facts.append(f"PSNR {psnr:.2f} dB")
    dropped = report.dropped_fraction(description)
    facts.append(f"{dropped:.1%} of {description.num_coefficients:,} coefficients dropped")
    facts.append(f"{description.bits_per_kept:.2f} bits per kept one")
    return " · ".join(facts)


# --- planes ---------------------------------------------------------------------------------------


def drawable(scene: codec.Scene) -> list[codec.Grid]:
    """The planes that have coefficients, and bands that double level by level as wavelets' do.

    Of voxels three projections, see :func:`projections`.
    """
    planes = itertools.chain(*map(_planes_of, scene.grids))
    return [plane for plane in planes if len(plane.size) == 2 and _is_nested(plane)]


def _planes_of(grid: codec.Grid) -> list[codec.Grid]:
    return projections(grid) if len(grid.size) == 3 else [grid]


def projections(grid: codec.Grid) -> list[codec.Grid]:
    """Voxels (D, H, W) as the planes XY, XZ and YZ: what lies along the third axis as channels.

    Bands that are fine along that axis are left out.
    """
    found = []
    for axis, name in enumerate(_PLANES):
        # Of the bits d, h, w of a band's number those of the rows, of the columns, of both.
        rows, columns = (4 >> other for other in range(3) if other != axis)
        bands = []
        for band in grid.bands:
            chosen = [0] if band.level == 0 else [rows - 1, columns - 1, rows + columns - 1]
            values, mask = (
                np.moveaxis(array[:, chosen], 2 + axis, 1).reshape(
                    -1, len(chosen), *np.delete(array.shape[2:], axis)
                )
                for array in (band.values, band.mask)
            )
            bands.append(replace(band, values=values, mask=mask))
        size = tuple(length for other, length in enumerate(grid.size) if other != axis)
        found.append(codec.Grid(f"{grid.name} {name}", size, tuple(bands)))
    return found


def magnitudes(grid: codec.Grid) -> list[Float[np.ndarray, "_ _ _"]]:
    """For each level, (B, h, w): rms over channels of the coefficients, dropped ones being zero.

    They are those that are stored: details carry the factor of their level.
    """
    return [
        np.sqrt(np.square(band.values.astype(np.float64)).mean(axis=0)) * band.step
        for band in grid.bands
    ]


def kept_fractions(grid: codec.Grid) -> list[Float[np.ndarray, "_ _ _"]]:
    """For each level, (B, h, w) in [0, 1]: the share of channels that keep their coefficient."""
    return [band.mask.mean(axis=0) for band in grid.bands]


def kept_by_channel(grid: codec.Grid) -> Float[np.ndarray, "levels C"]:
    """Share of the places that each channel keeps at each level, the fullest channels first.

    A channel is one column: they are sorted by what they keep in all.
    """
    counts = np.array([band.mask.sum(axis=tuple(range(1, band.mask.ndim))) for band in grid.bands])
    places = np.array([band.mask[0].size for band in grid.bands])
    order = np.argsort(-counts.sum(axis=0), kind="stable")
    return (counts / places[:, None])[:, order]


def mosaic(levels: Sequence[Float[np.ndarray, "_ _ _"]]) -> Float[np.ndarray, "H W"]:
    """The bands of all levels as one image, as ``pywt.coeffs_to_array`` lays them out.

    The approximation is upper left. Around it, from the coarsest to the finest level, come the
    bands that are fine along the rows' axis below, along the columns' axis to the right, along both
    in the corner. One level alone is an image already: an untransformed plane, or its DCT.

    Args:
        levels: for each level (B, h, w), B = 1 at level 0 and 3 at others.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    image = levels[0][0]
    for horizontal, vertical, diagonal in levels[1:]:
        image = np.block([[image, vertical], [horizontal, diagonal]])
    return image


def borders(grid: codec.Grid) -> Float[np.ndarray, "_ 2 2"]:
    """Lines between the bands of a mosaic: ends (x, y), pixel centres being whole numbers."""
    lines = []
    for band in grid.bands[1:]:
        h, w = band.values.shape[2:]
        lines.append([[w - 0.5, -0.5], [w - 0.5, 2 * h - 0.5]])
        lines.append([[-0.5, h - 0.5], [2 * w - 0.5, h - 0.5]])
    return np.array(lines, np.float64).reshape(-1, 2, 2)


def log_range(images: Iterable[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest magnitude to tell apart, 0 < lowest < highest: four decades at most."""
    positive = [image[image > 0] for image in images]
    flat = np.concatenate(positive) if positive else np.zeros(0)
    if not flat.size:
        return 0.1, 1.0
    low, high = float(flat.min()), float(flat.max())
    return max(min(low, high / 10), high * 10.0**-_DECADES), high


def _is_nested(grid: codec.Grid) -> bool:
    if not grid.bands or not grid.bands[0].values.size:
        return False
    (h, w), *details = (band.values.shape[2:] for band in grid.bands)
    return details == [(h << n, w << n) for n in range(len(details))]


def _by_part(grids: Iterable[codec.Grid]) -> dict[str, list[codec.Grid]]:
    columns: dict[str, list[codec.Grid]] = {}
    for grid in grids:
        columns.setdefault(part_of(grid), []).append(grid)
    return columns


def _row_shape(row: Iterable[codec.Grid | None]) -> float:
    """Height over width of the pictures in a row, within what leaves them legible."""
    # The finest bands have the shape of the mosaic, but for one level alone, which is the mosaic.
    sizes = [grid.bands[-1].values.shape[2:] for grid in row if grid is not None]
    return min(max(0.3, *(h / w for h, w in sizes)), 1.4)


def _draw_planes(
    figure: SubFigure, columns: dict[str, list[codec.Grid]], shapes: Sequence[float]
) -> None:
    """Two columns for each part, magnitudes and masks, with a scale below each."""
    cells = figure.subplots(len(shapes), 2 * len(columns), squeeze=False, height_ratios=shapes)
    for axes in cells.flat:
        axes.set_axis_off()
    for number, (part, grids) in enumerate(columns.items()):
        left, right = cells[:, 2 * number], cells[:, 2 * number + 1]
        # Those of projections are different in number at every level.
        num_channels = {band.values.shape[0] for band in grids[0].bands}
        of_channels = f"{max(num_channels)} channel{'s' * (num_channels != {1})}"
        if len(num_channels) > 1:
            of_channels = "all along the third axis"
        images = [mosaic(magnitudes(grid)) for grid in grids]
        norm = LogNorm(*log_range(images))
        for axes, grid, image in zip(left, grids, images, strict=False):
            _draw_mosaic(axes, grid, image, norm, _MAGNITUDES)
            _name_levels(axes, grid)
            axes.set_title(f"{title_of(grid)}, coefficients", fontsize=11, color=_INK)
        scale = _add_scale(figure, left, f"{_plain(part)}: rms of {of_channels} (black: 0)")
        scale.set_major_locator(LogLocator(subs=(1, 3)))
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
        scale.set_minor_locator(NullLocator())

        # Most places keep few channels: the root shows them, too.
        norm = PowerNorm(0.5, 0, 1)
        for axes, grid in zip(right, grids, strict=False):
            _draw_mosaic(axes, grid, mosaic(kept_fractions(grid)), norm, _MASKS)
            kept = sum(int(band.mask.sum()) for band in grid.bands)
            kept /= sum(band.mask.size for band in grid.bands)
            axes.set_title(f"{title_of(grid)}, {kept:.1%} kept", fontsize=11, color=_INK)
        scale = _add_scale(figure, right, f"{_plain(part)}: fraction of {of_channels} kept")
        scale.set_major_locator(FixedLocator([0, 0.05, 0.2, 0.5, 1]))
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_channels(figure: SubFigure, columns: dict[str, list[codec.Grid]]) -> None:
    """For each part, a row for each level of each grid, and a column for each channel."""
    cells = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, (part, grids) in zip(cells, columns.items(), strict=True):
        kept = [kept_by_channel(grid) for grid in grids]
        image = np.concatenate(kept)
        axes.imshow(image, norm=PowerNorm(0.5, 0, 1), cmap=_MASKS, aspect="auto")
        starts = np.cumsum([0, *(len(levels) for levels in kept)])
        for start in starts[1:-1]:
            axes.axhline(start - 0.5, color="white", linewidth=1)
        names = [title_of(grid).removeprefix(f"{_plain(part)} ") for grid in grids]
        labels = [
            f"{name if level == 0 else ''}  {level}"
            for name, levels in zip(names, kept, strict=True)
            for level in range(len(levels))
        ]
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(
            f"{_plain(part)}: fraction kept by each channel (sorted) at each level",
            fontsize=11,
            color=_INK,
        )


def _draw_mosaic(
    axes: Axes,
    grid: codec.Grid,
    image: Float[np.ndarray, "H W"],
    norm: Normalize,
    colours: Colormap,
) -> None:
    axes.imshow(image, norm=norm, cmap=colours)
    lines = LineCollection(list(borders(grid)), colors="white", linewidths=0.6, alpha=0.7)
    axes.add_collection(lines, autolim=False)


def _name_levels(axes: Axes, grid: codec.Grid) -> None:
    """The number of each level, where it is not too small for one, in its lower right corner."""
    finest = grid.bands[-1].values.shape[-1]
    for band in grid.bands[1:]:
        h, w = band.values.shape[2:]
        if w * 8 >= finest:
            end = axes.text(2 * w - 1, 2 * h - 1, str(band.level), fontsize=9, color="white")
            end.set(horizontalalignment="right", verticalalignment="bottom")
            end.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _add_scale(figure: SubFigure, cells: Iterable[Axes], label: str) -> Axis:
    """A colour bar below a column, for all its pictures; the first has one."""
    column = list(cells)
    bar = figure.colorbar(
        column[0].images[0], ax=column, location="bottom", aspect=35, shrink=0.9, pad=0.01
    )
    bar.set_label(label, fontsize=10, color=_INK)
    bar.ax.tick_params(labelsize=9, colors=_INK)
    bar.outline.set_edgecolor(_FRAME)  # pyright: ignore[reportCallIssue]
    return bar.ax.xaxis


# --- charts ---------------------------------------------------------------------------------------


def part_of(grid: codec.Grid) -> str:
    """``density`` of ``density_planes.0``."""
    name = grid.name.partition(".")[0]
    for kind in ("_planes", "_lines", "_voxels"):
        name = name.removesuffix(kind)
    return name


def title_of(grid: codec.Grid) -> str:
    """``density XY`` of ``density_planes.0``; other names as they are."""
    names = {f"{part_of(grid)}_planes.{i}": plane for i, plane in enumerate(_PLANES)}
    names |= {f"{part_of(grid)}_voxels.0 {plane}": plane for plane in _PLANES}
    names[f"{part_of(grid)}_voxels.0"] = "voxels"
    title = f"{part_of(grid)} {names[grid.name]}" if grid.name in names else grid.name
    return _plain(title)


def bars_of(scene: codec.Scene, description: codec.Description) -> list[Bar]:
    """What the coefficients of each level and part cost, levels first, coarse to fine, lines last.

    All bars of a level, and of the lines in it, together are the bits of the level's sections. The
    profile ``range`` has one, and :func:`masked_wavelet_codec.measure` says where in it the parts
    begin; models, some hundred bytes in all, count for the last part. The profile ``paper`` packs
    the parts of a level, lines too, together, so there they are not told apart.

    Args:
        scene: all that the file holds.
        description: of the same file.
    """
    bars = []
    for level in range(max((len(grid.bands) for grid in scene.grids), default=0)):
        names = [f"{kind}[{level}]" for kind in ("coefficients", "mask", "values")]
        num_bytes = sum(s.num_bytes for s in description.sections if s.name in names)
        split = _split_level if description.profile == "range" else _whole_level
        bars += split(scene.grids, level, 8.0 * num_bytes)
    return sorted(bars, key=lambda bar: bar.group.startswith("lines"))


def _split_level(grids: Sequence[codec.Grid], level: int, bits: float) -> list[Bar]:
    """The bars of a level of ``bits``, in the order of the file."""

    def key(number: int) -> tuple[str, str]:
        grid = grids[number]
        return (_lines(level) if len(grid.size) == 1 else f"level {level}"), part_of(grid)

    def cost(stop: int) -> float:
        """Bits at this level of the grids before ``stop``, which are coded knowing no later one."""

        def total(num_levels: int) -> float:
            first = [replace(grid, bands=grid.bands[:num_levels]) for grid in grids[:stop]]
            return codec.measure(first).bits

        return total(level + 1) - total(level)

    there = [number for number, grid in enumerate(grids) if level < len(grid.bands)]
    bands: dict[tuple[str, str], list[codec.Band]] = defaultdict(list)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    start = 0.0
    for which, run in itertools.groupby(there, key):
        *_, last = numbers = list(run)
        end = bits if last == there[-1] else cost(last + 1)
        bands[which] += [grids[number].bands[level] for number in numbers]
        spent[which] += end - start
        start = end
    return [_bar(*which, bands[which], spent[which]) for which in bands]


def _whole_level(grids: Sequence[codec.Grid], level: int, bits: float) -> list[Bar]:
    """The one bar of a level of ``bits``."""
    there = [grid for grid in grids if level < len(grid.bands)]
    has_lines = any(len(grid.size) == 1 for grid in there)
    group = f"level {level} and lines" if has_lines else f"level {level}"
    return [_bar(group, "all", [grid.bands[level] for grid in there], bits)]


def _lines(level: int) -> str:
    """Ours have one level."""
    return f"lines, level {level}" if level else "lines"


def _bar(group: str, part: str, bands: Sequence[codec.Band], bits: float) -> Bar:
    num_kept = sum(int(band.mask.sum()) for band in bands)
    return Bar(group, part, sum(band.mask.size for band in bands), num_kept, bits)


def _draw_charts(figure: SubFigure, bars: Sequence[Bar]) -> None:
    left, right = figure.subplots(1, 2)
    _draw_bars(left, bars, lambda bar: bar.num_kept, lambda bar: f"{bar.kept_fraction:.1%}")
    left.set_title("kept coefficients, and their share of all", fontsize=11, color=_INK)
    _draw_bars(right, bars, lambda bar: bar.bits / 8, lambda bar: f"{bar.bits_per_kept:.1f}")
    right.set_title(
        "bytes of masks and values, and bits per kept coefficient", fontsize=11, color=_INK
    )
    if bars:
        left.legend(frameon=False, fontsize=10, labelcolor=_INK)


def _draw_bars(
    axes: Axes, bars: Sequence[Bar], height: Callable[[Bar], float], label: Callable[[Bar], str]
) -> None:
    """Groups side by side, the parts of each next to each other, with a label on every bar."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    parts = list(dict.fromkeys(bar.part for bar in bars))
    width = 0.84 / max(len(parts), 1)
    for number, part in enumerate(parts):
        own = [bar for bar in bars if bar.part == part]
        offset = (number - (len(parts) - 1) / 2) * width
        drawn = axes.bar(
            [groups.index(bar.group) + offset for bar in own],
            [height(bar) for bar in own],
            width,
            color=_PARTS[number % len(_PARTS)],
            label=_plain(part),
        )
        axes.bar_label(drawn, [label(bar) for bar in own], fontsize=9, color=_INK, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(0, 1.15 * max(1.0, *map(height, bars)) if bars else 1.0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(labelsize=10, colors=_INK)
    axes.spines[:].set_color(_FRAME)


def _draw_size(figure: SubFigure, description: codec.Description) -> None:
    """One bar of the whole file, cut by part, and a legend with bytes."""
    axes = figure.subplots()
    start = 0
    for part, num_bytes in description.parts.items():
        share = num_bytes / description.num_bytes
        if not num_bytes:
            continue
        label = f"{part} {num_bytes:,} bytes ({share:.1%})"
        axes.barh(0, num_bytes, left=start, color=_SIZES[part], label=label)
        if share > 0.07:  # else the text is wider
            axes.text(
                start + num_bytes / 2, 0, part, color="white", fontsize=11, ha="center", va="center"
            )
        start += num_bytes
    axes.set_xlim(0, description.num_bytes)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=10, colors=_INK)
    axes.spines[:].set_color(_FRAME)
    axes.set_title(f"size by part, {description.num_bytes:,} bytes", fontsize=11, color=_INK)
    num_parts = len(axes.patches)
    num_columns = num_parts if num_parts < 6 else -(-num_parts // 2)
    figure.legend(loc="outside lower center", ncols=num_columns, frameon=False, fontsize=10)


def _plain(text: str) -> str:
    """For matplotlib, which would take what is between two dollar signs for a formula."""
    return text.replace("$", r"\$")
