"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import masked_wavelet_codec as codec
from masked_wavelet_nerf import cli
from masked_wavelet_nerf.presets import PresetError, load_preset
from masked_wavelet_nerf.rate import estimate_side_bytes
from masked_wavelet_nerf.runs import open_run, write_run

BIN = Path(sys.executable).parent


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    finished = subprocess.run(
        [str(BIN / str(arguments[0])), *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "COLUMNS": "160", "OMP_NUM_THREADS": "2"},
    )
    assert finished.returncode == code, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished


FLAGS = """
max-num-iterations = 40
[flags.pipeline.datamanager]
train-num-rays-per-batch = 128
[flags.pipeline.model]
initial-resolution = 12
final-resolution = 16
levels = 2
upsample-steps = [15]
occupancy-steps = [20]
density-shift = -4.0
num-density-components = 3
num-appearance-components = 4
hidden-dim = 16
mask-weight = 1e-3
mask-penalty = "mean"
"""


@pytest.fixture(scope="module")
def bench(capture, tmp_path_factory) -> tuple[dict, Path]:
    """The row of a tiny benchmark, through ns-train, and the folder that it leaves."""
    folder = tmp_path_factory.mktemp("bench")
    preset = folder / "tiny.toml"
    preset.write_text(
        f'[run]\nmethod = "masked-wavelet-bounded"\ndataparser = "blender-data"\nthreads = 2\n'
        f"[flags]\n{FLAGS}"
    )
    finished = run("mwnerf", "bench", preset, "--data", capture, "--output-dir", folder, "--json")
    row = json.loads(finished.stdout)
    return row, folder / row["experiment"]


def test_bench_row_from_training_to_decoding(bench):
    row, folder = bench
    assert abs(row["psnr_after"] - row["psnr_before"]) <= 0.01
    assert row["integers_equal"] is True
    assert row["bytes"] == (folder / "scene.mwnf").stat().st_size
    assert sum(row["bytes_by_part"].values()) == row["bytes"]
    assert row["steps"] == 40
    assert row["steps_per_second"] == pytest.approx(40 / row["train_seconds"])
    assert 5 < row["psnr_after"] < 60
    assert 0 <= row["dropped"] < 1
    assert row["threads"] == 2
    assert row["device"] == "cpu"
    assert row["command"].startswith("ns-train masked-wavelet-bounded ")
    assert row["command"].endswith(" --data DATA blender-data")
    assert (row["preset"], row["variant"], row["place"], row["export"]) == ("tiny", "", {}, "")
    for key in ("encode_seconds", "decode_seconds", "render_rays_per_second", "train_seconds"):
        assert row[key] > 0


def test_bitstream_names_no_path_of_this_machine(bench, capture):
    _, folder = bench
    scene = codec.read(folder / "scene.mwnf")
    text = json.dumps(scene.meta)
    for part in (str(folder), str(capture), "/tmp", "/root", "/home", str(Path.cwd())):
        assert part not in text
    assert scene.meta["method"] == "masked-wavelet-bounded"
    assert scene.meta["dataparser"]["name"] == "blender-data"
    assert np.count_nonzero(scene.cameras.split == 0) == 8
    assert np.count_nonzero(scene.cameras.split == 1) == 3
    assert scene.cameras.width.tolist() == [24] * 11
    assert scene.occupancy is not None


def test_a_decoded_run_takes_photos_in_the_size_it_was_measured_with(bench, tmp_path):
    _, folder = bench
    opened = open_run(folder / "masked-wavelet-bounded" / "trained" / "config.yml")
    opened.config.pipeline.datamanager.camera_res_scale_factor = 0.25
    scene = opened.scene({})
    config = yaml.load(write_run(scene, tmp_path).read_text("utf8"), Loader=yaml.Loader)
    assert config.pipeline.datamanager.camera_res_scale_factor == 0.25
    del scene.meta["camera_res_scale_factor"]  # as in files of before
    config = yaml.load(write_run(scene, tmp_path).read_text("utf8"), Loader=yaml.Loader)
    assert config.pipeline.datamanager.camera_res_scale_factor == 1
    for wrong in (0, -1.0, math.inf, "1", None):
        scene.meta["camera_res_scale_factor"] = wrong
        with pytest.raises(codec.CodecError, match=r"camera_res_scale_factor .* a positive number"):
            write_run(scene, tmp_path)


def test_a_decoded_run_knows_what_its_file_takes(bench, tmp_path):
    """The viewer says it; a rule of thumb may be off by half."""
    data = (bench[1] / "scene.mwnf").read_bytes()
    model = open_run(write_run(codec.decode(data), tmp_path)).model
    known = codec.describe(data).parts
    field = sum(known[part] for part in ("coefficients", "networks", "occupancy"))
    frame = estimate_side_bytes(torch.zeros(1, 1, 1, dtype=torch.bool), 1)
    assert float(model.rate.estimate(model.spatial().kept) - frame) == pytest.approx(
        field, rel=0.05
    )


