"""Captures as people have them: mended where that is safe, and what else is wrong with them said.

Works on what any of nerfstudio's data parsers returns. A view is a photo with its camera and, if
there are any, its mask.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from nerfstudio.utils.io import load_from_json
from torch import Tensor

from masked_wavelet_nerf.dataparsers.captures import TOLERANCE, CaptureError, MissingCaptureError
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.photos import PhotoHeader, fit_photo, read_header

FaultKind = Literal[
    "missing",  # photos or masks that are not there
    "unreadable",  # files that are no photos, or a capture that its data parser cannot read
    "pose",  # poses that are no rotations and positions
    "empty",  # no view at all
    "few",  # too few photos
    "duplicate",  # the same photo twice
    "point",  # all cameras at one point
    "line",  # all cameras on a line
    "far",  # cameras far off the scene box
    "near",  # cameras next to no distance apart
    "intrinsics",  # focal lengths or principal points that no camera has
    "sizes",  # photos of several sizes
    "turned",  # photos that only fit as EXIF turns them
    "resized",  # photos of another size than their cameras
    "shape",  # photos of another shape than their cameras
    "mask",  # masks of another size or shape than their cameras
]

_ENOUGH_PHOTOS = 8
_LARGEST_STRETCH = 1.05
"""Between axes of a pose, above which it is no rotation with noise."""
_NOISE = 1e-6
"""Of positions, relative to how far from the origin they were measured: single precision's."""
_THINNEST_SPREAD = 0.02
"""Of positions across their longest direction, relative to along it."""
_LONGEST_REACH = 5.0
"""Of cameras from the scene box's centre, in half sides of the box or units: Blender's are at 4."""
_SHORTEST_REACH = 1e-3
_FIELD_OF_VIEW = (5.0, 175.0)
"""Degrees."""
_SPLITS = {"train": "training", "val": "evaluation", "test": "evaluation"}
_PARSER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What nerfstudio's data parsers raise for captures that they cannot read."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a capture."""

    kind: FaultKind
    """What sort of fault."""
    message: str
    """What is wrong, what was expected, what to do."""
    is_fatal: bool = False
    """Whether nothing can be trained."""


def parse(parser: DataParser, split: str, **kwargs: Any) -> DataparserOutputs:
    """Runs a data parser, past what would stop it for one view's sake.

    Views with poses that are not finite stay out of how nerfstudio orients, centres and scales
    the cameras; theirs come back with a rotation of NaN. A first photo that is missing is not the
    one that decides whether to use smaller copies of the photos.

    Raises:
        MissingCaptureError: if the capture, or a file that the parser needs, is not there.
        CaptureError: if the parser cannot read the capture.
    """
    # The class's: the data manager puts a mending one on its parser.
    generate = partial(type(parser).get_dataparser_outputs, parser, split=split, **kwargs)
    with _finite_poses_decide():
        try:
            try:
                return generate()
            except OSError:
                if not _settle_downscale_factor(parser):
                    raise
                return generate()
        except UserError:
            raise
        except _PARSER_ERRORS as error:
            raise _explain(parser, error) from error


