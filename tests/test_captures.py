"""Captures with every fault that people's have: mended, or refused in clear words."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.scene_box import SceneBox
from PIL import ExifTags, Image

from masked_wavelet_nerf import captures
from masked_wavelet_nerf.captures import find_faults, mend, parse, select_views
from masked_wavelet_nerf.datamanager import WaveletDataManagerConfig
from masked_wavelet_nerf.dataparsers.captures import CaptureError, MissingCaptureError

WIDTH, HEIGHT = 12, 10


# --- made-up captures -----------------------------------------------------------------------------


def pose(view, num_views=10):
    """Camera to world on a ring, in two heights, looking at the origin."""
    angle = 2 * np.pi * view / num_views
    position = np.array([3 * np.cos(angle), 3 * np.sin(angle), 0.5 * (view % 2)])
    back = position / np.linalg.norm(position)
    right = np.cross([0, 0, 1], back)
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(back, right), back, position], axis=1)
    return matrix


def pixels(view, width=WIDTH, height=HEIGHT):
    """Red tells the view, green the row and blue the column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([np.full_like(x, 10 * view), 5 * y, 5 * x], axis=2).astype(np.uint8)


def write_capture(folder, num_views=10, sizes=None, **top):
    """A capture for nerfstudio-data; sizes are those of some views' photos and cameras."""
    sizes = sizes or {}
    (folder / "images").mkdir(parents=True)
    frames = []
    for view in range(num_views):
        width, height = sizes.get(view, (WIDTH, HEIGHT))
        name = f"images/{view:02d}.png"
        Image.fromarray(pixels(view, width, height)).save(folder / name)
        frames.append({"file_path": name, "transform_matrix": pose(view, num_views).tolist()})
        if sizes:
            frames[-1] |= intrinsics(width, height)
    write_json(folder, {**({} if sizes else intrinsics()), "frames": frames, **top})
    return folder


def intrinsics(width=WIDTH, height=HEIGHT):
    return {
        "fl_x": 14.0,
        "fl_y": 14.0,
        "cx": width / 2,
        "cy": height / 2,
        "w": width,
        "h": height,
    }


def write_json(folder, meta):
    (folder / "transforms.json").write_text(json.dumps(meta))


def edit(folder, change):
    meta = json.loads((folder / "transforms.json").read_text())
    change(meta)
    write_json(folder, meta)


def edit_pose(folder, view, change):
    def changed(meta):
        matrix = np.array(meta["frames"][view]["transform_matrix"])
        meta["frames"][view]["transform_matrix"] = np.asarray(change(matrix)).tolist()

    edit(folder, changed)


def add_masks(folder, size=None, num_views=10):
    """Black on the left half."""
    (folder / "masks").mkdir()
    for view in range(num_views):
        with Image.open(folder / f"images/{view:02d}.png") as photo:
            width, height = size or photo.size
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 2 :] = 255
        Image.fromarray(mask).save(folder / f"masks/{view:02d}.png")

    def name(meta):
        for view, frame in enumerate(meta["frames"]):
            frame["mask_path"] = f"masks/{view:02d}.png"

    edit(folder, name)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def folder(tmp_path):
    return write_capture(tmp_path / "capture")


def parsed(folder, split="train", **settings):
    return parse(NerfstudioDataParserConfig(data=folder, **settings).setup(), split)


def everything(folder, **settings):
    return parsed(folder, eval_mode="all", **settings)


def names(outputs):
    return [path.name for path in outputs.image_filenames]


def numbers(*views):
    return [f"{view:02d}.png" for view in views]


def fault(faults, kind):
    (found,) = [found for found in faults if found.kind == kind]
    return found


def make_manager(folder, test_mode="val", **settings):
    parser = settings.pop("dataparser", None) or NerfstudioDataParserConfig()
    settings.setdefault("train_num_rays_per_batch", 64)
    config = WaveletDataManagerConfig(
        data=folder, dataparser=parser, eval_num_rays_per_batch=32, **settings
    )
    torch.manual_seed(0)
    return config.setup(device="cpu", test_mode=test_mode)


def assert_pixels_are_the_photos(manager, num_steps=12):
    """Pixels have the colours, and rays the origins, of the photos that the indices name."""
    seen = set()
    for step in range(num_steps):
        rays, batch = manager.next_train(step)
        assert len(rays) == len(batch["image"]) == 64
        for index, colour in zip(batch["indices"].tolist(), batch["image"], strict=True):
            view, y, x = index
            path = manager.train_dataset.image_filenames[view]
            expected = torch.tensor([10 * int(path.stem), 5 * y, 5 * x]) / 255
            torch.testing.assert_close(colour[:3], expected)
            seen.add((view, y, x))
        cameras = manager.train_dataset.cameras
        torch.testing.assert_close(
            rays.origins, cameras.camera_to_worlds[batch["indices"][:, 0], :, 3]
        )
    return seen


# --- nothing wrong --------------------------------------------------------------------------------


def test_good_captures_stay_as_they_are(folder):
    outputs = everything(folder)
    mended, faults = mend(outputs, "train")
    assert mended is outputs and faults == [] and find_faults(outputs, "train") == []
    manager = make_manager(folder)
    assert len(manager.train_dataset) == 9 and len(manager.eval_dataset) == 1
    assert_pixels_are_the_photos(manager)


