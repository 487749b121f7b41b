"""Whatever the bytes are, decoding gives a scene or a ``CodecError``, soon and in little memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import lzma
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from test_codec_scenes import (
    PROFILES,
    make_line,
    make_plane,
    make_posed_cameras,
    make_scene,
    with_integers,
)

import masked_wavelet_codec as codec
from masked_wavelet_codec import container, huffman, layout, runlength
from masked_wavelet_codec.binary import Reader, Writer
from masked_wavelet_codec.blocks import write_block
from masked_wavelet_codec.container import Profile, SectionType

LIMIT = 2**20
"""Size limit in bytes: far above the small scenes, far below what a hostile count asks for."""


def small_scene(bits: int = 8) -> codec.Scene:
    return make_scene(
        bits,
        grids=(make_plane("p", (5, 6), 3, 1, bits), make_line("l", 9, 2, bits)),
        meta={"box": [[-1.5, 1.0]], "name": "Zoë", "deep": {"a": [None, True, 3]}},
    )


def survives(data: bytes) -> bool:
    """Decode and describe; True where decoding gives a scene. Anything but CodecError escapes."""
    start, message = time.process_time(), ""
    with contextlib.suppress(codec.CodecError):
        codec.describe(data)
    try:
        codec.decode(data, size_limit=LIMIT)
    except codec.CodecError as error:
        message = str(error)
    assert time.process_time() - start < 2
    assert message.startswith(("section ", "container: ")) or not message
    return not message


def rebuild(data: bytes, name: str, payload: bytes) -> bytes:
    """The file with another payload in one section, checksums right."""
    sections = [
        dataclasses.replace(section, payload=payload) if section.name == name else section
        for section in container.parse(data).sections
    ]
    assert name in [section.name for section in sections]
    return container.build(Profile(container.parse(data).profile_id), sections)


def refuse(
    payload: bytes,
    name: str,
    match: str,
    scene: codec.Scene | None = None,
    profile: str = "paper",
) -> None:
    """Check that this payload in one section of a good file is refused, without taking memory."""
    data = rebuild(codec.encode(scene or small_scene(), profile), name, payload)
    tracemalloc.start()
    try:
        with pytest.raises(codec.CodecError, match=match) as caught:
            codec.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"section {name}: ")
    assert peak < 4 * 2**20 + 100 * len(data)


def payload_of(*fields: int | str | bytes | float) -> bytes:
    """Fields of a payload: int as varint, str as name, bytes as they are, float as float32."""
    writer = Writer()
    for field in fields:
        kind = {int: writer.varint, str: writer.text, bytes: writer.raw, float: writer.f32}
        kind[type(field)](field)
    return writer.getvalue()


# Damage without a motive.


both_profiles = pytest.mark.parametrize("profile", PROFILES)


def damaged_scene(bits: int, profile: str) -> codec.Scene:
    """What the tests of damage damage: with integers where the profile knows them."""
    scene = small_scene(bits)
    if profile == "paper":
        return scene
    scene = dataclasses.replace(
        scene, occupancy=scene.occupancy[2:6, 3:8, 3:8], cameras=make_posed_cameras(6)
    )
    return with_integers(scene)


def ends_of_sections(data: bytes) -> dict[int, str]:
    """Length of each prefix that ends between two sections, and the name of its last section."""
    ends, length = {}, container.HEADER_BYTES
    for section in container.parse(data).sections:
        length += container.SECTION_HEADER_BYTES + len(section.payload)
        ends[length] = section.name
    return ends


@both_profiles
@pytest.mark.parametrize("bits", [8, 12])
def test_every_truncation(bits, profile):
    data = codec.encode(damaged_scene(bits, profile), profile)
    # The first level, whole; after that, every section.
    wanted = {
        "paper": ["values[0]", "mask[1]", "values[1]"],
        "range": ["coefficients[0]", "coefficients[1]"],
    }
    ends = ends_of_sections(data)
    assert [name for length, name in ends.items() if survives(data[:length])] == wanted[profile]
    for length in range(len(data)):
        assert length in ends or not survives(data[:length])


@both_profiles
def test_a_prefix_gives_the_levels_that_it_holds_and_drops_the_others(profile):
    scene = make_scene()
    data = codec.encode(scene, profile)
    num_levels = {
        "values[0]": 1,
        "mask[1]": 1,
        "values[1]": 2,
        "mask[2]": 2,
        "values[2]": 3,
        "coefficients[0]": 1,
        "coefficients[1]": 2,
        "coefficients[2]": 3,
    }
    tried = []
    for length, name in ends_of_sections(data).items():
        if name not in num_levels:
            continue
        expected = only_levels(scene, num_levels[name])
        assert codec.equal(codec.decode(data[:length]), expected), name
        assert sum(codec.describe(data[:length]).parts.values()) == length
        tried.append(num_levels[name])
    assert tried == {"paper": [1, 1, 2, 2, 3], "range": [1, 2, 3]}[profile]


def only_levels(scene: codec.Scene, num_levels: int) -> codec.Scene:
    """The scene with everything dropped in other levels than the first few."""
    grids = []
    for grid in scene.grids:
        bands = [
            band
            if band.level < num_levels
            else dataclasses.replace(band, values=0 * band.values, mask=band.mask & False)
            for band in grid.bands
        ]
        grids.append(dataclasses.replace(grid, bands=tuple(bands)))
    return dataclasses.replace(scene, grids=tuple(grids))


@both_profiles
def test_levels_asked_for_equal_those_of_the_whole_scene(profile):
    scene = make_scene()
    data = codec.encode(scene, profile)
    for levels, num_levels in ((0, 1), (1, 2), (2, 3), (3, 3), (10**9, 3)):
        assert codec.equal(codec.decode(data, levels=levels), only_levels(scene, num_levels))
    # Of a prefix: the fewer of what is asked for and what is there.
    ends = {name: length for length, name in ends_of_sections(data).items()}
    prefix = data[: ends["coefficients[1]" if profile == "range" else "values[1]"]]
    for levels, num_levels in ((0, 1), (1, 2), (2, 2)):
        assert codec.equal(codec.decode(prefix, levels=levels), only_levels(scene, num_levels))
    with pytest.raises(codec.CodecError, match="levels: expected 0 or more, got -1"):
        codec.decode(data, levels=-1)


@both_profiles
def test_levels_not_asked_for_are_not_decoded_but_checked(profile):
    data = codec.encode(make_scene(), profile)
    names = ["coefficients[2]"] if profile == "range" else ["mask[2]", "values[2]"]
    for name in names:
        broken = rebuild(data, name, b"\xff\xff\xff\xff\xff")
        assert codec.equal(codec.decode(broken, levels=1), codec.decode(data, levels=1))
        with pytest.raises(codec.CodecError, match=r"section \w+\[2\]: "):
            codec.decode(broken)
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(codec.CodecError, match="the checksum is wrong"):
        codec.decode(flipped, levels=0)


@both_profiles
def test_dropped_levels_count_against_the_limit(profile):
    # A prefix of a plane of which only the details are large.
    grid = make_plane("p", (4, 4), 1, 1)
    shape = (1, 3, 1000, 1000)
    mask = np.zeros(shape, bool)
    mask[0, 0, 0, 0] = True
    grid = dataclasses.replace(
        grid, bands=(grid.bands[0], codec.Band(1, mask.astype(np.int16), mask, 1.0))
    )
    data = codec.encode(codec.Scene({}, 8, (grid,), {}, None, None), profile)
    needed = 50 * 2 + 3 * (4 + 3_000_000)
    first = "coefficients[0]" if profile == "range" else "values[0]"
    end = next(length for length, name in ends_of_sections(data).items() if name == first)
    for arguments in ({"data": data[:end]}, {"data": data, "levels": 0}):
        codec.decode(**arguments, size_limit=needed)
        with pytest.raises(codec.CodecError, match="section grids: needs 9000000 bytes"):
            codec.decode(**arguments, size_limit=needed - 1)


@both_profiles
def test_every_truncation_of_every_section_with_a_right_checksum(profile):
    data = codec.encode(damaged_scene(8, profile), profile)
    for section in container.parse(data).sections:
        for length in range(len(section.payload)):
            assert not survives(rebuild(data, section.name, bytes(section.payload[:length])))
        assert not survives(rebuild(data, section.name, bytes(section.payload) + b"\0"))


@both_profiles
def test_every_single_bit_flip_is_noticed(profile):
    data = codec.encode(damaged_scene(8, profile), profile)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        assert not survives(bytes(changed)), position


def mutate(payload: bytes, rng: random.Random) -> bytes:
    """One to three edits: flip, set, insert, delete, copy, and the numbers that hurt."""
    changed = bytearray(payload)
    for _ in range(rng.randint(1, 3)):
        position, other = (rng.randint(0, len(changed)) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and position < len(changed):
            changed[position] ^= 1 << rng.randrange(8)
        elif kind == 1 and position < len(changed):
            changed[position] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            changed[position:position] = bytes(rng.choices(range(256), k=rng.randint(1, 4)))
        elif kind == 3:
            del changed[position : position + rng.randint(1, 4)]
        elif kind == 4:
            changed[position:position] = changed[other : other + 8]
        else:
            changed[position : position + 1] = payload_of(1 << rng.randrange(63))
    return bytes(changed)


@pytest.mark.parametrize("bits", [8, 12])
def test_thousands_of_mutations_behind_the_checksum(bits):
    rng = random.Random(bits)
    data = codec.encode(small_scene(bits), "paper")
    sections = container.parse(data).sections
    decoded = 0
    for _ in range(4000):
        section = rng.choice(sections)
        decoded += survives(rebuild(data, section.name, mutate(bytes(section.payload), rng)))
    # Raw floats and values cannot be told from good ones; without such cases nothing is tested.
    assert 200 < decoded < 3000


@both_profiles
def test_a_thousand_mutations_of_the_frame(profile):
    rng = random.Random(3)
    data = codec.encode(damaged_scene(8, profile), profile)
    prefixes = [data[:length] for length in ends_of_sections(data)]
    for _ in range(1000):
        changed = mutate(data, rng)
        assert changed in prefixes or not survives(changed)


@both_profiles
def test_mutations_take_little_memory(profile):
    rng = random.Random(4)
    data = codec.encode(damaged_scene(8, profile), profile)
    sections = container.parse(data).sections
    tracemalloc.start()
    try:
        for _ in range(500 if profile == "paper" else 200):
            section = rng.choice(sections)
            survives(rebuild(data, section.name, mutate(bytes(section.payload), rng)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * LIMIT + 8 * 2**20  # a Huffman table has 2**16 entries in two lists


def test_random_bytes_after_the_magic():
    rng = random.Random(5)
    for length in range(200):
        assert not survives(container.MAGIC + bytes(rng.choices(range(256), k=length)))


# Damage with a motive: counts that ask for memory.


SHARED = ("meta", "cameras", "grids")
"""Sections that do not depend on the profile."""


@pytest.mark.parametrize("count", [2**32, 2**60, 2**63 - 1])
@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("meta", ("count", b"\0"), "bytes of JSON, expected 1048576 at most"),
        ("cameras", ("count", b"\0"), r"needs \d+ bytes of memory|more than 2\*\*48"),
        ("networks", ("count",), "truncated"),
        ("networks", (1, "a", 1, "count"), r"needs \d+ bytes|more than 2\*\*48"),
        ("networks", (1, "count"), "truncated"),
        ("occupancy", ("count", 1, 1, b"\0"), r"needs \d+ bytes|more than 2\*\*48"),
        ("occupancy", (2**20, 2**20, 2**20, b"\0"), r"more than 2\*\*48"),
        ("grids", (8, "count"), "truncated"),
        ("grids", (8, 1, "count"), "truncated"),
        ("grids", (8, 1, "a", 1, 4, 1, 1, 4, 0.5, "count"), "kept of 4 coefficients"),
        ("grids", (8, 1, "a", 1, "count", 1, 1, 4, 0.5, 0), "expected less than"),
        ("mask[0]", ("count", b"\x80" + bytes(33)), "complete|declared"),
    ],
)
def test_hostile_counts_are_refused_before_memory_is_taken(name, fields, match, count):
    payload = payload_of(*(count if field == "count" else field for field in fields))
    for profile in PROFILES if name in SHARED else ("paper",):
        refuse(payload, name, match, profile=profile)


@both_profiles
def test_hostile_channels_are_refused_before_memory_is_taken(profile):
    section = {"paper": "mask", "range": "coefficients"}[profile]
    for count, match in (
        (2**32, rf"{section}\[0\]: needs \d+ bytes"),
        (2**60, r"grids: .* 2\*\*48"),
    ):
        payload = payload_of(8, 1, "a", 1, 4, count, 1, 4, 0.5, 0)
        with pytest.raises(codec.CodecError, match=match):
            codec.decode(rebuild(codec.encode(small_scene(), profile), "grids", payload))


def test_empty_array_with_a_long_side():
    data = codec.encode(small_scene(), "paper")
    read = codec.decode(rebuild(data, "networks", payload_of(1, "a", 2, 2**32, 0)))
    assert read.networks["a"].shape == (2**32, 0)
    refuse(payload_of(1, "a", 2, 2**60, 0), "networks", r"more than 2\*\*48")


@both_profiles
def test_declared_section_lengths(profile):
    data = codec.encode(small_scene(), profile)
    number = len(container.parse(data).sections)
    for length in (2**31, 2**32 - 1):
        changed = bytearray(data)
        struct.pack_into("<I", changed, 24, length)
        with pytest.raises(
            codec.CodecError, match=f"section 1 of {number} declares {length} bytes"
        ):
            codec.decode(bytes(changed))


def bomb(num_coefficients: int, profile: str) -> bytes:
    """A small file of a plane in which everything is dropped."""
    mask = np.zeros((1, 1, num_coefficients), bool)
    band = codec.Band(0, mask.astype(np.int16), mask, 1.0)
    scene = codec.Scene({}, 8, (codec.Grid("l", (1,), (band,)),), {}, None, None)
    return codec.encode(scene, profile)


@both_profiles
def test_a_bomb_is_refused_at_the_size_limit_and_read_within_it(profile):
    count = 2**22
    data = bomb(count, profile)
    assert len(data) < 300
    tracemalloc.start()
    try:
        with pytest.raises(codec.CodecError, match=r"size limit .*; raise size_limit"):
            codec.decode(data, size_limit=3 * count - 1)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.reset_peak()
        scene = codec.decode(data, size_limit=3 * count + 100)  # 100: the empty meta
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scene.grids[0].bands[0].mask.shape == (1, 1, count)
    assert peak < {"paper": 4, "range": 8}[profile] * 3 * count


@both_profiles
def test_the_limit_counts_all_sections_together(profile):
    scene = damaged_scene(8, profile)
    data = codec.encode(scene, profile)
    needed = 50 * len(json.dumps(scene.meta, ensure_ascii=False, separators=(",", ":")).encode())
    needed += sum(getattr(array, "values", array).nbytes for array in scene.networks.values())
    needed += scene.occupancy.nbytes
    needed += sum(b.values.nbytes + b.mask.nbytes for grid in scene.grids for b in grid.bands)
    needed += 101 * len(scene.cameras.split)
    assert codec.equal(codec.decode(data, size_limit=needed), scene)
    with pytest.raises(codec.CodecError, match="of the size limit"):
        codec.decode(data, size_limit=needed - 1)


@both_profiles
def test_memory_that_the_machine_lacks(monkeypatch, profile):
    data = codec.encode(small_scene(), profile)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, {"paper": "unpackbits", "range": "bincount"}[profile], fail)
    with pytest.raises(codec.CodecError, match="this machine lacks the memory"):
        codec.decode(data)


def test_lzma_bomb_is_not_unpacked():
    writer = Writer()
    writer.varint(8)
    write_block(writer, bytes(2**24))
    refuse(writer.getvalue(), "meta", "does not give exactly 8 bytes")


@pytest.mark.parametrize("method", [2, 255])
def test_unknown_compression_method(method):
    refuse(payload_of(2, bytes([method]), b"{}"), "meta", f"unknown compression method {method}")


def test_lzma_without_end_and_with_more_after_it():
    text = json.dumps({"a": "b" * 500}, separators=(",", ":")).encode()
    writer = Writer()
    writer.varint(len(text))
    write_block(writer, text)
    good = writer.getvalue()
    codec.decode(rebuild(codec.encode(small_scene()), "meta", good))
    refuse(good[:-1], "meta", "does not give exactly")
    refuse(good + b"\0", "meta", "does not give exactly")
    refuse(good[:3] + b"\xff" * 20, "meta", "damaged")


# Meta.


def meta_payload(text: str | bytes) -> bytes:
    text = text if isinstance(text, bytes) else text.encode()
    return payload_of(len(text), b"\0", text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not the JSON"),
        ("[]", "expected a JSON object, got list"),
        ("null", "expected a JSON object"),
        ("{", "not the JSON"),
        ('{"a":1}{}', "not the JSON"),
        ('{"a":NaN}', "NaN is not allowed"),
        ('{"a":-Infinity}', "-Infinity is not allowed"),
        ('{"a":1e999}', r"section meta\.a: expected a finite float"),
        ('{"a":1,"a":2}', "a key that comes twice"),
        ('{"a":"\\ud800"}', "lone surrogates"),
        ('{"\\udc00":1}', "lone surrogates"),
        (b'{"a":"\xff"}', "not the JSON"),
        ('{"a":' + "9" * 20 + "}", "an integer of 64 bits"),
        ('{"a":' + "9" * 100_000 + "}", "an integer of 100000 digits"),
        ('{"a":' + "[" * 33 + "]" * 33 + "}", "nested deeper than 32"),
        ('{"a":' + "[" * 300_000, "not the JSON"),
        ('{"a":' + "[" * 300_000 + "]" * 300_000 + "}", "not the JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not the JSON"),
    ],
)
def test_json_that_the_format_excludes(text, match):
    data = rebuild(codec.encode(small_scene()), "meta", meta_payload(text))
    for function in (codec.decode, codec.describe):
        with pytest.raises(codec.CodecError, match=match):
            function(data)


@pytest.mark.parametrize(
    "item", ['{"":0}', "{}", "[]", "[[]]", '{"":{"":{"":{"":0}}}}', "0.5", '""']
)
def test_parsed_json_takes_no_more_than_is_charged(item):
    text = '{"a":[' + ",".join([item] * (2**18 // (len(item) + 1) - 8)) + "]}"
    data = rebuild(codec.encode(codec.Scene({}, 8, (), {}, None, None)), "meta", meta_payload(text))
    tracemalloc.start()
    try:
        scene = codec.decode(data)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(scene.meta["a"]) > 1000
    assert held < 50 * len(text)


# Sections that contradict each other or themselves.


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ((1, 0), "1 quantiser bits, expected 2 to 16"),
        ((17, 0), "17 quantiser bits"),
        ((8, 0, 0), "1 bytes too many"),
        ((8, 1, "a", 0), "0 dimensions, expected 1 to 3"),
        ((8, 1, "a", 4), "4 dimensions"),
        ((8, 1, 1, b"\xff", 1), "a name is not UTF-8"),
        ((8, 2, *("a", 1, 4, 1, 0) * 2), "the name 'a' comes twice"),
        ((8, 1, "a", 1, 4, 1, 1, 4, float("nan"), 0), "level 0, step: expected a finite step"),
        ((8, 1, "a", 1, 4, 1, 1, 4, -1.0, 0), "expected a finite step of at least 0"),
        ((8, 1, "a", 1, 4, 1, 1, 4, -0.0, 0), "expected a finite step of at least 0"),
        ((8, 1, "a", 1, 4, 1, 1, 4, 1.0, 5), "5 kept of 4"),
    ],
)
def test_grids_section(fields, match):
    for profile in PROFILES:
        refuse(payload_of(*fields), "grids", match, profile=profile)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ((1, "a", 33, *[1] * 33), "33 dimensions, expected 32 at most"),
        ((2, "a", 0, "a", 0, bytes(8)), "the name 'a' comes twice"),
        ((1, "a", 0, bytes(5)), "1 bytes too many"),
        ((1, "a", 1, 2, bytes(7)), "truncated, 8 bytes declared and 7 left"),
        ((1, 2, b"\xc3\x28", 0, bytes(4)), "a name is not UTF-8"),
    ],
)
def test_networks_section(fields, match):
    refuse(payload_of(*fields), "networks", match)


def test_bits_after_the_last_voxel():
    refuse(payload_of(1, 1, 3, b"\0\x10"), "occupancy", "bits after the last voxel")


def test_camera_of_an_unknown_split():
    refuse(payload_of(1, b"\0", bytes(100) + b"\2"), "cameras", "neither for training nor")


POSED = dataclasses.replace(small_scene(), cameras=make_posed_cameras(2))


def coded_camera(turn: int = 0, place: int = 0, split: int = 0) -> bytes:
    """A record in which the first integers of turn and place are these, as they are stored."""
    record = struct.pack("<6I", turn, 0, 0, place, 0, 0) + bytes(52) + bytes([split])
    return payload_of(b"\x80", 1, b"\0", record)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (coded_camera(turn=2**20 + 1), "more than half a turn"),
        (coded_camera(turn=2**20 + 2), "more than half a turn"),
        (coded_camera(turn=2**32 - 1), "more than half a turn"),
        (coded_camera(place=2**19 + 1), "farther away than the exponent says"),
        (coded_camera(place=2**32 - 1), "farther away than the exponent says"),
        (coded_camera(split=2), "neither for training nor"),
        (coded_camera()[:-1], "does not give exactly 77 bytes|truncated|77"),
        (payload_of(b"\x80", 2**40, b"\0"), r"needs \d+ bytes of memory"),
        (payload_of(b"\x80", 2**60, b"\0"), r"more than 2\*\*48"),
        (b"", "truncated"),
    ],
)
def test_coded_cameras(payload, match):
    refuse(payload, "coded_cameras", match, scene=POSED, profile="range")


def test_coded_cameras_at_the_ends_of_their_ranges():
    # -2**19 and 2**18, as they are stored: half a turn about x, and 1 along x.
    data = codec.encode(POSED, "range")
    good = codec.decode(rebuild(data, "coded_cameras", coded_camera(2**20 - 1, 2**19)))
    assert good.cameras is not None
    expected = [[1, 0, 0, 1], [0, -1, 0, 0], [0, 0, -1, 0]]
    assert good.cameras.camera_to_worlds.tolist() == [expected]


def test_cameras_that_come_in_both_ways_or_in_the_wrong_profile():
    plain, short = (
        next(s for s in container.parse(codec.encode(scene, "range")).sections if s.type_id == kind)
        for scene, kind in ((small_scene(), 2), (POSED, 11))
    )
    for profile, extra in (("range", (plain, short)), ("paper", (short,))):
        data = codec.encode(dataclasses.replace(small_scene(), cameras=None), profile)
        parsed = container.parse(data)
        data = container.build(Profile(parsed.profile_id), [*parsed.sections, *extra])
        with pytest.raises(codec.CodecError, match="coded_cameras: not expected in this file"):
            codec.decode(data)


def line_scene() -> codec.Scene:
    return make_scene(grids=(make_line("line", 20, 1),))


def mask_payload(*packed: int) -> bytes:
    writer = Writer()
    symbols = runlength.to_symbols(np.array(packed, np.uint8))
    huffman.write_symbols(writer, symbols, runlength.ALPHABET)
    return writer.getvalue()


def test_mask_with_bits_after_the_last_coefficient():
    refuse(mask_payload(1, 1, 1), "mask[0]", "bits after", line_scene())


def test_mask_of_another_length():
    refuse(mask_payload(1, 1), "mask[0]", "do not give the 3 bytes", line_scene())
    refuse(mask_payload(*range(1, 6)), "mask[0]", "5 symbols declared, at most 3", line_scene())


def test_mask_that_keeps_another_number_than_declared():
    num_kept = int(line_scene().grids[0].bands[0].mask.sum())
    match = f"'line' keeps 1 coefficients, {num_kept} declared"
    refuse(mask_payload(1, 0, 0), "mask[0]", match, line_scene())


def test_values_out_of_range_or_of_another_number():
    num_kept = int(line_scene().grids[0].bands[0].mask.sum())
    good = bytes(num_kept)
    codec.decode(rebuild(codec.encode(line_scene(), "paper"), "values[0]", good))
    refuse(b"\x80" + good[1:], "values[0]", "a value beyond ±127", line_scene())
    refuse(good[1:], "values[0]", "truncated", line_scene())
    refuse(good + b"\0", "values[0]", "1 bytes too many", line_scene())


def test_layout_takes_memory_in_proportion_to_its_bytes():
    grid = codec.Grid("x", (1,), make_line("x", 1, 1).bands)
    grids = [dataclasses.replace(grid, name=f"{number}") for number in range(4000)]
    payload = layout.encode_layout(8, grids)
    tracemalloc.start()
    try:
        layout.read_layout(Reader(payload, "test"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 * len(payload)


def test_the_filter_takes_a_small_dictionary_whatever_the_file_says():
    # A foreign encoder with a dictionary of 64 MiB: decoded with ours or refused, never with its.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**26}]
    text = json.dumps({"a": "b" * 5000}, separators=(",", ":")).encode()
    packed = lzma.compress(text, lzma.FORMAT_RAW, filters=filters)
    data = codec.encode(small_scene())
    scene = codec.decode(rebuild(data, "meta", payload_of(len(text), b"\1", packed)))
    assert scene.meta == {"a": "b" * 5000}


def test_sections_of_types_are_all_covered_here_or_for_the_profile_range():
    names = {
        section.name.partition("[")[0]
        for scene in (small_scene(), POSED)
        for profile in PROFILES
        for section in container.parse(codec.encode(scene, profile)).sections
    }
    assert names == {kind.name.lower() for kind in SectionType}
