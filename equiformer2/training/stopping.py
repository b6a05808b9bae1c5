"""Stopping on a signal: Ctrl-C, and what a batch system sends before it takes the machine away."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed

#: SIGTERM: `kill`, Slurm, Kubernetes, spot instances; SIGUSR1: Slurm's `--signal=USR1@90`; SIGINT: Ctrl-C;
#: SIGHUP: the terminal or the connection is gone.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StoppedBySignal(SystemExit):
    """The run has been saved and ends here, with the status that a shell gives a process ended by the signal.

    Processes other than the first end with 0, so that a launcher does not take the first one down with them.
    """

    def __init__(self, number: int, first_process: bool) -> None:
        super().__init__(128 + number if first_process else 0)


class StopRequest:
    """Remembers the first stop signal; all processes of a run learn of it at the same step.

    A second Ctrl-C does not wait for the end of the step. Nothing waits for a GPU: what the processes tell
    each other at one call is read at the next.
    """

    def __init__(self) -> None:
        self._received = 0
        self._is_first_process = True
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()
        self._shared: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def listen(self, is_first_process: bool = True) -> bool:
        """Note stop signals from now on instead of ending the process.

        Signals that are ignored, as SIGHUP is under `nohup`, stay so.

        Returns:
            False in another thread than the main one, where Python can set no handlers: nothing changes.
        """
        self._received, self._is_first_process = 0, is_first_process
        if threading.current_thread() is not threading.main_thread():
            return False
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in heard}
        return True

    def stop_listening(self) -> None:
        """Restore the handlers that the signals had before `listen`."""
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked loader process
            return
        if number == self._received == signal.SIGINT:
            raise StoppedBySignal(number, self._is_first_process)
        self._received = self._received or number

    def agreed(self, device: torch.device) -> int:
        """The signal, 0 for none; called by all processes at the same places."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self._received
        known = self._read()
        self._tell(device)
        return known

    def _read(self) -> int:
        if self._shared is None:
            return 0
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._shared)

    def _tell(self, device: torch.device) -> None:
        value = torch.tensor(self._received)
        on_device = value.to(device, non_blocking=True)
        distributed.all_reduce(on_device, op=distributed.ReduceOp.MAX)
        self._shared = on_device.to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Inside, a Ctrl-C that Lightning answers, before the first step or in a last validation, stays one.

    Lightning would end the process with status 1 and ignore every Ctrl-C after it.

    Raises:
        KeyboardInterrupt: in place of Lightning's exit.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if is_main and before is not None:
            signal.signal(signal.SIGINT, before)


def leave_signals_to_stop_request(trainer: pl.Trainer) -> None:
    """Switch off what Lightning does about SIGTERM.

    It would end the run without a checkpoint. For that its processes ask each other at every micro-batch and
    wait for the answer, and so for the GPU, and its handler waits for the other processes, which a signal to
    one of them alone does not reach.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def leave_signals_to_the_parent(_: int) -> None:
    """Ignore stop signals in a loader process, which gets those of its group: its step must finish."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