def test_real_capture_has_all_its_photos_used():
    fox = Path(__file__).parents[1] / "../shared/data/fox"
    if not (fox / "transforms.json").is_file():
        pytest.skip("no fox capture beside the checkout")
    mended, faults = mend(everything(fox), "train")
    assert len(mended.image_filenames) == len(mended.cameras) == 50
    message = fault(faults, "missing").message
    assert "not there: 17 of 67 for training" in message and "50 views are used" in message
    assert all(path.is_file() for path in mended.image_filenames)


# --- photos ---------------------------------------------------------------------------------------


def test_missing_photos_are_left_out(folder):
    outputs = everything(folder)
    for name in numbers(1, 2, 5, 6):
        (folder / "images" / name).unlink()
    mended, (found,) = mend(outputs, "train")
    left = [0, 3, 4, 7, 8, 9]
    assert names(mended) == numbers(*left)
    torch.testing.assert_close(
        mended.cameras.camera_to_worlds, outputs.cameras.camera_to_worlds[left]
    )
    assert found.kind == "missing" and not found.is_fatal
    assert found.message == (
        f"{folder / 'images'}: photos or masks that are not there: 4 of 10 for training, as "
        "01.png, 02.png, 05.png; expected all that the capture names: copy them there; until then "
        "6 views are used"
    )
    assert len(outputs.image_filenames) == len(outputs.cameras) == 10


def test_pixels_are_right_after_photos_were_left_out(folder):
    for name in numbers(0, 3, 4):
        (folder / "images" / name).unlink()
    manager = make_manager(folder)
    assert len(manager.train_dataset) + len(manager.eval_dataset) == 7
    assert len(manager.train_dataset) == len(manager.train_dataset.cameras) == 6
    views = {view for view, _, _ in assert_pixels_are_the_photos(manager)}
    assert views == set(range(6))


def test_a_missing_first_photo_does_not_choose_the_size(folder):
    (folder / "images/00.png").unlink()
    assert names(mend(everything(folder), "train")[0]) == numbers(*range(1, 10))
    # Large photos with smaller copies: those are used, as for any other capture.
    big = folder.parent / "big"
    write_capture(big, sizes=dict.fromkeys(range(10), (2000, 100)))
    (big / "images_2").mkdir()
    for view in range(10):
        Image.fromarray(pixels(view, 1000, 50)).save(big / f"images_2/{view:02d}.png")
    (big / "images/00.png").unlink()
    (big / "images_2/00.png").unlink()
    mended, _ = mend(everything(big), "train")
    assert names(mended) == numbers(*range(1, 10))
    assert {path.parent.name for path in mended.image_filenames} == {"images_2"}
    assert mended.cameras.width.unique().tolist() == [1000]


def test_unreadable_photos_are_left_out(folder):
    (folder / "images/02.png").write_bytes(b"")
    (folder / "images/04.png").write_bytes(b"not a photo")
    mended, (found,) = mend(everything(folder), "train")
    assert names(mended) == numbers(0, 1, 3, 5, 6, 7, 8, 9)
    assert (
        "photos or masks that are no images: 2 of 10 for training, as 02.png, 04.png; expected "
        in found.message
    )
    assert found.kind == "unreadable" and not found.is_fatal


def test_an_unreadable_first_photo_does_not_stop_the_parser(folder):
    (folder / "images/00.png").write_bytes(b"not a photo")
    manager = make_manager(folder)
    assert names(manager.train_dataparser_outputs)[0] == "01.png"


def test_truncated_photo_is_named(folder):
    truncate(folder / "images/03.png")
    with pytest.raises(CaptureError, match=r"images/03\.png: cannot be read: .*truncated"):
        make_manager(folder)


def test_no_photo_left(folder):
    outputs = everything(folder)
    shutil.rmtree(folder / "images")
    same, faults = mend(outputs, "train")
    found = faults[-1]
    assert same is outputs and found.is_fatal and found.kind == "missing"
    assert "images: none of 10 views can be used for training; expected photos" in found.message
    with pytest.raises(MissingCaptureError, match=r"00\.png: no such file"):
        make_manager(folder)
    # Opening a run without its photos relies on an OSError.
    assert issubclass(MissingCaptureError, OSError)


def test_no_photo_left_where_the_parser_opens_none(folder):
    shutil.rmtree(folder / "images")
    with pytest.raises(MissingCaptureError, match="none of 9 views can be used for training"):
        make_manager(folder, dataparser=NerfstudioDataParserConfig(downscale_factor=1))


def test_rendering_needs_no_photos(folder):
    shutil.rmtree(folder / "images")
    manager = make_manager(folder, test_mode="inference")
    assert len(manager.train_dataset.cameras) == 9 and len(manager.eval_dataset.cameras) == 1


def test_rendering_leaves_out_what_training_left_out(folder):
    (folder / "images/04.png").unlink()
    trained = make_manager(folder)
    rendered = make_manager(folder, test_mode="inference")
    assert names(rendered.train_dataparser_outputs) == names(trained.train_dataparser_outputs)
    assert "04.png" not in names(rendered.train_dataparser_outputs)


