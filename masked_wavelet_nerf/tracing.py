"""Which part of a training step or of a frame takes how long, by torch's profiler.

Methods are wrapped in labels while the profiler runs. An autograd node counts for the part whose
forward pass made it (torch numbers the nodes, and the operators that make them); where the forward
pass does not say, by its name.

On the CPU a part's time is that of the host, without the parts nested in it. On CUDA it is that of
the kernels that the part launched, however long the host took: what the device was idle is left.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.optimizers import Optimizers
from torch.profiler import ProfilerActivity, profile, record_function

from masked_wavelet_nerf.datamanager import WaveletDataManager
from masked_wavelet_nerf.field import WaveletPlaneField
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.planes import FactorisedGrid
from masked_wavelet_nerf.voxels import VoxelGrid

TRANSFORM = "masks & inverse transform"
"""With the quantiser: compiled loops do all three at once."""
MARCHING = "marching"
DENSITY = "density look-ups"
APPEARANCE = "appearance look-ups"
NETWORKS = "networks"
RENDERING = "volume rendering & losses"
GRADIENTS = "handing over gradients"
OPTIMISER = "optimiser"
DATA = "data manager & rays"
METRICS = "metrics"
REST = "nerfstudio & rest"
"""What no label covers: the time of a step or frame, less all other parts."""

PARTS: tuple[str, ...] = (
    TRANSFORM,
    MARCHING,
    DENSITY,
    APPEARANCE,
    NETWORKS,
    RENDERING,
    GRADIENTS,
    OPTIMISER,
    DATA,
    METRICS,
)
"""Every part but :data:`REST`."""

Event = Any
"""torch's FunctionEvent, or what looks like one."""

_LABEL = "mwnerf: "
_NODE = "autograd::engine::evaluate_function: "

_LABELLED: tuple[tuple[Any, str, str], ...] = (
    (WaveletPlaneField, "to_spatial", TRANSFORM),
    (MaskedWaveletModel, "forward", MARCHING),  # what is not get_outputs is the collider
    (MaskedWaveletModel, "_samples", MARCHING),
    (MaskedWaveletModel, "get_outputs", RENDERING),
    (MaskedWaveletModel, "get_loss_dict", RENDERING),
    (MaskedWaveletModel, "get_metrics_dict", METRICS),
    (WaveletPlaneField, "density", DENSITY),
    (WaveletPlaneField, "colour", NETWORKS),
    (FactorisedGrid, "features", APPEARANCE),
    (VoxelGrid, "features", APPEARANCE),
    (WaveletDataManager, "next_train", DATA),
    (Cameras, "generate_rays", DATA),
    (Optimizers, "zero_grad_some", OPTIMISER),
    (Optimizers, "optimizer_scaler_step_some", OPTIMISER),
)
"""Owner, method, part. A part nested in another is taken off it."""

_NODES = (
    ("_MaskedSpatial", TRANSFORM),
    ("_MaskedQuantise", TRANSFORM),
    ("_Merge", TRANSFORM),
    ("_Split", TRANSFORM),
    # Density and appearance share their code: only the forward pass can tell them apart.
    ("_NativeFeatures", DENSITY),
    ("GridSampler", DENSITY),
    *((name, NETWORKS) for name in ("Addmm", "Mm", "T", "Relu", "Sin", "Cos", "Cat", "Sigmoid")),
    ("torch::autograd::AccumulateGrad", GRADIENTS),
)
"""Start of an autograd node's name, up to Backward, and its part."""


class Trace(NamedTuple):
    """What the profiler saw."""

    seconds: dict[str, float]
    """Time of every part in :data:`PARTS`, over the whole trace."""
    counts: dict[str, int]
    """Rays, places along them, density samples and coloured samples, over the whole trace."""


def part_of_node(name: str) -> str:
    """The part of an autograd node by its name alone: AddmmBackward0, _MergeBackward, …"""
    stem = name.split("Backward")[0]
    return next((part for start, part in _NODES if _matches(stem, start)), RENDERING)


