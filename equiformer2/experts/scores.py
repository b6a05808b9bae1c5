"""Scores of the experts of a mixture for one task, and the bound of what dropping some of them changes.

A weight is W_s = sum over e of c_se W_e, with coefficients c of system s that sum to 1. Scores:

    tcess       mean over the task's systems of c_se where e is among the k largest of s (PreMoe, 2505.17639)
    frequency   share of the systems in which e is among the k largest
    reap        mean, over the systems in which e is among the k largest, of the norm of what e adds to the
                outputs of the layers (REAP, 2510.13999: gate times norm of the expert's output)
    random      random numbers

Without the dropped experts the coefficients of the kept ones are divided by their sum S. What is left is W',
so that W = S W' + sum over dropped of c_e W_e, and as the dropped coefficients sum to 1 - S,

    W - W' = sum over dropped of c_e (W_e - W')

whose norm is at most the sum of the norms of its terms. With |W_e - W'| <= |W_e| + sum over kept of
(c_e / S) |W_e| this is never more than the bound from norms of experts alone,

    sum over dropped of c_e |W_e| + (1/S - 1) sum over kept of c_e |W_e|

and it is far less where experts lie around a common weight. Inner products of the experts are all that it
takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from equiformer2.errors import InputError

Method = Literal["tcess", "frequency", "reap", "random"]
METHODS: tuple[str, ...] = get_args(Method)
_UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one operation in float32, in which merged weights are computed."""


def in_top(coefficients: Tensor, top: int) -> Tensor:
    """Mark the `top` largest coefficients of every system; all of those that equal the last one.

    Args:
        coefficients: `[systems, K]`.
        top: k; K and above mark everything.

    Returns:
        `[systems, K]` bool.

    Raises:
        InputError: k is below 1.
    """
    if top < 1:
        raise InputError(f"the number of leading experts per system is {top}: give at least 1")
    last = coefficients.topk(min(top, coefficients.shape[1]), dim=1).values[:, -1:]
    return coefficients >= last


def tcess(coefficients: Tensor, top: int) -> Tensor:
    """Compute the task-conditioned expert selection scores.

    Args:
        coefficients: `[systems, K]` of the task's systems.
        top: k.

    Returns:
        `[K]` float64; their sum is at most 1.
    """
    wide = coefficients.double()
    return torch.where(in_top(wide, top), wide, 0.0).mean(0)


def usage_frequency(coefficients: Tensor, top: int) -> Tensor:
    """Compute the share of systems, `[K]` float64, in which each expert is among the `top` largest."""
    return in_top(coefficients, top).double().mean(0)


def reap(outputs: Tensor, coefficients: Tensor, top: int) -> Tensor:
    """Compute REAP's scores; zero for an expert that is never among the `top` largest.

    Args:
        outputs: `[systems, K]` norms of what every expert, times its coefficient, adds to the outputs.
        coefficients: `[systems, K]`.
        top: k.

    Returns:
        `[K]` float64.
    """
    active = in_top(coefficients, top).double()
    return (outputs.double() * active).sum(0) / active.sum(0).clamp(min=1)


def random_scores(count: int, seed: int) -> Tensor:
    """Draw a score `[count]` for every expert."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number_kept(keep: float, count: int) -> int:
    """Number of experts that a share keeps, rounded; halves upwards.

    Args:
        keep: share.
        count: number of experts.

    Raises:
        InputError: the share keeps none or all of them.
    """
    if not math.isfinite(keep) or keep <= 0 or keep > 1:
        raise InputError(f"the share of experts to keep is {keep:g}: give a number above 0 and below 1")
    number = math.floor(keep * count + 0.5)
    if number < 1:
        raise InputError(f"{keep:g} of {count} experts keeps none: give at least {1 / count:.3g}")
    if number >= count:
        most = (count - 1) / count
        advice = f"give at most {most:.3g}" if count > 1 else "there is nothing to remove"
        raise InputError(f"{keep:g} of {count} experts keeps all of them: {advice}")
    return number


def highest(scores: Tensor, number: int, coefficients: Tensor) -> tuple[int, ...]:
    """Choose the experts with the highest scores.

    Experts that are never among the leading ones have equal scores, zero. Of equal ones those with the
    largest mean coefficient are chosen, and then the first.

    Args:
        scores: `[K]`.
        number: of experts to keep.
        coefficients: `[systems, K]`.

    Returns:
        Their indices, ascending.

    Raises:
        InputError: a score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise InputError("the scores of the experts are not finite: check the weights of the network")
    order = torch.argsort(coefficients.double().mean(0), descending=True, stable=True)
    order = order[torch.argsort(scores[order], descending=True, stable=True)]
    return tuple(sorted(order[:number].tolist()))


