"""Image metrics. LPIPS is built on first use: its weights are downloaded, and may not be there."""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from masked_wavelet_nerf import patches

SSIM_WINDOW = 11
"""Pixels along a side of what SSIM looks at together."""


def patch_ssim(
    rendered: Float[Tensor, "R 3"], true: Float[Tensor, "R 3"], side: int
) -> Float[Tensor, ""]:
    """Mean SSIM of a batch of patches, as evaluation measures it of whole images.

    Windows at the edge of a patch see it mirrored there. Differentiable, and always in the
    precision of its arguments: differences of squares need it.

    Args:
        rendered: colours, patch after patch (see :mod:`.patches`).
        true: those that they are held against, both nominally in [0, 1].
        side: of a patch, pixels; at least SSIM_WINDOW.
    """
    with torch.autocast(rendered.device.type, enabled=False):
        ssim = structural_similarity_index_measure(
            patches.as_images(rendered, side), patches.as_images(true, side), data_range=1.0
        )
    assert isinstance(ssim, Tensor)  # rather than a pair of it and an image
    return ssim


class ImageMetrics:
    """PSNR, SSIM, and LPIPS (AlexNet) where its weights can be had.

    Not a module, so that LPIPS's weights stay out of checkpoints.
    """

    def __init__(self) -> None:
        self._lpips = None
        self._lpips_is_missing = False

    def __call__(
        self, image: Float[Tensor, "H W 3"], rgb: Float[Tensor, "H W 3"]
    ) -> dict[str, float]:
        """Metrics of a rendered image against the true one, both in [0, 1]."""
        true, rendered = (x.movedim(-1, 0)[None] for x in (image, rgb))
        metrics = {"psnr": float(peak_signal_noise_ratio(rendered, true, data_range=1.0))}
        if min(image.shape[:2]) >= SSIM_WINDOW:
            ssim = structural_similarity_index_measure(rendered, true, data_range=1.0)
            metrics["ssim"] = float(ssim)  # pyright: ignore[reportArgumentType]
        lpips = self._build_lpips(image.device)
        if lpips is not None and min(image.shape[:2]) >= 32:  # AlexNet's least input
            metrics["lpips"] = float(lpips(rendered, true))
        return metrics

    def _build_lpips(self, device: torch.device):
        if self._lpips is None and not self._lpips_is_missing:
            try:
                from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

                self._lpips = LearnedPerceptualImagePatchSimilarity(normalize=True)
            except (OSError, ModuleNotFoundError) as error:  # no network, or no torchvision
                self._lpips_is_missing = True
                CONSOLE.print(f"LPIPS is left out: its weights could not be loaded ({error}).")
        return None if self._lpips is None else self._lpips.to(device)
