"""What a capture is and what is wrong with it, as nerfstudio's data parser reads it."""

from __future__ import annotations

import contextlib
import copy
import io
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from PIL import Image
from rich.console import Console
from rich.progress import track

from masked_wavelet_nerf.captures import Fault, find_faults, mend, parse, select_views
from masked_wavelet_nerf.coverage import Coverage, measure
from masked_wavelet_nerf.dataparsers.captures import CaptureError
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.photos import load_mask, load_photo, read_header
from masked_wavelet_nerf.suggestion import Background, Suggestion, suggest

_KINDS = {
    "nerfstudio-data": ("transforms.json",),
    "blender-data": ("transforms_train.json",),
    "llff-data": ("poses_bounds.npy",),
    "nsvf-data": ("rgb", "pose", "intrinsics.txt"),
}
"""What a folder holds that a data parser reads."""
_PHOTOS, _VIDEOS = (".jpg", ".jpeg", ".png", ".heic"), (".mp4", ".mov", ".avi", ".mkv")
_NUM_THUMBNAILS, _THUMBNAIL_SIDE = 8, 192
_PLAIN_BORDER, _PLAIN_PHOTOS = 0.8, 0.75
"""Share of a photo's border, and of photos, that are plain around an object with nothing else."""


class Thumbnail(NamedTuple):
    """A photo, small."""

    name: str
    pixels: UInt8[np.ndarray, "H W 4"]
    """RGBA."""


@dataclass(frozen=True)
class Survey:
    """What is known of a capture; without cameras to train with, the first five fields only."""

    capture: Path
    dataparser: str
    named: dict[str, int]
    """Photos that the capture names, by split."""
    splits: dict[str, DataparserOutputs]
    """What can be used of each split: train, val, test; test is left out where it equals val."""
    faults: tuple[Fault, ...]
    sizes: tuple[tuple[int, int, int], ...] = ()
    """Width, height and number of photos, the most frequent size first."""
    background: Background | None = None
    """None where surroundings were photographed."""
    thumbnails: tuple[Thumbnail, ...] = ()
    """Of training photos, evenly spread."""
    coverage: Coverage | None = None
    """Of the training cameras."""
    suggestion: Suggestion | None = None
    """None where the capture cannot be trained on."""

    @property
    def can_be_trained(self) -> bool:
        """Whether ``ns-train`` will run."""
        return not any(fault.is_fatal for fault in self.faults)


def recognise(capture: Path) -> str:
    """nerfstudio's name of the data parser that reads a capture, by the files that are there.

    Raises:
        UserError: if none does; it says what to do with a folder of photos, or a video.
    """
    if capture.suffix == ".json" and capture.is_file():
        return "nerfstudio-data"
    for name, files in _KINDS.items():
        if all((capture / file).exists() for file in files):
            return name
    if not capture.exists():
        raise UserError(f"{capture}: no such folder; expected a capture: check the path")
    looked_for = "; ".join(" and ".join(files) for files in _KINDS.values())
    for kind, source in (("video", _find_video(capture)), ("images", _find_photos(capture))):
        if source is not None:
            command = ["ns-process-data", kind, "--data", str(source), "--output-dir", "OUT"]
            raise UserError(
                f"{capture}: {'a video' if kind == 'video' else 'photos'} without camera poses "
                f"(no {looked_for}); estimate them first: {shlex.join(command)}, then check OUT"
            )
    raise UserError(
        f"{capture}: not recognised as a capture; looked for {looked_for}; photos; a video: check "
        "the path, or name the data parser with --dataparser"
    )


def _folders(capture: Path) -> list[Path]:
    if not capture.is_dir():
        return []
    return [capture, *sorted(path for path in capture.iterdir() if path.is_dir())]


def _find_video(capture: Path) -> Path | None:
    candidates = [
        capture,
        *(path for folder in _folders(capture) for path in sorted(folder.iterdir())),
    ]
    return next((path for path in candidates if path.suffix.lower() in _VIDEOS), None)


def _find_photos(capture: Path) -> Path | None:
    """The folder, ``capture`` or one in it, that holds photos."""
    for folder in _folders(capture):
        if any(path.suffix.lower() in _PHOTOS for path in folder.iterdir()):
            return folder
    return None


def survey_capture(capture: Path, dataparser: str, *, has_gpu: bool) -> Survey:
    """Reads a capture through nerfstudio's data parser of that name.

    Args:
        capture: folder, or what else the data parser takes as its data.
        dataparser: a key of nerfstudio's ``all_dataparsers``.
        has_gpu: whether there is one to train with.
    """
    config = copy.deepcopy(all_dataparsers[dataparser])
    config.data = capture
    named, splits, faults = _read_splits(config)
    thumbnails: list[Thumbnail] = []
    if not any(fault.is_fatal for fault in faults):  # else the same would be said again
        thumbnails, undecodable = _decode(splits)
        faults += undecodable
    train = splits.get("train")
    has_cameras = not any(fault.kind == "intrinsics" and fault.is_fatal for fault in faults)
    if train is None or not train.image_filenames or not has_cameras:
        return Survey(capture, dataparser, named, splits, tuple(faults))
    photos = {path for outputs in splits.values() for path in outputs.image_filenames}
    sizes = Counter((header.width, header.height) for header in map(read_header, sorted(photos)))
    background = find_background(thumbnails)
    coverage = measure(train.cameras)
    suggestion = None
    if not any(fault.is_fatal for fault in faults):
        suggestion = suggest(capture, dataparser, train, coverage, background, has_gpu=has_gpu)
    return Survey(
        capture,
        dataparser,
        named,
        splits,
        tuple(faults),
        sizes=tuple((*size, count) for size, count in sizes.most_common()),
        background=background,
        thumbnails=tuple(thumbnails),
        coverage=coverage,
        suggestion=suggestion,
    )


