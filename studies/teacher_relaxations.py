"""Relaxations of unseen systems with checkpoints, against the teacher's own from the same start structures.

    python -m studies.teacher_relaxations --checkpoints models/study_teacher.pt oc20_small

Starts are the first frames of systems of data/teacher_large/test, chosen by seed: bulk formulas in random
order, one system of each. Both sides relax with the same optimizer (L-BFGS, steps of at most 0.04 Å),
threshold and number of steps. The teacher's ends are in `--relaxed`, a raw folder of the project.
Where the package `sevenn` is installed, the teacher's energies of the checkpoints' ends are computed, and the
folder is made where it is missing; without it only what needs no teacher is reported.

The numbers, per checkpoint:

- energy difference: the teacher's energy of the checkpoint's end minus that of its own end, eV. Negative
  where the checkpoint found the lower minimum.
- adsorbate RMSD: root mean square distance of the adsorbate's atoms of the two ends, to the nearest periodic
  image, atom by atom: exchanged atoms of one element count as moved. Å.
- in the teacher's basin: an RMSD below 0.2 Å and an energy difference below 0.1 eV in size.
- converged: no force of the checkpoint on a free atom reaches `--fmax` within `--steps` steps.
- error of the adsorption energy: the checkpoint's energy of its end minus the teacher's of its own end, eV.

`not relaxed` is the start structure itself. A stopped command goes on where it was (`--runs`).
"""

import argparse
import dataclasses
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.geometry import find_mic
from ase.io import Trajectory
from matplotlib.figure import Figure
from torch_geometric.data import Batch, Data
from tqdm import tqdm

from datasets_oc20 import DataError
from datasets_oc20.extxyz import RawFrame, read_frames
from datasets_oc20.raw_release import read_references
from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference import Predictor
from equiformer2.inference.batched import Predict, RelaxationSettings, free_forces, relax_batched
from equiformer2.inference.relaxation_folder import RelaxationFolder
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from equiformer2.training.figures import save_figure
from studies.make_teacher_data import label, raw_text, sevennet
from studies.study_data import System, read_index
from studies.study_errors import LARGE, cell, table

