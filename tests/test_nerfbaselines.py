"""As nerfbaselines runs it: the capture written of its data, training, checkpoints, rendering.

The harness itself is not among the development requirements, for its OpenCV would overwrite
nerfstudio's; ``pip install --no-deps nerfbaselines plyfile`` gets it without. Where it is missing,
cameras of the same shape stand for its own, and only what its registry and its classes do is left
out.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras as NerfstudioCameras
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils import writer
from PIL import Image

from masked_wavelet_nerf.datasets.sample import write_sample_capture
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.loading import load_scene
from masked_wavelet_nerf.nerfbaselines_capture import to_opengl, write_capture
from masked_wavelet_nerf.nerfbaselines_method import HarnessError, NerfbaselinesMethod
from masked_wavelet_nerf.presets import tomllib

SIZE = 24
STEPS = 40
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("nerfbaselines") is None,
    reason="nerfbaselines is not installed: pip install --no-deps nerfbaselines plyfile",
)

SETTINGS = {
    # As --set gives them, and as presets do.
    "method": "masked-wavelet-bounded",
    "max_num_iterations": str(STEPS),
    "pipeline.datamanager.train_num_rays_per_batch": "128",
    "pipeline.model.upsample_steps": "12 20",
    "pipeline.model.occupancy_steps": [30],
    "pipeline.model.occupancy_threshold": 0.2,
    "pipeline.model.initial_resolution": 10,
    "pipeline.model.final_resolution": 20,
    "pipeline.model.num_density_components": 3,
    "pipeline.model.num_appearance_components": 4,
    "pipeline.model.levels": 2,
    "pipeline.model.hidden_dim": 16,
    "pipeline.model.density_shift": -3.0,
    "optimizers.grids.optimizer.lr": "0.1",
    "machine.device_type": "cpu",
}


@dataclasses.dataclass(frozen=True)
class PlainCameras:
    """Cameras with the harness's names and shapes."""

    poses: np.ndarray
    intrinsics: np.ndarray
    image_sizes: np.ndarray

    def item(self) -> PlainCameras:
        return self

    def __getitem__(self, index: int) -> PlainCameras:
        return PlainCameras(self.poses[index], self.intrinsics[index], self.image_sizes[index])


def sample_dataset(capture: Path, split: str = "train") -> dict:
    """The sample capture as the harness's own loader of Blender scenes returns it."""
    meta = json.loads((capture / f"transforms_{split}.json").read_text())
    poses = np.array([frame["transform_matrix"] for frame in meta["frames"]], np.float32)[:, :3]
    poses[..., 1:3] *= -1  # right, down, forward
    paths = [capture / f"{frame['file_path']}.png" for frame in meta["frames"]]
    focal = 0.5 * SIZE / math.tan(0.5 * meta["camera_angle_x"])
    count = len(paths)
    return {
        "cameras": PlainCameras(
            poses,
            np.tile(np.array([focal, focal, SIZE / 2, SIZE / 2], np.float32), (count, 1)),
            np.full((count, 2), SIZE, np.int32),
        ),
        "images": [np.array(Image.open(path)) for path in paths],
        "masks": None,
        "image_paths": [str(path) for path in paths],
        "metadata": {"color_space": "srgb", "background_color": np.full(3, 255, np.uint8)},
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("harness") / "capture"
    return sample_dataset(
        write_sample_capture(folder, image_size=SIZE, num_train=12, num_val=1, num_test=1)
    )


@pytest.fixture(scope="module")
def trained(dataset) -> NerfbaselinesMethod:
    method = NerfbaselinesMethod(train_dataset=dataset, config_overrides=SETTINGS)
    for step in range(STEPS):
        metrics = method.train_iteration(step)
    assert metrics["num_rays"] == 128 and math.isfinite(metrics["loss"])
    return method


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "checkpoint"
    trained.save(str(folder))
    return folder


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(float) - other) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def on_white(photo: np.ndarray) -> np.ndarray:
    photo = photo / 255.0
    return photo[..., :3] * photo[..., 3:] + 1 - photo[..., 3:]


# --- the capture ----------------------------------------------------------------------------------


