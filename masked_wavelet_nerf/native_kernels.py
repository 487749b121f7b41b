"""Loops that :mod:`masked_wavelet_nerf.native` compiles with numba; nothing here knows torch.

Arrays come flat, with channels innermost, and indices are unsigned: only then does LLVM see plain
contiguous loops over channels and turn them into vector instructions (signed ones would be checked
for Python's negative indices: three to six times slower).

Letters: C channels, H, W plane size, L line length, N points, R rays, S places on a ray.
"""

# ruff: noqa: E741
from __future__ import annotations

import functools
import inspect
import math

import numba
import numpy as np

_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # NaN and infinity keep their meaning
_EXACT = {"nsz"}  # v / Δ has to round as the codec's does: no reciprocals

_u64 = np.uint64
_i32 = np.int32
_f32 = np.float32
_PLACES_AT_ONCE = 64
_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)


def _jit(function, fastmath=_FASTMATH):
    # Tests check the types of every function by a wrapper, which numba cannot compile.
    function = inspect.unwrap(function)
    options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep compiled code: once per process, then
        return numba.njit(**options)(function)


_jit_exact = functools.partial(_jit, fastmath=_EXACT)


@_jit
def _texel(position, size):
    # Border padding, align_corners=True. Clamped once more as an integer: NaN has to stay inside.
    last = _f32(size - 1)
    texel = min(max((position + _f32(1)) * _f32(0.5) * last, _f32(0)), last)
    first = max(min(np.int32(texel), np.int32(size - 2)), np.int32(0))
    return _u64(first), texel - _f32(first)


@_jit
def _neighbours(points, n, shape, axes):
    """Where point n's texels start: of its row, the next row, the line; and all their weights."""
    H, W, L, C = shape
    x, fx = _texel(points[n, axes[0]], W)
    y, fy = _texel(points[n, axes[1]], H)
    z, fz = _texel(points[n, axes[2]], L)
    gx, gy, gz = _f32(1) - fx, _f32(1) - fy, _f32(1) - fz
    a = (y * _u64(W) + x) * _u64(C)
    b = a + _u64(W) * _u64(C)
    return a, b, z * _u64(C), gx * gy, fx * gy, gx * fy, fx * fy, gz, fz


@_jit
def features(points, plane, line, shape, axes, out, width, offset, start, stop):
    """Writes plane · line at points ``start … stop - 1`` into ``out[:, offset : offset + C]``."""
    C = shape[3]
    step = _u64(C)
    for n in range(start, stop):
        a, b, l, w00, w01, w10, w11, gz, fz = _neighbours(points, n, shape, axes)
        o = _u64(n) * _u64(width) + _u64(offset)
        for k in range(C):
            c = _u64(k)
            p = w00 * plane[a + c] + w01 * plane[a + step + c]
            p += w10 * plane[b + c] + w11 * plane[b + step + c]
            out[o + c] = p * (gz * line[l + c] + fz * line[l + step + c])


@_jit
def summed_features(points, plane, line, shape, axes, out, start, stop):
    """Adds Σ_c plane · line at points ``start … stop - 1`` to ``out``."""
    C = shape[3]
    step = _u64(C)
    for n in range(start, stop):
        a, b, l, w00, w01, w10, w11, gz, fz = _neighbours(points, n, shape, axes)
        total = _f32(0)
        for k in range(C):
            c = _u64(k)
            p = w00 * plane[a + c] + w01 * plane[a + step + c]
            p += w10 * plane[b + c] + w11 * plane[b + step + c]
            total += p * (gz * line[l + c] + fz * line[l + step + c])
        out[n] += total


