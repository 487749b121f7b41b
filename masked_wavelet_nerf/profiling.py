"""``mwnerf profile``: where the time of one training step and of one rendered frame goes.

Every grid size is measured in a process of its own, on nerfstudio's own trainer and loop. Times are
medians of runs without the profiler; the profiler's shares are scaled to them.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE

from masked_wavelet_nerf import profile_report, tracing
from masked_wavelet_nerf.clock import now
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.floors import Machine, Work, counts_of, measure_machine, work
from masked_wavelet_nerf.profile_report import Measurement, Part, Threading, Timing, Variation
from masked_wavelet_nerf.profile_scene import model_of, run_trainer, stand_in_trainer

FRAME_SIDE = 128
FIRST_PICTURE = (64, 48)
"""Width and height of a viewer's picture while the camera moves."""
WARM_UP_STEPS = 3
THREAD_ROUNDS = 8
"""How often steps change from one number of threads to the next: machines are never the same."""


class ProfileError(UserError):
    """A profile cannot be measured."""


@dataclass(frozen=True)
class Case:
    """What to measure in one process."""

    size: int
    """Voxels per side; of no effect with ``load_config``."""
    rays: int
    device: str
    threads: int | None
    repeats: int
    machine: Machine
    ray_counts: tuple[int, ...] = ()
    """Further numbers of rays, for the step's time alone."""
    step_ratios: tuple[float, ...] = ()
    """Further distances between samples, in voxels, likewise."""
    thread_counts: tuple[int, ...] = ()
    """Numbers of CPU threads to compare."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the model's configuration to change."""
    load_config: Path | None = None
    data: Path | None = None


