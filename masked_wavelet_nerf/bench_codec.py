"""Times the codec and weighs its files over sizes of planes, as a Markdown table.

    python -m masked_wavelet_nerf.bench_codec --sizes 64 128 304 --files scene.mwnf

Scenes are random planes of 16 and 48 channels, 97 % dropped, sparser at finer levels, and in some
channels and places than in others; or the files that are named. ``lazy`` is what one gets for
nothing: a general compressor (LZMA of Python's library, zstd where it can be imported) over the
integers. Times are the fastest of a few runs.
"""

from __future__ import annotations

import argparse
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import masked_wavelet_codec as codec

NUM_LEVELS = 4
ROUNDS = 3
_KEPT = {0: 1.0, 1: 0.7, 2: 0.5, 3: 0.2, 4: 0.04}
"""Of the busiest channel at the busiest place, by level."""


def random_scene(size: int) -> codec.Scene:
    """Six planes of size × size coefficients, nothing else."""
    rng = np.random.default_rng(size)
    grids = []
    for number in range(3):
        for kind, num_channels in (("density", 16), ("appearance", 48)):
            busy_channels = rng.random((num_channels, 1, 1, 1)) ** 3
            busy_places = rng.random((1, 1, size, size)) ** 2
            bands = []
            for level in range(NUM_LEVELS + 1):
                n = size >> (NUM_LEVELS if level == 0 else NUM_LEVELS + 1 - level)
                shape = (num_channels, 1 if level == 0 else 3, n, n)
                places = busy_places[:, :, :: size // n, :: size // n][:, :, :n, :n]
                kept = rng.random(shape) < np.minimum(4 * _KEPT[level] * busy_channels * places, 1)
                values = np.rint(rng.laplace(0, 12, shape)).clip(-127, 127).astype(np.int16)
                values[values == 0] = 1
                bands.append(codec.Band(level, values * kept, kept, 1.0))
            grids.append(codec.Grid(f"{kind}_planes.{number}", (size, size), tuple(bands)))
    return codec.Scene({}, 8, tuple(grids), {}, None, None)


def lazy(scene: codec.Scene, compress: Callable[[bytes], bytes]) -> int:
    """Bytes of all integers, band by band, under a general compressor; a kept zero is lost."""
    bands = [band.values.tobytes() for grid in scene.grids for band in grid.bands]
    return len(compress(b"".join(bands)))


def _fastest(function: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def row(name: str, scene: codec.Scene) -> str:
    """One line of the table."""
    bands = [band for grid in scene.grids for band in grid.bands]
    total = sum(band.values.size for band in bands)
    kept = sum(int(np.count_nonzero(band.mask)) for band in bands)
    # Levels alone: what the general compressors get, too.
    bare = codec.Scene({}, scene.bits, scene.grids, {}, None, None)
    data = codec.encode(bare)
    sizes = [
        f"{len(data):,}",
        f"{len(codec.encode(bare, 'paper')):,}",
        f"{lazy(bare, lambda b: lzma.compress(b, preset=9)):,}",
    ]
    try:
        import zstandard  # pyright: ignore[reportMissingImports]

        sizes.append(f"{lazy(bare, zstandard.ZstdCompressor(19).compress):,}")
    except ImportError:
        sizes.append("not installed")
    encoding = _fastest(lambda: codec.encode(bare))
    decoding = _fastest(lambda: codec.decode(data))
    cells = [name, f"{total:,}", f"{kept / total:.1%}", f"{8 * len(data) / kept:.2f}", *sizes]
    return "| " + " | ".join([*cells, f"{encoding:.2f} s", f"{decoding:.2f} s"]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 304])
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    columns = ["planes", "coefficients", "kept", "bits per kept", "range", "paper", "lazy: LZMA"]
    columns += ["lazy: zstd 19", "encode", "decode"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for size in arguments.sizes:
        print(row(f"{size}² × 192", random_scene(size)), flush=True)
    for path in arguments.files:
        print(row(path.name, codec.read(path)), flush=True)


if __name__ == "__main__":
    main()
