"""The methods as nerfstudio finds them: entry points, nothing else."""

from __future__ import annotations

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification

from masked_wavelet_nerf import ns_export
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.datamanager import WaveletDataManagerConfig
from masked_wavelet_nerf.optimisers import FusedAdamOptimizerConfig, RestartedDecaySchedulerConfig
from masked_wavelet_nerf.pipeline import WaveletPipelineConfig
from masked_wavelet_nerf.trainer import WaveletTrainer

ns_export.install()


def _optimisers(max_steps: int, restarts: tuple[int, ...]) -> dict:
    def group(lr: float, restarts: tuple[int, ...] = restarts) -> dict:
        return {
            "optimizer": FusedAdamOptimizerConfig(lr=lr),
            "scheduler": RestartedDecaySchedulerConfig(max_steps=max_steps, restarts=restarts),
        }

    return {
        "grids": group(0.02),
        "masks": group(0.02),
        "networks": group(1e-3),
        "camera_opt": group(1e-3, restarts=()),
    }


def _config(
    name: str, dataparser, model: MaskedWaveletModelConfig, steps: int, rays: int
) -> TrainerConfig:
    return TrainerConfig(
        _target=WaveletTrainer,
        method_name=name,
        steps_per_save=1000,
        steps_per_eval_batch=500,
        steps_per_eval_image=1000,
        steps_per_eval_all_images=steps,
        max_num_iterations=steps,
        mixed_precision=False,
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        pipeline=WaveletPipelineConfig(
            datamanager=WaveletDataManagerConfig(
                dataparser=dataparser,
                train_num_rays_per_batch=rays,
                eval_num_rays_per_batch=rays,
            ),
            model=model,
        ),
        optimizers=_optimisers(steps, model.upsample_steps),
        viewer=ViewerConfig(num_rays_per_chunk=1 << 12),
        vis="viewer",
    )


masked_wavelet = MethodSpecification(
    config=_config(
        "masked-wavelet",
        NerfstudioDataParserConfig(),
        MaskedWaveletModelConfig(),
        steps=30000,
        rays=4096,
    ),
    description="Masked wavelet planes: compact fields of real captures.",
)

masked_wavelet_bounded = MethodSpecification(
    config=_config(
        "masked-wavelet-bounded",
        BlenderDataParserConfig(),
        MaskedWaveletModelConfig(
            contract=False,
            density_shift=-10.0,
            background_color="white",
            near_plane=2.0,
            far_plane=6.0,
        ),
        steps=30000,
        rays=4096,
    ),
    description="Masked wavelet planes: objects in a box, Blender format (the paper's setting).",
)