def test_poses_and_photos_come_back_from_nerfstudios_parser(dataset, tmp_path):
    cameras = dataset["cameras"]
    write_capture(
        tmp_path,
        poses=cameras.poses,
        intrinsics=cameras.intrinsics,
        sizes=cameras.image_sizes,
        photos=dataset["images"],
    )
    parser = NerfstudioDataParserConfig(
        data=tmp_path, orientation_method="none", center_method="none", auto_scale_poses=False
    ).setup()
    outputs = parser.get_dataparser_outputs("train")
    # The sample capture's own numbers: its poses are right, up, backward.
    capture = Path(dataset["image_paths"][0]).parents[1]
    meta = json.loads((capture / "transforms_train.json").read_text())
    stored = np.array([frame["transform_matrix"] for frame in meta["frames"]])[:, :3]
    np.testing.assert_allclose(outputs.cameras.camera_to_worlds.numpy(), stored, atol=1e-6)
    assert len(parser.get_dataparser_outputs("test").image_filenames) == 1
    for path, photo in zip(outputs.image_filenames, dataset["images"], strict=True):
        np.testing.assert_array_equal(np.array(Image.open(path)), photo)


def test_every_view_keeps_its_own_size_mask_and_intrinsics(tmp_path):
    rng = np.random.default_rng(0)
    sizes = np.array([[7, 5], [4, 6]], np.int32)
    photos = [rng.random((6, 7, 3), np.float32) for _ in sizes]  # padded to the largest
    masks = [rng.random((6, 7)) < 0.5 for _ in sizes]
    intrinsics = np.array([[9, 8, 3.5, 2.5], [6, 7, 2, 3]], np.float32)
    poses = np.tile(np.eye(4, dtype=np.float32)[:3], (2, 1, 1))
    write_capture(
        tmp_path, poses=poses, intrinsics=intrinsics, sizes=sizes, photos=photos, masks=masks
    )
    parser = NerfstudioDataParserConfig(data=tmp_path, auto_scale_poses=False).setup()
    outputs = parser.get_dataparser_outputs("train")
    cameras = outputs.cameras
    found = torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=1)
    np.testing.assert_array_equal(found.numpy(), intrinsics)
    assert outputs.mask_filenames is not None
    for index, (width, height) in enumerate(sizes):
        photo = np.array(Image.open(outputs.image_filenames[index]))
        expected = 255 * photos[index][:height, :width]
        np.testing.assert_allclose(photo, expected, atol=0.5 + 1e-3)
        mask = np.array(Image.open(outputs.mask_filenames[index]))
        np.testing.assert_array_equal(mask == 255, masks[index][:height, :width])
        assert ((mask == 0) | (mask == 255)).all()


def test_conventions_differ_by_half_a_turn_about_x():
    pose = np.arange(12, dtype=np.float32).reshape(3, 4)
    turned = to_opengl(pose)
    np.testing.assert_array_equal(turned[:, 0], pose[:, 0])
    np.testing.assert_array_equal(turned[:, 1:3], -pose[:, 1:3])
    np.testing.assert_array_equal(turned[:, 3], pose[:, 3])
    np.testing.assert_array_equal(to_opengl(turned[None]), pose[None])


# --- training, saving, rendering ------------------------------------------------------------------


def test_views_resemble_their_own_photos_most(trained, dataset):
    views = [0, 3, 6, 9]
    renders = [trained.render(dataset["cameras"][view])["color"] for view in views]
    assert renders[0].shape == (SIZE, SIZE, 3) and renders[0].dtype == np.float32
    for index, view in enumerate(views):
        photo = on_white(dataset["images"][view])
        similar = [psnr(render, photo) for render in renders]
        assert int(np.argmax(similar)) == index, similar


def test_loaded_without_photos_it_renders_what_was_trained(trained, checkpoint, dataset):
    loaded = NerfbaselinesMethod(checkpoint=str(checkpoint))
    for view in (0, 5):
        camera = dataset["cameras"][view]
        ours, theirs = loaded.render(camera), trained.render(camera)
        assert psnr(ours["color"], theirs["color"]) >= 50
        assert ours["depth"].shape == theirs["depth"].shape == (SIZE, SIZE)
        # ... and that is what nerfstudio's own evaluation of the model shows.
        model = trained._trainer.pipeline.model.eval()
        fx, fy, cx, cy = camera.intrinsics.tolist()
        pose = torch.from_numpy(to_opengl(camera.poses))
        pinhole = NerfstudioCameras(pose[None], fx, fy, cx, cy, width=SIZE, height=SIZE)
        outputs = model.get_outputs_for_camera(pinhole)
        assert psnr(ours["color"], outputs["rgb"].numpy()) >= 50
    info = loaded.get_info()
    assert info["loaded_step"] == info["num_iterations"] == STEPS
    assert info["loaded_checkpoint"] == str(checkpoint)
    assert info["hparams"]["pipeline.model.levels"] == 2
    with pytest.raises(HarnessError, match="no photos to train on"):
        loaded.train_iteration(STEPS)


