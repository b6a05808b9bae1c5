"""The rate at which this machine multiplies matrices of given shapes."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.numerics import now, precision


def measure_rate(
    shapes: list[tuple[int, int, int]], precision_name: str, device: str, repeats: int
) -> dict[str, Any]:
    """Floating-point operations per second over all products `[m, k] @ [k, n]`, and of the fastest one.

    Each product counts 2 m k n operations; its time is the median after one warm-up, by the faster of the
    libraries at hand (cuBLAS; on a CPU the BLAS of torch.mm, or oneDNN).
    """
    dtype = torch.bfloat16 if precision_name == "bf16" else torch.float32
    total_flops = total_seconds = best = 0.0
    with torch.no_grad(), precision("float32" if precision_name == "bf16" else precision_name, device):
        for m, k, n in shapes:
            left = torch.randn(m, k, device=device, dtype=dtype)
            # As a linear layer stores it.
            weight = torch.randn(n, k, device=device, dtype=dtype)
            seconds = min(
                _median_seconds(multiply, left, weight, device, repeats)
                for multiply in _libraries(device, dtype)
            )
            flops = 2.0 * m * k * n
            total_flops += flops
            total_seconds += seconds
            best = max(best, flops / seconds)
    return {"rate": total_flops / total_seconds, "best": best, "shapes": [list(shape) for shape in shapes]}


def _libraries(device: str, dtype: torch.dtype) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Ways to compute `left @ weight^T`."""
    found: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.nn.functional.linear]
    onednn = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
    # On CPUs without AVX-512 oneDNN refuses bfloat16.
    refused = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device == "cpu" and onednn is not None and torch.backends.mkldnn.is_available() and not refused:
        found.append(lambda left, weight: onednn(left, weight, None, "none", [], ""))
    return found


def _median_seconds(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    left: torch.Tensor,
    weight: torch.Tensor,
    device: str,
    repeats: int,
) -> float:
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        multiply(left, weight)
        times.append(now(device) - start)
    return statistics.median(times[1:])
