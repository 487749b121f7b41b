"""The sample capture: photos of a toy lighthouse, in NeRF-Synthetic (Blender) format.

Photos are RGBA with true coverage as alpha. Cameras look at the origin from a sphere of radius
4.03 around it.

Letters: H, W image rows and columns.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from masked_wavelet_nerf.datasets.lighthouse import shade
from masked_wavelet_nerf.datasets.primitives import Array, Sphere
from masked_wavelet_nerf.errors import UserError

GENERATOR = "masked-wavelet-nerf sample capture"
GENERATOR_VERSION = 2
"""Counts up whenever the same parameters would give other photos, so that old ones are remade."""
CAMERA_RADIUS = 4.03
CAMERA_ANGLE_X = 0.6911112070083618
"""NeRF-Synthetic's distance of the cameras from the origin, and horizontal view, radians."""
_MANIFEST = "sample.json"


class SampleError(UserError):
    """The sample capture cannot be written."""


def render_view(
    camera_to_world: Float[np.ndarray, "rows 4"],
    image_size: int,
    camera_angle_x: float = CAMERA_ANGLE_X,
    samples: int = 3,
) -> Float[np.ndarray, "H W 4"]:
    """One photo of the sample scene.

    Args:
        camera_to_world: (4, 4) or (3, 4), OpenGL convention: x right, y up, looking along -z.
        image_size: width and height in pixels.
        camera_angle_x: horizontal field of view, radians.
        samples: rays per pixel along each axis.

    Returns:
        (image_size, image_size, 4) float in [0, 1]: encoded (gamma 2.2) colour, not
        premultiplied, and coverage. Colours are averaged as encoded, since that is how a radiance
        field that learns from the photos will blend them at edges.
    """
    fine = image_size * samples
    focal = 0.5 * fine / math.tan(0.5 * camera_angle_x)
    offset = np.arange(fine) + 0.5 - fine / 2
    x, y = np.meshgrid(offset / focal, -offset / focal)
    local = np.stack((x, y, -np.ones_like(x)), axis=-1).reshape(-1, 3)
    directions = local @ camera_to_world[:3, :3].T
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    origins = np.broadcast_to(camera_to_world[:3, 3], directions.shape)
    # Most rays miss everything: a ball around the scene sorts them out.
    colours, is_hit = np.zeros_like(directions), np.zeros(len(directions), bool)
    near = np.isfinite(Sphere((0.0, 0.0, 0.0), 1.5).enter(origins, directions))
    colours[near], is_hit[near] = shade(origins[near], directions[near])

    def per_pixel(values: Array) -> Array:
        shape = (image_size, samples, image_size, samples, -1)
        return values.reshape(shape).mean(axis=(1, 3))

    coverage = per_pixel(is_hit.astype(float))
    return np.concatenate((per_pixel(colours) / np.maximum(coverage, 1e-9), coverage), axis=-1)


def look_at_origin(
    azimuth: float, elevation: float, radius: float = CAMERA_RADIUS
) -> Float[np.ndarray, "4 4"]:
    """Camera-to-world of a camera on a sphere around the origin that looks at it, z up.

    Args:
        azimuth: radians from the x axis towards the y axis.
        elevation: radians above the horizon, less than a right angle.
        radius: world units.
    """
    backward = np.array(
        [
            math.cos(azimuth) * math.cos(elevation),
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack((right, np.cross(backward, right), backward), axis=-1)
    pose[:3, 3] = radius * backward
    return pose


def _poses(num_views: int, generator: np.random.Generator) -> list[Array]:
    """Spread evenly over the upper hemisphere, from the horizon up, with a random turn."""
    turn = generator.uniform(0, 2 * np.pi)
    golden = np.pi * (3 - np.sqrt(5))
    heights = (np.arange(num_views) + generator.uniform(0.2, 0.8, num_views)) / num_views
    return [
        look_at_origin(turn + golden * index, float(np.arcsin(0.97 * height)))
        for index, height in enumerate(heights)
    ]


def write_sample_capture(
    output_dir: Path,
    *,
    image_size: int = 100,
    num_train: int = 60,
    num_val: int = 4,
    num_test: int = 12,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the capture, or takes the one that is there if it was made with the same numbers.

    It is written beside ``output_dir`` and moved there when complete. A sample capture made with
    other numbers is replaced; anything else is left alone.

    Args:
        output_dir: folder of the capture.
        image_size: width and height of the photos, pixels.
        num_train: photos to train on; likewise ``num_val``, ``num_test``.
        seed: where the cameras stand.
        progress: called after every photo with photos done and photos in all.

    Returns:
        ``output_dir``.

    Raises:
        SampleError: if ``output_dir`` holds something else, or a number is less than 1.
    """
    counts = {"train": num_train, "val": num_val, "test": num_test}
    sizes = {"image_size": image_size, **{f"num_{split}": n for split, n in counts.items()}}
    for name, value in sizes.items():
        if value < 1:
            raise SampleError(f"{name}: at least 1 is needed, not {value}")
    manifest = {
        "generator": GENERATOR,
        "version": GENERATOR_VERSION,
        "image_size": image_size,
        "counts": counts,
        "seed": seed,
    }
    if _is_there(output_dir, manifest):
        return output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{output_dir.name}-", dir=output_dir.parent
    ) as temporary:
        fresh = Path(temporary) / "fresh"
        _write_photos(fresh, image_size, counts, seed, progress)
        (fresh / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if output_dir.exists():
            output_dir.rename(Path(temporary) / "old")
        fresh.rename(output_dir)
    return output_dir


def _write_photos(
    folder: Path,
    image_size: int,
    counts: dict[str, int],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    generator = np.random.default_rng(seed)
    done, total = 0, sum(counts.values())
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        frames = []
        for index, pose in enumerate(_poses(count, generator)):
            pixels = np.round(255 * render_view(pose, image_size)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / f"r_{index}.png")
            frames.append({"file_path": f"./{split}/r_{index}", "transform_matrix": pose.tolist()})
            done += 1
            if progress is not None:
                progress(done, total)
        content = {"camera_angle_x": CAMERA_ANGLE_X, "frames": frames}
        path = folder / f"transforms_{split}.json"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _is_there(folder: Path, manifest: dict) -> bool:
    """Whether the folder holds just this capture, in whole.

    Raises:
        SampleError: if it holds anything that did not come from here, and so must not be lost.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise SampleError(f"{folder}: is a file, a folder is needed; name another path")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if not there:
        return False
    found = _read_manifest(folder)
    ours = _contents(found["counts"]) if found is not None else set()
    foreign = sorted(there - ours)
    if foreign:
        raise SampleError(
            f"{folder}: holds {foreign[0]!r}, which is no part of a sample capture; "
            "name another folder, or empty this one"
        )
    return found == manifest and there == ours


def _read_manifest(folder: Path) -> dict | None:
    """The manifest, or None if there is none of ours."""
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        is_ours = found["generator"] == GENERATOR and _contents(found["counts"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if is_ours else None


def _contents(counts: dict[str, int]) -> set[str]:
    """Everything in the folder of a capture."""
    names = {_MANIFEST}
    for split, count in counts.items():
        names |= {split, f"transforms_{split}.json"}
        names |= {f"{split}/r_{index}.png" for index in range(count)}
    return names
