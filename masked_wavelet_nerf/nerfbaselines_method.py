"""The method as nerfbaselines drives it: its ``Method`` protocol, by what nerfstudio makes public.

The harness's photos become a capture in a temporary folder, our trainer trains on it, and the
harness says when to step, render and save. What is rendered, during training too, is what the
exported file holds, so what the harness measures is what a file gives.

A checkpoint folder holds

    scene.mwnf           the exported file: all that rendering needs
    settings.json        flags, and how many steps were trained
    nerfstudio_models/   what resuming needs: weights and the optimisers' state

Nothing of nerfbaselines is imported here: :mod:`.nerfbaselines_spec` registers the class with it.
Letters: H, W image rows and columns.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from torch import Tensor

import masked_wavelet_codec as codec
from masked_wavelet_nerf import provenance
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.loading import Camera, LoadedScene
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.nerfbaselines_capture import to_opengl, write_capture
from masked_wavelet_nerf.peers import leave_to_caller, our_config
from masked_wavelet_nerf.presets import Preset
from masked_wavelet_nerf.runs import Run
from masked_wavelet_nerf.stored_capture import StoredCapture

_SCENE, _SETTINGS, _MODELS = "scene.mwnf", "settings.json", "nerfstudio_models"
_HALF_BOX = 1.5
"""Of bounded scenes, world units: that of nerfstudio's parser of Blender scenes."""
_BACKGROUNDS = {(255, 255, 255): "white", (0, 0, 0): "black"}
"""Colours of a data set that a model can have behind the scene."""


class HarnessError(UserError):
    """The harness gave what cannot be trained on, or no checkpoint of this method."""


@runtime_checkable
class HarnessCameras(Protocol):
    """What is used of nerfbaselines' cameras: N pinholes, or one without the leading axis."""

    @property
    def poses(self) -> np.ndarray:
        """Camera to world, (N, 3, 4): x right, y down, z forward."""
        ...

    @property
    def intrinsics(self) -> np.ndarray:
        """fx, fy, cx, cy in pixels, (N, 4)."""
        ...

    @property
    def image_sizes(self) -> np.ndarray:
        """Width and height in pixels, (N, 2)."""
        ...

    def item(self) -> HarnessCameras:
        """The only camera."""
        ...


