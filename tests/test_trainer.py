"""Interruption at any moment, full disks, damaged checkpoints and losses gone astray."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from nerfstudio.engine.trainer import Trainer
from nerfstudio.scripts.train import _set_random_seed
from nerfstudio.utils import comms
from nerfstudio.utils.eval_utils import eval_setup

from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.trainer import TrainingError, WaveletTrainer

BIN = Path(sys.executable).parent
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def at_step(trainer, step: int, do) -> None:
    """Calls ``do()`` before a step's iteration."""
    original = trainer.train_iteration

    def train_iteration(now: int):
        if now == step:
            do()
        return original(now)

    trainer.train_iteration = train_iteration


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.ckpt"))


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def spawn():
    """Runs a function of this module in a process that starts at once, and may be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["masked_wavelet_nerf.method", "nerfstudio.scripts.train"])
    started = []

    def run(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Also where the tests themselves run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- killed ---------------------------------------------------------------------------------------


def train_and_die(config_path: Path, moment: str) -> None:
    """Trains a run; kills itself at a moment of its second save."""
    config = yaml.load(config_path.read_text(), Loader=yaml.Loader)
    _set_random_seed(config.machine.seed)
    trainer = config.setup()
    trainer.setup("test")
    fsync, replace = os.fsync, Path.replace

    def dying_fsync(descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if moment == "half written" and is_file:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        if is_file == (moment != "renamed"):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def dying_replace(self, target):
        os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        if moment == "not yet renamed":
            Path.replace = dying_replace
        else:
            os.fsync = dying_fsync

    at_step(trainer, 10, arm)
    trainer.train()
    Path.replace = replace


@pytest.mark.parametrize(
    ("moment", "last"),
    [("half written", 5), ("written", 5), ("not yet renamed", 5), ("renamed", 10)],
)
def test_killed_while_saving_loses_only_the_steps_since_the_last_save(
    tiny_config, train, spawn, moment, last
):
    config = tiny_config("killed", steps=14)
    config.steps_per_save = 5
    config.save_config()
    config_path = config.get_base_dir() / "config.yml"
    process = spawn(train_and_die, config_path, moment)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL

    folder = config.get_checkpoint_dir()
    assert steps_in(folder)[-1] == last
    # What the killed save leaves is no checkpoint to nerfstudio, which parses every name.
    assert (folder / "step--1.tmp").exists() == (moment != "renamed")
    assert eval_setup(config_path)[3] == last

    rest = tiny_config("killed", steps=13 - last)
    rest.load_dir = folder
    _, tail = train(rest)
    assert sorted(tail) == list(range(last + 1, 14))
    assert os.listdir(folder) == ["step-000000013.ckpt"]


def save_forever(config_path: Path) -> None:
    config = yaml.load(config_path.read_text(), Loader=yaml.Loader)
    trainer = config.setup()
    trainer.setup("test")
    for step in range(10**9):
        trainer.save_checkpoint(step)


def test_killed_at_any_moment_the_run_opens(tiny_config, spawn):
    for delay in (0.0, 0.013, 0.05, 0.11):
        config = tiny_config(f"killed-{delay}")
        config.save_config()
        folder = config.get_checkpoint_dir()
        process = spawn(save_forever, config.get_base_dir() / "config.yml")
        deadline = time.monotonic() + 120
        while not steps_in(folder) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.join()
        last = steps_in(folder)[-1]
        assert eval_setup(config.get_base_dir() / "config.yml")[3] == last


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [4, 8], ids=["plain", "upsampling"])
def test_a_signal_ends_the_run_after_its_step_which_is_saved(
    tiny_config, start, train, capsys, number, stop
):
    handler = signal.getsignal(number)
    _, whole = train(tiny_config("whole"))
    trainer = start(tiny_config("stopped"))
    at_step(trainer, stop, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ending:
        trainer.train()
    assert ending.value.code == 128 + number
    assert signal.getsignal(number) == handler
    assert steps_in(trainer.checkpoint_dir) == [stop]
    output = capsys.readouterr().out
    assert f"Stopped after step {stop}, which is saved." in output
    left = 19 - stop
    flags = f"--load-dir {trainer.checkpoint_dir} --max-num-iterations {left}"
    assert f"ns-train masked-wavelet-bounded {flags}\n" in output  # on one line, to be copied

    rest = tiny_config("rest", steps=left)
    rest.load_dir = trainer.checkpoint_dir
    _, tail = train(rest)
    assert sorted(tail) == list(range(stop + 1, 20))
    for step, loss in tail.items():
        assert loss == pytest.approx(whole[step], rel=1e-5), step


def test_ctrl_c_again_stops_at_once_without_saving(tiny_config, start):
    trainer = start(tiny_config())

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # job schedulers repeat it: no reason to hurry
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    at_step(trainer, 3, twice)
    with pytest.raises(SystemExit) as ending:
        trainer.train()
    assert ending.value.code == 130
    assert not trainer.checkpoint_dir.exists()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_signal_does_not_wait_for_an_evaluation(tiny_config, start, monkeypatch, when):
    config = tiny_config()
    config.steps_per_eval_all_images = 6
    trainer = start(config)

    def evaluate(step: int):
        if when == "meanwhile":
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    if when == "before":
        at_step(trainer, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(trainer.pipeline, "get_average_eval_image_metrics", evaluate)
    with pytest.raises(SystemExit) as ending:
        trainer.train()
    assert ending.value.code == 143
    assert steps_in(trainer.checkpoint_dir) == [6]


def test_a_signal_ends_a_paused_run(tiny_config, start):
    trainer = start(tiny_config())

    def pause() -> None:
        trainer.training_state = "paused"
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        unpause.start()

    unpause = threading.Timer(20, setattr, (trainer, "training_state", "training"))

    at_step(trainer, 3, pause)
    with pytest.raises(SystemExit) as ending:
        trainer.train()
    unpause.cancel()
    assert ending.value.code == 143
    assert steps_in(trainer.checkpoint_dir) == [3]


def test_an_ignored_signal_stays_ignored(tiny_config, start):
    trainer = start(tiny_config(steps=6))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps_in(trainer.checkpoint_dir) == [5]


def test_training_beside_the_main_thread_leaves_signals_alone(tiny_config, start):
    trainer = start(tiny_config(steps=4))
    handlers = []
    at_step(trainer, 2, lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
    assert steps_in(trainer.checkpoint_dir) == [3]


def test_told_to_stop_nerfstudios_way_the_step_is_not_miscounted(tiny_config, start):
    trainer = start(tiny_config())
    at_step(trainer, 3, trainer.shutdown)
    trainer.train()
    assert steps_in(trainer.checkpoint_dir) == [3]


# --- saves that fail ------------------------------------------------------------------------------


def fill_disk(trainer) -> None:
    """The next save meets a real ENOSPC."""
    (trainer.checkpoint_dir / "step--1.tmp").symlink_to("/dev/full")


@pytest.fixture
def saving(tiny_config, start):
    """A trainer that saves at steps 5, 10 and at the end, 12; planes of one size."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    config = tiny_config(steps=13, upsample_steps=(), occupancy_steps=())
    config.steps_per_save = 5
    return start(config)


