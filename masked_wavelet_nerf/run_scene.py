"""What a file holds of a run: the scene that the codec writes, with capture and configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.utils.rich_utils import CONSOLE

from masked_wavelet_codec import Cameras as SceneCameras
from masked_wavelet_codec import Scene, round_poses
from masked_wavelet_nerf import __version__
from masked_wavelet_nerf.datamanager import WaveletDataManager
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.scene import config_to_json, scene_from_model

_NUM_DISTORTION = 6


def scene_of(
    config: TrainerConfig,
    model: MaskedWaveletModel,
    pipeline: Pipeline | None,
    step: int,
    extra_meta: dict[str, Any],
) -> Scene:
    """The scene of a run: everything that rendering it elsewhere needs.

    Args:
        config: of the run.
        model: trained model; nothing of the scene is shared with it.
        pipeline: whose data manager knows the capture; None where that is not at hand.
        step: of training.
        extra_meta: further entries of the file's meta.

    Raises:
        UserError: if the run's data parser is not registered with nerfstudio.
    """
    manager = None if pipeline is None else pipeline.datamanager
    if isinstance(manager, WaveletDataManager) and not manager.has_photos:
        assert manager.stored is not None
        known = manager.stored.scene
        dataparser, cameras = known.meta.get("dataparser"), known.cameras
        extra_meta = {**manager.stored.notes(), **extra_meta}
    else:
        dataparser, cameras = _dataparser_meta(config), None
        if manager is not None:
            assert isinstance(manager, VanillaDataManager)
            outputs = manager.train_dataparser_outputs
            dataparser["transform"] = outputs.dataparser_transform.tolist()
            dataparser["scale"] = float(outputs.dataparser_scale)
            cameras = _scene_cameras(manager.train_dataset.cameras, manager.eval_dataset.cameras)
    meta: dict[str, Any] = {
        "method": config.method_name,
        "method_version": __version__,
        "step": step,
        "model": config_to_json(model.config),
        "dataparser": dataparser,
        "camera_res_scale_factor": float(config.pipeline.datamanager.camera_res_scale_factor),  # pyright: ignore[reportAttributeAccessIssue]
        **extra_meta,
    }
    return scene_from_model(model, model.config.bits or 8, meta, cameras)


def _dataparser_meta(config: TrainerConfig) -> dict[str, Any]:
    dataparser = config.pipeline.datamanager.dataparser  # pyright: ignore[reportAttributeAccessIssue]
    for name, known in all_dataparsers.items():
        if type(known) is type(dataparser):
            return {"name": name, "config": config_to_json(dataparser)}
    raise UserError(
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

    exact = SceneCameras(
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
    # They turn by less than 1.4e-5 radians; as floats they were a sixth of a small file.
    return round_poses(exact)
