"""What the camera optimiser and the appearance of photos win back, as a Markdown table.

    python -m masked_wavelet_nerf.bench_remedies

The demo's training on the sample capture, and on copies of it whose photos for training have
errors: cameras turned and shifted at random, or brightness of their own. Photos for testing have
none. Each row is a run of its own, from ns-train to the decoded file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from masked_wavelet_nerf.datasets.sample import write_sample_capture
from masked_wavelet_nerf.demo import demo_preset
from masked_wavelet_nerf.experiment import run_preset

TURN, SHIFT = 0.5, 0.02
"""Standard deviations of a camera's errors: degrees in all, and scene units along each axis."""
DARKEST, BRIGHTEST = 0.6, 1.4
"""Factors on a photo's values, of which those above white are cut off."""
_OPTIMISER = {"pipeline.model.camera-optimizer.mode": "SO3xR3"}
_APPEARANCE = {"pipeline.model.photo-appearance-dim": 8}


def disturb_cameras(capture: Path) -> None:
    """Turns and shifts every camera for training."""
    generator, path = np.random.default_rng(0), capture / "transforms_train.json"
    content = json.loads(path.read_text("utf8"))
    for frame in content["frames"]:
        pose = np.array(frame["transform_matrix"])
        turn = generator.normal(0, math.radians(TURN) / math.sqrt(3), 3)
        pose[:3, :3] = Rotation.from_rotvec(turn).as_matrix() @ pose[:3, :3]
        pose[:3, 3] += generator.normal(0, SHIFT, 3)
        frame["transform_matrix"] = pose.tolist()
    path.write_text(json.dumps(content), "utf8")


def disturb_brightness(capture: Path) -> None:
    """Gives every photo for training a brightness of its own, 1 on average."""
    generator = np.random.default_rng(0)
    for path in sorted((capture / "train").glob("*.png")):
        with Image.open(path) as photo:
            pixels = np.array(photo)
        colours = pixels[..., :3] * generator.uniform(DARKEST, BRIGHTEST)
        pixels[..., :3] = colours.round().clip(0, 255)
        Image.fromarray(pixels).save(path)


ROWS: dict[str, tuple[Callable[[Path], None] | None, Mapping[str, object]]] = {
    "as it is": (None, {}),
    "cameras off": (disturb_cameras, {}),
    "cameras off, camera optimiser": (disturb_cameras, _OPTIMISER),
    "brightness off": (disturb_brightness, {}),
    "brightness off, appearance of photos": (disturb_brightness, _APPEARANCE),
}


def main() -> None:
    """Prints the table at the end; training and evaluation print what they always do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    arguments = parser.parse_args()
    table = ["| capture | PSNR | bytes | s training |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        clean = write_sample_capture(Path(name) / "clean")
        for row in arguments.rows:
            disturb, flags = ROWS[row]
            capture = shutil.copytree(clean, Path(name) / "capture", dirs_exist_ok=True)
            if disturb is not None:
                disturb(capture)
            preset = demo_preset()
            preset = dataclasses.replace(preset, flags={**preset.flags, **flags})
            (found,), _ = run_preset(preset, capture, Path(name) / row.replace(" ", "_"))
            numbers = (
                f"{found['psnr_after']:.2f} | {found['bytes']:,} | {found['train_seconds']:.0f}"
            )
            table.append(f"| {row} | {numbers} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
