"""Batches of square patches, and SSIM as a term of the loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import TypeCheckError
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.pixel_samplers import PixelSamplerConfig
from PIL import Image
from test_captures import HEIGHT, MIXED, WIDTH, add_masks, make_manager, write_capture
from torchmetrics.functional.image import structural_similarity_index_measure

from masked_wavelet_nerf import patches
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.metrics import patch_ssim
from masked_wavelet_nerf.pixel_sampler import PooledPixelSamplerConfig
from masked_wavelet_nerf.trainer import TrainingError

SIDE = 3


def make_patches(folder: Path, **settings):
    """A data manager of batches that are patches alone, unless ``settings`` say otherwise."""
    return make_manager(folder, **{"patch_size": SIDE, "patch_share": 1.0, **settings})


def drawn(manager, side=SIDE, num_steps=40, singles=0) -> list[tuple[int, int, int]]:
    """Photo and first pixel of patches, which are squares of one photo with its colours.

    After them, a batch has so many single pixels, whose colours are right, too.
    """
    found, count = [], (64 - singles) // side**2
    names = [int(path.stem) for path in manager.train_dataset.image_filenames]
    for step in range(num_steps):
        rays, batch = manager.next_train(step)
        num_rays = count * side**2 + singles
        assert len(rays) == manager.get_train_rays_per_batch() == num_rays
        assert manager.train_pixel_sampler.num_patches == count
        starts = batch["indices"][: count * side**2 : side**2].tolist()
        squares = [
            [view, y + row, x + column]
            for view, y, x in starts
            for row in range(side)
            for column in range(side)
        ]
        pixels = batch["indices"].tolist()
        assert pixels[: count * side**2] == squares
        colours = torch.tensor([[10 * names[view], 5 * y, 5 * x] for view, y, x in pixels])
        torch.testing.assert_close(batch["image"][:, :3], colours / 255)
        poses = manager.train_dataset.cameras.camera_to_worlds[batch["indices"][:, 0]]
        torch.testing.assert_close(rays.origins, poses[:, :, 3])
        found += map(tuple, starts)
    return found


def first_pixels(first: int, last: int, side: int = SIDE) -> set[int]:
    """Along an axis, of patches that lie in these pixels."""
    return set(range(first, last + 1 - side + 1))


# --- where patches lie ----------------------------------------------------------------------------


def test_patches_lie_around_their_pixel_and_inside_the_photo():
    centres = torch.tensor([[4, 5, 6], [0, 0, 7], [1, 9, 0]])
    found = patches.around(centres, 3, height=10, width=8)
    expected = [(4, y, x) for y in (4, 5, 6) for x in (5, 6, 7)]
    expected += [(0, y, x) for y in (0, 1, 2) for x in (5, 6, 7)]
    expected += [(1, y, x) for y in (7, 8, 9) for x in (0, 1, 2)]
    assert found.tolist() == [list(pixel) for pixel in expected]
    even = patches.around(torch.tensor([[0, 5, 1]]), 2, height=10, width=8)
    assert even.tolist() == [[0, 4, 0], [0, 4, 1], [0, 5, 0], [0, 5, 1]]
    with pytest.raises(TypeCheckError):
        patches.around(centres[:, :2], 3, height=10, width=8)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_patches_are_whole_where_all_of_their_pixels_count(side):
    counts = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(side)) > 0.1
    found = patches.are_whole(counts, side)
    for centre in np.ndindex(*counts.shape):
        pixels = patches.around(torch.tensor([centre]), side, 9, 7)
        assert found[centre] == counts[tuple(pixels.T)].all(), centre
    assert 0 < found.sum() < counts.sum()


def test_batches_are_squares_of_single_photos(tmp_path):
    manager = make_patches(write_capture(tmp_path / "capture"))
    found = drawn(manager)
    assert {view for view, _, _ in found} == set(range(len(manager.train_dataset)))
    assert {y for _, y, _ in found} == first_pixels(0, HEIGHT - 1)
    assert {x for _, _, x in found} == first_pixels(0, WIDTH - 1)
    assert manager.next_eval(0)[1]["image"].shape == (32, 3)


@pytest.mark.parametrize("sizes", [{}, MIXED])
def test_a_step_draws_the_same_patches_whatever_came_before(tmp_path, sizes):
    manager = make_patches(write_capture(tmp_path / "capture", sizes=sizes))
    first = manager.next_train(7)[1]["indices"]
    manager.next_train(3)
    assert torch.equal(manager.next_train(7)[1]["indices"], first)
    assert not torch.equal(manager.next_train(8)[1]["indices"], first)


def test_photos_of_several_sizes(tmp_path):
    folder = write_capture(tmp_path / "mixed", sizes=MIXED)
    manager = make_patches(folder)
    found = drawn(manager, num_steps=120)
    for view, path in enumerate(manager.train_dataset.image_filenames):
        width, height = MIXED.get(int(path.stem), (WIDTH, HEIGHT))
        assert {y for v, y, _ in found if v == view} == first_pixels(0, height - 1)
        assert {x for v, _, x in found if v == view} == first_pixels(0, width - 1)


@pytest.mark.parametrize("sizes", [{}, MIXED])
def test_patches_lie_within_masks(tmp_path, sizes):
    folder = write_capture(tmp_path / "capture", sizes=sizes)
    add_masks(folder)
    covered = folder / "masks/02.png"
    with Image.open(covered) as mask:
        Image.new("L", mask.size).save(covered)  # nothing is left of that photo
    manager = make_patches(folder)
    found = drawn(manager, num_steps=120)
    seen = set()
    for view, path in enumerate(manager.train_dataset.image_filenames):
        width, height = sizes.get(int(path.stem), (WIDTH, HEIGHT))
        rows = {y for v, y, _ in found if v == view}
        columns = {x for v, _, x in found if v == view}
        if path.stem == "02":
            assert not rows
            continue
        seen.add(view)
        assert rows == first_pixels(0, height - 1)
        assert columns == first_pixels(width // 2, width - 1)
    assert len(seen) == len(manager.train_dataset) - 1


@pytest.mark.parametrize("has_masks", [False, True])
def test_restricted_patches_lie_around_useful_pixels(tmp_path, has_masks):
    folder = write_capture(tmp_path / "capture")
    if has_masks:
        add_masks(folder)
    manager = make_patches(folder)
    manager.next_train(0)  # makes the next step's, which are of no use any more

    def is_useful(rays: RayBundle) -> torch.Tensor:
        useful = torch.zeros(rays.shape, dtype=torch.bool)
        useful[0, 8] = useful[6, 2] = True
        return useful

    share = manager.restrict_pixels(is_useful)
    assert share == pytest.approx((1 if has_masks else 2) / (WIDTH * HEIGHT))
    found = {(y, x) for _, y, x in drawn(manager)}
    # Around (0, 8), moved inside, and around (6, 2).
    assert found == ({(0, 7)} if has_masks else {(0, 7), (5, 1)})


def test_patches_stay_within_a_fisheyes_circle():
    images = {"image": torch.rand(2, 40, 40, 3), "image_idx": torch.arange(2)}
    config = PooledPixelSamplerConfig(fisheye_crop_radius=8.0)
    sampler = config.setup(num_rays_per_batch=49 * 200)
    sampler.draw_patches(7, 1.0, images)
    distance = (sampler.sample(images)["indices"][:, 1:] - 20).float().norm(dim=-1)
    assert 7 < distance.max() < 8 + 2**0.5  # nerfstudio rounds by up to a pixel
    assert config.fisheye_crop_radius == 8  # evaluation's, too


@pytest.mark.parametrize("has_masks", [False, True])
@pytest.mark.parametrize("sizes", [{}, MIXED])
def test_single_pixels_lie_anywhere_beside_patches(tmp_path, sizes, has_masks):
    folder = write_capture(tmp_path / "capture", sizes=sizes)
    if has_masks:
        add_masks(folder)
    manager = make_manager(folder, patch_size=SIDE, patch_share=0.6)
    drawn(manager, singles=64 - 4 * SIDE**2)
    seen = set()
    for step in range(200):
        seen |= set(map(tuple, manager.next_train(step)[1]["indices"][-28:].tolist()))
    for view, path in enumerate(manager.train_dataset.image_filenames):
        width, height = sizes.get(int(path.stem), (WIDTH, HEIGHT))
        columns = range(width // 2 if has_masks else 0, width)
        assert {y for v, y, _ in seen if v == view} == set(range(height))
        assert {x for v, _, x in seen if v == view} == set(columns)


def test_of_photos_of_several_sizes_an_even_number_is_drawn(tmp_path):
    folder = write_capture(tmp_path / "mixed", sizes=MIXED)
    manager = make_manager(folder, patch_size=SIDE, patch_share=0.5, train_num_rays_per_batch=60)
    rays, batch = manager.next_train(0)  # three patches and 33 pixels, but for one
    assert len(rays) == len(batch["image"]) == manager.get_train_rays_per_batch() == 27 + 32


def test_full_images_come_along():
    images = {"image": torch.rand(2, 9, 9, 3), "image_idx": torch.tensor([5, 3])}
    sampler = PooledPixelSamplerConfig(keep_full_image=True).setup(num_rays_per_batch=30)
    sampler.draw_patches(SIDE, 1.0, images)
    batch = sampler.sample(images)
    assert batch["full_image"] is images["image"] and len(batch["image"]) == 27
    assert set(batch["indices"][:, 0].tolist()) <= {3, 5}


def test_single_pixels_are_drawn_as_nerfstudio_draws_them(tmp_path):
    manager = make_manager(write_capture(tmp_path / "capture"))  # seed 0
    images = next(manager.iter_train_image_dataloader)
    for step in range(3):
        _, batch = manager.next_train(step)
        torch.manual_seed(step)
        size = torch.tensor(images["image"].shape[:3])
        expected = (torch.rand(64, 3) * size).long()
        expected[:, 0] = images["image_idx"][expected[:, 0]]
        assert torch.equal(batch["indices"], expected)


def test_runs_saved_while_the_sampler_was_part_of_the_data_manager_open():
    tag = "!!python/object:masked_wavelet_nerf.datamanager.PooledPixelSamplerConfig"
    config = yaml.load(f"{tag} {{num_rays_per_batch: 9}}", Loader=yaml.Loader)
    assert type(config) is PooledPixelSamplerConfig and config.num_rays_per_batch == 9


# --- what cannot be -------------------------------------------------------------------------------


def test_a_batch_must_hold_a_patch(tmp_path):
    folder = write_capture(tmp_path / "capture")
    with pytest.raises(UserError, match=r"num-rays-per-batch: 64 rays; expected 81 or more"):
        make_patches(folder, patch_size=9)
    with pytest.raises(UserError, match=r"64 rays; expected 162 or more, .* in the 50% of them"):
        make_manager(folder, patch_size=9)
    with pytest.raises(UserError, match=r"patch-share: 0; expected more than 0, and 1 at most"):
        make_manager(folder, patch_size=SIDE, patch_share=0.0)
    manager = make_patches(folder, patch_size=8)
    with pytest.raises(UserError, match=r"63 rays; expected 64 or more"):
        manager.train_pixel_sampler.set_num_rays_per_batch(63)


@pytest.mark.parametrize("sizes", [{}, MIXED])
def test_a_photo_must_hold_a_patch(tmp_path, sizes):
    folder = write_capture(tmp_path / "capture", sizes=sizes)
    least = min(WIDTH, HEIGHT, *(n for size in sizes.values() for n in size))
    side = least + 1
    with pytest.raises(UserError, match=rf"patch-size {side}: .* pixels; expected {least} at most"):
        make_patches(folder, patch_size=side, train_num_rays_per_batch=side**2)
    make_patches(folder, patch_size=least, train_num_rays_per_batch=side**2)


@pytest.mark.parametrize("sizes", [{}, {1: (14, HEIGHT)}])
def test_a_mask_must_hold_a_patch(tmp_path, sizes):
    folder = write_capture(tmp_path / "capture", sizes=sizes)
    add_masks(folder)
    with pytest.raises(UserError, match=r"patch-size 8: no mask leaves as much"):
        make_patches(folder, patch_size=8)
    ignoring = PooledPixelSamplerConfig(ignore_mask=True)
    found = drawn(make_patches(folder, patch_size=8, pixel_sampler=ignoring), side=8)
    assert 0 in {x for _, _, x in found}


def test_another_pixel_sampler_is_refused(tmp_path):
    folder = write_capture(tmp_path / "capture")
    with pytest.raises(UserError, match=r"PatchPixelSampler, .* expected PooledPixelSampler"):
        make_patches(folder, patch_size=SIDE, pixel_sampler=PixelSamplerConfig())


@pytest.mark.parametrize("side", [1, 10])
def test_ssim_needs_patches_as_large_as_its_window(tiny_config, start, side):
    config = tiny_config(ssim_weight=0.1)
    manager = config.pipeline.datamanager
    manager.patch_size, manager.train_num_rays_per_batch = side, 250
    expected = rf"ssim-weight .* 11 pixels, or larger, not of {side}: .*datamanager\.patch-size"
    with pytest.raises(TrainingError, match=expected):
        start(config)


# --- SSIM -----------------------------------------------------------------------------------------


def pictures(seed: int, side: int = 13, num: int = 2) -> torch.Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(seed))


def listed(images: torch.Tensor) -> torch.Tensor:
    """Pixels, patch after patch, each row by row."""
    side = images.shape[-1]
    return torch.stack(
        [image[:, y, x] for image in images for y in range(side) for x in range(side)]
    )


def test_ssim_is_that_of_images():
    rendered, true = pictures(0), pictures(1)
    assert torch.equal(patches.as_images(listed(rendered), 13), rendered)
    mixed = 0.7 * true + 0.3 * rendered
    expected = structural_similarity_index_measure(mixed, true, data_range=1.0)
    assert isinstance(expected, torch.Tensor) and 0.3 < expected < 0.97
    torch.testing.assert_close(patch_ssim(listed(mixed), listed(true), 13), expected)
    assert float(patch_ssim(listed(true), listed(true), 13)) == pytest.approx(1)


def test_ssim_of_constant_patches_has_the_closed_form():
    dark, bright = (torch.full((121, 3), value, dtype=torch.float64) for value in (0.2, 0.6))
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(patch_ssim(dark, bright, 11)) == pytest.approx(expected, rel=1e-6)


def test_ssim_has_the_gradient_of_differences():
    true = listed(pictures(1, 11, 1)).double()
    rendered = (0.7 * true + 0.3 * listed(pictures(0, 11, 1))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_ssim(x, true, 11), rendered, fast_mode=True)


def test_ssim_is_as_precise_in_mixed_precision():
    true = 0.9 + 0.01 * listed(pictures(1))
    rendered = 0.9 + 0.01 * listed(pictures(0))
    expected = patch_ssim(rendered, true, 13)
    with torch.autocast("cpu", torch.bfloat16):
        found = patch_ssim(rendered, true, 13)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("background", ["white", "random"])
def test_the_ssim_term_is_that_of_the_pixels_of_the_squared_error(tiny_config, start, background):
    config = tiny_config(ssim_weight=0.25, background_color=background)
    manager = config.pipeline.datamanager
    manager.patch_size, manager.patch_share, manager.train_num_rays_per_batch = 11, 0.75, 330
    manager.dataparser.alpha_color = None
    trainer = start(config)
    pipeline, model = trainer.pipeline, trainer.pipeline.model
    pipeline.train()
    rays, batch = pipeline.datamanager.next_train(0)
    assert len(rays) == 2 * 121 + 88
    outputs = model(rays)

    def losses_of(weight: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model.config.ssim_weight = weight
        torch.manual_seed(3)  # of random backgrounds
        return model.get_loss_dict(outputs, batch), torch.get_rng_state()

    losses, drawn = losses_of(0.25)
    plain, drawn_without = losses_of(0.0)
    assert losses.keys() - plain.keys() == {"ssim_loss"}
    assert all(torch.equal(losses[name], plain[name]) for name in plain)
    assert torch.equal(drawn, drawn_without)

    torch.manual_seed(3)
    behind = torch.rand_like(outputs["rgb"]) if background == "random" else 1.0
    alpha = batch["image"][:, 3:]
    true = batch["image"][:, :3] * alpha + behind * (1 - alpha)
    rendered = outputs["rgb"]
    if background == "random":
        rendered = rendered + behind * (1 - outputs["accumulation"])
    torch.testing.assert_close(losses["rgb_loss"], F.mse_loss(rendered, true))
    images = [x[:242].view(2, 11, 11, 3).permute(0, 3, 1, 2) for x in (rendered, true)]
    expected = structural_similarity_index_measure(*images, data_range=1.0)
    assert isinstance(expected, torch.Tensor) and expected < 0.99
    torch.testing.assert_close(losses["ssim_loss"], 0.25 * (1 - expected))

    coefficients = [p for grid in model.field.grids().values() for p in grid.coefficients]
    for gradient in torch.autograd.grad(losses["ssim_loss"], coefficients):
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    pipeline.eval()
    assert set(model.get_loss_dict(outputs, batch)) == {"rgb_loss"}


def test_patches_and_ssim_train(tiny_config, train):
    """Also on from where training keeps to pixels that can see something."""
    config = tiny_config(steps=20, ssim_weight=0.1)
    manager = dataclasses.replace(
        config.pipeline.datamanager, patch_size=11, train_num_rays_per_batch=500
    )
    config.pipeline.datamanager = manager
    trainer, losses = train(config)
    assert trainer.pipeline.datamanager.train_pixel_sampler.pool is not None
    assert len(losses) == 20
    assert np.mean(list(losses.values())[-5:]) < 0.8 * np.mean(list(losses.values())[:5])


def test_ssim_takes_all_pixels_where_other_samplers_draw_patches_alone(tiny_config, start):
    config = tiny_config(ssim_weight=0.25)
    manager = config.pipeline.datamanager
    manager.patch_size, manager.patch_share, manager.train_num_rays_per_batch = 11, 1.0, 250
    pipeline = start(config).pipeline
    model = pipeline.model
    pipeline.train()
    rays, batch = pipeline.datamanager.next_train(0)
    assert len(rays) == 242
    outputs = model(rays)
    expected = patch_ssim(outputs["rgb"], batch["image"][:, :3], 11)
    for sampler in (model._pixel_sampler, None):
        model._pixel_sampler = sampler
        losses = model.get_loss_dict(outputs, batch)
        torch.testing.assert_close(losses["ssim_loss"], 0.25 * (1 - expected))
