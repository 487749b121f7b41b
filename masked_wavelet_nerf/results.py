"""Rows of results in files: one JSON object on each line, added as experiments end.

A line that was cut off by a crash is not a row: it is skipped, and overwritten by the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from masked_wavelet_nerf.errors import UserError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        UserError: if it is no such file, or holds none.
    """
    rows = rows_so_far(path)
    if not rows:
        raise UserError(f"{path}: no rows; mwnerf bench --rows {path} adds them")
    return rows


def rows_so_far(path: Path) -> list[Row]:
    """The rows of a file that may have none yet.

    Raises:
        UserError: if it is no such file.
    """
    try:
        rows, _ = _parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: expected rows of mwnerf bench --rows, a JSON object on each line "
            f"({type(error).__name__}: {error})"
        ) from error
    return rows


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, which is made if need be; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        _, whole = _parse(file.read())
        file.truncate(whole)
        file.seek(max(0, whole - 1))
        if whole and file.read() != b"\n":  # from another program
            file.write(b"\n")
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def in_words(preset: str, variant: str, place: Iterable[tuple[str, Any]], *more: str) -> str:
    """How people call a run: what there is of preset, variant, place in a sweep, and more."""
    values = [
        f"{flag.rsplit('.')[-1]} {list(value) if isinstance(value, tuple) else value}"
        for flag, value in place
    ]
    return ", ".join(word for word in (preset, variant, *values, *more) if word)


def _parse(content: bytes) -> tuple[list[Row], int]:
    """Rows, and how many bytes they take.

    Raises:
        ValueError: if a line is not an object, and not the last one, cut off.
    """
    whole = content.rfind(b"\n") + 1
    rows = [json.loads(line) for line in content[:whole].splitlines() if line.strip()]
    try:
        last = json.loads(content[whole:])
    except ValueError:
        if content[whole:].strip()[:1] not in (b"", b"{"):  # else cut off, or nothing
            raise
    else:
        if not isinstance(last, dict):
            raise ValueError("no rows: the last line is no object")
        rows.append(last)
        whole = len(content)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    return rows, whole