@_jit
def features_backward(
    points, plane, line, shape, axes, gradient, offset, plane_out, line_out, start, stop
):
    """Writes what points ``start … stop - 1`` give to the gradients of plane and line.

    ``gradient`` is that of :func:`features`, (N, width), read from column ``offset`` on; or, where
    its width is 1, that of :func:`summed_features`, the same for all channels.
    """
    C = shape[3]
    step = _u64(C)
    plane_out[:] = _f32(0)
    line_out[:] = _f32(0)
    width = gradient.shape[1]
    flat = gradient.reshape(-1)
    # One loop for each of the six targets: with one pointer to write through and one to read,
    # LLVM's check that they do not overlap is cheap, and the loop becomes vector instructions.
    of_line, of_plane = np.empty(C, _f32), np.empty(C, _f32)
    for n in range(start, stop):
        a, b, l, w00, w01, w10, w11, gz, fz = _neighbours(points, n, shape, axes)
        if width == 1:
            scale = flat[_u64(n)]
            for k in range(C):
                c = _u64(k)
                p = w00 * plane[a + c] + w01 * plane[a + step + c]
                of_line[c] = (p + w10 * plane[b + c] + w11 * plane[b + step + c]) * scale
                of_plane[c] = (gz * line[l + c] + fz * line[l + step + c]) * scale
        else:
            o = _u64(n) * _u64(width) + _u64(offset)
            for k in range(C):
                c = _u64(k)
                p = w00 * plane[a + c] + w01 * plane[a + step + c]
                p += w10 * plane[b + c] + w11 * plane[b + step + c]
                of_line[c] = p * flat[o + c]
                of_plane[c] = (gz * line[l + c] + fz * line[l + step + c]) * flat[o + c]
        for k in range(C):
            line_out[l + _u64(k)] += gz * of_line[_u64(k)]
        for k in range(C):
            line_out[l + step + _u64(k)] += fz * of_line[_u64(k)]
        for k in range(C):
            plane_out[a + _u64(k)] += w00 * of_plane[_u64(k)]
        for k in range(C):
            plane_out[a + step + _u64(k)] += w01 * of_plane[_u64(k)]
        for k in range(C):
            plane_out[b + _u64(k)] += w10 * of_plane[_u64(k)]
        for k in range(C):
            plane_out[b + step + _u64(k)] += w11 * of_plane[_u64(k)]


@_jit
def banded_row(source, start, taps, i, factor, out, o, stride, width, add):
    """``out[o + k] (+)= factor · Σ_t values[i, t] · source[start + columns[i, t] · stride + k]``.

    For k < ``width``; ``taps`` = (columns, values). Taps come in fives, which is what bior4.4 has
    at most for a sample.
    """
    columns, values = taps
    m, o, start = _u64(stride), _u64(o), _u64(start)
    for t in range(0, columns.shape[1], 5):
        v0, v1, v2 = values[i, t] * factor, values[i, t + 1] * factor, values[i, t + 2] * factor
        v3, v4 = values[i, t + 3] * factor, values[i, t + 4] * factor
        a = start + _u64(columns[i, t]) * m
        b = start + _u64(columns[i, t + 1]) * m
        c = start + _u64(columns[i, t + 2]) * m
        d = start + _u64(columns[i, t + 3]) * m
        e = start + _u64(columns[i, t + 4]) * m
        if add or t > 0:
            for k in range(width):
                q = _u64(k)
                s = v0 * source[a + q] + v1 * source[b + q] + v2 * source[c + q]
                out[o + q] += s + v3 * source[d + q] + v4 * source[e + q]
        else:
            for k in range(width):
                q = _u64(k)
                s = v0 * source[a + q] + v1 * source[b + q] + v2 * source[c + q]
                out[o + q] = s + v3 * source[d + q] + v4 * source[e + q]


@_jit
def banded_rows(source, taps, runs, out, o, channels, add):
    """All rows of a banded matrix times ``source``, (columns, C), into (rows, C) from ``o`` on.

    The rows of a run, (first, count), are each the one before it, moved on by a column: they are
    one long row together, which is what makes few channels fast.
    """
    for run in range(len(runs)):
        first, count = runs[run, 0], runs[run, 1]
        at, width = o + first * channels, count * channels
        banded_row(source, 0, taps, first, _f32(1), out, at, channels, width, add)


@_jit
def _taps(levels, level):
    """Taps of a level's four matrices (rows low, high, columns low, high), runs of the last two."""
    return (
        _taps_of(levels, level, 0),
        _taps_of(levels, level, 1),
        _taps_of(levels, level, 2),
        _taps_of(levels, level, 3),
        _runs_of(levels, level, 2),
        _runs_of(levels, level, 3),
    )


@_jit
def _taps_of(levels, level, matrix):
    offset, num_rows, _, width, _, _ = levels.table[level, matrix]
    stop = offset + num_rows * width
    columns = levels.columns[offset:stop].reshape(num_rows, width)
    return columns, levels.values[offset:stop].reshape(num_rows, width)


@_jit
def _runs_of(levels, level, matrix):
    return levels.runs[levels.table[level, matrix, 4] : levels.table[level, matrix, 5]]


# A level is merged and split row by row, along both axes at once: what lies between the two axes,
# and the few rows that a row depends on, then stay in the cache.


