"""Make molecules and slabs whole again, however a file wraps their atoms into the cell.

Both functions move atoms by lattice vectors only, so a periodic structure stays what it is.
"""

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic

from datasets_oc20.tags import surface_height
from equiformer2.adsorption.anomalies import CUSHION, SKIN
from equiformer2.errors import InputError

SMALLEST_GAP = 6.0
"""Å of vacuum between the atoms of a slab and of its image; layered bulks have up to 4 Å between layers."""

_SAME_HEIGHT = 1e-3
"""Å; what a file's rounding makes of equal heights."""


def whole_molecule(molecule: Atoms, name: str) -> Atoms:
    """Copy a molecule so that its atoms lie together, each joined to the next by its nearest image.

    Args:
        molecule: in any cell, wrapped in any way.
        name: for messages.

    Raises:
        InputError: it falls into pieces that do not touch, or is bound to its own periodic image, so that it
            has no inside.
    """
    if len(molecule) == 1:
        return molecule.copy()

    def first_gap(order: list[tuple[int, int]], touch: np.ndarray) -> tuple[int, int] | None:
        return next(((a, b) for a, b in order if not touch[a, b]), None)

    vectors, touch = _between(molecule, molecule.pbc)
    order = _joined(vectors, molecule)
    apart = first_gap(order, touch)
    if apart is not None and not molecule.pbc.all() and abs(np.linalg.det(molecule.cell.array)) > 1e-6:
        # Positions of a file that lost its pbc can be wrapped all the same.
        vectors, touch = _between(molecule, np.ones(3, dtype=bool))
        order = _joined(vectors, molecule)
        apart = first_gap(order, touch)
    if apart is not None:
        a, b = apart
        symbols = molecule.get_chemical_symbols()
        raise InputError(
            f"{name} is not one molecule: atom {b} ({symbols[b]}) and those bound to it are "
            f"{np.linalg.norm(vectors[a, b]):.2f} Å from the nearest other atom, {a} ({symbols[a]}), "
            "which is no bond: give a single molecule, whole or with the cell that it was wrapped into"
        )
    whole = molecule.copy()
    for a, b in order:
        whole.positions[b] = whole.positions[a] + vectors[a, b]
    # In a ring that is closed through the cell boundary some bond is not where the whole molecule has it.
    radii = covalent_radii[whole.numbers]
    direct = whole.positions[None, :] - whole.positions[:, None]
    bonded = np.linalg.norm(vectors, axis=2) < radii[:, None] + radii[None, :] + SKIN
    elsewhere = bonded & (np.linalg.norm(direct - vectors, axis=2) > 1e-3)
    if elsewhere.any():
        a, b = map(int, np.argwhere(elsewhere)[0])
        raise InputError(
            f"{name} is bound to its own periodic image (atoms {a} and {b}): give a molecule in a larger cell"
        )
    return whole


def lowest_atom_index(positions: np.ndarray) -> int:
    """Find the first of the lowest atoms along z; heights that differ by rounding only are the same."""
    heights = positions[:, 2]
    return int(np.flatnonzero(heights < heights.min() + _SAME_HEIGHT)[0])


@dataclass(frozen=True)
class Slab:
    """A slab that lies together along its normal.

    Attributes:
        atoms: a copy, its atoms moved along the third lattice vector.
        gap: Å of vacuum between its top and the bottom of its next image; infinite without one.
    """

    atoms: Atoms
    gap: float