def test_a_full_disk_is_reported_and_the_next_save_tries_again(saving, capsys):
    seen = []
    at_step(saving, 8, lambda: fill_disk(saving))
    at_step(saving, 11, lambda: seen.extend(os.listdir(saving.checkpoint_dir)))
    saving.train()
    assert seen == ["step-000000005.ckpt"]  # neither lost nor a stump beside it
    assert os.listdir(saving.checkpoint_dir) == ["step-000000012.ckpt"]
    output = words(capsys.readouterr().out)
    assert f"{saving.checkpoint_dir}/step-000000010.ckpt: cannot be saved" in output
    assert "No space left on device" in output
    assert "Training goes on; the next save tries again." in output
    (needed,) = re.findall(r"It takes ([\d,]+) bytes; [\d,]+ are free", output)
    size = (saving.checkpoint_dir / "step-000000012.ckpt").stat().st_size
    assert int(needed.replace(",", "")) == pytest.approx(size, rel=0.01)


def test_a_disk_that_is_full_at_the_end_is_an_error(saving):
    at_step(saving, 12, lambda: fill_disk(saving))
    with pytest.raises(UserError, match=r"step-000000012.ckpt: cannot be saved.*No space left"):
        saving.train()
    assert os.listdir(saving.checkpoint_dir) == ["step-000000010.ckpt"]
    assert torch.load(saving.checkpoint_dir / "step-000000010.ckpt")["step"] == 10


