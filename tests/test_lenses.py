"""Lenses that nerfstudio knows, from transforms.json to the decoded file; OpenCV as reference."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

import masked_wavelet_codec as codec
from masked_wavelet_nerf.coverage import measure
from masked_wavelet_nerf.datasets.lighthouse import shade
from masked_wavelet_nerf.datasets.sample import look_at_origin
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.region import region_of_interest
from masked_wavelet_nerf.runs import evaluate, open_run, write_run

WIDTH, HEIGHT, NUM_VIEWS = 24, 20, 12
LENSES = {
    "OPENCV": {"fl_x": 22.0, "fl_y": 21.0, "k1": -0.12, "k2": 0.03, "p1": 0.004, "p2": -0.006},
    "OPENCV_FISHEYE": {
        "fl_x": 14.0,
        "fl_y": 13.0,
        "k1": 0.05,
        "k2": -0.01,
        "k3": 0.004,
        "k4": -0.002,
    },
    "EQUIRECTANGULAR": {"fl_x": WIDTH / 2, "fl_y": float(HEIGHT)},
}
CENTRE = {"cx": 12.5, "cy": 9.75}
TYPES = {
    "OPENCV": CameraType.PERSPECTIVE,
    "OPENCV_FISHEYE": CameraType.FISHEYE,
    "EQUIRECTANGULAR": CameraType.EQUIRECTANGULAR,
}


def directions_of_pixels(lens: str) -> np.ndarray:
    """(H, W, 3) unit vectors, x right, y up, z backward, through the middles of pixels."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    numbers = LENSES[lens]
    if lens == "EQUIRECTANGULAR":
        azimuth = (x - CENTRE["cx"]) / WIDTH * 2 * np.pi  # to the right of the optical axis
        elevation = -(y - CENTRE["cy"]) / HEIGHT * np.pi
        parts = (
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
            -np.cos(elevation) * np.cos(azimuth),
        )
        return np.stack(parts, axis=-1)
    matrix = np.array(
        [[numbers["fl_x"], 0, CENTRE["cx"]], [0, numbers["fl_y"], CENTRE["cy"]], [0, 0, 1]]
    )
    pixels = np.stack((x, y), axis=-1).reshape(-1, 1, 2)
    names = ("k1", "k2", "k3", "k4") if lens == "OPENCV_FISHEYE" else ("k1", "k2", "p1", "p2")
    distortion = np.array([numbers[name] for name in names])
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-12)
    if lens == "OPENCV_FISHEYE":
        flat = cv2.fisheye.undistortPoints(pixels, matrix, distortion, criteria=criteria)
    else:
        same = np.eye(3)
        flat = cv2.undistortPointsIter(pixels, matrix, distortion, same, same, criteria)
    flat = flat.reshape(HEIGHT, WIDTH, 2)
    found = np.stack((flat[..., 0], -flat[..., 1], -np.ones_like(x)), axis=-1)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@pytest.fixture(scope="module", params=list(LENSES))
def lens(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(lens, tmp_path_factory):
    """The lighthouse through that lens, on a grey ground, for nerfstudio-data."""
    capture = tmp_path_factory.mktemp(lens.lower())
    (capture / "images").mkdir()
    frames = []
    for view in range(NUM_VIEWS):
        pose = look_at_origin(2 * np.pi * view / NUM_VIEWS, 0.2 + 0.05 * view, radius=2.5)
        directions = directions_of_pixels(lens).reshape(-1, 3) @ pose[:3, :3].T
        colours, is_hit = shade(np.broadcast_to(pose[:3, 3], directions.shape), directions)
        colours[~is_hit] = 0.5
        pixels = (255 * colours.reshape(HEIGHT, WIDTH, 3)).round().astype(np.uint8)
        Image.fromarray(pixels).save(capture / "images" / f"{view}.png")
        frames.append(
            {"file_path": f"images/{view}.png", "transform_matrix": np.asarray(pose).tolist()}
        )
    meta = {"camera_model": lens, "w": WIDTH, "h": HEIGHT, **CENTRE, **LENSES[lens]}
    (capture / "transforms.json").write_text(json.dumps({**meta, "frames": frames}))
    return capture


@pytest.fixture
def trained(tiny_config, train, folder):
    config = tiny_config(method="masked_wavelet", steps=20)
    manager = config.pipeline.datamanager
    manager.dataparser = NerfstudioDataParserConfig(data=folder)
    manager.data = folder
    trainer, losses = train(config)
    trainer.save_checkpoint(19)
    config.save_config()
    return trainer, losses, config


def test_rays_of_training_and_pictures_of_the_decoded_file(lens, trained, folder, tmp_path):
    trainer, losses, config = trained
    manager = trainer.pipeline.datamanager
    cameras = manager.train_dataset.cameras
    expected = torch.from_numpy(directions_of_pixels(lens)).float()
    for step in range(2):
        rays, batch = manager.next_train(step)
        view, row, column = batch["indices"].unbind(dim=-1)
        rotation = cameras.camera_to_worlds[view, :3, :3]
        local = torch.einsum("nji,nj->ni", rotation, rays.directions)
        torch.testing.assert_close(local, expected[row, column], atol=2e-4, rtol=0)
    assert min(list(losses.values())[-4:]) < losses[0]

    run = open_run(config.get_base_dir() / "config.yml", folder)
    before = evaluate(run.pipeline)
    path, _ = export_run(run, tmp_path / "a.mwnf", psnr=before.psnr)
    scene = codec.read(path)
    assert set(scene.cameras.camera_type.tolist()) == {TYPES[lens].value}
    kept = torch.from_numpy(scene.cameras.distortion[: len(cameras)])
    if lens == "EQUIRECTANGULAR":
        assert not kept.any()
    else:
        torch.testing.assert_close(kept, cameras.distortion_params)
    after = evaluate(open_run(write_run(scene, tmp_path / "decoded", folder), folder).pipeline)
    assert after.psnr == pytest.approx(before.psnr, abs=0.01)


def test_lenses_without_a_place_in_the_file_leave_the_scene_without_cameras(
    tiny_config, start, tmp_path, capsys
):
    config = tiny_config(method="masked_wavelet", steps=1)
    trainer = start(config)
    trainer.save_checkpoint(0)
    config.save_config()
    run = open_run(config.get_base_dir() / "config.yml", config.pipeline.datamanager.data)
    run.pipeline.datamanager.train_dataset.cameras.distortion_params = torch.zeros(8, 12)
    path, _ = export_run(run, tmp_path / "a.mwnf", psnr=None)
    assert codec.read(path).cameras is None
    said = " ".join(capsys.readouterr().out.split())
    assert "without cameras: a file holds lenses of 6 distortion parameters, these have 12" in said


def test_cameras_that_see_all_around_point_nowhere():
    poses = np.stack([look_at_origin(angle, 0.3) for angle in np.arange(8) * np.pi / 4])[:, :3]
    default = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]])
    layouts = {CameraType.FISHEYE: "inward", CameraType.EQUIRECTANGULAR: "outward"}
    for model, layout in layouts.items():
        cameras = Cameras(
            torch.from_numpy(poses).float(), 12.0, 20.0, 12.0, 10.0, camera_type=model
        )
        assert measure(cameras).layout == layout
        found = region_of_interest(cameras, default)
        assert torch.equal(found, default) == (layout == "outward")
