"""``mwnerf demo``: from nothing to a small file and pictures of what it holds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import Progress
from rich.table import Table

from masked_wavelet_nerf import pictures, report
from masked_wavelet_nerf.datasets.sample import write_sample_capture
from masked_wavelet_nerf.experiment import compare_with_photo, run_preset
from masked_wavelet_nerf.model import MaskedWaveletModel
from masked_wavelet_nerf.presets import Preset
from masked_wavelet_nerf.runs import open_run

_UPSAMPLE_STEPS = [150, 300]
_STEPS = 800


def demo_preset(steps: int = _STEPS) -> Preset:
    """What the demo trains, in about a minute."""
    scheduler = {"max-steps": steps, "restarts": _UPSAMPLE_STEPS}
    return Preset(
        name="demo",
        method="masked-wavelet-bounded",
        dataparser="blender-data",
        flags={
            "max-num-iterations": steps,
            "pipeline.datamanager.train-num-rays-per-batch": 1024,
            "pipeline.model": {
                "initial-resolution": 48,
                "final-resolution": 96,
                "upsample-steps": _UPSAMPLE_STEPS,
                "occupancy-steps": [*_UPSAMPLE_STEPS, 500],
                "mask-weight": 4e-9,
                "texel-units": True,
            },
            "optimizers": {
                group: {"scheduler": scheduler} for group in ("grids", "masks", "networks")
            },
        },
    )


@dataclass
class Demo:
    """Make a sample capture, train on it, export it, decode it, and show what came back."""

    output_dir: Path = Path("demo")
    """Where capture, run, bitstream and pictures go."""
    steps: int = _STEPS
    """Training steps."""
    turntable_frames: int = 24
    """Frames of the turntable video; 0 leaves it out."""

    def main(self) -> None:
        """Run all of it."""
        start = time.perf_counter()
        CONSOLE.rule("[bold]1. Sample capture")
        with Progress(console=CONSOLE) as progress:
            photos = progress.add_task("Ray tracing photos")
            capture = write_sample_capture(
                self.output_dir / "capture",
                progress=lambda done, total: progress.update(photos, completed=done, total=total),
            )
        CONSOLE.rule("[bold]2. Train, export, decode, evaluate")
        (row,), (description,) = run_preset(demo_preset(self.steps), capture, self.output_dir)
        CONSOLE.rule("[bold]3. Pictures of the decoded scene")
        decoded = open_run(self.output_dir / "decoded" / "config.yml", capture)
        picture = compare_with_photo(decoded, self.output_dir / "side_by_side.png", 3, scale=3)
        turntable = None
        if self.turntable_frames:
            frames = _turntable(decoded.model, self.turntable_frames)
            turntable = pictures.write_turntable(frames, self.output_dir / "turntable.mp4")
        CONSOLE.rule("[bold]Results")
        CONSOLE.print(report.tables(description))
        table = Table(show_header=False)
        for name, value in (
            ("PSNR of the trained model", f"{row['psnr_before']:.2f} dB"),
            ("PSNR after export and decoding", f"{row['psnr_after']:.2f} dB"),
            ("training", f"{row['train_seconds']:.0f} s ({row['steps_per_second']:.1f} steps/s)"),
            ("encoding, decoding", f"{row['encode_seconds']:.2f} s, {row['decode_seconds']:.2f} s"),
            ("all of the demo", f"{time.perf_counter() - start:.0f} s"),
            ("bitstream", f"{self.output_dir / 'scene.mwnf'} ({row['bytes']:,} bytes)"),
            ("photo, rendering of the decoded file, difference × 5", str(picture)),
            ("turntable", str(turntable) if turntable else "left out"),
        ):
            table.add_row(name, value)
        CONSOLE.print(table)
        CONSOLE.print(
            f"Look at it: ns-viewer --load-config {self.output_dir / 'decoded' / 'config.yml'}",
            soft_wrap=True,
        )


def _turntable(model: MaskedWaveletModel, num_frames: int) -> list[np.ndarray]:
    """Frames of a camera that goes once around the z axis, 30° above the ground."""
    return [
        _render(model, _orbit(2 * math.pi * frame / num_frames, math.radians(30)).to(model.device))
        for frame in range(num_frames)
    ]


def _orbit(azimuth: float, elevation: float, radius: float = 4.0, size: int = 160) -> Cameras:
    backward = torch.tensor(
        [
            math.cos(azimuth) * math.cos(elevation),
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    right = torch.tensor([-math.sin(azimuth), math.cos(azimuth), 0.0])
    up = torch.linalg.cross(backward, right)
    pose = torch.stack((right, up, backward, radius * backward), dim=-1)
    focal = 0.5 * size / math.tan(0.5 * 0.6911)
    return Cameras(pose[None], fx=focal, fy=focal, cx=size / 2, cy=size / 2)


def _render(model: MaskedWaveletModel, camera: Cameras) -> np.ndarray:
    return model.get_outputs_for_camera(camera)["rgb"].cpu().numpy()
