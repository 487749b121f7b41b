"""Run lengths of zero bytes, as symbols for an entropy coder.

A byte other than 0 is the symbol of its value. A maximal run of r ≥ 1 zero bytes is written in
bijective base 2, least significant digit first, with the symbols 256 for digit 1 and 257 for 2:

    r = Σ_k digit_k · 2^k,   digit_k ∈ {1, 2}

so runs need no other end mark than the next symbol. The symbol 0 does not occur.
"""

from __future__ import annotations

import numpy as np

from masked_wavelet_codec.binary import Reader

__all__ = ["ALPHABET", "from_symbols", "to_symbols"]

_FIRST_DIGIT = 256
ALPHABET = 258


def to_symbols(data: np.ndarray) -> np.ndarray:
    """Symbols (N,) uint16 for bytes (M,) uint8; N ≤ M."""
    is_zero = data == 0
    # Each item is a byte that is not zero, or a whole run.
    starts = np.flatnonzero(~is_zero | np.diff(is_zero, prepend=False))
    runs = np.diff(starts, append=len(data))
    # r + 1 in binary is a leading one, then digit - 1 for each digit.
    num_digits = np.frexp((runs + 1).astype(np.float64))[1] - 1
    item_is_run = is_zero[starts]
    num_symbols = np.where(item_is_run, num_digits, 1)
    item = np.repeat(np.arange(len(starts)), num_symbols)
    place = np.arange(len(item)) - np.repeat(np.cumsum(num_symbols) - num_symbols, num_symbols)
    digits = _FIRST_DIGIT + ((runs[item] + 1) >> place & 1)
    return np.where(item_is_run[item], digits, data[starts[item]]).astype(np.uint16)


def from_symbols(reader: Reader, symbols: np.ndarray, num_bytes: int) -> np.ndarray:
    """Bytes (num_bytes,) uint8 for symbols (N,), N ≤ num_bytes.

    Args:
        num_bytes: known to the caller and within the size limit; the runs are added up before
            memory for them is taken.

    Raises:
        CodecError: if the symbols do not give exactly ``num_bytes``, or one is 0.
    """
    if (symbols == 0).any():
        raise reader.error("a zero byte outside the run lengths")
    is_digit = symbols >= _FIRST_DIGIT
    index = np.arange(len(symbols))
    place = index - np.maximum.accumulate(np.where(is_digit, -1, index)) - 1
    # A run above num_bytes is refused here, so that no shift below can overflow.
    if (place[is_digit] >= num_bytes.bit_length()).any():
        raise reader.error(f"a run of more than the {num_bytes} bytes of the mask")
    digits = symbols.astype(np.int64) - (_FIRST_DIGIT - 1)
    advance = np.where(is_digit, digits << np.where(is_digit, place, 0), 1)
    # In floating point first: many long runs overflow an integer sum.
    if advance.sum(dtype=np.float64) > num_bytes or advance.sum() != num_bytes:
        raise reader.error(f"the run lengths do not give the {num_bytes} bytes of the mask")
    data = np.zeros(num_bytes, np.uint8)
    positions = np.cumsum(advance)[~is_digit] - 1
    data[positions] = symbols[~is_digit]
    return data
