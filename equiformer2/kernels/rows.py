"""Gather rows and sum them, each the other's derivative, with one order of additions; softmax over rows.

`torch.compile` turns the derivative of a gather, and a sum over edges, into atomic additions, whose order
changes from run to run, and on a GPU torch's own operators add so. Both therefore take the operators below,
which a compiler does not look into.
"""

import math

import torch
from torch import Tensor

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import Neighbors


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather `x[index]`.

    Args:
        x: `[N, …]`.
        index: `[E]`, int64.

    Returns:
        `[E, …]`.
    """
    # Not `x[index]`: its derivative adds atomically as soon as several threads share it.
    return _RowOperators.gather(x, index) if _RowOperators.needed(x) else x.index_select(0, index)


def sum_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the rows that have the same index.

    Args:
        rows: `[E, …]`.
        index: `[E]`, int64, in any order.
        size: number of sums, above every index.

    Returns:
        `[size, …]`; zero where no row has the index.
    """
    if _RowOperators.needed(rows):
        return _RowOperators.sum(rows, index, size)
    return rows.new_zeros(size, *rows.shape[1:]).index_add(0, index, rows)


def segment_softmax(
    logits: Tensor, target: Tensor, num_targets: int, neighbors: Neighbors | None = None
) -> Tensor:
    """Softmax of attention logits over the incoming edges of each target atom.

    Args:
        logits: `[E, H]`.
        target: `[E]` target atom of each edge.
        num_targets: N.
        neighbors: of the edges, for the Triton kernel, which runs where they are given.

    Returns:
        `[E, H]` weights; those of one target and head sum to one. Computed in at least float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if neighbors is not None:
        return gpu.segment_softmax(logits, neighbors.target_starts)
    index = target.unsqueeze(1).expand_as(logits)
    # The shift cancels in the quotient, so it needs no gradient.
    shift = logits.new_full((num_targets, logits.shape[1]), float("-inf"))
    shift = shift.scatter_reduce(0, index, logits.detach(), "amax", include_self=True)
    weights = torch.exp(logits - shift[target])
    total = sum_rows(weights, target, num_targets)
    # 1e-16 as in torch_geometric.utils.softmax, which the reference uses.
    return weights / (gather_rows(total, target) + 1e-16)


def add_rows_(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add the `rows [E, …]` with the same `index [E]` to `out [size, …]`, in place; without derivatives."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:
        out.add_(sum_sorted_rows(rows, index, out.shape[0]))


def sum_sorted_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Compute `sum_rows` by sorting, without the atomic additions that `index_add` takes on a GPU."""
    index, order = torch.sort(index, stable=True)
    starts = torch.searchsorted(index, torch.arange(size + 1, device=index.device))
    flat = rows.index_select(0, order).view(len(rows), math.prod(rows.shape[1:]))
    # `unsafe`: the check that the segments cover all rows would wait for the device.
    sums = torch.segment_reduce(flat, "sum", offsets=starts, axis=0, unsafe=True, initial=0)
    return sums.view(size, *rows.shape[1:])


class _RowOperators:
    """Both operators, each the other's derivative."""

    @staticmethod
    def needed(x: Tensor) -> bool:
        """Say whether torch's own operators would add in a sequence that changes from run to run."""
        return torch.compiler.is_compiling() or x.device.type != "cpu"

    @staticmethod
    @torch.library.custom_op("equiformer2::gather_rows", mutates_args=())
    def gather(x: Tensor, index: Tensor) -> Tensor:
        """Compute `gather_rows`."""
        return x.index_select(0, index)

    @staticmethod
    @torch.library.custom_op("equiformer2::sum_rows", mutates_args=())
    def sum(rows: Tensor, index: Tensor, size: int) -> Tensor:
        """Compute `sum_rows`, on a CPU row after row."""
        if rows.device.type == "cpu":
            return rows.new_zeros(size, *rows.shape[1:]).index_add_(0, index, rows)
        return sum_sorted_rows(rows, index, size)

    @classmethod
    def register(cls) -> None:
        """Tell compilers the shapes of the outputs, and autograd the derivatives."""
        cls.gather.register_fake(lambda x, index: x.new_empty(index.shape[0], *x.shape[1:]))
        cls.sum.register_fake(lambda rows, index, size: rows.new_empty(size, *rows.shape[1:]))

        def setup_gather(ctx, inputs, output):  # type: ignore[no-untyped-def]
            x, index = inputs
            ctx.save_for_backward(index)
            ctx.size = x.shape[0]

        def gather_backward(ctx, grad):  # type: ignore[no-untyped-def]
            return cls.sum(grad, ctx.saved_tensors[0], ctx.size), None

        def setup_sum(ctx, inputs, output):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(inputs[1])

        def sum_backward(ctx, grad):  # type: ignore[no-untyped-def]
            return cls.gather(grad, ctx.saved_tensors[0]), None, None

        cls.gather.register_autograd(gather_backward, setup_context=setup_gather)
        cls.sum.register_autograd(sum_backward, setup_context=setup_sum)


_RowOperators.register()
