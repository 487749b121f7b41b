"""Compiled loops of transform, masks and quantiser against plain torch, PyWavelets and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from guards import assert_guards, channels_innermost, guarded

from masked_wavelet_nerf import native, native_kernels
from masked_wavelet_nerf.planes import FactorisedGrid, to_spatial
from masked_wavelet_nerf.rate import mask_penalty
from masked_wavelet_nerf.wavelet import WaveletTransform, make_transform

pytestmark = pytest.mark.usefixtures("small_work_is_split_too", "one_thread", "seed")


# --- banded products


def banded(rows: int, columns: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Rows of up to ``width`` entries with gaps, cyclic; the second row is empty."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((rows, columns))
    for i in range(rows):
        where = (i * columns // rows + np.arange(width)) % columns
        matrix[i, where] = rng.standard_normal(width) * (rng.random(width) < 0.8)
    matrix[1] = 0
    return matrix


@pytest.mark.parametrize("width", [1, 4, 5, 6, 13, 21])
@pytest.mark.parametrize(("rows", "columns"), [(22, 40), (40, 22), (21, 21)])
def test_taps_are_the_matrix(rows, columns, width):
    matrix = banded(rows, columns, width)
    index, value = native._taps(matrix)
    assert index.shape == value.shape and index.shape[1] % 5 == 0
    assert index.min() >= 0 and index.max() < columns
    dense = np.zeros((rows, columns))
    for i in range(rows):
        np.add.at(dense[i], index[i], value[i])
    np.testing.assert_allclose(dense, matrix, rtol=1e-6)


@pytest.mark.parametrize("inner", [1, 7, 20])
@pytest.mark.parametrize("width", [1, 5, 6, 21])
@pytest.mark.parametrize(("rows", "columns"), [(22, 40), (40, 22)])
def test_banded_row_equals_a_dense_one(rows, columns, width, inner):
    matrix = banded(rows, columns, width)
    taps = native._taps(matrix)
    before = [part.copy() for part in taps]
    source = np.random.default_rng(1).standard_normal((columns, inner)).astype(np.float32)
    behind = np.concatenate((np.full(3, np.nan, np.float32), source.reshape(-1)))
    dense = matrix @ source.astype(np.float64)

    def product(out, factor, add):
        for i in range(rows):
            scalars = np.float32(factor), out.reshape(-1), i * inner, inner, inner, add
            native_kernels.banded_row(behind, 3, taps, i, *scalars)

    for factor in (1.0, -0.25, 3.0, 0.0):
        # What is there before must not matter, unless it is to be added to.
        out = np.full((rows, inner), np.nan, np.float32)
        product(out, factor, False)
        np.testing.assert_allclose(out, factor * dense, rtol=1e-5, atol=1e-5)
        for more in (2.0, -0.5):
            before_adding = out.copy()
            product(out, more, True)
            np.testing.assert_allclose(out, before_adding + more * dense, rtol=1e-5, atol=1e-4)
    for part, copied in zip(taps, before, strict=True):
        np.testing.assert_array_equal(part, copied)


def circulant(rows: int, columns: int) -> np.ndarray:
    """A filter of five taps along one axis, with steps of two along the longer side, periodic."""
    short, long = sorted((rows, columns))
    dense = np.zeros((short, long))
    for i in range(short):
        for t in range(5):
            dense[i, (2 * i + t - 2) % long] += t + 1
    return dense if rows == short else dense.T


@pytest.mark.parametrize("inner", [1, 16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 1), (6, 12), (12, 6), (7, 13), (13, 7), (40, 80)]
)
def test_runs_of_rows_are_long_and_leave_the_product_as_it_is(shape, inner):
    matrix = circulant(*shape)
    longer = int(shape[0] < shape[1])
    apart = native._phases_apart(matrix, longer)
    even_first = [*range(0, shape[longer], 2), *range(1, shape[longer], 2)]
    np.testing.assert_array_equal(apart, matrix.take(even_first, axis=longer))
    taps = native._taps(apart)
    runs = native._runs(*taps)
    assert runs[:, 1].sum() == shape[0] and (runs[1:, 0] == runs[:-1].sum(axis=1)).all()
    if min(shape) == 40:  # but for the ends, a phase is one run
        assert len(runs) <= 8 and runs[:, 1].max() >= 36
    source = np.random.default_rng(1).standard_normal((shape[1], inner)).astype(np.float32)
    out = np.full((shape[0], inner), np.nan, np.float32)
    flat = source.reshape(-1), taps, runs, out.reshape(-1), 0, inner
    native_kernels.banded_rows(*flat, False)
    np.testing.assert_allclose(out, apart @ source, rtol=1e-5, atol=1e-5)
    native_kernels.banded_rows(*flat, True)
    np.testing.assert_allclose(out, 2 * apart @ source, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [(16, 24), (64, 48), (8, 8)])
@pytest.mark.parametrize("wavelet", ["haar", "bior4.4", "db20", "dmey"])
def test_transforms_equal_pywavelets(wavelet, size):
    """Long wavelets wrap around several times."""
    transform = WaveletTransform(wavelet, 2, level_scaling=False)
    plane = torch.randn(3, *size)
    bands = transform.forward(plane)
    expected = pywt.wavedec2(
        plane.double().numpy(), wavelet, mode="periodization", level=2, axes=(1, 2)
    )
    np.testing.assert_allclose(bands.approximation, expected[0], rtol=1e-4, atol=1e-4)
    for detail, three in zip(bands.details, expected[1:], strict=True):
        for i, band in enumerate(three):
            np.testing.assert_allclose(detail[:, i], band, rtol=1e-4, atol=1e-4)
    other = [torch.randn_like(t) for t in (bands.approximation, *bands.details)]
    back = transform.inverse(type(bands)(other[0], tuple(other[1:])), size)
    stored = [
        other[0].double().numpy(),
        *(tuple(t.double().numpy().swapaxes(0, 1)) for t in other[1:]),
    ]
    expected = pywt.waverec2(stored, wavelet, mode="periodization", axes=(1, 2))
    np.testing.assert_allclose(back, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("wavelet", ["bior4.4", "dmey"])
@pytest.mark.parametrize("size", [(37, 50), (5, 3)])
def test_transforms_and_gradients_equal_plain_torch(size, wavelet, direction):
    transform = WaveletTransform(wavelet, 2)
    bands = transform.forward(torch.randn(3, *size, dtype=torch.float64))
    inputs = [torch.randn(3, *size)] if direction == "forward" else None
    if inputs is None:
        inputs = [torch.randn(t.shape) for t in (bands.approximation, *bands.details)]

    def results(tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        if direction == "forward":
            out = transform.forward(leaves[0])
            outputs = [out.approximation, *out.details]
        else:
            outputs = [transform.inverse(type(bands)(leaves[0], tuple(leaves[1:])), size)]
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs)
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    found = results(inputs)
    turned = results([channels_innermost(t) for t in inputs])
    with native.disabled():
        expected = results(inputs)
    for a, b, c in zip(found, expected, turned, strict=True):
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(a, c)


@pytest.mark.parametrize("num_channels", [1, 5])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_banded_rows_stay_within_their_arrays(shape, num_channels):
    """What lies around source and output is neither read nor written."""
    matrix = circulant(*shape)
    longer = int(shape[0] < shape[1])
    apart = native._phases_apart(matrix, longer)
    taps = native._taps(apart)
    runs = native._runs(*taps)
    source, _ = guarded(
        np.random.default_rng(0).random((shape[1], num_channels), np.float32), np.nan
    )
    out, whole = guarded(np.full((shape[0] + 2, num_channels), 7, np.float32), 7)
    native_kernels.banded_rows(source, taps, runs, out, num_channels, num_channels, False)
    assert_guards(whole, 7)
    table = out.reshape(-1, num_channels)
    assert (table[0] == 7).all() and (table[-1] == 7).all()
    expected = apart @ source.reshape(-1, num_channels)
    np.testing.assert_allclose(table[1:-1], expected, rtol=1e-5, atol=1e-6)


# --- masks, quantiser and transform together


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("transform", ["identity", "wavelet"])
def test_grids_equal_plain_torch(transform, bits):
    """Without a transform to the last bit: the codec's integers depend on it."""
    made = make_transform(transform, num_levels=2)
    grid = FactorisedGrid(3, (7, 10, 13), made, bits=bits)
    num_levels = made.num_levels
    upstream = [torch.randn(t.shape) for kind in grid()[0] for t in kind]
    for member in grid.grids:
        for values, logits in zip(member.coefficients, member.logits, strict=True):
            torch.nn.init.normal_(logits)
            logits.data[(0,) * logits.ndim] = 0.25  # on the threshold
            values.data[(-1,) * values.ndim] = 0

    def results(threshold):
        spatial, kept = grid(None, threshold)
        shown = [*spatial.planes, *spatial.lines]
        return shown, kept, torch.autograd.grad(shown, list(grid.parameters()), upstream)

    for threshold in (0.0, 0.25, -100.0, 100.0):
        for scale in (1.0, 1e-30, 0.0):
            with torch.no_grad():
                for member in grid.grids:
                    for values in member.coefficients:
                        values *= scale
            shown, kept, gradients = results(threshold)
            with native.disabled():
                expected, expected_kept, expected_gradients = results(threshold)
            for a, b in zip(shown, expected, strict=True):
                if num_levels == 0 or a.ndim == 2:
                    assert torch.equal(a, b)
                else:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
            for a, b in zip(kept, expected_kept, strict=True):
                assert a.dtype == torch.int64 and torch.equal(a, b)
            for a, b in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
        with torch.no_grad():
            for member in grid.grids:
                for values in member.coefficients:
                    values.copy_(torch.randn_like(values))


