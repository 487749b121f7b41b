"""``mwnerf check``: what it finds in captures of known geometry, made up and real."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import (
    DataParser,
    DataParserConfig,
    DataparserOutputs,
)
from nerfstudio.data.scene_box import SceneBox
from PIL import Image

from masked_wavelet_nerf import check_figure, cli
from masked_wavelet_nerf.coverage import (
    corner_shift,
    distances_to_box,
    half_view,
    measure_poses,
)
from masked_wavelet_nerf.datasets.sample import CAMERA_RADIUS, look_at_origin
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.suggestion import BOUNDED_PLANES, suggest
from masked_wavelet_nerf.survey import Thumbnail, find_background, recognise

DATA = Path(__file__).parents[1] / "../shared/data"
TARGET = np.array([0.3, -0.2, 0.1])


def around(azimuths, elevation=30.0, radius=2.0, target=TARGET) -> np.ndarray:
    """Cameras (N, 3, 4) that look at a point; angles in degrees."""
    poses = [look_at_origin(math.radians(a), math.radians(elevation), radius) for a in azimuths]
    poses = np.stack(poses)[:, :3]
    poses[:, :, 3] += target
    return poses


RING = around(range(0, 360, 30))


def facing(positions, towards=(0.0, 1.0, 0.0)) -> np.ndarray:
    """Cameras with z up that all look in one direction."""
    forward = np.array(towards) / np.linalg.norm(towards)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    rotation = np.stack((right, np.cross(right, forward), -forward), axis=1)
    return np.stack([np.column_stack((rotation, position)) for position in positions])


# --- coverage -------------------------------------------------------------------------------------


def test_a_ring_of_cameras_is_seen_as_one():
    found = measure_poses(RING)
    assert found.layout == "inward"
    assert found.up == (0, 0, 1)
    assert found.azimuth_span == pytest.approx(330)
    assert found.elevations == pytest.approx((30, 30))
    assert found.widest_angle == pytest.approx(180 - 2 * 30)
    # Spherical law of cosines: 30° apart in azimuth, both 30° high.
    cosine = 0.5**2 + 0.75 * math.cos(math.radians(30))
    assert found.nearest_angle == pytest.approx(math.degrees(math.acos(cosine)))
    assert found.look_at is not None
    assert found.look_at.point == pytest.approx(TARGET)
    assert found.look_at.miss == pytest.approx(0, abs=1e-9)
    assert found.look_at.distance == pytest.approx(2)
    assert found.look_at.in_front == 1
    distances = np.linalg.norm(RING[:, :, 3], axis=1)
    assert found.distances == pytest.approx((distances.min(), distances.max()))


def test_an_arc_spans_its_angle_across_the_azimuth_where_counting_starts():
    found = measure_poses(around([170, 190, 215, 260]))
    assert found.azimuth_span == pytest.approx(90)
    assert found.nearest_angle is not None and found.nearest_angle < 25
    assert measure_poses(around([340, 355, 10, 70])).azimuth_span == pytest.approx(90)


def test_elevations_are_those_that_the_scene_is_seen_from():
    poses = np.concatenate([around([0, 120, 240], e) for e in (-10.0, 20.0, 75.0)])
    assert measure_poses(poses).elevations == pytest.approx((-10, 75))


def test_straight_down_has_no_azimuth():
    poses = np.concatenate((around([0, 30, 60, 90], 20.0), around([200], 85.0)))
    found = measure_poses(poses)
    assert found.elevations == pytest.approx((20, 85))
    assert found.azimuth_span == pytest.approx(90)


@pytest.mark.parametrize("axis", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
@pytest.mark.parametrize("angle", [-90.0, 40.0, 90.0, 180.0])
def test_coverage_does_not_depend_on_how_the_world_is_turned(axis, angle):
    unit = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.double), dim=0)
    x, y, z = (math.radians(angle) * unit).tolist()
    generator = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.double)
    rotation = torch.linalg.matrix_exp(generator).numpy()
    poses = np.concatenate((around([10, 40, 95, 130, 200], 20.0), around([300], 50.0)))
    # The mean up of these is not z: what is up turns along only if the world's axis is near.
    one, other = measure_poses(poses), measure_poses(np.einsum("ij,njk->nik", rotation, poses))
    assert other.widest_angle == pytest.approx(one.widest_angle)
    assert other.nearest_angle == pytest.approx(one.nearest_angle)
    assert other.look_at is not None and one.look_at is not None
    assert other.look_at.point == pytest.approx(rotation @ one.look_at.point)
    if angle != 40.0 and axis[0] * axis[1] == 0:
        assert other.up == pytest.approx(rotation @ one.up, abs=1e-9)
        assert other.azimuth_span == pytest.approx(one.azimuth_span)
        assert other.elevations == pytest.approx(one.elevations)
    ring = measure_poses(np.einsum("ij,njk->nik", rotation, RING))
    assert ring.up == pytest.approx(rotation @ (0, 0, 1), abs=1e-9)
    assert ring.azimuth_span == pytest.approx(330)


def test_parallel_cameras_face_forward_and_look_at_nothing():
    found = measure_poses(facing([(x, 0, z) for x in (-1, 0, 1) for z in (-0.5, 0.5)]))
    assert found.layout == "forward"
    assert found.look_at is None
    assert found.widest_angle == found.nearest_angle == pytest.approx(0, abs=1e-5)
    assert found.azimuth_span == pytest.approx(0, abs=1e-5)


def test_cameras_within_45_degrees_of_their_mean_face_forward():
    assert measure_poses(around([-40, 0, 40], 0.0)).layout == "forward"
    assert measure_poses(around([-50, 0, 50], 0.0)).layout == "inward"


def test_cameras_that_look_away_from_each_other_look_outward():
    inward = around(range(0, 360, 45), 0.0)
    inward[:, :, [0, 2]] *= -1  # turn round on the spot
    found = measure_poses(inward)
    assert found.layout == "outward"
    assert found.look_at is not None
    assert found.look_at.in_front == 0
    assert found.look_at.distance == pytest.approx(-2)


def test_cameras_that_turn_at_one_place_look_outward():
    poses = around(range(0, 360, 45), 0.0)
    poses[:, :, 3] = np.random.default_rng(0).normal(scale=0.05, size=(8, 3))
    assert measure_poses(poses).layout == "outward"


def test_cameras_look_inward_only_if_nearly_all_do_and_nearly_at_the_point():
    poses = around(range(0, 360, 36), 0.0)
    poses[::3, :, [0, 2]] *= -1
    found = measure_poses(poses)
    assert found.look_at is not None and found.look_at.in_front == 0.6
    assert found.layout == "outward"
    aside = around(range(0, 360, 36), 0.0)
    angle = math.radians(60)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    turn = np.vstack((turn, [0, 0, 1]))
    aside[:, :, :3] = turn @ aside[:, :, :3]
    found = measure_poses(aside)
    assert found.look_at is not None and found.look_at.in_front == 1
    assert found.look_at.distance == pytest.approx(2 * math.cos(angle))
    assert found.look_at.miss == pytest.approx(2 * math.sin(angle))
    assert found.layout == "outward"


def test_one_camera_and_none():
    found = measure_poses(around([20]))
    assert (found.nearest_angle, found.look_at) == (None, None)
    assert (found.widest_angle, found.azimuth_span) == (0, 0)
    with pytest.raises(ValueError, match="at least one camera"):
        measure_poses(np.zeros((0, 3, 4)))


def test_poses_of_another_shape_are_refused():
    with pytest.raises(Exception, match="poses"):
        measure_poses(np.zeros((5, 4, 4)))


def test_distances_to_a_box():
    box = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    outside = np.array([[4.0, 0.0, 0.0], [4.0, 5.0, 0.0]])
    assert distances_to_box(outside, box) == pytest.approx((3, math.sqrt(25 + 36 + 1)))
    assert distances_to_box(np.array([[0.5, 0.0, 0.0]]), box)[0] == 0


def camera(width: int, height: int, focal: float, **kwargs) -> Cameras:
    settings = {"fx": focal, "fy": focal, "cx": width / 2, "cy": height / 2} | kwargs
    return Cameras(torch.eye(4)[None, :3], width=width, height=height, **settings)


def test_distortion_is_how_far_corners_move():
    # At radius 0.5, k1 = 0.16 puts a corner at 0.5 · (1 + 0.16 · 0.25) = 0.52.
    distortion = {"distortion_params": torch.tensor([[0.16, 0, 0, 0, 0, 0]])}
    assert corner_shift(camera(624, 832, 1000.0, **distortion)) == pytest.approx(20, abs=0.05)
    for cx, cy in ((312.0, 416.0), (312.0, 8.0), (12.0, 416.0), (12.0, 8.0)):
        # The corner farthest from the principal point is the same distance away in all of them.
        off_centre = camera(324, 424, 1000.0, cx=cx, cy=cy, **distortion)
        assert corner_shift(off_centre) == pytest.approx(20, abs=0.05)
    assert corner_shift(camera(600, 800, 1000.0)) == 0
    assert half_view(camera(600, 800, 1000.0)) == pytest.approx((0.3, 0.4))


# --- recognition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("nerfstudio-data", ["transforms.json"]),
        ("blender-data", ["transforms_train.json", "transforms_val.json"]),
        ("llff-data", ["poses_bounds.npy"]),
        ("nsvf-data", ["rgb/0.png", "pose/0.txt", "intrinsics.txt"]),
    ],
)
def test_captures_are_recognised_by_their_files(tmp_path, name, files):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert recognise(tmp_path) == name
    if name == "nerfstudio-data":
        assert recognise(tmp_path / files[0]) == name


def test_photos_and_videos_are_to_be_processed_first(tmp_path):
    (tmp_path / "holiday photos").mkdir()
    (tmp_path / "holiday photos" / "a.JPG").touch()
    command = f"ns-process-data images --data '{tmp_path}/holiday photos' --output-dir OUT"
    for place in (tmp_path, tmp_path / "holiday photos"):
        with pytest.raises(UserError, match="photos without camera poses") as raised:
            recognise(place)
        assert command in str(raised.value)
    (tmp_path / "walk.mp4").touch()
    for place in (tmp_path, tmp_path / "walk.mp4"):
        with pytest.raises(UserError, match=r"a video .*ns-process-data video --data \S+/walk.mp4"):
            recognise(place)


def test_what_is_no_capture_is_a_usage_error(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "not recognised" in error and "transforms.json" in error and "poses_bounds.npy" in error
    assert cli.main(["check", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path), "--dataparser", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert "--dataparser nonsense: unknown" in error and "blender-data" in error
    (tmp_path / "transforms.json").touch()
    assert cli.main(["check", str(tmp_path), "--figure", str(tmp_path / "a.gif")]) == 2
    assert "ends in .png" in capsys.readouterr().err


# --- whole captures -------------------------------------------------------------------------------


def noise(rng, size) -> Image.Image:
    """What has surroundings all over."""
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_capture(folder: Path, poses: np.ndarray, size=(40, 30), picture=noise) -> Path:
    """In nerfstudio's format, with 30 · (size / 40) pixels of focal length."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    width, height = size
    meta = {"w": width, "h": height, "cx": width / 2, "cy": height / 2, "frames": []}
    meta["fl_x"] = meta["fl_y"] = 0.75 * width
    for view, pose in enumerate(poses):
        name = f"images/{view:03d}.png"
        picture(rng, size).save(folder / name)
        matrix = [*pose.tolist(), [0, 0, 0, 1]]
        meta["frames"].append({"file_path": name, "transform_matrix": matrix})
    (folder / "transforms.json").write_text(json.dumps(meta))
    return folder


