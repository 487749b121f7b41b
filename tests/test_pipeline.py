"""Trainings that start from a file, and the viewer's button that writes one."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.viewer.utils import parse_object
from nerfstudio.viewer.viewer import Viewer
from nerfstudio.viewer.viewer_elements import ViewerControl, ViewerElement
from test_stored_capture import (
    KINDS,
    ROUNDED,
    Trained,
    assert_same_cameras,
    make_config,
    opened,
    picture,
    set_up,
    train_run,
)

import masked_wavelet_codec as codec
from masked_wavelet_nerf import cli, scene
from masked_wavelet_nerf.dataparsers.captures import MissingCaptureError
from masked_wavelet_nerf.errors import RefusedFileError
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.loading import stored_settings
from masked_wavelet_nerf.pipeline import WaveletPipeline
from masked_wavelet_nerf.runs import Run, model_of_scene, open_run, write_run
from masked_wavelet_nerf.settings import SceneSettings
from masked_wavelet_nerf.trainer import TrainingError

OTHER = {
    "levels": 1,
    "wavelet": "haar",
    "level_scaling": False,
    "bits": 6,
    "network_bits": 7,
    "num_density_components": 2,
    "num_appearance_components": 3,
    "appearance_dim": 9,
    "hidden_dim": 12,
    "num_frequencies": 1,
    "distance_scale": 30.0,
    "num_samples": 24,
}
"""Settings of the scenes to start from: none is the configuration's."""


@pytest.fixture(scope="module", params=KINDS)
def source(request, capture, tmp_path_factory) -> Trained:
    """A scene of other settings than those of :func:`make_config`."""
    return train_run(request.param, capture, tmp_path_factory.mktemp("source"), **OTHER)


@pytest.fixture(scope="module")
def bounded(capture, tmp_path_factory) -> Trained:
    return train_run("bounded", capture, tmp_path_factory.mktemp("bounded"), **OTHER)


def eval_cameras(pipeline):
    return pipeline.datamanager.eval_dataset.cameras


def psnr(pipeline) -> float:
    """Over the pixels of all evaluation views."""
    dataset = pipeline.datamanager.eval_dataset
    errors = []
    for view in range(len(dataset)):
        camera = dataset.cameras[view : view + 1]
        batch = {"image": dataset[view]["image"]}
        outputs = pipeline.model.eval().get_outputs_for_camera(camera)
        true, shown = pipeline.model._true_and_rendered(outputs, batch)
        errors.append((true - shown).square().flatten())
    return -10 * math.log10(float(torch.cat(errors).mean()))


# --- starting from a file -------------------------------------------------------------------------


def test_a_training_starts_from_a_file_and_goes_on(source, tmp_path):
    smaller: dict[str, Any] = {"initial_resolution": 6, "final_resolution": 8}
    config = make_config(source.kind, source.capture, tmp_path, init_from=source.path, **smaller)
    trainer = set_up(config)
    pipeline, model, scene = trainer.pipeline, trainer.pipeline.model, source.scene
    expected = stored_settings(scene)
    for entry in dataclasses.fields(SceneSettings):
        assert getattr(model.config, entry.name) == getattr(expected, entry.name), entry.name
    for name, value in OTHER.items():
        assert getattr(model.config, name) == value
    manager = pipeline.datamanager
    assert manager.config.scene == source.path and manager.has_photos
    # Before the first step it is the file's scene, in its place.
    original = model_of_scene(scene)
    camera = eval_cameras(pipeline)[1:2]
    shown = picture(model, camera)
    torch.testing.assert_close(shown, picture(original, camera), atol=1e-6, rtol=0)
    assert float(shown.std()) > 0.01
    assert source.kind != "bounded" or scene.occupancy is not None  # or the box may yet shrink
    resolution, box = original.field.resolution, original.aabb.clone()
    assert model.field.resolution == resolution and torch.equal(model.aabb, box)
    assert (model.projection is None) == (source.kind != "forward-facing")
    before = psnr(pipeline)
    trainer.train()
    # No smaller, nowhere else, and better.
    assert model.field.resolution == resolution and torch.equal(model.aabb, box)
    after = psnr(pipeline)
    assert after > before - 0.3, (before, after)
    assert not torch.equal(picture(model, camera), shown)

    again = open_run(config.get_base_dir() / "config.yml")
    torch.testing.assert_close(
        picture(again.model, camera), picture(model, camera), atol=1e-6, rtol=0
    )
    path, _ = export_run(again, tmp_path / "again.mwnf", psnr=None)
    exported = codec.read(path)
    torch.testing.assert_close(
        picture(model_of_scene(exported), camera), picture(model, camera), atol=1e-4, rtol=0
    )
    for name in ("dataparser", "box", "projection"):
        assert exported.meta.get(name) == scene.meta.get(name)
    for name in OTHER:
        assert exported.meta["model"][name] == scene.meta["model"][name]
    assert exported.cameras is not None and scene.cameras is not None
    assert (exported.cameras.camera_to_worlds == scene.cameras.camera_to_worlds).all()
    assert str(tmp_path) not in json.dumps(exported.meta)
    assert source.path.parent.name not in json.dumps(exported.meta)


