"""Arrays for tests of compiled loops: in another layout, or guarded, so that overreach shows."""

from __future__ import annotations

import numpy as np
import torch

GUARD = 64


def guarded(array: np.ndarray, filler: float) -> tuple[np.ndarray, np.ndarray]:
    """A flat copy between two guards of ``filler``: (the copy, all of it)."""
    whole = np.full(array.size + 2 * GUARD, filler, array.dtype)
    inner = whole[GUARD : GUARD + array.size]
    inner[:] = array.reshape(-1)
    return inner, whole


def assert_guards(whole: np.ndarray, filler: float) -> None:
    for part in (whole[:GUARD], whole[-GUARD:]):
        np.testing.assert_array_equal(part, np.full(GUARD, filler, whole.dtype))


def channels_innermost(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
