"""Comparing with nerfstudio's own methods: the peers' settings, and what is counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masked_wavelet_nerf import peers
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.peers import Job, Peers, first_reaching
from masked_wavelet_nerf.presets import load_preset

PRESET = """
[run]
method = "masked-wavelet-bounded"
dataparser = "blender-data"
threads = 1
[flags]
max-num-iterations = 6
[flags.pipeline.datamanager]
train-num-rays-per-batch = 70
[flags.pipeline.model]
initial-resolution = 9
final-resolution = 17
levels = 2
upsample-steps = [2, 4]
occupancy-steps = [3]
density-shift = -3.0
num-density-components = 3
num-appearance-components = 5
appearance-dim = 7
hidden-dim = 16
near-plane = 1.5
far-plane = 6.5
eval-num-rays-per-chunk = 333
[dataparser]
scale-factor = 1.25
"""


@pytest.fixture
def preset(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(PRESET)
    return path


@pytest.fixture
def ours(preset, capture):
    return peers.our_config(load_preset(preset), capture)


@pytest.fixture
def job(preset, capture, tmp_path) -> Job:
    return Job(
        preset=str(preset),
        data=str(capture),
        output_dir=str(tmp_path / "runs"),
        method="tensorf",
        max_seconds=600.0,
        target_psnr=1.0,
        eval_every=4,
        eval_views=2,
        seed=3,
        device="cpu",
    )


# --- settings -------------------------------------------------------------------------------------


def test_our_config_is_the_presets(ours, capture):
    assert ours.method_name == "masked-wavelet-bounded"
    assert ours.max_num_iterations == 6
    assert ours.pipeline.datamanager.data == capture
    assert ours.pipeline.model.upsample_steps == (2, 4)


@pytest.mark.parametrize("method", ["tensorf", "nerfacto"])
def test_peers_take_over_capture_steps_and_rays(ours, capture, method):
    config = peers.method_config(method, ours)
    data = config.pipeline.datamanager
    assert config.method_name == method
    assert config.max_num_iterations == 6
    assert not config.mixed_precision
    assert data.data == capture
    assert data.train_num_rays_per_batch == 70
    assert type(data.dataparser).__name__ == "BlenderDataParserConfig"
    assert data.dataparser.scale_factor == 1.25
    assert data.dataparser.alpha_color == "white"
    assert config.pipeline.model.background_color == "white"
    assert config.pipeline.model.eval_num_rays_per_chunk == 333
    assert config.pipeline.model.camera_optimizer.mode == "off"
    assert {group["scheduler"].max_steps for group in config.optimizers.values()} == {6}


def test_tensorf_has_the_presets_grids(ours):
    model = peers.tensorf_config(ours).pipeline.model
    assert (model.init_resolution, model.final_resolution) == (9, 17)
    assert model.upsampling_iters == (2, 4)
    assert (model.num_den_components, model.num_color_components) == (3, 5)
    assert model.appearance_dim == 7


def test_nerfacto_is_set_up_for_a_bounded_scene(ours):
    model = peers.nerfacto_config(ours).pipeline.model
    assert (model.near_plane, model.far_plane) == (1.5, 6.5)
    assert model.implementation == "torch"
    assert model.disable_scene_contraction
    assert model.proposal_initial_sampler == "uniform"


def test_nerfstudios_own_configurations_stay(ours):
    from nerfstudio.configs.method_configs import all_methods

    for method in ("tensorf", "nerfacto"):
        peers.method_config(method, ours)
        assert all_methods[method].max_num_iterations == 30000
    assert all_methods["tensorf"].pipeline.model.init_resolution == 128
    assert all_methods["nerfacto"].pipeline.model.implementation == "tcnn"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kplane", r"'kplane'.*masked-wavelet-bounded, tensorf, nerfacto, or an installed"),
        ("splatfacto", r"splatfacto: it does not train on rays"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(preset, capture, method, message):
    with pytest.raises(UserError, match=message):
        Peers(preset, capture, methods=("tensorf", method)).main()


@pytest.mark.parametrize(
    ("flag", "wrong"), [("eval_every", 0), ("eval_views", -1), ("max_minutes", 0.0)]
)
def test_nothing_to_do_is_refused(preset, capture, flag, wrong):
    command = Peers(preset, capture, **{flag: wrong})
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {wrong}: expected more"):
        command.main()


def test_an_unbounded_scene_has_nerfacto_as_it_is_and_no_tensorf(tmp_path, capture):
    path = tmp_path / "unbounded.toml"
    path.write_text('[run]\nmethod = "masked-wavelet"\ndataparser = "blender-data"\n')
    with pytest.raises(UserError, match="tensorf: it has no unbounded scenes"):
        Peers(path, capture, methods=("tensorf",)).main()
    assert Peers(path, capture)._checked_methods(load_preset(path)) == (
        "masked-wavelet",
        "nerfacto",
    )
    config = peers.nerfacto_config(peers.our_config(load_preset(path), capture))
    model = config.pipeline.model
    assert model.implementation == "torch"
    assert not model.disable_scene_contraction and model.distortion_loss_mult > 0
    assert model.camera_optimizer.mode != "off" and model.background_color == "last_sample"


def test_all_that_can_are_trained_by_default(preset, capture):
    methods = Peers(preset, capture)._checked_methods(load_preset(preset))
    assert methods == ("masked-wavelet-bounded", "tensorf", "nerfacto")


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [(20.0, 10.0), (25.0, 20.0), (25.1, 40.0), (31.0, 40.0), (31.1, None)],
)
def test_first_reaching(target, expected):
    # It falls in between: the first time counts, as evaluated, without interpolation.
    points = [(10.0, 20.0), (20.0, 25.0), (30.0, 24.0), (40.0, 31.0), (50.0, 30.0)]
    assert first_reaching(points, target) == expected


def test_first_reaching_without_a_number():
    assert first_reaching([], 1.0) is None
    assert first_reaching([(1.0, math.nan), (2.0, math.inf)], 1.0) == 2.0


def test_only_what_rendering_needs_is_counted():
    model = torch.nn.Module()
    model.field = torch.nn.Linear(3, 4)  # 16
    model.field.register_buffer("aabb", torch.zeros(2, 3))  # 6
    model.field.embedding_appearance = torch.nn.Embedding(100, 32)
    model.camera_optimizer = torch.nn.Linear(5, 5)
    model.lpips = torch.nn.Linear(9, 9)
    assert peers.count_rendering_values(model) == 22


def test_stopwatch_counts_only_between_start_and_stop(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    watch = peers.Stopwatch(torch.device("cpu"))
    for running in (2.0, 3.0):
        watch.start()
        now[0] += running
        assert watch.seconds() >= running
        watch.stop()
        now[0] += 50.0
    assert watch.seconds() == 5.0


# --- training -------------------------------------------------------------------------------------


def test_a_peer_is_trained_and_measured(job):
    row = peers.run_job(job)
    steps, seconds, psnrs = zip(*row["curve"], strict=True)
    assert steps == (4, 6)
    assert seconds[0] < seconds[1] == row["train_seconds"]
    assert row["seconds_to_target"] == seconds[0]
    assert (row["steps"], row["stopped"], row["views"]) == (6, "steps", 2)
    assert row["psnr"] == psnrs[1] > 1.0
    grids = (3 + 5) * (3 * 17 * 17 + 3 * 17)
    assert 0 < row["bytes"] / 4 - grids < 60_000  # the rest are networks of 128 features
    assert not list(Path(job.output_dir).rglob("*.ckpt"))


def test_any_installed_method_that_trains_on_rays_can_be_named(job, preset, capture, ours):
    assert Peers(preset, capture, methods=("vanilla-nerf",))._checked_methods(load_preset(preset))
    config = peers.method_config("vanilla-nerf", ours)
    assert config.pipeline.datamanager.data == capture
    assert config.max_num_iterations == 6
    row = peers.run_job(replace(job, method="vanilla-nerf", eval_views=1, max_seconds=0.0))
    # Two networks of eight layers of 256 (63 positions come in twice) and two of 128, with heads.
    trunk = (63 * 256 + 256) + 6 * (256 * 256 + 256) + (319 * 256 + 256)
    network = trunk + (283 * 128 + 128) + (128 * 128 + 128) + (256 + 1) + (128 * 3 + 3)
    assert row["bytes"] / 4 == 2 * network
    assert (row["steps"], row["method"]) == (1, "vanilla-nerf")


def test_ours_is_measured_as_decoded(job):
    row = peers.run_job(replace(job, method="masked-wavelet-bounded", target_psnr=99.0))
    folder = Path(job.output_dir) / "masked-wavelet-bounded"
    assert row["bytes"] == (folder / "scene.mwnf").stat().st_size
    assert row["psnr"] == pytest.approx(row["psnr_trained"], abs=1e-6)
    assert row["seconds_to_target"] is None


def test_training_stops_when_the_time_is_up(job):
    row = peers.run_job(replace(job, max_seconds=0.0))
    assert (row["steps"], row["planned_steps"], row["stopped"]) == (1, 6, "time")
    peers.table([row])


def test_rows_of_other_methods_survive_a_failure(preset, capture, monkeypatch, capsys):
    def run_in_process(job, threads):
        assert threads == 1
        return None if job.method == "tensorf" else {"method": job.method, "seed": job.seed}

    monkeypatch.setattr(peers, "run_in_process", run_in_process)
    methods = ("masked-wavelet-bounded", "tensorf", "nerfacto")
    with pytest.raises(UserError, match="training failed: tensorf;"):
        Peers(preset, capture, methods=methods, seed=5, json=True).main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"method": name, "seed": 5} for name in (methods[0], methods[2])]
