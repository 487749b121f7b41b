"""Files written once, pinned byte for byte: they are read and written like this for ever.

Those of profile ``paper`` are of format 1.0, those of ``range`` of 1.1; with voxels, of 1.2.
Coded cameras came with 1.3.
To write them anew after a deliberate change of the format (with a new version): run this module.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_codec_scenes import (
    PROFILES,
    make_cameras,
    make_line,
    make_plane,
    make_posed_cameras,
    make_scene,
    with_integers,
)

import masked_wavelet_codec as codec

GOLDEN = Path(__file__).parent / "golden"


def scene_of(name: str) -> codec.Scene:
    """The scene in each file, by formula."""
    profile, _, name = name.partition("-")
    if name == "8-bit":
        return with_integers(make_scene(8)) if profile == "range" else make_scene(8)
    if name == "12-bit":
        grids = (
            make_plane("plane", (33, 20), 7, levels=3, bits=12, residue=1, modulus=23),
            make_line("line", 33, 7, bits=12),
        )
        return make_scene(12, grids=grids, meta={"text": ["long enough to be packed"] * 20})
    if name == "sparse":
        # Long runs of zero bytes, levels without a survivor, nothing that is optional.
        grids = (make_plane("plane", (200, 130), 2, levels=4, residue=1, modulus=4099),)
        return codec.Scene({}, 8, grids, {}, None, None)
    if name == "voxels":
        grids = (
            make_plane("density_voxels.0", (7, 6, 9), 2, levels=2, residue=2, modulus=13),
            make_plane("appearance_voxels.0", (7, 6, 9), 3, levels=2, residue=1, modulus=7),
            make_line("line", 9, 3, residue=1),
        )
        return codec.Scene({}, 8, grids, {}, None, None)
    if name == "poses":
        return codec.Scene({}, 2, (), {}, None, make_posed_cameras(5))
    assert name == "empty"
    return codec.Scene({}, 2, (), {}, None, make_cameras(0))


KINDS = ("8-bit", "12-bit", "sparse", "empty", "voxels", "poses")
NAMES = [f"{profile}-{name}" for profile in PROFILES for name in KINDS]


def profile_of(name: str) -> str:
    return name.partition("-")[0]


@pytest.mark.parametrize("name", NAMES)
def test_decodes_to_the_scene_of_the_formula(name):
    assert codec.equal(codec.read(GOLDEN / f"{name}.mwnf"), scene_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_encodes_to_the_same_bytes(name):
    assert codec.encode(scene_of(name), profile_of(name)) == (GOLDEN / f"{name}.mwnf").read_bytes()


def test_both_ways_to_store_a_block_are_pinned():
    methods = set()
    for name in NAMES:
        data = (GOLDEN / f"{name}.mwnf").read_bytes()
        length_of_text = 2 if data[32] >= 0x80 else 1
        methods.add(data[32 + length_of_text])
    assert methods == {0, 1}


def test_every_golden_file_is_tested_and_small():
    found = sorted(GOLDEN.glob("*.mwnf"))
    assert [path.stem for path in found] == sorted(NAMES)
    assert sum(path.stat().st_size for path in found) < 20_000


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for golden in NAMES:
        codec.write(GOLDEN / f"{golden}.mwnf", scene_of(golden), profile_of(golden))
