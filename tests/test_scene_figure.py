"""The picture of a file: where every coefficient shows, and that the charts add up to the file."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import warnings

import numpy as np
import pytest
import pywt
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from test_codec_scenes import make_band, make_line, make_plane, make_scene

import masked_wavelet_codec as codec
from masked_wavelet_nerf import scene_figure
from masked_wavelet_nerf.wavelet import make_transform


def describe(scene: codec.Scene, profile: str = "range") -> codec.Description:
    return codec.describe(codec.encode(scene, profile))


def grids_of(
    channels: tuple[int, int] = (3, 5), size: tuple[int, int] = (13, 21), levels: int = 2
) -> tuple[codec.Grid, ...]:
    """Three planes and lines of density, and of appearance, as training stores them."""
    grids = []
    for part, count in zip(("density", "appearance"), channels, strict=True):
        for i in range(3):
            name = f"{part}_planes.{i}"
            grids.append(make_plane(name, size, count, levels, residue=3 + i))
        grids += [make_line(f"{part}_lines.{i}", 17 + i, count) for i in range(3)]
    return tuple(grids)


def planes_alone(**kwargs) -> tuple[codec.Grid, ...]:
    return tuple(grid for grid in grids_of(**kwargs) if len(grid.size) == 2)


def alike() -> codec.Grid:
    """A plane of magnitudes between 0.1875 and 9: less than two decades."""
    values = np.arange(1, 49, dtype=np.int16).reshape(1, 1, 6, 8)
    return codec.Grid("density_planes.0", (6, 8), (codec.Band(0, values, values > 0, 0.1875),))


GRIDS = {
    "planes and lines": grids_of,
    "planes and lines of as many channels": lambda: grids_of((4, 4)),
    "tri-plane": planes_alone,
    "levels 0": lambda: grids_of(levels=0),
    "other names": lambda: (make_plane("$a", (9, 30), 2, 1), make_plane("b$_x.7", (30, 9), 1, 3)),
    "of like magnitudes": lambda: (alike(), make_plane("appearance_planes.0", (6, 8), 1, 0)),
    "voxels": lambda: (
        make_plane("density_voxels.0", (9, 8, 13), 1, 2),
        make_plane("appearance_voxels.0", (9, 8, 13), 4, 2),
    ),
    "lines alone": lambda: grids_of()[3:6],
    "nothing": lambda: (),
    "nothing kept": lambda: (
        make_plane("density_planes.0", (8, 8), 2, 1, residue=0),
        make_line("density_lines.0", 8, 2, residue=0),
    ),
}


# --- planes ---------------------------------------------------------------------------------------


def blank(size: tuple[int, int] = (13, 9)) -> codec.Grid:
    """3 channels, 2 levels: bands of 4 × 3, 4 × 3 and 8 × 6; nothing is kept."""
    return make_plane("density_planes.0", size, 3, levels=2, residue=0)


@pytest.mark.parametrize(
    ("level", "band", "place", "pixel"),
    [
        (0, 0, (0, 0), (0, 0)),
        (0, 0, (1, 2), (1, 2)),
        (1, 0, (1, 2), (5, 2)),
        (1, 1, (1, 2), (1, 5)),
        (1, 2, (3, 0), (7, 3)),
        (2, 0, (7, 5), (15, 5)),
        (2, 1, (0, 0), (0, 6)),
        (2, 2, (2, 3), (10, 9)),
    ],
)
def test_a_coefficient_shows_at_the_pixel_of_its_band(level, band, place, pixel):
    grid = blank()
    stored = grid.bands[level]
    stored.values[(1, band, *place)] = -700
    stored.mask[(slice(2), band, *place)] = True  # that of channel 0 is zero, and kept
    found = scene_figure.mosaic(scene_figure.magnitudes(grid))
    expected = np.zeros((16, 12))
    expected[pixel] = 700 * stored.step / np.sqrt(3)
    assert stored.step > 0
    np.testing.assert_allclose(found, expected)
    kept = scene_figure.mosaic(scene_figure.kept_fractions(grid))
    np.testing.assert_allclose(kept, np.where(expected > 0, 2 / 3, 0.0))


def test_the_layout_is_that_of_pywavelets():
    plane = np.random.default_rng(0).normal(size=(32, 48))
    first, *details = pywt.wavedec2(plane, "bior4.4", mode="periodization", level=3)
    expected, _ = pywt.coeffs_to_array([first, *details])
    found = scene_figure.mosaic([first[None], *(np.stack(bands) for bands in details)])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_fine_along_an_axis_of_a_plane_shows_towards_the_end_of_that_axis(axis):
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    plane = (signs[:, None] if axis == 0 else signs[None]).expand(1, 8, 8).contiguous()
    bands = make_transform("wavelet", wavelet="haar", num_levels=1).forward(plane)
    image = scene_figure.mosaic([bands.approximation.numpy(), bands.details[0].numpy()[0]])
    halves = np.abs(image).reshape(2, 4, 2, 4).sum(axis=(1, 3))
    expected = np.zeros((2, 2))
    expected[(1, 0) if axis == 0 else (0, 1)] = halves.sum()
    np.testing.assert_allclose(halves, expected, atol=1e-5)
    assert halves.sum() > 1


def test_bands_that_do_not_fit_make_no_mosaic():
    with pytest.raises(ValueError, match="dimension"):
        scene_figure.mosaic([np.zeros((1, 4, 4)), np.zeros((3, 5, 4))])


def test_a_plane_without_levels_is_its_own_picture():
    """Untransformed, its DCT, or a wavelet's levels 0."""
    grid = make_plane("density_planes.0", (13, 9), 3, levels=0)
    (band,) = grid.bands
    floats = band.values[:, 0] * band.step
    image = scene_figure.mosaic(scene_figure.magnitudes(grid))
    np.testing.assert_allclose(image, np.sqrt((floats**2).mean(axis=0)))
    kept = scene_figure.mosaic(scene_figure.kept_fractions(grid))
    np.testing.assert_allclose(kept, band.mask[:, 0].sum(axis=0) / 3)
    assert scene_figure.borders(grid).shape == (0, 2, 2)
    assert scene_figure.drawable(make_scene(grids=(grid,))) == [grid]


