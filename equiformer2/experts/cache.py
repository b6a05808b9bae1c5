"""Cache of merged networks with a limit of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from equiformer2.errors import InputError

_Value = TypeVar("_Value")


class BoundedCache(Generic[_Value]):
    """Values by key, of which the ones used longest ago are given up beyond a limit of bytes.

    Threads may share it; a value that two of them need at the same time is made once.

    Attributes:
        limit: most bytes of all values together.
        bytes: that the values have now.
        hits, misses: numbers of calls that found a value, and that made one.

    Args:
        limit: most bytes; 0 keeps nothing. A value that alone is larger is made and not kept.

    Raises:
        InputError: the limit is negative.
    """

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise InputError(f"the limit of the cache is {limit}: give a whole number of bytes, at least 0")
        self.limit = limit
        self.bytes = self.hits = self.misses = 0
        self._values: OrderedDict[Hashable, tuple[_Value, int]] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], tuple[_Value, int]]) -> _Value:
        """Return the value of `key`, made and kept where it is not there.

        Args:
            key: of the value.
            make: returns the value and its bytes.
        """
        with self._lock:
            if key in self._values:
                self.hits += 1
                self._values.move_to_end(key)
                return self._values[key][0]
            self.misses += 1
            value, size = make()
            if size <= self.limit:
                while self.bytes + size > self.limit:
                    _, (_, freed) = self._values.popitem(last=False)
                    self.bytes -= freed
                self._values[key] = value, size
                self.bytes += size
            return value

    def clear(self) -> None:
        """Give up all values."""
        with self._lock:
            self._values.clear()
            self.bytes = 0
