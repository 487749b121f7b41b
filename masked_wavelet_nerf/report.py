"""What a bitstream holds, as tables to read and as JSON."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich.console import Group
from rich.table import Table

from masked_wavelet_codec import Description


def kept_by_level(description: Description) -> dict[str, tuple[int, int]]:
    """Kept coefficients and all of them, for each level of planes or voxels, and for the lines."""
    kept: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for level in description.levels:
        key = "lines" if "_lines." in level.grid else f"level {level.level}"
        kept[key][0] += level.num_kept
        kept[key][1] += level.num_coefficients
    return {key: (kept[key][0], kept[key][1]) for key in sorted(kept)}


def dropped_fraction(description: Description) -> float:
    """Fraction of all coefficients that the file does not hold."""
    return 1 - description.num_kept / max(description.num_coefficients, 1)


def to_json(description: Description) -> dict[str, Any]:
    """Everything the tables show, and the file's meta, JSON-able."""
    return {
        "version": list(description.version),
        "profile": description.profile,
        "bytes": description.num_bytes,
        "parts": dict(description.parts),
        "sections": [
            {"name": s.name, "bytes": s.num_bytes, "intact": s.is_intact}
            for s in description.sections
        ],
        "coefficients": description.num_coefficients,
        "kept": description.num_kept,
        "dropped": dropped_fraction(description),
        "bits_per_kept": description.bits_per_kept,
        "kept_by_level": {
            key: kept / max(total, 1) for key, (kept, total) in kept_by_level(description).items()
        },
        "prefixes": list(description.prefixes),
        "meta": description.meta,
    }


def tables(description: Description) -> Group:
    """Bytes by part, coefficients by level, and bytes up to each level."""
    size = Table(title=f"{description.num_bytes:,} bytes ({description.profile} profile)")
    size.add_column("part")
    size.add_column("bytes", justify="right")
    size.add_column("share", justify="right")
    for part, num_bytes in description.parts.items():
        if num_bytes:
            size.add_row(part, f"{num_bytes:,}", f"{num_bytes / description.num_bytes:.1%}")
    levels = Table(
        title=f"{dropped_fraction(description):.1%} of {description.num_coefficients:,} "
        f"coefficients dropped, {description.bits_per_kept:.2f} bits per kept one"
    )
    levels.add_column("level (0 = coarsest)")
    levels.add_column("kept", justify="right")
    levels.add_column("of", justify="right")
    levels.add_column("fraction", justify="right")
    for key, (kept, total) in kept_by_level(description).items():
        levels.add_row(key, f"{kept:,}", f"{total:,}", f"{kept / max(total, 1):.2%}")
    prefixes = Table(title="Prefixes that are coarser scenes")
    prefixes.add_column("decode --levels", justify="right")
    prefixes.add_column("first bytes", justify="right")
    for level, num_bytes in enumerate(description.prefixes):
        prefixes.add_row(str(level), f"{num_bytes:,}")
    return Group(size, levels, prefixes)
