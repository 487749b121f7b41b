"""Training that survives interruption: whole checkpoints, stops on signals and on lost losses.

nerfstudio writes a checkpoint under its final name, and finds the newest by parsing the name of
everything in the folder, here and in ``ns-eval`` and ``ns-viewer``. So the file under way has a
name that parses as a step below all others.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shlex
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

import masked_wavelet_codec as codec
from masked_wavelet_nerf.datamanager import WaveletDataManager
from masked_wavelet_nerf.errors import FatalError, UserError

_UNFINISHED = "step--1.tmp"
"""Name of the checkpoint under way: step -1 to nerfstudio."""
_STEPS_TOGETHER = 50
"""Steps whose losses are looked at together where looking waits for a GPU."""
_PHOTOS_NAMED = 5


class TrainingError(FatalError):
    """Ends a training; the message names the cause and the remedy."""


class _Interrupted(BaseException):
    """Leaves nerfstudio's loop; nobody's ``except Exception`` may catch it."""


@dataclass(frozen=True)
class WatchedStep:
    """What is known of a training step, still on its device (R rays)."""

    step: int
    losses: dict[str, Tensor]
    rgb: Float[Tensor, "R 3"]
    photos: Int[Tensor, " R"]
    """Index into the training photos, per ray."""


class LossWatch:
    """Finds the first step with a loss that is not finite, looking at ``every`` steps together."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.last: WatchedStep | None = None
        self._unseen: list[WatchedStep] = []

    def add(self, step: WatchedStep) -> bool:
        """Takes note of a step; whether it is time to look."""
        self.last = step
        self._unseen.append(step)
        return len(self._unseen) >= self.every

    def look(self) -> tuple[WatchedStep, list[str]] | None:
        """The first bad step since the last look, and its bad terms; waits for the device once."""
        unseen, self._unseen = self._unseen, []
        terms = [(step, name) for step in unseen for name in step.losses]
        if not terms:
            return None
        finite = torch.stack([step.losses[name].float() for step, name in terms]).isfinite()
        bad = [term for term, good in zip(terms, finite.tolist(), strict=True) if not good]
        if not bad:
            return None
        first = bad[0][0]
        return first, [name for step, name in bad if step is first]


