"""Which part of an unbounded scene gets half of the planes: the region that its cameras look at.

What lies within it is not contracted, so that is where the planes resolve most. Cameras say where
it is: lengths are the data parser's unit.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from masked_wavelet_nerf.coverage import half_view, measure


def region_of_interest(cameras: Cameras, default: Float[Tensor, "2 3"]) -> Float[Tensor, "2 3"]:
    """Lowest and highest corner.

    Where most cameras look at a common point, a cube around it as wide as what they see there; for
    cameras that look outwards, or all around themselves, the default.

    Args:
        cameras: of the photos for training.
        default: corners of the data parser's box.
    """
    coverage = measure(cameras)
    look_at = coverage.look_at
    if look_at is None or coverage.layout == "outward" or look_at.distance <= 0:
        return default
    half = look_at.distance * math.sqrt(math.prod(half_view(cameras)))
    centre = torch.tensor(look_at.point)
    return torch.stack((centre - half, centre + half)).to(default)
