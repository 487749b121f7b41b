"""Presets: the ``ns-train`` flags of a reported result, as a TOML file of data only.

[about]         source, expected, notes: read by people
[run]           method, dataparser (nerfstudio's name), threads (0: all cores), scenes (folders
                below --data-root), base (another preset, relative to this file, of which all holds
                that is not said here)
[flags]         ns-train flags; nested tables are joined with dots
[dataparser]    flags of the data parser
[sweep]         a list of values for each of some flags (joined with dots, in quotes): a run for
                each combination, which together are a curve
[variants.NAME] flags in which a run differs, nested as in [flags]: a curve for each
[exports.NAME]  how the run is written: profile (range or paper), allowed-loss (dB); a row for each
[paper]         published numbers to hold against, by scene: psnr (dB), megabytes
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    scenes: tuple[str, ...] = ()
    """Folders below a data root."""
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exports: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    """How a run is written, by name: profile, allowed-loss."""
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def runs(self) -> Iterator[tuple[str, dict[str, Any], Preset]]:
        """(variant, its place in the sweep, what it trains) of every run; at least one.

        A variant without a name is the preset as it is.
        """
        for name, flags in (self.variants or {"": {}}).items():
            for values in itertools.product(*self.sweep.values()):
                place = dict(zip(self.sweep, values, strict=True))
                changed = {**flatten(self.flags), **place, **flatten(flags)}
                yield name, place, dataclasses.replace(self, flags=changed, sweep={}, variants={})

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
    content = _read(path, ())
    run = content.get("run", {})
    for key in ("method", "dataparser"):
        if not isinstance(run.get(key), str):
            raise PresetError(f"{path}: [run] lacks {key!r}, the name that ns-train knows it by")
    for flag, values in content.get("sweep", {}).items():
        if not isinstance(values, list) or not values:
            raise PresetError(f"{path}: [sweep] {flag}: expected a list of values")
    for name, options in content.get("exports", {}).items():
        strange = set(options) - {"profile", "allowed-loss"}
        if strange or options.get("profile", "range") not in ("range", "paper"):
            raise PresetError(
                f"{path}: [exports.{name}] {options}: expected profile (range or paper) and "
                "allowed-loss (dB)"
            )
    return Preset(
        name=path.stem,
        method=run["method"],
        dataparser=run["dataparser"],
        flags=content.get("flags", {}),
        dataparser_flags=content.get("dataparser", {}),
        threads=int(run.get("threads", 0)),
        about=content.get("about", {}),
        scenes=tuple(run.get("scenes", ())),
        sweep=content.get("sweep", {}),
        variants=content.get("variants", {}),
        exports=content.get("exports") or {"": {}},
        paper=content.get("paper", {}),
    )


_TABLES = ("about", "run", "flags", "dataparser", "sweep", "variants", "exports", "paper")
_INHERITED = ("run", "flags", "dataparser")


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a preset, those of its bases below them."""
    try:
        content = tomllib.loads(path.read_text("utf8"))
    except OSError as error:
        raise PresetError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: not TOML: {error}") from error
    unknown = set(content) - set(_TABLES)
    if unknown:
        raise PresetError(
            f"{path}: unknown tables {sorted(unknown)}; expected {', '.join(_TABLES)}"
        )
    base = content.get("run", {}).pop("base", None)
    if base is not None:
        above = (*above, path.resolve())
        of = path.parent / base
        if of.resolve() in above:
            raise PresetError(f"{path}: [run] base {base!r} leads back to itself")
        inherited = _read(of, above)
        for table in _INHERITED:
            content[table] = _merge(inherited.setdefault(table, {}), content.setdefault(table, {}))
    return content


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(known, value)
        else:
            merged[key] = value
    return merged


def flatten(flags: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with their names joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in flags.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _to_arguments(flags: Mapping[str, Any]) -> Iterator[str]:
    for key, value in flatten(flags).items():
        yield f"--{key}"
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
