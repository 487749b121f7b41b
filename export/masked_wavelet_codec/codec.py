"""Scene to bytes and back: pure functions, the same bytes for the same scene."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from masked_wavelet_codec import coded, coefficients, container, paper, payloads
from masked_wavelet_codec.binary import Budget, Reader
from masked_wavelet_codec.container import Profile, Section, SectionType
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.layout import BandLayout, encode_layout, layout_version, read_layout
from masked_wavelet_codec.scene import BYTES_PER_COEFFICIENT, Band, Cameras, Grid, Scene
from masked_wavelet_codec.validation import check_scene

__all__ = ["DEFAULT_SIZE_LIMIT", "decode", "encode"]

DEFAULT_SIZE_LIMIT = 4 * 2**30
"""Bytes of memory for a decoded scene: some 50 times a full-size one (300³, 192 channels)."""


class _CameraCoder(NamedTuple):
    """One way to store cameras."""

    section: SectionType
    encode: Callable[..., bytes | None]
    """None where it does not suit them."""
    decode: Callable[..., Cameras]


class _Parts(NamedTuple):
    """How a profile codes what profiles code differently."""

    profile: Profile
    cameras: tuple[_CameraCoder, ...]
    """The last that suits is written; the first suits all."""
    networks: SectionType
    encode_networks: Callable[..., bytes]
    decode_networks: Callable[..., dict]
    occupancy: SectionType
    encode_occupancy: Callable[..., bytes]
    decode_occupancy: Callable[..., np.ndarray]
    encode_levels: Callable[..., Iterator[Section]]
    levels: tuple[SectionType, ...]
    decode_levels: Callable[..., list[list[Band]]]


_ANY_CAMERAS = _CameraCoder(SectionType.CAMERAS, payloads.encode_cameras, payloads.decode_cameras)
_PROFILES = {
    "paper": _Parts(
        Profile.PAPER,
        (_ANY_CAMERAS,),
        SectionType.NETWORKS,
        payloads.encode_networks,
        payloads.decode_networks,
        SectionType.OCCUPANCY,
        payloads.encode_occupancy,
        payloads.decode_occupancy,
        paper.encode_levels,
        (SectionType.MASK, SectionType.VALUES),
        paper.decode_levels,
    ),
    "range": _Parts(
        Profile.RANGE,
        (
            _ANY_CAMERAS,
            _CameraCoder(SectionType.CODED_CAMERAS, coded.encode_cameras, coded.decode_cameras),
        ),
        SectionType.CODED_NETWORKS,
        coded.encode_networks,
        coded.decode_networks,
        SectionType.CODED_OCCUPANCY,
        coded.encode_occupancy,
        coded.decode_occupancy,
        coefficients.encode_levels,
        (SectionType.COEFFICIENTS,),
        coefficients.decode_levels,
    ),
}


def encode(scene: Scene, profile: str = "range") -> bytes:
    """The bytes of a scene, which stays as it is.

    Args:
        profile: ``"range"`` codes masks and values together, each knowing what came before;
            ``"paper"`` is the pipeline of the paper, for comparison: networks as floats only.

    Raises:
        CodecError: if a field is not as ``Scene`` says, or the profile is unknown.
    """
    if profile not in _PROFILES:
        raise CodecError(f"profile: expected one of {sorted(_PROFILES)}, got {profile!r}")
    check_scene(scene)
    parts = _PROFILES[profile]
    # What is needed to render at all comes first, so that a prefix of the file can be of use.
    sections = [Section(SectionType.META, 0, payloads.encode_meta(scene.meta))]
    if scene.cameras is not None:
        tried = ((way.section, way.encode(scene.cameras)) for way in parts.cameras[::-1])
        kind, cameras = next((kind, data) for kind, data in tried if data is not None)
        sections.append(Section(kind, 0, cameras, is_required=False))
    sections.append(Section(parts.networks, 0, parts.encode_networks(scene.networks)))
    if scene.occupancy is not None:
        occupancy = parts.encode_occupancy(scene.occupancy)
        sections.append(Section(parts.occupancy, 0, occupancy))
    sections.append(Section(SectionType.GRIDS, 0, encode_layout(scene.bits, scene.grids)))
    sections += parts.encode_levels(scene.bits, scene.grids)
    return container.build(parts.profile, sections, layout_version(scene.grids))


def decode(
    data: bytes, *, levels: int | None = None, size_limit: int = DEFAULT_SIZE_LIMIT
) -> Scene:
    """The scene in ``data``; its arrays are new, contiguous and writable.

    Levels come coarse first, so a prefix of a file that ends between two sections, the first level
    or a later one, gives the scene as far as it goes: what is missing counts as dropped.

    Args:
        data: any contiguous bytes-like object.
        levels: detail levels to decode, coarse first, 0 or more; the others count as dropped.
        size_limit: bytes that the scene's arrays and meta may take. The peak while decoding is a
            small multiple of this.

    Raises:
        CodecError: whatever is wrong with ``data``; the message names the section and the reason.
    """
    if levels is not None and levels < 0:
        raise CodecError(f"levels: expected 0 or more, got {levels}; None decodes all")
    parsed = container.parse(data)
    sections = container.readable_payloads(parsed)
    parts = _PROFILES[parsed.profile]
    budget = Budget(size_limit)

    def take(kind: SectionType, index: int = 0) -> Reader:
        where = f"section {Section(kind, index, b'').name}"
        if (kind, index) not in sections:
            raise CodecError(f"{where}: missing")
        return Reader(sections.pop((kind, index)), where)

    try:
        meta = payloads.decode_meta(take(SectionType.META), budget)
        cameras = occupancy = None
        for way in parts.cameras:
            if cameras is None and (way.section, 0) in sections:
                cameras = way.decode(take(way.section), budget)
        networks = parts.decode_networks(take(parts.networks), budget)
        if (parts.occupancy, 0) in sections:
            occupancy = parts.decode_occupancy(take(parts.occupancy), budget)
        layout = read_layout(take(SectionType.GRIDS))
        wanted = layout.num_levels if levels is None else min(levels + 1, layout.num_levels)
        num_levels = wanted
        if parsed.num_missing:
            there = (all((k, i) in sections for k in parts.levels) for i in range(wanted))
            num_levels = max(1, sum(itertools.takewhile(bool, there)))
        bands = parts.decode_levels(take, layout, num_levels, budget)
        grids = tuple(
            Grid(grid.name, grid.size, (*own, *_dropped(grid.bands[len(own) :], budget)))
            for grid, own in zip(layout.grids, bands, strict=True)
        )
        for level in range(num_levels, layout.num_levels):
            for kind in parts.levels:
                sections.pop((kind, level), None)
    except MemoryError:
        raise CodecError(
            f"container: this machine lacks the memory, within the size limit {size_limit}"
        ) from None
    if sections:
        kind, index = next(iter(sections))
        raise CodecError(f"section {Section(kind, index, b'').name}: not expected in this file")
    return Scene(meta, layout.bits, grids, networks, occupancy, cameras)


def _dropped(layouts: Iterable[BandLayout], budget: Budget) -> Iterator[Band]:
    for band in layouts:
        budget.spend(BYTES_PER_COEFFICIENT * band.count, "section grids")
        values = np.zeros(band.shape, np.int16)
        yield Band(band.level, values, np.zeros(band.shape, np.bool_), band.step)
