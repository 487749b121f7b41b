"""Normalised device coordinates, against OpenGL's camera and points along rays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_dataparsers import write_llff

import masked_wavelet_codec as codec
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.dataparsers.llff import LLFFDataParserConfig
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.ndc import distance_at, find_forward_facing, project, to_box_rays
from masked_wavelet_nerf.runs import evaluate, model_of_scene, open_run, write_run
from masked_wavelet_nerf.unbounded import proposal, propose

HALF_VIEW = 0.5, 0.25
NEAR = 2.0


def poses(num: int = 5, tilt: float = 0.1) -> torch.Tensor:
    """Cameras around (1, 2, 3) that look along y, tilted by up to so many radians, z up."""
    generator = torch.Generator().manual_seed(0)
    angles = tilt * (2 * torch.rand(num, generator=generator) - 1)
    found = torch.zeros(num, 3, 4)
    found[:, :, 0] = torch.stack((angles.cos(), angles.sin(), 0 * angles), dim=-1)
    found[:, 2, 1] = 1
    found[:, :, 2] = torch.stack((angles.sin(), -angles.cos(), 0 * angles), dim=-1)
    found[:, :, 3] = torch.tensor([1.0, 2, 3]) + 0.2 * torch.randn(num, 3, generator=generator)
    return found


def one_camera(near: float = NEAR) -> torch.Tensor:
    """At the origin, looking along y: the projection of its view from ``near`` on."""
    pose = torch.tensor([[[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0]]])
    found = find_forward_facing(pose, torch.tensor([HALF_VIEW]), torch.tensor([near / 0.9]))
    assert found is not None
    torch.testing.assert_close(found.box, torch.tensor([[-1.05, -1.05, -1], [1.05, 1.05, 1]]))
    return found.projection


def test_corners_of_the_view_are_those_of_the_cube():
    projection = one_camera()
    for depth, z in ((NEAR, -1.0), (2 * NEAR, 0.0), (1e6, 1.0)):
        for x, y in ((-1.0, -1.0), (1.0, -1.0), (0.5, 1.0)):
            point = torch.tensor([x * HALF_VIEW[0] * depth, depth, y * HALF_VIEW[1] * depth])
            found = project(point, projection)
            torch.testing.assert_close(found, torch.tensor([x, y, z]), atol=1e-5, rtol=0)


def random_rays(num: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    origins = torch.randn(num, 3, generator=generator)
    origins[: num // 2, 1] += NEAR + 3  # some have passed the near plane
    directions = torch.randn(num, 3, generator=generator)
    directions[:, 1] = directions[:, 1].abs() + 0.1
    return origins, F.normalize(directions, dim=-1)


def test_straight_lines_stay_straight():
    projection, (origins, directions) = one_camera(), random_rays()
    rays = to_box_rays(origins, directions, projection)
    assert (rays.fars == 1).all()
    assert ((rays.nears > 0).flatten() == (origins[:, 1] > NEAR)).all()
    for share in (0.0, 0.3, 0.9):
        places = rays.nears + share * (1 - rays.nears)
        distances = distance_at(places, origins, directions, projection)
        assert (distances > -1e-5).all()
        expected = project(origins + distances * directions, projection)
        found = rays.origins + places * rays.directions
        scale = expected.abs().amax(dim=-1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(found / scale, expected / scale, atol=2e-4, rtol=0)
        if share == 0:  # from the near plane, or the camera where that has passed it
            ahead = (origins[:, 1] > NEAR)[:, None]
            start = (NEAR - origins[:, 1:2]) / directions[:, 1:2]
            torch.testing.assert_close(distances, torch.where(ahead, 0, start), atol=1e-3, rtol=0)


def test_rays_that_do_not_run_forward_see_nothing():
    directions = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    origins = torch.zeros(3, 3)
    rays = to_box_rays(origins, directions, one_camera())
    assert rays.fars.flatten().tolist() == [0, 0, 1]
    assert all(t.isfinite().all() for t in rays)
    nodes = proposal(torch.ones(4, 4, 4), 8)
    for contracted in (True, False):
        samples = propose(*rays, 25.0, nodes, 6, None, contracted=contracted)
        assert (samples.lengths[:12] == 0).all() and (samples.lengths[12:] > 0).all()
        assert samples.points.isfinite().all()
    distances = distance_at(torch.full((3, 1), 0.5), origins, directions, one_camera())
    assert distances.flatten().tolist() == pytest.approx([0, 0, 2 * NEAR])


def test_gradients_reach_the_cameras():
    origins, directions = random_rays(6)
    projection = one_camera().double()

    def ends(*rays: torch.Tensor) -> torch.Tensor:
        return torch.cat(to_box_rays(*rays, projection)[:3], dim=-1)

    rays = [t.double().requires_grad_() for t in (origins, directions)]
    assert torch.autograd.gradcheck(ends, rays)


def test_without_density_samples_are_even(backend):
    origins, directions = torch.tensor([[0.25, 0, -1]]), torch.tensor([[0.5, 0, 2]])
    limits = torch.tensor([[0.2]]), torch.tensor([[1.0]])
    nodes = proposal(torch.zeros(4, 4, 4), 16)
    samples = propose(origins, directions, *limits, 25.0, nodes, 31, None, contracted=False)
    edges = 0.2 + 0.8 * (torch.arange(32) + 0.5) / 32
    middles = (edges[1:] + edges[:-1]) / 2
    torch.testing.assert_close(samples.middles, middles, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(samples.lengths, edges.diff(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(samples.points, origins + directions * middles[:, None])


def test_samples_gather_at_a_wall_and_beside_the_box_at_what_is_next_to_it(backend):
    density = torch.zeros(21, 21, 21)
    density[:, :, 14:16] = 200.0  # with its neighbours from z = 0.25 on: t' = 0.625
    for x in (0.0, 1.5):
        origins, directions = torch.tensor([[x, 0, -1]]), torch.tensor([[0.0, 0, 2]])
        limits = torch.zeros(1, 1), torch.ones(1, 1)
        nodes = proposal(density, 96)
        samples = propose(origins, directions, *limits, 25.0, nodes, 60, None, contracted=False)
        at_front = (samples.middles > 0.61) & (samples.middles < 0.66)
        assert float(at_front.float().mean()) == pytest.approx(1 / 1.2, abs=0.08)


def test_the_box_holds_what_the_cameras_see():
    cameras, half_views = poses(), torch.tensor([HALF_VIEW]).repeat(5, 1)
    found = find_forward_facing(cameras, half_views, torch.full((5,), 4.0))
    assert found is not None
    to_near = found.projection[2] + found.projection[3]
    assert (F.pad(cameras[:, :, 3], (0, 1), value=1.0) @ to_near < 0).all()  # before the near plane
    for view in range(5):
        for x in (-1, 0, 1):
            for depth in (4.0, 30.0, 1e5):
                local = torch.tensor([x * HALF_VIEW[0], HALF_VIEW[1], -1.0]) * depth
                world = cameras[view, :, :3] @ local + cameras[view, :, 3]
                point = project(world, found.projection)
                assert (point >= found.box[0] - 1e-4).all() and (point <= found.box[1] + 1e-4).all()
    assert float(found.box[1].max()) < 1.6  # and not much more


@pytest.mark.parametrize(
    ("tilt", "near"), [(1.2, 4.0), (0.1, 0.05)], ids=["all directions", "amid the scene"]
)
def test_other_cameras_have_no_such_box(tilt, near):
    half_views = torch.tensor([HALF_VIEW]).repeat(5, 1)
    assert find_forward_facing(poses(tilt=tilt), half_views, torch.full((5,), near)) is None


def test_opposite_cameras_have_no_such_box():
    cameras = poses(2, tilt=0.0)
    cameras[1, :, :3] = torch.diag(torch.tensor([-1.0, -1, 1])) @ cameras[1, :, :3]
    half_views = torch.tensor([HALF_VIEW]).repeat(2, 1)
    assert find_forward_facing(cameras, half_views, torch.full((2,), 4.0)) is None


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def llff(tmp_path):
    """Nine forward-facing photos of 12 × 8 pixels, all black."""
    return write_llff(tmp_path / "llff")


@pytest.fixture
def config(tiny_config, llff):
    config = tiny_config(method="masked_wavelet", steps=20)
    manager = config.pipeline.datamanager
    manager.dataparser = LLFFDataParserConfig(data=llff)
    manager.data = llff
    return config


def test_training_export_and_decoding(config, train, llff, tmp_path):
    trainer, losses = train(config)
    model = trainer.pipeline.model
    assert model.projection is not None
    assert losses[19] < losses[0]
    size = (model.aabb[1] - model.aabb[0]).tolist()
    assert size[2] == 2 and math.prod(model.field.resolution) == pytest.approx(20**3, rel=0.1)
    trainer.save_checkpoint(19)
    config.save_config()
    run = open_run(config.get_base_dir() / "config.yml", llff)
    before = evaluate(run.pipeline)
    path, _ = export_run(run, tmp_path / "a.mwnf", psnr=before.psnr)
    scene = codec.read(path)
    decoded = open_run(write_run(scene, tmp_path / "decoded", llff), llff)
    assert torch.equal(decoded.model.projection, model.projection)
    assert evaluate(decoded.pipeline).psnr == pytest.approx(before.psnr, abs=0.01)
    alone = model_of_scene(scene)  # without the capture
    camera = run.pipeline.datamanager.eval_dataset.cameras[0:1]
    pictures = [m.eval().get_outputs_for_camera(camera) for m in (run.model, alone)]
    for name in ("rgb", "depth"):
        torch.testing.assert_close(pictures[1][name], pictures[0][name], atol=1e-3, rtol=1e-3)
    for wrong in ([[1.0]], "1", [[math.nan] * 4] * 4, None):
        scene.meta["projection"] = wrong
        with pytest.raises(codec.CodecError, match=r"meta: projection .* expected 4 × 4 numbers"):
            model_of_scene(scene)


def test_depth_is_the_distance_of_what_is_seen(config, start):
    trainer = start(config)
    model = trainer.pipeline.model.eval()
    dataset = trainer.pipeline.datamanager.eval_dataset
    depth = 5.0  # of a wall, from the camera that the planes are made for
    axis = model.projection[3]
    z_of_wall = project((depth - axis[3]) * axis[:3], model.projection)[2]

    def density(_, points):
        return torch.where(points[:, 2] > z_of_wall, 1e4, 0.0)  # the box is as deep as the cube

    def density_at_nodes(_, size):
        nodes = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij")
        return density(None, torch.stack(nodes, dim=-1).view(-1, 3)).view(size, size, size)

    model.field.density, model.field.density_at_nodes = density, density_at_nodes
    for view in range(len(dataset)):
        rays = dataset.cameras.generate_rays(camera_indices=view, keep_shape=True).flatten()
        start_depth = rays.origins @ axis[:3] + axis[3]
        expected = (depth - start_depth) / (rays.directions @ axis[:3])
        outputs = model(rays)
        assert float(outputs["accumulation"].min()) > 0.99
        torch.testing.assert_close(outputs["depth"][:, 0], expected, rtol=0.05, atol=0)


def test_contraction_stays_a_choice_and_what_older_runs_have(config, start):
    config.pipeline.model.ndc = False
    assert start(config).pipeline.model.projection is None
    older = MaskedWaveletModelConfig()
    del older.__dict__["ndc"]
    assert yaml.load(yaml.dump(older), Loader=yaml.Loader).ndc is False
    assert yaml.load(yaml.dump(MaskedWaveletModelConfig()), Loader=yaml.Loader).ndc is True