def test_masks_depths_times_and_metadata_go_with_their_views(folder):
    add_masks(folder)
    outputs = everything(folder)
    tensors = outputs.cameras
    cameras = Cameras(
        camera_to_worlds=tensors.camera_to_worlds,
        fx=torch.arange(10.0)[:, None] + 10,
        fy=torch.arange(10.0)[:, None] + 20,
        cx=torch.arange(10.0)[:, None] + 30,
        cy=torch.arange(10.0)[:, None] + 40,
        width=torch.arange(10)[:, None] + 50,
        height=torch.arange(10)[:, None] + 60,
        distortion_params=torch.arange(60.0).view(10, 6),
        camera_type=torch.tensor([[1]] * 9 + [[2]]),
        times=torch.arange(10.0),
        metadata={"exposure": torch.arange(20.0).view(10, 2)},
    )
    depths = [folder / f"depth{view}.png" for view in range(10)]
    metadata = {
        "depth_filenames": depths,
        "nears": torch.arange(10.0),
        "points3D_xyz": torch.zeros(10, 3),
        "mask_color": (1.0, 0.0, 0.0),
        "nothing": None,
    }
    outputs = dataclasses.replace(outputs, cameras=cameras, metadata=metadata)
    (folder / "images/01.png").unlink()
    (folder / "masks/06.png").unlink()
    mended, (found,) = mend(outputs, "train")
    left = [0, 2, 3, 4, 5, 7, 8, 9]
    assert "not there: 2 of 10 for training, as 01.png, 06.png; " in found.message
    assert names(mended) == numbers(*left)
    assert [path.name for path in mended.mask_filenames or []] == numbers(*left)
    assert mended.metadata["depth_filenames"] == [depths[view] for view in left]
    assert mended.metadata["nears"].tolist() == left
    assert mended.metadata["points3D_xyz"].shape == (10, 3)
    assert mended.metadata["mask_color"] == (1.0, 0.0, 0.0) and mended.metadata["nothing"] is None
    for field in dataclasses.fields(Cameras):
        before, after = getattr(cameras, field.name), getattr(mended.cameras, field.name)
        if field.name == "metadata":
            before, after = before["exposure"], after["exposure"]
        torch.testing.assert_close(after, before[left], msg=field.name)


def test_fewer_photos_than_channels_keep_their_colours(folder):
    outputs = select_views(everything(folder), [0, 1, 2])
    outputs.metadata["mask_color"] = (1.0, 0.5, 0.0)
    (folder / "images/01.png").unlink()
    assert mend(outputs, "train")[0].metadata["mask_color"] == (1.0, 0.5, 0.0)


def test_few_photos(tmp_path):
    found = fault(find_faults(everything(write_capture(tmp_path / "a", 7)), "train"), "few")
    assert (
        "too few photos for training: 7; expected at least 8" in found.message
        and not found.is_fatal
    )
    assert find_faults(everything(write_capture(tmp_path / "b", 8)), "train") == []


def test_duplicates(folder):
    for name in numbers(2, 7):
        shutil.copy(folder / "images/01.png", folder / "images" / name)
    # As many bytes, other bytes.
    other = bytearray((folder / "images/03.png").read_bytes())
    (folder / "images/04.png").write_bytes(other + b"a")
    (folder / "images/05.png").write_bytes(other + b"b")
    found = fault(find_faults(everything(folder), "train"), "duplicate")
    assert (
        "photos that are copies of others: 2 of 10, as 02.png, 07.png; expected each once"
        in found.message
    )
    assert not found.is_fatal


def test_grey_palette_alpha_and_upper_case_endings_train(tmp_path):
    folder = write_capture(tmp_path / "my capture – ünïcode 写真")
    photos = folder / "images"
    Image.fromarray(pixels(1)).convert("L").save(photos / "01.png")
    Image.fromarray(pixels(2)).quantize(64).save(photos / "02.png")
    alpha = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    Image.fromarray(np.concatenate([pixels(4), alpha], axis=2)).save(photos / "04.png")
    (photos / "05.png").rename(photos / "05 – ä.PNG")
    (photos / "06.png").unlink()
    Image.new("RGB", (WIDTH, HEIGHT), (60, 61, 62)).save(photos / "06.JPG", quality=100)

    def rename(meta):
        meta["frames"][5]["file_path"] = "images/05 – ä.PNG"
        meta["frames"][6]["file_path"] = "images/06.JPG"

    edit(folder, rename)
    manager = make_manager(folder)
    assert names(manager.train_dataparser_outputs)[5:7] == ["05 – ä.PNG", "06.JPG"]
    colours: dict[str, list] = {}
    for step in range(10):
        _, batch = manager.next_train(step)
        assert batch["image"].shape == (64, 4)  # one photo has alpha
        for (view, y, x), colour in zip(batch["indices"].tolist(), batch["image"], strict=True):
            name = manager.train_dataset.image_filenames[view].name
            colours.setdefault(name, []).append((y, x, (255 * colour).round().int().tolist()))
    for y, x, colour in colours["05 – ä.PNG"]:
        assert colour == [50, 5 * y, 5 * x, 255]
    for y, x, colour in colours["04.png"]:
        assert colour == [40, 5 * y, 5 * x, 128]
    for _, _, (red, green, blue, _) in colours["01.png"]:
        assert red == green == blue
    for y, x, colour in colours["02.png"]:
        np.testing.assert_allclose(colour, [20, 5 * y, 5 * x, 255], atol=10)
    for _, _, colour in colours["06.JPG"]:
        np.testing.assert_allclose(colour, [60, 61, 62, 255], atol=2)


