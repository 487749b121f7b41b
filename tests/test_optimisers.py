"""Learning rates against their formula, checkpoints against torch's safe loader, fused Adam."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from masked_wavelet_nerf import native
from masked_wavelet_nerf.optimisers import (
    DenseAdam,
    FusedAdamOptimizerConfig,
    RestartedDecaySchedulerConfig,
    is_dense,
)
from masked_wavelet_nerf.planes import FactorisedGrid
from masked_wavelet_nerf.wavelet import make_transform


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
    assert type(adam) is DenseAdam
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


# --- layouts


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of (C, H, W) whose memory holds that order of axes."""
    order = {"chw": (0, 1, 2), "hwc": (1, 2, 0), "whc": (2, 1, 0)}[layout]
    back = sorted(range(3), key=order.__getitem__)
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def trained(
    kind: type[torch.optim.Adam],
    parameters: list[str],
    gradients: list[str],
    states: list[str] | None = None,
    *,
    resume: bool = False,
    **settings,
) -> list[torch.Tensor]:
    """Five steps on a parameter of each layout; half way the state is reloaded in ``states``."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, 5, generator=generator) for _ in parameters]
    held = [
        nn.Parameter(laid_out(value, layout))
        for value, layout in zip(values, parameters, strict=True)
    ]
    adam = kind(held, lr=0.05, betas=(0.9, 0.99), **settings)
    for step in range(5):
        for parameter, layout in zip(held, gradients, strict=True):
            parameter.grad = laid_out(torch.randn(4, 3, 5, generator=generator), layout)
        if step == 3 and states is not None:
            saved = adam.state_dict()
            for entry, layout in zip(saved["state"].values(), states, strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    entry[name] = laid_out(entry[name].view(4, 3, 5), layout)
            if resume:
                adam = kind(held, lr=0.05, betas=(0.9, 0.99), **settings)
            adam.load_state_dict(saved)
        adam.step()
    for parameter, layout in zip(held, parameters, strict=True):
        assert parameter.stride() == laid_out(values[0], layout).stride()
        state = adam.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (4, 3, 5)
    return [parameter.detach() for parameter in held]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "layouts", [["chw"], ["hwc"], ["whc"], ["chw", "hwc", "whc", "hwc"]], ids="-".join
)
def test_dense_adam_does_not_mind_the_layout(layouts, fused):
    expected = trained(torch.optim.Adam, layouts, layouts, fused=False)
    found = trained(DenseAdam, layouts, layouts, fused=fused)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("parameters", "states"),
    [(["chw"], ["chw"]), (["hwc"], ["hwc"]), (["hwc", "chw", "hwc"], ["hwc", "chw", "hwc"])],
)
def test_dense_adam_goes_on_from_a_checkpoint(parameters, states, resume):
    expected = trained(torch.optim.Adam, parameters, parameters, fused=False)
    found = trained(DenseAdam, parameters, parameters, states, resume=resume, fused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "gradients", "states"),
    [
        (["hwc"], ["chw"], None),
        (["chw"], ["hwc"], None),
        (["hwc"], ["hwc"], ["chw"]),
        (["chw"], ["chw"], ["hwc"]),
        (["hwc", "chw", "hwc"], ["hwc", "hwc", "whc"], ["chw", "chw", "whc"]),
    ],
)
def test_dense_adam_takes_gradients_and_states_of_another_layout(parameters, gradients, states):
    """Torch's fused Adam pairs up the wrong elements there."""
    expected = trained(torch.optim.Adam, parameters, gradients, fused=False)
    found = trained(DenseAdam, parameters, gradients, states, fused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dense_adam_with_a_clipped_group_and_parameters_without_gradient():
    generator = torch.Generator().manual_seed(0)
    values = [laid_out(torch.randn(4, 3, 5, generator=generator), "hwc") for _ in range(3)]
    ends = []
    for kind, fused in ((DenseAdam, True), (torch.optim.Adam, False)):
        held = [nn.Parameter(value.clone()) for value in values]
        idle, used, late = held
        adam = kind(
            [{"params": [idle, used]}, {"params": [late], "lr": 0.01}],
            lr=0.05,
            weight_decay=0.1,
            fused=fused,
        )
        for step in range(4):
            used.grad = laid_out(used.detach() * 2, "hwc")
            late.grad = laid_out(late.detach() - 1, "hwc") if step > 1 else None
            adam.step()
        assert torch.equal(idle, values[0])
        ends.append([p.detach() for p in held])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dense_adam_where_axes_of_one_element_have_strides_of_their_own():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4, 3, 5, generator=generator)
    gradients = torch.randn(5, 4, 3, 5, generator=generator)
    ends = []
    for kind, fused in ((DenseAdam, True), (torch.optim.Adam, False)):
        parameter = nn.Parameter(laid_out(value, "hwc")[:, None])
        adam = kind([parameter], lr=0.05, fused=fused)
        for gradient in gradients:
            inner = laid_out(gradient, "hwc")
            a, b, c = inner.stride()
            parameter.grad = inner.as_strided((4, 1, 3, 5), (a, 7, b, c))
            adam.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def grid_after(backends: list[bool], optimiser: type[torch.optim.Adam], **settings):
    """Parameters after two steps in each backend (compiled or not), by checkpoints between them."""
    states = None
    points = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for compiled in backends:
        with contextlib.nullcontext() if compiled else native.disabled():
            torch.manual_seed(0)
            transform = make_transform("wavelet", num_levels=2)
            grid = FactorisedGrid(3, (9, 10, 12), transform, bits=None)
            adam = optimiser(grid.parameters(), lr=0.01, **settings)
            if states is not None:
                grid.load_state_dict(states[0])
                adam.load_state_dict(states[1])
            for _ in range(2):
                adam.zero_grad()
                (grid.features(grid()[0], points) - 0.3).square().sum().backward()
                adam.step()
            states = copy.deepcopy((grid.state_dict(), adam.state_dict()))
    return [parameter.detach() for parameter in grid.parameters()]


