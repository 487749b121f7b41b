"""Learning rates against their formula, checkpoints against torch's safe loader, fused Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from masked_wavelet_nerf.optimisers import FusedAdamOptimizerConfig, RestartedDecaySchedulerConfig


def optimiser(lr: float = 0.02, *, fused: bool = True, seed: int = 0) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 3), (7,))]
    return FusedAdamOptimizerConfig(lr=lr, fused=fused).setup(parameters)


def rates(config: RestartedDecaySchedulerConfig, steps: int, lr: float = 0.02) -> list[float]:
    """The rate in force at each step, as nerfstudio drives it."""
    adam = optimiser(lr)
    scheduler = config.setup().get_scheduler(adam, lr)
    found = []
    for _ in range(steps):
        found.append(adam.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == [adam.param_groups[0]["lr"]]
        adam.step()
        scheduler.step()
    return found


def expected_rate(step: int, decay: float, max_steps: int, restarts=(), lr: float = 0.02) -> float:
    last = 0
    for restart in sorted(restarts):
        if restart <= step:
            last = restart
    return lr * math.exp(math.log(decay) * (step - last) / max_steps)


@pytest.mark.parametrize("restarts", [(), (3,), (7, 3, 12), (0,), (100,)])
@pytest.mark.parametrize(("decay", "max_steps"), [(0.1, 10), (0.5, 30)])
def test_rates_match_the_formula_and_are_python_floats(decay, max_steps, restarts):
    config = RestartedDecaySchedulerConfig(decay=decay, max_steps=max_steps, restarts=restarts)
    found = rates(config, 25)
    for step, rate in enumerate(found):
        assert type(rate) is float, step
        assert rate == pytest.approx(expected_rate(step, decay, max_steps, restarts), rel=1e-12)


def test_rate_falls_by_the_decay_and_returns_at_a_restart():
    found = rates(RestartedDecaySchedulerConfig(max_steps=10, restarts=(15,)), 27, lr=0.3)
    assert found[0] == 0.3
    assert found[10] == pytest.approx(0.03)
    assert found[14] < found[13]
    assert found[15] == 0.3
    assert found[25] == pytest.approx(0.03)


def test_defaults_are_the_methods():
    adam = FusedAdamOptimizerConfig(lr=0.02).setup([nn.Parameter(torch.zeros(2))])
    group = adam.param_groups[0]
    assert type(adam) is torch.optim.Adam
    assert (group["betas"], group["fused"], group["lr"]) == ((0.9, 0.99), True, 0.02)
    config = RestartedDecaySchedulerConfig()
    assert (config.decay, config.max_steps, config.restarts) == (0.1, 30000, ())


def test_checkpoint_loads_under_weights_only_and_goes_on(tmp_path):
    config = RestartedDecaySchedulerConfig(max_steps=10, restarts=(6,))
    whole = rates(config, 20)

    adam = optimiser()
    scheduler = config.setup().get_scheduler(adam, 0.02)
    for _ in range(4):
        for parameter in adam.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        adam.step()
        scheduler.step()
    path = tmp_path / "state.ckpt"
    torch.save({"optimizer": adam.state_dict(), "scheduler": scheduler.state_dict()}, path)
    saved = torch.load(path, weights_only=True)

    fresh = optimiser(seed=1)
    resumed = config.setup().get_scheduler(fresh, 0.02)
    fresh.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    for step in range(4, 20):
        assert fresh.param_groups[0]["lr"] == whole[step]
        assert type(fresh.param_groups[0]["lr"]) is float
        fresh.step()
        resumed.step()


def adam_by_hand(start: torch.Tensor, grads: list[torch.Tensor], lr: float) -> torch.Tensor:
    x, mean, square = (t.double() for t in (start, torch.zeros(3), torch.zeros(3)))
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        mean = 0.9 * mean + 0.1 * g
        square = 0.99 * square + 0.01 * g * g
        x = x - lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.99**t)).sqrt() + 1e-8)
    return x.float()


def test_fused_adam_equals_unfused_and_the_formula():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, generator=generator)
    grads = [torch.randn(3, generator=generator) for _ in range(30)]
    ends = []
    for fused in (True, False):
        parameter = nn.Parameter(start.clone())
        adam = FusedAdamOptimizerConfig(lr=0.05, fused=fused).setup([parameter])
        for grad in grads:
            parameter.grad = grad.clone()
            adam.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ends[0], adam_by_hand(start, grads, 0.05), rtol=1e-4, atol=1e-5)
