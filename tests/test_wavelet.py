"""The plane transforms against PyWavelets, SciPy and, where it imports, pytorch_wavelets."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import pywt
import scipy.fft
import torch

from masked_wavelet_nerf.wavelet import (
    Bands,
    DCTTransform,
    IdentityTransform,
    WaveletTransform,
    make_transform,
)

WAVELETS = ["haar", "db2", "bior2.2", "bior4.4", "coif1", "sym4"]
SIZES = [(1, 1), (1, 7), (2, 1), (5, 33), (37, 50), (17, 16), (127, 129)]
# PyWavelets tabulates bior4.4 to some 12 digits: its own round trip is off by 2e-12.
TOLERANCE_FLOAT64 = {"bior4.4": 1e-11}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # Products this small gain nothing from threads, and wait for one another on a busy machine.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def random_plane(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Around zero: a mean would double at every level and take float32's digits with it.
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)


def flat(bands: Bands) -> list[torch.Tensor]:
    return [bands.approximation, *bands.details]


def oracle(plane: torch.Tensor, wavelet: str, num_levels: int) -> list[np.ndarray]:
    """PyWavelets' coefficients in float64 as [(C, h, w), (C, 3, h, w) coarse to fine…]."""
    approximation, *details = pywt.wavedec2(
        plane.double().numpy(), wavelet, mode="periodization", level=num_levels
    )
    return [approximation, *(np.stack(detail, axis=1) for detail in details)]


