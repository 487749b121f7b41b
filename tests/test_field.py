"""Density and colour against a straightforward implementation in NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.interpolate import RegularGridInterpolator

from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField, frequency_encoding

RESOLUTION = (6, 9, 7)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make(**settings) -> WaveletPlaneField:
    torch.manual_seed(0)
    config = FieldConfig(
        **{
            "num_density_components": 3,
            "num_appearance_components": 4,
            "appearance_dim": 5,
            "hidden_dim": 8,
            "num_levels": 2,
            **settings,
        }
    )
    field = WaveletPlaneField(config, RESOLUTION)
    for parameter in field.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # zero biases too
    return field


def some_points(num: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(num, 3, generator=generator) * 2 - 1
    directions = torch.randn(num, 3, generator=generator)
    return points, directions / directions.norm(dim=-1, keepdim=True)


def interpolated(array: torch.Tensor, coordinates: np.ndarray) -> np.ndarray:
    """(C, N) from (C, *n), with SciPy; ``coordinates`` in the order of the array's axes."""
    values = np.moveaxis(array.detach().double().numpy(), 0, -1)
    axes = [np.linspace(-1, 1, n) for n in values.shape[:-1]]
    return RegularGridInterpolator(axes, values)(coordinates).T


def features(spatial, points: torch.Tensor, config: FieldConfig) -> np.ndarray:
    at = points.double().numpy()
    if config.planes == "voxels":
        return interpolated(spatial.volumes[0], at[:, ::-1])
    planes = [
        interpolated(plane, at[:, [second, first]])
        for plane, (first, second) in zip(spatial.planes, ((0, 1), (0, 2), (1, 2)), strict=True)
    ]
    if config.planes == "vm":
        lines = [
            interpolated(line, at[:, [axis]])
            for line, axis in zip(spatial.lines, (2, 1, 0), strict=True)
        ]
        return np.concatenate([p * q for p, q in zip(planes, lines, strict=True)])
    return np.prod(planes, axis=0) if config.reduce == "product" else np.sum(planes, axis=0)


def encoded(values: np.ndarray, num_frequencies: int) -> np.ndarray:
    sines, cosines = [], []
    for channel in values.T:
        for k in range(num_frequencies):
            sines.append(np.sin(2**k * channel))
            cosines.append(np.cos(2**k * channel))
    return np.array(sines + cosines).reshape(-1, len(values)).T


def density_by_hand(field: WaveletPlaneField, points: torch.Tensor) -> np.ndarray:
    summed = features(field.to_spatial().density, points, field.config).sum(axis=0)
    return np.logaddexp(0, summed + field.config.density_shift)


def colour_by_hand(field: WaveletPlaneField, points, directions) -> np.ndarray:
    weights = {name: p.detach().double().numpy() for name, p in field.named_parameters()}
    found = features(field.to_spatial().appearance, points, field.config)
    a = (weights["appearance_map.weight"] @ found).T
    d = directions.double().numpy()
    num = field.config.num_frequencies
    x = np.concatenate((a, d, encoded(a, num), encoded(d, num)), axis=-1)
    for layer in (0, 2, 4):
        name = f"colour_network.{layer}"
        x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        if layer < 4:
            x = np.maximum(x, 0)
    return 1 / (1 + np.exp(-x))


