"""Samples of unbounded scenes: contraction, spacing along rays, and a proposal that costs no bytes.

All of space is contracted into the planes' cube (mip-NeRF 360, eq. 10, with the maximum norm, so
that it is filled). Distance along a ray is spaced evenly up to 1 and by its inverse beyond. Where
samples go is proposed by densities on a coarse grid of nodes, which come from the planes
themselves: nothing else has to be trained, or sent.

Rays in normalised device coordinates (:mod:`.ndc`) are sampled in the same way, but for contraction
and spacing, which the coordinates have in them.

Letters: R rays, P bins of the proposal, S samples of a ray, N = R · S, X nodes along an axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from masked_wavelet_nerf import native
from masked_wavelet_nerf.sampling import PackedSamples

EVEN_SHARE = 0.2
"""Of the samples: spread evenly over the spacing, so that what the proposal misses is found."""


def contract(positions: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """All of space to (-1, 1)³: halved within [-1, 1]³, (1 - 1 / 2m) x / m beyond, m = max |x|."""
    largest = positions.abs().amax(dim=-1, keepdim=True).clamp(min=1)
    return positions * ((1 - 0.5 / largest) / largest)


def spacing_at(distance: Tensor) -> Tensor:
    """t / 2 up to distance 1, 1 - 1 / 2t beyond: from 0 to 1."""
    return torch.where(distance < 1, distance / 2, 1 - 0.5 / distance.clamp(min=1))


def distance_at(spacing: Tensor) -> Tensor:
    """The inverse of :func:`spacing_at`."""
    return torch.where(spacing < 0.5, 2 * spacing, 0.5 / (1 - spacing.clamp(min=0.5)))


def spacings(samples: PackedSamples) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Places and widths of samples in spacing, to first order in their length."""
    slope = 0.5 / samples.middles.clamp(min=1).square()
    return spacing_at(samples.middles), samples.lengths * slope


class Proposal(NamedTuple):
    """Where density is, roughly."""

    density: Float[Tensor, "X X X"]
    """Largest density around each node of a regular grid over [-1, 1]³."""
    num_bins: int
    """P: bins along a ray in which it is looked up."""


def proposal(
    density: Float[Tensor, "X X X"],
    num_bins: int,
) -> Proposal:
    """A proposal from densities at nodes; each takes the largest of its 26 neighbours, too.

    Args:
        density: at the nodes of a regular grid over [-1, 1]³.
        num_bins: see :class:`Proposal`.
    """
    for axis in range(3):  # by whole slabs: twenty times as fast as max_pool3d on a CPU
        first, last = density.narrow(axis, 0, 1), density.narrow(axis, -1, 1)
        size = density.shape[axis] - 1
        before = torch.cat((first, density.narrow(axis, 0, size)), dim=axis)
        after = torch.cat((density.narrow(axis, 1, size), last), dim=axis)
        density = torch.maximum(density, torch.maximum(before, after))
    return Proposal(density.contiguous(), num_bins)


def propose(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    nears: Float[Tensor, "R 1"],
    fars: Float[Tensor, "R 1"],
    density_scale: float,
    proposal: Proposal,
    num_samples: int,
    jitter: Float[Tensor, "R 1"] | None,
    contracted: bool = True,
) -> PackedSamples:
    """Samples where the proposal's weights of volume rendering are, and some everywhere.

    A ray's edges lie at equal quantiles of those weights; its samples in the middle between two.

    Args:
        origins: of the rays, where [-1, 1]³ is what is not contracted.
        directions: so that origin + t · direction is the point at distance t.
        nears: distance at which sampling starts.
        fars: distance at which it ends.
        density_scale: optical depth is density · length · this.
        proposal: see :func:`proposal`.
        num_samples: S.
        jitter: shift of a ray's quantiles in [0, 1), 0.5 if None.
        contracted: contract points, and space distances by their inverse beyond 1; else the rays
            stay in [-1, 1]³, evenly spaced.
    """
    if jitter is None:
        jitter = torch.full_like(nears, 0.5)
    start, stop = (spacing_at(nears), spacing_at(fars)) if contracted else (nears, fars)
    tensors = origins, directions, start, stop, jitter, proposal.density
    if native.serves(*tensors) and not any(t.requires_grad for t in tensors):
        numbers = density_scale, EVEN_SHARE, proposal.num_bins, num_samples, contracted
        return PackedSamples(*native.proposed_samples(*tensors, *numbers))
    with torch.no_grad():
        quantiles = (torch.arange(num_samples + 1, device=nears.device) + jitter) / (
            num_samples + 1
        )
        spacing = _at_quantiles(
            _weights(origins, directions, start, stop, density_scale, proposal, contracted),
            quantiles,
        )
        edges = start + (stop - start) * spacing
        edges = distance_at(edges) if contracted else edges
    middles, lengths = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=-1)
    points = origins[:, None] + directions[:, None] * middles[..., None]
    points = contract(points) if contracted else points
    ray = torch.arange(len(origins), device=nears.device).repeat_interleave(num_samples)
    return PackedSamples(ray, middles.flatten(), lengths.flatten(), points.view(-1, 3))


def _weights(
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
    start: Float[Tensor, "R 1"],
    stop: Float[Tensor, "R 1"],
    density_scale: float,
    proposal: Proposal,
    contracted: bool,
) -> Float[Tensor, "R P"]:
    """The proposal's weights in P bins between two spacings, and a share for all of them."""
    num_bins, last = proposal.num_bins, len(proposal.density) - 1
    steps = torch.arange(num_bins + 1, device=start.device) / num_bins
    edges = start + (stop - start) * steps
    edges = distance_at(edges) if contracted else edges
    middles = (edges[:, 1:] + edges[:, :-1]) / 2
    points = origins[:, None] + directions[:, None] * middles[..., None]
    points = contract(points) if contracted else points
    nodes = ((points + 1) * (last / 2)).round_().long().clamp_(0, last)  # NaN has to stay inside
    x, y, z = nodes.unbind(dim=-1)
    depths = proposal.density[x, y, z] * (edges.diff(dim=-1) * density_scale)
    before = F.pad(depths.cumsum(dim=-1)[:, :-1], (1, 0))
    weights = torch.exp(-before) * -torch.expm1(-depths)
    return weights + EVEN_SHARE / num_bins


def _at_quantiles(
    weights: Float[Tensor, "R P"], quantiles: Float[Tensor, "R Q"]
) -> Float[Tensor, "R Q"]:
    """Where in [0, 1], over which the bins are spread evenly, the quantiles of weights lie."""
    num_bins = weights.shape[1]
    sums = F.pad(weights.cumsum(dim=-1), (1, 0))
    wanted = quantiles * sums[:, -1:]
    found = (torch.searchsorted(sums, wanted, right=True) - 1).clamp(0, num_bins - 1)
    within = (wanted - sums.gather(1, found)) / weights.gather(1, found)
    return (found + within.clamp(0, 1)) / num_bins