def test_decoding_again_clears_away_what_a_killed_one_left(bench, tmp_path, monkeypatch):
    _, folder = bench
    scene, models = codec.read(folder / "scene.mwnf"), tmp_path / "nerfstudio_models"

    def save_half(_, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(Path, "unlink", lambda *_, **__: None)
        patches.setattr("torch.save", save_half)
        with pytest.raises(KeyboardInterrupt):
            write_run(scene, tmp_path)
    (left,) = [path.name for path in models.iterdir()]
    assert int(left[left.find("-") + 1 : left.find(".")]) == 39  # as nerfstudio reads names
    write_run(scene, tmp_path)
    assert [path.name for path in models.iterdir()] == ["step-000000039.ckpt"]


def test_ns_export_writes_the_same_file_as_bench(bench, tmp_path):
    _, folder = bench
    config = folder / "masked-wavelet-bounded" / "trained" / "config.yml"
    finished = run("ns-export", "masked-wavelet", "--load-config", config, "--output-dir", tmp_path)
    assert codec.equal(codec.read(tmp_path / "scene.mwnf"), codec.read(folder / "scene.mwnf")), (
        "mwnerf bench and ns-export differ"
    )
    output = finished.stdout
    for word in ("coefficients", "networks", "level 0", "level 2", "dB before", "dB after"):
        assert word in output, word


def test_export_without_the_capture_says_so(bench, tmp_path, capture, monkeypatch):
    _, folder = bench
    config = folder / "masked-wavelet-bounded" / "trained" / "config.yml"
    text = config.read_text()
    moved = tmp_path / "config.yml"
    # The capture's path is a YAML sequence of its parts: name one that is not there.
    moved.write_text(text.replace(f"- {capture.parent.name}\n", "- gone\n"))
    assert moved.read_text() != text
    finished = run("mwnerf", "export", "--load-config", moved, "--output-dir", tmp_path)
    assert "capture is not at hand" in finished.stdout
    with_capture = codec.read(folder / "scene.mwnf")
    without = codec.read(tmp_path / "scene.mwnf")
    assert without.cameras is None
    for one, other in zip(with_capture.grids, without.grids, strict=True):
        for a, b in zip(one.bands, other.bands, strict=True):
            np.testing.assert_array_equal(a.values, b.values)


def test_ns_eval_opens_a_decoded_run(bench, capture, tmp_path):
    row, folder = bench
    run(
        "mwnerf", "decode", folder / "scene.mwnf", "--output-dir", tmp_path / "run",
        "--data", capture,
    )  # fmt: skip
    run(
        "ns-eval", "--load-config", tmp_path / "run" / "config.yml",
        "--output-path", tmp_path / "eval.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "eval.json").read_text())["results"]["psnr"]
    assert found == pytest.approx(row["psnr_before"], abs=0.01)


def test_info_describes_the_file(bench):
    row, folder = bench
    found = json.loads(run("mwnerf", "info", folder / "scene.mwnf", "--json").stdout)
    assert found["bytes"] == row["bytes"]
    assert found["parts"] == row["bytes_by_part"]
    assert found["profile"] == "range"
    assert len(found["prefixes"]) == 3 and found["prefixes"][-1] == found["bytes"]
    assert found["dropped"] == pytest.approx(row["dropped"])
    assert set(found["kept_by_level"]) == {"level 0", "level 1", "level 2", "lines"}
    assert found["meta"]["psnr"] == pytest.approx(row["psnr_before"], abs=1e-3)
    table = run("mwnerf", "info", folder / "scene.mwnf").stdout
    assert f"{row['bytes']:,}" in table
    assert "range" in table and f"{found['prefixes'][0]:,}" in table


def test_paper_profile_holds_the_same_scene_in_more_bytes(bench, tmp_path, capture):
    row, folder = bench
    config = folder / "masked-wavelet-bounded" / "trained" / "config.yml"
    run(
        "mwnerf", "export", "--load-config", config, "--data", capture, "--output-dir", tmp_path,
        "--profile", "paper",
    )  # fmt: skip
    paper, ours = codec.read(tmp_path / "scene.mwnf"), codec.read(folder / "scene.mwnf")
    assert (tmp_path / "scene.mwnf").stat().st_size > 1.5 * row["bytes"]
    assert codec.equal(dataclasses.replace(ours, networks=paper.networks), paper)
    for name, array in ours.networks.items():
        assert isinstance(array, codec.QuantisedArray)
        np.testing.assert_array_equal(array.to_floats(), paper.networks[name])


def test_an_allowed_loss_makes_a_smaller_file_of_coarser_steps(bench, tmp_path, capture, capsys):
    row, folder = bench
    config = folder / "masked-wavelet-bounded" / "trained" / "config.yml"
    places = {"--load-config": config, "--data": capture, "--output-dir": tmp_path}
    arguments = [str(word) for pair in places.items() for word in pair]
    assert cli.main(["export", *arguments, "--allowed-loss", "0.05"]) == 0
    coarse, fine = codec.read(tmp_path / "scene.mwnf"), codec.read(folder / "scene.mwnf")
    assert (tmp_path / "scene.mwnf").stat().st_size < 0.95 * row["bytes"]
    for one, other in zip(coarse.grids, fine.grids, strict=True):
        for a, b in zip(one.bands, other.bands, strict=True):
            assert np.abs(a.values).max(initial=0) <= np.abs(b.values).max(initial=0)
    # What the file says of itself is what it gives, not what was trained.
    assert row["psnr_before"] - coarse.meta["psnr"] <= 0.05 + 1e-3
    output = " ".join(capsys.readouterr().out.split())
    assert f"{row['psnr_before']:.3f} dB before, {coarse.meta['psnr']:.3f} dB after" in output


def test_an_allowed_loss_needs_the_capture(bench, tmp_path, capture, capsys):
    text = (bench[1] / "masked-wavelet-bounded" / "trained" / "config.yml").read_text()
    moved = tmp_path / "config.yml"
    moved.write_text(text.replace(f"- {capture.parent.name}\n", "- gone\n"))
    arguments = ["--load-config", str(moved), "--output-dir", str(tmp_path)]
    assert cli.main(["export", *arguments, "--allowed-loss", "0.05"]) == 2
    assert "--allowed-loss needs the capture" in capsys.readouterr().err
    assert not (tmp_path / "scene.mwnf").exists()


def test_decode_levels_leaves_the_finer_ones_out(bench, tmp_path, capsys):
    _, folder = bench
    arguments = ["decode", str(folder / "scene.mwnf"), "--output-dir", str(tmp_path / "run")]
    assert cli.main([*arguments, "--levels", "-1"]) == 2
    assert "--levels -1: expected 0 or more" in capsys.readouterr().err
    assert cli.main([*arguments, "--levels", "1"]) == 0
    model = open_run(tmp_path / "run" / "config.yml").model
    scene = codec.read(folder / "scene.mwnf")
    grids = model.field.grids()
    for stored in scene.grids:
        for band, found in zip(stored.bands, grids[stored.name].integers(8), strict=True):
            expected = band.values if band.level <= 1 else np.zeros_like(band.values)
            np.testing.assert_array_equal(found.values.numpy(), expected)


def test_ns_export_help_lists_our_subcommand():
    output = run("ns-export", "--help").stdout
    assert "masked-wavelet" in output
    assert "pointcloud" in output
    assert "--profile" in run("ns-export", "masked-wavelet", "--help").stdout
    as_module = run("python", "-m", "nerfstudio.scripts.exporter", "--help").stdout
    assert "masked-wavelet" in as_module


def test_methods_are_registered_with_help_on_every_flag():
    output = run("ns-train", "masked-wavelet-bounded", "--help").stdout
    for flag in ("transform", "wavelet", "levels", "bits", "mask-weight", "planes", "masks"):
        assert f"--pipeline.model.{flag} " in output, flag
    assert "λ, the weight of the mask penalty" in output


def test_stand_in_leaves_an_unknown_exporter_alone(monkeypatch):
    from types import ModuleType

    import tyro

    from masked_wavelet_nerf import ns_export

    strange = ModuleType("nerfstudio.scripts.exporter")
    monkeypatch.setitem(sys.modules, "nerfstudio.scripts.exporter", strange)
    ns_export.install()
    assert not hasattr(strange, "tyro")
    strange.tyro = tyro
    ns_export.install()
    assert strange.tyro is not tyro
    assert strange.tyro.conf is tyro.conf
    # A union that is none is passed on untouched.
    assert strange.tyro.cli(int, args=["3"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["info", "{folder}/absent.mwnf"], "No such file"),
        (["info", "{folder}/foreign"], "container"),
        (["decode", "{folder}/foreign", "--output-dir", "{folder}/run"], "container"),
        (["decode", "{folder}/cut.mwnf", "--output-dir", "{folder}/run"], "section"),
        (["export", "--load-config", "{folder}/none.yml", "--output-dir", "x"], "no such file"),
        (["preset", "{folder}/foreign", "--data", "x"], "not TOML"),
        (["bench", "{folder}/absent.toml", "--data", "x"], "cannot be read"),
    ],
)
def test_bad_input_is_one_readable_line(bench, tmp_path, capsys, arguments, message):
    (tmp_path / "foreign").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    data = (bench[1] / "scene.mwnf").read_bytes()
    (tmp_path / "cut.mwnf").write_bytes(data[: len(data) // 2])
    assert cli.main([a.format(folder=tmp_path) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_is_found(bench, tmp_path, capsys):
    data = bytearray((bench[1] / "scene.mwnf").read_bytes())
    data[-10] ^= 1
    (tmp_path / "flipped.mwnf").write_bytes(data)
    assert cli.main(["info", str(tmp_path / "flipped.mwnf")]) == 2
    assert "checksum" in capsys.readouterr().err


def test_failed_export_leaves_the_old_file(bench, tmp_path, monkeypatch):
    from masked_wavelet_nerf import export, runs

    path = tmp_path / "scene.mwnf"
    path.write_bytes(b"precious")
    run_ = runs.open_run(bench[1] / "masked-wavelet-bounded" / "trained" / "config.yml")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export.export_run(run_, path)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_evaluation_of_every_third_row_and_column(bench, capture, monkeypatch):
    """Rays and photo alike are those of the whole picture, some left out."""
    import torch

    from masked_wavelet_nerf import runs

    config = bench[1] / "masked-wavelet-bounded" / "trained" / "config.yml"
    pipeline = runs.open_run(config, capture).pipeline
    assert pipeline is not None
    dataset = pipeline.datamanager.eval_dataset
    some = dataset[0]["image"][1::3, 1::3, :3]
    seen = []

    def truth(rays):
        seen.append(rays)
        nothing = torch.ones(8, 8, 1)
        return {"rgb": some + 0.1, "accumulation": nothing, "depth": nothing}

    monkeypatch.setattr(pipeline.model, "get_outputs_for_camera_ray_bundle", truth)
    found = runs.evaluate(pipeline, num_views=1, stride=3)
    assert found.num_views == 1
    assert found.psnr == pytest.approx(20, abs=1e-3)
    (rays,) = seen
    expected = dataset.cameras.generate_rays(camera_indices=0).directions[1::3, 1::3]
    assert torch.equal(rays.directions, expected)
    monkeypatch.undo()
    assert runs.evaluate(pipeline, num_views=1, stride=100).psnr > 0  # of one pixel


@pytest.mark.parametrize("flag", ["steps", "eval-views", "eval-stride"])
def test_bench_refuses_less_than_one(flag, tmp_path, capsys):
    assert cli.main(["bench", "p.toml", "--data", str(tmp_path), f"--{flag}", "0"]) == 2
    assert f"--{flag} 0: expected 1 or more" in capsys.readouterr().err


def test_presets_name_what_is_wrong(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('[run]\nmethod = "masked-wavelet"\n')
    with pytest.raises(PresetError, match="lacks 'dataparser'"):
        load_preset(path)
    path.write_text("[flag]\n")
    with pytest.raises(PresetError, match="unknown tables"):
        load_preset(path)


def test_committed_presets_are_understood_by_ns_train():
    import tyro
    from nerfstudio.configs.method_configs import all_methods

    presets = [load_preset(p) for p in Path(__file__).parent.parent.glob("configs/**/*.toml")]
    for _, _, preset in (run for of in presets for run in of.runs()):
        arguments = preset.arguments(Path("capture"))
        method = all_methods[preset.method]
        # nerfstudio's own setting: True and False are written out.
        as_ns_train = tyro.conf.FlagConversionOff[type(method)]
        config = tyro.cli(as_ns_train, default=method, args=arguments[1:])
        model = config.pipeline.model
        assert str(config.data) == "capture"
        # None at all where a variant tries just that.
        assert config.optimizers["grids"]["scheduler"].restarts in (model.upsample_steps, ())
        assert config.optimizers["grids"]["scheduler"].max_steps == config.max_num_iterations


def test_wheel_holds_both_packages_and_nothing_else(tmp_path):
    import shutil
    import zipfile

    source = tmp_path / "source"
    root = Path(__file__).parent.parent
    source.mkdir()
    for name in ("masked_wavelet_nerf", "export", "configs", "tests"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(n for n in names if n.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "masked_wavelet_nerf",
        "masked_wavelet_codec",
    }
    for module in ("masked_wavelet_nerf/model.py", "masked_wavelet_codec/paper.py",
                   "masked_wavelet_nerf/datasets/sample.py"):  # fmt: skip
        assert module in names
    assert "masked-wavelet-bounded = masked_wavelet_nerf.method:masked_wavelet_bounded" in text
    assert "mwnerf = masked_wavelet_nerf.cli:entrypoint" in text
