"""Fixtures that tests of several wings share."""

from collections.abc import Callable

import pytest

from equiformer2.kernels import chunks


@pytest.fixture
def chunk_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the memory of one part of the edges, so that a small network runs in many parts."""
    return lambda size: monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", size)
