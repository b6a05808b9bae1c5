"""Parallel work in processes: a killed worker is reported at once, and no worker outlives its parent."""

import multiprocessing
import os
import threading
import time
from collections import deque
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
def parallel_map(
    function: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    num_workers: int | None,
    in_order: bool = True,
    most_waiting: int | None = None,
) -> Iterator[Iterable[_Result]]:
    """Apply `function` to every job, in several processes; use it in a `with` block.

    Args:
        function: called once per job; it and the jobs must be picklable.
        jobs: one argument for each call.
        num_workers: number of processes; None takes one per core, 1 works in this process.
        in_order: yield results in the order of the jobs; False yields them as they finish.
        most_waiting: number of results that wait in memory at most, where they are large; None does all jobs
            as fast as possible.

    Yields:
        An iterable over the results.

    Raises:
        DataError: `num_workers` is below 1.
        OSError: a process was killed.
    """
    if num_workers is not None and num_workers < 1:
        raise DataError(f"num_workers is {num_workers}; it must be at least 1, or left out for one per core.")
    processes = min(num_workers or os.cpu_count() or 1, len(jobs))
    if processes < 2:
        yield map(function, jobs)
        return
    # The workers use numpy, and torch for single records; forking spares each of them the import of torch.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context(method),
        initializer=_exit_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        if most_waiting is not None:
            yield _ahead(pool, function, jobs, most_waiting)
        elif in_order:
            yield pool.map(function, jobs)
        else:
            futures = [pool.submit(function, job) for job in jobs]
            yield (future.result() for future in as_completed(futures))
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps because the memory was full; run again, with fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(
    pool: ProcessPoolExecutor, function: Callable[[_Job], _Result], jobs: Sequence[_Job], number: int
) -> Iterator[_Result]:
    """Yield results in the order of the jobs, with at most `number` jobs begun before their turn."""
    waiting: deque[Future[_Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > number:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _exit_with_parent(parent: int) -> None:
    """End this process soon after the process `parent`: a killed parent cannot tell it to stop."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
