"""The frame of a file: header, then sections of type, length and checksum.

    header   magic (8) · major u16 · minor u16 · profile u16 · number of sections u16
             · CRC-32 of the bytes before it u32                               20 bytes
    section  type u16 · flags u8 · index u8 · length u32
             · CRC-32 of these eight bytes and the payload u32 · payload        12 bytes + payload

All little-endian. A file states the oldest version that can read it. A reader refuses a newer
major; a newer minor is read as long as every section that it marks as required is known.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from masked_wavelet_codec.errors import CodecError

__all__ = [
    "HEADER_BYTES",
    "SECTION_HEADER_BYTES",
    "VERSION",
    "Container",
    "Profile",
    "Section",
    "SectionType",
    "build",
    "parse",
    "readable_payloads",
]

# Like PNG's: not text, and line-end translation or seven-bit transport breaks it visibly.
MAGIC = b"\x89MWNF\r\n\x1a"
VERSION = (1, 3)
"""Major and minor version that this code reads and writes."""

_HEADER = struct.Struct("<8s4H")
_SECTION = struct.Struct("<HBBI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
SECTION_HEADER_BYTES = _SECTION.size + _CRC.size
_MAX_PAYLOAD = 2**32 - 1

_REQUIRED = 0x01
"""Flag: who does not know the section's type must not read on."""


class SectionType(enum.IntEnum):
    """Ids by hand, never reused. The order of a file is the order here, levels coarse first."""

    META = 1
    CAMERAS = 2
    NETWORKS = 3
    OCCUPANCY = 4
    GRIDS = 5
    MASK = 6
    VALUES = 7
    COEFFICIENTS = 8
    CODED_NETWORKS = 9
    CODED_OCCUPANCY = 10
    CODED_CAMERAS = 11


_KNOWN_TYPES = frozenset(SectionType)
_LEVEL_TYPES = (SectionType.MASK, SectionType.VALUES, SectionType.COEFFICIENTS)


class Profile(enum.IntEnum):
    """How the levels are coded; ids by hand, never reused."""

    PAPER = 1
    RANGE = 2


PROFILE_VERSIONS: dict[int, tuple[int, int]] = {Profile.PAPER: (1, 0), Profile.RANGE: (1, 1)}
"""The version with which each profile came."""


@dataclass(frozen=True)
class Section:
    """One section, its payload not yet interpreted."""

    type_id: int
    index: int
    """The level for MASK, VALUES and COEFFICIENTS, else 0."""
    payload: bytes | memoryview
    is_required: bool = True
    unknown_flags: int = 0
    is_intact: bool = True
    """Whether the checksum holds."""

    @property
    def name(self) -> str:
        """``meta``, ``mask[2]``, … or ``unknown type 77``."""
        try:
            kind = SectionType(self.type_id)
        except ValueError:
            return f"unknown type {self.type_id}"
        is_level = kind in _LEVEL_TYPES
        return f"{kind.name.lower()}[{self.index}]" if is_level else kind.name.lower()


@dataclass(frozen=True)
class Container:
    """A file taken apart into sections."""

    version: tuple[int, int]
    """Oldest version that can read the file."""
    profile_id: int
    sections: tuple[Section, ...]
    num_missing: int = 0
    """Sections that a prefix of the file lacks at its end."""

    @property
    def profile(self) -> str:
        """``paper``, ``range`` or ``unknown profile 9``."""
        try:
            return Profile(self.profile_id).name.lower()
        except ValueError:
            return f"unknown profile {self.profile_id}"


def build(
    profile: Profile, sections: Iterable[Section], version: tuple[int, int] = (1, 0)
) -> bytes:
    """The bytes of a file.

    Args:
        profile: how the levels are coded.
        sections: in their order.
        version: the oldest that can read the sections; never below the profile's.

    Raises:
        CodecError: if a payload has 4 GiB or more.
    """
    sections = tuple(sections)
    version = max(version, PROFILE_VERSIONS[profile])
    header = _HEADER.pack(MAGIC, *version, profile, len(sections))
    parts = [header, _CRC.pack(zlib.crc32(header))]
    for section in sections:
        if len(section.payload) > _MAX_PAYLOAD:
            raise CodecError(f"section {section.name}: 4 GiB or more; use a smaller grid")
        flags = _REQUIRED if section.is_required else 0
        head = _SECTION.pack(section.type_id, flags, section.index, len(section.payload))
        parts += [head, _CRC.pack(zlib.crc32(section.payload, zlib.crc32(head))), section.payload]
    return b"".join(parts)