def test_a_disk_that_is_full_when_stopped_is_an_error(saving):
    def stop() -> None:
        fill_disk(saving)
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(saving, 7, stop)
    with pytest.raises(UserError, match=r"step-000000007.ckpt: cannot be saved"):
        saving.train()
    assert os.listdir(saving.checkpoint_dir) == ["step-000000005.ckpt"]


def test_every_checkpoint_is_kept_where_asked(tiny_config, train):
    config = tiny_config(steps=12)
    config.steps_per_save, config.save_only_latest_checkpoint = 5, False
    trainer, _ = train(config)
    assert steps_in(trainer.checkpoint_dir) == [5, 10, 11]


def test_other_processes_do_not_save(tiny_config, start, monkeypatch):
    trainer = start(tiny_config())
    monkeypatch.setattr(comms, "is_main_process", lambda: False)
    trainer.save_checkpoint(0)
    assert not trainer.checkpoint_dir.exists()


# --- checkpoints that cannot be read --------------------------------------------------------------


@pytest.fixture
def two_saves(tiny_config, train) -> Path:
    """The folder of checkpoints of steps 5 and 7."""
    config = tiny_config("first", steps=8)
    config.steps_per_save, config.save_only_latest_checkpoint = 5, False
    trainer, _ = train(config)
    assert steps_in(trainer.checkpoint_dir) == [5, 7]
    return trainer.checkpoint_dir


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(bytes(5000))],
    ids=["cut", "empty", "zeros"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two_saves, tiny_config, start, capsys, damage
):
    damage(two_saves / "step-000000007.ckpt")
    (two_saves / "step--1.tmp").write_bytes(b"of a killed save")
    config = tiny_config("rest")
    config.load_dir = two_saves
    trainer = start(config)
    assert trainer._start_step == 6
    expected = torch.load(two_saves / "step-000000005.ckpt")["pipeline"]
    for name, value in trainer.pipeline.state_dict().items():  # some are nan until measured
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)
    output = words(capsys.readouterr().out)
    assert "step-000000007.ckpt: cannot be read" in output
    assert "going on from step 5 instead" in output
    assert config.load_step is None


def test_nothing_to_resume_from_names_every_file(two_saves, tiny_config, start, tmp_path):
    for path in two_saves.iterdir():
        cut(path)
    config = tiny_config("rest")
    config.load_dir = two_saves
    with pytest.raises(TrainingError, match=r"(?s)000007.ckpt: cannot.*000005.ckpt: cannot"):
        start(config)
    config.load_dir = tmp_path
    with pytest.raises(UserError, match="expected a run's folder nerfstudio_models"):
        start(config)


def test_a_capture_at_fault_ends_training_with_its_message(tiny_config, start, tmp_path):
    config = tiny_config()
    manager = config.pipeline.datamanager
    manager.data = manager.dataparser.data = tmp_path / "gone"
    with pytest.raises(SystemExit) as caught:
        start(config)
    assert "gone: no such capture; expected a folder" in str(caught.value.code)


# --- losses that are not finite -------------------------------------------------------------------


def poison(trainer, step: int, what: str) -> None:
    """Makes pixels of one photo, or what is rendered of them, not a number at a step."""
    manager, model = trainer.pipeline.datamanager, trainer.pipeline.model
    next_train, get_outputs = manager.next_train, model.get_outputs

    def poisoned_outputs(rays):
        outputs = get_outputs(rays)
        if trainer.step == step:
            of_photo = rays.camera_indices == 3
            outputs["rgb"] = outputs["rgb"].masked_fill(of_photo, torch.nan)
        return outputs

    def poisoned(now: int):
        rays, batch = next_train(now)
        if now == step:
            batch["image"][batch["indices"][:, 0] == 3] = torch.nan
        return rays, batch

    if what == "photo":
        manager.next_train = poisoned
    else:
        model.get_outputs = poisoned_outputs


def lost(tiny_config, start, prepare, every: int | None = None):
    """Trains, saving at step 5, until the loss is lost; returns trainer and message."""
    config = tiny_config(steps=40)
    config.steps_per_save = 5
    trainer = start(config)
    if every is not None:
        trainer._watch.every = every
    prepare(trainer)
    with pytest.raises(UserError) as error:
        trainer.train()
    assert os.listdir(trainer.checkpoint_dir) == ["step-000000005.ckpt"]
    saved = torch.load(trainer.checkpoint_dir / "step-000000005.ckpt")
    for name, _ in trainer.pipeline.named_parameters():
        assert saved["pipeline"][name].isfinite().all(), name
    assert f"{trainer.checkpoint_dir}/step-000000005.ckpt" in str(error.value)
    return trainer, str(error.value)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_parameters(
    tiny_config, start
):
    before = {}

    def prepare(trainer) -> None:
        poison(trainer, 7, "photo")
        parameters = trainer.pipeline.named_parameters
        at_step(trainer, 7, lambda: before.update({k: v.detach().clone() for k, v in parameters()}))

    trainer, message = lost(tiny_config, start, prepare)
    assert message.startswith("step 7: the loss is not finite: rgb_loss = nan\n")
    assert "mask_loss" not in message
    assert len(before) > 10
    for name, value in trainer.pipeline.named_parameters():
        assert torch.equal(value, before[name]), name
    # All of the batch's 8 photos: five by name, most frequent first.
    found = re.findall(r"(r_\d\.png) \((\d+) rays\)", message)
    counts = [int(count) for _, count in found]
    assert len(found) == len(set(found)) == 5
    assert counts == sorted(counts, reverse=True) and 96 * 5 / 8 < sum(counts) < 96
    assert "and 3 more" in message
    for remedy in ("--optimizers.grids.optimizer.lr", "mwnerf check CAPTURE"):
        assert remedy in message
    assert "mixed-precision" not in message  # is off
    trainer.mixed_precision = True
    assert "--mixed-precision False" in trainer._lost(7, "", None)


def test_photos_of_lost_rays_are_named_alone(tiny_config, start):
    trainer, message = lost(tiny_config, start, lambda trainer: poison(trainer, 7, "rays"))
    photo = trainer.pipeline.datamanager.train_dataset.image_filenames[3].name
    rays = int((trainer._watch.last.photos == 3).sum())
    assert f"Photos whose rays were rendered as not finite: {photo} ({rays} rays).\n" in message


def test_where_losses_are_looked_at_together_the_first_bad_step_is_named(tiny_config, start):
    # As on a GPU: the parameters are lost by then, and no save may hold them.
    trainer, message = lost(
        tiny_config, start, lambda trainer: poison(trainer, 7, "photo"), every=50
    )
    assert trainer.step == 10  # found by the save
    assert message.startswith("step 7: the loss is not finite: rgb_loss = nan\n")
    trainer, message = lost(
        tiny_config, start, lambda trainer: poison(trainer, 7, "photo"), every=3
    )
    assert trainer.step == 8  # found by itself, with steps 6 to 8
    assert message.startswith("step 7:")


def test_lost_parameters_are_not_saved(tiny_config, start):
    def prepare(trainer) -> None:
        weight = trainer.pipeline.model.field.networks()["appearance_map.weight"]

        def lose() -> None:
            weight.register_hook(lambda gradient: gradient * torch.nan)

        at_step(trainer, 10, lose)

    _, message = lost(tiny_config, start, prepare)
    assert message.startswith("step 10: parameters are not finite: _model.field.")
    assert "Photos of its batch: r_" in message


# --- old runs, and nerfstudio's commands ----------------------------------------------------------


def test_runs_of_nerfstudios_trainer_open_and_resume(tiny_config, start):
    config = tiny_config("old", steps=6)
    config._target = Trainer
    config.save_config()
    old = start(config)
    old.train()
    assert type(old) is Trainer
    assert eval_setup(config.get_base_dir() / "config.yml")[3] == 5
    rest = tiny_config("rest", steps=2)
    rest.load_dir = old.checkpoint_dir
    resumed = start(rest)
    assert isinstance(resumed, WaveletTrainer) and resumed._start_step == 6
    resumed.train()
    # And back: both write the same.
    back = tiny_config("back", steps=2)
    back._target, back.load_dir = Trainer, resumed.checkpoint_dir
    assert start(back)._start_step == 8
    one, other = (
        torch.load(next(trainer.checkpoint_dir.glob("*.ckpt"))) for trainer in (old, resumed)
    )
    assert one.keys() == other.keys()
    assert one["pipeline"].keys() == other["pipeline"].keys()


FLAGS = shlex.split("""
    --machine.device-type cpu --vis tensorboard --timestamp 0 --steps-per-save 1000000
    --pipeline.datamanager.train-num-rays-per-batch 64
    --pipeline.model.initial-resolution 8 --pipeline.model.final-resolution 8
    --pipeline.model.levels 1 --pipeline.model.hidden-dim 8
    --pipeline.model.num-density-components 2 --pipeline.model.num-appearance-components 2
""")


def command(capture: Path, folder: Path, *more: str) -> list[str]:
    places = ["--data", str(capture), "--output-dir", str(folder)]
    return ["ns-train", "masked-wavelet-bounded", *places, *FLAGS, *more]


def ns_train(arguments: list[str], output) -> subprocess.Popen:
    return subprocess.Popen(
        [str(BIN / arguments[0]), *arguments[1:]],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
    )


def test_ns_train_stops_on_ctrl_c_resumes_as_it_says_and_names_a_lost_loss(capture, tmp_path):
    folder, log = tmp_path / "a folder", tmp_path / "log"
    arguments = command(capture, folder, "--max-num-iterations=100000", "blender-data")
    with log.open("w") as output:
        process = ns_train(arguments, output)
        deadline = time.monotonic() + 240
        while not list(folder.rglob("dataparser_transforms.json")):  # written as training begins
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text
    (models,) = folder.rglob("nerfstudio_models")
    (stop,) = steps_in(models)
    found = re.search(rf"Stopped after step {stop}, which is saved. To resume: (.*)", text)
    resume = shlex.split(found[1])
    assert resume[2:6] == ["--load-dir", str(models), "--max-num-iterations", str(99999 - stop)]
    assert resume.count("--max-num-iterations") == 1 and "blender-data" in resume
    # An infinite λ from there on: the resumed run ends at once, and says why.
    resume[6:6] = ["--pipeline.model.mask-weight", "inf"]
    with log.open("w") as output:
        assert ns_train(resume, output).wait(240) == 1, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text
    assert f"\nstep {stop + 1}: the loss is not finite: mask_loss = inf\nPhotos of its" in text
    assert text.endswith(f"The last good checkpoint stays: {models}/step-{stop:09d}.ckpt\n")
    assert steps_in(models) == [stop]
