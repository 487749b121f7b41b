"""Presets: the ``ns-train`` flags of a reported result, as a TOML file of data only.

[about]      source, expected, notes: read by people
[run]        method, dataparser (nerfstudio's name), threads (0: all cores)
[flags]      ns-train flags; nested tables are joined with dots
[dataparser] flags of the data parser
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from masked_wavelet_nerf.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class PresetError(UserError):
    """A preset file cannot be used."""


@dataclass(frozen=True)
class Preset:
    """How a run is trained."""

    name: str
    method: str
    dataparser: str
    flags: Mapping[str, Any]
    dataparser_flags: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 0
    """Threads to train with; 0 for as many as there are cores."""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_threads(self) -> int:
        """Threads, with 0 resolved."""
        return self.threads or len(os.sched_getaffinity(0))

    def arguments(self, data: Path) -> list[str]:
        """Arguments of ``ns-train`` for a capture."""
        return [
            self.method,
            *_to_arguments(self.flags),
            "--data",
            str(data),
            self.dataparser,
            *_to_arguments(self.dataparser_flags),
        ]


def load_preset(path: Path) -> Preset:
    """Reads a preset.

    Raises:
        PresetError: if the file is missing, no TOML, or lacks what a preset needs.
    """
    try:
        content = tomllib.loads(path.read_text("utf8"))
    except OSError as error:
        raise PresetError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: not TOML: {error}") from error
    unknown = set(content) - {"about", "run", "flags", "dataparser"}
    if unknown:
        raise PresetError(
            f"{path}: unknown tables {sorted(unknown)}; expected about, run, flags, dataparser"
        )
    run = content.get("run", {})
    for key in ("method", "dataparser"):
        if not isinstance(run.get(key), str):
            raise PresetError(f"{path}: [run] lacks {key!r}, the name that ns-train knows it by")
    return Preset(
        name=path.stem,
        method=run["method"],
        dataparser=run["dataparser"],
        flags=content.get("flags", {}),
        dataparser_flags=content.get("dataparser", {}),
        threads=int(run.get("threads", 0)),
        about=content.get("about", {}),
    )


def _to_arguments(flags: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in flags.items():
        if isinstance(value, Mapping):
            yield from _to_arguments(value, f"{prefix}{key}.")
            continue
        yield f"--{prefix}{key}"
        yield from map(str, value if isinstance(value, list) else [value])


@dataclass
class ShowPreset:
    """Print the ns-train command of a preset."""

    preset: Annotated[Path, tyro.conf.Positional]
    """TOML file under configs/."""
    data: Path
    """Folder of the capture."""

    def main(self) -> None:
        """Print the command."""
        print(shlex.join(["ns-train", *load_preset(self.preset).arguments(self.data)]))