def mend(outputs: DataparserOutputs, split: str) -> tuple[DataparserOutputs, list[Fault]]:
    """Drops views that cannot be used, and turns poses that nearly are rotations into rotations.

    Dropped are views whose photo or mask is missing or no image (by its header), and those whose
    pose is not finite, mirrors, or stretches one axis by more than 5 % over another. Other
    scale and shear is taken out of a pose if it is above 1e-3.

    Args:
        outputs: what a data parser returned; it stays as it is.
        split: train, val or test.

    Returns:
        the views that can be used, and what was wrong with the others; where none is left, a
        fatal fault for training, and no views for evaluation.
    """
    num_views = len(outputs.image_filenames)
    missing, unreadable = _check_files(outputs)
    poses, is_bent, is_wrong = _mend_poses(outputs.cameras.camera_to_worlds)
    bent, wrong = _where(is_bent, outputs), _where(is_wrong, outputs)
    dropped = {*missing, *unreadable, *is_wrong.nonzero()[:, 0].tolist()}
    left = [view for view in range(num_views) if view not in dropped]

    of, used = f"{num_views} for {_SPLITS[split]}", f"until then {len(left)} views are used"
    faults = []
    if missing:
        what, remedy = "photos or masks that are not there", "all that the capture names: copy them"
        faults.append(_fault("missing", what, [*missing.values()], of, f"{remedy} there; {used}"))
    if unreadable:
        what, remedy = "photos or masks that are no images", "JPEG or PNG: copy or convert them"
        paths = [*unreadable.values()]
        faults.append(_fault("unreadable", what, paths, of, f"{remedy} again; {used}"))
    if wrong:
        what, remedy = "poses that are not finite, mirror or stretch", "rotations: estimate them"
        faults.append(_fault("pose", what, wrong, of, f"{remedy} again; {used}"))
    if bent:
        what, remedy = "poses that are scaled or sheared", "rotations: export them without that"
        faults.append(_fault("pose", what, bent, of, f"{remedy}; the nearest rotations are used"))
    if not left and split == "train":
        are_missing = num_views > 0 and len(missing) == num_views
        where = outputs.image_filenames[0].parent if num_views else "the capture"
        said = "".join(f"; {fault.message}" for fault in faults)
        message = (
            f"{where}: none of {num_views} views can be used for training; expected photos with "
            f"poses: mend the capture or choose another split{said}"
        )
        return outputs, [*faults, Fault("missing" if are_missing else "empty", message, True)]
    if bent:
        cameras = dataclasses.replace(outputs.cameras, camera_to_worlds=poses)
        outputs = dataclasses.replace(outputs, cameras=cameras)
    return (outputs if len(left) == num_views else select_views(outputs, left)), faults


def select_views(outputs: DataparserOutputs, views: Sequence[int]) -> DataparserOutputs:
    """Some views of a capture, in the order given; metadata lists go along, others stay."""
    num_views = len(outputs.image_filenames)

    def selected(value: Any) -> Any:
        if isinstance(value, list) and len(value) == num_views:
            return [value[view] for view in views]
        # One number a view, as depth bounds; points and colours have more axes or are tuples.
        if isinstance(value, Tensor) and value.shape == (num_views,):
            return value[torch.tensor(views, dtype=torch.long)]
        return value

    return dataclasses.replace(
        outputs,
        image_filenames=selected(outputs.image_filenames),
        mask_filenames=selected(outputs.mask_filenames),
        cameras=outputs.cameras[torch.tensor(views, dtype=torch.long)],
        metadata={key: selected(value) for key, value in outputs.metadata.items()},
    )


def find_faults(outputs: DataparserOutputs, split: str) -> list[Fault]:
    """What is wrong with the views that :func:`mend` leaves, or will be changed as they are read.

    Headers are read and, of photos with equally many bytes, the bytes.

    Args:
        outputs: what a data parser or :func:`mend` returned.
        split: train, val or test.
    """
    photos = outputs.image_filenames
    if not photos:
        message = (
            f"no photos for {_SPLITS[split]}; expected some to measure quality on: give the "
            "capture more photos, or use another eval-mode or train-split-fraction; until then a "
            "few of those for training are measured, which flatters"
        )
        return [Fault("empty", message)]
    faults = [*_find_size_faults(outputs, split), *_find_intrinsics_faults(outputs)]
    if split != "train":
        return faults
    if len(photos) < _ENOUGH_PHOTOS:
        message = (
            f"{photos[0].parent}: too few photos for training: {len(photos)}; expected at least "
            f"{_ENOUGH_PHOTOS}, better 50 from all around: add photos"
        )
        faults.append(Fault("few", message))
    return [*faults, *_find_duplicates(photos), *_find_position_faults(outputs)]


# --- parsing --------------------------------------------------------------------------------------


