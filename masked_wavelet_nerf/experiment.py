"""One experiment: train → evaluate → export → decode → evaluate, as rows of results.

A training may be exported in several ways (``Preset.exports``): a row for each.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import masked_wavelet_codec as codec
from masked_wavelet_nerf import __version__, pictures, provenance, recode, report
from masked_wavelet_nerf.clock import device_name, peak_bytes
from masked_wavelet_nerf.datasets.sample import write_sample_capture
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.export import export_run
from masked_wavelet_nerf.presets import Preset
from masked_wavelet_nerf.prune import prune
from masked_wavelet_nerf.results import in_words
from masked_wavelet_nerf.runs import Evaluation, Run, evaluate, open_run, write_run

SAMPLE_SCENE = "sample"
"""A scene that needs no data: the capture of ``mwnerf demo``, made anew for each experiment."""
_CURVE_POINTS = 40
"""Of a training curve, at most: each is a mean over as many steps."""
_CURVES = {
    "psnr": "Train Metrics Dict/psnr",
    "kept": "Train Metrics Dict/kept",
    "estimated_bytes": "Train Metrics Dict/estimated_bytes",
}


class BenchError(UserError):
    """A benchmark was asked for the impossible, or its training failed."""


@dataclass(frozen=True)
class Experiment:
    """What is trained and measured, in terms that can be written down and sent elsewhere."""

    preset: Preset
    """Of one run: without sweep and variants."""
    variant: str
    place: Mapping[str, Any]
    """Of the sweep: values of flags."""
    scene: str
    data: str | None
    """Folder of the capture; None makes the sample capture."""
    seed: int
    device: str
    steps: int | None = None
    """Stop after so many, see ``mwnerf bench --steps``."""
    eval_views: int | None = None
    eval_stride: int = 1

    @property
    def identity(self) -> str:
        """The same for experiments of one name that train and measure the same, wherever they run.

        A capture counts by its scene's name, not by where it lies.
        """
        what = asdict(self) | {"data": None, "preset": self.preset.name}
        what["arguments"] = self.preset.arguments(Path("DATA"))
        what["exports"] = dict(self.preset.exports)
        text = json.dumps(what, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """For people."""
        name, place = self.preset.name, self.place.items()
        return in_words(name, self.variant, place, self.scene, f"seed {self.seed}")

    def to_json(self) -> str:
        """As :meth:`from_json` reads it."""
        return json.dumps(asdict(self), default=str)  # TOML knows dates

    @staticmethod
    def from_json(text: str) -> Experiment:
        """The experiment that was written."""
        content = json.loads(text)
        preset = content["preset"] | {"scenes": tuple(content["preset"]["scenes"])}
        return Experiment(**content | {"preset": Preset(**preset)})

    def run(self, output_dir: Path) -> list[dict[str, Any]]:
        """Runs it in this process; files go into ``output_dir``.

        Raises:
            BenchError: if training fails.
        """
        data = (
            write_sample_capture(output_dir / "capture") if self.data is None else Path(self.data)
        )
        flags = ["--machine.seed", str(self.seed), "--machine.device-type", self.device]
        if self.steps is not None:
            flags += ["--max-num-iterations", str(self.steps)]
        rows, _ = run_preset(
            self.preset,
            data,
            output_dir,
            flags=flags,
            num_views=self.eval_views,
            stride=self.eval_stride,
        )
        known = {
            "experiment": self.identity,
            "preset": self.preset.name,
            "variant": self.variant,
            "place": dict(self.place),
            "scene": self.scene,
            "seed": self.seed,
            "paper": self.preset.published(self.scene, self.place),
            "paper_mean": self.preset.published(None, self.place),
        }
        return [known | row for row in rows]


def run_preset(
    preset: Preset,
    data: Path,
    output_dir: Path,
    *,
    flags: list[str] | None = None,
    num_views: int | None = None,
    stride: int = 1,
) -> tuple[list[dict[str, Any]], list[codec.Description]]:
    """Trains, evaluates, and for every export of the preset exports, decodes and evaluates again.

    Leaves ``output_dir``/METHOD/trained (the run), scene.mwnf, decoded (the run made from it) and
    side_by_side.png; of exports with a name in a folder of that name.

    Returns:
        Rows of results (times in seconds, PSNR in dB) and the files' descriptions, one per export.

    Raises:
        BenchError: if training fails.
    """
    threads = preset.num_threads
    config_path, seconds, command = train(preset, data, output_dir, flags or [])
    torch.set_num_threads(threads)
    run = open_run(config_path, data)
    if run.pipeline is None:
        raise BenchError(f"{data}: the capture cannot be read: {run.missing}")
    before = evaluate(run.pipeline, num_views, stride)
    steps = run.step + 1
    trained = {
        "psnr_before": before.psnr,
        "steps": steps,
        "steps_per_second": steps / seconds,
        "train_seconds": seconds,
        "train_peak_bytes": peak_bytes(resource.RUSAGE_CHILDREN),
        "render_rays_per_second": before.rays_per_second,
        "views": before.num_views,
        "eval_stride": stride,
        "threads": threads,
        "device": device_name(run.model.device),
        "version": __version__,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": command.replace(str(data), "DATA").replace(str(output_dir), "OUTPUT"),
        "configuration": _what_matters(provenance.configuration(run.config)),
        "training": training_curves(config_path.parent),
    }
    rows, descriptions = [], []
    for name, options in preset.exports.items():
        # Each of them starts from what was trained: coarser steps would stay.
        exported = run if len(preset.exports) == 1 else open_run(config_path, data)
        row, description = _export_and_measure(
            exported, data, output_dir / name, options, before, num_views, stride
        )
        rows.append({"export": name} | trained | row)
        descriptions.append(description)
    return rows, descriptions


def _export_and_measure(
    run: Run,
    data: Path,
    output_dir: Path,
    options: Mapping[str, Any],
    trained: Evaluation,
    num_views: int | None,
    stride: int,
) -> tuple[dict[str, Any], codec.Description]:
    assert run.pipeline is not None
    profile = options.get("profile", "range")
    start = time.perf_counter()
    psnr = trained.psnr
    if "keep" in options:
        prune(run.model, options["keep"])
    if options.get("allowed-loss", 0) > 0:
        recode.coarsen(run, options["allowed-loss"])
    if options.keys() & {"keep", "allowed-loss"}:
        psnr = evaluate(run.pipeline, num_views, stride).psnr
    path, description = export_run(run, output_dir / "scene.mwnf", profile=profile, psnr=psnr)
    encode_seconds = time.perf_counter() - start
    data_bytes = path.read_bytes()
    start = time.perf_counter()
    scene = codec.decode(data_bytes)
    decode_seconds = time.perf_counter() - start
    decoded = open_run(write_run(scene, output_dir / "decoded", data), data)
    assert decoded.pipeline is not None
    after = evaluate(decoded.pipeline, num_views, stride)
    compare_with_photo(decoded, output_dir / "side_by_side.png")
    row = {
        "profile": profile,
        "psnr_after": after.psnr,
        "ssim": after.ssim,
        "bytes": description.num_bytes,
        "estimated_bytes": float(run.model.rate.estimate(run.model.field.to_spatial().kept)),
        "bytes_by_part": description.parts,
        "dropped": report.dropped_fraction(description),
        "kept_by_level": {
            level: kept / max(total, 1)
            for level, (kept, total) in report.kept_by_level(description).items()
        },
        "integers_equal": _same_integers(run.model, decoded.model, scene.bits),
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "render_peak_bytes": peak_bytes(resource.RUSAGE_SELF),
    }
    return row, description


def compare_with_photo(run: Run, path: Path, num_views: int = 1, scale: int = 1) -> Path:
    """A picture of test views, evenly spread: photo, what the run renders, their difference."""
    assert run.pipeline is not None
    dataset = run.pipeline.datamanager.eval_dataset
    assert dataset is not None
    rows = []
    for index in np.linspace(0, len(dataset) - 1, num_views).astype(int).tolist():
        photo = dataset[index]["image"].to(run.model.device)
        photo = run.model.renderer_rgb.blend_background(photo).cpu().numpy()
        camera = dataset.cameras[index : index + 1].to(run.model.device)
        rendered = run.model.get_outputs_for_camera(camera)["rgb"].cpu().numpy()
        rows.append([photo, rendered, pictures.difference(photo, rendered, gain=5.0)])
    labels = ["photo", "decoded", "difference x 5"]
    return pictures.side_by_side(rows, labels, path, scale=scale)


def _what_matters(configuration: dict[str, Any]) -> dict[str, Any]:
    names = ("pipeline.", "optimizers.", "max_num_iterations", "mixed_precision", "machine.seed")
    return {name: value for name, value in configuration.items() if name.startswith(names)}


def training_curves(folder: Path) -> dict[str, list[list[float]]]:
    """What ns-train logged, thinned: (step, value) pairs of PSNR, kept fraction, estimated bytes.

    Args:
        folder: of a run with ``--vis tensorboard``.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    curves = {}
    for name, tag in _CURVES.items():
        if tag not in log.Tags()["scalars"]:
            continue
        points = np.array([(event.step, event.value) for event in log.Scalars(tag)])
        parts = np.array_split(points, min(_CURVE_POINTS, len(points)))
        means = [part.mean(axis=0) for part in parts]
        curves[name] = [[float(round(step)), float(f"{value:.5g}")] for step, value in means]
    return curves


