"""Import of `fairchem-data-oc`, the package that made OC20's slabs and placements."""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from equiformer2.errors import InputError

EXTRA = "pip install 'equiformer2[surfaces]'"
"""Command that installs what slabs of any bulk and OC20's own placement need."""


def open_catalyst() -> Any:
    """Import `fairchem.data.oc.core`, with a stand-in for the one module of fairchem-core that it asks for.

    `fairchem.core.scripts.download_large_files` downloads lists of bulks, which nothing here does. Where the
    real package is installed, it is used.

    Raises:
        InputError: `fairchem-data-oc` is not installed.
    """
    try:
        importlib.import_module("fairchem.core.scripts.download_large_files")
    except ImportError:
        module = types.ModuleType("fairchem.core.scripts.download_large_files")
        names = ["fairchem.core", "fairchem.core.scripts", module.__name__]
        for name in names[:2]:
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules[names[2]] = module
        sys.modules[names[1]].download_large_files = module  # type: ignore[attr-defined]
    try:
        return importlib.import_module("fairchem.data.oc.core")
    except ImportError as error:
        raise InputError(f"this needs the package fairchem-data-oc ({error}): run {EXTRA}") from error


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
