"""tiny-cuda-nn and nerfacc: compared where CUDA exists; their conventions, by stand-ins."""

from __future__ import annotations

import itertools
import math
import sys
import types

import pytest
import torch
from torch import nn

from masked_wavelet_nerf import accelerators, native
from masked_wavelet_nerf.sampling import OccupancyGrid, march

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(accelerators, "_reasons", {})
    monkeypatch.setattr(accelerators, "_marching_agrees", {})
    accelerators._networks.clear()


def network(*, num_inputs: int = 21, width: int = 16, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(num_inputs, width, bias=bias),
        nn.ReLU(),
        nn.Linear(width, width, bias=bias),
        nn.ReLU(),
        nn.Linear(width, 3, bias=bias),
    )


class FakeNetwork(nn.Module):
    """As tiny-cuda-nn says it works: no biases, row-major, inputs padded with ones to 16s."""

    padding_value = 1.0

    def __init__(self, num_inputs: int, num_outputs: int, config: dict) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.width, self.hidden = config["n_neurons"], config["n_hidden_layers"]
        assert config["activation"] == "ReLU" and config["output_activation"] == "None"
        self.padded = [16 * math.ceil(n / 16) for n in (num_inputs, num_outputs)]
        count = self.width * (self.padded[0] + (self.hidden - 1) * self.width + self.padded[1])
        self.params = nn.Parameter(torch.zeros(count))

    def forward(self, x):
        weights = self.params
        x = nn.functional.pad(x, (0, self.padded[0] - x.shape[1]), value=self.padding_value)
        sides = [self.padded[0], *[self.width] * self.hidden, self.padded[1]]
        for i, (n, m) in enumerate(itertools.pairwise(sides)):
            matrix, weights = weights[: n * m].view(m, n), weights[n * m :]
            x = x @ matrix.T
            x = x.relu() if i < self.hidden else x
        assert not len(weights)
        return x[:, : self.num_outputs]


@pytest.fixture
def tinycudann(monkeypatch):
    module = types.ModuleType("tinycudann")
    module.Network = FakeNetwork  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tinycudann", module)
    return module


def test_fused_network_takes_our_weights_and_gives_them_gradients(tinycudann):
    ours = network()
    fused = accelerators._fused_network(ours, 21)
    assert isinstance(fused, FakeNetwork)
    x = torch.randn(50, 21)
    expected, found = ours(x), accelerators._run_fused(fused, ours, x)
    torch.testing.assert_close(found, expected)
    weights = list(ours.parameters())
    upstream = torch.randn(50, 3)
    torch.testing.assert_close(
        torch.autograd.grad(found, weights, upstream),
        torch.autograd.grad(expected, weights, upstream),
    )
    # What is trained is what runs: no copy of the weights stays behind.
    with torch.no_grad():
        ours[0].weight.mul_(2)
    torch.testing.assert_close(accelerators._run_fused(fused, ours, x), ours(x))


def test_flat_weights_are_row_major_and_padded():
    layers = [nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)]
    layers[0].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    layers[2].weight.data = torch.tensor([[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]])
    flat = accelerators.flat_weights(nn.Sequential(*layers))
    assert len(flat) == 3 * 16 + 16 * 3
    assert flat[:2].tolist() == [1, 2] and flat[16:18].tolist() == [3, 4]
    assert flat[48:54].tolist() == [7, 8, 9, 10, 11, 12]
    assert flat.sum() == 78


def test_networks_that_do_not_fit_are_left_out_with_a_reason(tinycudann, monkeypatch):
    assert accelerators._fused_network(network(bias=True), 21) is None
    assert "network-biases False" in accelerators.status()
    assert accelerators._fused_network(network(width=24), 21) is None
    assert "24" in accelerators.status() and "plain torch is used" in accelerators.status()
    monkeypatch.setattr(FakeNetwork, "forward", lambda self, x: torch.ones(len(x), 3))
    assert accelerators._fused_network(network(), 21) is None
    assert "disagrees" in accelerators.status()
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    assert accelerators._fused_network(network(), 21) is None
    assert "not installed" in accelerators.status()


def test_on_the_cpu_nothing_is_replaced(tinycudann):
    ours, x = network(), torch.randn(4, 21)
    assert torch.equal(accelerators.run_network(ours, x), ours(x))
    assert not accelerators.marches(torch.zeros(1, 3), torch.ones(4, 4, 4, dtype=torch.bool))
    assert not accelerators._networks and not accelerators._reasons


def traverse_by_loop(origins, directions, binaries, aabbs, near_planes, far_planes, step_size):
    """What nerfacc documents: steps from near on; a sample where a middle lies in a full cell."""
    low, high = aabbs[0, :3], aabbs[0, 3:]
    size = torch.tensor(binaries.shape[1:])
    rays, values = [], []
    for i in range(len(origins)):
        for k in range(1000):
            middle = float(near_planes[i]) + (k + 0.5) * step_size
            if middle >= float(far_planes[i]):
                break
            cell = (origins[i] + directions[i] * middle - low) / (high - low) * size
            inside = bool(((cell >= 0) & (cell < size)).all())
            if inside and binaries[0][tuple(cell.long().tolist())]:
                rays.append(i)
                values.append(middle)
    samples = types.SimpleNamespace(ray_indices=torch.tensor(rays), vals=torch.tensor(values))
    return None, samples


def test_nerfacc_is_asked_for_the_samples_that_plain_torch_takes(monkeypatch):
    import nerfacc

    monkeypatch.setattr(nerfacc, "traverse_grids", traverse_by_loop)
    generator = torch.Generator().manual_seed(0)
    grid = OccupancyGrid()
    grid.cells = torch.rand(5, 7, 4, generator=generator) < 0.5
    origins = torch.rand(20, 3, generator=generator) * 4 - 2
    directions = torch.nn.functional.normalize(-origins + 0.3, dim=-1)
    nears, fars = torch.rand(20, 1, generator=generator), 2.5 + torch.zeros(20, 1)
    jitter = torch.rand(20, 1, generator=generator)
    with native.disabled():
        expected = march(origins, directions, nears, fars, 0.07, 60, grid, jitter)
    ray, middles = accelerators.occupied_samples(
        origins, directions, nears + jitter * 0.07, fars, 0.07, grid.cells
    )
    assert len(ray) > 50
    assert torch.equal(ray, expected.ray)
    torch.testing.assert_close(middles, expected.middles)
    assert not accelerators._try_marching(torch.device("cpu"))
    assert "nerfacc: its kernels are not compiled" in accelerators.status()
    monkeypatch.setattr(accelerators, "_has_nerfacc_kernels", lambda: True)
    assert accelerators._try_marching(torch.device("cpu"))
    monkeypatch.setattr(accelerators, "occupied_samples", lambda *a: (torch.zeros(3).long(), None))
    assert not accelerators._try_marching(torch.device("cpu"))
    assert "nerfacc" in accelerators.status() and "disagrees" in accelerators.status()


@needs_cuda
def test_libraries_agree_on_this_gpu():
    device = torch.device("cuda")
    ours = network(num_inputs=150, width=128).to(device)
    accelerators.try_out(ours, device)
    for name, reason in accelerators._reasons.items():
        assert "disagrees" not in reason, f"{name}: {reason}"
