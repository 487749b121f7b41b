"""The estimate against files, prices against the coder, and λ as it is steered to a size."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_codec_scenes import make_cameras

import masked_wavelet_codec as codec
from masked_wavelet_nerf import scene
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField
from masked_wavelet_nerf.rate_control import RateControl
from masked_wavelet_nerf.sampling import OccupancyGrid
from masked_wavelet_nerf.scene import scene_from_model

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

FRAME = 20 * 20 + 1440
"""By the rule, of a file with 20 training cameras."""


def ball(size: int, radius: float) -> torch.Tensor:
    axis = torch.arange(size) - (size - 1) / 2
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    return x**2 + y**2 + z**2 < radius**2


def make(
    target_bytes: int | None = None, side: int = 40, **settings
) -> tuple[RateControl, SimpleNamespace]:
    """A field that keeps about a tenth, at places that channels share, and what steers it."""
    config = FieldConfig(
        **{"num_density_components": 4, "num_appearance_components": 8, "num_levels": 2, **settings}
    )
    model = SimpleNamespace(
        field=WaveletPlaneField(config, (side, side + 3, side - 5)),
        occupancy=OccupancyGrid(),
        aabb=torch.tensor([[-1.0] * 3, [1.0] * 3]),
        projection=None,
    )
    model.occupancy.cells = ball(24, 9)
    for grid in model.field.grids().values():
        for logits in grid.logits:
            places = torch.rand(logits.shape[1:]) < 0.15
            logits.data[:] = torch.where(places & (torch.rand_like(logits) < 0.7), 1.0, -1.0)
    return RateControl(model.field, model.occupancy, 20, target_bytes), model


def kept(model) -> list[torch.Tensor]:
    return model.field.to_spatial().kept


def close_more(model) -> None:
    with torch.no_grad():
        for grid in model.field.grids().values():
            for logits in grid.logits:
                logits[torch.rand_like(logits) < 0.5] = -1.0


def parts(model, bits: int = 8) -> dict[str, int]:
    cameras = make_cameras(25)
    data = codec.encode(scene_from_model(model, bits, {}, cameras))
    return codec.describe(data).parts


def coefficient_rule(model, bits: int) -> float:
    count = sum(int(counts.sum()) for counts in kept(model))
    grids = model.field.grids().values()
    total = sum(values.numel() for grid in grids for values in grid.coefficients)
    return count * (0.64 * math.log2(total / count) + bits - 1) / 8


@pytest.mark.parametrize(
    ("settings", "bits", "of_weight"),
    [({}, 8, 6.2), ({"bits": 5, "network_bits": 6}, 5, 4.2), ({"bits": None}, 8, 6.2),
     ({"network_bits": None}, 8, 32)],
)  # fmt: skip
def test_before_a_measurement_the_estimate_is_the_rule_of_thumb(settings, bits, of_weight):
    rate, model = make(**settings)
    networks = sum(weights.numel() for weights in model.field.networks().values())
    for radius in (9, 5):  # the occupancy changes in training
        model.occupancy.cells = ball(24, radius)
        faces = sum(int(model.occupancy.cells.diff(dim=axis).sum()) for axis in range(3))
        rest = networks * of_weight / 8 + faces * 0.46 / 8 + FRAME
        expected = coefficient_rule(model, bits) + rest
        assert float(rate.estimate(kept(model))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 5, "network_bits": 4}, {"bits": None, "network_bits": None}]
)
def test_a_measured_estimate_is_that_of_the_file(settings):
    """But for cameras and the frame, which go by the rule."""
    rate, model = make(side=64, **settings)
    for _ in range(2):  # the second time knowing a measurement
        rate.measure(kept(model), False)
        found, whole = parts(model, rate.bits), float(rate.estimate(kept(model)))
        rest = float(rate.estimate([torch.tensor([0])]))
        assert whole - rest == pytest.approx(found["coefficients"], rel=0.05)
        assert rest - FRAME == pytest.approx(found["networks"] + found["occupancy"], rel=0.03)
        close_more(model)


def test_the_estimate_knows_that_occupancy_is_stored_half_as_fine(monkeypatch):
    rate, model = make()
    whole = float(rate.estimate(kept(model)))
    monkeypatch.setattr(scene, "_FEW_CELLS", 0)
    rate, half = RateControl(model.field, model.occupancy, 20, None), model.occupancy.halved().cells
    fewer = sum(
        int(model.occupancy.cells.diff(dim=axis).sum()) - int(half.diff(dim=axis).sum())
        for axis in range(3)
    )
    assert whole - float(rate.estimate(kept(model))) == pytest.approx(fewer * 0.46 / 8, rel=1e-3)
    rate.measure(kept(model), False)
    rest = float(rate.estimate([torch.tensor([0])]))
    found = parts(model)
    assert rest - FRAME == pytest.approx(found["networks"] + found["occupancy"], rel=0.03)


def test_occupancy_is_stored_half_as_fine_as_planes_once(monkeypatch):
    _, model = make(side=48)
    model.occupancy.cells = ball(48, 17)
    monkeypatch.setattr(scene, "_FEW_CELLS", 48**3)
    stored = scene_from_model(model, 8, {}, None).occupancy
    np.testing.assert_array_equal(stored, ball(48, 17).numpy())
    monkeypatch.setattr(scene, "_FEW_CELLS", 48**3 - 1)
    for _ in range(2):  # what is decoded is written as it is
        stored = scene_from_model(model, 8, {}, None).occupancy
        assert stored.shape == (24, 24, 24)
        model.occupancy.cells = torch.from_numpy(stored)
    np.testing.assert_array_equal(
        stored,
        ball(48, 17).unfold(0, 2, 2).unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).any(-1).numpy(),
    )


def test_between_measurements_the_estimate_follows_what_is_kept():
    rate, model = make()
    rate.measure(kept(model), False)
    scale, rest = float(rate.scale), float(rate.rest)
    assert abs(scale - 1) > 0.02
    close_more(model)
    expected = scale * coefficient_rule(model, 8) + rest
    assert float(rate.estimate(kept(model))) == pytest.approx(expected, rel=1e-5)
    fresh = RateControl(model.field, model.occupancy, 20, None)
    fresh.load_state_dict(rate.state_dict())
    assert float(fresh.estimate(kept(model))) == float(rate.estimate(kept(model)))


def test_prices_are_what_the_coder_says():
    rate, model = make()
    rate.measure(kept(model), False)
    grids = model.field.grids()
    assert not any(grid.prices for grid in grids.values())
    rate.measure(kept(model), True)
    stored = scene_from_model(model, 8, {}, None).grids
    seen = set()
    for grid, bits in zip(grids.values(), codec.measure(stored).prices, strict=True):
        for price, of_level in zip(grid.prices, bits, strict=True):
            expected = np.rint(8 * of_level).clip(1, 255)
            np.testing.assert_array_equal(price.numpy(), expected)
            seen |= set(expected.ravel().tolist())
    assert len(seen) > 30


def plant(rate: RateControl, num_steps: int, start: int) -> list[float]:
    """Bytes at every tenth step, of a field whose kept count drifts to what λ balances."""
    log_count, found = math.log(start), []
    for step in range(0, num_steps, 10):
        counts = [torch.tensor([round(math.exp(log_count))])]
        rate.steer(counts, step / (0.9 * num_steps), 10)
        found.append(float(rate.estimate(counts)))
        balance = math.log(start) - 0.65 * math.log(float(rate.factor()))
        for _ in range(10):
            log_count += (balance - log_count) / 600
    return found


@pytest.mark.parametrize("share", [0.55, 0.8, 1.0, 1.4, 2.0])
def test_steering_ends_at_the_target(share):
    rate, model = make()
    rate.rest.fill_(7000.0)
    rate.scale.fill_(0.9)
    start = float(rate.estimate([torch.tensor([10_000])]))
    target = round(share * start)
    steered = RateControl(model.field, model.occupancy, 20, target)
    steered.load_state_dict(rate.state_dict())
    found = plant(steered, 2400, 10_000)
    assert found[0] == pytest.approx(start, rel=1e-5)
    # It stays there from nine tenths of the way on.
    assert found[-24:] == pytest.approx([target] * 24, rel=0.05)
    # Half of the time is three quarters of the way, or some more or less.
    if share != 1.0:
        assert 0.5 < math.log(found[108] / start) / math.log(share) < 0.9
        assert (float(steered.factor()) > 1) == (share < 1)


def test_an_interrupted_steering_goes_on_as_if_nothing_had_happened():
    rate, model = make(target_bytes=9000)
    rate.rest.fill_(4000.0)
    counts = [[torch.tensor([n])] for n in range(9000, 5000, -100)]
    states = []
    for number, some in enumerate(counts):
        rate.steer(some, number / 40, 10)
        states.append({name: value.clone() for name, value in rate.state_dict().items()})
    resumed = RateControl(model.field, model.occupancy, 20, 9000)
    resumed.load_state_dict(states[19])
    for number, some in list(enumerate(counts))[20:]:
        resumed.steer(some, number / 40, 10)
    assert resumed.state_dict() == states[-1]
    assert float(resumed.factor()) > 1.1


def test_the_factor_is_limited_and_one_without_a_target():
    free, model = make()
    free.steer([torch.tensor([30_000])], 0.5, 10)
    assert float(free.factor()) == 1
    steered = RateControl(model.field, model.occupancy, 20, 10_000)
    steered.rest.fill_(9990.0)  # a target that cannot be reached
    for count, extreme in ((50_000, 20.0), (0, 1 / 20)):
        for step in range(0, 5000, 10):
            steered.steer([torch.tensor([count])], min(step / 100, 1.0), 10)
        assert float(steered.factor()) == pytest.approx(extreme, rel=1e-5)


def test_an_impossible_target_is_refused_with_what_the_rest_takes():
    rate, model = make(target_bytes=None)
    rate.check_target()
    networks = sum(weights.numel() for weights in model.field.networks().values())
    least = float(rate.estimate([torch.tensor([0])]))
    assert least > FRAME + networks * 6.2 / 8
    for target, is_possible in ((round(1.11 * least), True), (round(1.09 * least), False)):
        steered = RateControl(model.field, model.occupancy, 20, target)
        if is_possible:
            steered.check_target()
            continue
        match = rf"target-bytes {target:,}: .* some {least:,.0f} bytes.*--pipeline.model.hidden-dim"
        with pytest.raises(UserError, match=match):
            steered.check_target()
        steered.rest.fill_(0.5 * least)  # as measured
        steered.check_target()


def test_states_without_rates_are_filled_up_and_others_kept():
    rate, _ = make()
    state = {"field.x": torch.ones(2), "rate.scale": torch.tensor(3.0)}
    found = rate.complete(state, "rate.")
    assert set(state) == {"field.x", "rate.scale"}
    assert found["field.x"] is state["field.x"] and float(found["rate.scale"]) == 3
    names = {name for name, _ in rate.named_buffers()}
    assert set(found) == {"field.x"} | {f"rate.{name}" for name in names}
    assert math.isnan(found["rate.rest"]) and float(found["rate.log_factor"]) == 0
    rate.load_state_dict({name: found[f"rate.{name}"] for name in names})
    assert float(rate.scale) == 3
