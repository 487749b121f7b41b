"""Which pixels a training step sees: any, those of a pool, or square patches of them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
from torch import Tensor

from masked_wavelet_nerf import patches
from masked_wavelet_nerf.errors import UserError


@dataclass
class PooledPixelSamplerConfig(PixelSamplerConfig):
    """Uniform over all pixels, or over a pool of them."""

    _target: type = field(default_factory=lambda: PooledPixelSampler)
    """Target class to instantiate."""


class _Photos(NamedTuple):
    """Photos of one size, as a batch of images, and around which of their pixels patches lie."""

    batch: dict
    pool: Int[Tensor, " P"] | None
    """As of :class:`PooledPixelSampler`."""


class PooledPixelSampler(PixelSampler):
    """Samples from :attr:`pool` once it is set; patches, too, once :meth:`draw_patches` says so.

    A batch's patches come first, then its single pixels.
    """

    config: PooledPixelSamplerConfig
    pool: Int[Tensor, " P"] | None = None
    """Flat indices (image · H + y) · W + x into the image batch, or None for every pixel. Of
    patches, pixels that they are drawn around."""
    patch_size: int = 1
    """Side of the patches that are drawn, pixels."""
    num_patches: int = 0
    """How many of them a batch has."""
    _share: float = 1.0
    _seen: tuple[dict, list[_Photos]] | None = None
    """Masks stay, so what is whole within them is looked for once."""

    def draw_patches(self, side: int, share: float, images: dict) -> None:
        """Draws square patches from now on, see :mod:`.patches`; none leaves its photo or its mask.

        Args:
            side: of a patch, pixels.
            share: of the rays of a batch that lie in patches, in (0, 1]; the others are single
                pixels.
            images: a batch to draw from.

        Raises:
            UserError: if a batch has no room for a patch, a photo is smaller, no patch lies within
                a mask, or the share is none.
        """
        if not 0 < share <= 1:
            raise UserError(f"patch-share: {share:g}; expected more than 0, and 1 at most")
        self.patch_size, self._share = side, share
        self.set_num_rays_per_batch(self.num_rays_per_batch)
        radius = self.config.fisheye_crop_radius
        if radius is not None:  # a patch's corners lie within it, too
            radius -= side / math.sqrt(2)
            self.config = dataclasses.replace(self.config, fisheye_crop_radius=radius)
        self._photos_of(images)

    def set_num_rays_per_batch(self, num_rays_per_batch: int) -> None:
        """Sets how many rays are drawn, of patches as many as make whole ones.

        Raises:
            UserError: if there are no whole ones.
        """
        if self.patch_size == 1:
            super().set_num_rays_per_batch(num_rays_per_batch)
            return
        area = self.patch_size**2
        self.num_patches = int(self._share * num_rays_per_batch) // area
        if self.num_patches == 0:
            raise UserError(
                f"train-num-rays-per-batch: {num_rays_per_batch} rays; expected "
                f"{math.ceil(area / self._share)} or more, so that a patch of patch-size "
                f"{self.patch_size} has room in the {self._share:.0%} of them that are in patches"
            )
        singles = 0 if self._share == 1 else num_rays_per_batch - self.num_patches * area
        # Of photos of several sizes, nerfstudio draws even numbers only.
        super().set_num_rays_per_batch(self.num_patches * area + singles // 2 * 2)

    def sample(self, image_batch: dict) -> dict:
        """A batch of pixels to train on."""
        if self.patch_size == 1:
            return super().sample(image_batch)
        photos = self._photos_of(image_batch)
        # Photos of several sizes are drawn on the host: nothing waits for a device.
        counts = Counter(random.choices(range(len(photos)), k=self.num_patches))
        parts = [self._patches(photos[i], count) for i, count in sorted(counts.items())]
        num_singles = self.num_rays_per_batch - self.num_patches * self.patch_size**2
        if num_singles:
            parts.append(self._singles(image_batch, num_singles))
        # Of photos of several sizes, nerfstudio leaves masks out.
        keys = set.intersection(*(set(part) for part in parts))
        batch = {key: torch.cat([part[key] for part in parts]) for key in sorted(keys)}
        if self.config.keep_full_image:
            batch["full_image"] = image_batch["image"]
        return batch

    def _photos_of(self, images: dict) -> list[_Photos]:
        if self._seen is None or self._seen[0] is not images:
            self._seen = images, self._find_photos(images)
        return self._seen[1]

    def _find_photos(self, images: dict) -> list[_Photos]:
        if isinstance(images["image"], Tensor):
            batches = [images]
        else:
            given = {key: value for key, value in images.items() if value is not None}
            numbers = range(len(images["image"]))
            batches = [{key: value[i][None] for key, value in given.items()} for i in numbers]
        found = []
        for batch in batches:
            height, width = batch["image"].shape[1:3]
            if min(height, width) < self.patch_size:
                raise UserError(
                    f"patch-size {self.patch_size}: a photo has only {width} × {height} pixels; "
                    f"expected {min(height, width)} at most"
                )
            usable = None if self.config.ignore_mask else self.usable(batch)
            pool = None if usable is None else usable.flatten().nonzero()[:, 0]
            if pool is None or len(pool):
                found.append(_Photos(batch, pool))
        if not found:
            raise UserError(
                f"patch-size {self.patch_size}: no mask leaves as much of a photo in one piece; "
                "expected a smaller one"
            )
        return found

    def usable(self, images: dict) -> Bool[Tensor, "N H W"] | None:
        """Pixels that masks of photos leave, or around which they leave a patch; None for all."""
        if "mask" not in images:
            return None
        counts = images["mask"][..., 0].bool()
        return counts if self.patch_size == 1 else patches.are_whole(counts, self.patch_size)

    def _patches(self, photos: _Photos, count: int) -> dict:
        batch, (num_images, *size) = photos.batch, photos.batch["image"].shape[:3]
        pool = photos.pool if self.pool is None else self.pool
        if pool is None:  # as single pixels are drawn
            numbered = {"image": batch["image"], "image_idx": torch.arange(num_images)}
            centres = super().collate_image_dataset_batch(numbered, count)["indices"]
        else:
            centres = _draw(pool, count, *size)
        indices = patches.around(centres, self.patch_size, *size).cpu()
        where = indices.unbind(-1)
        drawn = {
            key: value[where]
            for key, value in batch.items()
            if key != "image_idx" and value is not None
        }
        indices = indices.to(batch["image"].device)
        indices[:, 0] = batch["image_idx"][where[0]]
        return {**drawn, "indices": indices}

    def _singles(self, images: dict, count: int) -> dict:
        if isinstance(images["image"], Tensor):
            return self.collate_image_dataset_batch(images, count)
        return self.collate_image_dataset_batch_list(dict(images), count)

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
        return _draw(self.pool, batch_size, image_height, image_width).to(device)

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


def _draw(pool: Int[Tensor, " P"], count: int, height: int, width: int) -> Int[Tensor, "count 3"]:
    """Random (image, y, x) of a pool."""
    flat = pool[torch.randint(len(pool), (count,), device=pool.device)]
    row = flat // width
    return torch.stack((row // height, row % height, flat % width), dim=-1)
