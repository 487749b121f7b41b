"""Sections of every profile (meta, cameras) and of profile ``paper`` (networks, occupancy).

    meta       length of the text in bytes (varint) · block of UTF-8 JSON, keys sorted, no spaces
    networks   count (varint) · for each: name, number of dimensions (u8), lengths (varints)
               · float32 data of all, in this order; names sorted
    occupancy  X, Y, Z (varints) · block of the bits, Z fastest, first in the top bit
    cameras    N (varint) · block of 101 N bytes: byte 0 of all records, byte 1 of all, …

A record holds one camera, fields as in ``CAMERA_FIELDS``. Blocks: see ``blocks``. Profile ``range``
has a shorter section for most cameras (see ``coded``).
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from typing import NoReturn

import numpy as np

from masked_wavelet_codec.binary import Budget, Reader, Writer, count_elements
from masked_wavelet_codec.blocks import read_block, write_block
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.scene import Cameras
from masked_wavelet_codec.validation import CAMERA_FIELDS, MAX_DIMS, check_meta

__all__ = [
    "decode_cameras",
    "decode_meta",
    "decode_networks",
    "decode_occupancy",
    "encode_cameras",
    "encode_meta",
    "encode_networks",
    "encode_occupancy",
    "fields_of_records",
    "read_array_head",
    "read_floats",
    "read_records",
    "records_of_fields",
    "write_array_head",
    "write_records",
]

_MAX_META_BYTES = 2**20
_BYTES_PER_META_BYTE = 50
"""What parsed JSON takes at most: dicts of one item each, nested, come closest."""
_CAMERA = np.dtype([(name, *layout) for name, layout in CAMERA_FIELDS.items()])


def encode_meta(meta: dict) -> bytes:
    """Payload of a dictionary that ``check_meta`` has passed.

    Raises:
        CodecError: if its text takes more than 1 MiB.
    """
    text = json.dumps(
        meta, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    ).encode()
    if len(text) > _MAX_META_BYTES:
        raise CodecError(
            f"meta: {len(text)} bytes as JSON, expected {_MAX_META_BYTES} at most; put arrays into "
            f"networks"
        )
    writer = Writer()
    writer.varint(len(text))
    write_block(writer, text)
    return writer.getvalue()


def decode_meta(reader: Reader, budget: Budget) -> dict:
    num_bytes = reader.varint()
    if num_bytes > _MAX_META_BYTES:
        raise reader.error(f"{num_bytes} bytes of JSON, expected {_MAX_META_BYTES} at most")
    budget.spend(_BYTES_PER_META_BYTE * num_bytes, reader.where)
    text = read_block(reader, num_bytes)
    try:
        meta = json.loads(
            text.decode(),
            parse_int=_parse_int,
            parse_constant=_refuse,
            object_pairs_hook=_unique_pairs,
        )
    except (ValueError, RecursionError) as error:  # also JSONDecodeError, UnicodeDecodeError
        raise reader.error(f"not the JSON of this format ({error})") from None
    if type(meta) is not dict:
        raise reader.error(f"expected a JSON object, got {type(meta).__name__}")
    check_meta(meta, reader.where)
    return meta


def _parse_int(text: str) -> int:
    # Python takes quadratic time for long ones.
    return int(text) if len(text) <= 20 else _refuse(f"an integer of {len(text)} digits")


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"{what} is not allowed")


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    return result if len(result) == len(pairs) else _refuse("a key that comes twice")


def encode_networks(networks: dict[str, np.ndarray]) -> bytes:
    """Payload of float32 arrays of any shape.

    Raises:
        CodecError: if an array is quantised, which this profile does not know.
    """
    for name, array in networks.items():
        if not isinstance(array, np.ndarray):
            raise CodecError(
                f"networks[{name!r}]: the profile 'paper' stores floats; give array.to_floats()"
            )
    writer = Writer()
    writer.varint(len(networks))
    names = sorted(networks)
    for name in names:
        write_array_head(writer, name, networks[name].shape)
    for name in names:
        writer.raw(networks[name].astype("<f4").tobytes())
    return writer.getvalue()


def decode_networks(reader: Reader, budget: Budget) -> dict[str, np.ndarray]:
    shapes = {}
    for _ in range(reader.varint()):
        name, shape = read_array_head(reader, shapes)
        shapes[name] = shape
    networks = {name: read_floats(reader, shape, budget) for name, shape in shapes.items()}
    reader.finish()
    return networks


def write_array_head(writer: Writer, name: str, shape: Sequence[int]) -> None:
    """Appends name, number of dimensions and lengths of an array."""
    writer.text(name)
    writer.u8(len(shape))
    for length in shape:
        writer.varint(length)


def read_array_head(reader: Reader, known: Container[str]) -> tuple[str, tuple[int, ...]]:
    """Inverse of :func:`write_array_head`; the name must not be a known one."""
    name, num_dims = reader.text(), reader.u8()
    if num_dims > MAX_DIMS:
        raise reader.error(f"{name!r} has {num_dims} dimensions, expected {MAX_DIMS} at most")
    if name in known:
        raise reader.error(f"the name {name!r} comes twice")
    return name, reader.varints(num_dims)


def read_floats(reader: Reader, shape: tuple[int, ...], budget: Budget) -> np.ndarray:
    """An array of float32, whose data comes next."""
    num_bytes = 4 * count_elements(shape, reader.where)
    budget.spend(num_bytes, reader.where)
    return np.frombuffer(reader.raw(num_bytes), "<f4").astype(np.float32).reshape(shape)


def encode_occupancy(occupancy: np.ndarray) -> bytes:
    """Payload of a boolean (X, Y, Z) array."""
    writer = Writer()
    for length in occupancy.shape:
        writer.varint(length)
    write_block(writer, np.packbits(occupancy).tobytes())
    return writer.getvalue()


def decode_occupancy(reader: Reader, budget: Budget) -> np.ndarray:
    shape = reader.varints(3)
    count = count_elements(shape, reader.where)
    budget.spend(count, reader.where)
    packed = np.frombuffer(read_block(reader, -(-count // 8)), np.uint8)
    bits = np.unpackbits(packed)
    if bits[count:].any():
        raise reader.error("the bits after the last voxel are not zero")
    return bits[:count].astype(np.bool_).reshape(shape)


def encode_cameras(cameras: Cameras) -> bytes:
    """Payload of N cameras."""
    writer = Writer()
    write_records(writer, records_of_fields(cameras, _CAMERA))
    return writer.getvalue()


def decode_cameras(reader: Reader, budget: Budget) -> Cameras:
    """Inverse of :func:`encode_cameras`."""
    return Cameras(**fields_of_records(read_records(reader, _CAMERA, budget)))


def records_of_fields(cameras: Cameras, dtype: np.dtype) -> np.ndarray:
    """(N,) records with those fields of cameras that ``dtype`` has; its others are zero."""
    records = np.zeros(len(cameras.split), dtype)
    for name in CAMERA_FIELDS.keys() & set(dtype.names or ()):
        records[name] = getattr(cameras, name)
    return records


def fields_of_records(records: np.ndarray) -> dict[str, np.ndarray]:
    """Inverse of :func:`records_of_fields`: the fields of cameras that records have, by name."""
    arrays = {}
    for name, (dtype, shape) in CAMERA_FIELDS.items():
        if name in (records.dtype.names or ()):
            native = np.dtype(dtype).newbyteorder("=")
            # A copy: fields of records are neither contiguous nor aligned.
            arrays[name] = np.array(records[name], native, order="C").reshape(len(records), *shape)
    return arrays


def write_records(writer: Writer, records: np.ndarray) -> None:
    """Appends their number (varint) and a block.

    Transposed, each byte of a field follows that of the record before: intrinsics that are alike
    collapse, and poses lose a tenth.
    """
    writer.varint(len(records))
    table = records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
    write_block(writer, table.T.tobytes())


def read_records(reader: Reader, dtype: np.dtype, budget: Budget) -> np.ndarray:
    """Inverse of :func:`write_records`, of cameras."""
    count = count_elements((reader.varint(), _CAMERA.itemsize), reader.where) // _CAMERA.itemsize
    budget.spend(_CAMERA.itemsize * count, reader.where)
    data = read_block(reader, dtype.itemsize * count)
    table = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, count)
    records = np.ascontiguousarray(table.T).view(dtype).reshape(count)
    if (records["split"] > 1).any():
        raise reader.error("a camera is neither for training nor for evaluation")
    return records
