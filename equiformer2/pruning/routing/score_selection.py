"""Selection of the atoms (or edges) that a block computes, by their scores.

- `topk`: a budget; the level is the fraction to skip, per structure. Not extensive: a change elsewhere in the
  structure moves the cut.
- `threshold`: the level is a score; atoms above it are computed. With intensive scores a far, non-interacting
  fragment or a supercell changes nothing.
- `smooth`: gates smoothstep((score - level) / width) in place of a cut: features, energies and forces stay
  continuously differentiable.

Scores within a relative tolerance of 1e-4 are one group and are never cut apart: symmetry-equivalent atoms
stay together.
"""

from numbers import Real

import torch
from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.values import shown

MODES = ("topk", "threshold", "smooth")


def smoothstep(x: Tensor) -> Tensor:
    """Return 0 below 0, 1 above 1, 3x² - 2x³ between: C1, with compact support."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3 - 2 * x)


def check_mode(mode: str, width: float) -> None:
    """Check the mode of a selection and the width of its gates.

    Args:
        mode: `topk`, `threshold` or `smooth`.
        width: width of the gates of `smooth`, in units of the score.

    Raises:
        InputError: an unknown mode, or a width that is not positive.
    """
    if mode not in MODES:
        raise InputError(f"the mode {shown(mode)} is not known: use one of {', '.join(MODES)}")
    if not isinstance(width, Real) or isinstance(width, bool) or not 0 < width < float("inf"):
        raise InputError(f"the width of the gates is {shown(width)}: give a positive number")


def select(
    scores: Tensor,
    structure: Tensor,
    natoms: Tensor,
    mode: str,
    level: float,
    width: float,
    previous: Tensor | None = None,
    hysteresis: float = 0.0,
) -> Tensor:
    """Select atoms by their scores, or edges by theirs.

    With `topk`, whole groups of equal scores are in from the top as long as their middle is within the
    budget. The rule counts in fractions of the structure, so a supercell keeps the same atoms.

    Args:
        scores: `[N]`, higher is more important.
        structure: `[N]` index of each atom's (edge's) structure.
        natoms: `[B]` number of atoms (edges) per structure.
        mode: `topk`, `threshold` or `smooth`, see the module.
        level: fraction to skip (`topk`) or score to pass.
        width: width of the gates of `smooth`, in units of the score.
        previous: bool `[N]`, atoms that were computed before; None for none.
        hysteresis: bonus of those on their scores.

    Returns:
        Mask (bool `[N]`) or, in smooth mode, gates `[N]`.
    """
    if mode == "smooth":
        return smoothstep((scores - level) / width)
    if previous is not None:
        scores = scores + hysteresis * previous
    scores = scores.detach()
    groups = tie_groups(scores, structure)
    if mode == "threshold":
        # The mean of a group for all of its atoms, so that ties are equal to the last bit.
        size = torch.bincount(groups)
        sums = scores.new_zeros(len(size)).index_add(0, groups, scores)
        return (sums / size)[groups] > level
    structure_of, start, size = group_places(groups, structure, natoms)
    middle = (start + 0.5 * size) / natoms[structure_of]
    return (middle <= 1 - level + 1e-9)[groups]


def tie_groups(scores: Tensor, structure: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Number the groups of atoms with equal scores, by structure and, within, from the highest score down.

    Args:
        scores: `[N]`.
        structure: `[N]` index of each atom's structure.
        tolerance: relative difference up to which neighbouring scores share a group.

    Returns:
        `[N]` number of each atom's group.
    """
    if not len(scores):
        return structure.new_zeros(0)
    scores = scores.detach()
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(structure[order], stable=True)]
    sorted_scores, structures = scores[order], structure[order]
    gap = sorted_scores[:-1] - sorted_scores[1:]
    size = torch.maximum(sorted_scores[:-1].abs(), sorted_scores[1:].abs())
    new = (gap > tolerance * size + 1e-9) | (structures[1:] != structures[:-1])
    numbers = torch.cat((new.new_zeros(1, dtype=torch.long), new.long().cumsum(0)))
    groups = torch.empty_like(numbers)
    groups[order] = numbers[: len(order)]
    return groups


def group_places(groups: Tensor, structure: Tensor, natoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Locate groups of equal scores in the ranking of their structure.

    Args:
        groups: `[N]` of `tie_groups`.
        structure: `[N]` index of each atom's structure.
        natoms: `[B]` number of atoms per structure.

    Returns:
        Per group: index of its structure, number of that structure's atoms before it, its number of atoms.
    """
    size = torch.bincount(groups)
    structure_of = torch.zeros_like(size).index_copy(0, groups, structure)
    ends = size.cumsum(0)
    start = ends - size - (natoms.cumsum(0) - natoms)[structure_of]
    return structure_of, start, size
