"""Plain torch, and CUDA where there is one, train as the compiled loops do."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from masked_wavelet_nerf import native
from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PATHS = ["plain", pytest.param("cuda", marks=needs_cuda)]

_LAST = 10


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["masked_wavelet", "masked_wavelet_bounded"])
def test_training_through_upsamplings_goes_as_well_as_in_compiled_loops(
    tiny_config, train, method, path
):
    # On CUDA, where jitter is drawn otherwise, longer and on grids of a real size: what goes wrong
    # between kernels may not on tiny ones.
    on_cuda = path == "cuda"
    sides, times, tolerance = ((64, 88), 5, 0.05) if on_cuda else ((24, 36), 1, 0.005)

    def final_loss(name: str, device: str) -> float:
        config = tiny_config(
            name=name,
            method=method,
            steps=36 * times,
            initial_resolution=sides[0],
            final_resolution=sides[1],
            upsample_steps=(12 * times, 20 * times),
            occupancy_steps=(8 * times, 20 * times),
            levels=4,
        )
        config.machine.device_type = device
        config.optimizers["grids"]["optimizer"].lr = 0.02
        config.pipeline.datamanager.train_num_rays_per_batch = 128 * times
        _, losses = train(config)
        return float(np.mean(list(losses.values())[-_LAST:]))

    expected = final_loss("compiled", "cpu")
    with contextlib.nullcontext() if on_cuda else native.disabled():
        found = final_loss(path, "cuda" if on_cuda else "cpu")
    assert found == pytest.approx(expected, rel=tolerance)


@needs_cuda
@pytest.mark.parametrize("side", [64, 84, 192])
def test_coarse_densities_on_cuda_are_those_of_the_cpu(side):
    torch.manual_seed(0)
    field = WaveletPlaneField(FieldConfig(density_shift=-1.0), (side, side, side))
    found = {}
    for device in ("cpu", "cuda"):
        field.to(device)
        with torch.no_grad():
            found[device] = field.density_at_nodes(field.to_spatial(), 64).cpu()
    assert float(found["cpu"].std()) > 1e-3
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)
