"""Slabs and adsorbates by name: `Pt111`, `*CO`, and one placed on the other."""

import math
import re
from collections.abc import Callable, Sequence

import ase.build
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, chemical_symbols, covalent_radii, reference_states
from ase.geometry import get_distances, minkowski_reduce

from equiformer2.adsorption.adsorbates import ase_molecule, check_binding_atoms, find_adsorbate, pointing_up
from equiformer2.adsorption.anomalies import CUSHION, SKIN
from equiformer2.adsorption.periodic_images import (
    SMALLEST_GAP,
    Slab,
    lowest_atom_index,
    whole_molecule,
    whole_slab,
)
from equiformer2.errors import InputError
from equiformer2.inference.atoms import ADSORBATE, SUBSURFACE, SURFACE, fixed_mask

FACETS: dict[str, dict[str, Callable[..., Atoms]]] = {
    "fcc": {"111": ase.build.fcc111, "100": ase.build.fcc100, "110": ase.build.fcc110},
    "bcc": {"110": ase.build.bcc110, "100": ase.build.bcc100, "111": ase.build.bcc111},
    "hcp": {"0001": ase.build.hcp0001},
}
"""Crystal structure -> Miller indices -> ASE builder."""

MOST_ATOMS = 100_000
"""Largest number of atoms of a slab built by name."""

SHORTEST_BOND = 0.8
"""Fraction of the sum of covalent radii; double bonds between metal and oxygen are at 0.8 to 0.85."""


def build_slab(
    name: str,
    size: tuple[int, int, int] = (3, 3, 4),
    *,
    vacuum: float = 10.0,
    free_layers: int = 2,
    lattice_constant: float | None = None,
) -> Atoms:
    """A clean slab such as `Pt111`, `Fe110` or `Ru0001`, periodic in all directions.

    Atoms of the `free_layers` top layers get tag 1, the others tag 0 and are fixed (OC20's convention).

    Args:
        name: element and Miller indices; the element's crystal structure decides which are possible.
        size: repetitions along the surface vectors, and layers.
        vacuum: Å of vacuum on either side of the slab.
        free_layers: layers, from the top, that may move.
        lattice_constant: a in Å; ASE's experimental value if None (OC20 used relaxed RPBE bulks).

    Raises:
        InputError: unknown element, facet or size, a vacuum that is none.
    """
    match = re.fullmatch(r"([A-Z][a-z]?)[-_(]?(\d+)\)?", name)
    several = re.fullmatch(r"([A-Z][a-z]?\d*){2,}[-_(]?\d*\)?", name)
    elements = re.findall("[A-Z][a-z]?", name) if several else []
    if len(elements) > 1 and set(elements) <= set(chemical_symbols[1:]):
        raise InputError(
            f"the slab {name!r} has several elements ({', '.join(elements)}), and only slabs of one element, "
            "such as Pt111, are built by name: cut it from its bulk with `equiformer2 adsorption slab "
            "--bulk` and give the file"
        )
    if not match or match[1] not in atomic_numbers:
        raise InputError(
            f"{name!r} is no slab such as Pt111, Fe110 or Ru0001 (a file without extension: ./{name})"
        )
    symbol, facet = match.groups()
    crystal = str((reference_states[atomic_numbers[symbol]] or {}).get("symmetry", "unknown"))
    builders = FACETS.get(crystal)
    if builders is None:
        raise InputError(f"{symbol} is {crystal}, not fcc, bcc or hcp: give its slab as a structure file")
    if facet not in builders:
        raise InputError(f"{symbol} is {crystal}: {facet} is not one of its slabs {', '.join(builders)}")
    if len(size) != 3 or min(size) < 1:
        raise InputError(f"the slab size {size} must be three positive numbers such as 3x3x4")
    if math.prod(size) > MOST_ATOMS:
        raise InputError(
            f"the slab size {size} means {math.prod(size)} atoms: at most {MOST_ATOMS} are built"
        )
    if not 1 <= free_layers <= size[2]:
        raise InputError(f"free_layers is {free_layers}: give 1 to {size[2]}, the number of layers")
    if not 0 < vacuum < np.inf or not (lattice_constant is None or 0 < lattice_constant < np.inf):
        raise InputError("vacuum and lattice_constant must be positive (Å)")
    if 2.0 * vacuum <= SMALLEST_GAP:
        raise InputError(
            f"a vacuum of {vacuum:g} Å on either side leaves {2.0 * vacuum:g} Å between the slab and its "
            f"image, and a slab has more than {SMALLEST_GAP:g} Å: give more vacuum, such as --vacuum 10"
        )
    slab = builders[facet](symbol, size, a=lattice_constant, vacuum=vacuum, periodic=True)
    held = slab.get_tags() > free_layers  # ASE numbers layers from the top, starting at 1
    slab.set_constraint(FixAtoms(mask=held) if held.any() else None)
    slab.set_tags(np.where(held, SUBSURFACE, SURFACE))
    return slab


