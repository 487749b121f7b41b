"""What a field costs in bytes while it trains: the estimate, prices of masks, and λ for a size.

Between measurements the estimate follows how many coefficients are kept; a measurement asks the
coder itself (``masked_wavelet_codec.measure``), and corrects the estimate from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import masked_wavelet_codec as codec
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.field import WaveletPlaneField
from masked_wavelet_nerf.rate import (
    estimate_coefficient_bytes,
    estimate_network_bytes,
    estimate_side_bytes,
    to_prices,
)
from masked_wavelet_nerf.sampling import OccupancyGrid
from masked_wavelet_nerf.scene import (
    condensed,
    stored_grids,
    stored_networks,
    stored_occupancy,
)

_BITS = 8
"""Width of stored integers where training goes without a quantiser."""
_GAIN = 2.5
"""λ grows by this power of how far the size lies above its plan."""
_INTEGRAL_STEPS = 400
"""Steps after which what is left of a deviation has moved λ as far again."""
_MOST = math.log(20.0)
"""Factor on λ, either way: masks that a high λ has closed do not come back soon."""


class RateControl(nn.Module):
    """Estimate of the file's bytes, and λ as it is steered.

    Args:
        field: its coefficients, masks and networks are counted.
        occupancy: counted, too.
        num_cameras: training cameras that the file will hold.
        target_bytes: size to be reached, or None to leave λ alone.
    """

    scale: Float[Tensor, ""]
    rest: Float[Tensor, ""]
    log_factor: Float[Tensor, ""]
    integral: Float[Tensor, ""]
    log_start: Float[Tensor, ""]

    def __init__(
        self,
        field: WaveletPlaneField,
        occupancy: OccupancyGrid,
        num_cameras: int,
        target_bytes: int | None,
    ) -> None:
        super().__init__()
        # Not as submodules: they belong to the model.
        self._parts = (field, occupancy)
        self._num_cameras = num_cameras
        self._target_bytes = target_bytes
        self._side: tuple[Tensor, Tensor] | None = None
        for name, value in (
            ("scale", 1.0),  # measured bytes of coefficients, by those of the rule of thumb
            ("rest", math.nan),  # measured bytes of all else; not known before
            ("log_factor", 0.0),  # of λ
            ("integral", 0.0),
            ("log_start", math.nan),  # bytes of coefficients when steering began
        ):
            self.register_buffer(name, torch.tensor(value))

    @property
    def bits(self) -> int:
        """Width of stored integers."""
        return self._parts[0].config.bits or _BITS

    def complete(self, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """A state with what checkpoints lack that know no rate control: all as at the start."""
        return {**{prefix + name: value for name, value in self.state_dict().items()}, **state}

    def estimate(self, kept: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, ""]:
        """Bytes of the file that an export would write now, in the ``range`` profile.

        Args:
            kept: see :class:`SpatialField`.
        """
        return self._coefficient_bytes(kept) + self._rest_bytes()

    def _coefficient_bytes(self, kept: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, ""]:
        total = sum(map(sum, self._parts[0].num_coefficients()))
        return self.scale * estimate_coefficient_bytes(kept, total, self.bits)

    def _rest_bytes(self) -> Float[Tensor, ""]:
        field, occupancy = self._parts
        if self._side is None or self._side[0] is not occupancy.cells:
            stored = condensed(occupancy, field.resolution)
            side = estimate_side_bytes(stored.cells, self._num_cameras)
            count = sum(weights.numel() for weights in field.networks().values())
            rule = side + estimate_network_bytes(count, field.config.network_bits)
            self._side = occupancy.cells, rule
        return torch.where(self.rest.isnan(), self._side[1], self.rest)

    @torch.no_grad()
    def measure(self, kept: Sequence[Int[Tensor, " _"]], sets_prices: bool) -> None:
        """Lets the coder say what the field costs now; takes seconds.

        Args:
            kept: see :class:`SpatialField`.
            sets_prices: whether masks shall pay what keeping their coefficients costs.
        """
        field, occupancy = self._parts
        grids = stored_grids(field, self.bits)
        measured = codec.measure(grids)
        others = codec.Scene(
            meta={},
            bits=self.bits,
            grids=(),
            networks=stored_networks(field),
            occupancy=stored_occupancy(condensed(occupancy, field.resolution)),
            cameras=None,
        )
        frame = estimate_side_bytes(torch.zeros(1, 1, 1, dtype=torch.bool), self._num_cameras)
        self.rest.fill_(len(codec.encode(others)) + float(frame))
        self.scale.fill_(1.0)
        self.scale.fill_(measured.bits / 8 / max(float(self._coefficient_bytes(kept)), 1.0))
        if sets_prices:
            for grid, prices in zip(field.grids().values(), measured.prices, strict=True):
                grid.set_prices([to_prices(level) for level in prices])

    def check_target(self) -> None:
        """Refuses a target that leaves nothing for coefficients.

        Raises:
            UserError: naming what the rest of a file takes.
        """
        rest = float(self._rest_bytes())
        if self._target_bytes is not None and self._target_bytes < 1.1 * rest:
            raise UserError(
                f"target-bytes {self._target_bytes:,}: networks, cameras and occupancy alone take "
                f"some {rest:,.0f} bytes; ask for more, or make networks smaller "
                "(--pipeline.model.hidden-dim, --pipeline.model.network-bits)"
            )

    @torch.no_grad()
    def steer(self, kept: Sequence[Int[Tensor, " _"]], progress: float, num_steps: int) -> None:
        """Moves λ towards what leads to the target; to be called every ``num_steps`` steps.

        The plan for the bytes of coefficients: in logarithms, a parabola from what they were at
        the start to what the target leaves for them at the end.

        Args:
            kept: see :class:`SpatialField`.
            progress: 0 at the start, 1 when the target has to be reached.
            num_steps: since the last call.
        """
        if self._target_bytes is None:
            return
        log_bytes = self._coefficient_bytes(kept).clamp(min=1).log()
        self.log_start.copy_(torch.where(self.log_start.isnan(), log_bytes, self.log_start))
        log_target = (self._target_bytes - self._rest_bytes()).clamp(min=1).log()
        left = (1 - min(progress, 1.0)) ** 2
        error = log_bytes - (log_target + (self.log_start - log_target) * left)
        limit = _MOST / _GAIN
        self.integral.add_(error * (num_steps / _INTEGRAL_STEPS)).clamp_(-limit, limit)
        self.log_factor.copy_((_GAIN * (error + self.integral)).clamp(-_MOST, _MOST))

    def factor(self) -> Float[Tensor, ""]:
        """λ by what the configuration says."""
        return self.log_factor.exp()