def test_channels_are_sorted_by_what_they_keep_in_all():
    masks = [np.zeros((3, 1, 2, 2), bool), np.zeros((3, 3, 2, 2), bool)]
    masks[0][0, 0, 0] = True  # channel 0: 2 of 4 at level 0
    masks[1][1, :, 1, 1] = True  # channel 1: 3 of 12 at level 1
    masks[1][2] = True  # channel 2: all of level 1
    bands = [codec.Band(n, mask.astype(np.int16), mask, 1.0) for n, mask in enumerate(masks)]
    found = scene_figure.kept_by_channel(codec.Grid("a", (4, 4), tuple(bands)))
    assert found.tolist() == [[0, 0, 0.5], [1, 0.25, 0]]


def test_lines_between_the_bands():
    expected = [
        [[2.5, -0.5], [2.5, 7.5]],
        [[-0.5, 3.5], [5.5, 3.5]],
        [[5.5, -0.5], [5.5, 15.5]],
        [[-0.5, 7.5], [11.5, 7.5]],
    ]
    np.testing.assert_array_equal(scene_figure.borders(blank()), expected)


def test_planes_whose_bands_do_not_nest_have_no_picture():
    good = blank((26, 9))
    odd = codec.Grid("odd", (4, 4), (make_band(0, (2, 1, 4, 4)), make_band(1, (2, 3, 4, 5))))
    late = codec.Grid("late", (4, 4), (*blank((16, 12)).bands[:2], make_band(2, (3, 3, 4, 3))))
    hollow = codec.Grid("hollow", (4, 4), (make_band(0, (2, 1, 0, 4)),))
    bare = codec.Grid("bare", (4, 4), ())
    line = make_line("density_lines.0", 4, 2)
    scene = make_scene(grids=(odd, good, late, hollow, bare, line))
    assert [grid.name for grid in scene_figure.drawable(scene)] == [good.name]
    # Nor do they keep the others from theirs, nor are they left out of the counts.
    description = describe(scene)
    assert len(pictures(scene_figure.figure_of(scene, description))) == 2 + 1
    bars = scene_figure.bars_of(scene, description)
    assert sum(bar.num_coefficients for bar in bars) == description.num_coefficients


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([[0.0, 0.5, 2.0], [40.0]], (0.5, 40.0)),
        ([[0.0, 1e-9, 2.0]], (2e-4, 2.0)),  # four decades
        ([[3.0, 3.0]], (0.3, 3.0)),
        ([[0.0, 0.0]], (0.1, 1.0)),
        ([], (0.1, 1.0)),
    ],
)
def test_range_of_magnitudes(images, expected):
    assert scene_figure.log_range(map(np.array, images)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "part", "title"),
    [
        ("density_planes.0", "density", "density XY"),
        ("appearance_planes.1", "appearance", "appearance XZ"),
        ("density_planes.2", "density", "density YZ"),
        ("density_planes.3", "density", "density_planes.3"),
        ("density_lines.0", "density", "density_lines.0"),
        ("a $100 plane", "a $100 plane", r"a \$100 plane"),
    ],
)
def test_names(name, part, title):
    grid = make_plane(name, (4, 4), 1, 0)
    assert scene_figure.part_of(grid) == part
    assert scene_figure.title_of(grid) == title


