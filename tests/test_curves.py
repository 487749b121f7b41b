"""Curves of bytes against PSNR, and Bjøntegaard's difference in closed form."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from masked_wavelet_nerf.curves import Point, bjontegaard_psnr, bjontegaard_rate, draw
from masked_wavelet_nerf.errors import UserError

CURVE = [Point(20_000, 30.0), Point(45_000, 31.7), Point(80_000, 32.5), Point(200_000, 33.0)]


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_a_factor_on_all_bytes_is_found(factor):
    other = [Point(factor * num_bytes, psnr) for num_bytes, psnr in CURVE]
    assert bjontegaard_rate(CURVE, other) == pytest.approx(factor - 1, abs=1e-9)


def test_lines_in_the_logarithm_are_compared_over_what_both_reach():
    # log bytes = 10 + psnr · slope: over 31 to 33 dB they differ by 32 · 0.1 on average.
    one = [Point(math.exp(10 + 0.5 * psnr), psnr) for psnr in (29.0, 31.0, 33.0)]
    other = [Point(math.exp(10 + 0.4 * psnr), psnr) for psnr in (31.0, 32.0, 34.0, 35.0)]
    assert bjontegaard_rate(one, other) == pytest.approx(math.exp(-3.2) - 1, abs=1e-9)
    assert bjontegaard_rate(other, one) == pytest.approx(math.exp(3.2) - 1, abs=1e-9)


def test_a_difference_in_psnr_is_found_at_the_same_bytes():
    above = [Point(num_bytes, psnr + 0.7) for num_bytes, psnr in CURVE]
    assert bjontegaard_psnr(CURVE, above) == pytest.approx(0.7, abs=1e-9)
    # PSNR = slope · log bytes: over log bytes from 10 to 11 they differ by 10.5 on average.
    one = [Point(math.exp(size), 2 * size) for size in (9.0, 10.0, 11.0)]
    other = [Point(math.exp(size), 3 * size) for size in (10.0, 11.0, 12.0)]
    assert bjontegaard_psnr(one, other) == pytest.approx(10.5, abs=1e-9)
    assert bjontegaard_psnr(other, one) == pytest.approx(-10.5, abs=1e-9)


def test_the_order_of_points_is_no_matter():
    other = [Point(num_bytes / 2, psnr) for num_bytes, psnr in reversed(CURVE)]
    assert bjontegaard_rate(CURVE[::-1], other) == pytest.approx(-0.5, abs=1e-9)


def test_curves_that_share_nothing_are_refused():
    with pytest.raises(UserError, match="share no PSNR"):
        bjontegaard_rate(CURVE, [Point(1000, 28.0), Point(2000, 30.0)])
    with pytest.raises(UserError, match="share no size"):
        bjontegaard_psnr(CURVE, [Point(1000, 28.0), Point(20_000, 30.0)])


def test_a_curve_that_falls_is_refused():
    with pytest.raises(UserError, match="does not rise with bytes"):
        bjontegaard_rate(CURVE, [Point(1000, 30.0), Point(2000, 29.0), Point(3000, 32.0)])


@pytest.mark.parametrize("measure", [bjontegaard_rate, bjontegaard_psnr])
def test_neither_is_a_curve_that_does_not_rise_or_a_point_compared(measure):
    level = [Point(20_000, 30.0), Point(30_000, 30.0), Point(40_000, 32.0)]
    for one, other in ((CURVE, level), (level, CURVE)):
        with pytest.raises(UserError, match="does not rise with bytes"):
            measure(one, other)
    for one, other in ((CURVE, CURVE[1:2]), (CURVE[1:2], CURVE)):
        with pytest.raises(UserError, match="share no"):
            measure(one, other)


def drawn(curves):
    figure = Figure()
    axes = figure.add_subplot()
    draw(axes, curves)
    figure.canvas.draw()
    return axes


def test_curves_are_drawn_in_kilobytes():
    axes = drawn({"lego_100": CURVE, "other": [Point(1_000_000, 35.0)]})
    one, other = axes.lines
    assert one.get_xdata() == pytest.approx([20, 45, 80, 200])
    assert one.get_ydata() == pytest.approx([30, 31.7, 32.5, 33])
    assert other.get_xydata().tolist() == [[1000, 35]]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["lego 100", "other"]
    assert (axes.get_xlabel(), axes.get_xscale()) == ("kilobytes", "log")
    assert axes.get_xticks().tolist() == [20, 50, 100, 200, 500, 1000]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["20", "50", "100", "200", "500", "1000"]


@pytest.mark.parametrize("sizes", [(60_000, 90_000), (42_000, 42_100), (300, 900)])
def test_sizes_can_be_read_off_whatever_they_are(sizes):
    axes = drawn({"a": [Point(num_bytes, 30 + i) for i, num_bytes in enumerate(sizes)]})
    low, high = axes.get_xlim()
    labels = [
        label.get_text()
        for label in axes.get_xticklabels(which="both")
        if low <= label.get_position()[0] <= high and label.get_text()
    ]
    assert labels
