"""Coefficient grids: sampling against a slow reference, resampling against laws."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

from masked_wavelet_nerf.masking import largest_integer, quantise_to_integers
from masked_wavelet_nerf.optimisers import is_dense
from masked_wavelet_nerf.planes import REOPENED_LOGIT, CoefficientGrid, FactorisedGrid, SpatialGrid
from masked_wavelet_nerf.wavelet import Bands, make_transform

TRANSFORMS = ["wavelet", "dct", "identity"]
KINDS = [("vm", "product"), ("triplane", "product"), ("triplane", "sum")]
# Voxels along x, y, z: a cube of a multiple of 2^L, odd and unequal sides.
RESOLUTIONS = [(8, 8, 8), (7, 10, 13), (5, 3, 2)]

pytestmark = pytest.mark.usefixtures("backend", "one_thread", "seed")


def transform(name: str = "wavelet", num_levels: int = 2, wavelet: str = "bior4.4"):
    return make_transform(name, wavelet=wavelet, num_levels=num_levels)


def factorised(resolution, name="wavelet", kind=("vm", "product"), *, bits=8, masked=True, num=2):
    return FactorisedGrid(
        num,
        resolution,
        transform(name),
        planes=kind[0],
        reduce=kind[1],
        bits=bits,
        masked=masked,
    )


def scatter_masks(module: torch.nn.Module, dropped: float = 0.3) -> None:
    """Closes some masks, at random."""
    for name, parameter in module.named_parameters():
        if "logits" in name:
            closed = torch.rand_like(parameter) < dropped
            parameter.data = torch.where(closed, -1.0, 1.0) * (0.5 + torch.rand_like(parameter))


def random_points(num: int, *, inside: bool = True) -> torch.Tensor:
    return (torch.rand(num, 3) * 2 - 1) * (1.0 if inside else 1.5)


# --- features


def linear_at(values: np.ndarray, coordinate: float) -> np.ndarray:
    """Linear interpolation along the last axis, whose ends lie at -1 and 1."""
    n = values.shape[-1]
    position = (min(max(coordinate, -1.0), 1.0) + 1) / 2 * (n - 1)
    low = min(int(np.floor(position)), n - 1)
    high = min(low + 1, n - 1)
    part = position - low
    return (1 - part) * values[..., low] + part * values[..., high]


def features_by_loop(spatial: SpatialGrid, kind, points: torch.Tensor) -> np.ndarray:
    """The table of planes.py: plane xy with line z, xz with y, yz with x."""
    planes = [plane.detach().double().numpy() for plane in spatial.planes]
    lines = [line.detach().double().numpy() for line in spatial.lines]
    result = []
    for x, y, z in points.double().tolist():
        # W runs along the first axis of the pair (last array axis), H along the second.
        xy, xz, yz = (
            linear_at(linear_at(plane, first), second)
            for plane, first, second in zip(planes, (x, x, y), (y, z, z), strict=True)
        )
        if kind[0] == "vm":
            parts = [linear_at(line, c) for line, c in zip(lines, (z, y, x), strict=True)]
            result.append(np.concatenate([xy * parts[0], xz * parts[1], yz * parts[2]]))
        elif kind[1] == "product":
            result.append(xy * xz * yz)
        else:
            result.append(xy + xz + yz)
    return np.stack(result)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_features_equal_a_slow_bilinear_reference(kind, name, resolution):
    grid = factorised(resolution, name, kind)
    scatter_masks(grid)
    spatial, _ = grid()
    x, y, z = resolution
    assert [tuple(p.shape) for p in spatial.planes] == [(2, y, x), (2, z, x), (2, z, y)]
    assert [tuple(p.shape) for p in spatial.lines] == ([(2, z), (2, y), (2, x)][: len(grid.lines)])
    points = torch.cat((random_points(40), random_points(20, inside=False)))
    found = grid.features(spatial, points)
    assert found.shape == (60, grid.num_features)
    assert grid.resolution == resolution
    expected = features_by_loop(spatial, kind, points)
    assert np.abs(expected).max() > 1e-4
    found = found.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_corners_are_texels():
    grid = factorised((3, 4, 5), "identity", bits=None)
    spatial, _ = grid()
    xy, line = spatial.planes[0], spatial.lines[0]
    found = grid.features(spatial, torch.tensor([[-1.0, 1.0, 1.0], [0.0, -1.0, 0.0]]))
    torch.testing.assert_close(found[0, :2], xy[:, 3, 0] * line[:, 4])
    torch.testing.assert_close(found[1, :2], xy[:, 0, 1] * line[:, 2])


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_points_are_independent_of_their_order_and_batch(kind):
    grid = factorised((7, 10, 13), kind=kind)
    spatial, _ = grid()
    points = random_points(50)
    order = torch.randperm(50)
    whole = grid.features(spatial, points)
    assert torch.equal(grid.features(spatial, points[order]), whole[order])
    chunks = [grid.features(spatial, chunk) for chunk in points.split(7)]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-6, atol=1e-7)
    assert grid.features(spatial, points[:0]).shape == (0, grid.num_features)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(8, 8), (7, 13), (1, 5)])
def test_constant_plane_is_constant(name, size):
    grid = CoefficientGrid(torch.full((2, *size), 0.7), transform(name), None, True)
    torch.testing.assert_close(grid()[0], torch.full((2, *size), 0.7))
    quantised = CoefficientGrid(torch.full((2, *size), 0.7), transform(name), 8, True)
    torch.testing.assert_close(quantised()[0], torch.full((2, *size), 0.7))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_at_nodes_are_the_features_there(kind):
    grid = factorised((7, 7, 7), kind=kind)
    spatial, _ = grid()
    nodes = torch.linspace(-1, 1, 7)
    points = torch.stack(torch.meshgrid(nodes, nodes, nodes, indexing="ij"), dim=-1)
    expected = grid.summed_features(spatial, points.view(-1, 3)).view(7, 7, 7)
    torch.testing.assert_close(grid.sums_at_nodes(spatial, 7), expected, atol=1e-5, rtol=1e-5)


def test_sums_at_fewer_nodes_are_of_smoothed_planes_and_the_first_texels_of_lines():
    grid = factorised((12, 14, 10))
    spatial, _ = grid()

    def smoothed(image: torch.Tensor) -> torch.Tensor:
        return F.interpolate(image[None], (6, 6), mode="bilinear", antialias=True)[0]

    xy, xz, yz = map(smoothed, spatial.planes)
    z, y, x = (
        smoothed(line[..., None].expand(-1, -1, 9))[:, :1, 4].expand(-1, 6)
        for line in spatial.lines
    )
    expected = (
        (xy.permute(0, 2, 1)[..., None] * z[:, None, None])
        + (xz.permute(0, 2, 1)[:, :, None] * y[:, None, :, None])
        + (yz.permute(0, 2, 1)[:, None] * x[:, :, None, None])
    ).sum(dim=0)
    torch.testing.assert_close(grid.sums_at_nodes(spatial, 6), expected, atol=1e-6, rtol=1e-4)


def test_sums_at_fewer_nodes_are_of_averaged_planes():
    grid = factorised((8, 8, 8), "identity", ("triplane", "sum"))
    spatial, _ = grid()
    constant = SpatialGrid(tuple(torch.full_like(p, 0.25) for p in spatial.planes), ())
    torch.testing.assert_close(grid.sums_at_nodes(constant, 4), torch.full((4, 4, 4), 1.5))
    # A spike is seen, and nowhere far from it.
    planes = [torch.zeros_like(p) for p in spatial.planes]
    planes[0][:, 5, 2] = 1.0  # y = 5, x = 2
    found = grid.sums_at_nodes(SpatialGrid(tuple(planes), ()), 4)
    assert found[1, 2].min() > 0.1
    assert (found[3] == 0).all() and (found[:, 0] == 0).all()


def test_constant_planes_give_constant_features():
    grid = factorised((7, 10, 13), bits=None)
    constants = [0.5, -0.25, 2.0, 3.0, 0.1, -4.0]
    for part, value in zip(grid.grids, constants, strict=True):
        fresh = CoefficientGrid(
            torch.full((2, *part.spatial_size), value), part.transform, None, True
        )
        part.load_state_dict(fresh.state_dict())
    found = grid.features(grid()[0], random_points(30, inside=False))
    expected = torch.tensor([1.5, -0.025, -8.0]).repeat_interleave(2).expand(30, -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_open_masks_equal_no_masks(name, bits):
    masked = factorised((7, 10, 13), name, bits=bits)
    free = factorised((7, 10, 13), name, bits=bits, masked=False)
    assert not [n for n, _ in free.named_parameters() if "logits" in n]
    for one, other in zip(masked.grids, free.grids, strict=True):
        for source, target in zip(one.coefficients, other.coefficients, strict=True):
            target.data = source.data.clone()
    (one, kept), (other, everything) = masked(), free()
    points = random_points(20)
    one, other = masked.features(one, points), free.features(other, points)
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(kept, everything, strict=True))
    one.square().sum().backward()
    other.square().sum().backward()
    for a, b in zip(masked.grids, free.grids, strict=True):
        for p, q in zip(a.coefficients, b.coefficients, strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_order_is_quantise_mask_inverse(name, bits):
    """Integers (quantised and masked) put through the inverse transform are the plane."""
    taken_to = transform(name)
    grid = CoefficientGrid(torch.randn(3, 7, 10), taken_to, bits, True)
    scatter_masks(grid)
    levels = []
    for values, logits in zip(grid.coefficients, grid.logits, strict=True):
        if bits is None:
            levels.append(values.detach() * (logits >= 0))
        else:
            largest = 2 ** (bits - 1) - 1
            step = values.detach()[logits >= 0].abs().max() / largest
            levels.append((values.detach() / step).round() * step * (logits >= 0))
            assert values[logits < 0].abs().max() > step  # the mask is not applied for nothing
    expected = taken_to.inverse(Bands(levels[0].squeeze(1), tuple(levels[1:])), (7, 10))
    torch.testing.assert_close(grid()[0], expected)


def test_num_levels_and_threshold():
    grid = CoefficientGrid(torch.randn(2, 16, 12), transform(), 8, True)
    scatter_masks(grid)
    totals = [int((logits >= 0).sum()) for logits in grid.logits]
    for num_levels in (0, 1, 2):
        coarse = CoefficientGrid(torch.zeros(2, 16, 12), transform(), 8, True)
        coarse.load_state_dict(grid.state_dict())
        for level in range(num_levels + 1, 3):
            coarse.coefficients[level].data.zero_()
        found, kept = grid(num_levels)
        torch.testing.assert_close(found, coarse()[0])
        assert kept.tolist() == totals[: num_levels + 1] + [0] * (2 - num_levels)
    assert torch.equal(grid(2)[0], grid()[0]) and torch.equal(grid(5)[0], grid()[0])

    for threshold in (-10.0, 1.0, 10.0):
        shown, kept = grid(threshold=threshold)
        assert kept.tolist() == [int((logits >= threshold).sum()) for logits in grid.logits]
    assert (shown == 0).all()
    lowered, _ = grid(threshold=-10.0)
    for logits in grid.logits:
        logits.data.fill_(1.0)
    assert torch.equal(grid()[0], lowered)


def test_lines_have_no_detail_levels_to_leave_out():
    grid = factorised((7, 10, 13))
    coarse, kept = grid(num_levels=0)
    assert all(torch.equal(a, b) for a, b in zip(coarse.lines, grid()[0].lines, strict=True))
    assert [len(k) for k in kept] == [3, 3, 3, 1, 1, 1]
    assert all(k[1:].sum() == 0 for k in kept[:3])


def test_kept_counts_belong_to_planes_then_lines():
    grid = factorised((7, 10, 13))
    for index, part in enumerate(grid.grids):
        part.logits[0].data[..., index:] = -1
    kept = [int(k[0]) for k in grid()[1]]
    assert kept == [int((part.logits[0] >= 0).sum()) for part in grid.grids]
    assert kept[0] == 0 and len(set(kept)) > 3


def test_gradients_reach_every_parameter():
    for kind, name in itertools.product(KINDS, TRANSFORMS):
        grid = factorised((7, 10, 13), name, kind)
        grid.features(grid()[0], random_points(200)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in grid.parameters())


def test_two_voxels_are_the_least():
    with pytest.raises(ValueError, match=r"^resolution: expected at least 2 voxels per axis, got"):
        factorised((4, 1, 4))


# --- integers


@pytest.mark.parametrize("bits", [2, 8, 13])
@pytest.mark.parametrize("size", [(8, 8), (7, 13), (9,)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_integers_round_trip_exactly(name, size, bits):
    grid = CoefficientGrid(torch.randn(3, *size), transform(name), bits, True)
    scatter_masks(grid)
    shown, _ = grid()
    stored = grid.integers(bits)
    for band, values, logits in zip(stored, grid.coefficients, grid.logits, strict=True):
        direct = quantise_to_integers(values, logits, largest_integer(bits))
        assert all(torch.equal(a, b) for a, b in zip(band, direct, strict=True))

    other_size = (12, 6) if len(size) == 2 else (4,)
    other = CoefficientGrid(torch.zeros(3, *other_size), transform(name), bits, True)
    parameters = list(other.parameters())
    other.load_integers(stored, size)
    assert [id(p) for p in other.parameters()] == [id(p) for p in parameters]
    assert other.spatial_size == size and other.size.tolist() == list(size)
    assert torch.equal(other()[0], shown)
    # What the file drops stays dropped.
    assert other()[1].tolist() == [int(band.mask.sum()) for band in stored]
    for band, logits in zip(stored, other.logits, strict=True):
        assert torch.equal(logits >= 0, band.mask)
    for band, again in zip(stored, other.integers(bits), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(band, again, strict=True))
    # Where the quantiser is off, what was loaded is shown as it is.
    plain = CoefficientGrid(torch.zeros(3, *size), transform(name), None, True)
    plain.load_integers(stored, size)
    assert torch.equal(plain()[0], shown)


def test_integers_of_a_grid_without_masks_round_trip():
    grid = CoefficientGrid(torch.randn(3, 7, 10), transform(), 8, False)
    other = CoefficientGrid(torch.zeros(3, 5, 5), transform(), 8, False)
    other.load_integers(grid.integers(8), (7, 10))
    assert torch.equal(other()[0], grid()[0])


# --- quantisers and prices of each level

LARGEST = [100, 13, 1]


def random_prices(grid: CoefficientGrid) -> list[torch.Tensor]:
    shapes = [values.shape for values in grid.coefficients]
    return [torch.randint(1, 256, shape, dtype=torch.uint8) for shape in shapes]


def priced(resolution=(7, 10, 13)) -> FactorisedGrid:
    """Some masks closed; every plane and line with quantisers and prices of its own."""
    grid = factorised(resolution)
    scatter_masks(grid)
    for number, part in enumerate(grid.grids):
        part.set_largest([q + number for q in LARGEST[: len(part.coefficients)]])
        part.set_prices(random_prices(part))
    return grid


def test_every_level_has_a_quantiser_of_its_own():
    taken_to = transform()
    grid = CoefficientGrid(torch.randn(3, 8, 12), taken_to, 8, True)
    scatter_masks(grid)
    exact = [v.detach() * (m >= 0) for v, m in zip(grid.coefficients, grid.logits, strict=True)]
    grid.set_largest(LARGEST)
    assert grid.largest.tolist() == LARGEST
    shown = []
    for values, q, band in zip(exact, LARGEST, grid.integers(8), strict=True):
        step = values.abs().max() / q
        assert torch.equal(band.values.float(), (values / step).round())
        assert band.step == step and band.values.abs().max() == q
        shown.append((values / step).round() * step)
    expected = taken_to.inverse(Bands(shown[0].squeeze(1), tuple(shown[1:])), (8, 12))
    torch.testing.assert_close(grid()[0], expected)

    grid.set_largest(None)
    assert grid.largest.tolist() == [0, 0, 0]
    unrounded = taken_to.inverse(Bands(exact[0].squeeze(1), tuple(exact[1:])), (8, 12))
    torch.testing.assert_close(grid()[0], unrounded)
    assert (unrounded - expected).abs().max() > 0.1


@pytest.mark.parametrize("masked", [True, False])
def test_extremes_are_the_largest_kept_values(masked):
    grid = CoefficientGrid(torch.randn(3, 8, 12), transform(), 8, masked)
    scatter_masks(grid)
    for values, logits in zip(grid.coefficients, grid.logits, strict=False):
        logits.data[values.abs() == values.abs().max()] = -1.0
    kept = [m.detach().numpy() >= 0 for m in grid.logits] or [True] * 3
    values = [v.detach().numpy() for v in grid.coefficients]
    expected = [np.abs(v * k).max() for v, k in zip(values, kept, strict=True)]
    assert grid.extremes().tolist() == expected
    if masked:
        grid.logits[1].data.fill_(-1)
        assert torch.isfinite(grid.extremes()).all() and grid.extremes()[1] > 0


def test_prices_stay_until_they_are_taken_away():
    grid = CoefficientGrid(torch.randn(3, 7, 10), transform(), 8, True)
    plain = set(grid.state_dict())
    shown = grid()[0]
    assert grid.prices == []
    for _ in range(2):
        prices = random_prices(grid)
        grid.set_prices(prices)
        assert all(torch.equal(a, b) for a, b in zip(grid.prices, prices, strict=True))
    assert set(grid.state_dict()) - plain == {"price_0", "price_1", "price_2"}
    assert torch.equal(grid()[0], shown)
    for _ in range(2):
        grid.set_prices(None)
        assert grid.prices == [] and set(grid.state_dict()) == plain


@pytest.mark.parametrize("was_priced", [True, False])
@pytest.mark.parametrize("with_prices", [True, False])
def test_state_holds_quantisers_and_prices(with_prices, was_priced):
    source = priced()
    if not with_prices:
        for part in source.grids:
            part.set_prices(None)
    target = priced((5, 3, 4)) if was_priced else factorised((5, 3, 4))
    # Through a file, as a checkpoint goes.
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target.load_state_dict(state)
    for number, (found, part) in enumerate(zip(target.grids, source.grids, strict=True)):
        expected = [q + number for q in LARGEST[: len(part.coefficients)]]
        assert found.largest.tolist() == expected
        assert len(found.prices) == (len(expected) if with_prices else 0)
        assert all(torch.equal(a, b) for a, b in zip(found.prices, part.prices, strict=True))
        for band, again in zip(part.integers(8), found.integers(8), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(band, again, strict=True))
    points = random_points(20)
    expected = source.features(source()[0], points)
    assert torch.equal(target.features(target()[0], points), expected)
    assert set(target.state_dict()) == set(source.state_dict())


def test_an_empty_state_changes_nothing():
    """nerfstudio's pipeline loads its model, and then itself, of which nothing is left."""
    grid = priced()
    before = {name: tensor.clone() for name, tensor in grid.state_dict().items()}
    shown, _ = grid()
    grid.load_state_dict({}, strict=False)
    after = grid.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(map(torch.equal, grid()[0].planes, shown.planes))


