"""What a scene is made of and how it is rendered: the part of the configuration that files hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masked_wavelet_nerf.field import FieldConfig
from masked_wavelet_nerf.planes import PlanesName, ReduceName
from masked_wavelet_nerf.wavelet import TransformName


@dataclass
class SceneSettings:
    """Of a field and its rendering; knows nothing of training, or of nerfstudio."""

    planes: PlanesName = "vm"
    """vm: three planes, each times a line (TensoRF). triplane: three planes only. voxels: a block
    of voxels, which wants fewer voxels and components (1 for density, 12 for appearance)."""
    triplane_reduce: ReduceName = "product"
    """How a tri-plane combines its three planes."""
    transform: TransformName = "wavelet"
    """What planes or voxels are stored as: wavelet or DCT coefficients, or their own values."""
    wavelet: str = "bior4.4"
    """Discrete wavelet by its PyWavelets name: haar, db2, bior2.2, bior4.4, coif1, sym4, …"""
    levels: int = 4
    """Levels of the wavelet transform, 0 to 6."""
    level_scaling: bool = True
    """Store finer levels magnified, so that they are learnt more slowly."""
    texel_units: bool = False
    """Store coefficients so that they count as much as texels at any level (voxels always do).
    Else, as in the paper, coarse levels are many times as large, and as slow to learn. Wants half
    of the learning rate that is best without."""
    bits: int | None = 8
    """Width of the quantiser in training and in the file, 2 to 16; None trains without one."""
    masks: bool = True
    """Give every coefficient a trainable mask."""
    num_density_components: int = 16
    """Density components of each plane, or of the voxels."""
    num_appearance_components: int = 48
    """Appearance components of each plane, or of the voxels."""
    appearance_dim: int = 27
    """Features of the colour network, after the linear appearance map."""
    hidden_dim: int = 128
    """Width of the colour network's two hidden layers."""
    num_frequencies: int = 2
    """Frequencies of the encoding of appearance features and view direction."""
    network_biases: bool = True
    """Give the colour network biases, as in the paper. Without, tiny-cuda-nn can run it on CUDA."""
    network_bits: int | None = 8
    """Width of the integers, 2 to 16, that appearance map and colour network become in evaluation
    and in the file; None keeps floats, four times as large."""
    density_shift: float = -4.0
    """Density = softplus(features + shift): how empty the scene starts. Unbounded scenes start as
    thin fog, or rays would learn from what is nearest and farthest; bounded ones (-10) empty."""
    distance_scale: float = 25.0
    """Factor on the distance between samples, as in TensoRF."""
    contract: bool = True
    """Unbounded: contract all of space into the planes' cube. Else the scene box is the cube."""
    far_plane: float = 1000.0
    """Distance from the camera at which sampling ends; in bounded scenes in training alone."""
    step_ratio: float = 0.5
    """Bounded scenes: distance between samples, in voxels."""
    num_samples: int = 48
    """Unbounded scenes: samples along a ray, placed where a coarse level of the planes has density
    and a few everywhere."""
    num_proposal_bins: int = 96
    """Unbounded scenes: bins along a ray in which that density is looked up, half of them within a
    distance of 1."""
    proposal_resolution: int = 64
    """Unbounded scenes: texels per side of that coarse level."""
    colour_mass: float = 0.05
    """Neighbouring samples share a colour, at their centre of mass, for about so much weight in
    their pixel. 0 gives each its own, which takes two to four times as many."""
    render_weight_threshold: float = 1e-3
    """Rendering: what has no more than this share of its ray's opacity takes the colour of the rest
    of it."""
    background_color: Literal["white", "black", "random"] = "random"
    """Colour behind the scene; random trains against a random one and renders over black."""

    def field_config(self) -> FieldConfig:
        """The part that fixes the field's parameters."""
        return FieldConfig(
            planes=self.planes,
            reduce=self.triplane_reduce,
            num_density_components=self.num_density_components,
            num_appearance_components=self.num_appearance_components,
            appearance_dim=self.appearance_dim,
            hidden_dim=self.hidden_dim,
            num_frequencies=self.num_frequencies,
            network_biases=self.network_biases,
            network_bits=self.network_bits,
            density_shift=self.density_shift,
            transform=self.transform,
            wavelet=self.wavelet,
            num_levels=self.levels,
            level_scaling=self.level_scaling,
            texel_units=self.texel_units,
            bits=self.bits,
            masks=self.masks,
        )
