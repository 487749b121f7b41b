"""Volume rendering of packed samples: weights, their sums and shared colours, against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from guards import assert_guards, guarded
from jaxtyping import TypeCheckError

from masked_wavelet_nerf import native, native_kernels
from masked_wavelet_nerf.sampling import (
    PackedSamples,
    composite,
    render_weights,
    share_colours,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- weights

# Samples of each ray: rays without any, also the first, the last, and all.
COUNTS = [(3, 1, 4), (0, 2, 0, 0, 5, 1), (4, 0), (0, 0, 7, 0), (1,), (31, 17, 0, 29)]


def rays_of(counts) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def weights_by_loop(depths, counts) -> np.ndarray:
    result, rest = [], iter(depths)
    for count in counts:
        light = 1.0
        for depth in itertools.islice(rest, count):
            opacity = -math.expm1(-depth)
            result.append(light * opacity)
            light *= 1 - opacity
    return np.array(result)


def random_depths(num: int, *, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(num, generator=generator, dtype=torch.float64) * 5 - 4
    return 10**exponents


@pytest.mark.parametrize("counts", COUNTS)
def test_weights_equal_a_loop_front_to_back(counts):
    depths = random_depths(sum(counts))
    expected = weights_by_loop(depths.tolist(), counts)
    found = render_weights(depths, rays_of(counts))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-15)
    found = render_weights(depths.float(), rays_of(counts))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_weights_by_hand():
    # Half of the light is lost at each sample: 1/2, 1/4, 1/8; the next ray starts anew.
    depths = torch.full((5,), math.log(2))
    expected = torch.tensor([0.5, 0.25, 0.125, 0.5, 0.25])
    torch.testing.assert_close(render_weights(depths, rays_of((3, 0, 2))), expected)


@pytest.mark.parametrize("counts", COUNTS)
def test_sum_of_weights_is_what_does_not_pass(counts):
    depths, ray = random_depths(sum(counts)), rays_of(counts)
    weights = render_weights(depths, ray)
    total = torch.zeros(2, len(counts), dtype=torch.float64)
    total.index_add_(1, ray, torch.stack((depths, weights)))
    torch.testing.assert_close(total[1], 1 - torch.exp(-total[0]))


@pytest.mark.parametrize("wall", [30.0, 1e5, 1e8, 1e30, math.inf])
def test_a_wall_neither_adds_light_nor_lets_it_pass(wall):
    depths = torch.tensor([0.1, 0.2, wall, 3.0])
    expected = [1 - math.exp(-0.1), math.exp(-0.1) - math.exp(-0.3), math.exp(-0.3), 0]
    found = render_weights(depths, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("wall", [1e5, 1e30, math.inf])
def test_a_wall_in_one_ray_disturbs_no_other(wall):
    counts = (3, 0, 4, 200, 5)
    ray = rays_of(counts)
    depths = random_depths(len(ray)).float().requires_grad_()
    factor = torch.linspace(-1, 1, len(ray))
    clear = render_weights(depths, ray)
    (gradient,) = torch.autograd.grad((clear * factor).sum(), depths)
    with_walls = depths.detach().clone()
    with_walls[5] = with_walls[7:207] = wall
    with_walls.requires_grad_()
    weights = render_weights(with_walls, ray)
    (other,) = torch.autograd.grad((weights * factor).sum(), with_walls)
    elsewhere = (ray != 2) & (ray != 3)
    torch.testing.assert_close(weights[elsewhere], clear[elsewhere], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(other[elsewhere], gradient[elsewhere], rtol=1e-4, atol=1e-6)
    assert torch.isfinite(weights).all() and torch.isfinite(other).all()
    assert weights[7] == 1 and (weights[8:207] == 0).all()


def test_thousands_of_walls_leave_the_last_ray_its_digits():
    # In float32, or with the walls in doubles as they are, a running sum forgets small numbers.
    num_walls = 1_000_000
    ray = torch.cat((torch.zeros(num_walls, dtype=torch.int64), torch.ones(3, dtype=torch.int64)))
    depths = torch.cat((torch.full((num_walls,), 1e9), torch.tensor([0.1, 0.2, 0.3])))
    found = render_weights(depths, ray)[-3:]
    expected = torch.from_numpy(weights_by_loop([0.1, 0.2, 0.3], (3,))).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [(3, 1, 4), (0, 2, 0, 3, 0)])
def test_gradient_of_weights(counts):
    depths = random_depths(sum(counts)).requires_grad_()
    ray = rays_of(counts)
    assert torch.autograd.gradcheck(lambda x: render_weights(x, ray), (depths,))


def test_gradients_stay_within_their_ray():
    counts = (3, 2, 0, 4)
    depths = random_depths(9).requires_grad_()
    weights = render_weights(depths, rays_of(counts))
    (gradient,) = torch.autograd.grad(weights[3:5].sum(), depths)
    assert (gradient[3:5].abs() > 1e-3).all()
    torch.testing.assert_close(gradient[:3], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(gradient[5:], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("counts", COUNTS)
def test_cutting_a_segment_in_two_changes_nothing(counts):
    depths, ray = random_depths(sum(counts)), rays_of(counts)
    halves = torch.stack((0.3 * depths, 0.7 * depths), dim=-1).flatten()
    weights = render_weights(halves, ray.repeat_interleave(2)).view(-1, 2).sum(dim=-1)
    torch.testing.assert_close(weights, render_weights(depths, ray))


def test_samples_of_empty_space_change_nothing():
    depths, ray = random_depths(8), rays_of((3, 1, 4))
    with_gaps = torch.stack((depths, torch.zeros_like(depths)), dim=-1).flatten()
    weights = render_weights(with_gaps, ray.repeat_interleave(2))
    assert (weights[1::2] == 0).all()
    torch.testing.assert_close(weights[::2], render_weights(depths, ray))


@pytest.mark.parametrize("num_rays", [0, 1, 5])
def test_weights_of_no_samples(num_rays):
    depths = torch.zeros(0, requires_grad=True)
    weights = render_weights(depths, torch.zeros(0, dtype=torch.int64))
    assert weights.shape == (0,) and weights.dtype == torch.float32
    weights.sum().backward()
    assert depths.grad.shape == (0,)


def test_weights_need_a_ray_for_each_sample():
    with pytest.raises(TypeCheckError):
        render_weights(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeCheckError):
        render_weights(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


# --- shared colours


def random_samples(
    counts: tuple[int, ...], *, seed: int = 0, varying: bool = False
) -> tuple[PackedSamples, torch.Tensor]:
    """Samples half a unit apart, with gaps among them, and weights from far below to above 0.1."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(counts)
    places = (torch.rand(num, generator=generator) < 0.2).cumsum(0) + torch.arange(num)
    weights = 10 ** (torch.rand(num, generator=generator, dtype=torch.float64) * 3 - 3.5)
    weights[torch.rand(num, generator=generator) < 0.1] = 0
    points = torch.rand(num, 3, generator=generator, dtype=torch.float64)
    middles = 0.5 * places.double()
    lengths = torch.full((num,), 0.5, dtype=torch.float64) if varying else 0.5
    return PackedSamples(rays_of(counts), middles, lengths, points), weights