@pytest.mark.parametrize("bits", [None, 5])
def test_state_of_before_quantisers_of_levels_takes_the_configured_one(bits):
    source = factorised((7, 10, 13), bits=bits)
    scatter_masks(source)
    state = {name: t for name, t in source.state_dict().items() if "largest" not in name}
    assert len(state) == len(source.state_dict()) - 6
    target = factorised((5, 3, 4), bits=bits)
    result = target.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    for part in target.grids:
        assert set(part.largest.tolist()) == {0 if bits is None else 15} and not part.prices
    points = random_points(20)
    expected = source.features(source()[0], points)
    assert torch.equal(target.features(target()[0], points), expected)


@pytest.mark.parametrize("size", [(7, 13), (9,)])
def test_quantisers_come_back_from_the_integers(size):
    for case in range(20):
        grid = CoefficientGrid(torch.randn(3, *size), transform(), 8, True)
        scatter_masks(grid)
        largest = torch.randint(1, 128, (len(grid.coefficients),)).tolist()
        grid.set_largest(largest)
        stored = grid.integers(8)
        other = CoefficientGrid(torch.zeros(3, *(4 for _ in size)), transform(), 8, True)
        other.set_prices(random_prices(other))
        other.load_integers(stored, size)
        assert other.largest.tolist() == largest and other.prices == []
        assert torch.equal(other()[0], grid()[0]), case
        for band, again in zip(stored, other.integers(8), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(band, again, strict=True))


