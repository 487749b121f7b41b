"""Where a row of results comes from: code, libraries, machine, and the whole configuration."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "nerfstudio", "numpy", "numba", "constriction", "PyWavelets")


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, of this package and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("masked-wavelet-nerf", *_LIBRARIES):
        found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def commit() -> str | None:
    """The commit that this code is of, with a + if it was changed since; None if not from git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "masked_wavelet_nerf", "export")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's folder
        return None


@functools.cache
def machine() -> dict[str, Any]:
    """What computes here. Nothing that tells whose machine it is."""
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def configuration(config: Any) -> dict[str, Any]:
    """All numbers and names of a configuration, nested names joined with dots.

    Paths are left out: they say where things lie on this machine, and nothing of the result.
    """
    flat: dict[str, Any] = {}
    _flatten(config, "", flat)
    return flat


def _flatten(value: Any, name: str, flat: dict[str, Any]) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, part in value.items():
            _flatten(part, f"{name}.{key}" if name else str(key), flat)
    elif isinstance(value, (list, tuple)) and all(_is_plain(part) for part in value):
        flat[name] = list(value)
    elif _is_plain(value):
        flat[name] = value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