def build_adsorbate(name: str, *, binding_atom: int | None = None, flat: bool = False) -> tuple[Atoms, int]:
    """Build an adsorbate by name, oriented for a surface below it.

    Molecules are ASE's where it has the name (also with OC20's star), else OC20's. The binding atom is the
    name's, or `binding_atom`, an index into the molecule. The adsorbate is turned by `pointing_up`.

    Args:
        name: name of the adsorbate.
        binding_atom: index of the atom that binds to the surface; None for the rule above.
        flat: lay the adsorbate flat.

    Returns:
        The adsorbate, and the index of its binding atom.

    Raises:
        InputError: unknown name or no such atom.
    """
    known = ase_molecule(name)
    if known is None:
        adsorbate, (of_name, *_) = find_adsorbate(name)
    else:
        adsorbate, of_name = known
    if binding_atom is None:
        binding_atom = of_name
    check_binding_atoms(adsorbate, [binding_atom], name)
    return pointing_up(adsorbate, binding_atom, flat), binding_atom


def lowest_atom(adsorbate: Atoms, binding_atom: int | None, name: str) -> int:
    """Choose the binding atom of an adsorbate from a file: the given one, or the lowest along z."""
    if binding_atom is None:
        return lowest_atom_index(adsorbate.positions)
    check_binding_atoms(adsorbate, [binding_atom], name)
    return binding_atom


MAX_HEIGHT = 100.0
"""Å. Nothing at such a height is adsorbed."""

_LAYER = 0.5
"""Å of height that belong to one layer of atoms."""


def place_adsorbate(
    slab: Atoms,
    adsorbate: Atoms,
    binding_atom: int = 0,
    *,
    site: str = "ontop",
    position: tuple[float, float] | None = None,
    height: float | None = None,
    gap: float = 0.0,
) -> Atoms:
    """Place an adsorbate on a slab; the slab's tags and constraints are kept, adsorbate atoms get tag 2.

    Neither the orientation of the slab nor the cell boundary nor the images of atoms in it matter: slab and
    adsorbate are made whole first (`adsorption.periodic_images`). The site is the one nearest to the middle
    of the cell. A slab whose free atoms are at its bottom and whose top is held gets the adsorbate from
    below, turned over.

    Args:
        slab: clean slab, its atoms tagged 0 or 1.
        adsorbate: already oriented; it is only moved.
        binding_atom: index of the atom that goes above the site.
        site: a site of ASE's builders (`ontop`, `bridge`, `fcc`, `hcp`, `hollow`, …, depending on the facet);
            a slab from a file knows `ontop` only (above its highest atom).
        position: x and y in Å of a point at the height of the top, instead of `site`.
        height: Å of the binding atom above the highest slab atom. By default the adsorbate is lowered until
            its first atom is at a bond length (sum of covalent radii) and `gap` from the slab.
        gap: Å beyond a bond length (OC20 places with 0.1).

    Raises:
        InputError: unknown site, a slab that has no vacuum, an adsorbate in pieces,
            a height that is not above 0 or beyond `MAX_HEIGHT`, a place where the adsorbate is nearer to the
            slab than a bond, or reaches the next image of the slab or of itself.
    """
    if height is not None and not 0 < height <= MAX_HEIGHT:
        raise InputError(f"height is {height}: give a positive number of Å, at most {MAX_HEIGHT:g}")
    if position is not None and not np.isfinite(position).all():
        raise InputError(f"the position {tuple(position)} is not finite: give x and y in Å")
    adsorbate = whole_molecule(adsorbate, "the adsorbate")
    whole, turn = free_side_up(slab)
    surface = whole.atoms.copy()
    surface.set_constraint()
    top = surface.positions[:, 2].max()
    place = turned_point(position, turn, top) if position is not None else _site_position(surface, site)
    adsorbate.translate(np.array([*place, top + 100.0]) - adsorbate.positions[binding_atom])
    if height is None:
        adsorbate.translate([0, 0, -_drop_to_contact(surface, adsorbate, gap)])
    else:
        adsorbate.translate([0, 0, top + height - adsorbate.positions[binding_atom, 2]])
    _check_place(surface, adsorbate, binding_atom, whole.gap, height)
    adsorbate.set_tags(ADSORBATE)
    adsorbate.set_constraint()
    system = whole.atoms
    system.info = {}
    system.extend(Atoms(adsorbate.numbers, adsorbate.positions, tags=adsorbate.get_tags()))
    turn_back(system, turn, slab)
    return system


