"""``mwnerf bench``: train → evaluate → export → decode → evaluate, as one row of results."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE

import masked_wavelet_codec as codec
from masked_wavelet_nerf import __version__, report
from masked_wavelet_nerf.clock import device_name, peak_bytes
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.export import ProfileName, export_run
from masked_wavelet_nerf.presets import Preset, load_preset
from masked_wavelet_nerf.runs import evaluate, open_run, write_run


class BenchError(UserError):
    """A benchmark was asked for the impossible, or its training failed."""


@dataclass
class Bench:
    """Train a preset with ns-train, export, decode, and measure before and after."""

    preset: Annotated[Path, tyro.conf.Positional]
    """TOML file under configs/."""
    data: Path
    """Folder of the capture."""
    profile: ProfileName = "range"
    """Coding profile of the export."""
    output_dir: Path | None = None
    """Where the run goes; a temporary folder if not given."""
    seed: int = 42
    """Random seed (--machine.seed)."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    steps: int | None = None
    """Stop training after so many steps, to see that a preset starts on this machine."""
    eval_views: int | None = None
    """Evaluate so many test views only, evenly spread."""
    eval_stride: int = 1
    """Evaluate one of so many rows and columns: quicker, about the same PSNR, another SSIM."""
    json: bool = False
    """Print the row as JSON on standard output; progress goes to standard error."""

    def main(self) -> None:
        """Run, and print the row."""
        for name in ("steps", "eval_views", "eval_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise BenchError(f"--{flag} {value}: expected 1 or more")
        preset = load_preset(self.preset)
        with contextlib.ExitStack() as stack:
            output_dir = self.output_dir
            if output_dir is None:
                output_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with contextlib.redirect_stdout(sys.stderr):
                flags = ["--machine.seed", str(self.seed), "--machine.device-type", self.device]
                if self.steps is not None:
                    flags += ["--max-num-iterations", str(self.steps)]
                row, description = run_preset(
                    preset,
                    self.data,
                    output_dir,
                    profile=self.profile,
                    flags=flags,
                    num_views=self.eval_views,
                    stride=self.eval_stride,
                )
                row["seed"] = self.seed
        if self.json:
            print(json.dumps(row))
            return
        CONSOLE.print(report.tables(description))
        for key, value in row.items():
            CONSOLE.print(f"{key}: {value}", highlight=False, soft_wrap=True)


def run_preset(
    preset: Preset,
    data: Path,
    output_dir: Path,
    *,
    profile: ProfileName = "range",
    flags: list[str] | None = None,
    num_views: int | None = None,
    stride: int = 1,
) -> tuple[dict[str, Any], codec.Description]:
    """Trains, evaluates, exports, decodes and evaluates again.

    Leaves ``output_dir``/METHOD/trained (the run), scene.mwnf, and decoded (the run made from it).

    Returns:
        The row of results (times in seconds, PSNR in dB) and the file's description.

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

    start = time.perf_counter()
    path, description = export_run(
        run,
        output_dir / "scene.mwnf",
        profile=profile,
        psnr=before.psnr,
    )
    encode_seconds = time.perf_counter() - start
    data_bytes = path.read_bytes()
    start = time.perf_counter()
    scene = codec.decode(data_bytes)
    decode_seconds = time.perf_counter() - start
    decoded = open_run(write_run(scene, output_dir / "decoded", data), data)
    assert decoded.pipeline is not None
    after = evaluate(decoded.pipeline, num_views, stride)

    steps = run.step + 1
    row = {
        "preset": preset.name,
        "profile": profile,
        "psnr_before": before.psnr,
        "psnr_after": after.psnr,
        "ssim": after.ssim,
        "bytes": description.num_bytes,
        "estimated_bytes": float(run.model.rate.estimate(run.model.field.to_spatial().kept)),
        "bytes_by_part": description.parts,
        "dropped": report.dropped_fraction(description),
        "integers_equal": _same_integers(run.model, decoded.model, scene.bits),
        "steps": steps,
        "steps_per_second": steps / seconds,
        "train_seconds": seconds,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "render_rays_per_second": before.rays_per_second,
        "train_peak_bytes": peak_bytes(resource.RUSAGE_CHILDREN),
        "render_peak_bytes": peak_bytes(resource.RUSAGE_SELF),
        "views": before.num_views,
        "eval_stride": stride,
        "threads": threads,
        "device": device_name(run.model.device),
        "version": __version__,
        "torch": torch.__version__,
        "command": command,
    }
    return row, description


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