def shared_by_a_loop(samples: PackedSamples, weights: torch.Tensor, least: float, most: float):
    """(ray, members) of every colour."""
    found: list[tuple[int, list[int]]] = []
    previous, total = None, 0.0
    for i, (ray, weight) in enumerate(zip(samples.ray.tolist(), weights.tolist(), strict=True)):
        if i == 0 or ray != int(samples.ray[i - 1]):
            previous, total = None, 0.0
        if not weight > least:
            previous = None
            continue
        share = math.floor((total + weight / 2) / most) if most else i
        near = i > 0 and float(samples.middles[i] - samples.middles[i - 1]) < 0.75
        if previous == share and near:
            found[-1][1].append(i)
        else:
            found.append((ray, [i]))
        previous, total = share, total + weight
    return found


SAMPLES = [(40, 0, 33, 1, 90), (1,), (0, 0, 5), (200,)]


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("most", [0.0, 0.01, 0.05, 0.4])
@pytest.mark.parametrize("least", [0.0, 1e-3])
@pytest.mark.parametrize("counts", SAMPLES)
def test_shared_colours_equal_a_loop(counts, least, most, varying):
    for seed in range(3):
        samples, weights = random_samples(counts, seed=seed, varying=varying)
        found = share_colours(samples, weights, least, most)
        expected = shared_by_a_loop(samples, weights, least, most)
        assert found.ray.tolist() == [ray for ray, _ in expected]
        shares = [sum(float(weights[i]) for i in members) for _, members in expected]
        np.testing.assert_allclose(found.shares, shares, rtol=1e-12)
        for point, share, (_, members) in zip(found.points, shares, expected, strict=True):
            centre = sum(weights[i] * samples.points[i] for i in members) / share
            torch.testing.assert_close(point, centre)
        if most == 0.4 and counts == (200,):  # far fewer, when they may
            assert len(expected) < 0.8 * int((weights > least).sum())