@_jit
def _in_phases(j, W, channels):
    """Where column j starts in a row of even columns, then odd ones: see Levels."""
    return _u64((j // 2 + j % 2 * ((W + 1) // 2)) * channels)


@_jit
def _merge_row(i, plane, details, taps, factor, size, channels, low, high, phases, out):
    """Row i of a level's plane, from the (h, w, C) below it and the details, (3, h, w, C).

    ``size`` = (h, w, W); ``low``, ``high`` and ``phases`` are room for a row each.
    """
    one = _f32(1)
    h, w, W = size
    row_low, row_high, column_low, column_high, runs_low, runs_high = taps
    width = w * channels
    band = h * width
    banded_row(plane, 0, row_low, i, one, low, 0, width, width, False)
    banded_row(details, 0, row_high, i, factor, low, 0, width, width, True)
    banded_row(details, band, row_low, i, factor, high, 0, width, width, False)
    banded_row(details, 2 * band, row_high, i, factor, high, 0, width, width, True)
    banded_rows(low, column_low, runs_low, phases, 0, channels, False)
    banded_rows(high, column_high, runs_high, phases, 0, channels, True)
    for j in range(W):
        o, a = _u64((i * W + j) * channels), _in_phases(j, W, channels)
        for k in range(channels):
            out[o + _u64(k)] = phases[a + _u64(k)]


@_jit
def merge_levels(bands, levels, channels):
    """A plane, (H, W, C), from its bands: (h, w, C), then (3, h, w, C) of every level."""
    num_levels = levels.table.shape[0]
    plane = bands
    start = levels.table[0, 0, 2] * levels.table[0, 2, 2] * channels if num_levels else 0
    for level in range(num_levels):
        H, h = levels.table[level, 0, 1:3]
        W, w = levels.table[level, 2, 1:3]
        taps, factor = _taps(levels, level), levels.factors[level]
        low, high = np.empty(w * channels, _f32), np.empty(w * channels, _f32)
        out, phases = np.empty(H * W * channels, _f32), np.empty(W * channels, _f32)
        for i in range(H):
            _merge_row(
                i, plane, bands[start:], taps, factor, (h, w, W), channels, low, high, phases, out
            )
        plane = out
        start += 3 * h * w * channels
    return plane


@_jit
def _split_columns(i, plane, taps, size, channels, low, high, phases):
    """Row i of a plane, (H, W, C), along its columns into row i of low and high, (H, w, C)."""
    w, W = size
    _, _, column_low, column_high, runs_low, runs_high = taps
    for j in range(W):
        o, a = _u64((i * W + j) * channels), _in_phases(j, W, channels)
        for k in range(channels):
            phases[a + _u64(k)] = plane[o + _u64(k)]
    banded_rows(phases, column_low, runs_low, low, i * w * channels, channels, False)
    banded_rows(phases, column_high, runs_high, high, i * w * channels, channels, False)


@_jit
def _split_row(r, plane, taps, factor, size, channels, low, high, phases, done, out, details):
    """Row r of the (h, w, C) below a plane, and of its details, into ``details``, (3, w, C).

    ``size`` = (w, W); ``done`` says which rows of ``low`` and ``high`` there are already.
    """
    row_low, row_high = taps[0], taps[1]
    for columns in (row_low[0], row_high[0]):
        for t in range(columns.shape[1]):
            i = columns[r, t]
            if not done[i]:
                _split_columns(i, plane, taps, size, channels, low, high, phases)
                done[i] = True
    width = size[0] * channels
    banded_row(low, 0, row_low, r, _f32(1), out, r * width, width, width, False)
    banded_row(low, 0, row_high, r, factor, details, 0, width, width, False)
    banded_row(high, 0, row_low, r, factor, details, width, width, width, False)
    banded_row(high, 0, row_high, r, factor, details, 2 * width, width, width, False)


@_jit
def split_levels(plane, levels, channels):
    """The bands of a plane, laid out as :func:`merge_levels` takes them."""
    num_levels = levels.table.shape[0]
    if num_levels == 0:
        return plane
    stop = levels.table[0, 0, 1] * levels.table[0, 2, 1] * channels
    for level in range(num_levels):
        stop += 3 * levels.table[level, 0, 1] * levels.table[level, 2, 1] * channels
    bands = np.empty(stop, _f32)
    for level in range(num_levels - 1, -1, -1):
        h, H = levels.table[level, 0, 1:3]
        w, W = levels.table[level, 2, 1:3]
        taps, factor, width = _taps(levels, level), levels.factors[level], w * channels
        low, high = np.empty(H * width, _f32), np.empty(H * width, _f32)
        done, details = np.zeros(H, np.bool_), np.empty(3 * width, _f32)
        phases = np.empty(W * channels, _f32)
        stop -= 3 * h * width
        out = np.empty(h * width, _f32) if level else bands
        for r in range(h):
            _split_row(
                r, plane, taps, factor, (w, W), channels, low, high, phases, done, out, details
            )
            for band in range(3):
                at = stop + (band * h + r) * width
                bands[at : at + width] = details[band * width : (band + 1) * width]
        plane = out
    return bands


@_jit
def _largest_kept(values, logits, prices, unit, threshold):
    """max |v| over what is kept, 0 if nothing is; and the sum of all logits, times prices."""
    # As integers |v| have the same order, and a largest integer is found by vector instructions.
    bits = values.view(np.int32)
    most, logit_sum = _i32(0), 0.0
    for n in range(values.size):
        i = _u64(n)
        magnitude = bits[i] & _i32(0x7FFFFFFF)
        most = max(most, magnitude if logits[i] >= threshold else _i32(0))
    if prices.size:
        for n in range(values.size):
            i = _u64(n)
            logit_sum += logits[i] * _f32(prices[i])
        logit_sum *= unit
    else:
        for n in range(values.size):
            logit_sum += logits[_u64(n)]
    return _i32(most).view(np.float32), logit_sum


@_jit_exact
def _masked_quantise(values, logits, threshold, step, largest, shown):
    """Writes q · step where kept, else 0; returns how many are kept."""
    count = _i32(0)
    for n in range(values.size):
        i = _u64(n)
        keep = logits[i] >= threshold
        q = min(max(np.rint(values[i] / step), -largest), largest) * step
        shown[i] = q if keep else _f32(0)
        count += _i32(keep)
    return count


@_jit_exact
def masked_spatial(
    values, logits, prices, unit, threshold, largest, levels, channels, steps, counts
):
    """Quantise → mask → inverse transform of a whole grid.

    ``values`` and ``logits`` are its bands, ``prices`` those of its logits in units, of length 0
    for none, ``largest`` the Q of each; ``steps`` takes the Δ of each, ``counts`` how many of each
    are kept. Returns the spatial plane or line, and the sum of all logits, times prices.
    """
    logit_sum = 0.0
    for level in range(len(values)):
        most, of_level = _largest_kept(values[level], logits[level], prices[level], unit, threshold)
        logit_sum += of_level
        step = most / largest[level]
        steps[level] = step if step > _f32(0) else _f32(1)
    plane = np.empty(values[0].size, _f32)
    counts[0] = _masked_quantise(values[0], logits[0], threshold, steps[0], largest[0], plane)
    for level in range(levels.table.shape[0]):
        H, h = levels.table[level, 0, 1:3]
        W, w = levels.table[level, 2, 1:3]
        taps, factor, width = _taps(levels, level), levels.factors[level], w * channels
        low, high = np.empty(width, _f32), np.empty(width, _f32)
        details, done = np.empty(3 * h * width, _f32), np.zeros(h, np.bool_)
        out, phases = np.empty(H * W * channels, _f32), np.empty(W * channels, _f32)
        count = 0
        for i in range(H):
            for columns in (taps[0][0], taps[1][0]):
                for t in range(columns.shape[1]):
                    r = columns[i, t]
                    if done[r]:
                        continue
                    done[r] = True
                    for band in range(3):
                        a = (band * h + r) * width
                        count += _masked_quantise(
                            values[level + 1][a : a + width],
                            logits[level + 1][a : a + width],
                            threshold,
                            steps[level + 1],
                            largest[level + 1],
                            details[a : a + width],
                        )
            _merge_row(i, plane, details, taps, factor, (h, w, W), channels, low, high, phases, out)
        counts[level + 1] = count
        plane = out
    return plane, logit_sum


@_jit
def _sigmoid_slope(logits, out):
    """σ(1 - σ) = e / (1 + e)² with e = exp(-|m|), to 1e-5."""
    for n in range(logits.size):
        i = _u64(n)
        # e = 2^whole · exp(rest), |rest| ≤ ln 2 / 2; below 2^-125 it no longer shrinks.
        power = max(-abs(logits[i]) * _f32(_LOG2_E), _f32(-125))
        whole = np.rint(power)
        rest = (power - whole) * _f32(_LN_2)
        e = _f32(1 / 5040)
        e = e * rest + _f32(1 / 720)
        e = e * rest + _f32(1 / 120)
        e = e * rest + _f32(1 / 24)
        e = e * rest + _f32(1 / 6)
        e = e * rest + _f32(1 / 2)
        e = e * rest + _f32(1)
        e = e * rest + _f32(1)
        e *= _i32((_i32(whole) + _i32(127)) << _i32(23)).view(np.float32)
        out[i] = e / ((_f32(1) + e) * (_f32(1) + e))


@_jit_exact
def _masked_quantise_backward(
    gradient,
    values,
    logits,
    prices,
    unit,
    threshold,
    step,
    largest,
    of_logit_sum,
    of_values,
    of_logits,
):
    """Straight-through gradients."""
    _sigmoid_slope(logits, of_logits)
    for n in range(values.size):
        i = _u64(n)
        g = gradient[i]
        q = min(max(np.rint(values[i] / step), -largest), largest) * step
        of_values[i] = g if logits[i] >= threshold else _f32(0)
        of_logits[i] = of_logits[i] * (q * g)
    if prices.size:
        of_unit = of_logit_sum * unit
        for n in range(values.size):
            i = _u64(n)
            of_logits[i] += of_unit * _f32(prices[i])
    else:
        for n in range(values.size):
            of_logits[_u64(n)] += of_logit_sum


@_jit_exact
def masked_spatial_backward(
    gradient,
    values,
    logits,
    prices,
    unit,
    threshold,
    largest,
    levels,
    channels,
    steps,
    of_logit_sum,
    of_values,
    of_logits,
):
    """Gradients of :func:`masked_spatial`, all bands in one row, with the adjoint's ``levels``."""
    plane = gradient
    stop = of_values.size
    for level in range(levels.table.shape[0] - 1, -1, -1):
        h, H = levels.table[level, 0, 1:3]
        w, W = levels.table[level, 2, 1:3]
        taps, factor, width = _taps(levels, level), levels.factors[level], w * channels
        low, high = np.empty(H * width, _f32), np.empty(H * width, _f32)
        done, details = np.zeros(H, np.bool_), np.empty(3 * width, _f32)
        phases = np.empty(W * channels, _f32)
        stop -= 3 * h * width
        out = np.empty(h * width, _f32)
        for r in range(h):
            _split_row(
                r, plane, taps, factor, (w, W), channels, low, high, phases, done, out, details
            )
            for band in range(3):
                a = (band * h + r) * width
                _masked_quantise_backward(
                    details[band * width : (band + 1) * width],
                    values[level + 1][a : a + width],
                    logits[level + 1][a : a + width],
                    prices[level + 1][a : a + width],
                    unit,
                    threshold,
                    steps[level + 1],
                    largest[level + 1],
                    of_logit_sum,
                    of_values[stop + a : stop + a + width],
                    of_logits[stop + a : stop + a + width],
                )
        plane = out
    _masked_quantise_backward(
        plane,
        values[0],
        logits[0],
        prices[0],
        unit,
        threshold,
        steps[0],
        largest[0],
        of_logit_sum,
        of_values[:stop],
        of_logits[:stop],
    )


@_jit_exact
def _sine_and_cosine(values, start, size, sines, cosines):
    """Of ``values[start : start + size]``, to 2e-7 within ±10000."""
    for k in range(size):
        j = _u64(k)
        x = values[_u64(start) + j]
        # x = quarter turns + rest, |rest| ≤ π / 4; π / 2 in three parts, so that little is lost.
        turns = np.rint(x * _f32(2 / math.pi))
        rest = ((x - turns * _f32(1.5703125)) - turns * _f32(4.837512969970703125e-4)) - (
            turns * _f32(7.549789954891882e-8)
        )
        square = rest * rest
        sine = _f32(-1.9515295891e-4) * square + _f32(8.3321608736e-3)
        sine = (sine * square - _f32(1.6666654611e-1)) * square * rest + rest
        cosine = _f32(2.443315711809948e-5) * square - _f32(1.388731625493765e-3)
        cosine = (cosine * square + _f32(4.166664568298827e-2)) * square * square
        cosine = cosine - _f32(0.5) * square + _f32(1)
        quarter = _i32(turns) & _i32(3)
        swap = (quarter & _i32(1)) != 0
        one, other = (cosine, sine) if swap else (sine, cosine)
        sines[j] = -one if quarter >= 2 else one
        cosines[j] = -other if (quarter == 1) | (quarter == 2) else other


@_jit
def encode(appearance, directions, num_frequencies, width, out, start, stop):
    """Rows ``start … stop - 1`` of (a, d, γ(a), γ(d)), filled up with zeros to ``width``.

    γ(x) are the sines, then the cosines of 2^k x, channels outermost, k innermost; sines and
    cosines of twice an angle follow from those of the angle.
    """
    A, D, K = appearance.shape[1], directions.shape[1], num_frequencies
    flat_appearance, flat_directions = appearance.reshape(-1), directions.reshape(-1)
    most = max(A, D)
    sines, cosines = np.empty(most, _f32), np.empty(most, _f32)
    used = _u64((A + D) * (1 + 2 * K))
    for n in range(start, stop):
        o = _u64(n) * _u64(width)
        for k in range(A):
            out[o + _u64(k)] = flat_appearance[_u64(n) * _u64(A) + _u64(k)]
        for k in range(D):
            out[o + _u64(A) + _u64(k)] = flat_directions[_u64(n) * _u64(D) + _u64(k)]
        at = o + _u64(A + D)
        for part in range(2 if K else 0):
            size = D if part else A
            if part:
                _sine_and_cosine(flat_directions, n * D, size, sines, cosines)
            else:
                _sine_and_cosine(flat_appearance, n * A, size, sines, cosines)
            to_cosines = _u64(size * K)
            for octave in range(K):
                for k in range(size):
                    j = at + _u64(k * K + octave)
                    out[j] = sines[_u64(k)]
                    out[j + to_cosines] = cosines[_u64(k)]
                for k in range(size):
                    sine, cosine = sines[_u64(k)], cosines[_u64(k)]
                    sines[_u64(k)] = _f32(2) * sine * cosine
                    cosines[_u64(k)] = _f32(1) - _f32(2) * sine * sine
            at += _u64(2 * size * K)
        for k in range(_u64(width) - used):
            out[o + used + _u64(k)] = _f32(0)


@_jit
def encode_backward(
    gradient, encoded, num_appearance, num_others, num_frequencies, out, start, stop
):
    """Gradient of :func:`encode` for a: ∂a + Σ_k 2^k (∂sin · cos - ∂cos · sin)."""
    A, K = num_appearance, num_frequencies
    width = gradient.shape[1]
    flat, flat_encoded = gradient.reshape(-1), encoded.reshape(-1)
    to_cosines = _u64(A * K)
    for n in range(start, stop):
        o = _u64(n) * _u64(width)
        at = o + _u64(A + num_others)
        for k in range(A):
            total = flat[o + _u64(k)]
            scale = _f32(1)
            for octave in range(K):
                j = at + _u64(k * K + octave)
                sine, cosine = flat_encoded[j], flat_encoded[j + to_cosines]
                total += scale * (flat[j] * cosine - flat[j + to_cosines] * sine)
                scale *= _f32(2)
            out[_u64(n) * _u64(A) + _u64(k)] = total


@_jit
def _num_places(first, far, step, most):
    """How many of the places first + s · step, s < ``most``, lie before far."""
    estimate = (far - first) / step
    count = most
    if estimate < _f32(most):
        count = np.int64(estimate) if estimate > 0 else 0
    # As the places themselves are rounded.
    while count < most and first + _f32(count) * step < far:
        count += 1
    while count > 0 and not first + _f32(count - 1) * step < far:
        count -= 1
    return count


@_jit
def occupied_places(
    origins, directions, first, fars, step, cells, shape, places, counts, start, stop
):
    """Finds places first + s · step < far whose nearest node is occupied.

    ``cells`` has eight nodes in a byte, the first in its lowest bit. ``counts`` takes how many of
    each ray's places are occupied, ``places`` which.
    """
    X, Y, Z = shape
    S = places.shape[1]
    sx, sy, sz = _f32(X - 1) * _f32(0.5), _f32(Y - 1) * _f32(0.5), _f32(Z - 1) * _f32(0.5)
    # First all nodes of some places, which takes vector instructions, then what is there.
    nodes = np.empty(_PLACES_AT_ONCE, np.int32)
    for r in range(start, stop):
        ox, oy, oz = origins[r, 0], origins[r, 1], origins[r, 2]
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        num_places = _num_places(first[r], fars[r], step, S)
        count = 0
        for begin in range(0, num_places, _PLACES_AT_ONCE):
            size = min(_PLACES_AT_ONCE, num_places - begin)
            for k in range(size):
                t = first[r] + _f32(begin + k) * step
                x = np.rint((ox + dx * t + _f32(1)) * sx)
                y = np.rint((oy + dy * t + _f32(1)) * sy)
                z = np.rint((oz + dz * t + _f32(1)) * sz)
                # As numbers, before they become indices: infinity has none.
                inside = (x >= 0) & (x < _f32(X)) & (y >= 0) & (y < _f32(Y))
                inside &= (z >= 0) & (z < _f32(Z))
                x, y, z = (x, y, z) if inside else (_f32(0), _f32(0), _f32(0))
                node = (_i32(x) * _i32(Y) + _i32(y)) * _i32(Z) + _i32(z)
                nodes[_u64(k)] = node if inside else _i32(-1)
            for k in range(size):
                node = nodes[_u64(k)]
                byte = cells[_u64(max(node, _i32(0)) >> 3)]
                places[_u64(r), _u64(count)] = begin + k
                count += (byte >> (node & 7)) & (node >= 0)
        counts[r] = count


@_jit
def _along(origin, direction, distance):
    # With one rounding, as torch.addcmul.
    return origin + direction * distance


@_jit_exact
def pack_places(
    origins, directions, first, step, places, offsets, ray, middles, points, start, stop
):
    """Ray, distance and point of the occupied places of rays ``start … stop - 1``.

    Ray r's are written from ``offsets[r]`` on.
    """
    for r in range(start, stop):
        ox, oy, oz = origins[r, 0], origins[r, 1], origins[r, 2]
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        for k in range(offsets[r + 1] - offsets[r]):
            i, t = offsets[r] + k, first[r] + _f32(places[r, k]) * step
            ray[i], middles[i] = r, t
            points[i, 0] = _along(ox, dx, t)
            points[i, 1] = _along(oy, dy, t)
            points[i, 2] = _along(oz, dz, t)


@_jit
def _distance(spacing, contracted):
    if not contracted:
        return spacing
    if spacing < _f32(0.5):
        return _f32(2) * spacing
    return _f32(0.5) / (_f32(1) - spacing)


@_jit
def _point(origins, directions, r, t, contracted):
    x = origins[r, 0] + directions[r, 0] * t
    y = origins[r, 1] + directions[r, 1] * t
    z = origins[r, 2] + directions[r, 2] * t
    if not contracted:
        return x, y, z
    largest = max(abs(x), abs(y), abs(z), _f32(1))
    factor = (_f32(1) - _f32(0.5) / largest) / largest
    return x * factor, y * factor, z * factor


@_jit
def _node(x, half, last):
    node = np.rint((x + _f32(1)) * half)
    if node < 0:
        return _f32(0)
    return _f32(last) if node > last else node


@_jit
def proposed_places(
    origins,
    directions,
    near,
    far,
    jitter,
    density,
    scale,
    even,
    num_bins,
    num_samples,
    contracted,
    middles,
    lengths,
    points,
    start,
    stop,
):
    """Distance, length and point of the samples of rays ``start … stop - 1``.

    ``near`` and ``far`` are spacings; ``contracted`` as in ``unbounded.propose``. Bins of the
    proposal look their density up at the node nearest to their middle; samples lie between
    quantiles of its weights, ``even`` more in each.
    """
    last = len(density) - 1
    half = _f32(last) * _f32(0.5)
    sums = np.empty(num_bins + 1, np.float32)
    for r in range(start, stop):
        first, extent = near[r], far[r] - near[r]
        begin = _distance(first, contracted)
        depth, total = _f32(0), _f32(0)
        sums[0] = 0
        for i in range(num_bins):
            end = _distance(first + extent * (_f32(i + 1) / _f32(num_bins)), contracted)
            x, y, z = _point(origins, directions, r, (begin + end) * _f32(0.5), contracted)
            # As numbers, before they become indices: NaN has none.
            x, y, z = _node(x, half, last), _node(y, half, last), _node(z, half, last)
            opacity = _f32(0)
            if 0 <= x <= last and 0 <= y <= last and 0 <= z <= last:
                here = density[np.int64(x), np.int64(y), np.int64(z)] * (end - begin) * scale
                opacity = math.exp(-depth) * -math.expm1(-here)
                depth += here
            total += opacity + even
            sums[i + 1] = total
            begin = end
        i = 0
        begin = _f32(0)
        for k in range(num_samples + 1):
            wanted = total * ((_f32(k) + jitter[r]) / _f32(num_samples + 1))
            while i < num_bins - 1 and sums[i + 1] <= wanted:
                i += 1
            within = min(max((wanted - sums[i]) / (sums[i + 1] - sums[i]), _f32(0)), _f32(1))
            end = _distance(first + extent * ((_f32(i) + within) / _f32(num_bins)), contracted)
            if k > 0:
                n = r * num_samples + k - 1
                middle = (begin + end) * _f32(0.5)
                middles[n], lengths[n] = middle, end - begin
                points[n, 0], points[n, 1], points[n, 2] = _point(
                    origins, directions, r, middle, contracted
                )
            begin = end


@_jit
def composite(
    depths,
    middles,
    lengths,
    places,
    widths,
    bounds,
    least,
    most,
    light,
    weights,
    groups,
    counts,
    accumulation,
    distance,
    distortion,
    start,
    stop,
):
    """Light that reaches each sample of rays ``start … stop - 1``, its weight and its group.

    Samples of ray r are ``bounds[r] … bounds[r + 1] - 1``; ``lengths`` has one number, or one for
    each. ``groups`` takes whose colour a sample shares, counted from 0 in every ray, or -1;
    ``counts`` how many there are; ``accumulation`` and ``distance`` the sums of weights, and of
    weights times ``middles``. ``distortion`` is zero where ``places`` is empty.
    """
    per_sample, is_placed = len(lengths) > 1, len(places) > 0
    for r in range(start, stop):
        before, held = 0.0, 0.0
        count, bin_before, alive_before = 0, _f32(0), False
        total, far = _f32(0), _f32(0)
        mass, moment, spread = 0.0, 0.0, 0.0
        for i in range(bounds[r], bounds[r + 1]):
            depth = depths[i]
            light[i] = math.exp(-_f32(before))
            weight = light[i] * -math.expm1(-depth)
            weights[i] = weight
            total += weight
            far += weight * middles[i]
            if is_placed:
                spread += 2 * weight * (places[i] * mass - moment)
                spread += weight * weight * widths[i] / 3
                mass += weight
                moment += weight * places[i]
            if depth == depth:
                before += depth
            alive = weight > least
            groups[i] = -1
            if alive:
                here = math.floor((_f32(held) + weight * _f32(0.5)) / most)
                held += weight
                length = lengths[i if per_sample else 0]
                same = alive_before and most > 0 and here == bin_before
                if not (same and middles[i] - middles[i - 1] < _f32(1.5) * length):
                    count += 1
                groups[i] = count - 1
                bin_before = here
            alive_before = alive
        counts[r] = count
        accumulation[r], distance[r], distortion[r] = total, far, spread


@_jit
def share(weights, points, groups, bounds, offsets, shares, centres, ray, start, stop):
    """Sums each group's weights and takes the centre of mass of its points.

    Groups of ray r become ``offsets[r]``, ``offsets[r] + 1``, …
    """
    for r in range(start, stop):
        for i in range(bounds[r], bounds[r + 1]):
            if groups[i] < 0:
                continue
            groups[i] += offsets[r]
            g, weight = groups[i], weights[i]
            ray[g] = r
            shares[g] += weight
            for axis in range(3):
                centres[g, axis] += weight * points[i, axis]
        for g in range(offsets[r], offsets[r + 1]):
            for axis in range(3):
                centres[g, axis] /= shares[g]


@_jit
def composite_backward(
    middles,
    places,
    widths,
    light,
    weights,
    groups,
    bounds,
    of_sums,
    of_shares,
    out,
    start,
    stop,
):
    """Gradient of optical depths: ∂w_i · (light behind i) - Σ_{j>i} ∂w_j · w_j.

    ``of_sums`` are the gradients of accumulation, distance and distortion, (3, R).
    """
    is_placed = len(places) > 0
    for r in range(start, stop):
        behind = 0.0
        mass, moment, mass_after, moment_after = 0.0, 0.0, 0.0, 0.0
        if is_placed:
            for i in range(bounds[r], bounds[r + 1]):
                mass += weights[i]
                moment += weights[i] * places[i]
        for i in range(bounds[r + 1] - 1, bounds[r] - 1, -1):
            of_weight = of_sums[0, r] + of_sums[1, r] * middles[i]
            if groups[i] >= 0:
                of_weight += of_shares[groups[i]]
            if is_placed:
                own = weights[i] * places[i]
                lever = places[i] * (mass - weights[i] - 2 * mass_after)
                lever -= moment - own - 2 * moment_after
                of_weight += _f32(of_sums[2, r] * 2 * (lever + weights[i] * widths[i] / 3))
                mass_after += weights[i]
                moment_after += own
            out[i] = of_weight * (light[i] - weights[i]) - _f32(behind)
            share = of_weight * weights[i]
            if share == share:  # what is no number must not spread
                behind += share
