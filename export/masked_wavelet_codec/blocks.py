"""A block: bytes of a known length, stored as they are or as LZMA2, whichever is smaller.

    block = method (u8: 0 stored, 1 LZMA2) · data, to the end of the payload

The filter is fixed, so a reader needs no parameters out of the file and cannot be made to take a
large dictionary. Deflate is left out on purpose: it wins only below some 500 bytes, and its output
differs between zlib and zlib-ng, so the same scene would give other bytes on other machines.
"""

from __future__ import annotations

import lzma

from masked_wavelet_codec.binary import Reader, Writer

__all__ = ["read_block", "write_block"]

_STORED, _LZMA2 = 0, 1
_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}
]  # lc = 3, lp = 0, pb = 2


def write_block(writer: Writer, data: bytes) -> None:
    """Append ``data`` as a block; it must be the last field of the payload."""
    packed = lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)
    if len(packed) < len(data):
        writer.u8(_LZMA2)
        writer.raw(packed)
    else:
        writer.u8(_STORED)
        writer.raw(data)


def read_block(reader: Reader, num_bytes: int) -> bytes:
    """The bytes of the block that is the rest of the payload.

    Args:
        num_bytes: their number, known to the caller and already within the size limit: never more
            than this (plus one) is decompressed.

    Raises:
        CodecError: if the data is damaged or does not give exactly ``num_bytes``.
    """
    method = reader.u8()
    if method == _STORED:
        data = bytes(reader.raw(num_bytes))
        reader.finish()
        return data
    if method != _LZMA2:
        raise reader.error(f"unknown compression method {method}")
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        data = decompressor.decompress(reader.rest(), max_length=num_bytes + 1)
        if not decompressor.eof and len(data) == num_bytes:
            # The end mark may still be unread when the output is complete.
            data += decompressor.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise reader.error(f"LZMA2 data is damaged ({error})") from None
    if len(data) != num_bytes or not decompressor.eof or decompressor.unused_data:
        raise reader.error(f"LZMA2 data does not give exactly {num_bytes} bytes")
    return data
