"""Sweeps: what is run, tried again, kept and reported. Processes are real, trainings stand-ins."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny_config
from PIL import Image

from masked_wavelet_nerf import experiment as experiments
from masked_wavelet_nerf import laboratory, pictures
from masked_wavelet_nerf.bench import Bench
from masked_wavelet_nerf.cli import main
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.experiment import Experiment, training_curves
from masked_wavelet_nerf.laboratory import EngineError, run_experiments
from masked_wavelet_nerf.presets import Preset
from masked_wavelet_nerf.results import add_rows, read_rows
from masked_wavelet_nerf.runs import open_run

# Python runs it at the start of every process; workers of Ray hand it on to theirs.
STAND_IN = """
import json, os, sys, time
from pathlib import Path

if "masked_wavelet_nerf.experiment" in sys.orig_argv:
    text, folder, result = sys.orig_argv[-3:]
    content, folder = json.loads(text), Path(folder)
    with (folder / "attempts").open("a") as file:
        file.write("x")
    attempts = len((folder / "attempts").read_text())
    for word in content["variant"].split():
        if word == "fails" or word == "once" and attempts == 1:
            print(*range(20), os.environ.get("LAST_WORDS", "no such flag"), sep="\\n", flush=True)
            os._exit(3)
        if word == "mute":
            os._exit(0)
        if word == "meets":
            here = folder.parent / f"here-{folder.name}"
            here.touch()
            until = time.monotonic() + float(os.environ["PATIENCE"])
            while len(list(folder.parent.glob("here-*"))) < 2:
                if time.monotonic() > until:
                    here.unlink()
                    os._exit(4)
                time.sleep(0.01)
            time.sleep(0.2)  # the other one looks, too
            here.unlink()
    rows = [
        {
            "experiment": folder.name,
            "preset": content["preset"]["name"],
            **{key: content[key] for key in ("variant", "place", "scene", "seed")},
            "export": export,
            "psnr_after": 30.0,
            "bytes": 1000,
            "dropped": 0.5,
            "train_seconds": 60.0,
            "attempts": attempts,
            "threads": os.environ["OMP_NUM_THREADS"],
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "process": os.getpid(),
        }
        for export in content["preset"]["exports"]
    ]
    Path(result).write_text(json.dumps(rows))
    os._exit(0)
