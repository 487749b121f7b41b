"""Files in place of a capture, and captures in a file's coordinates."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_tiny_config
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from scipy.spatial.transform import Rotation
from test_captures import edit_pose, write_capture, write_json
from test_dataparsers import llff_rows, write_llff

import masked_wavelet_codec as codec
from masked_wavelet_nerf.captures import parse
from masked_wavelet_nerf.datamanager import WaveletDataManager, WaveletDataManagerConfig
from masked_wavelet_nerf.dataparsers.captures import CaptureError, MissingCaptureError
from masked_wavelet_nerf.dataparsers.llff import LLFFDataParserConfig
from masked_wavelet_nerf.errors import FatalError, RefusedFileError
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.ndc import find_forward_facing
from masked_wavelet_nerf.runs import Run, evaluate, open_run, write_run
from masked_wavelet_nerf.stored_capture import (
    CamerasOnlyDataset,
    StoredCapture,
    read_stored_capture,
    without_coefficients,
)
from masked_wavelet_nerf.trainer import TrainingError

KINDS = ("bounded", "contracted", "forward-facing")
FOLDER = "where-the-photos-are"
"""Of captures: a name that is nowhere else."""


# --- trained runs ---------------------------------------------------------------------------------


def make_config(kind: str, capture: Path, output_dir: Path, name: str = "run", **model: Any):
    """A trainer configuration that trains in a second; the capture's parser fits its kind."""
    method = "masked_wavelet_bounded" if kind == "bounded" else "masked_wavelet"
    settings = {"final_resolution": 16, "upsample_steps": (8,), **model}
    config = make_tiny_config(capture, output_dir, name, method=method, **settings)
    if kind == "forward-facing":
        config.pipeline.datamanager.dataparser = LLFFDataParserConfig(data=capture)
    return config


def set_up(config, test_mode: str = "test"):
    """A trainer, as ns-train makes it: the configuration is saved before all else."""
    config.save_config()
    random.seed(config.machine.seed)
    np.random.seed(config.machine.seed)
    torch.manual_seed(config.machine.seed)
    trainer = config.setup()
    trainer.setup(test_mode)
    return trainer


