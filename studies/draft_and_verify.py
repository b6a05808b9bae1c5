"""Calls of the full network that a draft saves, and how often it leads into another basin.

    python -m studies.draft_and_verify --full study_teacher --drafts pruned.pt oc20_small --systems 60

Starts are first frames of systems of data/teacher_large/test, chosen as by studies.teacher_relaxations. Each
is relaxed by the full network alone, and by each draft and then the full network
(`equiformer2.inference.relax_draft_and_verify`), with the same optimizer, threshold and steps. All ends are
the full network's. Two of them are one basin if the RMSD of the adsorbate is below 0.2 Å and the energies
differ by less than 0.1 eV. Finished relaxations are kept in `--runs`: a stopped command goes on where it was.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.geometry import find_mic
from torch_geometric.data import Batch
from tqdm import tqdm

from equiformer2.checkpoint.tensor_files import sha256
from equiformer2.errors import InputError
from equiformer2.files import check_target, read_json, write_bytes, write_json
from equiformer2.inference import Engine, Relaxation, RelaxationStore, open_engine
from equiformer2.inference.batched import RelaxationSettings
from equiformer2.script import header, run_script
from equiformer2.shipped import find_checkpoint
from studies.study_data import read_index
from studies.study_errors import LARGE
from studies.teacher_relaxations import MAX_ENERGY, MAX_RMSD, choose, read_starts

SCHEMA = "draft_and_verify/1"
Starts = Sequence[tuple[str, Atoms]]
Ends = dict[str, Relaxation]


def relax_all(
    starts: Starts,
    engine: Engine,
    settings: RelaxationSettings,
    folder: Path,
    draft: Engine | None = None,
) -> Ends:
    """Relax the starts into a folder, in which a stopped run goes on; ends by name."""
    identity = {"model": engine.identity(), "draft": None if draft is None else draft.identity()}
    with RelaxationStore(folder, {**identity, **dataclasses.asdict(settings)}) as store:
        found = store.relax(starts, engine, settings, draft=draft)
        return {end.id: end for end in tqdm(found, total=len(starts), desc=folder.name, unit="system")}


def rmsd(first: Atoms, second: Atoms) -> float:
    """Root mean square distance of the adsorbate's atoms (tag 2) in two structures, nearest images, Å."""
    moved = (first.positions - second.positions)[first.get_tags() == 2]
    nearest, _ = find_mic(moved, first.cell, first.pbc)
    return float(np.sqrt((nearest**2).sum(axis=1).mean()))


def seconds_per_call(engine: Engine, atoms: Atoms) -> float:
    """Shortest of three passes over one structure, s."""
    batch = Batch.from_data_list([engine.data(atoms, "timed")])
    taken = []
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        engine.predict(batch, free_only=True)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def compare(alone: Ends, drafted: Ends, cost: float) -> dict[str, Any]:
    """Compare ends of the full network alone with those that a draft has prepared.

    Args:
        alone, drafted: ends by name.
        cost: of a call of the draft, in calls of the full network.

    Raises:
        InputError: no system is relaxed on both sides.
    """
    rows: list[dict[str, Any]] = []
    for name, one in alone.items():
        other = drafted[name]
        if one.energy_eV is None or other.energy_eV is None:
            continue
        distance, difference = rmsd(one.atoms, other.atoms), other.energy_eV - one.energy_eV
        rows.append(
            {
                "id": name,
                "calls_alone": one.model_evaluations,
                "calls_after_draft": other.model_evaluations,
                "draft_calls": other.draft_evaluations,
                "converged_alone": one.converged,
                "converged_after_draft": other.converged,
                "rmsd_A": distance,
                "energy_difference_eV": difference,
                "same_basin": distance < MAX_RMSD and abs(difference) < MAX_ENERGY,
            }
        )
    if not rows:
        raise InputError("no system is relaxed on both sides: nothing can be compared")
    before, after, cheap = (
        sum(row[key] for row in rows) for key in ("calls_alone", "calls_after_draft", "draft_calls")
    )
    changed = [row for row in rows if not row["same_basin"]]
    both = [row for row in rows if row["converged_alone"] and row["converged_after_draft"]]
    return {
        "relaxations": len(rows),
        "failed": len(alone) - len(rows),
        "calls_alone": before,
        "calls_after_draft": after,
        "draft_calls": cheap,
        "draft_cost": cost,
        "calls_saved_share": 1 - after / before,
        "time_saved_share": 1 - (after + cost * cheap) / before,
        "basins_changed": len(changed),
        "both_converged": len(both),
        "basins_changed_of_converged": sum(not row["same_basin"] for row in both),
        "basins_lower": sum(row["energy_difference_eV"] < -MAX_ENERGY for row in changed),
        "basins_higher": sum(row["energy_difference_eV"] > MAX_ENERGY for row in changed),
        "converged_alone": sum(row["converged_alone"] for row in rows),
        "converged_after_draft": sum(row["converged_after_draft"] for row in rows),
        "systems": rows,
    }


