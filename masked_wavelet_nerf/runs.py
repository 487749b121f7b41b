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
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.utils.eval_utils import eval_setup
from rich.progress import track

import masked_wavelet_codec as codec
from masked_wavelet_codec import CodecError, Scene
from masked_wavelet_nerf.clock import now
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.files import replace_file
from masked_wavelet_nerf.loading import stored_numbers, stored_projection, stored_settings
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.ndc import ForwardFacing
from masked_wavelet_nerf.run_scene import scene_of
from masked_wavelet_nerf.scene import (
    config_from_json,
    load_scene_into,
)
from masked_wavelet_nerf.stored_capture import without_coefficients


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

    @property
    def measurable(self) -> Pipeline | None:
        """The pipeline, where there are photos to compare with."""
        manager = getattr(self.pipeline, "datamanager", None)
        return self.pipeline if getattr(manager, "has_photos", True) else None

    def scene(self, extra_meta: dict[str, Any]) -> Scene:
        """What a file holds of it, see :func:`.scene_of`."""
        return scene_of(self.config, self.model, self.pipeline, self.step, extra_meta)


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
    """Writes a nerfstudio run that ``ns-viewer``, ``ns-render`` and ``ns-export`` open by itself.

    Beside configuration and checkpoint the folder holds ``cameras.mwnf``: the scene's cameras and
    coordinates, which take the place of the capture.

    Args:
        scene: decoded scene.
        output_dir: folder of the run.
        data: where the capture is on this machine, if it is: ``ns-eval`` needs its photos.

    Returns:
        Path of the run's config.yml.

    Raises:
        CodecError: if the scene names a method that is not installed here, or, with ``data``, such
            a data parser.
    """
    from nerfstudio.configs.method_configs import all_methods

    model = model_of_scene(scene)
    # Else the viewer would tell the size of the file by a rule of thumb.
    model.rate.measure(model.spatial().kept, sets_prices=False)
    meta = scene.meta
    method = meta.get("method")
    if method not in all_methods:
        raise CodecError(f"meta: method {method!r} is not installed; update masked-wavelet-nerf")
    output_dir = output_dir.absolute()
    cameras = output_dir / "cameras.mwnf"
    config = copy.deepcopy(all_methods[method])
    config.pipeline.model = model.config
    manager: Any = config.pipeline.datamanager
    manager.dataparser = _dataparser_of(scene, manager.dataparser, is_needed=data is not None)
    manager.camera_res_scale_factor = _scale_factor(meta)
    manager.scene = cameras
    manager.data = manager.dataparser.data = cameras if data is None else data.absolute()
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
    codec.write(cameras, without_coefficients(scene))
    config_path = output_dir / "config.yml"
    replace_file(config_path, lambda temporary: temporary.write_text(yaml.dump(config), "utf8"))
    return config_path


def _dataparser_of(scene: Scene, default: Any, is_needed: bool) -> Any:
    parser = scene.meta.get("dataparser")
    parser = parser if isinstance(parser, dict) else {}
    if parser.get("name") in all_dataparsers:
        known = copy.deepcopy(all_dataparsers[parser["name"]])
        return config_from_json(known, parser.get("config", {}))
    if is_needed:
        raise CodecError(
            f"meta: data parser {parser.get('name')!r} is not installed; install its plugin, or "
            "decode without --data"
        )
    return default


def _scale_factor(meta: dict[str, Any]) -> float:
    """Size of photos relative to the capture's, as the run was trained and measured."""
    factor = meta.get("camera_res_scale_factor", 1.0)
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise CodecError(
            f"meta: camera_res_scale_factor {factor!r}; expected a positive number: the file is "
            "damaged, ask for it again"
        )
    return float(factor)
