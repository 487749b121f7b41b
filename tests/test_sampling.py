"""Marching, packing and occupancy, against loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from masked_wavelet_nerf import native, sampling
from masked_wavelet_nerf.sampling import (
    OccupancyGrid,
    PackedSamples,
    march,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def occupancy(cells: np.ndarray | torch.Tensor) -> OccupancyGrid:
    grid = OccupancyGrid()
    grid.cells = torch.as_tensor(cells)
    return grid


def random_cells(*size: int, fraction: float = 0.3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < fraction


# --- marching

STEP, NUM_STEPS = 0.07, 60
# Nodes along x, y, z: unequal sides, a cube, flat, one.
CELLS = [(4, 5, 7), (6, 6, 6), (9, 1, 3), (1, 1, 1)]


def random_rays(num: int, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Origins, directions, nears, fars: from around the box; some miss it, some start inside."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.randn(num, 3, generator=generator)
    targets = torch.rand(num, 3, generator=generator) * 3 - 1.5
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    directions *= 0.5 + torch.rand(num, 1, generator=generator)  # grids need not be isotropic
    nears = torch.rand(num, 1, generator=generator)
    fars = nears + 3 * torch.rand(num, 1, generator=generator)
    return origins, directions, nears, fars


def march_by_loop(rays, cells, jitter=None, step=STEP, num_steps=NUM_STEPS):
    """(ray, middle, point) of every sample."""
    found = []
    shape = np.array(cells.shape)
    columns = [t.double().numpy() for t in rays]
    for ray, (origin, direction, (near,), (far,)) in enumerate(zip(*columns, strict=True)):
        shift = 0.5 if jitter is None else float(jitter[ray])
        for i in range(num_steps):
            middle = near + (i + shift) * step
            point = origin + middle * direction
            node = [round(x) for x in (point + 1) / 2 * (shape - 1)]
            inside = all(0 <= a < n for a, n in zip(node, shape, strict=True))
            if middle < far and inside and cells[tuple(node)]:
                found.append((ray, middle, point))
    return found


def assert_samples(found: PackedSamples, expected) -> None:
    assert found.ray.dtype == torch.int64
    assert found.ray.tolist() == [ray for ray, _, _ in expected]
    middles = np.array([middle for _, middle, _ in expected])
    np.testing.assert_allclose(found.middles.numpy(), middles, rtol=1e-6, atol=1e-6)
    points = np.array([point for _, _, point in expected]).reshape(-1, 3)
    np.testing.assert_allclose(found.points.numpy(), points, rtol=1e-5, atol=2e-6)
    assert found.points.dtype == found.middles.dtype == torch.float32


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", CELLS)
@pytest.mark.parametrize("jittered", [False, True])
def test_march_equals_a_loop(size, jittered):
    rays = random_rays(60)
    cells = random_cells(*size, fraction=0.5)
    cells.flat[0] = True  # the single node, too
    jitter = torch.rand(60, 1, generator=torch.Generator().manual_seed(3)) if jittered else None
    expected = march_by_loop(rays, cells, jitter)
    used = {ray for ray, _, _ in expected}
    assert len(expected) > 200 and len(used) > 10
    assert len(used) < 60 or size == (1, 1, 1)
    found = march(*rays, STEP, NUM_STEPS, occupancy(cells), jitter)
    assert found.lengths == STEP
    assert_samples(found, expected)


@pytest.mark.parametrize("size", CELLS)
@pytest.mark.parametrize("jittered", [False, True])
def test_both_backends_march_alike(size, jittered):
    assert native.is_enabled()
    rays = random_rays(400, seed=5)
    grid = occupancy(random_cells(*size, fraction=0.6, seed=1))
    jitter = torch.rand(400, 1, generator=torch.Generator().manual_seed(3)) if jittered else None
    found = march(*rays, STEP, NUM_STEPS, grid, jitter)
    with native.disabled():
        expected = march(*rays, STEP, NUM_STEPS, grid, jitter)
    assert torch.equal(found.ray, expected.ray)
    assert torch.equal(found.middles, expected.middles)
    assert torch.equal(found.points, expected.points)


@pytest.mark.parametrize("places", [1, 3 * NUM_STEPS, 7 * NUM_STEPS + 1, 60 * NUM_STEPS])
def test_marching_a_few_rays_at_a_time_changes_nothing(monkeypatch, places):
    rays, grid = random_rays(60), occupancy(random_cells(5, 7, 4, fraction=0.5))
    jitter = torch.rand(60, 1, generator=torch.Generator().manual_seed(3))
    with native.disabled():
        expected = march(*rays, STEP, NUM_STEPS, grid, jitter)
        monkeypatch.setattr(sampling, "_PLACES", places)
        found = march(*rays, STEP, NUM_STEPS, grid, jitter)
    assert len(expected.ray) > 200
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    assert torch.equal(found.points, expected.points)


@pytest.mark.usefixtures("backend")
def test_march_by_hand():
    origins, directions = torch.tensor([[0.0, -1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    near, far = torch.tensor([[0.5]]), torch.tensor([[1.25]])
    cells = np.ones((2, 3, 2), dtype=bool)
    cells[:, 1] = False  # y within 0.5 of 0
    found = march(origins, directions, near, far, 0.25, 9, occupancy(cells), None)
    assert found.middles.tolist() == []
    cells[:, 1] = True
    found = march(origins, directions, near, far, 0.25, 9, occupancy(cells), None)
    assert found.middles.tolist() == [0.625, 0.875, 1.125]
    assert found.points.tolist() == [[0.0, -0.375, 0.0], [0.0, -0.125, 0.0], [0.0, 0.125, 0.0]]
    # The far end itself is no sample; two places at most.
    zero = torch.zeros(1, 1)
    found = march(origins, directions, near, far, 0.25, 9, occupancy(cells), zero)
    assert found.middles.tolist() == [0.5, 0.75, 1.0]
    found = march(origins, directions, near, far, 0.25, 2, occupancy(cells), zero)
    assert found.middles.tolist() == [0.5, 0.75]


@pytest.mark.usefixtures("backend")
def test_march_without_samples():
    rays = random_rays(20)
    origins, directions, nears, fars = rays
    everywhere, nowhere = occupancy(np.ones((3, 4, 5), bool)), occupancy(np.zeros((3, 4, 5), bool))
    away = torch.full((20, 3), 5.0)
    cases = {
        "empty": (rays, NUM_STEPS, nowhere),
        "empty node": (rays, NUM_STEPS, occupancy(np.zeros((1, 1, 1), bool))),
        "miss": ((away, away, nears, fars), NUM_STEPS, everywhere),
        "far before near": ((origins, directions, fars + 0.1, nears), NUM_STEPS, OccupancyGrid()),
        "far at near": ((origins, directions, nears, nears), NUM_STEPS, OccupancyGrid()),
        "nan far": ((origins, directions, nears, fars * torch.nan), NUM_STEPS, OccupancyGrid()),
        "nan origin": ((origins * torch.nan, directions, nears, fars), NUM_STEPS, everywhere),
        "no steps": (rays, 0, everywhere),
        "no rays": (tuple(t[:0] for t in rays), NUM_STEPS, everywhere),
    }
    for name, (some, num_steps, grid) in cases.items():
        found = march(*some, STEP, num_steps, grid, None)
        assert found.ray.shape == found.middles.shape == (0,), name
        assert found.points.shape == (0, 3), name
    assert len(march(*rays, STEP, NUM_STEPS, everywhere, None).ray) > 100


@pytest.mark.usefixtures("backend")
def test_march_takes_tensors_of_any_layout():
    rays = random_rays(30)
    cells = random_cells(4, 5, 7, fraction=0.5)
    expected = march(*rays, STEP, NUM_STEPS, occupancy(cells), None)
    strided = [torch.stack((t, t * torch.nan), dim=-1)[..., 0] for t in rays]
    assert not any(t.is_contiguous() for t in strided)
    turned = occupancy(torch.as_tensor(cells).permute(2, 0, 1).contiguous().permute(1, 2, 0))
    found = march(*strided, STEP, NUM_STEPS, turned, None)
    for a, b in zip(found, expected, strict=True):
        assert a == b if isinstance(a, float) else torch.equal(a, b)
    # One near and far for all rays.
    near, far = torch.full((30, 1), 0.25), torch.full((30, 1), 2.0)
    one = march(*rays[:2], near, far, STEP, NUM_STEPS, occupancy(cells), None)
    expanded = (near[:1].expand(30, 1), far[:1].expand(30, 1))
    other = march(*rays[:2], *expanded, STEP, NUM_STEPS, occupancy(cells), None)
    assert torch.equal(one.ray, other.ray) and torch.equal(one.points, other.points)


@pytest.mark.usefixtures("backend")
def test_points_carry_gradients_of_the_rays():
    origins, directions, nears, fars = random_rays(10)
    origins, directions = origins.requires_grad_(), directions.requires_grad_()
    found = march(origins, directions, nears, fars, STEP, NUM_STEPS, OccupancyGrid(), None)
    found.points.sum().backward()
    counts = torch.bincount(found.ray, minlength=10).float()
    lengths = torch.zeros(10).index_add(0, found.ray, found.middles)
    torch.testing.assert_close(origins.grad, counts[:, None].expand(-1, 3))
    torch.testing.assert_close(directions.grad, lengths[:, None].expand(-1, 3))


def test_march_shapes_are_checked():
    origins, directions, nears, fars = random_rays(4)
    rest = (STEP, NUM_STEPS, OccupancyGrid())
    with pytest.raises(TypeCheckError):
        march(origins, directions, nears[:, 0], fars, *rest, None)
    with pytest.raises(TypeCheckError):
        march(origins, directions, nears, fars, *rest, torch.zeros(5, 1))
    with pytest.raises(TypeCheckError):
        march(origins, directions[:3], nears, fars, *rest, None)


# --- occupancy


def nodes(size) -> torch.Tensor:
    axes = [torch.linspace(-1, 1, n) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def dilated(values: np.ndarray) -> np.ndarray:
    """Largest of each node and its 26 neighbours."""
    result = np.zeros_like(values)
    for x, y, z in np.ndindex(values.shape):
        around = tuple(slice(max(i - 1, 0), i + 2) for i in (x, y, z))
        result[x, y, z] = values[around].max()
    return result


def test_new_grid_is_occupied_everywhere_inside():
    grid = OccupancyGrid()
    assert not grid.is_known
    inside = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert grid(inside).shape == (4, 5) and grid(inside).all()
    assert grid.occupied_range() == [(0, 0)] * 3
    assert not grid.coarsened().is_known


@pytest.mark.parametrize("size", [(4, 5, 7), (2, 2, 2), (9, 1, 3)])
def test_query_is_the_nearest_node(size):
    cells = random_cells(*size, fraction=0.5)
    points = np.random.default_rng(1).uniform(-1, 1, (400, 3)).astype(np.float32)
    expected = []
    for point in points:
        index = tuple(round((p + 1) / 2 * (n - 1)) for p, n in zip(point, size, strict=True))
        expected.append(cells[index])
    found = occupancy(cells)(torch.from_numpy(points))
    np.testing.assert_array_equal(found.numpy(), expected)
    # Nodes are where they are said to be, whatever the batch's shape.
    np.testing.assert_array_equal(occupancy(cells)(nodes(size)).numpy(), cells)
    assert occupancy(cells)(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("far", [1.9, -1.9, 30.0, -30.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_outside_nothing_is_occupied(axis, far):
    point = torch.zeros(1, 3)
    point[0, axis] = far
    assert not occupancy(np.ones((4, 5, 6), dtype=bool))(point).any()


def test_update_marks_a_node_and_its_26_neighbours():
    grid = OccupancyGrid()
    target = nodes((6, 5, 7))[3, 1, 4]

    def opacity(points):
        return ((points - target).norm(dim=-1) < 1e-3).float() * 0.5

    grid.update(opacity, (6, 5, 7), 0.01)
    expected = np.zeros((6, 5, 7), dtype=bool)
    expected[2:5, 0:3, 3:6] = True
    np.testing.assert_array_equal(grid.cells.numpy(), expected)
    assert grid.is_known
    assert grid.occupied_range() == [(2, 4), (0, 2), (3, 5)]


@pytest.mark.parametrize("chunk", [1 << 18, 40, 1])
def test_update_equals_a_loop(monkeypatch, chunk):
    monkeypatch.setattr(sampling, "_CHUNK", chunk)
    size = (7, 5, 6)
    values = np.random.default_rng(2).random(size).astype(np.float32)
    table = torch.from_numpy(values)

    def opacity(points):
        index = ((points + 1) / 2 * (torch.tensor(size) - 1)).round().long()
        return table[index[:, 0], index[:, 1], index[:, 2]]

    grid = OccupancyGrid()
    grid.update(opacity, size, 0.95)
    np.testing.assert_array_equal(grid.cells.numpy(), dilated(values) >= 0.95)
    assert 0.1 < grid.cells.float().mean() < 0.9


def test_threshold_itself_is_worth_sampling():
    grid = OccupancyGrid()
    grid.update(lambda points: torch.full((len(points),), 0.25), (3, 3, 3), 0.25)
    assert grid.cells.all()
    grid.update(lambda points: torch.full((len(points),), 0.2499), (3, 3, 3), 0.25)
    assert not grid.cells.any() and grid.occupied_range() is None


@pytest.mark.parametrize("size", [(8, 6, 7), (15, 11, 13), (5, 4, 4)])
def test_what_was_empty_is_not_asked_again(size):
    """The density there means nothing; only a neighbour's can bring a node back."""
    cells = np.zeros((8, 6, 7), dtype=bool)
    cells[1:4, 2:5, 1:3] = True
    grid = occupancy(cells)
    asked = []

    def opacity(points):
        asked.append(points)
        return torch.ones(len(points))

    before = grid(nodes(size)).numpy()
    grid.update(opacity, size, 0.5)
    assert occupancy(cells)(torch.cat(asked)).all()
    assert len(torch.cat(asked)) == before.sum()
    np.testing.assert_array_equal(grid.cells.numpy(), dilated(before))

    # Nothing grows where the rim of what was occupied is transparent by now.
    grid = occupancy(cells)
    grid.update(lambda points: torch.zeros(len(points)), size, 0.5)
    assert not grid.cells.any()


