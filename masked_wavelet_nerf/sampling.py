"""Where rays are sampled: marching, occupancy, packing, and the weights of volume rendering.

Samples are *packed*: of the R × S places along R rays only those that are occupied are kept, as
flat indices ``ray · S + sample``. One plain torch path serves CPU and CUDA.

Letters: R rays, S places per ray, N packed samples, X, Y, Z occupancy nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_CHUNK = 1 << 18
"""Points whose density is computed at once when the occupancy is updated."""


def march(
    nears: Float[Tensor, "R 1"],
    step_size: float,
    num_steps: int,
    jitter: Float[Tensor, "R 1"] | None,
) -> Float[Tensor, "R S"]:
    """Distances along rays at a fixed step: near + (i + jitter) · step, jitter 0.5 if None."""
    index = torch.arange(num_steps, device=nears.device, dtype=nears.dtype)
    return nears + (index + (0.5 if jitter is None else jitter)) * step_size


def render_weights(optical_depth: Float[Tensor, "R S"]) -> Float[Tensor, "R S"]:
    """w_i = exp(-Σ_{j<i} x_j) · (1 - exp(-x_i)) with x = density · length (Max 1995, eq. 3)."""
    # Shifted, not cumsum - x: after a large x that difference has lost what came before.
    before = F.pad(optical_depth.cumsum(dim=-1)[:, :-1], (1, 0))
    return torch.exp(-before) * -torch.expm1(-optical_depth)


class OccupancyGrid(nn.Module):
    """Which nodes of a regular grid over [-1, 1]³ are worth sampling.

    Starts as a single occupied node: everything is occupied. A buffer, so it is saved with the
    model; checkpoints of any resolution load.
    """

    cells: Bool[Tensor, "X Y Z"]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cells", torch.ones(1, 1, 1, dtype=torch.bool))

    @property
    def is_known(self) -> bool:
        """Whether the grid has been updated, so that it can skip anything at all."""
        return self.cells.numel() > 1

    def forward(self, points: Float[Tensor, "*batch 3"]) -> Bool[Tensor, "*batch"]:
        """Whether the node nearest to each point of [-1, 1]³ is occupied; outside, nothing is."""
        size = torch.tensor(self.cells.shape, device=points.device)
        nearest = ((points + 1) * ((size - 1) / 2)).round_().long()
        inside = ((nearest >= 0) & (nearest < size)).all(dim=-1)
        flat = (nearest[..., 0] * size[1] + nearest[..., 1]) * size[2] + nearest[..., 2]
        return self.cells.flatten()[flat.clamp_(0, self.cells.numel() - 1)] & inside

    @torch.no_grad()
    def update(
        self,
        opacity: Callable[[Float[Tensor, "N 3"]], Float[Tensor, " N"]],
        resolution: tuple[int, int, int],
        threshold: float,
    ) -> None:
        """Marks nodes whose opacity, or that of one of their 26 neighbours, reaches ``threshold``.

        Where it was empty, opacity counts as zero: nothing has been trained there, so its density
        means nothing. Such a node comes back only beside a neighbour that is opaque.

        Args:
            opacity: α of one sample's length at points in [-1, 1]³.
            resolution: nodes along x, y and z.
            threshold: least α worth sampling.
        """
        device = self.cells.device
        axes = [torch.linspace(-1, 1, n, device=device) for n in resolution]
        values = []
        rows = max(1, _CHUNK // (resolution[1] * resolution[2]))
        for x in axes[0].split(rows):
            points = torch.stack(torch.meshgrid(x, axes[1], axes[2], indexing="ij"), dim=-1)
            alive = self(points)
            slab = torch.zeros(points.shape[:3], device=device)
            slab[alive] = opacity(points[alive])
            values.append(slab)
        widest = F.max_pool3d(torch.cat(values)[None, None], 3, stride=1, padding=1)[0, 0]
        self.cells = widest >= threshold

    def occupied_range(self) -> list[tuple[int, int]] | None:
        """First and last occupied node along x, y and z, or None if nothing is occupied."""
        found = []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            occupied = self.cells.any(dim=others[1]).any(dim=others[0]).nonzero()[:, 0].tolist()
            if not occupied:
                return None
            found.append((occupied[0], occupied[-1]))
        return found

    def coarsened(self, factor: int = 2) -> OccupancyGrid:
        """A grid ``factor`` times coarser that is occupied wherever this one is."""
        coarse = OccupancyGrid().to(self.cells.device)
        if not self.is_known:
            return coarse
        # Nodes of the two grids do not coincide: one more coarse node on each side is certain.
        pooled = F.max_pool3d(self.cells[None, None].float(), factor, ceil_mode=True)
        coarse.cells = F.max_pool3d(pooled, 3, stride=1, padding=1)[0, 0] > 0
        return coarse

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        saved = state_dict.get(prefix + "cells")
        if saved is not None and saved.shape != self.cells.shape:
            self.cells = self.cells.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def pack(valid: Bool[Tensor, "R S"]) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Flat indices of valid places, and the ray of each.

    The number of survivors shapes what follows, so on CUDA this waits for the device, once.
    """
    flat = valid.flatten().nonzero()[:, 0]
    return flat, flat // valid.shape[1]
