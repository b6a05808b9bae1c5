"""Atoms that the constraints of an ASE structure hold in place."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import (
    FixAtoms,
    FixCartesian,
    FixedLine,
    FixedPlane,
    FixScaled,
    dict2constraint,
)

from datasets_oc20.errors import DataError

NEVER_HOLD = frozenset(
    {
        "ExternalForce", "FixBondLength", "FixBondLengths", "FixCom", "FixedMode", "FixInternals",
        "FixLinearTriatomic", "FixSubsetCom", "FixSymmetry", "Hookean", "MirrorForce", "MirrorTorque",
    }
)  # fmt: skip
"""Constraints of ASE that relate atoms to each other or add forces; none of them holds an atom."""

_HOLDING = {
    constraint.__name__: constraint
    for constraint in (FixAtoms, FixCartesian, FixScaled, FixedLine, FixedPlane)
}
_INDEPENDENT = 1e-8
"""Smallest eigenvalue of the held directions of an atom that cannot move; squares of an angle in radians."""


def held_atoms(atoms: Atoms, constraints: Sequence[Any] | None = None) -> np.ndarray:
    """`[N]` bool: atoms that cannot move in any direction.

    Several constraints can hold an atom together (`FixedLine` and a `FixedPlane` across it, `FixCartesian` of
    x and of y and z). An atom that can move in some direction is not held.

    Args:
        atoms: the structure; not changed.
        constraints: those of the structure unless given.

    Raises:
        DataError: a constraint of an atom that the structure does not have.
    """
    held = np.zeros(len(atoms), dtype=bool)
    directions = np.zeros((len(atoms), 3, 3))
    partly = False
    for constraint in atoms.constraints if constraints is None else constraints:
        normals = _held_directions(constraint, atoms)
        if normals is None:
            held |= _held_by_any(constraint, atoms)
        elif len(normals):
            index = _indices(constraint, len(atoms))
            if isinstance(constraint, FixAtoms):
                held[index] = True
            else:
                partly = True
                normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
                directions[index] += normals.T @ normals
    if partly:
        held |= np.linalg.eigvalsh(directions)[:, 0] > _INDEPENDENT
    return held


def constraints_from_records(records: Iterable[Any], where: str) -> list[Any]:
    """ASE constraints that may hold atoms, from the plain form in which databases keep them.

    Args:
        records: `{"name": …, "kwargs": {…}}` each, with arrays as lists.
        where: file and row, for messages.

    Raises:
        DataError: something else, or a constraint that ASE does not have.
    """
    found = []
    for record in records:
        name = record.get("name") if isinstance(record, dict) else None
        if name in NEVER_HOLD:
            continue
        if name not in _HOLDING:
            raise DataError(
                f"{where}: the constraint {name} does not say which atoms are fixed; use FixAtoms."
            )
        try:
            found.append(dict2constraint({"name": name, "kwargs": dict(record["kwargs"])}))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{where}: the constraint {name} cannot be read ({error}); write it with ASE again."
            ) from error
    return found


def _held_directions(constraint: Any, atoms: Atoms) -> np.ndarray | None:
    """`[n, 3]` directions in which none of its atoms moves; None for a constraint of unknown kind."""
    if isinstance(constraint, FixAtoms):
        return np.eye(3)
    if isinstance(constraint, FixCartesian):
        return np.eye(3)[_mask(constraint)]
    if isinstance(constraint, FixScaled):
        mask = _mask(constraint)
        return np.eye(3) if mask.all() else np.linalg.pinv(atoms.cell.complete().array).T[mask]
    if isinstance(constraint, FixedPlane):
        return np.asarray(constraint.dir, dtype=float).reshape(1, 3)
    if isinstance(constraint, FixedLine):
        return np.linalg.svd(np.asarray(constraint.dir, dtype=float).reshape(1, 3))[2][1:]
    if type(constraint).__name__ in NEVER_HOLD and type(constraint).__module__.startswith("ase."):
        return np.zeros((0, 3))
    return None


def _mask(constraint: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(constraint.mask, dtype=bool), (3,))


def _indices(constraint: Any, natoms: int) -> np.ndarray:
    index = np.asarray(constraint.index)
    if index.dtype == bool:
        index = np.flatnonzero(index)
    outside = index[(index < -natoms) | (index >= natoms)]
    if len(outside):
        raise DataError(
            f"the constraint {type(constraint).__name__} is of atom {outside[0]}, but there are {natoms} "
            f"atoms (0 to {natoms - 1}); correct its indices."
        )
    return index


def _held_by_any(constraint: Any, atoms: Atoms) -> np.ndarray:
    """`[N]` bool: atoms whose force a constraint of another package or of a user always sets to zero."""
    random = np.random.default_rng(0)
    held = np.ones(len(atoms), dtype=bool)
    try:
        own = copy.deepcopy(constraint)
        for _ in range(3):
            forces = random.normal(size=(len(atoms), 3))
            own.adjust_forces(atoms, forces)
            held &= ~(np.abs(forces) > 1e-10).any(axis=1)
    except Exception:  # code of others, which may need what a lone structure does not have
        return np.zeros(len(atoms), dtype=bool)
    return held
