"""Markers of the fast suite.

`one_in(n)`: it runs every n-th set of parameters of a test, the others are slow.
`pictures`: figures are drawn; in all other tests they are saved blank, since drawing them takes a third of
the time of a short training and most of that of a short relaxation.
"""

import base64
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
#: A PNG file of one white pixel.
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
)


def save_blank(figure: Figure, file: str | Path | BinaryIO, **_: Any) -> None:
    """Take the place of `Figure.savefig`."""
    if isinstance(file, str | Path):
        Path(file).write_bytes(BLANK)
    else:
        file.write(BLANK)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the other sets of parameters as slow, before slow tests are deselected."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def pytest_collection_finish() -> None:
    """Leave modules and tests, half a million objects, out of every collection of garbage to come."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Save figures blank during a test and the fixtures made for it.

    The hook is called for the tests of benchmarks and studies, too, whose figures are drawn.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("pictures") is None and item.path.is_relative_to(FOLDER):
            patch.setattr(Figure, "savefig", save_blank)
        return (yield)
