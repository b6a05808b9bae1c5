"""Detection of atoms that the constraints of an ASE structure hold in place."""

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
    """Find the atoms that cannot move in any direction.

    Several constraints can hold an atom together (`FixedLine` and a `FixedPlane` across it, `FixCartesian` of
    x and of y and z). An atom that can move in some direction is not held.

    Args:
        atoms: the structure; not changed.
        constraints: constraints of ASE; None takes those of the structure.

    Returns:
        `[N]` bool, True for held atoms.

    Raises:
        DataError: a constraint of an atom that the structure does not have.
    """

    def atom_indices(constraint: Any) -> np.ndarray:
        index = np.asarray(constraint.index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        outside = index[(index < -len(atoms)) | (index >= len(atoms))]
        if len(outside):
            raise DataError(
                f"the constraint {type(constraint).__name__} is of atom {outside[0]}, but there are "
                f"{len(atoms)} atoms (0 to {len(atoms) - 1}); correct its indices."
            )
        return index

    held = np.zeros(len(atoms), dtype=bool)
    directions = np.zeros((len(atoms), 3, 3))
    partly = False
    for constraint in atoms.constraints if constraints is None else constraints:
        normals = _held_directions(constraint, atoms)
        if normals is None:
            held |= _held_by_any(constraint, atoms)
        elif len(normals):
            index = atom_indices(constraint)
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
    """Build the ASE constraints that may hold atoms from the plain form in which databases keep them.

    Args:
        records: `{"name": …, "kwargs": {…}}` each, with arrays as lists.
        where: file and row, for messages.

    Raises:
        DataError: something else, or a constraint that ASE does not have.
    """
    constraints = []
    for record in records:
        name = record.get("name") if isinstance(record, dict) else None
        if name in NEVER_HOLD:
            continue
        if name not in _HOLDING:
            raise DataError(
                f"{where}: the constraint {name} does not say which atoms are fixed; use FixAtoms."
            )
        try:
            constraints.append(dict2constraint({"name": name, "kwargs": dict(record["kwargs"])}))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{where}: the constraint {name} cannot be read ({error}); write it with ASE again."
            ) from error
    return constraints


def _held_directions(constraint: Any, atoms: Atoms) -> np.ndarray | None:
    """Return `[n, 3]` directions in which its atoms cannot move; None for an unknown kind of constraint."""
    if isinstance(constraint, FixAtoms):
        return np.eye(3)
    if isinstance(constraint, FixCartesian | FixScaled):
        mask = np.broadcast_to(np.asarray(constraint.mask, dtype=bool), (3,))
        if isinstance(constraint, FixCartesian):
            return np.eye(3)[mask]
        return np.eye(3) if mask.all() else np.linalg.pinv(atoms.cell.complete().array).T[mask]
    if isinstance(constraint, FixedPlane):
        return np.asarray(constraint.dir, dtype=float).reshape(1, 3)
    if isinstance(constraint, FixedLine):
        return np.linalg.svd(np.asarray(constraint.dir, dtype=float).reshape(1, 3))[2][1:]
    if type(constraint).__name__ in NEVER_HOLD and type(constraint).__module__.startswith("ase."):
        return np.zeros((0, 3))
    return None


def _held_by_any(constraint: Any, atoms: Atoms) -> np.ndarray:
    """Find the atoms, `[N]` bool, whose force an unknown constraint always sets to zero."""
    random = np.random.default_rng(0)
    held = np.ones(len(atoms), dtype=bool)
    try:
        trial = copy.deepcopy(constraint)
        for _ in range(3):
            forces = random.normal(size=(len(atoms), 3))
            trial.adjust_forces(atoms, forces)
            held &= ~(np.abs(forces) > 1e-10).any(axis=1)
    except Exception:  # third-party code, which may need more than a lone structure
        return np.zeros(len(atoms), dtype=bool)
    return held
