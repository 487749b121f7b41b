"""Networks and occupancy in profile ``range``, as decisions (see ``ans``), and cameras as integers.

    networks   count (varint) · for each, by name: name, number of dimensions (u8), lengths
               (varints), kind (u8: 0 floats, 1 integers) · for each of the integers, step (f32) and
               model · float32 data of the floats · words
    occupancy  X, Y, Z (varints) · words
    cameras    exponent + 128 (u8) · N (varint) · block of 77 N bytes, as in ``payloads``

A record of cameras begins with turn and place (see ``poses``), six u32, which are 2 k where the
integer k is not negative, else -2 k - 1; fields as in ``CAMERA_FIELDS`` follow, but the pose.

Voxels come by ascending 3 x + 2 y + z, and those of the same number by ascending 3 x + 2 y, then x.
Nine neighbours of a voxel have lower numbers, so they are known: they make one of 512 contexts.
A voxel's weight is that of what was seen in its context up to the number before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from masked_wavelet_codec import poses
from masked_wavelet_codec.ans import (
    Coder,
    Decoder,
    Encoder,
    expect_room,
    weights_of_counts,
)
from masked_wavelet_codec.binary import (
    Budget,
    Reader,
    Writer,
    count_elements,
    fold,
    unfold,
)
from masked_wavelet_codec.errors import CodecError
from masked_wavelet_codec.numbers import NumberModel, code_numbers
from masked_wavelet_codec.payloads import (
    fields_of_records,
    read_array_head,
    read_floats,
    read_records,
    records_of_fields,
    write_array_head,
    write_records,
)
from masked_wavelet_codec.scene import Cameras, QuantisedArray
from masked_wavelet_codec.validation import CAMERA_FIELDS, LARGEST_INT16, check_step

__all__ = [
    "decode_cameras",
    "decode_networks",
    "decode_occupancy",
    "encode_cameras",
    "encode_networks",
    "encode_occupancy",
]

_FLOATS, _INTEGERS = 0, 1
_NEIGHBOURS = (
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (1, 1, 0),
    (1, 0, 1),
    (0, 1, 1),
    (0, 1, -1),
    (1, -1, 0),
    (1, 0, -1),
)
"""Known neighbours of a voxel, as what is taken off its x, y, z; the first is the lowest bit."""
_MOST_FRONTS = 2**13
"""Each takes a fifth of a millisecond, however few voxels it has."""
_NUM_CONTEXTS = 2 ** len(_NEIGHBOURS)
_LENS = {name: layout for name, layout in CAMERA_FIELDS.items() if name != "camera_to_worlds"}
_CAMERA = np.dtype(
    [("turn", "<u4", (3,)), ("place", "<u4", (3,)), *((n, *layout) for n, layout in _LENS.items())]
)
_LOWEST_EXPONENT = poses.EXPONENTS[0]


def encode_networks(networks: dict[str, np.ndarray | QuantisedArray]) -> bytes:
    """Payload of float32 arrays and integers of any shape."""
    writer, encoder = Writer(), Encoder()
    writer.varint(len(networks))
    arrays = sorted(networks.items())
    for name, array in arrays:
        is_integer = isinstance(array, QuantisedArray)
        shape = array.values.shape if is_integer else array.shape
        write_array_head(writer, name, shape)
        writer.u8(_INTEGERS if is_integer else _FLOATS)
    for _, array in arrays:
        if isinstance(array, QuantisedArray):
            values = array.values.ravel().astype(np.int32)
            model = NumberModel.fit(values)
            writer.f32(array.step)
            model.write(writer)
            code_numbers(encoder, model, values.size, values)
    for _, array in arrays:
        if not isinstance(array, QuantisedArray):
            writer.raw(array.astype("<f4").tobytes())
    writer.raw(encoder.getvalue())
    return writer.getvalue()


def decode_networks(reader: Reader, budget: Budget) -> dict[str, np.ndarray | QuantisedArray]:
    """Inverse of :func:`encode_networks`."""
    shapes: dict[str, tuple[tuple[int, ...], int]] = {}
    for _ in range(reader.varint()):
        name, shape = read_array_head(reader, shapes)
        kind = reader.u8()
        if kind not in (_FLOATS, _INTEGERS):
            raise reader.error(f"{name!r} is of the unknown kind {kind}")
        shapes[name] = shape, kind
    counts = {name: count_elements(shape, reader.where) for name, (shape, _) in shapes.items()}
    models: dict[str, tuple[float, NumberModel]] = {}
    for name, (_, kind) in shapes.items():
        if kind == _INTEGERS:
            step = reader.f32()
            check_step(step, f"{reader.where}: {name!r}, step")
            models[name] = step, NumberModel.read(reader)
    networks: dict[str, np.ndarray | QuantisedArray] = {}
    for name, (shape, kind) in shapes.items():
        if kind == _FLOATS:
            networks[name] = read_floats(reader, shape, budget)
    num_decided = sum(counts[name] for name, (_, model) in models.items() if model.more)
    expect_room(reader, reader.num_left, num_decided)
    decoder = Decoder(reader)
    for name, (step, model) in models.items():
        budget.spend(2 * counts[name], reader.where)
        values = code_numbers(decoder, model, counts[name], None)
        if values.size and np.abs(values).max() > LARGEST_INT16:
            raise reader.error(f"{name!r} has a value beyond ±{LARGEST_INT16}")
        networks[name] = QuantisedArray(values.astype(np.int16).reshape(shapes[name][0]), step)
    decoder.finish()
    return {name: networks[name] for name in shapes}


def encode_occupancy(occupancy: np.ndarray) -> bytes:
    """Payload of a boolean (X, Y, Z) array."""
    _expect_few_fronts(occupancy.shape, "occupancy")
    writer, encoder = Writer(), Encoder()
    for length in occupancy.shape:
        writer.varint(length)
    _code_voxels(encoder, occupancy.shape, occupancy)
    writer.raw(encoder.getvalue())
    return writer.getvalue()


def decode_occupancy(reader: Reader, budget: Budget) -> np.ndarray:
    """Inverse of :func:`encode_occupancy`."""
    shape = reader.varints(3)
    count = count_elements(shape, reader.where)
    _expect_few_fronts(shape, reader.where)
    expect_room(reader, reader.num_left, count)
    budget.spend(count, reader.where)
    decoder = Decoder(reader)
    occupancy = _code_voxels(decoder, shape, None)
    decoder.finish()
    return occupancy


def encode_cameras(cameras: Cameras) -> bytes | None:
    """Payload of N cameras; None where a pose is not on the lattice of ``poses``."""
    found = poses.on_lattice(cameras.camera_to_worlds)
    if found is None:
        return None
    records = records_of_fields(cameras, _CAMERA)
    records["turn"], records["place"] = fold(found.turns), fold(found.places)
    writer = Writer()
    writer.u8(found.exponent - _LOWEST_EXPONENT)
    write_records(writer, records)
    return writer.getvalue()


def decode_cameras(reader: Reader, budget: Budget) -> Cameras:
    """Inverse of :func:`encode_cameras`."""
    exponent = reader.u8() + _LOWEST_EXPONENT
    records = read_records(reader, _CAMERA, budget)
    turns, places = (unfold(records[name].astype(np.int64)) for name in ("turn", "place"))
    if np.abs(turns).max(initial=0) > 2**poses.TURN_BITS:
        raise reader.error("a camera is turned by more than half a turn")
    if np.abs(places).max(initial=0) > 2**poses.PLACE_BITS:
        raise reader.error("a camera is farther away than the exponent says")
    placed = poses.matrices(poses.Poses(exponent, turns, places))
    return Cameras(camera_to_worlds=placed, **fields_of_records(records))


def _code_voxels(coder: Coder, shape: Sequence[int], given: np.ndarray | None) -> np.ndarray:
    X, Y, Z = shape
    if not X * Y * Z:  # the other lengths may be anything
        return np.zeros(shape, np.bool_)
    # A border of empty voxels, so that each has neighbours.
    padded = np.zeros((X + 1, Y + 2, Z + 2), np.bool_)
    inside = padded[1:, 1:-1, 1:-1]
    found, flat = padded.reshape(-1), np.zeros(0) if given is None else given.reshape(-1)
    offsets = [(x * (Y + 2) + y) * (Z + 2) + z for x, y, z in _NEIGHBOURS]
    # Columns along z by 3 x + 2 y: those that a number meets follow each other.
    x, y = (axis.reshape(-1) for axis in np.indices((X, Y)))
    columns = np.argsort(3 * x + 2 * y, kind="stable")
    numbers = (3 * x + 2 * y)[columns]
    at_padded = (((x + 1) * (Y + 2) + y + 1) * (Z + 2) + 1)[columns]
    seen, yes = np.zeros(_NUM_CONTEXTS, np.int64), np.zeros(_NUM_CONTEXTS, np.int64)
    for number in range(3 * X + 2 * Y + Z - 5):
        met = slice(*np.searchsorted(numbers, (number - Z + 1, number + 1)))
        z = number - numbers[met]
        here = at_padded[met] + z
        context = np.zeros(len(here), np.int64)
        for bit, offset in enumerate(offsets):
            context |= found[here - offset].astype(np.int64) << bit
        weights = weights_of_counts(yes[context], seen[context])
        answers = coder.code(weights, None if given is None else flat[columns[met] * Z + z])
        found[here] = answers
        seen += np.bincount(context, minlength=_NUM_CONTEXTS)
        yes += np.bincount(context[answers], minlength=_NUM_CONTEXTS)
    return inside.copy()


def _expect_few_fronts(shape: Sequence[int], where: str) -> None:
    if 0 not in shape and 3 * shape[0] + 2 * shape[1] + shape[2] > _MOST_FRONTS:
        raise CodecError(f"{where}: {tuple(shape)} voxels, 3 X + 2 Y + Z beyond {_MOST_FRONTS}")
