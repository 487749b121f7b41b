"""Contraction, spacing and proposals of unbounded scenes, against nerfstudio and slow loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from guards import assert_guards, guarded
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.field_components.spatial_distortions import SceneContraction
from nerfstudio.model_components.ray_samplers import (
    PDFSampler,
    UniformLinDispPiecewiseSampler,
)

from masked_wavelet_nerf import native, native_kernels, unbounded
from masked_wavelet_nerf.unbounded import (
    contract,
    distance_at,
    proposal,
    propose,
    spacing_at,
    spacings,
)

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

NEAR, FAR = 0.05, 1000.0


def random_rays(num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    origins = torch.rand(num, 3) - 0.5
    directions = F.normalize(torch.randn(num, 3), dim=-1)
    return origins, directions, torch.full((num, 1), NEAR), torch.full((num, 1), FAR)


def test_contraction_is_nerfstudios_scaled_to_the_cube():
    positions = torch.randn(500, 3) * torch.logspace(-1, 3, 500)[:, None]
    expected = SceneContraction(order=float("inf"))(positions) / 2
    torch.testing.assert_close(contract(positions), expected, atol=1e-6, rtol=0)
    by_hand = torch.tensor([[0.5, -1.0, 0.25], [4.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.25, -0.5, 0.125], [0.875, 0.0, -0.4375], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(contract(by_hand), expected)


def test_contraction_has_the_gradient_of_differences():
    positions = (torch.randn(20, 3, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(contract, (positions,))


def test_spacing_is_nerfstudios_and_inverts():
    distances = torch.tensor([0.0, 0.5, 1.0, 2.0, 50.0])
    torch.testing.assert_close(spacing_at(distances), torch.tensor([0, 0.25, 0.5, 0.75, 0.99]))
    torch.testing.assert_close(distance_at(spacing_at(distances)), distances)
    spacing = UniformLinDispPiecewiseSampler(num_samples=4).spacing_fn
    assert spacing is not None
    torch.testing.assert_close(spacing_at(distances), spacing(distances))


def test_widths_in_spacing_are_differences_of_ends():
    samples = propose(*random_rays(3), 1.0, proposal(torch.zeros(4, 4, 4), 8), 500, None)
    places, widths = spacings(samples)
    torch.testing.assert_close(places, spacing_at(samples.middles))
    ends = [samples.middles + sign * samples.lengths / 2 for sign in (1, -1)]
    near = (ends[0] < 1) | ((ends[1] > 1) & (samples.middles < 20))
    expected = spacing_at(ends[0]) - spacing_at(ends[1])
    torch.testing.assert_close(widths[near], expected[near], rtol=5e-3, atol=0)


def test_a_proposal_is_the_largest_of_all_neighbours():
    density = torch.rand(6, 6, 6)
    found = proposal(density, 3).density
    for x, y, z in itertools.product(range(6), repeat=3):
        around = density[max(0, x - 1) : x + 2, max(0, y - 1) : y + 2, max(0, z - 1) : z + 2]
        assert found[x, y, z] == around.max()


def test_without_density_samples_are_even_in_spacing(backend):
    rays = random_rays(7)
    samples = propose(*rays, 25.0, proposal(torch.zeros(4, 4, 4), 16), 31, None)
    assert samples.ray.tolist() == [r for r in range(7) for _ in range(31)]
    # Quantiles (k + 1/2) / 32 of an even distribution, k = 0 … 31, are the edges.
    low, high = NEAR / 2, 1 - 0.5 / FAR
    edges = distance_at(low + (high - low) * (torch.arange(32) + 0.5) / 32)
    expected = ((edges[1:] + edges[:-1]) / 2).repeat(7)
    torch.testing.assert_close(samples.middles, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(samples.lengths, edges.diff().repeat(7), rtol=1e-3, atol=1e-6)
    origins, directions = rays[0][samples.ray], rays[1][samples.ray]
    positions = origins + directions * samples.middles[:, None]
    torch.testing.assert_close(samples.points, contract(positions), atol=1e-5, rtol=0)


def test_samples_gather_at_a_wall(backend):
    """A wall at x = 0.5: contracted 0.25, between the nodes at 0.2 and 0.3."""
    density = torch.zeros(21, 21, 21)
    density[12] = density[13] = 200.0  # x = 0.2, 0.3
    origins, directions = torch.tensor([[-0.5, 0, 0]]), torch.tensor([[1.0, 0, 0]])
    limits = torch.full((1, 1), NEAR), torch.full((1, 1), FAR)
    samples = propose(origins, directions, *limits, 25.0, proposal(density, 96), 60, None)
    # With its neighbours the wall starts at the node x = 0.1, its cell at 0.05: distance 0.6.
    at_front = (samples.middles > 0.57) & (samples.middles < 0.66)
    share = float(at_front.float().mean())
    assert share == pytest.approx(1 / (1 + unbounded.EVEN_SHARE), abs=0.08)
    assert (samples.middles < 0.55).any() and (samples.middles > 5).any()


def by_loop(origin, direction, density, scale, num_bins, num_samples, jitter) -> list[float]:
    """Edges of one ray, in plain Python."""
    low, high = NEAR / 2, 1 - 0.5 / FAR
    size = len(density)

    def distance(s):
        return 2 * s if s < 0.5 else 0.5 / (1 - s)

    weights, light = [], 1.0
    for i in range(num_bins):
        a, b = (distance(low + (high - low) * (i + j) / num_bins) for j in (0, 1))
        x = [o + d * (a + b) / 2 for o, d in zip(origin, direction, strict=True)]
        m = max(1.0, *(abs(c) for c in x))
        node = [round((c * (1 - 0.5 / m) / m + 1) * (size - 1) / 2) for c in x]
        opacity = 1 - math.exp(-density[tuple(node)] * (b - a) * scale)
        weights.append(light * opacity + unbounded.EVEN_SHARE / num_bins)
        light *= 1 - opacity
    edges = []
    for k in range(num_samples + 1):
        rest = sum(weights) * (k + jitter) / (num_samples + 1)
        for i, weight in enumerate(weights):
            if rest < weight or i == num_bins - 1:
                edges.append(distance(low + (high - low) * (i + rest / weight) / num_bins))
                break
            rest -= weight
    return edges


def test_samples_equal_a_loop(backend):
    origins, directions, nears, fars = random_rays(20)
    density = F.softplus(4 * torch.randn(9, 9, 9) - 4)
    found, jitter = proposal(density, 40), torch.rand(20, 1)
    samples = propose(origins, directions, nears, fars, 3.0, found, 12, jitter)
    nodes = found.density.double().numpy()
    for r in range(20):
        ray = origins[r].tolist(), directions[r].tolist()
        edges = np.array(by_loop(*ray, nodes, 3.0, 40, 12, float(jitter[r])))
        places = spacing_at(torch.from_numpy((edges[1:] + edges[:-1]) / 2)).numpy()
        here = spacing_at(samples.middles[12 * r : 12 * r + 12])
        np.testing.assert_allclose(here.numpy(), places, atol=2e-4)


def test_samples_are_those_of_nerfstudios_pdf_sampler():
    origins, directions, nears, fars = random_rays(50)
    found = proposal(F.softplus(4 * torch.randn(9, 9, 9) - 4), 40)
    start, stop = spacing_at(nears), spacing_at(fars)
    weights = unbounded._weights(origins, directions, start, stop, 3.0, found, True)
    bundle = RayBundle(origins, directions, torch.ones(50, 1), nears=nears, fars=fars)
    first = UniformLinDispPiecewiseSampler(num_samples=40, train_stratified=False).eval()(bundle)
    sampler = PDFSampler(num_samples=12, include_original=False, histogram_padding=0.0).eval()
    theirs = sampler(bundle, first, weights[..., None])
    ours = propose(origins, directions, nears, fars, 3.0, found, 12, None)
    starts, ends = theirs.frustums.starts, theirs.frustums.ends
    expected = spacing_at(((starts + ends) / 2).flatten())
    torch.testing.assert_close(spacing_at(ours.middles), expected, atol=2e-4, rtol=0)


def test_positions_keep_the_gradient_of_rays():
    origins, directions, nears, fars = random_rays(4)
    origins.requires_grad_()
    samples = propose(
        origins, directions, nears, fars, 3.0, proposal(torch.rand(5, 5, 5), 16), 6, None
    )
    samples.points.sum().backward()
    assert origins.grad is not None and float(origins.grad.abs().min()) > 0


def test_no_number_stays_inside(backend):
    origins, directions, nears, fars = random_rays(3)
    origins[1] = math.nan
    samples = propose(
        origins, directions, nears, fars, 3.0, proposal(torch.ones(5, 5, 5), 8), 6, None
    )
    assert samples.points[samples.ray != 1].isfinite().all()


def test_kernel_stays_within_its_arrays():
    rays = [t.numpy() for t in random_rays(3)]
    density = np.random.default_rng(1).random((5, 5, 5)).astype(np.float32)
    whole = [guarded(np.full(12, 7, np.float32), 7) for _ in range(2)]
    points, points_whole = guarded(np.full(36, 7, np.float32), 7)
    spacing = [np.full(3, s, np.float32) for s in (0.025, 0.99, 0.5)]
    numbers = np.float32(3), np.float32(0.01), 8, 4, True
    outputs = whole[0][0], whole[1][0], points.reshape(12, 3)
    native_kernels.proposed_places(rays[0], rays[1], *spacing, density, *numbers, *outputs, 1, 2)
    for array, guard in (*whole, (points, points_whole)):
        assert_guards(guard, 7)
        third = len(array) // 3
        assert (array[:third] == 7).all() and (array[2 * third :] == 7).all()
        assert np.isfinite(array[third : 2 * third]).all()
    assert native.is_enabled()
