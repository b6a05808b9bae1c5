"""The driver's side of a worker process."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

# glibc maps every large tensor anew and returns it at once, at the price of page faults; the second setting
# keeps freed memory for the next tensor. Both implementations always run under the same one.
ALLOCATORS = {
    "default": {},
    "no-mmap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)},
}


class BenchmarkError(RuntimeError):
    """A worker could not do what was asked."""


class RefusedError(BenchmarkError):
    """The worker said no, and is ready for the next request."""


class Session:
    """One worker process; use as a context manager.

    `memory_limit` (bytes) makes its allocations fail beyond that, so that a measurement that does not fit
    ends with an error and not with the machine.
    """

    def __init__(
        self,
        implementation: str,
        python: str,
        threads: int,
        allocator: str,
        device: str = "cpu",
        memory_limit: int | None = None,
    ) -> None:
        self.implementation = implementation
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        environment |= ALLOCATORS[allocator]
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        limit = [] if memory_limit is None else [str(memory_limit)]
        self.process = subprocess.Popen(
            [os.path.abspath(python), "-m", "benchmarks.worker", implementation, device, *limit],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            RefusedError: the worker answered with an error.
            BenchmarkError: the worker has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            killed = status == -signal.SIGKILL
            reason = "was killed (out of memory?)" if killed else f"ended with status {status}"
            raise BenchmarkError(f"the {self.implementation} process {reason} when asked to {command}")
        answer = json.loads(line)
        if "error" in answer:
            raise RefusedError(f"{self.implementation}, asked to {command}: {answer['error']}")
        return answer["answer"]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # A worker in the middle of a call would be waited for: an interrupted driver should not hang.
        self.process.terminate()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
