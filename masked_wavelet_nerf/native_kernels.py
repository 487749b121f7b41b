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

import numba
import numpy as np

_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # NaN and infinity keep their meaning
_EXACT = {"nsz"}  # v / Δ has to round as the codec's does: no reciprocals

_u64 = np.uint64
_f32 = np.float32


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
    points, plane, line, shape, axes, gradient, width, offset, plane_out, line_out, start, stop
):
    """Adds the gradients of plane and line by points ``start … stop - 1`` to the two outputs.

    ``gradient`` is that of :func:`features`, (N, width), read from column ``offset`` on; or, where
    ``width`` is 0, that of :func:`summed_features`, (N,).
    """
    C = shape[3]
    step = _u64(C)
    # One loop for each of the six targets: with one pointer to write through and one to read,
    # LLVM's check that they do not overlap is cheap, and the loop becomes vector instructions.
    of_line, of_plane = np.empty(C, _f32), np.empty(C, _f32)
    for n in range(start, stop):
        a, b, l, w00, w01, w10, w11, gz, fz = _neighbours(points, n, shape, axes)
        if width == 0:
            scale = gradient[n]
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
                of_line[c] = p * gradient[o + c]
                of_plane[c] = (gz * line[l + c] + fz * line[l + step + c]) * gradient[o + c]
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
def banded_product(source, num_in, taps, factor, out, num_out, width, add, start, stop):
    """``out[b, i] (+)= factor · Σ_t values[i, t] · source[b, columns[i, t]]``, runs of ``width``.

    ``source`` is (batch, num_in, width), ``out`` (batch, num_out, width), both flat; rows
    ``start … stop - 1`` of batch · num_out are written; ``taps`` = (columns, values). Taps come in
    fives, which is what bior4.4 has at most for a sample.
    """
    columns, values = taps
    m = _u64(width)
    for r in range(start, stop):
        batch = r // num_out
        i = r - batch * num_out
        o = _u64(r) * m
        base = _u64(batch * num_in) * m
        for t in range(0, columns.shape[1], 5):
            v0, v1, v2 = values[i, t] * factor, values[i, t + 1] * factor, values[i, t + 2] * factor
            v3, v4 = values[i, t + 3] * factor, values[i, t + 4] * factor
            a = base + _u64(columns[i, t]) * m
            b = base + _u64(columns[i, t + 1]) * m
            c = base + _u64(columns[i, t + 2]) * m
            d = base + _u64(columns[i, t + 3]) * m
            e = base + _u64(columns[i, t + 4]) * m
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
def merge_rows(approximation, detail, size, taps, factor, low, high, start, stop):
    """Rows of ``low`` and ``high``, (H, w, C), from the bands, (h, w, C) and (3, h, w, C)."""
    h, H, width = size
    low_taps, high_taps = taps
    band = _u64(h) * _u64(width)
    one = _f32(1)
    banded_product(approximation, h, low_taps, one, low, H, width, False, start, stop)
    banded_product(detail, h, high_taps, factor, low, H, width, True, start, stop)
    banded_product(detail[band:], h, low_taps, factor, high, H, width, False, start, stop)
    banded_product(detail[2 * band :], h, high_taps, factor, high, H, width, True, start, stop)


@_jit
def merge_columns(low, high, size, taps, plane, start, stop):
    """Rows of ``plane``, (H, W, C), from ``low`` and ``high``, (H, w, C)."""
    w, W, C = size
    low_taps, high_taps = taps
    one = _f32(1)
    banded_product(low, w, low_taps, one, plane, W, C, False, start * W, stop * W)
    banded_product(high, w, high_taps, one, plane, W, C, True, start * W, stop * W)


@_jit
def split_columns(plane, size, taps, low, high, start, stop):
    """Rows of ``low`` and ``high``, (H, w, C), from ``plane``, (H, W, C)."""
    W, w, C = size
    low_taps, high_taps = taps
    one = _f32(1)
    banded_product(plane, W, low_taps, one, low, w, C, False, start * w, stop * w)
    banded_product(plane, W, high_taps, one, high, w, C, False, start * w, stop * w)


@_jit
def split_rows(low, high, size, taps, factor, approximation, detail, start, stop):
    """Rows of the bands, (h, w, C) and (3, h, w, C), from ``low`` and ``high``, (H, w, C)."""
    H, h, width = size
    low_taps, high_taps = taps
    band = _u64(h) * _u64(width)
    one = _f32(1)
    banded_product(low, H, low_taps, one, approximation, h, width, False, start, stop)
    banded_product(low, H, high_taps, factor, detail, h, width, False, start, stop)
    banded_product(high, H, low_taps, factor, detail[band:], h, width, False, start, stop)
    banded_product(high, H, high_taps, factor, detail[2 * band :], h, width, False, start, stop)


@_jit
def largest_kept(values, logits, threshold, start, stop):
    """max |v| over what is kept, 0 if nothing is."""
    # Sixteen running maxima: one would wait for itself.
    lanes = np.zeros(16, _f32)
    whole = start + (stop - start) // 16 * 16
    for i in range(start, whole, 16):
        for k in range(16):
            v = abs(values[_u64(i + k)])
            lanes[k] = max(lanes[k], v if logits[_u64(i + k)] >= threshold else _f32(0))
    for i in range(whole, stop):
        lanes[0] = max(lanes[0], abs(values[i]) if logits[i] >= threshold else _f32(0))
    return lanes.max()


@_jit_exact
def masked_quantise(values, logits, threshold, step, largest, shown, kept, start, stop):
    """q · step where kept, else 0; and which are kept."""
    for n in range(start, stop):
        i = _u64(n)
        keep = logits[i] >= threshold
        q = min(max(np.rint(values[i] / step), -largest), largest) * step
        shown[i] = q if keep else _f32(0)
        kept[i] = keep


@_jit_exact
def masked_quantise_backward(
    gradient, values, kept, step, largest, probability, of_values, start, stop
):
    """Straight-through gradients; that of the logits replaces ``probability`` = σ(logit)."""
    for n in range(start, stop):
        i = _u64(n)
        g, p = gradient[i], probability[i]
        q = min(max(np.rint(values[i] / step), -largest), largest) * step
        of_values[i] = g if kept[i] else _f32(0)
        probability[i] = p * (_f32(1) - p) * q * g


@_jit
def occupied_places(origins, directions, first, fars, step, cells, valid, start, stop):
    """Marks places first + s · step < far whose nearest node of ``cells`` is occupied."""
    X, Y, Z = cells.shape
    S = valid.shape[1]
    sx, sy, sz = _f32(X - 1) * _f32(0.5), _f32(Y - 1) * _f32(0.5), _f32(Z - 1) * _f32(0.5)
    for r in range(start, stop):
        ox, oy, oz = origins[r, 0], origins[r, 1], origins[r, 2]
        dx, dy, dz = directions[r, 0], directions[r, 1], directions[r, 2]
        for s in range(S):
            t = first[r] + _f32(s) * step
            if not t < fars[r]:
                break
            # As numbers, before they become indices: infinity has none.
            x = np.rint((ox + dx * t + _f32(1)) * sx)
            y = np.rint((oy + dy * t + _f32(1)) * sy)
            z = np.rint((oz + dz * t + _f32(1)) * sz)
            if 0 <= x < X and 0 <= y < Y and 0 <= z < Z:
                valid[r, s] = cells[np.int64(x), np.int64(y), np.int64(z)]