def test_a_finer_resolution_is_still_reached(bounded, tmp_path):
    finer: dict[str, Any] = {"initial_resolution": 12, "final_resolution": 22}
    config = make_config("bounded", bounded.capture, tmp_path, init_from=bounded.path, **finer)
    trainer = set_up(config)
    model = trainer.pipeline.model
    before = math.prod(model.field.resolution)
    assert before == pytest.approx(16**3, rel=0.15)
    trainer.train()
    assert math.prod(model.field.resolution) == pytest.approx(22**3, rel=0.1)


def test_a_stopped_training_resumes_from_its_own_checkpoint(bounded, tmp_path):
    config = make_config("bounded", bounded.capture, tmp_path, init_from=bounded.path)
    config.max_num_iterations = 3
    trainer = set_up(config)
    trainer.train()
    camera = eval_cameras(trainer.pipeline)[0:1]
    trained = picture(trainer.pipeline.model, camera)
    config = make_config("bounded", bounded.capture, tmp_path, "more", init_from=bounded.path)
    config.load_dir = trainer.checkpoint_dir
    resumed = set_up(config)
    assert resumed._start_step == 3
    torch.testing.assert_close(picture(resumed.pipeline.model, camera), trained)
    assert not torch.allclose(trained, picture(bounded.run.model, camera), atol=1e-3)


def test_cameras_come_into_the_coordinates_of_the_file(bounded, tmp_path):
    """The same capture, read at half the size."""
    config = make_config("bounded", bounded.capture, tmp_path, init_from=bounded.path)
    parser = BlenderDataParserConfig(data=bounded.capture, scale_factor=0.5)
    config.pipeline.datamanager.dataparser = parser
    trainer = set_up(config)
    found, expected = trainer.pipeline.datamanager, bounded.manager
    for name in ("train_dataset", "eval_dataset"):
        torch.testing.assert_close(
            getattr(found, name).cameras.camera_to_worlds,
            getattr(expected, name).cameras.camera_to_worlds,
            atol=1e-5,
            rtol=0,
        )
    assert found.train_dataparser_outputs.dataparser_scale == 1
    assert psnr(trainer.pipeline) == pytest.approx(psnr(bounded.run.pipeline), abs=1e-2)


@pytest.mark.parametrize("source", ["contracted"], indirect=True)
def test_other_cameras_leave_planes_where_they_are(source, tmp_path):
    """Of an unbounded scene: where cameras look decides it when there is no file."""
    capture = shutil.copytree(source.capture, tmp_path / "capture")
    views = json.loads((capture / "transforms_train.json").read_text())
    views["frames"] = views["frames"][:3]
    for frame in views["frames"]:
        for row in frame["transform_matrix"][:3]:
            row[3] *= 0.6  # closer
    (capture / "transforms_train.json").write_text(json.dumps(views))
    boxes = {}
    for name, start in (("with", source.path), ("without", None)):
        config = make_config(source.kind, capture, tmp_path, name, init_from=start)
        pipeline = set_up(config).pipeline
        assert len(pipeline.datamanager.train_dataset) == 3
        boxes[name] = pipeline.model.aabb
    assert torch.equal(boxes["with"], source.run.model.aabb)
    assert not torch.allclose(boxes["without"], boxes["with"], rtol=0.01)


def test_without_a_file_cameras_are_the_captures_own(bounded, tmp_path):
    config = make_config("bounded", bounded.capture, tmp_path)
    parser = BlenderDataParserConfig(data=bounded.capture, scale_factor=0.5)
    config.pipeline.datamanager.dataparser = parser
    manager = set_up(config).pipeline.datamanager
    assert manager.stored is None
    torch.testing.assert_close(
        manager.train_dataset.cameras.camera_to_worlds[:, :, 3],
        bounded.manager.train_dataset.cameras.camera_to_worlds[:, :, 3] / 2,
    )


