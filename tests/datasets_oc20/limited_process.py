"""Calls in a process whose files are limited in size, which fails writes just as a full disk does."""

import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def error_with_limited_files(limit: int, function: Callable[..., Any], *arguments: Any) -> Exception | None:
    """Error that `function` raises in a forked process where no file may be larger than `limit` bytes."""

    def call(connection: Connection) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            function(*arguments)
        except Exception as error:
            connection.send(error)
        else:
            connection.send(None)

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=call, args=(sender,))
    process.start()
    sender.close()
    error: Exception | None = receiver.recv()
    process.join()
    return error
