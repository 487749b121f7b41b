"""Tasks over as many threads as torch uses: in torch's own team of OpenMP threads where possible.

Between parallel regions OpenMP's threads wait actively for some milliseconds. Threads of a pool of
our own would share the cores with them, which on two cores was slower than a single thread. So
tasks enter the team that torch's operators run in, by the entry point that compilers call for a
parallel region. Without it (not Linux, another backend of torch) a pool serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_OPENMP_NAMES = ("libgomp", "libiomp", "libomp")
_PROCESS = os.getpid()
_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(tasks: Sequence[Callable[[], Any]], costs: Sequence[int] | None = None) -> list[Any]:
    """Results of all tasks, which threads take one by one, the dearest first.

    Raises:
        BaseException: the first that a task raised, once all threads have stopped.
    """
    num_threads = min(torch.get_num_threads(), len(tasks))
    if num_threads <= 1:
        return [task() for task in tasks]
    results: list[Any] = [None] * len(tasks)
    order = range(len(tasks))
    pending = deque(order if costs is None else sorted(order, key=lambda i: -costs[i]))

    def take_all() -> None:
        while True:
            try:
                i = pending.popleft()
            except IndexError:
                return
            results[i] = tasks[i]()

    on_every_thread(take_all, num_threads)
    return results


def on_every_thread(work: Callable[[], Any], num_threads: int) -> None:
    """Calls ``work`` once on each of so many threads, of which the caller is one.

    Raises:
        BaseException: the first that a call raised, once all threads have stopped.
    """
    failures: list[BaseException] = []

    def guarded(_: object = None) -> None:
        try:
            work()
        except BaseException as error:  # it must not pass through C
            failures.append(error)

    # nerfstudio's viewer gives up an image by raising in whatever line is traced next.
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        # A forked process has none of its parent's OpenMP threads, but waits for them.
        openmp = _openmp() if os.getpid() == _PROCESS else None
        if openmp is not None:
            openmp.GOMP_parallel(_Region(guarded), None, num_threads, 0)
        else:
            helpers = [_pool(os.getpid()).submit(guarded) for _ in range(num_threads - 1)]
            guarded()
            for helper in helpers:
                helper.result()
    finally:
        sys.settrace(tracer)
    if failures:
        raise failures[0]


def flush_denormals() -> None:
    """Takes denormal numbers for zero on all threads that torch computes with from here.

    ``torch.set_flush_denormal`` does so on the calling thread only, and Adam's second thread then
    waits for the microcode: dropped coefficients get no gradient, so that their running means decay
    into denormal numbers.
    """
    on_every_thread(lambda: torch.set_flush_denormal(True), torch.get_num_threads())


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, if it is one that can be entered."""
    if "backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    # What lies beside torch comes first: others may have brought a library of their own.
    for path in sorted(set(_loaded_files()), key=lambda path: "torch" not in path):
        if Path(path).name.startswith(_OPENMP_NAMES):
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(path)
                if hasattr(library, "GOMP_parallel"):
                    library.GOMP_parallel.restype = None
                    library.GOMP_parallel.argtypes = [
                        _Region,
                        ctypes.c_void_p,
                        ctypes.c_uint,
                        ctypes.c_uint,
                    ]
                    return library
    return None


def _loaded_files() -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                yield fields[5]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    # A forked process inherits the pool, but not its threads: each has a pool of its own.
    return ThreadPoolExecutor(
        initializer=torch.set_flush_denormal, initargs=(True,), thread_name_prefix="native"
    )
