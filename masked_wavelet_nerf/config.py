"""Every number that a user can set, with what it does: that of the scene, and that of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.models.base_model import ModelConfig

from masked_wavelet_nerf.rate import PenaltyName
from masked_wavelet_nerf.settings import SceneSettings


def _model_class() -> type:
    from masked_wavelet_nerf.model import MaskedWaveletModel

    return MaskedWaveletModel


@dataclass
class MaskedWaveletModelConfig(SceneSettings, ModelConfig):
    """A radiance field of masked wavelet coefficients."""

    _target: type = field(default_factory=_model_class)
    """Target class to instantiate."""

    mask_weight: float = 1e-10
    """λ, the weight of the mask penalty: larger gives smaller files. The paper's values are 1e-10,
    5e-11 and 2.5e-11 for 300³ voxels; smaller grids and shorter trainings want more."""
    mask_penalty: PenaltyName = "sum"
    """sum: of raw logits, as in the paper's code. rate: the same, but from the first of rate_steps
    on each logit times what keeping its coefficient costs in the file. mean: the expected kept
    fraction, so that λ (some 1e-3) weighs the same at every grid size; masks then close early while
    the grid is small."""
    rate_steps: tuple[int, ...] = (
        8000,
        10000,
        12000,
        14000,
        16000,
        18000,
        20000,
        22000,
        24000,
        26000,
    )
    """Steps at which costs are measured, some seconds each: how many bits the coder takes, and what
    errors of each band's quantiser cost in pixels."""
    suit_quantiser: bool = True
    """At rate_steps, give every band the quantiser step that suits what errors cost there and what
    λ says that bits are worth; ``bits`` is the finest. Else all bands keep the same width."""
    target_bytes: int | None = None
    """Size of the file to be reached: λ is steered from the first of rate_steps on, until the size
    is there within some per cent. Networks, cameras and occupancy count, too."""
    network_rounding_step: int = 15000
    """Step from which training computes with the integers of network_bits, too: matters below 8."""
    ndc: bool = True
    """Unbounded scenes of forward-facing cameras with depth bounds, as llff-data has them:
    normalised device coordinates, as in NeRF, in place of the contraction. False contracts them,
    too, which lets viewers look elsewhere."""
    init_from: Path | None = None
    """A .mwnf file to start from, for more steps or more photos. It settles what the scene is made
    of (planes, levels, components, bits, box, …); cameras are brought into its coordinates."""
    initial_resolution: int = 128
    """Voxels per side at the start; a box that is no cube gets as many voxels in all."""
    final_resolution: int = 300
    """Voxels per side after the last upsampling."""
    upsample_steps: tuple[int, ...] = (2000, 3000, 4000, 5500, 7000)
    """Steps at which the planes are upsampled, by equal factors. Optimisers restart there."""
    occupancy_steps: tuple[int, ...] = (2000, 4000, 6000, 11000, 16000, 21000, 26000)
    """Bounded scenes: steps at which empty space is looked for, to be skipped from then on."""
    occupancy_resolution: int = 256
    """Most occupancy nodes along an axis."""
    occupancy_threshold: float = 1e-3
    """Opacity of one sample under which space counts as empty."""
    shrink_box: bool = True
    """Bounded scenes: shrink the box to what is occupied at the first occupancy step."""
    restrict_rays: bool = True
    """Bounded scenes: after an occupancy step train only on pixels that can see something."""
    near_plane: float = 0.05
    """Distance from the camera at which sampling starts in training."""
    colour_weight_threshold: float = 1e-4
    """Training: samples of no more weight in their pixel get no colour; they darken it a little,
    which clears empty space."""
    l1_weight_initial: float = 8e-5
    """Weight of the mean absolute value of the density planes or voxels; in bounded scenes until
    the first occupancy step."""
    l1_weight: float = 4e-5
    """Bounded scenes: the same weight afterwards."""
    distortion_weight: float = 0.01
    """Unbounded scenes: weight of the distortion loss, which draws a ray's samples together and
    clears fog (mip-NeRF 360)."""
    ssim_weight: float = 0.0
    """Weight of 1 - SSIM, which looks at neighbouring pixels together, beside the squared error;
    0 for none. Needs patches (``--pipeline.datamanager.patch-size``, at least 11). Where the
    squared error ends at some 1e-3 and 1 - SSIM at 0.05, 0.02 makes them weigh the same; a larger
    weight also makes files larger at the same λ."""
    tv_weight_density: float = 0.0
    """Weight of the total variation of the density planes, taken in the spatial domain."""
    tv_weight_appearance: float = 0.0
    """Weight of the total variation of the appearance planes, taken in the spatial domain."""
    camera_optimizer: CameraOptimizerConfig = field(
        default_factory=lambda: CameraOptimizerConfig(mode="off")
    )
    """nerfstudio's camera optimiser: SO3xR3 corrects the poses of training photos. Slow on a CPU,
    where compiled loops have no gradient of positions."""
    photo_appearance_dim: int = 0
    """Numbers that each training photo has of its own for exposure and white balance, some 8; 0 for
    none. Evaluation shows the average photo, and nothing of it is in the file."""
    eval_num_rays_per_chunk: int = 4096
    """Rays rendered at once in evaluation; on CUDA eight times as many."""
    enable_collider: tyro.conf.Suppress[bool] = True
    """Rays always get a near and a far distance."""
    collider_params: tyro.conf.Suppress[dict[str, float] | None] = None
    """Unused: see near_plane and far_plane."""
    loss_coefficients: tyro.conf.Suppress[dict[str, float]] = field(default_factory=dict)
    """Unused: every loss has a weight of its own."""
    prompt: tyro.conf.Suppress[str | None] = None
    """Unused."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives runs that an earlier version saved what the fields that are newer stand for."""
        self.__dict__.update({**vars(type(self)()), "ndc": False, **state})
