"""Rows of results brought together: seeds and scenes as means, points of one sweep as curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masked_wavelet_nerf.curves import Point
from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.results import Row, in_words, read_rows


@dataclass(frozen=True)
class Entry:
    """Rows that differ in scene and seed alone; every number is a mean over both."""

    source: str
    """Name of the file of rows, without its ending."""
    preset: str
    variant: str
    place: tuple[tuple[str, Any], ...]
    """Of the sweep: flags and values."""
    export: str
    rows: tuple[Row, ...]
    """Trained for as many steps, and measured at the same pixels."""

    @property
    def name(self) -> str:
        """For people."""
        return in_words(self.preset, self.variant, self.place, self.export)

    @property
    def scenes(self) -> list[str]:
        """In the order of their rows."""
        return list(dict.fromkeys(row["scene"] for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        """All that any scene was trained with."""
        return sorted({row["seed"] for row in self.rows})

    def mean(self, key: str) -> float | None:
        """Mean over scenes of means over seeds; None if a row does not have it."""
        if any(row.get(key) is None for row in self.rows):
            return None
        return statistics.fmean(
            statistics.fmean(float(row[key]) for row in self.rows if row["scene"] == scene)
            for scene in self.scenes
        )

    def spread(self, key: str) -> float | None:
        """Standard deviation from seed to seed, pooled over scenes; None without seeds enough."""
        squares, freedoms = 0.0, 0
        for scene in self.scenes:
            values = [float(row[key]) for row in self.rows if row["scene"] == scene]
            if len(values) > 1:
                squares += statistics.variance(values) * (len(values) - 1)
                freedoms += len(values) - 1
        return (squares / freedoms) ** 0.5 if freedoms else None

    def point(self, quality: str = "psnr_after") -> Point | None:
        """Bytes and this of what is decoded; None if a row does not have it."""
        num_bytes, found = self.mean("bytes"), self.mean(quality)
        assert num_bytes is not None
        return None if found is None else Point(num_bytes, found)


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """The entries of files of rows, in the order in which they came.

    Raises:
        UserError: if one is no such file, or a row lacks what a row of results has.
    """
    groups: dict[tuple, list[Row]] = {}
    for path in paths:
        for number, row in enumerate(read_rows(path), 1):
            try:
                _check(row)
                place = row.get("place", {}).items()
                place = tuple((flag, _hashable(value)) for flag, value in sorted(place))
                entry = path.stem, row["preset"], row["variant"], place, row.get("export", "")
                key = entry, row.get("steps"), row.get("eval_stride")
                groups.setdefault(key, []).append(row)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}: row {number} is none of mwnerf bench "
                    f"({type(error).__name__}: {error})"
                ) from error
    return [Entry(*entry, rows=tuple(rows)) for (entry, *_), rows in groups.items()]


def _check(row: Mapping[str, Any]) -> None:
    kinds = {"preset": str, "variant": str, "scene": str, "seed": int}
    for key, kind in kinds.items():
        if not isinstance(row[key], kind):
            raise TypeError(f"{key}: {row[key]!r}")
    if not isinstance(row.get("export", ""), str) or not isinstance(row.get("place", {}), Mapping):
        raise TypeError("export, place: expected a name, and flags with their values")
    for key in ("bytes", "psnr_after"):
        if not 0 < float(row[key]) < math.inf:
            raise ValueError(f"{key}: {row[key]}, expected a positive number")


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def curves_of(entries: Iterable[Entry], quality: str = "psnr_after") -> dict[str, list[Point]]:
    """Points by curve, sorted by size; without entries whose rows do not have this quality.

    A curve is a sweep's variant, or else all of a file; it is named by as little as tells it from
    the others.
    """
    points: dict[tuple[str, ...], list[Point]] = {}
    for entry in entries:
        of = (entry.variant or entry.preset, entry.preset) if entry.place else (entry.source, "")
        point = entry.point(quality)
        if point is not None:
            points.setdefault((*of, entry.export, entry.source), []).append(point)
    return {_name(key, [*points]): sorted(found) for key, found in points.items()}


_NAMES = (0, 2), (1, 0, 2), (3, 1, 0, 2)
"""Parts of a curve's key that make its name, shortest first; the last has them all."""


def _name(key: tuple[str, ...], all_keys: Sequence[tuple[str, ...]]) -> str:
    def words(of: tuple[str, ...], parts: tuple[int, ...]) -> list[str]:
        return [of[part] for part in parts]

    def is_its_own(parts: tuple[int, ...]) -> bool:
        return sum(words(other, parts) == words(key, parts) for other in all_keys) == 1

    parts = next((parts for parts in _NAMES if is_its_own(parts)), _NAMES[-1])
    return ", ".join(word for word in dict.fromkeys(words(key, parts)) if word)
