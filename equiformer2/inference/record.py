"""Output folder of a relaxation: record, relaxed structure, trajectory, pictures."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixConstraint
from ase.io import write
from ase.io.trajectory import Trajectory

from datasets_oc20.untrusted import AnyPath
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.checkpoint.training_data import validation_errors
from equiformer2.errors import InputError
from equiformer2.files import check_target, write_bytes, write_json
from equiformer2.inference.atoms import fixed_mask, partial_constraints
from equiformer2.inference.committee import Committee, open_model
from equiformer2.inference.extras import extras, simple_info
from equiformer2.inference.familiarity import combined
from equiformer2.inference.meaning import warning_for
from equiformer2.inference.pictures import relaxation_picture, structure_picture
from equiformer2.inference.predictor import Predictor
from equiformer2.inference.relaxation import DRAFT_TRAJECTORY, WRITER, RelaxationResult
from equiformer2.script import header
from equiformer2.shipped import find_checkpoint

logger = logging.getLogger(__name__)

ADSORPTION_RECORD = "adsorption_energy.json"
RELAXATION_RECORD = "relaxation.json"
TRAJECTORY = "relaxation.traj"
RUN_FILES = (
    *(ADSORPTION_RECORD, RELAXATION_RECORD, TRAJECTORY),
    *(DRAFT_TRAJECTORY, "slab.traj", "relaxed.extxyz", "structure.png", "relaxation.png"),
)
"""Files that `equiformer2 relax` and `equiformer2 adsorption energy` write into a folder."""


def claim_folder(
    path: str | Path,
    record: str,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
    others: Sequence[str] = (),
) -> Path:
    """The output folder of a new run; it is made when the run writes its first file.

    `record` is the last file a run writes, so a folder without one holds an unfinished run, which is begun
    again. An earlier record is removed with `overwrite`, since the new run's files would contradict it.

    Args:
        path: the folder.
        record: the JSON file that a run writes last.
        overwrite: replace what is there.
        inputs: files that the run reads, none of which it may replace.
        others: further files that it writes, and the records of other runs that write them.

    Raises:
        InputError: the path is a file, the folder already holds a result or files of somebody else, or a file
            that the run would write is one of `inputs`.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for the output")
    files = list(dict.fromkeys((record, *others)))
    for name in files:
        check_target(folder / name, inputs=inputs)
    there = [name for name in files if os.path.lexists(folder / name)]
    records = [name for name in there if name.endswith(".json")]
    if records and not overwrite:
        raise InputError(
            f"{folder} already holds a result ({records[0]}): give another folder, or --overwrite"
        )
    unfinished = any(_is_unfinished(folder / name) for name in (TRAJECTORY, DRAFT_TRAJECTORY))
    if there and not records and not overwrite and not unfinished:
        check_target(folder / there[0], overwrite=False)
    for name in records:
        (folder / name).unlink()
    return folder


def _is_unfinished(trajectory: Path) -> bool:
    """Tell whether a run of this package left the file, rather than somebody else."""
    if not trajectory.is_file():
        return False
    if trajectory.stat().st_size == 0:  # nothing is lost with it
        return True
    try:
        with Trajectory(str(trajectory)) as frames:
            # Version 0.1 wrote no description.
            ours = getattr(frames[0].calc, "name", None) == "equiformerv2calculator"
            return ours or (frames.description or {}).get("writer") == WRITER["writer"]
    except Exception:  # whatever ASE raises for bytes that are no trajectory
        return False