"""
PRESET = Preset("p", "m", "d", {"model": {"bits": 8}})


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Experiments take some hundredths of a second, and go as their variant says."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PATIENCE", "20")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def make(variant: str = "", seed: int = 42, preset: Preset = PRESET, **changes) -> Experiment:
    return Experiment(
        **{
            "preset": preset,
            "variant": variant,
            "place": {},
            "scene": "s",
            "data": "/data/s",
            "seed": seed,
            "device": "cpu",
        }
        | changes
    )


def attempts(output_dir: Path, experiment: Experiment) -> int:
    path = output_dir / experiment.identity / "attempts"
    return len(path.read_text()) if path.exists() else 0


def seeds(rows) -> list[int]:
    return [row["seed"] for row in rows]


def test_rows_come_back_and_are_in_the_file(stand_in, tmp_path):
    wanted = [make(seed=seed) for seed in (3, 1, 2)]
    rows, failed = run_experiments(wanted, tmp_path / "out", rows_path=tmp_path / "rows.jsonl")
    assert seeds(rows) == [3, 1, 2]
    assert failed == []
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert [row["experiment"] for row in rows] == [experiment.identity for experiment in wanted]
    assert len({row["process"] for row in rows} | {os.getpid()}) == 4
    for row in rows:
        assert (tmp_path / "out" / row["experiment"] / "log.txt").is_file()


def test_without_a_file_rows_come_back_all_the_same(stand_in, tmp_path):
    rows, failed = run_experiments([make()], tmp_path / "out")
    assert (seeds(rows), failed) == ([42], [])
    assert {path.name for path in tmp_path.iterdir()} == {"stand_in", "out"}


def test_what_is_in_the_file_is_kept_and_not_run_again(stand_in, tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    one, two, three, other = (make(seed=seed) for seed in (1, 2, 3, 4))
    run_experiments([one, two, other], out, rows_path=path)
    before = path.read_bytes()
    capsys.readouterr()
    rows, failed = run_experiments([three, two, one], out, rows_path=path)
    assert sorted(seeds(rows)) == [1, 2, 3]  # not the other one
    assert failed == []
    assert [attempts(out, experiment) for experiment in (one, two, three, other)] == [1, 1, 1, 1]
    assert path.read_bytes().startswith(before)
    assert seeds(read_rows(path)) == [1, 2, 4, 3]
    assert "2 of 3 experiments are in" in " ".join(capsys.readouterr().out.split())


def test_rows_of_before_bench_stay_and_count_for_nothing(stand_in, tmp_path):
    path = tmp_path / "rows.jsonl"
    old = {"preset": "p", "variant": "", "scene": "s", "seed": 42}
    add_rows(path, [old])
    rows, _ = run_experiments([make()], tmp_path / "out", rows_path=path)
    assert seeds(rows) == [42] and rows[0] != old
    assert read_rows(path) == [old, *rows]


@pytest.mark.parametrize("content", [b"", b'{"experiment": "12', b"\n"])
def test_a_sweep_whose_first_row_was_cut_off_goes_on(stand_in, tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    rows, failed = run_experiments([make()], tmp_path / "out", rows_path=path)
    assert (seeds(rows), failed) == ([42], [])
    assert read_rows(path) == rows


def test_an_experiment_with_rows_cut_off_is_not_finished(stand_in, tmp_path):
    path = tmp_path / "rows.jsonl"
    preset = dataclasses.replace(PRESET, exports={"range": {}, "paper": {"profile": "paper"}})
    one, two = (make(seed=seed, preset=preset) for seed in (1, 2))
    run_experiments([one, two], tmp_path / "out", rows_path=path)
    assert len(path.read_bytes().splitlines()) == 4
    path.write_bytes(path.read_bytes()[:-10])
    rows, _ = run_experiments([one, two], tmp_path / "out", rows_path=path)
    assert sorted((row["seed"], row["export"]) for row in rows) == [
        (1, "paper"),
        (1, "range"),
        (2, "paper"),
        (2, "range"),
    ]
    assert sorted(map(json.dumps, read_rows(path))) == sorted(map(json.dumps, rows))


@pytest.mark.parametrize(
    "content", [b'[{"experiment": "x"}]', b"some\ntext\n", b"one line", b"\x89PNG"]
)
def test_another_file_is_refused_before_anything_runs(stand_in, tmp_path, content):
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(UserError, match="precious: "):
        run_experiments([make()], tmp_path / "out", rows_path=path)
    assert path.read_bytes() == content
    assert not (tmp_path / "out").exists()


def test_the_same_experiment_is_run_once(stand_in, tmp_path):
    rows, _ = run_experiments([make(), make()], tmp_path / "out")
    assert seeds(rows) == [42]
    assert attempts(tmp_path / "out", make()) == 1


def test_no_preset_is_lost_because_another_trains_the_same(stand_in, tmp_path):
    wanted = [make(preset=dataclasses.replace(PRESET, name=name)) for name in "ab"]
    rows, _ = run_experiments(wanted, tmp_path / "out")
    assert sorted(row["preset"] for row in rows) == ["a", "b"]


def test_what_fails_once_is_tried_again(stand_in, tmp_path):
    rows, failed = run_experiments([make("once")], tmp_path / "out", retries=1)
    assert ([row["attempts"] for row in rows], failed) == ([2], [])
    rows, failed = run_experiments([make("once", seed=7)], tmp_path / "out", retries=0)
    assert (rows, failed) == ([], [make("once", seed=7)])


def test_what_fails_for_good_is_reported_and_others_go_on(stand_in, tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    broken = make("fails")
    wanted = [make(seed=1), broken, make("mute"), make(seed=2)]
    rows, failed = run_experiments(wanted, out, rows_path=path, retries=2)
    assert seeds(rows) == seeds(read_rows(path)) == [1, 2]
    assert failed == [broken, make("mute")]
    assert [attempts(out, experiment) for experiment in wanted] == [1, 3, 3, 1]
    shown = capsys.readouterr().out
    assert "Failed: p, fails, s, seed 42" in shown
    log = out / broken.identity / "log.txt"
    assert f"no such flag\nexit code 3; all of it: {log}" in shown.replace("\n/", " /")
    assert "19\nno such flag" in shown and "\n5\n" not in shown  # the end of it
    assert "exit code 0; all of it" in shown
    assert log.read_text().startswith("0\n1\n2\n")


def test_what_failed_is_run_by_the_next_call(stand_in, tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    wanted = [make("once"), make()]
    rows, failed = run_experiments(wanted, out, rows_path=path, retries=0)
    assert ([row["variant"] for row in rows], failed) == ([""], [make("once")])
    rows, failed = run_experiments(wanted, out, rows_path=path, retries=0)
    assert ([row["variant"] for row in rows], failed) == (["", "once"], [])


def test_a_log_may_hold_anything(stand_in, tmp_path, monkeypatch, capsys):
    """Brackets are no markup of ours."""
    monkeypatch.setenv("LAST_WORDS", "in [flags]: no [/home/x]")
    rows, failed = run_experiments([make("fails"), make()], tmp_path / "out", retries=0)
    assert (seeds(rows), failed) == ([42], [make("fails")])
    assert "in [flags]: no [/home/x]" in capsys.readouterr().out


def test_a_variant_may_be_called_anything(stand_in, tmp_path, capsys):
    rows, failed = run_experiments([make("a [b]"), make("[/c]")], tmp_path / "out")
    assert ([row["variant"] for row in rows], failed) == (["a [b]", "[/c]"], [])
    shown = capsys.readouterr().out
    assert "p, a [b], s, seed 42" in shown and "p, [/c], s, seed 42" in shown


def test_rows_of_an_earlier_attempt_are_not_taken_for_new_ones(stand_in, tmp_path):
    broken = make("fails mute")
    folder = tmp_path / broken.identity
    folder.mkdir()
    (folder / "rows.json").write_text('[{"seed": 42}]')
    assert "exit code 3" in laboratory.attempt(broken, tmp_path, 1, None, 0)
    silent = make("mute")
    folder = tmp_path / silent.identity
    folder.mkdir()
    (folder / "rows.json").write_text('[{"seed": 42}]')
    assert "exit code 0" in laboratory.attempt(silent, tmp_path, 1, None, 0)


def test_jobs_run_at_the_same_time(stand_in, tmp_path, monkeypatch):
    pair = [make("meets", seed=seed) for seed in (1, 2)]
    rows, failed = run_experiments(pair, tmp_path / "two", jobs=2, retries=0)
    assert (sorted(seeds(rows)), failed) == ([1, 2], [])
    monkeypatch.setenv("PATIENCE", "0.1")
    rows, failed = run_experiments(pair, tmp_path / "one", jobs=1, retries=0)
    assert (rows, failed) == ([], pair)


def test_each_job_has_a_gpu_of_its_own(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "_num_gpus", lambda: 2)
    pair = [make("meets", seed=seed, device="cuda") for seed in (1, 2)]
    more = [make(seed=seed, device="cuda") for seed in (3, 4, 5)]
    rows, failed = run_experiments(pair + more, tmp_path / "out", jobs=2, retries=0)
    assert failed == []
    together = [row["gpu"] for row in rows if row["seed"] < 3]
    assert sorted(together) == ["0", "1"]
    assert {row["gpu"] for row in rows} == {"0", "1"}


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_a_single_gpu_is_left_to_all_jobs(stand_in, tmp_path, monkeypatch, num_gpus):
    monkeypatch.setattr(laboratory, "_num_gpus", lambda: num_gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    rows, _ = run_experiments([make(seed=1), make(seed=2)], tmp_path, jobs=2)
    assert [row["gpu"] for row in rows] == ["5", "5"]


def test_jobs_stay_on_the_gpus_that_are_ours(stand_in, tmp_path, monkeypatch):
    """On a machine that others use, too."""
    monkeypatch.setattr(laboratory, "_num_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    pair = [make("meets", seed=seed, device="cuda") for seed in (1, 2)]
    rows, _ = run_experiments(pair, tmp_path, jobs=2, retries=0)
    assert sorted(row["gpu"] for row in rows) == ["2", "3"]


def test_jobs_share_the_cores(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(5)))
    three = dataclasses.replace(PRESET, threads=3)
    for jobs, threads in ((1, "5"), (2, "2"), (6, "1")):
        wanted = [make(), make(seed=3, preset=three)]
        rows, _ = run_experiments(wanted, tmp_path / str(jobs), jobs=jobs)
        assert {row["seed"]: row["threads"] for row in rows} == {42: threads, 3: "3"}


def test_trainings_of_jobs_share_the_cores_too(tmp_path, monkeypatch):
    """Down to the process of ns-train."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    seen = []

    def run(command, env, **_):
        if command[2] == "nerfstudio.scripts.train":
            seen.append((env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]))
            return SimpleNamespace(returncode=1)
        with monkeypatch.context() as patches:
            for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                patches.setenv(key, env[key])
            with pytest.raises(UserError, match="ns-train failed"):
                experiments.main(*command[3:])
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr("subprocess.run", run)
    three = dataclasses.replace(PRESET, threads=3)
    for preset, threads in ((three, 2), (PRESET, 2), (PRESET, 1)):
        assert "exit code 1" in laboratory.attempt(make(preset=preset), tmp_path, threads, None, 0)
    assert seen == [("3", "3"), ("2", "2"), ("1", "1")]


