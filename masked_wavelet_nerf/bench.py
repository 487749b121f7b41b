"""``mwnerf bench``: presets × variants × scenes × seeds, as rows of results."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from nerfstudio.utils.rich_utils import CONSOLE
from rich import box
from rich.table import Table

from masked_wavelet_nerf.experiment import SAMPLE_SCENE, BenchError, Experiment
from masked_wavelet_nerf.laboratory import EngineName, run_experiments
from masked_wavelet_nerf.presets import load_preset
from masked_wavelet_nerf.results import Row, in_words


@dataclass
class Bench:
    """Train presets with ns-train, export, decode, and measure before and after.

    Every run of every preset (its variants, its sweep) is trained on every scene with every seed.
    With --rows, results are added to a file as they come, and what is there already is not run
    again: a sweep that was stopped goes on with the same command. mwnerf report makes tables and
    curves of such files.
    """

    presets: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """TOML files under configs/."""
    data: Path | None = None
    """Folder of the one capture to train on, whatever scenes the presets name."""
    data_root: Path | None = None
    """Folder of the scenes that the presets name."""
    scenes: tuple[str, ...] = ()
    """Only these scenes of those that presets name (lego is enough for nerf_synthetic/lego); all if
    not given."""
    variants: tuple[str, ...] = ()
    """Only these variants of those that presets have; all if not given."""
    seeds: tuple[int, ...] = (42,)
    """Random seeds (--machine.seed)."""
    rows: Path | None = None
    """File of results, one JSON object on each line: added to, and resumed from."""
    jobs: int = 1
    """Experiments at a time. Presets with threads = 1 do not slow each other down while there are
    cores; on several GPUs, each job has one."""
    engine: EngineName = "local"
    """Where experiments run: in processes here, or as tasks of Ray (its cluster, if RAY_ADDRESS
    names one, whose machines must see --data-root and --output-dir under the same names)."""
    retries: int = 1
    """Try an experiment that fails so many times more."""
    output_dir: Path | None = None
    """Where runs go, each in a folder of its own; a temporary folder if not given."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on."""
    steps: int | None = None
    """Stop training after so many steps, to see that a preset starts on this machine."""
    eval_views: int | None = None
    """Evaluate so many test views only, evenly spread."""
    eval_stride: int = 1
    """Evaluate one of so many rows and columns: quicker, about the same PSNR, another SSIM."""
    dry_run: bool = False
    """Say what would be trained, and stop."""
    json: bool = False
    """Print rows as JSON on standard output, one a line; progress goes to standard error."""

    def main(self) -> int:
        """Run, and print a table of the rows; 1 if an experiment failed."""
        for name in ("jobs", "steps", "eval_views", "eval_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise BenchError(f"--{flag} {value}: expected 1 or more")
        if self.retries < 0:
            raise BenchError(f"--retries {self.retries}: expected 0 or more")
        experiments = self.plan()
        if self.dry_run:
            for experiment in experiments:
                print(experiment.title)
            return 0
        output_dir = self.output_dir or Path(tempfile.mkdtemp(prefix="mwnerf-bench-"))
        failed = []
        try:
            with contextlib.redirect_stdout(sys.stderr):
                rows, failed = run_experiments(
                    experiments,
                    output_dir,
                    rows_path=self.rows,
                    jobs=self.jobs,
                    engine=self.engine,
                    retries=self.retries,
                )
        finally:
            if self.output_dir is None and not failed:  # else their logs are what is needed now
                shutil.rmtree(output_dir, ignore_errors=True)
        if self.json:
            for row in rows:
                print(json.dumps(row))
        else:
            CONSOLE.print(_table(rows))
        if failed:
            print(
                f"{len(failed)} of {len(experiments)} experiments failed; logs are in "
                f"{output_dir}. The same command with --rows tries them again.",
                file=sys.stderr,
            )
        return 1 if failed else 0

    def plan(self) -> list[Experiment]:
        """All experiments, seeds last: the first seed of everything is there first.

        Raises:
            UserError: if a preset cannot be used, or a capture is not where it should be.
        """
        if not self.presets:
            raise BenchError("expected at least one preset, a TOML file under configs/")
        if self.data is not None and self.data_root is not None:
            raise BenchError("--data is one capture, --data-root a folder of them: give one")
        presets = [(path, load_preset(path)) for path in self.presets]
        self._expect_known(
            "--variants", self.variants, {name for _, preset in presets for name in preset.variants}
        )
        if self.data is None:
            scenes = {scene for _, preset in presets for scene in preset.scenes}
            known = scenes | {scene.split("/")[-1] for scene in scenes}
            self._expect_known("--scenes", self.scenes, known)
        experiments = []
        for path, preset in presets:
            for scene, data in self._scenes(path, preset.scenes):
                for variant, place, run in preset.runs():
                    if self.variants and variant not in self.variants:
                        continue
                    for seed in self.seeds:
                        experiments.append(
                            Experiment(
                                preset=run,
                                variant=variant,
                                place=place,
                                scene=scene,
                                data=data,
                                seed=seed,
                                device=self.device,
                                steps=self.steps,
                                eval_views=self.eval_views,
                                eval_stride=self.eval_stride,
                            )
                        )
        if not experiments:
            raise BenchError("--scenes and --variants: no preset has some of both; give one alone")
        return sorted(experiments, key=lambda experiment: self.seeds.index(experiment.seed))

    @staticmethod
    def _expect_known(option: str, chosen: Iterable[str], known: set[str]) -> None:
        for name in chosen:
            if name not in known:
                there = ", ".join(sorted(known)) or "none at all"
                raise BenchError(f"{option} {name}: no preset names it; expected some of {there}")

    def _scenes(self, path: Path, named: tuple[str, ...]) -> list[tuple[str, str | None]]:
        """Names of scenes, and where their captures are."""
        if self.data is not None:
            if not self.data.exists():
                raise BenchError(f"--data {self.data}: not there; expected a capture's folder")
            return [(self.data.resolve().name, str(self.data.absolute()))]
        if not named:
            raise BenchError(f"{path}: no [run] scenes; --data names a capture to train on")
        chosen = [s for s in named if not self.scenes or {s, s.split("/")[-1]} & {*self.scenes}]
        found: list[tuple[str, str | None]] = []
        for scene in chosen:
            if scene == SAMPLE_SCENE:
                found.append((scene, None))
                continue
            if self.data_root is None:
                raise BenchError(
                    f"{path} trains on {', '.join(chosen)}: --data-root says which folder they "
                    "are in, --data names one capture to train on instead"
                )
            folder = self.data_root / scene
            if not folder.exists():
                raise BenchError(f"{path}: {folder} is not there; expected the scene {scene!r}")
            found.append((scene, str(folder.absolute())))
        return found


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.MARKDOWN)
    for column in ("experiment", "seed", "PSNR", "bytes", "dropped", "minutes"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    for row in rows:
        place = row["place"].items()
        table.add_row(
            in_words(row["preset"], row["variant"], place, row["scene"], row["export"]),
            str(row["seed"]),
            f"{row['psnr_after']:.2f}",
            f"{row['bytes']:,}",
            f"{row['dropped']:.1%}",
            f"{row['train_seconds'] / 60:.1f}",
        )
    return table
