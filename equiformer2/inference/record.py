"""What a relaxation or an adsorption calculation leaves in its output folder."""

import logging
from io import StringIO
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io import write

from datasets_oc20.untrusted import AnyPath
from equiformer2.errors import InputError
from equiformer2.files import write_bytes, write_json
from equiformer2.inference.adsorption import AdsorptionResult
from equiformer2.inference.atoms import ADSORBATE
from equiformer2.inference.pictures import relaxation_picture, structure_picture
from equiformer2.inference.predictor import Predictor
from equiformer2.inference.relaxation import RelaxationResult

logger = logging.getLogger(__name__)

ADSORPTION_RECORD = "adsorption_energy.json"
RELAXATION_RECORD = "relaxation.json"


def claim_folder(path: str | Path, record: str, overwrite: bool = False) -> Path:
    """The output folder of a new run; it is made when the run writes its first file.

    `record` is the last file a run writes, so a folder without one holds an unfinished run. An earlier
    record is removed with `overwrite`, since the new run's files would contradict it.

    Raises:
        InputError: the path is a file, or the folder already holds `record`.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the output")
    if (folder / record).exists():
        if not overwrite:
            raise InputError(f"{folder} already holds a result ({record}): give another folder, or overwrite")
        (folder / record).unlink()
    return folder


def write_adsorption_record(folder: AnyPath, result: AdsorptionResult, model: dict[str, Any]) -> list[Path]:
    """Relaxed structure, pictures and, last, `adsorption_energy.json`; returns the paths.

    Args:
        folder: existing folder.
        result: what was calculated.
        model: `model_record` of the model that calculated it.
    """
    folder = Path(folder)
    title = f"{_names(result)}: adsorption energy {result.energy:.3f} eV" + (
        "" if result.converged else " (not converged)"
    )
    label = "adsorption energy (eV)" if result.energy_kind == "adsorption" else "total energy (eV)"
    written = [
        _write_structure(folder / "relaxed.extxyz", result.system.atoms),
        write_bytes(
            folder / "structure.png",
            structure_picture({"start": result.initial, "relaxed": result.system.atoms}, title),
        ),
        write_bytes(folder / "relaxation.png", relaxation_picture(result.system, label)),
    ]
    files = [path.name for path in written] + ["relaxation.traj"]
    if result.slab is not None:
        files.append("slab.traj")
    written.append(
        write_json(folder / ADSORPTION_RECORD, {**result.summary(), "model": model, "files": files})
    )
    return written


def write_relaxation_record(
    folder: AnyPath, initial: Atoms, result: RelaxationResult, model: dict[str, Any]
) -> list[Path]:
    """Relaxed structure, pictures and, last, `relaxation.json`; returns the paths."""
    folder = Path(folder)
    kind = model["energy_kind"]
    title = f"{result.atoms.get_chemical_formula()}: {kind} energy {result.energy:.3f} eV"
    written = [
        _write_structure(folder / "relaxed.extxyz", result.atoms),
        write_bytes(
            folder / "structure.png", structure_picture({"start": initial, "relaxed": result.atoms}, title)
        ),
        write_bytes(folder / "relaxation.png", relaxation_picture(result, f"{kind} energy (eV)")),
    ]
    files = [path.name for path in written] + ["relaxation.traj"]
    record = {**result.summary(), "energy_kind": model["energy_kind"], "model": model, "files": files}
    written.append(write_json(folder / RELAXATION_RECORD, record))
    return written


def model_record(predictor: Predictor, path: str | Path) -> dict[str, Any]:
    """Which checkpoint and weights gave a result."""
    return {
        "checkpoint": str(path),
        "weights": predictor.checkpoint.weights,
        "energy_kind": predictor.energy_kind,
        "source_format": predictor.checkpoint.source_format,
    }


def adsorption_report(result: AdsorptionResult) -> str:
    """The result in plain words, for the terminal."""
    system = result.system
    lines = [
        f"{_names(result)} ({len(system.atoms)} atoms)",
        f"adsorption energy: {result.energy:.4f} eV",
    ]
    if result.energy_kind == "adsorption":
        lines.append(
            "  the model predicts adsorption energies: this is its energy of the relaxed system, "
            "nothing was subtracted"
        )
    else:
        gas = ", ".join(f"{symbol} {value:g}" for symbol, value in result.gas_references.items())
        lines += [
            "  the model predicts total energies:",
            f"    slab + adsorbate {result.terms['slab_and_adsorbate']:16.4f} eV",
            f"  - clean slab       {result.terms['slab']:16.4f} eV",
            f"  - gas references   {result.terms['gas']:16.4f} eV  (eV per atom: {gas})",
        ]
    for name, relaxation in (("slab + adsorbate", system), ("clean slab", result.slab)):
        if relaxation is not None:
            lines.append(f"{name}: {relaxation_report(relaxation)}")
    lines += anomaly_lines(result)
    return "\n".join(lines)


def anomaly_lines(result: AdsorptionResult) -> list[str]:
    """A WARNING per anomaly with its margin, and a note where an absent one is only just absent."""
    lines = []
    for verdict in result.anomaly_checks:
        if verdict.present:
            lines.append(f"WARNING: {verdict} [{verdict.name}, margin {verdict.margin:.3f} Å]")
        elif verdict.borderline:
            lines.append(f"note: {verdict} [not {verdict.name}, margin {verdict.margin:.3f} Å]")
    return lines


def relaxation_report(result: RelaxationResult) -> str:
    """Outcome of a relaxation in one line."""
    outcome = "converged" if result.converged else "NOT converged"
    return (
        f"{outcome} after {result.steps} {result.optimizer} steps, "
        f"largest force {result.max_force:.4f} eV/Å (threshold {result.fmax:g})"
    )


def _names(result: AdsorptionResult) -> str:
    slab = result.initial[result.initial.get_tags() != ADSORBATE]
    return f"{result.adsorbate_formula} on {slab.get_chemical_formula()}"


def _write_structure(path: Path, atoms: Atoms) -> Path:
    text = StringIO()
    plain = atoms.copy()
    plain.calc = atoms.calc
    plain.info.pop("adsorbate_info", None)  # ASE's note on sites, which extxyz cannot hold
    _name_lost_constraints(path, atoms)
    write(text, plain, format="extxyz")
    return write_bytes(path, text.getvalue().encode())


def _name_lost_constraints(path: Path, atoms: Atoms) -> None:
    """Warn which constraints `path` cannot hold: extxyz has a column for held atoms and directions alone."""
    lost = [c for c in atoms.constraints if not isinstance(c, FixAtoms | FixCartesian)]
    if not lost:
        return
    # ASE's trajectory keeps the constraints only if every one of them can describe itself.
    kept = all(hasattr(constraint, "todict") for constraint in atoms.constraints)
    where = "relaxation.traj keeps them" if kept else "relaxation.traj cannot keep them either: set them again"
    names = ", ".join(sorted({type(constraint).__name__ for constraint in lost}))
    logger.warning(f"{path.name} holds fixed atoms only and not the constraints {names}; {where}")
