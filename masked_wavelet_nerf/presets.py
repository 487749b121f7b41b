"""Presets: the ``ns-train`` flags of a reported result, as a TOML file of data only.

[about]         source, expected, notes: read by people
[run]           method, dataparser (nerfstudio's name), threads (0: all cores), scenes (folders
                below --data-root), base (another preset, relative to this file, whose [run],
                [flags] and [dataparser] hold where nothing else is said here)
[flags]         ns-train flags; nested tables are joined with dots
[dataparser]    flags of the data parser
[sweep]         a list of values for each of some flags (joined with dots, in quotes): a run for
                each combination, which together are a curve
[variants.NAME] flags in which a run differs, nested as in [flags]: a curve for each
[exports.NAME]  how the run is written: profile (range or paper), allowed-loss (dB), keep (share of
                the coefficients, the largest, in place of trained masks); a row for each
[[paper]]       published numbers to hold against: psnr (dB), megabytes (2^20 bytes), dropped; of a
                scene, or the mean over all; at a place in the sweep, or at any
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


_PUBLISHED = ("psnr", "megabytes", "dropped")


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
    """How a run is written, by name: profile, allowed-loss, keep."""
    paper: Sequence[Mapping[str, Any]] = ()

    def runs(self) -> Iterator[tuple[str, dict[str, Any], Preset]]:
        """(variant, its place in the sweep, what it trains) of every run; at least one.

        A variant without a name is the preset as it is.
        """
        for name, flags in (self.variants or {"": {}}).items():
            for values in itertools.product(*self.sweep.values()):
                place = dict(zip(self.sweep, values, strict=True))
                changed = {**flatten(self.flags), **place, **flatten(flags)}
                yield name, place, dataclasses.replace(self, flags=changed, sweep={}, variants={})

    def published(self, scene: str | None, place: Mapping[str, Any]) -> dict[str, float]:
        """What others report.

        Args:
            scene: of a scene; None for the mean over all scenes.
            place: of the sweep.

        Returns:
            psnr (dB), megabytes, dropped; as far as they are known.
        """
        for numbers in self.paper:
            at = {key: value for key, value in numbers.items() if key not in _PUBLISHED}
            if at.pop("scene", None) == scene and at.items() <= place.items():
                return {key: numbers[key] for key in _PUBLISHED if key in numbers}
        return {}

    @property
    def num_threads(self) -> int:
        """Threads, with 0 resolved: OMP_NUM_THREADS, or as many as there are cores."""
        allowed = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (allowed.isdigit() and int(allowed)) or len(os.sched_getaffinity(0))

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
    _check(path, content)
    run = content["run"]
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
        paper=content.get("paper", ()),
    )


_TABLES = ("about", "run", "flags", "dataparser", "sweep", "variants", "exports", "paper")
_INHERITED = ("run", "flags", "dataparser")


def _check(path: Path, content: Mapping[str, Any]) -> None:
    """Finds what would be misread, or fail in the middle of a sweep."""
    run = content.get("run", {})
    for key in ("method", "dataparser"):
        if not isinstance(run.get(key), str):
            raise PresetError(f"{path}: [run] lacks {key!r}, the name that ns-train knows it by")
    scenes, threads = run.get("scenes", []), run.get("threads", 0)
    if not isinstance(scenes, list) or not all(isinstance(scene, str) for scene in scenes):
        raise PresetError(f"{path}: [run] scenes {scenes!r}: expected a list of folders")
    if not isinstance(threads, int) or threads < 0:
        raise PresetError(f"{path}: [run] threads {threads!r}: expected a number, 0 for all cores")
    for flag, values in content.get("sweep", {}).items():
        if not isinstance(values, list) or not values:
            raise PresetError(f"{path}: [sweep] {flag}: expected a list of values")
    for name, flags in content.get("variants", {}).items():
        if not isinstance(flags, Mapping):
            raise PresetError(f"{path}: [variants] {name}: expected a table of flags")
    for name, options in content.get("exports", {}).items():
        if not _is_export(options):
            raise PresetError(
                f"{path}: [exports.{name}] {options}: expected profile (range or paper), "
                "allowed-loss (dB, 0 or more) and keep (a share in (0, 1])"
            )
    for numbers in content.get("paper", []):
        if not isinstance(numbers, Mapping):
            raise PresetError(f"{path}: paper: expected [[paper]], one for each result")
        known = [numbers[key] for key in _PUBLISHED if key in numbers]
        if not known or not all(isinstance(number, (int, float)) for number in known):
            raise PresetError(
                f"{path}: [[paper]] {numbers}: expected numbers, some of {', '.join(_PUBLISHED)}"
            )


def _is_export(options: Any) -> bool:
    if not isinstance(options, Mapping) or set(options) - {"profile", "allowed-loss", "keep"}:
        return False
    loss, keep = options.get("allowed-loss", 0), options.get("keep", 1)
    numbers = all(isinstance(number, (int, float)) for number in (loss, keep))
    known = options.get("profile", "range") in ("range", "paper")
    return numbers and known and loss >= 0 and 0 < keep <= 1


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
    for table in set(_TABLES) - {"paper"}:
        if not isinstance(content.get(table, {}), Mapping):
            raise PresetError(f"{path}: {table}: expected a table, [{table}]")
    if not isinstance(content.get("paper", []), list):
        raise PresetError(f"{path}: [paper]: expected [[paper]], one for each result")
    base = content.get("run", {}).pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise PresetError(f"{path}: [run] base {base!r}: expected the path of a preset")
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
