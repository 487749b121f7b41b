"""The penalties and the estimate of bytes, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from masked_wavelet_nerf.rate import estimate_bytes, estimate_side_bytes, mask_penalty


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


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_a_model_without_masks_has_nothing_to_penalise(form):
    with pytest.raises(ValueError, match=r"^logits: expected at least one tensor"):
        mask_penalty([], form)


def test_unknown_form_is_refused():
    with pytest.raises(TypeCheckError):
        mask_penalty(logits((2, 1, 3)), "median")


@pytest.mark.parametrize(("bits", "of_value"), [(2, 1), (8, 7), (16, 15)])
@pytest.mark.parametrize(("network_bits", "of_weight"), [(None, 32), (8, 6.2), (2, 0.5)])
def test_estimate_is_what_survivors_and_networks_cost(bits, of_value, network_bits, of_weight):
    kept = [torch.tensor([3, 7, 30]), torch.tensor([10])]
    expected = 50 * (0.64 * math.log2(1600 / 50) + of_value) + 123 * of_weight
    found = estimate_bytes(kept, 1600, bits, 123, network_bits)
    assert found.shape == ()
    assert float(found) == pytest.approx(expected / 8, rel=1e-6)


def test_a_model_that_keeps_nothing_costs_its_networks():
    assert float(estimate_bytes([torch.tensor([0, 0])], 100, 8, 10, None)) == 40


def test_the_rest_is_the_surface_of_the_occupancy_cameras_and_a_frame():
    occupied = torch.zeros(6, 7, 8, dtype=torch.bool)
    assert float(estimate_side_bytes(occupied, 100)) == 41 * 100 + 1400
    occupied[1:4, 2:4, 3:7] = True  # 3 × 2 × 4, inside
    faces = 2 * (3 * 2 + 2 * 4 + 3 * 4)
    assert float(estimate_side_bytes(occupied, 0)) == pytest.approx(1400 + faces * 0.46 / 8)
