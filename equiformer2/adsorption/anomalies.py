"""Detect relaxations that changed the adsorbate, moved it off or into the slab, or changed the surface.

The four rules of OC20's `DetectTrajAnomaly` (fairchem-data-oc 1.0.2, `utils/flag_anomaly.py`), which its
datasets and AdsorbML use: which atoms touch, before and after. An energy of a system with an anomaly is not
the adsorption energy of the intended adsorbate. A verdict hangs on distances, so each comes with its margin.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import get_distances, minkowski_reduce
from ase.neighborlist import neighbor_list

from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, SUBSURFACE

SKIN = 0.6
"""Å added to the sum of two covalent radii: the skin of ASE's neighbour list, 0.3 Å per atom, twice."""

CUSHION = 1.5
"""Factor on the radii where a contact must be gone for good: desorption, and changes of the surface."""

BORDERLINE = 0.1
"""Å; a verdict with a smaller margin could as well have been the other one."""

NAMES = ("dissociated", "desorbed", "intercalated", "surface_changed")

_BEYOND = 1.0
"""Å beyond the widest contact up to which distances between slab atoms are known."""


@dataclass(frozen=True)
class Anomaly:
    """Verdict of one rule.

    Attributes:
        name: one of `NAMES`.
        present: whether the anomaly is there.
        margin: Å by which a distance would have to differ for the opposite verdict; infinite where no
            distance could change it (a slab without held atoms holds nothing to intercalate into).
        sentence: the verdict in words.
    """

    name: str
    present: bool
    margin: float
    sentence: str

    @property
    def borderline(self) -> bool:
        """Tell whether the margin is below `BORDERLINE`."""
        return self.margin < BORDERLINE

    def summary(self) -> dict[str, Any]:
        """Plain values for a JSON record; `margin_A` is None where it is infinite."""
        margin = round(self.margin, 4) if math.isfinite(self.margin) else None
        return {"name": self.name, "margin_A": margin, "borderline": self.borderline}

    def __str__(self) -> str:
        return self.sentence


def find_anomalies(
    initial: Atoms, final: Atoms, tags: np.ndarray, clean_slab: Atoms | None = None
) -> list[Anomaly]:
    """Find the anomalies of a relaxation: none for an intact, bound adsorbate on an unchanged slab.

    Arguments and errors are those of `check_anomalies`.
    """
    return [anomaly for anomaly in check_anomalies(initial, final, tags, clean_slab) if anomaly.present]


def check_anomalies(
    initial: Atoms, final: Atoms, tags: np.ndarray, clean_slab: Atoms | None = None
) -> list[Anomaly]:
    """Apply every rule, in the order of `NAMES`.

    Atoms i and j touch with a factor m where their distance, periodic images included, is below
    m * (r_i + r_j) + `SKIN`, with ASE's covalent radii r.

    * dissociated: which adsorbate atoms touch each other (m = 1) differs between `initial` and `final`;
    * desorbed: no adsorbate atom touches a slab atom in `final` (m = `CUSHION`);
    * intercalated: an adsorbate atom touches an atom of tag 0 in `final` (m = 1);
    * surface_changed: two slab atoms touch (m = 1) in one of `final` and the clean slab, and not even with
      m = `CUSHION` in the other.

    Args:
        initial: slab plus adsorbate before the relaxation.
        final: the same atoms after it.
        tags: `[N]` OC20 tags.
        clean_slab: the relaxed slab without adsorbate, its atoms in the order of `initial`'s; the slab of
            `initial` if None.

    Raises:
        InputError: the structures are not of the same atoms, or no atom or every atom is adsorbate.
    """
    adsorbate, slab = np.flatnonzero(tags == ADSORBATE), np.flatnonzero(tags != ADSORBATE)
    if not len(adsorbate) or not len(slab):
        raise InputError("anomalies need slab and adsorbate atoms: tag the adsorbate's with 2")
    if not np.array_equal(initial.numbers, final.numbers):
        raise InputError("the initial and the final structure are not of the same atoms in the same order")
    reference = initial[slab] if clean_slab is None else clean_slab
    if not np.array_equal(reference.numbers, final.numbers[slab]):
        raise InputError("the clean slab's atoms are not those of the system's slab in the same order")
    rules = _Rules(initial[adsorbate], final[adsorbate], final[slab], reference)
    return [
        rules.dissociated(),
        rules.desorbed(),
        rules.intercalated(final[np.flatnonzero(tags == SUBSURFACE)]),
        rules.surface_changed(),
    ]


