"""Density and colour at points, from planes of masked wavelet coefficients. Knows no rays.

Density = softplus(Σ features + shift) (TensoRF; shift = -10). Colour = sigmoid(MLP(a, d, γ(a),
γ(d))) with a = appearance map (linear, no bias) of the appearance features, d the view direction
and γ(x) = (sin 2^k x, cos 2^k x), k < number of frequencies.

Letters: N points, A appearance features after the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from masked_wavelet_nerf import accelerators, graphs, native
from masked_wavelet_nerf.masking import RoundedLinear
from masked_wavelet_nerf.planes import (
    CoefficientGrid,
    FactorisedGrid,
    PlanesName,
    ReduceName,
    SpatialGrid,
    to_spatial,
)
from masked_wavelet_nerf.volumes import VolumeTransform
from masked_wavelet_nerf.voxels import VoxelGrid
from masked_wavelet_nerf.wavelet import TransformName, make_transform


@dataclass(frozen=True)
class FieldConfig:
    """Everything that fixes the field's parameters; stored in the bitstream."""

    planes: PlanesName = "vm"
    reduce: ReduceName = "product"
    num_density_components: int = 16
    num_appearance_components: int = 48
    appearance_dim: int = 27
    hidden_dim: int = 128
    num_frequencies: int = 2
    network_biases: bool = True
    network_bits: int | None = 8
    density_shift: float = -10.0
    transform: TransformName = "wavelet"
    wavelet: str = "bior4.4"
    num_levels: int = 4
    level_scaling: bool = True
    texel_units: bool = False
    bits: int | None = 8
    masks: bool = True


class SpatialField(NamedTuple):
    """Both grids in the spatial domain, and what was counted on the way."""

    density: SpatialGrid
    appearance: SpatialGrid
    kept: list[Int[Tensor, " _"]]
    """Kept coefficients per level of each grid, in the order of :meth:`WaveletPlaneField.grids`."""
    logit_sum: Float[Tensor, ""] | None
    """Σ of all logits, times their prices, where it costs nothing."""


