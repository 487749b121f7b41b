"""What the coefficients cost: the penalty that training minimises, and an estimate in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

PenaltyName = Literal["mean", "sum"]
"""mean: mean σ(logit), the expected kept fraction, the same at every grid size. sum: the sum of raw
logits, as in the paper's code: unbounded below, and it weighs more the larger the grid."""


def mask_penalty(logits: Sequence[Float[Tensor, "..."]], form: PenaltyName) -> Float[Tensor, ""]:
    """Penalty on open masks, to be weighted with λ.

    Args:
        logits: mask logits of every level of every grid.
        form: see :data:`PenaltyName`.

    Raises:
        ValueError: if there are no logits to penalise.
    """
    if not logits:
        raise ValueError("logits: expected at least one tensor; the model has no masks to penalise")
    if form == "sum":
        return torch.stack([level.sum() for level in logits]).sum()
    total = sum(level.numel() for level in logits)
    return torch.stack([torch.sigmoid(level).sum() for level in logits]).sum() / total


def estimate_bytes(
    kept: Sequence[Int[Tensor, " _"]],
    totals: Sequence[Sequence[int]],
    bits: int,
    num_network_parameters: int,
) -> Float[Tensor, ""]:
    """Bytes of a file in the ``paper`` profile, without its small parts (container, cameras).

    Every level costs the entropy of its mask, one whole number of bytes for each survivor, and the
    networks four bytes a parameter. Stays on the device. The mask's entropy ignores that survivors
    cluster, so the estimate is high rather than low.

    Args:
        kept: kept coefficients per grid and level.
        totals: coefficients per grid and level.
        bits: quantiser width.
        num_network_parameters: parameters of the appearance map and the colour network.
    """
    count = torch.cat(list(kept)).to(torch.float32)
    total = torch.tensor([n for grid in totals for n in grid], dtype=torch.float32)
    total = total.to(count.device, non_blocking=True)
    fraction = count / total
    entropy = torch.special.entr(fraction) + torch.special.entr(1 - fraction)
    mask_bytes = (total * entropy).sum() / (8 * torch.log(torch.tensor(2.0)))
    bytes_per_survivor = 1 if bits <= 8 else 2
    return mask_bytes + count.sum() * bytes_per_survivor + 4 * num_network_parameters
