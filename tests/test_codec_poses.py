"""Poses on the lattice: near what they were, found again bit for bit, and few bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from test_codec_scenes import make_cameras, make_posed_cameras, make_scene

import masked_wavelet_codec as codec
from masked_wavelet_codec import container, poses

TURN_STEP = 4 / 2**19
"""Radians: what a step of p turns at most."""
LARGEST_TURN = 1.8 * TURN_STEP
"""At most: half a step, or a whole one at half a turn, along each of three axes."""


def posed(rotations: Rotation, positions: np.ndarray) -> np.ndarray:
    """float32 (N, 3, 4)."""
    return np.concatenate((rotations.as_matrix(), positions[:, :, None]), axis=2).astype(np.float32)


def with_poses(camera_to_worlds: np.ndarray) -> codec.Cameras:
    return dataclasses.replace(
        make_cameras(len(camera_to_worlds)), camera_to_worlds=camera_to_worlds
    )


def sections(scene: codec.Scene) -> dict[str, int]:
    described = codec.describe(codec.encode(scene, "range"))
    return {section.name: section.num_bytes for section in described.sections}


def turned_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles in radians between the rotations of two arrays of poses."""
    a, b = (Rotation.from_matrix(x[:, :, :3].astype(np.float64)) for x in (a, b))
    return (a * b.inv()).magnitude()


def test_matrices_are_those_of_modified_rodrigues_parameters():
    rng = np.random.default_rng(0)
    turns = rng.integers(-300_000, 300_001, (200, 3))
    places = rng.integers(-(2**18), 2**18, (200, 3), endpoint=True)
    found = poses.matrices(poses.Poses(3, turns, places))
    expected = Rotation.from_mrp(turns / 2**19).as_matrix()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, :, :3], expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(found[:, :, 3], (places / 2**15).astype(np.float32))


def test_rounding_moves_poses_by_less_than_a_step():
    rng = np.random.default_rng(1)
    positions = rng.uniform(-3.9, 3.9, (1000, 3))
    given_poses = posed(Rotation.random(1000, random_state=2), positions)
    found = codec.round_poses(with_poses(given_poses)).camera_to_worlds
    angles = turned_between(given_poses, found)
    assert angles.max() < LARGEST_TURN
    assert angles.max() > TURN_STEP / 10  # else integers are longer than they need be
    moved = np.abs(found[:, :, 3] - given_poses[:, :, 3])
    assert 0 < moved.max() <= 4 * 2.0**-19 + 1e-7


directions = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 1e-3)
angles = st.one_of(
    st.floats(0, np.pi),
    st.sampled_from([0.0, np.pi, np.pi - 1e-7, np.pi + 1e-7, np.pi / 2, 1e-6, np.pi - 4e-6]),
)
axes = st.one_of(
    directions,
    st.sampled_from([(1, 0, 0), (0, -1, 0), (0, 0, 1), (1, 1, 0), (-1, 0, 1), (1, -1, 1)]),
)


@settings(max_examples=400, deadline=None)
@example([((1, 0, 0), 0.0)], [0.0, 0.0, 2.7255255131117692e-42, *[0.0] * 9])
@example([((1, 0, 0), 0.0)], [2.0**-149, 0.0, 2.0**-128, *[0.0] * 9])
@given(
    st.lists(st.tuples(axes, angles), min_size=1, max_size=4),
    st.lists(st.floats(-64, 64, width=32), min_size=12, max_size=12),
)
def test_rounded_poses_are_found_again_and_stay(turns, coordinates):
    rotations = Rotation.from_rotvec(
        [np.array(axis) / np.linalg.norm(axis) * angle for axis, angle in turns]
    )
    cameras = with_poses(posed(rotations, np.reshape(coordinates, (4, 3))[: len(turns)]))
    once = codec.round_poses(cameras)
    assert turned_between(cameras.camera_to_worlds, once.camera_to_worlds).max() < LARGEST_TURN
    scene = codec.Scene({}, 2, (), {}, None, once)
    assert "coded_cameras" in sections(scene)
    read = codec.decode(codec.encode(scene, "range"))
    assert codec.equal(read, scene) and read.cameras is not None
    assert codec.round_poses(read.cameras) is read.cameras


@pytest.mark.parametrize("exponent", [-128, -3, 0, 127])
def test_all_exponents(exponent):
    scene = make_scene(cameras=make_posed_cameras(7, exponent))
    assert "coded_cameras" in sections(scene)
    assert codec.equal(codec.decode(codec.encode(scene, "range")), scene)


def test_half_a_turn_about_either_axis_is_the_same():
    half = np.array([[2**19, 0, 0], [-(2**19), 0, 0], [0, 0, -(2**19)]])
    found = poses.matrices(poses.Poses(0, half, np.zeros((3, 3), np.int64)))
    assert found[0].tolist() == found[1].tolist() == [[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0]]
    assert not np.signbit(found[found == 0]).any()
    assert poses.on_lattice(found) is not None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: p.__setitem__((0, 0, 3), np.nan), id="not finite"),
        pytest.param(lambda p: p.__setitem__((0, 2, 3), np.inf), id="infinitely far"),
        pytest.param(lambda p: p[0, :, :3].__imul__(np.float32(1.001)), id="scaled"),
        pytest.param(lambda p: p[0, :, 0].__imul__(np.float32(-1)), id="mirrored"),
        pytest.param(lambda p: p[0, :, :3].__imul__(0), id="no matrix of rotation"),
    ],
)
def test_what_is_no_pose_is_kept_as_it_is(change):
    cameras = make_posed_cameras(4)
    change(cameras.camera_to_worlds)
    scene = make_scene(cameras=codec.round_poses(cameras))
    assert codec.equal(scene, make_scene(cameras=cameras))
    assert "cameras" in sections(scene)
    assert codec.equal(codec.decode(codec.encode(scene, "range")), scene)


def test_a_pose_beside_the_lattice_is_kept_as_it_is():
    cameras = make_posed_cameras(4)
    changed = cameras.camera_to_worlds
    changed[2, 1, 1] = np.nextafter(changed[2, 1, 1], np.float32(2))
    scene = make_scene(cameras=cameras)
    assert "cameras" in sections(scene)
    assert codec.equal(codec.decode(codec.encode(scene, "range")), scene)


def test_profile_paper_has_floats():
    scene = make_scene(cameras=make_posed_cameras(4))
    names = [section.name for section in container.parse(codec.encode(scene, "paper")).sections]
    assert "cameras" in names and "coded_cameras" not in names


def test_they_take_less_than_half_of_the_bytes():
    positions = 4 * np.random.default_rng(3).standard_normal((100, 3))
    exact = with_poses(posed(Rotation.random(100, random_state=4), positions))
    before, after = (
        codec.describe(codec.encode(make_scene(cameras=c), "range")).parts["cameras"]
        for c in (exact, codec.round_poses(exact))
    )
    assert after < 0.5 * before and after < 20 * 100
