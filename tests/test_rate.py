"""The penalties and the estimate of bytes, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from masked_wavelet_nerf.rate import estimate_bytes, mask_penalty


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


def entropy_bits(mask: np.ndarray) -> float:
    """Bits of a mask, symbol by symbol, under its own frequency of ones."""
    frequency = mask.mean()
    bits = 0.0
    for kept in mask:
        bits -= math.log2(frequency if kept else 1 - frequency)
    return bits


@pytest.mark.parametrize(("bits", "width"), [(2, 1), (8, 1), (9, 2), (16, 2)])
def test_estimate_is_entropy_of_masks_plus_survivors_plus_networks(bits, width):
    rng = np.random.default_rng(0)
    grids = [
        [rng.random(n) < fraction for n, fraction in ((40, 0.5), (300, 0.04), (1200, 0.9))],
        [rng.random(77) < 0.2],
    ]
    expected = 4.0 * 123
    for grid in grids:
        for mask in grid:
            expected += entropy_bits(mask) / 8 + width * mask.sum()
    kept = [torch.tensor([int(mask.sum()) for mask in grid]) for grid in grids]
    found = estimate_bytes(kept, [[len(mask) for mask in grid] for grid in grids], bits, 123)
    assert found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_masks_that_are_all_open_or_all_closed_cost_nothing():
    kept = [torch.tensor([0, 50]), torch.tensor([7])]
    assert float(estimate_bytes(kept, [[100, 50], [7]], 8, 10)) == pytest.approx(0 + 57 + 40)


def test_halves_cost_a_bit_each():
    assert float(estimate_bytes([torch.tensor([400])], [[800]], 8, 0)) == pytest.approx(500)
