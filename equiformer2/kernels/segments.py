"""Sums and softmax over the incoming edges of each atom."""

import torch
from torch import Tensor

from equiformer2.kernels import gpu
from equiformer2.kernels.backend import triton_neighbors
from equiformer2.kernels.rows import gather_rows, sum_rows


def segment_softmax(logits: Tensor, target: Tensor, num_targets: int) -> Tensor:
    """Softmax of attention logits over the incoming edges of each target atom.

    Args:
        logits: `[E, H]`.
        target: `[E]` target atom of each edge.
        num_targets: N.

    Returns:
        `[E, H]` weights; those of one target and head sum to one. Computed in at least float32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    neighbors = triton_neighbors()
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