def worst(bands: list[torch.Tensor], expected: list[np.ndarray]) -> float:
    assert [tuple(b.shape) for b in bands] == [e.shape for e in expected]
    return max(
        float(np.abs(b.double().cpu().numpy() - e).max())
        for b, e in zip(bands, expected, strict=True)
    )


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize(
    ("num_levels", "size"),
    [(1, (6, 10)), (2, (24, 20)), (3, (40, 72)), (4, (160, 112)), (4, (16, 48)), (6, (128, 128))],
)
def test_coefficients_and_reconstruction_are_those_of_pywavelets(wavelet, num_levels, size):
    transform = WaveletTransform(wavelet, num_levels, level_scaling=False)
    plane = random_plane(3, *size)
    expected = oracle(plane, wavelet, num_levels)
    assert worst(flat(transform.forward(plane)), expected) <= 1e-5

    # Synthesis alone, from bands that no plane was analysed into.
    bands = [random_plane(*e.shape, seed=i) for i, e in enumerate(expected)]
    coefficients = [bands[0].numpy(), *(tuple(b.unbind(1)) for b in bands[1:])]
    plane = pywt.waverec2(coefficients, wavelet, mode="periodization")
    found = transform.inverse(Bands(bands[0], tuple(bands[1:])), size)
    assert np.abs(found.numpy() - plane).max() <= 1e-5


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("size", [(5, 33), (37, 50), (1, 7)])
def test_planes_of_any_size_are_padded_at_their_ends_with_the_last_texel(size):
    transform = WaveletTransform("bior4.4", 3, level_scaling=False)
    plane = random_plane(2, *size)
    padded = np.pad(plane.numpy(), [(0, 0), *((0, -n % 8) for n in size)], mode="edge")
    expected = oracle(torch.from_numpy(padded), "bior4.4", 3)
    assert worst(flat(transform.forward(plane)), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_levels", range(7))
@pytest.mark.parametrize("wavelet", ["haar", "bior4.4", "db2", "coif1"])
def test_inverse_undoes_forward_at_any_size(wavelet, num_levels, dtype):
    transform = WaveletTransform(wavelet, num_levels)
    tolerance = 1e-5 if dtype == torch.float32 else TOLERANCE_FLOAT64.get(wavelet, 1e-12)
    for size in SIZES:
        plane = random_plane(2, *size, dtype=dtype)
        bands = transform.forward(plane)
        assert tuple(b.shape[-2:] for b in flat(bands)) == transform.band_sizes(size)
        assert all(b.dtype == dtype for b in flat(bands))
        again = transform.inverse(bands, size)
        assert again.shape == plane.shape
        assert (again - plane).abs().max() <= tolerance


@pytest.mark.parametrize("wavelet", pywt.wavelist(kind="discrete"))
def test_every_discrete_wavelet_agrees_with_pywavelets(wavelet):
    # The tables of some PyWavelets families (dmey, db30 and up) reconstruct only to 1e-5 or so,
    # hence a comparison with it and no round trip.
    transform = WaveletTransform(wavelet, 1, level_scaling=False)
    plane = random_plane(1, 32, 8, dtype=torch.float64)
    bands = transform.forward(plane)
    expected = oracle(plane, wavelet, 1)
    assert worst(flat(bands), expected) <= 1e-12
    coefficients = [expected[0], tuple(expected[1].swapaxes(0, 1))]
    plane = pywt.waverec2(coefficients, wavelet, mode="periodization")
    assert np.abs(transform.inverse(bands, (32, 8)).numpy() - plane).max() <= 1e-12


@pytest.mark.parametrize("num_levels", [1, 3, 4])
def test_stored_details_are_true_ones_times_2_to_levels_plus_1(num_levels):
    plane = random_plane(2, 48, 32, dtype=torch.float64)
    true = WaveletTransform("bior4.4", num_levels, level_scaling=False).forward(plane)
    stored = WaveletTransform("bior4.4", num_levels).forward(plane)
    assert torch.equal(stored.approximation, true.approximation)
    assert len(stored.details) == num_levels
    for factor, a, b in zip(range(2, num_levels + 2), stored.details, true.details, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_texel_units_divide_by_2_at_each_level(dtype):
    size = (48, 32)
    plane = random_plane(2, *size, dtype=dtype)
    expected = flat(WaveletTransform("bior4.4", 3).forward(plane))
    stored = WaveletTransform("bior4.4", 3, texel_units=True)
    found = stored.forward(plane)
    for divisor, a, b in zip((8, 8, 4, 2), flat(found), expected, strict=True):
        torch.testing.assert_close(divisor * a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored.inverse(found, size), plane, rtol=0, atol=1e-5)
    even = stored.forward(torch.full((1, *size), 3.0, dtype=dtype))
    torch.testing.assert_close(even.approximation, torch.full_like(even.approximation, 3.0))


def test_level_factor_scales_the_gradient_of_the_inverse():
    size = (32, 32)
    plane = random_plane(1, *size, dtype=torch.float64)
    gradients = {}
    for level_scaling in (False, True):
        transform = WaveletTransform("db2", 2, level_scaling)
        bands = [b.requires_grad_() for b in flat(transform.forward(plane))]
        rendered = transform.inverse(Bands(bands[0], tuple(bands[1:])), size)
        gradients[level_scaling] = torch.autograd.grad((rendered * plane).sum(), bands)
    for factor, scaled, true in zip((1, 2, 3), gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(scaled * factor, true)


@pytest.mark.parametrize("num_levels", [0, 1, 3])
@pytest.mark.parametrize(
    ("wavelet", "size"), [("bior4.4", (5, 9)), ("db2", (8, 16)), ("haar", (1, 3))]
)
def test_gradcheck(wavelet, size, num_levels):
    transform = WaveletTransform(wavelet, num_levels)
    plane = random_plane(2, *size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(flat(transform.forward(x))), plane)
    bands = [b.detach().requires_grad_() for b in flat(transform.forward(plane))]
    inverse = lambda a, *d: transform.inverse(Bands(a, d), size)  # noqa: E731
    assert torch.autograd.gradcheck(inverse, bands)
    assert torch.autograd.gradgradcheck(inverse, bands)


@pytest.mark.parametrize("size", [(300, 300), (200, 333)])
def test_gradients_are_adjoints_at_sizes_of_many_blocks(size):
    transform = WaveletTransform("bior4.4", 4)
    plane = random_plane(2, *size, dtype=torch.float64).requires_grad_()
    bands = flat(transform.forward(plane))
    weights = [random_plane(*b.shape, dtype=torch.float64, seed=i) for i, b in enumerate(bands)]
    value = sum((b * w).sum() for b, w in zip(bands, weights, strict=True))
    (gradient,) = torch.autograd.grad(value, plane)
    # A linear f has <f(x), w> = <x, fᵀ(w)>, and the gradient of that product is fᵀ(w).
    torch.testing.assert_close((gradient * plane).sum(), value)

    leaves = [w.requires_grad_() for w in weights]
    rendered = transform.inverse(Bands(leaves[0], tuple(leaves[1:])), size)
    value = (rendered * plane.detach()).sum()
    gradients = torch.autograd.grad(value, leaves)
    inner = sum((g * w).sum() for g, w in zip(gradients, leaves, strict=True))
    torch.testing.assert_close(inner, value)


@pytest.mark.parametrize("transform", [WaveletTransform("bior4.4", 4), DCTTransform()], ids=str)
def test_both_directions_are_linear(transform):
    size = (45, 70)
    x, y = random_plane(2, *size), random_plane(2, *size, seed=1)
    bands_x, bands_y = flat(transform.forward(x)), flat(transform.forward(y))
    mixed = [2 * a - 3 * b for a, b in zip(bands_x, bands_y, strict=True)]
    for a, b in zip(flat(transform.forward(2 * x - 3 * y)), mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    rendered = transform.inverse(Bands(mixed[0], tuple(mixed[1:])), size)
    torch.testing.assert_close(rendered, 2 * x - 3 * y, rtol=0, atol=2e-5)


def test_channels_do_not_mix():
    transform = WaveletTransform()
    plane = random_plane(5, 50, 40)
    together = flat(transform.forward(plane))
    for i in range(5):
        alone = flat(transform.forward(plane[i : i + 1]))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_constant_plane_has_no_details(wavelet):
    transform = WaveletTransform(wavelet, 3)
    bands = transform.forward(torch.full((2, 21, 40), 0.75, dtype=torch.float64))
    # Every level doubles the mean: sqrt(2) per axis.
    torch.testing.assert_close(
        bands.approximation, torch.full((2, 3, 5), 6.0, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert max(d.abs().max() for d in bands.details) <= 1e-9


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (37, 50), (64, 64)])
def test_dct_is_the_orthonormal_one_of_scipy(size):
    transform = DCTTransform()
    plane = random_plane(3, *size, dtype=torch.float64)
    bands = transform.forward(plane)
    expected = scipy.fft.dctn(plane.numpy(), axes=(1, 2), norm="ortho")
    assert bands.details == ()
    assert np.abs(bands.approximation.numpy() - expected).max() <= 1e-12
    assert (transform.inverse(bands, size) - plane).abs().max() <= 1e-12
    assert transform.band_sizes(size) == (size,)


def test_dct_gradcheck():
    plane = random_plane(1, 3, 5, dtype=torch.float64).requires_grad_()
    transform = DCTTransform()
    assert torch.autograd.gradcheck(lambda x: transform.forward(x).approximation, plane)
    assert torch.autograd.gradcheck(lambda x: transform.inverse(Bands(x, ()), (3, 5)), plane)


def test_identity_keeps_the_plane():
    plane = random_plane(3, 5, 7)
    transform = IdentityTransform()
    assert transform.forward(plane).approximation is plane
    assert transform.inverse(Bands(plane, ()), (5, 7)) is plane
    assert transform.band_sizes((5, 7)) == ((5, 7),)


def test_transforms_are_equal_by_their_settings():
    assert make_transform() == make_transform("wavelet", wavelet="bior4.4", num_levels=4)
    assert len({make_transform(), make_transform(num_levels=3), make_transform("dct")}) == 3
    assert len({make_transform("identity"), IdentityTransform(), make_transform("dct")}) == 2
    assert [make_transform(n).num_levels for n in ("wavelet", "dct", "identity")] == [4, 0, 0]


@pytest.mark.parametrize("name", ["wavelet", "dct"])
def test_what_inference_cached_serves_training(name):
    # A size that no other test uses, so that the matrices are first made in inference mode.
    size = (23, 61)
    transform = make_transform(name, wavelet="rbio2.4", num_levels=2)
    plane = random_plane(2, *size)
    with torch.inference_mode():
        transform.inverse(transform.forward(plane), size)
    plane.requires_grad_()
    transform.inverse(transform.forward(plane), size).sum().backward()
    torch.testing.assert_close(plane.grad, torch.ones_like(plane))


@pytest.mark.parametrize("name", ["wavelet", "dct"])
def test_autocast_does_not_lower_the_precision(name):
    transform = make_transform(name)
    plane = random_plane(2, 40, 72).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bands = transform.forward(plane)
        again = transform.inverse(bands, (40, 72))
    again.sum().backward()
    assert bands.approximation.dtype == again.dtype == torch.float32
    torch.testing.assert_close(again, plane, rtol=0, atol=1e-5)
    torch.testing.assert_close(plane.grad, torch.ones_like(plane))


def test_inputs_in_any_memory_layout():
    transform = WaveletTransform(num_levels=2)
    plane = random_plane(33, 40, 6).permute(2, 0, 1)
    bands = transform.forward(plane)
    for a, b in zip(flat(bands), flat(transform.forward(plane.contiguous())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    strided = Bands(
        bands.approximation.mT.contiguous().mT,
        tuple(d.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for d in bands.details),
    )
    torch.testing.assert_close(transform.inverse(strided, (33, 40)), plane, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wavelet": "bior99"}, r"wavelet: expected .*discrete.* got 'bior99' \(no wavelet.*haar"),
        ({"wavelet": "mexh"}, r"wavelet: expected .*discrete.* got 'mexh' \(a continuous one"),
        ({"num_levels": 7}, r"num_levels: expected 0 to 6, got 7"),
        ({"num_levels": -1}, r"num_levels: expected 0 to 6, got -1"),
        ({"name": "fft"}, r"transform: expected 'wavelet', 'dct' or 'identity', got 'fft'"),
    ],
)
def test_settings_that_do_not_exist_are_refused(arguments, message):
    # Unwrapped: under the test run's type checker a wrong literal would not get as far.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(make_transform)(**arguments)


def test_bands_of_another_plane_are_refused():
    transform = WaveletTransform("haar", 2)
    bands = transform.forward(random_plane(2, 16, 16))
    with pytest.raises(ValueError, match=r"bands: expected shapes \[\(2, 5, 4\), .* \(20, 16\)"):
        transform.inverse(bands, (20, 16))
    with pytest.raises(ValueError, match=r"with 2 levels, got \[\(2, 4, 4\), \(2, 3, 4, 4\)\]"):
        transform.inverse(Bands(bands.approximation, bands.details[:1]), (16, 16))
    two = tuple(d[:, :2] for d in bands.details)
    with pytest.raises(ValueError, match=r"got \[\(2, 4, 4\), \(2, 2, 4, 4\)"):
        transform.inverse(Bands(bands.approximation, two), (16, 16))
    for other in (DCTTransform(), IdentityTransform()):
        with pytest.raises(ValueError, match=r"bands: expected shapes \[\(2, 16, 16\)\]"):
            other.inverse(bands, (16, 16))


@pytest.mark.parametrize("name", ["wavelet", "dct", "identity"])
def test_planes_of_another_kind_are_refused(name):
    transform = make_transform(name)
    with pytest.raises(TypeError, match=r"plane: expected float32 or float64, got torch.float16"):
        transform.forward(torch.zeros(1, 16, 16, dtype=torch.float16))
    # Unwrapped: what a user without a type checker is told.
    with pytest.raises(ValueError, match=r"plane: expected \(C, H, W\).* got \(2, 4\)"):
        inspect.unwrap(type(transform).forward)(transform, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"H, W >= 1, got \(1, 0, 4\)"):
        transform.forward(torch.zeros(1, 0, 4))
    bands = transform.forward(torch.zeros(1, 16, 16))
    half = Bands(bands.approximation.bfloat16(), tuple(d.bfloat16() for d in bands.details))
    with pytest.raises(TypeError, match=r"bands: expected float32 .* got torch.bfloat16"):
        transform.inverse(half, (16, 16))


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior4.4"])
def test_agrees_with_pytorch_wavelets(wavelet):
    peer = pytest.importorskip("pytorch_wavelets", reason="an optional peer", exc_type=ImportError)
    plane = random_plane(3, 96, 80)
    ours = WaveletTransform(wavelet, 2, level_scaling=False)
    bands = ours.forward(plane)
    low, high = peer.DWTForward(J=2, wave=wavelet, mode="periodization")(plane[None])
    torch.testing.assert_close(bands.approximation, low[0], rtol=0, atol=1e-5)
    for a, b in zip(bands.details, reversed(high), strict=True):
        torch.testing.assert_close(a, b[0], rtol=0, atol=1e-5)

    leaves = [b.requires_grad_() for b in flat(bands)]
    theirs = peer.DWTInverse(wave=wavelet, mode="periodization")
    rendered = ours.inverse(Bands(leaves[0], tuple(leaves[1:])), (96, 80))
    peers = theirs((leaves[0][None], [b[None] for b in leaves[:0:-1]]))[0]
    torch.testing.assert_close(rendered, peers, rtol=0, atol=1e-5)
    weight = random_plane(3, 96, 80, seed=1)
    for a, b in zip(
        torch.autograd.grad((rendered * weight).sum(), leaves),
        torch.autograd.grad((peers * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["wavelet", "dct"])
def test_cuda_agrees_with_cpu(name):
    transform = make_transform(name)
    plane = random_plane(3, 300, 77)
    results = []
    for device in ("cpu", "cuda"):
        x = plane.detach().to(device, copy=True).requires_grad_()
        bands = transform.forward(x)
        again = transform.inverse(bands, (300, 77))
        (again * x.detach()).sum().backward()
        results.append([t.detach().cpu() for t in (*flat(bands), again, x.grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