class _Rules:
    """The four rules, with what they compare.

    Args:
        before, after: the adsorbate's atoms in the initial and the final structure.
        slab: the slab's atoms in the final structure.
        clean: the clean slab.
    """

    def __init__(self, before: Atoms, after: Atoms, slab: Atoms, clean: Atoms) -> None:
        self.before, self.after, self.slab, self.clean = before, after, slab, clean

    def dissociated(self) -> Anomaly:
        """Compare which adsorbate atoms touch each other before and after."""
        pairs = np.triu_indices(len(self.after))
        first, last = (self._gaps(atoms, atoms, 1.0)[pairs] for atoms in (self.before, self.after))
        changed = (first < 0) != (last < 0)
        nearest = np.minimum(
            np.abs(first), np.abs(last)
        )  # the smaller change that undoes or makes a difference
        margin = float(nearest[changed].max() if changed.any() else nearest.min(initial=math.inf))
        return self._verdict(
            "dissociated",
            bool(changed.any()),
            margin,
            "the adsorbate has dissociated or rearranged: its internal bonds changed",
            "the adsorbate is intact",
        )

    def desorbed(self) -> Anomaly:
        """Look for a contact between adsorbate and slab."""
        gap = float(self._gaps(self.after, self.slab, CUSHION).min())
        return self._verdict(
            "desorbed",
            gap >= 0,
            abs(gap),
            "the adsorbate has desorbed: it touches no slab atom",
            "the adsorbate is bound to the slab",
        )

    def intercalated(self, held: Atoms) -> Anomaly:
        """Look for a contact between the adsorbate and the held subsurface atoms."""
        gap = float(self._gaps(self.after, held, 1.0).min(initial=math.inf))
        return self._verdict(
            "intercalated",
            gap < 0,
            abs(gap),
            "the adsorbate has moved into the slab: it touches held subsurface atoms",
            "the adsorbate is outside the slab",
        )

    def surface_changed(self) -> Anomaly:
        """Compare which slab atoms touch with the clean slab."""
        final = self.slab
        radii = covalent_radii[final.numbers]
        known = 2 * CUSHION * float(radii.max()) + SKIN + _BEYOND
        distances = [self._shortest(atoms, known) for atoms in (final, self.clean)]
        pairs = np.union1d(*(pair for pair, _ in distances))
        bond = radii[pairs // len(radii)] + radii[pairs % len(radii)]
        now, then = np.full(len(pairs), known), np.full(len(pairs), known)
        for values, (pair, distance) in zip((now, then), distances, strict=True):
            values[np.searchsorted(pairs, pair)] = distance
        touches_now, touches_then = now - bond - SKIN, then - bond - SKIN
        parted_now, parted_then = now - CUSHION * bond - SKIN, then - CUSHION * bond - SKIN
        formed, broken = (touches_now < 0) & (parted_then >= 0), (touches_then < 0) & (parted_now >= 0)
        # How far each pair is from having changed, or (negative) within it; both of its conditions must hold.
        short_of = np.minimum(np.maximum(touches_now, -parted_then), np.maximum(touches_then, -parted_now))
        present = bool(formed.any() or broken.any())
        return self._verdict(
            "surface_changed",
            present,
            abs(float(short_of.min(initial=math.inf))),
            "the surface has reconstructed: bonds between slab atoms changed",
            "the slab kept its bonds",
        )

    @staticmethod
    def _verdict(name: str, present: bool, margin: float, yes: str, no: str) -> Anomaly:
        note = f" (borderline, by {margin:.3f} Å)" if margin < BORDERLINE else ""
        return Anomaly(name, present, margin, (yes if present else no) + note)

    @staticmethod
    def _gaps(first: Atoms, second: Atoms, factor: float) -> np.ndarray:
        """Measure how far, `[A, B]` Å, nearest images are from touching; negative where they touch.

        An atom and itself (`first` is `second`) are compared with its nearest periodic image.
        """
        if not len(second):
            return np.empty((len(first), 0))
        _, distance = get_distances(first.positions, second.positions, cell=first.cell, pbc=first.pbc)
        if first is second:
            lattice = math.inf
            if first.pbc.any():
                reduced, _ = minkowski_reduce(first.cell.complete(), first.pbc)
                lattice = float(np.linalg.norm(reduced[first.pbc], axis=1).min())
            np.fill_diagonal(distance, lattice)
        bond = covalent_radii[first.numbers][:, None] + covalent_radii[second.numbers][None, :]
        return np.asarray(distance - factor * bond - SKIN)

    @staticmethod
    def _shortest(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
        """Find pairs i <= j nearer than `cutoff`, as numbers i * N + j, ascending, and their distances, Å."""
        i, j, distance = neighbor_list("ijd", atoms, cutoff)
        half = i <= j
        pair, distance = i[half].astype(np.int64) * len(atoms) + j[half], distance[half]
        order = np.lexsort((distance, pair))
        pair, distance = pair[order], distance[order]
        first = np.unique(pair, return_index=True)[1]  # the nearest image of each pair
        return pair[first], distance[first]