def test_identity_is_of_what_is_trained_and_measured():
    identity = make().identity
    assert len(identity) == 16 and identity.isalnum()
    for same in (
        make(),
        make(data="/elsewhere/s"),
        make(preset=dataclasses.replace(PRESET, flags={"model.bits": 8})),
        make(preset=dataclasses.replace(PRESET, threads=3, about={"notes": "x"}, scenes=("s",))),
        make(preset=dataclasses.replace(PRESET, paper=({"psnr": 33.5},))),
    ):
        assert same.identity == identity
    others = [
        make(seed=43),
        make(scene="t"),
        make("v"),
        make(place={"model.bits": 8}),
        make(device="cuda"),
        make(steps=10),
        make(eval_views=3),
        make(eval_stride=2),
        make(preset=dataclasses.replace(PRESET, method="n")),
        make(preset=dataclasses.replace(PRESET, dataparser="e")),
        make(preset=dataclasses.replace(PRESET, flags={"model": {"bits": 6}})),
        make(preset=dataclasses.replace(PRESET, flags={"model": {"bits": 8, "levels": 2}})),
        make(preset=dataclasses.replace(PRESET, dataparser_flags={"scale": 2})),
        make(preset=dataclasses.replace(PRESET, exports={"": {"profile": "paper"}})),
        make(preset=dataclasses.replace(PRESET, exports={"a": {}, "b": {"keep": 0.1}})),
    ]
    assert len({identity, *(other.identity for other in others)}) == 1 + len(others)


