"""Rows of results in files: one JSON object on each line, added as experiments end.

A line that was cut off by a crash is not a row: it is skipped, and overwritten by the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from masked_wavelet_nerf.errors import UserError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        UserError: if it is no such file, or holds none.
    """
    try:
        rows, _ = _parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected rows of mwnerf bench --rows, a JSON object on each line "
            f"({type(error).__name__}: {error})"
        ) from error
    if not rows:
        raise UserError(f"{path}: no rows; mwnerf bench --rows {path} adds them")
    return rows


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, which is made if need be; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        _, whole = _parse(file.read())
        file.truncate(whole)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _parse(content: bytes) -> tuple[list[Row], int]:
    """Rows, and how many bytes of whole lines they take.

    Raises:
        ValueError: if a whole line is not an object.
    """
    whole = content.rfind(b"\n") + 1
    rows = [json.loads(line) for line in content[:whole].splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    return rows, whole


def mean(rows: Sequence[Row], key: str) -> float:
    """Of a number in all rows."""
    return sum(float(row[key]) for row in rows) / len(rows)
