"""Adsorbates by name or from a file: OC20's 86, the molecules of ASE, single atoms."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
from ase import Atoms
from ase.build.molecule import extra as extra_molecules
from ase.collections import g2
from ase.data import chemical_symbols

from datasets_oc20 import untrusted
from datasets_oc20.structure_files import read_structure
from equiformer2.adsorption.periodic_images import lowest_atom_index, whole_molecule
from equiformer2.errors import InputError
from equiformer2.files import as_input_error
from equiformer2.inference.atoms import check_atoms

# The binding atom is read from the name as written, so OCH3 binds through O and CH3O through C.
OTHER_NAMES = {
    "OH2": "H2O",
    "CHO": "HCO",
    "CH2O": "H2CO",
    "CH2OH": "H2COH",
    "OCH3": "CH3O",
    "OHCH3": "CH3OH",
    "CH2CO": "H2CCO",
    "CH2": "CH2_s3B1d",
}
"""OC20's way of writing an adsorbate, without stars -> ASE's name of the same molecule."""


@dataclass(frozen=True)
class NamedAdsorbate:
    """An adsorbate of OC20.

    Attributes:
        name: OC20's, with a star at the atoms that bind, such as `*CH2*O`.
        atoms: the molecule, oriented for a surface below it.
        binding_indices: indices of the atoms that bind.
    """

    name: str
    atoms: Atoms
    binding_indices: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """Plain values: name, formula, number of atoms, indices and symbols of the binding atoms."""
        symbols = self.atoms.get_chemical_symbols()
        return {
            "name": self.name,
            "formula": str(self.atoms.get_chemical_formula()),
            "atoms": len(self.atoms),
            "binding_indices": list(self.binding_indices),
            "binding_atoms": [symbols[index] for index in self.binding_indices],
        }


@cache
def oc20_adsorbates() -> dict[str, NamedAdsorbate]:
    """Read OC20's adsorbates by name, in OC20's order; the file names its source and licence.

    Its structures are shared: copy them before changing them (`find_adsorbate` does).
    """
    rows = untrusted.read_json(Path(__file__).with_name("oc20_adsorbates.json"))["adsorbates"]
    return {
        row["name"]: NamedAdsorbate(
            row["name"], Atoms(row["symbols"], row["positions_A"]), tuple(row["binding_indices"])
        )
        for row in rows
    }


def adsorbate_list() -> str:
    """Format OC20's adsorbates as a table: name, formula, number of atoms, binding atoms."""
    rows = [adsorbate.summary() for adsorbate in oc20_adsorbates().values()]
    lines = [f"{'name':14} {'formula':8} {'atoms':>5}  binding atoms (index)"]
    for row in rows:
        pairs = zip(row["binding_atoms"], row["binding_indices"], strict=True)
        binding = ", ".join(f"{symbol} ({index})" for symbol, index in pairs)
        lines.append(f"{row['name']:14} {row['formula']:8} {row['atoms']:5}  {binding}")
    return "\n".join(lines)


def find_adsorbate(name: str) -> tuple[Atoms, list[int]]:
    """Find an adsorbate by its name or in a file.

    Looked up in this order: a file (text with a dot or a slash), of which the orientation stays and the
    lowest atom binds; a name of OC20's with its stars (`*CO`, `*CH2*O`), as OC20 has it; an element or a
    molecule of `ase.build.molecule` (`CO`, `CH3OH`), turned so that the rest points up; a name of OC20's
    without its stars (`COOH`).

    Returns:
        The adsorbate, oriented for a surface below it, and the indices of its binding atoms. An adsorbate
        with several binds through any of them.

    Raises:
        InputError: no such name (near ones are told), or the file holds no molecule.
        OSError: the file is missing or unreadable.
    """
    if is_file(name):
        with as_input_error():
            molecule = read_structure(name)
        check_atoms(molecule)
        molecule = whole_molecule(molecule, name)
        return molecule, [lowest_atom_index(molecule.positions)]
    adsorbates = oc20_adsorbates()
    known = None if name in adsorbates else ase_molecule(name)
    if known is not None:
        molecule, binding_atom = known
        return pointing_up(molecule, binding_atom), [binding_atom]
    without_stars = {key.replace("*", ""): key for key in reversed(adsorbates)}
    named = adsorbates.get(name) or adsorbates.get(without_stars.get(name.replace("*", ""), ""))
    if named is None:
        molecules = [*g2.names, *extra_molecules]
        near = difflib.get_close_matches(name, [*adsorbates, *molecules], n=3)
        bare = difflib.get_close_matches(name.replace("*", ""), molecules, n=3)
        near += [other for other in bare if other not in near]
        hint = f" (near: {', '.join(near[:4])})" if near else ""
        raise InputError(
            f"{name!r} is no molecule ASE knows{hint} and no adsorbate of OC20: take a name of "
            "`equiformer2 adsorption slab --list-adsorbates`, or give the adsorbate as a structure file"
        )
    return named.atoms.copy(), list(named.binding_indices)


def ase_molecule(name: str) -> tuple[Atoms, int] | None:
    """Build an element or a molecule of `ase.build.molecule` by name, stars left out; None for other names.

    Returns:
        The molecule and its binding atom: the first of the written formula that is not hydrogen.
    """
    formula = name.replace("*", "")
    bare = OTHER_NAMES.get(formula, formula)
    if bare in chemical_symbols[1:]:
        return Atoms(bare), 0
    if bare not in [*g2.names, *extra_molecules]:
        return None
    molecule = ase.build.molecule(bare)
    symbols = molecule.get_chemical_symbols()
    written = re.findall(r"[A-Z][a-z]?", formula.split("_")[0])
    heavy = [symbol for symbol in written if symbol != "H" and symbol in symbols]
    return molecule, symbols.index(heavy[0]) if heavy else 0


def pointing_up(molecule: Atoms, binding_atom: int, flat: bool = False) -> Atoms:
    """Copy a molecule turned so that the rest of it points away from a surface below its binding atom.

    Where the rest surrounds the binding atom evenly (CO2, CH3), and with `flat`, it lies flat.
    """
    molecule = molecule.copy()
    if len(molecule) == 1:
        return molecule
    relative = molecule.positions - molecule.positions[binding_atom]
    rest = relative.sum(axis=0) / (len(molecule) - 1)
    # Evenly surrounded: the rest's centre is so near that its direction means nothing.
    if flat or np.linalg.norm(rest) < 0.1 * np.linalg.norm(relative, axis=1).max():
        axes = np.linalg.svd(relative - relative.mean(axis=0))[2]  # longest extent first
        axes[2] *= np.sign(np.linalg.det(axes))  # a rotation, not a mirror image
        molecule.positions = relative @ axes.T
    elif rest[2] < 0 and np.linalg.norm(rest[:2]) < 1e-6:  # straight down: no unique axis to turn about
        molecule.rotate(180, "x")
    else:
        molecule.rotate(rest, "z")
    return molecule


def check_binding_atoms(adsorbate: Atoms, indices: Sequence[int], name: str) -> None:
    """Raise `InputError` where an index is not one of the adsorbate's atoms."""
    for index in indices:
        if not 0 <= index < len(adsorbate):
            raise InputError(
                f"binding atom {index} does not exist in {name}: it has atoms 0 to {len(adsorbate) - 1} "
                f"({', '.join(adsorbate.get_chemical_symbols())})"
            )


def is_file(name: str) -> bool:
    """Tell whether a text means a file rather than the name of a slab or molecule."""
    return "." in name or "/" in name