def test_an_experiment_is_read_as_it_was_written():
    preset = Preset(
        "p",
        "m",
        "d",
        {"model.steps": [1, 2], "weight": 4e-9},
        {"scale": 0.5},
        threads=2,
        about={"notes": "λ"},
        scenes=("s", "t"),
        exports={"a": {"allowed-loss": 0.1}},
        paper=({"scene": "s", "psnr": 33.5},),
    )
    written = make("v", preset=preset, place={"weight": 4e-9}, data=None, steps=3, eval_views=2)
    read = Experiment.from_json(written.to_json())
    assert dataclasses.asdict(read) | {"preset": None} == dataclasses.asdict(written) | {
        "preset": None
    }
    assert read.preset.arguments(Path("D")) == preset.arguments(Path("D"))
    assert read.preset.published("s", {}) == {"psnr": 33.5}
    assert tuple(read.preset.scenes) == ("s", "t")
    assert (read.identity, read.title) == (written.identity, "p, v, weight 4e-09, s, seed 42")


def test_a_preset_may_say_when_it_was_made(stand_in, tmp_path):
    """TOML knows dates."""
    (tmp_path / "p.toml").write_text(
        '[about]\ndate = 2026-01-05\n[run]\nmethod = "m"\ndataparser = "d"\n'
    )
    (experiment,) = Bench((tmp_path / "p.toml",), data=tmp_path, device="cpu").plan()
    rows, failed = run_experiments([experiment], tmp_path / "out")
    assert (seeds(rows), failed) == ([42], [])


@pytest.fixture
def presets(tmp_path):
    """Two presets and the folder of their scenes."""
    run = '[run]\nmethod = "m"\ndataparser = "d"\nscenes = '
    (tmp_path / "one.toml").write_text(
        run + '["set/a", "sample"]\n[sweep]\nw = [1, 2]\n[variants.u]\n[variants.v]\n'
    )
    (tmp_path / "two.toml").write_text(run + '["b"]\n')
    for scene in ("set/a", "b"):
        (tmp_path / "scenes" / scene).mkdir(parents=True)
    return tmp_path / "one.toml", tmp_path / "two.toml"