def write_relaxation_record(
    folder: AnyPath,
    initial: Atoms,
    result: RelaxationResult,
    model: dict[str, Any],
    draft: dict[str, Any] | None = None,
) -> list[Path]:
    """Relaxed structure, pictures and, last, `relaxation.json`; returns the paths.

    What else `initial` carries (`info`, further arrays) is under `extras` in the JSON (`inference.extras`).

    Args:
        folder: existing folder.
        initial: the structure as it was given.
        result: its relaxation.
        model: `model_record`, or that of another calculator; `energy_kind` is in it.
        draft: `draft_record` of the relaxation that came first.
    """
    folder = Path(folder)
    kind = model["energy_kind"]
    warning = warning_for(initial, kind)
    name = "model output, no adsorption energy" if warning else f"{kind} energy"
    title = f"{result.atoms.get_chemical_formula()}: {name} {result.energy:.3f} eV" + (
        "" if result.converged else " (not converged)"
    )
    written = [
        write_structure(folder / "relaxed.extxyz", result.atoms),
        *write_pictures(folder, initial, result, title, f"{name} (eV)"),
    ]
    files = [path.name for path in written] + ["relaxation.traj"]
    moved_first: dict[str, Any] = {}
    if draft is not None:
        moved_first = {"draft": draft}
        if draft["used"]:  # the full model has not seen the start as it was given
            files.append(DRAFT_TRAJECTORY)
            moved_first |= {"initial_energy_eV": None, "drafted_energy_eV": result.energies[0]}
    record = {
        **header("relaxation/1", model.get("checkpoint")),
        **result.summary(),
        **moved_first,
        "energy_kind": kind,
        "warnings": [] if warning is None else [warning],
        "model": model,
        "files": files,
        "extras": extras(initial),
    }
    written.append(write_json(folder / RELAXATION_RECORD, record))
    return written


def model_record(
    predictor: Predictor | Committee,
    path: str | Path | Sequence[str | Path],
    structures: Sequence[Atoms] = (),
) -> dict[str, Any]:
    """Checkpoint and weights behind a result, and what of its structures these were not trained on.

    Args:
        predictor: of the checkpoint, or a committee.
        path: of the checkpoint, or the paths of the committee's.
        structures: states of the structure that the result is about, such as both ends of a relaxation; what
            the training data lack of them is under `familiarity` (see `familiarity.Judgement`).
    """
    record: dict[str, Any] = {
        "checkpoint": str(path) if isinstance(path, str | Path) else [str(one) for one in path],
        **adapter_record(predictor),
        "weights": predictor.checkpoint.weights,
        "precision": predictor.precision,
        "energy_kind": predictor.energy_kind,
        "source_format": predictor.checkpoint.source_format,
        "unseen_elements": predictor.unseen_elements,
        "validation": validation_errors(predictor.checkpoint.provenance),
    }
    if structures:
        record["familiarity"] = combined(predictor.judge(list(structures))).record()
    return record


def adapter_record(predictor: Predictor | Committee) -> dict[str, Any]:
    """Name the adapter file of a network, or of a committee of twins; nothing without one."""
    members = predictor.members if isinstance(predictor, Committee) else [predictor]
    adapter = members[0].adapter
    if adapter is None:
        return {}
    is_file = Path(adapter.source).is_file()
    return {"adapter": adapter.source, "adapter_sha256": sha256(adapter.source) if is_file else None}


def recorded_model(record: Mapping[str, Any]) -> Predictor | Committee:
    """Open the network, or the committee, that `model_record` describes, on the CPU.

    Raises:
        InputError: it names no checkpoint, or one that is missing or cannot be used.
    """
    files = record.get("checkpoint")
    if not files:
        raise InputError("the record names no checkpoint: give the model again")
    if isinstance(files, str):
        files = [files]
    precisions = record.get("precision") or "float32"
    if isinstance(precisions, str):
        precisions = [precisions] * len(files)
    # The members of a committee may hold other kinds of weights; only those of the first are recorded.
    weights = record.get("weights") if len(files) == 1 else None
    kind, adapter = record.get("energy_kind"), record.get("adapter")
    return open_model(
        [
            Predictor(
                find_checkpoint(str(file)),
                weights=weights,
                energy_kind=kind,
                precision=str(precision),
                adapter=None if adapter is None else str(adapter),
            )
            for file, precision in zip(files, precisions, strict=True)
        ]
    )


