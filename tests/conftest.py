"""Threads, seeds and backends; a tiny capture and tiny configurations, for tests that train."""

from __future__ import annotations

import copy
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from masked_wavelet_nerf import native

_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _processes > 1:  # they share the cores, as do the processes that tests start
    _num_threads = max(1, (os.cpu_count() or 1) // _processes)
    torch.set_num_threads(_num_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(_num_threads))


@pytest.fixture(autouse=True)
def denormals():
    """Training and rendering flush them on the calling thread; hypothesis wants to draw some."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(params=["native", "torch"])
def backend(request):
    """Runs a test with the compiled CPU loops, and again with plain torch."""
    if request.param == "native":
        assert native.is_enabled(), native.status()
        yield
        return
    with native.disabled():
        yield


@pytest.fixture
def small_work_is_split_too(monkeypatch):
    """Threads are woken for any work at all."""
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 0)


@pytest.fixture
def one_thread():
    """A test that wants more sets them itself."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def capture(tmp_path_factory) -> Path:
    """The sample scene in 24 × 24 pixels."""
    from masked_wavelet_nerf.datasets.sample import write_sample_capture

    folder = tmp_path_factory.mktemp("sample") / "capture"
    return write_sample_capture(folder, image_size=24, num_train=8, num_val=2, num_test=3)


def make_tiny_config(
    capture: Path,
    output_dir: Path,
    name: str = "run",
    *,
    steps: int = 20,
    method: str = "masked_wavelet_bounded",
    **model,
):
    """A trainer configuration, by default of a bounded scene, that trains in seconds."""
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig

    from masked_wavelet_nerf import method as methods

    config = copy.deepcopy(getattr(methods, method).config)
    settings = {
        "initial_resolution": 10,
        "final_resolution": 20,
        "upsample_steps": (8, 13),
        "occupancy_steps": (6, 13),
        "num_density_components": 3,
        "num_appearance_components": 4,
        "levels": 2,
        "hidden_dim": 16,
        "density_shift": -3.0,
        "occupancy_threshold": 0.2,
        **model,
    }
    for key, value in settings.items():
        assert hasattr(config.pipeline.model, key), key
        setattr(config.pipeline.model, key, value)
    manager = config.pipeline.datamanager
    manager.dataparser = BlenderDataParserConfig()
    manager.data = manager.dataparser.data = capture
    manager.train_num_rays_per_batch = 96
    for group in config.optimizers.values():
        group["scheduler"].max_steps = 20
        group["scheduler"].restarts = settings["upsample_steps"]
    config.optimizers["grids"]["optimizer"].lr = 0.1
    config.machine.device_type = "cpu"
    config.max_num_iterations = steps
    config.output_dir, config.experiment_name = output_dir, name
    config.timestamp = "0"
    config.vis = "tensorboard"
    config.steps_per_eval_batch = config.steps_per_eval_image = 10**9
    config.steps_per_eval_all_images = 10**9
    config.steps_per_save = 10**9
    config.logging.local_writer.enable = False
    return config


@pytest.fixture
def tiny_config(capture, tmp_path):
    """Makes configurations as :func:`make_tiny_config` does, for the sample capture."""
    return partial(make_tiny_config, capture, tmp_path)


@pytest.fixture
def start():
    """Sets up a trainer as ns-train does: seeds, then everything else."""

    def set_up(config):
        random.seed(config.machine.seed)
        np.random.seed(config.machine.seed)
        torch.manual_seed(config.machine.seed)
        trainer = config.setup()
        trainer.setup("test")
        return trainer

    return set_up


@pytest.fixture
def train(start):
    """Trains, and returns the trainer and the loss of every step."""

    def run(config):
        trainer = start(config)
        losses = {}
        original = trainer.train_iteration

        def recorded(step):
            result = original(step)
            losses[step] = float(result[0])
            return result

        trainer.train_iteration = recorded
        trainer.train()
        return trainer, losses

    return run
