"""Trust card of an adsorption energy: what it is, what it rests on, and how to check it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from datasets_oc20 import untrusted
from datasets_oc20.errors import DataError
from datasets_oc20.structure_files import read_structure
from datasets_oc20.untrusted import AnyPath
from equiformer2.adsorption.anomalies import check_anomalies
from equiformer2.adsorption.coverage_rows import Species
from equiformer2.adsorption.dispersion_terms import SLAB as D3_SLAB
from equiformer2.adsorption.neb import EnergyPath
from equiformer2.adsorption.search_folder import CLEAN_SLAB, SEARCH, TRAJECTORIES
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, read_json
from equiformer2.inference.atoms import ADSORBATE, fixed_mask
from equiformer2.inference.dispersion import (
    Dispersion,
    DispersionEngine,
    recorded_dispersion,
    with_dispersion,
)
from equiformer2.inference.engines import Engine, Engineable, NetworkEngine, open_engine
from equiformer2.inference.familiarity import combined
from equiformer2.inference.many import predict
from equiformer2.inference.record import adapter_record, given_or_recorded
from equiformer2.shipped import find_checkpoint

#: Elements whose magnetism OC20's calculations leave out.
MAGNETIC = ("Cr", "Mn", "Fe", "Co", "Ni")
#: Elements whose oxides need a +U, which OC20 leaves out (Materials Project's list).
CORRELATED = ("V", "Cr", "Mn", "Fe", "Co", "Ni", "Mo", "W")
_OC20 = "OC20: VASP, RPBE, without spin polarisation, +U, dispersion, solvent and zero-point energy"
#: eV and eV/Å; other processors and numbers of threads change sums in the last digits.
SAME_ENERGY, SAME_FORCE = 1e-3, 5e-3
#: Times as much for a network in bfloat16: a change of the positions by 1e-8 Å, as when they are written into
#: a file, moves energies by 1 meV and forces by 5 meV/Å (`oc20_small`, 37 atoms).
_ROUNDED = 10.0
_GIVE = "give the card.json of a search, a coverage series or a path"
CLEAN = "clean_slab"
"""Name of the clean slab among the structures of a card."""


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
        path: the card; its structure, or structures of a coverage series or a path, lie beside it.
        model: the model; None for the checkpoint that the card names.
        adapter: adapter file in place of the one that the card names.

    Returns:
        By field `card`, `now` and `ok`: equal, or for numbers within `SAME_ENERGY` (also of Å) or
        `SAME_FORCE`, and within ten times as much where a network computes in bfloat16. Energy and forces are
        the model's of the structure, from which the adsorption energy follows with the terms of the card.
        What lies beside the card is compared, too: the energy of the clean slab, the verdicts and margins of
        anomalies, and the record of the search.

    Raises:
        InputError: not a card, a structure or a checkpoint that is missing or cannot be read.
    """
    path = Path(path)
    try:
        card = untrusted.read_json(path)
    except DataError as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise InputError(f"{path} is no trust card ({reason}): {_GIVE}") from error
    if isinstance(card, dict) and isinstance(card.get("structures"), list):
        return _rounded(card, _verify_structures(path, card, model, adapter))
    expected = card.get("verifiable") if isinstance(card, dict) else None
    if not isinstance(expected, dict) or not isinstance(card.get("structure"), str):
        raise InputError(f"{path} is no trust card: {_GIVE}")
    file = path.parent / Path(card["structure"]).name
    clean_file = path.parent / CLEAN_SLAB
    with as_input_error():
        atoms = read_structure(file)
        clean = read_structure(clean_file) if clean_file.is_file() else None
    engine, dispersion = _opened(path, card, model, adapter)
    (now,) = predict([atoms], engine)
    terms = _numbers(path, card.get("terms_eV"))
    energy = float(now.get_potential_energy(apply_constraint=False))
    fields = {
        "structure_sha256": sha256(file),
        "model_energy_eV": energy,
        "max_force_eV_A": _largest_force(now),
        "adsorption_energy_eV": energy - sum(terms.values()),
    }
    expected = {**expected, "adsorption_energy_eV": card.get("adsorption_energy_eV")}
    sums, known_sums = _sums_of_files(card, model, adapter)
    fields, expected = {**fields, **sums}, {**expected, **known_sums}
    rows = {name: _row(name, expected.get(name), fields.get(name)) for name in {**fields, **expected}}
    search = read_json(path.parent / SEARCH) if (path.parent / SEARCH).is_file() else None
    rows |= _rows_of_terms(card, terms, atoms, search)
    if clean is not None:
        rows |= _rows_of_slab(terms, clean, engine, dispersion)
        if rows["structure_sha256"]["ok"]:  # the verdicts are about this structure alone
            rows |= _rows_of_anomalies(path.parent, card, atoms, clean, search)
    return _rounded(card, rows)