def test_a_plan_is_presets_times_scenes_times_runs_and_seeds_last(presets, tmp_path):
    bench = Bench(presets, data_root=tmp_path / "scenes", seeds=(44, 42), device="cpu", steps=5)
    plan = bench.plan()
    once = [
        ("one", scene, variant, {"w": w})
        for scene in ("set/a", "sample")
        for variant in "uv"
        for w in (1, 2)
    ] + [("two", "b", "", {})]
    assert [(e.seed, e.preset.name, e.scene, e.variant, e.place) for e in plan] == [
        (seed, *rest) for seed in (44, 42) for rest in once
    ]
    places = {"set/a": f"{tmp_path}/scenes/set/a", "sample": None, "b": f"{tmp_path}/scenes/b"}
    assert all(experiment.data == places[experiment.scene] for experiment in plan)
    assert {(e.device, e.steps, e.eval_views, e.eval_stride) for e in plan} == {("cpu", 5, None, 1)}
    assert len({experiment.identity for experiment in plan}) == len(plan) == 18


def test_a_plan_of_one_capture_takes_no_heed_of_scenes(presets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "scenes")
    plan = Bench(presets, data=Path("b"), device="cpu").plan()
    assert {(e.scene, e.data) for e in plan} == {("b", f"{tmp_path}/scenes/b")}
    assert len(plan) == 4 + 1


def test_scenes_are_chosen_by_their_last_name_too(presets, tmp_path):
    for chosen in ("a", "set/a"):
        bench = Bench(presets, data_root=tmp_path / "scenes", scenes=(chosen,), device="cpu")
        assert [experiment.scene for experiment in bench.plan()] == ["set/a"] * 4
    plan = Bench(presets[:1], scenes=("sample",), device="cpu").plan()  # needs no data
    assert [(experiment.scene, experiment.data) for experiment in plan] == [("sample", None)] * 4


