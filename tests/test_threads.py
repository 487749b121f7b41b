"""Tasks on torch's OpenMP threads, and on the pool that stands in for them."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from masked_wavelet_nerf import threads


@pytest.fixture(autouse=True)
def restored_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["openmp", "pool"], autouse=True)
def team(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch has no OpenMP library that can be entered")
    return request.param


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(num_threads):
    torch.set_num_threads(num_threads)
    for count in (0, 1, 2, 50):
        tasks = [lambda i=i: i * i for i in range(count)]
        assert threads.run(tasks) == [i * i for i in range(count)]
        assert threads.run(tasks, list(range(count))) == [i * i for i in range(count)]


def test_the_dearest_task_starts_first():
    torch.set_num_threads(2)
    started = []
    both = threading.Barrier(2, timeout=20)
    tasks = [lambda i=i: (started.append(i), both.wait()) for i in range(4)]
    threads.run(tasks, [1, 30, 2, 20])
    assert set(started[:2]) == {1, 3} and set(started[2:]) == {0, 2}


def test_every_thread_is_called_once_and_the_caller_is_among_them():
    together = threading.Barrier(3, timeout=20)
    seen = []

    def work():
        together.wait()
        seen.append(threading.get_native_id())

    threads.on_every_thread(work, 3)
    assert len(seen) == len(set(seen)) == 3
    assert threading.get_native_id() in seen


def test_openmp_threads_are_those_of_torch(team):
    """Twice the same ones: a team stays."""
    found = []
    for _ in range(2):
        together, seen = threading.Barrier(2, timeout=20), []
        work = lambda seen=seen, b=together: (b.wait(), seen.append(threading.get_native_id()))  # noqa: E731
        threads.on_every_thread(work, 2)
        found.append(set(seen))
    if team == "openmp":
        assert found[0] == found[1]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_error_is_raised_once_all_have_stopped(num_threads):
    torch.set_num_threads(num_threads)
    done = []

    def fail():
        raise ArithmeticError("here")

    with pytest.raises(ArithmeticError, match="here"):
        threads.run([fail, *[lambda i=i: done.append(i) for i in range(5)]])
    # An empty queue ends a thread by IndexError: a task's own must not be taken for it.
    with pytest.raises(IndexError, match="list index"):
        threads.run([lambda: [][0], lambda: None])


def test_denormals_are_flushed_on_every_thread(team):
    torch.set_num_threads(2)
    # Any thread of a pool may take any task: only in a new one none is in another test's state.
    threads._pool.cache_clear()
    # A training in another test has left it on, and then the number itself would become zero.
    torch.set_flush_denormal(False)
    if team == "openmp":
        threads.on_every_thread(lambda: torch.set_flush_denormal(False), 2)
    tiny = torch.full((1,), 1e-40)
    assert float(tiny * 1.0) > 0
    together = threading.Barrier(2, timeout=20)

    def product() -> float:
        together.wait()
        return float(tiny * 1.0)

    try:
        threads.flush_denormals()
        assert threads.run([product, product]) == [0.0, 0.0]
    finally:
        torch.set_flush_denormal(False)
        if team == "openmp":
            threads.on_every_thread(lambda: torch.set_flush_denormal(False), 2)
    assert float(tiny * 1.0) > 0


def test_who_traces_lines_is_kept_out_meanwhile():
    """nerfstudio's viewer gives up images so, and what is raised must not pass through C."""
    names, seen = {"guarded", "work"}, []

    def tracer(frame, event, argument):
        if frame.f_code.co_name in names:
            seen.append(frame.f_code.co_name)
        return tracer

    def work() -> None:
        pass

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        threads.on_every_thread(work, 2)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert not seen