# --- charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["range", "paper"])
@pytest.mark.parametrize("grids", GRIDS)
def test_bars_add_up_to_the_file(grids, profile):
    scene = make_scene(grids=GRIDS[grids]())
    description = describe(scene, profile)
    bars = scene_figure.bars_of(scene, description)
    assert sum(bar.num_kept for bar in bars) == description.num_kept
    assert sum(bar.num_coefficients for bar in bars) == description.num_coefficients
    num_bytes = sum(description.parts[part] for part in ("coefficients", "mask", "values"))
    assert sum(bar.bits for bar in bars) == pytest.approx(8 * num_bytes, rel=1e-12, abs=1e-9)
    assert len({bar[:2] for bar in bars}) == len(bars)
    assert all(bar.bits >= 0 for bar in bars)


def test_bars_of_a_scene_with_lines():
    scene = make_scene(grids=grids_of())
    description = describe(scene)
    bars = scene_figure.bars_of(scene, description)
    groups = ["level 0", "level 1", "level 2", "lines"]
    parts = ["density", "appearance"]
    assert [bar[:2] for bar in bars] == [(group, part) for group in groups for part in parts]
    for bar in bars:
        own = [
            level
            for level in description.levels
            if level.grid.startswith(bar.part)
            and ("lines" if "_lines." in level.grid else f"level {level.level}") == bar.group
        ]
        assert bar.num_kept == sum(level.num_kept for level in own) > 0
        assert bar.num_coefficients == sum(level.num_coefficients for level in own)
        assert bar.kept_fraction == bar.num_kept / bar.num_coefficients
        assert bar.bits_per_kept == bar.bits / bar.num_kept
    sizes = {section.name: section.num_bytes for section in description.sections}
    for level in range(3):
        there = [f"level {level}", *(["lines"] if level == 0 else [])]
        own = [bar.bits for bar in bars if bar.group in there]
        assert sum(own) == pytest.approx(8 * sizes[f"coefficients[{level}]"])


def test_parts_cost_what_the_codec_measures():
    """Density comes first in the file and knows nothing of appearance."""
    grids = grids_of()
    scene = make_scene(grids=grids)
    bars = {bar[:2]: bar.bits for bar in scene_figure.bars_of(scene, describe(scene))}
    of_density = sum(bits for (_, part), bits in bars.items() if part == "density")
    assert of_density == pytest.approx(codec.measure(grids[:6]).bits)
    assert bars["lines", "density"] == pytest.approx(codec.measure(grids[3:6]).bits)
    planes = [dataclasses.replace(grid, bands=grid.bands[:1]) for grid in grids[:3]]
    assert bars["level 0", "density"] == pytest.approx(codec.measure(planes).bits)
    # The rest is appearance, with the models.
    rest = codec.measure(grids).bits - of_density
    of_appearance = sum(bits for (_, part), bits in bars.items() if part == "appearance")
    assert rest < of_appearance < rest + 8 * 600


