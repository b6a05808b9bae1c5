"""OC20 data: readers, writers, preprocessing, targets, sampling and the Lightning data module.

The package holds no model code and does not import `equiformer2`; the two share the plain data object that
docs/architecture.md describes. Names are imported on first use, so that a script which only needs
`DataError` does not pay for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from datasets_oc20.errors import DataError

if TYPE_CHECKING:
    from datasets_oc20.datamodule import OC20DataModule
    from datasets_oc20.own_data.opening import open_dataset
    from datasets_oc20.own_data.writing import write_lmdb
    from datasets_oc20.reader import OC20Lmdb
    from datasets_oc20.writer import LmdbWriter

__all__ = ["DataError", "LmdbWriter", "OC20DataModule", "OC20Lmdb", "open_dataset", "write_lmdb"]

_HOMES = {
    "LmdbWriter": "writer",
    "OC20DataModule": "datamodule",
    "OC20Lmdb": "reader",
    "open_dataset": "own_data.opening",
    "write_lmdb": "own_data.writing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