def copy_capture(kind: str, sample: Path, folder: Path) -> Path:
    """The sample, or a forward-facing capture whose photos show something."""
    if kind != "forward-facing":
        return shutil.copytree(sample, folder)
    write_llff(folder)
    y, x = np.mgrid[:8, :12]
    for view, path in enumerate(sorted((folder / "images_4").iterdir())):
        pixels = np.stack([20 * x, 30 * y, 25 * view + 0 * x], axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


class Trained(NamedTuple):
    kind: str
    capture: Path
    config: Path
    run: Run
    """Opened with the capture."""
    path: Path
    """Its file."""

    @property
    def scene(self) -> codec.Scene:
        return codec.read(self.path)

    @property
    def manager(self) -> Any:
        assert self.run.pipeline is not None
        return self.run.pipeline.datamanager


def train_run(kind: str, sample: Path, folder: Path, **model: Any) -> Trained:
    """Trains, saves, opens and exports."""
    capture = copy_capture(kind, sample, folder / FOLDER)
    config = make_config(kind, capture, folder, **model)
    trainer = set_up(config)
    trainer.train()
    run = open_run(config.get_base_dir() / "config.yml")
    path, _ = export_run(
        run, folder / "scene.mwnf", psnr=12.3456, notes={"author": "A. N.", "licence": "CC0"}
    )
    return Trained(kind, capture, config.get_base_dir() / "config.yml", run, path)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, capture, tmp_path_factory) -> Trained:
    return train_run(request.param, capture, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def decoded(trained, tmp_path_factory) -> Path:
    """config.yml of a run that was decoded without the capture; not to be changed."""
    return write_run(trained.scene, tmp_path_factory.mktemp("decoded") / "run")


def opened(load_config: Path, test_mode: Any = "test") -> tuple[Any, Any]:
    """Configuration and pipeline, as nerfstudio's commands open them."""
    config, pipeline, _, _ = eval_setup(load_config, test_mode=test_mode)
    return config, pipeline


ROUNDED = 1e-5
"""What an element of a pose moves by when it is stored: see ``masked_wavelet_codec.poses``."""


def assert_same_cameras(found: Cameras, expected: Cameras, moved: float = 0.0) -> None:
    """Bit for bit in float32, but for what poses moved; no distortion is one of zeros."""
    poses = (found.camera_to_worlds.float(), expected.camera_to_worlds.float())
    torch.testing.assert_close(*poses, rtol=0, atol=moved)
    for name in ("fx", "fy", "cx", "cy"):
        assert torch.equal(getattr(found, name).float(), getattr(expected, name).float()), name
    for name in ("width", "height", "camera_type"):
        assert getattr(found, name).dtype == torch.int64, name
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    one, other = (
        torch.zeros(len(c), 6) if c.distortion_params is None else c.distortion_params
        for c in (found, expected)
    )
    assert torch.equal(one, other)


def picture(model, camera: Cameras) -> torch.Tensor:
    return model.eval().get_outputs_for_camera(camera)["rgb"]


@pytest.mark.parametrize("test_mode", ["test", "inference"])
def test_a_decoded_run_stands_for_the_original(trained, decoded, test_mode):
    _, pipeline = opened(decoded, test_mode)
    manager, original = pipeline.datamanager, trained.manager
    assert not manager.has_photos
    for split in ("train_dataset", "eval_dataset"):
        found, expected = (getattr(m, split).cameras for m in (manager, original))
        assert_same_cameras(found, expected, moved=ROUNDED)
        assert not torch.equal(found.camera_to_worlds, expected.camera_to_worlds)
    outputs, expected = manager.train_dataparser_outputs, original.train_dataparser_outputs
    assert torch.equal(outputs.dataparser_transform, expected.dataparser_transform)
    assert outputs.dataparser_scale == pytest.approx(expected.dataparser_scale, rel=0, abs=0)
    for view in range(len(original.eval_dataset)):
        camera = original.eval_dataset.cameras[view : view + 1]
        shown, true = picture(pipeline.model, camera), picture(trained.run.model, camera)
        assert float((shown - true).square().mean()) < 1e-5  # 50 dB
        assert float(true.std()) > 0.01


def test_a_decoded_run_names_no_place_of_the_photos(trained, decoded):
    files = [path for path in decoded.parent.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.yml", "cameras.mwnf"}
    assert any(path.suffix == ".ckpt" for path in files)
    names = (FOLDER, trained.path.parent.name)
    assert all(name in trained.config.read_text() for name in names)  # as they would be found
    for path in files:
        content = path.read_bytes()
        for name in names:
            assert name.encode() not in content, path.name
    stored = codec.read(decoded.parent / "cameras.mwnf")
    assert not any(name in json.dumps(stored.meta) for name in names)
    assert stored.grids == () and stored.networks == {} and stored.occupancy is None


def test_exporting_a_decoded_run_gives_the_file_again(trained, decoded, tmp_path):
    run = open_run(decoded)
    assert run.pipeline is not None and run.measurable is None
    assert trained.run.measurable is trained.run.pipeline
    again = codec.read(export_run(run, tmp_path / "again.mwnf")[0])
    scene = trained.scene
    assert scene.cameras is not None and {0, 1} == set(scene.cameras.split.tolist())
    assert again.meta["psnr"] == 12.3456
    assert again.meta["author"] == "A. N." and again.meta["licence"] == "CC0"
    assert again.meta["dataparser"] == scene.meta["dataparser"]
    assert again.meta == scene.meta
    assert codec.equal(again, scene)
    noted = run.scene({"author": "B", "psnr": 1.0})
    assert noted.meta["author"] == "B" and noted.meta["psnr"] == 1.0
    assert noted.meta["licence"] == "CC0"


def test_with_the_capture_a_decoded_run_measures_the_same(trained, decoded, tmp_path):
    config = write_run(trained.scene, tmp_path / "run", data=trained.capture)
    for run in (open_run(config), open_run(decoded, trained.capture)):
        assert run.measurable is not None
        manager: Any = run.measurable.datamanager
        assert_same_cameras(manager.eval_dataset.cameras, trained.manager.eval_dataset.cameras)
        again = run.scene({"psnr": 12.3456, "author": "A. N.", "licence": "CC0"})
        assert codec.equal(again, trained.scene)
        for view in (0, len(manager.eval_dataset) - 1):
            photos = (m.eval_dataset[view]["image"] for m in (manager, trained.manager))
            assert torch.equal(*photos)
    before = evaluate(trained.run.pipeline)
    assert evaluate(run.measurable).psnr == pytest.approx(before.psnr, abs=1e-3)


def test_ns_eval_on_a_decoded_run_asks_for_the_capture(decoded):
    _, pipeline = opened(decoded)
    with pytest.raises(FatalError, match="--data CAPTURE") as raised:
        pipeline.get_average_eval_image_metrics()
    assert isinstance(raised.value, SystemExit) and "--data" in str(raised.value.code)


def test_training_on_a_decoded_run_is_refused(decoded):
    with pytest.raises(MissingCaptureError, match=r"no photos to train on.*--data"):
        opened(decoded, "val")


@pytest.fixture(scope="module")
def bounded(capture, tmp_path_factory) -> Trained:
    return train_run("bounded", capture, tmp_path_factory.mktemp("bounded"))


def test_a_parser_that_is_not_installed_matters_with_a_capture_alone(bounded, tmp_path):
    scene = bounded.scene
    scene.meta["dataparser"]["name"] = "no-such-data"
    with pytest.raises(codec.CodecError, match="data parser 'no-such-data' is not installed"):
        write_run(scene, tmp_path / "with", data=bounded.capture)
    _, pipeline = opened(write_run(scene, tmp_path / "without"))
    camera = pipeline.datamanager.eval_dataset.cameras[0:1]
    torch.testing.assert_close(
        picture(pipeline.model, camera), picture(bounded.run.model, camera), atol=1e-4, rtol=0
    )
    again = open_run(tmp_path / "without" / "config.yml").scene({})
    assert again.meta["dataparser"]["name"] == "no-such-data"


def test_any_cameras_survive_decoding(bounded, tmp_path):
    """Of several sizes, kinds and lenses."""
    cameras = some_cameras(
        width=np.array([9, 12, 7, 30, 16], np.int32),
        height=np.array([8, 5, 21, 6, 16], np.int32),
        camera_type=np.array([1, 2, 1, 2, 1], np.int32),
        distortion=np.linspace(-0.05, 0.05, 30, dtype=np.float32).reshape(5, 6),
    )
    scene = dataclasses.replace(bounded.scene, cameras=cameras)
    config = write_run(scene, tmp_path / "run")
    _, pipeline = opened(config)
    manager = pipeline.datamanager
    assert_same_cameras(manager.train_dataset.cameras, as_nerfstudio(cameras, [0, 2, 3]))
    assert_same_cameras(manager.eval_dataset.cameras, as_nerfstudio(cameras, [1, 4]))
    for view, size in enumerate(((5, 12, 3), (16, 16, 3))):
        shown = picture(pipeline.model, manager.eval_dataset.cameras[view : view + 1])
        assert shown.shape == size and shown.isfinite().all()
    assert codec.equal(open_run(config).scene(scene.meta), scene)


def test_cameras_of_smaller_photos_are_scaled_once(bounded, tmp_path):
    config = make_config("bounded", bounded.capture, tmp_path)
    config.pipeline.datamanager.camera_res_scale_factor = 0.5
    set_up(config).save_checkpoint(0)
    run = open_run(config.get_base_dir() / "config.yml")
    scene = codec.read(export_run(run, tmp_path / "scene.mwnf")[0])
    assert scene.cameras is not None and (scene.cameras.width == 12).all()
    original: Any = run.pipeline
    for data in (None, bounded.capture):
        again = open_run(write_run(scene, tmp_path / "run", data))
        manager: Any = again.pipeline.datamanager if again.pipeline else None
        for name in ("train_dataset", "eval_dataset"):
            dataset, expected = (getattr(m, name) for m in (manager, original.datamanager))
            assert_same_cameras(dataset.cameras, expected.cameras, moved=ROUNDED)
            assert dataset[0]["image"].shape == (12, 12, 3)
        assert codec.equal(again.scene({}), scene)


def test_a_damaged_file_of_cameras_ends_the_command(bounded, tmp_path, capsys):
    config = write_run(bounded.scene, tmp_path / "run")
    path = tmp_path / "run" / "cameras.mwnf"
    stored = codec.read(path)
    assert stored.cameras is not None
    stored.cameras.camera_to_worlds[0, 1, 2] = np.nan
    codec.write(path, stored)
    with pytest.raises(RefusedFileError, match="cameras: one is not finite") as raised:
        opened(config)
    assert isinstance(raised.value, SystemExit) and raised.value.code == 2
    assert str(path) in capsys.readouterr().err
    path.write_bytes(b"nothing of ours")
    with pytest.raises(RefusedFileError, match="magic bytes"):
        opened(config)
    path.unlink()
    with pytest.raises(MissingCaptureError, match=r"cameras\.mwnf: no such file"):
        opened(config)


# --- what files hold ------------------------------------------------------------------------------


BOX = [[-1.0, -2.0, -3.0], [1.0, 2.0, 5.0]]


def stored(cameras: codec.Cameras | None = None, **meta: Any) -> StoredCapture:
    """Of a bounded scene, if nothing else is said."""
    meta = {"model": {"contract": False}, "box": BOX, **meta}
    return StoredCapture(codec.Scene(meta, 8, (), {}, None, cameras))


def some_cameras(**changes: Any) -> codec.Cameras:
    """Three for training and two for evaluation, in turns."""
    generator = np.random.default_rng(0)
    rotations = Rotation.random(5, np.random.default_rng(1)).as_matrix()
    positions = generator.normal(size=(5, 3, 1))
    numbers = {
        "camera_to_worlds": np.concatenate((rotations, positions), axis=2).astype(np.float32),
        "fx": generator.uniform(10, 20, 5).astype(np.float32),
        "fy": generator.uniform(10, 20, 5).astype(np.float32),
        "cx": generator.uniform(4, 6, 5).astype(np.float32),
        "cy": generator.uniform(4, 6, 5).astype(np.float32),
        "width": np.full(5, 12, np.int32),
        "height": np.full(5, 8, np.int32),
        "distortion": np.zeros((5, 6), np.float32),
        "camera_type": np.full(5, CameraType.PERSPECTIVE.value, np.int32),
        "split": np.array([0, 1, 0, 0, 1], np.uint8),
    }
    return codec.Cameras(**{**numbers, **changes})


def as_nerfstudio(cameras: codec.Cameras, views: list[int]) -> Cameras:
    """Some of them, one by one."""
    picked = {
        f.name: torch.from_numpy(np.stack([getattr(cameras, f.name)[view] for view in views]))
        for f in dataclasses.fields(cameras)
    }
    return Cameras(
        picked["camera_to_worlds"],
        picked["fx"][:, None],
        picked["fy"][:, None],
        picked["cx"][:, None],
        picked["cy"][:, None],
        picked["width"][:, None].long(),
        picked["height"][:, None].long(),
        picked["distortion"],
        picked["camera_type"][:, None].long(),
    )


def write_file(capture: StoredCapture, folder: Path) -> Path:
    path = folder / "cameras.mwnf"
    codec.write(path, capture.scene)
    return path


def manager_of(capture: StoredCapture, folder: Path, test_mode: Any = "test") -> Any:
    """Without photos."""
    path = write_file(capture, folder)
    config = WaveletDataManagerConfig(data=path, scene=path, train_num_rays_per_batch=64)
    torch.manual_seed(0)
    manager = config.setup(device="cpu", test_mode=test_mode)
    assert isinstance(manager, WaveletDataManager)
    return manager


@pytest.mark.parametrize("test_mode", ["test", "inference"])
def test_train_and_evaluation_are_told_apart(tmp_path, test_mode):
    cameras = some_cameras()
    manager = manager_of(stored(cameras), tmp_path, test_mode)
    assert_same_cameras(manager.train_dataset.cameras, as_nerfstudio(cameras, [0, 2, 3]))
    assert_same_cameras(manager.eval_dataset.cameras, as_nerfstudio(cameras, [1, 4]))
    assert manager.train_dataset.cameras.distortion_params is None
    assert len({path.name for path in manager.train_dataset.image_filenames}) == 3


@pytest.mark.parametrize("split", [0, 1])
def test_cameras_of_one_split_serve_for_both(split):
    cameras = some_cameras(split=np.full(5, split, np.uint8))
    for asked in ("train", "test"):
        found = stored(cameras).outputs(asked).cameras
        assert_same_cameras(found, as_nerfstudio(cameras, list(range(5))))
    assert (cameras.split == split).all()


def corners(box: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*box.T, indexing="ij"), dim=-1).view(-1, 3)


PROJECTION = [[2.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, -1, -2], [0, 0, -1, 0]]


@pytest.mark.parametrize(
    ("meta", "seen"),
    [
        ({}, BOX),
        # What is not contracted: half as wide, around the same middle.
        ({"model": {"contract": True}}, [[-0.5, -1.0, -1.0], [0.5, 1.0, 3.0]]),
        ({"model": {"contract": True}, "projection": PROJECTION}, [[-1.0] * 3, [1.0] * 3]),
    ],
)
@pytest.mark.parametrize("cameras", [None, "none of them"])
def test_files_without_cameras_have_one_that_sees_the_box(tmp_path, meta, seen, cameras):
    if cameras is not None:
        fields = {f.name: getattr(some_cameras(), f.name)[:0] for f in dataclasses.fields(
            codec.Cameras
        )}  # fmt: skip
        cameras = codec.Cameras(**fields)
    manager = manager_of(stored(cameras, **meta), tmp_path)
    box = torch.tensor(seen)
    torch.testing.assert_close(manager.train_dataset.scene_box.aabb, box)
    for dataset in (manager.train_dataset, manager.eval_dataset):
        assert len(dataset) == 1
        camera = dataset.cameras
        pose = camera.camera_to_worlds[0]
        torch.testing.assert_close(pose[:, :3].T @ pose[:, :3], torch.eye(3))
        assert float(torch.linalg.det(pose[:, :3])) == pytest.approx(1)
        local = (corners(box) - pose[:, 3]) @ pose[:, :3]
        assert (local[:, 2] < 0).all()
        x = camera.cx[0] - camera.fx[0] * local[:, 0] / local[:, 2]
        y = camera.cy[0] + camera.fy[0] * local[:, 1] / local[:, 2]
        for pixels, size in ((x, camera.width[0]), (y, camera.height[0])):
            assert (pixels > 0).all() and (pixels < size).all()
        assert (x.max() - x.min()) > 0.2 * camera.width[0]


def test_forward_facing_scenes_say_so():
    outputs = stored(some_cameras(), model={"contract": True}, projection=PROJECTION).outputs(
        "train"
    )
    found = outputs.metadata["forward_facing"]
    assert found.projection.tolist() == PROJECTION and found.box.tolist() == BOX
    assert "forward_facing" not in stored(some_cameras()).outputs("train").metadata


@pytest.mark.parametrize(
    ("parser", "transform", "scale"),
    [
        (None, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], 1.0),
        ({}, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], 1.0),
        (
            {"transform": [[0, 1, 0, 5], [0, 0, 1, 6], [1, 0, 0, 7]], "scale": 0.25},
            [[0, 1, 0, 5], [0, 0, 1, 6], [1, 0, 0, 7]],
            0.25,
        ),
    ],
)
def test_coordinates_are_those_of_the_file(parser, transform, scale):
    outputs = stored(some_cameras(), dataparser=parser).outputs("train")
    assert outputs.dataparser_transform.tolist() == transform
    assert outputs.dataparser_scale == scale