def card_structure(name: str, atoms: Atoms, file: AnyPath, frame: int = -1) -> dict[str, Any]:
    """Describe a structure for a card of several structures, with what `verify_card` recomputes.

    Args:
        name: unique in the card.
        atoms: with energy and forces, and the spread of a committee in `info`.
        file: that holds it, in the folder of the card.
        frame: of the file.
    """
    return {
        "name": name,
        "file": Path(file).name,
        "frame": frame,
        "file_sha256": sha256(file),
        "model_energy_eV": float(atoms.get_potential_energy(apply_constraint=False)),
        "max_force_eV_A": _largest_force(atoms),
        "energy_std_eV": atoms.info.get("energy_std_eV"),
        "max_force_std_eV_A": atoms.info.get("max_force_std_eV_A"),
    }


def engine_record(engine: Engine, model: Mapping[str, Any], structures: Sequence[Atoms]) -> dict[str, Any]:
    """Record of a search's model for other structures: what its training data lack of these.

    Args:
        engine: the model.
        model: its record in the search.
        structures: those that a result is about.
    """
    network = engine.base if isinstance(engine, DispersionEngine) else engine
    if not isinstance(network, NetworkEngine):
        return dict(model)
    judged = combined(network.predictor.judge(list(structures))).record()
    return {
        **model,
        **adapter_record(network.predictor),
        "unseen_elements": network.predictor.unseen_elements,
        "familiarity": judged,
    }


def path_card(
    path: EnergyPath,
    search: Mapping[str, Any],
    engine: Engine,
    checkpoint: str | list[str] | None,
    file: AnyPath,
) -> dict[str, Any]:
    """Trust card of a path between two minima.

    Args:
        path: with energies and forces of all images.
        search: record of the search whose minima it joins.
        engine: the model.
        checkpoint: its file or files; None for a calculator.
        file: that holds the images.
    """
    model = {**(search.get("model") or {}), "checkpoint": checkpoint}
    highest = path.images[int(path.energies.argmax())]
    d3 = search.get("d3_eV") or {}
    kept = ("barrier_eV", "reverse_barrier_eV", "reaction_energy_eV", "intermediate_minima", "converged")
    summary = path.summary()
    return {
        **{name: summary[name] for name in kept},
        "energy_kind": search.get("energy_kind"),
        "d3_eV": {key: d3[key] for key in ("functional", "damping") if key in d3} or None,
        "label_physics": label_physics(highest, search.get("energy_kind"), provenance_of(engine)),
        "warnings": path.warnings,
        # The ends and the image that the barrier rests on.
        "model": engine_record(engine, model, [path.images[0], highest, path.images[-1]]),
        "structures": [
            card_structure(f"image_{number}", image, file, number) for number, image in enumerate(path.images)
        ],
    }


def provenance_of(engine: Engine) -> Mapping[str, Any] | None:
    """Provenance of the checkpoint behind an engine; None for a calculator."""
    network = engine.base if isinstance(engine, DispersionEngine) else engine
    return network.predictor.provenance if isinstance(network, NetworkEngine) else None


def _largest_force(atoms: Atoms) -> float:
    """Largest force on a free atom, eV/Å."""
    forces = atoms.get_forces(apply_constraint=False)[~fixed_mask(atoms)]
    return float(np.linalg.norm(forces, axis=1).max(initial=0.0))


def _opened(
    path: Path, card: Mapping[str, Any], model: Engineable | None, adapter: AnyPath | None
) -> tuple[Engine, Dispersion | None]:
    """The model of a card, or the one that is given for it, with the card's D3."""
    record = card.get("model") or {}
    if model is None and record.get("checkpoint") is None:
        raise InputError(f"{path} names no checkpoint: give the calculator with which it was made")
    given = given_or_recorded(record, model, adapter)
    dispersion = recorded_dispersion(card.get("d3_eV"))
    return open_engine(with_dispersion(given, dispersion)), dispersion


