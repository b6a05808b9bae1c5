"""Import of `fairchem-data-oc`, the package that made OC20's slabs and placements."""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from equiformer2.errors import InputError

_DOWNLOADS = "fairchem.core.scripts.download_large_files"

EXTRA = "pip install pymatgen 'fairchem-data-oc>=1.0.2,<1.1'"
"""Command that installs what slabs of any bulk and OC20's own placement need."""


def open_catalyst() -> Any:
    """Import `fairchem.data.oc.core`, with a stand-in for the one module of fairchem-core that it asks for.

    `fairchem.core.scripts.download_large_files` downloads lists of bulks, which nothing here does. The
    stand-in is there during the import only, and only where the real package is not installed.

    Raises:
        InputError: `fairchem-data-oc` is not installed.
    """
    added: list[str] = []
    try:
        importlib.import_module(_DOWNLOADS)
    except ImportError:
        package, folder, _ = (".".join(_DOWNLOADS.split(".")[:count]) for count in (2, 3, 4))
        for name in (package, folder, _DOWNLOADS):
            if name not in sys.modules:
                sys.modules[name] = types.ModuleType(name)
                added.append(name)
        sys.modules[folder].download_large_files = sys.modules[_DOWNLOADS]  # type: ignore[attr-defined]
    try:
        return importlib.import_module("fairchem.data.oc.core")
    except ImportError as error:
        raise InputError(f"this needs the package fairchem-data-oc ({error}): run {EXTRA}") from error
    finally:
        for name in added:
            del sys.modules[name]


@contextmanager
def numpy_seed(*seed: int) -> Iterator[None]:
    """Seed numpy's global generator inside the context, and give it its state back afterwards.

    `fairchem-data-oc` draws from it.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
