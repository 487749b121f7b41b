"""The nerfstudio model: rendering, schedule, checkpoints, viewer controls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.model_components.renderers import background_color_override_context
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException
from torchmetrics.functional.image import peak_signal_noise_ratio

from masked_wavelet_nerf import native
from masked_wavelet_nerf.field import WaveletPlaneField
from masked_wavelet_nerf.metrics import ImageMetrics
from masked_wavelet_nerf.model import CheckpointMismatchError, MaskedWaveletModel
from masked_wavelet_nerf.planes import CoefficientGrid


def render(trainer) -> torch.Tensor:
    """The first test view, as the model shows it now."""
    dataset = trainer.pipeline.datamanager.eval_dataset
    trainer.pipeline.eval()
    return trainer.pipeline.model.get_outputs_for_camera(dataset.cameras[0:1])["rgb"]


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(peak_signal_noise_ratio(one, other, data_range=1.0))


@pytest.mark.parametrize(
    ("stop", "how", "method"),
    [
        pytest.param(4, "load_dir", "masked_wavelet_bounded", id="before"),
        pytest.param(10, "load_dir", "masked_wavelet_bounded", id="between"),
        pytest.param(16, "load_dir", "masked_wavelet_bounded", id="after"),
        pytest.param(10, "load_checkpoint", "masked_wavelet_bounded", id="checkpoint"),
        pytest.param(10, "load_dir", "masked_wavelet", id="unbounded"),
    ],
)
def test_resumed_run_continues_as_if_it_had_not_stopped(tiny_config, train, stop, how, method):
    _, whole = train(tiny_config("whole", steps=20, method=method))

    first, head = train(tiny_config("first", steps=stop + 1, method=method))
    rest = tiny_config("rest", steps=19 - stop, method=method)
    if how == "load_dir":
        rest.load_dir = first.checkpoint_dir
    else:
        rest.load_checkpoint = first.checkpoint_dir / f"step-{stop:09d}.ckpt"
    resumed, tail = train(rest)

    assert sorted(head) + sorted(tail) == sorted(whole)
    for step, loss in {**head, **tail}.items():
        assert loss == pytest.approx(whole[step], rel=1e-5), step
    # The optimiser holds the live parameters, whatever was resized on the way.
    live = {id(p) for group in resumed.pipeline.model.get_param_groups().values() for p in group}
    held = {
        id(p)
        for optimiser in resumed.optimizers.optimizers.values()
        for group in optimiser.param_groups
        for p in group["params"]
    }
    assert live == held


def test_schedule_grows_shrinks_and_finds_empty_space(tiny_config, train):
    trainer, losses = train(tiny_config(steps=16))
    model = trainer.pipeline.model
    # 20³ voxels over a box of any shape, give or take rounding.
    assert math.prod(model.field.resolution) == pytest.approx(20**3, rel=0.1)
    assert 0 < model.occupancy.cells.float().mean() < 1
    assert (model.aabb[1] - model.aabb[0]).prod() < 27
    assert min(list(losses.values())[-4:]) < losses[0]


def test_every_parameter_has_one_optimiser(tiny_config, start):
    model = start(tiny_config()).pipeline.model
    grouped = [id(p) for group in model.get_param_groups().values() for p in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.field.parameters()}


def blob_scene(tiny_config, start, **changes):
    """A model of a soft ball in an empty box, in closed form, so that what is empty is known."""
    settings = {"initial_resolution": 24, "density_shift": -10.0, "occupancy_threshold": 1e-3}
    trainer = start(tiny_config(**settings, **changes))
    model = trainer.pipeline.model
    centre = torch.tensor([0.2, -0.1, 0.05])
    for index, grid in enumerate(model.field.density_grid.grids):
        sides = [torch.linspace(-1, 1, n) for n in grid.spatial_size]
        axes = [(1, 0), (2, 0), (2, 1), (2,), (1,), (0,)][index]  # rows, columns
        profiles = [
            torch.exp(-((side - centre[axis]) ** 2) / (2 * 0.2**2))
            for side, axis in zip(sides, axes, strict=True)
        ]
        ball = profiles[0][:, None] * profiles[1] if len(profiles) == 2 else profiles[0]
        spatial = torch.zeros(model.config.num_density_components, *grid.spatial_size)
        spatial[0] = 3 * ball
        rebuilt = CoefficientGrid(spatial, grid.transform, model.config.bits, model.config.masks)
        grid.load_state_dict(rebuilt.state_dict())
    return trainer


@pytest.mark.parametrize("changes", [{}, {"masks": False, "bits": None}, {"transform": "dct"}])
def test_shrinking_the_box_leaves_the_picture(tiny_config, start, changes):
    trainer = blob_scene(tiny_config, start, **changes)
    model = trainer.pipeline.model
    everywhere = render(trainer)
    assert everywhere.std() > 0.1  # there is something to see
    model.update_occupancy()
    (first, last), *_ = model.occupancy.occupied_range()
    box = model.aabb.clone()
    model.shrink_box()
    # The box ends at texels: the first and last occupied ones.
    voxel = 3 / 23
    assert float(model.aabb[0, 0]) == pytest.approx(float(box[0, 0]) + first * voxel, abs=1e-5)
    assert float(model.aabb[1, 0]) == pytest.approx(float(box[0, 0]) + last * voxel, abs=1e-5)
    assert model.field.resolution[0] == last - first + 1
    assert math.prod(model.field.resolution) < 0.6 * 24**3
    assert psnr(render(trainer), everywhere) >= 40


def test_planes_are_made_once_per_step_and_once_for_evaluation(tiny_config, start, monkeypatch):
    trainer = start(tiny_config())
    calls = []
    original = WaveletPlaneField.to_spatial

    def counted(self, *args, **kwargs):
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(WaveletPlaneField, "to_spatial", counted)
    trainer.pipeline.train()
    trainer.train_iteration(0)
    assert len(calls) == 1
    trainer.pipeline.model.config.eval_num_rays_per_chunk = 50
    render(trainer)
    render(trainer)
    assert len(calls) == 2
    trainer.pipeline.train()
    render(trainer)
    assert len(calls) == 3


def test_sliders_act_on_the_picture_at_once(tiny_config, train):
    trainer, _ = train(tiny_config(steps=20))
    model = trainer.pipeline.model
    whole = render(trainer)

    def move(slider, value):
        # What viser does when a handle moves: the element's value changes and its hook is called.
        slider.default_value = value
        slider.cb_hook(slider)
        return render(trainer)

    pictures = {}
    for levels in (0, 1):
        pictures[levels] = move(model.levels_shown, levels)
        assert not torch.equal(pictures[levels], whole)
    assert not torch.equal(pictures[0], pictures[1])
    torch.testing.assert_close(move(model.levels_shown, 2), whole)
    empty = move(model.mask_threshold, 2.0)  # above every logit: nothing is kept
    assert psnr(empty, whole) < 30
    torch.testing.assert_close(move(model.mask_threshold, 0.0), whole)


def test_a_moved_slider_stops_the_image_under_way(tiny_config, start, monkeypatch):
    trainer = start(tiny_config(eval_num_rays_per_chunk=50))
    model = trainer.pipeline.model
    handle = SimpleNamespace(value=2)
    model.levels_shown.gui_handle = handle
    whole = render(trainer)
    chunks = []
    original = MaskedWaveletModel.get_outputs

    def get_outputs(self, ray_bundle):
        chunks.append(ray_bundle)
        outputs = original(self, ray_bundle)
        handle.value = 0
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(MaskedWaveletModel, "get_outputs", get_outputs)
        with pytest.raises(IOChangeException):
            render(trainer)
    assert len(chunks) == 2
    assert not torch.equal(render(trainer), whole)  # the next image shows what the slider says


def test_the_viewer_skips_an_image_without_pixels(tiny_config, start):
    """Which nerfstudio asks for, and ends its drawing where it gets one, while a 1 is typed."""
    trainer = start(tiny_config())
    model = trainer.pipeline.model
    model.levels_shown.gui_handle = SimpleNamespace(value=2)
    camera = trainer.pipeline.datamanager.eval_dataset.cameras[0:1].to(trainer.device)
    camera.width[:], camera.height[:] = 1, 0
    with pytest.raises(IOChangeException):
        model.get_outputs_for_camera(camera)


@pytest.mark.parametrize("background", ["white", "random"])
def test_crops_lie_over_the_background_that_is_chosen(tiny_config, start, background):
    """In nerfstudio's viewer and ns-render; over random ones, too, as nerfacto's do."""
    trainer = blob_scene(tiny_config, start, background_color=background)
    own = {"white": 1.0, "random": 0.0}[background]
    before, chosen = render(trainer), torch.tensor([0.2, 0.4, 0.6])
    with background_color_override_context(chosen):
        after = render(trainer)
    cameras = trainer.pipeline.datamanager.eval_dataset.cameras[0:1]
    see_through = 1 - trainer.pipeline.model.get_outputs_for_camera(cameras)["accumulation"]
    assert see_through.max() > 0.99
    torch.testing.assert_close(after - before, (chosen - own) * see_through)


def test_occupancy_skips_only_what_is_not_seen(tiny_config, start):
    trainer = blob_scene(tiny_config, start)
    model = trainer.pipeline.model
    everywhere = render(trainer)
    model.update_occupancy()
    assert 0 < model.occupancy.cells.float().mean() < 0.6
    assert psnr(render(trainer), everywhere) > 45


def test_a_ray_through_a_uniform_medium_has_the_closed_form(tiny_config, start):
    trainer = start(tiny_config(bits=None, masks=False, background_color="black"))
    model = trainer.pipeline.model.eval()
    for grid in model.field.density_grid.grids:
        for parameter in grid.coefficients:
            parameter.data.zero_()  # density = softplus(shift) everywhere
    sigma = math.log1p(math.exp(model.config.density_shift))
    rays = RayBundle(
        origins=torch.tensor([[0.0, 0.0, 4.0]]),
        directions=torch.tensor([[0.0, 0.0, -1.0]]),
        pixel_area=torch.ones(1, 1),
    )
    accumulation = model(rays)["accumulation"]
    expected = 1 - math.exp(-sigma * 25 * 3.0)  # the box is 3 across
    step = model._step_size * 25 * sigma  # the last sample may reach past the box
    assert abs(float(accumulation) - expected) < step


def test_render_threshold_changes_little(tiny_config, train, monkeypatch):
    trainer, _ = train(tiny_config(steps=16))
    model = trainer.pipeline.model
    counts = []
    colour = model.field.colour
    monkeypatch.setattr(
        model.field, "colour", lambda s, p, *d: [counts.append(len(p)), colour(s, p, *d)][1]
    )
    model.config.colour_mass, pictures = 0.0, {}
    for threshold in (0.0, 1e-3, 0.02):
        counts.clear()
        model.config.render_weight_threshold = threshold
        pictures[threshold] = render(trainer), sum(counts)
    everything, all_of_them = pictures[0.0]
    assert psnr(pictures[1e-3][0], everything) > 50
    assert psnr(pictures[0.02][0], everything) > 35
    assert pictures[0.02][1] < 0.8 * all_of_them


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.03])
def test_samples_without_a_colour_take_that_of_their_ray(
    tiny_config, start, monkeypatch, threshold
):
    """Where all have the same colour nothing is lost."""
    trainer = start(
        tiny_config(bits=None, masks=False, background_color="black", density_shift=-3.2)
    )
    model = trainer.pipeline.model.eval()
    model.config.render_weight_threshold, model.config.colour_mass = threshold, 0.0
    for grid in model.field.density_grid.grids:
        for parameter in grid.coefficients:
            parameter.data.zero_()
    asked = []

    def grey(spatial, points, *_):
        asked.append(len(points))
        return torch.full((len(points), 3), 0.6)

    monkeypatch.setattr(model.field, "colour", grey)
    rays = RayBundle(
        origins=torch.tensor([[0.0, 0.0, 4.0], [9.0, 9.0, 4.0]]),
        directions=torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -1.0]]),
        pixel_area=torch.ones(2, 1),
    )
    outputs = model(rays)
    opacity = float(outputs["accumulation"][0])
    assert 0.9 < opacity < 0.99
    assert 0 < asked[0] < 18 if threshold == 0.03 else asked[0] == 18
    torch.testing.assert_close(outputs["rgb"][0], torch.full((3,), 0.6 * opacity))
    assert outputs["rgb"][1].abs().max() == 0


@pytest.mark.parametrize("training", [False, True])
def test_shared_colours_change_hardly_anything(tiny_config, start, monkeypatch, training):
    trainer = blob_scene(tiny_config, start)
    model = trainer.pipeline.model.train(training)
    rays, _ = trainer.pipeline.datamanager.next_train(0)
    jitter = torch.rand(len(rays), 1)
    monkeypatch.setattr(torch, "rand_like", lambda tensor: jitter)  # the same samples each time
    original, counts = model.field.colour, []
    monkeypatch.setattr(
        model.field, "colour", lambda s, p, *d: counts.append(len(p)) or original(s, p, *d)
    )

    def rendered(mass: float) -> torch.Tensor:
        model.config.colour_mass = mass
        return model(rays)["rgb"].detach()

    exact, shared = rendered(0.0), rendered(0.05)
    assert psnr(shared, exact) > 45
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"planes": "triplane"},
        {"planes": "triplane", "triplane_reduce": "sum"},
        {"transform": "dct"},
        {"transform": "identity", "levels": 0},
        {"wavelet": "haar", "levels": 3, "level_scaling": False},
        {"masks": False},
        {"bits": None},
        {"bits": 4, "mask_penalty": "mean", "mask_weight": 1e-3},
        {"background_color": "random"},
        {"tv_weight_density": 0.1, "tv_weight_appearance": 0.1},
        {"method": "masked_wavelet", "num_samples": 24},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_choice_trains(tiny_config, train, changes):
    trainer, losses = train(tiny_config(steps=15, **changes))
    assert all(math.isfinite(loss) for loss in losses.values())
    before = trainer.pipeline.model.field.colour_network[0].weight.grad
    assert before is not None
    assert float(before.abs().sum()) > 0
    for grid in trainer.pipeline.model.field.grids().values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in grid.coefficients)


def test_networks_are_rounded_from_their_step_on_also_in_a_resumed_run(tiny_config, train):
    def is_rounding(trainer) -> list[bool]:
        field = trainer.pipeline.model.field
        layers = [field.appearance_map, *field.colour_network[::2]]
        return [layer.is_rounding for layer in layers]

    settings = {"network_bits": 3, "network_rounding_step": 5}
    first, _ = train(tiny_config("first", steps=5, **settings))
    assert is_rounding(first) == [False] * 4
    _, plain = train(tiny_config("plain", steps=7, network_bits=None))
    whole, losses = train(tiny_config("whole", steps=7, **settings))
    assert is_rounding(whole) == [True] * 4
    assert [losses[step] for step in range(5)] == [plain[step] for step in range(5)]
    assert abs(losses[5] - plain[5]) > 1e-6
    rest = tiny_config("rest", steps=2, **settings)
    rest.load_dir = first.checkpoint_dir
    resumed, tail = train(rest)
    assert is_rounding(resumed) == [True] * 4
    assert tail[5] == pytest.approx(losses[5], rel=1e-5)


def test_losses_are_the_stated_sums(tiny_config, start):
    trainer = start(tiny_config(mask_weight=0.5, mask_penalty="mean", l1_weight_initial=0.25))
    model: MaskedWaveletModel = trainer.pipeline.model
    trainer.pipeline.train()
    rays, batch = trainer.pipeline.datamanager.next_train(0)
    outputs = model(rays)
    losses = model.get_loss_dict(outputs, batch)
    expected = ((outputs["rgb"] - batch["image"][..., :3]) ** 2).mean()
    torch.testing.assert_close(losses["rgb_loss"], expected)
    torch.testing.assert_close(
        losses["mask_loss"], torch.tensor(0.5 * torch.sigmoid(torch.tensor(1.0)))
    )
    spatial = model.field.to_spatial().density
    l1 = sum(float(grid.abs().mean()) for grid in (*spatial.planes, *spatial.lines))
    assert float(losses["l1_loss"]) == pytest.approx(0.25 * l1, rel=1e-5)
    assert set(losses) == {"rgb_loss", "mask_loss", "l1_loss"}
    metrics = model.get_metrics_dict(outputs, batch)
    assert float(metrics["kept"]) == 1.0
    assert {"kept_level_0", "kept_level_1", "kept_level_2", "estimated_bytes"} <= set(metrics)
    assert float(metrics["psnr"]) == pytest.approx(-10 * math.log10(float(expected)), rel=1e-5)


@pytest.mark.parametrize("levels", [0, 2])
def test_kept_fractions_by_level(tiny_config, start, levels):
    """Lines have no levels, unless planes have none either."""
    trainer = start(tiny_config(levels=levels))
    model: MaskedWaveletModel = trainer.pipeline.model
    with torch.no_grad():
        for number, grid in enumerate(model.field.grids().values()):
            for level, some in enumerate(grid.logits):
                first_of_three = len(grid.logits) > 1 and number % 3 == 0
                some.fill_(-1.0 if level == 1 or first_of_three else 1.0)
    trainer.pipeline.train()
    rays, batch = trainer.pipeline.datamanager.next_train(0)
    metrics = model.get_metrics_dict(model(rays), batch)
    found = {name: float(metrics[name]) for name in metrics if name.startswith("kept_level")}
    planes = [grid for grid in model.field.grids().values() if len(grid.spatial_size) == 2]
    expected = {"kept_level_0": 1.0}
    if levels:
        for level in range(3):
            counts = [int((grid.logits[level] >= 0).sum()) for grid in planes]
            totals = [grid.logits[level].numel() for grid in planes]
            expected[f"kept_level_{level}"] = sum(counts) / sum(totals)
        assert expected["kept_level_1"] == 0 and 0.3 < expected["kept_level_2"] < 0.9
    assert found == pytest.approx(expected, rel=1e-6)


def test_without_levels_there_are_no_fractions_of_them(tiny_config, start):
    trainer = start(tiny_config(transform="dct"))
    trainer.pipeline.train()
    rays, batch = trainer.pipeline.datamanager.next_train(0)
    metrics = trainer.pipeline.model.get_metrics_dict(trainer.pipeline.model(rays), batch)
    assert [name for name in metrics if name.startswith("kept")] == ["kept"]


@pytest.mark.parametrize("compiled", [True, False])
def test_the_sum_penalty_is_that_of_the_papers_code(tiny_config, start, compiled):
    with contextlib.nullcontext() if compiled else native.disabled():
        trainer = start(tiny_config(mask_weight=0.5, mask_penalty="sum"))
        model: MaskedWaveletModel = trainer.pipeline.model
        logits = [p for grid in model.field.grids().values() for p in grid.logits]
        with torch.no_grad():
            for number, some in enumerate(logits):
                some.fill_(0.125 * (number % 5 - 1))
        trainer.pipeline.train()
        rays, batch = trainer.pipeline.datamanager.next_train(0)
        losses = model.get_loss_dict(model(rays), batch)
        expected = 0.5 * sum(float(some.double().sum()) for some in logits)
        assert expected != 0
        assert float(losses["mask_loss"]) == pytest.approx(expected, rel=1e-6)
        for of_logits in torch.autograd.grad(losses["mask_loss"], logits):
            assert (of_logits == 0.5).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_the_rate_penalty_is_that_of_priced_logits_times_the_steered_weight(
    tiny_config, start, compiled
):
    with contextlib.nullcontext() if compiled else native.disabled():
        trainer = start(tiny_config(mask_weight=0.5, mask_penalty="rate"))
        model: MaskedWaveletModel = trainer.pipeline.model
        grids = model.field.grids().values()
        for number, grid in enumerate(grids):
            shapes = [some.shape for some in grid.logits]
            grid.set_prices([torch.full(s, 7 + number, dtype=torch.uint8) for s in shapes])
        model.rate.log_factor.fill_(math.log(3.0))
        trainer.pipeline.train()
        rays, batch = trainer.pipeline.datamanager.next_train(0)
        loss = model.get_loss_dict(model(rays), batch)["mask_loss"]
        # Logits begin at one.
        counts = [sum(some.numel() for some in grid.logits) for grid in grids]
        expected = [1.5 * (7 + number) / 80 for number in range(len(counts))]
        total = sum(n * weight for n, weight in zip(counts, expected, strict=True))
        assert float(loss) == pytest.approx(total, rel=1e-5)
        logits = [some for grid in grids for some in grid.logits]
        found = iter(torch.autograd.grad(loss, logits))
        for weight, grid in zip(expected, grids, strict=True):
            for some in grid.logits:
                torch.testing.assert_close(next(found), torch.full_like(some, weight))


def test_a_step_draws_the_same_whatever_came_before(tiny_config, start):
    manager = start(tiny_config()).pipeline.datamanager
    _, first = manager.next_train(7)
    for step in (0, 3, 9):
        manager.next_train(step)
    _, again = manager.next_train(7)
    assert torch.equal(first["indices"], again["indices"])
    _, other = manager.next_train(8)
    assert not torch.equal(first["indices"], other["indices"])


def test_rays_made_ahead_are_those_of_their_pixels(tiny_config, start):
    """Also after the number of rays changed in between."""
    manager = start(tiny_config()).pipeline.datamanager
    cameras = manager.train_dataset.cameras
    for step in range(11):
        if step == 3:
            manager.train_pixel_sampler.set_num_rays_per_batch(17)
        rays, batch = manager.next_train(step)
        assert len(rays) == len(batch["indices"]) == (96 if step < 3 else 17)
        image, y, x = batch["indices"][5].tolist()
        expected = cameras.generate_rays(image, coords=torch.tensor([[y + 0.5, x + 0.5]]))
        torch.testing.assert_close(rays.directions[5], expected.directions[0])
        torch.testing.assert_close(rays.origins[5], expected.origins[0])
    assert manager.train_count == 11


def test_only_useful_pixels_are_drawn_once_restricted(tiny_config, start):
    manager = start(tiny_config()).pipeline.datamanager
    manager.next_train(0)  # makes step 1's rays, which are of no use any more

    def upper_half(rays: RayBundle) -> torch.Tensor:
        useful = torch.zeros(rays.shape, dtype=torch.bool)
        useful[:12] = True
        return useful

    assert manager.restrict_pixels(upper_half) == pytest.approx(0.5)
    _, batch = manager.next_train(1)
    assert (batch["indices"][:, 1] < 12).all()
    assert len(set(batch["indices"][:, 0].tolist())) > 1
    # Pixels and rays still belong together.
    image = manager.train_dataset[int(batch["indices"][0, 0])]["image"]
    _, y, x = batch["indices"][0].tolist()
    torch.testing.assert_close(batch["image"][0], image[y, x])
    assert manager.restrict_pixels(lambda rays: torch.zeros(rays.shape, dtype=torch.bool)) is None


def test_checkpoint_of_another_model_is_refused(tiny_config, start):
    state = start(tiny_config()).pipeline.model.state_dict()
    other = start(tiny_config(masks=False)).pipeline.model
    with pytest.raises(CheckpointMismatchError, match=r"does not fit the configured model"):
        other.load_state_dict(state)
    # Through nerfstudio's pipeline too, which would load what it can and go on.
    pipeline = start(tiny_config(planes="triplane")).pipeline
    with pytest.raises(CheckpointMismatchError, match="lines"):
        pipeline.load_pipeline({f"_model.{k}": v for k, v in state.items()}, 0)


def test_checkpoints_load_under_torchs_safe_default(tiny_config, train):
    trainer, _ = train(tiny_config(steps=10))
    (path,) = trainer.checkpoint_dir.glob("*.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["step"] == 9
    assert not any("lpips" in key for key in state["pipeline"])


def test_image_metrics_without_lpips_weights(monkeypatch, capsys):
    import torchmetrics.image.lpip as lpip

    def unreachable(**kwargs):
        raise OSError("no network")

    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", unreachable)
    metrics = ImageMetrics()
    image = torch.rand(40, 40, 3)
    noisy = (image + 0.1).clamp(0, 1)
    for _ in range(2):
        found = metrics(image, noisy)
    mse = float(((image - noisy) ** 2).mean())
    assert found["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-4)
    assert 0 < found["ssim"] < 1
    assert "lpips" not in found
    assert capsys.readouterr().out.count("LPIPS is left out") == 1


def test_config_fields_are_documented():
    import inspect

    from masked_wavelet_nerf import model, settings

    owners = model.MaskedWaveletModelConfig, settings.SceneSettings
    source = "".join(map(inspect.getsource, owners))
    for entry in dataclasses.fields(model.MaskedWaveletModelConfig):
        start_of_field = source.find(f"    {entry.name}:")
        assert start_of_field >= 0, entry.name
        following = source[start_of_field:].split("\n    ", 2)[1:]
        assert (
            any('"""' in line for line in following[:2])
            or '"""' in source[start_of_field : start_of_field + 400]
        ), entry.name