# --- files that cannot be started from ------------------------------------------------------------


def foreign(path: Path, _: codec.Scene) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))


def cut(path: Path, scene: codec.Scene) -> None:
    path.write_bytes(codec.encode(scene)[:-200])


def of_another_kind(path: Path, scene: codec.Scene) -> None:
    meta = {key: value for key, value in scene.meta.items() if key != "model"}
    codec.write(path, dataclasses.replace(scene, meta=meta))


def with_model(**changes: Any):
    def write(path: Path, scene: codec.Scene) -> None:
        model = {**scene.meta["model"], **changes}
        codec.write(path, dataclasses.replace(scene, meta={**scene.meta, "model": model}))

    return write


REFUSED = {
    "foreign": (foreign, "magic bytes"),
    "cut": (cut, "section"),
    "of another kind": (of_another_kind, "not a masked-wavelet scene"),
    "excessive": (with_model(num_samples=10**9), "num_samples 1000000000; expected 1 to 4096"),
    "settings of another type": (with_model(levels="3"), "levels: expected int, got '3'"),
    "settings that do not fit": (with_model(levels=3), "expected .channels, bands."),
}


@pytest.mark.parametrize("what", REFUSED)
def test_ns_train_refuses_other_files(bounded, tmp_path, capsys, what):
    make, message = REFUSED[what]
    path = tmp_path / "start.mwnf"
    make(path, bounded.scene)
    config = make_config("bounded", bounded.capture, tmp_path, init_from=path)
    with pytest.raises(RefusedFileError, match=message) as raised:
        set_up(config)
    assert isinstance(raised.value, SystemExit) and raised.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "start.mwnf" in line]
    assert str(path) in line


@pytest.mark.parametrize("what", REFUSED)
def test_ns_viewer_refuses_other_files(bounded, tmp_path, capsys, what):
    """The run's own: nerfstudio reads its configuration anew."""
    make, message = REFUSED[what]
    path = tmp_path / "start.mwnf"
    make(path, bounded.scene)
    config = make_config("bounded", bounded.capture, tmp_path, init_from=path)
    config.save_config()
    with pytest.raises(RefusedFileError, match=message) as raised:
        eval_setup(config.get_base_dir() / "config.yml")
    assert isinstance(raised.value, SystemExit) and raised.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_a_missing_file_is_named(bounded, tmp_path):
    path = tmp_path / "gone.mwnf"
    config = make_config("bounded", bounded.capture, tmp_path, init_from=path)
    with pytest.raises(TrainingError, match=r"gone\.mwnf: no such file; expected") as raised:
        set_up(config)
    assert isinstance(raised.value, SystemExit) and "gone.mwnf" in str(raised.value.code)
    with pytest.raises(MissingCaptureError, match=r"gone\.mwnf: no such file; expected"):
        opened(config.get_base_dir() / "config.yml")


def test_our_commands_say_once_what_is_wrong_with_a_file(bounded, tmp_path, capsys):
    path = tmp_path / "start.mwnf"
    foreign(path, bounded.scene)
    config = make_config("bounded", bounded.capture, tmp_path, init_from=path)
    config.save_config()
    config.get_checkpoint_dir().mkdir(parents=True)
    (config.get_checkpoint_dir() / "step-000000000.ckpt").touch()
    load_config = str(config.get_base_dir() / "config.yml")
    arguments = ["export", "--load-config", load_config, "--output-dir", str(tmp_path)]
    assert cli.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert "magic bytes" in line


@pytest.mark.parametrize("has_capture", [True, False])
def test_a_run_opens_without_the_file_that_it_started_from(bounded, tmp_path, has_capture):
    """Which may have moved, or been overwritten by the run's own export."""
    path = tmp_path / "gone.mwnf"
    codec.write(path, bounded.scene)
    config = make_config("bounded", bounded.capture, tmp_path, init_from=path)
    trained = set_up(config)
    trained.save_checkpoint(0)
    path.write_bytes(b"something else")
    saved = config.get_base_dir() / "config.yml"
    if not has_capture:
        changed = yaml.load(saved.read_text("utf8"), Loader=yaml.Loader)
        changed.data = changed.pipeline.datamanager.data = tmp_path / "no-capture"
        saved.write_text(yaml.dump(changed), "utf8")
    run = open_run(saved)
    assert (run.pipeline is not None) == has_capture
    assert run.model.config.levels == bounded.scene.meta["model"]["levels"]
    again, kept = run.scene({}), trained.pipeline.model.state_dict()
    assert codec.equal(
        dataclasses.replace(again, meta={}, cameras=None),
        dataclasses.replace(bounded.scene, meta={}, cameras=None),
    )
    assert run.model.state_dict().keys() == kept.keys()


