"""Voxels: their transform against PyWavelets and SciPy, and all that planes guarantee."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from torch.autograd import gradcheck

import masked_wavelet_codec as codec
from masked_wavelet_nerf.field import FieldConfig, WaveletPlaneField
from masked_wavelet_nerf.loading import LoadedScene
from masked_wavelet_nerf.planes import INITIAL_LOGIT, CoefficientGrid
from masked_wavelet_nerf.scene import load_scene_into, scene_from_model
from masked_wavelet_nerf.scene_figure import magnitudes, projections
from masked_wavelet_nerf.volumes import VolumeTransform
from masked_wavelet_nerf.wavelet import make_transform

KEYS = ("aad", "ada", "add", "daa", "dad", "dda", "ddd")


def volume_of(*size: int, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def transform_of(name="wavelet", **settings) -> VolumeTransform:
    return VolumeTransform(make_transform(name, **settings))


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2", "bior4.4", "coif1", "sym4"])
@pytest.mark.parametrize("level_scaling", [False, True])
def test_bands_are_those_of_pywavelets(wavelet, level_scaling):
    volume, levels = volume_of(2, 16, 24, 8), 3
    transform = transform_of(wavelet=wavelet, num_levels=levels, level_scaling=level_scaling)
    approximation, *details = transform.to_levels(volume)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of boundary effects
        expected = pywt.wavedecn(
            volume.numpy(), wavelet, mode="periodization", level=levels, axes=(1, 2, 3)
        )
    np.testing.assert_allclose(8**1.5 * approximation[:, 0].numpy(), expected[0], atol=1e-12)
    for level, detail in enumerate(details, start=1):
        factor = 8 ** ((levels - level + 1) / 2) / (level + 1 if level_scaling else 1)
        for number, key in enumerate(KEYS):
            found = factor * detail[:, number].numpy()
            np.testing.assert_allclose(found, expected[level][key], atol=1e-12)


def test_waves_are_those_of_scipy():
    volume = volume_of(2, 5, 6, 7)
    (found,) = transform_of("dct").to_levels(volume)
    expected = scipy.fft.dctn(volume.numpy(), axes=(1, 2, 3), norm="ortho")
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16, 16), (7, 13, 10), (2, 3, 33)])
@pytest.mark.parametrize("name", ["wavelet", "dct", "identity"])
def test_inverse(name, size):
    transform, volume = transform_of(name, num_levels=2), volume_of(3, *size)
    levels = transform.to_levels(volume)
    assert [tuple(level.shape[2:]) for level in levels] == [*transform.band_sizes(size)]
    # PyWavelets' filters of bior4.4 invert to some 1e-11 only.
    torch.testing.assert_close(transform.from_levels(levels, size), volume, atol=1e-9, rtol=0)


def test_a_coefficient_counts_as_much_as_a_voxel_at_any_level():
    transform = transform_of(num_levels=4, level_scaling=False)
    levels = transform.to_levels(torch.full((1, 32, 32, 32), 3.0))
    torch.testing.assert_close(levels[0], torch.full((1, 1, 2, 2, 2), 3.0), atol=1e-4, rtol=0)
    assert all(level.abs().max() < 1e-4 for level in levels[1:])


def test_gradients():
    transform = transform_of(num_levels=1, wavelet="bior2.2")
    volume = volume_of(1, 4, 3, 6).requires_grad_()
    assert gradcheck(lambda v: tuple(transform.to_levels(v)), volume)
    levels = [level.detach().requires_grad_() for level in transform.to_levels(volume)]
    assert gradcheck(lambda *found: transform.from_levels(found, (4, 3, 6)), levels)


def test_bands_of_another_volume_are_refused():
    levels = transform_of(num_levels=2).to_levels(volume_of(1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"expected shapes .* for a volume of \(8, 8, 16\)"):
        transform_of(num_levels=2).from_levels(levels, (8, 8, 16))


# --- grids ----------------------------------------------------------------------------------------


def grid_of(volume: torch.Tensor, **settings) -> CoefficientGrid:
    chosen = {"num_levels": 2, "wavelet": "haar", **settings}
    return CoefficientGrid(volume, transform_of(**chosen), bits=None, masked=True)


def test_upsampling_is_trilinear():
    ramp = torch.linspace(0, 1, 8)
    grid = grid_of((ramp[:, None, None] + 2 * ramp[:, None] - ramp).expand(1, 8, 8, 8).clone())
    grid.upsample((15, 8, 22))
    (found, _), fine = grid(), [torch.linspace(0, 1, n) for n in (15, 8, 22)]
    expected = fine[0][:, None, None] + 2 * fine[1][:, None] - fine[2]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_a_crop_keeps_what_it_keeps():
    volume = volume_of(2, 9, 10, 11, dtype=torch.float32)
    grid = grid_of(volume)
    grid.crop((1, 2, 3), (8, 10, 9))
    torch.testing.assert_close(grid()[0], volume[:, 1:8, 2:10, 3:9], atol=1e-5, rtol=0)


def test_masks_stay_where_they_are_when_the_volume_is_upsampled():
    """Haar's entries lie on blocks: those of a block that is dropped stay dropped."""
    grid = grid_of(torch.zeros(1, 8, 8, 8), num_levels=1)
    grid.logits[1].data[0, :, 3, 1, 2] = -1.0
    grid.upsample((16, 16, 16))
    dropped = (grid.logits[1] < 0)[0].all(dim=0).nonzero().tolist()
    assert dropped == [[z, y, x] for z in (6, 7) for y in (2, 3) for x in (4, 5)]