def test_an_empty_level_keeps_its_quantiser():
    grid = CoefficientGrid(torch.randn(3, 7, 13), transform(), 8, True)
    grid.set_largest(LARGEST)
    grid.logits[1].data.fill_(-1.0)
    other = CoefficientGrid(torch.zeros(3, 7, 13), transform(), 8, True)
    other.load_integers(grid.integers(8), (7, 13))
    assert other.largest.tolist() == [100, 127, 1]
    assert torch.equal(other()[0], grid()[0])
    plain = CoefficientGrid(torch.zeros(3, 7, 13), transform(), None, True)
    plain.load_integers(grid.integers(8), (7, 13))
    assert plain.largest.tolist() == [0, 0, 0]
    # The other way: what was trained without a quantiser gets that of the grid it is loaded into.
    other.load_state_dict(plain.state_dict())
    assert other.largest.tolist() == [100, 127, 1]
    assert all(bool(shown.isfinite().all()) for shown in other()[:1])
    assert torch.equal(plain()[0], grid()[0])


@pytest.mark.parametrize("how", ["upsample", "crop"])
def test_resampling_takes_prices_away_and_leaves_quantisers(how):
    grid = priced()
    before = [part.largest.tolist() for part in grid.grids]
    if how == "upsample":
        grid.upsample((11, 12, 17))
    else:
        grid.crop((1, 2, 3), (6, 9, 12))
    assert [part.largest.tolist() for part in grid.grids] == before
    assert not any(part.prices for part in grid.grids)
    assert not [name for name in grid.state_dict() if "price" in name]
    for part in grid.grids:
        for band, q in zip(part.integers(8), part.largest.tolist(), strict=True):
            assert band.values.abs().max() == q


