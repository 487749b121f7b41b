"""Compiled loops of look-ups, encoding and marching: values, memory beside them, the switch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from guards import assert_guards, channels_innermost, guarded

from masked_wavelet_nerf import native, native_kernels
from masked_wavelet_nerf.field import frequency_encoding
from masked_wavelet_nerf.planes import _NATIVE_AXES, FactorisedGrid, SpatialGrid
from masked_wavelet_nerf.sampling import OccupancyGrid
from masked_wavelet_nerf.wavelet import WaveletTransform, make_transform

CHANNELS = [1, 2, 3, 8, 16, 48]
# Voxels along x, y, z.
RESOLUTIONS = [(7, 10, 13), (2, 5, 3), (2, 2, 2)]


pytestmark = pytest.mark.usefixtures("small_work_is_split_too", "one_thread", "seed")


def factors(num_channels: int, resolution: tuple[int, int, int]) -> SpatialGrid:
    """Random planes and lines, contiguous."""
    x, y, z = resolution
    planes = [torch.randn(num_channels, *size) for size in ((y, x), (z, x), (z, y))]
    lines = [torch.randn(num_channels, n) for n in (z, y, x)]
    return SpatialGrid(tuple(planes), tuple(lines))


def map_factors(function, spatial: SpatialGrid) -> SpatialGrid:
    return SpatialGrid(*(tuple(map(function, kind)) for kind in spatial))


def random_points(num: int) -> torch.Tensor:
    """Inside, outside, and exactly on borders, corners and texels."""
    points = torch.rand(num, 3) * 3 - 1.5
    exact = torch.tensor([-1.0, 1.0, 0.0, -1.25, 2.0])
    where = torch.rand(num, 3) < 0.3
    return torch.where(where, exact[torch.randint(5, (num, 3))], points)


def grid_for(spatial: SpatialGrid) -> FactorisedGrid:
    num_channels = spatial.planes[0].shape[0]
    return FactorisedGrid(num_channels, (2, 2, 2), make_transform("identity"), bits=None)


def evaluate(spatial: SpatialGrid, points: torch.Tensor, summed: bool, gradient: torch.Tensor):
    """Features, and the gradients of planes and lines, through the grid's own code."""
    leaves = map_factors(lambda t: t.detach().requires_grad_(), spatial)
    grid = grid_for(spatial)
    function = grid.summed_features if summed else grid.features
    found = function(leaves, points)
    gradients = torch.autograd.grad(found, [*leaves.planes, *leaves.lines], gradient)
    return found.detach(), gradients


def upstream(num: int, num_channels: int, summed: bool) -> torch.Tensor:
    return torch.randn(num) if summed else torch.randn(num, 3 * num_channels)


# --- features


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("num_channels", CHANNELS)
@pytest.mark.parametrize("summed", [False, True])
def test_features_and_gradients_equal_plain_torch(summed, num_channels, resolution):
    spatial, points = factors(num_channels, resolution), random_points(300)
    gradient = upstream(300, num_channels, summed)
    found, gradients = evaluate(spatial, points, summed, gradient)
    with native.disabled():
        expected, expected_gradients = evaluate(
            map_factors(torch.Tensor.double, spatial), points.double(), summed, gradient.double()
        )
    scale = float(expected.abs().max())
    assert scale > 0.5
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5 * scale)
    assert found.shape == ((300,) if summed else (300, 3 * num_channels))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("summed", [False, True])
def test_the_grid_uses_the_loops(summed, monkeypatch):
    calls = []
    original = native.features
    monkeypatch.setattr(native, "features", lambda *a: calls.append(a[-1]) or original(*a))
    spatial = factors(3, (4, 5, 6))
    evaluate(spatial, random_points(5), summed, upstream(5, 3, summed))
    assert calls == [summed]
    with native.disabled():
        evaluate(spatial, random_points(5), summed, upstream(5, 3, summed))
    doubles = map_factors(torch.Tensor.double, spatial)
    evaluate(doubles, random_points(5).double(), summed, upstream(5, 3, summed).double())
    assert calls == [summed]