# --- sizes ----------------------------------------------------------------------------------------

MIXED = {1: (HEIGHT, WIDTH), 4: (20, 14), 7: (HEIGHT, WIDTH)}


def test_portrait_and_landscape_train(tmp_path):
    folder = write_capture(tmp_path / "mixed", sizes=MIXED)
    manager = make_manager(folder)
    seen = assert_pixels_are_the_photos(manager, num_steps=30)
    outputs = manager.train_dataparser_outputs
    for view, path in enumerate(outputs.image_filenames):
        width, height = MIXED.get(int(path.stem), (WIDTH, HEIGHT))
        rows = {y for v, y, _ in seen if v == view}
        columns = {x for v, _, x in seen if v == view}
        # All of each photo, and nothing beyond.
        assert rows == set(range(height)) and columns == set(range(width)), path
    _, batch = manager.next_eval(0)
    assert batch["image"].shape == (32, 3)


def test_mixed_sizes_after_photos_were_left_out(tmp_path):
    folder = write_capture(tmp_path / "mixed", sizes=MIXED)
    for name in numbers(0, 3):
        (folder / "images" / name).unlink()
    assert_pixels_are_the_photos(make_manager(folder))


def test_mixed_sizes_with_masks(tmp_path):
    folder = write_capture(tmp_path / "mixed", sizes=MIXED)
    add_masks(folder)
    manager = make_manager(folder)
    for view, _, x in assert_pixels_are_the_photos(manager):
        width = int(manager.train_dataset.cameras.width[view])
        assert x >= width // 2