@dataclass
class Profile:
    """Say where the time of a training step and of a frame goes, and how far it is from the limit.

    Without a run it measures a tube that stands for a trained scene, in a box, with the method's
    own numbers of components.
    """

    sizes: tuple[int, ...] = (64, 128, 224, 304)
    """Voxels per side."""
    rays: int = 1024
    """Rays of a training step."""
    ray_counts: tuple[int, ...] = (256, 1024, 4096)
    """Rays at ``scaling_size`` for the table of scaling."""
    step_ratios: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Distances between samples, in voxels, likewise."""
    scaling_size: int = 128
    """Size at which rays, samples and threads are varied, if it is among the sizes."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to measure."""
    threads: int | None = None
    """CPU threads; torch's own choice if not given."""
    thread_counts: tuple[int, ...] = ()
    """Numbers of CPU threads (1 2, say) between which steps at ``scaling_size`` change in turn."""
    repeats: int = 10
    """Steps and frames that are timed, and as many again under the profiler."""
    load_config: Path | None = None
    """config.yml of a run to profile instead of the tube; sizes are then ignored."""
    data: Path | None = None
    """Folder of that run's capture, if not where it was trained from."""
    json: bool = False
    """Print one JSON object on standard output; progress goes to standard error."""
    markdown: bool = False
    """Print tables in Markdown."""
    figure: Path | None = None
    """Draw cost against grid size, rays and samples into this file (png, svg or pdf)."""

    def main(self) -> None:
        """Measure, and print."""
        self._check()
        threads = self.threads or torch.get_num_threads()
        with contextlib.redirect_stdout(sys.stderr), _threads(threads):
            machine = measure_machine(torch.device(self.device))
            measurements = []
            for case in self._cases(machine):
                what = case.load_config or f"{case.size}³ voxels"
                CONSOLE.log(f"Measuring {what} …")
                measurements.append(measure_apart(case))
        if self.figure is not None:
            profile_report.draw(measurements, self.figure)
        if self.json:
            row = {
                "machine": dataclasses.asdict(machine),
                "device": self.device,
                "threads": threads,
                "torch": torch.__version__,
                "measurements": [dataclasses.asdict(m) for m in measurements],
            }
            print(json.dumps(row))
            return
        for table in profile_report.tables(machine, self.device, threads, measurements):
            if self.markdown:
                print(profile_report.markdown(table), end="\n\n")
            else:
                CONSOLE.print(profile_report.rich_table(table))

    def _check(self) -> None:
        for name in ("rays", "repeats", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ProfileError(f"--{name}: expected at least 1, got {value}")
        if self.load_config is None and min(self.sizes, default=0) < 8:
            raise ProfileError(f"--sizes: expected at least 8 voxels, got {self.sizes}")
        if min(self.thread_counts, default=1) < 1:
            raise ProfileError(f"--thread-counts: expected at least 1, got {self.thread_counts}")
        if min(self.ray_counts, default=1) < 1 or min(self.step_ratios, default=1) <= 0:
            raise ProfileError("--ray-counts and --step-ratios: expected numbers above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ProfileError("--device cuda: torch finds no GPU; use --device cpu")

    def _cases(self, machine: Machine) -> list[Case]:
        common = {
            "rays": self.rays,
            "device": self.device,
            "threads": self.threads,
            "repeats": self.repeats,
            "machine": machine,
        }
        varied = {
            "ray_counts": self.ray_counts,
            "step_ratios": self.step_ratios,
            "thread_counts": self.thread_counts,
        }
        if self.load_config is not None:
            run = {"load_config": self.load_config, "data": self.data}
            return [Case(size=0, **common, **varied, **run)]
        return [
            Case(size=size, **common, **(varied if size == self.scaling_size else {}))
            for size in sorted(self.sizes)
        ]


def measure_apart(case: Case) -> Measurement:
    """:func:`measure` in a fresh process, so that no peak of memory is another case's.

    Raises:
        ProfileError: if the process dies, as it does where memory does not suffice.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, case).result()
        except BrokenProcessPool as error:
            raise ProfileError(
                f"the process that measured {case.size}³ voxels died, perhaps for lack of memory; "
                "use smaller --sizes or fewer --rays"
            ) from error


def measure(case: Case) -> Measurement:
    """Frame first: training's memory comes on top of rendering's."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory() as folder,
        _threads(case.threads or torch.get_num_threads()),
        _own_writers(),
    ):
        library_bytes = _memory("VmRSS")
        if case.load_config is not None:
            trainer = run_trainer(case.load_config, case.data, Path(folder), case.device)
        else:
            trainer = stand_in_trainer(
                Path(folder), case.size, case.rays, case.device, dict(case.settings)
            )
        model = model_of(trainer)
        with torch.no_grad():
            kept = torch.cat(model.field.to_spatial().kept).sum()
        total = sum(map(sum, model.field.num_coefficients()))
        frame, render_peaks, first, following = _measure_frame(trainer, case)
        step, train_peaks = _measure_step(trainer, case)
        return Measurement(
            resolution=model.field.resolution,
            step_ratio=model.config.step_ratio,
            kept=float(kept) / total,
            step=step,
            frame=frame,
            first_picture_seconds=first,
            next_picture_seconds=following,
            library_bytes=library_bytes,
            train_peak_bytes=train_peaks[0],
            render_peak_bytes=render_peaks[0],
            train_peak_device_bytes=train_peaks[1],
            render_peak_device_bytes=render_peaks[1],
            threadings=_vary_threads(trainer, case),
            variations=_vary(trainer, case, step),
        )


@contextlib.contextmanager
def _own_writers() -> Iterator[None]:
    """nerfstudio's writers of logs are global: those made within serve within alone."""
    before = list(writer.EVENT_WRITERS)
    writer.EVENT_WRITERS.clear()
    try:
        yield
    finally:
        for made in writer.EVENT_WRITERS:
            if isinstance(made, writer.TensorboardWriter):
                made.tb_writer.close()
        writer.EVENT_WRITERS[:] = before
        writer.EVENT_STORAGE.clear()


# --- training steps -------------------------------------------------------------------------------


def _measure_step(trainer: Trainer, case: Case) -> tuple[Timing, tuple[int, int]]:
    """A step, and the peaks of memory, host and device."""
    device = torch.device(case.device)
    _forget_peak(device)
    _step_seconds(trainer, WARM_UP_STEPS)
    seconds = median(_step_seconds(trainer, case.repeats))
    peaks = _peaks(device)  # before the profiler, which keeps all that it sees
    profiled: list[float] = []
    trace = tracing.trace(lambda: profiled.extend(_step_seconds(trainer, case.repeats)), device)
    mean = sum(profiled) / len(profiled)
    timing = _timing(trainer, case, trace, seconds, mean, case.repeats + 1, training=True)
    return timing, peaks


def _step_seconds(trainer: Trainer, count: int) -> list[float]:
    """Times of ``count`` steps of nerfstudio's own loop, which runs one more, before them."""
    device = model_of(trainer).device
    stamps: list[float] = []
    original = writer.write_out_storage

    def write_and_stamp() -> None:  # the loop's last call
        original()
        stamps.append(now(device))

    trainer.config.max_num_iterations = count + 1
    writer.write_out_storage = write_and_stamp
    try:
        trainer.train()
    finally:
        writer.write_out_storage = original
    trainer._start_step += count + 1
    return [stop - start for start, stop in itertools.pairwise(stamps)]


def _vary(trainer: Trainer, case: Case, step: Timing) -> list[Variation]:
    """Steps with other numbers of rays and other distances between samples."""
    model = model_of(trainer)
    manager = trainer.pipeline.datamanager
    sampler: Any = manager.train_pixel_sampler
    usual = step.rays, model.config.step_ratio
    found = []
    settings = [(rays, usual[1]) for rays in case.ray_counts]
    if not model.config.contract:
        settings += [(usual[0], ratio) for ratio in case.step_ratios]
    for rays, step_ratio in dict.fromkeys(settings):
        if (rays, step_ratio) == usual:
            found.append(Variation(*usual, step.density_samples, step.seconds))
            continue
        sampler.set_num_rays_per_batch(rays)
        model.config.step_ratio = step_ratio
        model.refresh()
        _step_seconds(trainer, 1)
        seconds = median(_step_seconds(trainer, case.repeats))
        samples = tracing.count(lambda: _step_seconds(trainer, 1))["density"] // 2
        found.append(Variation(rays, step_ratio, samples, seconds))
    return found


def _vary_threads(trainer: Trainer, case: Case) -> list[Threading]:
    """Steps with other numbers of threads, in turn."""
    counts = tuple(dict.fromkeys(case.thread_counts))
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(THREAD_ROUNDS):
        for count in counts:
            with _threads(count):
                _step_seconds(trainer, 1)
                seconds[count] += _step_seconds(trainer, case.repeats)
    return [Threading(count, median(found)) for count, found in seconds.items()]


# --- frames ---------------------------------------------------------------------------------------


def _measure_frame(trainer: Trainer, case: Case) -> tuple[Timing, tuple[int, int], float, float]:
    """A frame, and the peaks of memory, host and device.

    Then seconds of a viewer's picture once the planes were dropped, and of the next.
    """
    model = model_of(trainer)
    dataset = trainer.pipeline.datamanager.eval_dataset
    assert dataset is not None
    camera = dataset.cameras[0:1].to(model.device)
    trainer.pipeline.eval()
    frame = _resized(camera, FRAME_SIDE, FRAME_SIDE)

    def render(view: Cameras = frame) -> float:
        start = now(model.device)
        model.get_outputs_for_camera(view)
        return now(model.device) - start

    _forget_peak(model.device)
    model.refresh()
    render()
    # Frames are long: half as many runs are enough.
    repeats = max(1, case.repeats // 2)
    seconds = median(render() for _ in range(repeats))
    peaks = _peaks(model.device)
    profiled: list[float] = []
    trace = tracing.trace(lambda: profiled.extend(render() for _ in range(repeats)), model.device)
    mean = sum(profiled) / repeats
    timing = _timing(trainer, case, trace, seconds, mean, repeats, training=False)
    view = _resized(camera, *FIRST_PICTURE)
    following = median(render(view) for _ in range(repeats))
    firsts = []
    for _ in range(repeats):
        model.refresh()
        firsts.append(render(view))
    return timing, peaks, median(firsts), following


def _resized(camera: Cameras, width: int, height: int) -> Cameras:
    """The same view in ``width`` pixels, cut or widened to ``height`` around its middle."""
    camera = copy.deepcopy(camera)
    camera.rescale_output_resolution(width / int(camera.width[0]))
    camera.width.fill_(width)
    camera.height.fill_(height)
    camera.cx.fill_(width / 2)
    camera.cy.fill_(height / 2)
    return camera


def _timing(
    trainer: Trainer,
    case: Case,
    trace: tracing.Trace,
    seconds: float,
    profiled_seconds: float,
    runs: int,
    *,
    training: bool,
) -> Timing:
    """Parts of one run out of ``runs`` that ``trace`` saw, scaled to what it takes untraced."""
    counts = {
        key: trace.counts.get(key, 0) // runs for key in ("rays", "places", "density", "coloured")
    }
    worked = work(
        counts_of(
            model_of(trainer),
            counts["rays"],
            counts["places"],
            counts["density"],
            counts["coloured"],
        ),
        training=training,
    )
    found = scaled_parts(
        {name: total / runs for name, total in trace.seconds.items()},
        seconds,
        # Kernels take as long under the profiler as they do without.
        seconds if case.device == "cuda" else profiled_seconds,
    )
    parts = []
    for name, part_seconds in found.items():
        least = worked.get(name, Work(0.0, 0.0))
        num_bytes, operations = map(float, least)
        parts.append(Part(name, part_seconds, num_bytes, operations, least.floor(case.machine)))
    return Timing(
        seconds=seconds,
        profiled_seconds=profiled_seconds,
        parts=[part for part in parts if part.seconds > 0 or part.name == tracing.REST],
        rays=counts["rays"],
        density_samples=counts["density"],
        coloured_samples=counts["coloured"],
    )


def scaled_parts(
    profiled: dict[str, float], seconds: float, profiled_seconds: float
) -> dict[str, float]:
    """Times of parts under the profiler to those without it; the rest makes up the sum.

    Args:
        profiled: seconds of every part under the profiler.
        seconds: what a step takes without the profiler.
        profiled_seconds: what it takes with it.
    """
    scale = seconds / max(profiled_seconds, sum(profiled.values()), 1e-12)
    parts = {name: scale * value for name, value in profiled.items()}
    # Where the profiled parts make up everything, rounding may leave less than nothing.
    return {**parts, tracing.REST: max(0.0, seconds - sum(parts.values()))}


# --- memory and threads ---------------------------------------------------------------------------


def _memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes that are resident now, or were at most since :func:`_forget_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak(device: torch.device) -> None:
    """Lets the peak start anew from what is in use now; without Linux it stays that of before."""
    gc.collect()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what was freed would count otherwise
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: torch.device) -> tuple[int, int]:
    """Peak of resident memory and of the device's, bytes."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return _memory("VmHWM"), on_device


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)  # for the processes that are started within
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable
