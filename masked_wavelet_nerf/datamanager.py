"""Data manager: nerfstudio's, with reproducible steps, without pixels that see nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import (
    VanillaDataManager,
    VanillaDataManagerConfig,
)
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from torch import Tensor

_STEPS_AT_ONCE = 8


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


class _RandomState(NamedTuple):
    """State of Python's and torch's random numbers; that of a CUDA device where there is one."""

    python: tuple
    host: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), torch.get_rng_state(), on_device)

    def restore(self, device: torch.device) -> None:
        random.setstate(self.python)
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@dataclass
class WaveletDataManagerConfig(VanillaDataManagerConfig):
    """nerfstudio's data manager; every step draws from a random state of its own."""

    _target: type = field(default_factory=lambda: WaveletDataManager)
    """Target class to instantiate."""
    pixel_sampler: PixelSamplerConfig = field(default_factory=PooledPixelSamplerConfig)
    """Specifies the pixel sampler used to sample pixels from images."""


class WaveletDataManager(VanillaDataManager[InputDataset]):
    """See :class:`WaveletDataManagerConfig`.

    A step's random numbers depend on the seed (``--machine.seed``) and the step alone, so a resumed
    run draws what the uninterrupted one would have drawn. Rays of several steps are made at once:
    nerfstudio's some hundred small operations take as long for one step's as for those of eight.
    """

    config: WaveletDataManagerConfig

    def __init__(self, config: WaveletDataManagerConfig, *args, **kwargs) -> None:
        self._seed = torch.initial_seed()
        self._prepared: dict[int, tuple[RayBundle, dict, _RandomState]] = {}
        super().__init__(config, *args, **kwargs)

    def next_train(self, step: int) -> tuple[RayBundle, dict]:
        """Rays and pixels of one training step; seeds torch and random for the whole step."""
        found = self._prepared.pop(step, None)
        if found is None or len(found[0]) != self.get_train_rays_per_batch():
            found = self._prepare(step)
        rays, batch, state = found
        state.restore(torch.device(self.device))
        self.train_count += 1
        return rays, batch

    def _prepare(self, step: int) -> tuple[RayBundle, dict, _RandomState]:
        """Makes the rays and pixels of some steps, and returns those of the first.

        With them comes the random state in which drawing the pixels left the step.
        """
        drawn = []
        for ahead in range(_STEPS_AT_ONCE):
            seed = (self._seed * 1_000_003 + step + ahead) % (1 << 63)
            torch.manual_seed(seed)
            random.seed(seed)
            images = next(self.iter_train_image_dataloader)
            assert isinstance(images, dict) and self.train_pixel_sampler is not None
            batch = self.train_pixel_sampler.sample(images)
            drawn.append((batch, _RandomState.now(torch.device(self.device))))
        rays = self.train_ray_generator(torch.cat([batch["indices"] for batch, _ in drawn]))
        stop = 0
        for ahead, (batch, state) in enumerate(drawn):
            start, stop = stop, stop + len(batch["indices"])
            self._prepared[step + ahead] = rays[start:stop], batch, state
        return self._prepared.pop(step)

    @torch.no_grad()
    def restrict_pixels(
        self, is_useful: Callable[[RayBundle], Bool[Tensor, "*batch"]]
    ) -> float | None:
        """Trains from now on only on pixels whose rays are useful.

        Args:
            is_useful: for a bundle of an image's rays (H, W), which of them can see anything.

        Returns:
            The fraction of pixels that stays, or None where restricting does not apply: images of
            several sizes, other pixel samplers, or no useful pixel at all.
        """
        sampler = self.train_pixel_sampler
        batch = next(self.iter_train_image_dataloader)
        assert isinstance(batch, dict)
        images = batch["image"]
        if not isinstance(sampler, PooledPixelSampler) or not isinstance(images, Tensor):
            return None
        if self.config.train_num_images_to_sample_from != -1:
            return None  # the batch changes: a pool of indices into it would not
        cameras = self.train_ray_generator.cameras
        useful = torch.stack(
            [
                is_useful(cameras.generate_rays(camera_indices=int(index)))
                for index in batch["image_idx"]
            ]
        )
        if "mask" in batch:
            useful &= batch["mask"][..., 0].to(useful.device).bool()
        pool = useful.flatten().nonzero()[:, 0]
        sampler.pool = pool if len(pool) else None
        self._prepared.clear()
        return len(pool) / useful.numel() if len(pool) else None