def test_checkpoint_holds_the_file_and_saves_again(checkpoint, tmp_path):
    assert len(load_scene(checkpoint / "scene.mwnf").cameras) == 13  # 12, and one for evaluation
    again = tmp_path / "again"
    NerfbaselinesMethod(checkpoint=str(checkpoint)).save(str(again))
    files = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*"))
    assert files == sorted(path.relative_to(again) for path in again.rglob("*"))
    assert (again / "scene.mwnf").read_bytes() == (checkpoint / "scene.mwnf").read_bytes()


def test_training_goes_on_from_a_checkpoint(checkpoint, trained, dataset, tmp_path):
    more = {"max_num_iterations": STEPS + 1}
    resumed = NerfbaselinesMethod(
        checkpoint=str(checkpoint), train_dataset=dataset, config_overrides=more
    )
    assert resumed.get_info()["loaded_step"] == STEPS
    camera = dataset["cameras"][0]
    assert psnr(resumed.render(camera)["color"], trained.render(camera)["color"]) >= 50
    resumed.train_iteration(STEPS)
    resumed.save(str(tmp_path / "later"))
    info = NerfbaselinesMethod(checkpoint=str(tmp_path / "later")).get_info()
    assert info["loaded_step"] == info["num_iterations"] == STEPS + 1


def test_unbounded_scenes_are_rendered_in_their_own_coordinates(dataset, tmp_path):
    # Far off the origin, turned and large: nerfstudio's parser brings it to where it trains.
    turn, shift, scale = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0], 50.0, 7.0
    turn *= np.sign(np.linalg.det(turn))
    cameras = dataset["cameras"]
    poses = (turn @ cameras.poses).astype(np.float32)
    poses[..., 3] = scale * poses[..., 3] + shift
    moved = dataset | {"cameras": dataclasses.replace(cameras, poses=poses)}
    settings = SETTINGS | {"method": "masked-wavelet", "pipeline.model.hidden_dim": 8}
    method = NerfbaselinesMethod(train_dataset=moved, config_overrides=settings)
    assert method.get_info()["hparams"]["pipeline.model.background_color"] == "white"
    for step in range(2):
        method.train_iteration(step)
    shown = method.render(moved["cameras"][0])
    trainer = method._trainer
    model = trainer.pipeline.model.eval()
    outputs = model.get_outputs_for_camera(trainer.pipeline.datamanager.train_dataset.cameras[0:1])
    assert psnr(shown["color"], outputs["rgb"].numpy()) >= 50
    unit = float(trainer.pipeline.datamanager.train_dataparser_outputs.dataparser_scale)
    assert unit < 0.2
    np.testing.assert_allclose(shown["depth"], outputs["depth"][..., 0].numpy() / unit, rtol=1e-2)


def test_saved_before_its_first_step_it_can_be_loaded_and_trained(dataset, tmp_path):
    known = list(writer.EVENT_WRITERS)
    NerfbaselinesMethod(train_dataset=dataset, config_overrides=SETTINGS).save(str(tmp_path))
    assert known == writer.EVENT_WRITERS  # else later trainings write into a folder that is gone
    assert not (tmp_path / "nerfstudio_models").exists()
    resumed = NerfbaselinesMethod(checkpoint=str(tmp_path), train_dataset=dataset)
    assert resumed.get_info()["loaded_step"] == 0
    assert math.isfinite(resumed.train_iteration(0)["loss"])


# --- what users get wrong -------------------------------------------------------------------------


