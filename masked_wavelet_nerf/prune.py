"""Magnitude pruning of a trained run: what trained masks are compared with."""

from __future__ import annotations

import torch

from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.planes import INITIAL_LOGIT
from masked_wavelet_nerf.wavelet import WaveletTransform


@torch.no_grad()
def prune(model: MaskedWaveletModel, keep: float) -> None:
    """Drops the smallest coefficients of all planes and lines, whatever their masks say.

    Magnitudes are those of the transform, without the factors that finer levels are stored with:
    by Parseval's theorem the squares that are dropped are about the error of the planes.

    Args:
        model: with masks; those of what is kept are opened, all others closed.
        keep: share of the coefficients, in (0, 1].

    Raises:
        UserError: if the share is another, or the model has no masks.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep}: expected a share in (0, 1]")
    grids = list(model.field.grids().values())
    if not all(len(grid.logits) for grid in grids):
        raise UserError("keep: needs a run with masks; train with --pipeline.model.mask-weight 0")
    magnitudes = []
    for grid in grids:
        transform = grid.transform
        scaled = isinstance(transform, WaveletTransform) and transform.level_scaling
        for level, values in enumerate(grid.coefficients):
            magnitudes.append(values.abs() / (level + 1 if scaled and level else 1))
    everything = torch.cat([values.flatten() for values in magnitudes])
    smallest = everything.sort(descending=True).values[max(1, round(keep * len(everything))) - 1]
    logits = [level for grid in grids for level in grid.logits]
    for level, values in zip(logits, magnitudes, strict=True):
        level.copy_((values >= smallest) * 2 * INITIAL_LOGIT - INITIAL_LOGIT)
    model.refresh()
