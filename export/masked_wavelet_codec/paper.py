"""Profile ``paper``: the pipeline of the paper's code, for comparison, without its defects.

For each level, coarse first, over all grids that have it:

    mask[level]     the mask's bits in the order (*spatial, C, B), grid after grid, first in the top
                    bit of a byte; run lengths (``runlength``); Huffman (``huffman``)
    values[level]   the kept integers in the same order, int8 up to 8 bits, else int16

The authors write (byte, count) pairs under one Huffman table for all masks. Runs of zero bytes
alone, and a table for each level, take 28 % less on synthetic masks (96 % dropped), so that
what this profile is compared with does not win for free. Bits are padded once per section, and
their number is known from the grids section: no bit is lost where it is not a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from masked_wavelet_codec import huffman, runlength
from masked_wavelet_codec.binary import Budget, Reader, Writer
from masked_wavelet_codec.container import Section, SectionType
from masked_wavelet_codec.layout import BandLayout, Layout
from masked_wavelet_codec.scene import BYTES_PER_COEFFICIENT, Band, Grid
from masked_wavelet_codec.validation import largest_value

__all__ = ["decode_levels", "encode_levels"]


def encode_levels(bits: int, grids: Sequence[Grid]) -> Iterator[Section]:
    """The mask and values sections of all levels, coarse first."""
    num_levels = max((len(grid.bands) for grid in grids), default=0)
    for level in range(num_levels):
        bands = [grid.bands[level] for grid in grids if level < len(grid.bands)]
        masks = [_to_file_order(band.mask) for band in bands]
        writer = Writer()
        symbols = runlength.to_symbols(np.packbits(np.concatenate(masks)))
        huffman.write_symbols(writer, symbols, runlength.ALPHABET)
        yield Section(SectionType.MASK, level, writer.getvalue())
        kept = [_to_file_order(band.values)[mask] for band, mask in zip(bands, masks, strict=True)]
        values = np.concatenate(kept).astype(_value_dtype(bits))
        yield Section(SectionType.VALUES, level, values.tobytes())


def decode_levels(
    take: Callable[[SectionType, int], Reader], layout: Layout, num_levels: int, budget: Budget
) -> list[list[Band]]:
    """The bands of the first levels, grid by grid, from the sections that ``take`` hands out.

    Raises:
        CodecError: if a section is missing or damaged, or the size limit is reached.
    """
    bands = [[] for _ in layout.grids]
    for level in range(num_levels):
        layouts = layout.at_level(level)
        count = sum(band.count for _, band in layouts)
        mask_reader = take(SectionType.MASK, level)
        budget.spend(BYTES_PER_COEFFICIENT * count, mask_reader.where)
        mask = _read_mask(mask_reader, count)
        value_reader = take(SectionType.VALUES, level)
        for number, band in layouts:
            head, mask = mask[: band.count], mask[band.count :]
            if np.count_nonzero(head) != band.num_kept:
                raise mask_reader.error(
                    f"{layout.grids[number].name!r} keeps {np.count_nonzero(head)} coefficients, "
                    f"{band.num_kept} declared"
                )
            bands[number].append(_read_band(value_reader, band, head, layout.bits))
        value_reader.finish()
    return bands


def _read_mask(reader: Reader, count: int) -> np.ndarray:
    """Mask bits (count,) bool of one level."""
    num_bytes = -(-count // 8)
    symbols = huffman.read_symbols(reader, runlength.ALPHABET, max_symbols=num_bytes)
    bits = np.unpackbits(runlength.from_symbols(reader, symbols, num_bytes)).view(np.bool_)
    if bits[count:].any():
        raise reader.error("the bits after the last coefficient are not zero")
    return bits[:count]


def _read_band(reader: Reader, band: BandLayout, mask: np.ndarray, bits: int) -> Band:
    dtype, limit = _value_dtype(bits), largest_value(bits)
    kept = np.frombuffer(reader.raw(band.num_kept * dtype.itemsize), dtype)
    if len(kept) and not -limit <= int(kept.min()) <= int(kept.max()) <= limit:
        raise reader.error(f"a value beyond ±{limit}, the limit of {bits} bits")
    values = np.zeros(band.count, np.int16)
    values[mask] = kept
    return Band(
        level=band.level,
        values=_from_file_order(values, band.shape),
        mask=_from_file_order(mask, band.shape),
        step=band.step,
    )


def _value_dtype(bits: int) -> np.dtype:
    return np.dtype("<i1" if bits <= 8 else "<i2")


def _to_file_order(array: np.ndarray) -> np.ndarray:
    """(C, B, *spatial) to (*spatial, C, B), flat: what is kept at one place stays together."""
    return np.moveaxis(array, (0, 1), (-2, -1)).ravel()


def _from_file_order(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of ``_to_file_order``, contiguous, and a copy: no array keeps a whole level alive."""
    ordered = flat.reshape(*shape[2:], *shape[:2])
    return np.array(np.moveaxis(ordered, (-2, -1), (0, 1)), order="C")
