"""What coefficients cost in profile ``range``, against what the encoder writes, and their prices.

Values that are all zero cost nothing, and the mask of a coarsest level does not depend on values:
that parts a price into the mask's share and the values'.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_codec_range import cost, grid_of, places, size_of
from test_codec_scenes import make_line, make_plane

import masked_wavelet_codec as codec
from masked_wavelet_codec import ans, coefficients


def trained(rng: np.random.Generator, channels: int, size: int, levels: int) -> list[codec.Grid]:
    """Three planes and three lines as training leaves them: sparse, at places that many share."""
    grids = []
    for number in range(3):
        masks, values = [], []
        for level in range(levels + 1):
            side = size >> (levels + 1 - max(level, 1))
            shared = rng.random((1 if level == 0 else 3, side, side)) < (0.5 if level == 0 else 0.1)
            masks.append(places(channels, shared, rng))
            values.append(np.rint(rng.laplace(0, 9 / (level + 1), masks[-1].shape)).clip(-127, 127))
        grids.append(grid_of(f"plane{number}", *masks, values=tuple(values)))
    for number in range(3):
        mask = rng.random((channels, 1, size)) < 0.4
        values = (np.rint(rng.laplace(0, 20, mask.shape)).clip(-127, 127) * mask).astype(np.int16)
        band = codec.Band(0, values, mask, 1.0)
        grids.append(codec.Grid(f"line{number}", (size,), (band,)))
    return grids


def with_zeros(grid: codec.Grid) -> codec.Grid:
    """The same masks, and no values to speak of."""
    bands = [dataclasses.replace(band, values=0 * band.values) for band in grid.bands]
    return dataclasses.replace(grid, bands=tuple(bands))


def bits_of_masks(grids, prices, of_value: float = 0.0) -> float:
    """-log2 of the probability of every mask decision, in prices' terms."""
    total = 0.0
    for grid, of_grid in zip(grids, prices, strict=True):
        for band, price in zip(grid.bands, of_grid, strict=True):
            if not 0 < band.mask.sum() < band.mask.size:
                continue  # which is known without a decision
            odds = of_value - price.astype(np.float64)
            total += np.log2(1 + 2.0 ** np.where(band.mask, -odds, odds)).sum()
    return total


def test_a_meter_counts_what_decisions_cost():
    rng = np.random.default_rng(1)
    weights = rng.integers(16, 65521, 3000)
    decisions = rng.random(3000) < weights / 65536
    meter = ans.Meter()
    for part in np.split(np.arange(3000), [0, 7, 1200]):
        np.testing.assert_array_equal(meter.code(weights[part], decisions[part]), decisions[part])
    assert meter.bits == pytest.approx(8 * cost(weights, decisions), rel=1e-9)
    chances = weights / 65536
    np.testing.assert_allclose(meter.log_odds(), np.log2(chances / (1 - chances)), atol=2e-5)
    assert meter.log_odds().dtype == np.float32


SCENES = {
    "trained": lambda: trained(np.random.default_rng(2), 6, 32, 2),
    "of one level": lambda: trained(np.random.default_rng(3), 16, 48, 0)[:1],
    "by formula": lambda: [
        make_plane("p", (13, 9), 3, levels=2),
        make_line("l", 11, 3),
        make_plane("q", (26, 50), 5, levels=1, residue=1),
    ],
}


@pytest.mark.parametrize("name", SCENES)
def test_bits_are_those_that_the_encoder_writes(name, monkeypatch):
    grids = SCENES[name]()
    measured = codec.measure(grids)
    # Beside decisions there are models, of some 50 bytes each, and frames.
    assert measured.bits / 8 < size_of(*grids) < 1.005 * measured.bits / 8 + 400

    written = []

    class Recorder:
        def code(self, weights, decisions):
            written.append(8 * cost(weights, decisions))
            return decisions

        def getvalue(self):
            return b""

    monkeypatch.setattr(coefficients, "Encoder", Recorder)
    list(coefficients.encode_levels(8, grids))
    assert measured.bits == pytest.approx(sum(written), rel=1e-9)


@pytest.mark.parametrize("name", SCENES)
def test_prices_have_the_shape_of_values(name):
    grids = SCENES[name]()
    prices = codec.measure(grids).prices
    assert [[price.shape for price in of_grid] for of_grid in prices] == [
        [band.values.shape for band in grid.bands] for grid in grids
    ]
    assert all(price.dtype == np.float32 for of_grid in prices for price in of_grid)


@pytest.mark.parametrize("name", SCENES)
def test_prices_of_worthless_values_are_the_odds_of_the_mask(name):
    """Bits of dropping minus bits of keeping, coefficient by coefficient, at its own place."""
    grids = [with_zeros(grid) for grid in SCENES[name]()]
    measured = codec.measure(grids)
    assert bits_of_masks(grids, measured.prices) == pytest.approx(measured.bits, rel=1e-5)


