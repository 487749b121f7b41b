"""Penalties, prices, quantisers and the estimate of bytes, against NumPy and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.optimize import minimize_scalar

from masked_wavelet_nerf.rate import (
    estimate_coefficient_bytes,
    estimate_network_bytes,
    estimate_side_bytes,
    mask_penalty,
    suited_integers,
    to_prices,
)


def logits(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [(2 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]


def test_mean_is_the_expected_kept_fraction():
    levels = logits((2, 1, 3, 4), (2, 3, 6, 8), (5, 1, 7))
    penalty = mask_penalty(levels, "mean")
    every = np.concatenate([level.detach().double().numpy().ravel() for level in levels])
    sigmoid = 1 / (1 + np.exp(-every))
    assert float(penalty) == pytest.approx(sigmoid.mean(), rel=1e-6)

    (3 * penalty).backward()
    slope = 3 * sigmoid * (1 - sigmoid) / len(every)
    found = np.concatenate([level.grad.numpy().ravel() for level in levels])
    np.testing.assert_allclose(found, slope, rtol=1e-5)


def test_sum_is_that_of_raw_logits():
    levels = logits((2, 1, 3, 4), (2, 3, 6, 8), (5, 1, 7))
    penalty = mask_penalty(levels, "sum")
    total = sum(float(level.detach().double().sum()) for level in levels)
    assert float(penalty) == pytest.approx(total, rel=1e-5)
    (-2 * penalty).backward()
    assert all((level.grad == -2).all() for level in levels)


def test_rate_is_the_sum_of_logits_times_prices_in_units_of_ten_bits():
    levels = logits((2, 1, 3, 4), (2, 3, 6, 8), (5, 1, 7))
    rng = np.random.default_rng(0)
    bits = [rng.uniform(-5, 40, tuple(level.shape)).astype(np.float32) for level in levels]
    prices = [to_prices(some) for some in bits]
    penalty = mask_penalty(levels, "rate", prices)
    # In eighths of a bit, 1 to 255 of them.
    weights = [np.rint(8 * some).clip(1, 255) / 80 for some in bits]
    total = sum(
        (level.detach().double().numpy() * weight).sum()
        for level, weight in zip(levels, weights, strict=True)
    )
    assert float(penalty) == pytest.approx(total, rel=1e-5)
    (3 * penalty).backward()
    for level, weight in zip(levels, weights, strict=True):
        np.testing.assert_allclose(level.grad.numpy(), 3 * weight, rtol=1e-6)
    with pytest.raises(ValueError, match="shorter"):
        mask_penalty(levels, "rate", prices[:2])


def test_rate_without_prices_is_the_sum():
    levels = logits((2, 1, 3, 4), (2, 3, 6, 8))
    penalty = mask_penalty(levels, "rate")
    assert float(penalty) == float(mask_penalty(levels, "sum"))
    penalty.backward()
    assert all((level.grad == 1).all() for level in levels)
    usual = [torch.full(level.shape, 80, dtype=torch.uint8) for level in levels]
    torch.testing.assert_close(mask_penalty(levels, "rate", usual), penalty)


@pytest.mark.parametrize(
    ("bits", "price"),
    [(10.0, 80), (0.125, 1), (0.2, 2), (31.8, 254), (32.0, 255), (1e6, 255), (0.0, 1), (-9.0, 1)],
)
def test_prices_are_eighths_of_bits_and_never_less_than_one(bits, price):
    found = to_prices(np.full((2, 1, 3), bits, np.float32))
    assert found.dtype == torch.uint8 and found.shape == (2, 1, 3)
    assert (found == price).all()


@pytest.mark.parametrize("weight", [1e-12, 3e-10, 1e-8])
def test_suited_integers_minimise_what_errors_and_bits_cost(weight):
    rng = np.random.default_rng(1)
    extremes, sensitivities = 10 ** rng.uniform(-1, 1, 30), 10 ** rng.uniform(-9, -4, 30)
    found = suited_integers(
        torch.tensor(extremes).float(), torch.tensor(sensitivities).float(), weight, 10**6
    )
    for q, extreme, h in zip(found, extremes, sensitivities, strict=True):

        def cost(log_step: float, h: float = h) -> float:
            return h * math.exp(2 * log_step) / 12 - weight * log_step / math.log(2)

        step = math.exp(minimize_scalar(cost, bounds=(-25, 25), method="bounded").x)
        assert abs(q - max(extreme / step, 1)) < 0.5 + 1e-3 * q
    assert len(set(found)) > 5


def test_suited_integers_stay_within_one_and_the_most():
    """Where errors cost nothing, as where nothing is kept, one is enough."""
    extremes = torch.tensor([1.0, 1.0, 1e-6, 1.0, 1e6])
    sensitivities = torch.tensor([1e9, 0.0, 1.0, 1e-30, 1e30])
    assert suited_integers(extremes, sensitivities, 1e-10, 127) == [127, 1, 1, 1, 127]
    with pytest.raises(ValueError, match=r"weight: expected above 0, got 0\.0"):
        suited_integers(extremes, sensitivities, 0.0, 127)


def test_mean_does_not_depend_on_the_grid_size():
    small = logits((2, 3, 4, 4))
    # Every logit 9 times, and the grid cut into two levels of different size.
    large = small[0].detach().repeat(1, 1, 3, 3)
    large = [large[..., :5].requires_grad_(), large[..., 5:].requires_grad_()]
    torch.testing.assert_close(mask_penalty(small, "mean"), mask_penalty(large, "mean"))
    torch.testing.assert_close(9 * mask_penalty(small, "sum"), mask_penalty(large, "sum"))


@pytest.mark.parametrize(("value", "limit"), [(60.0, 1.0), (-60.0, 0.0), (0.0, 0.5)])
def test_mean_stays_between_zero_and_one(value, limit):
    levels = [torch.full((2, 1, 3), value), torch.full((2, 3, 4, 4), value)]
    assert float(mask_penalty(levels, "mean")) == pytest.approx(limit)


@pytest.mark.parametrize("form", ["mean", "sum", "rate"])
def test_a_model_without_masks_has_nothing_to_penalise(form):
    with pytest.raises(ValueError, match=r"^logits: expected at least one tensor"):
        mask_penalty([], form)


def test_unknown_form_is_refused():
    with pytest.raises(TypeCheckError):
        mask_penalty(logits((2, 1, 3)), "median")


@pytest.mark.parametrize(("bits", "of_value"), [(2, 1), (8, 7), (16, 15)])
def test_a_survivor_costs_its_place_and_its_value(bits, of_value):
    kept = [torch.tensor([3, 7, 30]), torch.tensor([10])]
    expected = 50 * (0.64 * math.log2(1600 / 50) + of_value)
    found = estimate_coefficient_bytes(kept, 1600, bits)
    assert found.shape == ()
    assert float(found) == pytest.approx(expected / 8, rel=1e-6)
    assert float(estimate_coefficient_bytes([torch.tensor([0, 0])], 100, bits)) == 0


@pytest.mark.parametrize(("bits", "of_weight"), [(None, 32), (8, 6.2), (2, 0.5)])
def test_weights_of_networks_cost_a_little_less_than_their_bits(bits, of_weight):
    assert estimate_network_bytes(123, bits) == pytest.approx(123 * of_weight / 8)


def test_the_rest_is_the_surface_of_the_occupancy_cameras_and_a_frame():
    occupied = torch.zeros(6, 7, 8, dtype=torch.bool)
    assert float(estimate_side_bytes(occupied, 100)) == 20 * 100 + 1440
    occupied[1:4, 2:4, 3:7] = True  # 3 × 2 × 4, inside
    faces = 2 * (3 * 2 + 2 * 4 + 3 * 4)
    assert float(estimate_side_bytes(occupied, 0)) == pytest.approx(1440 + faces * 0.46 / 8)