SETTINGS = {
    "vm": {"density_shift": -1.0},
    "texel units": {"texel_units": True, "density_shift": 0.5},
    "product": {"planes": "triplane", "reduce": "product", "density_shift": 0.5},
    "sum": {"planes": "triplane", "reduce": "sum", "transform": "dct"},
    "voxels": {"planes": "voxels", "density_shift": 0.5},
    "spatial voxels": {"planes": "voxels", "transform": "identity"},
    "spatial": {"transform": "identity", "bits": None, "masks": False, "num_frequencies": 0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_density_and_colour_equal_a_plain_implementation(settings):
    field = make(**settings)
    points, directions = some_points()
    spatial = field.to_spatial()
    density = field.density(spatial, points)
    assert density.shape == (60,) and (density >= 0).all()
    expected = density_by_hand(field, points)
    np.testing.assert_allclose(density.detach().numpy(), expected, rtol=1e-4, atol=1e-9)

    colour = field.colour(spatial, points, directions)
    assert colour.shape == (60, 3)
    assert (colour > 0).all() and (colour < 1).all()
    expected = colour_by_hand(field, points, directions)
    assert expected.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(colour.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_default_shift_makes_empty_space_nearly_transparent():
    field = make()
    for grid in field.density_grid.grids:
        for values in grid.coefficients:
            values.data.zero_()
    density = field.density(field.to_spatial(), some_points()[0])
    torch.testing.assert_close(density, torch.full((60,), float(np.log1p(np.exp(-10)))))


def test_frequency_encoding_by_hand():
    found = frequency_encoding(torch.tensor([[0.5, -2.0], [0.0, 1.0]]), 2)
    s, c = np.sin, np.cos
    expected = [
        [s(0.5), s(1.0), s(-2.0), s(-4.0), c(0.5), c(1.0), c(-2.0), c(-4.0)],
        [0, 0, s(1.0), s(2.0), 1, 1, c(1.0), c(2.0)],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert frequency_encoding(torch.zeros(4, 3), 0).shape == (4, 0)
    assert frequency_encoding(torch.zeros(0, 3), 2).shape == (0, 12)
    found = frequency_encoding(torch.full((1, 1), 0.1, dtype=torch.float64), 4)
    angles = np.array([0.1, 0.2, 0.4, 0.8])
    np.testing.assert_allclose(found[0].numpy(), np.concatenate((s(angles), c(angles))))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_defaults():
    field = WaveletPlaneField(FieldConfig(), (16, 16, 16))
    layers = [tuple(m.weight.shape) for m in field.colour_network if hasattr(m, "weight")]
    assert layers == [(128, 150), (128, 128), (3, 128)]
    assert tuple(field.appearance_map.weight.shape) == (27, 144)
    assert field.appearance_map.bias is None
    assert count(field.appearance_map) == 3888
    # 150·128 + 128, 128·128 + 128, 128·3 + 3
    assert count(field.colour_network) == 19328 + 16512 + 387
    assert count(field.appearance_map) + count(field.colour_network) == 40115
    # 16 and 48 components; a plane of 16² and a line of 16 each, thrice; values and masks.
    assert count(field.density_grid) == 2 * 3 * 16 * (256 + 16)
    assert count(field.appearance_grid) == 2 * 3 * 48 * (256 + 16)


def test_last_bias_starts_at_grey():
    last = WaveletPlaneField(FieldConfig(), (4, 4, 4)).colour_network[-1]
    assert (last.bias == 0).all()


def test_appearance_map_of_a_triplane_takes_its_components():
    field = make(planes="triplane")
    assert tuple(field.appearance_map.weight.shape) == (5, 4)
    parts = ("density_planes", "appearance_planes")
    assert list(field.grids()) == [f"{part}.{i}" for part in parts for i in range(3)]


def test_grids_are_named_in_the_order_of_their_counts():
    field = make()
    named = field.grids()
    assert list(named) == [
        f"{part}_{kind}.{i}"
        for part in ("density", "appearance")
        for kind in ("planes", "lines")
        for i in range(3)
    ]
    assert named["density_planes.1"].spatial_size == (7, 6)
    assert named["appearance_lines.0"].spatial_size == (7,)
    for index, grid in enumerate(named.values()):
        logits = grid.logits[0].data
        logits.copy_(torch.where(torch.arange(logits.numel()) < index, 1.0, -1.0).view_as(logits))
    assert [int(kept[0]) for kept in field.to_spatial().kept] == list(range(12))


def test_batch_shape_and_order_do_not_matter():
    field = make()
    spatial = field.to_spatial()
    points, directions = some_points()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    density, colour = field.density(spatial, points), field.colour(spatial, points, directions)
    torch.testing.assert_close(field.density(spatial, points[order]), density[order])
    torch.testing.assert_close(
        field.colour(spatial, points[order], directions[order]), colour[order]
    )
    parts = [field.density(spatial, chunk) for chunk in points.split(7)]
    torch.testing.assert_close(torch.cat(parts), density)
    assert field.density(spatial, points[:0]).shape == (0,)
    assert field.colour(spatial, points[:0], directions[:0]).shape == (0, 3)


def test_num_levels_and_threshold_reach_the_grids():
    field = make()
    coarse = field.to_spatial(num_levels=0)
    for shown, grid in zip(coarse.density.planes, field.density_grid.planes, strict=True):
        torch.testing.assert_close(shown, grid(num_levels=0)[0])
    for shown, grid in zip(coarse.appearance.planes, field.appearance_grid.planes, strict=True):
        torch.testing.assert_close(shown, grid(num_levels=0)[0])
    nothing = field.to_spatial(threshold=100.0)
    assert all((p == 0).all() for p in (*nothing.density.planes, *nothing.appearance.lines))
    assert sum(int(kept.sum()) for kept in nothing.kept) == 0


def test_resampling_leaves_density_and_colour():
    field = make(bits=None, density_shift=-1.0)
    points, directions = some_points()
    spatial = field.to_spatial()
    density, colour = field.density(spatial, points), field.colour(spatial, points, directions)
    field.upsample((11, 17, 13))
    assert field.resolution == field.appearance_grid.resolution == (11, 17, 13)
    spatial = field.to_spatial()
    torch.testing.assert_close(field.density(spatial, points), density, rtol=1e-4, atol=1e-5)
    found = field.colour(spatial, points, directions)
    torch.testing.assert_close(found, colour, rtol=1e-4, atol=1e-5)

    start, stop = (2, 1, 5), (11, 12, 13)
    size = torch.tensor((11, 17, 13)) - 1
    low, high = 2 * torch.tensor(start) / size - 1, 2 * (torch.tensor(stop) - 1) / size - 1
    inside = low + (points + 1) / 2 * (high - low)
    density, colour = field.density(spatial, inside), field.colour(spatial, inside, directions)
    field.crop(start, stop)
    assert field.resolution == field.appearance_grid.resolution == (9, 11, 8)
    spatial = field.to_spatial()
    torch.testing.assert_close(field.density(spatial, points), density, rtol=1e-4, atol=1e-5)
    found = field.colour(spatial, points, directions)
    torch.testing.assert_close(found, colour, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    field = make(density_shift=-1.0)
    points, directions = some_points(400)
    spatial = field.to_spatial()
    total = field.density(spatial, points).sum() + field.colour(spatial, points, directions).sum()
    total.backward()
    for name, parameter in field.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_wrong_shapes_raise():
    field = make()
    spatial = field.to_spatial()
    with pytest.raises(TypeCheckError):
        field.density(spatial, torch.zeros(5, 2))
    with pytest.raises(TypeCheckError):
        field.colour(spatial, torch.zeros(5, 3), torch.zeros(4, 3))
    with pytest.raises(TypeCheckError):
        frequency_encoding(torch.zeros(5), 2)
