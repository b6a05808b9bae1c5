"""EquiformerV2 (Liao et al., ICLR 2024, arXiv 2306.12059): train, fine-tune, prune and run.

Names are imported on first use, so that `import equiformer2` costs milliseconds. Modules of the package
import from the submodules, never from here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from equiformer2.version import __version__

if TYPE_CHECKING:
    from equiformer2.checkpoint import load_checkpoint
    from equiformer2.inference import EquiformerV2Calculator, Predictor, predict, relax, relax_many
    from equiformer2.model import EquiformerV2, ModelConfig

__all__ = [
    "EquiformerV2",
    "EquiformerV2Calculator",
    "ModelConfig",
    "Predictor",
    "__version__",
    "load_checkpoint",
    "predict",
    "relax",
    "relax_many",
]

_HOMES = {
    "EquiformerV2": "model",
    "EquiformerV2Calculator": "inference",
    "ModelConfig": "model",
    "Predictor": "inference",
    "load_checkpoint": "checkpoint",
    "predict": "inference",
    "relax": "inference",
    "relax_many": "inference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
