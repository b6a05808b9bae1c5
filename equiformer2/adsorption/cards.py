"""Trust card of an adsorption energy: what it is, what it rests on, and how to check it again."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.inference.atoms import ADSORBATE, fixed_mask

#: Elements whose magnetism OC20's calculations leave out.
MAGNETIC = ("Cr", "Mn", "Fe", "Co", "Ni")
#: Elements whose oxides need a +U, which OC20 leaves out (Materials Project's list).
CORRELATED = ("V", "Cr", "Mn", "Fe", "Co", "Ni", "Mo", "W")
_OC20 = (
    "OC20: VASP, RPBE, without spin polarisation, +U, dispersion and solvent, at 0 K without zero-point energy"
)
#: eV and eV/Å; other processors and numbers of threads change sums in the last digits.
SAME_ENERGY, SAME_FORCE = 1e-3, 5e-3


def label_physics(atoms: Atoms, energy_kind: str | None, provenance: Mapping[str, Any] | None) -> list[str]:
    """Say what the labels behind an energy leave out, and where that matters for this structure.

    Args:
        atoms: slab and adsorbate.
        energy_kind: of the model.
        provenance: of its checkpoint; None for a calculator that is no network of ours.
    """
    if provenance is None:
        return ["the energies are those of the calculator, with the physics that it has"]
    stages = TrainingData(provenance).stages or ()
    labels = list(dict.fromkeys(label for stage in stages for label in stage.get("labels") or ()))
    if labels:
        said = [f"labels: {', '.join(map(str, labels))}"]
    elif energy_kind == "adsorption":
        said = [f"labels are not stated by the checkpoint; of adsorption energies they mostly are those of {_OC20}"]
    else:
        said = ["labels are not stated by the checkpoint"]
    substrate = {atom.symbol for atom in atoms if atom.tag != ADSORBATE}
    magnetic = sorted(substrate & set(MAGNETIC))
    if magnetic:
        said.append(
            f"the slab holds {', '.join(magnetic)}, which is magnetic or may be: OC20's calculations have no "
            "spin polarisation"
        )
    correlated = sorted(substrate & set(CORRELATED))
    if "O" in substrate and correlated:
        said.append(f"the slab may be an oxide of {', '.join(correlated)}, which needs a +U that OC20 does not have")
    return said


def structure_digest(atoms: Atoms) -> str:
    """Hash what an energy depends on, rounded as files keep it: elements, positions, cell, pbc, held atoms."""
    digest = hashlib.sha256()
    for values in (atoms.numbers, atoms.pbc, fixed_mask(atoms)):
        digest.update(np.ascontiguousarray(values).astype(np.int64).tobytes())
    for values in (atoms.positions, atoms.cell.array):
        digest.update(np.round(np.asarray(values) * 1e6).astype(np.int64).tobytes())
    return digest.hexdigest()


def compare_card(card: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare the fields of a card with what was recomputed.

    Args:
        card: `verifiable` of a card.
        now: the same fields, recomputed.

    Returns:
        By field `card`, `now` and `ok`: equal, or for numbers within `SAME_ENERGY` or `SAME_FORCE`.
    """
    rows = {}
    for name, value in card.items():
        other = now.get(name)
        tolerance = SAME_FORCE if name.endswith("eV_A") else SAME_ENERGY
        both = isinstance(value, int | float) and isinstance(other, int | float)
        same = abs(value - other) <= tolerance if both and not isinstance(value, bool) else value == other
        rows[name] = {"card": value, "now": other, "ok": bool(same)}
    return rows


def twice_named(sentences: Sequence[str]) -> list[str]:
    """Leave out sentences that were said before."""
    return list(dict.fromkeys(sentences))
