"""``mwnerf peers``: several methods on one capture and one machine, one by one, as a table.

Ours is trained as its preset says. The peers are nerfstudio's own methods with their own optimisers
and losses, and with what a preset can say for them: capture and data parser, steps, rays per step,
background, seed, threads, chunk of rays in rendering. Every learning rate decays to the method's
own last value in the preset's number of steps. Our data manager feeds them, in the training
process, as it feeds ours: the same mended capture. No mixed precision, no evaluations of
nerfstudio's own on the way. In bounded scenes no camera optimisers, and beyond that:

tensorf   Start and end resolution, upsampling steps, components and appearance features are the
          preset's. Rays run through the scene box, as ours do: the model takes no near and far.
          The decay of its grids' learning rate starts anew at each upsampling, as it always does.
nerfacto  What nerfstudio's benchmark script sets for Blender scenes: near and far (the preset's), a
          uniform first sampler, no contraction, no distortion loss, no average appearance. And the
          torch implementation of its hash grids, since tiny-cuda-nn may not be there.

Any other installed method that trains on rays of an image data manager can be named, too (K-Planes'
plugin: --methods kplanes): all but what every peer takes over is its own.

In unbounded scenes nerfacto alone, which is made for them: all but steps, rays and the torch
implementation is its own, background and camera optimiser included.

``bytes`` is what one must send so that somebody else can render. For ours it is the exported file,
and PSNR and rendering speed are those of the decoded file. nerfstudio has no file format for the
peers: theirs are the parameters and buffers that rendering needs, four bytes (float32) each,
without cameras. They are counted as the model holds them: nerfacto's torch hash grids give coarse
levels a full table too, and about a quarter of its bytes is never read.

Clocks: training runs from the first step to the last; reading the capture and building the model
before it (``setup_seconds``), and evaluations, are not counted, what the first step compiles is.
Rendering is ``get_outputs_for_camera`` alone. ``peak_bytes`` is the most resident memory of the
method's process until training and its evaluations are done, libraries included.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.models.base_model import Model
from nerfstudio.models.nerfacto import NerfactoModelConfig
from nerfstudio.models.tensorf import TensoRFModelConfig
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table

import masked_wavelet_codec as codec
from masked_wavelet_nerf import __version__
from masked_wavelet_nerf.clock import device_name, now, peak_bytes
from masked_wavelet_nerf.config import MaskedWaveletModelConfig
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.presets import Preset, load_preset
from masked_wavelet_nerf.runs import open_run, write_run

_NEVER = 10**9
"""A step that no training reaches."""


class PeersError(UserError):
    """A comparison cannot be started, or the training of a method failed."""


@dataclass
class Peers:
    """Train several methods on the same capture, one after the other, and compare them.

    The peers are nerfstudio's methods, in the setting of the preset where it applies to them; their
    bytes are parameters and buffers as float32, ours the exported file. Every method has a process
    of its own. Times are of training alone, without evaluations.
    """

    preset: Annotated[Path, tyro.conf.Positional]
    """TOML file under configs/."""
    data: Path
    """Folder of the capture."""
    methods: tuple[str, ...] | None = None
    """What to train, in this order: the preset's own method, tensorf, nerfacto (those of them that
    can train on such a scene if not given), or any installed method that trains on rays, with its
    own settings: kplanes, where K-Planes' plugin is installed."""
    max_minutes: float = 30.0
    """Training of a method stops after so many minutes, evaluations not counted."""
    target_psnr: float = 30.0
    """Report when the test PSNR first reached so many dB."""
    eval_every: int = 250
    """Steps between two evaluations: how finely that time is known."""
    eval_views: int = 25
    """Evaluate so many test views, evenly spread; all if there are fewer."""
    seed: int = 42
    """Random seed of every method (--machine.seed)."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    output_dir: Path | None = None
    """Where runs and files go; a temporary folder if not given."""
    json: bool = False
    """Print a row as one line of JSON as soon as its method is done; progress goes to standard
    error."""

    def main(self) -> None:
        """Run, and print the rows."""
        preset = load_preset(self.preset)
        methods = self._checked_methods(preset)
        rows, failed = [], []
        with contextlib.ExitStack() as stack:
            output_dir = self.output_dir
            if output_dir is None:
                output_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for method in methods:
                job = self._job(method, output_dir)
                row = run_in_process(job, preset.num_threads)
                if row is None:
                    failed.append(method)
                    continue
                rows.append(row)
                if self.json:
                    print(json.dumps(row), flush=True)
        if rows and not self.json:
            CONSOLE.print(table(rows))
        if failed:
            raise PeersError(
                f"training failed: {', '.join(failed)}; the messages are above, the rows of the "
                "other methods hold"
            )

    def _checked_methods(self, preset: Preset) -> tuple[str, ...]:
        """What is to be trained; finds what can be found before hours of training."""
        for method in self.methods or ():
            check_method(method, preset)
        if self.methods == ():
            raise PeersError("--methods: none given")
        for name in ("eval_every", "eval_views", "max_minutes"):
            if getattr(self, name) <= 0:
                flag = name.replace("_", "-")
                raise PeersError(f"--{flag} {getattr(self, name)}: expected more than 0")
        if not self.data.exists():
            raise PeersError(f"{self.data}: no such capture")
        ours = our_config(preset, self.data)
        possible = [name for name in _PEERS if name != "tensorf" or not _is_unbounded(ours)]
        methods = self.methods or (preset.method, *possible)
        for method in methods:
            method_config(method, ours)
        return methods

    def _job(self, method: str, output_dir: Path) -> Job:
        return Job(
            preset=str(self.preset),
            data=str(self.data),
            output_dir=str(output_dir),
            method=method,
            max_seconds=60 * self.max_minutes,
            target_psnr=self.target_psnr,
            eval_every=self.eval_every,
            eval_views=self.eval_views,
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True)
class Job:
    """The training of one method, as its process is told of it: JSON-able."""

    preset: str
    data: str
    output_dir: str
    method: str
    max_seconds: float
    target_psnr: float
    eval_every: int
    eval_views: int
    seed: int
    device: str


def check_method(method: str, preset: Preset) -> None:
    """Refuses a method that cannot be compared.

    Raises:
        PeersError: naming the choices.
    """
    choices = (preset.method, *_PEERS)
    if method in choices:
        return
    if method not in all_methods:
        raise PeersError(
            f"unknown method {method!r}; expected some of {', '.join(choices)}, or an installed "
            "method that trains on rays: ns-train --help lists them"
        )
    manager = getattr(getattr(all_methods[method], "pipeline", None), "datamanager", None)
    if not isinstance(manager, VanillaDataManagerConfig):
        raise PeersError(f"{method}: it does not train on rays of photos, so it cannot take ours")


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, for people."""
    first = rows[0]
    result = Table(
        title=f"{first['preset']}: {first['views']} test views, {first['device']}, "
        f"{first['threads']} threads"
    )
    result.add_column("method")
    target = f"s to {first['target_psnr']:g} dB"
    for name in ("steps", "steps/s", "s training", target, "PSNR", "bytes", "rays/s", "peak MB"):
        result.add_column(name, justify="right")
    for row in rows:
        steps, reached = f"{row['steps']:,}", row["seconds_to_target"]
        if row["stopped"] == "time":
            steps += f" of {row['planned_steps']:,}: out of time"
        result.add_row(
            row["method"],
            steps,
            f"{row['steps_per_second']:.3g}",
            f"{row['train_seconds']:,.0f}",
            "not reached" if reached is None else f"{reached:,.0f}",
            f"{row['psnr']:.2f}",
            f"{row['bytes']:,}",
            f"{row['render_rays_per_second']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    return result


# --- configurations -------------------------------------------------------------------------------


def our_config(preset: Preset, data: Path) -> TrainerConfig:
    """The preset's configuration, as ``ns-train`` parses it.

    Raises:
        PeersError: if the preset is not of one of our methods.
    """
    known = all_methods.get(preset.method)
    if not isinstance(getattr(getattr(known, "pipeline", None), "model", None), _OURS):
        raise PeersError(f"{preset.name}: {preset.method!r} is not a method of this package")
    assert isinstance(known, TrainerConfig)
    config = tyro.cli(
        tyro.conf.FlagConversionOff[TrainerConfig],
        default=copy.deepcopy(known),
        args=preset.arguments(data)[1:],
        prog=f"{preset.name}: ns-train {preset.method}",
    )
    config.pipeline.datamanager.data = config.data
    return config


_OURS = MaskedWaveletModelConfig


def _is_unbounded(ours: TrainerConfig) -> bool:
    model = ours.pipeline.model
    assert isinstance(model, _OURS)
    return model.contract


def tensorf_config(ours: TrainerConfig) -> TrainerConfig:
    """Nerfstudio's tensorf in our setting.

    Raises:
        PeersError: if the scene is unbounded.
    """
    if _is_unbounded(ours):
        raise PeersError(
            "tensorf: it has no unbounded scenes; take a preset of masked-wavelet-bounded, or "
            "--methods without it"
        )
    config, settings = _peer_config("tensorf", ours), ours.pipeline.model
    model = config.pipeline.model
    assert isinstance(model, TensoRFModelConfig) and isinstance(settings, _OURS)
    model.init_resolution = settings.initial_resolution
    model.final_resolution = settings.final_resolution
    model.upsampling_iters = tuple(settings.upsample_steps)
    model.num_den_components = settings.num_density_components
    model.num_color_components = settings.num_appearance_components
    model.appearance_dim = settings.appearance_dim
    model.background_color = settings.background_color
    model.camera_optimizer = CameraOptimizerConfig(mode="off")
    return config


def nerfacto_config(ours: TrainerConfig) -> TrainerConfig:
    """Nerfstudio's nerfacto in our setting; see the module's docstring."""
    config, settings = _peer_config("nerfacto", ours), ours.pipeline.model
    model = config.pipeline.model
    assert isinstance(model, NerfactoModelConfig) and isinstance(settings, _OURS)
    model.implementation = "torch"
    if _is_unbounded(ours):
        return config
    model.near_plane, model.far_plane = settings.near_plane, settings.far_plane
    model.background_color = settings.background_color
    model.camera_optimizer = CameraOptimizerConfig(mode="off")
    model.disable_scene_contraction = True
    model.proposal_initial_sampler = "uniform"
    model.distortion_loss_mult = 0.0
    model.use_average_appearance_embedding = False
    return config


def _peer_config(name: str, ours: TrainerConfig) -> TrainerConfig:
    """What every peer takes over."""
    config = copy.deepcopy(all_methods[name])
    assert isinstance(config, TrainerConfig)
    data, steps = ours.pipeline.datamanager, ours.max_num_iterations
    config.pipeline.datamanager = copy.deepcopy(data)
    config.pipeline.model.eval_num_rays_per_chunk = ours.pipeline.model.eval_num_rays_per_chunk
    config.max_num_iterations = steps
    config.mixed_precision = False
    for group in config.optimizers.values():
        if getattr(group["scheduler"], "max_steps", None) is not None:
            group["scheduler"].max_steps = steps
    return config


_PEERS = {"tensorf": tensorf_config, "nerfacto": nerfacto_config}


def method_config(method: str, ours: TrainerConfig) -> TrainerConfig:
    """The configuration of a method that :func:`check_method` lets through."""
    if method == ours.method_name:
        return ours
    return _PEERS[method](ours) if method in _PEERS else _peer_config(method, ours)


def leave_to_caller(config: TrainerConfig) -> None:
    """No logs, viewer, evaluations or checkpoints of nerfstudio's own: whoever steps has others."""
    config.vis = "tensorboard"  # the one that needs neither a network nor a person
    config.logging.local_writer.enable = False
    config.logging.profiler = "none"
    config.steps_per_eval_batch = config.steps_per_eval_image = _NEVER
    config.steps_per_eval_all_images = config.steps_per_save = _NEVER


def _in_this_run(config: TrainerConfig, job: Job) -> TrainerConfig:
    config.output_dir, config.experiment_name = Path(job.output_dir).absolute(), "."
    config.timestamp = "trained"
    config.machine.seed = job.seed
    config.machine.device_type = job.device  # pyright: ignore[reportAttributeAccessIssue]
    config.mixed_precision = False
    leave_to_caller(config)
    return config


# --- the process of one method --------------------------------------------------------------------


def run_in_process(job: Job, threads: int) -> dict[str, Any] | None:
    """Runs a job in a process of its own.

    Returns:
        Its row, or None if it failed; what it printed went to standard error.
    """
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{job.method}.json"
    result.unlink(missing_ok=True)
    limit = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    arguments = [json.dumps(dataclasses.asdict(job)), str(result)]
    finished = subprocess.run(
        [sys.executable, "-m", "masked_wavelet_nerf.peers", *arguments],
        env={**os.environ, **limit},
        stdout=sys.stderr,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if finished.returncode != 0 or not result.is_file():
        return None
    return json.loads(result.read_text("utf8"))


def run_job(job: Job) -> dict[str, Any]:
    """Trains and measures one method in this process.

    Leaves ``output_dir``/METHOD/trained, and for ours METHOD/scene.mwnf and METHOD/decoded.

    Returns:
        The row of results: times in seconds, PSNR in dB.
    """
    preset, data = load_preset(Path(job.preset)), Path(job.data)
    config = _in_this_run(method_config(job.method, our_config(preset, data)), job)
    start = time.perf_counter()
    trainer = _set_up(config)
    setup_seconds = time.perf_counter() - start
    monitor = Monitor(trainer, job)
    monitor.train()
    last, rendered = monitor.curve[-1], monitor.rendered
    peak = peak_bytes()
    on_gpu = torch.cuda.is_available() and job.device == "cuda"
    row = {
        "method": job.method,
        "preset": preset.name,
        "steps": last.steps,
        "planned_steps": config.max_num_iterations,
        "stopped": monitor.stopped,
        "steps_per_second": last.steps / last.seconds,
        "train_seconds": last.seconds,
        "setup_seconds": setup_seconds,
        "target_psnr": job.target_psnr,
        "seconds_to_target": first_reaching(
            ((point.seconds, point.psnr) for point in monitor.curve), job.target_psnr
        ),
        "psnr_trained": last.psnr,
        "psnr": last.psnr,
        "bytes": 0,
        "render_rays_per_second": rendered.rays_per_second,
        "peak_bytes": peak,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "views": rendered.num_views,
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device(job.device)),
        "seed": job.seed,
        "version": __version__,
        "torch": torch.__version__,
        "curve": [dataclasses.astuple(point) for point in monitor.curve],
    }
    if job.method != preset.method:
        row["bytes"] = 4 * count_rendering_values(trainer.pipeline.model)
        return row
    num_bytes, decoded = _send(trainer, last.psnr, job)
    return row | {
        "bytes": num_bytes,
        "psnr": decoded.psnr,
        "render_rays_per_second": decoded.rays_per_second,
    }


def _set_up(config: TrainerConfig) -> Trainer:
    # As ns-train does.
    random.seed(config.machine.seed)
    np.random.seed(config.machine.seed)
    torch.manual_seed(config.machine.seed)
    torch.backends.cudnn.benchmark = True
    config.save_config()
    with _without_lpips():
        trainer = config.setup()
        trainer.setup("test")
    return trainer


@contextlib.contextmanager
def _without_lpips() -> Iterator[None]:
    """Within, nerfstudio's models build no LPIPS: it downloads weights, and is never asked here."""
    from torchmetrics.image import lpip

    class Unused(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()

    original = lpip.LearnedPerceptualImagePatchSimilarity
    lpip.LearnedPerceptualImagePatchSimilarity = Unused  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        lpip.LearnedPerceptualImagePatchSimilarity = original


def _send(trainer: Trainer, psnr: float, job: Job) -> tuple[int, Rendered]:
    """Exports and decodes our run.

    Returns:
        Bytes of the file, and the measurement of what comes out of it.
    """
    data, base = Path(job.data), trainer.config.get_base_dir()
    trainer.save_checkpoint(trainer.step)
    run = open_run(base / "config.yml", data)
    path, description = export_run(run, base.parent / "scene.mwnf", psnr=psnr)
    decoded = open_run(write_run(codec.read(path), base.parent / "decoded", data), data)
    assert decoded.pipeline is not None
    decoded.model.to(job.device)  # nerfstudio opens runs on a GPU wherever there is one
    return description.num_bytes, measure(
        decoded.model, _test_views(decoded.pipeline), job.eval_views
    )


def _test_views(pipeline: Pipeline) -> InputDataset:
    dataset = pipeline.datamanager.eval_dataset  # pyright: ignore[reportAttributeAccessIssue]
    assert dataset is not None
    return dataset


def count_rendering_values(model: torch.nn.Module) -> int:
    """Numbers that rendering with a peer needs: its parameters and buffers.

    Not counted: camera optimiser and metrics, and the appearance of each training image, in whose
    place rendering takes zeros.
    """
    unused = ("camera_optimizer.", "psnr.", "ssim.", "lpips.", "field.embedding_appearance.")
    values = [*model.named_parameters(), *model.named_buffers()]
    return sum(value.numel() for name, value in values if not name.startswith(unused))


# --- training under a clock -----------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """An evaluation during training."""

    steps: int
    """Training steps done."""
    seconds: float
    """Of training, without evaluations."""
    psnr: float
    """dB."""


def first_reaching(points: Iterable[tuple[float, float]], target: float) -> float | None:
    """Seconds until the PSNR first reached the target, where it was looked at; None if never.

    Args:
        points: (seconds of training, PSNR in dB) of evaluations, in order of time.
        target: PSNR in dB.
    """
    return next((seconds for seconds, psnr in points if psnr >= target), None)


class Stopwatch:
    """Time of what runs between :meth:`start` and :meth:`stop`, over several rounds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._earlier = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Goes on counting."""
        self._since = now(self._device)

    def stop(self) -> None:
        """Stops counting."""
        self._earlier = self.seconds(wait=True)
        self._since = None

    def seconds(self, wait: bool = False) -> float:
        """Seconds so far; of a GPU only what it was asked to do, unless waited for."""
        if self._since is None:
            return self._earlier
        return self._earlier + (now(self._device) if wait else time.perf_counter()) - self._since


class _StopTrainingError(Exception):
    """Leaves nerfstudio's training loop."""


class Monitor:
    """Trains, with evaluations that the clock of training leaves out."""

    rendered: Rendered
    """The last evaluation."""
    stopped: Literal["steps", "time"]
    """What ended training: all steps done, or the time was up."""

    def __init__(self, trainer: Trainer, job: Job) -> None:
        self.curve: list[Point] = []
        self._trainer, self._job = trainer, job
        self._watch = Stopwatch(trainer.pipeline.model.device)
        # After the model's own callbacks, whose time counts.
        trainer.callbacks.append(
            TrainingCallback(
                where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
                update_every_num_iters=1,
                func=self._after_step,
            )
        )

    def train(self) -> None:
        """Runs the training loop to its end, or until the time is up; saves no checkpoint."""
        self._watch.start()
        with contextlib.suppress(_StopTrainingError):
            self._trainer.train()

    def _after_step(self, step: int) -> None:
        steps = step + 1
        is_last = steps == self._trainer.config.max_num_iterations
        is_late = self._watch.seconds() >= self._job.max_seconds
        if not (is_last or is_late or steps % self._job.eval_every == 0):
            return
        self._watch.stop()
        pipeline = self._trainer.pipeline
        self.rendered = measure(pipeline.model, _test_views(pipeline), self._job.eval_views)
        self.curve.append(Point(steps, self._watch.seconds(), self.rendered.psnr))
        CONSOLE.log(
            f"{self._job.method}: {steps:,} steps, {self._watch.seconds():.1f} s, "
            f"{self.rendered.psnr:.3f} dB"
        )
        if is_last or is_late:
            self.stopped = "steps" if is_last else "time"
            raise _StopTrainingError
        self._watch.start()


@dataclass(frozen=True)
class Rendered:
    """Means over rendered test views."""

    psnr: float
    """dB."""
    rays_per_second: float
    num_views: int


@torch.no_grad()
def measure(model: Model, dataset: InputDataset, num_views: int) -> Rendered:
    """Renders test views, evenly spread, and measures them; leaves the model's mode as it was."""
    count = min(num_views, len(dataset))
    was_training = model.training
    model.eval()
    watch, num_rays, psnr = Stopwatch(model.device), 0, 0.0
    for index in np.linspace(0, len(dataset) - 1, count).astype(int).tolist():
        camera = dataset.cameras[index : index + 1].to(model.device)
        watch.start()
        outputs = model.get_outputs_for_camera(camera)
        rgb = outputs["rgb" if "rgb" in outputs else "rgb_fine"]
        watch.stop()
        num_rays += rgb[..., 0].numel()
        # Where the parser has not done so, pixels are blended as in nerfstudio's own metrics.
        image = model.renderer_rgb.blend_background(dataset[index]["image"].to(rgb.device))  # pyright: ignore
        error = float(F.mse_loss(rgb.double(), image.double()))
        psnr += (math.inf if error == 0 else -10 * math.log10(error)) / count
    model.train(was_training)
    return Rendered(psnr, num_rays / watch.seconds(), count)


if __name__ == "__main__":  # see run_in_process
    _job, _result = sys.argv[1:]
    Path(_result).write_text(json.dumps(run_job(Job(**json.loads(_job)))), "utf8")