def test_bars_of_the_profile_paper_are_sections():
    scene = make_scene()
    description = describe(scene, "paper")
    bars = scene_figure.bars_of(scene, description)
    assert [bar[:2] for bar in bars] == [
        ("level 0 and lines", "all"),
        ("level 1", "all"),
        ("level 2", "all"),
    ]
    sizes = {section.name: section.num_bytes for section in description.sections}
    for level, bar in enumerate(bars):
        assert bar.bits == 8 * (sizes[f"mask[{level}]"] + sizes[f"values[{level}]"])
        own = [info for info in description.levels if info.level == level]
        assert bar.num_kept == sum(info.num_kept for info in own)


def test_parts_that_take_turns_have_one_bar_a_level():
    grids = [make_plane(name, (8, 8), 2, 1) for name in ("a_planes.0", "b_planes.0", "a_planes.1")]
    scene = make_scene(grids=tuple(grids))
    description = describe(scene)
    bars = scene_figure.bars_of(scene, description)
    assert [bar[:2] for bar in bars] == [(f"level {n}", part) for n in (0, 1) for part in "ab"]
    coarse = [dataclasses.replace(grid, bands=grid.bands[:1]) for grid in grids]
    of_two = codec.measure(coarse[:2]).bits - codec.measure(coarse[:1]).bits
    assert bars[1].bits == pytest.approx(of_two)
    assert sum(bar.bits for bar in bars) == pytest.approx(8 * description.parts["coefficients"])
    assert bars[0].num_kept == sum(int(grid.bands[0].mask.sum()) for grid in grids[::2])


def test_levels_that_a_prefix_lacks_hold_and_cost_nothing():
    data = codec.encode(make_scene(grids=grids_of()))
    prefix = data[: codec.describe(data).prefixes[1]]
    bars = scene_figure.bars_of(codec.decode(prefix), codec.describe(prefix))
    whole = scene_figure.bars_of(codec.decode(data), codec.describe(data))
    for bar, full in zip(bars, whole, strict=True):
        if bar.group == "level 2":
            assert bar == full._replace(num_kept=0, bits=0.0) and bar.num_coefficients
            assert bar.bits_per_kept == 0
        else:
            assert bar == full


def test_headline():
    scene = make_scene()
    description = describe(scene)
    dropped = 1 - description.num_kept / description.num_coefficients
    found = scene_figure.headline(scene, description)
    assert found == (
        f"{description.num_bytes:,} bytes · profile range · PSNR 32.17 dB · {dropped:.1%} of 849 "
        f"coefficients dropped · {description.bits_per_kept:.2f} bits per kept one"
    )
    for meta in ({}, {"psnr": None}, {"psnr": "fine"}):
        found = scene_figure.headline(dataclasses.replace(scene, meta=meta), description)
        assert "PSNR" not in found and "profile range · " in found


# --- the picture ----------------------------------------------------------------------------------


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def heights_of(figure: Figure, title: str) -> list[float]:
    """Of all bars in the chart that is so called, part by part."""
    (axes,) = (axes for axes in figure.axes if title in axes.get_title())
    return [bar.get_height() for part in axes.containers for bar in part]


