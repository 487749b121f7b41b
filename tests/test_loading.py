"""Files as objects that render, against nerfstudio's way to the same pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import unittest.mock
from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.model_components.scene_colliders import AABBBoxCollider
from test_dataparsers import write_llff

import masked_wavelet_codec as codec
import masked_wavelet_nerf
from masked_wavelet_nerf import load_scene, native
from masked_wavelet_nerf.dataparsers.llff import LLFFDataParserConfig
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.loading import LoadedScene
from masked_wavelet_nerf.rendering import limits_in_box
from masked_wavelet_nerf.runs import model_of_scene, open_run

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(params=["bounded", "contracted", "forward-facing"])
def path(request, tiny_config, train, tmp_path) -> Path:
    """The file of a run."""
    kind = request.param
    method = "masked_wavelet_bounded" if kind == "bounded" else "masked_wavelet"
    config = tiny_config(method=method, steps=20)
    manager = config.pipeline.datamanager
    if kind == "forward-facing":
        manager.data = write_llff(tmp_path / "llff")
        manager.dataparser = LLFFDataParserConfig(data=manager.data)
    trainer, _ = train(config)
    trainer.save_checkpoint(19)
    config.save_config()
    run = open_run(config.get_base_dir() / "config.yml", manager.data)
    return export_run(run, tmp_path / "scene.mwnf", psnr=None)[0]


@pytest.fixture
def bounded(tiny_config, start, tmp_path) -> codec.Scene:
    """A scene that is hardly trained."""
    config = tiny_config(steps=1)
    start(config).save_checkpoint(0)
    config.save_config()
    run = open_run(config.get_base_dir() / "config.yml", config.pipeline.datamanager.data)
    return codec.read(export_run(run, tmp_path / "scene.mwnf", psnr=None)[0])


def bundle(origins: torch.Tensor, directions: torch.Tensor) -> RayBundle:
    ones = torch.ones_like(origins[:, :1])
    return RayBundle(origins, directions, ones, camera_indices=torch.zeros_like(ones).long())


def test_pictures_and_points_are_those_of_the_decoded_run(path):
    scene, model = load_scene(path), model_of_scene(codec.read(path)).eval()
    camera = scene.cameras[-1].scaled(1.5)
    rgb, depth = scene.render(camera)
    assert rgb.shape == (camera.height, camera.width, 3)
    origins, directions = scene._rays_through_pixels(camera)
    expected = model(bundle(origins, directions))
    torch.testing.assert_close(rgb.view(-1, 3), expected["rgb"], atol=1e-5, rtol=0)
    torch.testing.assert_close(depth.view(-1, 1), expected["depth"], atol=1e-4, rtol=1e-4)
    assert float(rgb.std()) > 0 and float(depth.std()) > 0
    positions = origins[:50] + directions[:50] * depth.view(-1, 1)[:50]
    points, spatial = model.space.grid_points(positions), model.spatial()
    torch.testing.assert_close(scene.density(positions), model.field.density(spatial, points))
    torch.testing.assert_close(
        scene.colour(positions, directions[:50]),
        model.field.colour(spatial, points, directions[:50]),
    )


def test_rays_run_through_the_middles_of_pixels(bounded):
    scene = LoadedScene(bounded)
    camera = scene.cameras[0]
    assert (camera.width, camera.height, camera.cx, camera.cy) == (24, 24, 12, 12)
    origins, directions = scene._rays_through_pixels(camera)
    assert (origins == camera.camera_to_world[:, 3]).all()
    local = directions @ camera.camera_to_world[:, :3]
    x, y = (-local[:, i] / local[:, 2] for i in (0, 1))
    pixels = torch.arange(24) + 0.5
    torch.testing.assert_close(x.view(24, 24)[5] * camera.fx + 12, pixels)
    torch.testing.assert_close(12 - y.view(24, 24)[:, 5] * camera.fy, pixels)
    half = camera.scaled(0.5)
    assert (half.width, half.cx, half.fx) == (12, 6, camera.fx / 2)
    assert (half.height, half.cy, half.fy) == (12, 6, camera.fy / 2)
    assert len(scene.cameras) == len(bounded.cameras.fx)


def test_limits_in_a_box_are_those_of_nerfstudios_collider():
    torch.manual_seed(0)
    box = torch.tensor([[-1.0, -2.0, -0.5], [1.0, 1.5, 2.0]])
    origins = 3 * torch.randn(500, 3)
    directions = torch.nn.functional.normalize(torch.randn(500, 3), dim=-1)
    rays = AABBBoxCollider(SceneBox(box)).eval()(bundle(origins, directions))
    nears, fars = limits_in_box(origins, directions, box)
    torch.testing.assert_close(nears, rays.nears)
    torch.testing.assert_close(fars, rays.fars, atol=2e-6, rtol=1e-6)
    assert 20 < int((fars > nears).sum()) < 480


EXCESSIVE = {
    "num_density_components": (10**9, "3"),
    "num_appearance_components": (5, "4"),
    "hidden_dim": (10**6, "16"),
    "appearance_dim": (10**6, "27"),
    "num_samples": (10**9, "1 to 4096"),
    "proposal_resolution": (10**5, "2 to 512"),
    "step_ratio": (0.0, "0.01 to 100"),
    "distance_scale": (float("nan"), "0 to 1000000"),
    "num_frequencies": (10**6, "0 to 16"),
    "levels": (10**9, "0 to 6"),
}


def test_settings_that_would_ask_for_any_memory_are_refused(bounded):
    good = dict(bounded.meta["model"])
    for name, (value, expected) in EXCESSIVE.items():
        bounded.meta["model"] = {**good, name: value}
        for load in (LoadedScene, model_of_scene):
            with pytest.raises(codec.CodecError, match=rf"meta: {name} \S+; expected {expected}"):
                load(bounded)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("background_color", "pink"),
        ("planes", "hexaplane"),
        ("transform", "fourier"),
        ("triplane_reduce", "max"),
        ("wavelet", "nonsense"),
    ],
)
def test_settings_that_no_version_knows_are_refused(bounded, name, value):
    bounded.meta["model"][name] = value
    for load in (LoadedScene, model_of_scene):
        with pytest.raises(codec.CodecError, match=rf"meta: {name} '{value}'; expected"):
            load(bounded)


def test_compiled_loops_take_over_from_plain_torch(path):
    """After the first rays, with the same picture."""
    scene = load_scene(path)
    camera = scene.cameras[0]
    assert not scene._planes.is_compiled
    first = scene.render(camera)
    (loading,) = [t for t in threading.enumerate() if t.name == "compiled loops"]
    loading.join()
    assert scene._planes.is_compiled
    with unittest.mock.patch.object(native, "features", wraps=native.features) as used:
        second = scene.render(camera)
    assert used.called
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_is_no_scene_of_ours_is_refused(bounded, tmp_path):
    del bounded.meta["box"]
    with pytest.raises(codec.CodecError, match="not a masked-wavelet scene"):
        LoadedScene(bounded)
    (tmp_path / "a.mwnf").write_bytes(b"something else")
    with pytest.raises(codec.CodecError):
        load_scene(tmp_path / "a.mwnf")
    with pytest.raises(FileNotFoundError):
        load_scene(str(tmp_path / "none.mwnf"))


def test_the_example_of_the_readme_runs_without_nerfstudio(bounded, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf8"), flags=re.DOTALL)
    (example,) = [block for block in blocks if "load_scene" in block]
    block_nerfstudio = (
        "import sys\n"
        "for name in ('nerfstudio', 'nerfacc', 'tyro', 'viser'):\n"
        "    sys.modules[name] = None\n"
    )
    check = "assert rgb.shape == (24, 24, 3) and depth.shape == (24, 24, 1)\nprint('done')\n"
    finished = subprocess.run(
        [sys.executable, "-c", block_nerfstudio + example + check],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.endswith("done\n"), finished.stderr


def test_what_the_package_has_not_is_an_error():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = masked_wavelet_nerf.nothing_like_it
