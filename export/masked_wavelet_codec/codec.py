"""Scene to bytes and back: pure functions, the same bytes for the same scene."""

from __future__ import annotations

from masked_wavelet_codec import container, paper, payloads
from masked_wavelet_codec.binary import Budget, Reader
from masked_wavelet_codec.container import Profile, Section, SectionType
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.layout import encode_layout, read_layout
from masked_wavelet_codec.scene import Scene
from masked_wavelet_codec.validation import check_scene

__all__ = ["DEFAULT_SIZE_LIMIT", "decode", "encode"]

DEFAULT_SIZE_LIMIT = 4 * 2**30
"""Bytes of memory for a decoded scene: some 50 times a full-size one (300³, 192 channels)."""


def encode(scene: Scene, profile: str = "paper") -> bytes:
    """The bytes of a scene, which stays as it is.

    Args:
        profile: how coefficients are coded; ``"paper"`` is the only one of format 1.0.

    Raises:
        CodecError: if a field is not as ``Scene`` says, or the profile is unknown.
    """
    if profile != "paper":
        raise CodecError(f"profile: expected 'paper', got {profile!r}")
    check_scene(scene)
    # What is needed to render at all comes first, so that a prefix of the file can be of use.
    sections = [Section(SectionType.META, 0, payloads.encode_meta(scene.meta))]
    if scene.cameras is not None:
        cameras = payloads.encode_cameras(scene.cameras)
        sections.append(Section(SectionType.CAMERAS, 0, cameras, is_required=False))
    sections.append(Section(SectionType.NETWORKS, 0, payloads.encode_networks(scene.networks)))
    if scene.occupancy is not None:
        occupancy = payloads.encode_occupancy(scene.occupancy)
        sections.append(Section(SectionType.OCCUPANCY, 0, occupancy))
    sections.append(Section(SectionType.GRIDS, 0, encode_layout(scene.bits, scene.grids)))
    sections += paper.encode_levels(scene.bits, scene.grids)
    return container.build(Profile.PAPER, sections)


def decode(data: bytes, *, size_limit: int = DEFAULT_SIZE_LIMIT) -> Scene:
    """The scene in ``data``; its arrays are new, contiguous and writable.

    Args:
        data: any contiguous bytes-like object.
        size_limit: bytes that the scene's arrays and meta may take. The peak while decoding is a
            small multiple of this.

    Raises:
        CodecError: whatever is wrong with ``data``; the message names the section and the reason.
    """
    sections = container.readable_payloads(container.parse(data))
    budget = Budget(size_limit)

    def take(kind: SectionType, index: int = 0) -> Reader:
        where = f"section {Section(kind, index, b'').name}"
        if (kind, index) not in sections:
            raise CodecError(f"{where}: missing")
        return Reader(sections.pop((kind, index)), where)

    try:
        meta = payloads.decode_meta(take(SectionType.META), budget)
        cameras = occupancy = None
        if (SectionType.CAMERAS, 0) in sections:
            cameras = payloads.decode_cameras(take(SectionType.CAMERAS), budget)
        networks = payloads.decode_networks(take(SectionType.NETWORKS), budget)
        if (SectionType.OCCUPANCY, 0) in sections:
            occupancy = payloads.decode_occupancy(take(SectionType.OCCUPANCY), budget)
        layout = read_layout(take(SectionType.GRIDS))
        grids = paper.decode_levels(take, layout, budget)
    except MemoryError:
        raise CodecError(
            f"container: this machine lacks the memory, within the size limit {size_limit}"
        ) from None
    if sections:
        kind, index = next(iter(sections))
        raise CodecError(f"section {Section(kind, index, b'').name}: not expected in this file")
    return Scene(meta, layout.bits, grids, networks, occupancy, cameras)
