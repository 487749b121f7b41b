"""What the coefficients cost: the penalty that training minimises, and an estimate in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
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


_MASK_SHARE = 0.64
_BITS_SAVED = 1.0
_NETWORK_BITS_SAVED = 1.8
_BITS_PER_FACE = 0.46
_BYTES_PER_CAMERA = 41
_REST = 1400
"""How the coder does on trained models; fitted to files of lego_100 of 6 to 8 bits, 95 to 99.5 %
dropped, of which whole files were never more than 5 % off."""


def estimate_bytes(
    kept: Sequence[Int[Tensor, " _"]],
    num_coefficients: int,
    bits: int,
    num_network_parameters: int,
    network_bits: int | None,
) -> Float[Tensor, ""]:
    """Bytes of coefficients and networks in the ``range`` profile.

    A survivor costs a share of log2(all / survivors), for where it is, and a little less than its
    bits; so does a weight of a network. Stays on the device.

    Args:
        kept: kept coefficients per grid and level.
        num_coefficients: all of them.
        bits: quantiser width.
        num_network_parameters: parameters of the appearance map and the colour network.
        network_bits: width of their integers; None for floats.
    """
    count = torch.cat(list(kept)).sum().to(torch.float32)
    where = _MASK_SHARE * torch.log2(num_coefficients / count.clamp(min=1))
    per_weight = 32 if network_bits is None else max(network_bits - _NETWORK_BITS_SAVED, 0.5)
    per_kept = where + max(bits - _BITS_SAVED, 1)
    return (count * per_kept + num_network_parameters * per_weight) / 8


def estimate_side_bytes(occupied: Bool[Tensor, "X Y Z"], num_cameras: int) -> Float[Tensor, ""]:
    """Bytes of what else is in a file: the occupancy's surface, cameras, and the frame."""
    faces = sum((occupied.diff(dim=axis)).sum() for axis in range(3))
    surface = torch.as_tensor(faces, dtype=torch.float32, device=occupied.device)
    return surface * (_BITS_PER_FACE / 8) + _BYTES_PER_CAMERA * num_cameras + _REST