def test_occupied_range_equals_numpy():
    for seed in range(5):
        cells = random_cells(6, 7, 5, fraction=0.01, seed=seed)
        where = np.argwhere(cells)
        expected = [(w.min(), w.max()) for w in where.T] if len(where) else None
        assert occupancy(cells).occupied_range() == expected


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("size", [(8, 8, 8), (7, 5, 9), (2, 3, 4), (11, 1, 6), (16, 13, 2)])
def test_coarsened_is_occupied_wherever_the_fine_one_is(size, factor):
    points = torch.rand(6000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # Close to the boundaries between nodes as well.
    points = torch.cat((points, nodes([4 * n + 1 for n in size]).reshape(-1, 3)))
    for seed in range(4):
        cells = random_cells(*size, fraction=0.04, seed=seed)
        cells[tuple(n // 2 for n in size)] = True
        fine = occupancy(cells)
        coarse = fine.coarsened(factor)
        assert coarse.cells.shape == tuple(-(-n // factor) for n in size)
        assert not (fine(points) & ~coarse(points)).any()
        np.testing.assert_array_equal(fine.cells.numpy(), cells)
    assert not occupancy(np.zeros(size, dtype=bool)).coarsened(factor).cells.any()


def test_halved_is_occupied_where_occupied_nodes_are_nearest_to():
    for size in ((7, 5, 9), (8, 6, 2), (1, 3, 11)):
        cells = random_cells(*size, fraction=0.2)
        expected = np.zeros([(n + 1) // 2 for n in size], dtype=bool)
        for place in np.argwhere(cells):
            at = [
                round(Fraction(i * (m - 1), max(n - 1, 1)))
                for i, m, n in zip(place.tolist(), expected.shape, size, strict=True)
            ]
            expected[tuple(at)] = True
        found = occupancy(cells).halved().cells.numpy()
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_coarsened_still_skips():
    cells = np.zeros((32, 32, 32), dtype=bool)
    cells[20, 5, 9] = True
    assert occupancy(cells).coarsened().cells.sum() == 27


@pytest.mark.parametrize(
    ("saved", "present"), [((3, 4, 5), None), ((2, 3, 2), (6, 5, 4)), ((1, 1, 1), (3, 3, 3))]
)
def test_state_of_any_size_loads(saved, present):
    source = occupancy(random_cells(*saved, fraction=0.5))
    target = OccupancyGrid() if present is None else occupancy(random_cells(*present))
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(target.cells, source.cells)
    assert target.cells is not source.cells
    assert target.is_known == (math.prod(saved) > 1)


def test_compiled_loops_march_through_the_cells_as_they_are_now():
    grid, rays = OccupancyGrid(), (torch.zeros(1, 3), torch.tensor([[1.0, 0, 0]]))

    def count() -> int:
        limits = torch.zeros(1, 1), torch.ones(1, 1)
        return len(march(*rays, *limits, 0.25, 4, grid, None).ray)

    assert count() == 4
    grid.cells = torch.zeros(3, 3, 3, dtype=torch.bool)
    assert count() == 0
    grid.cells[1, 1, 1] = True
    assert count() == 2
    assert grid.packed() is grid.packed()
    grid.load_state_dict({"cells": torch.ones(3, 3, 3, dtype=torch.bool)})
    assert count() == 4
    with torch.inference_mode():
        grid.cells = torch.zeros(3, 3, 3, dtype=torch.bool)
        assert count() == 0
