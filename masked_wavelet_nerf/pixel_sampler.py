"""Which pixels a training step sees: any, or those of a pool."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from torch import Tensor


@dataclass
class PooledPixelSamplerConfig(PixelSamplerConfig):
    """Uniform over all pixels, or over a pool of them."""

    _target: type = field(default_factory=lambda: PooledPixelSampler)
    """Target class to instantiate."""


class PooledPixelSampler(PixelSampler):
    """Samples from :attr:`pool` once it is set."""

    config: PooledPixelSamplerConfig
    pool: Int[Tensor, " P"] | None = None
    """Flat indices (image · H + y) · W + x into the image batch, or None for every pixel."""

    def sample_method(
        self,
        batch_size: int,
        num_images: int,
        image_height: int,
        image_width: int,
        mask: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Int[Tensor, "batch_size 3"]:
        """Random (image, y, x) of pixels to train on."""
        if self.pool is None:
            return super().sample_method(
                batch_size, num_images, image_height, image_width, mask, device
            )
        chosen = torch.randint(len(self.pool), (batch_size,), device=self.pool.device)
        flat = self.pool[chosen].to(device)
        row = flat // image_width
        return torch.stack((row // image_height, row % image_height, flat % image_width), dim=-1)

    def rejection_sample_mask(
        self,
        mask: Bool[Tensor, "num_images H W 1"],
        num_samples: int,
        num_images: int,
        image_height: int,
        image_width: int,
        device: torch.device | str,
    ) -> Int[Tensor, "num_samples 3"]:
        """Random (image, y, x) where the masks are set."""
        if num_images > 1:
            return super().rejection_sample_mask(
                mask, num_samples, num_images, image_height, image_width, device
            )
        # nerfstudio squeezes the axis of a single image away, and then indexes it.
        indices = super().rejection_sample_mask(
            mask.expand(2, -1, -1, -1), num_samples, 2, image_height, image_width, device
        )
        indices[:, 0] = 0
        return indices