def _read_splits(
    config: DataParserConfig,
) -> tuple[dict[str, int], dict[str, DataparserOutputs], list[Fault]]:
    """How many photos each split names, what can be used of it, and all faults, each once."""
    names: dict[str, list[Path]] = {}
    splits: dict[str, DataparserOutputs] = {}
    faults: list[Fault] = []
    with _quietly() as chatter:
        parser = config.setup()
        for split in ("train", "val", "test"):
            try:
                outputs = parse(parser, split)
            except (UserError, EOFError) as error:
                faults.append(_parser_fault(split, error, chatter.getvalue()))
                if split == "train":
                    break  # the others would say the same
                continue
            if split == "test" and outputs.image_filenames == names.get("val"):
                continue
            names[split] = list(outputs.image_filenames)
            usable, mended = mend(outputs, split)
            if any(fault.is_fatal for fault in mended):
                splits[split] = select_views(outputs, [])
                faults += mended
                continue
            splits[split] = usable
            faults += [*mended, *find_faults(usable, split)]
    named = {split: len(photos) for split, photos in names.items()}
    return named, splits, list(dict.fromkeys(faults))


def _parser_fault(split: str, error: Exception, chatter: str) -> Fault:
    what = str(error)
    if isinstance(error, EOFError):
        question = " ".join(chatter.split())[-200:]
        what = f"the data parser asks what check cannot answer: {question}: run ns-train and answer"
    consequence = {
        "train": "nothing can be trained",
        "val": "ns-train needs it to evaluate with",
        "test": "training works, but ns-eval will not",
    }[split]
    return Fault("unreadable", f"{split}: {what} ({consequence})", is_fatal=split != "test")


@contextlib.contextmanager
def _quietly() -> Iterator[io.StringIO]:
    """Holds back what parsers print, and lets their questions fail instead of waiting."""
    chatter, keyboard = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter):
            yield chatter
    finally:
        sys.stdin = keyboard


def _decode(splits: dict[str, DataparserOutputs]) -> tuple[list[Thumbnail], list[Fault]]:
    """Decodes all photos and masks as training does; returns some of those to train on, small."""
    num_photos = len(splits["train"].image_filenames)
    spread = np.linspace(0, num_photos - 1, min(_NUM_THUMBNAILS, num_photos)).round()
    shown = {("train", int(view)) for view in spread}
    views = [(split, view) for split in splits for view in range(_count(splits[split]))]

    def decode(key: tuple[str, int]) -> Thumbnail | CaptureError | None:
        outputs, view = splits[key[0]], key[1]
        path, cameras = outputs.image_filenames[view], outputs.cameras
        width, height = int(cameras.width[view]), int(cameras.height[view])
        try:
            photo = load_photo(path, width, height)
            if outputs.mask_filenames is not None:
                load_mask(outputs.mask_filenames[view], width, height)
        except CaptureError as error:
            return error
        if key not in shown:
            return None
        small = Image.fromarray(photo).convert("RGBA")
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        return Thumbnail(path.name, np.array(small))

    console = Console(stderr=True)
    with ThreadPoolExecutor() as pool:
        results = pool.map(decode, views)
        if console.is_terminal:
            results = track(results, "Decoding photos", len(views), console=console, transient=True)
        found = list(results)
    errors = [result for result in found if isinstance(result, CaptureError)]
    more = f" (and {len(errors) - 1} more photos or masks)" if len(errors) > 1 else ""
    faults = [Fault("unreadable", f"{errors[0]}{more}", is_fatal=True)] if errors else []
    return [result for result in found if isinstance(result, Thumbnail)], faults


def _count(outputs: DataparserOutputs) -> int:
    return len(outputs.image_filenames)


def find_background(thumbnails: Sequence[Thumbnail]) -> Background | None:
    """What is behind an object, by the photos' outermost pixels; None for surroundings."""
    votes: Counter[Background | None] = Counter()
    for _, pixels in thumbnails:
        border = np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))
        colours, is_clear = border[:, :3], border[:, 3] < 128
        shares: dict[Background, float] = {
            "transparent": float(is_clear.mean()),
            "white": float((~is_clear & (colours.min(axis=1) >= 250)).mean()),
            "black": float((~is_clear & (colours.max(axis=1) <= 5)).mean()),
        }
        plain: Iterator[Background] = (k for k, share in shares.items() if share >= _PLAIN_BORDER)
        votes[next(plain, None)] += 1
    kind, count = votes.most_common(1)[0] if votes else (None, 0)
    return kind if count >= _PLAIN_PHOTOS * len(thumbnails) else None