CAMERA_DAMAGE = [
    ("camera_to_worlds", np.nan, "not finite"),
    ("width", 0, "1 to 32768 pixels"),
    ("height", -3, "1 to 32768 pixels"),
    ("width", 40_000, "1 to 32768 pixels"),
    ("height", 2**31 - 1, "1 to 32768 pixels"),
    ("camera_type", 77, "a kind that nerfstudio has not"),
    ("camera_type", -1, "a kind that nerfstudio has not"),
    ("fx", 0.0, "without a focal length"),
    ("fy", -2.0, "without a focal length"),
    ("fx", np.inf, "not finite"),
    ("fy", np.nan, "without a focal length"),
    ("cx", np.nan, "not finite"),
    ("cy", -np.inf, "not finite"),
    ("distortion", np.nan, "not finite"),
]


@pytest.mark.parametrize(("name", "value", "message"), CAMERA_DAMAGE)
def test_damaged_cameras_are_refused(tmp_path, name, value, message):
    for view, split in ((3, "train"), (1, "test")):
        cameras = some_cameras()
        getattr(cameras, name)[view] = value
        expected = f"cameras: one is .*{message}; the file is damaged, ask for it again"
        with pytest.raises(codec.CodecError, match=expected):
            stored(cameras).outputs(split)
    with pytest.raises(codec.CodecError, match=message):
        manager_of(stored(cameras), tmp_path)