def page(record: Mapping[str, Any]) -> str:
    """Page of the results."""
    settings = record["settings"]
    lines = [
        "# Draft and verify",
        "",
        f"Made by `{record['command']}`.",
        "",
        f"Full network: {record['full']}. Threshold {settings['fmax']:g} eV/Å, at most {settings['steps']} "
        "steps. All ends are the full network's: it finishes every relaxation by its own forces. *Basins",
        "changed*: the end after the draft is not that of the full network alone (RMSD of the adsorbate over",
        f"{MAX_RMSD:g} Å or energies more than {MAX_ENERGY:g} eV apart); *lower* and *higher* tell in which",
        "direction the energy differs by more than that. *Time saved* counts a call of the draft with its",
        "measured cost.",
        "",
        "| draft | relaxations | full calls alone | full calls after the draft | saved | draft calls "
        "| cost of one | time saved | basins changed | of those converged on both sides | lower | higher "
        "| converged alone | after the draft |",
        "|" + 14 * "---|",
    ]
    for name, row in record["drafts"].items():
        lines.append(
            f"| {name} | {row['relaxations']} | {row['calls_alone']} | {row['calls_after_draft']} | "
            f"{row['calls_saved_share']:.0%} | {row['draft_calls']} | {row['draft_cost']:.2f} | "
            f"{row['time_saved_share']:.0%} | {row['basins_changed']} | "
            f"{row['basins_changed_of_converged']} of {row['both_converged']} | {row['basins_lower']} | "
            f"{row['basins_higher']} | {row['converged_alone']} | {row['converged_after_draft']} |"
        )
    return "\n".join(lines) + "\n"


def study_starts(data: Path, count: int, seed: int) -> Starts:
    """Choose first frames of systems, with their held atoms."""
    found = []
    for start in read_starts(data, choose(read_index(data), count, seed)):
        atoms = start.atoms(start.frame.pos)
        atoms.set_constraint(FixAtoms(mask=np.asarray(start.frame.fixed, dtype=bool)))
        found.append((start.system.sid, atoms))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", default="study_teacher", help="checkpoint (default: %(default)s)")
    parser.add_argument("--drafts", nargs="+", required=True, help="checkpoints of cheaper networks")
    parser.add_argument("--data", type=Path, default=LARGE / "test", help="raw folder of the starts")
    parser.add_argument("--systems", type=int, default=60, help="number of systems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--fmax", type=float, default=0.05, help="force threshold, eV/Å (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        help="maximum number of steps of a relaxation (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/draft_and_verify"),
        help="folder of the work so far, which the next run continues",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results/draft_and_verify"), help="written as .json, .md"
    )
    options = parser.parse_args(argv)
    check_target(options.results.with_suffix(".json"))
    settings = RelaxationSettings(fmax=options.fmax, steps=options.steps, frames="ends")
    starts = study_starts(options.data, options.systems, options.seed)
    checkpoint = find_checkpoint(options.full)
    full = open_engine(checkpoint)
    alone = relax_all(starts, full, settings, options.runs / "alone")
    drafts: dict[str, Any] = {}
    for given in options.drafts:
        path = Path(find_checkpoint(given))
        engine = open_engine(path)
        drafted = relax_all(starts, full, settings, options.runs / path.stem, engine)
        atoms = starts[0][1]
        cost = seconds_per_call(engine, atoms) / seconds_per_call(full, atoms)
        drafts[path.stem] = {"sha256": sha256(path), **compare(alone, drafted, cost)}
    record = {
        **header(SCHEMA, checkpoint),
        "full": str(options.full),
        "settings": {"systems": options.systems, "seed": options.seed, **dataclasses.asdict(settings)},
        "drafts": drafts,
    }
    write_json(options.results.with_suffix(".json"), record, make_folder=True)
    text = page(read_json(options.results.with_suffix(".json")))
    write_bytes(options.results.with_suffix(".md"), text.encode())
    print(text)


if __name__ == "__main__":
    run_script(main)
