"""Magnitude pruning, against sorting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.prune import prune


@pytest.mark.parametrize("keep", [0.05, 0.5, 1.0])
def test_the_largest_of_all_grids_are_kept(tiny_config, start, keep):
    model = start(tiny_config()).pipeline.model
    prune(model, keep)
    magnitudes, kept = [], []
    for grid in model.field.grids().values():
        is_line = len(grid.spatial_size) == 1
        for level, values in enumerate(grid.coefficients):
            factor = 1 if is_line or level == 0 else level + 1  # as finer levels are stored
            magnitudes.append(values.detach().numpy().ravel() / factor)
            kept.append((grid.logits[level] >= 0).numpy().ravel())
    magnitudes, kept = np.abs(np.concatenate(magnitudes)), np.concatenate(kept)
    assert kept.sum() == round(keep * len(kept))
    assert magnitudes[kept].min() > magnitudes[~kept].max(initial=0)
    shown = model.field.to_spatial().kept
    assert int(torch.as_tensor(sum(torch.as_tensor(c).sum() for c in shown))) == kept.sum()


def test_other_shares_and_runs_without_masks_are_refused(tiny_config, start):
    model = start(tiny_config()).pipeline.model
    with pytest.raises(UserError, match=r"keep 1\.5: expected a share"):
        prune(model, 1.5)
    config = tiny_config()
    config.pipeline.model.masks = False
    with pytest.raises(UserError, match="needs a run with masks"):
        prune(start(config).pipeline.model, 0.5)
