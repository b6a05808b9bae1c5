"""Importance of atoms from attention weights.

The attention graph has an edge j -> i for every edge of the network, with the weight α of head h; the weights
that enter one atom sum to one. Edges to several images of an atom add up.
"""

import torch
from torch import Tensor

DAMPING = 0.85
ITERATIONS = 5


def received_attention(attention: Tensor, source: Tensor, num_atoms: int) -> Tensor:
    """`[N]` a_j = mean over heads of the sum over i of α_{j->i}; 1 on average.

    Args:
        attention: `[E, H]`.
        source: `[E]` atom j.
        num_atoms: N.
    """
    mean = attention.mean(dim=1)
    return mean.new_zeros(num_atoms).index_add(0, source, mean)


def weighted_pagerank(
    attention: Tensor,
    source: Tensor,
    target: Tensor,
    num_atoms: int,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
) -> Tensor:
    """`[N, H]` PageRank on the attention graph times the number of atoms (Zero-TPrune's WPR).

        n s_j <- (1 - d) + d * sum over i of α_{j->i} n s_i

    from n s = 1. The number of iterations is fixed, so that a score depends on that many shells of
    neighbours and on nothing farther. An atom without incoming edges keeps what it has.

    Args:
        attention: `[E, H]`; rescaled to sum to 1 per atom and head: weights of several blocks may be mixed.
        source, target: `[E]`.
        num_atoms: N.
        damping: d; below 1, because the graph lacks self-loops and may fall apart.
        iterations: T.
    """
    heads = attention.shape[1]
    total = attention.new_zeros(num_atoms, heads).index_add(0, target, attention)
    alone = (total <= 0).to(attention.dtype)
    alpha = attention / (total + alone)[target]
    scores = attention.new_ones(num_atoms, heads)
    for _ in range(iterations):
        passed = (alone * scores).index_add(0, source, alpha * scores[target])
        scores = (1 - damping) + damping * passed
    return scores


def combine_heads(scores: Tensor, kept: Tensor | None = None) -> Tensor:
    """`[N]` root mean square over heads (Zero-TPrune's EIR).

    Args:
        scores: `[N, H]`.
        kept: bool `[H]`, heads to use; None for all.
    """
    if kept is not None and len(kept) == scores.shape[1]:
        scores = scores[:, kept]
    return scores.square().mean(dim=1).clamp(min=1e-12).sqrt()


def heads_between_quantiles(variances: Tensor, low: float, high: float) -> Tensor:
    """Bool `[L, H]`: heads whose variance is within quantiles of all of them (Zero-TPrune's VHF).

    Heads with little variance tell no atoms apart, those with much look at few atoms only. The bounds
    of the original (0.01 and 0.7) belong to the scores of images, so they are quantiles here. A block always
    keeps at least one head, the one nearest to the median.

    Args:
        variances: `[L, H]` of the scores, averaged over calibration structures.
        low, high: quantiles from 0 to 1.
    """
    bounds = torch.quantile(variances.flatten(), torch.tensor([low, high]).to(variances))
    kept = (variances >= bounds[0]) & (variances <= bounds[1])
    nearest = (variances - variances.median()).abs().argmin(dim=1, keepdim=True)
    empty = ~kept.any(dim=1, keepdim=True)
    return kept | torch.zeros_like(kept).scatter(1, nearest, empty)