# --- the button -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(bounded, tmp_path_factory):
    """A training under way, whose networks the file takes as they are."""
    folder = tmp_path_factory.mktemp("viewed")
    trainer = set_up(make_config("bounded", bounded.capture, folder, network_bits=None))
    for step in range(3):
        trainer.train_iteration(step)
    trainer.pipeline.model.update_occupancy()
    assert trainer.pipeline.model.occupancy.is_known
    return trainer


def show(pipeline: Any, folder: Path, trainer: Any, step: int) -> Any:
    """Opens a stand-in for nerfstudio's viewer; returns the line that it shows."""
    viewer, line = object.__new__(Viewer), SimpleNamespace(content="", visible=False)

    def add_markdown(content, order, visible):
        assert order == 3.5
        line.content, line.visible = content, visible
        return line

    viewer.log_filename = folder / "viewer_log_filename.txt"
    viewer.trainer, viewer.step = trainer, step
    viewer.stats_markdown = SimpleNamespace(order=3)  # pyright: ignore[reportAttributeAccessIssue]
    gui = SimpleNamespace(add_markdown=add_markdown)
    viewer.viser_server = SimpleNamespace(gui=gui)  # pyright: ignore[reportAttributeAccessIssue]
    pipeline.export_line._setup(viewer)
    return line


def click(pipeline: Any) -> None:
    pipeline.export_button.cb_hook(pipeline.export_button)


def wait(pipeline: Any) -> None:
    if pipeline._export is not None:
        pipeline._export.join(60)
        assert not pipeline._export.is_alive()


def run_of(trainer: Any, step: int) -> Run:
    return Run(trainer.config, trainer.pipeline.model, trainer.pipeline, step)


def test_nerfstudio_finds_button_and_line(trainer):
    pipeline = trainer.pipeline
    assert isinstance(pipeline, WaveletPipeline)
    elements = [element for _, element in parse_object(pipeline, ViewerElement, "")]
    controls = [control for _, control in parse_object(pipeline, ViewerControl, "")]
    assert pipeline.export_button in elements and pipeline.export_line in controls
    assert pipeline.export_button.name == "Write scene.mwnf"


def test_the_button_writes_what_an_export_writes(trainer, tmp_path, capsys):
    line = show(trainer.pipeline, tmp_path, trainer, 2)
    click(trainer.pipeline)
    wait(trainer.pipeline)
    path = tmp_path / "scene.mwnf"
    expected, _ = export_run(run_of(trainer, 2), tmp_path / "expected.mwnf", psnr=None)
    assert path.read_bytes() == expected.read_bytes()
    assert codec.read(path).meta["step"] == 2
    assert line.visible and path.name in line.content
    assert f"{path.stat().st_size:,} bytes" in line.content
    assert str(path) in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"scene.mwnf", "expected.mwnf"}


def test_only_the_papers_profile_holds_occupancy_as_fine_as_planes(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "_FEW_CELLS", 0)
    run, occupancy = run_of(trainer, 3), trainer.pipeline.model.occupancy
    for profile, expected in (("paper", occupancy), ("range", occupancy.halved())):
        path, _ = export_run(run, tmp_path / f"{profile}.mwnf", profile=profile)
        np.testing.assert_array_equal(codec.read(path).occupancy, expected.cells.numpy())


def test_sliders_do_not_change_what_is_written(trainer, tmp_path):
    model = trainer.pipeline.model
    expected, _ = export_run(run_of(trainer, 2), tmp_path / "expected.mwnf", psnr=None)
    show(trainer.pipeline, tmp_path, trainer, 2)
    model.levels_shown.value, model.mask_threshold.value = 0, 2.0
    try:
        click(trainer.pipeline)
        wait(trainer.pipeline)
    finally:
        model.levels_shown.value, model.mask_threshold.value = model.config.levels, 0.0
    assert (tmp_path / "scene.mwnf").read_bytes() == expected.read_bytes()


class Held:
    """Stands for codec.write: writes once it may."""

    def __init__(self) -> None:
        self.calls: list[Path] = []
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self._write = codec.write

    def __call__(self, path: Path, scene: codec.Scene, profile: str = "range") -> int:
        self.calls.append(path)
        self.has_begun.set()
        assert self.may_go_on.wait(60)
        return self._write(path, scene, profile)


