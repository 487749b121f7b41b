"""What an error in a band costs in rendered pixels: what the steps of its quantiser follow.

Errors e of coefficients v change pixels p by Σ_i e_i ∂p/∂v_i. Taken as independent, they add
h e² each to the mean squared error of pixels, h = mean over pixels of (∂p/∂v)². For random signs
or normal numbers z, one for each pixel, the gradient of Σ z p squared has the mean Σ (∂p/∂v)²:
one backward pass for all coefficients at once (Hutchinson's estimator).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def measure(
    render: Callable[[int], tuple[Float[Tensor, "R 3"], Sequence[Int[Tensor, " _"]]]],
    coefficients: Sequence[Sequence[Tensor]],
    num_draws: int,
) -> list[Float[Tensor, " _"]]:
    """Mean h of the kept coefficients of each level, zero where nothing is kept.

    Args:
        render: the colours of some rays, other ones for every draw, differentiable; and how many
            coefficients of each level of each grid are kept.
        coefficients: levels of each grid; those that are dropped have no gradient.
        num_draws: random projections. As all coefficients of a level share its h, few suffice.

    Returns:
        (levels,) for each grid.
    """
    flat = [level for levels in coefficients for level in levels]
    sums = [torch.zeros((), device=level.device) for level in flat]
    kept: list[Tensor] = []
    for draw in range(num_draws):
        with torch.enable_grad():
            pixels, counts = render(draw)
            generator = torch.Generator(device=pixels.device).manual_seed(draw)
            signs = torch.randn(pixels.shape, generator=generator, device=pixels.device)
            gradients = torch.autograd.grad((signs * pixels).sum() / pixels.numel() ** 0.5, flat)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.square().sum() / num_draws
        kept = list(counts)
    means = torch.stack(sums) / torch.cat(kept).clamp(min=1)
    return list(means.split([len(levels) for levels in coefficients]))