EYE = np.eye(4)[:3].tolist()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"dataparser": {"transform": EYE, "scale": "x"}}, "dataparser scale 'x'; expected a pos"),
        ({"dataparser": {"transform": EYE, "scale": 0}}, "dataparser scale 0; expected a positive"),
        ({"dataparser": {"transform": EYE, "scale": -1.5}}, "dataparser scale -1.5; expected"),
        ({"dataparser": {"transform": EYE, "scale": [1.0]}}, r"dataparser scale \[1.0\]; expected"),
        ({"dataparser": {"transform": np.eye(4).tolist()}}, "transform .*; expected 3 × 4 numbers"),
        ({"dataparser": {"transform": [[1.0]]}}, "transform .*; expected 3 × 4 numbers"),
        ({"dataparser": {"transform": "none"}}, "transform 'none'; expected 3 × 4 numbers"),
        ({"dataparser": {"transform": None}}, "transform None; expected 3 × 4 numbers"),
        ({"box": [[0.0] * 3]}, "box .*; expected 2 × 3 numbers"),
        ({"box": "x"}, "box 'x'; expected 2 × 3 numbers"),
        ({"model": {"contract": True}, "projection": EYE}, "projection .*; expected 4 × 4 numbers"),
    ],
)
def test_damaged_coordinates_are_refused(tmp_path, meta, message):
    damaged = stored(some_cameras(), **meta)
    with pytest.raises(codec.CodecError, match=f"meta: {message}"):
        damaged.outputs("train")
    with pytest.raises(codec.CodecError, match=f"meta: {message}"):
        manager_of(damaged, tmp_path)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_refused(scale):
    with pytest.raises(codec.CodecError, match=r"dataparser scale .*; expected a positive"):
        stored(some_cameras(), dataparser={"transform": EYE, "scale": scale}).outputs("train")