def check_json(capsys, *arguments: object, code: int = 0) -> dict:
    assert cli.main(["check", *map(str, arguments), "--json"]) == code
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1, out
    return json.loads(out)


def as_ns_train_parses(command: str):
    from nerfstudio.configs.method_configs import all_methods

    program, method, *arguments = shlex.split(command)
    assert program == "ns-train"
    config = all_methods[method]
    return tyro.cli(tyro.conf.FlagConversionOff[type(config)], default=config, args=arguments)


def test_numbers_of_a_nerfstudio_capture(tmp_path, capsys):
    poses = around(range(0, 360, 18))
    found = check_json(capsys, write_capture(tmp_path / "a b", poses))
    assert found["dataparser"] == "nerfstudio-data"
    assert found["can_be_trained"] is True
    assert found["photos"] == {
        "train": {"named": 18, "usable": 18},
        "val": {"named": 2, "usable": 2},
    }
    assert found["sizes"] == [{"width": 40, "height": 30, "photos": 20}]
    assert found["background"] is None
    assert found["camera_models"] == ["perspective"]
    angles = [2 * math.degrees(math.atan(half)) for half in (20 / 30, 15 / 30)]
    assert found["field_of_view"] == pytest.approx(angles)
    assert found["corner_shift"] == 0
    assert found["box"] == [[-1] * 3, [1] * 3]
    assert found["faults"] == []
    coverage = found["coverage"]
    assert coverage["layout"] == "inward"
    assert coverage["elevations"] == pytest.approx([30, 30], abs=0.01)
    # nerfstudio centres the cameras and scales the largest coordinate to 1: a ring of radius
    # 2 cos 30° whose middle is 2 sin 30° above what it looks at.
    scale = 1 / (2 * math.cos(math.radians(30)))
    assert coverage["look_at"]["point"] == pytest.approx([0, 0, -scale], abs=0.01)
    assert coverage["look_at"]["distance"] == pytest.approx(2 * scale, abs=0.01)
    assert coverage["distances"] == pytest.approx([1, 1], abs=0.01)
    config = as_ns_train_parses(found["command"])
    assert config.data == tmp_path / "a b"
    assert config.method_name == "masked-wavelet"


