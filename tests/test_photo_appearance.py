"""What belongs to single training photos: their appearance, and corrections of their cameras."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig

import masked_wavelet_codec as codec
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.photo_appearance import PhotoAppearance
from masked_wavelet_nerf.runs import open_run

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

BOTH = {
    "camera_optimizer": CameraOptimizerConfig(mode="SO3xR3"),
    "photo_appearance_dim": 4,
}


def test_offsets_of_all_photos_have_the_mean_zero():
    appearance = PhotoAppearance(5, 3, 16)
    assert (appearance(torch.arange(5)) == 0).all()  # a training starts without
    torch.nn.init.normal_(appearance.layer.weight)
    offsets = appearance(torch.arange(5))
    torch.testing.assert_close(offsets.mean(dim=0), torch.zeros(16), atol=1e-6, rtol=0)
    assert float((offsets[0] - offsets[1]).abs().max()) > 0.01
    assert torch.equal(appearance(torch.tensor([3, 0, 3])), offsets[[3, 0, 3]])


def test_offsets_are_a_bias_of_the_first_layer(tiny_config, start, backend):
    field = start(tiny_config()).pipeline.model.field
    spatial, points = field.to_spatial(), torch.rand(6, 3)
    directions = torch.nn.functional.normalize(torch.randn(6, 3), dim=-1)
    offset = torch.randn(16)
    found = field.colour(spatial, points, directions, offset.expand(6, 16))
    with torch.no_grad():
        field.colour_network[0].bias += offset
    torch.testing.assert_close(found, field.colour(spatial, points, directions))


def test_photos_of_another_exposure_are_told_apart(tiny_config, train):
    """Half of the photos at half brightness: one colour for both would be off by a fourth."""

    def error(dim: int) -> float:
        config = tiny_config(f"dim{dim}", steps=60, photo_appearance_dim=dim)
        config.optimizers["networks"]["optimizer"].lr = 0.02
        _, losses = train_darkened(config, train)
        return sum(list(losses.values())[-10:]) / 10

    assert error(4) < 0.8 * error(0)


def train_darkened(config, train):
    from masked_wavelet_nerf.datamanager import WaveletDataManager

    original = WaveletDataManager.next_train

    def darkened(self, step):
        rays, batch = original(self, step)
        dark = batch["indices"][:, :1] % 2 == 0
        return rays, {**batch, "image": torch.where(dark, 0.5, 1.0) * batch["image"][:, :3]}

    WaveletDataManager.next_train = darkened
    try:
        return train(config)
    finally:
        WaveletDataManager.next_train = original


def test_corrections_of_cameras_have_the_gradient_of_differences(tiny_config, train):
    settings = {"colour_mass": 0.0, "colour_weight_threshold": 0.0, "bits": None}
    trainer, _ = train(tiny_config(steps=20, **BOTH, **settings))
    model = trainer.pipeline.model
    rays, _ = trainer.pipeline.datamanager.next_train(1000)
    model.occupancy.cells = torch.ones(1, 1, 1, dtype=torch.bool)  # no jumps at its borders
    rays = model.collider(rays)
    adjustment = model.camera_optimizer.pose_adjustment
    trained = adjustment.detach().clone()
    assert float(trained.abs().max()) > 0
    colours = torch.rand(len(rays), 3)

    def rendered(change: torch.Tensor) -> torch.Tensor:
        adjustment.data = trained + change
        torch.manual_seed(5)  # the same jitter
        return (model.get_outputs(copy.deepcopy(rays))["rgb"] * colours).sum()

    rendered(torch.zeros(8, 6)).backward()
    found = adjustment.grad
    assert found is not None
    with torch.no_grad():
        for axis in range(6):
            change = torch.zeros(8, 6)
            change[:, axis] = 1e-3
            difference = float(rendered(change) - rendered(-change)) / 2e-3
            expected = float(found[:, axis].sum())
            assert expected == pytest.approx(difference, rel=0.12, abs=0.1)


def test_nothing_of_single_photos_is_in_the_file_and_runs_open_without_them(
    tiny_config, train, tmp_path
):
    config = tiny_config(steps=10, **BOTH)
    trainer, _ = train(config)
    trainer.save_checkpoint(9)
    config.save_config()
    path = config.get_base_dir() / "config.yml"
    run = open_run(path, config.pipeline.datamanager.data)
    saved = run.model.camera_optimizer.pose_adjustment
    assert torch.equal(saved, trainer.pipeline.model.camera_optimizer.pose_adjustment)
    with_photos, _ = export_run(run, tmp_path / "a.mwnf", psnr=None)
    alone = open_run(path, None)
    assert alone.pipeline is not None  # the capture is still there: take it away
    manager = config.pipeline.datamanager
    manager.data = manager.dataparser.data = tmp_path / "gone"
    config.save_config()
    alone = open_run(path, None)
    assert alone.pipeline is None
    for name, network in run.model.field.networks().items():
        assert torch.equal(alone.model.field.networks()[name], network)
    scene = codec.read(with_photos)
    assert set(scene.networks) == set(run.model.field.networks())


def test_configurations_saved_before_there_were_these_settings_load():
    config = MaskedWaveletModelConfig(bits=5)
    del config.__dict__["camera_optimizer"], config.__dict__["photo_appearance_dim"]
    loaded = yaml.load(yaml.dump(config), Loader=yaml.Loader)
    assert (loaded.camera_optimizer.mode, loaded.photo_appearance_dim, loaded.bits) == ("off", 0, 5)
