"""Photos as people's cameras and tools store them, read as 8-bit colours of their camera's size.

A photo fits its camera if it has its size, or its shape within rounding: some factor brings both
sides to less than one pixel off the camera's. EXIF says how a photo is to be turned, but what
estimated the poses may have ignored it; the camera's size says which it was. So a photo is turned
if, and only if, it fits turned and does not fit as stored. Turns that keep the size (square photos,
upside down, mirrored) show in no size: such photos stay as stored.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import ExifTags, Image, UnidentifiedImageError

from masked_wavelet_nerf.dataparsers.captures import CaptureError, MissingCaptureError

_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot decode."""
_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes the EXIF orientations that exchange width and height."""


class PhotoHeader(NamedTuple):
    """What a photo says of itself."""

    path: Path
    """The file."""
    width: int
    """Pixels, as stored."""
    height: int
    """Pixels, as stored."""
    mode: str
    """Pillow's name of the colours, as RGB, L or I;16."""
    orientation: int
    """EXIF's, 1 to 8; 1 where there is none."""


class Fit(NamedTuple):
    """What brings a photo to its camera's size; turning comes first."""

    is_turned: bool
    """As EXIF says."""
    is_resized: bool
    """By one factor, but for rounding."""


def read_header(path: Path) -> PhotoHeader:
    """Reads what a photo says of itself, without decoding it.

    Raises:
        MissingCaptureError: if there is no such file.
        CaptureError: if it is no photo.
    """
    with _opened(path) as image:
        return _header(path, image)


def fit_photo(header: PhotoHeader, width: int, height: int) -> Fit:
    """How a photo fits a camera of the given size, in pixels (see the module).

    Raises:
        CaptureError: if it does not.
    """
    stored, turned = (header.width, header.height), (header.height, header.width)
    if _has_shape(stored, width, height):
        return Fit(is_turned=False, is_resized=stored != (width, height))
    if header.orientation in _TURNS and _has_shape(turned, width, height):
        return Fit(is_turned=True, is_resized=turned != (width, height))
    raise CaptureError(
        f"{header.path}: {header.width} × {header.height} pixels; expected the shape of its "
        f"camera, {width} × {height}: use the photo that the poses were estimated from, or give "
        "this view its own w, h, fl_x, fl_y, cx and cy"
    )


def load_photo(path: Path, width: int, height: int) -> UInt8[np.ndarray, "H W C"]:
    """Reads a photo for a camera of the given size, in pixels.

    Grey, 16-bit, palette and CMYK photos become RGB, those with transparency RGBA; a photo that
    fits its camera turned (see the module) is turned, and one of another size is resized.

    Returns:
        the colours, from 0 to 255 as stored: C is 4 if the photo has transparency, else 3.

    Raises:
        MissingCaptureError: if there is no such file.
        CaptureError: if it cannot be decoded, or does not fit the camera.
    """
    with _opened(path) as image:
        fit = fit_photo(_header(path, image), width, height)
        colours = _to_colours(path, image)
        return np.array(_fitted(colours, image, fit, (width, height), Image.Resampling.BICUBIC))


def load_mask(path: Path, width: int, height: int) -> Bool[np.ndarray, "H W"]:
    """Reads which pixels of a photo count: those where its mask is not black.

    Masks fit cameras as photos do; those of another size take the nearest pixel's value.

    Raises:
        MissingCaptureError: if there is no such file.
        CaptureError: if it cannot be decoded, or does not fit the camera.
    """
    with _opened(path) as image:
        fit = fit_photo(_header(path, image), width, height)
        is_plain = image.mode in ("1", "L") or image.mode.startswith("I")
        counts = Image.fromarray(np.array(image if is_plain else image.convert("L")) != 0)
        return np.array(_fitted(counts, image, fit, (width, height), Image.Resampling.NEAREST))


class PhotoDataset(InputDataset):
    """nerfstudio's data set, with photos and masks read as this module says.

    If any photo has transparency that no ``alpha_color`` replaces, all photos have four channels.
    """

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "H W C"]:
        """The photo of a view, of its camera's size; C is 3 or 4.

        Raises:
            CaptureError: as :func:`load_photo` says.
        """
        photo = load_photo(self.image_filenames[image_idx], *self._size(image_idx))
        if self._has_alpha and photo.shape[2] == 3:
            photo = np.concatenate([photo, np.full_like(photo[..., :1], 255)], axis=2)
        return photo

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict:
        """The photo of a view, its mask if it has one, and what :meth:`get_metadata` adds.

        Raises:
            CaptureError: as :func:`load_photo` and :func:`load_mask` say.
        """
        is_float = image_type == "float32"
        image = self.get_image_float32(image_idx) if is_float else self.get_image_uint8(image_idx)
        data = {"image_idx": image_idx, "image": image}
        masks = self._dataparser_outputs.mask_filenames
        if masks is not None:
            mask = torch.from_numpy(load_mask(masks[image_idx], *self._size(image_idx)))[..., None]
            data["mask"] = mask
            if self.mask_color:
                colour = torch.tensor(self.mask_color) * (1 if is_float else 255)
                image[..., :3][~mask[..., 0]] = colour.to(image.dtype)
        data.update(self.get_metadata(data))
        return data

    @cached_property
    def _has_alpha(self) -> bool:
        if self._dataparser_outputs.alpha_color is not None:
            return False
        return any(_is_transparent(path) for path in self.image_filenames)

    def _size(self, image_idx: int) -> tuple[int, int]:
        return int(self.cameras.width[image_idx]), int(self.cameras.height[image_idx])


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except CaptureError:
        raise
    except FileNotFoundError as error:
        raise MissingCaptureError(
            f"{path}: no such file; expected a photo: copy it there or leave this view out"
        ) from error
    except UnidentifiedImageError as error:
        raise CaptureError(
            f"{path}: not an image ({path.stat().st_size} bytes); expected a photo as JPEG or PNG: "
            "copy or convert it again, or leave this view out"
        ) from error
    except _DAMAGE as error:
        raise CaptureError(
            f"{path}: cannot be read: {error}; expected a whole photo: copy it again or leave this "
            "view out"
        ) from error


def _header(path: Path, image: Image.Image) -> PhotoHeader:
    return PhotoHeader(path, *image.size, image.mode, _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        # A PNG's own method decodes all of it, in case EXIF comes last.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _is_transparent(path: Path) -> bool:
    with _opened(path) as image:
        return _channels(image) == "RGBA"


def _channels(image: Image.Image) -> Literal["RGB", "RGBA"]:
    # Grey and RGB may name one colour as transparent; nerfstudio takes that for opaque.
    if image.mode in ("L", "RGB") or not image.has_transparency_data:
        return "RGB"
    return "RGBA"


def _has_shape(size: tuple[int, int], width: int, height: int) -> bool:
    if size == (width, height):
        return True
    least = max((width - 1) / size[0], (height - 1) / size[1])
    most = min((width + 1) / size[0], (height + 1) / size[1])
    return least < most


def _to_colours(path: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.array(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
            raise CaptureError(
                f"{path}: values of more than 16 bits; expected 8 or 16 bits a colour: convert it"
            )
        # Rounded: 0xFFFF is 257 · 255.
        image = Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))
    return image.convert(_channels(image))


def _fitted(
    pixels: Image.Image,
    stored: Image.Image,
    fit: Fit,
    size: tuple[int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    if fit.is_turned:
        pixels = pixels.transpose(_TURNS[_orientation(stored)])
    return pixels.resize(size, resampling) if fit.is_resized else pixels