def whole_slab(slab: Atoms) -> Slab:
    """Copy a slab in one piece on one side of the vacuum, which is the widest gap along its normal.

    Raises:
        InputError: no gap along the third lattice vector (a bulk, or a vacuum in another direction), one that
            is too small, or several (more than one slab).
    """
    heights = surface_height(slab)
    if not slab.pbc[2]:
        between = np.diff(np.sort(heights)).max(initial=0.0)
        if between >= SMALLEST_GAP:
            raise InputError(
                f"the slab is in two parts, {between:.1f} Å apart along its normal, and not periodic there: "
                "set pbc in all directions if it crosses the cell boundary, or give one slab"
            )
        return Slab(slab.copy(), np.inf)
    normal = np.cross(slab.cell[0], slab.cell[1])
    period = abs(float(slab.cell[2] @ normal)) / float(np.linalg.norm(normal))
    fractions = heights / period
    order = np.argsort(fractions % 1.0)
    ascending = (fractions % 1.0)[order]
    gaps = np.diff(np.append(ascending, ascending[0] + 1.0)) * period
    widest = int(gaps.argmax())
    if gaps[widest] < SMALLEST_GAP:
        raise InputError(_no_gap(slab, float(gaps[widest])))
    second = float(np.delete(gaps, widest).max(initial=0.0))
    if second >= SMALLEST_GAP:
        raise InputError(
            f"the slab is in two parts with {gaps[widest]:.1f} and {second:.1f} Å between them along its "
            "normal: give one slab in its cell"
        )
    bottom = ascending[(widest + 1) % len(ascending)] - 1e-9
    # How many lattice vectors each atom is away from the image that begins at the bottom.
    cells = np.floor(fractions - bottom).astype(np.int64)
    cells -= np.bincount(cells - cells.min()).argmax() + cells.min()  # where most atoms are, they stay
    whole = slab.copy()
    whole.positions -= cells[:, None] * slab.cell.array[2]
    return Slab(whole, float(gaps[widest]))


def _no_gap(slab: Atoms, widest: float) -> str:
    what = f"the slab has no vacuum along its third lattice vector (the widest gap is {widest:.1f} Å"
    for axis, name in ((0, "first"), (1, "second")):
        spread = np.sort(slab.get_scaled_positions(wrap=True)[:, axis])
        volume = abs(float(np.linalg.det(slab.cell.array)))
        others = np.cross(slab.cell[(axis + 1) % 3], slab.cell[(axis + 2) % 3])
        period = volume / float(np.linalg.norm(others))
        if np.diff(np.append(spread, spread[0] + 1.0)).max() * period >= SMALLEST_GAP:
            return f"{what}): its vacuum is along the {name} one, so make that the third and turn it to z"
    return (
        f"{what}, and {SMALLEST_GAP:g} Å are the least): "
        "give a slab with vacuum, 10 Å or more, rather than a bulk"
    )


def _between(molecule: Atoms, pbc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[N, N, 3]` Å from i to the nearest image of j, and `[N, N]` bool: loosely touching."""
    positions = molecule.positions
    count = len(positions)
    vectors, lengths = find_mic(
        (positions[None, :] - positions[:, None]).reshape(-1, 3), molecule.cell, pbc=pbc
    )
    radii = covalent_radii[molecule.numbers]
    reach = CUSHION * (radii[:, None] + radii[None, :]) + SKIN
    return np.asarray(vectors).reshape(count, count, 3), np.asarray(lengths).reshape(count, count) < reach


def _joined(vectors: np.ndarray, molecule: Atoms) -> list[tuple[int, int]]:
    """Pairs (one that is in, one that comes in) that join all atoms, tightest first from atom 0 (Prim)."""
    radii = covalent_radii[molecule.numbers]
    tightness = np.linalg.norm(vectors, axis=2) / (radii[:, None] + radii[None, :])
    nearest, best = np.zeros(len(radii), dtype=np.int64), tightness[0].copy()
    outside = np.ones(len(radii), dtype=bool)
    outside[0] = False
    pairs = []
    while outside.any():
        new = int(np.where(outside, best, np.inf).argmin())
        pairs.append((int(nearest[new]), new))
        outside[new] = False
        nearer = outside & (tightness[new] < best)
        nearest[nearer], best[nearer] = new, tightness[new][nearer]
    return pairs