def test_printed_output_says_it_all_and_the_command_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = write_capture(tmp_path / "capture", RING)
    assert cli.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for part in (
        "read by nerfstudio-data",
        "11 to train on, 1 to evaluate with",
        "12 of 40 × 30 pixels",
        "photographed surroundings",
        "perspective, field of view 67° × 53°, no distortion",
        "looking inwards",
        "of 360° around, 30° to 30° above the horizon",
        "No faults found",
        "--figure",
    ):
        assert part in words, part
    assert "Auto image downscale" not in out  # what the parser says
    (command,) = [line for line in out.splitlines() if line.startswith("ns-train")]
    assert as_ns_train_parses(command).data == folder
    assert not list(Path.cwd().glob("check*.png"))


def test_the_sample_capture_is_an_object_in_a_box(capture, capsys):
    found = check_json(capsys, capture)
    assert found["dataparser"] == "blender-data"
    assert [found["photos"][split]["usable"] for split in ("train", "val", "test")] == [8, 2, 3]
    assert found["background"] == "transparent"
    assert found["coverage"]["look_at"]["point"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert found["coverage"]["distances"] == pytest.approx([CAMERA_RADIUS] * 2)
    config = as_ns_train_parses(found["command"])
    assert config.method_name == "masked-wavelet-bounded"
    model = config.pipeline.model
    assert (model.near_plane, model.far_plane) == BOUNDED_PLANES  # nothing to be changed


def test_missing_photos_are_counted_and_the_rest_is_used(tmp_path, capsys):
    def on_white(rng, size):
        photo = Image.new("RGB", size, "white")
        photo.paste(noise(rng, (20, 15)), (10, 7))
        return photo

    folder = write_capture(tmp_path / "capture", RING, picture=on_white)
    for view in (0, 7):  # the first, too, by which nerfstudio chooses its scale
        (folder / "images" / f"{view:03d}.png").unlink()
    found = check_json(capsys, folder)
    assert found["photos"]["train"] == {"named": 11, "usable": 9}
    (fault,) = [fault for fault in found["faults"] if fault["kind"] == "missing"]
    assert "000.png, 007.png" in fault["message"] and fault["is_fatal"] is False
    assert found["can_be_trained"] is True
    assert found["coverage"]["azimuth_span"] == pytest.approx(300, abs=0.1)
    assert found["background"] == "white"
    assert cli.main(["check", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "9 (of 11) to train on" in out and "Warning: " in out


def test_truncated_photos_are_found_and_fatal(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", RING)
    for view in (3, 5):
        photo = folder / "images" / f"{view:03d}.png"
        photo.write_bytes(photo.read_bytes()[:-1500])
    found = check_json(capsys, folder, code=1)
    (fault,) = found["faults"]
    assert fault["is_fatal"] is True
    assert "003.png: cannot be read" in fault["message"] and "1 more" in fault["message"]
    assert found["can_be_trained"] is False and "command" not in found
    assert cli.main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "Error: " in out and "cannot be trained on" in out and "ns-train" not in out


def test_masks_are_decoded_too(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", RING)
    meta = json.loads((folder / "transforms.json").read_text())
    (folder / "masks").mkdir()
    for frame in meta["frames"]:
        frame["mask_path"] = frame["file_path"].replace("images", "masks")
        noise(np.random.default_rng(0), (40, 30)).save(folder / frame["mask_path"])
    (folder / "transforms.json").write_text(json.dumps(meta))
    assert check_json(capsys, folder)["faults"] == []
    mask = folder / "masks" / "004.png"
    mask.write_bytes(mask.read_bytes()[:-1500])
    (fault,) = check_json(capsys, folder, code=1)["faults"]
    assert "masks/004.png: cannot be read" in fault["message"]


def test_a_photo_of_another_shape_is_fatal_and_said_once(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", RING)
    Image.new("RGB", (30, 30)).save(folder / "images" / "004.png")
    path = tmp_path / "a.png"
    found = check_json(capsys, folder, "--figure", path, code=1)
    (fault,) = found["faults"]
    assert "004.png: 30 × 30" in fault["message"]
    assert {size["photos"] for size in found["sizes"]} == {11, 1}
    assert found["coverage"]["layout"] == "inward" and "command" not in found
    picture = np.asarray(Image.open(path).convert("RGB"))  # of the cameras alone
    assert count_colour(picture, check_figure.TRAIN) > 50


def test_cameras_without_focal_length_are_fatal(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", RING)
    meta = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").write_text(json.dumps(meta | {"fl_x": 0.0}))
    found = check_json(capsys, folder, code=1)
    assert {fault["kind"] for fault in found["faults"]} == {"intrinsics"}
    assert "coverage" not in found


def test_without_any_photo_nothing_can_be_trained(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", RING)
    shutil.rmtree(folder / "images")
    found = check_json(capsys, folder, "--figure", tmp_path / "a.png", code=1)
    assert found["can_be_trained"] is False and "coverage" not in found
    assert any(fault["is_fatal"] for fault in found["faults"])
    assert not (tmp_path / "a.png").exists()


def test_no_view_left_counts_as_none_usable(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", RING)
    for photo in (folder / "images").iterdir():
        photo.write_bytes(b"no photo")
    assert cli.main(["check", str(folder), "--dataparser", "nerfstudio-data"]) == 1
    capsys.readouterr()
    meta = json.loads((folder / "transforms.json").read_text())
    meta["frames"][0]["transform_matrix"] = np.diag([2.0, 1, 1, 1]).tolist()
    for frame in meta["frames"]:
        frame["transform_matrix"][0][0] = math.nan
        Image.new("RGB", (40, 30)).save(folder / frame["file_path"])
    (folder / "transforms.json").write_text(json.dumps(meta))
    found = check_json(capsys, folder, code=1)
    assert found["photos"]["train"] == {"named": 11, "usable": 0}


@pytest.mark.parametrize(("split", "code"), [("train", 1), ("val", 1), ("test", 0)])
def test_splits_that_the_parser_cannot_read(tmp_path, capture, capsys, split, code):
    folder = shutil.copytree(capture, tmp_path / "capture")
    (folder / f"transforms_{split}.json").unlink()
    found = check_json(capsys, folder, "--dataparser", "blender-data", code=code)
    (fault,) = found["faults"]
    assert f"transforms_{split}.json" in fault["message"]
    assert fault["message"].startswith(f"{split}: ")
    assert fault["is_fatal"] is (code == 1)
    assert ("command" in found) is (code == 0)


def test_a_parser_that_asks_is_not_waited_for(tmp_path, capsys, monkeypatch):
    class Asks(DataParser):
        def _generate_dataparser_outputs(self, split="train", **kwargs):
            input("Shall I shrink the photos? ")
            raise AssertionError("answered")

    monkeypatch.setitem(all_dataparsers, "asking-data", DataParserConfig(_target=Asks))
    found = check_json(capsys, tmp_path, "--dataparser", "asking-data", code=1)
    (fault,) = found["faults"]
    assert "asks" in fault["message"] and "shrink the photos?" in fault["message"]


# --- suggestions ----------------------------------------------------------------------------------


def thumbnail(colour, centre=(200, 30, 30, 255)) -> Thumbnail:
    pixels = np.full((20, 30, 4), colour, np.uint8)
    pixels[4:16, 8:22] = centre
    return Thumbnail("a.png", pixels)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((90, 90, 90, 0), "transparent"),
        ((255, 255, 255, 255), "white"),
        ((252, 251, 250, 255), "white"),
        ((0, 3, 2, 255), "black"),
        ((128, 128, 128, 255), None),
        ((255, 255, 200, 255), None),
    ],
)
def test_background_is_what_photos_end_in(colour, expected):
    assert find_background([thumbnail(colour)] * 4) == expected
    other = thumbnail((100, 150, 60, 255))
    assert find_background([thumbnail(colour)] * 3 + [other]) == expected
    assert find_background([thumbnail(colour)] * 2 + [other] * 2) is None
    assert find_background([]) is None


def outputs_of(poses, box=1.0, size=(400, 300)) -> DataparserOutputs:
    cameras = Cameras(
        torch.from_numpy(poses).float(),
        fx=300.0,
        fy=300.0,
        cx=size[0] / 2,
        cy=size[1] / 2,
        width=size[0],
        height=size[1],
    )
    corner = torch.full((3,), box)
    return DataparserOutputs(
        image_filenames=[Path(f"{view}.png") for view in range(len(poses))],
        cameras=cameras,
        scene_box=SceneBox(aabb=torch.stack((-corner, corner))),
    )


def suggested(poses, dataparser="nerfstudio-data", background=None, has_gpu=True, **kwargs):
    outputs = outputs_of(poses, **kwargs)
    found = suggest(
        Path("my capture"), dataparser, outputs, measure_poses(poses), background, has_gpu=has_gpu
    )
    num_flags = sum(word.startswith("--") for word in found.arguments) - 1  # --data
    assert len(found.reasons) == 1 + num_flags
    config = as_ns_train_parses(shlex.join(found.arguments))
    assert config.data == Path("my capture")
    assert type(config.pipeline.datamanager.dataparser) is type(all_dataparsers[dataparser])
    return num_flags, config


@pytest.mark.parametrize(
    ("dataparser", "background", "poses", "method"),
    [
        ("nerfstudio-data", None, RING, "masked-wavelet"),
        ("nerfstudio-data", "white", RING, "masked-wavelet-bounded"),
        ("nerfstudio-data", "transparent", RING, "masked-wavelet-bounded"),
        ("nerfstudio-data", "white", facing(np.eye(3)), "masked-wavelet"),
        ("llff-data", None, facing(np.eye(3)), "masked-wavelet"),
        ("blender-data", None, RING, "masked-wavelet-bounded"),
        ("nsvf-data", None, RING, "masked-wavelet-bounded"),
    ],
)
def test_objects_are_bounded_and_surroundings_are_not(dataparser, background, poses, method):
    _, config = suggested(poses, dataparser, background)
    assert config.method_name == method


def test_default_planes_are_those_of_the_method():
    from masked_wavelet_nerf.method import masked_wavelet_bounded

    model = masked_wavelet_bounded.config.pipeline.model
    assert (model.near_plane, model.far_plane) == BOUNDED_PLANES


def test_near_and_far_are_named_where_the_defaults_cut_the_scene_off():
    origin = np.zeros(3)
    poses = around(range(0, 360, 30), 0.0, 4.0, origin)
    assert suggested(poses, "blender-data", box=1.5)[0] == 0
    poses[:, :, 3] *= 5  # NSVF's Tanks & Temples have units of their own
    num_flags, config = suggested(poses, "nsvf-data", box=7.5)
    assert num_flags == 2
    model = config.pipeline.model
    positions = poses[:, :, 3]
    nearest = np.linalg.norm(positions - np.clip(positions, -7.5, 7.5), axis=1).min()
    farthest = np.linalg.norm(np.abs(positions) + 7.5, axis=1).max()
    assert nearest / 1.1 < model.near_plane <= nearest
    assert farthest <= model.far_plane < 1.1 * farthest
    _, config = suggested(around(range(0, 360, 30), 0.0, 0.02, origin), "nsvf-data", box=0.0075)
    assert config.pipeline.model.near_plane == pytest.approx(model.near_plane / 1000)


def test_cameras_in_the_box_start_close_to_themselves():
    poses = around(range(0, 360, 30), 0.0, 1.0, np.zeros(3))
    _, config = suggested(poses, background="white")
    assert config.pipeline.model.near_plane == pytest.approx(0.1)
    farthest = np.linalg.norm(np.abs(poses[:, :, 3]) + 1, axis=1).max()
    assert farthest <= config.pipeline.model.far_plane < 1.1 * farthest


@pytest.mark.parametrize(
    ("longest", "factor"), [(1600, 1.0), (1601, 0.5), (3200, 0.5), (4000, 0.25)]
)
def test_large_photos_are_scaled_down_to_1600_pixels(longest, factor):
    for size in ((longest, 900), (900, longest)):
        num_flags, config = suggested(RING, size=size)
        assert config.pipeline.datamanager.camera_res_scale_factor == factor
        assert num_flags == (factor != 1)


def test_black_backgrounds_and_missing_gpus_have_flags():
    _, config = suggested(RING, background="black")
    assert config.pipeline.model.background_color == "black"
    assert suggested(RING)[1].pipeline.datamanager.train_num_rays_per_batch == 4096
    _, config = suggested(RING, has_gpu=False)
    assert config.pipeline.datamanager.train_num_rays_per_batch == 1024


# --- the picture ----------------------------------------------------------------------------------


def count_colour(picture: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - wanted).max(axis=-1) <= 8).sum())


def test_picture_shows_cameras_box_and_photos(tmp_path, capsys):
    folder = write_capture(tmp_path / "capture", around(range(0, 360, 18)))
    path = tmp_path / "new" / "cameras.png"
    assert cli.main(["check", str(folder), "--figure", str(path)]) == 0
    assert f"Drew {path}" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["cameras.png"]
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[0] > 600 and picture.shape[1] > 1000
    height = picture.shape[0]
    views, photos = picture[: height * 3 // 4], picture[height * 5 // 6 :]
    for colour in (
        check_figure.TRAIN,
        check_figure.HELD_OUT,
        check_figure.BOX,
        check_figure.LOOK_AT,
    ):
        assert count_colour(views, colour) > 50, colour
    assert photos.std() > 50  # noise


def test_nothing_is_looked_at_in_the_picture_of_a_room(tmp_path, capsys):
    poses = around(range(0, 360, 18), 0.0)
    poses[:, :, [0, 2]] *= -1
    path = tmp_path / "a.png"
    folder = write_capture(tmp_path / "capture", poses)
    found = check_json(capsys, folder, "--figure", path)
    assert found["coverage"]["layout"] == "outward"
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert count_colour(picture[:600], check_figure.LOOK_AT) == 0


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, capsys, monkeypatch):
    folder = write_capture(tmp_path / "capture", RING)
    path = tmp_path / "out" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"precious")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert cli.main(["check", str(folder), "--figure", str(path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert list(path.parent.iterdir()) == [path]


def test_pyramids_open_as_far_as_the_cameras_see():
    outputs = outputs_of(around([20, 200]))
    rays = outputs.cameras.generate_rays(
        camera_indices=torch.tensor([[0], [1]]), coords=torch.tensor([[0.0, 0.0], [300.0, 400.0]])
    )
    half = half_view(outputs.cameras)
    edges = check_figure._frusta(
        outputs.cameras.camera_to_worlds.double().numpy(), check_figure._pyramid(half, 0.1)
    )
    assert edges.shape == (16, 2, 3)
    spokes = [edges[8 * n : 8 * n + 4] for n in (0, 1)]
    for camera_edges, direction in zip(spokes, rays.directions.double().numpy(), strict=True):
        along = camera_edges[:, 1] - camera_edges[:, 0]
        along /= np.linalg.norm(along, axis=1, keepdims=True)
        assert (along @ direction).max() == pytest.approx(1, abs=1e-6)


def test_box_has_twelve_edges():
    edges = check_figure._box_edges(np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
    lengths = np.linalg.norm(edges[:, 1] - edges[:, 0], axis=1)
    assert sorted(lengths.tolist()) == [1.0] * 4 + [2.0] * 4 + [3.0] * 4


# --- real captures --------------------------------------------------------------------------------


def real(name: str):
    missing = not (DATA / name).is_dir()
    return pytest.mark.skipif(missing, reason=f"needs the capture ../shared/data/{name}")


@real("fox")
def test_fox(capsys):
    found = check_json(capsys, DATA / "fox")
    assert found["dataparser"] == "nerfstudio-data"
    photos = found["photos"]
    assert sum(split["named"] for split in photos.values()) == 67
    assert sum(split["usable"] for split in photos.values()) == 50
    assert {fault["kind"] for fault in found["faults"]} == {"missing"}
    assert found["sizes"] == [{"width": 1080, "height": 1920, "photos": 50}]
    assert found["coverage"]["layout"] == "inward"
    assert 90 < found["coverage"]["widest_angle"] < 120
    config = as_ns_train_parses(found["command"])
    assert config.method_name == "masked-wavelet"
    assert config.pipeline.datamanager.camera_res_scale_factor == 0.5


@real("fern")
def test_fern(capsys):
    found = check_json(capsys, DATA / "fern")
    assert found["dataparser"] == "llff-data"
    assert found["photos"]["train"]["usable"] == 17 and found["photos"]["val"]["usable"] == 3
    assert found["coverage"]["layout"] == "forward"
    assert found["background"] is None
    assert as_ns_train_parses(found["command"]).method_name == "masked-wavelet"


@real("lego_100")
def test_lego(capsys):
    found = check_json(capsys, DATA / "lego_100")
    assert found["dataparser"] == "blender-data"
    assert found["photos"]["train"] == {"named": 100, "usable": 100}
    assert found["background"] == "transparent"
    coverage = found["coverage"]
    assert coverage["layout"] == "inward"
    assert coverage["look_at"]["distance"] == pytest.approx(4.0311, abs=1e-3)
    assert coverage["azimuth_span"] > 300
    assert as_ns_train_parses(found["command"]).method_name == "masked-wavelet-bounded"
