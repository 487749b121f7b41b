"""``mwnerf check``: what a capture is, what is wrong with it and how to train on it, in seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table

from masked_wavelet_nerf.coverage import Coverage, camera_models, corner_shift, half_view
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.survey import Survey, recognise, survey_capture

_LAYOUTS = {
    "inward": "cameras around a scene, looking inwards",
    "forward": "forward-facing cameras: all look the same way",
    "outward": "cameras that look in many directions, at no common point, as inside a room",
}
_PURPOSES = {"train": "to train on", "val": "to evaluate with", "test": "to test with"}


@dataclass
class Check:
    """Read a capture without training: what it is, every fault, and how to train on it.

    Exit code 0: it can be trained on. 1: it cannot. 2: there is no capture to read.
    """

    capture: Annotated[Path, tyro.conf.Positional]
    """Folder of the capture."""
    dataparser: str | None = None
    """Data parser by nerfstudio's name (nerfstudio-data, blender-data, colmap, …), as at the end
    of an ns-train command. Recognised by the files that are there if not given."""
    figure: Path | None = None
    """Draw the cameras, the scene box and some photos here, as PNG."""
    json: bool = False
    """Print one line of JSON instead."""

    def main(self) -> int:
        """Print, and draw; returns the exit code."""
        name = self.dataparser or recognise(self.capture)
        if name not in all_dataparsers:
            raise UserError(
                f"--dataparser {name}: unknown to nerfstudio; expected one of "
                f"{', '.join(sorted(all_dataparsers))}"
            )
        if self.figure is not None and self.figure.suffix.lower() != ".png":
            raise UserError(f"--figure {self.figure}: expected a name that ends in .png")
        survey = survey_capture(self.capture, name, has_gpu=torch.cuda.is_available())
        figure = self.figure if survey.coverage is not None else None
        if figure is not None:
            _draw(survey, figure)
        if self.json:
            print(json.dumps(to_json(survey)))
        else:
            _print(survey)
            if figure is not None:
                _print_line(f"Drew {figure}", "none")
            elif survey.coverage is not None:
                _print_line("--figure cameras.png draws the cameras.", "none")
        return 0 if survey.can_be_trained else 1


def to_json(survey: Survey) -> dict[str, Any]:
    """Everything that is printed, JSON-able: angles in degrees, lengths in the parser's unit."""
    train, coverage, suggestion = survey.splits.get("train"), survey.coverage, survey.suggestion
    found: dict[str, Any] = {
        "capture": str(survey.capture),
        "dataparser": survey.dataparser,
        "can_be_trained": survey.can_be_trained,
        "photos": {
            split: {"named": count, "usable": len(survey.splits[split].image_filenames)}
            for split, count in survey.named.items()
        },
        "faults": [dataclasses.asdict(fault) for fault in survey.faults],
    }
    if train is not None and coverage is not None:
        found |= {
            "sizes": [{"width": w, "height": h, "photos": count} for w, h, count in survey.sizes],
            "background": survey.background,
            "camera_models": camera_models(train.cameras),
            "field_of_view": _field_of_view(train.cameras),
            "corner_shift": corner_shift(train.cameras),
            "coverage": dataclasses.asdict(coverage),
            "box": train.scene_box.aabb.tolist(),
        }
    if suggestion is not None:
        found["command"] = shlex.join(suggestion.arguments)
        found["reasons"] = list(suggestion.reasons)
    return found


def _field_of_view(cameras: Cameras) -> tuple[float, float] | None:
    """Horizontal and vertical, degrees; None for other models than perspective."""
    if camera_models(cameras) != ["perspective"]:
        return None
    x, y = (math.degrees(2 * math.atan(half)) for half in half_view(cameras))
    return x, y


def _print(survey: Survey) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in _rows(survey):
        table.add_row(name, value)
    CONSOLE.print(table)
    for fault in sorted(survey.faults, key=lambda fault: not fault.is_fatal):
        word, style = ("Error", "red") if fault.is_fatal else ("Warning", "yellow")
        _print_line(f"{word}: {fault.message}", style)
    if not survey.faults:
        _print_line("No faults found.", "green")
    if survey.suggestion is None:
        _print_line("It cannot be trained on before that is mended.", "red")
        return
    _print_line("\nTrain on it with", "bold")
    print(shlex.join(survey.suggestion.arguments))  # one line, whatever the terminal's width
    for reason in survey.suggestion.reasons:
        _print_line(f"- {reason}", "dim")


def _print_line(text: str, style: str) -> None:
    CONSOLE.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _rows(survey: Survey) -> Iterator[tuple[str, str]]:
    yield "capture", f"{survey.capture}, read by {survey.dataparser}"
    photos = []
    for split, count in survey.named.items():
        usable = len(survey.splits[split].image_filenames)
        lost = f" (of {count})" if usable < count else ""
        photos.append(f"{usable}{lost} {_PURPOSES[split]}")
    yield "photos", ", ".join(photos) or "none"
    if survey.coverage is None:
        return
    train = survey.splits["train"]
    yield "sizes", ", ".join(f"{count} of {w} × {h} pixels" for w, h, count in survey.sizes)
    yield "background", survey.background or "photographed surroundings"
    yield "lens", _lens(train.cameras)
    yield from _coverage_rows(survey.coverage)
    low, high = train.scene_box.aabb.tolist()
    yield "scene box", f"{_place(low)} to {_place(high)}"


def _place(point: Sequence[float]) -> str:
    # Adding 0 turns −0 into 0.
    return f"({', '.join(f'{round(x, 2) + 0.0:.2f}' for x in point)})"


def _lens(cameras: Cameras) -> str:
    lens = ", ".join(camera_models(cameras))
    view, shift = _field_of_view(cameras), corner_shift(cameras)
    if view is not None:
        lens += f", field of view {view[0]:.0f}° × {view[1]:.0f}°"
    if shift is not None:
        lens += f", distortion moves corners by {shift:.1f} pixels" if shift else ", no distortion"
    return lens


def _coverage_rows(coverage: Coverage) -> Iterator[tuple[str, str]]:
    low, high = coverage.elevations
    near, far = coverage.distances
    yield "layout", _LAYOUTS[coverage.layout]
    yield (
        "seen from",
        f"{coverage.azimuth_span:.0f}° of 360° around, {low:.0f}° to {high:.0f}° above the horizon",
    )
    if coverage.nearest_angle is not None:
        yield (
            "directions",
            f"{coverage.widest_angle:.0f}° between extremes, {coverage.nearest_angle:.1f}° to the "
            "next (median)",
        )
    if coverage.look_at is not None and coverage.layout != "outward":
        yield (
            "look at",
            f"{_place(coverage.look_at.point)}, {coverage.look_at.distance:.2f} away; optical axes "
            f"pass it at {coverage.look_at.miss:.2f} (medians)",
        )
    yield "distances", f"{near:.2f} to {far:.2f} from the origin"


def _draw(survey: Survey, path: Path) -> None:
    from masked_wavelet_nerf.check_figure import draw  # matplotlib takes a second to load

    train, coverage = survey.splits["train"], survey.coverage
    assert coverage is not None
    poses = {
        split: outputs.cameras.camera_to_worlds.double().numpy()
        for split, outputs in survey.splits.items()
    }
    draw(
        path,
        title=f"{survey.capture.resolve().name}: {_LAYOUTS[coverage.layout]}",
        train=poses.pop("train"),
        held_out=np.concatenate([*poses.values(), np.zeros((0, 3, 4))]),
        half_view=half_view(train.cameras),
        coverage=coverage,
        box=train.scene_box.aabb.double().numpy(),
        photos=survey.thumbnails,
    )