def renormalized(coefficients: Tensor, kept: Sequence[int]) -> Tensor:
    """Divide the coefficients of the kept experts by their sum.

    Args:
        coefficients: `[systems, K]`.
        kept: indices of M experts.

    Returns:
        `[systems, M]`; equal ones for a system whose kept experts all have a coefficient of zero.
    """
    # In float64 the sum of the smallest numbers of float32 is a number to divide by, too.
    chosen = coefficients[:, list(kept)].double()
    total = chosen.sum(1, keepdim=True)
    shares = torch.where(total > 0, chosen / total.clamp(min=torch.finfo(chosen.dtype).tiny), 1 / len(kept))
    return shares.to(coefficients.dtype)


def expert_products(stacks: Mapping[str, Tensor]) -> Tensor:
    """Compute the inner products of the experts of every weight, whose diagonals are squared norms.

    Args:
        stacks: weight's name -> `[K, …]`.

    Returns:
        `[weights, K, K]` float64, in the order of `stacks`.
    """
    wide = (stack.detach().double().cpu().flatten(1) for stack in stacks.values())
    return torch.stack([experts @ experts.T for experts in wide])


def _without(coefficients: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Coefficients `[systems, K]` float64 with all experts, and with the kept ones alone."""
    before = coefficients.double().cpu()
    after = torch.zeros_like(before)
    after[:, list(kept)] = renormalized(before, kept)
    return before, after


def change_bound(coefficients: Tensor, products: Tensor, kept: Sequence[int]) -> Tensor:
    """Bound the change of every weight when all experts but the kept ones are dropped.

    The change is that of weights merged in float32, so their rounding is in the bound.

    Args:
        coefficients: `[systems, K]`.
        products: `[weights, K, K]` of `expert_products`.
        kept: indices of the experts that stay.

    Returns:
        `[systems, weights]` float64: upper bounds of the Frobenius norm of W - W'.
    """
    before, after = _without(coefficients, kept)
    squares = products.diagonal(dim1=1, dim2=2)
    crossed = torch.einsum("wek,sk->swe", products, after)  # <W_e, W'>
    own = (crossed * after[:, None]).sum(2, keepdim=True)
    distances = (squares - 2 * crossed + own).clamp(min=0).sqrt()
    dropped = before.clone()
    dropped[:, list(kept)] = 0.0
    missing = (before.sum(1, keepdim=True) - 1).abs()
    rounding = 2 * before.shape[1] * _UNIT_ROUNDOFF + missing
    return (distances @ dropped[:, :, None])[..., 0] + rounding * ((before + after) @ squares.sqrt().T)


def weight_change(coefficients: Tensor, products: Tensor, kept: Sequence[int]) -> Tensor:
    """Compute the change of every weight when all experts but the kept ones are dropped.

    Args:
        coefficients: `[systems, K]`.
        products: `[weights, K, K]` of `expert_products`.
        kept: indices of the experts that stay.

    Returns:
        `[systems, weights]` float64: Frobenius norms of W - W'.
    """
    before, after = _without(coefficients, kept)
    return merged_norms(before - after, products)


def merged_norms(coefficients: Tensor, products: Tensor) -> Tensor:
    """Compute the Frobenius norms `[systems, weights]` of merged weights; arguments as `weight_change`."""
    wide = coefficients.double().cpu()
    return torch.einsum("sk,wkl,sl->sw", wide, products, wide).clamp(min=0).sqrt()
