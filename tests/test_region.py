"""The part of an unbounded scene that planes resolve most, found from cameras."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras

from masked_wavelet_nerf.region import region_of_interest

DEFAULT = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 2.0, 3.0]])


def looking(origins: torch.Tensor, forward: torch.Tensor, *, tan: tuple[float, float]) -> Cameras:
    backward = -F.normalize(forward, dim=-1)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 0, 1]).expand_as(backward), backward))
    axes = torch.stack((right, torch.linalg.cross(backward, right), backward, origins), dim=-1)
    return Cameras(axes, fx=50 / tan[0], fy=40 / tan[1], cx=50.0, cy=40.0, width=100, height=80)


def ring(centre: torch.Tensor, radius: float, num: int = 12) -> torch.Tensor:
    angles = torch.arange(num) * (2 * math.pi / num)
    return centre + radius * torch.stack((angles.cos(), angles.sin(), 0 * angles), dim=-1)


def test_a_common_point_is_the_middle_and_the_view_there_the_width():
    centre = torch.tensor([1.0, 2.0, 3.0])
    origins = ring(centre, 4.0)
    found = region_of_interest(looking(origins, centre - origins, tan=(0.5, 0.125)), DEFAULT)
    # 4 · sqrt(0.5 · 0.125) = 1
    torch.testing.assert_close(found, torch.stack((centre - 1, centre + 1)), atol=1e-4, rtol=0)


def test_cameras_that_look_outwards_or_alike_leave_the_default():
    centre = torch.tensor([0.5, 0.0, 0.0])
    origins = ring(centre, 0.2)
    assert torch.equal(
        region_of_interest(looking(origins, origins - centre, tan=(0.5, 0.5)), DEFAULT), DEFAULT
    )
    alike = torch.tensor([[0.0, 1.0, 0.0]]).expand(12, 3)
    assert torch.equal(
        region_of_interest(looking(origins, alike, tan=(0.5, 0.5)), DEFAULT), DEFAULT
    )


@pytest.fixture
def unbounded_config(tiny_config):
    def make(name: str, **settings):
        return tiny_config(name, steps=6, method="masked_wavelet", **settings)

    return make


def test_a_training_starts_from_its_cameras_and_a_resumed_one_keeps_the_region(
    unbounded_config, train
):
    trainer, _ = train(unbounded_config("first"))
    model = trainer.pipeline.model
    cameras = trainer.pipeline.datamanager.train_dataset.cameras
    region = region_of_interest(cameras, model.scene_box.aabb)
    assert not torch.allclose(region, model.scene_box.aabb, atol=0.01)
    torch.testing.assert_close(model.aabb, region.mean(dim=0) + 2 * (region - region.mean(dim=0)))
    # Its corners are where contraction starts: half of the way out.
    corners = torch.tensor([[-0.5] * 3, [0.5] * 3])
    torch.testing.assert_close(model.space.grid_points(region), corners, atol=1e-5, rtol=0)

    config = unbounded_config("second")
    config.load_dir = trainer.checkpoint_dir
    config.pipeline.datamanager.dataparser.scale_factor = 3.0
    resumed, _ = train(config)
    assert torch.equal(resumed.pipeline.model.aabb, model.aabb)