# --- the field, the file --------------------------------------------------------------------------


def test_a_file_gives_the_same_voxels(tiny_config, start):
    config = tiny_config(planes="voxels", num_density_components=1)
    model = start(config).pipeline.model
    for grid in model.field.grids().values():
        for logits in grid.logits:
            logits.data.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    names = ["density_voxels.0", "appearance_voxels.0"]
    assert list(model.field.grids()) == names
    for profile in ("range", "paper"):
        scene = scene_from_model(model, 8, {}, None)
        if profile == "paper":
            floats = {k: v.detach().numpy().copy() for k, v in model.field.networks().items()}
            scene = dataclasses.replace(scene, networks=floats)
        decoded = codec.decode(codec.encode(scene, profile))
        assert codec.equal(decoded, scene)
    kept = [float(band.mask.mean()) for grid in scene.grids for band in grid.bands]
    assert min(kept) > 0.1 and max(kept) < 0.9
    before = model.field.to_spatial()
    load_scene_into(model, decoded)
    after = model.field.to_spatial()
    for one, other in ((before.density, after.density), (before.appearance, after.appearance)):
        torch.testing.assert_close(one.volumes[0], other.volumes[0], atol=1e-6, rtol=1e-6)


def test_a_training_learns_compresses_and_decodes(tiny_config, train, tmp_path):
    """nerfstudio's trainer, our exporter, and load_scene agree on what was learnt."""
    from masked_wavelet_nerf.export import ExportMaskedWavelet
    from masked_wavelet_nerf.loading import Camera, load_scene

    config = tiny_config(
        planes="voxels", num_density_components=1, steps=60, mask_weight=3e-6, rate_steps=(40,)
    )
    config.optimizers["masks"]["optimizer"].lr = 0.1
    config.save_config()
    trainer, losses = train(config)
    first, last = (
        np.mean([losses[i] for i in range(5)]),
        np.mean([losses[i] for i in range(55, 60)]),
    )
    assert last < 0.6 * first
    model = trainer.pipeline.model.eval()
    kept = torch.cat(model.field.to_spatial().kept).sum()
    assert kept < 0.9 * sum(map(sum, model.field.num_coefficients()))
    assert model.field.resolution != (10, 10, 10)
    path = tmp_path / "scene.mwnf"
    trainer.save_checkpoint(59)
    config_path = trainer.base_dir / "config.yml"
    ExportMaskedWavelet(load_config=config_path, output_dir=tmp_path).main()
    loaded = load_scene(path)
    assert isinstance(loaded, LoadedScene)
    camera = loaded.cameras[0]
    assert isinstance(camera, Camera)
    rgb, _ = loaded.render(camera)
    cameras = trainer.pipeline.datamanager.train_dataset.cameras[0:1]
    expected = model.get_outputs_for_camera(cameras)["rgb"]
    assert -10 * torch.log10((rgb - expected).square().mean()) > 50


def test_pictures_of_voxels_are_projections():
    volume = torch.zeros(1, 8, 8, 8)
    volume[0, 6, 1] = 5.0  # a bar along x at z = 6, y = 1
    field = WaveletPlaneField(
        FieldConfig(planes="voxels", num_density_components=1, num_levels=1, wavelet="haar"),
        (8, 8, 8),
    )
    field.density_grid.voxels = grid = grid_of(volume, num_levels=1)
    grid.logits[0].data.fill_(INITIAL_LOGIT)
    bands = tuple(
        codec.Band(level, band.values.numpy(), band.mask.numpy(), float(band.step))
        for level, band in enumerate(grid.integers(8))
    )
    planes = projections(codec.Grid("density_voxels.0", (8, 8, 8), bands))
    assert [plane.size for plane in planes] == [(8, 8)] * 3
    xy, xz, yz = (np.argwhere(magnitudes(plane)[0][0] > 0).tolist() for plane in planes)
    assert xy == [[0, x] for x in range(4)]  # (y, x): y = 1 is in entry 0
    assert xz == [[3, x] for x in range(4)]  # (z, x)
    assert yz == [[3, 0]]  # (z, y)
    fine_along_y = magnitudes(planes[0])[1][0]  # the horizontal detail: rows of XY are y
    assert np.argwhere(fine_along_y > 0).tolist() == [[0, x] for x in range(4)]
