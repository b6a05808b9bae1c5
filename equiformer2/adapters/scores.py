"""Choose the entries of an adapter that are trained, before any training.

SparseAdapter (He et al., 2210.04284) prunes at initialisation by scores of single entries:

    snip        |w dL/dw|: change of the loss without the entry, to first order (Lee et al. 2019)
    magnitude   |w| over the spread of its factor
    random      random numbers
    grasp       w (H g): change of the squared norm of the gradient with the entry (Wang et al. 2020), whose
                product of Hessian and gradient is taken as a difference of two gradients

An adapter starts with left factors of zero. There the gradient of every right factor is exactly zero, and so
would be all its scores: `snip` would keep left factors alone, whose products with pruned right ones are zero.
So entries are scored at a point where the left factors are small random numbers, at which the scores of both
factors have the same size, and the left factors become zero again afterwards.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from equiformer2.adapters.settings import AdapterSettings
from equiformer2.errors import InputError
from equiformer2.model.parametrizations import LowRank

log = logging.getLogger("equiformer2")

Losses = Sequence[Callable[[], Tensor]]
"""Functions that each compute the loss of some structures, with gradients."""
_SMALL = 0.01
"""Standard deviation of the entries of a left factor where scores are taken."""
_STEP = 1e-2
"""Length of the step along the gradient for `grasp`, relative to that of the entries."""


def prune_adapter(maps: Mapping[str, LowRank], settings: AdapterSettings, losses: Losses, seed: int) -> None:
    """Keep the entries with the highest scores, exactly as many as `keep` asks for.

    Args:
        maps: of one network, as `attach_adapter` makes them; left factors stay zero.
        settings: of the adapter.
        losses: of training structures; `magnitude` and `random` compute none.
        seed: of random numbers.

    Raises:
        InputError: a score is not finite, or all are zero; nothing would be kept.
    """
    if settings.total_keep >= 1:
        return
    factors = [factor for each in maps.values() for factor in (each.left, each.right)]
    generator = torch.Generator().manual_seed(seed)
    if settings.method == "random":
        scores = [torch.rand(factor.shape, generator=generator) for factor in factors]
    else:
        with _small_left_factors(maps, generator), torch.no_grad():
            if settings.method == "magnitude":
                scores = [factor.abs() / factor.square().mean().sqrt() for factor in factors]
            elif settings.method == "snip":
                gradients = _gradients(factors, losses)
                scores = [(w * g).abs() for w, g in zip(factors, gradients, strict=True)]
            else:
                curved = _hessian_times_gradient(factors, losses)
                scores = [w * h for w, h in zip(factors, curved, strict=True)]
    scores = [score.detach().float().cpu() for score in scores]
    if not all(bool(torch.isfinite(score).all()) for score in scores):
        raise InputError(
            f"the scores of the adapter ({settings.method}) are not finite: check the training data, or use "
            "adapter.method: random"
        )
    if not any(bool(score.any()) for score in scores):
        raise InputError(
            f"the scores of the adapter ({settings.method}) are all zero, because the loss of the training "
            "structures depends on none of its weights: choose others with adapter.weights"
        )
    sizes = [[2 * number, 2 * number + 1] for number in range(len(maps))]
    groups = sizes if settings.scope == "layer" else [[place for pair in sizes for place in pair]]
    kept = _highest(scores, groups, settings.total_keep)
    for each, left, right in zip(maps.values(), kept[::2], kept[1::2], strict=True):
        each.prune(left, right)
    log.info(
        f"adapter: {sum(each.kept for each in maps.values()):,} of "
        f"{sum(each.size for each in maps.values()):,} entries kept ({settings.method}, {settings.scope})"
    )


@contextmanager
def _small_left_factors(maps: Mapping[str, LowRank], generator: torch.Generator) -> Iterator[None]:
    """Context in which left factors are small random numbers; afterwards they are what they were."""
    before = [each.left.detach().clone() for each in maps.values()]
    try:
        with torch.no_grad():
            for each in maps.values():
                each.left.copy_(_SMALL * torch.randn(each.left.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for each, left in zip(maps.values(), before, strict=True):
                each.left.copy_(left)


def _gradients(factors: Sequence[nn.Parameter], losses: Losses) -> list[Tensor]:
    """Gradient of the sum of the losses by every factor; zero where no loss depends on it."""
    sums = [torch.zeros_like(factor) for factor in factors]
    with torch.enable_grad():
        for loss in losses:
            value = loss()
            if not value.requires_grad:  # of weights without a map
                continue
            for total, part in zip(sums, torch.autograd.grad(value, factors, allow_unused=True), strict=True):
                if part is not None:
                    total += part
    return sums


def _hessian_times_gradient(factors: Sequence[nn.Parameter], losses: Losses) -> list[Tensor]:
    """H g of the sum of the losses, by central differences of the gradient along itself."""
    gradient = _gradients(factors, losses)
    length = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    size = torch.stack([factor.detach().square().sum() for factor in factors]).sum().sqrt()
    step = float(_STEP * size / length.clamp(min=1e-30))
    sides = []
    for sign in (1, -2):  # forward from the point, then back over it
        for factor, g in zip(factors, gradient, strict=True):
            factor.add_(g, alpha=sign * step)
        sides.append(_gradients(factors, losses))
    for factor, g in zip(factors, gradient, strict=True):
        factor.add_(g, alpha=step)
    return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]


def _highest(scores: Sequence[Tensor], groups: Sequence[Sequence[int]], keep: float) -> list[Tensor]:
    """Mark the highest scores within every group of factors; the numbers of all groups add up exactly.

    Of equal scores the first ones are kept.
    """
    sizes = [sum(scores[place].numel() for place in group) for group in groups]
    if round(keep * sum(sizes)) < 1:
        raise InputError(f"adapter.keep is {keep:g} of {sum(sizes)} entries, which keeps none: give more")
    marks = [torch.zeros(score.numel(), dtype=torch.bool) for score in scores]
    before = done = 0
    for group, size in zip(groups, sizes, strict=True):
        before += size
        count = round(keep * before) - done
        done += count
        joined = torch.cat([scores[place].flatten() for place in group])
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[torch.argsort(joined, descending=True, stable=True)[:count]] = True
        for place, part in zip(group, chosen.split([scores[p].numel() for p in group]), strict=True):
            marks[place] = part
    return [mark.view(score.shape) for mark, score in zip(marks, scores, strict=True)]
