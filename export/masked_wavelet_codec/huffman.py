"""Canonical Huffman codes of at most 16 bits, with the code lengths in the stream.

    stream   number of symbols (varint); ends here if 0
             · alphabet bitmap, ceil(A / 8) bytes: which symbols occur, symbol 0 in the top bit
             · code length - 1 of each symbol that occurs, 4 bits each, first in the high half
             · the codes, first bit in the top bit of a byte, to the end

Unused bits at the ends are zero. Codes are canonical: sorted by (length, symbol), the first is all
zeros and each next one is (previous + 1) shifted left to its length. The code is complete, Kraft's
sum Σ 2^-length = 1, except that a lone symbol has length 1 and the code 0.
"""

from __future__ import annotations

from array import array

import numpy as np

from masked_wavelet_codec.binary import Reader, Writer

__all__ = ["MAX_LENGTH", "code_lengths", "read_symbols", "write_symbols"]

MAX_LENGTH = 16
"""A decoder's table has 2**16 entries at most; at 260 symbols the limit costs next to nothing."""


def code_lengths(counts: np.ndarray, max_length: int = MAX_LENGTH) -> np.ndarray:
    """Optimal code lengths under a limit, by package-merge (Larmore and Hirschberg, 1990).

    Each symbol is a coin of its count's weight in every denomination 2^-1 … 2^-max_length; a symbol
    whose coin is among the cheapest 2(n - 1) after pairing from the smallest denomination up gets
    one bit for each of its coins. Ties go to the earlier symbol: the result is deterministic.

    Args:
        counts: (A,) integers, how often each symbol occurs; at most 2**max_length of them positive.

    Returns:
        (A,) uint8, 0 for symbols that do not occur.
    """
    lengths = np.zeros(len(counts), np.uint8)
    used = np.flatnonzero(counts)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    coins = [(int(counts[symbol]), [symbol]) for symbol in used]
    packages = []
    for _ in range(max_length):
        row = sorted(coins + packages, key=lambda item: item[0])
        packages = [
            (row[i][0] + row[i + 1][0], row[i][1] + row[i + 1][1])
            for i in range(0, len(row) - 1, 2)
        ]
    for _, symbols in packages[: len(used) - 1]:
        np.add.at(lengths, symbols, 1)
    return lengths


def write_symbols(writer: Writer, symbols: np.ndarray, alphabet: int) -> None:
    """Append ``symbols`` as a stream; it must be the last field of the payload.

    Args:
        symbols: (N,) integers in [0, alphabet).
        alphabet: A, at most 2**16.
    """
    writer.varint(len(symbols))
    if len(symbols) == 0:
        return
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    used = lengths > 0
    writer.raw(np.packbits(used).tobytes())
    nibbles = lengths[used] - 1
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
    writer.raw((nibbles[0::2] << 4 | nibbles[1::2]).tobytes())

    ordered, ordered_codes = _canonical(lengths)
    codes = np.zeros(alphabet, np.uint32)
    codes[ordered] = ordered_codes
    # Bit k of a code of n bits is (code >> n - 1 - k) & 1: one pass for each k, over all symbols.
    sizes = lengths[symbols].astype(np.int64)
    ends = np.cumsum(sizes)
    bits = np.zeros(ends[-1], np.uint8)
    starts, values = ends - sizes, codes[symbols]
    for k in range(int(sizes.max())):
        has_bit = sizes > k
        shift = (sizes[has_bit] - 1 - k).astype(np.uint32)
        bits[starts[has_bit] + k] = values[has_bit] >> shift & 1
    writer.raw(np.packbits(bits).tobytes())


