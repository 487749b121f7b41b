"""Encoding refuses what would not come back as it was, and says what to do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_codec_scenes import make_cameras, make_plane, make_scene, replace_band, replace_grid

import masked_wavelet_codec as codec


def refuse(scene: object, match: str) -> None:
    with pytest.raises(codec.CodecError, match=match) as caught:
        codec.encode(scene)
    assert isinstance(caught.value, ValueError)


def test_not_a_scene():
    refuse({"meta": {}}, "scene: expected Scene, got dict")


@pytest.mark.parametrize("profile", ["Range", "fast", "", None])
def test_unknown_profile(profile):
    with pytest.raises(codec.CodecError, match=r"profile: expected one of \['paper', 'range'\]"):
        codec.encode(make_scene(), profile)


@pytest.mark.parametrize("bits", [1, 17, 0, -8])
def test_bits_out_of_range(bits):
    refuse(dataclasses.replace(make_scene(), bits=bits), rf"bits: expected 2 to 16, got {bits}")


@pytest.mark.parametrize("bits", [True, 8.0, np.int64(8)])
def test_bits_of_another_type(bits):
    refuse(dataclasses.replace(make_scene(), bits=bits), "bits: expected int, got")


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({1: 2}, "meta: a key: expected str, got int"),
        ({"a": {None: 2}}, r"meta\.a: a key: expected str, got NoneType"),
        ({"a": float("nan")}, r"meta\.a: expected a finite float, got nan"),
        ({"a": [0.0, float("-inf")]}, r"meta\.a\[1\]: expected a finite float"),
        ({"a": (1, 2)}, r"meta\.a: .*got tuple; convert it \(tuples to lists"),
        ({"a": np.float64(1.5)}, r"meta\.a: .*got float64; .*\.item\(\)"),
        ({"a": b"bytes"}, r"meta\.a: .*got bytes"),
        ({"a": 2**63}, r"meta\.a: expected an integer of 64 bits"),
        ({"a": "\ud800"}, r"meta\.a: .*lone surrogates"),
        ({"\udfff": 1}, r"meta: a key: .*lone surrogates"),
        ({"a": "x" * 2**20}, "meta: .* bytes as JSON, expected 1048576 at most"),
        ([], "meta: expected dict, got list"),
    ],
)
def test_meta_that_is_not_strict_json(meta, match):
    refuse(make_scene(meta=meta), match)


def test_meta_that_is_nested_too_deep_or_contains_itself():
    deep = {}
    for _ in range(31):
        deep = {"a": deep}
    codec.encode(make_scene(meta=deep))
    refuse(make_scene(meta={"a": deep}), "nested deeper than 32; flatten it")
    cycle = {}
    cycle["a"] = cycle
    refuse(make_scene(meta=cycle), "nested deeper than 32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": 3}, r"grids\[0\]\.name: expected str, got int"),
        ({"name": "density_lines.0"}, "grids: the name 'density_lines.0' comes twice"),
        ({"size": [13, 9]}, r"size: expected tuple, got list"),
        (
            {"size": (13, 9, 4, 2)},
            r"size: expected \(N,\), \(H, W\) or \(D, H, W\), got \(13, 9, 4, 2\)",
        ),
        ({"size": (13, 9.0)}, "size: expected int, got float"),
        ({"size": (13, -1)}, "size: expected lengths of 0"),
        ({"size": (13, 2**31)}, "size: expected lengths of 0"),
        ({"size": (13,)}, r"values: expected 3 dimensions, got shape \(3, 1, "),
        ({"bands": []}, "bands: expected tuple, got list"),
    ],
)
def test_grid_fields(changes, match):
    refuse(replace_grid(make_scene(), 0, **changes), match)


def test_lists_where_tuples_are_expected():
    refuse(make_scene(grids=[]), "grids: expected tuple, got list")
    refuse(make_scene(grids=("plane",)), r"grids\[0\]: expected Grid, got str")


def test_levels_in_another_order():
    scene = make_scene()
    bands = scene.grids[0].bands
    refuse(replace_grid(scene, 0, bands=bands[1:]), r"bands\[0\]\.level: expected 0, got 1")
    refuse(replace_grid(scene, 0, bands=bands[::-1]), r"give levels 0, 1, … in order")


def test_more_than_255_levels():
    band = make_scene().grids[0].bands[0]
    refuse(replace_grid(make_scene(), 0, bands=(band,) * 256), "expected 255 at most, got 256")


def test_channels_that_differ_between_levels():
    bands = make_plane("a", (13, 9), 3, 2).bands[:1] + make_plane("a", (13, 9), 4, 2).bands[1:]
    refuse(replace_grid(make_scene(), 0, bands=bands), r"expected one channel count, got \[3, 4\]")


def test_values_and_mask_arrays():
    scene = make_scene()
    band = scene.grids[0].bands[1]

    def refuse_band(match, **changes):
        refuse(replace_band(scene, 0, 1, **changes), match)

    refuse_band("values: expected int16, got int32; .*astype", values=band.values.astype(np.int32))
    refuse_band("values: expected int16, got >i2", values=band.values.astype(">i2"))
    refuse_band("values: expected ndarray, got list", values=band.values.tolist())
    refuse_band("mask: expected bool, got uint8", mask=band.mask.astype(np.uint8))
    refuse_band("mask: expected the shape of values", mask=band.mask[:, :, :1])
    refuse_band("mask: expected 4 dimensions", mask=band.mask[0])
    refuse_band(
        r"values: expected \(C, 3, \*spatial\) at level 1, got \(3, 1,",
        values=band.values[:, :1],
        mask=band.mask[:, :1],
    )
    refuse_band("values: expected 0 where the mask drops; multiply", mask=band.mask & False)


@pytest.mark.parametrize("value", [128, -128, 32767, -32768])
def test_value_beyond_the_quantiser(value):
    scene = make_scene()
    values = scene.grids[0].bands[1].values.copy()
    values[tuple(np.argwhere(scene.grids[0].bands[1].mask)[0])] = value
    refuse(replace_band(scene, 0, 1, values=values), "expected -127 to 127 for 8 bits, got .*clip")


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (0.1, "step: 0.1 is not exact in float32; pass float"),
        (1e300, "not exact in float32"),
        (float("nan"), "expected a finite step of at least 0, got nan"),
        (float("inf"), "expected a finite step"),
        (-0.5, "expected a finite step of at least 0, got -0.5"),
        (-0.0, "expected a finite step of at least 0, got -0.0"),
        (1, r"step: expected float, got int; convert it with float\(…\)"),
        (np.float32(0.5), "step: expected float, got float32"),
    ],
)
def test_step(step, match):
    refuse(replace_band(make_scene(), 0, 1, step=step), match)


SMALLEST = np.array([5, -32768], np.int16)


def quantised(values: object, step: object = 0.5) -> codec.QuantisedArray:
    return codec.QuantisedArray(values, step)


@pytest.mark.parametrize(
    ("networks", "match"),
    [
        ({"a": np.zeros(3)}, r"networks\['a'\]: expected float32, got float64; .*astype"),
        ({"a": 1.0}, r"networks\['a'\]: expected ndarray, got float"),
        ({"a": quantised(np.zeros(3, np.int32))}, r"\['a'\]\.values: expected int16, got int32"),
        ({"a": quantised([1])}, r"networks\['a'\]\.values: expected ndarray, got list"),
        ({"a": quantised(SMALLEST)}, r"networks\['a'\]\.values: expected ±32767; clip them"),
        ({"a": quantised(0 * SMALLEST, 0.1)}, r"networks\['a'\]\.step: 0.1 is not exact"),
        ({"a": quantised(0 * SMALLEST, -1.0)}, r"\['a'\]\.step: expected a finite step"),
        ({"a": quantised(0 * SMALLEST, float("nan"))}, r"\['a'\]\.step: expected a finite"),
        ({"a": quantised(0 * SMALLEST, 1)}, r"\['a'\]\.step: expected float, got int"),
        ({2: np.zeros(3, np.float32)}, "networks: expected str, got int"),
        ({"\ud800": np.zeros(3, np.float32)}, "networks: .*lone surrogates"),
        ({"a": np.zeros((0, 2**25, 2**25), np.float32)}, r"shape of more than 2\*\*48 elements"),
        ([], "networks: expected dict, got list"),
    ],
)
def test_networks(networks, match):
    refuse(make_scene(networks=networks), match)


@pytest.mark.parametrize(
    ("occupancy", "match"),
    [
        (np.zeros((2, 2, 2)), "occupancy: expected bool, got float64"),
        (np.zeros((2, 2), bool), r"occupancy: expected 3 dimensions, got shape \(2, 2\)"),
    ],
)
def test_occupancy(occupancy, match):
    refuse(make_scene(occupancy=occupancy), match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fx": np.zeros(6)}, "cameras.fx: expected float32, got float64"),
        ({"width": np.zeros(6, np.int64)}, "cameras.width: expected int32, got int64"),
        ({"fy": np.zeros(5, np.float32)}, r"cameras.fy: expected \(6,\), got \(5,\)"),
        ({"fy": np.zeros((6, 1), np.float32)}, "cameras.fy: expected 1 dimensions"),
        ({"distortion": np.zeros((6, 4), np.float32)}, r"expected \(6, 6\), got \(6, 4\)"),
        ({"split": np.full(6, 2, np.uint8)}, "cameras.split: expected 0"),
    ],
)
def test_cameras(changes, match):
    refuse(make_scene(cameras=dataclasses.replace(make_cameras(6), **changes)), match)
