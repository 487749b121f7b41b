"""Optimiser and scheduler configurations.

Learning rates stay Python floats: nerfstudio's own schedulers leave ``np.float64`` in checkpoints,
which torch ≥ 2.6 refuses to load (nerfstudio issue 3683).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class DenseAdam(torch.optim.Adam):
    """Adam that sees tensors as rows of numbers.

    Torch's fused Adam copies tensors that are not contiguous, there and back. Elementwise, the
    order in memory does not matter as long as all four tensors of a parameter share it; where they
    do not (a checkpoint of another layout), torch would pair up the wrong ones.
    """

    def _init_group(
        self,
        group,
        params_with_grad,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
    ):
        lists = (params_with_grad, grads, exp_avgs, exp_avg_sqs)
        for parameter in group["params"]:
            state = self.state.get(parameter, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name] = _laid_out_as(parameter, state[name])
        result = super()._init_group(group, *lists, max_exp_avg_sqs, state_steps)
        for i, parameter in enumerate(params_with_grad):
            grads[i] = _laid_out_as(parameter, grads[i])
            if not parameter.is_contiguous() and is_dense(parameter):
                for members in lists:
                    members[i] = members[i].as_strided((parameter.numel(),), (1,))
        return result


def _laid_out_as(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass
class FusedAdamOptimizerConfig(AdamOptimizerConfig):
    """Adam in one pass over memory."""

    _target: type = DenseAdam
    """The optimizer class to use."""
    weight_decay: float = 0.0
    """The weight decay to use."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the running mean and of the running square (TensoRF's values)."""
    fused: bool = True
    """Update every parameter in one pass: several times faster on CPU and CUDA."""


@dataclass
class RestartedDecaySchedulerConfig(SchedulerConfig):
    """Exponential decay that starts anew at given steps."""

    _target: type = field(default_factory=lambda: RestartedDecayScheduler)
    """Target class to instantiate."""
    decay: float = 0.1
    """Factor reached ``max_steps`` after the last restart."""
    max_steps: int = 30000
    """Steps over which the rate falls by ``decay``."""
    restarts: tuple[int, ...] = ()
    """Steps at which the rate returns to its initial value: those of the upsamplings."""


class RestartedDecayScheduler(Scheduler):
    """lr(t) = lr₀ · decay^((t - t₀) / max_steps), t₀ the last restart at or before t."""

    config: RestartedDecaySchedulerConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LambdaLR:
        """See :class:`RestartedDecaySchedulerConfig`; ``lr_init`` is already the optimiser's."""

        def factor(step: int) -> float:
            start = max((s for s in self.config.restarts if s <= step), default=0)
            return float(self.config.decay ** ((step - start) / self.config.max_steps))

        return LambdaLR(optimizer, lr_lambda=factor)
