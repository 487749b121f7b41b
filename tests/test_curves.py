"""Curves of bytes against PSNR, and Bjøntegaard's difference in closed form."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from masked_wavelet_nerf.cli import main
from masked_wavelet_nerf.curves import Point, bjontegaard_rate, read_points
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


def test_curves_that_share_nothing_are_refused():
    with pytest.raises(UserError, match=r"ends at 30\.00 dB"):
        bjontegaard_rate(CURVE, [Point(1000, 28.0), Point(2000, 30.0)])


def test_a_curve_that_falls_is_refused():
    with pytest.raises(UserError, match=r"got 30\.00 dB in 1,000, 29\.00 dB in 2,000"):
        bjontegaard_rate(CURVE, [Point(1000, 30.0), Point(2000, 29.0), Point(3000, 32.0)])


def write(path, rows):
    keys = ("preset", "bytes", "psnr_after")
    path.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
    return path


def test_seeds_of_a_preset_are_one_point(tmp_path):
    path = write(tmp_path / "a.json", [("p", 300, 30.0), ("q", 100, 29.0), ("p", 500, 31.0)])
    assert read_points(path) == [Point(100, 29.0), Point(400, 30.5)]


def test_the_command_prints_the_difference_and_draws(tmp_path, capsys):
    one = write(tmp_path / "paper.json", [("a", 200_000, 30.0), ("b", 400_000, 32.0)])
    two = write(tmp_path / "ours.json", [("a", 50_000, 30.0), ("b", 100_000, 32.0)])
    picture = tmp_path / "out" / "curve.png"
    assert main(["curve", str(one), str(two), "--figure", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "ours against paper: -75.0% bytes at the same PSNR (30.00 to 32.00 dB)" in shown
    colours = Image.open(picture).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 100  # lines, marks and words


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '[{"bytes": 3}]', '[{"preset": "a", "bytes": "x"}]']
)
def test_other_files_are_refused_by_name(tmp_path, content, capsys):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert main(["curve", str(path)]) == 2
    assert "rows.json: expected a JSON list of rows" in capsys.readouterr().err
