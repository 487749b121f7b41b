"""Sections, versions and the accounting of bytes."""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib

import numpy as np
import pytest
from test_codec_scenes import PROFILES, make_plane, make_scene

import masked_wavelet_codec as codec
from masked_wavelet_codec import container
from masked_wavelet_codec.container import Profile, Section, SectionType


def sections_of(data: bytes) -> list[Section]:
    return list(container.parse(data).sections)


def rebuild(data: bytes, sections) -> bytes:
    """A file of other sections, of the same profile."""
    return container.build(Profile(container.parse(data).profile_id), sections)


def with_header(data: bytes, **fields: int) -> bytes:
    """The file with fields of its header changed and the checksum made right."""
    names = ("major", "minor", "profile", "num_sections")
    values = dict(zip(names, struct.unpack_from("<4H", data, 8), strict=True)) | fields
    header = data[:8] + struct.pack("<4H", *values.values())
    return header + struct.pack("<I", zlib.crc32(header)) + data[20:]


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(codec.CodecError, match=match):
        codec.decode(data)


@pytest.fixture(scope="module", params=PROFILES)
def profile(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def data(profile) -> bytes:
    return codec.encode(make_scene(), profile)


EXPECTED = {
    "paper": (
        (1, 0),
        ["meta", "cameras", "networks", "occupancy", "grids"],
        ["mask[0]", "values[0]", "mask[1]", "values[1]", "mask[2]", "values[2]"],
    ),
    "range": (
        (1, 1),
        ["meta", "cameras", "coded_networks", "coded_occupancy", "grids"],
        ["coefficients[0]", "coefficients[1]", "coefficients[2]"],
    ),
}
"""Of each profile's file: version, sections before the levels, sections of the levels."""


def test_header_by_hand(profile, data):
    version, before, levels = EXPECTED[profile]
    number = {"paper": 1, "range": 2}[profile]
    assert data[:8] == b"\x89MWNF\r\n\x1a"
    expected = (*version, number, len(before) + len(levels), zlib.crc32(data[:16]))
    assert struct.unpack_from("<4HI", data, 8) == expected
    type_id, flags, index, length, checksum = struct.unpack_from("<HBBII", data, 20)
    assert (type_id, flags, index) == (1, 1, 0)
    assert checksum == zlib.crc32(data[20:28] + data[32 : 32 + length])


def test_order_is_what_rendering_needs_then_levels_coarse_first(profile, data):
    _, before, levels = EXPECTED[profile]
    assert [section.name for section in sections_of(data)] == before + levels


def test_voxels_need_the_version_that_they_came_with(profile):
    flat, voxels = make_scene(), make_scene(grids=(make_plane("a", (4, 6, 5), 2, levels=1),))
    assert container.parse(codec.encode(flat, profile)).version == EXPECTED[profile][0]
    assert container.parse(codec.encode(voxels, profile)).version == (1, 2)


def test_ids_stay_as_they_were_assigned():
    # Files in the world depend on these numbers: add to them, change none.
    assert {kind.name: int(kind) for kind in SectionType} == {
        "META": 1,
        "CAMERAS": 2,
        "NETWORKS": 3,
        "OCCUPANCY": 4,
        "GRIDS": 5,
        "MASK": 6,
        "VALUES": 7,
        "COEFFICIENTS": 8,
        "CODED_NETWORKS": 9,
        "CODED_OCCUPANCY": 10,
        "CODED_CAMERAS": 11,
    }
    assert {kind.name: int(kind) for kind in Profile} == {"PAPER": 1, "RANGE": 2}


@pytest.mark.parametrize("position", [0, 3, -1])
@pytest.mark.parametrize("unknown_flags", [0, 0x80])
def test_unknown_optional_section_is_skipped(data, position, unknown_flags):
    sections = sections_of(data)
    position = len(sections) if position < 0 else position
    sections.insert(position, Section(77, 5, b"from the future", is_required=False))
    changed = bytearray(rebuild(data, sections))
    if unknown_flags:
        changed = set_flags(bytes(changed), position, unknown_flags)
    assert codec.equal(codec.decode(changed), make_scene())


def set_flags(data: bytes, number: int, flags: int) -> bytes:
    """The file with the flags of one section changed and its checksum made right."""
    position = container.HEADER_BYTES
    for _ in range(number):
        position += container.SECTION_HEADER_BYTES
        position += struct.unpack_from("<I", data, position - 8)[0]
    changed = bytearray(data)
    changed[position + 2] = flags
    (length,) = struct.unpack_from("<I", data, position + 4)
    head = bytes(changed[position : position + 8])
    payload = data[position + 12 : position + 12 + length]
    struct.pack_into("<I", changed, position + 8, zlib.crc32(head + payload))
    return bytes(changed)


def test_unknown_required_section_is_refused_with_the_version_needed(data):
    changed = rebuild(data, [*sections_of(data), Section(77, 0, b"")])
    refuse(
        with_header(changed, minor=4),
        r"section unknown type 77: required; the file needs format version 1\.4 or later, "
        r"this codec reads 1\.3; update",
    )


def test_unknown_flag_of_a_known_section_is_refused(data):
    refuse(set_flags(data, 4, 0x41), r"section grids: unknown flags 0x40; the file needs")


def test_newer_minor_version_is_read_where_all_sections_are_known(data):
    assert codec.equal(codec.decode(with_header(data, minor=9)), make_scene())


def test_newer_major_version_is_refused(data):
    refuse(with_header(data, major=2, minor=0), r"needs format version 2\.0 or later")
    # Even where the rest of the header has changed its meaning.
    refuse(data[:8] + b"\x02\x00" + bytes(10), r"needs format version 2\.0 or later")
    with pytest.raises(codec.CodecError, match=r"needs format version 2\.0"):
        codec.describe(with_header(data, major=2, minor=0))


def test_major_version_0_is_refused(data):
    refuse(with_header(data, major=0, minor=0), "there is no format version 0.0")


def test_sections_of_the_other_profile_are_refused(profile, data):
    other = {"paper": "range", "range": "paper"}[profile]
    missing = EXPECTED[other][1][2]
    refuse(
        container.build(Profile[other.upper()], sections_of(data)), f"section {missing}: missing"
    )
    # One more section than its own is none of its business either.
    for extra in sections_of(codec.encode(make_scene(), other)):
        if extra.name not in EXPECTED[profile][1]:
            changed = rebuild(data, [*sections_of(data), extra])
            refuse(changed, rf"^section {re.escape(extra.name)}: not expected in this file")


def test_profile_of_the_far_future_is_refused(data):
    changed = with_header(data, profile=900, minor=7)
    refuse(changed, r"profile 'unknown profile 900': the file needs format version 1\.7")


def test_missing_section(profile, data):
    _, (meta, _, networks, _, grids), levels = EXPECTED[profile]
    for name in (meta, networks, grids, *levels):
        sections = [section for section in sections_of(data) if section.name != name]
        with pytest.raises(codec.CodecError) as caught:
            codec.decode(rebuild(data, sections))
        assert str(caught.value) == f"section {name}: missing"


@pytest.mark.parametrize("name", ["cameras", "occupancy"])
def test_section_that_may_be_missing(data, name):
    sections = [s for s in sections_of(data) if s.name.removeprefix("coded_") != name]
    assert codec.equal(codec.decode(rebuild(data, sections)), make_scene(**{name: None}))


def test_section_that_comes_twice(profile, data):
    again = sections_of(data)[5]
    assert again.name == EXPECTED[profile][2][0]
    changed = rebuild(data, [*sections_of(data), again])
    refuse(changed, rf"section {re.escape(again.name)}: comes twice")


def test_level_that_no_grid_has(data):
    extra = dataclasses.replace(sections_of(data)[5], index=3)
    refuse(
        rebuild(data, [*sections_of(data), extra]),
        rf"section {re.escape(extra.name)}: not expected",
    )


def test_sections_in_another_order(data):
    assert codec.equal(codec.decode(rebuild(data, sections_of(data)[::-1])), make_scene())


def test_bytes_after_the_last_section(data):
    refuse(data + b"\0", "1 bytes after the last section")


def test_checksum_names_its_section(data):
    for section in sections_of(data):
        changed = bytearray(data)
        payload = section.payload
        offset = data.index(bytes(payload))
        changed[offset + len(payload) // 2] ^= 0x10
        with pytest.raises(codec.CodecError) as caught:
            codec.decode(changed)
        assert f"section {section.name}: the checksum is wrong" in str(caught.value)


@pytest.mark.parametrize("junk", [b"", b"\x89", b"PK\x03\x04" + bytes(99), bytes(100), "text", 3])
def test_not_a_scene_at_all(junk):
    for function in (codec.decode, codec.describe):
        with pytest.raises(codec.CodecError, match=r"^(container|data): "):
            function(junk)


def test_line_end_translation_is_noticed(data):
    refuse(data.replace(b"\r\n", b"\n"), "magic")


def test_payload_of_4_gib_is_refused(monkeypatch):
    monkeypatch.setattr(container, "_MAX_PAYLOAD", 10)
    with pytest.raises(codec.CodecError, match="section meta: 4 GiB or more"):
        codec.encode(make_scene())


# Accounting.


def test_describe_accounts_for_every_byte(profile, data):
    described = codec.describe(data)
    assert sum(described.parts.values()) == described.num_bytes == len(data)
    version, before, levels = EXPECTED[profile]
    assert described.version == version and described.profile == profile
    assert described.meta == make_scene().meta
    assert all(section.is_intact for section in described.sections)
    by_name = {section.name: section.num_bytes for section in described.sections}
    for section, part in zip(before, ("meta", "cameras", "networks", "occupancy"), strict=False):
        assert described.parts[part] == by_name[section] > 0
    for part in ("mask", "values", "coefficients"):
        expected = sum(by_name.get(f"{part}[{level}]", 0) for level in range(3))
        assert described.parts[part] == expected
        assert (expected > 0) == (f"{part}[0]" in levels)
    assert described.parts["container"] == 20 + len(before + levels) * 12 + by_name["grids"]


def test_describe_counts_what_is_kept(profile, data):
    scene = make_scene()
    described = codec.describe(data)
    expected = [
        (grid.name, band.level, band.mask.size, int(band.mask.sum()))
        for grid in scene.grids
        for band in grid.bands
    ]
    levels = described.levels
    found = [(level.grid, level.level, level.num_coefficients, level.num_kept) for level in levels]
    assert found == expected
    assert described.levels[0].kept_fraction == scene.grids[0].bands[0].mask.mean()
    assert described.num_coefficients == sum(item[2] for item in expected)
    assert described.num_kept == sum(item[3] for item in expected)
    bits = 8 * sum(described.parts[part] for part in ("mask", "values", "coefficients"))
    assert described.bits_per_kept == bits / described.num_kept
    if profile == "paper":
        assert described.parts["values"] == described.num_kept  # 8 bits: a byte each


def test_describe_of_a_scene_without_coefficients(profile):
    described = codec.describe(codec.encode(codec.Scene({}, 8, (), {}, None, None), profile))
    assert described.num_coefficients == described.num_kept == 0
    assert described.bits_per_kept == 0.0 and described.levels == ()
    empty = np.zeros((0, 1, 4), np.int16)
    grid = codec.Grid("line", (4,), (codec.Band(0, empty, empty.astype(bool), 1.0),))
    described = codec.describe(codec.encode(make_scene(grids=(grid,)), profile))
    assert described.levels[0].kept_fraction == 0.0


def test_describe_with_an_unknown_section(data):
    changed = rebuild(data, [*sections_of(data), Section(77, 5, b"x" * 100)])
    described = codec.describe(changed)
    assert sum(described.parts.values()) == len(changed)
    assert described.sections[-1] == codec.SectionInfo("unknown type 77", 100, True)
    assert described.parts["container"] == codec.describe(data).parts["container"] + 112


def test_describe_reports_a_wrong_checksum(profile, data):
    for name in ("meta", "grids", EXPECTED[profile][2][1]):
        payload = next(section.payload for section in sections_of(data) if section.name == name)
        changed = bytearray(data)
        changed[data.index(bytes(payload))] ^= 1
        described = codec.describe(changed)
        assert [s.name for s in described.sections if not s.is_intact] == [name]
        assert sum(described.parts.values()) == len(data)
        assert (described.meta is None) == (name == "meta")
        assert (described.levels == ()) == (name == "grids")