@pytest.mark.parametrize("transform", ["identity", "wavelet"])
def test_the_sum_of_logits_comes_with_its_gradient(transform):
    """As if it were taken of the logits themselves, beside what flows through planes and lines."""
    made = make_transform(transform, num_levels=2)
    grids = [FactorisedGrid(num, (7, 10, 13), made) for num in (2, 3)]
    parameters = [p for grid in grids for p in grid.parameters()]
    logits = [p for grid in grids for part in grid.grids for p in part.logits]
    for some in logits:
        torch.nn.init.normal_(some)

    def results(with_loops: bool):
        by_grid, logit_sum = to_spatial(grids)
        assert (logit_sum is not None) == with_loops
        if logit_sum is None:
            logit_sum = mask_penalty(logits, "sum")
        spatial = [t for (found, _) in by_grid for kind in found for t in kind]
        loss = sum(t.square().sum() for t in spatial) - 0.3 * logit_sum
        return logit_sum.detach(), torch.autograd.grad(loss, parameters)

    found, gradients = results(True)
    with native.disabled():
        expected, expected_gradients = results(False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def random_prices(part) -> list[torch.Tensor]:
    return [torch.randint(1, 256, logits.shape, dtype=torch.uint8) for logits in part.logits]


def grids_with_quantisers_of_their_own(transform: str) -> list[FactorisedGrid]:
    made = make_transform(transform, num_levels=2)
    grids = [FactorisedGrid(num, (7, 10, 13), made) for num in (2, 3)]
    for part in (part for grid in grids for part in grid.grids):
        part.set_largest(torch.randint(1, 128, (len(part.logits),)).tolist())
        for some in part.logits:
            torch.nn.init.normal_(some)
    return grids


@pytest.mark.parametrize("transform", ["identity", "wavelet"])
def test_quantisers_and_prices_of_levels_equal_plain_torch(transform):
    """Planes, counts, the priced sum of logits, and all gradients."""
    grids = grids_with_quantisers_of_their_own(transform)
    parts = [part for grid in grids for part in grid.grids]
    for part in parts:
        part.set_prices(random_prices(part))
    parameters = [p for grid in grids for p in grid.parameters()]
    upstream = [torch.randn(2 + n // 6, *part.spatial_size) for n, part in enumerate(parts)]

    def results(threshold: float):
        by_grid, logit_sum = to_spatial(grids, threshold=threshold)
        if logit_sum is None:
            logits = [some for part in parts for some in part.logits]
            prices = [price for part in parts for price in part.prices]
            logit_sum = mask_penalty(logits, "rate", prices)
        shown = [t for (spatial, _) in by_grid for kind in spatial for t in kind]
        kept = [count for (_, counts) in by_grid for count in counts]
        loss = sum((a * b).sum() for a, b in zip(shown, upstream, strict=True)) - 0.3 * logit_sum
        return shown, kept, logit_sum, torch.autograd.grad(loss, parameters)

    total = sum(
        float((some.double() * price).sum()) / 80
        for part in parts
        for some, price in zip(part.logits, part.prices, strict=True)
    )
    assert abs(total) > 10
    for threshold in (0.0, 0.5, 100.0):
        shown, kept, logit_sum, gradients = results(threshold)
        with native.disabled():
            expected, expected_kept, _, expected_gradients = results(threshold)
        for a, b in zip(shown, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
        assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept, strict=True))
        assert float(logit_sum) == pytest.approx(total, rel=1e-5)
        for a, b in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("transform", ["identity", "wavelet"])
def test_the_gradient_of_the_sum_is_the_price(transform):
    """In units of ten bits, beside grids without prices, where all weigh one."""
    grids = grids_with_quantisers_of_their_own(transform)
    for number, part in enumerate(part for grid in grids for part in grid.grids):
        part.set_prices(random_prices(part) if number % 2 else None)
    parts = [part for grid in grids for part in grid.grids]
    logits = [some for part in parts for some in part.logits]
    _, logit_sum = to_spatial(grids)
    found = iter(torch.autograd.grad(2 * logit_sum, logits))
    for part in parts:
        for level, some in enumerate(part.logits):
            expected = part.prices[level] / 40 if part.prices else torch.full_like(some, 2)
            torch.testing.assert_close(next(found), expected)
    weights = [price / 80 for part in parts for price in part.prices or [80] * len(part.logits)]
    total = sum(float((m.double() * w).sum()) for m, w in zip(logits, weights, strict=True))
    assert float(logit_sum) == pytest.approx(total, rel=1e-5)


def test_prices_lie_in_memory_as_logits_do():
    """They would be copied in every step otherwise."""
    (grid, _) = grids_with_quantisers_of_their_own("wavelet")
    for part in grid.grids:
        part.set_prices(random_prices(part))
        for price, some in zip(part.prices, part.logits, strict=True):
            assert price.stride() == some.stride()


def test_only_what_the_loops_can_do_goes_through_them(monkeypatch):
    calls = []
    original = native.masked_spatial
    monkeypatch.setattr(native, "masked_spatial", lambda *a: calls.append(a) or original(*a))
    wavelet = make_transform("wavelet", num_levels=2)
    size = (7, 10, 13)
    FactorisedGrid(2, size, wavelet)()
    FactorisedGrid(2, size, wavelet)(2)
    assert len(calls) == 2
    FactorisedGrid(2, size, wavelet)(1)  # fewer levels
    FactorisedGrid(2, size, wavelet, bits=None)()
    FactorisedGrid(2, size, wavelet, masked=False)()
    FactorisedGrid(2, size, make_transform("dct"))()
    FactorisedGrid(2, size, wavelet).double()()
    with native.disabled():
        FactorisedGrid(2, size, wavelet)()
    assert len(calls) == 2


def test_slope_of_the_sigmoid():
    logits = np.concatenate((np.linspace(-90, 90, 10007), [0, np.inf, -np.inf, 1e30, -1e30]))
    out = np.empty(len(logits), np.float32)
    native_kernels._sigmoid_slope(logits.astype(np.float32), out)
    e = np.exp(-np.abs(logits.astype(np.float32).astype(np.float64)))
    np.testing.assert_allclose(out, e / (1 + e) ** 2, rtol=1e-5, atol=1e-37)