@pytest.mark.parametrize("missing", ["model", "box"])
def test_other_scenes_are_refused(tmp_path, missing):
    other = stored(some_cameras())
    del other.scene.meta[missing]
    with pytest.raises(codec.CodecError, match="not a masked-wavelet scene"):
        read_stored_capture(write_file(other, tmp_path))
    with pytest.raises(MissingCaptureError, match=r"none\.mwnf: no such file; expected the \.mwnf"):
        read_stored_capture(tmp_path / "none.mwnf")


def test_a_file_of_cameras_is_what_the_scene_knew(tmp_path):
    capture = stored(some_cameras(), dataparser={"transform": EYE, "scale": 2.0}, psnr=1.5, other=3)
    path = write_file(capture, tmp_path)
    assert codec.equal(read_stored_capture(path).scene, capture.scene)
    assert codec.equal(without_coefficients(capture.scene), capture.scene)
    assert capture.notes() == {"psnr": 1.5}
    assert stored(author="a", licence="b").notes() == {"author": "a", "licence": "b"}


# --- a capture in the file's coordinates ----------------------------------------------------------


def similarity(seed: int) -> tuple[torch.Tensor, float]:
    """A data parser's transform and scale."""
    generator = np.random.default_rng(seed)
    rotation = Rotation.random(None, generator).as_matrix()
    transform = np.concatenate((rotation, generator.normal(size=(3, 1))), axis=1)
    return torch.from_numpy(transform).float(), float(generator.uniform(0.2, 3))


