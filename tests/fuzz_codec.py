"""Feeds the codec damaged files, by hand: ``python tests/fuzz_codec.py --inputs 200000 --seed 0``.

Every input must give a scene or a ``CodecError``, within seconds and in bounded memory. Half of the
inputs get right checksums again, section by section, so that what lies behind them is reached.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import masked_wavelet_codec as codec

SIZE_LIMIT = 2**24
MOST_SECONDS = 2.0
"""Of process time, for an input."""
MOST_MEMORY = 16 * SIZE_LIMIT
MEMORY_EVERY = 200
"""Of so many inputs, one is decoded a second time to see what memory it takes."""


@dataclass
class Result:
    """What became of the inputs."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    """Seconds of process time."""
    largest: int = 0
    """Bytes at the peak, of those inputs of which it was measured."""
    failure: str | None = None
    data: bytes = b""
    """The input that failed; without a failure, the slowest."""


def golden_seeds() -> list[bytes]:
    paths = sorted((Path(__file__).parent / "golden").glob("*.mwnf"))
    return [path.read_bytes() for path in paths]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few edits, mostly one: of bits, bytes, numbers, pieces taken out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        position, other = (rng.randint(0, len(changed)) for _ in range(2))
        length = rng.choice([1, 2, 4, 8, 64])
        kind = rng.randrange(8)
        if kind == 0 and position < len(changed):
            changed[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[position : position + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF])])
        elif kind == 2:
            changed[position:position] = rng.randbytes(rng.randint(1, 4))
        elif kind == 3:
            del changed[position : position + length]
        elif kind == 4:
            changed[position : position + length] = changed[other : other + length]
        elif kind == 5:
            changed[position:position] = changed[other : other + length]
        elif kind == 6:
            changed[position : position + 1] = varint(rng.randrange(2 ** rng.randint(1, 62)))
        elif rng.random() < 0.1:
            del changed[position:]
    return bytes(changed)


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def sections_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type, flags and index of each section, and its payload."""
    found, position = [], 20
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        found.append((data[position : position + 4], data[position + 12 : position + 12 + length]))
        position += 12 + length
    return found


def mutate_behind_checksums(data: bytes, rng: random.Random) -> bytes:
    """Edits in a payload or two, seldom in the heads, the number or the order of sections."""
    sections = sections_of(data)
    header = bytearray(data[8:16])
    for _ in range(rng.randint(1, 2)):
        number = rng.randrange(len(sections))
        head, payload = sections[number]
        kind = rng.random()
        if kind < 0.9:
            sections[number] = head, mutate(payload, rng)
        elif kind < 0.92:
            sections[number] = mutate(head, rng)[:4].ljust(4, b"\0"), payload
        elif kind < 0.94:
            header[rng.randrange(8)] ^= 1 << rng.randrange(8)
        elif kind < 0.96:
            rng.shuffle(sections)
        elif kind < 0.98 and len(sections) > 1:
            del sections[rng.randrange(len(sections)) :]
        else:
            sections.insert(rng.randrange(len(sections)), rng.choice(sections))
        if not sections:
            break
    header = data[:8] + bytes(header)
    parts = [header, struct.pack("<I", zlib.crc32(header))]
    for head, payload in sections:
        head = head + struct.pack("<I", len(payload))
        parts += [head, struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))), payload]
    return b"".join(parts)


def attempt(data: bytes) -> bool:
    """Whether the input is a scene; raises what should not be raised."""
    is_scene = True
    with contextlib.suppress(codec.CodecError):
        codec.describe(data)
    try:
        scene = codec.decode(data, size_limit=SIZE_LIMIT)
        assert type(scene) is codec.Scene
    except codec.CodecError:
        is_scene = False
    return is_scene


def peak_of(data: bytes) -> int:
    """Bytes at the peak while an input is tried."""
    tracemalloc.start()
    try:
        attempt(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fuzz(
    seeds: Sequence[bytes],
    num_inputs: int,
    seed: int,
    seconds: float = float("inf"),
    progress_every: int = 0,
) -> Result:
    """Try that many inputs, until one fails, or for so many seconds."""
    result, start = Result(), time.monotonic()
    for number in range(num_inputs):
        # One generator for each input, so that a number and a seed are enough to make it again.
        rng = random.Random(f"{seed} {number}")
        original = rng.choice(seeds)
        data = (mutate_behind_checksums if number % 2 else mutate)(original, rng)
        begin = time.process_time()
        try:
            is_scene = attempt(data)
            taken = time.process_time() - begin
            if taken > MOST_SECONDS:
                result.failure = f"takes {taken:.1f} seconds"
            elif number % MEMORY_EVERY == MEMORY_EVERY - 1:
                result.largest = max(result.largest, peak_of(data))
                if result.largest > MOST_MEMORY + 100 * len(data):
                    result.failure = f"takes {result.largest} bytes of memory"
        except Exception as error:
            result.failure = f"{type(error).__name__}: {error}"
        if result.failure is not None:
            result.failure = f"input {number} of seed {seed}: {result.failure}"
            result.data = data
            return result
        if is_scene:
            result.accepted += 1
        else:
            result.refused += 1
        if taken > result.slowest:
            result.slowest, result.data = taken, data
        if progress_every and (number + 1) % progress_every == 0:
            print(f"{number + 1} inputs, {time.monotonic() - start:.0f} s", flush=True)
        if time.monotonic() - start > seconds:
            break
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--seeds-from", type=Path, help="folder whose *.mwnf are damaged as well")
    arguments = parser.parse_args()
    seeds = golden_seeds()
    if arguments.seeds_from is not None:
        seeds += [path.read_bytes() for path in sorted(arguments.seeds_from.rglob("*.mwnf"))]
    result = fuzz(seeds, arguments.inputs, arguments.seed, arguments.seconds, progress_every=1000)
    print(
        f"{result.accepted} accepted, {result.refused} refused; slowest {result.slowest:.2f} s, "
        f"largest {result.largest / 2**20:.1f} MiB"
    )
    if result.failure is None:
        return 0
    path = Path(f"fuzz-{zlib.crc32(result.data):08x}.mwnf")
    path.write_bytes(result.data)
    print(f"{result.failure}; written to {path}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
