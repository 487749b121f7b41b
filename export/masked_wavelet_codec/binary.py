"""Reading and writing small numbers, names and shapes, with every count checked before its use.

All integers are little-endian. A *varint* is LEB128: seven bits a byte, least significant first,
the top bit set on all bytes but the last; at most nine bytes, so below 2**63, and never longer than
needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

from masked_wavelet_codec.errors import CodecError

__all__ = ["Budget", "Reader", "Writer", "count_elements", "fold", "unfold"]

_MAX_VARINT_BYTES = 9
_MAX_ELEMENTS = 2**48
"""Far above any memory, far below what int64 products can hold."""


def count_elements(shape: Iterable[int], where: str) -> int:
    """Number of elements of an array of this shape.

    Raises:
        CodecError: if the lengths, zeros taken as ones, multiply to more than 2**48: numpy cannot
            index such a shape, even where it is empty.
    """
    product, is_empty = 1, False
    for length in shape:
        product *= max(length, 1)
        is_empty |= length == 0
        if product > _MAX_ELEMENTS:
            raise CodecError(f"{where}: shape of more than 2**48 elements")
    return 0 if is_empty else product


def fold(numbers: np.ndarray) -> np.ndarray:
    """2 v where v is not negative, else -2 v - 1: small where |v| is. int64, of any shape."""
    return (numbers << 1) ^ (numbers >> 63)


def unfold(folded: np.ndarray) -> np.ndarray:
    """Inverse of :func:`fold`."""
    return (folded >> 1) ^ -(folded & 1)


class Budget:
    """What may still be allocated for a scene; ``spend`` comes before each allocation."""

    def __init__(self, num_bytes: int) -> None:
        self._total = num_bytes
        self._left = num_bytes

    def spend(self, num_bytes: int, where: str) -> None:
        """Take ``num_bytes`` out of the budget.

        Raises:
            CodecError: if less is left.
        """
        if num_bytes > self._left:
            raise CodecError(
                f"{where}: needs {num_bytes} bytes of memory, {self._left} of the size limit "
                f"{self._total} are left; raise size_limit if the file is to be trusted"
            )
        self._left -= num_bytes


class Writer:
    """Appends fields to a growing payload."""

    def __init__(self) -> None:
        self._data = bytearray()

    def raw(self, data: bytes) -> None:
        self._data += data

    def u8(self, value: int) -> None:
        self._data.append(value)

    def f32(self, value: float) -> None:
        self._data += struct.pack("<f", value)

    def varint(self, value: int) -> None:
        while value >= 0x80:
            self._data.append(value & 0x7F | 0x80)
            value >>= 7
        self._data.append(value)

    def text(self, value: str) -> None:
        """UTF-8 after its length in bytes."""
        data = value.encode()
        self.varint(len(data))
        self._data += data

    def getvalue(self) -> bytes:
        return bytes(self._data)


class Reader:
    """Takes fields off the front of one section's payload.

    Every method raises ``CodecError``, naming the section, where the payload ends too soon.
    """

    def __init__(self, data: memoryview | bytes, where: str) -> None:
        self._data = memoryview(data)
        self._position = 0
        self.where = where
        """Name of the section, the start of every message."""

    @property
    def num_left(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._position

    def error(self, reason: str) -> CodecError:
        """The exception to raise for ``reason``."""
        return CodecError(f"{self.where}: {reason}")

    def raw(self, num_bytes: int) -> memoryview:
        if num_bytes > self.num_left:
            raise self.error(f"truncated, {num_bytes} bytes declared and {self.num_left} left")
        start = self._position
        self._position += num_bytes
        return self._data[start : self._position]

    def rest(self) -> memoryview:
        """All that is left."""
        return self.raw(self.num_left)

    def u8(self) -> int:
        return self.raw(1)[0]

    def f32(self) -> float:
        return struct.unpack("<f", self.raw(4))[0]

    def varint(self) -> int:
        value = 0
        for index in range(_MAX_VARINT_BYTES):
            byte = self.u8()
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if byte == 0 and index > 0:
                    raise self.error("a varint is longer than needed")
                return value
        raise self.error(f"a varint has more than {_MAX_VARINT_BYTES} bytes")

    def varints(self, count: int) -> tuple[int, ...]:
        return tuple(self.varint() for _ in range(count))

    def text(self) -> str:
        data = bytes(self.raw(self.varint()))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a name is not UTF-8 ({error.reason})") from None

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self.num_left:
            raise self.error(f"{self.num_left} bytes too many")
