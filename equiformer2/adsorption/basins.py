"""Minima that relaxations ended in, which of them are the same, and how likely a lower one was missed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from equiformer2.adsorption.symmetry import SurfaceSymmetry, complete_linkage
from equiformer2.inference.atoms import ADSORBATE

#: eV and Å; relaxations whose results differ by less have found the same minimum. Two relaxations of one
#: minimum differ by what their last forces leave open.
SAME_ENERGY, SAME_POSITIONS = 0.02, 0.3
#: eV; a minimum that is lower by this would change the answer (AdsorbML's threshold of success).
LOWER = 0.1
#: Probability of such a minimum below which a search may stop.
ENOUGH = 0.05
#: Draws that are needed before anything is concluded.
_FEWEST_DRAWS = 8
#: Sightings of unseen basins that are assumed beside those that were made, so that a few draws into the same
#: basin do not mean that there is no other.
_PRIOR = 0.5
#: eV; one difference between minima that is assumed beside those that were seen, so that two that happen to
#: be nearly equal, as in both hollows of a (111) surface, do not mean that all are.
_USUAL_SPREAD = 0.3


def find_basins(relaxed: Sequence[Atoms], energies: Sequence[float], symmetry: SurfaceSymmetry) -> list[int]:
    """Group relaxed structures that are in the same minimum, up to symmetry of the slab.

    All members of a group are alike (complete linkage), so that groups do not depend on the order and do not
    chain: their energies differ by at most `SAME_ENERGY`, and their adsorbate atoms by `SAME_POSITIONS`.

    Args:
        relaxed: slab and adsorbate (tag 2), relaxed.
        energies: eV.
        symmetry: of the slab.

    Returns:
        For each structure the number of the first one of its group.
    """
    adsorbates = [atoms[atoms.get_tags() == ADSORBATE] for atoms in relaxed]
    count = len(adsorbates)
    near = np.full((count, count), np.inf)
    for i in range(count):
        for j in range(i):
            if abs(energies[i] - energies[j]) <= SAME_ENERGY:
                near[i, j] = symmetry.distance(adsorbates[i], adsorbates[j], SAME_POSITIONS)
                near[j, i] = near[i, j]
    return complete_linkage(near, SAME_POSITIONS)


@dataclass(frozen=True)
class Coverage:
    """Estimate of what a search has not seen.

    Attributes:
        draws: placements that ended in a basin, copies by symmetry included.
        basins: different ones among them.
        unseen_probability: that the next placement ends in a basin that none has been in.
        unseen_basins: number of basins that further placements would add.
        p_lower: probability that one of them is lower than the lowest one seen by more than `LOWER`.
        further: number of further placements that the two above are about.
    """

    draws: int
    basins: int
    unseen_probability: float
    unseen_basins: float
    p_lower: float
    further: int

    @property
    def enough(self) -> bool:
        """True if so little is expected of further placements that the search may stop."""
        return self.draws >= _FEWEST_DRAWS and self.p_lower < ENOUGH


def estimate_coverage(basins: Sequence[int], energies: Sequence[float], remaining: int) -> Coverage:
    """Estimate from the basins of the placements so far what further ones would bring.

    A basin that was seen once tells of others that were not: their share of the draws is that of the unseen
    (I. J. Good, Biometrika 1953, 40, 237), and their number follows from those seen once and twice (A. Chao,
    Scand. J. Stat. 1984, 11, 265; extrapolated to more draws as in Chao et al., Ecology 2009, 90, 1125). New
    basins are as likely as known ones to be the lowest, and the distance to the lowest one is taken to be
    exponential with the mean distance of the known ones and a usual one.

    Args:
        basins: basin of every draw.
        energies: eV, of every draw.
        remaining: number of placements that could still be drawn.
    """
    draws = len(basins)
    if not draws:
        return Coverage(0, 0, 1.0, float(remaining), 1.0 if remaining else 0.0, remaining)
    sightings = Counter(Counter(basins).values())
    once, twice, known = sightings[1], sightings[2], len(set(basins))
    unseen = min(1.0, (once + _PRIOR) / (draws + _PRIOR))
    total = once * (once - 1) / (2 * (twice + 1)) + once * _PRIOR + _PRIOR
    found = total * -math.expm1(remaining * math.log1p(-min(unseen / total, 1.0 - 1e-12)))
    lowest: dict[int, float] = {}
    for basin, energy in zip(basins, energies, strict=True):
        lowest[basin] = min(energy, lowest.get(basin, math.inf))
    levels = sorted(lowest.values())
    spread = float(np.mean([_USUAL_SPREAD, *(level - levels[0] for level in levels[1:])]))
    p_lower = found / (known + found) * math.exp(-LOWER / spread)
    return Coverage(draws, known, unseen, found, p_lower, remaining)