def test_shared_colours_keep_mass_and_centre():
    """So a colour that is linear in space is rendered exactly."""
    samples, weights = random_samples((60, 50))
    found = share_colours(samples, weights, 0.0, 0.1)
    assert len(found.ray) < 0.8 * len(weights)

    def moments(ray, masses, points):
        values = torch.cat((masses[:, None], masses[:, None] * points), dim=1)
        return torch.zeros(2, 4, dtype=torch.float64).index_add(0, ray, values)

    torch.testing.assert_close(
        moments(*found), moments(samples.ray, weights, samples.points), rtol=1e-12, atol=1e-12
    )


def test_gradients_of_shares_reach_every_weight():
    samples, weights = random_samples((30, 20))
    weights.requires_grad_()
    found = share_colours(samples, weights, 1e-3, 0.1)
    colours = torch.rand(len(found.ray), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((found.shares * colours).sum(), weights)
    expected = torch.zeros_like(weights)
    for colour, (_, members) in zip(
        colours, shared_by_a_loop(samples, weights, 1e-3, 0.1), strict=True
    ):
        expected[members] = colour
    torch.testing.assert_close(gradient, expected)
    assert not found.points.requires_grad


def test_what_is_no_number_shares_with_nobody():
    samples, weights = random_samples((30, 20))
    weights[[3, 35]] = 0
    expected = share_colours(samples, weights, 0.0, 0.1)
    weights[[3, 35]] = torch.nan
    for a, b in zip(share_colours(samples, weights, 0.0, 0.1), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num", [0, 7])
def test_no_weight_no_colour(num):
    samples, _ = random_samples((num,))
    found = share_colours(samples, torch.zeros(num, dtype=torch.float64), 0.0, 0.1)
    assert [len(part) for part in found] == [0, 0, 0] and found.points.shape == (0, 3)


# --- all of it in one go


def in_floats(samples: PackedSamples) -> PackedSamples:
    ray, middles, lengths, points = samples
    lengths = lengths.float() if isinstance(lengths, torch.Tensor) else lengths
    return PackedSamples(ray, middles.float(), lengths, points.float())


def depths_and_samples(counts, *, seed: int = 0, varying: bool = False):
    """Optical depths, and samples in an order of rays; a tenth of them empty."""
    samples, _ = random_samples(counts, seed=seed, varying=varying)
    depths = random_depths(sum(counts), seed=seed) * 0.3
    depths[torch.rand(len(depths), generator=torch.Generator().manual_seed(seed)) < 0.1] = 0
    return depths, samples


def composite_by_loop(samples: PackedSamples, weights, num_rays: int, least: float, most: float):
    """Sums of weights and of weights · distances; (ray, share, centre) of every colour."""
    sums = np.zeros((2, num_rays))
    for ray, weight, middle in zip(samples.ray, weights, samples.middles, strict=True):
        sums[:, ray] += weight * np.array([1, middle])
    colours = []
    for ray, members in shared_by_a_loop(samples, torch.tensor(weights), least, most):
        share = sum(weights[i] for i in members)
        colours.append((ray, share, sum(weights[i] * samples.points[i] for i in members) / share))
    return sums, colours


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize(("least", "most"), [(0.0, 0.0), (1e-3, 0.05), (0.0, 0.4)])
@pytest.mark.parametrize("counts", SAMPLES)
def test_composite_equals_a_loop(counts, least, most, varying):
    depths, samples = depths_and_samples(counts, varying=varying)
    weights = weights_by_loop(depths.tolist(), counts)
    sums, colours = composite_by_loop(samples, weights, len(counts), least, most)
    found = composite(in_floats(samples), depths.float(), len(counts), least, most)
    np.testing.assert_allclose(found.accumulation[:, 0], sums[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.distance[:, 0], sums[1], rtol=1e-5, atol=1e-6)
    assert found.colours.ray.tolist() == [ray for ray, _, _ in colours]
    np.testing.assert_allclose(
        found.colours.shares, [share for _, share, _ in colours], rtol=1e-4, atol=1e-7
    )
    for point, (_, _, centre) in zip(found.colours.points, colours, strict=True):
        np.testing.assert_allclose(point, centre, rtol=1e-4)


def placed(counts) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of samples, ascending along each ray, and widths."""
    generator = torch.Generator().manual_seed(4)
    places = [torch.rand(n, generator=generator, dtype=torch.float64).sort()[0] for n in counts]
    return torch.cat(places), 0.1 * torch.rand(sum(counts), generator=generator).double()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("counts", SAMPLES)
def test_distortion_is_the_sum_over_all_pairs(counts):
    depths, samples = depths_and_samples(counts)
    places, widths = placed(counts)
    weights = torch.from_numpy(weights_by_loop(depths.tolist(), counts))
    expected = []
    for w, s, d in zip(*(t.split(list(counts)) for t in (weights, places, widths)), strict=True):
        pairs = w[:, None] * w * (s[:, None] - s).abs()
        expected.append(float(pairs.sum() + (w * w * d).sum() / 3))
    spacings = places.float(), widths.float()
    found = composite(
        in_floats(samples), depths.float(), len(counts), 0.0, 0.05, spacings
    ).distortion
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-7)
    unplaced = composite(in_floats(samples), depths.float(), len(counts), 0.0, 0.05)
    assert (unplaced.distortion == 0).all()


def test_gradient_of_distortion_is_that_of_differences():
    counts = (9, 0, 5)
    depths, samples = depths_and_samples(counts)
    spacings = placed(counts)
    assert torch.autograd.gradcheck(
        lambda x: composite(samples, x, 3, 0.0, 0.05, spacings).distortion,
        (depths.requires_grad_(),),
    )


def gradient_of_composite(
    depths: torch.Tensor, samples: PackedSamples, num_rays: int, *, is_placed=True, **limits
):
    depths = depths.clone().requires_grad_()
    counts = samples.ray.bincount(minlength=num_rays).tolist()
    places, widths = (t.to(samples.middles) for t in placed(counts))
    spacings = (places, widths) if is_placed else None
    found = composite(samples, depths, num_rays, **limits, spacings=spacings)
    of_rays = found.accumulation, found.distance, found.distortion
    parts = *(part[:, 0] for part in of_rays), found.colours.shares
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(len(t), generator=generator, dtype=torch.float64) for t in parts]
    loss = sum((part * g.to(part)).sum() for part, g in zip(parts, upstream, strict=True))
    (gradient,) = torch.autograd.grad(loss, depths)
    assert not found.colours.points.requires_grad
    return gradient


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("counts", SAMPLES)
def test_gradient_of_composite_equals_that_in_doubles(counts):
    depths, samples = depths_and_samples(counts, seed=5)
    limits = {"least": 1e-3, "most": 0.05}
    expected = gradient_of_composite(depths, samples, len(counts), **limits)  # plain torch
    found = gradient_of_composite(depths.float(), in_floats(samples), len(counts), **limits)
    scale = float(expected.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * scale)


def test_gradient_of_composite_equals_differences():
    # Each sample has its own colour: then nothing but the weights depends on the depths.
    depths, samples = depths_and_samples((7, 0, 9))
    depths = depths.clamp(min=0.01).requires_grad_()

    def sums(x):
        found = composite(samples, x, 3, 0.0, 0.0)
        return found.accumulation, found.distance, found.colours.shares

    assert torch.autograd.gradcheck(sums, (depths,))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wall", [1e5, 1e30, math.inf])
def test_a_wall_in_one_ray_leaves_composites_of_others(wall):
    counts = (30, 40, 20)
    depths, samples = depths_and_samples(counts, seed=2)
    depths, samples = depths.float(), in_floats(samples)
    limits = {"least": 0.0, "most": 0.05}
    clear = composite(samples, depths, 3, **limits)
    gradient = gradient_of_composite(depths, samples, 3, least=0.0, most=0.0)
    depths[40] = wall
    found = composite(samples, depths, 3, **limits)
    torch.testing.assert_close(found.accumulation[[0, 2]], clear.accumulation[[0, 2]])
    assert found.accumulation[1] == pytest.approx(1)
    of_others = [colours.shares[colours.ray != 1] for colours in (found.colours, clear.colours)]
    torch.testing.assert_close(*of_others)
    other = gradient_of_composite(depths, samples, 3, least=0.0, most=0.0)
    assert torch.isfinite(other).all() and (other[41:70] == 0).all()
    assert len(other) == len(gradient)


def test_what_is_no_number_stays_in_its_ray():
    depths, samples = depths_and_samples((30, 40, 20), seed=2)
    depths, samples = depths.float(), in_floats(samples)
    depths[40] = 0
    limits = {"least": 0.0, "most": 0.05}
    clear = composite(samples, depths, 3, **limits)
    expected = gradient_of_composite(depths, samples, 3, is_placed=False, **limits)
    depths[40] = torch.nan
    found = composite(samples, depths, 3, **limits)
    assert found.accumulation.isnan()[:, 0].tolist() == [False, True, False]
    for a, b in zip(found.colours, clear.colours, strict=True):
        assert torch.equal(a, b)
    gradient = gradient_of_composite(depths, samples, 3, is_placed=False, **limits)
    assert gradient.isnan().nonzero()[:, 0].tolist() == [40]
    others = torch.arange(90) != 40
    torch.testing.assert_close(gradient[others], expected[others])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("num_rays", [0, 1, 5])
def test_composite_of_no_samples(num_rays):
    nothing = torch.zeros(0)
    samples = PackedSamples(nothing.long(), nothing, 0.5, torch.zeros(0, 3))
    depths = nothing.clone().requires_grad_()
    found = composite(samples, depths, num_rays, 0.0, 0.05)
    assert found.accumulation.tolist() == found.distance.tolist() == [[0.0]] * num_rays
    assert found.colours.points.shape == (0, 3) and len(found.colours.ray) == 0
    found.accumulation.sum().backward()
    assert depths.grad is not None and depths.grad.shape == (0,)


@pytest.mark.usefixtures("small_work_is_split_too")
def test_composite_of_any_number_of_threads():
    depths, samples = depths_and_samples(SAMPLES[0])
    depths, samples = depths.float(), in_floats(samples)

    def results():
        found = composite(samples, depths, 5, 0.0, 0.05)
        gradient = gradient_of_composite(depths, samples, 5, least=0.0, most=0.05)
        return *found[:2], *found.colours, gradient

    expected = results()
    for num_threads in (2, 3, 29):
        torch.set_num_threads(num_threads)
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)


def test_composite_is_compiled_where_that_is_possible(monkeypatch):
    depths, samples = depths_and_samples((9, 4))
    calls = []
    kernel = native.composite
    monkeypatch.setattr(native, "composite", lambda *a: calls.append(1) or kernel(*a))
    composite(samples, depths, 2, 0.0, 0.05)  # doubles
    floats = in_floats(samples)
    floats.points.requires_grad_()
    composite(floats, depths.float(), 2, 0.0, 0.05)
    assert not calls
    composite(in_floats(samples), depths.float(), 2, 0.0, 0.05)
    assert calls == [1]


def test_compositing_kernels_stay_within_their_arrays():
    """Of the middle one of three rays."""
    counts = (6, 9, 5)
    depths, samples = depths_and_samples(counts)
    bounds = np.array([0, 6, 15, 20])
    arrays = [np.full(20, np.nan, np.float32) for _ in range(4)]
    given = depths, samples.middles, samples.middles / 9, samples.middles / 99
    for array, values in zip(arrays, given, strict=True):
        array[6:15] = values[6:15]
    placed = arrays[2:]
    lengths = np.full(1, 0.5, np.float32)
    wholes = [np.full(20, 7, np.float32), np.full(20, 7, np.float32), np.full(20, 7)]
    (light, light_whole), (weights, weights_whole), (groups, groups_whole) = (
        guarded(whole, 7) for whole in wholes
    )
    per_ray = np.full(3, 7), *np.full((3, 3), 7, np.float32)
    limits = np.float32(0), np.float32(0.05)
    filled = light, weights, groups, *per_ray
    native_kernels.composite(*arrays[:2], lengths, *placed, bounds, *limits, *filled, 1, 2)
    outputs = [(light, light_whole), (weights, weights_whole), (groups, groups_whole)]
    for inner, whole in outputs:
        assert_guards(whole, 7)
        assert (inner[:6] == 7).all() and (inner[15:] == 7).all()
        assert np.isfinite(inner[6:15]).all()
    assert all(part[0] == part[2] == 7 for part in per_ray)
    count = int(per_ray[0][1])
    assert 0 < count == groups[6:15].max() + 1

    shares, shares_whole = guarded(np.zeros(count, np.float32), 7)
    ray, ray_whole = guarded(np.zeros(count, np.int64), 7)
    centres, centres_whole = guarded(np.zeros((count, 3), np.float32), 7)
    points = np.full((20, 3), np.nan, np.float32)
    points[6:15] = samples.points[6:15]
    offsets = np.array([0, 0, count, count])
    out = shares, centres.reshape(count, 3), ray
    native_kernels.share(weights, points, groups, bounds, offsets, *out, 1, 2)
    for whole in (shares_whole, ray_whole, centres_whole):
        assert_guards(whole, 7)
    assert (ray == 1).all() and np.isfinite(centres).all()
    np.testing.assert_allclose(shares.sum(), weights[6:15].sum(), rtol=1e-5)

    gradient, gradient_whole = guarded(np.full(20, 7, np.float32), 7)
    of_sums, of_shares = np.ones((3, 3), np.float32), np.ones(count, np.float32)
    backward = arrays[1], *placed, light, weights, groups, bounds, of_sums, of_shares, gradient
    native_kernels.composite_backward(*backward, 1, 2)
    assert_guards(gradient_whole, 7)
    assert (gradient[:6] == 7).all() and (gradient[15:] == 7).all()
    assert np.isfinite(gradient[6:15]).all()
