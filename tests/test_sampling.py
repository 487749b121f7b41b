"""Marching, weights and occupancy, against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from masked_wavelet_nerf import sampling
from masked_wavelet_nerf.sampling import OccupancyGrid, march, pack, render_weights


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# --- marching


def test_march_positions_by_hand():
    nears = torch.tensor([[2.0], [0.5]])
    expected = torch.tensor([[2.05, 2.15, 2.25], [0.55, 0.65, 0.75]])
    torch.testing.assert_close(march(nears, 0.1, 3, None), expected)
    jitter = torch.tensor([[0.0], [0.9]])
    expected = torch.tensor([[2.0, 2.1, 2.2], [0.59, 0.69, 0.79]])
    torch.testing.assert_close(march(nears, 0.1, 3, jitter), expected)


def test_march_shapes_are_checked():
    with pytest.raises(TypeCheckError):
        march(torch.zeros(4), 0.1, 3, None)
    with pytest.raises(TypeCheckError):
        march(torch.zeros(4, 1), 0.1, 3, torch.zeros(5, 1))


# --- weights


def weights_by_loop(depths) -> np.ndarray:
    result = np.zeros(np.shape(depths))
    for ray, row in enumerate(depths):
        light = 1.0
        for sample, depth in enumerate(row):
            opacity = -math.expm1(-depth)
            result[ray, sample] = light * opacity
            light *= 1 - opacity
    return result


def random_depths(rays: int = 20, samples: int = 31) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    depths = torch.rand(rays, samples, generator=generator, dtype=torch.float64)
    return depths * torch.logspace(-4, 1, rays, dtype=torch.float64)[:, None]


def test_weights_equal_a_loop_front_to_back():
    depths = random_depths()
    expected = weights_by_loop(depths.tolist())
    np.testing.assert_allclose(render_weights(depths).numpy(), expected, rtol=1e-10, atol=1e-15)
    found = render_weights(depths.float()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_weights_by_hand():
    # Half of the light is lost at each place: 1/2, 1/4, 1/8.
    depths = torch.full((1, 3), math.log(2))
    torch.testing.assert_close(render_weights(depths), torch.tensor([[0.5, 0.25, 0.125]]))


def test_sum_of_weights_is_what_does_not_pass():
    depths = random_depths()
    passed = torch.exp(-depths.sum(dim=-1))
    torch.testing.assert_close(render_weights(depths).sum(dim=-1), 1 - passed)


@pytest.mark.parametrize("wall", [30.0, 1e5, 1e8, 1e30])
def test_a_wall_neither_adds_light_nor_lets_it_pass(wall):
    # In float32 a running sum that takes the wall in and out again forgets what came before it.
    depths = torch.tensor([[0.1, 0.2, wall, 3.0]])
    expected = [1 - math.exp(-0.1), math.exp(-0.1) - math.exp(-0.3), math.exp(-0.3), 0]
    torch.testing.assert_close(
        render_weights(depths), torch.tensor([expected]), atol=1e-6, rtol=1e-6
    )


def test_gradient_of_weights():
    depths = random_depths(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(render_weights, (depths,))


def test_cutting_a_segment_in_two_changes_nothing():
    depths = random_depths()
    halves = torch.stack((0.3 * depths, 0.7 * depths), dim=-1)
    weights = render_weights(halves.flatten(1)).view_as(halves).sum(dim=-1)
    torch.testing.assert_close(weights, render_weights(depths))


def test_empty_places_and_no_places():
    depths = random_depths()
    with_gaps = torch.zeros(depths.shape[0], 2 * depths.shape[1], dtype=depths.dtype)
    with_gaps[:, ::2] = depths
    weights = render_weights(with_gaps)
    assert (weights[:, 1::2] == 0).all()
    torch.testing.assert_close(weights[:, ::2], render_weights(depths))
    assert render_weights(torch.zeros(4, 0)).shape == (4, 0)


def test_weights_need_two_axes():
    with pytest.raises(TypeCheckError):
        render_weights(torch.zeros(3))


# --- packing


def test_pack_equals_a_loop():
    valid = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    expected = [
        (ray * 5 + sample, ray)
        for ray, sample in itertools.product(range(7), range(5))
        if valid[ray, sample]
    ]
    flat, ray = pack(valid)
    assert list(zip(flat.tolist(), ray.tolist(), strict=True)) == expected
    assert torch.equal(valid.flatten()[flat], torch.ones(len(flat), dtype=torch.bool))


def test_pack_of_nothing():
    flat, ray = pack(torch.zeros(3, 4, dtype=torch.bool))
    assert flat.shape == ray.shape == (0,)


# --- occupancy


def occupancy(cells: np.ndarray | torch.Tensor) -> OccupancyGrid:
    grid = OccupancyGrid()
    grid.cells = torch.as_tensor(cells)
    return grid


def random_cells(*size: int, fraction: float = 0.3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < fraction


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
