"""Square patches of neighbouring pixels, for losses that look at more than one at a time.

A batch of patches is one of pixels: patch after patch, each row by row. A patch is named by the
pixel that it is drawn around; at the edge of a photo it is moved so that it lies inside.

Letters: P patches, R = P · side² pixels, N photos, H, W their rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def around(centres: Int[Tensor, "P 3"], side: int, height: int, width: int) -> Int[Tensor, "R 3"]:
    """Pixels of patches.

    Args:
        centres: (photo, y, x) of a pixel in each.
        side: of a patch, pixels; no more than height and width.
        height: of the photos, H.
        width: of the photos, W.

    Returns:
        (photo, y, x) of each pixel.
    """
    photo, y, x = centres.unbind(-1)
    steps = torch.arange(side, device=centres.device)
    y = _first(y, side, height)[:, None, None] + steps[:, None]
    x = _first(x, side, width)[:, None, None] + steps
    return torch.stack(torch.broadcast_tensors(photo[:, None, None], y, x), dim=-1).view(-1, 3)


def are_whole(counts: Bool[Tensor, "N H W"], side: int) -> Bool[Tensor, "N H W"]:
    """Around which pixels a patch has only pixels that count.

    Args:
        counts: which pixels of photos do.
        side: of a patch, pixels; no more than H and W.
    """
    rows, columns = (
        _first(torch.arange(length, device=counts.device), side, length)
        for length in counts.shape[1:]
    )
    found = torch.empty_like(counts)
    # One by one: floats take four times as much.
    for photo, whole in zip(counts, found, strict=True):
        lacks = (~photo)[None].float()
        lacks = F.max_pool2d(F.max_pool2d(lacks, (side, 1), stride=1), (1, side), stride=1)
        whole.copy_(lacks[0, rows][:, columns] == 0)
    return found


def as_images(pixels: Float[Tensor, "R C"], side: int) -> Float[Tensor, "P C side side"]:
    """Patches of a batch, as convolutions take them."""
    return pixels.unflatten(0, (-1, side, side)).movedim(-1, 1)


def _first(centre: Int[Tensor, " P"], side: int, length: int) -> Int[Tensor, " P"]:
    """Where a patch around a pixel starts, along an axis."""
    return (centre - side // 2).clamp(0, length - side)
