"""Trust card of an adsorption energy: what it is, what it rests on, and how to check it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from datasets_oc20.structure_files import read_structure
from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json
from equiformer2.inference.atoms import ADSORBATE, fixed_mask
from equiformer2.inference.dispersion import recorded_dispersion, with_dispersion
from equiformer2.inference.engines import Engineable
from equiformer2.inference.many import predict
from equiformer2.inference.record import recorded_model
from equiformer2.shipped import find_checkpoint

#: Elements whose magnetism OC20's calculations leave out.
MAGNETIC = ("Cr", "Mn", "Fe", "Co", "Ni")
#: Elements whose oxides need a +U, which OC20 leaves out (Materials Project's list).
CORRELATED = ("V", "Cr", "Mn", "Fe", "Co", "Ni", "Mo", "W")
_OC20 = "OC20: VASP, RPBE, without spin polarisation, +U, dispersion, solvent and zero-point energy"
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
        said = [
            f"labels are not stated by the checkpoint; those of adsorption energies mostly are of {_OC20}"
        ]
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
        said.append(
            f"the slab may be an oxide of {', '.join(correlated)}, which needs a +U that OC20 does not have"
        )
    return said


def verify_card(path: AnyPath, model: Engineable | None = None) -> dict[str, dict[str, Any]]:
    """Recompute what a trust card says and compare.

    Args:
        path: the card; its structure lies beside it.
        model: the model; None for the checkpoint that the card names.

    Returns:
        By field `card`, `now` and `ok`: equal, or for numbers within `SAME_ENERGY` or `SAME_FORCE`.

    Raises:
        InputError: not a card, a structure or a checkpoint that is missing or cannot be read.
    """
    path = Path(path)
    card = read_json(path)
    expected = card.get("verifiable")
    if not isinstance(expected, dict) or not isinstance(card.get("structure"), str):
        raise InputError(f"{path} is no trust card: give the card.json of a search")
    file = path.parent / Path(card["structure"]).name
    with as_input_error():
        atoms = read_structure(file)
    checkpoint = (card.get("model") or {}).get("checkpoint")
    if model is None and checkpoint is None:
        raise InputError(f"{path} names no checkpoint: give the calculator with which it was made")
    given = recorded_model(card["model"]) if model is None else model
    (now,) = predict([atoms], with_dispersion(given, recorded_dispersion(card.get("d3_eV"))))
    model = checkpoint if model is None else model
    forces = now.get_forces(apply_constraint=False)[~fixed_mask(atoms)]
    fields = {
        "structure_sha256": sha256(file),
        "model_energy_eV": float(now.get_potential_energy(apply_constraint=False)),
        "max_force_eV_A": float(np.linalg.norm(forces, axis=1).max()) if len(forces) else 0.0,
    }
    expected = dict(expected)
    if card.get("checkpoint_sha256") is not None and isinstance(model, str | list):
        files = [model] if isinstance(model, str) else model
        sums = [sha256(find_checkpoint(str(file))) for file in files]
        expected["checkpoint_sha256"] = card["checkpoint_sha256"]
        fields["checkpoint_sha256"] = sums[0] if isinstance(model, str) else sums
    rows = {}
    for name, value in expected.items():
        other = fields.get(name)
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (value, other))
        tolerance = SAME_FORCE if name.endswith("eV_A") else SAME_ENERGY
        same = abs(value - other) <= tolerance if numbers else value == other
        rows[name] = {"card": value, "now": other, "ok": bool(same)}
    return rows