def shown_texts(figure: Figure, monkeypatch) -> list[Text]:
    """Those that are drawn, which labels of ticks beyond an axis are not."""
    found, original = [], Text.draw

    def record(text: Text, *args, **kwargs):
        if text.get_text() and text.get_visible():
            found.append(text)
        original(text, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", record)
    figure.draw_without_rendering()
    return found


def test_what_is_drawn_is_what_the_scene_holds():
    scene = make_scene(grids=grids_of())
    before = copy.deepcopy(scene)
    description = describe(scene)
    figure = scene_figure.figure_of(scene, description)
    assert codec.equal(scene, before)
    planes = scene_figure.drawable(scene)
    assert len(planes) == 6
    # Row by row: XY, XZ, YZ of density, and beside them of appearance.
    expected = []
    for row in range(3):
        for grid in (planes[row], planes[3 + row]):
            kinds = scene_figure.magnitudes(grid), scene_figure.kept_fractions(grid)
            expected += [scene_figure.mosaic(levels) for levels in kinds]
    for part in (planes[:3], planes[3:]):
        expected.append(np.concatenate([scene_figure.kept_by_channel(grid) for grid in part]))
    for found, image in zip(pictures(figure), expected, strict=True):
        np.testing.assert_allclose(found, image)
    bars = scene_figure.bars_of(scene, description)
    bars = [bar for part in ("density", "appearance") for bar in bars if bar.part == part]
    assert heights_of(figure, "kept coefficients") == [bar.num_kept for bar in bars]
    assert heights_of(figure, "bytes of masks") == [bar.bits / 8 for bar in bars]
    (size,) = (axes for axes in figure.axes if "size by part" in axes.get_title())
    parts = [(part.get_x(), part.get_width()) for bar in size.containers for part in bar]
    widths = [num_bytes for num_bytes in description.parts.values() if num_bytes]
    assert [width for _, width in parts] == widths
    assert [start for start, _ in parts] == [sum(widths[:n]) for n in range(len(widths))]
    titles = [axes.get_title() for axes in figure.axes if axes.images][:4]
    kept = [b.mask.sum() for b in planes[0].bands]
    share = sum(kept) / sum(b.mask.size for b in planes[0].bands)
    assert titles[:2] == ["density XY, coefficients", f"density XY, {share:.1%} kept"]
    assert titles[2] == "appearance XY, coefficients"


@pytest.mark.parametrize(
    ("grids", "profile"),
    [
        ("planes and lines", "range"),
        ("planes and lines", "paper"),
        ("other names", "range"),
        ("of like magnitudes", "range"),
        ("voxels", "range"),
        ("nothing", "range"),
    ],
)
def test_texts_are_within_the_picture_and_apart(grids, profile, monkeypatch):
    scene = make_scene(grids=GRIDS[grids]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = scene_figure.figure_of(scene, describe(scene, profile))
        texts = shown_texts(figure, monkeypatch)
    assert len(texts) > 10
    boxes = [text.get_window_extent() for text in texts]
    for n, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        for other, beside in zip(texts[:n], boxes[:n], strict=True):
            assert not box.overlaps(beside), (text, other)


@pytest.mark.parametrize("grids", ["tri-plane", "nothing"])
def test_the_picture_is_written(grids, tmp_path):
    scene = make_scene(grids=GRIDS[grids]())
    path = tmp_path / "new" / "picture.png"
    assert scene_figure.draw(path, scene, describe(scene)) == path
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1600
        assert 1500 < picture.height < 2000 if scene.grids else 500 < picture.height < 700


def test_only_so_many_planes_are_drawn():
    grids = tuple(make_plane(f"p{n % 2}.{n}", (4, 4), 1, 0) for n in range(20))
    scene = make_scene(grids=grids)
    assert len(pictures(scene_figure.figure_of(scene, describe(scene)))) == 24 + 2


def test_the_colours_span_what_is_there():
    scene = make_scene(grids=grids_of())
    figure = scene_figure.figure_of(scene, describe(scene))
    images = [axes.images[0] for axes in figure.axes if axes.images][:12]
    for column, part in ((0, "density"), (2, "appearance")):
        planes = [g for g in scene_figure.drawable(scene) if g.name.startswith(part)]
        mosaics = [scene_figure.mosaic(scene_figure.magnitudes(grid)) for grid in planes]
        for image in images[column::4]:
            assert image.get_clim() == scene_figure.log_range(mosaics)
        # Of planes that differ, so each on its own would have another.
        assert scene_figure.log_range(mosaics) != scene_figure.log_range(mosaics[:1])
        assert all(image.get_clim() == (0, 1) for image in images[column + 1 :: 4])


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    scene = make_scene()
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        scene_figure.draw(path, scene, describe(scene))
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_picture_stays_one(tmp_path):
    scene = make_scene()
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "a.png", tmp_path / "b.png"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert scene_figure.draw(link, scene, describe(scene)) == link
    assert link.is_symlink()
    assert target.read_bytes().startswith(b"\x89PNG")


def test_it_needs_neither_torch_nor_nerfstudio():
    code = (
        "import sys, masked_wavelet_nerf.scene_figure; "
        "print({'torch', 'nerfstudio', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
