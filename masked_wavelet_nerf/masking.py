"""Masks and the quantiser: what a stored coefficient becomes before the inverse transform.

The order is quantise → mask → inverse transform (paper, section 3.3). Both steps are piecewise
constant, so both pass gradients straight through:

    q  = clip(round(v / Δ), -Q, Q)            integers
    v̂  = Δ · q · H(m)                         H(m) = 1 where the logit m ≥ 0, else 0
    ∂v̂/∂v := H(m)                             a dropped coefficient gets no gradient
    ∂v̂/∂m := Δ · q · σ'(m)                    σ' = σ(1 - σ): a dropped one can come back

The step Δ of a band is (max |v| over its kept coefficients) / Q, so that the extremes are exact and
nothing that is kept is clipped. Every band has its own Q, 2^(bits-1) - 1 at most: see ``rate``. The
codec stores q and Δ, and Q is the largest |q|: training and file share this quantiser.

A *price* says what keeping a coefficient costs in the file: bits in eighths, uint8, so that 80, ten
bits, is a usual one. See ``rate``.

Letters: C channels, B bands of a level (1 approximation, 3 details), ``*n`` spatial axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PRICES_PER_BIT = 8
USUAL_PRICE = 80
"""What counts as one."""


class QuantisedBand(NamedTuple):
    """Integers of one level of one grid, as the codec stores them."""

    values: Int16[Tensor, "C B *n"]
    """q, zero where the mask drops."""
    mask: Bool[Tensor, "C B *n"]
    """True where the coefficient is kept."""
    step: Float[Tensor, ""]
    """Δ: coefficient = value · step."""


def largest_integer(bits: int) -> int:
    """The largest Q of so many bits.

    Raises:
        ValueError: if ``bits`` is outside 2–16.
    """
    if not 2 <= bits <= 16:
        raise ValueError(
            f"bits: expected 2 to 16, got {bits}; set bits to None to train without a quantiser"
        )
    return 2 ** (bits - 1) - 1


def keep(
    logits: Float[Tensor, "C B *n"] | None, like: Float[Tensor, "C B *n"], threshold: float = 0.0
) -> Bool[Tensor, "C B *n"]:
    """Hard mask ``logits >= threshold``; all True where there are no masks."""
    if logits is None:
        return torch.ones_like(like, dtype=torch.bool)
    return logits >= threshold


def quantiser_step(
    values: Float[Tensor, "*n"], kept: Bool[Tensor, "*n"], largest: int
) -> Float[Tensor, ""]:
    """Δ of a band or weight: max |v| over what is kept, over Q; 1 where nothing is, or all is zero.

    Stays on the device: no host synchronisation.
    """
    # The step is what is tested: it underflows to zero before the largest value does.
    step = torch.where(kept, values.detach().abs(), 0).amax() / largest
    return torch.where(step > 0, step, torch.ones_like(step))


class _MaskedQuantise(torch.autograd.Function):
    """v̂ = Δ · q · H(m) in few passes over memory; gradients as in the module's docstring.

    Returns v̂ and the hard mask.
    """

    @staticmethod
    def forward(ctx, values, logits, largest, threshold):
        kept = keep(logits, values, threshold)
        quantised = values
        if largest is not None:
            step = quantiser_step(values, kept, largest)
            quantised = (values / step).round_().clamp_(-largest, largest).mul_(step)
        shown = torch.where(kept, quantised, 0)  # a product would turn the mask to floats first
        ctx.save_for_backward(kept, logits, quantised)
        ctx.mark_non_differentiable(kept)
        return shown, kept

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, _ = grad_outputs
        kept, logits, quantised = ctx.saved_tensors
        grad_values = torch.where(kept, grad, 0) if ctx.needs_input_grad[0] else None
        grad_logits = None
        if ctx.needs_input_grad[1]:
            probability = torch.sigmoid(logits)
            slope = torch.addcmul(probability, probability, probability, value=-1)
            grad_logits = slope.mul_(quantised).mul_(grad)
        return grad_values, grad_logits, None, None


def masked_quantise(
    values: Float[Tensor, "C B *n"],
    logits: Float[Tensor, "C B *n"] | None,
    largest: int | None,
    threshold: float = 0.0,
) -> tuple[Float[Tensor, "C B *n"], Bool[Tensor, "C B *n"]]:
    """Quantises and masks one band with straight-through gradients.

    Args:
        values: coefficients v.
        logits: mask logits m, or None to keep everything.
        largest: Q, or None to leave values unquantised.
        threshold: logits below it are dropped; 0 in training, the viewer's slider moves it.

    Returns:
        v̂ and the hard mask.
    """
    return _MaskedQuantise.apply(values, logits, largest, threshold)


@torch.no_grad()
def quantise_to_integers(
    values: Float[Tensor, "C B *n"], logits: Float[Tensor, "C B *n"] | None, largest: int
) -> QuantisedBand:
    """The integers behind :func:`masked_quantise`; kept zeros are dropped: nothing changes."""
    kept = keep(logits, values)
    step = quantiser_step(values, kept, largest)
    integers = ((values / step).round_().clamp_(-largest, largest) * kept).to(torch.int16)
    return QuantisedBand(integers, integers != 0, step)


class _Round(torch.autograd.Function):
    """Δ · round(v / Δ), gradients straight through."""

    @staticmethod
    def forward(ctx, values, bits):
        integers, step = round_to_integers(values, bits)
        return integers.mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


def round_to_integers(
    values: Float[Tensor, "*n"], bits: int
) -> tuple[Float[Tensor, "*n"], Float[Tensor, ""]]:
    """Integers of so many bits, as floats, and the step Δ of all of them: max |v| / Q."""
    everything = torch.ones_like(values, dtype=torch.bool)
    step = quantiser_step(values, everything, largest_integer(bits))
    return (values.detach() / step).round_(), step


class RoundedLinear(nn.Linear):
    """A linear map that computes with the integers that a file stores.

    In evaluation always; in training once ``is_rounding`` is set, so that it learns to live with
    them.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, bits: int | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.bits = bits
        self.is_rounding = False

    def used(self) -> tuple[Float[Tensor, "_ _"], Float[Tensor, " _"] | None]:
        """Weight and bias, rounded where they have to be."""
        if self.bits is None or (self.training and not self.is_rounding):
            return self.weight, self.bias
        bias = None if self.bias is None else _Round.apply(self.bias, self.bits)
        return _Round.apply(self.weight, self.bits), bias

    def forward(self, input: Float[Tensor, "*batch _"]) -> Float[Tensor, "*batch _"]:
        """See :class:`torch.nn.Linear`."""
        return F.linear(input, *self.used())