def test_variants_are_chosen_by_name(presets, tmp_path):
    plan = Bench(presets, data_root=tmp_path / "scenes", variants=("v",), device="cpu").plan()
    assert [(e.preset.name, e.scene, e.variant) for e in plan] == [
        ("one", scene, "v") for scene in ("set/a", "set/a", "sample", "sample")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one preset"),
        (["two.toml"], "two.toml trains on b: --data-root says which folder"),
        (["two.toml", "--data-root", "none"], "two.toml: none/b is not there"),
        (["two.toml", "--data", "none"], "--data none: not there"),
        (["two.toml", "--data", ".", "--data-root", "."], "give one"),
        (["two.toml", "--data-root", "scenes", "--scenes", "c"], "--scenes c: no preset names"),
        (
            ["two.toml", "--data-root", "scenes", "--scenes", "b", "c"],
            "--scenes c: no preset names it; expected some of b",
        ),
        (
            ["one.toml", "--data", ".", "--variants", "v", "w"],
            "--variants w: no preset names it; expected some of u, v",
        ),
        (
            ["one.toml", "two.toml", "--data-root", "scenes", "--scenes", "b", "--variants", "u"],
            "no preset has some of both",
        ),
        (["gone.toml", "--data", "."], "gone.toml: cannot be read"),
        (["two.toml", "--data", ".", "--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["two.toml", "--data", ".", "--retries", "-1"], "--retries -1: expected 0 or more"),
    ],
)
def test_a_plan_that_cannot_be_is_one_readable_line(
    presets, stand_in, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments, "--output-dir", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_run(presets, stand_in, tmp_path, capsys):
    command = ["bench", *map(str, presets), "--data-root", str(tmp_path / "scenes")]
    command += ["--output-dir", str(tmp_path / "out"), "--scenes", "a", "b"]
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "one, u, w 1, set/a, seed 42",
        "one, u, w 2, set/a, seed 42",
        "one, v, w 1, set/a, seed 42",
        "one, v, w 2, set/a, seed 42",
        "two, b, seed 42",
    ]
    assert not (tmp_path / "out").exists()


VARIANTS = '[run]\nmethod = "m"\ndataparser = "d"\n[variants.fine]\n[variants.fails]\n'


def test_the_command_fails_where_an_experiment_did(stand_in, tmp_path, capsys):
    preset = tmp_path / "p.toml"
    preset.write_text(VARIANTS.replace("fails", "also-fine"))
    command = ["bench", str(preset), "--data", str(tmp_path), "--device", "cpu"]
    command += ["--output-dir", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.jsonl")]
    assert main(command) == 0
    assert "experiments failed" not in "".join(capsys.readouterr())
    preset.write_text(VARIANTS)
    assert main(command) == 1
    assert "1 of 2 experiments failed" in capsys.readouterr().err
    assert [row["variant"] for row in read_rows(tmp_path / "rows.jsonl")] == ["fine", "also-fine"]
    assert main([*command, "--dry-run"]) == 0


def test_json_on_standard_output_is_all_there_is(stand_in, tmp_path, capsys):
    """Also where an experiment failed."""
    preset = tmp_path / "p.toml"
    preset.write_text(VARIANTS)
    command = ["bench", str(preset), "--data", str(tmp_path), "--json"]
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--retries", "0"]) == 1
    out, error = capsys.readouterr()
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert (row["variant"], row["psnr_after"]) == ("fine", 30.0)
    assert "no such flag" in error and "1 of 2 experiments failed" in error


def test_logs_of_what_failed_are_there_to_be_read(stand_in, tmp_path, monkeypatch, capsys):
    """Without --output-dir, where folders are temporary otherwise."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    preset = tmp_path / "p.toml"
    preset.write_text(VARIANTS.replace("[variants.fails]", ""))
    command = ["bench", str(preset), "--data", str(tmp_path), "--retries", "0"]
    assert main(command) == 0
    assert list((tmp_path / "temporary").glob("*")) == []
    preset.write_text(VARIANTS)
    assert main(command) == 1
    logs = [path.read_text() for path in (tmp_path / "temporary").glob("*/*/log.txt")]
    assert sum("no such flag" in log for log in logs) == 1


class RayError(Exception):
    pass


class PretendedRay(SimpleNamespace):
    """Runs tasks at once, and notes what was asked for."""

    def __init__(self, running=False):
        asked = {"tasks": []}

        def remote(function):
            def options(**wanted):
                asked["tasks"].append(wanted)
                return SimpleNamespace(remote=lambda *args: (len(asked["tasks"]), function(*args)))

            return SimpleNamespace(options=options)

        def get(reference):
            if isinstance(reference[1], RayError):
                raise reference[1]
            return reference[1]

        super().__init__(
            asked=asked,
            is_initialized=lambda: running,
            init=lambda *args, **kwargs: asked.update(init=(args, kwargs)),
            remote=remote,
            wait=lambda references: ([references[-1]], references[:-1]),
            get=get,
            exceptions=SimpleNamespace(RayError=RayError),
            shutdown=lambda: asked.update(shutdown=True),
        )


@pytest.fixture
def pretended_ray(monkeypatch):
    """Puts one in place, whose tasks all fail; what it was asked for."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def install(running=False):
        ray = PretendedRay(running)
        monkeypatch.setitem(sys.modules, "ray", ray)

        def attempt(*args):
            ray.asked.setdefault("calls", []).append(args)
            return "not run"

        monkeypatch.setattr(laboratory, "attempt", attempt)
        return ray.asked

    return install


def test_tasks_of_ray_ask_for_what_they_need(pretended_ray, tmp_path, monkeypatch):
    asked = pretended_ray()
    three = dataclasses.replace(PRESET, threads=3)
    wanted = [make(seed=1), make(seed=2, preset=three), make(seed=3, device="cuda")]
    monkeypatch.chdir(tmp_path)
    rows, failed = run_experiments(wanted, Path("out"), engine="ray", jobs=2, retries=4)
    assert (rows, sorted(experiment.seed for experiment in failed)) == ([], [1, 2, 3])
    assert [(task["num_cpus"], task["num_gpus"]) for task in asked["tasks"]] == [
        (1, 0),
        (3, 0),
        (1, 1),
    ]
    # Workers have another working directory, and their GPU from Ray.
    assert asked["calls"] == [
        (experiment, tmp_path / "out", threads, None, 4)
        for experiment, threads in zip(wanted, (1, 3, 1), strict=True)
    ]
    assert asked["shutdown"] is True


@pytest.mark.parametrize(("threads", "jobs"), [(1, 3), (2, 1), (2, 2), (4, 2)])
def test_a_cluster_of_our_own_has_room_for_all_jobs(pretended_ray, tmp_path, threads, jobs):
    """Ray waits for ever with a task that asks for more than there is."""
    asked = pretended_ray()
    preset = dataclasses.replace(PRESET, threads=threads)
    run_experiments([make(preset=preset)], tmp_path, engine="ray", jobs=jobs)
    assert asked["init"][0] in ((), (None,))
    assert asked["init"][1]["num_cpus"] // asked["tasks"][0]["num_cpus"] == jobs


def test_a_cluster_that_has_a_name_is_used(pretended_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    asked = pretended_ray()
    run_experiments([make()], tmp_path, engine="ray", jobs=2)
    assert asked["init"][0] == ("auto",)
    assert asked["init"][1].get("num_cpus") is None  # those of others are not ours to say


def test_a_cluster_that_runs_is_left_running(pretended_ray, tmp_path):
    asked = pretended_ray(running=True)
    run_experiments([make()], tmp_path, engine="ray")
    assert len(asked["tasks"]) == 1
    assert "init" not in asked and "shutdown" not in asked


def test_a_sweep_goes_on_where_a_worker_of_ray_is_lost(
    pretended_ray, tmp_path, monkeypatch, capsys
):
    pretended_ray()

    def attempt(experiment, *args):
        return RayError("the node died") if experiment.seed == 1 else "not run"

    monkeypatch.setattr(laboratory, "attempt", attempt)
    wanted = [make(seed=2), make(seed=1)]
    _, failed = run_experiments(wanted, tmp_path, engine="ray")
    assert failed == [wanted[1], wanted[0]]  # the pretended one ends the last one first
    assert "Ray: the node died" in capsys.readouterr().out


def test_without_ray_its_engine_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'masked-wavelet-nerf\[ray\]'"):
        run_experiments([make()], tmp_path / "out", engine="ray")


def test_rows_come_back_from_tasks_of_ray(stand_in, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    kept, once, broken = make(seed=0), make("once", seed=1), make("fails", seed=2)
    run_experiments([kept], out, rows_path=path)
    wanted = [broken, once, kept]
    rows, failed = run_experiments(wanted, out, rows_path=path, engine="ray", retries=1)
    assert ([row["experiment"] for row in rows], failed) == (
        [kept.identity, once.identity],
        [broken],
    )
    assert [attempts(out, experiment) for experiment in wanted] == [2, 2, 1]
    assert read_rows(path) == rows
    assert (rows[1]["attempts"], rows[1]["threads"], rows[1]["seed"]) == (2, "1", 1)
    assert "exit code 3" in capsys.readouterr().out


def test_training_curves_are_means_of_what_was_logged(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as log:
        for step in range(120):
            log.add_scalar("Train Metrics Dict/psnr", step / 10, step)
        for step in (0, 50, 100):
            log.add_scalar("Train Metrics Dict/kept", 1 - step / 200, step)
        log.add_scalar("Train Loss", 1.0, 0)
    curves = training_curves(tmp_path)
    assert set(curves) == {"psnr", "kept"}
    assert curves["kept"] == [[0, 1.0], [50, 0.75], [100, 0.5]]
    # Forty means of three each: steps 0, 1, 2; 3, 4, 5; …
    assert [step for step, _ in curves["psnr"]] == [3 * part + 1 for part in range(40)]
    assert [value for _, value in curves["psnr"]] == pytest.approx(
        [(3 * part + 1) / 10 for part in range(40)]
    )


def test_a_run_that_logged_nothing_has_no_curves(tmp_path):
    assert training_curves(tmp_path) == {}


@pytest.fixture(scope="module")
def trained(capture, tmp_path_factory) -> Path:
    """The config.yml of a run."""
    config = make_tiny_config(capture, tmp_path_factory.mktemp("run"), steps=30)
    config.save_config()
    torch.manual_seed(0)
    trainer = config.setup()
    trainer.setup("test")
    trainer.train()
    return config.get_base_dir() / "config.yml"


@pytest.fixture
def ns_train(trained, monkeypatch):
    """Has trained already; its time and command are made up. What flags it was given."""
    seen = []

    def train(preset, data, output_dir, flags):
        seen.append(flags)
        return trained, 15.0, f"ns-train --data {data} {output_dir}"

    monkeypatch.setattr(experiments, "train", train)
    return seen


@pytest.mark.usefixtures("one_thread")
def test_one_training_is_exported_in_many_ways(ns_train, capture, tmp_path):
    exports = {  # each of them starts from what was trained
        "coarse": {"allowed-loss": 0.5},
        "few": {"keep": 0.05},
        "range": {},
        "paper": {"profile": "paper"},
    }
    paper = ({"scene": "s", "psnr": 33.5}, {"megabytes": 0.5})
    preset = dataclasses.replace(PRESET, exports=exports, threads=1, paper=paper)
    wanted = make("v", preset=preset, place={"a.b": 2}, data=str(capture), seed=7, steps=30)
    found = wanted.run(tmp_path / "out")
    assert ns_train == [
        ["--machine.seed", "7", "--machine.device-type", "cpu", "--max-num-iterations", "30"]
    ]
    assert [row["export"] for row in found] == list(exports)
    for row in found:
        assert (row["experiment"], row["preset"], row["variant"]) == (wanted.identity, "p", "v")
        assert (row["place"], row["scene"], row["seed"]) == ({"a.b": 2}, "s", 7)
        assert (row["paper"], row["paper_mean"]) == ({"psnr": 33.5}, {"megabytes": 0.5})
        assert (row["steps"], row["steps_per_second"], row["views"]) == (30, 2.0, 3)
        assert row["command"] == "ns-train --data DATA OUTPUT"
        assert row["configuration"]["pipeline.model.levels"] == 2
        assert str(tmp_path) not in json.dumps(row) and str(capture) not in json.dumps(row)
        folder = tmp_path / "out" / row["export"]
        assert row["bytes"] == (folder / "scene.mwnf").stat().st_size
        assert Image.open(folder / "side_by_side.png").size > (3 * 24, 24)
        assert (row["integers_equal"], row["psnr_before"]) == (True, found[0]["psnr_before"])
    rows = {row["export"]: row for row in found}
    for name in ("range", "paper"):
        assert rows[name]["psnr_after"] == pytest.approx(rows[name]["psnr_before"], abs=1e-3)
    assert rows["paper"]["bytes"] > rows["range"]["bytes"] > rows["coarse"]["bytes"]
    assert 0 <= rows["range"]["psnr_after"] - rows["coarse"]["psnr_after"] <= 0.5 + 1e-3
    assert rows["few"]["dropped"] >= 0.95 > rows["range"]["dropped"]
    assert {row["profile"] for row in found} == {"range", "paper"}


@pytest.mark.usefixtures("one_thread")
def test_one_export_without_a_name_lies_in_the_folder_itself(ns_train, capture, tmp_path):
    rows, (description,) = experiments.run_preset(PRESET, capture, tmp_path / "out", num_views=1)
    (row,) = rows
    assert (row["export"], row["views"], row["bytes"]) == ("", 1, description.num_bytes)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"scene.mwnf", "side_by_side.png", "decoded"}


@pytest.mark.usefixtures("one_thread")
def test_pictures_compare_views_from_first_to_last(trained, capture, tmp_path, monkeypatch):
    run = open_run(trained, capture)
    seen = []
    monkeypatch.setattr(
        pictures, "side_by_side", lambda rows, labels, path, scale: seen.append(rows) or path
    )
    assert experiments.compare_with_photo(run, tmp_path / "a.png", 2) == tmp_path / "a.png"
    dataset = run.pipeline.datamanager.eval_dataset
    (rows,) = seen
    assert len(dataset) == 3
    for (photo, rendered, difference), index in zip(rows, (0, 2), strict=True):
        image = dataset[index]["image"]
        if image.shape[-1] == 4:
            alpha = image[..., 3:]
            image = image[..., :3] * alpha + (1 - alpha)  # on white, as the scene is trained
        np.testing.assert_allclose(photo, image, atol=1e-6)
        camera = dataset.cameras[index : index + 1]
        expected = run.model.get_outputs_for_camera(camera)["rgb"].numpy()
        np.testing.assert_array_equal(rendered, expected)
        np.testing.assert_allclose(
            difference, np.clip(5 * np.abs(photo - rendered), 0, 1), atol=1e-6
        )