def outputs_in(transform: torch.Tensor, scale: float, poses: torch.Tensor) -> DataparserOutputs:
    """What a data parser returns whose coordinates are scale · (transform of the capture's)."""
    rotation, shift = transform[:, :3], transform[:, 3:]
    turned = rotation @ poses[:, :, :3]
    moved = scale * (rotation @ poses[:, :, 3:] + shift)
    cameras = Cameras(torch.cat((turned, moved), dim=-1), 20.0, 21.0, 6.0, 4.0, 12, 8)
    return DataparserOutputs(
        [Path(f"{view}.png") for view in range(len(poses))],
        cameras,
        scene_box=SceneBox(torch.tensor(BOX)),
        dataparser_transform=transform,
        dataparser_scale=scale,
        metadata={"kept": 1, "forward_facing": "the parser's"},
    )


def in_file(transform: torch.Tensor, scale: float, **meta: Any) -> StoredCapture:
    return stored(dataparser={"transform": transform.tolist(), "scale": scale}, **meta)


EYE_TRANSFORM = torch.eye(4)[:3]
POSES = torch.from_numpy(some_cameras().camera_to_worlds)


@pytest.mark.parametrize("seed", range(4))
def test_cameras_land_where_the_file_would_have_them(seed):
    there, here = similarity(2 * seed), similarity(2 * seed + 1)
    given = outputs_in(*here, POSES)
    before = given.cameras.camera_to_worlds.clone()
    found, expected = in_file(*there).align(given), outputs_in(*there, POSES)
    torch.testing.assert_close(
        found.cameras.camera_to_worlds, expected.cameras.camera_to_worlds, atol=2e-5, rtol=1e-5
    )
    assert torch.equal(found.dataparser_transform, there[0])
    assert found.dataparser_scale == there[1]
    assert torch.equal(given.cameras.camera_to_worlds, before)  # what was given stays
    assert (found.cameras.fx == 20).all() and (found.cameras.width == 12).all()
    assert found.image_filenames == given.image_filenames


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("far", [1.0, 1e12])
def test_the_same_coordinates_leave_cameras_as_they_are(scale, far):
    """Bit for bit, even of a capture that lies so far out that a matrix and its inverse do not."""
    transform, _ = similarity(5)
    transform[:, 3] *= far
    given = outputs_in(EYE_TRANSFORM, 1.0, POSES)
    given = dataclasses.replace(given, dataparser_transform=transform, dataparser_scale=scale)
    found = in_file(transform, scale).align(given)
    assert torch.equal(found.cameras.camera_to_worlds, POSES)
    assert found.dataparser_scale == scale


@pytest.mark.parametrize("parser", [None, {}, {"name": "blender-data", "config": {}}])
def test_files_without_coordinates_leave_cameras_alone(parser):
    given = outputs_in(*similarity(3), POSES)
    found = stored(dataparser=parser).align(given)
    assert torch.equal(found.cameras.camera_to_worlds, given.cameras.camera_to_worlds)
    assert torch.equal(found.dataparser_transform, given.dataparser_transform)
    assert found.dataparser_scale == given.dataparser_scale


@pytest.mark.parametrize("parser", [None, {"transform": EYE, "scale": 2.0}])
def test_whether_a_capture_is_forward_facing_the_file_says(parser):
    given = outputs_in(*similarity(3), POSES)
    found = stored(dataparser=parser).align(given)
    assert found.metadata == {"kept": 1}
    box = {"model": {"contract": True}, "projection": PROJECTION}
    metadata = stored(dataparser=parser, **box).align(given).metadata
    assert metadata["forward_facing"].projection.tolist() == PROJECTION
    assert given.metadata["forward_facing"] == "the parser's"