def free_side_up(slab: Atoms) -> tuple[Slab, np.ndarray]:
    """Copy a slab in one piece, turned so that its surface is up.

    Its normal becomes z (slabs of OC20 are often tilted), and a slab whose free atoms are at the bottom and
    whose top is held is turned over.

    Returns:
        The slab with its surface up, and the rotation `[3, 3]`: its positions are `positions @ rotation`.

    Raises:
        InputError: no plane or no vacuum along the third vector, not periodic in its plane, and what
            `whole_slab` raises.
    """
    cell = slab.cell.array
    normal = np.cross(cell[0], cell[1])
    area = float(np.linalg.norm(normal))
    if area < 1e-3 or (slab.pbc[2] and abs(normal @ cell[2]) < 1e-3 * area):
        raise InputError(
            "the slab's first two lattice vectors span no surface beside its third one: give a slab whose "
            "vacuum is along the third lattice vector"
        )
    normal /= area
    rotation = np.eye(3)
    if abs(normal[2]) < 1.0 - 1e-6:
        normal *= -1.0 if normal @ cell[2] < 0 else 1.0
        first = cell[0] / np.linalg.norm(cell[0])
        rotation = np.stack([first, np.cross(normal, first), normal], axis=1)
    if not slab.pbc[:2].all():
        raise InputError("the slab is not periodic along its first two lattice vectors: set pbc there")
    whole = whole_slab(slab)
    held, z = fixed_mask(whole.atoms), whole.atoms.positions @ rotation[:, 2]
    hangs = held[z > z.max() - _LAYER].all() and not held[z < z.min() + _LAYER].any()
    if hangs:
        rotation = rotation * [1.0, -1.0, -1.0]
    constraints = whole.atoms.constraints
    whole.atoms.set_constraint()
    whole.atoms.set_cell(cell @ rotation)
    whole.atoms.positions = whole.atoms.positions @ rotation
    whole.atoms.set_constraint(constraints)
    return whole, rotation


def turned_point(position: Sequence[float], rotation: np.ndarray, top: float) -> np.ndarray:
    """Find x and y, after the rotation of `free_side_up`, of the point of the top plane with given x and y.

    Args:
        position: x and y, Å, as the slab was given.
        rotation: of `free_side_up`.
        top: height of the plane after it, Å.

    Raises:
        InputError: the surface stands upright, so that x and y say no point.
    """
    normal = rotation[:, 2]
    if abs(normal[2]) < 1e-3:
        raise InputError("the surface stands along z, so that x and y give no point of it: rotate the slab")
    z = (top - normal[:2] @ np.asarray(position)) / normal[2]
    return np.asarray((np.array([*position, z]) @ rotation)[:2])


def turn_back(system: Atoms, rotation: np.ndarray, slab: Atoms) -> None:
    """Turn a system whose slab is of `free_side_up` as the original `slab` stands, in place."""
    constraints = system.constraints
    system.set_constraint()
    system.positions = system.positions @ rotation.T
    system.set_cell(slab.cell)
    system.set_constraint(constraints)


