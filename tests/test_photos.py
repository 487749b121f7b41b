"""Photos of all kinds, read as the colours that a viewer shows, and what is said of broken ones."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from PIL import ExifTags, Image

from masked_wavelet_nerf.dataparsers.captures import CaptureError, MissingCaptureError
from masked_wavelet_nerf.photos import (
    Fit,
    PhotoDataset,
    PhotoHeader,
    fit_photo,
    load_mask,
    load_photo,
    read_header,
)

WIDTH, HEIGHT = 12, 10


def gradient(width=WIDTH, height=HEIGHT, channels=3):
    """Red rises to the right, green downwards, blue is 30; alpha falls to the right."""
    y, x = np.mgrid[:height, :width]
    return np.stack([20 * x, 20 * y, np.full_like(x, 30), 255 - 20 * x], axis=2)[
        ..., :channels
    ].astype(np.uint8)


def save(path, pixels=None, **options):
    Image.fromarray(gradient() if pixels is None else pixels).save(path, **options)
    return path


def with_orientation(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def dataset(paths, *, masks=None, alpha_color=None, scale_factor=1.0, size=(WIDTH, HEIGHT), **meta):
    cameras = Cameras(
        camera_to_worlds=torch.eye(4)[None, :3].repeat(len(paths), 1, 1),
        fx=10.0,
        fy=10.0,
        cx=size[0] / 2,
        cy=size[1] / 2,
        width=size[0],
        height=size[1],
    )
    outputs = DataparserOutputs(
        image_filenames=paths,
        cameras=cameras,
        mask_filenames=masks,
        alpha_color=alpha_color,
        metadata=meta,
    )
    return PhotoDataset(outputs, scale_factor)


# --- colours --------------------------------------------------------------------------------------


def test_colours_stay_as_they_are(tmp_path):
    photo = load_photo(save(tmp_path / "a.png"), WIDTH, HEIGHT)
    np.testing.assert_array_equal(photo, gradient())
    assert photo.dtype == np.uint8


def test_grey_is_repeated(tmp_path):
    grey = gradient()[..., 0]
    photo = load_photo(save(tmp_path / "a.png", grey), WIDTH, HEIGHT)
    np.testing.assert_array_equal(photo, grey[..., None].repeat(3, axis=2))


def test_black_and_white(tmp_path):
    bits = gradient()[..., 0] > 100
    photo = load_photo(save(tmp_path / "a.png", bits), WIDTH, HEIGHT)
    np.testing.assert_array_equal(photo, 255 * bits[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, name):
    # 0xFFFF is white; a reader that takes the low byte would make 257 · 100 a 100 by chance.
    values = np.array([[0, 128, 129, 257 * 100, 0x8000, 0xFFFF]], dtype=np.uint16)
    photo = load_photo(save(tmp_path / name, values), 6, 1)
    assert photo[0].tolist() == [[v] * 3 for v in (0, 0, 1, 100, 128, 255)]


def test_sixteen_bit_colours_are_scaled(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), gradient().astype(np.uint16)[..., ::-1] * 257)
    np.testing.assert_array_equal(load_photo(tmp_path / "a.png", WIDTH, HEIGHT), gradient())


def test_more_than_sixteen_bits_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.full((HEIGHT, WIDTH), 70_000, np.int32))
    with pytest.raises(
        CaptureError, match=r"a\.tif: values of more than 16 bits; expected 8 or 16"
    ):
        load_photo(path, WIDTH, HEIGHT)
    path = save(tmp_path / "b.tif", np.full((HEIGHT, WIDTH), 0.5, np.float32))
    with pytest.raises(CaptureError, match=r"b\.tif: values of more than 16 bits"):
        load_photo(path, WIDTH, HEIGHT)


def save_palette(path, **options):
    """Left half red, right half blue, in a palette whose indices say neither."""
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[:, WIDTH // 2 :] = 1
    image = Image.fromarray(indices, "P")
    image.putpalette([200, 10, 20, 30, 40, 250])
    image.save(path, **options)
    return path


def test_palette(tmp_path):
    photo = load_photo(save_palette(tmp_path / "a.png"), WIDTH, HEIGHT)
    assert photo.shape == (HEIGHT, WIDTH, 3)
    assert photo[0, 0].tolist() == [200, 10, 20] and photo[0, -1].tolist() == [30, 40, 250]


def test_palette_with_transparency(tmp_path):
    path = save_palette(tmp_path / "a.png", transparency=1)
    photo = load_photo(path, WIDTH, HEIGHT)
    assert photo[0, 0].tolist() == [200, 10, 20, 255] and photo[0, -1].tolist() == [30, 40, 250, 0]


def test_alpha_stays(tmp_path):
    photo = load_photo(save(tmp_path / "a.png", gradient(channels=4)), WIDTH, HEIGHT)
    np.testing.assert_array_equal(photo, gradient(channels=4))


def test_grey_with_alpha(tmp_path):
    pixels = gradient(channels=4)
    photo = load_photo(save(tmp_path / "a.png", pixels[..., [0, 3]]), WIDTH, HEIGHT)
    np.testing.assert_array_equal(photo, pixels[..., [0, 0, 0, 3]])


def test_cmyk(tmp_path):
    Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    photo = load_photo(tmp_path / "a.jpg", WIDTH, HEIGHT)
    assert photo.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(photo[0, 0], [0, 255, 255], atol=3)  # cyan


@pytest.mark.parametrize("name", ["a.PNG", "b.JPG", "a photo – ünïcode 写真.jpeg"])
def test_names(tmp_path, name):
    folder = tmp_path / "my photos ü"
    folder.mkdir()
    path = folder / name
    flat = np.full((HEIGHT, WIDTH, 3), (10, 200, 90), np.uint8)
    save(path, flat, quality=100)
    np.testing.assert_allclose(load_photo(path, WIDTH, HEIGHT), flat, atol=3)
    assert read_header(path) == PhotoHeader(path, WIDTH, HEIGHT, "RGB", 1)


# --- turns and sizes ------------------------------------------------------------------------------

# What shows the stored picture as EXIF wants it.
SHOWN = {
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}


@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_turns_a_photo_whose_camera_is_turned(tmp_path, orientation):
    path = save(tmp_path / "a.png", exif=with_orientation(orientation))
    assert read_header(path).orientation == orientation
    np.testing.assert_array_equal(load_photo(path, HEIGHT, WIDTH), SHOWN[orientation](gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_does_not_turn_a_photo_whose_camera_is_not_turned(tmp_path, orientation):
    path = save(tmp_path / "a.png", exif=with_orientation(orientation))
    np.testing.assert_array_equal(load_photo(path, WIDTH, HEIGHT), gradient())


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_does_not_turn_square_photos(tmp_path, orientation):
    square = gradient(8, 8)
    path = save(tmp_path / "a.png", square, exif=with_orientation(orientation))
    np.testing.assert_array_equal(load_photo(path, 8, 8), square)


def test_exif_of_a_jpeg_and_of_a_smaller_camera(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 200
    path = save(tmp_path / "a.jpg", pixels, quality=95, exif=with_orientation(6))
    assert fit_photo(read_header(path), 20, 30) == Fit(is_turned=True, is_resized=True)
    photo = load_photo(path, 20, 30)
    assert photo.shape == (30, 20, 3)
    # The left half of what is stored is the upper half of what is shown.
    np.testing.assert_allclose(photo[:13], 200, atol=4)
    np.testing.assert_allclose(photo[17:], 0, atol=4)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_nonsense_in_exif_is_no_turn(tmp_path, orientation):
    path = save(tmp_path / "a.jpg", exif=with_orientation(orientation))
    assert read_header(path).orientation == 1


def test_another_size_is_averaged(tmp_path):
    # Every other column is white: picking pixels would leave black or white.
    pixels = np.zeros((40, 48, 3), np.uint8)
    pixels[:, ::2] = 255
    photo = load_photo(save(tmp_path / "a.png", pixels), WIDTH, HEIGHT)
    assert photo.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(photo[:, 1:-1], 127.5, atol=3)


@pytest.mark.parametrize(
    ("size", "camera"), [((4001, 3001), (1000, 750)), ((1000, 750), (4001, 3001)), ((1, 1), (1, 1))]
)
def test_shape_within_rounding(tmp_path, size, camera):
    header = PhotoHeader(tmp_path, *size, "RGB", 1)
    assert fit_photo(header, *camera) == Fit(is_turned=False, is_resized=size != camera)


@pytest.mark.parametrize(
    ("size", "camera", "orientation"),
    [
        ((120, 100), (100, 120), 1),  # turned, but EXIF does not say so
        ((120, 100), (100, 120), 3),
        ((120, 100), (120, 98), 1),  # cropped
        ((1000, 750), (1000, 1000), 6),
    ],
)
def test_another_shape_is_refused(tmp_path, size, camera, orientation):
    header = PhotoHeader(tmp_path / "a.png", *size, "RGB", orientation)
    message = (
        rf"a\.png: {size[0]} × {size[1]} pixels; expected the shape of its camera, "
        rf"{camera[0]} × {camera[1]}: use the photo"
    )
    with pytest.raises(CaptureError, match=message):
        fit_photo(header, *camera)


def test_loading_refuses_another_shape(tmp_path):
    with pytest.raises(CaptureError, match=r"a\.png: 12 × 10 pixels.*camera, 10 × 12"):
        load_photo(save(tmp_path / "a.png"), HEIGHT, WIDTH)


# --- broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_header, lambda path: load_photo(path, WIDTH, HEIGHT)])
def test_missing_and_unreadable(tmp_path, read):
    with pytest.raises(MissingCaptureError, match=r"a\.png: no such file; expected a photo"):
        read(tmp_path / "a.png")
    (tmp_path / "a.png").touch()
    with pytest.raises(CaptureError, match=r"a\.png: not an image \(0 bytes\); expected a photo"):
        read(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(CaptureError, match=r"b\.jpg: not an image \(16 bytes\)"):
        read(tmp_path / "b.jpg")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(CaptureError, match=r"c\.png: cannot be read: .*directory"):
        read(tmp_path / "c.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(tmp_path, name, share):
    rng = np.random.default_rng(0)
    path = save(tmp_path / name, rng.integers(0, 256, (80, 100, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert read_header(path)[1:4] == (100, 80, "RGB")
    with pytest.raises(CaptureError, match=rf"{name}: cannot be read: .*; expected a whole photo"):
        load_photo(path, 100, 80)


def test_headers_are_read_without_decoding(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert read_header(path).mode == "RGB"


def test_sizes_are_numbers(tmp_path):
    with pytest.raises(TypeCheckError):
        load_photo(save(tmp_path / "a.png"), "12", HEIGHT)


# --- masks ----------------------------------------------------------------------------------------


def half(width=WIDTH, height=HEIGHT):
    """Black on the left."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    return pixels


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "LA"])
def test_masks_in_all_modes(tmp_path, mode):
    Image.fromarray(half()).convert(mode).save(tmp_path / "m.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "m.png", WIDTH, HEIGHT), half() > 0)


def test_every_value_but_black_counts(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint16)
    pixels[0, :3] = 1, 200, 0xFFFF
    path = save(tmp_path / "m.png", pixels)
    np.testing.assert_array_equal(load_mask(path, WIDTH, HEIGHT), pixels > 0)


def test_mask_of_another_size(tmp_path):
    path = save(tmp_path / "m.png", half(60, 50))
    np.testing.assert_array_equal(load_mask(path, WIDTH, HEIGHT), half() > 0)
    with pytest.raises(CaptureError, match=r"m\.png: 60 × 50 pixels; .* 10 × 12"):
        load_mask(path, HEIGHT, WIDTH)


# --- data set -------------------------------------------------------------------------------------


def test_data_set_reads_photos_for_their_cameras(tmp_path):
    paths = [
        save(tmp_path / "a.png"),
        save(tmp_path / "b.png", gradient()[..., 0]),
        save(tmp_path / "c.png", gradient(HEIGHT, WIDTH), exif=with_orientation(6)),
        save(tmp_path / "d.png", gradient().repeat(2, axis=0).repeat(2, axis=1)),
    ]
    photos = dataset(paths)
    expected = [
        gradient(),
        gradient()[..., [0, 0, 0]],
        SHOWN[6](gradient(HEIGHT, WIDTH)),
    ]
    for view, pixels in enumerate(expected):
        data = photos[view]
        assert data["image_idx"] == view and set(data) == {"image_idx", "image"}
        torch.testing.assert_close(data["image"], torch.from_numpy(pixels / 255).float())
    resized = photos[3]["image"]
    assert resized.shape == (HEIGHT, WIDTH, 3)
    inner = (slice(1, -1), slice(1, -1))
    torch.testing.assert_close(
        resized[inner], torch.from_numpy(gradient() / 255).float()[inner], atol=0.02, rtol=0
    )
    assert photos.get_data(0, image_type="uint8")["image"].dtype == torch.uint8


def test_all_photos_have_alpha_if_one_has(tmp_path):
    paths = [
        save(tmp_path / "a.png"),
        save(tmp_path / "b.png", gradient(channels=4)),
        save_palette(tmp_path / "c.png"),
    ]
    first, second, third = dataset(paths)
    assert {tuple(data["image"].shape) for data in (first, second, third)} == {(10, 12, 4)}
    assert first["image"][..., 3].unique().tolist() == [1]
    torch.testing.assert_close(
        second["image"], torch.from_numpy(gradient(channels=4) / 255).float()
    )


def test_palette_transparency_alone_makes_alpha(tmp_path):
    paths = [save(tmp_path / "a.png"), save_palette(tmp_path / "c.png", transparency=0)]
    assert [data["image"].shape[-1] for data in dataset(paths)] == [4, 4]


def test_alpha_colour_replaces_transparency(tmp_path):
    paths = [save(tmp_path / "a.png"), save(tmp_path / "b.png", gradient(channels=4))]
    first, second = dataset(paths, alpha_color=torch.ones(3))
    pixels = gradient(channels=4) / 255
    blended = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
    torch.testing.assert_close(first["image"], torch.from_numpy(gradient() / 255).float())
    torch.testing.assert_close(second["image"], torch.from_numpy(blended).float())


def test_masks_of_a_data_set(tmp_path):
    paths = [save(tmp_path / "a.png")]
    masks = [save(tmp_path / "m.png", half(24, 20))]
    data = dataset(paths, masks=masks)[0]
    assert data["mask"].shape == (HEIGHT, WIDTH, 1)
    np.testing.assert_array_equal(data["mask"][..., 0], half() > 0)
    np.testing.assert_allclose(data["image"], gradient() / 255, atol=1e-6)
    coloured = dataset(paths, masks=masks, mask_color=(0.0, 1.0, 0.5))[0]["image"]
    np.testing.assert_allclose(coloured[0, 0], [0, 1, 0.5])
    np.testing.assert_allclose(coloured[:, 6:], gradient()[:, 6:] / 255, atol=1e-6)


def test_scaled_data_set(tmp_path):
    photos = dataset(
        [save(tmp_path / "a.png", exif=with_orientation(6))],
        masks=[save(tmp_path / "m.png", half(HEIGHT, WIDTH))],
        scale_factor=0.5,
        size=(HEIGHT, WIDTH),
    )
    data = photos[0]
    assert data["image"].shape == (6, 5, 3) and data["mask"].shape == (6, 5, 1)
    # Turned: red, which rises to the right of what is stored, rises downwards.
    assert data["image"][0, 2, 0] < 0.1 and data["image"][-1, 2, 0] > 0.7


def test_a_copy_of_the_capture_is_not_written_to(tmp_path):
    path = save(tmp_path / "a.png", exif=with_orientation(6))
    shutil.copy(path, tmp_path / "b.png")
    load_photo(path, HEIGHT, WIDTH)
    assert path.read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "b.png"]
