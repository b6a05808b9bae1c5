"""The hot operations as Triton kernels for NVIDIA GPUs, registered with `torch.library`.

`torch.compile` sees every operation as one node with known output shapes and gradients. All are generic in
degrees, orders, channels and heads, sum in float32 (float64 for float64 inputs) and are deterministic: no
floating-point atomics. GEMMs stay with cuBLAS. Backward passes evaluate large intermediates again.

Triton is an optional package: it is imported when the first operation is asked for, which raises
`InputError` where it is missing. `supports` says beforehand whether the kernels can do what is wanted. Where
TRITON_INTERPRET=1 is set before that import, the kernels run on CPU tensors in Triton's interpreter.
"""

import importlib
from typing import TYPE_CHECKING, Any

from equiformer2.kernels.gpu.support import csr, segment_starts, supports

if TYPE_CHECKING:
    from equiformer2.kernels.gpu.aggregate import rotate_aggregate
    from equiformer2.kernels.gpu.rotate import gather_rotate
    from equiformer2.kernels.gpu.s2_activation import separable_s2_activation
    from equiformer2.kernels.gpu.softmax import segment_softmax
    from equiformer2.kernels.gpu.sphere_mlp import grid_mlp

__all__ = [
    "csr",
    "gather_rotate",
    "grid_mlp",
    "rotate_aggregate",
    "segment_softmax",
    "segment_starts",
    "separable_s2_activation",
    "supports",
]

_MODULES = {
    "gather_rotate": "rotate",
    "grid_mlp": "sphere_mlp",
    "rotate_aggregate": "aggregate",
    "segment_softmax": "softmax",
    "separable_s2_activation": "s2_activation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