class WaveletPlaneField(nn.Module):
    """Density and appearance grids, the appearance map and the colour network.

    Args:
        config: see :class:`FieldConfig`.
        resolution: voxels along x, y and z.
    """

    def __init__(self, config: FieldConfig, resolution: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        transform = make_transform(
            config.transform,
            wavelet=config.wavelet,
            num_levels=config.num_levels,
            level_scaling=config.level_scaling,
            texel_units=config.texel_units,
        )

        def grid(num_components: int) -> FactorisedGrid | VoxelGrid:
            if config.planes == "voxels":
                return VoxelGrid(
                    num_components,
                    resolution,
                    VolumeTransform(transform),
                    bits=config.bits,
                    masked=config.masks,
                )
            return FactorisedGrid(
                num_components,
                resolution,
                transform,
                planes=config.planes,
                reduce=config.reduce,
                bits=config.bits,
                masked=config.masks,
            )

        self.density_grid = grid(config.num_density_components)
        self.appearance_grid = grid(config.num_appearance_components)

        def linear(num_inputs: int, num_outputs: int, bias: bool) -> RoundedLinear:
            return RoundedLinear(num_inputs, num_outputs, bias, config.network_bits)

        self.appearance_map = linear(
            self.appearance_grid.num_features, config.appearance_dim, False
        )
        input_dim = (config.appearance_dim + 3) * (1 + 2 * config.num_frequencies)
        self.colour_network = nn.Sequential(
            linear(input_dim, config.hidden_dim, config.network_biases),
            nn.ReLU(inplace=True),
            linear(config.hidden_dim, config.hidden_dim, config.network_biases),
            nn.ReLU(inplace=True),
            linear(config.hidden_dim, 3, config.network_biases),
        )
        last = self.colour_network[-1]
        assert isinstance(last, nn.Linear)
        if config.network_biases:
            nn.init.zeros_(last.bias)
        self._recording = graphs.Recording()
        self._num_coefficients: tuple[tuple[int, int, int], list[list[int]]] | None = None

    @property
    def resolution(self) -> tuple[int, int, int]:
        """Voxels along x, y and z."""
        return self.density_grid.resolution

    def grids(self) -> dict[str, CoefficientGrid]:
        """Planes and lines, or voxels, by the name they have in the bitstream."""
        named: dict[str, CoefficientGrid] = {}
        for part, grid in (("density", self.density_grid), ("appearance", self.appearance_grid)):
            named.update({f"{part}_{name}": member for name, member in grid.named().items()})
        return named

    def num_coefficients(self) -> list[list[int]]:
        """Of each level of each grid, in the order of :meth:`grids`."""
        if self._num_coefficients is None or self._num_coefficients[0] != self.resolution:
            found = [[p.numel() for p in grid.coefficients] for grid in self.grids().values()]
            self._num_coefficients = self.resolution, found
        return self._num_coefficients[1]

    def networks(self) -> dict[str, nn.Parameter]:
        """Appearance map and colour network by the names they have in the bitstream."""
        modules: dict[str, nn.Module] = {
            "appearance_map": self.appearance_map,
            "colour_network": self.colour_network,
        }
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }

    def to_spatial(self, num_levels: int | None = None, threshold: float = 0.0) -> SpatialField:
        """Quantise → mask → inverse transform of every grid: once per step, not per chunk.

        On CUDA, while gradients are wanted, what is returned lasts until the next call.
        """
        grids = self.density_grid, self.appearance_grid
        both, logit_sum = to_spatial(grids, num_levels, threshold, self._recording)
        (density, density_kept), (appearance, appearance_kept) = both
        return SpatialField(density, appearance, density_kept + appearance_kept, logit_sum)

    def density(self, spatial: SpatialField, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Density σ ≥ 0 at points in [-1, 1]³ (per unit of scaled length)."""
        features = self.density_grid.summed_features(spatial.density, points)
        return F.softplus(features + self.config.density_shift)

    def density_at_nodes(self, spatial: SpatialField, size: int) -> Float[Tensor, "size size size"]:
        """Density at the nodes (x, y, z) of a regular grid over [-1, 1]³, by a coarse level."""
        features = self.density_grid.sums_at_nodes(spatial.density, size)
        return F.softplus(features + self.config.density_shift)

    def colour(
        self,
        spatial: SpatialField,
        points: Float[Tensor, "N 3"],
        directions: Float[Tensor, "N 3"],
        offsets: Float[Tensor, "N H"] | None = None,
    ) -> Float[Tensor, "N 3"]:
        """Colour in [0, 1] at points in [-1, 1]³ seen along unit ``directions``.

        Args:
            spatial: see :meth:`to_spatial`.
            points: where.
            directions: from the camera.
            offsets: what the colour network's first layer adds to its outputs (of width H).
        """
        features = self.appearance_grid.features(spatial.appearance, points)
        appearance = self.appearance_map(features)
        return torch.sigmoid(self._run_colour_network(appearance, directions, offsets))

    def _run_colour_network(
        self,
        appearance: Float[Tensor, "N A"],
        directions: Float[Tensor, "N 3"],
        offsets: Float[Tensor, "N H"] | None,
    ) -> Float[Tensor, "N 3"]:
        frequencies = self.config.num_frequencies
        if native.serves(appearance, directions):
            first = self.colour_network[0]
            assert isinstance(first, RoundedLinear)
            inputs = _Encoding.apply(appearance, directions, frequencies)
            weight, bias = first.used()
            weight = F.pad(weight, (0, inputs.shape[1] - first.in_features))
            outputs = F.linear(inputs, weight, bias)
            return self.colour_network[1:](outputs if offsets is None else outputs + offsets)
        inputs = torch.cat(
            (
                appearance,
                directions,
                frequency_encoding(appearance, frequencies),
                frequency_encoding(directions, frequencies),
            ),
            dim=-1,
        )
        if offsets is not None:
            return self.colour_network[1:](self.colour_network[0](inputs) + offsets)
        return accelerators.run_network(self.colour_network, inputs)

    def round_networks(self) -> None:
        """From now on, train networks as the integers that they become in the file."""
        for module in (self.appearance_map, *self.colour_network):
            if isinstance(module, RoundedLinear):
                module.is_rounding = True

    def upsample(self, resolution: tuple[int, int, int]) -> None:
        """Resizes both grids; sampled features stay where they were."""
        self.density_grid.upsample(resolution)
        self.appearance_grid.upsample(resolution)

    def crop(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> None:
        """Keeps voxels ``start … stop - 1``; the box of the caller shrinks with them."""
        self.density_grid.crop(start, stop)
        self.appearance_grid.crop(start, stop)


def frequency_encoding(values: Float[Tensor, "N D"], num_frequencies: int) -> Float[Tensor, "N F"]:
    """γ(x): sines, then cosines, of 2^k x; channels outermost, k innermost; F = 2·D·K."""
    scales = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=values.dtype)
    angles = (values[..., None] * scales).flatten(-2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class _Encoding(torch.autograd.Function):
    """Inputs of the colour network in compiled loops, with the gradient of the appearance."""

    @staticmethod
    def forward(ctx, appearance, directions, num_frequencies):
        encoded = native.encode(appearance, directions, num_frequencies)
        ctx.save_for_backward(encoded)
        ctx.sizes = appearance.shape[1], directions.shape[1], num_frequencies
        return encoded

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        (encoded,) = ctx.saved_tensors
        return native.encode_backward(gradient, encoded, *ctx.sizes), None, None