def test_neither_checkpoint_nor_data():
    with pytest.raises(HarnessError, match="expected a checkpoint, a train_dataset or both"):
        NerfbaselinesMethod()


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"steps": "x", "flags": {}}', "[]"])
def test_folder_that_is_no_checkpoint(tmp_path, content):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(HarnessError, match=r"settings.json: cannot be read .* check the path"):
        NerfbaselinesMethod(checkpoint=str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [{"pipeline.model.levls": 2}, {"pipeline.model.levels": "many"}, {"method": "nerfacto"}],
)
def test_settings_that_are_none(dataset, wrong, capsys):
    with pytest.raises(UserError, match=r"expected flags of ns-train|not a method of this package"):
        NerfbaselinesMethod(train_dataset=dataset, config_overrides=wrong)


def test_linear_photos_are_refused(dataset):
    linear = dataset | {"metadata": {"color_space": "linear"}}
    with pytest.raises(HarnessError, match="linear colours; expected srgb"):
        NerfbaselinesMethod(train_dataset=linear, config_overrides=SETTINGS)


# --- the registry ---------------------------------------------------------------------------------


def test_entry_point_registers_a_spec_whose_class_is_there(monkeypatch):
    registered = []
    stub = ModuleType("nerfbaselines")
    stub.register, stub.MethodSpec = registered.append, dict
    monkeypatch.setitem(sys.modules, "nerfbaselines", stub)
    monkeypatch.delitem(sys.modules, "masked_wavelet_nerf.nerfbaselines_spec", raising=False)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module = project["entry-points"]["nerfbaselines.specs"]["masked-wavelet"]
    importlib.import_module(module)
    sys.modules.pop(module)  # for the harness itself is to have it registered, too
    (spec,) = registered
    assert spec["id"] == NerfbaselinesMethod.get_method_info()["method_id"] == "masked-wavelet"
    name, of = spec["method_class"].split(":")
    assert getattr(importlib.import_module(name), of) is NerfbaselinesMethod
    blender = spec["presets"]["blender"]
    assert blender["@apply"] == [{"dataset": "blender"}]
    assert blender["method"] == "masked-wavelet-bounded"


def test_only_the_spec_imports_the_harness_and_nothing_the_spec():
    package = Path(__file__).parents[1] / "masked_wavelet_nerf"
    for path in sorted(package.rglob("*.py")):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text("utf8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        assert "masked_wavelet_nerf.nerfbaselines_spec" not in imported, path
        if path.name != "nerfbaselines_spec.py":
            assert not [name for name in imported if name.split(".")[0] == "nerfbaselines"], path


@needs_harness
def test_the_harness_finds_and_runs_it(dataset, checkpoint, trained, tmp_path):
    import nerfbaselines
    from nerfbaselines.datasets import dataset_index_select
    from nerfbaselines.training import get_presets_and_config_overrides

    spec = nerfbaselines.get_method_spec("masked-wavelet")
    _, settings = get_presets_and_config_overrides(spec, {"id": "blender"})
    assert settings == {"method": "masked-wavelet-bounded"}
    _, settings = get_presets_and_config_overrides(spec, {"id": "mipnerf360"})
    assert settings == {}
    plain = dataset["cameras"]
    cameras = nerfbaselines.new_cameras(
        poses=plain.poses,
        intrinsics=plain.intrinsics,
        image_sizes=plain.image_sizes,
        camera_models=np.zeros(len(plain.poses), np.int32),
    )
    whole = nerfbaselines.new_dataset(
        cameras=cameras,
        image_paths=dataset["image_paths"],
        images=dataset["images"],
        metadata=dataset["metadata"],
    )
    few = dataset_index_select(whole, list(range(4)))
    with nerfbaselines.build_method_class(spec, "python") as method_class:
        method = method_class(train_dataset=few, config_overrides=SETTINGS)
        assert isinstance(method, nerfbaselines.Method)
        assert math.isfinite(method.train_iteration(0)["loss"])
        loaded = method_class(checkpoint=str(checkpoint))
    assert loaded.get_info()["method_id"] == "masked-wavelet"
    color = loaded.render(cameras[2])["color"]
    assert psnr(color, trained.render(plain[2])["color"]) >= 50
    # As its commands open a checkpoint, which has the harness's own notes beside ours.
    noted = shutil.copytree(checkpoint, tmp_path / "noted")
    (noted / "nb-info.json").write_text(json.dumps({"method": "masked-wavelet"}))
    with nerfbaselines.load_checkpoint(str(noted), backend="python") as (opened, _):
        assert psnr(opened.render(cameras[2])["color"], color) >= 50