def train(
    preset: Preset, data: Path, output_dir: Path, flags: list[str]
) -> tuple[Path, float, str]:
    """Runs ``ns-train`` in a process of its own, without evaluations on the way.

    Returns:
        The run's config.yml; seconds from reading the capture to the last checkpoint; the command.

    Raises:
        BenchError: if it fails.
    """
    never = "1000000000"
    arguments = preset.arguments(data)
    extra = [
        "--output-dir", str(output_dir), "--experiment-name", ".", "--timestamp", "trained",
        "--vis", "tensorboard", "--steps-per-eval-batch", never, "--steps-per-eval-image", never,
        "--steps-per-eval-all-images", never, *flags,
    ]  # fmt: skip
    split = arguments.index("--data")  # after the preset's flags: the last one counts
    arguments = [*arguments[:split], *extra, *arguments[split:]]
    threads = str(preset.num_threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    finished = subprocess.run(
        [sys.executable, "-m", "nerfstudio.scripts.train", *arguments],
        env=environment,
        stdout=sys.stderr,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    config_path = output_dir / preset.method / "trained" / "config.yml"
    checkpoints = sorted((config_path.parent / "nerfstudio_models").glob("step-*.ckpt"))
    if finished.returncode != 0 or not checkpoints:
        raise BenchError(
            f"ns-train failed with exit code {finished.returncode}; its messages are above. "
            f"The command was: ns-train {shlex.join(arguments)}"
        )
    seconds = checkpoints[-1].stat().st_mtime - config_path.stat().st_mtime
    return config_path, seconds, shlex.join(["ns-train", *arguments])


def _same_integers(trained: Any, decoded: Any, bits: int) -> bool:
    pairs = zip(trained.field.grids().values(), decoded.field.grids().values(), strict=True)
    return all(
        torch.equal(a.values, b.values) and torch.equal(a.mask, b.mask)
        for one, other in pairs
        for a, b in zip(one.integers(bits), other.integers(bits), strict=True)
    )


def main(text: str, output_dir: str, result: str) -> None:
    """Runs an experiment for :mod:`.laboratory`, which gives it a process of its own."""
    rows = Experiment.from_json(text).run(Path(output_dir))
    Path(result).write_text(json.dumps(rows), "utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])
