"""Train networks with Lightning, and evaluate them on OC20's metrics.

Names are imported on first use, so that modules which need no Lightning do not pay for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equiformer2.training.task import S2EFTask

__all__ = ["S2EFTask"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.task"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