@pytest.mark.parametrize("summed", [False, True])
def test_texels_are_met_exactly(summed):
    """Corners and every node."""
    spatial = factors(2, (5, 3, 9))
    axes = [torch.linspace(-1, 1, n) for n in (5, 3, 9)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    i, j, k = (
        t.flatten() for t in torch.meshgrid(*(torch.arange(n) for n in (5, 3, 9)), indexing="ij")
    )
    (xy, xz, yz), (z, y, x) = spatial.planes, spatial.lines
    parts = [xy[:, j, i] * z[:, k], xz[:, k, i] * y[:, j], yz[:, k, j] * x[:, i]]
    expected = torch.cat(parts).T
    grid = grid_for(spatial)
    if summed:
        torch.testing.assert_close(grid.summed_features(spatial, points), expected.sum(dim=1))
    else:
        torch.testing.assert_close(grid.features(spatial, points), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("summed", [False, True])
def test_no_points(summed):
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        spatial = factors(4, (7, 10, 13))
        found, gradients = evaluate(spatial, torch.zeros(0, 3), summed, upstream(0, 4, summed))
        assert found.shape == ((0,) if summed else (0, 12))
        for a, b in zip(gradients, [*spatial.planes, *spatial.lines], strict=True):
            assert a.shape == b.shape and (a == 0).all()


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with gaps, NaN in them."""
    result = torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0]
    assert tensor.numel() < 2 or not result.is_contiguous()
    return result


@pytest.mark.parametrize("num_channels", [1, 3, 16])
@pytest.mark.parametrize("summed", [False, True])
def test_layouts_do_not_matter(summed, num_channels):
    spatial, points = factors(num_channels, (7, 10, 13)), random_points(200)
    gradient = upstream(200, num_channels, summed)
    expected, expected_gradients = evaluate(spatial, points, summed, gradient)
    flipped = [t.flip(0).contiguous().flip(0) for t in (points, gradient)]
    variants = [
        (map_factors(channels_innermost, spatial), points, gradient),
        (map_factors(strided, spatial), strided(points), strided(gradient)),
        (map_factors(lambda t: t.mT.contiguous().mT if t.ndim == 3 else t, spatial), *flipped),
        (map_factors(lambda t: torch.cat((t, t))[: len(t)], spatial), points, gradient),
        (spatial, points.T.contiguous().T, gradient.T.contiguous().T),
    ]
    for some, some_points, some_gradient in variants:
        found, gradients = evaluate(some, some_points, summed, some_gradient)
        assert torch.equal(found, expected)
        for a, b in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(a, b)
    # A gradient that is one number for all.
    whole, one = torch.full_like(gradient, 0.5), torch.tensor(0.5).expand(gradient.shape)
    for a, b in zip(
        evaluate(spatial, points, summed, one)[1],
        evaluate(spatial, points, summed, whole)[1],
        strict=True,
    ):
        assert torch.equal(a, b)


def test_channels_last():
    for values in (torch.randn(4, 5, 6), torch.randn(3, 7), torch.randn(2, 3, 4, 5)):
        found = native.channels_last(values)
        assert torch.equal(found, values)
        assert found.movedim(0, -1).is_contiguous()
        assert native.channels_last(found).data_ptr() == found.data_ptr()
        with native.disabled():
            assert native.channels_last(found).is_contiguous()
            assert torch.equal(native.channels_last(found), values)
        assert native.channels_last(channels_innermost(values.double())).is_contiguous()


# --- memory


def wild_points() -> torch.Tensor:
    """Every combination of borders, NaN, infinities and what no integer holds."""
    some = [-1.0, 1.0, 0.3, torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3.4e38, 2.0**31, 1e10]
    return torch.cartesian_prod(*[torch.tensor(some)] * 3)


def is_nan(points: torch.Tensor) -> torch.Tensor:
    return points.isnan().any(dim=1)


@pytest.mark.parametrize("num_channels", [1, 3, 16])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_kernels_stay_within_their_arrays(resolution, num_channels):
    """Reading outside shows up as NaN, writing outside as a changed guard."""
    points = wild_points().numpy()
    good = ~is_nan(wild_points()).numpy()
    spatial = factors(num_channels, resolution)
    n, width = len(points), num_channels + 2
    for plane, line, axes in zip(spatial.planes, spatial.lines, _NATIVE_AXES, strict=True):
        plane_in, _ = guarded(plane.movedim(0, -1).contiguous().numpy(), np.nan)
        line_in, _ = guarded(line.T.contiguous().numpy(), np.nan)
        shape = (plane.shape[1], plane.shape[2], line.shape[1], num_channels)
        arguments = points, plane_in, line_in, shape, axes

        out, whole = guarded(np.full((n, width), 7, np.float32), 7)
        native_kernels.features(*arguments, out, width, 1, 3, n - 2)
        assert_guards(whole, 7)
        table = out.reshape(n, width)
        assert (table[:3] == 7).all() and (table[-2:] == 7).all()
        assert (table[:, 0] == 7).all() and (table[:, -1] == 7).all()
        inner = table[3 : n - 2, 1:-1]
        assert np.isfinite(inner[good[3 : n - 2]]).all()

        out, whole = guarded(np.full(n, 7, np.float32), 7)
        native_kernels.summed_features(*arguments, out, 3, n - 2)
        assert_guards(whole, 7)
        assert (out[:3] == 7).all() and (out[-2:] == 7).all()
        assert np.isfinite(out[3 : n - 2][good[3 : n - 2]]).all()

        chosen = np.ascontiguousarray(points[good])
        for columns in (width, 1):
            gradient = np.ones((n, columns), np.float32)
            plane_out, plane_whole = guarded(np.full_like(plane_in, np.nan), 7)
            line_out, line_whole = guarded(np.full_like(line_in, np.nan), 7)
            for some in (points, chosen):  # the second call starts from zero again
                rest = gradient[: len(some)], int(columns > 1), plane_out, line_out
                native_kernels.features_backward(some, *arguments[1:], *rest, 0, len(some))
            assert_guards(plane_whole, 7)
            assert_guards(line_whole, 7)
            assert np.isfinite(plane_out).all() and np.isfinite(line_out).all()
            assert np.abs(plane_out).max() > 0 and np.abs(line_out).max() > 0


@pytest.mark.parametrize("summed", [False, True])
def test_infinite_points_are_at_the_border(summed):
    spatial, points = factors(3, (7, 10, 13)), wild_points()
    points = points[~is_nan(points)]
    gradient = upstream(len(points), 3, summed)
    found, gradients = evaluate(spatial, points, summed, gradient)
    expected, expected_gradients = evaluate(spatial, points.clamp(-1, 1), summed, gradient)
    assert torch.equal(found, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("summed", [False, True])
def test_a_nan_point_harms_no_other(summed):
    spatial, points = factors(3, (7, 10, 13)), random_points(100)
    gradient = upstream(100, 3, summed)
    expected, expected_gradients = evaluate(spatial, points, summed, gradient)
    more = torch.cat((points, torch.full((1, 3), torch.nan), points[:1]))
    extra = torch.cat((gradient, torch.ones_like(gradient[:1]), torch.zeros_like(gradient[:1])))
    found, gradients = evaluate(spatial, more, summed, extra)
    assert torch.equal(found[:100], expected) and torch.equal(found[101:], expected[:1])
    for a, b in zip(gradients, expected_gradients, strict=True):
        # It falls on the first texels.
        touched = torch.zeros_like(a, dtype=torch.bool)
        touched[(slice(None), *[slice(2)] * (a.ndim - 1))] = True
        torch.testing.assert_close(a[~touched], b[~touched], rtol=1e-5, atol=1e-6)


# --- threads


@pytest.mark.parametrize("num_points", [1, 2, 257])
@pytest.mark.parametrize("summed", [False, True])
def test_features_of_any_number_of_threads(summed, num_points):
    spatial, points = factors(5, (7, 10, 13)), random_points(num_points)
    gradient = upstream(num_points, 5, summed)
    expected, expected_gradients = evaluate(spatial, points, summed, gradient)
    for num_threads in (2, 3, 4, 7):
        torch.set_num_threads(num_threads)
        found, gradients = evaluate(spatial, points, summed, gradient)
        again, same = evaluate(spatial, points, summed, gradient)
        assert torch.equal(found, expected) and torch.equal(again, expected)
        for a, b, c in zip(gradients, expected_gradients, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
            assert torch.equal(a, c)  # whichever thread comes first


def occupied_places(origins, directions, first, fars, step, num_steps, cells):
    """Which of the (R, S) places are sampled; the samples themselves are checked on the way."""
    rays = origins, directions, first, fars
    ray, middles, points = native.occupied_samples(
        *rays, step, num_steps, native.packed_cells(cells)
    )
    assert (ray.diff() >= 0).all() and (middles.diff()[ray.diff() == 0] > 0).all()
    torch.testing.assert_close(points, origins[ray] + directions[ray] * middles[:, None])
    places = torch.zeros(len(origins), num_steps, dtype=torch.bool)
    places[ray, ((middles - first[ray, 0]) / step).round().long()] = True
    assert places.sum() == len(ray)
    return places


def test_other_loops_of_any_number_of_threads():
    grid = FactorisedGrid(20, (19, 37, 50), WaveletTransform("bior4.4", 3))
    for logits in (logits for member in grid.grids for logits in member.logits):
        torch.nn.init.normal_(logits)
    appearance, directions = torch.randn(41, 5), torch.randn(41, 3)
    rays = (torch.randn(23, 3), torch.randn(23, 3), torch.rand(23, 1), 3 + torch.rand(23, 1))
    cells = torch.rand(4, 5, 7) < 0.5

    def results():
        spatial, kept = grid()
        shown = [*spatial.planes, *spatial.lines]
        loss = sum(t.square().sum() for t in shown)
        gradients = torch.autograd.grad(loss, list(grid.parameters()))
        samples = native.occupied_samples(*rays, 0.1, 50, native.packed_cells(cells))
        encoded = native.encode(appearance, directions, 3)
        of_encoded = native.encode_backward(torch.ones_like(encoded), encoded, 5, 3, 3)
        return [*shown, *kept, *gradients, *samples, encoded, of_encoded]

    expected = results()
    for num_threads in (2, 3, 29):
        torch.set_num_threads(num_threads)
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        ray, middles, points = native.occupied_samples(
            *(t[:0] for t in rays), 0.1, 50, native.packed_cells(cells)
        )
        assert len(ray) == len(middles) == 0 and points.shape == (0, 3)
        assert native.encode(appearance[:0], directions[:0], 2).shape == (0, 40)


def test_parts_cover_everything_once():
    for size in (0, 1, 2, 7, 100):
        for num_parts in (1, 2, 3, 8):
            parts = native._parts(size, num_parts)
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(size))
            assert len(parts) == num_parts


def test_an_error_in_a_thread_is_raised():
    torch.set_num_threads(3)

    def work(start, stop):
        if start:
            raise ArithmeticError("here")

    with pytest.raises(ArithmeticError, match="here"):
        native._split_range(work, 10)


# --- inputs of the colour network


def test_sines_and_cosines():
    angles = np.concatenate((np.linspace(-10000, 10000, 200001), np.arange(-40, 41) * np.pi / 4))
    angles = angles.astype(np.float32)
    sines, cosines = np.empty_like(angles), np.empty_like(angles)
    native_kernels._sine_and_cosine(angles, 0, len(angles), sines, cosines)
    np.testing.assert_allclose(sines, np.sin(angles.astype(np.float64)), rtol=0, atol=3e-7)
    np.testing.assert_allclose(cosines, np.cos(angles.astype(np.float64)), rtol=0, atol=3e-7)


@pytest.mark.parametrize("num_frequencies", [0, 1, 2, 6])
@pytest.mark.parametrize("num_features", [1, 4, 27])
def test_encoding_equals_plain_torch(num_features, num_frequencies):
    appearance = 3 * torch.randn(50, num_features)
    directions = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    encoded = native.encode(appearance, directions, num_frequencies)
    leaf = appearance.double().requires_grad_()
    parts = [leaf, directions.double()]
    parts += [frequency_encoding(part, num_frequencies) for part in parts]
    expected = torch.cat(parts, dim=-1)
    used = expected.shape[1]
    assert encoded.shape[1] % 8 == 0 and encoded.shape[1] - used < 8
    assert (encoded[:, used:] == 0).all()
    tolerance = 3e-7 * 2**num_frequencies
    torch.testing.assert_close(encoded[:, :used], expected.float(), rtol=1e-6, atol=tolerance)
    gradient = torch.randn(encoded.shape)
    found = native.encode_backward(gradient, encoded, num_features, 3, num_frequencies)
    (of_leaf,) = torch.autograd.grad(expected, leaf, gradient[:, :used].double())
    torch.testing.assert_close(found, of_leaf.float(), rtol=1e-4, atol=40 * tolerance)


# --- marching


@pytest.mark.parametrize("size", [(4, 5, 7), (9, 1, 3), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_occupied_places_equal_the_grid(size, fraction):
    grid = OccupancyGrid()
    grid.cells = torch.rand(size) < fraction
    origins, directions = 2 * torch.randn(200, 3), torch.randn(200, 3)
    directions[:20, 1] = 0
    first, fars = torch.rand(200, 1), 3 * torch.rand(200, 1)
    found = occupied_places(origins, directions, first, fars, 0.05, 70, grid.cells)
    middles = first + torch.arange(70) * 0.05
    points = origins[:, None] + directions[:, None] * middles[..., None]
    expected = grid(points) & (middles < fars)
    assert found.dtype == torch.bool and found.shape == (200, 70)
    assert (found == expected).all()
    assert found.any() == bool(grid.cells.any())


def test_occupied_places_at_nodes_and_borders():
    """Powers of two: every coordinate is exact, half-way places too."""
    grid = OccupancyGrid()
    for size in ((5, 9, 3), (4, 4, 4)):
        grid.cells = torch.rand(size) < 0.6
        for axis in range(3):
            origins, directions = torch.zeros(64, 3), torch.zeros(64, 3)
            origins[:] = (torch.randint(-12, 13, (64, 3))) / 8
            origins[:, axis] = -2
            directions[:, axis] = 1
            first, fars = torch.zeros(64, 1), torch.full((64, 1), 8.0)
            found = occupied_places(origins, directions, first, fars, 1 / 16, 70, grid.cells)
            middles = torch.arange(70) / 16
            points = origins[:, None] + directions[:, None] * middles[:, None]
            if size == (5, 9, 3):  # (n - 1) / 2 is exact
                assert torch.equal(found, grid(points))
            else:
                assert (found != grid(points)).float().mean() < 0.02


def test_a_grid_without_nodes_is_occupied_nowhere():
    rays = torch.zeros(3, 3), torch.ones(3, 3), torch.zeros(3, 1), torch.ones(3, 1)
    for size in ((0, 4, 4), (4, 0, 4), (0, 0, 0)):
        cells = native.packed_cells(torch.ones(size, dtype=torch.bool))
        assert cells.bits.tolist() == [0]
        assert len(native.occupied_samples(*rays, 0.1, 9, cells)[0]) == 0


WILD = """
import torch
from masked_wavelet_nerf import native
from masked_wavelet_nerf.sampling import OccupancyGrid

assert native.is_enabled()

def occupied_places(origins, directions, first, fars, step, num_steps, cells):
    rays = origins, directions, first, fars
    ray, middles, points = native.occupied_samples(
        *rays, step, num_steps, native.packed_cells(cells)
    )
    places = torch.zeros(len(origins), num_steps, dtype=torch.bool)
    places[ray, ((middles - first[ray, 0]) / step).round().long()] = True
    assert torch.equal(points, torch.addcmul(origins[ray], directions[ray], middles[:, None]))
    return places

inf = float("inf")
wild = [0.25, 1e10, -1e10, 2.0**31, 2.0**32, 2.0**63, 1e30, -1e30, 3.4e38, inf, -inf]
wild.append(float("nan"))
values = torch.cartesian_prod(*[torch.tensor(wild)] * 3)
still = torch.zeros(len(values), 3)
for size in ((4, 5, 7), (1, 1, 1)):
    grid = OccupancyGrid()
    grid.cells = torch.ones(size, dtype=torch.bool)
    for origins, directions in ((values, still), (still, values)):
        first = torch.full((len(values), 1), 0.5)
        found = occupied_places(origins, directions, first, first + 9, 0.125, 4, grid.cells)
        middles = first + torch.arange(4) * 0.125
        expected = grid(origins[:, None] + directions[:, None] * middles[..., None])
        if size != (1, 1, 1):  # there torch calls everything finite inside
            assert torch.equal(found, expected), values[(found != expected).any(dim=1)]
    rays = torch.zeros(12, 3), torch.ones(12, 3)
    odd = torch.tensor(wild)[:, None]
    for first, fars in ((odd, odd.flip(0)), (odd, torch.full_like(odd, inf)), (0 * odd, odd)):
        found = occupied_places(*rays, first, fars, 0.125, 4, grid.cells)
        assert not found[~(first < fars)[:, 0]].any()
"""


def test_wild_rays_neither_crash_nor_count(children):
    """In a process of its own: a place outside the cells may end it."""
    assert children["wild"] == (0, ""), children["wild"][1]


# --- the switch


def test_disabled_nests_and_ends():
    x = torch.zeros(1)
    assert native.is_enabled() and native.serves(x)
    assert native.status() == "Compiled CPU loops (numba) are in use."
    with native.disabled():
        assert not native.is_enabled()
        with native.disabled():
            assert not native.serves(x)
        assert not native.is_enabled()
        with pytest.raises(KeyError), native.disabled():
            raise KeyError
        assert not native.is_enabled()
    assert native.is_enabled()


def test_serves_floats_on_the_cpu_only():
    x = torch.zeros(2)
    assert native.serves(x, x[:0], x.requires_grad_())
    for other in (x.double(), x.half(), x.bfloat16(), x.int(), x.to("meta")):
        assert not native.serves(other) and not native.serves(x, other)


def test_positions_with_a_gradient_and_single_texels_go_through_torch():
    spatial, points = factors(2, (4, 5, 6)), random_points(20).requires_grad_()
    grid = grid_for(spatial)
    for function in (grid.features, grid.summed_features):
        (gradient,) = torch.autograd.grad(function(spatial, points).sum(), points)
        assert gradient.abs().max() > 0
    x, y, z = 4, 1, 6
    planes = tuple(torch.randn(2, *size) for size in ((y, x), (z, x), (z, y)))
    lines = tuple(torch.randn(2, n) for n in (z, y, x))
    flat = SpatialGrid(planes, lines)
    found = grid.features(flat, points.detach())
    with native.disabled():
        expected = grid.features(flat, points.detach())
    assert torch.equal(found, expected) and torch.isfinite(found).all()


def test_gradients_of_gradients_are_refused():
    """Rather than wrong: the loops do not have them, as grid_sample does not."""
    spatial = map_factors(lambda t: t.requires_grad_(), factors(2, (4, 5, 6)))
    grid, points = grid_for(spatial), random_points(20)
    loss = grid.features(spatial, points).square().sum()
    (first,) = torch.autograd.grad(loss, spatial.planes[0], create_graph=True)
    with pytest.raises(RuntimeError):
        # The second part has some: those of the first must not go missing beside them.
        (first.square().sum() + spatial.planes[0].pow(3).sum()).backward()


RENDER = """
import json
import torch
from masked_wavelet_nerf import native
from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField
from masked_wavelet_nerf.sampling import OccupancyGrid, march, render_weights

torch.manual_seed(0)
config = FieldConfig(
    num_density_components=2,
    num_appearance_components=3,
    hidden_dim=8,
    num_levels=2,
    density_shift=0.0,
)
field = WaveletPlaneField(config, (8, 9, 10))
spatial = field.to_spatial()
origins = torch.rand(5, 3) - 0.5
directions = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
ends = torch.zeros(5, 1), torch.ones(5, 1)
samples = march(origins, directions, *ends, 0.1, 20, OccupancyGrid(), None)
depth = field.density(spatial, samples.points) * samples.lengths
weights = render_weights(depth, samples.ray)
colours = field.colour(spatial, samples.points, directions[samples.ray])
image = torch.zeros(5, 3).index_add(0, samples.ray, weights[:, None] * colours)
image.sum().backward()
gradient = float(sum(p.grad.abs().sum() for p in field.density_grid.parameters()))
print(json.dumps([native.is_enabled(), native.status(), image.tolist(), gradient]))
"""
FORK = """
import os, signal
import torch
from masked_wavelet_nerf import native

torch.set_num_threads(2)
rays = torch.zeros(9, 3), torch.ones(9, 3), torch.zeros(9, 1), torch.ones(9, 1)
cells = native.packed_cells(torch.ones(2, 2, 2, dtype=torch.bool))
assert len(native.occupied_samples(*rays, 0.5, 2, cells)[0]) == 18
process = os.fork()
if process == 0:
    signal.alarm(5)
    os._exit(int(len(native.occupied_samples(*rays, 0.5, 2, cells)[0]) != 18))
assert os.waitpid(process, 0)[1] == 0
"""
MEMORY = """
import torch
from masked_wavelet_nerf import native

native.keep_freed_memory()
native.keep_freed_memory()
kept = [torch.ones(1 << 22) for _ in range(9)]
del kept
print(torch.ones(1 << 22).sum().item())
"""
WITH_NUMBA = "import sys; sys.path.remove(sys.argv[1]); import numba"
CHILDREN = {
    "on": (WITH_NUMBA, RENDER),
    "off": (WITH_NUMBA, "import os; os.environ['MASKED_WAVELET_NATIVE'] = '0'", RENDER),
    "missing": (RENDER,),
    "broken": ("import os; os.environ['NUMBA_ERROR'] = 'OSError'", RENDER),
    # A read-only installation and no home: numba has nowhere to keep what it compiles.
    "no cache": (
        WITH_NUMBA,
        "from numba.core import caching; caching.CacheImpl._locator_classes = []",
        RENDER,
    ),
    "wild": (WITH_NUMBA, WILD),
    "fork": (WITH_NUMBA, FORK),
    "memory": (MEMORY,),
}
PARENT = """
# Imports everything without numba, once, and lets a child of its own run each of the programs.
import json, os, sys, traceback
import torch

torch.set_num_threads(1)
import masked_wavelet_nerf.method
from masked_wavelet_nerf import native

assert "numba" not in sys.modules
ends = {}
for name, programs in json.load(sys.stdin).items():
    process = os.fork()
    if process == 0:
        status = 1
        try:
            file = os.open(os.path.join(sys.argv[1], name), os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            for program in programs:
                exec(program, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ends[name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(json.dumps(ends))
"""
NO_NUMBA = """
import os
if os.environ.get("NUMBA_ERROR"):
    raise OSError("Could not find/load shared object file: libllvmlite.so")
raise ModuleNotFoundError("No module named 'numba'")
"""


@pytest.fixture(scope="module")
def children(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit status and output of each program."""
    folder = tmp_path_factory.mktemp("children")
    (folder / "numba").mkdir()
    (folder / "numba" / "__init__.py").write_text(NO_NUMBA)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", PARENT, str(folder)],
        input=json.dumps(CHILDREN),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    ends = json.loads(result.stdout.splitlines()[-1])
    return {name: (end, (folder / name).read_text()) for name, end in ends.items()}


def rendered(children, name: str):
    """Whether a child uses the loops, and its status line; its image is that of the loops."""
    found = []
    for child in (name, "on"):
        end, output = children[child]
        assert end == 0, output
        found.append(json.loads(output.splitlines()[-1]))
    (enabled, status, image, gradient), (_, _, expected_image, expected_gradient) = found
    assert np.min(expected_image) > 0.05 and expected_gradient > 0.01
    np.testing.assert_allclose(image, expected_image, rtol=1e-4)
    assert gradient == pytest.approx(expected_gradient, rel=1e-3)
    return enabled, status


def test_a_field_renders_with_the_loops(children):
    assert rendered(children, "on") == (True, "Compiled CPU loops (numba) are in use.")


def test_the_environment_turns_the_loops_off(children):
    expected = "Compiled CPU loops are off (MASKED_WAVELET_NATIVE=0): plain torch is used."
    assert rendered(children, "off") == (False, expected)


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_without_numba_everything_works(children, how):
    enabled, status = rendered(children, how)
    assert not enabled
    assert "pip install numba" in status and "plain torch" in status


def test_nowhere_to_keep_compiled_code(children):
    rendered(children, "no cache")


def test_a_forked_process_has_threads_of_its_own(children):
    assert children["fork"] == (0, ""), children["fork"][1]


def test_keeping_freed_memory_leaves_results_alone(children):
    assert children["memory"] == (0, "4194304.0\n")