def _check_place(slab: Atoms, adsorbate: Atoms, binding_atom: int, gap: float, height: float | None) -> None:
    """Raise `InputError` where the adsorbate touches what it must not touch."""
    top = slab.positions[:, 2].max()
    above = adsorbate.positions[:, 2] - top
    told = "" if height is None else f" with the height {height:g} Å"
    if above[binding_atom] > gap / 2 or above.max() >= gap:
        raise InputError(
            f"the adsorbate{told} reaches {above.max():.3g} Å above the slab, and its vacuum is {gap:.1f} Å, "
            "after which the slab's periodic image follows: lower it or give a slab with more vacuum"
        )
    radii, others = covalent_radii[adsorbate.numbers], covalent_radii[slab.numbers]
    cell = slab.cell.array.copy()
    _, distance = get_distances(adsorbate.positions, slab.positions, cell=cell, pbc=(True, True, False))
    short = distance / (radii[:, None] + others[None, :])
    symbols, metals = adsorbate.get_chemical_symbols(), slab.get_chemical_symbols()
    if short.min() < SHORTEST_BOND:
        a, b = np.unravel_index(short.argmin(), short.shape)
        raise InputError(
            f"atom {a} ({symbols[a]}) of the adsorbate{told} would be {distance[a, b]:.2f} Å from slab "
            f"atom {b} ({metals[b]}), closer than a bond ({radii[a] + others[b]:.2f} Å): "
            "give a greater height or another position"
        )
    if np.isfinite(gap):
        up = cell[2] if cell[2, 2] > 0 else -cell[2]
        _, beyond = get_distances(
            adsorbate.positions, slab.positions + up, cell=cell, pbc=(True, True, False)
        )
        clear = beyond - CUSHION * (radii[:, None] + others[None, :]) - SKIN
        if clear.min() < 0:
            a = int(np.unravel_index(clear.argmin(), clear.shape)[0])
            raise InputError(
                f"atom {a} ({symbols[a]}) of the adsorbate{told} is {beyond[a].min():.2f} Å from the "
                f"periodic image of the slab above it, whose vacuum is {gap:.1f} Å: give more vacuum"
            )
    # The nearest images are those along the shortest vectors of the lattice, also in a skewed cell.
    plane, _ = minkowski_reduce([*cell[:2], [0.0, 0.0, 1.0]], (True, True, False))
    shifts = [i * plane[0] + j * plane[1] for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    for shift in shifts:
        _, images = get_distances(adsorbate.positions, adsorbate.positions + shift)
        overlap = images / (radii[:, None] + radii[None, :])
        if overlap.min() < SHORTEST_BOND:
            a, b = np.unravel_index(overlap.argmin(), overlap.shape)
            raise InputError(
                f"the adsorbate meets its own periodic image: atoms {a} ({symbols[a]}) and {b} "
                f"({symbols[b]}) are {images[a, b]:.2f} Å apart: give a larger slab"
            )


def _site_position(slab: Atoms, site: str) -> np.ndarray:
    middle = slab.cell.array[:2, :2].sum(axis=0) / 2
    built = slab.info.get("adsorbate_info", {})
    z = slab.positions[:, 2]
    highest = slab.positions[z > z.max() - 0.1, :2]
    if "sites" in built:
        if site not in built["sites"]:
            raise InputError(f"this facet has no site {site!r}: use one of {', '.join(built['sites'])}")
        unit = np.asarray(built["cell"], dtype=float)
        repeats = np.linalg.solve(unit.T, slab.cell.array[:2, :2].T).T
        if np.abs(repeats - np.round(repeats)).max() > 1e-3:
            raise InputError(
                f"the slab was changed since it was built, so that the site {site!r} is not known"
            )
        offset = np.asarray(built["sites"][site], dtype=float)  # from a top-layer atom
        offset = offset + np.linalg.solve(unit.T, highest[0])  # which need not be at the origin
        nearest = np.round(np.linalg.solve(unit.T, middle) - offset)
        candidates = [(offset + nearest + (i, j)) @ unit for i in (-1, 0, 1) for j in (-1, 0, 1)]
    elif site == "ontop":
        # The image nearest to the middle of each: files wrap their atoms in any way.
        across = slab.cell.array[:2, :2]
        cells = np.round(np.linalg.solve(across.T, (middle - highest).T).T)
        candidates = [
            xy + (n + np.array([i, j])) @ across
            for xy, n in zip(highest, cells, strict=True)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
    else:
        raise InputError(f"the site {site!r} is known for slabs built by name only: give a position x y in Å")
    return min(candidates, key=lambda xy: round(float(np.linalg.norm(xy - middle)), 6))


def _drop_to_contact(slab: Atoms, adsorbate: Atoms, gap: float) -> float:
    """Å to lower `adsorbate` until its first atom is at a bond length and `gap` from a slab atom."""
    rise = adsorbate.positions[:, None, 2] - slab.positions[None, :, 2]
    in_plane = np.array([1.0, 1.0, 0.0])
    _, lateral = get_distances(
        adsorbate.positions * in_plane,
        slab.positions * in_plane,
        cell=[*slab.cell.array[:2], [0, 0, 1]],
        pbc=(True, True, False),
    )
    bond = covalent_radii[adsorbate.numbers][:, None] + covalent_radii[slab.numbers][None, :] + gap
    touching = lateral < bond
    contact = np.sqrt(np.where(touching, bond**2 - lateral**2, 0.0))
    above = np.where(touching, rise - contact, np.inf)
    # Over an open channel nothing touches on the way down: stop at the surface plane.
    return float(min(above.min(), rise.min()))