def read_symbols(reader: Reader, alphabet: int, max_symbols: int) -> np.ndarray:
    """The symbols of the stream that is the rest of the payload.

    Args:
        max_symbols: the most that the caller has use for. A declared number above this, or above
            the bits that are left, is refused before memory is taken.

    Returns:
        (N,) uint16.

    Raises:
        CodecError: if the stream is damaged.
    """
    count = reader.varint()
    if count == 0:
        reader.finish()
        return np.zeros(0, np.uint16)
    lengths = _read_lengths(reader, alphabet)
    data = reader.rest()
    if count > min(max_symbols, 8 * len(data)):
        raise reader.error(
            f"{count} symbols declared, at most {max_symbols} are needed and "
            f"{8 * len(data)} bits are left"
        )
    ordered, _ = _canonical(lengths)
    if len(ordered) == 1:
        _check_end(reader, data, count)
        if any(data):
            raise reader.error("a code that is not in the Huffman table")
        return np.full(count, ordered[0], np.uint16)
    return _decode(reader, data, count, lengths[ordered], ordered)


def _read_lengths(reader: Reader, alphabet: int) -> np.ndarray:
    """Code lengths (A,), checked to be a complete code."""
    bitmap = np.unpackbits(np.frombuffer(reader.raw(-(-alphabet // 8)), np.uint8))
    used = np.flatnonzero(bitmap)
    if len(used) == 0 or used[-1] >= alphabet:
        raise reader.error("the Huffman table has no symbol, or one outside its alphabet")
    nibbles = np.frombuffer(reader.raw(-(-len(used) // 2)), np.uint8)
    nibbles = np.stack([nibbles >> 4, nibbles & 15], axis=1).ravel()
    if nibbles[len(used) :].any():
        raise reader.error("the Huffman table's unused bits are not zero")
    lengths = np.zeros(alphabet, np.uint8)
    lengths[used] = nibbles[: len(used)] + 1
    kraft = int((1 << (MAX_LENGTH - lengths[used].astype(np.int64))).sum())
    expected = 1 << (MAX_LENGTH if len(used) > 1 else MAX_LENGTH - 1)
    if kraft != expected:
        raise reader.error("the Huffman table is not a complete code")
    return lengths


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols that occur in the order of their codes, and those codes."""
    used = np.flatnonzero(lengths)
    ordered = used[np.argsort(lengths[used], kind="stable")]
    # As fractions of 2^16, a code is the sum of the widths 2^(16 - length) of those before it.
    sizes = lengths[ordered].astype(np.int64)
    widths = 1 << (MAX_LENGTH - sizes)
    return ordered, (np.cumsum(widths) - widths) >> (MAX_LENGTH - sizes)


def _decode(
    reader: Reader, data: memoryview, count: int, lengths: np.ndarray, ordered: np.ndarray
) -> np.ndarray:
    """Look each symbol up by the next ``window`` bits, as many as the longest code has."""
    window = int(lengths.max())
    repeats = 1 << (window - lengths.astype(np.int64))
    symbol_of = np.repeat(ordered, repeats).tolist()
    length_of = np.repeat(lengths, repeats).tolist()
    # The 24 bits from each byte on hold any window that starts within that byte.
    padded = np.zeros(len(data) + 2, np.uint32)
    padded[:-2] = np.frombuffer(data, np.uint8)
    words = memoryview(padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:])  # pyright: ignore[reportArgumentType]
    shift, wrap = 24 - window, (1 << window) - 1
    symbols = array("H", bytes(2 * count))
    position = i = 0
    try:
        for i in range(count):
            bits = words[position >> 3] >> (shift - (position & 7)) & wrap
            symbols[i] = symbol_of[bits]
            position += length_of[bits]
    except IndexError:
        raise reader.error(f"the Huffman codes end after {i} of {count} symbols") from None
    _check_end(reader, data, position)
    return np.frombuffer(symbols, np.uint16)


def _check_end(reader: Reader, data: memoryview, num_bits: int) -> None:
    """Check that the codes fill ``data`` to its last byte and that zeros follow them."""
    if -(-num_bits // 8) != len(data):
        raise reader.error(f"{num_bits} bits of Huffman codes in {len(data)} bytes")
    if data[-1] & ((1 << (-num_bits % 8)) - 1):
        raise reader.error("the bits after the Huffman codes are not zero")
