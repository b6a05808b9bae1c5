"""Structures that users give as objects: of ASE and of pymatgen, and paths."""

import os
from typing import Any

from ase import Atoms

from equiformer2.errors import InputError


def path_text(given: Any) -> Any:
    """Text of a path object, with a slash or a dot so that it means a file; everything else as it is."""
    if not isinstance(given, os.PathLike):
        return given
    text = os.fspath(given)
    return text if "/" in text or "." in text else f"./{text}"


def given_atoms(given: Any, name: str) -> Atoms:
    """Convert a structure, slab or molecule of pymatgen, with its held atoms, to Atoms.

    Args:
        given: the object; Atoms are given back.
        name: of it, for errors.

    Raises:
        InputError: it is neither, or has partly occupied sites.
    """
    if isinstance(given, Atoms):
        return given
    if not hasattr(given, "is_ordered") or not hasattr(given, "to_ase_atoms"):
        raise InputError(
            f"{name} cannot be made of {type(given).__name__}: give Atoms, a pymatgen structure, a file or a "
            "name"
        )
    if not given.is_ordered:
        raise InputError(f"{name} has partly occupied sites: choose an element for each of them")
    try:
        atoms = given.to_ase_atoms(msonable=False)
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise InputError(f"{name} cannot be read as a pymatgen structure: {error}") from error
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, tags=atoms.get_tags())
    plain.set_constraint(atoms.constraints)
    return plain
