"""From scores to the atoms (or edges) that a block computes.

- `topk`: a budget; the level is the fraction to skip, per structure. Not extensive: what happens elsewhere in
  the structure moves the cut.
- `threshold`: the level is a score; atoms above it are computed. With intensive scores a far, non-interacting
  fragment or a supercell changes nothing.
- `smooth`: the same with gates smoothstep((score - level) / width) in place of a cut: features, energies and
  forces stay continuously differentiable.

Scores within a relative tolerance of 1e-4 are one group and are never cut apart: symmetry-equivalent atoms
stay together.
"""

from numbers import Real

from torch import Tensor

from equiformer2.errors import InputError
from equiformer2.pruning.routing.batch_geometry import group_means, group_places, tie_groups
from equiformer2.values import shown

MODES = ("topk", "threshold", "smooth")


def smoothstep(x: Tensor) -> Tensor:
    """0 below 0, 1 above 1, 3x² - 2x³ between: once continuously differentiable, with compact support."""
    x = x.clamp(0.0, 1.0)
    return x * x * (3 - 2 * x)


def check_mode(mode: str, width: float) -> None:
    """Raise `InputError` for an unknown mode or a width that is not positive."""
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
    """Mask (bool `[N]`) or, in smooth mode, gates `[N]`.

    Args:
        scores: `[N]`, higher is more important.
        structure, natoms: `[N]` structure of each atom and `[B]` atoms per structure. (For edges: the same
            of edges.)
        mode, level, width: see the module.
        previous: bool `[N]`, what was computed before; these get the bonus `hysteresis` on their scores.
    """
    if mode == "smooth":
        return smoothstep((scores - level) / width)
    if previous is not None:
        scores = scores + hysteresis * previous
    scores = scores.detach()
    groups = tie_groups(scores, structure)
    if mode == "threshold":
        return group_means(scores, groups) > level
    return _top(groups, structure, natoms, level)


def _top(groups: Tensor, structure: Tensor, natoms: Tensor, skipped: float) -> Tensor:
    """Whole groups from the top; a group is in if its middle is within the budget.

    The rule counts in fractions of the structure, so a supercell keeps the same atoms.
    """
    of, start, size = group_places(groups, structure, natoms)
    middle = (start + 0.5 * size) / natoms[of]
    return (middle <= 1 - skipped + 1e-9)[groups]
