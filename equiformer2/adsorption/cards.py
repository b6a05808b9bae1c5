"""Trust card of an adsorption energy: what it is, what it rests on, and how to check it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from datasets_oc20.structure_files import read_structure
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import check_anomalies
from equiformer2.adsorption.dispersion_terms import SLAB as D3_SLAB
from equiformer2.adsorption.search_folder import CLEAN_SLAB, SEARCH, TRAJECTORIES
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json
from equiformer2.inference.atoms import ADSORBATE, fixed_mask
from equiformer2.inference.dispersion import Dispersion, recorded_dispersion, with_dispersion
from equiformer2.inference.engines import Engine, Engineable, open_engine
from equiformer2.inference.many import predict
from equiformer2.inference.record import given_or_recorded
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


def verify_card(
    path: AnyPath, model: Engineable | None = None, adapter: AnyPath | None = None
) -> dict[str, dict[str, Any]]:
    """Recompute what a trust card says and compare.

    Args:
        path: the card; its structure lies beside it.
        model: the model; None for the checkpoint that the card names.
        adapter: adapter file in place of the one that the card names.

    Returns:
        By field `card`, `now` and `ok`: equal, or for numbers within `SAME_ENERGY` (also of Å) or
        `SAME_FORCE`. Energy and forces are the model's of the structure, from which the adsorption energy
        follows with the terms of the card. What lies beside the card is compared, too: the energy of the
        clean slab, the verdicts and margins of anomalies, and the record of the search.

    Raises:
        InputError: not a card, a structure or a checkpoint that is missing or cannot be read.
    """
    path = Path(path)
    card = read_json(path)
    expected = card.get("verifiable")
    if not isinstance(expected, dict) or not isinstance(card.get("structure"), str):
        raise InputError(f"{path} is no trust card: give the card.json of a search")
    file = path.parent / Path(card["structure"]).name
    clean_file = path.parent / CLEAN_SLAB
    with as_input_error():
        atoms = read_structure(file)
        clean = read_structure(clean_file) if clean_file.is_file() else None
    checkpoint = (card.get("model") or {}).get("checkpoint")
    if model is None and checkpoint is None:
        raise InputError(f"{path} names no checkpoint: give the calculator with which it was made")
    given = given_or_recorded(card.get("model") or {}, model, adapter)
    dispersion = recorded_dispersion(card.get("d3_eV"))
    engine = open_engine(with_dispersion(given, dispersion))
    (now,) = predict([atoms], engine)
    model = checkpoint if model is None else model
    forces = now.get_forces(apply_constraint=False)[~fixed_mask(atoms)]
    terms = _numbers(path, card.get("terms_eV"))
    energy = float(now.get_potential_energy(apply_constraint=False))
    fields = {
        "structure_sha256": sha256(file),
        "model_energy_eV": energy,
        "max_force_eV_A": float(np.linalg.norm(forces, axis=1).max()) if len(forces) else 0.0,
        "adsorption_energy_eV": energy - sum(terms.values()),
    }
    expected = {**expected, "adsorption_energy_eV": card.get("adsorption_energy_eV")}
    if card.get("checkpoint_sha256") is not None and isinstance(model, str | list):
        files = [model] if isinstance(model, str) else model
        sums = [sha256(find_checkpoint(str(file))) for file in files]
        expected["checkpoint_sha256"] = card["checkpoint_sha256"]
        fields["checkpoint_sha256"] = sums[0] if isinstance(model, str) else sums
        file_of_adapter = adapter or card["model"].get("adapter")
        if file_of_adapter is not None:
            expected["adapter_sha256"] = card["model"].get("adapter_sha256")
            fields["adapter_sha256"] = sha256(file_of_adapter)
    rows = {name: _row(name, expected.get(name), fields.get(name)) for name in {**fields, **expected}}
    search = read_json(path.parent / SEARCH) if (path.parent / SEARCH).is_file() else None
    rows |= _rows_of_terms(card, terms, atoms, search)
    if clean is not None:
        rows |= _rows_of_slab(terms, clean, engine, dispersion)
        if rows["structure_sha256"]["ok"]:  # the verdicts are about this structure alone
            rows |= _rows_of_anomalies(path.parent, card, atoms, clean, search)
    return rows


def _row(name: str, card: Any, now: Any) -> dict[str, Any]:
    """Compare a value of a card with the one that was computed again."""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (card, now))
    tolerance = SAME_FORCE if name.endswith("eV_A") else SAME_ENERGY
    return {"card": card, "now": now, "ok": bool(abs(card - now) <= tolerance if numbers else card == now)}


def _numbers(path: Path, terms: Any) -> dict[str, float]:
    """Energies by name; raises `InputError` for something else."""
    terms = {} if terms is None else terms
    if not isinstance(terms, dict) or not all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in terms.values()
    ):
        raise InputError(f"{path} is broken: its terms_eV are no energies")
    return terms


def _rows_of_slab(
    terms: Mapping[str, float], clean: Atoms, engine: Engine, dispersion: Dispersion | None
) -> dict[str, dict[str, Any]]:
    """Compute the energy of the relaxed clean slab again; for a model of adsorption energies its D3 alone."""
    rows = {}
    if "slab" in terms:
        (now,) = predict([clean], engine)
        energy = float(now.get_potential_energy(apply_constraint=False))
        rows["terms_eV.slab"] = _row("terms_eV.slab", terms["slab"], energy)
    if dispersion is not None and D3_SLAB in terms:
        name = f"terms_eV.{D3_SLAB}"
        rows[name] = _row(name, terms[D3_SLAB], dispersion.energy(clean))
    return rows


def _rows_of_terms(
    card: Mapping[str, Any], terms: Mapping[str, float], atoms: Atoms, search: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Compare the energy of the gas with its parts, and the card with the record of the search beside it."""
    rows = {}
    if "gas" in terms:
        gas = (card if search is None else search).get("gas") or {}
        per_atom = gas.get("per_atom_eV") or {}
        symbols = [atom.symbol for atom in atoms if atom.tag == ADSORBATE]
        is_sum = bool(symbols) and set(symbols) <= per_atom.keys()
        now = float(sum(per_atom[one] for one in symbols)) if is_sum else gas.get("energy_eV")
        rows["terms_eV.gas"] = _row("terms_eV.gas", terms["gas"], now)
    if search is not None:
        name = "search.adsorption_energy_eV"
        rows[name] = _row(name, card.get("adsorption_energy_eV"), search.get("adsorption_energy_eV"))
        for term in {**terms, **(search.get("terms_eV") or {})}:
            name = f"search.terms_eV.{term}"
            rows[name] = _row(name, terms.get(term), (search.get("terms_eV") or {}).get(term))
    return rows


def _rows_of_anomalies(
    folder: Path, card: Mapping[str, Any], atoms: Atoms, clean: Atoms, search: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Apply the rules of anomalies again, and compare verdicts and margins.

    The adsorbate's bonds need the start, which is in the trajectory of the placement, unless a draft has
    moved it before.
    """
    checks = {one.get("name"): one for one in card.get("anomaly_checks") or [] if isinstance(one, dict)}
    trajectory = folder / TRAJECTORIES / f"{Path(str(card.get('placement'))).name}.traj"
    start = None
    if search is not None and search.get("draft") is None and trajectory.is_file():
        with as_input_error():
            start = read_structure(trajectory, 0)
    rows = {}
    for one in check_anomalies(atoms if start is None else start, atoms, atoms.get_tags(), clean):
        if one.name not in checks or (start is None and one.name == "dissociated"):
            continue
        for key, now in (("present", one.present), ("margin_A", one.summary()["margin_A"])):
            name = f"{one.name}.{key}"
            rows[name] = _row(name, checks[one.name].get(key), now)
    return rows