@contextmanager
def _finite_poses_decide() -> Iterator[None]:
    """Keeps poses that are not finite out of the means and maxima in nerfstudio's parsers.

    One such pose would leave no camera where it is. No argument reaches those means, so for as
    long as a parser runs, the function that orients poses is one that sets them aside.
    """
    original = camera_utils.auto_orient_and_center_poses

    def orient(poses: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_finite = torch.isfinite(poses).flatten(1).all(dim=1)
        if is_finite.all() or not is_finite.any():
            return original(poses, *args, **kwargs)
        finite, transform = original(poses[is_finite], *args, **kwargs)
        oriented = torch.full((len(poses), *finite.shape[1:]), torch.nan, dtype=finite.dtype)
        oriented[..., 3] = 0  # what scales the poses takes the largest coordinate
        oriented[is_finite] = finite
        return oriented, transform

    camera_utils.auto_orient_and_center_poses = orient
    try:
        yield
    finally:
        camera_utils.auto_orient_and_center_poses = original


def _settle_downscale_factor(parser: DataParser) -> bool:
    """Lets nerfstudio choose by the first photo that can be read instead of the first named.

    Returns:
        Whether that was still to be settled and now is.
    """
    if not isinstance(parser, Nerfstudio) or parser.downscale_factor is not None:
        return False
    source = _source(parser)
    if not source.is_file():
        return False
    for frame in load_from_json(source)["frames"]:
        name = Path(frame["file_path"])
        try:
            read_header(source.parent / name)
        except CaptureError:
            continue
        parser._get_fname(name, source.parent)
        return True
    return False


def _source(parser: DataParser) -> Path:
    """The file, or else the folder, that a parser reads first."""
    data = parser.config.data
    if isinstance(parser, Nerfstudio) and data.suffix != ".json":
        return data / "transforms.json"
    return data


def _explain(parser: DataParser, error: Exception) -> CaptureError:
    data, source = parser.config.data, _source(parser)
    if not data.exists():
        return MissingCaptureError(
            f"{data}: no such capture; expected a folder of photos and poses: check the path given "
            "as --data"
        )
    if isinstance(error, FileNotFoundError):
        remedy = "copy it there"
        if isinstance(parser, Nerfstudio) and not source.exists():
            remedy = "run ns-process-data on the photos"
        return MissingCaptureError(
            f"{error.filename or error}: no such file; expected it in a capture for "
            f"{type(parser).__name__}: {remedy}, or name the data parser that reads {data}"
        )
    if isinstance(error, OSError):
        return CaptureError(
            f"{error.filename or source}: cannot be read: {error.strerror or error}; expected a "
            "file that this account may read: copy it again"
        )
    if isinstance(error, ZeroDivisionError):
        return CaptureError(
            f"{source}: all cameras stand at one point, which shows no depth; expected photos from "
            "several places: walk around what you photograph"
        )
    what = " ".join(str(error).split())
    if isinstance(error, KeyError):
        what = f"no entry {what}"
    expected = f"a capture as nerfstudio documents it for {type(parser).__name__}: mend it"
    if isinstance(parser, Nerfstudio):
        expected = (
            "fl_x, fl_y, cx, cy, w and h at its top or in every frame, and in every frame "
            "file_path and transform_matrix: add them or run ns-process-data again"
        )
    return CaptureError(f"{source}: {what or type(error).__name__}; expected {expected}")


# --- poses ----------------------------------------------------------------------------------------


def _mend_poses(
    poses: Float[Tensor, "N 3 4"],
) -> tuple[Float[Tensor, "N 3 4"], Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Poses with the nearest rotation, those that needed it, and those that none comes near to.

    With R = U S Vᵀ, the rotation nearest to R is U Vᵀ; S tells how R stretches.
    """
    is_finite = torch.isfinite(poses).flatten(1).all(dim=1)
    rotations = torch.where(
        is_finite[:, None, None], poses[..., :3], torch.eye(3, dtype=poses.dtype)
    ).double()
    left, stretch, right = torch.linalg.svd(rotations)
    stretch_ratio = stretch[:, 0] / stretch[:, 2].clamp(min=1e-12)
    is_wrong = ~is_finite | (torch.linalg.det(rotations) <= 0) | (stretch_ratio > _LARGEST_STRETCH)
    error = (rotations.mT @ rotations - torch.eye(3, dtype=torch.double)).abs().amax(dim=(1, 2))
    is_bent = ~is_wrong & (error > TOLERANCE)
    mended = torch.cat([(left @ right).to(poses.dtype), poses[..., 3:]], dim=2)
    return torch.where(is_bent[:, None, None], mended, poses), is_bent, is_wrong


def _find_position_faults(outputs: DataparserOutputs) -> list[Fault]:
    """Cameras from which no depth, or no scene, can be seen."""
    folder = outputs.image_filenames[0].parent
    positions = outputs.cameras.camera_to_worlds[..., 3].double()
    spread = torch.linalg.svdvals(positions - positions.mean(dim=0)) / math.sqrt(len(positions))
    # Parsers centre and scale: noise is relative to the coordinates before that.
    origin = outputs.dataparser_transform[:, 3].double() * outputs.dataparser_scale
    noise = _NOISE * float(origin.norm() + positions.norm(dim=1).max())
    if len(positions) > 1 and spread[0] <= noise:
        message = (
            f"{folder}: all {len(positions)} cameras stand at one point, which shows no depth; "
            "expected photos from several places: walk around what you photograph"
        )
        return [Fault("point", message)]
    faults = []
    if len(positions) > 2 and spread[1] < _THINNEST_SPREAD * spread[0]:
        message = (
            f"{folder}: all {len(positions)} cameras stand on a line, which shows depth in one "
            "direction only; expected photos from all around, or from several heights: add some"
        )
        faults.append(Fault("line", message))
    low, high = outputs.scene_box.aabb.double()
    half_side = max(1.0, float((high - low).max()) / 2)
    reach = (positions - (low + high) / 2).abs().amax(dim=1) / half_side
    is_far = reach > _LONGEST_REACH
    if is_far.any():
        expected = (
            f"at most {_LONGEST_REACH:g} half sides, not {float(reach.max()):.3g}: keep "
            "auto-scale-poses on, or use a smaller scale-factor"
        )
        what, far = "cameras far off the scene box", _where(is_far, outputs)
        faults.append(_fault("far", what, far, str(len(positions)), expected))
    elif reach.max() < _SHORTEST_REACH:
        message = (
            f"{folder}: all cameras are within {float(reach.max()):.3g} half sides of the scene "
            "box's centre; expected about 1: keep auto-scale-poses on, or use a larger scale-factor"
        )
        faults.append(Fault("near", message))
    return faults


def _find_intrinsics_faults(outputs: DataparserOutputs) -> list[Fault]:
    cameras, photos = outputs.cameras, outputs.image_filenames
    focal = torch.cat([cameras.fx, cameras.fy], dim=1).double()
    numbers = torch.cat([focal, cameras.cx, cameras.cy], dim=1)
    is_wrong = ~torch.isfinite(numbers).all(dim=1) | (focal <= 0).any(dim=1)
    if is_wrong.any():
        fx, fy, cx, cy = numbers[is_wrong][0].tolist()
        expected = (
            f"positive pixels, not fl_x {fx:g}, fl_y {fy:g}, cx {cx:g} and cy {cy:g}: calibrate "
            "the camera again"
        )
        wrong = _where(is_wrong, outputs)
        what = "cameras without a focal length"
        return [_fault("intrinsics", what, wrong, str(len(photos)), expected, is_fatal=True)]
    # A field of view of a spans a side of w pixels at focal length f: tan(a / 2) = w / 2f.
    size = torch.cat([cameras.width, cameras.height], dim=1)
    angle = torch.rad2deg(2 * torch.atan(size / (2 * focal)))
    least, most = _FIELD_OF_VIEW
    is_odd = ((angle < least) | (angle > most)).any(dim=1)
    is_odd &= cameras.camera_type[:, 0] == CameraType.PERSPECTIVE.value
    if not is_odd.any():
        return []
    across, down = angle[is_odd][0].tolist()
    what, odd = "cameras with an odd field of view", _where(is_odd, outputs)
    expected = (
        f"{least:g} to {most:g} degrees, not {across:.3g} by {down:.3g}: give fl_x and fl_y in "
        "pixels of w and h"
    )
    return [_fault("intrinsics", what, odd, str(len(photos)), expected)]


# --- photos ---------------------------------------------------------------------------------------


def _check_files(outputs: DataparserOutputs) -> tuple[dict[int, Path], dict[int, Path]]:
    """Photos or masks that are not there, and those that are no images, by view."""
    missing: dict[int, Path] = {}
    unreadable: dict[int, Path] = {}
    masks = outputs.mask_filenames or []
    for view, photo in enumerate(outputs.image_filenames):
        for path in (photo, *masks[view : view + 1]):
            try:
                read_header(path)
            except MissingCaptureError:
                missing.setdefault(view, path)
            except CaptureError:
                unreadable.setdefault(view, path)
    return missing, unreadable


def _find_size_faults(outputs: DataparserOutputs, split: str) -> list[Fault]:
    """Photos and masks that are changed to fit their cameras, or do not fit."""
    photos, cameras = outputs.image_filenames, outputs.cameras
    found: dict[FaultKind, list[PhotoHeader]] = defaultdict(list)
    faults = []
    for paths, is_mask in ((photos, False), (outputs.mask_filenames or [], True)):
        for view, path in enumerate(paths):
            try:
                header = read_header(path)
            except CaptureError:
                continue  # mend says so
            try:
                fit = fit_photo(header, *_size(cameras, view))
            except CaptureError as error:
                faults.append(Fault("mask" if is_mask else "shape", str(error), is_fatal=True))
                return faults
            if fit.is_resized:
                found["mask" if is_mask else "resized"].append(header)
            if fit.is_turned and not is_mask:
                found["turned"].append(header)
    sizes = {_size(cameras, view) for view in range(len(photos))}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} × {height}" for width, height in sorted(sizes)[:3])
        message = (
            f"{photos[0].parent}: photos of {len(sizes)} sizes for {_SPLITS[split]}, as {listed}; "
            "expected one size, which trains faster: use photos of one camera if there are enough"
        )
        faults.append(Fault("sizes", message))
    changes: tuple[tuple[FaultKind, str, str], ...] = (
        (
            "turned",
            "photos that fit their cameras only as EXIF turns them",
            "make sure that the poses were estimated from photos shown that way; they are turned",
        ),
        (
            "resized",
            "photos of another size than their cameras",
            "store them in their cameras' size to load faster; they are resized",
        ),
        (
            "mask",
            "masks of another size than their cameras",
            "store them in the photos' size; each pixel takes the nearest value",
        ),
    )
    for kind, what, remedy in changes:
        if found[kind]:
            of = f"{len(photos)} for {_SPLITS[split]}"
            first, paths = found[kind][0], [header.path for header in found[kind]]
            expected = f"their cameras' size, not {first.width} × {first.height}: {remedy}"
            faults.append(_fault(kind, what, paths, of, expected))
    return faults


def _find_duplicates(photos: Sequence[Path]) -> list[Fault]:
    by_length: dict[int, list[Path]] = defaultdict(list)
    for photo in photos:
        if photo.is_file():
            by_length[photo.stat().st_size].append(photo)
    by_content: dict[bytes, list[Path]] = defaultdict(list)
    for same_length in by_length.values():
        for photo in same_length if len(same_length) > 1 else ():
            by_content[hashlib.blake2b(photo.read_bytes()).digest()].append(photo)
    repeated = [same for same in by_content.values() if len(same) > 1]
    if not repeated:
        return []
    copies = [photo for same in repeated for photo in same[1:]]
    what, expected = "photos that are copies of others", "each once: remove copies"
    return [_fault("duplicate", what, copies, str(len(photos)), expected)]


def _size(cameras: Cameras, view: int) -> tuple[int, int]:
    return int(cameras.width[view]), int(cameras.height[view])


def _where(is_chosen: Bool[Tensor, " N"], outputs: DataparserOutputs) -> list[Path]:
    return [outputs.image_filenames[view] for view in is_chosen.nonzero()[:, 0].tolist()]


def _fault(
    kind: FaultKind,
    what: str,
    paths: Sequence[Path],
    of: str,
    expected: str,
    is_fatal: bool = False,
) -> Fault:
    """One of some views, of which at most three are named."""
    names = ", ".join(path.name for path in paths[:3])
    message = f"{paths[0].parent}: {what}: {len(paths)} of {of}, as {names}; expected {expected}"
    return Fault(kind, message, is_fatal)