SCHEMA = "teacher_relaxations/1"
#: The teacher's basin: largest RMSD of the adsorbate (Å) and difference of the energy (eV).
MAX_RMSD = 0.2
MAX_ENERGY = 0.1
NOT_RELAXED = "not relaxed"
#: Rows of the table: key, title, digits.
ROWS = (
    ("energy_difference_eV", "mean energy difference (eV)", 3),
    ("energy_difference_size_eV", "mean size of the energy difference (eV)", 3),
    ("energy_difference_median_eV", "median of the energy difference (eV)", 3),
    ("rmsd_A", "mean RMSD of the adsorbate (Å)", 3),
    ("rmsd_median_A", "median RMSD of the adsorbate (Å)", 3),
    ("near_share", "RMSD below 0.2 Å (share)", 2),
    ("basin_share", "in the teacher's basin (share)", 2),
    ("converged_share", "converged (share)", 2),
    ("steps", "mean number of steps", 1),
    ("energy_error_eV", "mean size of the error of the adsorption energy (eV)", 3),
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Start:
    """A start structure.

    Attributes:
        system: its line of the index.
        frame: the structure, with the teacher's total energy.
        reference: eV, subtracted from total energies.
    """

    system: System
    frame: RawFrame
    reference: float

    def data(self) -> Data:
        """Convert to a data object without targets."""
        frame = self.frame
        return Data(
            pos=torch.tensor(frame.pos, dtype=torch.float64),
            atomic_numbers=torch.as_tensor(frame.atomic_numbers, dtype=torch.long),
            cell=torch.tensor(frame.cell, dtype=torch.float64).view(1, 3, 3),
            pbc=torch.as_tensor(frame.pbc, dtype=torch.bool).view(1, 3),
            natoms=len(frame.atomic_numbers),
            tags=torch.as_tensor(frame.tags, dtype=torch.long),
            fixed=torch.as_tensor(frame.fixed),
            sid=self.system.sid,
            fid=0,
        )

    def atoms(self, positions: np.ndarray) -> Atoms:
        """The structure with other positions `[N, 3]` Å."""
        frame = self.frame
        return Atoms(
            frame.atomic_numbers, positions=positions, cell=frame.cell, pbc=frame.pbc, tags=frame.tags
        )

    def rmsd(self, first: np.ndarray, second: np.ndarray) -> float:
        """Root mean square distance of the adsorbate's atoms in two structures `[N, 3]` Å, nearest images."""
        adsorbate = self.frame.tags == 2
        moved, _ = find_mic((first - second)[adsorbate], self.frame.cell, self.frame.pbc)
        return float(np.sqrt((moved**2).sum(axis=1).mean()))


@dataclasses.dataclass(frozen=True)
class End:
    """The end of a relaxation.

    Attributes:
        positions: `[N, 3]` Å.
        energy: adsorption energy of the potential that relaxed, eV.
        converged: True if it reached the threshold.
        steps: number of steps.
    """

    positions: np.ndarray
    energy: float
    converged: bool
    steps: int


def choose(systems: Sequence[System], count: int, seed: int) -> list[System]:
    """Choose systems spread over bulks: formulas in random order, in each round one more system of each.

    Args:
        systems: those of a part of the data.
        count: number of systems.
        seed: random seed.

    Raises:
        InputError: there are fewer systems.
    """
    if count > len(systems):
        raise InputError(f"--systems is {count}, but the data hold {len(systems)}: give at most as many")
    rng = np.random.default_rng(seed)
    by_bulk: dict[str, list[System]] = {}
    for system in sorted(systems, key=lambda system: (system.bulk, system.sid)):
        by_bulk.setdefault(system.bulk, []).append(system)
    shuffled = {bulk: [group[at] for at in rng.permutation(len(group))] for bulk, group in by_bulk.items()}
    order = [list(shuffled)[at] for at in rng.permutation(len(shuffled))]
    rounds = max(len(group) for group in shuffled.values())
    ordered = [shuffled[bulk][turn] for turn in range(rounds) for bulk in order if turn < len(shuffled[bulk])]
    return ordered[:count]


def read_starts(folder: Path, systems: Sequence[System]) -> list[Start]:
    """Read the first frames of systems of a raw folder."""
    references = read_references(folder)
    starts = []
    for system in systems:
        if system.sid not in references:
            raise DataError(f"{folder / 'system.txt'}: there is no reference energy for {system.sid}.")
        frame = next(read_frames(folder / f"{system.sid}.extxyz.xz"))
        starts.append(Start(system, frame, references[system.sid]))
    return starts


def teacher_predict(calculator: Calculator, references: Mapping[str, float]) -> Predict:
    """Energies and forces of an ASE calculator for batched relaxations.

    Args:
        calculator: of total energies.
        references: energy that is subtracted, by `sid`, eV.
    """

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        energies, forces = [], []
        for data in batch.to_data_list():
            atoms = Atoms(
                data.atomic_numbers.numpy(),
                positions=data.pos.numpy(),
                cell=data.cell.view(3, 3).numpy(),
                pbc=data.pbc.view(3).numpy(),
            )
            frame = label(atoms, calculator)
            energies.append(frame.energy - references[str(data.sid)])
            forces.append(torch.as_tensor(frame.forces, dtype=torch.float32))
        return {"energy": torch.tensor(energies, dtype=torch.float64), "forces": torch.cat(forces)}

    return predict


def relax_starts(
    predict: Predict,
    starts: Sequence[Start],
    settings: RelaxationSettings,
    folder: Path,
    asked: Mapping[str, Any],
    batch_size: int,
) -> dict[str, End]:
    """Relax the starts into a folder, in which a stopped run goes on.

    Args:
        predict: energies and forces.
        starts: the structures.
        settings: of the relaxations.
        folder: for finished relaxations.
        asked: everything that tells these relaxations from others.
        batch_size: number of structures per batch.

    Returns:
        End by `sid`; a structure that cannot be relaxed has none.
    """
    relaxations = RelaxationFolder(folder, {**asked, **dataclasses.asdict(settings)})
    with relaxations.open():

        def missing() -> Iterator[tuple[int, Data]]:
            for index, start in enumerate(starts):
                if index in relaxations.rows:
                    relaxations.check_start(index, start.data())
                else:
                    yield index, start.data()

        with tqdm(
            total=len(starts),
            initial=sum(index < len(starts) for index in relaxations.rows),
            desc=folder.name,
            unit="system",
        ) as progress:
            for relaxed in relax_batched(predict, missing(), settings, batch_size=batch_size):
                if relaxed.frames:
                    relaxations.add(relaxed, {})
                else:
                    relaxations.skip(relaxed.index, relaxed.name, str(relaxed.failure))
                progress.update()
        # Systems of a call that asked for more of them stay in the folder.
        rows = {index: row for index, row in relaxations.rows.items() if index < len(starts)}
    ends = {}
    for row in rows.values():
        with Trajectory(str(folder / "trajectories" / f"{row['sid']}.traj")) as frames:
            positions = frames[-1].get_positions()
        ends[str(row["sid"])] = End(positions, row["energy"], bool(row["converged"]), int(row["steps"]))
    return ends


def write_ends(
    folder: Path,
    starts: Sequence[Start],
    ends: Mapping[str, End],
    teacher: Calculator,
    settings: RelaxationSettings,
) -> None:
    """Write the teacher's ends as a raw folder; its `index.jsonl` comes last and has the steps."""
    lines, references = [], []
    for start in starts:
        system, end = start.system, ends[start.system.sid]
        atoms = start.atoms(np.round(end.positions, 6))
        frame = label(atoms, teacher)
        packed = lzma.compress(raw_text(atoms, [frame]).encode(), preset=9)
        write_bytes(folder / f"{system.sid}.extxyz.xz", packed, make_folder=True)
        references.append(f"{system.sid},{start.reference:.6f}\n")
        entry: Row = {"sid": system.sid, "bulk": system.bulk, "mpid": system.mpid, "ads": system.adsorbate}
        entry |= {"frames": 1, "driven": "teacher", "steps": end.steps, "converged": end.converged}
        entry |= {"fmax_eV_A": settings.fmax, "max_steps": settings.steps}
        lines.append(json.dumps(entry) + "\n")
    write_bytes(folder / "system.txt", "".join(references).encode())
    write_bytes(folder / "index.jsonl", "".join(lines).encode())


def read_ends(folder: Path, starts: Sequence[Start], settings: RelaxationSettings) -> dict[str, End] | None:
    """Read the teacher's ends by `sid`; None where there is no such folder.

    Raises:
        InputError: the folder has other systems, or relaxations of another threshold or number of steps.
        DataError: a file is damaged.
    """
    path = folder / "index.jsonl"
    if not path.is_file():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        entries = {line["sid"]: (bool(line["converged"]), int(line["steps"])) for line in lines}
        made = {(float(line["fmax_eV_A"]), int(line["max_steps"])) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error!r}; expected sid, converged and steps on every line.") from error
    missing = next((start.system.sid for start in starts if start.system.sid not in entries), None)
    if missing is not None:
        raise InputError(
            f"{folder} does not hold {missing}: it is of another --data, --systems or --seed; use those, or "
            "give another folder to --relaxed"
        )
    if made != {(settings.fmax, settings.steps)}:
        fmax, steps = made.pop()
        raise InputError(
            f"{folder} holds relaxations until {fmax} eV/Å or {steps} steps: use --fmax {fmax} and --steps "
            f"{steps}, or give another folder to --relaxed"
        )
    references = read_references(folder)
    ends = {}
    for start in starts:
        sid = start.system.sid
        frame = next(read_frames(folder / f"{sid}.extxyz.xz"))
        if not np.array_equal(frame.atomic_numbers, start.frame.atomic_numbers):
            raise DataError(f"{folder / sid}.extxyz.xz: its atoms are not those of the start structure.")
        ends[sid] = End(frame.pos, frame.energy - references[sid], *entries[sid])
    return ends


def teacher_energies(
    starts: Sequence[Start], ends: Mapping[str, End], teacher: Calculator | None, stored: Path
) -> dict[str, float]:
    """Teacher's adsorption energies of a checkpoint's ends, eV, by `sid`; kept in a file.

    Args:
        starts: the systems.
        ends: of the checkpoint.
        teacher: None where it is not installed: what the file has is returned.
        stored: file.
    """
    known: dict[str, float] = read_json(stored)["energies_eV"] if stored.is_file() else {}
    if teacher is None:
        return known
    for start in tqdm(starts, desc="teacher's energies", unit="system"):
        sid = start.system.sid
        if sid in ends and sid not in known:
            known[sid] = label(start.atoms(ends[sid].positions), teacher).energy - start.reference
            write_json(stored, {"energies_eV": known}, make_folder=True)
    return known


def compare(
    starts: Sequence[Start],
    ends: Mapping[str, End],
    teacher_ends: Mapping[str, End],
    energies: Mapping[str, float],
) -> list[Row]:
    """Compare ends with the teacher's, one row per system.

    Args:
        starts: the systems.
        ends: of a checkpoint, by `sid`.
        teacher_ends: of the teacher.
        energies: the teacher's adsorption energies of `ends`, eV; empty where they are not known.

    Returns:
        Rows with `sid`, `bulk`, `adsorbate`, `converged`, `steps`, `rmsd_A`, `energy_error_eV`,
        `energy_difference_eV` and `in_basin`; values that are not known are None. A system without an end
        counts as outside of the basin.
    """
    rows = []
    for start in starts:
        sid, system = start.system.sid, start.system
        row: Row = {"sid": sid, "bulk": system.bulk, "adsorbate": system.adsorbate, "converged": False}
        row |= dict.fromkeys(("steps", "rmsd_A", "energy_error_eV", "energy_difference_eV"))
        row["in_basin"] = False
        if sid in ends:
            end, goal = ends[sid], teacher_ends[sid]
            row |= {"converged": end.converged, "steps": end.steps}
            row["rmsd_A"] = start.rmsd(end.positions, goal.positions)
            row["energy_error_eV"] = end.energy - goal.energy
            if sid in energies:
                difference = energies[sid] - goal.energy
                row["energy_difference_eV"] = difference
                row["in_basin"] = row["rmsd_A"] < MAX_RMSD and abs(difference) < MAX_ENERGY
            else:
                row["in_basin"] = None
        rows.append(row)
    return rows


def summarize(rows: Sequence[Row]) -> Row:
    """Average over systems: the keys of `ROWS`, `systems` and `relaxed`; None for what is not known."""

    def known(key: str) -> np.ndarray:
        return np.array([row[key] for row in rows if row[key] is not None], dtype=float)

    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) else None

    difference, rmsd = known("energy_difference_eV"), known("rmsd_A")
    complete = all(row["in_basin"] is not None for row in rows)
    return {
        "systems": len(rows),
        "relaxed": len(rmsd),
        "energy_difference_eV": mean(difference),
        "energy_difference_size_eV": mean(np.abs(difference)),
        "energy_difference_median_eV": float(np.median(difference)) if len(difference) else None,
        "rmsd_A": mean(rmsd),
        "rmsd_median_A": float(np.median(rmsd)) if len(rmsd) else None,
        "near_share": float((rmsd < MAX_RMSD).sum()) / len(rows),
        "basin_share": mean(known("in_basin")) if complete else None,
        "converged_share": mean(known("converged")),
        "steps": mean(known("steps")),
        "energy_error_eV": mean(np.abs(known("energy_error_eV"))),
    }