def test_one_photo_with_a_mask(tmp_path):
    folder = write_capture(tmp_path / "capture")
    add_masks(folder)
    for name in numbers(*range(1, 10)):
        (folder / "images" / name).unlink()
    parser = NerfstudioDataParserConfig(eval_mode="all")
    seen = assert_pixels_are_the_photos(make_manager(folder, dataparser=parser))
    assert {x for _, _, x in seen} == set(range(WIDTH // 2, WIDTH))


def test_mixed_sizes_leave_pixels_unrestricted(tmp_path):
    manager = make_manager(write_capture(tmp_path / "mixed", sizes=MIXED))
    assert manager.restrict_pixels(lambda rays: pytest.fail("asked")) is None
    assert_pixels_are_the_photos(manager)


def test_pixels_are_restricted_after_photos_were_left_out(folder):
    (folder / "images/02.png").unlink()
    manager = make_manager(folder)
    origin = manager.train_dataset.cameras.camera_to_worlds[3, :, 3]

    def is_useful(rays):
        return (rays.origins - origin).norm(dim=-1) < 1e-4

    assert manager.restrict_pixels(is_useful) == pytest.approx(1 / 8)
    seen = assert_pixels_are_the_photos(manager)
    assert {view for view, _, _ in seen} == {3}


def test_only_evaluation_has_several_sizes(folder):
    outputs = everything(folder)
    evaluation = names(parsed(folder, "val"))
    assert len(evaluation) == 1 and len(outputs.image_filenames) == 10
    # Two photos for evaluation, of which one is upright.
    sizes = {5: (HEIGHT, WIDTH)}
    mixed = write_capture(
        folder.parent / "mixed",
        sizes={view: sizes.get(view, (WIDTH, HEIGHT)) for view in range(10)},
        train_filenames=[f"images/{name}" for name in numbers(0, 1, 2, 3, 6, 7, 8, 9)],
        val_filenames=[f"images/{name}" for name in numbers(4, 5)],
        test_filenames=[f"images/{name}" for name in numbers(4, 5)],
    )
    manager = make_manager(mixed)
    assert isinstance(next(manager.iter_train_image_dataloader)["image"], torch.Tensor)
    _, batch = manager.next_eval(0)
    assert set((255 * batch["image"][:, 0]).round().int().tolist()) == {40, 50}


def test_sizes_are_said(tmp_path):
    outputs = everything(write_capture(tmp_path / "mixed", sizes=MIXED))
    found = fault(find_faults(outputs, "train"), "sizes")
    assert "photos of 3 sizes for training, as 10 × 12, 12 × 10, 20 × 14;" in found.message
    assert not found.is_fatal


def test_photos_larger_than_their_cameras_are_resized(folder):
    for view in (2, 3):
        large = pixels(view).repeat(3, axis=0).repeat(3, axis=1)
        Image.fromarray(large).save(folder / f"images/{view:02d}.png")
    outputs = everything(folder)
    found = fault(find_faults(outputs, "train"), "resized")
    assert (
        "photos of another size than their cameras: 2 of 10 for training, as 02.png, 03.png;"
        in found.message
    )
    assert "size, not 36 × 30:" in found.message and not found.is_fatal
    parser = NerfstudioDataParserConfig(eval_mode="all")
    image = make_manager(folder, dataparser=parser).train_dataset[2]["image"]
    assert image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(image[1:-1, 1:-1], pixels(2)[1:-1, 1:-1] / 255, atol=0.01)


def test_photos_of_another_shape_are_refused(folder):
    Image.fromarray(pixels(6, 20, 10)).save(folder / "images/06.png")
    found = fault(find_faults(everything(folder), "train"), "shape")
    assert found.is_fatal
    message = r"06\.png: 20 × 10 pixels; expected the shape of its camera, 12 × 10: use the photo"
    with pytest.raises(CaptureError, match=message):
        make_manager(folder)


def turn(path, view):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    # Stored lying, shown upright: a quarter turn to the right.
    Image.fromarray(np.rot90(pixels(view, HEIGHT, WIDTH), 1)).save(path, exif=exif)


def test_exif_turns_photos_whose_cameras_are_upright(tmp_path):
    folder = write_capture(tmp_path / "upright", sizes=dict.fromkeys(range(10), (HEIGHT, WIDTH)))
    for view in range(10):
        turn(folder / f"images/{view:02d}.png", view)
    found = fault(find_faults(everything(folder), "train"), "turned")
    assert (
        "photos that fit their cameras only as EXIF turns them: 10 of 10 for training, as 00.png, "
        in found.message
    )
    assert not found.is_fatal
    assert_pixels_are_the_photos(make_manager(folder))


def test_exif_does_not_turn_photos_whose_cameras_lie(folder):
    for view in range(10):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.fromarray(pixels(view)).save(folder / f"images/{view:02d}.png", exif=exif)
    assert find_faults(everything(folder), "train") == []
    assert_pixels_are_the_photos(make_manager(folder))


def test_masks_of_another_size(folder):
    add_masks(folder, (36, 30))
    outputs = everything(folder)
    found = fault(find_faults(outputs, "train"), "mask")
    assert (
        "masks of another size than their cameras: 10 of 10 for training, as 00.png,"
        in found.message
    )
    assert not found.is_fatal
    manager = make_manager(folder)
    seen = assert_pixels_are_the_photos(manager)
    assert {x for _, _, x in seen} == set(range(WIDTH // 2, WIDTH))


def test_masks_of_another_shape_are_refused(folder):
    add_masks(folder, (30, 36))
    assert fault(find_faults(everything(folder), "train"), "mask").is_fatal
    with pytest.raises(CaptureError, match=r"masks/00\.png: 30 × 36 pixels; .* 12 × 10"):
        make_manager(folder)


def test_masks_of_some_photos_only(folder):
    add_masks(folder)
    edit(folder, lambda meta: meta["frames"][3].pop("mask_path"))
    with pytest.raises(CaptureError, match=r"transforms\.json: Different number of image and mask"):
        make_manager(folder)


# --- poses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3)])
def test_a_pose_that_is_not_finite_is_left_out(folder, value, place):
    expected = parsed(folder, "train", train_split_fraction=1.0)

    def spoil(matrix):
        matrix[place] = value
        return matrix

    edit_pose(folder, 4, spoil)
    outputs = everything(folder)
    mended, (found,) = mend(outputs, "train")
    assert names(mended) == numbers(0, 1, 2, 3, 5, 6, 7, 8, 9)
    assert found.kind == "pose" and not found.is_fatal
    assert "not finite, mirror or stretch: 1 of 10 for training, as 04.png; " in found.message
    # The others look as they did, from where they were but for the middle and the scale.
    left = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    poses, before = mended.cameras.camera_to_worlds, expected.cameras.camera_to_worlds[left]
    relative = poses[0, :, :3].T @ poses[5, :, :3]
    torch.testing.assert_close(relative, before[0, :, :3].T @ before[5, :, :3])
    assert poses[..., 3].abs().max() == pytest.approx(1)
    distances = torch.pdist(poses[..., 3]) / torch.pdist(before[..., 3])
    torch.testing.assert_close(distances, distances[:1].expand_as(distances))
    assert_pixels_are_the_photos(make_manager(folder))


def test_poses_without_any_finite_one(folder):
    for view in range(10):
        edit_pose(folder, view, lambda matrix: matrix * np.nan)
    with pytest.raises(CaptureError, match=r"none of 9 views can be used .*not finite"):
        make_manager(folder)


def test_parsing_leaves_nerfstudio_as_it_was(folder):
    before = captures.camera_utils.auto_orient_and_center_poses
    everything(folder)
    write_json(folder, {})
    with pytest.raises(CaptureError):
        everything(folder)
    assert captures.camera_utils.auto_orient_and_center_poses is before


def with_poses(change, view=4):
    """Outputs of a parser with one pose changed; photos are made up."""
    poses = np.stack([pose(v)[:3] for v in range(10)])
    poses[view] = change(poses[view])
    cameras = Cameras(
        camera_to_worlds=torch.from_numpy(poses).float(),
        fx=14.0,
        fy=14.0,
        cx=6.0,
        cy=5.0,
        width=WIDTH,
        height=HEIGHT,
    )
    return cameras


def scaled(factors):
    """Axes stretched, position kept."""

    def change(matrix):
        matrix = matrix.copy()
        matrix[:, :3] = matrix[:, :3] * factors
        return matrix

    return change


@pytest.mark.parametrize("factors", [(3, 3, 3), (0.01, 0.01, 0.01), (1.02, 1, 0.99)])
def test_nearly_rotations_become_rotations(folder, factors):
    outputs = dataclasses.replace(everything(folder), cameras=with_poses(scaled(factors)))
    before = outputs.cameras.camera_to_worlds.clone()
    mended, (found,) = mend(outputs, "train")
    assert names(mended) == numbers(*range(10)) and found.kind == "pose" and not found.is_fatal
    assert "poses that are scaled or sheared: 1 of 10 for training, as 04.png;" in found.message
    expected = torch.from_numpy(np.stack([pose(view)[:3] for view in range(10)])).float()
    torch.testing.assert_close(mended.cameras.camera_to_worlds, expected)
    assert torch.equal(outputs.cameras.camera_to_worlds, before)
    # The others are untouched, bit by bit.
    assert torch.equal(mended.cameras.camera_to_worlds[:4], before[:4])


def test_noise_in_a_rotation_is_left_alone(folder):
    cameras = with_poses(scaled((1.0001, 1, 1)))
    outputs = dataclasses.replace(everything(folder), cameras=cameras)
    mended, faults = mend(outputs, "train")
    assert mended is outputs and faults == []


def test_a_sheared_pose_takes_the_nearest_rotation(folder):
    shear = np.array([[1, 0.02, 0], [0, 1, 0], [0, 0, 1]])

    def change(matrix):
        return np.concatenate([matrix[:, :3] @ shear, matrix[:, 3:]], axis=1)

    outputs = dataclasses.replace(everything(folder), cameras=with_poses(change))
    mended, _ = mend(outputs, "train")
    rotation = mended.cameras.camera_to_worlds[4, :, :3]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-6, rtol=0)
    # A shear of s is a turn by s / 2, and a stretch.
    turn = torch.from_numpy(pose(4)[:3, :3]).float().T @ rotation
    assert float(turn[0, 1]) == pytest.approx(0.01, abs=1e-4)
    assert float(turn[1, 0]) == pytest.approx(-0.01, abs=1e-4)


@pytest.mark.parametrize("factors", [(-1, 1, 1), (-1, -1, -1), (1, 1, 1.2), (1, 0, 1), (0, 0, 0)])
def test_what_is_no_rotation_is_left_out(folder, factors):
    outputs = dataclasses.replace(everything(folder), cameras=with_poses(scaled(factors)))
    mended, (found,) = mend(outputs, "train")
    assert names(mended) == numbers(0, 1, 2, 3, 5, 6, 7, 8, 9)
    assert "mirror or stretch: 1 of 10 for training, as 04.png; expected rotations" in found.message


def test_scaled_poses_train(folder):
    edit_pose(folder, 4, lambda matrix: matrix @ np.diag([2, 2, 2, 1]))
    manager = make_manager(folder)
    assert_pixels_are_the_photos(manager)
    rotations = manager.train_dataset.cameras.camera_to_worlds[..., :3]
    torch.testing.assert_close(
        rotations.mT @ rotations, torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0
    )


def move(folder, position):
    """Moves every camera of the capture."""
    for view in range(10):

        def placed(matrix, view=view):
            matrix[:3, 3] = position(view)
            return matrix

        edit_pose(folder, view, placed)


@pytest.mark.parametrize("where", [(0, 0, 0), (0.1, 0.2, 0.7), (1234.5, -77.7, 3.3)])
def test_all_cameras_at_one_point(folder, where):
    move(folder, lambda view: where)
    said = "all 10 cameras stand at one point, which shows no depth; expected photos from several"
    (found,) = find_faults(everything(folder, auto_scale_poses=False), "train")
    assert found.kind == "point" and said in found.message and not found.is_fatal


def test_scaling_cameras_at_one_point(folder):
    """nerfstudio divides by their extent, which is zero or what rounding makes of it."""
    move(folder, lambda view: (0, 0, 0))
    with pytest.raises(CaptureError, match=r"transforms\.json: all cameras stand at one point,"):
        make_manager(folder)
    move(folder, lambda view: (1234.5, -77.7, 3.3 + 1e-5 * (view % 2)))
    outputs = everything(folder)
    assert outputs.cameras.camera_to_worlds[..., 3].abs().max() == pytest.approx(1)
    assert [found.kind for found in find_faults(outputs, "train")] == ["point"]


def test_all_cameras_on_a_line(folder):
    move(folder, lambda view: (view, 2 * view + 0.01 * (view % 2), 5 - view))
    faults = find_faults(everything(folder), "train")
    found = fault(faults, "line")
    assert "all 10 cameras stand on a line, which shows depth in one direction" in found.message
    assert [other.kind for other in faults] == ["line"]


def test_cameras_in_a_plane_or_on_an_arc_are_well(folder):
    move(folder, lambda view: (view, 0.05 * view**2, 0))
    assert find_faults(everything(folder), "train") == []


def test_cameras_far_off_the_scene_box(folder):
    outputs = everything(folder, scale_factor=20.0)
    found = fault(find_faults(outputs, "train"), "far")
    assert "cameras far off the scene box: 10 of 10, as 00.png, 01.png, 02.png; " in found.message
    assert "at most 5 half sides, not 20:" in found.message and not found.is_fatal
    assert find_faults(everything(folder, scale_factor=4.0), "train") == []


def test_cameras_next_to_the_centre(folder):
    outputs = everything(folder, scale_factor=1e-4)
    faults = find_faults(outputs, "train")
    assert [found.kind for found in faults] == ["near"]
    assert "all cameras are within 0.0001 half sides of the scene box's centre" in faults[0].message


def test_reach_is_measured_in_the_scene_box(folder):
    outputs = everything(folder, scale_factor=6.0)
    assert [found.kind for found in find_faults(outputs, "train")] == ["far"]
    box = SceneBox(aabb=torch.tensor([[-1.5] * 3, [1.5] * 3]))
    assert find_faults(dataclasses.replace(outputs, scene_box=box), "train") == []
    # A small box is no fault: cameras stand around it.
    outputs = everything(folder, scale_factor=4.0)
    box = SceneBox(aabb=torch.tensor([[-0.1] * 3, [0.1] * 3]))
    assert find_faults(dataclasses.replace(outputs, scene_box=box), "train") == []


# --- intrinsics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda meta: meta.pop("fl_x"), "fx not specified in frame; expected fl_x, fl_y, cx"),
        (lambda meta: meta.pop("w"), "width not specified in frame; expected fl_x, fl_y"),
        (lambda meta: meta.pop("frames"), "no entry 'frames'; expected"),
        (lambda meta: meta["frames"][2].pop("transform_matrix"), "no entry 'transform_matrix'"),
        (lambda meta: meta["frames"][2].pop("file_path"), "no entry 'file_path'"),
        (lambda meta: meta.update(fl_x="wide"), "could not convert string to float: 'wide'"),
        (lambda meta: meta.update(camera_model="EYE"), "no entry 'EYE'"),
        (lambda meta: meta["frames"][2].update(transform_matrix=[[1, 2]]), "inhomogeneous"),
    ],
)
def test_what_the_parser_misses(folder, change, said):
    edit(folder, change)
    with pytest.raises(CaptureError) as caught:
        make_manager(folder)
    assert str(caught.value).startswith(f"{folder / 'transforms.json'}: ")
    assert said in str(caught.value)
    assert "add them or run ns-process-data again" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_what_is_no_json(folder):
    (folder / "transforms.json").write_text("{")
    with pytest.raises(CaptureError, match=r"transforms\.json: Expecting property name"):
        make_manager(folder)


def test_missing_files_and_captures(folder, tmp_path):
    (folder / "transforms.json").unlink()
    with pytest.raises(MissingCaptureError, match=r"transforms\.json: no such file; expected it"):
        make_manager(folder)
    with pytest.raises(MissingCaptureError, match="nowhere: no such capture; expected a folder"):
        make_manager(tmp_path / "nowhere")
    with pytest.raises(MissingCaptureError, match=r"transforms_train\.json: no such file"):
        make_manager(folder, dataparser=BlenderDataParserConfig())


def test_a_parser_of_another_format_is_named(folder):
    (folder / "transforms_train.json").write_text("{}")
    with pytest.raises(CaptureError, match=r"no entry 'frames'; expected .* for Blender: mend it"):
        make_manager(folder, dataparser=BlenderDataParserConfig())


@pytest.mark.parametrize("value", [0.0, -14.0, float("nan"), float("inf")])
def test_focal_lengths_that_no_camera_has(folder, value):
    edit(folder, lambda meta: meta.update(fl_y=value))
    found = fault(find_faults(everything(folder), "train"), "intrinsics")
    assert found.is_fatal
    message = rf"without a focal length: 9 of 9, as 00\.png.* not fl_x 14, fl_y {value:g}, cx 6"
    with pytest.raises(CaptureError, match=message):
        make_manager(folder)


@pytest.mark.parametrize(
    ("focal", "is_odd"), [(1000.0, True), (0.1, True), (100.0, False), (3.0, False)]
)
def test_fields_of_view(folder, focal, is_odd):
    edit(folder, lambda meta: meta.update(fl_x=focal, fl_y=focal))
    faults = find_faults(everything(folder), "train")
    assert [found.kind for found in faults] == ["intrinsics"] * is_odd
    if is_odd:
        angle = np.degrees(2 * np.arctan(WIDTH / (2 * focal)))
        assert "with an odd field of view: 10 of 10, as 00.png, " in faults[0].message
        assert f"expected 5 to 175 degrees, not {angle:.3g} by " in faults[0].message
        assert not faults[0].is_fatal


def test_fisheye_cameras_may_see_more(folder):
    edit(folder, lambda meta: meta.update(fl_x=0.1, fl_y=0.1, camera_model="OPENCV_FISHEYE"))
    assert find_faults(everything(folder), "train") == []


# --- evaluation -----------------------------------------------------------------------------------


def test_training_views_stand_in_for_evaluation(folder, capsys):
    parser = NerfstudioDataParserConfig(train_split_fraction=1.0)
    manager = make_manager(folder, dataparser=parser)
    assert len(manager.train_dataset) == 10
    assert names(manager.eval_dataset._dataparser_outputs) == numbers(0, 3, 6, 9)
    torch.testing.assert_close(
        manager.eval_dataset.cameras.camera_to_worlds,
        manager.train_dataset.cameras.camera_to_worlds[[0, 3, 6, 9]],
    )
    assert "no photos for evaluation; expected some to measure" in unwrapped(capsys)
    _, batch = manager.next_eval(0)
    assert len(batch["image"]) == 32
    camera, batch = manager.next_eval_image(0)
    assert batch["image"].shape == (HEIGHT, WIDTH, 3) and len(camera) == 1


def test_training_views_stand_in_where_evaluation_photos_are_missing(folder):
    (evaluation,) = parsed(folder, "val").image_filenames
    evaluation.unlink()
    manager = make_manager(folder)
    assert len(manager.train_dataset) == 9 and len(manager.eval_dataset) == 4
    assert set(names(manager.eval_dataset._dataparser_outputs)) <= set(
        names(manager.train_dataparser_outputs)
    )


def test_no_photos_for_evaluation_is_no_fatal_fault(folder):
    outputs = parsed(folder, "val", train_split_fraction=1.0)
    assert mend(outputs, "val") == (outputs, [])
    found = fault(find_faults(outputs, "val"), "empty")
    assert not found.is_fatal
    assert fault(mend(outputs, "train")[1], "empty").is_fatal


def test_evaluation_is_not_blamed_for_being_small(folder):
    assert find_faults(parsed(folder, "val"), "val") == []


# --- the data manager -----------------------------------------------------------------------------


def unwrapped(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_faults_are_said_once(folder, capsys):
    for name in numbers(1, 2):
        (folder / "images" / name).unlink()
    manager = make_manager(folder)
    manager.dataparser.get_dataparser_outputs(split="train")
    said = unwrapped(capsys)
    assert (
        said.count("photos or masks that are not there: 2 of 9 for training, as 01.png, 02.png")
        == 1
    )
    assert said.count("expected at least 8") == 1


def test_draws_depend_on_the_seed_alone(folder):
    batches = []
    for drawn in (1, 2):
        random.seed(drawn)
        batches.append(make_manager(folder).next_train(5)[1])
    assert torch.equal(batches[0]["indices"], batches[1]["indices"])


def test_brackets_in_names_are_said_as_they_are(tmp_path, capsys):
    folder = write_capture(tmp_path / "a [bold] capture")
    (folder / "images/01.png").unlink()
    make_manager(folder)
    assert "a [bold] capture" in unwrapped(capsys)


def test_nerfstudio_scripts_find_mended_views_too(folder):
    (folder / "images/01.png").unlink()
    manager = make_manager(folder)
    again = manager.dataparser.get_dataparser_outputs(split="train")
    assert names(again) == names(manager.train_dataparser_outputs)
    assert "01.png" not in names(again)


def test_through_a_symlink(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    (folder / "images/01.png").unlink()
    (folder / "images/02.png").rename(tmp_path / "elsewhere.png")
    (folder / "images/02.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "images/03.png").unlink()
    (folder / "images/03.png").symlink_to(tmp_path / "nowhere.png")
    manager = make_manager(tmp_path / "link")
    outputs = manager.train_dataparser_outputs
    assert "02.png" in names(outputs) and not {"01.png", "03.png"} & set(names(outputs))
    assert outputs.image_filenames[0].parent == tmp_path / "link/images"
    assert_pixels_are_the_photos(manager)


def test_nothing_is_written_into_the_capture(folder):
    """Even where it could be, as for an administrator."""
    (folder / "images/01.png").unlink()
    Image.fromarray(pixels(2).repeat(2, axis=0).repeat(2, axis=1)).save(folder / "images/02.png")

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}

    before = state()
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        manager = make_manager(folder)
        manager.next_train(0)
        manager.next_eval(0)
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert state() == before


# --- training -------------------------------------------------------------------------------------


def test_ns_train_on_a_nasty_capture(folder, tmp_path):
    for name in numbers(0, 3):
        (folder / "images" / name).unlink()
    Image.fromarray(pixels(1)).convert("L").save(folder / "images/01.png")
    Image.fromarray(pixels(2)).quantize(64).save(folder / "images/02.png")
    Image.fromarray(pixels(5).repeat(2, axis=0).repeat(2, axis=1)).save(folder / "images/05.png")

    def spoil(matrix):
        matrix[0, 0] = np.nan
        return matrix

    edit_pose(folder, 6, spoil)
    arguments = f"""
        masked-wavelet --output-dir {tmp_path} --experiment-name e --timestamp t
        --max-num-iterations 3 --steps-per-save 100 --vis tensorboard --machine.device-type cpu
        --steps-per-eval-batch 2 --steps-per-eval-image 2 --steps-per-eval-all-images 2
        --pipeline.datamanager.train-num-rays-per-batch 64
        --pipeline.datamanager.eval-num-rays-per-batch 64
        --pipeline.model.initial-resolution 8 --pipeline.model.final-resolution 8
        --pipeline.model.levels 2 --pipeline.model.num-density-components 2
        --pipeline.model.num-appearance-components 2 --pipeline.model.hidden-dim 16
    """.split()
    finished = subprocess.run(
        [
            Path(sys.executable).with_name("ns-train"),
            *arguments,
            "nerfstudio-data",
            "--data",
            folder,
            "--train-split-fraction",
            "1.0",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        timeout=300,
    )
    said = " ".join(finished.stdout.split())
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert "not there: 2 of 10 for training, as 00.png, 03.png;" in said
    assert "mirror or stretch: 1 of 10 for training, as 06.png;" in said
    assert "another size than their cameras: 1 of 7 for training, as 05.png" in said
    assert "no photos for evaluation" in said
    run = tmp_path / "e/masked-wavelet/t"
    state = torch.load(
        run / "nerfstudio_models/step-000000002.ckpt", map_location="cpu", weights_only=True
    )
    assert state["step"] == 2
    weights = {name: value for name, value in state["pipeline"].items() if ".field." in name}
    assert len(weights) > 10 and all(torch.isfinite(value).all() for value in weights.values())