SHEAR = torch.tensor([[1.0, 0.3, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
STRETCH = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.1, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
MIRROR = torch.tensor([[-1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])


@pytest.mark.parametrize("wrong", [SHEAR, STRETCH, MIRROR], ids=["shear", "stretch", "mirror"])
@pytest.mark.parametrize("of_file", [False, True])
def test_other_than_similar_coordinates_are_refused(wrong, of_file):
    one, other = (wrong, 2.0), similarity(1)
    file, given = (one, other) if of_file else (other, one)
    with pytest.raises(CaptureError, match=r"more than turning, shifting and scaling.*--data"):
        in_file(*file).align(outputs_in(*given, POSES))


def test_a_transform_without_a_scale_is_one_of_scale_one():
    """Either is a way to read it, as long as both parts of the file's coordinates agree."""
    transform, _ = similarity(1)
    file = stored(dataparser={"transform": transform.tolist()})
    assert file.outputs("train").dataparser_scale == 1
    given = outputs_in(*similarity(2), POSES)
    expected = outputs_in(transform, 1.0, POSES)
    torch.testing.assert_close(
        file.align(given).cameras.camera_to_worlds,
        expected.cameras.camera_to_worlds,
        atol=2e-5,
        rtol=1e-5,
    )


# --- captures with more photos, or fewer ----------------------------------------------------------


def write_nerfstudio(folder: Path, views: list[int]) -> Path:
    """Cameras of a ring, each rolled and pitched as hands do, so that any choice has its own up."""
    write_capture(folder)
    turns = Rotation.from_rotvec(np.random.default_rng(0).normal(scale=0.3, size=(10, 3)))
    for view, turn in enumerate(turns.as_matrix()):
        edit_pose(folder, view, lambda m, turn=turn: m @ np.block([[turn, np.zeros((3, 1))],
                                                                   [np.zeros(3), 1]]))  # fmt: skip
    meta = json.loads((folder / "transforms.json").read_text())
    write_json(folder, {**meta, "frames": [meta["frames"][view] for view in views]})
    return folder


def write_forward_facing(folder: Path, views: list[int]) -> Path:
    write_llff(folder)
    for view, path in enumerate(sorted((folder / "images_4").iterdir())):
        if view not in views:
            path.unlink()
    np.save(folder / "poses_bounds.npy", llff_rows()[views])
    return folder


@pytest.fixture(params=["nerfstudio", "llff"])
def two_captures(request, tmp_path):
    """A parser's configuration, and captures with all photos and with some of them."""
    if request.param == "nerfstudio":
        some = write_nerfstudio(tmp_path / "some", [0, 1, 2, 4, 7])
        return NerfstudioDataParserConfig(), write_nerfstudio(tmp_path / "all", [*range(10)]), some
    some = write_forward_facing(tmp_path / "some", [1, 2, 3, 5, 6, 7])
    return LLFFDataParserConfig(), write_forward_facing(tmp_path / "all", [*range(9)]), some


def by_name(outputs: list[DataparserOutputs]) -> dict[str, torch.Tensor]:
    return {
        path.name: pose
        for split in outputs
        for path, pose in zip(split.image_filenames, split.cameras.camera_to_worlds, strict=True)
    }


@pytest.mark.parametrize("has_more", [False, True])
def test_photos_of_another_choice_stand_where_the_file_has_them(two_captures, has_more, tmp_path):
    parser, everything, some = two_captures
    original, other = (some, everything) if has_more else (everything, some)
    splits = ("train", "test")

    def read(folder):
        return [parse(dataclasses.replace(parser, data=folder).setup(), split) for split in splits]

    of_file = read(original)
    parsed = of_file[0]
    meta = {"transform": parsed.dataparser_transform.tolist(), "scale": parsed.dataparser_scale}
    file: dict[str, Any] = {"dataparser": meta}
    facing = parsed.metadata.get("forward_facing")
    if facing is not None:
        file |= {"model": {"contract": True}, "box": facing.box.tolist()}
        file |= {"projection": facing.projection.tolist()}
    path = write_file(stored(**file), tmp_path)
    config = WaveletDataManagerConfig(data=other, scene=path, dataparser=copy.deepcopy(parser))
    manager = config.setup(device="cpu", test_mode="test")
    assert isinstance(manager, WaveletDataManager) and manager.has_photos
    outputs = [manager.dataparser.get_dataparser_outputs(split=split) for split in splits]
    expected, found, moved = by_name(of_file), by_name(outputs), by_name(read(other))
    common = expected.keys() & found.keys()
    assert len(common) >= 5 and len(expected) != len(found)
    differences = []
    for name in common:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
        differences.append(float((moved[name] - expected[name]).abs().max()))
    assert min(differences) > 1e-2  # or this would show nothing
    # The data set has them, and whatever is written next says so.
    train = by_name([manager.train_dataset._dataparser_outputs])
    assert all(torch.equal(train[name], found[name]) for name in train)
    assert torch.equal(
        manager.train_dataparser_outputs.dataparser_transform, parsed.dataparser_transform
    )
    assert manager.train_dataparser_outputs.dataparser_scale == parsed.dataparser_scale
    if facing is not None:
        own = manager.train_dataparser_outputs.metadata["forward_facing"]
        assert torch.equal(own.projection, facing.projection)
        cameras = manager.train_dataset.cameras
        other_box = find_forward_facing(
            cameras.camera_to_worlds, torch.ones(len(cameras), 2), torch.full((len(cameras),), 3.0)
        )
        assert other_box is None or not torch.equal(own.projection, other_box.projection)


def test_a_capture_that_was_sheared_is_refused(two_captures, tmp_path):
    parser, everything, _ = two_captures
    path = write_file(in_file(SHEAR, 1.0), tmp_path)
    config = WaveletDataManagerConfig(data=everything, scene=path, dataparser=parser)
    with pytest.raises(CaptureError, match="more than turning"):
        config.setup(device="cpu", test_mode="test")


# --- without photos -------------------------------------------------------------------------------


def test_photos_that_are_not_there_are_small_and_grey():
    cameras = some_cameras(
        width=np.array([4000, 3000, 24, 5, 30000], np.int32),
        height=np.array([3000, 4000, 24, 30000, 5], np.int32),
        split=np.zeros(5, np.uint8),
    )
    dataset = CamerasOnlyDataset(stored(cameras).outputs("train"))
    for view, size in enumerate(((64, 85), (64, 48), (24, 24), (64, 1), (5, 80))):
        data = dataset[view]
        assert data["image"].shape == (*size, 3)
        torch.testing.assert_close(data["image"], torch.full((*size, 3), 96 / 255))
    assert len(dataset) == 5


@pytest.mark.parametrize("is_jagged", [False, True])
def test_photos_that_are_not_there_take_no_memory(tmp_path, is_jagged):
    width = np.full(5, 400, np.int32)
    if is_jagged:
        width[2] = 300
    manager = manager_of(stored(some_cameras(width=width, height=width * 2)), tmp_path)
    batch = next(manager.iter_train_image_dataloader)
    assert isinstance(batch, dict)
    images = batch["image"]
    assert isinstance(images, list) == is_jagged
    sizes = [(800, 400, 3), (600, 300, 3), (800, 400, 3)]
    if is_jagged:
        assert [tuple(image.shape) for image in images] == sizes
    else:
        assert images.shape == (3, 800, 400, 3)
    for image in images if is_jagged else [images]:
        assert set(image.stride()) == {0}
        assert image.untyped_storage().nbytes() == 4


def test_exports_see_other_pixels_each_time(tmp_path):
    """As ns-export pointcloud does: step 0 again and again, of a pipeline that evaluates."""
    cameras = some_cameras()
    manager = manager_of(stored(cameras), tmp_path).eval()
    expected = as_nerfstudio(cameras, [0, 2, 3])
    drawn = []
    for _ in range(6):
        rays, batch = manager.next_train(0)
        indices = batch["indices"]
        drawn.append(indices)
        assert len(rays) == 64
        for number in range(0, 64, 9):
            view, y, x = indices[number].tolist()
            true = expected.generate_rays(
                camera_indices=view, coords=torch.tensor([y + 0.5, x + 0.5])
            )
            torch.testing.assert_close(rays.origins[number], true.origins.view(3))
            torch.testing.assert_close(rays.directions[number], true.directions.view(3))
    for one in range(6):
        for other in range(one):
            assert not torch.equal(drawn[one], drawn[other])
    everything = torch.cat(drawn)
    assert set(everything[:, 0].tolist()) == {0, 1, 2}
    assert everything[:, 1].max() == 7 and everything[:, 2].max() == 11


def test_training_sees_the_same_pixels_in_the_same_step(tmp_path):
    manager = manager_of(stored(some_cameras()), tmp_path).train()
    first = manager.next_train(0)[1]["indices"]
    for step in (0, 0, 5, 0):
        same = torch.equal(manager.next_train(step)[1]["indices"], first)
        assert same == (step == 0)


def test_other_steps_are_drawn_anew_in_evaluation(tmp_path):
    """A step that is not asked for twice in a row has the pixels that are its own."""
    manager = manager_of(stored(some_cameras()), tmp_path).eval()
    first, second = (manager.next_train(step)[1]["indices"] for step in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(manager.next_train(0)[1]["indices"], first)


def test_pixels_of_several_sizes_lie_within_their_photos(tmp_path):
    width = np.array([9, 12, 7, 30, 16], np.int32)
    height = np.array([8, 5, 21, 6, 16], np.int32)
    cameras = some_cameras(width=width, height=height)
    manager = manager_of(stored(cameras), tmp_path).eval()
    assert manager.train_dataset.cameras.is_jagged
    pixels = torch.cat([manager.next_train(0)[1]["indices"] for _ in range(20)])
    for view, original in enumerate((0, 2, 3)):
        of_view = pixels[pixels[:, 0] == view]
        assert int(of_view[:, 1].max()) == height[original] - 1
        assert int(of_view[:, 2].max()) == width[original] - 1


@pytest.mark.parametrize("kind", [CameraType.PERSPECTIVE, CameraType.FISHEYE])
def test_lenses_bend_rays_as_those_of_the_capture(tmp_path, kind):
    cameras = some_cameras(
        camera_type=np.full(5, kind.value, np.int32),
        distortion=np.linspace(-0.1, 0.1, 30, dtype=np.float32).reshape(5, 6),
    )
    manager = manager_of(stored(cameras), tmp_path)
    for found, views in ((manager.train_dataset, [0, 2, 3]), (manager.eval_dataset, [1, 4])):
        expected = as_nerfstudio(cameras, views)
        assert_same_cameras(found.cameras, expected)
        rays, true = (c.generate_rays(camera_indices=1) for c in (found.cameras, expected))
        assert torch.equal(rays.directions, true.directions)
        expected.distortion_params = None
        straight = expected.generate_rays(camera_indices=1)
        assert not torch.allclose(rays.directions, straight.directions, atol=1e-4)


def test_ns_train_on_a_file_is_refused(bounded, tmp_path):
    """What it says names the file, and what to give in its place."""
    config = make_config("bounded", bounded.path, tmp_path, init_from=bounded.path)
    with pytest.raises(TrainingError, match=r"scene\.mwnf: holds cameras, but no photos to train"):
        set_up(config, "val")


def test_a_training_without_a_file_is_as_it_was(bounded):
    assert bounded.manager.stored is None and bounded.manager.has_photos