class NerfbaselinesMethod:
    """A training, a decoded scene, or a training that goes on from a checkpoint.

    Args:
        checkpoint: folder that :meth:`save` wrote; without ``train_dataset`` its scene is rendered.
        train_dataset: nerfbaselines' Dataset with its images loaded; pinholes, sRGB.
        config_overrides: ``method`` (masked-wavelet or masked-wavelet-bounded) and flags of
            ``ns-train`` by name, as ``pipeline.model.mask_weight``. Values are as on a command
            line: several numbers are a list, or words. They go before those of the checkpoint.

    Raises:
        HarnessError: if there is neither checkpoint nor data set, or one of them cannot be used.
        PeersError: if ``method`` is none of ours.
        CodecError: if the checkpoint's scene is damaged.
    """

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        train_dataset: Mapping[str, Any] | None = None,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        if checkpoint is None and train_dataset is None:
            raise HarnessError("nothing to do; expected a checkpoint, a train_dataset or both")
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._num_steps, flags = 0, {}
        if self._checkpoint is not None:
            self._num_steps, flags = _read_settings(self._checkpoint)
        elif train_dataset is not None:
            flags = _background_flags(train_dataset)
        self._flags = {**flags, **(config_overrides or {})}
        self._loaded_step = None if checkpoint is None else self._num_steps
        self._folder = tempfile.TemporaryDirectory(prefix="masked-wavelet-")
        self._config = _make_config(self._flags, Path(self._folder.name))
        self._trainer: Trainer | None = None
        self._shown: _Shown | None = None
        if train_dataset is not None:
            self._trainer = self._set_up(train_dataset)

    def _set_up(self, dataset: Mapping[str, Any]) -> Trainer:
        _write_dataset(Path(self._folder.name), dataset)
        config = self._config
        if self._checkpoint is not None and self._num_steps > 0:
            config.load_dir = self._checkpoint / _MODELS
        # As ns-train does.
        random.seed(config.machine.seed)
        np.random.seed(config.machine.seed)
        torch.manual_seed(config.machine.seed)
        trainer, known = config.setup(), list(writer.EVENT_WRITERS)
        trainer.setup("test")
        # The harness keeps the log. nerfstudio's writers last as long as the process, but the
        # folder of this one only as long as this object.
        for events in set(writer.EVENT_WRITERS) - set(known):
            if isinstance(events, writer.TensorboardWriter):
                events.tb_writer.close()
            writer.EVENT_WRITERS.remove(events)
        return trainer

    @classmethod
    def get_method_info(cls) -> dict[str, Any]:
        """What data sets have to offer: the harness undistorts photos of other cameras."""
        return {
            "method_id": "masked-wavelet",
            "required_features": frozenset(("color",)),
            "supported_camera_models": frozenset(("pinhole",)),
            "supported_outputs": ("color", "depth"),
            "can_resume_training": True,
        }

    def get_info(self) -> dict[str, Any]:
        """That of :meth:`get_method_info`, and this model's configuration and steps."""
        config = self._config
        return {
            **self.get_method_info(),
            "num_iterations": config.max_num_iterations,
            "loaded_step": self._loaded_step,
            "loaded_checkpoint": None if self._checkpoint is None else str(self._checkpoint),
            "batch_size": config.pipeline.datamanager.train_num_rays_per_batch,  # pyright: ignore[reportAttributeAccessIssue]
            "eval_batch_size": config.pipeline.model.eval_num_rays_per_chunk,
            "hparams": provenance.configuration(config),
        }

    def train_iteration(self, step: int) -> dict[str, float]:
        """Trains one step, and returns its losses and metrics.

        Raises:
            HarnessError: if there are no photos to train on.
            TrainingError: if a loss is not finite.
        """
        trainer = self._trainer
        if trainer is None:
            raise HarnessError("no photos to train on; expected a train_dataset: give it, too")
        self._shown = None
        trainer.step = step
        trainer.pipeline.train()
        self._call_back(trainer, step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        loss, losses, metrics = trainer.train_iteration(step)
        self._call_back(trainer, step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        self._num_steps = step + 1
        num_rays = trainer.pipeline.datamanager.get_train_rays_per_batch()
        found = {**metrics, **losses, "loss": loss, "num_rays": num_rays}
        return {name: float(value) for name, value in found.items()}

    @staticmethod
    def _call_back(trainer: Trainer, step: int, location: TrainingCallbackLocation) -> None:
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, location=location)

    def render(
        self, camera: HarnessCameras, *, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Renders what the exported file holds, or would hold now.

        Args:
            camera: one pinhole, in the data set's coordinates.
            options: not used: all outputs are made, and there are no embeddings.

        Returns:
            ``color``, (H, W, 3) in [0, 1], and ``depth``, (H, W): expected distances along rays in
            the data set's unit.
        """
        del options
        if self._shown is None:
            scene = self._run().scene({}) if self._trainer else codec.read(self._scene_path())
            self._shown = _Shown.of(scene, self._config.machine.device_type)
        return self._shown.render(camera.item())

    def save(self, path: str) -> None:
        """Writes a checkpoint folder, see the module; of a decoded scene, copies its own.

        Raises:
            TrainingError: if a parameter is not finite, or the weights cannot be written.
        """
        folder = Path(path)
        if self._trainer is None:
            assert self._checkpoint is not None
            shutil.copytree(self._checkpoint, folder, dirs_exist_ok=True)
            return
        if self._num_steps > 0:  # else there is nothing to go on from
            self._trainer.checkpoint_dir = folder / _MODELS
            self._trainer.save_checkpoint(self._num_steps - 1)
        export_run(self._run(), folder / _SCENE)
        settings = {"steps": self._num_steps, "flags": self._flags}
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1), "utf8")

    def get_train_embedding(self, index: int) -> None:
        """None: a file has no embeddings of photos."""
        del index

    def optimize_embedding(
        self, dataset: Mapping[str, Any], *, embedding: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Never done.

        Raises:
            NotImplementedError: as the harness expects of methods without embeddings.
        """
        raise NotImplementedError("masked-wavelet renders all photos alike: it has no embeddings")

    def _run(self) -> Run:
        assert self._trainer is not None
        pipeline = self._trainer.pipeline
        assert isinstance(pipeline.model, MaskedWaveletModel)
        return Run(self._config, pipeline.model, pipeline, max(self._num_steps - 1, 0))

    def _scene_path(self) -> Path:
        assert self._checkpoint is not None
        return self._checkpoint / _SCENE


@dataclass(frozen=True)
class _Shown:
    """A decoded scene, rendered in the coordinates of the harness."""

    scene: LoadedScene
    to_scene: Float[Tensor, "4 4"]
    """From the harness's coordinates: turns, shifts and scales."""

    @staticmethod
    def of(scene: codec.Scene, device: str) -> _Shown:
        to_scene = StoredCapture(scene).transform
        assert to_scene is not None  # all that were trained here have it
        return _Shown(LoadedScene(scene, device), to_scene)

    def render(self, camera: HarnessCameras) -> dict[str, np.ndarray]:
        linear, shift = self.to_scene[:3, :3], self.to_scene[:3, 3:]
        scale = float(torch.linalg.det(linear)) ** (1 / 3)
        pose = torch.from_numpy(to_opengl(camera.poses)).double()
        turned, moved = linear / scale @ pose[:, :3], linear @ pose[:, 3:] + shift
        fx, fy, cx, cy = camera.intrinsics.tolist()
        width, height = camera.image_sizes.tolist()
        rgb, depth = self.scene.render(
            Camera(torch.cat((turned, moved), dim=1).float(), fx, fy, cx, cy, width, height)
        )
        return {"color": rgb.cpu().numpy(), "depth": (depth[..., 0] / scale).cpu().numpy()}


# --- what the harness gives -----------------------------------------------------------------------


def _make_config(flags: Mapping[str, Any], folder: Path) -> TrainerConfig:
    preset = Preset(
        name="nerfbaselines",
        method=str(flags.get("method", "masked-wavelet")),
        dataparser="nerfstudio-data",
        flags={name: _to_words(value) for name, value in flags.items() if name != "method"},
    )
    try:
        config = our_config(preset, folder)
    except SystemExit as error:  # of what parses command lines, which has said why
        raise HarnessError(
            f"{shlex.join(preset.arguments(folder)[:-3])}: cannot be parsed; expected flags of "
            "ns-train, as pipeline.model.mask_weight=1e-9: mend the settings given (--set)"
        ) from error
    parser = config.pipeline.datamanager.dataparser  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(parser, NerfstudioDataParserConfig)
    assert isinstance(config.pipeline.model, MaskedWaveletModelConfig)
    parser.downscale_factor = 1  # photos are as large as the harness wants them
    if not config.pipeline.model.contract:  # then the box is where the data set says, at the origin
        parser.orientation_method = parser.center_method = "none"
        parser.auto_scale_poses, parser.scene_scale = False, _HALF_BOX
    config.output_dir, config.experiment_name, config.timestamp = folder / "runs", ".", "."
    leave_to_caller(config)
    return config


def _to_words(value: Any) -> list[Any]:
    if isinstance(value, str):
        return shlex.split(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _write_dataset(folder: Path, dataset: Mapping[str, Any]) -> None:
    colours = dataset["metadata"].get("color_space", "srgb")
    if colours != "srgb":
        raise HarnessError(
            f"photos in {colours} colours; expected srgb: choose a data set of ordinary photos"
        )
    cameras, masks = dataset["cameras"], dataset.get("masks")
    write_capture(
        folder,
        poses=cameras.poses,
        intrinsics=cameras.intrinsics,
        sizes=cameras.image_sizes,
        photos=list(dataset["images"]),
        masks=None if masks is None else list(masks),
    )


def _background_flags(dataset: Mapping[str, Any]) -> dict[str, str]:
    """For photos with transparency: they are measured over the data set's colour."""
    colour = dataset["metadata"].get("background_color")
    name = None if colour is None else _BACKGROUNDS.get(tuple(np.asarray(colour).tolist()))
    return {} if name is None else {"pipeline.model.background_color": name}


def _read_settings(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    path = checkpoint / _SETTINGS
    try:
        settings = json.loads(path.read_text("utf8"))
        return int(settings["steps"]), dict(settings["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HarnessError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); expected a checkpoint that "
            "nerfbaselines saved of masked-wavelet: check the path, or train again"
        ) from error
