"""nerfstudio runs: opening one for export, measuring one, and writing one from a decoded scene."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.utils.eval_utils import eval_setup
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from masked_wavelet_codec import Cameras as SceneCameras
from masked_wavelet_codec import CodecError, Scene
from masked_wavelet_nerf import __version__
from masked_wavelet_nerf.clock import now
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.files import replace_file
from masked_wavelet_nerf.loading import stored_numbers, stored_projection, stored_settings
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.ndc import ForwardFacing
from masked_wavelet_nerf.scene import (
    config_from_json,
    config_to_json,
    load_scene_into,
    scene_from_model,
)

_NUM_DISTORTION = 6


class RunError(UserError):
    """A run cannot be opened; the message says what is missing and what to do."""


@dataclass
class Run:
    """A trained run, opened. ``pipeline`` is None where the capture is not at hand."""

    config: TrainerConfig
    model: MaskedWaveletModel
    pipeline: Pipeline | None
    step: int
    missing: str = ""
    """Why the capture is not at hand."""


@dataclass(frozen=True)
class Evaluation:
    """Means over the evaluation views."""

    psnr: float
    """dB."""
    ssim: float | None
    seconds: float
    """Wall-clock time of rendering, without the measuring."""
    rays_per_second: float
    """Rays rendered per second."""
    num_views: int


def open_run(load_config: Path, data: Path | None = None) -> Run:
    """Opens a run of this package's methods, with its capture where that can be read.

    Args:
        load_config: the run's config.yml.
        data: where the capture is now, if not where it was trained from.

    Raises:
        RunError: if there is no such run, it has no checkpoint, or it is another method's.
    """
    if not load_config.is_file():
        raise RunError(f"{load_config}: no such file; expected the config.yml of a trained run")
    config = yaml.load(load_config.read_text("utf8"), Loader=yaml.Loader)
    if not isinstance(getattr(config.pipeline, "model", None), MaskedWaveletModelConfig):
        raise RunError(
            f"{load_config}: a run of {config.method_name}; expected one of masked-wavelet or "
            "masked-wavelet-bounded"
        )
    checkpoint = latest_checkpoint(config.get_checkpoint_dir())

    def point_to_data(loaded: TrainerConfig) -> TrainerConfig:
        if data is not None:
            loaded.pipeline.datamanager.data = data
        return loaded

    try:
        config, pipeline, _, step = eval_setup(load_config, update_config_callback=point_to_data)
    except (OSError, AssertionError) as error:  # what nerfstudio's parsers raise without a capture
        if data is not None:
            raise RunError(f"{data}: the capture cannot be read: {error}") from error
        model, step = _load_model(config, checkpoint)
        return Run(config, model, None, step, missing=str(error))
    model = pipeline.model
    assert isinstance(model, MaskedWaveletModel)
    return Run(config, model, pipeline, step)


def latest_checkpoint(folder: Path) -> Path:
    """The checkpoint of the highest step.

    Raises:
        RunError: if there is none.
    """
    found = sorted(folder.glob("step-*.ckpt"))
    if not found:
        raise RunError(f"{folder}: no checkpoint; train the run until it saves one")
    return found[-1]


def _load_model(config: TrainerConfig, checkpoint: Path) -> tuple[MaskedWaveletModel, int]:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    prefix = "_model."
    weights = {k[len(prefix) :]: v for k, v in state["pipeline"].items() if k.startswith(prefix)}
    placed = weights["aabb"], weights.get("projection")
    model = _build_model(config.pipeline.model, *placed)  # pyright: ignore[reportArgumentType]
    model.load_state_dict(weights)
    return model, int(state["step"])


def _build_model(
    config: MaskedWaveletModelConfig, box: torch.Tensor, projection: torch.Tensor | None
) -> MaskedWaveletModel:
    # Small to begin with: loading gives the grids their size.
    config = copy.deepcopy(config)
    config.initial_resolution = 4
    metadata = {} if projection is None else {"forward_facing": ForwardFacing(projection, box)}
    model = config.setup(scene_box=SceneBox(aabb=box), num_train_data=1, metadata=metadata)
    return model.eval()


@torch.no_grad()
def evaluate(pipeline: Pipeline, num_views: int | None = None, stride: int = 1) -> Evaluation:
    """Renders and measures evaluation views.

    Args:
        pipeline: an opened run's.
        num_views: how many, evenly spread over all; None for all.
        stride: of rows and columns, which leaves PSNR as it is but for chance. A smaller picture
            would not: photos are averages over a pixel, renderings are not.
    """
    dataset = pipeline.datamanager.eval_dataset  # pyright: ignore[reportAttributeAccessIssue]
    assert dataset is not None
    model = pipeline.model
    was_training = model.training
    model.eval()
    count = len(dataset) if num_views is None else min(num_views, len(dataset))
    totals: dict[str, float] = {}
    seconds = num_rays = 0
    for index in track(np.linspace(0, len(dataset) - 1, count).astype(int), "Evaluating"):
        camera = dataset.cameras[int(index) : int(index) + 1].to(model.device)
        batch = {key: _to(value, model.device) for key, value in dataset[int(index)].items()}
        step = min(stride, *batch["image"].shape[:2])
        some = slice((step - 1) // 2, None, step)
        batch["image"] = batch["image"][some, some]
        start = now(model.device)
        rays = camera.generate_rays(camera_indices=0, keep_shape=True)
        outputs = model.get_outputs_for_camera_ray_bundle(rays[some, some])
        seconds += now(model.device) - start
        num_rays += outputs["rgb"][..., 0].numel()
        metrics, _ = model.get_image_metrics_and_images(outputs, batch)
        for key, value in metrics.items():
            totals[key] = totals.get(key, 0.0) + float(value) / count
    model.train(was_training)
    return Evaluation(
        psnr=totals["psnr"],
        ssim=totals.get("ssim"),
        seconds=seconds,
        rays_per_second=num_rays / seconds,
        num_views=count,
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


# --- run → scene ----------------------------------------------------------------------------------


def scene_of_run(run: Run, extra_meta: dict[str, Any]) -> Scene:
    """The scene of a run: everything that rendering it elsewhere needs."""
    config, model_config = run.config, run.config.pipeline.model
    assert isinstance(model_config, MaskedWaveletModelConfig)
    dataparser, cameras = _dataparser_meta(config), None
    if run.pipeline is not None:
        manager = run.pipeline.datamanager
        assert isinstance(manager, VanillaDataManager)
        outputs = manager.train_dataparser_outputs
        dataparser["transform"] = outputs.dataparser_transform.tolist()
        dataparser["scale"] = float(outputs.dataparser_scale)
        cameras = _scene_cameras(manager.train_dataset.cameras, manager.eval_dataset.cameras)
    meta: dict[str, Any] = {
        "method": config.method_name,
        "method_version": __version__,
        "step": run.step,
        "model": config_to_json(model_config),
        "dataparser": dataparser,
        "camera_res_scale_factor": float(config.pipeline.datamanager.camera_res_scale_factor),  # pyright: ignore[reportAttributeAccessIssue]
        **extra_meta,
    }
    return scene_from_model(run.model, model_config.bits or 8, meta, cameras)


def _dataparser_meta(config: TrainerConfig) -> dict[str, Any]:
    dataparser = config.pipeline.datamanager.dataparser  # pyright: ignore[reportAttributeAccessIssue]
    for name, known in all_dataparsers.items():
        if type(known) is type(dataparser):
            return {"name": name, "config": config_to_json(dataparser)}
    raise RunError(
        f"data parser {type(dataparser).__name__}: not registered with nerfstudio, so a decoded "
        "run could not name it; register it as a plugin (nerfstudio.dataparser_configs)"
    )


def _scene_cameras(train: Cameras, evaluation: Cameras) -> SceneCameras | None:
    """Cameras as the file has them; None where their lenses have no place in it."""
    for cameras in (train, evaluation):
        lens = cameras.distortion_params
        if lens is not None and lens.shape[-1] != _NUM_DISTORTION:
            CONSOLE.print(
                f"Written without cameras: a file holds lenses of {_NUM_DISTORTION} distortion "
                f"parameters, these have {lens.shape[-1]}.",
                style="yellow",
            )
            return None

    def joined(get, dtype) -> np.ndarray:
        parts = [np.asarray(get(cameras).cpu().numpy(), dtype) for cameras in (train, evaluation)]
        return np.concatenate(parts)

    def distortion(cameras: Cameras) -> torch.Tensor:
        if cameras.distortion_params is None:
            return torch.zeros(len(cameras), _NUM_DISTORTION)
        return cameras.distortion_params

    return SceneCameras(
        camera_to_worlds=joined(lambda c: c.camera_to_worlds, np.float32),
        fx=joined(lambda c: c.fx[:, 0], np.float32),
        fy=joined(lambda c: c.fy[:, 0], np.float32),
        cx=joined(lambda c: c.cx[:, 0], np.float32),
        cy=joined(lambda c: c.cy[:, 0], np.float32),
        width=joined(lambda c: c.width[:, 0], np.int32),
        height=joined(lambda c: c.height[:, 0], np.int32),
        distortion=joined(distortion, np.float32),
        camera_type=joined(lambda c: c.camera_type[:, 0], np.int32),
        split=np.repeat(np.array([0, 1], np.uint8), [len(train), len(evaluation)]),
    )


# --- scene → run ----------------------------------------------------------------------------------


def model_of_scene(scene: Scene) -> MaskedWaveletModel:
    """The model of a decoded scene, ready to render.

    Raises:
        CodecError: if the scene is not one of ours.
    """
    meta = scene.meta
    stored_settings(scene)  # which says what is wrong with them
    config = config_from_json(MaskedWaveletModelConfig(), meta["model"])
    config.bits = scene.bits
    model = _build_model(config, stored_numbers(meta, "box", (2, 3)), stored_projection(meta))
    model.config.initial_resolution = config.initial_resolution
    load_scene_into(model, scene)
    model.refresh()
    return model


def write_run(scene: Scene, output_dir: Path, data: Path | None = None) -> Path:
    """Writes a nerfstudio run that ``ns-eval``, ``ns-render`` and ``ns-viewer`` open.

    Args:
        scene: decoded scene.
        output_dir: folder of the run; config.yml and the checkpoint go there.
        data: where the capture is on this machine.

    Returns:
        Path of the run's config.yml.

    Raises:
        CodecError: if the scene names a method or data parser that is not installed here.
    """
    from nerfstudio.configs.method_configs import all_methods

    model = model_of_scene(scene)
    meta = scene.meta
    method, parser = meta.get("method"), meta.get("dataparser", {})
    if method not in all_methods:
        raise CodecError(f"meta: method {method!r} is not installed; update masked-wavelet-nerf")
    if parser.get("name") not in all_dataparsers:
        raise CodecError(
            f"meta: data parser {parser.get('name')!r} is not installed; install its plugin"
        )
    config = copy.deepcopy(all_methods[method])
    dataparser = config_from_json(
        copy.deepcopy(all_dataparsers[parser["name"]]), parser.get("config", {})
    )
    output_dir = output_dir.absolute()
    config.pipeline.model = model.config
    manager: Any = config.pipeline.datamanager
    manager.dataparser = dataparser
    manager.camera_res_scale_factor = _scale_factor(meta)
    if data is not None:
        manager.data = dataparser.data = data.absolute()
    config.output_dir, config.experiment_name, config.timestamp = output_dir, ".", "."
    config.relative_model_dir = (
        output_dir / "nerfstudio_models"
    )  # absolute, so it is taken as it is

    state = {f"_model.{name}": value for name, value in model.state_dict().items()}
    checkpoint = {
        "step": int(meta.get("step", 0)),
        "pipeline": state,
        "optimizers": {},
        "schedulers": {},
        "scalers": {},
    }
    models = output_dir / "nerfstudio_models"
    models.mkdir(parents=True, exist_ok=True)
    for stale in models.glob("step-*"):  # what a killed decoding has left, too
        stale.unlink()
    path = models / f"step-{checkpoint['step']:09d}.ckpt"
    replace_file(path, lambda temporary: torch.save(checkpoint, temporary))
    config_path = output_dir / "config.yml"
    replace_file(config_path, lambda temporary: temporary.write_text(yaml.dump(config), "utf8"))
    return config_path


def _scale_factor(meta: dict[str, Any]) -> float:
    """Size of photos relative to the capture's, as the run was trained and measured."""
    factor = meta.get("camera_res_scale_factor", 1.0)
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise CodecError(
            f"meta: camera_res_scale_factor {factor!r}; expected a positive number: the file is "
            "damaged, ask for it again"
        )
    return float(factor)
