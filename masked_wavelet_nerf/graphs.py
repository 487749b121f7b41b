"""CUDA graphs, optional: what a fixed computation asks of the GPU, recorded once and replayed.

Quantiser, masks and inverse transform of all planes are some 1,500 small kernels in a training
step, forward and backward. A GPU is done with each sooner than Python can ask for the next; as a
recording they are asked for at once.

They serve parameters on CUDA, while gradients are wanted; everything else is computed as usual, and
so is all of it where a recording fails (see ``accelerators.status``). ``MASKED_WAVELET_NATIVE=0``
in the environment turns them off.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masked_wavelet_nerf import accelerators, native

_NAME = "CUDA graphs"


def serve(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a computation of these parameters may be recorded.

    Not while a gradient waits for the next one to be added to it: it lies where that is written.
    """
    return (
        torch.is_grad_enabled()
        and native.is_switched_on()
        and not accelerators.is_left_out(_NAME)
        and all(p.is_cuda and p.requires_grad and p.grad is None for p in parameters)
    )


class Recording:
    """The last recording of a computation."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._replay: Callable[..., tuple[Tensor, ...]] | None = None

    def run(
        self,
        compute: Callable[..., tuple[Tensor, ...]],
        parameters: Sequence[nn.Parameter],
        settings: Hashable,
    ) -> tuple[Tensor, ...]:
        """``compute(*parameters)``, replayed where possible.

        What a replay returns is overwritten by the next one, and so are its gradients.

        Args:
            compute: always asks the same of the device for the same parameters and settings.
            parameters: all that it is differentiated by.
            settings: what else it depends on.
        """
        if not serve(parameters):
            return compute(*parameters)
        key = settings, tuple((p.data_ptr(), p.shape, p.stride()) for p in parameters)
        if key != self._key:
            self._key, self._replay = key, None
            # The old one is freed now, for its memory, and because a recording during which the
            # collector frees another one fails.
            gc.collect()
            self._replay = _record(compute, tuple(parameters))
        return (self._replay or compute)(*parameters)


def _record(
    compute: Callable[..., tuple[Tensor, ...]], parameters: tuple[nn.Parameter, ...]
) -> Callable[..., tuple[Tensor, ...]] | None:
    try:
        # A cache of halved parameters, which autocast keeps, would be recorded as it is now.
        with torch.autocast("cuda", enabled=False):
            recorded: Any = torch.cuda.make_graphed_callables(compute, parameters)
            return recorded
    except RuntimeError as error:
        reason = accelerators.first_line(error)
        accelerators.leave_out(_NAME, f"cannot be recorded here ({reason})")
        return None