@pytest.mark.parametrize(
    "backends", [(True, True), (False, False), (True, False, True), (False, True, False)]
)
def test_grids_train_on_from_a_checkpoint_of_either_backend(backends):
    """Planes have another layout in memory in each."""
    expected = grid_after([False] * len(backends), torch.optim.Adam, fused=False)
    found = grid_after(list(backends), DenseAdam, fused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("expected", "tensor"),
    [
        (True, torch.zeros(4, 3, 5)),
        (True, torch.zeros(4, 3, 5).permute(2, 0, 1)),
        (True, torch.zeros(4, 3, 5, 2).to(memory_format=torch.channels_last)),
        (True, torch.zeros(())),
        (True, torch.zeros(1)),
        # The stride of an axis of one element means nothing.
        (True, torch.zeros(4).as_strided((4, 1), (1, 77))),
        (True, torch.zeros(4).as_strided((1, 4, 1), (0, 1, 3))),
        (True, torch.zeros(12).as_strided((4, 1, 3), (3, 2, 1))),
        (True, torch.zeros(12).as_strided((1, 4, 3), (1, 1, 4))),
        (True, torch.zeros(9).as_strided((1, 1), (5, 7))),
        # A dense part of a larger stretch.
        (True, torch.zeros(6, 4)[2:4]),
        (True, torch.zeros(6, 4)[3]),
        (False, torch.zeros(6, 4)[:, 1:3]),
        (False, torch.zeros(6, 4)[::2]),
        (False, torch.zeros(9)[::2]),
        (False, torch.zeros(6, 4)[:, 0]),
        (False, torch.zeros(1, 5).expand(4, 5)),
        (False, torch.zeros(5, 1).expand(5, 4)),
        (False, torch.zeros(8).as_strided((4, 3), (1, 1))),
        (False, torch.zeros(8).as_strided((3, 3), (2, 1))),
    ],
)
def test_is_dense(expected, tensor):
    assert is_dense(tensor) is expected
    if expected:
        # What it is for: the same elements as one row of numbers.
        row = tensor.as_strided((tensor.numel(),), (1,))
        row += 1
        assert tensor.eq(1).all() and row.numel() == tensor.numel()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_nothing_is_dense(shape):
    assert is_dense(torch.zeros(shape))