def markdown(record: Mapping[str, Any], figure: str) -> str:
    """Write the page of results.

    Args:
        record: content of the results file.
        figure: name of the picture beside the page.
    """
    results, settings = record["results"], record["settings"]
    lines = [
        "# Relaxations against the teacher's",
        "",
        "Written by `python -m studies.teacher_relaxations`, whose help defines every number. "
        f"{settings['systems']} systems of",
        f"`{settings['data']}` with {settings['bulks']} bulk formulas; L-BFGS until "
        f"{settings['fmax_eV_A']} eV/Å or {settings['steps']} steps, from the same starts.",
        f"The teacher (SevenNet-0) converged in {record['teacher']['converged']} of them, after "
        f"{record['teacher']['mean_steps']:.1f} steps on average.",
        "",
        f"![energy difference and RMSD of every system]({figure})",
        "",
    ]
    rows = [
        [title, *(cell(result["summary"][key], digits) for result in results.values())]
        for key, title, digits in ROWS
    ]
    lines += table(["", *results], rows)
    lines += [
        f"The teacher's basin: RMSD below {MAX_RMSD} Å and energy difference below {MAX_ENERGY} eV in size.",
        "Energy differences are of the teacher's energies at both ends.",
        "",
    ]
    for name, result in results.items():
        if result["summary"]["basin_share"] is None:
            lines += [f"The teacher's energies of the ends of {name} were not computed (no `sevenn`).", ""]
    names = [name for name in results if name != NOT_RELAXED]
    rows = []
    for at, one in enumerate(results[NOT_RELAXED]["systems"]):
        values = [one["sid"], one["bulk"], one["adsorbate"]]
        for name in names:
            row = results[name]["systems"][at]
            values += [cell(row["energy_difference_eV"], 2), cell(row["rmsd_A"], 2)]
            values += ["yes" if row["converged"] else "no"]
        rows.append(values)
    heads = [f"{name} {short}".strip() for name in names for short in ("ΔE (eV)", "RMSD (Å)", "converged")]
    lines += table(["system", "bulk", "adsorbate", *heads], rows)
    return "\n".join(lines).rstrip() + "\n"


