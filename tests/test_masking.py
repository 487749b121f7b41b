"""Masks and the quantiser, against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from masked_wavelet_nerf.masking import (
    RoundedLinear,
    keep,
    largest_integer,
    masked_quantise,
    quantise_to_integers,
    quantiser_step,
    round_to_integers,
)

# A kept maximum at 2.0 and a larger one, 5.0, that the mask drops.
VALUES = np.array([0.3, -1.21, 2.0, 5.0, -0.004, 0.0, -1.99, 0.77])
LOGITS = np.array([1.0, 0.0, 0.5, -0.5, 2.0, -3.0, -1e-6, 4.0])


def band(array: np.ndarray) -> torch.Tensor:
    """(C, B, n) = (2, 1, 4) as a leaf."""
    return torch.tensor(array, dtype=torch.float32).view(2, 1, 4).requires_grad_()


def reference(values, logits, bits, threshold=0.0):
    """(step, integers, H) in float64, element by element."""
    kept = [True if logits is None else logits[i] >= threshold for i in range(len(values))]
    if bits is None:
        return None, None, np.array(kept)
    largest = 2 ** (bits - 1) - 1
    top = max((abs(v) for v, k in zip(values, kept, strict=True) if k), default=0.0)
    step = top / largest if top > 0 else 1.0
    integers = [min(max(round(v / step), -largest), largest) for v in values]
    return step, np.array(integers), np.array(kept)


def integers_of(bits):
    return None if bits is None else largest_integer(bits)


@pytest.mark.parametrize("bits", [None, 2, 5, 8, 16])
@pytest.mark.parametrize("with_logits", [True, False], ids=["masks", "open"])
def test_forward_is_step_times_integer_times_mask(bits, with_logits):
    logits = LOGITS if with_logits else None
    step, integers, kept = reference(VALUES, logits, bits)
    shown, mask = masked_quantise(
        band(VALUES), None if logits is None else band(logits), integers_of(bits)
    )
    expected = (VALUES if bits is None else step * integers) * kept
    np.testing.assert_allclose(shown.detach().numpy().ravel(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(mask.numpy().ravel(), kept)


INCOMING = {
    "ones": np.ones(8),
    "negative": -np.ones(8),
    "other": np.array([2.5, -0.3, 1e-3, -7.0, 100.0, 0.0, -1.0, 0.2]),
}


@pytest.mark.parametrize("incoming", list(INCOMING))
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("with_logits", [True, False], ids=["masks", "open"])
@pytest.mark.parametrize("threshold", [0.0, 0.75])
def test_gradients_are_the_straight_through_closed_form(incoming, bits, with_logits, threshold):
    grad = INCOMING[incoming]
    values, logits = band(VALUES), band(LOGITS)
    shown, _ = masked_quantise(
        values, logits if with_logits else None, integers_of(bits), threshold
    )
    shown.backward(torch.tensor(grad, dtype=torch.float32).view(2, 1, 4))

    step, integers, kept = reference(VALUES, LOGITS if with_logits else None, bits, threshold)
    np.testing.assert_allclose(values.grad.numpy().ravel(), grad * kept, rtol=1e-6)
    if not with_logits:
        assert logits.grad is None
        return
    sigmoid = 1 / (1 + np.exp(-LOGITS))
    before_mask = VALUES if bits is None else step * integers
    expected = grad * before_mask * sigmoid * (1 - sigmoid)
    np.testing.assert_allclose(logits.grad.numpy().ravel(), expected, rtol=2e-5, atol=1e-9)
    # A dropped coefficient can come back: with 8 bits the one at 5.0 (clipped to 2.0) is not deaf.
    assert grad[3] == 0 or logits.grad.view(-1)[3] != 0


def test_gradient_of_logits_equals_that_of_a_soft_mask_without_quantiser():
    values, logits = band(VALUES), band(LOGITS)
    weights = torch.linspace(-3, 3, 8).view(2, 1, 4)
    soft = (values.detach() * torch.sigmoid(logits) * weights).sum()
    (expected,) = torch.autograd.grad(soft, logits)
    hard = (masked_quantise(values, logits, None)[0] * weights).sum()
    torch.testing.assert_close(torch.autograd.grad(hard, logits)[0], expected)


def test_only_the_gradients_that_are_needed_are_computed():
    values, logits = band(VALUES), band(LOGITS)
    shown, _ = masked_quantise(values.detach(), logits, 127)
    shown.sum().backward()
    assert values.grad is None and logits.grad is not None
    shown, _ = masked_quantise(values, logits.detach(), 127)
    shown.sum().backward()
    assert values.grad is not None


def test_inputs_are_left_alone():
    values, logits = band(VALUES), band(LOGITS)
    masked_quantise(values, logits, 127)[0].sum().backward()
    quantise_to_integers(values, logits, 127)
    np.testing.assert_array_equal(values.detach().numpy().ravel(), VALUES.astype(np.float32))
    np.testing.assert_array_equal(logits.detach().numpy().ravel(), LOGITS.astype(np.float32))


def test_largest_integer():
    assert [largest_integer(bits) for bits in (2, 3, 8, 16)] == [1, 3, 127, 32767]


@pytest.mark.parametrize("bits", [-8, 0, 1, 17, 32])
def test_largest_integer_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=rf"^bits: expected 2 to 16, got {bits}; set bits to None"):
        largest_integer(bits)


def test_step_looks_at_kept_coefficients_only():
    values, logits = band(VALUES), band(LOGITS)
    step = quantiser_step(values, keep(logits, values), 127)
    assert step.shape == () and not step.requires_grad
    assert float(step) == np.float32(2.0) / np.float32(127)
    everything = quantiser_step(values, keep(None, values), 127)
    assert float(everything) == np.float32(5.0) / np.float32(127)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_extremes_are_exact_and_nothing_kept_is_clipped(bits):
    values, logits = band(VALUES), band(LOGITS)
    stored = quantise_to_integers(values, logits, integers_of(bits))
    largest = largest_integer(bits)
    assert stored.values.abs().max() == largest
    kept = (logits >= 0).detach()
    error = (stored.values * stored.step - values.detach())[kept].abs()
    assert error.max() <= stored.step / 2 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("values", "logits"),
    [
        (np.zeros(8), np.ones(8)),
        (VALUES, -np.ones(8)),
        # Smaller than float32 can divide: the step underflows to zero.
        (np.array([0, 1e-45, -1e-44, 3e-44, 0, 0, 0, 0]), np.ones(8)),
    ],
    ids=["zero", "dropped", "denormal"],
)
def test_bands_without_content_stay_finite(values, logits):
    v, m = band(values), band(logits)
    stored = quantise_to_integers(v, m, 127)
    assert stored.step == 1
    assert not stored.values.any() and not stored.mask.any()
    shown, _ = masked_quantise(v, m, 127)
    assert (shown == 0).all()
    shown.sum().backward()
    assert torch.isfinite(v.grad).all() and torch.isfinite(m.grad).all()


@pytest.mark.parametrize("bits", [2, 6, 8, 11, 16])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 3e4])
@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 3, 4, 4), (4, 1, 9)])
def test_integers_equal_the_float_path_exactly(bits, scale, shape):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(shape, generator=generator) * scale
    logits = torch.randn(shape, generator=generator)
    for masks in (logits, None):
        stored = quantise_to_integers(values, masks, integers_of(bits))
        shown, kept = masked_quantise(values, masks, integers_of(bits))
        assert stored.values.dtype == torch.int16
        assert torch.equal(stored.values.float() * stored.step, shown)
        assert torch.equal(stored.mask, kept & (shown != 0))
        assert torch.equal(stored.mask, stored.values != 0)
        # Quantising what was quantised changes nothing, the step included.
        again = quantise_to_integers(shown, masks, integers_of(bits))
        assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))


@pytest.mark.parametrize("bits", [None, 8])
def test_open_mask_equals_no_mask(bits):
    masked, free = band(VALUES), band(VALUES)
    weights = torch.linspace(-1, 2, 8).view(2, 1, 4)
    one, kept = masked_quantise(masked, band(np.zeros(8)), integers_of(bits))
    other, everything = masked_quantise(free, None, integers_of(bits))
    assert torch.equal(one, other) and torch.equal(kept, everything) and kept.all()
    (one * weights).sum().backward()
    (other * weights).sum().backward()
    assert torch.equal(masked.grad, free.grad)


@pytest.mark.parametrize("threshold", [-10.0, -0.5, 0.0, 0.5, 1.0, 10.0])
def test_threshold_drops_what_lies_below_it(threshold):
    logits = band(LOGITS)
    kept = keep(logits, logits, threshold)
    np.testing.assert_array_equal(
        kept.numpy().ravel(), LOGITS.astype(np.float32) >= np.float32(threshold)
    )
    shown, mask = masked_quantise(band(VALUES), logits, None, threshold)
    assert torch.equal(mask, kept)
    assert (shown[~kept] == 0).all()


@pytest.mark.parametrize(
    "wrong", [(2, 1, 5), (2, 4), (1, 1, 4)], ids=["n differs", "no bands", "C differs"]
)
def test_wrong_shape_raises(wrong):
    with pytest.raises(TypeCheckError):
        masked_quantise(band(VALUES), torch.zeros(wrong), 127)


# --- networks


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_rounded_weights_are_integers_times_one_step(bits):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    integers, step = round_to_integers(values, bits)
    largest = 2 ** (bits - 1) - 1
    assert float(integers.abs().max()) == largest
    assert torch.equal(integers, integers.round())
    torch.testing.assert_close(step, values.abs().max() / largest)
    assert float((integers * step - values).abs().max()) <= float(step) / 2 * (1 + 1e-5)
    again, same = round_to_integers(integers * step, bits)
    assert torch.equal(again, integers)
    torch.testing.assert_close(same, step)


def test_a_network_of_zeros_stays_one():
    integers, step = round_to_integers(torch.zeros(3), 8)
    assert integers.tolist() == [0, 0, 0] and step == 1


@pytest.mark.parametrize("bias", [False, True])
def test_rounded_linear_rounds_in_evaluation_and_once_told_to(bias):
    torch.manual_seed(0)
    layer = RoundedLinear(6, 4, bias=bias, bits=3)
    inputs = torch.randn(9, 6)
    exact = inputs.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    weight, step = round_to_integers(layer.weight, 3)
    rounded = inputs.double() @ (weight * step).double().T
    if bias:
        integers, step = round_to_integers(layer.bias, 3)
        rounded = rounded + (integers * step).double()
    assert float((rounded - exact).abs().max()) > 0.05
    torch.testing.assert_close(layer(inputs).double(), exact, rtol=1e-5, atol=1e-6)
    for prepare in (layer.eval, lambda: setattr(layer.train(), "is_rounding", True)):
        prepare()
        torch.testing.assert_close(layer(inputs).double(), rounded, rtol=1e-5, atol=1e-6)


def test_gradients_pass_straight_through_the_rounding():
    torch.manual_seed(0)
    layer = RoundedLinear(6, 4, bits=3)
    layer.is_rounding = True
    inputs, incoming = torch.randn(9, 6), torch.randn(9, 4)
    layer(inputs).backward(incoming)
    torch.testing.assert_close(layer.weight.grad, incoming.T @ inputs)
    torch.testing.assert_close(layer.bias.grad, incoming.sum(dim=0))


def test_without_bits_nothing_is_rounded_and_checkpoints_are_those_of_linear():
    layer = RoundedLinear(6, 4).eval()
    layer.is_rounding = True
    assert layer.used()[0] is layer.weight and layer.used()[1] is layer.bias
    assert set(layer.state_dict()) == set(torch.nn.Linear(6, 4).state_dict())
