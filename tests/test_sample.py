"""The sample capture: its camera model, its light, its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from masked_wavelet_nerf.datasets import lighthouse, primitives, sample
from masked_wavelet_nerf.datasets.lighthouse import LAMP
from masked_wavelet_nerf.datasets.primitives import Box, Frustum, Sphere
from masked_wavelet_nerf.datasets.sample import (
    CAMERA_ANGLE_X,
    CAMERA_RADIUS,
    SampleError,
    look_at_origin,
    render_view,
    write_sample_capture,
)

TINY = {"image_size": 20, "num_train": 3, "num_val": 1, "num_test": 2}
BLUE_FLOAT, BLUE_RADIUS = np.array([0.38, 0.42, -0.62 + 0.97 * 0.16]), 0.16


def degrees(azimuth: float, elevation: float) -> np.ndarray:
    return look_at_origin(math.radians(azimuth), math.radians(elevation))


def project(point, pose: np.ndarray, size: int) -> np.ndarray:
    """Column and row, in pixels from the upper left corner, where a camera sees a point."""
    x, y, z = pose[:3, :3].T @ (np.asarray(point) - pose[:3, 3])
    focal = 0.5 * size / math.tan(0.5 * CAMERA_ANGLE_X)
    return np.array([size / 2 + focal * x / -z, size / 2 - focal * y / -z])


def centroid(is_on: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(is_on)
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ---------------------------------------------------------------------------------- solids


def in_rod(rod, p):
    axis = np.subtract(rod.end, rod.start)
    along = np.clip((p - rod.start) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(p - rod.start - along[..., None] * axis, axis=-1) <= rod.radius


def in_frustum(cone, p):
    share = (p[..., 2] - cone.bottom) / (cone.top - cone.bottom)
    radius = cone.bottom_radius + share * (cone.top_radius - cone.bottom_radius)
    reach = np.hypot(p[..., 0] - cone.centre[0], p[..., 1] - cone.centre[1])
    return (share >= 0) & (share <= 1) & (reach <= radius)


def in_hull(hull, p):
    return np.all([p @ np.array(n) <= o for n, o in hull.faces], axis=0)


SOLIDS = {
    "sphere": (
        Sphere((0.1, 0.0, -0.2), 0.5),
        lambda s, p: np.linalg.norm(p - s.centre, axis=-1) <= s.radius,
    ),
    "box": (
        Box((-0.5, -0.2, 0.0), (0.1, 0.4, 0.6)),
        lambda s, p: ((p >= s.low) & (p <= s.high)).all(-1),
    ),
    "frustum": (Frustum((0.1, -0.1), -0.5, 0.3, 0.6, 0.2), in_frustum),
    "cone": (Frustum((0.0, 0.1), -0.4, 0.5, 0.5, 0.0), in_frustum),
    "rod": (primitives.Rod((-0.3, 0.1, -0.4), (0.4, 0.0, 0.2), 0.2), in_rod),
    "hull": (
        primitives.Hull(
            (
                ((0.0, 0.6, 0.8), 0.3),
                ((0.0, -0.6, 0.8), 0.3),
                ((0.0, 0.0, -1.0), 0.4),
                ((1.0, 0.0, 0.0), 0.5),
                ((-1.0, 0.0, 0.0), 0.2),
            )
        ),
        in_hull,
    ),
}


def random_rays(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    origins = generator.normal(size=(count, 3))
    origins *= 3 / np.linalg.norm(origins, axis=-1, keepdims=True)
    directions = generator.uniform(-0.8, 0.8, (count, 3)) - origins
    return origins, directions / np.linalg.norm(directions, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", SOLIDS)
def test_rays_enter_where_walking_along_them_does(name):
    solid, is_inside = SOLIDS[name]
    origins, directions = random_rays(300)
    t = np.linspace(0, 6, 3001)
    walked = is_inside(solid, origins[:, None] + t[:, None] * directions[:, None])
    found = solid.enter(origins, directions)
    hits = walked.any(-1)
    assert 40 < hits.sum() < 290
    first = t[walked.argmax(-1)]
    assert (found[hits] <= first[hits] + 1e-9).all()
    assert (found[hits] >= first[hits] - (t[1] - t[0]) - 1e-9).all()
    grazing = np.isfinite(found) & ~hits  # chords shorter than a step
    assert grazing.sum() < 6
    points = origins[grazing] + (found[grazing, None] + 1e-6) * directions[grazing]
    assert is_inside(solid, points).all()


@pytest.mark.parametrize("name", SOLIDS)
def test_normals_point_outwards(name):
    solid, is_inside = SOLIDS[name]
    origins, directions = random_rays(300, seed=1)
    found = solid.enter(origins, directions)
    hits = np.isfinite(found)
    points = origins[hits] + found[hits, None] * directions[hits]
    normals = solid.normals(points)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-9)
    assert not is_inside(solid, points + 1e-5 * normals).any()
    assert is_inside(solid, points - 1e-5 * normals).mean() > 0.99  # edges may be thinner


@pytest.mark.parametrize("name", SOLIDS)
def test_ball_holds_the_solid(name):
    solid, is_inside = SOLIDS[name]
    centre, radius = primitives.enclosing_ball(solid)
    points = np.random.default_rng(0).uniform(-1, 1, (20000, 3))
    inside = points[is_inside(solid, points)]
    assert np.linalg.norm(inside - centre, axis=-1).max() <= radius


def test_ball_names_a_solid_that_it_does_not_know():
    class Knot:
        def enter(self, origins, directions): ...

        def normals(self, points): ...

    with pytest.raises(TypeError, match="no ball is known around Knot"):
        primitives.enclosing_ball(Knot())


def test_sorting_out_by_balls_loses_no_hit():
    origins, directions = random_rays(4000)
    # Short rays from within, as towards the sun, are among them.
    origins[2000:] *= 0.15
    distance, index = lighthouse._nearest(origins, directions)
    every = np.array([part.solid.enter(origins, directions) for part in lighthouse._scene()[0]])
    np.testing.assert_array_equal(distance, every.min(0))
    hits = np.isfinite(distance)
    assert (index[~hits] == -1).all()
    np.testing.assert_array_equal(index[hits], every.argmin(0)[hits])


# ---------------------------------------------------------------------------------- photos


def test_lamp_is_where_the_camera_model_puts_it():
    size = 160
    for azimuth, elevation in ((10, 2), (95, 8), (200, 0), (290, 12)):
        pose = degrees(azimuth, elevation)
        red, green, blue, alpha = np.moveaxis(render_view(pose, size, samples=2), -1, 0)
        is_lamp = (red > 0.9) & (green > 0.7) & (blue < 0.6) & (alpha == 1)
        window = np.hypot(
            *(np.indices((size, size))[::-1] + 0.5 - project(LAMP, pose, size)[:, None, None])
        )
        # All that shines so is within the lamp's disc, 0.09 wide at distance 4.
        yellow = is_lamp & (window < 15)
        assert yellow.sum() > 12
        assert window[yellow].max() < 0.09 / 3.7 * size / (2 * math.tan(CAMERA_ANGLE_X / 2)) + 1
        # The railing hides its lower part.
        assert (np.abs(centroid(yellow) - project(LAMP, pose, size)) < (1.5, 3.5)).all()


def test_lightning_rod_ends_in_the_right_row_and_column():
    size = 200
    pose = degrees(35, 0)
    alpha = render_view(pose, size, samples=2)[..., 3]
    tip = project((LAMP[0], LAMP[1], 1.17 + 0.009), pose, size)
    rows, columns = np.nonzero(alpha)
    assert abs(rows.min() - tip[1]) <= 1
    assert abs(columns[rows == rows.min()].mean() + 0.5 - tip[0]) <= 1
    assert abs(tip[0] - size / 2) > 5  # so that a mirrored picture would show


def test_silhouette_of_the_base_is_that_of_a_circle():
    size = 200
    alpha = render_view(degrees(77, 0), size, samples=4)[..., 3]
    focal = 0.5 * size / math.tan(0.5 * CAMERA_ANGLE_X)
    # A cylinder of radius 1 around the z axis, seen from the distance: the tangents.
    reach = focal / math.sqrt(CAMERA_RADIUS**2 - 1)
    row = int(size / 2 + focal * 0.83 / CAMERA_RADIUS)
    assert alpha[row].sum() == pytest.approx(2 * reach, abs=0.6)
    columns = np.flatnonzero(alpha[row])
    assert columns.min() == pytest.approx(size / 2 - reach, abs=1)
    assert columns.max() + 1 == pytest.approx(size / 2 + reach, abs=1)


def test_highlight_moves_with_the_view():
    size, seen = 320, []
    for azimuth in (20, 75):
        pose = degrees(azimuth, 40)
        view = pose[:3, 3] - BLUE_FLOAT
        normal = view / np.linalg.norm(view) + lighthouse._SUN
        spot = BLUE_FLOAT + BLUE_RADIUS * normal / np.linalg.norm(normal)
        photo = render_view(pose, size, samples=1)
        across = np.indices((size, size))[::-1] + 0.5
        distance = np.hypot(*(across - project(BLUE_FLOAT, pose, size)[:, None, None]))
        red = np.where(distance < 11, photo[..., 0], 0)
        assert red.max() > 0.9 > 2 * np.median(red[distance < 11])
        brightest = centroid(red > 0.97 * red.max())
        assert np.abs(brightest - project(spot, pose, size)).max() < 2
        seen.append(spot)
    assert np.linalg.norm(seen[0] - seen[1]) > 0.3 * BLUE_RADIUS


def test_shadow_falls_away_from_the_sun():
    # Points of the ground near the tower, seen from right above: opposite the sun, and where
    # nothing stands between them and the sun.
    away = -lighthouse._SUN[:2] / np.hypot(*lighthouse._SUN[:2])
    aside = np.array([away[1], -away[0]]) * np.sign(away[0])
    centre = np.array(lighthouse._TOWER)
    origins = np.array([[*(centre + 0.42 * away), 0.3], [*(centre + 0.46 * aside), 0.3]])
    down = np.broadcast_to([0.0, 0.0, -1.0], (2, 3))
    ground = origins + (lighthouse._GROUND - 0.3) * np.array([0, 0, 1.0])
    np.testing.assert_allclose(lighthouse._nearest(origins, down)[0], 0.3 - lighthouse._GROUND)
    seen, _ = lighthouse.shade(origins, down)
    up = np.array([[0.0, 0.0, 1.0]] * 2)
    sky = lighthouse._openness(ground, up)[:, None] * lighthouse._SKYLIGHT
    sun = np.array([[0.0], [1.0]]) * lighthouse._SUN[2] * lighthouse._SUNLIGHT
    np.testing.assert_allclose(seen**2.2, lighthouse._island(ground) * (sky + sun), rtol=1e-9)
    assert (sun[1] > sky[1]).all()


def test_openness_is_that_of_balls_under_a_uniform_sky(monkeypatch):
    monkeypatch.setattr(lighthouse, "_OCCLUDERS", np.array([[0.0, 0.0, 2.0, 0.5]]))
    points = np.array([[0.0, 0, 0], [0, 0, 4], [2.0, 0, 0], [0, 0, 1.0]])
    up = np.array([[0.0, 0.0, 1.0]] * 4)
    # Overhead at distance 2; behind; at 45° and distance √8; touching nothing at distance 1.
    expected = [1 - 0.25 / 4, 1, 1 - math.sqrt(0.5) * 0.25 / 8, 1 - 0.25]
    np.testing.assert_allclose(lighthouse._openness(points, up), expected)
    # The first by the slow way: the share of cosine-weighted directions that meet the ball.
    generator = np.random.default_rng(0)
    radius, angle = (
        np.sqrt(generator.uniform(size=200_000)),
        2 * np.pi * generator.uniform(size=200_000),
    )
    rays = np.stack((radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - radius**2)), -1)
    met = np.isfinite(Sphere((0.0, 0.0, 2.0), 0.5).enter(np.zeros_like(rays), rays))
    assert 1 - met.mean() == pytest.approx(expected[0], abs=2e-3)


def test_alpha_is_coverage_and_most_of_the_space_is_empty():
    views = ((0, 2), (120, 30), (240, 70), (90, 20))
    photos = np.array([render_view(degrees(a, e), 60) for a, e in views])
    alpha = photos[..., 3]
    assert (photos >= 0).all() and (photos <= 1).all()
    assert (photos[alpha == 0] == 0).all()
    border = np.ones((60, 60), bool)
    border[1:-1, 1:-1] = False
    assert (alpha[:, border] == 0).all()  # the whole scene is in view
    assert ((alpha > 0.15) & (alpha < 0.35)).sum() > 100  # thin things cover pixels in part
    assert 0.15 < alpha.mean() < 0.4
    # The same rays, 3 × 3 in small pixels or 6 × 6 in large ones.
    large = render_view(degrees(*views[0]), 30, samples=6)[..., 3]
    np.testing.assert_allclose(alpha[0].reshape(30, 2, 30, 2).mean((1, 3)), large, atol=1e-12)


def test_everything_is_inside_the_box():
    origins, directions = random_rays(6000, seed=3)
    distance, _ = lighthouse._nearest(origins, directions)
    hits = np.isfinite(distance)
    points = origins[hits] + distance[hits, None] * directions[hits]
    assert hits.sum() > 2000
    assert np.abs(points).max() <= 1.2
    # ... and fills it in every direction.
    assert (points.max(0) > 0.9).all() and (points.min(0) < -0.8).all()


def test_photos_have_texture_and_colours():
    photo = render_view(degrees(-60, 20), 100)
    opaque = photo[..., 3] == 1
    colours = photo[..., :3][opaque]
    assert colours.std(0).min() > 0.15
    assert 0.3 < colours.mean() < 0.6
    assert (colours >= 0.995).all(-1).mean() < 0.01  # not burnt out
    both = opaque[:, 1:] & opaque[:, :-1]
    steps = np.abs(np.diff(photo[..., :3], axis=1))[both]
    assert (steps.max(-1) > 0.1).mean() > 0.25


# ---------------------------------------------------------------------------------- files


def test_same_numbers_give_the_same_bytes(tmp_path):
    one = contents(write_sample_capture(tmp_path / "one", **TINY))
    assert one == contents(write_sample_capture(tmp_path / "deep" / "two", **TINY))
    assert sum(name.endswith(".png") for name in one) == 6
    other = contents(write_sample_capture(tmp_path / "three", **TINY, seed=1))
    assert other.keys() == one.keys()
    assert all(other[name] != one[name] for name in one)


def test_files_hold_what_render_view_gives(tmp_path):
    capture = write_sample_capture(tmp_path / "capture", **TINY)
    meta = json.loads((capture / "transforms_test.json").read_text())
    assert meta["camera_angle_x"] == CAMERA_ANGLE_X
    frame = meta["frames"][1]
    assert frame["file_path"] == "./test/r_1"
    stored = np.asarray(Image.open(capture / "test" / "r_1.png"))
    view = render_view(np.array(frame["transform_matrix"]), 20)
    np.testing.assert_array_equal(stored, np.round(255 * view))
    assert json.loads((capture / "sample.json").read_text()) == {
        "generator": "masked-wavelet-nerf sample capture",
        "version": sample.GENERATOR_VERSION,
        "image_size": 20,
        "counts": {"train": 3, "val": 1, "test": 2},
        "seed": 0,
    }


def test_cameras_stand_on_the_upper_hemisphere_and_look_inwards():
    poses = np.array(sample._poses(60, np.random.default_rng(0)))
    positions, rotations = poses[:, :3, 3], poses[:, :3, :3]
    np.testing.assert_allclose(np.linalg.norm(positions, axis=-1), CAMERA_RADIUS)
    np.testing.assert_allclose(
        rotations @ rotations.transpose(0, 2, 1), [np.eye(3)] * 60, atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    np.testing.assert_allclose(positions, CAMERA_RADIUS * rotations[:, :, 2], atol=1e-12)
    assert (positions[:, 2] > 0).all()
    assert (rotations[:, 2, 1] > 0).all()  # up is up
    np.testing.assert_allclose(rotations[:, 2, 0], 0, atol=1e-12)  # the horizon is level
    # Evenly spread: every quarter turn has about a quarter of them, low and high ones alike.
    quarter = np.floor(np.arctan2(positions[:, 1], positions[:, 0]) / (np.pi / 2)).astype(int) % 4
    assert np.bincount(quarter).min() >= 12
    assert positions[:, 2].min() < 0.1 * CAMERA_RADIUS < 0.9 * CAMERA_RADIUS < positions[:, 2].max()


def test_nerfstudio_reads_it_and_its_rays_meet_the_lamp(tmp_path):
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig

    capture = write_sample_capture(tmp_path / "capture", **TINY)
    parser = BlenderDataParserConfig(data=capture).setup()
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        outputs = parser.get_dataparser_outputs(split=split)
        assert len(outputs.image_filenames) == len(outputs.cameras) == count
        assert all(path.is_file() for path in outputs.image_filenames)
        for index in range(count):
            pose = np.eye(4)
            pose[:3] = outputs.cameras.camera_to_worlds[index].numpy()
            column, row = np.floor(project(LAMP, pose, 20)).astype(int)
            rays = outputs.cameras.generate_rays(camera_indices=index)[row, column]
            towards = np.array(LAMP) - rays.origins.numpy()
            off = np.linalg.norm(np.cross(towards, rays.directions.numpy()))
            assert off < 0.5 * math.sqrt(2) * 4.6 * 2 * math.tan(CAMERA_ANGLE_X / 2) / 20
    assert float(outputs.cameras.width[0]) == 20


def test_complete_capture_is_taken_as_it_is(tmp_path):
    calls = []
    capture = write_sample_capture(
        tmp_path / "capture", **TINY, progress=lambda *call: calls.append(call)
    )
    assert calls == [(done, 6) for done in range(1, 7)]
    before = {path: path.stat().st_mtime_ns for path in capture.rglob("*")}
    assert (
        write_sample_capture(capture, **TINY, progress=lambda *_: pytest.fail("remade")) == capture
    )
    assert {path: path.stat().st_mtime_ns for path in capture.rglob("*")} == before


def test_capture_of_other_numbers_or_with_gaps_is_remade(tmp_path):
    capture = write_sample_capture(tmp_path / "capture", **TINY)
    whole = contents(capture)
    write_sample_capture(capture, **{**TINY, "image_size": 12, "num_train": 1})
    assert not (capture / "train" / "r_1.png").exists()
    assert Image.open(capture / "val" / "r_0.png").size == (12, 12)
    write_sample_capture(capture, **TINY)
    (capture / "train" / "r_1.png").unlink()
    assert contents(write_sample_capture(capture, **TINY)) == whole
    assert list(tmp_path.iterdir()) == [capture]


def test_nothing_of_others_is_lost(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write_sample_capture(foreign, **TINY)  # an empty folder is nobody's
    notes = foreign / "train" / "notes.txt"
    notes.write_text("mine")
    before = contents(foreign)
    for numbers in (TINY, {**TINY, "image_size": 12}):
        with pytest.raises(SampleError, match=r"'train/notes.txt', which is no part of a sample"):
            write_sample_capture(foreign, **numbers)
    assert contents(foreign) == before


@pytest.mark.parametrize(
    "manifest", [None, "{}", "[]", "no json", '{"generator": "other", "counts": {"train": 1}}']
)
def test_folder_of_somebody_else_is_refused(tmp_path, manifest):
    folder = tmp_path / "capture"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "r_0.png").write_bytes(b"a photo")
    if manifest is not None:
        (folder / "sample.json").write_text(manifest)
    before = contents(folder)
    with pytest.raises(SampleError, match="name another folder"):
        write_sample_capture(folder, **TINY)
    assert contents(folder) == before


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "capture").write_text("mine")
    with pytest.raises(SampleError, match="is a file"):
        write_sample_capture(tmp_path / "capture", **TINY)
    assert (tmp_path / "capture").read_text() == "mine"


def test_broken_off_writing_leaves_nothing(tmp_path):
    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample_capture(tmp_path / "capture", **TINY, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TINY)
def test_numbers_below_one_are_refused(tmp_path, name):
    with pytest.raises(SampleError, match=f"{name}: at least 1 is needed, not 0"):
        write_sample_capture(tmp_path / "capture", **{**TINY, name: 0})
    assert list(tmp_path.iterdir()) == []
