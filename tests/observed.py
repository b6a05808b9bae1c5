"""Calls of functions, observed as a profiler does: nothing is replaced."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any


@dataclass
class Call:
    """One call of an observed function.

    Attributes:
        name: name of the function.
        arguments: its arguments by the names of its parameters.
        result: value that it returned; None before, and after an exception.
    """

    name: str
    arguments: dict[str, Any]
    result: Any = None


@contextmanager
def observed(
    *functions: Callable[..., Any], on_call: Callable[[list[Call]], object] | None = None
) -> Iterator[list[Call]]:
    """List the calls of Python functions and methods in this thread, in the order in which they begin.

    Args:
        functions: functions to observe, wherever they are called.
        on_call: called with the list when a call begins, for instance to send a signal.
    """
    codes: set[CodeType] = {inspect.unwrap(function).__code__ for function in functions}
    calls: list[Call] = []
    open_calls: dict[FrameType, Call] = {}

    def profile(frame: FrameType, event: str, value: Any) -> None:
        if callable(before):
            before(frame, event, value)
        if frame.f_code not in codes:
            return
        if event == "call":
            open_calls[frame] = Call(frame.f_code.co_name, dict(frame.f_locals))
            calls.append(open_calls[frame])
            if on_call is not None:
                on_call(calls)
        elif event == "return" and frame in open_calls:
            open_calls.pop(frame).result = value

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)
