"""Several batches at a time on a CPU, each on threads of its own.

A small network spends much of a pass in operations that are too short to divide, so two threads on one batch
gain little. Threads of OpenMP also spin while they wait for each other, and then a second busy program makes
them many times slower. Whole batches side by side wait for nothing inside a pass. All threads read one copy
of the weights.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Threads by their number and the number of torch's threads that each may use. They are kept, because the
#: memory that a thread computes in (`kernels.scratch_buffers`) is its own.
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_pools.clear)


def side_by_side(count: int | None, device: torch.device | str = "cpu") -> int:
    """Number of batches to compute at a time: one per thread that torch may use, at most `count`.

    `OMP_NUM_THREADS`, `torch.set_num_threads` and the processors that the process may run on limit torch's
    threads, and so this number. It is 1 if torch's default precision was changed: functions that put such
    settings of the process right for a while would disturb each other.

    Args:
        count: number of batches; None for unknown, many.
        device: where they are computed; one at a time unless it is a CPU.
    """
    settings = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    if torch.device(device).type != "cpu" or settings != (torch.float32, "highest"):
        return 1
    threads = torch.get_num_threads()
    return threads if count is None else max(1, min(threads, count))


def map_batches(
    function: Callable[[_Item], _Result],
    batches: Iterable[_Item],
    *,
    count: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[_Result]:
    """Yield `function(batch)` for every batch in order, several at a time (`side_by_side`).

    With at least as many batches as threads each is computed on one thread, and its result has the bits that
    it has where there is one thread alone. Fewer batches share the threads equally; a single one gets all.

    Args:
        function: called in several threads at once.
        batches: read in the calling thread, at most two batches per thread ahead.
        count: number of batches; None for unknown, many.
        device: where `function` computes.

    Raises:
        Exception: the first one, in the order of the batches, that `function` raises; batches behind it that
            have not begun never do.
    """
    workers = side_by_side(count, device)
    if workers == 1:
        for batch in batches:  # `map` would end without a word at a StopIteration of the function
            yield function(batch)
        return
    threads = torch.get_num_threads()
    key = workers, threads // workers
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(workers, "batches", torch.set_num_threads, (key[1],))
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def compute(batch: _Item) -> _Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(batch)

    waiting: deque[Future[_Result]] = deque()
    # The calling thread reads data and results meanwhile; its own operations should not take more threads.
    torch.set_num_threads(1)
    try:
        for batch in batches:
            waiting.append(_pools[key].submit(compute, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        torch.set_num_threads(threads)


def map_all(
    function: Callable[[_Item], _Result], items: Sequence[_Item], device: torch.device | str = "cpu"
) -> list[_Result]:
    """Return `function(item)` for every item, several at a time; see `map_batches`."""
    return list(map_batches(function, items, count=len(items), device=device))
