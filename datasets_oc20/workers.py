"""Several processes: no waiting for one that was killed, and none outlives the one that started them."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from datasets_oc20.errors import DataError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_POLL_SECONDS = 0.5


@contextmanager
def in_order(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], num_workers: int | None
) -> Iterator[Iterable[_Result]]:
    """`function` of every job, in the order of the jobs.

    Args:
        function: what to do; it and the jobs must be picklable.
        jobs: one for each call.
        num_workers: processes; None takes one per core, 1 works in this process.

    Raises:
        DataError: fewer than one process.
        OSError: a process was killed.
    """
    if _workers(jobs, num_workers) < 2:
        yield map(function, jobs)
        return
    with _pool(jobs, num_workers) as pool, _death_is_named():
        yield pool.map(function, jobs)


@contextmanager
def as_they_finish(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], num_workers: int | None
) -> Iterator[Iterable[_Result]]:
    """`function` of every job, in the order in which they finish; see `in_order`."""
    if _workers(jobs, num_workers) < 2:
        yield map(function, jobs)
        return
    with _pool(jobs, num_workers) as pool, _death_is_named():
        futures: list[Future[_Result]] = [pool.submit(function, job) for job in jobs]
        yield (future.result() for future in as_completed(futures))


def _workers(jobs: Sequence[_Job], num_workers: int | None) -> int:
    if num_workers is not None and num_workers < 1:
        raise DataError(f"num_workers is {num_workers}; it must be at least 1, or left out for one per core.")
    return min(num_workers or os.cpu_count() or 1, len(jobs))


@contextmanager
def _pool(jobs: Sequence[_Job], num_workers: int | None) -> Iterator[ProcessPoolExecutor]:
    # The workers use numpy, and torch for single records; forking spares each of them the import of torch.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(
        _workers(jobs, num_workers),
        mp_context=multiprocessing.get_context(method),
        initializer=_leave_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _death_is_named() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps because the memory was full; run again, with fewer workers."
        ) from error


def _leave_with_parent(parent: int) -> None:
    """End this process soon after its parent: a killed parent cannot tell it to stop."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
