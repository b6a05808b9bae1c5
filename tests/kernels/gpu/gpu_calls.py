"""One call of every operation, forward and backward."""

from collections.abc import Callable

import torch
from gpu_twins import Random
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from equiformer2.kernels.gpu.aggregate import rotate_aggregate
from equiformer2.kernels.gpu.rotate import gather_rotate
from equiformer2.kernels.gpu.s2_activation import separable_s2_activation
from equiformer2.kernels.gpu.softmax import segment_softmax
from equiformer2.kernels.gpu.sphere_mlp import grid_mlp
from equiformer2.kernels.layout import OrderLayout

Call = tuple[Callable[..., Tensor], tuple[object, ...]]


def calls(
    device: torch.device,
    dtype: torch.dtype,
    lmax: int,
    mmax: int,
    channels: int,
    heads: int = 2,
    edges: int = 5,
    atoms: int = 4,
) -> dict[str, Call]:
    """Functions and arguments by name; tensors that can have a gradient ask for one."""
    random = Random(device, dtype)
    graph = random.graph(atoms, edges)
    csr = graph["source_order"], graph["source_ptr"], graph["target_ptr"]
    packed = random.packed(edges, lmax, mmax)
    x = random(atoms, (lmax + 1) ** 2, channels).requires_grad_()
    found: dict[str, Call] = {}
    for shared in (False, True):
        radial = random.radial(edges, lmax, mmax, channels, shared).requires_grad_()
        found[f"gather_rotate shared={shared}"] = (
            gather_rotate,
            (x, packed, graph["source"], graph["target"], radial, lmax, mmax, shared, *csr),
        )
    target = graph["target"], graph["target_ptr"]
    alpha = random(edges, heads, dtype=torch.float32).requires_grad_()
    for name, degrees, orders, weights in (
        ("", lmax, mmax, alpha),
        (" of the force head", 1, mmax, alpha),
        (" of the edge degree embedding", lmax, 0, None),
    ):
        values = random(edges, OrderLayout(degrees, orders).num_rows, channels).requires_grad_()
        scale = [1.0 / (l + 1) for l in range(degrees + 1)]
        found["rotate_aggregate" + name] = (
            rotate_aggregate,
            (values, weights, packed, *target, degrees, mmax, orders, scale),
        )
    found["segment_softmax"] = (segment_softmax, (alpha, target[1]))
    rows, points = OrderLayout(lmax, mmax).num_rows, 2 * (lmax + 1) * (2 * mmax + 1)
    hidden, gates = (random(edges, *shape, channels).requires_grad_() for shape in ((rows,), ()))
    to_grid, from_grid = random(points, rows) / rows, random(rows, points) / points
    found["separable_s2_activation"] = (separable_s2_activation, (hidden, gates, to_grid, from_grid))
    found["s2_activation"] = (separable_s2_activation, (hidden, None, to_grid, from_grid[:4]))
    size, points = (lmax + 1) ** 2, 2 * (lmax + 1) * (2 * lmax + 3)
    to_grid, from_grid = random(points, size) / size, random(size, points) / points
    weight = (random(channels, channels) / channels).requires_grad_()
    found["grid_mlp"] = (grid_mlp, (x, to_grid, from_grid, weight))
    return found


def gradients_of(call: Call) -> list[Tensor]:
    """The output and the gradients of its sum of squares."""
    function, arguments = call
    out = function(*arguments)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [out.detach(), *torch.autograd.grad((out.float() ** 2).sum(), leaves)]


def operator(
    function: Callable[..., Tensor], arguments: tuple[object, ...]
) -> tuple[OpOverload, tuple[object, ...]]:
    """The registered operator behind a public function, and what it is given."""
    seen: list[tuple[OpOverload, tuple[object, ...]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "equiformer2":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        function(*arguments)
    return seen[0]
