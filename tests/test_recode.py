"""Coarser quantiser steps for a trained run: what they cost in pictures and save in bytes."""

from __future__ import annotations

import dataclasses

import pytest

import masked_wavelet_codec as codec
from masked_wavelet_nerf import recode
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.runs import Run, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def run_of(trainer) -> Run:
    model = trainer.pipeline.model.eval()
    return Run(trainer.config, model, trainer.pipeline, step=trainer.step)


def largest(run: Run) -> list[int]:
    return [q for grid in run.model.field.grids().values() for q in grid.largest.tolist()]


def size(run: Run) -> int:
    """Of the file, once it is read back to the same."""
    scene = run.scene({})
    data = codec.encode(scene)
    assert codec.equal(codec.decode(data), scene)
    return len(data)


def psnr(run: Run) -> float:
    run.model.refresh()
    return evaluate(run.pipeline).psnr


def test_a_larger_allowance_gives_fewer_bytes_and_no_larger_loss_than_allowed(tiny_config, train):
    trainer, _ = train(tiny_config(steps=30))
    run = run_of(trainer)
    parts = run.model.field.grids()
    # As a training with rates leaves them: some coarser than the rest.
    parts["density_planes.1"].set_largest([127, 9, 2])
    parts["appearance_lines.0"].set_largest([60])
    trained = {name: grid.largest.tolist() for name, grid in parts.items()}
    before, whole, coefficients = psnr(run), size(run), [p.clone() for p in run.model.parameters()]

    sizes, totals = [whole], [sum(largest(run))]
    for allowed in (0.01, 0.1, 1.0):
        loss = recode.coarsen(run, allowed)
        for name, grid in parts.items():
            pairs = zip(grid.largest.tolist(), trained[name], strict=True)
            assert all(1 <= found <= most for found, most in pairs)
        assert loss == pytest.approx(before - psnr(run), abs=1e-4)
        assert loss <= allowed
        sizes.append(size(run))
        totals.append(sum(largest(run)))
        for name, grid in parts.items():
            grid.set_largest(trained[name])
        run.model.refresh()
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8 * sizes[0]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    # Coefficients stay: another allowance may follow.
    assert all((a == b).all() for a, b in zip(coefficients, run.model.parameters(), strict=True))
    assert not run.model.training and psnr(run) == pytest.approx(before, abs=1e-6)


def test_the_coarsest_steps_before_a_cliff_are_found(tiny_config, start, monkeypatch):
    """PSNR that falls all at once: the last steps that were tried may lie beyond."""
    run = run_of(start(tiny_config()))
    trained = {name: grid.largest.tolist() for name, grid in run.model.field.grids().items()}
    whole = sum(largest(run))
    real = evaluate(run.pipeline)
    monkeypatch.setattr(recode, "_LOWEST", 1e-20)
    monkeypatch.setattr(recode, "_HIGHEST", 1e-4)
    for cliff in (0.2, 0.35, 0.5, 0.65, 0.8):

        def fallen(*_, cliff: float = cliff):
            return dataclasses.replace(
                real, psnr=30.0 if sum(largest(run)) > cliff * whole else 20.0
            )

        monkeypatch.setattr(recode, "evaluate", fallen)
        assert recode.coarsen(run, 0.5) == 0
        assert cliff < sum(largest(run)) / whole < cliff + 0.03
        for name, grid in run.model.field.grids().items():
            grid.set_largest(trained[name])


def test_steps_stay_as_trained_where_any_change_costs_too_much(tiny_config, start, monkeypatch):
    run = run_of(start(tiny_config()))
    real, trained = evaluate(run.pipeline), largest(run)

    def fallen(*_):
        return dataclasses.replace(real, psnr=30.0 if largest(run) == trained else 20.0)

    monkeypatch.setattr(recode, "evaluate", fallen)
    monkeypatch.setattr(recode, "_LOWEST", 1e-9)
    assert recode.coarsen(run, 0.5) == 0
    assert largest(run) == trained


def test_of_large_views_fewer_pixels_are_asked(tiny_config, start, monkeypatch):
    run, asked = run_of(start(tiny_config())), []

    def same(pipeline, num_views, stride):
        asked.append((num_views, stride))
        return dataclasses.replace(found)

    found = evaluate(run.pipeline)
    monkeypatch.setattr(recode, "evaluate", same)
    for pixels in (3 * 24 * 24, 3 * 24 * 24 - 1, 3 * 8 * 8, 3 * 8 * 8 - 1):
        monkeypatch.setattr(recode, "_PIXELS", pixels)
        assert recode.coarsen(run, 0.1) == 0
    assert list(dict.fromkeys(asked)) == [(32, 1), (32, 2), (32, 3), (32, 4)]


def test_what_is_needed_is_said(tiny_config, start):
    run = run_of(start(tiny_config(bits=None)))
    with pytest.raises(UserError, match=r"without a quantiser .*model.bits 8"):
        recode.coarsen(run, 0.1)
    run = dataclasses.replace(run, pipeline=None, missing="no transforms.json")
    with pytest.raises(UserError, match=r"needs the capture, .*--data.*\(no transforms.json\)"):
        recode.coarsen(run, 0.1)