def given_or_recorded(record: Mapping[str, Any], given: Any = None, adapter: AnyPath | None = None) -> Any:
    """The model of a record, with the files that are given in place of its own.

    Args:
        record: of `model_record`, or of a calculator.
        given: model in place of it, of any kind; a checkpoint in place of a checkpoint is opened with the
            weights, the precision and the adapter of the record. None for the checkpoint of the record.
        adapter: adapter file in place of the record's.

    Raises:
        InputError: as `recorded_model`, or an adapter of another network.
    """
    is_checkpoint = isinstance(given, str | Path) and isinstance(record.get("checkpoint"), str)
    if given is not None and not is_checkpoint:
        return given
    files = {"checkpoint": None if given is None else str(given), "adapter": adapter}
    return recorded_model({**record, **{name: file for name, file in files.items() if file is not None}})


def draft_record(path: AnyPath, draft: RelaxationResult | None) -> dict[str, Any]:
    """Describe the relaxation that a cheaper network did first.

    Args:
        path: its checkpoint.
        draft: the relaxation; None if it failed.
    """
    record: dict[str, Any] = {"checkpoint": str(path), "checkpoint_sha256": sha256(path), "used": False}
    if draft is None:
        return record
    return {
        **record,
        "used": True,
        "steps": draft.steps,
        "converged": draft.converged,
        "model_evaluations": draft.evaluations,
        "max_force_eV_A": draft.max_force,
    }


def write_structure(path: AnyPath, atoms: Atoms) -> Path:
    """Extended XYZ of what is ours: structure, tags, held atoms, energy and forces, and simple notes beside.

    Arrays and notes under the names of results would replace them, and others cannot be written at all.
    """
    ours = Atoms(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell,
        pbc=atoms.pbc,
        tags=atoms.get_tags(),
        constraint=_constraints_by_mask(atoms),
        info=simple_info(atoms),
    )
    for name in ("initial_magmoms", "initial_charges"):
        if atoms.has(name):
            ours.set_array(name, atoms.get_array(name))
    results = {name: atoms.calc.results[name] for name in ("energy", "forces")}
    ours.calc = SinglePointCalculator(ours, **results)
    text = StringIO()
    write(text, ours, format="extxyz")
    return write_bytes(path, text.getvalue().encode())


def _constraints_by_mask(atoms: Atoms) -> list[FixConstraint]:
    """Constraints that extended XYZ can hold: atoms held in all or in some Cartesian directions."""
    held, others = fixed_mask(atoms), partial_constraints(atoms)
    kept: list[FixConstraint] = [FixAtoms(mask=held)] if held.any() else []
    kept += [one for one in others if isinstance(one, FixCartesian)]
    partial = {type(one).__name__ for one in others if not isinstance(one, FixCartesian)}
    if partial:
        # ASE's trajectory keeps the constraints only if every one of them can describe itself.
        described = all(hasattr(one, "todict") for one in atoms.constraints)
        logger.warning(
            f"relaxed.extxyz cannot hold {', '.join(sorted(partial))}: "
            + ("relaxation.traj has all constraints" if described else "nor can relaxation.traj")
        )
    return kept


def write_pictures(
    folder: AnyPath, initial: Atoms, relaxation: RelaxationResult, title: str, energy_label: str
) -> list[Path]:
    """`structure.png` and `relaxation.png`; one that cannot be drawn is named in the log and left out."""
    folder, written = Path(folder), []
    drawings: dict[str, Callable[[], bytes]] = {
        "structure.png": lambda: structure_picture({"start": initial, "relaxed": relaxation.atoms}, title),
        "relaxation.png": lambda: relaxation_picture(relaxation, energy_label),
    }
    for name, draw in drawings.items():
        try:
            picture = draw()
        except Exception as error:  # drawing must not cost the result; what Matplotlib raises is of any kind
            logger.warning(f"{folder / name} could not be drawn ({error})")
            continue
        written.append(write_bytes(folder / name, picture))
    return written
