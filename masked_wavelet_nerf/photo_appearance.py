"""What differs from photo to photo, exposure and white balance: learnt in training, never sent."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class PhotoAppearance(nn.Module):
    """An offset of the colour network's first layer for every photo; their mean is zero.

    So without offsets, which is how scenes are evaluated and sent, the network shows the average
    photo. As good as an embedding among the network's inputs, of which the first layer makes an
    offset, too (NeRF in the Wild, section 4.1).

    Args:
        num_photos: P, photos for training.
        dim: numbers that a photo has of its own.
        hidden_dim: H, width of the layer.
    """

    def __init__(self, num_photos: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(0.1 * torch.randn(num_photos, dim))
        self.layer = nn.Linear(dim, hidden_dim, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, photos: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Offsets for the colours of photos.

        Args:
            photos: index of each colour's photo, 0 … P - 1.
        """
        return self.layer(self.embeddings - self.embeddings.mean(dim=0))[photos]
