"""What rates do to a training: steps that suit bands, prices of masks, λ for a size."""

from __future__ import annotations

import pytest
import torch

import masked_wavelet_codec as codec
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.scene import scene_from_model

RATES = {"mask_penalty": "rate", "mask_weight": 1e-6, "rate_steps": (14, 17)}


def largest(trainer) -> list[list[int]]:
    return [grid.largest.tolist() for grid in trainer.pipeline.model.field.grids().values()]


def prices(trainer) -> list[torch.Tensor]:
    return [p for grid in trainer.pipeline.model.field.grids().values() for p in grid.prices]


def test_bands_and_masks_follow_from_the_first_rate_step_on(tiny_config, train):
    before, _ = train(tiny_config("before", steps=14, **RATES))
    assert {q for of_grid in largest(before) for q in of_grid} == {127}
    assert prices(before) == []
    after, _ = train(tiny_config("after", steps=15, **RATES))
    found = [q for of_grid in largest(after) for q in of_grid]
    assert max(found) <= 127 and min(found) < 127 and len(set(found)) > 3
    logits = after.pipeline.model.get_param_groups()["masks"]
    assert [p.shape for p in prices(after)] == [m.shape for m in logits]
    assert len(torch.cat([p.flatten() for p in prices(after)]).unique()) > 10


def test_a_higher_weight_gives_coarser_steps(tiny_config, train):
    found = []
    for weight in (1e-8, 1e-5):
        trainer, _ = train(tiny_config(str(weight), steps=15, rate_steps=(14,), mask_weight=weight))
        found.append(torch.tensor([q for of_grid in largest(trainer) for q in of_grid]))
    fine, coarse = found
    assert (coarse <= fine).all()
    # A thousand times the weight: steps √1000 times as large, where neither end is reached.
    inside = (fine < 127) & (coarse > 1)
    assert not inside.any() or 20 < (fine[inside] / coarse[inside]).mean() < 50


def test_the_penalty_is_that_of_priced_logits(tiny_config, train):
    trainer, _ = train(tiny_config(steps=16, **{**RATES, "mask_weight": 0.01}))
    model = trainer.pipeline.model
    rays, batch = trainer.pipeline.datamanager.next_train(16)
    losses = model.get_loss_dict(model(rays), batch)
    logits = model.get_param_groups()["masks"]
    exact = sum(
        float((logit.double() * price / 80).sum())
        for logit, price in zip(logits, prices(trainer), strict=True)
    )
    assert float(losses["mask_loss"]) == pytest.approx(0.01 * exact, rel=1e-4)


def test_the_papers_way_is_left_alone_but_measured(tiny_config, train):
    settings = {"mask_penalty": "sum", "suit_quantiser": False, "rate_steps": (14,)}
    trainer, losses = train(tiny_config("measured", steps=17, **settings))
    _, plain = train(tiny_config("plain", steps=17, **{**settings, "rate_steps": ()}))
    assert losses == plain
    assert {q for of_grid in largest(trainer) for q in of_grid} == {127}
    assert prices(trainer) == []
    assert float(trainer.pipeline.model.rate.scale) != 1


def test_the_estimate_is_what_the_coder_says(tiny_config, train):
    trainer, _ = train(tiny_config(steps=15, rate_steps=(14,), mask_weight=1e-6))
    model = trainer.pipeline.model
    scene = scene_from_model(model, 8, {}, None)
    kept = model.field.to_spatial().kept
    by_part = codec.describe(codec.encode(scene)).parts
    estimated = float(model.rate.estimate(kept)) - float(model.rate.rest)
    # A tiny file's coefficients are half models of bands, which are not estimated.
    assert estimated == pytest.approx(by_part["coefficients"], rel=0.5)
    assert estimated <= by_part["coefficients"]


@pytest.mark.parametrize("stop", [12, 15, 17], ids=["before", "between", "after"])
@pytest.mark.parametrize("target", [None, 12_000], ids=["free", "steered"])
def test_a_resumed_run_has_the_same_rates(tiny_config, train, monkeypatch, stop, target):
    monkeypatch.setattr("masked_wavelet_nerf.model._STEERING_STEPS", 1)
    settings = {**RATES, "target_bytes": target}
    config = tiny_config("whole", steps=21, **settings)
    config.steps_per_save, config.save_only_latest_checkpoint = stop, False
    expected, whole = train(config)
    rest = tiny_config("rest", steps=20 - stop, **settings)
    rest.load_checkpoint = expected.checkpoint_dir / f"step-{stop:09d}.ckpt"
    resumed, tail = train(rest)
    assert sorted(tail) == list(range(stop + 1, 21))
    for step, loss in tail.items():
        assert loss == pytest.approx(whole[step], rel=1e-5), step
    assert largest(resumed) == largest(expected)
    assert prices(resumed)
    assert all(map(torch.equal, prices(resumed), prices(expected)))
    state = resumed.pipeline.model.rate.state_dict()
    assert (float(state["log_factor"]) != 0) == (target is not None)
    for name, value in expected.pipeline.model.rate.state_dict().items():
        torch.testing.assert_close(state[name], value, equal_nan=True)


def test_checkpoints_from_before_rates_load(tiny_config, train, start):
    trainer, _ = train(tiny_config("old", steps=15, **RATES))
    model = trainer.pipeline.model
    state = {
        name: value
        for name, value in model.state_dict().items()
        if ".price_" not in name and not name.endswith(".largest") and "rate." not in name
    }
    fresh = start(tiny_config("new", **RATES)).pipeline.model
    fresh.load_state_dict(state)
    assert {int(q) for grid in fresh.field.grids().values() for q in grid.largest} == {127}
    assert float(fresh.rate.scale) == 1


def test_prices_end_with_the_penalty_that_used_them(tiny_config, train, start):
    """Compiled loops and plain torch agree on what "sum" is, whatever the checkpoint holds."""
    trainer, _ = train(tiny_config("priced", steps=15, **RATES))
    state = trainer.pipeline.model.state_dict()
    assert any(".price_" in name for name in state)
    for penalty, expected in (("rate", True), ("sum", False)):
        model = start(tiny_config(penalty, **{**RATES, "mask_penalty": penalty})).pipeline.model
        model.load_state_dict(state)
        assert all(bool(grid.prices) == expected for grid in model.field.grids().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": False}, "needs masks and rate-steps"),
        ({"rate_steps": ()}, "needs masks and rate-steps"),
        ({"rate_steps": (25,)}, "the first of rate-steps, 25, is not before the end, 20"),
        ({"target_bytes": 2000}, "networks, cameras and occupancy alone take some"),
    ],
)
def test_an_impossible_target_is_refused_at_the_start(tiny_config, train, settings, message):
    with pytest.raises(UserError, match=message):
        train(tiny_config(**{**RATES, "target_bytes": 20_000, **settings}))