def _matches(stem: str, start: str) -> bool:
    # "T" is the transposition's whole name; a grid sampler's goes on with its dimensions.
    return stem == start or (start == "GridSampler" and stem.startswith(start))


def attribute(events: Iterable[Event], own_seconds: Callable[[Event], float]) -> dict[str, float]:
    """Seconds of every part.

    Args:
        events: of the profiler.
        own_seconds: time of an event without that of its children.
    """
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    host.sort(key=lambda event: event.time_range.start)
    part_of_number: dict[int, str] = {}
    seconds = dict.fromkeys(PARTS, 0.0)

    # The forward pass first: of the operators with one number the last to start made the node.
    for event in host:
        if event.sequence_nr >= 0 and not _is_backward(event):
            part_of_number.pop(event.sequence_nr, None)
            part = _label_above(event)
            if part is not None:
                part_of_number[event.sequence_nr] = part

    def walk(event: Event, part: str | None) -> None:
        stack = [(event, part)]
        while stack:
            event, part = stack.pop()
            if event.name.startswith(_LABEL):
                part = event.name.removeprefix(_LABEL)
            elif event.name.startswith(_NODE):
                part = part_of_number.get(event.sequence_nr)
                part = part or part_of_node(event.name.removeprefix(_NODE))
            if part is not None:
                seconds[part] += own_seconds(event)
            stack += [(child, part) for child in event.cpu_children]

    for event in host:
        if event.cpu_parent is None:
            walk(event, None)
    return seconds


def _ancestry(event: Event) -> Iterator[Event]:
    current: Event = event
    while current is not None:
        yield current
        current = current.cpu_parent


def _is_backward(event: Event) -> bool:
    return any(e.name.startswith(_NODE) for e in _ancestry(event))


def _label_above(event: Event) -> str | None:
    names = (e.name for e in _ancestry(event) if e.name.startswith(_LABEL))
    return next((name.removeprefix(_LABEL) for name in names), None)


def trace(work: Callable[[], object], device: torch.device) -> Trace:
    """Runs ``work`` under the profiler, with labels."""
    counts: dict[str, int] = {}
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _labels(), _counting(counts), profile(activities=activities) as profiler:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_device = device.type == "cuda"

    def own_seconds(event: Event) -> float:
        return 1e-6 * (event.self_device_time_total if on_device else event.self_cpu_time_total)

    return Trace(attribute(profiler.events() or [], own_seconds), counts)


def count(work: Callable[[], object]) -> dict[str, int]:
    """Runs ``work``, and returns :attr:`Trace.counts`."""
    counts: dict[str, int] = {}
    with _counting(counts):
        work()
    return counts


@contextlib.contextmanager
def _labels() -> Iterator[None]:
    def labelled(function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            with record_function(_LABEL + part):
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, part in _LABELLED:
            stack.enter_context(_replaced(owner, name, functools.partial(labelled, part=part)))
        yield


@contextlib.contextmanager
def _counting(counts: dict[str, int]) -> Iterator[None]:
    def counted(function: Callable, count: Callable[..., dict[str, int]]) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            for key, value in count(*args, **kwargs).items():
                counts[key] = counts.get(key, 0) + value
            return function(*args, **kwargs)

        return call

    def of_rays(model, rays, _) -> dict[str, int]:
        if model.config.contract:
            places = len(rays) * model.config.num_samples
        else:
            places = int((rays.fars - rays.nears).clamp(min=0).sum() / model._step_size)
        return {"rays": len(rays), "places": places}

    counters = (
        (MaskedWaveletModel, "_samples", of_rays),
        (WaveletPlaneField, "density", lambda _, spatial, points: {"density": len(points)}),
        (WaveletPlaneField, "colour", lambda _, spatial, points, *__: {"coloured": len(points)}),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, count in counters:
            stack.enter_context(_replaced(owner, name, functools.partial(counted, count=count)))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """A method of a class wrapped within; one that is inherited is inherited again afterwards."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