class WaveletTrainer(Trainer):
    """nerfstudio's trainer, see the module's docstring. Any method's: ``_target`` of its config.

    With several processes, signals are left to nerfstudio: processes that stop at different steps
    would wait for each other.
    """

    def __init__(self, config: TrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        super().__init__(config, local_rank, world_size)
        self._watch = LossWatch(1 if self.device == "cpu" else _STEPS_TOGETHER)
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._trained = -1  # the last step that is complete, callbacks included
        self._may_leave = False  # within a step's evaluation
        self._saves_again = False

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Sets everything up.

        Raises:
            TrainingError: if capture, flags or checkpoints do not allow it.
        """
        try:
            super().setup(test_mode)
        except TrainingError:
            raise
        except UserError as error:
            raise TrainingError(str(error)) from error
        self._keep_start()
        self._watch_losses()
        after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
        self.callbacks.append(TrainingCallback(after, self._complete_step, 1))  # as the last one

    def _keep_start(self) -> None:
        """Writes a run that starts from a file so that it can be opened without that file.

        ns-train saves the configuration before the file has settled what the scene is made of.
        """
        pipeline = self.config.pipeline
        if getattr(pipeline.model, "init_from", None) is None:
            return
        cameras, manager = self.base_dir / "cameras.mwnf", self.pipeline.datamanager
        assert isinstance(manager, WaveletDataManager) and manager.stored is not None
        codec.write(cameras, manager.stored.scene)
        saved: Any = copy.deepcopy(self.config)
        saved.pipeline.model.init_from, saved.pipeline.datamanager.scene = None, cameras
        saved.save_config()

    def train(self) -> None:
        """Trains.

        Raises:
            TrainingError: if a loss is not finite, or the last checkpoint cannot be written.
            SystemExit: 130 after SIGINT and 143 after SIGTERM, once the step is saved.
        """
        self._trained, self._signal, self._saves_again = self._start_step - 1, None, True
        with self._handled_signals():
            try:
                super().train()
            except _Interrupted:
                self._stop_early()
            finally:
                self._saves_again = False

    # --- losses -----------------------------------------------------------------------------------

    def _watch_losses(self) -> None:
        # Where batch and losses meet, before the backward pass: on a CPU, where looking is free,
        # nothing that is not finite reaches the parameters.
        model = self.pipeline.model
        get_loss_dict = model.get_loss_dict

        def watched(outputs, batch, metrics_dict=None) -> dict[str, Tensor]:
            losses = get_loss_dict(outputs, batch, metrics_dict)
            if model.training:
                detached = {name: loss.detach() for name, loss in losses.items()}
                photos = batch["indices"][:, 0]
                step = WatchedStep(self.step, detached, outputs["rgb"].detach(), photos)
                if self._watch.add(step):
                    self._check_losses()
            return losses

        model.get_loss_dict = watched

    def _check_losses(self) -> None:
        found = self._watch.look()
        if found is not None:
            step, terms = found
            named = ", ".join(f"{term} = {float(step.losses[term])}" for term in terms)
            raise TrainingError(self._lost(step.step, f"the loss is not finite: {named}", step))

    def _check_parameters(self, step: int) -> None:
        parameters = dict(self.pipeline.named_parameters())
        finite = torch.stack([p.detach().isfinite().all() for p in parameters.values()]).tolist()
        bad = [name for name, good in zip(parameters, finite, strict=True) if not good]
        if bad:
            what = f"parameters are not finite: {', '.join(bad)}"
            raise TrainingError(self._lost(step, what, self._watch.last))

    def _lost(self, step: int, what: str, seen: WatchedStep | None) -> str:
        lines = [f"step {step}: {what}"]
        if seen is not None:
            lines.append(self._photos_of(seen))
        precision = "no mixed precision (--mixed-precision False), " if self.mixed_precision else ""
        lines.append(
            f"Try {precision}`mwnerf check CAPTURE`, or lower learning rates from the start "
            "(--optimizers.grids.optimizer.lr, --optimizers.networks.optimizer.lr): a resumed run "
            "keeps its own."
        )
        kept = sorted(self.checkpoint_dir.glob("step-*.ckpt"))
        lines.append(f"The last good checkpoint stays: {kept[-1]}" if kept else "Nothing is saved.")
        return "\n".join(lines)

    def _photos_of(self, seen: WatchedStep) -> str:
        lost = ~seen.rgb.isfinite().all(dim=-1)
        photos = seen.photos.to(lost.device)
        some = bool(lost.any())
        counts = Counter((photos[lost] if some else photos).tolist()).most_common()
        assert self.pipeline.datamanager.train_dataset is not None
        files = self.pipeline.datamanager.train_dataset.image_filenames
        common = os.path.commonpath([file.parent for file in files])  # names repeat across folders
        named = [f"{os.path.relpath(files[index], common)} ({n} rays)" for index, n in counts]
        if len(named) > _PHOTOS_NAMED:
            named[_PHOTOS_NAMED:] = [f"and {len(named) - _PHOTOS_NAMED} more"]
        which = "whose rays were rendered as not finite" if some else "of its batch"
        return f"Photos {which}: {', '.join(named)}."

    # --- checkpoints ------------------------------------------------------------------------------

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint; the one before is deleted only when this one is safely on disk.

        A failure is reported while training goes on, as a later save may succeed.

        Raises:
            TrainingError: if a loss or a parameter is not finite, or, where no later save is to
                come, if the file cannot be written. Older checkpoints stay.
        """
        self._check_losses()
        self._check_parameters(step)
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        state = io.BytesIO()  # in memory first, to know how much it is
        checkpoint = {
            "step": step,
            "pipeline": self.pipeline.state_dict(),
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.optimizers.items()},
            "schedulers": {k: v.state_dict() for k, v in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
        }
        torch.save(checkpoint, state)
        try:
            _replace_durably(path, state.getbuffer())
            if self.config.save_only_latest_checkpoint:
                for old in self.checkpoint_dir.glob("*.ckpt"):
                    if old != path:
                        old.unlink(missing_ok=True)
        except OSError as error:
            message = (
                f"{path}: cannot be saved: {error}. It takes {state.tell():,} bytes; "
                f"{_free_bytes(path):,} are free. Checkpoints from before stay."
            )
            if not self._saves_again:
                raise TrainingError(message) from error
            _say(f"{message} Training goes on; the next save tries again.")

    def _load_checkpoint(self) -> None:
        config = self.config
        if config.load_dir is None or config.load_step is not None:
            super()._load_checkpoint()
            return
        config.load_step = _newest_readable(config.load_dir)
        try:
            super()._load_checkpoint()
        finally:
            config.load_step = None

    # --- signals ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _handled_signals(self) -> Iterator[None]:
        if threading.current_thread() is threading.main_thread() and self.world_size == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # as nohup and shells' background jobs ask
                    self._handlers[number] = before
                    signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            if number == signal.SIGINT:
                raise SystemExit(128 + number)
            return
        self._signal = number
        self.stop_training = True
        # Not through the console, which may be printing at this very moment.
        os.write(2, b"\nStopping after this step, which is saved; ctrl+c stops at once.\n")
        if self._may_leave:
            raise _Interrupted

    def _complete_step(self, step: int) -> None:
        self._trained = step
        if self._signal is not None:
            raise _Interrupted

    def eval_iteration(self, step: int) -> None:
        """Evaluates; a signal does not wait for the end, which may be minutes away."""
        self._may_leave = True
        try:
            super().eval_iteration(step)
        finally:
            self._may_leave = False

    def _after_train(self) -> None:
        if self._signal is not None:
            raise _Interrupted
        if self._trained >= self._start_step:
            self.step = self._trained  # where nerfstudio was told to stop, it counts one too many
        self._saves_again = False
        super()._after_train()

    def _train_complete_viewer(self) -> None:
        if self._signal is None:
            self._restore_handlers()  # all is saved: ctrl+c ends the viewer as ever
            super()._train_complete_viewer()

    def _stop_early(self) -> None:
        assert self._signal is not None
        self._saves_again = False
        if self._trained >= self._start_step:
            self.save_checkpoint(self._trained)
        writer.write_out_storage()
        _say(self._how_to_resume())
        self.shutdown()
        raise SystemExit(128 + self._signal)

    def _how_to_resume(self) -> str:
        if self._trained < self._start_step:
            return "Stopped before a step was complete: nothing to save."
        left = self._start_step + self.config.max_num_iterations - self._trained - 1
        done = f"Stopped after step {self._trained}, which is saved."
        if left == 0:
            return f"{done} It was the last."
        words = ["ns-train", str(self.config.method_name), "--load-dir", str(self.checkpoint_dir)]
        words += ["--max-num-iterations", str(left)]  # nerfstudio counts from where a run resumes
        if sys.argv[1:2] != words[1:2] or self.config.load_config is not None:
            return f"{done} To resume, with the flags of this run: {shlex.join(words)}"
        words += _without(
            sys.argv[2:], {"load-dir", "max-num-iterations", "load-step", "load-checkpoint"}
        )
        return f"{done} To resume: {shlex.join(words)}"


def _without(arguments: list[str], names: set[str]) -> list[str]:
    """Arguments without the flags of these names and their values."""
    kept, skip = [], False
    for word in arguments:
        name = word[2:].split("=")[0].replace("_", "-") if word.startswith("--") else None
        if not skip and name not in names:
            kept.append(word)
        skip = name in names and "=" not in word
    return kept


def _replace_durably(path: Path, content: memoryview) -> None:
    """Puts a file into place whole, or leaves what is there, even if power fails meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_UNFINISHED)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere, folders cannot be opened
        for folder in (path.parent, path.parent.parent):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free


def _newest_readable(folder: Path) -> int:
    """The highest step whose checkpoint can be read.

    Raises:
        TrainingError: if there is none.
    """
    paths = folder.glob("step-*.ckpt")
    found = {int(path.stem[5:]): path for path in paths if path.stem[5:].isdigit()}
    reasons = []
    for step in sorted(found, reverse=True):
        try:
            torch.load(found[step], map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            reasons.append(f"{found[step]}: cannot be read ({reason})")
            continue
        for message in reasons:
            _say(f"{message}; going on from step {step} instead.")
        return step
    if not found:
        reasons.append(f"{folder}: no step-*.ckpt; expected a run's folder nerfstudio_models")
    raise TrainingError("\n".join(["--load-dir: nothing to resume from.", *reasons]))


def _say(message: str) -> None:
    # Unwrapped, so that paths and commands can be copied.
    CONSOLE.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