# --- resampling


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found - expected).square().mean()
    extent = expected.max() - expected.min()
    return float(10 * torch.log10(extent**2 / error))


def doubled(resolution) -> tuple[int, int, int]:
    x, y, z = (2 * n - 1 for n in resolution)
    return x, y, z


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_upsampling_onto_the_same_nodes_moves_no_feature(kind, name, resolution):
    grid = factorised(resolution, name, kind, bits=None)
    points = random_points(100, inside=False)
    before = grid.features(grid()[0], points)
    grid.upsample(doubled(resolution))
    assert grid.resolution == doubled(resolution)
    torch.testing.assert_close(grid.features(grid()[0], points), before, rtol=1e-4, atol=1e-5)


def smooth(part: CoefficientGrid) -> None:
    """Gives a grid content that a finer one can hold."""
    size = part.spatial_size
    axes = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
    waves = [sum((k + 1) * (i + 1) * a for i, a in enumerate(axes)).cos() for k in range(2)]
    spatial = 0.8 + 0.5 * torch.stack(waves) + 0.02 * torch.randn(2, *size)
    fresh = CoefficientGrid(spatial, part.transform, 8, bool(len(part.logits)))
    part.load_state_dict({**fresh.state_dict(), "largest": part.largest})


def drop_weak(grid: FactorisedGrid, fraction: float = 0.6) -> None:
    """Closes the masks of the smallest detail coefficients of every plane."""
    for part in grid.planes:
        for values, logits in list(zip(part.coefficients, part.logits, strict=True))[1:]:
            weakest = values.abs() < values.abs().flatten().quantile(fraction)
            logits.data[weakest] = -1.0


