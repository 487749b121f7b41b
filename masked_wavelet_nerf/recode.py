"""Coarser quantiser steps for a trained run, as far as its pictures allow: fewer bytes at once.

Every band gets the step that suits what its errors cost in pixels (``sensitivity``) and one price
of bits for all bands (``rate.suited_integers``). The price is raised until PSNR has fallen by what
is allowed.
"""

from __future__ import annotations

import math

from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.utils.rich_utils import CONSOLE

from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.runs import Run, evaluate

_VIEWS = 32
_PIXELS = 1 << 18
"""Of all views, at most, about: of larger ones, every so many-th row and column."""
_LOWEST, _HIGHEST = 1e-13, 1e-5
"""Mean squared error that a bit may be worth: from hardly any effect to ruin."""
_ROUNDS = 12


def coarsen(run: Run, allowed_loss: float) -> float:
    """Gives the run's model the coarsest steps at which PSNR falls by no more than allowed.

    PSNR is the mean of 32 evaluation views at most, of every so many-th row and column where they
    are large.

    Args:
        run: an opened run, with its capture; its model is changed.
        allowed_loss: dB.

    Returns:
        The loss found, dB.

    Raises:
        UserError: if the capture is not at hand, or the run was trained without a quantiser.
    """
    pipeline, model = run.measurable, run.model
    if pipeline is None:
        raise UserError(
            "--allowed-loss needs the capture, to see what a loss is; --data says where it is. "
            f"({run.missing or 'a decoded run, without photos'})"
        )
    if model.config.bits is None:
        raise UserError(
            "--allowed-loss: this run was trained without a quantiser (bits None), whose steps "
            "could grow; export it without, or train with --pipeline.model.bits 8"
        )
    datamanager = pipeline.datamanager
    assert isinstance(datamanager, VanillaDataManager) and datamanager.eval_dataset is not None
    cameras = datamanager.eval_dataset.cameras
    pixels = float((cameras.width * cameras.height).max()) * min(_VIEWS, len(cameras))
    stride = max(1, math.ceil(math.sqrt(pixels / _PIXELS)))

    def psnr() -> float:
        return evaluate(pipeline, _VIEWS, stride).psnr

    def steps() -> list[list[int]]:
        return [grid.largest.tolist() for grid in grids]

    def take(largest: list[list[int]]) -> None:
        for grid, of_grid in zip(grids, largest, strict=True):
            grid.set_largest(of_grid)
        model.refresh()

    grids = list(model.field.grids().values())
    before, trained = psnr(), steps()
    sensitivities = model.measure_sensitivity(lambda draw: datamanager.next_train(draw)[0])
    best, best_loss = trained, 0.0
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        model.suit_quantiser(sensitivities, math.exp(middle))
        # Never finer than in training.
        take([list(map(min, a, b)) for a, b in zip(steps(), trained, strict=True)])
        loss = before - psnr()
        CONSOLE.log(f"A bit worth {math.exp(middle):.1e} of squared error costs {loss:.4f} dB.")
        if loss > allowed_loss:
            high = middle
            continue
        low, best, best_loss = middle, steps(), loss
        if loss > 0.8 * allowed_loss:
            break
    if best is trained:
        CONSOLE.log("Even the smallest steps up cost more than is allowed: steps stay as trained.")
    take(best)
    return best_loss
