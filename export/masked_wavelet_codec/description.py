"""What is in a file and what it costs, without decoding coefficients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from masked_wavelet_codec import container, payloads
from masked_wavelet_codec.binary import Budget, Reader
from masked_wavelet_codec.container import SectionType
from masked_wavelet_codec.layout import Layout, read_layout

__all__ = ["PARTS", "Description", "LevelInfo", "SectionInfo", "describe"]

PARTS = ("container", "meta", "mask", "values", "coefficients", "networks", "occupancy", "cameras")
"""What ``Description.parts`` accounts for. ``container``: all headers, the grids section (names,
shapes, steps) and sections of unknown type. ``mask`` and ``values`` are of the profile ``paper``,
``coefficients`` are both together, in the profile ``range``."""

_META_LIMIT = 2**26
"""Enough for any meta section; nothing else that takes memory is decoded."""


@dataclass(frozen=True)
class SectionInfo:
    """One section as it lies in the file."""

    name: str
    """Type, and level in brackets: ``meta``, ``mask[2]``, ``unknown type 77``."""
    num_bytes: int
    """Payload, without its header."""
    is_intact: bool
    """Whether the checksum holds."""


@dataclass(frozen=True)
class LevelInfo:
    """One grid at one level."""

    grid: str
    level: int
    num_coefficients: int
    num_kept: int

    @property
    def kept_fraction(self) -> float:
        """0 where there are no coefficients."""
        return self.num_kept / self.num_coefficients if self.num_coefficients else 0.0


@dataclass(frozen=True)
class Description:
    """What ``describe`` found."""

    version: tuple[int, int]
    """Major and minor: the oldest format version that can read the file."""
    profile: str
    num_bytes: int
    """Size of the file, the sum of ``parts``."""
    sections: tuple[SectionInfo, ...]
    parts: dict[str, int]
    """Bytes by part, keys as in ``PARTS``."""
    meta: dict | None
    """None where that section is missing or its checksum wrong."""
    levels: tuple[LevelInfo, ...]
    """Grid by grid, coarse to fine; empty where that section is missing or its checksum wrong."""

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Bytes from the start of the file to the end of each level, coarse first.

        So many bytes of the file decode by themselves, to a scene of those levels.
        """
        ends: dict[int, int] = {}
        position = container.HEADER_BYTES
        for section in self.sections:
            position += container.SECTION_HEADER_BYTES + section.num_bytes
            if section.name.endswith("]"):
                level = int(section.name[section.name.index("[") + 1 : -1])
                ends[level] = max(ends.get(level, 0), position)
        return tuple(itertools.accumulate((ends[level] for level in sorted(ends)), max))

    @property
    def num_coefficients(self) -> int:
        return sum(level.num_coefficients for level in self.levels)

    @property
    def num_kept(self) -> int:
        return sum(level.num_kept for level in self.levels)

    @property
    def bits_per_kept(self) -> float:
        """Bits of masks and values for each kept coefficient; 0 where none is kept."""
        bits = 8 * sum(self.parts[part] for part in ("mask", "values", "coefficients"))
        return bits / self.num_kept if self.num_kept else 0.0


def describe(data: bytes) -> Description:
    """Account for the bytes of a file of any profile; wrong checksums are reported, not refused.

    Raises:
        CodecError: if the container is damaged or of a newer major version, or the meta or grids
            section is malformed although its checksum holds.
    """
    parsed = container.parse(data)
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    parts["container"] = container.HEADER_BYTES
    for section in parsed.sections:
        part = section.name.partition("[")[0].removeprefix("coded_")
        parts["container"] += container.SECTION_HEADER_BYTES
        parts[part if part in PARTS else "container"] += len(section.payload)

    readers = {
        section.type_id: Reader(section.payload, f"section {section.name}")
        for section in parsed.sections
        if section.is_intact
    }
    meta, layout = None, Layout(0, ())
    if SectionType.META in readers:
        meta = payloads.decode_meta(readers[SectionType.META], Budget(_META_LIMIT))
    if SectionType.GRIDS in readers:
        layout = read_layout(readers[SectionType.GRIDS])
    return Description(
        version=parsed.version,
        profile=parsed.profile,
        num_bytes=sum(parts.values()),
        sections=tuple(
            SectionInfo(section.name, len(section.payload), section.is_intact)
            for section in parsed.sections
        ),
        parts=parts,
        meta=meta,
        levels=tuple(
            LevelInfo(grid.name, band.level, band.count, band.num_kept)
            for grid in layout.grids
            for band in grid.bands
        ),
    )
