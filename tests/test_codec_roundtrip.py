"""Encoding and decoding give the same scene, for every kind of scene."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_scenes import (
    PROFILES,
    largest,
    make_band,
    make_cameras,
    make_plane,
    make_posed_cameras,
    make_scene,
    replace_band,
    with_integers,
)

import masked_wavelet_codec as codec


def assert_round_trip(scene: codec.Scene) -> None:
    for profile in PROFILES:
        assert codec.equal(codec.decode(codec.encode(scene, profile)), scene), profile


def one_band(mask: np.ndarray, bits: int = 8) -> codec.Scene:
    """A scene of one line whose only band has this mask (C, 1, N), all values 1."""
    band = codec.Band(0, mask.astype(np.int16), mask, 1.0)
    return make_scene(bits, grids=(codec.Grid("line", (mask.shape[2],), (band,)),))


@pytest.mark.parametrize("bits", range(2, 17))
def test_every_bit_width(bits):
    assert_round_trip(make_scene(bits))


@pytest.mark.parametrize("num_bits", [*range(1, 18), 63, 64, 65])
def test_bit_count_not_a_multiple_of_8(num_bits):
    mask = np.arange(num_bits) % 3 == 0
    mask[-1] = True  # in the last byte, which the paper's code misplaces
    assert_round_trip(one_band(mask.reshape(1, 1, -1)))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("num_bits", [1, 8, 16, 4096, 99_999])
def test_all_dropped_and_all_kept(keep, num_bits):
    # All kept gives one Huffman symbol, and so does all dropped where the run has one digit.
    assert_round_trip(one_band(np.full((1, 1, num_bits), keep)))


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 5), (31, 16)])
def test_odd_sizes_and_levels(levels, size):
    assert_round_trip(make_scene(grids=(make_plane("plane", size, 3, levels),)))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (4, 0)])
def test_empty_planes(size):
    grids = (make_plane("empty", size, 3, 1), make_plane("other", (6, 6), 2, 1))
    assert_round_trip(make_scene(grids=grids))
    assert_round_trip(make_scene(grids=grids[:1]))


def test_no_channels():
    assert_round_trip(make_scene(grids=(make_plane("plane", (8, 8), 0, 2),)))


def test_grid_without_bands():
    assert_round_trip(make_scene(grids=(codec.Grid("none", (3, 4), ()),)))


def test_nothing_at_all():
    assert_round_trip(codec.Scene({}, 8, (), {}, None, None))


def test_zero_step_and_smallest_and_largest_step():
    for step in (0.0, float(np.float32(1e-45)), float(np.finfo(np.float32).max)):
        assert_round_trip(replace_band(make_scene(), 0, 0, step=step))


def test_details_of_a_line():
    bands = (make_band(0, (2, 1, 4)), make_band(1, (2, 1, 4)))
    assert_round_trip(make_scene(grids=(codec.Grid("line", (7,), bands),)))


def test_255_levels():
    bands = tuple(make_band(level, (1, 1, 3)) for level in range(255))
    assert_round_trip(make_scene(grids=(codec.Grid("line", (3,), bands),)))


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_number_of_cameras(count):
    assert_round_trip(make_scene(cameras=make_cameras(count)))


@pytest.mark.parametrize("shape", [(0, 4, 4), (1, 1, 1), (3, 5, 7), (8, 8, 8)])
@pytest.mark.parametrize("value", [False, True])
def test_constant_occupancy(shape, value):
    assert_round_trip(make_scene(occupancy=np.full(shape, value)))


def test_floats_keep_every_bit():
    patterns = np.array([0, 2**31, 1, 0x7F800000, 0x7FC00001, 0xFF800001, 0xFFFFFFFF], np.uint32)
    cameras = dataclasses.replace(make_cameras(7), fx=patterns.view(np.float32))
    assert_round_trip(make_scene(networks={"odd": patterns.view(np.float32)}, cameras=cameras))


def test_meta_keeps_types_floats_and_characters():
    meta = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1.0, 1e22],
        "ints": [2**63 - 1, -(2**63), 0],
        "bools": [True, False, None],
        "text": 'quote " backslash \\ newline \n nul \0 emoji \U0001f600 line \u2028',
        "": {"": []},
    }
    assert_round_trip(make_scene(meta=meta))


def test_long_meta():
    assert_round_trip(make_scene(meta={"views": [{"psnr": i / 7} for i in range(5000)]}))


def integers(*values: int, step: float = 0.5) -> codec.QuantisedArray:
    return codec.QuantisedArray(np.array(values, np.int16), step)


def test_networks_as_integers():
    index = np.arange(3000)
    wide = np.where(index % 7, index % 23 - 11, index * 31 % 65535 - 32767).astype(np.int16)
    networks = {
        "wide": codec.QuantisedArray(wide.reshape(3, 10, 100), 2.0**-9),
        "limits": integers(32767, -32767, 0, 1, -1, step=0.0),
        "zeros": integers(0, 0, 0),
        "one": integers(-1),
        "empty": codec.QuantisedArray(np.zeros((0, 4), np.int16), 1.0),
        "scalar": codec.QuantisedArray(np.array(-7, np.int16), 1.0),
        "floats": np.linspace(-1, 1, 50, dtype=np.float32),
    }
    scene = make_scene(networks=networks)
    assert codec.equal(codec.decode(codec.encode(scene)), scene)


def test_networks_as_integers_are_refused_in_profile_paper():
    scene = make_scene(networks={"fine": np.zeros(3, np.float32), "coarse": integers(1, 2)})
    with pytest.raises(codec.CodecError, match=r"networks\['coarse'\]: .*'paper' .*to_floats"):
        codec.encode(scene, "paper")


@pytest.mark.parametrize("profile", PROFILES)
def test_decoded_arrays_are_contiguous_writable_and_own_their_memory(profile):
    original = with_integers(make_scene()) if profile == "range" else make_scene()
    scene = codec.decode(codec.encode(original, profile))
    arrays = [
        array for grid in scene.grids for band in grid.bands for array in (band.values, band.mask)
    ]
    arrays += [scene.occupancy]
    arrays += [getattr(array, "values", array) for array in scene.networks.values()]
    arrays += [getattr(scene.cameras, field.name) for field in dataclasses.fields(scene.cameras)]
    for array in arrays:
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
        assert array.dtype.isnative


@pytest.mark.parametrize("profile", PROFILES)
def test_views_and_other_memory_orders_are_read_as_what_they_show(profile):
    scene = make_scene()
    band = scene.grids[0].bands[1]
    twisted = replace_band(
        scene, 0, 1, values=np.array(band.values, order="F"), mask=np.array(band.mask, order="F")
    )
    twisted = dataclasses.replace(
        twisted,
        occupancy=scene.occupancy[::-1].copy()[::-1],
        networks={name: np.array(array, order="F") for name, array in scene.networks.items()},
    )
    assert codec.encode(twisted, profile) == codec.encode(scene, profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_encoding_leaves_its_input_alone_and_gives_the_same_bytes(profile):
    scene = with_integers(make_scene()) if profile == "range" else make_scene()
    before = copy.deepcopy(scene)
    for band in (band for grid in scene.grids for band in grid.bands):
        band.values.flags.writeable = band.mask.flags.writeable = False
    for array in scene.networks.values():
        getattr(array, "values", array).flags.writeable = False
    scene.occupancy.flags.writeable = False
    first = codec.encode(scene, profile)
    assert codec.equal(scene, before)
    assert list(scene.networks) == list(before.networks)
    assert codec.encode(scene, profile) == first == codec.encode(before, profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_order_of_names_carries_no_meaning(profile):
    scene = make_scene()
    shuffled = make_scene(
        meta=dict(reversed(scene.meta.items())),
        networks=dict(reversed(scene.networks.items())),
    )
    assert codec.encode(shuffled, profile) == codec.encode(scene, profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_decodes_any_bytes_like(profile):
    data = codec.encode(make_scene(), profile)
    for other in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert codec.equal(codec.decode(other), make_scene())


def test_imports_neither_torch_nor_nerfstudio():
    code = (
        "import sys, masked_wavelet_codec as codec\n"
        "codec.decode(codec.encode(codec.Scene({}, 8, (), {}, None, None)))\n"
        "bad = {'torch', 'nerfstudio', 'masked_wavelet_nerf', 'pickle'} & set(sys.modules)\n"
        "bad -= before\n"
        "assert not bad, bad\n"
    )
    # numpy itself imports pickle.
    code = "import sys, numpy; before = set(sys.modules)\n" + code
    root = Path(codec.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


@st.composite
def grids(draw, bits: int, name: str) -> codec.Grid:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_dims = draw(st.integers(1, 2))
    channels = draw(st.integers(0, 5))
    bands = []
    for level in range(draw(st.integers(0, 4))):
        spatial = draw(st.tuples(*[st.integers(0, 9)] * num_dims))
        shape = (channels, 1 if level == 0 else 2**num_dims - 1, *spatial)
        mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
        values = rng.integers(-largest(bits), largest(bits), shape, np.int16, endpoint=True) * mask
        step = draw(st.floats(0, width=32, allow_nan=False, allow_infinity=False))
        bands.append(codec.Band(level, values, mask, abs(step)))
    size = draw(st.tuples(*[st.integers(0, 2**31 - 1)] * num_dims))
    return codec.Grid(name, size, tuple(bands))


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names
)
metas = st.dictionaries(
    names,
    st.recursive(leaves, lambda item: st.lists(item) | st.dictionaries(names, item), max_leaves=8),
    max_size=4,
)


def array(rng, shape, has_integers: bool) -> np.ndarray | codec.QuantisedArray:
    if not has_integers or rng.random() < 0.3:
        return np.array(rng.standard_normal(shape), np.float32)
    limit = 2 ** int(rng.integers(0, 16)) - 1
    values = np.array(rng.integers(-limit, limit, shape, np.int16, endpoint=True))
    return codec.QuantisedArray(values, float(np.float32(rng.random())))


@st.composite
def scenes(draw) -> codec.Scene:
    bits = draw(st.integers(2, 16))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.dictionaries(names, st.lists(st.integers(0, 4), max_size=4), max_size=3))
    box = draw(st.none() | st.tuples(*[st.integers(0, 9)] * 3))
    num_cameras = draw(st.none() | st.integers(0, 4))
    has_integers = draw(st.booleans())
    kinds = (make_cameras, make_posed_cameras)
    return codec.Scene(
        meta=draw(metas),
        bits=bits,
        grids=tuple(draw(grids(bits, name)) for name in draw(st.sets(names, max_size=3))),
        networks={name: array(rng, shape, has_integers) for name, shape in shapes.items()},
        occupancy=None if box is None else rng.random(box) < 0.3,
        cameras=None if num_cameras is None else draw(st.sampled_from(kinds))(num_cameras),
    )


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_any_scene(scene):
    is_float = all(isinstance(array, np.ndarray) for array in scene.networks.values())
    for profile in PROFILES if is_float else ("range",):
        data = codec.encode(scene, profile)
        assert codec.equal(codec.decode(data), scene)
        assert sum(codec.describe(data).parts.values()) == len(data)