def draw(results: Mapping[str, Any], target: Path) -> None:
    """Draw the energy difference against the RMSD of every system, with the teacher's basin.

    Args:
        results: name -> `systems` and `summary`.
        target: PNG file to write.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    smallest = 1e-3
    for name, result in results.items():
        points = [
            (max(row["rmsd_A"], smallest), row["energy_difference_eV"])
            for row in result["systems"]
            if row["energy_difference_eV"] is not None
        ]
        marker = "x" if name == NOT_RELAXED else "o"
        axis.plot(*np.array(points, dtype=float).reshape(-1, 2).T, marker, markersize=4, label=name)
    axis.fill_between([smallest, MAX_RMSD], -MAX_ENERGY, MAX_ENERGY, color="0.85", label="teacher's basin")
    axis.set(xscale="log", xlabel="RMSD of the adsorbate (Å)", ylabel="energy difference (eV)")
    axis.set_yscale("symlog", linthresh=MAX_ENERGY)
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    save_figure(figure, target)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="+", required=True, help="files, or names of shipped models")
    parser.add_argument(
        "--data", type=Path, default=LARGE / "test", help="raw folder with index.jsonl (default: %(default)s)"
    )
    parser.add_argument("--relaxed", type=Path, default=LARGE / "relaxed", help="the teacher's ends")
    parser.add_argument("--systems", type=int, default=20, help="number of systems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of their choice")
    parser.add_argument("--fmax", type=float, default=0.05, help="converged below this force, eV/Å")
    parser.add_argument("--steps", type=int, default=300, help="maximum number of steps")
    parser.add_argument("--batch-size", type=int, default=8, help="structures per batch")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/teacher_relaxations"), help="relaxations, kept to go on"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/teacher_relaxations"),
        help="written as .json, .md, .png",
    )
    arguments = parser.parse_args(argv)
    if arguments.systems < 1:
        raise InputError(f"--systems is {arguments.systems}: give 1 or more")
    checkpoints = {Path(name).stem: find_checkpoint(name) for name in arguments.checkpoints}
    if len(checkpoints) < len(arguments.checkpoints):
        raise InputError("two of the --checkpoints have one file name: the table could not tell them apart")
    for suffix in (".json", ".md", ".png"):
        check_target(arguments.results.with_suffix(suffix), inputs=[arguments.data, *checkpoints.values()])
    settings = RelaxationSettings(fmax=arguments.fmax, steps=arguments.steps, frames="ends")
    chosen = choose(read_index(arguments.data), arguments.systems, arguments.seed)
    starts = read_starts(arguments.data, chosen)
    teacher: Calculator | None = None
    try:
        teacher = sevennet()
    except InputError as error:
        print(f"the teacher's energies of the ends are not computed: {error}")
    goals = read_ends(arguments.relaxed, starts, settings)
    if goals is None:
        goals = _relax_teacher(arguments, starts, settings, teacher)
    results: dict[str, Any] = {}
    at_start = {
        start.system.sid: End(start.frame.pos, start.frame.energy - start.reference, False, 0)
        for start in starts
    }
    rows = compare(starts, at_start, goals, {sid: end.energy for sid, end in at_start.items()})
    results[NOT_RELAXED] = {"summary": summarize(rows), "systems": rows}
    for name, path in checkpoints.items():
        predictor = Predictor(path)
        if predictor.energy_kind != "adsorption":
            raise InputError(f"{path} predicts {predictor.energy_kind} energies, not adsorption energies")
        digest = sha256(Path(path))
        asked = {"checkpoint": digest, "seed": arguments.seed}
        folder = arguments.runs / f"{name}-{digest[:8]}"
        ends = relax_starts(
            free_forces(predictor), starts, settings, folder, asked, batch_size=arguments.batch_size
        )
        energies = teacher_energies(starts, ends, teacher, folder.with_name(f"{folder.name}.teacher.json"))
        rows = compare(starts, ends, goals, energies)
        results[name] = {"checkpoint_sha256": digest, "summary": summarize(rows), "systems": rows}
        shown = [f"{title} {cell(results[name]['summary'][key], digits)}" for key, title, digits in ROWS]
        print(f"{name}: {', '.join(shown)}")
    record = {
        **header(SCHEMA),
        "settings": {
            "data": arguments.data.as_posix(),
            "systems": len(starts),
            "bulks": len({system.bulk for system in chosen}),
            "seed": arguments.seed,
            "fmax_eV_A": arguments.fmax,
            "steps": arguments.steps,
        },
        "teacher": {
            "converged": sum(end.converged for end in goals.values()),
            "mean_steps": float(np.mean([end.steps for end in goals.values()])),
        },
        "results": results,
    }
    write_json(arguments.results.with_suffix(".json"), record, make_folder=True)
    picture = arguments.results.with_suffix(".png")
    draw(results, picture)
    page = markdown(json.loads(json.dumps(record)), picture.name)
    write_bytes(arguments.results.with_suffix(".md"), page.encode())
    print(f"{arguments.results.with_suffix('.md')} is written")


def _relax_teacher(
    arguments: argparse.Namespace,
    starts: Sequence[Start],
    settings: RelaxationSettings,
    teacher: Calculator | None,
) -> dict[str, End]:
    """Relax the starts with the teacher, and write its ends."""
    if teacher is None:
        raise InputError(
            f"{arguments.relaxed} does not exist, and making the teacher's ends needs sevenn: install it, or "
            "use the bundled folder data/teacher_large/relaxed"
        )
    references = {start.system.sid: start.reference for start in starts}
    asked = {"checkpoint": "7net-0", "seed": arguments.seed}
    ends = relax_starts(
        teacher_predict(teacher, references), starts, settings, arguments.runs / "teacher", asked, 1
    )
    lost = next((start.system.sid for start in starts if start.system.sid not in ends), None)
    if lost is not None:
        raise InputError(f"the teacher cannot relax {lost}: choose other systems with --seed")
    write_ends(arguments.relaxed, starts, ends, teacher, settings)
    goals = read_ends(arguments.relaxed, starts, settings)
    assert goals is not None
    return goals


if __name__ == "__main__":
    run_script(main)