@pytest.mark.parametrize("resolution", [(16, 16, 16), (17, 22, 13)])
@pytest.mark.parametrize("new", ["doubled", "other"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_upsampling_with_quantiser_and_masks_leaves_the_features(kind, new, resolution):
    grid = factorised(resolution, kind=kind)
    for part in grid.grids:
        smooth(part)
    drop_weak(grid)
    points = random_points(400)
    before = grid.features(grid()[0], points)
    grid.upsample(doubled(resolution) if new == "doubled" else (25, 31, 28))
    assert psnr(grid.features(grid()[0], points), before) >= 40


def box_coordinates(start, stop, resolution, points: torch.Tensor) -> torch.Tensor:
    """Points of the cropped grid's [-1, 1]³ in the coordinates of the whole one."""
    size = torch.tensor(resolution) - 1
    low = 2 * torch.tensor(start) / size - 1
    high = 2 * (torch.tensor(stop) - 1) / size - 1
    return low + (points + 1) / 2 * (high - low)


CROPS = [
    ((16, 16, 16), (4, 0, 8), (12, 16, 13)),
    ((7, 10, 13), (1, 3, 2), (6, 10, 11)),
    ((9, 5, 6), (0, 0, 0), (9, 5, 6)),
    ((9, 5, 6), (7, 0, 3), (9, 2, 5)),
]


@pytest.mark.parametrize(("resolution", "start", "stop"), CROPS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_cropping_moves_no_feature(kind, name, resolution, start, stop):
    grid = factorised(resolution, name, kind, bits=None)
    points = random_points(100)
    before = grid.features(grid()[0], box_coordinates(start, stop, resolution, points))
    grid.crop(start, stop)
    assert grid.resolution == tuple(b - a for a, b in zip(start, stop, strict=True))
    torch.testing.assert_close(grid.features(grid()[0], points), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("resolution", "start", "stop"), CROPS[:2])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_cropping_with_quantiser_and_masks_leaves_the_features(kind, resolution, start, stop):
    grid = factorised(resolution, kind=kind)
    for part in grid.grids:
        smooth(part)
    drop_weak(grid)
    points = random_points(400)
    before = grid.features(grid()[0], box_coordinates(start, stop, resolution, points))
    grid.crop(start, stop)
    assert psnr(grid.features(grid()[0], points), before) >= 40


def half_empty(num_levels: int, size: int, *, edge: int, axis: int) -> CoefficientGrid:
    """A plane that is constant from texel ``edge`` on, along ``axis``; details there dropped.

    The dropped coefficients have values of their own, which nothing shows.
    """
    spatial = torch.randn(2, size, size)
    spatial.narrow(1 + axis, edge, size - edge).fill_(0.7)
    grid = CoefficientGrid(spatial, transform("wavelet", num_levels, "haar"), None, True)
    for level, logits in list(enumerate(grid.logits))[1:]:
        first = edge // 2 ** (num_levels - level + 1)
        empty = logits.data.narrow(2 + axis, first, logits.shape[2 + axis] - first)
        empty.fill_(-1.0)
        values = grid.coefficients[level].data
        part = values.narrow(2 + axis, first, values.shape[2 + axis] - first)
        part.copy_(torch.randn_like(part))
    return grid


def assert_dropped_from(grid: CoefficientGrid, num_levels: int, edge: float, axis: int) -> None:
    """Details lying behind texel ``edge`` are dropped, those before it kept, to one of them."""
    for level, logits in list(enumerate(grid.logits))[1:]:
        stride = 2 ** (num_levels - level + 1)
        kept = (logits >= 0).movedim(2 + axis, 0).flatten(1)
        for index, row in enumerate(kept):
            if index * stride > edge + stride:
                assert not row.any(), (level, index)
            if (index + 2) * stride < edge:
                assert row.all(), (level, index)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("num_levels", "size", "edge", "new"),
    [(2, 16, 8, 31), (2, 32, 16, 64), (3, 17, 8, 33), (4, 64, 32, 81), (4, 40, 16, 79)],
)
def test_kept_set_survives_upsampling(num_levels, size, edge, new, axis):
    grid = half_empty(num_levels, size, edge=edge, axis=axis)
    unmasked = grid(threshold=-10.0)[0]
    rendered = grid()[0]
    grid.upsample((new, new))
    assert_dropped_from(grid, num_levels, edge * (new - 1) / (size - 1), axis)
    # Kept ones hold what was rendered, dropped ones go on from their own values.
    for spatial, shown in ((unmasked, False), (rendered, True)):
        finer = torch.nn.functional.interpolate(
            spatial[None], size=(new, new), mode="bilinear", align_corners=True
        )[0]
        bands = grid.transform.forward(finer)
        expected = [bands.approximation[:, None], *bands.details]
        for values, logits, wanted in zip(grid.coefficients, grid.logits, expected, strict=True):
            chosen = (logits >= 0) == shown
            torch.testing.assert_close(values[chosen], wanted[chosen], rtol=1e-4, atol=1e-5)
            if not shown and chosen.any():
                assert values[chosen].abs().max() > 0.1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("num_levels", "size", "edge", "start", "stop"),
    [(2, 32, 16, 4, 28), (3, 40, 24, 5, 39), (3, 33, 16, 0, 33), (4, 65, 48, 16, 65)],
)
def test_kept_set_survives_cropping(num_levels, size, edge, start, stop, axis):
    grid = half_empty(num_levels, size, edge=edge, axis=axis)
    rendered, unmasked = grid()[0], grid(threshold=-10.0)[0]
    window = (slice(None), slice(start, stop), slice(start, stop))
    grid.crop((start, start), (stop, stop))
    assert_dropped_from(grid, num_levels, edge - start, axis)
    torch.testing.assert_close(grid()[0], rendered[window], rtol=1e-4, atol=1e-5)
    bands = grid.transform.forward(unmasked[window])
    for values, logits, wanted in zip(
        list(grid.coefficients)[1:], list(grid.logits)[1:], bands.details, strict=True
    ):
        chosen = logits < 0
        torch.testing.assert_close(values[chosen], wanted[chosen], rtol=1e-4, atol=1e-5)
        assert values[chosen].abs().max() > 0.1


def test_logits_go_with_their_coefficients():
    """Cropping by whole strides moves every mask with its coefficient, values included."""
    grid = CoefficientGrid(torch.randn(2, 32, 24), transform("wavelet", 2, "haar"), None, True)
    before = []
    for logits in grid.logits:
        logits.data = torch.rand_like(logits) + 0.01
        before.append(logits.data.clone())
    grid.crop((8, 4), (24, 20))
    for level, (logits, old) in enumerate(zip(grid.logits, before, strict=True)):
        stride = 2 ** (2 - max(level - 1, 0))
        rows, columns = (slice(a // stride, a // stride + 16 // stride) for a in (8, 4))
        assert torch.equal(logits.data, old[:, :, rows, columns])


def test_masks_of_lines_and_spatial_planes_stay_at_their_nodes():
    for size, new in (((9,), (17,)), ((5, 9), (9, 17))):
        grid = CoefficientGrid(torch.randn(2, *size), transform("identity"), None, True)
        scatter_masks(grid, 0.5)
        before = grid.logits[0].data.clone()
        grid.upsample(new)
        nodes = (slice(None), slice(None), *(slice(None, None, 2) for _ in size))
        assert torch.equal(grid.logits[0].data[nodes], before)


def test_masks_of_frequencies_keep_their_frequency():
    """Twice the texels along a side hold the same waves along it, and finer ones."""
    size = 16
    low = torch.zeros(2, size, size)
    low[:, :4, :4] = torch.randn(2, 4, 4)
    dct = transform("dct")
    grid = CoefficientGrid(dct.inverse(Bands(low, ()), (size, size)), dct, None, True)
    grid.logits[0].data.fill_(-1.0)
    grid.logits[0].data[:, 0, :4, :4] = 1.0
    grid.upsample((31, 31))
    kept = grid.logits[0].data[:, 0] == 1.0
    assert kept[:, :4, :4].all()
    assert not kept[:, 5:].any() and not kept[:, :, 5:].any()
    # Half of the length: half of the waves.
    grid.logits[0].data[:] = torch.where(kept, 1.0, -1.0)[:, None]
    grid.crop((0, 0), (16, 16))
    kept = grid.logits[0].data[:, 0] == 1.0
    assert kept[:, :2, :2].all() and not kept[:, 3:].any() and not kept[:, :, 3:].any()


def test_needed_coefficients_reopen_on_trial():
    """What the resampled plane needs and a mask would drop comes back, just above the threshold."""
    grid = CoefficientGrid(torch.full((1, 9), 1.0), transform(), None, True)
    grid.logits[0].data[..., 4] = -1.0
    grid.upsample((25,))
    # Node 12 is the dropped one; 11 and 13 lie nearest to it, but a third of the way to 1.
    shown = torch.tensor([1, 2 / 3, 1 / 3, 0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(grid()[0][0, 9:16], shown)
    logits = torch.ones(25)
    logits[12], logits[11], logits[13] = -1.0, REOPENED_LOGIT, REOPENED_LOGIT
    assert torch.equal(grid.logits[0].data[0, 0], logits)


def test_what_is_needed_is_what_the_levels_quantiser_tells_from_zero():
    grid = CoefficientGrid(torch.full((1, 9), 1.0), transform(), 8, True)
    grid.set_largest([1])
    grid.logits[0].data[..., 4] = -1.0
    grid.upsample((25,))
    # A third of the way to 1 would be rounded to zero.
    assert grid.logits[0].data[0, 0, 10:15].tolist() == [1, -1, -1, -1, 1]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("how", ["upsample", "crop", "load"])
def test_parameters_stay_and_train_while_the_last_loss_is_held(name, how):
    """Torch's gradient accumulator outlives a change of shape while any graph holds it."""
    grid = factorised((7, 10, 13), name)
    parameters = list(grid.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    points = random_points(50)
    loss = grid.features(grid()[0], points).square().sum()
    loss.backward()
    held = loss

    if how == "upsample":
        grid.upsample((11, 12, 17))
    elif how == "crop":
        grid.crop((1, 2, 3), (6, 9, 12))
    else:
        grid.load_state_dict(factorised((6, 5, 9), name).state_dict())
    assert all(p is q for p, q in zip(parameters, grid.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in parameters)
    assert all(p.dtype == torch.float32 and is_dense(p) for p in parameters)

    before = [p.detach().clone() for p in parameters]
    grid.features(grid()[0], points).square().sum().backward()
    assert held.requires_grad
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    optimiser.step()
    assert all(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_of_another_resolution_loads(name, kind):
    source = factorised((7, 10, 13), name, kind)
    scatter_masks(source)
    for resolution in ((16, 8, 8), (5, 3, 4)):
        target = factorised(resolution, name, kind)
        result = target.load_state_dict(source.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        assert target.resolution == (7, 10, 13)
        points = random_points(20)
        expected = source.features(source()[0], points)
        assert torch.equal(target.features(target()[0], points), expected)


def test_state_follows_the_size():
    grid = factorised((7, 10, 13))
    grid.upsample((8, 12, 15))
    grid.crop((0, 1, 2), (8, 11, 12))
    fresh = factorised((7, 10, 13))
    fresh.load_state_dict(grid.state_dict())
    assert fresh.resolution == (8, 10, 10)
    sizes = [[part.spatial_size for part in each.grids] for each in (fresh, grid)]
    assert sizes[0] == sizes[1]


def test_resampling_several_times_and_grids_without_masks():
    grid = factorised((5, 6, 7), bits=None, masked=False)
    points = random_points(50)
    before = grid.features(grid()[0], points)
    grid.upsample(doubled((5, 6, 7)))
    grid.upsample(doubled((9, 11, 13)))
    torch.testing.assert_close(grid.features(grid()[0], points), before, rtol=1e-4, atol=1e-5)


# --- boundaries


def test_wrong_shapes_raise():
    grid = factorised((7, 10, 13))
    spatial, _ = grid()
    with pytest.raises(TypeCheckError):
        grid.features(spatial, torch.zeros(5, 2))
    with pytest.raises(TypeCheckError):
        grid.features(spatial, torch.zeros(5, 4, 3))
    with pytest.raises(TypeCheckError):
        grid.features(spatial, torch.zeros(5, 3, dtype=torch.int64))


def run_python(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_field_does_not_need_nerfstudio():
    run_python(
        """
        import sys
        import torch
        from masked_wavelet_nerf import field, masking, planes, rate, rate_control
        from masked_wavelet_nerf import sensitivity, surface, wavelet
        loaded = [m for m in sys.modules if m.split(".")[0] == "nerfstudio"]
        assert not loaded, loaded
        config = field.FieldConfig(num_density_components=1, num_appearance_components=1)
        model = field.WaveletPlaneField(config, (4, 5, 6))
        spatial = model.to_spatial()
        assert model.density(spatial, torch.zeros(3, 3)).shape == (3,)
        assert not [m for m in sys.modules if m.split(".")[0] == "nerfstudio"]
        """
    )


def test_importing_the_package_is_cheap():
    run_python(
        """
        import sys
        import masked_wavelet_nerf
        heavy = {"torch", "nerfstudio", "numpy", "pywt", "masked_wavelet_codec"} & set(sys.modules)
        assert not heavy, heavy
        assert masked_wavelet_nerf.__version__
        """
    )