def parse(data: bytes) -> Container:
    """Take a file apart; payloads are views into ``data``, checksums are compared, not enforced.

    ``data`` may be a prefix of a file that ends between two sections.

    Raises:
        CodecError: if the magic, the header or a length is wrong, or the major version is newer.
    """
    try:
        view = memoryview(data).cast("B")
    except TypeError:
        raise CodecError(f"data: expected contiguous bytes, got {type(data).__name__}") from None
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise CodecError("container: not a masked-wavelet scene, the magic bytes are missing")
    if len(view) < HEADER_BYTES:
        raise CodecError(f"container: truncated, {len(view)} bytes of the header's {HEADER_BYTES}")
    _, major, minor, profile_id, num_sections = _HEADER.unpack_from(view)
    if major > VERSION[0]:
        raise CodecError(f"container: {_need((major, minor))}")
    if _CRC.unpack_from(view, _HEADER.size)[0] != zlib.crc32(view[: _HEADER.size]):
        raise CodecError("container: the header's checksum is wrong, the file is damaged")
    if major < 1:
        raise CodecError(f"container: there is no format version {major}.{minor}")

    sections, position = [], HEADER_BYTES
    for number in range(num_sections):
        if position == len(view):
            break
        if len(view) - position < SECTION_HEADER_BYTES:
            raise CodecError(f"container: truncated in section {number + 1} of {num_sections}")
        type_id, flags, index, length = _SECTION.unpack_from(view, position)
        (checksum,) = _CRC.unpack_from(view, position + _SECTION.size)
        head = view[position : position + _SECTION.size]
        position += SECTION_HEADER_BYTES
        if length > len(view) - position:
            raise CodecError(
                f"container: section {number + 1} of {num_sections} declares {length} bytes, "
                f"{len(view) - position} are left: truncated or damaged"
            )
        payload = view[position : position + length]
        position += length
        sections.append(
            Section(
                type_id=type_id,
                index=index,
                payload=payload,
                is_required=bool(flags & _REQUIRED),
                unknown_flags=flags & ~_REQUIRED,
                is_intact=zlib.crc32(payload, zlib.crc32(head)) == checksum,
            )
        )
    if position < len(view):
        raise CodecError(f"container: {len(view) - position} bytes after the last section")
    missing = num_sections - len(sections)
    return Container((major, minor), profile_id, tuple(sections), missing)


def readable_payloads(container: Container) -> dict[tuple[SectionType, int], memoryview]:
    """Payloads by type and index, once it is sure that this code can read the file.

    Unknown sections that are not required are left out.

    Raises:
        CodecError: if the profile, a required section or a flag is unknown (naming the version
            needed), a checksum is wrong, or a section comes twice.
    """
    if container.profile_id not in PROFILE_VERSIONS:
        needed = PROFILE_VERSIONS.get(container.profile_id, container.version)
        raise CodecError(f"container: profile {container.profile!r}: {_need(needed)}")
    payloads = {}
    for section in container.sections:
        where = f"section {section.name}"
        if not section.is_intact:
            raise CodecError(f"{where}: the checksum is wrong, the file is damaged")
        if section.type_id not in _KNOWN_TYPES:
            if section.is_required:
                raise CodecError(f"{where}: required; {_need(container.version)}")
            continue
        if section.unknown_flags:
            raise CodecError(
                f"{where}: unknown flags {section.unknown_flags:#04x}; {_need(container.version)}"
            )
        key = (SectionType(section.type_id), section.index)
        if key in payloads:
            raise CodecError(f"{where}: comes twice")
        payloads[key] = section.payload
    return payloads


def _need(version: tuple[int, int]) -> str:
    return (
        f"the file needs format version {version[0]}.{version[1]} or later, this codec reads "
        f"{VERSION[0]}.{VERSION[1]}; update masked-wavelet-nerf"
    )