def test_training_goes_on_while_a_snapshot_is_written(trainer, tmp_path, monkeypatch):
    pipeline, model = trainer.pipeline, trainer.pipeline.model
    expected, _ = export_run(run_of(trainer, 2), tmp_path / "expected.mwnf", psnr=None)
    line, held = show(pipeline, tmp_path, trainer, 2), Held()
    monkeypatch.setattr(codec, "write", held)
    click(pipeline)
    thread = pipeline._export
    assert held.has_begun.wait(60)
    assert line.content == "Writing scene.mwnf …"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in (3, 4):
        trainer.train_iteration(step)
    moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters()]
    assert sum(moved) > len(moved) / 2
    with torch.no_grad():  # and whatever else may change in place
        for tensor in (*model.parameters(), model.aabb):
            tensor.add_(0.25)
        model.occupancy.cells.logical_not_()
    click(pipeline)  # while it is being written: nothing
    assert pipeline._export is thread and len(held.calls) == 1
    held.may_go_on.set()
    wait(pipeline)
    path = tmp_path / "scene.mwnf"
    assert held.calls == [path]
    assert path.read_bytes() == expected.read_bytes()
    click(pipeline)  # afterwards: the scene as it is now
    wait(pipeline)
    assert len(held.calls) == 2 and path.read_bytes() != expected.read_bytes()
    now, _ = export_run(run_of(trainer, 2), tmp_path / "now.mwnf", psnr=None)
    assert path.read_bytes() == now.read_bytes()


def test_a_write_that_fails_says_so_and_keeps_the_older_file(trainer, tmp_path, monkeypatch):
    path = tmp_path / "scene.mwnf"
    path.write_bytes(b"precious")
    line = show(trainer.pipeline, tmp_path, trainer, 2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        click(trainer.pipeline)
        wait(trainer.pipeline)
    assert path.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [path]
    assert line.visible and "scene.mwnf" in line.content
    assert "cannot be written: [Errno 28] No space left on device" in line.content

    def refuse(*_: Any) -> None:
        raise codec.CodecError("grids: too many")

    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", refuse)
        patch.setattr("masked_wavelet_codec.files.encode", refuse)
        click(trainer.pipeline)
        wait(trainer.pipeline)
    assert path.read_bytes() == b"precious" and "grids: too many" in line.content
    click(trainer.pipeline)  # the next one is written
    wait(trainer.pipeline)
    assert "cannot" not in line.content and path.read_bytes() != b"precious"


@dataclasses.dataclass
class _OwnDataParserConfig(BlenderDataParserConfig):
    """Not registered with nerfstudio."""


def test_a_scene_that_cannot_be_written_says_so(trainer, tmp_path, monkeypatch):
    line = show(trainer.pipeline, tmp_path, trainer, 2)
    manager = trainer.config.pipeline.datamanager
    monkeypatch.setattr(manager, "dataparser", _OwnDataParserConfig(data=manager.data))
    click(trainer.pipeline)
    wait(trainer.pipeline)
    assert "not registered with nerfstudio" in line.content
    assert not list(tmp_path.iterdir())


def test_ns_viewer_writes_the_run_that_it_shows(bounded):
    config, pipeline = opened(bounded.config)
    folder = config.get_base_dir()
    line = show(pipeline, folder, None, 19)
    try:
        click(pipeline)
        wait(pipeline)
        written = codec.read(folder / "scene.mwnf")
    finally:
        (folder / "scene.mwnf").unlink(missing_ok=True)
    assert line.content.endswith(" bytes")
    scene = bounded.scene
    for name in ("psnr", "author", "licence"):
        del scene.meta[name]  # which were said to the exporter
    assert codec.equal(written, scene)


def test_ns_viewer_writes_a_decoded_run_again(bounded, tmp_path):
    config, pipeline = opened(write_run(bounded.scene, tmp_path / "run"), "test")
    log_filename = config.get_base_dir() / config.viewer.relative_log_filename
    log_filename.parent.mkdir(exist_ok=True)  # all as nerfstudio does
    line = show(pipeline, log_filename.parent, None, 19)
    click(pipeline)
    wait(pipeline)
    assert line.content.endswith(" bytes")
    (path,) = (tmp_path / "run").rglob("scene.mwnf")
    assert codec.equal(codec.read(path), bounded.scene)
    cameras = eval_cameras(pipeline), eval_cameras(bounded.run.pipeline)
    assert_same_cameras(*cameras, moved=ROUNDED)
