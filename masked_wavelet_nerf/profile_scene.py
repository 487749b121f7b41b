"""A nerfstudio trainer to be measured: of a run, or of a stand-in for a trained scene.

The stand-in is a hollow tube around the z axis that fills most of the box, as objects do once the
box was shrunk to them: some 40 occupied samples a ray and 8 coloured ones at 128 voxels, spread
over all planes, so that look-ups hit the caches no better than a real object's. With the
vector-matrix factorisation it is a single component, ring (x, y) times profile (z).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from PIL import Image

from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.datasets.sample import CAMERA_ANGLE_X, CAMERA_RADIUS, look_at_origin
from masked_wavelet_nerf.masking import largest_integer, quantiser_step
from masked_wavelet_nerf.method import masked_wavelet_bounded
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.planes import INITIAL_LOGIT, CoefficientGrid
from masked_wavelet_nerf.runs import RunError, latest_checkpoint

PHOTO_SIZE = 100
BALL_RADIUS = 0.9
"""World units, of the ball in the photos."""
PEAK = 18.0
"""Largest density feature."""
RING_RADIUS, RING_WIDTH = 0.55, 0.045
"""Features are PEAK · exp(-((ρ - radius) / width)²) at a distance ρ from the axis, …"""
HALF_HEIGHT = 0.55
"""… where |z| is less than about this; all of them in [-1, 1]³."""
KEPT = 0.03
"""Fraction of coefficients that stays, about."""
_NEVER = 10**9
_BITS = 8


def write_ball_capture(folder: Path, num_views: int = 8) -> Path:
    """Writes photos of a ball on nothing in Blender format, and returns ``folder``.

    What they show does not matter: nothing is learnt from them.
    """
    for split, count in (("train", num_views), ("val", 1), ("test", 1)):
        (folder / split).mkdir(parents=True)
        frames = []
        for index in range(count):
            pose = look_at_origin(2.4 * index, 0.2 + 0.1 * index)
            path = f"./{split}/r_{index}"
            Image.fromarray(_photo(pose)).save(folder / f"{path}.png")
            frames.append({"file_path": path, "transform_matrix": pose.tolist()})
        content = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _photo(pose: np.ndarray) -> np.ndarray:
    """(size, size, 4) bytes; colours are the ball's normals."""
    offset = (np.arange(PHOTO_SIZE) + 0.5) / PHOTO_SIZE * 2 - 1
    x, y = np.meshgrid(offset * np.tan(CAMERA_ANGLE_X / 2), -offset * np.tan(CAMERA_ANGLE_X / 2))
    directions = np.stack((x, y, -np.ones_like(x)), axis=-1) @ pose[:3, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    along = directions @ -pose[:3, 3]  # distance to the point nearest to the ball's centre
    depth = BALL_RADIUS**2 - (CAMERA_RADIUS**2 - along**2)
    hit = pose[:3, 3] + directions * (along - np.sqrt(depth.clip(0)))[..., None]
    colour = 0.5 + 0.5 * hit / BALL_RADIUS
    rgba = np.concatenate((colour.clip(0, 1), np.ones_like(colour[..., :1])), axis=-1)
    return np.round(255 * rgba * (depth > 0)[..., None]).astype(np.uint8)


def stand_in_trainer(
    folder: Path, size: int, rays: int, device: str, settings: dict[str, object] | None = None
) -> Trainer:
    """A trainer in the middle of training the stand-in.

    Args:
        folder: an empty one, for capture and logs.
        size: voxels per side.
        rays: rays of a training step.
        device: cpu or cuda.
        settings: fields of the model's configuration to change.
    """
    config = copy.deepcopy(masked_wavelet_bounded.config)
    assert isinstance(config, TrainerConfig)
    changes = {
        "initial_resolution": size,
        "final_resolution": size,
        "upsample_steps": (),
        "occupancy_steps": (),
        **(settings or {}),
    }
    for name, value in changes.items():
        setattr(config.pipeline.model, name, value)
    manager = config.pipeline.datamanager
    capture = write_ball_capture(folder / "capture")
    manager.dataparser = BlenderDataParserConfig(data=capture)  # pyright: ignore[reportAttributeAccessIssue]
    manager.data = capture
    manager.train_num_rays_per_batch = rays  # pyright: ignore[reportAttributeAccessIssue]
    trainer = _start(config, folder, device)
    fill_with_tube(model_of(trainer))
    # Asked anew, now that there is empty space: only pixels that see something are trained on.
    trainer.callbacks = trainer.pipeline.get_training_callbacks(
        TrainingCallbackAttributes(
            trainer.optimizers, trainer.grad_scaler, trainer.pipeline, trainer
        )
    )
    return trainer


def run_trainer(load_config: Path, data: Path | None, folder: Path, device: str) -> Trainer:
    """A trainer that goes on with a run, whose files it leaves alone.

    Args:
        load_config: the run's config.yml.
        data: where the capture is now, if not where it was trained from.
        folder: an empty one, for logs.
        device: cpu or cuda.

    Raises:
        RunError: if there is no such run, it is another method's, or its capture cannot be read.
    """
    if not load_config.is_file():
        raise RunError(f"{load_config}: no such file; expected the config.yml of a trained run")
    config = yaml.load(load_config.read_text("utf8"), Loader=yaml.Loader)
    if not isinstance(getattr(config.pipeline, "model", None), MaskedWaveletModelConfig):
        raise RunError(f"{load_config}: a run of {config.method_name}; expected a masked-wavelet")
    config.load_dir = latest_checkpoint(config.get_checkpoint_dir()).parent
    if data is not None:
        config.data = config.pipeline.datamanager.data = data
        config.pipeline.datamanager.dataparser.data = data
    try:
        trainer = _start(config, folder, device)
    except (OSError, AssertionError) as error:
        raise RunError(f"{data or load_config}: the capture cannot be read: {error}") from error
    trainer.callbacks = []  # whatever the schedule had in store
    return trainer


def model_of(trainer: Trainer) -> MaskedWaveletModel:
    """The model that ``trainer`` trains."""
    model = trainer.pipeline.model
    assert isinstance(model, MaskedWaveletModel)
    return model


def _start(config: TrainerConfig, folder: Path, device: str) -> Trainer:
    config.machine.device_type = device  # pyright: ignore[reportAttributeAccessIssue]
    config.output_dir, config.experiment_name, config.timestamp = folder / "run", ".", "profiled"
    config.vis = "tensorboard"
    config.steps_per_eval_batch = config.steps_per_eval_image = _NEVER
    config.steps_per_eval_all_images = config.steps_per_save = _NEVER
    config.logging.local_writer.enable = False
    torch.manual_seed(config.machine.seed)
    trainer = config.setup()
    assert isinstance(trainer, Trainer)
    trainer.setup("test")
    # Same work, but every step finds the scene as it was.
    for optimiser in trainer.optimizers.optimizers.values():
        for group in optimiser.param_groups:
            group["lr"] = 0.0
    for scheduler in trainer.optimizers.schedulers.values():
        scheduler.base_lrs = [0.0] * len(scheduler.base_lrs)
    trainer._after_train = lambda: None  # no checkpoint, and no wait for the viewer's users
    return trainer


@torch.no_grad()
def fill_with_tube(model: MaskedWaveletModel) -> None:
    """Replaces the grids by the tube under masks that are mostly closed, and looks for space."""
    generator = torch.Generator().manual_seed(0)
    for name, grid in model.field.grids().items():
        channels = grid.coefficients[0].shape[0]
        scale = 0.1 if name.startswith("appearance") else 1e-3
        spatial = scale * torch.randn(channels, *grid.spatial_size, generator=generator)
        is_tube = name in ("density_planes.0", "density_lines.0", "density_voxels.0")
        if is_tube:
            spatial[0] = _tube(*grid.spatial_size)
        rebuilt = CoefficientGrid(spatial, grid.transform, _BITS, bool(len(grid.logits)))
        grid.load_state_dict(rebuilt.state_dict())
        for values, logits in zip(grid.coefficients, grid.logits, strict=False):
            values, everything = values.detach(), torch.ones_like(values, dtype=torch.bool)
            keep = torch.rand(values.shape, generator=generator).to(values.device) < KEPT
            if is_tube:
                keep |= (
                    values.abs() > quantiser_step(values, everything, largest_integer(_BITS)) / 2
                )
            logits.copy_(torch.where(keep, INITIAL_LOGIT, -INITIAL_LOGIT))
    model.refresh()
    model.update_occupancy()


def _tube(*size: int) -> torch.Tensor:
    """Density features of a line (z), a plane (y, x) or a volume (z, y, x)."""
    if len(size) == 1:
        return _walls(*size)
    ring = _ring(*size[-2:])
    return ring if len(size) == 2 else _walls(size[0])[:, None, None] * ring


def _ring(height: int, width: int) -> torch.Tensor:
    """Density features on the texels of the (x, y) plane."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return PEAK * torch.exp(-(((torch.hypot(x, y) - RING_RADIUS) / RING_WIDTH) ** 2))


def _walls(length: int) -> torch.Tensor:
    """1 within the tube's height, 0 beyond, on the texels of the z line."""
    return torch.sigmoid(40 * (HALF_HEIGHT - torch.linspace(-1, 1, length).abs()))
