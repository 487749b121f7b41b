"""Captures of NSVF and LLFF, made up and real, and what is said of broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from masked_wavelet_nerf.dataparsers.captures import CaptureError
from masked_wavelet_nerf.dataparsers.llff import LLFFDataParserConfig
from masked_wavelet_nerf.dataparsers.nsvf import (
    NSVFDataParserConfig,
    read_intrinsics,
    read_pose,
)
from masked_wavelet_nerf.errors import UserError

FERN = Path(__file__).parents[1] / "../shared/data/fern"
POSITIONS = [[4.0, 0.0, 1.0], [0.0, -3.0, 2.0], [-2.0, 2.0, 0.5]]
TARGET = [0.25, -0.5, 0.125]
WIDTH, HEIGHT = 12, 8


def look_at(position, target, up=(0.0, 0.0, 1.0)):
    """Right, down and forward of a camera, and where it is."""
    forward = np.subtract(target, position)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right)
    return right, np.cross(forward, right), forward, np.array(position)


def write_photo(path, size=(WIDTH, HEIGHT), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def write_nsvf(folder, prefixes="012", mode="RGB"):
    """As many views for every split as there are positions."""
    for prefix in prefixes:
        for view, position in enumerate(POSITIONS):
            write_photo(folder / "rgb" / f"{prefix}_{view:04d}.png", mode=mode)
            pose = np.eye(4)
            pose[:3] = np.stack(look_at(position, TARGET), axis=1)
            path = folder / "pose" / f"{prefix}_{view:04d}.txt"
            path.parent.mkdir(exist_ok=True)
            np.savetxt(path, pose)
    (folder / "intrinsics.txt").write_text("10. 6. 4. 0.\n0. 0. 0.\n0.\n1.\n8 12\n")
    (folder / "bbox.txt").write_text("-1 -2 -3 1 2 4 0.5\n")
    return folder


@pytest.fixture
def nsvf(tmp_path):
    return write_nsvf(tmp_path / "nsvf")


def parse_nsvf(folder, split="train", **settings):
    return NSVFDataParserConfig(data=folder, **settings).setup().get_dataparser_outputs(split)


def llff_rows(num_views=9):
    """Cameras in a plane that look at one point; photos of twice the size that is stored."""
    rows = []
    for view in range(num_views):
        position = [view % 3 - 1.0, 0.0, view // 3 - 1.0]
        right, down, forward, origin = look_at(position, [0.0, 6.0, 0.0])
        size = [2 * HEIGHT, 2 * WIDTH, 30.0]
        matrix = np.stack([down, right, -forward, origin, size], axis=1)
        rows.append([*matrix.ravel(), 3.0 + view, 20.0 + view])
    return np.array(rows)


def write_llff(folder, num_views=9):
    for view in range(num_views):
        write_photo(folder / "images_4" / f"view{view:02d}.png")
    np.save(folder / "poses_bounds.npy", llff_rows(num_views))
    return folder


@pytest.fixture
def llff(tmp_path):
    return write_llff(tmp_path / "llff")


def parse_llff(folder, split="train", **settings):
    return LLFFDataParserConfig(data=folder, **settings).setup().get_dataparser_outputs(split)


def edit_llff(folder, view, column, value):
    rows = llff_rows()
    rows[view, column] = value
    np.save(folder / "poses_bounds.npy", rows)


def rays_through(cameras, view, dx=0.0, dy=0.0):
    """Origin and direction through the principal point, or pixels right of and below it."""
    centre = torch.stack([cameras.cy[view] + dy, cameras.cx[view] + dx], dim=-1)
    rays = cameras.generate_rays(camera_indices=view, coords=centre)
    return rays.origins[0], rays.directions[0]


def test_nerfstudio_knows_both():
    from nerfstudio.configs.dataparser_configs import all_dataparsers

    assert isinstance(all_dataparsers["nsvf-data"], NSVFDataParserConfig)
    assert isinstance(all_dataparsers["llff-data"], LLFFDataParserConfig)


def test_ns_train_takes_both():
    import tyro
    from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion

    config = tyro.cli(
        AnnotatedDataParserUnion, args=["llff-data", "--data", "here", "--downscale-factor", "4"]
    )
    assert config == LLFFDataParserConfig(data=Path("here"), downscale_factor=4)
    config = tyro.cli(AnnotatedDataParserUnion, args=["nsvf-data", "--scale-factor", "0.5"])
    assert config == NSVFDataParserConfig(scale_factor=0.5)


@pytest.mark.parametrize("view", range(3))
def test_nsvf_cameras_stand_and_look_as_they_were_placed(nsvf, view):
    cameras = parse_nsvf(nsvf).cameras
    right, down, forward, position = map(torch.tensor, look_at(POSITIONS[view], TARGET))
    origin, direction = rays_through(cameras, view)
    torch.testing.assert_close(origin, position.float())
    torch.testing.assert_close(direction, forward.float(), atol=1e-5, rtol=0)
    distance = torch.dist(position, torch.tensor(TARGET, dtype=torch.float64)).float()
    torch.testing.assert_close(
        origin + distance * direction, torch.tensor(TARGET), atol=1e-5, rtol=0
    )
    # Five pixels with a focal length of ten.
    for moved, towards in (((5.0, 0.0), right), ((0.0, 5.0), down)):
        expected = torch.nn.functional.normalize(forward + towards / 2, dim=0).float()
        torch.testing.assert_close(rays_through(cameras, view, *moved)[1], expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("875. 400. 401. 0.\n0. 0. 0.\n0.\n1.\n800 800\n", (875, 875, 400, 401)),
        ("11 0 5 0\n0 12 3 0\n0 0 1 0\n0 0 0 1\n", (11, 12, 5, 3)),
        ("\n11 0 5 0\n0 12 3 0\n0 0 1 0\n0 0 0 1\n\n", (11, 12, 5, 3)),
    ],
)
def test_nsvf_intrinsics(tmp_path, text, expected):
    (tmp_path / "intrinsics.txt").write_text(text)
    assert read_intrinsics(tmp_path / "intrinsics.txt") == expected


def test_nsvf_intrinsics_reach_the_cameras(nsvf):
    (nsvf / "intrinsics.txt").write_text("11 0 5 0\n0 12 3 0\n0 0 1 0\n0 0 0 1\n")
    cameras = parse_nsvf(nsvf).cameras
    assert cameras.fx.unique().tolist() == [11] and cameras.fy.unique().tolist() == [12]
    assert cameras.cx.unique().tolist() == [5] and cameras.cy.unique().tolist() == [3]
    # Not twice the principal point, as nerfstudio guesses.
    assert cameras.width.unique().tolist() == [WIDTH]
    assert cameras.height.unique().tolist() == [HEIGHT]


@pytest.mark.parametrize(
    ("there", "split", "taken"),
    [
        ("012", "train", "0"),
        ("012", "val", "1"),
        ("012", "test", "2"),
        ("01", "val", "1"),
        ("01", "test", "1"),
        ("02", "val", "2"),
        ("02", "test", "2"),
    ],
)
def test_nsvf_splits(tmp_path, there, split, taken):
    names = [path.name for path in parse_nsvf(write_nsvf(tmp_path, there), split).image_filenames]
    assert names == [f"{taken}_{view:04d}.png" for view in range(3)]


def test_nsvf_box_and_scale(nsvf):
    outputs = parse_nsvf(nsvf)
    assert outputs.scene_box.aabb.tolist() == [[-1, -2, -3], [1, 2, 4]]
    assert outputs.dataparser_scale == 1
    scaled = parse_nsvf(nsvf, scale_factor=0.5)
    assert scaled.scene_box.aabb.tolist() == [[-0.5, -1, -1.5], [0.5, 1, 2]]
    assert scaled.dataparser_scale == 0.5
    torch.testing.assert_close(
        scaled.cameras.camera_to_worlds[:, :, 3], torch.tensor(POSITIONS) / 2
    )
    torch.testing.assert_close(
        scaled.cameras.camera_to_worlds[:, :, :3], outputs.cameras.camera_to_worlds[:, :, :3]
    )
    (nsvf / "bbox.txt").write_text("-1 -2 -3\n1 2 4\n")
    assert parse_nsvf(nsvf).scene_box.aabb.tolist() == [[-1, -2, -3], [1, 2, 4]]


def test_nsvf_photos_with_alpha_are_blended_onto_white(tmp_path):
    from nerfstudio.data.datasets.base_dataset import InputDataset

    write_nsvf(tmp_path, mode="RGBA")
    image = InputDataset(parse_nsvf(tmp_path))[0]["image"]
    assert image.shape == (HEIGHT, WIDTH, 3) and bool((image == 1).all())
    assert parse_nsvf(tmp_path, alpha_color=None).alpha_color is None


def test_nsvf_ignores_what_macos_leaves(nsvf):
    (nsvf / "rgb" / "._0_0000.png").write_bytes(b"junk")
    (nsvf / "pose" / "._0_0000.txt").write_bytes(b"junk")
    assert len(parse_nsvf(nsvf).image_filenames) == 3


IDENTITY = "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"


def test_rotations_may_be_rounded(tmp_path):
    path = tmp_path / "pose.txt"
    path.write_text(IDENTITY.replace("1 0 0 0", "1.0004 0 0 0", 1))
    assert read_pose(path).shape == (3, 4)
    path.write_text(IDENTITY.replace("1 0 0 0", "1.0006 0 0 0", 1))
    with pytest.raises(CaptureError, match=r"off the identity by 0\.0012"):
        read_pose(path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("pose/0_0000.txt", IDENTITY[8:], r"0_0000\.txt: 3 lines of .* expected 4 lines of 4"),
        ("pose/0_0000.txt", "", r"0_0000\.txt: 0 lines of .* expected 4 lines of 4 numbers"),
        ("pose/0_0000.txt", "one two\n", r"0_0000\.txt: not numbers: .*'one'"),
        ("pose/0_0000.txt", IDENTITY.replace("1 0 0 0", "1 0 0 nan", 1), "pose is not finite"),
        ("pose/0_0000.txt", IDENTITY.replace("0 1 0 0", "0 2 0 0", 1), "not a rotation.* by 3 "),
        ("pose/0_0000.txt", IDENTITY.replace("0 1 0 0", "0 -1 0 0", 1), "determinant is -1"),
        ("pose/0_0000.txt", IDENTITY[:-8] + "4 5 6 1\n", r"expected 0 0 0 1: is .* transposed\?"),
        ("intrinsics.txt", "", r"intrinsics\.txt: 0 lines of .* expected a 4 × 4 matrix"),
        ("intrinsics.txt", "1 2 3\n", r"intrinsics\.txt: 1 lines of \[3\] numbers; expected"),
        ("intrinsics.txt", "focal\n", r"intrinsics\.txt: not numbers"),
        ("intrinsics.txt", "-9 6 4 0\n0\n", "fx -9, .* positive focal lengths"),
        ("intrinsics.txt", "10 nan 4 0\n0\n", "cx nan, .* finite"),
        ("intrinsics.txt", "10 40 4 0\n0\n", r"\(40, 4\) outside the photos of 12 × 8 pixels"),
        ("bbox.txt", "0 0 0 1 1\n", r"bbox\.txt: 5 numbers; expected x_min"),
        ("bbox.txt", "0 0 0 1 1 0\n", r"box from \[0\.0, 0\.0, 0\.0\] to .* the lower first"),
        ("bbox.txt", "0 0 0 1 1 inf\n", "expected finite corners"),
        ("rgb/0_0001.png", "junk", r"0_0001\.png: not an image"),
    ],
)
def test_nsvf_malformed_files(nsvf, file, text, message):
    (nsvf / file).write_text(text)
    with pytest.raises(UserError, match=message):
        parse_nsvf(nsvf)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".", "no such folder; expected a capture with rgb/.* --data"),
        ("rgb", "rgb: no such folder; expected the photos"),
        ("pose", "pose: no such folder; expected the poses"),
        ("intrinsics.txt", r"intrinsics\.txt: no such file"),
        ("bbox.txt", r"bbox\.txt: no such file"),
    ],
)
def test_nsvf_missing_files(nsvf, missing, message):
    (nsvf / missing).resolve().rename(nsvf.parent / "elsewhere")
    with pytest.raises(UserError, match=message) as caught:
        parse_nsvf(nsvf)
    # Runs whose capture is not at hand are opened without it when an OSError says so.
    assert isinstance(caught.value, OSError)


def test_nsvf_without_photos(nsvf):
    for photo in (nsvf / "rgb").iterdir():
        photo.unlink()
    with pytest.raises(UserError, match=r"rgb: no photos; expected files named \*\.png"):
        parse_nsvf(nsvf)


def test_nsvf_photo_without_pose(nsvf):
    (nsvf / "pose" / "1_0002.txt").unlink()
    with pytest.raises(UserError, match=r"9 photos in rgb/ and 8 poses in pose/, 1 .* as 1_0002"):
        parse_nsvf(nsvf)


def test_nsvf_empty_split(tmp_path):
    write_nsvf(tmp_path, "12")
    with pytest.raises(UserError, match=r"no views to use for train; .* start with 0_:"):
        parse_nsvf(tmp_path)
    with pytest.raises(UserError, match=r"no views to use for test; .* start with 2_ or 1_:"):
        parse_nsvf(write_nsvf(tmp_path / "other", "0"), "test")


def test_nsvf_photos_of_two_sizes(nsvf):
    write_photo(nsvf / "rgb" / "0_0001.png", (6, 4))
    with pytest.raises(UserError, match=r"0_0001\.png: 6 × 4 pixels; expected 12 × 8 as 0_0000"):
        parse_nsvf(nsvf)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_nsvf_scale_has_to_be_positive(nsvf, value):
    with pytest.raises(UserError, match=f"scale_factor {value:g}: expected a positive number"):
        parse_nsvf(nsvf, scale_factor=value)


def test_llff_cameras_stand_and_look_as_they_were_placed(llff):
    outputs = parse_llff(llff, orientation_method="none", center_method="none")
    target = torch.tensor([0.0, 6.0, 0.0])
    scale = 1 / 0.75 / 3
    for camera, view in enumerate([1, 2, 3, 4, 5, 6, 7]):
        position = torch.tensor([view % 3 - 1.0, 0.0, view // 3 - 1.0])
        origin, direction = rays_through(outputs.cameras, camera)
        torch.testing.assert_close(origin, position * scale)
        to_target = torch.nn.functional.normalize(target - position, dim=0)
        torch.testing.assert_close(direction, to_target, atol=1e-5, rtol=0)
        # They look along y: right is x, and down is against z.
        assert rays_through(outputs.cameras, camera, dx=5.0)[1][0] > direction[0] + 0.1
        assert rays_through(outputs.cameras, camera, dy=5.0)[1][2] < direction[2] - 0.1


def test_llff_is_oriented_centred_and_scaled(llff):
    rows = llff_rows()
    rows[:, [3, 8, 13]] += [10.0, 20.0, 30.0]
    np.save(llff / "poses_bounds.npy", rows)
    train, test = parse_llff(llff), parse_llff(llff, "test")
    poses = torch.cat([train.cameras.camera_to_worlds, test.cameras.camera_to_worlds])
    torch.testing.assert_close(poses[:, :, 3].mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.nn.functional.normalize(poses[:, :, 1].mean(dim=0), dim=0),
        torch.tensor([0.0, 0.0, 1.0]),
        atol=1e-5,
        rtol=0,
    )
    # Views 0 and 1 are a unit apart, and the nearest bound is 3.
    apart = torch.dist(test.cameras[0].camera_to_worlds[:, 3], poses[0, :, 3])
    assert float(apart) == pytest.approx(1 / 0.75 / 3, rel=1e-5)
    assert train.dataparser_scale == pytest.approx(1 / 0.75 / 3)
    # What was done to the poses is undone by what is stored.
    stored = train.transform_poses_to_original_space(
        train.cameras.camera_to_worlds, camera_convention="opengl"
    )
    torch.testing.assert_close(stored[0, :, 3], torch.tensor([10.0, 20.0, 29.0]))


def test_llff_bounds_are_scaled_with_the_world(llff):
    test = parse_llff(llff, "test", near_distance=6.0)
    assert test.metadata["nears"].tolist() == [6, 22]  # 3 and 11, doubled
    assert test.metadata["fars"].tolist() == [40, 56]
    assert parse_llff(llff, near_distance=6.0).metadata["nears"].tolist() == list(range(8, 21, 2))


def test_llff_focal_length_follows_the_photos(llff):
    cameras = parse_llff(llff).cameras
    assert cameras.fx.flatten().tolist() == [15] * 7 and cameras.fy.flatten().tolist() == [15] * 7
    assert cameras.width.unique().tolist() == [12] and cameras.height.unique().tolist() == [8]
    assert cameras.cx.unique().tolist() == [6] and cameras.cy.unique().tolist() == [4]
    write_photo(llff / "images_4" / "view01.png", (3, 2))
    cameras = parse_llff(llff).cameras
    assert cameras.fx.flatten().tolist() == [3.75] + [15] * 6
    assert cameras.width.flatten().tolist() == [3] + [12] * 6


@pytest.mark.parametrize(("interval", "tested"), [(8, [0, 8]), (2, [0, 2, 4, 6, 8]), (100, [0])])
def test_llff_splits(llff, interval, tested):
    def views(split):
        outputs = parse_llff(llff, split, eval_interval=interval)
        return [int(path.stem[-2:]) for path in outputs.image_filenames]

    assert views("test") == views("val") == tested
    assert views("train") == [view for view in range(9) if view not in tested]


@pytest.mark.parametrize(
    ("sides", "asked", "taken"),
    [
        ({"images": 3000, "images_4": 750, "images_8": 375}, None, "images_4"),
        ({"images": 4032, "images_4": 1008, "images_8": 504}, None, "images_8"),
        ({"images": 1000, "images_4": 250}, None, "images"),
        ({"images": 3000, "images_4": 1500}, None, "images_4"),
        ({"images": 3000}, None, "images"),
        ({"images": 3000, "images_4": 750}, 1, "images"),
        ({"images": 3000, "images_2": 1500}, 2, "images_2"),
    ],
)
def test_llff_photo_folder(llff, sides, asked, taken):
    for photo in (llff / "images_4").iterdir():
        photo.unlink()
    (llff / "images_4").rmdir()
    np.save(llff / "poses_bounds.npy", llff_rows(2))
    for folder, side in sides.items():
        for view in range(2):
            write_photo(llff / folder / f"view{view}.jpg", (side, side * 2 // 3))
    outputs = parse_llff(llff, downscale_factor=asked)
    assert [path.parent.name for path in outputs.image_filenames] == [taken]
    assert outputs.cameras.width.tolist() == [[sides[taken]]]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, np.nan, "view 2: the pose is not finite"),
        (3, np.inf, "view 2: the pose is not finite"),
        (0, 2.0, "view 2: not a rotation"),
        (4, 0.0, "view 2: height, width and focal length .* positive numbers of pixels"),
        (14, np.nan, "view 2: height, width and focal length"),
        (15, 0.0, "view 2: depths from 0 to 22; expected 0 < near < far"),
        (16, 4.0, "view 2: depths from 5 to 4"),
        (16, np.nan, "view 2: depths from 5 to nan"),
        (4, 12.0, r"view02\.png: 12 × 8 pixels; expected the shape of 24 × 12"),
    ],
)
def test_llff_numbers_that_are_no_cameras(llff, column, value, message):
    edit_llff(llff, 2, column, value)
    with pytest.raises(UserError, match=message):
        parse_llff(llff)


def test_llff_mirrored_poses(llff):
    rows = llff_rows()
    rows[:, [0, 5, 10]] *= -1
    np.save(llff / "poses_bounds.npy", rows)
    with pytest.raises(UserError, match=r"view 0: not a rotation.*determinant is -1"):
        parse_llff(llff)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 15)), r"float64 of shape \(9, 15\); expected N × 17 floats"),
        (np.zeros((0, 17)), r"shape \(0, 17\)"),
        (np.zeros((9, 17), dtype="U3"), "<U3 of shape"),
        (None, "not an array"),
    ],
)
def test_llff_malformed_poses_file(llff, array, message):
    if array is None:
        (llff / "poses_bounds.npy").write_bytes(b"junk")
    else:
        np.save(llff / "poses_bounds.npy", array)
    with pytest.raises(UserError, match=message):
        parse_llff(llff)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (".", "no such folder; expected a capture with poses_bounds"),
        ("poses_bounds.npy", r"poses_bounds\.npy: no such file; .* imgs2poses\.py"),
        ("images_4", "no photos; expected one of the folders images, images_4, images_8"),
    ],
)
def test_llff_missing_files(llff, missing, message):
    (llff / missing).resolve().rename(llff.parent / "elsewhere")
    with pytest.raises(UserError, match=message) as caught:
        parse_llff(llff)
    assert isinstance(caught.value, OSError)


def test_llff_folder_that_is_asked_for_is_missing(llff):
    with pytest.raises(UserError, match=r"images_2: no such folder; .* one of \['images_4'\]"):
        parse_llff(llff, downscale_factor=2)


def test_llff_without_photos(llff):
    for photo in (llff / "images_4").iterdir():
        photo.unlink()
    with pytest.raises(UserError, match=r"images_4: no photos; expected files named \*\.png or"):
        parse_llff(llff)


def test_llff_other_number_of_photos(llff):
    (llff / "images_4" / "view08.png").unlink()
    with pytest.raises(UserError, match=r"images_4: 8 photos, but 9 poses in poses_bounds\.npy"):
        parse_llff(llff)


def test_llff_empty_split(llff):
    with pytest.raises(UserError, match=r"none of 9 views is left for train; .* eval_interval 1:"):
        parse_llff(llff, eval_interval=1)


@pytest.mark.parametrize("name", ["near_distance", "eval_interval", "downscale_factor"])
def test_llff_settings_have_to_be_positive(llff, name):
    value = 0.0 if name == "near_distance" else 0
    with pytest.raises(UserError, match=f"{name} 0: expected a positive number"):
        parse_llff(llff, **{name: value})


@pytest.mark.skipif(not FERN.is_dir(), reason="needs the fern capture in ../shared/data/fern")
def test_fern():
    train, test = parse_llff(FERN), parse_llff(FERN, "test")
    assert (len(train.image_filenames), len(test.image_filenames)) == (17, 3)
    assert [path.name for path in test.image_filenames] == [
        f"image{view:03d}.png" for view in (0, 8, 16)
    ]
    assert all(path.is_file() for path in train.image_filenames + test.image_filenames)
    poses = torch.cat([train.cameras.camera_to_worlds, test.cameras.camera_to_worlds])
    forward = -poses[:, :, 2]
    assert float((forward @ forward.T).mean()) > 0.9
    assert float(poses[:, 2, 1].mean()) > 0.9  # upright
    assert train.cameras.width.unique().tolist() == [504]
    assert train.cameras.height.unique().tolist() == [378]
    assert float(train.cameras.fx[0]) == pytest.approx(3260.526 / 8, rel=1e-5)
    nears = torch.cat([train.metadata["nears"], test.metadata["nears"]])
    assert float(nears.min()) == pytest.approx(1 / 0.75)