@pytest.mark.parametrize("valued", [0, 1])
def test_prices_hold_the_mean_bits_of_a_value_of_the_family(valued):
    rng = np.random.default_rng(4)
    # Two families of two planes: 3 and 5 channels.
    grids = []
    for number, channels in enumerate((3, 3, 5, 5)):
        mask = rng.random((channels, 1, 20, 17)) < 0.1 * (number + 1)
        values = np.where(mask, rng.integers(-40, 41, mask.shape), 0)
        grids.append(grid_of(f"g{number}", mask, values=(values,)))
    plain = [with_zeros(grid) for grid in grids]
    family = range(2 * valued, 2 * valued + 2)
    some = [grid if n in family else plain[n] for n, grid in enumerate(grids)]
    nothing, measured = codec.measure(plain), codec.measure(some)

    num_kept = sum(int(grids[n].bands[0].mask.sum()) for n in family)
    of_value = (measured.bits - nothing.bits) / num_kept
    assert 5 < of_value < 8  # 81 equally likely integers are 6.3 bits
    for n in range(4):
        (found,), (without) = measured.prices[n], nothing.prices[n][0]
        expected = without + (of_value if n in family else 0)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_masks_and_values_make_the_whole():
    """Of one level of one family: bits are those of the mask, and as many means as are kept."""
    (grid,) = trained(np.random.default_rng(5), 8, 40, 0)[:1]
    measured, nothing = codec.measure([grid]), codec.measure([with_zeros(grid)])
    of_value = float((measured.prices[0][0] - nothing.prices[0][0]).mean(dtype=np.float64))
    num_kept = int(grid.bands[0].mask.sum())
    total = bits_of_masks([grid], measured.prices, of_value) + of_value * num_kept
    assert of_value > 3
    assert total == pytest.approx(measured.bits, rel=1e-4)


def test_lonely_coefficients_cost_more_than_those_in_company():
    rng = np.random.default_rng(6)
    shared = rng.random((1, 60, 60)) < 0.05
    mask = places(12, shared, rng)
    mask[11, 0, ~shared[0]] = rng.random(int((~shared).sum())) < 0.02
    (price,) = codec.measure([grid_of("a", mask)]).prices[0]
    others = mask[:11].sum(axis=0)
    found = {
        (company, kept): price[11][(mask[11] == kept) & ((others > 5) == company)]
        for company in (True, False)
        for kept in (True, False)
    }
    assert min(map(len, found.values())) > 20
    # In bits; whether one is kept itself says little of its price.
    middle = {which: float(np.median(some)) for which, some in found.items()}
    for kept in (True, False):
        assert middle[True, kept] < 4 and middle[False, kept] > 8


@pytest.mark.parametrize("value", [0, 5])
def test_bands_that_keep_nothing_or_everything_have_the_price_of_the_first_exception(value):
    half = np.arange(24).reshape(2, 1, 3, 4) % 2 == 0
    grids = [
        grid_of(name, mask, values=(np.full(half.shape, value),))
        for name, mask in (("empty", 0 * half != 0), ("half", half), ("full", 0 * half == 0))
    ]
    measured = codec.measure(grids)
    of_value = (measured.bits - codec.measure([with_zeros(g) for g in grids]).bits) / (12 + 24)
    (empty,), (mixed,), (full,) = measured.prices
    assert np.isfinite(mixed).all() and np.ptp(mixed) > 1
    np.testing.assert_allclose(empty, np.full(half.shape, of_value + np.log2(25)), rtol=1e-5)
    np.testing.assert_allclose(full, np.full(half.shape, of_value - np.log2(25)), rtol=1e-5)
    assert (of_value > 1) == (value > 0)


def test_a_scene_of_empty_bands_costs_nothing():
    mask = np.zeros((3, 1, 8, 8), bool)
    measured = codec.measure([grid_of("a", mask), grid_of("b", mask)])
    assert measured.bits == 0
    for (price,) in measured.prices:
        np.testing.assert_allclose(price, np.full(mask.shape, np.log2(3 * 64 + 1)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 1, 0, 4), (2, 1, 0)])
def test_grids_of_nothing(shape):
    assert codec.measure([]) == codec.Measured(0.0, [])
    bare = codec.Grid("bare", (4, 4), ())
    hollow = codec.Band(0, np.zeros(shape, np.int16), np.zeros(shape, bool), 1.0)
    grid = make_plane("p", (13, 9), 3, levels=2)
    alone = codec.measure([grid])
    found = codec.measure([bare, codec.Grid("hollow", shape[2:], (hollow,)), grid])
    assert found.prices[0] == [] and found.prices[1][0].shape == shape
    assert found.bits == pytest.approx(alone.bits)
    for one, other in zip(found.prices[2], alone.prices[0], strict=True):
        np.testing.assert_array_equal(one, other)
