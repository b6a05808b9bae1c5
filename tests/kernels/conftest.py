"""Budgets of the chunked loops, small enough for small tensors to be cut."""

from collections.abc import Callable

import pytest

from equiformer2.kernels import chunks


@pytest.fixture
def set_budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Set the bytes of a chunk of edges and of grid points; None leaves them."""

    def set_to(budget: int | None) -> None:
        sizes = {"CPU_CACHED_BYTES": 1}  # every edge is a part of a chunk's inputs
        if budget is not None:
            sizes |= {"CPU_CHUNK_BYTES": budget, "CPU_POINT_BYTES": budget}
        for name, size in sizes.items():
            monkeypatch.setattr(chunks, name, size)

    return set_to
