"""Runs many experiments: side by side on this machine, or as tasks of Ray.

Each experiment has a process and a folder of its own. Its rows are added to the file of results as
soon as it ends, so that whatever stops a sweep costs what was under way, and the next call with the
same file goes on from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from nerfstudio.utils.rich_utils import CONSOLE

from masked_wavelet_nerf.errors import UserError
from masked_wavelet_nerf.experiment import Experiment
from masked_wavelet_nerf.results import Row, add_rows, rows_so_far

EngineName = Literal["local", "ray"]
_LINES_OF_LOG = 15


class EngineError(UserError):
    """An engine cannot be used here."""


def run_experiments(
    experiments: Sequence[Experiment],
    output_dir: Path,
    *,
    rows_path: Path | None = None,
    jobs: int = 1,
    engine: EngineName = "local",
    retries: int = 1,
) -> tuple[list[Row], list[Experiment]]:
    """Runs what the file of results does not hold yet.

    Args:
        experiments: in the order in which they start.
        output_dir: every experiment leaves a folder there, with its log.
        rows_path: file of results; None keeps no file.
        jobs: how many run at a time.
        engine: local processes, or tasks of the Ray cluster that RAY_ADDRESS names, or of one of
            this machine's own.
        retries: how often a failed experiment is tried again.

    Returns:
        The rows of these experiments, those of before included, and the experiments that failed.

    Raises:
        EngineError: if the engine is not installed.
    """
    wanted = {experiment.identity: experiment for experiment in experiments}
    before = rows_so_far(rows_path) if rows_path is not None and rows_path.exists() else []
    rows = [row for row in before if row.get("experiment") in wanted]
    known = {(row["experiment"], row.get("export")) for row in rows}
    done = {
        key
        for key, experiment in wanted.items()
        if known >= {(key, export) for export in experiment.preset.exports}
    }
    left = [experiment for key, experiment in wanted.items() if key not in done]
    if done:
        CONSOLE.print(f"{len(done)} of {len(wanted)} experiments are in {rows_path}: kept.")
    failed, start = [], time.monotonic()
    results = _ENGINES[engine](left, output_dir, jobs, retries)
    for count, (experiment, found) in enumerate(results, 1):
        if isinstance(found, str):
            failed.append(experiment)
            text = f"Failed: {experiment.title}\n{found}"
            CONSOLE.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            new = [row for row in found if (row["experiment"], row["export"]) not in known]
            rows += new
            if rows_path is not None:
                add_rows(rows_path, new)
        minutes = (time.monotonic() - start) / 60
        to_go = minutes / count * (len(left) - count)
        for row in () if isinstance(found, str) else found:
            CONSOLE.print(
                f"{count} of {len(left)}: {experiment.title} {row['export']}: "
                f"{row['psnr_after']:.2f} dB in {row['bytes']:,} bytes; {minutes:.0f} min so far, "
                f"some {to_go:.0f} to go",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    return rows, failed


def attempt(
    experiment: Experiment, output_dir: Path, threads: int, gpu: str | None, retries: int
) -> list[Row] | str:
    """Runs one experiment in a process of its own.

    Args:
        experiment: what to do.
        output_dir: its folder is made in there.
        threads: for a preset that leaves their number open.
        gpu: the only one that it sees; None leaves that alone.
        retries: how often to try again.

    Returns:
        Its rows, or the end of its log after it has failed for good.
    """
    folder = output_dir / experiment.identity
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "rows.json", folder / "log.txt"
    number = str(experiment.preset.threads or threads)
    environment = {**os.environ, "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, "-m", "masked_wavelet_nerf.experiment", experiment.to_json()]
    code = 0
    for _ in range(1 + retries):
        result.unlink(missing_ok=True)
        with log.open("w") as file:
            code = subprocess.run(
                [*command, str(folder), str(result)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if code == 0 and result.is_file():
            return json.loads(result.read_text("utf8"))
    last = log.read_text("utf8", "replace").splitlines()[-_LINES_OF_LOG:]
    return "\n".join([*last, f"exit code {code}; all of it: {log}"])


Results = Iterator[tuple[Experiment, "list[Row] | str"]]


def _locally(
    experiments: Sequence[Experiment], output_dir: Path, jobs: int, retries: int
) -> Results:
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    gpus: SimpleQueue[str | None] = SimpleQueue()
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ours.split(",") if ours else [str(number) for number in range(_num_gpus())]
    for slot in range(jobs):
        gpus.put(names[slot % len(names)] if len(names) > 1 else None)

    def work(experiment: Experiment) -> list[Row] | str:
        gpu = gpus.get()
        try:
            return attempt(experiment, output_dir, threads, gpu, retries)
        finally:
            gpus.put(gpu)

    with ThreadPoolExecutor(jobs) as pool:
        under_way = {pool.submit(work, experiment): experiment for experiment in experiments}
        try:
            for future in as_completed(under_way):
                yield under_way[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _with_ray(
    experiments: Sequence[Experiment], output_dir: Path, jobs: int, retries: int
) -> Results:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray import exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EngineError(
            "--engine ray: Ray is not installed; pip install 'masked-wavelet-nerf[ray]'"
        ) from error
    own = not ray.is_initialized()
    if own:
        cluster = "auto" if os.environ.get("RAY_ADDRESS") else None
        threads = max((experiment.preset.threads or 1 for experiment in experiments), default=1)
        ray.init(cluster, num_cpus=None if cluster else jobs * threads, log_to_driver=False)
    try:
        tasks: dict[Any, Experiment] = {}
        for experiment in experiments:
            threads = experiment.preset.threads or 1
            on_gpu = experiment.device == "cuda"
            # Ray tries again what died with its node; attempt does what failed by itself. It gives
            # a task its GPU by itself, too.
            task = ray.remote(attempt).options(
                num_cpus=threads, num_gpus=int(on_gpu), max_retries=retries
            )
            reference = task.remote(experiment, output_dir.absolute(), threads, None, retries)
            tasks[reference] = experiment
        while tasks:
            (reference,), _ = ray.wait(list(tasks))
            try:
                found = ray.get(reference)
            except exceptions.RayError as error:  # its worker or node is gone
                found = f"Ray: {error}"
            yield tasks.pop(reference), found
    finally:
        if own:
            ray.shutdown()


_Engine = Callable[[Sequence[Experiment], Path, int, int], Results]
_ENGINES: dict[EngineName, _Engine] = {"local": _locally, "ray": _with_ray}