def _sums_of_files(
    card: Mapping[str, Any], model: Engineable | None, adapter: AnyPath | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """SHA-256 of the files of the model now, and those of the card."""
    files: Any = card["model"].get("checkpoint") if model is None else model
    if card.get("checkpoint_sha256") is None or not isinstance(files, str | list):
        return {}, {}
    sums = [sha256(find_checkpoint(str(file))) for file in ([files] if isinstance(files, str) else files)]
    now = {"checkpoint_sha256": sums[0] if isinstance(files, str) else sums}
    known = {"checkpoint_sha256": card["checkpoint_sha256"]}
    of_adapter = adapter or card["model"].get("adapter")
    if of_adapter is not None:
        now["adapter_sha256"] = sha256(of_adapter)
        known["adapter_sha256"] = card["model"].get("adapter_sha256")
    return now, known


def _verify_structures(
    path: Path, card: Mapping[str, Any], model: Engineable | None, adapter: AnyPath | None
) -> dict[str, dict[str, Any]]:
    """Recompute the card of a coverage series or a path: see `verify_card`."""
    keys = {"name": str, "file": str, "frame": int, "model_energy_eV": float, "max_force_eV_A": float}
    entries = card["structures"]
    if not entries or not all(
        isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in keys.items())
        for one in entries
    ):
        raise InputError(f"{path} is broken: its structures have no names, files and energies")
    files = [path.parent / Path(one["file"]).name for one in entries]
    with as_input_error():
        atoms = [read_structure(file, one["frame"]) for file, one in zip(files, entries, strict=True)]
    engine, _ = _opened(path, card, model, adapter)
    sums, known_sums = _sums_of_files(card, model, adapter)
    rows = {name: _row(name, known_sums[name], now) for name, now in sums.items()}
    for file in dict.fromkeys(files):
        known = next(one.get("file_sha256") for one in entries if Path(one["file"]).name == file.name)
        rows[f"{file.name}.sha256"] = _row("sha256", known, sha256(file))
    energies: dict[str, float] = {}
    for one, now in zip(entries, predict(atoms, engine), strict=True):
        energies[one["name"]] = float(now.get_potential_energy(apply_constraint=False))
        found = {"model_energy_eV": energies[one["name"]], "max_force_eV_A": _largest_force(now)}
        rows |= {f"{one['name']}.{key}": _row(key, one[key], value) for key, value in found.items()}
    rows |= _rows_of_path(card, energies) if "barrier_eV" in card else _rows_of_series(path, card, energies)
    return rows


def _rows_of_path(card: Mapping[str, Any], energies: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Compare the barriers of a path with those of its energies now."""
    values = np.array(list(energies.values()))
    now = EnergyPath([], values - values[0], True, 0.0, 0, 0)
    found = {"barrier_eV": now.barrier, "reverse_barrier_eV": now.reverse_barrier}
    found["reaction_energy_eV"] = float(now.energies[-1])
    return {name: _row(name, card.get(name), value) for name, value in found.items()}


def _rows_of_series(
    path: Path, card: Mapping[str, Any], energies: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Compare the energies of a coverage series with those that follow from its structures now."""
    terms, rows = _numbers(path, card.get("terms_eV")), {}
    if CLEAN in energies:
        rows["terms_eV.slab"] = _row("slab_eV", terms.get("slab"), energies[CLEAN])
    for one in card.get("coverages") or []:
        count, total = one.get("molecules"), one.get("total_adsorption_energy_eV")
        name = Path(str(one.get("file"))).stem
        if total is not None and name in energies:
            numbers = one.get("composition") or {"": count}
            gas = Species(tuple(numbers)).gas_energy(numbers, terms)
            now = energies[name] - terms.get("slab", 0.0) - gas
            rows[f"{name}.total_adsorption_energy_eV"] = _row("eV", total, now)
            average = one.get("average_adsorption_energy_eV")
            rows[f"{name}.average_adsorption_energy_eV"] = _row("eV", average, now / count)
    return rows


def _row(name: str, card: Any, now: Any, times: float = 1.0) -> dict[str, Any]:
    """Compare a value of a card with the one that was computed again."""
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (card, now))
    tolerance = times * (SAME_FORCE if name.endswith("eV_A") else SAME_ENERGY)
    return {"card": card, "now": now, "ok": bool(abs(card - now) <= tolerance if numbers else card == now)}


def _rounded(card: Mapping[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compare again what a network in bfloat16 has computed, with wider tolerances; rows of files stay."""
    precision = (card.get("model") or {}).get("precision")
    if "bf16" not in (precision if isinstance(precision, list) else [precision]):
        return rows

    def again(name: str, row: dict[str, Any]) -> dict[str, Any]:
        of_files = name.startswith("search.") or name.endswith("margin_A")
        return row if of_files else _row(name, row["card"], row["now"], _ROUNDED)

    return {name: again(name, row) for name, row in rows.items()}


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
