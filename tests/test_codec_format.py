"""What `export/FORMAT.md` says is what the codec does: a reader written from it alone agrees."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import struct
import zlib
from pathlib import Path

import format_reader as reader
import numpy as np
import pytest
from test_codec_scenes import (
    make_band,
    make_cameras,
    make_line,
    make_plane,
    make_posed_cameras,
    make_scene,
)

import masked_wavelet_codec as codec

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.mwnf"))
PROFILES = ["paper", "range"]


# ---------------------------------------------------------------- the comparison


def assert_same(name: str, read, decoded) -> None:
    """Equal to the type and the sign of a zero."""
    assert repr(read) == repr(decoded), name


def assert_agree(data: bytes) -> dict:
    """The reader's and the codec's scene have every field in common."""
    read, scene = reader.decode(data), codec.decode(data)
    assert_same("meta", read["meta"], scene.meta)
    assert_same("bits", read["bits"], scene.bits)

    assert_same("names", sorted(read["networks"]), sorted(scene.networks))
    for name, array in read["networks"].items():
        other, step = scene.networks[name], None
        if isinstance(other, codec.QuantisedArray):
            other, step = other.values, other.step
        assert_same(name, array["shape"], list(other.shape))
        assert_same(name, array["step"], step)
        assert_same(name, array["values"], other.tolist())

    assert (read["occupancy"] is None) == (scene.occupancy is None)
    if scene.occupancy is not None:
        assert_same("occupancy", read["occupancy"], scene.occupancy.tolist())

    assert (read["cameras"] is None) == (scene.cameras is None)
    if scene.cameras is not None:
        fields = dataclasses.asdict(scene.cameras)
        fields["camera_to_world"] = fields.pop("camera_to_worlds")
        assert len(read["cameras"]) == len(scene.cameras.fx)
        for number, camera in enumerate(read["cameras"]):
            assert set(camera) == set(fields)
            for name, value in camera.items():
                assert_same(name, value, fields[name][number].tolist())

    assert len(read["grids"]) == len(scene.grids)
    for grid, other in zip(read["grids"], scene.grids, strict=True):
        assert_same("name", grid["name"], other.name)
        assert_same("size", grid["size"], list(other.size))
        assert len(grid["bands"]) == len(other.bands)
        for band, band_of_codec in zip(grid["bands"], other.bands, strict=True):
            at = f"{other.name}[{band['level']}]"
            assert_same(at, band["level"], band_of_codec.level)
            assert_same(at, band["step"], float(band_of_codec.step))
            for name in ("mask", "values"):
                array = getattr(band_of_codec, name)
                assert_same(at, band["shape"], list(array.shape))
                found = band[name]
                for _ in range(3 - grid["D"]):
                    found = [[voxels[0] for voxels in channel] for channel in found]
                assert_same(at, found, array.tolist())
    return read


# ---------------------------------------------------------------- scenes


def smooth_plane(name, sizes, channels, seed, bits=8) -> codec.Grid:
    """Coefficients as of a picture, or of a body if sizes have three lengths.

    They are alike across levels, channels, bands and neighbours.
    """
    random = np.random.default_rng(seed)
    bands = []
    for level, size in enumerate(sizes):
        shape = (channels, 1 if level == 0 else 2 ** len(size) - 1, *size)
        places = [np.linspace(-1, 1, length) for length in (1, *size)[-3:]]
        k, i, j = np.meshgrid(*places, indexing="ij")
        k, i, j = (place.reshape(size) for place in (k if len(size) == 3 else 0 * k, i, j))
        loud = 60 / (level + 1) * np.exp(-6 * ((i - 0.2) ** 2 + (j + 0.1) ** 2 + k**2))
        values = np.rint(loud * (np.sin(5 * i + 3 * j) + random.normal(0, 0.5, shape)))
        mask = np.abs(values) > 1 + 2 * random.random(shape)
        values = np.clip(values, -127, 127) * mask * (random.random(shape) < 0.95)
        bands.append(codec.Band(level, values.astype(np.int16), mask, 2.0**-level))
    return codec.Grid(name, tuple(sizes[-1]), tuple(bands))


def quantised(values, step=0.125) -> codec.QuantisedArray:
    return codec.QuantisedArray(values=np.array(values, np.int16), step=step)


def uniform_plane(name, keep: list[bool]) -> codec.Grid:
    """A plane that keeps all or none of each level."""
    bands = []
    for band, kept in zip(make_plane(name, (12, 20), 3, levels=2).bands, keep, strict=True):
        mask = np.full(band.mask.shape, kept)
        values = (np.arange(mask.size).reshape(mask.shape) % 9 - 4) * mask
        bands.append(dataclasses.replace(band, mask=mask, values=values.astype(np.int16)))
    return codec.Grid(name, (12, 20), tuple(bands))


def scene_of_grids(*grids: codec.Grid, **others) -> codec.Scene:
    return codec.Scene({}, 8, grids, others.get("networks", {}), others.get("occupancy"), None)


@functools.cache
def scenes() -> dict[str, codec.Scene]:
    halves = [(5, 3), (5, 3), (9, 6), (17, 11)]
    x, y, z = np.meshgrid(*map(np.arange, (13, 7, 9)), indexing="ij")
    names = [f"planes.{k}" for k in range(9)]
    sizes = [[(4, 6), (4, 6), (8, 12)], [(4, 5), (4, 5), (8, 10)], [(6, 5), (6, 5), (12, 10)]]
    counts = np.arange(-300, 301, dtype=np.int16)
    return {
        "8 bits": make_scene(8),
        "12 bits": make_scene(12),
        "2 bits": make_scene(2),
        "16 bits": make_scene(16),
        "nothing optional": codec.Scene({}, 8, (make_line("a", 5, 2),), {}, None, None),
        "coded cameras": make_scene(cameras=make_posed_cameras(9)),
        "no grids": codec.Scene({"a": -0.0}, 2, (), {}, None, make_cameras(1)),
        "odd planes": scene_of_grids(
            make_plane("formula", (37, 21), 3, levels=3), smooth_plane("smooth", halves, 2, seed=1)
        ),
        "lines": scene_of_grids(
            make_line("a", 23, 4),
            make_line("b", 23, 4, residue=4),
            make_line("c", 23, 2),
            make_line("d", 1, 1, residue=11),
            codec.Grid("e", (20,), (make_band(0, (3, 1, 10)), make_band(1, (3, 1, 10)))),
        ),
        # Three rows of three grids, the last two of which follow others of the same sizes.
        "families": scene_of_grids(
            *(smooth_plane(names[k], sizes[k % 3], 3, seed=k) for k in range(3)),
            *(smooth_plane(names[k], sizes[k % 3], 5, seed=k % 3) for k in range(3, 6)),
            *(smooth_plane(names[k], sizes[k % 3], 3, seed=k % 3) for k in range(6, 9)),
        ),
        # Leaving out grids without a level joins rows, and shifts positions.
        "families with gaps": scene_of_grids(
            smooth_plane("a", sizes[0], 3, seed=1),
            smooth_plane("b", sizes[0][:2], 2, seed=2),
            smooth_plane("c", sizes[0], 3, seed=3),
            make_line("d", 6, 3),
            smooth_plane("e", sizes[0][:2], 3, seed=4),
            smooth_plane("f", sizes[0], 3, seed=1),
            smooth_plane("g", sizes[0], 2, seed=3),
        ),
        "voxels": scene_of_grids(
            smooth_plane("a", [(3, 5, 3), (3, 5, 3), (6, 9, 5)], 2, seed=1),
            smooth_plane("b", [(3, 5, 3), (3, 5, 3), (6, 9, 5)], 2, seed=2),
            smooth_plane("plane", sizes[0], 2, seed=3),
            smooth_plane("c", [(3, 5, 3), (3, 5, 3), (6, 9, 5)], 3, seed=1),
            smooth_plane("d", [(3, 3, 5), (5, 7, 3), (3, 5, 9)], 2, seed=4),
        ),
        "all or none": scene_of_grids(
            uniform_plane("none", [False, False, False]),
            uniform_plane("all", [True, True, True]),
            uniform_plane("first", [True, False, False]),
            uniform_plane("last", [False, False, True]),
            make_plane("some", (12, 20), 3, levels=2),
        ),
        "none": scene_of_grids(uniform_plane("none", [False, False, False])),
        # More survivors than features tell apart, and sizes that do not divide each other.
        "many": scene_of_grids(
            smooth_plane("many", [(40, 45), (7, 11), (19, 8)], 1, seed=5),
            codec.Grid(
                "full",
                (41, 40),
                (make_band(0, (1, 1, 41, 40), residue=11), make_band(1, (1, 3, 9, 7))),
            ),
        ),
        "bands without coefficients": scene_of_grids(
            codec.Grid(
                "a",
                (4, 4),
                (
                    make_band(0, (2, 1, 0, 3)),
                    make_band(1, (2, 3, 5, 4)),
                    make_band(2, (2, 3, 4, 0)),
                    make_band(3, (2, 3, 5, 4)),
                ),
            ),
            codec.Grid("b", (4, 4), (make_band(0, (0, 1, 4, 3)),)),
            codec.Grid("d", (4, 4, 4), tuple(make_band(i, (2, 7**i, 3, 2 * i, 3)) for i in (0, 1))),
            codec.Grid("c", (4,), ()),
        ),
        "networks": scene_of_grids(
            networks={
                "large": quantised(counts[:600].reshape(3, 200) * 109, step=0.0),
                "small": quantised((counts[::5] % 7 - 3).reshape(11, 11), step=2.0**-140),
                "zeros": quantised(np.zeros((4, 5))),
                "none": quantised(np.zeros((3, 0, 2))),
                "scalar": quantised(-5),
                "zero": quantised(0),
                "float": np.array([[-0.0, 1e-40, 3e38]], np.float32),
                "float none": np.zeros((0, 3), np.float32),
                "weiß": np.array(-2.5, np.float32),
            }
        ),
        "occupancy": scene_of_grids(
            occupancy=(x - 6) ** 2 + 2 * (y - 3) ** 2 + (z - 4) ** 2 + x * y % 3 < 22
        ),
        "one voxel": scene_of_grids(occupancy=np.ones((1, 1, 1), bool)),
        "no voxel": scene_of_grids(occupancy=np.zeros((3, 1, 2), bool)),
    }


NAMES = list(scenes())


def encoded(name: str, profile: str) -> bytes:
    scene = scenes()[name]
    if profile == "paper":
        floats = {k: v for k, v in scene.networks.items() if isinstance(v, np.ndarray)}
        scene = dataclasses.replace(scene, networks=floats)
    return codec.encode(scene, profile=profile)


# ---------------------------------------------------------------- both read the same


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reader_agrees_on_golden_files(path):
    assert_agree(path.read_bytes())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_reader_agrees_on_scenes(name, profile):
    data = encoded(name, profile)
    assert assert_agree(data)["profile"] == profile
    has_voxels = any(len(grid.size) == 3 for grid in scenes()[name].grids)
    minor = 2 if has_voxels else PROFILES.index(profile)
    assert struct.unpack_from("<3H", data, 8) == (1, minor, PROFILES.index(profile) + 1)


def split(data: bytes) -> tuple[bytes, list[tuple]]:
    """The header without its checksum, and (type, flags, index, payload) of each section."""
    sections = []
    at = 20
    while at < len(data):
        kind, flags, index, length = struct.unpack_from("<HBBI", data, at)
        sections.append((kind, flags, index, data[at + 12 : at + 12 + length]))
        at += 12 + length
    return data[:16], sections


def join(header: bytes, sections: list[tuple], count: int | None = None) -> bytes:
    header = header[:14] + struct.pack("<H", len(sections) if count is None else count)
    data = header + struct.pack("<I", zlib.crc32(header))
    for kind, flags, index, payload in sections:
        head = struct.pack("<HBBI", kind, flags, index, len(payload))
        data += head + struct.pack("<I", zlib.crc32(head + payload)) + payload
    return data


def assert_refused(data: bytes) -> None:
    with pytest.raises(codec.CodecError):
        codec.decode(data)
    with pytest.raises(ValueError):  # noqa: PT011 (a reader of its own words)
        reader.decode(data)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["odd planes", "families with gaps", "voxels"])
def test_reader_agrees_on_prefixes(name, profile):
    header, sections = split(encoded(name, profile))
    whole = reader.decode(join(header, sections))
    first = {"paper": reader.VALUES, "range": reader.COEFFICIENTS}[profile]
    levels = 0
    for count in range(len(sections)):
        prefix = join(header, sections[:count], len(sections))
        levels = sum(kind == first for kind, *_ in sections[:count])
        if levels == 0:
            assert_refused(prefix)
            continue
        read = assert_agree(prefix)
        for grid, grid_of_whole in zip(read["grids"], whole["grids"], strict=True):
            assert grid["bands"][:levels] == grid_of_whole["bands"][:levels]
            for band in grid["bands"][levels:]:
                assert "True" not in repr(band["mask"]) and band["kept"] > 0
    assert levels == len(whole["grids"][0]["bands"]) - 1


@pytest.mark.parametrize("profile", PROFILES)
def test_levels_after_a_missing_one_are_missing(profile):
    header, sections = split(encoded("odd planes", profile))
    without = [section for section in sections if section[2] != 1]
    read = assert_agree(join(header, without, len(sections)))
    for grid in read["grids"]:
        assert ["True" in repr(band["mask"]) for band in grid["bands"]] == [True, *[False] * 3]
    assert_refused(join(header, without))


@pytest.mark.parametrize("profile", PROFILES)
def test_sections_come_in_any_order_and_unknown_ones_are_skipped(profile):
    header, sections = split(encoded("8 bits", profile))
    unknown = [(99, 0, 3, b"abc"), (99, 254, 4, b"")]
    assert_agree(join(header, [*unknown, *sections[::-1]]))
    assert_refused(join(header, [*sections, (99, 1, 0, b"")]))
    assert_refused(join(header, [*sections, sections[0]]))


@pytest.mark.parametrize("profile", PROFILES)
def test_both_refuse_sections_that_a_file_has_no_use_for(profile):
    header, sections = split(encoded("8 bits", profile))
    foreign = {"paper": 8, "range": 6}[profile]
    own = {"paper": 6, "range": 8}[profile]
    for section in [(foreign, 1, 0, b""), (own, 1, 3, b""), (reader.META, 1, 1, b"")]:
        assert_refused(join(header, [*sections, section]))


def test_both_refuse_another_major_version():
    header, sections = split(encoded("8 bits", "range"))
    for major in (0, 2):
        assert_refused(join(header[:8] + struct.pack("<H", major) + header[10:], sections))
    for minor in (0, 7):
        assert_agree(join(header[:10] + struct.pack("<H", minor) + header[12:], sections))


# ---------------------------------------------------------------- both refuse the same


@pytest.mark.parametrize("profile", PROFILES)
def test_both_refuse_a_wrong_checksum(profile):
    data = bytearray(encoded("8 bits", profile))
    for at in (17, 30, len(data) - 1):
        data[at] ^= 1
        assert_refused(bytes(data))
        data[at] ^= 1
    assert_agree(bytes(data))


@pytest.mark.parametrize("profile", PROFILES)
def test_both_refuse_other_kept_counts_and_values_beyond_the_bits(profile):
    header, sections = split(encoded("12 bits", profile))
    place = [kind for kind, *_ in sections].index(reader.GRIDS)
    kind, flags, index, payload = sections[place]
    fewer_bits = bytes([9]) + payload[1:]
    # The payload ends with the varint of the last band.
    assert payload[-1] not in (0, 127)
    one_less = payload[:-1] + bytes([payload[-1] - 1])
    one_more = payload[:-1] + bytes([payload[-1] + 1])
    for changed in (fewer_bits, one_less, one_more):
        others = [*sections[:place], (kind, flags, index, changed), *sections[place + 1 :]]
        assert_refused(join(header, others))


@pytest.mark.parametrize("name", ["8 bits", "networks", "occupancy"])
def test_both_refuse_words_that_do_not_end_with_the_decisions(name):
    header, sections = split(encoded(name, "range"))
    coded = (reader.COEFFICIENTS, reader.CODED_NETWORKS, reader.CODED_OCCUPANCY)
    changes = 0
    for place, (kind, flags, index, payload) in enumerate(sections):
        if kind not in coded or (kind == reader.CODED_NETWORKS and name != "networks"):
            continue
        # A zero word, a word too many, a word too few, and another last bit.
        last = payload[:-4] + bytes([payload[-4] ^ 2]) + payload[-3:]
        for changed in [payload + bytes(4), payload + b"\1\0\0\0", payload[:-4], last]:
            others = [*sections[:place], (kind, flags, index, changed), *sections[place + 1 :]]
            assert_refused(join(header, others))
            changes += 1
    assert changes > 3


def test_both_refuse_a_step_with_a_sign():
    grid = codec.Grid("a", (9,), (make_band(0, (2, 1, 9), step=0.375),))
    scene = scene_of_grids(grid, networks={"b": quantised([1, 2], step=0.375)})
    header, sections = split(codec.encode(scene, profile="range"))
    step = struct.pack("<f", 0.375)
    for place, (kind, flags, index, payload) in enumerate(sections):
        if kind in (reader.GRIDS, reader.CODED_NETWORKS):
            assert payload.count(step) == 1
            for other in (-0.0, float("inf")):
                changed = payload.replace(step, struct.pack("<f", other))
                others = [*sections[:place], (kind, flags, index, changed), *sections[place + 1 :]]
                assert_refused(join(header, others))


def test_both_refuse_voxels_without_words():
    """A decision takes something, so no words hold none."""
    scene = scene_of_grids(occupancy=np.zeros((2, 2, 2), bool))
    header, sections = split(codec.encode(scene, profile="range"))
    place = [kind for kind, *_ in sections].index(reader.CODED_OCCUPANCY)
    for shape, fits in [(b"\x40\x40\x00", True), (b"\x01\x01\x01", False)]:
        sections[place] = (reader.CODED_OCCUPANCY, 1, 0, shape)
        (assert_agree if fits else assert_refused)(join(header, sections))


# ---------------------------------------------------------------- what the scenes reach


def families_of(data: bytes) -> list[dict]:
    """The families of all levels with their models."""
    grids = reader.decode(data)["grids"]
    found = []
    for kind, _, level, payload in split(data)[1]:
        if kind == reader.COEFFICIENTS:
            found += reader.read_families(reader.Fields(payload), level, grids)
    return found


def test_scenes_use_every_parameter():
    found = [family for name in NAMES for family in families_of(encoded(name, "range"))]
    for k in range(12):
        assert len({family["weights"][k] for family in found}) > 1, k
    assert len({family["equal_signs"] for family in found}) > 1
    assert {family["model"]["K"] for family in found} >= {0, 1, 7, 11, 15}


# ---------------------------------------------------------------- tables, by exact means


def test_weights_of_all_logits_are_the_nearest_integers():
    with decimal.localcontext(decimal.Context(prec=50)):
        for logit in range(512):
            exact = 65536 / (1 + (decimal.Decimal(256 - logit) / 16).exp())
            down = int(exact)
            # No weight is so near to a half that a float would round it elsewhere.
            assert abs(exact - down - decimal.Decimal("0.5")) > decimal.Decimal("1e-4")
            nearest = down + (exact - down > decimal.Decimal("0.5"))
            assert reader.weight_of_logit(logit) == min(max(nearest, 16), 65520), logit
    assert reader.weight_of_logit(256) == 32768


def test_logarithms_are_exact():
    for n in range(5001):
        power = (4 * min(n, 4095) + 1) ** 16
        assert 2 ** reader.L(n) <= power < 2 ** (reader.L(n) + 1), n
    assert (reader.L(0), reader.L(4095), reader.L(4096)) == (0, 223, 223)
